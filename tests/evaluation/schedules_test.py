"""Schedules of a workdir: made once, kept, and made again where they do not fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_flow import tiny
from tiny_plan import plan_of
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.evaluation import bulk, schedules
from tarflow_jax.sampling.schedule import BlockSchedule, made_for
from tarflow_jax.training import sharding

MODEL = tiny((1, 1), image_channels=1)
VARIABLES = random_variables(MODEL)
PLAN = plan_of(MODEL, strength=0.5, weight=0.5)


@pytest.fixture
def calibrated(monkeypatch):
    """Counts calibrations, which find Jacobi for block 0 with a limit that no image keeps."""
    calls = []

    def calibrate(model, variables, condition, *, batch_size, guidance, tolerance):
        assert condition.noise_std is condition.features is None
        calls.append((np.asarray(condition.labels).tolist(), batch_size, guidance, tolerance))
        blocks = (BlockSchedule(1, tolerance, max_iterations=1), BlockSchedule(2, tolerance))
        return tfj.Schedule(blocks, tolerance, made_for(model, guidance), batch_size, 1e-5)

    monkeypatch.setattr(schedules, 'calibrate', calibrate)
    return calls


def schedule_of(path, plan=PLAN, **fields):
    mesh = sharding.make_mesh()
    given = dict(batch_size=6, tolerance=1e-4, mesh=mesh) | fields
    return schedules.schedule_of(path, plan, VARIABLES, **given)


def test_it_is_made_once(calibrated, tmp_path):
    first = schedule_of(tmp_path / 'a.json')
    # Eight devices: a batch of eight.
    assert calibrated == [([0, 1, 2, 0, 1, 2, 0, 1], 8, PLAN.guidance, 1e-4)]
    assert schedule_of(tmp_path / 'a.json') == first
    assert len(calibrated) == 1


@pytest.mark.parametrize(
    'change', [{'batch_size': 16}, {'tolerance': 1e-3},
               {'plan': dataclasses.replace(PLAN, guidance=tfj.Guidance(1.0))}], ids=str,
)
def test_it_is_made_again_where_it_does_not_fit(calibrated, tmp_path, change):
    schedule_of(tmp_path / 'a.json')
    schedule_of(tmp_path / 'a.json', **change)
    assert len(calibrated) == 2


def test_a_damaged_file_is_replaced(calibrated, tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{')
    assert schedule_of(path) == tfj.Schedule.load(path)
    assert len(calibrated) == 1


def test_whatever_lies_there(calibrated, tmp_path):
    path = tmp_path / 'a.json'
    wanted = schedule_of(path)
    text = path.read_text()
    open_ = json.dumps({k: v for k, v in json.loads(text).items() if k != 'checksum'})
    assert tfj.Schedule.load(path) == wanted
    path.write_text(open_)  # as earlier versions wrote it
    assert tfj.Schedule.load(path) == wanted
    for damaged in (
        '[' * 10**5, text.replace('"segments": 2', '"segments": 3'),
        open_.replace('"segments": 2', '"segments": 2.5'),
        open_.replace('"segments": 2', f'"segments": 2{"0" * 30}'),
        open_.replace('"calls": null', '"calls": "x"'), open_.replace('"blocks"', '"block"'),
        open_.replace('"made_for": {', '"made_for": {"moon": 1, '), '\udcff',
        open_.replace('"max_iterations": 1', '"max_iterations": -1'),
    ):
        assert damaged not in (text, open_)
        before = len(calibrated)
        path.write_bytes(damaged.encode(errors='surrogateescape'))
        assert schedule_of(path) == wanted and len(calibrated) == before + 1
    path.unlink()
    path.mkdir()
    assert schedule_of(path) == wanted  # and is not kept


def test_sets_drawn_by_a_schedule_are_those_drawn_sequentially(calibrated, tmp_path):
    mesh = sharding.make_mesh()
    plan = PLAN.on(sharding.Layout(mesh))
    variables = jax.device_put(VARIABLES, sharding.shardings(VARIABLES, mesh))
    how = dict(seed=3)
    sets = {}
    for tolerance in (None, 1e-4):
        known = bulk.fingerprint(plan, variables, 'step_0000012', tolerance=tolerance, **how)
        assert known.get('tolerance') == tolerance
        # Block 0 stops after one iteration: all images are drawn again, sequentially.
        schedule = tolerance and schedule_of(tmp_path / 'a.json', plan)
        sets[tolerance] = tmp_path / bulk.folder_name(known)
        bulk.draw_set(
            sets[tolerance], plan, variables, count=11, batch_size=8, mesh=mesh,
            fingerprint=known, schedule=schedule, **how,
        )
    found, wanted = (np.load(sets[t] / 'samples.npz')['arr_0'].astype(int) for t in (1e-4, None))
    assert np.abs(found - wanted).max() <= 1
