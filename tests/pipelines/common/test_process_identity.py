"""Whether the process that a run belongs to is alive."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipelines.common.process_identity import judge, own_identity
from tests.helpers.data import PROJECT

TELL = """
import json
from pipelines.common.process_identity import own_identity
print(json.dumps(own_identity()), flush=True)
input()
"""


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    import json

    process = subprocess.Popen(
        [sys.executable, "-c", TELL],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    identity = json.loads(process.stdout.readline())
    yield process, identity
    process.kill()
    process.wait()


def test_living_processes_are_alive(other: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    assert judge(own_identity()) == "alive"
    assert judge(other[1]) == "alive"


@pytest.mark.parametrize(
    ("part", "value", "judgment"),
    [
        ("start_ticks", "1", "dead"),  # the id was used again
        ("pid", "4194304", "dead"),  # beyond the largest id
        ("host", "elsewhere", "unknown"),
        ("boot_id", "an earlier boot", "unknown"),
        ("pid_namespace", "pid:[1]", "unknown"),  # another container of this host
        ("uid", "12345", "unknown"),
        ("pid", "not a number", "unknown"),
    ],
)
def test_what_differs_decides(part: str, value: str, judgment: str) -> None:
    assert judge({**own_identity(), f"process.{part}": value}) == judgment


@pytest.mark.parametrize("part", ["boot_id", "host", "pid_namespace", "uid", "pid", "start_ticks"])
def test_nothing_is_concluded_from_an_incomplete_identity(part: str) -> None:
    found = {name: value for name, value in own_identity().items() if name != f"process.{part}"}
    assert judge(found) == "unknown"


def test_a_process_that_ended_is_dead_even_before_its_parent_notices(
    other: tuple[subprocess.Popen[str], dict[str, str]],
) -> None:
    process, identity = other
    process.kill()
    while judge(identity) == "alive":
        pass
    assert judge(identity) == "dead"  # nobody has waited for it: it is still in /proc
    process.wait()
    assert judge(identity) == "dead"
