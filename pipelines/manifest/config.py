"""Settings of the manifest stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from pipelines.artifacts.published_counts import PublishedSplit
from pipelines.common.config import require
from pipelines.manifest.cutting.config import COMMON, CuttingConfig
from stgt.field_marks import Common, FieldMark

ManifestFormat = Literal[
    "webvid",
    "vidal",
    "msrvtt",
    "didemo",
    "lsmdc",
    "msvd",
    "msrvtt_qa",
    "msvd_qa",
    "lavis",
    "alpro",
    "panda70m",
    "internvid",
    "vatex",
    "activitynet",
    "youcook2",
    "vript",
    "video2dataset",
    "urls",
    "folder",
    "webdataset",
    "generic",
]
WITHOUT_ANNOTATIONS: frozenset[ManifestFormat] = frozenset({"folder", "webdataset"})
"""Formats in which the videos themselves are listed."""
WITHOUT_FOLDERS: frozenset[ManifestFormat] = frozenset({"urls", "webdataset"})
"""Formats whose annotations say where the videos are, so that no folder of videos is given."""


@dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """Convert annotations in a dataset's own format to a clip manifest."""

    annotations: Annotated[tuple[str, ...], Common("annotations"), FieldMark.LOCATION] = ()
    """Annotation files (paths or URIs), also compressed (.gz, .zip). Some formats take a file of
    captions and a list of ids, webdataset takes tar files, and folder takes none."""
    output: Annotated[str, Common("run"), FieldMark.LOCATION]
    """Parquet file to write."""
    videos: Annotated[tuple[str, ...], Common("annotations"), FieldMark.LOCATION] = ()
    """Folders or S3 prefixes that contain the videos, in any subfolder. Lists of URLs need none."""
    format: Annotated[ManifestFormat, Common("annotations")] = "webvid"
    """Format of the annotations."""
    split: Annotated[str | None, Common("annotations")] = None
    """Split name to record with every clip. None uses the split given in the annotations, or the
    format's default."""
    caption: Annotated[str, Common("annotations")] = ""
    """Kind of caption, for vidal one of raw, mplug, polish_mplug (if empty), sound_mplug, ofa0 to
    ofa7 and mix, and for activitynet and youcook2 sentence (if empty) or paragraph. A sentence is
    the caption of its time span, a paragraph that of the whole video. Other formats ignore this
    setting."""
    columns: Annotated[tuple[str, ...], Common("annotations")] = ()
    """Column names in generic annotations and lists of URLs, as NAME=COLUMN, such as caption=text
    video=file. Other formats ignore them."""
    first_s: Annotated[float | None, Common("annotations")] = None
    """Use only the first seconds of every clip, such as 30 for DiDeMo, as some published results
    do. Shorter clips are used whole. None uses all of every clip."""
    check: Annotated[PublishedSplit | None, Common("run")] = None
    """Compare the manifest with the published size of this split, and fail if it differs. None
    compares nothing."""

    cutting: Annotated[
        CuttingConfig,
        arg(name=""),  # so that flags are short, such as --cut windows
        Common("cutting", only=COMMON),
    ] = field(default_factory=CuttingConfig)
    """How videos are cut into clips."""

    def __post_init__(self) -> None:
        require(
            self.first_s is None or self.first_s > 0, "first_s", self.first_s, "must be positive"
        )
        if isinstance(self.videos, str):
            # Callers of earlier versions give one folder.
            object.__setattr__(self, "videos", (self.videos,))
        require(
            self.check is None or not self.cutting.changes_clips,
            "check",
            self.check,
            "compares clips as they were published; leave out cut and subtitles",
        )
        require(
            len(self.annotations) > 0 or self.format in WITHOUT_ANNOTATIONS,
            "annotations",
            self.annotations,
            "give a file, or list the videos themselves with --format folder",
        )
        require(
            len(self.annotations) == 0 or self.format != "folder",
            "annotations",
            self.annotations,
            "are not used by the format folder; give only --videos",
        )
        require(
            len(self.videos) > 0 or self.format in WITHOUT_FOLDERS,
            "videos",
            self.videos,
            "give the folders that contain the videos",
        )
        require(
            len(self.annotations) + len(self.videos) > 0,
            "annotations",
            self.annotations,
            "give tar files or the folders that contain them",
        )
