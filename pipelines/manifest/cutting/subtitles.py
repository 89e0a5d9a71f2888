"""Finds the subtitles of a video and reads them as cues of plain text.

Subtitles lie beside a video under its name: `NAME.srt`, `NAME.vtt` or, with a language,
`NAME.en.srt`. Markup is stripped. Captions that roll, in which each subtitle repeats the lines of
the one before, as YouTube's automatic ones do, are reduced to the lines that are new.
"""

from __future__ import annotations

import codecs
import html
import re
from dataclasses import dataclass

import pysubs2

from pipelines.common import storage, tars
from pipelines.manifest.cutting.spans import Cue

ENDINGS = ("srt", "vtt")
"""Extensions of subtitles, in the order in which they are preferred."""
MOST_BYTES = 32 * 1024**2
"""Largest file of subtitles. A film has some 100 KB."""
CONTINUES_S = 0.1
"""A subtitle that begins at most so long after the one before continues it."""
ARROW = "-->"
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*\Z")
_TIME_TAG = re.compile(r"<[\d:.]+>")
"""Time of the next word, which WebVTT has within a text."""


class SubtitleError(Exception):
    """The subtitles of a video cannot be used."""


@dataclass(frozen=True)
class Subtitles:
    """The subtitles of one file."""

    cues: tuple[Cue, ...]
    """In the order of their start."""
    num_broken: int
    """Number of subtitles that were left out because their times cannot be read."""


class SubtitleFinder:
    """Finds the subtitles beside videos; each folder is listed once."""

    def __init__(self, language: str | None) -> None:
        self._language = language
        self._folders: dict[str, dict[str, list[str]]] = {}

    def of(self, video_uri: str) -> str | None:
        """Return the URI of the subtitles beside a video; None if there are none.

        Members of archives have none.

        Raises:
            SubtitleError: There are several, and it is not clear which to take.
        """
        if tars.split(video_uri) is not None:
            return None
        name = storage.name_of(video_uri)
        folder = video_uri[: -len(name)].rstrip("/") or "/"
        stem = name.rpartition(".")[0] or name
        found: dict[str | None, str] = {}
        for candidate in self._candidates(folder).get(stem, ()):
            found.setdefault(_language_of(candidate, stem), candidate)
        chosen = _choose(found, self._language, video_uri)
        return None if chosen is None else storage.join(folder, chosen)

    def _candidates(self, folder: str) -> dict[str, list[str]]:
        """Return the names of subtitles in a folder, preferred ones first, by the stems they fit.

        `a.en.srt` fits the videos `a` and `a.en`.
        """
        known = self._folders.get(folder)
        if known is not None:
            return known
        known = {}
        names = [name for name in storage.list_names(folder) if _ending(name) in ENDINGS]
        for name in sorted(names, key=lambda name: (ENDINGS.index(_ending(name)), name)):
            own = name.rpartition(".")[0]
            known.setdefault(own, []).append(name)
            shorter, dot, language = own.rpartition(".")
            if dot and _LANGUAGE.match(language):
                known.setdefault(shorter, []).append(name)
        self._folders[folder] = known  # complete, since several threads may ask at the same time
        return known


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _language_of(name: str, stem: str) -> str | None:
    own = name.rpartition(".")[0]
    return None if own == stem else own[len(stem) + 1 :]


def _choose(found: dict[str | None, str], language: str | None, video_uri: str) -> str | None:
    tagged = {tag.lower().replace("_", "-"): name for tag, name in found.items() if tag}
    if language is not None:
        wanted = language.lower().replace("_", "-")
        fitting = [tag for tag in tagged if tag == wanted or tag.startswith(f"{wanted}-")]
        # The exact language comes first, and then the shortest of its variants.
        best = min(fitting, key=lambda tag: (tag != wanted, len(tag), tag), default=None)
        return found.get(None) if best is None else tagged[best]
    if None in found:
        return found[None]
    if len(tagged) > 1:
        raise SubtitleError(
            f"{video_uri} has subtitles in several languages ({', '.join(sorted(tagged))}); choose "
            "one with --subtitle-language"
        )
    return next(iter(tagged.values()), None)


