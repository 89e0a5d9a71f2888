"""The sweep stage: a training and values to try go in, the best trial comes out.

Ray Tune runs each trial as a training of its own. Begin with `run`; `trial` is one trial.
"""
