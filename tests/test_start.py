"""The way to a first run: a new task is written and runs, and the doctor finds what is in its way."""

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BAD, GOOD, TINY_AMOUNTS, sentences
from transformers import AutoConfig, AutoModel, BertConfig, BertTokenizerFast, Gemma3TextConfig, MistralConfig

from crosslm.cli import main as cli
from crosslm.cli.main import EXTRAS
from crosslm.config import PRESETS, Config
from crosslm.config_file import load
from crosslm.errors import ConfigError, ModelError, RunError
from crosslm.models.pooling import made_by_mean
from crosslm.models.sources import model_folder
from crosslm.models.tokens import load_tokenizer, verbalizer_ids
from crosslm.models.vocabulary import trimmable_tokenizer
from crosslm.preflight import doctor, machine, memory, rows, starter
from crosslm.runs.preparation import original_llm
from crosslm.task import Task

ROOT = Path(__file__).parents[1]
OVERRIDES = [part for amount in TINY_AMOUNTS for part in ("--set", amount)]


@pytest.fixture
def start(shell, models, tmp_path):
    """Run ``crosslm init`` with tiny models."""
    chosen = ("--llm", models / "gemma3", "--slm", models / "bert", "--encoder", models / "encoder")
    labels = ("--label", "routine=a request that can wait", "--label", "urgent=a request that cannot wait")

    def called(*arguments, labels=labels):
        return shell("init", tmp_path / "tickets", *labels, *chosen, *arguments)

    return called


def fill(folder):
    """Put real rows in the place of the samples."""
    for path in folder.glob("*.csv"):
        is_test = path.name == "test.csv"
        count = 25 if is_test else 10
        both = {"routine": sentences(GOOD, 35), "urgent": sentences(BAD, 35)}
        of = {label: texts[10:] if is_test else texts[:count] for label, texts in both.items()}
        rows = [f'"{text}",{label}' for label, texts in of.items() for text in texts]
        path.write_text("text,label\n" + "\n".join(rows) + "\n")


def test_the_task_that_is_written_passes_the_doctor_and_runs(start, shell, models, tmp_path):
    folder = tmp_path / "tickets"
    code, out, err = start("--kind", "request", "--client", "north", "--client", "east")
    assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == [
        "east.csv", "north.csv", "test.csv", "tickets.toml",
    ]  # fmt: skip
    config = load(folder / "tickets.toml")
    assert [client.id for client in config.clients] == ["north", "east"]
    assert config.task.labels == ("routine", "urgent")
    assert config.task.prompt["urgent"] == (
        'Here is a request of the category urgent, a request that cannot wait: "',
        'A request that cannot wait. The request reads: "',
    )
    assert config.task.query == "{text} The category of this request is"
    assert config.task.statement["routine"] == ("The category of this request is routine.",)
    assert config.task.verbalizer == {"routine": "routine", "urgent": "urgent"}
    assert "label urgent: the LLM says 'urgent'" in out
    comments = [line for line in (folder / "tickets.toml").read_text().splitlines() if line.startswith("#")]
    assert len(comments) > 15

    # samples are warned of; with rows of one's own the doctor is content
    code, out, _ = shell("doctor", folder / "tickets.toml")
    assert code == 0
    assert out.count("sample rows of crosslm init: put your own in their place") == 3
    fill(folder)
    code, out, _ = shell("doctor", folder / "tickets.toml")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("warning") and "data.judge" not in line] == []
    code, out, err = shell(
        "run", folder / "tickets.toml", "--output", tmp_path / "run", "--cache-dir", tmp_path, *OVERRIDES
    )
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["slm"]["crosslm"]) == {"north", "east", "mean"}
    assert all(summary["llm"]["perplexity"].values()), "the text that comes with crosslm is read before and after"


def test_what_is_written_leaves_the_preset_as_it_is(start, tmp_path):
    code, _, err = start()
    assert code == 0, err
    config = load(tmp_path / "tickets" / "tickets.toml")
    assert config.preset == "recommended"
    for section, fields in PRESETS["recommended"].items():
        found = getattr(config, section)
        assert {name: getattr(found, name) for name in fields} == fields


