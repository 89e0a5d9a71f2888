"""Registering: what a version holds, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, Schema

from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import MlflowUnavailableError
from pipelines.registry.config import RegisterConfig
from pipelines.registry.promotion import NotPromotedError
from pipelines.registry.run import RegisterSummary, run_register
from stgt.errors import CheckpointError, SettingError, STGTError
from tests.helpers.data import PROJECT
from tests.helpers.evaluated import Evaluated
from tests.helpers.mlflow_servers import BrokenServer
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow


def client_of(evaluated: Evaluated) -> MlflowClient:
    return MlflowClient(tracking_uri=evaluated.tracking.uri)


def versions_of(evaluated: Evaluated, name: str = "retrieval") -> list[Any]:
    return list(client_of(evaluated).search_model_versions(f"name = '{name}'"))


def folder_of(evaluated: Evaluated, summary: RegisterSummary) -> Path:
    client = client_of(evaluated)
    source = client.get_model_version(summary["name"], summary["version"]).source
    assert source is not None
    place = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    assert place is not None
    return Path(place.removeprefix("file://"))


def test_a_version_says_what_it_is(evaluated: Evaluated, registered: RegisterSummary) -> None:
    """Its card has the metrics of the evaluation, which MLflow has."""
    assert registered["created"]
    assert registered["aliases"] == ["challenger"]
    assert registered["evaluation"] is not None
    version = client_of(evaluated).get_model_version("retrieval", registered["version"])
    assert version.status == "READY"
    assert version.tags["checkpoint.uri"] == evaluated.checkpoint
    description = str(version.description)
    metrics = json.loads((Path(evaluated.evaluation) / "metrics.json").read_text())
    low, high = metrics["intervals"]["t2v/R1"]
    assert f"{metrics['metrics']['t2v/R1']:.1f} [{low:.1f}, {high:.1f}]" in description
    for words in (
        "each caption against all videos",
        evaluated.checkpoint,
        "reranking: the top 3 by cosine",
        "license of the weights was not stated",
    ):
        assert words in description, words
    folder = folder_of(evaluated, registered)
    assert (folder / "README.md").read_text() == description
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert [one["name"] for one in json.loads(model["signature"]["inputs"])] == [
        "caption",
        "video_uri",
        "start_s",
        "end_s",
    ]
    assert json.loads((folder / "input_example.json").read_text())["columns"] == ["caption"]


def test_a_model_holds_code_and_weights_but_no_pickle_and_no_optimizer(
    evaluated: Evaluated, registered: RegisterSummary
) -> None:
    folder = folder_of(evaluated, registered)
    files = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    assert not [one for one in files if one.endswith((".pkl", ".pyc", ".pt", ".pth"))]
    assert {"pyfunc_model.py", "code/stgt/model.py", "code/pipelines/video/child.py"} <= files
    assert not [one for one in files if one.startswith("code/pipelines/train")]
    weights = {Path(one).name for one in files if one.startswith("artifacts/")}
    assert "model.safetensors" in weights
    assert "optimizer.safetensors" not in weights
    for line in (folder / "requirements.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        assert version, line
        assert "stgt" not in name
        assert not set(line) & set("/:@+"), line


def test_the_same_checkpoint_is_registered_once(
    evaluated: Evaluated, registered: RegisterSummary
) -> None:
    again = run_register(evaluated.config(license="CC BY 4.0"))
    assert (again["created"], again["version"]) == (False, registered["version"])
    (version,) = versions_of(evaluated)
    assert "## License\n\nCC BY 4.0" in version.description


def test_a_run_stands_for_its_best_checkpoint_and_its_lineage_is_told(
    apart: Evaluated, tmp_path: Path
) -> None:
    """Pre-trained, then fine-tuned by a run that MLflow has: data, ancestors, and source run."""
    client = client_of(apart)
    run_id = client.create_run(client.create_experiment("trainings")).info.run_id
    for name, before in (("pretrained", None), ("tuned", str(tmp_path / "pretrained"))):
        for step in (2, 4):
            folder = tmp_path / name / "checkpoints" / f"step-{step:08d}"
            shutil.copytree(apart.checkpoint, folder)
        record = {"job": "train", "recipe": "tiny", "data": [f"clips/{name}"], "init_from": before}
        (tmp_path / name / "config.json").write_text(
            json.dumps({**record, "recorded": {"data_digest": f"digest of {name}"}})
        )
    (tmp_path / "tuned" / "best.json").write_text('{"step": 2}')
    (tmp_path / "tuned" / "mlflow_run.json").write_text(
        json.dumps({"run_id": run_id, "tracking_uri": apart.tracking.uri})
    )
    summary = run_register(apart.config(checkpoint=str(tmp_path / "tuned")))
    assert summary["checkpoint"] == str(tmp_path / "tuned" / "checkpoints" / "step-00000002")
    version = client.get_model_version("retrieval", summary["version"])
    assert version.run_id == run_id
    assert client.get_run(run_id).outputs.model_outputs
    pretrained = tmp_path / "pretrained" / "checkpoints" / "step-00000004"
    for words in (
        "Trained on clips/tuned (digest digest of tuned)",
        f"Began with: {pretrained}",
        f"Training run in MLflow: {run_id}",
        "recipe tiny",
    ):
        assert words in str(version.description), words


def with_ranks(folder: str, target: Path, rank: int, checkpoint: str) -> str:
    """A copy of an evaluation in which each search has a given rank."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("mlflow_run.json"))
    table = pq.read_table(target / "ranks.parquet")
    column = pa.array([rank] * len(table))
    for name in ("rank", "sim_rank"):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, target / "ranks.parquet")
    result = json.loads((target / "metrics.json").read_text())
    figure = 100.0 if rank == 1 else 0.0
    for name in ("t2v/R1", "sim/t2v/R1"):
        result["metrics"][name] = figure
    result["checkpoint"] = checkpoint
    (target / "metrics.json").write_text(json.dumps(result))
    return str(target)


