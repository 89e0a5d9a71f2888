"""Training on a real Ray: exact after a kill, refusing what cannot work."""

from __future__ import annotations

import functools
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import metrics
from pipelines.common.tracking import StepMetrics
from pipelines.feed.loader import ClipLoader, ShareOfWorker, build_feed, load_in_process
from pipelines.feed.plan import SamplePlan
from pipelines.ingest.run import run_ingest
from pipelines.train import run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.exported_metrics import ExportedMetrics
from pipelines.train.preflight import check_data
from pipelines.train.run import run_train
from pipelines.train.state import WorkerState
from pipelines.train.step import train_step
from pipelines.train.validation import validate
from pipelines.video.decoder import REASONS
from stgt import STGT
from stgt.config import OptimConfig
from stgt.errors import CheckpointError, ClipStoreError, NonFiniteLossError
from stgt.inputs.tokenizer import Tokenizer
from stgt.precision import keep_frozen_weights_in
from stgt.training.objective import TrainingObjective
from tests.helpers.compilation import Compilations, compile_with
from tests.helpers.dashboard import Query, queries
from tests.helpers.data import TinyData, tiny_ingest
from tests.helpers.prometheus import (
    Exports,
    Prometheus,
    exports_seen,
    has_prometheus,
    prometheus,
    targets,
)
from tests.helpers.training import begun, loader_config, resolved, tiny_train
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.ray

RUN, INGEST = "first_stage", "before_it"
"""Names that nothing else has, so that what is exported under them is known."""


def history(config: TrainConfig, run_id: str, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=config.tracking.uri)
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def test_a_sample_is_the_same_whatever_block_it_comes_in(tiny_data: TinyData) -> None:
    loader = ClipLoader(loader_config(tiny_data))
    together = loader({"id": np.arange(30, 50)})
    alone = ClipLoader(loader_config(tiny_data))({"id": np.array([41])})
    assert together["frames"].shape == (20, 6, 64, 64, 3)
    assert together["clip_id"][11] == alone["clip_id"][0]
    assert (together["frames"][11] == alone["frames"][0]).all()
    assert (together["input_ids"][11] == alone["input_ids"][0]).all()


