"""Sources: the embedded images are what they should be, and what does not fit is refused."""

import hashlib
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import tarflow_jax
from tarflow_jax.data import make_embedded, sources
from tarflow_jax.data.idx import write_idx

EMBEDDED = {
    't10k-images-idx3': 'a2d469e967c6f16f941e652e24b2bc5422a63b1a71325ff49da1bb5a3350b4dc',
    't10k-labels-idx1': '09e12ea2704e7fc948433dfc4fc0c69cf8e2e18611cf6b3b80e6ad82dec4dcba',
    'train-images-idx3': '1be733b5e3563a3e09249eaf2860ab906050f4ad092514fd69643a971f092eef',
    'train-labels-idx1': '61a6840eba903a1624db1cd180742787f58a96a5d569dcbab532ea0bbd943a75',
}


def write_folder(folder, separator='-', ending='-ubyte', images=5, labels=5):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (images, 4, 4), np.uint8)
    label = rng.integers(0, 3, labels, np.uint8)
    for split in ('train', 't10k'):
        write_idx(folder / f'{split}-images{separator}idx3{ending}', image)
        write_idx(folder / f'{split}-labels{separator}idx1{ending}', label)
    return image, label


def fits(source, image_size=28, channels=1, num_classes=10):
    sources.check(source, image_size=image_size, channels=channels, num_classes=num_classes,
                  what='the training set')


@pytest.mark.parametrize('name', EMBEDDED)
def test_embedded_files_have_their_checksum(name):
    content = (sources.EMBEDDED_FOLDER / f'{name}-ubyte.gz').read_bytes()
    assert hashlib.sha256(content).hexdigest() == EMBEDDED[name]


@pytest.mark.parametrize('split, counts, pixel_sum, first', [
    ('train', [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000], 572388787, [9, 0, 0, 3, 0]),
    ('test', [200, 203, 214, 190, 219, 195, 197, 200, 194, 188], 114763281, [9, 2, 1, 1, 6]),
])
def test_embedded_is_the_start_of_fashion_mnist(split, counts, pixel_sum, first):
    source = sources.load('embedded', split)
    assert len(source) == sum(counts)
    assert np.bincount(source.label_N).tolist() == counts
    assert int(source.image_NxHxWxC.sum()) == pixel_sum
    assert [int(source[i]['label']) for i in range(5)] == first
    element = source[len(source) - 1]
    assert element['image'].shape == (28, 28, 1) and element['image'].dtype == np.uint8
    assert element['label'].shape == () and element['label'].dtype == np.int32
    fits(source)


def test_sources_say_what_they_are(tmp_path):
    embedded = sources.load('embedded', 'test')
    assert embedded.about == {
        'dataset': 'embedded part of Fashion-MNIST', 'kind': 'embedded', 'split': 'test',
        'images': 2000,
        'pixels_sha256': hashlib.sha256(embedded.image_NxHxWxC.tobytes()).hexdigest(),
    }
    assert embedded.class_names[9] == 'ankle boot'
    assert sources.classes('embedded') == (embedded.class_names, 'embedded')
    folder = tmp_path / 'digits'
    folder.mkdir()
    image, _ = write_folder(folder)
    assert sources.load('idx', 'train', path=str(folder)).about == {
        'dataset': 'digits', 'kind': 'idx', 'split': 'train', 'images': 5,
        'pixels_sha256': hashlib.sha256(image.tobytes()).hexdigest(),
    }
    assert sources.InMemory(image, np.zeros(5, np.int32)).about == {}


def test_embedded_carries_its_licence():
    licence = (sources.EMBEDDED_FOLDER / 'LICENSE').read_text(encoding='utf-8')
    assert 'MIT' in licence and '2017 Zalando SE, https://tech.zalando.com' in licence


