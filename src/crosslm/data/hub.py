"""Labelled texts from the Hugging Face hub, or from a folder in its form."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crosslm.config import DataConfig
from crosslm.errors import DataError

HUB = "hf:"


def hub_rows(name: str, data: DataConfig) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """Rows of a split, numbered from 1, its labels named by its features, and what to call it in a message.

    Raises:
        DataError: it cannot be had; or, at that row, a label is none of the dataset's.
    """
    dataset, colon, split = name.removeprefix(HUB).rpartition(":")
    if not colon:
        raise DataError(f"{name!r}: must look like hf:DATASET:SPLIT, for example hf:stanfordnlp/sst2:train")
    try:
        from datasets import ClassLabel, load_dataset
    except ImportError as error:
        raise DataError(f"{name!r} needs the datasets library; run: pip install 'crosslm[datasets]'") from error
    dataset, configuration = _hub_parts(dataset)
    try:
        table = load_dataset(dataset, configuration, split=split)
    except Exception as error:
        raise DataError(f"{name!r} cannot be loaded; give a file if no hub can be reached: {error}") from error
    names = table.features.get(data.label_column)

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(table, start=1):
            label = row.get(data.label_column)
            if isinstance(names, ClassLabel) and isinstance(label, int):
                row = {**row, data.label_column: _class_name(names.names, label, f"{name}: row {number}")}
            yield number, row

    return name, rows()


def _class_name(names: Sequence[str], label: int, where: str) -> str:
    if not 0 <= label < len(names):
        raise DataError(
            f"{where} has the label {label}, which is none of the dataset's {list(names)}: this split is published "
            "without its labels (-1), so name another"
        )
    return names[label]


def _hub_parts(dataset: str) -> tuple[str, str | None]:
    """``owner/name/config`` as ``owner/name`` and ``config``; a local folder stays whole."""
    if Path(dataset).is_dir() or dataset.count("/") < 2:
        return dataset, None
    owner, name, configuration = dataset.split("/", 2)
    return f"{owner}/{name}", configuration
