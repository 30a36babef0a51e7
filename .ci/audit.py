"""Look the pinned dependencies up among known vulnerabilities, with pip-audit.

Where its database cannot be reached, this says "skipped" and succeeds: a build without network is no failure, and no
claim that there is nothing to find.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def verdict(output: str) -> tuple[str, bool]:
    """What is to be said of pip-audit's JSON, and whether that is good."""
    try:
        dependencies = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        return "skipped: the database of vulnerabilities cannot be reached", True
    audited = [entry for entry in dependencies if "skip_reason" not in entry]
    if not audited:
        return "skipped: the database that was reached knows none of the dependencies", True
    found = [
        f"{entry['name']} {entry['version']}: {weakness['id']}, mended in {', '.join(weakness['fix_versions']) or '-'}"
        for entry in audited
        for weakness in entry["vulns"]
    ]
    looked = f"{len(audited)} of {len(dependencies)} dependencies were looked up, {len(found)} known vulnerabilities"
    return "\n".join([*found, looked]), not found


def main() -> int:
    """Run pip-audit on the pins."""
    command = ["-m", "pip_audit", "--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
        words, good = verdict(done.stdout)
    except subprocess.TimeoutExpired:
        words, good = verdict("")
    print(words)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
