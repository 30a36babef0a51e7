"""Commands about models alone."""

from pathlib import Path
from typing import Annotated

import typer

from crosslm.cli.app import CacheOption, app, console
from crosslm.support.quiet import quiet_libraries


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
    quiet_libraries()
    from crosslm.data.texts import readable_lines
    from crosslm.models.sources import cache_folder, model_folder
    from crosslm.models.vocabulary import trim_vocabulary

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False)

    lines = [line for path in texts for line in readable_lines(path, lambda line: say(f"warning: {line}"))]
    folder = model_folder(model, cache_folder(cache_dir), say)
    done = trim_vocabulary(folder, lines, output)
    console.print(
        f"{output}: {done.tokens_after:,} of {done.tokens_before:,} tokens, "
        f"{done.parameters_after:,} of {done.parameters_before:,} parameters",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
