"""Takes credentials out of a job's command line, which other users and Ray can read.

`ps` shows the command line of every process to everyone on the machine, and Ray records that of
each driver for its dashboard and logs. A job whose tracking URI contains credentials therefore
starts itself again with the URI without them, and hands the whole URI on in its environment, which
only the same user can read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from pipelines.common.config import keep_credentials, without_credentials

FLAGS = ("--tracking.uri", "--tracking.artifact-uri")
HANDED_ON = "STGT_URIS_WITH_CREDENTIALS"
"""Environment variable with the URIs as they were given, as a JSON list."""


def split_credentials(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line without credentials, and the URIs that contain some."""
    bare, full = [], []
    follows = False
    for word in words:
        flag, mark, value = word.partition("=")
        name = flag.replace("_", "-")
        if follows:
            prefix, uri = "", word
        elif name in FLAGS and mark:
            prefix, uri = f"{flag}=", value
        else:
            prefix, uri = word, ""
        follows = name in FLAGS and not mark
        without = without_credentials(uri) if uri else uri
        if without != uri:
            full.append(uri)
        bare.append(f"{prefix}{without}")
    return bare, full


def take_from_command_line() -> None:
    """Start this process again without credentials in its command line, if there are any."""
    handed_on = os.environ.pop(HANDED_ON, None)
    if handed_on is not None:
        for uri in json.loads(handed_on):
            keep_credentials(uri)
        return
    bare, full = split_credentials(sys.orig_argv)
    if full:
        os.environ[HANDED_ON] = json.dumps(full)
        os.execv(sys.executable, bare)
