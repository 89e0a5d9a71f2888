"""Population-based training: who is compared when, who continues from whom, and with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from pipelines.artifacts.checkpoints import COMPLETE
from pipelines.common import storage
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import Journal
from pipelines.sweep.population import FACTORS, Population, check_space
from pipelines.sweep.space import Parameter, read_space
from pipelines.sweep.trial import FAULT, TrialJob, read_fault
from pipelines.sweep.tuning import TrialSource
from pipelines.train import metrics_log, run_folder
from pipelines.train.recipes import pretrain_stage1_tiny
from stgt.errors import STGTError

METRIC = "val/t2v/R1"
SIZE, STEPS = 4, 6
SPACE = ["optim.lr=loguniform(1e-4,1e-1)", "optim.weight_decay=uniform(0.01,0.1)"]


def sweep(folder: Path) -> SweepConfig:
    train = pretrain_stage1_tiny(("clips",), str(folder), "vocab")
    return SweepConfig(
        train=train, space=(), search="pbt", scheduler="none", trials=SIZE, round_steps=2
    )


def population(folder: Path) -> tuple[Population, Journal]:
    """A population as a start of the sweep makes it, from the sweep's folder alone."""
    journal = Journal(str(folder))
    return Population(sweep(folder), space(), SIZE, STEPS, journal), journal


def space() -> dict[str, Parameter]:
    return read_space(SPACE, pretrain_stage1_tiny(("clips",), "out", "vocab"))


def train(journal: Journal, job: TrialJob, metric: float) -> None:
    """Train a part: leave a checkpoint that tells who wrote it, its metric, and a result."""
    until = job["until"]
    assert until is not None
    folder = journal.folder(job["trial"])
    checkpoint = run_folder.checkpoint_uri(folder, until)
    storage.write_bytes(storage.join(checkpoint, "weights"), job["trial"].encode())
    storage.write_bytes(storage.join(checkpoint, COMPLETE), b"")
    metrics_log.write(folder, [{"step": until, "time_ms": 0, "metrics": {METRIC: metric}}])
    if until == STEPS:
        journal.end(job["trial"], "finished", until, metric)


def diverge(journal: Journal, job: TrialJob) -> None:
    fault = {"diverged": True, "reason": "loss is not finite"}
    storage.write_json(storage.join(journal.folder(job["trial"]), FAULT), fault)


def weights(journal: Journal, name: str, step: int) -> str:
    uri = run_folder.checkpoint_uri(journal.folder(name), step)
    return storage.read_bytes(storage.join(uri, "weights")).decode()


def next_part(members: Population, active: set[str]) -> TrialJob:
    job = members.next_job(active)
    assert job is not None
    return job


def round_of(members: Population, count: int = SIZE) -> list[TrialJob]:
    """Take all parts of a round; nothing more is given while they are trained."""
    jobs: list[TrialJob] = []
    active: set[str] = set()
    for _ in range(count):
        jobs.append(next_part(members, active))
        active.add(jobs[-1]["trial"])
    assert members.next_job(active) is None
    assert not members.is_over(active)
    return jobs


def test_the_worst_continues_from_the_best_with_perturbed_values(tmp_path: Path) -> None:
    members, journal = population(tmp_path)
    first = round_of(members)
    assert [job["until"] for job in first] == [2] * SIZE
    assert len({job["values"]["optim.lr"] for job in first}) == SIZE
    for job, metric in zip(first, (10.0, 40.0, 20.0, 30.0), strict=True):
        train(journal, job, metric)
    second = round_of(members)
    assert [job["until"] for job in second] == [4] * SIZE
    worst, best = "trial_00000", "trial_00001"
    assert weights(journal, worst, 2) == best
    (change,) = journal.trials[worst].rounds
    assert (change["step"], change["from"]) == (2, best)
    for name, value in journal.trials[worst].values.items():
        low, high = space()[name].values
        expected = [min(max(first[1]["values"][name] * f, low), high) for f in FACTORS]
        assert value in [pytest.approx(one) for one in expected]
    by_name = {job["trial"]: job for job in second}
    assert by_name[worst]["values"] == journal.trials[worst].values
    for job in first[1:]:
        assert by_name[job["trial"]]["values"] == job["values"]
        assert weights(journal, job["trial"], 2) == job["trial"]


def test_a_population_ends_with_its_last_step(tmp_path: Path) -> None:
    members, journal = population(tmp_path)
    for until in (2, 4, 6):
        jobs = round_of(members)
        assert {job["until"] for job in jobs} == {until}
        for metric, job in enumerate(jobs):
            train(journal, job, float(metric))
    assert members.next_job(set()) is None
    assert members.is_over(set())


