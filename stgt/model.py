"""STGT: frames -> frame tokens -> graph transformer -> Q-Former, with no losses in it.

Paper: Video-Language Alignment via Spatio-Temporal Graph Transformer.

Legend: B videos, N texts or pairs, T frames, D vision width, M visual tokens, Q query tokens,
H Q-Former width, E shared embedding, S text tokens, W words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn
from torch.overrides import TorchFunctionMode

from stgt.config import ModelConfig
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.inputs.transforms import normalize_frames
from stgt.interface import Texts, VideoEncoding
from stgt.model_folder import FILES, VOCAB_FILE, load_weights, read_model_config, save_model
from stgt.network.captioning import write_captions
from stgt.network.graph import GraphTransformer
from stgt.network.qformer import QFormer
from stgt.network.vision import FrameEncoder

LN_VISION_EPS = 1e-5
BERT_VOCAB_SIZE = 30523
"""Entries of bert-base-uncased and the captioning start token."""


class ParameterCounts(NamedTuple):
    """How many numbers a model holds."""

    total: int
    """All of them, the fixed position table of the graph transformer included."""
    trained: int
    """Those that training changes."""


class STGT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="stgt",
    pipeline_tag="video-text-to-text",
    tags=["video-text-retrieval"],
):
    """The video-language model. Weights are random until a checkpoint is loaded.

    `STGT.from_pretrained(FOLDER or hub id)` gives a model in eval mode, with its vocabulary;
    `save_pretrained(FOLDER)` and `push_to_hub(hub id)` keep all of it, a frozen encoder included.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        width = config.vision.width
        self.frame_encoder = FrameEncoder(config.vision)
        self.graph = GraphTransformer(width, config.vision.grid, config.num_frames, config.graph)
        self.ln_vision = nn.LayerNorm(width, eps=LN_VISION_EPS)
        self.qformer = QFormer(config)
        self.video_proj = nn.Linear(config.qformer.width, config.embed_dim)
        self.text_proj = nn.Linear(config.qformer.width, config.embed_dim)
        self.itm_head = nn.Linear(config.qformer.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        if config.gradient_checkpointing:
            self.graph.gradient_checkpointing = True
            self.qformer.bert.activation_checkpointing_enable({"use_reentrant": False})
            if not config.vision.frozen or config.vision.unfreeze_last_blocks:
                self.frame_encoder.vit.set_grad_checkpointing()

    def video_tokens(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames to visual tokens.

        Args:
            frames: [B, T, 3, H, W] float, normalized; or [B, T, H, W, 3] uint8, as decoders give
                them. T is at most the config's `num_frames`.

        Returns:
            [B, M, D] float.

        Raises:
            ValueError: the shape or dtype is not that of frames of this model's size.
        """
        return self.relate_frames(self.encode_frames(frames))

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """The first half of `video_tokens`, frame by frame: gives frame tokens [B, T, L, D]."""
        frames = self._checked_frames(frames)
        return self.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def relate_frames(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Its second half, over the frames of a clip: [B, T, L, D] -> visual tokens [B, M, D]."""
        return self.ln_vision(self.graph(frame_tokens))

    def _checked_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames [B, T, 3, H, W] float, or one clear sentence."""
        size = self.config.vision.image_size
        if not isinstance(frames, torch.Tensor):
            raise ValueError(f"frames: expected a torch.Tensor, got {type(frames).__name__}")  # noqa: TRY004
        if frames.ndim > 0 and frames.shape[0] == 0:
            raise ValueError("frames: there are no clips")
        if frames.dtype == torch.uint8:
            if frames.ndim != 5 or frames.shape[2:] != (size, size, 3):
                raise ValueError(
                    f"frames: expected uint8 [B, T, {size}, {size}, 3], got {list(frames.shape)}"
                )
            frames = normalize_frames(frames)
        if not frames.is_floating_point():
            raise ValueError(f"frames: expected normalized float or uint8, got {frames.dtype}")
        if frames.ndim != 5 or frames.shape[2:] != (3, size, size):
            raise ValueError(
                f"frames: expected [B, T, 3, {size}, {size}], got {list(frames.shape)}"
            )
        if not 1 <= frames.shape[1] <= self.config.num_frames:
            raise ValueError(
                f"frames: {frames.shape[1]} frames a clip, the model takes 1 to "
                f"{self.config.num_frames} (num_frames of its config)"
            )
        return frames.to(self.temperature.dtype)

    def project_video(self, query_states: torch.Tensor) -> torch.Tensor:
        """Query states [B, Q, H] -> unit-length embeddings [B, Q, E]."""
        return F.normalize(self.video_proj(query_states), dim=-1)

    def encode_video(self, frames: torch.Tensor) -> VideoEncoding:
        """Encode clips for retrieval.

        Args:
            frames: [B, T, 3, H, W] float, normalized, or [B, T, H, W, 3] uint8; T = 1 for images.

        Returns:
            Visual tokens [B, M, D] and embeddings [B, Q, E].
        """
        tokens = self.video_tokens(frames)
        return VideoEncoding(
            tokens=tokens, embeds=self.project_video(self.qformer.encode_queries(tokens))
        )

    def tokenize(self, texts: Texts) -> TextTokens:
        """Texts as tokens on the model's device; longer ones are truncated, as published.

        Args:
            texts: N strings, or tokens [N, S], which are checked.

        Raises:
            ValueError: there is no text, or tokens of another form.
        """
        if not isinstance(texts, TextTokens):
            texts = self._tokenizer()(texts, self.config.max_text_tokens)
        ids, mask = texts.input_ids, texts.attention_mask
        if ids.ndim != 2 or ids.shape != mask.shape or 0 in ids.shape:
            raise ValueError(
                f"texts: expected input_ids and attention_mask [N, S], got {list(ids.shape)} and "
                f"{list(mask.shape)}"
            )
        if ids.dtype != torch.int64 or mask.is_floating_point():
            raise ValueError(
                f"texts: expected input_ids of int64 and an attention_mask of int64 or bool, got "
                f"{ids.dtype} and {mask.dtype}"
            )
        # On a device the check would wait for it at every step.
        words = self.config.vocab_size
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < words:
            raise ValueError(
                f"texts: input_ids reach from {int(ids.min())} to {int(ids.max())}, the vocabulary "
                f"has {words} entries"
            )
        if ids.shape[1] > self.config.qformer.max_position:
            raise ValueError(
                f"texts: {ids.shape[1]} tokens, the model has positions for "
                f"{self.config.qformer.max_position} (qformer.max_position of its config)"
            )
        return texts.to(self.temperature.device)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            if self.config.vocab_size != BERT_VOCAB_SIZE:
                raise ValueError(
                    "this model has no vocabulary: set model.tokenizer = Tokenizer(FILE), or give "
                    "TextTokens"
                )
            self.tokenizer = Tokenizer()
        return self.tokenizer

    def encode_text(self, texts: Texts) -> torch.Tensor:
        """Encode captions for retrieval.

        Args:
            texts: N strings, or their tokens [N, S].

        Returns:
            [N, E] float, unit length, from the first token of each text.

        Raises:
            ValueError: there is no text, or tokens of another form.
        """
        text = self.tokenize(texts)
        states = self.qformer.encode_text(text.input_ids, text.attention_mask)
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def match(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Score pairs: does text n describe video n?

        Args:
            videos: N videos, or one for all texts: from `encode_video`, or their visual tokens
                [N, M, D] float.
            texts: N strings, or their tokens [N, S].

        Returns:
            [N, 2] float logits, mean over the queries; index 1 = they match. Their softmax is the
            matching probability.

        Raises:
            ValueError: the numbers of videos and texts differ.
        """
        text, tokens = self.tokenize(texts), self._tokens_of(videos)
        if len(tokens) == 1:
            tokens = tokens.expand(len(text), -1, -1)
        if len(tokens) != len(text):
            raise ValueError(f"match: {len(tokens)} videos and {len(text)} texts; give pairs")
        states = self.qformer.encode_pairs(tokens, text.input_ids, text.attention_mask)
        return self.itm_head(states).mean(dim=1)

    def caption(
        self,
        videos: VideoEncoding | torch.Tensor,
        *,
        num_beams: int = 3,
        max_tokens: int | None = None,
        min_tokens: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
    ) -> list[str]:
        """Write a caption for each video, by beam search or, with `top_p`, by nucleus sampling.

        Args:
            videos: V videos from `encode_video`, or their visual tokens [V, M, D] float.
            num_beams: width of the beam search; 1 is greedy.
            max_tokens: most tokens of a caption; None takes the config's `max_text_tokens`.
            min_tokens: least tokens of a caption.
            top_p: sample from the smallest set of words whose probability reaches this, in (0, 1].
                The draw is torch's: `torch.manual_seed` repeats it.
            temperature: of the sampling.

        Returns:
            V captions, cleaned of special tokens.

        Raises:
            ValueError: a setting is out of range, or the model is in training mode.
        """
        most = self.config.max_text_tokens if max_tokens is None else max_tokens
        if self.training:
            raise ValueError("model is in training mode; call model.eval() first")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p = {top_p}: must lie in (0, 1]")
        if num_beams < 1 or temperature <= 0:
            raise ValueError(
                f"num_beams = {num_beams} must be at least 1, temperature = {temperature} positive"
            )
        if not 1 <= min_tokens <= most < self.config.qformer.max_position:
            raise ValueError(
                f"min_tokens = {min_tokens}, max_tokens = {most}: must be ascending, and below "
                f"qformer.max_position ({self.config.qformer.max_position})"
            )
        tokenizer = self._tokenizer()
        ids = write_captions(
            self.qformer,
            self._tokens_of(videos),
            bos_id=self.config.bos_id,
            eos_id=tokenizer.sep_id,
            pad_id=self.config.pad_id,
            max_tokens=most,
            min_tokens=min_tokens,
            num_beams=num_beams,
            top_p=top_p,
            temperature=temperature,
        )
        return tokenizer.decode(ids)

    def _tokens_of(self, videos: VideoEncoding | torch.Tensor) -> torch.Tensor:
        tokens = videos.tokens if isinstance(videos, VideoEncoding) else videos
        width = self.config.vision.width
        if tokens.ndim != 3 or 0 in tokens.shape or tokens.shape[2] != width:
            raise ValueError(
                f"videos: expected visual tokens [N, M, {width}], got {list(tokens.shape)}"
            )
        return tokens

    def caption_logits(
        self, video_tokens: torch.Tensor, text: TextTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token logits of captions given their videos, and the videos' query states.

        The first token of each text is replaced by the captioning start token.

        Args:
            video_tokens: [N, M, D] float.
            text: ids and mask [N, S].

        Returns:
            Query states [N, Q, H] float (those of the queries alone) and logits [N, S, W] float.
        """
        input_ids = text.input_ids.clone()
        input_ids[:, 0] = self.config.bos_id
        return self.qformer.encode_causal(video_tokens, input_ids, text.attention_mask)

    def compile_blocks(self) -> None:
        """Have torch.compile translate the repeated blocks, each kind once; changes no names.

        Blocks rather than the whole: compiling takes a fraction of the time, and what gathers
        between workers stays out of it.
        """
        bert = self.qformer.bert
        for block in (*self.frame_encoder.vit.blocks, *bert.encoder.layer):
            block.compile()

    def count_parameters(self) -> ParameterCounts:
        """Numbers of the model, the position table and everything frozen included."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.parameters()) + self.graph.pos_2D_embed.numel()
        return ParameterCounts(total=everything, trained=trained)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self, save_directory, with_frozen=True)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> STGT:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=list(FILES),
                )
            )
        return load_model(folder).eval()


class _NoRandomValues(TorchFunctionMode):
    """Leaves out the drawing of initial weights, by far the longest part of building a model."""

    DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        if func in self.DRAWING:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_to_be_loaded(config: ModelConfig, tokenizer: Tokenizer | None = None) -> STGT:
    """A model whose weights are whatever lay in memory: for those who load every one of them."""
    with _NoRandomValues():
        return STGT(config, tokenizer)


def load_model(
    folder: Path, frame_encoder: Path | None = None, needs_frame_encoder: bool = True
) -> STGT:
    """Build a model from a saved folder and load its weights and its vocabulary.

    Args:
        folder: a saved model.
        frame_encoder: as `load_weights`.
        needs_frame_encoder: as `load_weights`.

    Raises:
        CheckpointError: as `load_weights`.
    """
    vocab = folder / VOCAB_FILE
    model = build_to_be_loaded(
        read_model_config(folder), tokenizer=Tokenizer(vocab) if vocab.is_file() else None
    )
    load_weights(model, folder, frame_encoder, needs_frame_encoder)
    return model
