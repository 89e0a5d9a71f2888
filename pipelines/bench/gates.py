"""Gates: what each row of a benchmark must reach, read from a YAML file and applied to rows.

A gate belongs to the hardware that it was written for. On other hardware its row is measured and
shown, but not judged, because a figure of two cores says nothing about sixty-four.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pipelines.bench.config import NAMES, BenchConfig
from pipelines.bench.harness import Row
from pipelines.common import storage
from stgt.errors import SettingError

FILE = "gates.yaml"
MEASURED_ELSEWHERE = ("hosts",)
"""Rows that tests/helpers measure, because they need root."""
ANY, NONE = "any", "none"

Rule = Literal["least_ratio", "most_ratio", "least", "most", "exactly"]
Verdict = Literal["met", "missed", "other hardware", "no gate"]


class GateError(SettingError):
    """A file of gates cannot be used."""


@dataclass(frozen=True)
class Hardware:
    """What the rows of a run depend on."""

    cores: int
    """CPU cores that the process may use."""
    gpu: str
    """Name of the GPU that the benchmarks use, or `none`."""

    def __str__(self) -> str:
        return f"{_cores(self.cores)}, {_gpu(self.gpu)}"


@dataclass(frozen=True)
class WrittenFor:
    """The hardware that gates were written for; None fits all."""

    cores: int | None = None
    gpu: str | None = None
    """`none`, `any`, or a part of the name of a GPU."""

    def fits(self, hardware: Hardware) -> bool:
        """Return whether the gates apply to a machine."""
        if self.cores not in (None, hardware.cores):
            return False
        if self.gpu == ANY:
            return hardware.gpu != NONE
        if self.gpu in (None, NONE):
            return self.gpu is None or hardware.gpu == NONE
        return self.gpu.lower() in hardware.gpu.lower()

    def __str__(self) -> str:
        parts = [] if self.cores is None else [_cores(self.cores)]
        parts += [] if self.gpu is None else [_gpu(self.gpu)]
        return ", ".join(parts) or "any hardware"


def _cores(count: int) -> str:
    return f"{count} {'core' if count == 1 else 'cores'}"


def _gpu(name: str) -> str:
    return {NONE: "no GPU", ANY: "a GPU"}.get(name, f"GPU {name}")


@dataclass(frozen=True)
class Gate:
    """What a row must reach."""

    row: str
    rule: Rule
    value: float
    means: str
    """One sentence."""
    written_for: WrittenFor

    @property
    def is_limit(self) -> bool:
        """Whether the value is in the unit of the row instead of a ratio to the baseline."""
        return self.rule in ("least", "most", "exactly")

    def is_met(self, row: Row) -> bool:
        """Return whether a row reaches the gate.

        Raises:
            GateError: The gate is for a ratio, and the row has no baseline.
        """
        reached = float(row.ours) if self.is_limit else row.ratio
        if reached is None:
            raise GateError(
                f"the gate of {row.name} is a ratio, but this row has no baseline; give {LIMITS}"
            )
        if self.rule == "exactly":
            return all(value == self.value for value in row.ours.values)
        if self.rule.startswith("least"):
            return reached >= self.value
        return reached <= self.value

    @property
    def sign(self) -> str:
        """How the row must compare with the value."""
        return {"least": ">=", "most": "<=", "exactly": "="}[self.rule.partition("_")[0]]

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


LIMITS = "least, most or exactly instead"


@dataclass(frozen=True)
class JudgedRow:
    """A row and what its gate says about it."""

    row: Row
    gate: Gate | None
    """The gate that applies; without one, that of other hardware, if there is one."""
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether the row misses no gate of this hardware."""
        return self.verdict != "missed"

    @property
    def baseline(self) -> float | None:
        """What the row is compared with: its baseline, or the limit of its gate."""
        if self.row.baseline is not None or self.gate is None or not self.gate.is_limit:
            return self.row.baseline
        return self.gate.value

    @property
    def ratio(self) -> float | None:
        """The row's ratio to its baseline or limit; None if there is neither."""
        if self.row.baseline is not None or not self.baseline:
            return self.row.ratio
        return self.row.ours / self.baseline

    @property
    def target(self) -> str:
        """The required range of the ratio."""
        if self.gate is None:
            return "none"
        if self.verdict == "other hardware":
            return f"none here ({self.gate} on {self.gate.written_for})"
        if self.gate.is_limit and self.gate.value and self.row.baseline is None:
            return f"{self.gate.sign} 1"
        return str(self.gate)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values: one JSON line of standard output."""
        values = {
            "name": self.row.name,
            "unit": self.row.unit,
            "ours": float(self.row.ours),
            "baseline": None if self.baseline is None else float(self.baseline),
            "ratio": self.ratio,
            "target": self.target,
            "ok": self.ok,
        }
        return {
            key: round(value, 9) if isinstance(value, float) else value
            for key, value in values.items()
        }


class _Gate(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    means: str
    least_ratio: float | None = None
    most_ratio: float | None = None
    least: float | None = None
    most: float | None = None
    exactly: int | None = None

    @model_validator(mode="after")
    def _has_one_rule(self) -> _Gate:
        if sum(getattr(self, rule) is not None for rule in get_args(Rule)) != 1:
            raise ValueError(f"give one of {', '.join(get_args(Rule))}")
        if not self.means.strip():
            raise ValueError("`means` must be a sentence")
        return self


class _WrittenFor(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    cores: int | None = None
    gpu: str | None = None


class _Group(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    hardware: Literal["any"] | _WrittenFor
    gates: dict[str, _Gate]


class _File(BaseModel):
    groups: list[_Group]


def read_gates(uri: str | None) -> list[Gate]:
    """Read gates in the order of their file.

    Args:
        uri: A YAML file; None reads the gates that come with the project.

    Raises:
        GateError: The file cannot be read, or is no file of gates.
    """
    import yaml

    where = FILE if uri is None else uri
    try:
        if uri is None:
            data = resources.files("pipelines.bench").joinpath(FILE).read_bytes()
        else:
            data = storage.read_bytes(storage.resolve(uri))
        content = yaml.load(data, _loader())
    except FileNotFoundError as error:
        raise GateError(f"gates = {uri!r}: there is no such file; give a YAML file") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise GateError(f"the gates {where} cannot be read: {why}; give a YAML file") from error
    try:
        groups = _File.model_validate({"groups": content}).groups
    except ValidationError as error:
        first = error.errors()[0]
        place = " > ".join(str(part) for part in first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        raise GateError(
            f"the gates {where} are not in the form of {FILE}: {place or 'the file'}: {message}"
        ) from error
    gates = [gate for group in groups for gate in _gates_of(group)]
    _refuse_unknown(where, gates)
    return gates


def _loader() -> type:
    """Return a loader of plain YAML that refuses a name which occurs twice in a mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Hashable, Any]:
        names = [loader.construct_object(key) for key, _ in node.value]
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise yaml.YAMLError(f"{twice[0]!r} is given twice{node.start_mark}; keep one of them")
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _gates_of(group: _Group) -> list[Gate]:
    hardware = group.hardware
    written_for = (
        WrittenFor() if isinstance(hardware, str) else WrittenFor(hardware.cores, hardware.gpu)
    )
    found = []
    for row, gate in group.gates.items():
        rule = next(rule for rule in get_args(Rule) if getattr(gate, rule) is not None)
        found.append(Gate(row, rule, getattr(gate, rule), gate.means, written_for))
    return found


