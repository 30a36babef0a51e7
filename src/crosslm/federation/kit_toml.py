"""``server.toml`` and ``silo.toml`` as files: each key with its meaning, and as comments those that may be set too."""

import textwrap
from collections.abc import Container, Iterator
from typing import Any

import tomli_w

from crosslm.sections.section import Section

WIDTH = 110
PLACEHOLDERS = {"number": "NUMBER", "integer": "WHOLE NUMBER", "string": '"..."'}
"""What stands for the value of a key that has none, by its kind in a JSON schema."""
OTHER_NAMES = {"slm.private": "fit"}
"""Tables of the configuration that have another name in a kit: their fields' meanings are written once, for both."""
HEAD = """\
Lines that begin with # are comments. A key in such a line may be set too, without the #. docs/reference/kits.md of
crosslm's source has all keys with what is allowed; crosslm doctor reads this file and names what is wrong in it."""


def commented(settings: Section, quiet: Container[str] = ()) -> str:
    """Settings as TOML, each key below what it means.

    Args:
        settings: of a kit.
        quiet: tables whose keys are comments, too, where they are as they are by themselves, so that nothing there
            looks as if it were in force.
    """
    fields = type(settings).model_fields
    parts = [_comment(type(settings).__doc__ or "") + _comment(HEAD), *_keys(settings)]
    for name, field in fields.items():
        if isinstance(section := getattr(settings, name), Section):
            about = _comment(field.description or type(section).__doc__ or "")
            parts += [f"{about}[{name}]\n", *_keys(section, name, name in quiet)]
    return "\n".join(parts)


def in_kit(text: str) -> str:
    """A text on the configuration by the names that a kit has."""
    for name, other in OTHER_NAMES.items():
        text = text.replace(name, other)
    return text


def _keys(section: Section, table: str = "", is_quiet: bool = False) -> Iterator[str]:
    """The keys that are no tables, and then those that are made of other keys."""
    names, values = list(type(section).model_fields), section.model_dump(mode="json")
    for name in sorted(names, key=lambda name: isinstance(values[name], dict)):
        field, value = type(section).model_fields[name], values[name]
        if isinstance(getattr(section, name), Section):
            continue
        is_unset = value in (None, {}) or (is_quiet and getattr(section, name) == field.default)
        line = _line(section, name, value, table)
        yield _comment(field.description or "") + (textwrap.indent(line, "# ") if is_unset else line)


def _line(section: Section, name: str, value: Any, table: str) -> str:
    if value is None:
        return f"{name} = {_placeholder(type(section), name)}\n"
    return tomli_w.dumps({table: {name: value}} if isinstance(value, dict) else {name: value})


def _placeholder(section: type[Section], name: str) -> str:
    """What stands in the place of a value that is not set."""
    schema = section.model_json_schema()["properties"][name]["anyOf"][0]
    return f'"{schema["const"]}"' if "const" in schema else PLACEHOLDERS[schema["type"]]


def _comment(text: str) -> str:
    words = in_kit(text).replace("``", "")
    return "".join(f"# {line}\n" for line in textwrap.wrap(words, WIDTH, break_long_words=False))
