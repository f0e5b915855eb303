"""Files in the format of torch.save before PyTorch 1.6."""

import os
import pickle
import struct

import numpy as np
import pytest
from torch_bytes import (
    LEGACY_START,
    MACHINE,
    NUMBERS,
    Raw,
    encode,
    legacy_state,
    name_of,
    refusal,
    refusals_of_damage,
    storage,
    tensor,
    write_legacy,
)

from tarflow_jax.torch_file import read_torch_file

# As torch writes it, with a reference of six items.
WHERE = storage('0', 6, 'FloatStorage', None)
STATE = {'a': tensor(where=WHERE)}


def test_values_and_views(tmp_path):
    counts = np.arange(4, dtype='<i8') - 2
    longs = storage('140', 4, 'LongStorage', None)
    state = {
        'whole': tensor(where=WHERE),
        'count': tensor((), (), 3, where=longs),
        'transposed': tensor((3, 2), (1, 3), where=WHERE),
        'slice': tensor((2,), (1,), 1, where=longs),
        'empty': tensor((0, 3), (3, 1), where=storage('7', 0, 'HalfStorage', None)),
    }
    storages = {'140': counts, '7': np.zeros(0, '<f2'), '0': NUMBERS}
    tensors = read_torch_file(write_legacy(tmp_path / 'a.pth', state, storages))
    assert list(tensors) == list(state)
    whole = NUMBERS.reshape(2, 3)
    for name, wanted in {
        'whole': whole, 'count': np.int64(1), 'transposed': whole.T,
        'slice': counts[1:3], 'empty': np.zeros((0, 3), np.float16),
    }.items():
        np.testing.assert_array_equal(tensors[name], wanted, strict=True, err_msg=name)
    assert np.shares_memory(tensors['whole'], tensors['transposed'])
    assert not tensors['whole'].flags.writeable


def test_many_tensors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f'layer.{i}': rng.random((i % 5, 3), np.float32) for i in range(200)}
    tensors = read_torch_file(write_legacy(tmp_path / 'a.pth', *legacy_state(arrays)))
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_truncated_anywhere(tmp_path):
    whole = write_legacy(tmp_path / 'whole.pth', STATE).read_bytes()
    path = tmp_path / 'a.pth'
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refusal(path)
    assert f"the file ends at byte {len(whole) - 1}, but the storage '0' reaches" in message


def test_random_damage_is_refused_cleanly(tmp_path):
    whole = write_legacy(tmp_path / 'whole.pth', STATE).read_bytes()
    assert refusals_of_damage(tmp_path / 'a.pth', whole, times=500) > 300


@pytest.mark.parametrize('count', [-1, 0, 5, 7, 2**40, 2**63 - 1, -(2**63)])
def test_lying_counts(tmp_path, count):
    path = write_legacy(tmp_path / 'a.pth', STATE)
    data = path.read_bytes()
    path.write_bytes(data[:-32] + struct.pack('<q', count) + data[-24:])
    assert f"the storage '0' has {count} numbers, but its tensors need 6" in refusal(path)


def test_references_that_do_not_fit_the_file(tmp_path):
    path = tmp_path / 'a.pth'
    huge = storage('0', 2**40, 'FloatStorage', None)
    message = refusal(write_legacy(path, {'a': tensor((2**40,), (1,), where=huge)}))
    assert f'the file ends at byte {path.stat().st_size}, but the storage' in message
    # The same storage under another type, and a view beyond its end.
    wide = tensor(where=storage('0', 6, 'DoubleStorage', None))
    message = refusal(write_legacy(path, {'wide': wide, **STATE}))
    assert "tensor 'wide' needs a storage of 6 float64 numbers" in message
    assert "but the storage '0' has 24 bytes" in message
    assert 'reaches element 6 of a storage of 6' in refusal(
        write_legacy(path, {'a': tensor(offset=1, where=WHERE)})
    )
    # A view of a storage, which torch has not written since version 0.4.
    view = storage('0', 6, 'FloatStorage', ('1', 0, 6))
    assert 'malformed reference to a storage' in refusal(
        write_legacy(path, {'a': tensor(where=view)})
    )


@pytest.mark.parametrize(
    'keys, found',
    [
        (['0', '0'], "its storage keys have '0' twice or without a tensor"),
        (['0', '1'], "its storage keys have '1' twice or without a tensor"),
        (['1' * 1000, '0'], "...' twice or without a tensor"),
        ([], "tensor 'a' needs the storage '0', which is missing"),
        ([0], 'its storage keys are not a list of strings'),
        (('0',), 'its storage keys are not a list of strings'),
        ({'0': 1}, 'its storage keys are not a list of strings'),
        (name_of('os', 'system'), "names 'os.system', which no state dict needs"),
    ],
)
def test_storage_keys(tmp_path, keys, found):
    assert found in refusal(write_legacy(tmp_path / 'a.pth', STATE, keys=keys))


@pytest.mark.parametrize(
    'machine, found',
    [
        (MACHINE | {'little_endian': False}, 'not little-endian; load and save it again'),
        ({}, 'not little-endian'),
        ([], 'not little-endian'),
        (name_of('os', 'system'), "names 'os.system', which no state dict needs"),
        (Raw(encode('little_endian') + b'\x85' * 300_000), 'not little-endian'),
    ],
)
def test_facts_about_the_machine(tmp_path, machine, found):
    assert found in refusal(write_legacy(tmp_path / 'a.pth', STATE, machine=machine))


def test_what_is_no_state_dict(tmp_path):
    path = tmp_path / 'a.pth'
    assert "its key 'epoch' is of type int" in refusal(write_legacy(path, {**STATE, 'epoch': 3}))
    assert 'is of type tensor instead of a dict' in refusal(write_legacy(path, tensor(where=WHERE)))
    inner = {'model': STATE}
    assert "torch.load(path)['model']" in refusal(write_legacy(path, inner))


class Run:
    def __reduce__(self):
        return os.system, (f'touch {Run.marker}',)


@pytest.mark.parametrize('place', [0, 1, 2])
def test_nothing_is_run(tmp_path, place):
    Run.marker = tmp_path / 'marker'
    parts = [b'\x80\x02' + encode(value) + b'.' for value in (MACHINE, STATE, ['0'])]
    parts[place] = pickle.dumps({'a': Run()}, 2)
    path = tmp_path / 'a.pth'
    path.write_bytes(LEGACY_START + b''.join(parts))
    assert 'system' in refusal(path)
    assert not Run.marker.exists()


def test_deep_nesting_and_far_memos(tmp_path):
    path = tmp_path / 'a.pth'
    deep = Raw(b'}N' + b'\x85' * 300_000 + b'Ns')
    assert 'a dict key of type tuple' in refusal(write_legacy(path, deep))
    far = Raw(encode(STATE) + b'r\xff\xff\xff\x7f')
    assert list(read_torch_file(write_legacy(path, far))) == ['a']


def test_pickles_are_bounded(tmp_path):
    # 8 MiB of a pickle: only the first 4 are followed.
    path = write_legacy(tmp_path / 'a.pth', Raw(b'N' * (8 * 2**20)))
    assert 'its pickle is damaged (pickle exhausted before seeing STOP)' in refusal(path)
