"""Step 3: the LLM writes labelled text from label prompts (CrossLM, section 4.2, Eq. 2 and 3)."""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from crosslm.config import SynthesisConfig
from crosslm.errors import CollapseError
from crosslm.models.llm import LLM
from crosslm.records import SyntheticSet, SyntheticText
from crosslm.support.seeding import seed_for
from crosslm.task import Task

SPARE = 12
"""So many texts of a label have one text more written beside them, in place of one that has to be removed."""
FEWEST_CANDIDATES, MOST_CANDIDATES = 2, 8
"""Texts that are written for one that is missing: a batch of few rows hardly takes longer than one of a single row."""
ECHO = 4
"""Words that a prompt has at least if a text with all of them in it is its echo: one on sports may say "sports"."""
SENTENCE_END = re.compile(r"[.!?؟۔।॥]['\")\]]*(?=\s|$)|[。！？]['\")\]」』”’）]*")
"""Where a sentence ends: before white space, in Chinese and Japanese without it."""


def draw_labels(count: int, num_classes: int, seed: int) -> list[int]:
    """Labels to write texts for, Eq. 2: ``y ~ U(y_1, ..., y_c)``, independently."""
    labels: list[int] = np.random.default_rng(seed).integers(num_classes, size=count).tolist()
    return labels


def clean(raw: str, finished: bool, stop: Sequence[str]) -> str:
    """The text x in what was sampled: up to the first stop string, white space collapsed.

    A text that reached the maximum length (``finished`` is false) is cut after its last sentence
    end, and nothing is left of it if there is none.
    """
    text = raw
    for string in stop:
        text = text.split(string, 1)[0]
    if not finished:
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    return " ".join(text.split())


