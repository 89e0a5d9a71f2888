"""The one door to local disk and S3: paths and URIs, reading, and writing that is whole or absent.

Retries of transient S3 errors, with backoff, are botocore's own; 403 and 404 are not retried.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from stgt.errors import STGTError

GONE = ".removed"
"""Ends the hidden name of a folder that is being deleted."""
S3_OPTIONS = {"config_kwargs": {"retries": {"max_attempts": 8, "mode": "standard"}}}


def resolve(uri: str) -> str:
    """A local path made absolute, since workers run in other folders; a remote URI as it is."""
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))  # noqa: PTH100, PTH111


def join(uri: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([uri.rstrip("/"), *parts])


def name_of(uri: str) -> str:
    """The last part of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI, and the path in it."""
    options = S3_OPTIONS if uri.startswith("s3://") else {}
    return fsspec.core.url_to_fs(uri, **options)


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    return fs.exists(path)


def is_folder(uri: str) -> bool:
    """Whether a folder is there."""
    fs, path = filesystem(uri)
    return fs.isdir(path)


def list_names(uri: str) -> list[str]:
    """Names in a folder, sorted; none when the folder is not there."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    return sorted(name_of(entry) for entry in fs.ls(path, detail=False))


def version(uri: str) -> str:
    """A token that changes when a file is written anew: by time and inode, or by ETag."""
    fs, path = filesystem(uri)
    return str(fs.ukey(path))


def size_bytes(uri: str) -> int:
    """Size of a file."""
    fs, path = filesystem(uri)
    return int(fs.size(path) or 0)


def read_bytes(uri: str) -> bytes:
    """A whole file."""
    fs, path = filesystem(uri)
    data = fs.cat_file(path)
    assert isinstance(data, bytes)
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole: under another name first, then renamed, so nobody reads half of it."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # an S3 object appears only when its upload is complete
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def put_file(path: Path, uri: str) -> None:
    """Copy a local file to a URI; it appears there whole."""
    fs, target = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.put_file(str(path), target)  # an S3 object appears only when its upload is complete
        return
    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        shutil.copyfile(path, temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    """A JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, values: Any) -> None:
    """Write a JSON file whole."""
    write_bytes(uri, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def encode_table(table: pa.Table, row_group_rows: int | None = None) -> bytes:
    """A table as the bytes of a Parquet file: the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows)
    return sink.getvalue().to_pybytes()


def write_table(uri: str, table: pa.Table, row_group_rows: int | None = None) -> bytes:
    """Write a Parquet file whole and give its bytes."""
    data = encode_table(table, row_group_rows)
    write_bytes(uri, data)
    return data


def upload_folder(folder: Path, uri: str, marker: str) -> None:
    """Copy a local folder's files to a URI, `marker` last: without it the folder does not count."""
    write_names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if marker in write_names:
        raise ValueError(f"{folder} already holds {marker}")
    for name in write_names:
        write_bytes(join(uri, name), (folder / name).read_bytes())
    write_bytes(join(uri, marker), b"")


def download_folder(uri: str, folder: Path) -> Path:
    """The files of a URI in a local folder: the URI's own when it is local, else a copy."""
    if is_local(uri):
        return Path(filesystem(uri)[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in list_names(uri):
        (folder / name).write_bytes(read_bytes(join(uri, name)))
    return folder


def remove(uri: str) -> None:
    """Delete a file or a folder with everything in it; nothing happens when it is not there.

    A local folder goes as a whole: it is renamed to a hidden name first, so that a kill in the
    middle leaves nothing that looks like a folder with a part of its files.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        local = Path(path)
        if local.is_dir():
            shutil.rmtree(local.rename(local.with_name(f".{local.name}.{uuid.uuid4().hex}{GONE}")))
        else:
            local.unlink(missing_ok=True)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def free_bytes(uri: str) -> int | None:
    """Free space where a local URI lies or will lie; None for remote ones."""
    if not is_local(uri):
        return None
    path = Path(filesystem(uri)[1])
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def lock(uri: str) -> Iterator[None]:
    """Keep a second process out of a local folder; remote folders cannot be locked.

    Raises:
        STGTError: another process holds the folder.
    """
    if not is_local(uri):
        yield
        return
    folder = Path(filesystem(uri)[1])
    folder.mkdir(parents=True, exist_ok=True)
    holder = FileLock(folder / ".lock")
    try:
        holder.acquire(timeout=0)
    except Timeout as error:
        raise STGTError(
            f"another run is at work in {folder}; wait for it to end, or choose another folder"
        ) from error
    try:
        yield
    finally:
        holder.release()
