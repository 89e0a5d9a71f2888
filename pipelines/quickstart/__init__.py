"""The quickstart: runs all stages on generated videos, without any input data.

It writes videos, ingests them, trains a small model and evaluates it. Start reading at `run`.
"""
