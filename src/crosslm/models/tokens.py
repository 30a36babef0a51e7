"""Texts and verbalizers as tokens of the LLM; needs its tokenizer and not its weights."""

from collections.abc import Collection, Sequence

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from crosslm.errors import ConfigError
from crosslm.models.loading import loading
from crosslm.task import Task

MAX_TOKENS = 256  # of a text that is classified; with a short query well inside the 1,024 of GPT-2


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, after the beginning-of-sequence token where the model has one."""
    bos = tokenizer.bos_token_id
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids if bos is None else [bos, *ids]


def verbalizer_ids(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[tuple[int, ...]]:
    """Token ids of each label's verbalizer (Eq. 1): what it adds, after a space, to the query.

    Raises:
        ConfigError: a verbalizer has no token, or two start with the same one, so that the next
            word could not tell the labels apart.
    """
    prefix = task.query("x")
    before = encode(tokenizer, prefix)
    found: list[tuple[int, ...]] = []
    for label, words in zip(task.labels, task.verbalizers, strict=True):
        whole = encode(tokenizer, f"{prefix} {words}")
        joined = whole[: len(before)] == before
        ids = whole[len(before) :] if joined else tokenizer.encode(f" {words}", add_special_tokens=False)
        if not ids:
            raise ConfigError(
                f"task.verbalizer.{label}: {words!r} has no token in this LLM's vocabulary; choose another word"
            )
        for other, other_ids in zip(task.labels, found, strict=False):
            if other_ids[0] == ids[0]:
                raise ConfigError(
                    f"task.verbalizer: {label!r} ({words!r}) and {other!r} start with the same token "
                    f"{tokenizer.decode([ids[0]])!r}; choose words that differ from the first token on"
                )
        found.append(tuple(ids))
    return found


def read_of(verbalizers: Sequence[Sequence[int]]) -> int:
    """Tokens of verbalizers that are read after a query: none where each has one, since that is the next word."""
    longest = max(map(len, verbalizers))
    return longest if longest > 1 else 0


def check_room(folder: str, tokenizer: PreTrainedTokenizerBase, task: Task, new_tokens: int) -> None:
    """Find out that the LLM reads a prompt and what follows it as a whole, or a text in a statement or query.

    Args:
        folder: of the LLM.
        tokenizer: its own.
        task: the prompts (Eq. 3), statements (Eq. 7) and query (Eq. 1).
        new_tokens: of a text at most (``synthesis.max_new_tokens``).

    Raises:
        ConfigError: it reads fewer.
        ModelError: its configuration cannot be read.
    """
    with loading(f"llm.model: config.json of {folder!r} cannot be read"):
        positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    prompts = [words for paraphrases in task.prompts for words in paraphrases]
    statements = [words for paraphrases in task.statements for words in paraphrases]
    longest = max(len(encode(tokenizer, words)) for words in (*prompts, *statements))
    if positions is None:
        return
    if longest + new_tokens > positions:
        raise ConfigError(
            f"synthesis.max_new_tokens: {new_tokens} tokens of a text and {longest} of the longest prompt or statement "
            f"are more than the {positions} that llm.model reads; at most {positions - longest} are possible"
        )
    asked = len(encode(tokenizer, task.query(""))) + read_of(verbalizer_ids(tokenizer, task))
    if asked + min(new_tokens, MAX_TOKENS) > positions:  # texts of the LLM's own are read as a whole
        raise ConfigError(
            f"task.query: its {asked} tokens, the longest verbalizer's among them, and {min(new_tokens, MAX_TOKENS)} "
            f"of a text (synthesis.max_new_tokens) are more than the {positions} that llm.model reads; "
            "make the query shorter"
        )


class TextEnd:
    """Whether a text is complete: its last token is an end-of-sequence token or has completed a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int | None], stop: Sequence[str]) -> None:
        """What ends a text; a stop string is looked for in its last tokens."""
        self._tokenizer, self._ends, self._stop = tokenizer, ends, stop
        # a token may be of one byte, and a character that begins before the first of them is decoded otherwise
        self._window = max((len(string.encode()) for string in stop), default=0) + 7
        self._last = {string[-1] for string in stop}
        # a character of several bytes can be of several tokens, and a token alone is decoded without its space
        self._by_one_token = all(character.isascii() and character != " " for character in self._last)
        self._completes: dict[int, bool] = {}

    def __call__(self, tokens: list[int]) -> bool:
        """Look at what was sampled so far; to be asked after each token."""
        if tokens[-1] in self._ends:
            return True
        if not self._can_complete(tokens[-1]):
            return False
        tail = self._tokenizer.decode(tokens[-self._window :])
        return any(string in tail for string in self._stop)

    def _can_complete(self, token: int) -> bool:
        """Whether a stop string's last character is in this token; decoding several for each text takes longer."""
        if not self._by_one_token:
            return True
        if token not in self._completes:
            self._completes[token] = not self._last.isdisjoint(self._tokenizer.decode([token]))
        return self._completes[token]


def distinct_tokens(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Which tokens a head must score: a prompt that begins many texts has the same hidden states in each of them.

    Args:
        sequences: tokens; the first of each is given and not counted.

    Returns:
        The places of tokens with something new before them or in them, counted through all sequences, and for each
        token which of these has its score.
    """
    known: dict[tuple[int, int], int] = {}
    places: list[int] = []
    which: list[int] = []
    for sequence in sequences:
        before = -1 - sequence[0]  # no place of a token
        for token in sequence[1:]:
            before = known.setdefault((before, token), len(places))
            if before == len(places):
                places.append(len(which))
            which.append(before)
    return places, which


def load_tokenizer(folder: str, name: str, key: str = "llm.model") -> PreTrainedTokenizerBase:
    """A model's tokenizer alone: the LLM's is enough to check a task.

    Raises:
        ModelError: there is none.
    """
    with loading(f"{key} {name!r}: its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
