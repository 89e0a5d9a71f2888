"""Members of tar archives, found by their headers, and the URIs that name one."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest

from pipelines.common import tars
from tests.helpers.archives import link, write_tar

GZIP = gzip.compress(b"x", mtime=0)  # no time, so that tests have the same names everywhere
LONG = "deep/" * 60 + "name with \u00fc and # and %.mp4"


def read(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The members of an archive by name, read by their places, and why others are refused."""
    data = path.read_bytes()
    found, refused = {}, []
    with path.open("rb") as file:
        for one in tars.members(file):
            if isinstance(one, tars.Member):
                found[one.name] = data[one.start : one.start + one.size_bytes]
            else:
                refused.append(f"{one.number}: {one.reason}")
    return found, refused


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_in_every_form_of_header(tmp_path: Path, form: int) -> None:
    entries = {"./a.mp4": b"a" * 513, "b/empty.mp4": b"", "c d\n#.mp4": b"c" * 512}
    if form != tarfile.USTAR_FORMAT:  # which has no long names
        entries[LONG] = b"long" * 1000
    found, refused = read(write_tar(tmp_path / "x.tar", entries, form))
    assert found == {name.removeprefix("./"): data for name, data in entries.items()}
    assert refused == []


def test_members_that_are_no_files_or_point_outside_are_refused_one_by_one(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    entries = {
        "folder": folder,
        "../up.mp4": b"1",
        "/etc/absolute.mp4": b"2",
        "a/../../b.mp4": b"3",
        "soft.mp4": link("soft.mp4", "/etc/passwd"),
        "hard.mp4": link("hard.mp4", "../x", tarfile.LNKTYPE),
        "null.mp4": link("null.mp4", "", tarfile.CHRTYPE),
        "pipe.mp4": link("pipe.mp4", "", tarfile.FIFOTYPE),
        os.fsdecode(b"latin\xfc.mp4"): b"4",
        "a/b.mp4": b"first",
        "./a//b.mp4": b"second",
        "last.mp4": b"last",
    }
    found, refused = read(write_tar(tmp_path / "x.tar", entries))
    assert found == {"a/b.mp4": b"first", "last.mp4": b"last"}
    assert [reason.split(":")[0] for reason in refused] == [*"23456789", "11"]
    assert [reason.partition("': ")[2] for reason in refused] == [
        *["its name points outside of the archive"] * 3,
        "it is a link to '/etc/passwd'",
        "it is a link to '../x'",
        *["it is a device, a pipe or of another kind that is not a file"] * 2,
        "its name is not UTF-8 text",
        "an earlier member has the same name",
    ]
    assert all(reason.isascii() for reason in refused)


@pytest.mark.parametrize("cut", range(0, 3 * 1536 + 1, 256))
def test_what_comes_before_a_cut_is_used(tmp_path: Path, cut: int) -> None:
    """Three members of 600 bytes take a header of 512 bytes and two blocks each."""
    entries = {f"{n}.mp4": str(n).encode() * 600 for n in range(3)}
    path = write_tar(tmp_path / "x.tar", entries)
    with path.open("r+b") as file:
        file.truncate(cut)
    found, refused = read(path)
    whole = [n for n in range(3) if cut >= n * 1536 + 512 + 600]
    assert found == {f"{n}.mp4": entries[f"{n}.mp4"] for n in whole}
    assert len(refused) == 1
    within = cut - len(whole) * 1536
    if cut == 0:
        assert refused == ["1: the file is empty"]
    elif within >= 512:
        name = f"{len(whole)}.mp4"
        assert f"ends at byte {cut:,}, in the middle of {name!r}; fetch it" in refused[0]


def test_an_archive_without_its_end_mark_is_reported(tmp_path: Path) -> None:
    found, refused = read(write_tar(tmp_path / "x.tar", {"a.mp4": b"a"}, end=False))
    assert found == {"a.mp4": b"a"}
    assert refused == [
        "2: the archive ends at byte 1,024 without the mark of its end, so it was probably cut "
        "short; fetch it again for what may be missing"
    ]


def test_a_damaged_header_ends_an_archive_in_one_row(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.mp4": b"a", "b.mp4": b"b", "c.mp4": b"c"})
    with path.open("r+b") as file:
        file.seek(1024 + 20)
        file.write(b"\xff\xfe\xfd")
    found, refused = read(path)
    assert found == {"a.mp4": b"a"}
    assert refused == ["2: the header at byte 1,024 is damaged, so what follows cannot be read"]


@pytest.mark.parametrize("size", [-1024, -(2**40), 2**40])
def test_an_absurd_size_neither_loops_nor_fills_memory(tmp_path: Path, size: int) -> None:
    """Of a member, and of an extended header, whose contents would be read to memory."""
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = link("b.mp4", "", kind)
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        number = size + (256**12 if size < 0 else 0)
        block[124:136] = number.to_bytes(12, "big")
        block[124] |= 0x80
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        path = write_tar(tmp_path / "x.tar", {"a.mp4": b"a"}, end=False)
        with path.open("ab") as file:
            file.write(bytes(block) + bytes(8192))
        found, refused = read(path)
        assert list(found) == ["a.mp4"]
        assert len(refused) == 1, refused


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_thousands_of_extended_headers_in_a_row_end_an_archive_in_one_row(
    tmp_path: Path, kind: bytes
) -> None:
    """`tarfile` reads the header after an extended one by a call of itself."""
    path = write_tar(tmp_path / "x.tar", {"a.mp4": b"a"}, end=False)
    with path.open("ab") as file:
        file.write(link("b.mp4", "", kind).tobuf(tarfile.GNU_FORMAT) * 3000)
    found, refused = read(path)
    assert found == {"a.mp4": b"a"}
    assert refused == [
        "2: the file cannot be read after member 1 (too many extended headers follow one another); "
        "fetch it again"
    ]


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    info = link("b.mp4", "", tarfile.GNUTYPE_SPARSE)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"00000000000\0" + b"00000000000\0"
    block[483:495] = b"00000001000\0"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(block) + bytes(1024))
    found, refused = read(path)
    assert found == {}
    assert "create the archive without --sparse" in refused[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"<!doctype html>" * 100, "the file is not a tar archive"),
        (GZIP, "compressed (gzip), so its members cannot be read by their position"),
        (b"BZh91AY", "compressed (bzip2)"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed (zstd)"),
        (struct.pack("<512B", *range(256), *range(256)), "the file is not a tar archive"),
    ],
)
def test_files_that_are_no_archives_are_refused(data: bytes, said: str) -> None:
    (one,) = tars.members(io.BytesIO(data))
    assert isinstance(one, tars.Refused)
    assert said in one.reason


