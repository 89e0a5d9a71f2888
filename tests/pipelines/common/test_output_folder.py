"""Output folders are bound to the settings of their first run, also to earlier forms of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from pipelines.common import storage
from pipelines.common.output_folder import (
    CONFIG,
    claim_folder,
    config_record,
    settings_of,
    write_config,
    write_config_beside,
)
from stgt.errors import STGTError
from stgt.field_marks import Common, FieldMark, is_below, marked_fields


@dataclass(frozen=True)
class Inner:
    width: int = 3
    rate: Annotated[float, FieldMark.KEEPS_SHAPES] = 0.5


@dataclass(frozen=True)
class Outer:
    data: Annotated[tuple[str, ...], Common("data")] = ("a",)
    workers: Annotated[int, Common("run"), FieldMark.OPERATIONAL] = 2
    inner: Inner = field(default_factory=Inner)
    place: Annotated[Inner, FieldMark.OPERATIONAL] = field(default_factory=Inner)
    recipe: str = "tiny"


def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
    return STGTError(f"{sorted(settings_of(found))[0]}: {differing}")


def test_a_record_names_job_and_recipe_and_keeps_facts_apart() -> None:
    record = config_record("train", Outer(), digest="abc")
    assert (record["job"], record["recipe"], record["recorded"]) == (
        "train",
        "tiny",
        {"digest": "abc"},
    )
    assert record["data"] == ["a"]
    assert settings_of(record)["inner.width"] == 3
    assert settings_of(record)["digest"] == "abc"


def test_earlier_forms_of_a_record_are_the_same_settings() -> None:
    now = settings_of(config_record("train", Outer(), digest="abc"))
    nested = {
        "data": ["a"],
        "workers": 2,
        "inner": {"width": 3, "rate": 0.5},
        "place": {"width": 3, "rate": 0.5},
        "digest": "abc",
    }
    assert settings_of(nested) == now
    assert settings_of(now) == now  # flat, as sweeps wrote it


def claim(folder: Path, record: Mapping[str, Any], **settings: Any) -> list[str]:
    return claim_folder(str(folder), CONFIG, record, refuse, **settings)


def test_a_folder_is_bound_to_its_first_settings(tmp_path: Path) -> None:
    first = config_record("train", Outer())
    assert claim(tmp_path, first) == []
    assert claim(tmp_path, first) == []
    other = config_record("train", Outer(workers=3, inner=Inner(width=4)))
    with pytest.raises(STGTError, match=r"\['inner.width', 'workers'\]"):
        claim(tmp_path, other)
    assert storage.read_json(str(tmp_path / CONFIG)) == first
    with pytest.raises(STGTError, match=r"\['inner.width'\]"):
        claim(tmp_path, other, ignored=("workers",))
    assert claim(tmp_path, other, overwrite=True) == ["inner.width", "workers"]
    assert storage.read_json(str(tmp_path / CONFIG)) == other


def test_settings_that_may_change_are_written_and_a_folder_without_results_binds_nobody(
    tmp_path: Path,
) -> None:
    claim(tmp_path, config_record("train", Outer()))
    more = config_record("train", Outer(workers=8))
    assert claim(tmp_path, more, ignored=("workers",)) == []
    assert storage.read_json(str(tmp_path / CONFIG))["workers"] == 8
    new = config_record("train", Outer(inner=Inner(width=9)))
    assert claim(tmp_path, new, has_results=False) == []


def test_marks_reach_into_configs_within_configs() -> None:
    operational = frozenset(marked_fields(Outer, FieldMark.OPERATIONAL))
    assert operational == {"workers", "place"}
    assert is_below("place.rate", operational)
    assert not is_below("inner.rate", operational)
    assert not is_below("placed", operational)
    assert set(marked_fields(Outer, FieldMark.KEEPS_SHAPES)) == {"inner.rate", "place.rate"}


@pytest.mark.parametrize("name", ["b.parquet", "b.pth", "b.bin", "b"])
def test_a_config_lies_beside_a_file_whatever_its_ending(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("the output")
    write_config_beside(str(tmp_path / name), "manifest", Outer())
    assert storage.read_json(str(tmp_path / "b.config.json"))["job"] == "manifest"
    write_config(str(tmp_path / "folder"), "ingest", Outer())
    assert storage.read_json(str(tmp_path / "folder" / "config.json"))["job"] == "ingest"


def test_a_setting_that_an_earlier_version_lacked_may_be_unset(tmp_path: Path) -> None:
    record = config_record("train", Outer())
    claim(tmp_path, record)
    assert claim(tmp_path, {**record, "new_setting": None}) == []
    with pytest.raises(STGTError, match="new_setting"):
        claim(tmp_path, {**record, "new_setting": 1})
