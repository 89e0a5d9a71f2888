"""Estimates of the memory and FLOPs of a training step, from a run on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stgt.config import ModelConfig, OptimizerName, Precision, Targets
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.inputs import VideoTextConfig, answering_of
from stgt.interface.kinds import build
from stgt.interface.model import FrameTokens
from stgt.model import STGT
from stgt.precision import autocast, dtype_of, keep_frozen_weights_in
from stgt.question_answering.head import AnsweringModel, freeze_unused
from stgt.question_answering.objective import AnswerObjective
from stgt.training.muon import matrices_for_muon
from stgt.training.objective import TrainingObjective, total_loss

ADAM_BYTES = 8
"""Bytes per trained parameter for AdamW's two moments."""
FP32_BYTES = 4
ANSWER_TOKENS = 4
"""Assumed length of a generated answer, with the token that ends it."""


@dataclass(frozen=True)
class Footprint:
    """Resources that one training step of one worker needs."""

    num_clips: int
    """Clips per forward pass."""
    parameters: int
    trained: int
    weight_bytes: int
    optimizer_bytes: int
    """Size of gradients and the optimizer's moments."""
    activation_bytes: int
    """Size of the tensors that the forward pass stores for the backward pass."""
    flops: float
    """Floating-point operations of the forward and backward pass."""
    by_muon: int = 0
    """Numbers updated by Muon, which keeps one moment of them instead of two."""

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a training checkpoint: trained weights and the optimizer's moments."""
        return (self.trained * 3 - self.by_muon) * FP32_BYTES

    @property
    def total_bytes(self) -> int:
        """Total size. Kernel workspaces and the CUDA context (approximately 1 GB) come on top."""
        return self.weight_bytes + self.optimizer_bytes + self.activation_bytes


def _without_contents(model: nn.Module) -> None:
    """Replace a model's meta tensors with fake CPU tensors. Must run under FakeTensorMode."""
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in known:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                known[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            if tensor is not None:
                module._parameters[name] = known[id(tensor)]  # type: ignore[assignment]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)


def training_footprint(
    config: VideoTextConfig,
    precision: Precision,
    num_clips: int,
    num_frames: int,
    targets: Targets,
    from_tokens: bool = False,
    optimizer: OptimizerName = "adamw",
) -> Footprint:
    """Estimate a training step of one worker with `num_clips` clips in one pass.

    With `from_tokens`, the step begins with known tokens of the frames, which it does not encode.

    The step runs under torch's FakeTensorMode, where tensors have shapes and dtypes but no data.
    The sizes of the tensors that autograd stores for the backward pass are summed.
    """
    size = config.inputs.image_size
    if isinstance(config, ModelConfig):
        # Dropout in the graph draws a seed, which needs a real value from a tensor.
        config = replace(config, graph=replace(config.graph, attention_dropout=0.0))
    kept: dict[int, int] = {}
    own: set[int] = set()
    held: list[torch.UntypedStorage] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)  # so that its address is not reused
        return tensor

    with torch.device("meta"):
        model = build(config)  # some of timm's code reads values from tensors
    with FakeTensorMode():
        _without_contents(model)
        keep_frozen_weights_in(precision, model)
        model.train()
        model.checks_values = False
        if isinstance(model, STGT) and answering_of(config) == "generation":
            # There is no vocabulary whose answers could be tokenized.
            ids = torch.zeros(model.config.num_answers, ANSWER_TOKENS, dtype=torch.int64)
            model.answer_tokens = TextTokens(ids, torch.ones_like(ids))
        if getattr(config, "num_answers", 0):
            freeze_unused(model, cast("AnsweringModel", model).unused_when_answering())
        own |= {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        frozen = model.frozen_names()
        frozen_numbers = sum(
            tensor.numel() for name, tensor in model.state_dict().items() if name in frozen
        )
        counts = model.count_parameters()
        matrices = matrices_for_muon(model) if optimizer == "muon" else ()
        by_muon = sum(matrix.numel() for matrix in matrices)
        frames: torch.Tensor | FrameTokens = torch.empty(num_clips, num_frames, 3, size, size)
        if from_tokens:
            assert config.frame_token_shape is not None, "checked by the training's config"
            frames = FrameTokens(torch.empty(num_clips, num_frames, *config.frame_token_shape))
        ids = torch.zeros(num_clips, config.inputs.max_text_tokens, dtype=torch.int64)
        text = TextTokens(ids, torch.ones_like(ids))
        positions = torch.zeros(num_clips, dtype=torch.int64)
        # Comparing the clips and texts of a batch needs their values, which do not exist here.
        answers = bool(getattr(config, "num_answers", 0))
        objective = TrainingObjective(model, targets, negatives="published")
        with FlopCounterMode(display=False) as counter:
            with (
                autocast(precision, torch.device("cpu")),
                torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            ):
                if answers:
                    losses = AnswerObjective(cast("AnsweringModel", model))(frames, text, positions)
                else:
                    losses = objective(frames, text, positions, 0)
            total_loss(losses).backward()
    rest = counts.total - frozen_numbers
    return Footprint(
        num_clips=num_clips,
        parameters=counts.total,
        trained=counts.trained,
        weight_bytes=frozen_numbers * dtype_of(precision).itemsize + rest * FP32_BYTES,
        optimizer_bytes=counts.trained * (FP32_BYTES + ADAM_BYTES) - by_muon * FP32_BYTES,
        activation_bytes=sum(kept.values()),
        flops=float(counter.get_total_flops()),
        by_muon=by_muon,
    )
