"""Checks rows and captions of annotations, and reads pickles of plain values."""

from __future__ import annotations

import html
import pickle
import re
import stat
from pathlib import Path
from typing import Any

from pipelines.manifest.formats import opening
from pipelines.manifest.formats.opening import Unreadable
from pipelines.manifest.formats.values import is_null, required_id
from stgt.errors import ManifestError
from stgt.inputs.caption_text import clean_caption

EMPTY = "caption is empty after cleaning"
MAX_DECODINGS = 3
"""Times that HTML entities are decoded, for captions that were encoded several times."""

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def decode_entities(text: str) -> str:
    """Decode the HTML entities of a caption, such as `&amp;` and `&#39;`, also if encoded twice.

    Only entities that end with a semicolon are decoded, so `R&D` and `a&b` stay as they are.
    """
    if "&" not in text:
        return text
    for _ in range(MAX_DECODINGS):
        decoded = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
        decoded = decoded.replace("\xa0", " ")
        if decoded == text:
            break
        text = decoded
    return text


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it would import {module_name}.{global_name}")


def plain_pickle(uri: str) -> Any:
    """Read a pickle that contains only lists, dicts and strings.

    Raises:
        ManifestError: The pickle would import code, or it is damaged.
    """
    with opening.open_binary(uri) as binary:
        try:
            return _PlainUnpickler(binary, encoding="utf-8").load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
            raise ManifestError(
                f"{uri} was not read: {error}; a pickle may only contain lists, dicts and strings"
            ) from error


def caption_list(value: Any) -> list[str]:
    """Return the usable captions of a field with one caption or a list of captions.

    Captions are stripped, and their HTML entities are decoded.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return []
    stripped = [decode_entities(text).strip() for text in texts if isinstance(text, str)]
    return [text for text in stripped if text.lower() != "nan" and clean_caption(text)]


def require(row: Any, fields: tuple[str, ...], ids: tuple[str, ...] = ()) -> str | None:
    """Return why a row is unusable because of its fields, or None if it has all of them.

    Args:
        row: The row.
        fields: Names of fields that must not be missing or empty.
        ids: Names of those fields that must be ids: texts or numbers.
    """
    if isinstance(row, Unreadable):
        return row.reason
    if not isinstance(row, dict):
        return f"expected an object with {', '.join(fields)}, got {type(row).__name__}"
    empty = [name for name in fields if is_null(row.get(name))]
    if empty:
        return f"{', '.join(empty)} is missing or empty"
    try:
        for name in ids:
            required_id(row[name], name)
    except ValueError as error:
        return str(error)
    return None


def fault_of_local(path: Path) -> str | None:
    """Return why a local file that was listed cannot be opened as a file, or None if it can."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return "it is a link to a file that does not exist"
    except OSError as error:
        return cannot_be_read(error)
    if not stat.S_ISREG(status.st_mode):
        return "it is a device or a pipe, not a file"
    return None


def cannot_be_read(error: OSError) -> str:
    """Return why a file is not used of which the first bytes cannot be read."""
    return f"it cannot be read ({error.strerror or error})"