def test_a_better_challenger_becomes_champion_and_a_worse_one_does_not(
    apart: Evaluated, another_checkpoint: Callable[[str], str], tmp_path: Path
) -> None:
    champion = run_register(apart.config(evaluation=apart.evaluation, promote=True))
    assert champion["promoted"]
    assert champion["decision"] is None
    assert champion["aliases"] == ["challenger", "champion"]
    better = another_checkpoint("better")
    of_better = with_ranks(apart.evaluation, tmp_path / "eval_better", 1, better)
    second = run_register(apart.config(checkpoint=better, evaluation=of_better))
    assert second["aliases"] == ["challenger"]
    # By the evaluations that are recorded with the versions.
    promoted = run_register(apart.config(checkpoint=None, promote=True))
    assert promoted["promoted"]
    assert promoted["aliases"] == ["challenger", "champion"]
    decision = promoted["decision"]
    assert decision is not None
    assert decision["gain"] > 0
    worse = another_checkpoint("worst")
    of_worse = with_ranks(apart.evaluation, tmp_path / "eval_worse", 5, worse)
    with pytest.raises(NotPromotedError) as refused:
        run_register(apart.config(checkpoint=worse, evaluation=of_worse, promote=True))
    assert "version 3 of retrieval is challenger, but version 2 stays champion" in str(
        refused.value
    )
    assert "is worse: t2v/R1 0.0 instead of 100.0" in str(refused.value)
    aliases = client_of(apart).get_registered_model("retrieval").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {
        "challenger": "3",
        "champion": "2",
    }
    # A champion that was never evaluated, or an evaluation of another checkpoint.
    with pytest.raises(NotPromotedError, match="is of the checkpoint .* but version 2"):
        run_register(
            apart.config(checkpoint=None, promote=True, champion_evaluation=apart.evaluation)
        )


def test_a_version_without_an_evaluation_is_not_promoted_over_a_champion(
    apart: Evaluated, another_checkpoint: Callable[[str], str]
) -> None:
    first = run_register(apart.config(promote=True))
    assert first["evaluation"] is None  # this MLflow has none
    with pytest.raises(NotPromotedError, match="version 1 of retrieval has no evaluation"):
        run_register(apart.config(checkpoint=another_checkpoint("second"), promote=True))


def test_the_evaluation_must_be_of_the_checkpoint(
    apart: Evaluated, another_checkpoint: Callable[[str], str]
) -> None:
    with pytest.raises(STGTError, match="give an evaluation of this checkpoint"):
        run_register(apart.config(checkpoint=another_checkpoint("x"), evaluation=apart.evaluation))
    assert versions_of(apart) == []


