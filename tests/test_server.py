"""One step of the server: Eq. 4 to 10 put together."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import BAD, GOOD, sentences, tiny_llm

from crosslm import enhancement, llm_update
from crosslm import server as server_module
from crosslm.algorithm.losses import generation_loss, kl_loss, objective, token_kl
from crosslm.algorithm.rewards import label_rewards, leave_one_out_advantages
from crosslm.client import Client
from crosslm.config import Config, SelectionConfig
from crosslm.data.examples import Examples
from crosslm.enhancement import select
from crosslm.errors import BrokenLLMError, CollapseError, ModelError, UploadError
from crosslm.llm_update import anchor_texts, backward, hold_to, tokens_stated
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet, SyntheticText
from crosslm.server import Server, receive_slm
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task
from crosslm.teachers import Teachers

EXAMPLES = Examples(sentences(BAD, 20) + sentences(GOOD, 20), [0] * 20 + [1] * 20)


@pytest.fixture(params=["gpt2", "llama", "gemma3"])
def family(request):
    return request.param


def server_for(config, task, models, family="gpt2", **llm_changes):
    selection = {**config.selection.model_dump(), "nonpositive_rewards": "keep", "class_balance": False}
    llm_settings = {**config.llm.model_dump(), **llm_changes}
    config = Config.model_validate({**config.model_dump(), "llm": llm_settings, "selection": selection})
    llm = tiny_llm(
        models, family, **{name: value for name, value in config.llm.model_dump().items() if name != "model"}
    )
    return Server(config, task, llm, SentenceEncoder(str(models / "encoder")))


@pytest.fixture
def upload(models, config, task):
    slm = SLM.load(str(models / "bert"), task.labels, 32, 0)
    return Client("north", EXAMPLES, slm, config.slm.private, 0).train()


def test_a_step_does_all_of_section_4(models, config, task, upload, family):
    server = server_for(config, task, models, family)
    before = server.llm.fingerprint()
    base = {name: value.clone() for name, value in server.llm.model.state_dict().items() if "lora_" not in name}
    download, record = server.step(upload)
    assert server.llm.fingerprint() != before
    after = server.llm.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    assert (download.client_id, download.client_round, download.step) == ("north", 0, 1)
    changed = [not torch.equal(value, upload.slm.weights[name]) for name, value in download.slm.weights.items()]
    assert any(changed)
    (drafts, rewards), *rest = record.drafts
    assert (len(drafts.samples), rest, len(record.updates)) == (8, [], 2)
    assert rewards.abs().max() <= 1
    assert record.updates[0]["log_ratio"] == pytest.approx(0, abs=1e-5)
    assert record.updates[0]["kl_loss"] == pytest.approx(0, abs=1e-5)
    assert record.updates[1]["kl_loss"] > 0
    assert len(record.receipts) == len(record.pool.samples) == 12
    assert record.tokens_generated >= drafts.tokens_generated + record.pool.tokens_generated
    kept = [receipt for receipt in record.receipts if receipt.kept]
    assert len(kept) == download.metrics["selected"] == 6


def test_a_step_can_be_repeated(models, config, task, upload):
    first, _ = server_for(config, task, models).step(upload)
    second, _ = server_for(config, task, models).step(upload)
    assert all(torch.equal(value, second.slm.weights[name]) for name, value in first.slm.weights.items())


def test_full_fine_tuning_takes_the_same_step(models, config, task, upload, family):
    server = server_for(config, task, models, family, adapter="full", learning_rate=1e-4)
    _, record = server.step(upload)
    assert record.updates[0]["kl_loss"] == pytest.approx(0, abs=1e-5)
    assert record.updates[1]["kl_loss"] > 0


def plain_objective(server, drafts, rewards, statements):
    """Eq. 5 to 9 with whole logits and no batch, in the words of the paper."""
    model, total = server.llm.model, 0.0
    for place, sample in enumerate(drafts.samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
        logits = model(input_ids=ids).logits[0, :-1]
        with torch.no_grad(), model.disable_adapter():
            reference_logits = model(input_ids=ids).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        reference_logps = reference_logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        stated = torch.tensor([statements[place]])
        stated_logits = model(input_ids=stated).logits[0, :-1]
        stated_logps = stated_logits.log_softmax(-1).gather(1, stated[0, 1:, None]).sum()
        x = slice(len(sample.prompt_ids) - 1, None)
        kl = token_kl(logits[x], reference_logits[x]).sum()
        total = total - rewards[place] * (logps - reference_logps) - 0.1 * stated_logps + 0.05 * kl
    return total / len(drafts.samples)


TWO_WAYS = Task(
    ("bad", "good"),
    "{text} It is",
    (("Write: ",), ("Write: ",)),
    (("This is bad.", "I call {text} bad."), ("This is good.", "I call {text} good.")),
    ("bad", "good"),
)


def test_eq_7_reads_a_text_and_a_statement_of_the_label_that_it_was_written_for(models):
    assert TWO_WAYS.stated("A film.", 1, 0) == "A film. This is good."
    assert TWO_WAYS.stated("a film", 0, 1) == "I call a film bad."
    llm = tiny_llm(models, "gpt2")
    drafts = SyntheticSet([SyntheticText(f"a film {n}", n % 2, "", (1,), (2,), 0) for n in range(40)])
    said = [llm.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens_stated(llm, TWO_WAYS, drafts, 3)]
    ways = [[TWO_WAYS.stated(sample.text, sample.label, way) for way in (0, 1)] for sample in drafts.samples]
    drawn = [both.index(one) for both, one in zip(ways, said, strict=True)]  # each is one of the two of its label
    assert 10 < sum(drawn) < 30
    assert tokens_stated(llm, TWO_WAYS, drafts, 3) == tokens_stated(llm, TWO_WAYS, drafts, 3)
    assert tokens_stated(llm, TWO_WAYS, drafts, 3) != tokens_stated(llm, TWO_WAYS, drafts, 4)


def test_an_update_meets_every_draft_once():
    drafts = SyntheticSet([SyntheticText("", 0, "", (1,), (2,) * (1 + 7 * n % 11), n) for n in range(23)])
    batches = llm_update.batches_of_like_length(drafts, 4, 0)
    assert sorted(place for batch in batches for place in batch) == list(range(23))
    assert sorted(map(len, batches)) == [3, 4, 4, 4, 4, 4]
    spread = [max(1 + 7 * n % 11 for n in batch) - min(1 + 7 * n % 11 for n in batch) for batch in batches]
    assert max(spread) <= 3  # of 11 lengths, two drafts or three of each


def test_an_arrival_may_have_several_updates_each_of_fresh_texts(models, config, task, upload):
    _, record = server_for(config, task, models, iterations=2).step(upload)
    (first, _), (second, _) = record.drafts
    assert not set(first.texts) & set(second.texts)
    assert len(record.updates) == 4  # of eight drafts in batches of four, twice
    assert record.updates[2]["kl_loss"] > 0


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_the_gradient_is_that_of_the_plain_equations(models, config, task, family, micro_batch_size):
    server = server_for(config, task, models, family, micro_batch_size=micro_batch_size, gamma_kl=0.05)
    with torch.no_grad():
        for number, parameter in enumerate(server.llm.trainable_parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    drafts = synthesize(server.llm, task, config.synthesis, 7, 1)
    rewards = torch.linspace(-1, 1, 7)
    statements = tokens_stated(server.llm, task, drafts, 0)
    plain = plain_objective(server, drafts, rewards, statements)
    expected = torch.autograd.grad(plain, server.llm.trainable_parameters())
    loss = 0.0
    for start in range(0, 7, micro_batch_size):
        rows = list(range(7))[start : start + micro_batch_size]
        loss += backward(server.llm, server.config.llm, drafts, rewards, statements, rows, 7)["loss"]
    assert loss == pytest.approx(float(plain.detach()), rel=1e-4)
    for parameter, gradient in zip(server.llm.trainable_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_gradient_is_that_of_one_backward_pass_of_the_objective(models, config, task, family, adapter):
    gammas = {"gamma_generation": 0.7, "gamma_language_modeling": 0.2, "gamma_kl": 0.3}
    server = changed(server_for(config, task, models, family, adapter=adapter, **gammas))
    drafts, rewards = synthesize(server.llm, task, config.synthesis, 4, 1), torch.tensor([1.0, -0.5, 0.3, -1.0])
    statements = tokens_stated(server.llm, task, drafts, 0)
    parameters = server.llm.trainable_parameters()
    scores = server.llm.score([[*sample.prompt_ids, *sample.completion_ids] for sample in drafts.samples])
    stated, _ = server.llm.logps(statements)
    is_x = torch.zeros_like(scores.mask)
    for row, sample in enumerate(drafts.samples):
        start = len(sample.prompt_ids) - 1
        is_x[row, start : start + len(sample.completion_ids)] = True
    generation = generation_loss(scores.logps.sum(1), scores.reference_logps.sum(1), rewards)
    whole = objective(generation, -stated.sum(1), kl_loss(scores.kl, is_x), *gammas.values())
    expected = torch.autograd.grad(whole.mean(), parameters)
    parts = backward(server.llm, server.config.llm, drafts, rewards, statements, [0, 1, 2, 3], 4)
    assert parts["loss"] == pytest.approx(float(whole.detach().mean()), rel=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


class Held:
    """Counts the bytes that autograd keeps for backward passes."""

    def __init__(self):
        self.now = self.most = self.all = 0

    def keep(self, tensor):
        self.now, self.all = self.now + tensor.nbytes, self.all + tensor.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(kept := Kept(tensor), self.drop, tensor.nbytes)
        return kept

    def drop(self, size):
        self.now -= size


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def test_the_activations_of_one_sequence_of_a_text_are_held_at_a_time(models, config, task):
    server, held = server_for(config, task, models), Held()
    drafts = synthesize(server.llm, task, config.synthesis, 4, 1)
    statements = tokens_stated(server.llm, task, drafts, 0)
    with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda kept: kept.tensor):
        backward(server.llm, server.config.llm, drafts, torch.ones(4), statements, [0, 1, 2, 3], 4)
    assert held.most < 0.7 * held.all


def test_mean_over_tokens_is_a_different_update(models, config, task, upload):
    by_sum, _ = server_for(config, task, models).step(upload)
    server = server_for(config, task, models, token_reduction="mean")
    by_mean, record = server.step(upload)
    assert not all(torch.equal(value, by_mean.slm.weights[name]) for name, value in by_sum.slm.weights.items())
    per_token = record.updates[0]["language_modeling_loss"]
    assert 1 < per_token < 10  # nats a token, not a text


def test_rewarded_texts_become_likelier_and_punished_ones_less(models, config, task):
    server = server_for(config, task, models, gamma_language_modeling=0.0, learning_rate=3e-3)
    drafts = synthesize(server.llm, task, config.synthesis, 8, 1)
    rewards = torch.tensor([1.0, -1.0] * 4)

    def logps():
        with torch.no_grad():
            return server.llm.logps([[*s.prompt_ids, *s.completion_ids] for s in drafts.samples])[0].sum(1)

    before = logps()
    for _ in range(5):
        server.update_llm(drafts, rewards, 0)
    change = logps() - before
    assert change[::2].mean() > 0 > change[1::2].mean()


def test_with_a_floor_punished_texts_fall_so_far_and_no_further(models, config, task):
    def fall(floor):
        fields = {"gamma_language_modeling": 0.0, "gamma_kl": 0.0, "learning_rate": 3e-3, "generation_floor": floor}
        server = server_for(config, task, models, **fields)
        drafts = synthesize(server.llm, task, config.synthesis, 4, 1)
        sequences = [[*sample.prompt_ids, *sample.completion_ids] for sample in drafts.samples]
        for _ in range(40):
            with torch.no_grad():
                scores = server.llm.score(sequences)
                change = ((scores.logps - scores.reference_logps) * scores.mask).sum(1)
            if floor and (change < -floor).all():
                break  # there is nothing left to do, which an update would call an error
            server.update_llm(drafts, -torch.ones(4), 0)
        return change

    unbounded, bounded = fall(0.0), fall(2.0)
    assert (bounded < -2).all()
    assert 0 > bounded.sum() > 0.6 * unbounded.sum()  # the others' fall takes a text a little beyond its floor


def changed(server, by=0.05):
    """With an adapter that is not that of the beginning."""
    with torch.no_grad():
        for number, parameter in enumerate(server.llm.trainable_parameters()):
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return server


def plain_divergence(server, anchors):
    """The mean over the texts of Eq. 8's sum, one text at a time."""
    total = torch.tensor(0.0)
    for text in anchors:
        ids = torch.tensor([text])
        logits = server.llm.model(input_ids=ids).logits[0, :-1]
        with torch.no_grad(), server.llm._reference() as reference:
            reference_logits = reference(input_ids=ids).logits[0, :-1]
        total = total + token_kl(logits, reference_logits).sum()
    return total / len(anchors)


