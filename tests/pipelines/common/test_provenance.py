"""What a process knows about itself: its command line, its code and its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines.common import provenance
from pipelines.common.provenance import About
from tests.helpers.data import PROJECT

TELL = """
from pipelines.common import provenance
print(provenance.command_line())
"""


def test_the_command_of_a_module_runs_it_again(tmp_path: Path) -> None:
    """Spaces are quoted, and credentials are hidden."""
    (tmp_path / "told.py").write_text(TELL)
    words = ["finetune", "--tracking.uri", "http://me:pa55@host", "--name", "my run"]
    done = subprocess.run(
        [sys.executable, "-m", "told", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "python -m told finetune --tracking.uri 'http://***@host' --name 'my run'\n"
    )


def test_a_caller_may_give_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    about = About(job="train", summary="Trains.")
    with provenance.using_command("python -m jobs.train --config trial/config.json"):
        found = provenance.command_of(about, "/out")
    assert found == "python -m jobs.train --config trial/config.json"
    monkeypatch.setattr(sys, "argv", ["/bin/tool", "--flag"])
    assert provenance.command_of(about, "/out").endswith(" --flag")
    # A process of Ray, whose own command line says nothing.
    monkeypatch.setattr(sys, "argv", ["/ray/_private/workers/default_worker.py", "--node-ip=x"])
    found = provenance.command_of(about, "/my out")
    assert found == "python -m jobs.train --config '/my out/config.json'"


def test_the_commit_is_the_one_that_is_checked_out() -> None:
    found = provenance.commit()
    if not (PROJECT / ".git").exists():
        assert found is None
        return
    said = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert found is not None
    assert len(found.sha) == 40
    assert (
        subprocess.run(
            ["git", "merge-base", "--is-ancestor", found.sha, said.stdout.strip()],
            cwd=PROJECT,
            check=False,
        ).returncode
        == 0
    )


def test_a_checkout_is_dirty_when_a_file_of_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=me", "-c", "user.email=me@host"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    provenance.commit.cache_clear()
    assert provenance.commit() is None
    git("init", "-q", "-b", "trunk")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    provenance.commit.cache_clear()
    clean = provenance.commit()
    assert clean is not None
    assert (clean.branch, clean.is_dirty) == ("trunk", False)
    (tmp_path / "file").write_text("b")
    provenance.commit.cache_clear()
    changed = provenance.commit()
    assert changed is not None
    assert (changed.sha, changed.is_dirty) == (clean.sha, True)
    # Below another project's checkout, as an installed copy may lie.
    inside = tmp_path / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(provenance, "PROJECT", inside)
    provenance.commit.cache_clear()
    assert provenance.commit() is None
    provenance.commit.cache_clear()


def test_versions_and_hardware_are_those_of_this_machine() -> None:
    versions = provenance.versions()
    assert versions["python"] == sys.version.split()[0]
    assert versions["numpy"] == np.__version__
    assert {
        "torch",
        "ray",
        "mlflow",
        "timm",
        "transformers",
        "pyarrow",
        "decord",
    } <= versions.keys()
    hardware = provenance.hardware()
    assert hardware["cpus"] == str(psutil.cpu_count())
    assert float(hardware["memory_gb"]) == pytest.approx(
        psutil.virtual_memory().total / 1e9, abs=0.06
    )
    assert (hardware["gpus"] == "none") == (not Path("/proc/driver/nvidia/gpus").exists())
