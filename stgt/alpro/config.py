"""Frozen, validated sizes of an ALPRO model. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from stgt.config import TINY_INIT_STD
from stgt.errors import SettingError
from stgt.field_marks import FieldMark
from stgt.interface.inputs import CLIP_MEAN, CLIP_STD, ModelInputs

if TYPE_CHECKING:
    from stgt.interface.inputs import TextTokenizer

PositionResize = Literal["grid", "flat"]
"""How the position table is resized for another image size, by nearest neighbor: over the grid of
patches, as TimeSformer does for frames of another size, or over the list of patches, as the
published code does when it loads a file. They differ, since a list ignores where rows end."""

BERT_WORDS = 30_522
"""Number of entries of bert-base-uncased, which the released files use."""


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise SettingError(f"{name} = {value!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class TimeSformerSizes:
    """Config of the video encoder, a TimeSformer with divided space-time attention."""

    image_size: int = 224
    """Height and width of a frame, in pixels."""
    patch_size: int = 16
    """Edge length of a patch, in pixels."""
    width: int = 768
    """Token width D, which is also that of the text encoder."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Number of attention heads per block."""
    mlp_width: int = 3072
    """Hidden width of the feed-forward layers."""
    drop_path: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.1
    """Probability of skipping the branches of the last block during training. It rises linearly
    from 0 at the first block."""
    init_std: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.02
    """Standard deviation of the initial weights. Narrow models learn much faster with a larger
    value."""
    position_std: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.02
    """Standard deviation of the initial position and time embeddings. From random weights, a model
    learns the order of events only if it is not small compared to patches, which are about 1."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"):
            value = getattr(self, name)
            _require(value >= 1, f"vision.{name}", value, "must be >= 1")
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
        _require(
            0.0 <= self.drop_path < 1.0, "vision.drop_path", self.drop_path, "must be in [0, 1)"
        )

    @property
    def grid(self) -> int:
        """Number of patches G along each edge of a frame."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class FusionBertSizes:
    """Config of BERT, whose first layers encode text and whose later layers fuse text and video."""

    layers: int = 12
    """Number of layers."""
    fusion_layer: int = 6
    """Number of layers that see only the text. The layers after them see text and video tokens."""
    heads: int = 12
    """Number of attention heads per layer."""
    mlp_width: int = 3072
    """Hidden width of the feed-forward layers."""
    max_position: int = 512
    """Number of position embeddings, and so the maximum text length in tokens."""
    dropout: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.1
    """Dropout probability of hidden states and attention weights during training."""
    init_std: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.02
    """Standard deviation of the initial weights. Narrow models learn much faster with a larger
    value."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "mlp_width", "max_position"):
            _require(getattr(self, name) >= 1, f"text.{name}", getattr(self, name), "must be >= 1")
        _require(
            1 <= self.fusion_layer < self.layers,
            "text.fusion_layer",
            self.fusion_layer,
            f"must be at least 1 and below text.layers ({self.layers}), so that both text and "
            "fusion have layers",
        )
        _require(0.0 <= self.dropout < 1.0, "text.dropout", self.dropout, "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AlproConfig:
    """Architecture of an ALPRO model: everything needed to build it except its weights."""

    matches: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    cleans_questions: ClassVar[bool] = False
    kind: Literal["alpro"] = "alpro"
    """Kind of the model."""
    vision: TimeSformerSizes = field(default_factory=TimeSformerSizes)
    """Video encoder."""
    text: FusionBertSizes = field(default_factory=FusionBertSizes)
    """Text and fusion encoder."""
    embed_dim: int = 256
    """Width E of the embedding space shared by videos and texts."""
    num_frames: int = 8
    """Number of frames T per clip. The time embedding is resized by nearest neighbor for clips with
    fewer frames."""
    max_text_tokens: Annotated[int, FieldMark.KEEPS_SHAPES] = 40
    """Maximum caption length S, in tokens. Longer captions are truncated."""
    vocab_size: int = BERT_WORDS
    """Number of vocabulary entries."""
    pad_id: int = 0
    """Id of the padding token."""
    temperature: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.07
    """Initial temperature of the contrastive softmax. It is learned, and kept between 0.001 and
    0.5."""
    num_answers: int = 0
    """Number of answers of the classifier for questions. 0 builds a model without a classifier."""
    gradient_checkpointing: Annotated[bool, FieldMark.KEEPS_SHAPES] = False
    """Recompute the activations of blocks and layers in the backward pass instead of storing them.
    Uses less memory and approximately a third more time; results do not change."""

    def __post_init__(self) -> None:
        _require(
            self.vision.width % self.text.heads == 0,
            "text.heads",
            self.text.heads,
            f"must divide the width of the text encoder, which is vision.width "
            f"({self.vision.width})",
        )
        for name in ("embed_dim", "num_frames", "vocab_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(
            0 <= self.pad_id < self.vocab_size,
            "pad_id",
            self.pad_id,
            f"must be at least 0 and below vocab_size ({self.vocab_size})",
        )
        _require(
            2 <= self.max_text_tokens <= self.text.max_position,
            "max_text_tokens",
            self.max_text_tokens,
            f"must be between 2 and text.max_position ({self.text.max_position})",
        )
        _require(self.num_answers >= 0, "num_answers", self.num_answers, "must not be negative")
        _require(self.temperature > 0, "temperature", self.temperature, "must be positive")

    @property
    def title(self) -> str:
        """Name of the model for readers."""
        return "ALPRO"

    @property
    def inputs(self) -> ModelInputs:
        """What the model reads."""
        return ModelInputs(
            image_size=self.vision.image_size,
            mean=CLIP_MEAN,  # as in the published configs
            std=CLIP_STD,
            num_frames=self.num_frames,
            max_text_tokens=self.max_text_tokens,
            most_text_tokens=self.text.max_position,
        )

    @property
    def frame_token_shape(self) -> None:
        """None: no part of the model sees single frames."""
        return

    @property
    def frames_are_fixed(self) -> bool:
        """Whether training leaves a frame encoder frozen: it has none that could be."""
        return False

    @property
    def needs_initial_weights(self) -> str | None:
        """None: a training can start from random weights."""
        return None

    def for_tokenizer(self, tokenizer: TextTokenizer) -> AlproConfig:
        """Return this config with the vocabulary of a tokenizer."""
        return replace(self, vocab_size=len(tokenizer.entries()), pad_id=tokenizer.pad_id)

    def tokenizer_problem(self, tokenizer: TextTokenizer) -> str | None:
        """Say how a tokenizer differs from the one that the model was trained with, or None."""
        found = len(tokenizer.entries())
        if found == self.vocab_size:
            return None
        return f"it has {found:,} entries, but the model has {self.vocab_size:,}"

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AlproConfig:
        """Build a config from the output of `to_dict`.

        Raises:
            TypeError: A name is unknown.
            SettingError: A value is out of range.
        """
        values = dict(values)
        values["vision"] = TimeSformerSizes(**values["vision"])
        values["text"] = FusionBertSizes(**values["text"])
        return cls(**values)


def alpro_base(num_frames: int = 8, max_text_tokens: int = 40) -> AlproConfig:
    """Return the published size: TimeSformer-base and BERT-base, fused after six layers."""
    return AlproConfig(num_frames=num_frames, max_text_tokens=max_text_tokens)


def alpro_tiny(vocab_size: int = 256) -> AlproConfig:
    """Return the full architecture at a size that trains from scratch on a CPU in minutes."""
    return AlproConfig(
        vision=TimeSformerSizes(
            image_size=64,
            width=96,
            depth=2,
            heads=4,
            mlp_width=192,
            drop_path=0.0,
            init_std=TINY_INIT_STD,
            position_std=1.0,
        ),
        text=FusionBertSizes(
            layers=3,
            fusion_layer=1,
            heads=4,
            mlp_width=192,
            max_position=64,
            dropout=0.0,
            init_std=TINY_INIT_STD,
        ),
        embed_dim=64,
        num_frames=6,
        max_text_tokens=16,
        vocab_size=vocab_size,
    )
