"""The retrieval benchmarks by their exact protocols: which split, what counts, how it is scored.

Sizes of splits are counted in the annotations as their authors distribute them. What a number means
is said in words with every result, since systems are only comparable under one protocol.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import get_args

from pipelines.artifacts.benchmark_names import BenchmarkName


@dataclass(frozen=True)
class Benchmark:
    """A test split and its protocol."""

    name: BenchmarkName
    title: str
    split: str
    """Which clips, in words."""
    made_from: str
    """Annotations that give this split, for messages."""
    protocol: str
    """What is searched by what, in words."""
    videos: int | None = None
    """Videos of the split; None for any number."""
    captions: int | None = None
    """Captions that are scored."""
    first_caption_only: bool = False
    """Score one caption a video where there are several."""
    ids_digest: str | None = None
    """Of the sorted names of the split's videos, by `digest_of_ids`; None where nobody may ship
    them."""
    id_pattern: str = ""
    """What a clip's name looks like."""
    max_text_tokens: int | None = None
    """Tokens of a caption, as the model was fine-tuned for it; None takes the model's."""

    def check(self, clip_ids: list[str], captions: int, where: str) -> None:
        """Check that a manifest holds the whole split and nothing else.

        Raises:
            ValueError: it does not.
        """
        for what, expected, found in (
            ("videos", self.videos, len(clip_ids)),
            ("captions", self.captions, captions),
        ):
            if expected is not None and found != expected:
                raise ValueError(
                    f"{self.name}: expected {expected:,} {what}, found {found:,} in {where}; make "
                    f"the manifest from {self.made_from}, or score it as it is: `any`"
                )
        strange = [one for one in clip_ids if not re.search(self.id_pattern, one)]
        other = self.ids_digest is not None and self.ids_digest != digest_of_ids(clip_ids)
        if strange or other:
            example = f", such as {strange[0]}" if strange else ""
            raise ValueError(
                f"{self.name}: {where} holds as many videos as the split, but other ones{example}; "
                f"make the manifest from {self.made_from}, or score it as it is: `any`"
            )


def digest_of_ids(clip_ids: list[str]) -> str:
    """A digest of a split's videos, whatever folders and endings their names have."""
    names = sorted(one.rpartition("/")[2].partition(".")[0] for one in clip_ids)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            name="msrvtt",
            title="MSR-VTT 1kA",
            split="the 1k-A test (JSFusion): 1,000 videos with one sentence each",
            made_from="MSRVTT_JSFUSION_test.csv",
            protocol="1,000 pairs; each sentence against 1,000 videos and back",
            videos=1000,
            captions=1000,
            ids_digest="49a09fb68f7ec52b",
            max_text_tokens=36,
        ),
        Benchmark(
            name="msrvtt_full",
            title="MSR-VTT full",
            split="the full test split: 2,990 videos with 20 sentences each",
            made_from="MSRVTT_data.json with --split test",
            protocol="each of 59,800 sentences against 2,990 videos; a video finds any of its own",
            videos=2990,
            captions=59_800,
            ids_digest="916e9b2dd9a45181",
            max_text_tokens=36,
        ),
        Benchmark(
            name="didemo",
            title="DiDeMo",
            split="the test split, grouped by the stem of the video's name: 1,004 videos",
            made_from="test_data.json of DiDeMo",
            protocol="paragraph to video: all descriptions of a video joined, without their times",
            videos=1004,
            captions=1004,
            ids_digest="57c0b06b28455cd3",
            max_text_tokens=55,
        ),
        Benchmark(
            name="lsmdc",
            title="LSMDC",
            split="the public test of the 2016 challenge: 1,000 clips",
            made_from="LSMDC16_challenge_1000_publictect.csv",
            protocol="1,000 pairs; each sentence against 1,000 clips and back",
            videos=1000,
            captions=1000,
            id_pattern=r"_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}",
            max_text_tokens=32,
        ),
        Benchmark(
            name="msvd",
            title="MSVD",
            split="the test split: 670 videos",
            made_from="captions_msvd.json (or raw-captions.pkl) with test_list.txt",
            protocol="each of 27,763 captions against 670 videos; a video finds any of its own",
            videos=670,
            captions=27_763,
            ids_digest="8d2c6c42af984fd0",
            max_text_tokens=32,
        ),
        Benchmark(
            name="msvd_670",
            title="MSVD 670x670",
            split="the test split: 670 videos, the first caption of each",
            made_from="captions_msvd.json (or raw-captions.pkl) with test_list.txt",
            protocol="670 pairs, an easier protocol than MSVD's own: not comparable with it",
            videos=670,
            captions=670,
            ids_digest="8d2c6c42af984fd0",
            first_caption_only=True,
            max_text_tokens=32,
        ),
        Benchmark(
            name="any",
            title="Retrieval",
            split="the clips given",
            made_from="your annotations",
            protocol="each caption against all videos; a video finds any of its captions",
        ),
    )
}

assert tuple(BENCHMARKS) == get_args(BenchmarkName)
