"""Safe, strict import of ALPRO's released files, and export to the same form.

The authors' repository and LAVIS release files of three kinds: pre-trained, fine-tuned for
retrieval, and fine-tuned for answering questions. A file is a pickle that holds either the tensors
themselves or a dict with them under `model`. It also holds tensors that the model does not use. The
kind of a file decides which ones are permitted (`KINDS`); any other name that is left over, and any
name that is missing, is an error that lists it.

Conversion renames tensors. Only tables of positions are changed, if other numbers of frames or
another image size are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from stgt.alpro.config import AlproConfig, FusionBertSizes, PositionResize, TimeSformerSizes
from stgt.alpro.model import Alpro
from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.model_folder import resized_times, unlike, without_initialization
from stgt.weights.released import ImportReport, count_blocks, read_pickle, shape_of, state_of

State = Mapping[str, torch.Tensor]

VIDEO = "visual_encoder.model."
TEXT = "text_encoder."
WRAPPED_TEXT = "text_encoder.bert."
"""Prefix of BERT's tensors if the file's text encoder also has a language-modeling head."""
POSITIONS = f"{VIDEO}pos_embed"
TIMES = f"{VIDEO}time_embed"
POSITION_IDS = "embeddings.position_ids"
CLASSIFIER = "classifier."
HEAD_WIDTH = 64
"""Published width of an attention head. Numbers of heads cannot be inferred from a file."""

NAMES = (
    (f"{VIDEO}cls_token", "video_encoder.embeddings.cls_token"),
    (POSITIONS, "video_encoder.embeddings.position_embeddings"),
    (TIMES, "video_encoder.embeddings.time_embeddings"),
    (f"{VIDEO}patch_embed.proj.", "video_encoder.embeddings.patch_embeddings.projection."),
    (f"{VIDEO}norm.", "video_encoder.layernorm."),
    (f"{VIDEO}blocks.", "video_encoder.encoder.layer."),
    ("vision_proj.", "video_proj."),
    ("temp", "temperature"),
)
"""Prefixes of tensor names: published, ours. Names without an entry are the same in both."""

BLOCK_NAMES = (
    ("norm1.", "layernorm_before."),
    ("attn.qkv.", "attention.attention.qkv."),
    ("attn.proj.", "attention.output.dense."),
    ("temporal_norm1.", "temporal_layernorm."),
    ("temporal_attn.qkv.", "temporal_attention.attention.qkv."),
    ("temporal_attn.proj.", "temporal_attention.output.dense."),
    ("temporal_fc.", "temporal_dense."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
"""Prefixes of tensor names within a block of the video encoder: published, ours."""

RETRIEVAL_HEADS = ("temp", "vision_proj.", "text_proj.", "itm_head.")
"""Parts that only retrieval uses."""


@dataclass(frozen=True)
class FileKind:
    """A kind of released file."""

    name: str
    leftovers: tuple[str, ...]
    """Beginnings of the names of tensors that the file may hold and the model does not use."""
    may_lack: tuple[str, ...] = ()
    """Beginnings of the names of tensors that the file may lack."""


VIDEO_HEAD = f"{VIDEO}head."
"""Classifier of the video encoder for Kinetics, which the published code builds and never uses."""
LANGUAGE_HEAD = f"{TEXT}cls."
"""BERT's masked-language head, which only pre-training uses."""

KINDS = {
    kind.name: kind
    for kind in (
        FileKind("retrieval", (VIDEO_HEAD, LANGUAGE_HEAD)),
        FileKind("pre-training", (VIDEO_HEAD, LANGUAGE_HEAD, "prompter.", "mpm_head.")),
        # Released files hold the heads of retrieval, as pre-training left them. LAVIS builds its
        # model for questions without them.
        FileKind("question answering", (VIDEO_HEAD,), may_lack=RETRIEVAL_HEADS),
    )
}
"""The kinds of released files, with their permitted leftovers. BERT's table of position ids is
permitted in each; it must count from zero."""


