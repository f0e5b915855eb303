"""What pickles are refused, and that nothing of them happens."""

import os
import pickle
import sys

import pytest
from torch_bytes import Raw, call, encode, name_of, refusal, tensor, write

from tarflow_jax.torch_file import read_torch_file


class Run:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize('function', [os.system, eval, exec])
def test_reduce_runs_nothing(tmp_path, protocol, function):
    marker = tmp_path / 'marker'
    code = f'touch {marker}' if function is os.system else f'open({str(marker)!r}, "w").close()'
    data = pickle.dumps({'a': Run(function, code)}, protocol)
    pickle.loads(data)
    assert marker.exists()  # the command works, so its absence below means something
    marker.unlink()
    message = refusal(write(tmp_path / 'a.pth', data))
    assert not marker.exists()
    if protocol == 2:
        module = {'system': 'posix', 'eval': '__builtin__', 'exec': '__builtin__'}
        name = function.__name__
        assert f"names '{module[name]}.{name}', which no state dict needs" in message


@pytest.mark.parametrize(
    'module, name',
    [
        ('builtins', 'getattr'),
        ('__builtin__', 'eval'),
        ('os', 'system'),
        ('torch', 'load'),
        ('torch._utils', '_rebuild_tensor'),
        ('torch', 'Size'),
        ('torch', 'nn.FloatStorage'),
        ('collections', 'OrderedDict.fromkeys'),
        ('collections', 'defaultdict'),
        ('tarflow_jax.torch_file', '_reduce'),
        ('numpy.core.multiarray', '_reconstruct'),
    ],
)
def test_names_are_refused(tmp_path, module, name):
    state = {'a': tensor(), 'b': name_of(module, name)}
    message = refusal(write(tmp_path / 'a.pth', state))
    assert f"names '{module}.{name}', which no state dict needs and which was not executed" in message
    assert 'torch.save(model.state_dict(), path)' in message


def test_naming_a_module_does_not_import_it(tmp_path):
    (tmp_path / 'hostile_module.py').write_text(f'open({str(tmp_path / "marker")!r}, "w").close()')
    sys.path.insert(0, str(tmp_path))
    try:
        path = write(tmp_path / 'a.pth', {'a': call('hostile_module', 'function')})
        assert "names 'hostile_module.function'" in refusal(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert 'hostile_module' not in sys.modules and not (tmp_path / 'marker').exists()


def test_long_names_are_cut(tmp_path):
    message = refusal(write(tmp_path / 'a.pth', {'a': name_of('x' * 10**6, 'y')}))
    assert len(message) < 400


@pytest.mark.parametrize(
    'opcodes, found',
    [
        (b'(i__builtin__\neval\n', 'uses INST'),
        (b'(c__builtin__\neval\nX\x01\x00\x00\x001o', "names '__builtin__.eval'"),
        (b'\x8c\x02os\x8c\x06system\x93', 'uses SHORT_BINUNICODE'),
        (b'X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93', 'uses STACK_GLOBAL'),
        (b'\x82\x01', 'uses EXT1'),
        (b'ccollections\nOrderedDict\n)\x81', 'uses NEWOBJ'),
        (b'Pname\n', 'uses PERSID'),
        (b'\x96\xff\xff\xff\xff\xff\xff\xff\x7f', 'its pickle is damaged'),
        (b'ccollections\nOrderedDict\n}b', 'sets attributes of a Global'),
        (b']}b', 'sets attributes of a list'),
        (encode(tensor()) + b'}b', 'sets attributes of a tensor'),
        (b'ctorch\nFloatStorage\n(K\x01tR', 'calls torch.FloatStorage with arguments'),
        (b'ccollections\nOrderedDict\n(](K\x01et' + b'R', 'calls collections.OrderedDict'),
        (b'X\x01\x00\x00\x00a)R', 'calls a str with arguments'),
        (b'}))s', 'a dict key of type tuple'),
        (b'}(K\x01K\x01K\x01u', 'sets items of a dict'),
        (b'}(K\x01K\x01K\x01K\x01u', 'sets the dict key 1 twice'),
        (b']K\x01K\x01s', 'sets items of a list'),
        (b'}K\x01a', 'appends to a dict'),
        (b'h\x07', 'its pickle is malformed'),
        (b'u', 'its pickle is malformed'),
        (b'0', 'uses POP'),
        (b'', 'its pickle is malformed'),
        (b'\x8a\x09' + b'\xff' * 8 + b'\x00', 'a number beyond 64 bits'),
        (encode((1, 2)) + b'Q', 'malformed reference to a storage'),
    ],
)
def test_opcodes_are_refused(tmp_path, opcodes, found):
    assert found in refusal(write(tmp_path / 'a.pth', b'\x80\x02' + opcodes + b'.'))


def test_what_breaks_an_unpickler(tmp_path):
    # A memo index near 2**31 makes pickle.Unpickler allocate 32 GB; a deep tuple as a key
    # overflows its C stack, a shared one costs it 2**200 hashes.
    far = b'r\xff\xff\xff\x7f'
    path = write(tmp_path / 'a.pth', Raw(encode({'a': tensor()}) + far))
    assert list(read_torch_file(path)) == ['a']
    deep = b'\x80\x02}N' + b'\x85' * 300_000 + b'Ns.'
    assert 'a dict key of type tuple' in refusal(write(tmp_path / 'a.pth', deep))
    shared = b'\x80\x02}N' + b'q\x00h\x00\x86' * 200 + b'Ns.'
    assert 'a dict key of type tuple' in refusal(write(tmp_path / 'a.pth', shared))


def test_cycles_end(tmp_path):
    itself = b'\x80\x02}q\x00' + encode('a') + b'h\x00s.'
    assert "its key 'a' is of type dict" in refusal(write(tmp_path / 'a.pth', itself))


def test_size_of_the_pickle_is_bounded(tmp_path):
    message = refusal(write(tmp_path / 'a.pth', b'N' * (4 * 2**20 + 1)))
    assert 'data.pkl has 4194305 bytes, but a state dict needs at most 4194304' in message
