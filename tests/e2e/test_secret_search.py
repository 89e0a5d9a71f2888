"""The search for planted secrets finds them in whatever form and file they are."""

from __future__ import annotations

import base64
import gzip
import json
import urllib.parse
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.secret_search import find_leaks, planted

SECRET = planted("search")


def parquet(path: Path) -> None:
    table = pa.table({"message": ["nothing", f"refused {SECRET}"]})
    pq.write_table(table, path, compression="zstd")


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", f"a {SECRET}")


def text(form: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(f"before {form} after")


@pytest.mark.parametrize(
    "write",
    [
        text(SECRET),
        text(urllib.parse.quote(SECRET, safe="")),
        text(json.dumps({"password": SECRET})),
        text(base64.b64encode(f"user:{SECRET}".encode()).decode()),
        text(base64.b64encode(f"me:{SECRET}@host".encode()).decode()),
        text(base64.b64encode(f"you:{SECRET}".encode()).decode()),
        parquet,
        lambda path: path.write_bytes(gzip.compress(f"x {SECRET}".encode())),
        archive,
    ],
)
def test_a_planted_secret_is_found(tmp_path: Path, write: Callable[[Path], object]) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "file")
    (tmp_path / "other").write_text("pl4nted-search-")
    found, count = find_leaks(tmp_path, {"search": SECRET, "another": planted("another")})
    assert found == [f"{tmp_path}/folder/file: search"]
    assert count == 2
