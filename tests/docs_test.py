"""The pages of documentation: their Python runs, their commands are understood, their links lead
somewhere, and what they say of fields and flags is so.

Python blocks of a page run one after another in one namespace, with numbers made small: PYTHON.
Commands, fenced or inline, are taken apart: those of this package by their own parsers, those of
`launch/` by running them with --dry_run, those of `benchmarks/` by the flags they define. What is
left needs a network, a cloud or a cluster, and is in ELSEWHERE with the reason.
"""

import configparser
import importlib.util
import operator
import os
import re
import shlex
import subprocess

import jax
import numpy as np
import optax
import pytest
from command_line import call
from documented import ROOT, fenced, run_python, spans
from PIL import Image

from tarflow_jax import command_setup, commands, config_of_run, main, paths
from tarflow_jax import config as configs
from tarflow_jax.ahead_of_time import topology
from tarflow_jax.ahead_of_time.chips import measured_range
from tarflow_jax.data import prepare, prepare_flags
from tarflow_jax.flow.flow import TarFlow

PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / 'README.md', ROOT / 'launch' / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
}


def test_pages_are_found():
    assert {
        'README.md', 'launch/README.md', 'docs/mathematics.md', 'docs/your_images.md',
        'docs/cloud_tpu.md', 'docs/sampling.md', 'docs/from_the_official_code.md',
        'docs/extending.md', 'docs/itarflow.md', 'docs/uses.md',
    } <= set(PAGES)


# Python.


def _images_and_a_run(folder):
    """The images and labels that pages leave to the reader, and the files they read."""
    import tarflow_jax as tfj
    from tarflow_jax.training.checkpoint import Checkpoints
    from tarflow_jax.training.state import from_variables

    namespace = {
        'images': jax.random.uniform(jax.random.key(0), (2, 28, 28, 1), minval=-1),
        'labels': np.array([3, -1], np.int32),
    }
    model = tfj.TarFlow(28, 1, patch_size=4, width=64, layers_per_block=(1, 1), num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), namespace['images'])
    tfj.save_official(variables, model, folder / 'model.safetensors')
    config = configs.default()
    config.model.update(width=64, layers_per_block=(1, 1))
    with Checkpoints(folder / 'runs' / 'fashion_mnist', model, config.to_dict()) as checkpoints:
        checkpoints.save(from_variables(variables, optax.identity(), ema=False))
    return namespace


# page: (what is small in place of large, what is there before)
PYTHON = {
    'README.md': (
        {'layers_per_block=(2, 2)': 'layers_per_block=(1,)', 'steps=500': 'steps=2', '1000': '10'},
        _images_and_a_run,
    ),
    'docs/library.md': (
        {'width=128': 'width=64', '(4, 4, 4, 4)': '(1, 1)', "'model.pth'": "'model.safetensors'",
         'layers_per_block=(2, 2)': 'layers_per_block=(1,)', 'steps=300': 'steps=2'},
        _images_and_a_run,
    ),
    'docs/sampling.md': ({'(4, 4, 4, 4)': '(1, 1)'}, lambda folder: {}),
    'docs/itarflow.md': (
        {'image_size=64': 'image_size=8', 'width=1280': 'width=64', '(4, 4, 4, 24)': '(1, 1)',
         '1000': '10', '0.01, 30)': '0.01, 3)'},
        lambda folder: {},
    ),
    'docs/mathematics.md': ({}, lambda folder: {}),
    'docs/uses.md': (
        {'num_samples=4': 'num_samples=1, steps=2', 'range(48)': 'range(4)', 'range(48, 60)': 'range(4, 6)',
         '(60, 1,': '(6, 1,', '(3, 60, 1)': '(3, 6, 1)', 'np.arange(60) < 48': 'np.arange(6) < 4',
         '(2,) * 4': '(1,) * 4'},
        _images_and_a_run,
    ),
}


# Pages that another test runs, with assertions on their numbers.
RUN_BY = {
    'docs/boltzmann_generators.md': 'tests/sampling/boltzmann_test.py',
    'docs/extending.md': 'tests/flow/extending_test.py',
    'docs/simulation_based_inference.md': 'tests/simulation_based_inference_test.py',
    'docs/time_series.md': 'tests/time_series_test.py',
}


