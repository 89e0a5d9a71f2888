"""Training on Ray Train, fed by Ray Data; started again in the same folder, it resumes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow.fs
from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from pipelines import checkpoints, metrics_log, preflight, storage, tracking
from pipelines.board import put_up_board
from pipelines.config import flatten, to_dict
from pipelines.elastic import EvenSharesTrainer
from pipelines.faults import EXPLAINED, root_cause
from pipelines.feed import ResumableFeed, loader_config, make_plan, open_sources
from pipelines.plan import TrainPlan
from pipelines.progress import Progress, ProgressChannel
from pipelines.sources import check_source, digest_of_all
from pipelines.stopping import EndOnExplained, NoticeSigterm, stopping_on_sigterm
from pipelines.train_config import TrainConfig
from pipelines.validation import check_validation, metric_name, validates
from stgt.errors import CheckpointError, ClipStoreError, StoppedError
from stgt.text import Tokenizer

if TYPE_CHECKING:
    from pipelines.train_worker import WorkerJob

logger = logging.getLogger(__name__)

CONFIG = "config.json"
RESULT = "result.json"
NOT_IDENTITY = frozenset(
    {
        "allow_changes",
        "block_clips",
        "cache_dir",
        "cache_gb",
        "checkpoint_every",
        "compile",
        "data",  # what it holds is compared, not where it lies
        "keep_checkpoints",
        "max_bad_fraction",
        "max_failures",
        "max_stall_s",
        "micro_batch",
        "min_workers",
        "num_loaders",
        "num_workers",
        "output",
        "progress_every",
        "record_samples",
        "threads_per_worker",
        "tracking",
        "use_gpu",
        "val_clips",
        "validate_every",
    }
)
"""Fields that a resumed run may change: they do not alter what is computed, but for rounding and
for which activations dropout drops."""
SHAPELESS = (
    "gradient_checkpointing",
    "graph.attention_dropout",
    "graph.similarity_threshold",
    "max_text_tokens",
    "qformer.dropout",
    "qformer.init_std",
    "temperature",
    "vision.frozen",
    "vision.init_std",
    "vision.unfreeze_last_blocks",
)
"""Settings of a model that leave the shapes of its weights alone."""


class TrainSummary(TypedDict):
    """What `run_train` made."""

    checkpoint: str
    """The last one."""
    best_checkpoint: str
    """The one with the highest validation metric; the last one without validation."""
    step: int
    metrics: dict[str, float]
    run_id: str | None
    """In MLflow; None when its server never answered."""
    seconds: float


def _resolved(config: TrainConfig) -> TrainConfig:
    """The same config with absolute paths, and with the model's sizes for its vocabulary."""

    def there(uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)

    tokenizer = Tokenizer(config.vocab)
    vocab = storage.resolve(config.vocab) if Path(config.vocab).is_file() else config.vocab
    return replace(
        config,
        data=tuple(storage.resolve(uri) for uri in config.data),
        output=storage.resolve(config.output),
        init_from=there(config.init_from),
        val_store=there(config.val_store),
        test_store=there(config.test_store),
        cache_dir=there(config.cache_dir),
        vocab=vocab,
        model=config.model.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id),
        tracking=tracking.resolve(config.tracking),
    )


def _claim_run(config: TrainConfig, digest: str) -> None:
    """Write the run's config, or check that a resumed run computes the same from the same clips."""
    uri = storage.join(config.output, CONFIG)
    # A store gets other shards when clips come out of its quarantine: the order of clips changes.
    values = {**json.loads(json.dumps(to_dict(config))), "data_digest": digest}
    # A start that was refused or came to no checkpoint binds nobody.
    begun = checkpoints.latest(config.output) is not None
    if not storage.exists(uri) or not begun:
        storage.write_json(uri, values)
        return
    before, now = flatten(storage.read_json(uri)), flatten(values)
    differing = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name.split(".")[0] not in NOT_IDENTITY
    ]
    if differing and not config.allow_changes:
        raise CheckpointError(
            f"{config.output} holds a run with other settings ({'; '.join(differing)}); choose "
            "another --output, or add --allow-changes to go on with these"
        )
    if differing:
        logger.warning("going on with other settings: %s", "; ".join(differing))
        storage.remove(storage.join(config.output, RESULT))
    storage.write_json(uri, values)


