"""What the texts of each arrival are like beside the reward they got, and whether the reward was fooled.

A reward that rises while an independent judge's agreement falls is reward hacking: the LLM has learned what
pleases the client's SLM and not what the label means.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crosslm.config import Config
from crosslm.evaluate import distinct_ngrams, label_agreement
from crosslm.models.slm import SLM
from crosslm.records import Download, SyntheticText
from crosslm.runs.rundir import RunDir
from crosslm.server import StepRecord
from crosslm.task import Task

STANDARD_ERRORS = 2.0


def write_step(
    run: RunDir, task: Task, download: Download, record: StepRecord, measured: Mapping[str, float]
) -> dict[str, float]:
    """Write what a step was to the run folder: its texts, what the gate let in, every update, its measures.

    Args:
        run: the run folder.
        task: whose labels the texts have.
        download: what goes back.
        record: what happened.
        measured: what the caller has measured of the client's SLM and of the texts.

    Returns:
        ``measured`` and :func:`text_measures`.

    Raises:
        RunError: it cannot be written.
    """
    who, step = download.client_id, download.step
    for iteration, (drafts, rewards) in enumerate(record.drafts):
        run.save_synthetic(f"step-{step:04}-drafts-{iteration}", task.labels, drafts, rewards)
    run.save_synthetic(f"step-{step:04}-pool", task.labels, record.pool, receipts=record.receipts)
    if record.gate and not record.refusal:
        run.event("gate", step=step, client=who, passed=True, **record.gate)
    for number, parts in enumerate(record.updates):
        run.event("update", step=step, client=who, number=number, **parts)
    measures = {**measured, **text_measures(record, task)}
    run.event("step", step=step, client=who, round=download.client_round, **measures, **download.metrics)
    return measures


def text_measures(record: StepRecord, task: Task) -> dict[str, float]:
    """Mean reward, diversity, length, label-word echo, distinct-n and self-similarity of a step's texts, and numbers.

    Where the SLM had no say there are no drafts. ``removed/REASON`` counts what the LLM wrote besides and nobody could
    use. Self-similarity is the mean cosine of a text with the text most like
    it, ``1 - mean(D_j)`` of Eq. 10.
    """
    texts, learned = record.pool.texts, {}
    if record.drafts:
        learned = {
            "reward/drafts": float(sum(rewards.mean() for _, rewards in record.drafts) / len(record.drafts)),
            "texts/drafts": float(sum(len(drafts.samples) for drafts, _ in record.drafts)),
        }
    removed = sum((Counter(texts.removed) for texts in record.written), Counter[str]())
    return {
        **learned,
        **{f"removed/{reason}": float(count) for reason, count in removed.items()},
        "reward/pool": sum(receipt.reward for receipt in record.receipts) / len(record.receipts),
        "diversity/pool": sum(receipt.diversity for receipt in record.receipts) / len(record.receipts),
        "distinct_2/pool": distinct_ngrams(texts),
        "texts/pool": float(len(texts)),
        "length/pool": statistics.fmean(len(text.split()) for text in texts),
        "echo/pool": label_word_echo(record.pool.samples, task),
        "distinct_1/pool": distinct_ngrams(texts, 1),
        "distinct_3/pool": distinct_ngrams(texts, 3),
        "self_similarity/pool": 1 - statistics.fmean(receipt.diversity for receipt in record.receipts),
    }


def few_selected(who: str, record: StepRecord, config: Config) -> str | None:
    """A warning where less than half of the texts wanted could be selected; None where all is well."""
    kept, wanted = sum(receipt.kept for receipt in record.receipts), config.selection.fraction * len(record.receipts)
    if kept >= wanted / 2:
        return None
    return f"client {who}: only {kept} of {wanted:.0f} texts could be selected; its SLM learned little"


def judge_measures(judge: SLM, record: StepRecord) -> dict[str, float]:
    """The judge's agreement with the labels of the texts before and after the LLM's update."""
    after = {"judge/pool": label_agreement(judge, record.pool)}
    if not record.drafts:
        return after
    counts = [len(drafts.samples) for drafts, _ in record.drafts]
    agreement = [label_agreement(judge, drafts) for drafts, _ in record.drafts]
    return {"judge/drafts": sum(map(math.prod, zip(counts, agreement, strict=True))) / sum(counts)} | after


def without_a_say(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Clients that were taught (``gate.teach_refused``) and of whose SLMs the LLM has learned in no step."""
    steps = [event for event in events if event["event"] == "step"]
    return sorted({step["client"] for step in steps} - {step["client"] for step in steps if not step.get("no_say")})


def label_word_echo(samples: Sequence[SyntheticText], task: Task) -> float:
    """Share of texts in which the intended label's name or verbalizer stands as a word of its own."""
    patterns = [
        re.compile("|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in (name, verbalizer)), re.IGNORECASE)
        for name, verbalizer in zip(task.labels, task.verbalizers, strict=True)
    ]
    return sum(bool(patterns[sample.label].search(sample.text)) for sample in samples) / len(samples)


def reward_hacking(
    events: Sequence[Mapping[str, Any]], on_news: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    """Whether the mean reward rose while the judge's agreement fell.

    Within an arrival the same SLM rewards the texts before the LLM's update (drafts) and after it (pool), so the
    two means compare. Over the run, the first arrival's pool is compared with the last one's. A fall counts if it is
    larger than two standard errors of the difference of two proportions.

    Args:
        events: of a run folder; those of the kind ``step`` are read.
        on_news: told of what is found.

    Returns:
        ``arrivals`` (numbers of the steps in which it happened) and ``whole_run``; None if there is no judge.
    """
    steps = [event for event in events if event["event"] == "step" and "reward/drafts" in event]  # the LLM learned
    if not steps or "judge/pool" not in steps[0]:
        return None
    found = [
        step["step"]
        for step in steps
        if step["reward/pool"] > step["reward/drafts"]
        and fell(step["judge/drafts"], step["texts/drafts"], step["judge/pool"], step["texts/pool"])
    ]
    first, last = steps[0], steps[-1]
    whole_run = last["reward/pool"] > first["reward/pool"] and fell(
        first["judge/pool"], first["texts/pool"], last["judge/pool"], last["texts/pool"]
    )
    if found or whole_run:
        where = [*(f"arrival {step}" for step in found), *(["the whole run"] if whole_run else [])]
        on_news(f"warning: the reward rose while the judge's agreement fell (reward hacking): {', '.join(where)}")
    return {"arrivals": found, "whole_run": whole_run}


def fell(before: float, texts_before: float, after: float, texts_after: float) -> bool:
    """Whether a share of ``texts_after`` is below one of ``texts_before`` by more than two standard errors."""
    variance = before * (1 - before) / texts_before + after * (1 - after) / texts_after
    return before - after > STANDARD_ERRORS * math.sqrt(variance)
