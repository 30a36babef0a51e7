"""The silo's look at the texts that trained what comes back, and planted sentences."""

import dataclasses

import pytest
import torch
from conftest import BAD, GOOD, sentences
from transformers import AutoTokenizer

from crosslm.client import Client
from crosslm.config import FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.errors import LeakError, ModelError
from crosslm.federation.messages import decode_download, encode
from crosslm.models.slm import SLM
from crosslm.privacy.canaries import WORDS, draw_canaries, plant
from crosslm.privacy.leaks import LeakCheck
from crosslm.records import Download

PRIVATE = ["Mrs. Jones came in on Monday with a broken arm.", "a good day"]


class Letters:
    """Vectors of how often each letter is there."""

    def encode(self, texts):
        return torch.tensor([[float(text.lower().count(chr(97 + place))) for place in range(26)] for text in texts])


def test_a_shared_sequence_stops_the_return_and_quotes_nothing():
    check = LeakCheck(PRIVATE, PrivacyConfig(max_shared_words=3), Letters())
    check.check(["she came in on foot", "fine"])  # three words: allowed
    with pytest.raises(LeakError, match="1 of 2 synthetic texts share more than 3 words in a row") as caught:
        check.check(["fine", "Yesterday MRS JONES came in; on a horse"])
    assert "at most 5" in str(caught.value)
    with pytest.raises(LeakError, match="at most 4"):  # one word more than is allowed
        check.check(["Mrs Jones came in"])
    assert not any(word in str(caught.value) for word in ("Jones", "JONES", "horse", "arm"))


def test_a_near_neighbour_stops_the_return():
    check = LeakCheck(PRIVATE, PrivacyConfig(max_similarity=0.99), Letters())
    check.check(["zebra quiz"])
    with pytest.raises(LeakError, match=r"1 of 2 synthetic texts have a similarity above 0\.99"):
        check.check(["zebra quiz", "day good a"])


def test_texts_that_were_not_sent_cannot_be_let_pass():
    with pytest.raises(LeakError, match="no texts came with the SLM"):
        LeakCheck(PRIVATE, PrivacyConfig(max_shared_words=3), Letters()).check([])


def test_a_client_keeps_its_slm_when_the_return_is_stopped(models):
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    private = Examples(sentences(BAD)[:10] + sentences(GOOD)[:10], [0] * 10 + [1] * 10)
    leaks = LeakCheck(private.texts, PrivacyConfig(max_shared_words=4), Letters())
    client = Client("a", private, slm, FitConfig(epochs=1), 0, leaks=leaks)
    upload = client.train()
    copied = Download("a", 0, 1, {}, upload.slm, (private.texts[0],))
    with pytest.raises(LeakError):
        client.install(decode_download(encode(copied)))
    assert client.slm is slm
    client.install(decode_download(encode(dataclasses.replace(copied, texts=("a text of its own.",)))))
    assert client.slm is not slm


def test_canaries_follow_the_seed_and_are_words_of_the_vocabulary(models):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    drawn = draw_canaries(tokenizer, 2, 4, 50, seed=3)
    assert drawn == draw_canaries(tokenizer, 2, 4, 50, seed=3)
    assert drawn != draw_canaries(tokenizer, 2, 4, 50, seed=4)
    assert drawn.planted.labels == [0, 1, 0, 1]
    everything = drawn.planted.texts + drawn.others
    assert len(set(everything)) == 54
    assert {word for text in everything for word in text.split()} <= set(tokenizer.get_vocab())
    assert {len(text.split()) for text in everything} == {WORDS}
    assert tokenizer.unk_token_id not in tokenizer(everything[0])["input_ids"]


def test_the_planted_are_those_that_are_looked_for(models):
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")  # byte pairs: words carry a mark
    private = Examples(["x"], [0])
    assert plant(private, tokenizer, 2, 0, 0, "a") is private
    planted = plant(private, tokenizer, 2, 3, 0, "a")
    assert planted.texts[0] == "x"
    assert planted.labels == [0, 0, 1, 0]
    assert all(word.isalpha() for text in planted.texts[1:] for word in text.split())
    assert planted != plant(private, tokenizer, 2, 3, 0, "b")
    tokenizer.get_vocab = lambda: {"##a": 0, "abc": 1}
    with pytest.raises(ModelError, match="has 1 whole words; 12 are needed"):
        plant(private, tokenizer, 2, 1, 0, "a")
