"""Paths on a disk and in buckets (`gs://BUCKET/FOLDER`): one function for what users give.

A bucket is an object store. An object appears whole or not at all, and none can be appended to,
renamed or locked; folders are prefixes of names and need not be made. What has to be mapped or
read at random is copied to the disk first, see `local_copy`.
"""

import atexit
import contextlib
import functools
import logging
import os
import posixpath
import re
import shutil
import tempfile
from pathlib import Path

BUCKET = 'gs://'
# Seconds to connect, and to wait for an answer, of the first look at a bucket.
TIMEOUT = (5, 10)
_READ = ('storage.objects.get', 'storage.objects.list')
# Orbax asks what kind of bucket it is before it deletes a checkpoint.
_WRITE = (*_READ, 'storage.objects.create', 'storage.objects.delete', 'storage.buckets.get')


def resolved(text: str, label: str, kind: str = 'any') -> str:
    """What a user gave as a path: absolute or gs://, without `~` and without a slash at the end.

    Args:
      text: not empty.
      label: what an error calls it, such as --workdir=runs/a.
      kind: 'file' or 'folder', if what is there must be one. Buckets are not asked, see `reach`.
    Raises:
      ValueError: if it cannot be a path, or is of the other kind.
    """
    if '\0' in text:
        raise ValueError(f'{label!r} holds a null character; correct the path.')
    if re.match('[a-z][a-z0-9]+:/', text):
        return _in_bucket(text, label)
    path = Path(os.path.expanduser(text))
    if text.startswith('~') and str(path).startswith('~'):
        raise ValueError(f'{label}: no user is called {path.parts[0][1:]!r}; correct the path.')
    if kind == 'folder' and path.is_file():
        raise ValueError(f'{label} is not a folder, but a file; give a folder.')
    if kind == 'file' and path.is_dir():
        raise ValueError(f'{label} is not a file, but a folder; give a file.')
    return str(path.absolute())


def _in_bucket(text: str, label: str) -> str:
    if not text.startswith(BUCKET):
        raise ValueError(
            f'{label} is neither a path on a disk nor in a bucket of Google Cloud Storage; buckets '
            'are written gs://BUCKET/FOLDER.'
        )
    bucket, _, name = text.removeprefix(BUCKET).partition('/')
    if not re.fullmatch('[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]', bucket):
        raise ValueError(
            f'{label} names the bucket {bucket!r}; names of buckets have at least 3 characters, '
            'which are small letters, digits, dots, dashes and underscores.'
        )
    if odd := re.search(r'[\x00-\x1f\x7f#?*\[\]]', name):
        raise ValueError(
            f'{label} has the character {odd[0]!r}, which tools for buckets read otherwise; choose '
            'another name.'
        )
    name = posixpath.normpath(f'/{name}').strip('/')
    return f'{BUCKET}{bucket}/{name}'.rstrip('/')


