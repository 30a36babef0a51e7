"""Which tokenizers may travel: known parts with known settings, so that none can hang, grow or reach for a file.

A ``tokenizer.json`` is a program: it may hold regular expressions that never end, replacements that
multiply a text, templates of a million tokens. Each part is therefore held against an allow-list, and
every token id against the model's vocabulary.
"""

import base64
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from crosslm.errors import UploadError
from crosslm.federation import strict_json

FILES = {"tokenizer.json", "tokenizer_config.json"}
MAX_VALUES = 2_000_000
MAX_PARTS, MAX_PIECES, MAX_WORD_CHARACTERS = 16, 16, 1000
MAX_REPLACEMENT = 64
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    # GPT-2, Llama 3, Qwen 2, runs of spaces (XLM-R, ALBERT), a line feed
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _WORDS + r"\p{N}{1,3}" + _REST,
    _WORDS + r"\p{N}" + _REST,
    " {2,}",
    r"\n",
}
"""The regular expressions that a tokenizer may bring."""

KNOWN: dict[str, dict[str, set[str]]] = {
    "normalizer": {
        "BertNormalizer": {"clean_text", "handle_chinese_chars", "strip_accents", "lowercase"},
        "Lowercase": set(),
        "NFC": set(),
        "NFD": set(),
        "NFKC": set(),
        "NFKD": set(),
        "Nmt": set(),
        "Precompiled": {"precompiled_charsmap"},
        "Prepend": {"prepend"},
        "Replace": {"pattern", "content"},
        "Sequence": {"normalizers"},
        "Strip": {"strip_left", "strip_right"},
        "StripAccents": set(),
    },
    "pre_tokenizer": {
        "BertPreTokenizer": set(),
        "ByteLevel": {"add_prefix_space", "trim_offsets", "use_regex"},
        "Digits": {"individual_digits"},
        "Metaspace": {"replacement", "prepend_scheme", "split", "add_prefix_space"},
        "Punctuation": {"behavior"},
        "Sequence": {"pretokenizers"},
        "Split": {"pattern", "behavior", "invert"},
        "Whitespace": set(),
        "WhitespaceSplit": set(),
    },
    "post_processor": {
        "BertProcessing": {"sep", "cls"},
        "ByteLevel": {"add_prefix_space", "trim_offsets", "use_regex"},
        "RobertaProcessing": {"sep", "cls", "trim_offsets", "add_prefix_space"},
        "Sequence": {"processors"},
        "TemplateProcessing": {"single", "pair", "special_tokens"},
    },
    "decoder": {
        "BPEDecoder": {"suffix"},
        "ByteFallback": set(),
        "ByteLevel": {"add_prefix_space", "trim_offsets", "use_regex"},
        "Fuse": set(),
        "Metaspace": {"replacement", "prepend_scheme", "split", "add_prefix_space"},
        "Replace": {"pattern", "content"},
        "Sequence": {"decoders"},
        "Strip": {"content", "start", "stop"},
        "WordPiece": {"prefix", "cleanup"},
    },
    "model": {
        "BPE": {
            "dropout",
            "unk_token",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "fuse_unk",
            "byte_fallback",
            "ignore_merges",
            "vocab",
            "merges",
        },
        "Unigram": {"unk_id", "vocab", "byte_fallback"},
        "WordLevel": {"vocab", "unk_token"},
        "WordPiece": {"unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"},
    },
}