@pytest.mark.parametrize("micro_batch_size", [2, 16])
def test_what_holds_to_the_anchors_is_the_plain_divergence(models, config, task, family, micro_batch_size):
    server = changed(server_for(config, task, models, family, gamma_anchor=0.5, micro_batch_size=micro_batch_size))
    anchors = anchor_texts(server.llm, 3, 0)
    plain = plain_divergence(server, anchors)
    expected = torch.autograd.grad(0.5 * plain, server.llm.trainable_parameters())
    server.optimizer.zero_grad()
    assert hold_to(server.llm, server.config.llm, anchors) == pytest.approx(float(plain.detach()), rel=1e-4)
    for parameter, gradient in zip(server.llm.trainable_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_anchors_are_what_the_original_writes_however_far_the_llm_has_come(models, config, task, adapter, monkeypatch):
    server = server_for(config, task, models, gamma_anchor=1.0, anchors=5, adapter=adapter)
    before = server._anchors()
    assert len(before) == 5
    again = changed(server_for(config, task, models, gamma_anchor=1.0, anchors=5, adapter=adapter))
    assert again._anchors() == before  # as after a restart
    original = again.llm.generate

    def as_it_is(*arguments, **_):
        return original(*arguments)

    monkeypatch.setattr(again.llm, "generate", as_it_is)
    assert anchor_texts(again.llm, 5, seed_for(config.seed, "anchors")) != before
    assert server_for(config, task, models)._anchors() == []


def test_a_model_without_a_beginning_token_begins_after_its_end(models, config, task, monkeypatch):
    llm = server_for(config, task, models).llm
    end = llm.tokenizer.eos_token_id
    monkeypatch.setattr(llm, "encode", lambda text: [])
    assert [text[0] for text in anchor_texts(llm, 2, 0)] == [end, end]
    monkeypatch.setattr(type(llm), "end_ids", {None})
    with pytest.raises(ModelError, match="no token to begin a text with"):
        anchor_texts(llm, 2, 0)


def test_all_anchors_have_their_turn(models, config, task, monkeypatch):
    """An update of one step takes eight of them, and the next one others."""
    server = server_for(config, task, models, gamma_anchor=1.0, anchors=24)
    drafts, seen = synthesize(server.llm, task, config.synthesis, 4, 1), set()
    hold = llm_update.hold_to

    def noted(llm, fields, anchors):
        seen.update(map(tuple, anchors))
        return hold(llm, fields, anchors)

    monkeypatch.setattr(llm_update, "hold_to", noted)
    for seed in range(8):
        server.update_llm(drafts, torch.ones(4), seed)
    assert len(seen) > 16


def test_with_anchors_the_llm_stays_nearer_to_the_original_elsewhere(models, config, task):
    def divergence(gamma):
        server = server_for(config, task, models, gamma_anchor=gamma, learning_rate=3e-3)
        drafts = synthesize(server.llm, task, config.synthesis, 8, 1)
        for _ in range(4):
            log = server.update_llm(drafts, torch.ones(8), 0)
        assert ("anchor_loss" in log[0]) == bool(gamma)
        with torch.no_grad():
            return float(plain_divergence(server, anchor_texts(server.llm, 16, 1)))  # others than it was held to

    assert divergence(10.0) < 0.7 * divergence(0.0)


def test_gradients_are_clipped_to_the_norm_that_is_set(models, config, task):
    server, norms = server_for(config, task, models, max_grad_norm=1e-3), []
    drafts = synthesize(server.llm, task, config.synthesis, 4, 1)

    def norm(*_):
        gradients = [parameter.grad for parameter in server.llm.trainable_parameters()]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    server.optimizer.register_step_pre_hook(norm)
    told = server.update_llm(drafts, torch.ones(4), 0)
    assert all(entry["gradient_norm"] > 1e-3 for entry in told)  # as it was before
    assert norms == [pytest.approx(1e-3, rel=0.01)] * len(told)


def test_an_update_that_does_nothing_is_an_error(models, config, task):
    server = server_for(config, task, models, gamma_language_modeling=0.0, gamma_kl=0.0)
    drafts = synthesize(server.llm, task, config.synthesis, 4, 1)
    with pytest.raises(ModelError, match="changed nothing"):
        server.update_llm(drafts, torch.zeros(4), 0)


def test_an_update_that_is_not_finite_is_an_error(models, config, task):
    server = server_for(config, task, models)
    drafts = synthesize(server.llm, task, config.synthesis, 4, 1)
    before = server.llm.fingerprint()
    with pytest.raises(CollapseError, match="not finite"):
        server.update_llm(drafts, torch.full((4,), torch.nan), 0)
    assert server.llm.fingerprint() == before


def breaking_at(call, wrote):
    """Writing that is as ever but at one call, where the LLM writes nothing any more; notes the LLM at each call."""

    def writes(llm, *arguments):
        wrote.append(llm.fingerprint())
        if len(wrote) == call:
            raise CollapseError("24 of 24 texts could not be written")
        return synthesize(llm, *arguments)

    return writes


@pytest.fixture
def uploads(models, config, task):
    found = []
    for name in ("north", "south"):
        slm = SLM.load(str(models / "bert"), task.labels, 32, len(found))
        found.append(Client(name, EXAMPLES, slm, config.slm.private, len(found)).train())
    return found


def test_an_llm_that_breaks_in_a_step_is_taken_back_and_the_upload_refused(models, config, task, uploads, monkeypatch):
    """What an SLM's rewards have done to the LLM, its optimiser and the other judges is as if it had never come."""
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"teachers": 2})})
    server, undisturbed = (server_for(config, task, models) for _ in range(2))
    north, south = uploads
    wrote = []
    monkeypatch.setattr(server_module, "synthesize", breaking_at(4, wrote))
    server.step(north)
    before = server.llm.fingerprint()
    with pytest.raises(BrokenLLMError, match=r"south: with its rewards the LLM broke, .* 24 of 24 texts") as refused:
        server.step(south)
    assert "24" not in refused.value.told
    assert wrote[3] != before == server.llm.fingerprint()
    assert server.steps == 1
    assert list(server.teachers.members) == ["north"]
    download, _ = server.step(south)
    undisturbed.step(north)
    expected, _ = undisturbed.step(south)
    assert server.llm.fingerprint() == undisturbed.llm.fingerprint()
    assert all(torch.equal(value, expected.slm.weights[name]) for name, value in download.slm.weights.items())