def test_a_folder_that_cannot_be_made_and_a_silo_given_twice_are_told_by_what_was_given(start, models, tmp_path):
    code, _, err = start("--client", "north", "--client", "south", "--client", "north")
    assert (code, err) == (2, "error: --client 'north' is given twice; each silo needs a name of its own\n")
    assert not (tmp_path / "tickets").exists()
    (tmp_path / "tickets").write_text("mine")
    code, _, err = start()
    assert code == 2
    assert f"{tmp_path / 'tickets'}: is a file; name a folder for the task's files" in err
    assert (tmp_path / "tickets").read_text() == "mine"
    begun = starter.Start("x", {"bad": "", "good": ""}, ["a"], llm=str(models / "gemma3"))
    task, below = starter.draft(begun, load_tokenizer(begun.llm, "x")), tmp_path / "tickets" / "below"
    with pytest.raises(RunError, match=f"{below}: cannot be written: .*, or name another folder"):
        starter.write_start(below, begun, task)


def test_nothing_is_written_over_and_nothing_is_left_half(start, tmp_path):
    folder = tmp_path / "tickets"
    folder.mkdir()
    (folder / "south.csv").write_text("mine")
    code, _, err = start()
    assert code == 2
    assert "south.csv: is there already and nothing is written over" in err
    assert [path.name for path in folder.iterdir()] == ["south.csv"]
    assert (folder / "south.csv").read_text() == "mine"


def test_a_terminal_is_asked(start, monkeypatch, tmp_path, models):
    answers = ["review", "bad", "a complaint", "", "good", "praise", ""]
    chosen = ["--llm", models / "gemma3", "--slm", models / "bert", "--encoder", models / "encoder"]
    monkeypatch.setattr("sys.argv", ["crosslm", "init", *map(str, [tmp_path / "asked", *chosen])])
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    cli.app(standalone_mode=False)
    task = load(tmp_path / "asked" / "asked.toml").task
    assert task.labels == ("bad", "good")
    assert task.prompt["bad"][1] == 'A complaint. The review reads: "'


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_was_answered_is_not_lost(monkeypatch, tmp_path, models):
    answers = ["my note", "odd", "", "odder", "", ""]
    chosen = ["--llm", models / "gemma3", "--slm", models / "bert", "--encoder", models / "encoder"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    monkeypatch.setattr("sys.argv", ["crosslm", "init", *map(str, [tmp_path / "asked", *chosen])])
    monkeypatch.setattr(starter, "draft", refuse)
    with pytest.raises(ConfigError) as refused:
        cli.app(standalone_mode=False)
    assert (
        str(refused.value) == "no word\nYour answers, to give them again: '--kind=my note' --label=odd= --label=odder="
    )


def refuse(*_):
    raise ConfigError("no word")


def test_a_model_is_looked_for_before_anything_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Terminal(""))  # a question would end in Abort
    monkeypatch.setattr("sys.argv", ["crosslm", "init", str(tmp_path / "asked"), "--slm", "./none"])
    with pytest.raises(ModelError, match=r"--slm = '\./none': no such model folder"):
        cli.app(standalone_mode=False)


