"""What a worker does with errors of single clips, without Ray."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.artifacts.clip_store import QUARANTINE_SCHEMA, finished_shards, shard_name
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.common import storage
from pipelines.common.ray_errors import raise_packed
from pipelines.ingest.config import FilterConfig, IngestConfig
from pipelines.ingest.shard_rows import ShardRows
from pipelines.ingest.worker import ShardIngester, ShardWork
from pipelines.video.decoder import ClipDecoder, ClipSpan
from stgt.errors import STGTError, VideoDecodeError

CLIPS = 24
Fail = Callable[[ClipSpan], Exception | None]
Make = Callable[..., dict[str, str]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes one shard whose clips fail as told, all others because they are damaged; gives the
    reason and the message of each clip."""

    def made(fail: Fail, videos: int = CLIPS, caption: str = "a caption") -> dict[str, str]:
        def decode(self: ClipDecoder, clip: ClipSpan) -> None:
            raise fail(clip) or VideoDecodeError(clip.clip_id, "undecodable", "damaged")

        monkeypatch.setattr(ClipDecoder, "decode", decode)
        names = [f"clip{number}" for number in range(CLIPS)]
        uris = {name: f"/videos/{number % videos}.mp4" for number, name in enumerate(names)}
        captions = {name: caption if name != "clip3" else "x" for name in names}
        manifest = str(tmp_path / "manifest.parquet")
        storage.write_table(manifest, whole_videos_table(uris, captions, "test"))
        work = ShardWork(
            config=IngestConfig(
                manifest=manifest,
                output=str(tmp_path),
                filters=FilterConfig(min_caption_words=2),
            ),
            store=str(tmp_path / "store"),
            quarantine=str(tmp_path / "bad"),
            rows=ShardRows.consecutive(CLIPS, 1),
        )
        answer = ShardIngester(work, None)({"shard": np.array([0])})
        for error in answer.get("error", ()):
            raise_packed(error)
        assert finished_shards(work.store)[0]["quarantined"] == CLIPS
        bad = storage.read_table(storage.join(work.quarantine, shard_name(0)))
        assert bad.schema.names == QUARANTINE_SCHEMA.names
        return {row["clip_id"]: f"{row['reason']}: {row['message']}" for row in bad.to_pylist()}

    return made


@pytest.mark.parametrize("error", [TypeError("unexpected keyword"), KeyError("x"), OSError("odd")])
def test_whatever_is_raised_costs_the_clip_that_it_concerns(make: Make, error: Exception) -> None:
    found = make(lambda clip: error if clip.clip_id in ("clip5", "clip6") else None)
    expected = dict.fromkeys(found, "undecodable: damaged")
    for name, video in (("clip5", "/videos/5.mp4"), ("clip6", "/videos/6.mp4")):
        expected[name] = f"unreachable: {video}: {type(error).__name__}: {error}"
    expected["clip3"] = "caption_too_short: no caption has at least filters.min_caption_words words"
    assert found == expected


def test_a_full_disk_ends_the_run(make: Make) -> None:
    with pytest.raises(OSError, match="No space left"):
        make(lambda clip: OSError(errno.ENOSPC, "No space left on device"))


def test_ten_videos_in_a_row_that_cannot_be_fetched_end_the_run(make: Make) -> None:
    def fail(clip: ClipSpan) -> Exception:
        return VideoDecodeError(clip.clip_id, "unreachable", f"{clip.video_uri}: no route")

    with pytest.raises(STGTError, match=r"10 videos in a row could not be fetched .*no route"):
        make(fail)
    # Many clips of a few videos do not mean that the storage is the problem.
    reasons = [said.partition(":")[0] for said in make(fail, videos=9).values()]
    assert sorted(set(reasons)) == ["caption_too_short", "unreachable"]
