"""How near one set of texts is to another: longest shared word sequences and nearest neighbours. Pure functions."""

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

NO_SPACES = ("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
"""How Unicode's names of the characters begin of scripts that put no space between words."""


def words(text: str) -> list[str]:
    """The words of a text, or characters where its script puts no spaces between words.

    What is no letter or number only separates, a combining mark belongs to the letter before it. Case, and in which of
    its forms Unicode writes a character (NFC, NFD, full width), make no difference; what is not seen (a soft hyphen) is
    left out.
    """
    found: list[str] = []
    goes_on = takes_marks = False
    for sign in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        category = unicodedata.category(sign)
        if category == "Cf":
            continue
        is_alone = unicodedata.name(sign, "").startswith(NO_SPACES)
        if category[0] == "M":
            if takes_marks:
                found[-1] += sign
            continue
        takes_marks = category[0] in "LN"
        if takes_marks and goes_on and not is_alone:
            found[-1] += sign
        elif takes_marks:
            found.append(sign)
        goes_on = takes_marks and not is_alone
    return found


def longest_shared(texts: Sequence[str], private: Sequence[str]) -> list[int]:
    """For each text the number of :func:`words` of the longest sequence that it shares with any private text.

    Args:
        texts: to be looked at.
        private: to be looked for.
    """
    sources, tokens = [words(text) for text in private], [words(text) for text in texts]
    found, length = [0] * len(tokens), 0
    alive = list(range(len(tokens)))
    while alive:  # by length, so that no more is held than the sequences of one length, of the fewer texts
        length += 1
        wanted = {gram for place in alive for gram in _grams(tokens[place], length)}
        both: set[tuple[str, ...]] = set()
        having = []
        for source in sources:
            if some := wanted.intersection(_grams(source, length)):
                both |= some
                having.append(source)
        sources = having
        alive = [place for place in alive if not both.isdisjoint(_grams(tokens[place], length))]
        for place in alive:
            found[place] = length
    return found


def nearest_similarity(vectors: Tensor, private: Tensor) -> Tensor:
    """Cosine of each vector and its nearest private one, ``(texts,)``.

    Args:
        vectors: ``(texts, dimensions)``.
        private: ``(rows, dimensions)``.
    """
    return torch.as_tensor((normalize(vectors, dim=1) @ normalize(private, dim=1).T).max(dim=1).values)


def _grams(tokens: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[place : place + length]) for place in range(len(tokens) - length + 1)]
