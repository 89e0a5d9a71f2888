"""Somebody else's embeddings of videos and captions: checked, and brought in a gallery's order.

`embedding_forms.py` reads the two forms, .npz and .parquet, which the README of this package
describes.

Legend: V videos, N captions, M further texts, Q vectors per video, C vectors per caption, E width.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.common import storage
from pipelines.evaluate.embedding_forms import NAMED, Contents, read_npz, read_parquet
from pipelines.evaluate.known_galleries import base_name
from stgt.errors import STGTError
from stgt.inputs.caption_text import clean_caption

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
ScoreArray = npt.NDArray[np.floating]

UNIT_TOLERANCE = 1e-3
"""Largest difference from 1 of the length of a vector that counts as normalized. Vectors that were
normalized in half precision are within it."""
ROWS_AT_A_TIME = 4096
"""Number of items whose vectors are normalized at a time, in float64."""
MOST_SCORE_BYTES = 8
"""Size of the widest number that a pair score may be, which is float64."""


@dataclass(frozen=True)
class FurtherTexts:
    """M texts that belong to no video, such as the counterparts of captions."""

    captions: list[str]
    texts: FloatArray
    """[M, C, E] of unit length, padded like those of captions."""
    pair_scores: ScoreArray | None
    """[M, V] score of each text and video; None if the file contains none of them."""


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
    pair_scores: ScoreArray | None
    """[N, V] score of each caption and video, higher is better; -inf for pairs without one. They
    have the precision of the file, up to float64. None if the file contains no scores."""
    was_normalized: bool
    """Whether all vectors of the file had unit length already."""
    further: FurtherTexts | None = None
    """Texts that are not part of any gallery; None if the file contains none."""

    @property
    def vectors(self) -> tuple[int, int]:
        """Largest numbers of vectors of a video and of a caption."""
        return self.videos.shape[1], self.texts.shape[1]


def read_embedding_file(uri: str) -> EmbeddingFile:
    """Read and check a file of embeddings.

    Raises:
        STGTError: The file is missing, is of another kind, is damaged, lacks arrays or columns, or
            contains NaN, vectors of length zero, different widths, or ids that do not belong
            together.
    """
    if not storage.exists(uri):
        raise STGTError(f"embedding_file: {uri} does not exist; give a .npz or .parquet file")
    if not storage.is_file(uri):
        raise STGTError(f"embedding_file: {uri} is a folder; give a .npz or .parquet file")
    if uri.endswith(".npz"):
        return _checked(uri, read_npz(uri))
    if uri.endswith(".parquet"):
        return _checked(uri, read_parquet(uri))
    raise STGTError(
        f"embedding_file: {uri} is neither .npz nor .parquet; save the embeddings in one of these "
        "forms, which pipelines/evaluate/README.md describes"
    )


def _checked(uri: str, found: Contents) -> EmbeddingFile:
    _check_ids(uri, found)
    owners = [f"caption {row} of {one}" for row, one in enumerate(found.caption_video_ids)]
    parts = [("videos", found.videos, found.video_ids), ("captions", found.texts, owners)]
    if found.further_texts is not None:
        names = [repr(text) for text in found.further_captions]
        parts.append(("further texts", found.further_texts, names))
    arrays = [_as_vectors(uri, what, array, len(names)) for what, array, names in parts]
    for (what, _, _), array in zip(parts[1:], arrays[1:], strict=True):
        if array.shape[2] != arrays[0].shape[2]:
            raise STGTError(
                f"{uri}: the embeddings of the videos have width {arrays[0].shape[2]}, but those "
                f"of the {what} have width {array.shape[2]}; all must be in one space"
            )
    units: list[FloatArray] = []
    lengths: list[npt.NDArray[np.float64]] = []
    for (what, _, names), array in zip(parts, arrays, strict=True):
        of_part, length = _normalized(uri, what, array, names)
        units.append(of_part)
        lengths.append(length)
    normalized = all(bool((np.abs(one - 1) <= UNIT_TOLERANCE).all()) for one in lengths)
    if not normalized:
        logger.warning(
            "%s contains vectors that are not of unit length (%.3g to %.3g); they are normalized, "
            "because pairs are compared by cosine",
            uri,
            min(float(one.min()) for one in lengths),
            max(float(one.max()) for one in lengths),
        )
    scores = _checked_scores(uri, "pair_scores", found.pair_scores, owners, found.video_ids)
    further = None
    if found.further_texts is not None:
        further = FurtherTexts(
            found.further_captions,
            units[2],
            _checked_scores(
                uri, "further_pair_scores", found.further_scores, parts[2][2], found.video_ids
            ),
        )
    return EmbeddingFile(
        uri=uri,
        video_ids=found.video_ids,
        videos=units[0],
        caption_video_ids=found.caption_video_ids,
        texts=units[1],
        captions=found.captions,
        pair_scores=scores,
        was_normalized=normalized,
        further=further,
    )


def _check_ids(uri: str, found: Contents) -> None:
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
    if found.further_texts is not None and not found.further_captions:
        raise STGTError(f"{uri}: further_captions is empty; leave out the further texts instead")


def _as_vectors(
    uri: str, what: str, array: npt.NDArray[Any], count: int
) -> npt.NDArray[np.floating]:
    """Return embeddings as [rows, vectors, E], in the precision of the file."""
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
    return vectors


def _normalized(
    uri: str, what: str, vectors: npt.NDArray[np.floating], names: Sequence[str]
) -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """Return [rows, vectors, E] float32 of unit length, and the lengths [rows, vectors] float64.

    Lengths are computed in float64, of vectors that are divided by their largest element first, so
    that neither tiny nor huge elements are lost.

    Raises:
        STGTError: A vector is not finite or has no direction.
    """
    units = np.empty(vectors.shape, dtype=np.float32)
    lengths = np.empty(vectors.shape[:2])
    zero = np.zeros(len(vectors), dtype=bool)
    # Bad values give NaN, which is looked for below.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for start in range(0, len(vectors), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            exact = vectors[rows].astype(np.float64)
            largest = np.abs(exact).max(axis=2)
            scaled = exact / largest[:, :, None]
            length = np.linalg.norm(scaled, axis=2)
            units[rows] = scaled / length[:, :, None]
            lengths[rows] = largest * length
            zero[rows] = (largest == 0).any(axis=1)
    finite = np.isfinite(units).all(axis=(1, 2))
    if (bad := np.flatnonzero(~finite & ~zero)).size:
        raise STGTError(
            f"{uri}: {len(bad)} embeddings of the {what} contain NaN or infinity "
            f"({_some([names[int(row)] for row in bad])}); compute them again"
        )
    if (bad := np.flatnonzero(zero)).size:
        raise STGTError(
            f"{uri}: {len(bad)} embeddings of the {what} are all zeros "
            f"({_some([names[int(row)] for row in bad])}), which have no cosine; compute "
            "them again, and fill up missing vectors of an item with its first one"
        )
    return units, lengths


def _checked_scores(
    uri: str,
    name: str,
    scores: npt.NDArray[Any] | None,
    texts: Sequence[str],
    video_ids: Sequence[str],
) -> ScoreArray | None:
    """Return scores in the precision of the file, because rounding would make different ones tie.

    Args:
        uri: The file.
        name: Name of the scores.
        scores: Scores of texts and videos.
        texts: Descriptions of the texts, one for each row.
        video_ids: Ids of the videos, one for each column.
    """
    shape = (len(texts), len(video_ids))
    if scores is None:
        return None
    if scores.dtype.kind != "f" or scores.itemsize > MOST_SCORE_BYTES or scores.shape != shape:
        raise STGTError(
            f"{uri}: {name} has dtype {scores.dtype} and shape {list(scores.shape)}; it must be "
            "floating-point numbers of at most 64 bits, of shape "
            f"{'[captions, videos]' if name == 'pair_scores' else '[further texts, videos]'}, "
            f"{list(shape)}"
        )
    bad = np.isnan(scores) | (scores == np.inf)
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise STGTError(
            f"{uri}: {int(bad.sum())} values of {name} are NaN or infinite, such as that of "
            f"{texts[row]} and video {video_ids[column]}; write -inf for pairs that were not scored"
        )
    return scores


def with_texts(file: EmbeddingFile, texts: Sequence[str]) -> EmbeddingFile:
    """Return a file whose further texts are the given ones, in their order.

    They are looked up among the captions and the further texts of the file, without differences
    that cleaning removes. Of a text that is in the file several times, the first counts.

    Args:
        file: The file as it was read, before `aligned` drops captions.
        texts: [M] texts, at least one.

    Raises:
        STGTError: The file lacks a text, or the pair scores of one.
    """
    blocks = [(file.captions, file.texts, file.pair_scores)]
    if file.further is not None:
        blocks.append((file.further.captions, file.further.texts, file.further.pair_scores))
    place_of: dict[str, tuple[int, int]] = {}
    for block, (known, _, _) in enumerate(blocks):
        for row, text in enumerate(known or ()):
            place_of.setdefault(comparable(text), (block, row))
    places = [place_of.get(comparable(text)) for text in texts]
    lacking = [text for text, place in zip(texts, places, strict=True) if place is None]
    if lacking:
        raise STGTError(
            f"order_pairs: {file.uri} has no embedding of {len(lacking)} of {len(texts)} texts, "
            f"such as {lacking[0]!r}; add them as further texts, which do not enter the gallery: "
            "as the arrays further_captions and further_embeds, or as rows of kind further"
        )
    found = [place for place in places if place is not None]
    width = max(array.shape[1] for _, array, _ in blocks)
    embeds = np.stack([_filled_up(blocks[block][1][row], width) for block, row in found])
    if all(scores is None for _, _, scores in blocks):
        return replace(file, further=FurtherTexts(list(texts), embeds, None))
    rows_of_scores: list[ScoreArray] = []
    for text, (block, row) in zip(texts, found, strict=True):
        scores = blocks[block][2]
        if scores is None:
            raise STGTError(
                f"order_pairs: {file.uri} has pair scores, but none of the text {text!r}; add them "
                "as the array further_pair_scores, or as rows of kind pair with a further_row"
            )
        rows_of_scores.append(scores[row])
    return replace(file, further=FurtherTexts(list(texts), embeds, np.stack(rows_of_scores)))


def _filled_up(vectors: FloatArray, count: int) -> FloatArray:
    """Return `count` vectors [count, E], the first of which stands for missing ones."""
    return np.concatenate([vectors, np.repeat(vectors[:1], count - len(vectors), axis=0)])


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
    scores, further = file.pair_scores, file.further
    if further is not None and further.pair_scores is not None:
        further = replace(further, pair_scores=further.pair_scores[:, row_of])
    return replace(
        file,
        video_ids=list(clip_ids),
        videos=file.videos[row_of],
        caption_video_ids=[clip_ids[int(video)] for video in owners],
        texts=file.texts[order],
        captions=None if file.captions is None else [file.captions[int(row)] for row in order],
        pair_scores=None if scores is None else scores[np.ix_(order, row_of)],
        further=further,
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
