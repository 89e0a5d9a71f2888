"""Sweeps that earlier versions left unfinished are continued."""

from __future__ import annotations

import pickle

import pipelines.sweep
from pipelines.sweep import trial


def test_names_in_the_pickled_state_of_earlier_sweeps_are_found() -> None:
    # As Tune pickled them: by the name of the module that held them then.
    for earlier, today in (
        (b"_TrialProgress", trial.TrialProgress),
        (b"_trial_name", trial.trial_name),
        (b"_run_trial", trial.run_trial),
    ):
        assert pickle.loads(b"cpipelines.sweep\n" + earlier + b"\n.") is today
    assert not hasattr(pipelines.sweep, "_something_else")


def test_tune_knows_the_trainable_by_the_name_that_earlier_sweeps_began_with() -> None:
    assert trial.run_trial.__name__ == "_run_trial"
