"""Connects to the job server of a Ray cluster, or says in one sentence why that is impossible."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import ray
import requests
import tenacity
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipelines.common.addresses import probe
from stgt.errors import STGTError

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PORT = 8265
ANSWER_S = 10.0
READY_S = 60.0
"""Longest wait for a cluster that was just started: its dashboard answers before it can start jobs,
and on a busy head it drops connections."""
NO_AGENT = "No available agent"


class ClusterError(STGTError):
    """The cluster cannot take a job."""


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to a job server.

    Args:
        address: Its http(s) address; None takes the environment's, or the default.

    Raises:
        ClusterError: The address is of another kind, nothing answers there, the token is refused,
            or another version of Ray runs there.
    """
    address = (address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"{address} is not the address of a Ray dashboard; give one such as "
            f"http://HEAD:{DEFAULT_PORT}"
        )
    port = parts.port or (443 if parts.scheme == "https" else DEFAULT_PORT)
    if parts.port is None and parts.scheme == "http":
        address = f"http://{parts.hostname}:{port}"
    if (reason := probe(parts.hostname, port)) is not None:
        raise ClusterError(
            f"there is no Ray cluster at {address} ({reason}); start one, forward its port, or "
            "give another --address"
        )
    _check_version(address)
    try:
        # The environment would replace the address, even by one of another kind.
        before = {name: os.environ.pop(name, None) for name in (ADDRESS_VARIABLE, "RAY_ADDRESS")}
        try:
            return JobSubmissionClient(address)
        finally:
            os.environ.update({name: one for name, one in before.items() if one is not None})
    except AuthenticationError as error:
        raise ClusterError(_refused(address)) from error
    except (RuntimeError, ConnectionError, requests.RequestException) as error:
        raise ClusterError(
            f"the server at {address} is not a Ray dashboard that takes jobs "
            f"({' '.join(str(error).split())[:200]}); check --address"
        ) from error


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
    """Check what can be checked without a token: that a Ray of our version answers.

    Raises:
        ClusterError: It does not.
    """
    try:
        answer = requests.get(f"{address}/api/version", timeout=ANSWER_S, headers=_headers())
        if answer.status_code in (401, 403):
            raise ClusterError(_refused(address))
        theirs = str(answer.json()["ray_version"])
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"the server at {address} is not a Ray dashboard ({type(error).__name__}); check "
            "--address, which is the dashboard's and not that of ray start"
        ) from error
    ours = ray.__version__
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


def _refused(address: str) -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"the cluster at {address} wants a token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        )
    return (
        f"the cluster at {address} refused the token; set RAY_AUTH_TOKEN_PATH to the file with "
        "the cluster's token"
    )
