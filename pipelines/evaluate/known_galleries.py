"""Recognizes the test splits in circulation by their video names and numbers of captions.

The same benchmark is scored on different galleries: results on MSR-VTT, for example, are published
for 1,000, 2,990, 884 and 879 videos. A gallery gets the name of a split only if its videos are
those of the split, as far as the split's names are known.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.artifacts.benchmark_names import BenchmarkName

VIDEO_ENDINGS = re.compile(
    r"\.(mp4|m4v|mov|qt|avi|divx|mkv|webm|mpg|mpeg|wmv|asf|flv|3gp|3g2|mts|m2ts|ts|null|)$",
    re.IGNORECASE,
)
MSRVTT_NAME = re.compile(r"video(\d+)")
MSRVTT_TEST = range(7010, 10_000)
"""Numbers of the videos of MSR-VTT's full test split."""
IN_1K_A = int.from_bytes(
    base64.b64decode(
        "AMwPAwAATAAAAAAA8D8Asv3/f9//AwDAv/43/g8AAAAAAAAAAAAAAAi8/////wEAAAA/A2AUDABYDxAAAhwB"
        "AEAA8E/1//8v/z0AeQJAAIAAAAjAfShLEABeD0jiD3pGtP8/AAC0/z+OEAAAAAABFfgvAAACA8D/3QMAAABf"
        "kQIAxMAI/j+AAAAw9M8AAAAAACAAAAAAAAAAwP///w8AAAD8//////4PAAAAAEAAAEAkAcA/y3r9/9v/AwIB"
        "AAAAAAQADAEAgBwAFQUAAP/8////AQBAgCAACGAEABRsf/1+//9/LwAC/A8gACD+////94EMAAAYAwAgAP//"
        "/z8AACAAAAAAAAAoAAIAAAAAAAAAwP8A/P////8DAAgAAPwPwP////8/QAAAAECeQAMEAAAHAUABgAAg/P8F"
        "sZIMAADwDwhAqgC0ACAggAAA6P//AwAAQDLQUAIA/1+02v////8/AAAA4DAJAAgMIAAAAAAIgCAAAAA="
    ),
    "little",
)
"""One bit for each of `MSRVTT_TEST`, which is set for the videos of the 1k-A split."""
DIGEST_1K_A = "49a09fb68f7ec52b"
DIGEST_1K_B = "a0ad82bd7f2c45e3"
DIGEST_MSRVTT_FULL = "916e9b2dd9a45181"
DIGEST_DIDEMO = "57c0b06b28455cd3"
DIGEST_DIDEMO_FILES = "42d3325dd1462680"
"""Digest of DiDeMo's 1,037 file names, of which 33 differ from another only in the extension."""
DIGEST_MSVD = "8d2c6c42af984fd0"
LSMDC_CLIP = r"_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}"


@dataclass(frozen=True)
class KnownGallery:
    """What a gallery was recognized as."""

    name: str
    """Name of the protocol, such as `MSR-VTT 1k-A`."""
    description: str
    """What it contains, and how its results relate to those of the benchmark."""
    benchmark: BenchmarkName | None = None
    """The benchmark whose name its results may carry; None if they may carry none."""

    def __str__(self) -> str:
        return f"{self.name} ({self.description})"


def base_name(clip_id: str) -> str:
    """Return the name of a clip without folders and without the ending of a video file.

    Dots within the name are kept, because ids of LSMDC's clips contain them.
    """
    return VIDEO_ENDINGS.sub("", clip_id.rpartition("/")[2])


def digest_of_ids(clip_ids: Sequence[str]) -> str:
    """Return a digest of a split's video names, ignoring their order, folders and extensions."""
    return _digest([_stem(one) for one in clip_ids])


def _stem(clip_id: str) -> str:
    return clip_id.rpartition("/")[2].partition(".")[0]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def recognize(clip_ids: Sequence[str], captions: int) -> KnownGallery | None:
    """Return the split in circulation that a gallery is; None if it is none of them.

    Args:
        clip_ids: V different ids of videos, with or without folders and file extensions.
        captions: Number of texts N that the videos are searched with.
    """
    for find in (_msrvtt, _didemo, _msvd, _lsmdc):
        found = find(clip_ids, captions)
        if found is not None:
            return found
    return None


