"""Writes a dataset of generated videos with WebVid-style annotations."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from pipelines.common import storage
from pipelines.common.ray_errors import errors_as_rows
from pipelines.video.synthetic.render import damage, encode_h264, render
from pipelines.video.synthetic.scenes import (
    DAMAGED_AT,
    DAMAGED_EVERY,
    FPS,
    NUM_FRAMES,
    Scene,
    choose_scenes,
    vocabulary,
)

SPLITS = ("train", "val")

VIDEOS_PER_FOLDER = 500

VIDEOS_PER_BLOCK = 64

BACKWARDS = "_backwards"
"""End of the id of a video that plays another one backwards."""

CSV_COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")


def webvid_csv(video_ids: list[str], page_dirs: list[str], captions: list[str]) -> str:
    """Return a WebVid-style CSV of videos and their captions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    seconds = NUM_FRAMES // FPS
    for video_id, page_dir, caption in zip(video_ids, page_dirs, captions, strict=True):
        url = f"https://videos.example.org/{page_dir}/{video_id}.mp4"
        writer.writerow([video_id, url, f"PT00H00M{seconds:02d}S", page_dir, caption])
    return out.getvalue()


@dataclass(frozen=True)
class Video:
    """A video to write."""

    video_id: str
    page_dir: str
    scene: Scene
    seed: tuple[int, int]
    damaged: int | None
    """Number that selects the kind of damage, as in `damage`; None for an intact video."""
    plays_backwards: bool = False
    """Whether the frames are those of `scene.backwards()`, in reverse order."""


def plan_videos(num_train: int, num_val: int, seed: int) -> dict[str, list[Video]]:
    """Plan all videos of both splits; approximately one in a hundred will be damaged."""
    train, val = choose_scenes(num_train, num_val, seed)
    videos: dict[str, list[Video]] = {}
    number = 0
    for split, scenes in zip(SPLITS, (train, val), strict=True):
        videos[split] = []
        for index, scene in enumerate(scenes):
            first = index - index % VIDEOS_PER_FOLDER
            videos[split].append(
                Video(
                    video_id=f"{1_000_000 + number}",
                    page_dir=f"{split}_{first:06d}_{first + VIDEOS_PER_FOLDER - 1:06d}",
                    scene=scene,
                    seed=(seed, number),
                    damaged=index // DAMAGED_EVERY if index % DAMAGED_EVERY == DAMAGED_AT else None,
                )
            )
            number += 1
    return videos


def with_reversals(videos: Iterable[Video]) -> list[Video]:
    """Return intact videos, each followed by the same video played backwards.

    All scenes of the result are different. A video is left out if its scene looks the same
    backwards, such as "moves left and then moves right", or occurs already.
    """
    found: list[Video] = []
    scenes: set[Scene] = set()
    for video in videos:
        pair = {video.scene, video.scene.backwards()}
        if video.damaged is not None or len(pair) < 2 or pair & scenes:
            continue
        scenes |= pair
        backwards = replace(
            video,
            video_id=f"{video.video_id}{BACKWARDS}",
            scene=video.scene.backwards(),
            plays_backwards=True,
        )
        found += [video, backwards]
    return found


@errors_as_rows
def write_videos(
    block: dict[str, np.ndarray], folder: str, videos: list[Video]
) -> dict[str, np.ndarray]:
    """Render and encode the videos of a block that do not exist yet (a Ray Data task)."""
    for index in block["id"]:
        video = videos[int(index)]
        uri = storage.join(folder, video.page_dir, f"{video.video_id}.mp4")
        if storage.exists(uri):
            continue
        scene = video.scene.backwards() if video.plays_backwards else video.scene
        frames = render(scene, np.random.default_rng(video.seed))
        if video.plays_backwards:
            frames = frames[::-1]
        data = encode_h264(frames)
        if video.damaged is not None:
            data = damage(data, video.damaged)
        storage.write_bytes(uri, data)
    return {"count": np.array([len(block["id"])])}


def annotate_videos(uri: str, videos: list[Video]) -> None:
    """Write a WebVid-style CSV of videos and their captions."""
    text = webvid_csv(
        [video.video_id for video in videos],
        [video.page_dir for video in videos],
        [video.scene.caption() for video in videos],
    )
    storage.write_bytes(uri, text.encode())


def write_vocabulary(uri: str) -> None:
    """Write the vocabulary of the captions, one entry per line."""
    storage.write_bytes(uri, ("\n".join(vocabulary()) + "\n").encode())


def write_split(folder: str, split: str, videos: list[Video]) -> str:
    """Write videos and annotations of a small split in this process.

    Args:
        folder: Output folder; videos are written to `FOLDER/videos`.
        split: Name of the split.
        videos: What to write.

    Returns:
        The annotation file, `FOLDER/results_SPLIT.csv`.
    """
    write_videos({"id": np.arange(len(videos))}, storage.join(folder, "videos"), videos)
    annotations = storage.join(folder, f"results_{split}.csv")
    annotate_videos(annotations, videos)
    return annotations
