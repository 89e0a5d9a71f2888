"""The documented MLflow server for a team is complete and keeps its secrets."""

from __future__ import annotations

import configparser
import re

import pytest
import yaml

from tests.helpers.data import PROJECT
from tests.helpers.mlflow_servers import COMPOSE, compose_service


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
