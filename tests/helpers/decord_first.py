"""What a decoder's child is asked for, so that decord gets a file that `auto` would not give it."""

from __future__ import annotations

from dataclasses import replace

from pipelines.video.child import Decoded, DecodeRequest, Failure, decode_file


def decord_for_auto(request: DecodeRequest) -> Decoded | Failure:
    """Decode with decord where `auto` is asked for."""
    decoder = "decord" if request.decoder == "auto" else request.decoder
    return decode_file(replace(request, decoder=decoder))
