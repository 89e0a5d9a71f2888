"""The journal of a sweep: what one process writes, the next one reads."""

from __future__ import annotations

from pathlib import Path

from pipelines.common import storage
from pipelines.sweep.journal import Journal
from pipelines.train import metrics_log

METRIC = "val/t2v/R1"


def test_what_was_decided_and_how_it_ended_is_read_again(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    first = journal.begin(0, 7, {"optim.lr": 0.1})
    second = journal.begin(0, 8, {"optim.lr": 0.1})
    journal.end(first.name, "stopped", 4, 12.5, "behind")
    third = journal.begin(1, 7, {"optim.lr": 0.2})
    again = Journal(str(tmp_path))
    assert again.trials == {"trial_00000": first, "trial_00001": second, "trial_00002": third}
    assert again.ends == journal.ends
    assert [one.name for one in again.unfinished()] == [second.name, third.name]
    outcomes = again.outcomes()
    assert [(one.name, one.setting, one.seed, one.status) for one in outcomes] == [
        ("trial_00000", 0, 7, "stopped"),
        ("trial_00001", 0, 8, "unfinished"),
        ("trial_00002", 1, 7, "unfinished"),
    ]
    assert (outcomes[0].step, outcomes[0].metric, outcomes[0].reason) == (4, 12.5, "behind")
    again.retry(first.name)
    assert first.name not in Journal(str(tmp_path)).ends


def test_reports_are_the_metrics_beside_the_checkpoints(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    trial = journal.begin(0, 0, {})
    folder = journal.folder(trial.name)
    for last in (2, 4):
        rows: list[metrics_log.StepRecord] = [
            {"step": step, "time_ms": 0, "metrics": {"loss/total": 1.0}}
            for step in (last - 1, last)
        ]
        rows[-1]["metrics"][METRIC] = 10.0 * last
        metrics_log.write(folder, rows)
    assert journal.reports(trial.name, METRIC) == [(2, 20.0), (4, 40.0)]
    assert journal.reports(trial.name, "val/other") == []


def test_a_sweep_that_an_earlier_version_began_is_read(tmp_path: Path) -> None:
    """Earlier versions also numbered decisions and ends by the order in which they were made."""
    trial = {"number": 0, "setting": 0, "seed": 7, "values": [["optim.lr", 0.1]], "rounds": []}
    end = {"status": "stopped", "step": 4, "metric": 12.5, "reason": "behind"}
    folder = tmp_path / "trials" / "trial_00000"
    storage.write_json(str(folder / "trial.json"), {**trial, "order": 0})
    storage.write_json(str(folder / "ended.json"), {**end, "order": 1})
    journal = Journal(str(tmp_path))
    assert [vars(one) for one in journal.outcomes()] == [
        {"name": "trial_00000", "setting": 0, "seed": 7, "values": {"optim.lr": 0.1}, **end}
    ]
    second = journal.begin(1, 7, {"optim.lr": 0.2})
    assert Journal(str(tmp_path)).unfinished() == [second]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "trials" / "notes" / "a.json"), {})
    assert Journal(str(tmp_path)).trials == {}