def test_a_new_start_decides_the_same(tmp_path: Path) -> None:
    def run(folder: Path, restart_after: set[int]) -> list[dict[str, Any]]:
        members, journal = population(folder)
        parts = 0
        for until in (2, 4, 6):
            for job in round_of(members):
                assert job["until"] == until
                train(journal, job, 10.0 * int(job["trial"][-1]) % 25)
                parts += 1
            if parts in restart_after:
                members, journal = population(folder)
        return [
            {"values": one.values, "rounds": one.rounds}
            for one in Journal(str(folder)).trials.values()
        ]

    assert run(tmp_path / "one", set()) == run(tmp_path / "other", {4, 8})


def test_a_new_start_within_a_round_trains_what_is_missing(tmp_path: Path) -> None:
    members, journal = population(tmp_path)
    first = round_of(members)
    for job in first[:2]:
        train(journal, job, 10.0)
    members, journal = population(tmp_path)
    missing = round_of(members, 2)
    assert [job["trial"] for job in missing] == [job["trial"] for job in first[2:]]
    assert [job["values"] for job in missing] == [job["values"] for job in first[2:]]


def test_a_new_start_in_the_last_round_replaces_nobody_else(tmp_path: Path) -> None:
    members, journal = population(tmp_path)
    for metrics in ((10.0, 40.0, 20.0, 30.0), (10.0, 40.0, 20.0, 30.0)):
        for job, metric in zip(round_of(members), metrics, strict=True):
            train(journal, job, metric)
    last = round_of(members)
    train(journal, last[0], 50.0)
    changes = {name: one.rounds for name, one in journal.trials.items()}
    members, journal = population(tmp_path)
    missing = round_of(members, 3)
    assert [job["values"] for job in missing] == [job["values"] for job in last[1:]]
    assert {name: one.rounds for name, one in journal.trials.items()} == changes


def test_a_copied_checkpoint_has_its_own_metrics_and_the_best_is_chosen_anew(
    tmp_path: Path,
) -> None:
    members, journal = population(tmp_path)
    first = round_of(members)
    for job, metric in zip(first, (10.0, 40.0, 20.0, 30.0), strict=True):
        train(journal, job, metric)
    worst = journal.folder("trial_00000")
    storage.write_json(f"{worst}/best.json", {"step": 2, "metric": METRIC, "value": 10.0})
    round_of(members)
    assert journal.reports("trial_00000", METRIC) == [(2, 40.0)]
    assert not storage.exists(f"{worst}/best.json")


def test_a_member_that_diverged_is_replaced_and_all_of_them_end(tmp_path: Path) -> None:
    members, journal = population(tmp_path)
    first = round_of(members)
    diverge(journal, first[2])
    for job in (first[0], first[1], first[3]):
        train(journal, job, 10.0)
    second = round_of(members)
    assert {job["trial"] for job in second} == {job["trial"] for job in first}
    assert weights(journal, first[2]["trial"], 2) != first[2]["trial"]
    assert read_fault(journal.folder(first[2]["trial"])) is None
    for job in second:
        diverge(journal, job)
    assert members.next_job(set()) is None
    assert members.is_over(set())
    assert {end.status for end in journal.ends.values()} == {"diverged"}


def test_a_member_whose_process_keeps_dying_has_failed_and_the_others_do_not_wait_for_it(
    tmp_path: Path,
) -> None:
    """As Tune asks for trials and says how they ended."""
    members, journal = population(tmp_path)
    over: list[str] = []
    source = TrialSource(sweep(tmp_path), space(), SIZE, journal, None, members, over.append)

    def round_of_tune(until: int, count: int, dies: str | None = None) -> list[str]:
        """Let Tune run the parts of a round; one member's process dies in the middle of it."""
        parts = [source.suggest(f"part_{number}_{until}") for number in range(count)]
        assert source.suggest("too early") is None
        for number, job in enumerate(parts):
            assert isinstance(job, dict)
            assert job["until"] == until
            dead = job["trial"] == dies
            if not dead:
                train(journal, job, 10.0 * number)  # type: ignore[arg-type]
            source.on_trial_complete(f"part_{number}_{until}", error=dead)
        return [job["trial"] for job in parts if isinstance(job, dict)]

    names = round_of_tune(2, SIZE)
    assert over == []
    victim = names[1]
    assert set(round_of_tune(4, SIZE, dies=victim)) == set(names)
    assert over == [victim]
    assert journal.ends[victim].status == "failed"
    assert journal.ends[victim].reason == "its process ended several times; see Ray's logs"
    assert set(round_of_tune(6, SIZE - 1)) == {*names} - {victim}
    assert source.suggest("the end") == Searcher.FINISHED


def test_only_settings_that_may_change_during_a_training_are_searched() -> None:
    train = pretrain_stage1_tiny(("clips",), "out", "vocab")
    check_space(read_space([*SPACE, "model.qformer.dropout=uniform(0,0.3)"], train))
    with pytest.raises(STGTError, match="num_frames cannot change during a training"):
        check_space(read_space([*SPACE, "num_frames=choice(4,8)"], train))
