"""Checkpoints: bits go in and come out, whatever happens meanwhile."""

import functools
import json
import os
import shutil
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import compilations
from tiny_flow import tiny

from tarflow_jax import paths
from tarflow_jax.training import checkpoint, sharding
from tarflow_jax.training.checkpoint import CheckpointError, Checkpoints
from tarflow_jax.training.optimizer import adamw
from tarflow_jax.training.state import TrainState, abstract_state

ADAMW = adamw(lambda k: 1e-3, clip_norm=1.0)
MODEL = tiny((1,))


def everywhere():
    return sharding.replicated(sharding.make_mesh())


def at(place, tree):
    """The abstract tree with every leaf placed there."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def copied(tree):
    return at(everywhere(), tree)


def state_at(step, model=MODEL, ema=True):
    """A state whose numbers differ from those of every other step, and from each other."""
    rng = np.random.default_rng(step)
    random = lambda leaf: (9 * rng.random(leaf.shape)).astype(leaf.dtype)  # noqa: E731
    state = jax.tree.map(random, abstract_state(model, ADAMW, ema=ema))
    return jax.device_put(state._replace(step=np.int32(step)), everywhere())


def abstract(model=MODEL, ema=True):
    return copied(abstract_state(model, ADAMW, ema=ema))


def save(workdir, *steps, model=MODEL, ema=True):
    with Checkpoints(workdir, model, {'seed': 1}, {'class_names': ['cat']}) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step, model, ema))
        checkpoints.wait()


def save_validated(workdir, losses, of='these images'):
    """Saves the states of steps, with their validation losses; None was not validated."""
    with Checkpoints(workdir, MODEL, {'seed': 1}) as checkpoints:
        for step, loss in losses.items():
            found = None if loss is None else {'loss': loss, 'of': {'set': of}}
            checkpoints.save(state_at(step), found)
        checkpoints.wait()
        return checkpoints.best()


def assert_identical(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def folders(workdir):
    return sorted(path.name for path in (paths.of(workdir) / 'checkpoints').iterdir())


def one_sentence(error):
    message = str(error.value)
    assert '\n' not in message and message.endswith('.')
    return message


def test_bucket(bucket):
    with Checkpoints(bucket, MODEL) as checkpoints:
        with pytest.raises(FileNotFoundError, match=f'{bucket}/checkpoints holds no checkpoint'):
            checkpoints.restore(abstract())
    save(bucket, 3, 5, 8)
    half = paths.of(bucket) / 'checkpoints' / '9' / 'weights' / 'd'  # as of a killed process
    half.write_text('')
    with Checkpoints(bucket, MODEL) as checkpoints:
        assert checkpoints.latest() == 8 and checkpoints.about()['config'] == {'seed': 1}
        for step in (5, 8):
            assert_identical(checkpoints.restore(abstract(), step), state_at(step))
    assert half.exists()  # which was for reading only
    save(bucket, 9)
    assert folders(bucket) == ['8', '9']
    with Checkpoints(bucket, MODEL) as checkpoints:
        assert_identical(checkpoints.restore(abstract()), state_at(9))


@pytest.mark.parametrize('ema, volume_preserving', [(True, False), (False, True)])
def test_the_same_bits_come_back(tmp_path, ema, volume_preserving):
    model = tiny((1,), volume_preserving=volume_preserving)
    save(tmp_path, 3, model=model, ema=ema)
    with Checkpoints(tmp_path, model) as checkpoints:
        assert checkpoints.latest() == 3
        found = checkpoints.restore(abstract(model, ema))
    assert_identical(found, state_at(3, model, ema))
    assert (found.ema_params is None) == (not ema)
    assert (found.prior is None) == (not volume_preserving)


@pytest.mark.parametrize('devices', [1, 8])
def test_save_keeps_the_state_of_that_moment(tmp_path, devices):
    # Training gives its buffers to the next step at once, and a view of them would change under
    # the writer; 16 MiB of noise take it longer than the steps.
    place = everywhere() if devices == 8 else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = np.random.default_rng(0).random((64, 2**16), np.float32)
    params = {f'w{i}': jax.device_put(row, place) for i, row in enumerate(wanted)}
    state = TrainState(jax.device_put(jnp.int32(1), place), params, None, None, None, None)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    overwrite(jax.tree.map(jnp.copy, state))  # compiles it
    with Checkpoints(tmp_path, MODEL, {}) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        assert folders(tmp_path) == ['1.orbax-checkpoint-tmp']
        checkpoints.wait()
        found = checkpoints.restore_variables(functools.partial(at, place))['params']
    np.testing.assert_allclose(state.params['w0'], wanted[0] + 3, rtol=1e-6)
    for i, row in enumerate(wanted):
        assert np.asarray(found[f'w{i}']).tobytes() == row.tobytes()


def test_saving_compiles_nothing_for_small_arrays(tmp_path):
    state = state_at(1)
    jax.clear_caches()
    before = len(compilations)
    with Checkpoints(tmp_path, MODEL, {}) as checkpoints:
        checkpoints.save(state)
    assert len(state.params['block_0']['proj_in']['kernel'].sharding.device_set) == 8
    assert len(compilations) == before


def test_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 5, 7)
    assert checkpoint.KEPT == 2 and folders(tmp_path) == ['5', '7']
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        assert int(checkpoints.restore(abstract()).step) == 7
        assert_identical(checkpoints.restore(abstract(), step=5), state_at(5))


def test_best_is_kept(tmp_path):
    assert save_validated(tmp_path, {1: 3.0, 2: -1.0, 3: 2.0, 4: 2.5}) == 2
    assert folders(tmp_path) == ['2', '3', '4']
    # Another process goes on.
    assert save_validated(tmp_path, {5: None, 6: 1.5, 7: None}) == 2
    assert folders(tmp_path) == ['2', '6', '7']
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        assert checkpoints.best() == 2 and checkpoints.latest() == 7
        assert checkpoints.named('best') == 2 and checkpoints.named(6) == 6
        assert checkpoints.named(None) is None
        assert checkpoints.about(2)['validation'] == {'loss': -1.0, 'of': {'set': 'these images'}}
        assert 'validation' not in checkpoints.about(7)
        assert_identical(checkpoints.restore(abstract(), step=2), state_at(2))
        with pytest.raises(FileNotFoundError) as error:
            checkpoints.named(5)
        assert one_sentence(error).endswith('no checkpoint at step 5; there are 2, 6, 7.')
    assert save_validated(tmp_path, {8: -2.0}) == 8
    assert folders(tmp_path) == ['7', '8']


def test_losses_of_other_images_are_not_compared(tmp_path):
    assert save_validated(tmp_path, {1: 0.0, 2: 1.0}) == 1
    assert save_validated(tmp_path, {3: 9.0, 4: 10.0}, of='others') == 3
    assert folders(tmp_path) == ['3', '4']


def test_without_validation_there_is_no_best(tmp_path):
    save(tmp_path, 2, 3)
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        assert checkpoints.best() is None
        with pytest.raises(FileNotFoundError, match='choose one of the steps 2, 3, or train with'):
            checkpoints.named('best')
    with Checkpoints(tmp_path / 'none', MODEL) as checkpoints:
        assert checkpoints.named('best') is None


def test_averaged_parameters_are_what_is_sampled_from(tmp_path):
    save(tmp_path / 'ema', 1)
    save(tmp_path / 'plain', 1, ema=False)
    for name, wanted in (
        ('ema', state_at(1).ema_params), ('plain', state_at(1, ema=False).params)
    ):
        with Checkpoints(tmp_path / name, MODEL) as checkpoints:
            found = checkpoints.restore_variables(copied)
        assert set(found) == {'params'}
        assert_identical(found['params'], wanted)


def test_prior_belongs_to_the_variables(tmp_path):
    model = tiny((1,), volume_preserving=True)
    save(tmp_path, 1, model=model)
    with Checkpoints(tmp_path, model) as checkpoints:
        assert_identical(
            checkpoints.restore_variables(copied), state_at(1, model).variables()
        )


def test_config_and_model_are_saved_beside_the_state(tmp_path):
    save(tmp_path, 4)
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        about = checkpoints.about()
    assert about['config'] == {'seed': 1} and about['data'] == {'class_names': ['cat']}
    assert about['model'] == {
        'image_size': 8, 'image_channels': 2, 'patch_size': 2, 'width': 32, 'head_dim': 16,
        'layers_per_block': [1], 'num_classes': 3, 'volume_preserving': False,
        'num_features': 0, 'noise_conditioned': False, 'orders': 'alternate', 'scale': 'exp',
        'scale_limit': None, 'first_token': 'identity',
    }


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / 'run', MODEL) as checkpoints:
        assert checkpoints.latest() is None
        for read in (
            checkpoints.about,
            lambda: checkpoints.restore(abstract()),
            lambda: checkpoints.restore_variables(copied),
        ):
            with pytest.raises(FileNotFoundError) as error:
                read()
            assert one_sentence(error).startswith(f'{tmp_path}/run/checkpoints holds no checkpoint')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('field, value', [
    ('width', 64), ('layers_per_block', (2,)), ('num_classes', 4), ('volume_preserving', True),
    ('head_dim', 32), ('patch_size', 4), ('patch_size', (4, 2)), ('num_features', 2),
    ('noise_conditioned', True), ('scale', 'softplus'), ('scale_limit', 3.0),
    ('first_token', 'start'), ('orders', (tuple(range(15, -1, -1)),)),
])
def test_another_model_is_refused(tmp_path, field, value):
    save(tmp_path, 2)
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path, MODEL.clone(**{field: value}))
    message = one_sentence(error)
    here, there = (json.loads(json.dumps(x)) for x in (value, getattr(MODEL, field)))
    assert f'model.{field} is {there} there and {here} in this config' in message
    assert 'choose another --workdir' in message
    assert folders(tmp_path) == ['2']


def test_flow_of_every_field_comes_back(tmp_path):
    model = tiny(
        (1, 1), image_size=(4, 8), patch_size=(2, 4), num_features=2, noise_conditioned=True,
        orders=((1, 0, 3, 2), (3, 0, 1, 2)), scale='softplus', scale_limit=3.0, first_token='start',
    )
    save(tmp_path, 3, model=model)
    with Checkpoints(tmp_path, model) as checkpoints:
        assert_identical(checkpoints.restore(abstract(model)), state_at(3, model))


def test_fields_of_the_computation_may_change(tmp_path):
    save(tmp_path, 2)
    other = MODEL.clone(dtype=jnp.bfloat16, remat='layer', unroll=2)
    with Checkpoints(tmp_path, other) as checkpoints:
        assert_identical(checkpoints.restore(abstract(other)), state_at(2))


def test_unfinished_folder_is_ignored_and_cleaned(tmp_path):
    save(tmp_path, 2)
    unfinished = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp'
    shutil.copytree(tmp_path / 'checkpoints' / '2', unfinished)
    # Someone who only reads leaves it alone: a run may be writing it at this moment.
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        assert checkpoints.latest() == 2
        time.sleep(0.5)  # Orbax cleans in the background
        assert unfinished.exists()
    with Checkpoints(tmp_path, MODEL, {}) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(state_at(3))
        checkpoints.wait()
        assert_identical(checkpoints.restore(abstract()), state_at(3))
    assert folders(tmp_path) == ['2', '3']


def test_one_writer_and_any_reader(tmp_path):
    save(tmp_path, 2)
    unfinished = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp'
    with Checkpoints(tmp_path, MODEL, {}) as writer:
        writer._manager._maybe_await_cleanup_tmp_directory()  # runs on, beside what follows
        shutil.copytree(tmp_path / 'checkpoints' / '2', unfinished)
        with pytest.raises(OSError, match=f'process {os.getpid()} on .* is writing to {tmp_path}'):
            Checkpoints(tmp_path, MODEL, {})
        with Checkpoints(tmp_path, MODEL) as reader:
            assert_identical(reader.restore(abstract()), state_at(2))
        assert unfinished.exists()
        writer.save(state_at(3))
    assert 'lock' not in [path.name for path in tmp_path.iterdir()]
    save(tmp_path, 4)
    assert folders(tmp_path) == ['3', '4']


def test_no_room(tmp_path, monkeypatch):
    save(tmp_path, 2)
    with Checkpoints(tmp_path, MODEL, {}) as checkpoints:
        usage = SimpleNamespace(free=50_000)
        monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda folder: usage)
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(state_at(3))
        message = one_sentence(error)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(3))) / 2**20
        assert size > 0.05
        assert f'step 3 needs {size:.1f} MiB and 0.0 MiB are free' in message
        assert 'the one at step 2 is intact' in message
        usage.free = 2**40
        assert_identical(checkpoints.restore(abstract()), state_at(2))
        checkpoints.save(state_at(3))
    assert folders(tmp_path) == ['2', '3']


@pytest.mark.parametrize('method', ['save', 'wait_until_finished', 'close'])
def test_whatever_orbax_raises_becomes_one_sentence(tmp_path, monkeypatch, method):
    def fail(*_, **__):
        raise RuntimeError(f'{"x" * 300}: No space left on device\nand a second line')

    save(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, MODEL, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, method, fail)
        with pytest.raises(CheckpointError) as error, checkpoints:
            checkpoints.save(state_at(3))
            checkpoints.wait()
        message = one_sentence(error)
        assert 'No space left on device; the one at step' in message and len(message) < 500
    checkpoints._manager.close()
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        assert_identical(checkpoints.restore(abstract(), step=2), state_at(2))


def test_first_checkpoint_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=0))
    with Checkpoints(tmp_path, MODEL, {}) as checkpoints:
        with pytest.raises(CheckpointError, match='there is no earlier one'):
            checkpoints.save(state_at(1))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(checkpoint, 'AGAIN_AFTER', 0)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # Orbax's threads
@pytest.mark.parametrize('item', ['weights', 'progress'])
def test_a_flipped_bit_is_noticed_and_the_one_before_taken(item, tmp_path, at_once, caplog):
    save(tmp_path, 2, 3)
    newest = tmp_path / 'checkpoints' / '3'
    flip(largest(newest / item), 5000)  # within the numbers, which nothing else protects
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        found = checkpoints.restore_variables(copied)
        step = 2 if item == 'weights' else 3  # progress is not what is sampled from
        assert checkpoints.latest() == step
        assert_identical(found['params'], state_at(step).ema_params)
        with pytest.raises(checkpoint.Unreadable, match='3 is damaged or cannot .*; restore it from'):
            checkpoints.restore(abstract(), step=3)
    assert folders(tmp_path) == ['2', '3']  # whoever only reads leaves it there
    caplog.clear()
    with Checkpoints(tmp_path, MODEL, {}) as checkpoints:
        assert checkpoints.latest() == 3
        assert_identical(checkpoints.restore(abstract()), state_at(2))
        assert checkpoints.latest() == 2
        assert folders(tmp_path) == ['2', '3.damaged']
        checkpoints.save(state_at(3))
    assert [m.partition(' (')[0] for m in caplog.messages] == [
        f'the checkpoint {newest} is damaged or cannot be read',
        f'renamed {newest} to {newest}.damaged; delete it when you no longer need it',
    ]
    assert caplog.messages[0].endswith('; using the one at step 2')
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        assert_identical(checkpoints.restore(abstract()), state_at(3))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # Orbax's threads
def test_no_flipped_bit_is_read_as_another_number(tmp_path, at_once):
    save(tmp_path, 2, 3)
    files = [p for p in (tmp_path / 'checkpoints' / '3').rglob('*') if p.is_file()]
    files, rng = sorted(p for p in files if p.stat().st_size), np.random.default_rng(0)
    steps = []
    for k in range(24):
        path = files[k % len(files)]
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with Checkpoints(tmp_path, MODEL) as checkpoints:
            found = checkpoints.restore(abstract())
            steps.append(checkpoints.latest())
            assert_identical(found, state_at(steps[-1]))
            assert checkpoints.about()['config'] == {'seed': 1}
        path.write_bytes(content)
    assert set(steps) == {2, 3}  # of some files nothing is read


DAMAGES = [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"seed":1', '"seed":3'),
    lambda text: text.replace('"model":{', '"modal":{'),
    lambda text: text.replace('"config":{"seed":1}', '"config":' + '[' * 5000),
    lambda text: text.replace('"seed":1', '"seed":1' + '0' * 5000),
    lambda text: text.replace('cat', 'c\udcff'),
    lambda text: '[]',
    lambda text: '',
]


def test_damaged_metadata(tmp_path, at_once):
    save(tmp_path, 2, 3)
    path = tmp_path / 'checkpoints' / '3' / 'about' / 'metadata'
    text = path.read_text().replace(': ', ':').replace(', ', ',')

    def is_passed_over():
        with Checkpoints(tmp_path, MODEL) as checkpoints:
            assert checkpoints.latest() == 2 and checkpoints.about()['config'] == {'seed': 1}

    for damage in DAMAGES:
        assert damage(text) != text
        path.write_bytes(damage(text).encode(errors='surrogateescape'))
        is_passed_over()
    path.unlink()
    path.mkdir()
    is_passed_over()
    shutil.rmtree(tmp_path / 'checkpoints' / '2')
    with pytest.raises(checkpoint.Unreadable) as error:
        Checkpoints(tmp_path, MODEL)
    message = one_sentence(error)
    assert message.startswith(f'the checkpoint {path.parents[1]} is damaged or cannot be read (')
    assert message.endswith(f'or delete {tmp_path / "checkpoints"} to start over.')


def test_read_while_a_run_replaces_it(tmp_path, at_once):
    save(tmp_path, 2, 3)
    with Checkpoints(tmp_path, MODEL) as reader:
        assert reader.latest() == 3
        save(tmp_path, 4, 5)
        assert folders(tmp_path) == ['4', '5']
        assert_identical(reader.restore_variables(copied)['params'], state_at(5).ema_params)
        save(tmp_path, 6)
        assert reader.latest() == 5 and reader.about()['config'] == {'seed': 1}


def test_restore_goes_where_it_is_told(tmp_path):
    save(tmp_path, 2)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    with Checkpoints(tmp_path, MODEL) as checkpoints:
        found = checkpoints.restore(at(one, abstract_state(MODEL, ADAMW, ema=True)))
    assert all(leaf.sharding == one for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(
        found.params['block_0']['proj_in']['bias'], state_at(2).params['block_0']['proj_in']['bias']
    )
