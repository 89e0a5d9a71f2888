"""Chooses the files of the working directory that are uploaded with a job."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from stgt.errors import SettingError

NOT_CODE = (
    ".git/",
    ".hg/",
    ".svn/",
    ".venv/",
    "venv/",
    "__pycache__/",
    "*.py[co]",
    "*.egg-info/",
    ".*_cache/",
    "node_modules/",
    "mlruns/",
    "mlartifacts/",
    *(f"*.{name}" for name in ("db", "sqlite", "log")),
    *(".env", ".env.*", "*.env", "*.key", "*.pem", "*.p12", "*.crt", "id_rsa*", "id_ed25519*"),
    *("token", "*.token", "*-token", "credentials", "credentials.*", ".netrc", ".pypirc"),
    *(".aws/", ".ssh/", ".kube/", ".docker/"),
    *(f"*.{name}" for name in ("mp4", "mkv", "webm", "avi", "mov", "flv", "ts", "gif")),
    *(f"*.{name}" for name in ("pt", "pth", "bin", "safetensors", "ckpt", "npy", "npz")),
    *(f"*.{name}" for name in ("parquet", "arrow", "csv.gz", "zip", "tar", "tar.gz", "tgz")),
)
"""What no job needs as code, and files that usually hold secrets, in patterns of .gitignore."""
IGNORE_FILE = ".gitignore"
CONFIG = "config.json"
"""File that a job writes into its output folder, with the name of the job."""
NAMED = 3
"""Largest folders to name."""


class UploadError(SettingError):
    """The working directory cannot be uploaded."""


def chosen_files(folder: Path, exclude: Sequence[str]) -> dict[str, int]:
    """Return the files to upload, by path relative to the folder, with their sizes in bytes.

    Args:
        folder: The working directory.
        exclude: Patterns of .gitignore for further files not to upload.

    Raises:
        UploadError: The folder does not exist, or a pattern is invalid.
    """
    if not folder.is_dir():
        raise UploadError(
            f"--working-dir {folder} is not a folder; give the folder with the code, or None to "
            "run the code of the cluster's image"
        )
    try:
        ignored = GitIgnoreSpec.from_lines([*NOT_CODE, *exclude])
    except ValueError as error:
        raise UploadError(
            f"--exclude {' '.join(exclude)}: not patterns of .gitignore ({error})"
        ) from error
    return dict(_walk(folder, "", [("", ignored)]))


def _walk(
    folder: Path, prefix: str, ignored: Sequence[tuple[str, GitIgnoreSpec]]
) -> Iterator[tuple[str, int]]:
    """Yield the files below a folder, whose path relative to the working directory is the prefix.

    Patterns of a .gitignore apply to the paths below its own folder.
    """
    if (own := folder / IGNORE_FILE).is_file():
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
        ignored = [*ignored, (prefix, GitIgnoreSpec.from_lines(lines))]
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        path = f"{prefix}{entry.name}"
        is_folder = entry.is_dir()
        asked = f"{path}/" if is_folder else path
        if any(spec.match_file(asked.removeprefix(root)) for root, spec in ignored):
            continue
        if not is_folder:
            if entry.is_file():
                yield path, entry.stat().st_size
        elif not entry.is_symlink() and not _is_output(Path(entry.path)):
            yield from _walk(Path(entry.path), f"{path}/", ignored)


def _is_output(folder: Path) -> bool:
    """Return whether a job wrote its output into a folder."""
    config = folder / CONFIG
    try:
        return "job" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def check_size(folder: Path, files: dict[str, int], max_mb: float) -> None:
    """Refuse an upload that is too large.

    Args:
        folder: The working directory.
        files: Sizes of the files in bytes.
        max_mb: Largest upload in MB.

    Raises:
        UploadError: The files are larger; the message names the largest folders.
    """
    total = sum(files.values())
    if total <= max_mb * 1e6:
        return
    sizes: Counter[str] = Counter()
    for path, size in files.items():
        top, inside, _ = path.partition("/")
        sizes[top if inside else "."] += size
    largest = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for name, size in sizes.most_common(NAMED))
    raise UploadError(
        f"the upload of {folder} would have {total / 1e6:.0f} MB, and --max-upload-mb is "
        f"{max_mb:g}; its largest folders are {largest}; leave some out with --exclude, or keep "
        "data where all nodes can reach it, such as on s3://"
    )


def stage(folder: Path, files: Sequence[str], into: Path) -> None:
    """Copy files to a folder of their own, which Ray uploads as it is."""
    for path in files:
        if Path(path).name == IGNORE_FILE:
            continue  # its patterns have been applied
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / path, target)
