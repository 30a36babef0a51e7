"""Reading a configuration: a TOML file, values from the command line over it, and errors in words."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from crosslm.config import WHOLE, Config, merged
from crosslm.errors import ConfigError
from crosslm.support.files import expanded, missing

ALIKE = 0.5  # from 0 to 1: less is no hint


def packaged() -> dict[str, Path]:
    """Names and files of the configurations that are installed with crosslm."""
    folder = Path(str(files("crosslm") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(
    source: str | Path,
    overrides: tuple[str, ...] = (),
    data_dir: str | None = None,
    over: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Read a configuration file and check it.

    Args:
        source: path of a TOML file, or the name of a packaged one (:func:`packaged`).
        overrides: ``section.key=value``; the value is TOML, or else taken as a string. A folder for ``data.dir`` is
            relative to the working directory.
        data_dir: replaces ``data.dir``; relative to the working directory.
        over: tables that lie over the file's, and under the overrides.

    Raises:
        ConfigError: not found, not TOML, or an unknown key or impossible value; names the key and
            what would be allowed.
    """
    path = packaged().get(str(source), Path(source))
    if path.is_dir() and (inside := sorted(path.glob("*.toml"))):
        raise ConfigError(f"{path}: is a folder; name the configuration in it: {' or '.join(map(str, inside))}")
    if path.is_dir():
        raise ConfigError(
            f"{path}: is a folder without a configuration (it has no .toml file); name a configuration file, or a "
            f"packaged one: {', '.join(packaged())}"
        )
    if not path.exists() and (path.suffix == ".toml" or len(path.parts) > 1):
        raise ConfigError(f"{missing(path)}; name a configuration file, or a packaged one: {', '.join(packaged())}")
    if not path.is_file():
        raise ConfigError(
            f"no configuration {str(source)!r}: not a file, and the packaged ones are {', '.join(packaged())}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as a TOML file, which it must be: {error}") from error
    given, is_whole = merged(given, over), text.startswith(WHOLE)
    for override in overrides:
        if is_whole and override.partition("=")[0].strip() == "preset":
            raise ConfigError(
                f"--set {override}: {path} was written by a run and is whole, so that no preset would change anything "
                "but its name in it; set preset on the configuration that the run was started with"
            )
        _set(given, override)
        if override.partition("=")[0].strip() == "data.dir" and data_dir is None:
            given["data"]["dir"] = str(expanded(str(given["data"]["dir"])).absolute())
    if data_dir is not None:
        given = merged(given, {"data": {"dir": str(expanded(data_dir).absolute())}})
    elif isinstance(given.get("data"), dict):
        folder = expanded(str(given["data"].get("dir", ".")))
        given["data"]["dir"] = str((path.parent / folder).absolute())
    try:
        return Config.model_validate(given, context=WHOLE if is_whole else None)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(explain(_origin(path, entry, overrides), entry, Config) for entry in causes(error))
        ) from None


def _set(given: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"--set {override!r}: must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = given
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section; set the whole of it at once")
    table[name] = value


def _origin(path: Path, entry: Any, overrides: tuple[str, ...]) -> str:
    """Where a value came from: the last override of its key, of a table around it or in it, or else the file."""
    key = ".".join(str(part) for part in entry["loc"])
    for override in reversed(overrides):
        name = override.partition("=")[0].strip()
        if key == name or key.startswith(f"{name}."):
            return f"--set {override}"
    for override in reversed(overrides):
        if override.partition("=")[0].strip().startswith(f"{key}." if key else ""):
            return f"{path} with --set {override}"
    return str(path)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The one that was probably meant: one that begins so, or else the most alike, if it is alike enough."""
    given = word.casefold()

    def likeness(candidate: str) -> tuple[float, int]:
        other = candidate.casefold()
        in_place = sum(one == two for one, two in zip(given, other, strict=False))
        return difflib.SequenceMatcher(None, given, other).ratio(), in_place

    if len(given) > 2 and (begun := [each for each in known if each.casefold().startswith(given)]):
        return begun[0]
    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= ALIKE else None


def causes(error: ValidationError) -> list[Any]:
    """What is wrong, without what follows from it: a list is said to be too short where its entries are wrong."""
    entries = error.errors()
    inside = {entry["loc"][:length] for entry in entries for length in range(len(entry["loc"]))}
    return [entry for entry in entries if entry["type"] != "too_short" or entry["loc"] not in inside]


def explain(path: str, entry: Any, kind: type[BaseModel]) -> str:
    """What is wrong with a key, in a line: with the nearest one that is known, what was found, and what is allowed.

    Args:
        path: where it was found.
        entry: of pydantic's list of errors.
        kind: the model that was validated.
    """
    key = ".".join(str(part) for part in entry["loc"]) or "the configuration"
    if entry["type"] == "extra_forbidden":
        known = _known_keys(kind, entry["loc"][:-1])
        near = nearest(str(entry["loc"][-1]), known)
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key {key}; {hint}"
    if entry["type"] == "missing":
        return f"{path}: {key} is missing"
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "literal_error":
        allowed = [word.strip(" '") for word in entry["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = nearest(str(entry["input"]), allowed)
        message += f"; did you mean {near!r}?" if near else ""
    if entry["type"] in ("tuple_type", "list_type"):
        message = _a_list(kind, entry)
    found = "" if isinstance(entry["input"], dict) else f", found {entry['input']!r}"
    return f"{path}: {key}: {message}{found}"


def _a_list(kind: type[BaseModel], entry: Any) -> str:
    """What must be in the place of what is no list."""
    inside = _section(kind, entry["loc"])
    if isinstance(inside, type) and issubclass(inside, BaseModel):
        return f"must be a list of tables, each with keys of: {', '.join(sorted(inside.model_fields))}"
    return f'must be a list, like ["{entry["input"]}"]' if isinstance(entry["input"], str) else "must be a list"


def _known_keys(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at a location in a configuration."""
    return sorted(_section(kind, location).model_fields)


def _section(kind: type[BaseModel], location: tuple[str | int, ...]) -> Any:
    """What is at a location in a configuration; of a list what is in it."""
    section: Any = kind
    for part in location:
        if isinstance(part, int) or not hasattr(section, "model_fields"):
            continue
        section = section.model_fields[part].annotation
        if hasattr(section, "__args__"):
            section = section.__args__[0]
    return section