def test_an_empty_archive_has_no_members() -> None:
    assert list(tars.members(io.BytesIO(bytes(10240)))) == []


def test_a_uri_names_a_member_unless_a_file_has_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "old.tar#1").mkdir()
    for name in ("x.tar", "X2.TAR", "real.tar#a.mp4", "a#b.mp4", "old.tar#1/y.tar"):
        (tmp_path / name).touch()
    place = str(tmp_path)
    for name, expected in {
        "x.tar#a/b#c.mp4": ("x.tar", "a/b#c.mp4"),
        "X2.TAR#a.mp4": ("X2.TAR", "a.mp4"),
        "x.tar#y.tar#a.mp4": ("x.tar", "y.tar#a.mp4"),
        "old.tar#1/y.tar#a.mp4": ("old.tar#1/y.tar", "a.mp4"),
        "gone.tar#a.mp4": ("gone.tar", "a.mp4"),
        "real.tar#a.mp4": None,
        "a#b.mp4": None,
        "x.tar": None,
        "x.tar#": None,
    }.items():
        found = tars.split(f"{place}/{name}")
        assert found == (expected and (f"{place}/{expected[0]}", expected[1])), name
    assert tars.split(f"file://{place}/x.tar#a.mp4") == (f"file://{place}/x.tar", "a.mp4")
    assert tars.is_there(f"{place}/x.tar#a.mp4")
    assert not tars.is_there(f"{place}/gone.tar#a.mp4")
