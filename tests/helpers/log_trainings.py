"""Trainings without a model, which record as real ones do: `... FOLDER NUMBER=STEPS ...`.

One process each, at the same time. Each takes as many steps as it is told, writes the metrics of
every step beside its checkpoints, and sends them to MLflow while it goes on, through
`pipelines.train.metrics_sender`. Started again, it sends what MLflow lacks. The exit code is the
number of trainings of which MLflow still lacks something, or `FAILED`.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from pathlib import Path

import mlflow  # noqa: F401  # once, before the processes part

from pipelines.common.config import TrackingConfig
from pipelines.common.provenance import About, DatasetInput
from pipelines.common.recording import Recording
from pipelines.common.tracking import Run, StepMetrics, is_late
from pipelines.train import metrics_log
from pipelines.train.metrics_sender import MetricsSender

FAILED = 100
"""Exit code if a training ended with an error."""
CHECKPOINT_EVERY = 10
STEP_S = 0.1
SEND_EVERY_S = 0.3
REPORT = "report.html"


def name_of(number: int) -> str:
    return f"training_{number}"


def metrics_of(number: int, step: int) -> dict[str, float]:
    """What a training measures at a step."""
    loss = 1 + number + 4 * math.exp(-step / 20)
    found = {"loss": loss, "loss/itc": loss / 2, "lr": 1e-3 / step, "time/step_s": STEP_S}
    if step % CHECKPOINT_EVERY == 0:
        found["val/t2v/R1"] = float(number + step)
    return found


def report_of(number: int) -> bytes:
    """The page that a training leaves."""
    return f"<p>training {number}</p>".encode() * 1000


def values_of(number: int) -> dict[str, object]:
    """The config of a training."""
    return {"seed": number, "optim": {"lr": 1e-3}, "global_batch": 16}


def about(number: int) -> About:
    """What a training knows about its run."""
    data = DatasetInput(
        uri=f"s3://bucket/clips/{number}",
        kind="clip store",
        digest=f"{number:012d}",
        context="training",
        clips=1000 + number,
    )
    return About(
        job="train",
        summary=f"Trains nothing, as number {number} of several trainings of a test.",
        recipe="pretrain_stage1_tiny",
        datasets=(data,),
        fingerprints={"data": data.digest},
        step="trained",
    )


def train(
    folder: Path,
    number: int,
    steps: int,
    *,
    tracking: TrackingConfig | None = None,
    parent_id: str | None = None,
    step_s: float = STEP_S,
) -> bool:
    """Take the steps unless they were taken, and send what MLflow lacks.

    Args:
        folder: where each training has a folder.
        number: which training, and its seed.
        steps: a multiple of `CHECKPOINT_EVERY`.
        tracking: where it is recorded; as the environment says, by default.
        parent_id: MLflow run that it belongs to.
        step_s: time of a step.

    Returns:
        Whether MLflow has everything.
    """
    output = str(folder / name_of(number))
    recording = Recording(
        tracking or TrackingConfig(),
        name_of(number),
        f"{output}/mlflow_run.json",
        values_of(number),
        parent_id,
        meanwhile="the training continues",
        about=about(number),
    )
    if metrics_log.steps(output)[-1:] != [steps]:
        with recording.running():
            _take_steps(output, recording, number, steps, step_s)
    sender = MetricsSender(output, recording, SEND_EVERY_S, steps)
    recording.deliver(sender.send_to)

    last = metrics_log.read(output, steps)[-1]

    def checkpoint(run: Run) -> None:
        uri = f"{output}/checkpoints/step-{steps}"
        run.log_checkpoint(
            name_of(number), uri, steps, last["metrics"], time_ms=last["time_ms"], size_bytes=1000
        )

    recording.deliver(checkpoint, "files")
    recording.deliver(lambda run: run.log_file(REPORT, report_of(number)), "files")
    return recording.finish()


def _take_steps(output: str, recording: Recording, number: int, steps: int, step_s: float) -> None:
    waiting: list[metrics_log.StepRecord] = []
    with MetricsSender(output, recording, SEND_EVERY_S) as sender:
        for step in range(1, steps + 1):
            time.sleep(step_s)
            metrics, time_ms = metrics_of(number, step), int(time.time() * 1000)
            early = {name: value for name, value in metrics.items() if not is_late(name)}
            sender.add([StepMetrics(step=step, time_ms=time_ms, metrics=early)])
            waiting.append({"step": step, "time_ms": time_ms, "metrics": metrics})
            if step % CHECKPOINT_EVERY == 0:
                metrics_log.write(output, waiting)
                sender.checkpoint(step)
                waiting = []


def main() -> None:
    """Start the trainings at the same time, and wait for them."""
    folder = Path(sys.argv[1])
    trainings = [tuple(map(int, word.split("="))) for word in sys.argv[2:]]
    # Forked, since importing MLflow in every process would take most of the time of a test.
    context = multiprocessing.get_context("fork")
    complete = context.Array("b", len(trainings))

    def work(place: int, number: int, steps: int) -> None:
        complete[place] = train(folder, number, steps)

    processes = [
        context.Process(target=work, args=(place, *training))
        for place, training in enumerate(trainings)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(FAILED)
    sys.exit(list(complete).count(0))


if __name__ == "__main__":
    main()
