"""The evaluation stage: a checkpoint and a gallery go in, retrieval metrics and a report come out.

`stages` encodes and matches on Ray Data, and `scoring` ranks and writes the results. Begin with
`run`; the protocols of the benchmarks are in `benchmarks`.
"""
