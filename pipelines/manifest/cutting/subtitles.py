"""Finds the subtitles of a video and reads them as cues of plain text.

Subtitles lie beside a video under its name: `NAME.srt`, `NAME.vtt` or, with a language,
`NAME.en.srt`. Those of a member of a tar archive are members of the same archive. Markup is
stripped. Captions that roll, in which each subtitle repeats the lines of the one before, as
YouTube's automatic ones do, are reduced to the lines that are new.
"""

from __future__ import annotations

import codecs
import html
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pysubs2
from pysubs2.formats.subrip import SubripFormat
from pysubs2.formats.webvtt import WebVTTFormat

from pipelines.common import storage, tars
from pipelines.manifest.cutting.spans import Cue
from pipelines.manifest.formats import footage, reading

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
_LINE_END = re.compile(r"\r\r\n|\r\n|\r")
"""Ends of lines besides the plain one. The first is that of a file that was converted twice."""
_NUMBER = re.compile(r"\s*\d+\s*")
_COLON = "&#58;"


class SubtitleError(Exception):
    """The subtitles of a video cannot be used."""


@dataclass(frozen=True)
class Subtitles:
    """The subtitles of one file."""

    cues: tuple[Cue, ...]
    """In the order of their start."""
    num_broken: int
    """Number of subtitles that were left out because their times cannot be read."""


@dataclass(frozen=True)
class SubtitleFile:
    """A file of subtitles, or the member of an archive."""

    name: str
    """URI, for messages."""
    uri: str
    """The file, or the archive that contains it."""
    member: tars.Member | None = None
    """Its place in the archive."""


class SubtitleFinder:
    """Finds the subtitles beside videos; each folder and each archive is listed once."""

    def __init__(self, language: str | None) -> None:
        self._language = language
        self._places: dict[str, _Beside] = {}
        self._locks: dict[str, threading.Lock] = {}

    def of(self, video_uri: str) -> SubtitleFile | None:
        """Return the subtitles beside a video; None if there are none.

        Raises:
            SubtitleError: There are several, and it is not clear which to take.
        """
        inside = tars.split(video_uri)
        if inside is None:
            name = storage.name_of(video_uri)
            place = video_uri[: -len(name)].rstrip("/") or "/"
        else:
            place, name = inside
        stem = footage.stem(name) or name
        beside = self._beside(place, is_archive=inside is not None)
        found: dict[str | None, str] = {}
        for candidate in beside.names.get(stem, ()):
            found.setdefault(_language_of(candidate, stem), candidate)
        chosen = _choose(found, self._language, video_uri)
        if chosen is None:
            return None
        if inside is None:
            uri = storage.join(place, chosen)
            return SubtitleFile(uri, uri)
        return SubtitleFile(tars.member_uri(place, chosen), place, beside.members[chosen])

    def _beside(self, place: str, *, is_archive: bool) -> _Beside:
        """Return the subtitles in a folder or an archive."""
        if place not in self._places:
            # Several threads may ask for one archive, which takes long to read.
            with self._locks.setdefault(place, threading.Lock()):
                if place not in self._places:
                    self._places[place] = _in_archive(place) if is_archive else _in_folder(place)
        return self._places[place]


@dataclass(frozen=True)
class _Beside:
    """The subtitles in a folder or an archive."""

    names: dict[str, list[str]]
    """Paths within it, preferred ones first, by the stems of the videos that they fit. `a.en.srt`
    fits the videos `a` and `a.en`."""
    members: dict[str, tars.Member]
    """Members of an archive, by their paths."""


def _in_folder(folder: str) -> _Beside:
    names = [name for name in storage.list_names(folder) if _ending(name) in ENDINGS]
    return _Beside(_by_stem(names), {})


@storage.patient
def _in_archive(archive: str) -> _Beside:
    with storage.opened(archive, tars.BLOCK_BYTES) as file:
        members = {
            member.name: member
            for member in tars.members(file)
            if isinstance(member, tars.Member) and _ending(member.name) in ENDINGS
        }
    return _Beside(_by_stem(members), members)


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (ENDINGS.index(_ending(name)), name)):
        own = name.rpartition(".")[0]
        known.setdefault(own, []).append(name)
        shorter, dot, language = own.rpartition(".")
        if dot and _LANGUAGE.match(language):
            known.setdefault(shorter, []).append(name)
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


