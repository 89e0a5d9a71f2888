"""Makes training workers on different hosts reach each other."""

from __future__ import annotations

import logging
import os

import psutil
import ray.util
from ray.train.v2._internal.execution.callback import WorkerCallback

logger = logging.getLogger(__name__)

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable with the network interface that torch's backend for CPUs listens at."""


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with an address; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None


class ConnectByNodeAddress(WorkerCallback):
    """Lets torch's backend for CPUs use the network that Ray uses for the node.

    By default it listens at the address that the name of the host stands for. On Debian and other
    systems, /etc/hosts maps this name to 127.0.1.1, which workers on other hosts cannot reach.

    Ray calls this in a worker before torch's process group is set up.
    """

    def after_init_train_context(self) -> None:
        """Choose the interface with the address of the node, unless one is set."""
        if INTERFACE in os.environ:
            return
        address = ray.util.get_node_ip_address()
        interface = interface_of(address)
        if interface is None:
            logger.warning(
                "no network interface has the address of this node, %s, so training workers on "
                "other nodes may not reach this one; set %s to the name of the interface",
                address,
                INTERFACE,
            )
            return
        os.environ[INTERFACE] = interface