def test_an_slm_that_cannot_be_trained_is_refused_and_changes_nothing(models, config, task, uploads, monkeypatch):
    """One that is too large for this machine, say, must not end the server, which would begin with it again."""
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"teachers": 2})})
    server, (north, south) = server_for(config, task, models), uploads
    server.step(north)
    before = server.llm.fingerprint()

    def fails(*_):
        raise RuntimeError("CUDA out of memory")

    def is_out(_):
        raise UploadError("client north: it cannot classify")

    with monkeypatch.context() as patched:
        patched.setattr(SLM, "fit", fails)
        patched.setattr(server.teachers.members["north"], "read", is_out)
        with pytest.raises(
            UploadError, match=r"client south: its SLM cannot be trained: RuntimeError: CUDA out of mem"
        ):
            server.step(south)
    assert (server.llm.fingerprint(), server.steps) == (before, 1)
    assert list(server.teachers.members) == ["north"]  # who failed in a step that was taken back judges on


def test_an_slm_that_breaks_in_step_5_is_refused_and_changes_nothing(models, config, task, upload, monkeypatch):
    server, fit = server_for(config, task, models), SLM.fit
    before = server.llm.fingerprint()

    def breaks(slm, *arguments, **options):
        metrics = fit(slm, *arguments, **options)
        with torch.no_grad():
            next(slm.model.parameters()).view(-1)[0] = float("nan")
        return metrics

    monkeypatch.setattr(SLM, "fit", breaks)
    with pytest.raises(UploadError, match=r"client north: step 5 left weights of its SLM that are not finite"):
        server.step(upload)
    assert (server.llm.fingerprint(), server.steps) == (before, 0)