def test_make_embedded_makes_the_same_images(tmp_path):
    # The start of the start is the start: no need for the complete set.
    make_embedded.make(sources.EMBEDDED_FOLDER, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f'{name}-ubyte.gz' for name in EMBEDDED}
    for split in ('train', 'test'):
        made, wanted = sources.idx_folder(tmp_path, split), sources.embedded(split)
        np.testing.assert_array_equal(made.image_NxHxWxC, wanted.image_NxHxWxC)
        np.testing.assert_array_equal(made.label_N, wanted.label_N)


def test_make_embedded_wants_the_complete_set(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match='has 5 train images, but 10000 are needed'):
        make_embedded.make(tmp_path, tmp_path)


@pytest.mark.parametrize('ending', ['-ubyte', '-ubyte.gz'])
@pytest.mark.parametrize('separator', ['-', '.'])
@pytest.mark.parametrize('split', ['train', 'test'])
def test_idx_folder_accepts_every_name(tmp_path, separator, ending, split):
    image, label = write_folder(tmp_path, separator, ending)
    source = sources.load('idx', split, path=str(tmp_path))
    assert len(source) == 5
    np.testing.assert_array_equal(source[3]['image'], image[3][..., None])
    assert source[3]['label'] == label[3]


def test_idx_folder_keeps_channels(tmp_path):
    write_folder(tmp_path)
    colour = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    write_idx(tmp_path / 'train-images-idx3-ubyte', colour)
    np.testing.assert_array_equal(sources.idx_folder(tmp_path, 'train')[4]['image'], colour[4])


def test_idx_folder_counts(tmp_path):
    write_folder(tmp_path, images=5, labels=4)
    with pytest.raises(ValueError) as error:
        sources.idx_folder(tmp_path, 'train')
    message = str(error.value)
    assert 'train-images-idx3-ubyte has 5 images' in message
    assert 'train-labels-idx1-ubyte has labels of shape (4,)' in message


def test_idx_folder_refuses_labels_in_place_of_images(tmp_path):
    _, label = write_folder(tmp_path)
    write_idx(tmp_path / 'train-images-idx3-ubyte', label)
    with pytest.raises(ValueError, match=r'has the shape \(5,\)'):
        sources.idx_folder(tmp_path, 'train')


def test_missing_idx_files_are_named_with_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        sources.load('idx', 'test', path=str(tmp_path))
    message = str(error.value)
    assert 'has neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte.gz;' in message
    assert str(tmp_path) in message and 'data.path' in message and '\n' not in message


@pytest.mark.parametrize('arguments, says', [
    (('embeded', 'train'), "data.source is 'embeded', .* the closest is 'embedded'"),
    (('tdfs', 'train'), "the closest is 'tfds'"),
    (('prepare', 'train'), "the closest is 'prepared'"),
    (('embedded', 'validation'), "IDX files have no split 'validation'.* choose one of train, test"),
    (('idx', 'train'), 'data.path is empty'),
    (('tfds', 'train'), 'data.name is empty'),
])
def test_load_refuses(arguments, says):
    with pytest.raises(ValueError, match=says):
        sources.load(*arguments)


@pytest.mark.parametrize('field, says', [
    ({'image_size': 32}, r'uint8 \[28, 28, 1\], but model.image_size = 32 .*uint8 \[32, 32, 1\]'),
    ({'channels': 3}, r'model.image_channels = 3 need uint8 \[28, 28, 3\]'),
    ({'num_classes': 9}, 'has the label 9, but model.num_classes = 9 allows 0 to 8'),
    ({'image_size': (28, 32)}, r'model.image_size = \(28, 32\) and .*uint8 \[28, 32, 1\]'),
])
def test_check_refuses(field, says):
    with pytest.raises(ValueError, match='the training set .*' + says):
        fits(sources.embedded('test'), **field)


