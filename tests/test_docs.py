"""The documents name what exists."""

import importlib
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

from crosslm.config import PRESETS, Config
from crosslm.config_file import load

ROOT = Path(__file__).parents[1]
MAP = (ROOT / "docs" / "paper_map.md").read_text()


def resolve(dotted):
    """The object of this dotted name: a module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(dotted)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(crosslm\.[\w.]+)`", MAP))))
def test_every_name_in_the_paper_map_exists(name):
    resolve(name)


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(tests/\w+\.py::\w+)`", MAP))))
def test_every_test_in_the_paper_map_exists(reference):
    path, name = reference.split("::")
    assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("number", range(1, 11))
def test_every_equation_has_a_row_and_a_function_that_names_it(number):
    row = next(line for line in MAP.splitlines() if line.startswith(f"| {number} |"))
    function = re.search(r"`(crosslm\.[\w.]+)`", row).group(1)
    documented = [resolve(function).__doc__ or "", importlib.import_module(resolve(function).__module__).__doc__ or ""]
    assert any(re.search(rf"Eq\. {number}\b|Eq\. \d to 10|Eq\. 2 and 3|Eq\. 8", text) for text in documented)
    assert re.search(rf"Eq\. {number}\b", " ".join(documented)), function


def test_the_preset_table_is_the_code():
    for section, fields in PRESETS["recommended"].items():
        for name, value in fields.items():
            shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
            row = next(line for line in MAP.splitlines() if line.startswith(f"| `{section}.{name}` | `"))
            assert row.endswith(f"| `{shown}` |")


def test_every_field_named_in_the_paper_map_exists():
    fields = Config.model_fields
    for section, name in re.findall(r"`(llm|data|slm|task|reward|selection|synthesis)\.(\w+)`", MAP):
        assert name in fields[section].annotation.model_fields


def test_the_readme_names_every_packaged_configuration_and_file():
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "src" / "crosslm").glob("*.py")):
        assert path.name == "__init__.py" or f"`{path.name}`" in readme, path.name
    for folder in (ROOT / "src" / "crosslm").iterdir():
        assert not folder.is_dir() or folder.name == "__pycache__" or f"`{folder.name}/`" in readme, folder.name
    for name in ("sst2", "imdb", "ag_news", "yahoo_answers", "paper_sst2"):
        assert load(name).name == name
        assert f"`{name}`" in readme


def test_what_contributors_are_told_of_exists():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    links, files = re.findall(r"\]\(([^)]+)\)", page), re.findall(r"(?:tests|benchmarks)/\w*(?:\.py)?", page)
    assert {"SECURITY.md", "docs/paper_map.md"} <= set(links)
    assert "tests/test_architecture.py" in files
    assert all((ROOT / path).exists() for path in [*links, *files, "src/crosslm/errors.py", "src/crosslm/server.py"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"test", "docs", "format"} <= set(re.findall(r"\bmake ([a-z-]+)", page)) <= targets


def test_version_is_the_same_everywhere():
    import crosslm

    assert f"version: {crosslm.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {crosslm.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_the_tables_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    for path, text in results.documents().items():
        assert path.read_text() == text, f"{path.name}: run python benchmarks/results.py render"


def test_what_is_said_of_machines_that_share_a_network_is_what_was_found():
    found = json.loads((ROOT / "benchmarks/results/two-machines.json").read_text())
    silos = {"north", "south"}
    assert set(found["exit_codes"].values()) == {0}
    assert {"server", *silos} <= set(found["exit_codes"])
    assert {(silo, state) for silo, state, _ in found["arrivals"]} == {(silo, "delivered") for silo in silos}
    assert found["listening"] == {"server": ["0.0.0.0:9400"], "north": [], "south": []}
    assert len(found["cut"]) == 2
