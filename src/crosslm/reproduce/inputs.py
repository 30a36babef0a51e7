"""Which data a cell was made of: the contents of its files, wherever they lie."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

from crosslm.config import Config, DataConfig
from crosslm.data.texts import find_file
from crosslm.errors import DataError
from crosslm.reproduce.benchmarks import BENCHMARKS
from crosslm.reproduce.plan import CEILING, ORIGINAL, STANDALONE, Cell, Choice

PART = 2**20


def digests_of(cell: Cell, choice: Choice, config: Config) -> dict[str, str]:
    """SHA-256 of the contents of each file that a cell is made of, by its name; what cannot be read here is left out.

    Args:
        cell: whose.
        choice: has the folder of all data.
        config: the cell's.
    """
    found = {}
    for name, path in _paths_of(cell, choice, config):
        with suppress(OSError, EOFError, zlib.error):  # the cell itself will say what is amiss
            found[name] = _digest(path, path.stat().st_mtime_ns)
    return found


def _paths_of(cell: Cell, choice: Choice, config: Config) -> Iterator[tuple[str, Path]]:
    """Names and places of a cell's files; of an enhanced LLM's benchmark those of its run, too."""
    if cell.stage in BENCHMARKS:
        data = DataConfig(dir=str(choice.data_dir / cell.stage), test="train.csv")
        for name in ("train.csv", f"{choice.split}.csv"):
            with suppress(DataError):
                yield f"{cell.stage}/{name}", find_file(name, data)
    if cell.method == ORIGINAL:
        return
    for name in _files_of(cell, config):
        with suppress(DataError):  # of a hub, of a package, or on another machine
            yield name, find_file(name, config.data)


def _files_of(cell: Cell, config: Config) -> Iterator[str]:
    data = config.data
    names = [data.train, data.test, data.judge]
    names += [name for client in config.clients for name in (client.train, client.test)]
    if cell.stage not in (CEILING, STANDALONE):
        names += [config.gate.public_texts, config.evaluation.perplexity_text, *config.llm.vocabulary_texts]
    yield from dict.fromkeys(name for name in names if name)


@lru_cache(maxsize=256)
def _digest(path: Path, _changed: int) -> str:
    """Of what a file says, compressed or not; known until it is changed."""
    digest = hashlib.sha256()
    with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
        while part := file.read(PART):
            digest.update(part)
    return digest.hexdigest()
