"""The privacy budget over uploads whose settings or rows differ, in one process and at a silo; what is off under DP."""

import dataclasses
import random
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import BAD, GOOD, sentences
from opacus.accountants import RDPAccountant

from crosslm.client import Client
from crosslm.config import AcceptanceConfig, Config, FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, StoppedError, UploadError
from crosslm.experiment import run_local
from crosslm.federation.intake import Intake
from crosslm.federation.kits import SiloSettings
from crosslm.models.slm import SLM
from crosslm.preflight import rows
from crosslm.privacy.accounting import Mechanism, Spent, check_budget, plan
from crosslm.privacy.bounds import privacy_line, privacy_summary, uploads_told
from crosslm.privacy.leaks import LeakCheck
from crosslm.privacy.private_fit import PrivateTraining
from crosslm.records import Download
from crosslm.runs.preparation import prepare
from crosslm.runs.rollback import roll_back
from crosslm.runs.rundir import RunDir

EXAMPLES = Examples(sentences(BAD) + sentences(GOOD), [0] * 40 + [1] * 40)
FIT = FitConfig(epochs=2, batch_size=20, learning_rate=1e-3)


@pytest.fixture
def slm(models):
    return SLM.load(str(models / "bert"), ("bad", "good"), 32, 0, freeze_embeddings=True)


def training(metrics=(), uploads=2, told=None, **privacy):
    made = PrivateTraining(
        PrivacyConfig(**({"epsilon": 8.0, "trained_layers": 0} | privacy)), uploads, random.Random(0)
    )
    made.go_on(metrics, told)
    return made


def upload(slm, metrics=(), rows=EXAMPLES, fit=FIT, uploads=2, **privacy):
    return training(metrics, uploads, **privacy).fit(slm, rows, fit, 0, lambda _: None)


def true_epsilon(uploads):
    """As Opacus counts, one step after the other, each upload by what its own metadata says."""
    accountant = RDPAccountant()
    for told in uploads:
        for _ in range(int(told["dp/steps"])):
            accountant.step(noise_multiplier=told["dp/noise_multiplier"], sample_rate=told["dp/sample_rate"])
        for _ in range(int(told["dp/means"])):
            accountant.step(noise_multiplier=told["dp/noise_multiplier"], sample_rate=1.0)
    return accountant.get_epsilon(1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": EXAMPLES.take(range(30, 60))},
        {"fit": FIT.model_copy(update={"epochs": 5})},
        {"epsilon": 12.0},
        {"center": True},
        {"uploads": 4},
        {},
    ],
    ids=["rows", "fit", "epsilon", "center", "uploads", "nothing"],
)
def test_what_changes_between_uploads_is_composed_as_it_was(slm, change):
    first = upload(slm)
    second = upload(slm, [first], **change)
    budget = change.get("epsilon", 8.0)
    assert first["dp/epsilon"] == pytest.approx(true_epsilon([first]))
    assert second["dp/epsilon"] == pytest.approx(true_epsilon([first, second]))
    assert second["dp/epsilon"] <= budget
    assert (second["dp/noise_multiplier"] == first["dp/noise_multiplier"]) == (not change)
    if change.get("uploads", 2) == 2:
        assert second["dp/epsilon"] > budget - 0.011  # all of it is used


def test_one_upload_more_than_was_planned_is_refused_unless_the_budget_is_raised(slm):
    first = upload(slm, uploads=1)
    assert first["dp/epsilon"] > 7.98
    with pytest.raises(
        ConfigError, match=r"privacy\.epsilon = 8\.0 is spent: the 1 upload\(s\) so far cost (7\.99|8\.00) of"
    ):
        upload(slm, [first], uploads=2)
    second = upload(slm, [first], uploads=2, epsilon=10.0)
    assert second["dp/epsilon"] == pytest.approx(true_epsilon([first, second]))
    assert 9.98 < second["dp/epsilon"] <= 10


