"""Recognizes videos by their first bytes, whatever the server says they are.

The signatures are those of the containers that FFmpeg reads. What only a decoder can find, such as
a file without a video stream, is found by the ingest.
"""

from __future__ import annotations

from pipelines.fetch.failures import FetchError

HEAD_BYTES = 1024
"""Bytes from the beginning of a file that are enough to recognize it."""
STARTS = (
    (b"\x1aE\xdf\xa3", "mkv"),
    (b"FLV\x01", "flv"),
    (b"0&\xb2u\x8ef\xcf\x11", "wmv"),
    (b"\x00\x00\x01\xba", "mpg"),
    (b"\x00\x00\x01\xb3", "m2v"),
    (b"OggS", "ogv"),
    (b".RMF", "rm"),
    (b"\x06\x0e+4", "mxf"),
    (b"YUV4MPEG2", "y4m"),
    (b"DKIF", "ivf"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
)
"""First bytes of containers, and the extensions of their files."""
QUICKTIME_BOXES = frozenset([b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"])
"""Kinds of the first box of a QuickTime file without a box `ftyp`, at its fifth byte."""
WORDS = frozenset([b"wide", b"free", b"skip"])
"""Those that texts contain as well."""
MOST_OF_WORDS = 2**24
"""Size in bytes that boxes of `WORDS` do not reach. That of a text has no zero byte."""
BOX_HEADER_BYTES = 8
PICTURE_BRANDS = frozenset(
    [b"avif", b"mif1", b"miaf", b"MA1A", b"MA1B", b"heic", b"heix", b"heim", b"heis", b"mif2"]
)
"""Brands of single pictures. Sequences of pictures have others as well."""
SYNC = 0x47
"""First byte of every packet of a transport stream."""
PACKET_BYTES = {188: (0, "ts"), 192: (4, "m2ts")}
"""Sizes of the packets of transport streams, where the first sync byte is, and the extension."""
RAW_STARTS = (b"\x00\x00\x00\x01", b"\x00\x00\x01")
RAW = frozenset(["h264", "264", "h265", "265", "hevc"])
"""Extensions of bare streams, which have no signature of their own but a start code."""
ARCHIVES = (
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ", "xz data"),
    (b"(\xb5/\xfd", "zstd data"),
    (b"%PDF", "a PDF file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"ID3", "audio"),
)
SHOWN_BYTES = 8
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def extension_of(head: bytes, named: str) -> str:
    """Return the extension of a video, without a dot.

    Args:
        head: The first `HEAD_BYTES` bytes of the file, or all of a shorter one.
        named: Extension that the URL gives, in lower case and without a dot.

    Raises:
        FetchError: The bytes are not those of a video.
    """
    for start, extension in STARTS:
        if head.startswith(start):
            return "webm" if extension == "mkv" and b"webm" in head[:64] else extension
    kind = head[4:8]
    if kind == b"ftyp" and not PICTURE_BRANDS.issuperset(_brands(head)):
        brand = head[8:12]
        return "mov" if brand.startswith(b"qt") else "3gp" if brand.startswith(b"3g") else "mp4"
    if kind in QUICKTIME_BOXES and _is_box(head):
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"):
        return "avi" if head[8:12] == b"AVI " else "webp"
    for size, (first, extension) in PACKET_BYTES.items():
        packets = head[first::size]
        if len(packets) > 1 and set(packets) == {SYNC}:
            return extension
    if named in RAW and head.startswith(RAW_STARTS):
        return named
    raise FetchError("not_a_video", f"the server sends {_described(head)}")


def _brands(head: bytes) -> set[bytes]:
    """Return the brands of a box `ftyp`: the main one, and those that the file also follows."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}


def _is_box(head: bytes) -> bool:
    """Return whether the first box has a size that a box of its kind can have."""
    size = int.from_bytes(head[:4], "big")
    is_word = head[4:8] in WORDS
    return size in (0, 1) or BOX_HEADER_BYTES <= size < (MOST_OF_WORDS if is_word else 2**32)


def _described(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "a picture"
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"<"):
        lower = text[:512].lower()
        is_page = b"<html" in lower or lower.startswith(b"<!doctype html")
        return "an HTML page" if is_page else "an XML document"
    if text.startswith((b"{", b"[")):
        return "a JSON document"
    if text.startswith(b"#EXTM3U"):
        return "a playlist, and not the video itself"
    for start, name in ARCHIVES:
        if head.startswith(start):
            return name
    if text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text[:256]):
        return "a text"
    return f"something that begins with the bytes {head[:SHOWN_BYTES].hex()}"
