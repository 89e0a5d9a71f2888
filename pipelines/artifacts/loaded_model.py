"""A model that a worker loads with its first batch.

It is not loaded in the worker's constructor, because an error there reaches the driver as the death
of an actor, without its cause.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pipelines.artifacts import checkpoints
from stgt.precision import autocast, keep_frozen_weights_in

if TYPE_CHECKING:
    from stgt.config import Precision
    from stgt.interface.inputs import TextTokenizer
    from stgt.interface.model import VideoTextModel


class LoadedModel:
    """A model of a checkpoint in eval mode, on the device of its worker."""

    def __init__(
        self, checkpoint: str, precision: Precision = "fp32", use_gpu: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._precision: Precision = precision
        self.device = torch.device("cuda" if use_gpu else "cpu")

    @functools.cached_property
    def _loaded(self) -> tuple[VideoTextModel, TextTokenizer]:
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the workers share the cores
        model, tokenizer = checkpoints.load(self._checkpoint)
        keep_frozen_weights_in(self._precision, model)
        return model.to(self.device).eval(), tokenizer

    @property
    def model(self) -> VideoTextModel:
        """The model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""
        return self._loaded[1]

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the model's forward passes."""
        return autocast(self._precision, self.device)
