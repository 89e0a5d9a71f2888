"""Adds subtitles to the facts of videos, with or without Ray."""

from __future__ import annotations

from pipelines.common import storage
from pipelines.manifest.cutting import subtitles
from pipelines.manifest.cutting.config import CuttingConfig
from pipelines.manifest.cutting.facts import VideoFacts
from pipelines.manifest.cutting.subtitles import SubtitleError, SubtitleFinder

BAD_SUBTITLES = "bad_subtitles"
"""Reason of a video whose subtitles cannot be used."""


class SubtitleReader:
    """Reads the subtitles of videos, by the settings for them."""

    def __init__(self, config: CuttingConfig) -> None:
        self._finder = SubtitleFinder(config.subtitle_language)
        self._encoding = config.subtitle_encoding

    def version(self, video_uri: str) -> str:
        """Return a text that changes with the subtitles of a video; empty if it has none.

        Raises:
            SubtitleError: It is not clear which subtitles to take.
            OSError: They cannot be looked up.
        """
        file = self._finder.of(video_uri)
        if file is None:
            return ""
        size_bytes, version = storage.size_and_version(file.uri)
        return f"{storage.name_of(file.name)}|{size_bytes}|{version}"

    def add_to(self, found: VideoFacts) -> VideoFacts:
        """Return the facts of a video with its subtitles, if it has any."""
        try:
            file = self._finder.of(found["video_uri"])
            if file is None:
                return found
            read = subtitles.read_subtitles(file, self._encoding)
        except SubtitleError as error:
            return {**found, "reason": BAD_SUBTITLES, "message": str(error)}
        except storage.UnreachableError:
            raise
        except OSError as error:
            message = f"{error.filename or found['video_uri']}: {error.strerror or error}"
            return {**found, "reason": BAD_SUBTITLES, "message": message}
        cues = [(cue.start_s, cue.end_s, cue.text) for cue in read.cues]
        return {**found, "cues": cues, "broken_cues": read.num_broken}
