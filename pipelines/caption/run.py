"""Writes captions for the clips of a manifest with a model, into a new manifest.

The work is divided into parts, which are kept beside the output until it is complete: a run that is
killed continues with the missing parts.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.generated_captions import with_generated
from pipelines.artifacts.locations import find_checkpoint, find_data, is_manifest
from pipelines.artifacts.manifest import ManifestRows, check_manifest, refuse_web_addresses
from pipelines.caption.config import DEFAULT_WORKERS, CaptionConfig
from pipelines.caption.parts import (
    Written,
    count_left,
    is_bad,
    parts_of,
    read_parts,
    write_manifest,
)
from pipelines.common import storage
from pipelines.common.output_folder import (
    CONFIG,
    claim_folder,
    config_beside,
    config_record,
    differing_names,
    settings_of,
    write_config_beside,
)
from pipelines.feed.dataset_checks import check_frames, digest_of
from pipelines.feed.opening import open_source
from stgt.errors import CheckpointError, ClipStoreError, SettingError, STGTError
from stgt.field_marks import FieldMark, marked_fields
from stgt.interface.inputs import VideoTextConfig
from stgt.interface.kinds import KINDS

logger = logging.getLogger(__name__)

LABEL = "caption"
SMALL_MODEL_BYTES = 50_000_000
SMALL_NUM_FRAMES = 4096
"""Up to these sizes of weights and clips, one process is done before Ray has started workers."""
CLIPS = "clips"
"""Recorded beside the output: the numbers that the summary shows."""


class CaptionSummary(TypedDict):
    """Result of `run_caption`."""

    output: str
    clips: int
    """Rows of the manifest."""
    captioned: int
    """Rows with generated captions."""
    captions: int
    missing: dict[str, int]
    """Number of rows without generated captions, by reason."""
    model: str
    """Fingerprint of the model's weights."""
    seconds: float


@dataclass(frozen=True)
class _Inputs:
    """What captions are written for, and by which model."""

    config: CaptionConfig
    model: VideoTextConfig
    data: str
    """The clip store, or the manifest whose videos are decoded."""
    record: dict[str, Any]
    """Settings and digests, as they are written beside the output."""
    settings: dict[str, Any]
    """What captions depend on besides model and frames."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model's weights."""
        return str(settings_of(self.record)["weights_digest"])

    @property
    def parts(self) -> str:
        """Folder of the parts, until the output is complete."""
        return f"{self.config.output.removesuffix('.parquet')}.parts"


def run_caption(
    config: CaptionConfig, connect: Callable[[CaptionConfig], None] | None = None
) -> CaptionSummary:
    """Write captions into a new manifest, or return the summary of one that is complete.

    Args:
        config: What to caption.
        connect: Called once before Ray is needed, after all checks that do not need Ray.

    Raises:
        ManifestError: The manifest cannot be used.
        ClipStoreError: The store cannot be used, contains none of the clips, or too many clips
            cannot be decoded (what was captioned is kept).
        CheckpointError: The checkpoint cannot be used, or its model writes no captions.
        STGTError: The output exists with other captions, or another process is writing it.
    """
    started = time.monotonic()
    inputs = _opened(config)
    done = _complete(inputs)
    if done is None:
        with storage.lock(inputs.parts):
            done = _complete(inputs)  # another process may have finished it meanwhile
            if done is None:
                _claim(inputs)
                done = _caption(inputs, connect)
            storage.remove(inputs.parts)
    else:
        storage.remove(inputs.parts)  # a run that was killed in the meantime
        logger.info("%s is already complete", inputs.config.output)
    return CaptionSummary(
        output=inputs.config.output,
        clips=done.clips,
        captioned=done.captioned,
        captions=done.captions,
        missing=done.missing,
        model=inputs.fingerprint,
        seconds=round(time.monotonic() - started, 1),
    )


