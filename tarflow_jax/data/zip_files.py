"""Lists and reads the stored or deflated members of a zip, with checks of sizes and checksums.

Reads the directory at the end of the file entry by entry; `zipfile` would need a gigabyte of memory
for a million entries. Source: PKWARE's APPNOTE, 4.3 to 4.5.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

STORED, DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 1, 2**11  # flags
_END, _END64, _LOCATOR64 = b'PK\x05\x06', b'PK\x06\x06', b'PK\x06\x07'
_ENTRY = struct.Struct('<4s4xHHxxxxIIIHHH8xI')
_LOCAL = struct.Struct('<4s2xHH4xIIIHH')
_CHUNK_BYTES = 2**20
# Photographs do not compress, and drawings compress by much less.
BOMB_BYTES, BOMB_RATIO = 2**26, 100


class Packed(NamedTuple):
    """How a member is stored."""

    method: int
    size: int  # compressed size in bytes
    crc: int


class Member(NamedTuple):
    """A file in a zip."""

    name: str  # bytes that are not UTF-8 are surrogates
    offset: int  # offset of its local header
    size: int
    packed: Packed
    why_not: str = ''  # why it cannot be read


def members(file: BinaryIO) -> Iterator[Member]:
    """Yields the files and folders (NAME/) of a zip, in the order of its directory.

    Raises:
        ValueError: the directory is damaged or truncated, or claims more than the zip has.
    """
    whole = file.seek(0, 2)
    entries, size, offset, end = _directory(file, whole)
    if offset + size > end:
        raise ValueError('its directory is beyond its end')
    file.seek(offset)
    held = 0
    while size > 0:
        head = file.read(_ENTRY.size)
        if len(head) < _ENTRY.size or head[:4] != b'PK\x01\x02':
            raise ValueError('its directory is damaged')
        (_, flags, method, crc, packed, unpacked, *lengths, at) = _ENTRY.unpack(head)
        rest = file.read(sum(lengths))
        if len(rest) < sum(lengths):
            raise ValueError('its directory is truncated')
        name, extra = rest[:lengths[0]], rest[lengths[0]:lengths[0] + lengths[1]]
        unpacked, packed, at = _wide(extra, (unpacked, packed, at))
        if at + _LOCAL.size + packed > whole:
            raise ValueError(f'its member {_text(name, flags)!r} is beyond its end')
        held += _LOCAL.size + packed
        if held > whole:
            raise ValueError('its members overlap, as in a decompression bomb')
        why_not = (
            'is encrypted' if flags & _ENCRYPTED else
            '' if method in (STORED, DEFLATED) else
            f'is compressed by method {method}, but only stored and deflated files are supported'
        )
        yield Member(_text(name, flags), at, unpacked, Packed(method, packed, crc), why_not)
        size -= len(head) + len(rest)
        entries -= 1
    if size or entries % 2**16:
        raise ValueError('its directory claims another number of files than it has')


def read(file: BinaryIO, member_offset: int, size: int, packed: Packed) -> bytes:
    """Reads all bytes of a member.

    Raises:
        ValueError: the member is damaged, or a bomb.
        EOFError: the zip ends within it.
    """
    if size > max(BOMB_BYTES, BOMB_RATIO * packed.size):
        raise ValueError(f'is a decompression bomb: {packed.size} bytes unpack to {size}')
    stream = open_member(file, member_offset, packed)
    data = stream.read(size)
    if len(data) != size or stream.read(1) or zlib.crc32(data) != packed.crc:
        raise ValueError('is damaged: its checksum differs from that in the zip')
    return data


def name_at(file: BinaryIO, offset: int) -> str:
    """Reads the name in the local header of a member, to compare it with that in the directory.

    No checksum covers either name.

    Raises:
        ValueError: there is no member at this offset.
    """
    file.seek(offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b'PK\x03\x04':
        raise ValueError('is damaged: its directory points to a place without a file')
    flags, name_length = head[6] | head[7] << 8, _LOCAL.unpack(head)[-2]
    return _text(file.read(name_length), flags)


def open_member(file: BinaryIO, offset: int, packed: Packed) -> 'Stream':
    """Opens a member for sequential reading; do not seek in the file in the meantime.

    Raises:
        ValueError: there is no member at this offset.
        EOFError: the zip ends before it.
    """
    file.seek(offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size:
        raise EOFError
    sign, *_, name_length, extra_length = _LOCAL.unpack(head)
    if sign != b'PK\x03\x04':
        raise ValueError('is damaged: its directory points to a place without a file')
    file.seek(name_length + extra_length, 1)
    return Stream(file, packed.method, packed.size)


def stream_members(file) -> Iterator[tuple[str, 'Stream']]:
    """Yields the members of a zip that allows sequential reading only, such as one in another zip.

    Args:
        file: a file, or a Stream. The unread rest of a member is skipped.

    Raises:
        ValueError: the zip is damaged, or does not tell where its members end.
    """
    while (head := file.read(_LOCAL.size))[:4] == b'PK\x03\x04' and len(head) == _LOCAL.size:
        _, flags, method, _, packed, unpacked, name_length, extra_length = _LOCAL.unpack(head)
        name, extra = file.read(name_length), file.read(extra_length)
        unpacked, packed, _ = _wide(extra, (unpacked, packed, 0))
        if flags & 8 and not packed or method not in (STORED, DEFLATED) or flags & _ENCRYPTED:
            raise ValueError('is encrypted, or has sizes after its members; unpack it')
        stream = Stream(file, method, packed)
        yield _text(name, flags), stream
        _skip(file, stream.left)
    if head[:4] not in (b'PK\x01\x02', _END, _END64):
        raise ValueError('is truncated or damaged')


class Stream:
    """The bytes of a member, unpacked on demand."""

    def __init__(self, file, method: int, packed_size: int):
        self._file = file
        self._inflate = zlib.decompressobj(-15) if method == DEFLATED else None
        self.left = packed_size  # compressed bytes not yet read from the file

    def read(self, count: int) -> bytes:
        """Reads the next bytes; returns fewer only at the end of the member.

        Raises:
            ValueError: the compressed data is damaged.
        """
        if self._inflate is None:
            data = self._file.read(min(count, self.left))
            self.left -= len(data)
            return data
        made = bytearray()
        try:
            while len(made) < count and not self._inflate.eof:
                packed = self._inflate.unconsumed_tail
                if not packed:
                    packed = self._file.read(min(_CHUNK_BYTES, self.left))
                    self.left -= len(packed)
                data = self._inflate.decompress(packed, count - len(made))
                if not packed and not data:
                    break
                made += data
        except zlib.error as error:
            raise ValueError(f'is damaged: {error}') from error
        return bytes(made)

    def skip(self, count: int) -> None:
        """Skips the next bytes, or all bytes that are left if there are fewer."""
        if self._inflate is None:
            count = min(count, self.left)
            self.left -= count
            _skip(self._file, count)
            return
        while count > 0 and (data := self.read(min(count, _CHUNK_BYTES))):
            count -= len(data)


def _skip(file: 'BinaryIO | Stream', count: int) -> None:
    if isinstance(file, Stream):
        file.skip(count)
    else:
        file.seek(count, 1)


def _directory(file: BinaryIO, whole: int) -> tuple[int, int, int, int]:
    """Returns the number of entries, size, offset and latest possible end of the directory."""
    tail_at = max(0, whole - 22 - 2**16)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise ValueError('it has no directory at its end')
    entries, size, offset = struct.unpack_from('<10xHII', tail, at)
    end = tail_at + at
    if at >= 20 and tail[at - 20:at - 16] == _LOCATOR64:
        end, = struct.unpack_from('<8xQ', tail, at - 20)
        file.seek(min(end, whole))
        record = file.read(56)
        if len(record) < 56 or record[:4] != _END64:
            raise ValueError('its directory is damaged')
        entries, size, offset = struct.unpack_from('<32xQQQ', record)
    return entries, size, offset, end


def _wide(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns sizes and offset, with those too large for 32 bits from the zip64 extra field."""
    at, wide = 0, b''
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from('<HH', extra, at)
        if kind == 1:
            wide = extra[at + 4:at + 4 + length]
        at += 4 + length
    found = []
    for number in numbers:
        if number == 0xFFFFFFFF and len(wide) >= 8:
            number, = struct.unpack_from('<Q', wide)
            wide = wide[8:]
        found.append(number)
    return found[0], found[1], found[2]


def _text(name: bytes, flags: int) -> str:
    text = name.decode('utf-8', 'surrogateescape') if flags & _UTF8 else name.decode('cp437')
    return text if '/' in text else text.replace('\\', '/')