def test_every_page_with_python_is_here():
    found = {name for name, page in PAGES.items() if any(b.language == 'python' for b in fenced(page))}
    assert found == set(PYTHON) | set(RUN_BY)
    for page, test in RUN_BY.items():
        assert os.path.basename(page) in (ROOT / test).read_text()


SLOW = ('docs/library.md', 'docs/sampling.md', 'docs/uses.md')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PYTHON
])
def test_python_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replaced, prelude = PYTHON[name]
    run_python(PAGES[name], replaced, {'__name__': 'documented', **prelude(tmp_path)})


# Commands.

# Programs that are not of this package, and why a test does not run them.
ELSEWHERE = {
    'pip': 'installs from the network',
    'git': 'clones from the network',
    'cd': 'enters the clone',
    'gcloud': 'asks Google Cloud',
    'docker': 'builds and pushes an image',
    'sbatch': 'needs a Slurm cluster',
    'scancel': 'needs a Slurm cluster',
    'tensorboard': 'serves until it is stopped',
    'venv': 'makes an environment, which installation then fills from the network',
}
# What stands for something else in a usage line or an example.
PLACEHOLDERS = {'configs/NAME.py': 'configs/fashion_mnist.py', 'config.field': 'config.seed'}
LANGUAGES = ('', 'sh', 'bash')
FLAG = re.compile(r'(?<![\w-])--(\w+)')


def simple_commands(text: str) -> list[str]:
    """Shell text as single commands, without comments, continuations and the optional parts of usage."""
    text = re.sub(r'\\\n\s*', ' ', text)
    text = re.sub(r'\[--?[^\]]*\]', '', text)
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    lines = [re.sub(r'(^|\s)#.*', '', line).strip() for line in text.splitlines()]
    return [part.strip() for line in lines for part in re.split(r'&&', line) if part.strip()]


def found_commands() -> list[tuple[str, str]]:
    """(page, command) of all fenced commands, and of inline ones that begin as commands do."""
    found = []
    begins = re.compile(r'(python -m|sbatch|docker|pip|gcloud) |python benchmarks/|launch/\w+\.sh ')
    for name, page in PAGES.items():
        for block in fenced(page):
            if block.language in LANGUAGES and not block.text.startswith('@'):  # a citation
                found += [(name, command) for command in simple_commands(block.text)]
        found += [
            (name, command) for span in spans(page)
            if begins.match(span) and span != 'python -m tarflow_jax.main'
            for command in simple_commands(span)
        ]
    return found


def understood(command: str, monkeypatch) -> str:
    """Checks a command as far as is possible here; returns the kind that it is."""
    words = shlex.split(command)
    while re.fullmatch(r'[A-Z_]+=.*', words[0]):
        words.pop(0)
    program = os.path.basename(words[0])
    if program.startswith('python'):
        if words[1] == '-m':
            return _module(words[2], words[3:], monkeypatch)
        return _script(words[1:])
    if words[0].startswith(('launch/', 'benchmarks/')):
        return _launch(words, monkeypatch)
    if program == 'sbatch':
        _launch(words[words.index(next(w for w in words if w.startswith('launch/'))) :], monkeypatch)
    if program == 'pip':
        _extras(words)
    if program == 'docker' and '-f' in words:
        assert (ROOT / words[words.index('-f') + 1]).exists()
    assert program in ELSEWHERE, command
    return program


def _module(module: str, arguments: list[str], monkeypatch) -> str:
    if module == 'tarflow_jax.main':
        _training_program(arguments, monkeypatch)
    elif module == 'tarflow_jax.data.prepare':
        prepare_flags.parser('').parse_args(arguments)
    elif module == 'pytest':
        for before, word in zip(['', *arguments], arguments):
            assert word[0] == '-' or before == '-m' or (ROOT / word).exists(), word
    elif module == 'pip':
        _extras(arguments)
    else:
        assert module in ELSEWHERE, module
    return module


class Understood(Exception):
    pass


