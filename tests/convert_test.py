import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tarflow_jax import convert
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.torch_file import read_torch_file

PARITY = Path(__file__).parent / 'parity'
CASES = ('cond_gray', 'uncond_rgb', 'vp_cond')
FILES = [f'{case}/model.pth' for case in CASES]
FILES += ['trajectory/initial.pth', 'trajectory/final.pth']
FILES += ['itarflow_cond_rgb/model.pth', 'itarflow_uncond_gray/model.pth']
FILES += ['itarflow_trajectory/initial.pth', 'itarflow_trajectory/final.pth']


def model_of(case, **changes) -> TarFlow:
    config = json.loads(str(np.load(PARITY / case / 'case.npz')['config']))
    fields = {
        'image_size': config['img_size'],
        'image_channels': config['in_channels'],
        'num_classes': config['num_classes'],
    }
    if case.startswith('itarflow'):
        [patch_size], [width] = config['patch_sizes'], config['channels']
        depths = tuple(config['layers_per_block'])
        fields |= {'noise_conditioned': True}
    else:
        patch_size, width = config['patch_size'], config['channels']
        depths = (config['layers_per_block'],) * config['num_blocks']
        fields |= {'volume_preserving': not config['nvp']}
    fields |= {'patch_size': patch_size, 'width': width, 'layers_per_block': depths}
    return TarFlow(**(fields | changes))


def shapes(model):
    """What `model.init` returns, as {path: (shape, dtype)}."""
    images = jnp.zeros((2, *model.image_shape))
    tree = jax.eval_shape(model.init, jax.random.key(0), images, jnp.zeros(2, jnp.int32))
    return {jax.tree_util.keystr(k): (v.shape, v.dtype) for k, v in jax.tree.leaves_with_path(tree)}


def random_variables(model, seed=0):
    images = jnp.zeros((1, *model.image_shape))
    tree = jax.eval_shape(model.init, jax.random.key(0), images, jnp.zeros(1, jnp.int32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32) + 0.1, tree)