def check_tokenizer(
    files: Mapping[str, Any], special_tokens: tuple[str, ...], vocab_size: int, max_length: int
) -> None:
    """Find out that a tokenizer is made of known parts, gives no id beyond the vocabulary, and can cut texts.

    An id beyond it is an error of the device on a GPU, after which the process can use that no more.

    Args:
        files: ``tokenizer.json`` and ``tokenizer_config.json``, as text.
        special_tokens: what the second may name.
        vocab_size: rows of the classifier's embedding table.
        max_length: tokens at which texts are cut.

    Raises:
        UploadError: it is not so.
    """
    if set(files) != FILES or not all(isinstance(text, str) for text in files.values()):
        raise UploadError(f"its tokenizer must be exactly the files {sorted(FILES)}, found {str(sorted(files))[:120]}")
    named = strict_json.parse(_bytes(files["tokenizer_config.json"]), "tokenizer_config.json", 100)
    if not isinstance(named, dict) or not set(named) <= set(special_tokens):
        raise UploadError(f"its tokenizer_config.json may name {', '.join(special_tokens)} and nothing else")
    if not all(isinstance(token, str) and len(token) <= 64 for token in named.values()):
        raise UploadError("its tokenizer_config.json names a special token that is no short text")
    data = _bytes(files["tokenizer.json"])
    parts = strict_json.parse(data, "tokenizer.json", MAX_VALUES)
    if not isinstance(parts, dict):
        raise UploadError("its tokenizer.json is not an object")
    known = {*KNOWN, "version", "truncation", "padding", "added_tokens"}
    if set(parts) - known:
        raise UploadError(f"its tokenizer.json has the unknown key {str(sorted(set(parts) - known)[0])[:60]!r}")
    for kind in KNOWN:
        if parts.get(kind) is not None:
            _check_part(kind, parts[kind], vocab_size)
    _check_settings(parts)
    _check_ids(parts, vocab_size)
    try:
        made = Tokenizer.from_str(files["tokenizer.json"])
        ids, adds = made.get_vocab(with_added_tokens=True), made.num_special_tokens_to_add(is_pair=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise UploadError(f"its tokenizer.json cannot be read: {str(error)[:120]}") from error
    _check_range(list(ids.values()), vocab_size, "vocabulary")  # of an added token the id that it has been given
    if unknown := [token for token in named.values() if token not in ids]:
        raise UploadError(
            f"its tokenizer_config.json names {unknown[0][:40]!r}, which its tokenizer.json does not have"
        )
    if adds >= max_length:
        raise UploadError(
            f"its tokenizer adds {adds} tokens to each text, which is cut at {max_length}: nothing would be left of it"
        )


def _check_part(kind: str, part: Any, vocab_size: int) -> None:
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str) or name not in KNOWN[kind]:
        raise UploadError(f"its tokenizer has a {kind} of the kind {str(name)[:40]!r}; known: {', '.join(KNOWN[kind])}")
    unknown = set(part) - KNOWN[kind][name] - {"type"}
    if unknown:
        raise UploadError(f"its tokenizer's {name} has the unknown key {str(sorted(unknown)[0])[:60]!r}")
    if name == "Sequence":
        (inner,) = (value for key, value in part.items() if key != "type") if len(part) == 2 else ([],)
        if not isinstance(inner, list) or len(inner) > MAX_PARTS or any(_is_sequence(entry) for entry in inner):
            raise UploadError(f"its tokenizer's {kind} must be at most {MAX_PARTS} parts, not nested")
        if sum(entry.get("type") == "Precompiled" for entry in inner if isinstance(entry, dict)) > 1:
            raise UploadError("its tokenizer has two Precompiled in a row; one may be, or a text could grow and grow")
        for entry in inner:
            _check_part(kind, entry, vocab_size)
    elif name in ("Replace", "Split"):
        _check_pattern(kind, part)
    elif name == "Precompiled":
        _check_charsmap(part.get("precompiled_charsmap"))
    elif name in ("Prepend", "Metaspace"):
        value = part.get("prepend", part.get("replacement"))
        if not isinstance(value, str) or len(value) > 4:
            raise UploadError(
                f"its tokenizer's {name} puts {str(value)[:40]!r} into texts; at most 4 characters may be"
            )
    elif kind == "post_processor":
        _check_template(name, part, vocab_size)


def _check_charsmap(value: Any) -> None:
    """A map of characters to what takes their place: its trie's size in 4 bytes, the trie, and then the replacements.

    Each of these ends with a zero byte. The longest in Unicode's own (NFKC) has 33 bytes.
    """
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    begin = 4 + int.from_bytes(data[:4], "little")
    if not 4 < begin < len(data):
        raise UploadError("its tokenizer's Precompiled has a precompiled_charsmap that is none")
    longest = max(map(len, data[begin:].split(b"\0")))
    if longest > MAX_REPLACEMENT:
        raise UploadError(
            f"its tokenizer's Precompiled puts {longest} bytes in the place of a character; at most {MAX_REPLACEMENT} "
            "may be"
        )


