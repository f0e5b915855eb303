"""What lies in a folder or a tar: the place of every file, without reading any of them.

A tar counts as a folder, also one inside a folder or, as in ImageNet's, inside a tar.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNREADABLE = -1  # in place of a size
_COMPRESSED = {
    b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd',
    b'PK\x03\x04': 'zip',
}


class File(NamedTuple):
    """Bytes [offset, offset + size) of the file at `path`; `size` may be UNREADABLE."""

    name: str  # relative to what was listed, with / between its parts
    path: str
    offset: int
    size: int


class Listing(NamedTuple):
    files: list[File]
    folders: set[str]  # all of them, so that empty ones are known


def list_source(source: Path) -> Listing:
    """All files of a folder or tar, in the order of their names; hidden ones (.NAME) are left out.

    Raises:
        ValueError: a tar is compressed, truncated or damaged, or links of folders go in circles.
        OSError: a folder or tar cannot be read.
    """
    listing = Listing([], set())
    if source.is_dir():
        _list_folder(source, '', listing, ())
    else:
        _list_tar(str(source), '', listing)
    listing.files.sort(key=lambda file: file.name.split('/'))
    return listing


def _list_folder(folder, prefix: str, listing: Listing, above: tuple) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            name = prefix + entry.name
            if entry.is_dir():
                key = (entry.stat().st_dev, entry.stat().st_ino)
                if key in above:
                    raise ValueError(f'{entry.path} links to a folder that holds it; remove it.')
                listing.folders.add(name)
                _list_folder(entry.path, f'{name}/', listing, (*above, key))
            elif not entry.is_file():  # a link to nothing, or a device
                listing.files.append(File(name, entry.path, 0, UNREADABLE))
            elif name.endswith('.tar'):
                _list_tar(entry.path, name.removesuffix('.tar') + '/', listing)
            else:
                listing.files.append(File(name, entry.path, 0, entry.stat().st_size))


def _list_tar(path: str, prefix: str, listing: Listing) -> None:
    with open(path, 'rb') as file:
        magic = file.read(6)
        for start, kind in _COMPRESSED.items():
            if magic.startswith(start):
                raise ValueError(
                    f'{path} is compressed ({kind}) and cannot be read at random; unpack it and '
                    'give the folder or the .tar inside.'
                )
        if prefix:
            listing.folders.add(prefix.removesuffix('/'))
        try:
            for member in _members(file, 0):
                _add_member(file, member, path, prefix, listing)
        except tarfile.TarError as error:
            raise ValueError(
                f'{path} is no tar, truncated or damaged ({error}); fetch it again.'
            ) from error


def _add_member(file, member: tarfile.TarInfo, path: str, prefix: str, listing: Listing) -> None:
    name = _clean(member.name)
    if name is None:
        return
    name = prefix + name
    if member.isdir():
        listing.folders.add(name)
    elif not member.isreg() or member.issparse():
        listing.files.append(File(name, path, 0, UNREADABLE))
    elif name.endswith('.tar'):
        inner = name.removesuffix('.tar')
        listing.folders.add(inner)
        for part in _members(file, member.offset_data):
            inside = _clean(part.name)
            if inside is not None and not part.isdir():
                size = part.size if part.isreg() and not part.issparse() else UNREADABLE
                listing.files.append(File(f'{inner}/{inside}', path, part.offset_data, size))
    else:
        listing.files.append(File(name, path, member.offset_data, member.size))


def _members(file, offset: int) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that starts at `offset` of a file; offsets are those of the file."""
    file.seek(offset)
    # tarfile takes where the file stands for the start; what it reports counts from the file's.
    with tarfile.TarFile(fileobj=file) as tar:
        while (member := tar.next()) is not None:
            yield member
            tar.members.clear()  # a million of them would need a gigabyte


def _clean(name: str) -> str | None:
    """The name without empty and . parts; None if a part of it is hidden."""
    parts = [part for part in name.split('/') if part not in ('', '.')]
    return None if not parts or any(part.startswith('.') for part in parts) else '/'.join(parts)
