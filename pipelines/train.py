"""Training on Ray Train, fed by Ray Data; started again in the same folder, it resumes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import ray
from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from pipelines import checkpoints, storage, tracking
from pipelines.clips import ClipStore
from pipelines.config import TrainConfig, flatten, to_dict
from pipelines.faults import EXPLAINED, root_cause
from pipelines.feed import ResumableFeed
from pipelines.plan import SamplePlan
from pipelines.progress import Progress, ProgressChannel
from stgt.errors import CheckpointError, ClipStoreError
from stgt.text import Tokenizer

if TYPE_CHECKING:
    from pipelines.train_worker import WorkerJob

logger = logging.getLogger(__name__)

CONFIG = "config.json"
RESULT = "result.json"
RUN = "mlflow_run.json"
NOT_IDENTITY = ("output", "tracking", "num_loaders", "progress_every", "max_failures")
"""Fields that a resumed run may change: they do not alter what is computed."""


class TrainSummary(TypedDict):
    """What `run_train` made."""

    checkpoint: str
    step: int
    metrics: dict[str, float]
    run_id: str
    seconds: float


def _resolved(config: TrainConfig) -> TrainConfig:
    """The same config with absolute paths, and with the model's sizes for its vocabulary."""

    def there(uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)

    tokenizer = Tokenizer(config.vocab)
    vocab = storage.resolve(config.vocab) if Path(config.vocab).is_file() else config.vocab
    return replace(
        config,
        store=storage.resolve(config.store),
        output=storage.resolve(config.output),
        init_from=there(config.init_from),
        val_store=there(config.val_store),
        vocab=vocab,
        model=config.model.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id),
        tracking=tracking.resolve(config.tracking),
    )


def _claim_run(config: TrainConfig) -> None:
    """Write the run's config, or check that a resumed run computes the same from the same clips."""
    uri = storage.join(config.output, CONFIG)
    # A store gets other shards when clips come out of its quarantine: the order of clips changes.
    digest = ClipStore(config.store).catalogue["digest"]
    values = {**json.loads(json.dumps(to_dict(config))), "store_digest": digest}
    if not storage.exists(uri):
        storage.write_json(uri, values)
        return
    before, now = flatten(storage.read_json(uri)), flatten(values)
    differing = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name.split(".")[0] not in NOT_IDENTITY
    ]
    if differing:
        raise CheckpointError(
            f"{config.output} holds a run with other settings ({'; '.join(differing)}); "
            "choose another output folder, or delete this one"
        )


def check_inputs(config: TrainConfig) -> SamplePlan:
    """The plan of a training, once its clips are found to suit it.

    Raises:
        ClipStoreError: the store is missing, too small, or holds other frames than needed.
    """
    store = ClipStore(config.store)
    plan = SamplePlan(store.shard_sizes, config.seed)
    if plan.num_clips < config.global_batch:
        raise ClipStoreError(
            f"{config.store} holds {plan.num_clips} clips, fewer than one global batch of "
            f"{config.global_batch}; lower global_batch or ingest more clips"
        )
    with_captions = sum(store.catalogue["histograms"]["captions_per_clip"])
    if with_captions < plan.num_clips:
        raise ClipStoreError(
            f"{config.store} holds {plan.num_clips - with_captions} clips without a caption; train "
            "on a store that was made from annotations with captions"
        )
    if store.sampling.size != config.model.vision.image_size:
        raise ClipStoreError(
            f"{config.store} holds frames of {store.sampling.size} pixels, the model takes "
            f"{config.model.vision.image_size}; ingest with sampling.size = "
            f"{config.model.vision.image_size}"
        )
    if store.sampling.num_frames < config.num_frames:
        raise ClipStoreError(
            f"{config.store} holds {store.sampling.num_frames} frames a clip, the run takes "
            f"{config.num_frames}; ingest with more frames or train with fewer"
        )
    return plan


