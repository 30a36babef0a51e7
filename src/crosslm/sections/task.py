"""What is classified, and whose text: ``[task]``, ``[data]`` and ``[[clients]]``."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from crosslm.sections.section import Encoding, Name, Positive, Section
from crosslm.support.files import PARTIAL


def _as_list(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError("must be a text in quotes, or a list of such texts")
    return (value,) if isinstance(value, str) else value


Paraphrases = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
]


class TaskConfig(Section):
    """A classification task as data (section 3): nothing of it is code."""

    labels: tuple[str, ...] = Field(min_length=2)
    """Class names, as they stand in the data files."""
    query: str
    """M(x) of Eq. 1; ``{text}`` stands for the text, the verbalizer comes right after."""
    prompt: dict[str, Paraphrases]
    """M(y) of Eq. 3 for each label: one prompt or several, drawn from uniformly."""
    statement: dict[str, Paraphrases]
    """M'(y) of Eq. 7 for each label; ``{text}`` may stand for x, otherwise x comes first."""
    verbalizer: dict[str, str]
    """V(y) of Eq. 1 for each label: the words that follow the query."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len({label.strip() for label in self.labels}) != len(self.labels):  # so they are read
            raise ValueError(f"labels must differ from each other, found {list(self.labels)}")
        if self.query.count("{text}") != 1:
            raise ValueError(f"query must contain {{text}} exactly once, found {self.query!r}")
        for name in ("prompt", "statement", "verbalizer"):
            table: Mapping[str, Any] = getattr(self, name)
            missing = [label for label in self.labels if not _said(table.get(label))]
            unknown = [label for label in table if label not in self.labels]
            if missing:
                raise ValueError(f"{name} is missing for the label(s) {missing}, or blank")
            if unknown:
                raise ValueError(f"{name} names {unknown}, which are not among the labels {list(self.labels)}")
        return self


def _said(words: str | tuple[str, ...] | None) -> bool:
    """Whether there is something in all of them."""
    given = (words,) if isinstance(words, str) else words or ()
    return bool(given) and all(each.strip() for each in given)


class ClientConfig(Section):
    """One silo with a file of its own."""

    id: Name
    """The silo's name in reports and folders."""
    train: str
    """Private labelled text, in ``data.dir``."""
    test: str | None = None
    """The silo's own test file; without it ``data.test`` is used."""
    text_column: str | None = None
    """Column of the silo's own files that holds the text; without it ``data.text_column`` is used."""
    label_column: str | None = None
    """The same of the label."""
    encoding: Encoding | None = None
    """Of the silo's own files; without it ``data.encoding`` is used."""
    model: str | None = None
    """The silo's own SLM; without it one of ``slm.models`` is drawn from the seed."""
    num_hidden_layers: Positive | None = None
    """Keep only the lowest layers of ``model``: a smaller architecture from the same weights."""
    pooling: Literal["mean"] | None = None
    """As in ``slm.models``, for ``model``."""

    @model_validator(mode="after")
    def _layers_of_a_model(self) -> Self:
        for name in ("num_hidden_layers", "pooling"):
            if getattr(self, name) is not None and self.model is None:
                raise ValueError(f"{name} needs a model of the client's own")
        if self.id == "mean":
            raise ValueError("id must not be 'mean', which is what the mean over clients is called")
        if self.id.endswith(PARTIAL):
            raise ValueError(f"id must not end with {PARTIAL!r}, which is what half-written files are called")
        return self


def check_columns(text_column: str, label_column: str) -> None:
    """Find out that text and label are two columns: a classifier would learn the label from itself.

    Raises:
        ValueError: they are one.
    """
    if text_column == label_column:
        raise ValueError(f"text_column and label_column must be two columns, found {text_column!r} for both")


class DataConfig(Section):
    """Where the labelled texts are. Either one ``train`` file that is split, or ``clients``."""

    dir: str = "."
    """Folder that the file names are in, relative to the configuration file; with ``--set`` and ``--data-dir`` to the
    working directory."""
    train: str | None = None
    """CSV, CSV.gz or JSONL file, or ``hf:DATASET[/CONFIG]:SPLIT``; split among ``num_clients``."""
    test: str | None = None
    """Rows that the LLM is tested on, and every SLM whose client has no test file of its own. Must be named; between
    machines the file need not be there."""
    text_column: str = "text"
    """Column that holds the text."""
    label_column: str = "label"
    """Column that holds the label's name."""
    encoding: Encoding = "utf-8"
    """Of CSV and JSONL files, by a name that Python knows it by: a spreadsheet on Windows may write ``cp1252``. A file
    that begins with the mark of UTF-8 is read as that."""
    label_names: dict[str, str] = Field(default={})
    """The task's label for each name that the data have another name for: ``{ neg = "negative" }``."""
    skip_labels: tuple[str, ...] = ()
    """Labels of the data whose rows are left out, and counted; ``""`` for rows without one."""
    num_clients: Positive = 4
    """Clients that ``train`` is split among."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Dirichlet concentration of the label split among clients: the smaller, the more skewed."""
    rows_per_client: Positive | None = None
    """At most so many private rows a client; all that are there if not set."""
    test_rows: Positive | None = None
    """At most so many rows of each test file, balanced over the labels; all if not set."""
    judge: str | None = None
    """Held-out labelled text for the independent judge; if not set, the judge is trained on
    ``judge_rows`` rows of ``train`` that no client has."""
    judge_rows: Annotated[int, Field(ge=0)] = 2000
    """Rows for the judge; 0 means no judge."""

    @model_validator(mode="after")
    def _test_is_named(self) -> Self:
        if self.test is None:
            raise ValueError("test must name a file: without test rows nothing can be measured")
        return self

    @model_validator(mode="after")
    def _two_columns(self) -> Self:
        check_columns(self.text_column, self.label_column)
        return self
