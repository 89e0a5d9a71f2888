"""Reports progress to the driver, and writes metrics, used samples and checkpoints.

Rank 0 writes for all workers. Metrics are kept beside the checkpoint that follows their steps. The
driver also receives them after every step and sends them to MLflow (`metrics_sender`).
"""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow as pa
import pynvml
import torch
from ray.exceptions import RayError
from ray.util.queue import Full, Queue

from pipelines.artifacts import checkpoints
from pipelines.artifacts.vocabulary import open_tokenizer
from pipelines.common import storage
from pipelines.common.tracking import StepMetrics
from pipelines.train import metrics_log, run_folder
from pipelines.train.config import TrainConfig
from stgt.errors import ClipStoreError

if TYPE_CHECKING:
    from pipelines.train.job import WorkerJob
from pipelines.train.collective import agreed, gathered
from pipelines.train.state import WorkerState

logger = logging.getLogger(__name__)

MIN_JUDGED = 100
"""Minimum number of clips before the fraction of bad clips is compared with its limit."""

SAMPLES = pa.schema(
    [
        ("step", pa.int64()),
        ("position", pa.int64()),
        ("clip_id", pa.string()),
        ("fault", pa.string()),
    ]
)


class Sample(TypedDict):
    """One clip that was used, or skipped because of a fault."""

    step: int
    position: int
    clip_id: str
    fault: str


