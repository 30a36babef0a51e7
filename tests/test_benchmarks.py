"""Benchmarks: of privacy, cells that are not mixed and a verdict from figures; of speed, what was kept stays kept."""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tomli_w
import torch
from conftest import BAD, GOOD, sentences, tiny_llm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from crosslm.config import Config, SynthesisConfig
from crosslm.data.examples import Examples
from crosslm.experiment import run_local
from crosslm.models import graph_decoding
from crosslm.models import llm as llm_module
from crosslm.models.slm import SLM
from crosslm.runs.baseline import baselines

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(accuracy, auc, calibrated, epsilon, **changes):
    one = {"auc_interval": [0.4, 0.6], "tpr": 0.01, "tpr_interval": [0.0, 0.02]}
    private = None if epsilon is None else {"trained_layers": 0, "center": True, "clip": 1.0}
    settings = {"model": "m", "pooling": "mean", "test_rows": 100, "canaries": 8, "reference": "alike"}
    settings["privacy"] = private
    settings["fit"] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1}
    return {
        "epsilon": epsilon,
        "accuracy": accuracy,
        "attacks": {"loss": one | {"auc": auc}, "calibrated": one | {"auc": calibrated}},
        "exposure": [1.0, 2.0],
        "settings": settings,
        "commit": "c" * 40,
        "machine": "a machine",
        "date": "2026-11-25",
    } | changes


@pytest.mark.parametrize(
    ("accuracy", "auc", "ends"),
    [
        (0.78, 0.54, "a mean AUC of 0.540 (met) and DP costs 2.0 points (met): the goal is met."),
        (0.76, 0.54, "a mean AUC of 0.540 (met) and DP costs 4.0 points (missed): the goal is not met."),
        (0.78, 0.56, "a mean AUC of 0.560 (missed) and DP costs 2.0 points (met): the goal is not met."),
    ],
)
def test_the_verdict_is_computed(monkeypatch, accuracy, auc, ends):
    table = loaded("privacy_table", monkeypatch)
    cells = {"200/none/0": cell(0.79, 0.8, 0.7, None), "200/none/1": cell(0.81, 0.8, 0.7, None)}
    cells |= {
        f"200/8/{seed}": cell(accuracy + moved, 0.51, auc + moved, 7.99) for seed, moved in ((0, 0.01), (1, -0.01))
    }
    assert f"With 200 rows the better attack (calibrated) has {ends}" in table.privacy_table(cells)
    assert "| 200 | no DP | 2 | 0.800 (0.790 to 0.810) |" in table.privacy_table(cells)
    assert "With DP: the head alone, centred, 2 epochs, batches of 8" in table.privacy_table(cells)
    only = {key: value for key, value in cells.items() if "none" in key}
    assert "that has not been measured." in table.verdict(only, 200)


def test_cells_that_were_measured_otherwise_are_not_mixed(monkeypatch):
    table, privacy = loaded("privacy_table", monkeypatch), loaded("privacy", monkeypatch)
    cells = {"200/none/0": cell(0.79, 0.8, 0.7, None), "200/8/0": cell(0.7, 0.5, 0.5, 7.99)}
    settings = {"none": cells["200/none/0"]["settings"], "8": cells["200/8/0"]["settings"]}
    other = cell(0.7, 0.5, 0.5, 7.99, commit="d" * 40)
    for odd in (other, cell(0.7, 0.5, 0.5, 7.99, settings=settings["8"] | {"pooling": None})):
        mixed = cells | {"200/8/1": odd}
        with pytest.raises(SystemExit, match="200 rows were measured at several commits or with several settings"):
            table.privacy_table(mixed)
        assert privacy.still_good(mixed | {"1000/8/1": odd}, 200, "c" * 40, settings) == cells | {"1000/8/1": odd}
    assert table.privacy_table(cells | {"1000/8/0": other})  # of another number of rows: it has its own line


