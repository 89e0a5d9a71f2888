"""The rules between packages, and that each of them is noticed when it is broken."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from tests.helpers.architecture import (
    DOORS,
    imports,
    is_within,
    module_of,
    modules_imported_from_tests,
    violations,
)
from tests.helpers.data import PROJECT


@functools.cache
def read_package(name: str) -> dict[str, str]:
    return {
        str(path.relative_to(PROJECT)): path.read_text()
        for path in sorted((PROJECT / name).rglob("*.py"))
    }


def read_sources() -> dict[str, str]:
    return {**read_package("stgt"), **read_package("pipelines"), **read_package("jobs")}


@functools.cache
def violations_now() -> list[str]:
    return violations(read_sources())


@pytest.mark.slow
def test_the_project_keeps_its_rules() -> None:
    assert len(read_sources()) > 100
    assert violations_now() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("stgt/model.py", "import ray", "stgt must not import ray"),
        ("stgt/model.py", "importlib.import_module('ray.data')", "stgt must not import ray"),
        ("stgt/network/graph.py", "from pipelines.common import storage", "stgt must not import"),
        ("pipelines/common/storage.py", "import stgt.model", "may import stgt.errors alone"),
        ("pipelines/common/storage.py", "from jobs import entry", "must not import jobs"),
        ("pipelines/train/run.py", "import mlflow", "only pipelines/common/tracking.py, "),
        ("pipelines/registry/run.py", "import mlflow", "pyfunc_model.py may import mlflow"),
        ("pipelines/compare/storage.py", "import fsspec", "only pipelines/common/storage.py may"),
        ("pipelines/train/fit.py", "import ray.util.metrics", "only pipelines/common/metrics.py"),
        ("pipelines/train/fit.py", "from ray.util import metrics", "only pipelines/common/metric"),
        ("pipelines/train/fit.py", "from ray.util.metrics import Gauge", "only pipelines/common/"),
        (
            "pipelines/ingest/run.py",
            "import pipelines.train.run",
            "must not import pipelines.train",
        ),
        (
            "pipelines/feed/plan.py",
            "if TYPE_CHECKING:\n    from pipelines.train.config import TrainConfig",
            "must not import pipelines.train",
        ),
        ("pipelines/feed/plan.py", "from pipelines.feed import loader", "import cycle"),
        (
            "stgt/network/graph_attention.py",
            "def f():\n    from stgt.network.graph import GraphTransformer",
            "import cycle",
        ),
        (
            "pipelines/train/run.py",
            "ray.init()",
            "only jobs/entry.py and jobs/joining.py start Ray",
        ),
        ("pipelines/train/run.py", "def also_public() -> None: ...", "one public function run_*"),
        ("pipelines/train/step.py", "from .config import TrainConfig", "imports are absolute"),
        (
            "pipelines/ingest/run.py",
            "import pipelines.video.synthetic.scenes",
            "pipelines.ingest must not import pipelines.video.synthetic",
        ),
        (
            "pipelines/evaluate/question_answering/run.py",
            "from pipelines.evaluate import scoring",
            "question_answering must not import pipelines.evaluate.scoring",
        ),
        ("pipelines/search/run.py", "def run_search() -> None: ...", "has no rule"),
        ("pipelines/train/search/run.py", "def run_search() -> None: ...", "has no rule"),
        ("jobs/train.py", "import tests.helpers", "must not import tests"),
    ],
)
def test_a_broken_rule_is_noticed(path: str, line: str, expected: str) -> None:
    sources = read_sources()
    sources[path] = f"{sources.get(path, '')}\n{line}\n"
    found = set(violations(sources)) - set(violations_now())
    assert [one for one in found if expected in one], found


def test_every_file_that_may_import_a_library_does() -> None:
    """A file that needs the exception no longer loses it."""
    sources = read_sources()
    for library, files in DOORS.items():
        for path, reason in files.items():
            found = [name for name, _ in imports(path, sources) if is_within(name, library)]
            assert found, (library, path, reason)


def test_all_broken_rules_are_listed_at_once() -> None:
    sources = {
        "pipelines/feed/plan.py": "import mlflow\nfrom pipelines.train.run import run_train\n",
        "pipelines/train/run.py": "from pipelines.feed import plan\ndef run_train(): ...\n",
    }
    found = violations(sources)
    assert len(found) == 3, found


@pytest.mark.slow
def test_no_test_module_imports_another() -> None:
    sources = read_package("tests")
    assert len(sources) > 40
    assert modules_imported_from_tests(sources) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("tests/e2e/test_jobs.py", "from tests.e2e.test_quickstart import Quickstart"),
        ("tests/e2e/test_jobs.py", "from tests.e2e import test_quickstart"),
        ("tests/helpers/data.py", "def f():\n    import tests.e2e.test_jobs"),
        ("tests/stgt/test_model.py", "from tests.conftest import s3"),
        ("tests/stgt/test_model.py", "from .test_parity import close"),
    ],
)
def test_a_test_module_that_imports_another_is_noticed(path: str, line: str) -> None:
    sources = dict(read_package("tests"))
    sources[path] += f"\n{line}\n"
    (found,) = modules_imported_from_tests(sources)
    assert found.startswith(f"{path}:")


def loaded_after(imports: str) -> set[str]:
    code = f"import sys; {imports}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_no_config_loads_ray_or_torch() -> None:
    configs = sorted((PROJECT / "pipelines").rglob("config.py"))
    assert len(configs) >= 10
    names = [module_of(str(path.relative_to(PROJECT))) for path in configs]
    assert not {"torch", "ray", "mlflow", "transformers"} & loaded_after(
        f"import {', '.join(names)}"
    )


@pytest.mark.slow
def test_the_model_and_its_benchmark_load_no_ray_and_the_sampler_no_torch() -> None:
    assert "torch" not in loaded_after("import stgt.inputs.frame_choice")
    loaded = loaded_after("from stgt import STGT, stgt_tiny; import pipelines.bench.train_step")
    assert "torch" in loaded
    assert not {"ray", "mlflow"} & loaded


def test_decoding_children_load_no_torch_and_no_ray() -> None:
    loaded = loaded_after("import pipelines.video.child")
    assert not {"torch", "ray", "mlflow", "transformers"} & loaded