def test_another_signature_under_the_name_is_refused_before_anything_is_uploaded(
    apart: Evaluated, tmp_path: Path
) -> None:
    code = tmp_path / "other.py"
    code.write_text(
        "from mlflow.models import set_model\n"
        "from mlflow.pyfunc import PythonModel\n"
        "class Other(PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return model_input\n"
        "set_model(Other())\n"
    )
    folder = tmp_path / "other"
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(code),
        pip_requirements=[],
        signature=ModelSignature(inputs=Schema([ColSpec("long", "number")])),
    )
    client = client_of(apart)
    client.create_registered_model("taken")
    client.create_model_version("taken", str(folder))
    with pytest.raises(SettingError, match="has another signature .its inputs, outputs, params"):
        run_register(apart.config(name="taken"))
    assert len(versions_of(apart, "taken")) == 1
    experiment = client.get_experiment_by_name("apart")
    assert experiment is None or not client.search_logged_models([experiment.experiment_id])


def test_bad_input_is_one_sentence(
    apart: Evaluated, tmp_path: Path, mlflow_away: TrackingConfig
) -> None:
    with pytest.raises(STGTError, match="the registered model nobody .* has no alias challenger"):
        run_register(apart.config(checkpoint=None, name="nobody", promote=True))
    with pytest.raises(CheckpointError, match="nowhere does not exist; give a checkpoint, or the"):
        run_register(apart.config(checkpoint=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run_register(apart.config(checkpoint=str(tmp_path / "empty")))
    with pytest.raises(MlflowUnavailableError, match="cannot be used: .*refused"):
        run_register(replace(apart, tracking=mlflow_away).config())
    with pytest.raises(SettingError, match="use --promote"):
        RegisterConfig(name="x")
    for name in ("", "a/b", "a:b"):
        with pytest.raises(SettingError, match="name"):
            RegisterConfig(name=name, promote=True)
    for alias in ("champion", "v3", "a b"):
        with pytest.raises(SettingError, match="alias"):
            RegisterConfig(name="x", promote=True, alias=alias)


def test_a_server_without_a_registry_is_named(apart: Evaluated) -> None:
    server = BrokenServer()
    try:
        server.status = 404
        tracking = TrackingConfig(uri=f"http://{server.address}")
        with pytest.raises(STGTError, match="has no model registry; set --tracking.uri"):
            run_register(replace(apart, tracking=tracking).config(checkpoint=None, promote=True))
    finally:
        server.close()


def test_damaged_weights_are_not_registered(
    apart: Evaluated, another_checkpoint: Callable[[str], str]
) -> None:
    folder = Path(another_checkpoint("damaged"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        run_register(apart.config(checkpoint=str(folder)))
    assert versions_of(apart) == []
    with pytest.raises(MlflowException):
        client_of(apart).get_registered_model("retrieval")


def test_an_upload_that_fails_leaves_no_version(apart: Evaluated, tmp_path: Path) -> None:
    """The place for artifacts is a file at first; later the same call succeeds."""
    client = client_of(apart)
    place = tmp_path / "artifacts"
    place.write_text("in the way")
    experiment = client.create_experiment("apart", artifact_location=place.as_uri())
    with pytest.raises(MlflowUnavailableError, match="cannot be used"):
        run_register(apart.config())
    assert versions_of(apart) == []
    assert client.search_logged_models([experiment]) == []
    place.unlink()
    assert run_register(apart.config())["version"] == "1"


@pytest.mark.soak
def test_a_kill_while_uploading_leaves_no_version_and_the_next_call_goes_on(
    apart: Evaluated, tmp_path: Path
) -> None:
    """SIGKILL once the upload has begun: the artifacts go to a named pipe that nobody reads."""
    client = client_of(apart)
    place = tmp_path / "mlartifacts"
    experiment = client.create_experiment("apart", artifact_location=place.as_uri())
    command = [
        *(sys.executable, "-m", "jobs.register", apart.checkpoint, "--name", "retrieval"),
        *("--tracking.uri", str(apart.tracking.uri), "--tracking.experiment", "apart"),
    ]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: any(place.rglob("*")), told=(tmp_path / "log").read_text)
            psutil.Process(job.pid).send_signal(signal.SIGKILL)
            job.wait(60)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
    assert versions_of(apart) == []
    left = client.search_logged_models([experiment])
    assert [str(one.status) for one in left] in (["PENDING"], ["READY"])
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    assert summary["version"] == "1"
    assert summary["created"]
    assert len(versions_of(apart)) == 1
    (model,) = client.search_logged_models([experiment])
    assert str(model.status) == "READY"
