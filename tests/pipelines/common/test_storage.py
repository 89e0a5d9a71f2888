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


NAMES = [
    "c::d.mp4",
    "zip::x",
    "a*b?",
    "[1].mp4",
    "#1 %41~",
    "~",
    "{x,y}",
    "data:x",
    "file:y",
    "n\nl",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_character_of_a_name_stands_for_itself(tmp_path: Path, name: str) -> None:
    uri = storage.join(str(tmp_path), "s::t", name)
    assert storage.is_local(uri)
    assert storage.resolve(uri) == uri
    storage.write_bytes(uri, b"data")
    assert (tmp_path / "s::t" / name).read_bytes() == b"data"
    assert storage.exists(uri)
    assert storage.read_bytes(f"file://{uri}") == b"data"
    assert storage.size_bytes(uri) == 4
    assert storage.list_names(str(tmp_path / "s::t")) == [name]
    assert storage.list_below(str(tmp_path), 0) == [f"s::t/{name}"]
    assert storage.digest(uri) == storage.digest_of(b"data")
    storage.fetch_file(uri, tmp_path / "copy")
    storage.put_file(tmp_path / "copy", storage.join(str(tmp_path), "other"))
    storage.remove(uri)
    assert not storage.exists(uri)
    assert (tmp_path / "other").read_bytes() == b"data"


def test_the_path_of_a_uri_on_s3_is_its_key() -> None:
    for name in NAMES:
        fs, path = storage.filesystem(f"s3://bucket/p::q/{name}")
        assert (fs.protocol[0], path) == ("s3", f"bucket/p::q/{name}")
    assert storage.filesystem("s3://bucket/k/")[1] == "bucket/k"
    assert storage.is_remote("s3://bucket/a")
    assert not storage.is_remote("/videos/s3://bucket/a")
    assert not storage.is_remote("c::d.mp4")


def test_relative_paths_are_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("a::b/~c", b"data")
    assert (tmp_path / "a::b" / "~c").read_bytes() == b"data"
    assert storage.filesystem("/")[1] == "/"
    assert storage.filesystem("/a/b/")[1] == "/a/b"


def test_files_below_a_folder_are_listed_without_hidden_folders_and_loops(tmp_path: Path) -> None:
    for name in ("b/c.mp4", "a.mp4", ".cache/x.mp4", "b/.y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert storage.list_below(str(tmp_path), 0) == ["a.mp4", "b/.y.mp4", "b/c.mp4"]
    assert storage.list_below(str(tmp_path / "none"), 0) == []


@pytest.mark.slow
def test_names_on_s3_stand_for_themselves(s3: object, tmp_path: Path) -> None:
    prefix = "s3://bucket/na::mes"
    names = [name for name in NAMES if "\n" not in name]  # the test's server takes no line breaks
    for name in names:
        storage.write_bytes(storage.join(prefix, "s", name), name.encode())
    assert storage.list_names(f"{prefix}/s") == sorted(names)
    assert storage.list_below(prefix, 100) == sorted(f"s/{name}" for name in names)
    assert storage.list_below(prefix, len(names) - 1) is None
    for name in names:
        uri = storage.join(prefix, "s", name)
        assert storage.read_bytes(uri) == name.encode()
        assert storage.size_bytes(uri) == len(name)
        assert storage.digest(uri) == storage.digest_of(name.encode())
        storage.fetch_file(uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == name.encode()
    storage.put_file(tmp_path / "copy", f"{prefix}/s/a1b2")
    storage.put_file(tmp_path / "copy", f"{prefix}/a[1]/x")
    storage.put_file(tmp_path / "copy", f"{prefix}/a1/x")
    # A pattern would remove a1b2 as well.
    storage.remove(f"{prefix}/s/a*b?")
    storage.remove(f"{prefix}/a[1]")
    left = set(storage.list_below(prefix, 100) or ())
    assert {"s/a1b2", "a1/x"} <= left
    assert not {"s/a*b?", "a[1]/x"} & left
