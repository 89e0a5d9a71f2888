"""What all jobs share: logging, a Ray cluster when needed, one line for errors, exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from stgt.errors import STGTError, StoppedError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143
"""As after SIGTERM."""
OBJECT_STORE_BYTES = 300 * 1024**2

_SETTINGS = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the pipelines print progress of their own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray looks every 2 s; the start, the end and the death of a worker all wait for the next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A group is placed at once or meant for a node that is gone, which Ray knows after some 15 s:
    # an elastic run then starts with fewer workers, any other asks again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",  # workers share the cores; torch's own threads are set by the configs
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def start_ray(cpus: int, dashboard: bool = False, object_store_bytes: int = 0) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one in this process; at most once.

    Args:
        cpus: least number of CPUs a local cluster offers. On fewer cores workers take turns.
        dashboard: whether a local cluster has its dashboard, on loopback.
        object_store_bytes: least size of a local cluster's object store.
    """
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        logging.getLogger(__name__).info("starting a local Ray")
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            object_store_memory=max(OBJECT_STORE_BYTES, object_store_bytes),
            include_dashboard=dashboard,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quieten() -> None:
    """Log plainly, quieten libraries, and make settings of theirs that the user has not made."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for name in ("alembic", "mlflow", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def run_job(work: Callable[[], Mapping[str, Any]]) -> None:
    """Run a job's work, print its summary as one JSON line and leave with its exit code."""
    quieten()
    interrupts: list[int] = []

    def interrupt(signal_number: int, frame: object) -> None:
        interrupts.append(signal_number)
        raise KeyboardInterrupt

    # A library that is interrupted while it is imported may turn that into an error of its own.
    signal.signal(signal.SIGINT, interrupt)
    try:
        summary = work()
    except KeyboardInterrupt:
        _fail(_interrupted(), EXIT_INTERRUPTED)
    except Exception as error:
        if interrupts:
            _fail(_interrupted(), EXIT_INTERRUPTED)
        stopped = isinstance(error, StoppedError)
        _fail(_explain(error), EXIT_STOPPED if stopped else EXIT_FAILED)
    else:
        print(json.dumps(dict(summary)), flush=True)


def _interrupted() -> str:
    without = " without --fresh" if "--fresh" in sys.argv else ""
    return f"interrupted; the same command{without} goes on where it was"


def _explain(error: Exception) -> str:
    """One sentence for an expected error; anything else is a bug and keeps its traceback."""
    from pipelines.common.ray_errors import disk_is_full, root_cause

    cause = root_cause(error)
    if disk_is_full(error):
        said = str(cause).splitlines()[0][:200]
        return f"no space left on the disk ({said}); free some and run the same command again"
    if isinstance(cause, OSError) and cause.filename is not None:
        reason = (cause.strerror or "").lower()
        return f"{cause.filename} cannot be written or read: {reason}; choose another place"
    if isinstance(cause, OSError):
        return f"{cause}"
    if isinstance(cause, STGTError | ValueError):
        return f"{cause}"
    raise error


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
