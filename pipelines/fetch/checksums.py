"""Checksums of files: BLAKE3, or SHA-256 if that is asked for."""

from __future__ import annotations

import hashlib
from typing import Protocol

from blake3 import blake3

from pipelines.common import storage
from pipelines.fetch.config import ChecksumName

READ_BYTES = 1024**2


class Checksum(Protocol):
    """The checksum of bytes that are given one piece after another."""

    def update(self, data: bytes, /) -> object:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the checksum of all bytes so far, in hexadecimal digits."""
        ...


def new_checksum(name: ChecksumName) -> Checksum:
    """Return the checksum of no bytes."""
    return blake3() if name == "blake3" else hashlib.sha256()


@storage.patient
def checksum_of_file(uri: str, name: ChecksumName) -> str:
    """Return the checksum of a file, in hexadecimal digits, without holding it in memory."""
    checksum = new_checksum(name)
    with storage.opened(uri, storage.HASH_CHUNK_BYTES) as file:
        while chunk := file.read(READ_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest()
