"""Benchmarks on annotations as their authors ship them, with made-up embeddings: what is scored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from pipelines.artifacts.published_results import RESULTS, results_of
from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import Gallery, open_gallery
from pipelines.evaluate.rank_table import rank_table
from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError
from stgt.retrieval.gallery import MISS, all_metrics, score_gallery
from stgt.retrieval.metrics import best_ranks, retrieval_metrics
from stgt.retrieval.similarity import Similarity, similarity_matrix

A_VIDEO = {
    "msrvtt": "video7020.mp4",
    "didemo": "12090392@N02_13482799053_87ef417396.mov",
    "lsmdc": "1001_Movie/1001_Movie_00.00.00.000-00.00.00.900.avi",
    "msvd": "fr9H1WLcF1A_141_148.avi",
    "msrvtt_qa": "video1.mp4",
}
"""One of each data set's videos."""


def manifest_of(folder: Path, name: ManifestFormat, *files: Path | str, video: str) -> str:
    """A manifest of annotations, one of whose videos is there: a folder with none is refused."""
    output = str(folder / "manifest.parquet")
    (folder / video).parent.mkdir(exist_ok=True)
    (folder / video).touch()
    run_manifest(
        ManifestConfig(
            annotations=tuple(str(file) for file in files),
            videos=(str(folder),),
            output=output,
            format=name,
            split="test",
        )
    )
    return output


def gallery_of(manifest: str, benchmark: str) -> Gallery:
    config = EvaluateConfig(benchmark=benchmark, data=manifest, checkpoint="c", output="o")  # type: ignore[arg-type]
    return open_gallery(config, BENCHMARKS[benchmark])


def full_msrvtt(folder: Path, annotations: Path) -> Path:
    """MSRVTT_data.json with the full test split's ids, and made-up sentences."""
    ids = (annotations / "msrvtt" / "test_list_full.txt").read_text().split()
    ids = [one.removesuffix(".mp4") for one in ids]
    path = folder / "MSRVTT_data.json"
    path.write_text(
        json.dumps(
            {
                "videos": [{"video_id": one, "split": "test"} for one in ids],
                "sentences": [
                    {"video_id": one, "caption": f"sentence {number} of {one}"}
                    for one in ids
                    for number in range(20)
                ],
            }
        )
    )
    return path


def lsmdc_test(folder: Path) -> Path:
    """The public test's form: 1,000 lines separated by tabs, without a header."""
    path = folder / "LSMDC16_challenge_1000_publictect.csv"
    times = [f"00.{number // 60:02d}.{number % 60:02d}" for number in range(1000)]
    path.write_text(
        "".join(
            f"1001_Movie_{time}.000-{time}.900\t0\t1\t0\t1\tSOMEONE does thing {number}.\n"
            for number, time in enumerate(times)
        )
    )
    return path


LARGEST = "msrvtt_full"
NAMES = ["msrvtt", LARGEST, "didemo", "lsmdc", "msvd", "msvd_670"]


@pytest.fixture(scope="module")
def named(
    request: pytest.FixtureRequest,
    annotations_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Gallery]:
    name, tmp_path = request.param, tmp_path_factory.mktemp("split")
    files: tuple[Path, ...]
    if name == "msrvtt":
        files = (annotations_dir / "msrvtt" / "MSRVTT_JSFUSION_test.csv",)
    elif name == "msrvtt_full":
        files = (full_msrvtt(tmp_path, annotations_dir),)
    elif name == "didemo":
        files = (annotations_dir / "didemo" / "test_data.json",)
    elif name == "lsmdc":
        files = (lsmdc_test(tmp_path),)
    else:
        msvd = annotations_dir / "msvd"
        files = (msvd / "captions_msvd.test_val_subset.json", msvd / "test_list.txt")
    kind = cast(ManifestFormat, name.partition("_")[0])
    return name, gallery_of(manifest_of(tmp_path, kind, *files, video=A_VIDEO[kind]), name)


