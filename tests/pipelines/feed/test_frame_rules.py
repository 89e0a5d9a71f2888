"""Videos that are decoded on the fly, by today's rules and by those of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.feed.sources import ManifestSource
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest

SIZE = 32


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "first"), [(1, 75), (2, 0)])
def test_a_manifest_is_decoded_by_the_given_rules(
    rules: int, first: int, cases_dir: Path, tmp_path: Path
) -> None:
    """The video begins 3 s after the file; earlier versions counted times from its first frame."""
    video = cases_dir / "16_video_starts_late" / "late.mp4"
    row = {"video": str(video), "caption": "x", "start_s": 3, "end_s": 5}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    manifest = str(tmp_path / "a.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "a.jsonl"),),
            videos=(str(cases_dir),),
            output=manifest,
            format="generic",
        )
    )
    source = ManifestSource(manifest, SIZE, "squash", rules)  # type: ignore[arg-type]
    try:
        frames = source.frames(source.clip(0, 0), 1, "uniform", np.random.default_rng(0))
    finally:
        source.close()
    with av.open(str(video)) as container:
        shown = [
            frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()
            for frame in container.decode(video=0)
        ]
    assert np.array_equal(frames[0], shown[first])
    assert not np.array_equal(shown[0], shown[75])
