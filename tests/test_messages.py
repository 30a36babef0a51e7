"""Uploads and downloads as bytes."""

import contextlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslm.errors import UploadError
from crosslm.federation.messages import decode_download, decode_upload, describe, encode
from crosslm.records import Download, SlmState, Upload


def state(**weights):
    return SlmState({"model_type": "bert"}, {"tokenizer.json": "{}"}, ("a", "b"), 32, weights or {"w": torch.eye(2)})


UPLOAD = Upload("north", 3, (4, 5), {"loss": 0.5}, state())
DOWNLOAD = Download("north", 3, 7, {"selected": 9.0}, state())


def same(one, other):
    assert one.slm.weights.keys() == other.slm.weights.keys()
    for name, tensor in one.slm.weights.items():
        assert tensor.dtype == other.slm.weights[name].dtype
        assert torch.equal(tensor, other.slm.weights[name])
    assert {**vars(one), "slm": None} == {**vars(other), "slm": None}
    assert {**vars(one.slm), "weights": None} == {**vars(other.slm), "weights": None}


def test_round_trip():
    same(decode_upload(encode(UPLOAD)), UPLOAD)
    same(decode_download(encode(DOWNLOAD)), DOWNLOAD)


@given(
    st.text(min_size=1, max_size=20),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]),
    st.lists(st.integers(0, 4), max_size=3),
)
def test_round_trip_of_anything(client_id, counts, dtype, shape):
    upload = Upload(client_id, 0, tuple(counts), {}, state(weight=torch.ones(shape).to(dtype)))
    same(decode_upload(encode(upload)), upload)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data):
    with pytest.raises(UploadError):
        decode_upload(data)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_or_cut_upload_is_refused_or_read_but_never_breaks(place, value):
    data = bytearray(encode(UPLOAD))
    data[place % len(data)] = value
    for changed in (bytes(data), bytes(data[:place])):
        with contextlib.suppress(UploadError):
            decode_upload(changed)


def test_the_kinds_are_not_mixed_up():
    with pytest.raises(UploadError, match="expected a upload of version 1, found a download"):
        decode_upload(encode(DOWNLOAD))


def test_a_header_that_lies_about_its_length_is_refused():
    with pytest.raises(UploadError, match="claims"):
        decode_upload(struct.pack("<Q", 2**60) + b"{}")


def test_what_is_described_is_what_is_sent():
    description = describe(UPLOAD)
    assert description["tensors"] == {"w": {"shape": [2, 2], "dtype": "torch.float32", "bytes": 16}}
    assert description["bytes"] == 16
    assert set(description) == {"client_id", "client_round", "class_counts", "metrics", "tensors", "bytes"}
