"""A whole run with DP, canaries and the leak check, and its audit."""

import io
import json
import random
import re
import tomllib
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from conftest import BAD, GOOD, THINGS, tiny_llm
from rich.console import Console

from crosslm.cli import main as cli
from crosslm.cli.audit import overlap_table
from crosslm.client import Client
from crosslm.config import Config, FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.data.split import Split
from crosslm.errors import ConfigError, DataError, RunError
from crosslm.experiment import run_local
from crosslm.html_report import page
from crosslm.html_report.collect import RunView
from crosslm.models.batches import hold_out
from crosslm.models.slm import SLM
from crosslm.privacy.bounds import privacy_line
from crosslm.privacy.canaries import Canaries, draw_canaries
from crosslm.reproduce.figures import outcomes
from crosslm.runs.audit import Rows, _Audit, attack_rows, audit_run, figures_of, llm_exposures, slm_exposures
from crosslm.runs.finished import Run
from crosslm.runs.preparation import client_specs
from crosslm.runs.report import declined
from crosslm.runs.rundir import RunDir
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for


def rows(count, seed):
    draw = random.Random(seed)
    made = set()
    while len(made) < count:
        label = draw.choice(["good", "bad"])
        words = draw.choices(GOOD if label == "good" else BAD, k=2) + draw.choices(THINGS, k=2)
        made.add(f'"a {words[0]} {words[2]} and a {words[1]} {words[3]}.",{label}')
    return sorted(made)


@pytest.fixture
def private_run(settings, data_folder, tmp_path):
    """A run with all of ``[privacy]`` that can be together."""
    everything = rows(260, 0)
    random.Random(1).shuffle(everything)
    for name, part in (("train", everything[:120]), ("test", everything[120:])):
        (data_folder / f"{name}.csv").write_text("text,label\n" + "\n".join(part) + "\n")
    settings["data"]["judge_rows"] = 20
    fit = {"epochs": 2, "batch_size": 20, "learning_rate": 1e-3, "patience": 1}
    settings["slm"] |= {"private": fit, "models": settings["slm"]["models"][:1]}
    settings["privacy"] = {"epsilon": 8.0, "canaries": 2, "class_counts": "noisy"}
    run = tmp_path / "run"
    summary = run_local(Config.model_validate(settings), run, tmp_path / "cache")
    return run, summary


def test_a_private_run_tells_its_bound_and_is_audited(private_run, tmp_path, monkeypatch, capsys):
    run, summary = private_run
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    uploads = {event["client_id"]: event["metrics"] for event in events if event["event"] == "upload"}
    assert set(summary["privacy"]) == set(uploads) == {name for name in summary["slm"]["crosslm"] if name != "mean"}
    noisy = {event["client_id"]: event["class_counts"] for event in events if event["event"] == "upload"}
    assert {client: list(facts["rows"].values()) for client, facts in summary["clients"].items()} == noisy
    for client, bound in summary["privacy"].items():
        card = " ".join((run / "slm" / client / "README.md").read_text().split())
        assert "the rows of each label with noise, and training metrics) left the silo" in card
        assert "exact counts" not in card
        assert 7.9 < bound["epsilon"] == uploads[client]["dp/epsilon"] <= 8
        assert "loss" not in uploads[client]
        assert f"{client} {bound['epsilon']:.2f}" in privacy_line(summary)

    asked = []
    monkeypatch.setattr("crosslm.models.sources.cache_folder", lambda given: asked.append(given) or given)
    monkeypatch.setattr("sys.argv", ["crosslm", "audit", str(run), "--shadows", "2", "--cache-dir", str(tmp_path)])
    cli.app(standalone_mode=False)
    out = capsys.readouterr().out
    assert asked == [str(tmp_path)]
    assert "Membership inference" in out
    assert "Canaries" in out
    figures = json.loads((run / "audit.json").read_text())
    for client, parts in figures["clients"].items():
        membership = parts["membership"]
        assert set(membership["attacks"]) == {"loss", "calibrated loss", "LiRA, 2 shadow models"}
        for attack in membership["attacks"].values():
            assert attack["auc_interval"][0] <= attack["auc"] <= attack["auc_interval"][1]
        assert membership["others"] <= membership["members"]
        assert len(parts["canaries"]["slm_exposure"]) == len(parts["canaries"]["llm_exposure"]) == 2
        assert 0 <= parts["canaries"]["most_shared_words_in_texts"] < 8
        uploaded = SLM.load_trained(str(run / "uploads" / client))
        returned = SLM.load_trained(str(run / "slm" / client))
        text = ["a good day"]
        assert not torch.equal(uploaded.predict_proba(text), returned.predict_proba(text))

    (run / "uploads" / client).rename(run / "elsewhere")
    with pytest.raises(RunError, match="did not keep what the client uploaded"):
        audit_run(RunDir.open(run), tmp_path)
    for shadows in (3, -2):
        with pytest.raises(RunError, match=f"--shadows must be 0 or more, and even, found {shadows}"):
            audit_run(RunDir.open(run), tmp_path, shadows)