def test_an_update_that_breaks_in_its_second_batch_is_taken_back_too(models, config, task, upload, monkeypatch):
    server = server_for(config, task, models, batch_size=4)
    before, batches = server.llm.fingerprint(), []

    def broken(*arguments):
        batches.append(server.llm.fingerprint())
        return {name: value * float("nan" if len(batches) == 2 else 1) for name, value in backward(*arguments).items()}

    monkeypatch.setattr(llm_update, "backward", broken)
    with pytest.raises(BrokenLLMError, match="not finite"):
        server.step(upload)
    assert batches[1] != before == server.llm.fingerprint()


@pytest.mark.parametrize(("adapter", "call"), [("lora", 1), ("full", 2)])
def test_a_break_that_is_nobodys_or_cannot_be_taken_back_is_an_error(
    models, config, task, upload, monkeypatch, adapter, call
):
    server, wrote = server_for(config, task, models, adapter=adapter), []
    monkeypatch.setattr(server_module, "synthesize", breaking_at(call, wrote))
    with pytest.raises(CollapseError, match="24 of 24"):
        server.step(upload)
    assert (wrote[0] != wrote[-1]) == (call == 2)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_after_full_fine_tuning_an_slm_that_fails_is_refused_before_the_update_and_ends_the_run_after_it(
    models, config, task, upload, monkeypatch, fails_at
):
    server, calls, predict = server_for(config, task, models, adapter="full"), [], SLM.predict_proba

    def fails(slm, texts, *_):
        calls.append(server.llm.fingerprint())
        if len(calls) == fails_at:  # the first is for the drafts, the second for the pool
            raise IndexError("index out of range in self")
        return predict(slm, texts)

    monkeypatch.setattr(SLM, "predict_proba", fails)
    if fails_at == 1:
        with pytest.raises(UploadError, match="cannot classify"):
            server.step(upload)
        assert server.llm.fingerprint() == calls[0]
    else:
        with pytest.raises(ModelError, match=r"client \S+: its SLM failed after .* cannot be taken back"):
            server.step(upload)
        assert calls[0] != calls[1]
    assert server.steps == 0


