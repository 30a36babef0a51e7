"""The attacks' figures, by hand."""

import math
import tracemalloc
import unicodedata

import pytest
import torch

from crosslm.algorithm.membership import (
    auc,
    bootstrap_interval,
    confidence_logit,
    exposure,
    lira_scores,
    tpr_at_fpr,
)
from crosslm.algorithm.overlap import longest_shared, nearest_similarity, words


def test_auc_by_hand():
    # pairs (member, other): 3>1, 3>2, 2>1, 2=2 -> (1 + 1 + 1 + 1/2) / 4
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert auc(torch.tensor([1.0]), torch.tensor([2.0])) == 0
    same = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert auc(same, same) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="are needed"):
        auc(torch.tensor([]), same)


def test_tpr_at_a_false_positive_rate_by_hand():
    others = torch.arange(100.0)
    # one of a hundred others may be above: the threshold is the second highest, 98
    assert tpr_at_fpr(torch.tensor([97.0, 98.0, 98.5, 200.0]), others, 0.01) == 0.5
    # of fifty, none: the threshold is the highest, 49
    assert tpr_at_fpr(torch.tensor([49.0, 49.5]), torch.arange(50.0), 0.01) == 0.5


def test_a_bootstrap_interval_covers_what_is_true():
    """The AUC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = 0.7602."""
    covered = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        members, others = torch.randn(80, generator=generator) + 1, torch.randn(80, generator=generator)
        low, high = bootstrap_interval(auc, members, others, seed, resamples=200)
        assert low < auc(members, others) < high
        covered += low < 0.7602 < high
    assert covered >= 17


def test_confidence_logit_by_hand():
    assert confidence_logit(torch.tensor([0.5, 0.8])).tolist() == pytest.approx([0.0, math.log(4)], abs=1e-6)
    assert confidence_logit(torch.tensor([0.0, 1.0])).isfinite().all()


def test_lira_by_hand():
    """Two rows, four shadows; in: means 3 and 1, out: means 0 and 0; all variances 1/2 * (1 + 1 + 0 + 0) = 1."""
    shadows = torch.tensor([[4.0, 1.0], [2.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    inside = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    scores = lira_scores(torch.tensor([3.0, 0.0], dtype=torch.float64), shadows, inside)
    assert scores.tolist() == pytest.approx([0 + 9 / 2, -1 / 2 + 0])
    with pytest.raises(ValueError, match="inside some shadow models and outside others"):
        lira_scores(torch.zeros(2), shadows, torch.ones_like(inside))


def test_exposure_by_hand():
    candidates = torch.arange(7.0)
    assert exposure(-1.0, candidates) == 3  # first of eight
    assert exposure(10.0, candidates) == 0  # last
    assert exposure(0.0, candidates) == 2  # a tie is lost: second
    drawn = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    assert float(torch.tensor([exposure(float(loss), drawn[:1000]) for loss in drawn[1000:]]).mean()) == pytest.approx(
        1 / math.log(2), rel=0.05
    )


CHINESE = "患者于星期一上午因右臂骨折入院治疗三天后病情好转准予出院"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("患者A先生：B12。", ["患", "者", "a", "先", "生", "b12"]),
        ("カード を ひらく", ["カ", "ー", "ド", "を", "ひ", "ら", "く"]),
        ("ｶｰﾄﾞ Ａ１", ["カ", "ー", "ド", "a1"]),  # half and full width
        ("น้ำ ดี", ["น้\u0e4d", "า", "ดี"]),  # Thai: tone and vowel marks stay with their letter
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks, and the script has spaces
        ("한국어 문장", ["한국어", "문장"]),
        ("pati\u00adent co\u0301t\u0301 \u0301x", ["patient", "cót\u0301", "x"]),
        ("STRASSE Straße ﬁne x²", ["strasse", "strasse", "fine", "x2"]),
        ("", []),
    ],
)
def test_words_of_scripts_with_and_without_spaces(text, expected):
    assert words(text) == expected


def test_a_sentence_without_spaces_is_found_within_another():
    assert len(CHINESE) == 28
    assert longest_shared([f"据报道，{CHINESE}，谢谢。"], ["别的", f"记录{CHINESE}完"]) == [28]
    assert longest_shared(["患者星期二来"], [CHINESE]) == [2]


def test_the_form_in_which_unicode_writes_a_letter_hides_nothing():
    private = "Le café naïf d'Émile à Noël"
    for form in ("NFC", "NFD", "NFKD"):
        assert longest_shared([unicodedata.normalize(form, private.upper())], [private]) == [7]


def test_longest_shared_words_by_hand():
    assert words("It's GOOD, very-good!") == ["it", "s", "good", "very", "good"]
    private = ["The patient came in on Monday.", "nothing"]
    texts = ["A patient came in on a horse", "Nothing at all", "xyz", ""]
    assert longest_shared(texts, private) == [4, 1, 0, 0]
    assert longest_shared(["the patient came in on monday"], private) == [6]
    assert longest_shared(["a"], []) == [0]
    assert longest_shared([], ["a"]) == []


def test_a_text_that_is_copied_whole_takes_no_memory_for_each_length():
    private = [" ".join(f"w{row}x{place}" for place in range(300)) for row in range(20)]
    tracemalloc.start()
    try:
        assert longest_shared([private[7], "w1x3 w1x4 w1x6"], private) == [300, 2]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 16 * 2**20  # with the sequences of all lengths it is ten times as much


def test_of_more_private_texts_the_words_are_held_and_not_their_sequences():
    text, most = " ".join(f"word{place}" for place in range(30)), []
    for rows in (200, 800):
        tracemalloc.start()
        try:
            assert longest_shared([text], [text] * rows) == [30]
            most.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert most[1] - most[0] < 2 * 2**20  # with a set of sequences for each text it is more than four


def test_nearest_similarity_by_hand():
    vectors = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    private = torch.tensor([[0.0, 5.0], [3.0, 0.0]])
    assert nearest_similarity(vectors, private).tolist() == pytest.approx([1.0, 0.5**0.5])