@pytest.mark.parametrize("file", ["train.csv", "test.csv"])
def test_data_files_that_have_changed_are_noticed(config, data_folder, tmp_path, shell, file):
    """Other rows would count as members, or be measured as if they were those of the run."""
    folder = tmp_path / "run"
    run_local(config, folder, tmp_path)
    _Audit(RunDir.open(folder), tmp_path, 0, None)
    assert "warning" not in shell("evaluate", folder)[1]
    lines = (data_folder / file).read_text().splitlines()
    (data_folder / file).write_text("\n".join([*lines[:-1], "a new and good row.,good"]) + "\n")
    code, _, err = shell("audit", folder)
    assert code == 2
    assert f"{folder}: the data files have changed since this run was made" in err
    assert not (folder / "audit.json").exists()
    code, out, err = shell("evaluate", folder)
    assert (code, err) == (0, "")
    assert f"warning: {folder}: the data files have changed since this run was made" in out
    summary = json.loads((folder / "summary.json").read_text())
    del summary["inputs"]  # of an earlier version
    (folder / "summary.json").write_text(json.dumps(summary))
    _Audit(RunDir.open(folder), tmp_path, 0, None)
    assert "warning" not in shell("evaluate", folder)[1]


@pytest.mark.parametrize("how", ["hidden", "exact"])
@pytest.mark.parametrize("bounded", [{"epsilon": 8.0, "trained_layers": 0}, {}], ids=["DP", "no DP"])
def test_hidden_counts_are_in_no_file_of_the_run(settings, data_folder, tmp_path, how, bounded):
    """Nor that a client has rows of one label only, which its classifier may or may not show."""
    settings["data"].pop("train")
    one = [f"a {good} {thing},good" for good in GOOD for thing in THINGS][:37]
    (data_folder / "one.csv").write_text("\n".join(["text,label", *one]) + "\n")
    settings["clients"] = [{"id": "a", "train": "one.csv"}]
    settings["privacy"] = bounded | ({"class_counts": how} if bounded else {"hide_counts": how == "hidden"})
    summary = run_local(Config.model_validate(settings), tmp_path / "run", tmp_path / "cache")
    run, told = RunDir.open(tmp_path / "run"), how == "exact"
    (upload,) = [event for event in run.events() if event["event"] == "upload"]
    assert list(summary["clients"]["a"]["rows"].values()) == upload["class_counts"] == ([0, 37] if told else [0, 0])
    card = " ".join((run.path / "slm" / "a" / "README.md").read_text().split())
    assert ("| private training rows | bad 0, good 37 |" in card) == told
    assert ("the rows of each label stand above" in card) == told
    assert ("how many rows there are of each label did not" in card) != told
    assert ("exact counts of rows of each label are not covered by it" in card) == (told and bool(bounded))
    kept = [page.render([RunView.read(run)])]
    kept += [path.read_text() for path in run.path.rglob("*") if path.suffix in (".json", ".jsonl", ".md", ".toml")]
    assert any("all 37 rows are 'good'" in text for text in kept) == told
    assert any("All 37 private rows are" in text for text in kept) == told
    assert any("good 37" in text for text in kept) == told


def test_a_leak_stops_the_return_in_a_run(settings, data_folder, tmp_path, monkeypatch, command):
    """With the SLM's texts taken for private ones, no client takes its SLM back, and the run says so."""
    settings["privacy"] = {"max_shared_words": 1}
    sent = []
    install = Client.install
    monkeypatch.setattr(
        Client, "install", lambda self, download: sent.append(download.texts) or install(self, download)
    )
    monkeypatch.setattr("crosslm.privacy.leaks.longest_shared", lambda texts, private: [9] * len(texts))
    summary = run_local(Config.model_validate(settings), tmp_path / "run", tmp_path / "cache")
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stopped = [event["error"] for event in events if event["event"] == "failure"]
    assert len(stopped) == len(sent) == 4  # at once and in the end
    reason = "LeakError: 6 of 6 synthetic texts share more than 1 words"
    assert all(error.startswith(reason) for error in stopped)
    for client in ("client-0", "client-1"):
        decision = summary["clients"][client]["decision"]
        assert not decision["accepted"]
        assert decision["refused"].startswith(reason)
        assert "stays in use. CrossLM's figure is of the one that came back" in declined(summary)[client]
        assert Run.open(tmp_path / "run").kept_its_own(client)
        assert command("predict", tmp_path / "run", data_folder / "test.csv", "--client", client)[2].count(reason) == 1
        correct = {"slm/standalone/" + client: "01", "slm/crosslm/" + client: "11", "slm/data_free_kd/" + client: "00"}
        kept = outcomes({"correct": correct, "clients": summary["clients"]})[client]
        assert kept == ("01", "00", "01", "11")  # so what it gained is nothing
    kept = [json.loads(line) for line in (tmp_path / "run/synthetic/step-0001-pool.jsonl").read_text().splitlines()]
    assert sorted(sent[0]) == sorted(row["text"] for row in kept if row["kept"])  # what came is what trained it


