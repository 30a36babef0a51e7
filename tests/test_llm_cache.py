"""What the LLM did is kept and not done twice (``--llm-cache``)."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from crosslm.config import Config, merged
from crosslm.errors import RunError
from crosslm.experiment import run_local
from crosslm.models.llm import LLM
from crosslm.runs import llm_cache
from crosslm.runs.llm_cache import LLMCache
from crosslm.runs.reevaluate import evaluate_run
from crosslm.runs.rundir import RunDir
from crosslm.server import Server

OTHER_STEP_5 = {"slm": {"synthetic": {"epochs": 3}}, "selection": {"class_balance": True}}


def run(settings, tmp_path, name, **more):
    return run_local(Config.model_validate(settings), tmp_path / name, tmp_path, **more)


def figures(summary):
    return {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_bytes", "llm_cache")}


def written(folder):
    return {path.name: path.read_bytes() for path in (folder / "synthetic").iterdir()}


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_a_run_that_differs_in_step_5_alone_is_the_same_with_it_and_asks_the_llm_nothing(
    settings, tmp_path, monkeypatch, preset
):
    settings["preset"] = preset
    settings["slm"] |= {"weigh_judges": True}
    other, cache = merged(settings, OTHER_STEP_5), tmp_path / "llm"
    whole = run(other, tmp_path, "whole")
    assert "llm_cache" not in whole
    first = run(settings, tmp_path, "first", llm_cache=cache)
    asked = sum(first["llm_cache"].values())
    # what judges are weighed by is read again where the LLM has not learned yet, and found
    assert first["llm_cache"]["found"] == (preset == "recommended") < first["llm_cache"]["made"]
    assert figures(first) == figures(run(settings, tmp_path, "without"))

    def never(*_, **__):
        raise AssertionError("the LLM was asked again")

    with monkeypatch.context() as patched:
        for kind, names in ((LLM, ("generate", "classify", "perplexity", "score")), (Server, ("update_llm",))):
            for name in names:
                patched.setattr(kind, name, never)
        again = run(other, tmp_path, "again", llm_cache=cache)
    assert again["llm_cache"] == {"found": asked, "made": 0}
    assert figures(again) == figures(whole)
    slms = [
        (tmp_path / name / "slm" / "client-0" / "model.safetensors").read_bytes()
        for name in ("again", "whole", "first")
    ]
    assert slms[0] == slms[1] != slms[2]
    assert written(tmp_path / "again") == written(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / "llm" / name).read_bytes() == (tmp_path / "whole" / "llm" / name).read_bytes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def first(settings, shared, tmp_path):
    """The summary of a run with these settings, made once, and a copy of the cache that it filled."""
    if not (shared / "first").exists():
        run(settings, shared, "first", llm_cache=shared / "llm")
    summary = json.loads((shared / "first" / "summary.json").read_text())
    return summary, shutil.copytree(shared / "llm", tmp_path / "llm")


@pytest.mark.parametrize(
    "change",
    [
        {"llm": {"gamma_kl": 0.5}},
        {"llm": {"lora_alpha": 64}},
        {"llm": {"gamma_anchor": 0.5, "anchors": 2}},
        {"slm": {"private": {"epochs": 3}}},
        {"task": {"statement": {"good": "So this one is good.", "bad": "So this one is bad."}}},
        {"synthesis": {"temperature": 0.5}},
    ],
)
def test_what_the_llm_would_do_otherwise_is_done(settings, tmp_path, first, change):
    other = merged(settings, change)
    found = run(other, tmp_path, "other", llm_cache=first[1])
    assert found["llm_cache"]["made"] > 0
    # what does not depend on it is found, but that each word of the LLM does on its adapter's size
    assert (found["llm_cache"]["found"] > 0) == ("lora_alpha" not in change.get("llm", {}))
    assert figures(found) == figures(run(other, tmp_path, "without"))


def test_the_llm_that_a_run_ends_with_is_interpolated_and_nothing_before_it(settings, tmp_path, first):
    whole, half = (merged(settings, {"llm": {"interpolation": share}}) for share in (1.0, 0.5))
    trained = run(whole, tmp_path, "to 1.0", llm_cache=first[1])
    updates = {path.name for path in first[1].glob("*.adapter")}
    found = run(half, tmp_path, "to 0.5", llm_cache=first[1])
    assert found["slm"] == trained["slm"]
    assert updates == {path.name for path in first[1].glob("*.adapter")} != set()  # it learned nothing twice
    weights = [load_file(tmp_path / name / "llm" / "adapter_model.safetensors") for name in ("to 1.0", "to 0.5")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value * 0.5 if "lora_B" in name else value, rtol=0, atol=0)
    assert any(value.any() for name, value in weights[0].items() if "lora_B" in name)
    again = evaluate_run(RunDir.open(tmp_path / "to 0.5"), tmp_path)
    assert again["llm/nlu_accuracy"] == found["llm"]["nlu_accuracy"]["after"]
    assert (tmp_path / "to 0.5/synthetic/final.jsonl").read_bytes() != (
        tmp_path / "to 1.0/synthetic/final.jsonl"
    ).read_bytes()


def test_with_another_library_all_is_done_anew(settings, tmp_path, first, monkeypatch):
    summary, cache = first
    monkeypatch.setattr(llm_cache, "versions", lambda: {"transformers": "6.0"})
    assert run(settings, tmp_path, "second", llm_cache=cache)["llm_cache"] == summary["llm_cache"]


def test_a_damaged_result_is_named(settings, tmp_path, first):
    cache = first[1]
    adapter = next(cache.glob("*.adapter"))
    adapter.unlink()
    with pytest.raises(RunError, match=f"delete {adapter.stem}.json to have it done again"):
        run(settings, tmp_path, "second", llm_cache=cache)
    kept = cache / f"{adapter.stem}.json"
    kept.write_text("[{")
    with pytest.raises(RunError, match=f"{kept}: damaged, delete it"):
        run(settings, tmp_path, "third", llm_cache=cache)
    kept.unlink()
    assert run(settings, tmp_path, "fourth", llm_cache=cache)["llm_cache"]["made"] == 1
    assert json.loads(kept.read_text())


def test_two_who_make_the_same_at_the_same_time_do_each_other_no_harm(tmp_path):
    cache, at_once = llm_cache.LLMCache(tmp_path), threading.Barrier(4)

    def make():
        at_once.wait()
        for number in range(20):
            cache.put(f"key-{number}", [0] * 10_000, adapter=b"a" * 100_000)
            assert cache.get(f"key-{number}") == [0] * 10_000

    with ThreadPoolExecutor(4) as threads:
        for made in [threads.submit(make) for _ in range(4)]:
            made.result()


def test_a_cache_is_for_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        LLMCache(tmp_path / "llm").put("key", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "llm").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: cannot be written: .* choose another --llm-cache"):
        run(settings, tmp_path, "run", llm_cache=tmp_path / "file")
    assert not (tmp_path / "run").exists()


def test_the_command_has_it(settings, tmp_path, command):
    config = tmp_path / "my.toml"
    config.write_text(tomli_w.dumps(settings))
    options = ("--llm-cache", tmp_path / "llm", "--cache-dir", tmp_path)
    found = []
    for name, more in (("first", ()), ("second", ("--set", "slm.synthetic.epochs=6"))):
        code, out, err = command("run", config, "--output", tmp_path / name, *options, *more)
        assert (code, err) == (0, ""), out
        found.append(json.loads((tmp_path / name / "summary.json").read_text())["llm_cache"])
    assert found == [{"found": 0, "made": found[1]["found"]}, {"found": found[0]["made"], "made": 0}]
