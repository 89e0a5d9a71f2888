"""What a registered model computes: embeddings, similarities and match probabilities.

This module travels with the model and runs without the rest of the project, without Ray, and
without MLflow. Videos are decoded and captions are truncated by the settings that the model was
registered with, which are those of its evaluation.

Legend: E shared embedding, Q query tokens, M visual tokens, D vision width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from pipelines.artifacts import checkpoints
from pipelines.video.config import SamplingConfig
from stgt.errors import CheckpointError, SettingError, STGTError
from stgt.inputs.frame_choice import choose_frames

if TYPE_CHECKING:
    import torch

    from pipelines.video.decoder import ClipDecoder
    from stgt.config import Precision

# torch and the decoder are imported where they are used: registering a version whose weights lie
# on S3 needs neither until the model is tried.

Task = Literal["auto", "embeddings", "similarities", "match"]
Device = Literal["auto", "cpu", "cuda"]
FloatArray = npt.NDArray[np.float32]

CAPTIONS_AT_A_TIME = 256
ERROR = "error"


class InferenceSettings(TypedDict):
    """How a registered model reads its inputs; the `model_config` of the MLflow model."""

    sampling: dict[str, Any]
    """Settings of `SamplingConfig` by which videos are decoded."""
    num_frames: int
    """Evenly spaced frames that are taken from those decoded."""
    max_text_tokens: int
    precision: Precision
    batch_clips: int
    batch_pairs: int
    device: Device
    """`auto` takes a GPU if there is one."""


@dataclass(frozen=True)
class InputRow:
    """One row of a request: a caption, a span of a video, or a pair of both."""

    caption: str | None = None
    video_uri: str | None = None
    start_s: float | None = None
    end_s: float | None = None

    @property
    def clip(self) -> tuple[str, float | None, float | None] | None:
        """The video and its span; None without a video."""
        return None if self.video_uri is None else (self.video_uri, self.start_s, self.end_s)


class RetrievalModel:
    """A loaded model that answers requests, one at a time."""

    def __init__(self, checkpoint: str, settings: InferenceSettings) -> None:
        """Load the weights.

        Args:
            checkpoint: Folder of a complete checkpoint, with its frozen frame encoder if it has
                one.
            settings: How inputs are read.

        Raises:
            CheckpointError: The checkpoint cannot be used.
            SettingError: A setting has a value that cannot be used.
        """
        import torch

        from stgt.precision import keep_frozen_weights_in

        self._settings = settings
        self._sampling = SamplingConfig(**settings["sampling"])
        device = settings["device"]
        if device not in get_args(Device):
            raise SettingError(f"device = {device!r}: must be one of {', '.join(get_args(Device))}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        model, self._tokenizer = checkpoints.load(checkpoint)
        if model.frame_encoder is not None and model.frame_encoder.missing:
            raise CheckpointError(
                f"{checkpoint} has no frozen frame encoder, so the model cannot encode videos; "
                "import its weights again with --vision"
            )
        keep_frozen_weights_in(settings["precision"], model)
        self._model = model.to(self._device).eval()
        self._decoder: ClipDecoder | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the decoder's child process, if a video was decoded."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def predict(self, rows: Sequence[InputRow], task: Task) -> dict[str, list[Any]]:
        """Answer a request.

        A row that cannot be answered, for example because its video cannot be decoded, has its
        reason in the column `error` and None in all others.

        Args:
            rows: Captions, videos, or pairs of both.
            task: `embeddings` gives `caption_embedding` [E] and `video_embedding` [Q, E], unit
                length; `similarities` gives `similarity`, the cosine of a caption and the best
                query token of its video; `match` also gives `match_probability`, by which an
                evaluation reranks. `auto` gives similarities if a row is a pair, else embeddings.

        Returns:
            Columns with one entry per row.

        Raises:
            SettingError: The task is unknown, or the model cannot do it.
            STGTError: The model's weights yield values that are not finite.
        """
        import torch

        if task not in get_args(Task):
            raise SettingError(f"task = {task!r}: must be one of {', '.join(get_args(Task))}")
        is_pair = [row.caption is not None and row.clip is not None for row in rows]
        if task == "auto":
            task = "similarities" if any(is_pair) else "embeddings"
        if task == "match" and not self._model.matches:
            raise SettingError(
                f"task = 'match': {self._model.config.title} does not match pairs; ask for "
                "similarities"
            )
        if task == "embeddings":
            needed = "a caption or a video_uri"
            used = [row.caption is not None or row.clip is not None for row in rows]
        else:
            needed = "both a caption and a video_uri"
            used = is_pair
        errors = [None if is_used else f"{task} need {needed}" for is_used in used]
        asked = [row for row, is_used in zip(rows, used, strict=True) if is_used]
        with self._lock, torch.inference_mode():
            found = list(self._answers(asked, task))
        answers = iter(found)
        columns: dict[str, list[Any]] = {name: [] for name in _columns_of(task)}
        for error in errors:
            answer = {ERROR: error} if error is not None else next(answers)
            for name, column in columns.items():
                column.append(answer.get(name))
        return columns

    def _answers(self, rows: Sequence[InputRow], task: Task) -> Iterator[dict[str, Any]]:
        """Yield the answer to each row; equal captions and equal clips are encoded once."""
        captions = list(dict.fromkeys(row.caption for row in rows if row.caption is not None))
        clips = list(dict.fromkeys(row.clip for row in rows if row.clip is not None))
        caption_embeds = dict(zip(captions, self._caption_embeds(captions), strict=True))
        pairs: dict[Any, list[str]] = {}
        if task == "match":
            for row in rows:
                pairs.setdefault(row.clip, []).append(str(row.caption))
        videos: dict[Any, FloatArray | str] = {}
        matches: dict[Any, float] = {}
        for batch, encoded in self._encoded(clips):
            videos.update(batch)
            if encoded is not None and task == "match":
                there = [clip for clip, found in batch.items() if not isinstance(found, str)]
                matches.update(self._matches(there, encoded, pairs))
        for row in rows:
            video = None if row.clip is None else videos[row.clip]
            text = None if row.caption is None else caption_embeds[row.caption]
            if isinstance(video, str):
                yield {ERROR: video}
            elif task == "embeddings":
                yield {
                    "caption_embedding": None if text is None else text.tolist(),
                    "video_embedding": None if video is None else video.tolist(),
                }
            else:
                assert video is not None
                assert text is not None
                yield {
                    "similarity": float((video @ text).max()),
                    "match_probability": matches.get((row.clip, row.caption)),
                }

    def _caption_embeds(self, captions: list[str]) -> Iterator[FloatArray]:
        from stgt.precision import autocast

        for start in range(0, len(captions), CAPTIONS_AT_A_TIME):
            part = captions[start : start + CAPTIONS_AT_A_TIME]
            text = self._tokenizer(part, self._settings["max_text_tokens"]).to(self._device)
            with autocast(self._settings["precision"], self._device):
                embeds = self._model.encode_text(text).float().cpu().numpy()
            _require_finite(embeds)
            yield from embeds

    def _encoded(
        self, clips: Sequence[tuple[str, float | None, float | None]]
    ) -> Iterator[tuple[dict[Any, FloatArray | str], torch.Tensor | None]]:
        """Decode and encode clips in batches.

        Yields:
            The embeddings [Q, E] of each clip, or why it cannot be decoded; and the visual tokens
            [clips, M, D] of those that can, or None if none can.
        """
        import torch

        from pipelines.video.decoder import ClipSpan
        from stgt.errors import VideoDecodeError
        from stgt.precision import autocast

        size = self._settings["batch_clips"]
        for start in range(0, len(clips), size):
            part = clips[start : start + size]
            spans = [ClipSpan(uri, uri, start_s, end_s) for uri, start_s, end_s in part]
            frames, batch = [], {}
            for clip, outcome in zip(part, self._decoding().decode_all(spans), strict=True):
                if isinstance(outcome, VideoDecodeError):
                    batch[clip] = f"{outcome.reason}: {outcome.message}"
                else:
                    batch[clip] = ""
                    frames.append(self._chosen(outcome.frames))
            if not frames:
                yield batch, None
                continue
            stacked = torch.from_numpy(np.stack(frames)).to(self._device)
            with autocast(self._settings["precision"], self._device):
                encoded = self._model.encode_video(stacked)
            embeds = iter(encoded.embeds.float().cpu().numpy())
            for clip, reason in batch.items():
                if not reason:
                    batch[clip] = next(embeds)
                    _require_finite(batch[clip])
            yield batch, encoded.tokens

    def _chosen(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the frames of a clip that the model takes."""
        count = self._settings["num_frames"]
        if len(frames) == count:
            return frames
        return frames[choose_frames(len(frames), count, "uniform")]

    def _decoding(self) -> ClipDecoder:
        from pipelines.video.decoder import ClipDecoder

        if self._decoder is None:
            self._decoder = ClipDecoder(self._sampling)
        return self._decoder

    def _matches(
        self,
        clips: Sequence[Any],
        tokens: torch.Tensor,
        captions_of: Mapping[Any, Sequence[str]],
    ) -> dict[Any, float]:
        """Return the match probability of each pair of a clip and a caption.

        Args:
            clips: V clips.
            tokens: [V, M, D] float, their visual tokens.
            captions_of: The captions that each clip is paired with.
        """
        import torch

        from stgt.precision import autocast

        pairs = list(
            dict.fromkeys(
                (place, caption)
                for place, clip in enumerate(clips)
                for caption in captions_of.get(clip, ())
            )
        )
        captions = list(dict.fromkeys(caption for _, caption in pairs))
        places = {caption: place for place, caption in enumerate(captions)}
        text = self._tokenizer(captions, self._settings["max_text_tokens"]).to(self._device)
        videos = torch.tensor([video for video, _ in pairs], device=self._device)
        texts = torch.tensor([places[caption] for _, caption in pairs], device=self._device)
        with autocast(self._settings["precision"], self._device):
            scorer = self._model.pair_scorer(tokens.float())
            logits = scorer(videos, texts, text, self._settings["batch_pairs"])
        found = logits.softmax(dim=1)[:, 1].float().cpu().numpy()
        _require_finite(found)
        return {
            (clips[video], caption): float(probability)
            for (video, caption), probability in zip(pairs, found, strict=True)
        }


def _columns_of(task: Task) -> tuple[str, ...]:
    if task == "embeddings":
        return ("caption_embedding", "video_embedding", ERROR)
    if task == "match":
        return ("similarity", "match_probability", ERROR)
    return ("similarity", ERROR)


def _require_finite(values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise STGTError(
            "the model yields values that are not finite; its weights are damaged or have "
            "diverged, so register another checkpoint"
        )
