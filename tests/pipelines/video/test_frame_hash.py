"""Perceptual hashes: equal pictures in other forms are near, other pictures are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.video.child import Decoded, DecodeRequest, decode_file
from pipelines.video.frame_codec import decode_frames, encode_frames
from pipelines.video.frame_hash import NO_HASH, hash_frames

SIZE = 96


def picture(seed: int, size: int = 320) -> np.ndarray:
    """A smooth random picture, [size, size, 3] uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def as_jpeg(frames: np.ndarray, quality: int) -> np.ndarray:
    return decode_frames(encode_frames(frames, "jpeg", quality), "jpeg", frames.shape[1])


def hash_of(image: np.ndarray, quality: int = 95) -> np.uint64:
    return hash_frames(as_jpeg(image[None], quality))[0]


def distance(one: np.uint64, other: np.uint64) -> int:
    return int(np.bitwise_count(one ^ other))


@pytest.mark.parametrize("seed", range(5))
def test_size_quality_brightness_and_form_change_few_bits(seed: int) -> None:
    image = picture(seed)
    original = hash_of(resized(image, 224))
    assert distance(original, hash_of(resized(image, SIZE))) <= 6
    assert distance(original, hash_of(resized(image, 224), quality=40)) <= 6
    darker = (resized(image, 224) * 0.7).astype(np.uint8)
    assert distance(original, hash_of(darker)) <= 6
    assert distance(original, hash_frames(resized(image, 224)[None])[0]) <= 6


def test_other_pictures_are_far() -> None:
    hashes = [hash_of(picture(seed)) for seed in range(40)]
    found = [distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(found) > 10
    assert np.mean(found) == pytest.approx(32, abs=2)
    assert distance(hash_of(picture(0)), hash_of(picture(0)[:, ::-1])) > 10


def test_half_of_the_bits_are_set() -> None:
    assert [int(np.bitwise_count(hash_of(picture(seed)))) for seed in range(5)] == [32] * 5


@pytest.mark.parametrize("gray", [0, 128, 255])
def test_pictures_that_show_nothing_have_no_hash(gray: int) -> None:
    plain = np.full((SIZE, SIZE, 3), gray, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(-1, 2, size=plain.shape)
    assert hash_of(plain) == NO_HASH
    assert hash_of(np.clip(plain + noise, 0, 255).astype(np.uint8)) == NO_HASH


def test_frames_are_hashed_one_by_one() -> None:
    frames = np.stack([resized(picture(seed), SIZE) for seed in range(3)])
    assert hash_frames(frames).tolist() == [int(hash_frames(one[None])[0]) for one in frames]
    assert hash_frames(frames[:0]).shape == (0,)


def frames_of(path: Path, size: int) -> np.ndarray:
    request = DecodeRequest(
        path=str(path),
        num_frames=4,
        frame_choice="uniform",
        size=size,
        resize="squash",
        decoder="pyav",
        max_pixels=10**7,
        max_bytes=10**9,
    )
    decoded = decode_file(request)
    assert isinstance(decoded, Decoded), decoded
    return decoded.frames


@pytest.mark.slow
def test_real_clips_are_told_apart_at_other_sizes_and_qualities(videos_dir: Path) -> None:
    """The same frames of a filmed clip differ in at most 6 bits, and other clips in more."""
    names = ("languagebind_0", "mmaction_demo", "moviepy_chaplin", "perception_dog")
    originals = []
    for name in names:
        path = videos_dir / "good" / f"{name}.mp4"
        frames = frames_of(path, 224)
        originals.append(hash_frames(frames))
        for changed in (as_jpeg(frames, 50), frames_of(path, SIZE)):
            other = hash_frames(changed)
            assert np.bitwise_count(originals[-1] ^ other).max() <= 6, name
    for number, one in enumerate(originals):
        for other in originals[:number]:
            assert np.bitwise_count(one[:, None] ^ other[None, :]).min() > 6
