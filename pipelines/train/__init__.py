"""The training stage: reads clip stores, and writes checkpoints and metrics.

`run` checks and resumes a run, `fit` runs Ray Train, `worker` is the loop of one training worker,
and `step` is one optimizer step. Read `run` first, then `worker`.
"""