def _training_program(arguments: list[str], monkeypatch) -> None:
    """The flags parse, the config means something, and the mode takes the flags that it is given."""
    arguments = [re.sub(r'^--config=configs/', f'--config={ROOT}/configs/', a) for a in arguments]
    if '...' in arguments:
        arguments = [a for a in arguments if a != '...']
        arguments += [f'--config={ROOT}/configs/fashion_mnist.py', '--workdir=runs/a']
    if not any(a.startswith('--config=') for a in arguments):  # that of a checkpoint is taken
        arguments.insert(0, f'--config={ROOT}/configs/colour64.py')
    monkeypatch.setattr(paths, 'reach', lambda *_, **__: None)  # no bucket is asked
    monkeypatch.setattr(config_of_run, 'saved', lambda *_: None)
    given = main._parse(['main', *arguments])
    configs.plan(given.config)

    def understood(*_, **__):
        raise Understood

    # Each mode looks at its flags first; what it would do then is tested where it belongs.
    monkeypatch.setattr(command_setup, 'workdir_of', understood)
    monkeypatch.setattr(command_setup, 'plan_of', understood)
    monkeypatch.setattr(topology, 'describe', understood)
    with pytest.raises(Understood):
        commands.MODES[given.mode](given.config, given)


def _script(words: list[str]) -> str:
    path = ROOT / words[0]
    text = path.read_text()
    if 'comparison.arguments(' in text:
        text += (path.parent / 'comparison.py').read_text()
    defined = set(FLAG.findall(text))
    given = {word[2:].partition('=')[0] for word in words[1:] if word.startswith('--')}
    assert given <= defined, f'{path} has no {given - defined}'
    return 'benchmark'


