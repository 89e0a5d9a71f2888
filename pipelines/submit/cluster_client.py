"""Connects to the job server of a Ray cluster, or says in one sentence why that is impossible."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

import ray
import requests
import tenacity
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipelines.common.addresses import probe, token_missing, token_refused
from stgt.errors import STGTError

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PORT = 8265
ANSWER_S = 10.0
CONNECTING_S = 8.0
READY_S = 60.0
"""Longest wait for a cluster that was just started: its dashboard answers before it can start jobs,
and on a busy head it drops connections."""
NO_AGENT = "No available agent"


class ClusterError(STGTError):
    """The cluster cannot take a job."""


@dataclass(frozen=True)
class JobState:
    """What a cluster says about a job."""

    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """None while the job's process runs, and if it never ran or was stopped."""
    message: str

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def job_state(client: JobSubmissionClient, submission_id: str) -> JobState:
    """Ask for the state of a job. Ray's client would wait for an answer without a limit.

    Raises:
        ClusterError: The cluster does not know the job, or refuses the token.
        requests.RequestException: The cluster does not answer.
    """
    answer = _get(client, f"/api/jobs/{submission_id}")
    if answer.status_code == 404:
        raise ClusterError(
            f"the cluster does not know the job {submission_id} anymore, so its head was probably "
            "started again; run the same command again to continue"
        )
    found = answer.json()
    return JobState(found["status"], found.get("driver_exit_code"), found.get("message") or "")


def job_log(client: JobSubmissionClient, submission_id: str) -> str:
    """Ask for the whole log of a job.

    Raises:
        ClusterError: The cluster refuses the token.
        requests.RequestException: The cluster does not give it.
    """
    return _get(client, f"/api/jobs/{submission_id}/logs").json().get("logs") or ""


def _get(client: JobSubmissionClient, path: str) -> requests.Response:
    address = client.get_address()
    answer = requests.get(f"{address}{path}", timeout=ANSWER_S, headers=_headers())
    if answer.status_code in (401, 403):
        raise ClusterError(token_refused(address))
    if answer.status_code != 404:
        answer.raise_for_status()
    return answer


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to a job server.

    Args:
        address: Its http(s) address; None takes the environment's, or the default.

    Raises:
        ClusterError: The address is of another kind, nothing answers there, the token is refused,
            or another version of Ray runs there.
    """
    address = _complete(address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS)
    parts = urlsplit(address)
    assert parts.hostname is not None
    assert parts.port is not None
    if (reason := probe(parts.hostname, parts.port)) is not None:
        raise ClusterError(
            f"there is no Ray cluster at {address} ({reason}); start one, forward its port, or "
            "give another --address"
        )
    # A dashboard on a busy head drops connections.
    few = tenacity.Retrying(
        stop=tenacity.stop_after_delay(CONNECTING_S),
        wait=tenacity.wait_fixed(1.0),
        retry=tenacity.retry_if_exception_type(requests.ConnectionError),
        reraise=True,
    )
    try:
        few(_check_version, address)
        return few(_client, address)
    except AuthenticationError as error:  # there is no token to show
        raise ClusterError(token_missing(address)) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"the server at {address} is not a Ray dashboard that takes jobs "
            f"({' '.join(str(error).split())[:200]}); check --address, which is the dashboard's "
            "and not that of `ray start`"
        ) from error


def _complete(address: str) -> str:
    """Return an address with scheme and port, and without a slash at its end.

    Raises:
        ClusterError: It is no http(s) address.
    """
    full = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(full)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("http", "https"):
        raise ClusterError(
            f"{address} is not the address of a Ray dashboard; give one such as "
            f"http://HEAD:{DEFAULT_PORT}"
        )
    if port is not None:
        return full
    port = 443 if parts.scheme == "https" else DEFAULT_PORT
    return parts._replace(netloc=f"{parts.netloc}:{port}").geturl()


def _client(address: str) -> JobSubmissionClient:
    # The environment would replace the address, even by one of another kind.
    before = {name: os.environ.pop(name, None) for name in (ADDRESS_VARIABLE, "RAY_ADDRESS")}
    try:
        return JobSubmissionClient(address)
    finally:
        os.environ.update({name: one for name, one in before.items() if one is not None})


def attempts() -> tenacity.Retrying:
    """Return attempts at a request to a cluster that may not be ready yet."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_delay(READY_S),
        wait=tenacity.wait_fixed(1.0),
        retry=tenacity.retry_if_exception(_is_not_ready),
        reraise=True,
    )


def _is_not_ready(error: BaseException) -> bool:
    # Ray's client has no error of its own for a cluster without an agent.
    return isinstance(error, requests.ConnectionError) or NO_AGENT in str(error)


def _check_version(address: str) -> None:
    """Check that a Ray of our version answers.

    Raises:
        ClusterError: Another version does, or the token is refused.
    """
    answer = requests.get(f"{address}/api/version", timeout=ANSWER_S, headers=_headers())
    if answer.status_code in (401, 403):
        raise ClusterError(token_refused(address))
    theirs, ours = str(answer.json()["ray_version"]), ray.__version__
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ClusterError(
            f"the cluster at {address} runs Ray {theirs} and this project needs Ray {ours}; start "
            "the cluster from the project's image, or install that version on its nodes"
        )


def _headers() -> dict[str, str]:
    from ray._private.authentication.http_token_authentication import (
        get_auth_headers_if_auth_enabled,
    )

    return dict(get_auth_headers_if_auth_enabled({}))
