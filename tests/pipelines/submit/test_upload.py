"""What is uploaded with a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.submit.upload import UploadError, check_size, chosen_files, stage


def write(folder: Path, path: str, size: int = 10) -> None:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for path in (
        "jobs/entry.py", "jobs/__pycache__/entry.cpython-311.pyc", "sweep.yaml", ".git/HEAD",
        ".venv/bin/python", "mlflow.db", "clips/a.mp4", "notes/plan.txt", "notes/keep.txt",
        "secret/key.txt", "runs/one/metrics/1.json",
    ):  # fmt: skip
        write(tmp_path, path)
    (tmp_path / ".gitignore").write_text("/secret/\n")
    (tmp_path / "notes" / ".gitignore").write_text("*.txt\n!keep.txt\n")
    (tmp_path / "runs/one/config.json").write_text(json.dumps({"job": "train"}))
    return tmp_path


def test_code_and_settings_are_uploaded_and_nothing_else(project: Path) -> None:
    files = chosen_files(project, ())
    assert set(files) == {
        ".gitignore", "jobs/entry.py", "notes/.gitignore", "notes/keep.txt", "sweep.yaml",
    }  # fmt: skip
    assert set(chosen_files(project, ["notes/"])) == {".gitignore", "jobs/entry.py", "sweep.yaml"}


def test_staged_files_are_those_that_were_chosen(project: Path, tmp_path: Path) -> None:
    into = tmp_path / "staged"
    stage(project, list(chosen_files(project, ["staged/"])), into)
    staged = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
    # Ray would apply the patterns of a .gitignore once more.
    assert staged == {"jobs/entry.py", "notes/keep.txt", "sweep.yaml"}


def test_a_large_upload_is_refused_with_its_largest_folders(tmp_path: Path) -> None:
    for name, size in {"a/b": 3_000_000, "c": 2_000_000, "d": 1_000_000, "e": 1000}.items():
        write(tmp_path, f"{name}/file.txt", size)
    files = chosen_files(tmp_path, ())
    check_size(tmp_path, files, max_mb=7)
    with pytest.raises(UploadError, match="a .3 MB., c .2 MB., d .1 MB.; leave some out"):
        check_size(tmp_path, files, max_mb=5)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match="nowhere is not a folder"):
        chosen_files(tmp_path / "nowhere", ())


@pytest.mark.parametrize(
    "name", [".env", "mlflow.env", "ca.key", "certs/node.pem", ".aws/credentials", "ray/token"]
)
def test_secrets_are_not_uploaded(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    write(tmp_path, "stgt/inputs/tokenizer.py")
    assert set(chosen_files(tmp_path, ())) == {"stgt/inputs/tokenizer.py"}


def test_a_wrong_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match="--exclude !: not patterns of .gitignore"):
        chosen_files(tmp_path, ["!"])
