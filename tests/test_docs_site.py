"""The pages of the documentation site: commands and fields that exist, a reference that is complete."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import crosslm
from crosslm.cli.main import app
from crosslm.config import Config
from crosslm.federation.kits import ServerSettings, SiloSettings

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
COMMANDS = sorted(
    {
        line.removeprefix("$ ")
        for text in PAGES.values()
        for block in re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S)
        for line in block.splitlines()
        if line.startswith("$ crosslm ")
    }
)


LINKS = sorted({(name, link) for name, text in PAGES.items() for link in re.findall(r"\]\(([^)#\s]+)", text)})


@pytest.mark.parametrize(("name", "link"), [(name, link) for name, link in LINKS if not link.startswith("http")])
def test_every_link_leads_to_a_file_of_the_site(name, link):
    """Else `make docs`, to which a warning is an error, stops."""
    target = (DOCS / link).resolve()
    assert target.is_relative_to(DOCS), name
    assert target.exists() or target.name == "commands.md", name  # that one is written when the site is built


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_can_be_given(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # raises on an unknown option or a missing argument


def sections(model, name=""):
    for key, field in model.model_fields.items():
        inner = field.annotation
        inner = inner if hasattr(inner, "model_fields") else next(iter(getattr(inner, "__args__", ())), None)
        if hasattr(inner, "model_fields"):
            yield from sections(inner, f"{name}{key}.")
        else:
            yield name, key, field


def test_every_field_named_in_a_page_exists():
    known = {f"{section}{key}" for section, key, _ in sections(Config)}
    top = {name.split(".")[0] for name in known}
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)(?: = [^`]*)?`", text):
            if name.split(".")[0] in top and not name.endswith((".py", ".toml", ".html", ".jsonl")):
                assert name in known, f"{page}: {name}"


def test_the_configuration_reference_has_every_field_with_its_meaning(reference):
    page = reference.configuration_page()
    kept = DOCS / "reference" / "configuration.md"  # for who reads it in the repository
    assert kept.read_text() == page, "run make docs"
    for section, key, field in sections(Config):
        assert f"- **`{key}`** (" in page
        assert field.description, f"{section}{key} has no docstring"
    both = "default `1.0` under `recommended`, `0.25` under `paper`"
    assert f"- **`fraction`** (number, > 0, ≤ 1; {both})\n  alpha % of section 4.2." in page
    assert "- **`pool`** (integer, > 0; default `1024`)" in page
    assert "## `[[slm.models]]`" in page
    assert "## `[evaluation.judge]`" in page
    private = page.partition("## `[slm.private]`")[2]  # whose defaults are not those of the same table elsewhere
    assert "- **`patience`** (integer, ≥ 0; default `3`)" in private.partition("## `[slm.synthetic]`")[0]


def test_the_reference_of_kits_has_every_key_with_its_meaning(reference):
    page = reference.kits_page()
    assert (DOCS / "reference" / "kits.md").read_text() == page, "run make docs"
    silo, server = page.partition("## silo.toml")[2].split("## server.toml")
    for text, kind in ((silo, SiloSettings), (server, ServerSettings)):
        for section, key, field in sections(kind):
            assert not section or f"### `[{section.removesuffix('.')}]`" in text
            meaning = reference.plain(field.description).replace("slm.private", "fit")
            assert re.search(rf"- \*\*`{key}`\*\* \(.*\)\n  {re.escape(meaning)}\n", text), f"{section}{key}"
    assert "| `[slm.private]` | `[fit]` |" in page
    assert '- **`wire_dtype`** (`"float32"` or `"float16"`; default `"float32"`)' in silo
    assert "- **`superlink_port`** (integer, > 0, < 65536; default `9091`)" in server


def test_the_command_reference_has_every_command_and_option(reference):
    page = reference.commands_page()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## `crosslm {name}`" in page
        assert all(option in page for parameter in command.params for option in parameter.opts if "--" in option)


def documented(page):
    """The dotted names that ``autoclass`` and ``automodule`` of a page bring."""
    yield from re.findall(r"^\.\. autoclass:: ([\w.]+)", page, flags=re.M)
    for module, members in re.findall(r"^\.\. automodule:: (\S+)\n(?:   :members:(.*)\n)?", page, flags=re.M):
        names = [name.strip() for name in members.split(",") if name.strip()]
        for name in names or vars(importlib.import_module(module)):
            yield f"{module}.{name}"


def test_the_python_reference_has_every_public_name():
    found = set(documented(PAGES["python.md"]))
    for name in set(crosslm.__all__) - {"__version__"}:
        assert f"{getattr(crosslm, name).__module__}.{name}" in found, name


def test_every_link_of_a_page_leads_somewhere():
    written = {"reference/commands.md"}
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert link in written or (DOCS / link).exists(), f"{page}: {link}"
