"""PNG files without their texts, which the decoder would decompress: megabytes from a kilobyte."""

import struct

from music_jax.errors import UndecodableError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COMPRESSED_TEXTS = (b"zTXt", b"iTXt")
_MAX_CHUNKS = 2**16


def without_texts(encoded: bytes) -> bytes:
    """The file without compressed texts; what is no PNG, or has none, as it is.

    libpng decompresses each of a thousand such chunks to up to eight megabytes.

    Raises:
      UndecodableError: it has more chunks than are read.
    """
    if not encoded.startswith(_SIGNATURE) or not any(t in encoded for t in _COMPRESSED_TEXTS):
        return encoded
    kept, at = [_SIGNATURE], len(_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(encoded):
            return b"".join(kept)
        length, kind = struct.unpack_from(">I4s", encoded, at)
        if kind not in _COMPRESSED_TEXTS:
            kept.append(encoded[at : at + 12 + length])
        at += 12 + length
    raise UndecodableError(f"it has more than {_MAX_CHUNKS:,} chunks, more than are read")