def _opened(config: CaptionConfig) -> _Inputs:
    """Check the inputs, without Ray and torch."""
    config = replace(
        config,
        manifest=storage.resolve(config.manifest),
        store=None if config.store is None else find_data(config.store),
        checkpoint=find_checkpoint(config.checkpoint),
        output=storage.resolve(config.output),
    )
    if config.output == config.manifest:
        raise SettingError(
            f"output = {config.output!r}: is the manifest itself, which stays as it is; give "
            "another file"
        )
    if config.store is not None and is_manifest(config.store):
        raise SettingError(
            f"store = {config.store!r}: is a manifest; omit --store to decode the videos of "
            "--manifest"
        )
    storage.check_output_file(config.output)
    checkpoints.require(config.checkpoint)
    model = checkpoints.model_config(config.checkpoint)
    if not KINDS[model.kind].writes_captions:
        able = ", ".join(kind.name for kind in KINDS.values() if kind.writes_captions)
        raise CheckpointError(
            f"{config.checkpoint} holds {checkpoints.describe(config.checkpoint)}, which writes no "
            f"captions; give a checkpoint of {able}"
        )
    checkpoints.check_vocabulary(config.checkpoint)
    logger.info("%s holds %s", config.checkpoint, checkpoints.describe(config.checkpoint))
    num_frames, max_tokens = _checked_lengths(config, model)
    check_manifest(config.manifest)
    data = config.store or config.manifest
    if config.store is None:
        refuse_web_addresses(config.manifest)
    else:
        store = ClipStore(config.store)
        check_frames(store, model.inputs.image_size, num_frames, config.resize)
    config = replace(config, num_frames=num_frames, max_tokens=max_tokens)
    record = config_record(
        LABEL,
        config,
        manifest_digest=digest_of(config.manifest),
        data_digest=digest_of(data),
        weights_digest=checkpoints.weights_digest(config.checkpoint),
    )
    return _Inputs(config, model, data, record, config.settings(num_frames, max_tokens))


def _checked_lengths(config: CaptionConfig, model: VideoTextConfig) -> tuple[int, int]:
    """Return the number of frames and the maximum length of captions in tokens."""
    sizes = model.inputs
    num_frames = config.num_frames or sizes.num_frames
    if num_frames > sizes.num_frames:
        raise SettingError(
            f"num_frames = {num_frames}: the model takes at most {sizes.num_frames} frames"
        )
    max_tokens = config.max_tokens or sizes.max_text_tokens
    if max_tokens >= sizes.most_text_tokens:
        raise SettingError(
            f"max_tokens = {max_tokens}: must be less than {sizes.most_text_tokens}, the number of "
            "positions of the model"
        )
    if config.min_tokens > max_tokens:
        raise SettingError(
            f"min_tokens = {config.min_tokens}: must not exceed max_tokens ({max_tokens})"
        )
    return num_frames, max_tokens


def _ignored() -> frozenset[str]:
    """Return the settings that do not change captions. Contents are compared by their digests."""
    marks = (FieldMark.OPERATIONAL, FieldMark.LOCATION, FieldMark.LOCATION_OR_NAME)
    return frozenset(name for mark in marks for name in marked_fields(CaptionConfig, mark))


def _complete(inputs: _Inputs) -> Written | None:
    """Return what a complete output contains; None if there is none yet.

    Raises:
        STGTError: The output is another file, or has captions of other settings.
    """
    output = inputs.config.output
    if not storage.exists(output):
        return None
    beside = config_beside(output)
    found = storage.read_json(beside) if storage.exists(beside) else {}
    if found.get("job") != LABEL:
        if storage.exists(storage.join(inputs.parts, CONFIG)):
            return None  # a run was killed before it wrote its settings
        raise STGTError(
            f"{output} exists and was not written by jobs.caption; choose another --output"
        )
    before = settings_of(found)
    counted = found["recorded"][CLIPS]
    for name in [name for name in before if name.partition(".")[0] == CLIPS]:
        before.pop(name)
    ignored = _ignored()
    if differing := differing_names(before, settings_of(inputs.record), ignored.__contains__):
        raise _refusal(inputs, before, differing, output)
    return Written(**counted)


def _refusal(
    inputs: _Inputs, before: Mapping[str, Any], differing: list[str], where: str
) -> STGTError:
    now = settings_of(inputs.record)
    said = "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in differing)
    return STGTError(
        f"{where} has captions of other settings ({said}); choose another --output, or delete it"
    )


def _claim(inputs: _Inputs) -> None:
    """Record the settings in the folder of the parts, so that captions are never mixed."""
    names = storage.list_names(inputs.parts)
    claim_folder(
        inputs.parts,
        CONFIG,
        inputs.record,
        lambda found, differing: _refusal(inputs, settings_of(found), differing, inputs.parts),
        ignored=_ignored(),
        has_results=any(name.endswith(".parquet") for name in names),
    )


