"""Compressed request bodies (``Content-Encoding``): gzip and deflate, within the body's limit."""

from __future__ import annotations

import zlib

from mullama.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

TAKEN = ("gzip", "deflate")
_MAX_LAYERS = 3  # a body may be encoded several times, but nobody does it
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def encodings_of(header: str | None) -> list[str]:
    """The encodings of a body in the order in which they are undone. Raises UnsupportedMediaType."""
    if not header:
        return []
    names = [name.strip().lower().removeprefix("x-") for name in header.split(",")]
    names = [name for name in names if name and name != "identity"]
    for name in names:
        if name not in TAKEN:
            raise UnsupportedMediaType(
                f"Content-Encoding: '{name[:40]}' is not taken; it must be {' or '.join(TAKEN)}, or left out"
            )
    if len(names) > _MAX_LAYERS:
        raise UnsupportedMediaType(f"Content-Encoding: {len(names)} encodings are too many")
    return names[::-1]


def decode(data: bytes, encodings: list[str], limit: int) -> bytes:
    """The body itself. Raises PayloadTooLarge as soon as it has more than ``limit`` bytes, InvalidRequest."""
    for name in encodings:
        data = _decode(data, name, limit)
    return data


def _decode(data: bytes, name: str, limit: int) -> bytes:
    out = bytearray()
    while True:
        # Of deflate there are two forms: HTTP means zlib's, and some clients send the bare one.
        bare = name == "deflate" and (len(data) < 2 or data[0] & 15 != 8 or (data[0] << 8 | data[1]) % 31 != 0)
        stream = zlib.decompressobj(_GZIP if name == "gzip" else _RAW if bare else _ZLIB)
        try:
            out += stream.decompress(data, limit + 1 - len(out))
        except zlib.error:
            raise InvalidRequest(f"the body is not valid {name}, which its Content-Encoding says it is") from None
        if len(out) > limit:
            raise PayloadTooLarge(
                f"the request body is larger than {limit} bytes when it is unpacked, the limit set by --max-body-bytes"
            )
        if not stream.eof:
            raise InvalidRequest(f"the body ends in the middle of its {name} data")
        data = stream.unused_data
        if name != "gzip" or not data:  # gzip data may have several members
            return bytes(out)
