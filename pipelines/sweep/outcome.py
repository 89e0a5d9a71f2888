"""What became of the trials of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["finished", "stopped", "diverged", "failed", "unfinished"]
"""`stopped` by the scheduler before its last step; `diverged` with a loss that is not finite;
`failed` with any other error; `unfinished` if it waits or was interrupted."""


@dataclass(frozen=True)
class TrialOutcome:
    """One trial: a training with one setting and one seed."""

    name: str
    """Name of the trial, its folder and its run, such as `trial_00003`."""
    setting: int
    """Number of the setting; the repeats of a setting share it."""
    seed: int
    values: dict[str, Any] = field(default_factory=dict)
    """The searched values, by the dotted name of the config field, such as `optim.lr`."""
    status: Status = "unfinished"
    step: int = 0
    """The last step that was trained."""
    metric: float | None = None
    """Value of the sweep's metric, which is maximized; None if it was never measured."""
    reason: str = ""
    """Why a trial stopped, diverged or failed."""
