"""Hostile uploads: a good one, changed in one way each. Every entry is (name, bytes, part of the refusal)."""

import base64
import copy
import json
import pickle
import struct
import zipfile
from io import BytesIO

import numpy as np

CHARSMAP = struct.pack("<II", 4, 0) + b"a"
"""Of a Precompiled normalizer: a trie of one unit, and the begin of what may take a character's place."""


HEADERS = {
    "nothing": "claims",
    **dict.fromkeys(("null", "a list", "a word"), "header is not an object"),
    **dict.fromkeys(("deep lists", "deep objects", "many lists", "many names"), "holds more than"),
    "the metadata twice": "twice",
    "only metadata": "0 tensors",
    "no metadata": "metadata is not an object",
}


def parts(data):
    """Header (with its inner JSON and tokenizer parsed) and body of an upload."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["crosslm"] = json.loads(header["__metadata__"]["crosslm"])
    return header, data[8 + length :]


def joined(header, body):
    """The other way round; what is a string already stays as it is."""
    header = copy.deepcopy(header)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get("crosslm"), dict):
        metadata["crosslm"] = json.dumps(metadata["crosslm"])
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + body


class Exploit:
    """Leaves a canary when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def crafted(good, canary, kind="upload"):
    """All of them, at least 200; of a download without those that are about an upload's own fields."""
    yield from _raw(good, canary)
    yield from _tables(good)
    yield from _fields(good) if kind == "upload" else ()
    yield from _architectures(good)
    yield from _tokenizers(good)
    yield from _numbers(good)


