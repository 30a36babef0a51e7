"""Step 3: Eq. 2 and 3, and what is removed."""

from collections import Counter

import pytest
from conftest import tiny_llm

from crosslm.config import SynthesisConfig
from crosslm.errors import CollapseError
from crosslm.synthesis import (
    MOST_CANDIDATES,
    candidates,
    clean,
    draw_labels,
    is_hopeless,
    removal_reason,
    spares,
    synthesize,
    tokens_of,
)

SAMPLING = SynthesisConfig(max_new_tokens=12, max_attempts=100)


class Scripted:
    """An LLM whose writing is made up by a function of it, the number of rows, their seeds and who is told of them."""

    end_ids = frozenset({1})

    def __init__(self, models, write):
        self.tokenizer, self.write, self.calls, self.rows = tiny_llm(models, "gpt2").tokenizer, write, 0, 0
        self.good_day = [*self.encode("a good day"), 1]

    def encode(self, text):
        return self.tokenizer.encode(text)

    def generate(self, prompts, seeds, sampling, on_step):
        self.calls += 1
        self.rows += len(prompts)
        return self.write(self, len(prompts), seeds, on_step)


def test_eq_2_labels_are_uniform_and_follow_the_seed():
    counts = Counter(draw_labels(30_000, 3, seed=1))
    assert set(counts) == {0, 1, 2}
    assert all(abs(count - 10_000) < 400 for count in counts.values())  # five standard deviations
    assert draw_labels(50, 3, 1) == draw_labels(50, 3, 1) != draw_labels(50, 3, 2)


@pytest.mark.parametrize(
    ("raw", "finished", "expected"),
    [
        ('A good film." and more', True, "A good film."),
        ("two\nlines", True, "two"),
        ("  much   space ", True, "much space"),
        ("One sentence. Another that never", False, "One sentence."),
        ("Really?! Yes (truly.) and", False, "Really?! Yes (truly.)"),
        ("it cost 3.50 and", False, ""),
        ("no end at all", False, ""),
        ("这部电影很好。我喜欢它。后来", False, "这部电影很好。我喜欢它。"),
        ("「本当に？」と彼は", False, "「本当に？」"),
        ("यह फ़िल्म अच्छी है। और", False, "यह फ़िल्म अच्छी है।"),
        ("هل أعجبك؟ نعم", False, "هل أعجبك؟"),
    ],
)
def test_clean(raw, finished, expected):
    assert clean(raw, finished, ('"', "\n")) == expected


@pytest.mark.parametrize(
    ("text", "raw", "finished", "expected"),
    [
        ("A film.", "A film.", True, None),
        ("", '"', True, "empty"),
        ("...", '..."', True, "empty"),
        ("", "no end at all", False, "truncated"),
        ("", "   ", False, "empty"),
        ("Write a good text: yes", "Write a good text: yes", True, "echo"),
    ],
)
def test_removal_reason(text, raw, finished, expected):
    assert removal_reason(text, raw, 'Write a good text: "', finished) == expected


@pytest.mark.parametrize(
    ("prompt", "text"), [("Sports:", "Sports fans cheered."), ('A good film: "', "It was a good film.")]
)
def test_the_words_of_a_short_prompt_may_stand_in_a_text_of_its_label(prompt, text):
    assert removal_reason(text, text, prompt, True) is None
    assert removal_reason(prompt, prompt, prompt, True) == "echo"  # nothing but the prompt


def test_the_tokens_of_a_text_that_was_cut_end_where_it_ends():
    pieces = ["One", " sentence", ".", " Another", " that"]
    tokens = tokens_of("One sentence.", range(5), lambda ids: "".join(pieces[place] for place in ids))
    assert tokens == (0, 1, 2)


def test_synthesize_gives_what_was_asked_and_can_be_repeated(models, task):
    llm = tiny_llm(models, "gpt2")
    texts, cut = [], 0
    one = synthesize(llm, task, SAMPLING, 60, 7, texts.append)
    assert one == synthesize(llm, task, SAMPLING, 60, 7)
    assert one != synthesize(llm, task, SAMPLING, 60, 8)
    assert len(one.samples) == sum(texts) == 60
    assert one.labels.tolist() == draw_labels_of(one)
    assert one.tokens_generated >= sum(len(sample.completion_ids) for sample in one.samples)
    for sample in one.samples:
        assert sample.prompt in task.prompts[sample.label]
        assert sample.prompt_ids == tuple(llm.encode(sample.prompt))
        raw = llm.tokenizer.decode(sample.completion_ids, skip_special_tokens=True)
        assert "".join(raw.split()).startswith("".join(sample.text.split()))
        # the seed of a sample is enough to write it again
        (written,) = llm.generate([sample.prompt_ids], [sample.seed], SAMPLING)
        assert list(sample.completion_ids) == written[: len(sample.completion_ids)]
        if len(sample.completion_ids) == len(written):
            continue
        # what was cut off for want of an end is no part of x, and the last token of x is needed
        assert len(written) == SAMPLING.max_new_tokens
        assert " ".join(raw.split()).startswith(sample.text)
        shorter = llm.tokenizer.decode(sample.completion_ids[:-1], skip_special_tokens=True)
        assert not " ".join(shorter.split()).startswith(sample.text)
        cut += 1
    assert cut


