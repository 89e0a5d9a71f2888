"""Benchmarks: each module measures one part of the project beside a baseline in the same run.

A module gives rows of figures with targets, which `python -m jobs.bench` prints. Begin with
`harness`.
"""
