"""The retrieval benchmarks and their exact protocols: the test split and how it is scored.

Split sizes were counted in the annotations that the authors distribute. Every result includes a
description of its protocol, because systems are only comparable under the same protocol.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from pipelines.artifacts.benchmark_names import BenchmarkName
from pipelines.artifacts.published_counts import PUBLISHED_COUNTS
from pipelines.evaluate.known_galleries import (
    DIGEST_1K_A,
    DIGEST_DIDEMO,
    DIGEST_MSRVTT_FULL,
    DIGEST_MSVD,
    LSMDC_CLIP,
    KnownGallery,
    digest_of_ids,
    recognize,
)
from stgt.errors import SettingError


@dataclass(frozen=True)
class Benchmark:
    """A test split and its protocol."""

    name: BenchmarkName
    title: str
    split: str
    """Description of the split."""
    made_from: str
    """Annotation files that contain this split, for error messages."""
    protocol: str
    """Description of queries, gallery and correct answers."""
    videos: int | None = None
    """Number of videos in the split. None allows any number."""
    captions: int | None = None
    """Number of captions that are scored. None allows any number."""
    first_caption_only: bool = False
    """Whether only the first caption of each video is scored."""
    ids_digest: str | None = None
    """Digest of the split's video names, from `digest_of_ids`. None if the names may not be
    redistributed."""
    id_pattern: str = ""
    """Regular expression that every clip id must match."""
    max_text_tokens: int | None = None
    """Maximum tokens per caption, as used for fine-tuning on this benchmark. None uses the model's
    value."""

    def check(self, clip_ids: list[str], captions: int, where: str) -> None:
        """Check that a manifest holds the whole split and nothing else.

        Raises:
            SettingError: Videos are missing, unexpected or too many, or the captions do not match.
        """
        for what, expected, found in (
            ("videos", self.videos, len(clip_ids)),
            ("captions", self.captions, captions),
        ):
            if expected is not None and found != expected:
                raise SettingError(
                    f"{self.name}: expected {expected:,} {what}, found {found:,} in {where}"
                    f"{_as_what(recognize(clip_ids, captions))}; make the manifest from "
                    f"{self.made_from}, or use the benchmark `any`"
                )
        strange = [one for one in clip_ids if not re.search(self.id_pattern, one)]
        other = self.ids_digest is not None and self.ids_digest != digest_of_ids(clip_ids)
        if strange or other:
            example = f", such as {strange[0]}" if strange else ""
            raise SettingError(
                f"{self.name}: {where} has the right number of videos, but not those of the split"
                f"{example}{_as_what(recognize(clip_ids, captions))}; make the manifest from "
                f"{self.made_from}, or use the benchmark `any`"
            )


def _as_what(known: KnownGallery | None) -> str:
    """Return what a gallery is instead of the benchmark's, for an error message."""
    if known is None:
        return ""
    other = "" if known.benchmark is None else f", the benchmark `{known.benchmark}`"
    return f", which is {known}{other}"


BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            name="msrvtt",
            title="MSR-VTT 1kA",
            split="the 1k-A test split (JSFusion): 1,000 videos with one sentence each",
            made_from="MSRVTT_JSFUSION_test.csv",
            protocol="1,000 pairs of a sentence and a video, in both directions",
            videos=PUBLISHED_COUNTS["msrvtt_1ka"].clips,
            captions=PUBLISHED_COUNTS["msrvtt_1ka"].captions,
            ids_digest=DIGEST_1K_A,
            max_text_tokens=36,
        ),
        Benchmark(
            name="msrvtt_full",
            title="MSR-VTT full",
            split="the full test split: 2,990 videos with 20 sentences each",
            made_from="MSRVTT_data.json with --split test",
            protocol="59,800 sentences against 2,990 videos; for a video, any of its own sentences "
            "is correct",
            videos=PUBLISHED_COUNTS["msrvtt_full_test"].clips,
            captions=PUBLISHED_COUNTS["msrvtt_full_test"].captions,
            ids_digest=DIGEST_MSRVTT_FULL,
            max_text_tokens=36,
        ),
        Benchmark(
            name="didemo",
            title="DiDeMo",
            split="the test split, grouped by video name without extension: 1,004 videos",
            made_from="test_data.json of DiDeMo",
            protocol="paragraph to video: all descriptions of a video joined, without timestamps",
            videos=PUBLISHED_COUNTS["didemo_test"].clips,
            captions=PUBLISHED_COUNTS["didemo_test"].captions,
            ids_digest=DIGEST_DIDEMO,
            max_text_tokens=55,
        ),
        Benchmark(
            name="lsmdc",
            title="LSMDC",
            split="the public test of the 2016 challenge: 1,000 clips",
            made_from="LSMDC16_challenge_1000_publictect.csv",
            protocol="1,000 pairs of a sentence and a clip, in both directions",
            videos=PUBLISHED_COUNTS["lsmdc_test"].clips,
            captions=PUBLISHED_COUNTS["lsmdc_test"].captions,
            id_pattern=LSMDC_CLIP,
            max_text_tokens=32,
        ),
        Benchmark(
            name="msvd",
            title="MSVD",
            split="the test split: 670 videos",
            made_from="captions_msvd.json (or raw-captions.pkl) with test_list.txt",
            protocol="27,763 captions against 670 videos; for a video, any of its own captions is "
            "correct",
            videos=PUBLISHED_COUNTS["msvd_test"].clips,
            captions=PUBLISHED_COUNTS["msvd_test"].captions,
            ids_digest=DIGEST_MSVD,
            max_text_tokens=32,
        ),
        Benchmark(
            name="msvd_670",
            title="MSVD 670x670",
            split="the test split: 670 videos, the first caption of each",
            made_from="captions_msvd.json (or raw-captions.pkl) with test_list.txt",
            protocol="670 pairs; easier than MSVD's own protocol and not comparable with it",
            videos=PUBLISHED_COUNTS["msvd_test"].clips,
            captions=PUBLISHED_COUNTS["msvd_test"].clips,
            ids_digest=DIGEST_MSVD,
            first_caption_only=True,
            max_text_tokens=32,
        ),
        Benchmark(
            name="any",
            title="Retrieval",
            split="all clips of the given data",
            made_from="your annotations",
            protocol="each caption against all videos; for a video, any of its own captions is "
            "correct",
        ),
    )
}

assert tuple(BENCHMARKS) == get_args(BenchmarkName)
