"""Where a video lies that annotations name without, or with a wrong, extension."""

from __future__ import annotations

from functools import cached_property

from pipelines.common import storage


class VideoFiles:
    """The files of one folder by their stem: what stands before the first dot, unless told else.

    The folder is listed once, and only when it is asked.
    """

    def __init__(self, folder: str, extension: str, whole_stem: bool = False) -> None:
        """Look into a folder.

        Args:
            folder: folder or prefix.
            extension: of files that are not there, such as ".mp4".
            whole_stem: the stem is all before the last dot: ids hold dots.
        """
        self._folder = folder
        self._extension = extension
        self._whole_stem = whole_stem

    def stem(self, name: str) -> str:
        """The part of a file's name that tells it from others."""
        return name.rpartition(".")[0] if self._whole_stem else name.partition(".")[0]

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in storage.list_names(self._folder):
            stem = self.stem(name)
            # Of several, the expected extension; otherwise the first by name.
            if stem not in found or name == f"{stem}{self._extension}":
                found[stem] = name
        return found

    def uri(self, stem: str) -> str:
        """The file of a stem; under the expected name when there is none."""
        return storage.join(self._folder, self._by_stem.get(stem, f"{stem}{self._extension}"))
