"""Config of a dual encoder. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from stgt.errors import SettingError
from stgt.field_marks import FieldMark
from stgt.interface.inputs import CLIP_MEAN, CLIP_STD, ModelInputs

if TYPE_CHECKING:
    from stgt.interface.inputs import TextTokenizer

TITLES = {"clip": "CLIP", "siglip": "SigLIP"}
"""Names of the architectures, by the `model_type` in config.json of the hub."""
DEFAULT_FRAMES = 12
"""Frames per clip of CLIP4Clip, for clips of up to half a minute."""
UNSET = ""


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """Architecture of a dual encoder: everything needed to build it except its weights."""

    matches: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    cleans_questions: ClassVar[bool] = True
    kind: Literal["dual_encoder"] = "dual_encoder"
    """Kind of the model."""
    architecture: str = UNSET
    """The model's config.json in the form of the hub, as JSON text. Taken from init_from."""
    image_size: int = 224
    """Height and width of a frame, in pixels. Taken from init_from."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each color channel for normalization. Taken from init_from."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of each color channel for normalization. Taken from init_from."""
    most_text_tokens: int = 77
    """Number of positions for tokens of a text. Taken from init_from."""
    resize: Literal["squash", "crop"] = "squash"
    """How the model's own preprocessing makes frames square. Taken from init_from."""
    pads_fully: bool = False
    """Whether texts are always padded to most_text_tokens, as SigLIP needs it. Taken from
    init_from."""
    num_frames: Annotated[int, FieldMark.KEEPS_SHAPES] = DEFAULT_FRAMES
    """Number of frames per clip, which are encoded one by one and averaged."""
    max_text_tokens: Annotated[int | None, FieldMark.KEEPS_SHAPES] = None
    """Maximum caption length, in tokens. None uses most_text_tokens."""
    gradient_checkpointing: Annotated[bool, FieldMark.KEEPS_SHAPES] = False
    """Recompute the activations of layers in the backward pass instead of storing them. Uses less
    memory and approximately a third more time; results do not change."""

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise SettingError(f"num_frames = {self.num_frames}: must be at least 1")
        tokens = self.max_text_tokens
        if tokens is not None and not 2 <= tokens <= self.most_text_tokens:
            raise SettingError(
                f"max_text_tokens = {tokens}: must be between 2 and {self.most_text_tokens}, the "
                "most that this model takes"
            )
        if tokens is not None and self.pads_fully and tokens != self.most_text_tokens:
            raise SettingError(
                f"max_text_tokens = {tokens}: this model was trained on texts padded to "
                f"{self.most_text_tokens} tokens and takes no other length"
            )

    @property
    def hub(self) -> dict[str, Any]:
        """Contents of config.json in the form of the hub.

        Raises:
            SettingError: They were not read from a folder yet.
        """
        if self.architecture == UNSET:
            raise SettingError(
                "model.architecture is not set: a dual encoder takes it from its weights; give "
                "--init-from with a folder in the form of the hub, or hf:NAME"
            )
        return json.loads(self.architecture)

    @property
    def title(self) -> str:
        """Name of the architecture."""
        if self.architecture == UNSET:
            return "dual encoder"
        return TITLES[self.hub["model_type"]]

    @property
    def inputs(self) -> ModelInputs:
        """What the model reads."""
        return ModelInputs(
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            num_frames=self.num_frames,
            max_text_tokens=self.max_text_tokens or self.most_text_tokens,
            most_text_tokens=self.most_text_tokens,
            any_text_length=not self.pads_fully,
            resize=self.resize,
            cleans_captions=self.architecture != UNSET and self.hub.get("_name_or_path") == RANDOM,
        )

    @property
    def frame_token_shape(self) -> None:
        """None: frames are encoded by a part that is always trained."""
        return

    @property
    def frames_are_fixed(self) -> bool:
        """Whether training leaves a frame encoder frozen: it has none that could be."""
        return False

    @property
    def needs_initial_weights(self) -> str | None:
        """Why a training cannot start from random weights; None if it can."""
        if self.architecture != UNSET:
            return None
        return (
            "init_from is not set, and a dual encoder takes its architecture from its weights; "
            "give a folder in the form of the hub, hf:NAME, or a checkpoint of this project"
        )

    def for_tokenizer(self, tokenizer: TextTokenizer) -> DualEncoderConfig:
        """Return the config for a tokenizer: as it is, or with its ids if the weights are random.

        Raises:
            SettingError: The tokenizer does not belong to the model.
        """
        hub = self.hub
        if hub.get("_name_or_path") != RANDOM:
            if (problem := self.tokenizer_problem(tokenizer)) is not None:
                raise SettingError(f"vocab: {problem}; give the tokenizer of the model")
            return self
        hub["text_config"] |= {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.sep_id,
            "pad_token_id": tokenizer.pad_id,
        }
        return replace(self, architecture=json.dumps(hub, sort_keys=True))

    def tokenizer_problem(self, tokenizer: TextTokenizer) -> str | None:
        """Say how a tokenizer differs from the one that the model was trained with, or None."""
        text = self.hub["text_config"]
        words = int(text["vocab_size"])
        is_clip = self.hub["model_type"] == "clip"
        if len(tokenizer) > words or (not is_clip and len(tokenizer) != words):
            return f"its tokenizer has {len(tokenizer)} entries, but the model has {words}"
        # CLIP takes a text's embedding at this token. 2 in a config of CLIP means the largest id.
        ending = int(text.get("eos_token_id", -1))
        ending = words - 1 if ending == 2 else ending
        if is_clip and ending != tokenizer.sep_id:
            return (
                f"its tokenizer ends texts with the id {tokenizer.sep_id}, but the model expects "
                f"{ending}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DualEncoderConfig:
        """Build a config from the output of `to_dict`.

        Raises:
            TypeError: A name is unknown.
            SettingError: A value is out of range.
        """
        colors = {name: tuple(values[name]) for name in ("mean", "std") if name in values}
        return cls(**{**values, **colors})


RANDOM = "random"
"""Name in the config.json of a model that was never trained elsewhere."""


def dual_encoder_tiny() -> DualEncoderConfig:
    """Return a CLIP that trains from scratch on a CPU in minutes, for BERT's tokenizer."""
    tower = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
        "initializer_factor": 1.0,
    }
    hub = {
        "_name_or_path": RANDOM,
        "model_type": "clip",
        "projection_dim": 64,
        "text_config": {
            **tower, "vocab_size": 256, "max_position_embeddings": 16, "eos_token_id": 3,
            "bos_token_id": 2, "pad_token_id": 0,
        },
        "vision_config": {**tower, "image_size": 64, "patch_size": 16},
    }  # fmt: skip
    return DualEncoderConfig(
        architecture=json.dumps(hub, sort_keys=True),
        image_size=64,
        most_text_tokens=16,
        num_frames=6,
    )
