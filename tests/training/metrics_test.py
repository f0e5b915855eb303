"""metrics.jsonl and the event files, read back."""

import json
import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

import tarflow_jax as tfj
from tarflow_jax import paths
from tarflow_jax.training import metrics
from tarflow_jax.training.metrics import MetricWriter, model_flops, read


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that stands still."""
    monkeypatch.setattr(metrics.time, 'time', lambda: NOW)


NOW = 1.5e9


def lines(workdir):
    """The lines without their time, which must be that of the clock."""
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if (k, v) != ('wall_time', NOW)} for line in found]


def events(workdir):
    """All events of all files, oldest first; checks the two checksums of every record."""
    found = []
    for path in (workdir / 'tensorboard').iterdir():
        data = path.read_bytes()
        while data:
            length, crc = struct.unpack('<QI', data[:12])
            content, rest = data[12 : 12 + length], data[12 + length :]
            assert crc == masked_crc32c(data[:8])
            assert struct.unpack('<I', rest[:4])[0] == masked_crc32c(content)
            found.append(Event.FromString(content))
            data = rest[4:]
    return sorted(found, key=lambda event: event.wall_time)


def test_scalars(tmp_path):
    with MetricWriter(tmp_path / 'run') as writer:
        writer.write_scalars(2, {'loss': np.float32(0.5), 'mean_square/block_0': np.array(2.0)})
        assert lines(tmp_path / 'run') == [{'step': 2, 'loss': 0.5, 'mean_square/block_0': 2.0}]
        writer.write_scalars(4, {'loss': float('nan')})
    assert np.isnan(lines(tmp_path / 'run')[1]['loss'])
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / 'run')
        for value in event.summary.value
    ]
    assert scalars[:2] == [(2, 'loss', 0.5), (2, 'mean_square/block_0', 2.0)]
    assert scalars[2][:2] == (4, 'loss') and np.isnan(scalars[2][2])


def test_every_line_has_its_time(tmp_path, monkeypatch):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {'loss': 0.5})
        monkeypatch.setattr(metrics.time, 'time', lambda: NOW + 2.25)
        writer.write_scalars(2, {'loss': 0.5})
    assert [line['wall_time'] for line in read(tmp_path)] == [NOW, NOW + 2.25]
    times = [event.wall_time for event in events(tmp_path) if event.summary.value]
    assert times == [NOW, NOW + 2.25]


def test_bucket(bucket, monkeypatch):
    folder = paths.of(bucket)
    with MetricWriter(bucket) as writer:
        writer.write_scalars(1, {'loss': 0.5})
        assert not (folder / 'metrics.jsonl').read_bytes()  # within a minute
        writer.flush()
        assert lines(folder) == [{'step': 1, 'loss': 0.5}]
        writer.write_scalars(2, {'loss': 0.25})
        monkeypatch.setattr(metrics, 'BETWEEN_UPLOADS', 0)
        writer.write_scalars(3, {'loss': 0.125})
        assert [entry['step'] for entry in lines(folder)] == [1, 2, 3]
    with MetricWriter(bucket, resume_step=2) as writer:
        assert [entry['step'] for entry in lines(folder)] == [1, 2]
        writer.write_scalars(3, {'loss': 0.0})
    assert lines(folder) == [
        {'step': k, 'loss': loss} for k, loss in ((1, 0.5), (2, 0.25), (3, 0))
    ]
    scalars = [(event.step, value.simple_value) for event in events(folder)
               for value in event.summary.value]
    assert scalars == [(1, 0.5), (2, 0.25), (3, 0.125), (3, 0.0)]
    starts = [event.step for event in events(folder) if event.session_log.status]
    assert starts == [1, 3]


@pytest.mark.parametrize('channels', [1, 3])
def test_images(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (6, 4, channels), np.uint8)
    with MetricWriter(tmp_path) as writer:
        writer.write_images(7, {'samples/raw': picture})
    [event] = [event for event in events(tmp_path) if event.summary.value]
    [value] = event.summary.value
    assert (event.step, value.tag) == (7, 'samples/raw')
    assert (value.image.height, value.image.width) == (6, 4)
    shown = np.asarray(Image.open(BytesIO(value.image.encoded_image_string)).convert('RGB'))
    np.testing.assert_array_equal(shown, np.broadcast_to(picture, (6, 4, 3)))


def test_flush_brings_everything_on_disk(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {'loss': 0.5})
    writer.flush()
    assert [v.tag for e in events(tmp_path) for v in e.summary.value] == ['loss']
    writer.close()


def test_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write_scalars(step, {'loss': step / 8})
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "lo')
    with MetricWriter(tmp_path, resume_step=3) as writer:
        writer.write_scalars(4, {'loss': 9.0})
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert lines(tmp_path)[-1]['loss'] == 9.0
    # TensorBoard purges what came before a session that starts at an earlier step.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [1, 4]


def test_damaged_lines_are_dropped(tmp_path):
    whole = b'{"step": 1, "loss": 0.5}\n'
    damage = b'\xff\xfe\n[]\n12\n{"step": null}\n{"step": "a"}\n{"loss": 3}\n\n'
    damage += b'{"step": 1, "loss": "3"}\n{"step": true}\n{"step": 1%s}\n' % (b'0' * 30)
    damage += b'%s\n{"step": 1, "loss": [3]}\n{"step": 1.5}\n' % (b'[' * 10**5)
    (tmp_path / 'metrics.jsonl').write_bytes(damage + whole + b'{"step": 2, "loss"')
    with MetricWriter(tmp_path, resume_step=9) as writer:
        writer.write_scalars(10, {'loss': 0.25})
    assert lines(tmp_path) == [{'step': 1, 'loss': 0.5}, {'step': 10, 'loss': 0.25}]


def test_read(tmp_path):
    assert read(tmp_path) == []
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": NaN}\n[3]\n{"step": 2, "lo')
    assert [line['step'] for line in read(tmp_path)] == [1]
    (tmp_path / 'folder' / 'metrics.jsonl').mkdir(parents=True)
    assert read(tmp_path / 'folder') == []


def test_new_run_starts_new_files(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
    MetricWriter(tmp_path).close()
    assert (tmp_path / 'metrics.jsonl').read_text() == ''


@pytest.mark.parametrize('volume_preserving, outputs', [(False, 8), (True, 4)])
def test_model_flops_by_hand(volume_preserving, outputs):
    # 6x6x1, patches of 2x2: 9 positions of 4 numbers; width 64; blocks of 2 and 1 layers.
    model = tfj.TarFlow(
        image_size=6, image_channels=1, patch_size=2, width=64, layers_per_block=(2, 1),
        volume_preserving=volume_preserving,
    )
    per_position = 64 * 192 + 64 * 64 + 64 * 256 + 256 * 64  # qkv, projection, MLP
    # Causal: position t sees t + 1 keys; half of the square is what the count keeps of them.
    attention = 9 * 9 / 2 * 64 * 2  # logits, values
    layer = 9 * per_position + attention
    ends = 9 * (4 * 64 + 64 * outputs)
    multiply_adds = 3 * layer + 2 * ends
    assert model_flops(model) == 3 * 2 * multiply_adds


def test_numbers_that_are_not_finite_are_written_without_a_word(tmp_path, caplog):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {'loss': np.nan, 'mean_square/block_0': np.inf})
    assert [record.name for record in caplog.records if 'tensorboardX' in record.name] == []
    assert np.isnan(json.loads((tmp_path / 'metrics.jsonl').read_text())['loss'])
