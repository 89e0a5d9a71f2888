"""Reads a file of somebody else's embeddings of videos and captions, and their pair scores.

The README of this package describes both forms, .npz and .parquet. Nothing in such a file is
executed: pickled arrays are refused.

Legend: V videos, N captions, Q vectors per video, C vectors per caption, E width.
"""

from __future__ import annotations

import logging
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.common import storage
from pipelines.evaluate.known_galleries import base_name
from stgt.errors import STGTError
from stgt.inputs.caption_text import clean_caption

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

NAMED = 5
"""Maximum number of ids to name in an error."""
UNIT_TOLERANCE = 1e-3
"""Largest difference from 1 of the length of a vector that counts as normalized. Vectors that were
normalized in half precision are within it."""
ARRAYS = ("video_ids", "video_embeds", "caption_video_ids", "caption_embeds")
OPTIONAL_ARRAYS = ("captions", "pair_scores")
COLUMNS = {"kind", "video_id", "embedding"}
OPTIONAL_COLUMNS = {"caption", "caption_row", "score"}
KINDS = ("video", "caption", "pair")


@dataclass(frozen=True)
class EmbeddingFile:
    """The contents of a file of embeddings. All vectors have unit length."""

    uri: str
    video_ids: list[str]
    videos: FloatArray
    """[V, Q, E] of unit length. If a video has fewer vectors than another, its first is
    repeated, which does not change the best one."""
    caption_video_ids: list[str]
    """[N] id of the video that each caption belongs to."""
    texts: FloatArray
    """[N, C, E] of unit length, padded like those of videos."""
    captions: list[str] | None
    """[N] texts of the captions; None if the file does not contain them."""
    pair_scores: FloatArray | None
    """[N, V] score of each caption and video, higher is better; -inf for pairs without one. None if
    the file contains no scores."""
    was_normalized: bool
    """Whether all vectors of the file had unit length already."""

    @property
    def vectors(self) -> tuple[int, int]:
        """Largest numbers of vectors of a video and of a caption."""
        return self.videos.shape[1], self.texts.shape[1]


def read_embedding_file(uri: str) -> EmbeddingFile:
    """Read and check a file of embeddings.

    Raises:
        STGTError: The file is missing, is of another kind, lacks arrays or columns, or contains
            NaN, vectors of length zero, different widths, or ids that do not belong together.
    """
    if not storage.exists(uri):
        raise STGTError(f"embedding_file: {uri} does not exist; give a .npz or .parquet file")
    if uri.endswith(".npz"):
        return _checked(uri, _read_npz(uri))
    if uri.endswith(".parquet"):
        return _checked(uri, _read_parquet(uri))
    raise STGTError(
        f"embedding_file: {uri} is neither .npz nor .parquet; save the embeddings in one of these "
        "forms, which pipelines/evaluate/README.md describes"
    )


@dataclass(frozen=True)
class _Contents:
    """What both forms contain, before anything is checked."""

    video_ids: list[str]
    videos: npt.NDArray[Any]
    caption_video_ids: list[str]
    texts: npt.NDArray[Any]
    captions: list[str] | None
    pair_scores: npt.NDArray[Any] | None


