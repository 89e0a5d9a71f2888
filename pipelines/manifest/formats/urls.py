"""Reads lists of URLs of videos: text files, and tables with a column of URLs.

A text file has one URL per line. Blank lines and lines that begin with # are skipped. In a table,
the column `video` or `url` has the URLs, or the one that `--columns video=COLUMN` names. `caption`,
`clip_id`, `start_s`, `end_s` and `split` are read as from generic tables. WebVid's CSV files are
recognized by their columns `contentUrl`, `videoid` and `name`.

Without a column of ids, the id of a clip is made from its URL and span. If a URL is in several
splits, the clips of all but the first of them have the split in their ids as well, and the video is
still fetched once.

The manifest contains the URLs. `python -m jobs.fetch` reads the same lists and fetches the videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from pipelines.artifacts.manifest import is_web_address, url_key
from pipelines.common.config import without_credentials
from pipelines.common.digest_set import DigestSet, digests_of_texts
from pipelines.manifest.formats import generic, opening, reading, tables, values, webvid
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

TEXT = ("txt", "urls", "lst")
"""Extensions of files with one URL per line."""
COMMENT = "#"
URL_COLUMNS = ("video", "url")
"""Names of the column of URLs, unless `--columns` names another one."""
WEBVID_COLUMNS = ("contentUrl", "videoid", "name")
HOW_TO_NAME = "; name the column of URLs with --columns video=COLUMN"
ROWS_AT_A_TIME = 10_000
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each URL; rows of the same clip are merged later.

    Raises:
        ManifestError: The column of URLs is missing, or the file extension is unknown.
    """
    splits = _Splits()
    clips = _clips(source)
    while batch := list(islice(clips, ROWS_AT_A_TIME)):
        yield from splits.with_own_ids(batch)


class _Splits:
    """Gives the clips of one URL and span in several splits different ids.

    It remembers digests only, since lists have millions of rows.
    """

    def __init__(self) -> None:
        self._ids = DigestSet()
        self._firsts = DigestSet()
        """Ids with the split in which they came first."""

    def with_own_ids(self, batch: Iterable[tuple[ClipRow | BadRow, bool]]) -> Rows:
        """Yield rows, with other ids for the clips of a URL that came in another split before.

        Args:
            batch: Rows, and whether the id of each was made from its URL.
        """
        rows = list(batch)
        made = [row for row, is_made in rows if is_made and isinstance(row, ClipRow)]
        pairs = digests_of_texts(f"{row.split}\0{row.clip_id}" for row in made)
        is_new = self._ids.add(digests_of_texts(row.clip_id for row in made))
        self._firsts.add(pairs[is_new])
        is_first = iter(self._firsts.contains(pairs).tolist())
        for row, is_made in rows:
            if is_made and isinstance(row, ClipRow) and not next(is_first):
                yield replace(row, clip_id=f"{row.clip_id}@{row.split}")
            else:
                yield row


def _clips(source: AnnotationSource) -> Iterator[tuple[ClipRow | BadRow, bool]]:
    """Yield a row for each URL, and whether its id was made from the URL, which may have splits."""
    theirs = generic.column_names(source)
    has_splits = any(
        opening.extension(file) not in TEXT and _has_columns(file, (theirs["split"],))
        for file in source.annotations
    )
    for file in source.annotations:
        for number, row, columns in _rows(file, source, theirs):
            reason = reading.require(row, (columns["video"],))
            if reason is None:
                try:
                    clip, is_made = _clip(row, source, columns)
                    yield clip, is_made and has_splits
                    continue
                except ValueError as error:
                    reason = str(error)
            yield BadRow(file=file, row=number, reason=reason), False


def _rows(
    file: str, source: AnnotationSource, theirs: dict[str, str]
) -> Iterator[tuple[int, Any, dict[str, str]]]:
    """Yield the number and the values of each row, and the names of its columns."""
    if opening.extension(file) in TEXT:
        for number, line in opening.lines(file):
            if isinstance(line, str):
                line = line.strip()
                if line.startswith(COMMENT):
                    continue
                line = {theirs["video"]: line}
            yield number, line, theirs
        return
    if opening.extension(file) not in tables.EXTENSIONS:
        raise ManifestError(
            f"{file}: its extension does not say what it is; a list with one URL per line must end "
            f"in {_endings(TEXT)}, and a table in {_endings(tables.EXTENSIONS)}; both may be "
            "compressed (.gz, .bz2, .xz, .zip)"
        )
    required: tuple[str, ...] = tuple(source.columns.values())
    if "video" not in source.columns:
        if not source.columns and _has_columns(file, WEBVID_COLUMNS):
            names = dict(zip(("video", "clip_id", "caption"), WEBVID_COLUMNS, strict=True))
            theirs, required = {**theirs, **names}, WEBVID_COLUMNS
        else:
            found = [name for name in URL_COLUMNS if _has_columns(file, (name,))]
            theirs = {**theirs, "video": (found or URL_COLUMNS)[0]}
            required = (theirs["video"], *required)
    # The first of the required columns is the one that identifies a row.
    required = (theirs["video"], *(name for name in required if name != theirs["video"]))
    for number, row in tables.rows(file, required, HOW_TO_NAME):
        yield number, row, theirs


def _endings(extensions: tuple[str, ...]) -> str:
    *others, last = (f".{extension}" for extension in extensions)
    return f"{', '.join(others)} or {last}"


def _has_columns(file: str, names: tuple[str, ...]) -> bool:
    """Return whether a table has these columns; False for a file that cannot be read at all."""
    try:
        return next(tables.rows(file, names), None) is not None
    except ManifestError:
        return False  # the file is read again, and the error is raised then


def _clip(
    row: dict[str, Any], source: AnnotationSource, theirs: dict[str, str]
) -> tuple[ClipRow, bool]:
    """Convert a row to a clip; also return whether its id was made from its URL.

    Raises:
        ValueError: The row cannot be used.
    """
    url = values.required_id(row[theirs["video"]], theirs["video"]).strip()
    shown = without_credentials(url)
    refuse_other_than_url(url)
    is_webvid = theirs["video"] == WEBVID_COLUMNS[0] and theirs["clip_id"] == WEBVID_COLUMNS[1]
    if is_webvid and isinstance(caption := row[theirs["caption"]], str):
        # Captions are those of the format webvid.
        caption = reading.decode_entities(caption.strip())[: webvid.MAX_CAPTION_CHARACTERS]
        row = {**row, theirs["caption"]: caption}
    details = generic.read_details(row, theirs, shown, needs_caption=theirs["caption"] in row)
    video_id = url_key(url)
    if is_webvid and details.clip_id is not None:
        video_id = details.clip_id
    clip = ClipRow(
        clip_id=details.clip_id if details.clip_id is not None else video_id + details.span,
        video_id=video_id,
        video_uri=url,
        captions=details.captions,
        split=details.split or source.split or "train",
        source="webvid" if is_webvid else "urls",
        start_s=details.start_s,
        end_s=details.end_s,
        extras={name: value for name, value in row.items() if name not in theirs.values()},
    )
    return clip, details.clip_id is None


def refuse_other_than_url(url: str) -> None:
    """Check that a text is the address of a file on the web.

    Raises:
        ValueError: It is something else.
    """
    shown = without_credentials(url)
    if not is_web_address(url):
        raise ValueError(f"{shown!r} is not a URL that begins with https:// or http://")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{shown!r} is not a valid URL: {error}") from error
    if not host or any(character.isspace() for character in parts.netloc):
        raise ValueError(f"{shown!r} is not a valid URL: it has no name of a host")
