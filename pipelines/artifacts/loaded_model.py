"""A model that a worker loads with its first batch.

It is not loaded in the worker's constructor, because an error there reaches the driver as the death
of an actor, without its cause.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pipelines.artifacts import checkpoints
from stgt.model_folder import fingerprint
from stgt.precision import autocast, keep_frozen_weights_in

if TYPE_CHECKING:
    from stgt.config import Precision
    from stgt.interface.inputs import TextTokenizer
    from stgt.interface.model import VideoTextModel


class LoadedModel:
    """A model of a checkpoint in eval mode, on the device of its worker."""

    def __init__(
        self,
        checkpoint: str,
        precision: Precision = "fp32",
        use_gpu: bool = False,
        with_encoder: bool = False,
    ) -> None:
        """Prepare to load a model.

        Args:
            checkpoint: The checkpoint, or a model that others trained.
            precision: Precision of matrix products.
            use_gpu: Whether the model is on a GPU.
            with_encoder: Whether `encoder` is computed, which takes seconds for a large encoder
                that the checkpoint has trained.
        """
        self._with_encoder = with_encoder
        self._checkpoint = checkpoint
        self._precision: Precision = precision
        self.device = torch.device("cuda" if use_gpu else "cpu")

    @functools.cached_property
    def _loaded(self) -> tuple[VideoTextModel, TextTokenizer, str]:
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the workers share the cores
        model, tokenizer = checkpoints.load(self._checkpoint)
        # Before its weights are rounded to the precision of matrix products.
        encoder = encoder_fingerprint(model) if self._with_encoder else ""
        keep_frozen_weights_in(self._precision, model)
        return model.to(self.device).eval(), tokenizer, encoder

    @property
    def model(self) -> VideoTextModel:
        """The model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""
        return self._loaded[1]

    @property
    def encoder(self) -> str:
        """Fingerprint of the frame encoder; empty without `with_encoder`."""
        return self._loaded[2]

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the model's forward passes."""
        return autocast(self._precision, self.device)


def encoder_fingerprint(model: VideoTextModel) -> str:
    """Return the fingerprint of all tensors of a model's frame encoder.

    It equals `FrozenEncoder.fingerprint` of an encoder that is wholly frozen.
    """
    encoder = model.frame_encoder
    assert encoder is not None, "callers check the config's frame_token_shape"
    tensors = encoder.state_dict()
    if encoder.fingerprint is not None and encoder.frozen_names() == set(tensors):
        return encoder.fingerprint
    return fingerprint(tensors)
