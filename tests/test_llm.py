"""The LLM wrapper on a tiny model of each family."""

import copy
import dataclasses

import pytest
import torch
from conftest import tiny_llm
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    FalconH1Config,
    Gemma3Config,
    Lfm2Config,
    Qwen3MoeConfig,
)

from crosslm.config import LLMConfig, SynthesisConfig
from crosslm.config_file import load, packaged
from crosslm.errors import ConfigError, ModelError
from crosslm.models import llm as llm_module
from crosslm.models.adapter_weights import _has_room, merged
from crosslm.models.causal import check_causal, weight_dtype
from crosslm.models.llm import LLM
from crosslm.models.tokens import TextEnd, distinct_tokens, verbalizer_ids

FAMILIES = ("gpt2", "llama", "gemma3")
TEXTS = ["a good film and a kind one.", "a bad day.", "a sour book and a cold room."]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def plain_logps(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


def disturb(llm):
    """Give the adapter (or the model) values that matter."""
    with torch.no_grad():
        for number, parameter in enumerate(llm.trainable_parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


def test_generation_leaves_the_weights_and_the_adapter_exactly_as_they_are(models, family):
    llm = tiny_llm(models, family)
    disturb(llm)
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    sequences = [llm.encode(text) for text in TEXTS]
    scores = llm.score(sequences)
    llm.generate([tuple(sequences[0])], [0], SynthesisConfig(max_new_tokens=4))
    assert all(torch.equal(value, before[name]) for name, value in llm.model.state_dict().items())
    again = llm.score(sequences)
    torch.testing.assert_close(scores.logps, again.logps, atol=0, rtol=0)
    torch.testing.assert_close(scores.kl, again.kl, atol=0, rtol=0)
    assert scores.kl.abs().max() > 1e-3  # the adapter is on again
    assert any(parameter.requires_grad for parameter in llm.model.parameters())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_log_ratio_and_divergence_are_zero_before_the_first_update(models, family, adapter):
    llm = tiny_llm(models, family, adapter=adapter)
    scores = llm.score([llm.encode(text) for text in TEXTS])
    assert (scores.logps - scores.reference_logps).abs().max() < 1e-6
    assert scores.kl.abs().max() < 1e-6
    assert scores.logps.min() < -1  # and not because nothing was computed


def test_in_bfloat16_log_probabilities_and_divergence_are_near_those_in_float32(models, family):
    exact, rough = (tiny_llm(models, family, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rough.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in rough.trainable_parameters()} == {torch.float32}
    sequences = [exact.encode(text) for text in TEXTS]
    assert rough.score(sequences).kl.abs().max() < 1e-6
    for llm in (exact, rough):
        disturb(llm)
    one, other = exact.score(sequences), rough.score(sequences)
    # the stated tolerance: 0.05 nats a token; the divergences are of the order of 0.1 here
    assert (one.logps - other.logps).abs().max() < 0.05
    assert (one.reference_logps - other.reference_logps).abs().max() < 0.05
    torch.testing.assert_close(one.kl, other.kl, atol=0.02, rtol=0.1)
    gradients = []
    for llm in (exact, rough):
        scores = llm.score(sequences)
        gradients.append(torch.autograd.grad(scores.logps.sum() + scores.kl.sum(), llm.trainable_parameters()))
    first, second = (torch.cat([part.flatten() for part in parts]) for parts in gradients)
    assert torch.cosine_similarity(first, second, dim=0) > 0.99


def test_in_bfloat16_the_merged_adapter_writes_what_the_adapter_would(models, family):
    llm = tiny_llm(models, family, dtype="bfloat16")
    disturb(llm)
    prompt = tuple(llm.encode(TEXTS[0]))
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    (written,) = llm.generate([prompt], [0], SynthesisConfig(max_new_tokens=8, top_k=1))
    assert all(torch.equal(value, before[name]) for name, value in llm.model.state_dict().items())
    for place in range(len(written)):
        with torch.no_grad():
            logps = llm.model(input_ids=torch.tensor([[*prompt, *written[:place]]])).logits[0, -1].float()
        assert logps.max() - logps[written[place]] < 0.25  # the likeliest token, or one as likely but for rounding


def test_what_pytorch_keeps_for_itself_is_room_for_a_merged_adapter(monkeypatch):
    for name, found in (("mem_get_info", (100, 1000)), ("memory_reserved", 700), ("memory_allocated", 400)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert [_has_room(torch.device("cuda"), size) for size in (100, 400, 401)] == [True, True, False]
    assert _has_room(torch.device("cpu"), 10**15)
    assert not _has_room(torch.device("mps"), 1)


def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(models, monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert weight_dtype(LLMConfig(model="x", dtype="auto")) == expected
        assert tiny_llm(models, "gpt2", dtype="auto").model.dtype == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch cannot tell
    assert weight_dtype(LLMConfig(model="x", dtype="auto")) == torch.float32


@pytest.mark.parametrize("name", packaged())
def test_weights_that_are_trained_themselves_are_in_float32(models, monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    config = load(name, ("llm.adapter=full",)).llm
    assert {weight_dtype(config, device) for device in ("cpu", "cuda")} == {torch.float32}
    llm = LLM.load(str(models / "gpt2"), config, 0)
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.float32}


def test_a_step_of_full_fine_tuning_moves_nearly_every_weight(models, monkeypatch):
    """In bfloat16 AdamW with this rate moves hardly any: it is less than half of the distance to the next number."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    llm = tiny_llm(models, "gpt2", adapter="full", dtype="auto")
    before = llm.model.base_model.h[0].mlp.c_fc.weight.clone()
    optimizer = torch.optim.AdamW(llm.trainable_parameters(), lr=1e-5, weight_decay=0.0)
    (-llm.logps([llm.encode(text) for text in TEXTS])[0].sum()).backward()
    optimizer.step()
    assert (llm.model.base_model.h[0].mlp.c_fc.weight != before).float().mean() > 0.99


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_scores_are_those_of_the_plain_models(models, family, adapter):
    llm = tiny_llm(models, family, adapter=adapter)
    disturb(llm)
    original = AutoModelForCausalLM.from_pretrained(models / family).eval()
    sequences = [llm.encode(text) for text in TEXTS]
    scores = llm.score(sequences)
    logps, mask = llm.logps(sequences)
    for row, ids in enumerate(sequences):
        with torch.no_grad():
            now, before = plain_logps(llm.model, ids), plain_logps(original, ids)
        width = len(ids) - 1
        assert scores.mask[row].sum() == mask[row].sum() == width
        torch.testing.assert_close(scores.logps[row, :width], now, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logps[row, :width], now, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores.reference_logps[row, :width], before, atol=1e-4, rtol=1e-4)
        assert (scores.logps[row, width:] == 0).all()
        assert scores.kl[row, :width].min() > 0


def test_what_begins_many_texts_is_scored_once_and_counts_each_time(models, family):
    assert distinct_tokens([[1, 2, 3], [1, 2, 4, 3], [5, 2, 3], [1, 2, 3]]) == (
        [0, 1, 3, 4, 5, 6],
        [0, 1, 0, 2, 3, 4, 5, 0, 1],
    )
    llm = tiny_llm(models, family)
    disturb(llm)
    start = llm.encode(TEXTS[0])
    sequences = [[*start, *ending] for ending in ([5, 6, 7], [5, 7], [8], [5, 6, 7])]
    assert len(distinct_tokens(sequences)[0]) < sum(map(len, sequences)) / 2
    together = llm.score(sequences)
    weights = torch.tensor([[0.5], [-1.0], [2.0], [3.0]])
    loss = (together.logps * weights).sum() + (together.kl * weights).sum()
    gradients = torch.autograd.grad(loss, llm.trainable_parameters())
    alone = [llm.score([sequence]) for sequence in sequences]
    for row, scores in enumerate(alone):
        torch.testing.assert_close(together.logps[row, : scores.logps.shape[1]], scores.logps[0], atol=1e-4, rtol=1e-4)
    loss = sum(weight * (scores.logps.sum() + scores.kl.sum()) for weight, scores in zip(weights, alone, strict=True))
    for one, other in zip(gradients, torch.autograd.grad(loss, llm.trainable_parameters()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_gradients_reach_the_adapter_and_nothing_else(models, family):
    llm = tiny_llm(models, family)
    scores = llm.score([llm.encode(text) for text in TEXTS])
    (scores.logps.sum() + scores.kl.sum()).backward()
    touched = {name for name, parameter in llm.model.named_parameters() if parameter.grad is not None}
    assert touched
    assert all("lora_" in name for name in touched)
    adapted = {name for name in touched if "lora_A" in name}
    assert len(adapted) == 2 * (4 if family == "gpt2" else 7)  # every linear layer of both blocks


def test_full_fine_tuning_trains_everything_and_keeps_the_original(models, family):
    llm = tiny_llm(models, family, adapter="full")
    before = copy.deepcopy(llm._frozen.state_dict())
    optimizer = torch.optim.SGD(llm.trainable_parameters(), lr=0.1)
    scores = llm.score([llm.encode(text) for text in TEXTS])
    (-scores.logps.sum() + scores.kl.sum()).backward()
    assert all(parameter.grad is not None for parameter in llm.model.parameters())
    optimizer.step()
    assert all(torch.equal(value, llm._frozen.state_dict()[name]) for name, value in before.items())
    assert llm.score([llm.encode(TEXTS[0])]).kl.max() > 0


def test_the_head_gradient_of_full_fine_tuning_is_the_plain_one(models, family):
    llm, ids = tiny_llm(models, family, adapter="full"), None
    ids = llm.encode(TEXTS[0])
    plain = copy.deepcopy(llm.model)
    plain_logps(plain, ids).sum().backward()
    llm.logps([ids])[0].sum().backward()
    for one, other in zip(llm.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_eq_1_single_token_verbalizers_by_the_definition(models, family):
    llm = tiny_llm(models, family)
    disturb(llm)
    verbalizers = [llm.encode(" bad")[1:][:1], llm.encode(" good")[1:][:1]]
    queries = [f"{text} This is" for text in TEXTS]
    probabilities = llm.classify(queries, verbalizers)
    for row, query in enumerate(queries):
        with torch.no_grad():
            likelihood = llm.model(input_ids=torch.tensor([llm.encode(query)])).logits[0, -1].softmax(-1)
        chosen = likelihood[[verbalizer[0] for verbalizer in verbalizers]]
        torch.testing.assert_close(probabilities[row], chosen / chosen.sum(), atol=1e-5, rtol=1e-4)


def test_eq_1_multi_token_verbalizers_by_the_definition(models, family):
    llm = tiny_llm(models, family)
    verbalizers = [llm.encode(" a bad one")[1:], llm.encode(" good")[1:]]
    assert len(verbalizers[0]) > 1
    query = llm.encode("a film. This is")
    with torch.no_grad():
        likelihood = torch.stack(
            [plain_logps(llm.model, [*query, *words])[len(query) - 1 :].sum().exp() for words in verbalizers]
        )
    actual = llm.classify(["a film. This is"], verbalizers)[0]
    torch.testing.assert_close(actual, likelihood / likelihood.sum(), atol=1e-5, rtol=1e-4)


def test_verbalizers_of_several_tokens_score_their_own_tokens_alone(models, family, monkeypatch):
    llm = tiny_llm(models, family)
    disturb(llm)
    verbalizers = [llm.encode(" bad one")[1:], llm.encode(" good")[1:]]
    assert len(verbalizers[0]) == 2
    queries = [llm.encode(f"{text} This is") for text in TEXTS]
    scored, scoring = [], llm_module.head_logps
    monkeypatch.setattr(llm_module, "head_logps", lambda h, w, t: (scored.append(len(t)), scoring(h, w, t))[1])
    actual = llm._verbalizer_logps(queries, verbalizers)
    assert scored == [len(TEXTS) * len(words) for words in verbalizers]
    for column, words in enumerate(verbalizers):
        logps, _ = llm.logps([[*query, *words] for query in queries])
        for row, query in enumerate(queries):
            expected = logps[row, len(query) - 1 : len(query) - 1 + len(words)].sum()
            torch.testing.assert_close(actual[row, column], expected, atol=1e-5, rtol=1e-5)


def test_perplexity_by_the_definition(models, family):
    llm = tiny_llm(models, family)
    text = "a good film and a bad day. " * 4
    with torch.no_grad():
        expected = (-plain_logps(llm.model, llm.encode(text))).mean().exp()
    assert llm.perplexity(text, 1000) == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(ValueError, match="no token"):
        llm.perplexity("", 10)
    llm.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no token that could be predicted"):
        llm.perplexity("a", 1)


def test_perplexity_counts_each_token_once_over_many_windows(models, family, monkeypatch):
    monkeypatch.setattr(llm_module, "PERPLEXITY_WINDOW", 5)
    llm = tiny_llm(models, family)
    ids = llm.tokenizer.encode("a good film and a bad day. " * 4, add_special_tokens=False)
    assert len(ids) > 22
    windows = [ids[start : min(start + 5, 22)] for start in range(0, 22, 5)]
    with torch.no_grad():
        logps = torch.cat([plain_logps(llm.model, [llm.tokenizer.bos_token_id, *window]) for window in windows])
    assert len(logps) == 22
    read = []
    found = llm.perplexity("a good film and a bad day. " * 4, 22, read.append)
    assert (sum(read), len(read)) == (22, 2)
    assert found == pytest.approx(float((-logps).mean().exp()), rel=1e-3)


def test_the_name_of_a_special_token_in_a_text_is_characters_to_perplexity(models, family):
    llm = tiny_llm(models, family)
    name = llm.tokenizer.all_special_tokens[0]
    text = f"a good {name} day"
    spelled = llm.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(spelled) & set(llm.tokenizer.all_special_ids)
    assert llm.tokenizer.decode(spelled) == text
    with torch.no_grad():
        expected = (-plain_logps(llm.model, [llm.tokenizer.bos_token_id, *spelled])).mean().exp()
    assert llm.perplexity(text, 1000) == pytest.approx(float(expected), rel=1e-3)
    assert set(llm.encode(text)[1:]) & set(llm.tokenizer.all_special_ids)  # elsewhere it is what it was


def test_what_is_sampled_does_not_depend_on_the_rows_beside_it(models, family):
    llm = tiny_llm(models, family)
    sampling = SynthesisConfig(max_new_tokens=10)
    prompts = [tuple(llm.encode(prompt)) for prompt in ('Write a good text: "', 'A text: "', 'Write a good text: "')]
    together = llm.generate(prompts, [1, 2, 3], sampling)
    alone = [llm.generate([prompt], [seed], sampling)[0] for prompt, seed in zip(prompts, (1, 2, 3), strict=True)]
    assert together == alone
    assert together[0] != together[2]


def test_greedy_sampling_is_the_plain_models_argmax(models, family):
    llm = tiny_llm(models, family)
    disturb(llm)
    ids = llm.encode('Write a good text: "')
    (sampled,) = llm.generate([tuple(ids)], [0], SynthesisConfig(top_k=1, max_new_tokens=6))
    for token in sampled:
        with torch.no_grad():
            assert token == int(llm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_sampling_ends_at_a_stop_string_and_counts_its_tokens(models, family):
    llm = tiny_llm(models, family)
    prompt, steps = tuple(llm.encode("a")), []
    sampling = SynthesisConfig(max_new_tokens=40, stop=("o", "e"))
    written = llm.generate([prompt] * 8, range(8), sampling, steps.append)
    assert sum(steps) == sum(map(len, written))
    for tokens in written:
        text = llm.tokenizer.decode(tokens[:-1], skip_special_tokens=True)
        assert "o" not in text
        assert "e" not in text
    assert any(len(tokens) < 40 for tokens in written)


@pytest.mark.parametrize(
    "stop",
    [("o", "e"), ("in", "d t"), ("é", "n"), (" ",), (), ("<|end", "zz"), ("。以上",), ("more than eight tokens",)],
)
def test_a_text_ends_where_decoding_all_of_it_says_so(models, family, stop):
    tokenizer = tiny_llm(models, family).tokenizer
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        tokens = torch.randint(2, len(tokenizer), (30,), generator=generator).tolist()
        if stop:  # so that it is there: the long ones never come by chance
            tokens[20:20] = tokenizer.encode(stop[0], add_special_tokens=False)
        ended = TextEnd(tokenizer, {7}, stop)
        for count in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[:count])
            expected = tokens[count - 1] == 7 or any(string in text for string in stop)
            assert ended(tokens[:count]) == expected
            if expected:
                break


def test_the_adapter_loads_with_peft_and_gives_the_same_scores(models, family, tmp_path):
    llm = tiny_llm(models, family)
    disturb(llm)
    llm.save(str(tmp_path))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / family), tmp_path).eval()
    ids = llm.encode(TEXTS[0])
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(loaded, ids), plain_logps(llm.model, ids))
    again = LLM.load_trained(str(models / family), str(tmp_path), llm.config)
    assert again.fingerprint() == llm.fingerprint()


def test_a_fully_trained_model_loads_again_with_its_original(models, family, tmp_path, monkeypatch):
    llm = tiny_llm(models, family, adapter="full")
    disturb(llm)
    llm.save(str(tmp_path))
    with monkeypatch.context() as patched:  # a third copy
        patched.setattr(llm_module, "copy", None)
        again = LLM.load_trained(str(models / family), str(tmp_path), llm.config)
    assert not any(parameter.requires_grad for parameter in again._frozen.parameters())
    ids = [llm.encode(TEXTS[0])]
    torch.testing.assert_close(again.score(ids).kl, llm.score(ids).kl)


def test_the_same_seed_gives_the_same_adapter(models):
    assert tiny_llm(models, "gpt2").fingerprint() == tiny_llm(models, "gpt2").fingerprint()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_original_is_known_again_whatever_has_been_learned(models, family, adapter):
    llm = tiny_llm(models, family, adapter=adapter)
    began_as = llm.original_digest
    again = tiny_llm(models, family, adapter=adapter)
    disturb(again)
    assert again.original_digest == began_as
    other = tiny_llm(models, family, adapter=adapter)
    original = other._frozen if other._frozen is not None else other.model
    frozen = next(parameter for parameter in original.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        frozen[0] += 1.0
    assert other.original_digest != began_as


def test_a_call_of_the_tokenizer_makes_no_other_original(models, monkeypatch):
    llm, other, third = (tiny_llm(models, "llama") for _ in range(3))
    other.tokenizer(TEXTS, truncation=True, max_length=4)
    assert other.tokenizer.backend_tokenizer.to_str() != llm.tokenizer.backend_tokenizer.to_str()
    assert other.original_digest == llm.original_digest
    monkeypatch.setattr(type(third.tokenizer), "backend_tokenizer", None)
    assert third.original_digest.startswith("sha256:")


@pytest.mark.parametrize("change", ["end", "architecture", "tokenizer"])
def test_an_original_that_reads_or_ends_otherwise_is_another_one(models, change):
    llm, other = (tiny_llm(models, "llama") for _ in range(2))
    if change == "end":
        other.model.generation_config.eos_token_id = [1, 5]
    elif change == "architecture":
        other.model.config.rms_norm_eps = 0.1
    else:
        other.tokenizer.add_tokens(["another word"])
    assert other.original_digest != llm.original_digest


def test_the_original_is_known_again_in_bfloat16(models, family):
    in_bfloat16 = tiny_llm(models, family, dtype="bfloat16")
    assert in_bfloat16.original_digest == tiny_llm(models, family).original_digest


def test_verbalizers_that_start_alike_are_refused(models, family, task):
    tokenizer = tiny_llm(models, family).tokenizer
    alike = dataclasses.replace(task, verbalizers=("good", "good film"))
    with pytest.raises(
        ConfigError, match=r"'good' \('good film'\) and 'bad' \('good'\)|'good film'.* start with the same"
    ):
        verbalizer_ids(tokenizer, alike)
    found = verbalizer_ids(tokenizer, task)
    assert [tokenizer.decode(ids) for ids in found] == [" bad", " good"]


def test_a_head_that_is_not_a_plain_matrix_is_refused(models):
    model = AutoModelForCausalLM.from_pretrained(models / "gemma3")
    model.config.final_logit_softcapping = 0.01
    with pytest.raises(ModelError, match="not a plain matrix"):
        LLM(model, None, LLMConfig(model="gemma3"))


def test_a_model_whose_logits_are_capped_is_refused_before_it_is_loaded(models, tmp_path):
    config = AutoConfig.from_pretrained(models / "gemma3")
    config.final_logit_softcapping = 30.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has final_logit_softcapping, and crosslm supports no scale or soft cap"):
        check_causal(str(tmp_path), "mine")
    check_causal(str(models / "gemma3"), "mine")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BloomConfig(),
            r"config\.json \(bloom\) does not say how many tokens it reads .*choose a GPT-2, Llama or Gemma 3",
        ),
        (
            Qwen3MoeConfig(),
            r"\(qwen3_moe\) has num_experts, .* no mixture of experts; choose a GPT-2, Llama or Gemma 3",
        ),
        (BartConfig(), r"is an encoder with a decoder \(bart\), .*choose a GPT-2, Llama or Gemma 3"),
        (
            Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
            r"\(lfm2\) has a layer of conv, .* layers of attention alone; choose a GPT-2",
        ),
        (FalconH1Config(), r"\(falcon_h1\) has a layer of hybrid, .* layers of attention alone; choose a GPT-2"),
    ],
)
def test_a_family_that_cannot_be_trained_is_refused_before_it_is_loaded(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        check_causal(str(tmp_path), "mine")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        LLM.load(str(tmp_path), LLMConfig(model="nothing"), 0)


def test_a_model_that_reads_pictures_is_refused_before_it_is_loaded(tmp_path):
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"reads pictures too, which crosslm does not support; choose a model of text"):
        LLM.load(str(tmp_path), LLMConfig(model=str(tmp_path)), 0)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_an_interpolated_llm_lies_between_the_original_and_the_trained_one(models, family, adapter):
    llm = tiny_llm(models, family, adapter=adapter)
    disturb(llm)
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}

    def weights(model):  # without the adapter's matrices; tied ones once
        named = ((name.replace(".base_layer", ""), value) for name, value in model.named_parameters())
        return {name: value.clone() for name, value in named if "lora" not in name}

    def merged_weights():
        with merged(llm.model, llm.device) as model:
            return weights(model)

    with llm._reference() as reference:
        original = weights(reference)
    trained = merged_weights()
    assert max((trained[name] - value).abs().max() for name, value in original.items()) > 1e-3
    with llm.interpolated(0.25):
        for name, value in merged_weights().items():
            torch.testing.assert_close(value, 0.75 * original[name] + 0.25 * trained[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(KeyboardInterrupt), llm.interpolated(0.25):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in llm.model.state_dict().items())
    with llm.interpolated(1.0):
        assert all(torch.equal(value, trained[name]) for name, value in merged_weights().items())
