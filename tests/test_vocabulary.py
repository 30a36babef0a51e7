"""Trimming: the texts are encoded as before, every other text still can be, and nothing else changes."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import CORPUS
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crosslm.config import Config, LLMConfig
from crosslm.errors import ConfigError, DataError, ModelError, RunError
from crosslm.models import vocabulary
from crosslm.models.llm import LLM
from crosslm.models.sources import lock_of
from crosslm.models.vocabulary import cached_trim, tokenizer_words, trim_vocabulary, trimmable_tokenizer
from crosslm.runs.preparation import original_llm
from crosslm.support.files import alone
from crosslm.support.writing import writing

TEXTS = CORPUS[:10]
FAMILIES = ("gpt2", "llama", "gemma3", "bytefallback")


def like_gemma(folder):
    """A tokenizer of Gemma's kind: a space becomes a mark, unknown characters become bytes."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # the trainer knows bytes as added tokens only; in Gemma's vocabulary they are ordinary ones
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 4]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), tie_word_embeddings=False, **wide, **ids)).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def trimmed(models, tmp_path_factory):
    """For each family the whole model's folder and the trimmed one's."""
    root = tmp_path_factory.mktemp("trimmed")
    like_gemma(root / "whole-bytefallback")
    folders = {family: (models / family, root / family) for family in FAMILIES[:3]}
    folders["bytefallback"] = (root / "whole-bytefallback", root / "bytefallback")
    for whole, cut in folders.values():
        done = trim_vocabulary(str(whole), TEXTS, cut)
        assert done.tokens_after < done.tokens_before
        assert done.parameters_after < done.parameters_before
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_the_texts_are_encoded_as_before(trimmed, family):
    whole, cut = (AutoTokenizer.from_pretrained(folder) for folder in trimmed[family])
    for text in TEXTS:
        before = whole.convert_ids_to_tokens(whole.encode(text))
        assert cut.convert_ids_to_tokens(cut.encode(text)) == before
    assert cut.eos_token == whole.eos_token
    assert cut.bos_token == whole.bos_token
    assert max(cut.get_vocab().values()) == len(cut) - 1


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.text(max_size=40))
def test_every_text_can_still_be_encoded(trimmed, family, text):
    tokenizer = cached_tokenizer(trimmed[family][1])
    ids = tokenizer.encode(text, add_special_tokens=False)
    if family == "bytefallback":
        text = text.replace("▁", " ")  # such a tokenizer cannot tell them apart
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


TOKENIZERS = {}


