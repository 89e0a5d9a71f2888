"""Prints the log of a job on a cluster until the job has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

import aiohttp
import requests
from ray.job_submission import JobSubmissionClient

from pipelines.submit.cluster_client import ClusterError, JobState, job_log, job_state

logger = logging.getLogger(__name__)

AWAY_S = 120.0
"""Longest time without an answer from the cluster."""
QUIET_S = 30.0
"""Time without a line of the log after which the cluster is asked whether the job still runs. A
connection that was cut without a word would otherwise look like a quiet job forever."""
PAUSE_S = 0.5
TAIL = 50
"""Last lines that are kept to explain an end."""


class _LogUnavailableError(Exception):
    """The log could not be read now."""


class Follower:
    """The log of one job, which is printed once, however often the connection is lost.

    Lines of JSON, which are the result of the job, go to standard output; all others go to
    standard error, as they do where the job runs.
    """

    def __init__(self, client: JobSubmissionClient, submission_id: str) -> None:
        self._client, self._id = client, submission_id
        self._printed = 0
        self._rest = ""
        self._said_waiting = False
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.has_result = False
        """Whether a line of JSON was printed."""

    def until_end(self, limit_s: float | None = None) -> JobState:
        """Print the log until the job has ended, and return how it ended.

        Args:
            limit_s: Time after which a job that was told to stop is given up.

        Raises:
            ClusterError: The cluster does not answer anymore, does not know the job anymore, or did
                not stop it in time.
        """
        return asyncio.run(self._until_end(limit_s))

    async def _until_end(self, limit_s: float | None) -> JobState:
        began = time.monotonic()
        away_since: float | None = None
        while True:
            log_error = None
            try:
                await self._stream()
            except _LogUnavailableError as error:
                log_error = error
            # Asked for on its own, since the log is on the node of the job, which may be lost.
            try:
                state = job_state(self._client, self._id)
            except requests.RequestException as error:
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    logger.warning("the cluster does not answer; trying for %.0f s", AWAY_S)
                if now - away_since > AWAY_S:
                    raise ClusterError(
                        f"the cluster has not answered for {AWAY_S:.0f} s; once it does, run the "
                        f"same command again to follow the job {self._id} or to continue its work"
                    ) from error
            else:
                away_since = None
                self._say_waiting(state)
                if state.has_ended:
                    self._finish(log_error)
                    return state
            if limit_s is not None and time.monotonic() - began > limit_s:
                raise ClusterError(
                    f"the cluster has not stopped {self._id} within {limit_s:.0f} s; see its state "
                    "in Ray's dashboard"
                )
            await asyncio.sleep(PAUSE_S)

    def _say_waiting(self, state: JobState) -> None:
        if state.status == "PENDING" and not self._said_waiting:
            self._said_waiting = True
            logger.info("%s has not started: %s", self._id, state.message or "it is being prepared")

    async def _stream(self) -> None:
        """Print what is new in the log, until it ends or nothing comes for a while.

        The cluster sends the log from its beginning on each connection.

        Raises:
            _LogUnavailableError: The connection failed.
        """
        position = 0
        chunks = self._client.tail_job_logs(self._id)
        while (chunk := await _next(chunks)) is not None:
            new = chunk[max(0, self._printed - position) :]
            position += len(chunk)
            self._print(new)
            self._printed = max(self._printed, position)

    def _print(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print_line(line)

    def _finish(self, log_error: Exception | None) -> None:
        """Print what is left of the log of a job that has ended."""
        try:
            whole = job_log(self._client, self._id)
        except (requests.RequestException, ValueError) as error:
            logger.warning(
                "the end of the log cannot be read (%s)", log_error or type(error).__name__
            )
        else:
            self._print(whole[self._printed :])
            self._printed = max(self._printed, len(whole))
        if self._rest:
            self._print_line(self._rest)
            self._rest = ""

    def _print_line(self, line: str) -> None:
        self.tail.append(line)
        is_result = _is_result(line)
        print(line, file=sys.stdout if is_result else sys.stderr, flush=True)
        self.has_result |= is_result


async def _next(chunks: AsyncIterator[str]) -> str | None:
    """Return the next chunk of a log; None at its end, or if nothing comes for a while.

    Raises:
        _LogUnavailableError: The connection failed.
    """
    try:
        return await asyncio.wait_for(anext(chunks, None), timeout=QUIET_S)
    except (TimeoutError, asyncio.TimeoutError):
        return None
    except (aiohttp.ClientError, RuntimeError, OSError, UnicodeDecodeError) as error:
        raise _LogUnavailableError(f"{type(error).__name__}: {error}") from error


def _is_result(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
