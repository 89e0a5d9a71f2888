"""Settings for importing and exporting weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipelines.common.config import require
from stgt.alpro.config import PositionResize
from stgt.field_marks import Common, FieldMark


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Import of released weights or pre-trained parts into a model folder."""

    output: Annotated[str, Common("model"), FieldMark.LOCATION]
    """Folder for the model. It must be empty or not exist."""
    checkpoint: Annotated[str | None, Common("model"), FieldMark.LOCATION] = None
    """Released file of STGT or ALPRO, pre-trained or fine-tuned; the file shows which. None creates
    a new STGT model for pre-training, which requires vision and vocab."""
    vision: Annotated[str | None, Common("model"), FieldMark.LOCATION_OR_NAME] = None
    """Weights of STGT's frozen frame encoder: a file (eva_vit_g.pth), or `timm` for timm's
    pre-trained weights. None leaves the frame encoder out. ALPRO's files contain theirs."""
    vocab: Annotated[str | None, Common("model"), FieldMark.LOCATION_OR_NAME] = None
    """Vocabulary to store with the model: a file, or a Hugging Face Hub name such as
    bert-base-uncased."""
    bert: Annotated[str | None, Common("model"), FieldMark.LOCATION_OR_NAME] = None
    """BERT whose weights initialize the Q-Former of a new model: a folder, or a Hugging Face Hub
    name such as bert-base-uncased. None initializes it randomly, unless `qformer` is given."""
    qformer: Annotated[str | None, Common("model"), FieldMark.LOCATION_OR_NAME] = None
    """BLIP-2 checkpoint whose Q-Former starts that of a new model, as published: LAVIS's file
    (blip2_pretrained_flant5xxl.pth), or a BLIP-2 model of transformers (its folder, or a
    .safetensors or .bin file). With `bert`, BERT fills the text layers that the checkpoint lacks.
    None uses BERT alone, or random values."""
    embed_dim: Annotated[int | None, Common("model")] = None
    """Width of the shared embedding of a new model. None uses 256."""
    seed: Annotated[int, Common("model")] = 0
    """Seed for randomly initialized parameters of a new model."""
    image_size: Annotated[int | None, Common("model")] = None
    """Edge length of a frame in pixels. If it differs from the encoder's, the position embeddings
    are resized. None keeps the encoder's value."""
    vision_heads: int | None = None
    """Number of attention heads in the frame encoder, which the weights do not contain. None uses
    one head per 88 channels, or 64 for ALPRO, as published."""
    graph_heads: int = 16
    """Number of attention heads in the graph transformer."""
    qformer_heads: int | None = None
    """Number of attention heads in the Q-Former, or in ALPRO's BERT. None uses the number in the
    config of BERT or of transformers' BLIP-2, or else one head per 64 channels, as published."""
    fusion_layer: int | None = None
    """Number of layers of ALPRO's BERT that see only the text, which its files do not contain. None
    uses half of the layers, as published."""
    num_frames: int | None = None
    """Frames per clip of an ALPRO model. If the number differs from the file's, the time embeddings
    are resized by nearest neighbor, as published. None keeps the file's value."""
    position_resize: PositionResize = "grid"
    """How image_size resizes the position embeddings of an ALPRO model, by nearest neighbor: over
    the grid of patches, or over their list, as its published code does when it loads a file."""

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            for name in ("vision", "vocab"):
                value = getattr(self, name)
                require(value is not None, name, value, "is required without a checkpoint")
            require(
                self.qformer_heads is None or (self.qformer is not None and self.bert is None),
                "qformer_heads",
                self.qformer_heads,
                "applies only with a checkpoint, or with qformer without bert; otherwise a new "
                "model takes it from BERT's config",
            )
            return
        for name in ("bert", "qformer", "embed_dim"):
            value = getattr(self, name)
            require(value is None, name, value, "applies only to a new model: omit checkpoint")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export of a model folder to a file in the released format."""

    model: Annotated[str, Common("model"), FieldMark.LOCATION]
    """Model folder to export."""
    output: Annotated[str, Common("model"), FieldMark.LOCATION]
    """The .pth file to write. It must not exist."""
