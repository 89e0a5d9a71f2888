"""The data set card of an exported clip store: README.md with its header in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage
from pipelines.export.dataset_form import DATA, card_features

COLUMNS = {
    "clip_id, video_id": "The clip, and the video that it is taken from",
    "video_uri": "The file that the frames were decoded from; it is not part of this data set",
    "start_s, end_s": "The span of the video, in seconds; null for the whole video",
    "captions": "All captions of the clip",
    "split, source": "The split and the data set that the clip belongs to",
    "extras": "JSON with everything else in the annotations",
    "frames": "Frames of the clip, in order of time",
    "frame_indices": "Number of each frame in the video, counted from 0",
    "width, height, fps, duration_s, num_source_frames, source_bytes, codec": "The video file",
    "decoder, salvaged": "How it was decoded, and whether past damage",
    "video_hash": "Hash of the file, if it was computed",
}


@dataclass(frozen=True)
class SplitFigures:
    """Size of a split."""

    clips: int
    bytes: int


def card(store: ClipStore, splits: Mapping[str, SplitFigures]) -> str:
    """Return the text of a data set card.

    Args:
        store: The store that is exported.
        splits: Size of each split, by its name in the data set.
    """
    size_bytes = sum(figures.bytes for figures in splits.values())
    header: dict[str, Any] = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{DATA}/{name}-*"} for name in splits],
            }
        ],
        "dataset_info": {
            "features": card_features(),
            "splits": [
                {"name": name, "num_bytes": figures.bytes, "num_examples": figures.clips}
                for name, figures in splits.items()
            ],
            "download_size": size_bytes,
            "dataset_size": size_bytes,
        },
    }
    sampling = store.sampling
    rows = [f"| {names} | {meaning} |" for names, meaning in COLUMNS.items()]
    counts = [f"| {name} | {figures.clips:,} |" for name, figures in splits.items()]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            "",
            f"# Clip store {storage.name_of(store.uri)}",
            "",
            f"Frames of {store.num_clips:,} video clips with their captions: "
            f"{sampling.num_frames} frames of {sampling.size} x {sampling.size} pixels per clip. "
            "The licenses of the videos and of their annotations apply.",
            "",
            "| Split | Clips |",
            "|---|---|",
            *counts,
            "",
            "| Column | Meaning |",
            "|---|---|",
            *rows,
            "",
            "The folder `store` holds the settings of the clip store, its manifest and the clips "
            "that could not be used. With it, `python -m jobs.export --dataset FOLDER --output "
            "CLIPS` makes the clip store again.",
            "",
        ]
    )