def test_a_model_folder_is_written_whole(shell, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    labels = ("--label", "good=", "--label", "bad=")
    code, _, err = shell(
        "init", tmp_path / "new", *labels, "--llm", "gemma3", "--slm", "./bert", "--encoder", "encoder"
    )
    assert code == 0, err
    config = load(tmp_path / "new" / "new.toml")
    assert [config.llm.model, config.slm.models[0].model] == [str(models / "gemma3"), str(models / "bert")]
    assert config.weighs_judges


def test_a_pipe_is_not_asked(start):
    code, _, err = start(labels=())
    assert code == 2
    assert "give --label NAME=DESCRIPTION for each" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--label", "routine=again"), "--label: 'routine' is given twice"),
        (("--label", "=empty"), "--label '=empty': must look like NAME=WORDS"),
        (("--verbalizer", "late=late"), "--verbalizer names ['late'], which are not among the labels"),
        (("--verbalizer", "urgent=kind", "--verbalizer", "routine=kind"), "start with the same token"),
        (("--client", "../up"), "--client '../up': must start with a letter or digit"),
        (("--client", "test"), "--client 'test': must start with a letter or digit"),
        (("--client", "münchen"), "64 at most, all of them ASCII: no ü or é)"),
        (("--client", "mean"), "--client 'mean': must not be 'mean' nor end with '.partial'"),
        (("--name", "my task"), "--name 'my task': must start"),
        (("--slm", "./none"), "--slm = './none': no such model folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(start, tmp_path, arguments, message):
    code, _, err = start(*arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "tickets").exists()


@pytest.mark.parametrize("given", [("--client", "münchen"), ("--client", "a", "--client", "a"), ("--name", "my task")])
def test_a_name_is_refused_before_a_model_is_made_ready(start, monkeypatch, given):
    for name in ("check_model", "model_folder"):
        monkeypatch.setattr(f"crosslm.models.sources.{name}", refuse)
    code, _, err = start(*given)
    assert code == 2
    assert err.startswith(f"error: {given[0]} '{given[1]}'")


@pytest.mark.parametrize("what", ["run", "provision"])
def test_the_name_of_a_silo_is_refused_before_anything_is_loaded(shell, workplace, tmp_path, monkeypatch, what):
    monkeypatch.setattr("crosslm.models.sources.model_folder", refuse)
    text = (workplace / "tickets.toml").read_text().replace('id = "north"', 'id = "münchen"')
    (tmp_path / "tickets.toml").write_text(text)
    address = ("--address", "localhost:1") if what == "provision" else ()
    code, _, err = shell(what, tmp_path / "tickets.toml", *address, "--output", tmp_path / "out")
    assert code == 2
    assert "clients.0.id: must start with a letter or digit, go on with these or . _ - (64 at most" in err
    assert "found 'münchen'" in err
    assert not (tmp_path / "out").exists()


def test_one_label_is_no_task(start):
    code, _, err = start(labels=("--label", "urgent=now"))
    assert code == 2
    assert "a task needs two labels or more, found ['urgent']" in err


def test_a_word_that_is_not_the_labels_name_is_told(start, tmp_path):
    told = ", a word of its description; if another stands for it better: --verbalizer LABEL=WORD"
    labels = ("--label", "5=sour meals", "--label", "good=a kind song")
    code, out, err = start(labels=labels)
    assert code == 0, err
    assert f"label 5: the LLM says 'sour'{told}" in out.splitlines()
    assert "label good: the LLM says 'good'" in out.splitlines()
    (tmp_path / "tickets").rename(tmp_path / "first")
    assert told not in start("--verbalizer", "5=sour", labels=labels)[1]


def test_labels_that_start_alike_or_are_numbers_get_other_words(models):
    tokenizer = load_tokenizer(str(models / "gemma3"), "x")
    described = {"0": "a sour meal", "1": "a kind song", "kind of": "sweet and warm", "kind": "a bright day"}
    start = starter.Start("x", described, ["a"], llm=str(models / "gemma3"))
    task = starter.draft(start, tokenizer)
    # "kind" is gone to label 1's description by then, and so "kind of" takes a word of its description
    assert task.verbalizer == {"0": "sour", "1": "kind", "kind of": "sweet", "kind": "bright"}
    verbalizer_ids(tokenizer, Task.from_config(task))
    assert starter.draft(starter.Start("x", described, ["a"], verbalizers={"1": "mean"}), tokenizer).verbalizer == {
        "0": "sour",
        "1": "mean",
        "kind of": "kind of",
        "kind": "bright",
    }


@pytest.mark.parametrize(
    ("described", "given", "words"),
    [
        ({"0": "no illness", "1": "illness present"}, {}, None),
        ({"0": "no illness", "1": "illness present"}, {"0": "good"}, {"0": "good", "1": "illness"}),
        ({"0": "kind and sour", "1": "kind and bright"}, {}, {"0": "sour", "1": "bright"}),  # "kind" is of both
        ({"0": "not good", "1": "good"}, {"1": "good"}, None),
    ],
)
def test_no_label_gets_a_word_that_means_another(models, described, given, words):
    """Where columns have 0 and 1, and one is said to be no case of the other."""
    tokenizer = load_tokenizer(str(models / "gemma3"), "x")
    start = starter.Start("x", described, ["a"], llm=str(models / "gemma3"), verbalizers=given)
    if words:
        assert starter.draft(start, tokenizer).verbalizer == words
    else:
        with pytest.raises(ConfigError, match=r"task.verbalizer.0: neither .*\n.*--verbalizer 0=WORD"):
            starter.draft(start, tokenizer)


def test_a_label_of_several_words_can_be_pasted_with_its_word(models):
    tokenizer = load_tokenizer(str(models / "gemma3"), "x")
    start = starter.Start("x", {"good one": "", "good two": ""}, ["a"], llm=str(models / "gemma3"))
    with pytest.raises(ConfigError, match=r"Give a word of your own: --verbalizer 'good two=WORD'$"):
        starter.draft(start, tokenizer)


def test_words_with_quotes_and_dollars_survive_the_file(models, tmp_path):
    start = starter.Start(
        "odd",
        {"$5 'off'": 'a "real" $name saving', "näh = #1": "nothing\\ saved"},
        ["a"],
        llm=str(models / "gemma3"),
        verbalizers={"$5 'off'": "good", "näh = #1": "bad"},
    )
    task = starter.draft(start, load_tokenizer(start.llm, "x"))
    path = starter.write_start(tmp_path, start, task)[0]
    assert load(path).task == task
    assert tomllib.loads(path.read_text())["task"]["labels"] == ["$5 'off'", "näh = #1"]


def test_the_demo_models_get_what_suits_them(models):
    start = starter.Start("x", {"bad": "", "good": ""}, ["a", "b"])
    text = starter.as_toml(start, starter.draft(start, load_tokenizer(str(models / "gemma3"), "x")))
    tables = tomllib.loads(text)
    assert tables["llm"]["vocabulary_texts"] == [starter.DEMO_SLM]
    assert tables["slm"]["freeze_embeddings"]


def test_a_sentence_encoder_of_ones_own_gets_what_suits_the_demos(start, shell, models, tmp_path):
    """Of pooling, rates and patience; beside it the LLM keeps its whole vocabulary, since it may be of any language."""
    code, _, err = start("--slm", models / "encoder")
    assert code == 0, err
    config = load(tmp_path / "tickets" / "tickets.toml")
    begun = starter.Start("x", {"bad": "", "good": ""}, ["a", "b"])
    task = starter.draft(begun, load_tokenizer(str(models / "gemma3"), "x"))
    demo = tomllib.loads(starter.as_toml(begun, task))
    assert [spec.pooling for spec in config.slm.models] == ["mean"] == [demo["slm"]["models"][0]["pooling"]]
    for step in ("private", "synthetic"):
        fit = getattr(config.slm, step)
        assert {name: getattr(fit, name) for name in demo["slm"][step]} == demo["slm"][step]
    fill(tmp_path / "tickets")
    assert shell("doctor", tmp_path / "tickets" / "tickets.toml")[0] == 0
    other = starter.as_toml(replace(begun, slm=str(models / "encoder")), task)
    assert "vocabulary_texts" not in tomllib.loads(other)["llm"]
    assert "# vocabulary_texts = [" in other


def test_only_a_bert_made_for_the_mean_of_its_tokens_is_taken_for_one(models, tmp_path):
    found = {name: made_by_mean(str(models / name)) for name in ("encoder", "bert", "distilbert")}
    assert found == {"encoder": True, "bert": False, "distilbert": False}
    assert made_by_mean(model_folder(starter.DEMO_SLM, tmp_path))
    folder = tmp_path / "encoder"
    shutil.copytree(models / "encoder", folder)
    for pooling, is_mean in (
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', False),
        ('{"pooling_mode": "cls"}', False),
        ('{"pooling_mode_mean_tokens": true}', True),
        ("no JSON", False),
    ):
        (folder / "1_Pooling" / "config.json").write_text(pooling)
        assert made_by_mean(str(folder)) == is_mean
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    assert made_by_mean(str(folder))
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    assert not made_by_mean(str(folder))


# -- the doctor ----------------------------------------------------------------------------------


def levels(out):
    return {line.split(":")[0].split(maxsplit=1)[1]: line.split()[0] for line in out.splitlines()[:-1]}


WITHOUT = """
import sys
sys.modules |= dict.fromkeys({packages})
from crosslm.cli.main import main
main()
"""


def without_extras(*arguments):
    """A command as on a machine that has none of the packages that only an extra brings."""
    script = WITHOUT.format(packages=list(EXTRAS))
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_doctor_needs_no_extra_for_a_configuration(workplace):
    done = without_extras("doctor", workplace / "tickets.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert ", 0 errors" in done.stdout


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path):
    (tmp_path / "silo.toml").touch()
    done = without_extras("doctor", tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: this needs the package \w+: pip install 'crosslm\[federation\]'\n", done.stderr)


def test_the_extras_bring_what_they_are_said_to_bring():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(re.match(rf"{package}\b", needed) for needed in extras[extra]), package


def test_the_doctor_looks_at_the_machine(shell):
    code, out, err = shell("doctor")
    assert (code, err) == (0, "")
    found = levels(out)
    assert {"python", "packages", "disk", "device"} <= set(found)
    assert "errors, " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("llm.model='./none'", "error   model: llm.model = './none': no such model folder"),
        ("slm.models.0.num_hidden_layers=9", "models is not a section; set the whole of it at once"),
        ("slm.models=[{model='BERT', num_hidden_layers=9}]", "has 2 hidden layers; num_hidden_layers = 9"),
        ("llm.vocabulary_texts=['none.txt']", "error   llm.vocabulary_texts: "),
        ("llm.vocabulary_texts=['package:none']", "package:none is not a package that crosslm has a checksum for"),
        ("device=cuda:99", "error   device: device 'cuda:99' cannot be used"),
        ("task.verbalizer.urgent=routine", "error   verbalizers: task.verbalizer: "),
        ("data.test=none.csv", "none.csv: no such file"),
        ("data.label_column=class", "no column 'class'; its columns are: text, label"),
        ("llm.sample=3", "unknown key llm.sample; did you mean 'samples'?"),
        ("evaluation.perplexity_text=none.txt", "error   data: "),
        ("gate.public_texts=none.csv", "error   data: "),
        ("selection.encoder='GPT2'", "its tokenizer cannot pad, so that it is no sentence transformer: name one"),
    ],
)
def test_the_doctor_finds_an_error_and_ends_with_code_2(shell, workplace, models, change, message):
    change = change.replace("BERT", str(models / "bert")).replace("GPT2", str(models / "gpt2"))
    code, out, err = shell("doctor", workplace / "tickets.toml", "--set", change)
    assert (code, err) == (2, "")
    assert message in out


def test_the_doctor_knows_which_llm_a_run_refuses(shell, workplace, models, tmp_path):
    config = AutoConfig.from_pretrained(models / "gemma3")
    config.final_logit_softcapping = 30.0
    shutil.copytree(models / "gemma3", tmp_path / "capped")
    config.save_pretrained(tmp_path / "capped")
    shutil.copytree(models / "gpt2", tmp_path / "words")
    shutil.copy(models / "encoder" / "tokenizer.json", tmp_path / "words")
    for model, more, message in (
        (tmp_path / "capped", (), "error   llm.model: .*has final_logit_softcapping"),
        (tmp_path / "words", ("--set", "llm.vocabulary_texts=['test.csv']"), "error   llm.model: .*only byte-pair"),
        (models / "encoder", (), "error   llm.model: .*is an encoder"),
    ):
        code, out, _ = shell("doctor", workplace / "tickets.toml", "--set", f"llm.model='{model}'", *more)
        assert code == 2
        assert re.search(message, " ".join(out.split()).replace("error ", "error   ")), out


def test_the_doctor_says_which_llms_have_not_been_tested(shell, workplace, models, tmp_path):
    shape = AutoConfig.from_pretrained(models / "llama")
    config = MistralConfig(vocab_size=shape.vocab_size, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    shutil.copytree(models / "llama", tmp_path / "other")
    config.save_pretrained(tmp_path / "other")
    for model, is_warned in ((tmp_path / "other", True), (models / "llama", False)):
        out = shell("doctor", workplace / "tickets.toml", "--set", f"llm.model='{model}'")[1]
        assert ("warning llm.model: models of type mistral have not been tested" in out) == is_warned


def test_a_cache_that_may_only_be_read_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert machine.disk(tmp_path, "kit").level == "error"
    found = machine.disk(tmp_path, "cache folder", is_needed=False)
    assert (found.level, "have each model in it" in found.message) == ("warning", True)


def test_the_doctor_knows_which_classifiers_may_travel(shell, workplace, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    code, out, _ = shell("doctor", workplace / "tickets.toml", "--set", f"slm.models=[{{model='{tmp_path}'}}]")
    assert code == 2
    assert "cannot be uploaded: its model type 't5' is not one of" in out


def test_the_doctor_says_all_at_once(shell, workplace):
    code, out, _ = shell(
        "doctor", workplace / "tickets.toml", "--set", "llm.model='./none'", "--set", "data.test=none.csv"
    )
    assert code == 2
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("error")] == [
        "error   data.test",
        "error   model",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a good film.,routine\n" * 12, "with one label only there is nothing to tell apart"),
        ("a good film.,routine\n,urgent\n" + "x y,urgent\n" * 3, "1 row (2) left out: no text"),
        ("a good film.,routine\nx,urgent\n", "fewer than 10 of routine, urgent"),
    ],
)
def test_the_doctor_warns_of_rows(shell, workplace, tmp_path, rows, message):
    for name in ("tickets.toml", "south.csv", "test.csv"):
        shutil.copy(workplace / name, tmp_path)
    (tmp_path / "north.csv").write_text("text,label\n" + rows)
    code, out, _ = shell("doctor", tmp_path / "tickets.toml", "--data-dir", tmp_path)
    assert code == 0
    assert message in next(
        line for line in out.splitlines() if line.startswith("warning client north") and message in line
    )


def test_an_empty_silo_is_an_error(shell, workplace, tmp_path):
    for name in ("tickets.toml", "south.csv", "test.csv"):
        shutil.copy(workplace / name, tmp_path)
    (tmp_path / "north.csv").write_text("text,label\n")
    code, out, _ = shell("doctor", tmp_path / "tickets.toml", "--data-dir", tmp_path)
    assert code == 2
    assert "error   client north: " in out


def test_one_file_that_is_split_is_counted_for_each_client(shell, settings, tmp_path):
    import tomli_w

    path = tmp_path / "split.toml"
    path.write_text(tomli_w.dumps(settings))
    code, out, _ = shell("doctor", path)
    assert code == 0
    assert "client client-0: " in out
    assert "client client-1: " in out


def test_the_doctor_looks_for_what_the_configuration_asks_for(shell, workplace, monkeypatch):
    monkeypatch.setattr("crosslm.runs.tracking._installed", lambda name: name == "trackio")
    monkeypatch.setitem(sys.modules, "opacus", None)
    # the configuration of the fixture has all that the preset set, acceptance too
    changes = ("--set", "tracking=['wandb']", "--set", "privacy.epsilon=8", "--set", "acceptance.enabled=false")
    code, out, _ = shell("doctor", workplace / "tickets.toml", *changes)
    assert code == 2
    assert "error   tracking: tracking names 'wandb', which is not installed: pip install wandb" in out
    assert "error   privacy.epsilon: privacy.epsilon needs Opacus: pip install 'crosslm[privacy]'" in out
    assert "warning privacy.trained_layers: not set: of some hundred rows" in out
    out = shell("doctor", workplace / "tickets.toml", *changes, "--set", "privacy.trained_layers=0")[1]
    assert "privacy.trained_layers" not in out
    code, out, _ = shell("doctor", workplace / "tickets.toml", "--set", "tracking=['trackio']")
    assert code == 0
    assert "ok      tracking: trackio" in out


def test_no_weights_are_read(shell, workplace, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were read")

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", loaded)
    assert shell("doctor", workplace / "tickets.toml")[0] == 0


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        (
            "classifiers",
            "lower slm.max_length, or batch_size in slm.private and slm.synthetic, or choose smaller models",
        ),
        ("writing texts", "lower synthesis.batch_size, or choose smaller models"),
        ("updating the LLM", "lower llm.micro_batch_size, or choose smaller models"),
        ("LLM", "free; choose smaller models"),
    ],
)
def test_what_needs_most_memory_is_what_is_to_be_made_smaller(shell, workplace, monkeypatch, part, advice):
    monkeypatch.setattr(doctor, "available", lambda _: 10**6)
    monkeypatch.setattr(doctor, "estimate", lambda *_: memory.Estimate({"encoder": 10**5, part: 10**6}))
    assert advice in shell("doctor", workplace / "tickets.toml")[1]


