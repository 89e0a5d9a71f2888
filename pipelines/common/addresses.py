"""Finds out whether something answers at an address, within seconds."""

from __future__ import annotations

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
