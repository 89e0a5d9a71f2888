"""Gates: which rows they judge, on which hardware, and what is said about the others."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.bench.config import NAMES, BenchConfig
from pipelines.bench.gates import (
    GateError,
    Hardware,
    WrittenFor,
    benchmark_of,
    failed_check,
    judge,
    machine,
    read_gates,
    unmeasured,
)
from pipelines.bench.harness import Measured, Row, faster, higher, smaller

TWO_CORES = Hardware(cores=2, gpu="none")
SERVER = Hardware(cores=64, gpu="NVIDIA H100 80GB HBM3")

GATES = """
- hardware: any
  gates:
    recovery/lost: {exactly: 0, means: No step is lost.}
    plan/limit: {most: 60, means: Planning takes a minute at most.}
    cutting/videos: {least: 100, means: One process examines 100 videos per second.}
- hardware: {cores: 2, gpu: none}
  gates:
    graph: {least_ratio: 5, means: Five times as fast.}
    graph/memory: {most_ratio: 0.6, means: Little memory.}
- hardware: {gpu: h100}
  gates:
    graph: {least_ratio: 2, means: Twice as fast on this GPU.}
"""


@pytest.fixture
def gates_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "gates.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("row", "verdict", "ratio", "target"),
    [
        (faster("graph", 1.0, 5.0), "met", 5.0, ">= 5"),
        (faster("graph", 1.0, 4.99), "missed", 4.99, ">= 5"),
        (smaller("graph/memory", "bytes", 6.0, 10.0), "met", 0.6, "<= 0.6"),
        (smaller("graph/memory", "bytes", 7.0, 10.0), "missed", 0.7, "<= 0.6"),
        (smaller("plan/limit", "s", 30.0), "met", 0.5, "<= 1"),
        (smaller("plan/limit", "s", 90.0), "missed", 1.5, "<= 1"),
        (higher("cutting/videos", "videos/s", 50.0), "missed", 0.5, ">= 1"),
        (smaller("recovery/lost", "steps", 0, 60), "met", 0.0, "= 0"),
        (smaller("recovery/lost", "steps", 1, 60), "missed", round(1 / 60, 9), "= 0"),
        (higher("graph/new", "clips/s", 1.0), "no gate", None, "none"),
    ],
)
def test_a_gate_judges_its_row(
    gates_file: Callable[[str], str], row: Row, verdict: str, ratio: float | None, target: str
) -> None:
    (judged,) = judge([row], read_gates(gates_file(GATES)), TWO_CORES)
    line = judged.to_dict()
    assert (judged.verdict, line["ratio"], line["target"]) == (verdict, ratio, target)
    assert line["ok"] == (verdict != "missed")
    assert list(line) == ["name", "unit", "ours", "baseline", "ratio", "target", "ok"]


def test_a_count_must_be_exact_in_every_repeat(gates_file: Callable[[str], str]) -> None:
    lost = smaller("recovery/lost", "steps", Measured([0, 0, 1]), 60)
    (judged,) = judge([lost], read_gates(gates_file(GATES)), TWO_CORES)
    assert lost.ours == 0
    assert judged.verdict == "missed"


def test_a_gate_of_other_hardware_judges_nothing(gates_file: Callable[[str], str]) -> None:
    required = read_gates(gates_file(GATES))
    slow = faster("graph", 1.0, 3.0)
    assert [judge([slow], required, one)[0].verdict for one in (TWO_CORES, SERVER)] == [
        "missed",
        "met",
    ]
    (judged,) = judge([slow], required, Hardware(cores=64, gpu="none"))
    assert judged.verdict == "other hardware"
    assert judged.ok
    assert judged.target == "none here (>= 5 on 2 cores, no GPU)"


@pytest.mark.parametrize(
    ("written_for", "fitting"),
    [
        (WrittenFor(), [TWO_CORES, SERVER]),
        (WrittenFor(cores=2), [TWO_CORES]),
        (WrittenFor(gpu="none"), [TWO_CORES]),
        (WrittenFor(gpu="any"), [SERVER]),
        (WrittenFor(gpu="H100"), [SERVER]),
        (WrittenFor(gpu="H200"), []),
        (WrittenFor(cores=2, gpu="any"), []),
    ],
)
def test_hardware_fits_by_cores_and_gpu(written_for: WrittenFor, fitting: list[Hardware]) -> None:
    assert [one for one in (TWO_CORES, SERVER) if written_for.fits(one)] == fitting


def test_gates_whose_row_was_not_measured_are_told(gates_file: Callable[[str], str]) -> None:
    required = read_gates(gates_file(GATES))
    assert unmeasured(["graph", "plan"], ["graph"], required, TWO_CORES) == [
        "plan/limit",
        "graph/memory",
    ]
    # The gates of two cores say nothing here, and those of other benchmarks are not due.
    assert unmeasured(["graph"], ["graph"], required, SERVER) == []


def test_a_check_fails_for_missed_gates_and_for_rows_that_are_gone(
    gates_file: Callable[[str], str],
) -> None:
    cores = machine("cpu").cores
    gates = f"""
    - hardware: {{cores: {cores}}}
      gates:
        graph: {{least_ratio: 5, means: Fast.}}
        graph/memory: {{most_ratio: 0.6, means: Little memory.}}
    """
    config = BenchConfig(names=("graph",), check=True, gates=gates_file(gates))
    required = read_gates(config.gates)
    rows = [faster("graph", 1.0, 4.0)]
    lines = [one.to_dict() for one in judge(rows, required, machine("cpu"))]
    assert (
        failed_check(config, lines)
        == "missed the gates of graph; gates without a measured row: graph/memory"
    )
    rows = [faster("graph", 1.0, 6.0), smaller("graph/memory", "bytes", 1.0, 2.0)]
    lines = [one.to_dict() for one in judge(rows, required, machine("cpu"))]
    assert failed_check(config, lines) is None


def test_the_gates_of_the_project_are_complete() -> None:
    required = read_gates(None)
    # What a script without guarantees takes is reported, and nothing is required.
    assert {benchmark_of(gate.row) for gate in required} >= set(NAMES) - {"end_to_end"}
    assert all(gate.means.endswith(".") for gate in required)
    # Counts do not depend on the machine; rates do.
    assert all(gate.written_for == WrittenFor() for gate in required if gate.rule == "exactly")
    assert all(gate.written_for != WrittenFor() for gate in required if gate.rule == "least")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- hardware: any\n  gates: {graph: {means: A.}}", "give one of least_ratio"),
        ("- hardware: any\n  gates: {graph: {means: A., least: 1, most: 2}}", "give one of"),
        ("- hardware: any\n  gates: {graph: {least: 1}}", "graph > means: Field required"),
        ("- hardware: any\n  gates: {graph: {least: fast, means: A.}}", "graph > least"),
        ("- hardware: any\n  gates: {grahp: {least: 1, means: A.}}", "did you mean graph"),
        ("- hardware: {ram: 3}\n  gates: {}", "hardware"),
        (
            "- hardware: any\n  gates:\n    graph: {least: 1, means: A.}\n"
            "    graph: {least: 2, means: A.}",
            "'graph' is given twice",
        ),
        ("graph: 5", "not in the form of gates.yaml"),
        ("- [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
    gates_file: Callable[[str], str], text: str, what: str
) -> None:
    path = gates_file(text)
    with pytest.raises(GateError, match=what) as caught:
        read_gates(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"nothing\.yaml.*there is no such file"):
        read_gates(str(tmp_path / "nothing.yaml"))


def test_a_ratio_for_a_row_without_a_baseline_is_refused(
    gates_file: Callable[[str], str],
) -> None:
    gates = "- hardware: any\n  gates: {plan/limit: {most_ratio: 1, means: A.}}"
    with pytest.raises(GateError, match=r"plan/limit is a ratio, but this row has no baseline"):
        judge([smaller("plan/limit", "s", 1.0)], read_gates(gates_file(gates)), TWO_CORES)