def read_subtitles(uri: str, encoding: str | None) -> Subtitles:
    """Read a file of subtitles.

    Args:
        uri: The file.
        encoding: Encoding of a file that is not UTF-8 and has no byte order mark; None refuses it.

    Raises:
        SubtitleError: The file cannot be used.
    """
    if (size_bytes := storage.size_bytes(uri)) > MOST_BYTES:
        raise SubtitleError(f"{uri} has {size_bytes:,} bytes, which is no file of subtitles")
    return parse(storage.read_bytes(uri), uri, encoding)


def parse(data: bytes, name: str, encoding: str | None) -> Subtitles:
    """Return the subtitles in the contents of a file.

    Args:
        data: The contents.
        name: Name of the file, for messages.
        encoding: See `read_subtitles`.

    Raises:
        SubtitleError: The contents are not text in a known encoding, or not subtitles.
    """
    text = "\n".join(_decoded(data, name, encoding).splitlines())
    is_vtt = text.lstrip().startswith("WEBVTT")
    if not is_vtt and not text.strip():
        return Subtitles((), 0)
    try:
        events = pysubs2.SSAFile.from_string(text, format_="vtt" if is_vtt else "srt").events
    except (pysubs2.exceptions.Pysubs2Error, ValueError) as error:
        raise SubtitleError(f"{name} cannot be read as subtitles: {error}") from error
    if not events and not (is_vtt and ARROW not in text):
        raise SubtitleError(f"{name} contains no subtitles (.srt or .vtt)")
    cues: list[tuple[float, float, list[str]]] = []
    num_broken = 0
    for event in events:
        said = event.plaintext
        if ARROW in said:  # the time of a following subtitle is broken
            num_broken += said.count(ARROW)
            said = said.partition("\n\n")[0] if "\n\n" in said else ""
        if event.end <= event.start:
            num_broken += 1
            continue
        lines = [_plain(line) for line in said.split("\n")]
        cues.append((event.start / 1000, event.end / 1000, [line for line in lines if line]))
    return Subtitles(tuple(_without_repeats(sorted(cues))), num_broken)


def _decoded(data: bytes, name: str, encoding: str | None) -> str:
    known = next((codec for mark, codec in MARKS if data.startswith(mark)), None)
    try:
        text = data.decode(known or "utf-8")
    except UnicodeDecodeError as error:
        if known is not None or encoding is None:
            raise SubtitleError(
                f"{name} is not UTF-8 text (byte {error.start + 1:,}); convert it to UTF-8, or "
                "give its encoding with --subtitle-encoding, such as cp1252"
            ) from error
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            raise SubtitleError(
                f"{name} is neither UTF-8 nor {encoding} text; convert it to UTF-8"
            ) from error
    if "\0" in text:
        raise SubtitleError(f"{name} contains NUL characters, so it is not text; convert it")
    return text


def _plain(line: str) -> str:
    return " ".join(html.unescape(_TIME_TAG.sub("", line)).split())


def _without_repeats(cues: list[tuple[float, float, list[str]]]) -> list[Cue]:
    """Return cues without the lines that the cue before has shown last, if one follows the other.

    A cue that shows nothing new makes the one before last longer.
    """
    found: list[Cue] = []
    shown: list[str] = []
    shown_until_s = float("-inf")
    for start_s, end_s, lines in cues:
        if not lines:
            continue
        continues = start_s - shown_until_s <= CONTINUES_S
        new = lines[_repeated(shown, lines) :] if continues else lines
        if new:
            found.append(Cue(start_s, end_s, " ".join(new)))
        elif found:
            found[-1] = found[-1]._replace(end_s=max(found[-1].end_s, end_s))
        shown, shown_until_s = lines, max(shown_until_s, end_s) if continues else end_s
    return found


def _repeated(before: list[str], lines: list[str]) -> int:
    """Return how many lines at the beginning repeat the last lines of the cue before."""
    for count in range(min(len(before), len(lines)), 0, -1):
        if before[-count:] == lines[:count]:
            return count
    return 0
