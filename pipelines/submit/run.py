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
from urllib.parse import urlsplit

import yaml
from ray.job_submission import JobSubmissionClient

from pipelines.common.config import with_credentials, without_credentials
from pipelines.common.termination import EXIT_SIGTERM
from pipelines.submit import upload
from pipelines.submit.cluster_client import ClusterError, JobState, attempts, connect
from pipelines.submit.config import SubmitConfig
from pipelines.submit.follow import Follower
from pipelines.submit.locations import (
    PathError,
    absolute_form,
    local_paths,
    refuse_relative,
    tracking_configs,
)
from pipelines.submit.naming import COMMAND, RUN, default_name, next_id
from stgt.errors import SettingError

logger = logging.getLogger(__name__)

ANSWERS = (OSError, RuntimeError)
"""What Ray's client raises if the cluster does not answer, or not as expected."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
TRACKING_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
"""Environment variables without secrets that decide where runs are recorded."""
EXIT_NOT_FOUND = 127
_CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private")
"""Loggers that tell about the parts of a request."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
STOP_MARGIN_S = 60.0
"""Time for the cluster to stop a job, beyond the time that the job itself has."""
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
    _refuse_credentials(arguments, config.env, job_config)
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
        _submit(client, config, (name, submission_id), command, files, runtime_env)
        logger.info("submitted as %s to %s", submission_id, client.get_address())
    if not config.follow:
        logger.info("the same command without --no-follow prints its log")
        return SubmitSummary(
            submission_id=submission_id, address=client.get_address(), submitted=not running
        )
    return _follow(client, submission_id, config)


def _refuse_credentials(arguments: Sequence[str], env: Sequence[str], job_config: Any) -> None:
    """Refuse URIs with credentials in the command line, the environment or a config file.

    Raises:
        SettingError: There is one.
    """
    values = [word.partition("=")[2] if word.startswith("--") else word for word in arguments]
    values += [os.environ.get(pair, "") if "=" not in pair else pair for pair in env]
    for tracking in tracking_configs(job_config):
        # A config never holds credentials itself, wherever it was read from.
        values += [with_credentials(uri) for uri in (tracking.uri, tracking.artifact_uri) if uri]
    for value in values:
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
        if not value or os.path.isabs(value) or not os.path.isfile(value):
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
    given = env.get("env_vars") or {}
    if not isinstance(given, dict) or not all(isinstance(one, str) for one in given.values()):
        raise SettingError(
            f"--runtime-env {config.runtime_env}: env_vars must hold strings by name; put numbers "
            "into quotes"
        )
    variables = {**_tracking(config, job_config), **given, STOP_WAIT: str(config.stop_wait_s)}
    for pair in config.env:
        name, has_value, value = pair.partition("=")
        if not has_value and name not in os.environ:
            raise SettingError(f"--env {name}: the variable is not set here; give {name}=VALUE")
        variables[name] = value if has_value else os.environ[name]
    env["env_vars"] = variables
    return env


def _tracking(config: SubmitConfig, job_config: Any) -> dict[str, str]:
    """Return the environment variables that tell the job where to record its run.

    Raises:
        SettingError: The tracking URI of the environment is relative or has credentials.
    """
    name = TRACKING_VARIABLES[0]
    given = {pair.partition("=")[0] for pair in config.env}
    uris = [tracking.uri for tracking in tracking_configs(job_config)]
    if not uris or name in given:
        return {}
    found = {one: os.environ[one] for one in TRACKING_VARIABLES if os.environ.get(one)}
    if uris[0] is None and name in found:
        _refuse_credentials([found[name]], (), job_config)
        if (absolute := absolute_form(found[name])) is not None:
            raise PathError(
                f"{name} is {found[name]}, which means something else on the cluster; set it to "
                f"{absolute}, or to the address of a server"
            )
    uri = uris[0] or found.get(name)
    if uri is None:
        logger.warning(
            "the job records its run where %s of the cluster's nodes says; if that is not set, the "
            "run is lost with the job's working directory; set --tracking.uri",
            name,
        )
    elif urlsplit(uri).hostname in LOOPBACK:
        logger.warning("%s is an address of the cluster's own nodes for the job", uri)
    return found if uris[0] is None else {}


def _say_local(job_config: Any) -> None:
    """Log the paths that every node must be able to reach."""
    paths = [one for one in local_paths(job_config) if not one[1].startswith("sqlite:")]
    if paths:
        logger.info(
            "all nodes of the cluster must see %s; the job checks this before it begins",
            ", ".join(sorted({without_credentials(value) for _, value in paths})),
        )


def _submit(
    client: JobSubmissionClient,
    config: SubmitConfig,
    names: tuple[str, str],
    command: str,
    files: Mapping[str, int],
    runtime_env: dict[str, Any],
) -> None:
    """Upload the files and submit the job.

    Raises:
        ClusterError: The cluster did not take it.
    """
    name, submission_id = names
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
                            metadata={COMMAND: command, RUN: name},
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


def _follow(client: JobSubmissionClient, submission_id: str, config: SubmitConfig) -> int:
    follower = Follower(client, submission_id)
    try:
        try:
            return _exit_code(follower.until_end(), follower, submission_id)
        except KeyboardInterrupt:
            if not _wants_stop(submission_id, config.on_interrupt):
                raise
    except (KeyboardInterrupt, SystemExit):
        _say_running(submission_id)
        raise
    logger.info("stopping %s; it ends in order", submission_id)
    try:
        attempts()(client.stop_job, submission_id)
        ended = follower.until_end(config.stop_wait_s + STOP_MARGIN_S)
        return _exit_code(ended, follower, submission_id)
    except ANSWERS as error:
        raise ClusterError(
            f"the cluster could not be asked to stop {submission_id} "
            f"({' '.join(str(error).split())[:200]}); try `ray job stop {submission_id}`"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        logger.warning("%s is still being stopped by the cluster", submission_id)
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


def _exit_code(state: JobState, follower: Follower, submission_id: str) -> int:
    """Return the exit code of a job that has ended.

    Raises:
        ClusterError: The cluster ended it, or could not start it.
    """
    if state.status == "STOPPED":
        logger.warning("%s was stopped; run the same command again to continue", submission_id)
        return EXIT_SIGTERM
    if state.status == "SUCCEEDED":
        if not follower.has_result:
            logger.warning("%s succeeded, but its result is not in the log", submission_id)
        return 0
    text = "\n".join(follower.tail)
    if NO_PROJECT.search(text):
        raise ClusterError(
            "the cluster's image does not contain this project; build it from cluster/Dockerfile, "
            "or run the command in the project's folder, which is then uploaded"
        )
    if state.exit_code == EXIT_NOT_FOUND:
        raise ClusterError(
            "there is no command `python` where the cluster runs jobs; build its image from "
            "cluster/Dockerfile, or put the Python with this project on PATH before `ray start`"
        )
    if state.exit_code is None:
        lines = [line.strip() for line in state.message.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        raise ClusterError(f"the cluster could not run {submission_id}: {reason}")
    # A process that a signal ended has that signal's number, below zero.
    return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code
