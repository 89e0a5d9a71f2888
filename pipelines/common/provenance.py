"""Where a run comes from: its command line, user, commit, package versions, hardware and inputs.

Nothing here imports MLflow; `run_details` sends it.
"""

from __future__ import annotations

import functools
import getpass
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from pipelines.common.config import hide_credentials

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "torchvision",
    "ray",
    "mlflow",
    "timm",
    "transformers",
    "pyarrow",
    "numpy",
    "av",
    "decord",
)
"""Distributions that decide what a run computes, or how."""
GIT_S = 10.0
"""Longest wait for git."""
RAY_WORKER = "default_worker.py"
"""Name of the program that Ray's worker processes run."""

Context = Literal["training", "validation", "test", "ingest"]
Step = Literal["pre-trained", "trained", "fine-tuned", "evaluated"]

_command: ContextVar[str | None] = ContextVar("command", default=None)


@dataclass(frozen=True)
class DatasetInput:
    """A clip store or a manifest that a run reads."""

    uri: str
    kind: Literal["clip store", "manifest"]
    digest: str
    """Digest of the contents."""
    context: Context
    clips: int | None = None
    """Number of clips; None if it is not known without reading the data."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a run begins with or evaluates."""

    uri: str
    run_id: str | None = None
    """MLflow run that trained it; None if it is not known."""
    tracking_uri: str | None = None
    """Where that run is recorded."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a stage knows about its run and tells MLflow, besides its config and its metrics."""

    job: str
    """Name of the job, as in `python -m jobs.NAME`."""
    summary: str
    """What the run does, in Markdown, for a reader who does not know the project."""
    recipe: str = ""
    datasets: tuple[DatasetInput, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Digests of data by name, such as `data` or `manifest`."""
    step: Step | None = None
    """What the run does to a model; None if it handles no model."""
    origin: Origin | None = None
    """The checkpoint that the run begins with or evaluates."""
    command: str | None = None
    """Command line that does the same again. None takes that of the process or, in a process of
    Ray, the job with the config in its output folder."""


@contextmanager
def using_command(command: str) -> Iterator[None]:
    """Record a command line as the source of runs that begin in this context.

    For work that a job starts in another way than its own command line would, such as a trial.
    """
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


def command_line() -> str | None:
    """Return the command line that runs this process's work again, without credentials.

    Returns:
        What `using_command` was given or, without it, the command line of this process; None in a
        worker process of Ray, whose command line runs nothing again.
    """
    given = _command.get()
    if given is not None:
        return hide_credentials(given)
    if not sys.argv or Path(sys.argv[0]).name == RAY_WORKER:
        return None
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    words = ["python", *program, *sys.argv[1:]]
    return shlex.join([hide_credentials(word) for word in words])


def command_of(about: About, folder: str) -> str:
    """Return the command line to record for a run.

    Args:
        about: The run.
        folder: Its output folder, which contains `config.json`.
    """
    if about.command is not None:
        return hide_credentials(about.command)
    return command_line() or shlex.join(
        ["python", "-m", f"jobs.{about.job}", "--config", f"{folder}/config.json"]
    )


def user() -> str:
    """Return the name of the user who runs this process, or the number if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


@dataclass(frozen=True)
class Commit:
    """The commit that this project is checked out at."""

    sha: str
    branch: str | None
    """None for a detached head."""
    is_dirty: bool
    """Whether tracked files differ from the commit."""


@functools.cache
def commit() -> Commit | None:
    """Return the commit of this project; None if it does not run from a git checkout of its own."""
    # An installed copy may lie below another project's checkout, whose commit says nothing.
    if not (PROJECT / ".git").exists():
        return None
    try:
        sha = _git("rev-parse", "HEAD")
        branch = _git("rev-parse", "--abbrev-ref", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.info("the git commit is not recorded: %s", " ".join(str(said).split()))
        return None
    return Commit(sha, None if branch == "HEAD" else branch, bool(changes))


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(PROJECT), *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=GIT_S,
        # Otherwise git takes a lock to refresh its index, beside whatever the user does.
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of `PACKAGES`, as far as installed."""
    found = {name: _version(name) for name in ("stgt-ray", *PACKAGES)}
    installed = {name: version for name, version in found.items() if version is not None}
    return {"python": platform.python_version(), **installed}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def hardware() -> dict[str, str]:
    """Return the CPUs, the memory and the GPUs of this machine."""
    return {
        "host": platform.node(),
        "cpus": str(psutil.cpu_count() or 0),
        "memory_gb": f"{psutil.virtual_memory().total / 1e9:.1f}",
        "gpus": ", ".join(_gpu_names()) or "none",
    }


def _gpu_names() -> list[str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # there is no driver, hence no GPU
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def cluster_hardware() -> dict[str, str]:
    """Return the resources of the Ray cluster that this process is connected to; empty without."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    resources = ray.cluster_resources()
    kinds = sorted(
        name.removeprefix("accelerator_type:")
        for name in resources
        if name.startswith("accelerator_type:")
    )
    return {
        "nodes": str(sum(node["Alive"] for node in ray.nodes())),
        "cpus": f"{resources.get('CPU', 0):g}",
        "memory_gb": f"{resources.get('memory', 0) / 1e9:.1f}",
        "gpus": f"{resources.get('GPU', 0):g}" + (f" ({', '.join(kinds)})" if kinds else ""),
    }
