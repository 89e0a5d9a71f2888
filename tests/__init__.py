"""Tests. Each process computes on one thread: threads that take turns on few cores wait in loops."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