def _is_sequence(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Sequence"


def _check_pattern(kind: str, part: Mapping[str, Any]) -> None:
    pattern, content = part.get("pattern"), part.get("content", "")
    if not isinstance(pattern, dict) or len(pattern) != 1 or not isinstance(content, str):
        raise UploadError(f"its tokenizer's {kind} has a pattern that is none")
    ((how, what),) = pattern.items()
    if how == "Regex" and what not in PATTERNS:
        raise UploadError(f"its tokenizer's {kind} brings a regular expression that is not known: {str(what)[:60]!r}")
    if how not in ("Regex", "String") or not isinstance(what, str) or not what:
        raise UploadError(f"its tokenizer's {kind} has a pattern that is none")
    if kind == "normalizer" and len(content) > max(1, len(what) if how == "String" else 1):
        raise UploadError(f"its tokenizer's {kind} makes texts longer: {what[:20]!r} becomes {len(content)} characters")


def _check_template(name: str, part: Mapping[str, Any], vocab_size: int) -> None:
    if name == "TemplateProcessing":
        pieces = [part.get("single"), part.get("pair")]
        if not all(isinstance(piece, list) and len(piece) <= MAX_PIECES for piece in pieces):
            raise UploadError(f"its tokenizer's template must have at most {MAX_PIECES} pieces")
        specials = part.get("special_tokens")
        if not isinstance(specials, dict) or len(specials) > MAX_PIECES:
            raise UploadError(f"its tokenizer's template must name at most {MAX_PIECES} special tokens")
        lists = [entry.get("ids") if isinstance(entry, dict) else None for entry in specials.values()]
        if not all(isinstance(ids, list) and len(ids) <= MAX_PIECES for ids in lists):
            raise UploadError("its tokenizer's template names a special token without ids, or with too many")
        used = [number for ids in lists for number in ids or []]
    elif name in ("BertProcessing", "RobertaProcessing"):
        used = [
            entry[1] if isinstance(entry, list) and len(entry) == 2 else None for entry in map(part.get, ("sep", "cls"))
        ]
    else:
        used = []
    _check_range(used, vocab_size, "post_processor")


def _check_settings(parts: Mapping[str, Any]) -> None:
    if parts.get("padding") is not None:
        raise UploadError("its tokenizer pads by itself; padding must be null")
    model = parts.get("model")
    if not isinstance(model, dict):
        raise UploadError("its tokenizer.json has no model")
    if model.get("dropout"):
        raise UploadError("its tokenizer's dropout must be null")
    longest = model.get("max_input_chars_per_word", 100)
    if not isinstance(longest, int) or not 0 < longest <= MAX_WORD_CHARACTERS:
        raise UploadError(
            f"its tokenizer's max_input_chars_per_word is {str(longest)[:40]}, not 1 to {MAX_WORD_CHARACTERS}"
        )


def _check_ids(parts: Mapping[str, Any], vocab_size: int) -> None:
    vocabulary, added = parts["model"].get("vocab"), parts.get("added_tokens") or []
    if isinstance(vocabulary, dict):
        _check_range(list(vocabulary.values()), vocab_size, "vocabulary")
    elif isinstance(vocabulary, list):
        _check_range([len(vocabulary) - 1], vocab_size, "vocabulary")
    else:
        raise UploadError("its tokenizer has no vocabulary")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UploadError("its tokenizer's added_tokens are not a list of tokens")
    _check_range([token.get("id") for token in added], vocab_size, "added_tokens")


def _check_range(numbers: list[Any], vocab_size: int, where: str) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < vocab_size:
            raise UploadError(
                f"its tokenizer's {where} has the id {str(number)[:40]}; the classifier has {vocab_size} tokens"
            )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
