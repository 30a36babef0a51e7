"""A language model with fewer tokens: those that some texts need, and enough to write any other.

Most of a large vocabulary is never used by a task in one language, but the head and its softmax are
computed over all of it. What is written here is an ordinary model folder. Adapters trained on it fit
the whole model, since LoRA touches neither the embedding nor the head.
"""

import hashlib
import json
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from crosslm.errors import ModelError
from crosslm.models.loading import loading
from crosslm.models.sealed import check_seal, seal
from crosslm.models.sources import ELSEWHERE, lock_of
from crosslm.support.files import alone, partial_of, replace_folder, settle_folder
from crosslm.support.writing import writing

PUNCTUATION = frozenset(string.punctuation)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Trimmed:
    """What :func:`trim_vocabulary` did."""

    tokens_before: int
    tokens_after: int
    parameters_before: int
    parameters_after: int


def trim_vocabulary(folder: str, texts: Iterable[str], output: Path) -> Trimmed:
    """Write a copy of a model that knows only the tokens that ``texts`` need.

    Kept are the tokens of the texts, the tokens that they are merged from, every special token that
    the model names, white space, punctuation, and all single bytes, so that every other text can
    still be encoded, in more tokens. The texts themselves are encoded as before.

    Args:
        folder: model folder or hub id, with a byte-pair tokenizer.
        texts: what the model is to read and write.
        output: folder to create.

    Raises:
        ModelError: the folder, or one of its name with ``.partial``, is there already, the model cannot be loaded, its
            tokenizer is not of the byte-pair kind or cannot write every text by bytes, or the texts are empty.
    """
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output}: is there already; name a new folder")
    if (work := partial_of(output)).exists():
        raise ModelError(
            f"{work}: is there already, where the model would be written until it is whole; delete it if it was left "
            "by this command, or name another folder"
        )
    tokenizer, description = trimmable_tokenizer(folder)
    with loading(f"{folder!r} cannot be loaded as a language model"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    before = len(model.get_input_embeddings().weight), model.num_parameters()
    kept = _tokens_to_keep(description, tokenizer, _special_ids(model), before[0], texts)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"{folder!r}: its head has a bias, which crosslm does not support; choose another model")
    _cut_rows(model, kept)
    _renumber_special_tokens(model, kept)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cut = json.dumps(_cut_tokenizer(description, kept), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(cut, "utf-8")

    with writing(output, ELSEWHERE):
        replace_folder(output, write)
    return Trimmed(before[0], len(kept), before[1], model.num_parameters())


def trimmed_tokenizer(
    tokenizer: PreTrainedTokenizerBase, description: dict[str, Any], texts: Iterable[str]
) -> Tokenizer:
    """How a model that :func:`trim_vocabulary` makes would cut texts into tokens, without loading or writing one.

    Args:
        tokenizer: of the whole model.
        description: of it, both as :func:`trimmable_tokenizer` gives them.
        texts: as there.

    Raises:
        ModelError: the texts are empty.
    """
    kept = _tokens_to_keep(description, tokenizer, set(), len(tokenizer), texts)
    cut: Tokenizer = Tokenizer.from_str(json.dumps(_cut_tokenizer(description, kept)))
    return cut


def trimmable_tokenizer(folder: str) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """A model's tokenizer and its description, if it is of a kind that can be trimmed.

    Raises:
        ModelError: it is not, or cannot be loaded.
    """
    with loading(f"{folder!r} cannot be loaded as a language model"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{folder!r}: its tokenizer must be of the tokenizers library to be trimmed; use the model whole"
        )
    description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := description["model"]["type"]) != "BPE":
        raise ModelError(
            f"{folder!r}: the tokenizer is of the kind {kind}; only byte-pair (BPE) ones can be trimmed: use it whole"
        )
    _alphabet(description["model"])
    return tokenizer, description


def cached_trim(folder: str, texts: list[str], cache: Path, on_news: Callable[[str], None]) -> str:
    """:func:`trim_vocabulary` into the cache, once for the same model and texts; the folder."""
    output = trim_folder(folder, texts, cache)
    if (output / "config.json").is_file():
        check_seal(output)
        return str(output)  # without the lock: a cache that others share may be read-only
    with writing(output, ELSEWHERE), alone(lock_of(output), wait=True):
        if not (output / "config.json").is_file():
            on_news(f"Trimming the vocabulary of {Path(folder).name} once into {output} (about half a minute)")
            settle_folder(output)  # of a process that died; the cache is ours
            trim_vocabulary(folder, texts, output)
            seal(output)
    return str(output)


def trim_folder(folder: str, texts: list[str], cache: Path) -> Path:
    """Where :func:`cached_trim` keeps a model trimmed to these texts, made yet or not."""
    key = hashlib.sha256("\n".join([_identity(folder), *texts]).encode()).hexdigest()[:12]
    return cache / "models" / f"{Path(folder).name}-trimmed-{key}"


def _identity(folder: str) -> str:
    """What tells this model from another: its place, and for a folder what is in its files."""
    files = sorted(path for path in Path(folder).glob("*") if path.is_file())
    stamps = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return " ".join(["2", str(Path(folder).absolute()) if files else folder, *stamps])  # 2: the way of trimming