def our_name(published: str) -> str:
    """Return our name of a tensor of the published model."""
    name = published
    if name.startswith(WRAPPED_TEXT):
        name = TEXT + name[len(WRAPPED_TEXT) :]
    for old, new in NAMES:
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    return _renamed_in_block(name, BLOCK_NAMES)


def published_name(ours: str, wrapped: bool = False) -> str:
    """Return the published name of one of our tensors: the inverse of `our_name`.

    Args:
        ours: Our name.
        wrapped: Whether the text encoder of the file also has a language-modeling head, as in
            files for retrieval.
    """
    name = _renamed_in_block(ours, tuple((new, old) for old, new in BLOCK_NAMES))
    for old, new in NAMES:
        if name.startswith(new):
            name = old + name[len(new) :]
            break
    if wrapped and name.startswith(TEXT):
        name = WRAPPED_TEXT + name[len(TEXT) :]
    return name


def _renamed_in_block(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Rename a tensor of a block of the video encoder, under the name that our blocks have."""
    block = re.match(r"video_encoder\.encoder\.layer\.\d+\.", name)
    if block is None:
        return name
    rest = name[block.end() :]
    for old, new in pairs:
        if rest.startswith(old):
            return block[0] + new + rest[len(old) :]
    return name


def is_alpro(state: State) -> bool:
    """Return whether the tensors of a released file are those of an ALPRO model."""
    return any(name.startswith(VIDEO) for name in state)


def kind_of(state: State) -> FileKind:
    """Return the kind of a released file, which its tensors show."""
    if any(name.startswith(CLASSIFIER) for name in state):
        return KINDS["question answering"]
    if any(name.startswith(("prompter.", "mpm_head.")) for name in state):
        return KINDS["pre-training"]
    return KINDS["retrieval"]


@dataclass(frozen=True, kw_only=True)
class UnstoredSizes:
    """Sizes that cannot be inferred from a file. None takes the published value."""

    vision_heads: int | None = None
    """Heads of the video encoder. None means its width divided by 64."""
    text_heads: int | None = None
    """Heads of BERT. None means its width divided by 64."""
    fusion_layer: int | None = None
    """Layers of BERT that see only the text. None means half of them."""


def infer_config(state: State, sizes: UnstoredSizes, path: str) -> AlproConfig:
    """Infer the model's sizes from the shapes of released tensors.

    Args:
        state: Tensors under their published names, BERT's without `bert.`.
        sizes: Sizes that the file does not show.
        path: File name for error messages.

    Raises:
        CheckpointMismatchError: A tensor needed to infer a size is missing or malformed.
        SettingError: The sizes are inconsistent.
    """
    width, _, patch, _ = shape_of(state, f"{VIDEO}patch_embed.proj.weight", path, 4)
    patches = shape_of(state, POSITIONS, path, 3)[1] - 1
    side = round(patches**0.5)
    if side**2 != patches:
        found = f"{POSITIONS} with {patches + 1} positions (expected CLS and a square of patches)"
        raise CheckpointMismatchError(path, [], [found])
    words, text_width = shape_of(state, f"{TEXT}embeddings.word_embeddings.weight", path, 2)
    if text_width != width:
        found = (
            f"{TEXT}embeddings.word_embeddings.weight of width {text_width} (expected that of the "
            f"video encoder, {width})"
        )
        raise CheckpointMismatchError(path, [], [found])
    layers = count_blocks(state, rf"{re.escape(TEXT)}encoder\.layer\.(\d+)\.")
    positions = shape_of(state, f"{TEXT}embeddings.position_embeddings.weight", path, 2)[0]
    answers = 0
    if f"{CLASSIFIER}0.weight" in state or f"{CLASSIFIER}2.weight" in state:
        answers = shape_of(state, f"{CLASSIFIER}2.weight", path, 2)[0]
    embed_dim = AlproConfig.embed_dim
    if not answers or "vision_proj.weight" in state:
        embed_dim = shape_of(state, "vision_proj.weight", path, 2)[0]
    text_mlp = shape_of(state, f"{TEXT}encoder.layer.0.intermediate.dense.weight", path, 2)[0]
    heads = max(1, width // HEAD_WIDTH)
    return AlproConfig(
        vision=TimeSformerSizes(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            depth=count_blocks(state, rf"{re.escape(VIDEO)}blocks\.(\d+)\."),
            heads=sizes.vision_heads or heads,
            mlp_width=shape_of(state, f"{VIDEO}blocks.0.mlp.fc1.weight", path, 2)[0],
        ),
        text=FusionBertSizes(
            layers=layers,
            fusion_layer=sizes.fusion_layer or layers // 2,
            heads=sizes.text_heads or heads,
            mlp_width=text_mlp,
            max_position=positions,
        ),
        embed_dim=embed_dim,
        num_frames=shape_of(state, TIMES, path, 3)[1],
        max_text_tokens=min(AlproConfig.max_text_tokens, positions),
        vocab_size=words,
        num_answers=answers,
    )


def _without_leftovers(
    state: State, kind: FileKind, path: str, report: ImportReport
) -> dict[str, torch.Tensor]:
    """Return the tensors that the model uses, BERT's without `bert.`.

    Raises:
        CheckpointError: The position ids do not count from zero.
        CheckpointMismatchError: BERT's tensors stand partly under `bert.` and partly without it.
    """
    used: dict[str, torch.Tensor] = {}
    unwrapped = [
        name
        for name in state
        if name.startswith(TEXT) and not name.startswith((WRAPPED_TEXT, LANGUAGE_HEAD))
    ]
    if unwrapped and any(name.startswith(WRAPPED_TEXT) for name in state):
        raise CheckpointMismatchError(path, [], sorted(unwrapped))
    for name, tensor in state.items():
        if name.startswith(kind.leftovers):
            report.not_used.append(name)
            continue
        if name in (TEXT + POSITION_IDS, WRAPPED_TEXT + POSITION_IDS):
            if not torch.equal(tensor.flatten().long(), torch.arange(tensor.numel())):
                raise CheckpointError(
                    f"{path}: {name} does not count from 0 to {tensor.numel() - 1}"
                )
            report.constant.append(name)
            continue
        short = TEXT + name[len(WRAPPED_TEXT) :] if name.startswith(WRAPPED_TEXT) else name
        used[short] = tensor
    return used


def resized_positions(table: torch.Tensor, grid: int, how: PositionResize) -> torch.Tensor:
    """Resize a table of position embeddings by nearest neighbor.

    Args:
        table: [1, 1 + G*G, D] float, CLS first.
        grid: New number of patches along each edge.
        how: Over the grid of patches, or over their list.

    Returns:
        [1, 1 + grid*grid, D] float.
    """
    first, patches = table[:, :1], table[:, 1:].transpose(1, 2)  # [1, D, G*G]
    if how == "grid":
        old = round(patches.shape[2] ** 0.5)
        square = patches.unflatten(2, (old, old))
        patches = F.interpolate(square, size=(grid, grid), mode="nearest").flatten(2)
    else:
        patches = F.interpolate(patches, size=grid * grid, mode="nearest")
    return torch.cat([first, patches.transpose(1, 2)], dim=1)


def import_alpro(
    checkpoint: Path,
    sizes: UnstoredSizes | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    position_resize: PositionResize = "grid",
) -> tuple[Alpro, ImportReport]:
    """Build a model with the weights of a released file.

    Args:
        checkpoint: Released file.
        sizes: Sizes that the file does not show.
        num_frames: Frames per clip. If the number differs from the file's, the time embeddings are
            resized by nearest neighbor, as published. None keeps the file's.
        image_size: Edge length of a frame, in pixels. If it differs from the file's, the position
            embeddings are resized. None keeps the file's.
        position_resize: How.

    Returns:
        The model in eval mode, and a report on the imported tensors.

    Raises:
        CheckpointError: The file cannot be used.
        CheckpointMismatchError: A tensor is missing, left over, or has a different shape.
        SettingError: A size is out of range.
    """
    where = str(checkpoint)
    report = ImportReport(where, frame_encoder=None)
    state = state_of(read_pickle(checkpoint), checkpoint)
    kind = kind_of(state)
    report.found = f"ALPRO, {kind.name}"
    tensors = _without_leftovers(state, kind, where, report)
    config = infer_config(tensors, sizes or UnstoredSizes(), where)
    config = _resize(tensors, config, num_frames, image_size, position_resize, report)
    with without_initialization():
        model = Alpro(config)
    expected = model.state_dict()
    loaded = {our_name(name): tensor for name, tensor in tensors.items()}
    # A name of ours in a file would be taken for a published one.
    unexpected = [name for name in tensors if published_name(our_name(name)) != name]
    missing, lacking = [], []
    for name, tensor in expected.items():
        published = published_name(name)
        if name not in loaded:
            permitted = bool(kind.may_lack) and published.startswith(kind.may_lack)
            (lacking if permitted else missing).append(published)
        elif difference := unlike(loaded[name], tensor):
            unexpected.append(f"{published} {difference}")
    unexpected += [published_name(name) for name in loaded.keys() - expected.keys()]
    heads = {published_name(name) for name in expected if _is_of(name, kind.may_lack)}
    if lacking and set(lacking) != heads:
        missing += lacking  # the heads of retrieval are all there or all absent
    if missing or unexpected:
        raise CheckpointMismatchError(where, sorted(missing), sorted(set(unexpected)))
    with torch.no_grad():
        for name, tensor in loaded.items():
            expected[name].copy_(tensor)
            report.read += 1
            report.parameters += tensor.numel()
        for name in lacking:
            tensor = expected[our_name(name)]
            tensor.fill_(config.temperature if name == "temp" else 0.0)
            report.neutral[name] = (
                "zeros (the temperature with its usual value), since the file is for questions and "
                "was saved without the heads of retrieval; the model answers questions but cannot "
                "retrieve"
            )
    return model.eval(), report


def _is_of(ours: str, beginnings: tuple[str, ...]) -> bool:
    return bool(beginnings) and published_name(ours).startswith(beginnings)


def _resize(
    tensors: dict[str, torch.Tensor],
    config: AlproConfig,
    num_frames: int | None,
    image_size: int | None,
    position_resize: PositionResize,
    report: ImportReport,
) -> AlproConfig:
    """Resize the tables in `tensors`, and return the config with the new sizes."""
    if num_frames is not None and num_frames != config.num_frames:
        if num_frames < 1:
            raise SettingError(f"num_frames = {num_frames}: must be at least 1")
        report.resized.append(
            f"{TIMES}: {config.num_frames} to {num_frames} frames, nearest neighbor"
        )
        tensors[TIMES] = resized_times(tensors[TIMES], num_frames)
        config = replace(config, num_frames=num_frames)
    if image_size is not None and image_size != config.vision.image_size:
        old = config.vision.grid
        config = replace(config, vision=replace(config.vision, image_size=image_size))
        new = config.vision.grid
        report.resized.append(
            f"{POSITIONS}: {old}x{old} to {new}x{new} patches, nearest neighbor over the "
            f"{'grid' if position_resize == 'grid' else 'list of patches'}"
        )
        tensors[POSITIONS] = resized_positions(tensors[POSITIONS], new, position_resize)
    return config


def export_alpro(model: Alpro) -> dict[str, torch.Tensor]:
    """Return the tensors with their published names and shapes, as in a released file.

    A model with a classifier becomes a file for answering questions, and any other model a file for
    retrieval. Both published loaders read the result, saved without a dict around it.
    """
    wrapped = model.classifier is None
    state = {
        published_name(name, wrapped): tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    ids = torch.arange(model.config.text.max_position)[None]
    state[(WRAPPED_TEXT if wrapped else TEXT) + POSITION_IDS] = ids
    return state
