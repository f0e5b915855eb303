"""Files for torch, read back by the reader that was tested against torch's own."""

import io
import pickletools
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tarflow_jax.torch_file import read_torch_file
from tarflow_jax.torch_writer import write_torch_file

ARRAYS = {
    'sum': np.arange(3.0),
    'images.count': np.array(-(2**40)),
    'transposed': np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    'big_endian': np.arange(5, dtype='>f8'),
    'none': np.zeros((0, 3), np.float16),
    'é': np.array([True, False]),
    'int32': np.array([[1, -2]], np.int32),
    'int16': np.array([1, -2], np.int16),
    'int8': np.array([1, -2], np.int8),
    'uint8': np.array([1, 255], np.uint8),
    'bfloat16': np.array([1, -2], ml_dtypes.bfloat16),
}


def test_reads_back(tmp_path):
    write_torch_file(tmp_path / 'file.pth', ARRAYS)
    found = read_torch_file(tmp_path / 'file.pth')
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype.newbyteorder('='), name
        assert found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ['file.pth']


def test_layout_of_the_archive(tmp_path):
    write_torch_file(tmp_path / 'file.pth', {'a': np.arange(2.0), 'b': np.int64(3)})
    with zipfile.ZipFile(tmp_path / 'file.pth') as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = entries.pop('archive/data.pkl')
    assert entries == {
        'archive/byteorder': b'little',
        'archive/data/0': np.arange(2.0).tobytes(),
        'archive/data/1': b'\x03' + b'\0' * 7,
        'archive/version': b'3\n',
    }
    shown = io.StringIO()
    pickletools.dis(pickled, shown)  # raises where the stack does not work out
    assert "highest protocol among opcodes = 2" in shown.getvalue()


def test_equal_arrays_make_equal_files_and_replace(tmp_path):
    for name in ('one.pth', 'two.pth', 'two.pth'):
        write_torch_file(tmp_path / name, ARRAYS)
    assert (tmp_path / 'one.pth').read_bytes() == (tmp_path / 'two.pth').read_bytes()


def test_refused(tmp_path):
    (tmp_path / 'file.pth').write_bytes(b'before')
    with pytest.raises(ValueError, match='^x is complex128, .*; cast it to one of float64'):
        write_torch_file(tmp_path / 'file.pth', {'x': np.zeros(2, complex)})
    with pytest.raises(FileNotFoundError, match='the folder .*missing does not exist'):
        write_torch_file(tmp_path / 'missing' / 'file.pth', {})
    assert (tmp_path / 'file.pth').read_bytes() == b'before'
