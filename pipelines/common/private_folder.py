"""Folders for temporary files that belong to this user alone.

Their names can be guessed, and on a shared machine anybody may create them first. Whoever owns such
a folder could replace the files in it. Imports nothing outside the standard library, because
decoder child processes load it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class ForeignFolderError(PermissionError):
    """There is something of this name that is not a folder of this user."""


def make_private_folder(folder: Path, *, may_be_link: bool) -> Path:
    """Create a folder, and those above it, unless it is there; return it.

    Only this user can read a folder that is created here.

    Args:
        folder: The folder.
        may_be_link: Whether a link to a folder of this user is accepted. It is not safe where
            existing files of the folder are overwritten.

    Raises:
        ForeignFolderError: It belongs to another user, or is a link and must not be one.
        OSError: It cannot be created.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ForeignFolderError(f"{folder} is not a folder") from error
    found = folder.stat() if may_be_link else folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ForeignFolderError(f"{folder} is not a folder")
    if found.st_uid != os.getuid():
        raise ForeignFolderError(f"{folder} belongs to another user")
    return folder
