"""Makes the embedded images of this package, byte for byte, from the complete Fashion-MNIST.

    python -m tarflow_jax.data.make_embedded SOURCE_FOLDER

The complete dataset (MIT licence, https://github.com/zalandoresearch/fashion-mnist) is in the
Debian package `dataset-fashion-mnist`: `apt-get install dataset-fashion-mnist` installs it in
/usr/share/datasets/fashion-mnist.
"""

import sys

from tarflow_jax.data.idx import write_idx
from tarflow_jax.data.sources import EMBEDDED_FOLDER, IDX_PREFIXES, idx_folder

COUNTS = {'train': 10_000, 'test': 2_000}


def make(source_folder, target_folder):
    """Writes the first images and labels of both splits of `source_folder` as IDX .gz files.

    Raises:
        FileNotFoundError, ValueError: as for `idx_folder`; also if a split has too few images.
    """
    for split, count in COUNTS.items():
        source = idx_folder(source_folder, split)
        if len(source) < count:
            raise ValueError(
                f'{source_folder} has {len(source)} {split} images, but {count} are needed; pass '
                'the folder of the complete dataset.'
            )
        prefix = target_folder / IDX_PREFIXES[split]
        write_idx(f'{prefix}-images-idx3-ubyte.gz', source.image_NxHxWxC[:count, :, :, 0])
        write_idx(f'{prefix}-labels-idx1-ubyte.gz', source.label_N[:count].astype('uint8'))


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(sys.argv[1], EMBEDDED_FOLDER)
