"""All access to local disk and S3: paths and URIs, reading, and atomic writing.

Paths and URIs are plain names. No character in them has a special meaning: `::` does not chain file
systems, and `*`, `?`, `[`, `#`, `%` and `~` stand for themselves.

Transient S3 failures (5xx, throttling, broken connections) are retried with random exponential
backoff; 403 and 404 are not. Endpoint and credentials come from the environment.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, ParamSpec, TypeVar, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import tenacity
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from stgt.errors import STGTError

logger = logging.getLogger(__name__)

GONE = ".removed"
"""Suffix of the hidden name that a folder gets while it is being deleted."""
S3_OPTIONS = {
    # botocore's own retries share a quota that a long outage exhausts. Instead, s3fs retries single
    # requests a few times, and `patient` retries whole operations.
    "config_kwargs": {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": 10,
        "read_timeout": 30,
    },
    "use_listings_cache": False,  # other processes write to the same folders
}
ATTEMPTS = 20
LONGEST_PAUSE_S = 8.0
QUIET_ATTEMPTS = 4
PASSING = frozenset({errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.ETIMEDOUT})
READERS = 32
HASH_CHUNK_BYTES = 8 * 1024 * 1024
LOCAL_SCHEME = "file://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_GLOB = re.compile(r"[*?\[]")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UnreachableError(OSError):
    """A remote file could not be read or written, even after many attempts."""


def _will_pass(error: BaseException) -> bool:
    """Return whether an error of a remote file system may be transient."""
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError

    broken = (ConnectionError, TimeoutError, ClientError, BotoConnectionError)
    if isinstance(error, (*broken, HTTPClientError, ResponseParserError)):
        return True
    return isinstance(error, OSError) and error.errno in PASSING


def _say_when_it_lasts(state: tenacity.RetryCallState) -> None:
    if state.attempt_number >= QUIET_ATTEMPTS and state.outcome is not None:
        logger.warning(
            "%s: attempt %d of %d failed (%s); retrying",
            next(argument for argument in state.args if is_remote(argument)),
            state.attempt_number,
            ATTEMPTS,
            state.outcome.exception(),
        )


_patience = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_will_pass),
    wait=tenacity.wait_random_exponential(multiplier=0.1, max=LONGEST_PAUSE_S),
    stop=tenacity.stop_after_attempt(ATTEMPTS),
    before_sleep=_say_when_it_lasts,
    reraise=True,
)


def is_remote(argument: object) -> bool:
    """Return whether an argument is a URI that does not refer to local disk."""
    if not isinstance(argument, str) or argument.startswith(LOCAL_SCHEME):
        return False
    return _SCHEME.match(argument) is not None


def patient(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Retry a whole operation on a remote URI while it fails with transient errors.

    Raises:
        UnreachableError: All attempts failed.
        FileNotFoundError: There is no such file or bucket.
        PermissionError: The credentials are missing or insufficient.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        uri = next((argument for argument in args if is_remote(argument)), None)
        if uri is None:
            return function(*args, **kwargs)
        from botocore.exceptions import BotoCoreError

        try:
            return _patience(function, *args, **kwargs)
        except (FileNotFoundError, PermissionError) as error:
            if error.filename is not None:
                raise
            # s3fs gives such errors no name, and messages such as AccessDenied.
            said = str(error)
            if isinstance(error, PermissionError):
                raise PermissionError(errno.EACCES, f"no permission ({said})", uri) from error
            reason = said if " " in said else "it does not exist"
            raise FileNotFoundError(errno.ENOENT, reason, uri) from error
        except Exception as error:
            if _will_pass(error):
                raise UnreachableError(
                    f"{uri} could not be reached in {ATTEMPTS} attempts: {error}; check the "
                    "endpoint and the network, then run the same command again"
                ) from error
            if isinstance(error, BotoCoreError):
                raise PermissionError(errno.EACCES, str(error), uri) from error
            raise

    return call


def resolve(uri: str) -> str:
    """Make a local path absolute, since workers run in other folders; leave a remote URI as is."""
    if is_remote(uri):
        return uri.rstrip("/")
    if uri.startswith(LOCAL_SCHEME):
        return os.path.abspath(uri.removeprefix(LOCAL_SCHEME))  # noqa: PTH100
    return os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111


def join(uri: str, *parts: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def name_of(uri: str) -> str:
    """Return the last component of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URI and the path within it, which is taken as it is.

    The URI is not given to fsspec's own parser, which reads `::` as a chain of file systems and the
    text before a colon as the name of one.
    """
    scheme = _SCHEME.match(uri)
    if scheme is None or uri.startswith(LOCAL_SCHEME):
        path = os.path.join(os.getcwd(), uri.removeprefix(LOCAL_SCHEME))  # noqa: PTH109, PTH118
        return LocalFileSystem(), path.rstrip("/") or "/"
    kind = scheme.group(1)
    if kind == "s3":
        _teach_s3fs()
        # The path may be a key with any characters, but s3fs strips slashes at its end.
        return fsspec.filesystem(kind, **S3_OPTIONS), uri[scheme.end() :].rstrip("/")
    return fsspec.core.url_to_fs(uri)


@functools.cache
def _teach_s3fs() -> None:
    """Make s3fs retry single requests by the same rule; by default it misses some errors."""
    from s3fs.core import set_custom_error_handler
    from s3fs.errors import translate_boto_error

    set_custom_error_handler(lambda error: _will_pass(translate_boto_error(error)))


def is_local(uri: str) -> bool:
    """Return whether a URI is a local path."""
    return not is_remote(uri)


@patient
def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    fs, path = filesystem(uri)
    return fs.exists(path)


@patient
def is_file(uri: str) -> bool:
    """Return whether a URI is an existing file."""
    fs, path = filesystem(uri)
    return fs.isfile(path)


def is_empty(uri: str) -> bool:
    """Return whether a local folder is missing or empty, without listing all of it."""
    folder = Path(filesystem(uri)[1])
    return not folder.is_dir() or next(folder.iterdir(), None) is None


@patient
def list_names(uri: str) -> list[str]:
    """Return the sorted names in a folder; empty if the folder does not exist."""
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    return sorted(name_of(entry) for entry in fs.ls(path, detail=False))


def list_below(uri: str, most: int) -> list[str] | None:
    """Return the paths of all files in a folder and its subfolders, relative to the folder.

    Links to folders are followed, each folder is visited once, and hidden folders are left out. A
    local folder that must not be read is left out with a warning.

    Args:
        uri: The folder.
        most: Largest number of files of a remote folder. Local folders are always listed.

    Returns:
        The paths in sorted order, empty if there is no such folder; None if a remote folder has
        more than `most` files.
    """
    return _remote_below(uri, most) if is_remote(uri) else _local_below(filesystem(uri)[1])


def _local_below(root: str) -> list[str]:
    found: list[str] = []
    visited: set[tuple[int, int]] = set()

    def warn(error: OSError) -> None:
        logger.warning("%s cannot be listed and is left out: %s", error.filename, error.strerror)

    for folder, folders, names in os.walk(root, onerror=warn, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = folder[len(root) :].strip("/")
        found += (f"{prefix}/{name}" if prefix else name for name in names)
    return sorted(found)


@patient
def _remote_below(uri: str, most: int) -> list[str] | None:
    fs: Any
    fs, path = filesystem(uri)
    if not uri.startswith("s3://"):
        found = [name.removeprefix(path).lstrip("/") for name in fs.find(path)]
        return found if len(found) <= most else None
    bucket, _, key = path.partition("/")
    prefix = f"{key}/" if key else ""
    found = []
    token: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **token)
        keys = (entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ()))
        found += (key for key in keys if key and not key.endswith("/") and not _hidden(key))
        if len(found) > most:
            return None
        if not page.get("IsTruncated"):
            return sorted(found)
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/")[:-1])


@patient
def version(uri: str) -> str:
    """Return a token that changes when a file is rewritten, from its time and inode or its ETag."""
    fs, path = filesystem(uri)
    return str(fs.ukey(path))


@patient
def size_bytes(uri: str) -> int:
    """Return the size of a file in bytes."""
    fs, path = filesystem(uri)
    return int(fs.size(path) or 0)


@patient
def size_and_version(uri: str) -> tuple[int, str]:
    """Return the size of a file in bytes, and a token that changes when it is rewritten."""
    fs, path = filesystem(uri)
    facts = fs.info(path)
    if facts["type"] == "directory":
        raise FileNotFoundError(errno.ENOENT, "it is a folder", uri)
    return int(facts["size"] or 0), str(facts.get("ETag") or fs.ukey(path))


@patient
def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    fs, path = filesystem(uri)
    data = fs.cat_file(path)
    assert isinstance(data, bytes)
    return data


@patient
def read_beginning(uri: str, most_bytes: int) -> bytes:
    """Read the first bytes of a file, or all of a smaller one."""
    with opened(uri, 0) as file:
        return file.read(most_bytes)


@patient
def read_range(uri: str, start: int, stop: int) -> bytes:
    """Read the bytes of a file from start (inclusive) to stop (exclusive)."""
    fs, path = filesystem(uri)
    data = fs.cat_file(path, start=start, end=stop)
    assert isinstance(data, bytes)
    return data


@patient
def fetch_file(uri: str, path: Path) -> None:
    """Copy a file to a local path without holding it in memory."""
    fs, source = filesystem(uri)
    fs.get_file(source, str(path))


@contextmanager
def opened(uri: str, block_bytes: int) -> Iterator[IO[bytes]]:
    """Open a file to read parts of it.

    Args:
        uri: The file.
        block_bytes: Number of bytes that a request to a remote file fetches beyond what is read.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        with Path(path).open("rb") as file:
            yield file
        return
    with fs.open(path, "rb", cache_type="readahead", block_size=block_bytes) as file:
        yield cast("IO[bytes]", file)


