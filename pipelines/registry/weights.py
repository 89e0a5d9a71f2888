"""The files of a checkpoint that a registered model needs: uploaded, or referred to on S3.

A registered model needs no optimizer state, and it needs the frozen frame encoder, which may lie in
another checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from pipelines.artifacts import checkpoints
from pipelines.common import storage
from pipelines.common.config import fingerprint
from stgt.errors import CheckpointError
from stgt.interface.inputs import HUB_TOKENIZER_FILES, VOCAB_FILE

CONFIG = "config.json"
OWN_FILES = (checkpoints.WEIGHTS, CONFIG, checkpoints.STATE)
ANSWERS = "answers.json"
"""The answer vocabulary of a model that answers questions."""
S3 = "s3://"


class WeightsFile(TypedDict):
    """One file of a model."""

    uri: str
    bytes: int
    version: str
    """Changes when the file is rewritten: its ETag on S3; a hash of its contents on local disk."""


Weights = dict[str, WeightsFile]
"""The files of a model by the name that they have in the model's folder."""


def find_weights(checkpoint: str) -> Weights:
    """Return the files that a model consists of, with those of its frozen frame encoder.

    Args:
        checkpoint: Absolute URI of a complete checkpoint.

    Raises:
        CheckpointError: A checkpoint or one of its files is missing.
    """
    checkpoints.require(checkpoint)
    files = storage.list_names(checkpoint)
    tokenizer = [name for name in (VOCAB_FILE, *HUB_TOKENIZER_FILES) if name in files]
    answers = [name for name in (ANSWERS,) if name in files]
    own = (*OWN_FILES, *(tokenizer or [VOCAB_FILE]), *answers)
    uris = {name: storage.join(checkpoint, name) for name in own}
    encoder = checkpoints.frame_encoder_of(checkpoint)
    if encoder is not None:
        uris[checkpoints.FRAME_ENCODER] = storage.join(encoder, checkpoints.FRAME_ENCODER)
    for name, uri in uris.items():
        if not storage.is_file(uri):
            of = f"the frozen frame encoder of {checkpoint}" if name not in own else ""
            raise CheckpointError(
                f"{uri} does not exist{f', which is {of}' if of else ''}; the model cannot be "
                "registered without it"
            )
    return {name: _file(uri) for name, uri in uris.items()}


def _file(uri: str) -> WeightsFile:
    if storage.is_remote(uri):
        size, version = storage.size_and_version(uri)
        return WeightsFile(uri=uri, bytes=size, version=version)
    return WeightsFile(uri=uri, bytes=storage.size_bytes(uri), version=storage.digest(uri))


def are_referred_to(weights: Weights) -> bool:
    """Return whether a model refers to its files on S3 instead of containing copies."""
    return all(file["uri"].startswith(S3) for file in weights.values())


def identity_of(weights: Weights, settings: Mapping[str, object]) -> str:
    """Return a hash that is the same for the same weights, read in the same way.

    Copies of a checkpoint on local disk are the same. `state.json` does not count: it names the
    place of the frame encoder.
    """
    is_reference = are_referred_to(weights)
    files = {
        name: [file["version"], *([file["uri"]] if is_reference else [])]
        for name, file in weights.items()
        if name != checkpoints.STATE
    }
    return fingerprint([files, dict(settings)])


def assemble(weights: Weights, folder: Path) -> Path:
    """Provide the files of a model as one complete checkpoint on local disk.

    Local files are linked; remote ones are fetched. The result does not refer to any other folder.

    Args:
        weights: The files.
        folder: Folder to create.

    Raises:
        CheckpointError: A file is missing or was rewritten since its version was recorded.
    """
    folder.mkdir(parents=True)
    for name, file in weights.items():
        target = folder / name
        if not storage.is_remote(file["uri"]):
            target.symlink_to(storage.resolve(file["uri"]))
            continue
        try:
            _, version = storage.size_and_version(file["uri"])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{file['uri']} does not exist any more; put it back, or register the checkpoint "
                "from where it lies now"
            ) from error
        if version != file["version"]:
            raise CheckpointError(
                f"{file['uri']} was rewritten after the model was registered; put the earlier file "
                "back, or register the checkpoint again"
            )
        storage.fetch_file(file["uri"], target)
    state = {**json.loads((folder / checkpoints.STATE).read_text("utf-8")), "frame_encoder": None}
    (folder / checkpoints.STATE).unlink()
    (folder / checkpoints.STATE).write_text(json.dumps(state), encoding="utf-8")
    (folder / checkpoints.COMPLETE).touch()
    return folder
