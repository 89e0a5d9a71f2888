"""The sweep stage: trains with several settings and finds the best.

A training recipe and a space of settings go in; a run folder per trial, a report and the best
setting come out. Read `run` first, then `tuning`, which runs the trials with Ray Tune, and
`journal`, which keeps what was decided.
"""
