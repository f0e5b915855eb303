"""Stand-ins for gcloud, kubectl, srun, python and so on, which record and play a script."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'

# Answers are taken in order, the first whose `when` is among the arguments; each is used once,
# unless it is `always`.
_STUB = '''#!{python} -IS
import fcntl, json, os, signal, sys, time
folder = {folder!r}
name = os.path.basename(sys.argv[0])
kept = ('JAX_', 'XLA_', 'CUDA_')
env = {{k: v for k, v in os.environ.items() if k.startswith(kept)}}
text = sys.stdin.read() if name == 'kubectl' else None
with open(folder + '/lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(folder + '/calls.jsonl', 'a') as f:
        f.write(json.dumps(dict(argv=[name, *sys.argv[1:]], env=env, pid=os.getpid(), stdin=text)) + '\\n')
    path = folder + '/' + name + '.json'
    answers = json.load(open(path)) if os.path.exists(path) else []
    answer = {{}}
    for i, a in enumerate(answers):
        if a.get('when', '') in ' '.join(sys.argv[1:] + [k + '=' + v for k, v in env.items()]):
            answer = a
            if not a.get('always'):
                del answers[i]
            json.dump(answers, open(path, 'w'))
            break
sys.stdout.write(answer.get('out', ''))
sys.stderr.write(answer.get('err', ''))
sys.stdout.flush()
if 'hang' in answer:
    def leave(number, frame):
        with open(folder + '/signals', 'a') as f:
            f.write(str(number) + '\\n')
        if answer['hang'] is not None:
            os._exit(answer['hang'])
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    open(folder + '/hanging.' + str(os.getpid()), 'w').close()
    while True:
        time.sleep(60)
if 'kill' in answer:
    os.kill(os.getpid(), answer['kill'])
time.sleep(answer.get('sleep', 0))
sys.exit(answer.get('code', 0))
'''


class Stubs:
    """A folder of stubs, the scripts run with it, and what was called."""

    def __init__(self, folder):
        self.folder = folder
        (folder / 'bin').mkdir()
        text = _STUB.format(python=sys.executable, folder=str(folder))
        for name in 'gcloud kubectl srun scontrol scancel curl python'.split():
            path = folder / 'bin' / name
            path.write_text(text)
            path.chmod(0o755)
        self.env = {k: v for k, v in os.environ.items()
                    if not k.startswith(('JAX_', 'XLA_', 'CUDA_', 'SLURM_'))}
        self.env.update(PATH=f'{folder}/bin:{os.environ["PATH"]}', TMPDIR=str(folder))

    def answer(self, name, *answers):
        """What the stub `name` does, call by call; see the top."""
        (self.folder / f'{name}.json').write_text(json.dumps(answers))

    def start(self, script, *args, **env):
        return subprocess.Popen(
            [LAUNCH / script, *map(str, args)], env=self.env | env, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    def run(self, script, *args, **env):
        """Runs to the end; (code, stdout, stderr)."""
        process = self.start(script, *args, **env)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        return process.returncode, out, err

    @property
    def records(self):
        path = self.folder / 'calls.jsonl'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def calls(self):
        return [record['argv'] for record in self.records]

    def wait_for(self, condition):
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until, 'waited too long'
            time.sleep(0.02)

    def wait_hanging(self, count=1):
        self.wait_for(lambda: len(list(self.folder.glob('hanging.*'))) >= count)

    @property
    def signals(self):
        path = self.folder / 'signals'
        return [signal.Signals(int(n)).name for n in path.read_text().split()] if path.exists() else []

    def assert_all_ended(self):
        """Nothing that was called is alive, nor anything else whose environment is of this test."""
        until = time.monotonic() + 5
        while left := self._alive():
            assert time.monotonic() < until, left
            time.sleep(0.05)

    def _alive(self):
        mark = f'TMPDIR={self.folder}\0'.encode()
        found = []
        for process in pathlib.Path('/proc').glob('[0-9]*'):
            try:
                if mark in (process / 'environ').read_bytes():
                    found.append((process / 'cmdline').read_text())
            except OSError:
                pass
        return found


@pytest.fixture
def stubs(tmp_path):
    # Tests in the background of a shell ignore SIGINT; bash cannot trap what it inherits so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stubs = Stubs(tmp_path)
        yield stubs
        stubs.assert_all_ended()
    finally:
        signal.signal(signal.SIGINT, before)


def commands(text):
    """Lines of shell as argument lists."""
    return [shlex.split(line) for line in text.splitlines()]


@pytest.fixture
def as_commands():
    return commands


@pytest.fixture
def hard_args():
    """Arguments that only exact quoting keeps."""
    return ['--config=configs/a b.py', '--config.model.layers_per_block=(4,4)', "it's", '$HOME `x`',
            '$(PATH) $$', '--', '*', '"q" \\ &', '']
