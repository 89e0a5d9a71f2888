"""Subtitles beside videos: which file is taken, and what is read from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.manifest.cutting.subtitles import (
    SubtitleError,
    SubtitleFile,
    SubtitleFinder,
    parse,
    read_subtitles,
)
from tests.helpers.archives import write_tar


def file_at(path: Path) -> SubtitleFile:
    return SubtitleFile(str(path), str(path))


SRT = """1
00:00:01,000 --> 00:00:02,500
<i>A man</i> <font color="#ff0000">cuts</font>
the bread

2
00:00:03,000 --> 00:00:04,000
{\\an8}salt &amp; pepper
"""
ROLLING = """WEBVTT
Kind: captions
Language: en

STYLE
::cue { color: red }

NOTE a comment

00:00:00.160 --> 00:00:02.389 align:start position:0%
~
hello<00:00:00.480><c> everyone</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello everyone
~

00:00:02.399 --> 00:00:04.310 align:start position:0%
hello everyone
welcome<00:00:02.800><c> back</c>

00:00:04.310 --> 00:00:04.320
welcome back
~

00:00:04.320 --> 00:00:06.000
welcome back
to<00:00:04.800><c> my kitchen</c>
""".replace("~", " ")  # YouTube writes lines of one space


def _texts(data: bytes | str, encoding: str | None = None) -> list[str]:
    raw = data.encode() if isinstance(data, str) else data
    return [cue.text for cue in parse(raw, "a.srt", encoding).cues]


def test_markup_is_stripped() -> None:
    assert parse(SRT.encode(), "a.srt", None).cues == (
        (1.0, 2.5, "A man cuts the bread"),
        (3.0, 4.0, "salt & pepper"),
    )


def test_lines_that_roll_are_said_once() -> None:
    assert parse(ROLLING.encode(), "a.vtt", None).cues == (
        (0.16, 2.399, "hello everyone"),
        (2.399, 4.32, "welcome back"),
        (4.32, 6.0, "to my kitchen"),
    )


def test_a_line_that_is_said_again_after_a_pause_is_kept() -> None:
    again = SRT.replace("{\\an8}salt &amp; pepper", "A man cuts\nthe bread")
    assert _texts(again) == ["A man cuts the bread", "A man cuts the bread"]


def test_overlapping_subtitles_are_in_the_order_of_their_start() -> None:
    text = "2\n0:00:02.0 --> 0:00:05.0\nsecond\n\n1\n0:00:01.0 --> 0:00:04.0\nfirst\n"
    assert _texts(text) == ["first", "second"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_recognized(encoding: str) -> None:
    assert _texts(SRT.replace("bread", "br\u00f6tchen").encode(encoding))[0].endswith(
        "br\u00f6tchen"
    )


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        ("cp1252", "caf\u00e9"),
        ("cp1251", "\u0445\u043b\u0435\u0431"),
        ("shift_jis", "\u30d1\u30f3"),
    ],
)
def test_another_encoding_is_refused_unless_it_is_given(encoding: str, word: str) -> None:
    data = SRT.replace("bread", word).encode(encoding)
    with pytest.raises(SubtitleError, match="is not UTF-8 text.*convert it to UTF-8"):
        _texts(data)
    assert _texts(data, encoding)[0].endswith(word)


def test_a_wrong_encoding_is_refused() -> None:
    with pytest.raises(SubtitleError, match="neither UTF-8 nor ascii"):
        _texts("caf\u00e9".encode("cp1252"), "ascii")


@pytest.mark.parametrize("encoding", ["rot13", "undefined", "idna"])
def test_an_encoding_that_cannot_decode_a_file_rejects_it(encoding: str) -> None:
    with pytest.raises(SubtitleError, match=f"neither UTF-8 nor {encoding} text"):
        _texts("caf\u00e9".encode("cp1252"), encoding)


def test_what_is_no_file_rejects_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.srt")
    (tmp_path / "itself.srt").symlink_to("itself.srt")
    (tmp_path / "dead.srt").symlink_to("nowhere.srt")

    for name, reason in (
        ("pipe", "a device or a pipe"),
        ("itself", "it cannot be read"),
        ("dead", "a link to a file that does not exist"),
    ):
        with pytest.raises(SubtitleError, match=reason):
            read_subtitles(file_at(tmp_path / f"{name}.srt"), None)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way(newline: str) -> None:
    assert _texts(SRT.replace("\n", newline)) == ["A man cuts the bread", "salt & pepper"]


def test_broken_times_cost_only_their_subtitle() -> None:
    text = SRT + "\n3\n00:00:09,000 --> 00:00:08,000\nreversed\n\n4\n00:00:10,000 --> \ncut off\n"
    text += "\n5\n00:00:11,000 --> 00:00:12,000\nlast\n"
    found = parse(text.encode(), "a.srt", None)
    assert [cue.text for cue in found.cues] == ["A man cuts the bread", "salt & pepper", "last"]
    assert found.num_broken == 2


TEAMS = """WEBVTT - the title
X-TIMESTAMP-MAP=LOCAL:00:00:00.000

