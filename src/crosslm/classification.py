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
    """``p(y|x)`` by the verbalizers (Eq. 1), ``(texts, labels)``; of each text the first 256 tokens are read.

    Texts of like length are read together, whatever their order, since padding takes as long as text.
    """
    verbalizers = verbalizer_ids(llm.tokenizer, task)
    queries = [task.query(llm.shorten(text, MAX_TOKENS)) for text in texts]
    order = sorted(range(len(queries)), key=lambda place: len(queries[place]))
    found = torch.zeros(len(queries), len(task.labels))
    for start in range(0, len(order), CHUNK):
        places = order[start : start + CHUNK]
        found[places] = llm.classify([queries[place] for place in places], verbalizers)
        on_texts(len(places))
    return found