def test_a_training_that_fails_has_spent_its_part(slm, monkeypatch):
    made = training()

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("crosslm.privacy.private_fit.dp_sgd", fails)
    with pytest.raises(MemoryError):
        made.fit(slm, EXAMPLES, FIT, 0, lambda _: None)
    monkeypatch.setattr("crosslm.privacy.private_fit.dp_sgd", lambda *_: None)  # what it learns costs nothing
    told = made.fit(slm, EXAMPLES, FIT, 0, lambda _: None)
    assert told["dp/epsilon"] == pytest.approx(true_epsilon([told, told]))
    with pytest.raises(ConfigError, match=r"was set for 2 upload\(s\) and is spent"):
        made.fit(slm, EXAMPLES, FIT, 0, lambda _: None)


def test_a_small_budget_is_not_taken_for_a_spent_one(slm):
    first = upload(slm, epsilon=0.12)
    assert upload(slm, [first], epsilon=0.12)["dp/epsilon"] <= 0.12


def test_an_upload_without_dp_before_leaves_no_bound(slm):
    with pytest.raises(ConfigError, match=r"upload 1 of this client was made without privacy\.epsilon"):
        upload(slm, [{"loss": 0.5, "epochs": 2.0}])
    events = [
        {"event": "upload", "client_id": client, "metrics": metrics}
        for client, metrics in (
            ("a", {"dp/epsilon": 1.0, "dp/delta": 0.1}),
            ("a", {"loss": 1.0}),
            ("b", {"dp/epsilon": 1.0, "dp/delta": 0.1}),
            ("b", {"dp/epsilon": 2.0, "dp/delta": 0.1}),
            ("c", {"dp/x": 1.0}),  # a silo may send what names it likes
        )
    ]
    bounds = privacy_summary(uploads_told(events))
    assert bounds == {"b": {"epsilon": 2.0, "delta": 0.1}}
    clients = {"b": {"rows": {"bad": 0, "good": 0}}, "c": {"rows": {"bad": 1, "good": 1}}}
    assert "b 2.00 (delta 0.1); no bound for c." in privacy_line({"privacy": bounds, "clients": clients})


def test_the_line_says_what_is_outside_the_bound():
    def line(rows, **more):
        clients = {name: {"rows": {"bad": 0, "good": count}} for name, count in rows.items()}
        bound = {"epsilon": 2.0, "delta": 1e-5}
        bounds = dict.fromkeys(rows, bound) | more.pop("privacy", {})
        return privacy_line({"privacy": bounds, "clients": clients} | more)

    start = "Private rows: DP-SGD, epsilon of all uploads together"
    assert line({"a": 0}) == f"{start} a 2.00 (delta 1e-05)."
    assert line({"a": 3}) == f"{start} a 2.00 (delta 1e-05); exact class counts are outside it."
    two = f"{start} a 2.00, b 2.00 (delta 1e-05)"
    assert line({"a": 3, "b": 0}) == f"{two}; exact class counts of a are outside it."
    noisy = {"a": {"epsilon": 2.0, "delta": 1e-5, "count_epsilon": 0.5}}
    assert line({"a": 3}, privacy=noisy) == f"{start} a 2.00 (delta 1e-05)."  # they are within it
    used = (
        "Private rows: DP-SGD, epsilon of all uploads that were used together a 2.00 (delta 1e-05), as the silo says."
    )
    assert line({"a": 0}, engine="flower") == used
    one = "The run that it was rolled back from, x, has an epsilon of its own, and the two add up."
    both = "The runs that it was rolled back from, x, y, have epsilons of their own; all add up."
    for earlier, said in ((["x"], one), ("x", one), (["x", "y"], both)):
        assert line({"a": 0}, rolled_back_from=earlier) == f"{start} a 2.00 (delta 1e-05). {said}"


