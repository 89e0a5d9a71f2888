"""The report of an ingest as a self-contained HTML page and as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from pipelines.artifacts.clip_store import read_sampling, shard_name, shard_uri
from pipelines.common import storage
from pipelines.common.pages import render_page
from pipelines.common.progress import duration
from pipelines.common.recording import Recording
from pipelines.common.tracking import Run
from pipelines.ingest import filters, histograms
from pipelines.ingest.plan import Generation
from pipelines.video import decoder, frame_codec
from pipelines.video.config import SamplingConfig
from stgt.inputs.frame_choice import choose_frames

SHEET_CLIPS = 24
SHEET_FRAMES = 4
SHEET_EDGE = 112
"""Edge length of a frame on the contact sheet, in pixels."""
SHEET_QUALITY = 80
FILES = ("report.json", "report.html")
BAD_EXAMPLES = 4
"""Number of clips shown for each reason."""


@dataclass(frozen=True)
class RunFigures:
    """Facts about the run, as opposed to the store."""

    seconds: float
    clips: int
    """Number of clips decoded in this run, not counting earlier runs of the same ingest."""
    clips_per_s: float | None
    workers: int
    manifest_clips: int
    """Number of clips in the whole manifest, even if `limit` selects only some of them."""


def _earlier_figures(store: str, figures: RunFigures) -> RunFigures:
    """Return the figures of the existing report if this run decoded nothing."""
    uri = storage.join(store, "report.json")
    if figures.clips_per_s is None and storage.exists(uri):
        earlier = RunFigures(**storage.read_json(uri)["run"])
        return replace(earlier, manifest_clips=figures.manifest_clips)
    return figures


def write_report(
    store: str,
    quarantine: str,
    catalogue: dict[str, Any],
    generations: Sequence[Generation],
    figures: RunFigures,
) -> None:
    """Write report.html and report.json to the store's folder."""
    figures = _earlier_figures(store, figures)
    values = _values(catalogue, generations, figures)
    text = json.dumps(values, indent=2) + "\n"
    page = _page(store, quarantine, catalogue, values)
    for name, data in zip(FILES, (text.encode(), page.encode()), strict=True):
        storage.write_bytes(storage.join(store, name), data)


def deliver_report(store: str, recording: Recording) -> None:
    """Send the report in a store's folder to MLflow, with its most important figures."""

    def metrics(run: Run) -> None:
        values = storage.read_json(storage.join(store, FILES[0]))
        found = {
            "clips": values["clips"],
            "quarantined": values["quarantined"],
            "salvaged": values["salvaged"],
            "data/bad_fraction": values["bad_fraction"],
            "store_bytes": values["bytes"],
        }
        if values["run"]["clips_per_s"] is not None:
            found["clips_per_s"] = values["run"]["clips_per_s"]
        run.log_metrics({name: float(value) for name, value in found.items()})

    def files(run: Run) -> None:
        for name in FILES:
            run.log_file(name, storage.read_bytes(storage.join(store, name)))

    recording.deliver(metrics)
    recording.deliver(files, "files")


def _values(
    catalogue: dict[str, Any], generations: Sequence[Generation], figures: RunFigures
) -> dict[str, Any]:
    total = catalogue["clips"] + catalogue["quarantined"]
    share = figures.manifest_clips / max(1, total)
    rate = figures.clips_per_s
    return {
        **{name: catalogue[name] for name in ("clips", "quarantined", "bad", "salvaged", "bytes")},
        "total": total,
        "bad_fraction": catalogue["bad"] / max(1, total),
        "bytes_per_clip": catalogue["bytes"] / max(1, catalogue["clips"]),
        "reasons": catalogue["reasons"],
        "histograms": {
            name: histograms.labelled(name, counts)
            for name, counts in catalogue["histograms"].items()
        },
        "sampling": catalogue["sampling"],
        "run": asdict(figures),
        "changes": [
            {
                **{name: one[name] for name in ("clips", "added", "removed", "moved", "changed")},
                "shards_added": one["shards"] - before["shards"],
                "shards_rewritten": len(one["revised"]),
            }
            for before, one in pairwise(generations)
        ],
        "whole_manifest": {
            "clips": figures.manifest_clips,
            "bytes": round(catalogue["bytes"] * share),
            "seconds": None if rate is None else figures.manifest_clips / rate,
        },
    }


