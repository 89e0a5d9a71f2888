"""The sweep stage: trains with several settings and finds the best trial.

Ray Tune runs each trial as a separate training. Read `run` first; `trial` is one trial.
"""
