"""A run from Python: make one, or open a finished one, and use its classifiers and its LLM."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from crosslm.config import Config
from crosslm.config_file import load
from crosslm.data.rows import Row
from crosslm.data.split import Split
from crosslm.errors import ConfigError, DataError, ModelError, RunError
from crosslm.experiment import run_local
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, resolve_device
from crosslm.records import SyntheticText
from crosslm.runs.naming import next_free
from crosslm.runs.preparation import original_llm, perplexity_text_of, public_texts
from crosslm.runs.rundir import CONFIG, RunDir
from crosslm.runs.snapshot import inputs_digest
from crosslm.support.commands import command
from crosslm.support.progress import Display, Progress
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task

ROWS_AT_ONCE = 64
ADDED = ("predicted", "probability")
"""The columns that a classified row has more."""


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one text."""

    label: str
    """The most likely label."""
    probability: float
    """How sure the classifier is of it, in (0, 1]."""


class Run:
    """A finished run and what it made. Models are loaded when they are asked for.

    Example:
        >>> run = Run.open("runs/tickets-1")
        >>> run.clients
        ('north', 'south')
        >>> run.predict("north", ["The whole ward is without power."])[0].label in run.task.labels
        True
        >>> [text] = run.generate(1, label="urgent")
        >>> text.text != ""
        True
    """

    def __init__(self, path: Path, config: Config, summary: dict[str, Any], cache: Path) -> None:
        self.path = path
        self.config = config
        """What was run."""
        self.summary = summary
        """What ``summary.json`` holds."""
        self.task = Task.from_config(config.task)
        self._cache = cache
        self._slms: dict[str, SLM] = {}

    @classmethod
    def open(cls, path: str | Path, cache: str | Path | None = None) -> "Run":
        """A run that is complete.

        Args:
            path: the run folder.
            cache: where converted models are kept; ``$CROSSLM_CACHE`` or the user's cache if None.

        Raises:
            CrosslmError: there is no run, it is not complete, or its device is not there.
        """
        folder = RunDir.open(Path(path))
        summary = folder.summary()
        config = load(folder.path / CONFIG)
        config = config.model_copy(update={"device": resolve_device(config.device)})
        return cls(folder.path, config, summary, cache_folder(str(cache) if cache else None))

    @property
    def clients(self) -> tuple[str, ...]:
        """Those that got an enhanced SLM, sorted by name."""
        return tuple(sorted(set(self.summary["slm"]["crosslm"]) - {"mean"}))

    def slm_folder(self, client: str, own: bool | None = None) -> Path:
        """Folder of the SLM that a client goes on with, for any ``from_pretrained``.

        Args:
            client: whose.
            own: True: the one that it uploaded last; False: the one that came back; None: this one, or its own if it
                did not accept this one (:meth:`kept_its_own`).

        Raises:
            RunError: the run has no such client, or has not kept what it uploaded.
        """
        if client not in self.clients:
            raise RunError(f"{self.path}: has no client {client!r}; its clients are: {', '.join(self.clients)}")
        own = self.kept_its_own(client) if own is None else own
        folder = self.path / ("uploads" if own else "slm") / client
        if own and not folder.is_dir():
            if self.summary.get("engine"):
                raise RunError(f"{folder}: is not there; between machines a silo has its own: name its kit")
            raise RunError(f"{folder}: is not there; look at {self.path / 'slm' / client}, which is what came back")
        return folder

    def slm(self, client: str, own: bool | None = None) -> SLM:
        """A client's SLM, of :meth:`slm_folder`, its labels in the task's order.

        Raises:
            RunError: the run has no such client, or has not kept what it uploaded.
            ModelError: the folder is damaged.
        """
        folder = self.slm_folder(client, own)
        try:
            slm = SLM.load_trained(str(folder), self.config.device)
            slm.order_labels(self.task.labels)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: a classifier cannot be loaded: {error}\nRun {command('run', self.path / CONFIG)} again."
            ) from error
        return slm

    def kept_its_own(self, client: str) -> bool:
        """Whether that client did not accept its enhanced SLM (``acceptance``, or an error), and goes on with its own.

        Not known of a run between machines, where silos decide.
        """
        decision = self.summary["clients"].get(client, {}).get("decision") or {}
        return not decision.get("accepted", True)

    @property
    def llm_folder(self) -> Path:
        """Folder of the adapter, for PEFT, or after full fine-tuning of the whole model."""
        return self.path / "llm"

    def original_llm(self, display: Display | None = None) -> str:
        """Folder or hub id of the LLM before the run, which the adapter belongs to.

        Raises:
            CrosslmError: it cannot be had any more.
        """
        return original_llm(self.config, self._cache, Progress(display).note)

    def llm(self, display: Display | None = None) -> LLM:
        """The enhanced LLM; loaded anew at every call.

        Raises:
            CrosslmError: the original LLM cannot be had any more, or the adapter is damaged.
        """
        return LLM.load_trained(self.original_llm(display), str(self.llm_folder), self.config.llm, self.config.device)

    def predict(self, client: str, texts: Sequence[str]) -> list[Prediction]:
        """What the SLM that a client goes on with says of each text.

        Raises:
            CrosslmError: as :meth:`slm`.
        """
        if client not in self._slms:
            self._slms[client] = self.slm(client)
        return predict(self._slms[client], texts)

    def generate(
        self, count: int, label: str | None = None, seed: int = 0, display: Display | None = None
    ) -> list[SyntheticText]:
        """Text that the enhanced LLM writes to a label prompt (Eq. 2 and 3).

        Args:
            count: how many texts.
            label: of all of them; each drawn uniformly if None. A text's ``label`` is the index in
                ``task.labels``.
            seed: the same seed gives the same texts.
            display: shows progress.

        Raises:
            ConfigError: the task has no such label, or the count is not positive.
            CrosslmError: as :meth:`llm`, or the LLM could not write so many.
        """
        task, labels = self.task, self.task.labels
        if count < 1:
            raise ConfigError(f"the number of texts must be 1 or more, found {count}")
        if label is not None:
            if label not in labels:
                raise ConfigError(f"the task has no label {label!r}; its labels are: {', '.join(labels)}")
            task = _only(task, label)
        progress = Progress(display)
        llm = self.llm(display)
        with progress.stage("generate", f"label {label}" if label else "", count, "texts") as advance:
            drawn = seed_for(self.config.seed, "generate", seed)
            texts = synthesize(llm, task, self.config.synthesis, count, drawn, advance).samples
        return [replace(text, label=labels.index(task.labels[text.label])) for text in texts]

    def synthetic(self) -> list[dict[str, Any]]:
        """Every synthetic text that the run kept on disk, with where it comes from.

        Returns:
            The rows of ``synthetic/*.jsonl`` with ``source`` (``base``: the original LLM; ``drafts``: what the LLM
            learned from; ``pool``: what an SLM's texts were chosen from; ``closing``: the same in the end, for all;
            ``final``: the LLM at the end), ``step`` and ``client`` (None where there is none).
        """
        arrivals = {event["step"]: event["client"] for event in RunDir(self.path).events() if event["event"] == "step"}
        rows = []
        for path in sorted((self.path / "synthetic").glob("*.jsonl")):
            parts = path.stem.split("-")  # base, final, closing-pool, step-0001-pool, step-0001-drafts-0
            step = int(parts[1]) if parts[0] == "step" else None
            origin = {"source": parts[2] if step else parts[0], "step": step, "client": arrivals.get(step)}
            rows += [origin | json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return rows


def run(
    config: Config, output: str | Path | None = None, cache: str | Path | None = None, display: Display | None = None
) -> Run:
    """Run the method and both baselines with all clients in this process, as ``crosslm run`` does.

    Args:
        config: what to run; :func:`crosslm.load` reads one.
        output: run folder to create; ``runs/NAME-1`` or the number after the highest there if None.
        cache: where converted models are kept; ``$CROSSLM_CACHE`` or the user's cache if None.
        display: shows progress; nothing is shown if None.

    Raises:
        CrosslmError: the input is wrong, or no client could be served.

    Example:
        >>> import crosslm
        >>> run = crosslm.run(crosslm.load("tickets.toml"), "runs/tickets-2")
        >>> run.config.name
        'tickets'
    """
    folder = Path(output) if output else next_free(Path("runs"), config.name)
    run_local(config, folder, cache_folder(str(cache) if cache else None), display)
    return Run.open(folder, cache)


def has_other_data(config: Config, split: Split, summary: Mapping[str, Any]) -> bool:
    """Whether a run's data files have changed since; not known of a run of an earlier version, which did not say.

    Args:
        config: of the run.
        split: of its files as they are now.
        summary: what ``summary.json`` holds.

    Raises:
        DataError: one of its other texts is not there any more.
    """
    if "inputs" not in summary:
        return False
    return bool(summary["inputs"] != inputs_digest(split, public_texts(config), perplexity_text_of(config)))


def predict(slm: SLM, texts: Sequence[str]) -> list[Prediction]:
    """The most likely label of each text."""
    probabilities = slm.predict_proba(texts)
    best = probabilities.max(dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Prediction(slm.labels[label], probability) for label, probability in pairs]


def classified(slm: SLM, rows: Iterable[Row], text_column: str) -> Iterator[Row]:
    """Each row with ``predicted`` and ``probability``, which are None where there is no text.

    Rows are taken some at a time, so that what comes through a pipe goes on at once.

    Raises:
        DataError: a row has a column of such a name already.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        if taken := [name for name in ADDED if any(name in row for row in chunk)]:
            raise DataError(f"the rows have a column {taken[0]!r}, which is what is written here: give it another name")
        texts = [" ".join(str(row[text_column] or "").split()) for row in chunk]
        found = iter(predict(slm, [text for text in texts if text]))
        for row, text in zip(chunk, texts, strict=True):
            said = next(found) if text else None
            yield row | {
                "predicted": said.label if said else None,
                "probability": round(said.probability, 4) if said else None,
            }


def _only(task: Task, label: str) -> Task:
    """The same task with one label, so that every text is written to it."""
    place = task.labels.index(label)
    return Task(
        (label,),
        task.query_template,
        (task.prompts[place],),
        (task.statements[place],),
        (task.verbalizers[place],),
    )
