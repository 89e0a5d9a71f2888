"""Cluster manifests are valid against KubeRay's own definitions, and safe by default."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

import jsonschema
import pytest
import tyro
import yaml

from pipelines.quickstart.config import QuickstartConfig
from tests.helpers.data import PROJECT

MANIFESTS = sorted((PROJECT / "cluster" / "kuberay").glob("*.yaml"))


def documents(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def strict(schema: dict) -> dict:
    """The schema with unknown fields refused, as the API server does for typed objects."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {k: strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    if isinstance(schema.get("items"), dict):
        schema["items"] = strict(schema["items"])
    return schema


@functools.cache
def definition_of(path: Path) -> dict:
    """A definition of 600 KB, which Python's own parser reads in seconds."""
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def schema_of(document: dict, crds: Path) -> dict:
    plural = document["kind"].lower() + "s"
    definition = definition_of(crds / f"ray.io_{plural}.yaml")
    wanted = document["apiVersion"].split("/")[1]
    for version in definition["spec"]["versions"]:
        if version["name"] == wanted:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    raise AssertionError(f"no version {wanted} of {document['kind']}")


def check(document: dict, crds: Path) -> None:
    schema = schema_of(document, crds)
    # Not by `validate`, which checks the schema as well: KubeRay's own takes a second.
    jsonschema.validators.validator_for(schema)(schema).validate(document)


def test_there_are_manifests() -> None:
    assert MANIFESTS


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid_against_the_definitions(path: Path, crds_dir: Path) -> None:
    for document in documents(path):
        check(document, crds_dir)


def test_the_check_refuses_what_the_definitions_do_not_know(crds_dir: Path) -> None:
    document = documents(MANIFESTS[0])[0]
    document["spec"]["entrypiont"] = "typo"
    with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
        check(document, crds_dir)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_clusters_want_a_token_and_run_without_root(path: Path) -> None:
    for document in documents(path):
        spec = document["spec"]["rayClusterSpec"]
        assert spec["authOptions"]["mode"] == "token"
        pod = spec["headGroupSpec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_the_quickstart_job_is_called_with_flags_that_exist() -> None:
    document = documents(MANIFESTS[0])[0]
    words = shlex.split(document["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.quickstart"]
    config = tyro.cli(QuickstartConfig, args=words[3:])
    mounts = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][
        0
    ]["volumeMounts"]
    assert config.output in [mount["mountPath"] for mount in mounts]