def check_inputs(config: TrainConfig) -> tuple[TrainPlan, str]:
    """The plan of a training, and a digest of its clips, once they are found to suit it.

    Raises:
        ClipStoreError: a store is missing, too small, or holds other frames than needed.
        ManifestError: a manifest cannot be used.
    """
    digests = [
        check_source(uri, config.model.vision.image_size, config.num_frames, config.resize)
        for uri in config.data
    ]
    loader = loader_config(config)
    sources = open_sources(loader)
    first = sum(sources[0].shard_sizes)
    if config.hold_out >= first:
        raise ClipStoreError(
            f"hold_out = {config.hold_out}: {config.data[0]} holds {first} clips; none would be "
            "left to train on"
        )
    plan = make_plan(sources, loader)
    if plan.num_clips < config.global_batch:
        raise ClipStoreError(
            f"{', '.join(config.data)}: {plan.num_clips} clips to train on, fewer than one global "
            f"batch of {config.global_batch}; lower global_batch or ingest more clips"
        )
    check_validation(config)
    return plan, digest_of_all(digests)


def _check_init(config: TrainConfig) -> None:
    """Check that the checkpoint to begin with is whole, and of this model's sizes."""
    if config.init_from is None:
        if config.model.vision.frozen:
            raise CheckpointError(
                "model.vision.frozen without init_from: the frame encoder would stay at random; "
                "give init_from a folder with its weights, or set model.vision.frozen = False"
            )
        return
    checkpoints.require(config.init_from)
    theirs = flatten(storage.read_json(storage.join(config.init_from, "config.json"))["model"])
    ours = flatten(json.loads(json.dumps(config.model.to_dict())))
    differing = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted(ours.keys() | theirs.keys())
        if theirs.get(name) != ours.get(name) and name not in SHAPELESS
    ]
    if differing:
        raise CheckpointError(
            f"{config.init_from} is of a model of another size ({'; '.join(differing)}); set "
            "--model.* to its sizes, or begin with another checkpoint"
        )


def run_train(
    config: TrainConfig,
    parent_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
    estimate: bool = True,
) -> TrainSummary:
    """Train one stage, or go on with it, or give its result when it is finished.

    Args:
        config: what to train.
        parent_id: MLflow run that this one is shown under.
        callbacks: Ray Train callbacks, such as Tune's.
        estimate: say what the run needs and how long it takes before it starts.

    Raises:
        STGTError: the store, the checkpoint or a loss is not usable; or the run was told to stop.
        ValueError: the config does not fit the store or the cluster.
    """
    started = time.monotonic()
    config = _resolved(config)
    plan, digest = check_inputs(config)
    config = replace(config, steps=config.steps_for(plan.num_clips))
    _check_init(config)
    with storage.lock(config.output):
        _claim_run(config, digest)
        result_uri = storage.join(config.output, RESULT)
        if not storage.exists(result_uri):
            _train(config, plan, parent_id, callbacks, estimate)
        result = storage.read_json(result_uri)
        if not result["tracked"]:
            run = _open_run(config, parent_id)
            if run is not None and _finish(config, run, result):
                result["tracked"] = True
                storage.write_json(result_uri, result)
    record = storage.join(config.output, checkpoints.RUN)
    return TrainSummary(
        checkpoint=result["checkpoint"],
        best_checkpoint=result["best_checkpoint"],
        step=result["step"],
        metrics=result["metrics"],
        run_id=storage.read_json(record)["run_id"] if storage.exists(record) else None,
        seconds=round(time.monotonic() - started, 1),
    )


def _open_run(config: TrainConfig, parent_id: str | None) -> tracking.Run | None:
    """The run in MLflow; None, with a word, when its server does not answer."""
    kept = storage.join(config.output, metrics_log.FOLDER)
    return tracking.Run.open_if_reachable(
        config.tracking,
        config.name,
        storage.join(config.output, checkpoints.RUN),
        to_dict(config),
        parent_id,
        meanwhile=f"training goes on, its metrics are kept in {kept} and sent when it can be "
        "reached",
    )


def _train(
    config: TrainConfig,
    plan: TrainPlan,
    parent_id: str | None,
    callbacks: Sequence[UserCallback],
    estimate: bool,
) -> None:
    run = _open_run(config, parent_id)
    succeeded = False
    try:
        done = checkpoints.latest(config.output) or 0
        _consider_all(config)  # a kill may have come between a checkpoint and the note of the best
        if done > config.steps:
            raise CheckpointError(
                f"{config.output} is at step {done}, beyond the {config.steps} that are asked for; "
                "give more steps, or choose another --output"
            )
        if done < config.steps:
            _fit(config, plan, parent_id, callbacks, estimate)
        rows = metrics_log.read(config.output, config.steps)
        _consider_all(config)
        best = checkpoints.best(config.output) if validates(config) else None
        uri = checkpoints.checkpoint_uri(config.output, config.steps)
        result: dict[str, Any] = {
            "checkpoint": uri,
            "best_checkpoint": uri
            if best is None
            else checkpoints.checkpoint_uri(config.output, best["step"]),
            "best": best,
            "step": config.steps,
            "metrics": rows[-1]["metrics"] if rows else {},
            "tracked": False,
        }
        storage.write_json(storage.join(config.output, RESULT), result)
        succeeded = True
    finally:
        if run is not None and not succeeded:
            run.fail()


