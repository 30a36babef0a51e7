"""Synthetic texts of a run as lines of JSON: each with all that is known of it, and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslm.errors import RunError

if TYPE_CHECKING:  # the commands that only read a run must not wait for torch
    from torch import Tensor

    from crosslm.records import Receipt, SyntheticSet


def as_lines(
    labels: Sequence[str],
    synthetic: SyntheticSet,
    rewards: Tensor | None = None,
    receipts: Sequence[Receipt] | None = None,
    receipts_of: Mapping[str, Sequence[Receipt]] | None = None,
) -> str:
    """Texts with all that is known of each, one JSON object a line.

    Args:
        labels: of the task.
        synthetic: the texts.
        rewards: ``(texts,)``.
        receipts: why each was, or was not, learned.
        receipts_of: of texts that are for several clients, by client; ``kept`` is then whether any has learned it.
    """
    lines = []
    for place, sample in enumerate(synthetic.samples):
        row: dict[str, Any] = {"text": sample.text, "label": labels[sample.label], "prompt": sample.prompt}
        if rewards is not None:
            row["reward"] = float(rewards[place])
        if receipts is not None:
            row |= vars(receipts[place])
        if receipts_of is not None:
            row["receipts"] = {who: vars(theirs[place]) for who, theirs in receipts_of.items()}
            row["kept"] = any(theirs[place].kept for theirs in receipts_of.values())
        row |= {"seed": sample.seed, "prompt_ids": sample.prompt_ids, "completion_ids": sample.completion_ids}
        lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def read_texts(path: Path, labels: Sequence[str]) -> SyntheticSet:
    """The texts of a file of such lines.

    Raises:
        RunError: it cannot be read.
    """
    from crosslm.records import SyntheticSet, SyntheticText

    def sample(row: dict[str, Any]) -> SyntheticText:
        prompt, completion = tuple(row["prompt_ids"]), tuple(row["completion_ids"])
        label = labels.index(row["label"])
        return SyntheticText(row["text"], label, row["prompt"], prompt, completion, row["seed"])

    return SyntheticSet(_read(path, sample))


def read_receipts_of(path: Path) -> dict[str, list[Receipt]]:
    """The receipts by client in a file of texts for several; none in one of an earlier version.

    Raises:
        RunError: it cannot be read.
    """
    from crosslm.records import Receipt

    def receipts(row: dict[str, Any]) -> dict[str, Receipt]:
        return {who: Receipt(**fields) for who, fields in row.get("receipts", {}).items()}

    rows = _read(path, receipts)
    return {who: [row[who] for row in rows] for who in rows[0]} if rows else {}


def _read(path: Path, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    try:
        return [read(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read: {error}; put it back as it was, or run again") from error
