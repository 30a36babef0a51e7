"""What a run says of the bounds that its uploads kept to."""

from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "dp/"


def privacy_summary(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each client the bound over all its uploads, from the metadata of the last one; nothing without DP."""
    bounds: dict[str, dict[str, float]] = {}
    for event in events:
        if event["event"] == "upload":
            told = {
                name.removeprefix(PREFIX): value for name, value in event["metrics"].items() if name.startswith(PREFIX)
            }
            if told:
                bounds[event["client_id"]] = told
    return bounds


def privacy_line(summary: Mapping[str, Any]) -> str:
    """The bound in words."""
    bounds = summary.get("privacy") or {}
    if not bounds and summary.get("engine"):
        return "Private rows: no silo says that it trained with DP-SGD, so no bound is known."
    if not bounds:
        return "Private rows: no bound (privacy.epsilon is not set); `crosslm audit` measures what the SLMs give away."
    told = ", ".join(f"{client} {bound['epsilon']:.2f}" for client, bound in bounds.items())
    deltas = {f"{bound['delta']:g}" for bound in bounds.values()}
    return f"Private rows: DP-SGD, epsilon of all uploads together {told} (delta {', '.join(sorted(deltas))})."