class Recorder:
    """Collects the results of the steps since the last checkpoint; each worker has one."""

    def __init__(self, job: WorkerJob, rank: int, skipped: int, step: int) -> None:
        self._config: TrainConfig = job["config"]
        self._progress: Queue | None = job["progress"]
        self._rank = rank
        self._rows: list[metrics_log.StepRecord] = []
        self._samples: list[Sample] = []
        self._skipped = self._skipped_before = skipped
        self._begun_at = step
        self._examples: list[Sample] = []
        self._waited_s = 0.0
        self._busy_s = 0.0
        self._is_first = True
        self.tokenizer = open_tokenizer(self._config.vocab)
        if rank == 0:
            metrics_log.forget_after(self._config.output, step)
            for folder in ("samples", "skipped"):
                _forget_after(storage.join(self._config.output, folder), step)

    def used(self, samples: list[Sample]) -> None:
        """Record which clips of this worker a step used."""
        if self._config.record_samples:
            self._samples += samples
        else:
            self._samples += [sample for sample in samples if sample["fault"]]

    def step(self, step: int, values: dict[str, float], waited_s: float, step_s: float) -> None:
        """Record a step's metrics, equal on all workers, and report progress at intervals."""
        if self._is_first:  # the first wait is the start of the data workers, not their speed
            self._is_first = False
            step_s, waited_s = step_s - waited_s, 0.0
        self._waited_s += waited_s
        self._busy_s += step_s
        wait_share = self._waited_s / self._busy_s
        rate = self._config.global_batch / step_s
        row = {
            **values,
            "time/step_s": step_s,
            "time/clips_per_s": rate,
            "time/data_wait_share": wait_share,
        }
        row = {self._name(name): value for name, value in row.items()}
        self._rows.append({"step": step, "time_ms": int(time.time() * 1000), "metrics": row})
        self._send_latest(row, waited_s=waited_s)
        if self._rank == 0 and (
            step % self._config.progress_every == 0 or step == self._config.steps
        ):
            self._tell(step, row)

    def _tell(self, step: int, row: dict[str, float]) -> None:
        recent = self._rows[-self._config.progress_every :]
        seconds = sum(one["metrics"]["time/step_s"] for one in recent)
        figures = {
            "clips/s": f"{len(recent) * self._config.global_batch / seconds:.1f}",
            "loss": f"{row['loss/total']:.3f}",
            **{
                name.removeprefix("loss/"): f"{value:.3f}"
                for name, value in row.items()
                if name.startswith("loss/") and name != "loss/total"
            },
            "lr": f"{row['lr']:.1e}",
            "data wait": f"{100 * row['time/data_wait_share']:.0f} %",
        }
        if (memory := row.get(self._name("resources/gpu_memory_gb"))) is not None:
            figures["GPU"] = f"{memory:.1f} GB"
        if (busy := row.get(self._name("resources/gpu_utilization"))) is not None:
            figures["GPU busy"] = f"{busy:.0f} %"
        self.send_progress({"done": step, **figures})

    def _name(self, metric: str) -> str:
        return metrics_log.name_for(metric, self._config.metric_names)

    def add(self, values: dict[str, float], measured_on: metrics_log.MeasuredOn) -> None:
        """Add validation metrics, and what they were measured on, to the latest step."""
        self._rows[-1]["metrics"].update(values)
        self._rows[-1]["measured_on"] = measured_on
        self._send_latest(values)

    def checkpoint(self, state: WorkerState) -> dict[str, float]:
        """Write a checkpoint and return the metrics of its step. All workers must call this.

        Raises:
            Exception: Writing failed on rank 0; all workers raise the same error.
            ClipStoreError: Too many clips could not be used.
        """
        samples: list[Sample] = gathered(self._samples)
        skipped = [sample for sample in samples if sample["fault"]]
        self._skipped += len(skipped)
        self._samples = []
        values = self._rows[-1]["metrics"]
        values[self._name("samples/skipped")] = float(self._skipped)
        error: Exception | None = None
        if self._rank == 0:
            try:
                self._write(state, samples, skipped, values)
            except Exception as caught:
                error = caught
        error = agreed(error) or self._too_many_bad(state.step, skipped)
        if error is not None:
            raise error
        self._rows = []
        return values

    def _write(
        self,
        state: WorkerState,
        samples: list[Sample],
        skipped: list[Sample],
        values: dict[str, float],
    ) -> None:
        config, step = self._config, state.step
        if config.record_samples:
            _write_samples(config, step, samples)
        if skipped:
            uri = storage.join(config.output, "skipped", f"{step:08d}.json")
            storage.write_json(uri, sorted(skipped, key=lambda one: one["position"]))
        metrics_log.write(config.output, self._rows)
        uri = run_folder.checkpoint_uri(config.output, step)
        checkpoints.save(
            uri,
            state.model,
            self.tokenizer,
            step,
            state.optimizer,
            state.frame_encoder,
            state.scaler.state_dict(),
            self._skipped,
        )
        if change := run_folder.record_if_best(config, self._rows[-1]):
            self.send_progress({"say": change})
        run_folder.prune(config.output, config.keep_checkpoints)
        self.send_progress({"checkpoint": step})

    def _too_many_bad(self, step: int, skipped: list[Sample]) -> ClipStoreError | None:
        # Counted from the start of these workers: videos may have been repaired before it.
        used = (step - self._begun_at) * self._config.global_batch
        bad = self._skipped - self._skipped_before
        self._examples = (self._examples + skipped)[:3]
        if used < MIN_JUDGED or bad / used <= self._config.max_bad_fraction:
            return None
        examples = "; ".join(f"{one['clip_id']}: {one['fault']}" for one in self._examples)
        return ClipStoreError(
            f"{bad} of {used} clips could not be used, more than max_bad_fraction = "
            f"{self._config.max_bad_fraction:g} allows (for example {examples}); see "
            f"{storage.join(self._config.output, 'skipped')}, fix the videos or ingest them first"
        )

    def _send_latest(self, metrics: dict[str, float], **further: float) -> None:
        """Send metrics of the latest step to the driver, which sends them to MLflow."""
        latest = self._rows[-1]
        row = StepMetrics(step=latest["step"], time_ms=latest["time_ms"], metrics=dict(metrics))
        if self._rank == 0 and self._progress is not None and self._progress.actor is not None:
            # Nobody waits for the answer. If the message is lost, the driver finds the metrics
            # beside the next checkpoint.
            self._progress.actor.put_nowait.remote({"rows": [row], **further})

    def send_progress(self, message: dict[str, Any]) -> None:
        """Send a progress message to the driver without waiting."""
        if self._progress is None:
            return
        try:
            self._progress.put_nowait(message)
        except Full:
            logger.warning("the progress queue is full; dropped the message %s", message)
        except RayError as error:
            logger.warning("cannot reach the driver, so progress is no longer shown: %s", error)
            self._progress = None


def _forget_after(folder: str, step: int) -> None:
    """Delete the files of steps that will be repeated."""
    for name in storage.list_names(folder):
        if name.split(".")[0].isdigit() and int(name.split(".")[0]) > step:
            storage.remove(storage.join(folder, name))


def _write_samples(config: TrainConfig, step: int, samples: list[Sample]) -> None:
    ordered = sorted(samples, key=lambda one: one["position"])
    storage.write_table(
        storage.join(config.output, "samples", f"{step:08d}.parquet"),
        pa.Table.from_pylist([dict(one) for one in ordered], schema=SAMPLES),
    )


def gpu_figures(device: torch.device) -> dict[str, float]:
    """Return peak memory and utilization of a GPU; empty for a CPU."""
    if device.type != "cuda":
        return {}
    figures = {"resources/gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    try:
        figures["resources/gpu_utilization"] = float(torch.cuda.utilization(device))
    except (RuntimeError, pynvml.NVMLError) as error:
        _warn_no_utilization(str(error))
    return figures


@functools.cache
def _warn_no_utilization(why: str) -> None:
    """Warn once that a GPU, such as some virtual ones, does not report its utilization."""
    logger.warning("the GPU does not report its utilization: %s", why)
