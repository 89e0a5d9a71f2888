"""Shared fixtures. What lies outside the project is used where it exists and named where it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def _outside(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, PROJECT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set {variable} to run this test")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Recorded numbers of the published model."""
    return _outside("STGT_REFERENCE_DIR", "reference")


@pytest.fixture(scope="session")
def videos_dir() -> Path:
    """Real clips: good, damaged and bad."""
    return _outside("STGT_VIDEOS_DIR", "videos")


@pytest.fixture(scope="session")
def annotations_dir() -> Path:
    """Annotation files as the data sets ship them."""
    return _outside("STGT_ANNOTATIONS_DIR", "annotations")


@pytest.fixture(scope="session")
def crds_dir() -> Path:
    """KubeRay's custom resource definitions."""
    return _outside("STGT_KUBERAY_CRDS_DIR", "kuberay-crds")
