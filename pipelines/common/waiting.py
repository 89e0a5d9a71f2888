"""Says what a stage waits for while none of its workers has started.

Ray waits for free resources without a word, for example while another job uses all CPUs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from pipelines.common.progress import duration

logger = logging.getLogger(__name__)

FIRST_S = 20.0
"""Time until the first message, in seconds. Workers usually start sooner."""
EVERY_S = 60.0


@contextmanager
def telling_of_wait(
    what: str, needed: Mapping[str, float], has_begun: Callable[[], bool]
) -> Iterator[None]:
    """Log what a stage waits for, after 20 s and then every minute, until its work begins.

    Args:
        what: Name of the work, such as `ingest`.
        needed: Resources that the first worker needs, by Ray's name, such as {"CPU": 1}.
        has_begun: Returns whether a worker has begun to work. Called in another thread.
    """
    ended = threading.Event()
    at_first = ray.available_resources()

    def watch() -> None:
        waited, pause = 0.0, FIRST_S
        while not ended.wait(pause) and not has_begun():
            waited, pause = waited + pause, EVERY_S
            try:
                logger.warning("%s", _describe(what, needed, at_first, waited))
            except RayError as error:
                logger.warning("cannot ask Ray for its free resources: %s", error)
                return

    thread = threading.Thread(target=watch, name="telling_of_wait", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _describe(
    what: str, needed: Mapping[str, float], at_first: Mapping[str, float], waited_s: float
) -> str:
    there, free = ray.cluster_resources(), ray.available_resources()
    needs = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
    found = " and ".join(
        f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s are free" for name in needed
    )
    # Without a look at the start, workers that are starting would seem to lack what they hold.
    lacking = [
        name
        for name, amount in needed.items()
        if max(free.get(name, 0), at_first.get(name, 0)) < amount
    ]
    then = "it starts as soon as other work frees them" if lacking else "workers are starting"
    return (
        f"{what}: no worker has started after {duration(waited_s)}; it needs {needs}, and in the "
        f"cluster {found}; {then}"
    )
