"""Captions that differ in the order of events, scored against brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common.config import TrackingConfig
from pipelines.compare.config import CompareConfig
from pipelines.compare.run import run_compare
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.order_pairs import OrderResult
from pipelines.evaluate.run import run_evaluate
from pipelines.video.synthetic.dataset import plan_videos
from pipelines.video.synthetic.order_pairs import counterparts, write_order_pairs
from pipelines.video.synthetic.scenes import OPPOSITE, Scene, all_scenes
from stgt.errors import STGTError
from stgt.inputs.frame_choice import choose_frames
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData


def test_counterparts_differ_only_in_order_or_direction() -> None:
    scene = Scene("red", "cross", "teal", ("moves left", "grows"))
    assert [(kind, other.events) for kind, other in counterparts(scene)] == [
        ("order", ("grows", "moves left")),
        ("direction", ("moves right", "grows")),
        ("direction", ("moves left", "shrinks")),
    ]
    back = Scene("red", "cross", "teal", ("moves left", "moves right"))
    assert [kind for kind, _ in counterparts(back)] == ["order"]


def test_each_caption_is_as_often_true_as_not() -> None:
    """So the accuracy of a model that ignores the video is 50 % over all scenes."""
    pairs = [
        (scene.caption(), other.caption(), kind)
        for scene in all_scenes()
        for kind, other in counterparts(scene)
    ]
    assert {(b, a, kind) for a, b, kind in pairs} == set(pairs)
    assert all(sorted(a.split()) != [] and a != b for a, b, _ in pairs)
    assert all(sorted(a.split()) == sorted(b.split()) for a, b, kind in pairs if kind == "order")
    assert OPPOSITE["grows"] == "shrinks"


def embeddings(folder: Path, pairs: bool = True) -> tuple[str, str, dict[str, np.ndarray]]:
    """A file with four clips, their captions and false captions, and the table of pairs."""
    generator = np.random.default_rng(0)
    ids = [f"clip{n}" for n in range(4)]
    values = {
        "video_ids": np.array(ids),
        "video_embeds": generator.normal(size=(4, 2, 3)).astype(np.float32),
        "caption_video_ids": np.array(ids),
        "caption_embeds": generator.normal(size=(4, 3)).astype(np.float32),
        "captions": np.array([f"first {n}" for n in range(4)]),
        "further_embeds": generator.normal(size=(4, 2, 3)).astype(np.float32),
        "further_captions": np.array([f"then {n}" for n in range(4)]),
    }
    if pairs:
        values["pair_scores"] = generator.normal(size=(4, 4))
        values["further_pair_scores"] = generator.normal(size=(4, 4))
    for name in ("video_embeds", "caption_embeds", "further_embeds"):
        values[name] /= np.linalg.norm(values[name], axis=-1, keepdims=True)
    np.savez(folder / "e.npz", **values)
    rows = [
        {"clip_id": ids[n], "caption": f"first {n}", "counterpart": f"then {m}", "kind": kind}
        for n, m, kind in ((0, 0, "order"), (0, 1, "direction"), (1, 1, "order"), (3, 2, "order"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return str(folder / "e.npz"), str(folder / "pairs.parquet"), values


WANTED = [(0, 0, 0), (0, 0, 1), (1, 1, 1), (3, 3, 2)]
"""Video, caption and further text of each pair."""


def cosines_of(values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the captions and of the further texts with the videos, [4, 4] each."""
    videos = values["video_embeds"]
    return (
        np.einsum("nd,vqd->nvq", values["caption_embeds"], videos).max(2),
        np.einsum("ncd,vqd->nvqc", values["further_embeds"], videos).max((2, 3)),
    )


