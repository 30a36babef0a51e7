"""Intake: crafted uploads, each refused with a reason, none of them doing anything else."""

import base64
import dataclasses
import json
import resource
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TASK
from crafted import CHARSMAP, crafted, joined, parts
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from crosslm.config import Config
from crosslm.errors import UploadError
from crosslm.federation import intake
from crosslm.federation.intake import UNFORESEEN, Intake
from crosslm.federation.messages import encode
from crosslm.federation.tokenizer_rules import _check_part
from crosslm.models.architecture import MODEL_TYPES, check_architecture, on_meta, travelling
from crosslm.models.slm import SLM
from crosslm.records import Download, Upload
from crosslm.task import Task


@pytest.fixture(scope="module")
def good(models):
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    return encode(Upload("north", 0, (4, 5), {"loss": 0.5}, slm.to_state()))


def check(data, task, config):
    return Intake(task.labels, config.intake).upload(data, "north")


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "gemma3"])
def test_an_honest_upload_passes_unchanged(models, task, config, kind, tmp_path):
    slm = SLM.load(str(models / kind), ("good", "bad"), 32, 0)
    slm.predict_proba(["a good film."])  # its tokenizer now holds a truncation
    upload = Upload("north", 2, (4, 5), {"loss": 0.5, "epochs": 3.0}, slm.to_state())
    data = encode(upload)
    path = tmp_path / "upload.safetensors"
    path.write_bytes(data)
    for source in (data, path):
        received = check(source, task, config)
        assert dataclasses.replace(received, slm=upload.slm) == upload
        assert received.slm.architecture == upload.slm.architecture
        assert all(torch.equal(value, upload.slm.weights[name]) for name, value in received.slm.weights.items())
        rebuilt = SLM.from_state(received.slm, received.slm.labels)
        assert torch.allclose(rebuilt.predict_proba(["a good day."]), slm.predict_proba(["a good day."]))
    half = {name: value.half() if value.is_floating_point() else value for name, value in upload.slm.weights.items()}
    check(encode(dataclasses.replace(upload, slm=dataclasses.replace(upload.slm, weights=half))), task, config)


ASKED_FOR = {
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "cls_dropout": 0.3,
    },
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "talking_head": True, "cls_dropout": 0.3},
    "qwen2": {"head_dim": 16, "num_key_value_heads": 2},
}
"""By type what its model asks a configuration for that has no such value by itself; DeBERTa v3 and v2 have it."""


