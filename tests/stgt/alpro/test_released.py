"""ALPRO's released files are imported and exported exactly, and pickles cannot run code."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stgt.alpro.config import alpro_tiny
from stgt.alpro.model import Alpro
from stgt.alpro.released import (
    UnstoredSizes,
    export_alpro,
    import_alpro,
    our_name,
    published_name,
    resized_positions,
)
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.model_folder import resized_times

WORDS, WIDTH = 30, 16
HEADS = UnstoredSizes(vision_heads=4, text_heads=4, fusion_layer=1)
State = dict[str, torch.Tensor]


def a_model(num_answers: int = 0) -> Alpro:
    torch.manual_seed(0)
    sizes = alpro_tiny(WORDS)
    return Alpro(
        replace(
            sizes,
            vision=replace(sizes.vision, width=WIDTH, mlp_width=2 * WIDTH),
            text=replace(sizes.text, mlp_width=2 * WIDTH),
            num_answers=num_answers,
        )
    )


def published_state(num_answers: int = 0) -> State:
    """A small model's tensors with their published names, as the authors' code builds them."""
    model = a_model(num_answers)
    wrapped = not num_answers
    return {
        published_name(name, wrapped): tensor.clone() for name, tensor in model.state_dict().items()
    }


def retrieval_file() -> State:
    state = published_state()
    width = state["itm_head.weight"].shape[1]
    return {
        **state,
        "text_encoder.bert.embeddings.position_ids": torch.arange(64)[None],
        "text_encoder.cls.predictions.bias": torch.zeros(WORDS),
        "text_encoder.cls.predictions.decoder.weight": torch.zeros(WORDS, width),
        "visual_encoder.model.head.weight": torch.zeros(400, width),
        "visual_encoder.model.head.bias": torch.zeros(400),
    }


def pretraining_file() -> State:
    state = retrieval_file()
    teacher = {f"prompter.{name}": tensor for name, tensor in state.items()}
    return {
        **state,
        **teacher,
        "prompter.video_prompt_feat": torch.zeros(10, 64),
        "mpm_head.0.weight": torch.zeros(2, 2),
    }


def questions_file() -> State:
    state = published_state(num_answers=7)
    return {**state, "text_encoder.embeddings.position_ids": torch.arange(64)[None]}


FILES = {
    "retrieval": retrieval_file,
    "pre-training": pretraining_file,
    "question answering": questions_file,
}


def saved(path: Path, state: State, wrapped: bool = False) -> Path:
    torch.save({"model": state} if wrapped else state, path)
    return path


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "under model"])
def test_each_kind_of_file_is_imported_with_every_value(
    kind: str, wrapped: bool, tmp_path: Path
) -> None:
    state = FILES[kind]()
    model, report = import_alpro(saved(tmp_path / "released.pt", state, wrapped), HEADS)
    assert report.found == f"ALPRO, {kind}"
    ours = model.state_dict()
    read = {name for name in state if our_name(name) in ours and not name.startswith("prompter.")}
    assert {our_name(name) for name in read} == set(ours)
    for name in read:
        assert torch.equal(ours[our_name(name)], state[name]), name
    assert report.read == len(ours)
    # Whatever was not read is named.
    assert read | set(report.not_used) | set(report.constant) == set(state)
    assert not model.training


@pytest.mark.parametrize("kind", FILES)
def test_a_model_survives_export_and_import(kind: str, tmp_path: Path) -> None:
    model, _ = import_alpro(saved(tmp_path / "released.pt", FILES[kind]()), HEADS)
    state = export_alpro(model)
    again, report = import_alpro(saved(tmp_path / "exported.pt", state), HEADS)
    assert again.config == model.config
    assert report.not_used == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # Every exported name is one of the released file, with its shape.
    released = FILES[kind]()
    assert {n: t.shape for n, t in state.items()}.items() <= {
        n: t.shape for n, t in released.items()
    }.items()


def test_names_of_every_tensor_are_inverted() -> None:
    for wrapped in (False, True):
        for name in a_model(num_answers=3).state_dict():
            assert our_name(published_name(name, wrapped)) == name
    assert our_name("visual_encoder.model.blocks.1.temporal_attn.proj.bias") == (
        "video_encoder.encoder.layer.1.temporal_attention.output.dense.bias"
    )
    assert published_name("text_encoder.encoder.layer.0.output.dense.bias", wrapped=True) == (
        "text_encoder.bert.encoder.layer.0.output.dense.bias"
    )


@pytest.mark.parametrize("kind", FILES)
def test_missing_unexpected_and_misshapen_tensors_are_all_listed(kind: str, tmp_path: Path) -> None:
    state = FILES[kind]()
    del state["visual_encoder.model.blocks.1.norm2.bias"]
    state["visual_encoder.model.dist_token"] = torch.zeros(1)
    state["visual_encoder.model.norm.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointMismatchError) as caught:
        import_alpro(saved(tmp_path / "released.pt", state), HEADS)
    assert caught.value.missing == ["visual_encoder.model.blocks.1.norm2.bias"]
    assert caught.value.unexpected == [
        "visual_encoder.model.dist_token",
        f"visual_encoder.model.norm.weight [5] (model [{WIDTH}])",
    ]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("retrieval", "mask_head.weight"),
        ("pre-training", "mask_head.weight"),
        ("question answering", "text_encoder.cls.predictions.bias"),
    ],
)
def test_leftovers_are_permitted_by_kind_only(kind: str, name: str, tmp_path: Path) -> None:
    state = {**FILES[kind](), name: torch.zeros(3)}
    with pytest.raises(CheckpointMismatchError, match=re.escape(name)):
        import_alpro(saved(tmp_path / "released.pt", state), HEADS)


def test_a_file_for_questions_may_lack_the_heads_of_retrieval(tmp_path: Path) -> None:
    heads = ("temp", "vision_proj", "text_proj", "itm_head")
    state = {n: t for n, t in questions_file().items() if not n.startswith(heads)}
    model, report = import_alpro(saved(tmp_path / "released.pt", state), HEADS)
    assert set(report.neutral) == set(questions_file()) - set(state)
    assert torch.count_nonzero(model.itm_head.weight) == 0
    assert model.temperature.item() == pytest.approx(model.config.temperature)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_file_for_questions_with_part_of_the_heads_is_refused(tmp_path: Path) -> None:
    state = {n: t for n, t in questions_file().items() if not n.startswith("itm_head")}
    with pytest.raises(CheckpointMismatchError) as caught:
        import_alpro(saved(tmp_path / "released.pt", state), HEADS)
    assert caught.value.missing == ["itm_head.bias", "itm_head.weight"]


def test_position_ids_must_count_from_zero(tmp_path: Path) -> None:
    state = retrieval_file()
    state["text_encoder.bert.embeddings.position_ids"] = torch.arange(1, 65)[None]
    with pytest.raises(CheckpointError, match="does not count from 0 to 63"):
        import_alpro(saved(tmp_path / "released.pt", state), HEADS)


def test_bert_in_two_places_is_refused(tmp_path: Path) -> None:
    state = retrieval_file()
    name = "text_encoder.embeddings.word_embeddings.weight"
    state[name] = torch.zeros(WORDS, WIDTH)
    with pytest.raises(CheckpointMismatchError, match=re.escape(name)):
        import_alpro(saved(tmp_path / "released.pt", state), HEADS)


class RunsCode:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({**retrieval_file(), "x": RunsCode(trace)}, tmp_path / "released.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        import_alpro(tmp_path / "released.pt", HEADS)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(RunsCode(trace)))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        import_alpro(tmp_path / "plain.pt", HEADS)
    assert not trace.exists()


def test_time_embeddings_are_resized_to_twice_the_frames(tmp_path: Path) -> None:
    state = retrieval_file()
    name = "visual_encoder.model.time_embed"
    state[name] = torch.arange(8.0)[None, :, None].expand(1, 8, WIDTH).clone()
    model, report = import_alpro(saved(tmp_path / "released.pt", state), HEADS, num_frames=16)
    table = model.state_dict()["video_encoder.embeddings.time_embeddings"]
    assert table[0, :, 0].tolist() == [i // 2 for i in range(16)]
    assert model.config.num_frames == 16
    assert report.resized == [f"{name}: 8 to 16 frames, nearest neighbor"]
    assert resized_times(table, 8)[0, :, 0].tolist() == list(range(8))


def test_positions_are_resized_over_the_grid_or_as_a_list() -> None:
    """From a 2x2 to a 3x3 grid: rows and columns repeat, or the list of four is stretched."""
    table = torch.tensor([9.0, 0.0, 1.0, 2.0, 3.0])[None, :, None]
    grid = resized_positions(table, 3, "grid")[0, :, 0].tolist()
    assert grid == [9, 0, 0, 1, 0, 0, 1, 2, 2, 3]
    flat = resized_positions(table, 3, "flat")[0, :, 0].tolist()
    assert flat == [9] + [i * 4 // 9 for i in range(9)]


def test_another_image_size_resizes_positions(tmp_path: Path) -> None:
    model, report = import_alpro(
        saved(tmp_path / "released.pt", retrieval_file()), HEADS, image_size=32
    )
    assert model.config.vision.grid == 2
    assert report.resized[0].endswith("4x4 to 2x2 patches, nearest neighbor over the grid")
    with torch.no_grad():
        tokens = model.video_tokens(torch.zeros(1, 6, 32, 32, 3, dtype=torch.uint8))
    assert tokens.shape == (1, 5, WIDTH)
