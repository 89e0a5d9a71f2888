"""Runs a job: parses its command line, starts Ray, prints a JSON line, sets the exit code."""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeAlias

from jobs.command_line import EXIT_USAGE, Options, print_and_exit, read_command_line
from jobs.credentials import take_from_command_line
from jobs.joining import ADDRESS, join_cluster
from jobs.settings import CommandLine
from pipelines.common.redaction import RedactingFormatter, without_secrets
from pipelines.common.termination import (
    EXIT_SIGTERM,
    exit_on_sigterm,
    keeping_sigterm_handler,
    received,
)
from stgt.errors import STGTError, StoppedError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""Exit code after SIGPIPE, when the reader of the output is gone."""
OBJECT_STORE_BYTES = 300 * 1024**2
LATE_START = "timed out during startup"
"""Part of the message with which Ray gives up waiting for its own processes."""
RAY_START_WAIT = "RAY_raylet_start_wait_time_s"
"""Environment variable with the seconds that Ray waits for its own processes."""
NATIVE_STDERR = 2
"""File descriptor that native code prints errors to."""

_SETTINGS = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the pipelines log their own progress
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray checks workers every 2 s by default, which delays their start, end and loss.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # On a busy machine, Ray's processes need more than the 30 s for which it waits by default.
    RAY_START_WAIT: "120",
    # A group is either placed at once, or it requests a node that is gone, which Ray notices after
    # approximately 15 s. An elastic run then starts with fewer workers; other runs request again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # A trial that was stopped is killed after this time; it has nothing left to do.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "2",
    # A trial that diverges before its first validation reports no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics are in the folders of trials and in MLflow
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",  # workers share the cores; the configs set the threads of torch
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
_QUIET_SETTINGS = {
    "RAY_worker_maximum_startup_concurrency": "16",  # Ray warns about four times as many processes
    "RAY_AIR_NEW_OUTPUT": "0",  # otherwise Tune prints a banner
}
"""Settings that keep Ray's log lines out of a job's output; unused with `--verbose`."""


Summary: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Result of a job, printed as one or several JSON lines."""


@dataclass(frozen=True)
class ClusterSize:
    """Resources that a job needs from a local Ray cluster."""

    cpus: int
    """Minimum number of CPUs. If the machine has fewer cores, workers share them."""
    dashboard: bool = False
    """Whether to start the dashboard, on the loopback interface."""
    object_store_bytes: int = 0
    """Minimum size of the object store, in bytes."""


