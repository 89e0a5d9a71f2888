"""What runs in a decoder's child in place of the usual, so that it fails as it rarely does."""

from __future__ import annotations

import time
from dataclasses import replace

from pipelines.video.child import Decoded, DecodeRequest, Failure, begin_child, decode_file
from pipelines.video.examine import Examined, ExamineRequest, examine_file

SLOW_START_S = 6.0


def decord_for_auto(request: DecodeRequest) -> Decoded | Failure:
    """Decode with decord where `auto` is asked for."""
    decoder = "decord" if request.decoder == "auto" else request.decoder
    return decode_file(replace(request, decoder=decoder))


def hang(request: DecodeRequest) -> Decoded | Failure:
    """Never return, as decord on some files."""
    time.sleep(10_000)
    return decode_file(request)


def begin_slowly(memory_limit_bytes: int) -> None:
    """Start the child as on a busy machine."""
    time.sleep(SLOW_START_S)
    begin_child(memory_limit_bytes)


def hang_on_examination(request: ExamineRequest) -> Examined | Failure:
    """Never return, as a decoder on some files."""
    time.sleep(10_000)
    return examine_file(request)
