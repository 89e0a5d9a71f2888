"""Names and labels of exported metrics, and processes without Ray."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pipelines.common import metrics
from tests.helpers.data import PROJECT


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in metrics.EXPORTED]
    assert len(set(names)) == len(names)
    for metric in metrics.EXPORTED:
        assert re.fullmatch(r"stgt_(progress|ingest|train)(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == isinstance(metric, metrics.Counter)
        assert metric.description.endswith(".")
        # Prometheus gives these labels to what it scrapes, and Ray to what it exports.
        assert not {"job", "instance", "JobId", "WorkerId"} & set(metric.labels)


def test_every_metric_of_the_module_is_listed() -> None:
    kinds = (metrics.Counter, metrics.Gauge)
    assert [one for one in vars(metrics).values() if isinstance(one, kinds)] == [*metrics.EXPORTED]


@pytest.mark.slow
def test_a_process_without_ray_exports_nothing_and_starts_no_ray() -> None:
    code = """
import ray
import pytest

from pipelines.common import metrics
from pipelines.common.progress import Progress

metrics.TRAIN_CLIPS.add(3, run="run")
metrics.GaugeSet().set(metrics.TRAIN_LOSS, 0.5, run="run", loss="total")
Progress("work", 2, "clips").advance(2)
print(ray.is_initialized())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"
