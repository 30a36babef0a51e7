"""The cloud side: steps 3, 4 and 5 for one arriving SLM (CrossLM, section 4)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from crosslm.algorithm.rewards import label_rewards, leave_one_out_advantages
from crosslm.algorithm.soft_labels import opinion_pool, without_preference
from crosslm.classification import class_probabilities
from crosslm.config import Config
from crosslm.data.examples import Examples
from crosslm.enhancement import pool_rewards, probe_of, select, soft_labels, train_on_synthetic, weigh_judges
from crosslm.errors import BrokenLLMError, CollapseError, ModelError, QuarantineError, UploadError
from crosslm.gate import Gate, Verdict
from crosslm.llm_update import anchor_texts, one_pass
from crosslm.models.encoder import Encoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.undo import Undo
from crosslm.records import Download, Receipt, SyntheticSet, Upload
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task
from crosslm.teachers import Teachers


@dataclass
class StepRecord:
    """What happened in one step, for the run folder to keep."""

    updates: list[dict[str, float]] = field(default_factory=list)
    """One entry for each optimiser step."""
    drafts: list[tuple[SyntheticSet, Tensor]] = field(default_factory=list)
    """For each iteration the texts that the LLM was trained on and their rewards."""
    pool: SyntheticSet = field(default_factory=lambda: SyntheticSet([]))
    receipts: list[Receipt] = field(default_factory=list)
    """One for each text of the pool."""
    kept: list[int] = field(default_factory=list)
    """Places of the texts that the SLM learned from, best first."""
    gate: dict[str, float] = field(default_factory=dict)
    """What the gate found, if there is one."""
    refusal: str = ""
    """Why the SLM had no say: it was taught (``gate.teach_refused``), and the LLM is as it was."""

    @property
    def written(self) -> list[SyntheticSet]:
        """All that the LLM wrote: the drafts of each iteration, then the pool."""
        return [*(drafts for drafts, _ in self.drafts), self.pool]

    @property
    def tokens_generated(self) -> int:
        """Tokens that the LLM sampled, those of removed texts included."""
        return sum(texts.tokens_generated for texts in self.written)


class Reading(NamedTuple):
    """What the LLM makes of texts (Eq. 1), ``(texts, labels)``."""

    pool: Tensor
    probe: Tensor | None = None
    """Of the texts that judges are weighed by, where they are."""


@dataclass(frozen=True)
class Closing:
    """What all learn from when no more uploads come, and what the LLM makes of it."""

    pool: SyntheticSet
    said: Reading | None
    """Where step 5 asks the LLM."""


class Server:
    """Owns the LLM and meets one uploaded SLM at a time, in whatever order they arrive."""

    def __init__(
        self,
        config: Config,
        task: Task,
        llm: LLM,
        encoder: Encoder,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.task = task
        self.llm = llm
        self.encoder = encoder
        self.progress = progress or Progress()
        self.gate: Gate | None = None
        """Opened by :meth:`begin`, where there is one."""
        self.probe = SyntheticSet([])
        """Texts of the original LLM that tell how much each judge counts; none where all count alike."""
        self.said_of_probe: Tensor | None = None
        """What the original LLM makes of them, once it was asked (``reward.llm_judges``)."""
        self.teachers = Teachers(config.reward)
        self.anchors: list[list[int]] = []
        self.steps = 0
        """SLMs served so far."""
        self.taught = 0
        """Of these, those that had no say."""
        self.optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=config.llm.learning_rate, weight_decay=0.0)

    def begin(self, base: SyntheticSet, public: Examples) -> None:
        """Before the first step: open the gate, and keep some texts to weigh judges by, where there are these.

        Args:
            base: what the original LLM wrote.
            public: labelled public texts, if there are any.

        Raises:
            ConfigError: all texts have one label, so that the gate can tell nothing.
        """
        self.gate = Gate.open(self.config, base, public)
        self.probe = probe_of(base, self.config)

    def step(self, upload: Upload) -> tuple[Download, StepRecord]:
        """Train the LLM and the SLM on each other's judgement, and return the SLM.

        With ``gate.teach_refused`` an SLM that may not reward the LLM is trained on what the LLM writes all the same.

        Raises:
            UploadError: the SLM's labels are not the task's, it cannot be rebuilt, it fails on a text, it may not
                reward the LLM (without ``gate.teach_refused``), or its rewards broke the LLM; nothing has changed then.
            ModelError: the LLM could not write texts before it had learned anything of this SLM, the update changed
                nothing, or it broke the LLM or the SLM failed after full fine-tuning, which cannot be taken back.
        """
        slm = receive_slm(upload, self.task, self.config)  # step 2: it arrived
        try:
            verdict = self._let_in(slm, upload)
        except QuarantineError as error:
            if not self.config.gate.teach_refused:
                raise
            return self._teach(slm, upload, StepRecord(gate=error.figures, refusal=str(error)))
        record = StepRecord()
        with self._taken_back_if_it_fails(upload, record):
            self.learn(slm, upload, record)  # steps 3 and 4
            download = self._enhance(slm, upload, record)  # step 5
        if self.gate and verdict:
            self.gate.accepted(verdict, upload, record.pool)
            record.gate = verdict.figures
        self.remember(upload)
        return download, record

    def _let_in(self, slm: SLM, upload: Upload) -> Verdict | None:
        """What the gate finds of an SLM; None where there is no gate."""
        if self.gate is None:
            return None
        with self.progress.stage("gate", upload.client_id, self.gate.count, "texts") as advance:
            self.gate.lets_in(slm, upload, advance)  # so that the stage ends before a refusal does
        return self.gate.judge(slm, upload)

    def lets_in(self, slm: SLM, upload: Upload) -> bool:
        """Whether an SLM will have a say in its step 5, which the baseline has to know before.

        Raises:
            UploadError: it cannot classify at all.
        """
        if self.gate is None or not self.config.gate.teaches:
            return True
        with self.progress.stage("gate", upload.client_id, self.gate.count, "texts") as advance:
            return self.gate.lets_in(slm, upload, advance)

    @contextmanager
    def _taken_back_if_it_fails(self, upload: Upload, record: StepRecord) -> Iterator[None]:
        """Within it the LLM learns of an upload; where that ends in an error, it is as it was before."""
        judges, is_full = dict(self.teachers.members), self.config.llm.adapter == "full"
        undo = None if is_full else Undo(self.llm, self.optimizer)  # else it would be several models
        try:
            yield
        except UploadError as error:  # the SLM failed on a text that only the updated LLM wrote
            if undo is None and record.updates:
                raise ModelError(
                    f"client {upload.client_id}: its SLM failed after the LLM had learned of it, which cannot be taken "
                    f"back after full fine-tuning; go on from before it, without that client: {error}"
                ) from error
            self.teachers.members = judges
            if undo:
                undo()
            raise
        except CollapseError as error:
            if undo is None or not undo.has_changed():  # it is nobody's rewards
                raise
            self.teachers.members = judges
            undo()
            raise BrokenLLMError(
                f"client {upload.client_id}: with its rewards the LLM broke, and is as it was before them; "
                f"look at that client's data: {error}"
            ) from error

    def _teach(self, slm: SLM, upload: Upload, record: StepRecord) -> tuple[Download, StepRecord]:
        """Step 5 for an SLM that has no say; all that others meet stays as it is."""
        judges = dict(self.teachers.members)
        try:
            return self._enhance(slm, upload, record), record
        finally:
            self.teachers.members = judges

    def remember(self, upload: Upload) -> None:
        """A served SLM judges from now on beside those that arrive, where several do."""
        if self.config.reward.teachers > 1:
            self.teachers.accepted(upload, receive_slm(upload, self.task, self.config))

    def learn(self, slm: SLM, upload: Upload, record: StepRecord) -> None:
        """Steps 3 and 4 with an SLM that may reward the LLM."""
        config, who = self.config, upload.client_id
        for iteration in range(config.llm.iterations):
            seed = seed_for(config.seed, "server", self._learned, iteration)
            drafts = self._synthesize(f"{who}: texts to learn from", config.llm.samples, seed)  # step 3: Eq. 2-3
            rewards = label_rewards(self._judged(slm, upload, drafts), drafts.labels)  # step 4: Eq. 4
            advantages = self.advantages(drafts, rewards)
            record.updates += self.update_llm(drafts, advantages, seed, who)  # step 4: Eq. 5-9
            record.drafts.append((drafts, rewards))

    def _judged(self, slm: SLM, upload: Upload, drafts: SyntheticSet) -> Tensor:
        """What rewards come from, ``(texts, labels)``: the SLMs' judgement, with the original LLM's if it is asked."""
        total = self.teachers.readings(upload, len(drafts.samples))
        with self.progress.stage("reward", upload.client_id, total, "texts") as advance:
            judged = self.teachers.probabilities(slm, upload, drafts.texts, advance)
        if not self.config.reward.llm_judges:
            return judged
        with self.llm.interpolated(0.0):  # as it was: judging by what it has learned it would grow surer of just that
            said = self._said(drafts, f"{upload.client_id}, as it was", self.said_of_probe is None)
            self.said_of_probe = said.probe if self.said_of_probe is None else self.said_of_probe
        judged_probe = self.teachers.probabilities(slm, upload, self.probe.texts) if self.probe.samples else None
        weight = weigh_judges(self.probe, judged_probe, self.said_of_probe)
        return opinion_pool(judged, without_preference(said.pool), weight)

    def _enhance(self, slm: SLM, upload: Upload, record: StepRecord) -> Download:
        """Step 5: the best of what the LLM writes now trains the SLM; one that was refused has no say in it."""
        turn = ("taught", self.taught) if record.refusal else ("server", self._learned)
        seed = seed_for(self.config.seed, *turn, "pool")
        record.pool = self._synthesize(f"{upload.client_id}: texts to choose from", self.config.selection.pool, seed)
        said = self._said(record.pool, upload.client_id) if self._is_asked(bool(record.refusal)) else None
        fitted = self._train(slm, upload, record, said)
        self.steps, self.taught = self.steps + 1, self.taught + bool(record.refusal)
        return self._download(slm, upload, record, fitted)

    def for_all(self, original: SyntheticSet, latest: SyntheticSet, refusals: Iterable[str]) -> Closing:
        """The texts for all SLMs that were served, when no more uploads come (``federation.closing``).

        ``federation.closing_original`` of the ``federation.closing_texts`` the LLM wrote before it had learned
        anything, the others last. All are judged by the LLM as it is now. None is written anew.

        Args:
            original: what the original LLM wrote.
            latest: the pool of the last step.
            refusals: why each of the SLMs has no say; empty for one that has.
        """
        old, new = self.config.texts_in_the_end
        pool = SyntheticSet(latest.samples[:new] + original.samples[:old])
        return Closing(pool, self._said(pool, "all clients") if self._is_asked(any(refusals)) else None)

    def close(self, upload: Upload, refusal: str, closing: Closing) -> tuple[Download, StepRecord]:
        """Step 5 once more for an SLM that was served, by the LLM as it is in the end, and by all who judge.

        So who came first has as much of the others' knowledge as who came last. The SLM begins as it was uploaded.

        Args:
            upload: the client's last one that was served.
            refusal: why it has no say; empty where it has.
            closing: from :meth:`for_all`.

        Raises:
            UploadError: the SLM fails on a text.
        """
        slm, record = receive_slm(upload, self.task, self.config), StepRecord(pool=closing.pool, refusal=refusal)
        fitted = self._train(slm, upload, record, closing.said if self._is_asked(bool(refusal)) else None)
        return self._download(slm, upload, record, fitted), record

    def _is_asked(self, was_refused: bool) -> bool:
        """Whether step 5 needs the LLM's own judgement: always, or for an SLM that has no say."""
        return self.config.asks_llm or was_refused

    def _said(self, pool: SyntheticSet, who: str, of_probe: bool = True) -> Reading:
        probe = self.probe.texts if of_probe else []
        with self.progress.stage("select", f"{who}: the LLM reads", len(pool.samples) + len(probe), "texts") as advance:
            of_pool = class_probabilities(self.llm, self.task, pool.texts, advance)  # Eq. 1
            return Reading(of_pool, class_probabilities(self.llm, self.task, probe, advance) if probe else None)

    def _train(self, slm: SLM, upload: Upload, record: StepRecord, said: Reading | None) -> dict[str, float]:
        """Choose from a pool, and train the SLM on what is chosen."""
        config, who, pool = self.config, upload.client_id, record.pool
        judge = self.teachers.of_others if record.refusal else self.teachers.probabilities
        of_pool, of_probe = said or (None, None)
        count, probe = len(pool.samples), self.probe.texts
        total = self.teachers.readings(upload, count + len(probe)) + count
        with self.progress.stage("select", who, total, "texts") as advance:
            judged = judge(slm, upload, pool.texts, advance)
            rewards = pool_rewards(pool, judged, of_pool)
            judged_probe = judge(slm, upload, probe, advance) if probe else None
            record.receipts, record.kept = select(pool, rewards, self.encoder, config.selection, of_pool)  # Eq. 10
            advance(count)
        weight = weigh_judges(self.probe, judged_probe, of_probe)
        targets = soft_labels(pool, judged, of_pool, config.slm, weight)
        return train_on_synthetic(slm, pool, record.kept, targets, upload, config, self.progress, who)

    def _download(self, slm: SLM, upload: Upload, record: StepRecord, fitted: dict[str, float]) -> Download:
        metrics = {"selected": float(len(record.kept)), **{f"fit/{name}": value for name, value in fitted.items()}}
        if record.refusal:
            metrics["no_say"] = 1.0
        learned = tuple(record.pool.examples(record.kept).texts) if self.config.privacy.checks_leaks else ()
        state = slm.to_state().like(upload.slm)
        return Download(upload.client_id, upload.client_round, self.steps, metrics, state, learned)

    @property
    def _learned(self) -> int:
        """How many SLMs the LLM has learned from: who has no say changes nothing for others, their seeds neither."""
        return self.steps - self.taught

    def update_llm(self, drafts: SyntheticSet, rewards: Tensor, seed: int, who: str = "") -> list[dict[str, float]]:
        """One pass over the drafts, minimising Eq. 9; ``who`` gave the rewards, for the display.

        The other arguments, what is returned and the errors are those of :func:`crosslm.llm_update.one_pass`.
        """
        config, anchors = self.config.llm, self._anchors()
        with self.progress.stage("update LLM", who, len(drafts.samples), "texts") as advance:
            return one_pass(self.llm, self.task, self.optimizer, drafts, rewards, config, seed, advance, anchors)

    def _anchors(self) -> list[list[int]]:
        """Texts of the original LLM that an update holds the LLM to; none without ``llm.gamma_anchor``."""
        count, seed = self.config.llm.anchors, seed_for(self.config.seed, "anchors")
        if self.config.llm.gamma_anchor and not self.anchors:
            with self.progress.stage("generate", "original LLM, without a prompt", count, "texts") as advance:
                self.anchors = anchor_texts(self.llm, count, seed, self.config.synthesis.batch_size)
                advance(count)
        return self.anchors

    def advantages(self, drafts: SyntheticSet, rewards: Tensor) -> Tensor:
        """What weighs each text in Eq. 5: its reward, or what it has more than its like."""
        if self.config.reward.baseline == "none":
            return rewards
        return leave_one_out_advantages(rewards, drafts.labels)

    def _synthesize(self, detail: str, count: int, seed: int) -> SyntheticSet:
        with self.progress.stage("generate", self.config.synthesis.described(detail), count, "texts") as advance:
            return synthesize(self.llm, self.task, self.config.synthesis, count, seed, advance)


def receive_slm(upload: Upload, task: Task, config: Config) -> SLM:
    """The classifier in an upload, checked against the task, whose order of labels it takes on.

    Raises:
        UploadError: the labels are not the task's, the class counts cannot be, a weight is not
            finite, or the classifier cannot be rebuilt.
    """
    who = f"client {upload.client_id}"
    if sorted(upload.slm.labels) != sorted(task.labels):
        raise UploadError(f"{who}: its labels are {list(upload.slm.labels)}, the task's are {list(task.labels)}")
    if len(upload.class_counts) != len(task.labels) or min(upload.class_counts) < 0:
        raise UploadError(f"{who}: its class counts are {list(upload.class_counts)}; one for each label is needed")
    for name, weight in upload.slm.weights.items():
        if not weight.isfinite().all():
            raise UploadError(f"{who}: its weight {name} is not finite; lower slm.private.learning_rate there")
    slm = SLM.from_state(upload.slm, task.labels, config.device)
    slm.freeze_embeddings(config.slm.freeze_embeddings)
    return slm
