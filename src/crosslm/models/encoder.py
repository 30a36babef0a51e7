"""The off-the-shelf sentence transformer of section 4.2, whose vectors measure diversity."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from crosslm.models.loading import loading


class Encoder(Protocol):
    """Turns texts into sentence vectors."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(texts, dimensions)``, on a device of its own."""


class SentenceEncoder:
    """A sentence-transformers model."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from sentence_transformers import SentenceTransformer  # takes seconds, and few commands need it

        with loading(
            f"selection.encoder {folder!r} cannot be loaded as a sentence transformer", "sentence-transformers"
        ):
            self._model = SentenceTransformer(folder, device=device)
            self._model.encode(["a", "a longer text"], show_progress_bar=False)  # GPT-2, say, cannot pad
        # the original LLM's texts come again with each client, and what all learn in the end too
        self._vectors = lru_cache(maxsize=2)(self._read)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(texts, dimensions)``, in fp32, where the model is; of the last two sets of texts it is known."""
        return self._vectors(tuple(texts))

    def _read(self, texts: tuple[str, ...]) -> Tensor:
        vectors = self._model.encode(list(texts), batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        return torch.as_tensor(vectors).float()
