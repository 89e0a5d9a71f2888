"""Imports released weights into a model folder, or creates a model for pre-training."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch

from pipelines.artifacts import checkpoints
from pipelines.common.config import require
from pipelines.common.output_folder import config_record
from pipelines.export.weights.config import ImportConfig
from stgt.alpro.model import Alpro
from stgt.alpro.released import UnstoredSizes, import_alpro, is_alpro
from stgt.config import ModelConfig
from stgt.errors import CheckpointError, SettingError
from stgt.inputs.tokenizer import Tokenizer
from stgt.interface.model import VideoTextModel
from stgt.model import STGT
from stgt.model_folder import save_model
from stgt.weights.pretraining import begin
from stgt.weights.released import (
    HeadCounts,
    ImportReport,
    import_published,
    read_pickle,
    state_of,
)

logger = logging.getLogger(__name__)

ALPRO_ONLY = ("fusion_layer", "num_frames")
"""Settings that apply to ALPRO's files alone."""
REPORT = "import_report.json"
IMPORT_CONFIG = "import_config.json"
"""Config of the import. The config.json of a model folder holds the sizes of the model."""


class ImportSummary(TypedDict):
    """Result of `run_import`."""

    model: str
    found: str
    tensors: int
    parameters: int
    trained: int
    embed_dim: int
    frame_encoder: str | None
    neutral: list[str]
    not_used: int


def run_import(config: ImportConfig) -> ImportSummary:
    """Convert released files to a model folder, which is written atomically.

    Raises:
        CheckpointError: A file cannot be used, or the output already exists.
        CheckpointMismatchError: A tensor is missing, left over, or has an unexpected shape.
        SettingError: The vocabulary cannot be used or does not fit the model.
    """
    output = Path(config.output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is not empty; choose another --output")
    vision = config.vision
    encoder = Path(vision).expanduser() if vision not in (None, "timm") else vision
    heads = HeadCounts(
        vision=config.vision_heads, graph=config.graph_heads, qformer=config.qformer_heads
    )
    model: VideoTextModel
    if config.checkpoint is None:
        _refuse(config, ALPRO_ONLY, "applies only to ALPRO's files: give a checkpoint")
        assert encoder is not None  # checked by the config
        assert config.vocab is not None
        torch.manual_seed(config.seed)
        model, report = begin(
            encoder,
            Tokenizer(config.vocab),
            config.embed_dim or ModelConfig.embed_dim,
            config.bert,
            heads,
            config.image_size,
            None if config.qformer is None else Path(config.qformer).expanduser(),
        )
    else:
        checkpoint = Path(config.checkpoint).expanduser()
        if is_alpro(state_of(read_pickle(checkpoint), checkpoint)):
            model, report = _alpro(config, checkpoint)
        else:
            _refuse(
                config, ALPRO_ONLY, f"applies only to ALPRO's files, and {checkpoint} is not one"
            )
            model, report = import_published(checkpoint, encoder, heads, config.image_size)
        if config.vocab is not None:
            model.tokenizer = Tokenizer(config.vocab)
            if (problem := model.config.tokenizer_problem(model.tokenizer)) is not None:
                raise SettingError(
                    f"vocabulary {config.vocab} does not belong to the checkpoint: {problem}"
                )
    logger.info("found: %s", report.found)
    _log(report, vision, needs_vision=isinstance(model, STGT))
    # In the same parent folder as the output, so that the last step is a rename.
    part = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_model(model, part, with_frozen=vision is not None)
        record = config_record("import_weights", config)
        (part / IMPORT_CONFIG).write_text(json.dumps(record, indent=2), encoding="utf-8")
        (part / REPORT).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
        (part / checkpoints.STATE).write_text(
            json.dumps(
                checkpoints.State(
                    step=0,
                    frame_encoder=None,
                    scaler={},
                    skipped=0,
                    vocabulary=None
                    if model.tokenizer is None
                    else checkpoints.vocabulary_of(model.tokenizer),
                )
            ),
            encoding="utf-8",
        )
        (part / checkpoints.COMPLETE).touch()
        part.replace(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    counts = model.count_parameters()
    return ImportSummary(
        model=str(output),
        found=report.found,
        tensors=report.read,
        parameters=counts.total,
        trained=counts.trained,
        embed_dim=model.embedding_shape[1],
        frame_encoder=report.frame_encoder,
        neutral=sorted(report.neutral),
        not_used=len(report.not_used),
    )


def _alpro(config: ImportConfig, checkpoint: Path) -> tuple[Alpro, ImportReport]:
    """Import a released file of ALPRO.

    Raises:
        CheckpointError: The file cannot be used.
        SettingError: A setting does not apply to it.
    """
    _refuse(config, ("vision",), f"does not apply to {checkpoint}: ALPRO's files contain theirs")
    return import_alpro(
        checkpoint,
        UnstoredSizes(
            vision_heads=config.vision_heads,
            text_heads=config.qformer_heads,
            fusion_layer=config.fusion_layer,
        ),
        config.num_frames,
        config.image_size,
        config.position_resize,
    )


def _refuse(config: ImportConfig, names: tuple[str, ...], why: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None, name, value, why)


def _log(report: ImportReport, vision: str | None, needs_vision: bool) -> None:
    for note in report.notes:
        logger.warning("%s", note)
    for name, why in report.neutral.items():
        logger.warning("%s is not in the released files; filled with %s", name, why)
    if report.not_used:
        counts = Counter(name.partition(".")[0] for name in report.not_used)
        logger.info(
            "%d tensors of the given files are not used and are left out (%s); %s lists them",
            len(report.not_used),
            ", ".join(f"{part}: {count}" for part, count in counts.items()),
            REPORT,
        )
    for resized in report.resized:
        logger.info("resized %s", resized)
    if vision is None and needs_vision:
        logger.warning(
            "without --vision the model folder has no frame encoder, so the model encodes texts "
            "but not videos"
        )
