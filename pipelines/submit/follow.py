"""Prints the log of a job on a cluster until the job has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import deque

import aiohttp
import requests
from ray.job_submission import JobDetails, JobSubmissionClient

from pipelines.submit.cluster_client import ClusterError

logger = logging.getLogger(__name__)

AWAY_S = 120.0
"""Longest time without an answer from the cluster."""
PAUSE_S = 0.5
ANSWERS = (OSError, RuntimeError, requests.RequestException, aiohttp.ClientError, TimeoutError)
"""What the client raises if the cluster does not answer, or not as expected."""
TAIL = 50
"""Last lines that are kept to explain an end."""


class Follower:
    """The log of one job, which is printed once, however often the connection is lost.

    Lines of JSON, which are the result of the job, go to standard output; all others go to
    standard error, as they do where the job runs.
    """

    def __init__(self, client: JobSubmissionClient, submission_id: str) -> None:
        self._client, self._id = client, submission_id
        self._printed = 0
        self._rest = ""
        self.tail: deque[str] = deque(maxlen=TAIL)

    def until_end(self) -> JobDetails:
        """Print the log until the job has ended, and return how it ended.

        Raises:
            ClusterError: The cluster does not answer anymore, or does not know the job anymore.
        """
        answered = time.monotonic()
        lost = False
        while True:
            try:
                asyncio.run(self._print())
                details = self._client.get_job_info(self._id)
            except ANSWERS as error:
                if "404" in str(error):
                    raise ClusterError(
                        f"the cluster does not know the job {self._id} anymore, so its head was "
                        "probably started again; run the same command again to continue"
                    ) from error
                if not lost:
                    logger.warning("the cluster does not answer; trying for %.0f s", AWAY_S)
                lost = True
                if time.monotonic() - answered > AWAY_S:
                    raise ClusterError(
                        f"the cluster has not answered for {AWAY_S:.0f} s; once it does, run the "
                        f"same command again to follow the job {self._id} or to continue its work"
                    ) from error
            else:
                answered, lost = time.monotonic(), False
                if details.status.is_terminal():
                    self._finish()
                    return details
            time.sleep(PAUSE_S)

    async def _print(self) -> None:
        """Print what is new in the log, which the cluster sends from its beginning."""
        position = 0
        async for chunk in self._client.tail_job_logs(self._id):
            new = chunk[max(0, self._printed - position) :]
            position += len(chunk)
            self._printed = max(self._printed, position)
            *lines, self._rest = (self._rest + new).split("\n")
            for line in lines:
                self._print_line(line)

    def _finish(self) -> None:
        if self._rest:
            self._print_line(self._rest)
            self._rest = ""

    def _print_line(self, line: str) -> None:
        self.tail.append(line)
        print(line, file=sys.stdout if _is_result(line) else sys.stderr, flush=True)


def _is_result(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
