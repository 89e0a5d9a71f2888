"""Imports run one way: jobs -> pipelines -> stgt. Ray, MLflow and storage each have one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("stgt", "pipelines", "jobs")
ALLOWED = {"stgt": {"stgt"}, "pipelines": {"stgt", "pipelines"}, "jobs": set(PACKAGES)}
STAGES = {"manifest", "ingest", "train", "evaluate", "sweep", "quickstart"}
STAGE_IMPORTS = {
    "sweep": {"train"},
    "quickstart": {"manifest", "ingest", "train", "evaluate"},
    "ingest": {"manifest"},  # the manifest's reader, not its stage
}


def sources(package: str) -> list[Path]:
    return sorted((PROJECT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        for name in imported(path):
            root = name.split(".")[0]
            if root in (*PACKAGES, "tests"):
                assert root in ALLOWED[package], f"{path.name} imports {name}"


def test_the_model_knows_neither_ray_nor_mlflow_nor_storage() -> None:
    for path in sources("stgt"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"ray", "mlflow", "fsspec", "s3fs", "os"}, path


@pytest.mark.parametrize(("library", "door"), [("mlflow", "tracking.py"), ("fsspec", "storage.py")])
def test_a_service_has_one_door(library: str, door: str) -> None:
    users = {
        path.name
        for package in PACKAGES
        for path in sources(package)
        if library in {name.split(".")[0] for name in imported(path)}
    }
    assert users == {door}


def test_stages_do_not_import_each_other() -> None:
    for stage in sorted(STAGES):
        names = imported(PROJECT / "pipelines" / f"{stage}.py")
        others = {name.split(".")[1] for name in names if name.startswith("pipelines.")}
        assert others & STAGES <= STAGE_IMPORTS.get(stage, set()), stage


def test_ray_is_started_by_jobs_only() -> None:
    for package in ("stgt", "pipelines"):
        for path in sources(package):
            assert "ray.init(" not in path.read_text(), path


def test_importing_the_model_loads_no_ray_and_the_sampler_no_torch() -> None:
    code = (
        "import sys, stgt.sampling; assert 'torch' not in sys.modules; "
        "from stgt import STGT, stgt_tiny; assert STGT and stgt_tiny; "
        "assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_decoding_children_load_no_torch_and_no_ray() -> None:
    code = (
        "import sys, pipelines.decode_child; "
        "assert not {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)
