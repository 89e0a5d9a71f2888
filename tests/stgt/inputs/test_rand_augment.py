"""RandAugment changes all frames alike, reproducibly, and by the configured magnitude."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stgt.config import AugmentConfig
from stgt.inputs.rand_augment import OPERATIONS, apply_operation, rand_augment
from stgt.inputs.transforms import augment_clip


def one_frame(size: int = 56) -> torch.Tensor:
    """Return [1, 3, size, size] uint8, smooth enough to measure shifts."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(size, size)) * 200 + 20).to(torch.uint8)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_frames_of_a_clip_change_alike(operation: str) -> None:
    clip = one_frame().repeat(4, 1, 1, 1)
    changed = apply_operation(clip, operation, 7, 1)
    assert (changed == changed[:1]).all()
    assert changed.shape == clip.shape
    assert changed.dtype == torch.uint8
    assert (operation == "Identity") == bool((changed == clip).all())


@pytest.mark.parametrize("operation", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometry_goes_to_either_side_and_nowhere_at_magnitude_zero(operation: str) -> None:
    clip = one_frame()
    assert (apply_operation(clip, operation, 0, 1) == clip).all()
    right, left = (apply_operation(clip, operation, 5, sign) for sign in (1, -1))
    assert (right != left).any()


def test_a_shift_is_five_pixels_of_224_and_leaves_gray() -> None:
    clip = one_frame(224)
    moved = apply_operation(clip, "TranslateX", 5, 1)
    assert (moved[..., 5:] == clip[..., :-5]).all()
    assert (moved[..., :5] == 128).all()


def test_a_shear_moves_a_row_by_its_distance_from_the_top() -> None:
    clip = torch.zeros(1, 3, 101, 101, dtype=torch.uint8)
    clip[..., 50] = 255
    moved = apply_operation(clip, "ShearX", 5, 1)[0, 0]
    places = moved[:, 20:].argmax(dim=1)  # the line, away from the gray fill
    assert abs(int(places[80]) - int(places[10])) == pytest.approx(0.15 * 70, abs=1)


def test_brightness_at_half_magnitude_is_left_alone() -> None:
    clip = one_frame()
    assert (apply_operation(clip, "Brightness", 5, 1).int() - clip.int()).abs().max() <= 1
    assert (apply_operation(clip, "Brightness", 0, 1) <= clip // 10 + 1).all()


def test_chance_depends_on_the_generator_alone() -> None:
    clip = one_frame()
    results = [rand_augment(clip, 2, 5, np.random.default_rng(seed)) for seed in (1, 1, *range(30))]
    assert (results[0] == results[1]).all()
    untouched = sum(bool((result == clip).all()) for result in results[2:])
    assert 3 <= untouched <= 22  # a quarter, plus clips whose drawn operations change nothing


def test_an_unknown_operation_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="'Solarize': must be one of Identity, AutoContrast"):
        apply_operation(one_frame(), "Solarize", 5, 1)


def test_settings_out_of_range_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"augment\.magnitude = 11"):
        AugmentConfig(magnitude=11)
    with pytest.raises(ValueError, match=r"augment\.num_ops = -1"):
        AugmentConfig(num_ops=-1)


def test_a_clip_keeps_its_shape_through_all_of_it() -> None:
    frames = one_frame().permute(0, 2, 3, 1).numpy().repeat(3, axis=0)
    for seed in range(20):
        changed = augment_clip(frames, AugmentConfig(), np.random.default_rng(seed))
        assert changed.shape == frames.shape
        assert (changed == changed[:1]).all()
