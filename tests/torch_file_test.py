import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch_bytes import (
    NUMBERS,
    Raw,
    call,
    encode,
    name_of,
    refusal,
    refusals_of_damage,
    storage,
    tensor,
    write,
)

from tarflow_jax.torch_file import read_torch_file

PARITY = Path(__file__).parent / 'parity'

# What a state dict may hold.


@pytest.mark.parametrize('case', ['cond_gray', 'uncond_rgb', 'vp_cond'])
def test_official_files(case):
    config = json.loads(str(np.load(PARITY / case / 'case.npz')['config']))
    tensors = read_torch_file(PARITY / case / 'model.pth')
    blocks, classes = config['num_blocks'], config['num_classes']
    assert len(tensors) == 1 + blocks * (6 + bool(classes) + 12 * config['layers_per_block'])
    assert all(array.dtype == np.float32 for array in tensors.values())
    assert list(tensors)[0] == 'var'
    T = (config['img_size'] // config['patch_size']) ** 2
    np.testing.assert_array_equal(tensors['blocks.1.attn_mask'], np.tril(np.ones((T, T))))
    # torch numbers the storages in the order of the tensors.
    with zipfile.ZipFile(PARITY / case / 'model.pth') as archive:
        for i, (name, array) in enumerate(tensors.items()):
            assert array.tobytes() == archive.read(f'model/data/{i}'), name


def test_values_and_views(tmp_path):
    state = {
        'whole': tensor(),
        'transposed': tensor((3, 2), (1, 3)),
        'slice': tensor((2,), (3,), offset=1),
        'scalar': tensor((), (), offset=5),
        'thin': tensor((1, 2), (10**12, 1), offset=4),
        'empty': tensor((0, 3), (3, 1)),
        'parameter': call('torch._utils', '_rebuild_parameter', tensor(), True, {}),
        'flags': tensor(flags=({},)),
    }
    tensors = read_torch_file(write(tmp_path / 'a.pth', state))
    whole = NUMBERS.reshape(2, 3)
    expected = {
        'whole': whole,
        'transposed': whole.T,
        'slice': [1, 4],
        'scalar': 5,
        'thin': [[4, 5]],
        'empty': np.zeros((0, 3)),
        'parameter': whole,
        'flags': whole,
    }
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name, strict=False)
        assert tensors[name].shape == np.shape(value)
    assert not tensors['whole'].flags.writeable
    assert np.shares_memory(tensors['whole'], tensors['transposed'])


@pytest.mark.parametrize(
    'kind, dtype',
    [
        ('DoubleStorage', 'float64'),
        ('HalfStorage', 'float16'),
        ('BFloat16Storage', 'bfloat16'),
        ('LongStorage', 'int64'),
        ('IntStorage', 'int32'),
        ('ShortStorage', 'int16'),
        ('CharStorage', 'int8'),
        ('ByteStorage', 'uint8'),
        ('BoolStorage', 'bool'),
    ],
)
def test_dtypes(tmp_path, kind, dtype):
    import ml_dtypes

    numbers = np.array([0, 1, 1], ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)
    state = {'a': tensor((3,), (1,), where=storage('0', 3, kind))}
    array = read_torch_file(write(tmp_path / 'a.pth', state, {'0': numbers.tobytes()}))['a']
    assert array.dtype == numbers.dtype
    np.testing.assert_array_equal(array.astype(np.float64), [0, 1, 1])


def test_metadata_of_the_state_dict_is_ignored(tmp_path):
    items = encode({'a': tensor()})[1:]
    metadata = encode({'_metadata': {'': {'version': 1}}, 'items': 3})
    state = Raw(call('collections', 'OrderedDict') + items + metadata + b'b')
    assert list(read_torch_file(write(tmp_path / 'a.pth', state))) == ['a']


# Tensors that do not fit their storage.


