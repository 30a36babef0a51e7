"""Sentences of random words, planted among private rows to see whether a model gives them away.

Carlini et al., "The Secret Sharer", USENIX Security 2019. Nobody writes such a sentence by chance, so whatever
knows it has it from the rows that it was planted in.
"""

import random
from dataclasses import dataclass
from typing import Any

from crosslm.data.examples import Examples
from crosslm.errors import ModelError
from crosslm.support.seeding import seed_for

WORDS = 8
FEWEST_WORDS = 12  # in a vocabulary that canaries can be drawn from


@dataclass(frozen=True)
class Canaries:
    """The planted sentences of one client, and random ones of their form that were not planted."""

    planted: Examples
    others: list[str]


def draw_canaries(tokenizer: Any, labels: int, planted: int, others: int, seed: int) -> Canaries:
    """Random sentences; the same arguments give the same.

    Args:
        tokenizer: the SLM's, whose whole words the sentences are made of.
        labels: number of classes; the planted get them in turn.
        planted: how many to plant.
        others: how many to compare them with.
        seed: of the draws.

    Raises:
        ModelError: the vocabulary has too few whole words.
    """
    vocabulary = _whole_words(tokenizer)
    if len(vocabulary) < FEWEST_WORDS:
        raise ModelError(
            f"privacy.canaries: the SLM's vocabulary has {len(vocabulary)} whole words; {FEWEST_WORDS} are needed"
        )
    draw = random.Random(seed)
    sentences: dict[str, None] = {}
    while len(sentences) < planted + others:
        sentences[" ".join(draw.choices(vocabulary, k=WORDS))] = None
    drawn = list(sentences)
    return Canaries(Examples(drawn[:planted], [place % labels for place in range(planted)]), drawn[planted:])


def plant(private: Examples, tokenizer: Any, labels: int, count: int, run_seed: int, client_id: str) -> Examples:
    """The private rows, with this client's canaries after them."""
    if not count:
        return private
    canaries = draw_canaries(tokenizer, labels, count, 0, seed_for(run_seed, "canaries", client_id)).planted
    return Examples(private.texts + canaries.texts, private.labels + canaries.labels)


def _whole_words(tokenizer: Any) -> list[str]:
    """Tokens that are words of their own, without the marks that byte-pair tokenizers put before one."""
    tokens = [token for token in tokenizer.get_vocab() if not token.startswith("##")]
    marked = [token[1:] for token in tokens if token[:1] in ("Ġ", "▁")]
    return sorted(
        {word for word in marked or tokens if word.isascii() and word.isalpha() and word.islower() and len(word) > 2}
    )
