"""Hosts that are made of Linux namespaces, for tests of what a cluster of several machines does.

A host has a network, a process table, a `/tmp`, a `/dev/shm` and a name of its own. It sees the
rest of the file system, where Python and the project are, but cannot write to it, as in containers
of one image. What one host writes is therefore invisible to the others and to the test. Hosts are
joined by a bridge. The test's own process has an address on it as well.

Hosts end with the process that made them: the first process of each waits for the end of its
standard input, and the kernel ends all others of its namespace, and removes its network, after it.
"""

from __future__ import annotations

import functools
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import psutil

from tests.helpers.waiting import wait_until

PROJECT = Path(__file__).resolve().parents[2]
UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--fork")
OUTPUT = "/tmp/output"  # noqa: S108 - in the namespace of a host
HOME = "/tmp/home"  # noqa: S108
BRIDGE = "bridge"
TEST, SWITCH, FIRST = 254, 253, 1
"""Last parts of addresses: of the test's process, of the switch, and of the first host."""

SET_UP = """
set -e
echo {name} > /proc/sys/kernel/hostname
mount -n -t tmpfs tmpfs /dev/shm
mount -n -t tmpfs tmpfs /mnt
{keep}
mkdir -p /mnt/home /mnt/output
# As Debian writes it: the name of a host is an address of its own loopback interface.
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /mnt/hosts
touch /mnt/resolv.conf
mount -n --move /mnt /tmp
mount -n --bind /tmp/hosts /etc/hosts
mount -n --bind /tmp/resolv.conf /etc/resolv.conf
mount -n -o remount,bind,ro /
ip link set lo up
trap '' CHLD  # orphans leave no zombies
echo ready
exec cat
"""
KEEP = """
mkdir -p {there}
mount -n --bind {path} {there}
mount -n -o remount,bind,ro {there}
"""


