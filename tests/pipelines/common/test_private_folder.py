"""Folders that belong to this user alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.common.private_folder import ForeignFolderError, make_private_folder


def test_a_new_folder_can_be_read_by_this_user_only(tmp_path: Path) -> None:
    folder = make_private_folder(tmp_path / "a" / "b", may_be_link=False)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make_private_folder(folder, may_be_link=False) == folder  # it may be there already


@pytest.mark.parametrize("may_be_link", [True, False])
def test_what_belongs_to_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_be_link: bool
) -> None:
    uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)
    with pytest.raises(ForeignFolderError, match="belongs to another user"):
        make_private_folder(tmp_path / "a", may_be_link=may_be_link)


def test_links_are_followed_only_where_that_is_safe(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert make_private_folder(tmp_path / "link", may_be_link=True).is_dir()
    with pytest.raises(ForeignFolderError, match="link is not a folder"):
        make_private_folder(tmp_path / "link", may_be_link=False)
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name in ("dead", "file"):
        with pytest.raises(ForeignFolderError, match=f"{name} is not a folder"):
            make_private_folder(tmp_path / name, may_be_link=True)
