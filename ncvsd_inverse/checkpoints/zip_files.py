"""The entries of a zip file that stores them as they are, bounded whatever the file says."""

import struct
from collections.abc import Iterator

from ncvsd_inverse.errors import CheckpointError

__all__ = ["ZIP_LOCAL", "zip_entries"]

MAX_ENTRIES = 100_000
ZIP_LOCAL = b"PK\x03\x04"
ZIP_CENTRAL = b"PK\x01\x02"
ZIP_END = b"PK\x05\x06"
ZIP64_END = b"PK\x06\x06"
ZIP64_LOCATOR = b"PK\x06\x07"
LOCAL_LAYOUT = "<4s5H3L2H"
CENTRAL_LAYOUT = "<4s6H3L5H2L"
END_LAYOUT = "<4s4H2LH"
END64_LAYOUT = "<4sQ2H2L4Q"
LOCATOR_LAYOUT = "<4sLQL"
UNKNOWN_32 = 0xFFFFFFFF


def zip_entries(data: memoryview) -> dict[str, memoryview]:
    """Return the entries of a zip by name; names are only compared, nothing is extracted.

    Python's `zipfile` would first make an object of each of as many entries as the file likes.
    """
    end = len(data) - struct.calcsize(END_LAYOUT)
    *_, count, size, start, comment = _record(data, end, END_LAYOUT, ZIP_END)
    locator = end - struct.calcsize(LOCATOR_LAYOUT)
    if locator >= 0 and bytes(data[locator : locator + 4]) == ZIP64_LOCATOR:
        _, _, end, _ = _record(data, locator, LOCATOR_LAYOUT, ZIP64_LOCATOR)
        *_, count, size, start = _record(data, end, END64_LAYOUT, ZIP64_END)
    if comment or start + size > end or count > MAX_ENTRIES:
        raise CheckpointError("its zip directory is damaged")
    entries: dict[str, memoryview] = {}
    position = start
    for _ in range(count):
        fields = _record(data, position, CENTRAL_LAYOUT, ZIP_CENTRAL)
        flags, method, packed, full = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, offset = *fields[10:13], fields[16]
        position += struct.calcsize(CENTRAL_LAYOUT)
        raw_name = bytes(data[position : position + name_length])
        extra = data[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        if position > start + size:
            raise CheckpointError("its zip directory is damaged")
        full, packed, offset = _wide(extra, [full, packed, offset])
        if flags & 1 or method or packed != full:
            raise CheckpointError("its zip entries must be stored, not compressed or encrypted")
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            raise CheckpointError("a name in its zip is not UTF-8") from None
        if name in entries:
            raise CheckpointError("two entries of its zip have the same name")
        local = _record(data, offset, LOCAL_LAYOUT, ZIP_LOCAL)
        offset += struct.calcsize(LOCAL_LAYOUT)
        if bytes(data[offset : offset + local[9]]) != raw_name:
            raise CheckpointError("its zip directory is damaged")
        offset += local[9] + local[10]
        if offset + full > start:
            raise CheckpointError("it ends too early: it is truncated")
        entries[name] = data[offset : offset + full]
    return entries


def _record(data: memoryview, position: int, layout: str, signature: bytes) -> tuple[int, ...]:
    if not 0 <= position <= len(data) - struct.calcsize(layout):
        raise CheckpointError("its zip directory is damaged")
    fields = struct.unpack_from(layout, data, position)
    if fields[0] != signature:
        raise CheckpointError("it must end with a zip directory: it is truncated or damaged")
    return fields


def _wide(extra: memoryview, values: list[int]) -> list[int]:
    """Return `values` with those that need more than 32 bits taken from the extra field."""
    wide: Iterator[int] = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            content = extra[4 : 4 + length]
            wide = iter(struct.unpack_from(f"<{len(content) // 8}Q", content))
        extra = extra[4 + length :]
    full = [next(wide, -1) if value == UNKNOWN_32 else value for value in values]
    if -1 in full:
        raise CheckpointError("its zip directory is damaged")
    return full
