"""What lies in a zip, and what its members hold: stored or deflated, checked before believed.

The directory at the end of the file is read entry by entry, because `zipfile` would keep a gigabyte
for a million of them. Source: PKWARE's APPNOTE, 4.3 to 4.5.
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
# Photographs do not deflate, drawings do by far less.
BOMB_BYTES, BOMB_RATIO = 2**26, 100


class Packed(NamedTuple):
    """How a member is kept."""

    method: int
    size: int  # in bytes, as it is in the zip
    crc: int


class Member(NamedTuple):
    """A file in a zip."""

    name: str  # what is not UTF-8 as surrogates
    offset: int  # of its local header
    size: int
    packed: Packed
    why_not: str = ''  # why it cannot be read


def members(file: BinaryIO) -> Iterator[Member]:
    """The files and folders (NAME/) of a zip, in the order of its directory.

    Raises:
        ValueError: the directory is damaged, truncated, or promises more than the zip holds.
    """
    whole = file.seek(0, 2)
    entries, size, offset, end = _directory(file, whole)
    if offset + size > end:
        raise ValueError('its directory lies beyond its end')
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
            raise ValueError(f'its member {_text(name, flags)!r} lies beyond its end')
        held += _LOCAL.size + packed
        if held > whole:
            raise ValueError('its members overlap, as those of a decompression bomb do')
        why_not = (
            'is encrypted' if flags & _ENCRYPTED else
            '' if method in (STORED, DEFLATED) else
            f'is compressed by the method {method}, and only stored and deflated files are read'
        )
        yield Member(_text(name, flags), at, unpacked, Packed(method, packed, crc), why_not)
        size -= len(head) + len(rest)
        entries -= 1
    if size or entries % 2**16:
        raise ValueError('its directory does not hold as many files as it says')


def read(file: BinaryIO, member_offset: int, size: int, packed: Packed) -> bytes:
    """All bytes of a member.

    Raises:
        ValueError: the member is damaged, or a bomb.
        EOFError: the zip ends within it.
    """
    if size > max(BOMB_BYTES, BOMB_RATIO * packed.size):
        raise ValueError(f'is a decompression bomb: {packed.size} bytes that make {size}')
    stream = open_member(file, member_offset, packed)
    data = stream.read(size)
    if len(data) != size or stream.read(1) or zlib.crc32(data) != packed.crc:
        raise ValueError('is damaged: it has another checksum than the zip says')
    return data


def name_at(file: BinaryIO, offset: int) -> str:
    """The name before a member, which no checksum covers, nor that in the directory.

    Raises:
        ValueError: there is no member at that place.
    """
    file.seek(offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b'PK\x03\x04':
        raise ValueError('is damaged: the zip holds no file where its directory says')
    flags, name_length = head[6] | head[7] << 8, _LOCAL.unpack(head)[-2]
    return _text(file.read(name_length), flags)


def open_member(file: BinaryIO, offset: int, packed: Packed) -> 'Stream':
    """A member to read from its start on; the file must not be moved meanwhile.

    Raises:
        ValueError: there is no member at that place.
        EOFError: the zip ends before it.
    """
    file.seek(offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size:
        raise EOFError
    sign, *_, name_length, extra_length = _LOCAL.unpack(head)
    if sign != b'PK\x03\x04':
        raise ValueError('is damaged: the zip holds no file where its directory says')
    file.seek(name_length + extra_length, 1)
    return Stream(file, packed.method, packed.size)


def stream_members(file) -> Iterator[tuple[str, 'Stream']]:
    """The members of a zip that can only be read from its start on, as it lies in another zip.

    Args:
        file: a file, or a Stream; what is left of a member is skipped.

    Raises:
        ValueError: the zip is damaged, or was written in a way that hides where its members end.
    """
    while (head := file.read(_LOCAL.size))[:4] == b'PK\x03\x04' and len(head) == _LOCAL.size:
        _, flags, method, _, packed, unpacked, name_length, extra_length = _LOCAL.unpack(head)
        name, extra = file.read(name_length), file.read(extra_length)
        unpacked, packed, _ = _wide(extra, (unpacked, packed, 0))
        if flags & 8 and not packed or method not in (STORED, DEFLATED) or flags & _ENCRYPTED:
            raise ValueError('is encrypted, or a zip that says sizes behind its members; unpack it')
        stream = Stream(file, method, packed)
        yield _text(name, flags), stream
        _skip(file, stream.left)
    if head[:4] not in (b'PK\x01\x02', _END, _END64):
        raise ValueError('is truncated or damaged')


class Stream:
    """The bytes of a member, unpacked as they are read."""

    def __init__(self, file, method: int, packed_size: int):
        self._file = file
        self._inflate = zlib.decompressobj(-15) if method == DEFLATED else None
        self.left = packed_size  # bytes of the member that were not taken from the file

    def read(self, count: int) -> bytes:
        """The next bytes, fewer only at the end of the member.

        Raises:
            ValueError: what was deflated is damaged.
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
        """Goes on without the next bytes; it is no error if there are fewer."""
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
    """Entries, size and offset of the directory, and where it must have ended."""
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
    """Sizes and offset, each from the extra field of zip64 where it is too large for 32 bits."""
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