@contextmanager
def as_local(uri: str) -> Iterator[Path]:
    """Provide a file as a local path: the file itself, or a temporary copy of a remote one."""
    if is_local(uri):
        yield Path(filesystem(uri)[1])
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / name_of(uri)
        fetch_file(uri, path)
        yield path


def check_output_file(uri: str) -> None:
    """Check that a file can have this URI, before the work whose result it holds.

    Raises:
        STGTError: The URI is a folder, or the name of a folder above it is a file's.
    """
    if not is_local(uri):
        return
    target = Path(filesystem(uri)[1])
    if target.is_dir():
        raise STGTError(
            f"{target} is a folder, but a file must be written there; give the name of a file"
        )
    _check_folder(target.parent)


def _check_folder(folder: Path) -> None:
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise STGTError(
                f"{place} is a file, but a folder is needed there; choose another output or move "
                "the file"
            )


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it.

    Raises:
        STGTError: One of them exists as a file.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(uri: str) -> Iterator[Path]:
    """Provide a local path to write to; on success the complete file appears at its URI.

    Raises:
        STGTError: The URI is a folder, or its folder cannot be made since its name is a file's.
    """
    if not is_local(uri):
        with TemporaryDirectory() as folder:
            path = Path(folder) / name_of(uri)
            yield path
            _upload(path, uri)
        return
    target = Path(filesystem(uri)[1])
    check_output_file(uri)
    _make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@patient
