"""Searches what a pipeline leaves for secrets that a test planted."""

from __future__ import annotations

import base64
import gzip
import secrets
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq


def planted(label: str) -> str:
    """A secret that occurs nowhere else, with characters that URIs and shells have to quote."""
    return f"pl4nted-{label}-{secrets.token_hex(8)}+/{secrets.token_hex(4)}"


def forms_of(secret: str) -> set[bytes]:
    """How a secret may be written: as it is, quoted for a URI, in JSON, or in base64."""
    plain = secret.encode()
    found = {
        plain,
        urllib.parse.quote(secret, safe="").encode(),
        urllib.parse.quote_plus(secret).encode(),
        secret.replace("/", "\\/").encode(),
    }
    for before in range(3):  # what precedes it decides where groups of three bytes begin
        coded = base64.b64encode(b"\0" * before + plain)
        # The first and last characters depend on their neighbors.
        whole = coded[4 if before else 0 : len(coded) - 4]
        assert len(whole) > 12
        found.add(whole)
    return found


def contents(path: Path) -> Iterator[bytes]:
    """What a file holds; packed files are unpacked as well."""
    data = path.read_bytes()
    yield data
    if data[:4] == b"PAR1":
        for batch in pq.ParquetFile(path).iter_batches():
            yield repr(batch.to_pylist()).encode()
        yield repr(pq.read_metadata(path).metadata).encode()
    elif data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield archive.read(name)


def leaks_in(name: str, data: bytes, secrets_: Mapping[str, str]) -> list[str]:
    """Which secrets occur in some bytes: `NAME: SECRET`."""
    return [
        f"{name}: {label}"
        for label, secret in secrets_.items()
        if any(form in data for form in forms_of(secret))
    ]


def find_leaks(folder: Path, secrets_: Mapping[str, str]) -> tuple[list[str], int]:
    """Search all files below a folder.

    Returns:
        `PATH: SECRET` of each leak, and the number of files that were searched.
    """
    found, count = [], 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        count += 1
        for data in contents(path):
            found += leaks_in(str(path), data, secrets_)
        found += leaks_in(f"the name of {path}", str(path).encode(), secrets_)
    return list(dict.fromkeys(found)), count
