"""Which side of a connection does not use TLS, or does not accept the other's certificate."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.common.tls import tls_problem
from tests.helpers.certificates import made_certificates
from tests.helpers.servers import free_ports


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made_certificates(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made_certificates(tmp_path_factory.mktemp("tls") / "strangers")


class Server:
    """Accepts connections, with TLS and client certificates as gRPC does, or without."""

    def __init__(self, certificates: dict[str, str] | None) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._context: ssl.SSLContext | None = None
        if certificates is not None:
            self._context = ssl.create_default_context(
                ssl.Purpose.CLIENT_AUTH, cafile=certificates["RAY_TLS_CA_CERT"]
            )
            self._context.load_cert_chain(
                certificates["RAY_TLS_SERVER_CERT"], certificates["RAY_TLS_SERVER_KEY"]
            )
            self._context.verify_mode = ssl.CERT_REQUIRED
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        settings = b"\0\0\0\4\0\0\0\0\0"  # the first frame of a server of HTTP/2
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            connection.sendall(settings)
            connection.recv(1024)
        except (OSError, ssl.SSLError) as error:
            self.refused = error
        finally:
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def secure(certificates: dict[str, str]) -> Iterator[Server]:
    server = Server(certificates)
    yield server
    server.close()


@pytest.fixture
def plain() -> Iterator[Server]:
    server = Server(None)
    yield server
    server.close()


@pytest.mark.slow
def test_fitting_certificates_are_no_obstacle(
    secure: Server, plain: Server, certificates: dict[str, str]
) -> None:
    assert tls_problem("127.0.0.1", secure.port, certificates) is None
    assert tls_problem("127.0.0.1", plain.port, {}) is None


def test_a_port_that_cannot_be_reached_is_no_matter_of_tls(certificates: dict[str, str]) -> None:
    (port,) = free_ports(1)
    assert tls_problem("127.0.0.1", port, {}) is None
    assert tls_problem("127.0.0.1", port, certificates) is None


@pytest.mark.slow
@pytest.mark.parametrize("server", ["secure", "plain"])
def test_every_disagreement_about_tls_is_one_sentence(
    server: str,
    secure: Server,
    plain: Server,
    certificates: dict[str, str],
    strangers: dict[str, str],
) -> None:
    if server == "plain":
        found = {f"the cluster at 127.0.0.1:{plain.port} does not use TLS": certificates}
        port = plain.port
    else:
        port = secure.port
        lost = {**certificates, "RAY_TLS_CA_CERT": "/no/ca.crt"}
        unset = {name: value for name, value in certificates.items() if "KEY" not in name}
        mixed = {**strangers, "RAY_TLS_CA_CERT": certificates["RAY_TLS_CA_CERT"]}
        found = {
            "accepts only TLS connections; set RAY_USE_TLS=1 and RAY_TLS_SERVER_CERT": {},
            "RAY_TLS_CA_CERT = '/no/ca.crt' is not a file": lost,
            "RAY_TLS_SERVER_KEY is not set": unset,
            "do not accept each other's certificates (certificate verify failed)": strangers,
            "do not accept each other's certificates (": mixed,
        }
    for expected, environment in found.items():
        started = time.monotonic()
        said = tls_problem("127.0.0.1", port, environment)
        assert time.monotonic() - started < 10
        assert said is not None, expected
        assert expected in said
        assert "\n" not in said


def test_the_authority_key_is_for_its_owner_alone(certificates: dict[str, str]) -> None:
    folder = Path(certificates["RAY_TLS_CA_CERT"]).parent
    for name in ("ca.key", "node.key"):
        assert (folder / name).stat().st_mode & 0o077 == 0
