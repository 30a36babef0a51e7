"""Labelled texts, as files give them and classifiers learn them. Nothing here loads PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Examples:
    """Labelled texts; ``labels`` are indices into the task's labels."""

    texts: list[str]
    labels: list[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Examples":
        """The rows at these indices, in this order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    def class_counts(self, num_classes: int) -> list[int]:
        """How many rows each label has."""
        return [self.labels.count(label) for label in range(num_classes)]
