"""What a model reads, as its config states it: data workers need this, and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from stgt.inputs.tokenizer import TextTokens

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of color channels that CLIP, EVA and so STGT normalize with."""
VOCAB_FILE = "vocab.txt"
"""BERT's vocabulary, as STGT's folders contain it."""
HUB_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)
"""Files of a tokenizer in a folder of the Hugging Face Hub."""


@dataclass(frozen=True)
class ModelInputs:
    """Frames and texts as a model reads them."""

    image_size: int
    """Height and width of a frame, in pixels."""
    mean: tuple[float, float, float]
    """Mean of each color channel that frames are normalized with, of values from 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation of each color channel."""
    num_frames: int
    """Frames per clip that the model is usually given."""
    max_text_tokens: int
    """Length to which texts are truncated and padded, in tokens."""
    most_text_tokens: int
    """Largest length that the model supports."""
    any_text_length: bool = True
    """Whether texts may be padded to another length than `max_text_tokens`."""
    resize: Literal["squash", "crop"] = "squash"
    """How the model's own preprocessing makes frames square."""
    cleans_captions: bool = True
    """Whether captions are cleaned before they are tokenized; see `stgt.inputs.caption_text`."""
    follows_benchmark: bool = False
    """Whether the text length of a benchmark's published fine-tuning applies to this model."""


class TextTokenizer(Protocol):
    """A tokenizer of any model."""

    def __len__(self) -> int:
        """Return the number of entries of the vocabulary."""
        ...

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        ...

    @property
    def sep_id(self) -> int:
        """Id of the token that ends a text."""
        ...

    def entries(self) -> list[str]:
        """Return the vocabulary in id order."""
        ...

    def save_to(self, folder: Path) -> None:
        """Write the tokenizer's files to a model folder."""
        ...

    def __call__(self, captions: Sequence[str], max_tokens: int) -> TextTokens:
        """Tokenize, truncate and pad N texts to S = `max_tokens`."""
        ...

    def encode(
        self, captions: Sequence[str], max_tokens: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Like a call, but return ids and mask [N, S] as arrays, without loading torch."""
        ...


class VideoTextConfig(Protocol):
    """The architecture of a model: everything needed to build it except its weights."""

    matches: ClassVar[bool]
    """Whether the model scores pairs of a video and a text, beyond their cosine similarity."""
    accumulates: ClassVar[bool]
    """Whether a batch may be computed in passes that cache frame tokens, visual tokens and
    embeddings, because nothing in the model looks across the clips of a batch."""
    cleans_questions: ClassVar[bool]
    """Whether questions are cleaned as captions are. Published code for ALPRO leaves them as they
    were written."""

    @property
    def kind(self) -> str:
        """Name of the kind of model in `stgt.interface.kinds`."""
        ...

    @property
    def inputs(self) -> ModelInputs:
        """What the model reads."""
        ...

    @property
    def title(self) -> str:
        """Name of the model for readers, such as `STGT`."""
        ...

    @property
    def frame_token_shape(self) -> tuple[int, int] | None:
        """Shape [L, D] of what `encode_frames` returns for a frame.

        None if the model has no frame encoder that training may leave frozen.
        """
        ...

    @property
    def frames_are_fixed(self) -> bool:
        """Whether training leaves all of the frame encoder frozen."""
        ...

    @property
    def needs_initial_weights(self) -> str | None:
        """Why a training cannot start from random weights, with advice; None if it can."""
        ...

    def for_tokenizer(self, tokenizer: TextTokenizer) -> Self:
        """Return the config for a tokenizer.

        Raises:
            SettingError: The tokenizer does not belong to the model.
        """
        ...

    def tokenizer_problem(self, tokenizer: TextTokenizer) -> str | None:
        """Say how a tokenizer differs from the one that the model was trained with, or None."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested JSON-serializable values."""
        ...

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a config from the output of `to_dict`.

        Raises:
            TypeError: A name is unknown.
            SettingError: A value is out of range.
        """
        ...


Answering = Literal["classification", "generation"]
"""How a model answers questions: by a classifier, or word by word."""


def answering_of(config: Any) -> Answering | None:
    """Return how a model with this config answers; None if it was not made for questions."""
    if not getattr(config, "num_answers", 0):
        return None
    return getattr(config, "answering", "classification")
