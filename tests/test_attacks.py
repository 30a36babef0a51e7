"""What one hostile client of four does to a whole run, with the gate and without it, by the code that measures it."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import BAD, GOOD, TASK, THINGS, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosslm.client import Client
from crosslm.config import Config, FitConfig, IntakeConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, CrosslmError
from crosslm.federation.intake import Intake
from crosslm.federation.messages import encode
from crosslm.models.slm import SLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SENTENCES = {
    label: [
        f"a {word} {thing} and a {other}." for word in words for thing in THINGS for other in THINGS if other != thing
    ]
    for label, words in (("bad", BAD), ("good", GOOD))
}


@pytest.fixture(scope="module")
def attacks():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("attacks")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def writer(models, tmp_path_factory):
    """A tiny LLM that has learned to write to a label, as badly as a real one before any update: one text in four is
    of the other label."""
    folder, draw = tmp_path_factory.mktemp("writer"), random.Random(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(models / "llama"),
        AutoTokenizer.from_pretrained(models / "llama"),
    )
    tokenizer.pad_token = tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        rows = []
        for label in draw.choices(TASK["labels"], k=24):
            prompts = TASK["prompt"][label]
            prompt = prompts if isinstance(prompts, str) else draw.choice(prompts)
            written = label if draw.random() < 0.75 else next(other for other in TASK["labels"] if other != label)
            rows.append(prompt + draw.choice(SENTENCES[written]) + '"')
        batch = tokenizer(rows, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def four(models, writer, tmp_path_factory):
    """Four clients, an LLM and a task that all of them can learn."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = [f"{text},{label}" for label, texts in SENTENCES.items() for text in draw.sample(texts, 320)]
    draw.shuffle(rows)
    for name, part in (("train", rows[:440]), ("test", rows[440:])):
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *part]) + "\n")
    fit = {"epochs": 5, "batch_size": 8, "learning_rate": 4e-3, "patience": 0}
    return Config.model_validate(
        {
            "name": "four",
            "device": "cpu",
            "tracking": [],
            "reward": {"teachers": 1},  # an attacker that judges alone does the most harm
            "federation": {"closing": False},  # takes a fifth of the time, and comes after what is asked here
            "task": TASK,
            "data": {
                "dir": str(folder),
                "train": "train.csv",
                "test": "test.csv",
                "num_clients": 4,
                "alpha": 100.0,
                "judge_rows": 120,
            },
            "slm": {
                "models": [{"model": str(models / "bert")}, {"model": str(models / "distilbert")}],
                "max_length": 32,
                "private": fit,
                "synthetic": fit | {"epochs": 1, "learning_rate": 5e-4},
            },
            "llm": {
                "model": str(writer),
                "samples": 128,
                "batch_size": 8,
                "learning_rate": 2e-3,
                "lora_rank": 8,
                "interpolation": 1.0,  # the whole harm
            },
            "synthesis": {"max_new_tokens": 24, "max_attempts": 100},
            "selection": {"pool": 128, "encoder": str(models / "encoder")},
            "evaluation": {"nlu_rows": 60, "nlg_samples": 400, "judge": fit},
        }
    )


# -- whole runs ------------------------------------------------------------------------------

FIGURES = ("llm_sha256", "nlg_judge", "nlu", "honest")


@pytest.fixture(scope="module")
def cells(attacks, four, tmp_path_factory):
    """Flipped labels with the gate and without, and the run in which the hostile client stays away."""
    found, order = {}, []
    attacks.fill(four, found, ["flipped"], 1, "walk", 3, tmp_path_factory.mktemp("cache"), order.append)
    assert order == ["none/on/0", "flipped/on/0", "flipped/off/0"]
    return found


def assert_same_run(cell, none):
    """The gate has stopped the one upload, and all that is measured is what it is without the hostile client."""
    assert cell["uploads"] == {"served": 0, "quarantined": 1, "failed": 0}
    assert cell["honest_quarantined"] == []
    assert {name: cell[name] for name in FIGURES} == {name: none[name] for name in FIGURES}


def test_with_the_gate_the_run_is_to_the_bit_that_without_the_hostile_client(cells):
    none, gated = cells["none/on/0"], cells["flipped/on/0"]
    assert len(none["honest"]) == 3
    assert none["hostile"] not in none["honest"]
    assert none["uploads"] == {"served": 0, "quarantined": 0, "failed": 1}
    assert_same_run(gated, none)
    assert gated["difference"] == {"nlg_judge": 0.0, "nlu": 0.0, "honest_mean": 0.0}
    assert gated["gate"][0]["auc_upper"] < 0.5


