"""Submits a job to a Ray cluster.

In goes a job's command line; out comes what the job prints, and its exit code. The command line is
checked here, before anything is uploaded (`locations`, `upload`); then the cluster runs it, and its
log is followed (`run`, `follow`). Begin with `run`.
"""
