"""Augmentation and normalization of clips of uint8 frames.

Legend: B clips, T frames, H and W pixels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2

from stgt.config import AugmentConfig
from stgt.inputs.rand_augment import rand_augment
from stgt.interface.inputs import CLIP_MEAN, CLIP_STD


def augment_clip(
    frames: npt.NDArray[np.uint8], config: AugmentConfig, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Augment a clip with a random resized crop, a flip and RandAugment, the same for all frames.

    Args:
        frames: [T, H, W, 3] uint8.
        config: Augmentation settings.
        generator: Random generator; the same state gives the same clip.

    Returns:
        [T, H, W, 3] uint8.
    """
    _, height, width, _ = frames.shape
    # [T, H, W, 3] -> [T, 3, H, W] and back
    clip = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2)
    if config.crop_scale_min < 1:
        scale = generator.uniform(config.crop_scale_min, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_height = min(height, max(1, round(height * np.sqrt(scale / ratio))))
        crop_width = min(width, max(1, round(width * np.sqrt(scale * ratio))))
        top = int(generator.integers(0, height - crop_height + 1))
        left = int(generator.integers(0, width - crop_width + 1))
        clip = v2.functional.resized_crop(
            clip,
            *(top, left, crop_height, crop_width),
            [height, width],
            v2.InterpolationMode.BICUBIC,
            antialias=True,
        )
    if config.flip and generator.random() < 0.5:
        clip = clip.flip(3)
    clip = rand_augment(clip, config.num_ops, config.magnitude, generator)
    return np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy())


def normalize_frames(
    frames: torch.Tensor,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> torch.Tensor:
    """Normalize [B, T, H, W, 3] uint8 to [B, T, 3, H, W] float32; by default as CLIP does."""
    width = frames.shape[3]
    # A row of pixels is flattened to one dimension: with the three channels innermost, each inner
    # loop had three numbers, and this took 6 % of a training step of the tiny model.
    center = torch.tensor(mean, device=frames.device).repeat(width)
    scale = torch.tensor(std, device=frames.device).repeat(width)
    rows = frames.flatten(3).to(torch.float32, copy=True).div_(255).sub_(center).div_(scale)
    return rows.unflatten(3, (width, 3)).permute(0, 1, 4, 2, 3)
