"""Submits a job to a Ray cluster, or follows the one that runs already."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipelines.common.config import without_credentials
from pipelines.submit import upload
from pipelines.submit.cluster_client import ClusterError, attempts, connect
from pipelines.submit.config import SubmitConfig
from pipelines.submit.follow import ANSWERS, Follower
from pipelines.submit.locations import PathError, local_paths, refuse_relative
from pipelines.submit.naming import COMMAND, default_name, next_id
from stgt.errors import SettingError

logger = logging.getLogger(__name__)

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
TRACKING_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
"""Environment variables without secrets that decide where runs are recorded."""
EXIT_STOPPED = 143
"""Exit code of a job that was stopped on request, as if SIGTERM had ended it."""
EXIT_FAILED = 1
_CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private")
"""Loggers that tell about the parts of a request."""
NO_PROJECT = re.compile(r"No module named '?(jobs|pipelines|stgt)\b")


class SubmitSummary(TypedDict):
    """Result of `run_submit` for a job that is not followed."""

    submission_id: str
    address: str
    submitted: bool
    """False if a job with this id and command runs already."""


def run_submit(
    config: SubmitConfig, job: str, arguments: Sequence[str], job_config: Any
) -> SubmitSummary | int:
    """Submit a job, or find the one that runs, and follow it until its end.

    Args:
        config: Settings of the submission.
        job: Name of the job.
        arguments: Arguments of the job, which have been parsed to `job_config`.
        job_config: The job's config.

    Returns:
        The exit code of a job that was followed.

    Raises:
        STGTError: The job cannot be submitted, or ended for a reason outside of it.
    """
    refuse_relative(job_config)
    _refuse_credentials(arguments)
    files = _upload_of(config, arguments)
    runtime_env = _runtime_env(config, job_config)
    if not logging.getLogger("ray").isEnabledFor(logging.DEBUG):
        for one in _CHATTY:
            logging.getLogger(one).setLevel(logging.WARNING)
    client = connect(config.address)
    command = shlex.join(["python", "-m", f"jobs.{job}", *arguments])
    name = config.name or default_name(job, job_config)
    submission_id, running = next_id(client, name, command)
    if running:
        logger.info("%s runs already; following its log", submission_id)
    else:
        _say_local(job_config)
        _submit(client, config, submission_id, command, files, runtime_env)
        logger.info("submitted as %s to %s", submission_id, client.get_address())
    if not config.follow:
        logger.info("the same command without --no-follow prints its log")
        return SubmitSummary(
            submission_id=submission_id, address=client.get_address(), submitted=not running
        )
    return _follow(client, submission_id, config.on_interrupt)


def _refuse_credentials(arguments: Sequence[str]) -> None:
    for word in arguments:
        value = word.partition("=")[2] if word.startswith("--") else word
        if "://" in value and without_credentials(value) != value:
            raise SettingError(
                f"{without_credentials(value)} is given with credentials, which everyone who may "
                "list the cluster's jobs could read; give it without them, and give the nodes of "
                "the cluster the credentials, such as MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )


def _upload_of(config: SubmitConfig, arguments: Sequence[str]) -> dict[str, int]:
    """Return the files to upload, after checking their size and that they hold what is named.

    Raises:
        STGTError: A file that the arguments name is not uploaded, or the upload is too large.
    """
    files: dict[str, int] = {}
    if config.working_dir is not None:
        folder = Path(config.working_dir)
        files = upload.chosen_files(folder, config.exclude)
        upload.check_size(folder, files, config.max_upload_mb)
        if "jobs/entry.py" not in files:
            logger.info(
                "%s does not contain this project, so the job runs the code of the cluster's image",
                folder.absolute(),
            )
    for word in arguments:
        value = word.partition("=")[2] if word.startswith("--") else word
        if not value or Path(value).is_absolute() or not Path(value).is_file():
            continue
        if os.path.normpath(value) not in files or Path(config.working_dir or "").resolve() != (
            Path.cwd()
        ):
            raise PathError(
                f"the file {value} is not uploaded with the job; run the command in the folder "
                "that --working-dir names, with the file in it and not excluded, or put the file "
                "where all nodes can reach it and give its absolute path"
            )
    return files


def _runtime_env(config: SubmitConfig, job_config: Any) -> dict[str, Any]:
    """Return Ray's runtime environment of the job, without its working directory.

    Raises:
        SettingError: The file with further settings or an environment variable is missing.
    """
    env: dict[str, Any] = {}
    if config.runtime_env is not None:
        try:
            env = yaml.safe_load(Path(config.runtime_env).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingError(
                f"--runtime-env {config.runtime_env} cannot be read "
                f"({' '.join(str(error).split())}); give a YAML or JSON file"
            ) from error
        if not isinstance(env, dict) or "working_dir" in env:
            raise SettingError(
                f"--runtime-env {config.runtime_env} must hold settings by name, without "
                "working_dir, which --working-dir sets"
            )
    variables = {STOP_WAIT: str(config.stop_wait_s), **_tracking(job_config)}
    for pair in config.env:
        name, given, value = pair.partition("=")
        if not given and name not in os.environ:
            raise SettingError(f"--env {name}: the variable is not set here; give {name}=VALUE")
        variables[name] = value if given else os.environ[name]
    env["env_vars"] = {**variables, **env.get("env_vars", {})}
    return env


def _tracking(job_config: Any) -> dict[str, str]:
    """Return the environment variables that tell the job where to record its run."""
    tracking = getattr(job_config, "tracking", None)
    if tracking is None or tracking.uri is not None:
        return {}
    found = {name: os.environ[name] for name in TRACKING_VARIABLES if os.environ.get(name)}
    uri = found.get(TRACKING_VARIABLES[0])
    if uri is not None and without_credentials(uri) == uri:
        return found
    logger.warning(
        "the job records its run where MLFLOW_TRACKING_URI of the cluster's nodes says; if that is "
        "not set, the run is lost with the job's working directory; set --tracking.uri"
    )
    return {}


def _say_local(job_config: Any) -> None:
    """Log the paths that every node must be able to reach."""
    paths = local_paths(job_config)
    if paths:
        logger.info(
            "all nodes of the cluster must see %s; the job checks this before it begins",
            ", ".join(sorted({without_credentials(value) for _, value in paths})),
        )


def _submit(
    client: JobSubmissionClient,
    config: SubmitConfig,
    submission_id: str,
    command: str,
    files: Mapping[str, int],
    runtime_env: dict[str, Any],
) -> None:
    """Upload the files and submit the job.

    Raises:
        ClusterError: The cluster did not take it.
    """
    resources = dict(pair.split("=") for pair in config.driver_resources)
    with tempfile.TemporaryDirectory(prefix="stgt-submit-") as folder:
        if config.working_dir is not None:
            upload.stage(Path(config.working_dir), list(files), Path(folder))
            runtime_env = {**runtime_env, "working_dir": folder}
            logger.info("uploading %d files, %.1f MB", len(files), sum(files.values()) / 1e6)
        try:
            for attempt in attempts():
                with attempt:
                    try:
                        client.submit_job(
                            entrypoint=command,
                            submission_id=submission_id,
                            runtime_env=runtime_env,
                            metadata={COMMAND: command},
                            entrypoint_num_cpus=config.driver_cpus or None,
                            entrypoint_memory=int(config.driver_memory_gb * 1e9) or None,
                            entrypoint_resources={
                                name: float(amount) for name, amount in resources.items()
                            }
                            or None,
                        )
                    except RuntimeError as error:
                        is_ours = attempt.retry_state.attempt_number > 1
                        if not (is_ours and "already exists" in str(error)):
                            raise
        except ANSWERS as error:
            raise ClusterError(
                f"the cluster did not take the job: {' '.join(str(error).split())[:300]}"
            ) from error


def _follow(client: JobSubmissionClient, submission_id: str, on_interrupt: str) -> int:
    follower = Follower(client, submission_id)
    try:
        return _exit_code(follower.until_end(), follower)
    except KeyboardInterrupt:
        if not _wants_stop(submission_id, on_interrupt):
            _say_running(submission_id)
            raise
    logger.info("stopping %s; it ends in order", submission_id)
    client.stop_job(submission_id)
    try:
        return _exit_code(follower.until_end(), follower)
    except KeyboardInterrupt:
        _say_running(submission_id)
        raise


def _say_running(submission_id: str) -> None:
    logger.warning(
        "%s keeps running; the same command follows it again, and `ray job stop %s` stops it",
        submission_id,
        submission_id,
    )


def _wants_stop(submission_id: str, on_interrupt: str) -> bool:
    if on_interrupt != "ask":
        return on_interrupt == "stop"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"\nstop {submission_id}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _exit_code(details: JobDetails, follower: Follower) -> int:
    """Return the exit code of a job that has ended.

    Raises:
        ClusterError: The cluster ended it, or could not start it.
    """
    if details.status == JobStatus.STOPPED:
        logger.warning(
            "%s was stopped; run the same command again to continue", details.submission_id
        )
        return EXIT_STOPPED
    code = details.driver_exit_code
    if details.status == JobStatus.SUCCEEDED:
        return 0
    text = "\n".join(follower.tail)
    if NO_PROJECT.search(text):
        raise ClusterError(
            "the cluster's image does not contain this project; build it from cluster/Dockerfile, "
            "or run the command in the project's folder, which is then uploaded"
        )
    if code == 127:
        raise ClusterError(
            "there is no command `python` where the cluster runs jobs; build its image from "
            "cluster/Dockerfile, or put the Python with this project on PATH before `ray start`"
        )
    if code is None:
        lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        raise ClusterError(f"the cluster could not run {details.submission_id}: {reason}")
    return code
