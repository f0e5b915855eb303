"""Reads the columns, labels and images of one parquet file, and checks all of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGE_COLUMNS = ('image', 'img')
LABEL_COLUMNS = ('label', 'labels', 'fine_label')
_LABELS_AT_ONCE = 2**16
_IMAGES_AT_ONCE = 64
_BYTES_AT_ONCE = 2**24
_FEW_ROWS = 10**6
_MAX_VALUES = 2**29  # numbers in the lists of one row group
_MAX_FOOTER_ITEMS = 10**7
# Image files do not compress, and most of the compression of numbers is in their encoding.
BOMB_BYTES, BOMB_RATIO = 2**28, 100


class Part(NamedTuple):
    """One file and the contents of its footer."""

    path: Path
    rows: list[int]  # in each row group
    image: str  # names of the columns
    label: str | None
    nested: bool  # whether images are lists of numbers
    names: list[str] | None  # class names


def open_part(path: Path) -> Part:
    """Reads the footer of a file.

    Raises:
        ValueError: it is damaged, claims too many rows, or has no images.
    """
    try:
        with _parquet(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            rows = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    except Exception as error:  # pyarrow raises many kinds
        raise _told(path, error) from error
    # An image takes more than a byte, unless all are equal.
    if any(count < 0 for count in rows) or sum(rows) > max(_FEW_ROWS, path.stat().st_size):
        raise ValueError(_damaged(path, f'it promises {sum(rows)} rows'))
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise ValueError(
            f'{path} has the columns {", ".join(schema.names)[:200]}, but none called '
            f'{" or ".join(IMAGE_COLUMNS)}; rename the column with the images.'
        )
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    nested = _is_nested(path, schema.field(image))
    return Part(path, rows, image, label, nested, _metadata_names(schema, label))


def labels(part: Part) -> list[str | None] | np.ndarray:
    """Reads the labels of all rows: int32 with -1 for none, or names.

    Raises:
        ValueError: the file is damaged, or the column has another type.
    """
    from pyarrow import types

    found: list[Any] = []
    try:
        with _parquet(part.path) as file:
            kind = file.schema_arrow.field(part.label).type
            if types.is_dictionary(kind):
                kind = kind.value_type
            if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
                raise ValueError(f'its column {part.label} has {kind}, neither numbers nor names')
            batches = file.iter_batches(_LABELS_AT_ONCE, columns=[part.label], use_threads=False)
            for batch in batches:
                values = batch.column(0)
                if types.is_integer(kind):
                    values = values.fill_null(-1).to_numpy(zero_copy_only=False)
                    if values.size and not -1 <= values.min() <= values.max() < 10**6:
                        raise ValueError(f'its column {part.label} has labels above a million')
                    found.append(values.astype(np.int32))
                else:
                    found += values.to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        raise _told(part.path, error) from error
    values = np.concatenate([np.zeros(0, np.int32), *found]) if types.is_integer(kind) else found
    if len(values) != sum(part.rows):
        raise ValueError(_damaged(part.path, f'it has {len(values)} labels'))
    return values


def images(part: Part, start: int, stop: int) -> Iterator[list[bytes] | list[np.ndarray]]:
    """Yields the images of the rows [start, stop) in groups: files, or arrays of uint8.

    A missing image is empty; an array that is not an image is flat.

    Raises:
        ValueError: the file is damaged.
        OSError: it has become unreadable.
    """
    before = 0
    for group, count in enumerate(part.rows):
        first, last = max(start - before, 0), min(stop - before, count)
        if first < last:
            try:
                yield from _of_group(part, group, first, last)
            except Exception as error:
                raise _told(part.path, error) from error
        before += count


def _of_group(part: Part, group: int, start: int, stop: int) -> Iterator[list]:
    with _parquet(part.path) as file:
        step = _rows_at_once(part, file.metadata.row_group(group))
        columns = [part.image if part.nested else f'{part.image}.bytes']
        if not part.nested and 'bytes' not in _fields(file.schema_arrow.field(part.image).type):
            columns = [part.image]
        row = 0
        options = dict(row_groups=[group], columns=columns, use_threads=False)
        for batch in file.iter_batches(step, **options):
            column = getattr(batch.column(0), 'storage', batch.column(0))
            first, row = row, row + len(column)
            column = column[max(start - first, 0):max(stop - first, 0)]
            if len(column):
                yield _arrays(column) if part.nested else _contents(column)
            if row >= stop:
                return
    raise ValueError(f'its row group {group} has {row} rows')


def _rows_at_once(part: Part, group) -> int:
    """Returns how many rows fit in 16 MiB, judging by the footer and the dictionaries."""
    largest = 1
    for k in range(group.num_columns):
        column = group.column(k)
        if column.path_in_schema.split('.')[0] != part.image:
            continue
        if part.nested and column.num_values > _MAX_VALUES:
            raise ValueError(f'a row group promises {column.num_values} numbers')
        unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
        with open(part.path, 'rb') as file:
            # A damaged offset may be negative.
            file.seek(max(column.dictionary_page_offset or column.data_page_offset, 0))
            page = _page_bytes(file.read(32))
        if page > unpacked or unpacked > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise ValueError(
                f'a decompression bomb: {packed} bytes unpack to {max(page, unpacked)}'
            )
        size = max(unpacked, 8 * part.nested * column.num_values)
        largest = max(largest, size // group.num_rows)
        if column.has_dictionary_page and not part.nested:
            largest = max(largest, page)  # each row may be the largest entry
    return min(_IMAGES_AT_ONCE, max(1, _BYTES_AT_ONCE // largest))


def _page_bytes(header: bytes) -> int:
    """Returns the unpacked size of a page: field 2, a zigzag varint, of its Thrift header."""
    numbers, at = [], 0
    for _ in range(2):
        if header[at:at + 1] != b'\x15':  # the next field, an i32
            raise ValueError('it has a damaged page')
        number = shift = 0
        while True:
            at += 1
            number |= (header[at] & 127) << shift
            shift += 7
            if header[at] < 128:
                break
        at += 1
        numbers.append(number >> 1)
    return numbers[1]


def _contents(column) -> list[bytes]:
    if _fields(column.type):
        column, = column.flatten()
    return [value.as_py() or b'' for value in column]


def _fields(kind) -> list[str]:
    from pyarrow import types

    return [field.name for field in kind] if types.is_struct(kind) else []


def _arrays(column) -> list[np.ndarray]:
    return [_array(column[k:k + 1]) for k in range(len(column))]


def _array(column) -> np.ndarray:
    """Converts a row, a list of lists, to a uint8 image [H,W,C]."""
    from pyarrow import compute, types

    shape, values = [], column
    none = np.zeros(0, np.uint8)
    while not types.is_integer(values.type):
        lengths = np.unique(compute.list_value_length(values).to_numpy(zero_copy_only=False))
        if len(lengths) != 1 or not lengths[0] > 0:  # ragged or empty
            return none
        shape.append(int(lengths[0]))
        values = values.flatten()
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in 'iu' or numbers.min() < 0 or numbers.max() > 255:
        return none
    return numbers.astype(np.uint8).reshape(*shape, *[1] * (3 - len(shape)))


def _parquet(path: Path):
    """Opens a file."""
    import pyarrow.parquet  # slow to import; only this source needs it

    return pyarrow.parquet.ParquetFile(
        path, buffer_size=2**20, thrift_string_size_limit=2**28,
        thrift_container_size_limit=_MAX_FOOTER_ITEMS,
    )


def _told(path: Path, error: Exception) -> Exception:
    """Adds the file name to an error about its contents; keeps errors of the system."""
    if isinstance(error, OSError) and error.errno:
        return error
    return ValueError(_damaged(path, ' '.join(str(error).split()) or type(error).__name__))


def _damaged(path: Path, why: str) -> str:
    return f'{path} is damaged or not a parquet file ({why[:200]}); download it again.'


def _is_nested(path: Path, field) -> bool:
    from pyarrow import types

    kind = getattr(field.type, 'storage_type', field.type)
    if types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
        kind = kind.field('bytes').type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return False
    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth in (2, 3) and types.is_integer(kind):
        return True
    raise ValueError(
        f'{path} has a column {field.name} of type {str(field.type)[:100]}, which is neither bytes '
        'nor lists of whole numbers [H,W] or [H,W,C]; write it as one of these.'
    )


def _metadata_names(schema, label: str | None) -> list[str] | None:
    """Reads the class names that the `datasets` package writes into the schema."""
    try:
        features = json.loads(schema.metadata[b'huggingface'])['info']['features']
        names = features[label]['names']
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names if len(set(names)) == len(names) else None
    except (KeyError, TypeError, ValueError, RecursionError):
        pass  # any part of the metadata may be missing
    return None
