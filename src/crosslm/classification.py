"""The LLM as a classifier of texts (CrossLM, section 3, Eq. 1)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crosslm.models.llm import LLM
from crosslm.models.tokens import verbalizer_ids
from crosslm.task import Task

CHUNK = 64
MAX_TOKENS = 256  # of a text; with the query well inside the 1,024 of GPT-2


def class_probabilities(
    llm: LLM, task: Task, texts: Sequence[str], on_texts: Callable[[float], None] = lambda _: None
) -> Tensor:
    """``p(y|x)`` by the verbalizers (Eq. 1), ``(texts, labels)``; of each text the first 256 tokens are read."""
    verbalizers = verbalizer_ids(llm.tokenizer, task)
    parts = [torch.zeros(0, len(task.labels))]
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        parts.append(llm.classify([task.query(llm.shorten(text, MAX_TOKENS)) for text in chunk], verbalizers))
        on_texts(len(chunk))
    return torch.cat(parts)
