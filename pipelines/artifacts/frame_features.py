"""Frame features: the tokens of a frozen frame encoder for every frame of a clip store.

Layout of the folder:
    config.json          settings of the job that writes it
    shards/00003.arrow   tokens of the clips of the store's shard 3
    shards/00003.json    its counts and checksums; a file without it is unfinished
    features.json        encoder, store, layout and all records; a folder without it is unfinished

The file of a shard is an Arrow file with one record batch for each clip, in the order of the store.
A batch has one row for each view and stored frame, view by view. Its column `tokens` holds the
numbers of [L, D] tokens in row-major order, and in fp8 `scales` holds [L] float32 factors. Readers
map the file into memory, so only the frames that are used are read from the disk.

Imports no torch, since commands check features before they start.

Legend: L tokens of a frame, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pyarrow as pa

from pipelines.artifacts.checkpoints import CONFIG, is_hub_name
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage
from pipelines.common.config import fingerprint, flatten
from stgt.errors import STGTError

FEATURES = "features.json"
SHARDS = "shards"
TOKENS, SCALES = "tokens", "scales"
ENCODER_ENTRY = "frame_encoder_fingerprint"
"""Entry of a checkpoint's `config.json` with the fingerprint of its frozen encoder."""

FeatureFormat = Literal["fp16", "fp8", "fp32"]
"""How numbers are stored: half precision, 8 bits (e4m3) with a factor per token, or float32."""
NUMBER_BYTES: dict[FeatureFormat, int] = {"fp16": 2, "fp8": 1, "fp32": 4}
SCALE_BYTES = 4


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a frame are stored."""

    format: FeatureFormat
    tokens: int
    """Number L of tokens of a frame."""
    width: int
    """Width D of a token."""

    @property
    def token_bytes(self) -> int:
        """Size of the numbers of a frame, in bytes."""
        return self.tokens * self.width * NUMBER_BYTES[self.format]

    @property
    def frame_bytes(self) -> int:
        """Size of a frame in a file, in bytes."""
        scales = self.tokens * SCALE_BYTES if self.format == "fp8" else 0
        return self.token_bytes + scales

    @property
    def schema(self) -> pa.Schema:
        """Columns of the files."""
        fields = [(TOKENS, pa.binary(self.token_bytes))]
        if self.format == "fp8":
            fields.append((SCALES, pa.binary(self.tokens * SCALE_BYTES)))
        return pa.schema(fields)


class FeatureRecord(TypedDict):
    """Record of a finished shard of features."""

    shard: int
    clips: int
    frames: int
    """Stored frames of all clips; each has a row per view."""
    bytes: int
    sha256: str
    store_sha256: str
    """Checksum of the store's shard that the frames are from."""
    encoder: str
    """Fingerprint of the frame encoder."""
    shape: list[int]
    """[L, D]"""


def shard_uri(folder: str, shard: int) -> str:
    """Return the URI of the tokens of a shard."""
    return storage.join(folder, SHARDS, f"{shard:05d}.arrow")


def record_uri(folder: str, shard: int) -> str:
    """Return the URI of the record of a shard."""
    return storage.join(folder, SHARDS, f"{shard:05d}.json")


class FrameFeatures:
    """A finished folder of frame features."""

    def __init__(self, uri: str) -> None:
        """Open a folder.

        Raises:
            STGTError: The folder does not exist or is not finished.
        """
        self.uri = storage.resolve(uri)
        place = storage.join(self.uri, FEATURES)
        if not storage.exists(place):
            raise STGTError(
                f"{self.uri} has no {FEATURES}, so it holds no finished frame features; give the "
                "output of python -m jobs.features, or run that job again to finish it"
            )
        self.facts: dict[str, Any] = storage.read_json(place)
        known: dict[str, FeatureFormat] = {name: name for name in NUMBER_BYTES}
        if (name := self.facts.get("format")) not in known:
            raise STGTError(
                f"{place} has the format {name!r}, which this version does not know; write the "
                "features again with python -m jobs.features"
            )
        self.encoder = str(self.facts["encoder"])
        self.layout = TokenLayout(known[name], *self.facts["shape"])
        self.views = int(self.facts["views"])
        """Number of augmented views of each clip; 0 if frames are stored as they are."""
        self.records: list[FeatureRecord] = self.facts["shards"]

    @property
    def digest(self) -> str:
        """Digest of what the tokens depend on, and of the tokens themselves."""
        return str(self.facts["digest"])

    @property
    def num_bytes(self) -> int:
        """Size of all files of tokens, in bytes."""
        return sum(record["bytes"] for record in self.records)

    def check_store(self, store: ClipStore) -> None:
        """Check that these are the features of a clip store as it is now.

        Raises:
            STGTError: They are of other clips, or the store has changed.
        """
        if self.facts["store_digest"] == store.catalogue["digest"]:
            return
        raise STGTError(
            f"{self.uri} holds the features of {self.facts['store']} with the digest "
            f"{self.facts['store_digest']}, but {store.uri} has {store.catalogue['digest']}; give "
            "the features of this store, or run python -m jobs.features again, which writes only "
            "the shards that have changed"
        )

    def check_encoder(self, found: str, model: str) -> None:
        """Check that the features are those of a model's frame encoder.

        Args:
            found: Fingerprint of the model's frame encoder.
            model: Where the model is from, for the message.

        Raises:
            STGTError: They are those of another encoder.
        """
        if found != self.encoder:
            raise STGTError(
                f"{self.uri} holds features of a frame encoder with the fingerprint "
                f"{self.encoder}, but that of {model} has {found}; write features with this "
                "encoder: python -m jobs.features"
            )

    def check_shape(self, shape: tuple[int, int] | None, model: str) -> None:
        """Check that the features have the shape [L, D] of a model's frame tokens.

        Raises:
            STGTError: They have another shape, or the model has no frame encoder of its own.
        """
        if shape is None:
            raise STGTError(
                f"{model} has no frame encoder whose tokens could be stored; leave out "
                "--features.store"
            )
        if shape != (self.layout.tokens, self.layout.width):
            raise STGTError(
                f"{self.uri} holds {self.layout.tokens} tokens of width {self.layout.width} per "
                f"frame, but {model} has {shape[0]} of width {shape[1]}; write features with its "
                "encoder: python -m jobs.features"
            )


def features_digest(facts: Mapping[str, Any]) -> str:
    """Return the digest of a folder's facts, which does not depend on where anything lies."""
    shards = [[record["sha256"], record["store_sha256"]] for record in facts["shards"]]
    names = ("encoder", "format", "views", "augment", "seed", "precision", "store_digest")
    return fingerprint([shards, *(facts[name] for name in names)])


def augment_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how the augmentation of stored views differs from that of a run; empty if not."""
    before, after = flatten(dict(recorded)), flatten(dict(now))
    return ", ".join(
        f"augment.{name} is {before.get(name)} in the features and {after.get(name)} in the run"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )


def known_encoder(checkpoint: str) -> str | None:
    """Return the fingerprint of a checkpoint's frozen encoder, without loading it.

    None if the checkpoint does not record it, as that of a model whose encoder was trained.
    """
    if is_hub_name(checkpoint):
        return None
    uri = storage.join(checkpoint, CONFIG)
    found = storage.read_json(uri) if storage.exists(uri) else {}
    return found.get(ENCODER_ENTRY)