def _consider_all(config: TrainConfig) -> None:
    """Note the best of the complete checkpoints that were validated."""
    metric = metric_name(config)
    for step in checkpoints.complete_steps(config.output):
        rows = metrics_log.read(config.output, step)
        if rows and metric in rows[-1]["metrics"]:
            checkpoints.consider(config.output, step, metric, rows[-1]["metrics"][metric])


def _finish(config: TrainConfig, run: tracking.Run, result: dict[str, Any]) -> bool:
    """Send what MLflow does not have yet of a finished run, and close it."""
    if not metrics_log.send(config.output, run, result["step"])["complete"]:
        return False
    try:
        run.log_checkpoint(config.name, result["checkpoint"], result["step"], result["metrics"])
        best = result["best"]
        if best is not None:
            name = f"{config.name}_best"
            values = {f"best/{best['metric']}": best["value"]}
            run.log_checkpoint(name, result["best_checkpoint"], best["step"], values, final=False)
        run.finish(succeeded=True)
    except tracking.UnreachableError as error:
        logger.warning("%s; run the same command again to enter the checkpoint", error)
        return False
    return True


def _fit(
    config: TrainConfig,
    plan: TrainPlan,
    parent_id: str | None,
    callbacks: Sequence[UserCallback],
    estimate: bool,
) -> None:
    preflight.check_cluster(config)
    resumed = checkpoints.latest(config.output) or 0
    if resumed:
        logger.info("%s goes on from step %d", config.name, resumed)
    if estimate:
        footprint = preflight.estimate(config)
        preflight.check_space(config, footprint)
        preflight.announce(config, footprint, plan.num_clips, resumed)
    if not validates(config):
        logger.warning(
            "nothing to validate on: the last checkpoint is the result; --val-store or --hold-out "
            "would choose the best"
        )
    if config.select_on == "test":
        logger.warning(
            "the best checkpoint is chosen on the test clips, as published: its figures there "
            "flatter it"
        )

    def work(job: WorkerJob) -> None:
        # Imported on the workers: Ray Train's controller needs no model, whose libraries take
        # seconds to load. A local function travels by value, so it does not load it.
        from pipelines.train_worker import train_worker

        train_worker(job)

    progress = Progress(config.name, config.steps, "steps", resumed)
    workers = config.num_workers
    board = put_up_board()
    with ProgressChannel(progress) as channel, stopping_on_sigterm(board) as asked:
        trainer = EvenSharesTrainer(
            work,
            worlds=config.worlds,
            train_loop_config={
                "config": config,
                "parent_id": parent_id,
                "progress": channel.queue,
                "board": board,
            },
            scaling_config=ScalingConfig(
                num_workers=workers
                if config.min_workers is None
                else (config.min_workers, workers),
                use_gpu=config.use_gpu,
                resources_per_worker={
                    "CPU": config.threads_per_worker,
                    **({"GPU": 1} if config.use_gpu else {}),
                },
            ),
            run_config=RunConfig(
                name="ray_train",
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=[*callbacks, EndOnExplained(), NoticeSigterm()],  # type: ignore[list-item]
                **_ray_storage(config.output),
            ),
            datasets={"train": ResumableFeed(config, board)},
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        )
        try:
            trainer.fit()
        except Exception as error:
            cause = root_cause(error)
            if cause is error or not isinstance(cause, EXPLAINED):
                raise
            raise cause from error
    done = checkpoints.latest(config.output) or 0
    if done < config.steps:
        why = "SIGTERM" if asked.is_set() else "a request"
        raise StoppedError(
            f"{config.name} stopped at step {done} of {config.steps} by {why}, with a checkpoint; "
            "the same command goes on from there"
        )


def _ray_storage(output: str) -> dict[str, Any]:
    """Where Ray Train keeps its own state: beside the run's, in a file system that it can use."""
    if storage.is_local(output):
        return {"storage_path": output}
    # Ray would look for the endpoint and credentials in other places than the rest of the run.
    fs, path = storage.filesystem(output)
    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return {"storage_path": path, "storage_filesystem": wrapped}
