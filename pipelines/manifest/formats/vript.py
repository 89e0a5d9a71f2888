"""Reads Vript captions: JSON files of one video each, or JSON lines; a zip of them is read as well.

An object has `meta` and `data`, which maps the ids of scenes to their captions. In JSON lines, an
object may be a single scene. The caption proper is the field `content` of a caption. A clip is the
file whose stem is its id, expected at <videos>/<video id>/<clip id>.mp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.manifest.formats import json_files, opening, reading, tables
from pipelines.manifest.formats.files import VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

CAPTION = "content"
SCENE = "-Scene-"
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip or a rejected row for each scene.

    Raises:
        ManifestError: A file is missing or not JSON.
    """
    files = source.finder(".mp4")
    for file in source.annotations:
        for number, value in _objects(file):
            if reason := reading.require(value, ()):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            for scene in _scenes(value):
                reason = reading.require(scene, ("clip_id", "caption"), ("clip_id",))
                if reason is None:
                    try:
                        yield _clip(scene, source, files)
                        continue
                    except ValueError as error:
                        reason = f"{scene['clip_id']}: {error}"
                yield BadRow(file=file, row=number, reason=reason)


def _objects(file: str) -> Iterator[tuple[int, Any]]:
    if opening.extension(file) in tables.JSON_LINES:
        yield from json_files.json_lines(file)
    elif opening.first_character(file) == "[":
        yield from json_files.json_list(file)
    else:
        yield 1, json_files.json_value(file)


def _scenes(value: dict[str, Any]) -> Iterator[Any]:
    """Yield the scenes of an object, which may be a scene itself."""
    data = value.get("data", value)
    if isinstance(data, list):
        yield from data
    elif isinstance(data, dict) and "caption" not in data:
        for clip_id, scene in data.items():
            yield {"clip_id": clip_id, **scene} if isinstance(scene, dict) else scene
    else:
        yield data


def _clip(scene: dict[str, Any], source: AnnotationSource, files: VideoFinder) -> ClipRow:
    clip_id, caption = str(scene["clip_id"]), scene["caption"]
    parts = caption if isinstance(caption, dict) else {CAPTION: caption}
    captions = reading.caption_list(parts.get(CAPTION))
    if not captions:
        raise ValueError(reading.EMPTY)
    video_id = str(scene.get("video_id") or clip_id.rpartition(SCENE)[0] or clip_id)
    named = {name: value for name, value in parts.items() if name != CAPTION}
    others = {name: scene[name] for name in ("video_title", "voiceover") if scene.get(name)}
    return ClipRow(
        clip_id=clip_id,
        video_id=video_id,
        video_uri=files.of_id(clip_id, folders=[video_id]),
        captions=captions,
        split=source.split or "train",
        source="vript",
        extras={**named, **others},
    )
