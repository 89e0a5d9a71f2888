"""Files are whole or absent, and a folder in use is kept from a second run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.common import storage
from stgt.errors import STGTError


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.json"
    storage.write_json(str(target), {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(str(target), {"new": 2})
    assert storage.read_json(str(target)) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_uploaded_folder_gets_its_marker_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b", "z"):
        (source / name).write_text(name)
    written: list[str] = []
    whole_file, whole_bytes = storage.put_file, storage.write_bytes

    def put_file(path: Path, uri: str) -> None:
        written.append(storage.name_of(uri))
        whole_file(path, uri)

    def write_bytes(uri: str, data: bytes) -> None:
        written.append(storage.name_of(uri))
        whole_bytes(uri, data)

    monkeypatch.setattr(storage, "put_file", put_file)
    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    storage.upload_folder(source, str(tmp_path / "target"), "COMPLETE")
    assert written == ["a", "b", "z", "COMPLETE"]


def test_a_folder_in_use_refuses_a_second_run(tmp_path: Path) -> None:
    first = storage.lock(str(tmp_path))
    with first, pytest.raises(STGTError, match="another run is using"):
        storage.lock(str(tmp_path)).__enter__()
    with storage.lock(str(tmp_path)):
        pass


def test_paths_are_made_absolute_and_uris_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")  # noqa: S108
    assert storage.resolve("a/b") == "/tmp/a/b"
    assert storage.resolve("file:///x/y") == "/x/y"
    assert storage.resolve("s3://bucket/key/") == "s3://bucket/key"


def test_the_same_table_gives_the_same_bytes() -> None:
    import pyarrow as pa

    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", None]})
    assert storage.encode_table(table) == storage.encode_table(table)


def test_a_folder_where_a_file_is_to_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(STGTError, match=f"{tmp_path} is a folder, but a file must be written"):
        storage.write_json(str(tmp_path), {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    output = str(tmp_path / "taken" / "run")
    with pytest.raises(STGTError, match=f"{tmp_path}/taken is a file, but a folder is needed"):
        storage.write_json(f"{output}/config.json", {})
    with (
        pytest.raises(STGTError, match=f"{tmp_path}/taken is a file, but a folder is needed"),
        storage.lock(output),
    ):
        pass
