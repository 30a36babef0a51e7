"""Where cells are kept: a JSON file each, written whole or not at all, and never made twice."""

import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from crosslm.config import Config
from crosslm.errors import RunError
from crosslm.reproduce.benchmarks import BENCHMARKS
from crosslm.reproduce.plan import CEILING, ORIGINAL, RUNS_LLM, STANDALONE, Cell, leaves
from crosslm.runs.rundir import CONFIG, SUMMARY, RunDir

MACHINES_OWN = (("data", "dir"), ("device",))
CEILING_SECTIONS = ("seed", "task", "data", "clients")
STANDALONE_SECTIONS = (*CEILING_SECTIONS, "acceptance", "privacy", "federation")
SLM_FIELDS = ("models", "max_length", "freeze_embeddings", "private")
STEP_5 = {
    "slm": ("synthetic", "soft_labels", "intended_labels", "llm_judges", "weigh_judges", "interpolation"),
    "selection": ("fraction", "score", "llm_posterior", "nonpositive_rewards", "class_balance", "encoder"),
    "gate": ("teach_refused", "new_head"),
    "federation": ("closing", "closing_original"),
    "acceptance": ("balanced", "margin", "confidence"),
}
"""What an SLM learns before it goes back, and who keeps it: the LLM never meets it where nobody comes twice."""
ORIGINAL_LLM = ("model", "dtype", "lora_rank", "lora_alpha", "adapted_layers")
UNNEEDED = ("slm", "slm-previous", "uploads", "quarantine", "checkpoints")
"""Of a run whose figures are kept: a gigabyte that nothing here reads again. Table 7 reads ``llm``."""


class Store:
    """``OUTPUT/SPLIT``: ``cells/``, the run folders in ``runs/``, and the tables."""

    def __init__(self, output: Path, split: str) -> None:
        self.folder = output / split
        self._files = RunDir(self.folder)

    def run_folder(self, cell: Cell) -> Path:
        """The run folder of a cell of the stage ``run``, or of a benchmark's start."""
        return self.folder / "runs" / Path(cell.path).parent

    def cell_file(self, cell: Cell) -> Path:
        """Where a cell is kept, if it is."""
        return self.folder / f"cells/{cell.path}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What is kept of a cell, or None if it has not been done.

        Raises:
            RunError: the file is damaged.
        """
        path = self.cell_file(cell)
        if not path.is_file():
            return None
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged, delete it to have it done again: {error}") from error
        return kept

    def largest_seed(self) -> int:
        """The largest seed of any kept cell; -1 if there is none."""
        numbers = [path.name.removeprefix("seed-") for path in self.folder.glob("cells/*/*/*/seed-*")]
        return max((int(number) for number in numbers if number.isdigit()), default=-1)

    def keep(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Write a cell; from now on it is done."""
        self.write(f"cells/{cell.path}.json", json.dumps(figures, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all.

        Raises:
            RunError: the folder cannot be written.
        """
        self._files.write(name, text)

    def ready_run_folder(self, cell: Cell, config: Config, contents: dict[str, str]) -> Path:
        """The run folder: with the finished run of this configuration, with one that can be gone on with, or empty.

        A run that was stopped is gone on with if its configuration is this one to the last field. What else is there
        is removed: it is of another configuration or of other data, and its cell has been deleted. A run of a version
        that noted no contents counts as one of the data that are there now.

        Args:
            cell: whose.
            config: its own.
            contents: of its files (:func:`crosslm.reproduce.inputs.digests_of`); are noted beside the folder.

        Raises:
            RunError: they cannot be noted.
        """
        folder = self.run_folder(cell)
        files = folder.with_name(f"{folder.name}.files.json")
        try:
            noted = json.loads(files.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            noted = {}
        now = {"config": config.model_dump(mode="json", exclude_none=True)}
        try:
            then = {"config": tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))}
        except (OSError, ValueError):
            then = {}
        is_finished = (folder / SUMMARY).is_file() and not differences(cell, then, now)
        if (not is_finished and then != now) or other_contents(noted, contents):
            shutil.rmtree(folder, ignore_errors=True)
            noted = {}
        self.write(str(files.relative_to(self.folder)), json.dumps(noted | contents) + "\n")
        return folder

    def drop_unneeded(self, cell: Cell) -> None:
        """Remove from a run what nothing here reads once its cell is kept."""
        for name in UNNEEDED:
            shutil.rmtree(self.run_folder(cell) / name, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who works in this folder; a process that ends, however it does, gives it free.

        Raises:
            RunError: another one is at work, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {error}; choose another --output") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            message = f"{self.folder}: another crosslm reproduce is at work here; choose another --output"
            raise RunError(message) from None
        finally:
            os.close(handle)


def differences(cell: Cell, kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings in which a kept cell differs from what would be done now.

    A field that the cell does not know, being older, counts as its default: that is what was done then. (It is not for
    ``gate.new_head``: no silo of the cells that were kept before that had one label, but for two that were made again.)
    A file counts where its contents are known of both.
    """
    try:
        # under preset paper what is missing gets its default
        then = Config.model_validate(kept["config"] | {"preset": "paper"})
    except (ValidationError, KeyError, TypeError):
        return ["config"]
    both = [then, Config.model_validate(now["config"] | {"preset": "paper"})]
    tables = [{**_relevant(config, cell), **_rest(side)} for config, side in zip(both, (kept, now), strict=True)]
    paths = dict.fromkeys(path for table in tables for path in leaves(table) if path not in MACHINES_OWN)
    changed = [f"the contents of {name}" for name in other_contents(kept.get("files", {}), now.get("files", {}))]
    return [".".join(path) for path in paths if _at(tables[0], path) != _at(tables[1], path)] + changed


def other_contents(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of the files whose contents are known of both times and differ."""
    return [name for name in then if name in now and then[name] != now[name]]


def _rest(side: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in side.items() if name not in ("config", "files")}


def _relevant(config: Config, cell: Cell) -> dict[str, Any]:
    dump = config.model_dump(mode="json", exclude_none=True)
    if cell.method == ORIGINAL:
        return {"llm": {name: dump["llm"][name] for name in ORIGINAL_LLM}}
    if cell.stage in (CEILING, STANDALONE):
        slm = {name: dump["slm"][name] for name in SLM_FIELDS}
        dump["acceptance"] = {"enabled": config.acceptance.enabled}  # it holds rows out; nothing comes back to try
        sections = CEILING_SECTIONS if cell.stage == CEILING else STANDALONE_SECTIONS
        return {name: dump.get(name) for name in sections} | {"slm": slm}
    if cell.stage in (*BENCHMARKS, RUNS_LLM) and config.federation.participations == 1:
        for section, names in STEP_5.items():
            dump[section] = {name: value for name, value in dump[section].items() if name not in names}
        if config.reward.llm_judges:  # then it weighs who rewards the LLM, too
            dump["slm"]["weigh_judges"] = config.slm.weigh_judges
    return dump


def _at(table: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        table = table.get(key) if isinstance(table, dict) else None
    return table
