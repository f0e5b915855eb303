"""Tests of the checks before a run."""

import pytest

from tarflow_jax import config as configs
from tarflow_jax import run_checks
from tarflow_jax.training import sharding


def test_names_that_a_run_needs(tmp_path):
    assert run_checks.workdir(str(tmp_path / 'new')) == tmp_path / 'new'
    (tmp_path / 'samples').write_text('mine')
    with pytest.raises(ValueError, match=f'{tmp_path}/samples is not a folder, but the run needs a'):
        run_checks.workdir(str(tmp_path))
    (tmp_path / 'samples').unlink()
    (tmp_path / 'evaluation.json').mkdir()
    with pytest.raises(ValueError, match='evaluation.json is not a file, .* move it'):
        run_checks.workdir(str(tmp_path))
    with pytest.raises(ValueError, match=f'^--workdir={tmp_path}/file: .*is not a folder; choose'):
        (tmp_path / 'file').write_text('mine')
        run_checks.workdir(str(tmp_path / 'file'))


def test_more_samples_than_a_disk_holds(tmp_path):
    config = configs.default()
    config.model.update(image_size=8, patch_size=4, width=8, head_dim=4, layers_per_block=(1,))
    plan, mesh = configs.plan(config), sharding.make_mesh()
    config.sample.update(count=1000, batch_size=8)
    assert 'at least 1 MiB' in run_checks.sample_set(config, plan, mesh, tmp_path / 'new', always=True)
    config.sample.count = 10**15
    with pytest.raises(ValueError, match='sample.count 1000000000000000 need 64,000,000 GB, but the'):
        run_checks.sample_set(config, plan, mesh, tmp_path / 'new', always=True)
