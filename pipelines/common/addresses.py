"""Says whether something answers at an address, and what is wrong with a token."""

from __future__ import annotations

import os
import socket

PROBE_S = 3.0


def probe(host: str, port: int, timeout_s: float = PROBE_S) -> str | None:
    """Return why no TCP connection to a host and port is possible; None if it is."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return None
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except socket.gaierror:
        return f"the name {host} is unknown"
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()


def token_refused(cluster: str) -> str:
    """Return the message for a Ray cluster that takes no call without its token."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"the cluster at {cluster} requires a token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        )
    return (
        f"the cluster at {cluster} refused the token; set RAY_AUTH_TOKEN_PATH to the file with the "
        "cluster's token"
    )


def token_missing(cluster: str) -> str:
    """Return the message for a process that should show a Ray cluster a token and has none."""
    return (
        "RAY_AUTH_MODE is token, and no token can be read; set RAY_AUTH_TOKEN_PATH to the file "
        f"with the token of the cluster at {cluster}"
    )
