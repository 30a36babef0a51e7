"""What a run needs before a model is loaded: who has which model, where it is, and texts beside the data."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from crosslm.config import Config, PrivacyConfig, SLMSpec
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.data.split import Split, load_split, test_rows
from crosslm.data.texts import find_file, is_there, load_examples, readable_lines, whole_text
from crosslm.errors import ModelError, RunError
from crosslm.federation.intake import Intake
from crosslm.models.architecture import check_travels
from crosslm.models.causal import check_causal
from crosslm.models.pretrained import check_spec, untrained_state
from crosslm.models.sources import PREFIX, check_model, model_folder
from crosslm.models.tokens import check_room, load_tokenizer, verbalizer_ids
from crosslm.models.vocabulary import cached_trim, tokenizer_words, trim_folder
from crosslm.privacy.accounting import check_budget
from crosslm.privacy.private_layers import check_private
from crosslm.runs.rundir import CONFIG
from crosslm.support.seeding import seed_for
from crosslm.task import Task


@dataclass(frozen=True)
class Prepared:
    """What is known before a model is loaded."""

    split: Split
    specs: dict[str, SLMSpec]
    perplexity_text: str | None
    llm_folder: str
    public: Examples


def prepare(config: Config, cache: Path, on_news: Callable[[str], None]) -> Prepared:
    """Read the data and find every model, so that whatever is wrong is found before one is loaded.

    Raises:
        CrosslmError: something is wrong.
    """
    split = load_split(config)
    for client_id, rows in split.private.items():
        uploads, who = config.federation.participations, f"client {client_id}"
        if doubt := check_budget(len(rows), config.slm.private, config.privacy, uploads, who):
            split.warnings.append(doubt)
    specs = client_specs(config, list(split.private))
    check_models(config, specs)
    perplexity_text = perplexity_text_of(config)
    public = public_texts(config, split.warnings.append)
    intake, travels = Intake(config.task.labels, config.intake), set[SLMSpec]()
    for client_id, spec in specs.items():
        folder, who = model_folder(spec.model, cache, on_news), f"client {client_id}"
        check_slm(folder, spec, config.privacy, who)
        if spec not in travels:  # one of many tokens takes a second, and many clients may have it
            check_upload(folder, spec, config.slm.max_length, intake, who)
            travels.add(spec)
    llm_folder = original_llm(config, cache, on_news)
    return Prepared(split, specs, perplexity_text, llm_folder, public)


def public_texts(config: Config, warn: Callable[[str], None] = lambda _: None) -> Examples:
    """The rows of ``gate.public_texts``; none where no file is named. ``warn`` is told of rows that were left out.

    Raises:
        DataError: the file is not there, or cannot be used.
    """
    if not config.gate.public_texts:
        return Examples([], [])
    loaded = load_examples(config.gate.public_texts, config.data, config.task.labels, "gate.public_texts")
    for line in loaded.warnings():
        warn(line)
    return loaded.examples


def check_same(config: Config, folder: Path, changeable: Collection[str] = (), hint: str = "") -> None:
    """Find out that a run folder is one of this configuration.

    Args:
        config: that is to be gone on with.
        folder: of the run.
        changeable: sections, and ``section.key``, that may differ.
        hint: what to do otherwise, if it is not to choose another ``--output``.

    Raises:
        RunError: it is not; names what differs.
    """
    own = load(folder / CONFIG).model_dump()
    different = [
        f"{section}.{name}" if isinstance(value, dict) else section
        for section, value in config.model_dump().items()
        for name in (value if isinstance(value, dict) else [section])
        if (value[name] if isinstance(value, dict) else value)
        != (own[section][name] if isinstance(value, dict) else own[section])
    ]
    different = [name for name in different if name not in changeable and name.partition(".")[0] not in changeable]
    if different:
        raise RunError(
            f"{folder}: its run has another configuration (different: {', '.join(different)}); "
            + (hint or f"go on with {folder / CONFIG}, or choose another --output")
        )


def client_specs(config: Config, client_ids: list[str]) -> dict[str, SLMSpec]:
    """Each client's architecture: its own, or one of ``slm.models`` drawn from the seed (section 5.1)."""
    own = {client.id: client for client in config.clients}
    specs = {}
    for client_id in client_ids:
        client = own.get(client_id)
        if client is not None and client.model is not None:
            specs[client_id] = SLMSpec(
                model=client.model, num_hidden_layers=client.num_hidden_layers, pooling=client.pooling
            )
        else:
            draw = seed_for(config.seed, "architecture", client_id) % len(config.slm.models)
            specs[client_id] = config.slm.models[draw]
    return specs


def class_report(examples: Examples, config: Config) -> str:
    """How many rows of each label a client has, in words."""
    labels = config.task.labels
    counts = zip(labels, examples.class_counts(len(labels)), strict=True)
    return f"{len(examples)} rows (" + ", ".join(f"{label} {count}" for label, count in counts) + ")"


def describe_spec(spec: SLMSpec) -> str:
    """An architecture in words."""
    layers = f", lowest {spec.num_hidden_layers} layers" if spec.num_hidden_layers else ""
    return spec.model + layers + (", mean of its tokens" if spec.pooling else "")


