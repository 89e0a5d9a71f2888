"""Writes videos that are stored in annotations to files, under the hash of their contents."""

from __future__ import annotations

import re

from pipelines.common import storage

DEFAULT_EXTENSION = "mp4"
SIGNATURES = (
    (re.compile(rb"\A.{4}ftyp", re.DOTALL), "mp4"),
    (re.compile(rb"\A\x1aE\xdf\xa3"), "mkv"),
    (re.compile(rb"\ARIFF.{4}AVI ", re.DOTALL), "avi"),
    (re.compile(rb"\AFLV"), "flv"),
    (re.compile(rb"\AGIF8"), "gif"),
)
"""First bytes of common containers, for videos without a name."""
SIGNATURE_BYTES = 16
FOLDER_CHARACTERS = 2
_EXTENSION = re.compile(r"[A-Za-z0-9]{1,8}")


class BytesWriter:
    """Writes videos to `FOLDER/ab/abcdef....mp4`; a video that is there already is not written.

    A file appears only when it is complete, so an interrupted run leaves nothing to clean up, and
    the same annotations always give the same files.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._written: set[str] = set()

    def name_of(self, data: bytes, path: str | None) -> str:
        """Return the name of a video: the hash of its contents, with its extension."""
        ending = (path or "").rpartition(".")[2] if "." in (path or "") else ""
        if not _EXTENSION.fullmatch(ending):
            start = data[:SIGNATURE_BYTES]
            known = (kind for signature, kind in SIGNATURES if signature.match(start))
            ending = next(known, DEFAULT_EXTENSION)
        return f"{storage.digest_of(data)}.{ending.lower()}"

    def write(self, data: bytes, name: str) -> str:
        """Write a video under its name, unless it is there, and return its URI."""
        uri = storage.join(self._folder, name[:FOLDER_CHARACTERS], name)
        if name not in self._written:
            if not storage.exists(uri):
                storage.write_bytes(uri, data)
            self._written.add(name)
        return uri
