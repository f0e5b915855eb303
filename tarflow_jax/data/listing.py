"""Lists the files of a folder, tar or zip with their locations, without reading them.

A tar counts as a folder, even inside a folder or (as in ImageNet's) inside another tar. A zip
counts as a folder too, alone or in a folder of zips.
"""

import errno
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from tarflow_jax.data import tar_files, zip_files

UNREADABLE = -1  # a value of File.size
_COMPRESSED = {
    b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd',
}
_BESIDE_ZIPS = ('.zip', '.txt', '.csv', '.json', '.md')
_ZIP = (b'PK\x03\x04', b'PK\x05\x06')
# Files that systems and programs leave behind.
_IGNORED = {
    '__macosx', '.ipynb_checkpoints', '@eadir', '#recycle', 'lost+found', '$recycle.bin',
    'system volume information', 'thumbs.db', 'desktop.ini',
}


class File(NamedTuple):
    """The bytes [offset, offset + size) of the file at `path`; `size` may be UNREADABLE.

    In a zip, `offset` is that of the member's header, and `packed` tells how to unpack it.
    """

    name: str  # relative to the listed source, with / as the separator
    path: str
    offset: int
    size: int
    packed: zip_files.Packed | None = None


class Listing(NamedTuple):
    files: list[File]
    folders: set[str]  # all folders, including empty ones
    notes: dict[str, str]  # files ignored because of their names, with the reason
    problems: dict[str, str]  # files that could not be listed, with the reason


def printable(name: str) -> str:
    """Returns the name with bytes that are not UTF-8 as \\xNN."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def list_source(source: Path) -> Listing:
    """Lists all files of a folder, tar or zip in the order of their names, except hidden ones.

    Raises:
        ValueError: a tar or zip is compressed, truncated or damaged.
        OSError: a folder, tar or zip cannot be read.
    """
    listing = Listing([], set(), {}, {})
    if source.is_dir():
        _list_folder(source, '', listing, ())
    else:
        _list_archive(str(source), '', listing)
    listing.files.sort(key=lambda file: file.name.split('/'))
    return listing


def read(file: File) -> bytes:
    """Reads all bytes of a file.

    Raises:
        ValueError: it is a damaged member of a zip; the message has the reason without the path.
        OSError: it cannot be read, or has changed since it was listed.
    """
    try:
        with open(file.path, 'rb') as opened:
            if file.packed is not None:
                name = '/'.join(_parts(zip_files.name_at(opened, file.offset)))
                if not f'/{file.name}'.endswith(f'/{name}'):
                    raise ValueError(f'is damaged: its name is {printable(name)} in the zip')
                return zip_files.read(opened, file.offset, file.size, file.packed)
            opened.seek(file.offset)
            data = opened.read(file.size)
    except FileNotFoundError as error:
        raise OSError(f'{file.path} no longer exists') from error
    except EOFError:
        data = b''
    if len(data) != file.size:  # it changed, or its drive was removed
        raise OSError(f'{file.path} became shorter since it was listed')
    return data


def _list_folder(folder, prefix: str, listing: Listing, above: tuple) -> None:
    try:
        with os.scandir(folder) as found:
            entries = [(entry, _is_folder(entry)) for entry in found]
    except PermissionError as error:
        if not prefix:
            raise
        listing.problems[prefix[:-1]] = f'cannot be read ({error.strerror}) and was left out'
        return
    of_zips = all(entry.name.endswith(_BESIDE_ZIPS) for entry, _ in entries)
    for entry, is_folder in entries:
        name = _place(prefix + entry.name, listing)
        if name is None:
            continue
        if is_folder:
            key = (entry.stat().st_dev, entry.stat().st_ino)
            if key in above:
                listing.problems[name] = 'is a link to a folder that contains it and was left out'
                continue
            listing.folders.add(name)
            _list_folder(entry.path, f'{name}/', listing, (*above, key))
        elif is_folder is None or not entry.is_file():  # a broken link, or a device
            listing.files.append(File(name, entry.path, 0, UNREADABLE))
        elif name.endswith('.tar') or (name.endswith('.zip') and of_zips):
            _list_archive(entry.path, name[:-len('.tar')] + '/', listing)
        else:
            listing.files.append(File(name, entry.path, 0, entry.stat().st_size))


def _is_folder(entry: os.DirEntry) -> bool | None:
    """Returns whether an entry is a folder; None if it is a link to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None