def test_what_a_classifier_cannot_read_of_its_texts_is_told(shell, workplace, tmp_path):
    (tmp_path / "north.csv").write_text("text,label\n" + "\u6211\u9700\u8981,urgent\n\u5e2e\u52a9,routine\n" * 12)
    (tmp_path / "south.csv").write_text("text,label\n" + f"{'a good film ' * 40},urgent\na bad film,routine\n" * 12)
    rare = "".join(f"text {row},{'urgent' if row < 2 else 'routine'}\n" for row in range(60))
    (tmp_path / "test.csv").write_text("text,label\n" + rare)
    command = ("doctor", workplace / "tickets.toml", "--data-dir", tmp_path)
    out = shell(*command)[1]
    assert "client north: 100% of the tokens of its texts are unknown to its classifier: choose one of their" in out
    assert "client south: 12 of 24 texts are longer than the 32 tokens that its classifier reads of each: raise" in out
    assert "(routine 58, urgent 2); fewer than 10 of urgent: add more" in out
    out = shell(*command, "--set", "slm.max_length=4000")[1]
    assert "the 64 tokens that its classifier reads of each" in out  # it has no more


def test_a_model_that_was_hardly_made_for_the_rows_language_is_told(shell, workplace, tmp_path):
    for name in ("north", "south", "test"):
        words = "".join(f"qzxv wkjp {row},{'urgent' if row % 2 else 'routine'}\n" for row in range(60))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + words)
    command = ("doctor", workplace / "tickets.toml", "--data-dir", tmp_path)
    out = shell(*command)[1]
    assert re.search(
        r"llm\.model: it takes \d\.\d tokens for a word of the rows, so that it was hardly made for their language: "
        r"name one that was; if there is none, raise synthesis\.max_new_tokens \(\d+ tokens are some \d+ words\)",
        out,
    ), out


