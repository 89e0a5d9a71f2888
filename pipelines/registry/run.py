"""Registers a checkpoint as a version of a registered model, and promotes versions.

Order: check everything that can be refused; try the model; upload it; create the version; set its
alias. An interruption therefore leaves no version, and the same command goes on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import find_checkpoint, is_manifest
from pipelines.common import storage, timeline, tracking
from pipelines.common.output_folder import CONFIG, RUN, settings_of
from pipelines.common.tracking_uri import resolve
from pipelines.compare.evaluations import EvaluationResult, read_evaluation
from pipelines.registry import versions
from pipelines.registry.card import model_card
from pipelines.registry.config import CHAMPION, RegisterConfig
from pipelines.registry.inference import InferenceSettings
from pipelines.registry.lineage import Lineage, lineage_of
from pipelines.registry.promotion import Decision, NotPromotedError, decide
from pipelines.registry.versions import ModelRegistry, Version, open_registry
from pipelines.registry.weights import (
    Weights,
    are_referred_to,
    assemble,
    find_weights,
    identity_of,
)
from pipelines.video.config import SamplingConfig
from stgt.errors import CheckpointError, STGTError

logger = logging.getLogger(__name__)

BATCH_CLIPS, BATCH_PAIRS = 16, 128
ABOUT = (
    "Video-text retrieval models. `champion` is the version to use; `challenger` is the one that "
    "was registered last."
)


class RegisterSummary(TypedDict):
    """Result of `run_register`."""

    name: str
    version: str
    model_uri: str
    created: bool
    """Whether the version is new. The same checkpoint is registered only once."""
    checkpoint: str
    weights: str
    evaluation: str | None
    aliases: list[str]
    promoted: bool
    decision: Decision | None
    """The comparison with the champion; None without one."""
    seconds: float


def run_register(config: RegisterConfig) -> RegisterSummary:
    """Register a checkpoint, promote a version, or both.

    Raises:
        STGTError: The checkpoint or an evaluation cannot be used, the registered model takes other
            inputs, or there is no such alias.
        NotPromotedError: The challenger is worse than the champion or cannot be compared with it.
        MlflowUnavailableError: MLflow cannot be used.
    """
    started = time.monotonic()
    config = replace(config, tracking=resolve(config.tracking))
    checked = None if config.checkpoint is None else _check_checkpoint(config.checkpoint)
    with open_registry(config.tracking) as registry:
        created = False
        if checked is None:
            version = registry.with_alias(config.name, config.alias)
        else:
            version, created = _register(config, registry, *checked)
        decision, is_promoted = None, False
        if config.promote:
            decision, is_promoted = _promote(config, registry, version)
        aliases = registry.aliases(config.name)
    return RegisterSummary(
        name=config.name,
        version=version.number,
        model_uri=version.uri,
        created=created,
        checkpoint=version.tags.get(versions.CHECKPOINT, ""),
        weights=version.tags.get(versions.WEIGHTS, ""),
        evaluation=_evaluation_of(version),
        aliases=sorted(alias for alias, number in aliases.items() if number == version.number),
        promoted=is_promoted,
        decision=decision,
        seconds=round(time.monotonic() - started, 1),
    )


def _check_checkpoint(uri: str) -> tuple[Lineage, Weights]:
    """Check a checkpoint before anything is asked of MLflow."""
    if not storage.exists(uri):
        raise CheckpointError(
            f"{uri} does not exist; give a checkpoint, or the output folder of a training"
        )
    checkpoint = find_checkpoint(uri)
    weights = find_weights(checkpoint)
    checkpoints.check_vocabulary(checkpoint)
    logger.info("%s holds %s", checkpoint, checkpoints.describe(checkpoint))
    return lineage_of(checkpoint), weights


def _register(
    config: RegisterConfig, registry: ModelRegistry, lineage: Lineage, weights: Weights
) -> tuple[Version, bool]:
    """Return the version of a checkpoint, and whether it is a new one."""
    from pipelines.registry.packaging import signature, write_model

    existing = registry.versions(config.name)
    if existing:
        known = registry.signature_of(existing[0])
        versions.require_same_signature(existing[0], known, signature().to_dict())
    evaluation, told_by = _find_evaluation(config, registry, lineage)
    settings = _settings(lineage, _settings_of_evaluation(registry, told_by))
    identity = identity_of(weights, settings)
    tags = {
        versions.IDENTITY: identity,
        versions.CHECKPOINT: lineage.checkpoint,
        versions.WEIGHTS: "referred to" if are_referred_to(weights) else "uploaded",
        **_tags_of_evaluation(told_by),
    }
    card = model_card(config.name, lineage, weights, settings, evaluation, config.license)
    same = [one for one in existing if one.tags.get(versions.IDENTITY) == identity]
    if same:
        version = same[0]
        logger.info("the checkpoint is registered already, as %s", version)
        if evaluation is not None or config.license is not None:
            registry.describe(version, card, tags)
            version = replace(version, tags={**version.tags, **tags})
    else:
        _try_model(weights, settings)
        run_id = lineage.run_id
        if run_id is not None and not registry.knows_run(run_id):
            run_id = None  # it was recorded in another MLflow
        with tempfile.TemporaryDirectory() as scratch, timeline.span("upload the model"):
            version = registry.add(
                config.name,
                write=lambda folder, model: write_model(
                    folder, model, weights, settings, card, Path(scratch)
                ),
                run_id=run_id,
                step=lineage.step,
                tags=tags,
                params={**_params(settings), "step": str(lineage.step)},
                description=card,
                about=ABOUT,
            )
        logger.info("registered %s", version)
    registry.set_alias(version, config.alias)
    return version, not same


def _try_model(weights: Weights, settings: InferenceSettings) -> None:
    """Load the model and encode a caption, so that no damaged model is registered."""
    from pipelines.registry.inference import InputRow, RetrievalModel
    from pipelines.registry.packaging import EXAMPLE

    with tempfile.TemporaryDirectory() as scratch, timeline.span("try the model"):
        folder = assemble(weights, Path(scratch) / "checkpoint")
        model = RetrievalModel(str(folder), {**settings, "device": "cpu"})
        model.predict([InputRow(caption=one) for one in EXAMPLE["caption"]], "embeddings")


def _find_evaluation(
    config: RegisterConfig, registry: ModelRegistry, lineage: Lineage
) -> tuple[EvaluationResult | None, str | None]:
    """Return the evaluation of a checkpoint and its folder or run id; None without one."""
    told_by = config.evaluation
    if told_by is None:
        told_by = registry.latest_evaluation(lineage.checkpoint)
        if told_by is None:
            logger.info(
                "MLflow has no evaluation of this checkpoint, so the model card has no metrics; "
                "give one with --evaluation, also later"
            )
            return None, None
    elif storage.exists(storage.resolve(told_by)):
        told_by = storage.resolve(told_by)
    evaluation = read_evaluation(told_by, config.tracking)
    evaluated = evaluation.result["checkpoint"]
    if evaluated != lineage.checkpoint:
        raise STGTError(
            f"the evaluation {told_by} is of the checkpoint {evaluated}, not of "
            f"{lineage.checkpoint}; give an evaluation of this checkpoint"
        )
    return evaluation, told_by


def _settings_of_evaluation(registry: ModelRegistry, told_by: str | None) -> Mapping[str, Any]:
    """Return the settings of an evaluation by name; those of a run are texts."""
    if told_by is None:
        return {}
    record = storage.join(told_by, CONFIG)
    if storage.exists(record):
        return settings_of(storage.read_json(record))
    return registry.params_of(told_by)


def _settings(lineage: Lineage, evaluated: Mapping[str, Any]) -> InferenceSettings:
    """Return how a model reads its inputs: as its evaluation did, or else as one would."""
    inputs = checkpoints.model_config(lineage.checkpoint).inputs
    num_frames = _number(evaluated, "num_frames", inputs.num_frames)
    sampling = SamplingConfig(
        num_frames=num_frames,
        size=inputs.image_size,
        resize=evaluated.get("resize", "squash"),
        # Evaluations of earlier versions recorded no rules and had the first ones.
        frame_rules=cast("Any", _number(evaluated, "frame_rules", 1 if evaluated else 2)),
    )
    data = evaluated.get("data")
    if data is not None and not is_manifest(data):
        sampling = _sampling_of_store(data, sampling)
    tokens = _number(evaluated, "max_text_tokens", inputs.max_text_tokens)
    return InferenceSettings(
        sampling=asdict(sampling),
        num_frames=num_frames,
        max_text_tokens=min(tokens, inputs.most_text_tokens),
        precision=evaluated.get("precision", "fp32"),
        batch_clips=BATCH_CLIPS,
        batch_pairs=BATCH_PAIRS,
        device="auto",
    )


def _sampling_of_store(store: str, sampling: SamplingConfig) -> SamplingConfig:
    """Return how the clips of a store were decoded, since the evaluation took its frames from it.

    Frames that were chosen at random cannot be chosen again for other clips.
    """
    try:
        stored = ClipStore(store).sampling
    except (STGTError, OSError) as error:
        logger.warning(
            "the clip store of the evaluation cannot be read (%s), so videos are decoded by the "
            "default settings",
            error,
        )
        return sampling
    if stored.frame_choice in ("random", "random_sorted", "head_tail"):
        return replace(sampling, decoder=stored.decoder, frame_rules=stored.frame_rules)
    return replace(
        sampling,
        num_frames=stored.num_frames,
        frame_choice=stored.frame_choice,
        decoder=stored.decoder,
        frame_rules=stored.frame_rules,
    )


def _number(values: Mapping[str, Any], name: str, default: int) -> int:
    """Return a number that a config has; MLflow holds it as text, and None as the text None."""
    value = values.get(name)
    return default if value in (None, "None") else int(value)


def _params(settings: InferenceSettings) -> dict[str, str]:
    sampling = settings["sampling"]
    return {
        "num_frames": str(settings["num_frames"]),
        "image_size": str(sampling["size"]),
        "resize": str(sampling["resize"]),
        "max_text_tokens": str(settings["max_text_tokens"]),
        "precision": settings["precision"],
    }


def _tags_of_evaluation(told_by: str | None) -> dict[str, str]:
    """Return the tags by which a later promotion finds an evaluation."""
    if told_by is None:
        return {}
    record = storage.join(told_by, RUN)
    if not storage.exists(storage.join(told_by, CONFIG)):
        return {versions.EVALUATION_RUN: told_by}
    run_id = tracking.recorded_run_id(record)
    return {
        versions.EVALUATION: told_by,
        **({} if run_id is None else {versions.EVALUATION_RUN: run_id}),
    }


def _evaluation_of(version: Version) -> str | None:
    """Return the recorded evaluation of a version: its folder if that is there, else its run."""
    folder = version.tags.get(versions.EVALUATION)
    if folder is not None and storage.exists(folder):
        return folder
    return version.tags.get(versions.EVALUATION_RUN, folder)


def _promote(
    config: RegisterConfig, registry: ModelRegistry, challenger: Version
) -> tuple[Decision | None, bool]:
    """Make a version the champion, unless it is worse than the present one."""
    number = registry.aliases(config.name).get(CHAMPION)
    if number == challenger.number:
        logger.info("%s is the champion already", challenger)
        return None, False
    decision = None
    if number is None:
        logger.info("%s becomes the first champion", challenger)
    else:
        champion = registry.with_alias(config.name, CHAMPION)
        try:
            decision = decide(
                _read(config, champion, config.champion_evaluation, "--champion-evaluation"),
                _read(config, challenger, config.evaluation, "--evaluation"),
                config.metric,
                config.margin,
                config.resamples,
            )
        except NotPromotedError as error:
            raise NotPromotedError(
                f"{challenger} is {config.alias}, but version {number} stays {CHAMPION}: {error}"
            ) from error
        logger.info(
            "%s becomes champion instead of version %s: %s %+.1f [%+.1f, %+.1f]",
            challenger,
            number,
            decision["metric"],
            decision["gain"],
            decision["low"],
            decision["high"],
        )
    registry.set_alias(challenger, CHAMPION)
    return decision, True


def _read(
    config: RegisterConfig, version: Version, given: str | None, flag: str
) -> EvaluationResult:
    """Read the evaluation of a version, named like the version."""
    told_by = given or _evaluation_of(version)
    if told_by is None:
        raise NotPromotedError(
            f"{version} has no evaluation, so it cannot be compared; give one with {flag}"
        )
    evaluation = read_evaluation(told_by, config.tracking)
    checkpoint = version.tags.get(versions.CHECKPOINT)
    if evaluation.result["checkpoint"] != checkpoint:
        raise NotPromotedError(
            f"the evaluation {told_by} is of the checkpoint {evaluation.result['checkpoint']}, but "
            f"{version} was made from {checkpoint}; give an evaluation of it with {flag}"
        )
    return replace(evaluation, name=str(version))