def test_the_baseline_takes_the_place_of_the_reward_in_eq_5(models, config, task, upload):
    """The recorded rewards stay those of Eq. 4; the loss sees the advantages."""
    updates = {}
    for baseline in ("none", "leave_one_out"):
        reward = config.reward.model_copy(update={"baseline": baseline})
        server = server_for(config.model_copy(update={"reward": reward}), task, models, batch_size=8)
        _, record = server.step(upload)
        ((drafts, rewards),) = record.drafts
        updates[baseline] = (drafts, rewards, record.updates[0])
        weights = rewards if baseline == "none" else leave_one_out_advantages(rewards, drafts.labels)
        again = server_for(config, task, models, batch_size=8)
        expected = again.update_llm(drafts, weights, seed_for(config.seed, "server", 0, 0))
        assert record.updates == expected
    (_, plain, first), (_, kept, second) = updates.values()
    torch.testing.assert_close(plain, kept)
    assert first["gradient_norm"] != pytest.approx(second["gradient_norm"], rel=1e-3)


def test_the_returned_slm_can_keep_some_of_what_came(models, config, task, upload):
    weights = []
    for share in (1.0, 0.5):
        slm_config = config.slm.model_copy(update={"interpolation": share})
        download, _ = server_for(config.model_copy(update={"slm": slm_config}), task, models).step(upload)
        weights.append(download.slm.weights)
    for name, came in upload.slm.weights.items():
        if came.is_floating_point():
            torch.testing.assert_close(weights[1][name], (weights[0][name] + came) / 2)


