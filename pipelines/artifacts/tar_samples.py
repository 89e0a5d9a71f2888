"""What a sample of a webdataset tar says about the clips of its video.

`jobs.export` writes it as KEY.json beside each video, and `jobs.manifest --format webdataset` reads
it back. Of the entries, `key`, `status` and `caption` are those of video2dataset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CLIPS = "manifest_clips"
"""Entry with the clips of the video, as rows of a manifest without the video's URI."""
MOST_BYTES = 256 * 1024**2
"""Largest JSON with clips that is written and read: those of the windows of many days of video."""
_KINDS: dict[str, tuple[type, ...]] = {
    "clip_id": (str,),
    "video_id": (str,),
    "start_s": (int, float, type(None)),
    "end_s": (int, float, type(None)),
    "captions": (list,),
    "split": (str,),
    "source": (str,),
    "extras": (dict,),
}


def sample_of_clips(key: str, clips: Sequence[Mapping[str, Any]], sha256: str) -> dict[str, Any]:
    """Return the JSON of a sample.

    Args:
        key: Key of the sample.
        clips: Rows of a manifest, all of one video.
        sha256: Checksum of the video file.
    """
    captions = clips[0]["captions"]
    return {
        "key": key,
        "status": "success",
        **({"caption": captions[0]} if captions else {}),
        "sha256": sha256,
        CLIPS: [
            {**{name: clip[name] for name in _KINDS}, "extras": json.loads(clip["extras"])}
            for clip in clips
        ],
    }


def clips_of_sample(listed: Any) -> list[dict[str, Any]]:
    """Return the clips under `CLIPS` in the JSON of a sample, after a check of their types.

    Raises:
        ValueError: An entry is not that of a clip.
    """
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{CLIPS} is not a list of clips")
    for place, clip in enumerate(listed):
        if not isinstance(clip, dict):
            raise ValueError(f"entry {place} of {CLIPS} is not an object")  # noqa: TRY004
        for name, kinds in _KINDS.items():
            value = clip.get(name)
            if type(value) not in kinds:
                raise ValueError(f"entry {place} of {CLIPS} has no valid {name}")
        if not clip["clip_id"] or not all(isinstance(text, str) for text in clip["captions"]):
            raise ValueError(f"entry {place} of {CLIPS} has no valid id or captions")
    return [{name: clip[name] for name in _KINDS} for clip in listed]
