"""What a reader of a run should know before believing its figures."""

from collections.abc import Iterator
from dataclasses import dataclass

from crosslm.html_report.collect import RunView
from crosslm.privacy.bounds import how_told
from crosslm.runs.report import declined, waited_for

COLLAPSE = 0.75  # of the different word pairs before
NEAR_CHANCE = 0.05  # of an accuracy
FEW_TEST_ROWS = 50  # of which each is two points of accuracy


@dataclass(frozen=True)
class Finding:
    """Something to look at: ``level`` is ``warning`` or ``failure``."""

    level: str
    title: str
    text: str


def findings(view: RunView) -> list[Finding]:
    """Everything that went wrong or may have, failures first."""
    parts = (_failures, _journal, _reward_hacking, _silos, _llm, _collapse, _noted)
    found = [finding for part in parts for finding in part(view)]
    return sorted(found, key=lambda finding: finding.level != "failure")


def _failures(view: RunView) -> Iterator[Finding]:
    for event in view.events:
        if event["event"] == "failure":
            who = f"client {event['client']}" if event["client"] else "the server"
            yield Finding("failure", f"{who} failed", event["error"])
        elif event["event"] == "gate" and not event["passed"] and "step" in event:
            yield Finding("warning", f"client {event['client']} is taught and has no say", event["reason"])
        elif event["event"] == "gate" and not event["passed"]:
            yield Finding("failure", f"the upload of client {event['client']} was quarantined", event["reason"])


def _journal(view: RunView) -> Iterator[Finding]:
    """Of a run between machines: uploads that were refused before or after an event could tell, and who is missing."""
    told = [str(event.get("error") or event.get("reason")) for event in (*view.of("failure"), *view.of("gate"))]
    for arrival in view.summary.get("arrivals", []):
        if arrival["state"] == "refused" and not any(arrival["note"] in words for words in told):
            title = f"the upload of {arrival['silo']}, round {arrival['round']}, was refused"
            yield Finding("failure", title, arrival["note"])
    for line in waited_for(view.summary):
        yield Finding("warning", "the run ended without it", line)


def _reward_hacking(view: RunView) -> Iterator[Finding]:
    """Where the run itself found it (:func:`crosslm.runs.arrivals.reward_hacking`), with the figures."""
    found = view.summary.get("reward_hacking") or {}
    served = {arrival.step: arrival for arrival in view.arrivals if "reward/drafts" in arrival.measures}
    for step in found.get("arrivals", ()):
        measures, client = served[step].measures, served[step].client
        yield Finding(
            "warning",
            "reward hacking is likely",
            f"In arrival {step} the mean reward rose from {measures['reward/drafts']:+.2f} before the LLM's update to "
            f"{measures['reward/pool']:+.2f} after it, while the independent judge fell from "
            f"{measures['judge/drafts']:.3f} to {measures['judge/pool']:.3f}: the LLM may have learned to please the "
            f"SLM of {client} rather than to write to the label. "
            "Read the texts of that arrival; raise llm.gamma_kl or lower llm.learning_rate.",
        )
    if found.get("whole_run"):
        first, last = (served[step].measures for step in (min(served), max(served)))
        yield Finding(
            "warning",
            "reward hacking over the whole run",
            f"From the first arrival's texts to the last one's the mean reward rose from {first['reward/pool']:+.2f} "
            f"to {last['reward/pool']:+.2f}, while the independent judge fell from {first['judge/pool']:.3f} to "
            f"{last['judge/pool']:.3f}.",
        )


def _silos(view: RunView) -> Iterator[Finding]:
    for client, facts in view.summary.get("clients", {}).items():
        present = [label for label, rows in facts["rows"].items() if rows]
        if len(present) == 1 and how_told(view.summary, client) == "exact":
            yield Finding(
                "warning",
                f"client {client} has one class only",
                f"All {facts['rows'][present[0]]} private rows are {present[0]!r}: the classifier that it trains finds "
                "that label in every text, and what it is without the others says little.",
            )
    yield from _answers(view)
    for client, why in declined(view.summary).items():
        yield Finding("warning", f"client {client} did not accept what came back", why)
    for client, (_, high) in view.gains.items():
        if client != "mean" and high < 0:
            yield Finding(
                "warning",
                f"client {client} lost accuracy",
                f"The whole interval of its gain lies below 0 (at most {high:+.3f}): it should keep the SLM it had.",
            )


def _answers(view: RunView) -> Iterator[Finding]:
    """Classifiers that say the same of every row, and test sets too small to tell anything."""
    confusion = view.summary.get("confusion", {}).get("crosslm", {})
    for client, counts in confusion.items():
        said = [label for label, column in zip(view.labels, zip(*counts, strict=True), strict=True) if any(column)]
        if len(said) == 1 and sum(map(any, counts)) > 1:
            yield Finding(
                "warning",
                f"the classifier of {client} has one answer only",
                f"It finds {said[0]!r} in every test row: it has learned nothing that tells the labels apart. Give it "
                "more private rows, or raise slm.private.epochs or slm.private.learning_rate.",
            )
    few = {client: rows for client, rows in view.summary["test_rows"].items() if rows and rows < FEW_TEST_ROWS}
    if few:
        rows = min(few.values())
        yield Finding(
            "warning",
            "few test rows",
            f"{', '.join(few)}: on {rows} rows one row is {100 / rows:.1f} points of accuracy. Look at the intervals.",
        )


def _llm(view: RunView) -> Iterator[Finding]:
    """An LLM that does not know the labels, or whose texts do not please those that reward it."""
    after, chance = (view.summary["llm"].get("nlu_accuracy") or {}).get("after"), 1 / len(view.labels)
    if after is not None and after < chance + NEAR_CHANCE:
        yield Finding(
            "warning",
            "the LLM does not tell the labels apart",
            f"It classifies {after:.3f} of the test text right, and {chance:.3f} is chance: what it writes and judges "
            "is worth little. Raise llm.samples, or choose other words in task.verbalizer, task.query and task.prompt.",
        )
    low = [arrival for arrival in view.arrivals if arrival.measures.get("reward/pool", 1) < 2 * chance - 1]
    if low:
        told = ", ".join(f"{arrival.client} {arrival.measures['reward/pool']:+.2f}" for arrival in low)
        yield Finding(
            "warning",
            "mean reward below chance",
            f"Who judges what the LLM writes gives the label that was asked for less probability than a guess "
            f"among {len(view.labels)} labels has (a mean reward below {2 * chance - 1:+.2f}: {told}): they or the "
            "LLM do not know the labels. See docs/tuning.md.",
        )


def _collapse(view: RunView) -> Iterator[Finding]:
    measure = view.summary["llm"].get("distinct_2", {})
    before, after = measure.get("before"), measure.get("after")
    if before and after is not None and after < COLLAPSE * before:
        yield Finding(
            "warning",
            "the LLM repeats itself more",
            f"Of the word pairs in what it writes {after:.0%} are different, {before:.0%} before.",
        )


def _noted(view: RunView) -> Iterator[Finding]:
    one_class = "its classifier can learn nothing else"  # said by _silos with the figures
    for event in view.of("warning"):
        if one_class not in event["message"]:
            yield Finding("warning", "noted during the run", event["message"])
