"""Somebody else's embeddings, as .npz and .parquet: what is read, matched, scored and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.embedding_file import aligned, read_embedding_file
from pipelines.evaluate.run import run_evaluate
from stgt.errors import SettingError, STGTError
from stgt.retrieval.metrics import best_ranks, retrieval_metrics
from tests.helpers.data import TinyData

VIDEOS, WIDTH = 12, 5
IDS = [f"clip{n}" for n in range(VIDEOS)]
OWNERS = [n % VIDEOS for n in range(20)]
CAPTIONS = [f"caption {n}" for n in range(20)]


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def arrays(vectors: int = 2, per_caption: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    videos = unit(generator.normal(size=(VIDEOS, vectors, WIDTH)))
    texts = videos[OWNERS, :1] + 0.7 * generator.normal(size=(20, per_caption, WIDTH))
    return {
        "video_ids": np.array(IDS),
        "video_embeds": videos,
        "caption_video_ids": np.array([IDS[n] for n in OWNERS]),
        "caption_embeds": unit(texts),
        "captions": np.array(CAPTIONS),
    }


def save(folder: Path, name: str = "embeds.npz", **changes: Any) -> str:
    values = {**arrays(), **changes}
    path = folder / name
    np.savez(path, **{key: value for key, value in values.items() if value is not None})
    return str(path)


def save_table(
    folder: Path,
    values: dict[str, np.ndarray],
    pairs: np.ndarray | None = None,
    precise: bool = False,
) -> str:
    rows: list[dict[str, Any]] = [
        {"kind": "video", "video_id": one, "embedding": embeds.tolist()}
        for one, embeds in zip(values["video_ids"], values["video_embeds"], strict=True)
    ]
    rows += [
        {"kind": "caption", "video_id": one, "embedding": embeds.tolist(), "caption": caption}
        for one, embeds, caption in zip(
            values["caption_video_ids"], values["caption_embeds"], values["captions"], strict=True
        )
    ]
    for row, column in [] if pairs is None else np.argwhere(np.isfinite(pairs)).tolist():
        score = float(pairs[row, column])
        rows.append({"kind": "pair", "video_id": IDS[column], "caption_row": row, "score": score})
    path = folder / "embeds.parquet"
    kind = pa.list_(pa.list_(pa.float64()))
    schema = SCHEMA.set(2, pa.field("embedding", kind)) if precise else SCHEMA
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("video_id", pa.string()),
        ("embedding", pa.list_(pa.list_(pa.float32()))),
        ("caption", pa.string()),
        ("caption_row", pa.int64()),
        ("score", pa.float64()),
    ]
)


def config_of(folder: Path, file: str, **changes: Any) -> EvaluateConfig:
    values = {
        "embedding_file": file,
        "output": str(folder / "out"),
        "resamples": 20,
        "tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture
def tracked(tmp_path: Path, mlflow_database: Path) -> Path:
    """A folder whose MLflow database has its tables already."""
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    return tmp_path


def by_hand(scores: np.ndarray) -> dict[str, float]:
    """Metrics of a whole matrix [captions, videos] by brute force."""
    groups = [[n for n in range(20) if OWNERS[n] == video] for video in range(VIDEOS)]
    t2v = best_ranks(scores, [[owner] for owner in OWNERS])
    v2t = best_ranks(np.ascontiguousarray(scores.T), groups)
    return retrieval_metrics(t2v, "t2v") | retrieval_metrics(v2t, "v2t")


def test_both_forms_contain_the_same(tmp_path: Path) -> None:
    values = arrays()
    scores = np.random.default_rng(1).normal(size=(20, VIDEOS))
    one = read_embedding_file(save(tmp_path, pair_scores=scores))
    other = read_embedding_file(save_table(tmp_path, values, scores))
    assert (one.video_ids, one.captions, one.vectors) == (IDS, CAPTIONS, (2, 1))
    assert one.caption_video_ids == other.caption_video_ids
    np.testing.assert_allclose(one.videos, other.videos, atol=1e-6)
    np.testing.assert_allclose(one.texts, other.texts, atol=1e-6)
    assert one.pair_scores is not None
    assert other.pair_scores is not None
    np.testing.assert_allclose(one.pair_scores, other.pair_scores, atol=1e-6)
    assert one.was_normalized


def test_a_whole_evaluation_without_videos_and_checkpoint(tracked: Path) -> None:
    values = arrays(vectors=3, per_caption=2)
    summary = run_evaluate(config_of(tracked, save(tracked, **values)))
    cosine = np.einsum("nce,vqe->nvcq", values["caption_embeds"], values["video_embeds"])
    wanted = by_hand(cosine.max(axis=(2, 3)))
    found = summary["metrics"]
    for name, value in wanted.items():
        assert found[f"sim/{name}"] == pytest.approx(value), name
    assert "t2v/R1" not in found
    assert summary["picture"] is None
    protocol = summary["protocol"]
    assert "up to 3 vectors per video and 2 per caption, of width 5" in protocol["embeddings"]
    assert "normalized" not in protocol["embeddings"]
    assert protocol["leakage"] == "not checked"
    page = Path(summary["report"]).read_text()
    assert "Embeddings of the file" in page
    assert "no videos were given, so no frames are shown" in page
    assert "data:image" not in page
    result = json.loads((tracked / "out" / "metrics.json").read_text())
    assert result["checkpoint"] is None
    assert result["embedding_file"].endswith("embeds.npz")
    assert result["leakage"] == {"checked": False}
    assert result["intervals"].keys() == result["metrics"].keys()
    assert run_evaluate(config_of(tracked, save(tracked, **values)))["metrics"] == found
    with pytest.raises(STGTError, match="the evaluation of another checkpoint, gallery or config"):
        run_evaluate(config_of(tracked, save(tracked)))


def test_pair_scores_rank_and_pairs_without_one_come_last(tracked: Path) -> None:
    scores = np.random.default_rng(2).normal(size=(20, VIDEOS))
    scores[np.random.default_rng(3).random(scores.shape) < 0.4] = -np.inf
    summary = run_evaluate(config_of(tracked, save(tracked, pair_scores=scores)))
    for name, value in by_hand(scores).items():
        assert summary["metrics"][name] == pytest.approx(value), name
    assert summary["metrics"]["sim/t2v/R1"] > summary["metrics"]["t2v/R1"]
    assert "the pair scores of the file alone" in summary["protocol"]["reranking"]
    assert "inf" not in Path(summary["report"]).read_text().split("top-ranked videos")[1][:4000]


def test_vectors_of_other_lengths_are_normalized_and_that_is_said(
    tracked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = arrays()
    scale = np.random.default_rng(4).uniform(0.5, 9, size=(VIDEOS, 2, 1)).astype(np.float32)
    changed = save(tracked, video_embeds=values["video_embeds"] * scale)
    summary = run_evaluate(config_of(tracked, changed))
    wanted = by_hand(
        np.einsum("nce,vqe->nvcq", values["caption_embeds"], values["video_embeds"]).max((2, 3))
    )
    assert summary["metrics"]["sim/t2v/R1"] == pytest.approx(wanted["t2v/R1"])
    assert (
        "vectors were not of unit length and were normalized" in summary["protocol"]["embeddings"]
    )
    assert "they are normalized, because pairs are compared by cosine" in caplog.text


def manifest(folder: Path, ids: list[str], texts: list[str]) -> str:
    table = whole_videos_table(
        {one: f"/videos/{one}.mp4" for one in ids}, dict(zip(ids, texts, strict=True)), "test"
    )
    path = folder / "manifest.parquet"
    pq.write_table(table, path)
    return str(path)


def test_the_gallery_of_a_manifest_has_its_own_order(tracked: Path) -> None:
    """Videos are matched by id or name, and captions by their texts."""
    values = arrays()
    first = {key: value[:VIDEOS] for key, value in values.items()}
    first["video_ids"] = np.array([f"all/{one}.mp4" for one in IDS])
    first["caption_video_ids"] = first["video_ids"]
    path = manifest(tracked, IDS, [f"Caption {n}." for n in range(VIDEOS)])
    summary = run_evaluate(config_of(tracked, save(tracked, **first), manifest=path))
    cosine = np.einsum("nce,vqe->nvcq", first["caption_embeds"], first["video_embeds"])
    ranks = best_ranks(cosine.max((2, 3)), [[n] for n in range(VIDEOS)])
    assert summary["metrics"]["sim/t2v/R1"] == pytest.approx(100 * np.mean(ranks == 1))
    table = pq.read_table(tracked / "out" / "ranks.parquet").to_pylist()
    found = {row["clip_id"]: row["sim_rank"] for row in table if row["direction"] == "t2v"}
    assert [found[one] for one in IDS] == ranks.tolist()
    assert [row["clip_id"] for row in table[:VIDEOS]] != IDS  # the manifest's order


def test_several_captions_of_a_video_are_matched_by_text_or_order(tmp_path: Path) -> None:
    file = read_embedding_file(save(tmp_path))
    owners = np.array(sorted(OWNERS))
    texts = [f"caption {n}" for video in range(VIDEOS) for n in range(20) if OWNERS[n] == video]
    swapped = texts[:]
    swapped[0], swapped[1] = texts[1], texts[0]  # the two captions of clip0
    rows = [CAPTIONS.index(text) for text in swapped]
    ordered = aligned(file, IDS, swapped, owners)
    np.testing.assert_array_equal(ordered.texts, file.texts[rows])
    silent = read_embedding_file(save(tmp_path, captions=None))
    by_order = aligned(silent, IDS, swapped, owners)
    np.testing.assert_array_equal(by_order.texts, file.texts[[CAPTIONS.index(t) for t in texts]])
    with pytest.raises(STGTError, match="other captions than the gallery for 1 videos \\(clip0\\)"):
        aligned(file, IDS, ["another", *swapped[1:]], owners)
    with pytest.raises(
        STGTError, match="other numbers of captions .* 6 videos \\(clip0, clip1, clip4"
    ):
        aligned(silent, IDS, ["x"] * VIDEOS, np.array([2, 3, *range(2, VIDEOS)]))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"video_ids": np.array(["other", *IDS[1:]])}, r"1 videos that have no embedding \(clip0\)"),
    ({"video_ids": np.array([IDS[1], *IDS[1:]])}, r"1 videos more than once \(clip1\)"),
    ({"video_embeds": np.ones((11, WIDTH))}, "11 embeddings for 12 ids of the videos"),
    (
        {"video_embeds": np.full((VIDEOS, WIDTH), np.nan)},
        r"12 embeddings of the videos contain NaN",
    ),
    ({"caption_embeds": np.ones((20, 3))}, "videos have width 5, but those of the captions have"),
    ({"caption_embeds": np.ones((20, WIDTH), dtype=int)}, "have dtype int64"),
    ({"caption_embeds": np.zeros((20, WIDTH))}, r"all zeros \(caption 0 of clip0, .*no cosine"),
    ({"caption_embeds": None}, "lacks the arrays caption_embeds; it needs"),
    ({"captions": np.array(CAPTIONS[:3])}, "captions has 3 entries"),
    ({"captions": np.array(CAPTIONS, dtype=object)}, "pickled files are refused"),
    ({"pair_scores": np.zeros((20, 3))}, r"must be .* of shape \[captions, videos\], \[20, 12\]"),
    (
        {"pair_scores": np.full((20, VIDEOS), np.nan)},
        "240 values of pair_scores are NaN .* of caption 0 of clip0 and video clip0",
    ),
    (
        {"video_ids": np.array([*IDS, "x"]), "video_embeds": np.ones((13, WIDTH))},
        r"1 videos have no caption \(x\)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = {**arrays(), **changes}
    if values["captions"] is not None and values["captions"].dtype == object:
        path = tmp_path / "embeds.npz"
        np.savez(path, **values)
    else:
        path = Path(save(tmp_path, **values))
    with pytest.raises(STGTError, match=message):
        run_evaluate(config_of(tmp_path, str(path)))
    assert not (tmp_path / "out").exists()


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name, message in (("gone.npz", "does not exist"), ("e.pt", "neither .npz nor .parquet")):
        if name == "e.pt":
            (tmp_path / name).touch()
        with pytest.raises(STGTError, match=message):
            read_embedding_file(str(tmp_path / name))
    for name in ("broken.npz", "broken.parquet"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(STGTError, match="is not an .npz file|is not a Parquet file"):
            read_embedding_file(str(tmp_path / name))
    table = pa.table({"kind": ["film"], "video_id": ["a"], "embedding": [[1.0]]})
    pq.write_table(table, tmp_path / "kinds.parquet")
    with pytest.raises(
        STGTError, match="the column kind contains film; use video, caption, further"
    ):
        read_embedding_file(str(tmp_path / "kinds.parquet"))
    table = pa.table({"kind": ["video"] * 2, "video_id": ["a", "b"], "embedding": [[1.0], [1, 2]]})
    pq.write_table(table, tmp_path / "widths.parquet")
    with pytest.raises(STGTError, match=r"videos have different widths \(1, 2\)"):
        read_embedding_file(str(tmp_path / "widths.parquet"))


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    whole = Path(save(tmp_path)).read_bytes()
    np.savez_compressed(tmp_path / "small.npz", **arrays())
    zipped = bytearray((tmp_path / "small.npz").read_bytes())
    zipped[80:400] = bytes(320)
    changed = bytearray(whole)
    changed[len(whole) // 3] ^= 0xFF
    np.save(tmp_path / "array.npy", arrays()["video_embeds"])
    pq_path = Path(save_table(tmp_path, arrays()))
    table = pq_path.read_bytes()
    middle = bytearray(table)
    middle[8 : len(table) // 2] = bytes(len(table) // 2 - 8)
    last = whole.rindex(b"PK\x05\x06")  # the end record, which says where the directory lies
    moved = whole[: last + 16] + (len(whole) * 3).to_bytes(4, "little") + whole[last + 20 :]
    renamed = table.replace(b"caption_row", b"caption\xffrow")
    for name, content, message in (
        ("moved.npz", moved, "is not an .npz file|is damaged"),
        ("renamed.parquet", renamed, "is not a Parquet file, or is damaged"),
        ("empty.npz", b"", "is not an .npz file"),
        ("half.npz", whole[: len(whole) // 2], "or only a part of one"),
        ("renamed.npz", (tmp_path / "array.npy").read_bytes(), "is not an .npz file"),
        ("zeros.npz", bytes(zipped), "is damaged"),
        ("bit.npz", bytes(changed), "is damaged"),
        ("empty.parquet", b"", "is not a Parquet file, or is damaged"),
        ("half.parquet", table[: len(table) // 2], "is not a Parquet file, or is damaged"),
        ("zeros.parquet", bytes(middle), "is not a Parquet file, or is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(STGTError, match=message):
            read_embedding_file(str(tmp_path / name))
    for name in ("folder.npz", "folder.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(STGTError, match="is a folder; give a .npz or .parquet file"):
            read_embedding_file(str(tmp_path / name))


def test_ids_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    ids = np.array([one.encode() for one in IDS])
    assert read_embedding_file(save(tmp_path, video_ids=ids)).video_ids == IDS
    ids[3] = b"caf\xe9"
    with pytest.raises(STGTError, match="video_ids contains a text that is not UTF-8"):
        read_embedding_file(save(tmp_path, video_ids=ids))
    path = save_table(tmp_path, arrays())
    table = pq.read_table(path)
    for kind in (pa.binary(), pa.string()):
        column = pa.array([b"caf\xe9"] * len(table), pa.binary())
        if kind == pa.string():
            column = pa.Array.from_buffers(kind, len(table), column.buffers())
        pq.write_table(table.set_column(1, "video_id", column), path)
        with pytest.raises(STGTError, match="video_id contains a text that is not UTF-8"):
            read_embedding_file(path)
    pq.write_table(table.set_column(1, "video_id", pa.nulls(len(table), pa.string())), path)
    with pytest.raises(STGTError, match="row 0 of kind video has no video_id"):
        read_embedding_file(path)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_tiny_and_huge_vectors_keep_their_direction(tmp_path: Path, scale: float) -> None:
    """In float32, their squares are zero or infinite."""
    values = arrays()
    scaled = values["video_embeds"].astype(np.float64) * scale
    file = read_embedding_file(save(tmp_path, video_embeds=scaled))
    np.testing.assert_allclose(file.videos, values["video_embeds"], atol=1e-6)
    assert not file.was_normalized
    if abs(np.log10(scale)) < 38:
        file = read_embedding_file(save(tmp_path, video_embeds=scaled.astype(np.float32)))
        np.testing.assert_allclose(file.videos, values["video_embeds"], atol=1e-6)
    table = save_table(tmp_path, {**values, "video_embeds": scaled}, precise=True)
    np.testing.assert_allclose(read_embedding_file(table).videos, values["video_embeds"], atol=1e-6)


def test_numbers_of_captions_may_be_written_by_pandas(tmp_path: Path) -> None:
    """A column of whole numbers with empty places is one of float64 there."""
    scores = np.random.default_rng(1).normal(size=(20, VIDEOS))
    path = save_table(tmp_path, arrays(), scores)
    table = pq.read_table(path)
    column = table.schema.get_field_index("caption_row")
    rows = table["caption_row"].cast(pa.float64())
    pq.write_table(table.set_column(column, "caption_row", rows), path)
    np.testing.assert_array_equal(read_embedding_file(path).pair_scores, scores)
    for bad, message in ((0.5, "is 0.5, which is not the number"), (20.0, "is 20.0, which is not")):
        changed = pa.array([bad if one == 3 else one for one in rows.to_pylist()])
        pq.write_table(table.set_column(column, "caption_row", changed), path)
        with pytest.raises(STGTError, match=f"caption_row of a pair {message}"):
            read_embedding_file(path)
    changed = pa.array([None if one == 3 else one for one in rows.to_pylist()])
    pq.write_table(table.set_column(column, "caption_row", changed), path)
    with pytest.raises(STGTError, match="12 pairs, such as row 36 of kind pair, need either"):
        read_embedding_file(path)


def test_a_pair_given_twice_is_refused(tmp_path: Path) -> None:
    path = save_table(tmp_path, arrays(), np.zeros((20, VIDEOS)))
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(len(table) - 1)]), path)
    with pytest.raises(STGTError, match="pair of caption 19 and clip11 more than once; keep one"):
        read_embedding_file(path)


def test_float64_scores_are_ranked_as_given(tracked: Path) -> None:
    """Scores that are equal in float32, and scores that are infinite there."""
    generator = np.random.default_rng(5)
    places = generator.permuted(np.tile(np.arange(VIDEOS), (20, 1)), axis=1)
    for name, scores in (
        ("close", 0.9 + 1e-12 * (places + generator.random(places.shape))),
        ("huge", (1.0 + places + generator.random(places.shape)) * 1e300),
    ):
        assert len(np.unique(scores)) == scores.size
        file = save(tracked, f"{name}.npz", pair_scores=scores)
        summary = run_evaluate(config_of(tracked, file, output=str(tracked / name), resamples=0))
        for metric, value in by_hand(scores).items():
            assert summary["metrics"][metric] == pytest.approx(value), (name, metric)
    wide = np.zeros((20, VIDEOS), dtype=np.longdouble)
    if wide.itemsize > 8:
        with pytest.raises(STGTError, match="numbers of at most 64 bits"):
            read_embedding_file(save(tracked, pair_scores=wide))


def test_ids_that_do_not_match_the_gallery_are_named(tmp_path: Path) -> None:
    values = arrays()
    first = {key: value[:VIDEOS] for key, value in values.items()}
    path = manifest(tmp_path, [*IDS[1:], "clip99"], CAPTIONS[:VIDEOS])
    with pytest.raises(
        STGTError,
        match=r"1 videos have no embedding \(clip99\), and 1 embeddings are of other videos "
        r"\(clip0\)",
    ):
        run_evaluate(config_of(tmp_path, save(tmp_path, **first), manifest=path))


def test_a_model_and_a_file_cannot_both_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="data and checkpoint: give data and checkpoint"):
        EvaluateConfig(output="o")
    with pytest.raises(SettingError, match="checkpoint: give data and checkpoint"):
        EvaluateConfig(output="o", data="d")
    with pytest.raises(SettingError, match="checkpoint = 'c': must be omitted with embedding_file"):
        EvaluateConfig(output="o", embedding_file="e.npz", checkpoint="c")
    with pytest.raises(SettingError, match="needs a checkpoint; with embedding_file"):
        EvaluateConfig(output="o", embedding_file="e.npz", leakage_against=("recorded",))


@pytest.mark.ray
def test_videos_of_a_store_add_frames_and_the_check_for_leakage(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    store = ClipStore(tiny_data.val_store)
    clips = [
        clip
        for shard in range(len(store.shard_sizes))
        for clip in store.read_shard(shard, ["clip_id", "captions"]).to_pylist()
    ]
    generator = np.random.default_rng(0)
    embeds = unit(generator.normal(size=(len(clips), WIDTH)))
    order = generator.permutation(len(clips))
    file = save(
        tmp_path,
        video_ids=np.array([clips[n]["clip_id"] for n in order]),
        video_embeds=embeds[order],
        caption_video_ids=np.array([clip["clip_id"] for clip in clips]),
        caption_embeds=embeds,
        captions=np.array([clip["captions"][0] for clip in clips]),
    )
    against = (tiny_data.train_store, tiny_data.val_store)
    summary = run_evaluate(
        config_of(tmp_path, file, data=tiny_data.val_store, leakage_against=against)
    )
    assert summary["metrics"]["sim/t2v/R1"] == 100
    assert summary["picture"] is not None
    assert Path(summary["picture"]).exists()
    page = Path(summary["report"]).read_text()
    assert page.count("data:image/jpeg") == 6 * 5
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    leaked = result["leakage"]["leaked"]
    assert [one["clip_id"] for one in leaked] == [clip["clip_id"] for clip in clips]
    assert {one["by"] for one in leaked} == {"id and frames"}
    assert f"{len(clips)} of the test clips are in the training data" in page
    assert "Test clips in the training data" in page
