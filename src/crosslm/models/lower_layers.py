"""The reference pass begins where the adapter begins.

Plainly the original model reads a batch from its embeddings on, as the model that learns has just done. Where the
adapter is in the upper layers alone (``llm.adapted_layers``), both have the same hidden states below it, so that what
the learning model hands to its first adapted layer is handed to the original's too, and the layers below are run once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from crosslm.models.causal import decoder_layers


class UpperLayers:
    """The layers from the first adapted one on, and how a pass has called them."""

    def __init__(self, causal: Any) -> None:
        """Look for the first adapted layer of a causal model."""
        _, layers = decoder_layers(causal)
        base = causal.base_model
        self.below = next((place for place, layer in enumerate(layers) if _is_trained(layer)), 0)
        """How many layers the reference need not run; 0 as well where its last norm is not known."""
        norms = [getattr(base, name) for name in ("norm", "ln_f") if hasattr(base, name)]
        if len(norms) != 1:
            self.below = 0
        self._parts = [*layers[self.below :], *norms]
        self._first: Tensor | None = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Within it one pass of the whole model is watched, for :meth:`again`."""
        self._first, self._calls = None, []

        def watch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._first is None:
                self._first = arguments[0].detach()
            self._calls.append((arguments[1:], named))

        hooks = [part.register_forward_pre_hook(watch, with_kwargs=True) for part in self._parts] if self.below else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def again(self) -> Tensor:
        """The last hidden states of that batch by the layers as they are now, ``(batch, tokens, hidden)``."""
        hidden: Any = self._first
        for part, (others, named) in zip(self._parts, self._calls, strict=True):
            given = part(hidden, *others, **named)
            hidden = given[0] if isinstance(given, tuple) else given
        return hidden  # type: ignore[no-any-return]


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
