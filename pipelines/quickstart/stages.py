"""The stages of the quickstart, which hand over to each other as files in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from pipelines.train.config import TrainConfig
from pipelines.video.synthetic import dataset
from pipelines.video.synthetic.order_pairs import write_order_pairs
from stgt.config import LossWeights, stgt_tiny

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
DONE = "done.json"

QuickstartSummary = dict[str, float]


class Stages:
    """The stages of one quickstart."""

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
                summary="Makes videos, ingests them, trains a small STGT, and evaluates it. Each "
                f"stage is a run below this one. Results are in `{self.folder}`.",
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
        self.render(everything)
        for split in dataset.SPLITS:
            uri = self.at("annotations", f"results_{split}.csv")
            dataset.annotate_videos(uri, videos[split])
        dataset.write_vocabulary(self.vocab)
        write_order_pairs(self.order_pairs, videos["val"])
        storage.write_json(marker, {"videos": len(everything)})

    def render(self, videos: Sequence[dataset.Video]) -> None:
        """Write videos that do not exist yet, with Ray Data."""
        progress = Progress("write videos", len(videos), "videos")
        written = (
            ray.data.range(len(videos))
            .repartition(target_num_rows_per_block=dataset.VIDEOS_PER_BLOCK, strict=True)
            .map_batches(
                dataset.write_videos,  # type: ignore[arg-type]
                fn_kwargs={"folder": self.at("videos"), "videos": list(videos)},
                batch_size=None,
            )
        )
        for row in ray_errors.rows(written):
            progress.advance(int(row["count"]))

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
        storage.write_json(self.at("clips", split, DONE), {"store": summary["store"]})
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
            config = replace(stgt_tiny(), init_rules=self.config.init_rules)
            model = STGT(config.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id))
            checkpoints.save(uri, model, tokenizer, step=0)
        return uri

    def from_scratch(self, recipe: TrainConfig) -> TrainConfig:
        """Return a recipe from scratch with the quickstart's optimizer, batches and weights."""
        from pipelines.train import recipes

        if self.config.optimizer == "muon":
            recipe = recipes.with_muon(recipe)
        if self.config.learning_rate is not None:
            optim = replace(recipe.optim, lr=self.config.learning_rate)
            recipe = replace(recipe, optim=optim)
        similar = self.config.similar_captions
        if similar is not None:
            similar = min(similar, recipe.global_batch)
        weights = LossWeights(matching=self.config.matching_weight)
        return replace(recipe, similar_captions=similar, loss_weights=weights)

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
        # Tracing the model would take 20 s of processor time beside the first steps, to say that a
        # small model needs little memory; the time that is left is measured in any case.
        summary = run_train(
            config,
            parent_id=self.recording.run_id,
            connect=lambda _: self.connect(),
            estimate=False,
        )
        self._remember(summary["run_id"])
        return summary["checkpoint"]

    def evaluate(
        self,
        name: str,
        checkpoint: str,
        store: str,
        split: str = "val",
        order_pairs: str | None = None,
    ) -> EvaluateSummary:
        """Evaluate retrieval in both directions on the clips of a split, and pairs of captions."""
        from pipelines.evaluate.run import run_evaluate

        config = EvaluateConfig(
            name=f"evaluate {name}",
            data=store,
            manifest=self.at("manifests", f"{split}.parquet"),
            checkpoint=checkpoint,
            output=self.at("evaluation", name),
            k_rerank=K_RERANK,
            order_pairs=order_pairs,
            tracking=self.tracking,
        )
        summary = run_evaluate(
            config, parent_id=self.recording.run_id, connect=lambda _: self.connect()
        )
        self._remember(summary["run_id"])
        return summary
