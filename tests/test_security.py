"""SECURITY.md and docs/privacy.md say what is there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import crosslm
from crosslm.config import PrivacyConfig

ROOT = Path(__file__).parents[1]
SECURITY = (ROOT / "SECURITY.md").read_text()
PRIVACY = (ROOT / "docs" / "privacy.md").read_text()
README = (ROOT / "README.md").read_text()


def threats():
    rows = SECURITY.split("| threat |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("threat", threats(), ids=lambda row: row[0])
def test_each_threat_has_a_test_that_exists(threat):
    _, _, tests = threat
    references = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
    assert references
    for path, name in references:
        assert f"def {name}(" in (ROOT / path).read_text(), name


def test_the_supported_version_is_this_one():
    assert f"| {'.'.join(crosslm.__version__.split('.')[:2])}.x | yes" in SECURITY


def test_every_field_that_is_named_exists():
    for name in re.findall(r"`privacy\.(?!py`)(\w+)", PRIVACY + README):
        assert name in PrivacyConfig.model_fields, name
    for name in PrivacyConfig.model_fields:
        assert re.search(rf"\b{name}\b", PRIVACY), f"docs/privacy.md does not say what privacy.{name} is for"


def test_the_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", SECURITY + PRIVACY + README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    named = set(re.findall(r"tests/(test_\w+)\.py", makefile))
    assert {"test_private_fit", "test_membership", "test_leaks", "test_audit", "test_security"} <= named
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in named)


def test_the_audit_of_dependencies_says_what_it_found():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    fine = {"name": "a", "version": "1", "vulns": []}
    weak = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    assert audit.verdict(json.dumps({"dependencies": [fine, unknown]})) == (
        "1 of 2 dependencies were looked up, 0 known vulnerabilities",
        True,
    )
    words, good = audit.verdict(json.dumps({"dependencies": [fine, weak]}))
    assert "b 2: CVE-1, mended in 3" in words
    assert not good
    for output in ("", "no network", json.dumps({"dependencies": [unknown]})):
        assert audit.verdict(output)[0].startswith("skipped: ")
