"""The server's side of a run between machines: its models, its run folder, its journal."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crosslm import evaluate, snapshot
from crosslm.checkpoint import Checkpoints
from crosslm.config import Config
from crosslm.data import balanced_sample, find_file, load_examples
from crosslm.errors import DataError, QuarantineError, UploadError
from crosslm.federation.messages import describe, encode
from crosslm.federation.spool import Spool
from crosslm.gate import Gate
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import model_folder, resolve_device
from crosslm.preparation import original_llm
from crosslm.progress import Progress
from crosslm.records import Download, Examples, SyntheticSet, Upload
from crosslm.rundir import CONFIG, RunDir, versions
from crosslm.seeding import seed_for
from crosslm.server import Server, StepRecord
from crosslm.synthesis import synthesize
from crosslm.task import Task

Refuse = Callable[[str, int, Exception], None]


class Deployment:
    """Implements :class:`crosslm.federation.exchange.Journal` for a server without any private text.

    Where the server has test rows (``data.test``), SLMs and LLM are measured on them; a server that
    has none trains all the same.
    """

    def __init__(self, run: RunDir, config: Config, server: Server, refuse: Refuse, spool: Spool) -> None:
        self.run, self.config, self.server, self.spool = run, config, server, spool
        self.checkpoints = Checkpoints(run, config.checkpoint.keep)
        self._refuse = refuse
        self._probe = ""
        self.test = test_rows(config)

    @classmethod
    def open(cls, folder: Path, config: Config, cache: Path, refuse: Refuse, spool: Spool) -> "Deployment":
        """Load the models, and go on in the run folder if there is one.

        Args:
            folder: run folder.
            config: of the run.
            cache: where converted models are.
            refuse: is told of uploads that cannot be used: silo, round, why.
            spool: remembers what is worked on.
        """
        config = config.model_copy(update={"device": resolve_device(config.device)})
        run = RunDir.open(folder) if (folder / CONFIG).exists() else RunDir.create(folder, config)
        note = _note(run)
        llm = LLM.load(original_llm(config, cache, note), config.llm, seed_for(config.seed, "llm"), config.device)
        encoder = SentenceEncoder(model_folder(config.selection.encoder, cache, note), config.device)
        server = Server(config, Task.from_config(config.task), llm, encoder, Progress())
        deployment = cls(run, config, server, refuse, spool)
        record = deployment.checkpoints.last()
        if record is None:
            deployment._begin()
        else:
            deployment._go_on(record)
        return deployment

    def _begin(self) -> None:
        self.run.event("start", versions=versions(), engine="flower")
        self._measure_llm("before")
        probe = SyntheticSet([])
        if self.config.gate.enabled:
            seed, count = seed_for(self.config.seed, "base"), self.config.gate.texts
            probe = synthesize(self.server.llm, self.server.task, self.config.synthesis, count, seed)
        self._probe = self.checkpoints.put(snapshot.texts_bytes(probe))
        self._open_gate(probe)
        self._save({"outcome": "beginning"}, None)

    def _go_on(self, record: dict[str, Any]) -> None:
        """Put everything back as it was after the last arrival; what was not sent then is owed now."""
        state, get = record["state"], self.checkpoints.get
        self.run.go_back(state["events"])
        self._probe = state["probe"]
        snapshot.restore_server(self.server, get(record["adapter"]), get(state["optimizer"]), state["steps"])
        self._open_gate(snapshot.texts_of(get(self._probe)))
        if self.server.gate:
            snapshot.restore_gate(self.server.gate, get(state["gate"]))
        cause = record["cause"]
        for arrival in self.spool.of(str(cause.get("client"))):
            if arrival.round == cause["round"] and arrival.state in ("received", "processing"):
                self.spool.serve(arrival.silo, arrival.round, get(state["download"]))

    def _open_gate(self, probe: SyntheticSet) -> None:
        if self.config.gate.enabled:
            public = Examples([], [])
            if self.config.gate.public_texts:
                name, labels = self.config.gate.public_texts, self.config.task.labels
                public = load_examples(name, self.config.data, labels).examples
            fixed = probe.examples()
            self.server.gate = Gate(self.config, Examples(fixed.texts + public.texts, fixed.labels + public.labels))

    def _save(self, cause: dict[str, Any], download: bytes | None) -> None:
        put, server = self.checkpoints.put, self.server
        state = {
            "steps": server.steps,
            "optimizer": put(snapshot.optimizer_bytes(server)),
            "gate": put(snapshot.gate_bytes(server.gate)) if server.gate else None,
            "probe": self._probe,
            "download": None if download is None else put(download),
            "events": self.run.keep_events(),
        }
        self.checkpoints.write(server.steps, cause, put(snapshot.adapter_bytes(server)), state)

    def uploaded(self, upload: Upload) -> None:
        """An upload's turn has come."""
        self.spool.note("working on", f"{upload.client_id}, round {upload.client_round}")
        self.run.event("upload", **describe(upload))

    def served(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """Keep what the step wrote and trained."""
        who, step, labels = upload.client_id, download.step, self.server.task.labels
        for iteration, (drafts, rewards) in enumerate(record.drafts):
            self.run.save_synthetic(f"step-{step:04}-drafts-{iteration}", labels, drafts, rewards)
        self.run.save_synthetic(f"step-{step:04}-pool", labels, record.pool, receipts=record.receipts)
        slm = SLM.from_state(download.slm, self.config.device)
        slm.order_labels(labels)
        self.run.save_slm(who, slm)
        self.run.save_llm(self.server.llm)
        for number, parts in enumerate(record.updates):
            self.run.event("update", step=step, client=who, number=number, **parts)
        measures = {"reward/pool": sum(receipt.reward for receipt in record.receipts) / len(record.receipts)}
        if self.test is not None:
            uploaded = SLM.from_state(upload.slm, self.config.device)
            uploaded.order_labels(labels)
            measures |= {"slm/uploaded": uploaded.accuracy(self.test), "slm/accuracy": slm.accuracy(self.test)}
        self.run.event("step", step=step, client=who, round=upload.client_round, **measures, **download.metrics)
        cause = {"client": who, "round": upload.client_round, "outcome": "served", "step": step}
        self._save(cause, encode(download))
        self.spool.note("working on", "")

    def refused(self, upload: Upload, error: UploadError) -> None:
        """The method cannot use an upload, or the gate has stopped it; it stays in the spool."""
        figures = error.figures if isinstance(error, QuarantineError) else {}
        error_text = f"{type(error).__name__}: {error}"
        self.run.event("failure", client=upload.client_id, error=error_text, figures=figures)
        self.spool.note("working on", "")
        self._refuse(upload.client_id, upload.client_round, error)

    def complete(self, waiting: list[str]) -> None:
        """The run is over; ``waiting`` are silos that have not taken their download."""
        self._measure_llm("after")
        arrivals = [vars(arrival) for arrival in self.spool.arrivals()]
        summary = {
            "task": self.config.name,
            "preset": self.config.preset,
            "seed": self.config.seed,
            "versions": versions(),
            "engine": "flower",
            "steps": [event for event in self.run.events() if event["event"] == "step"],
            "llm": {event["moment"]: event["nlu_accuracy"] for event in self.run.events() if event["event"] == "llm"},
            "arrivals": arrivals,
            "not_delivered": waiting,
        }
        self.run.summarise(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self.run.event("failure", client=None, error=f"{type(error).__name__}: {error}")

    def _measure_llm(self, moment: str) -> None:
        if self.test is None:
            return
        rows = evaluate.nlu_rows(self.config, self.test)
        accuracy = evaluate.nlu_accuracy(self.server.llm, self.server.task, rows, Progress(), moment)
        self.run.event("llm", moment=moment, nlu_accuracy=accuracy)


def test_rows(config: Config) -> Examples | None:
    """The test rows that the server has, at most ``data.test_rows``; None if it has no such file."""
    try:
        find_file(str(config.data.test), config.data)
    except DataError:
        return None
    rows = load_examples(str(config.data.test), config.data, config.task.labels).examples
    return balanced_sample(rows, config.data.test_rows, len(config.task.labels), seed_for(config.seed, "test"))


def _note(run: RunDir) -> Callable[[str], None]:
    return lambda message: run.event("note", message=message)
