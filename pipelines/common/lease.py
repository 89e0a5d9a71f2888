"""Keeps other processes out of an output folder, local or remote.

A local folder is locked by the operating system. Object storage has no locks, so the process that
uses a remote folder writes who it is into it, and renews this at intervals. Another process takes
the folder over once the first is dead, or has not renewed its entry for a while.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.common import process_identity, storage
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

FILE = "in_use.json"
RENEW_S = 15.0
EXPIRED_S = 60.0
"""Seconds without a renewal after which a process counts as gone."""
SETTLE_S = 2.0
"""Seconds after which a claim is read again, in case two processes claimed at the same time."""


@contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Use a folder alone.

    Raises:
        STGTError: Another process uses the folder.
    """
    if storage.is_local(uri):
        with storage.lock(uri):
            yield
        return
    file = storage.join(uri, FILE)
    token = uuid.uuid4().hex
    _refuse_if_in_use(uri, file)
    _write(file, token)
    time.sleep(SETTLE_S)
    if storage.read_json(file)["token"] != token:
        _refuse_if_in_use(uri, file)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, token, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if _is_ours(file, token):
            storage.remove(file)


def _write(file: str, token: str) -> None:
    entry = {"token": token, "renewed_at": time.time(), **process_identity.own_identity()}
    storage.write_json(file, entry)


def _is_ours(file: str, token: str) -> bool:
    return storage.exists(file) and storage.read_json(file)["token"] == token


def _renew(file: str, token: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        if not _renewed(file, token):
            # As if the user ended it: what is complete stays, and two processes do not mix.
            logger.error("another process has taken %s over, so this one ends", file)
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _renewed(file: str, token: str) -> bool:
    """Renew the entry; return False if another process has replaced it."""
    try:
        if not _is_ours(file, token):
            return False
        _write(file, token)
    except OSError as error:
        logger.warning("cannot renew %s, which keeps other processes out: %s", file, error)
    return True


def _refuse_if_in_use(uri: str, file: str) -> None:
    if not storage.exists(file):
        return
    found: dict[str, Any] = storage.read_json(file)
    tags = {name: value for name, value in found.items() if isinstance(value, str)}
    age = time.time() - found["renewed_at"]
    judged = process_identity.judge(tags)
    if judged == "dead" or (judged == "unknown" and age > EXPIRED_S):
        return
    raise STGTError(
        f"{process_identity.describe(tags)} is using {uri} (last heard of {age:.0f} s ago); wait "
        f"for it to finish, or choose another folder; if it is gone, the folder is free after "
        f"{EXPIRED_S:.0f} s"
    )
