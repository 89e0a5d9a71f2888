"""Arithmetic of the published recipes, recorded because counting it takes some ten seconds.

A test counts them anew. Other models and numbers of frames are counted when they are estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.common.config import fingerprint
from pipelines.train.config import TrainConfig


@dataclass(frozen=True)
class Counted:
    """What a training does per sample, and how large its checkpoints are."""

    flops_per_sample: float
    """Floating-point operations of the forward and backward pass."""
    checkpoint_bytes: int


RECORDED = {
    # pretrain_stage1
    "8677c3b0187e": Counted(4_740_479_860_736, 2_954_845_416),
    # pretrain_stage2, finetune_lsmdc and finetune_msvd
    "54d1007c521a": Counted(4_740_479_866_880, 2_954_845_416),
    # finetune_msrvtt
    "2595b00022de": Counted(4_751_512_432_640, 2_954_845_416),
    # finetune_didemo
    "c1fb27a31181": Counted(4_804_158_763_520, 2_954_845_416),
}
"""Counts by the fingerprint of everything that they depend on."""


def recorded_count(train: TrainConfig) -> Counted | None:
    """Return the recorded count for a training; None if its model or optimizer is another one."""
    if train.optim.optimizer != "adamw":
        return None
    model = train.model.to_dict()
    if model.get("num_answers") == 0:  # the counts are older than these settings
        del model["num_answers"]
        model.pop("answering", None)
    model.pop("init_rules", None)  # initial values change no count
    values = {
        "model": model,
        "num_frames": train.num_frames,
        "targets": train.targets,
    }
    return RECORDED.get(fingerprint(values))
