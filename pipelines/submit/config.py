"""Settings of a submission."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.common.config import require
from stgt.field_marks import Common

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_NAME = re.compile(r"(?i)pass(?!es)|secret|token(?!iz)|credential|access_key|api_?key")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Submit a job to a Ray cluster, follow its log and return its exit code."""

    address: Annotated[str | None, Common("cluster")] = None
    """Address of the cluster's dashboard, such as http://head:8265. None takes
    RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265 if that is not set."""
    driver_cpus: Annotated[float, Common("cluster")] = 0.0
    """CPUs to reserve for the job's own process, besides those of its workers. With 0 it runs on
    the head node."""
    driver_memory_gb: Annotated[float, Common("cluster")] = 0.0
    """Memory to reserve for the job's own process, in GB."""
    driver_resources: Annotated[tuple[str, ...], Common("cluster")] = ()
    """Custom resources of the node for the job's own process, as NAME=AMOUNT."""
    working_dir: Annotated[str | None, Common("code")] = "."
    """Folder to upload, which becomes the job's working directory. Code in it takes precedence over
    that of the cluster's image. None uploads nothing."""
    exclude: Annotated[tuple[str, ...], Common("code")] = ()
    """Patterns of .gitignore for files not to upload, besides those of .gitignore itself, version
    control, virtual environments, videos, weights, tables, databases and outputs of jobs."""
    max_upload_mb: Annotated[float, Common("code")] = 100.0
    """Largest upload, in MB."""
    env: Annotated[tuple[str, ...], Common("code")] = ()
    """Environment variables of the job, as NAME=VALUE, or as NAME to take the value from here.
    Everyone who may list the cluster's jobs can read them, so names and values of credentials are
    refused; give those to the cluster's nodes."""
    runtime_env: Annotated[str | None, Common("code")] = None
    """YAML or JSON file with further settings of Ray's runtime environment."""
    name: Annotated[str | None, Common("run")] = None
    """Submission id. None takes the names of the job and of its run. While a job with this name
    runs, the same command follows its log; afterwards the job is submitted as NAME-2, NAME-3."""
    follow: Annotated[bool, Common("run")] = True
    """Print the job's log until it ends."""
    on_interrupt: Annotated[Literal["ask", "stop", "leave"], Common("run")] = "ask"
    """What Ctrl-C does: ask whether to stop the job, stop it, or leave it running. Without a
    terminal to ask at, the job is left running."""
    stop_wait_s: Annotated[int, Common("run")] = 120
    """Time for the job to end in order once it is stopped, in seconds. Ray then kills it."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingError: A value is out of range.
        """
        require(self.driver_cpus >= 0, "driver_cpus", self.driver_cpus, "must not be negative")
        require(
            self.driver_memory_gb >= 0,
            "driver_memory_gb",
            self.driver_memory_gb,
            "must not be negative",
        )
        require(self.max_upload_mb > 0, "max_upload_mb", self.max_upload_mb, "must be positive")
        require(self.stop_wait_s > 0, "stop_wait_s", self.stop_wait_s, "must be positive")
        for pair in self.driver_resources:
            name, _, amount = pair.partition("=")
            number = re.fullmatch(r"\d+(\.\d+)?", amount)
            require(
                bool(name and number), "driver_resources", pair, "must be NAME=AMOUNT, as in big=1"
            )
        for pair in self.env:
            name = pair.partition("=")[0]
            # The value may be a credential, and would stand in the error.
            require(bool(ENV_NAME.fullmatch(name)), "env", name, "must be NAME or NAME=VALUE")
            require(
                not SECRET_NAME.search(name),
                "env",
                name,
                "is the name of a credential, which everyone who may list the cluster's jobs could "
                "read; set it on the cluster's nodes",
            )
        require(
            self.name is None or bool(ID.fullmatch(self.name)),
            "name",
            self.name,
            "must consist of letters, digits, dots, dashes and underscores",
        )