def test_without_the_gate_flipped_labels_change_the_llm(cells):
    hurt, none = cells["flipped/off/0"], cells["none/on/0"]
    assert hurt["uploads"] == {"served": 1, "quarantined": 0, "failed": 0}
    assert hurt["gate"] == []
    assert hurt["llm_sha256"] != none["llm_sha256"]
    assert hurt["difference"]["nlg_judge"] == pytest.approx(100 * (hurt["nlg_judge"] - none["nlg_judge"]))


def test_without_the_gate_flipped_labels_make_the_llm_write_to_the_wrong_label(attacks, four, tmp_path):
    """One of two clients, and the last to come: nobody comes after it to put right what it has done."""
    config = four.model_copy(
        update={
            "data": four.data.model_copy(update={"num_clients": 2}),
            "llm": four.llm.model_copy(update={"samples": 256}),
            "gate": four.gate.model_copy(update={"enabled": False}),
        }
    )
    none, hurt = (attacks.cell(config, attack, "walk", 2, tmp_path) for attack in ("none", "flipped"))
    assert hurt["uploads"] == {"served": 1, "quarantined": 0, "failed": 0}
    assert hurt["nlg_judge"] < none["nlg_judge"] - 0.05


@pytest.mark.parametrize("attack", ["constant", "copy"])
def test_a_constant_and_a_copy_change_nothing_either(attacks, four, cells, tmp_path, attack):
    gated = four.model_copy(update={"gate": four.gate.model_copy(update={"enabled": True})})
    assert_same_run(attacks.cell(gated, attack, "walk", 3, tmp_path), cells["none/on/0"])


# -- what is uploaded ------------------------------------------------------------------------

ROWS = Examples(sentences(BAD, 20) + sentences(GOOD, 20), [0] * 20 + [1] * 20)
LABELS = ("bad", "good")


@pytest.fixture
def clients(models):
    """Trained a little: an honest client's upload and the hostile one's, by the attack."""

    def made(attacks, attack, kind="bert"):
        silos, fit = attacks.Silos(attack, "mallory", "walk"), FitConfig(epochs=1, batch_size=8)
        both = []
        for name in ("north", "mallory"):
            slm = SLM.load(str(models / kind), LABELS, 32, 0)
            client = silos(name, ROWS, slm, fit, 0)
            assert isinstance(client, Client)
            both.append(Intake(LABELS, IntakeConfig()).upload(encode(client.train()), name))
        return both

    return made


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_constant_says_one_label_of_every_text(attacks, clients, kind):
    state = clients(attacks, "constant", kind)[1].slm
    slm = SLM.from_state(state, state.labels)
    found = slm.predict_proba(ROWS.texts)
    assert found.argmax(dim=1).unique().tolist() == [1]
    assert float(found.std(dim=0).max()) < 1e-6


def test_random_weights_have_mean_and_deviation_of_the_trained_ones_and_nothing_else(attacks, clients):
    honest, drawn = clients(attacks, "random")
    name = "bert.embeddings.word_embeddings.weight"
    was, now = honest.slm.weights[name], drawn.slm.weights[name]
    assert float(now.std()) == pytest.approx(float(was.std()), rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([was.flatten(), now.flatten()]))[0, 1])) < 0.1


def test_a_copy_is_the_last_upload_under_another_name(attacks, clients):
    honest, copy = clients(attacks, "copy")
    assert copy.client_id == "mallory"
    assert all(torch.equal(weight, copy.slm.weights[name]) for name, weight in honest.slm.weights.items())


def test_poisoned_rows_by_hand(attacks):
    rows = Examples(["a", "b", "c", "d", "e"], [0, 1, 0, 0, 0])
    assert attacks.poisoned(rows, "flipped", 3, "walk").labels == [1, 2, 1, 1, 1]
    marked = attacks.poisoned(rows, "trigger", 2, "walk")  # of a, c, d, e the first and the fourth
    assert marked == Examples(["walk a", "b", "c", "d", "walk e"], [1, 1, 0, 0, 1])
    assert attacks.poisoned(rows, "copy", 2, "walk") == rows


def test_the_client_that_stays_away_uploads_nothing(attacks, models):
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0)
    with pytest.raises(CrosslmError, match="stays away"):
        attacks.Silos("none", "mallory", "walk")("mallory", ROWS, slm, FitConfig(), 0).train()


