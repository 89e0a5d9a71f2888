"""Finds out why a Ray cluster and this process do not agree about TLS, before Ray waits for it.

Ray's client retries a connection that fails for half a minute, and then names no reason. One
handshake with the head's port gives the reason at once.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

USE_TLS = "RAY_USE_TLS"
CERTIFICATE, KEY, AUTHORITY = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"
TIMEOUT_S = 3.0
ANSWER_S = 1.0
"""Time for a server to refuse a client's certificate. TLS 1.3 lets the client finish its handshake
before the server has looked at it."""
HELP = "see cluster/SECURITY.md"
_NOT_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING"}
)
"""Reasons of OpenSSL for an answer that is not TLS."""


def tls_problem(host: str, port: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return why this process cannot connect to a port of Ray, as far as TLS is concerned.

    Args:
        host: Host name or address of the head.
        port: Port of the head's GCS.
        environment: Environment variables, which Ray reads as well.

    Returns:
        One sentence that says what to do; None if TLS is no obstacle. A port that cannot be reached
        at all is none either.
    """
    uses = environment.get(USE_TLS, "0").lower() in ("1", "true")
    where = f"the cluster at {host}:{port}"
    if not uses:
        if not _speaks_tls(host, port):
            return None
        return (
            f"{where} accepts only TLS connections; set {USE_TLS}=1 and {CERTIFICATE}, {KEY} and "
            f"{AUTHORITY} to certificate files of this cluster, {HELP}"
        )
    for name in (CERTIFICATE, KEY, AUTHORITY):
        file = environment.get(name)
        if not file or not Path(file).is_file():
            told = f"{name} = {file!r} is not a file" if file else f"{name} is not set"
            return f"{USE_TLS} is set, but {told}; set it to a certificate file of {where}, {HELP}"
    if not _is_reachable(host, port):
        return None
    if not _speaks_tls(host, port):
        return f"{USE_TLS} is set, but {where} does not use TLS; unset {USE_TLS}"
    if refused := _refusal(host, port, environment):
        return (
            f"{where} and this process do not accept each other's certificates ({refused}); set "
            f"{CERTIFICATE}, {KEY} and {AUTHORITY} to certificate files of this cluster, {HELP}"
        )
    return None


def _is_reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _speaks_tls(host: str, port: int) -> bool:
    """Return whether a port answers a TLS handshake, whatever the certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])  # without it, servers of gRPC end the handshake
    try:
        with (
            socket.create_connection((host, port), timeout=TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except ssl.SSLEOFError:
        return False
    except ssl.SSLError as error:
        return error.reason not in _NOT_TLS
    except OSError:
        return False


def _refusal(host: str, port: int, environment: Mapping[str, str]) -> str | None:
    """Return why a handshake with the certificates of the environment fails; None if it works."""
    try:
        context = ssl.create_default_context(cafile=environment[AUTHORITY])
        # gRPC compares the name as well, but with rules of its own for addresses.
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(environment[CERTIFICATE], environment[KEY])
        with (
            socket.create_connection((host, port), timeout=TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            secure.settimeout(ANSWER_S)
            secure.recv(1)  # servers of HTTP/2 speak first; one that refuses sends an alert
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        return (error.reason or str(error)).lower().replace("_", " ")
    except OSError as error:
        return str(error)
    return None
