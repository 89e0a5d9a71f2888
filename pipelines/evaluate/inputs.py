"""The inputs of an evaluation, and the files in its output folder."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.artifacts import checkpoints
from pipelines.artifacts.training_run import TrainingData
from pipelines.common import storage
from pipelines.evaluate.benchmarks import Benchmark
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import Gallery
from pipelines.evaluate.order_pairs import OrderPairs
from stgt.interface.inputs import VideoTextConfig

METRICS = "metrics.json"
RANKS = "ranks.parquet"
REPORT = "report.html"
PICTURE = "retrieval.png"
PAIRS = "pairs"
DEFAULT_WORKERS = 2
SMALL_MODEL_BYTES = 50_000_000
SMALL_GALLERY_FRAMES = 4096
"""Up to these sizes of weights and gallery, one process is done before Ray has started workers."""


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation works on."""

    config: EvaluateConfig
    benchmark: Benchmark
    gallery: Gallery
    model: VideoTextConfig
    """The model's config, as read from the checkpoint."""
    order_pairs: OrderPairs | None = None
    """Captions and counterparts that differ in the order or direction of events."""
    training: TrainingData | None = None
    """Training data to look for the test clips in, with absolute URIs."""

    @property
    def embeddings(self) -> str:
        """Folder of the embeddings."""
        return self.config.embeddings or storage.join(self.config.output, "embeddings")

    @property
    def pairs(self) -> str:
        """Folder of the matched pairs."""
        return storage.join(self.config.output, PAIRS)

    @property
    def runs_here(self) -> bool:
        """Whether the work is so small that this process does it, without Ray."""
        if self.config.num_workers is not None or self.config.use_gpu:
            return False
        if checkpoints.is_hub_name(self.config.checkpoint_uri):
            return False
        uris = [storage.join(self.config.checkpoint_uri, checkpoints.WEIGHTS)]
        if encoder := checkpoints.frame_encoder_of(self.config.checkpoint_uri):
            uris.append(storage.join(encoder, checkpoints.FRAME_ENCODER))
        weights = sum(storage.size_bytes(uri) for uri in uris if storage.exists(uri))
        frames = self.gallery.num_videos * self.num_frames
        return weights <= SMALL_MODEL_BYTES and frames <= SMALL_GALLERY_FRAMES

    @property
    def num_workers(self) -> int:
        """Number of evaluation workers on Ray."""
        return self.config.num_workers or DEFAULT_WORKERS

    @property
    def num_frames(self) -> int:
        """Number of frames per clip."""
        return self.config.num_frames or self.model.inputs.num_frames
