"""Scenes of the generated videos and their captions.

A clip shows a colored shape on a plain background that does two things in sequence ("moves left and
then grows"). Each clip has a twin that differs only in the order of the events or the direction of
one event, so a model that ignores time cannot distinguish them. A few files are damaged on purpose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

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
"""Edge length of the videos, in pixels."""

NUM_FRAMES = 24

FPS = 12

RADIUS = 0.19
"""Initial radius of a shape, as a fraction of the frame."""

STRIDE = 0.34
"""Distance of a move, as a fraction of the frame."""

DAMAGED_EVERY, DAMAGED_AT = 100, 37


@dataclass(frozen=True)
class Scene:
    """Contents of a clip."""

    colour: str
    shape: str
    background: str
    events: tuple[str, str]

    def caption(self) -> str:
        """Return the caption of the clip."""
        first, second = self.events
        return (
            f"a {self.colour} {self.shape} {first} and then {second} "
            f"on a {self.background} background"
        )

    def backwards(self) -> Scene:
        """Return the scene that the clip shows when it is played backwards."""
        first, second = self.events
        return Scene(self.colour, self.shape, self.background, (OPPOSITE[second], OPPOSITE[first]))

    def twin(self) -> Scene:
        """Return the scene with its events swapped, or with its first event reversed."""
        first, second = self.events
        if EVENTS.index(first) < EVENTS.index(second):
            return Scene(self.colour, self.shape, self.background, (second, first))
        other = OPPOSITE[first] if OPPOSITE[first] != second else first
        return Scene(self.colour, self.shape, self.background, (other, second))


def all_scenes() -> list[Scene]:
    """Return all possible scenes in a fixed order."""
    return [
        Scene(colour, shape, background, (first, second))
        for colour, shape, background, first, second in itertools.product(
            COLOURS, SHAPES, BACKGROUNDS, EVENTS, EVENTS
        )
        if first != second
    ]


def vocabulary() -> list[str]:
    """Return a WordPiece vocabulary with all words of the captions and all letters."""
    words = sorted({word for scene in all_scenes() for word in scene.caption().split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    entries += [letter for letter in letters if letter not in words]
    return entries + [f"##{letter}" for letter in letters]


def choose_scenes(num_train: int, num_val: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Choose the scenes of the training and validation clips.

    Validation scenes are distinct, come in pairs of twins, and do not occur in training. Training
    scenes repeat only if there are more training clips than remaining scenes.
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
