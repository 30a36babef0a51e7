"""The measures that runs in one process and between machines share; each prediction behind them is kept."""

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from crosslm import evaluate
from crosslm.config import Config
from crosslm.data.examples import Examples
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet
from crosslm.runs.rundir import RunDir
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task
from crosslm.teachers import stranger_proba

LLM_MEASURES = ("nlu_accuracy", "nlg_accuracy", "nlg_judge_accuracy", "distinct_2", "perplexity")


@dataclass(frozen=True)
class LLMMeter:
    """Measures the LLM before and after, as far as there is something to measure it on."""

    run: RunDir
    config: Config
    task: Task
    progress: Progress
    rows: Examples | None
    """That it classifies (:func:`crosslm.evaluate.nlu_rows`)."""
    text: str | None
    """Whose perplexity is measured."""

    def reading(self, llm: LLM, moment: str) -> dict[str, float]:
        """How well it reads: ``nlu_accuracy`` (Eq. 1), ``perplexity``."""
        measures = {}
        if self.rows is not None:
            predicted = evaluate.nlu_predictions(llm, self.task, self.rows, self.progress, moment)
            self.run.save_predictions(f"nlu/{moment}", self.rows.labels, predicted)
            measures["nlu_accuracy"] = evaluate.share_right(self.rows.labels, predicted)
        if self.text is not None:
            most = self.config.evaluation.perplexity_tokens
            measures["perplexity"] = evaluate.perplexity(llm, self.text, most, self.progress, moment)
        return measures

    def writing(
        self, written: Mapping[str, SyntheticSet], slms: Iterable[tuple[str, SLM]], judge: SLM | None = None
    ) -> dict[str, dict[str, float]]:
        """How well it writes, by the same judges at each moment.

        Args:
            written: what it wrote, by moment.
            slms: the clients' SLMs as first uploaded, with their names; taken one at a time.
            judge: the independent judge, if there is one.

        Returns:
            By moment ``nlg_accuracy`` (where there are SLMs), ``distinct_2`` and ``nlg_judge_accuracy``.
        """
        agreement: dict[str, list[float]] = {moment: [] for moment in written}
        for who, slm in slms:
            with self.progress.stage("evaluate", f"what the LLM writes, by {who}", len(written), "sets") as advance:
                for moment, texts in written.items():
                    agreement[moment].append(self._share_right(f"nlg/{moment}/slm/{who}", slm, texts.examples()))
                    advance(1)
        measures: dict[str, dict[str, float]] = {}
        for moment, texts in written.items():
            found = agreement[moment]
            measures[moment] = {"nlg_accuracy": sum(found) / len(found)} if found else {}
            measures[moment]["distinct_2"] = evaluate.distinct_ngrams(texts.texts)
            if judge:
                right = self._share_right(f"nlg/{moment}/judge", judge, texts.examples())
                measures[moment]["nlg_judge_accuracy"] = right
        return measures

    def texts(self, llm: LLM, detail: str, count: int, purpose: str) -> SyntheticSet:
        """Have the LLM write what it is measured by, and keep it in the run folder.

        Args:
            llm: as it is now.
            detail: says which it is.
            count: texts.
            purpose: their name in the folder, and part of the seed.

        Raises:
            ModelError: it writes too few that can be used.
        """
        seed = seed_for(self.config.seed, purpose)
        with self.progress.stage("generate", self.config.synthesis.described(detail), count, "texts") as advance:
            texts = synthesize(llm, self.task, self.config.synthesis, count, seed, advance)
        self.run.save_synthetic(purpose, self.task.labels, texts)
        return texts

    def compare(
        self,
        readings: Mapping[str, Mapping[str, float]],
        base: SyntheticSet,
        final: SyntheticSet,
        slms: Iterable[tuple[str, SLM]],
        steps: int,
        judge: SLM | None = None,
    ) -> dict[str, dict[str, float]]:
        """All measures before and after, each moment's as an event ``llm`` too.

        Args:
            readings: what :meth:`reading` gave ``before`` and ``after``.
            base: what the original LLM wrote; as many of them count as ``evaluation.nlg_samples``.
            final: what it writes after the last step.
            slms: as :meth:`writing` takes them.
            steps: of the server, which arrivals are counted by.
            judge: the independent judge, if there is one.
        """
        written = {"before": SyntheticSet(base.samples[: self.config.evaluation.nlg_samples]), "after": final}
        writing = self.writing(written, slms, judge)
        measures = {moment: {**reading, **writing[moment]} for moment, reading in readings.items()}
        for moment, found in measures.items():
            self.run.event("llm", moment=moment, arrival=0 if moment == "before" else steps, **found)
        return measures

    def _share_right(self, name: str, slm: SLM, examples: Examples) -> float:
        predicted = slm.predict_proba(examples.texts).argmax(dim=1).tolist()
        self.run.save_predictions(name, examples.labels, predicted)
        return evaluate.share_right(examples.labels, predicted)


def measure_slm(
    run: RunDir, method: str, who: str, slm: SLM, test: Examples, rows: int
) -> tuple[float, list[list[int]]]:
    """Try a client's SLM on test rows; the event ``test`` says which of them it got right.

    Args:
        run: where predictions and the event go.
        method: ``standalone``, ``data_free_kd`` or ``crosslm``.
        who: the client.
        slm: with its labels in the task's order.
        test: the rows.
        rows: a number that clients with the same test rows share: their figures move together.

    Returns:
        The accuracy, and the confusion counts.

    Raises:
        UploadError: it fails on a row.
    """
    predicted: list[int] = stranger_proba(slm, test.texts).argmax(dim=1).tolist()
    run.save_predictions(f"slm/{method}/{who}", test.labels, predicted)
    right = [given == label for given, label in zip(predicted, test.labels, strict=True)]
    run.event("test", method=method, client=who, rows=rows, right="".join(str(int(value)) for value in right))
    return sum(right) / len(right), evaluate.confusion_counts(predicted, test.labels, len(slm.labels))


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