def test_an_upload_that_was_refused_after_it_had_left_is_in_the_bound(settings, tmp_path, monkeypatch):
    settings["slm"]["models"] = settings["slm"]["models"][:1]
    settings |= {"privacy": {"epsilon": 8.0, "trained_layers": 0}, "federation": {"participations": 2}}
    upload, seen = Intake.upload, []

    def only_the_first(intake, data, client_id):
        seen.append(client_id)
        if seen.count(client_id) > 1:
            raise UploadError(f"client {client_id}: its weights are not finite")
        return upload(intake, data, client_id)

    monkeypatch.setattr(Intake, "upload", only_the_first)
    config, run = Config.model_validate(settings), RunDir(tmp_path / "run")
    summary = run_local(config, run.path, tmp_path / "cache")
    told = {client: metrics[-1]["dp/epsilon"] for client, metrics in uploads_told(run.events()).items()}
    assert told.keys() == summary["privacy"].keys()
    for client, bound in summary["privacy"].items():
        assert 7.98 < bound["epsilon"] <= 8
        assert told[client] < bound["epsilon"]


def test_after_a_rollback_the_earlier_runs_epsilon_is_named(settings, tmp_path):
    settings["slm"]["models"] = settings["slm"]["models"][:1]
    settings["privacy"] = {"epsilon": 8.0, "trained_layers": 0}
    config, cache = Config.model_validate(settings), tmp_path / "cache"
    assert "rolled_back_from" not in run_local(config, tmp_path / "run", cache)
    first = next(event["client"] for event in RunDir(tmp_path / "run").events() if event["event"] == "step")
    roll_back(RunDir.open(tmp_path / "run"), first, tmp_path / "back")
    summary = run_local(config, tmp_path / "back", cache, resume=True)
    said = "The run that it was rolled back from, run, has an epsilon of its own, and the two add up."
    assert privacy_line(summary).endswith(said)
    (other,) = set(summary["privacy"])
    assert said in (tmp_path / "back" / "slm" / other / "README.md").read_text()
    assert said not in (tmp_path / "run" / "slm" / other / "README.md").read_text()


@pytest.mark.parametrize(("delta", "verdict"), [(1 / 80, "error"), (0.5, "error"), (0.002, "doubt"), (0.001, None)])
def test_a_delta_that_means_nothing_is_refused(settings, tmp_path, delta, verdict):
    privacy = PrivacyConfig(epsilon=8, delta=delta)
    assert PrivacyConfig(delta=delta).check_delta(80, "client a") is None  # nothing is bounded
    if verdict == "error":
        message = rf"client a: privacy\.delta = {delta:g} with 80 rows: it must be below .*; set it to 0\.0001 or less"
        with pytest.raises(ConfigError, match=message):
            privacy.check_delta(80, "client a")
        with pytest.raises(ConfigError, match=r"privacy\.delta = .* with 80 rows"):
            plan(80, FIT, privacy, 1)
    else:
        doubt = privacy.check_delta(80, "client a")
        assert (doubt is not None and "with 80 rows is not well below one" in doubt) == (verdict == "doubt")
    settings["privacy"] = {"epsilon": 8.0, "delta": delta}  # 25 rows a client
    config, wrong = Config.model_validate(settings), delta >= 1 / 25
    with pytest.raises(ConfigError, match="client client-0") if wrong else nullcontext():
        warnings = prepare(config, tmp_path / "cache", lambda _: None).split.warnings
        assert len(warnings) == (2 if delta > 0.1 / 25 else 0)
    found = [finding for finding, _ in rows.data(config, {}) if finding.subject == "privacy"]
    assert [finding.level for finding in found] == ["error" if wrong else "warning"] * (2 if delta > 0.1 / 25 else 0)


def test_a_budget_that_no_noise_keeps_is_refused_before_a_run(settings, tmp_path):
    tight = PrivacyConfig(epsilon=0.01)
    said = (
        r"client a: privacy\.epsilon = 0\.01 cannot be kept: .*privacy\.delta = 1e-05 no noise brings that below 0\.1"
    )
    with pytest.raises(ConfigError, match=said):
        check_budget(80, FIT, tight, 1, "client a")
    with pytest.raises(ConfigError, match=said.removeprefix("client a")):
        plan(80, FIT, tight, 1)
    assert check_budget(80, FIT, PrivacyConfig(epsilon=8, delta=1e-6), 1, "client a") is None
    assert check_budget(80, FIT, PrivacyConfig(), 1, "client a") is None
    settings["privacy"] = {"epsilon": 0.01}
    config = Config.model_validate(settings)
    with pytest.raises(ConfigError, match=r"client client-0: privacy\.epsilon = 0\.01 cannot be kept"):
        prepare(config, tmp_path / "cache", lambda _: None)
    found = [finding for finding, _ in rows.data(config, {}) if finding.subject == "privacy"]
    assert [finding.level for finding in found] == ["error", "error"]


