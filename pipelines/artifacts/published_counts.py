"""Published sizes of the splits of data sets, by which annotations are recognized as complete.

"Counted" means counted in the authors' file or in a copy of it. All other numbers are as published
and could not be counted for this table; `origin` says so. WebVid is published in rounded numbers
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.artifacts.answer_benchmarks import ANSWER_BENCHMARKS

PublishedSplit = Literal[
    "webvid_2m_train",
    "webvid_10m_train",
    "webvid_val",
    "vidal_10m",
    "msrvtt_9k",
    "msrvtt_7k",
    "msrvtt_1ka",
    "msrvtt_full_train",
    "msrvtt_full_val",
    "msrvtt_full_test",
    "didemo_train",
    "didemo_val",
    "didemo_test",
    "lsmdc_train",
    "lsmdc_val",
    "lsmdc_test",
    "msvd_train",
    "msvd_val",
    "msvd_test",
    "msrvtt_qa_train",
    "msrvtt_qa_val",
    "msrvtt_qa_test",
    "msvd_qa_train",
    "msvd_qa_val",
    "msvd_qa_test",
]


@dataclass(frozen=True, kw_only=True)
class PublishedCounts:
    """Size of a split. None stands for a number that is not published."""

    name: PublishedSplit
    title: str
    origin: str
    """Where the numbers come from."""
    clips: int | None = None
    """Number of clips, which is that of videos except in LSMDC, whose videos are films."""
    captions: int | None = None
    questions: int | None = None
    rows: int | None = None
    """Number of rows of the annotations, whether usable or not. For annotations with a caption per
    row, that is the number of captions, including those that are empty."""
    clips_of_lists: int | None = None
    """Another number of clips in circulation, that of the lists which most systems train with."""
    rounded_to: int = 1
    """Unit of the published numbers."""


PUBLISHED_COUNTS: dict[PublishedSplit, PublishedCounts] = {
    one.name: one
    for one in (
        PublishedCounts(
            name="webvid_2m_train",
            title="WebVid-2M, training split",
            # README of m-bain/webvid.
            origin="published as 2.5 million; not counted, since it is no longer distributed",
            rows=2_500_000,
            rounded_to=100_000,
        ),
        PublishedCounts(
            name="webvid_10m_train",
            title="WebVid-10M, training split",
            # Page `webvid` of the TensorFlow Datasets catalog, which quotes the authors' page.
            origin="published as 10.7 million; not counted, since it is no longer distributed",
            rows=10_700_000,
            rounded_to=100_000,
        ),
        PublishedCounts(
            name="webvid_val",
            title="WebVid, validation split of both sizes",
            # Card of jxie/webvid_10m on the Hugging Face Hub, which lists 4,999 rows.
            origin="published as 5,000; a copy on the Hugging Face Hub lists 4,999",
            rows=5_000,
            rounded_to=100,
        ),
        PublishedCounts(
            name="vidal_10m",
            title="VIDAL-10M",
            # Name of the annotation file: id2title_folder_raw_ofa_mplug_gpt_sound10076613.json.
            origin="the number in the name of the published file; not counted",
            rows=10_076_613,
        ),
        PublishedCounts(
            name="msrvtt_9k",
            title="MSR-VTT, training split of 1k-A",
            # MSRVTT_train.9k.csv; 20 sentences per video in MSRVTT_data.json.
            origin="videos counted in MSRVTT_train.9k.csv, 20 sentences each",
            clips=9_000,
            captions=180_000,
        ),
        PublishedCounts(
            name="msrvtt_7k",
            title="MSR-VTT, training split of 7k",
            # MSRVTT_train.7k.csv.
            origin="videos counted in MSRVTT_train.7k.csv, 20 sentences each",
            clips=7_010,
            captions=140_200,
        ),
        PublishedCounts(
            name="msrvtt_1ka",
            title="MSR-VTT, test split 1k-A",
            # MSRVTT_JSFUSION_test.csv.
            origin="counted in MSRVTT_JSFUSION_test.csv",
            clips=1_000,
            captions=1_000,
        ),
        PublishedCounts(
            name="msrvtt_full_train",
            title="MSR-VTT, full training split",
            # Lists of CLIP4Clip; those of albanie/collaborative-experts have the same sizes.
            origin="videos counted in MSRVTT_train.full.csv, 20 sentences each",
            clips=6_513,
            captions=130_260,
        ),
        PublishedCounts(
            name="msrvtt_full_val",
            title="MSR-VTT, full validation split",
            origin="videos counted in MSRVTT_val.full.csv, 20 sentences each",
            clips=497,
            captions=9_940,
        ),
        PublishedCounts(
            name="msrvtt_full_test",
            title="MSR-VTT, full test split",
            origin="videos counted in MSRVTT_test.full.csv, 20 sentences each",
            clips=2_990,
            captions=59_800,
        ),
        PublishedCounts(
            name="didemo_train",
            title="DiDeMo, training split",
            # The paper lists 8,395 videos; train_list.txt of albanie/collaborative-experts, which
            # most systems use, lacks three of them. train_data.json was not available.
            origin="8,395 videos in the paper and 8,392 in train_list.txt; train_data.json was not "
            "counted",
            clips=8_395,
            clips_of_lists=8_392,
        ),
        PublishedCounts(
            name="didemo_val",
            title="DiDeMo, validation split",
            # LisaAnne/LocalizingMoments; names that differ only in the extension are one video.
            origin="counted in val_data.json",
            clips=1_065,
            captions=1_065,
        ),
        PublishedCounts(
            name="didemo_test",
            title="DiDeMo, test split",
            origin="counted in test_data.json",
            clips=1_004,
            captions=1_004,
        ),
        PublishedCounts(
            name="lsmdc_train",
            title="LSMDC, training split",
            # README of albanie/collaborative-experts, misc/datasets/lsmdc. A few lines are empty.
            origin="101,079 lines, as published; not counted, since the files need an agreement",
            rows=101_079,
        ),
        PublishedCounts(
            name="lsmdc_val",
            title="LSMDC, validation split",
            origin="7,408 lines, as published; not counted, since the files need an agreement",
            rows=7_408,
        ),
        PublishedCounts(
            name="lsmdc_test",
            title="LSMDC, public test of the 2016 challenge",
            # README of albanie/collaborative-experts, misc/datasets/lsmdc.
            origin="as published; not counted, since the files need an agreement",
            clips=1_000,
            captions=1_000,
        ),
        PublishedCounts(
            name="msvd_train",
            title="MSVD, training split",
            # captions_msvd.json of layer6ai-labs/xpool with the lists of CLIP4Clip; all three.
            origin="counted in captions_msvd.json and train_list.txt",
            clips=1_200,
            captions=48_774,
        ),
        PublishedCounts(
            name="msvd_val",
            title="MSVD, validation split",
            origin="counted in captions_msvd.json and val_list.txt",
            clips=100,
            captions=4_290,
        ),
        PublishedCounts(
            name="msvd_test",
            title="MSVD, test split",
            origin="counted in captions_msvd.json and test_list.txt",
            clips=670,
            captions=27_763,
        ),
        PublishedCounts(
            name="msrvtt_qa_train",
            title="MSRVTT-QA, training split",
            # Xu et al., Video Question Answering via Gradually Refined Attention (2017): 243,680
            # questions about 10,000 videos, in the splits of MSR-VTT.
            origin="as published; not counted",
            clips=6_513,
            questions=158_581,
        ),
        PublishedCounts(
            name="msrvtt_qa_val",
            title="MSRVTT-QA, validation split",
            origin="counted in val.jsonl",
            clips=497,
            questions=12_278,
        ),
        PublishedCounts(
            name="msrvtt_qa_test",
            title="MSRVTT-QA, test split",
            origin="as published; not counted",
            clips=2_990,
            questions=ANSWER_BENCHMARKS["msrvtt_qa"].questions,
        ),
        PublishedCounts(
            name="msvd_qa_train",
            title="MSVD-QA, training split",
            # The same paper: 50,505 questions about 1,970 videos.
            origin="as published; not counted",
            clips=1_200,
            questions=30_933,
        ),
        PublishedCounts(
            name="msvd_qa_val",
            title="MSVD-QA, validation split",
            origin="as published; not counted",
            clips=250,
            questions=6_415,
        ),
        PublishedCounts(
            name="msvd_qa_test",
            title="MSVD-QA, test split",
            origin="as published; not counted",
            clips=520,
            questions=ANSWER_BENCHMARKS["msvd_qa"].questions,
        ),
    )
}

assert tuple(PUBLISHED_COUNTS) == get_args(PublishedSplit)