def _read_npz(uri: str) -> _Contents:
    with storage.as_local(uri) as path:
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except zipfile.BadZipFile as error:
            raise STGTError(f"{uri} is not an .npz file: {error}; save it with np.savez") from error
        except ValueError as error:
            raise STGTError(
                f"{uri} cannot be read without unpickling ({error}), and pickled files are "
                "refused; save ids and captions as arrays of text: np.array(ids, dtype=str)"
            ) from error
    _require_names(uri, "arrays", arrays, ARRAYS, OPTIONAL_ARRAYS)
    scores = arrays.get("pair_scores")
    return _Contents(
        video_ids=_texts(uri, "video_ids", arrays["video_ids"]),
        videos=arrays["video_embeds"],
        caption_video_ids=_texts(uri, "caption_video_ids", arrays["caption_video_ids"]),
        texts=arrays["caption_embeds"],
        captions=_texts(uri, "captions", arrays["captions"]) if "captions" in arrays else None,
        pair_scores=scores,
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


def _texts(uri: str, name: str, array: npt.NDArray[Any]) -> list[str]:
    if array.dtype.kind in "iu":
        array = array.astype(str)
    if array.ndim != 1 or array.dtype.kind not in "US":
        raise STGTError(
            f"{uri}: {name} must be a list of texts, but it has dtype {array.dtype} and shape "
            f"{list(array.shape)}; save it as np.array(values, dtype=str)"
        )
    if array.dtype.kind == "S":
        return [one.decode() for one in array.tolist()]
    return array.tolist()


def _read_parquet(uri: str) -> _Contents:
    with storage.as_local(uri) as path:
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise STGTError(f"{uri} is not a Parquet file: {error}") from error
    _require_names(uri, "columns", table.column_names, COLUMNS, OPTIONAL_COLUMNS)
    kinds = np.array(table["kind"].to_pylist(), dtype=object)
    if strange := sorted({str(kind) for kind in kinds} - set(KINDS)):
        raise STGTError(
            f"{uri}: the column kind contains {', '.join(strange[:NAMED])}; use {', '.join(KINDS)}"
        )
    parts = {kind: table.take(pa.array(np.flatnonzero(kinds == kind))) for kind in KINDS}
    captions = parts["caption"]["caption"].to_pylist() if "caption" in table.column_names else None
    if captions is not None and any(one is None for one in captions):
        captions = None
    ids = {kind: [str(one) for one in part["video_id"].to_pylist()] for kind, part in parts.items()}
    return _Contents(
        video_ids=ids["video"],
        videos=_vectors(uri, "videos", parts["video"]["embedding"]),
        caption_video_ids=ids["caption"],
        texts=_vectors(uri, "captions", parts["caption"]["embedding"]),
        captions=captions,
        pair_scores=_scores_of_rows(uri, parts["pair"], ids) if len(parts["pair"]) else None,
    )


def _vectors(uri: str, what: str, column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return [rows, vectors, E] of a column of vectors, or of lists of vectors."""
    rows: list[npt.NDArray[Any]] = []
    for row, value in enumerate(column.to_pylist()):
        try:
            vectors = np.atleast_2d(np.asarray(value, dtype=np.float32))
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
        return np.empty((0, 1, 1), dtype=np.float32)
    most = max(len(vectors) for vectors in rows)
    filled = np.empty((len(rows), most, widths[0]), dtype=np.float32)
    for row, vectors in enumerate(rows):
        filled[row, : len(vectors)] = vectors
        filled[row, len(vectors) :] = vectors[0]
    return filled


def _scores_of_rows(
    uri: str, pairs: pa.Table, ids: Mapping[str, Sequence[str]]
) -> npt.NDArray[np.float32]:
    """Return [N, V] scores of the rows of kind `pair`; -inf for pairs that have none."""
    _require_names(
        uri, "columns for pairs", pairs.column_names, ("score", "caption_row"), pairs.column_names
    )
    column_of = {video_id: column for column, video_id in enumerate(ids["video"])}
    unknown = [one for one in ids["pair"] if one not in column_of]
    if unknown:
        raise STGTError(
            f"{uri}: {len(unknown)} pairs are of videos without an embedding "
            f"({', '.join(unknown[:NAMED])}); correct their video_id"
        )
    rows = pairs["caption_row"].to_pylist()
    count = len(ids["caption"])
    if strange := [row for row in rows if row is None or not 0 <= row < count]:
        raise STGTError(
            f"{uri}: caption_row of {len(strange)} pairs, such as {strange[0]}, is not the number "
            f"of a caption; the {count} captions are numbered from 0 in the order of their rows"
        )
    values = pairs["score"].to_pylist()
    if any(value is None for value in values):
        raise STGTError(f"{uri}: a pair has no score; leave such pairs out")
    scores = np.full((count, len(column_of)), -np.inf, dtype=np.float32)
    scores[rows, [column_of[one] for one in ids["pair"]]] = values
    return scores


def _checked(uri: str, found: _Contents) -> EmbeddingFile:
    _check_ids(uri, found)
    videos, texts = (
        _as_vectors(uri, name, array, count)
        for name, array, count in (
            ("videos", found.videos, len(found.video_ids)),
            ("captions", found.texts, len(found.caption_video_ids)),
        )
    )
    if videos.shape[2] != texts.shape[2]:
        raise STGTError(
            f"{uri}: the embeddings of the videos have width {videos.shape[2]}, but those of the "
            f"captions have width {texts.shape[2]}; both must be in one space"
        )
    _check_values(uri, "videos", videos, found.video_ids)
    owners = [f"caption {row} of {one}" for row, one in enumerate(found.caption_video_ids)]
    _check_values(uri, "captions", texts, owners)
    lengths = [np.linalg.norm(array, axis=2) for array in (videos, texts)]
    normalized = all(bool((np.abs(one - 1) <= UNIT_TOLERANCE).all()) for one in lengths)
    if not normalized:
        logger.warning(
            "%s contains vectors that are not of unit length (%.3g to %.3g); they are normalized, "
            "because pairs are compared by cosine",
            uri,
            min(float(one.min()) for one in lengths),
            max(float(one.max()) for one in lengths),
        )
    return EmbeddingFile(
        uri=uri,
        video_ids=found.video_ids,
        videos=videos / lengths[0][:, :, None],
        caption_video_ids=found.caption_video_ids,
        texts=texts / lengths[1][:, :, None],
        captions=found.captions,
        pair_scores=_checked_scores(uri, found),
        was_normalized=normalized,
    )


def _check_ids(uri: str, found: _Contents) -> None:
    for what, ids in (("videos", found.video_ids), ("captions", found.caption_video_ids)):
        if not ids:
            raise STGTError(f"{uri} contains no {what}; it needs embeddings of both")
    counted: defaultdict[str, int] = defaultdict(int)
    for one in found.video_ids:
        counted[one] += 1
    if repeated := [one for one, count in counted.items() if count > 1]:
        raise STGTError(
            f"{uri} contains {len(repeated)} videos more than once "
            f"({', '.join(repeated[:NAMED])}); give each one row, with several vectors if need be"
        )
    unknown = list(dict.fromkeys(one for one in found.caption_video_ids if one not in counted))
    if unknown:
        raise STGTError(
            f"{uri}: captions belong to {len(unknown)} videos that have no embedding "
            f"({', '.join(unknown[:NAMED])}); add them, or correct the ids"
        )
    silent = counted.keys() - set(found.caption_video_ids)
    if silent:
        raise STGTError(
            f"{uri}: {len(silent)} videos have no caption ({', '.join(sorted(silent)[:NAMED])}); "
            "add captions for them, or leave them out"
        )
    if found.captions is not None and len(found.captions) != len(found.caption_video_ids):
        raise STGTError(
            f"{uri}: captions has {len(found.captions)} entries, but caption_video_ids has "
            f"{len(found.caption_video_ids)}; both describe the same captions"
        )


def _as_vectors(uri: str, what: str, array: npt.NDArray[Any], count: int) -> FloatArray:
    """Return embeddings as [rows, vectors, E] float32."""
    if array.dtype.kind != "f" or array.ndim not in (2, 3):
        raise STGTError(
            f"{uri}: the embeddings of the {what} have dtype {array.dtype} and shape "
            f"{list(array.shape)}; they must be floating-point numbers of shape [items, width], or "
            "[items, vectors, width]"
        )
    if len(array) != count:
        raise STGTError(
            f"{uri}: there are {len(array)} embeddings for {count} ids of the {what}; give one row "
            "for each id"
        )
    vectors = array[:, None, :] if array.ndim == 2 else array
    if 0 in vectors.shape:
        raise STGTError(f"{uri}: the embeddings of the {what} are empty: {list(array.shape)}")
    return vectors.astype(np.float32)


def _check_values(uri: str, what: str, vectors: FloatArray, names: Sequence[str]) -> None:
    """Check that all vectors are finite and have a direction."""
    finite = np.isfinite(vectors).all(axis=(1, 2))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise STGTError(
            f"{uri}: {len(bad)} embeddings of the {what} contain NaN or infinity "
            f"({_some([names[int(row)] for row in bad])}); compute them again"
        )
    zero = (vectors == 0).all(axis=2).any(axis=1)
    if zero.any():
        bad = np.flatnonzero(zero)
        raise STGTError(
            f"{uri}: {len(bad)} embeddings of the {what} are all zeros "
            f"({_some([names[int(row)] for row in bad])}), which have no cosine; compute "
            "them again, and fill up missing vectors of an item with its first one"
        )


def _checked_scores(uri: str, found: _Contents) -> FloatArray | None:
    scores, shape = found.pair_scores, (len(found.caption_video_ids), len(found.video_ids))
    if scores is None:
        return None
    if scores.dtype.kind != "f" or scores.shape != shape:
        raise STGTError(
            f"{uri}: pair_scores has dtype {scores.dtype} and shape {list(scores.shape)}; it must "
            f"be floating-point numbers of shape [captions, videos], {list(shape)}"
        )
    bad = np.isnan(scores) | (scores == np.inf)
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise STGTError(
            f"{uri}: {int(bad.sum())} pair scores are NaN or infinite, such as that of caption "
            f"{row} and {found.video_ids[column]}; write -inf for pairs that were not scored"
        )
    return scores.astype(np.float32)


def aligned(
    file: EmbeddingFile,
    clip_ids: Sequence[str],
    captions: Sequence[str],
    owners: IntArray,
    may_have_more: bool = False,
) -> EmbeddingFile:
    """Return a file with its videos and captions in the order of a gallery.

    Videos are matched by id, or by their names without folders and endings if these are unique.
    Captions are matched by their text or, if the file contains none, by their order within a video.

    Args:
        file: The file.
        clip_ids: [V] ids of the gallery's videos.
        captions: [N] texts of its captions.
        owners: [N] int64, position of each caption's video.
        may_have_more: Whether the file may have more captions of a video than the gallery, because
            only the first of each video is scored.

    Raises:
        STGTError: The videos or the captions are not those of the gallery.
    """
    row_of = _rows_by_id(file, clip_ids)
    by_video: defaultdict[str, list[int]] = defaultdict(list)
    for row, video_id in enumerate(file.caption_video_ids):
        by_video[video_id].append(row)
    wanted: list[list[int]] = [[] for _ in clip_ids]
    for caption, video in enumerate(owners.tolist()):
        wanted[video].append(caption)
    order = np.empty(len(captions), dtype=np.int64)
    differing: list[str] = []
    for video, numbers in enumerate(wanted):
        rows = by_video[file.video_ids[row_of[video]]]
        found = _matched(file, rows, [captions[number] for number in numbers], may_have_more)
        if found is None:
            differing.append(clip_ids[video])
        else:
            order[numbers] = found
    if differing:
        what = "numbers of captions" if file.captions is None else "captions"
        raise STGTError(
            f"{file.uri} has other {what} than the gallery for {len(differing)} videos "
            f"({', '.join(differing[:NAMED])}); embed the captions of the gallery"
        )
    scores = file.pair_scores
    return EmbeddingFile(
        uri=file.uri,
        video_ids=list(clip_ids),
        videos=file.videos[row_of],
        caption_video_ids=[clip_ids[int(video)] for video in owners],
        texts=file.texts[order],
        captions=None if file.captions is None else [file.captions[int(row)] for row in order],
        pair_scores=None if scores is None else scores[np.ix_(order, row_of)],
        was_normalized=file.was_normalized,
    )


def _rows_by_id(file: EmbeddingFile, clip_ids: Sequence[str]) -> IntArray:
    """Return [V] int64, the row of the file for each video of a gallery."""
    rows = {video_id: row for row, video_id in enumerate(file.video_ids)}
    wanted = list(clip_ids)
    if rows.keys() != set(wanted):
        by_name = {base_name(video_id): row for video_id, row in rows.items()}
        names = [base_name(clip_id) for clip_id in clip_ids]
        if len(by_name) == len(rows) and by_name.keys() == set(names) and _are_unique(names):
            rows, wanted = by_name, names
    lacking = [clip_id for clip_id in wanted if clip_id not in rows]
    other = sorted(rows.keys() - set(wanted))
    if lacking or other:
        parts = []
        if lacking:
            parts.append(f"{len(lacking)} videos have no embedding ({_some(lacking)})")
        if other:
            parts.append(f"{len(other)} embeddings are of other videos ({_some(other)})")
        raise STGTError(
            f"the ids of {file.uri} do not match the gallery: {', and '.join(parts)}; embed the "
            "videos of the gallery, and name them by its ids"
        )
    return np.array([rows[clip_id] for clip_id in wanted], dtype=np.int64)


def _are_unique(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _matched(
    file: EmbeddingFile, rows: list[int], captions: Sequence[str], may_have_more: bool
) -> list[int] | None:
    """Return the row of each caption of a video; None if the captions are others."""
    if len(rows) < len(captions) or (len(rows) > len(captions) and not may_have_more):
        return None
    if file.captions is None:
        return rows[: len(captions)]
    available: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        available[comparable(file.captions[row])].append(row)
    found: list[int] = []
    for caption in captions:
        left = available[comparable(caption)]
        if not left:
            return None
        found.append(left.pop(0))
    return found


def comparable(caption: str) -> str:
    """Return a caption without what cleaning changes, but with all of its words."""
    return clean_caption(caption, max_words=len(caption) + 1)