def cached_tokenizer(folder):
    if folder not in TOKENIZERS:
        TOKENIZERS[folder] = AutoTokenizer.from_pretrained(folder)
    return TOKENIZERS[folder]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_the_whole_models(trimmed, family):
    whole_folder, cut_folder = trimmed[family]
    whole, cut = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in trimmed[family])
    names = cached_tokenizer(cut_folder).get_vocab()
    old = torch.tensor([cached_tokenizer(whole_folder).get_vocab()[name] for name in sorted(names, key=names.get)])
    ids = torch.tensor([cached_tokenizer(cut_folder).encode(TEXTS[0])])
    with torch.no_grad():
        expected = whole(input_ids=old[ids]).logits[..., old]
        torch.testing.assert_close(cut(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        new, before = getattr(cut.generation_config, name), getattr(whole.generation_config, name)
        assert (new is None and before is None) or int(old[new]) == before


def test_an_adapter_trained_on_it_fits_the_whole_model(trimmed, tmp_path):
    whole_folder, cut_folder = trimmed["gemma3"]
    llm = LLM.load(str(cut_folder), LLMConfig(model="gemma3", lora_rank=4), seed=0)
    optimizer = torch.optim.SGD(llm.trainable_parameters(), lr=1.0)
    for _ in range(2):
        logps, _ = llm.logps([llm.encode(text) for text in TEXTS])
        optimizer.zero_grad()
        (-logps.mean()).backward()
        optimizer.step()
    llm.save(str(tmp_path / "adapter"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(whole_folder), str(tmp_path / "adapter"))
    ids = torch.tensor([[0, *cached_tokenizer(whole_folder).encode(TEXTS[0])]])
    with torch.no_grad():
        old = adapted.get_base_model().base_model(ids).last_hidden_state
        new = llm.model.get_base_model().base_model(torch.tensor([llm.encode(TEXTS[0])])).last_hidden_state
        with adapted.disable_adapter():
            plain = adapted.get_base_model().base_model(ids).last_hidden_state
    torch.testing.assert_close(old, new, atol=1e-5, rtol=1e-5)
    assert (plain - new).abs().max() > 1e-3  # the adapter does something


def test_a_run_trims_once_into_the_cache(settings, models, tmp_path):
    settings["llm"]["vocabulary_texts"] = ["plain.txt"]
    config, news = Config.model_validate(settings), []
    folder = original_llm(config, tmp_path, news.append)
    assert len(news) == 1
    assert len(AutoTokenizer.from_pretrained(folder)) < 400
    assert original_llm(config, tmp_path, pytest.fail) == folder
    whole, cut = AutoTokenizer.from_pretrained(models / "gpt2"), AutoTokenizer.from_pretrained(folder)
    for text in ['Write a bad text: "', 'A good text: "', "text This is good.", "text This is bad"]:
        assert cut.tokenize(text) == whole.tokenize(text)  # the task's own words stay whole
    whole = config.model_copy(update={"llm": config.llm.model_copy(update={"vocabulary_texts": ()})})
    assert original_llm(whole, tmp_path, pytest.fail) == str(models / "gpt2")


def test_what_another_process_is_trimming_is_waited_for_and_taken(models, tmp_path):
    one = cached_trim(str(models / "gpt2"), TEXTS, tmp_path / "one", lambda _: None)
    theirs, news = tmp_path / "two/models" / Path(one).name, []
    with ThreadPoolExecutor(1) as pool:
        with alone(lock_of(theirs)):
            ours = pool.submit(cached_trim, str(models / "gpt2"), TEXTS, tmp_path / "two", news.append)
            time.sleep(0.5)
            shutil.copytree(one, theirs)
        assert ours.result() == str(theirs)
    assert not news


def test_what_could_not_be_written_whole_is_taken_away_again(models, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(vocabulary, "_cut_tokenizer", full)
    with pytest.raises(RunError, match="cannot be written: no space left"):
        trim_vocabulary(str(models / "gpt2"), TEXTS, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_what_a_process_that_was_killed_has_left_in_the_cache_is_no_hindrance(models, tmp_path):
    made = cached_trim(str(models / "gpt2"), TEXTS, tmp_path, lambda _: None)
    Path(made).rename(f"{made}.partial")
    assert cached_trim(str(models / "gpt2"), TEXTS, tmp_path, lambda _: None) == made
    assert not Path(f"{made}.partial").exists()


def test_what_is_there_needs_no_lock_and_so_no_cache_that_can_be_written(models, tmp_path):
    made = cached_trim(str(models / "gpt2"), TEXTS, tmp_path, lambda _: None)
    lock_of(Path(made)).unlink()
    assert cached_trim(str(models / "gpt2"), TEXTS, tmp_path, pytest.fail) == made
    assert not lock_of(Path(made)).exists()


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has changed"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_what_is_damaged_in_the_cache_is_named_with_what_to_do(models, tmp_path, damage, how):
    made = Path(cached_trim(str(models / "gpt2"), TEXTS, tmp_path, lambda _: None))
    copied = made / "copied"
    (made / "model.safetensors").rename(copied)
    shutil.copyfile(copied, made / "model.safetensors")  # has another time, and is the same
    copied.unlink()
    assert cached_trim(str(models / "gpt2"), TEXTS, tmp_path, pytest.fail) == str(made)
    damage(made / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{made}/model.safetensors: {how}; delete the folder, which is made again"):
        cached_trim(str(models / "gpt2"), TEXTS, tmp_path, pytest.fail)
    shutil.rmtree(made)
    assert cached_trim(str(models / "gpt2"), TEXTS, tmp_path, lambda _: None) == str(made)


def test_a_model_folder_that_has_changed_is_trimmed_again(models, tmp_path):
    shutil.copytree(models / "gpt2", tmp_path / "model")
    first = cached_trim(str(tmp_path / "model"), TEXTS, tmp_path, lambda _: None)
    assert cached_trim(str(tmp_path / "model"), TEXTS, tmp_path, pytest.fail) == first
    AutoModelForCausalLM.from_pretrained(models / "gpt2").save_pretrained(tmp_path / "model")
    assert cached_trim(str(tmp_path / "model"), TEXTS, tmp_path, lambda _: None) != first


def test_words_of_a_tokenizer_come_in_every_form(models):
    words = tokenizer_words(str(models / "bert"))
    assert {"good", " good", "Good", " Good"} <= set(words)
    assert "[CLS]" not in words
    assert "." not in words


def test_bad_input(models, settings, tmp_path):
    with pytest.raises(ModelError, match="WordLevel; only byte-pair"):
        trim_vocabulary(str(models / "encoder"), TEXTS, tmp_path / "new")
    with pytest.raises(ModelError, match="are empty"):
        trim_vocabulary(str(models / "gpt2"), [], tmp_path / "new")
    with pytest.raises(ModelError, match="cannot be loaded as a language model"):
        trim_vocabulary(str(tmp_path / "nothing"), TEXTS, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ModelError, match="is there already"):
        trim_vocabulary(str(models / "gpt2"), TEXTS, tmp_path / "full")
    (tmp_path / "full").rename(tmp_path / "new.partial")
    with pytest.raises(ModelError, match=r"new\.partial: is there already, .*; delete it"):
        trim_vocabulary(str(models / "gpt2"), TEXTS, tmp_path / "new")
    assert (tmp_path / "new.partial" / "file").read_text() == "mine"
    shutil.copytree(models / "gpt2", tmp_path / "words")
    shutil.copy(models / "encoder" / "tokenizer.json", tmp_path / "words")
    settings["llm"] |= {"vocabulary_texts": ["plain.txt"], "model": str(tmp_path / "words")}
    with pytest.raises(ModelError, match=r"only byte-pair.*\n.*vocabulary_texts = \[\]"):
        original_llm(Config.model_validate(settings), tmp_path, lambda _: None)
    settings["llm"] |= {"model": str(models / "gpt2")}
    settings["task"]["verbalizer"] = {"bad": "good day", "good": "good"}
    with pytest.raises(ConfigError, match="start with the same token"):
        original_llm(Config.model_validate(settings), tmp_path / "unused", pytest.fail)  # before it is trimmed
    assert not (tmp_path / "unused").exists()
    settings["llm"]["vocabulary_texts"] = ["missing.txt"]
    with pytest.raises(DataError, match=r"missing\.txt: no such file"):
        original_llm(Config.model_validate(settings), tmp_path, pytest.fail)


def test_a_vocabulary_without_bytes_is_refused(models, tmp_path):
    tokenizer = Tokenizer(BPE())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    AutoModelForCausalLM.from_pretrained(models / "gpt2").save_pretrained(tmp_path / "whole")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match="of the 256 bytes"):
        trimmable_tokenizer(str(tmp_path / "whole"))  # before the model is loaded
    with pytest.raises(ModelError, match="of the 256 bytes"):
        trim_vocabulary(str(tmp_path / "whole"), TEXTS, tmp_path / "new")


def test_generation_and_update_work_on_it(trimmed):
    from crosslm.config import SynthesisConfig

    llm = LLM.load(str(trimmed["llama"][1]), LLMConfig(model="llama", lora_rank=4), seed=0)
    prompts = [tuple(llm.encode("Write a good text:"))] * 2
    texts = llm.generate(prompts, [0, 1], SynthesisConfig(max_new_tokens=5))
    assert all(0 < len(text) <= 5 for text in texts)


def test_a_padding_token_that_there_is_not_is_left_out(models, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(models / "llama", whole)
    config = json.loads((whole / "config.json").read_text()) | {"pad_token_id": -1}
    (whole / "config.json").write_text(json.dumps(config))
    trim_vocabulary(str(whole), TEXTS, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text()).get("pad_token_id") is None
    assert LLM.load(str(tmp_path / "cut"), LLMConfig(model="llama", lora_rank=4), seed=0).encode("a good text")


def test_a_cache_that_cannot_be_written_is_named(models, tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(RunError, match=r"gemma3-trimmed-\w+: cannot be written: .*CROSSLM_CACHE for the cache"):
        cached_trim(str(models / "gemma3"), TEXTS, tmp_path, lambda _: None)


def test_what_is_wrong_with_a_model_is_not_put_down_to_the_disk(tmp_path):
    wrong = ModelError("'llm' cannot be loaded: Permission denied (os error 13)")
    with pytest.raises(ModelError) as found, writing(tmp_path, "hint"):
        raise wrong
    assert found.value is wrong


def test_a_full_disk_is_said_and_leaves_no_half_of_a_model(models, tmp_path, monkeypatch):
    """safetensors' own exception is no OSError."""

    def full(model, folder):
        Path(folder).mkdir(parents=True)
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    said = r"gemma3-trimmed-\w+: cannot be written: Error while .*\(os error 28\); make room there, or name .*\)$"
    with pytest.raises(RunError, match=said) as found:
        cached_trim(str(models / "gemma3"), TEXTS, tmp_path, lambda _: None)
    assert str(found.value).count("cannot be written") == 1
    assert [path for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("seal", ["[", "[]", '{"config.json": 3}'])
def test_a_damaged_seal_is_named(models, tmp_path, seal):
    made = Path(cached_trim(str(models / "gpt2"), TEXTS, tmp_path, lambda _: None))
    (made / "crosslm.json").write_text(seal)
    with pytest.raises(ModelError, match=r"crosslm.json: cannot be read: .*; delete the folder"):
        cached_trim(str(models / "gpt2"), TEXTS, tmp_path, pytest.fail)
    (made / "crosslm.json").unlink()  # as an earlier version left it
    assert cached_trim(str(models / "gpt2"), TEXTS, tmp_path, pytest.fail) == str(made)