def _msrvtt(clip_ids: Sequence[str], captions: int) -> KnownGallery | None:
    matches = [MSRVTT_NAME.fullmatch(base_name(one)) for one in clip_ids]
    numbers = {int(one[1]) for one in matches if one is not None}
    videos = len(clip_ids)
    if len(numbers) != videos:
        return None
    digest = digest_of_ids(clip_ids)
    pairs = captions == videos
    if digest == DIGEST_1K_B and pairs:
        return KnownGallery(
            "MSR-VTT 1k-B",
            "1,000 videos of all splits with one sentence each, of which 296 are in 1k-A; not "
            "comparable with 1k-A",
        )
    if not numbers <= set(MSRVTT_TEST):
        return None
    in_1k_a = sum(IN_1K_A >> (number - MSRVTT_TEST.start) & 1 for number in numbers)
    if digest == DIGEST_1K_A and pairs:
        return KnownGallery("MSR-VTT 1k-A", "1,000 videos with one sentence each", "msrvtt")
    if digest == DIGEST_MSRVTT_FULL and captions == 20 * videos:
        return KnownGallery(
            "MSR-VTT full", "2,990 videos with 20 sentences each", benchmark="msrvtt_full"
        )
    if (videos, in_1k_a, pairs) == (884, 884, True):
        return KnownGallery(
            "MSR-VTT 884",
            "as many of the 1k-A pairs as have audio; which ones is not published with the "
            "benchmark, so only their number and that they are in 1k-A were checked; not "
            "comparable with 1k-A",
        )
    if (videos, pairs) == (879, True):
        return KnownGallery(
            "MSR-VTT 879",
            "as many pairs as the MSR-VTT part of a multimodal benchmark has; only their number "
            f"and that they are test videos were checked, {in_1k_a} of which are in 1k-A; not "
            "comparable with 1k-A",
        )
    known = {DIGEST_1K_A: "1k-A", DIGEST_MSRVTT_FULL: "full test split"}
    if digest in known:
        return KnownGallery(
            f"the videos of MSR-VTT {known[digest]}",
            f"with {captions:,} captions instead of those of the protocol; not comparable with it",
        )
    part = "1k-A" if in_1k_a == videos else "full test split"
    return KnownGallery(
        f"a part of MSR-VTT {part}",
        f"{videos:,} videos and {captions:,} captions; not comparable with published results",
    )


def _didemo(clip_ids: Sequence[str], captions: int) -> KnownGallery | None:
    stems = {_stem(one) for one in clip_ids}
    if _digest(list(stems)) != DIGEST_DIDEMO:
        return None
    paragraphs = captions == len(clip_ids)
    if len(clip_ids) == len(stems) and paragraphs:
        return KnownGallery(
            "DiDeMo grouped by stem", "1,004 videos with one paragraph each", "didemo"
        )
    by_file = _digest([one.rpartition("/")[2] for one in clip_ids]) == DIGEST_DIDEMO_FILES
    if by_file and paragraphs:
        return KnownGallery(
            "DiDeMo grouped by file name",
            "1,037 names of 1,004 videos: 33 are in the gallery twice, and their paragraphs are "
            "divided; not comparable with the 1,004 videos",
        )
    return KnownGallery(
        "the videos of DiDeMo's test split",
        f"as {len(clip_ids):,} entries with {captions:,} captions, instead of one paragraph for "
        "each of 1,004 videos; not comparable with paragraph-to-video retrieval",
    )


def _msvd(clip_ids: Sequence[str], captions: int) -> KnownGallery | None:
    if digest_of_ids(clip_ids) != DIGEST_MSVD:
        return None
    if captions == 27_763:
        return KnownGallery("MSVD per caption", "27,763 captions, 670 videos", benchmark="msvd")
    if captions == len(clip_ids):
        return KnownGallery(
            "MSVD pooled",
            "one text for each of 670 videos: all captions of a video pooled into one, or one of "
            "them chosen; easier than MSVD per caption and not comparable with it",
            "msvd_670",
        )
    return KnownGallery(
        "the videos of MSVD's test split",
        f"with {captions:,} captions instead of 27,763; not comparable with MSVD per caption",
    )


def _lsmdc(clip_ids: Sequence[str], captions: int) -> KnownGallery | None:
    is_lsmdc = all(re.search(LSMDC_CLIP, one) for one in clip_ids)
    if not is_lsmdc or (len(clip_ids), captions) != (1000, 1000):
        return None
    return KnownGallery(
        "LSMDC public test",
        "1,000 clips with one sentence each; their names may not be redistributed, so only their "
        "form was checked",
        "lsmdc",
    )