def tokenizer_words(folder: str) -> list[str]:
    """The English words in a tokenizer's vocabulary, in the forms that a text may have.

    After a space or at the start, with a small or a capital letter.
    """
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = sorted(token for token in vocabulary if token.isascii() and token.isalpha() and len(token) > 1)
    return [form for word in words for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")]


def _tokens_to_keep(
    description: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    special: set[int],
    size: int,
    texts: Iterable[str],
) -> list[int]:
    """Ids of the tokens to keep, ascending; a token's place in it becomes its new id.

    Args:
        description: of the tokenizer.
        tokenizer: itself.
        special: ids that the model names, besides those that the tokenizer does.
        size: ids that the model knows.
        texts: what it is to read and write.
    """
    bpe = description["model"]
    vocabulary: dict[str, int] = bpe["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    given = list(texts)
    used = (
        {index for ids in tokenizer(given, add_special_tokens=False)["input_ids"] for index in ids} if given else set()
    )
    if not used:
        raise ModelError("the texts whose tokens are to be kept are empty; name a text file with words in it")
    ranks = {merge: rank for rank, merge in enumerate(map(_pair, bpe["merges"]))}
    needed = {part for index in used if index in names for part in _parts(names[index], ranks)}
    alphabet = _alphabet(bpe)
    kept = used | {vocabulary[part] for part in needed | alphabet if part in vocabulary}
    kept |= set(tokenizer.all_special_ids) | special
    kept |= {token["id"] for token in description["added_tokens"] if token["content"].isspace()}
    kept |= _punctuation(vocabulary, ranks)
    return sorted(index for index in kept if 0 <= index < size)


def _punctuation(vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> set[int]:
    """Short ASCII tokens without a letter or digit, which texts of any kind need, and their parts."""
    marks = "▁Ġ"  # how vocabularies write a space
    tokens = [
        token
        for token in vocabulary
        if 0 < len(token.strip(marks)) <= 4 and all(c in PUNCTUATION for c in token.strip(marks))
    ]
    return {vocabulary[part] for token in tokens for part in _parts(token, ranks) if part in vocabulary}


def _alphabet(bpe: dict[str, Any]) -> set[str]:
    """The tokens from which every text can be made.

    Raises:
        ModelError: they are not all there.
    """
    vocabulary: dict[str, int] = bpe["vocab"]
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)} if bpe.get("byte_fallback") else _byte_characters()
    missing = of_bytes - vocabulary.keys()
    if missing:
        raise ModelError(
            f"the tokenizer has no token for {len(missing)} of the 256 bytes, so texts with other characters "
            "could not be encoded after trimming; only those that fall back to bytes can be trimmed: use it whole"
        )
    return of_bytes | {token for token in vocabulary if len(token) == 1 and (token.isascii() or token == "▁")}


def _byte_characters() -> set[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies (Radford et al. 2019)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _parts(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """A token and all that byte-pair encoding makes on the way to it.

    In a text the same merges lead to it, in the same order: a merge across its edge would have made
    it part of another token. So these parts are all that its encoding needs.
    """
    pieces, made = list(token), {token, *token}
    while len(pieces) > 1:
        rank, place = min(
            (ranks.get((left, right), len(ranks)), place) for place, (left, right) in enumerate(pairwise(pieces))
        )
        if rank == len(ranks):  # never made by merging: taken whole by the tokenizer, or not at all
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        made.add(pieces[place])
    return made


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _cut_tokenizer(description: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The tokenizer's description with the kept tokens alone, renumbered."""
    new = {old: index for index, old in enumerate(kept)}
    bpe = description["model"]
    vocabulary = {token: new[old] for token, old in bpe["vocab"].items() if old in new}
    merges = [merge for merge in bpe["merges"] if {*_pair(merge), "".join(_pair(merge))} <= vocabulary.keys()]
    added = [{**token, "id": new[token["id"]]} for token in description["added_tokens"] if token["id"] in new]
    cut = {**description, "model": {**bpe, "vocab": vocabulary, "merges": merges}, "added_tokens": added}
    post: dict[str, Any] = json.loads(json.dumps(cut["post_processor"] or {}))
    for processor in [post, *post.get("processors", [])]:
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [new[old] for old in token["ids"]]
    return {**cut, "post_processor": post or None}


def _cut_rows(model: Any, kept: list[int]) -> None:
    rows = torch.tensor(kept)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight = torch.nn.Parameter(embedding.weight.detach()[rows].clone())
    model.config.vocab_size = len(kept)
    model.tie_weights()


def _special_ids(model: Any) -> set[int]:
    found: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in SPECIAL_IDS:
            value = getattr(config, name, None)
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _renumber_special_tokens(model: Any, kept: list[int]) -> None:
    new = {old: index for index, old in enumerate(kept)}
    for config in (model.config, model.generation_config):
        for name in SPECIAL_IDS:
            value = getattr(config, name, None)
            if value is not None:  # some configurations name a token that there is not, -1 or the first beyond
                cut = [new[old] for old in value if old in new] if isinstance(value, list) else new.get(value)
                setattr(config, name, cut)
