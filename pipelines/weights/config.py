"""Settings of importing and exporting weights."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.common.config import require


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