def read_subtitles(file: SubtitleFile, encoding: str | None) -> Subtitles:
    """Read subtitles.

    Args:
        file: The file.
        encoding: Encoding of a file that is not UTF-8 and has no byte order mark; None refuses it.

    Raises:
        SubtitleError: The file cannot be used.
    """
    name, uri, member = file.name, file.uri, file.member
    if storage.is_local(uri) and (fault := reading.fault_of_local(Path(uri))) is not None:
        raise SubtitleError(f"{uri}: {fault}")
    size_bytes = storage.size_bytes(uri) if member is None else member.size_bytes
    if size_bytes > MOST_BYTES:
        raise SubtitleError(f"{name} has {size_bytes:,} bytes, which is no file of subtitles")
    if member is None:
        return parse(storage.read_bytes(uri), name, encoding)
    data = b""
    if size_bytes:
        data = storage.read_range(uri, member.start, member.start + size_bytes)
    return parse(data, name, encoding)


def parse(data: bytes, name: str, encoding: str | None) -> Subtitles:
    """Return the subtitles in the contents of a file.

    Args:
        data: The contents.
        name: Name of the file, for messages.
        encoding: See `read_subtitles`.

    Raises:
        SubtitleError: The contents are not text in a known encoding, or not subtitles.
    """
    text = _LINE_END.sub("\n", _decoded(data, name, encoding))
    is_vtt = text.lstrip().startswith("WEBVTT")
    if not is_vtt and not text.strip():
        return Subtitles((), 0)
    times = WebVTTFormat.TIMESTAMP if is_vtt else SubripFormat.TIMESTAMP
    blocks = _blocks(text, is_vtt)
    readable = [block for block in blocks if len(times.findall(block.times)) == 2]
    if not readable and (blocks or not is_vtt):
        raise SubtitleError(f"{name} contains no subtitles (.srt or .vtt)")
    try:
        events = pysubs2.SSAFile.from_string(
            "".join(map(_written, readable)), format_="vtt" if is_vtt else "srt"
        ).events
    except (pysubs2.exceptions.Pysubs2Error, ValueError) as error:
        raise SubtitleError(f"{name} cannot be read as subtitles: {error}") from error
    assert len(events) == len(readable)
    cues: list[tuple[float, float, list[str]]] = []
    num_broken = len(blocks) - len(readable)
    for event in events:
        if event.end <= event.start:
            num_broken += 1
            continue
        lines = [_plain(line) for line in event.plaintext.split("\n")]
        cues.append((event.start / 1000, event.end / 1000, [line for line in lines if line]))
    return Subtitles(tuple(_without_repeats(sorted(cues))), num_broken)


class _Block(NamedTuple):
    """What a file has for one subtitle."""

    times: str
    """The line of its times, which may be broken."""
    lines: list[str]
    """The lines of its text, with markup."""


def _blocks(text: str, is_vtt: bool) -> list[_Block]:
    """Return the blocks of the subtitles in a file, without anything else that it contains.

    The text of a subtitle ends where the next times follow, and in WebVTT also at an empty line.
    Thus comments, styles, regions and the names of subtitles belong to no text. A number directly
    above times belongs to none either.
    """
    found: list[_Block] = []
    inside = False
    for line in _TIME_TAG.sub("", text).split("\n"):
        if ARROW in line or (not is_vtt and len(SubripFormat.TIMESTAMP.findall(line)) == 2):
            if inside:
                _remove_number(found[-1].lines)
            found.append(_Block(line, []))
            inside = True
        elif is_vtt and not line:
            inside = False
        elif inside:
            found[-1].lines.append(line)
    return found


def _remove_number(lines: list[str]) -> None:
    """Remove the number of the following subtitle from the end of a text, if it is there.

    It is directly above the following times, or by itself in a file with an empty line after every
    line. Any other number is text.
    """
    end = len(lines)
    while end and not lines[end - 1].strip():
        end -= 1
    is_above = end == len(lines)
    is_alone = end > 1 and not lines[end - 2].strip()
    if end and _NUMBER.fullmatch(lines[end - 1]) and (is_above or is_alone):
        del lines[end - 1 :]


def _written(block: _Block) -> str:
    """Return a block in a form that pysubs2 reads as exactly one subtitle.

    pysubs2 takes any line with two times for the beginning of a subtitle, and removes one number
    from the end of every text.
    """
    lines = (line.replace(":", _COLON) for line in block.lines)
    return "\n".join([block.times, *lines, "", "0", ""])


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
        except (UnicodeError, LookupError):  # some codecs raise the more general errors
            raise SubtitleError(
                f"{name} is neither UTF-8 nor {encoding} text; convert it to UTF-8"
            ) from error
    if "\0" in text:
        raise SubtitleError(f"{name} contains NUL characters, so it is not text; convert it")
    return text


def _plain(line: str) -> str:
    return " ".join(html.unescape(line).split())


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