@pytest.mark.parametrize(("word", "rate"), [("well", 1.0), ("unwell", 2.0)])
def test_how_many_tokens_a_classifier_takes_for_a_word(tmp_path, word, rate):
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "un": 4, "##well": 5, "well": 6, "1": 7, ",": 8}
    BertTokenizerFast(vocab=vocabulary, model_max_length=12).save_pretrained(tmp_path)
    BertConfig(max_position_embeddings=12).save_pretrained(tmp_path)
    found = [str(finding) for finding in rows.reading("client a", str(tmp_path), 10, [f"{word}, 1, 1"] * 3)]
    told = (
        "client a: its classifier takes 2.0 tokens for a word of its texts, so that it was hardly made for their "
        "language: name one that was in slm.models, and in selection.encoder; if there is none, raise slm.max_length "
        "(10 tokens are some 5 words)"
    )
    assert found == ([told] if rate >= rows.MANY_TOKENS else [])


def test_where_a_script_has_no_spaces_a_character_is_a_word():
    assert rows.tokens_a_word(len, ["我需要帮助。", "你好 12"]) == pytest.approx(1)
    assert rows.tokens_a_word(lambda text: 2 * len(text.split()), ["Über 12 Öfen, oder?"]) == 2.0


def test_a_vocabulary_that_was_trimmed_to_another_language_is_told(models, settings, tmp_path):
    (tmp_path / "public.txt").write_text("a good day\n")
    settings["data"]["dir"] = str(tmp_path)
    settings["llm"] |= {"model": str(models / "gemma3"), "vocabulary_texts": ["public.txt"]}
    config = Config.model_validate(settings)
    texts = sentences(GOOD, 5)
    folder = config.llm.model
    tokenizer, description = trimmable_tokenizer(folder)
    found = list(doctor.language(config, folder, tokenizer, description, texts, tmp_path))
    assert [finding.subject for finding in found] == ["llm.vocabulary_texts"], found
    assert re.fullmatch(
        r"it takes \d\.\d tokens for a word of the rows, and 1\.\d with its whole vocabulary: leave "
        r"llm\.vocabulary_texts out, or name text of their language there",
        found[0].message,
    )
    made = original_llm(
        config, tmp_path, lambda _: None
    )  # once it is made its own tokenizer is asked, which counts alike
    assert Path(made).parent == tmp_path / "models"
    assert list(doctor.language(config, folder, tokenizer, description, texts, tmp_path)) == found
    whole = config.model_copy(update={"llm": config.llm.model_copy(update={"vocabulary_texts": ()})})
    assert not list(doctor.language(whole, folder, tokenizer, {}, texts, tmp_path))