@pytest.mark.slow
@pytest.mark.parametrize("named", NAMES, indirect=True)
def test_splits_are_whole(named: tuple[str, Gallery]) -> None:
    name, gallery = named
    benchmark = BENCHMARKS[name]
    assert (gallery.num_videos, len(gallery.captions)) == (benchmark.videos, benchmark.captions)
    if name == "msrvtt":
        assert gallery.repeated_captions == (9, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "named",
    [pytest.param(one, marks=[pytest.mark.soak] if one == LARGEST else []) for one in NAMES],
    indirect=True,
)
def test_splits_are_scored_by_their_protocol(named: tuple[str, Gallery]) -> None:
    """Metrics are those of the whole matrix by brute force."""
    _, gallery = named
    generator = np.random.default_rng(0)
    videos = generator.normal(size=(gallery.num_videos, 2, 6)).astype(np.float32)
    owners = videos[gallery.video_of_caption, 0]
    texts = (owners + generator.normal(size=owners.shape)).astype(np.float32)
    calls: list[int] = []

    def match(pairs: np.ndarray) -> np.ndarray:
        calls.append(len(pairs))
        assert len(np.unique(pairs @ [gallery.num_videos, 1])) == len(pairs)
        return np.zeros(len(pairs), dtype=np.float32)

    scores = score_gallery(
        Similarity(videos, texts),
        gallery.video_of_caption,
        np.ones(gallery.num_videos, dtype=bool),
        16,
        match,
    )
    found, _ = all_metrics(scores, gallery.video_of_caption, 0)
    whole = similarity_matrix(videos, texts)
    right = whole[np.arange(len(whole)), gallery.video_of_caption]
    wanted = retrieval_metrics((whole >= right[:, None]).sum(axis=1), "t2v")
    groups: list[list[int]] = [[] for _ in range(gallery.num_videos)]
    for caption, video in enumerate(gallery.video_of_caption):
        groups[video].append(caption)
    wanted |= retrieval_metrics(best_ranks(np.ascontiguousarray(whole.T), groups), "v2t")
    for metric, value in wanted.items():
        assert found[f"sim/{metric}"] == pytest.approx(value), metric
    assert len(calls) == 1
    assert found["t2v/R1"] == found["sim/t2v/R1"]  # every match is as likely
    table = rank_table(scores, gallery.clip_ids, gallery.captions, gallery.video_of_caption)
    assert len(table) == gallery.num_videos + len(gallery.captions)


def test_msvd_670_takes_each_videos_first_caption(annotations_dir: Path, tmp_path: Path) -> None:
    msvd = annotations_dir / "msvd"
    captions = json.loads((msvd / "captions_msvd.test_val_subset.json").read_text())
    manifest = manifest_of(
        tmp_path,
        "msvd",
        msvd / "captions_msvd.test_val_subset.json",
        msvd / "test_list.txt",
        video=A_VIDEO["msvd"],
    )
    gallery = gallery_of(manifest, "msvd_670")
    for caption, video in zip(gallery.captions, gallery.video_of_caption, strict=True):
        assert caption == captions[gallery.clip_ids[video]][0].strip()


def test_a_split_of_another_size_is_named(annotations_dir: Path, tmp_path: Path) -> None:
    lines = (annotations_dir / "msrvtt" / "MSRVTT_JSFUSION_test.csv").read_text().splitlines()
    cut = tmp_path / "cut.csv"
    cut.write_text("\n".join(lines[:-3]) + "\n")
    manifest = manifest_of(tmp_path, "msrvtt", cut, video=A_VIDEO["msrvtt"])
    with pytest.raises(ValueError, match=r"msrvtt: expected 1,000 videos, found 997 in .*manifest"):
        gallery_of(manifest, "msrvtt")
    assert gallery_of(manifest, "any").num_videos == 997


def test_clips_without_captions_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "qa.jsonl"
    row = {"video_id": "video1", "question": "what?", "answer": "a", "answer_type": "what"}
    table.write_text(json.dumps(row) + "\n")
    manifest = manifest_of(tmp_path, "msrvtt_qa", table, video=A_VIDEO["msrvtt_qa"])
    with pytest.raises(ManifestError, match=r"1 clips have no caption \(video1\)"):
        gallery_of(manifest, "any")


def test_missing_videos_are_misses_and_distract_nobody() -> None:
    """Two of six videos are missing: their captions find nothing, and still answer searches."""
    generator = np.random.default_rng(1)
    videos = generator.normal(size=(6, 1, 4)).astype(np.float32)
    video_of_text = np.array([0, 1, 1, 2, 3, 4, 5])
    texts = videos[video_of_text, 0].copy()
    present = np.array([True, False, True, True, False, True])
    scores = score_gallery(
        Similarity(videos[present], texts),
        video_of_text,
        present,
        3,
        lambda pairs: np.full(len(pairs), 0.5, dtype=np.float32),
    )
    for found in (scores.t2v.similarity, scores.t2v.reranked):
        assert found is not None
        gone = np.isin(video_of_text, [1, 4])
        assert (found.ranks[gone] == MISS).all()
        assert set(found.candidates.ravel().tolist()) <= {0, 2, 3, 5}
    for found in (scores.v2t.similarity, scores.v2t.reranked):
        assert found is not None
        assert (found.ranks[[1, 4]] == MISS).all()
        assert (found.ranks[present] <= len(texts)).all()
    metrics, intervals = all_metrics(scores, video_of_text, 50)
    assert metrics["v2t/R10"] == pytest.approx(100 * 4 / 6)
    assert metrics["t2v/R10"] == pytest.approx(100 * 4 / 7)
    assert intervals.keys() == metrics.keys()
    low, high = intervals["t2v/R10"]
    assert low <= metrics["t2v/R10"] <= high


