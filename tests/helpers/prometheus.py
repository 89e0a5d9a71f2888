"""Metrics of Ray's nodes, read directly or through a Prometheus server of the tests' own."""

from __future__ import annotations

import functools
import json
import logging
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.data import PROJECT
from tests.helpers.servers import free_ports, listens
from tests.helpers.waiting import wait_until

logger = logging.getLogger(__name__)

CONFIG = PROJECT / "cluster" / "grafana" / "prometheus.yml"
UNPRIVILEGED = "nobody"


class Sample:
    """A value of a series."""

    def __init__(self, name: str, labels: Mapping[str, str], value: float) -> None:
        self.name = name
        self.labels = dict(labels)
        self.value = value


def targets() -> list[str]:
    """Where the nodes of this process's cluster export metrics."""
    return [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"]
    ]


def exported() -> list[Sample]:
    """What the nodes of this process's cluster export now."""
    found = []
    for target in targets():
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            found += [Sample(one.name, one.labels, one.value) for one in family.samples]
    return found


class Exports:
    """What the nodes have exported, with the latest value of each series.

    Ray exports gauges only while the work goes on.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[str, frozenset[tuple[str, str]]], Sample] = {}

    def look(self) -> None:
        """Take what is exported now."""
        for sample in exported():
            self._latest[sample.name, frozenset(sample.labels.items())] = sample

    def series(self, name: str, **labels: str) -> list[Sample]:
        """The series with a name and these labels, such as those of several drivers."""
        return [
            sample
            for sample in list(self._latest.values())
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def total(self, name: str, **labels: str) -> float | None:
        """Sum of the series with a name and these labels; None without any."""
        found = self.series(name, **labels)
        return sum(sample.value for sample in found) if found else None


@contextmanager
def exports_seen() -> Iterator[Exports]:
    """Look every 3 s at what the nodes of this process's cluster export."""
    seen, over = Exports(), threading.Event()

    def look() -> None:
        while not over.wait(3.0):
            try:
                seen.look()
            except OSError as error:  # the next look takes what this one has missed
                logger.warning("a node of a busy machine did not answer: %s", error)

    looks = threading.Thread(target=look)
    looks.start()
    try:
        yield seen
    finally:
        over.set()
        looks.join()


class Prometheus:
    """A running server."""

    def __init__(self, address: str) -> None:
        self._address = address

    def _ask(self, path: str, **parameters: str) -> Any:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[float]:
        """Values of a query now, one per series.

        Raises:
            AssertionError: the server does not accept the query.
        """
        return [float(one["value"][1]) for one in self._ask("query", query=expression)["result"]]

    def history(self, expression: str, since: float) -> list[list[float]]:
        """Values of a query at every second since a time, one list per series.

        Raises:
            AssertionError: the server does not accept the query.
        """
        times = {"start": str(since), "end": str(time.time()), "step": "1"}
        found = self._ask("query_range", query=expression, **times)["result"]
        return [[float(value) for _, value in one["values"]] for one in found]

    def label_values(self, label: str, series: str) -> set[str]:
        """The values that a label of some series has."""
        return set(self._ask(f"label/{label}/values", **{"match[]": series}))


def has_prometheus() -> bool:
    """Whether the Debian package prometheus is here."""
    return shutil.which("prometheus") is not None


def _is_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    if not listens(server, port, log):
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=30) as answer:
            return answer.status == 200
    except HTTPError as error:
        if error.code != 503:  # its answer while it starts
            raise
        return False


@contextmanager
def prometheus(scrape: list[str]) -> Iterator[Prometheus]:
    """A server that scrapes some addresses every 5 s, otherwise with the project's settings."""
    program = shutil.which("prometheus")
    assert program is not None, "see `has_prometheus`"
    is_root = os.geteuid() == 0
    user = pwd.getpwnam(UNPRIVILEGED) if is_root else pwd.getpwuid(os.geteuid())
    run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if is_root else {}
    # Not below pytest's folders, which other users cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="stgt-prometheus-"))
    try:
        settings = yaml.safe_load(CONFIG.read_text())
        (discovery,) = settings["scrape_configs"][0]["file_sd_configs"]
        discovery["files"] = [str(folder / "nodes.json")]
        # Ray exports every 10 s. A node's answer may take longer than 1 s on a busy machine.
        settings["global"] = {"scrape_interval": "5s", "scrape_timeout": "5s"}
        (folder / "nodes.json").write_text(json.dumps([{"targets": scrape}]))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        os.chown(folder, user.pw_uid, user.pw_gid)
        (port,) = free_ports(1)
        log = folder / "server.log"
        server = subprocess.Popen(
            [
                program, f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}",
            ],
            cwd=folder,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            **run_as,
        )  # fmt: skip
        try:
            wait_until(functools.partial(_is_ready, server, port, log), told=log.read_text)
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
            server.wait(30)
    finally:
        shutil.rmtree(folder)
