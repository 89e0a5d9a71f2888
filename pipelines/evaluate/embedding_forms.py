"""Reads the two forms of a file of embeddings, .npz and .parquet, into the same arrays.

The README of this package describes both. What the arrays contain is checked in
`embedding_file.py`. Nothing in such a file is executed: pickled arrays are refused.

Legend: V videos, N captions, M further texts, Q vectors per item, E width.
"""

from __future__ import annotations

import errno
import logging
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.common import storage
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

NAMED = 5
"""Maximum number of ids to name in an error."""
ARRAYS = ("video_ids", "video_embeds", "caption_video_ids", "caption_embeds")
FURTHER_ARRAYS = ("further_captions", "further_embeds")
OPTIONAL_ARRAYS = ("captions", "pair_scores", *FURTHER_ARRAYS, "further_pair_scores")
COLUMNS = {"kind", "video_id", "embedding"}
OPTIONAL_COLUMNS = {"caption", "caption_row", "further_row", "score"}
KINDS = ("video", "caption", "further", "pair")

Array = npt.NDArray[Any]

DAMAGED_ZIP = (
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for damaged archives, and for compressed ones that they cannot
read."""


@dataclass(frozen=True)
class Contents:
    """What both forms contain, before anything is checked."""

    video_ids: list[str]
    videos: Array
    caption_video_ids: list[str]
    texts: Array
    captions: list[str] | None
    pair_scores: Array | None
    further_captions: list[str]
    further_texts: Array | None
    """None if there are no further texts."""
    further_scores: Array | None


def read_npz(uri: str) -> Contents:
    """Read an .npz file.

    Raises:
        STGTError: The file is damaged or of another kind, lacks arrays, or needs unpickling.
    """
    arrays: dict[str, Array] = {}
    with storage.as_local(uri) as path:
        if not zipfile.is_zipfile(path):
            raise STGTError(
                f"{uri} is not an .npz file, or only a part of one; save it with np.savez"
            )
        try:
            with np.load(path, allow_pickle=False) as archive:
                names = list(archive.files)
                _require_names(uri, "arrays", names, ARRAYS, OPTIONAL_ARRAYS)
                for name in (*ARRAYS, *OPTIONAL_ARRAYS):
                    if name in names:
                        arrays[name] = archive[name]
        except DAMAGED_ZIP as error:
            raise STGTError(f"{uri} is damaged ({error}); save it again with np.savez") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # which seeking to a damaged position gives
                raise
            raise STGTError(f"{uri} is damaged ({error}); save it again with np.savez") from error
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise STGTError(
                    f"{uri} is damaged ({error}); save it again with np.savez"
                ) from error
            raise STGTError(
                f"{uri} cannot be read without unpickling ({error}), and pickled files are "
                "refused; save ids and captions as arrays of text: np.array(ids, dtype=str)"
            ) from error
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise STGTError(f"{uri}: {strange[0]} is not an array; save it with np.savez")
    further = [name for name in FURTHER_ARRAYS if name in arrays]
    if len(further) == 1 or ("further_pair_scores" in arrays and not further):
        raise STGTError(
            f"{uri} contains only a part of the further texts; give {' and '.join(FURTHER_ARRAYS)}"
        )
    return Contents(
        video_ids=_texts(uri, "video_ids", arrays["video_ids"]),
        videos=arrays["video_embeds"],
        caption_video_ids=_texts(uri, "caption_video_ids", arrays["caption_video_ids"]),
        texts=arrays["caption_embeds"],
        captions=_texts(uri, "captions", arrays["captions"]) if "captions" in arrays else None,
        pair_scores=arrays.get("pair_scores"),
        further_captions=_texts(uri, FURTHER_ARRAYS[0], arrays[FURTHER_ARRAYS[0]])
        if further
        else [],
        further_texts=arrays.get("further_embeds"),
        further_scores=arrays.get("further_pair_scores"),
    )


def _require_names(
    uri: str, what: str, found: Iterable[str], needed: Iterable[str], optional: Iterable[str]
) -> None:
    missing = sorted(set(needed) - set(found))
    unknown = sorted(set(found) - set(needed) - set(optional))
    if missing:
        raise STGTError(
            f"{uri} lacks the {what} {', '.join(missing)}; it needs {', '.join(sorted(needed))}, "
            f"and may contain {', '.join(sorted(optional))}"
        )
    if unknown:
        logger.warning("%s: the %s %s are not used", uri, what, ", ".join(unknown))


def _texts(uri: str, name: str, array: Array) -> list[str]:
    if array.dtype.kind in "iu":
        array = array.astype(str)
    if array.ndim != 1 or array.dtype.kind not in "US":
        raise STGTError(
            f"{uri}: {name} must be a list of texts, but it has dtype {array.dtype} and shape "
            f"{list(array.shape)}; save it as np.array(values, dtype=str)"
        )
    return _decoded(uri, name, array)


def _decoded(uri: str, name: str, values: Array | pa.ChunkedArray) -> list[Any]:
    """Return texts, and None where there is none, of an array or a column of text or bytes."""
    try:
        listed = values.tolist() if isinstance(values, np.ndarray) else values.to_pylist()
        listed = [one.decode() if isinstance(one, bytes) else one for one in listed]
        for one in listed:
            if one is not None:
                one.encode()  # numpy's texts may contain what cannot be written
    except ValueError as error:
        raise STGTError(
            f"{uri}: {name} contains a text that is not UTF-8 ({error}); save it as UTF-8"
        ) from error
    return listed


def read_parquet(uri: str) -> Contents:
    """Read a .parquet file.

    Raises:
        STGTError: The file is damaged or of another kind, lacks columns, or has rows that do not
            belong together.
    """
    with storage.as_local(uri) as path:
        try:
            table = pq.read_table(path)
            names = table.column_names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # such as a missing permission; Arrow's own errors have no number
            raise STGTError(f"{uri} is not a Parquet file, or is damaged: {error}") from error
    _require_names(uri, "columns", names, COLUMNS, OPTIONAL_COLUMNS)
    kinds = np.array(_text_column(uri, table, "kind"), dtype=object)
    if strange := sorted({str(kind) for kind in kinds} - set(KINDS)):
        raise STGTError(
            f"{uri}: the column kind contains {', '.join(strange[:NAMED])}; use {', '.join(KINDS)}"
        )
    parts = {kind: table.take(pa.array(np.flatnonzero(kinds == kind))) for kind in KINDS}
    ids = {
        kind: _complete(uri, kind, "video_id", _text_column(uri, parts[kind], "video_id"))
        for kind in ("video", "caption", "pair")
    }
    has_captions = "caption" in names
    captions = _text_column(uri, parts["caption"], "caption") if has_captions else None
    if captions is not None and any(one is None for one in captions):
        captions = None
    further: list[str] = []
    if has_further := len(parts["further"]) > 0:
        _require_names(uri, "columns for further texts", names, ["caption"], names)
        found = _text_column(uri, parts["further"], "caption")
        further = _complete(uri, "further", "caption", found)
    scores, further_scores = _scores_of_rows(uri, parts["pair"], ids, len(further))
    return Contents(
        video_ids=ids["video"],
        videos=_vectors(uri, "videos", parts["video"]["embedding"]),
        caption_video_ids=ids["caption"],
        texts=_vectors(uri, "captions", parts["caption"]["embedding"]),
        captions=captions,
        pair_scores=scores,
        further_captions=further,
        further_texts=_vectors(uri, "further texts", parts["further"]["embedding"])
        if has_further
        else None,
        further_scores=further_scores,
    )


def _text_column(uri: str, table: pa.Table, name: str) -> list[Any]:
    """Return the texts of a column, and None where it is empty; whole numbers become texts."""
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind):
        return [None if one is None else str(one) for one in column.to_pylist()]
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
    )
    if not any(test(kind) for test in tests):
        raise STGTError(f"{uri}: the column {name} has type {kind}; save it as text")
    return _decoded(uri, name, column)


def _complete(uri: str, kind: str, name: str, values: list[Any]) -> list[str]:
    if None in values:
        raise STGTError(
            f"{uri}: row {values.index(None)} of kind {kind} has no {name}; fill it in, or leave "
            "the row out"
        )
    return values


def _vectors(uri: str, what: str, column: pa.ChunkedArray) -> Array:
    """Return [rows, vectors, E] of a column of vectors, or of lists of vectors."""
    rows: list[Array] = []
    for row, value in enumerate(column.to_pylist()):
        if value is None:
            raise STGTError(f"{uri}: embedding {row} of the {what} is empty; give each a vector")
        try:
            vectors = np.atleast_2d(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise STGTError(
                f"{uri}: embedding {row} of the {what} is not a list of numbers, or of lists of "
                f"equally many numbers ({error}); write one vector, or several of one width"
            ) from error
        if vectors.ndim != 2 or vectors.size == 0:
            raise STGTError(f"{uri}: embedding {row} of the {what} is empty; give each a vector")
        rows.append(vectors)
    widths = sorted({vectors.shape[1] for vectors in rows})
    if len(widths) > 1:
        raise STGTError(
            f"{uri}: the embeddings of the {what} have different widths "
            f"({', '.join(map(str, widths[:NAMED]))}); all must have one width"
        )
    if not rows:
        return np.empty((0, 1, 1))
    most = max(len(vectors) for vectors in rows)
    filled = np.empty((len(rows), most, widths[0]))
    for row, vectors in enumerate(rows):
        filled[row, : len(vectors)] = vectors
        filled[row, len(vectors) :] = vectors[0]
    return filled


def _scores_of_rows(
    uri: str, pairs: pa.Table, ids: Mapping[str, Sequence[str]], further: int
) -> tuple[Array | None, Array | None]:
    """Return the scores [N, V] and [M, V] float64 of the rows of kind `pair`.

    Pairs without a row get -inf. An array is None if no row is of its texts.
    """
    if len(pairs) == 0:
        return None, None
    columns = pairs.column_names
    _require_names(uri, "columns for pairs", columns, ["score", "caption_row"], columns)
    column_of = {video_id: column for column, video_id in enumerate(ids["video"])}
    unknown = [one for one in ids["pair"] if one not in column_of]
    if unknown:
        raise STGTError(
            f"{uri}: {len(unknown)} pairs are of videos without an embedding "
            f"({', '.join(unknown[:NAMED])}); correct their video_id"
        )
    counts = {"caption_row": len(ids["caption"]), "further_row": further}
    numbers = {
        name: _row_numbers(uri, pairs, name, count) if name in columns else [None] * len(pairs)
        for name, count in counts.items()
    }
    of_texts = list(zip(*numbers.values(), strict=True))
    if wrong := [pair for pair, rows in enumerate(of_texts) if sum(r is None for r in rows) != 1]:
        raise STGTError(
            f"{uri}: {len(wrong)} pairs, such as row {wrong[0]} of kind pair, need either a "
            "caption_row or a further_row, which is the number of their text; give one of them"
        )
    kind = pairs["score"].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise STGTError(f"{uri}: the column score has type {kind}; save it as numbers")
    values = pairs["score"].to_pylist()
    if any(value is None for value in values):
        raise STGTError(f"{uri}: a pair has no score; leave such pairs out")
    places = [column_of[one] for one in ids["pair"]]
    seen: set[tuple[int | None, int | None, int]] = set()
    for rows, place, video_id in zip(of_texts, places, ids["pair"], strict=True):
        if (*rows, place) in seen:
            row = f"caption {rows[0]}" if rows[0] is not None else f"further text {rows[1]}"
            raise STGTError(
                f"{uri} contains the pair of {row} and {video_id} more than once; keep one score "
                "of each pair"
            )
        seen.add((*rows, place))
    found: list[Array | None] = []
    for name, count in counts.items():
        chosen = [(row, pair) for pair, row in enumerate(numbers[name]) if row is not None]
        if not chosen:
            found.append(None)
            continue
        scores = np.full((count, len(column_of)), -np.inf)
        for row, pair in chosen:
            scores[row, places[pair]] = values[pair]
        found.append(scores)
    return found[0], found[1]


def _row_numbers(uri: str, pairs: pa.Table, name: str, count: int) -> list[int | None]:
    """Return the numbers of texts in a column, and None where it is empty.

    A column of whole numbers with empty places becomes one of floating-point numbers in pandas.
    """
    values = pairs[name].to_pylist()
    values = [None if one is None or one != one else one for one in values]
    for one in values:
        whole = isinstance(one, int) or (isinstance(one, float) and one.is_integer())
        if one is not None and not (whole and 0 <= one < count):
            what = "further text" if name == "further_row" else "caption"
            raise STGTError(
                f"{uri}: {name} of a pair is {one}, which is not the number of a {what}; the "
                f"{count} {what}s are numbered from 0 in the order of their rows"
            )
    return [None if one is None else int(one) for one in values]