def test_little_memory_and_little_disk_are_warned_of(shell, workplace, monkeypatch):
    monkeypatch.setattr(doctor, "available", lambda _: 10**6)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 10**6))
    code, out, _ = shell("doctor", workplace / "tickets.toml")
    assert code == 0
    assert "GiB free; choose smaller models" in out
    assert "2.0 GiB is a good reserve: make room" in out


def test_packages_that_are_missing_or_old_are_told(monkeypatch):
    monkeypatch.setattr(
        machine,
        "requires",
        lambda _: ["torch>=999", "no-such-thing", "gguf>=999; extra == 'demo'", "nothing-here; extra == 'datasets'"],
    )
    found = {finding.subject: finding for finding in machine.packages()}
    assert found["package torch"].level == "error"
    assert ">=999 is needed: pip install 'crosslm'" in found["package torch"].message
    assert found["package no-such-thing"].level == "error"
    assert found["package gguf"].level == "warning"
    assert "pip install 'crosslm[demo]'" in found["package gguf"].message
    assert found["package nothing-here"].level == "warning"


# the shapes of the demo's models, as in their configurations
GEMMA = Gemma3TextConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256,
)  # fmt: skip
MINILM = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)


# runs that had a process of their own
@pytest.mark.parametrize("name", ["demo", "sst2-one-client-recommended", "sst2-one-client-paper"])
def test_the_estimate_of_memory_is_near_what_was_measured(name):
    summary = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["summary"]
    small, gemma = memory.Shape.of_config(MINILM, AutoModel), memory.Shape.of_config(GEMMA)
    # a result from before the dtype was kept has float32
    config = load("demo" if name == "demo" else "sst2", [f"llm.dtype={summary.get('llm_dtype', 'float32')}"])
    need = memory.estimate(config, gemma, [small] * len(summary["clients"]), small).total
    # these runs held the activations of both sequences of a text at once
    tokens = memory.TEXT_TOKENS + config.synthesis.max_new_tokens
    second = config.llm.micro_batch_size * memory.activations(gemma, tokens) * 4
    assert 1 <= (need + (1 + memory.FREED) * second) / summary["peak_memory_bytes"] <= 1.5


