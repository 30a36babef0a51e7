"""What would stop a run, or make it disappoint, found before it starts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerBase

from crosslm.config import Config, PrivacyConfig, SLMSpec
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.data.texts import find_file
from crosslm.errors import CrosslmError
from crosslm.federation.intake import Intake
from crosslm.models.causal import check_causal
from crosslm.models.sources import PREFIX, check_model, model_folder, resolve_device
from crosslm.models.tokens import check_room, load_tokenizer, verbalizer_ids
from crosslm.models.vocabulary import trim_folder, trimmable_tokenizer, trimmed_tokenizer
from crosslm.preflight import machine, rows
from crosslm.preflight.machine import Finding
from crosslm.preflight.memory import Shape, available, estimate, in_gib
from crosslm.privacy.accounting import require_opacus
from crosslm.runs.preparation import (
    check_slm,
    check_upload,
    client_specs,
    describe_spec,
    kept_texts,
)
from crosslm.runs.tracking import wanted
from crosslm.task import Task

TESTED_LLMS = ("gpt2", "llama", "gemma3_text")  # model types of transformers
SMALLER = {
    "writing texts": "lower synthesis.batch_size",
    "updating the LLM": "lower llm.micro_batch_size",
    "classifiers": "lower slm.max_length, or batch_size in slm.private and slm.synthetic",
}
"""What needs less memory, by the part that needs it."""


def examine(
    source: str | None,
    overrides: tuple[str, ...],
    data_dir: str | None,
    cache: Path,
    on_news: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Look at the machine and, with a configuration, at its models and data.

    Models are made ready (a package's weights are converted, once), but none is loaded. Each finding
    comes as soon as it is made.

    Args:
        source: path or name of a configuration, or None.
        overrides: values over it, as of ``--set``.
        data_dir: replaces ``data.dir``.
        cache: where converted models are kept.
        on_news: told before something takes long.
    """
    yield machine.python()
    yield from machine.packages()
    yield machine.disk(cache, "cache folder", is_needed=False)
    if source is None:
        yield machine.device("auto")
        yield Finding("ok", "configuration", "none given; crosslm doctor CONFIG looks at models and data too")
        return
    try:
        config = load(source, overrides, data_dir)
    except CrosslmError as error:
        yield from (Finding("error", "configuration", line) for line in str(error).splitlines())
        return
    yield Finding("ok", "configuration", f"{source}: task {config.name}, labels {', '.join(config.task.labels)}")
    yield machine.disk(Path.cwd(), "folder that runs are written to")
    there = machine.device(config.device)
    yield there
    yield from trackers(config)
    yield from private(config.privacy)
    private_rows: dict[str, Examples] = {}
    silos = list(rows.data(config, private_rows))
    yield from (finding for finding, _ in silos)
    clients = [name for _, name in silos if name]
    yield from models(config, clients, private_rows, cache, on_news, memory_too=there.level != "error")


def trackers(config: Config) -> Iterator[Finding]:
    """Whether the trackers are there that the configuration asks for."""
    try:
        if asked := wanted(config):
            yield Finding("ok", "tracking", ", ".join(asked))
    except CrosslmError as error:
        yield Finding("error", "tracking", str(error))


def private(privacy: PrivacyConfig) -> Iterator[Finding]:
    """Whether Opacus is there, if a client is to train with differential privacy."""
    if not privacy.epsilon:
        return
    try:
        require_opacus()
    except CrosslmError as error:
        yield Finding("error", "privacy.epsilon", str(error))
    else:
        yield Finding("ok", "privacy.epsilon", f"{privacy.epsilon:g}, by DP-SGD at the client")
    if privacy.trained_layers is None:
        message = (
            "not set: of some hundred rows whole classifiers learn little under the noise; set it to 0, the head alone"
        )
        yield Finding("warning", "privacy.trained_layers", f"{message}, as docs/privacy.md has it")