@functools.cache
def missing() -> str | None:
    """Why hosts cannot be made here, for the message of a skipped test; None if they can."""
    programs = ("ip", "mount", "nsenter", "unshare")
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        packages = "Debian's packages iproute2, mount and util-linux"
        return f"hosts of namespaces need {', '.join(absent)}, of {packages}"
    if os.geteuid() != 0:
        return "hosts of namespaces need root, which this process is not"
    link = "ip link add one type veth peer name other && ip link add bridge type bridge"
    mounts = "mount -n -t tmpfs tmpfs /mnt && mount -n -o remount,bind,ro /"
    tried = subprocess.run(
        [*UNSHARE, "sh", "-c", f"{link} && {mounts}"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        said = " ".join(tried.stderr.split())
        return f"Linux namespaces, virtual networks and mounts are not allowed here ({said})"
    return None


class Host:
    """One host, which exists until `kill`."""

    def __init__(self, name: str, address: str, environment: Mapping[str, str]) -> None:
        """Make its namespaces; it has no network yet.

        Args:
            name: its host name.
            address: its address on the bridge.
            environment: variables of its processes, in addition to those that all hosts have.
        """
        self.name, self.address = name, address
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": HOME,
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        keep = "\n".join(_keep(folder) for folder in sorted(_needed_folders()))
        self._outer = subprocess.Popen(
            [*UNSHARE, "--kill-child", "sh", "-c", SET_UP.format(name=name, keep=keep)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == "ready\n", f"{name} could not be made"
        (self._init,) = psutil.Process(self._outer.pid).children()

    @property
    def pid(self) -> int:
        """Its first process, as the test's own process sees it."""
        return self._init.pid

    def join(self, switch: Host) -> None:
        """Connect it to the bridge of a switch."""
        pair = f"add {self._port} type veth peer name eth0 netns {self.pid}"
        switch.ip(f"link {pair}")
        switch.ip(f"link set {self._port} master {BRIDGE} up")
        self.ip(f"address add {self.address}/24 dev eth0")
        self.ip("link set eth0 up")
        # Nothing is beyond it, but programs ask which address leads outside.
        self.ip(f"route add default via {switch.address}")
        self._switch = switch

    def ip(self, words: str) -> None:
        """Change its network. The processes that a command names are those of the test."""
        command = ["nsenter", "--target", str(self.pid), "--net", "ip", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{self.name}: ip {words}: {done.stderr}"

    @property
    def _port(self) -> str:
        # Not its name, since Linux allows an interface 15 characters.
        return f"to-{self.address.rpartition('.')[2]}"

    def _command(self, words: Sequence[str]) -> list[str]:
        enter = ["nsenter", "--target", str(self.pid), "--all"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(PROJECT), *words]

    def run(
        self,
        *words: str,
        check: bool = True,
        timeout_s: float = 300,
        given: str | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the host, in the project's folder, and wait for its end.

        Args:
            words: the program and its arguments.
            check: whether an exit code other than 0 fails the test.
            timeout_s: longest time that it may take.
            given: its standard input.
            variables: environment variables for it alone.
        """
        done = subprocess.run(
            self._command(words),
            env={**self.environment, **variables},
            input=given or "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check:
            said = f"{self.name}: {shlex.join(words)}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
            assert done.returncode == 0, said
        return done

    def start(
        self, *words: str, log: IO[str], errors: IO[str] | None = None, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a program on the host that ends with the host at the latest.

        Args:
            words: the program and its arguments.
            log: takes its output.
            errors: takes its errors; None puts them into the log as well.
            variables: environment variables for it alone.
        """
        return subprocess.Popen(
            self._command(words),
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if errors is None else errors,
        )

    def python(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run Python on the host."""
        return self.run(sys.executable, *words, **settings)

    def write(self, path: str, text: str) -> None:
        """Write a file on the host that only its user can read."""
        folder = shlex.quote(str(Path(path).parent))
        script = f"umask 077; mkdir -p {folder}; cat > {shlex.quote(path)}"
        self.run("sh", "-c", script, given=text)

    def sees(self, path: str) -> bool:
        """Whether there is a file or folder on the host."""
        return self.run("test", "-e", path, check=False).returncode == 0

    def processes(self, name: str) -> list[psutil.Process]:
        """Its processes whose command line holds a name."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                is_here = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
                if is_here and name in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has just ended, or belongs to the machine
        return found

    def unplug(self) -> None:
        """Cut its link: what it sends is lost, and nothing reaches it."""
        self._switch.ip(f"link set {self._port} down")

    def plug(self) -> None:
        """Restore its link."""
        self._switch.ip(f"link set {self._port} up")

    def cut(self, seconds: float) -> None:
        """Cut its link for a while."""
        self.unplug()
        time.sleep(seconds)
        self.plug()

    def lose_power(self) -> None:
        """End all of its processes at once, without a word to the others."""
        self.unplug()
        self.kill()

    def kill(self) -> None:
        """End all of its processes at once; harmless if it has ended."""
        if self._init.is_running():
            self._init.send_signal(signal.SIGKILL)
        self._outer.kill()
        self._outer.wait()
        for pipe in (self._outer.stdin, self._outer.stdout):
            assert pipe is not None
            pipe.close()


def _keep(folder: Path) -> str:
    """Commands that let a host read a folder, below its own `/tmp` as elsewhere, but not write."""
    path = str(folder)
    below = f"/mnt{path.removeprefix('/tmp')}" if path.startswith("/tmp/") else path  # noqa: S108
    return KEEP.format(path=shlex.quote(path), there=shlex.quote(below))


def _needed_folders() -> set[Path]:
    """Folders that hold the project and Python, wherever they are."""
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    return {PROJECT, *(Path(prefix).resolve() for prefix in prefixes)}


_numbers = itertools.count()
"""Of the networks of this process."""


class Network:
    """A switch, to which hosts are joined. The test's own process has an address there."""

    def __init__(self, stack: ExitStack) -> None:
        used = {
            address.address.rpartition(".")[0]
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
        }
        # Other tests may have a network at the same time.
        numbers = ((os.getpid() + step) % 250 + 1 for step in range(250))
        self._prefix = next(
            prefix for number in numbers if (prefix := f"10.213.{number}") not in used
        )
        self._stack = stack
        self._hosts = 0
        self.switch = Host("switch", f"{self._prefix}.{SWITCH}", {})
        stack.callback(self.switch.kill)
        self.switch.ip(f"link add {BRIDGE} type bridge")
        self.switch.ip(f"address add {self.switch.address}/24 dev {BRIDGE}")
        self.switch.ip(f"link set {BRIDGE} up")
        self._connect_test()

    def _connect_test(self) -> None:
        """Join the test's own network; the link is gone when the switch is."""
        name = f"stgt{os.getpid()}n{next(_numbers)}"
        peer = ["peer", "name", "to-test", "netns", str(self.switch.pid)]
        for words in (
            ["link", "add", name, "type", "veth", *peer],
            ["address", "add", f"{self._prefix}.{TEST}/24", "dev", name],
            ["link", "set", name, "up"],
        ):
            subprocess.run(["ip", *words], check=True, capture_output=True)
        self.switch.ip(f"link set to-test master {BRIDGE} up")

    def host(self, name: str, environment: Mapping[str, str]) -> Host:
        """Make a host and join it."""
        host = Host(name, f"{self._prefix}.{FIRST + self._hosts}", environment)
        self._stack.callback(host.kill)
        self._hosts += 1
        host.join(self.switch)
        return host

    def address(self, number: int) -> str:
        """The address that the host with a number, counted from 0, gets."""
        return f"{self._prefix}.{FIRST + number}"


@contextmanager
def network() -> Iterator[Network]:
    """A network whose hosts end with the context."""
    with ExitStack() as stack:
        yield Network(stack)


def wait_for_port(address: str, port: int, log: Path, limit_s: float = 120) -> None:
    """Wait until something listens."""
    import socket

    def listens() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((address, port)) == 0

    wait_until(listens, limit_s, told=lambda: log.read_text()[-3000:])