def _raw(good, canary):
    (length,) = struct.unpack_from("<Q", good)
    header, body = parts(good)
    code = pickle.dumps(Exploit(str(canary)))
    yield "empty", b"", "no safetensors file"
    for size in (1, 7, 8, 9, 100, 8 + length // 2, 8 + length, 9 + length, len(good) - 1, len(good) - 4):
        message = "no safetensors file" if size < 8 else "claims" if size < 8 + length else "fill"
        yield f"cut at {size}", good[:size], message
    yield "one byte more", good + b"\0", "fill"
    yield "a megabyte more", good + bytes(2**20), "fill"
    yield "pickle", code, "claims"
    yield "pickle with a length", struct.pack("<Q", len(code)) + code, "header is not JSON"
    yield "pickle behind a good header", joined(header, code + bytes(max(0, len(body) - len(code)))), ""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/bomb", bytes(10**7))
    yield "torch archive", archive.getvalue(), "claims"
    for name, start in {"gzip": b"\x1f\x8b\x08", "elf": b"\x7fELF", "gguf": b"GGUF", "npy": b"\x93NUMPY"}.items():
        yield name, start + bytes(200), "claims"
    for claim in (0, 1, length - 1, length + 1, len(good) - 8, len(good), 2**31, 2**32, 2**63, 2**64 - 1):
        message = "claims" if claim < 2 or claim > len(good) - 8 else ""
        yield f"header of {claim} bytes", struct.pack("<Q", claim) + good[8:], message
    for name, text in {
        "nothing": "",
        "null": "null",
        "a list": "[1, 2]",
        "a word": '"word"',
        "deep lists": "[" * 100_000,
        "deep objects": '{"a":' * 100_000,
        "many lists": "[" + "[]," * 200_000 + "[]]",
        "many names": "{" + ",".join(f'"t{n}":0' for n in range(100_000)) + "}",
        "NaN": '{"__metadata__": {"crosslm": "{}"}, "w": NaN}',
        "a long number": '{"w": ' + "9" * 100_000 + "}",
        "an infinite number": '{"w": 1e999}',
        "an open string": '"' + '\\"' * 200_000,
        "not UTF-8": "\udcff\udcfe",
        "half a character": '{"__metadata__": {"crosslm": "\\ud800"}}',
        "the metadata twice": '{"__metadata__": {"crosslm": "{}"}, "__metadata__": {"crosslm": "{}"}}',
        "only metadata": '{"__metadata__": {"crosslm": "{}"}}',
        "no metadata": '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    }.items():
        raw = text.encode("utf-8", "surrogateescape")
        yield f"header: {name}", struct.pack("<Q", len(raw)) + raw + bytes(4), HEADERS.get(name, "is not JSON")
    raw = ('{"Ģ": [' + "[]," * 200_000 + '[]], "Ģ": 1}').encode("utf-16-le")  # its first byte is that of a quote
    yield "header: UTF-16", struct.pack("<Q", len(raw)) + raw + bytes(4), "is not JSON"


def _tables(good):
    header, body = parts(good)
    names = [name for name in header if name != "__metadata__"]
    first, second = names[0], names[1]

    def changed(name, message, **fields):
        new = copy.deepcopy(header)
        new[first] |= fields
        return f"tensor with {name}", joined(new, body), message

    for dtype in ("F64", "I8", "BOOL", "F8_E4M3", "Q4", "", "object", None, 3, ["F32"], {"a": 1}):
        yield changed(f"dtype {dtype!r}", "dtype", dtype=dtype)
    for dtype in ("F16", "BF16", "I64"):
        yield changed(f"lying dtype {dtype}", "claims the shape", dtype=dtype)
    for shape in ([], [1], [-1], [2**40], [2**62, 2**62], [0], [1.5], ["3"], None, "3", [1] * 99, [True], [10**30]):
        message = "claims the shape" if str(shape) in ("[]", "[1]", "[0]", str([2**40])) else "cannot be"
        yield changed(f"shape {str(shape)[:30]}", message, shape=shape)
    for offsets in ([0, 0], [4, 0], [-4, 0], [0, 2**60], [0], [0, 1, 2], None, ["0", "4"], [0.0, 4.0], [2**63, 2**64]):
        message = "claims the shape" if offsets in ([0, 0], [4, 0]) else "cannot be"
        yield changed(f"offsets {offsets}", message, data_offsets=offsets)
    yield changed("another field", "is not described", code="import os")
    for name in (first, second):
        new = {key: value for key, value in header.items() if key != name}
        yield f"without {name}", joined(new, body), "bytes between them"
    overlapping = copy.deepcopy(header)
    overlapping[first] = overlapping[second]
    yield "overlapping tensors", joined(overlapping, body), "overlap"
    for name in ("../../etc/passwd", "/etc/passwd", "..\\x", "x" * 10_000, "", "\0", "weights.pkl", "__metadata__ "):
        new = {(name if key == first else key): value for key, value in header.items()}
        message = "is missing" if len(name) < 100 else "is not described"
        yield f"tensor named {name[:20]!r}", joined(new, body), message
    extra = copy.deepcopy(header)
    extra["one more"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
    yield "one tensor more", joined(extra, body + bytes(8)), "not one of it"
    extra["one more"] = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [len(body), len(body)]}
    yield "an empty tensor more", joined(extra, body), "not one of it"
    giant = copy.deepcopy(header)
    giant["giant"] = {"dtype": "F32", "shape": [2**38], "data_offsets": [len(body), len(body) + 2**40]}
    yield "a giant tensor", joined(giant, body), "fill"
    many = copy.deepcopy(header)
    many |= {f"e{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(5000)}
    yield "5,000 empty tensors", joined(many, body), "tensors"
    raw = joined(header, body)
    (length,) = struct.unpack_from("<Q", raw)
    twice = (
        raw[8 : 8 + length].rstrip()[:-1] + b', "' + first.encode() + b'": ' + json.dumps(header[first]).encode() + b"}"
    )
    yield "a tensor twice", struct.pack("<Q", len(twice)) + twice + body, "twice"
    for name in names:
        shape = header[name]["shape"]
        if len(shape) == 2 and shape[0] != shape[1]:
            new = copy.deepcopy(header)
            new[name]["shape"] = shape[::-1]
            yield f"transposed {name}", joined(new, body), "architecture says"
            new[name]["shape"] = [shape[0] * shape[1]]
            yield f"flat {name}", joined(new, body), "architecture says"
            break


def _fields(good):
    header, body = parts(good)

    def inner(name, message, change):
        new = copy.deepcopy(header)
        change(new["__metadata__"]["crosslm"])
        return name, joined(new, body), message

    for value in ("", "south", "../north", "north/..", "/north", "north\n", "north\0", None, 3, ["north"]):
        yield inner(f"client id {value!r}", "of client", lambda f, v=value: f.update(client_id=v))
    for key, message in {
        "version": "of version",
        "kind": "of version",
        "client_id": "of client",
        "client_round": "whole numbers",
        "class_counts": "whole numbers",
        "metrics": "is not an object",
        "slm": "is not an object",
    }.items():
        gone = message if key in ("version", "kind") else "fields must be"
        yield inner(f"without {key}", gone, lambda f, k=key: f.pop(k))
        yield inner(f"{key} is null", message, lambda f, k=key: f.update({k: None}))
    yield inner("another version", "of version", lambda f: f.update(version=99))
    yield inner("a download", "expected a upload", lambda f: f.update(kind="download"))
    yield inner("code beside it", "fields must be", lambda f: f.update(code="import os"))
    yield inner("a path beside it", "fields must be", lambda f: f["slm"].update(path="/etc/passwd"))
    for value in (-1, 1.5, "0", True, 10**12, 10**30):
        yield inner(f"round {value!r}", "round", lambda f, v=value: f.update(client_round=v))
    for value in ([], [1], [1, 2, 3], [-1, 1], [1.5, 2], ["1", "2"], {"bad": 1}, [10**30, 1], [True, False]):
        message = "one for each label" if value in ([], [1], [1, 2, 3]) else "whole numbers"
        yield inner(f"class counts {value}", message, lambda f, v=value: f.update(class_counts=v))
    yield inner("half a character in a metric", "is not JSON", lambda f: f.update(metrics={"x\ud800": 1.0}))
    names = ({"": 1}, {"a name": 1}, {"x\n": 1}, {"\u202e": 1})
    for value in ([], {"x": "1"}, {"x": None}, {"x" * 1000: 1}, {f"m{n}": 1 for n in range(500)}, {"x": [1]}, *names):
        yield inner(f"metrics {str(value)[:30]}", "metrics", lambda f, v=value: f.update(metrics=v))
    for value in (
        [],
        ["bad"],
        ["bad", "bad"],
        ["bad", "good", "fair"],
        ["Bad", "good"],
        ["bad", 1],
        "bad",
        None,
        [["bad"], "good"],
    ):
        message = "its labels are" if isinstance(value, list) and len(value) == 2 else "one for each label"
        yield inner(f"labels {value}", message, lambda f, v=value: f["slm"].update(labels=v))
    for value in (0, -1, 65, 2**40, 1.5, "32", None, True):
        yield inner(f"max_length {value!r}", "max_length", lambda f, v=value: f["slm"].update(max_length=v))
    text = copy.deepcopy(header)
    text["__metadata__"]["more"] = "x"
    yield "more metadata", joined(text, body), "one entry"
    for value in ("[]", "{", '{"a": NaN}', "[" * 100_000, '{"a": 1, "a": 2}', "null"):
        text["__metadata__"] = {"crosslm": value}
        yield f"metadata {value[:20]}", joined(text, body), "metadata"


def _architectures(good):
    header, body = parts(good)

    def architecture(name, message, **fields):
        new = copy.deepcopy(header)
        new["__metadata__"]["crosslm"]["slm"]["architecture"] |= fields
        return f"architecture: {name}", joined(new, body), message

    for kind in (
        "gpt5",
        "",
        None,
        3,
        "auto",
        "../bert",
        "clip",
        "bert\n",
        ["bert"],
        "custom",
        "distilbert",
        "t5",
        "xlnet",
    ):
        message = "which no distilbert may bring" if kind == "distilbert" else "is not one of"
        yield architecture(f"type {kind!r}", message, model_type=kind)
    yield architecture("auto_map", "auto_map", auto_map={"AutoModel": "evil--repo.Model"})
    words = """custom_pipelines quantization_config _attn_implementation attn_implementation _name_or_path architectures
        torch_dtype dtype return_dict output_hidden_states problem_type use_auth_token trust_remote_code code_revision
        __class__ pruned_heads name_or_path state_dict finetuning_task"""
    for key in words.split():
        yield architecture(f"key {key}", f"has the key '{key}'", **{key: "evil/repo"})
    impossible = {
        "num_hidden_layers": 10**9, "num_attention_heads": 10**6, "hidden_size": 2**40, "vocab_size": 2**50,
        "intermediate_size": 10**30, "max_position_embeddings": 10**12, "layer_norm_eps": "small", "hidden_act": "eval",
        "type_vocab_size": -1, "initializer_range": [1] * 1000, "classifier_dropout": {"a": {"b": {"c": {"d": 1}}}},
        "bos_token_id": "x" * 10_000, "pad_token_id": 10**9,
    }  # fmt: skip
    for key, value in impossible.items():
        yield architecture(f"{key} = {str(value)[:20]}", "architecture", **{key: value})
    others = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 7, "intermediate_size": 8, "type_vocab_size": 3}
    for key, value in {**others, "max_position_embeddings": 63, "is_decoder": "x" * 99}.items():
        message = {"num_hidden_layers": "is not one of it", "is_decoder": "a text of 99"}.get(key, "architecture says")
        yield architecture(f"other {key}", message, **{key: value})
    yield architecture("one layer more", "is missing", num_hidden_layers=3)
    for value in (
        {"0": "good", "1": "bad"},
        {"0": "bad"},
        {"0": "bad", "1": "good", "2": "fair"},
        None,
        [],
        {"1": "bad", "2": "good"},
    ):
        yield architecture(f"id2label {value}", "which is not its labels", id2label=value)
    yield architecture("label2id", "label2id", label2id={"bad": 1, "good": 0})
    for value in (None, [], "bert", 3):
        new = copy.deepcopy(header)
        new["__metadata__"]["crosslm"]["slm"]["architecture"] = value
        yield f"architecture {value!r}", joined(new, body), "architecture is not an object"


def _tokenizers(good):
    header, body = parts(good)
    before = json.loads(header["__metadata__"]["crosslm"]["slm"]["tokenizer"]["tokenizer.json"])

    def files(name, message, **fields):
        new = copy.deepcopy(header)
        new["__metadata__"]["crosslm"]["slm"]["tokenizer"] |= fields
        return f"tokenizer: {name}", joined(new, body), message

    def tokenizer(name, message, change):
        new = copy.deepcopy(before)
        change(new)
        return files(name, message, **{"tokenizer.json": json.dumps(new)})

    yield files("another file", "exactly the files", **{"../../evil.py": "import os"})
    yield files("code", "exactly the files", **{"tokenization_evil.py": "import os"})
    for text, message in {
        "": "is not JSON",
        "{}": "has no model",
        "[]": "is not an object",
        "null": "is not an object",
        "{": "is not JSON",
        "[" * 100_000: "nested deeper",
        "[" + "[]," * 2_100_000 + "[]]": "holds more than",
    }.items():
        yield files(f"tokenizer.json {text[:10]}", message, **{"tokenizer.json": text})
    settings = [{"tokenizer_file": "/etc/passwd"}, {"auto_map": "x"}, {"chat_template": "{{ 1 }}"}, {"unk_token": 3}]
    settings += [{"unk_token": "x" * 1000}, {"tokenizer_class": "Evil"}, {"extra_special_tokens": {}}]
    for text in ("[]", "", *map(json.dumps, settings)):
        message = "no short text" if "unk_token" in text else "may name" if text else "is not JSON"
        yield files(f"tokenizer_config.json {text[:30]}", message, **{"tokenizer_config.json": text})
    named = json.dumps({"pad_token": "<boo>", "unk_token": "[UNK]"})
    yield files("a padding token that it lacks", "names '<boo>', which its", **{"tokenizer_config.json": named})
    added = {"id": 3, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    yield tokenizer(
        "a token of another id", "has the id", lambda t: t["added_tokens"].append({**added, "special": True})
    )
    short = copy.deepcopy(header)
    short["__metadata__"]["crosslm"]["slm"]["max_length"] = 2
    yield "tokenizer: a template that fills the text", joined(short, body), "adds 2 tokens to each text"
    for value in (3, None, ["{}"]):
        yield files(f"tokenizer.json is {value!r}", "exactly the files", **{"tokenizer.json": value})
    regex = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    yield tokenizer("endless expression", "regular expression", lambda t: t.update(normalizer=regex))
    yield tokenizer("growing text", "longer", lambda t: t.update(normalizer=grow))
    chain = {"type": "Sequence", "normalizers": [grow] * 12}
    yield tokenizer("text that grows twelve times", "longer", lambda t: t.update(normalizer=chain))
    nested = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}
    yield tokenizer("nested parts", "not nested", lambda t: t.update(normalizer=nested))
    long = {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}
    yield tokenizer("a hundred parts", "at most 16 parts", lambda t: t.update(normalizer=long))
    yield tokenizer("long prefix", "puts", lambda t: t.update(normalizer={"type": "Prepend", "prepend": "x" * 10**6}))
    for name, message, data in (
        ("a replacement of a kilobyte", "puts 1000 bytes", CHARSMAP + b"\0" + b"x" * 1000 + b"\0"),
        ("replacements beyond the end", "charsmap that is none", b"\xff\xff\xff\xff" + b"a\0"),
        ("no replacements", "charsmap that is none", b""),
    ):
        part = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
        yield tokenizer(name, message, lambda t, p=part: t.update(normalizer=p))
    short = base64.b64encode(CHARSMAP + b"\0").decode()
    twice = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": short}] * 2}
    yield tokenizer("two charsmaps in a row", "two Precompiled", lambda t: t.update(normalizer=twice))
    no_map = {"type": "Precompiled", "precompiled_charsmap": "no base64!"}
    yield tokenizer("no base64", "charsmap that is none", lambda t: t.update(normalizer=no_map))
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    yield tokenizer("endless split", "regular expression", lambda t: t.update(pre_tokenizer=split))
    for kind in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
        yield tokenizer(
            f"unknown {kind}", "of the kind", lambda t, k=kind: t.update({k: {"type": "Custom", "code": "x"}})
        )
        yield tokenizer(f"{kind} is a list", "of the kind", lambda t, k=kind: t.update({k: [1]}))
        yield tokenizer(f"{kind} has no type", "of the kind", lambda t, k=kind: t.update({k: {}}))
    pad = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    yield tokenizer("padding to a billion", "pads by itself", lambda t: t.update(padding=pad))
    yield tokenizer("unknown key", "unknown key", lambda t: t.update(path="/etc/passwd"))
    yield tokenizer("id beyond the table", "has the id 99999", lambda t: t["model"]["vocab"].update(evil=99999))
    yield tokenizer("negative id", "has the id -1", lambda t: t["model"]["vocab"].update(evil=-1))
    yield tokenizer("id that is text", "has the id", lambda t: t["model"]["vocab"].update(evil="0"))
    yield tokenizer("no vocabulary", "no vocabulary", lambda t: t["model"].pop("vocab"))
    yield tokenizer("unknown setting", "unknown key", lambda t: t["model"].update(file="/etc/passwd"))
    token = {
        "id": 10**6,
        "content": "evil",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    yield tokenizer("added id beyond the table", "added_tokens", lambda t: t["added_tokens"].append(token))
    yield tokenizer("added tokens are words", "added_tokens", lambda t: t.update(added_tokens=["evil"]))

    def template(t):
        t["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [2] * 10**5

    yield tokenizer("template of many ids", "too many", template)
    yield tokenizer(
        "template of many pieces",
        "at most 16 pieces",
        lambda t: t["post_processor"].update(single=t["post_processor"]["single"] * 99),
    )
    yield tokenizer(
        "template beyond the table",
        "post_processor has the id",
        lambda t: t["post_processor"]["special_tokens"]["[SEP]"].update(ids=[10**6]),
    )


def _numbers(good):
    header, body = parts(good)
    names = [name for name in header if name != "__metadata__" and header[name]["dtype"] == "F32"]
    for number in (float("nan"), float("inf"), -float("inf"), 1e38, 3e8):
        for name in names[:: max(1, len(names) // 4)]:
            start, end = header[name]["data_offsets"]
            weights = np.frombuffer(body, dtype=np.uint8).copy()
            weights[start:end].view(np.float32)[-1] = number
            message = "root mean square" if abs(number) < 1e30 else "is not finite"  # 1e38 squared is not
            yield f"{number} in {name}", joined(header, weights.tobytes()), message
