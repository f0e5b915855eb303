"""Handles paths on disk and in buckets (`gs://BUCKET/FOLDER`).

A bucket is an object store. Objects appear atomically and cannot be appended to, renamed or locked.
Folders are prefixes of names and need not be created. Files that need memory mapping or random
access are copied to disk first; see `local_copy`.
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
# Seconds to connect and to wait for an answer at the first access to a bucket.
TIMEOUT = (5, 10)
_READ = ('storage.objects.get', 'storage.objects.list')
# Orbax asks for the kind of the bucket before it deletes a checkpoint.
_WRITE = (*_READ, 'storage.objects.create', 'storage.objects.delete', 'storage.buckets.get')


def resolved(text: str, label: str, kind: str = 'any') -> str:
    """Makes a path from the user absolute or gs://, without `~` and without a trailing slash.

    Args:
      text: the path; not empty.
      label: its name in errors, such as --workdir=runs/a.
      kind: 'file' or 'folder' if an existing path must be one. This does not access buckets; see
        `reach`.
    Raises:
      ValueError: if it is not a valid path, or is of the other kind.
    """
    if '\0' in text:
        raise ValueError(f'{label!r} has a null character; correct the path.')
    if re.match('[a-z][a-z0-9]+:/', text):
        return _in_bucket(text, label)
    path = Path(os.path.expanduser(text))
    if text.startswith('~') and str(path).startswith('~'):
        raise ValueError(f'{label}: there is no user {path.parts[0][1:]!r}; correct the path.')
    if kind == 'folder' and path.is_file():
        raise ValueError(f'{label} is a file, not a folder; pass a folder.')
    if kind == 'file' and path.is_dir():
        raise ValueError(f'{label} is a folder, not a file; pass a file.')
    return str(path.absolute())


def _in_bucket(text: str, label: str) -> str:
    if not text.startswith(BUCKET):
        raise ValueError(
            f'{label} is neither a path on disk nor in a bucket of Google Cloud Storage; write '
            'buckets as gs://BUCKET/FOLDER.'
        )
    bucket, _, name = text.removeprefix(BUCKET).partition('/')
    if not re.fullmatch('[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]', bucket):
        raise ValueError(
            f'{label} has the invalid bucket name {bucket!r}; use at least 3 characters from '
            'lower-case letters, digits, dots, dashes and underscores.'
        )
    if odd := re.search(r'[\x00-\x1f\x7f#?*\[\]]', name):
        raise ValueError(
            f'{label} has the character {odd[0]!r}, which has a special meaning in tools for '
            'buckets; choose another name.'
        )
    name = posixpath.normpath(f'/{name}').strip('/')
    return f'{BUCKET}{bucket}/{name}'.rstrip('/')


def of(path: str | os.PathLike[str]) -> Path:
    """Returns the path object; for buckets an `epath.Path`, which has the methods of pathlib.

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
    """Returns the path object, made absolute."""
    return of(path) if in_bucket(path) else Path(path).absolute()


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKET)


def _prepare_for_buckets(text: str) -> None:
    try:
        # Importing it takes a second, and most runs need no bucket.
        import gcsfs  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'{text} is in a bucket, but the package gcsfs is missing: pip install gcsfs.'
        ) from error
    _configure()


@functools.cache
def _configure() -> None:
    import fsspec.config  # type: ignore[import-untyped]

    # Without a listing cache, so that files of other processes are visible.
    fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
    # If TensorFlow is installed, epath would use it, with other credentials.
    os.environ['EPATH_USE_TF'] = 'false'
    # It warns at every call if it may not read the kind of the bucket.
    logging.getLogger('gcsfs').setLevel(logging.ERROR)


