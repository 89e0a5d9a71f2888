"""Captions, tokens, frame choice and clip transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from pipelines.video.synthetic.scenes import vocabulary
from stgt.config import AugmentConfig
from stgt.errors import SettingError
from stgt.inputs.frame_choice import FrameChoice, choose_frames
from stgt.inputs.tokenizer import Tokenizer
from stgt.inputs.transforms import augment_clip, normalize_frames
from stgt.interface.inputs import CLIP_MEAN, CLIP_STD


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(vocabulary()) + "\n")
    return path


def test_tokens_are_padded_truncated_and_masked(vocab: Path) -> None:
    tokenizer = Tokenizer(vocab)
    tokens = tokenizer(["A red circle!", "a red circle moves left and then grows"], max_tokens=6)
    assert tokens.input_ids.shape == (2, 6)
    assert tokens.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert tokens.input_ids[0, 5] == tokenizer.pad_id
    assert (tokens.input_ids < len(tokenizer)).all()


def test_the_captioning_token_comes_last(vocab: Path) -> None:
    tokenizer = Tokenizer(vocab)
    assert tokenizer.bos_id == len(tokenizer) - 1 == len(vocabulary())


def test_a_saved_vocabulary_gives_the_same_tokens(vocab: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(vocab)
    tokenizer.save(tmp_path / "copy.txt")
    again = Tokenizer(tmp_path / "copy.txt")
    text = ["a blue cross shrinks on a teal background", "xyzzy"]
    assert torch.equal(tokenizer(text, 16).input_ids, again(text, 16).input_ids)


def test_bert_vocabulary_has_the_published_ids(reference_dir: Path) -> None:
    tokenizer = Tokenizer(reference_dir / "bert-base-uncased-vocab.txt")
    assert (len(tokenizer), tokenizer.bos_id, tokenizer.pad_id) == (30523, 30522, 0)
    assert tokenizer(["a man"], 6).input_ids.tolist() == [[101, 1037, 2158, 102, 0, 0]]


@pytest.mark.parametrize("captions", [[], "a bare string"])
def test_no_captions_or_a_bare_string_is_refused(vocab: Path, captions: object) -> None:
    with pytest.raises(ValueError, match="captions"):
        Tokenizer(vocab)(captions, 8)  # type: ignore[arg-type]


def test_captions_as_written_keep_punctuation_and_every_word(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\n.\n[\n]\ndec\n")
    tokenizer = Tokenizer(vocab)
    written = tokenizer.as_written(["A dog. A dog", "a [DEC]"], 8)
    assert written.input_ids.tolist() == [[2, 5, 6, 7, 5, 6, 3, 0], [2, 5, 8, 10, 9, 3, 0, 0]]
    assert written.attention_mask.sum(dim=1).tolist() == [7, 6]
    assert tokenizer(["A dog. A dog"], 8).input_ids.tolist() == [[2, 5, 6, 5, 6, 3, 0, 0]]
    assert int(tokenizer.as_written(["a " * 60], 70).attention_mask.sum()) == 62
    assert int(tokenizer(["a " * 60], 70).attention_mask.sum()) == 52


def test_a_missing_or_wrong_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "nothing.txt")
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"lacks \[PAD\]"):
        Tokenizer(tmp_path / "words.txt")


@given(
    st.integers(1, 200),
    st.integers(1, 32),
    st.sampled_from(["uniform", "middle", "random", "head_tail", "random_sorted"]),
    st.integers(0, 1000),
)
def test_chosen_frames_exist_ascend_and_repeat_only_to_pad(
    num_source: int, num_frames: int, how: str, seed: int
) -> None:
    chosen = choose_frames(num_source, num_frames, how, np.random.default_rng(seed))  # type: ignore[arg-type]
    assert len(chosen) == num_frames
    assert chosen.min() >= 0
    assert chosen.max() < num_source
    real = chosen[: min(num_source, num_frames)]
    assert (np.diff(real) > 0).all()
    assert (chosen[len(real) :] == num_source - 1).all()


def test_middle_frames_by_hand() -> None:
    assert choose_frames(10, 2, "middle").tolist() == [2, 7]


def test_head_tail_takes_half_from_each_half() -> None:
    chosen = choose_frames(100, 8, "head_tail", np.random.default_rng(0))
    assert (chosen < 50).sum() == 4


def test_sorted_random_frames_may_lie_anywhere_in_the_clip() -> None:
    """Every pair of the frames of a clip is drawn, unlike with one frame of each segment."""
    generator = np.random.default_rng(0)
    drawn = {tuple(choose_frames(4, 2, "random_sorted", generator).tolist()) for _ in range(200)}
    assert drawn == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}


@pytest.mark.parametrize("how", ["random", "random_sorted", "head_tail"])
def test_random_choice_needs_a_generator(how: FrameChoice) -> None:
    with pytest.raises(ValueError, match="generator"):
        choose_frames(10, 2, how)


def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_augmentation_treats_all_frames_alike_and_follows_its_seed() -> None:
    same = np.repeat(clip()[:1], 4, axis=0)
    config = AugmentConfig(crop_scale_min=0.5, flip=True)
    changed = augment_clip(same, config, np.random.default_rng(5))
    assert changed.shape == same.shape
    assert changed.dtype == np.uint8
    assert (changed == changed[:1]).all()
    assert (changed != same).any()
    again = augment_clip(same, config, np.random.default_rng(5))
    assert (changed == again).all()


def test_augmentation_turned_off_changes_nothing() -> None:
    off = AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0)
    assert (augment_clip(clip(), off, np.random.default_rng(0)) == clip()).all()


def test_normalization_puts_channels_before_pixels() -> None:
    frames = torch.zeros(2, 3, 4, 5, 3, dtype=torch.uint8)
    frames[..., 0] = 255
    normalized = normalize_frames(frames)
    assert normalized.shape == (2, 3, 3, 4, 5)
    assert normalized[0, 0, 0, 0, 0].item() == pytest.approx((1 - 0.48145466) / 0.26862954)
    assert normalized[0, 0, 1, 0, 0].item() == pytest.approx(-0.4578275 / 0.26130258)


def normalized_by_the_formula(frames: torch.Tensor) -> torch.Tensor:
    center = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    scale = torch.tensor(CLIP_STD).view(3, 1, 1)
    return (frames.permute(0, 1, 4, 2, 3).float() / 255 - center) / scale


@pytest.mark.parametrize("part", ["all", "slice", "every second", "none"])
def test_normalized_frames_have_the_bits_and_strides_of_the_formula(part: str) -> None:
    """Strides decide which kernel a convolution takes, and so how it rounds."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 4, 6, 10, 3), dtype=torch.uint8, generator=generator)
    chosen = {
        "all": frames,
        "slice": frames[1:, :, 2:, 3:],
        "every second": frames[:, ::2, :, ::2],
        "none": frames[:0],
    }[part]
    before = chosen.clone()
    found, wanted = normalize_frames(chosen), normalized_by_the_formula(chosen)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()
    assert torch.equal(chosen, before)


def test_frames_of_other_layouts_are_normalized_and_left_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 3, 6, 8), dtype=torch.uint8, generator=generator)
    channels_first = frames.permute(0, 1, 3, 4, 2)
    assert torch.equal(normalize_frames(channels_first), normalized_by_the_formula(channels_first))
    floats = channels_first.float().contiguous()
    before = floats.clone()
    assert torch.equal(normalize_frames(floats), normalized_by_the_formula(floats))
    assert torch.equal(floats, before)


def test_a_name_that_gives_no_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub cannot be reached, transformers returns only the special tokens."""
    empty = BertTokenizerFast()
    monkeypatch.setattr(BertTokenizerFast, "from_pretrained", lambda name: empty)
    with pytest.raises(SettingError, match="vocabulary no-such/name: the Hugging Face Hub"):
        Tokenizer("no-such/name")


def test_a_vocabulary_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match=r"vocab\.txt: is not a text file"):
        Tokenizer(path)