def assert_identical(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


def small(**changes) -> TarFlow:
    fields = {'image_size': 4, 'image_channels': 3, 'patch_size': 2, 'width': 64}
    return TarFlow(**(fields | {'layers_per_block': (1, 2), 'num_classes': 3} | changes))


def refusal(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    message = str(error.value)
    assert message.endswith('.') and '\n' not in message
    return message


# Loading.


@pytest.mark.parametrize('file', FILES)
def test_tree_is_that_of_init(file):
    model = model_of(file.split('/')[0])
    variables = convert.load_official(PARITY / file, model)
    leaves = jax.tree.leaves_with_path(variables)
    assert {jax.tree_util.keystr(k): (v.shape, v.dtype) for k, v in leaves} == shapes(model)
    assert all(leaf.flags.writeable and leaf.flags.c_contiguous for _, leaf in leaves)


@pytest.mark.parametrize('case', CASES)
def test_latents_are_those_of_the_official_code(case):
    recorded = np.load(PARITY / case / 'case.npz')
    model = model_of(case)
    variables = convert.load_official(PARITY / case / 'model.pth', model)
    labels = recorded['y'] if 'y' in recorded.files else None
    apply = jax.jit(model.apply)
    z_BxTxD, logdet_B = apply(variables, recorded['x'].transpose(0, 2, 3, 1), labels)
    B, T, D = recorded['z'].shape
    p, C = model.patch_size, model.image_channels
    expected = recorded['z'].reshape(B, T, C, p, p).transpose(0, 1, 3, 4, 2).reshape(B, T, D)
    np.testing.assert_allclose(z_BxTxD, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logdet_B / (T * D), recorded['logdet'], rtol=1e-5, atol=1e-7)


def test_permutations_number_by_number():
    # Written out with loops, so that the rule of the docstring is checked and not repeated.
    model = model_of('vp_cond')
    official = read_torch_file(PARITY / 'vp_cond' / 'model.pth')
    variables = convert.load_official(PARITY / 'vp_cond' / 'model.pth', model)
    block = variables['params']['block_1']
    p, C, K = model.patch_size, model.image_channels, model.head_dim
    for row in range(p):
        for column in range(p):
            for channel in range(C):
                ours, theirs = (row * p + column) * C + channel, (channel * p + row) * p + column
                for mine, other in (
                    (block['proj_in']['kernel'][ours], 'blocks.1.proj_in.weight'),
                    (block['proj_out']['kernel'][:, ours], 'blocks.1.proj_out.weight'),
                    (block['proj_out']['bias'][ours], 'blocks.1.proj_out.bias'),
                    (variables['prior']['variance'][:, ours], 'var'),
                ):
                    expected = official[other]
                    column_axis = other in ('blocks.1.proj_in.weight', 'var')
                    expected = expected[:, theirs] if column_axis else expected[theirs]
                    np.testing.assert_array_equal(mine, expected, err_msg=other)
    attention = 'blocks.1.attn_blocks.0.attention'
    layers = block['layers']
    for part in range(3):
        for head in range(model.width // K):
            rows = slice(part * model.width + head * K, part * model.width + (head + 1) * K)
            theirs = official[f'{attention}.qkv.weight'][rows]
            np.testing.assert_array_equal(layers['qkv']['kernel'][0, :, part, head], theirs.T)
    np.testing.assert_array_equal(
        layers['mlp_in']['kernel'][0], official['blocks.1.attn_blocks.0.mlp.main.0.weight'].T
    )
    np.testing.assert_array_equal(
        block['class_embedding'], official['blocks.1.class_embed'][:, 0]
    )


def test_halves_of_proj_out():
    # The first half of the official outputs is the log-scale; several heads (width 128) too.
    model = model_of('uncond_rgb')
    official = read_torch_file(PARITY / 'uncond_rgb' / 'model.pth')
    params = convert.load_official(PARITY / 'uncond_rgb' / 'model.pth', model)['params']
    bias, weight = official['blocks.0.proj_out.bias'], official['blocks.0.proj_out.weight']
    D = model.patch_dim
    order = np.arange(D).reshape(3, 2, 2).transpose(1, 2, 0).ravel()
    assert order[:4].tolist() == [0, 4, 8, 1]
    ours = params['block_0']['proj_out']
    np.testing.assert_array_equal(ours['bias'], np.concatenate([bias[order], bias[D + order]]))
    np.testing.assert_array_equal(ours['kernel'][:, D:], weight[D + order].T)
    projection = official['blocks.0.attn_blocks.0.attention.proj.weight']
    np.testing.assert_array_equal(
        params['block_0']['layers']['attention_proj']['kernel'][0, 1], projection[:, 64:].T
    )


# Saving.


@pytest.mark.parametrize('file', FILES)
def test_round_trip_is_exact(tmp_path, file):
    model = model_of(file.split('/')[0])
    variables = convert.load_official(PARITY / file, model)
    convert.save_official(variables, model, tmp_path / 'a.safetensors')
    assert_identical(convert.load_official(tmp_path / 'a.safetensors', model), variables)
    official = read_torch_file(PARITY / file)
    saved = safetensors.numpy.load_file(tmp_path / 'a.safetensors')
    assert set(saved) == set(official)
    for name, tensor in official.items():
        assert saved[name].shape == tensor.shape and saved[name].dtype == np.float32
        assert saved[name].tobytes() == tensor.tobytes(), name
    if (PARITY / file).with_name('names.json').exists():
        named = json.loads((PARITY / file).with_name('names.json').read_text())
        assert {name: list(tensor.shape) for name, tensor in saved.items()} == named


@pytest.mark.parametrize('volume_preserving', [False, True])
def test_round_trip_of_uneven_blocks_and_small_heads(tmp_path, volume_preserving):
    model = small(
        layers_per_block=(1, 3, 2), head_dim=16, volume_preserving=volume_preserving
    )
    variables = random_variables(model)
    on_device = jax.tree.map(jnp.asarray, variables)
    convert.save_official(on_device, model, tmp_path / 'a.safetensors')
    assert_identical(convert.load_official(tmp_path / 'a.safetensors', model), variables)
    saved = safetensors.numpy.load_file(tmp_path / 'a.safetensors')
    assert saved['blocks.1.attn_blocks.2.mlp.main.2.weight'].shape == (64, 256)
    assert saved['blocks.2.class_embed'].shape == (3, 1, 64)
    np.testing.assert_array_equal(saved['blocks.2.attn_mask'], np.tril(np.ones((4, 4))))
    assert (saved['var'] == 1).all() != volume_preserving


def test_names_of_classes_are_kept(tmp_path):
    model, path = small(), tmp_path / 'a.safetensors'
    variables = random_variables(model)
    convert.save_official(variables, model, path, ['n3', 'n1', 'n2'])
    assert convert.class_names(path) == ['n3', 'n1', 'n2']
    assert_identical(convert.load_official(path, model), variables)
    convert.save_official(variables, model, path)
    assert convert.class_names(path) is None
    assert convert.class_names(PARITY / 'cond_gray' / 'model.pth') is None
    safetensors.numpy.save_file({}, path, {'class_names': '["n1", 2]'})
    assert 'not a list of names' in refusal(convert.class_names, path)


@pytest.mark.parametrize('fields, name', [
    ({'scale': 'softplus'}, 'scale'), ({'first_token': 'start'}, 'first_token'),
    ({'num_features': 2}, 'num_features'), ({'scale_limit': 3.0}, 'scale_limit'),
    ({'orders': ((0, 2, 1, 3), (3, 1, 2, 0))}, 'orders'),
])
def test_flows_that_the_official_code_has_not_are_refused(tmp_path, fields, name):
    model = small(**fields)
    path = tmp_path / 'a.safetensors'
    assert name in refusal(convert.save_official, random_variables(model), model, path)
    convert.save_official(random_variables(small()), small(), path)
    assert name in refusal(convert.load_official, path, model)


def test_noise_conditioned_tensors_number_by_number():
    case = PARITY / 'itarflow_cond_rgb' / 'model.pth'
    official, model = read_torch_file(case), model_of('itarflow_cond_rgb')
    params = convert.load_official(case, model)['params']
    assert len(set(model.layers_per_block)) > 1
    for b, depth in enumerate(model.layers_per_block):
        noise, theirs = params[f'block_{b}']['noise_embedding'], f'blocks.{b}.time_embed.mlp'
        for name, index in (('mlp_in', 0), ('mlp_out', 2)):
            kernel, bias = (official[f'{theirs}.{index}.{part}'] for part in ('weight', 'bias'))
            np.testing.assert_array_equal(noise[name]['kernel'], kernel.T)
            np.testing.assert_array_equal(noise[name]['bias'], bias)
        for i in range(depth):
            np.testing.assert_array_equal(
                params[f'block_{b}']['layers']['mlp_in']['kernel'][i],
                official[f'blocks.{b}.head_blocks.{i}.mlp.main.0.weight'].T,
            )


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = small(), tmp_path / 'a.safetensors'
    convert.save_official(random_variables(model, 1), model, path)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full_disk(*_):
        raise OSError('No space left on device')

    for function in ('fsync', 'replace'):
        with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
            patch.setattr(os, function, full_disk)
            convert.save_official(random_variables(model, 2), model, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.safetensors']
    convert.save_official(random_variables(model, 2), model, path)
    assert path.read_bytes() != before and os.listdir(tmp_path) == ['a.safetensors']


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_save_refuses(tmp_path):
    model, path = small(), tmp_path / 'a.safetensors'

    def message(change):
        variables = random_variables(model)
        change(variables['params'])
        return refusal(convert.save_official, variables, model, path)

    def set_bias(value):
        return lambda params: params['block_1']['proj_in'].update(bias=value)

    assert 'params/block_1/proj_in/bias has shape [63], but the model needs [64]' in message(
        set_bias(np.zeros(63, np.float32))
    )
    assert 'params/block_1/proj_in/bias is float64 (cast it to float32)' in message(
        set_bias(np.zeros(64))
    )
    assert 'params/block_1/proj_in/bias is bfloat16 (cast it to float32)' in message(
        set_bias(jnp.zeros(64, jnp.bfloat16))
    )
    assert 'params/block_1/proj_in/bias has nan, but all numbers must be finite' in message(
        set_bias(np.full(64, np.nan, np.float32))
    )
    assert 'params/block_0/proj_out/bias [24] is missing' in message(
        lambda params: params['block_0']['proj_out'].pop('bias')
    )
    assert "'params/block_2/extra' is unknown to the model" in message(
        lambda params: params.update(block_2={'extra': np.zeros(1)})
    )
    # The parameters alone, without the 'params' level.
    variables = random_variables(model)['params']
    assert 'params/block_0/position_embedding [4, 64] is missing' in refusal(
        convert.save_official, variables, model, path
    )
    assert 'variables is a NoneType' in refusal(convert.save_official, None, model, path)
    assert os.listdir(tmp_path) == []

    variables = random_variables(model)
    assert "ends with '.pth'; choose a name ending in .safetensors" in refusal(
        convert.save_official, variables, model, tmp_path / 'a.pth'
    )
    with pytest.raises(FileNotFoundError, match='none does not exist; create it first'):
        convert.save_official(variables, model, tmp_path / 'none' / 'a.safetensors')


# Checkpoints that do not fit.


@pytest.fixture
def official(tmp_path):
    """Tensors of a valid file for `small()`, and a function that loads a changed version."""
    path = tmp_path / 'a.safetensors'
    convert.save_official(random_variables(small()), small(), path)

    def message(tensors, **changes):
        safetensors.numpy.save_file(tensors, path)
        return refusal(convert.load_official, path, small(**changes))

    return safetensors.numpy.load_file(path), message


def test_every_problem_is_named(official):
    tensors, message = official
    del tensors['blocks.0.proj_in.bias']
    tensors['blocks.1.proj_in.weight'] = np.zeros((64, 16), np.float32)
    tensors['module.surprise'] = np.zeros(1, np.float32)
    text = message(tensors)
    assert 'a.safetensors does not fit TarFlow(image_size=4, image_channels=3, patch_si' in text
    assert 'blocks.0.proj_in.bias [64] is missing; ' in text
    assert 'blocks.1.proj_in.weight has shape [64, 16], but the model needs [64, 12]; ' in text
    assert text.endswith("'module.surprise' is unknown to the model.")
    assert text.count(';') == 3


def test_long_lists_are_cut(official):
    tensors, message = official
    text = message({f'net.{name}': tensor for name, tensor in tensors.items()})
    assert len(tensors) == 51
    assert text.endswith('; and 92 more.') and text.count(' is missing') == 10


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_wrapped_models(tmp_path, prefix):
    path, wrapped = tmp_path / 'plain.safetensors', tmp_path / 'wrapped.safetensors'
    variables = random_variables(small())
    convert.save_official(variables, small(), path)
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({prefix + name: tensor for name, tensor in tensors.items()}, wrapped)
    jax.tree.map(np.testing.assert_array_equal, convert.load_official(wrapped, small()), variables)


@pytest.mark.parametrize(
    'changes, found',
    [
        ({'patch_size': 1}, 'blocks.0.pos_embed has shape [4, 64], but the model needs [16, 64]'),
        ({'image_channels': 1}, '0.proj_in.weight has shape [64, 12], but the model needs [64, 4]'),
        ({'width': 128}, '0.proj_in.weight has shape [64, 12], but the model needs [128, 12]'),
        ({'num_classes': 0}, "'blocks.1.class_embed' is unknown to the model"),
        ({'num_classes': 4}, 'class_embed has shape [3, 1, 64], but the model needs [4, 1, 64]'),
        ({'layers_per_block': (1,)}, "'blocks.1.attn_blocks.0.mlp.main.2.weight' is unknown"),
        ({'layers_per_block': (2, 2)}, 'blocks.0.attn_blocks.1.mlp.main.0.bias [256] is missing'),
        ({'volume_preserving': True}, 'proj_out.bias has shape [24], but the model needs [12]'),
        ({'head_dim': 32}, 'it was trained with head_dim 64, not 32'),
    ],
)
def test_other_models(official, changes, found):
    tensors, message = official
    text = message(tensors, **changes)
    assert found in text
    assert all(f'{field}={value}' in text for field, value in changes.items())


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('case, holds', [
    ('itarflow_cond_rgb', 'has an iTARFlow, but the model has noise_conditioned False; set it to True'),
    ('cond_gray', 'has a TarFlow, but the model has noise_conditioned True; set it to False'),
])
def test_checkpoints_of_the_other_kind_of_flow(tmp_path, case, holds, suffix):
    model, path = model_of(case), PARITY / case / 'model.pth'
    if suffix == '.safetensors':
        variables = convert.load_official(path, model)
        path = tmp_path / 'model.safetensors'
        convert.save_official(variables, model, path)
    other = model.clone(noise_conditioned=not model.noise_conditioned)
    text = refusal(convert.load_official, path, other)
    assert text.startswith(f'{path} {holds}, and in a config set train.noise to ')


def test_head_dim_is_recorded(tmp_path):
    path = tmp_path / 'a.safetensors'
    convert.save_official(random_variables(small(head_dim=16)), small(head_dim=16), path)
    found = 'it was trained with head_dim 16, not 64'
    assert found in refusal(convert.load_official, path, small())


@pytest.mark.parametrize(
    'name, change, found',
    [
        ('blocks.0.attn_mask', np.ones_like, 'blocks.0.attn_mask is not the lower-triangular'),
        ('blocks.1.attn_mask', np.transpose, 'blocks.1.attn_mask is not the lower-triangular'),
        ('var', lambda x: 1.5 * x, 'var is not all ones'),
        ('blocks.1.proj_in.bias', lambda x: x / 0, 'blocks.1.proj_in.bias has inf, but all numbers'),
        ('var', lambda x: x * np.nan, 'var has nan, but all numbers must be finite'),
        ('blocks.0.pos_embed', np.float16, "'blocks.0.pos_embed' is F16; save it as float32"),
        ('blocks.0.pos_embed', np.float64, "'blocks.0.pos_embed' is F64; save it as float32"),
        ('var', lambda x: x.astype(jnp.bfloat16), "tensor 'var' is BF16; save it as float32"),
    ],
)
def test_values(official, name, change, found):
    tensors, message = official
    with np.errstate(divide='ignore'):
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
    assert found in message(tensors)


def test_variance_must_be_positive(tmp_path):
    model, path = small(volume_preserving=True), tmp_path / 'a.safetensors'
    variables = random_variables(model)
    convert.save_official(variables, model, path)
    tensors = safetensors.numpy.load_file(path)
    tensors['var'][1, 2] = -0.5
    safetensors.numpy.save_file(tensors, path)
    found = 'var has -0.5, but a variance must be positive'
    assert found in refusal(convert.load_official, path, model)
    variables['prior']['variance'][0, 0] = 0
    found = 'prior/variance has 0.0, but a variance must be positive'
    assert found in refusal(convert.save_official, variables, model, path)


def test_other_dtype_in_a_torch_file(tmp_path):
    # The same bytes, declared as another type of the same width.
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(PARITY / 'cond_gray' / 'model.pth') as source:
        with zipfile.ZipFile(path, 'w') as target:
            for name in source.namelist():
                data = source.read(name).replace(b'ctorch\nFloatStorage', b'ctorch\nIntStorage')
                target.writestr(name, data)
    text = refusal(convert.load_official, path, model_of('cond_gray'))
    assert 'blocks.0.pos_embed is int32 (cast it to float32)' in text and 'and 48 more' in text


def test_files_that_cannot_be_read(tmp_path):
    for suffix in ('.pth', '.safetensors'):
        with pytest.raises(FileNotFoundError, match='none.* does not exist'):
            convert.load_official(tmp_path / f'none{suffix}', small())
    path = tmp_path / 'a.safetensors'
    convert.save_official(random_variables(small()), small(), path)
    whole = path.read_bytes()
    for data in (b'', b'PK\x03\x04', b'\xff' * 100, whole[:1000], whole[:-1]):
        path.write_bytes(data)
        found = 'is damaged or not a safetensors file'
        assert found in refusal(convert.load_official, path, small())
    other = tmp_path / 'a.ckpt'
    other.write_bytes(whole)
    found = "ends with '.ckpt'; pass a .pth or a .safetensors checkpoint"
    assert found in refusal(convert.load_official, other, small())
    (tmp_path / 'folder.pth').mkdir()
    assert 'is not a file' in refusal(convert.load_official, tmp_path / 'folder.pth', small())


def test_import_is_light():
    heavy = ('torch', 'tensorflow', 'orbax', 'grain', 'tensorflow_datasets')
    code = f'import sys, tarflow_jax.convert; print([m for m in {heavy} if m in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == '[]'
