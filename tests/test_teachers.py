"""Several SLMs that judge together, and an SLM that learns what they said."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import GOOD, sentences
from of_uploads import EXAMPLES, ShutTo, server_of

from crosslm.algorithm.rewards import correct_prior, label_rewards
from crosslm.algorithm.soft_labels import without_preference
from crosslm.classification import class_probabilities
from crosslm.config import RewardConfig
from crosslm.enhancement import train_on_synthetic
from crosslm.errors import QuarantineError, UploadError
from crosslm.federation.messages import encode
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet, SyntheticText
from crosslm.runs import journal, snapshot
from crosslm.server import receive_slm
from crosslm.support.progress import Progress
from crosslm.teachers import Teachers

TEXTS = sentences(GOOD, 5)


def corrected(upload, slm):
    return correct_prior(slm.predict_proba(TEXTS), torch.tensor(upload.class_counts))


def test_the_mean_is_over_the_arriving_and_the_last_of_the_others(uploads, received):
    teachers = Teachers(RewardConfig(teachers=3, correct_prior=True))
    for upload, slm in zip(uploads, received, strict=True):
        teachers.accepted(upload, slm)
    opinions = [corrected(upload, slm) for upload, slm in zip(uploads, received, strict=True)]
    assert (opinions[0] - opinions[1]).abs().max() > 1e-3
    again = teachers.probabilities(received[0], uploads[0], TEXTS)  # north comes again: its earlier SLM has no say
    torch.testing.assert_close(again, (opinions[0] + opinions[1] + opinions[2]) / 3)
    stranger = dataclasses.replace(uploads[0], client_id="east")
    three = teachers.probabilities(received[0], stranger, TEXTS)  # three judge, and north was served longest ago
    torch.testing.assert_close(three, (opinions[0] + opinions[1] + opinions[2]) / 3)
    teachers.accepted(stranger, received[0])
    assert list(teachers.members) == ["south", "west", "east"]


def test_a_judge_and_its_upload_are_one_copy(uploads, received):
    """They are kept as long as it judges, and may be large; not where the upload is in half precision."""
    teachers = Teachers(RewardConfig(teachers=2))
    half = dataclasses.replace(uploads[1], slm=uploads[1].slm.in_dtype(torch.float16))
    teachers.accepted(uploads[0], received[0])
    teachers.accepted(half, received[1])
    one, two = teachers.members.values()
    own = one.slm.model.state_dict()
    assert all(value.data_ptr() == own[name].data_ptr() for name, value in one.upload.slm.weights.items())
    assert encode(one.upload) == encode(uploads[0])
    assert one.is_of(uploads[0])
    assert encode(two.upload) == encode(half)
    assert two.is_of(half)


def test_the_same_texts_are_read_once_by_whom_has_not_changed(uploads, received, monkeypatch):
    teachers = Teachers(RewardConfig(teachers=3, correct_prior=True))
    for upload, slm in zip(uploads, received, strict=True):
        teachers.accepted(upload, slm)
    read, predict = [], SLM.predict_proba
    monkeypatch.setattr(SLM, "predict_proba", lambda slm, texts, *_: read.append(slm) or predict(slm, texts))
    first = [teachers.probabilities(slm, upload, TEXTS) for upload, slm in zip(uploads, received, strict=True)]
    assert len(read) == 3
    again = dataclasses.replace(uploads[0])  # read from the disk anew, it is the same upload
    assert torch.equal(teachers.probabilities(received[0], again, TEXTS), first[0])
    assert len(read) == 3
    weights = {name: value * 1.5 if value.is_floating_point() else value for name, value in again.slm.weights.items()}
    other = dataclasses.replace(again, slm=dataclasses.replace(again.slm, weights=weights))
    slm = SLM.from_state(other.slm, other.slm.labels)
    changed = teachers.probabilities(slm, other, TEXTS)  # another upload is read, though of the same client and round
    assert read[3:] == [slm]
    torch.testing.assert_close(changed, first[0] + (corrected(other, slm) - corrected(again, received[0])) / 3)
    assert len(read) == 3 + 3


def test_others_judge_for_one_that_may_not(uploads, received):
    teachers = Teachers(RewardConfig(teachers=3, correct_prior=True))
    assert teachers.of_others(received[0], uploads[0], TEXTS) is None
    for upload, slm in zip(uploads, received, strict=True):
        teachers.accepted(upload, slm)
    opinions = [corrected(upload, slm) for upload, slm in zip(uploads, received, strict=True)]
    torch.testing.assert_close(teachers.of_others(received[0], uploads[0], TEXTS), (opinions[1] + opinions[2]) / 2)
    assert Teachers(RewardConfig()).of_others(received[0], uploads[0], TEXTS) is None


def test_in_the_paper_only_the_arriving_slm_judges(uploads, received):
    teachers = Teachers(RewardConfig())
    teachers.accepted(uploads[1], received[1])
    assert not teachers.members
    own = teachers.probabilities(received[0], uploads[0], TEXTS)
    assert torch.equal(own, received[0].predict_proba(TEXTS))


def test_one_that_fails_later_judges_no_more(uploads, received, caplog):
    teachers = Teachers(RewardConfig(teachers=2))
    teachers.accepted(uploads[1], received[1])
    with torch.no_grad():
        for parameter in received[1].model.parameters():
            parameter.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        found = teachers.probabilities(received[0], uploads[0], TEXTS)
    assert torch.equal(found, received[0].predict_proba(TEXTS))
    assert "client south judges no more" in caplog.text
    assert not teachers.members


def test_one_that_fails_on_a_text_of_the_baseline_judges_on(monkeypatch):
    teachers = SimpleNamespace(members={"north": "a judge"})

    def baseline(*_):
        del teachers.members["north"]
        raise UploadError("the arriving one fails too")

    monkeypatch.setattr(journal, "data_free_kd", baseline)
    run = SimpleNamespace(
        server=SimpleNamespace(teachers=teachers, encoder=None),
        config=SimpleNamespace(asks_llm=False),
        task=None,
        progress=None,
        base_pool=SimpleNamespace(samples=[]),
        _as_they_came_first=dict,
    )
    with pytest.raises(UploadError):
        journal.RunJournal._data_free_kd(run, None, may_judge=True, texts=0)
    assert teachers.members == {"north": "a judge"}


def test_a_served_slm_rewards_the_next_ones_texts_too(models, config, task, uploads, received):
    server = server_of(models, config, task)
    server.step(uploads[0])
    _, record = server.step(uploads[1])
    both = Teachers(server.config.reward)
    both.accepted(uploads[0], received[0])  # as it was uploaded, not as step 5 left it
    expected = both.probabilities(received[1], uploads[1], record.pool.texts)
    labels = record.pool.labels
    rewards = torch.tensor([receipt.reward for receipt in record.receipts])
    torch.testing.assert_close(rewards, 2 * expected[torch.arange(len(labels)), labels] - 1)


def test_who_may_not_reward_the_llm_never_judges_beside_others(models, config, task, uploads):
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"teach_refused": False})})
    server = server_of(models, config, task)
    server.gate = ShutTo(uploads[0].client_id)
    with pytest.raises(QuarantineError):
        server.step(uploads[0])
    assert not server.teachers.members


def test_who_is_refused_is_taught_and_changes_nothing_for_others(models, config, task, uploads):
    """Not the LLM, and not what the next one gets, to the byte."""
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"teach_refused": True})})
    without, server = (server_of(models, config, task, soft_labels=True, llm_judges=True) for _ in range(2))
    without.gate = server.gate = ShutTo("south")
    without.step(uploads[0])
    server.step(uploads[0])
    before, optimizer = server.llm.fingerprint(), server.optimizer.state_dict()["state"][0]["step"].clone()
    download, record = server.step(uploads[1])
    assert server.llm.fingerprint() == before
    assert server.optimizer.state_dict()["state"][0]["step"] == optimizer
    assert list(server.teachers.members) == ["north"]
    assert (record.refusal, record.gate) == ("client south: quarantined", {"auc": 0.4})
    assert not record.drafts
    assert not record.updates
    assert any(not torch.equal(value, uploads[1].slm.weights[name]) for name, value in download.slm.weights.items())
    others = Teachers(server.config.reward)
    others.accepted(uploads[0], receive_slm(uploads[0], task, server.config))
    texts, labels, slm = record.pool.texts, record.pool.labels, receive_slm(uploads[1], task, config)
    rewards = torch.tensor([receipt.reward for receipt in record.receipts])
    torch.testing.assert_close(rewards, label_rewards(others.of_others(slm, uploads[1], texts), labels))
    (first, _), (second, told) = without.step(uploads[2]), server.step(uploads[2])
    assert (first.step, second.step) == (2, 3)
    assert all(torch.equal(value, second.slm.weights[name]) for name, value in first.slm.weights.items())
    assert without.llm.fingerprint() == server.llm.fingerprint()
    again, once_more = server.step(uploads[1]), server.step(uploads[1])
    assert len({tuple(made.pool.texts) for made in (again[1], once_more[1], record)}) == 3
    assert not told.refusal


@pytest.mark.parametrize(
    ("counts", "changes", "begins_anew"),
    [
        ((0, 40), {}, True),
        ((0, 40), {"new_head": False}, False),
        ((0, 40), {"teach_refused": False}, False),  # as under preset paper, whose SLMs all have a say
        ((1, 39), {}, False),
        ((0, 0), {}, False),  # hidden
        ((0, 40), {"epsilon": 8.0}, False),
    ],
)
def test_who_knows_one_label_begins_step_5_with_a_new_head(
    models, config, task, uploads, monkeypatch, counts, changes, begins_anew
):
    gate = config.gate.model_copy(update={"enabled": True, "teach_refused": True, **changes})
    privacy = config.privacy.model_copy(update={"epsilon": changes.get("epsilon")})
    private = config.slm.private.model_copy(update={"epochs": 5, "patience": 1, "holdout_fraction": 0.5})
    fields = config.slm.model_copy(update={"private": private, "interpolation": 0.5})
    config = config.model_copy(update={"gate": gate, "slm": fields, "privacy": privacy})
    upload, begun, made = dataclasses.replace(uploads[0], class_counts=counts), [], SLM.new_head
    monkeypatch.setattr(SLM, "new_head", lambda slm, seed: (begun.append(seed), made(slm, seed)))
    mixed = []
    monkeypatch.setattr(SLM, "interpolate", lambda *_: mixed.append(True))
    slm = receive_slm(upload, task, config)
    pool = SyntheticSet([SyntheticText(text, n % 2, "", (1,), (2,), n) for n, text in enumerate(TEXTS)])
    metrics = train_on_synthetic(slm, pool, [0, 1, 2, 3], None, upload, config, Progress(), "north")
    assert bool(begun) == begins_anew
    assert metrics["epochs"] == (5 if begins_anew else 2)  # all of them, whatever patience says
    assert bool(mixed) != begins_anew  # half of the old layer would undo it


def test_who_has_no_say_and_fails_on_a_text_is_refused(models, config, task, uploads, monkeypatch):
    """Not an error of the server's, which would end it; and a judge that fails then judges again later."""
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"teach_refused": True})})
    server = server_of(models, config, task)
    server.gate = ShutTo("south")
    server.step(uploads[0])

    def breaks(slm, texts, *_):
        raise IndexError("index out of range")

    with monkeypatch.context() as patch:
        patch.setattr(SLM, "predict_proba", breaks)
        with pytest.raises(UploadError, match="cannot classify: IndexError"):
            server.step(uploads[1])
    assert (server.steps, server.taught) == (1, 0)
    assert list(server.teachers.members) == ["north"]
    spoiled, member = server.step, server.teachers.members["north"].slm
    monkeypatch.setattr(member, "predict_proba", lambda texts, *_: breaks(member, texts))
    spoiled(uploads[1])
    assert list(server.teachers.members) == ["north"]


