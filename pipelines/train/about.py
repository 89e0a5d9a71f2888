"""What a training tells MLflow about itself: its data, its origin, and a description."""

from __future__ import annotations

from pipelines.artifacts.training_run import origin_of
from pipelines.common.provenance import About, DatasetInput, Step
from pipelines.feed.dataset_inputs import dataset_input
from pipelines.train import preflight
from pipelines.train.config import TrainConfig


def about_training(config: TrainConfig, data: preflight.TrainingData) -> About:
    """Return what a run knows about itself, besides its config and its metrics."""
    return About(
        job="train",
        summary=_summary(config, data),
        recipe=config.recipe,
        datasets=datasets_of(config, data),
        fingerprints={"data": data.digest},
        step=_step(config),
        origin=None if config.init_from is None else origin_of(config.init_from),
    )


def _step(config: TrainConfig) -> Step:
    if config.recipe.startswith("pretrain"):
        return "pre-trained"
    return "trained" if config.init_from is None else "fine-tuned"


def _summary(config: TrainConfig, data: preflight.TrainingData) -> str:
    """Return what the run does, for readers who do not know the project."""
    recipe = f" with the recipe `{config.recipe}`" if config.recipe else ""
    weights = "random weights" if config.init_from is None else "the weights of a checkpoint"
    parts = [
        f"Trains the video-language model {config.model.title}{recipe}: {config.steps:,} steps of "
        f"{config.global_batch} clips on {data.plan.num_samples:,} {config.samples} per epoch, "
        f"from {weights}, on {config.num_workers} worker{'s' if config.num_workers > 1 else ''}."
    ]
    if config.validates:
        where = config.validation_store or f"{data.held_out.num_clips} clips held out of training"
        parts.append(
            f"Text-video retrieval is validated on {where}. Of all checkpoints, the one with the "
            f"highest `{config.best_metric}` is the best."
            if config.best_metric is not None
            else f"Text-video retrieval is validated on {where}."
        )
    parts.append(f"Checkpoints, metrics and settings are in `{config.output}`.")
    return " ".join(parts)


def datasets_of(config: TrainConfig, data: preflight.TrainingData) -> tuple[DatasetInput, ...]:
    """Return what the run trains, validates and tests on."""
    found = [
        dataset_input(source.uri, "training", sum(source.shard_sizes)) for source in data.sources
    ]
    if data.held_out.num_clips:
        found.append(dataset_input(data.sources[0].uri, "validation", data.held_out.num_clips))
    if config.val_store is not None:
        found.append(dataset_input(config.val_store, "validation"))
    if config.test_store is not None and config.select_on == "test":
        found.append(dataset_input(config.test_store, "test"))
    return tuple(found)