def of(path: str | os.PathLike[str]) -> Path:
    """The path object: of a path in a bucket an `epath.Path`, which has the methods of pathlib.

    Raises:
      ValueError: if it is in a bucket and the package for buckets is missing.
    """
    text = os.fspath(path)
    if not text.startswith(BUCKET):
        return Path(text)
    _prepare_for_buckets(text)
    from etils import epath  # type: ignore[import-untyped]

    return epath.Path(text)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path object; relative to the folder that the process runs in no more."""
    return of(path) if in_bucket(path) else Path(path).absolute()


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKET)


def _prepare_for_buckets(text: str) -> None:
    try:
        # Here, as most runs need no bucket and it takes a second.
        import gcsfs  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'{text} is in a bucket, and the package to reach it is missing: pip install gcsfs.'
        ) from error
    _configure()


@functools.cache
def _configure() -> None:
    import fsspec.config  # type: ignore[import-untyped]

    # What another process wrote must be seen.
    fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
    # Where TensorFlow happens to be installed, it would be used, with credentials of its own.
    os.environ['EPATH_USE_TF'] = 'false'
    # It warns at each call where it may not ask for the kind of bucket, and goes on.
    logging.getLogger('gcsfs').setLevel(logging.ERROR)


def reach(path: str | os.PathLike[str], label: str, *, write: bool, folder: bool = True) -> None:
    """Looks whether a bucket is there and may be used, within seconds; creates nothing.

    Args:
      path: in a bucket; others are not looked at.
      label: what an error calls it.
      write: whether it must be possible to write there.
      folder: whether an object of this very name is an error.
    Raises:
      ValueError: if not.
    """
    if not in_bucket(path):
        return
    of(path)
    bucket, _, name = os.fspath(path).removeprefix(BUCKET).partition('/')
    needed = _WRITE if write else _READ
    allowed, is_object = _ask(bucket, name if folder else '', needed, label)
    if missing := [permission for permission in needed if permission not in allowed]:
        role = 'objectUser and roles/storage.legacyBucketReader' if write else 'objectViewer'
        raise ValueError(
            f'{label}: the bucket {bucket} does not grant {", ".join(missing)} to this account; '
            f'grant it roles/storage.{role}, or choose another bucket.'
        )
    if is_object:
        raise ValueError(f'{label} is not a folder, but a file; give a folder.')


def _ask(bucket: str, name: str, permissions: tuple, label: str) -> tuple[list[str], bool]:
    """The permissions that are granted, and whether there is an object of a name."""
    from google.api_core import exceptions
    from google.auth import exceptions as auth
    from google.cloud import storage  # type: ignore[import-untyped]

    options = {'timeout': TIMEOUT, 'retry': None}
    try:
        there = storage.Client().bucket(bucket)
        allowed = there.test_iam_permissions(permissions, **options)
        return allowed, bool(name) and there.blob(name).exists(**options)
    except exceptions.NotFound:
        reason = f'there is no bucket {bucket}; create it with gcloud storage buckets create, or '
        reason += 'correct the name'
    except (exceptions.Forbidden, exceptions.Unauthorized):
        reason = f'this account may not use the bucket {bucket}; grant it '
        reason += 'roles/storage.objectUser, or choose another bucket'
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        reason = f'there are no credentials for buckets ({_first_line(error).partition(".")[0]}); '
        reason += 'run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS'
    except Exception as error:  # of the network, with anything
        host = os.environ.get('STORAGE_EMULATOR_HOST', 'storage.googleapis.com')
        last = str(error).rpartition(': ')[2].rstrip(')\'".')  # the cause, behind where it was
        reason = f'{host} does not answer ({last}); check the network, or give a folder on a disk'
    raise ValueError(f'{label}: {reason}.')


def _first_line(error: Exception) -> str:
    line = str(error).partition('\n')[0] or type(error).__name__
    return line if len(line) <= 300 else f'{line[:300]} ...'


def writable_folder(folder: str | os.PathLike[str], label: str) -> Path:
    """The path object of a folder in which a file could be made; nothing is left of the trial.

    Raises:
      ValueError: that begins with the label, if not.
    """
    path = of(folder)
    reach(path, label, write=True)
    if not in_bucket(path):
        _try(path, label)
    return path


def _try(folder: Path, label: str) -> None:
    whole, made = folder.absolute(), []
    try:
        missing = [p for p in (whole, *whole.parents) if not os.path.exists(p)]
        there = missing[-1].parent if missing else whole
        if not there.is_dir():
            raise NotADirectoryError(None, f'{there} is not a folder')
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(None, f'{there} cannot be written to')
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=whole):
            pass
    except (OSError, ValueError) as error:
        reason = (getattr(error, 'strerror', None) or str(error)).rstrip('.')
        raise ValueError(f'{label}: {reason}; choose another folder.') from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has put something there
                path.rmdir()


def check_writable_file(file: str | os.PathLike[str], label: str) -> None:
    """ValueError that begins with the label, unless a file can be written there."""
    reach(file, label, write=True, folder=False)
    folder = absolute(file).parent
    if not can_hold_files(folder):
        raise ValueError(f'{label}: its folder does not exist; create it first.')
    if not in_bucket(folder):
        _try(folder, label)


def upload(local: Path, path: Path) -> None:
    """Copies a file to a bucket, where it appears whole or not at all.

    Raises:
      OSError: if it could not be written.
    """
    from etils import epath

    try:
        epath.Path(local).copy(path, overwrite=True)
    except Exception as error:  # gcsfs has exceptions of its own
        raise OSError(f'{path} could not be written: {_first_line(error)}') from error


_copies: dict[tuple, Path] = {}


def local_copy(path: str | os.PathLike[str]) -> Path:
    """The path, or of a file in a bucket a copy on the disk, which is removed when Python ends.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if the bucket cannot be read.
    """
    if not in_bucket(path):
        return Path(path)
    reach(path, str(path), write=False, folder=False)
    there = of(path)
    if not there.exists():
        raise FileNotFoundError(f'{path} is not there; correct the path.')
    about = there.stat()
    key = (str(path), about.length, about.mtime)  # type: ignore[attr-defined]
    if key not in _copies:
        folder = Path(_temporary()) / str(len(_copies))
        folder.mkdir()
        _copies[key] = folder / there.name
        there.copy(_copies[key])  # type: ignore[attr-defined]
    return _copies[key]


@functools.cache
def _temporary() -> str:
    folder = tempfile.mkdtemp(prefix='tarflow_jax-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def can_hold_files(folder: Path) -> bool:
    """Whether files can be put there: folders in buckets need not be made."""
    return in_bucket(folder) or folder.is_dir()


def remove_tree(path: Path) -> None:
    """Removes a folder with all in it, if it is there."""
    if not in_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()  # type: ignore[attr-defined]
