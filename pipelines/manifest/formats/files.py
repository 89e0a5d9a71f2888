"""Finds videos that annotations name without an extension or with a wrong one."""

from __future__ import annotations

from functools import cached_property

from pipelines.common import storage


class VideoFiles:
    """Finds the files of a folder by their stem, which is the name up to the first dot by default.

    The folder is listed only once, when the first file is looked up.
    """

    def __init__(self, folder: str, extension: str, whole_stem: bool = False) -> None:
        """Set up the lookup.

        Args:
            folder: folder or prefix.
            extension: preferred extension, also used for missing files, such as ".mp4".
            whole_stem: whether the stem ends at the last dot, for ids that contain dots.
        """
        self._folder = folder
        self._extension = extension
        self._whole_stem = whole_stem

    def stem(self, name: str) -> str:
        """Return the part of a file's name that identifies the video."""
        return name.rpartition(".")[0] if self._whole_stem else name.partition(".")[0]

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in storage.list_names(self._folder):
            stem = self.stem(name)
            # Of several files prefer the expected extension, otherwise the first by name.
            if stem not in found or name == f"{stem}{self._extension}":
                found[stem] = name
        return found

    def uri(self, stem: str) -> str:
        """Return the URI of the file with a stem, or the expected URI if there is none."""
        return storage.join(self._folder, self._by_stem.get(stem, f"{stem}{self._extension}"))
