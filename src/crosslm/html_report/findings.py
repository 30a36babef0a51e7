"""What a reader of a run should know before believing its figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from crosslm.html_report.collect import RunView
from crosslm.html_report.intervals import difference_is_noise
from crosslm.privacy import how_told
from crosslm.report import declined, waited_for

COLLAPSE = 0.75  # of the different word pairs before
FEW_TEST_ROWS = 50  # of which each is two points of accuracy


@dataclass(frozen=True)
class Finding:
    """Something to look at: ``level`` is ``warning`` or ``failure``."""

    level: str
    title: str
    text: str


def findings(view: RunView) -> list[Finding]:
    """Everything that went wrong or may have, failures first."""
    found = [*_failures(view), *_journal(view), *_reward_hacking(view), *_silos(view), *_collapse(view), *_noted(view)]
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
    """The reward rises while the independent judge, who never serves as reward, falls by more than noise."""
    learned = [arrival for arrival in view.arrivals if "reward/drafts" in arrival.measures]  # the LLM, of that SLM
    for earlier, later in pairwise(learned):
        if not all("judge/pool" in arrival.measures for arrival in (earlier, later)):
            continue
        (reward, judge), (reward_after, judge_after) = (
            (arrival.measures["reward/pool"], arrival.measures["judge/pool"]) for arrival in (earlier, later)
        )
        rows = int(view.config["selection"]["pool"])
        if reward_after > reward and judge_after < judge and not difference_is_noise(judge, judge_after, rows):
            yield Finding(
                "warning",
                "reward hacking is likely",
                f"From arrival {earlier.step} to {later.step} the mean reward rose from {reward:+.2f} to "
                f"{reward_after:+.2f} while the independent judge fell from {judge:.3f} to {judge_after:.3f}: the LLM "
                f"may have learned to please the SLM of {later.client} rather than to write to the label. "
                "Read the texts of that arrival; raise llm.gamma_kl or lower llm.learning_rate.",
            )
    slms, judges = view.summary["llm"].get("nlg_accuracy", {}), view.summary["llm"].get("nlg_judge_accuracy", {})
    rows = int(view.config["evaluation"]["nlg_samples"])
    values = [measure.get(moment) for measure in (slms, judges) for moment in ("before", "after")]
    if all(value is not None for value in values):
        before, after, judged, judged_after = values
        if after > before and judged_after < judged and not difference_is_noise(judged, judged_after, rows):
            yield Finding(
                "warning",
                "reward hacking over the whole run",
                f"The clients' SLMs find the label in {after:.3f} of what the LLM writes ({before:.3f} before), "
                f"the independent judge in {judged_after:.3f} ({judged:.3f} before).",
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
