"""Short videos of moving coloured shapes with captions, laid out like WebVid.

A clip shows one shape on a plain background that does two things one after the other ("moves left
and then grows"). Clips come in twins that differ only in the order of the events or the direction
of one, so that a model which ignores time cannot tell them apart. A few files are damaged on
purpose.
"""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt

from pipelines import storage
from pipelines.faults import contained

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "gray": (120, 120, 120),
    "brown": (105, 65, 30),
    "teal": (0, 100, 100),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOVES = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}
SCALES = {"grows": 1.6, "shrinks": 0.5}
EVENTS = (*MOVES, *SCALES)
OPPOSITE = {
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
    "grows": "shrinks",
    "shrinks": "grows",
}

SIZE = 96
"""Edge of the video in pixels."""
NUM_FRAMES = 24
FPS = 12
RADIUS = 0.19
"""Radius of the shape when a clip begins, as a share of the frame."""
STRIDE = 0.34
"""How far a move goes, as a share of the frame."""

SPLITS = ("train", "val")
VIDEOS_PER_FOLDER = 500
VIDEOS_PER_BLOCK = 64
DAMAGED_EVERY, DAMAGED_AT = 100, 37

CSV_COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")


@dataclass(frozen=True)
class Scene:
    """What one clip shows."""

    colour: str
    shape: str
    background: str
    events: tuple[str, str]

    def caption(self) -> str:
        """The sentence that describes the clip."""
        first, second = self.events
        return (
            f"a {self.colour} {self.shape} {first} and then {second} "
            f"on a {self.background} background"
        )

    def twin(self) -> Scene:
        """The same scene with its events in the other order, or its first direction reversed."""
        first, second = self.events
        if EVENTS.index(first) < EVENTS.index(second):
            return Scene(self.colour, self.shape, self.background, (second, first))
        other = OPPOSITE[first] if OPPOSITE[first] != second else first
        return Scene(self.colour, self.shape, self.background, (other, second))


def all_scenes() -> list[Scene]:
    """Every scene there is, in a fixed order."""
    return [
        Scene(colour, shape, background, (first, second))
        for colour, shape, background, first, second in itertools.product(
            COLOURS, SHAPES, BACKGROUNDS, EVENTS, EVENTS
        )
        if first != second
    ]


def vocabulary() -> list[str]:
    """Entries of a WordPiece vocabulary that covers the captions, letters included."""
    words = sorted({word for scene in all_scenes() for word in scene.caption().split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    entries += [letter for letter in letters if letter not in words]
    return entries + [f"##{letter}" for letter in letters]


def choose_scenes(num_train: int, num_val: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Scenes of the training and the validation clips.

    Validation scenes are distinct, come in twins, and none of them is a training scene. Training
    scenes are distinct as long as there are enough of them.
    """
    scenes = all_scenes()
    generator = np.random.default_rng(seed)
    shuffled = [scenes[i] for i in generator.permutation(len(scenes))]
    val: list[Scene] = []
    for scene in shuffled:
        if len(val) >= num_val:
            break
        for candidate in (scene, scene.twin()):
            if candidate not in val and len(val) < num_val:
                val.append(candidate)
    held_out = set(val)
    rest = [scene for scene in shuffled if scene not in held_out]
    train = [rest[i % len(rest)] for i in range(num_train)]
    return train, val


def _shape_mask(
    shape: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], radius: float
) -> npt.NDArray[np.float64]:
    """Coverage in [0, 1] of a shape around the origin; one pixel of soft edge."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    elif shape == "triangle":
        # Point up: inside the two slanted edges, above the base.
        distance = np.maximum(0.894 * np.abs(x) - 0.447 * y - 0.447 * radius, y - 0.8 * radius)
    else:
        arm = 0.35 * radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        lying = np.maximum(np.abs(y) - arm, np.abs(x) - radius)
        distance = np.minimum(upright, lying)
    return np.clip(0.5 - distance * SIZE, 0.0, 1.0)


def render(scene: Scene, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to show.
        generator: varies start, size, speed, shade and noise from clip to clip.

    Returns:
        [NUM_FRAMES, SIZE, SIZE, 3] uint8.
    """
    stride = STRIDE * generator.uniform(0.85, 1.1)
    radius = RADIUS * generator.uniform(0.85, 1.15)
    # Start where the shape stays in the picture at every turning point of its path.
    steps = [np.array(MOVES.get(event, (0.0, 0.0))) * stride for event in scene.events]
    path = np.cumsum([np.zeros(2), *steps], axis=0)
    margin = radius * max(1.0, *(SCALES.get(event, 1.0) for event in scene.events))
    extent = path.max(axis=0) - path.min(axis=0)
    margin = np.minimum(margin, (1 - extent) / 2)  # a long way with a large shape: touch the edge
    start = generator.uniform(margin - path.min(axis=0), 1 - margin - path.max(axis=0) + 1e-9)
    background = np.array(BACKGROUNDS[scene.background]) + generator.uniform(-12, 12)
    colour = np.array(COLOURS[scene.colour]) + generator.uniform(-15, 15, size=3)

    texture = generator.normal(0, 3, size=(SIZE, SIZE, 1))
    axis = (np.arange(SIZE) + 0.5) / SIZE
    grid_x, grid_y = np.meshgrid(axis, axis)
    frames = np.empty((NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for index in range(NUM_FRAMES):
        # 0..2: the first event runs from 0 to 1, the second from 1 to 2
        progress = 2.0 * index / (NUM_FRAMES - 1)
        centre, scale = start.copy(), 1.0
        for order, event in enumerate(scene.events):
            done = np.clip(progress - order, 0.0, 1.0)
            if event in MOVES:
                centre += np.array(MOVES[event]) * stride * done
            else:
                scale *= SCALES[event] ** done
        mask = _shape_mask(scene.shape, grid_x - centre[0], grid_y - centre[1], radius * scale)
        image = background + mask[..., None] * (colour - background)
        frames[index] = np.clip(image + texture, 0, 255)
    return frames


def encode_h264(frames: npt.NDArray[np.uint8], fps: int = FPS) -> bytes:
    """Encode [T, H, W, 3] uint8 frames as an H.264 mp4 file."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "24", "threads": "1"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def damage(video: bytes, index: int) -> bytes:
    """Spoil a file in one of the ways found in the wild: empty, an error page, cut short."""
    kind = index % 3
    if kind == 0:
        return b""
    if kind == 1:
        return b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"
    return video[: len(video) // 3]


def webvid_csv(video_ids: list[str], page_dirs: list[str], captions: list[str]) -> str:
    """A WebVid-style CSV of videos and their captions."""
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
    """One video to write."""

    video_id: str
    page_dir: str
    scene: Scene
    seed: tuple[int, int]
    damaged: int | None
    """Which kind of damage, or None."""


def plan_videos(num_train: int, num_val: int, seed: int) -> dict[str, list[Video]]:
    """Every video of both splits; about one in a hundred is to be damaged."""
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


@contained
def write_videos(
    block: dict[str, np.ndarray], folder: str, videos: list[Video]
) -> dict[str, np.ndarray]:
    """Render and encode the videos of a block that are not there yet (a Ray Data task)."""
    for index in block["id"]:
        video = videos[int(index)]
        uri = storage.join(folder, video.page_dir, f"{video.video_id}.mp4")
        if storage.exists(uri):
            continue
        frames = render(video.scene, np.random.default_rng(video.seed))
        data = encode_h264(frames)
        if video.damaged is not None:
            data = damage(data, video.damaged)
        storage.write_bytes(uri, data)
    return {"count": np.array([len(block["id"])])}