def _launch(words: list[str], monkeypatch) -> str:
    script, rest = words[0], words[1:]
    assert (ROOT / script).exists()
    own, program = (rest[: rest.index('--')], rest[rest.index('--') + 1 :]) if '--' in rest else (rest, [])
    if '...' in own:
        own = [word for word in own if word != '...'] + ['--name=flow', '--zone=z']
    own = [re.sub(r'=\.\.\.$', '=z', word) for word in own]
    if program[:3] == ['python', '-m', 'tarflow_jax.main']:
        program = program[3:]
    if program:
        _training_program(program, monkeypatch)
    if os.path.basename(script) in ('tpu_vm.sh', 'gke.sh'):
        ran = subprocess.run(
            [ROOT / script, '--dry_run', *own, *(['--', *program] if program else [])], cwd=ROOT,
            capture_output=True, text=True, timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
    else:
        defined = set(FLAG.findall((ROOT / script).read_text()))
        assert {word[2:].partition('=')[0] for word in own if word.startswith('--')} <= defined
    return 'launch'


def _extras(words: list[str]) -> None:
    """The extras that an installation asks for are those of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for word in words:
        for extra in re.findall(r'^\.\[(.+)\]$', word):
            assert set(extra.split(',')) <= set(setup['options.extras_require'])


@pytest.mark.parametrize('name', PAGES)
def test_commands_are_understood(name, monkeypatch):
    for page, command in found_commands():
        if page == name:
            with monkeypatch.context() as patch:
                try:
                    understood(command, patch)
                except (Exception, SystemExit) as error:
                    pytest.fail(f'{command}\n{type(error).__name__}: {error}')


def test_every_kind_of_command_is_found():
    # Lest a change of the pages' form leaves nothing to test.
    text = '\n'.join(command for _, command in found_commands())
    for part in ('tarflow_jax.main', 'tarflow_jax.data.prepare', 'benchmarks/', 'launch/tpu_vm.sh'):
        assert part in text


def test_a_wrong_command_is_seen(monkeypatch):
    program = 'python -m tarflow_jax.main --config=configs/fashion_mnist.py --workdir=x '
    for wrong, error in (
        (f'{program} --config.model.widht=3', ValueError),
        (f'{program} --config.model.width=65', ValueError),
        (f'{program} --input=a.pth', ValueError),
        ('python -m tarflow_jax.data.prepare a --out=b --sice=3', SystemExit),
        ('python benchmarks/scaling.py --nothing', AssertionError),
        ('launch/tpu_vm.sh up --nmae=flow', AssertionError),
        ("pip install -e '.[gpus]'", AssertionError),
        ('rm -rf x', AssertionError),
    ):
        with monkeypatch.context() as patch, pytest.raises(error):
            understood(wrong, patch)


# Fields and links.


def field(name: str):
    return operator.attrgetter(name)(configs.default())


GROUPS = '|'.join(key for key, value in configs.default().items() if hasattr(value, 'items'))


@pytest.mark.parametrize('name', PAGES)
def test_fields_exist(name):
    text = PAGES[name].read_text()
    named = re.findall(r'--config\.([a-z][a-z0-9_.]*[a-z0-9])', text)
    for span in spans(PAGES[name]):
        named += re.findall(rf'^(?:config\.)?((?:{GROUPS})\.[a-z0-9_.]+)(?:=.*)?$', span)
    for one in named:
        attribute = one.startswith('model.') and hasattr(TarFlow, one[6:])
        if one != 'field' and not one.endswith('.py') and not attribute:
            field(one)


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for text, target in re.findall(r'\[([^\]]+)\]\(([^)]+)\)', page.read_text()):
        if '://' in target:
            continue
        path = (page.parent / target.partition('#')[0]).resolve()
        assert path.exists(), target
        code = re.fullmatch(r'`([\w.]+)`', text)
        if code and path.suffix == '.py' and not code[1].endswith('.py'):
            last = code[1].rpartition('.')[2]
            assert re.search(
                rf'^\s*(def|class) {last}\b|^\s*{last}\b.*=|^\s*{last}:', path.read_text(), re.MULTILINE
            ), f'{path} defines no {last}'


# The official flags; their names only.
MODEL_FLAGS = 'dataset img_size channel_size patch_size channels blocks layers_per_block nvp'.split()
OFFICIAL = {
    'train.py': ['data', 'logdir', *MODEL_FLAGS] + (
        'noise_std noise_type cfg batch_size epochs lr drop_label sample_freq num_samples '
        'sample_batch_size resume no-nvp compile no-compile dry_run no-dry_run'
    ).split(),
    'evaluate_fid.py': ['data', 'logdir', *MODEL_FLAGS] + (
        'noise_std ckpt_file cfg attn_temp batch_size num_samples self_denoising_lr'
    ).split(),
    'evaluate_bpd.py': ['data', *MODEL_FLAGS, 'ckpt_file', 'num_classes', 'batch_size'],
    'prepare_fid_stats.py': ['data', 'dataset', 'img_size', 'channel_size', 'batch_size'],
}
ITARFLOW_MODEL = (
    'data logdir dataset img_size channel_size patch_sizes blocks channels layers_per_block nvp '
    'input_scale shared_backbone_layers'
).split()
ITARFLOW = {
    'train.py': ITARFLOW_MODEL + (
        'attn_dropout cfg batch_size epochs lr drop_label sample_freq save_freq ckpts_to_keep '
        'num_samples sample_batch_size denoising_batch_size ckpt_file exp_name tag debug fp16 t0 t1 '
        'xflip reweight t_sample clip dyn compile loss_scaling dry_run'
    ).split(),
    'evaluate_fid.py': ITARFLOW_MODEL + (
        'ckpt_file annealed_guidance cfg attn_temp num_samples sample_batch_size '
        'denoising_batch_size img_dir edm_eval clip itr_steps dyn lerp_style t0 t1 dtype ts '
        'guide_flows'
    ).split(),
    'prepare_fid_stats.py': 'data dataset img_size channel_size batch_size xflip'.split(),
}
OFFICIAL_PAGES = {'docs/from_the_official_code.md': OFFICIAL, 'docs/itarflow.md': ITARFLOW}


@pytest.mark.parametrize('page, script', [(p, s) for p in OFFICIAL_PAGES for s in OFFICIAL_PAGES[p]])
def test_every_official_flag_is_mapped(page, script):
    sections = re.split(r'^## ', PAGES[page].read_text(), flags=re.MULTILINE)
    section, = [s for s in sections if s.startswith(script)]
    named = re.findall(r'`--([\w-]+)`', section)
    assert set(OFFICIAL_PAGES[page][script]) <= set(named)


@pytest.mark.parametrize('page', OFFICIAL_PAGES)
def test_defaults_beside_the_official_ones(page):
    compared = 0
    for line in PAGES[page].read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split(' | ')]
        if not line.startswith('| `') or len(cells) != 4:
            continue
        fields = re.findall(rf'`(seed|(?:{GROUPS})\.(?!py\b)[a-z0-9_.]+)', cells[2])
        values = [value.strip('` ') for value in cells[3].split(';')]
        for name, value in zip(fields, values):
            if value not in (str(field(name)), repr(field(name))):
                assert float(value) == field(name), line
            compared += 1
    assert compared > 30


# One page for real.


@pytest.mark.slow
def test_your_images_for_real(tmp_path, monkeypatch):
    """Its commands one after another, on 60 images and with a flow that takes seconds."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (('train', 40), ('test', 20)):
        folder = tmp_path / 'pictures' / split
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(folder / f'{i}.png')
    small = [
        '--config.model.layers_per_block=(1,1)', '--config.model.width=64', '--config.model.patch_size=16',
        '--config.train.batch_size=8', '--config.train.epochs=1', '--config.train.warmup_epochs=0.2',
        '--config.sample.count=8', '--config.sample.batch_size=8', '--config.evaluate.batch_size=8',
    ]
    ran = []
    for command in simple_commands('\n'.join(
        b.text for b in fenced(PAGES['docs/your_images.md']) if b.language in LANGUAGES
    )):
        words = shlex.split(command)
        if words[1:3] == ['-m', 'tarflow_jax.data.prepare']:
            assert prepare.main(['prepare', *words[3:]]) == 0
            ran.append('prepare')
        elif words[1:3] == ['-m', 'tarflow_jax.main']:
            arguments = [re.sub(r'^--config=configs/', f'--config={ROOT}/configs/', a) for a in words[3:]]
            assert call(*arguments, *small) == 0, command
            ran.append(next((w[7:] for w in words if w.startswith('--mode=')), 'train'))
    assert ran == ['prepare', 'train', 'sample', 'evaluate']
    assert list(tmp_path.glob('runs/mine/samples/*/samples.npz'))
    assert (tmp_path / 'runs/mine/evaluation.json').exists()


# The cost of a run.


def run_cost():
    spec = importlib.util.spec_from_file_location('run_cost', ROOT / 'benchmarks' / 'run_cost.py')
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def rows(page: str, columns: int) -> list[list[str]]:
    """The cells of the page's tables that have so many columns."""
    lines = PAGES[page].read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line[:1] == '|']
    return [row for row in cells if len(row) == columns]