def test_the_attacked_rows_are_disjoint_and_have_the_members_labels():
    members = Examples([f"m{place}" for place in range(40)], [0] * 30 + [1] * 10)
    pool = Examples([f"p{place}" for place in range(200)], [0, 1] * 100)
    split = attack_rows(members, pool, 0)
    assert split.others.class_counts(2) == split.reference.class_counts(2) == [30, 10]
    assert not set(split.others.texts) & set(split.reference.texts)
    scarce = attack_rows(members, pool.take(range(60)), 0)  # 30 of each label: half of what members would want
    assert scarce.others.class_counts(2) == [15, 5]
    with pytest.raises(DataError, match="an audit needs 20 private rows and 40 held-out ones"):
        attack_rows(members, pool.take(range(20)), 0)


def test_others_are_rows_that_no_client_has():
    private = {"north": Examples(["x", "y"], [0, 1]), "south": Examples(["z"], [0])}
    tests = {"north": Examples(["x", "z", "t"], [0, 0, 1])}
    split = Split(private, tests, Examples([], []), judge=Examples(["y", "j", "t"], [1, 0, 0]))
    assert _Audit._held_out(SimpleNamespace(split=split), "north") == Examples(["t", "j"], [1, 0])


def test_an_overfitted_classifier_is_found_out_and_a_fresh_one_is_not(models):
    """Labels at random: nothing can be known of them but by having seen them."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(GOOD + BAD + THINGS, k=6)) for _ in range(120)]
    labels = [draw.randrange(2) for _ in texts]
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    found = []
    for epochs in (0, 40):
        if epochs:
            fit = FitConfig(epochs=epochs, batch_size=10, learning_rate=3e-3)
            slm.fit(Examples(texts[:60], labels[:60]), fit, 0)
        probabilities = slm.predict_proba(texts)
        loss = -probabilities[torch.arange(120), torch.tensor(labels)].log()
        found.append(figures_of(-loss[:60], -loss[60:], 0))
    assert found[0]["auc_interval"][0] < 0.5 < found[0]["auc_interval"][1]
    assert found[1]["auc_interval"][0] > 0.6


def at_random(count, seed):
    """Texts whose labels nobody can know but by having seen them."""
    draw = random.Random(seed)
    texts = list({" ".join(draw.choices(GOOD + BAD + THINGS, k=6)): None for _ in range(count)})
    return Examples(texts, [draw.randrange(2) for _ in texts])


def test_every_attack_finds_the_members_of_an_overfitted_upload(settings, tmp_path):
    """Each points the right way: what it gives a high score was trained on."""
    settings["slm"] |= {"models": settings["slm"]["models"][:1]}
    settings["slm"]["private"] = {"epochs": 20, "batch_size": 10, "learning_rate": 3e-3, "patience": 0}
    config, rows = Config.model_validate(settings), at_random(90, 1)
    audit = object.__new__(_Audit)  # without a run
    audit.config, audit.shadows, audit.cache, audit.progress = config, 2, tmp_path, Progress()
    audit.specs = client_specs(config, ["client-0"])
    members, others = rows.take(range(30)), rows.take(range(30, 60))
    reference = rows.take(range(60, 70))  # of more rows with labels at random it would learn more that means nothing
    slm = SLM.of_spec(config.slm.models[0].model, config.slm.models[0], config, 0)
    slm.fit(members, config.slm.private, 7)
    found = audit._membership("client-0", slm, Rows(members, others, reference))
    assert found["train_accuracy"] > 0.9
    assert set(found["attacks"]) == {"loss", "calibrated loss", "LiRA, 2 shadow models"}
    for name, figures in found["attacks"].items():
        assert figures["auc"] > 0.7, name
        assert figures["auc_interval"][0] > 0.5, name


def test_exposure_in_an_slm_rises_with_what_it_learned(models):
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    drawn = draw_canaries(slm.tokenizer, 2, 4, 255, 0)
    before = slm_exposures(slm, drawn)
    noise = at_random(40, 2)
    texts, labels = drawn.planted.texts + noise.texts, drawn.planted.labels + noise.labels
    slm.fit(Examples(texts, labels), FitConfig(epochs=30, batch_size=8, learning_rate=3e-3), 0)
    after = slm_exposures(slm, drawn)
    assert sum(before) / 4 < 2.5
    assert sum(after) / 4 > sum(before) / 4 + 1
    assert max(after) <= 8
    swapped = Canaries(Examples(drawn.planted.texts, [1 - label for label in drawn.planted.labels]), drawn.others)
    assert max(slm_exposures(slm, swapped)) < min(after)  # with the other label it has learned the contrary


def test_exposure_in_the_llm_rises_with_what_it_learned(models, task):
    llm = tiny_llm(models, "gpt2")
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    drawn = draw_canaries(slm.tokenizer, 2, 4, 63, 0)
    assert llm_exposures(llm, task, drawn) == [0.0] * 4  # it is the original: all gain alike, and ties count as better
    optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=1e-2)
    rows = [
        llm.encode(task.prompt(label, 0) + text)
        for text, label in zip(drawn.planted.texts, drawn.planted.labels, strict=True)
    ]
    for _ in range(40):
        optimizer.zero_grad()
        logps, mask = llm.logps(rows)
        (-(logps * mask).sum() / mask.sum()).backward()
        optimizer.step()
    assert min(llm_exposures(llm, task, drawn)) > 4
    fresh = Canaries(Examples(drawn.others[:4], drawn.planted.labels), drawn.others[4:])
    assert sum(llm_exposures(llm, task, fresh)) / 4 < 3.5  # sentences that it did not see


def test_the_held_out_rows_are_no_members(models, monkeypatch):
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    texts = [f"a {word} day" for word in GOOD + BAD]
    fit = FitConfig(epochs=1, patience=1, holdout_fraction=0.25)
    encoded = []
    original = slm.encode
    monkeypatch.setattr(slm, "encode", lambda rows: encoded.append(list(rows)) or original(rows))
    slm.fit(Examples(texts, [0, 1] * 8), fit, 5)
    trained, held = hold_out(16, 0.25, torch.Generator().manual_seed(5))
    assert encoded[0] == [texts[place] for place in trained]
    assert sorted(trained + held) == list(range(16))
    assert len(held) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 0}, "greater than 0"),
        ({"delta": 1}, "less than 1"),
        ({"epsilon": 0.4, "class_counts": "noisy"}, r"count_epsilon = 0\.5 leaves nothing of epsilon = 0\.4"),
        ({"eps": 1}, "Extra inputs"),
    ],
)
def test_an_impossible_budget_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PrivacyConfig.model_validate(given)


def test_a_run_without_opacus_stops_before_a_model_is_loaded(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    settings["privacy"] = {"epsilon": 1.0}
    with pytest.raises(ConfigError, match=r"crosslm\[privacy\]"):
        run_local(Config.model_validate(settings), tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_canaries_are_never_held_out():
    for seed in range(20):
        trained, held = hold_out(20, 0.25, torch.Generator().manual_seed(seed), canaries=8)
        assert len(held) == 5
        assert max(held) < 12
        assert sorted(trained + held) == list(range(20))


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("accept", [True, False])
def test_the_members_are_the_rows_that_were_trained_on(settings, tmp_path, monkeypatch, patience, accept):
    """What a client holds out, to accept an SLM or to stop by, is no member; its canaries are all trained on."""
    fit = {"epochs": 1, "batch_size": 8, "holdout_fraction": 0.2, "patience": patience}
    settings["slm"] |= {"private": fit, "models": settings["slm"]["models"][:1]}
    settings |= {"acceptance": {"enabled": accept}, "privacy": {"canaries": 3}, "federation": {"participations": 2}}
    config, seen = Config.model_validate(settings), {}
    epoch, fitted = SLM._epoch, []

    def spied(slm, rows, *arguments):
        fitted.append(slm.tokenizer.batch_decode(rows, skip_special_tokens=True))
        return epoch(slm, rows, *arguments)

    def train(client):
        fitted.clear()
        made = original(client)
        seen.setdefault(client.id, set()).update(text for texts in fitted for text in texts)
        return made

    original = Client.train
    monkeypatch.setattr(SLM, "_epoch", spied)
    monkeypatch.setattr(Client, "train", train)
    run_local(config, tmp_path / "run", tmp_path / "cache")
    audit = _Audit(RunDir.open(tmp_path / "run"), tmp_path / "cache", 0, None)
    for client, texts in seen.items():
        slm = SLM.load_trained(str(tmp_path / "run" / "uploads" / client))
        private = audit.split.private[client]
        members = audit._trained_on(client)
        canaries = draw_canaries(slm.tokenizer, 2, 3, 0, seed_for(config.seed, "canaries", client)).planted
        expected = slm.tokenizer.batch_decode(slm.encode(members.texts + canaries.texts), skip_special_tokens=True)
        assert texts == set(expected)
        if not (patience or accept):
            assert len(members) == len(private)


class Same:
    """Two texts are near if they are the same."""

    def __init__(self):
        self.places = {}

    def encode(self, texts):
        places = [self.places.setdefault(text, len(self.places)) for text in texts]
        return torch.eye(1000)[places]


def test_a_copy_of_any_private_row_is_overlap(private_run, tmp_path, monkeypatch):
    """Of the last one too, however few rows there are to compare with."""
    audit = _Audit(RunDir.open(private_run[0]), tmp_path, 0, None)
    client, private = next(iter(audit.split.private.items()))
    few = Rows(private, audit.split.test.take(range(20)), audit.split.judge)
    encoder = Same()
    for place in (0, len(private) - 1):
        row = private.texts[place]
        monkeypatch.setattr(audit, "_synthetic", lambda row=row: [("x", "quite another text", True), ("x", row, True)])
        found = audit._overlap(client, few, encoder)
        assert {name: part["rows"] for name, part in found.items() if name != "texts"} == {
            "private": len(private),
            "private sample": 20,
            "held out": 20,
        }
        assert found["private"]["nearest_similarity"] == 1
        assert found["private"]["longest_shared_words"] == 7
        assert found["held out"]["nearest_similarity"] == 0
    assert len(private) > 40
    monkeypatch.setattr(audit, "_synthetic", lambda: [("x", row, True) for row in private.texts])
    sample = audit._overlap(client, few, encoder)["private sample"]
    assert sample["mean_similarity"] == pytest.approx(20 / len(private))
    out = Console(file=io.StringIO(), width=200)
    out.print(overlap_table({"clients": {client: {"overlap": audit._overlap(client, few, encoder)}}}))
    assert re.search(rf"private +│ {len(private)} ", out.file.getvalue())


def test_where_no_text_was_selected_there_is_no_overlap(private_run, tmp_path, monkeypatch):
    audit = _Audit(RunDir.open(private_run[0]), tmp_path, 0, None)
    client, private = next(iter(audit.split.private.items()))
    monkeypatch.setattr(audit, "_synthetic", lambda: [("x", "a text", False)])
    found = audit._overlap(client, Rows(private, audit.split.test.take(range(20)), audit.split.judge), Same())
    assert found == {"texts": 0}
    assert overlap_table({"clients": {client: {"overlap": found}}}).row_count == 0


def test_the_attackers_models_are_trained_like_a_private_slm(private_run, tmp_path, monkeypatch):
    """Under DP on the same layers, and no shadow model holds rows of its half out."""
    run, _ = private_run
    config = tomllib.loads((run / "config.toml").read_text())
    config["privacy"] |= {"trained_layers": 0, "center": True}
    (run / "config.toml").write_text(tomli_w.dumps(config))
    audit = _Audit(RunDir.open(run), tmp_path, 2, None)
    client, fits = next(iter(audit.specs)), []
    fit = SLM.fit

    def spied(slm, rows, config, *arguments):
        trained = [name for name, parameter in slm.model.named_parameters() if parameter.requires_grad]
        fits.append((config.patience, trained, len(slm.model.classifier._forward_pre_hooks)))
        return fit(slm, rows, config, *arguments)

    monkeypatch.setattr(SLM, "fit", spied)
    slm = audit._uploaded(client)
    audit._membership(client, slm, attack_rows(audit._trained_on(client), audit._held_out(client), 0))
    assert fits == [(0, ["classifier.weight", "classifier.bias"], 1)] * 3
    fits.clear()
    audit.config = audit.config.model_copy(update={"privacy": PrivacyConfig()})
    audit._membership(client, slm, attack_rows(audit._trained_on(client), audit._held_out(client), 0))
    assert [patience for patience, _, _ in fits] == [1, 0, 0]
    assert all(len(trained) > 2 and not hooks for _, trained, hooks in fits)
