"""Checkpoints of untrained models."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.artifacts import checkpoints
from stgt.config import stgt_tiny
from stgt.inputs.tokenizer import Tokenizer
from stgt.model import STGT
from tests.helpers.data import TinyData


def save_untrained(data: TinyData, folder: Path, poison: str = "") -> str:
    tokenizer = Tokenizer(data.vocab)
    torch.manual_seed(0)
    config = stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    model = STGT(config)
    if poison:
        torch.nn.init.constant_(model.get_parameter(f"{poison}.weight"), float("nan"))
    uri = str(folder / "checkpoint")
    checkpoints.save(uri, model, tokenizer, step=0)
    return uri
