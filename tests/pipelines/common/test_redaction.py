"""Secrets of this process's environment in texts that leave it."""

from __future__ import annotations

import logging

import pytest

from pipelines.common.config import TrackingConfig, without_credentials
from pipelines.common.redaction import RedactingFormatter, without_secrets


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "PGPASSWORD",
        "RAY_AUTH_TOKEN",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
        "some_api_key",
    ],
)
def test_the_value_of_a_secret_variable_is_hidden(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "pl4nted+se/cret")
    assert without_secrets("sent pl4nted+se/cret to it") == "sent *** to it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_AUTH_TOKEN_PATH", "/run/secrets/token"),
        ("TOKENIZERS_PARALLELISM", "false----"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),  # a placeholder that may be part of any word
        ("HF_TOKEN", ""),
    ],
)
def test_other_values_are_shown(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"it is {value}.") == f"it is {value}."


def test_log_lines_and_their_tracebacks_show_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_pl4nted")
    TrackingConfig(uri="http://me:pa55w0rd@host")
    error = ValueError("hf_pl4nted was refused")
    said = (type(error), error, None)
    record = logging.LogRecord(
        "x", logging.ERROR, __file__, 1, "%s failed", ("http://me:pa55w0rd@host",), said
    )
    text = RedactingFormatter("%(message)s").format(record)
    assert text == "http://***@host failed\nValueError: *** was refused"


@pytest.mark.parametrize(
    "text",
    [
        "model.max_text_tokens=foo(16,32): there is no distribution 'foo'",
        "query_tokens=8, passes=3, compass=north, keys=2",
        "/data/tokens=1/train.parquet",
    ],
)
def test_settings_that_resemble_secrets_stay(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "http://h/x?access_tokens=hidden99",
        "http://h/x?key=hidden99",
        "http://h/x?a=1;key=hidden99",
        "http://h/x;token=hidden99/y",
        "http://h/x#access_token=hidden99",
        "password=hidden99",
        "AWS_SECRET_ACCESS_KEY=hidden99",
    ],
)
def test_values_of_secrets_are_hidden(text: str) -> None:
    assert "hidden99" not in without_secrets(text)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://u:p@h/a.mp4", "https://h/a.mp4"),
        ("https://u@h:8443/a.mp4", "https://h:8443/a.mp4"),
        ("postgresql://u:p/w@h/db", "postgresql://h/db"),
        ("https://h/a.mp4?key=s&n=1#t=5", "https://h/a.mp4?n=1#t=5"),
        ("https://h/a.mp4?n=1;key=s", "https://h/a.mp4?n=1"),
        ("https://h/a;token=s/b;v=1/c.mp4", "https://h/a/b;v=1/c.mp4"),
        ("https://h/a.mp4#access_token=s&state=1", "https://h/a.mp4#state=1"),
        ("https://h/a.mp4?token=s#access_token=s", "https://h/a.mp4"),
    ],
)
def test_uris_are_shown_without_their_secrets(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "https://h:8443/a/@user/v.mp4",
        "https://h:8443?mail=me@b",
        "https://[::1]:8443/a/@user/v.mp4",
        "https://h/@user/v.mp4?",
        "https://h/v.mp4?n=1#",
        "s3://bucket/a.tar#keyboard.mp4",
        "/data/a;key=5/b#pass=2.mp4",
        "https://h/@user:1/@other/v.mp4",
    ],
)
def test_uris_without_secrets_are_shown_as_they_are(uri: str) -> None:
    assert without_credentials(uri) == uri


def test_short_values_and_paths_of_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "train")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    text = "/data/train/clips with /home/me/key.json"
    assert without_secrets(text) == text
