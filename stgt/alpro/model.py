"""The ALPRO model: TimeSformer, and BERT as a text encoder followed by a fusion encoder.

Paper: Align and Prompt: Video-and-Language Pre-training with Entity Prompts (Li et al. 2022). Both
encoders are transformers' own. Losses are in `stgt.training`; the published ones are the
contrastive loss with hard targets and without label smoothing, and the matching loss.

Legend: B videos, N texts or pairs, T frames, G patches along each edge, D width of all tokens,
M = 1 + G*G visual tokens, E shared embedding, S text tokens, A answers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import nn
from transformers import BertConfig, BertModel, TimesformerConfig, TimesformerModel

from stgt.alpro.config import AlproConfig, FusionBertSizes, TimeSformerSizes
from stgt.alpro.pair_scorer import AlproPairScorer
from stgt.compilation import compile_each
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.interface.model import Embedded, PairScores, Texts, VideoEncoding, VideoTextModel
from stgt.question_answering.head import AnswerHead

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 0.5
"""Range that the published code keeps the temperature in."""


def _video_encoder(sizes: TimeSformerSizes, num_frames: int) -> TimesformerModel:
    """Build a TimeSformer with random weights."""
    encoder = TimesformerModel(
        TimesformerConfig(
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            num_frames=num_frames,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.mlp_width,
            initializer_range=sizes.init_std,
        )
    )
    # Transformers starts from equal time embeddings and draws patch projections with the standard
    # deviation of all weights. The order of frames would have no influence at first.
    embeddings = encoder.embeddings
    for table in (embeddings.position_embeddings, embeddings.time_embeddings):
        nn.init.trunc_normal_(
            table, std=sizes.position_std, a=-2 * sizes.position_std, b=2 * sizes.position_std
        )
    projection = embeddings.patch_embeddings.projection.weight
    nn.init.trunc_normal_(projection, std=projection[0].numel() ** -0.5)
    # Transformers' config accepts whole numbers only as the rate.
    for number, layer in enumerate(encoder.encoder.layer):
        layer.drop_path = DropPath(sizes.drop_path * number / max(1, sizes.depth - 1))
    return encoder


def _text_encoder(sizes: FusionBertSizes, width: int, words: int, pad_id: int) -> BertModel:
    """Build a BERT with random weights."""
    return BertModel(
        BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.mlp_width,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.dropout,
            max_position_embeddings=sizes.max_position,
            initializer_range=sizes.init_std,
            pad_token_id=pad_id,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        ),
        add_pooling_layer=False,
    )


class Alpro(VideoTextModel):
    """The model. Weights are random until a checkpoint is loaded."""

    config: AlproConfig
    tokenizer: Tokenizer | None
    time_tables: ClassVar[tuple[str, ...]] = ("video_encoder.embeddings.time_embeddings",)

    def __init__(self, config: AlproConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        width = config.vision.width
        self.video_encoder = _video_encoder(config.vision, config.num_frames)
        self.text_encoder = _text_encoder(config.text, width, config.vocab_size, config.pad_id)
        self.video_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.classifier = AnswerHead(width, config.num_answers) if config.num_answers else None
        if config.gradient_checkpointing:
            for encoder in (self.video_encoder, self.text_encoder):
                encoder.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """One embedding per video, and the width E of the shared space."""
        return 1, self.config.embed_dim

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalize frames to [B, T, 3, H, W] float; no part of the model sees single frames.

        Raises:
            ValueError: The frames have a shape or dtype that the model does not accept.
        """
        frames = self.checked_frames(frames)
        if not 1 <= frames.shape[1] <= self.config.num_frames:
            raise ValueError(
                f"frames: got {frames.shape[1]} frames per clip, but the model takes 1 to "
                f"{self.config.num_frames} (num_frames in its config)"
            )
        return frames

    def relate_frames(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Encode clips, and average patches over time.

        Args:
            frame_tokens: [B, T, 3, H, W] float, from `encode_frames`.

        Returns:
            [B, M, D] float: CLS, then patches row by row.
        """
        # The blocks divide tokens by the number of frames in this config, which they share. The
        # embeddings resize their table to the frames that they get.
        self.video_encoder.config.num_frames = frame_tokens.shape[1]
        tokens = self.video_encoder(pixel_values=frame_tokens).last_hidden_state
        patches = tokens[:, 1:].unflatten(1, (-1, frame_tokens.shape[1]))  # [B, G*G, T, D]
        return torch.cat([tokens[:, :1], patches.mean(dim=2)], dim=1)

    def embed_videos(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """Return unit-length embeddings [B, 1, E] of the first token of videos [B, M, D]."""
        return F.normalize(self.video_proj(video_tokens[:, :1]), dim=-1)

    def embed(self, video_tokens: torch.Tensor, text: TextTokens) -> Embedded:
        """Compute the embeddings of pairs. In training, the temperature is kept in its range."""
        if self.training:
            with torch.no_grad():
                self.temperature.clamp_(LEAST_TEMPERATURE, MOST_TEMPERATURE)
        return Embedded(self.embed_videos(video_tokens), self.encode_text(text))

    def tokenize(self, texts: Texts) -> TextTokens:
        """Return texts as tokens [N, S] on the model's device. Longer texts are truncated.

        Raises:
            ValueError: There are no texts, or the tokens are malformed.
        """
        return self.checked_tokens(self.tokenizer, texts, self.config.vocab_size)

    def text_states(self, text: TextTokens) -> torch.Tensor:
        """Encode texts alone.

        Args:
            text: Ids and mask [N, S].

        Returns:
            [N, S, D] float; values at padded positions are undefined.
        """
        states = self.text_encoder.embeddings(input_ids=text.input_ids)
        # may_attend[n, 0, 0, j]: True = all positions may attend to position j
        may_attend = text.attention_mask.bool()[:, None, None, :]
        for layer in self.text_encoder.encoder.layer[: self.config.text.fusion_layer]:
            states = layer(states, may_attend)
        return states

    def encode_text(self, texts: Texts) -> torch.Tensor:
        """Encode captions for retrieval.

        Args:
            texts: N strings, or their tokens [N, S].

        Returns:
            [N, E] float, unit length, from the first token of each text.
        """
        states = self.text_states(self.tokenize(texts))
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def fuse_states(
        self, text_states: torch.Tensor, attention_mask: torch.Tensor, video_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Run the fusion layers on text and video tokens.

        Args:
            text_states: [N, S, D] float, from `text_states`.
            attention_mask: [N, S] int64 or bool, 1 = real token.
            video_tokens: [N, M, D] float.

        Returns:
            [N, D] float, the state of the first text token.
        """
        states = torch.cat([text_states, video_tokens], dim=1)
        real = attention_mask.bool()
        may_attend = torch.cat([real, real.new_ones(video_tokens.shape[:2])], dim=1)
        for layer in self.text_encoder.encoder.layer[self.config.text.fusion_layer :]:
            states = layer(states, may_attend[:, None, None, :])
        return states[:, 0]

    def fuse(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Fuse text n with video n.

        Args:
            videos: N videos, or one video for all texts: output of `encode_video`, or visual tokens
                [N, M, D] float.
            texts: N strings, or their tokens [N, S].

        Returns:
            [N, D] float, the state of the first text token after fusion.

        Raises:
            ValueError: The numbers of videos and texts differ.
        """
        text = self.tokenize(texts)
        tokens = videos.tokens if isinstance(videos, VideoEncoding) else videos
        width = self.config.vision.width
        if tokens.ndim != 3 or 0 in tokens.shape or tokens.shape[2] != width:
            raise ValueError(
                f"videos: expected visual tokens [N, M, {width}], got {list(tokens.shape)}"
            )
        if len(tokens) == 1:
            tokens = tokens.expand(len(text), -1, -1)
        if len(tokens) != len(text):
            raise ValueError(
                f"fuse: got {len(tokens)} videos and {len(text)} texts; pass one of each per pair"
            )
        return self.fuse_states(self.text_states(text), text.attention_mask, tokens)

    def match(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Score whether text n describes video n; see `fuse` for the arguments.

        Returns:
            [N, 2] float logits; index 1 = match. Their softmax is the match probability.
        """
        return self.itm_head(self.fuse(videos, texts))

    def pair_scorer(self, video_tokens: torch.Tensor) -> PairScores:
        """Return a function that scores many pairs of videos [V, M, D]; see `AlproPairScorer`."""
        return AlproPairScorer(self, video_tokens)

    def unused_when_answering(self) -> tuple[str, ...]:
        """Return the beginnings of the names of parameters that answers do not depend on."""
        return ("video_proj.", "text_proj.", "itm_head.", "temperature")

    def compile_blocks(self, cuda_graphs: bool = False) -> None:
        """Compile the repeated blocks with torch.compile. Parameter names do not change."""
        compile_each((*self.video_encoder.encoder.layer, *self.text_encoder.encoder.layer))