def test_published_figures_name_their_source_and_protocol() -> None:
    assert {one.benchmark for one in RESULTS} == {"msrvtt", "didemo", "lsmdc", "msvd"}
    for one in RESULTS:
        assert one.source
        assert 0 < one.recall[0] < 100
        assert "STGT" not in one.system
    assert results_of("msvd_670") == []  # nobody's figures are of that protocol
    assert results_of("msvd") == []  # nobody says which protocol it is
    tuned = [one.system for one in results_of("msrvtt") if not one.zero_shot]
    assert tuned[:3] == ["ExCae", "CaRe-DPO", "VAST"]
    assert "GRAM" not in tuned  # that is on other clips


def test_caveats_stand_beside_the_figures_that_need_them() -> None:
    def caveats(system: str, benchmark: str) -> set[str]:
        return {one.caveat for one in RESULTS if (one.system, one.benchmark) == (system, benchmark)}

    assert caveats("UMT-L 25M", "didemo") == {"on the first 30 s of each video"}
    assert caveats("UMT-L 25M", "msrvtt") == {""}
    assert caveats("VidVec", "didemo") == {"dual softmax, two stages"}
    [of_care] = caveats("CaRe-DPO", "msrvtt")
    assert "language model" in of_care
    assert "generated captions" in of_care
    [reversed_search] = [
        one.v2t_recall_at_1
        for one in results_of("didemo")
        if one.system == "CaRe-DPO" and not one.zero_shot
    ]
    assert reversed_search == 82.5
    sizes = {one.name: one.recall[0] for one in RESULTS if one.system.startswith("PE-Core T")}
    assert sizes == {"PE-Core-T": 28.8, "PE-Core-S": 39.3, "PE-Core-B": 47.6, "PE-Core-L": 50.3}


def test_published_figures_are_those_of_the_sources(reference_dir: Path) -> None:
    """Every figure stands in its system's row of the reference table."""
    lines = (reference_dir / "published_results.md").read_text().splitlines()
    zero_shot = lines.index("## Zero-shot")
    for one in RESULTS:
        rows = lines[zero_shot:] if one.zero_shot else lines[:zero_shot]
        [row] = [line for line in rows if line.startswith(f"| {one.system}")]
        for value in (*one.recall, one.v2t_recall_at_1):
            assert value is None or f"{value}" in row, (one, row)


def test_every_retrieval_figure_of_the_sources_is_listed(reference_dir: Path) -> None:
    """Rows with figures of the four benchmarks have as many results as filled cells."""
    lines = (reference_dir / "published_results.md").read_text().splitlines()
    zero_shot = lines.index("## Zero-shot")
    for number, line in enumerate(lines):
        if not line.startswith("| ") or line.startswith("| system"):
            continue
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found = [
            one
            for one in RESULTS
            if name.startswith(one.system) and one.zero_shot == (number > zero_shot)
        ]
        filled = {
            benchmark
            for benchmark, cell in zip(
                ("msrvtt", "didemo", "lsmdc", "msvd"), cells[:4], strict=True
            )
            if cell
        }
        assert {one.benchmark for one in found} == filled, line
        printed = {float(figure) for figure in re.findall(r"\d+\.\d", " ".join(cells[:4]))}
        held = {value for one in found for value in (*one.recall, one.v2t_recall_at_1)}
        of_caveats = {
            float(figure) for one in found for figure in re.findall(r"\d+\.\d", one.caveat)
        }
        assert printed <= held | of_caveats, line


def test_another_split_of_the_same_size_is_refused(annotations_dir: Path, tmp_path: Path) -> None:
    """A thousand clips are not the thousand clips: LSMDC's test is not MSR-VTT's."""
    manifest = manifest_of(tmp_path, "lsmdc", lsmdc_test(tmp_path), video=A_VIDEO["lsmdc"])
    with pytest.raises(ValueError, match="msrvtt: .* has the right number of videos, but not"):
        gallery_of(manifest, "msrvtt")
    jsfusion = annotations_dir / "msrvtt" / "MSRVTT_JSFUSION_test.csv"
    manifest = manifest_of(tmp_path, "msrvtt", jsfusion, video=A_VIDEO["msrvtt"])
    with pytest.raises(ValueError, match="but not those of the split, such as video"):
        gallery_of(manifest, "lsmdc")


def test_a_manifest_is_read_as_one_whatever_it_is_called(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "split.json")
    config = EvaluateConfig(data="store", manifest=nowhere, checkpoint="c", output="o")
    with pytest.raises(ManifestError, match=r"split\.json does not exist"):
        open_gallery(config, BENCHMARKS["any"])
