"""Pages of the reference that are written from the code: the configuration, the kits and the commands."""

import json
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

from crosslm.cli.main import app
from crosslm.config import PRESETS, Config
from crosslm.federation.kit_toml import in_kit
from crosslm.federation.kits import SERVER_FILE, SILO_FILE, ServerSettings, SiloSettings


def configuration_page() -> str:
    """Every field with what it means, what is allowed and its default."""
    parts = [
        "# Configuration",
        "",
        "Every field of a configuration file, from `crosslm.config.Config` and its sections. A wrong key or value is",
        "refused with the nearest right one before a model is loaded. Any field can be set on the command line:",
        "`--set section.key=value`.",
        "",
        'Where the two presets differ, both defaults are given: `preset = "recommended"` is the one that a file has',
        "unless it says otherwise.",
        "",
        "## At the top of the file",
        "",
        *fields_of(Config),
    ]
    for name, field in Config.model_fields.items():
        for section in models_in(field.annotation):
            parts += section_page(name, section, many=field.annotation is not section)
    return "\n".join(parts) + "\n"


KITS = """\
# Kits

The two settings files of [separate machines](../deploy.md), which `crosslm provision` writes. A key of `silo.toml` that
has a counterpart in the [configuration](configuration.md) begins with its value, and is the silo's own from then on:
the server cannot change it. `crosslm doctor KIT` and every other command refuse a wrong key or value by name. A silo
reads its file anew for each request of the server, so that what is mended counts from the next one on; a new `server`
or `runtime_port`, and all of `server.toml`, from the next start of `crosslm client` or `crosslm server`.

| in the configuration | in `silo.toml` |
| --- | --- |
| `id`, `train`, `test` under `[[clients]]` | `id`; `train` and `test` under `[data]` |
| `text_column`, `label_column`, `label_names`, `skip_labels` under `[data]` | the same under `[data]` |
| `labels` under `[task]` | `labels` |
| `seed`, `device` | `seed`, `device` |
| `participations`, `closing` under `[federation]` | `max_participations`, `closing` |
| one of `models` under `[slm]`, by the seed or by `model` under `[[clients]]` | `[slm]` |
| `max_length`, `freeze_embeddings` under `[slm]` | `max_length`, `freeze_embeddings` |
| `[slm.private]` | `[fit]` |
| `[acceptance]`, `[intake]`, `[privacy]` | the same |
| `encoder` under `[selection]` | `encoder` |
| none | `experiment`, `server`, `runtime_port`, `wire_dtype`; `dir` under `[data]` is the kit |

The server's kit has the rest of the configuration as `config.toml`, beside `server.toml`.
"""


def kits_page() -> str:
    """Every key of ``server.toml`` and ``silo.toml``, as :func:`configuration_page` has those of the configuration."""
    parts = list[str]()
    for name, kind in ((SILO_FILE, SiloSettings), (SERVER_FILE, ServerSettings)):
        about = plain(kind.__doc__).partition(": ")[2]
        parts += ["", f"## {name}", "", about[:1].upper() + about[1:], "", *fields_of(kind)]
        for key, field in kind.model_fields.items():
            for section in models_in(field.annotation):
                about = plain(field.description or section.__doc__)
                parts += ["", f"### `[{key}]`", "", about, "", *fields_of(section)]
    return KITS + in_kit("\n".join(parts)) + "\n"


def section_page(
    name: str, section: type[BaseModel], many: bool = False, defaults: BaseModel | None = None
) -> list[str]:
    """A section, and those within it; ``defaults`` where the section around it has others than it has itself."""
    title = f"[[{name}]]" if many else f"[{name}]"
    parts = ["", f"## `{title}`", "", plain((section.__doc__ or "").split("\n\n")[0]), ""]
    parts += fields_of(section, defaults, PRESETS["recommended"].get(name))
    for key, field in section.model_fields.items():
        for inner in models_in(field.annotation):
            other = field.default if isinstance(field.default, inner) else None
            parts += section_page(f"{name}.{key}", inner, many=field.annotation is not inner, defaults=other)
    return parts


def fields_of(
    section: type[BaseModel], defaults: BaseModel | None = None, recommended: dict[str, Any] | None = None
) -> list[str]:
    """The fields of a section that are no sections themselves, as a definition list in Markdown.

    ``defaults`` are those of the section around it, ``recommended`` what that preset sets.
    """
    lines, other = [], recommended or {}
    for name, field in section.model_fields.items():
        if models_in(field.annotation):
            continue
        found = field.default if defaults is None else getattr(defaults, name)
        both = default(found)
        if name in other:
            both = f"default `{toml(other[name])}` under `recommended`, `{toml(found)}` under `paper`"
        lines += [f"- **`{name}`** ({allowed(section, name)}; {both})", f"  {plain(field.description)}", ""]
    return lines


def plain(text: str | None) -> str:
    """A docstring in one line of Markdown."""
    return (text or "").replace("``", "`").replace("\n", " ").strip()


def allowed(section: type[BaseModel], name: str) -> str:
    """What a field may hold, in words, from its JSON schema."""
    schema = section.model_json_schema()["properties"][name]
    return " or ".join(one for one in map(in_words, schema.get("anyOf", [schema])) if one != "null")


def in_words(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = {"array": "list", "object": "table"}.get(schema.get("type", "any"), schema.get("type", "any"))
    limits = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    return kind + "".join(f", {sign} {schema[key]:g}" for key, sign in limits.items() if key in schema)


def default(value: Any) -> str:
    """A field's default, as it would stand in the file."""
    if value is PydanticUndefined:
        return "required"
    return "not set" if value is None else f"default `{toml(value)}`"


def toml(value: Any) -> str:
    """A value as TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in models_in(part)]


def commands_page() -> str:
    """Every command with its arguments and options, as typer knows them."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="crosslm")
    return get_docs_for_click(obj=command, ctx=context, name="crosslm", title="Commands").rstrip() + "\n"