@pytest.mark.parametrize(
    'size, stride, offset, found',
    [
        ((2, 3), (3, 1), 1, 'reaches element 6 of a storage of 6'),
        ((2, 3), (4, 1), 0, 'reaches element 6 of a storage of 6'),
        ((7,), (1,), 0, 'reaches element 6 of a storage of 6'),
        ((), (), 6, 'reaches element 6 of a storage of 6'),
        ((2,), (2**62,), 0, f'reaches element {2**62} of a storage of 6'),
        ((2**40,), (0,), 0, 'has more elements than its storage (6)'),
        ((7, 1), (0, 1), 0, 'has more elements than its storage (6)'),
        ((0, 2**40), (1, 1), 0, 'is empty but claims the size (0, 1099511627776)'),
        ((-2, 3), (3, 1), 0, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
        ((2, 3), (-3, 1), 3, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
        ((2, 3), (3, 1), -1, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
        ((2, 3), (3,), 0, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
        ((2.0,), (1,), 0, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
        ((True,), (1,), 0, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
        ((1,) * 33, (1,) * 33, 0, 'calls torch._utils._rebuild_tensor_v2 with arguments'),
    ],
)
def test_views_outside_their_storage(tmp_path, size, stride, offset, found):
    state = {'good': tensor(), 'bad': tensor(size, stride, offset)}
    message = refusal(write(tmp_path / 'a.pth', state))
    assert found in message
    assert "tensor 'bad'" in message or 'calls' in message


def test_storages(tmp_path):
    path = tmp_path / 'a.pth'
    state = {'a': tensor(where=storage(numel=7))}
    assert (
        "tensor 'a' needs a storage of 7 float32 numbers, but the zip entry 'data/0' has 24 bytes"
        in refusal(write(path, state))
    )
    state = {'a': tensor(where=storage('0', 6, 'DoubleStorage'))}
    assert 'needs a storage of 6 float64 numbers' in refusal(write(path, state))
    for key in ('1', '../data/0', '/etc/passwd', '../../../../etc/passwd'):
        state = {'a': tensor(where=storage(key))}
        assert f"the zip entry 'data/{key}', which is missing" in refusal(write(path, state))
    state = {'a': tensor(flags=({'neg': True},))}
    assert 'calls torch._utils._rebuild_tensor_v2 with arg' in refusal(write(path, state))
    state = {'a': tensor(where=storage(kind='UntypedStorage'))}
    assert "names 'torch.UntypedStorage'" in refusal(write(path, state))


# Files that hold something else.


def test_not_a_state_dict(tmp_path):
    path = tmp_path / 'a.pth'
    training = {
        'model': {'a': tensor()},
        'optimizer': {'state': {0: {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
    }
    assert refusal(write(path, training)).endswith(
        "its key 'model' is of type dict instead of a tensor, as in a checkpoint of a whole training "
        "run; save only the state dict with torch.save(torch.load(path)['model'], new_path)."
    )
    state = {'a': tensor(), 'optimizer': training['optimizer']}
    message = refusal(write(path, state))
    assert "its key 'optimizer' is of type dict" in message and 'model.state_dict()' in message
    assert "its key 'epoch' is of type int" in refusal(write(path, {'a': tensor(), 'epoch': 3}))
    assert 'the key 3, which is not a string' in refusal(write(path, {3: tensor()}))
    assert 'a dict key of type tuple' in refusal(write(path, {(1, 2): tensor()}))
    assert 'is of type tensor instead of a dict' in refusal(write(path, tensor()))
    assert 'is of type list instead of a dict' in refusal(write(path, [tensor()]))
    name = name_of('torch', 'IntStorage')
    assert 'is of type Global instead of a dict' in refusal(write(path, name))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.pth does not exist; pass the path'):
        read_torch_file(tmp_path / 'none.pth')
    assert 'is not a file' in refusal(tmp_path)


def test_other_formats(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(pickle.dumps({'a': 1}, 2))
    assert 'is a pickle' in refusal(path)
    path.write_bytes(b'a checkpoint')
    assert "starts with b'a ch', unlike a file of torch.save" in refusal(path)
    path.write_bytes(b'')
    assert "starts with b'', unlike a file of torch.save" in refusal(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme', 'x')
    assert 'has 0 entries <name>/data.pkl instead of one' in refusal(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', 'x')
        archive.writestr('b/data.pkl', 'x')
    assert 'has 2 entries <name>/data.pkl instead of one' in refusal(path)
    write(path, {'a': tensor()}, byteorder=b'big')
    assert "its byte order is b'big'; load and save it again" in refusal(path)


# Hostile and damaged archives.


def test_truncated_anywhere(tmp_path):
    whole = write(tmp_path / 'whole.pth', {'a': tensor()}).read_bytes()
    path = tmp_path / 'a.pth'
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert 'the zip archive is truncated or damaged' in refusal(path)


def test_damaged_numbers(tmp_path):
    path = write(tmp_path / 'a.pth', {'a': tensor()})
    path.write_bytes(path.read_bytes().replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes()))
    message = refusal(path)
    assert "the zip entry 'data/0' is truncated or damaged (Bad CRC-32" in message


def test_random_damage_is_refused_cleanly(tmp_path):
    whole = write(tmp_path / 'whole.pth', {'a': tensor(), 'b': tensor((3,), (2,))}).read_bytes()
    assert refusals_of_damage(tmp_path / 'a.pth', whole, times=500) > 300


def test_compressed_entries(tmp_path):
    zeros = {'0': bytes(4 * 2**20)}
    state = {'a': tensor((2**20,), (1,), where=storage(numel=2**20))}
    path = write(tmp_path / 'a.pth', state, zeros, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert "the zip entry 'model/data.pkl' is compressed, which torch.save never" in refusal(path)


def forge(path, entry: str, file_size=None, compress_size=None, flags=None, offset=None):
    """Overwrites fields of the entry's record in the central directory."""
    data = bytearray(path.read_bytes())
    start = data.index(b'PK\x01\x02')
    while data[start + 46 : start + 46 + len(entry)] != entry.encode():
        start = data.index(b'PK\x01\x02', start + 4)
    for at, form, value in (
        (24, '<I', file_size),
        (20, '<I', compress_size),
        (8, '<H', flags),
        (42, '<I', offset),
    ):
        if value is not None:
            struct.pack_into(form, data, start + at, value)
    path.write_bytes(data)
    return path


def test_entries_that_claim_to_be_huge(tmp_path):
    state = {'a': tensor((2**28,), (1,), where=storage(numel=2**28))}
    path, huge = tmp_path / 'a.pth', 2**30
    forge(write(path, state), 'model/data/0', file_size=huge)
    assert "the zip entry 'model/data/0' is compressed" in refusal(path)
    forge(write(path, state), 'model/data/0', file_size=huge, compress_size=huge)
    message = refusal(path)
    assert 'the zip entries claim 107374' in message
    assert f'bytes in a file of {path.stat().st_size};' in message


def test_encrypted_entry(tmp_path):
    path = forge(write(tmp_path / 'a.pth', {'a': tensor()}), 'model/data/0', flags=1)
    assert "the zip entry 'data/0' is truncated or damaged" in refusal(path)


def test_many_entries_over_the_same_bytes(tmp_path):
    # 50 names for one storage of 400 kB: each is harmless, together they are 20 MB.
    path, count, numel = tmp_path / 'a.pth', 50, 100_000
    storages = {'big': bytes(4 * numel)} | {f'{i:03d}': b'' for i in range(count)}
    state = {
        str(i): tensor((numel,), (1,), where=storage(f'{i:03d}', numel)) for i in range(count)
    }
    write(path, state, storages)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo('model/data/big').header_offset
    for i in range(count):
        size = 4 * numel
        forge(path, f'model/data/{i:03d}', file_size=size, compress_size=size, offset=offset)
    assert 'the zip entries claim 204' in refusal(path)


def test_duplicated_names(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive, pytest.warns(UserWarning, match='Duplicate'):
        archive.writestr('model/data.pkl', b'\x80\x02' + encode({'a': tensor()}) + b'.')
        archive.writestr('model/data/0', NUMBERS.tobytes())
        archive.writestr('model/data/0', NUMBERS[::-1].tobytes())
    path = tmp_path / 'a.pth'
    path.write_bytes(buffer.getvalue())
    assert "the zip archive has 'model/data/0' twice" in refusal(path)