def models(
    config: Config,
    clients: list[str],
    private_rows: Mapping[str, Examples],
    cache: Path,
    on_news: Callable[[str], None],
    memory_too: bool,
) -> Iterator[Finding]:
    """Whether every model is there and reads what it is to, the labels' words can be told apart, and memory will do."""
    named = {"llm.model": config.llm.model, "selection.encoder": config.selection.encoder}
    named |= {f"slm.models.{place}": spec.model for place, spec in enumerate(config.slm.models)}
    named |= {f"clients.{client.id}.model": client.model for client in config.clients if client.model}
    folders: dict[str, str] = {}
    yield from find_models(named, folders, cache, on_news)
    yield from vocabulary_texts(config)
    if config.llm.model in folders:
        texts = [text for examples in private_rows.values() for text in examples.texts[: rows.LOOKED_AT]]
        yield from language_model(config, folders[config.llm.model], texts, cache)
    if config.selection.encoder in folders:
        yield from sentence_encoder(folders[config.selection.encoder])
    specs = {client: spec for client, spec in client_specs(config, clients).items() if spec.model in folders}
    intake, travels = Intake(config.task.labels, config.intake), set[SLMSpec]()
    for client, spec in specs.items():
        try:
            who = f"client {client}"
            check_slm(folders[spec.model], spec, config.privacy, who)
            if spec not in travels:
                check_upload(folders[spec.model], spec, config.slm.max_length, intake, who)
                travels.add(spec)
        except CrosslmError as error:
            yield Finding("error", "model", str(error))
        else:
            yield Finding("ok", f"client {client}", f"trains {describe_spec(spec)}")
            if client in private_rows:
                yield from rows.reading(who, folders[spec.model], config.slm.max_length, private_rows[client].texts)
    if memory_too and specs and set(folders) == set(named.values()):
        slms = [folders[spec.model] for spec in specs.values()]
        yield memory(config, folders[config.llm.model], slms, folders[config.selection.encoder])


def vocabulary_texts(config: Config) -> Iterator[Finding]:
    """Which texts that the LLM's vocabulary is trimmed to are not there."""
    key = "llm.vocabulary_texts"
    for name in config.llm.vocabulary_texts:
        try:
            check_model(name, key) if name.startswith(PREFIX) else find_file(name, config.data, key)
        except CrosslmError as error:
            yield Finding("error", key, str(error))


def find_models(
    named: Mapping[str, str], folders: dict[str, str], cache: Path, on_news: Callable[[str], None]
) -> Iterator[Finding]:
    """Whether these models are there.

    Args:
        named: by the key of the configuration.
        folders: gets the folder of each that is there, by name.
        cache: where converted models are kept.
        on_news: told before something takes long.
    """
    for key, name in named.items():
        try:
            check_model(name, key)
            folders[name] = folders.get(name) or model_folder(name, cache, on_news)
        except CrosslmError as error:
            yield Finding("error", "model", str(error))
            continue
        yield Finding("ok", "model", f"{key} = {name}")


def language_model(config: Config, folder: str, texts: Sequence[str], cache: Path) -> Iterator[Finding]:
    """Whether the LLM is of a kind that crosslm can use, and its vocabulary can be trimmed where that is asked for.

    And whether its tokenizer tells the labels' words apart by their first tokens, prompts leave room, and it was made
    for the language of the rows.

    Args:
        config: of the run.
        folder: of the LLM.
        texts: of rows, if any are there.
        cache: where trimmed models are kept.
    """
    task = Task.from_config(config.task)
    try:
        check_causal(folder, config.llm.model)
        whole = trimmable_tokenizer(folder) if config.llm.vocabulary_texts else None
    except CrosslmError as error:
        yield Finding("error", "llm.model", str(error))
        return
    try:
        tokenizer, description = whole or (load_tokenizer(folder, config.llm.model), {})
        yield Finding("ok", "tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens")
        found = verbalizer_ids(tokenizer, task)
        check_room(folder, tokenizer, task, config.synthesis.max_new_tokens)
    except CrosslmError as error:
        yield Finding("error", "verbalizers", str(error))
        return
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind not in TESTED_LLMS:
        yield Finding("warning", "llm.model", f"models of type {kind} have not been tested; watch the first run")
    firsts = [f"{label} {tokenizer.decode([ids[0]])!r}" for label, ids in zip(task.labels, found, strict=True)]
    yield Finding("ok", "verbalizers", f"told apart by their first tokens: {', '.join(firsts)}")
    several = [label for label, ids in zip(task.labels, found, strict=True) if len(ids) > 1]
    if several:
        message = f"several tokens for {', '.join(several)}: classification by the LLM takes a pass for each label"
        yield Finding("warning", "verbalizers", f"{message}; a shorter word is faster")
    yield from language(config, folder, tokenizer, description, texts, cache)


