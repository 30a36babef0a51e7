"""The server's side of a run between machines: its models, its run folder, its journal."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crosslm import evaluate
from crosslm.config import Config
from crosslm.data.split import test_rows
from crosslm.errors import FederationError, QuarantineError, RunError, UploadError
from crosslm.federation.arrivals_journal import Arrival
from crosslm.federation.exchange import Served
from crosslm.federation.messages import decode_upload, describe, encode
from crosslm.federation.opening import load_server, notes_of, open_folder
from crosslm.federation.spool import ENDED, MOST_TRIES, Spool
from crosslm.federation.summary import accuracies, summary_of
from crosslm.models.slm import SLM
from crosslm.records import Download, Receipt, SyntheticSet, Upload
from crosslm.runs import arrivals, snapshot
from crosslm.runs.cards import write_cards
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.measures import LLMMeter, measure_slm
from crosslm.runs.preparation import measured_on, public_texts
from crosslm.runs.rundir import CLOSING_POOL, ENGINE, RunDir
from crosslm.server import Server, StepRecord, receive_slm
from crosslm.support.memory import give_back
from crosslm.support.provenance import versions
from crosslm.teachers import stranger_proba

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
        self.task, self.progress = server.task, server.progress
        self.test, text = measured_on(config)
        rows = None if self.test is None else evaluate.nlu_rows(config, self.test)
        self.meter = LLMMeter(run, config, self.task, self.progress, rows, text)
        self.base, self._base_name = SyntheticSet([]), ""
        self.before: dict[str, float] = {}
        self.tokens_generated = 0
        self.removed: Counter[str] = Counter()
        self._completed = False
        self._closing_receipts: dict[str, list[Receipt]] = {}
        """Of the closing texts, by silo."""

    @classmethod
    def open(cls, folder: Path, config: Config, cache: Path, refuse: Refuse, spool: Spool) -> "Deployment":
        """Load the models, and go on in the run folder if there is one.

        What makes the run another one (:data:`crosslm.federation.opening.CHANGEABLE` has all else) must be as it was
        when it began.

        Args:
            folder: run folder.
            config: of the run.
            cache: where converted models are.
            refuse: is told of uploads that cannot be used: silo, round, why.
            spool: remembers what is worked on.

        Raises:
            RunError: the run in the folder has another configuration; names what differs.
        """
        run = open_folder(folder, config)
        server = load_server(config, cache, notes_of(run))
        deployment = cls(run, server.config, server, refuse, spool)
        record = deployment.checkpoints.last()
        if record is None:
            deployment._begin()
        else:
            deployment._go_on(record)
        return deployment

    def _begin(self) -> None:
        """As a run in one process begins: what the original LLM writes is a probe and the measure of later."""
        self.run.event("start", versions=versions(), engine=ENGINE)
        self.base = self.meter.texts(self.server.llm, "original LLM", evaluate.base_texts(self.config), "base")
        self._count(self.base)
        self.before = self.meter.reading(self.server.llm, "before")
        self._base_name = self.checkpoints.put(snapshot.texts_bytes(self.base))
        self.server.begin(self.base, public_texts(self.config, self._warn))
        test_rows(self.config, self._warn)
        self._take_up_what_was_lost()
        self._save({"outcome": "beginning"}, None)

    def _leave_out_the_shut_out(self) -> None:
        """A silo whose key is not in the kit any more judges no text, and nobody is held to agree with it."""
        teachers, gate = self.server.teachers, self.server.gate
        teachers.forget([name for name in teachers.members if not self.spool.is_admitted(name)])
        if gate is not None:
            gate.references = {who: found for who, found in gate.references.items() if self.spool.is_admitted(who)}

    def _warn(self, message: str) -> None:
        self.run.event("warning", message=message)

    def _go_on(self, record: dict[str, Any]) -> None:
        """Put everything back as it was after the last arrival; what was not sent then is owed now."""
        state, get = record["state"], self.checkpoints.get
        if state is None:
            raise RunError(
                f"{self.run.path}: of its last checkpoint only the adapter is kept (checkpoint.keep); put the "
                "checkpoints after it back, or the whole run folder from a copy"
            )
        self.run.go_back(state["events"])
        self._base_name, self.before = state["base"], state["before"]
        self.base = snapshot.texts_of(get(self._base_name))
        self.tokens_generated, self.removed = state["tokens_generated"], Counter(state["texts_removed"])
        self.progress.seconds.update(state["seconds"])
        self.server.begin(self.base, public_texts(self.config))
        snapshot.go_back_to(self.server, record, get)
        self._leave_out_the_shut_out()
        cause = record["cause"]
        for arrival in self.spool.of(str(cause.get("client"))):
            if arrival.round == cause["round"] and arrival.state in ("received", "processing"):
                self.spool.serve(arrival.silo, arrival.round, get(state["download"]))
        for silo, number, reason, told in state.get("refused", []):
            if any(arrival.round == number and arrival.state == "processing" for arrival in self.spool.of(silo)):
                error = UploadError(reason)  # it was known to be no good, and not yet told
                error.told = told
                self._refuse(silo, number, error)
        self._take_up_what_was_lost()
        if why := self.checkpoints.prune():  # who was killed may not have come to it
            self._warn(why)

    def _take_up_what_was_lost(self) -> None:
        """Have uploads served again of which this run folder knows nothing: it is an earlier one, put back by somebody.

        Raises:
            FederationError: no uploads are served any more.
        """
        steps = {(event["client"], event.get("round")) for event in self._events_of("step")}
        served = [arrival for arrival in self.spool.arrivals() if arrival.state in ("served", "delivered")]
        # the events of an earlier version name no round
        lost = [each for each in served if steps.isdisjoint({(each.silo, each.round), (each.silo, None)})]
        names = ", ".join(f"{arrival.silo} (round {arrival.round})" for arrival in lost)
        if lost and self.spool.fact(ENDED) is not None:
            raise FederationError(
                f"{self.run.path}: does not have the last uploads that were served: {names}; the run has ended, so "
                f"that they are not served again: put the run folder back that belongs to {self.spool.folder}"
            )
        for arrival in lost:
            self.spool.again(arrival)
        if lost:
            self._warn(f"the run folder is an earlier one, without the uploads of {names}: they are served again")

    def _save(self, cause: dict[str, Any], download: Download | None) -> None:
        put, server = self.checkpoints.put, self.server
        state = {
            **snapshot.server_state(server, put),
            "base": self._base_name,
            "before": self.before,
            "download": None if download is None else put(encode(download)),
            "events": self.run.keep_events(),
            **self._counted(),
        }
        self.checkpoints.write(server.steps, cause, put(snapshot.adapter_bytes(server)), state)

    def _counted(self) -> dict[str, Any]:
        return {
            "seconds": {name: round(value, 2) for name, value in self.progress.seconds.items()},
            "tokens_generated": self.tokens_generated,
            "texts_removed": dict(self.removed),
        }

    def uploaded(self, upload: Upload) -> None:
        """An upload's turn has come; with test rows, what the silo's SLM can do before the LLM helps it is measured."""
        who = upload.client_id
        self.spool.works_on(f"{who}, round {upload.client_round}")
        counts = list(upload.counts_of(self.task.labels))
        described = describe(upload) | {"class_counts": counts, "model_type": upload.slm.architecture.get("model_type")}
        self.run.event("upload", **described)
        if self.test is None:
            return
        slm = receive_slm(upload, self.task, self.config)
        if who in {event["client"] for event in self._events_of("step")}:
            stranger_proba(slm, self.test.texts)  # one that fails on a test row is refused now, and not after its step
        else:
            measure_slm(self.run, "standalone", who, slm, self.test, 0)

    def served(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """Keep what the step wrote and trained."""
        who, step = upload.client_id, download.step
        for texts in record.written:
            self._count(texts)
        give_back()  # what its training took, which is several times the SLM
        self._keep_slm(download)
        self.run.save_llm(self.server.llm)
        if record.refusal:
            self.run.event("gate", step=step, client=who, passed=False, reason=record.refusal, **record.gate)
        accuracy = accuracies(self.run.events())
        measured = {
            name: accuracy[method][who]
            for name, method in (("slm/standalone", "standalone"), ("slm/accuracy", "crosslm"))
            if who in accuracy.get(method, {})
        }
        arrivals.write_step(self.run, self.task, download, record, measured)
        if message := arrivals.few_selected(who, record, self.config):
            self.run.event("warning", message=message)
        outcome = "taught" if record.refusal else "served"
        if record.refusal:
            self.spool.no_say(who, upload.client_round)
        cause = {"client": who, "round": upload.client_round, "outcome": outcome, "step": step}
        self._save(cause, download)
        self.spool.works_on("")

    def _keep_slm(self, download: Download) -> None:
        """Write the SLM that goes back; with test rows, it is measured."""
        slm = SLM.from_state(download.slm, self.task.labels, self.config.device)
        self.run.save_slm(download.client_id, slm)
        if self.test is not None:
            measure_slm(self.run, "crosslm", download.client_id, slm, self.test, 0)

    def last_served(self) -> list[Served]:
        """The last upload of each silo that was served and has no closing download yet; of nobody if it is one silo."""
        last = {arrival.silo: arrival for arrival in self.spool.arrivals() if arrival.state in ("served", "delivered")}

        def read(arrival: Arrival) -> Upload:
            if self.spool.tries_to_close(arrival.silo) >= MOST_TRIES:
                raise FederationError(
                    f"the server ended {MOST_TRIES} times while it taught {arrival.silo} in the end; look at its logs"
                )
            self.spool.begin_closing(arrival.silo)
            self.spool.works_on(f"{arrival.silo}, in the end")
            return decode_upload(self.spool.upload(arrival))

        def of(arrival: Arrival) -> Served:
            refusal = "the gate refused it" if self.spool.has_no_say(arrival.silo, arrival.round) else ""
            return Served(lambda: read(arrival), refusal)

        known = [arrival for arrival in last.values() if self.spool.is_admitted(arrival.silo)]
        waiting = [arrival for arrival in known if self.spool.closing_of(arrival.silo) is None]
        return list(map(of, waiting)) if len(last) > 1 else []

    def written(self) -> tuple[SyntheticSet, SyntheticSet]:
        """What the original LLM wrote, and the pool of the last step."""
        return self.base, self.run.synthetic(f"step-{self.server.steps:04}-pool", self.task.labels)

    def closing(self, pool: SyntheticSet) -> None:
        """Keep the texts that are for all who were served."""
        if self._events_of("closing"):  # they have been kept before a restart, and what has been learned of them
            self._closing_receipts = self.run.receipts_of(CLOSING_POOL)
            return
        self.run.save_synthetic(CLOSING_POOL, self.task.labels, pool, receipts_of={})

    def not_closed(self, message: str) -> None:
        """Somebody has no step 5 in the end."""
        self.run.event("warning", message=message)
        self._keep_events()

    def closed(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """Keep the SLM that goes back in the end; with test rows, it is measured."""
        who = upload.client_id
        if who in {event["client"] for event in self._events_of("closing")}:  # it was not sent before a restart
            return
        give_back()
        self._keep_slm(download)
        self._closing_receipts[who] = record.receipts
        self.run.save_synthetic(CLOSING_POOL, self.task.labels, record.pool, receipts_of=self._closing_receipts)
        accuracy = accuracies(self.run.events()).get("crosslm", {})
        measures = {"slm/crosslm": accuracy[who]} if who in accuracy else {}
        self.run.event("closing", client=who, step=download.step, **measures, **download.metrics)
        self._keep_events()

    def _events_of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.events() if event["event"] == kind]

    def refused(self, upload: Upload, error: UploadError) -> None:
        """The method cannot use an upload, or the gate has stopped it; it stays in the spool."""
        who = upload.client_id
        if isinstance(error, QuarantineError):
            self.run.event("gate", client=who, passed=False, reason=str(error), **error.figures)
        else:
            self.run.event("failure", client=who, error=f"{type(error).__name__}: {error}")
        self.spool.works_on("")
        self._keep_events([who, upload.client_round, str(error), error.told])
        self._refuse(who, upload.client_round, error)

    def failed(self, silo: str, reason: str) -> None:
        """A silo refuses what it was asked for, or its answer cannot be used: an event of the run."""
        self.run.event("failure", client=silo, error=reason)
        self._keep_events()

    def _keep_events(self, *refused: list[Any]) -> None:
        """What has been written of uploads that change nothing outlasts a restart as the last checkpoint does."""
        record = self.checkpoints.last()
        if record is None or self._completed:  # what a completed run has measured is measured again after a restart
            return
        state = record["state"]
        kept = {"events": self.run.keep_events(), "refused": [*state.get("refused", []), *refused]}
        state |= kept | self._counted()
        self.checkpoints.write(record["arrival"], record["cause"], record["adapter"], state)

    def complete(self, silos: Iterable[str]) -> None:
        """The last upload was served: measure the LLM, and write cards and summary.

        Args:
            silos: all that have a kit.

        Raises:
            ModelError: the LLM could not write the texts that it is measured by.
        """
        self._completed = True
        self.spool.works_on("measuring the LLM in the end")
        llm = self.server.llm
        with llm.interpolated(self.config.llm.interpolation):
            self.run.save_llm(llm)
            readings = {"before": self.before, "after": self.meter.reading(llm, "after")}
            final = self.meter.texts(llm, "enhanced LLM", self.config.evaluation.nlg_samples, "final")
        self._count(final)
        self.meter.compare(readings, self.base, final, self._first_uploads(), self.server.steps)
        write_cards(self.run, self.config, self._summary(silos))
        self.summarise(silos)
        give_back()  # silos may be at work for long yet

    def summarise(self, silos: Iterable[str]) -> None:
        """Write ``summary.json`` as things stand; and again when downloads were taken."""
        self.run.summarise(self._summary(silos))

    def _summary(self, silos: Iterable[str]) -> dict[str, Any]:
        dtype = str(self.server.llm.model.dtype).removeprefix("torch.")
        return summary_of(self.run, self.config, self.spool, silos, self.test, self._counted() | {"llm_dtype": dtype})

    def _first_uploads(self) -> Iterator[tuple[str, SLM]]:
        """The SLM of each silo as it was when it was served first, but for those that had no say then, or are out."""
        first: dict[str, Arrival] = {}
        for arrival in self.spool.arrivals():
            if arrival.state in ("served", "delivered"):
                first.setdefault(arrival.silo, arrival)
        for silo, arrival in first.items():
            if not self.spool.is_admitted(silo) or self.spool.has_no_say(silo, arrival.round):
                continue
            try:
                upload = decode_upload(self.spool.upload(arrival))
            except FederationError as error:  # the disk has lost it, and it is a measure alone
                self._warn(f"{silo} is left out of what SLMs say of the LLM's texts: {error}")
                continue
            yield silo, receive_slm(upload, self.task, self.config)

    def _count(self, texts: SyntheticSet) -> None:
        self.tokens_generated += texts.tokens_generated
        self.removed.update(texts.removed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self.run.event("failure", client=None, error=f"{type(error).__name__}: {error}")