def test_check_refuses_classes_that_would_stay_untrained():
    with pytest.raises(ValueError, match='num_classes = 11, but the training set has 10 classes'):
        fits(sources.embedded('test'), num_classes=11)
    source = sources.InMemory(np.zeros((3, 28, 28, 1), np.uint8), np.array([0, 2, 1], np.int32))
    fits(source, num_classes=4)  # labels alone do not tell, as a test set may lack some
    size = dict(image_size=28, channels=1, what='the training set', every_class=True)
    sources.check(source, num_classes=3, **size)
    with pytest.raises(ValueError, match='the training set has 3 classes.*model.num_classes to 3'):
        sources.check(source, num_classes=4, **size)


def test_check_ignores_labels_without_classes_and_sees_them_all_with_classes():
    image = np.zeros((3, 28, 28, 1), np.uint8)
    source = sources.InMemory(image, np.array([0, 1, -1], np.int32))
    fits(source, num_classes=0)
    with pytest.raises(ValueError, match='has the label -1'):
        fits(source, num_classes=2)
    with pytest.raises(ValueError, match=r'images of float32 \[28, 28, 1\]'):
        fits(sources.InMemory(image.astype(np.float32), source.label_N), num_classes=0)
    with pytest.raises(ValueError, match='is empty'):
        fits(sources.InMemory(image[:0], source.label_N[:0]))


def test_check_of_rectangles():
    source = sources.InMemory(np.zeros((3, 6, 4, 1), np.uint8), np.zeros(3, np.int32))
    for size in ((6, 4), [6, 4]):
        fits(source, image_size=size)
    fits(sources.embedded('test'), image_size=(28, 28))
    with pytest.raises(ValueError, match=r'uint8 \[6, 4, 1\], .*image_size = \(4, 6\)'):
        fits(source, image_size=(4, 6))


def test_check_of_features():
    class Source(sources.InMemory):
        def __getitem__(self, i):
            return super().__getitem__(i) | {'features': np.zeros(3, np.float32)}

    plain = sources.InMemory(np.zeros((3, 6, 4, 1), np.uint8), np.zeros(3, np.int32))
    source = Source(plain.image_NxHxWxC, plain.label_N)
    sizes = dict(image_size=(6, 4), channels=1, num_classes=1, what='the training set')
    sources.check(source, num_features=3, **sizes)
    sources.check(source, num_features=0, **sizes)
    sources.check(plain, num_features=0, **sizes)
    with pytest.raises(ValueError, match=r'set has features of float32 \[3\], but model.num_feat'
                       r'ures = 4 needs float32 \[4\]; set model.num_features to the number'):
        sources.check(source, num_features=4, **sizes)
    with pytest.raises(ValueError, match='set has no features, but model.num_features = 4; prep'):
        sources.check(plain, num_features=4, **sizes)


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
    """A prepared array_record set: image i is 8x8x3 and filled with i, its label is i % 4."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with tfds.core.registered.skip_registration():

        class TinyPictures(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.0.0')
            url_infos = {}  # TFDS would look for a package with a list of downloads

            def _info(self):
                features = {
                    'image': tfds.features.Image(shape=(8, 8, 3), encoding_format='png'),
                    'label': tfds.features.ClassLabel(num_classes=4),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {
                    'train': self._generate_examples(7),
                    'validation': self._generate_examples(3),
                }

            def _generate_examples(self, count):
                for i in range(count):
                    png = BytesIO()
                    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(png, 'PNG')
                    png.seek(0)
                    yield i, {'image': png, 'label': i % 4}

    folder = tmp_path_factory.mktemp('tfds')
    tfds.disable_progress_bar()
    TinyPictures(data_dir=folder, file_format='array_record').download_and_prepare()
    return folder


def test_tfds_reads_array_record(tfds_folder):
    source = sources.load('tfds', 'train', path=str(tfds_folder), name='tiny_pictures')
    assert len(source) == 7
    elements = [source[i] for i in range(7)]
    assert sorted(element['image'].mean() for element in elements) == list(range(7))
    for element in elements:
        assert element['image'].shape == (8, 8, 3) and element['image'].dtype == np.uint8
        assert element['label'].dtype == np.int32
        assert element['label'] == element['image'][0, 0, 0] % 4
    fits(source, image_size=8, channels=3, num_classes=4)
    assert source.about == {
        'dataset': 'tiny_pictures', 'kind': None, 'split': 'train', 'images': 7, 'version': '1.0.0'
    }
    assert source.class_names is None
    assert sources.classes('tfds', path=str(tfds_folder), name='tiny_pictures') == (None, None)
    assert len(sources.load('tfds', 'validation', path=str(tfds_folder), name='tiny_pictures')) == 3


READ_WITH_A_WORKER = """
import sys
from tarflow_jax.data import pipeline, sources

