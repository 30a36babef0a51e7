"""Getting crosslm onto a machine, as the README and docs/deploy.md tell it: from the clone, and from a wheel of it."""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import crosslm
from crosslm.support import provenance

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()


def commands(text, start):
    return re.findall(rf"^\$ ({start} .*)$", text, flags=re.M)


(ACTIVATE,) = commands(README, "source")
BUILD, INSTALL, GATHER, INSTALL_OFFLINE = commands(DEPLOY, "pip")


def pip(command, folder, *more, python=sys.executable):
    """A documented command of pip, without an index."""
    words = ["--python", str(python), *shlex.split(command)[1:], "--no-index", "--disable-pip-version-check", *more]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a wheel is built from, and the wheel."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    pip(BUILD, folder, "--no-build-isolation")
    return folder


def test_the_readme_activates_what_make_installs_into():
    assert (
        f"source {re.search(r'^VENV := (.*)$', (ROOT / 'Makefile').read_text(), flags=re.M)[1]}/bin/activate"
        == ACTIVATE
    )
    assert README.index("$ make demo") < README.index(ACTIVATE) < README.index("$ crosslm init")


def test_the_wheel_of_the_clone_is_installed_with_its_extra(clone):
    told = pip(INSTALL, clone, "--dry-run")
    assert f"Would install crosslm-{crosslm.__version__}" in told
    assert "does not provide the extra" not in told


def test_what_a_connected_machine_gathers_is_installed_on_one_that_reaches_no_index(clone, tmp_path):
    """Of crosslm alone, since all that it needs would be copied; what is here stands for the rest."""
    shutil.copytree(clone / "dist", tmp_path / "dist")
    shutil.copy(clone / "constraints.txt", tmp_path)
    pip(GATHER, tmp_path, "--no-deps")
    shutil.rmtree(tmp_path / "dist")
    told = pip(INSTALL_OFFLINE, tmp_path, "--no-deps", "--dry-run", "--ignore-installed")
    assert f"Would install crosslm-{crosslm.__version__}" in told
    assert re.search(r"\[(.*)\]", GATHER)[1] == re.search(r"\[(.*)\]", INSTALL_OFFLINE)[1]


def test_what_the_wheel_installs_works_once_activated(clone, tmp_path):
    fresh = tmp_path / ".venv"
    venv.create(fresh)
    (wheel,) = (clone / "dist").iterdir()
    pip(f"pip install --no-deps {wheel}", tmp_path, python=fresh / "bin" / "python")
    (installed,) = fresh.glob("lib/python*/site-packages/crosslm")
    # the packages that it needs, of this environment
    (installed.parent / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = (
        f"{ACTIVATE} && command -v crosslm && python -c 'import crosslm; print(crosslm.__file__)' && crosslm --help"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    command, module, *told = done.stdout.splitlines()
    assert command == str(fresh / "bin" / "crosslm")
    assert module == str(installed / "__init__.py")
    assert any("doctor" in line for line in told)
    assert files_of(installed) == files_of(ROOT / "src" / "crosslm")


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_a_source_that_was_never_installed_can_make_a_run(monkeypatch):
    def of_others(package):
        if package == "crosslm":
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(provenance, "version", of_others)
    assert provenance.versions()["crosslm"] == crosslm.__version__
    assert provenance.versions()["torch"] == "1.2.3"