def test_where_nobody_may_judge_the_llm_does(models, config, task, uploads):
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"teach_refused": True})})
    server = server_of(models, config, task, soft_labels=True)
    server.gate = ShutTo("north")
    _, record = server.step(uploads[0])
    said = without_preference(class_probabilities(server.llm, task, record.pool.texts))
    rewards = torch.tensor([receipt.reward for receipt in record.receipts])
    torch.testing.assert_close(rewards, label_rewards(said, record.pool.labels))


def test_those_who_judge_are_the_same_after_a_stop(models, config, task, uploads):
    kept, server = {}, server_of(models, config, task)
    server.remember(uploads[0])

    def put(data):
        kept[str(len(kept))] = data
        return str(len(kept) - 1)

    names = snapshot.keep_teachers(server, put)
    assert names == snapshot.keep_teachers(server, put) == ["0"]  # written once
    later = server_of(models, config, task)
    snapshot.restore_teachers(later, names, kept.__getitem__)
    before, after = server.teachers.members["north"], later.teachers.members["north"]
    assert torch.equal(before.slm.predict_proba(TEXTS), after.slm.predict_proba(TEXTS))
    assert before.upload.class_counts == after.upload.class_counts


def test_training_on_certain_probabilities_is_training_on_labels(uploads, config, task):
    trained = []
    for targets in (None, torch.eye(2)[EXAMPLES.labels]):
        slm = receive_slm(uploads[0], task, config)
        slm.fit(EXAMPLES, config.slm.synthetic, 1, targets=targets)
        trained.append(slm.predict_proba(TEXTS))
    torch.testing.assert_close(trained[0], trained[1])