def test_rewards_are_eq_4_of_the_uploaded_slm_and_can_be_corrected(models, config, task, upload):
    slm = receive_slm(upload, task, config)
    drafts = SyntheticSet(synthesize(tiny_llm(models, "gpt2"), task, config.synthesis, 6, 1).samples)
    probabilities = slm.predict_proba(drafts.texts)

    def rewards(upload, corrected):
        reward = config.reward.model_copy(update={"correct_prior": corrected})
        return label_rewards(Teachers(reward).probabilities(slm, upload, drafts.texts), drafts.labels)

    plain = rewards(upload, False)
    expected = torch.tensor([2 * float(probabilities[i, y]) - 1 for i, y in enumerate(drafts.labels.tolist())])
    torch.testing.assert_close(plain, expected)
    skewed = dataclasses.replace(upload, class_counts=(3, 95))
    corrected = rewards(skewed, True)
    is_bad = drafts.labels == 0  # the label that is rare at the client is rewarded more
    assert (corrected[is_bad] > plain[is_bad]).all()
    assert (corrected[~is_bad] < plain[~is_bad]).all()


def test_labels_are_mapped_by_name(models, config, task, upload):
    """The same classifier with its outputs, labels and counts in the other order is served the same."""
    skewed = dataclasses.replace(upload, class_counts=(3, 95))
    weights = {
        name: weight.flip(0) if name.startswith("classifier.") else weight
        for name, weight in upload.slm.weights.items()
    }
    state = dataclasses.replace(upload.slm, labels=("good", "bad"), weights=weights)
    turned = dataclasses.replace(skewed, slm=state, class_counts=(95, 3))
    downloads = []
    for each in (skewed, turned):
        download, record = server_for(config, task, models).step(each)
        slm = SLM.from_state(download.slm, task.labels)
        downloads.append((download, slm.predict_proba(record.pool.texts), record.receipts))
    (first, probabilities, receipts), (second, turned_probabilities, turned_receipts) = downloads
    assert first.slm.labels == ("bad", "good")
    assert second.slm.labels == ("good", "bad")
    assert SLM.from_state(second.slm, second.slm.labels).model.config.id2label == {0: "good", 1: "bad"}
    assert [receipt.kept for receipt in receipts] == [receipt.kept for receipt in turned_receipts]
    torch.testing.assert_close(probabilities, turned_probabilities, atol=1e-4, rtol=1e-4)
    assert (probabilities[:, 0] - probabilities[:, 1]).abs().max() > 1e-3


