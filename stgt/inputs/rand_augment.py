"""RandAugment for clips: the ten operations of the published recipe, the same for all frames.

Operations are drawn with replacement, and each is applied with probability 0.5. At magnitude m from
0 to 10, brightness and sharpness are scaled by 0.1 + 1.8 m / 10 (no change at the published
magnitude, 5), shear is 0.3 m / 10, translation is m pixels at a size of 224, and rotation is 3 m
degrees. Geometric operations go in either direction and fill uncovered pixels with gray.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchvision.transforms import v2

MAX_MAGNITUDE = 10
CHANCE = 0.5
GRAY = 128.0
SHEAR = 0.3
SHIFT = 10 / 224
TURN_DEGREES = 30.0
OPERATIONS = (
    *("Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
)


def rand_augment(
    clip: torch.Tensor, num_ops: int, magnitude: int, generator: np.random.Generator
) -> torch.Tensor:
    """Apply randomly drawn operations to a clip.

    Args:
        clip: [T, 3, H, W] uint8.
        num_ops: Number of operations to draw.
        magnitude: Magnitude of the operations, 0 to 10.
        generator: Random generator; the same state gives the same clip.

    Returns:
        [T, 3, H, W] uint8.
    """
    for operation in generator.choice(OPERATIONS, num_ops).tolist():
        if generator.random() < CHANCE:
            sign = 1 if generator.random() < 0.5 else -1
            clip = apply_operation(clip, operation, magnitude, sign)
    return clip


def apply_operation(clip: torch.Tensor, operation: str, magnitude: int, sign: int) -> torch.Tensor:
    """Apply one operation to all frames.

    Args:
        clip: [T, 3, H, W] uint8.
        operation: One of OPERATIONS.
        magnitude: 0 to 10.
        sign: 1 or -1, the direction of geometric operations.
    """
    level = magnitude / MAX_MAGNITUDE
    height, width = clip.shape[-2:]
    if operation == "Identity":
        return clip
    if operation == "AutoContrast":
        return v2.functional.autocontrast(clip)
    if operation == "Equalize":
        return v2.functional.equalize(clip)
    if operation == "Brightness":
        return v2.functional.adjust_brightness(clip, 0.1 + 1.8 * level)
    if operation == "Sharpness":
        return v2.functional.adjust_sharpness(clip, 0.1 + 1.8 * level)
    if operation == "Rotate":
        return _moved(clip, angle=sign * TURN_DEGREES * level)
    if operation in ("ShearX", "ShearY"):
        degrees = math.degrees(math.atan(sign * SHEAR * level))
        shear = [degrees, 0.0] if operation == "ShearX" else [0.0, degrees]
        return _moved(clip, shear=shear, center=[0.0, 0.0])
    if operation in ("TranslateX", "TranslateY"):
        along_x = operation == "TranslateX"
        shift = sign * round(SHIFT * (width if along_x else height) * level)
        return _moved(clip, translate=[shift, 0] if along_x else [0, shift])
    raise ValueError(f"operation {operation!r}: must be one of {', '.join(OPERATIONS)}")


def _moved(
    clip: torch.Tensor,
    angle: float = 0.0,
    translate: list[int] | None = None,
    shear: list[float] | None = None,
    center: list[float] | None = None,
) -> torch.Tensor:
    return v2.functional.affine(
        clip,
        angle=angle,
        translate=[float(shift) for shift in translate or (0, 0)],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=[GRAY] * 3,
        center=center,
    )
