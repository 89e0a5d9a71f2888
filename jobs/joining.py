"""Joins a running Ray cluster, or says in one sentence why that is impossible."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from urllib.parse import urlsplit

from pipelines.common.addresses import probe, token_missing, token_refused
from pipelines.common.tls import tls_problem
from stgt.errors import STGTError

ADDRESS = "RAY_ADDRESS"
DEFAULT_PORT = 6379
ANSWER_S = 10.0
_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_VERSIONS = re.compile(r"Ray: ([\w.]+).*?Python: ([\w.]+)", re.DOTALL)


class JoinError(STGTError):
    """There is no cluster at the address that this process could join."""


def join_cluster(address: str, logging_level: int, log_to_driver: bool) -> None:
    """Connect this process to the cluster that RAY_ADDRESS names.

    Args:
        address: Value of RAY_ADDRESS: HOST:PORT, or auto for a cluster on this host.
        logging_level: Level of Ray's own log lines.
        log_to_driver: Whether to show the lines of workers.

    Raises:
        JoinError: Nothing answers there, it is no head of Ray, it refuses the token, or it runs
            another version of Ray or Python.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError

    if address == "auto":
        try:
            found = canonicalize_bootstrap_address("auto")
        except ConnectionError:
            found = None
        if found is None:
            raise JoinError(
                f"{ADDRESS}=auto, but no Ray runs on this host; start one with `ray start --head`, "
                f"or unset {ADDRESS} to let the job start its own"
            )
        address = found
    _check_address(address)
    try:
        _check_head(address)
        ray.init(logging_level=logging_level, log_to_driver=log_to_driver)
    except AuthenticationError as error:  # there is no token to show
        raise JoinError(token_missing(address)) from error
    except ConnectionError as error:
        raise JoinError(_no_head(address, "it does not answer")) from error
    except RuntimeError as error:
        text = str(error)
        if "ersion mismatch" not in text:
            raise
        theirs = _VERSIONS.search(text)
        runs = f"Ray {theirs.group(1)} and Python {theirs.group(2)}" if theirs else "other versions"
        raise JoinError(
            f"the cluster at {address} runs {runs}, and this process Ray {ray.__version__} and "
            f"Python {platform.python_version()}, which must be equal; start the cluster from the "
            "project's image, or run the job in an environment with the cluster's versions"
        ) from error


def _check_address(address: str) -> None:
    """Check that something listens at an address; Ray itself would try for a minute or more.

    Raises:
        JoinError: Nothing does, or the address is of another kind.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise JoinError(
            f"{ADDRESS}={address} is the address of a dashboard; submit the job there with "
            f"python -m jobs.submit --address {address}, or give the head's HOST:PORT"
        )
    if scheme == "ray":
        raise JoinError(
            f"{ADDRESS}={address} is the address of a Ray Client server, which jobs cannot use; "
            "submit the job with python -m jobs.submit, or run it on a node of the cluster"
        )
    parts = urlsplit(f"//{rest}")
    try:
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if scheme or not host:
        raise JoinError(
            f"{ADDRESS}={address} is not the address of a Ray head; give HOST:PORT, or auto"
        )
    if (reason := probe(host, port)) is not None:
        raise JoinError(
            f"there is no Ray cluster at {ADDRESS}={address} ({reason}); start it, correct the "
            f"address, or unset {ADDRESS} to let the job start its own"
        )
    if (problem := tls_problem(host, port)) is not None:
        raise JoinError(problem)


def _check_head(address: str) -> None:
    """Ask the head of a cluster for its id; Ray itself would ask for 20 s, and not say what failed.

    Raises:
        JoinError: It refuses the token, or is no head of Ray.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    with contextlib.closing(init_grpc_channel(address)) as channel:
        ask = channel.unary_unary(
            _CLUSTER_ID, request_serializer=bytes, response_deserializer=bytes
        )
        try:
            ask(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise JoinError(token_refused(address)) from error
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise JoinError(
                    f"the Ray head at {ADDRESS}={address} has not answered within {ANSWER_S:g} s; "
                    "see whether it is overloaded, and run the same command again"
                ) from error
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                reason = "it does not speak TLS with the certificates of RAY_TLS_CA_CERT"
            else:
                reason = "if it uses TLS, set RAY_USE_TLS=1 and the paths of the certificates"
            raise JoinError(_no_head(address, reason)) from error


def _no_head(address: str, reason: str) -> str:
    return (
        f"the server at {ADDRESS}={address} is not a Ray head that this process can talk to; give "
        f"the address that `ray start --head` printed ({reason})"
    )
