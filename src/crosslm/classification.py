"""The LLM as a classifier of texts (CrossLM, section 3, Eq. 1)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crosslm.models.llm import LLM
from crosslm.models.tokens import MAX_TOKENS, read_of, verbalizer_ids
from crosslm.task import Task

CHUNK = 64


def class_probabilities(
    llm: LLM, task: Task, texts: Sequence[str], on_texts: Callable[[float], None] = lambda _: None
) -> Tensor:
    """``p(y|x)`` by the verbalizers (Eq. 1), ``(texts, labels)``; of each text the first 256 tokens are read.

    Of a text for which the query leaves fewer of the LLM's positions, so many as there is room for.

    Texts of like length are read together, whatever their order, since padding takes as long as text.
    """
    verbalizers = verbalizer_ids(llm.tokenizer, task)
    room = llm.positions - read_of(verbalizers)
    queries = [_query(llm, task, text, room) for text in texts]
    order = sorted(range(len(queries)), key=lambda place: len(queries[place]))
    found = torch.zeros(len(queries), len(task.labels))
    for start in range(0, len(order), CHUNK):
        places = order[start : start + CHUNK]
        found[places] = llm.classify([queries[place] for place in places], verbalizers)
        on_texts(len(places))
    return found


def _query(llm: LLM, task: Task, text: str, room: int) -> str:
    """M(x) of the beginning of a text; a cut may make more tokens of the last word, and then more is cut off."""
    tokens = min(MAX_TOKENS, len(llm.tokenizer.encode(text, add_special_tokens=False)))
    query = task.query(llm.shorten(text, tokens))
    while tokens and (over := len(llm.encode(query)) - room) > 0:
        tokens = max(0, tokens - over)
        query = task.query(llm.shorten(text, tokens))
    return query
