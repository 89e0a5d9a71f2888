"""A Ray cluster over hosts of namespaces, with S3 and MLflow on an address of their own."""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3fs

from pipelines.video.synthetic import dataset
from tests.helpers.heads import SETTINGS
from tests.helpers.hosts import OUTPUT, Host, Network, network, wait_for_port
from tests.helpers.mlflow_servers import SERVE
from tests.helpers.waiting import wait_until

S3_PORT, MLFLOW_PORT, GCS_PORT, DASHBOARD_PORT = 5000, 5001, 6379, 8265
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
TOKEN = "/tmp/token"  # noqa: S105, S108 - a path on a host
OBJECT_STORE_BYTES = 150_000_000
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "4",
}
"""Four checks in a row must fail, which takes 10 to 14 s: a cut of 5 s costs no node, and one of
20 s does."""
SUPERVISE = 'while true; do "$@"; sleep 1; done'
"""Starts a program again whenever it ends, as systemd or Kubernetes would."""
STARTED = "Ray runtime started"


class RunningJob:
    """A job that runs on a host, while a test does harm."""

    def __init__(self, host: Host, folder: Path, name: str, *flags: str, **variables: str) -> None:
        number = len(list(folder.glob("job-*.err")))
        self._out, self._err = (folder / f"job-{number:02d}-{name}.{end}" for end in ("out", "err"))
        self._process = host.start(
            "python", "-m", f"jobs.{name}", *flags,
            log=self._out.open("w"), errors=self._err.open("w"), **variables,
        )  # fmt: skip

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._err.read_text()

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def error(self, limit_s: float = 120) -> str:
        """Wait until it fails, and return its last line."""
        assert self._process.wait(limit_s) == 1, self.log[-6000:]
        return self.log.splitlines()[-1]

    def summary(self, limit_s: float = 600) -> dict[str, Any]:
        """Wait for its end, and return what it prints.

        Raises:
            AssertionError: It failed, or something else was printed as well.
        """
        code = self._process.wait(limit_s)
        assert code == 0, f"exit code {code}\n{self.log[-6000:]}"
        (line,) = self._out.read_text().splitlines()
        return json.loads(line)


