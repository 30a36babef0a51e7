"""What a run measures of each arrival and keeps in its folder: the journal that the loop reports to.

Of a run in one process; :mod:`crosslm.federation.deployment` has the journal of a server between machines.
"""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, tensor

from crosslm import evaluate
from crosslm.baselines import data_free_kd
from crosslm.classification import class_probabilities
from crosslm.client import Client, Decision
from crosslm.config import Config
from crosslm.data.split import Split
from crosslm.errors import CrosslmError, QuarantineError, UploadError
from crosslm.federation.exchange import Served
from crosslm.federation.messages import decode_upload, describe, encode
from crosslm.models.slm import SLM
from crosslm.records import Download, Receipt, SyntheticSet, Upload
from crosslm.runs import arrivals
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.measures import measure_slm
from crosslm.runs.rundir import CLOSING_POOL, RunDir
from crosslm.runs.snapshot import slm_bytes
from crosslm.server import Server, StepRecord, receive_slm
from crosslm.support.progress import Progress
from crosslm.teachers import Teacher

logger = logging.getLogger(__name__)


class RunJournal:
    """Measures Standalone, Data-free KD and CrossLM, and writes all that happens to the run folder."""

    def __init__(
        self, config: Config, split: Split, run: RunDir, checkpoints: Checkpoints, server: Server, progress: Progress
    ) -> None:
        self.config, self.split, self.run, self.checkpoints = config, split, run, checkpoints
        self.server, self.task = server, server.task
        self.progress = progress
        self.judge: SLM | None = None
        self.base_pool = SyntheticSet([])
        self.base_said: list[list[float]] | None = None
        """What :meth:`original_reads` has found."""
        self.accuracy: dict[str, dict[str, float]] = {"standalone": {}, "data_free_kd": {}, "crosslm": {}}
        self.confusion: dict[str, dict[str, list[list[int]]]] = {method: {} for method in self.accuracy}
        self.standalone: dict[str, SLM] = {}
        """Each client's SLM as it came first."""
        self.tokens_generated = 0
        self.removed: dict[str, int] = {}
        self.decisions: dict[str, dict[str, Any]] = {}
        """What each client did with the last SLM that it got."""
        self.cause: dict[str, Any] = {}
        """Who arrived last, and what came of it."""
        self._first: dict[str, str] = {}  # names of the kept uploads that standalone is made of
        self._returned: dict[str, str] = {}  # names of the kept SLMs that went back last
        self._last: dict[str, tuple[str, str]] = {}  # the kept upload that was served last, and why it has no say
        self._closing: dict[str, tuple[Upload, Download, StepRecord]] = {}  # what waits for a client's yes in the end
        self._closing_receipts: dict[str, list[Receipt]] = {}  # of the last texts, by client

    def uploaded(self, upload: Upload) -> None:
        """Measure Standalone when a client comes for the first time, and Data-free KD if it does not wait."""
        who = upload.client_id
        self.cause = {"client": who, "round": upload.client_round, "outcome": "refused"}
        self.run.event("upload", **describe(upload) | {"class_counts": list(upload.counts_of(self.task.labels))})
        self.run.save_upload(upload)
        if who in self.accuracy["standalone"]:
            return
        slm = receive_slm(upload, self.task, self.config)
        self._first[who] = self.checkpoints.put(encode(upload))
        self.standalone[who] = slm
        self._test("standalone", who, slm)
        if not self._baseline_waits:
            self._measure_data_free_kd(upload)

    @property
    def _baseline_waits(self) -> bool:
        """Whether Data-free KD is trained when no more uploads come, with all judges, as CrossLM's last step 5 is.

        Not where clients come several times: their later uploads know of CrossLM's returns.
        """
        return self.config.federation.closing and self.config.federation.participations == 1

    def _measure_data_free_kd(self, upload: Upload, may_judge: bool | None = None, texts: int | None = None) -> None:
        who = upload.client_id
        try:
            self._test("data_free_kd", who, self._data_free_kd(upload, may_judge, texts or self.config.baseline_texts))
        except UploadError as error:  # whether CrossLM serves a client is not for the baseline to say
            self._warn(f"client {who}: Data-free KD failed, and counts with the SLM that came: {error}")
            self._test("data_free_kd", who, receive_slm(upload, self.task, self.config))

    def _data_free_kd(self, upload: Upload, may_judge: bool | None, texts: int) -> SLM:
        server = self.server
        if may_judge is None:
            may_judge = server.lets_in(self.standalone[upload.client_id], upload)
        pool = SyntheticSet(self.base_pool.samples[:texts])
        said = self.original_reads()[:texts] if self.config.asks_llm or not may_judge else None
        judges = dict(server.teachers.members)
        server.teachers.members = self._as_they_came_first(judges)
        try:
            return data_free_kd(
                upload, pool, self.config, self.task, server.encoder, self.progress, server.teachers, said, may_judge
            )
        finally:
            server.teachers.members = judges  # a judge that fails on a text of the baseline's is none of its business

    def original_reads(self) -> Tensor:
        """What the original LLM makes of its own texts (Eq. 1), ``(texts, labels)``; it is asked when first needed."""
        if self.base_said is None:
            count, llm = max(self.config.baseline_texts, self.config.selection.pool), self.server.llm
            texts, has_learned = self.base_pool.texts[:count], self.server.steps > 0  # else it need not be copied
            with (
                self.progress.stage("generate", "original LLM reads its texts", len(texts), "texts") as advance,
                llm.interpolated(0.0 if has_learned else 1.0),
            ):
                self.base_said = class_probabilities(llm, self.task, texts, advance).tolist()
        return tensor(self.base_said)

    def _as_they_came_first(self, judges: dict[str, Teacher]) -> dict[str, Teacher]:
        """What clients upload later knows of CrossLM's returns, which Data-free KD must not."""
        return {
            who: Teacher(decode_upload(self.checkpoints.get(self._first[who])), self.standalone[who])
            if judge.upload.client_round
            else judge
            for who, judge in judges.items()
            if not judge.upload.client_round or who in self._first  # else its first one was no judge
        }

    def served(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """Keep what the step wrote, and measure the SLM that goes back."""
        who, step = upload.client_id, download.step
        self.cause |= {"outcome": "taught" if record.refusal else "served", "step": step}
        if record.refusal:
            self._set_apart(upload, record.refusal, record.gate, step=step)
        if record.refusal and who not in self._returned:  # so it is no judge of what the LLM writes in the end either
            del self.standalone[who], self._first[who]
        slm = SLM.from_state(download.slm, self.task.labels, self.config.device)
        self._test("crosslm", who, slm)
        self.run.save_slm(who, slm)
        self._returned[who] = self.checkpoints.put(slm_bytes(download.slm))
        if self.config.federation.closing:
            self._last[who] = (self.checkpoints.put(encode(upload)), record.refusal)
        for texts in record.written:
            self.count(texts)
        measures = arrivals.write_step(self.run, self.task, download, record, self._measures(who, record))
        if message := arrivals.few_selected(who, record, self.config):
            self._warn(message)
        kd = f" (data-free KD {measures['slm/data_free_kd']:.3f})" if "slm/data_free_kd" in measures else ""
        self.progress.note(
            f"step {step}: {who} {measures['slm/standalone']:.3f} -> {measures['slm/accuracy']:.3f}{kd}, "
            f"mean reward of its pool {measures['reward/pool']:+.2f}"
        )

    def last_served(self) -> list[Served]:
        """The last upload of each client that was served; of nobody where it is one client."""

        def reader(name: str) -> Callable[[], Upload]:
            return lambda: decode_upload(self.checkpoints.get(name))

        kept = self._last.values() if len(self._last) > 1 else ()
        return [Served(reader(name), refusal) for name, refusal in kept]

    def written(self) -> tuple[SyntheticSet, SyntheticSet]:
        """What the original LLM wrote, and the pool of the last step."""
        return self.base_pool, self.run.synthetic(f"step-{self.server.steps:04}-pool", self.task.labels)

    def closing(self, pool: SyntheticSet) -> None:
        """Keep the texts that are for all who were served."""
        self._closing_receipts = {}
        self.run.save_synthetic(CLOSING_POOL, self.task.labels, pool, receipts_of=self._closing_receipts)

    def not_closed(self, message: str) -> None:
        """Somebody has no step 5 in the end."""
        self._warn(message)

    def _warn(self, message: str) -> None:
        self.run.event("warning", message=message)
        self.progress.note(f"warning: {message}")

    def closed(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """Keep why it learned which of the texts, and wait for the client to take the SLM or not."""
        self._closing_receipts[upload.client_id] = record.receipts
        self.run.save_synthetic(CLOSING_POOL, self.task.labels, record.pool, receipts_of=self._closing_receipts)
        self._closing[upload.client_id] = (upload, download, record)

    def _measure_closing(self, who: str, accepted: bool) -> None:
        """A client has decided on what went back in the end; one that keeps what it got before is measured by that.

        Data-free KD is measured by what goes back in the end, whatever the client makes of CrossLM's.
        """
        upload, download, record = self._closing.pop(who)
        if accepted:
            returned = SLM.from_state(download.slm, self.task.labels, self.config.device)
            self._test("crosslm", who, returned)
            self.run.save_slm(who, returned)
        if self._baseline_waits:
            self._measure_data_free_kd(upload, may_judge=not record.refusal)
        measures = {f"slm/{name}": self.accuracy[name][who] for name in ("data_free_kd", "crosslm")}
        self.run.event("closing", client=who, step=download.step, accepted=accepted, **measures, **download.metrics)
        self.progress.note(
            f"in the end: {who} {self.accuracy['standalone'][who]:.3f} -> {measures['slm/crosslm']:.3f} "
            f"(data-free KD {measures['slm/data_free_kd']:.3f})"
        )

    def measure_the_rest(self) -> None:
        """Data-free KD of those who were served and had no step 5 in the end, from as many texts as they learned."""
        for who, (name, refusal) in self._last.items():
            if who not in self.accuracy["data_free_kd"]:
                upload = decode_upload(self.checkpoints.get(name))
                self._measure_data_free_kd(upload, not refusal, self.config.selection.pool)
                self.progress.note(f"in the end: {who} (data-free KD {self.accuracy['data_free_kd'][who]:.3f})")

    def _test(self, method: str, who: str, slm: SLM) -> None:
        """Measure a client's SLM on its test rows, and keep which of them it got right."""
        tests, test = list(self.split.tests.values()), self.split.tests[who]
        with self.progress.stage("evaluate", f"{who}, {method.replace('_', ' ')}", len(test), "rows") as advance:
            self.accuracy[method][who], self.confusion[method][who] = measure_slm(
                self.run, method, who, slm, test, tests.index(test)
            )
            advance(len(test))

    def _measures(self, who: str, record: StepRecord) -> dict[str, float]:
        """A client's SLM by each method that has been measured, and what the judge finds of the step's texts."""
        kept = [sample for sample, receipt in zip(record.pool.samples, record.receipts, strict=True) if receipt.kept]
        names = {"standalone": "standalone", "data_free_kd": "data_free_kd", "crosslm": "accuracy"}
        measures = {
            f"slm/{name}": self.accuracy[method][who] for method, name in names.items() if who in self.accuracy[method]
        }
        if self.judge:
            measures |= arrivals.judge_measures(self.judge, record)
        if self.judge and kept:
            measures["judge/selected"] = evaluate.label_agreement(self.judge, SyntheticSet(kept))
        return measures

    def refused(self, upload: Upload, error: UploadError) -> None:
        """An upload could not be used; what the gate has stopped is kept in ``quarantine/`` with its figures."""
        who = upload.client_id
        if who not in self.accuracy["crosslm"]:  # so that all means are of the same clients, those that were served
            if self._baseline_waits and who in self.standalone:  # its rows count in `crosslm reproduce` all the same
                self._measure_data_free_kd(upload)
            self.standalone.pop(who, None)
            self._first.pop(who, None)
            for method in ("standalone", "data_free_kd"):
                self.accuracy[method].pop(who, None)
                self.confusion[method].pop(who, None)
        if not isinstance(error, QuarantineError):
            self.failed(who, error)
            return
        self.cause |= {"outcome": "quarantined", "reason": str(error)}
        self._set_apart(upload, str(error), error.figures)

    def _set_apart(self, upload: Upload, reason: str, figures: dict[str, float], step: int | None = None) -> None:
        """Keep what the gate has stopped, and why; with the number of the step where it was taught all the same."""
        who, taught = upload.client_id, {} if step is None else {"step": step}
        place = self.run.save_quarantined(f"{who}-{upload.client_round}", encode(upload), reason, figures)
        self.run.event("gate", client=who, passed=False, reason=reason, **taught, **figures)
        self.progress.note(f"{reason}; its upload and the figures are in {place}")

    def failed(self, client_id: str, error: Exception) -> None:
        """A client failed: an event of the run.

        One that was served goes on with the SLM that it had; in the end with the one that came back at once.
        """
        reason, is_closing = f"{type(error).__name__}: {error}", self._closing.pop(client_id, None) is not None
        if self.cause.get("client") != client_id or self.cause.get("outcome") not in ("served", "taught"):
            self.cause = {"client": client_id, "outcome": "failed", "reason": reason}
        elif not is_closing:
            self.decisions[client_id] = {"accepted": False, "refused": reason}
        if not isinstance(error, CrosslmError):
            logger.exception("client %s failed", client_id, exc_info=error)
        self.run.event("failure", client=client_id, error=reason)
        self.progress.note(f"client {client_id} failed: {error}")

    def decided(self, client: Client, decision: Decision) -> None:
        """A client has tried what came back, and installed it or kept the one it had."""
        is_closing = client.id in self._closing
        if is_closing:
            self._measure_closing(client.id, decision.accepted)
        previous, client.previous = client.previous, None  # gigabytes, of many large ones
        if not self.config.acceptance.enabled:
            self.decisions.pop(client.id, None)  # it may have refused an earlier one
            return
        # rows held out are a share of all, and shares right of them tell how many: told as the counts themselves are
        is_open = self.config.privacy.told_counts == "exact"
        told = vars(decision) if is_open else {"accepted": decision.accepted}
        if decision.accepted or not is_closing:  # else it is as it was decided before
            self.decisions[client.id] = told
        self.run.event("acceptance", client=client.id, **told)
        if decision.accepted and previous is not None:
            self.run.save_slm(client.id, previous, "slm-previous")
        if not decision.accepted and not is_open:
            self.progress.note(
                f"client {client.id} keeps the SLM it had: what came back was worse on its held-out rows"
            )
        elif not decision.accepted:
            alike = ", each label counting alike" if decision.balanced else ""
            self.progress.note(
                f"client {client.id} keeps the SLM it had: {decision.after:.3f} instead of {decision.before:.3f} "
                f"on {decision.rows} held-out private rows{alike}"
            )

    def count(self, texts: SyntheticSet) -> None:
        """Add to the tokens generated and the texts removed."""
        self.tokens_generated += texts.tokens_generated
        for reason, number in texts.removed.items():
            self.removed[reason] = self.removed.get(reason, 0) + number

    # -- before and after a stop -------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs."""
        names = ("accuracy", "confusion", "tokens_generated", "removed", "decisions")
        kept = {"first": self._first, "returned": self._returned, "last": self._last}
        return {name: getattr(self, name) for name in names} | kept

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.accuracy, self.confusion = state["accuracy"], state["confusion"]
        self.tokens_generated = state["tokens_generated"]
        self.removed, self.decisions = state["removed"], state["decisions"]
        self._first, self._returned, self._last = state["first"], state["returned"], state.get("last", {})
        for who, name in self._first.items():
            self.standalone[who] = receive_slm(decode_upload(self.checkpoints.get(name)), self.task, self.config)
