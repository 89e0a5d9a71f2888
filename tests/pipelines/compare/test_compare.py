"""Evaluations side by side: paired intervals, what may be compared, published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.common import tracking
from pipelines.common.config import TrackingConfig
from pipelines.compare.config import CompareConfig
from pipelines.compare.run import run_compare
from pipelines.evaluate.rank_table import rank_table
from stgt.errors import STGTError
from stgt.retrieval.gallery import Direction, Scores, all_metrics
from stgt.retrieval.ranking import Ranking

VIDEOS = 200


def ranking(ranks: np.ndarray) -> Ranking:
    return Ranking(ranks, np.empty((len(ranks), 0), np.int64), np.empty((len(ranks), 0)))


def evaluation(folder: Path, ranks: np.ndarray, benchmark: str = "msrvtt", **changes: Any) -> Path:
    """The folder of a finished evaluation with given ranks, the same by cosine and reranked."""
    one = Direction(ranking(ranks), ranking(ranks))
    scores = Scores(one, one, None)
    owners = np.arange(len(ranks))
    metrics, intervals = all_metrics(scores, owners, 100)
    table = rank_table(
        scores,
        [f"video{n}" for n in owners],
        [f"caption {n}" for n in owners],
        owners,
    )
    folder.mkdir()
    pq.write_table(table, folder / "ranks.parquet")
    prefix = changes.pop("prefix", "")
    result = {
        "benchmark": benchmark,
        "title": benchmark.upper(),
        "protocol": {"protocol": "pairs", "reranking": "the best 128", "checkpoint": str(folder)},
        "metrics": {f"{prefix}{name}": value for name, value in metrics.items()},
        "intervals": intervals,
        "missing": [],
        "checkpoint": str(folder),
    }
    result["protocol"] |= changes
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, np.ndarray]:
    ranks = np.random.default_rng(0).integers(1, 21, size=VIDEOS)
    return evaluation(tmp_path / "base", ranks), ranks


def test_a_small_but_steady_gain_is_shown_and_noise_is_not(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """Paired: a gain of 8 points of R@1 is seen although each R@1 alone varies by as much."""
    folder, ranks = base
    gained = ranks.copy()
    gained[np.flatnonzero(ranks > 1)[:16]] = 1
    other = np.random.default_rng(1).permutation(ranks)
    summary = run_compare(
        CompareConfig(
            runs=(
                str(folder),
                str(evaluation(tmp_path / "gained", gained)),
                str(evaluation(tmp_path / "shuffled", other)),
            ),
            output=str(tmp_path / "out"),
        )
    )
    by_metric = {
        name: {one["metric"]: one for one in found}
        for name, found in summary["differences"].items()
    }
    gain = by_metric["gained"]["t2v/R1"]
    assert gain["difference"] == pytest.approx(8)
    assert gain["verdict"] == "better"
    assert 3 < gain["low"] < 8 < gain["high"] < 13
    assert by_metric["gained"]["t2v/MnR"]["verdict"] == "better"
    assert by_metric["gained"]["t2v/MnR"]["difference"] < 0
    assert by_metric["shuffled"]["t2v/R1"]["verdict"] == "no difference shown"
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "gained vs. base" in page
    assert "CLIP4Clip" in page
    assert summary["protocols_differ"] == []
    assert any("UMT-L" in line for line in summary["published"])


def test_the_paired_interval_is_that_of_videos_drawn_by_hand(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder, ranks = base
    worse = np.minimum(ranks + 5 * (np.arange(VIDEOS) % 3 == 0), 21)
    summary = run_compare(
        CompareConfig(runs=(str(folder), str(evaluation(tmp_path / "worse", worse))), resamples=200)
    )
    generator = np.random.default_rng(0)
    drawn = [generator.integers(VIDEOS, size=VIDEOS) for _ in range(200)]
    change = [np.mean(worse[one] <= 5) - np.mean(ranks[one] <= 5) for one in drawn]
    low, high = np.percentile(change, [2.5, 97.5]) * 100
    found = {one["metric"]: one for one in summary["differences"]["worse"]}["sim/v2t/R5"]
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["verdict"] == "worse"


def test_what_is_not_comparable_is_said_or_refused(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder, ranks = base
    with pytest.raises(STGTError, match="different benchmarks are not comparable"):
        run_compare(
            CompareConfig(runs=(str(folder), str(evaluation(tmp_path / "d", ranks, "didemo"))))
        )
    changed = evaluation(tmp_path / "k", ranks, reranking="none")
    summary = run_compare(CompareConfig(runs=(str(folder), str(changed))))
    assert summary["protocols_differ"] == ["reranking: the best 128 (base); none (k)"]
    fewer = evaluation(tmp_path / "fewer", ranks[:-3], prefix="partial/")
    summary = run_compare(CompareConfig(runs=(str(folder), str(fewer))))
    assert summary["differences"] == {}
    assert summary["published"] == []
    assert summary["protocols_differ"] == []
    partial = evaluation(tmp_path / "partial", ranks, prefix="partial/")
    result = json.loads((partial / "metrics.json").read_text())
    result["missing"] = [{"clip_id": "video900", "reason": "missing: gone"}]
    (partial / "metrics.json").write_text(json.dumps(result))
    summary = run_compare(CompareConfig(runs=(str(folder), str(partial))))
    found = summary["differences"]["partial"]
    assert all(one["metric"].startswith("partial/") for one in found)
    assert "missing videos: 0 (base); 1 (partial)" in summary["protocols_differ"][0]
    (tmp_path / "other").mkdir()
    same_name = evaluation(tmp_path / "other" / "base", ranks)
    summary = run_compare(CompareConfig(runs=(str(folder), str(same_name))))
    assert summary["runs"] == [str(folder), str(same_name)]
    with pytest.raises(STGTError, match="is given twice"):
        run_compare(CompareConfig(runs=(str(folder), str(folder))))
    (same_name / "metrics.json").write_text("{}")
    with pytest.raises(STGTError, match="has other content"):
        run_compare(CompareConfig(runs=(str(folder), str(same_name))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(STGTError, match=r"holds no metrics\.json"):
        run_compare(CompareConfig(runs=(str(tmp_path / "empty"),)))
    with pytest.raises(STGTError, match="set --tracking.uri"):
        run_compare(
            CompareConfig(
                runs=("0123",), tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/none.db")
            )
        )


def test_figures_judged_by_a_language_model_are_refused(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder, ranks = base
    judged = evaluation(tmp_path / "judged", ranks, judging="a language model")
    with pytest.raises(STGTError, match="judged: its figures were judged by a language model"):
        run_compare(CompareConfig(runs=(str(folder), str(judged))))


def of_gallery(folder: Path, gallery: str | None, **changes: Any) -> Path:
    result = json.loads((folder / "metrics.json").read_text())
    result |= {"gallery": gallery, **changes}
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


def test_galleries_recognized_as_different_splits_are_not_compared(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    _, ranks = base
    one = of_gallery(evaluation(tmp_path / "one", ranks, "any"), "MSR-VTT 884")
    other = of_gallery(evaluation(tmp_path / "other", ranks, "any"), "MSR-VTT 879")
    with pytest.raises(STGTError, match="one was evaluated on MSR-VTT 884, other on MSR-VTT 879"):
        run_compare(CompareConfig(runs=(str(one), str(other))))
    unknown = of_gallery(evaluation(tmp_path / "unknown", ranks, "any"), None)
    assert run_compare(CompareConfig(runs=(str(one), str(unknown))))["differences"]["unknown"]


def test_leakage_other_protocols_and_files_of_embeddings_stand_in_the_table(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder, ranks = base
    leaked = "3 of the 200 test clips are in /train"
    other = evaluation(tmp_path / "other", ranks, leakage=leaked, reranking="none")
    of_gallery(other, None, checkpoint=None, embedding_file="/theirs.npz")
    config = CompareConfig(runs=(str(folder), str(other)), output=str(tmp_path / "out"))
    summary = run_compare(config)
    assert summary["protocols_differ"] == ["reranking: the best 128 (base); none (other)"]
    page = (tmp_path / "out" / "compare.html").read_text()
    table = page[page.index("<h2>Metrics") : page.index("<h2>other vs.")]
    rows = table.split("<tr>")[2:]
    assert "Leakage of test clips into training data: not checked" in rows[0]
    assert f"Leakage of test clips into training data: {leaked}" in rows[1]
    assert "Another protocol than base: reranking" in rows[1]
    assert "/theirs.npz" in rows[1]
    assert "Another protocol" not in rows[0]


def test_the_number_of_candidates_is_stated_for_every_evaluation(
    base: tuple[Path, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, ranks = base
    tail = "by cosine in both directions are reranked by cosine + match probability"
    old = evaluation(tmp_path / "old", ranks, reranking=f"the top 128 {tail}")
    new = evaluation(tmp_path / "new", ranks, reranking=f"the top 32 {tail}")
    with caplog.at_level("INFO"):
        config = CompareConfig(runs=(str(old), str(new)), output=str(tmp_path / "out"))
        summary = run_compare(config)
    assert summary["reranking"] == {"old": f"the top 128 {tail}", "new": f"the top 32 {tail}"}
    assert f"old: reranking: the top 128 {tail}" in caplog.text
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Reranking: the top 128 by" in page
    assert "Reranking: the top 32 by" in page
    assert summary["protocols_differ"] == [
        f"reranking: the top 128 {tail} (old); the top 32 {tail} (new)"
    ]


def test_figures_of_the_first_30_seconds_say_so(tmp_path: Path) -> None:
    ranks = np.random.default_rng(0).integers(1, 21, size=VIDEOS)
    folder = evaluation(tmp_path / "didemo", ranks, "didemo")
    config = CompareConfig(runs=(str(folder),), output=str(tmp_path / "out"))
    published = run_compare(config)["published"]
    of_umt = [line for line in published if line.startswith("UMT-L 25M")]
    assert len(of_umt) == 2
    assert all("on the first 30 s of each video" in line for line in of_umt)
    assert any("CaRe-DPO" in line and "video-to-text R@1 82.5" in line for line in published)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("on the first 30 s of each video") == 2
    assert "82.5" in page


@pytest.mark.slow
def test_runs_are_found_in_mlflow(base: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = base
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = tracking.Run.open(config, "evaluate msrvtt", str(tmp_path / "run.json"))
    for name in ("metrics.json", "ranks.parquet"):
        run.log_file(name, (folder / name).read_bytes())
    run.finish()
    summary = run_compare(CompareConfig(runs=(str(folder), run.run_id), tracking=config))
    name = f"evaluate msrvtt ({run.run_id[:8]})"
    assert summary["runs"] == ["base", name]
    assert all(one["difference"] == 0 for one in summary["differences"][name])
    unfinished = tracking.Run.open(config, "other", str(tmp_path / "other.json"))
    for missing in (unfinished.run_id, "no-such-run"):
        with pytest.raises(STGTError, match="is not an evaluation|is neither"):
            run_compare(CompareConfig(runs=(missing,), tracking=config))


def test_tables_of_other_orders_are_not_paired(
    base: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder, ranks = base
    other = evaluation(tmp_path / "other", ranks)
    table = pq.read_table(other / "ranks.parquet")
    pq.write_table(table.take(pa.array(np.arange(len(table))[::-1])), other / "ranks.parquet")
    assert run_compare(CompareConfig(runs=(str(folder), str(other))))["differences"] == {}
