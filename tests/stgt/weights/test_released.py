"""Released files are imported and exported exactly, and pickles cannot run code."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.export.weights.config import ExportConfig, ImportConfig
from pipelines.export.weights.export import run_export
from pipelines.export.weights.run import run_import
from stgt import STGT, stgt_tiny
from stgt.config import VisionConfig
from stgt.errors import CheckpointError
from stgt.model_folder import load_model, save_model
from stgt.weights.released import (
    HeadCounts,
    export_published,
    import_published,
    our_name,
    published_name,
    read_pickle,
)
from tests.helpers.data import PROJECT

ENCODER = "visual_encoder."


TRAINING_CODE = """
class Scheduler:
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.lr = 1e-5
"""


@pytest.fixture
def authors_scheduler() -> Iterator[type]:
    """A class of the authors' training code, present only while a file is written."""
    names = ["authors", "authors.common", "authors.common.optims"]
    modules = {name: types.ModuleType(name) for name in names}
    sys.modules.update(modules)
    exec(TRAINING_CODE, vars(modules[names[-1]]))
    yield modules[names[-1]].Scheduler
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def released(reference_dir: Path) -> dict[str, torch.Tensor]:
    """Return small random weights under the published names, including the frozen encoder's."""
    return load_file(reference_dir / "stgt" / "weights.safetensors")


@pytest.fixture(scope="module")
def fixture(reference_dir: Path) -> dict:
    return json.loads((reference_dir / "stgt" / "fixture.json").read_text())


@pytest.fixture(scope="module")
def listing(reference_dir: Path) -> dict:
    return json.loads((reference_dir / "released_checkpoints.json").read_text())


def trained_part(released: dict[str, torch.Tensor], listing: dict) -> dict[str, torch.Tensor]:
    """Return the small weights in the form of a released file."""
    state = {
        name: tensor
        for name, tensor in released.items()
        if not name.startswith(ENCODER) and name != "graph_cross_model.pos_2D_embed"
    }
    positions = state["Qformer.bert.embeddings.position_embeddings.weight"].shape[0]
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(positions)[None]
    words = state["Qformer.bert.embeddings.word_embeddings.weight"]
    state["Qformer.cls.predictions.decoder.weight"] = words
    state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    return state


def encoder_part(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an encoder's file: half precision, with an extra norm and head."""
    state = {
        name.removeprefix(ENCODER): tensor.half()
        for name, tensor in released.items()
        if name.startswith(ENCODER)
    }
    width = state["cls_token"].shape[-1]
    state["norm.weight"] = torch.ones(width).half()
    state["head.weight"] = torch.zeros(3, width).half()
    return state


def heads_of(fixture: dict) -> HeadCounts:
    config = fixture["config"]
    return HeadCounts(vision=config["vit_heads"], graph=16, qformer=config["q_heads"])


@pytest.fixture
def files(
    released: dict[str, torch.Tensor],
    listing: dict,
    authors_scheduler: type,
    tmp_path: Path,
) -> tuple[Path, Path]:
    """Write files in the released form: optimizer, config, scaler, epoch and a pickled object."""
    state = trained_part(released, listing)
    weights = [torch.nn.Parameter(tensor.clone()) for tensor in list(state.values())[:2]]
    optimizer = torch.optim.AdamW(weights)
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    contents: dict[str, Any] = {
        "model": collections.OrderedDict(state),
        "optimizer": optimizer.state_dict(),
        "config": {"run": {"lr": 1e-5}},
        "scaler": None,
        "epoch": 4,
        "lr_scheduler": authors_scheduler(optimizer),
    }
    torch.save(contents, tmp_path / "stgt.pth")
    torch.save(encoder_part(released), tmp_path / "eva_vit_g.pth")
    return tmp_path / "stgt.pth", tmp_path / "eva_vit_g.pth"


def test_the_files_form_is_the_released_one(
    files: tuple[Path, Path], listing: dict, fixture: dict
) -> None:
    contents = torch.load(files[0], weights_only=False)
    assert contents.keys() == listing["file_layout"].keys()
    # Only names outside layers are compared: the number of layers differs.
    first = {n for n in listing["released_checkpoint"] if ".layer." not in n}
    assert first <= contents["model"].keys()


def test_names_translate_both_ways(listing: dict) -> None:
    names = [*listing["released_checkpoint"], *listing["frozen_not_in_checkpoint"]]
    translated = [our_name(name) for name in names]
    assert len(set(translated)) == len(names)
    assert [published_name(name) for name in translated] == names


def test_an_imported_model_is_the_one_that_was_released(
    files: tuple[Path, Path], released: dict[str, torch.Tensor], fixture: dict
) -> None:
    model, report = import_published(files[0], files[1], heads_of(fixture))
    state = model.state_dict()
    for name, tensor in released.items():
        ours = our_name(name)
        if ours == "graph.pos_2D_embed":
            assert not state[ours].any()
        elif ours in state:
            wanted = tensor.half().float() if name.startswith(ENCODER) else tensor
            assert torch.equal(state[ours], wanted), name
    assert list(report.neutral) == ["graph_cross_model.pos_2D_embed"]
    assert "zeros" in report.neutral["graph_cross_model.pos_2D_embed"]
    assert len(report.tied) == 2
    assert set(report.not_used) == {"norm.weight", "head.weight"}
    assert report.read == len(state) - 1


def test_exporting_gives_back_every_tensor_bit_for_bit(
    files: tuple[Path, Path], fixture: dict, tmp_path: Path
) -> None:
    model, _ = import_published(files[0], files[1], heads_of(fixture))
    wanted = read_pickle(files[0])["model"]
    exported = export_published(model)
    assert exported.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], tensor), name


