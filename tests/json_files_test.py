"""JSON files: whatever lies there becomes what was asked for, or one reason."""

import json

import pytest

from tarflow_jax import json_files

SHAPE = {
    'count': int, 'loss': float, 'names?': [str], 'classes': (None, [str]),
    'splits': {str: {'images': int}},
}
GOOD = {
    'count': 3, 'loss': 1, 'classes': None, 'splits': {'train': {'images': 2, 'more': []}},
    'unknown': {},
}


def changed(**fields) -> dict:
    return {name: value for name, value in (GOOD | fields).items() if value is not ...}


@pytest.mark.parametrize('content', [
    GOOD, changed(names=[]), changed(classes=['é']), changed(loss=float('nan')), changed(splits={}),
])
def test_what_has_the_shape_is_read(tmp_path, content):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(content))
    assert repr(json_files.read(path, SHAPE)) == repr(content)
    path.write_text(json.dumps(json_files.sealed(content), indent=1))
    assert repr(json_files.read(str(path), SHAPE)) == repr(content)


@pytest.mark.parametrize('content, says', [
    (changed(count=...), "it has no 'count'"),
    (changed(count=3.0), "it['count'] is 3.0"),
    (changed(count=True), "it['count'] is true"),
    (changed(count='3'), """it['count'] is "3\""""),
    (changed(loss=None), "it['loss'] is null"),
    (changed(names='abc'), """it['names'] is "abc\""""),
    (changed(names=['a', 3]), "it['names'][1] is 3"),
    (changed(classes=[3]), "it['classes'] is [3]"),
    (changed(splits=[]), "it['splits'] is []"),
    (changed(splits={'train': {}}), "it['splits']['train'] has no 'images'"),
    (changed(splits={'train': [1] * 99}), f"it['splits']['train'] is {str([1] * 99)[:57]}..."),
    ([GOOD], 'it is [{"count": 3'),
    (None, 'it is null'),
])
def test_what_has_not_is_named(content, says):
    with pytest.raises(json_files.Damaged) as damaged:
        json_files.parse(json.dumps(content), SHAPE)
    assert str(damaged.value).startswith(says) and len(str(damaged.value)) < 120


@pytest.mark.parametrize('text, says', [
    (b'', 'Expecting value'),
    (b'{"count": 3', 'Expecting'),
    (b'{"count": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    (b'[' * 10**6, 'it is nested too deeply'),
    (b'{"count": 1%s}' % (b'0' * 20), 'it has the number 10000'),
    (b'{"count": 1%s}' % (b'0' * 9999), 'Exceeds the limit'),
    (b'{"count": \x00}', 'Expecting value'),
])
def test_what_is_no_json(tmp_path, text, says):
    path = tmp_path / 'a.json'
    path.write_bytes(text)
    with pytest.raises(json_files.Damaged, match=says):
        json_files.read(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        json_files.read(tmp_path / 'a.json')
    for path in (tmp_path, tmp_path / 'a' / 'b.json'):
        (tmp_path / 'a').write_text('')
        with pytest.raises(json_files.Damaged, match='it is not a file: (Is|Not) a directory'):
            json_files.read(path)


def test_every_change_breaks_the_seal():
    text = json.dumps(json_files.sealed(GOOD))
    for place in range(len(text)):
        other = chr(ord(text[place]) ^ 1)
        changed_text = text[:place] + other + text[place + 1 :]
        try:
            found = json_files.parse(changed_text)
        except json_files.Damaged:
            continue
        # Only the name of the checksum was changed.
        assert len(found) == len(GOOD) + 1 and GOOD.items() <= found.items()
