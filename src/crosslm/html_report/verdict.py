"""Whether a classifier got better, in a sentence: from the interval of its gain, which a figure alone does not say."""

from collections.abc import Iterator

from crosslm.html_report.collect import RunView
from crosslm.html_report.intervals import Interval


def verdicts(view: RunView) -> list[str]:
    """A line for each client, for their mean, and for what the LLM's learning brought; nothing of unmeasured runs."""
    if not view.gains:
        return []
    lines = [_of(f"{who}:", view.gain(who), view.gains[who]) + _advice(view, who) for who in view.clients]
    if len(view.clients) > 1:
        lines.append(_of("Mean of the clients:", view.gain("mean"), view.gains["mean"]))
    lines += _beside_data_free_kd(view)
    return [*lines, "In brackets 95 % of draws of test rows (paired bootstrap); another seed may move a figure more."]


def _of(what: str, gain: float, interval: Interval) -> str:
    low, high = interval
    how = "better" if low > 0 else "worse" if high < 0 else "no clear change"
    return f"{what} {how}, {_points(gain)} points [{_points(low)}, {_points(high)}]."


def _advice(view: RunView, who: str) -> str:
    """What a client may do whose own classifier found more: the one that it uploaded, where it uploaded one alone."""
    came_once = view.config.get("federation", {}).get("participations", 1) == 1
    if view.gain(who) >= 0 or view.between_machines or not came_once:
        return ""
    return f" Its own was right more often; to use that: crosslm predict RUN --client {who} --own."


def _beside_data_free_kd(view: RunView) -> Iterator[str]:
    if view.gains_over_kd:
        low, high = view.gains_over_kd["mean"]
        gain = view.gain("mean", "data_free_kd")
        how = "more" if low > 0 else "less" if high < 0 else "nothing clear"
        yield (
            f"What the LLM learned of the clients brought {how}: {_points(gain)} points [{_points(low)}, "
            f"{_points(high)}] over Data-free KD, whose LLM learned nothing."
        )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