@pytest.mark.slow
def test_the_job_writes_a_model_that_loads_and_exports(
    files: tuple[Path, Path], fixture: dict, tmp_path: Path
) -> None:
    heads = heads_of(fixture)
    flags = [f"--vision-heads={heads.vision}", f"--qformer-heads={heads.qformer}"]
    imported = run_job(
        "import_weights",
        f"--checkpoint={files[0]}",
        f"--vision={files[1]}",
        f"--output={tmp_path / 'model'}",
        *flags,
    )
    assert imported.returncode == 0, imported.stderr
    summary = json.loads(imported.stdout)
    assert summary["neutral"] == ["graph_cross_model.pos_2D_embed"]
    assert "is not in the released files; filled with zeros" in imported.stderr
    model = STGT.from_pretrained(tmp_path / "model")
    assert model.count_parameters().total == summary["parameters"]
    report = json.loads((tmp_path / "model" / "import_report.json").read_text())
    assert report["read"] == summary["tensors"]

    exported = run_export(
        ExportConfig(model=str(tmp_path / "model"), output=str(tmp_path / "back.pth"))
    )
    back, wanted = read_pickle(tmp_path / "back.pth")["model"], read_pickle(files[0])["model"]
    assert exported["tensors"] == len(wanted)
    assert all(torch.equal(back[name], tensor) for name, tensor in wanted.items())

    again = ImportConfig(checkpoint=str(files[0]), output=str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="is not empty; choose another --output"):
        run_import(again)


