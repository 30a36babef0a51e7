"""The run folder: the only place that writes what a run leaves behind."""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from crosslm.config import Config
from crosslm.errors import RunError
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.records import Receipt, SyntheticSet, Upload

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"


class RunDir:
    """``config.toml``, ``metrics.jsonl``, ``summary.json``, ``synthetic/``, ``uploads/``, ``slm/``, ``llm/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check_free(path: Path) -> None:
        """Find out that a new run may be written here.

        Raises:
            RunError: the folder holds something already.
        """
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            what = "another run" if (path / CONFIG).exists() else "other files"
            raise RunError(f"{path}: holds {what} already and nothing is written over; choose another --output")

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunDir":
        """A new run folder with the resolved configuration in it.

        Raises:
            RunError: the folder holds something already, or cannot be written.
        """
        cls.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run.write(CONFIG, config.dump())
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run folder.

        Raises:
            RunError: there is no run in it.
        """
        if not (path / CONFIG).is_file():
            raise RunError(f"{path}: not a run folder (it has no {CONFIG})")
        return cls(path)

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to ``metrics.jsonl``, at once."""
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **fields}, ensure_ascii=False)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened so far."""
        path = self.path / METRICS
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
        )

    def save_synthetic(
        self,
        name: str,
        labels: tuple[str, ...],
        synthetic: SyntheticSet,
        rewards: Tensor | None = None,
        receipts: list[Receipt] | None = None,
    ) -> None:
        """Write texts with all that is known of each, one JSON object a line."""
        lines = []
        for place, sample in enumerate(synthetic.samples):
            row: dict[str, Any] = {"text": sample.text, "label": labels[sample.label], "prompt": sample.prompt}
            if rewards is not None:
                row["reward"] = float(rewards[place])
            if receipts is not None:
                row |= vars(receipts[place])
            row |= {"seed": sample.seed, "prompt_ids": sample.prompt_ids, "completion_ids": sample.completion_ids}
            lines.append(json.dumps(row, ensure_ascii=False))
        self.write(f"synthetic/{name}.jsonl", "\n".join(lines) + "\n")

    def save_slm(self, client_id: str, slm: SLM) -> None:
        """Write a classifier folder for transformers."""
        slm.save(str(self.path / "slm" / client_id))

    def save_upload(self, upload: Upload) -> None:
        """Write a client's classifier as it came, for ``crosslm audit``; a later one takes the place of an earlier."""
        SLM.from_state(upload.slm).save(str(self.path / "uploads" / upload.client_id))

    def save_llm(self, llm: LLM) -> None:
        """Write the adapter folder for PEFT, or the whole model after full fine-tuning."""
        llm.save(str(self.path / "llm"))

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``; its presence says that the run is complete."""
        self.write(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def summary(self) -> dict[str, Any]:
        """Read ``summary.json``.

        Raises:
            RunError: the run has not been completed.
        """
        path = self.path / SUMMARY
        if not path.is_file():
            raise RunError(f"{self.path}: the run is not complete (it has no {SUMMARY})")
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path}: damaged: {error}") from error
        return loaded


def next_free(folder: Path, name: str) -> Path:
    """``folder/name-1``, or the next number that is free."""
    number = 1
    while (folder / f"{name}-{number}").exists():
        number += 1
    return folder / f"{name}-{number}"


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    packages = ("crosslm", "torch", "transformers", "peft", "sentence-transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
