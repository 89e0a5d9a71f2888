"""The command line of a submission, before anything reaches a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.submit import split_arguments, submit
from pipelines.submit.config import SubmitConfig
from stgt.errors import SettingError

EVALUATION = ["evaluate", "any", "--data", "/a", "--checkpoint", "/b", "--output", "/c"]


@pytest.mark.parametrize(
    ("own", "job"),
    [
        ([], ["train", "tiny", "--data", "a"]),
        (["--address", "train", "--no-follow"], ["train"]),
        (["--address=http://h", "--verbose"], ["evaluate", "any", "--verbose"]),
        (["--exclude", "a", "b"], ["sweep", "--exclude", "c"]),
        (["--exclude", "bench"], ["train"]),
        (["--env", "A=1", "--stop-wait-s", "5"], ["ingest"]),
        (["--max_upload_mb", "5"], ["ingest"]),
        (["--help"], []),
    ],
)
def test_settings_before_the_job_are_those_of_the_submission(
    own: list[str], job: list[str]
) -> None:
    assert split_arguments([*own, *job]) == (own, job)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a job"),
        (["trian"], "there is no job 'trian'; did you mean"),
        (["submit", *EVALUATION], "there is no job 'submit'"),
        (["--env", "A=1", "--env", "B=2", *EVALUATION], "--env is given twice"),
        (["--timeline", "t.json", *EVALUATION], "give --timeline after the job"),
        ([*EVALUATION, "--timeline", "t.json"], "--timeline t.json would be lost"),
        (["evaluate", "any", "--dat", "/a"], "required settings are missing"),
        (["--stop-wait-s", "0", *EVALUATION], "stop_wait_s"),
        (["--driver-resources", "big", *EVALUATION], "must be NAME=AMOUNT"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        submit(arguments)
    assert left.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        (["--tracking.uri", "http://u:secret1@h:5000"], {}, "is given with credentials"),
        (
            [],
            {"MLFLOW_TRACKING_URI": "sqlite:///m.db"},
            "which means something else on the cluster",
        ),
        ([], {"MLFLOW_TRACKING_URI": "./mlruns"}, "which means something else on the cluster"),
        ([], {"MLFLOW_TRACKING_URI": "http://u:secret1@h:5000"}, "is given with credentials"),
    ],
)
def test_where_runs_are_recorded_is_checked(
    settings: list[str],
    environment: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        submit(["--address", "http://127.0.0.1:1", *EVALUATION, *settings])
    assert left.value.code in (1, 2)
    text = capsys.readouterr().err
    assert said in text
    assert "secret1" not in text


def test_a_config_file_with_credentials_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "data: /a\ncheckpoint: /b\noutput: /c\ntracking:\n  uri: http://u:secret2@h:5000\n"
    )
    with pytest.raises(SystemExit):
        submit(["--address", "http://127.0.0.1:1", "evaluate", "--config", "c.yaml"])
    text = capsys.readouterr().err
    assert "is given with credentials" in text
    assert "secret2" not in text


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_credentials_in_the_environment_of_a_job_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match="is the name of a credential") as refused:
        SubmitConfig(env=(f"{name}=hidden1",))
    assert "hidden1" not in str(refused.value)
    SubmitConfig(env=("TOKENIZERS_PARALLELISM=false", "AWS_ENDPOINT_URL"))
