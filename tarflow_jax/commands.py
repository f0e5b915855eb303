"""The modes of the command line.

Each function checks for all user errors and returns the work as a closure. An exception before that
is a user error, and nothing has been compiled yet.
"""

import functools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import jax
import optax

from tarflow_jax import class_order, comparing, files, paths, reporting, run_checks, scoring, uses
from tarflow_jax import command_setup as setup
from tarflow_jax import config as configs
from tarflow_jax import convert as official
from tarflow_jax.evaluation import bulk, sample_files, schedules
from tarflow_jax.evaluation.scores import Subject
from tarflow_jax.training import loop, profiling, wandb_writer
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.state import from_variables

log = logging.getLogger(__name__)


def train(config, given) -> Callable[[], None]:
    """Trains, then samples, evaluates and writes the report."""
    workdir, plan, mesh = setup.of(config, given, 'profile_steps')
    if config.train.wandb_project:
        wandb_writer.check(config.train.wandb_project)
    source = configs.source(config, 'train', plan.model)
    test_source = configs.source(config, 'test', plan.model)
    needed = run_checks.training(config, plan, mesh)
    if config.train.validate_every:
        run_checks.scoring(config, plan, mesh, test_source)
    run_checks.sample_set(config, plan, mesh, workdir)
    plan = plan.with_features_of(test_source).with_class_names(source.class_names)
    schedule = configs.schedule(config, source)
    run_checks.batches(config, mesh, source)
    profiled = range(0)
    if given.profile_steps:
        profiled = profiling.steps_of(given.profile_steps, schedule.total_steps)
    classes = class_order.of_source(plan.model, source)
    remembered = classes.remembered() | {'set': run_checks.set_name(source)}
    checkpoints = Checkpoints(workdir, plan.model, config.to_dict(), remembered)
    if checkpoints.latest() is not None:
        run_checks.same_run(checkpoints, config, schedule, classes, remembered['set'])
    subject = Subject(config, plan, mesh, workdir, test_source)
    scores = scoring.prepare(subject)
    alone = jax.process_count() == 1
    show = reporting.prepare(subject, source) if config.report.after_training and alone else None

    def job():
        latest = checkpoints.latest()
        setup.announce(
            given.mode, plan.model, mesh,
            data=f'{run_checks.set_name(source)}; {run_checks.set_name(test_source)}',
            **setup.caution(config, source),
            steps=f'{schedule.total_steps} of {config.train.batch_size} images '
            f'({config.train.epochs:g} epochs), '
            + ('from the first' if latest is None else f'resuming after step {latest}'),
            then=f'{config.sample.count} samples if a score needs them; scores: '
            f'{", ".join(config.evaluate.metrics) or "none"}',
            memory=needed, output=f'{workdir}: checkpoints, metrics, samples, evaluation.json',
        )
        with checkpoints:
            state = loop.train(
                config, plan, schedule, source, test_source, checkpoints, workdir, mesh, profiled
            )
        variables, origin = state.variables(), setup.at_step(int(state.step), workdir)
        draw = functools.partial(sample_set, config, plan, variables, origin, mesh, workdir)
        scores(variables, origin, draw)
        if show:
            show(variables, origin)
        elif config.report.after_training:
            log.info('no report with several processes; run --mode=report in one process')
        log.info('image grids are in %s, metrics in %s', workdir / 'samples', workdir)

    return job


def sample(config, given) -> Callable[[], None]:
    """Samples config.sample.count images, or the missing ones; see `evaluation.bulk`."""
    workdir, plan, mesh = setup.of(config, given, 'input', 'step', 'gif')
    uses.check_gif(given.gif)
    needed = run_checks.sample_set(config, plan, mesh, workdir, always=True)
    if plan.model.num_features:
        plan = plan.with_features_of(configs.source(config, 'test', plan.model))
    variables, origin, known = setup.variables_of(plan, workdir, given, mesh)
    variables, known = class_order.at_hand(config.data, plan.model, variables, known, origin)
    plan = plan.with_class_names(known.known_names)

    def job():
        s = config.sample
        classes = plan.conditions.name(s.label) if s.label >= 0 else 'all classes in turn'
        setup.announce(
            given.mode, plan.model, mesh, checkpoint=origin['name'],
            samples=f'{s.count} in batches of {s.batch_size}, '
            f'{classes if plan.model.num_classes else "no classes"}, guidance '
            f'{plan.guidance.weight:g}, {s.method}',
            memory=needed, output=f'{workdir / "samples"}, as {s.format}',
        )
        _, summary = sample_set(config, plan, variables, origin, mesh, workdir)
        log.info(
            '%d samples of %s (%d new, in %.1f s; %d sampled again as not finite) are in %s',
            summary['count'], origin['name'], summary['drawn'], summary['seconds'],
            summary['redrawn'], summary['path'],
        )
        if given.gif:
            uses.write_gif(given.gif, plan, variables, mesh, config.seed, s.count)

    return job