@dataclass(frozen=True)
class Job:
    """A job, which is run by `python -m jobs.NAME`."""

    name: str
    summary: str
    """One-line summary of the job."""
    command_line: CommandLine
    target: str
    """Function that does the work, as `MODULE:FUNCTION`. It takes the config, and `connect` if the
    job needs a cluster, and returns the summary to print."""
    cluster: Callable[[Any], ClusterSize] | None = None
    """Returns the cluster size that a config needs; None for a job without Ray."""
    verdict: Callable[[Any, Any], str | None] = lambda config, summary: None
    """Returns why a job with a summary failed; None if it did not fail."""

    def load_target(self) -> Callable[..., Summary]:
        """Import the function that does the work."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


def main(job: Job) -> None:
    """Run a job: parse the command line, do the work, print the summary and exit."""
    take_from_command_line()
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

    output = sys.stdout
    # Ray prints errors of nodes to standard output, until the process ends. Only the summary
    # belongs there.
    sys.stdout = sys.stderr
    try:
        run_job(work, lambda summary: job.verdict(config, summary), output)
    finally:
        if "ray" not in sys.modules:
            sys.stdout = output


def _connect(cluster: Callable[[Any], ClusterSize], verbose: bool, config: Any) -> None:
    """Connect this process to a Ray cluster that suits a config."""
    set_up_process(verbose)
    if not verbose:
        _hide_native_lines()
    size = cluster(config)
    start_ray(size.cpus, size.dashboard, size.object_store_bytes, verbose)
    if os.environ.get(ADDRESS):
        from pipelines.submit.visibility import require_visible

        require_visible(config)


def _hide_native_lines() -> None:
    """Keep what native code prints on standard error, such as Ray's core, out of the output.

    Ray's core prints warnings there that users can do nothing about; its errors are in the log
    files of the Ray session as well. Python keeps writing to the original standard error.
    """
    if sys.stderr.fileno() != NATIVE_STDERR:
        return  # hidden already
    original = os.fdopen(os.dup(NATIVE_STDERR), "w", buffering=1)
    faulthandler.enable(original)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(original)
    if sys.stdout is sys.stderr:
        sys.stdout = original
    sys.stderr = original
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, NATIVE_STDERR)
    os.close(nowhere)


def _start_timeline(options: Options) -> Any:
    from pipelines.common import timeline

    if options.timeline is not None and Path(options.timeline).is_dir():
        print_and_exit(f"--timeline {options.timeline} is a folder; give a file", EXIT_USAGE)
    return timeline.start(options.timeline)


def with_quiet_pipe(work: Callable[[], None]) -> None:
    """Run work that prints; exit without a traceback when the reader of the output is gone."""
    output = sys.stdout
    try:
        work()
        output.flush()
    except BrokenPipeError:
        # Python flushes standard output again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        sys.exit(EXIT_BROKEN_PIPE)


@contextmanager
def _late_start_explained() -> Iterator[None]:
    """Say in one sentence that Ray gave up waiting for its own processes, and what to do.

    Raises:
        STGTError: Its processes did not start in time.
    """
    try:
        yield
    except Exception as error:  # Ray raises no narrower class
        if LATE_START not in str(error):
            raise
        waited_s = os.environ.get(RAY_START_WAIT, "30")
        raise STGTError(
            f"Ray did not start within {waited_s} s; probably this machine is too busy or has too "
            "little free memory; start the same command again when it has less to do, or let Ray "
            f"wait longer by setting {RAY_START_WAIT}"
        ) from error


def start_ray(
    cpus: int, dashboard: bool = False, object_store_bytes: int = 0, verbose: bool = False
) -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one, unless already connected.

    Args:
        cpus: Minimum number of CPUs of a local cluster. With fewer cores, workers share them.
        dashboard: Whether a local cluster starts the dashboard, on the loopback interface.
        object_store_bytes: Minimum size of a local cluster's object store.
        verbose: Whether to show the log lines of Ray and its workers.

    Raises:
        STGTError: A local cluster did not start in time.
    """
    from pipelines.common import timeline

    with timeline.span("import ray.data"):
        import ray
        from ray.data import DataContext

    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    with timeline.span("start Ray"), keeping_sigterm_handler():
        if address := os.environ.get(ADDRESS):
            join_cluster(address, level, verbose)
        else:
            logging.getLogger(__name__).info("starting a local Ray cluster")
            # Ray Train watches for nodes that are about to be drained; this one never is, and the
            # watcher is a process that takes a second to start.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            with _late_start_explained():
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
    """Configure logging, and set environment variables of libraries unless they are set.

    Args:
        verbose: Whether to show the log lines of libraries.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    settings = _SETTINGS if verbose else {**_SETTINGS, **_QUIET_SETTINGS}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if verbose:
        return
    for name in ("alembic", "mlflow", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")


def run_job(
    work: Callable[[], Summary],
    verdict: Callable[[Summary], str | None] = lambda summary: None,
    output: TextIO | None = None,
) -> None:
    """Do the work of a job, print its summary as JSON lines, and exit with a code if it fails.

    Args:
        work: Does the work and returns the summary.
        verdict: Returns why a job with a summary failed; None if it did not fail.
        output: Takes the summary; None stands for standard output.
    """
    interrupts: list[int] = []

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        interrupts.append(signal_number)
        raise KeyboardInterrupt

    # A library that SIGINT or SIGTERM reaches during its import may raise an error of its own
    # instead.
    signal.signal(signal.SIGINT, interrupt)
    try:
        with exit_on_sigterm():
            summary = work()
    except KeyboardInterrupt:
        print_and_exit(_ended_early("interrupted"), EXIT_INTERRUPTED)
    except SystemExit:
        if not received():
            raise
        print_and_exit(_ended_early("stopped by SIGTERM"), EXIT_SIGTERM)
    except Exception as error:
        if interrupts:
            print_and_exit(_ended_early("interrupted"), EXIT_INTERRUPTED)
        if isinstance(error, StoppedError):
            print_and_exit(_explain(error), EXIT_SIGTERM)
        if received():
            print_and_exit(_ended_early("stopped by SIGTERM"), EXIT_SIGTERM)
        print_and_exit(_explain(error), EXIT_FAILED)
    else:
        for line in [summary] if isinstance(summary, Mapping) else summary:
            print(json.dumps(dict(line)), file=output, flush=True)
        if (failed := verdict(summary)) is not None:
            print_and_exit(failed, EXIT_FAILED)


def _ended_early(how: str) -> str:
    without = " without --fresh" if "--fresh" in sys.argv else ""
    return f"{how}; run the same command{without} again to continue"


def _explain(error: Exception) -> str:
    """Return the message of an expected error; print the traceback of others, which are bugs."""
    from pipelines.common.ray_errors import disk_is_full, out_of_memory, root_cause

    cause = root_cause(error)
    if disk_is_full(error):
        said = str(cause).splitlines()[0][:200]
        return f"no space left on the disk ({said}); free some space and run the same command again"
    if isinstance(cause, OSError) and cause.filename is not None:
        reason = (cause.strerror or "").lower()
        advice = "choose another path"
        if isinstance(cause, PermissionError) and "://" in str(cause.filename):
            advice = f"give this process credentials or a role with rights to it, or {advice}"
        return f"cannot read or write {cause.filename}: {reason}; {advice}"
    if isinstance(cause, STGTError | OSError):
        return f"{cause}"
    if memory := out_of_memory(error):
        return (
            f"out of memory ({memory}); use fewer workers or smaller batches, or a machine with "
            "more memory, and run the same command again"
        )
    print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    return (
        f"unexpected {type(cause).__name__}: this is a bug in this project or in a library that it "
        "uses, not in your settings; please report it with the lines above"
    )
