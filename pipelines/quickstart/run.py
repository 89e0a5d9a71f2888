"""Runs the whole pipeline on generated videos. Only this stage and the sweep call other stages.

A finished stage leaves a marker and is skipped in later runs. An interrupted quickstart therefore
resumes where it stopped, and a finished one only shows its result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import ray.data

from pipelines.artifacts import checkpoints
from pipelines.common import ray_errors, storage
from pipelines.common.config import TrackingConfig, to_dict
from pipelines.common.output_folder import RUN
from pipelines.common.progress import Progress
from pipelines.evaluate.config import EvaluateConfig
from pipelines.ingest.config import IngestConfig
from pipelines.manifest.config import ManifestConfig
from pipelines.quickstart import store
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.folder import PENDING, RESULT, claim
from pipelines.synthetic import dataset
from pipelines.synthetic.order_pairs import write_order_pairs
from pipelines.train import recipes
from pipelines.train.config import TrainConfig
from stgt.config import stgt_tiny

if TYPE_CHECKING:
    from pipelines.common.recording import Recording
    from pipelines.common.tracking import Run
    from pipelines.evaluate.run import EvaluateSummary
    from pipelines.ingest.run import IngestSummary

# Stages, torch and MLflow load slowly and are imported where they are used, so that a finished
# quickstart shows its result, and invalid flags are reported, without delay.

logger = logging.getLogger(__name__)

CLIPS_PER_SHARD = 128
K_RERANK = 16
TRAINED = "trained"
PICTURE = "retrieval.png"

QuickstartSummary = dict[str, float]


class _Quickstart:
    """The stages of the quickstart, which pass data to each other as files in the folder."""

    def __init__(
        self, config: QuickstartConfig, folder: str, connect: Callable[[QuickstartConfig], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self._connect = connect
        self.tracking = TrackingConfig(
            uri=f"sqlite:///{storage.join(folder, 'mlflow.db')}", experiment="quickstart"
        )
        self.vocab = storage.join(folder, "vocab.txt")
        self.order_pairs = storage.join(folder, "annotations", "order_pairs.parquet")
        self._stages: list[str] = []
        """MLflow runs of the stages."""

    def at(self, *parts: str) -> str:
        """Return a path in the quickstart's folder."""
        return storage.join(self.folder, *parts)

    @cached_property
    def recording(self) -> Recording:
        """The parent MLflow run of all stages."""
        from pipelines.common.provenance import About
        from pipelines.common.recording import Recording

        settings = to_dict(self.config)
        settings.pop("fresh")
        return Recording(
            self.tracking,
            "quickstart",
            self.at(RUN),
            settings,
            meanwhile=f"the quickstart continues and its results are kept in {self.folder}; they "
            "will be sent once MLflow can be used",
            about=About(
                job="quickstart",
                summary="Makes videos, ingests them, trains a small STGT in two stages, and "
                "evaluates it. Each stage is a run below this one. Results are in "
                f"`{self.folder}`.",
            ),
        )

    def deliver(self, summary: QuickstartSummary) -> None:
        """Send the result to MLflow and close the run."""
        picture = self.at("evaluation", TRAINED, PICTURE)
        self.recording.deliver(lambda run: run.log_metrics(summary))
        self.recording.deliver(self._adopt)
        self.recording.deliver(
            lambda run: run.log_file(PICTURE, storage.read_bytes(picture)), "files"
        )
        self.recording.finish_marked()

    def _adopt(self, parent: Run) -> None:
        """Put stages below the quickstart's run that began before it could be opened."""
        from pipelines.common.tracking import Run

        for run_id in self._stages:
            Run(parent.tracking_uri, run_id).set_parent(parent.run_id)

    def _remember(self, run_id: str | None) -> None:
        if run_id is not None:
            self._stages.append(run_id)

    def connect(self) -> None:
        """Start Ray unless it is already running."""
        self._connect(self.config)

    def write_videos(self) -> None:
        """Write the videos, a WebVid-style CSV for each split, and a vocabulary."""
        marker = self.at("annotations", "complete.json")
        if storage.exists(marker):
            return
        self.connect()
        videos = dataset.plan_videos(
            self.config.train_videos, self.config.val_videos, self.config.seed
        )
        everything = [video for split in dataset.SPLITS for video in videos[split]]
        progress = Progress("write videos", len(everything), "videos")
        written = (
            ray.data.range(len(everything))
            .repartition(target_num_rows_per_block=dataset.VIDEOS_PER_BLOCK, strict=True)
            .map_batches(
                dataset.write_videos,  # type: ignore[arg-type]
                fn_kwargs={"folder": self.at("videos"), "videos": everything},
                batch_size=None,
            )
        )
        for row in ray_errors.rows(written):
            progress.advance(int(row["count"]))
        for split in dataset.SPLITS:
            uri = self.at("annotations", f"results_{split}.csv")
            dataset.annotate_videos(uri, videos[split])
        dataset.write_vocabulary(self.vocab)
        write_order_pairs(self.order_pairs, videos["val"])
        storage.write_json(marker, {"videos": len(everything)})

    def ingest(self, split: str) -> IngestSummary:
        """Make a manifest and a clip store from the CSV of a split."""
        from pipelines.common.tracking import recorded_run_id
        from pipelines.ingest.run import run_ingest
        from pipelines.manifest.run import run_manifest

        manifest = self.at("manifests", f"{split}.parquet")
        if not storage.exists(manifest):
            run_manifest(
                ManifestConfig(
                    annotations=(self.at("annotations", f"results_{split}.csv"),),
                    videos=(self.at("videos"),),
                    output=manifest,
                    split=split,
                )
            )
        config = IngestConfig(
            manifest=manifest,
            output=self.at("clips", split),
            sampling=store.tiny_sampling(),
            name=f"ingest {split}",
            clips_per_shard=CLIPS_PER_SHARD,
            num_workers=2,
            tracking=self.tracking,
        )
        if not storage.list_names(self.at("clips", split)):
            logger.info("ingesting the %s split: decoding with 2 workers", split)
        summary = run_ingest(
            config, parent_id=self.recording.run_id, connect=lambda _: self.connect()
        )
        self._remember(recorded_run_id(storage.join(summary["store"], RUN)))
        storage.write_json(self.at("clips", split, "done.json"), {"store": summary["store"]})
        logger.info(
            "ingested %s: %d clips, %d in quarantine (%s)",
            split,
            summary["clips"],
            summary["quarantined"],
            ", ".join(f"{n} {reason}" for reason, n in sorted(summary["reasons"].items())) or "-",
        )
        return summary

    def untrained(self) -> str:
        """Return a checkpoint of the untrained model: the baseline and the start of stage 1."""
        uri = self.at("untrained")
        if not storage.exists(storage.join(uri, checkpoints.COMPLETE)):
            import torch

            from stgt.inputs.tokenizer import Tokenizer
            from stgt.model import STGT

            tokenizer = Tokenizer(self.vocab)
            torch.manual_seed(self.config.seed)
            model = STGT(
                stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
            )
            checkpoints.save(uri, model, tokenizer, step=0)
        return uri

    def train(self, recipe: TrainConfig, steps: int, val_store: str) -> str:
        """Run one training stage and return its checkpoint."""
        from pipelines.train.run import run_train

        config = replace(
            recipe,
            steps=steps,
            checkpoint_every=min(100, steps),
            global_batch=self.config.global_batch,
            num_workers=self.config.num_workers,
            val_store=val_store,
            seed=self.config.seed,
            tracking=self.tracking,
        )
        summary = run_train(
            config, parent_id=self.recording.run_id, connect=lambda _: self.connect()
        )
        self._remember(summary["run_id"])
        return summary["checkpoint"]

    def evaluate(self, name: str, checkpoint: str, store: str) -> EvaluateSummary:
        """Evaluate retrieval in both directions on the held-out clips."""
        from pipelines.evaluate.run import run_evaluate

        config = EvaluateConfig(
            name=f"evaluate {name}",
            data=store,
            manifest=self.at("manifests", "val.parquet"),
            checkpoint=checkpoint,
            output=self.at("evaluation", name),
            k_rerank=K_RERANK,
            # A quickstart that an earlier version began has no pairs and continues without them.
            order_pairs=self.order_pairs if storage.exists(self.order_pairs) else None,
            tracking=self.tracking,
        )
        summary = run_evaluate(
            config, parent_id=self.recording.run_id, connect=lambda _: self.connect()
        )
        self._remember(summary["run_id"])
        return summary


