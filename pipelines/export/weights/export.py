"""Exports a model folder to a file in the released format."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, TypedDict

import torch

from pipelines.common.output_folder import write_config_beside
from pipelines.export.weights.config import ExportConfig
from stgt.alpro.model import Alpro
from stgt.alpro.released import export_alpro
from stgt.errors import CheckpointError
from stgt.model import STGT
from stgt.model_folder import load_model
from stgt.weights.released import export_published


class ExportSummary(TypedDict):
    """Result of `run_export`."""

    checkpoint: str
    tensors: int


def run_export(config: ExportConfig) -> ExportSummary:
    """Write the trained tensors of a model folder to a file in the released format.

    Raises:
        CheckpointError: The folder holds no model, or the output already exists.
    """
    output = Path(config.output).expanduser().absolute()
    if output.exists():
        raise CheckpointError(f"{output} already exists; choose another --output")
    folder = Path(config.model).expanduser()
    model = load_model(folder, needs_frame_encoder=False)
    contents: dict[str, Any]
    if isinstance(model, Alpro):
        # The loader of ALPRO's repository takes the tensors themselves, and LAVIS takes both.
        state = contents = export_alpro(model)
    elif isinstance(model, STGT):
        state = export_published(model)
        contents = {"model": state}
    else:
        raise CheckpointError(
            f"{folder} holds a model of the kind {model.config.kind}, and released files are those "
            "of STGT and ALPRO; give the folder of such a model"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        torch.save(contents, part)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    write_config_beside(str(output), "export_weights", config)
    return ExportSummary(checkpoint=str(output), tensors=len(state))