def _list_archive(path: str, prefix: str, listing: Listing) -> None:
    """Lists a tar or a zip, depending on its first bytes."""
    with open(path, 'rb') as file:
        magic = file.read(6)
        for start, kind in _COMPRESSED.items():
            if magic.startswith(start):
                raise ValueError(
                    f'{path} is compressed ({kind}), which does not allow random access; unpack it '
                    'and pass the folder or the .tar inside.'
                )
        if prefix:
            listing.folders.add(prefix[:-1])
        is_zip = magic.startswith(_ZIP) or path.endswith('.zip')
        try:
            if is_zip:
                alone: dict[str, zip_files.Member | None] = {}
                for entry in zip_files.members(file):
                    _add_zipped(entry, path, prefix, listing)
                    folder = entry.name.rpartition('/')[0]
                    alone[folder] = None if folder in alone else entry
                # A damaged folder name would become a class; `read` checks the names of images.
                for entry in filter(None, alone.values()):
                    name = zip_files.name_at(file, entry.offset)
                    if name != entry.name:
                        raise ValueError(f'its directory has {entry.name!r} for {name!r}')
            else:
                for member in tar_files.members(file, 0, os.fstat(file.fileno()).st_size):
                    _add_member(file, member, path, prefix, listing)
        except ValueError as error:
            raise ValueError(
                f'{path} is damaged or not a {"zip" if is_zip else "tar"} ({error}); download it '
                'again.'
            ) from error


def _add_zipped(entry: zip_files.Member, path: str, prefix: str, listing: Listing) -> None:
    name = _place(prefix + entry.name, listing)
    if name is None:
        return
    if entry.name.endswith('/'):
        listing.folders.add(name)
    elif entry.why_not:
        listing.problems[name] = f'{entry.why_not} and was left out'
    else:
        listing.files.append(File(name, path, entry.offset, entry.size, entry.packed))


def _add_member(file, member: tarfile.TarInfo, path: str, prefix: str, listing: Listing) -> None:
    name = _place(prefix + member.name, listing)
    if name is None:
        return
    if member.isdir():
        listing.folders.add(name)
    elif not member.isreg() or member.issparse():
        listing.files.append(File(name, path, 0, UNREADABLE))
    elif name.endswith('.tar'):
        inner = name.removesuffix('.tar')
        listing.folders.add(inner)
        stop = member.offset_data + member.size
        for part in tar_files.members(file, member.offset_data, stop):
            inside = _place(f'{inner}/{part.name}', listing)
            if inside is not None and not part.isdir():
                size = part.size if part.isreg() and not part.issparse() else UNREADABLE
                listing.files.append(File(inside, path, part.offset_data, size))
    else:
        listing.files.append(File(name, path, member.offset_data, member.size))


def _place(name: str, listing: Listing) -> str | None:
    """Removes empty and . parts of a name; returns None, with a note, for files to leave out."""
    parts = _parts(name)
    plain = '/'.join(parts)
    if not _IGNORED.isdisjoint(plain.lower().split('/')):
        first = next(k for k, part in enumerate(parts, 1) if part.lower() in _IGNORED)
        listing.notes[printable('/'.join(parts[:first]))] = 'is ignored because of its name'
        return None
    if '/.' in f'/{plain}':  # hidden
        return None
    if not plain.isascii() and printable(plain) != plain:
        listing.problems[printable(plain)] = 'has a name that is not UTF-8 and was left out'
        return None
    return plain or None


def _parts(name: str) -> list[str]:
    return [part for part in name.split('/') if part not in ('', '.')]