def draw_labels_of(synthetic):
    return [sample.label for sample in synthetic.samples]


def test_paraphrases_are_drawn_uniformly(models, task):
    synthetic = synthesize(tiny_llm(models, "gpt2"), task, SAMPLING, 200, 3)
    counts = Counter(sample.prompt for sample in synthetic.samples)
    one, other = task.prompts[1]
    assert abs(counts[one] - counts[other]) < 50


def test_removed_texts_are_counted_and_written_again(models, task):
    # almost every text of an untrained model reaches the maximum length within a sentence
    synthetic = synthesize(tiny_llm(models, "gpt2"), task, SAMPLING, 20, 1)
    assert synthetic.removed["truncated"] > 0
    assert len(synthetic.samples) == 20


def test_a_stop_string_that_is_a_special_token_ends_a_whole_text(models, task):
    """As ``<|im_end|>`` of chat models, which the text is read without."""

    def write(llm, rows, seeds, on_step):
        return [[*llm.encode("a good day. and a bad"), llm.tokenizer.convert_tokens_to_ids("<bos>")]] * rows

    sampling = SAMPLING.model_copy(update={"stop": ("<bos>",)})
    synthetic = synthesize(Scripted(models, write), task, sampling, 4, 1)
    assert [sample.text for sample in synthetic.samples] == ["a good day. and a bad"] * 4
    assert not synthetic.removed
    cut = synthesize(Scripted(models, write), task, SAMPLING, 4, 1)  # without it this is a text of the greatest length
    assert [sample.text for sample in cut.samples] == ["a good day."] * 4


def test_texts_are_told_while_their_batch_is_written_and_taken_back_if_they_are_removed(models, task):
    told = []
    synthetic = synthesize(tiny_llm(models, "gpt2"), task, SAMPLING, 40, 1, told.append)  # one batch, and redraws
    assert synthetic.removed["truncated"] > 0
    assert sum(told) == 40
    shown = [sum(told[: number + 1]) for number in range(len(told))]
    assert len(told) > 5
    assert all(0 <= texts <= 40 for texts in shown)
    assert max(shown[:-1]) < 40  # what is not over is not shown as over
    assert 0 not in told


