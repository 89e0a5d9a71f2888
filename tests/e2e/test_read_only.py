"""A training where only the output folder, the temporary folder and the home may be written to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data import PROJECT, TinyData

NOT_ALLOWED = 77
SCRIPT = f"""
set -eu
refuse() {{ echo "$1" >&2; exit {NOT_ALLOWED}; }}
mount --make-rprivate / || refuse "mounts cannot be made private"
mount --bind /tmp /tmp || refuse "nothing can be mounted"
while read -r place; do
    case "$place" in
        /proc|/proc/*|/sys|/sys/*|/dev|/dev/*|/tmp|/tmp/*) ;;
        *) mount -o remount,bind,ro "$place" || refuse "$place cannot be made read-only" ;;
    esac
done < <(findmnt --raw --noheadings --output TARGET)
for place in / {PROJECT} {Path(sys.prefix)}; do
    if touch "$place/.written" 2> /dev/null; then
        rm "$place/.written"
        refuse "$place can still be written to"
    fi
done
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.soak
def test_a_training_needs_no_other_folder_to_write_to(tiny_data: TinyData, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        sys.executable, "-m", "jobs.train", "pretrain_stage1_tiny",
        f"--data={tiny_data.train_store}", f"--vocab={tiny_data.vocab}",
        f"--output={tmp_path / 'run'}", "--steps=4", "--global-batch=8", "--num-workers=1",
        "--num-loaders=1", "--checkpoint-every=2", "--optim.warmup-steps=1",
        f"--tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    ]  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", SCRIPT, "bash", *command],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    if done.returncode == NOT_ALLOWED or "unshare failed" in done.stderr:
        pytest.skip(f"file systems cannot be made read-only here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 4
    assert "Read-only file system" not in done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
