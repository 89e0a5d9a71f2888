"""Brings clips to a model: clip stores or manifests go in, batches for training workers come out.

`plan` computes which clip is used at which step, `sources` reads it, and `loader` runs on Ray
Data's workers. Begin with `plan`.
"""
