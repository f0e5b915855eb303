"""Compiling for TPU slices that are not there: what fits, what it costs, what would fit."""

import json
import subprocess
import sys

import jax
import pytest
from command_line import ROOT, call

from tarflow_jax import config as configs
from tarflow_jax.ahead_of_time import report, topology

pytest.importorskip('libtpu')


def tiny_config(**fields):
    c = configs.default()
    c.model.update(image_size=16, image_channels=3, patch_size=1, width=128, num_classes=10)
    c.model.update(layers_per_block=(2, 2), dtype='bfloat16', remat='layer')
    c.train.batch_size = c.sample.batch_size = c.evaluate.batch_size = 32
    c.guidance.weight = 1.0
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(scope='module')
def slice_of_16():
    return topology.describe('v5e:4x4')


@pytest.fixture(scope='module')
def data_parallel(slice_of_16, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hlo')
    return report.compile_for(tiny_config(), slice_of_16, 'train', folder), folder


def test_train_step_on_16_chips(data_parallel, slice_of_16):
    row, folder = data_parallel
    assert row['chips'] == 16 and row['fits'] and row['mesh'] == {'data': 16, 'fsdp': 1, 'tensor': 1}
    assert row['attention'] == 'whole_head' and row['uncounted_kernels'] == []
    state = report.planned(tiny_config(), slice_of_16, 'train')[2].resident
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert row['parameters'] == parameters and row['parameter_bytes'] == 4 * parameters
    # The state, and 2 images of 16 x 16 x 3 bytes with labels and a key.
    assert 0 <= row['hbm_bytes']['arguments'] - 4 * numbers < 2**20
    assert row['hbm_total_bytes'] == sum(row['hbm_bytes'].values()) < row['hbm_capacity_bytes']
    # Each block's gradients are summed once; activations never leave their chip.
    assert set(row['collectives']) == {'all-reduce'}
    assert parameters * 1.9 < row['collective_bytes'] < parameters * 4.1
    assert sorted(row['largest_array_moved']['shape']) == [128, 512]  # the gradient of a kernel
    assert row['flops'] > row['model_flops'] > 0
    for name in ('compute_seconds', 'memory_seconds', 'exposed_interconnect_seconds'):
        assert 0 < row[name] < row['predicted_step_seconds']
    assert row['predicted_mfu'] == pytest.approx(
        row['model_flops'] / row['predicted_step_seconds'] / 197e12
    )
    [file] = folder.iterdir()
    assert file.name == 'v5e_4x4_train_step.hlo.txt' and 'ENTRY' in file.read_text()
    text = '\n'.join(report.lines(row))
    assert 'fits' in text and 'all-reduce' in text and f'{row["parameters"]:,}' in text


def test_fsdp_splits_the_state(data_parallel, slice_of_16):
    row = report.compile_for(tiny_config(**{'mesh.fsdp': 16}), slice_of_16, 'train')
    whole, _ = data_parallel
    assert row['parameter_bytes'] == pytest.approx(whole['parameter_bytes'] / 16, rel=0.05)
    assert row['hbm_bytes']['arguments'] < whole['hbm_bytes']['arguments'] / 10
    assert 'all-gather' in row['collectives']
    # No gather was turned into a loop of small products.
    assert 'collective-permute' not in row['collectives']
    assert row['model_flops'] == whole['model_flops']


@pytest.mark.slow
def test_attention_without_the_kernel_moves_more(slice_of_16):
    # 1024 positions and 8 images of a chip: 64 MiB of logits, too many to stay on it.
    large = {'model.image_size': 32, 'train.batch_size': 128}
    rows = {
        kernel: report.compile_for(
            tiny_config(**large, **{'model.attention': kernel}), slice_of_16, 'train'
        )
        for kernel in ('xla', 'whole_head')
    }
    traffic = {k: r['attention_traffic_share'] * r['hbm_traffic_bytes'] for k, r in rows.items()}
    assert traffic['xla'] > 3 * traffic['whole_head'] > 0


def test_sampler(slice_of_16):
    row = report.compile_for(tiny_config(), slice_of_16, 'sample')
    # Keys and values of 2 layers, both branches, 32 images, 256 positions, bfloat16, on 16 chips.
    assert row['cache_bytes'] == 2 * 2 * 2 * 32 * 256 * 128 * 2 / 16
    assert row['fits'] and row['collectives'] == {}
    assert row['predicted_step_seconds'] > 0


@pytest.mark.parametrize('program', [
    'sample', pytest.param('train', marks=pytest.mark.slow),
    pytest.param('evaluate', marks=pytest.mark.slow),
])
def test_flow_with_every_condition(slice_of_16, program):
    small = {'model.image_size': (8, 4), 'model.num_features': 3, 'model.noise_conditioned': True,
             'train.noise': 'levels', 'guidance.blocks': 1, 'model.head_dim': 128,
             'model.layers_per_block': (1, 1)}
    c = tiny_config(**small)
    row = report.compile_for(c, slice_of_16, program)
    assert row['fits'] and row['flops'] > row['model_flops'] > 0
    _, _, step = report.planned(c, slice_of_16, program)
    if program == 'sample':
        # One block is guided and one is not: two programs, each of which runs once.
        assert [p.times for p in step.programs] == [1, 1, 1]
        assert [p.name for p in step.programs][-1] == 'denoise'
        # Of the guided block: keys and values of both branches.
        assert row['cache_bytes'] == 2 * 2 * 32 * 32 * 128 * 2 / 16


@pytest.mark.slow
def test_likelihood_in_float32(slice_of_16):
    row = report.compile_for(tiny_config(**{'model.dtype': 'float32'}), slice_of_16, 'evaluate')
    assert row['attention'] == 'xla'
    # Six passes of the matrix unit for every float32 product.
    assert row['compute_seconds'] > 5 * row['flops'] / 197e12
    assert row['fits'] and set(row['collectives']) <= {'all-gather', 'all-reduce'}


@pytest.mark.slow
def test_what_does_not_fit_is_helped():
    one = topology.describe('v5e:2x2')
    c = tiny_config(**{'model.width': 8192, 'model.head_dim': 128, 'train.batch_size': 4})
    row = report.compile_for(c, one, 'train')
    assert not row['fits'] and row['does_not_fit'] == 'train_step'
    assert row['hbm_total_bytes'] > row['hbm_usable_bytes'] == 15.75 * 2**30
    assert 'DOES NOT FIT' in '\n'.join(report.lines(row)) and report.table([row])
    better = report.smallest_change(c, one, 'train')
    assert better is None or better['fits']


def test_changes_are_tried_from_small_to_large(slice_of_16, monkeypatch):
    tried = []

    def compile_for(config, where, program):
        tried.append((config.model.remat, config.mesh.fsdp, config.train.batch_size))
        return {'fits': config.train.batch_size == 16}

    monkeypatch.setattr(report, 'compile_for', compile_for)
    row = report.smallest_change(tiny_config(**{'model.remat': 'none'}), slice_of_16, 'train')
    assert tried == [('layer', 1, 32), ('layer', 4, 32), ('layer', 16, 32), ('layer', 16, 16)]
    assert row['change'] == ('--config.model.remat=layer --config.mesh.data=-1 '
                             '--config.mesh.fsdp=16 --config.train.batch_size=16')


def test_a_step_of_several_slices_names_their_network(data_parallel):
    row = data_parallel[0] | {'topology': '2*v5e:4x4', 'slices': 2, 'dcn_seconds': 0.5}
    text = '\n'.join(report.lines(row | {'exposed_dcn_seconds': 0.25}))
    assert 'datacenter   0.5000 s between slices at 25 Gbit/s per chip, of which 0.2500 s exposed' in text


def test_the_measured_step_of_published_runs_is_beside_the_predicted_one(data_parallel):
    row = data_parallel[0] | {
        'predicted_step_seconds': 2.0, 'measured_over_predicted': (1.25, 1.5), 'measured_on': ('v5e',)
    }
    wanted = (
        '  measured     2.5000 to 3.0000 s, if the prediction is as accurate as for published '
        'steps on v5e: 1.25 to 1.50 times'
    )
    assert wanted in report.lines(row)
    assert report.table([row])[1].split()[-3] == '2.500-3.000'


@pytest.mark.parametrize('name, chips, slices, devices', [
    ('v5e:4x4', 16, 1, 16), ('v4:2x2x4', 16, 1, 16), ('v5p:2x2x2', 8, 1, 8), ('2*v5e:4x4', 32, 2, 32),
    ('tpu7x:2x2x2', 8, 1, 16),
])
def test_topologies(name, chips, slices, devices):
    found = topology.describe(name)
    assert (found.chips, found.slices, len(found.devices)) == (chips, slices, devices)
    assert len({getattr(d, 'slice_index', 0) for d in found.devices}) == slices


@pytest.mark.parametrize('name, says', [
    ('v9:4x4', "'v9:4x4' must be one of v4, v5e, v5p, v6e, tpu7x with a shape"),
    ('v5e', 'such as v5e:16x16'),
    ('v5e:4x4x4', 'slices of v5e have 2 axes'),
    ('v4:16x16', 'slices of v4 have 3 axes'),
])
def test_no_topology(name, says):
    with pytest.raises(ValueError, match=says):
        topology.check(name)
    assert call('--mode=compile', f'--config={ROOT}/configs/imagenet64.py', f'--topology={name}') == 2


def test_unknown_to_the_compiler():
    with pytest.raises(ValueError, match="'v5e:3x5' is unknown to the TPU compiler"):
        topology.describe('v5e:3x5')


FLAGS = [
    f'--config={ROOT}/configs/imagenet64.py:cond', '--config.model.image_size=16',
    '--config.model.width=128', '--config.model.layers_per_block=(1,1)',
]


@pytest.mark.slow
def test_command_line(tmp_path):
    # In a process of its own, as on a laptop: no environment variable prepares it.
    file = tmp_path / 'found.json'
    ran = subprocess.run(
        [sys.executable, '-m', 'tarflow_jax.main', '--mode=compile', *FLAGS,
         '--topology=v5e:2x4,v5e:4x4', '--batch_per_chip=2', f'--json={file}'],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(file.read_text())
    assert [(row['chips'], row['batch_size']) for row in rows] == [(8, 16), (16, 32)]
    for row in rows:
        assert {'fits', 'hbm_total_bytes', 'hbm_capacity_bytes', 'predicted_step_seconds',
                'predicted_mfu'} <= row.keys()
    lines = ran.stdout.splitlines()
    assert lines[-3].split()[:2] == ['topology', 'chips'] and lines[-1].split()[:3] == [
        'v5e:4x4', '16', '32'
    ]


def test_ctrl_c_keeps_what_is_known(tmp_path, monkeypatch, capfd):
    def compile_for(config, topology, *_):
        if topology.chips == 16:
            raise KeyboardInterrupt
        return {'topology': topology.name, 'fits': True}

    monkeypatch.setattr(report, 'compile_for', compile_for)
    monkeypatch.setattr(report, 'lines', lambda row: [row['topology']])
    file = tmp_path / 'found.json'
    assert call(
        '--mode=compile', *FLAGS, '--topology=v5e:2x4,v5e:4x4', '--batch_per_chip=2',
        f'--json={file}',
    ) == 130
    printed = capfd.readouterr()
    assert printed.out == 'v5e:2x4\n'
    assert json.loads(file.read_text()) == [{'topology': 'v5e:2x4', 'fits': True}]
    first, *_, last = printed.err.splitlines()
    assert first.endswith(' compile') and f'output      {file}' in printed.err
    assert last.endswith('finished topologies are printed above; run the same command again')


@pytest.mark.parametrize('more, says', [
    ([], '--mode=compile needs --topology'),
    (['--topology=v5e:4x4', '--workdir=x'], 'x has no meaning with --mode=compile'),
    (['--topology=v5e:4x4', '--json=/no/such/folder/x.json'], 'its folder does not exist'),
    (['--topology=v5e:4x4', '--batch_per_chip=0'], '--batch_per_chip'),
    (['--topology=v5e:4x4', '--config.train.batch_size=24'], 'is not divisible by 16'),
    (['--topology=v5e:4x4', '--config.model.layers_per_block=(1000000000,)'],
     'for --program=train, but all chips of v5e:4x4 together have 256 GiB; choose a smaller flow'),
    (['--topology=v5e:4x4', '--config.mesh.tensor=4'], 'axis of 2 is not divisible by tensor 4 of the mesh'),
])
def test_bad_input(more, says, capfd):
    assert call('--mode=compile', *FLAGS, *more) == 2
    assert says in capfd.readouterr().err