@pytest.mark.parametrize("model_type", ASKED_FOR)
def test_what_only_some_models_of_a_type_have_travels_too(models, task, config, model_type, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    given = {"vocab_size": len(tokenizer) + 8, "pad_token_id": 0, "max_position_embeddings": 64}
    made = AutoConfig.for_model(model_type, **small, **given, **ASKED_FOR[model_type])
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    slm = SLM.load(str(tmp_path), ("good", "bad"), 32, 0)
    received = check(encode(Upload("north", 0, (4, 5), {}, slm.to_state())), task, config)
    rebuilt = SLM.from_state(received.slm, received.slm.labels)
    expected = slm.predict_proba(["a good day.", "a bad film"])
    torch.testing.assert_close(rebuilt.predict_proba(["a good day.", "a bad film"]), expected)
    carried = json.loads(rebuilt.model.config.to_json_string())
    assert {key: carried.get(key) for key in ASKED_FOR[model_type]} == ASKED_FOR[model_type]


def test_every_crafted_upload_is_refused_and_the_next_one_is_served(good, task, config, tmp_path):
    canary = tmp_path / "canary"
    names = set()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data, message in crafted(good, canary):
        assert name not in names, name
        names.add(name)
        with pytest.raises(UploadError) as refusal:
            check(data, task, config)
        assert str(refusal.value).startswith("client north: ")
        assert message in str(refusal.value), (name, str(refusal.value))
        assert UNFORESEEN not in str(refusal.value), (name, str(refusal.value))
        assert len(str(refusal.value)) < 1500, name
        assert not canary.exists(), name
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(names) >= 200
    assert grown * (1 if sys.platform == "darwin" else 1024) < 512 * 2**20
    assert check(good, task, config).client_id == "north"


def test_positions_that_begin_behind_the_padding_are_not_counted_twice(models, task, config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    places = {"max_position_embeddings": 32, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    RobertaForSequenceClassification(RobertaConfig(**small, **places)).save_pretrained(tmp_path)
    slm = SLM.load(str(tmp_path), ("good", "bad"), 99, 0)
    longest = 32 - tokenizer.pad_token_id - 1
    assert slm.max_length == longest
    state = slm.to_state()
    assert check(encode(Upload("north", 0, (4, 5), {}, state)), task, config).slm.max_length == longest
    with pytest.raises(UploadError, match=f"its max_length is 32; the architecture reads 1 to {longest} tokens"):
        check(encode(Upload("north", 0, (4, 5), {}, dataclasses.replace(state, max_length=32))), task, config)


def test_a_file_is_not_read_before_its_header_has_passed(good, task, config, tmp_path):
    path = tmp_path / "upload"
    header, body = parts(good)
    header["__metadata__"]["crosslm"]["client_id"] = "south"
    path.write_bytes(joined(header, body))
    with path.open("r+b") as file:
        file.truncate(2**31 + 1)  # sparse: takes no space
    with pytest.raises(UploadError, match=r"has 2147483649 bytes; at most 2147483648 are allowed \(intake.max_bytes\)"):
        check(path, task, config)
    with path.open("r+b") as file:
        file.truncate(2**31 - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UploadError, match="tensors fill"):
        check(path, task, config)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 100 * 2**10
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UploadError, match="not an ordinary file"):
        check(path, task, config)


def test_bounds_are_those_of_the_configuration(good, task, config):
    def bound(**values):
        return Config.model_validate({**config.model_dump(), "intake": values})

    with pytest.raises(UploadError, match=r"at most 100 are allowed \(intake.max_bytes\)"):
        check(good, task, bound(max_bytes=100))
    with pytest.raises(UploadError, match=r"intake.max_rms"):
        check(good, task, bound(max_rms=0.001))
    with pytest.raises(UploadError, match=r"intake.max_seconds"):
        check(good, task, bound(max_seconds=1e-9))


@pytest.mark.parametrize(("place", "name"), [(intake, "decode_upload"), (torch.Tensor, "norm")])
def test_the_time_is_looked_at_until_the_last_number_is_checked(good, task, config, monkeypatch, place, name):
    now, function = [0.0], getattr(place, name)

    def slow(*arguments):
        now[0] += 1000.0
        return function(*arguments)

    monkeypatch.setattr(place, name, slow)
    monkeypatch.setattr(intake, "time", SimpleNamespace(thread_time=lambda: now[0]))
    with pytest.raises(UploadError, match=r"its checks took more than 120 s \(intake.max_seconds\)"):
        check(good, task, config)


def test_an_id_that_is_a_path_is_refused(good, task, config):
    for name in ("../north", "", "a/b", ".", "x" * 65, "north\n"):
        with pytest.raises(UploadError, match="its id must be"):
            Intake(task.labels, config.intake).upload(good, name)


def test_a_download_is_checked_the_same_way(good, task, config, tmp_path):
    downloads = Intake(task.labels, config.intake).download
    upload = check(good, task, config)
    data = encode(Download("north", 0, 1, {"selected": 3.0}, upload.slm))
    assert downloads(data, "north").step == 1
    with pytest.raises(UploadError, match="client north: what the server returned is refused: expected a download"):
        downloads(good, "north")
    refused = 0
    for name, crafted_data, _ in crafted(data, tmp_path / "canary", "download"):
        with pytest.raises(UploadError, match="what the server returned"):
            downloads(crafted_data, "north")
        refused += 1
        assert name
    assert refused >= 200
    assert not (tmp_path / "canary").exists()


CONFIG = Config.model_validate(
    {
        "name": "x",
        "task": TASK,
        "data": {"train": "x", "test": "x"},
        "slm": {"models": [{"model": "x"}]},
        "llm": {"model": "x"},
    }
)


def rebuilt_or_refused(data):
    """What passes can be rebuilt; what does not is refused by a check that knew what it was looking for."""
    reason = ""
    try:
        slm = check(data, Task.from_config(CONFIG.task), CONFIG).slm
        SLM.from_state(slm, slm.labels)
    except UploadError as refusal:
        reason = str(refusal)
    assert UNFORESEEN not in reason
    assert "cannot be rebuilt" not in reason


@given(changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_changes_are_refused_or_leave_a_classifier_that_can_be(good, changes):
    (length,) = struct.unpack_from("<Q", good)
    changed = bytearray(good)
    for place, value in changes:
        changed[place % (length + 72)] = value
    rebuilt_or_refused(bytes(changed))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@given(
    field=st.sampled_from(
        ["client_round", "class_counts", "metrics", "slm", "labels", "architecture", "tokenizer", "max_length"]
    ),
    value=json_values,
)
def test_any_value_in_any_field_is_refused_or_harmless(good, field, value):
    header, body = parts(good)
    fields = header["__metadata__"]["crosslm"]
    (fields["slm"] if field in fields["slm"] else fields)[field] = value
    rebuilt_or_refused(joined(header, body))


KEYS = "vocab_size hidden_size num_hidden_layers hidden_act type_vocab_size pad_token_id is_decoder layer_norm_eps"


@given(
    key=st.sampled_from([*KEYS.split(), "add_cross_attention", "tie_word_embeddings", "use_cache"]), value=json_values
)
def test_any_value_of_an_architecture_is_refused_or_fits_its_tensors(good, key, value):
    header, body = parts(good)
    header["__metadata__"]["crosslm"]["slm"]["architecture"][key] = value
    rebuilt_or_refused(joined(header, body))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_allowed_type_can_be_described_without_memory(model_type):
    architecture = travelling({"model_type": model_type, "auto_map": {}, "transformers_version": "1"}, ("a", "b"))
    check_architecture(architecture)
    if model_type == "gpt2":
        architecture["pad_token_id"] = 0
    model = on_meta(architecture, 2)
    assert {str(tensor.device) for tensor in model.state_dict().values()} == {"meta"}


def test_an_architecture_of_some_hundred_labels_may_travel():
    labels = [f"label {place}" for place in range(300)]
    architecture = travelling({"model_type": "bert", "transformers_version": "1"}, labels)
    check_architecture(architecture)
    assert on_meta(architecture, len(labels)).config.num_labels == 300


@pytest.mark.parametrize(("model_type", "key"), [("bert", "hidden_dropout_prob"), ("gpt2", "resid_pdrop")])
@pytest.mark.parametrize("value", [5.0, -0.1])
def test_a_dropout_that_would_fail_in_training_is_refused(model_type, key, value):
    architecture = travelling({"model_type": model_type, key: value, "transformers_version": "1"}, ("a", "b"))
    with pytest.raises(UploadError, match=rf"its architecture has {key} = {value}; 0 to 1 is allowed"):
        check_architecture(architecture)


def test_a_charsmap_of_replacements_as_long_as_unicodes_passes():
    data = CHARSMAP + b"\0" + "صلى الله عليه وسلم".encode() + b"\0"
    part = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
    _check_part("normalizer", part, 10)
