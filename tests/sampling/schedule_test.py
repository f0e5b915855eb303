import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_flow import noise_for, perturbed, sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.sampling.schedule import (
    BlockSchedule,
    Schedule,
    guidance_params,
    made_for,
    run_block,
    uniform,
)

GUIDANCE = tfj.Guidance(1.5)


def schedule() -> Schedule:
    return Schedule(
        blocks=(
            BlockSchedule(0, calls=15, seconds=0.25, sequential_seconds=0.25),
            BlockSchedule(4, 2e-5, 20, calls=7, seconds=0.125, sequential_seconds=0.25),
        ),
        tolerance=1e-4,
        made_for=made_for(tiny(), GUIDANCE),
        batch_size=8,
        error=3e-5,
    )


def test_file(tmp_path):
    path = tmp_path / 'folder' / 'schedule.json'
    schedule().save(path)
    assert Schedule.load(path) == schedule()
    assert [p.name for p in path.parent.iterdir()] == ['schedule.json']
    assert json.loads(path.read_text())['blocks'][1]['segments'] == 4


@pytest.mark.parametrize(
    'text', ['', '[]', '{}', '{"format": 2}', '{"format": 1, "blocks": [{"wings": 2}]}',
             '{"format": 1, "blocks": [{"segments": -1}]}'],
)
def test_damaged_file(tmp_path, text):
    path = tmp_path / 'schedule.json'
    path.write_text(text)
    with pytest.raises(ValueError, match='schedule.json is not a schedule.*calibrate again'):
        Schedule.load(path)


def test_what_it_was_made_for():
    schedule().check(tiny(), GUIDANCE)
    uniform(tiny(), 1).check(tiny(), None)
    with pytest.raises(ValueError, match='made for guidance.*1.5.*calibrate again'):
        schedule().check(tiny(), tfj.Guidance(2.0))
    with pytest.raises(ValueError, match='made for model.*width.: 32.*width.: 64'):
        schedule().check(tiny(width=64), GUIDANCE)
    with pytest.raises(ValueError, match='is for 2 blocks, the flow has 3'):
        schedule().check(tiny(layers_per_block=(1, 1, 1)), GUIDANCE)
    elsewhere = dataclasses.replace(
        schedule(), made_for=schedule().made_for | {'device': '4 x TPU v4'}
    )
    with pytest.raises(ValueError, match=f'made for device 4 x TPU v4, this is {jax.device_count()} x cpu'):
        elsewhere.check(tiny(), GUIDANCE)


def test_table():
    lines = schedule().table()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ['1', 'gs_jacobi', '4'], ['0', 'sequential', '15'], ['all', '22', '0.3750'],
    ]
    assert '3.0e-05 (tolerance 1e-04), of 8 images' in lines[-1]


@pytest.mark.parametrize(
    'fields, words', [({'segments': -1}, 'segments -1'), ({'tolerance': -1.0}, 'tolerance -1')]
)
def test_fields_that_make_no_sense(fields, words):
    with pytest.raises(ValueError, match=words):
        BlockSchedule(**fields)


def test_blocks_are_inverted_as_scheduled():
    model = sequence_flow()
    variables, z = perturbed(model, amount=0.15), noise_for(model)
    params = variables['params']['block_1']
    wanted, logdet = model.block(1).inverse(params, z, None, np.bool_(True))
    for how, iterations in ((BlockSchedule(), 3), (BlockSchedule(1, 0.0), None)):
        found = run_block(model, variables, 1, how, z, None, None)
        np.testing.assert_allclose(found.x, wanted, atol=1e-5)
        np.testing.assert_allclose(found.logdet, logdet, atol=1e-5)
        assert found.converged.all() and 1 < found.calls <= 3
        assert iterations is None or (found.iterations == iterations).all()
    short = BlockSchedule(1, 0.0, max_iterations=1)
    found = run_block(model, variables, 1, short, z, None, None)
    assert found.calls == 1 and not found.converged.any()
    assert run_block(model, variables, 1, short, z, None, None, limited=False).converged.all()


def test_guidance_counts_blocks_from_the_noise():
    model, guidance = tiny((1, 1, 1)), tfj.Guidance(1.0, blocks=2)
    assert [guidance_params(model, b, guidance).branches for b in range(3)] == [1, 2, 2]
    assert guidance_params(model, 0, None) == GuidanceParams()
