"""The training stage: clip stores and a config go in, checkpoints and metrics come out.

`run` checks and resumes, `fit` runs Ray Train, `worker` is the loop of one training worker, and
`step` is one optimizer step. Begin with `run`, then `worker`.
"""
