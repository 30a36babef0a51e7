"""Eq. 1 by hand, and over many texts."""

import dataclasses

import pytest
import torch
from conftest import tiny_llm

from crosslm import classification
from crosslm.algorithm.verbalizer import label_probabilities
from crosslm.classification import class_probabilities
from crosslm.errors import ConfigError
from crosslm.models.tokens import check_room, load_tokenizer, read_of, verbalizer_ids


def test_eq_1_by_hand():
    # P(V(y)|M(x)) of 0.03 and 0.01: 3/4 and 1/4; of 0.2, 0.2, the same with any constant
    logps = torch.tensor([[0.03, 0.01], [0.2, 0.2]]).log()
    expected = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    torch.testing.assert_close(label_probabilities(logps), expected)
    torch.testing.assert_close(label_probabilities(logps + 7), expected)


def test_of_a_long_text_the_first_tokens_are_read(models, task, monkeypatch):
    llm = tiny_llm(models, "gpt2")
    monkeypatch.setattr(classification, "MAX_TOKENS", 3)
    start = llm.shorten("good bad good bad good", 3)
    assert len(llm.tokenizer.encode(start, add_special_tokens=False)) == 3
    long, short = (class_probabilities(llm, task, [text]) for text in ("good bad good bad good", start))
    assert long.equal(short)
    monkeypatch.setattr(classification, "MAX_TOKENS", 99)
    assert not class_probabilities(llm, task, ["good bad good bad good"]).equal(short)


def test_texts_of_like_length_are_read_together_and_each_keeps_its_place(models, task, monkeypatch):
    llm, read = tiny_llm(models, "gpt2"), []
    texts = [" ".join(["good", "bad"] * (place * 7 % 13 + 1)) for place in range(13)]
    expected = torch.cat([llm.classify([task.query(text)], verbalizer_ids(llm.tokenizer, task)) for text in texts])
    real = llm.classify
    monkeypatch.setattr(llm, "classify", lambda queries, ids: (read.append(list(queries)), real(queries, ids))[1])
    monkeypatch.setattr(classification, "CHUNK", 5)
    torch.testing.assert_close(class_probabilities(llm, task, texts), expected, atol=1e-5, rtol=1e-4)
    lengths = [len(query) for chunk in read for query in chunk]
    assert lengths == sorted(lengths)
    assert [len(chunk) for chunk in read] == [5, 5, 3]
    assert class_probabilities(llm, task, []).shape == (0, len(task.labels))


@pytest.mark.parametrize("words", [("bad", "good"), ("bad day", "good day")])
def test_a_text_is_cut_to_the_positions_that_a_long_query_leaves(models, task, words):
    llm = tiny_llm(models, "gpt2")
    asked = dataclasses.replace(task, query_template="a good film. " * 20 + "{text} This is", verbalizers=words)
    left = llm.positions - len(llm.encode(asked.query("")))
    assert 0 < left < 60
    texts = ["a good day and a bad film " * 30, "a mean room.", "déjà vu " * 60]
    found = class_probabilities(llm, asked, texts)
    assert found.isfinite().all()
    own = [llm.encode(classification._query(llm, asked, text, llm.positions)) for text in texts]
    assert llm.positions - 3 < len(own[0]) <= llm.positions
    assert max(map(len, own)) <= llm.positions
    room = llm.positions - read_of(verbalizer_ids(llm.tokenizer, asked))
    assert classification._query(llm, asked, texts[1], room) == asked.query(texts[1])


def test_a_query_that_leaves_no_room_is_told_before_a_run(models, task):
    tokenizer = load_tokenizer(str(models / "gpt2"), "gpt2")
    check_room(str(models / "gpt2"), tokenizer, task, 12)
    asked = dataclasses.replace(task, query_template="a good film. " * 60 + "{text} This is")
    with pytest.raises(ConfigError, match=r"task\.query: its \d+ tokens.* than the 128 that llm\.model"):
        check_room(str(models / "gpt2"), tokenizer, asked, 12)
