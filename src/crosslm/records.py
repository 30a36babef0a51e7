"""The things that are handed from one step to the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crosslm.data.examples import Examples


@dataclass(frozen=True)
class SyntheticText:
    """One text that the LLM wrote, with all that is needed to write it again."""

    text: str
    label: int
    prompt: str
    prompt_ids: tuple[int, ...]
    """Tokens of M(y), with the beginning-of-sequence token where the model has one."""
    completion_ids: tuple[int, ...]
    """Tokens of x as sampled, with the token that ended it, if one did."""
    seed: int


@dataclass(frozen=True)
class SyntheticSet:
    """D^s of section 4.2, and what was removed while it was written."""

    samples: list[SyntheticText]
    removed: dict[str, int] = field(default_factory=dict)
    """Number of removed texts by reason."""
    tokens_generated: int = 0

    @property
    def texts(self) -> list[str]:
        """The texts x."""
        return [sample.text for sample in self.samples]

    @property
    def labels(self) -> Tensor:
        """``(texts,)``, the intended labels y."""
        return torch.tensor([sample.label for sample in self.samples], dtype=torch.long)

    def examples(self, indices: Sequence[int] | None = None) -> Examples:
        """Texts and labels as training rows, all or those at ``indices``."""
        everything = Examples(self.texts, [sample.label for sample in self.samples])
        return everything if indices is None else everything.take(indices)


@dataclass(frozen=True)
class Receipt:
    """Why a synthetic text was, or was not, used to train an SLM (step 5)."""

    reward: float
    diversity: float
    score: float
    rank: int
    """1 is the best score."""
    kept: bool


@dataclass(frozen=True)
class SlmState:
    """A classifier as it travels: nothing in it is code."""

    architecture: dict[str, object]
    """The model's ``config.json``."""
    tokenizer: dict[str, str]
    """``tokenizer.json`` and ``tokenizer_config.json``, as text."""
    labels: tuple[str, ...]
    """Label names in the order of the classifier's outputs."""
    max_length: int
    weights: dict[str, Tensor]

    def in_dtype(self, dtype: torch.dtype) -> "SlmState":
        """The same with every fp32 or fp16 weight as this dtype."""
        floats = (torch.float32, torch.float16)
        weights = {name: each.to(dtype) if each.dtype in floats else each for name, each in self.weights.items()}
        return replace(self, weights=weights)

    def like(self, other: "SlmState") -> "SlmState":
        """The same in half precision if the other one came so: who asks for half the bytes gets half the bytes."""
        half = any(weight.dtype == torch.float16 for weight in other.weights.values())
        return self.in_dtype(torch.float16) if half else self


@dataclass(frozen=True)
class Upload:
    """What leaves a silo (step 2)."""

    client_id: str
    client_round: int
    """0 for the client's first upload."""
    class_counts: tuple[int, ...]
    """Private rows of each label, in the order of ``slm.labels``: those held out and canaries too."""
    metrics: dict[str, float]
    slm: SlmState

    def counts_of(self, labels: Sequence[str]) -> tuple[int, ...]:
        """``class_counts`` in the order of these labels; one that the SLM does not have is left out."""
        told = dict(zip(self.slm.labels, self.class_counts, strict=False))
        return tuple(told[label] for label in labels if label in told)

    @property
    def only_label(self) -> str | None:
        """The label that all rows have, as is told here; None for several, and where they are hidden or noisy."""
        labels = [label for label, rows in zip(self.slm.labels, self.class_counts, strict=True) if rows]
        is_noisy = bool(self.metrics.get("dp/count_epsilon"))
        return labels[0] if len(labels) == 1 and not is_noisy else None


@dataclass(frozen=True)
class Download:
    """What comes back to it (step 5)."""

    client_id: str
    client_round: int
    step: int
    """How many SLMs the LLM had met, this one included."""
    metrics: dict[str, float]
    slm: SlmState
    texts: tuple[str, ...] = ()
    """The synthetic texts that trained it, where ``privacy`` has the client look at them."""