def _caption(inputs: _Inputs, connect: Callable[[CaptionConfig], None] | None) -> Written:
    """Caption the parts that are missing, and write the new manifest."""
    config = inputs.config
    source = open_source(inputs.data, inputs.model.inputs.image_size, config.resize)
    try:
        items = parts_of(source, ManifestRows(config.manifest).hashes())
    finally:
        source.close()
    total = sum(len(item["rows"]) for item in items)
    if total == 0:
        raise ClipStoreError(
            f"{inputs.data} contains none of the clips of {config.manifest}; give the store that "
            "was made from this manifest"
        )
    left = count_left(inputs.parts, items, decodes=config.store is None)
    pending = [item for item, count in zip(items, left, strict=True) if count]
    done = total - sum(left)
    if done:
        logger.info("caption resumes: %s of %s clips are captioned", f"{done:,}", f"{total:,}")
    if pending:
        for _ in _worked(inputs, pending, total, done, connect):
            pass
    captions = read_parts(inputs.parts, len(items))
    _refuse_bad(config, captions["reason"].to_pylist(), total)
    extras = functools.partial(_extras, inputs)
    written = write_manifest(config.output, config.manifest, captions, extras)
    recorded = {**inputs.record["recorded"], CLIPS: vars(written)}
    write_config_beside(config.output, LABEL, config, **recorded)
    for reason, count in written.missing.items():
        logger.warning("%d of %d clips have no generated caption: %s", count, written.clips, reason)
    return written


def _worked(
    inputs: _Inputs,
    pending: list[dict[str, Any]],
    total: int,
    done: int,
    connect: Callable[[CaptionConfig], None] | None,
) -> Iterator[int]:
    """Caption parts on Ray or, if they are small, in this process.

    Yields the number of clips captioned for each part.
    """
    config = inputs.config
    runs_here = _runs_here(inputs, total)
    if connect is not None and not runs_here:
        connect(config)
    from pipelines.caption.worker import Captioner
    from pipelines.common import parts
    from pipelines.common.progress import Progress

    progress = Progress(LABEL, total, "clips", done)
    arguments = (config, inputs.parts)
    if runs_here:
        rows = parts.in_this_process(Captioner, arguments, pending)
    else:
        workers = config.num_workers or DEFAULT_WORKERS
        rows = parts.on_ray(
            LABEL, Captioner, arguments, pending, num_workers=workers, use_gpu=config.use_gpu
        )
    for row in rows:
        progress.advance(int(row["count"]))
        yield int(row["count"])


def _runs_here(inputs: _Inputs, clips: int) -> bool:
    config = inputs.config
    if config.num_workers is not None or config.use_gpu:
        return False
    frames = clips * int(inputs.settings["num_frames"])
    return (
        frames <= SMALL_NUM_FRAMES
        and checkpoints.weights_bytes(config.checkpoint) <= SMALL_MODEL_BYTES
    )


def _refuse_bad(config: CaptionConfig, reasons: list[str | None], total: int) -> None:
    """Raise an error if no clip has captions, or too many cannot be decoded."""
    bad = [reason for reason in reasons if is_bad(reason)]
    counts = ", ".join(f"{bad.count(name)} {name}" for name in sorted({str(one) for one in bad}))
    if len([reason for reason in reasons if reason is None]) == 0:
        why = f" ({counts})" if bad else ", because the model wrote no words"
        raise ClipStoreError(f"none of the {total:,} clips got a caption{why}")
    if len(bad) > config.max_bad_fraction * total:
        raise ClipStoreError(
            f"{len(bad)} of {total} clips cannot be decoded ({counts}), more than max_bad_fraction "
            f"= {config.max_bad_fraction:g} allows; repair the videos, or raise the limit, and run "
            "the same command again, which keeps the finished captions"
        )


def _extras(inputs: _Inputs, extras: str, captions: list[str]) -> str:
    """Return the extras of a row with its captions, and where they are from."""
    model = {"name": inputs.config.checkpoint, "fingerprint": inputs.fingerprint}
    return with_generated(extras, captions, model, inputs.settings)
