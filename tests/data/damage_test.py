"""Prepared sets that are damaged, left half done, or written to by two at once."""

import os
import re
import shutil

import pytest
from prepared_pictures import content, last_error, manifest, run

from tarflow_jax import lock
from tarflow_jax.data import manifest as manifests
from tarflow_jax.data import shards, sources

pytestmark = pytest.mark.usefixtures('in_threads')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A source, and the set of it."""
    from prepared_pictures import picture, save

    folder = tmp_path_factory.mktemp('prepared')
    for k in range(4):
        save(folder / 'pets' / 'train' / ('cat', 'dog')[k % 2] / f'{k}.png', picture(k))
    run(folder / 'pets', folder / 'out', '--size=8')
    return folder / 'pets', folder / 'out'


def test_one_writer(prepared, tmp_path, capfd):
    source, wanted = prepared
    out = tmp_path / 'out'
    with lock.held(out):
        run(source, out, '--size=8', code=2)
        assert re.search(rf'process {os.getpid()} on .* is writing to {out}', last_error(capfd))
        assert [path.name for path in out.iterdir()] == ['lock']
    (out / lock.FILE).write_text('process 7 on a host that is gone')
    run(source, out, '--size=8')
    assert content(out) == content(wanted) and not (out / lock.FILE).exists()


def test_prepared_by_another_meanwhile(prepared, tmp_path, capfd, monkeypatch):
    source, wanted = prepared
    out, check = tmp_path / 'out', lock.check
    monkeypatch.setattr(lock, 'check', lambda folder: (check(folder), shutil.copytree(wanted, out)))
    read, calls = manifests.read, []

    def first_nothing(folder):
        calls.append(folder)
        return read(folder) if len(calls) > 1 else None

    monkeypatch.setattr(manifests, 'read', first_nothing)
    run(source, out, '--size=8', code=1)
    assert last_error(capfd).endswith('by another process in the meantime; run the same command again to resume.\n')
    assert content(out) == content(wanted)


def test_what_a_killed_process_left_is_removed(prepared, tmp_path):
    source, wanted = prepared
    out = shutil.copytree(wanted, tmp_path / 'out')
    for name in ('manifest.json.part', 'features.json.part'):
        (out / name).write_text('{"half')
    (out / 'progress').mkdir()
    (out / 'progress' / 'plan.json.part').write_text('{"half')
    run(source, out, '--size=8')
    assert content(out) == content(wanted)


TEXTS = {
    'empty': lambda text: '',
    'half': lambda text: text[: len(text) // 2],
    'list': lambda text: f'[{text}]',
    'deep': lambda text: '[' * 10**5,
    'deep inside': lambda text: text.replace('"classes": [', f'"classes": [{"[" * 10**5}'),
    'no utf-8': lambda text: text.replace('pets', 'p\udcff'),
    'huge': lambda text: text.replace('"records": 4', f'"records": 4{"0" * 5000}'),
    'large': lambda text: text.replace('"records": 4', f'"records": 4{"0" * 30}'),
    'float': lambda text: text.replace('"records": 4', '"records": 4e400'),
    'text': lambda text: text.replace('"records": 4', '"records": "4"'),
    'null': lambda text: text.replace('"records": 4', '"records": null'),
    'negative': lambda text: text.replace('"records": 4', '"records": -4'),
    'fewer': lambda text: text.replace('"records": 4', '"records": 3'),
    'missing': lambda text: text.replace('"records": 4', '"record": 4'),
    'elsewhere': lambda text: text.replace('"name": "', '"name": "../'),
}
OF_A_MANIFEST = {
    'version': lambda text: text.replace('"format": 1', '"format": "1"'),
    'size': lambda text: text.replace('"size": 8', '"size": [8]'),
    'no size': lambda text: text.replace('"size": 8', '"size": 0'),
    'channels': lambda text: text.replace('"channels": 3', '"channels": {}'),
    'no classes': lambda text: text.replace('"cat"', '3'),
    'splits': lambda text: text.replace('"train": {', '"train": 1, "x": {'),
    'skipped': lambda text: text.replace('"skipped": {', '"skip": {'),
}


@pytest.mark.parametrize('damage', [*TEXTS.items(), *OF_A_MANIFEST.items()], ids=lambda x: x[0])
def test_damaged_manifests(prepared, tmp_path, damage, capfd):
    source, wanted = prepared
    out = shutil.copytree(wanted, tmp_path / 'out')
    path = out / manifests.FILE
    text = damage[1](path.read_text())
    assert text != path.read_text()
    path.write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ValueError) as damaged:
        sources.load('prepared', 'train', path=str(out))
    message = str(damaged.value)
    assert message.startswith(f'{path} is damaged (') and '\n' not in message
    assert message.endswith(f'); delete {out} and prepare the dataset again.')
    run(source, out, '--size=8', code=2)
    assert last_error(capfd) == f'{message}\n'


def test_a_shard_of_another_name(prepared, tmp_path, capfd):
    source, wanted = prepared
    out = shutil.copytree(wanted, tmp_path / 'out')
    path = out / manifests.FILE
    path.write_text(path.read_text().replace('pets-train.', 'xets-train.'))
    with pytest.raises(ValueError, match='xets-train.array_record-00000-of-00001 is missing'):
        sources.load('prepared', 'train', path=str(out))
    run(source, out, '--size=8', code=2)
    assert 'manifest.json is damaged (it names other shards of train)' in last_error(capfd)


def test_a_folder_in_place_of_the_manifest(prepared, tmp_path, capfd):
    source, _ = prepared
    (tmp_path / 'out' / manifests.FILE).mkdir(parents=True)
    run(source, tmp_path / 'out', code=2)
    assert 'manifest.json is damaged (it is not a file: Is a directory)' in last_error(capfd)


def begun(source, out, monkeypatch) -> dict:
    """A preparation that was killed before its manifest; what its folder of progress holds."""
    with monkeypatch.context() as patch:
        patch.setattr(manifests, 'write', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, out, '--size=8')
    return {path.name: path.read_text() for path in (out / 'progress').iterdir()}


def test_damaged_progress_is_mended(prepared, tmp_path, monkeypatch, capfd):
    source, wanted = prepared
    out = tmp_path / 'out'
    names = begun(source, out, monkeypatch)
    shard, = (name for name in names if name != 'plan.json')
    path = out / 'progress' / shard
    for name in TEXTS.keys() - {'negative', 'fewer'}:  # which only the manifest can tell
        text = TEXTS[name](names[shard])
        path.write_bytes(text.encode(errors='surrogateescape'))
        found = shards.finished(manifests.folder_path(str(out)), [shard.removesuffix('.json')])
        assert (found == {}) == (text != names[shard])
    path.unlink()
    path.mkdir()
    run(source, out, '--size=8')
    assert content(out) == content(wanted)
    assert f'{path} is damaged (it is not a file' in capfd.readouterr().err


def test_a_damaged_plan_is_said(prepared, tmp_path, monkeypatch, capfd):
    source, wanted = prepared
    out = tmp_path / 'out'
    begun(source, out, monkeypatch)
    for text in ('', '{', '[' * 10**5, '[]', '\udcff'):
        (out / 'progress' / 'plan.json').write_bytes(text.encode(errors='surrogateescape'))
        run(source, out, '--size=8', code=2)
        assert 'plan.json is damaged (' in last_error(capfd)
    shutil.rmtree(out)  # as it says
    run(source, out, '--size=8')
    assert content(out) == content(wanted) and manifest(out)['classes'] == ['cat', 'dog']