def test_the_activations_of_one_sequence_of_a_text_count(config):
    shape = memory.Shape.of_config(MINILM, AutoModel)
    config = config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"batch_size": 1})})
    tokens = memory.TEXT_TOKENS + config.synthesis.max_new_tokens
    parts = memory.estimate(config, shape, [shape], shape).parts
    assert parts["updating the LLM"] == config.llm.micro_batch_size * memory.activations(shape, tokens) * 4


def test_no_more_of_a_text_counts_than_a_classifier_reads(config):
    shape = memory.Shape.of_config(MINILM, AutoModel)
    assert shape.positions == 512

    def classifiers(tokens):
        slm = config.slm.model_copy(update={"max_length": tokens})
        return memory.estimate(config.model_copy(update={"slm": slm}), shape, [shape], shape).parts["classifiers"]

    assert classifiers(128) < classifiers(512) == classifiers(4000)


def test_activations_by_hand():
    shape = memory.Shape(0, 0, 0, layers=2, hidden=3, inner=5, heads=1, key_value=6)
    # 4 tokens x 2 layers x (14 x 3 + 4 x 5 + 2 x 1 x 4)
    assert memory.activations(shape, 4) == 4 * 2 * (42 + 20 + 8)


def test_writing_in_bfloat16_gathers_rows_of_the_head(config):
    shape = memory.Shape(0, 0, vocabulary=1000, layers=2, hidden=30, inner=5, heads=1, key_value=6)
    assert [memory.candidates(shape, top_k) for top_k in (1, 50, 900)] == [33 * 180, 100 * 180, 1000 * 180]

    def writing(dtype):
        sampling = config.synthesis.model_copy(update={"batch_size": 100, "max_new_tokens": 8, "top_k": 50})
        llm = config.llm.model_copy(update={"dtype": dtype, "micro_batch_size": 1})
        changed = config.model_copy(update={"llm": llm, "synthesis": sampling})
        return memory.estimate(changed, shape, [shape], shape).parts["writing texts"]

    tokens = memory.TEXT_TOKENS + 8
    assert writing("float32") == 100 * (tokens * 2 * 6 * 4 + 2 * 1000 * 4)
    assert writing("bfloat16") == 100 * (tokens * 2 * 6 * 2 + 2 * 1000 * 4 + 100 * 180)