def sample_set(config, plan, variables, origin: dict, mesh, workdir: Path):
    """Opens config.sample.count samples in WORKDIR/samples, sampling those that are missing.

    Returns:
      (source, summary): the images, see `data.sources`, and the result of `bulk.draw_set`.
    """
    s, step = config.sample, origin.get('step')
    name = re.sub(r'[^\w.-]', '_', Path(origin['name']).stem)
    name = name if step is None else f'step_{step:07d}'
    tolerance = s.tolerance if s.method == 'auto' else None
    known = bulk.fingerprint(plan, variables, name, seed=config.seed, tolerance=tolerance)
    folder = workdir / 'samples' / bulk.folder_name(known)
    log.info('samples go to %s', folder)
    schedule, about = None, sample_files.read_about(folder)
    if tolerance and (about is None or about['count'] < s.count):
        schedule = schedules.schedule_of(
            workdir / 'schedules' / f'{folder.name}.json', plan, variables,
            batch_size=min(s.batch_size, s.count), tolerance=tolerance, mesh=mesh,
        )
    summary = bulk.draw_set(
        folder, plan, variables, count=s.count, batch_size=s.batch_size, mesh=mesh,
        fingerprint=known, file_format=s.format, schedule=schedule, seed=config.seed,
    )
    return sample_files.open_samples(folder, s.count), summary


def evaluate(config, given) -> Callable[[], None]:
    """Scores the flow on the test set with config.evaluate.metrics; writes evaluation.json."""
    workdir, plan, mesh = setup.of(config, given, 'input', 'step')
    source = configs.source(config, 'test', plan.model)
    needed = run_checks.scoring(config, plan, mesh, source)
    run_checks.sample_set(config, plan, mesh, workdir)
    plan = plan.with_features_of(source).with_class_names(source.class_names)
    scores = scoring.prepare(Subject(config, plan, mesh, workdir, source))
    variables, origin, known = setup.variables_of(plan, workdir, given, mesh)
    variables = class_order.in_order(plan.model, variables, known, source, origin)
    draw = functools.partial(sample_set, config, plan, variables, origin, mesh, workdir)

    def job():
        setup.announce(
            given.mode, plan.model, mesh, checkpoint=origin['name'],
            data=run_checks.set_name(source), **setup.caution(config, source),
            scores=', '.join(config.evaluate.metrics) or 'none', memory=needed,
            output=str(workdir / 'evaluation.json'),
        )
        scores(variables, origin, draw)

    return job


def report(config, given) -> Callable[[], None]:
    """Writes report.html, one page about the workdir's flow."""
    workdir, plan, mesh = setup.of(config, given, 'step')
    train_source = configs.source(config, 'train', plan.model)
    test_source = configs.source(config, 'test', plan.model)
    run_checks.scoring(config, plan, mesh, test_source)
    plan = plan.with_features_of(test_source).with_class_names(train_source.class_names)
    subject = Subject(config, plan, mesh, workdir, test_source)
    show = reporting.prepare(subject, train_source)
    variables, origin, known = setup.variables_of(plan, workdir, given, mesh)
    variables = class_order.in_order(plan.model, variables, known, train_source, origin)

    def job():
        setup.announce(
            given.mode, plan.model, mesh, checkpoint=origin['name'],
            data=f'{run_checks.set_name(train_source)}; {run_checks.set_name(test_source)}',
            **setup.caution(config, train_source),
            output=str(workdir / 'report.html'),
        )
        show(variables, origin)

    return job


def compare(workdirs: list[str], given) -> Callable[[], None]:
    """Writes the page that compares several runs; see `comparing`."""
    setup.only(given, 'workdir')
    if given.config is not None:
        raise ValueError(
            f'--config has no effect with several runs, --workdir={given.workdir}; leave it out.'
        )
    return comparing.prepare(workdirs)


