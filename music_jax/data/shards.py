"""How much memory the records of an array_record file take, before they are decompressed.

Such a file is one of Riegeli's: chunks of records, each behind a header of 40 bytes that says how
large the chunk is, compressed and not. A header of 24 bytes more comes at every 64 KiB, wherever
in a chunk that is.
"""

import os
import struct

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK_HEADER = struct.Struct("<5Q")  # hash, size, hash, type and number of records, decoded size


def largest_chunk(path: str) -> int:
    """Returns the decoded size in bytes of the largest chunk of a file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no array_record file.
    """
    largest = place = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        while place < size:
            header = os.pread(descriptor, _CHUNK_HEADER.size + _BLOCK_HEADER, place)
            before = min(-place % _BLOCK, _CHUNK_HEADER.size)  # bytes up to the next block
            header = header[:before] + header[before + _BLOCK_HEADER :] if before < 40 else header
            if len(header) < _CHUNK_HEADER.size:
                raise ValueError("it ends early")
            _, encoded, _, records, decoded = _CHUNK_HEADER.unpack(header[: _CHUNK_HEADER.size])
            largest = max(largest, decoded)
            end = _after(place, _CHUNK_HEADER.size + encoded)
            place = max(end, place + (records >> 8))
            if 0 < place % _BLOCK <= _BLOCK_HEADER:  # where no chunk can begin
                place += _BLOCK_HEADER + 1 - place % _BLOCK
    finally:
        os.close(descriptor)
    return largest


def _after(place: int, count: int) -> int:
    """The place so many bytes behind another, without the blocks' headers in between."""
    usable = _BLOCK - _BLOCK_HEADER
    # Bytes of this kind before `place` in its block.
    used = max(place % _BLOCK - _BLOCK_HEADER, 0)
    blocks, rest = divmod(used + count, usable)
    start = place - place % _BLOCK
    # A chunk that ends with a block ends before the next one's header.
    return start + blocks * _BLOCK + (_BLOCK_HEADER + rest if rest else 0)