def _refuse_unknown(where: str, gates: Iterable[Gate]) -> None:
    known = (*NAMES, *MEASURED_ELSEWHERE)
    for gate in gates:
        if (name := benchmark_of(gate.row)) not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise GateError(f"the gates {where}: no benchmark has the row {gate.row!r}{hint}")


def benchmark_of(row: str) -> str:
    """Return the name of the benchmark that measures a row."""
    return row.partition("/")[0]


def machine(device: str) -> Hardware:
    """Return the hardware that this process benchmarks.

    Args:
        device: cpu or cuda.
    """
    gpu = NONE
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_name()
    return Hardware(cores=len(os.sched_getaffinity(0)), gpu=gpu)


def judge(rows: Iterable[Row], gates: Sequence[Gate], hardware: Hardware) -> list[JudgedRow]:
    """Apply gates to rows. The first gate of a row that fits the hardware counts."""
    return [_judge(row, gates, hardware) for row in rows]


def _judge(row: Row, gates: Sequence[Gate], hardware: Hardware) -> JudgedRow:
    mine = [gate for gate in gates if gate.row == row.name]
    fitting = [gate for gate in mine if gate.written_for.fits(hardware)]
    if fitting:
        return JudgedRow(row, fitting[0], "met" if fitting[0].is_met(row) else "missed")
    return JudgedRow(row, mine[0] if mine else None, "other hardware" if mine else "no gate")


def unmeasured(
    names: Iterable[str], rows: Iterable[str], gates: Sequence[Gate], hardware: Hardware
) -> list[str]:
    """Return the rows that gates of this hardware are for, and that were not measured.

    Args:
        names: Benchmarks that ran. Gates of others are left out.
        rows: Names of the rows that they returned.
        gates: All gates.
        hardware: The machine.
    """
    ran, measured = set(names), set(rows)
    wanted = (
        gate.row for gate in gates if benchmark_of(gate.row) in ran and gate.row not in measured
    )
    fitting = {gate.row for gate in gates if gate.written_for.fits(hardware)}
    return [row for row in dict.fromkeys(wanted) if row in fitting]


def failed_check(config: BenchConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why a run of benchmarks does not pass its gates; None if it does.

    Args:
        config: Settings of the run.
        rows: What it returned, as plain values.
    """
    missed = [str(row["name"]) for row in rows if not row["ok"]]
    gone = unmeasured(
        config.names,
        (str(row["name"]) for row in rows),
        read_gates(config.gates),
        machine(config.device),
    )
    parts = [f"missed the gates of {', '.join(missed)}"] if missed else []
    if gone:
        parts.append(f"gates without a measured row: {', '.join(gone)}")
    return "; ".join(parts) or None