def test_kept_figures_are_not_overwritten_by_fewer(monkeypatch, tmp_path, capsys):
    measure = loaded("measure", monkeypatch)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    options = argparse.Namespace(origin={"commit": "c"}, quick=False, device="cpu", json=None, keep=True)
    monkeypatch.setattr(measure, "fast_dtype", lambda _: torch.bfloat16)
    measure.finish("update", {"ratio": 1.0, "ratio_vs_trl": 2.0}, options)
    with pytest.raises(SystemExit, match=r"performance-update.json was not written: this run has no ratio_vs_trl"):
        measure.finish("update", {"ratio": 3.0}, options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == 3.0
    assert json.loads((tmp_path / "performance-update.json").read_text())["ratio"] == 1.0
    measure.finish("update", {"ratio": 3.0, "ratio_vs_trl": 4.0, "more": 5.0}, options)
    assert json.loads((tmp_path / "performance-update.json").read_text())["more"] == 5.0


def test_figures_in_float32_do_not_take_the_place_of_those_in_bfloat16(monkeypatch):
    measure, table = loaded("measure", monkeypatch), loaded("performance_table", monkeypatch)
    monkeypatch.setattr(measure, "fast_dtype", lambda _: torch.float32)
    names = [measure.kept_as("update", "cpu"), measure.kept_as("update", "cuda"), measure.kept_as("selection", "cpu")]
    assert names == ["update-float32", "update-cuda", "selection"]
    assert {name.partition("-")[2] for name in names} == set(table.SECTIONS)
    assert set(measure.BY_DTYPE) < {path.stem for path in BENCHMARKS.glob("*.py")}


@pytest.fixture
def quick(models, config, monkeypatch, tmp_path):
    """Run a benchmark's main on tiny models, with ``--quick``; gives its figures, and may change its modules first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # no bfloat16, whatever this processor has
    rows = Examples(sentences(GOOD, 40) + sentences(BAD, 40), [1] * 40 + [0] * 40)
    llm = config.llm.model_copy(update={"model": str(models / "gemma3")})
    tiny = config.model_copy(update={"llm": llm})
    places = {
        "demo_config": lambda vocabulary: tiny,
        "original_llm": lambda *_: str(models / "gemma3"),
        "load_split": lambda _: SimpleNamespace(private={"north": rows}, test=rows, judge=rows),
        "matrix_rate": lambda *_: 1e9,
        "peak_of": lambda *_: 100,
    }

    def run(name, change=lambda module: None):
        for module in (importlib.import_module("generation"), importlib.import_module(name)):
            for place, stand_in in places.items():
                if hasattr(module, place):
                    monkeypatch.setattr(module, place, stand_in)
        change(module)
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--json", str(path)])
        module.main()
        return json.loads(path.read_text())

    return run


def test_generation_is_measured_and_checked(quick, monkeypatch):
    figures = quick("generation")
    assert figures["same_greedy_texts"]["float32"] == 1.0
    assert figures["fraction_of_limit_trimmed_64"] > 0  # four times the quick batch; of the whole one it is 256
    assert set(figures["mean_logp"]) == {"hf", "ours", "ours_float32", "trimmed", "trimmed_many", "hf_same_dtype"}

    def spoil(module):
        monkeypatch.setattr(module.Generate, "keep", lambda side, rows: module.Side.keep(side, [[0], *rows[1:]]))

    with pytest.raises(SystemExit, match=r"do not agree.*: share of texts that differ with top-k 1 in float32: 0\.06"):
        quick("generation", spoil)


def test_what_a_trimmed_vocabulary_wrote_is_checked_too(quick, monkeypatch):
    def spoil(module):
        likely, trimmed = module.mean_logp, []
        load = module.demo_llm
        monkeypatch.setattr(
            module, "demo_llm", lambda *given: (llm := load(*given), trimmed.append(llm) if given[0] else None)[0]
        )
        monkeypatch.setattr(
            module, "mean_logp", lambda judge, side: likely(judge, side) - any(side.llm is each for each in trimmed)
        )

    with pytest.raises(SystemExit, match=r"log-probability, trimmed: .* log-probability, trimmed_many: "):
        quick("generation", spoil)


def test_the_update_is_measured_and_checked(quick, monkeypatch):
    figures = quick("update")
    assert figures["whole"]["largest_relative_difference"]["ours_float32"] < 1e-3
    assert len(figures["whole"]["losses"]["plain"]) == 2
    assert figures["trimmed"]["ratio_float32"] > 0

    def spoil(module):
        drafted = module.tokens_stated  # the plain way alone asks for it there
        monkeypatch.setattr(module, "tokens_stated", lambda *given: [row[:-1] for row in drafted(*given)])

    with pytest.raises(SystemExit, match=r"do not agree.*: losses, whole vocabulary, ours_float32"):
        quick("update", spoil)


def test_a_busy_machine_is_measured_and_checked(quick, monkeypatch, capsys):
    seconds = iter([10.0, 12.0, 60.0, 20.0])
    written = dict.fromkeys(("idle", "idle_ours", "busy", "busy_ours"), "same")
    asked = []

    def measured(side, tokens):
        asked.append((side, tokens))
        return next(seconds), written[side]

    figures = quick("busy", lambda module: monkeypatch.setattr(module, "measured", measured))
    assert asked == [(side, 4) for side in written]
    ratios = ("ratio_idle", "ratio_busy", "slower_when_busy", "slower_when_busy_as_it_is")
    assert [figures[name] for name in ratios] == [0.83, 3.0, 1.67, 6.0]
    seconds, written["busy"] = iter([10.0, 12.0, 60.0, 20.0]), "others"
    with pytest.raises(SystemExit, match=r"do not agree.*: different texts: 1"):
        quick("busy")

    busy = importlib.import_module("busy")
    capsys.readouterr()
    found = []
    for tokens in (2, 2, 3):
        busy.work(tokens)
        found.append(json.loads(capsys.readouterr().out))
    assert found[0][1] == found[1][1] != found[2][1]
    assert min(took for took, _ in found) > 0


def test_neighbours_keep_cores_busy_and_go(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    busy = importlib.import_module("busy")
    this = psutil.Process()
    before = {child.pid for child in this.children()}
    with busy.neighbours(2):
        others = [child for child in this.children() if child.pid not in before]
        assert len(others) == 2
        assert len({os.getsid(other.pid) for other in others} | {os.getsid(0)}) == 3
    assert not any(other.is_running() for other in others)


def test_selection_is_measured_and_checked(quick, monkeypatch):
    def smaller(module):
        vectors, sizes = module.vectors, {2_000: 300, 5_000: 500, 20_000: 2_000}
        monkeypatch.setattr(module, "vectors", lambda count, device: vectors(sizes[count], device))

    assert quick("selection", smaller)["largest_difference"] < 1e-5

    def spoil(module):
        mined = module.mined
        monkeypatch.setattr(module, "mined", lambda points: mined(points) + 1e-3)

    with pytest.raises(SystemExit, match=r"do not agree.*: diversity: 0\.001, at most 1e-05 is allowed"):
        quick("selection", spoil)


def test_the_slms_training_is_measured_and_checked(quick, monkeypatch):
    figures = quick("slm")
    assert set(figures["accuracy"]) == {"ours", "auto", "trainer"}

    def spoil(module):
        monkeypatch.setattr(module.SLM, "accuracy", lambda slm, _: float(slm is trained[-1]))
        fit = module.SLM.fit
        monkeypatch.setattr(module.SLM, "fit", lambda slm, *given: (trained.append(slm), fit(slm, *given))[1])

    trained = [None]
    with pytest.raises(SystemExit, match=r"do not agree.*: mean accuracy: 1, at most 0.2 is allowed"):
        quick("slm", spoil)


def test_an_arrival_is_measured_in_all_its_parts(quick, models, config, monkeypatch):
    gate = config.gate.model_copy(update={"enabled": True, "margin": 0.0, "min_texts": 1000})
    changed = config.model_copy(update={"gate": gate, "llm": config.llm.model_copy(update={"model": "gemma3"})})

    def tiny(module):
        monkeypatch.setattr(module, "demo_config", lambda _: changed)
        monkeypatch.setattr(module, "model_folder", lambda name, _: name)
        monkeypatch.setattr(module, "client_specs", lambda config, names: dict.fromkeys(names, config.slm.models[0]))

    before = torch.Tensor.backward, llm_module.head_scores, graph_decoding.recorded
    found = quick("arrival", tiny)
    assert before == (torch.Tensor.backward, llm_module.head_scores, graph_decoding.recorded)  # all is put back
    assert "Clock" not in torch.optim.AdamW.step.__qualname__
    assert set(found["shares"]) == {
        "backward of LLM and SLM",
        "generate: backbone",
        "generate: head",
        "generate: sample",
        "optimizer",
        "select: encode",
        "slm: forward",
        "slm: predict",
        "update: forward",
        "update: head",
        "update: reference",
    }
    assert 0 < sum(found["shares"].values()) < 1.05


def test_a_recorded_step_is_timed_as_one_and_never_while_it_is_recorded(models, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    arrival = importlib.import_module("arrival")
    llm = tiny_llm(models, "llama")
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    monkeypatch.setattr(llm_module, "can_be_recorded", lambda *_: True)
    monkeypatch.setattr(graph_decoding, "recorded", lambda step: lambda: step())  # as on a GPU, another function
    clock = arrival.Clock("cpu")
    arrival.watch_models(clock, SimpleNamespace(llm=llm), slm)
    llm.generate([(3, 4)], [0], SynthesisConfig(max_new_tokens=5, stop=()))
    clock.stop()
    assert set(clock.seconds) == {
        "generate: backbone",
        "generate: head",
        "generate: sample",
        "generate: recorded step",
    }
    gpu, waited = arrival.Clock("cuda"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    for is_recording in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=is_recording: now)
        assert gpu.timed(lambda: "done", "step")() == "done"
        assert (bool(waited), bool(gpu.seconds)) == (not is_recording, not is_recording)


def test_other_families_are_measured_and_checked(quick, monkeypatch):
    def tiny(module):
        sizes = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, **sizes)
        families = {
            "gpt2": lambda _: GPT2LMHeadModel(gpt2),
            "llama": lambda _: LlamaForCausalLM(LlamaConfig(**small, **sizes)),
        }
        monkeypatch.setattr(module, "FAMILIES", families)

    figures = quick("families", tiny)
    for family in ("gpt2", "llama"):
        assert figures[family]["generation"]["same_greedy_texts"] == 1.0
        assert figures[family]["update"]["largest_relative_difference"] < 1e-3
        tokens = figures[family]["generation"]["tokens_per_second"]
        assert tokens["ours"]["median"] > 0 < tokens["hf"]["median"]

    def spoil(module):
        tiny(module)
        difference = module.difference
        monkeypatch.setattr(module, "difference", lambda ours, plain: 1 + difference(ours, plain))

    with pytest.raises(SystemExit, match=r"do not agree.*: gpt2: losses: 1, at most 0.001 is allowed; llama: losses"):
        quick("families", spoil)


def test_leads_are_measured_and_checked(quick, models, config, monkeypatch):
    def tiny(module):
        monkeypatch.setattr(module, "folder", lambda _: str(models / "gemma3"))
        monkeypatch.setattr(torch, "compile", lambda decoder, dynamic: decoder)  # it takes a minute

    figures = quick("leads", tiny)
    assert {"ratio_compiled_read", "ratio_int8_read", "ratio_int8_write", "ratio_upper_half_update"} <= set(figures)
    assert figures["trainable"]["upper"] == figures["trainable"]["ours"] / 2
    off = figures["nats_from_float32"]
    assert off["compiled"] == off["ours"] == {"largest": 0.0, "mean": 0.0}  # all in float32 here
    assert 0 < off["int8"]["mean"] < 0.5

    def spoil(module):
        tiny(module)
        monkeypatch.setattr(module, "in_int8", lambda decoder: decoder.apply(broken))

    def broken(part):
        if isinstance(part, torch.nn.Linear):
            part.weight.data.fill_(float("nan"))

    def other(module):
        tiny(module)
        monkeypatch.setattr(torch, "compile", lambda decoder, dynamic: decoder.apply(broken))

    with pytest.raises(SystemExit, match=r"do not agree.*: mean log-probability, compiled: nan, at most 0\.05"):
        quick("leads", other)

    with pytest.raises(SystemExit, match=r"do not agree.*: mean log-probability, int8: nan"):
        quick("leads", spoil)


def test_a_figure_inside_another_has_a_row(monkeypatch):
    tables = loaded("performance_table", monkeypatch)
    assert tables.figure_at({"a": {"b": 1.5}}, "a.b") == 1.5
    assert tables.figure_at({"a": {"b": 0}}, "a.b") == 0
    for lacking in ({}, {"a": 3}, {"a": {}}):
        assert tables.figure_at(lacking, "a.b") is None
    kept = {path.stem: json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("performance-*.json")}
    page = tables.performance(kept, ["the end"])
    assert page.endswith("the end\n")
    assert f"| the same in bfloat16 | {kept['performance-update']['ratio_vs_plain']} times the plain way's" in page
    assert "| finished rows refilled with new texts | not measured | no |" in page
    ratio = kept["performance-update"]["trimmed"]["ratio_float32"]
    assert f"| `trimmed.ratio_float32` | **{ratio}** |" in page


def test_how_much_judges_count_is_measured_on_validation_rows(settings, data_folder, tmp_path, monkeypatch):
    judges = loaded("judges", monkeypatch)
    settings |= {"preset": "recommended", "acceptance": {"enabled": False}}
    settings["reward"] = {"teachers": 2}
    run_local(Config.model_validate(settings), tmp_path / "run", tmp_path)
    rows = (data_folder / "test.csv").read_text().splitlines()
    (data_folder / "validation.csv").write_text("\n".join(rows[:9]) + "\n")
    kept = []
    monkeypatch.setattr(judges, "keep", lambda name, figures: kept.append((name, figures)))
    monkeypatch.setattr(sys, "argv", ["judges.py", str(tmp_path / "run"), "--rows", "6"])
    judges.main()
    ((name, found),) = kept
    assert (name, found["rows"], found["probe"]) == ("judges-tiny", 6, 12)
    assert {"commit", "machine", "seed"} <= set(found)
    for llm in ("original", "trained"):
        assert list(found["figures"][llm]) == ["LLM alone", "1", "2"]
        one, two = found["figures"][llm]["1"], found["figures"][llm]["2"]
        assert one["weighed, worst"] <= one["weighed"]
        assert two["weighed, worst"] == two["weighed"]  # there is one choice of two among two
        assert all(6 * value == pytest.approx(round(6 * value)) for value in two.values())
    results = loaded("results", monkeypatch)
    assert f"| {two['weighed']:.3f} |" in results.judges_section([found])[-2]


def test_who_should_judge_what_the_llm_learns_is_measured(settings, data_folder, tmp_path, monkeypatch):
    rewards = loaded("rewards", monkeypatch)
    settings |= {"preset": "recommended"}
    settings["gate"] = {"enabled": False}
    settings["evaluation"].pop("perplexity_text")
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(settings))
    shutil.copy(data_folder / "test.csv", data_folder / "validation.csv")
    (data_folder.parent / "ptb").mkdir()
    shutil.copy(data_folder / "plain.txt", data_folder.parent / "ptb" / "ptb.valid.txt")
    kept = []
    monkeypatch.setattr(rewards, "keep", lambda name, figures: kept.append((name, figures)))
    monkeypatch.setattr(sys, "argv", ["rewards.py", str(tmp_path / "tiny.toml"), "--set", "slm.weigh_judges=true"])
    rewards.main()
    ((name, found),) = kept
    assert (name, found["set"]) == ("rewards-tiny", ["slm.weigh_judges=true"])
    assert {"commit", "machine", "seed", "alpha"} <= set(found)
    slms, both = (found["variants"][judges] for judges in ("SLMs", "SLMs and the original LLM"))
    for variant in (slms, both):
        assert len(variant["arrivals"]) == 2
        assert list(variant["shares"]) == ["0.7", "1"]
    assert slms["shares"]["1"] != both["shares"]["1"] != found["original"]
    table = loaded("results", monkeypatch).rewards_section([found | {"task": "sst2"}])
    assert f"| {both['shares']['1']['nlu']:.3f} |" in table[-4]


def test_which_texts_step_5_learns_from_is_measured_and_gone_on_with(settings, tmp_path, monkeypatch):
    study = loaded("step_5_texts", monkeypatch)
    settings |= {"preset": "recommended", "acceptance": {"enabled": False}}
    settings["reward"] = {"teachers": 2}
    run_local(Config.model_validate(settings), tmp_path / "run", tmp_path)
    kept, learned, learn = [], [], study.Study._learned

    def counted(self, upload, parts, training):
        learned.append((upload.client_id, training.epochs))
        if len(learned) == 6:
            raise KeyboardInterrupt
        return learn(self, upload, parts, training)

    monkeypatch.setattr(study, "keep", lambda name, figures: kept.append((name, figures)))
    monkeypatch.setattr(study.Study, "_learned", counted)
    trainings = ["--training", "1,1e-3,8", "--training", "2,1e-3,4"]
    monkeypatch.setattr(sys, "argv", ["step_5_texts.py", str(tmp_path / "run"), "--pool", "12", *trainings])
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert not kept
    study.main()
    assert len(learned) == 6 + 44 - 5  # two clients, eleven kinds of texts, two trainings; five were done
    ((name, figures),) = kept
    assert name == "step-5-texts-tiny"
    assert {"commit", "machine", "seed", "agreement"} <= set(figures)
    for row in figures["clients"].values():
        assert len(row) == 23
        assert all(0 <= value <= 1 for value in row.values())
    one = ["--variant", "the trained LLM's texts", "--training", "1,1e-3,8"]
    monkeypatch.setattr(sys, "argv", ["step_5_texts.py", str(tmp_path / "run"), "--pool", "12", *one])
    study.main()
    assert list(kept[1][1]["agreement"]) == ["the texts of the trained, by the trained"]
    for name, row in kept[1][1]["clients"].items():
        found = "the trained LLM's texts; 1 epochs in batches of 8, 0.001"
        assert list(row) == ["Standalone", found]
        assert row[found] == kept[0][1]["clients"][name][found]
    results = loaded("results", monkeypatch)
    assert "half of each, judged by the trained; 2 epochs in batches of 4, 0.001" in "\n".join(
        results.texts_section([figures])
    )


def test_a_logistic_regression_is_measured_on_the_rows_of_each_client(settings, tmp_path, monkeypatch):
    logistic, config = loaded("logistic", monkeypatch), Config.model_validate(settings)
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path))
    encoder, read = logistic.Remembering(config), []
    plain = encoder.encoder.encode
    monkeypatch.setattr(encoder.encoder, "encode", lambda texts: read.append(len(texts)) or plain(texts))
    found = logistic.of_config(config, encoder)
    assert logistic.of_config(config, encoder) == found  # and reads no text again
    assert sum(read) == len(encoder.known)
    expected = baselines(config, tmp_path)
    for client in ("client-0", "client-1"):
        keys = {"alone": "logistic", "balanced": "logistic_balanced", "together": "logistic_together"}
        assert found[client] == {ours: expected[client][theirs] for ours, theirs in keys.items()}


def test_the_table_has_the_mean_over_clients_seeds_and_tasks(monkeypatch):
    table = loaded("logistic_table", monkeypatch)
    first = {"0": {"a": {"alone": 0.5}, "b": {"alone": 0.7}}, "1": {"a": {"alone": 0.8}, "b": {"alone": 0.8}}}
    others = {task: {"0": {"a": {"alone": 0.3}}} for task in ("imdb", "ag_news", "yahoo_answers")}
    figures = {"demo": {"0": {"a": {"alone": 0.9}}}, "sst2": first, **others}
    # of the first (0.6 + 0.8) / 2, and with three of 0.3 in all (0.7 + 0.9) / 4
    assert table.logistic_means({"figures": figures}, "alone") == pytest.approx([0.7, 0.3, 0.3, 0.3, 0.4])