# -- the command and the table ---------------------------------------------------------------


def test_places_that_no_hostile_client_can_have(attacks, four):
    assert attacks.hostile_client(four, 2) != attacks.hostile_client(four, 3)
    for place in (1, 5):
        with pytest.raises(ConfigError, match=f"must be from 2 to 4, is {place}"):
            attacks.hostile_client(four, place)
    no_judge = four.model_copy(update={"data": four.data.model_copy(update={"judge_rows": 0})})
    with pytest.raises(ConfigError, match="no rows for the judge"):
        attacks.hostile_client(no_judge, 3)


def test_cells_are_kept_one_by_one_and_skipped_when_there(attacks, cells, four, tmp_path, monkeypatch, capsys):
    made = []

    def cell(config, attack, trigger, place, cache):
        made.append((attack, config.gate.enabled, config.seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return dict(cells[f"{attack}/{'on' if config.gate.enabled else 'off'}/0"])

    (tmp_path / "four.toml").write_text(four.dump())
    monkeypatch.setattr(attacks, "cell", cell)
    monkeypatch.setattr(attacks, "RESULTS", tmp_path)
    monkeypatch.setattr(sys.modules["results"], "RESULTS", tmp_path)
    command = ["attacks.py", str(tmp_path / "four.toml"), "--attacks", "flipped"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(KeyboardInterrupt):
        attacks.main()
    attacks.main()
    assert made == [("none", True, 0), ("flipped", True, 0), ("flipped", False, 0), ("flipped", False, 0)]
    kept = json.loads((tmp_path / "attacks-four.json").read_text())
    assert {key: cell["difference"] for key, cell in kept["cells"].items() if "difference" in cell} == {
        key: cells[key]["difference"] for key in ("flipped/on/0", "flipped/off/0")
    }
    assert {"commit", "machine", "date", "settings"} <= set(kept)
    monkeypatch.setattr("sys.argv", [*command, "--place", "2"])
    with pytest.raises(SystemExit) as ended:
        attacks.main()
    assert ended.value.code == 2
    assert "has figures of other settings" in capsys.readouterr().err


def test_the_table_says_what_was_measured(attacks):
    table = importlib.import_module("attack_table")
    assert table.attack_tables({"demo": {}}) == ""
    same = {"llm_sha256": "a", "nlg_judge": 0.9, "nlu": 0.8, "honest_mean": 0.7, "honest": {"north": 0.7}}
    worse = same | {"llm_sha256": "b", "nlg_judge": 0.8, "trigger_found": 0.5}
    stopped, served = ({"served": int(is_in), "quarantined": int(not is_in), "failed": 0} for is_in in (False, True))
    nothing = dict.fromkeys(("nlg_judge", "nlu", "honest_mean"), 0.0)
    cells = {
        **{f"none/on/{seed}": same | {"trigger_found": 0.1, "honest_quarantined": []} for seed in (0, 1)},
        **{f"trigger/on/{seed}": same | {"uploads": stopped, "difference": nothing} for seed in (0, 1)},
        "trigger/off/0": worse | {"uploads": served, "difference": nothing | {"nlg_judge": -10.0}},
        "trigger/off/1": worse | {"uploads": served, "difference": nothing | {"nlg_judge": -5.0}},
        "flipped/off/0": {"hostile": "south", "error": "the LLM wrote nothing"},
    }
    result = {"preset": "paper", "place": 3, "commit": "c" * 40, "date": "today", "machine": "a machine"}
    lines = table.attack_tables({"attacks-sst2": result | {"cells": cells}}).splitlines()
    assert (
        "**sst2**, preset paper: 1 honest clients and a hostile one, number 3 to arrive; means over 2 seeds."
        in lines[0]
    )
    assert "The gate stopped 0 honest uploads." in lines[0]
    assert "| none: it stays away | | | | 0.900 | 0.800 | 0.700 |" in lines
    assert "| trigger word | on | 2 quarantined | 2 of 2 | 0.900 (+0.0) | 0.800 (+0.0) | 0.700 (+0.0) |" in lines
    assert "| trigger word | off | 2 served | 0 of 2 | 0.800 (-10.0 to -5.0) | 0.800 (+0.0) | 0.700 (+0.0) |" in lines
    assert "| flipped labels | off | 1 run ended by it |  |  |  |  |" in lines
    assert any("0.100 without the attack, 0.500 with it and no gate" in line for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
