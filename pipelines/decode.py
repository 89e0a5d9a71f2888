"""Exact frames of one clip, decoded in a child process that can be killed.

Decoders hang, crash and eat memory on real files. Each decoding worker therefore keeps one child
process (a `pebble` pool of one): a clip that outlives its deadline or kills the child is given up
with a reason, and the next clip finds a new child.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import TimeoutError as DeadlineExceeded
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import numpy.typing as npt
from pebble import ProcessExpired, ProcessPool

from pipelines import storage
from pipelines.config import IngestConfig, SamplingConfig
from pipelines.decode_child import Decoded, DecodeRequest, Failure, decode_file, limit_memory
from stgt.errors import VideoDecodeError

REASONS = {
    "missing": "there is no file",
    "empty": "the file has no bytes",
    "not_a_video": "no demuxer opens the file",
    "no_video_stream": "the file has no video stream",
    "undecodable": "no frame can be decoded",
    "empty_span": "no frame lies between the clip's start and end",
    "too_large": "frames have more pixels than allowed",
    "out_of_memory": "decoding needs more memory than allowed",
    "timeout": "decoding took longer than the deadline",
    "crashed": "the decoder process died",
    "unreachable": "the file could not be fetched",
}


def read_clip(path: str | Path, num_frames: int, size: int) -> npt.NDArray[np.uint8]:
    """Evenly spaced frames of one video file, for a notebook; data sets go through `jobs.ingest`.

    Args:
        path: the video, local or s3://.
        num_frames: F.
        size: edge of a frame in pixels; the aspect ratio is not kept, as in the published
            evaluation.

    Returns:
        [F, size, size, 3] uint8.

    Raises:
        VideoDecodeError: the file gives no frames; it says why.
    """
    sampling = SamplingConfig(num_frames=num_frames, size=size)
    with ClipDecoder(
        sampling, IngestConfig.deadline_s, IngestConfig.max_pixels, IngestConfig.memory_limit_bytes
    ) as decoder:
        return decoder.decode(str(path), str(path), None, None).frames


class ClipDecoder:
    """Decodes clips one after another; to be closed after use."""

    def __init__(
        self,
        sampling: SamplingConfig,
        deadline_s: float,
        max_pixels: int,
        memory_limit_bytes: int,
    ) -> None:
        self._sampling = sampling
        self._deadline_s = deadline_s
        self._max_pixels = max_pixels
        self._memory_limit_bytes = memory_limit_bytes
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        # spawn: a fork of a process with threads and an open Ray connection is not safe.
        return ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=limit_memory,
            initargs=(self._memory_limit_bytes,),
        )

    def __enter__(self) -> ClipDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        self._pool.stop()
        self._pool.join()

    def decode(
        self, clip_id: str, video_uri: str, start_s: float | None, end_s: float | None
    ) -> Decoded:
        """The frames of a clip.

        Raises:
            VideoDecodeError: with one of REASONS.
        """
        if storage.is_local(video_uri):
            return self._decode_local(clip_id, storage.resolve(video_uri), start_s, end_s)
        with TemporaryDirectory() as folder:
            local = Path(folder) / storage.name_of(video_uri)
            try:
                local.write_bytes(storage.read_bytes(video_uri))
            except FileNotFoundError as error:
                raise VideoDecodeError(clip_id, "missing", f"no object {video_uri}") from error
            except OSError as error:
                raise VideoDecodeError(clip_id, "unreachable", f"{video_uri}: {error}") from error
            return self._decode_local(clip_id, str(local), start_s, end_s)

    def _decode_local(
        self, clip_id: str, path: str, start_s: float | None, end_s: float | None
    ) -> Decoded:
        sampling = self._sampling
        request = DecodeRequest(
            path=path,
            start_s=start_s,
            end_s=end_s,
            num_frames=sampling.num_frames,
            frame_choice=sampling.frame_choice,  # type: ignore[arg-type]
            size=sampling.size,
            resize=sampling.resize,
            decoder=sampling.decoder,
            max_pixels=self._max_pixels,
        )
        future = self._pool.schedule(decode_file, args=[request], timeout=self._deadline_s)
        try:
            outcome = future.result()
        except DeadlineExceeded as error:
            message = f"gave up after {self._deadline_s:g} s"
            raise VideoDecodeError(clip_id, "timeout", message) from error
        except ProcessExpired as error:
            message = f"the decoder died with code {error.exitcode}"
            raise VideoDecodeError(clip_id, "crashed", message) from error
        except MemoryError as error:
            message = "decoding needs more memory than is allowed"
            raise VideoDecodeError(clip_id, "out_of_memory", message) from error
        if isinstance(outcome, Failure):
            raise VideoDecodeError(clip_id, outcome.reason, outcome.message)
        return outcome
