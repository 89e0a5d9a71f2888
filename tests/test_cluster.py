"""Cluster manifests are valid and safe by default; so is the documented MLflow server."""

from __future__ import annotations

import configparser
import functools
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import tyro
import yaml

from pipelines.quickstart.config import QuickstartConfig
from tests.helpers.data import PROJECT
from tests.helpers.mlflow_servers import COMPOSE, compose_service

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


def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


def test_secrets_of_the_mlflow_server_come_from_the_environment() -> None:
    secret = re.compile(r"PASSWORD|SECRET|KEY|TOKEN")
    found = {
        f"{name}.{variable}": value
        for name, service in compose()["services"].items()
        for variable, value in service["environment"].items()
        if secret.search(variable)
    }
    assert len(found) == 6
    # Without them, nothing is started, and Docker Compose says which one is missing.
    assert all(re.fullmatch(r"\$\{\w+:\?[^}]+\}", value) for value in found.values())
    assert "://" not in (COMPOSE.with_name("basic_auth.ini").read_text().replace(":///", ""))


def test_a_missing_secret_of_the_mlflow_server_is_named() -> None:
    with pytest.raises(AssertionError, match="POSTGRES_PASSWORD is not set"):
        compose_service("postgres", {})


def test_both_services_of_the_mlflow_server_agree_about_the_database() -> None:
    values = {
        name: f"{name} of the test" for name in re.findall(r"\$\{(\w+):\?", COMPOSE.read_text())
    }
    _, database = compose_service("postgres", values)
    command, server = compose_service("mlflow", values)
    assert command[:2] == ["mlflow", "server"]
    assert "postgresql+psycopg2:///" in command
    for name in ("USER", "PASSWORD"):
        assert server[f"PG{name}"] == database[f"POSTGRES_{name}"]
    assert server["PGDATABASE"] == database["POSTGRES_DB"]
    assert server["PGHOST"] in compose()["services"]


def test_the_mlflow_server_is_reached_on_loopback_and_watched() -> None:
    services = compose()["services"]
    assert all(service["healthcheck"]["test"] for service in services.values())
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert services["mlflow"]["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_the_image_of_the_mlflow_server_has_the_files_it_needs() -> None:
    build = compose()["services"]["mlflow"]["build"]
    context = (COMPOSE.parent / build["context"]).resolve()
    assert context == PROJECT
    lines = (context / build["dockerfile"]).read_text().splitlines()
    sources = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert len(sources) == 2
    assert all((context / source).is_file() for source in sources)
    assert any(line.startswith("USER ") and "root" not in line for line in lines)


def test_members_of_a_team_may_record_in_the_same_experiments() -> None:
    rules = configparser.ConfigParser()
    rules.read(COMPOSE.with_name("basic_auth.ini"))
    assert rules["mlflow"]["default_permission"] == "EDIT"