def test_full_fine_tuning_needs_more(config):
    shape = memory.Shape.of_config(MINILM, AutoModel)
    full, kept = (
        config.model_copy(update={"llm": config.llm.model_copy(update={"adapter": "full", "interpolation": share})})
        for share in (0.7, 1.0)
    )
    lora, whole, trained = (memory.estimate(each, shape, [shape], shape).parts["LLM"] for each in (config, full, kept))
    assert whole == 6 * shape.parameters * 4
    assert trained == 5 * shape.parameters * 4
    asked = kept.model_copy(update={"reward": kept.reward.model_copy(update={"llm_judges": True})})
    taught = kept.model_copy(
        update={
            "gate": kept.gate.model_copy(update={"enabled": True, "teach_refused": True}),
            "slm": kept.slm.model_copy(update={"llm_judges": False}),
        }
    )
    for each in (asked, taught):  # the original LLM is asked while the trained one waits
        assert memory.estimate(each, shape, [shape], shape).parts["LLM"] == whole
    assert lora == (2 * shape.parameters - shape.embedding) * 4


def test_memory_is_no_more_than_the_container_allows(monkeypatch):
    limits = {"memory.max": "5000\n", "memory.current": "2500\n", "memory.stat": "anon 1500\ninactive_file 500\n"}
    monkeypatch.setattr(memory.Path, "read_text", lambda path: limits[path.name])
    assert memory.available("cpu") == 3000  # what is only kept of files makes room
    limits["memory.max"] = "max\n"
    assert memory.available("cpu") > 10**6
    assert memory.available("mps") > 10**6  # it shares that of the processor
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (7, 9)}[device])
    assert memory.available("cuda:1") == 7


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ('[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}]', []),
        ('[{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]', []),
        ("[", ["modules.json: cannot be read"]),
    ],
)
def test_encoders_without_a_tokenizer_of_their_own_are_left_alone(tmp_path, modules, found):
    (tmp_path / "modules.json").write_text(modules)
    told = [finding.message for finding in doctor.sentence_encoder(str(tmp_path))]
    assert len(told) == len(found)
    assert all(words in message for words, message in zip(found, told, strict=True))
