"""Commands that use what a finished run made."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosslm.cli.app import CacheOption, RunArgument, app, console, errors
from crosslm.data.rows import (
    NOT_UTF8,
    Row,
    RowFormat,
    check_output,
    format_of,
    is_text,
    label_of,
    rows_of,
    rows_of_file,
    write_rows,
)
from crosslm.support.plain import plain
from crosslm.support.quiet import quiet_libraries

if TYPE_CHECKING:
    from crosslm.config import DataConfig
    from crosslm.federation.kits import SiloData
    from crosslm.models.slm import SLM

NAMED_LABELS = 5


@app.command()
def generate(
    run_folder: RunArgument,
    count: Annotated[int, typer.Option("-n", "--number", help="How many texts.")] = 10,
    label: Annotated[
        str | None, typer.Option("--label", help="Label of all of them; each is drawn evenly if not given.")
    ] = None,
    kind: Annotated[
        RowFormat,
        typer.Option("--format", help="jsonl: text, label, prompt and seed; csv: the same; text: text alone."),
    ] = RowFormat.jsonl,
    output: Annotated[Path | None, typer.Option("--output", help="New file. [default: standard output]")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed gives other texts.")] = 0,
    cache_dir: CacheOption = None,
) -> None:
    """Write labelled text with the enhanced LLM of a run. Only the texts go to standard output."""
    quiet_libraries()
    from crosslm.cli.display import display_for
    from crosslm.runs.finished import Run

    check_output(output)
    run = Run.open(run_folder, cache_dir)
    texts = run.generate(count, label, seed, display_for(errors))
    labels = run.task.labels
    rows = ({"text": x.text, "label": labels[x.label], "prompt": x.prompt, "seed": x.seed} for x in texts)
    write_rows(rows, kind, output)


@app.command()
def predict(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a silo's kit.", show_default=False)],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="CSV, JSONL or text file, or any with .gz. [default: standard input]"),
    ] = None,
    client: Annotated[str, typer.Option("--client", help="Whose classifier of the run.")] = "",
    own: Annotated[
        bool,
        typer.Option("--own", help="The classifier that the client uploaded last, not the one that came back."),
    ] = False,
    given: Annotated[
        RowFormat | None,
        typer.Option("--format", help="Of the input. [default: by the file's name; text, one a line, without a file]"),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help="Column to classify. [default: the one of its training rows]")
    ] = None,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Write JSONL, which is the default for JSONL; CSV otherwise.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", help="New file. [default: standard output]")] = None,
) -> None:
    """Classify texts with a client's enhanced classifier, or with the one in use at a silo.

    Each row is written with what is predicted and how probable that is. Where the rows have labels, the accuracy with
    its 95 % interval (Wilson), the macro-F1 and the share that is found of each label are told on standard error, and
    how many rows have a label that the task does not know.
    """
    quiet_libraries()
    from crosslm.runs.finished import classified

    check_output(output)
    slm, data = _classifier(run_folder, client, own)
    column = text_column or data.text_column
    broken = 0

    def is_broken() -> None:
        nonlocal broken
        broken += 1

    if file is None or str(file) == "-":
        if sys.stdin.isatty():
            errors.print("Reading texts from the terminal, one a line; Ctrl-D ends.", highlight=False)
        kind = given or RowFormat.text
        rows = rows_of(sys.stdin.buffer, "standard input", column, kind, is_broken)
    else:
        kind = given or format_of(file)
        rows = rows_of_file(file, column, kind, is_broken)
    tally = _Tally(slm.labels, data)

    def counted() -> Iterator[Row]:
        for row in classified(slm, rows, column):
            tally.add(row)
            yield row

    keeps_all = as_jsonl or kind is RowFormat.jsonl  # the rows of JSONL need not have the same columns
    write_rows(counted(), RowFormat.jsonl if keeps_all else RowFormat.csv, output)
    for told in (_told_broken(broken), tally.told_unknown(), _measured(tally.counts, slm.labels)):
        if told:
            errors.print(told, highlight=False, markup=False, soft_wrap=True)


class _Tally:
    """What was predicted for rows of each label, and the labels that the task does not know."""

    def __init__(self, labels: tuple[str, ...], data: "DataConfig | SiloData") -> None:
        self.counts = [[0] * len(labels) for _ in labels]
        self._column, self._labels = data.label_column, labels
        self._index = {label.strip(): place for place, label in enumerate(labels)}
        self._names = {theirs.strip(): ours.strip() for theirs, ours in data.label_names.items()}
        self._no_matter = {"", *(label.strip() for label in data.skip_labels)}
        self._unknown, self._unknown_rows = dict[str, None](), 0

    def add(self, row: Row) -> None:
        """Count a classified row, if it has a label."""
        label = label_of(row.get(self._column))
        known = self._names.get(label, label)
        if row["predicted"] is None or label in self._no_matter:
            return
        if known in self._index:
            self.counts[self._index[known]][self._labels.index(str(row["predicted"]))] += 1
            return
        self._unknown_rows += 1
        if len(self._unknown) <= NAMED_LABELS:  # of a stream no more is kept than is shown
            self._unknown[label] = None

    def told_unknown(self) -> str:
        """How many rows have a label that is none of the task's; nothing where there are none."""
        count, names = self._unknown_rows, list(self._unknown)
        if not count:
            return ""
        shown = ", ".join("..." if is_text(name) else repr(name) for name in names[:NAMED_LABELS])
        more = ", ..." if len(names) > NAMED_LABELS else ""
        rows, do = ("1 row has", "does") if count == 1 else (f"{count} rows have", "do")
        return plain(
            f"warning: {rows} a label that the task does not know ({shown}{more}) and {do} not count; "
            f"its labels are: {', '.join(self._labels)}"
        )


