"""The STGT model: frame encoder, graph transformer and Q-Former. Losses are in `stgt.training`.

Paper: Video-Language Alignment via Spatio-Temporal Graph Transformer.

Legend: B videos, N texts or pairs, T frames, D vision width, M visual tokens, Q query tokens,
H Q-Former width, E shared embedding, S text tokens, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn

from stgt.config import ModelConfig
from stgt.cuda_graphs import ReplayedPass
from stgt.errors import CheckpointError, SettingError
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.interface.model import (
    Embedded,
    PairScores,
    ParameterCounts,
    Texts,
    VideoEncoding,
    VideoTextModel,
)
from stgt.model_folder import FILES, load_model, save_model
from stgt.network.captioning import write_captions
from stgt.network.graph import GraphTransformer
from stgt.network.initial_weights import tell_tokens_apart
from stgt.network.qformer import QFormer
from stgt.network.vision import FrameEncoder
from stgt.question_answering.generation import (
    answer_log_likelihoods,
    answer_losses,
    tokenize_answers,
)
from stgt.question_answering.head import AnswerHead

LN_VISION_EPS = 1e-5
BERT_VOCAB_SIZE = 30523
"""Number of entries of bert-base-uncased plus the captioning start token."""


class STGT(
    VideoTextModel,
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

    config: ModelConfig
    tokenizer: Tokenizer | None
    time_tables: ClassVar[tuple[str, ...]] = ("graph.time_embed",)

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
        if config.init_rules > 1 and not config.vision.frozen:
            tell_tokens_apart(self)
        self._replayed_embed: ReplayedPass | None = None
        self._replayed_match: ReplayedPass | None = None
        self.answer_tokens: TextTokens | None = None  # of `answers`, once they are needed
        self.classifier: AnswerHead | None = None
        if config.num_answers and config.answering == "classification":
            self.classifier = AnswerHead(config.qformer.width, config.num_answers)
        if config.gradient_checkpointing:
            self.graph.gradient_checkpointing = True
            self.qformer.bert.activation_checkpointing_enable({"use_reentrant": False})
            if not config.vision.frozen or config.vision.unfreeze_last_blocks:
                self.frame_encoder.vit.set_grad_checkpointing()

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Number of query tokens Q, and the width E of their embeddings."""
        return self.config.qformer.query_tokens, self.config.embed_dim

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode each frame as frame tokens [B, T, L, D]: the first step of `video_tokens`."""
        frames = self._checked_frames(frames)
        return self.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def relate_frames(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Relate the frames of a clip, the second step: [B, T, L, D] -> visual tokens [B, M, D]."""
        return self.ln_vision(self.graph(frame_tokens))

    def _checked_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Check frames, and return them as [B, T, 3, H, W] float."""
        frames = self.checked_frames(frames)
        if not 1 <= frames.shape[1] <= self.config.num_frames:
            raise ValueError(
                f"frames: got {frames.shape[1]} frames per clip, but the model takes 1 to "
                f"{self.config.num_frames} (num_frames in its config)"
            )
        return frames

    def project_video(self, query_states: torch.Tensor) -> torch.Tensor:
        """Project query states [B, Q, H] to unit-length embeddings [B, Q, E]."""
        return F.normalize(self.video_proj(query_states), dim=-1)

    def embed_videos(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings [B, Q, E] of the query tokens of videos [B, M, D], of unit length."""
        return self.project_video(self.qformer.encode_queries(video_tokens))

    def embed(self, video_tokens: torch.Tensor, text: TextTokens) -> Embedded:
        """Compute the embeddings and the caption logits of pairs, in training."""
        run = self._replayed_embed or self._embed
        return Embedded(*run(video_tokens, text.input_ids, text.attention_mask))

    def _embed(
        self, video_tokens: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        text = TextTokens(input_ids, attention_mask)
        query_states, caption_logits = self.caption_logits(video_tokens, text)
        return self.project_video(query_states), self.encode_text(text), caption_logits

    def tokenize(self, texts: Texts) -> TextTokens:
        """Return texts as tokens on the model's device. Longer texts are truncated, as published.

        Args:
            texts: N strings, or tokens [N, S], which are checked.

        Raises:
            ValueError: There are no texts, or the tokens are malformed.
        """
        tokenizer = None if isinstance(texts, TextTokens) else self._tokenizer()
        return self.checked_tokens(tokenizer, texts, self.config.vocab_size)

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
        tokens, text = self._pairs(videos, texts)
        run = self._replayed_match or self._match
        (logits,) = run(tokens, text.input_ids, text.attention_mask)
        return logits

    def _match(
        self, video_tokens: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        states = self.qformer.encode_pairs(video_tokens, input_ids, attention_mask)
        return (self.itm_head(states).mean(dim=1),)

    def fuse(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Relate each text to its video, for answering questions; see `match` for the arguments.

        Returns:
            [N, H] float: the query states that `match` scores, averaged over the queries.
        """
        tokens, text = self._pairs(videos, texts)
        return self.qformer.encode_pairs(tokens, text.input_ids, text.attention_mask).mean(dim=1)

    def unused_when_answering(self) -> tuple[str, ...]:
        """Return the beginnings of the names of parameters that answers do not depend on."""
        last = f"qformer.bert.encoder.layer.{self.config.qformer.layers - 1}"
        never = ("temperature", "video_proj.", "text_proj.", "itm_head.")
        if self.config.answering == "generation":
            # Only the states of the text leave the last layer.
            of_queries = ("crossattention.", "intermediate_query.", "output_query.")
            return (*never, *(f"{last}.{name}" for name in of_queries))
        return (
            *never,
            "qformer.caption_head.",
            # Only the states of the queries leave the last layer.
            f"{last}.intermediate.",
            f"{last}.output.",
        )

    def generated_answer_losses(
        self, tokens: torch.Tensor, questions: TextTokens, answers: torch.Tensor
    ) -> torch.Tensor:
        """Compute the loss of generated answers; see `generation.answer_losses`.

        Args:
            tokens: [N, M, D] float, visual tokens.
            questions: Ids and mask [N, S].
            answers: [N] int64, number of each answer in the vocabulary.

        Returns:
            [N] float: negative log-likelihood of each answer.
        """
        table = self._answer_table(questions).select(answers)
        return answer_losses(self.qformer, tokens, questions, table, self.config.bos_id)

    def generated_answer_logits(self, tokens: torch.Tensor, questions: TextTokens) -> torch.Tensor:
        """Compute the log-likelihood [N, K] of every answer to questions [N, S] about N clips.

        Args:
            tokens: [N, M, D] float, visual tokens, or [1, M, D] for one clip with all questions.
            questions: Ids and mask [N, S].
        """
        table = self._answer_table(questions)
        tokens = tokens.expand(len(questions), -1, -1)
        return answer_log_likelihoods(self.qformer, tokens, questions, table, self.config.bos_id)

    def _answer_table(self, questions: TextTokens) -> TextTokens:
        """Return the tokens [K, A] of all answers, on the device of the questions."""
        if self.answer_tokens is None:
            if self.answers is None:
                raise CheckpointError(
                    "this model has no answer vocabulary; set model.answers to an AnswerVocabulary"
                )
            self.answer_tokens = tokenize_answers(self._tokenizer(), self.answers)
        asked, answered = questions.input_ids.shape[1], self.answer_tokens.input_ids.shape[1]
        positions = self.config.qformer.max_position
        if asked + answered > positions:
            raise SettingError(
                f"a question of {asked} tokens and an answer of {answered} exceed the {positions} "
                "positions of the Q-Former; lower --max-text-tokens, or leave the longest answers "
                "out of the vocabulary"
            )
        self.answer_tokens = self.answer_tokens.to(questions.input_ids.device)
        return self.answer_tokens

    def _pairs(
        self, videos: VideoEncoding | torch.Tensor, texts: Texts
    ) -> tuple[torch.Tensor, TextTokens]:
        """Return the visual tokens [N, M, D] and the texts [N, S] of pairs, checked."""
        text, tokens = self.tokenize(texts), self._tokens_of(videos)
        if len(tokens) == 1:
            tokens = tokens.expand(len(text), -1, -1)
        if len(tokens) != len(text):
            raise ValueError(
                f"match: got {len(tokens)} videos and {len(text)} texts; pass one of each per pair"
            )
        return tokens, text

    def pair_scorer(self, video_tokens: torch.Tensor) -> PairScores:
        """Return a function that scores many pairs of videos [V, M, D]; see `PairScorer`."""
        from stgt.retrieval.pair_scorer import PairScorer

        return PairScorer(self, video_tokens)

    def caption(
        self,
        videos: VideoEncoding | torch.Tensor,
        *,
        num_beams: int = 3,
        max_tokens: int | None = None,
        min_tokens: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        num_captions: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Write captions for each video, by beam search or, with `top_p`, by nucleus sampling.

        Args:
            videos: V videos from `encode_video`, or their visual tokens [V, M, D] float.
            num_beams: Width of the beam search; 1 is greedy.
            max_tokens: Maximum caption length in tokens; None means the config's `max_text_tokens`.
            min_tokens: Minimum caption length in tokens.
            top_p: Sample from the smallest set of words whose total probability reaches this value,
                in (0, 1]. Sampling uses torch's global generator, which `torch.manual_seed` seeds,
                unless there are `seeds`.
            temperature: Sampling temperature.
            num_captions: Captions for each video: the best ones of the beam search, at most
                `num_beams`, or independent samples.
            seeds: V seeds for sampling. The captions of a video then depend only on its seed, and
                not on the other videos.

        Returns:
            V * num_captions captions, video by video, without special tokens.

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
        if num_captions < 1 or (top_p is None and num_captions > num_beams):
            raise ValueError(
                f"num_captions = {num_captions}: must be at least 1 and, for beam search, at most "
                f"num_beams ({num_beams})"
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
            num_captions=num_captions,
            seeds=seeds,
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

    def compile_blocks(self, cuda_graphs: bool = False) -> None:
        """Compile the repeated blocks with torch.compile; see `VideoTextModel.compile_blocks`."""
        self.frame_encoder.compile_blocks()
        self.graph.compile_blocks()
        self.qformer.compile_layers()
        # Gradient checkpointing reads the state of random numbers, which a capture does not allow.
        if cuda_graphs and not self.config.gradient_checkpointing:
            self.replays_passes = True
            embedding = (self.qformer, self.video_proj, self.text_proj)
            self._replayed_embed = ReplayedPass(self._embed, embedding)
            self._replayed_match = ReplayedPass(self._match, (self.qformer, self.itm_head))

    def count_parameters(self) -> ParameterCounts:
        """Count the parameters, including frozen ones and the fixed position table."""
        counts = super().count_parameters()
        return ParameterCounts(counts.total + self.graph.pos_2D_embed.numel(), counts.trained)

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
        return cast("STGT", load_model(folder).eval())