def first_batch(workers):
    source = sources.load('tfds', 'train', path=sys.argv[1], name='tiny_pictures')
    batches = pipeline.train_batches(source, batch_size=7, seed=0, workers=workers)
    print(next(batches)['image'][:, 0, 0, 0].tolist())
    batches.close()

first_batch(workers=0)
first_batch(workers=1)
print([name for name in ('tensorflow', 'torch') if name in sys.modules])
"""


def test_tfds_needs_no_tensorflow_and_says_nothing(tfds_folder):
    environment = {**os.environ, 'PYTHONPATH': str(Path(tarflow_jax.__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, '-c', READ_WITH_A_WORKER, str(tfds_folder)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )
    in_threads, in_worker, loaded = ran.stdout.splitlines()
    assert sorted(map(int, in_threads[1:-1].split(','))) == list(range(7))
    assert in_worker == in_threads
    assert loaded == '[]'
    assert ran.stderr == ''


def test_tfds_set_without_labels():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        labelled = sources.load('tfds', 'train', name='imagenet_resized/64x64')
        unlabelled = sources.load('tfds', 'validation', name='downsampled_imagenet/64x64')
    assert len(labelled) == 3 and labelled[0]['image'].shape == (64, 64, 3)
    assert 0 <= labelled[0]['label'] < 1000
    assert labelled.about['kind'] == 'imagenet_resized'
    assert labelled.class_names[0] == 'n02119789'  # that of map_clsloc.txt
    assert unlabelled.about['kind'] == 'downsampled_imagenet' and unlabelled.class_names is None
    assert unlabelled[2]['label'] == -1 and unlabelled[2]['label'].dtype == np.int32


@pytest.mark.parametrize('name', ['tiny_pictures', 'imagenet_resized/64x64', 'mnist:9.9.9'])
def test_missing_tfds_set_says_how_to_prepare_it(tmp_path, name, capfd):
    with pytest.raises(FileNotFoundError) as error:
        sources.load('tfds', 'train', path=str(tmp_path), name=name)
    message = str(error.value)
    assert message.startswith(f'{tmp_path} does not have {name} as array_record')
    assert f'`tfds build {name} --data_dir={tmp_path} --file_format=array_record`' in message
    assert '\n' not in message
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('split', ['nosuch', 'train[x'])
def test_unknown_tfds_split(tfds_folder, split):
    with pytest.raises(ValueError) as error:
        sources.load('tfds', split, path=str(tfds_folder), name='tiny_pictures')
    assert f'has no split {split!r}' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('damage', [Path.unlink, lambda path: os.truncate(path, 700)])
def test_damaged_tfds_set(tfds_folder, tmp_path, damage):
    shutil.copytree(tfds_folder, tmp_path, dirs_exist_ok=True)
    damage(next(tmp_path.glob('*/*/*train.array_record*')))
    with pytest.raises(ValueError, match='tiny_pictures in .* cannot be read: .* prepare the dataset'):
        sources.load('tfds', 'train', path=str(tmp_path), name='tiny_pictures')


def test_tfds_set_without_images():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(), pytest.raises(ValueError, match='none called image'):
        sources.load('tfds', 'train', name='ag_news_subset')