NOTE Confidence: 0.91
duration: 00:00:20.9600000

1a-bb/11-0
00:00:01.000 --> 00:00:02.000
Hello there

NOTE Confidence: 0.82

2a-bb/12-0
00:00:03.000 --> 00:00:04.000 align:start
How are you?

STYLE
::cue { color: red }

REGION
id:bill
width:40%

scene-two
00:05.000 --> 00:06.000
NOTE the time: 12:30:00.500 or 12:31:00.500
fine

NOTE
The last comment
has two lines
"""


def test_comments_styles_regions_and_names_of_webvtt_are_no_text() -> None:
    assert parse(TEAMS.encode(), "a.vtt", None).cues == (
        (1.0, 2.0, "Hello there"),
        (3.0, 4.0, "How are you?"),
        (5.0, 6.0, "NOTE the time: 12:30:00.500 or 12:31:00.500 fine"),
    )


@pytest.mark.parametrize("said", ["It was\n1985", "1985", "It was\n1985\n2001"])
def test_numbers_at_the_end_of_a_text_are_kept(said: str) -> None:
    expected = [said.replace("\n", " "), "so", said.replace("\n", " ")]
    cues = [
        f"00:00:0{number}.000 --> 00:00:0{number}.500\n{text}\n\n"
        for number, text in ((1, said), (3, "so"), (5, said))
    ]
    counted = "".join(f"{number}\n{cue}" for number, cue in enumerate(cues, start=1))
    assert _texts("WEBVTT\n\n" + "".join(cues)) == expected
    assert _texts("WEBVTT\n\n" + counted) == expected
    assert _texts("".join(cues)) == expected
    assert _texts(counted) == expected
    assert _texts(counted.replace("\n\n", "\n").rstrip()) == expected  # nothing between cues
    assert _texts(counted.replace("\n", "\r\r\n")) == expected


def test_numbers_in_a_file_with_an_empty_line_after_each_are_no_text() -> None:
    assert _texts(SRT.replace("\n", "\n\n")) == ["A man cuts the bread", "salt & pepper"]


def test_subtitles_without_text_are_left_out() -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\n\n2\n00:00:03,000 --> 00:00:04,000\n3\n"
    text += "00:00:05,000 --> 00:00:06,000\nlast\n"
    assert _texts(text) == ["last"]


def test_times_of_words_begin_no_subtitle() -> None:
    text = "WEBVTT\n\n00:00:01.000 --> 00:00:02.000\n"
    text += "one<00:00:01.300><c> two</c><00:00:01.600><c> three</c>\n"
    assert _texts(text) == ["one two three"]


def test_rare_separators_of_lines_divide_no_text() -> None:
    text = "WEBVTT\n\n00:00:01.000 --> 00:00:02.000\nfirst\u2028\u2028second\x85third\n"
    assert _texts(text) == ["first second third"]


@pytest.mark.parametrize("text", ["nothing here", "<html><body>404</body></html>", "{}"])
def test_what_is_no_subtitle_file_is_refused(text: str) -> None:
    with pytest.raises(SubtitleError, match="contains no subtitles"):
        _texts(text)


def test_a_file_of_zeros_is_refused() -> None:
    with pytest.raises(SubtitleError, match="NUL"):
        _texts(bytes(100))


@pytest.mark.parametrize("text", ["", "\n", "WEBVTT\n", "WEBVTT\n\nNOTE nothing is said\n"])
def test_a_file_may_be_without_subtitles(text: str) -> None:
    assert _texts(text) == []


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.srt"
    with path.open("wb") as file:
        file.truncate(33 * 1024**2)
    with pytest.raises(SubtitleError, match="no file of subtitles"):
        read_subtitles(file_at(path), None)


@pytest.mark.parametrize(
    ("names", "language", "expected"),
    [
        (["a.srt"], None, "a.srt"),
        (["a.VTT"], None, "a.VTT"),
        (["a.vtt", "a.srt"], None, "a.srt"),
        (["a.en.vtt"], None, "a.en.vtt"),
        (["a.srt", "a.de.srt"], None, "a.srt"),
        (["a.srt", "a.de.srt"], "de", "a.de.srt"),
        (["a.srt", "a.de.srt"], "fr", "a.srt"),
        (["a.de.srt"], "fr", None),
        (["a.en-US.vtt", "a.en-orig.vtt", "a.de.vtt"], "en", "a.en-US.vtt"),
        (["a.pt_BR.srt"], "pt-br", "a.pt_BR.srt"),
        (["ab.srt", "a.b.c.srt", "a.mp4.srt"], None, None),
        ([], None, None),
    ],
)
def test_the_file_beside_a_video(
    tmp_path: Path, names: list[str], language: str | None, expected: str | None
) -> None:
    for name in names:
        (tmp_path / name).touch()
    found = SubtitleFinder(language).of(str(tmp_path / "a.mp4"))
    assert found == (None if expected is None else file_at(tmp_path / expected))


@pytest.mark.parametrize(
    ("language", "expected"), [(None, "x.1/a.srt"), ("de", "x.1/a.de.vtt"), ("fr", "x.1/a.srt")]
)
def test_the_member_beside_a_member_of_an_archive(
    tmp_path: Path, language: str | None, expected: str
) -> None:
    vtt = "WEBVTT\n\n00:01.000 --> 00:02.500\nein Mann\n"
    entries = {"x.1/a.mp4": "video", "x.1/a.srt": SRT, "x.1/a.de.vtt": vtt, "a.srt": "another"}
    archive = str(write_tar(tmp_path / "s.tar", {**entries, "x.1/b.mp4": "", "x.1/empty.srt": ""}))
    finder = SubtitleFinder(language)
    found = finder.of(f"{archive}#x.1/a.mp4")
    assert found is not None
    assert found.name == f"{archive}#{expected}"
    said = {"x.1/a.srt": "A man cuts the bread", "x.1/a.de.vtt": "ein Mann"}
    assert read_subtitles(found, None).cues[0].text == said[expected]
    assert finder.of(f"{archive}#x.1/b.mp4") is None
    empty = finder.of(f"{archive}#x.1/empty.mp4")
    assert empty is not None
    assert read_subtitles(empty, None).cues == ()


def test_several_languages_need_a_choice(tmp_path: Path) -> None:
    for name in ("a.de.srt", "a.en.srt"):
        (tmp_path / name).touch()
    with pytest.raises(SubtitleError, match=r"\(de, en\); choose one with --subtitle-language"):
        SubtitleFinder(None).of(str(tmp_path / "a.mp4"))
