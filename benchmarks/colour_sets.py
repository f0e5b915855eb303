"""Builds two datasets: `python benchmarks/colour_sets.py --emoji=DIR --photos=DIR,DIR --out=OUT`.

Writes 64x64 RGB images to OUT/emoji/{train,test}/CLASS/ and OUT/photographs/{train,test}/photo/. It
reads packages that were downloaded and unpacked, and needs no network. It prints one line of JSON
with the number of images of each class. --emoji and --photos can be used alone.

--emoji: the folder `package` of the npm package emoji-datasource-google 16.0.0. The images (Noto,
Apache-2.0) have transparent parts, which become white. The class is the category of the emoji. All
skin tones, genders and directions of a base emoji are in one split; so are all couples and
families. `test` gets the base emoji whose SHA-256 is 0 modulo 10. Duplicate images are left out.

--photos: the unpacked Debian packages plasma-workspace-wallpapers and mate-backgrounds (GPL-2+; the
files of the former name LGPLv3). It uses only colour photographs, see PHOTOS. Each is resized to a
short side of 768 pixels and cut into patches without overlap; flat patches are left out. `test`
gets all patches of every seventh photograph in alphabetical order, and `train` gets the others.
"""

import argparse
import collections
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
SHORT_SIDE = 768
# Minimum standard deviation of a patch (of 255) in the channel that varies most.
FLAT = 8

# Code points that change a person but not the subject: skin tones, joiner, gender signs, direction,
# and persons by age and gender.
VARIANTS = set(
    '1F3FB 1F3FC 1F3FD 1F3FE 1F3FF 200D FE0F 2640 2642 27A1 '
    '1F466 1F467 1F468 1F469 1F474 1F475 1F476 1F9D1 1F9D2 1F9D3'.split()
)
# Emoji that differ only in gender but have separate code points. Mx Claus is person + Christmas tree.
SAME_BASE = {'1F385': '1F384', '1F936': '1F384', '1F57A': '1F483'}
SAME_BASE |= {'1F478': '1F934', '1FAC5': '1F934', '1F930': '1FAC4', '1FAC3': '1FAC4'}

# All colour photographs of the two packages, each in one size. ColdRipple and Grey are greyscale; the
# other files are drawings and renderings.
MATE = 'Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood '
MATE += 'YellowFlower'
PLASMA = 'BytheWater ColorfulCups DarkestHour EveningGlow FallenLeaf Kite OneStandsOut Path '
PLASMA += 'summer_1am'
PHOTOS = {name: f'nature/{name}.jpg' for name in MATE.split()}
PHOTOS |= {name: f'{name}/contents/images/2560x1600.jpg' for name in PLASMA.split()}
TEST_PHOTOS = sorted(PHOTOS)[::7]


def base_code(emoji: dict) -> str:
    """Returns the code that all variants of an emoji share; '' for a plain person."""
    if emoji['subcategory'] == 'family':
        return 'family'
    codes = [code for code in emoji['unified'].split('-') if code not in VARIANTS]
    return '-'.join(SAME_BASE.get(code, code) for code in codes)


def emoji_images(package: str):
    """Yields (split, class, name, image)."""
    table = Path(package) / 'emoji.json'
    if not table.is_file():
        raise FileNotFoundError(
            f'--emoji={package} has no emoji.json; pass the folder `package` of the unpacked npm '
            'package emoji-datasource-google.'
        )
    seen = set()
    for emoji in json.loads(table.read_text(encoding='utf-8')):
        if emoji['category'] == 'Component':  # five swatches of skin tones
            continue
        digest = hashlib.sha256(base_code(emoji).encode()).hexdigest()
        split = 'test' if int(digest, 16) % 10 == 0 else 'train'
        label = emoji['category'].lower().replace(' & ', '_')
        for variant in [emoji, *emoji.get('skin_variations', {}).values()]:
            with Image.open(Path(package) / 'img/google/64' / variant['image']) as file:
                picture = file.convert('RGBA')
            white = Image.new('RGBA', picture.size, 'white')
            image = Image.alpha_composite(white, picture).convert('RGB')
            if image.tobytes() not in seen:
                seen.add(image.tobytes())
                yield split, label, Path(variant['image']).stem, image


def photo_patches(folders: list[str]):
    """Yields (split, class, name, image)."""
    for name in sorted(PHOTOS):
        found = [path for folder in folders for path in Path(folder).rglob(PHOTOS[name])]
        if not found:
            raise FileNotFoundError(
                f'--photos={",".join(folders)} has no {PHOTOS[name]}; pass the folders of both '
                'unpacked packages, plasma-workspace-wallpapers and mate-backgrounds.'
            )
        split = 'test' if name in TEST_PHOTOS else 'train'
        with Image.open(found[0]) as file:
            picture = file.convert('RGB')
        scale = SHORT_SIDE / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
        for y in range(0, height - SIZE + 1, SIZE):
            for x in range(0, width - SIZE + 1, SIZE):
                patch = pixels[y : y + SIZE, x : x + SIZE]
                if patch.std(axis=(0, 1)).max() >= FLAT:
                    yield split, 'photo', f'{name}_{y:04d}_{x:04d}', Image.fromarray(patch)


def write(images, folder: Path) -> dict:
    """Writes a dataset to a new folder and counts its images."""
    if folder.exists():
        raise FileExistsError(f'{folder} exists; remove it, or choose another --out.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    counts = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for split, label, name, image in images:
            path = Path(temporary) / folder.name / split / label / f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            counts[split][label] += 1
        (Path(temporary) / folder.name).rename(folder)
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--emoji', help='the unpacked npm package')
    parser.add_argument('--photos', help='the unpacked Debian packages, with a comma between them')
    parser.add_argument('--out', required=True, help='the folder to write to')
    args = parser.parse_args()
    if not (args.emoji or args.photos):
        parser.error('nothing to build; pass --emoji, --photos or both.')
    counts = {}
    try:
        if args.emoji:
            counts['emoji'] = write(emoji_images(args.emoji), Path(args.out, 'emoji'))
        if args.photos:
            images = photo_patches(args.photos.split(','))
            counts['photographs'] = write(images, Path(args.out, 'photographs'))
    except (FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))
    print(json.dumps(counts))


if __name__ == '__main__':
    main()