def test_other_labels_are_refused(models, config, task, upload):
    other = dataclasses.replace(upload, slm=dataclasses.replace(upload.slm, labels=("good", "poor")))
    with pytest.raises(
        UploadError, match=r"north: its labels are \['good', 'poor'\], the task's are \['bad', 'good'\]"
    ):
        server_for(config, task, models).step(other)


class TableEncoder:
    def encode(self, texts):
        return torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def test_receipts_say_why(models, task, config):
    pool = SyntheticSet(synthesize(tiny_llm(models, "gpt2"), task, config.synthesis, 4, 1).samples)
    rewards = torch.tensor([0.9, 0.9, 0.5, -0.5])
    receipts, kept = select(pool, rewards, TableEncoder(), SelectionConfig(fraction=0.5))
    assert kept == [2, 0]  # 0.5 * (1 - .71) first; the two duplicates tie at 0 and the earlier one is taken
    assert [receipt.kept for receipt in receipts] == [True, False, True, False]
    assert [receipt.rank for receipt in receipts] == [2, 3, 1, 4]
    assert receipts[0].diversity == pytest.approx(0, abs=1e-6)
    assert receipts[2].score == pytest.approx(0.5 * (1 - 0.5**0.5), abs=1e-6)


def test_vectors_stay_where_they_were_made_and_diversities_come_back(models, task, config, monkeypatch):
    class Elsewhere:
        def cpu(self):
            return torch.ones(4)

    encoder = SentenceEncoder(str(models / "encoder"))
    monkeypatch.setattr(encoder, "_model", SimpleNamespace(encode=lambda texts, **_: torch.ones(4, 2, device="meta")))
    assert encoder.encode(["a"] * 4).device.type == "meta"
    pool, met = synthesize(tiny_llm(models, "gpt2"), task, config.synthesis, 4, 1), []
    monkeypatch.setattr(enhancement, "diversity", lambda vectors: (met.append(vectors.device.type), Elsewhere())[1])
    receipts, _ = select(SyntheticSet(pool.samples), torch.ones(4), encoder, SelectionConfig(fraction=0.5))
    assert met == ["meta"]
    assert [receipt.diversity for receipt in receipts] == [1.0] * 4


def test_diversity_is_exact_up_to_so_many_texts_and_approximate_beyond(models, task, config, monkeypatch):
    encoder, met = SentenceEncoder(str(models / "encoder")), []
    for name in ("diversity", "approximate_diversity"):
        monkeypatch.setattr(
            enhancement, name, lambda vectors, name=name: (met.append(name), torch.ones(len(vectors)))[1]
        )
    monkeypatch.setattr(enhancement, "EXACT_TEXTS", 4)
    for count in (4, 5):
        pool = synthesize(tiny_llm(models, "gpt2"), task, config.synthesis, count, 1)
        select(pool, torch.ones(count), encoder, SelectionConfig(fraction=0.5))
    assert met == ["diversity", "approximate_diversity"]


def test_the_llm_has_a_say_in_what_is_kept(models, task, config):
    pool = SyntheticSet(synthesize(tiny_llm(models, "gpt2"), task, config.synthesis, 4, 1).samples)
    rewards, own = torch.tensor([0.9, 0.1, 0.5, 0.4]), torch.tensor([1.0, 1.0, 0.2, 0.9])
    said = torch.stack([torch.where(pool.labels == label, own, 1 - own) for label in (0, 1)], dim=1)
    assert select(pool, rewards, TableEncoder(), SelectionConfig(fraction=0.25), said)[1] == [2]
    choice = SelectionConfig(fraction=0.25, llm_posterior=True)
    receipts, kept = select(pool, rewards, TableEncoder(), choice, said)
    assert kept == [3]  # 0.5 is the better reward, but the LLM finds the text to be of another label
    assert receipts[2].score == pytest.approx(0.5 * 0.2 * (1 - 0.5**0.5), abs=1e-6)
    assert receipts[2].reward == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("fields", "is_asked"),
    [
        ({}, False),
        ({"selection": {"llm_posterior": True}}, True),
        ({"slm": {"soft_labels": True}}, False),
        ({"slm": {"soft_labels": True, "llm_judges": True}}, True),
        ({"slm": {"soft_labels": False, "llm_judges": True}}, False),
    ],
)
def test_the_llm_is_asked_only_where_a_field_wants_it(models, task, config, upload, monkeypatch, fields, is_asked):
    asked = []
    real = server_module.class_probabilities
    monkeypatch.setattr(server_module, "class_probabilities", lambda *given: asked.append(given) or real(*given))
    off = {"selection": {"llm_posterior": False}, "slm": {"soft_labels": False, "llm_judges": False}}
    given = config.model_dump()
    for section, values in off.items():
        given[section] |= values | fields.get(section, {})
    server_for(Config.model_validate(given), task, models).step(upload)
    assert [len(texts) for _, _, texts, *_ in asked] == [config.selection.pool] * is_asked


