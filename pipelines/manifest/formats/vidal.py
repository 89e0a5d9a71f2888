"""Reads VIDAL-10M: a JSON object of several gigabytes that maps ids to folders and captions.

A video is expected at <videos>/<folder>_resize256_skip15/<id>.mp4 (folders that start with "new_"
share new_download_resize256_skip15), or at <videos>/<folder>/<id>.mp4.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from pipelines.common import storage
from pipelines.manifest.formats import json_files, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

NUM_OFA = 8
KINDS = ("raw", "mplug", "polish_mplug", "sound_mplug", *(f"ofa{i}" for i in range(NUM_OFA)), "mix")
DEFAULT_KIND = "polish_mplug"
MIX = {"raw": 0.2, "mplug": 0.2, "polish_mplug": 0.2, "sound_mplug": 0.2} | {
    f"ofa{i}": 0.025 for i in range(NUM_OFA)
}
"""Probability of each kind in "mix", as in the published reader; chosen by a hash of the id."""
RESIZED = "_resize256_skip15"
NEW_FOLDER = "new_download"
NOISE = frozenset(
    [
        *("short", "shorts", "shortsvideo", "youtubeshorts", "ytshorts"),
        *("viral", "viralvideo", "viralshorts", "trending", "tiktok", "tiktokvideo"),
        *("reel", "reels", "fyp", "foryou", "foryoupage", "subscribe", "like", "share"),
    ]
)
"""Words in titles that do not describe the video."""
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip or a rejected row for each entry, reading the file as a stream.

    Raises:
        ManifestError: A file is missing or not a JSON object, or the kind of caption is unknown.
    """
    kind = source.caption or DEFAULT_KIND
    if kind not in KINDS:
        raise ManifestError(f"caption = {kind!r}: must be one of {', '.join(KINDS)}")
    files, folders = source.finder(".mp4"), _Folders(source.videos[0])
    for file in source.annotations:
        for number, (video_id, entry) in enumerate(json_files.json_object(file), start=1):
            if reason := reading.require(entry, ("folder",), ("folder",)):
                yield BadRow(file=file, row=number, reason=f"{video_id}: {reason}")
                continue
            captions = reading.caption_list(_caption(entry, kind, video_id))
            if not captions:
                yield BadRow(file=file, row=number, reason=f"{video_id}: {reading.EMPTY}")
                continue
            yield ClipRow(
                clip_id=video_id,
                video_id=video_id,
                video_uri=files.of_id(video_id, folders=folders.of(str(entry["folder"]))),
                captions=captions,
                split=str(entry.get("split") or source.split or "train"),
                source="vidal",
                extras={"caption": kind},
            )


def clean_title(title: str) -> str:
    """Clean a title: hashtags become words, lower case, ASCII only, without the `NOISE` words."""
    text = title.lower().replace("#", " ").encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9' ]+", " ", text).split()
    return " ".join(word for word in words if word not in NOISE)


def _caption(entry: dict[str, Any], kind: str, video_id: str) -> str:
    if kind == "mix":
        kind = _drawn(video_id)
    if kind.startswith("ofa"):
        captions = entry.get("ofa") or []
        index = int(kind.removeprefix("ofa"))
        return captions[index] if isinstance(captions, list) and index < len(captions) else ""
    text = reading.decode_entities(str(entry.get(kind) or ""))
    return clean_title(text) if kind == "raw" else text


def _drawn(video_id: str) -> str:
    digest = hashlib.blake2b(video_id.encode(), digest_size=8, person=b"vidal-mix").digest()
    place = int.from_bytes(digest, "big") / 2**64
    for kind, share in MIX.items():
        place -= share
        if place < 0:
            return kind
    return next(reversed(MIX))


class _Folders:
    """Gives the two possible names of each folder, with one lookup per folder."""

    def __init__(self, videos: str) -> None:
        self._videos = videos
        self._known: dict[str, list[str]] = {}

    def of(self, folder: str) -> list[str]:
        """Return the names of a folder; the one that exists is the first."""
        name = storage.name_of(folder)  # some copies of the file contain absolute paths
        if name not in self._known:
            resized = (NEW_FOLDER if name.startswith("new_") else name) + RESIZED
            is_first = storage.exists(storage.join(self._videos, resized)) or not storage.exists(
                storage.join(self._videos, name)
            )
            self._known[name] = [resized, name] if is_first else [name, resized]
        return self._known[name]
