"""What a run says of the bounds that its uploads kept to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

PREFIX = "dp/"
BOUND = {"epsilon", "delta"}


def privacy_summary(uploads: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """For each client the bound over all its uploads, as the last one tells it; none if one is without DP.

    Args:
        uploads: the metrics of each of a client's uploads, in order; those that were refused have left it too.
    """
    bounds = {}
    for client, metrics in uploads.items():
        told = [
            {name.removeprefix(PREFIX): value for name, value in each.items() if name.startswith(PREFIX)}
            for each in metrics
        ]
        if told and all(each.keys() >= BOUND for each in told):  # a silo may send what names it likes
            bounds[client] = told[-1]
    return bounds


def uploads_told(events: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, float]]]:
    """For each client the metrics of its uploads that passed the intake."""
    told: dict[str, list[Mapping[str, float]]] = {}
    for event in events:
        if event["event"] == "upload":
            told.setdefault(event["client_id"], []).append(event["metrics"])
    return told


def privacy_line(summary: Mapping[str, Any]) -> str:
    """The bound in words, and what is outside it."""
    bounds, between_machines = summary.get("privacy") or {}, bool(summary.get("engine"))
    if not bounds and between_machines:
        return "Private rows: no silo says that it trained with DP-SGD, so no bound is known."
    if not bounds:
        return "Private rows: no bound (privacy.epsilon is not set); `crosslm audit` measures what the SLMs give away."
    told = ", ".join(f"{client} {bound['epsilon']:.2f}" for client, bound in bounds.items())
    deltas = ", ".join(sorted({f"{bound['delta']:g}" for bound in bounds.values()}))
    uploads = "all uploads that were used" if between_machines else "all uploads"  # a refused one is only known there
    parts = [f"Private rows: DP-SGD, epsilon of {uploads} together {told} (delta {deltas})"]
    if between_machines:
        parts[0] += ", as the silo says"
    if exact := [client for client in bounds if how_told(summary, client) == "exact"]:
        whose = f" of {', '.join(exact)}" if len(exact) < len(bounds) else ""
        parts.append(f"exact class counts{whose} are outside it")
    if others := [client for client in summary.get("clients", {}) if client not in bounds]:
        parts.append(f"no bound for {', '.join(others)}")
    return "; ".join(parts) + "." + of_earlier_run(summary)


def uploaded(summary: Mapping[str, Any]) -> list[str]:
    """Those whose rows may show in what the run made; one that was rolled back has uploaded nothing."""
    return [client for client, about in summary["clients"].items() if about["bytes_up"]]


def guarantee(summary: Mapping[str, Any], clients: Sequence[str]) -> str:
    """What bounds what is told of these clients' rows, in words."""
    bounds = {client: bound for client, bound in (summary.get("privacy") or {}).items() if client in clients}
    if set(bounds) != set(clients):
        return (
            f"without differential privacy{' for all of them' if bounds else ''}: no privacy guarantee\n"
            "holds, and weights can reveal things about the text that they were fitted to."
        )
    told = ", ".join(
        f"{client}: {bound['epsilon']:.2f} at delta {bound['delta']:g}" for client, bound in bounds.items()
    )
    exact = any(how_told(summary, client) == "exact" for client in clients)
    told_by = ", as the silo says," if summary.get("engine") else ""
    return (
        f"with DP-SGD, whose epsilon for all uploads together is{told_by}\n"
        f"{told}. That bounds what can be learned of one\n"
        f"private row{'; exact counts of rows of each label are not covered by it' if exact else ''}."
        f"{of_earlier_run(summary)}"
    )


def of_earlier_run(summary: Mapping[str, Any]) -> str:
    """What a run that goes on from rolled-back ones has to say of their epsilons; nothing for any other."""
    earlier = summary.get("rolled_back_from") or []
    earlier = [earlier] if isinstance(earlier, str) else earlier  # as older versions have it
    if len(earlier) == 1:
        return f" The run that it was rolled back from, {earlier[0]}, has an epsilon of its own, and the two add up."
    if earlier:
        return f" The runs that it was rolled back from, {', '.join(earlier)}, have epsilons of their own; all add up."
    return ""


def told_counts(events: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """For each client that uploaded what its last upload told of the rows of each label, in the task's order."""
    return {event["client_id"]: list(event["class_counts"]) for event in events if event["event"] == "upload"}


def how_told(summary: Mapping[str, Any], client: str) -> Literal["hidden", "noisy", "exact"]:
    """How the rows of each label stand in a summary: as zeros, with noise, or as they are."""
    if hidden(summary["clients"][client]["rows"].values()):
        return "hidden"
    return "noisy" if (summary.get("privacy") or {}).get(client, {}).get("count_epsilon") else "exact"


def hidden(counts: Iterable[int]) -> bool:
    """Whether class counts tell nothing: a silo has at least one row, so all zeros are what hides the numbers."""
    return not any(counts)


def in_words(labels: Sequence[str], counts: Sequence[int]) -> str:
    """Class counts as a reader is told them."""
    told = ", ".join(f"{label} {count}" for label, count in zip(labels, counts, strict=True))
    return "hidden" if hidden(counts) else told