def check_slm(folder: str, spec: SLMSpec, privacy: PrivacyConfig, who: str) -> None:
    """Find out that a client's model can be trained as is asked, and can travel, without loading its weights.

    Args:
        folder: of the model.
        spec: the architecture that is made of it.
        privacy: whether it is trained by DP-SGD, and how.
        who: trains it.

    Raises:
        ModelError: it is not so.
    """
    check_spec(folder, spec, who)
    check_travels(folder, who)
    if privacy.epsilon:
        check_private(folder, privacy, who)


def check_upload(
    folder: str, spec: SLMSpec, max_length: int, intake: Intake, who: str, dtype: torch.dtype = torch.float32
) -> None:
    """Find out that uploads of a client's model will pass the server's checks, without loading its weights.

    Args:
        folder: of the model.
        spec: the architecture that is made of it.
        max_length: tokens of a text that are read.
        intake: the checks.
        who: uploads it.
        dtype: in which weights travel.

    Raises:
        ModelError: it cannot be loaded, or would be refused after it was trained.
    """
    state = untrained_state(folder, spec, intake.labels, max_length).in_dtype(dtype)
    intake.untrained(state, f"{who}: SLM {folder!r}")


def check_models(config: Config, specs: dict[str, SLMSpec]) -> None:
    """Find out that every model can be had, before any is loaded.

    Raises:
        ModelError: one is not there.
    """
    check_model(config.llm.model, "llm.model")
    check_model(config.selection.encoder, "selection.encoder")
    for spec in config.slm.models:
        check_model(spec.model, "slm.models")
    for client_id, spec in specs.items():
        check_model(spec.model, f"clients.{client_id}.model")


def original_llm(config: Config, cache: Path, on_news: Callable[[str], None]) -> str:
    """Folder or hub id of theta_old: ``llm.model``, trimmed if ``llm.vocabulary_texts`` are named.

    Raises:
        CrosslmError: a text is not there, or the model is not, the task's words do not fit it (:func:`check_words`), or
            its vocabulary cannot be trimmed.
    """
    texts = kept_texts(config, cache, on_news)
    folder = model_folder(config.llm.model, cache, on_news)
    check_causal(folder, config.llm.model)
    if texts:
        if not trim_folder(folder, texts, cache).is_dir():
            check_words(config, folder)  # trimming takes half a minute, and leaves the task's words whole
        try:
            folder = cached_trim(folder, texts, cache, on_news)
        except ModelError as error:
            raise ModelError(f"{error}\nSet llm.vocabulary_texts = [] to keep the whole vocabulary.") from error
    check_words(config, folder)
    return folder


def kept_texts(config: Config, cache: Path, on_news: Callable[[str], None]) -> list[str]:
    """What the LLM's vocabulary is trimmed to: the task's words and ``llm.vocabulary_texts``; nothing keeps it whole.

    Raises:
        CrosslmError: a text is not there.
    """
    texts: list[str] = []
    for name in config.llm.vocabulary_texts:
        if name.startswith(PREFIX):
            check_model(name, "llm.vocabulary_texts")
            texts += tokenizer_words(model_folder(name, cache, on_news))
        else:
            texts += readable_lines(
                find_file(name, config.data, "llm.vocabulary_texts"), lambda line: on_news(f"warning: {line}")
            )
    return [*task_texts(Task.from_config(config.task)), *texts] if texts else []


def task_texts(task: Task) -> list[str]:
    """What the LLM is told for any text: its tokens must stay whole when a vocabulary is trimmed."""
    x = "text"
    stated = [
        task.stated(x, label, paraphrase)
        for label, statements in enumerate(task.statements)
        for paraphrase in range(len(statements))
    ]
    queries = [f"{task.query(x)} {words}" for words in task.verbalizers]
    return [*(prompt for prompts in task.prompts for prompt in prompts), *stated, *queries]


def check_words(config: Config, folder: str) -> None:
    """Find out that the LLM can tell the labels apart by their words, and has room for the texts that it is to write.

    Args:
        config: of the run.
        folder: of the original LLM.

    Raises:
        ConfigError: it cannot, or has not.
    """
    tokenizer, task = load_tokenizer(folder, config.llm.model), Task.from_config(config.task)
    verbalizer_ids(tokenizer, task)
    check_room(folder, tokenizer, task, config.synthesis.max_new_tokens)


def perplexity_text_of(config: Config) -> str | None:
    """The text of ``evaluation.perplexity_text``, if one is named.

    Raises:
        DataError: the file is not there, has no text, or is not UTF-8.
    """
    if config.evaluation.perplexity_text is None:
        return None
    return whole_text(find_file(config.evaluation.perplexity_text, config.data, "evaluation.perplexity_text"))


def measured_on(config: Config) -> tuple[Examples | None, str | None]:
    """The test rows, and the text whose perplexity is measured: each None where the server has no such file.

    Raises:
        DataError: a file is there and cannot be used.
    """
    return test_rows(config, lambda _: None), measured_text(config)


def measured_text(config: Config) -> str | None:
    """The text whose perplexity is measured; None where the server has no such file.

    Raises:
        DataError: it is there and cannot be used.
    """
    name = config.evaluation.perplexity_text
    return perplexity_text_of(config) if name and is_there(name, config.data) else None
