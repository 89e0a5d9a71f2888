"""Training workers choose the network that Ray uses."""

from __future__ import annotations

import os

import psutil
import pytest
import ray.util

from pipelines.train.connections import INTERFACE, ConnectByNodeAddress, interface_of


def test_workers_listen_where_ray_reaches_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "before")  # so that it is removed after the test
    monkeypatch.delenv(INTERFACE)
    ConnectByNodeAddress().after_init_train_context()
    addresses = {one.address for one in psutil.net_if_addrs()[os.environ[INTERFACE]]}
    assert ray.util.get_node_ip_address() in addresses


def test_an_interface_that_was_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "ib0")
    ConnectByNodeAddress().after_init_train_context()
    assert os.environ[INTERFACE] == "ib0"


def test_an_address_belongs_to_one_interface_or_to_none() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
