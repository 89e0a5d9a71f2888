"""The list of licenses is complete, and every one that asks for more than a notice has a note."""

from __future__ import annotations

import pytest

from tests.helpers.data import PROJECT
from tests.helpers.licenses import (
    NOTES,
    all_dependencies,
    direct_dependencies,
    is_permissive,
    table,
    unexplained,
)

PAGE = PROJECT / "cluster" / "LICENSES.md"
AGAIN = (
    "install the extras test and bench, and write the page anew: "
    "python -m tests.helpers.licenses > cluster/LICENSES.md"
)


def test_every_direct_dependency_is_listed_with_its_license() -> None:
    lines = PAGE.read_text().splitlines()
    rows = list(table())
    assert len(rows) > 20
    missing = [" | ".join(row) for row in rows if f"| {' | '.join(row)} |" not in lines]
    assert missing == [], AGAIN
    listed = {
        line.split("|")[1].strip()
        for line in lines
        if line.endswith((" running |", " test |", " bench |"))
    }
    assert listed == direct_dependencies().keys(), AGAIN


def test_no_license_is_unknown_or_copyleft_without_a_note() -> None:
    assert len(all_dependencies()) > 100
    assert unexplained() == []


def test_every_note_is_on_the_page() -> None:
    lines = PAGE.read_text().splitlines()
    for name, note in NOTES.items():
        assert f"| {name} | {note} |" in lines


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 OR BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only", False),
        ("MIT AND LGPL-3.0-or-later", False),
        ("MPL-2.0", False),
        ("unknown", False),
    ],
)
def test_a_license_that_asks_for_more_is_noticed(expression: str, permissive: bool) -> None:
    assert is_permissive(expression) is permissive