def digest(uri: str) -> str:
    """Return the hexadecimal SHA-256 of a file without holding it in memory."""
    fs, path = filesystem(uri)
    found = hashlib.sha256()
    with fs.open(path, "rb", cache_type="readahead", block_size=HASH_CHUNK_BYTES) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            found.update(chunk)  # type: ignore[arg-type]
    return found.hexdigest()


def digest_of(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


@patient
def _send(uri: str, data: bytes) -> None:
    fs, path = filesystem(uri)
    fs.pipe_file(path, data)  # an S3 object appears only when its upload is complete


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: to a temporary name first, so that readers never see part of it."""
    if not is_local(uri):
        _send(uri, data)
        return
    with writing(uri) as temporary:
        temporary.write_bytes(data)


@patient
def _upload(path: Path, uri: str) -> None:
    fs, target = filesystem(uri)
    fs.put_file(str(path), target)  # an S3 object appears only when its upload is complete


def put_file(path: Path, uri: str) -> None:
    """Copy a local file to a URI atomically."""
    if not is_local(uri):
        _upload(path, uri)
        return
    with writing(uri) as temporary:
        shutil.copyfile(path, temporary)


def move_file(path: Path, uri: str) -> None:
    """Move a local file to a URI atomically. Within one file system, its bytes are not copied."""
    if not is_local(uri):
        _upload(path, uri)
        path.unlink()
        return
    target = Path(filesystem(uri)[1])
    with path.open("rb") as file:
        os.fsync(file.fileno())
    try:
        path.replace(target)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        check_output_file(uri)
        _make_folder(target.parent)
        path.replace(target)


def read_json(uri: str) -> Any:
    """Read a JSON file.

    Raises:
        STGTError: The file is not valid JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise STGTError(
            f"{uri} is damaged ({error}); delete it and run the same command again to recreate it"
        ) from error


def read_jsons(uri: str, names: Sequence[str]) -> list[Any]:
    """Read several JSON files of a folder, from S3 concurrently."""
    if is_local(uri) or not names:
        return [read_json(join(uri, name)) for name in names]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name: read_json(join(uri, name)), names))


