"""Records checkpoints in MLflow as logged models that say where the weights lie.

One of the modules that import mlflow. Such a model holds three small files instead of weights. If
it is registered and loaded, it says how to make a model that can be loaded.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common import checkpoint_pointer
from pipelines.common.config import without_credentials
from pipelines.common.run_details import CHECKPOINT_TAG, find_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric
    from mlflow.entities import Run as MlflowRun

POINTER = "checkpoint pointer"
"""Type of a logged model without weights."""
FINAL_TAG, BEST_TAG = "checkpoint_uri", "best_checkpoint_uri"
EARLIER_PREFIX = "checkpoint/"
"""Earlier versions repeated the metrics of a checkpoint under names with this prefix."""
METRICS_PER_CALL = 900


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of a training run."""

    name: str
    """Name of the logged model."""
    uri: str
    step: int
    metrics: Mapping[str, float]
    time_ms: int | None = None
    """When the metrics were measured. With the time under which the run has them already, MLflow
    enters them once; None takes it from the run's latest metrics."""
    size_bytes: int | None = None
    is_final: bool = True
    """Whether it is the run's last checkpoint, rather than its best."""

    @property
    def run_tag(self) -> str:
        """Tag of the run that names the checkpoint."""
        return FINAL_TAG if self.is_final else BEST_TAG

    @property
    def command(self) -> str:
        """Command that makes a loadable model of the checkpoint."""
        uri = without_credentials(self.uri)
        return f"python -m jobs.register {shlex.quote(uri)} --name NAME"


def log_checkpoint(client: MlflowClient, run_id: str, checkpoint: Checkpoint) -> None:
    """Record a checkpoint. Calling it again after an error continues where it ended.

    A checkpoint that is the last and the best one is one logged model.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    model = find_model(client, run, checkpoint.uri)
    named = run.data.tags.get(checkpoint.run_tag) == checkpoint.uri
    if named and (model is None or model.status == LoggedModelStatus.READY):
        return  # without a model: one that was deleted on purpose
    if model is None:
        model = client.create_logged_model(
            experiment_id=run.info.experiment_id,
            name=checkpoint.name,
            source_run_id=run_id,
            tags={CHECKPOINT_TAG: checkpoint.uri, "make_a_model": checkpoint.command},
            params={"step": str(checkpoint.step)},
            model_type=POINTER,
        )
    if model.status != LoggedModelStatus.READY:
        _log_metrics(client, run, model, checkpoint)
        outputs = [] if run.outputs is None else run.outputs.model_outputs
        if model.model_id not in [one.model_id for one in outputs]:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, checkpoint.step)])
    client.set_tag(run_id, checkpoint.run_tag, checkpoint.uri)
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as folder:
            write_pointer(Path(folder), checkpoint, model.model_id)
            client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _log_metrics(
    client: MlflowClient, run: MlflowRun, model: LoggedModel, checkpoint: Checkpoint
) -> None:
    from mlflow.entities import Metric

    latest: Sequence[Metric] = run.data._metric_objs  # with times, unlike `metrics`
    times = {one.key: one.timestamp for one in latest if one.step == checkpoint.step}
    now = int(time.time() * 1000)
    earlier = any(one.key.startswith(EARLIER_PREFIX) for one in latest)
    prefixes = ("", EARLIER_PREFIX) if earlier else ("",)
    metrics = [
        Metric(
            f"{prefix}{name}",
            value,
            checkpoint.time_ms or times.get(f"{prefix}{name}", now),
            checkpoint.step,
            model_id=model.model_id,
            run_id=run.info.run_id,
        )
        for prefix in prefixes
        for name, value in checkpoint.metrics.items()
    ]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def write_pointer(folder: Path, checkpoint: Checkpoint, model_id: str) -> None:
    """Write the files of a logged model that only says where its weights lie."""
    from mlflow.models import Model

    uri = without_credentials(checkpoint.uri)
    facts: dict[str, Any] = {
        "checkpoint": uri,
        "step": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
        "size_bytes": checkpoint.size_bytes,
        "make_a_model": checkpoint.command,
    }
    (folder / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(
        f"# {checkpoint.name}\n\nThis entry contains no weights. They are in `{uri}`.\n\n"
        f"To make a model that MLflow can load and serve, run `{checkpoint.command}`.\n",
        encoding="utf-8",
    )
    code = folder / "code"
    code.mkdir()
    source = Path(checkpoint_pointer.__file__)
    shutil.copyfile(source, code / source.name)
    model = Model(
        artifact_path=checkpoint.name,
        model_id=model_id,
        model_size_bytes=checkpoint.size_bytes,
        metadata={"checkpoint": uri, "contains_weights": False},
    )
    model.add_flavor("python_function", loader_module=source.stem, code=code.name)
    model.save(str(folder / "MLmodel"))
