"""Configs of all stages: frozen dataclasses whose field docs become the command line's help.

A config is complete: with the same config and the same input a stage gives the same output.
Those of training are in `pipelines.train_config`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pipelines.benchmarks import BenchmarkName
from stgt.config import Precision
from stgt.sampling import FrameChoice

ManifestFormat = Literal[
    "webvid",
    "vidal",
    "msrvtt",
    "didemo",
    "lsmdc",
    "msvd",
    "msrvtt_qa",
    "msvd_qa",
    "lavis",
    "alpro",
    "generic",
]
DecodeReason = Literal[
    "missing",
    "forbidden",
    "unreachable",
    "empty",
    "not_a_video",
    "no_video_stream",
    "undecodable",
    "empty_span",
    "too_large",
    "out_of_memory",
    "timeout",
    "crashed",
]
"""Why a clip gives no frames; `pipelines.decode.REASONS` says what each means."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Refuse a value of a field, in one sentence."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values, for JSON."""
    return asdict(config)


def fingerprint(values: Any) -> str:
    """A short hash of plain values, independent of the order of keys."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level with dotted names, the names of the command line."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking URI: a server's http(s) address, or sqlite:///FILE for a local file."""
    experiment: str = "stgt"
    """MLflow experiment."""
    artifact_uri: str | None = None
    """Where a new experiment keeps its artifacts; None leaves it to MLflow."""


@dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """Annotations in a data set's own format -> a clip manifest."""

    annotations: tuple[str, ...]
    """Annotation files (paths or URIs); some formats take captions and a list of ids."""
    videos: str
    """Folder or S3 prefix that holds the videos."""
    output: str
    """The Parquet file to write."""
    format: ManifestFormat = "webvid"
    """Format of the annotations."""
    split: str | None = None
    """Name of the split, kept with every clip; None takes what the annotations say, or train."""
    caption: str = ""
    """vidal: which caption (raw, mplug, polish_mplug, sound_mplug, ofa0 to ofa7, mix)."""
    columns: tuple[str, ...] = ()
    """generic: names of columns, as ours=theirs, e.g. caption=text video=file."""

    def __post_init__(self) -> None:
        require(len(self.annotations) > 0, "annotations", self.annotations, "name a file")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How frames of a clip are chosen and stored; its hash names the clip store."""

    num_frames: int = 16
    """Frames stored per clip: more than a sample takes, so that temporal sampling stays random."""
    frame_choice: FrameChoice = "uniform"
    """Which frames of the video are stored."""
    size: int = 224
    """Edge of a stored frame in pixels."""
    resize: Literal["squash", "crop"] = "squash"
    """squash ignores the aspect ratio, as the published evaluation does; crop keeps the centre."""
    seed: int = 0
    """Of a random choice of frames, which depends on this and the clip's id alone."""
    codec: Literal["jpeg", "raw"] = "jpeg"
    """How a stored frame is coded."""
    jpeg_quality: int = 95
    """JPEG quality, 1 to 100."""
    decoder: Annotated[Literal["auto", "decord", "pyav"], arg(aliases=("--decoder",))] = "pyav"
    """pyav is exact on every container and fastest; auto takes decord, with whose frames published
    numbers were computed, where it is exact, and PyAV elsewhere; decord never anything else."""

    def __post_init__(self) -> None:
        require(self.num_frames >= 1, "sampling.num_frames", self.num_frames, "must be >= 1")
        require(self.size >= 1, "sampling.size", self.size, "must be >= 1")
        require(
            1 <= self.jpeg_quality <= 100,
            "sampling.jpeg_quality",
            self.jpeg_quality,
            "must lie between 1 and 100",
        )


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Clips that are left out on purpose, each under a reason of its own; by default none."""

    min_short_side: int | None = None
    """Least pixels of the shorter side of a video's frames (too_small)."""
    min_duration_s: float | None = None
    """Least seconds of a clip (too_short)."""
    max_duration_s: float | None = None
    """Most seconds of a clip (too_long)."""
    min_caption_words: int | None = None
    """Least words of a caption; a clip with none that is left goes (caption_too_short)."""
    max_caption_words: int | None = None
    """Most words of a caption; a clip with none that is left goes (caption_too_long)."""
    unique_captions: bool = False
    """Of clips whose captions are equal once cleaned, keep one (duplicate_caption)."""
    unique_videos: bool = False
    """Of clips of the same bytes and span, keep one (duplicate_video)."""

    def __post_init__(self) -> None:
        for name, value in to_dict(self).items():
            if value is not None:
                require(value >= 0, f"filters.{name}", value, "must not be negative")
        for low, high in (
            ("min_duration_s", "max_duration_s"),
            ("min_caption_words", "max_caption_words"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None:
                require(least <= most, f"filters.{low}", least, f"must not exceed {high}, {most}")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """A manifest -> a verified clip store, with a quarantine for clips that cannot be used."""

    manifest: str
    """The clip manifest (Parquet) from jobs.manifest; local or s3://."""
    output: str
    """Folder of clip stores, local or s3://; a store gets a folder named by its settings in it."""
    name: str = "ingest"
    """Name of the run in MLflow."""
    quarantine: str | None = None
    """Another folder or s3:// prefix for the quarantine; None keeps it in the store's folder."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How frames are chosen and stored."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which clips are left out on purpose."""
    limit: int | None = None
    """Take only so many clips, a random sample, to see what the whole would take."""
    verify: bool = False
    """Only check a finished store: that nothing is missing, changed or there twice."""
    retry_quarantined: tuple[DecodeReason, ...] | None = None
    """Only try clips in quarantine again: those with the reasons that follow, or with any."""
    clips_per_shard: int = 1024
    """Clips per shard, about; small manifests get smaller shards."""
    num_workers: int | None = None
    """Decoding workers, one CPU each; None takes one per CPU of the cluster."""
    deadline_s: float = 60.0
    """A clip that takes longer to decode is given up and its decoder killed."""
    max_pixels: int = 8192 * 4320
    """A video with larger frames is not decoded."""
    max_bytes: int = 8 * 1024**3
    """Nor a larger file."""
    memory_limit_bytes: int = 4 * 1024**3
    """Address space a decoder may use beyond what it starts with."""
    max_bad_fraction: float = 0.1
    """The run fails when a larger share of the clips cannot be used; filters do not count."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the report is recorded."""

    def __post_init__(self) -> None:
        require(self.clips_per_shard >= 1, "clips_per_shard", self.clips_per_shard, "must be >= 1")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "must be positive")
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            self.max_bad_fraction,
            "must lie in [0, 1]",
        )
        for name in ("max_pixels", "max_bytes", "memory_limit_bytes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        if self.limit is not None:
            require(self.limit >= 1, "limit", self.limit, "must be at least 1")
        if self.num_workers is not None:
            require(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1")
        require(
            not (self.verify and self.retry_quarantined is not None),
            "verify",
            self.verify,
            "cannot be asked for together with retry_quarantined",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Text-video retrieval by the protocol of a benchmark."""

    benchmark: Annotated[BenchmarkName, Positional] = "any"
    """Which protocol: sizes of the split are checked, and what is scored is said. `any` takes any
    manifest as it is."""
    data: Annotated[str, arg(aliases=("--store",))]
    """Frames of the gallery: a clip store (a folder that holds catalogue.json), or a manifest
    (.parquet), whose videos are decoded on the fly; local or s3://."""
    checkpoint: str
    """Checkpoint folder of the model, pre-trained (zero-shot) or fine-tuned."""
    output: str
    """Folder for embeddings, metrics and the report; local or s3://."""
    manifest: str | None = None
    """Manifest with the split's clips and captions, where a store holds more clips, or has some in
    quarantine; None: what data holds."""
    embeddings: str | None = None
    """Folder of embeddings; None: in output. Those of another evaluation are used when they are of
    the same checkpoint, clips and settings."""
    name: str | None = None
    """Name of the run in MLflow; None names it by the benchmark."""
    k_rerank: int = 128
    """Candidates per caption (and per video) that are scored again by the matching head; 0 leaves
    reranking out. 128 is BLIP-2's, from whose code the published evaluation comes."""
    num_frames: int | None = None
    """Frames per clip, evenly spread; None takes the model's."""
    resize: Literal["squash", "crop"] = "squash"
    """How frames are fitted into the square: squash as published, or crop the longer side. A clip
    store must have been ingested so."""
    max_text_tokens: int | None = None
    """Tokens of a caption, the rest is cut; None takes the benchmark's, or the model's."""
    allow_missing: bool = False
    """Score only the videos that are there: every figure is then named `partial/...`. Otherwise a
    missing video counts as a miss."""
    dual_softmax: bool = False
    """Also give metrics with dual softmax, `dsl/...`: transductive, since it uses all queries at
    once."""
    resamples: int = 1000
    """Resamples of the bootstrap for 95 % intervals; 0 leaves them out."""
    against: Literal["published"] | None = None
    """published: check first what it takes to reproduce the authors' evaluation, and stop when
    something is missing."""
    num_workers: int = 2
    """Evaluation workers."""
    use_gpu: bool = False
    """Give each evaluation worker one GPU."""
    precision: Precision = "fp32"
    """What matrix products compute in."""
    batch_clips: int = 16
    """Clips encoded at a time by a worker."""
    batch_pairs: int = 128
    """Pairs matched at a time by a worker."""
    num_pictures: int = 6
    """Captions shown with the frames of their best videos."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "batch_clips", "batch_pairs", "num_pictures"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("k_rerank", "resamples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        frames, tokens = self.num_frames, self.max_text_tokens
        require(frames is None or frames >= 1, "num_frames", frames, "must be at least 1")
        # The first and the last token frame the text.
        require(tokens is None or tokens >= 3, "max_text_tokens", tokens, "must be at least 3")
        require(
            self.embeddings is None or self.embeddings.rstrip("/") != self.output.rstrip("/"),
            "embeddings",
            self.embeddings,
            "is a folder of its own, such as OTHER_OUTPUT/embeddings",
        )

    @property
    def label(self) -> str:
        """Name of the run."""
        return self.name or f"evaluate {self.benchmark}"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Evaluations side by side."""

    runs: Positional[tuple[str, ...]]
    """Evaluations: output folders of jobs.evaluate, or ids of their runs in MLflow. The others are
    compared with the first."""
    output: str | None = None
    """Folder for a report (compare.html) and its values; None only prints."""
    resamples: int = 1000
    """Resamples of the paired bootstrap."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where runs were recorded."""

    def __post_init__(self) -> None:
        require(len(self.runs) >= 1, "runs", self.runs, "name at least one evaluation")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Released weights -> a model folder, to go on with or to pre-train."""

    output: str
    """Folder to write the model to."""
    checkpoint: str | None = None
    """The released STGT file (.pth), pre-trained or fine-tuned; None makes a model to pre-train,
    which needs vision and vocab."""
    vision: str | None = None
    """The frozen frame encoder: its file (eva_vit_g.pth), or timm for timm's pre-trained weights;
    None leaves it out."""
    vocab: str | None = None
    """Vocabulary to keep with the model: a file, or a name on the hub such as bert-base-uncased."""
    bert: str | None = None
    """BERT that the Q-Former of a model to pre-train begins with: a folder, or a name on the hub
    such as bert-base-uncased; None begins at random."""
    embed_dim: int | None = None
    """Width of the shared embedding of a model to pre-train: 256 by default."""
    seed: int = 0
    """Of what begins at random in a model to pre-train."""
    image_size: int | None = None
    """Pixels along an edge of a frame; other than the encoder's, its positions are resized."""
    vision_heads: int | None = None
    """Attention heads of the frame encoder, which no file tells; None: one for every 88 of its
    width, as published."""
    graph_heads: int = 16
    """Attention heads of the graph transformer."""
    qformer_heads: int | None = None
    """Attention heads of the Q-Former; None: one for every 64 of its width, as published."""

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            for name in ("vision", "vocab"):
                value = getattr(self, name)
                require(value is not None, name, value, "is needed without a checkpoint")
            require(
                self.qformer_heads is None,
                "qformer_heads",
                self.qformer_heads,
                "is for a checkpoint; BERT tells its own",
            )
            return
        for name in ("bert", "embed_dim"):
            value = getattr(self, name)
            require(value is None, name, value, "is for a model to pre-train: leave checkpoint")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A model folder -> a file of the released form."""

    model: str
    """The model folder."""
    output: str
    """The .pth file to write."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The whole way on generated videos: write, ingest, train in two stages, evaluate."""

    output: str = "quickstart-output"
    """Folder for everything the quickstart makes."""
    fresh: bool = False
    """Delete what an earlier run left and start over."""
    train_videos: int = 1596
    """Videos to train on."""
    val_videos: int = 106
    """Unseen videos to search in, each with its own caption."""
    stage1_steps: int = 450
    """Steps with hard contrastive targets."""
    stage2_steps: int = 80
    """Steps with self-similarity targets."""
    global_batch: int = 32
    """Clips per step."""
    num_workers: int = 2
    """Training workers, one CPU each."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        require(self.train_videos >= 100, "train_videos", self.train_videos, "must be >= 100")
        require(self.val_videos >= 10, "val_videos", self.val_videos, "must be >= 10")
        for name in ("stage1_steps", "stage2_steps", "num_workers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.global_batch >= 2 and self.global_batch % self.num_workers == 0,
            "global_batch",
            self.global_batch,
            f"must be a multiple of num_workers ({self.num_workers}), and at least 2",
        )
        require(
            self.global_batch <= self.train_videos // 2,
            "global_batch",
            self.global_batch,
            f"must be at most half of train_videos ({self.train_videos})",
        )
