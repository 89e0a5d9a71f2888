"""A small model of every kind, with random weights, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from stgt.alpro.config import alpro_tiny
from stgt.alpro.model import Alpro
from stgt.alpro.released import export_alpro
from stgt.config import stgt_tiny
from stgt.dual_encoder.config import dual_encoder_tiny
from stgt.inputs.tokenizer import Tokenizer
from stgt.interface.inputs import VideoTextConfig
from stgt.interface.kinds import build
from stgt.interface.model import VideoTextModel

CONFIGS: dict[str, Callable[[], VideoTextConfig]] = {
    "stgt": lambda: replace(stgt_tiny(), graph=replace(stgt_tiny().graph, attention_dropout=0.0)),
    "dual_encoder": dual_encoder_tiny,
    "alpro": alpro_tiny,
}
"""Small configs without dropout, by kind."""
WORDS = ("a", "red", "blue", "ball", "square", "moves", "left", "right", "then", "stops")


def small_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of a few words, whose vocabulary is written to a folder."""
    vocab = folder / "words.txt"
    vocab.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    return Tokenizer(vocab)


def small_model(kind: str, folder: Path, seed: int = 0) -> VideoTextModel:
    """A model of a kind in eval mode, the same for the same seed."""
    tokenizer = small_tokenizer(folder)
    torch.manual_seed(seed)
    return build(CONFIGS[kind]().for_tokenizer(tokenizer), tokenizer).eval()


def released_alpro(folder: Path, num_answers: int = 0) -> Path:
    """A small file in the form of ALPRO's released ones, and its vocabulary, words.txt."""
    torch.manual_seed(0)
    words = len(small_tokenizer(folder).entries())
    model = Alpro(replace(alpro_tiny(words), num_answers=num_answers))
    torch.save(export_alpro(model), folder / "released.pt")
    return folder / "released.pt"