def test_soft_labels_are_learned_whatever_the_order_of_the_outputs(uploads, config, task):
    """The loss of a row with targets t is -sum t log S, by hand."""
    slm = receive_slm(uploads[0], task, config)
    rows, targets = slm.encode(TEXTS[:2]), torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    expected = -(targets * slm.predict_proba(TEXTS[:2]).log()).sum(dim=1)
    slm.model.eval()
    torch.testing.assert_close(slm.losses(rows, targets), expected)
    slm.order_labels(tuple(reversed(task.labels)))
    torch.testing.assert_close(slm.losses(rows, targets.flip(1)), expected)


def test_step_5_of_each_upload_has_a_seed_of_its_own(uploads, config):
    seeds, pool = set(), SyntheticSet([SyntheticText("a day", 0, "", (1,), (2,), 0)])
    slm = SimpleNamespace(
        fit=lambda texts, fit, seed, *_: seeds.add(seed) or {}, is_finite=lambda: True, interpolate=lambda *_: None
    )
    north, south, _ = uploads
    for upload in (north, dataclasses.replace(north, client_round=1), south):
        train_on_synthetic(slm, pool, [0], None, upload, config, Progress(), "")
    assert len(seeds) == 3


def test_step_5_learns_the_probabilities_if_asked_to(models, config, task, uploads):
    returned = {}
    for soft in (False, True):
        server = server_of(models, config, task, soft_labels=soft)
        returned[soft] = server.step(uploads[0])[0].slm.weights
    assert any(not torch.equal(value, returned[True][name]) for name, value in returned[False].items())