def test_the_budget_is_looked_at_for_all_uploads_before_a_run(settings, tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr("crosslm.runs.preparation.check_budget", lambda *given: looked_at.append(given[3:]))
    settings["federation"] = {"participations": 3}
    prepare(Config.model_validate(settings), tmp_path / "cache", lambda _: None)
    assert looked_at == [(3, "client client-0"), (3, "client client-1")]


def test_counts_that_were_told_stay_paid_for(slm):
    noisy = {"class_counts": "noisy", "count_epsilon": 1.0}
    before = training(**noisy)
    told, first = before.class_counts((40, 40)), before.fit(slm, EXAMPLES, FIT, 0, lambda _: None)
    assert first["dp/count_epsilon"] == 1.0
    second = upload(slm, [first], told=told, class_counts="hidden")
    assert second["dp/epsilon"] == pytest.approx(true_epsilon([first, second]) + 1.0)
    assert second["dp/epsilon"] <= 8
    again = training([first], told=told, class_counts="noisy", count_epsilon=2.0)
    assert again.class_counts((40, 40)) == told  # and not drawn again
    assert again.fit(slm, EXAMPLES, FIT, 0, lambda _: None)["dp/count_epsilon"] == 1.0
    fresh = training([upload(slm)], told=(0, 0), class_counts="noisy")
    assert fresh.class_counts((4000, 4000)) != (0, 0)  # none were told, so they are drawn now


def test_a_plan_from_metadata_is_the_one_that_was_told():
    mechanism = Mechanism(3.5, 0.25, 8, 1)
    assert Spent.of([mechanism.told()]).uploads == (mechanism,)
    older = {name: value for name, value in mechanism.told().items() if name != "dp/means"}
    assert Spent.of([older]).uploads == (mechanism,)  # a mean may have been there
    fresh = plan(80, FIT, PrivacyConfig(epsilon=8), 1)
    assert fresh.epsilon(1e-5) <= 8


def test_what_the_document_says_of_a_row_that_is_replaced():
    """Sums move by twice the clip then, so it is the same as half the noise where every row is in every batch."""
    text = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text()
    example = tomllib.loads(text.split("## DP-SGD\n\n```toml\n")[1].split("```")[0])
    privacy, fit = PrivacyConfig(**example["privacy"]), FitConfig(**example["slm"]["private"])
    made = plan(200, fit, privacy, 1)
    assert made.sample_rate == 1
    accountant = RDPAccountant()
    for _ in range(made.steps + made.means):
        accountant.step(noise_multiplier=made.noise_multiplier / 2, sample_rate=1.0)
    assert f"are epsilon {accountant.get_epsilon(privacy.delta):.1f} for a row replaced" in " ".join(text.split())


def test_metadata_that_is_lost_stops_the_client(slm):
    client = Client("north", EXAMPLES, slm, FIT, 0, privacy=training())
    first = client.train()
    with pytest.raises(ConfigError, match=r"client north: 1 upload\(s\) were made and the metadata of 0 is kept"):
        client.restore(first.slm, 1, first.class_counts, [])
    client.restore(first.slm, 1, first.class_counts, [first.metrics])
    second = client.train()
    assert second.metrics["dp/epsilon"] == pytest.approx(true_epsilon([first.metrics, second.metrics]))


def test_there_is_no_acceptance_under_dp(settings, slm):
    """The preset leaves it off then, and who asks for both is told why it cannot be."""
    assert Config.model_validate(settings).acceptance.enabled
    private = settings | {"privacy": {"epsilon": 8.0}}
    config = Config.model_validate(private)
    assert not config.acceptance.enabled
    assert config.gate == Config.model_validate(settings).gate  # nothing else of the preset is left out
    assert not Config.model_validate(settings | {"privacy": PrivacyConfig(epsilon=8)}).acceptance.enabled
    assert Config.model_validate(config.model_dump()) == config
    both = {"privacy": {"epsilon": 8.0}, "acceptance": {"enabled": True}}
    with pytest.raises(ValueError, match=r"acceptance\.enabled = true cannot be with privacy\.epsilon"):
        Config.model_validate(settings | both)
    kit = {"id": "a", "experiment": "e", "server": "h:1", "labels": ["bad", "good"], "data": {"train": "a.csv"}}
    kit |= {"slm": {"model": "m"}}
    SiloSettings.model_validate(kit | {"privacy": {"epsilon": 8.0}})
    with pytest.raises(ValueError, match=r"acceptance\.enabled = true cannot be with privacy\.epsilon"):
        SiloSettings.model_validate(kit | both)
    with pytest.raises(ConfigError, match=r"client a: .*acceptance\.enabled = true cannot be"):
        Client("a", EXAMPLES, slm, FIT, 0, acceptance=AcceptanceConfig(enabled=True), privacy=training())


def test_there_is_no_leak_check_under_dp(settings, slm):
    """A server could choose the texts, and would hear whether they are like private ones."""
    for check in ({"max_shared_words": 8}, {"max_similarity": 0.9}):
        assert Config.model_validate(settings | {"privacy": check}).privacy.checks_leaks
        with pytest.raises(ValueError, match="max_shared_words and max_similarity cannot be with epsilon"):
            Config.model_validate(settings | {"privacy": {"epsilon": 8.0} | check})
    leaks = LeakCheck(EXAMPLES.texts, PrivacyConfig(max_shared_words=8), None)
    with pytest.raises(ConfigError, match=r"client a: give it no leak check; .*cannot be with epsilon"):
        Client("a", EXAMPLES, slm, FIT, 0, privacy=training(), leaks=leaks)
    Client("a", EXAMPLES, slm, FIT, 0, leaks=leaks)


def test_under_dp_whatever_comes_back_is_installed_and_the_next_upload_starts_there(settings, slm):
    """So nothing of the private rows but the noisy weights decides what the server sees next."""
    client = Client(
        "a",
        EXAMPLES,
        slm,
        FIT,
        0,
        acceptance=Config.model_validate(settings | {"privacy": {"epsilon": 8.0}}).acceptance,
        privacy=training(),
    )
    first = client.train()
    zeros = {name: value * 0 for name, value in first.slm.weights.items()}
    decision = client.install(Download("a", 0, 1, {}, dataclasses.replace(first.slm, weights=zeros)))
    assert decision.accepted
    assert decision.rows == 0


def test_a_run_that_is_gone_on_with_counts_what_it_had_spent(settings, tmp_path):
    """Each go meets new clients, whose budget begins with the uploads of the checkpoint."""
    settings["slm"]["models"] = settings["slm"]["models"][:1]
    settings |= {"privacy": {"epsilon": 8.0, "trained_layers": 0}, "federation": {"participations": 2}}
    config, run = Config.model_validate(settings), tmp_path / "run"
    arrivals = iter([False, False, False, True])  # after three of four
    with pytest.raises(StoppedError):
        run_local(config, run, tmp_path / "cache", stop_requested=lambda: next(arrivals))
    summary = run_local(config, run, tmp_path / "cache", resume=True)
    uploads = [event for event in RunDir.open(run).events() if event["event"] == "upload"]
    assert len(uploads) == 4
    for client, bound in summary["privacy"].items():
        told = [event["metrics"] for event in uploads if event["client_id"] == client]
        assert len(told) == 2
        assert bound["epsilon"] == pytest.approx(true_epsilon(told))
        assert 7.98 < bound["epsilon"] <= 8
