"""What a silo's operator is told of its rounds, in words."""

from collections.abc import Mapping
from typing import Any

from crosslm.support.files import is_running
from crosslm.support.plain import plain


def outcome(decision: Mapping[str, Any]) -> str:
    """What came of a round that is complete."""
    if why := decision.get("not_used"):
        return (
            f"the server did not use the upload ({plain(why)}); the classifier in use is the one that was trained here"
        )
    if why := decision.get("refused"):
        return f"what came back was refused ({plain(why)}); the classifier in use is the one that was trained here"
    taught = ""
    if decision.get("no_say"):
        taught = "; the gate did not let the classifier that was sent judge what it was taught"
    if not decision["accepted"]:
        return f"what came back is worse{_figures(decision)}; the old classifier stays in use" + taught
    return f"the enhanced classifier is installed{_figures(decision)}" + taught


def closing_outcome(closed: Mapping[str, Any]) -> str:
    """What came of the closing download."""
    if closed.get("none") and not closed.get("rounds"):
        last = plain(str(closed.get("last_refused", "")))
        because = f"; its last request was refused here: {last}" if last else ""
        return f"the run is over, and this silo took no part: nothing was installed here{because}"
    if closed.get("none"):
        return "nothing more comes; the classifier in use is the one of the last round"
    if why := closed.get("refused"):
        return f"the closing download was refused ({plain(why)}); the classifier in use is the one of the last round"
    if not closed["accepted"]:
        return f"the closing download is worse{_figures(closed)}; the classifier of the last round stays in use"
    return f"the classifier was enhanced once more and is installed{_figures(closed)}"


def _figures(decision: Mapping[str, Any]) -> str:
    """What the classifier in use and the one that came make of rows that neither has learned."""
    alike = ", each label counting alike" if decision.get("balanced") else ""
    parts = [_of_rows(decision, "held-out rows", alike)] if decision["rows"] else []
    parts += [_of_rows(test, "test rows")] if (test := decision.get("test")) else []
    parts += [f"not tested: {plain(why)}"] if (why := decision.get("not_tested")) else []
    return f" ({'; '.join(parts)})" if parts else ""


def _of_rows(figures: Mapping[str, Any], which: str, alike: str = "") -> str:
    rows, before, after = figures["rows"], figures["before"], figures["after"]
    return f"{before:.3f} before, {after:.3f} with it, on {rows} {which}{alike}"


def doing(now: Mapping[str, Any] | None, ago: str) -> str:
    """What goes on at a silo.

    Args:
        now: as :meth:`crosslm.federation.silo_state.SiloState.doing` gives it.
        ago: for how long, in words.
    """
    if now is None:
        return "the server has asked for nothing yet; nothing has left this silo"
    if now["now"] == "refused":
        return f"refused a request {ago} ago: {plain(now['why'])}"
    if now["now"] == "training":
        stopped = "" if is_running(now["pid"]) else ", and was stopped in it; the server asks again"
        return f"training for round {now['round']} since {ago}{stopped}; nothing of this round has left yet"
    if now["now"] == "waiting":
        return f"waiting since {ago} for what the server makes of round {now['round']}"
    if now["now"] == "closed":
        return f"the run is over for this silo since {ago}"
    return f"round {now['round']} is complete since {ago}"