def run_quickstart(
    config: QuickstartConfig, connect: Callable[[QuickstartConfig], None]
) -> QuickstartSummary:
    """Write videos, ingest, train in two stages, and evaluate the untrained and trained models.

    Args:
        config: Sizes and output folder.
        connect: Starts or joins Ray. Called before each stage that needs it.

    Raises:
        STGTError: The folder is in use or holds a run with other settings, or a stage failed.
    """
    started = time.monotonic()
    folder = storage.resolve(config.output)
    with storage.lock(folder):
        claim(config, folder)
        job = _Quickstart(config, folder, connect)
        if not storage.exists(job.at(RESULT)):
            storage.write_json(job.at(RESULT), _run_stages(job))
        summary: QuickstartSummary = storage.read_json(job.at(RESULT))
        if storage.exists(job.at(PENDING)):
            job.deliver(summary)
    summary["seconds"] = round(time.monotonic() - started, 1)
    _show(job, summary)
    return summary


def _run_stages(job: _Quickstart) -> QuickstartSummary:
    job.write_videos()
    job.recording.mark_pending()
    with job.recording.running():
        ingested = {split: job.ingest(split) for split in dataset.SPLITS}
        train_store, val_store = (ingested[split]["store"] for split in dataset.SPLITS)
        untrained = job.untrained()
        stage1 = replace(
            recipes.pretrain_stage1_tiny((train_store,), job.at("stage1"), job.vocab),
            init_from=untrained,
        )
        checkpoint = job.train(stage1, job.config.stage1_steps, val_store)
        stage2 = recipes.pretrain_stage2_tiny(
            (train_store,), job.at("stage2"), init_from=checkpoint, vocab=job.vocab
        )
        checkpoint = job.train(stage2, job.config.stage2_steps, val_store)
        before = job.evaluate("untrained", untrained, val_store)
        after = job.evaluate(TRAINED, checkpoint, val_store)
    summary: QuickstartSummary = dict(after["metrics"])
    summary.update({f"untrained/{k}": value for k, value in before["metrics"].items()})
    summary["clips_ingested"] = sum(part["clips"] for part in ingested.values())
    summary["clips_quarantined"] = sum(part["quarantined"] for part in ingested.values())
    return summary


def _show(job: _Quickstart, summary: QuickstartSummary) -> None:
    """Log the result as a table, and the locations of the report and of the MLflow runs."""
    rows = [f"{'':24}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}"]
    for label, prefix in (
        ("text to video", "t2v"),
        ("video to text", "v2t"),
        ("  untrained: text to video", "untrained/t2v"),
    ):
        recalls = "".join(f"{summary[f'{prefix}/R{k}']:>7.1f}%" for k in (1, 5, 10))
        rows.append(f"{label:26}{recalls[2:]}{summary[f'{prefix}/MdR']:>14.1f}")
    if (order := summary.get("order/accuracy")) is not None:
        rows.append(
            f"of captions that differ in the order or direction of events, the true one is "
            f"preferred in {order:.1f}% (chance: 50%)"
        )
    logger.info(
        "retrieval on held-out clips, each with a unique caption\n%s\n"
        "report with captions and their top five clips: %s\n"
        "all other results are in MLflow: mlflow ui --backend-store-uri %s",
        "\n".join(rows),
        job.at("evaluation", "trained", "report.html"),
        job.tracking.uri,
    )