def write_json(uri: str, values: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(uri, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


@patient
def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        # With pre-buffering, an Arrow thread may still run at exit, which aborts the process.
        return pq.read_table(file, columns=columns, pre_buffer=False)


@patient
def read_rows(uri: str, rows: Sequence[int], columns: list[str]) -> list[dict[str, Any]]:
    """Read some rows of a Parquet file, in ascending order, from only their row groups."""
    fs, path = filesystem(uri)
    found = []
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            inside = [row - first for row in sorted(rows) if first <= row < first + count]
            if inside:
                table = parquet.read_row_group(group, columns=columns)
                found += table.take(inside).to_pylist()
            first += count
    return found


def encode_table(table: pa.Table, row_group_rows: int | None = None) -> bytes:
    """Encode a table as a Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows)
    return sink.getvalue().to_pybytes()


def write_table(uri: str, table: pa.Table, row_group_rows: int | None = None) -> bytes:
    """Write a Parquet file atomically and return its bytes."""
    data = encode_table(table, row_group_rows)
    write_bytes(uri, data)
    return data


def upload_folder(folder: Path, uri: str, marker: str) -> None:
    """Copy a local folder's files to a URI and write `marker` last, which marks it as complete."""
    write_names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if marker in write_names:
        raise ValueError(f"{folder} already contains {marker}")
    for name in write_names:
        put_file(folder / name, join(uri, name))
    write_bytes(join(uri, marker), b"")


def download_folder(uri: str, folder: Path) -> Path:
    """Return a local folder with the files of a URI: the URI itself if it is local, else a copy."""
    if is_local(uri):
        return Path(filesystem(uri)[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in list_names(uri):
        fetch_file(join(uri, name), folder / name)
    return folder


@patient
def remove(uri: str) -> None:
    """Delete a file or a folder with its contents; do nothing if it does not exist.

    A local folder is renamed to a hidden name first, so that an interrupted deletion never leaves
    a folder with only some of its files.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        local = Path(path)
        if local.is_dir():
            shutil.rmtree(local.rename(local.with_name(f".{local.name}.{uuid.uuid4().hex}{GONE}")))
        else:
            local.unlink(missing_ok=True)
    elif fs.exists(path) and _GLOB.search(path):
        # `rm` takes such a path as a pattern, and would delete other files as well.
        for name in fs.find(path):
            fs.rm_file(name)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def free_bytes(uri: str) -> int | None:
    """Return the free disk space at a local URI, which need not exist yet; None if it is remote."""
    if not is_local(uri):
        return None
    path = Path(filesystem(uri)[1])
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def lock(uri: str) -> Iterator[None]:
    """Lock a local folder against other processes; remote folders are not locked.

    Raises:
        STGTError: Another process has locked the folder, or its name is a file's.
    """
    if not is_local(uri):
        yield
        return
    folder = Path(filesystem(uri)[1])
    _make_folder(folder)
    holder = FileLock(folder / ".lock")
    try:
        holder.acquire(timeout=0)
    except Timeout as error:
        raise STGTError(
            f"another run is using {folder}; wait for it to finish, or choose another folder"
        ) from error
    try:
        yield
    finally:
        holder.release()