def tokens_of(text: str, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[int, ...]:
    """The tokens that x is made of, where a text that reached the maximum length was cut.

    With them Eq. 5 and 8 are about the x that the SLM has judged.

    Args:
        text: what :func:`clean` left of it.
        tokens: all that was sampled.
        decode: from tokens to text.
    """
    for count in range(1, len(tokens)):
        if " ".join(decode(tokens[:count]).split()).startswith(text):
            return tuple(tokens[:count])
    return tuple(tokens)


def removal_reason(text: str, raw: str, prompt: str, finished: bool) -> str | None:
    """Why a text cannot be used, or None.

    ``empty``: no letter or digit before it ended. ``truncated``: it reached the maximum length
    within its first sentence, so that nothing whole is left. ``echo``: it is the prompt, or repeats
    it among other words, if it is long enough (:data:`ECHO`).
    """
    if not any(character.isalnum() for character in text):
        return "truncated" if not finished and raw.strip() else "empty"
    words = " ".join(prompt.split()).strip(" \"':").lower()
    is_all = words == " ".join(text.split()).strip(" \"':").lower()
    return "echo" if is_all or (len(words.split()) >= ECHO and words in text.lower()) else None


def is_hopeless(missing: int, written: int, candidates: int, left: int) -> bool:
    """Whether texts would be missing after all attempts, so that the rest of them, which may take an hour, are saved.

    Args:
        missing: texts that have not been written yet.
        written: texts that the last attempt brought.
        candidates: rows of that attempt that were looked at: those of a label of which there are enough are not.
        left: candidates that each missing text may have in the attempts that are left.

    Returns:
        True if at least one text is expected to be missing in the end, even at the highest rate that 95 % of
        confidence allow a process that has given nothing, 3 in so many (Hanley and Lippman-Hand 1983), and ``written``
        more.
    """
    rate = min(1.0, (written + 3) / candidates)
    return missing * (1 - rate) ** left >= 1


def spares(labels: Sequence[int], room: int) -> list[int]:
    """Labels to write texts for beyond those that are wanted: one of each label, and one for each :data:`SPARE` texts.

    One that is missing costs another batch, and each batch takes as long as its longest text.

    Args:
        labels: of the texts that are wanted.
        room: rows that the last batch has left; there are no more spares than that.
    """
    more = [(turn, label) for label, texts in Counter(labels).items() for turn in range(1 + texts // SPARE)]
    return [label for _, label in sorted(more)][:room]  # in turns, so that little room is not for one label alone


def candidates(found: int, looked_at: int) -> int:
    """How many texts to write for each one that is missing: so many that one of them is expected to be used.

    Never fewer than :data:`FEWEST_CANDIDATES` or more than :data:`MOST_CANDIDATES`.

    Args:
        found: texts of this label that the last attempt brought.
        looked_at: those that it brought or removed.
    """
    if not found:
        return MOST_CANDIDATES
    return min(MOST_CANDIDATES, max(FEWEST_CANDIDATES, math.ceil(looked_at / found)))


class _Written:
    """Counts tokens and finished texts, and tells of the texts while a batch is being written.

    Whether a text is used is known at the end of its batch. Until then every row that has ended counts as its
    part of one, and what turns out not to count is taken back.
    """

    def __init__(self, on_text: Callable[[float], None]) -> None:
        self._on_text = on_text
        self._told = self._before = 0
        self._rows = self._texts = 1
        self.tokens = 0

    def begin(self, rows: int, texts: int) -> None:
        """A batch of so many rows, which are to bring so many texts."""
        self._rows, self._texts, self._before = rows, texts, self._told

    def step(self, tokens: int) -> None:
        """One token was sampled for each row that had not ended."""
        self.tokens += tokens
        self.finished(self._before + (self._rows - tokens) * self._texts // self._rows)

    def finished(self, texts: int) -> None:
        """So many texts are finished in all."""
        if texts != self._told:
            self._on_text(texts - self._told)
            self._told = texts


def synthesize(
    llm: LLM,
    task: Task,
    sampling: SynthesisConfig,
    count: int,
    seed: int,
    on_text: Callable[[float], None] = lambda _: None,
) -> SyntheticSet:
    """D^s of section 4.2: ``count`` texts with labels drawn by Eq. 2, each sampled by Eq. 3.

    A text that has to be removed makes room for the next one of the same label, so that the labels stay
    uniform; removed texts are counted by reason. Where the last batch has room a few more are written than are wanted,
    for such places; what is still missing is written after them.

    Args:
        llm: the model that writes.
        task: labels and prompts; a paraphrase is drawn uniformly for each text.
        sampling: decoding, stop strings and the number of attempts.
        count: texts wanted.
        seed: everything random follows from it.
        on_text: told how many more texts are finished, while they are being written; fewer than none where texts
            that had ended cannot be used.

    Raises:
        CollapseError: some texts could not be written in ``sampling.max_attempts`` attempts, or so few were in one
            that they could not be in all.
    """
    removed: Counter[str] = Counter()
    progress = _Written(on_text)

    labels = draw_labels(count, len(task.labels), seed_for(seed, "labels"))
    places = [deque(place for place in range(count) if labels[place] == label) for label in range(len(task.labels))]
    samples: dict[int, SyntheticText] = {}
    rows = labels + spares(labels, -count % sampling.batch_size)
    for attempt in range(sampling.max_attempts):
        found: Counter[int] = Counter()
        looked_at: Counter[int] = Counter()
        for start in range(0, len(rows), sampling.batch_size):
            batch = [label for label in rows[start : start + sampling.batch_size] if places[label]]
            if not batch:
                continue
            seeds = [seed_for(seed, "text", attempt, start + row) for row in range(len(batch))]
            progress.begin(len(batch), (count - len(samples)) * len(batch) // (len(rows) - start))
            for label, text in zip(batch, _write(llm, task, sampling, batch, seeds, progress.step), strict=True):
                if not places[label]:
                    continue  # there are enough of this label
                looked_at[label] += 1
                if isinstance(text, SyntheticText):
                    samples[places[label].popleft()] = text
                    found[label] += 1
                else:
                    removed[text] += 1
            progress.finished(len(samples))
        missing, left = count - len(samples), MOST_CANDIDATES * (sampling.max_attempts - 1 - attempt)
        if not missing or (attempt and is_hopeless(missing, found.total(), looked_at.total(), left)):
            break
        next_is_last = attempt + 2 == sampling.max_attempts
        many = [
            MOST_CANDIDATES if next_is_last else candidates(found[label], looked_at[label])
            for label in range(len(places))
        ]
        rows = [label for label, free in enumerate(places) for _ in range(len(free) * many[label])]
    if len(samples) < count:
        raise CollapseError(
            f"{count - len(samples)} of {count} texts could not be written in {attempt + 1} attempts "
            f"(removed: {dict(removed)}); look at task.prompt and synthesis.stop, or raise synthesis.max_new_tokens"
        )
    return SyntheticSet([samples[place] for place in range(count)], dict(removed), progress.tokens)


def _write(
    llm: LLM,
    task: Task,
    sampling: SynthesisConfig,
    labels: Sequence[int],
    seeds: Sequence[int],
    on_tokens: Callable[[int], None],
) -> list[SyntheticText | str]:
    """One batch: for each label and seed a text, or why it cannot be used."""

    def decode(tokens: Sequence[int]) -> str:
        return str(llm.tokenizer.decode(tokens, skip_special_tokens=True))

    prompts = [_draw_prompt(task, label, seed) for label, seed in zip(labels, seeds, strict=True)]
    encoded = [tuple(llm.encode(prompt)) for prompt in prompts]
    written: list[SyntheticText | str] = []
    for row, tokens in enumerate(llm.generate(encoded, seeds, sampling, on_tokens)):
        raw, prompt = decode(tokens), prompts[row]
        whole = str(llm.tokenizer.decode(tokens))  # a stop string may be a special token, which x is read without
        finished = tokens[-1] in llm.end_ids or any(stop in raw or stop in whole for stop in sampling.stop)
        text = clean(raw, finished, sampling.stop)
        if reason := removal_reason(text, raw, prompt, finished):
            written.append(reason)
            continue
        ids = tuple(tokens) if finished else tokens_of(text, tokens, decode)
        written.append(SyntheticText(text, labels[row], prompt, encoded[row], ids, seeds[row]))
    return written


def _draw_prompt(task: Task, label: int, text_seed: int) -> str:
    """One of the label's prompts, each equally likely."""
    return task.prompt(label, seed_for(text_seed, "paraphrase") % len(task.prompts[label]))
