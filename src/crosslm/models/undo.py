"""The LLM's adapter and its optimiser's state, kept so that an update can be taken back."""

import copy

import torch

from crosslm.models.llm import LLM


class Undo:
    """What trains, as it was when this was made."""

    def __init__(self, llm: LLM, optimizer: torch.optim.Optimizer) -> None:
        self._llm, self._optimizer = llm, optimizer
        self._weights = [parameter.detach().clone() for parameter in llm.trainable_parameters()]
        self._state = copy.deepcopy(optimizer.state_dict())

    def has_changed(self) -> bool:
        """Whether a weight has changed since."""
        pairs = zip(self._llm.trainable_parameters(), self._weights, strict=True)
        return not all(torch.equal(parameter, weight) for parameter, weight in pairs)

    @torch.no_grad()
    def __call__(self) -> None:
        """Make all as it was."""
        for parameter, weight in zip(self._llm.trainable_parameters(), self._weights, strict=True):
            parameter.copy_(weight)
        self._optimizer.load_state_dict(self._state)
