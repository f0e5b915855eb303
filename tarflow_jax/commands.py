"""What the modes of the command line do.

Each function here checks everything a user can get wrong and returns the work as a closure:
whatever is raised before that is the user's to mend, and nothing has been compiled by then.
"""

import functools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import jax
import optax

from tarflow_jax import class_order, files, paths, reporting, run_checks, scoring, uses
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
            + ('from the first' if latest is None else f'going on after step {latest}'),
            then=f'{config.sample.count} samples if a score needs them; scores: '
            f'{", ".join(config.evaluate.metrics) or "none"}',
            memory=needed, output=f'{workdir}: checkpoints, metrics, samples, evaluation.json',
        )
        with checkpoints:
            state = loop.train(
                config, plan, schedule, source, checkpoints, workdir, mesh, profiled
            )
        variables, origin = state.variables(), setup.at_step(int(state.step), workdir)
        draw = functools.partial(sample_set, config, plan, variables, origin, mesh, workdir)
        scores(variables, origin, draw)
        if show:
            show(variables, origin)
        elif config.report.after_training:
            log.info('several processes write no report; --mode=report, started alone, does')
        log.info('pictures are in %s, metrics in %s', workdir / 'samples', workdir)

    return job


def sample(config, given) -> Callable[[], None]:
    """Draws config.sample.count images, or those that are missing: see `evaluation.bulk`."""
    workdir, plan, mesh = setup.of(config, given, 'input', 'gif')
    uses.check_gif(given.gif)
    needed = run_checks.sample_set(config, plan, mesh, workdir, always=True)
    if plan.model.num_features:
        plan = plan.with_features_of(configs.source(config, 'test', plan.model))
    variables, origin, known = setup.variables_of(plan, workdir, given.input, mesh)
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
            '%d samples of %s (%d drawn now, in %.1f s; %d drawn again as not finite) are in %s',
            summary['count'], origin['name'], summary['drawn'], summary['seconds'],
            summary['redrawn'], summary['path'],
        )
        if given.gif:
            uses.write_gif(given.gif, plan, variables, mesh, config.seed, s.count)

    return job


def sample_set(config, plan, variables, origin: dict, mesh, workdir: Path):
    """config.sample.count samples in a folder of WORKDIR/samples, drawn where they are not there.

    Returns:
      (source, summary): the images, see `data.sources`, and what `bulk.draw_set` returns.
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
    workdir, plan, mesh = setup.of(config, given, 'input')
    source = configs.source(config, 'test', plan.model)
    needed = run_checks.scoring(config, plan, mesh, source)
    run_checks.sample_set(config, plan, mesh, workdir)
    plan = plan.with_features_of(source).with_class_names(source.class_names)
    scores = scoring.prepare(Subject(config, plan, mesh, workdir, source))
    variables, origin, known = setup.variables_of(plan, workdir, given.input, mesh)
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
    """Writes report.html: what the workdir's flow has learned, on one page."""
    workdir, plan, mesh = setup.of(config, given)
    train_source = configs.source(config, 'train', plan.model)
    test_source = configs.source(config, 'test', plan.model)
    run_checks.scoring(config, plan, mesh, test_source)
    plan = plan.with_features_of(test_source).with_class_names(train_source.class_names)
    subject = Subject(config, plan, mesh, workdir, test_source)
    show = reporting.prepare(subject, train_source)
    variables, origin, known = setup.variables_of(plan, workdir, None, mesh)
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


def convert(config, given) -> Callable[[], None]:
    """Official checkpoint into a workdir as step 0, or out of a workdir (averaged parameters)."""
    setup.only(given, 'workdir', 'input', 'output')
    input_file, output_file = given.input, given.output
    plan, mesh = setup.plan_of(config)
    if jax.process_count() > 1:
        raise ValueError('--mode=convert is for one process; start it alone.')
    if not (input_file or output_file):
        raise ValueError(
            '--mode=convert needs --input=FILE (an official checkpoint, to --workdir) or '
            '--output=FILE.safetensors (from --workdir, or from --input).'
        )
    if output_file:
        if not output_file.endswith('.safetensors'):
            raise ValueError(f'--output {output_file} must end with .safetensors.')
        paths.check_writable_file(output_file, f'--output={output_file}')
        origin_dir = None if input_file else setup.workdir_of(given.workdir)
        variables, origin, known = setup.variables_of(plan, origin_dir, input_file, mesh)
        found, names = class_order.official_rows(known)

        def write():
            setup.announce(
                given.mode, plan.model, mesh, checkpoint=origin['name'], output=output_file
            )
            official.save_official(
                class_order.reorder(variables, found), plan.model, output_file, names
            )
            log.info('%s is now %s', origin['name'], output_file)

        return write

    workdir = setup.workdir_of(given.workdir)
    variables = official.load_official(input_file, plan.model)
    known, origin = setup.classes_in(input_file), {'name': input_file}
    variables, known = class_order.at_hand(config.data, plan.model, variables, known, origin)
    checkpoints = Checkpoints(workdir, plan.model, config.to_dict(), known.remembered())
    if checkpoints.latest() is not None:
        raise ValueError(
            f'{workdir} already holds a checkpoint at step {checkpoints.latest()}; choose an empty '
            '--workdir.'
        )

    def store():
        setup.announce(
            given.mode, plan.model, mesh, checkpoint=input_file, output=str(checkpoints.folder)
        )
        # The optimizer starts afresh: the structure of its state does not depend on its settings.
        optimizer = configs.optimizer(config, optax.constant_schedule(0.0))
        state = from_variables(variables, optimizer, ema=plan.recipe.ema_decay > 0)
        with checkpoints:
            checkpoints.save(state)
            checkpoints.wait()
        log.info('%s is now step 0 of %s', input_file, workdir)

    return store


def compile_ahead(config, given) -> Callable[[], None]:
    """Compiles a step for each of the TPU topologies and prints what it costs; needs no TPU."""
    # Imported here: the other modes need nothing of it.
    from tarflow_jax.ahead_of_time import report as cost_report
    from tarflow_jax.ahead_of_time import topology

    setup.only(given, 'topology', 'program', 'batch_per_chip', 'json', 'out')
    if not given.topology:
        raise ValueError('--mode=compile needs --topology, such as v5e:16x16 (several: a comma).')
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
        cost_report.planned(own, slice_, given.program)  # whatever cannot be says so here
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
            if given.json:  # now, so that Ctrl-C leaves what is known
                files.write_text(given.json, json.dumps(rows, indent=2) + '\n')
        if len(rows) > 1:
            print(*cost_report.table(rows), sep='\n', flush=True)
        if given.json:
            log.info('the numbers are in %s', given.json)
        if given.out:
            log.info('the compiled programs are in %s', given.out)

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
# What Ctrl-C leaves behind, where the mode has not said so itself.
INTERRUPTED = {
    'train': 'the checkpoints are as they were; the same command goes on from the newest',
    'sample': 'the batches that were drawn are kept; the same command goes on from there',
    'evaluate': 'no scores were written, samples that were drawn are kept; the same command '
    'starts the scores again',
    'report': 'no report was written, one from before is as it was; the same command starts again',
    'likelihood': 'no table was written; the same command starts again',
    'interpolate': 'no picture was written; the same command starts again',
    'complete': 'no picture was written; the same command starts again',
    'convert': 'a checkpoint is there whole or not at all; the same command starts again',
    'compile': 'what was compiled is printed above; the same command starts again',
}