def test_the_llms_own_judgement_reaches_the_slm(models, task, config, upload, monkeypatch):
    """An LLM that finds every text good makes an SLM that does, whatever the texts are."""
    said = torch.tensor([[1e-4, 1 - 1e-4]]).repeat(config.selection.pool, 1)
    monkeypatch.setattr(server_module, "class_probabilities", lambda *given: said)
    monkeypatch.setattr("crosslm.enhancement.without_preference", lambda probabilities: probabilities)
    fit = config.slm.synthetic.model_copy(update={"epochs": 40, "learning_rate": 2e-3})
    slm = config.slm.model_copy(update={"soft_labels": True, "llm_judges": True, "synthetic": fit})
    server = server_for(config.model_copy(update={"slm": slm}), task, models)
    download, record = server.step(upload)
    found = SLM.from_state(download.slm, download.slm.labels).predict_proba(record.pool.texts)
    assert found[:, task.labels.index("good")].mean() > 0.9


def test_selection_can_be_balanced_over_the_labels_and_without_bad_texts(models, task, config):
    pool = SyntheticSet(synthesize(tiny_llm(models, "gpt2"), task, config.synthesis, 4, 5).samples)
    pool = SyntheticSet([dataclasses.replace(s, label=y) for s, y in zip(pool.samples, [0, 0, 1, 1], strict=True)])
    rewards = torch.tensor([0.9, 0.8, 0.2, -0.5])
    encoder = SentenceEncoder(str(models / "encoder"))
    both = SelectionConfig(fraction=1.0, nonpositive_rewards="drop", class_balance=True)
    _, kept = select(pool, rewards, encoder, both)
    assert len(kept) == 2
    assert 2 in kept
    assert select(pool, rewards.neg(), encoder, both)[1] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_llm_that_is_not_its_original_at_the_first_update_is_an_error(models, task, config, family, dtype):
    server = server_for(config, task, models, family, dtype=dtype)
    drafts = synthesize(server.llm, task, config.synthesis, 4, 1)
    assert changed(server, 0.02).llm.model.dtype == getattr(torch, dtype)
    with pytest.raises(ModelError, match="before the first update the LLM differs from its original"):
        server.update_llm(drafts, torch.ones(4), 0)
    as_it_is = server_for(config, task, models, family, dtype=dtype).update_llm(drafts, torch.ones(4), 0)[0]
    assert max(abs(as_it_is["log_ratio"]), abs(as_it_is["kl_loss"])) < 1e-4


def test_a_parameter_that_gradients_do_not_reach_is_an_error(models, task, config):
    server = server_for(config, task, models)
    drafts = synthesize(server.llm, task, config.synthesis, 4, 1)
    server.llm.model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match="gradients reached"):
        server.update_llm(drafts, torch.ones(4), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: {"class_counts": (1,)}, r"north: its class counts are \[1\]"),
        (lambda u: {"class_counts": (1, -1)}, r"north: its class counts are \[1, -1\]"),
        (
            lambda u: {"slm": dataclasses.replace(u.slm, weights={n: w * torch.nan for n, w in u.slm.weights.items()})},
            "north: its weight .* is not finite",
        ),
    ],
)
def test_an_upload_that_cannot_be_is_refused(task, config, upload, change, message):
    with pytest.raises(UploadError, match=message):
        receive_slm(dataclasses.replace(upload, **change(upload)), task, config)


def test_frozen_embeddings_stay_frozen_on_the_server_and_after_the_return(models, task, config, upload):
    frozen = config.slm.model_copy(update={"freeze_embeddings": True})
    server = server_for(config.model_copy(update={"slm": frozen}), task, models)
    download, _ = server.step(upload)
    (table,) = [name for name in upload.slm.weights if name.endswith("word_embeddings.weight")]
    assert torch.equal(download.slm.weights[table], upload.slm.weights[table])
    slm = SLM.load(str(models / "bert"), task.labels, 32, 0, freeze_embeddings=True)
    client = Client("north", EXAMPLES, slm, config.slm.private, 0)
    client.install(download)
    again = client.train()
    assert torch.equal(again.slm.weights[table], upload.slm.weights[table])
    client.restore(again.slm, 1, again.class_counts, [again.metrics])  # as in a run that goes on
    assert torch.equal(client.train().slm.weights[table], upload.slm.weights[table])