def _check_resources(config: TrainConfig) -> None:
    resources = ray.cluster_resources()
    needed = config.num_workers + config.num_loaders
    if resources.get("CPU", 0) < needed:
        raise ValueError(
            f"training needs {config.num_workers} workers + {config.num_loaders} loaders "
            f"= {needed} CPUs, the cluster has {resources.get('CPU', 0):g}; "
            "lower num_workers or num_loaders"
        )
    if config.use_gpu and resources.get("GPU", 0) < config.num_workers:
        raise ValueError(
            f"training needs {config.num_workers} GPUs, the cluster has "
            f"{resources.get('GPU', 0):g}; lower num_workers or leave use_gpu off"
        )


def run_train(
    config: TrainConfig,
    parent_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainSummary:
    """Train one stage, or go on with it, or give its result when it is finished.

    Args:
        config: what to train.
        parent_id: MLflow run that this one is shown under.
        callbacks: Ray Train callbacks, such as Tune's.

    Raises:
        STGTError: the store, the checkpoint or a loss is not usable.
        ValueError: the config does not fit the store or the cluster.
    """
    started = time.monotonic()
    config = _resolved(config)
    plan = check_inputs(config)
    if config.init_from is not None:
        checkpoints.require(config.init_from)
    elif config.model.vision.frozen:
        raise CheckpointError(
            "model.vision.frozen without init_from: the frame encoder would stay at random; give "
            "init_from a folder with its weights, or set model.vision.frozen = False"
        )
    with storage.lock(config.output):
        _claim_run(config)
        record = storage.join(config.output, RUN)
        result_uri = storage.join(config.output, RESULT)
        if not storage.exists(result_uri):
            run = tracking.Run.open(config.tracking, config.name, record, parent_id)
            succeeded = False
            try:
                run.log_config(to_dict(config))
                if checkpoints.latest(config.output) != config.steps:
                    _fit(config, plan, run, callbacks)
                uri = checkpoints.checkpoint_uri(config.output, config.steps)
                state = checkpoints.read_state(uri)
                run.log_history(state)
                metrics = checkpoints.last_metrics(state)
                result = {"checkpoint": uri, "step": state["step"], "metrics": metrics}
                run.log_checkpoint(config.name, uri, result["step"], result["metrics"])
                storage.write_json(result_uri, result)
                succeeded = True
            finally:
                run.finish(succeeded)
    result = storage.read_json(result_uri)
    return TrainSummary(
        checkpoint=result["checkpoint"],
        step=result["step"],
        metrics=result["metrics"],
        run_id=storage.read_json(record)["run_id"],
        seconds=round(time.monotonic() - started, 1),
    )


def _fit(
    config: TrainConfig, plan: SamplePlan, run: tracking.Run, callbacks: Sequence[UserCallback]
) -> None:
    _check_resources(config)
    resumed = checkpoints.latest(config.output) or 0
    if resumed:
        logger.info("%s goes on from step %d", config.name, resumed)
    epochs = config.steps * config.global_batch / plan.num_clips
    logger.info(
        "%s: %d steps of %d clips, %.1f epochs of %d clips",
        config.name,
        config.steps,
        config.global_batch,
        epochs,
        plan.num_clips,
    )

    def work(job: WorkerJob) -> None:
        # Imported on the workers: this process and Ray Train's controller need no model, whose
        # libraries take seconds to load. A local function travels by value, so neither loads it.
        from pipelines.train_worker import train_worker

        train_worker(job)

    progress = Progress(config.name, config.steps, "steps", resumed)
    with ProgressChannel(progress) as channel:
        trainer = TorchTrainer(
            work,  # type: ignore[arg-type]
            train_loop_config={
                "config": config,
                "run_id": run.run_id,
                "tracking_uri": run.tracking_uri,
                "progress": channel.queue,
            },
            scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu),
            run_config=RunConfig(
                name="ray_train",
                storage_path=config.output,
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=list(callbacks),
            ),
            datasets={"train": ResumableFeed(config)},
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        )
        try:
            trainer.fit()
        except Exception as error:
            cause = root_cause(error)
            if cause is error or not isinstance(cause, EXPLAINED):
                raise
            raise cause from error
