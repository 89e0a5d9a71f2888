"""The estimate stage: hours, storage and cost of an ingest and a training, before either is run.

A recipe, a number of clips and a cluster go in; the arithmetic in plain words and one summary come
out. Rates are measured on this machine or given, and prices are given. Start reading at `run`.
"""