@dataclass(frozen=True)
class HostCluster:
    """Hosts with Ray, and the services that they share."""

    network: Network
    services: Host
    """Runs S3, and MLflow if it was asked for."""
    head: Host
    nodes: list[Host]
    """The other nodes, each with a supervisor that starts its Ray again."""
    token: str
    folder: Path
    """Folder of the test's own process, for logs."""

    @property
    def hosts(self) -> list[Host]:
        """The head and the other nodes."""
        return [self.head, *self.nodes]

    @property
    def mlflow(self) -> str:
        """Tracking URI of the MLflow server."""
        return f"http://{self.services.address}:{MLFLOW_PORT}"

    @property
    def s3(self) -> s3fs.S3FileSystem:
        """The storage, for the test's own process."""
        return storage_of(self.services)

    def start(self, name: str, *flags: str) -> RunningJob:
        """Start a job in the head's namespaces, on this cluster."""
        return RunningJob(self.head, self.folder, name, *flags, RAY_ADDRESS=self.address)

    def job(self, name: str, *flags: str) -> dict[str, Any]:
        """Run a job in the head's namespaces, on this cluster, and return its summary."""
        return self.start(name, *flags).summary()

    @property
    def address(self) -> str:
        """What a driver on the head joins."""
        return f"{self.head.address}:{GCS_PORT}"

    def host(self, name: str) -> Host:
        """Make a host on which no Ray runs yet."""
        host = self.network.host(name, self.head.environment)
        host.write(TOKEN, self.token)
        return host

    def add(self, name: str, cpus: int) -> Host:
        """Add a node on a new host."""
        node = self.host(name)
        _start_node(node, self.head, cpus, self.folder)
        self.nodes.append(node)
        self.wait_for(node)
        return node

    def lose(self, node: Host) -> None:
        """End a node's host as a power failure does; it does not come back."""
        self.nodes.remove(node)
        node.lose_power()

    def wait_for(self, node: Host, times: int = 1) -> None:
        """Wait until Ray has started on a node for the given time."""
        _wait_for_start(_log_of(node, self.folder), times)

    def starts(self, node: Host) -> int:
        """How many times Ray has started on a node."""
        return _log_of(node, self.folder).read_text().count(STARTED)

    def alive(self) -> int:
        """Number of nodes that the head takes for alive. It needs the dashboard."""
        return sum(node["state"] == "ALIVE" for node in self._nodes())

    def lost(self) -> int:
        """Number of nodes that the head has given up. It needs the dashboard."""
        return sum(node["state"] == "DEAD" for node in self._nodes())

    def _nodes(self) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            f"http://{self.head.address}:{DASHBOARD_PORT}/api/v0/nodes?limit=100",
            headers={"Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]["result"]["result"]


def storage_of(services: Host) -> s3fs.S3FileSystem:
    """The storage of a host that runs S3, for the test's own process."""
    return s3fs.S3FileSystem(
        key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        secret=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=f"http://{services.address}:{S3_PORT}",
        use_listings_cache=False,
    )


@contextmanager
def host_cluster(
    folder: Path, cpus: Sequence[int], *, mlflow: bool = False, dashboard: bool = False
) -> Iterator[HostCluster]:
    """A head and other nodes, each on a host of its own.

    Args:
        folder: folder for logs.
        cpus: number of CPUs of the head and of each other node.
        mlflow: whether an MLflow server is needed.
        dashboard: whether the head has a dashboard, at its own address.
    """
    token = secrets.token_hex(32)
    with network() as net:
        services = net.host("services", {**CREDENTIALS, "HOSTNAME": "services"})
        environment = {
            **CREDENTIALS,
            **HEALTH,
            "AWS_ENDPOINT_URL": f"http://{services.address}:{S3_PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            **SETTINGS,
        }
        names = ["head", *(f"node{number}" for number in range(1, len(cpus)))]
        hosts = [net.host(name, environment) for name in names]
        for host in hosts:
            host.write(TOKEN, token)
        head, nodes = hosts[0], hosts[1:]
        with ThreadPoolExecutor(2) as pool:
            serving = pool.submit(_serve, services, folder, mlflow)
            _start_head(head, cpus[0], dashboard, folder)
            wait_for_port(head.address, GCS_PORT, _log_of(head, folder))
            for node, count in zip(nodes, cpus[1:], strict=True):
                _start_node(node, head, count, folder)
            serving.result()
        cluster = HostCluster(net, services, head, nodes, token, folder)
        for host in hosts:
            cluster.wait_for(host)
        yield cluster


def _serve(services: Host, folder: Path, mlflow: bool) -> None:
    started = [("s3", S3_PORT, "-m", "tests.helpers.faulty_s3", str(S3_PORT), services.address)]
    if mlflow:
        services.run("mkdir", "-p", f"{OUTPUT}/mlflow")
        arguments = (f"{OUTPUT}/mlflow", "s3://bucket/mlflow", str(MLFLOW_PORT), services.address)
        started.append(("mlflow", MLFLOW_PORT, "-c", SERVE, *arguments))
    for name, _, *words in started:
        services.start("python", *words, log=(folder / f"{name}.log").open("w"))
    for name, port, *_ in started:
        wait_for_port(services.address, port, folder / f"{name}.log")
    storage_of(services).mkdir("bucket")


def _start_head(head: Host, cpus: int, dashboard: bool, folder: Path) -> None:
    _supervise(
        head,
        folder,
        cpus,
        "--head",
        f"--port={GCS_PORT}",
        f"--include-dashboard={dashboard}",
        f"--dashboard-host={head.address}",
    )


def _start_node(node: Host, head: Host, cpus: int, folder: Path) -> None:
    _supervise(node, folder, cpus, f"--address={head.address}:{GCS_PORT}")


def _supervise(host: Host, folder: Path, cpus: int, *flags: str) -> None:
    """Start Ray on a host, and again whenever it ends, as on a machine too busy for its start."""
    start = [
        "ray", "start", "--block", "--disable-usage-stats",
        f"--node-ip-address={host.address}", f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", *flags,
    ]  # fmt: skip
    host.start("sh", "-c", SUPERVISE, "sh", *start, log=_log_of(host, folder).open("a"))


def _log_of(host: Host, folder: Path) -> Path:
    return folder / f"{host.name}.log"


def _wait_for_start(log: Path, times: int) -> None:
    def has_started() -> bool:
        return log.read_text().count(STARTED) >= times

    wait_until(has_started, told=lambda: log.read_text()[-3000:])


def put_videos(storage: s3fs.S3FileSystem, folder: Path, num_train: int, num_val: int) -> None:
    """Write generated videos, their annotations and their vocabulary to s3://bucket."""
    for split, videos in dataset.plan_videos(num_train, num_val, seed=0).items():
        if videos:
            dataset.write_split(str(folder / "data"), split, videos)
    dataset.write_vocabulary(str(folder / "data" / "vocab.txt"))
    storage.put(f"{folder / 'data'}/", "bucket/data/", recursive=True)
