"""The command that says what a silo reaches by itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from crosslm.cli.app import CacheOption, DataDirOption, SetOption, app, console
from crosslm.config_file import load
from crosslm.errors import ConfigError
from crosslm.support.quiet import quiet_libraries

COUNTS = {"rows": "private rows", "test_rows": "test rows"}
NAMES = {
    "most_frequent": "always its most frequent label",
    "logistic": "logistic regression on sentence vectors",
    "logistic_balanced": "the same, each label counts alike",
    "standalone": "Standalone: the classifier after step 1",
    "logistic_together": "logistic regression, all clients' rows",
    "slm_together": "one classifier, all clients' rows",
}


@app.command()
def baseline(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|KIT",
            help="Path of a TOML file, the name of a packaged one, or a silo's kit.",
            show_default=False,
        ),
    ],
    overrides: SetOption = [],  # noqa: B006
    data_dir: DataDirOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Say what classifiers reach without CrossLM: before a run, or before a silo takes part.

    By each client's own rows: always the most frequent label, a logistic regression on vectors of the sentence encoder
    (where each row counts alike, or each label), and Standalone, the classifier after step 1. Of a configuration with
    several clients also by all rows together. Nothing is kept or sent; no LLM is needed.
    """
    quiet_libraries()
    from crosslm.cli.display import display_for
    from crosslm.federation.kits import SILO_FILE, is_kit
    from crosslm.models.sources import cache_folder
    from crosslm.runs.baseline import baselines
    from crosslm.runs.folders import kits_in

    cache, display = cache_folder(cache_dir), display_for(console)
    if (Path(config) / SILO_FILE).is_file():
        if overrides or data_dir:
            raise ConfigError(f"{config}: --set and --data-dir are not for a kit; change its files")
        from crosslm.federation.self_audit import baseline_of_silo

        found = baseline_of_silo(Path(config), cache, display)
    elif is_kit(Path(config)) or kits_in(Path(config)):
        raise ConfigError(f"{config}: is not a silo's kit; give one, which has a {SILO_FILE}, or a configuration")
    else:
        found = baselines(load(config, tuple(overrides), data_dir), cache, display)
    console.print(baseline_table(found))
    for line in advice(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def baseline_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Each client's accuracies on its test rows, a column a client."""
    table = Table(title="Accuracy on test text, without CrossLM", title_justify="left")
    clients = [client for client in found if client != "mean" or len(found) > 2]  # the mean of one says nothing
    table.add_column()
    for client in clients:
        table.add_column(Text(client), justify="right")
    for key, title in COUNTS.items():
        table.add_row(title, *(str(found[client].get(key, "")) for client in clients))
    table.add_section()
    for key, title in NAMES.items():
        if key in found[clients[0]]:
            table.add_row(title, *(f"{found[client][key]:.3f}" for client in clients))
    return table


def advice(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the figures say of the classifiers and of what there is to gain, in sentences."""
    mean, lines = found["mean"], []
    better = 100 * (max(mean["logistic"], mean["logistic_balanced"]) - mean["standalone"])
    if better > 0:
        lines.append(
            f"A logistic regression does better than the classifiers, by {better:.1f} points: look at pooling = "
            '"mean" in slm.models, and at slm.private.'
        )
    if "slm_together" in mean:
        more = 100 * (mean["slm_together"] - mean["standalone"])
        lines.append(
            f"One classifier on all rows together reaches {more:+.1f} points more than those on each client's own: the "
            'less it is, the less there is to gain; docs/results.md, "Who gains", has what clients gained.'
        )
    return lines
