"""Jobs as users call them: exit codes and one clear sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.data import PROJECT, TinyData

pytestmark = pytest.mark.slow


def job(
    name: str, *flags: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *flags],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_own_videos_become_a_clip_store(
    tiny_data: TinyData, joining: dict[str, str], tmp_path: Path
) -> None:
    """The way the README shows for one's own videos."""
    made = job(
        "manifest",
        f"--annotations={Path(tiny_data.videos).parent / 'results_val.csv'}",
        f"--videos={tiny_data.videos}",
        f"--output={tmp_path / 'm.parquet'}",
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["clips"] == 12
    stored = job(
        "ingest",
        f"--manifest={tmp_path / 'm.parquet'}",
        f"--output={tmp_path / 'clips'}",
        "--sampling.num-frames=8",
        "--sampling.size=64",
        environment=joining,
    )
    assert stored.returncode == 0, stored.stderr
    summary = json.loads(stored.stdout)
    assert (summary["clips"], summary["quarantined"]) == (12, 0)
    assert Path(summary["store"], "catalogue.json").exists()


def test_a_csv_with_missing_columns_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_text("x")
    (tmp_path / "a.csv").write_text("id,caption\n1,x\n")
    failed = job(
        "manifest",
        f"--annotations={tmp_path / 'a.csv'}",
        f"--videos={tmp_path / 'videos'}",
        f"--output={tmp_path / 'm.parquet'}",
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert "lacks the columns videoid, page_dir, name (found: id, caption)" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "m.parquet").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tiny_data: TinyData, joining: dict[str, str], small_disk: Callable[[str], Path]
) -> None:
    small = small_disk("256k")
    failed = job(
        "ingest", f"--manifest={tiny_data.train_manifest}", f"--output={small}",
        "--sampling.size=224", "--num-workers=1", environment=joining,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "error: no space left on the disk" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(small.rglob("catalogue.json"))
    assert not list(small.rglob("*.tmp"))
    assert not list(small.rglob("shards/*.json"))
