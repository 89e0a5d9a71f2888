"""A process that SIGTERM ended does not wait for its threads for long."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.data import PROJECT

WAIT_FOR_A_THREAD = """
import os
import signal
import threading
import time

from pipelines.common import termination

termination.GRACE_S = 1
threading.Thread(target=time.sleep, args=(300,)).start()
with termination.exit_on_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)
"""


@pytest.mark.slow
def test_a_thread_that_goes_on_does_not_keep_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAIT_FOR_A_THREAD], cwd=PROJECT, timeout=120, check=False
    )
    assert done.returncode == 143
