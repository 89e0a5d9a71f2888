"""`make audit`: findings fail, and a machine without a connection is told so and does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.data import PROJECT

FINDING = {
    "name": "example",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"]}],
}
CLEAN = {"name": "other", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "third", "skip_reason": "not on the index"}


def audit(folder: Path, stub: str | None) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script, whose pip-audit is a program that the test writes."""
    (folder / ".ci").mkdir()
    shutil.copy(PROJECT / ".ci" / "audit", folder / ".ci" / "audit")
    if stub is not None:
        package = folder / ".venv" / "pip-audit" / "pip_audit"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(stub)
    (folder / "constraints.txt").write_text("example==1.0\n")
    return subprocess.run(
        [sys.executable, str(folder / ".ci" / "audit")],
        env={**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INPUT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def answers(*packages: dict[str, Any], code: int = 0) -> str:
    text = json.dumps({"dependencies": list(packages), "fixes": []})
    return f"import sys\nprint({text!r})\nsys.exit({code})\n"


def test_a_finding_fails_and_is_named(tmp_path: Path) -> None:
    done = audit(tmp_path, answers(FINDING, CLEAN, code=1))
    assert done.returncode == 1, done.stderr
    assert done.stdout == "example 1.0: PYSEC-1 (CVE-2026-1), fixed in 1.1\n"
    assert "2 packages looked up, 1 known vulnerabilities" in done.stderr


def test_no_finding_passes_and_packages_that_were_not_looked_up_are_named(tmp_path: Path) -> None:
    done = audit(tmp_path, answers(CLEAN, UNKNOWN))
    assert (done.returncode, done.stdout) == (0, "")
    assert "third was not looked up: not on the index" in done.stderr
    assert "1 packages looked up, 0 known" in done.stderr


def test_a_database_that_knows_no_package_is_no_audit(tmp_path: Path) -> None:
    """As a mirror of the index answers that has no database of vulnerabilities."""
    done = audit(tmp_path, answers(UNKNOWN))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("the dependencies are not audited: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_machine_without_a_connection_is_told_so_and_passes(tmp_path: Path) -> None:
    """pip itself, against an index where nothing listens."""
    done = audit(tmp_path, None)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("the dependencies are not audited: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("urllib3.exceptions.MaxRetryError: Max retries exceeded with url", 0),
        ("ERROR:pip_audit._cli:invalid requirements input", 2),
    ],
)
def test_a_failure_is_told_from_a_missing_connection(tmp_path: Path, said: str, code: int) -> None:
    done = audit(tmp_path, f"import sys\nsys.exit({said!r})\n")
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert ("not audited" in done.stderr) is (code == 0)