def convert(config, given) -> Callable[[], None]:
    """Converts an official checkpoint to step 0 of a workdir, or a workdir to an official one."""
    setup.only(given, 'workdir', 'input', 'output', 'step')
    input_file, output_file = given.input, given.output
    plan, mesh = setup.plan_of(config)
    if jax.process_count() > 1:
        raise ValueError('--mode=convert supports one process only; start a single process.')
    if not (input_file or output_file):
        raise ValueError(
            '--mode=convert needs --input=FILE (an official checkpoint, to --workdir) or '
            '--output=FILE.safetensors (from --workdir, or from --input).'
        )
    if given.step and not output_file:
        raise ValueError(
            f'--step={given.step} has no effect without --output; leave it out.'
        )
    if output_file:
        if not output_file.endswith('.safetensors'):
            raise ValueError(f'--output {output_file} must end with .safetensors.')
        paths.check_writable_file(output_file, f'--output={output_file}')
        origin_dir = None if input_file else setup.workdir_of(given.workdir)
        variables, origin, known = setup.variables_of(plan, origin_dir, given, mesh)
        found, names = class_order.official_rows(known)

        def write():
            setup.announce(
                given.mode, plan.model, mesh, checkpoint=origin['name'], output=output_file
            )
            official.save_official(
                class_order.reorder(variables, found), plan.model, output_file, names
            )
            log.info('wrote %s to %s', origin['name'], output_file)

        return write

    workdir = setup.workdir_of(given.workdir)
    variables = official.load_official(input_file, plan.model)
    known, origin = setup.classes_in(input_file), {'name': input_file}
    variables, known = class_order.at_hand(config.data, plan.model, variables, known, origin)
    checkpoints = Checkpoints(workdir, plan.model, config.to_dict(), known.remembered())
    if checkpoints.latest() is not None:
        raise ValueError(
            f'{workdir} already has a checkpoint at step {checkpoints.latest()}; choose an empty '
            '--workdir.'
        )

    def store():
        setup.announce(
            given.mode, plan.model, mesh, checkpoint=input_file, output=str(checkpoints.folder)
        )
        # The optimizer starts from a new state, whose structure does not depend on its settings.
        optimizer = configs.optimizer(config, optax.constant_schedule(0.0))
        state = from_variables(variables, optimizer, ema=plan.recipe.ema_decay > 0)
        with checkpoints:
            checkpoints.save(state)
            checkpoints.wait()
        log.info('wrote %s to step 0 of %s', input_file, workdir)

    return store


def compile_ahead(config, given) -> Callable[[], None]:
    """Compiles a step for each TPU topology and prints its cost; needs no TPU."""
    # Only this mode needs these imports.
    from tarflow_jax.ahead_of_time import report as cost_report
    from tarflow_jax.ahead_of_time import topology

    setup.only(given, 'topology', 'program', 'batch_per_chip', 'json', 'out')
    if not given.topology:
        raise ValueError(
            '--mode=compile needs --topology, such as v5e:16x16 or v5e:4x4,v5e:16x16.'
        )
    for name in given.topology:
        topology.check(name)
    if given.json:
        paths.check_writable_file(given.json, f'--json={given.json}')
    out = paths.writable_folder(given.out, f'--out={given.out}') if given.out else None
    found = [topology.describe(name) for name in given.topology]
    setups = []
    for slice_ in found:
        own = config.copy_and_resolve_references()
        if given.batch_per_chip:
            own[given.program].batch_size = given.batch_per_chip * slice_.chips
        cost_report.planned(own, slice_, given.program)  # raises for all user errors
        setups.append((own, slice_))

    def job():
        setup.announce(
            given.mode, configs.plan(config).model, None, program=f'the step of {given.program}',
            topologies=', '.join(given.topology),
            output=', '.join(filter(None, (given.json, given.out))) or 'printed only',
        )
        rows = []
        for own, slice_ in setups:
            row = cost_report.compile_for(own, slice_, given.program, out)
            print(*cost_report.lines(row), sep='\n', flush=True)
            if not row['fits']:
                better = cost_report.smallest_change(own, slice_, given.program)
                row['smallest_change'] = better and better['change']
                print('  remedy       ' + (
                    f'fits with {better["change"]}: {better["hbm_total_bytes"] / 2**30:.2f} GiB'
                    if better else 'none found; take more chips, or chips with more memory'
                ), flush=True)
            rows.append(row)
            if given.json:  # write it after each topology, so that Ctrl-C keeps the results
                files.write_text(given.json, json.dumps(rows, indent=2) + '\n')
        if len(rows) > 1:
            print(*cost_report.table(rows), sep='\n', flush=True)
        if given.json:
            log.info('wrote the numbers to %s', given.json)
        if given.out:
            log.info('wrote the compiled programs to %s', given.out)

    return job


MODES = {
    'train': train,
    'sample': sample,
    'evaluate': evaluate,
    'report': report,
    'likelihood': uses.likelihood,
    'interpolate': uses.interpolate,
    'complete': uses.complete,
    'convert': convert,
    'compile': compile_ahead,
}
# The state after Ctrl-C, if the mode has not logged it itself.
INTERRUPTED = {
    'train': 'the checkpoints are kept; run the same command again to resume from the newest',
    'sample': 'finished batches are kept; run the same command again to resume',
    'evaluate': 'no scores were written, but samples are kept; run the same command again to '
    'compute the scores',
    'report': 'no report was written and an old one is kept; run the same command again',
    'likelihood': 'no table was written; run the same command again',
    'interpolate': 'no picture was written; run the same command again',
    'complete': 'no picture was written; run the same command again',
    'convert': 'the checkpoint is either complete or missing; run the same command again',
    'compile': 'finished topologies are printed above; run the same command again',
}
