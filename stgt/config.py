"""Settings of the model and its training, and named presets. Frozen, validated, light to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from stgt.field_marks import FieldMark

Precision = Literal["fp32", "bf16", "fp16"]
"""What a pass computes in; see `stgt.precision`."""
Gather = Literal["exact", "published"]
"""How embeddings of other workers enter the contrastive loss; see `stgt.objective`."""
Targets = Literal["hard", "self_similarity"]
"""Contrastive targets: the own pair alone, or shared among pairs that resemble each other."""


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The frame encoder: a timm vision transformer that yields [CLS + G*G patch] tokens."""

    name: str = "eva_giant_patch14_clip_224"
    """Architecture name in timm. It must have one CLS token and no pooling before its tokens."""
    image_size: int = 224
    """Height and width of a frame in pixels."""
    patch_size: int = 14
    """Edge of a patch in pixels."""
    width: int = 1408
    """Token width D."""
    depth: int = 39
    """Number of transformer blocks that run."""
    heads: int = 16
    """Attention heads of a block."""
    mlp_ratio: float = 4.3637
    """Hidden width of a block's MLP divided by the token width."""
    init_std: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.02
    """Spread of the initial weights of linear layers; small widths learn far faster with more."""
    frozen: Annotated[bool, FieldMark.KEEPS_SHAPES] = True
    """Keep the encoder out of training; False trains all of it, as the tiny preset does."""
    unfreeze_last_blocks: Annotated[int, FieldMark.KEEPS_SHAPES] = 0
    """Of a frozen encoder, train so many blocks at its end all the same."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "heads"):
            _require(
                getattr(self, name) >= 1, f"vision.{name}", getattr(self, name), "must be >= 1"
            )
        _require(
            self.image_size % self.patch_size == 0,
            "vision.image_size",
            self.image_size,
            f"must be a multiple of vision.patch_size ({self.patch_size})",
        )
        _require(
            self.width % self.heads == 0,
            "vision.width",
            self.width,
            f"must be a multiple of vision.heads ({self.heads})",
        )
        _require(self.depth >= 1, "vision.depth", self.depth, "must be at least 1")
        _require(
            0 <= self.unfreeze_last_blocks <= self.depth,
            "vision.unfreeze_last_blocks",
            self.unfreeze_last_blocks,
            f"must lie between 0 and vision.depth ({self.depth})",
        )
        _require(
            self.frozen or self.unfreeze_last_blocks == 0,
            "vision.unfreeze_last_blocks",
            self.unfreeze_last_blocks,
            "is for a frozen encoder; vision.frozen = False trains all blocks already",
        )

    @property
    def grid(self) -> int:
        """Patches along one edge of a frame, G."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """The spatio-temporal graph transformer."""

    layers: int = 1
    """Number of graph blocks."""
    heads: int = 16
    """Attention heads everywhere in the module, whatever the width."""
    similarity_threshold: Annotated[float, FieldMark.KEEPS_SHAPES, FieldMark.COMMON] = 0.5
    """Two patches share an edge when their cosine similarity is not below this. Range -1 to 1."""
    attention_dropout: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.1
    """Dropout on graph attention weights, in training only."""

    def __post_init__(self) -> None:
        _require(self.layers >= 1, "graph.layers", self.layers, "must be at least 1")
        _require(self.heads >= 1, "graph.heads", self.heads, "must be at least 1")
        _require(
            -1.0 <= self.similarity_threshold <= 1.0,
            "graph.similarity_threshold",
            self.similarity_threshold,
            "must lie between -1 and 1, as a cosine does",
        )
        _require(
            0.0 <= self.attention_dropout < 1.0,
            "graph.attention_dropout",
            self.attention_dropout,
            "must lie in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """The querying transformer: BERT with learned queries and cross-attention to visual tokens."""

    width: int = 768
    """Hidden width H."""
    layers: int = 12
    """Number of layers."""
    heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden width of the feed-forward layers."""
    cross_attention_every: int = 2
    """Every how many layers cross-attention is present, beginning with layer 0."""
    query_tokens: int = 32
    """Number of learned queries Q."""
    max_position: int = 512
    """Longest text, in tokens, that has position embeddings."""
    dropout: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.1
    """Dropout of hidden states and attention weights, in training only."""
    init_std: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.02
    """Spread of the initial weights; small widths learn far faster with more."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp_width", "cross_attention_every"):
            _require(
                getattr(self, name) >= 1, f"qformer.{name}", getattr(self, name), "must be >= 1"
            )
        _require(
            self.width % self.heads == 0,
            "qformer.width",
            self.width,
            f"must be a multiple of qformer.heads ({self.heads})",
        )
        _require(self.query_tokens >= 1, "qformer.query_tokens", self.query_tokens, "must be >= 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to build an STGT model, without its weights."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """The frame encoder."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """The spatio-temporal graph transformer."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """The querying transformer."""
    embed_dim: int = 256
    """Width E of the shared embedding of videos and texts."""
    num_frames: int = 8
    """Frames T of a clip; other lengths resize the time embedding."""
    max_text_tokens: Annotated[int, FieldMark.KEEPS_SHAPES] = 32
    """Longest caption S in tokens, longer ones are truncated."""
    vocab_size: int = 30523
    """Entries of the vocabulary, the captioning start token [DEC] included."""
    bos_id: int = 30522
    """Id of [DEC], which replaces the first token of a text that is to be captioned."""
    pad_id: int = 0
    """Id of the padding token."""
    temperature: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.07
    """Initial temperature of the contrastive softmax (learnable, not clamped)."""
    gradient_checkpointing: Annotated[bool, FieldMark.KEEPS_SHAPES] = False
    """Compute activations of blocks and layers again in the backward pass instead of keeping them:
    less memory, about a third more time. Changes no result."""

    def __post_init__(self) -> None:
        _require(
            self.vision.width % self.graph.heads == 0,
            "graph.heads",
            self.graph.heads,
            f"must divide vision.width ({self.vision.width})",
        )
        _require(
            0 <= self.bos_id < self.vocab_size,
            "bos_id",
            self.bos_id,
            f"must be an id below vocab_size ({self.vocab_size})",
        )
        _require(
            2 <= self.max_text_tokens <= self.qformer.max_position,
            "max_text_tokens",
            self.max_text_tokens,
            f"must lie between 2 and qformer.max_position ({self.qformer.max_position})",
        )
        _require(self.num_frames >= 1, "num_frames", self.num_frames, "must be at least 1")
        _require(self.temperature > 0, "temperature", self.temperature, "must be positive")

    def for_vocabulary(self, bos_id: int, vocab_size: int, pad_id: int) -> ModelConfig:
        """The same model for another vocabulary."""
        return replace(self, bos_id=bos_id, vocab_size=vocab_size, pad_id=pad_id)

    def to_dict(self) -> dict[str, Any]:
        """The config as nested plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build a config from what `to_dict` gave.

        Raises:
            TypeError: a name is unknown.
            ValueError: a value is out of range.
        """
        values = dict(values)
        values["vision"] = VisionConfig(**values["vision"])
        values["graph"] = GraphConfig(**values["graph"])
        values["qformer"] = QFormerConfig(**values["qformer"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training clip, applied alike to all of its frames."""

    crop_scale_min: float = 0.5
    """Least share of the frame's area that a random crop keeps; 1 turns cropping off."""
    flip: bool = True
    """Mirror half of the clips. Wrong where captions tell left from right."""
    num_ops: int = 2
    """RandAugment's operations a clip, each done with a chance of one half; 0 turns it off."""
    magnitude: int = 5
    """How far they go, 0 to 10."""

    def __post_init__(self) -> None:
        if self.num_ops < 0:
            raise ValueError(f"augment.num_ops = {self.num_ops}: must not be negative")
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"augment.magnitude = {self.magnitude}: must lie between 0 and 10")
        if not 0 < self.crop_scale_min <= 1:
            raise ValueError(f"augment.crop_scale_min = {self.crop_scale_min}: must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    lr: Annotated[float, FieldMark.COMMON] = 2.5e-5
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the start of the warm-up and at the end of the decay."""
    warmup_steps: Annotated[int, FieldMark.COMMON] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, FieldMark.COMMON] = 0.05
    """Decoupled weight decay of matrices; vectors and scalars have none."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.98
    """AdamW's second decay rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm."""
    layer_decay: float = 1.0
    """Where blocks of the frame encoder are trained, the learning rate falls by this factor from
    each block to the one below; 1 gives all the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.lr = {self.lr}: must be at least optim.min_lr ({self.min_lr})")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps = {self.warmup_steps}: must not be negative")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay = {self.layer_decay}: must lie in (0, 1]")
        if self.max_grad_norm <= 0:
            raise ValueError(f"optim.max_grad_norm = {self.max_grad_norm}: must be positive")


def stgt_g(embed_dim: int = 256) -> ModelConfig:
    """The published size: EVA ViT-g cut to 39 blocks, 8 frames at 224, BERT-base Q-Former."""
    return ModelConfig(embed_dim=embed_dim)


TINY_INIT_STD = 0.1
"""About width**-0.5: 200 steps of 32 clips then reach what takes 300 of 64 with the usual 0.02."""


def stgt_tiny(vocab_size: int = 256, bos_id: int = 255) -> ModelConfig:
    """All parts of the model at a size that trains from scratch on a laptop CPU in minutes."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=64,
            patch_size=16,
            width=96,
            depth=2,
            heads=4,
            mlp_ratio=2.0,
            init_std=TINY_INIT_STD,
            frozen=False,
        ),
        # Patches of an untrained encoder resemble each other: their median cosine is 0.9. With the
        # published 0.5 the graph joins them all, and attention averages the clip away.
        graph=GraphConfig(heads=4, attention_dropout=0.0, similarity_threshold=0.95),
        qformer=QFormerConfig(
            width=96,
            layers=2,
            heads=4,
            mlp_width=192,
            query_tokens=8,
            max_position=64,
            dropout=0.0,
            init_std=TINY_INIT_STD,
        ),
        embed_dim=64,
        num_frames=6,
        max_text_tokens=16,
        vocab_size=vocab_size,
        bos_id=bos_id,
    )
