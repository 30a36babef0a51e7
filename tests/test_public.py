"""The public names: what they are, their types, their examples, and the notebook."""

import ast
import doctest
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_AMOUNTS

import crosslm

ROOT = Path(__file__).parents[1]
DOCUMENTED = ("crosslm", "crosslm.runs.finished", "crosslm.runs.export")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture
def here(workplace, tmp_path, monkeypatch):
    """A copy of the folder that the examples speak of, to work in."""
    shutil.copytree(workplace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CROSSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def examples(module):
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=True)
    return [test for test in finder.find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", DOCUMENTED)
def test_the_examples_run(module, here):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert examples(module)
    for test in examples(module):
        report = []
        runner.run(test, out=report.append)
        assert not report, "".join(report)


def test_every_public_name_is_in_an_example():
    assert 10 <= len(crosslm.__all__) <= 16
    used = set()
    for module in DOCUMENTED:
        for test in examples(module):
            for example in test.examples:
                tree = ast.parse(example.source)
                used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
                used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(crosslm.__all__) - used == {"__version__"}


def test_every_public_name_is_documented_and_there_is_no_other():
    assert dir(crosslm) == sorted(crosslm.__all__)
    for name in set(crosslm.__all__) - {"__version__"}:
        assert getattr(crosslm, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        crosslm.nothing  # noqa: B018


def test_a_configuration_is_read_without_torch():
    code = "import crosslm, sys; crosslm.load('demo'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_types_are_seen_by_a_type_checker():
    tree = ast.parse((ROOT / "src" / "crosslm" / "__init__.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(crosslm.__all__) - {"__version__"} <= imported
    assert (ROOT / "src" / "crosslm" / "py.typed").exists()


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, here, models, capsys):
    """All code cells in turn, as Jupyter would run them, with tiny models in the place of the parameters'."""
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], {cell["cell_type"] for cell in notebook["cells"]}) == (4, {"markdown", "code"})
    names = {"__name__": "__main__"}
    given = {"LLM": models / "gemma3", "SLM": models / "bert", "ENCODER": models / "encoder"}
    tagged = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "outputs are not kept in the notebook"
        exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            tagged += 1
            assert set(given) | {"OVERRIDES"} == {name for name in names if name.isupper()}
            names |= {name: str(value) for name, value in given.items()} | {"OVERRIDES": TINY_AMOUNTS}
    assert tagged == 1
    out = capsys.readouterr().out
    assert "CrossLM" in out
    assert "'label': " in out
