"""The evaluation stage: computes retrieval metrics and a report for a checkpoint and a gallery.

`stages` encodes and matches on Ray Data, and `scoring` ranks and writes the results. Start reading
at `run`. The protocols of the benchmarks are in `benchmarks`. `question_answering` evaluates
answers to questions instead.
"""