def _page(store: str, quarantine: str, catalogue: dict[str, Any], values: dict[str, Any]) -> str:
    reasons = {**decoder.REASONS, **filters.REASONS}
    return render_page(
        "pipelines.ingest",
        {
            "store": store,
            "quarantine": quarantine,
            "values": values,
            "titles": histograms.TITLES,
            "reasons": [
                {
                    "name": name,
                    "count": count,
                    "meaning": reasons[name],
                    "left_out": name in filters.REASONS,
                    "examples": examples,
                }
                for name, count, examples in _bad_examples(quarantine, catalogue)
            ],
            "sheet": list(_contact_sheet(store, catalogue)),
            "edge": SHEET_EDGE,
            "frames": SHEET_FRAMES,
        },
        filters={"number": _number, "size": _size, "duration": duration},
    )


def _number(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1 else f"{value:,.2f}"


def _size(value: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError


def _bad_examples(
    quarantine: str, catalogue: dict[str, Any]
) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Yield each reason with its count and a few clips, most frequent first.

    Reads no more shards than needed.
    """
    wanted = dict.fromkeys(catalogue["reasons"], BAD_EXAMPLES)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    for record in catalogue["shards"]:
        if not any(record["reasons"].get(name) and left for name, left in wanted.items()):
            continue
        name = shard_name(record["shard"], record["revision"])
        for row in storage.read_table(storage.join(quarantine, name)).to_pylist():
            if wanted[row["reason"]]:
                wanted[row["reason"]] -= 1
                found[row["reason"]].append(row)
        if not any(wanted.values()):
            break
    for name, count in sorted(catalogue["reasons"].items(), key=lambda one: (-one[1], one[0])):
        yield name, count, found[name]


def _contact_sheet(store: str, catalogue: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield randomly drawn clips with captions, facts and an image.

    The same store always gives the same clips.
    """
    sizes = np.array([record["clips"] for record in catalogue["shards"]])
    count = min(SHEET_CLIPS, int(sizes.sum()))
    drawn = np.random.default_rng(0).choice(int(sizes.sum()), count, replace=False)
    ends = np.cumsum(sizes)
    shard_of = np.searchsorted(ends, drawn, side="right")
    sampling = read_sampling(catalogue["sampling"])
    facts = ["width", "height", "fps", "duration_s", "salvaged"]
    columns = ["clip_id", "captions", "extras", "frames", *facts]
    for shard in np.unique(shard_of):
        uri = shard_uri(store, int(shard), catalogue["shards"][shard]["revision"])
        rows = drawn[shard_of == shard] - (ends[shard] - sizes[shard])
        for clip in storage.read_rows(uri, rows.tolist(), columns):
            questions = json.loads(clip["extras"] or "{}").get("questions") or [{}]
            shown = {"question": questions[0].get("question", ""), "frames": None}
            yield {**clip, "picture": _strip(clip["frames"], sampling), **shown}


def _strip(coded: list[bytes], sampling: SamplingConfig) -> str:
    """Return some frames of a clip side by side as a base64-encoded JPEG."""
    count = min(SHEET_FRAMES, len(coded))
    chosen = choose_frames(len(coded), count, "middle")
    strip = Image.new("RGB", (count * SHEET_EDGE, SHEET_EDGE))
    frames = frame_codec.decode_frames([coded[i] for i in chosen], sampling.codec, sampling.size)
    for place, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((SHEET_EDGE, SHEET_EDGE))
        strip.paste(image, (place * SHEET_EDGE, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=SHEET_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