def run_job(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_its_file_only_the_published_encoder_is_known(
    files: tuple[Path, Path], fixture: dict, released: dict[str, torch.Tensor]
) -> None:
    assert released["ln_vision.weight"].numel() != VisionConfig.width
    with pytest.raises(CheckpointError, match="pass the encoder's file with --vision"):
        import_published(files[0], None, heads_of(fixture))


def rewritten(files: tuple[Path, Path], change: Any) -> Path:
    contents = torch.load(files[0], weights_only=False)
    change(contents["model"])
    path = files[0].with_name("changed.pth")
    torch.save(contents, path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.pop("itm_head.bias"), r"missing \['itm_head.bias'\]"),
        (lambda model: model.pop("vision_proj.weight"), r"missing \['vision_proj.weight'\]"),
        (
            lambda model: model.update({"itm_head.bias": torch.zeros(3)}),
            r"unexpected \['itm_head.bias \[3\] \(model \[2\]\)'\]",
        ),
        (
            lambda model: model.update({"decoder.extra": torch.zeros(3)}),
            r"unexpected \['decoder.extra'\]",
        ),
        # Our names, which would replace a published tensor.
        (
            lambda model: model.update({"video_proj.weight": model["vision_proj.weight"]}),
            r"unexpected \['video_proj.weight'\]",
        ),
        (
            lambda model: model.update({"visual_encoder.cls_token": torch.zeros(1, 1, 3)}),
            r"unexpected \['visual_encoder.cls_token'\]",
        ),
        (
            lambda model: model.update({"graph_cross_model.pos_2D_embed": torch.zeros(1)}),
            r"graph_cross_model.pos_2D_embed \[1\]",
        ),
        (
            lambda model: model.update({"itm_head.bias": torch.zeros(2, dtype=torch.int64)}),
            r"itm_head.bias torch.int64 \(model torch.float32\)",
        ),
        (
            lambda model: model.update({"itm_head.bias": torch.zeros(2).to_sparse()}),
            "has entries that are not plain tensors: itm_head.bias",
        ),
        (
            lambda model: model.update({"ln_vision.weight": torch.tensor(1.0)}),
            r"ln_vision.weight \[\] \(expected 1 dimensions\)",
        ),
        (
            lambda model: model.update(
                {"Qformer.bert.embeddings.position_ids": torch.arange(3)[None]}
            ),
            "position_ids does not count",
        ),
        (
            lambda model: model.update(
                {
                    "Qformer.cls.predictions.decoder.bias": 1
                    + model["Qformer.cls.predictions.decoder.bias"]
                }
            ),
            "to which the published model ties it",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    files: tuple[Path, Path], fixture: dict, change: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        import_published(rewritten(files, change), files[1], heads_of(fixture))


def test_a_position_table_in_the_file_is_used(
    files: tuple[Path, Path], fixture: dict, released: dict[str, torch.Tensor]
) -> None:
    table = released["graph_cross_model.pos_2D_embed"]
    changed = rewritten(
        files, lambda model: model.update({"graph_cross_model.pos_2D_embed": table})
    )
    model, report = import_published(changed, files[1], heads_of(fixture))
    assert torch.equal(model.graph.pos_2D_embed, table)
    assert report.neutral == {}


def test_a_model_whose_encoder_was_trained_is_not_exported(fixture: dict) -> None:
    with pytest.raises(ValueError, match="a released file cannot store"):
        export_published(STGT(stgt_tiny()))


def test_a_checkpoint_without_its_encoder_is_exported_all_the_same(
    files: tuple[Path, Path], fixture: dict, tmp_path: Path
) -> None:
    model, _ = import_published(files[0], files[1], heads_of(fixture))
    save_model(model, tmp_path / "part")
    run_export(ExportConfig(model=str(tmp_path / "part"), output=str(tmp_path / "back.pth")))
    back, wanted = read_pickle(tmp_path / "back.pth")["model"], read_pickle(files[0])["model"]
    assert back.keys() == wanted.keys()
    bare = load_model(tmp_path / "part", needs_frame_encoder=False)
    size = bare.config.vision.image_size
    with pytest.raises(CheckpointError, match="loaded without its frozen frame encoder"):
        bare.encode_video(torch.zeros(1, 1, 3, size, size))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(files: tuple[Path, Path], share: float) -> None:
    data = files[0].read_bytes()
    files[0].write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"stgt.pth cannot be read as a checkpoint"):
        import_published(files[0])


class Attack:
    """Runs a command when it is unpickled without precautions."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, subprocess.getoutput, getattr, torch.hub.load]
)
@pytest.mark.parametrize("old_format", [False, True])
def test_a_hostile_pickle_is_refused_and_does_nothing(
    tmp_path: Path, function: Any, old_format: bool
) -> None:
    trace = tmp_path / "trace"
    attack = Attack(function, f"touch {trace}")
    torch.save(
        {"model": {"query_tokens": torch.zeros(1)}, "lr_scheduler": attack},
        tmp_path / "bad.pth",
        _use_new_zipfile_serialization=not old_format,
    )
    with pytest.raises(CheckpointError, match=r"bad.pth (references|cannot be read)"):
        read_pickle(tmp_path / "bad.pth")
    assert not trace.exists()


def test_objects_of_training_code_are_inert(files: tuple[Path, Path]) -> None:
    scheduler = read_pickle(files[0])["lr_scheduler"]
    assert type(scheduler).__module__ == "stgt.published"
    assert vars(scheduler) == {}


def test_crafted_contents_never_escape_as_another_error(tmp_path: Path) -> None:
    for number, data in enumerate([b"\x80\x02R.", b"\x80\x02}(K\x01K\x02u.", b"\x80\x02N0.", b""]):
        path = tmp_path / f"{number}.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
        with pytest.raises(CheckpointError):
            import_published(path)


@pytest.mark.parametrize(
    "contents", [[1, 2], {"model": {}}, {"model": {"a": "text"}}, torch.zeros(3)]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, contents: Any) -> None:
    torch.save(contents, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not a released checkpoint"):
        import_published(tmp_path / "other.pth")


def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_pickle(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_pickle(tmp_path / "y.pth")
    (tmp_path / "z.pth").write_bytes(pickle.dumps(Attack(os.getcwd)))
    with pytest.raises(CheckpointError):
        read_pickle(tmp_path / "z.pth")


def test_positions_of_another_image_size_are_resized(
    files: tuple[Path, Path], fixture: dict
) -> None:
    plain, _ = import_published(files[0], files[1], heads_of(fixture))
    vision = plain.config.vision
    size = vision.image_size + 2 * vision.patch_size
    model, report = import_published(files[0], files[1], heads_of(fixture), image_size=size)
    assert model.config.vision.grid == vision.grid + 2
    assert len(report.resized) == 1
    video = model.encode_video(torch.zeros(1, model.config.num_frames, 3, size, size))
    assert torch.isfinite(video.embeds).all()


@pytest.mark.slow
@pytest.mark.parametrize("embed_dim", [1024])
def test_files_of_the_full_size_are_imported(listing: dict, tmp_path: Path, embed_dim: int) -> None:
    """The released names and shapes are filled with zeros, since the weights are not available."""
    shapes = dict(listing["released_checkpoint"])
    if embed_dim == 1024:
        shapes.update(listing["embed_dim_1024"])
    one = torch.zeros(1)

    def zeros(shape: list[int]) -> torch.Tensor:
        return torch.zeros(shape)

    state = {name: zeros(shape) for name, shape in shapes.items()}
    ids = "Qformer.bert.embeddings.position_ids"
    state[ids] = torch.arange(shapes[ids][1])[None]
    torch.save({"model": state, "epoch": 1, "config": {}, "scaler": None}, tmp_path / "stgt.pth")
    encoder = {
        name.removeprefix(ENCODER): zeros(shape).half()
        for name, shape in listing["frozen_not_in_checkpoint"].items()
        if name.startswith(ENCODER)
    }
    encoder |= {n.replace("blocks.0.", "blocks.39."): t for n, t in encoder.items() if ".0." in n}
    encoder["head.weight"] = one.half()
    torch.save(encoder, tmp_path / "eva_vit_g.pth")
    del state, encoder
    summary = run_import(
        ImportConfig(
            checkpoint=str(tmp_path / "stgt.pth"),
            vision=str(tmp_path / "eva_vit_g.pth"),
            output=str(tmp_path / "model"),
        )
    )
    assert summary["embed_dim"] == embed_dim
    both = listing["parameters_total_and_trainable"].values()
    more = (embed_dim - 256) * 769 * 2
    assert summary["parameters"] == sum(total for total, _ in both) + more
    assert summary["trained"] == sum(trained for _, trained in both) + more
    assert summary["not_used"] == 14
