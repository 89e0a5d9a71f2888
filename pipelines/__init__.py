"""Ray programs: one package per stage, and below the stages the packages that they share.

The stages are `manifest`, `ingest`, `train`, `evaluate`, `compare`, `sweep`, `weights`, `registry`
and `quickstart`; each has a `run` module whose public function `run_*` takes a config and returns a
summary. Stages hand over through the files described in `artifacts`.
"""
