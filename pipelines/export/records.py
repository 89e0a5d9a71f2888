"""Reads the JSON files of a data set that somebody else may have written, and checks every value.

A data set is fetched from the Hub or from a stranger. Its records supply parts of paths, numbers of
shards and counts of clips, so their types are checked, and they are compared with each other,
before they are used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.artifacts.clip_store import STORE, ShardRecord, read_sampling, record_uri
from pipelines.common import storage
from pipelines.export.claim import CLAIM
from pipelines.export.dataset_form import STORE_PART, ExportedShard, exported_uri
from pipelines.export.store_files import catalogue_uri
from pipelines.video.config import SamplingConfig
from stgt.errors import ClipStoreError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
LONGEST_NAME_BYTES = 255
"""Longest name of a folder that the usual file systems allow."""


class _Checked(BaseModel):
    """Fields with checked types. Others are not used by this version, and are left alone."""

    model_config = ConfigDict(strict=True)


class _Claim(_Checked):
    kind: Literal["dataset"]
    store: str
    catalogue_sha256: Digest


class _Shard(_Checked):
    shard: Count
    revision: Count
    clips: Count
    sha256: Digest
    bytes: Count = 0
    quarantined: Count = 0
    salvaged: Count = 0
    generation: Count = 0
    quarantine_sha256: Digest = ""
    reasons: dict[str, Count] = {}
    captions: list[Count] = []
    histograms: dict[str, list[Count]] = {}


class _Catalogue(_Checked):
    sampling: SamplingConfig
    clips: Count
    quarantined: Count
    generation: Count = 0
    shards: list[_Shard]


class _Generation(_Checked):
    clips: Count
    shards: Count
    added: Count


class _Store(_Checked):
    clips: Count
    shards: Count
    manifest_sha256: Digest
    generations: list[_Generation] = []


class _Exported(_Checked):
    shard: Count
    files: list[str]
    file_of_clip: list[Count] | None
    clips: Count
    bytes: Count
    rows_sha256: Digest


def is_folder_name(name: str) -> bool:
    """Return whether a store's folder may have this name: one component of a path."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return (
        name not in ("", os.curdir, os.pardir)
        and len(encoded) <= LONGEST_NAME_BYTES
        and not {"/", "\0"} & set(name)
    )


def read_claim(dataset: str) -> tuple[str, str]:
    """Return the name of the store that was exported, and the checksum of its catalogue.

    Raises:
        ClipStoreError: The folder is not an export of a store.
    """
    uri = storage.join(dataset, CLAIM)
    claim = _read(uri, _Claim)
    if not is_folder_name(claim["store"]):
        raise _wrong(uri, f"{claim['store']!r} cannot be the name of a store's folder")
    return claim["store"], claim["catalogue_sha256"]


def read_catalogue(part: str) -> dict[str, Any]:
    """Read the catalogue in the folder `store` of a data set.

    Raises:
        ClipStoreError: It is no catalogue.
    """
    uri = catalogue_uri(part)
    catalogue = _read(uri, _Catalogue)
    try:
        read_sampling(catalogue["sampling"])
    except TypeError as error:
        raise _wrong(uri, f"this version does not know a setting in `sampling` ({error})") from None
    shards = catalogue["shards"]
    if [one["shard"] for one in shards] != list(range(len(shards))):
        raise _wrong(uri, "its shards are not numbered from 0 in order")
    if sum(one["clips"] for one in shards) != catalogue["clips"]:
        raise _wrong(uri, "its number of clips is not that of its shards")
    return catalogue


def read_identity(part: str, catalogue: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings in the folder `store` of a data set.

    Raises:
        ClipStoreError: They are not those of a store with this catalogue.
    """
    uri = storage.join(part, STORE)
    identity = _read(uri, _Store)
    generation = max(0, len(identity.get("generations", ())) - 1)
    if (identity["shards"], generation) != (
        len(catalogue["shards"]),
        catalogue.get("generation", 0),
    ):
        raise _wrong(uri, "it does not belong to the catalogue beside it")
    return identity


def read_shard(
    dataset: str, shard: int, catalogue: Mapping[str, Any]
) -> tuple[ExportedShard, ShardRecord]:
    """Read what a data set records about a shard: where its clips are, and what the store records.

    Raises:
        ClipStoreError: One of the two is no such record, or they contradict the catalogue.
    """
    uri = record_uri(storage.join(dataset, STORE_PART), shard)
    record: Any = _read(uri, _Shard)
    listed = catalogue["shards"][shard]
    for name in ("shard", "revision", "clips", "sha256"):
        if record[name] != listed[name]:
            raise _wrong(uri, f"its {name} is not that of shard {shard} in the catalogue")
    uri = exported_uri(dataset, shard)
    exported: Any = _read(uri, _Exported)
    files, order = exported["files"], exported["file_of_clip"]
    if exported["shard"] != shard or exported["clips"] != record["clips"]:
        raise _wrong(uri, f"its number or its clips are not those of shard {shard}")
    if len(set(files)) != len(files) or (order is None and len(files) > 1):
        raise _wrong(uri, "it does not say which of its files holds which clip")
    if order is not None and (
        len(order) != record["clips"] or max(order, default=0) >= max(1, len(files))
    ):
        raise _wrong(uri, "`file_of_clip` does not name one of its files for each clip")
    return exported, record


def _read(uri: str, kind: type[BaseModel]) -> dict[str, Any]:
    """Return the object in a JSON file, after a check of the types of its fields."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise ClipStoreError(f"{uri} is missing; fetch the data set again") from error
    try:
        values = json.loads(data)
        # What is checked is what is used: of a field that occurs twice, the last value.
        kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _wrong(uri, f"{place or 'the file'}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(uri, str(error)) from error
    return values


def _wrong(uri: str, what: str) -> ClipStoreError:
    return ClipStoreError(
        f"{uri} is not one that jobs.export wrote ({what}); fetch the data set again, or export "
        "the store again"
    )
