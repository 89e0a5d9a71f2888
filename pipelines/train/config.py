"""Configs of training and of the sweep over trainings; the others are in `pipelines.config`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, arg

from pipelines.common.config import TrackingConfig, require
from pipelines.feed.config import LoaderConfig
from stgt.config import AugmentConfig, Gather, ModelConfig, OptimConfig, Precision, Targets
from stgt.field_marks import FieldMark
from stgt.inputs.frame_choice import FrameChoice

MOST_BLOCK_CLIPS = 32

INDEX_CPUS = 1
"""Tasks of Ray Data that deal out positions; without a CPU for them no clip is ever read."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of one stage from clip stores, or from videos that are decoded as needed."""

    data: Annotated[
        tuple[str, ...],
        arg(aliases=("--store",)),
        FieldMark.COMMON,
        FieldMark.OPERATIONAL,  # what it holds is compared, not where it lies
    ]
    """Clip stores (folders that hold catalogue.json), or manifests (.parquet), whose videos are
    decoded on the fly; local or s3://. Several are shuffled together unless mix says otherwise."""
    output: Annotated[str, FieldMark.COMMON, FieldMark.OPERATIONAL]
    """Folder of this run: config, checkpoints, result; local or s3://. The same folder again
    resumes the run."""
    model: ModelConfig
    """Sizes of the model."""
    mix: Annotated[tuple[int, ...], FieldMark.COMMON] = ()
    """Of every sum(mix) samples, how many come from each of the data sets; by default each clip of
    all of them is used once before any is used again."""
    hold_out: Annotated[int, FieldMark.COMMON] = 0
    """So many clips of the first data set are kept out of training and validate it, for benchmarks
    without a validation split."""
    vocab: Annotated[str, FieldMark.COMMON] = "bert-base-uncased"
    """Vocabulary: a local file, or a name on the hub."""
    recipe: Annotated[str, FieldMark.OPERATIONAL, Fixed] = ""
    """Name of the recipe that this config began as; empty without one."""
    name: Annotated[str, FieldMark.COMMON] = "train"
    """Name of the run in MLflow."""
    init_from: Annotated[str | None, FieldMark.COMMON] = None
    """Checkpoint folder whose weights the model begins with; None begins at random."""
    targets: Targets = "hard"
    """Contrastive targets: hard, or self_similarity."""
    gather: Gather = "exact"
    """Embeddings of other workers in the contrastive loss: exact, the gradient of one worker with
    the whole batch; or published, constants."""
    precision: Annotated[Precision, FieldMark.COMMON] = "fp32"
    """What matrix products compute in."""
    compile: Annotated[bool, FieldMark.OPERATIONAL] = False
    """Have torch.compile translate the blocks of encoder and Q-Former: minutes at the start,
    faster steps."""
    num_frames: Annotated[int, FieldMark.COMMON] = 8
    """Frames per sample, chosen among those stored, or among those of the video. 1 for images."""
    frame_choice: FrameChoice = "random"
    """How they are chosen."""
    resize: Literal["squash", "crop"] = "squash"
    """How frames are fitted into the square: squash as published, or crop the longer side. Clip
    stores must have been ingested so."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of a clip."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    steps: Annotated[int, FieldMark.COMMON] = 1000
    """Optimizer steps of the whole run."""
    epochs: Annotated[float | None, FieldMark.COMMON] = None
    """Passes over the data, in place of steps: as many samples as there are clips are one."""
    global_batch: Annotated[int, FieldMark.COMMON] = 64
    """Clips per step over all workers; contrastive negatives span it."""
    micro_batch: Annotated[int | None, FieldMark.COMMON, FieldMark.OPERATIONAL] = None
    """Most clips that a worker computes at a time; with fewer than its share of the global batch,
    a step takes several passes with the same result. None takes the share in one."""
    block_clips: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Clips per block of the feed, a divisor of each worker's share; None takes the largest up to
    32."""
    num_workers: Annotated[int, FieldMark.COMMON, FieldMark.OPERATIONAL] = 2
    """Training workers; with min_workers, the most of them."""
    min_workers: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Fewest workers to go on with when there are no more, after the loss of a node; more join when
    there are. Only numbers that divide global_batch are taken. None always takes num_workers. Where
    workers have no GPUs, they may take the CPUs that data workers need."""
    num_loaders: Annotated[int, FieldMark.COMMON, FieldMark.OPERATIONAL] = 1
    """Data workers that read, decode and augment clips, one CPU each."""
    cache_dir: Annotated[str | None, FieldMark.OPERATIONAL] = None
    """Folder on each node where its data workers share the shards that they read; None is a folder
    among the temporary files."""
    cache_gb: Annotated[float, FieldMark.OPERATIONAL] = 2.0
    """Size of that folder; half of it is for shards that are fetched ahead (1,024 clips of 8 frames
    are some 0.16 GB)."""
    use_gpu: Annotated[bool, FieldMark.COMMON, FieldMark.OPERATIONAL] = False
    """Give each training worker one GPU."""
    threads_per_worker: Annotated[int, FieldMark.OPERATIONAL] = 1
    """CPU threads of a training worker, and CPUs that are reserved for it."""
    checkpoint_every: Annotated[int, FieldMark.COMMON, FieldMark.OPERATIONAL] = 100
    """Steps between checkpoints; metrics are sent to MLflow at the same time."""
    keep_checkpoints: Annotated[int, FieldMark.OPERATIONAL] = 2
    """How many of the latest checkpoints are kept, beside the best."""
    progress_every: Annotated[int, FieldMark.OPERATIONAL] = 5
    """Steps between lines of progress, and between looks for a request to stop."""
    val_store: Annotated[str | None, FieldMark.COMMON, FieldMark.VALIDATION] = None
    """Clip store for validation retrieval; None leaves it out, unless clips are held out."""
    test_store: Annotated[str | None, FieldMark.VALIDATION] = None
    """Clip store of the test split, for select_on test alone."""
    select_on: Annotated[Literal["val", "test"], FieldMark.VALIDATION] = "val"
    """What the best checkpoint is chosen on: val, clips that are no part of the test; or test, as
    published, which flatters the result."""
    select_metric: Annotated[str, FieldMark.VALIDATION] = "t2v/R1"
    """The retrieval metric that is highest at the best checkpoint."""
    validate_every: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Steps between validations; None validates at checkpoints."""
    val_clips: Annotated[int, FieldMark.OPERATIONAL] = 256
    """Most clips used for validation."""
    max_failures: Annotated[int, FieldMark.OPERATIONAL] = 3
    """Restarts of the worker group after a worker was lost, before the run fails."""
    max_stall_s: Annotated[float, FieldMark.OPERATIONAL] = 600.0
    """A step that waits longer for its clips ends the run and says what the data workers do."""
    max_bad_fraction: Annotated[float, FieldMark.OPERATIONAL] = 0.1
    """The run fails when a larger share of the clips decoded on the fly cannot be used."""
    record_samples: Annotated[bool, FieldMark.OPERATIONAL] = False
    """Write which clip was used at which step, below samples/ in the output folder."""
    allow_changes: Annotated[bool, FieldMark.OPERATIONAL] = False
    """Go on with a run although its settings have changed; which ones is said."""
    seed: Annotated[int, FieldMark.COMMON] = 0
    """Seed of weights, order, augmentation and negatives."""
    tracking: Annotated[TrackingConfig, FieldMark.OPERATIONAL] = field(
        default_factory=TrackingConfig
    )
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "num_workers",
            "num_frames",
            "checkpoint_every",
            "keep_checkpoints",
            "progress_every",
            "threads_per_worker",
            "num_loaders",
            "val_clips",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("micro_batch", "block_clips", "min_workers", "validate_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        for name in ("max_failures", "hold_out"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.cache_gb > 0, "cache_gb", self.cache_gb, "must be positive")
        require(self.max_stall_s > 0, "max_stall_s", self.max_stall_s, "must be positive")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "must be positive")
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            self.max_bad_fraction,
            "must lie in [0, 1]",
        )
        require(self.data != (), "data", self.data, "name at least one data set")
        require(
            not self.mix or (len(self.mix) == len(self.data) and min(self.mix) >= 1),
            "mix",
            self.mix,
            "needs a number of at least 1 for each of the data sets",
        )
        least = self.num_workers if self.min_workers is None else self.min_workers
        require(
            least <= self.num_workers,
            "min_workers",
            least,
            f"must not exceed num_workers ({self.num_workers})",
        )
        require(self.global_batch >= 2, "global_batch", self.global_batch, "must be at least 2")
        even = -(-self.global_batch // self.num_workers) * self.num_workers
        require(
            self.global_batch % self.num_workers == 0,
            "global_batch",
            self.global_batch,
            f"must be a multiple of the number of workers ({self.num_workers}): ranks with unequal "
            f"batches would wait for each other forever; {even} is",
        )
        shares = [self.global_batch // world for world in self.allowed_worker_counts]
        block = self.block_clips
        require(
            block is None or all(share % block == 0 for share in shares),
            "block_clips",
            block,
            f"must divide the share of each worker ({', '.join(map(str, shares))} clips)",
        )
        require(
            self.select_on == "val" or self.test_store is not None,
            "select_on",
            self.select_on,
            "needs test_store",
        )
        every = self.validate_every or self.checkpoint_every
        require(
            every % self.checkpoint_every == 0 or self.checkpoint_every % every == 0,
            "validate_every",
            every,
            f"must divide checkpoint_every ({self.checkpoint_every}) or be a multiple of it: only "
            "a checkpoint that is validated can be the best",
        )
        require(
            self.val_store is None or self.hold_out == 0,
            "hold_out",
            self.hold_out,
            "is for runs without a val_store; choose one",
        )

    def steps_for(self, num_clips: int) -> int:
        """Steps of the run with so many clips to train on."""
        if self.epochs is None:
            return self.steps
        # Rounded: 1.1 * 100 / 10 is a little more than 11 in binary.
        return math.ceil(round(self.epochs * num_clips / self.global_batch, 6))

    def num_cpus(self, workers: int | None = None) -> int:
        """CPUs for some training workers, their data workers, and the tasks that hand out work."""
        count = self.num_workers if workers is None else workers
        return count * self.threads_per_worker + self.num_loaders + INDEX_CPUS

    @property
    def loader(self) -> LoaderConfig:
        """What the run asks of its data workers."""
        return LoaderConfig(
            data=self.data,
            vocab=self.vocab,
            max_text_tokens=self.model.max_text_tokens,
            num_frames=self.num_frames,
            size=self.model.vision.image_size,
            resize=self.resize,
            frame_choice=self.frame_choice,
            augment=self.augment,
            seed=self.seed,
            mix=self.mix,
            hold_out=self.hold_out,
            cache_dir=self.cache_dir,
            cache_bytes=int(self.cache_gb * 1e9),
        )

    @property
    def validation_store(self) -> str | None:
        """Clip store that checkpoints are chosen on; None when clips are held out, or without."""
        return self.test_store if self.select_on == "test" else self.val_store

    @property
    def validates(self) -> bool:
        """Whether the run has clips to validate on."""
        return self.validation_store is not None or self.hold_out > 0

    @property
    def best_metric(self) -> str:
        """The metric that the best checkpoint is chosen by; its name begins with the split."""
        return f"{self.select_on}/{self.select_metric}"

    @property
    def batch_bytes(self) -> int:
        """Size of a global batch's frames."""
        return self.global_batch * self.num_frames * self.model.vision.image_size**2 * 3

    @property
    def allowed_worker_counts(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have, ascending: those that share a global batch."""
        fewest = self.min_workers or self.num_workers
        return tuple(
            world for world in range(fewest, self.num_workers + 1) if self.global_batch % world == 0
        )

    @property
    def clips_per_block(self) -> int:
        """Clips per block of the feed: a divisor of every worker's share."""
        if self.block_clips is not None:
            return self.block_clips
        share = math.gcd(*(self.global_batch // world for world in self.allowed_worker_counts))
        return next(size for size in range(MOST_BLOCK_CLIPS, 0, -1) if share % size == 0)
