"""The command that runs the paper's experiments again."""

from pathlib import Path
from typing import Annotated

import typer

from crosslm.cli.app import CacheOption, LLMCacheOption, app, console
from crosslm.support.files import expanded
from crosslm.support.quiet import quiet_libraries

STOPPED = 130


@app.command()
def reproduce(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE]...", help="4 5 6 7 8 skew clients rows ablation; all if none is named."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="sst2, imdb, ag_news, yahoo_answers: comma-separated, or several times."),
    ] = None,
    presets: Annotated[
        list[str] | None, typer.Option("--presets", help="paper, recommended: comma-separated, or several times.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Seeds 0 to N-1. [default: the scale's]")] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the cells, runs, tables and plots; an old one is gone on with.")
    ] = Path("runs/reproduce"),
    data_dir: Annotated[
        Path, typer.Option("--data-dir", help="Folder with a folder for each dataset: sst2, boolq, ptb, ...")
    ] = Path(),
    split: Annotated[
        str, typer.Option("--split", help="test, or validation: for tuning, kept in a folder of its own.")
    ] = "test",
    scale: Annotated[
        Path | None,
        typer.Option("--scale", help="How much of everything: small, or a TOML file like the packaged scale.toml."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Cells at a time, each in a process: for a GPU that one does not fill.")
    ] = 1,
    render: Annotated[bool, typer.Option("--render", help="Only write the tables of what is there.")] = False,
    cache_dir: CacheOption = None,
    llm_cache: LLMCacheOption = None,
) -> None:
    """Run the experiments behind the paper's tables; may be stopped at any moment, the same command goes on."""
    quiet_libraries()
    from crosslm.cli.display import display_for
    from crosslm.models.sources import cache_folder
    from crosslm.reproduce.driver import reproduce as run
    from crosslm.reproduce.plan import choose
    from crosslm.reproduce.scale import load_scale

    choice = choose(
        load_scale(scale), tables or [], _names(tasks), _names(presets), seeds, split, expanded(data_dir).absolute()
    )
    try:
        folder = run(choice, output, cache_folder(cache_dir), display_for(console), render, jobs, llm_cache)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on", highlight=False)
        raise typer.Exit(STOPPED) from None
    console.print(
        f"{folder}: tables.md, tables.json, headline.json, plots/", highlight=False, markup=False, soft_wrap=True
    )


def _names(given: list[str] | None) -> list[str]:
    """Names given with commas or by several options."""
    return [name for part in given or [] for name in part.split(",") if name]
