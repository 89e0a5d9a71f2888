"""Benchmarks: each module measures one part of the project against a baseline in the same run.

A module returns rows of measurements with targets, which `python -m jobs.bench` prints. Start
reading at `harness`.
"""
