"""Identifies a process across restarts of the machine, to tell whether it is still alive.

A process id alone does not suffice, since it is used again. The kernel's boot id, the host, the
namespace of process ids and the start of the process make it unique. Processes of other users may
be hidden, so the user is part of the identity.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

PREFIX = "process."
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
START_FIELD = 18
"""Index of the start time, in clock ticks since the boot, among the fields of /proc/PID/stat that
follow the state."""
ENDED_STATES = frozenset("ZX")
"""States of processes that have ended but still have an entry in /proc."""

Judgment = Literal["alive", "dead", "unknown"]


def own_identity() -> dict[str, str]:
    """Return what identifies this process, as tags; without the parts that the system lacks."""
    parts = {**_place(), "pid": str(os.getpid()), "start_ticks": _start_ticks(os.getpid())}
    return {f"{PREFIX}{name}": value for name, value in parts.items() if value is not None}


def judge(tags: Mapping[str, str]) -> Judgment:
    """Return whether the process with this identity is alive.

    The answer is `unknown` unless the process belonged to this user and ran on this host, since its
    last boot, in this namespace of process ids.
    """
    found = {
        name.removeprefix(PREFIX): value for name, value in tags.items() if name.startswith(PREFIX)
    }
    place = _place()
    if None in place.values() or any(found.get(name) != value for name, value in place.items()):
        return "unknown"
    pid, start_ticks = found.get("pid", ""), found.get("start_ticks")
    if not pid.isdigit() or start_ticks is None:
        return "unknown"
    return "alive" if _start_ticks(int(pid)) == start_ticks else "dead"


def describe(tags: Mapping[str, str]) -> str:
    """Return the process id and the host of an identity, for messages."""
    if f"{PREFIX}pid" not in tags:
        return "unknown process"
    return f"process {tags[f'{PREFIX}pid']} on {tags.get(f'{PREFIX}host', 'unknown host')}"


def _place() -> dict[str, str | None]:
    return {
        "boot_id": BOOT_ID.read_text().strip() if BOOT_ID.exists() else None,
        "host": socket.gethostname(),
        "pid_namespace": str(PID_NAMESPACE.readlink()) if PID_NAMESPACE.exists() else None,
        "uid": str(os.getuid()),
    }


def _start_ticks(pid: int) -> str | None:
    """Return when a running process started; None if there is none with this id."""
    try:
        # The name of the program comes first, in parentheses, and may contain anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ENDED_STATES else fields[START_FIELD]
