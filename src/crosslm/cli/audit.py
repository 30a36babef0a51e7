"""The command that measures what a run gives away."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from crosslm.cli.app import CacheOption, app, console
from crosslm.runs.rundir import RunDir
from crosslm.support.quiet import quiet_libraries


@app.command()
def audit(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a silo's kit.", show_default=False)],
    shadows: Annotated[
        int, typer.Option("--shadows", help="Shadow models of the LiRA attack for each client, an even number.")
    ] = 0,
    cache_dir: CacheOption = None,
) -> None:
    """Attack a run's uploaded SLMs: who was in their training, what of it is in the LLM and its texts.

    Of a silo's kit: train what it would upload next, keep and send nothing, and attack that.
    """
    quiet_libraries()
    from crosslm.federation.kits import SILO_FILE

    if (run_folder / SILO_FILE).is_file():
        _audit_silo(run_folder)
        return
    from crosslm.cli.display import display_for
    from crosslm.models.sources import cache_folder
    from crosslm.runs.audit import audit_run

    figures = audit_run(RunDir.open(run_folder), cache_folder(cache_dir), shadows, display_for(console))
    for table in (membership_table(figures), overlap_table(figures), canary_table(figures)):
        if table.row_count:
            console.print(table)
    _say(meaning(figures))
    console.print(f"Everything is in {run_folder / 'audit.json'}.", highlight=False, markup=False, soft_wrap=True)


def _audit_silo(kit: Path) -> None:
    """What a silo's next upload would give away."""
    from crosslm.federation.self_audit import audit_silo
    from crosslm.federation.silo_models import SiloModels
    from crosslm.models.sources import cache_folder

    figures = audit_silo(SiloModels(kit, cache_folder()))
    console.print(membership_table(figures, "Membership inference on the SLM that would be uploaded next"))
    _say(meaning(figures))
    _say("It was trained for this alone: nothing was kept, and nothing was sent.")


def meaning(figures: Mapping[str, Any]) -> str:
    """The most successful attack, in words."""
    found = [
        (attack["auc"], client, name)
        for client, parts in figures["clients"].items()
        for name, attack in parts["membership"]["attacks"].items()
    ]
    worst, client, name = max(found)
    return (
        f"Of a row that {client}'s SLM was trained on and one that it was not, the attack by {name} tells which is "
        f"which in {100 * worst:.0f} of 100 pairs; 50 is chance. Another attack may do better."
    )


def _say(message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def membership_table(figures: Mapping[str, Any], title: str = "Membership inference on the uploaded SLMs") -> Table:
    """How well each attack tells members from others."""
    table = Table(title=f"{title} (95 % intervals)", title_justify="left")
    for name in ("client", "epsilon", "attack", "rows", "AUC", "TPR at 1 % FPR"):
        table.add_column(name)
    for client, parts in figures["clients"].items():
        bound = figures["privacy"].get(client)
        membership = parts["membership"]
        for attack, found in membership["attacks"].items():
            table.add_row(
                Text(client),
                f"{bound['epsilon']:.2f}" if bound else "none",
                attack,
                f"{membership['members']} + {membership['others']}",
                with_interval(found["auc"], found["auc_interval"]),
                with_interval(found["tpr"], found["tpr_interval"]),
            )
    return table


def overlap_table(figures: Mapping[str, Any]) -> Table:
    """How near the texts that trained SLMs are to private rows, and to rows that nobody had."""
    table = Table(title="Synthetic texts that trained SLMs, beside real ones", title_justify="left")
    for name in ("client", "beside", "rows", "longest shared words", "mean", "nearest similarity", "mean"):
        table.add_column(name)
    for client, parts in figures["clients"].items():
        for name, found in parts["overlap"].items():
            if name == "texts":  # how many there are; none where nothing was selected
                continue
            table.add_row(
                Text(client),
                name,
                str(found["rows"]),
                str(found["longest_shared_words"]),
                f"{found['mean_shared_words']:.2f}",
                f"{found['nearest_similarity']:.3f}",
                f"{found['mean_similarity']:.3f}",
            )
    return table


def canary_table(figures: Mapping[str, Any]) -> Table:
    """Exposure of planted sentences in bits: 1.44 in the mean for what was not learned."""
    table = Table(title="Canaries: exposure in bits, mean and most (not learned: 1.44)", title_justify="left")
    for name in ("client", "planted", "in the SLM", "in the LLM", "words in a row in its texts"):
        table.add_column(name)
    for client, parts in figures["clients"].items():
        if found := parts.get("canaries"):
            table.add_row(
                Text(client),
                str(found["planted"]),
                *(
                    f"{sum(found[key]) / len(found[key]):.2f}, {max(found[key]):.2f}"
                    for key in ("slm_exposure", "llm_exposure")
                ),
                str(found["most_shared_words_in_texts"]),
            )
    return table


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """A figure and where it may be."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