def language(
    config: Config,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    description: dict[str, Any],
    texts: Sequence[str],
    cache: Path,
) -> Iterator[Finding]:
    """Whether the LLM was made for the language of texts, and still knows it when its vocabulary is trimmed.

    Args:
        config: of the run.
        folder: of the LLM.
        tokenizer: of the LLM, whole.
        description: of it, if it is to be trimmed.
        texts: in the language; nothing is said without any.
        cache: where trimmed models are kept.
    """
    if not texts:
        return
    whole = used = partial(_tokens, tokenizer)
    try:
        if kept := kept_texts(config, cache, lambda _: None):
            made = trim_folder(folder, kept, cache)
            if (made / "config.json").is_file():
                used = partial(_tokens, load_tokenizer(str(made), config.llm.model))
            else:
                used = partial(_tokens_trimmed, trimmed_tokenizer(tokenizer, description, kept))
    except CrosslmError:
        return  # a text that is not there has been told
    rate = rows.tokens_a_word(used, texts)
    if rate >= rows.MANY_TOKENS:
        yield rows.writing(config, rate, rows.tokens_a_word(whole, texts))


def _tokens_trimmed(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def sentence_encoder(folder: str) -> Iterator[Finding]:
    """Whether the model whose vectors tell how much texts differ reads several at once, if it is of the usual kind."""
    modules = Path(folder) / "modules.json"
    try:
        parts = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else [{"type": "Transformer"}]
        if not any(part["type"].endswith("Transformer") and not part.get("path") for part in parts):
            return  # a table of words, say, or one whose tokenizer is in a folder of its own
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding("error", "selection.encoder", f"{modules}: cannot be read: {error}; name another model")
        return
    try:
        tokenizer = load_tokenizer(folder, folder, "selection.encoder")
    except CrosslmError as error:
        yield Finding("error", "selection.encoder", str(error))
    else:
        if tokenizer.pad_token is None:
            message = f"{folder}: its tokenizer cannot pad, so that it is no sentence transformer: name one"
            yield Finding("error", "selection.encoder", message)


def memory(config: Config, llm: str, slms: list[str], encoder: str) -> Finding:
    """What a run may need at its peak, against what is free.

    Args:
        config: of the run.
        llm: folder of the LLM.
        slms: folder of each client's classifier.
        encoder: folder of the sentence encoder.
    """
    try:
        shapes = {folder: Shape.of(folder, causal=False) for folder in {*slms, encoder}}
        need = estimate(config, Shape.of(llm), [shapes[folder] for folder in slms], shapes[encoder])
    except (OSError, ValueError, AttributeError) as error:
        return Finding("warning", "memory", f"no estimate: {error}; watch the first run")
    free = available(resolve_device(config.device))
    parts = ", ".join(f"{what} {in_gib(size)}" for what, size in need.parts.items())
    message = f"some {in_gib(need.total)} needed (a high estimate: {parts}), {in_gib(free)} free"
    if need.total > free:
        largest = max(need.parts, key=lambda part: need.parts[part])
        what = f"{SMALLER[largest]}, or choose" if largest in SMALLER else "choose"
        return Finding("warning", "memory", f"{message}; {what} smaller models")
    return Finding("ok", "memory", message)
