"""Safe, strict import of the authors' released checkpoints, and export to the same format.

A released STGT file (`.pth`, a pickle) contains the trained tensors, an optimizer state, a config
and an object of the training code. The frozen frame encoder is a separate file (`eva_vit_g.pth`).
Conversion only renames tensors; it does not change their values or shapes.
"""

from __future__ import annotations

import _compat_pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from stgt.config import GraphConfig, ModelConfig, QFormerConfig, VisionConfig
from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.model import STGT
from stgt.model_folder import unlike, without_initialization

State = Mapping[str, torch.Tensor]

PREFIXES = (
    ("Qformer.bert.embeddings.word_embeddings.", "qformer.word_embeddings."),
    ("Qformer.bert.embeddings.position_embeddings.", "qformer.position_embeddings."),
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.bert.layernorm."),
    ("Qformer.bert.", "qformer.bert."),
    ("Qformer.cls.predictions.transform.dense.", "qformer.caption_head.dense."),
    ("Qformer.cls.predictions.transform.LayerNorm.", "qformer.caption_head.norm."),
    ("Qformer.cls.predictions.bias", "qformer.caption_head.bias"),
    ("graph_cross_model.", "graph."),
    ("visual_encoder.", "frame_encoder.vit."),
    ("vision_proj.", "video_proj."),
    ("query_tokens", "qformer.query_tokens"),
    ("temp", "temperature"),
)
"""Prefixes of tensor names: published, ours."""

POSITION_IDS = "Qformer.bert.embeddings.position_ids"
COPIES = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
"""Tensors that the published code stores twice: the copy, and the original it is tied to."""
POSITION_TABLE = "graph.pos_2D_embed"
ENCODER = "frame_encoder.vit."
PUBLISHED_DEPTH = 39
"""Number of encoder blocks that the published model uses. The encoder's file has one more."""
PUBLISHED_MLP_RATIO = 4.3637
PUBLISHED_HEAD_WIDTH = {"vision": 88, "qformer": 64}
"""Width of an attention head. Numbers of heads cannot be inferred from a file."""
UNUSED_OF_ENCODER = ("head.", "norm.", "fc_norm.")
"""Parts of an encoder file after the last block, whose output tokens the model uses."""
STANDARD_LIBRARY = sys.stdlib_module_names | {
    name.partition(".")[0] for name in _compat_pickle.IMPORT_MAPPING
}
"""Modules that a pickle of training code must not reference. Python 2 names are included, since
torch writes pickles with them."""


def our_name(published: str) -> str:
    """Return our name of a tensor of the published model."""
    name = published
    for old, new in PREFIXES:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    name = re.sub(r"^(qformer\.bert\.encoder\..*attention)\.self\.", r"\1.attention.", name)
    return re.sub(r"^(graph\.resblocks\.\d+)\.(attn|ln_1|ln_2|mlp)\.", r"\1.frame_attn.\2.", name)


def published_name(ours: str) -> str:
    """Return the published name of one of our tensors: the inverse of `our_name`."""
    name = re.sub(r"^(graph\.resblocks\.\d+)\.frame_attn\.", r"\1.", ours)
    name = re.sub(r"^(qformer\.bert\.encoder\..*attention)\.attention\.", r"\1.self.", name)
    for theirs, mine in PREFIXES:
        if name.startswith(mine):
            return theirs + name[len(mine) :]
    return name


def _plain_dict(*default: object) -> dict:
    """Replace a defaultdict in an optimizer state by a dict, which torch's safe loader can fill."""
    return {}


HARMLESS = {
    "collections.defaultdict": _plain_dict,
    "builtins.dict": dict,
    "__builtin__.dict": dict,
}
"""Plain containers in optimizer states that torch's allowlist lacks."""


class _Inert:
    """Placeholder for a class of the authors' code: accepts any arguments and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(name: str, path: Path) -> tuple[Any, str]:
    """Return the replacement for a class named in a pickle.

    Raises:
        CheckpointError: The class has no place in a checkpoint of training code.
    """
    if name in HARMLESS:
        return HARMLESS[name], name
    top = name.partition(".")[0]
    optimizer = name.startswith("torch.optim.")
    if not optimizer and (top in STANDARD_LIBRARY or top == "torch"):
        raise CheckpointError(
            f"{path} references {name}, which no checkpoint needs and which could run code; "
            "download the file from its authors again"
        )
    return type(name.rpartition(".")[2], (_Inert,), {"__module__": "stgt.published"}), name


def read_pickle(path: Path) -> Any:
    """Read a `.pth` file without executing code from it. Tensors are memory-mapped.

    Classes of the training code are replaced by inert objects.

    Raises:
        CheckpointError: The file is missing or truncated, is not a pickle of tensors, or references
            something that could run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; pass the .pth file as it was released")
    try:
        if zipfile.is_zipfile(path):
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([_stand_in(name, path) for name in named]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # The format before torch 1.6 cannot be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a crafted file can raise any error
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, truncated or not a .pth file "
            f"({said})"
        ) from error


