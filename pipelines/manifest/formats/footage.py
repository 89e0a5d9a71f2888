"""Rules for files that are found rather than named: those in a folder, and members of archives.

A file is recognized as a video by its extension or, if that is unknown, by its first bytes. A
clip's id is the path of its file without the extension. What video2dataset writes beside a video
describes it: a text file with its caption, and a JSON file with an object that may have `caption`,
`status` and anything else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pipelines.artifacts import tar_samples
from pipelines.manifest.formats import json_files, media, reading, video2dataset
from pipelines.manifest.formats.files import IMAGE_EXTENSIONS, OTHER_EXTENSIONS, VIDEO_EXTENSIONS
from pipelines.manifest.formats.opening import Unreadable

Kind = Literal["video", "picture", "incomplete", "preview", "archive", "other", "unknown"]

SIDECARS = ("txt", "json")
MOST_SIDECAR_BYTES = 8 * 1024**2
"""Largest file beside a video that is read as its description; see `read_description`."""
PROBED_BYTES = 1024
BEGINNINGS = (
    *(signature for signature, _ in media.SIGNATURES),
    re.compile(rb"\A\x00\x00\x01[\xb3\xba]"),  # MPEG elementary and program streams
    re.compile(rb"\A(\x47.{187}){4}", re.DOTALL),  # MPEG transport streams
    re.compile(rb"\A.{4}(\x47.{191}){4}", re.DOTALL),  # the same as AVCHD cameras write it
    re.compile(rb"\A\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # ASF and WMV
    re.compile(rb"\A\.RMF"),
    re.compile(rb"\AOggS.{24}.\x80theora", re.DOTALL),
)
"""First bytes of containers of video, for files with an unknown extension or none."""
PREVIEWS = frozenset({"lrv", "lrf", "thm"})
"""Extensions of small copies that cameras write beside their videos."""
ARCHIVES = frozenset({"tar", "tgz", "tbz2", "txz", "gz", "bz2", "xz", "zst", "zip", "7z", "rar"})
CONTROL_FILES = ("aria2", "ytdl", "part", "crdownload")
"""Extensions that downloaders append to the name of a file that is not complete."""
_INCOMPLETE = re.compile(r"(?i)\.(part|part-frag\d+|crdownload|partial|download|tmp|!qb)\Z")

SAID: dict[Kind, str] = {
    "picture": "it is a picture; name it in a table (--format generic) to use it",
    "incomplete": "it is a download that is not complete; finish it or remove the file",
    "archive": "it is an archive; read .tar files with --format webdataset, and extract others",
    "preview": "it is a small copy that a camera writes beside its video",
    "unknown": "its extension is unknown, and its first bytes are not those of a video",
}
"""Why a file of each kind is not used."""


def extension(path: str) -> str:
    """Return the extension of a file in lower case; empty if it has none."""
    return path.rpartition(".")[2].lower() if stem(path) else ""


def stem(path: str) -> str:
    """Return a path without its extension; empty if the file has no extension."""
    folder, slash, name = path.rpartition("/")
    own, dot, _ = name.rpartition(".")
    return f"{folder}{slash}{own}" if dot and own else ""


def kind_of(path: str, beginning: Callable[[], bytes]) -> Kind:
    """Return what a file is.

    Args:
        path: its path.
        beginning: reads its first bytes, if its extension is unknown.
    """
    if _INCOMPLETE.search(path):
        return "incomplete"
    ending = extension(path)
    for extensions, kind in KINDS:
        if ending in extensions:
            return kind
    data = beginning()
    return "video" if any(known.match(data) for known in BEGINNINGS) else "unknown"


KINDS: tuple[tuple[frozenset[str], Kind], ...] = (
    (VIDEO_EXTENSIONS, "video"),
    (IMAGE_EXTENSIONS, "picture"),
    (ARCHIVES, "archive"),
    (OTHER_EXTENSIONS, "other"),
    (PREVIEWS, "preview"),
)


def clip_ids(paths: Sequence[str]) -> list[str]:
    """Return the id of each video: its path without the extension.

    Where several videos would have one id, such as `a.mp4` and `a.mkv`, all of them keep their
    extension. Ids differ if only the case of their letters does.
    """
    ids = [stem(path) or path for path in paths]
    while repeated := {name for name, count in Counter(ids).items() if count > 1}:
        whole = [path if own in repeated else own for path, own in zip(paths, ids, strict=True)]
        if whole == ids:
            break  # one path was given twice
        ids = whole
    return ids


def read_description(ending: str, beginning: Callable[[int], bytes]) -> bytes:
    """Read a file beside a video as far as `described` needs it.

    JSON in which `jobs.export` lists the clips of the video may be larger than other files.

    Args:
        ending: extension of the file, from `SIDECARS`.
        beginning: reads the file up to a number of bytes.
    """
    data = beginning(MOST_SIDECAR_BYTES + 1)
    if len(data) > MOST_SIDECAR_BYTES and _most_bytes(ending, data) > MOST_SIDECAR_BYTES:
        data = beginning(tar_samples.MOST_BYTES + 1)
    return data


def _most_bytes(ending: str, data: bytes) -> int:
    lists_clips = ending == "json" and f'"{tar_samples.CLIPS}"'.encode() in data
    return tar_samples.MOST_BYTES if lists_clips else MOST_SIDECAR_BYTES


def described(
    name: str, text: bytes | Unreadable | None, data: bytes | Unreadable | None
) -> tuple[list[str], dict[str, Any]]:
    """Return the captions and the extras of a video from the files beside it.

    Args:
        name: path of these files without their extension, for messages.
        text: contents of the text file, or why they cannot be read, if there is one.
        data: contents of the JSON file, or why they cannot be read, if there is one.

    Raises:
        ValueError: The video was not downloaded, or a file beside it cannot be read.
    """
    captions: list[str] = []
    extras: dict[str, Any] = {}
    if data is not None:
        text_of_json = _decoded(f"{name}.json", data)
        try:
            row = json_files.decode(text_of_json)
        except ValueError as error:
            raise ValueError(f"{name}.json is not valid: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name}.json does not contain an object; rename or remove it")
        captions, extras = video2dataset.described(row)
    if not captions and text is not None:
        captions = reading.caption_list(_decoded(f"{name}.txt", text))
    return captions, extras


def _decoded(name: str, data: bytes | Unreadable) -> str:
    if isinstance(data, Unreadable):
        raise ValueError(f"{name} {data.reason}")  # noqa: TRY004
    most_bytes = _most_bytes(extension(name), data)
    if len(data) > most_bytes:
        raise ValueError(f"{name} has more than {most_bytes:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text; convert it") from error