def reach(path: str | os.PathLike[str], label: str, *, write: bool, folder: bool = True) -> None:
    """Checks within seconds that a bucket exists and is accessible; creates nothing.

    Args:
      path: a path in a bucket; paths on disk are not checked.
      label: its name in errors.
      write: whether it must be writable.
      folder: whether the path must be a folder, so that an object of this name is an error.
    Raises:
      ValueError: if a check fails.
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
        raise ValueError(f'{label} is a file, not a folder; pass a folder.')


def _ask(bucket: str, name: str, permissions: tuple, label: str) -> tuple[list[str], bool]:
    """Returns the granted permissions, and whether an object with this name exists."""
    from google.api_core import exceptions
    from google.auth import exceptions as auth
    from google.cloud import storage  # type: ignore[import-untyped]

    options = {'timeout': TIMEOUT, 'retry': None}
    try:
        there = storage.Client().bucket(bucket)
        allowed = there.test_iam_permissions(permissions, **options)
        return allowed, bool(name) and there.blob(name).exists(**options)
    except exceptions.NotFound:
        reason = f'the bucket {bucket} does not exist; create it with gcloud storage buckets '
        reason += 'create, or correct the name'
    except (exceptions.Forbidden, exceptions.Unauthorized):
        reason = f'this account may not use the bucket {bucket}; grant it '
        reason += 'roles/storage.objectUser, or choose another bucket'
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        reason = f'there are no credentials for buckets ({_first_line(error).partition(".")[0]}); '
        reason += 'run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS'
    except Exception as error:  # network errors of any type
        host = os.environ.get('STORAGE_EMULATOR_HOST', 'storage.googleapis.com')
        last = str(error).rpartition(': ')[2].rstrip(')\'".')  # the cause, after its location
        reason = f'{host} does not answer ({last}); check the network, or use a folder on disk'
    raise ValueError(f'{label}: {reason}.')


def _first_line(error: Exception) -> str:
    line = str(error).partition('\n')[0] or type(error).__name__
    return line if len(line) <= 300 else f'{line[:300]} ...'


def writable_folder(folder: str | os.PathLike[str], label: str) -> Path:
    """Checks that a folder is writable and returns its path object; leaves no test file behind.

    Raises:
      ValueError: if it is not; the message starts with the label.
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
            raise PermissionError(None, f'{there} is not writable')
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process created it first
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=whole):
            pass
    except (OSError, ValueError) as error:
        reason = (getattr(error, 'strerror', None) or str(error)).rstrip('.')
        raise ValueError(f'{label}: {reason}; choose another folder.') from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has written there
                path.rmdir()


def check_writable_file(file: str | os.PathLike[str], label: str) -> None:
    """Raises ValueError, starting with the label, unless the file can be written."""
    reach(file, label, write=True, folder=False)
    folder = absolute(file).parent
    if not can_hold_files(folder):
        raise ValueError(f'{label}: its folder does not exist; create it first.')
    if not in_bucket(folder):
        _try(folder, label)


def upload(local: Path, path: Path) -> None:
    """Copies a file to a bucket, where it appears atomically.

    Raises:
      OSError: if it cannot be written.
    """
    from etils import epath

    try:
        epath.Path(local).copy(path, overwrite=True)
    except Exception as error:  # gcsfs has its own exception types
        raise OSError(f'{path} could not be written: {_first_line(error)}') from error


_copies: dict[tuple, Path] = {}


def local_copy(path: str | os.PathLike[str]) -> Path:
    """Returns the path; for a file in a bucket, a copy on disk, which is removed at exit.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the bucket cannot be read.
    """
    if not in_bucket(path):
        return Path(path)
    reach(path, str(path), write=False, folder=False)
    there = of(path)
    if not there.exists():
        raise FileNotFoundError(f'{path} does not exist; correct the path.')
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
    """Returns whether files can be written there; folders in buckets need not exist."""
    return in_bucket(folder) or folder.is_dir()


def remove_tree(path: Path) -> None:
    """Removes a folder and its contents, if it exists."""
    if not in_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()  # type: ignore[attr-defined]