def test_the_table_of_costs_follows_from_that_of_steps():
    predicted = {row[0]: row for row in rows('docs/pods.md', 7) if row[0].startswith('v')}
    table = [row for row in rows('docs/cloud_tpu.md', 7) if row[0].startswith('v')]
    assert len(table) == 4
    for topology_, chips, batch, seconds, steps, hours, chip_hours in table:
        assert predicted[topology_][1] == chips and predicted[topology_][4] == f'{seconds} s'
        run = run_cost().cost(float(seconds), int(chips), int(batch), 1_281_167, 200)
        assert (str(run.steps), f'{run.hours:.1f}', f'{run.chip_hours:.0f}') == (steps, hours, chip_hours)
        assert int(batch) == 16 * int(chips)


def test_the_measured_range_beside_every_predicted_step():
    compared = [row for row in rows('docs/pods.md', 7) if row[0].startswith('v')]
    assert len(compared) == 6
    for topology_, _, _, _, step, measured, _ in compared:
        (low, high), _ = measured_range(topology_.partition(':')[0])
        seconds = float(step.removesuffix(' s'))
        assert measured == f'{low * seconds:.2f} to {high * seconds:.2f} s', topology_


def test_lines_of_costs():
    found = [
        dict(topology='v5e:4x4', chips=16, batch_size=256, predicted_step_seconds=0.5),
        dict(topology='v5e:2x2', chips=4, batch_size=64, predicted_step_seconds=None),
    ]
    head, fits, not_ = run_cost().lines(found, images=2560, epochs=720, price=2.0, slowdown=2.0)
    assert head.split()[-4:] == ['hours', 'chip-hours', 'measured', 'price']
    assert fits.split() == ['v5e:4x4', '16', '256', '1.000', '7200', '2.0', '32', '-', '64.00']
    assert 'does not fit' in not_
    found[0]['measured_over_predicted'] = (1.25, 1.5)
    _, fits, _ = run_cost().lines(found, images=2560, epochs=720, price=None, slowdown=1.0)
    assert fits.split()[-4:] == ['1.0', '16', '20-24', '-']
