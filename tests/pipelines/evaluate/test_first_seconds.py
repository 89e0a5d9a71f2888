"""Galleries of the first seconds of every video, as some published results use for DiDeMo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import open_gallery
from pipelines.evaluate.inputs import EvaluationInputs
from pipelines.evaluate.protocol import protocol_of
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from stgt.config import stgt_g

MODEL = stgt_g()


def didemo(folder: Path, **changes: Any) -> str:
    """A manifest of three DiDeMo videos."""
    folder.mkdir(exist_ok=True)
    names = [f"{number}@N00_{number}_abc.mp4" for number in range(3)]
    for name in names:
        (folder / name).touch()
    annotations = folder / "test_data.json"
    annotations.write_text(
        json.dumps([{"video": name, "description": f"clip {name}"} for name in names])
    )
    output = str(folder / "manifest.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(annotations),),
            videos=(str(folder),),
            output=output,
            format="didemo",
            **changes,
        )
    )
    return output


def frames_of(manifest: str) -> str:
    """What the protocol says of the frames."""
    config = EvaluateConfig(data=manifest, checkpoint="c", output="o", max_text_tokens=32)
    gallery = open_gallery(config, BENCHMARKS["any"])
    inputs = EvaluationInputs(config, BENCHMARKS["any"], gallery, MODEL)
    return protocol_of(inputs, gallery, {})["frames"]


def test_didemo_can_be_cut_to_30_seconds_and_the_protocol_says_so(tmp_path: Path) -> None:
    whole, cut = didemo(tmp_path / "whole"), didemo(tmp_path / "cut", first_s=30)
    rows = pq.read_table(cut)
    assert rows["end_s"].to_pylist() == [30.0] * 3
    assert rows["start_s"].to_pylist() == [None] * 3
    assert rows["clip_id"].equals(pq.read_table(whole)["clip_id"])
    assert pq.read_table(whole)["end_s"].null_count == 3
    assert frames_of(cut).startswith("8, evenly spaced over the first 30 s of the video, 224")
    assert frames_of(whole).startswith("8, evenly spaced over the video, 224")


def test_spans_are_cut_from_their_start_and_never_extended(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").touch()
    table = tmp_path / "table.jsonl"
    records = []
    for name, (start, end) in {
        "whole": (None, None),
        "late": (100, None),
        "long": (100, 200),
        "short": (100, 110),
    }.items():
        record = {"video": "v.mp4", "caption": "a clip", "clip_id": name}
        records.append(record | {"start_s": start, "end_s": end})
    table.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    output = str(tmp_path / "manifest.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(table),),
            videos=(str(tmp_path),),
            output=output,
            format="generic",
            first_s=30,
        )
    )
    found = {row["clip_id"]: row["end_s"] for row in pq.read_table(output).to_pylist()}
    assert found == {"whole": 30, "late": 130, "long": 130, "short": 110}
    assert frames_of(output).startswith("8, evenly spaced over the video, 224")  # they differ


def test_a_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"first_s = 0: must be positive"):
        ManifestConfig(annotations=("a",), videos=("v",), output="o", first_s=0)