def _told_broken(count: int) -> str:
    """How many lines have something that could not be read; nothing where there are none."""
    if not count:
        return ""
    lines, them = ("1 line is not whole UTF-8 and was", "it")
    if count > 1:
        lines, them = (f"{count} lines are not whole UTF-8 and were", "them")
    return f"warning: {lines} read with {NOT_UTF8} in {them}; save the file as UTF-8"


def _measured(counts: list[list[int]], labels: tuple[str, ...]) -> str:
    """What the rows that have a label say of the classifier; nothing where there are none."""
    from crosslm.algorithm.per_label import macro_f1, recalls
    from crosslm.html_report.intervals import binomial_interval

    labelled = sum(map(sum, counts))
    if not labelled:
        return ""
    right = sum(row[label] for label, row in enumerate(counts)) / labelled
    low, high = binomial_interval(right, labelled)
    found = zip(labels, recalls(counts), counts, strict=True)
    each = ", ".join(f"{label} {share:.3f} of {sum(row)}" for label, share, row in found if share is not None)
    return plain(
        f"accuracy {right:.3f} [{low:.3f}, {high:.3f}] on {labelled} rows that have a label; "
        f"macro-F1 {macro_f1(counts):.3f}; found of each label: {each}"
    )


def _classifier(folder: Path, client: str, own: bool) -> "tuple[SLM, DataConfig | SiloData]":
    """A client's enhanced classifier of a run, or the one in use at a silo; and what columns its rows have."""
    from crosslm.errors import ConfigError
    from crosslm.federation.kits import SILO_FILE
    from crosslm.runs.finished import Run

    if (folder / SILO_FILE).is_file():
        from crosslm.federation.silo_models import SiloModels
        from crosslm.models.sources import cache_folder

        silo = SiloModels(folder, cache_folder())
        if client not in ("", silo.settings.id):
            raise ConfigError(f"{folder}: is the kit of {silo.settings.id}, which needs no --client")
        if own:
            raise ConfigError(f"{folder}: --own is for run folders; a silo uses the one of both that it has accepted")
        return silo.trained(), silo.settings.data
    run = Run.open(folder)
    if not client:
        raise ConfigError(f"say whose classifier: --client NAME with one of {', '.join(run.clients)}")
    slm = run.slm(client, own or None)
    if run.kept_its_own(client) and not own:
        refused = run.summary["clients"][client]["decision"].get("refused")
        why = f"was refused there: {refused}" if refused else "is worse on its held-out rows"
        errors.print(
            f"{client} kept the classifier that it had, which this is; the one that came back, in "
            f"{run.path / 'slm' / client}, {why}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return slm, next((run.config.data_of(silo) for silo in run.config.clients if silo.id == client), run.config.data)


@app.command()
def export(
    run_folder: RunArgument,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to create; must be new or empty.")],
    parts: Annotated[
        list[str],
        typer.Option("--part", help="slm, llm or synthetic; may be given several times. [default: all]"),
    ] = [],  # noqa: B006  typer's way
    merged_llm: Annotated[
        bool, typer.Option("--merged-llm", help="Write the whole enhanced LLM too, adapter added into the weights.")
    ] = False,
    repository: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Upload what was exported to the Hugging Face hub too, as private repositories OWNER/NAME-slm-CLIENT, "
            "OWNER/NAME-llm and OWNER/NAME-synthetic. Nothing is uploaded without this.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: new repositories are public, and one that is there may be.")
    ] = False,
    cache_dir: CacheOption = None,
) -> None:
    """Copy a run's classifiers, LLM and synthetic text into a folder, each with a card, for other tools."""
    quiet_libraries()
    from crosslm.runs.export import PARTS, check_repository, export_run, push
    from crosslm.runs.finished import Run

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False, soft_wrap=True)

    if repository is not None:
        check_repository(repository)
    exported = export_run(Run.open(run_folder, cache_dir), dest, parts or PARTS, merged_llm)
    for one in exported:
        say(f"{one.folder}: {one.kind}")
    if repository is not None:
        push(exported, repository, public, say)
