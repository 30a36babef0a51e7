"""What files of labelled rows hold, whether it is enough, and how a classifier reads it."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec

from transformers import AutoConfig

from crosslm.algorithm.overlap import words
from crosslm.config import Config, DataConfig, FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.data.split import SAMPLE, load_split, not_independent, seen_before
from crosslm.data.texts import load_examples
from crosslm.errors import CrosslmError, DataError
from crosslm.models.loading import loading
from crosslm.models.tokens import load_tokenizer
from crosslm.preflight.machine import Finding
from crosslm.privacy.accounting import check_budget
from crosslm.runs.preparation import perplexity_text_of, public_texts

FEW_ROWS = 10  # of a label; fewer teach a classifier little
FEW_TEST_ROWS = 50  # of which each is two points of accuracy
LOOKED_AT = 200  # of a client's texts, for how its classifier reads them
MANY_UNKNOWN, MANY_CUT = 0.05, 0.5  # shares of tokens and texts from which on that is told
MANY_TOKENS = 1.6  # for a word: English takes 1.0 to 1.2 of a model that knows it, other languages 1.6 to 2.5
OFF_BATCH = 0.2  # of the rows; nearer to all of them a batch is what was measured
NO_WORD = re.compile(r"[\W\d_]+")


def data(config: Config, private_rows: dict[str, Examples]) -> Iterator[tuple[Finding, str | None]]:
    """What each file holds; with a finding of a silo that can be used, its name.

    Args:
        config: of the run.
        private_rows: gets the rows of each client, if all can be read.
    """
    named: list[tuple[str, str, str, DataConfig, str | None]] = []  # a file of test rows has no client
    for silo in config.clients:
        own = config.data_of(silo)
        named.append((f"client {silo.id}", f"clients.{silo.id}.train", silo.train, own, silo.id))
        if silo.test:
            named.append((f"client {silo.id}, test", f"clients.{silo.id}.test", silo.test, own, None))
    named.append(("data.test", "data.test", str(config.data.test), config.data, None))
    failed = False
    for subject, key, name, how, client in named:
        try:
            loaded = load_examples(name, how, config.task.labels, key)
        except DataError as error:
            failed = True
            yield Finding("error", subject, str(error)), client
            continue
        yield count_rows(subject, loaded.source, loaded.examples, config.task.labels, test=client is None), client
        yield from ((Finding("warning", subject, line), None) for line in loaded.warnings())
    if failed:
        return
    try:
        split = load_split(config)
        perplexity_text_of(config)
        public_texts(config)
    except DataError as error:
        yield Finding("error", "data", str(error)), None
        return
    private_rows |= split.private
    trained = {f"client {client}": rows for client, rows in split.private.items()} | {"the judge": split.judge}
    doubts = [*seen_before(split.tests, split.test, trained), *not_independent(config, split.judge, split.private)]
    yield from ((Finding("warning", "data", line), None) for line in doubts)
    for client, examples in split.private.items():
        uploads, who = config.federation.participations, f"client {client}"
        found = budget(len(examples), config.slm.private, config.privacy, uploads, who)
        yield from ((finding, None) for finding in found)
    if not config.clients:
        for client, examples in split.private.items():
            yield count_rows(f"client {client}", str(config.data.train), examples, config.task.labels), client
    if not len(split.judge):
        message = "no rows for an independent judge: what the LLM writes is judged by the clients' SLMs alone; "
        yield Finding("warning", "data.judge", message + "name labelled text that no client has"), None


def count_rows(subject: str, source: str, examples: Examples, labels: Sequence[str], test: bool = False) -> Finding:
    """How many rows of each label, and whether that is enough."""
    counts = dict(zip(labels, examples.class_counts(len(labels)), strict=True))
    message = f"{source}: {len(examples)} rows ({', '.join(f'{label} {count}' for label, count in counts.items())})"
    none = [label for label, count in counts.items() if not count]
    if not len(examples):
        return Finding("error", subject, f"{message}; put labelled text into it")
    if any(text.startswith(SAMPLE) for text in examples.texts):
        return Finding(
            "warning", subject, f"{message}; some are sample rows of crosslm init: put your own in their place"
        )
    if len(none) == len(labels) - 1:
        return Finding("warning", subject, f"{message}; with one label only there is nothing to tell apart: add others")
    if none:
        return Finding("warning", subject, f"{message}; none of {', '.join(none)}: add some if there are any")
    if test and len(examples) < FEW_TEST_ROWS:
        return Finding(
            "warning", subject, f"{message}; one row is {100 / len(examples):.0f} points of accuracy: add more"
        )
    few = [label for label, count in counts.items() if count < FEW_ROWS]
    if few:
        return Finding("warning", subject, f"{message}; fewer than {FEW_ROWS} of {', '.join(few)}: add more")
    return Finding("ok", subject, message)


def budget(rows: int, fit: FitConfig, privacy: PrivacyConfig, uploads: int, who: str) -> Iterator[Finding]:
    """Whether a client can keep to ``privacy.epsilon``, and its batches and ``privacy.delta`` suit so many rows."""
    if privacy.epsilon and privacy.trained_layers == 0 and abs(fit.batch_size - rows) > OFF_BATCH * rows:
        yield Finding(
            "warning",
            "privacy",
            f"{who}: slm.private.batch_size = {fit.batch_size} with {rows} rows: a head alone was measured with "
            f"batches of all rows (docs/privacy.md); set it to {rows}, which between machines is "
            "fit.batch_size in silo.toml",
        )
    if privacy.epsilon and find_spec("opacus") is None:
        return  # which is said once
    try:
        doubt = check_budget(rows, fit, privacy, uploads, who)
    except CrosslmError as error:
        yield Finding("error", "privacy", str(error))
    else:
        yield from [Finding("warning", "privacy", doubt)] if doubt else []


def tokens_a_word(count: Callable[[str], int], texts: Iterable[str]) -> float:
    """How many tokens a tokenizer makes of a word: the fewer, the more of its texts' language it was made from.

    Numbers and punctuation do not count, since of these every language has as many. Where a script puts no spaces
    between words a character counts as one.

    Args:
        count: how many tokens a text has.
        texts: to be looked at.
    """
    told = [NO_WORD.sub(" ", text).strip() for text in texts]
    return sum(map(count, told)) / max(1, sum(len(words(text)) for text in told))


def writing(config: Config, rate: float, without: float) -> Finding:
    """That the LLM's tokenizer hardly knows the words of the clients' texts.

    Args:
        config: of the run.
        rate: tokens for a word with the vocabulary that it will have.
        without: with its whole vocabulary.
    """
    found, key = f"it takes {rate:.1f} tokens for a word of the rows", "llm.vocabulary_texts"
    if without < MANY_TOKENS:
        message = (
            f"{found}, and {without:.1f} with its whole vocabulary: leave {key} out, or name text of their language"
        )
        return Finding("warning", key, f"{message} there")
    trimmed = f"leave {key} out, and " if config.llm.vocabulary_texts else ""
    tokens = config.synthesis.max_new_tokens
    return Finding(
        "warning",
        "llm.model",
        f"{found}, so that it was hardly made for their language: name one that was; if there is none, {trimmed}raise "
        f"synthesis.max_new_tokens ({tokens} tokens are some {tokens / rate:.0f} words)",
    )


def reading(who: str, folder: str, max_length: int, texts: Sequence[str]) -> Iterator[Finding]:
    """Whether a classifier's tokenizer knows the words of its texts, and as such, and how many it reads to their ends.

    Args:
        who: has the texts.
        folder: of its classifier.
        max_length: tokens of a text that are read (``slm.max_length``).
        texts: of which the first few hundred are looked at.
    """
    if not texts:
        return
    texts, tokenizer = texts[:LOOKED_AT], load_tokenizer(folder, folder, who)
    with loading(f"{who}: config.json of {folder!r} cannot be read"):
        positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None) or 0
    longest = min(max_length, tokenizer.model_max_length, positions if positions > 0 else max_length)
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    unknown = sum(row.count(tokenizer.unk_token_id) for row in tokens) / max(1, sum(map(len, tokens)))
    if unknown >= MANY_UNKNOWN:
        yield Finding(
            "warning",
            who,
            f"{unknown:.0%} of the tokens of its texts are unknown to its classifier: choose one of their language",
        )
    rate = tokens_a_word(lambda text: len(tokenizer.encode(text, add_special_tokens=False)), texts)
    if unknown < MANY_UNKNOWN and rate >= MANY_TOKENS:
        yield Finding(
            "warning",
            who,
            f"its classifier takes {rate:.1f} tokens for a word of its texts, so that it was hardly made for their "
            "language: name one that was in slm.models, and in selection.encoder; if there is none, raise "
            f"slm.max_length ({longest} tokens are some {longest / rate:.0f} words)",
        )
    cut = sum(len(tokenizer.encode(text)) > longest for text in texts)
    if cut >= MANY_CUT * len(texts):
        message = f"{cut} of {len(texts)} texts are longer than the {longest} tokens that its classifier reads of each"
        yield Finding("warning", who, f"{message}: raise slm.max_length if it can read more, or put what matters first")
