"""The command line."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crosslm import __version__
from crosslm.config import Config
from crosslm.config_file import load, packaged
from crosslm.errors import CrosslmError
from crosslm.rundir import RunDir, next_free

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A server's LLM and many clients' classifiers make each other better; no client's text leaves its silo.",
)
console = Console()
errors = Console(stderr=True)

QUICK = (
    "llm.samples=16",
    "selection.pool=48",
    "slm.private.epochs=3",
    "evaluation.nlg_samples=32",
    "evaluation.nlu_rows=60",
    "evaluation.perplexity_tokens=1024",
    "evaluation.judge.epochs=1",
    "data.test_rows=120",
    "data.judge_rows=400",
    "synthesis.max_new_tokens=24",
)

ConfigArgument = Annotated[
    str, typer.Argument(help="Path of a TOML file, or the name of a packaged one: " + ", ".join(packaged()) + ".")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be given several times."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", help="Folder for this run; must be new or empty. [default: runs/NAME-1, -2, ...]"),
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache-dir",
        help="Where converted models and demo data are kept. [default: $CROSSLM_CACHE or the user's cache]",
    ),
]
DataDirOption = Annotated[
    str | None, typer.Option("--data-dir", help="Folder that the data files are in; replaces data.dir.")
]


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006  typer's way
    output: OutputOption = None,
    data_dir: DataDirOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Run CrossLM and both baselines, with all clients in this process."""
    _run(load(config, tuple(overrides), data_dir), output, cache_dir)


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="The same steps on far less text, to see them run; no gain to expect.")
    ] = False,
    overrides: SetOption = [],  # noqa: B006
    output: OutputOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Run the packaged demo: four real silos (tweets, products, films, editorials), real weights."""
    from crosslm.demo import prepare_data
    from crosslm.models.sources import cache_folder

    folder = prepare_data(cache_folder(cache_dir), lambda message: console.print(message, highlight=False))
    _run(load("demo", (*(QUICK if quick else ()), *overrides), str(folder)), output, cache_dir)


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    cache_dir: CacheOption = None,
) -> None:
    """Measure a run's classifiers and LLM again, from the files in its folder."""
    _quiet_libraries()
    from crosslm.display import display_for
    from crosslm.models.sources import cache_folder
    from crosslm.reevaluate import evaluate_run

    measures = evaluate_run(RunDir.open(run_folder), cache_folder(cache_dir), display_for(console))
    for name, value in measures.items():
        console.print(f"{name:<28} {value:.4f}", highlight=False)


@app.command("prepare-model")
def prepare_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or package:MODULE.")],
    texts: Annotated[
        list[Path],
        typer.Option(
            "--trim-vocabulary",
            metavar="TEXT",
            help="Text file whose words the model must keep, best a few megabytes of the kind that it is to write; "
            "may be given several times. Every other text can still be read, in more tokens.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder to write the model to; must be new or empty.")],
    cache_dir: CacheOption = None,
) -> None:
    """Write a copy of a language model with fewer tokens, which is faster; use it as llm.model."""
    _quiet_libraries()
    from crosslm.data import readable_lines
    from crosslm.models.sources import cache_folder, model_folder
    from crosslm.models.vocabulary import trim_vocabulary

    lines = [line for path in texts for line in readable_lines(path)]
    folder = model_folder(model, cache_folder(cache_dir), lambda message: console.print(message, highlight=False))
    done = trim_vocabulary(folder, lines, output)
    console.print(
        f"{output}: {done.tokens_after:,} of {done.tokens_before:,} tokens, "
        f"{done.parameters_after:,} of {done.parameters_before:,} parameters",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]) -> None:
    """Print a run's tables."""
    from crosslm.report import closing

    console.print(closing(RunDir.open(run_folder).summary()))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


def _run(config: Config, output: Path | None, cache_dir: str | None) -> None:
    _quiet_libraries()
    from crosslm.display import display_for
    from crosslm.experiment import run_local
    from crosslm.models.sources import cache_folder
    from crosslm.report import closing

    folder = output or next_free(Path("runs"), config.name)
    summary = run_local(config, folder, cache_folder(cache_dir), display_for(console))
    console.print(closing(summary))
    console.print(
        f"Everything is in {folder} (summary.json, synthetic/, slm/, llm/).",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _quiet_libraries() -> None:
    """What transformers says about a new head or a loading bar is not news to our users."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|huggingface_hub)\..*")


def main() -> None:
    """Run a command; a :class:`CrosslmError` is printed and ends with exit code 2."""
    try:
        app()
    except (CrosslmError, OSError) as error:  # an OSError names its file: a full disk, a folder that is not ours
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
