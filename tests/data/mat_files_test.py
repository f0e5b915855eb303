"""MATLAB's files are read as scipy saved them, and those that lie are refused at once."""

import io
import struct

import numpy as np
import pytest
import scipy.io

from tarflow_jax.data import mat_files

HEADER = b'MATLAB 5.0 MAT-file'.ljust(124) + b'\x00\x01IM'


def test_files_hold_what_scipy_saved():
    saved = io.BytesIO()
    synsets = np.array([(1, 'n01', 'tench'), (2, 'n02', 'goldfish')], [('ID', 'O'), ('WNID', 'O'), ('words', 'O')])
    scipy.io.savemat(saved, {
        'x': np.arange(6.0).reshape(2, 3), 'many': np.arange(10**4), 'synsets': synsets[:, None],
        'words': np.array(['a', 'bc'], object), 'text': 'hello', 'empty': np.zeros((0, 0)),
    }, do_compression=True)
    found = mat_files.read(saved.getvalue())
    np.testing.assert_array_equal(found['x'], [[0, 1, 2], [3, 4, 5]])
    assert found['many'].ravel().tolist() == list(range(10**4))
    assert [(int(row['ID'].item()), row['WNID'], row['words']) for row in found['synsets']] == synsets.tolist()
    assert found['words'] == ['a', 'bc'] and found['text'] == 'hello' and found['empty'].size == 0


def matrix(kind, dims, *parts):
    def element(number, data):
        return struct.pack('<II', number, len(data)) + data + bytes(-len(data) % 8)
    return element(14, element(6, struct.pack('<II', kind, 0)) + element(5, struct.pack(f'<{len(dims)}i', *dims))
                   + element(1, b'x') + b''.join(parts))


@pytest.mark.parametrize('variable, says', [
    (matrix(1, [2**30, 2**30]), 'it is truncated'),  # cells that are not there
    (matrix(2, [2**30, 4], struct.pack('<II', 0x40005, 4) + struct.pack('<II', 1, 0)), 'it is damaged'),
    (matrix(9, [-1, 2]), 'it is damaged'),
    (matrix(9, [2, 2], struct.pack('<II', 2, 8) + bytes(8)), 'it has 8 numbers instead of 4'),
    (matrix(9, [2, 2], struct.pack('<II', 2, 2**31) + bytes(8)), 'it is truncated'),
    (matrix(3, [1, 1]), 'a variable of the class 3, which is not supported'),
    (struct.pack('<II', 15, 4) + b'junk', 'it is damaged: Error -3'),
])
def test_hostile_files(variable, says):
    with pytest.raises(ValueError, match=says):
        mat_files.read(HEADER + variable)


def test_deep_files():
    inner = matrix(9, [1, 1], struct.pack('<II', 2, 1) + b'\x01' + bytes(7))
    for _ in range(6):
        inner = matrix(1, [1, 1], inner)
    with pytest.raises(ValueError, match='nested more than 4 deep'):
        mat_files.read(HEADER + inner)
