"""The way every job runs: command line, Ray when it is needed, one JSON line, an exit code."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

from jobs.command_line import Options, print_and_exit, read_command_line
from jobs.settings import CommandLine
from stgt.errors import STGTError, StoppedError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143
"""The exit code after SIGTERM."""
EXIT_BROKEN_PIPE = 141
"""The exit code after SIGPIPE: nobody reads the output any more."""
OBJECT_STORE_BYTES = 300 * 1024**2

_SETTINGS = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the pipelines print progress of their own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray looks every 2 s; the start, the end and the death of a worker all wait for the next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A group is either placed at once or asks for a node that is gone, which Ray notices after some
    # 15 s: an elastic run then starts with fewer workers, and any other run asks again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",  # workers share the cores; the configs set torch's own threads
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
_QUIET_SETTINGS = {
    "RAY_BACKEND_LOG_LEVEL": "error",  # hides warnings of Ray's core on arguments of actors
    "RAY_worker_maximum_startup_concurrency": "16",  # Ray warns of four times as many processes
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints a banner otherwise
}
"""Settings that keep Ray's own lines out of a job's output; `--verbose` leaves them out."""


Summary: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What a job prints: one JSON line, or several."""


@dataclass(frozen=True)
class ClusterSize:
    """What a local Ray cluster has to offer a job."""

    cpus: int
    """Minimum number of CPUs. With fewer cores, workers take turns."""
    dashboard: bool = False
    """Whether the cluster has a dashboard, on loopback."""
    object_store_bytes: int = 0
    """Minimum size of the object store."""


@dataclass(frozen=True)
class Job:
    """A command: `python -m jobs.NAME`."""

    name: str
    summary: str
    """One line on what it does."""
    command_line: CommandLine
    target: str
    """The function that does the work, as `MODULE:FUNCTION`; it takes the config and returns the
    summary that is printed. A job with a cluster gives it `connect` as well."""
    cluster: Callable[[Any], ClusterSize] | None = None
    """The Ray cluster that a config needs; None for a job that needs no Ray."""
    verdict: Callable[[Any, Any], str | None] = lambda config, summary: None
    """Why the job failed although it has a summary; None when it did not fail."""

    def load_target(self) -> Callable[..., Summary]:
        """Import the function that does the work."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


def main(job: Job) -> None:
    """Run a job: parse the command line, do the work, print the summary and exit."""
    with_quiet_pipe(lambda: _main(job))


def _main(job: Job) -> None:
    config, options = read_command_line(job.name, job.command_line, sys.argv[1:])
    set_up_process(options.verbose)

    def work() -> Summary:
        timeline = _start_timeline(options)
        with timeline.span(f"import {job.target.partition(':')[0]}"):
            run = job.load_target()
        settings = {}
        if job.cluster is not None:
            settings["connect"] = functools.partial(_connect, job.cluster, options.verbose)
        try:
            return run(config, **settings)
        finally:
            timeline.write()

    run_job(work, lambda summary: job.verdict(config, summary))


def _connect(cluster: Callable[[Any], ClusterSize], verbose: bool, config: Any) -> None:
    """Have a Ray cluster for a config, in whichever process needs it."""
    set_up_process(verbose)
    size = cluster(config)
    start_ray(size.cpus, size.dashboard, size.object_store_bytes, verbose)


def _start_timeline(options: Options) -> Any:
    from pipelines.common import timeline

    return timeline.start(options.timeline)


def with_quiet_pipe(work: Callable[[], None]) -> None:
    """Run work that prints, and exit without a traceback when nobody reads the output any more."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)


def start_ray(
    cpus: int, dashboard: bool = False, object_store_bytes: int = 0, verbose: bool = False
) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one in this process; at most once.

    Args:
        cpus: minimum number of CPUs of a local cluster. With fewer cores, workers take turns.
        dashboard: whether a local cluster has its dashboard, on loopback.
        object_store_bytes: minimum size of a local cluster's object store.
        verbose: show Ray's own log lines and those of its workers.
    """
    from pipelines.common import timeline

    with timeline.span("import ray.data"):
        import ray
        from ray.data import DataContext

    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    with timeline.span("start Ray"):
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level=level, log_to_driver=verbose)
        else:
            logging.getLogger(__name__).info("starting a local Ray cluster")
            ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                object_store_memory=max(OBJECT_STORE_BYTES, object_store_bytes),
                include_dashboard=dashboard,
                logging_level=level,
                log_to_driver=verbose,
            )
    if verbose:
        return
    DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def set_up_process(verbose: bool = False) -> None:
    """Configure logging, and make settings of libraries that the user has not made.

    Args:
        verbose: keep the log lines of libraries.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    settings = _SETTINGS if verbose else {**_SETTINGS, **_QUIET_SETTINGS}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if verbose:
        return
    for name in ("alembic", "mlflow", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")


def run_job(
    work: Callable[[], Summary], verdict: Callable[[Summary], str | None] = lambda summary: None
) -> None:
    """Do a job's work, print its summary as JSON lines, and exit with its exit code.

    Args:
        work: returns the summary.
        verdict: why the job failed although it has a summary; None when it did not fail.
    """
    interrupts: list[int] = []

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        interrupts.append(signal_number)
        raise KeyboardInterrupt

    # A library that is interrupted while it is imported may turn that into an error of its own.
    signal.signal(signal.SIGINT, interrupt)
    try:
        summary = work()
    except KeyboardInterrupt:
        print_and_exit(_interrupted(), EXIT_INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as error:
        if interrupts:
            print_and_exit(_interrupted(), EXIT_INTERRUPTED)
        stopped = isinstance(error, StoppedError)
        print_and_exit(_explain(error), EXIT_STOPPED if stopped else EXIT_FAILED)
    else:
        for line in [summary] if isinstance(summary, Mapping) else summary:
            print(json.dumps(dict(line)), flush=True)
        if (failed := verdict(summary)) is not None:
            print_and_exit(failed, EXIT_FAILED)


def _interrupted() -> str:
    without = " without --fresh" if "--fresh" in sys.argv else ""
    return f"interrupted; run the same command{without} again to continue"


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