def test_the_rows_that_ended_are_the_texts_that_are_told(models, task, monkeypatch):
    def write(llm, rows, seeds, on_step):
        """Ten rows of which one ends with each token, and nothing of which is used at first."""
        for ended in range(10):
            on_step(rows - ended * rows // 10)
        return [[1] if llm.calls == 1 else llm.good_day for _ in range(rows)]

    monkeypatch.setattr("crosslm.synthesis.spares", lambda *_: [])
    told = []
    synthetic = synthesize(Scripted(models, write), task, SAMPLING, 10, 1, told.append)
    assert told == [1] * 9 + [-9] + [1] * 9 + [1]
    assert (len(synthetic.samples), synthetic.removed) == (10, {"empty": 10})
    assert synthetic.tokens_generated == sum(range(1, 11)) * 9  # ten rows, and then eight for each text


def test_a_model_that_cannot_write_ends_with_the_reasons(models, task):
    hopeless = SynthesisConfig(max_new_tokens=1, max_attempts=2, stop=(" ",))
    with pytest.raises(CollapseError, match=r"of 20 texts could not be written in 2 attempts \(removed: .*task.prompt"):
        synthesize(tiny_llm(models, "gpt2"), task, hopeless, 20, 1)


def test_a_model_that_writes_nothing_more_is_given_up(models, task):
    def write(llm, rows, seeds, on_step):
        """Two of twenty are written at once, and never another."""
        return [llm.good_day if llm.calls == 1 and row < 2 else [1] for row in range(rows)]

    llm = Scripted(models, write)
    with pytest.raises(CollapseError, match=r"18 of 20 texts could not be written in 2 attempts"):
        synthesize(llm, task, SynthesisConfig(max_attempts=10, batch_size=20), 20, 1)
    assert llm.rows == 20 + 18 * MOST_CANDIDATES


def test_a_text_that_is_removed_makes_room_for_a_spare_of_its_label(models, task):
    def write(llm, rows, seeds, on_step):
        """The first two rows are nothing."""
        return [[1] if row < 2 else llm.good_day for row in range(rows)]

    llm = Scripted(models, write)
    synthetic = synthesize(llm, task, SAMPLING, 30, 1)
    labels = draw_labels_of(synthetic)
    assert labels == draw_labels_of(
        synthesize(Scripted(models, lambda llm, rows, *_: [llm.good_day] * rows), task, SAMPLING, 30, 1)
    )
    assert (llm.calls, llm.rows, synthetic.removed) == (1, 30 + len(spares(labels, 100)), {"empty": 2})
    assert len({sample.seed for sample in synthetic.samples}) == 30


def test_the_last_of_several_batches_has_the_spares(models, task):
    def write(llm, rows, seeds, on_step):
        """The first two rows are nothing."""
        return [[1] if llm.calls == 1 and row < 2 else llm.good_day for row in range(rows)]

    llm = Scripted(models, write)
    synthetic = synthesize(llm, task, SAMPLING.model_copy(update={"batch_size": 16}), 24, 1)
    room = len(spares(draw_labels_of(synthetic), 8))
    assert (llm.calls, llm.rows, synthetic.removed) == (2, 24 + room, {"empty": 2})


def test_rows_of_a_label_of_which_there_are_enough_are_not_written(models, task):
    llm = Scripted(models, lambda llm, rows, *_: [[1] if llm.calls < 3 else llm.good_day] * rows)
    synthesize(llm, task, SAMPLING.model_copy(update={"batch_size": 10}), 20, 1)
    assert llm.calls >= 2 + 2  # twenty that are removed, and eight candidates for each in tens
    assert llm.rows <= 20 + 4 * 10


def test_one_text_that_is_missing_gets_more_candidates_when_few_have_brought_none(models, task):
    def write(llm, rows, seeds, on_step):
        """All texts of the first batch but one, and then none but the sixth of a batch."""
        return [llm.good_day if (row != 3 if llm.calls == 1 else row == 5) else [1] for row in range(rows)]

    llm = Scripted(models, write)
    synthetic = synthesize(llm, task, SAMPLING.model_copy(update={"batch_size": 20, "max_attempts": 4}), 20, 1)
    assert (llm.calls, llm.rows) == (3, 20 + 2 + MOST_CANDIDATES)
    assert len(synthetic.samples) == 20


def test_the_last_attempt_has_as_many_candidates_as_there_may_be(models, task):
    llm = Scripted(models, lambda llm, rows, *_: [llm.good_day if row != 3 else [1] for row in range(rows)])
    synthesize(llm, task, SAMPLING.model_copy(update={"batch_size": 20, "max_attempts": 2}), 20, 1)
    assert (llm.calls, llm.rows) == (2, 20 + MOST_CANDIDATES)


def test_spares_are_of_each_label_and_no_more_than_there_is_room_for():
    labels = [0] * 24 + [1] * 5
    assert spares(labels, 100) == [0, 1, 0, 0]
    assert spares(labels, 2) == [0, 1]
    assert spares(labels, 0) == []


def test_no_spares_are_written_where_they_would_be_a_batch_of_their_own(models, task):
    llm = Scripted(models, lambda llm, rows, *_: [llm.good_day] * rows)
    synthesize(llm, task, SAMPLING.model_copy(update={"batch_size": 10}), 20, 1)
    assert (llm.calls, llm.rows) == (2, 20)


@pytest.mark.parametrize(
    ("found", "looked_at", "expected"),
    [(94, 100, 2), (50, 100, 2), (45, 100, 3), (12, 100, 8), (1, 100, 8), (0, 9, 8), (0, 1, 8)],
)
def test_so_many_candidates_are_expected_to_bring_a_text(found, looked_at, expected):
    assert candidates(found, looked_at) == expected


def test_attempts_that_cannot_bring_the_missing_texts_are_hopeless():
    assert not is_hopeless(2, 1, 8, 2)  # at a rate of (1 + 3) / 8: 2 * 0.5 ** 2 = 0.5 texts
    assert is_hopeless(4, 1, 8, 2)  # 4 * 0.25 = 1
    assert not is_hopeless(1000, 6, 8, 1)  # a rate of 1, though 9 / 8 are asked for
    assert not is_hopeless(300, 400, 4000, 64)  # 300 * 0.89925 ** 64 = 0.34 texts


def test_attempts_go_on_where_they_bring_texts(models, task):
    """One candidate in eight is a text, so that each attempt brings some two thirds of what is missing."""

    def write(llm, rows, seeds, on_step):
        return [llm.good_day if llm.calls > 1 and seed % 8 == 0 else [1] for seed in seeds]

    sampling = SynthesisConfig(max_attempts=8, batch_size=100_000)
    assert len(synthesize(Scripted(models, write), task, sampling, 400, 1).samples) == 400
