"""The base class of all video-language models, and how they return encoded videos.

Legend: B videos, N texts or pairs, T frames, L tokens of a frame, M visual tokens, Q embeddings of
a video, D token width, E shared embedding, S text tokens, W words.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from stgt.inputs.tokenizer import TextTokens
from stgt.inputs.transforms import normalize_frames
from stgt.interface.inputs import TextTokenizer
from stgt.network.similarity import video_text_similarity
from stgt.question_answering.vocabulary import AnswerVocabulary

Texts: TypeAlias = Sequence[str] | TextTokens
"""N texts, as strings or as tokens [N, S]."""

PairScores: TypeAlias = Callable[[torch.Tensor, torch.Tensor, TextTokens, int], torch.Tensor]
"""Match logits [n, 2] float of n pairs, given the video and the text of each pair [n] int64, the
texts' tokens, and the number of pairs to compute at a time."""


@dataclass(frozen=True)
class FrameTokens:
    """What `encode_frames` returned for the frames of B clips, in place of these frames."""

    values: torch.Tensor
    """[B, T, L, D] float, or whatever else the model's `relate_frames` takes, B first."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | torch.Tensor) -> FrameTokens:
        """Return the tokens of some clips."""
        return FrameTokens(self.values[rows])


@dataclass(frozen=True)
class VideoEncoding:
    """The encodings of B videos."""

    tokens: torch.Tensor
    """[B, M, D] float: visual tokens, the input to matching."""
    embeds: torch.Tensor
    """[B, Q, E] float: unit-length embeddings, for cosine similarity."""

    def similarity(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Return [B, N] float32: cosine of each video's best embedding with texts [N, E]."""
        return video_text_similarity(self.embeds, text_embeds)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of B pairs of videos and texts, in training."""

    videos: torch.Tensor
    """[B, Q, E] float, unit length."""
    texts: torch.Tensor
    """[B, E] float, unit length."""
    caption_logits: torch.Tensor | None = None
    """[B, S, W] float: next-token logits of the texts as captions; None if it writes none."""


class ParameterCounts(NamedTuple):
    """Parameter counts of a model."""

    total: int
    """All parameters, including fixed tables."""
    trained: int
    """Trainable parameters."""


class FrozenEncoder(Protocol):
    """A frame encoder with tensors that training may leave frozen."""

    missing: bool
    """True if the frozen tensors were not loaded, so the model cannot encode videos."""
    fingerprint: str | None
    """Hash of the frozen tensors; None until it has been computed."""

    def frozen_names(self) -> set[str]:
        """Return the names of the frozen tensors."""
        ...


class VideoTextModel(nn.Module, abc.ABC):
    """A model that embeds videos and texts in one space.

    README.md beside this file explains how to add one.
    """

    config: Any
    """A `stgt.interface.inputs.VideoTextConfig`."""
    tokenizer: Any
    """A `stgt.interface.inputs.TextTokenizer`, or None."""
    frame_encoder: Any
    """A `FrozenEncoder` that is stored apart from the trained tensors; None without one."""
    answers: AnswerVocabulary | None = None
    """Vocabulary of the classes of `classifier`; None if the model answers no questions."""
    classifier: nn.Module | None
    """Head of a model that answers questions: states [N, H] -> logits [N, K]. Such a model also
    has `fuse` and `unused_when_answering`; see `stgt.question_answering.head`."""
    temperature: torch.Tensor
    """Scalar: contrastive logits are similarity / temperature."""

    time_tables: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors [..., T, D] with an embedding per frame, which are resized when a model
    of another number of frames begins with their weights."""
    checks_values: bool = True
    """Whether token ids are checked. Off where tensors have no values."""
    replays_passes: bool = False
    """Whether passes of training are replayed from CUDA graphs, so that gradients must not be
    accumulated."""

    @property
    def matches(self) -> bool:
        """Whether the model scores pairs with `match`."""
        return self.config.matches

    @property
    @abc.abstractmethod
    def embedding_shape(self) -> tuple[int, int]:
        """Number Q of embeddings of a video, and their width E."""

    def __init__(self) -> None:
        super().__init__()
        # Defaults of the class would hide modules of the same names.
        self.frame_encoder = None
        self.classifier = None

    @abc.abstractmethod
    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode each frame on its own: the part of the model that may be frozen.

        Args:
            frames: [B, T, H, W, 3] uint8, as decoders return them, or [B, T, 3, H, W] float,
                normalized.

        Returns:
            [B, T, L, D] float, or any tensor that `relate_frames` takes.

        Raises:
            ValueError: The frames have a shape or dtype that the model does not accept.
        """

    @abc.abstractmethod
    def relate_frames(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Relate the frames of a clip: output of `encode_frames` -> visual tokens [B, M, D]."""

    @abc.abstractmethod
    def embed(self, video_tokens: torch.Tensor, text: TextTokens) -> Embedded:
        """Compute what the losses of B pairs need, from visual tokens [B, M, D] and their texts."""

    @abc.abstractmethod
    def embed_videos(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """Return unit-length embeddings [B, Q, E] float of visual tokens [B, M, D]."""

    @abc.abstractmethod
    def encode_text(self, texts: Texts) -> torch.Tensor:
        """Return unit-length embeddings [N, E] float of N texts or their tokens [N, S]."""

    def match(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Return logits [N, 2] float that text n describes video n; index 1 = match.

        Raises:
            NotImplementedError: The model does not match pairs.
        """
        raise NotImplementedError(f"{self.config.title} does not match pairs")

    def pair_scorer(self, video_tokens: torch.Tensor) -> PairScores:
        """Return a function that scores many pairs of videos [V, M, D] at a lower cost.

        Raises:
            NotImplementedError: The model does not match pairs.
        """
        raise NotImplementedError(f"{self.config.title} does not match pairs")

    def frame_tokens(self, frames: torch.Tensor | FrameTokens) -> torch.Tensor:
        """Return the input to `relate_frames`: frames are encoded, and known tokens are used."""
        return frames.values if isinstance(frames, FrameTokens) else self.encode_frames(frames)

    def video_tokens(self, frames: torch.Tensor | FrameTokens) -> torch.Tensor:
        """Encode frames as visual tokens [B, M, D] float; see `encode_frames`."""
        return self.relate_frames(self.frame_tokens(frames))

    def encode_video(self, frames: torch.Tensor | FrameTokens) -> VideoEncoding:
        """Encode clips for retrieval.

        Args:
            frames: [B, T, 3, H, W] float, normalized, or [B, T, H, W, 3] uint8; T = 1 for images.
                `FrameTokens` stand for frames that were encoded before.

        Returns:
            Visual tokens [B, M, D] and embeddings [B, Q, E].
        """
        tokens = self.video_tokens(frames)
        return VideoEncoding(tokens=tokens, embeds=self.embed_videos(tokens))

    def checked_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Check frames, and return them as [B, T, 3, H, W] float, normalized.

        Raises:
            ValueError: The frames have a shape or dtype that the model does not accept.
        """
        inputs = self.config.inputs
        size = inputs.image_size
        if not isinstance(frames, torch.Tensor):
            raise ValueError(f"frames: expected a torch.Tensor, got {type(frames).__name__}")  # noqa: TRY004
        if frames.ndim > 0 and frames.shape[0] == 0:
            raise ValueError("frames: the batch is empty; expected at least one clip")
        if frames.dtype == torch.uint8:
            if frames.ndim != 5 or frames.shape[2:] != (size, size, 3):
                raise ValueError(
                    f"frames: expected uint8 [B, T, {size}, {size}, 3], got {list(frames.shape)}"
                )
            frames = normalize_frames(frames, inputs.mean, inputs.std)
        if not frames.is_floating_point():
            raise ValueError(f"frames: expected normalized float or uint8, got {frames.dtype}")
        if frames.ndim != 5 or frames.shape[2:] != (3, size, size):
            raise ValueError(
                f"frames: expected [B, T, 3, {size}, {size}], got {list(frames.shape)}"
            )
        return frames.to(self.temperature.dtype)

    def checked_tokens(
        self, tokenizer: TextTokenizer | None, texts: Texts, words: int
    ) -> TextTokens:
        """Return texts as tokens on the model's device. Longer texts are truncated.

        Args:
            tokenizer: Tokenizer for strings.
            texts: N strings, or tokens [N, S], which are checked.
            words: Number of ids that the model has embeddings for.

        Raises:
            ValueError: There are no texts, or the tokens are malformed.
        """
        inputs = self.config.inputs
        if not isinstance(texts, TextTokens):
            if tokenizer is None:
                raise ValueError("this model has no tokenizer; set it, or pass TextTokens")
            texts = tokenizer(texts, inputs.max_text_tokens)
        ids, mask = texts.input_ids, texts.attention_mask
        if ids.ndim != 2 or ids.shape != mask.shape or 0 in ids.shape:
            raise ValueError(
                f"texts: expected input_ids and attention_mask [N, S], got {list(ids.shape)} and "
                f"{list(mask.shape)}"
            )
        if ids.dtype != torch.int64 or mask.is_floating_point():
            raise ValueError(
                f"texts: expected int64 input_ids and an attention_mask of int64 or bool, got "
                f"{ids.dtype} and {mask.dtype}"
            )
        # On a GPU this check would force a synchronization at every step.
        checked = self.checks_values and ids.device.type == "cpu"
        if checked and not 0 <= int(ids.min()) <= int(ids.max()) < words:
            raise ValueError(
                f"texts: input_ids range from {int(ids.min())} to {int(ids.max())}, but the "
                f"vocabulary has {words} entries"
            )
        if ids.shape[1] > inputs.most_text_tokens:
            raise ValueError(
                f"texts: got {ids.shape[1]} tokens, but the model has positions for only "
                f"{inputs.most_text_tokens}"
            )
        return texts.to(self.temperature.device)

    def frozen_names(self) -> set[str]:
        """Return the names of tensors that training never changes and that are stored apart."""
        if self.frame_encoder is None:
            return set()
        return {f"frame_encoder.{name}" for name in self.frame_encoder.frozen_names()}

    @property
    def frames_are_fixed(self) -> bool:
        """Whether no parameter of `encode_frames` is trained, so its output may be kept."""
        encoder = self.frame_encoder
        return encoder is not None and not any(p.requires_grad for p in encoder.parameters())

    def compile_blocks(self, cuda_graphs: bool = False) -> None:
        """Compile the repeated blocks with torch.compile. Parameter names do not change.

        Args:
            cuda_graphs: In training on a GPU, replay the passes of many small kernels from CUDA
                graphs, in models that have such passes. Then each forward pass must be followed by
                its backward pass, and gradients must be set to None before the next one. The model
                says so in `replays_passes`.

        Raises:
            NotImplementedError: The model has no blocks that it can compile.
        """
        raise NotImplementedError(f"{self.config.title} cannot be compiled; leave out --compile")

    def count_parameters(self) -> ParameterCounts:
        """Count the parameters, including frozen ones."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return ParameterCounts(sum(p.numel() for p in self.parameters()), trained)
