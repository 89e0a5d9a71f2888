"""Settings of the training stage."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from tyro.conf import AvoidSubcommands, Fixed, arg

from pipelines.artifacts.generated_captions import CaptionChoice
from pipelines.common.config import TrackingConfig, require
from pipelines.feed.config import (
    EpochUnit,
    FrameRules,
    HoldOutBy,
    LoaderConfig,
    TrainingFeatures,
)
from stgt.alpro.config import AlproConfig
from stgt.config import (
    AugmentConfig,
    Gather,
    LabelSmoothing,
    LossWeights,
    ModelConfig,
    Negatives,
    OptimConfig,
    Precision,
    Targets,
)
from stgt.dual_encoder.config import DualEncoderConfig
from stgt.field_marks import Common, Earlier, FieldMark
from stgt.inputs.frame_choice import FrameChoice
from stgt.interface.kinds import kind_named

MAX_BLOCK_CLIPS = 32

HELD_OUT = "held_out.json"

INDEX_CPUS = 1
"""CPUs for the Ray Data tasks that create the sample index. With none, no clip is ever read."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one stage from clip stores, or from videos that are decoded on the fly."""

    data: Annotated[
        tuple[str, ...],
        arg(aliases=("--store",)),
        Common("data"),
        FieldMark.LOCATION,
        FieldMark.OPERATIONAL,  # a resumed run compares the contents, not the location
    ]
    """Clip stores, folders that contain one, or manifests (.parquet), local or s3://.
    Videos of a manifest are decoded on the fly. Several data sets are shuffled together unless
    mix is set."""
    output: Annotated[str, Common("run"), FieldMark.OPERATIONAL, FieldMark.LOCATION]
    """Folder of the run, local or s3://. Running the same command again resumes the run."""
    model: Annotated[ModelConfig | DualEncoderConfig | AlproConfig, AvoidSubcommands]
    """The model: its kind, which the recipe fixes, and its sizes."""
    captions: Annotated[CaptionChoice, Earlier("original")] = "original"
    """Captions to train on. original takes those of the annotations, generated those that
    jobs.caption wrote, and both takes all of them."""
    questions: Annotated[
        str | None, Common("data", if_set=True), FieldMark.LOCATION, FieldMark.OPERATIONAL
    ] = None
    """Manifest with questions to learn to answer. It is made by jobs.manifest. None learns
    retrieval."""
    answers: Annotated[
        str | None, Common("data", if_set=True), FieldMark.LOCATION, FieldMark.OPERATIONAL
    ] = None
    """Answer vocabulary, such as train_ans2label.json. Questions with other answers are left out of
    training and count as wrong in validation."""
    val_questions: Annotated[str | None, FieldMark.VALIDATION, FieldMark.LOCATION] = None
    """Manifest with questions about the validation clips. None looks for them in questions."""
    mix: tuple[int, ...] = ()
    """Proportions of the data sets: 3 1 takes three samples from the first for each one from
    the second. Empty uses all data sets once per epoch."""
    hold_out: Annotated[int, Common("validation")] = 0
    """Clips of the first data set to hold out for validation. Whole videos are held out, until at
    least this many clips are out; they are listed in held_out.json in the output folder. For
    benchmarks without a validation split."""
    hold_out_by: Annotated[HoldOutBy, Fixed, Earlier("clip")] = "video"
    """What is held out: whole videos, or the last clips as in runs of earlier versions."""
    vocab: Annotated[str, Common("data"), FieldMark.LOCATION_OR_NAME] = "bert-base-uncased"
    """Vocabulary: a file, or a name on the Hugging Face Hub. Models of the hub take their own
    tokenizer if it is empty."""
    recipe: Annotated[str, FieldMark.OPERATIONAL, Fixed] = ""
    """Name of the recipe that the config was derived from; empty without one."""
    name: str = "train"
    """Name of the run in MLflow."""
    init_from: Annotated[str | None, Common("model"), FieldMark.LOCATION_OR_NAME] = None
    """Checkpoint, run, model folder or hf:NAME to start from. The name is that of a model on the
    Hugging Face Hub. None starts from random weights."""
    targets: Targets = "hard"
    """Contrastive targets: hard, or self_similarity."""
    label_smoothing: LabelSmoothing = field(default_factory=LabelSmoothing)
    """Label smoothing of each loss."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Factor of each loss in the sum that the training minimizes. Losses are recorded without it,
    and their sum, loss/total, with it."""
    similar_captions: int | None = None
    """Number of clips with similar captions that follow each other in a batch. As negatives of each
    other, they ask for what tells them apart, such as the direction of a movement. None takes clips
    in random order."""
    gather: Gather = "exact"
    """How embeddings of other workers enter the contrastive loss. exact gives the gradient of a
    single worker with the whole batch; published treats them as constants."""
    negatives: Annotated[Negatives, Earlier("published")] = "distinct"
    """Which pairs of a batch count as negatives. distinct leaves out pairs of the same clip or the
    same text; published counts every other pair."""
    precision: Annotated[Precision, Common("model")] = "fp32"
    """Precision of matrix products."""
    compile: Annotated[bool, FieldMark.OPERATIONAL] = False
    """Compile the blocks of the model with torch.compile. Where gradients come from one pass, the
    Q-Former's passes are also replayed from CUDA graphs, which takes GPU memory. On an H100, one to
    two minutes at the start made steps of the published size 1.5 times as fast."""
    num_frames: Annotated[int, Common("model")] = 8
    """Frames per sample. They are chosen from those stored or from those of the video. Use 1 for
    images."""
    frame_choice: FrameChoice = "random"
    """How the frames of a sample are chosen."""
    resize: Literal["squash", "crop"] = "squash"
    """How frames are fitted into the square: squash, as published, or crop the longer side.
    Clip stores must have been ingested the same way."""
    frame_rules: Annotated[FrameRules, Fixed, Earlier(1)] = 2
    """Rules by which frames of videos decoded on the fly are found and cropped; see
    sampling.frame_rules of jobs.ingest. Runs of earlier versions continue with 1."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random augmentation of clips."""
    features: TrainingFeatures = field(default_factory=TrainingFeatures)
    """Stored tokens of the frozen frame encoder, in place of frames; see jobs.features."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate schedule."""
    steps: Annotated[int, Common("schedule")] = 1000
    """Optimizer steps to train; replaces epochs."""
    epochs: Annotated[float | None, Common("schedule")] = None
    """Epochs to train, instead of steps."""
    epoch_unit: Annotated[EpochUnit, Earlier("clips")] = "captions"
    """What an epoch uses once: captions, as published, so that a clip with 20 captions is used 20
    times per epoch; or clips, each with a caption drawn at random."""
    global_batch: Annotated[int, Common("schedule")] = 64
    """Clips per step over all workers. Contrastive negatives span the whole batch."""
    micro_batch: Annotated[int | None, Common("schedule"), FieldMark.OPERATIONAL] = None
    """Clips per forward pass. A value below a worker's share of the global batch means gradient
    accumulation with the same result. None computes a worker's share at once."""
    block_clips: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Clips per block of the feed; must divide each worker's share. None takes the largest
    divisor up to 32."""
    num_workers: Annotated[int, Common("workers"), FieldMark.OPERATIONAL] = 2
    """Number of training workers. With min_workers, the maximum number."""
    min_workers: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Smallest number of workers to continue with after a node is lost; others join again when
    they can. Only numbers that divide global_batch are used. None always uses num_workers.
    Workers without GPUs may take the CPUs that data workers need."""
    num_loaders: Annotated[int, Common("workers"), FieldMark.OPERATIONAL] = 1
    """Number of data workers that read, decode and augment clips, with one CPU each. With 0, each
    training worker does so in a thread of its own process, which starts sooner and suits one
    machine with small clips; the clips are the same."""
    cache_dir: Annotated[str | None, FieldMark.OPERATIONAL, FieldMark.LOCATION] = None
    """Folder on each node in which its data workers share the shards that they read. None uses
    a folder below the temporary folder."""
    cache_gb: Annotated[float, FieldMark.OPERATIONAL] = 2.0
    """Size limit of that folder, in GB; half of it is for shards fetched ahead. 1,024 clips of
    8 frames take about 0.16 GB."""
    use_gpu: Annotated[bool, Common("workers"), FieldMark.OPERATIONAL] = False
    """One GPU per training worker."""
    threads_per_worker: Annotated[int, FieldMark.OPERATIONAL] = 1
    """CPU threads of a training worker, and CPUs reserved for it."""
    checkpoint_every: Annotated[int, Common("run"), FieldMark.OPERATIONAL] = 100
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, FieldMark.OPERATIONAL] = 2
    """Number of latest checkpoints to keep, in addition to the best."""
    progress_every: Annotated[int, FieldMark.OPERATIONAL] = 5
    """Steps between progress lines, and between checks for a request to stop."""
    val_store: Annotated[
        str | None, Common("validation"), FieldMark.VALIDATION, FieldMark.LOCATION
    ] = None
    """Clip store to validate on. None does not validate unless clips are held out."""
    test_store: Annotated[str | None, FieldMark.VALIDATION, FieldMark.LOCATION] = None
    """Clip store of the test split; only used with select_on = test."""
    select_on: Annotated[Literal["val", "test", "last"], FieldMark.VALIDATION] = "val"
    """Clips that the best checkpoint is chosen on: val or test. last takes the last checkpoint.
    Choosing on the test split flatters the test result."""
    select_metric: Annotated[str, FieldMark.VALIDATION] = "t2v/R1"
    """Metric that is maximized by the best checkpoint: of retrieval, or with questions
    answers/accuracy."""
    validate_every: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Steps between validations. None validates at every checkpoint."""
    val_clips: Annotated[int, FieldMark.OPERATIONAL] = 256
    """Maximum number of clips used for validation."""
    max_failures: Annotated[int, FieldMark.OPERATIONAL] = 3
    """Number of times that the worker group is restarted after losing a worker, before the run
    fails."""
    max_stall_s: Annotated[float, FieldMark.OPERATIONAL] = 600.0
    """Seconds that a step may wait for its clips. A longer wait ends the run and reports what
    the data workers are doing."""
    max_bad_fraction: Annotated[float, FieldMark.OPERATIONAL] = 0.1
    """Maximum fraction of the clips decoded on the fly that may be unusable, before the run
    fails."""
    metric_names: Annotated[int, Fixed, Earlier(1)] = 2
    """Names of metrics. Since 2, the losses come first in MLflow, which sorts groups by name: 1 has
    the groups data and gpu, which are now samples and resources."""
    record_samples: Annotated[bool, FieldMark.OPERATIONAL] = False
    """Write which clip was used at which step, to samples/ in the output folder."""
    allow_changes: Annotated[bool, FieldMark.OPERATIONAL] = False
    """Resume a run although its settings have changed. The changes are logged."""
    seed: Annotated[int, Common("run")] = 0
    """Random seed. It decides initial weights, sample order, augmentation and negatives."""
    tracking: Annotated[
        TrackingConfig, Common("run", only=("uri", "experiment")), FieldMark.OPERATIONAL
    ] = field(default_factory=TrackingConfig)
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
            "val_clips",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("micro_batch", "block_clips", "min_workers", "validate_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        for name in ("num_loaders", "max_failures", "hold_out"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.cache_gb > 0, "cache_gb", self.cache_gb, "must be positive")
        require(self.max_stall_s > 0, "max_stall_s", self.max_stall_s, "must be positive")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "must be positive")
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            self.max_bad_fraction,
            "must be in [0, 1]",
        )
        require(self.data != (), "data", self.data, "give at least one data set")
        require(
            self.similar_captions is None or 2 <= self.similar_captions <= self.global_batch,
            "similar_captions",
            self.similar_captions,
            f"must be at least 2 and at most global_batch ({self.global_batch})",
        )
        for name, factor in asdict(self.loss_weights).items():
            require(
                factor == 1 or self.questions is None,
                f"loss_weights.{name}",
                factor,
                "is for retrieval, so it cannot be set together with questions",
            )
        require(
            any(self.loss_weights.of(loss) > 0 for loss in self._losses()),
            "loss_weights",
            asdict(self.loss_weights),
            "leaves no loss of this model, so it would learn nothing",
        )
        require(
            self.similar_captions is None or self.questions is None,
            "similar_captions",
            self.similar_captions,
            "is for retrieval, so it cannot be set together with questions",
        )
        require(
            not self.mix or (len(self.mix) == len(self.data) and min(self.mix) >= 1),
            "mix",
            self.mix,
            "must have one number per data set, each at least 1",
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
            f"must be a multiple of num_workers ({self.num_workers}), so that workers get equal "
            f"batches, such as {even}",
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
            self.select_on != "test" or self.test_store is not None,
            "select_on",
            self.select_on,
            "requires test_store",
        )
        every = self.validate_every or self.checkpoint_every
        require(
            every % self.checkpoint_every == 0 or self.checkpoint_every % every == 0,
            "validate_every",
            every,
            f"must divide checkpoint_every ({self.checkpoint_every}) or be a multiple of it, since "
            "only a validated checkpoint can be the best",
        )
        require(
            self.micro_batch is None or self.model.accumulates,
            "micro_batch",
            self.micro_batch,
            f"must be None, since {self.model.kind} looks across the clips of a batch",
        )
        for name in ("answers", "val_questions"):
            value = getattr(self, name)
            require(value is None or self.questions is not None, name, value, "requires questions")
        require(
            self.questions is None or self.answers is not None,
            "answers",
            self.answers,
            "training with questions needs an answer vocabulary",
        )
        require(
            self.questions is None or self.epoch_unit == "captions",
            "epoch_unit",
            self.epoch_unit,
            "must be captions with questions, which take their place",
        )
        require(
            self.questions is None or self.captions == "original",
            "captions",
            self.captions,
            "must be original with questions, which take the place of captions",
        )
        require(
            self.val_store is None or self.hold_out == 0,
            "hold_out",
            self.hold_out,
            "must be 0 if val_store is set",
        )
        self._check_features()

    def _check_features(self) -> None:
        """Check that stored tokens give what this training would compute from frames."""
        store, views = self.features.store, self.features.views
        if not store:
            for name in ("views", "val_store"):
                value = getattr(self.features, name)
                require(value is None, f"features.{name}", value, "requires features.store")
            return
        require(
            len(store) == len(self.data),
            "features.store",
            store,
            f"must have one folder for each of the {len(self.data)} data sets",
        )
        require(
            self.model.frames_are_fixed,
            "features.store",
            store,
            f"holds the tokens of a frozen frame encoder, but this {self.model.title} trains the "
            "part that looks at frames; leave out --features.store"
            + (
                ""
                if self.model.frame_token_shape is None
                else ", or freeze the encoder: --model.vision.frozen "
                "--model.vision.unfreeze-last-blocks 0"
            ),
        )
        require(
            self.num_frames <= self.model.inputs.num_frames,
            "num_frames",
            self.num_frames,
            f"the model takes at most {self.model.inputs.num_frames} frames",
        )
        require(
            views is not None or self.augment.changes_nothing,
            "features.store",
            store,
            "holds the tokens of frames as they are stored, but augmentation (crop, flip or "
            "RandAugment) is on; turn it off with --augment.crop-scale-min 1 --augment.no-flip "
            "--augment.num-ops 0, or write N augmented views of each clip with python -m "
            "jobs.features --views N and add --features.views N",
        )
        require(views is None or views >= 1, "features.views", views, "must be at least 1")
        require(
            views is None or not self.augment.changes_nothing,
            "features.views",
            views,
            "are augmented clips, but augmentation is off; leave it out and give features that "
            "were written without --views",
        )

    def _losses(self) -> list[str]:
        """Return the names of the losses of the model."""
        if self.questions is not None:
            return ["answer"]
        matches = ["itm"] if self.model.matches else []
        writes = ["lm"] if kind_named(self.model.kind, "model").writes_captions else []
        return ["itc", *matches, *writes]

    def steps_for(self, num_samples: int) -> int:
        """Return the number of steps to train, given the number of samples per epoch."""
        if self.epochs is None:
            return self.steps
        # Rounded first, since 1.1 * 100 / 10 is slightly more than 11 in floating point.
        return math.ceil(round(self.epochs * num_samples / self.global_batch, 6))

    def num_cpus(self, workers: int | None = None) -> int:
        """Return the CPUs of training workers, data workers and Ray Data's scheduler tasks."""
        count = self.num_workers if workers is None else workers
        return count * self.threads_per_worker + self.feed_cpus

    @property
    def feed_cpus(self) -> int:
        """CPUs of data workers and Ray Data's scheduler tasks; 0 without data workers."""
        return self.num_loaders + INDEX_CPUS if self.num_loaders else 0

    @property
    def samples(self) -> str:
        """What a sample is, for messages: questions, captions or clips."""
        return self.epoch_unit if self.questions is None else "questions"

    @property
    def loader(self) -> LoaderConfig:
        """Settings of the feed of this run."""
        return LoaderConfig(
            data=self.data,
            vocab=self.vocab,
            max_text_tokens=self.model.inputs.max_text_tokens,
            num_frames=self.num_frames,
            size=self.model.inputs.image_size,
            resize=self.resize,
            frame_rules=self.frame_rules,
            frame_choice=self.frame_choice,
            augment=self.augment,
            seed=self.seed,
            mix=self.mix,
            epoch_unit=self.epoch_unit,
            captions=self.captions,
            similar_captions=self.similar_captions,
            questions=self.questions,
            answers=self.answers,
            texts_as_written=self.questions is not None and not self.model.cleans_questions,
            hold_out=self.hold_out,
            hold_out_by=self.hold_out_by,
            held_out=self.held_out_uri,
            cache_dir=self.cache_dir,
            cache_bytes=self.cache_bytes,
            features=self.features.store,
            views=self.features.views,
        )

    @property
    def cache_bytes(self) -> int:
        """Size limit of each node's shard cache, in bytes."""
        return int(self.cache_gb * 1e9)

    @property
    def held_out_uri(self) -> str | None:
        """File that lists the held-out videos; None if no videos are held out."""
        listed = self.hold_out > 0 and self.hold_out_by == "video"
        return f"{self.output.rstrip('/')}/{HELD_OUT}" if listed else None

    @property
    def validation_store(self) -> str | None:
        """Clip store to validate on; None when clips are held out, or without validation."""
        return self.test_store if self.select_on == "test" else self.val_store

    @property
    def validates(self) -> bool:
        """Whether there are clips to validate on."""
        return self.validation_store is not None or self.hold_out > 0

    @property
    def validation_split(self) -> Literal["val", "test"]:
        """Split that validation clips belong to, which prefixes the names of their metrics."""
        return "test" if self.select_on == "test" else "val"

    @property
    def best_metric(self) -> str | None:
        """Metric that chooses the best checkpoint; None if the last checkpoint is taken."""
        if self.select_on == "last":
            return None
        return f"{self.validation_split}/{self.select_metric}"

    @property
    def batch_bytes(self) -> int:
        """Size of the frames of a global batch, in bytes."""
        return self.global_batch * self.num_frames * self.model.inputs.image_size**2 * 3

    @property
    def allowed_worker_counts(self) -> tuple[int, ...]:
        """Numbers of workers that divide the global batch, in ascending order."""
        fewest = self.min_workers or self.num_workers
        return tuple(
            world for world in range(fewest, self.num_workers + 1) if self.global_batch % world == 0
        )

    @property
    def clips_per_block(self) -> int:
        """Clips per block of the feed; divides every worker's share."""
        if self.block_clips is not None:
            return self.block_clips
        share = math.gcd(*(self.global_batch // world for world in self.allowed_worker_counts))
        return next(size for size in range(MAX_BLOCK_CLIPS, 0, -1) if share % size == 0)