@pytest.mark.parametrize(
    ("world", "start"), [pytest.param(1, 0, marks=pytest.mark.soak), (2, 24), (3, 0)]
)
def test_every_step_holds_its_positions_for_any_number_of_workers(
    tiny_data: TinyData, world: int, start: int
) -> None:
    global_batch, block, stop = 12, 2, 60
    config = loader_config(tiny_data)
    feed = build_feed(config, start, stop, block, num_loaders=1)
    feed.context.execution_options.preserve_order = True
    shards = feed.streaming_split(world, equal=True)
    received: list[list[dict[str, np.ndarray]]] = [[] for _ in range(world)]

    def consume(rank: int) -> None:
        batches = shards[rank].iter_batches(batch_size=global_batch // world, drop_last=True)
        received[rank].extend(
            {name: np.array(column) for name, column in batch.items()} for batch in batches
        )

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for step in range((stop - start) // global_batch):
        first = start + step * global_batch
        positions = [received[rank][step]["position"] for rank in range(world)]
        held = sorted(np.concatenate(positions).tolist())
        assert held == list(range(first, first + global_batch))
    assert {len(batches) for batches in received} == {(stop - start) // global_batch}
    loader = ClipLoader(config)
    for rank in range(world):
        share = ShareOfWorker(rank, world, global_batch // world)
        own = list(load_in_process(loader, start, stop, block, share))
        assert len(own) == len(received[rank])
        for batch, expected in zip(own, received[rank], strict=True):
            for name in ("position", "frames", "input_ids", "clip_id", "clip_key", "fault"):
                assert (np.asarray(batch[name]) == expected[name]).all(), name  # type: ignore[literal-required]


class Watched(NamedTuple):
    """A training, an ingest before it, and what Ray exported of both."""

    config: TrainConfig
    summary: dict
    exports: Exports
    since: float
    server: Prometheus | None
    """None where prometheus is not installed."""


def validation_of(exports: Exports) -> dict[str, float]:
    """The validation metrics that were exported last."""
    return {
        sample.labels["metric"]: sample.value
        for sample in exports.series("ray_stgt_train_validation", run=RUN)
    }


def exports_the_end(exports: Exports, config: TrainConfig, summary: dict) -> bool:
    """Whether the last step, its validation and the end of the work have been exported."""
    of_last_step = {
        name: value
        for name, value in summary["metrics"].items()
        if name.startswith(f"{config.validation_split}/")
    }
    return (
        exports.total("ray_stgt_train_steps_total", run=RUN) == summary["step"]
        and exports.total("ray_stgt_progress_ratio", work=RUN) == 1
        and validation_of(exports) == of_last_step
    )


@pytest.fixture(scope="module")
def watched(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    config = tiny_train(tiny_data, folder / "run", num_workers=1, name=RUN)
    since = time.time()
    watching = prometheus(targets()) if has_prometheus() else nullcontext()
    with watching as server, exports_seen() as exports:
        run_ingest(tiny_ingest(tiny_data.train_manifest, str(folder / "clips"), name=INGEST))
        summary = dict(run_train(config))
        # All that is recorded later than the last step too: Ray exports what there is every 10 s.
        wait_until(
            lambda: exports_the_end(exports, config, summary),
            every_s=0.2,
            told=lambda: f"{validation_of(exports)} in place of {summary['metrics']}",
        )
        yield Watched(config, summary, exports, since, server)


@pytest.fixture(scope="module")
def trained(watched: Watched) -> tuple[TrainConfig, dict]:
    return watched.config, watched.summary


def test_a_run_leaves_checkpoints_and_metrics(trained: tuple[TrainConfig, dict]) -> None:
    config, summary = trained
    assert summary["step"] == 6
    best = run_folder.best(config.output)
    assert best is not None
    # The last two, and the best, which may be any: videos are not made alike to the bit.
    assert run_folder.complete_steps(config.output) == sorted({4, 6, best["step"]})
    assert summary["checkpoint"] == run_folder.checkpoint_uri(config.output, 6)
    for metric in ("loss/total", "loss/itc", "loss/itm", "loss/lm", "lr", "time/data_wait_share"):
        assert [step for step, _ in history(config, summary["run_id"], metric)] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]
    validated = [step for step, _ in history(config, summary["run_id"], "val/t2v/R10")]
    assert sorted(set(validated)) == [2, 4, 6]
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["checkpoint_uri"] == summary["checkpoint"]


def test_a_training_exports_its_figures(watched: Watched) -> None:
    config, summary, exports, *_ = watched
    total = functools.partial(exports.total, run=RUN)
    assert total("ray_stgt_train_clips_total") == 6 * 16
    seconds = sum(value for _, value in history(config, summary["run_id"], "time/step_s"))
    assert total("ray_stgt_train_step_seconds_total") == pytest.approx(seconds)
    share = summary["metrics"]["time/data_wait_share"]
    assert total("ray_stgt_train_data_wait_seconds_total") == pytest.approx(share * seconds)
    assert total("ray_stgt_train_step") == 6
    assert total("ray_stgt_train_worker_restarts") == 0
    assert total("ray_stgt_train_learning_rate") == summary["metrics"]["lr"]
    for loss in ("total", "itc", "itm", "lm"):
        value = summary["metrics"][f"loss/{loss}"]
        assert total("ray_stgt_train_loss", loss=loss) == pytest.approx(value), loss
    validated = validation_of(exports)
    assert config.best_metric in validated
    assert len(validated) >= 6
    assert validated == {name: summary["metrics"][name] for name in validated}
    assert exports.total("ray_stgt_progress_ratio", work=RUN) == 1


def test_an_ingest_exports_its_figures(watched: Watched) -> None:
    total = functools.partial(watched.exports.total, run=INGEST, work="ingest")
    assert total("ray_stgt_ingest_clips_total") == 40
    assert total("ray_stgt_ingest_quarantined_clips_total") == 1
    (bad,) = watched.exports.series("ray_stgt_ingest_quarantined_clips_total", run=INGEST)
    assert bad.labels["reason"] in REASONS
    (store,) = (Path(watched.config.output).parent / "clips").glob("*/catalogue.json")
    written = json.loads(store.read_text())["bytes"]
    assert total("ray_stgt_ingest_store_bytes_total") == written
    assert total("ray_stgt_ingest_worker_restarts") == 0


def test_every_query_of_the_dashboard_finds_what_was_exported(watched: Watched) -> None:
    if watched.server is None:
        pytest.skip("prometheus is not here; install the Debian package prometheus to run this")
    # No node has a GPU here, but the names are in Ray's own list.
    of_gpus = {
        f"{metrics.PREFIX}{name}"
        for name in METRICS_GAUGES
        if name.startswith(("node_gpus_", "node_gram_"))
    }
    asked = [one for one in queries() if torch.cuda.is_available() or not one.names <= of_gpus]
    for query in queries():
        watched.server.history(query.expression, watched.since)  # it must accept all
    for query in asked:
        for name in query.names:
            assert watched.exports.series(name), query
    # A rate needs steps between two looks of the server, and the training may have had none.
    going_on = ExportedMetrics(replace(watched.config, name="going on"), metrics.GaugeSet())
    step = {"time/step_s": 0.5, "lr": 1e-3, "loss/total": 1.0}
    server = watched.server

    def unanswered() -> list[Query]:
        going_on.waited(0.1)
        going_on.add([StepMetrics(step=1, time_ms=0, metrics=step)])
        return [
            query
            for query in asked
            if not any(
                math.isfinite(value)
                for series in server.history(query.expression, watched.since)
                for value in series
            )
        ]

    wait_until(
        lambda: not unanswered(),
        every_s=1.0,
        told=lambda: f"without an answer: {unanswered()}",
    )
    runs = watched.server.label_values("run", '{__name__=~"ray_stgt_.+"}')
    assert {RUN, INGEST} <= runs


def test_a_run_says_where_it_comes_from_and_its_losses_come_first(
    trained: tuple[TrainConfig, dict],
) -> None:
    config, summary = trained
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(summary["run_id"])
    tags = run.data.tags
    assert (tags["job"], tags["recipe"]) == ("train", "pretrain_stage1_tiny")
    assert tags["lineage"] == f"pre-trained as {config.name}"
    train, val = ClipStore(config.data[0]), ClipStore(str(config.val_store))
    assert tags["fingerprint.data"] == train.catalogue["digest"]
    inputs = {
        one.tags[0].value: (one.dataset.digest, json.loads(one.dataset.source)["uri"])
        for one in run.inputs.dataset_inputs
    }
    assert inputs == {
        "training": (train.catalogue["digest"][:12], train.uri),
        "validation": (val.catalogue["digest"][:12], val.uri),
    }
    assert "6 steps of 16 clips" in tags["mlflow.note.content"]
    # MLflow's page of metrics sorts these groups by name. Names without a group come last.
    groups = {name.rpartition("/")[0] for name in run.data.metrics if "/" in name}
    assert sorted(groups)[0] == "loss"
    assert {"samples", "val/t2v", "val_best/t2v"} <= groups
    names = {client.get_logged_model(one.model_id).name for one in run.outputs.model_outputs}
    # The last checkpoint may be the best as well, and is one entry then.
    is_both = summary["checkpoint"] == summary["best_checkpoint"]
    assert names == {config.name, *(() if is_both else (f"{config.name}_best",))}
    assert tags["best_checkpoint_uri"] == summary["best_checkpoint"]
    points = [step for step, _ in history(config, summary["run_id"], "loss/total")]
    assert points == [1, 2, 3, 4, 5, 6], "a checkpoint's metrics are the run's own"


def test_a_finished_run_gives_its_result_at_once(trained: tuple[TrainConfig, dict]) -> None:
    config, summary = trained
    started = time.monotonic()
    again = run_train(config)
    assert again["metrics"] == summary["metrics"]
    assert time.monotonic() - started < 10  # a start of workers alone takes longer


def test_a_run_with_other_settings_in_the_same_folder_is_refused(
    trained: tuple[TrainConfig, dict],
) -> None:
    config, _ = trained
    other = replace(config, optim=OptimConfig(lr=2e-3, warmup_steps=2), seed=1)
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.002; seed: 0 -> 1"):
        run_train(other)


def test_a_checkpoint_without_its_marker_is_never_used(
    trained: tuple[TrainConfig, dict], tmp_path: Path
) -> None:
    _, summary = trained
    copy = tmp_path / "checkpoints" / "step-00000006"
    copy.mkdir(parents=True)
    for path in Path(summary["checkpoint"]).iterdir():
        if path.name != checkpoints.COMPLETE:
            (copy / path.name).write_bytes(path.read_bytes())
    assert run_folder.latest(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
        checkpoints.load(str(copy))


def test_a_second_stage_begins_with_the_weights_of_the_first(
    trained: tuple[TrainConfig, dict], tmp_path: Path
) -> None:
    config, summary = trained
    vocab = checkpoints.load(summary["checkpoint"])[1]
    model = config.model.for_vocabulary(vocab.bos_id, len(vocab), vocab.pad_id)
    second = replace(
        config, model=model, output=str(tmp_path / "second"), init_from=summary["checkpoint"]
    )
    state = WorkerState(second, torch.device("cpu"))
    assert state.step == 0
    begun = state.model.state_dict()
    for name, tensor in checkpoints.load(summary["checkpoint"])[0].state_dict().items():
        assert torch.equal(begun[name], tensor), name


def test_a_loss_that_is_not_finite_stops_with_step_and_clips(
    trained: tuple[TrainConfig, dict], tiny_data: TinyData
) -> None:
    config, summary = trained
    tokenizer = checkpoints.load(summary["checkpoint"])[1]
    model = config.model.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    state = WorkerState(replace(config, model=model), torch.device("cpu"))
    assert state.step == 6
    torch.nn.init.constant_(state.model.text_proj.weight, float("inf"))
    first = state.step * config.global_batch
    batch = ClipLoader(loader_config(tiny_data))({"id": np.arange(first, first + 16)})
    objective = TrainingObjective(state.model, "hard")
    with pytest.raises(NonFiniteLossError, match="not finite at step 6") as caught:
        train_step(state, objective, batch, 1e-3, config, 0, torch.device("cpu"))
    assert caught.value.clip_ids == batch["clip_id"].tolist()


def test_validation_runs_in_the_precision_of_the_run(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_train(tiny_data, tmp_path / "run", precision="bf16")
    tokenizer = Tokenizer(tiny_data.vocab)
    model_config = config.model.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    vision = replace(model_config.vision, frozen=True)
    model = STGT(replace(model_config, vision=vision))
    keep_frozen_weights_in("bf16", model)
    assert 0 <= validate(model, tokenizer, config, torch.device("cpu"))["val/t2v/R10"] <= 100


def test_validation_compiles_nothing(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations = Compilations()
    compile_with(monkeypatch, compilations)
    config = resolved(tiny_train(tiny_data, tmp_path / "run"))
    state = WorkerState(config, torch.device("cpu"))
    validated = (state.model, Tokenizer(tiny_data.vocab))
    plain = validate(*validated, config, torch.device("cpu"))
    state.model.compile_blocks()
    compiled = validate(*validated, replace(config, compile=True), torch.device("cpu"))
    assert compiled == plain
    assert compilations.count == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"global_batch": 64, "block_clips": 8},
            ClipStoreError,
            "39 captions to train on, fewer than one global",
        ),
        ({"num_frames": 13}, ClipStoreError, "contains 12 frames per clip, but the model takes 13"),
        (
            {"num_workers": 16, "block_clips": 1, "num_loaders": 1},
            ValueError,
            r"18 CPUs \(16 workers with 1 each, 1 for data workers",
        ),
        (
            {"num_workers": 16, "block_clips": 1},
            ValueError,
            r"16 CPUs \(16 workers with 1 each\), but the cluster has 12",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tiny_data: TinyData, tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_train(tiny_train(tiny_data, tmp_path / "run", **changes))


def test_a_global_batch_that_does_not_divide_is_refused(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"block_clips = 5: must divide the share of each worker \(8"
    ):
        tiny_train(tiny_data, tmp_path, block_clips=5)


def test_the_plan_covers_the_store(tiny_data: TinyData) -> None:
    store = ClipStore(tiny_data.train_store)
    assert SamplePlan(store.captions_per_shard, 0).num_clips == store.num_clips == 39


def test_a_run_does_not_go_on_with_a_store_that_was_revised(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_data.train_store, store)
    config = tiny_train(replace(tiny_data, train_store=str(store)), tmp_path / "run")
    run_folder.claim(config, check_data(config).digest)
    begun(config)
    run_folder.claim(config, check_data(config).digest)
    catalogue = store / "catalogue.json"
    catalogue.write_text(json.dumps({**json.loads(catalogue.read_text()), "digest": "another"}))
    with pytest.raises(CheckpointError, match="data_digest: .* -> 'another'"):
        run_folder.claim(config, check_data(config).digest)


def test_a_store_of_clips_without_captions_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_data.train_store, store)
    values = json.loads((store / "catalogue.json").read_text())
    values["histograms"]["captions_per_clip"][0] -= 3
    (store / "catalogue.json").write_text(json.dumps(values))
    config = tiny_train(replace(tiny_data, train_store=str(store)), tmp_path / "run")
    with pytest.raises(ClipStoreError, match="contains 3 clips without a caption"):
        check_data(config)
