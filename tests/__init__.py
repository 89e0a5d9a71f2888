"""Tests. Each process computes on one thread: those that share few cores wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
