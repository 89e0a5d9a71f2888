"""Settings for the evaluation stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, Positional, arg

from pipelines.artifacts.answer_benchmarks import ANSWER_BENCHMARKS, AnswerBenchmarkName
from pipelines.artifacts.benchmark_names import PUBLISHED_CANDIDATES, BenchmarkName
from pipelines.common.config import TrackingConfig, require
from pipelines.feed.config import EvaluationFeatures, FrameRules
from stgt.config import Precision
from stgt.errors import SettingError
from stgt.field_marks import Common, Earlier, FieldMark
from stgt.retrieval.scoring_rules import RULES, ScoringName

EvaluatedBenchmark = Literal[BenchmarkName, AnswerBenchmarkName]
"""Benchmarks of retrieval and of question answering."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of text-video retrieval under a benchmark's protocol."""

    benchmark: Annotated[EvaluatedBenchmark, Positional, Common("data")] = "any"
    """Benchmark protocol. The size of the split is checked. `any` accepts every manifest without
    checks."""
    data: Annotated[str | None, arg(aliases=("--store",)), Common("data"), FieldMark.LOCATION] = (
        None
    )
    """Clip store, or manifest (.parquet) whose videos are decoded. The folder above a store may be
    given as well. Local or s3://. Optional with embedding_file, whose report then shows no
    frames."""
    checkpoint: Annotated[str | None, Common("data"), FieldMark.LOCATION_OR_NAME] = None
    """Checkpoint, run, model folder or hf:NAME. A pre-trained model is evaluated zero-shot, and a
    run stands for its best checkpoint. The name is that of a model on the Hugging Face Hub. Omit
    it with embedding_file."""
    embedding_file: Annotated[str | None, Common("data"), FieldMark.LOCATION] = None
    """Embeddings by any other model, instead of a checkpoint (.npz or .parquet). An .npz has the
    arrays video_ids [V], video_embeds [V, E] or [V, Q, E], caption_video_ids [N], caption_embeds
    [N, E] or [N, C, E], and optionally captions [N] and pair_scores [N, V]; a .parquet has rows
    of the same. See pipelines/evaluate/README.md."""
    output: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Folder for embeddings, metrics and the report. Local or s3://."""
    manifest: Annotated[str | None, Common("data"), FieldMark.LOCATION] = None
    """Manifest with the clips and captions of the split. Needed if the store holds other clips as
    well or has clips in quarantine. None evaluates all clips in data, or in embedding_file."""
    questions: Annotated[str | None, Common("data"), FieldMark.LOCATION] = None
    """Manifest with questions, to evaluate answers. The checkpoint must have been trained with
    questions."""
    answers: Annotated[str | None, FieldMark.LOCATION] = None
    """Answer vocabulary for questions, such as train_ans2label.json. None uses the one in the
    checkpoint."""
    embeddings: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder for embeddings. Embeddings of another evaluation are reused if they were computed with
    the same checkpoint, clips and settings. None uses a subfolder of output."""
    name: Annotated[str | None, Common("run")] = None
    """Name of the MLflow run. None uses the name of the benchmark."""
    k_rerank: Annotated[int, Common("scoring")] = PUBLISHED_CANDIDATES
    """Candidates per caption and video to rerank by matching. 0 disables reranking. The default is
    the published setting, except that an output folder whose evaluation began with another number
    continues with that number."""
    scoring: Annotated[ScoringName, Earlier("cosine_and_match")] = "cosine_and_match"
    """How cosine similarity and matching make a score. `alpro_repository` and `alpro_lavis` are the
    two evaluators that ALPRO's authors published: match probability alone over all pairs, and
    cosine + logit of a match over 1,000 candidates. They also set the tokens per caption of their
    benchmarks."""
    num_frames: Annotated[int | None, Common("scoring")] = None
    """Number of evenly spaced frames per clip. None uses the model's value."""
    features: EvaluationFeatures = field(default_factory=EvaluationFeatures)
    """Stored tokens of the frame encoder, in place of frames; see jobs.features."""
    resize: Literal["squash", "crop"] = "squash"
    """How frames are made square: `squash` ignores the aspect ratio, as published; `crop` cuts off
    the longer side. A clip store must have been ingested with the same setting."""
    frame_rules: Annotated[FrameRules, Fixed, Earlier(1)] = 2
    """Rules by which frames of videos decoded on the fly are found and cropped; see
    sampling.frame_rules of jobs.ingest. Evaluations of earlier versions continue with 1."""
    max_text_tokens: int | None = None
    """Maximum number of tokens per caption; longer captions are truncated. None uses the value of
    the benchmark, or of the model if the benchmark has none."""
    allow_missing: Annotated[bool, Common("data")] = False
    """Leave missing videos out, and name the metrics `partial/...`. By default a missing video
    counts as a miss."""
    leakage_against: Annotated[tuple[str, ...], Common("data"), FieldMark.LOCATION_OR_NAME] = ()
    """Training data to look for the test clips in. Clips are compared by id and by perceptual
    hashes of stored frames. Give clip stores or manifests, or `recorded` for the data that the
    training of the checkpoint recorded. Without it, the result says that leakage was not
    checked."""
    order_pairs: Annotated[str | None, Common("data"), FieldMark.LOCATION] = None
    """Table (.parquet) of captions that differ in the order of events. Its columns are clip_id,
    caption, counterpart (which differs only in the order or direction) and kind. The share of pairs
    in which the model prefers the caption is reported as well; chance is 50 %."""
    dual_softmax: Annotated[bool, Common("scoring")] = False
    """Also compute metrics with dual softmax, named `dsl/...`. They are transductive: scores depend
    on all queries of the test set."""
    resamples: Annotated[int, Common("scoring")] = 1000
    """Bootstrap resamples for 95% confidence intervals. 0 disables the intervals."""
    against: Annotated[Literal["published"] | None, Common("scoring")] = None
    """Check all requirements for reproducing the authors' evaluation first. The evaluation stops if
    one is not met."""
    num_workers: Annotated[int | None, Common("workers")] = None
    """Number of evaluation workers. None uses two or, for a small model and gallery, no Ray at all,
    since starting workers would take longer than the evaluation."""
    use_gpu: Annotated[bool, Common("workers")] = False
    """Give each evaluation worker one GPU."""
    precision: Annotated[Precision, Common("workers")] = "fp32"
    """Floating-point precision of matrix products."""
    batch_clips: Annotated[int, Common("workers")] = 16
    """Number of clips that a worker encodes in one batch."""
    batch_pairs: int = 128
    """Number of text-video pairs that a worker matches in one batch."""
    num_pictures: int = 6
    """Number of captions shown in the report with frames of their top-ranked videos."""
    tracking: Annotated[TrackingConfig, Common("run", only=("uri", "experiment"))] = field(
        default_factory=TrackingConfig
    )
    """MLflow settings for this run."""

    def __post_init__(self) -> None:
        self._check_inputs()
        self._check_questions()
        for name in ("batch_clips", "batch_pairs", "num_pictures"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        workers = self.num_workers
        require(workers is None or workers >= 1, "num_workers", workers, "must be at least 1")
        require(
            self.k_rerank > 0 or not RULES[self.scoring].all_pairs,
            "k_rerank",
            self.k_rerank,
            f"must be positive with scoring = {self.scoring}, which matches all pairs",
        )
        for name in ("k_rerank", "resamples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        frames, tokens = self.num_frames, self.max_text_tokens
        require(frames is None or frames >= 1, "num_frames", frames, "must be at least 1")
        # One token each marks the start and the end of the text.
        require(tokens is None or tokens >= 3, "max_text_tokens", tokens, "must be at least 3")
        require(
            self.embeddings is None or self.embeddings.rstrip("/") != self.output.rstrip("/"),
            "embeddings",
            self.embeddings,
            "must be a folder other than output, such as OTHER_OUTPUT/embeddings",
        )

    def _check_questions(self) -> None:
        """Check that questions and settings of retrieval are not mixed."""
        if self.questions is None:
            require(
                self.benchmark not in ANSWER_BENCHMARKS,
                "benchmark",
                self.benchmark,
                "is a benchmark of questions; give a manifest with them: --questions",
            )
            require(self.answers is None, "answers", self.answers, "requires questions")
            return
        require(
            self.benchmark == "any" or self.benchmark in ANSWER_BENCHMARKS,
            "benchmark",
            self.benchmark,
            f"is a benchmark of retrieval; with questions, use {', '.join(ANSWER_BENCHMARKS)} or "
            "any",
        )
        retrieval = {
            "manifest": self.manifest,
            "embeddings": self.embeddings,
            "embedding_file": self.embedding_file,
            "order_pairs": self.order_pairs,
            "against": self.against,
            "allow_missing": self.allow_missing or None,
            "dual_softmax": self.dual_softmax or None,
            "leakage_against": self.leakage_against or None,
            "features.store": self.features.store,
        }
        for name, value in retrieval.items():
            require(value is None, name, value, "is a setting of retrieval; omit it with questions")

    def _check_inputs(self) -> None:
        """Check that there is either a model with videos, or a file of embeddings."""
        if self.embedding_file is None:
            missing = [name for name in ("data", "checkpoint") if getattr(self, name) is None]
            if missing:
                raise SettingError(
                    f"{' and '.join(missing)}: give data and checkpoint to evaluate a model, or "
                    "embedding_file to evaluate embeddings of any other model"
                )
            return
        values = {
            **{name: getattr(self, name) for name in ("checkpoint", "embeddings", "against")},
            "features.store": self.features.store,
        }
        for name, value in values.items():
            require(
                value is None,
                name,
                value,
                "must be omitted with embedding_file, whose embeddings are of another model",
            )
        require(
            "recorded" not in self.leakage_against,
            "leakage_against",
            "recorded",
            "needs a checkpoint; with embedding_file, name the training data",
        )

    @property
    def data_uri(self) -> str:
        """`data` of an evaluation that needs it."""
        assert self.data is not None, "checked by __post_init__"
        return self.data

    @property
    def checkpoint_uri(self) -> str:
        """`checkpoint` of an evaluation of a model."""
        assert self.checkpoint is not None, "checked by __post_init__"
        return self.checkpoint

    @property
    def label(self) -> str:
        """Name of the run in MLflow and in log lines."""
        return self.name or f"evaluate {self.benchmark}"
