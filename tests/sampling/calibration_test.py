import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import CONDITIONED, condition_for, perturbed, sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.sampling import calibration
from tarflow_jax.sampling.schedule import BlockSchedule
from tarflow_jax.sampling.schedule import run_block as real_run_block

MODEL = tiny(layers_per_block=(1, 1), image_size=12)  # 36 patches
LABELS = np.arange(4, dtype=np.int32) % 3


def slow(monkeypatch, seconds_of):
    """Has every inversion take as long as `seconds_of` (index, segments) says, by a clock of its own."""
    now = [0.0]

    def run_block(model, variables, index, how, *args, **kwargs):
        now[0] += seconds_of(index, how.segments)
        return real_run_block(model, variables, index, how, *args, **kwargs)

    monkeypatch.setattr(calibration, 'run_block', run_block)
    monkeypatch.setattr(calibration, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))


def test_it_takes_what_is_fastest_and_keeps_the_tolerance(monkeypatch):
    # Block 1 is fastest in two segments, block 0 sequentially.
    seconds = {1: {0: 0.6, 1: 0.4, 2: 0.0, 4: 0.4}, 0: {0: 0.0, 1: 0.4, 2: 0.4, 4: 0.4}}
    slow(monkeypatch, lambda index, segments: seconds[index][segments])
    schedule = tfj.calibrate(MODEL, perturbed(MODEL), LABELS, tolerance=1e-3)
    assert [block.segments for block in schedule.blocks] == [0, 2]
    block = schedule.blocks[1]
    assert 0 < block.calls < 35
    assert block.max_iterations == min(2 * block.calls + 4, 36)
    assert block.seconds < 0.3 < block.sequential_seconds
    assert schedule.blocks[0].calls == 35
    assert schedule.error <= 2.5e-4
    assert schedule.batch_size == 4
    monkeypatch.undo()
    noise = jax.random.normal(jax.random.key(5), (4, 36, 8))  # not that of the calibration
    wanted = tfj.sample(MODEL, perturbed(MODEL), noise, LABELS)
    found, info = tfj.sample(
        MODEL, perturbed(MODEL), noise, LABELS, method='auto', schedule=schedule, return_info=True
    )
    assert np.abs(found - wanted).max() < 1e-3
    np.testing.assert_array_equal(info.iterations[0], 35)
    assert np.asarray(info.iterations[1]).max() <= block.max_iterations


def with_last_block(variables, kernel: float, log_scale: float):
    """`variables` whose block 0, the last in sampling, has another log-scale, and a kernel multiplied by `kernel`."""
    params = {**variables['params']}
    out = params['block_0']['proj_out']
    bias = out['bias'].at[: out['bias'].size // 2].set(log_scale)
    params['block_0'] = {**params['block_0'], 'proj_out': {'kernel': kernel * out['kernel'], 'bias': bias}}
    return {**variables, 'params': params}


def test_it_lowers_the_tolerance_of_blocks_whose_errors_grow(monkeypatch):
    slow(monkeypatch, lambda index, segments: 0.2 if index == 0 or segments != 1 else 0.0)
    variables = with_last_block(perturbed(MODEL), kernel=0.0, log_scale=3.0)
    schedule = tfj.calibrate(MODEL, variables, LABELS, tolerance=1e-1)
    assert [block.segments for block in schedule.blocks] == [0, 1]
    # An error of block 1 is 20 times as large in the images.
    assert schedule.blocks[1].tolerance < 1e-2
    assert 0 < schedule.error <= 2.5e-2


def test_bfloat16_is_judged_by_its_own_rounding(monkeypatch, caplog):
    slow(monkeypatch, lambda index, segments: 0.0 if segments == (index == 1) else 0.2)
    model = MODEL.clone(dtype=jnp.bfloat16)
    schedule = tfj.calibrate(model, perturbed(MODEL, 1), LABELS, tolerance=1e-2)
    assert [block.segments for block in schedule.blocks] == [0, 1]
    # More than a quarter of the tolerance, and yet no more than the dtype costs.
    assert 2.5e-3 < schedule.error < 0.1
    assert schedule.blocks[1].tolerance == 1e-2
    assert schedule.blocks[1].calls < 20
    assert not caplog.text
    tfj.calibrate(model, perturbed(MODEL, 1), LABELS, tolerance=1e-4)
    assert 'tolerance 0.0001 is below the rounding error of bfloat16' in caplog.text
    assert 'choose 0.01' in caplog.text


def test_a_flow_whose_samples_overflow_stays_sequential(caplog):
    variables = with_last_block(perturbed(MODEL), kernel=1.0, log_scale=6.0)
    schedule = tfj.calibrate(MODEL, variables, LABELS)
    assert [block.method for block in schedule.blocks] == ['sequential'] * 2
    assert schedule.error is None
    assert 'no sample of the calibration is finite' in caplog.text


def test_auto_without_a_schedule_calibrates_once(monkeypatch):
    calls = []

    def calibrate(model, variables, condition, **kwargs):
        calls.append(kwargs)
        return tfj.Schedule((BlockSchedule(1), BlockSchedule(0)))

    monkeypatch.setattr(calibration, 'calibrate', calibrate)
    model = tiny(layers_per_block=(1, 1))
    variables = jax.tree.map(jnp.copy, perturbed(model))
    noise = jax.random.normal(jax.random.key(5), (3, 16, 8))
    draw = lambda **k: tfj.sample(model, variables, noise, LABELS[:3], method='auto', **k)  # noqa: E731
    np.testing.assert_array_equal(draw(), draw())
    assert len(calls) == 1
    draw(guidance=tfj.Guidance(1.0))
    assert len(calls) == 2
    assert calls[1] == {
        'batch_size': 3, 'guidance': tfj.Guidance(1.0), 'tolerance': 1e-4,
    }
    variables = jax.tree.map(jnp.copy, variables)
    draw()
    assert len(calls) == 3


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'tolerance': 0.0}, 'tolerance 0.0 must be above 0'),
        ({'labels': np.array([7])}, 'label 7 is outside 0..2'),
        ({'guidance': tfj.Guidance(1.0)}, 'labels, features or a temperature'),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        tfj.calibrate(MODEL, perturbed(MODEL), **arguments)


def test_conditions_of_any_kind():
    model = sequence_flow(first_token='start', **CONDITIONED)
    guidance = tfj.Guidance(4.0, rule='linear_sigma', blocks=1)
    variables, condition = perturbed(model), condition_for(model)
    schedule = tfj.calibrate(model, variables, condition, guidance=guidance)
    assert schedule.batch_size == 3  # that of the condition
    assert schedule.made_for['guidance']['blocks'] == 1
    assert schedule.error <= 2.5e-5 and all(block.calls <= 4 for block in schedule.blocks)
    schedule.check(model, guidance)