def rows_of(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The same file as rows of a .parquet, with the videos in another order."""
    rows: list[dict[str, Any]] = [
        {"kind": "video", "video_id": f"clip{n}", "embedding": values["video_embeds"][n].tolist()}
        for n in (2, 0, 3, 1)
    ]
    for n in range(4):
        embedding = [values["caption_embeds"][n].tolist()]
        rows.append({"kind": "caption", "video_id": f"clip{n}", "embedding": embedding})
        rows[-1]["caption"] = f"first {n}"
        embedding = values["further_embeds"][n].tolist()
        rows.append({"kind": "further", "caption": f"then {n}", "embedding": embedding})
    for row in range(4):
        for video in range(4):
            pair = {"kind": "pair", "video_id": f"clip{video}"}
            score = float(values["pair_scores"][row, video])
            rows.append({**pair, "caption_row": row, "score": score})
            score = float(values["further_pair_scores"][row, video])
            rows.append({**pair, "further_row": row, "score": score})
    return rows


SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("video_id", pa.string()),
        ("embedding", pa.list_(pa.list_(pa.float32()))),
        ("caption", pa.string()),
        ("caption_row", pa.float64()),
        ("further_row", pa.float64()),
        ("score", pa.float64()),
    ]
)


def config_of(folder: Path, file: str, pairs: str, **changes: Any) -> EvaluateConfig:
    values = {
        "embedding_file": file,
        "order_pairs": pairs,
        "output": str(folder / "out"),
        "resamples": 20,
        "tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.mark.slow
def test_pairs_are_scored_from_a_file_and_compared(
    tmp_path: Path, mlflow_database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    file, pairs, values = embeddings(tmp_path)
    summary = run_evaluate(config_of(tmp_path, file, pairs))
    for prefix, (right, wrong) in (
        ("sim/", cosines_of(values)),
        ("", (values["pair_scores"], values["further_pair_scores"])),
    ):
        success = np.array([right[a, v] > wrong[b, v] for v, a, b in WANTED])
        found = summary["metrics"]
        assert found[f"{prefix}order/accuracy"] == pytest.approx(100 * success.mean())
        assert found[f"{prefix}order/accuracy_direction"] == 100 * success[1]
    assert "4 pairs of captions" in summary["protocol"]["order pairs"]
    page = Path(summary["report"]).read_text()
    assert "Order of events" in page
    right, wrong = values["pair_scores"], values["further_pair_scores"]
    verdicts = [bool(right[a, v] > wrong[b, v]) for v, a, b in WANTED]
    shown = page[page.index('<div class="orders">') : page.index("<h2>Protocol")]
    assert shown.count('<figure class="right">') == sum(verdicts)
    assert shown.count('<figure class="wrong">') == len(verdicts) - sum(verdicts)
    changed = {**values, **{name: -values[name] for name in ("pair_scores", "further_pair_scores")}}
    np.savez(tmp_path / "other.npz", **changed)
    other = str(tmp_path / "other")
    run_evaluate(config_of(tmp_path, f"{other}.npz", pairs, output=other))
    config = CompareConfig(
        runs=(str(tmp_path / "out"), other), output=str(tmp_path / "page"), resamples=50
    )
    with caplog.at_level("INFO"):
        compared = run_compare(config)
    by_name = {one["metric"]: one for one in compared["differences"]["other"]}
    before = summary["metrics"]["order/accuracy"]
    assert by_name["order/accuracy"]["difference"] == pytest.approx(100 - 2 * before)
    assert by_name["sim/order/accuracy"]["difference"] == 0
    assert by_name["sim/order/accuracy"]["verdict"] == "no difference shown"
    page = (tmp_path / "page" / "compare.html").read_text()
    assert "order/accuracy_direction" in page
    assert "Leakage of test clips into training data: not checked" in page
    assert "order/accuracy" in caplog.text


def test_tables_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file, pairs, values = embeddings(tmp_path)
    table = pq.read_table(pairs)
    for name, changed, message in (
        ("lacks", table.drop_columns(["kind"]), "lacks the columns kind"),
        ("empty", table.slice(0, 0), "contains no pairs"),
        ("null", table.set_column(1, "caption", pa.nulls(4, pa.string())), "row 0 of .* an empty"),
        ("ids", table.set_column(0, "clip_id", pa.array(["x"] * 4)), r"1 clips .* gallery \(x\)"),
        (
            "kind",
            table.set_column(3, "kind", pa.array(["left <-> right"] * 4)),
            "row 0 .* names of",
        ),
        ("path", table.set_column(3, "kind", pa.array(["a/b"] * 4)), "kind 'a/b', but a kind is"),
        ("number", table.set_column(0, "clip_id", pa.array([7] * 4)), r"1 clips .* gallery \(7\)"),
        ("float", table.set_column(0, "clip_id", pa.array([7.0] * 4)), "clip_id .* type double"),
        ("list", table.set_column(1, "caption", pa.array([["x"]] * 4)), "caption of .* type list"),
        ("blank", table.set_column(1, "caption", pa.array([""] * 4)), "row 0 of .* an empty"),
        (
            "text",
            table.set_column(1, "caption", pa.array(["x"] * 4)),
            "no embedding of 1 of 4 texts, such as .x.; add them as further",
        ),
    ):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(changed, path)
        with pytest.raises(STGTError, match=message):
            run_evaluate(config_of(tmp_path, file, str(path), output=str(tmp_path / name)))
        assert not (tmp_path / name).exists()
    with pytest.raises(STGTError, match="does not exist; give a table"):
        run_evaluate(config_of(tmp_path, file, str(tmp_path / "gone.parquet")))
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    with pytest.raises(STGTError, match="is a folder; give a table"):
        run_evaluate(config_of(tmp_path, file, str(folder)))
    whole = Path(pairs).read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(STGTError, match="is not a Parquet file, or is damaged"):
        run_evaluate(config_of(tmp_path, file, str(tmp_path / "half.parquet")))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_false_captions_are_no_part_of_the_gallery(tmp_path: Path, mlflow_database: Path) -> None:
    """The gallery's metrics are those of the file without further texts, in both forms."""
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    file, pairs, values = embeddings(tmp_path)
    plain = {name: array for name, array in values.items() if not name.startswith("further")}
    np.savez(tmp_path / "plain.npz", **plain)
    changes: dict[str, Any] = {"resamples": 0, "output": str(tmp_path / "plain")}
    without = EvaluateConfig(
        embedding_file=str(tmp_path / "plain.npz"),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
        **changes,
    )
    wanted = run_evaluate(without)["metrics"]
    pq.write_table(pa.Table.from_pylist(rows_of(values), schema=SCHEMA), tmp_path / "e.parquet")
    found = []
    for name in ("e.npz", "e.parquet"):
        changes["output"] = str(tmp_path / name.replace(".", "-"))
        summary = run_evaluate(config_of(tmp_path, str(tmp_path / name), pairs, **changes))
        found.append(summary["metrics"])
        of_gallery = {key: one for key, one in summary["metrics"].items() if "order/" not in key}
        assert of_gallery == wanted
    assert found[0] == found[1]
    assert "order/accuracy" in found[0]


def test_pairs_that_differ_only_in_float64_are_no_ties(
    tmp_path: Path, mlflow_database: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    _, pairs, values = embeddings(tmp_path)
    for name, right, wrong in (("close", 0.5 + 1e-12, 0.5), ("huge", 2e300, 1e300)):
        values["pair_scores"] = np.full((4, 4), right)
        values["further_pair_scores"] = np.full((4, 4), wrong)
        np.savez(tmp_path / f"{name}.npz", **values)
        config = config_of(
            tmp_path, str(tmp_path / f"{name}.npz"), pairs, output=str(tmp_path / name), resamples=0
        )
        assert run_evaluate(config)["metrics"]["order/accuracy"] == 100


def test_files_without_the_texts_or_scores_of_pairs_are_refused(tmp_path: Path) -> None:
    _, pairs, values = embeddings(tmp_path)
    unscored = values["further_pair_scores"].copy()
    unscored[2, 3] = -np.inf
    for changes, message in (
        (
            {"further_captions": None, "further_embeds": None, "further_pair_scores": None},
            "no embedding of 3 of 6 texts, such as 'then 0'; add them as further texts, which",
        ),
        ({"captions": None}, "no embedding of 3 of 6 texts, such as 'first 0'"),
        ({"further_pair_scores": None}, "pair scores, but none of the text 'then 0'; add them as"),
        ({"further_pair_scores": unscored}, "no pair score for 1 of the 8 .* 'then 2' with clip3"),
        ({"further_captions": None}, "only a part of the further texts; give further_captions and"),
        ({"further_embeds": np.ones((3, 3))}, "3 embeddings for 4 ids of the further texts"),
        ({"further_embeds": np.ones((4, 2))}, "those of the further texts have width 2"),
        ({"further_pair_scores": np.zeros((4, 3))}, r"\[further texts, videos\], \[4, 4\]"),
    ):
        changed = {**values, **changes}
        file = tmp_path / "changed.npz"
        np.savez(file, **{name: array for name, array in changed.items() if array is not None})
        with pytest.raises(STGTError, match=message):
            run_evaluate(config_of(tmp_path, str(file), pairs))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_clips_may_be_numbers(tmp_path: Path, mlflow_database: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    _, pairs, values = embeddings(tmp_path, pairs=False)
    for name in ("video_ids", "caption_video_ids"):
        values[name] = np.arange(4)
    np.savez(tmp_path / "numbers.npz", **values)
    table = pq.read_table(pairs)
    column = pa.array([int(one.removeprefix("clip")) for one in table["clip_id"].to_pylist()])
    pq.write_table(table.set_column(0, "clip_id", column), pairs)
    metrics = run_evaluate(config_of(tmp_path, str(tmp_path / "numbers.npz"), pairs))["metrics"]
    right, wrong = cosines_of(values)
    success = [right[a, v] > wrong[b, v] for v, a, b in WANTED]
    assert metrics["sim/order/accuracy"] == pytest.approx(100 * np.mean(success))
    assert "order/accuracy" not in metrics


@pytest.mark.parametrize("matches", [True, False])
def test_the_pairs_that_are_shown_are_spread_over_those_that_were_scored(matches: bool) -> None:
    unusable = 3
    scores = pa.array([float(row) if row != unusable else -math.inf for row in range(10)])
    name, other = ("score", "sim") if matches else ("sim", "score")
    table = pa.table(
        {
            "clip_id": [f"clip{row}" for row in range(10)],
            "kind": ["order"] * 10,
            "caption": [f"true {row}" for row in range(10)],
            "counterpart": [f"false {row}" for row in range(10)],
            f"{name}_caption": scores,
            f"{name}_counterpart": pa.array([4.5] * 10),
            f"{other}_caption": pa.array([0.25] * 10) if matches else pa.nulls(10, pa.float32()),
            f"{other}_counterpart": pa.array([0.5] * 10) if matches else pa.nulls(10, pa.float32()),
        }
    )
    result = OrderResult(table, {}, {})
    shown = result.examples(3)
    assert [one.clip_id for one in shown] == ["clip0", "clip5", "clip9"]
    assert [one.score for one in shown] == [0.0, 5.0, 9.0]
    assert {one.counterpart_score for one in shown} == {4.5}
    assert shown[1].caption == "true 5"
    assert len(result.examples(100)) == 9


@pytest.mark.ray
def test_pairs_of_generated_clips_are_those_of_the_model_called_by_hand(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    videos = plan_videos(num_train=40, num_val=12, seed=0)["val"]
    pairs = str(tmp_path / "pairs.parquet")
    count = write_order_pairs(pairs, videos)
    config = EvaluateConfig(
        data=tiny_data.val_store,
        checkpoint=save_untrained(tiny_data, tmp_path),
        output=str(tmp_path / "out"),
        order_pairs=pairs,
        leakage_against=(tiny_data.train_store,),
        k_rerank=3,
        resamples=10,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    summary = run_evaluate(config)
    rows = pq.read_table(pairs).to_pylist()
    assert len(rows) == count
    store = ClipStore(tiny_data.val_store)
    clips = {
        c["clip_id"]: c
        for n in range(len(store.shard_sizes))
        for c in store.read_shard(n).to_pylist()
    }
    model, tokenizer = checkpoints.load(config.checkpoint_uri)
    model.eval()
    chosen = choose_frames(12, 6, "uniform")
    by_cosine, by_both = [], []
    for row in rows:
        frames = store.decode([clips[row["clip_id"]]["frames"][i] for i in chosen])
        text = tokenizer([row["caption"], row["counterpart"]], 32)
        with torch.no_grad():
            video = model.encode_video(torch.from_numpy(frames[None]))
            cosine = video.similarity(model.encode_text(text))[0]
            tokens = video.tokens.expand(2, -1, -1)
            match = model.match(tokens, text).softmax(1)[:, 1]
        by_cosine.append(cosine.tolist())
        by_both.append((cosine + match).tolist())
    table = pq.read_table(tmp_path / "out" / "order_pairs.parquet")
    for column, wanted in (("sim", by_cosine), ("score", by_both)):
        found = np.stack(
            [table[f"{column}_{one}"].to_numpy() for one in ("caption", "counterpart")]
        )
        np.testing.assert_allclose(found.T, wanted, atol=1e-5)
        right = found[0] > found[1]
        prefix = "sim/" if column == "sim" else ""
        assert summary["metrics"][f"{prefix}order/accuracy"] == pytest.approx(100 * right.mean())
    page = Path(summary["report"]).read_text()
    shown = page[page.index('<div class="orders">') : page.index("<h2>Protocol")]
    assert shown.count('src="data:image/jpeg;base64,') == shown.count("<figure") == 12
    picture = Image.open(tmp_path / "out" / "retrieval.png").convert("RGB")
    first = table["clip_id"][0].as_py()  # the clip of the first pair that is drawn
    frame = store.decode([clips[first]["frames"][choose_frames(12, 4, "middle")[0]]])[0]
    small = np.asarray(Image.fromarray(frame).resize((44, 44)))
    drawn = np.asarray(picture)
    places = [y for y in range(len(drawn) - 44) if (drawn[y : y + 44, 12:56] == small).all()]
    assert places, "the picture shows no frame of the first pair"
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["leakage"]["checked"]
    assert result["leakage"]["by_frames"]
    assert {one["by"] for one in result["leakage"]["leaked"]} <= {"frames"}
    assert "compared by id and by 64-bit hashes" in summary["protocol"]["leakage"]
