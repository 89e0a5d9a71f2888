"""Ray programs: one package per job or family of jobs, and the packages that they share.

Each stage, such as `ingest` or `train`, has a `run` module whose public function `run_*` takes a
config and returns a summary. Stages hand over through the files described in `artifacts`.
"""
