"""ASHA compares by our own step count and remembers what earlier starts measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray.tune.schedulers import TrialScheduler

from pipelines.sweep.scheduler import RememberingASHA, Reports

METRIC = "val/t2v/R1"
STEPS = 20


@dataclass(frozen=True)
class TuneTrial:
    """What ASHA reads of a trial."""

    trial_id: str
    config: dict[str, str] = field(hash=False)


def asha(ended: dict[str, Reports], unfinished: dict[str, Reports]) -> RememberingASHA:
    return RememberingASHA(METRIC, 4, 2, lambda job: STEPS, ended, unfinished)


def report(scheduler: RememberingASHA, trial: TuneTrial, step: int, value: float) -> str:
    return scheduler.on_trial_result(None, trial, {"step": step, METRIC: value})


def added(scheduler: RememberingASHA, name: str) -> TuneTrial:
    trial = TuneTrial(f"tune_{name}", {"trial": name})
    scheduler.on_trial_add(None, trial)
    return trial


def test_a_trial_behind_others_at_the_same_step_is_stopped_with_a_reason() -> None:
    scheduler = asha({}, {})
    good, bad = added(scheduler, "good"), added(scheduler, "bad")
    assert report(scheduler, good, 4, 50.0) == TrialScheduler.CONTINUE
    assert report(scheduler, bad, 2, 10.0) == TrialScheduler.CONTINUE  # before the first rung
    assert report(scheduler, bad, 4, 10.0) == TrialScheduler.STOP
    assert scheduler.stopped == {"bad": f"behind other trials at step 4 ({METRIC} 10.0)"}


def test_a_trial_is_not_stopped_at_its_last_step() -> None:
    scheduler = asha({"earlier": [(4, 10.0), (16, 50.0)]}, {})
    trial = added(scheduler, "trial")
    assert report(scheduler, trial, 4, 40.0) == TrialScheduler.CONTINUE
    assert report(scheduler, trial, STEPS, 40.0) == TrialScheduler.CONTINUE
    assert scheduler.stopped == {}
    other = added(scheduler, "other")
    assert report(scheduler, other, 4, 40.0) == TrialScheduler.CONTINUE
    assert report(scheduler, other, STEPS - 1, 39.0) == TrialScheduler.STOP


def test_a_report_counts_at_one_rung() -> None:
    scheduler = asha({"earlier": [(8, 50.0)]}, {})
    trial = added(scheduler, "trial")
    assert report(scheduler, trial, 8, 60.0) == TrialScheduler.CONTINUE
    # The rung at 4 steps is below; what is measured later is not compared there.
    assert report(scheduler, trial, 12, 1.0) == TrialScheduler.CONTINUE


def test_a_stop_that_nobody_lived_to_record_is_made_up_for() -> None:
    scheduler = asha({"earlier": [(4, 50.0)]}, {"behind": [(4, 40.0)], "ahead": [(4, 60.0)]})
    assert scheduler.missed_stop("behind") == f"behind other trials at step 4 ({METRIC} 40.0)"
    assert scheduler.missed_stop("ahead") is None
    assert scheduler.missed_stop("new") is None


def test_after_a_new_start_trials_are_compared_with_those_that_ended_before() -> None:
    forgetful = asha({}, {})
    assert report(forgetful, added(forgetful, "late"), 4, 40.0) == TrialScheduler.CONTINUE
    scheduler = asha({"earlier": [(4, 50.0), (8, 60.0)]}, {})
    late = added(scheduler, "late")
    assert report(scheduler, late, 4, 40.0) == TrialScheduler.STOP


def test_a_trial_that_goes_on_is_not_judged_again_at_the_rungs_it_passed() -> None:
    scheduler = asha({"earlier": [(4, 50.0), (8, 60.0)]}, {"on": [(4, 40.0)]})
    trial = added(scheduler, "on")
    assert scheduler.stopped == {}
    assert report(scheduler, trial, 6, 1.0) == TrialScheduler.CONTINUE
    assert report(scheduler, trial, 8, 59.0) == TrialScheduler.STOP
    # What it measured before the new start counts for others.
    other = added(scheduler, "other")
    assert report(scheduler, other, 4, 41.0) == TrialScheduler.STOP
    third = added(scheduler, "third")
    assert report(scheduler, third, 4, 49.0) == TrialScheduler.CONTINUE
