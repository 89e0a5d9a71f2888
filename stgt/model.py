"""The STGT model: frame encoder, graph transformer and Q-Former. Losses are in `stgt.training`.

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
"""Number of entries of bert-base-uncased plus the captioning start token."""


class ParameterCounts(NamedTuple):
    """Parameter counts of a model."""

    total: int
    """All parameters, including the graph transformer's fixed position table."""
    trained: int
    """Trainable parameters."""


class STGT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="stgt",
    pipeline_tag="video-text-to-text",
    tags=["video-text-retrieval"],
):
    """The video-language model. Weights are random until a checkpoint is loaded.

    `STGT.from_pretrained(FOLDER or hub id)` returns a model in eval mode, with its vocabulary.
    `save_pretrained(FOLDER)` and `push_to_hub(hub id)` store the whole model, including a frozen
    encoder.
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
        """Encode frames as visual tokens.

        Args:
            frames: [B, T, 3, H, W] float, normalized; or [B, T, H, W, 3] uint8, as decoders return
                them. T is at most the config's `num_frames`.

        Returns:
            [B, M, D] float.

        Raises:
            ValueError: The frames have a shape or dtype that this model does not accept.
        """
        return self.relate_frames(self.encode_frames(frames))

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode each frame as frame tokens [B, T, L, D]: the first step of `video_tokens`."""
        frames = self._checked_frames(frames)
        return self.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def relate_frames(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Relate the frames of a clip, the second step: [B, T, L, D] -> visual tokens [B, M, D]."""
        return self.ln_vision(self.graph(frame_tokens))

    def _checked_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Check frames, and return them as [B, T, 3, H, W] float."""
        size = self.config.vision.image_size
        if not isinstance(frames, torch.Tensor):
            raise ValueError(f"frames: expected a torch.Tensor, got {type(frames).__name__}")  # noqa: TRY004
        if frames.ndim > 0 and frames.shape[0] == 0:
            raise ValueError("frames: the batch is empty; expected at least one clip")
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
                f"frames: got {frames.shape[1]} frames per clip, but the model takes 1 to "
                f"{self.config.num_frames} (num_frames in its config)"
            )
        return frames.to(self.temperature.dtype)

    def project_video(self, query_states: torch.Tensor) -> torch.Tensor:
        """Project query states [B, Q, H] to unit-length embeddings [B, Q, E]."""
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
        """Return texts as tokens on the model's device. Longer texts are truncated, as published.

        Args:
            texts: N strings, or tokens [N, S], which are checked.

        Raises:
            ValueError: There are no texts, or the tokens are malformed.
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
                f"texts: expected int64 input_ids and an attention_mask of int64 or bool, got "
                f"{ids.dtype} and {mask.dtype}"
            )
        # On a GPU this check would force a synchronization at every step.
        words = self.config.vocab_size
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < words:
            raise ValueError(
                f"texts: input_ids range from {int(ids.min())} to {int(ids.max())}, but the "
                f"vocabulary has {words} entries"
            )
        if ids.shape[1] > self.config.qformer.max_position:
            raise ValueError(
                f"texts: got {ids.shape[1]} tokens, but the model has positions for only "
                f"{self.config.qformer.max_position} (qformer.max_position in its config)"
            )
        return texts.to(self.temperature.device)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            if self.config.vocab_size != BERT_VOCAB_SIZE:
                raise ValueError(
                    "this model has no vocabulary; set model.tokenizer = Tokenizer(FILE), or pass "
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
            ValueError: There are no texts, or the tokens are malformed.
        """
        text = self.tokenize(texts)
        states = self.qformer.encode_text(text.input_ids, text.attention_mask)
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def match(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Score whether text n describes video n.

        Args:
            videos: N videos, or one video for all texts: output of `encode_video`, or visual tokens
                [N, M, D] float.
            texts: N strings, or their tokens [N, S].

        Returns:
            [N, 2] float logits, averaged over the query tokens; index 1 = match. Their softmax is
            the match probability.

        Raises:
            ValueError: The numbers of videos and texts differ.
        """
        text, tokens = self.tokenize(texts), self._tokens_of(videos)
        if len(tokens) == 1:
            tokens = tokens.expand(len(text), -1, -1)
        if len(tokens) != len(text):
            raise ValueError(
                f"match: got {len(tokens)} videos and {len(text)} texts; pass one of each per pair"
            )
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
            num_beams: Width of the beam search; 1 is greedy.
            max_tokens: Maximum caption length in tokens; None means the config's `max_text_tokens`.
            min_tokens: Minimum caption length in tokens.
            top_p: Sample from the smallest set of words whose total probability reaches this value,
                in (0, 1]. Sampling uses torch's global generator; seed it with `torch.manual_seed`.
            temperature: Sampling temperature.

        Returns:
            V captions, without special tokens.

        Raises:
            ValueError: A setting is out of range, or the model is in training mode.
        """
        most = self.config.max_text_tokens if max_tokens is None else max_tokens
        if self.training:
            raise ValueError("model is in training mode; call model.eval() first")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p = {top_p}: must be in (0, 1]")
        if num_beams < 1 or temperature <= 0:
            raise ValueError(
                f"num_beams = {num_beams}, temperature = {temperature}: num_beams must be at least "
                "1 and temperature must be positive"
            )
        if not 1 <= min_tokens <= most < self.config.qformer.max_position:
            raise ValueError(
                f"min_tokens = {min_tokens}, max_tokens = {most}: must satisfy 1 <= min_tokens <= "
                f"max_tokens < qformer.max_position ({self.config.qformer.max_position})"
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
        """Compute the query states of videos and the next-token logits of their captions.

        The captioning start token replaces the first token of each text.

        Args:
            video_tokens: [N, M, D] float.
            text: Ids and mask [N, S].

        Returns:
            Query states [N, Q, H] float, which do not depend on the text, and logits [N, S, W]
            float.
        """
        input_ids = text.input_ids.clone()
        input_ids[:, 0] = self.config.bos_id
        return self.qformer.encode_causal(video_tokens, input_ids, text.attention_mask)

    def compile_blocks(self) -> None:
        """Compile the repeated blocks with torch.compile. Parameter names do not change.

        Compiling blocks takes a fraction of the time that compiling the whole model takes, and
        keeps communication between workers out of the compiled graphs.
        """
        bert = self.qformer.bert
        for block in (*self.frame_encoder.vit.blocks, *bert.encoder.layer):
            block.compile()

    def count_parameters(self) -> ParameterCounts:
        """Count the parameters, including frozen ones and the fixed position table."""
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
    """Skip the random initialization of weights, by far the slowest part of building a model."""

    DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        if func in self.DRAWING:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_to_be_loaded(config: ModelConfig, tokenizer: Tokenizer | None = None) -> STGT:
    """Build a model with uninitialized weights, for callers that load all of them."""
    with _NoRandomValues():
        return STGT(config, tokenizer)


def load_model(
    folder: Path, frame_encoder: Path | None = None, needs_frame_encoder: bool = True
) -> STGT:
    """Build a model from a saved folder and load its weights and its vocabulary.

    Args:
        folder: Folder of a saved model.
        frame_encoder: See `load_weights`.
        needs_frame_encoder: See `load_weights`.

    Raises:
        CheckpointError: See `load_weights`.
    """
    vocab = folder / VOCAB_FILE
    model = build_to_be_loaded(
        read_model_config(folder), tokenizer=Tokenizer(vocab) if vocab.is_file() else None
    )
    load_weights(model, folder, frame_encoder, needs_frame_encoder)
    return model
