"""STGT: the video-language model, its losses and its metrics. Independent of Ray, MLflow and URIs.

The names below are imported lazily, so that decoder processes can use `stgt.inputs.frame_choice`
without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stgt.config import GraphConfig, ModelConfig, QFormerConfig, VisionConfig, stgt_g, stgt_tiny
    from stgt.model import STGT

_HOMES = {
    "STGT": "stgt.model",
    "GraphConfig": "stgt.config",
    "ModelConfig": "stgt.config",
    "QFormerConfig": "stgt.config",
    "VisionConfig": "stgt.config",
    "stgt_g": "stgt.config",
    "stgt_tiny": "stgt.config",
}

__all__ = [
    "STGT",
    "GraphConfig",
    "ModelConfig",
    "QFormerConfig",
    "VisionConfig",
    "stgt_g",
    "stgt_tiny",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'stgt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
