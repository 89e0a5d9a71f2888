"""A registered model without the clone: loaded elsewhere, served, and with weights on S3."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.artifacts import checkpoints, embeddings
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.registry.run import RegisterSummary, run_register
from pipelines.registry.weights import assemble, find_weights
from pipelines.video.decoder import read_clip
from stgt.errors import CheckpointError
from stgt.model import STGT
from stgt.model_folder import save_model
from tests.helpers.data import PROJECT
from tests.helpers.evaluated import Evaluated
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.servers import BIN, free_ports, listens
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow

ELSEWHERE = """
import json, os, sys

class Blocker:
    "Refuses the packages of an editable installation, which come from a finder."

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("stgt", "pipelines", "jobs") and path is None:
            raise ModuleNotFoundError(f"{name} is not installed here")

# The finder of the editable installation comes after the path, so the model's own code is found
# first; anything else ends here.
places = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
sys.meta_path[:] = [*places, Blocker()]
import mlflow.pyfunc
import pandas as pd
request = json.loads(sys.stdin.read())
model = mlflow.pyfunc.load_model(request["uri"])
answers = [
    model.predict(pd.DataFrame(one["table"]), params=one.get("params")).to_dict("list")
    for one in request["calls"]
]
import stgt, pipelines.registry.inference, pipelines.video.child
files = [stgt.__file__, pipelines.registry.inference.__file__, pipelines.video.child.__file__]
print("ANSWER" + json.dumps({"answers": answers, "files": files, "modules": sorted(sys.modules)}))
"""


def elsewhere(
    folder: Path,
    evaluated: Evaluated,
    uri: str,
    *calls: dict[str, Any],
    python: str = sys.executable,
) -> dict[str, Any]:
    """Call a registered model in a process that knows nothing of the clone."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    }
    done = subprocess.run(
        [python, "-I", "-c", ELSEWHERE],
        cwd=folder,
        env={**environment, "MLFLOW_TRACKING_URI": str(evaluated.tracking.uri)},
        input=json.dumps({"uri": uri, "calls": calls}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("ANSWER")[2])


@pytest.fixture(scope="module")
def answers(
    evaluated: Evaluated, registered: RegisterSummary, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("empty")
    captions, videos = list(evaluated.captions), list(evaluated.videos)
    missing = str(folder / "gone.mp4")
    return elsewhere(
        folder,
        evaluated,
        f"models:/{registered['name']}@challenger",
        {"table": {"caption": captions}},
        {"table": {"video_uri": [*videos, missing]}},
        {"table": {"caption": captions, "video_uri": videos}},
        {
            "table": {"caption": [captions[0]] * len(videos), "video_uri": videos},
            "params": {"task": "match"},
        },
        {
            "table": {
                "caption": [captions[0], None],
                "video_uri": [videos[0], videos[0]],
                "start_s": [0.0, 1.0],
                "end_s": [1.0, None],
            },
            "params": {"task": "embeddings"},
        },
    )


def stored(evaluated: Evaluated, kind: str) -> np.ndarray:
    """The embeddings that the evaluation computed, in the order of the manifest."""
    folder = storage.join(evaluated.evaluation, "embeddings", kind)
    return np.concatenate(
        [
            embeddings.tensors_of(storage.read_table(storage.join(folder, name)), "embeds")
            for name in storage.list_names(folder)
        ]
    )


def order_of(evaluated: Evaluated) -> list[int]:
    """Position of each row of the manifest among the videos."""
    uris = storage.read_table(evaluated.manifest)["video_uri"].to_pylist()
    return [evaluated.videos.index(uri) for uri in uris]


def test_a_model_loads_without_the_clone_from_its_own_code(answers: dict[str, Any]) -> None:
    assert len(answers["files"]) == 3
    for file in answers["files"]:
        assert not Path(file).is_relative_to(PROJECT), file
        assert Path(file).parts[-3] == "code" or "code" in Path(file).parts, file
    assert not {"ray", "pipelines.train", "pipelines.evaluate", "jobs"} & {*answers["modules"]}


def test_a_model_encodes_as_its_evaluation_did(
    answers: dict[str, Any], evaluated: Evaluated
) -> None:
    texts, videos = answers["answers"][:2]
    order = order_of(evaluated)
    captions = np.array(texts["caption_embedding"])[order]
    np.testing.assert_allclose(captions, stored(evaluated, "texts"), atol=1e-5)
    clips = np.array(videos["video_embedding"][:-1])[order]
    np.testing.assert_allclose(clips, stored(evaluated, "videos"), atol=1e-5)


def test_a_video_that_is_missing_costs_its_row(answers: dict[str, Any]) -> None:
    videos = answers["answers"][1]
    assert videos["error"][:-1] == [None] * (len(videos["error"]) - 1)
    assert videos["error"][-1].startswith("missing: ")
    assert videos["video_embedding"][-1] is None


def test_similarities_and_probabilities_are_those_of_the_model(
    answers: dict[str, Any], evaluated: Evaluated
) -> None:
    texts, videos, pairs, matches = answers["answers"][:4]
    model, _ = checkpoints.load(evaluated.checkpoint)
    clips = np.array(videos["video_embedding"][:-1])
    captions = np.array(texts["caption_embedding"])
    expected = [float((v @ t).max()) for v, t in zip(clips, captions, strict=True)]
    np.testing.assert_allclose(pairs["similarity"], expected, atol=1e-5)
    assert "match_probability" not in pairs
    config = model.config
    frames = np.stack(
        [read_clip(uri, config.num_frames, config.vision.image_size) for uri in evaluated.videos]
    )
    with torch.no_grad():
        encoded = model.eval().encode_video(torch.from_numpy(frames))
        logits = model.match(encoded, [evaluated.captions[0]] * len(frames))
    np.testing.assert_allclose(
        matches["match_probability"], logits.softmax(dim=1)[:, 1].numpy(), atol=1e-5
    )


def test_a_span_of_a_video_has_other_frames_and_entries_may_be_empty(
    answers: dict[str, Any],
) -> None:
    spans = answers["answers"][4]
    assert spans["error"] == [None, None]
    assert spans["caption_embedding"][1] is None
    first, second = (np.array(one) for one in spans["video_embedding"])
    assert first.shape == second.shape
    assert not np.allclose(first, second)


def test_a_model_is_served(
    evaluated: Evaluated, registered: RegisterSummary, tmp_path: Path
) -> None:
    """`mlflow models serve` answers a request, and explains one that it cannot answer."""
    port = free_ports(1)[0]
    log = tmp_path / "serve.log"
    command = ["models", "serve", "-m", registered["model_uri"], "--env-manager", "local"]
    server = subprocess.Popen(
        [str(BIN / "mlflow"), *command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path,
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": str(evaluated.tracking.uri),
            "PATH": f"{BIN}:{os.environ['PATH']}",  # as in an activated environment
        },
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until(functools.partial(listens, server, port, log), told=log.read_text)
        table = {
            "columns": ["caption", "video_uri"],
            "data": [[evaluated.captions[0], evaluated.videos[0]], [evaluated.captions[0], None]],
        }
        status, answer = ask(port, {"dataframe_split": table, "params": {"task": "match"}})
        assert status == 200, answer
        pair, alone = answer["predictions"]
        assert 0 < pair["match_probability"] < 1
        assert -1 <= pair["similarity"] <= 1
        assert pair["error"] is None
        assert alone["error"] == "match need both a caption and a video_uri"
        status, answer = ask(port, {"dataframe_split": table, "params": {"task": "translate"}})
        assert status == 400
        assert "must be one of auto, embeddings, similarities, match" in answer["message"]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def ask(port: int, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(request).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_weights_on_s3_are_read_when_the_model_is_loaded(
    apart: Evaluated, s3: FaultyS3, tmp_path: Path
) -> None:
    """The frame encoder lies in another checkpoint. A file that was rewritten is refused."""
    trained, tokenizer = checkpoints.load(apart.checkpoint)
    vision = replace(trained.config.vision, frozen=True)
    model = STGT(replace(trained.config, vision=vision))
    for folder, with_frozen in (("encoder", True), ("trained", False)):
        save_model(model, tmp_path / folder, with_frozen=with_frozen)
        tokenizer.save(tmp_path / folder / "vocab.txt")
        state = json.loads((Path(apart.checkpoint) / "state.json").read_text())
        state["frame_encoder"] = None if with_frozen else "s3://bucket/registry/encoder"
        (tmp_path / folder / "state.json").write_text(json.dumps(state))
        (tmp_path / folder / "optimizer.safetensors").write_bytes(b"not needed")
        storage.upload_folder(tmp_path / folder, f"s3://bucket/registry/{folder}", "COMPLETE")
    config = apart.config(checkpoint="s3://bucket/registry/trained")
    summary = run_register(config)
    assert summary["weights"] == "referred to"
    call = {"table": {"caption": list(apart.captions[:1]), "video_uri": list(apart.videos[:1])}}
    answer = elsewhere(tmp_path, apart, summary["model_uri"], call)["answers"][0]
    assert answer["error"] == [None]
    size = sum(one.stat().st_size for one in tmp_path.glob("mlartifacts/**/*") if one.is_file())
    assert size < 1_500_000  # code, but no weights
    assert not list(tmp_path.glob("mlartifacts/**/*.safetensors"))
    again = run_register(config)
    assert (again["version"], again["created"]) == (summary["version"], False)
    weights = "s3://bucket/registry/trained/model.safetensors"
    recorded = find_weights(summary["checkpoint"])
    storage.write_bytes(weights, storage.read_bytes(weights)[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{weights} was rewritten after the model was"):
        assemble(recorded, tmp_path / "assembled")


@pytest.mark.soak
def test_a_file_of_more_than_a_gigabyte_is_uploaded_through_a_server(
    apart: Evaluated, tmp_path: Path
) -> None:
    """`mlflow server` that passes artifacts on; the version is loaded from it afterwards."""
    small, tokenizer = checkpoints.load(apart.checkpoint)
    model = STGT(replace(small.config, embed_dim=1_450_000))
    checkpoint = tmp_path / "large"
    checkpoints.save(str(checkpoint), model, tokenizer, step=0)
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size > 1024**3
    del model
    port = free_ports(1)[0]
    log = tmp_path / "server.log"
    command = [
        *(str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"),
        *("--artifacts-destination", str(tmp_path / "artifacts")),
    ]
    server = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until(functools.partial(listens, server, port, log), told=log.read_text)
        tracking = TrackingConfig(uri=f"http://127.0.0.1:{port}", experiment="large")
        served = replace(apart, tracking=tracking)
        summary = run_register(served.config(checkpoint=str(checkpoint)))
        assert summary["weights"] == "uploaded"
        (stored,) = (tmp_path / "artifacts").rglob("model.safetensors")
        assert stored.stat().st_size == size
        call = {"table": {"caption": [apart.captions[0]]}, "params": {"task": "similarities"}}
        answer = elsewhere(tmp_path, served, summary["model_uri"], call)["answers"][0]
        assert answer["error"] == ["similarities need both a caption and a video_uri"]
        shutil.rmtree(checkpoint)
        shutil.rmtree(tmp_path / "artifacts")
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_model_runs_in_a_fresh_environment_of_its_requirements(
    evaluated: Evaluated, registered: RegisterSummary, tmp_path: Path
) -> None:
    """Some gigabytes are downloaded. The environment has neither this project nor Ray."""
    (folder,) = Path(str(evaluated.tracking.uri).removeprefix("sqlite:///")).parent.glob(
        "mlartifacts/models/*/artifacts"
    )
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    requirements = str(folder / "requirements.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    call = {
        "table": {
            "caption": list(evaluated.captions),
            "video_uri": list(evaluated.videos),
        },
        "params": {"task": "match"},
    }
    found = elsewhere(tmp_path, evaluated, registered["model_uri"], call, python=python)
    answer = found["answers"][0]
    assert answer["error"] == [None] * len(evaluated.videos)
    assert all(0 < one < 1 for one in answer["match_probability"])
    assert "ray" not in found["modules"]
    shutil.rmtree(environment)  # several gigabytes