def _is_plain(name: object, value: object) -> bool:
    """Return whether an entry is a named, dense CPU tensor."""
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def state_of(contents: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file: its `model` or a similar entry, or all of it.

    Raises:
        CheckpointError: There are none, or there are entries other than plain tensors.
    """
    state = contents
    for key in ("model", "module", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{path} contains no tensors under `model`, so it is not a released checkpoint"
        )
    strange = [str(key) for key, value in state.items() if not _is_plain(key, value)]
    if strange:
        raise CheckpointError(
            f"{path} has entries that are not plain tensors: {', '.join(strange[:5])}; "
            "it is not a released checkpoint"
        )
    return dict(state)


@dataclass
class ImportReport:
    """Report on how the tensors of released files were used."""

    checkpoint: str
    frame_encoder: str | None
    found: str = "STGT"
    """Model that the files hold, and the kind of file if there are several."""
    read: int = 0
    """Number of tensors loaded into the model."""
    parameters: int = 0
    """Number of parameters in them."""
    tied: list[str] = field(default_factory=list)
    """Copies of other tensors, verified to be equal to them."""
    constant: list[str] = field(default_factory=list)
    """Constant tensors, verified to have the expected values."""
    resized: list[str] = field(default_factory=list)
    """Tensors that were resampled, with their old and new sizes."""
    not_used: list[str] = field(default_factory=list)
    """Tensors of the given files that the model does not use, by the names in the file."""
    neutral: dict[str, str] = field(default_factory=dict)
    """Tensors that no released file contains: how they were filled, and why."""
    qformer: str | None = None
    """BLIP-2 checkpoint that the Q-Former of a new model starts from."""
    initial_values: list[str] = field(default_factory=list)
    """Tensors of a new model that come from no file and keep their initial values."""
    notes: list[str] = field(default_factory=list)
    """What the caller should know about the given files."""


@dataclass(frozen=True, kw_only=True)
class HeadCounts:
    """Numbers of attention heads, which cannot be inferred from files.

    None derives the number from the published head width.
    """

    vision: int | None = None
    """Heads of the frame encoder. None means its width divided by 88."""
    graph: int = 16
    """Heads of the graph transformer."""
    qformer: int | None = None
    """Heads of the Q-Former. None means its width divided by 64."""


def shape_of(state: State, name: str, path: str, dimensions: int) -> list[int]:
    """Return the shape of a tensor from which sizes are inferred.

    Raises:
        CheckpointMismatchError: The tensor is missing or has another number of dimensions.
    """
    if name not in state:
        raise CheckpointMismatchError(path, [name], [])
    shape = list(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        found = f"{name} {shape} (expected {dimensions} dimensions)"
        raise CheckpointMismatchError(path, [], [found])
    return shape


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """Return one more than the highest number that the pattern's group matches; 0 without any."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def head_count(given: int | None, part: str, width: int) -> int:
    """Return a number of attention heads, by default that of heads of the published width."""
    return given if given is not None else max(1, width // PUBLISHED_HEAD_WIDTH[part])


def vision_config(encoder: State, heads: HeadCounts, path: str) -> VisionConfig:
    """Infer the sizes of a frame encoder from the shapes of its tensors.

    Raises:
        CheckpointMismatchError: A tensor needed to infer a size is missing or malformed.
    """
    width, _, patch, _ = shape_of(encoder, "patch_embed.proj.weight", path, 4)
    tokens = shape_of(encoder, "pos_embed", path, 3)[1]
    hidden = shape_of(encoder, "blocks.0.mlp.fc1.weight", path, 2)[0]
    depth = count_blocks(encoder, r"blocks\.(\d+)\.")
    if width == VisionConfig.width and depth < PUBLISHED_DEPTH:
        missing = [f"blocks.{block}" for block in range(depth, PUBLISHED_DEPTH)]
        raise CheckpointMismatchError(path, missing, [])
    side = round((tokens - 1) ** 0.5)
    if side**2 + 1 != tokens:
        found = f"pos_embed with {tokens} positions (expected CLS and a square of patches)"
        raise CheckpointMismatchError(path, [], [found])
    ratio = PUBLISHED_MLP_RATIO
    if int(width * ratio) != hidden:
        ratio = (hidden + 0.5) / width
    return VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        depth=min(PUBLISHED_DEPTH, depth),
        heads=head_count(heads.vision, "vision", width),
        mlp_ratio=ratio,
    )


def infer_config(state: State, encoder: State | None, heads: HeadCounts, path: str) -> ModelConfig:
    """Infer the model's sizes from the shapes of released tensors.

    Args:
        state: Tensors of a released checkpoint.
        encoder: Tensors of the frame encoder; None assumes the published encoder.
        heads: Numbers of attention heads.
        path: File name for error messages.

    Raises:
        CheckpointError: The checkpoint is for another frame encoder than the published one.
        CheckpointMismatchError: A tensor needed to infer a size is missing or malformed.
        SettingError: The sizes are inconsistent.
    """
    width = shape_of(state, "ln_vision.weight", path, 1)[0]
    _, queries, hidden = shape_of(state, "query_tokens", path, 3)
    layer = "Qformer.bert.encoder.layer"
    crossing = sorted(
        {int(m[1]) for n in state if (m := re.match(rf"{re.escape(layer)}\.(\d+)\.crossatt", n))}
    )
    layers = count_blocks(state, rf"{re.escape(layer)}\.(\d+)\.")
    if hidden == QFormerConfig.width and layers < QFormerConfig.layers:
        missing = [f"{layer}.{number}" for number in range(layers, QFormerConfig.layers)]
        raise CheckpointMismatchError(path, missing, [])
    words = shape_of(state, "Qformer.bert.embeddings.word_embeddings.weight", path, 2)[0]
    positions = shape_of(state, "Qformer.bert.embeddings.position_embeddings.weight", path, 2)[0]
    if encoder is not None:
        vision = vision_config(encoder, heads, path)
    elif width == VisionConfig.width:
        vision = VisionConfig()
    else:
        raise CheckpointError(
            f"{path} is for a frame encoder of width {width}, but the published one has width "
            f"{VisionConfig.width}; pass the encoder's file with --vision"
        )
    return ModelConfig(
        vision=vision,
        graph=GraphConfig(
            layers=count_blocks(state, r"graph_cross_model\.resblocks\.(\d+)\."), heads=heads.graph
        ),
        qformer=QFormerConfig(
            width=hidden,
            layers=layers,
            heads=head_count(heads.qformer, "qformer", hidden),
            mlp_width=shape_of(state, f"{layer}.0.intermediate.dense.weight", path, 2)[0],
            cross_attention_every=crossing[1] - crossing[0] if len(crossing) > 1 else layers,
            query_tokens=queries,
            max_position=positions,
        ),
        embed_dim=shape_of(state, "vision_proj.weight", path, 2)[0],
        num_frames=shape_of(state, "graph_cross_model.time_embed", path, 2)[0],
        max_text_tokens=min(ModelConfig.max_text_tokens, positions),
        vocab_size=words,
        bos_id=words - 1,
    )


def without_copies(
    state: dict[str, torch.Tensor], path: str, report: ImportReport
) -> dict[str, torch.Tensor]:
    """Return the tensors without redundant ones, after checking that those are redundant.

    Raises:
        CheckpointError: A tensor is not what the published model makes of it.
    """
    state = dict(state)
    if POSITION_IDS in state:
        ids = state.pop(POSITION_IDS)
        table = state.get("Qformer.bert.embeddings.position_embeddings.weight")
        positions = ids.numel() if table is None else table.shape[0]
        if not torch.equal(ids.flatten().long(), torch.arange(positions)):
            raise CheckpointError(
                f"{path}: {POSITION_IDS} does not count from 0 to {positions - 1}"
            )
        report.constant.append(POSITION_IDS)
    for copy, original in COPIES.items():
        if copy not in state:
            continue
        if original not in state or not torch.equal(state[copy], state[original]):
            raise CheckpointError(
                f"{path}: {copy} differs from {original}, to which the published model ties it; "
                "the model can hold only one of them, so the file cannot be imported"
            )
        state.pop(copy)
        report.tied.append(f"{copy} = {original}")
    return state


def encoder_tensors(
    encoder: dict[str, torch.Tensor], config: VisionConfig, report: ImportReport
) -> dict[str, torch.Tensor]:
    """Return the tensors of an encoder file that the model uses, resized to its patch grid."""
    used = {}
    for name, tensor in encoder.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        beyond = block is not None and int(block[1]) >= config.depth
        if beyond or name.startswith(UNUSED_OF_ENCODER):
            report.not_used.append(name)
            continue
        if name == "pos_embed" and tensor.shape[1] != 1 + config.grid**2:
            old = round((tensor.shape[1] - 1) ** 0.5)
            report.resized.append(
                f"pos_embed: {old}x{old} to {config.grid}x{config.grid} patches, bicubic"
            )
            tensor = resample_abs_pos_embed(
                tensor.float(), [config.grid, config.grid], num_prefix_tokens=1
            ).to(tensor.dtype)
        used[ENCODER + name] = tensor
    return used


def _encoder_of_timm(config: VisionConfig) -> dict[str, torch.Tensor]:
    """Download the encoder's pre-trained weights from the hub with timm."""
    try:
        vit = timm.create_model(config.name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client may raise anything
        raise CheckpointError(
            f"timm cannot load pre-trained weights of {config.name}: {str(error)[:200]}; "
            "pass --vision FILE instead"
        ) from error
    return dict(vit.state_dict())


def read_encoder(vision: Path | str) -> dict[str, torch.Tensor]:
    """Read a frame encoder's tensors from a file or, for "timm", from timm's pre-trained weights.

    Raises:
        CheckpointError: The tensors cannot be read.
        SettingError: `vision` is neither a path nor "timm".
    """
    if isinstance(vision, Path):
        return state_of(read_pickle(vision), vision)
    if vision == "timm":
        return _encoder_of_timm(VisionConfig())
    raise SettingError(f"vision = {vision!r}: must be a file or 'timm'")


def import_published(
    checkpoint: Path,
    vision: Path | str | None = None,
    heads: HeadCounts | None = None,
    image_size: int | None = None,
) -> tuple[STGT, ImportReport]:
    """Build a model with the weights of released files.

    Args:
        checkpoint: Released STGT file.
        vision: File of the frozen encoder, "timm" for timm's pre-trained weights, or None to
            initialize the encoder at random and omit it when the model is saved.
        heads: Numbers of attention heads, which cannot be inferred from files.
        image_size: Edge length of a frame, in pixels. If it differs from the encoder's, the
            encoder's position embedding is resized.

    Returns:
        The model in eval mode, and a report on the imported tensors.

    Raises:
        CheckpointError: A file cannot be used.
        CheckpointMismatchError: A tensor is missing, unexpected, or has a different shape.
    """
    where = str(checkpoint)
    report = ImportReport(where, None if vision is None else str(vision))
    state = state_of(read_pickle(checkpoint), checkpoint)
    # Reject our own names, and tensors of the frozen encoder, which is a separate file.
    foreign = [
        name
        for name in state
        if published_name(our_name(name)) != name or our_name(name).startswith(ENCODER)
    ]
    if foreign:
        raise CheckpointMismatchError(where, [], sorted(foreign))
    encoder = None if vision is None else read_encoder(vision)
    if isinstance(vision, Path):
        where = f"{where} with {vision}"
    config = infer_config(state, encoder, heads or HeadCounts(), where)
    if image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    tensors = {
        our_name(name): tensor for name, tensor in without_copies(state, where, report).items()
    }
    if encoder is not None:
        tensors.update(encoder_tensors(encoder, config.vision, report))
    # Without its file the encoder keeps its random initialization; everything else is loaded.
    with nullcontext() if encoder is None else without_initialization():
        model = STGT(config).eval()
    expected = model.state_dict()
    missing, unexpected = [], []
    for name, tensor in expected.items():
        if name not in tensors:
            left_out = name == POSITION_TABLE or (encoder is None and name.startswith(ENCODER))
            if not left_out:
                missing.append(published_name(name))
        elif difference := unlike(tensors[name], tensor):
            unexpected.append(f"{published_name(name)} {difference}")
    unexpected += [published_name(name) for name in tensors.keys() - expected.keys()]
    if missing or unexpected:
        raise CheckpointMismatchError(where, missing, sorted(unexpected))
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
            report.read += 1
            report.parameters += tensor.numel()
        model.frame_encoder.missing = encoder is None
        if POSITION_TABLE in tensors:
            return model, report
        model.graph.pos_2D_embed.zero_()
    report.neutral[published_name(POSITION_TABLE)] = (
        "zeros, the mean of the noise with std 0.02 that the authors trained with and did not save"
    )
    return model, report


def export_published(model: STGT) -> dict[str, torch.Tensor]:
    """Return the trained tensors with their published names and shapes, as in a released file.

    Raises:
        SettingError: The frame encoder was trained, and a released file cannot store it.
    """
    vision = model.config.vision
    if not vision.frozen or vision.unfreeze_last_blocks:
        raise SettingError(
            "blocks of this model's frame encoder were trained, and a released file cannot store "
            "them; use save_pretrained"
        )
    names = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("frame_encoder.") and name != POSITION_TABLE
    }
    state = {published_name(name): tensor.detach() for name, tensor in names.items()}
    positions = model.config.qformer.max_position
    state[POSITION_IDS] = torch.arange(positions)[None]
    for copy, original in COPIES.items():
        state[copy] = state[original]
    return state
