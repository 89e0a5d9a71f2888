"""The sweep stage: trains with several settings and finds the best trial.

Ray Tune runs each trial as a separate training. Read `run` first; `trial` is one trial.
"""

from __future__ import annotations

import importlib

_EARLIER_NAMES = {
    "_TrialProgress": "TrialProgress",
    "_trial_name": "trial_name",
    "_run_trial": "run_trial",
}
"""Names that Tune's pickled state of sweeps from earlier versions refers to, and today's names in
`pipelines.sweep.trial`."""


def __getattr__(name: str) -> object:
    if name not in _EARLIER_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pipelines.sweep.trial"), _EARLIER_NAMES[name])
