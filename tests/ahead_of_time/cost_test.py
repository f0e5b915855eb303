"""Costs of TPU programs against arithmetic, against XLA's own analysis, and against each other.

Programs are compiled for a slice of 4 x 4 chips of v5e by the TPU compiler; no TPU takes part.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tarflow_jax.ahead_of_time import cost, hlo
from tarflow_jax.ahead_of_time.chips import CHIPS, HOP_SECONDS, Slice, out_of_memory
from tarflow_jax.ahead_of_time.counting import Counter

P = PartitionSpec
V5E = CHIPS['v5e']
WHERE = Slice(V5E, (4, 4))
analyse = functools.partial(cost.analyse, where=WHERE)


def once(loop, count):
    """Every loop's body counted once, as XLA's cost_analysis() does."""
    return 1


@pytest.fixture(scope='module')
def mesh():
    pytest.importorskip('libtpu')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:4x4')
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    devices = sorted(topology.devices, key=lambda device: tuple(device.coords))
    yield Mesh(np.array(devices).reshape(4, 4), ('a', 'b'))
    jax.config.update('jax_enable_compilation_cache', cached)


def compiled(mesh, function, *arrays):
    """The function compiled for (shape, dtype, spec) arrays."""
    abstract = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arrays
    ]
    return jax.jit(function).lower(*abstract).compile()


def memory_bytes(text, costs) -> dict[str, float]:
    """Bytes of all memories by instruction, times the runs of each."""
    module = hlo.parse(text)
    counter = Counter(module, WHERE, None)
    inside = {i.name: c for c in module.computations.values() for i in c.instructions}
    found = {}
    for line in costs.lines:
        moved = counter.moved(inside[line.instruction.name], line.instruction)
        found[line.instruction.name] = line.times * sum(size for _, size in moved)
    return found


def as_xla_counts(text, costs):
    """Bytes in all memories with XLA's double counting of asynchronous copies.

    Once when they start and again when they are done: a copy's results at both and at its start
    the operand's alias too, a slice's results at both.
    """
    each = memory_bytes(text, costs)
    total = sum(each.values())
    for line in costs.lines:
        if line.instruction.opcode == 'copy-start':
            total += each[line.instruction.name]
        elif line.instruction.opcode == 'slice-start':
            total += each[line.instruction.name] / 2
    return total


# Compiled programs


def test_matmul_exactly(mesh):
    m, k, n = 1024, 2048, 4096
    program = compiled(mesh, jnp.matmul, ((m, k), jnp.bfloat16, P()), ((k, n), jnp.bfloat16, P()))
    costs = analyse(program.as_text())
    assert costs.total('flops') == costs.total('mxu_flops') == 2 * m * k * n
    assert costs.total('flops') == program.cost_analysis()['flops']
    assert costs.total('hbm_bytes') == 2 * (m * k + k * n + m * n)
    assert as_xla_counts(program.as_text(), costs) == pytest.approx(program.cost_analysis()['bytes accessed'], 1e-3)
    assert costs.compute_seconds == 2 * m * k * n / 197e12
    assert costs.memory_seconds <= costs.predicted_seconds <= costs.compiler_seconds
    assert costs.compiler_seconds == pytest.approx(costs.predicted_seconds, 0.15)
    assert not costs.collectives and costs.largest_moved() is None


@pytest.mark.parametrize(
    'dtype, precision, passes',
    [
        ('float32', 'highest', 6),
        ('float32', 'high', 3),
        ('float32', None, 1),
        ('bfloat16', 'highest', 1),
    ],
)
def test_float32_takes_several_passes(mesh, dtype, precision, passes):
    product = functools.partial(jnp.matmul, precision=precision)
    program = compiled(mesh, product, *[((512, 512), dtype, P())] * 2)
    costs = analyse(program.as_text())
    assert costs.total('flops') == 2 * 512**3
    assert costs.total('mxu_flops') == passes * 2 * 512**3


def test_a_scan_costs_its_layers(mesh):
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def unrolled(x, weights):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    arrays = ((4096, 1024), jnp.bfloat16, P()), ((6, 1024, 1024), jnp.bfloat16, P())
    loop, flat = (compiled(mesh, f, *arrays).as_text() for f in (scanned, unrolled))
    flops = 2 * 4096 * 1024 * 1024
    assert analyse(loop).total('flops') == analyse(flat).total('flops') == 6 * flops
    assert analyse(loop, trip_count=once).total('flops') == flops
    # both read every weight once; the loop may move the activations too
    weights = 6 * 1024 * 1024 * 2
    bodies = analyse(loop).total('hbm_bytes') - analyse(loop, trip_count=once).total('hbm_bytes')
    assert bodies >= 5 / 6 * weights
    assert analyse(flat).total('hbm_bytes') >= weights
    assert analyse(loop).predicted_seconds == pytest.approx(analyse(flat).predicted_seconds, 0.5)


def test_nested_loops_multiply(mesh):
    def power(x):
        inner = lambda i, x: jnp.tanh(x @ x)  # noqa: E731
        return jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.fori_loop(2, 5, inner, x), x)

    costs = analyse(compiled(mesh, power, ((512, 512), jnp.float32, P())).as_text())
    assert costs.total('flops') == 5 * 3 * 2 * 512**3


def test_a_loop_of_unknown_length_is_refused(mesh):
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x @ x, x)

    text = compiled(mesh, until, ((512, 512), jnp.float32, P())).as_text()
    with pytest.raises(ValueError, match='while.*is unknown'):
        analyse(text)
    assert analyse(text, trip_count=lambda loop, count: 7).total('flops') == 7 * 2 * 512**3


def test_collectives_exactly(mesh):
    def exchange(x, y, z, w, v):
        return (
            jax.lax.all_gather(x, 'a', tiled=True),
            jax.lax.psum_scatter(y, 'b', tiled=True),
            jax.lax.ppermute(z, 'a', [(i, (i + 1) % 4) for i in range(4)]),
            jax.lax.all_to_all(w, 'b', 0, 0, tiled=True),
            jax.lax.psum(v, ('a', 'b')),
        )

    inputs = P('a'), P(), P('a'), P('b'), P(('a', 'b'))
    outputs = P(), P('b'), P('a'), P('b'), P()
    function = jax.shard_map(
        exchange, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )
    program = compiled(mesh, function, *[((1024, 2048), jnp.float32, spec) for spec in inputs])
    costs = analyse(program.as_text())
    size = 1024 * 2048 * 4
    assert costs.by_kind() == {
        'all-gather': (1, size),
        'reduce-scatter': (1, size),
        'collective-permute': (1, size // 4),
        'all-to-all': (1, size // 4),
        'all-reduce': (1, size // 16),
    }
    found = {line.work.collective.kind: line.work.collective for line in costs.collectives}
    rows = {tuple(range(i, i + 4)) for i in range(0, 16, 4)}
    assert set(found['reduce-scatter'].groups) == set(found['all-to-all'].groups) == rows
    assert set(found['all-gather'].groups) == {tuple(range(i, 16, 4)) for i in range(4)}
    assert set(found['collective-permute'].groups) == {(i, (i + 4) % 16) for i in range(16)}
    assert [max(map(len, found[kind].groups)) for kind in ('all-gather', 'all-reduce')] == [4, 16]
    assert costs.largest_moved().work.collective.largest.dims == (1024, 2048)
    assert 'all_gather' in costs.collectives[-1].op_name
    assert costs.exposed_seconds <= costs.interconnect_seconds <= costs.predicted_seconds


def test_data_parallel_training_moves_only_gradients(mesh):
    """Flops and bytes agree with XLA's, loops counted once; all-reduce carries the gradients."""

    def loss(weights, x):
        def layer(x, w):
            h = jnp.tanh((x @ w[0]).astype(jnp.float32)).astype(x.dtype)
            return x + h @ w[1], None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)

    arrays = ((4, 2, 1024, 1024), jnp.bfloat16, P()), ((32768, 1024), jnp.bfloat16, P(('a', 'b')))
    program = compiled(mesh, jax.grad(loss), *arrays)
    xla = program.cost_analysis()
    costs = analyse(program.as_text(), trip_count=once)
    assert costs.total('flops') == pytest.approx(xla['flops'], 0.01)
    assert as_xla_counts(program.as_text(), costs) == pytest.approx(xla['bytes accessed'], 0.1)
    costs = analyse(program.as_text())
    # per layer 2 products forward, 2 x 2 backward, and the first again for the backward
    product = 2 * 2048 * 1024 * 1024
    assert costs.total('flops') == 4 * 7 * product
    assert set(costs.by_kind()) == {'all-reduce'}
    gradients = 4 * 2 * 1024 * 1024 * 2
    assert gradients <= costs.by_kind()['all-reduce'][1] <= 2 * gradients + 1024
    assert all(max(map(len, line.work.collective.groups)) == 16 for line in costs.collectives)


def test_pallas_kernels_tell_their_cost_or_are_reported(mesh):
    def double(x, estimate):
        kernel = lambda x, out: out.__setitem__(..., x[...] * 2)  # noqa: E731
        call = pl.pallas_call(kernel, jax.typeof(x), name='double', cost_estimate=estimate)
        return call(x)

    def program(estimate):
        function = jax.shard_map(
            functools.partial(double, estimate=estimate), mesh=mesh, in_specs=P('a'),
            out_specs=P('a'), check_vma=False,
        )  # fmt: skip
        return compiled(mesh, function, ((1024, 512), jnp.float32, P('a'))).as_text()

    silent = analyse(program(None))
    ((name, times),) = silent.uncounted_kernels().items()
    assert 'double' in name and times == 1
    assert silent.total('flops') == 0 and silent.total('hbm_bytes') == 2 * 256 * 512 * 4
    told = analyse(program(None), kernel_cost=lambda kernel: (100.0, 100.0, 200.0))
    assert (told.total('flops'), told.total('hbm_bytes')) == (100, 200)
    estimate = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=999)
    noted = analyse(program(estimate))
    assert (noted.total('flops'), noted.total('hbm_bytes')) == (12345, 999)
    assert not noted.uncounted_kernels()


def test_what_does_not_fit_says_so(mesh):
    with pytest.raises(Exception, match='RESOURCE_EXHAUSTED') as caught:
        compiled(mesh, lambda x: x + 1, ((20, 1024, 1024, 256), jnp.float32, P()))
    needed, available = out_of_memory(str(caught.value))
    assert available == pytest.approx(V5E.usable_hbm_bytes, 1e-3)
    assert needed >= 20 * 2**30


# Hand-written programs


def program(entry, others=''):
    header = 'HloModule m, is_scheduled=true, num_partitions=16'
    return f'{header}\n{others}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n'


BIG = 'f32[1024,1024]{1,0:T(8,128)}'  # 4 MiB
ON_CHIP = 'f32[1024,1024]{1,0:T(8,128)S(1)}'
SHARD = 'f32[64,1024]{1,0:T(8,128)}'
CONTEXT = 'u32[]{:S(2)}'
MIB = 2**20


def test_only_hbm_counts_and_a_copy_counts_once():
    text = program(f"""
  %p = {BIG} parameter(0)
  %start = ({ON_CHIP}, {BIG}, {CONTEXT}) copy-start(%p)
  %free = {BIG} bitcast(%p)
  %done = {ON_CHIP} copy-done(%start)
  %inside = {ON_CHIP} add(%done, %done)
  ROOT %out = {BIG} negate(%inside)""")
    costs = analyse(text)
    assert costs.total('hbm_bytes') == 8 * MIB
    assert sum(memory_bytes(text, costs).values()) == (2 + 3 + 2) * 4 * MIB


def test_fusions_count_slices():
    whole, slice_ = (BIG.replace('[', f'[{n},').replace('{1', '{2,1') for n in (8, 1))
    others = f"""
%update (p0: f32[8,1024,1024], p1: s32[], p2: f32[8,1024,1024]) -> f32[8,1024,1024] {{
  %p0 = {whole} parameter(0)
  %p1 = s32[]{{:S(6)}} parameter(1)
  %p2 = {whole} parameter(2)
  %zero = s32[] constant(0)
  %slice = {slice_} dynamic-slice(%p2, %p1, %zero, %zero), dynamic_slice_sizes={{1,1024,1024}}
  ROOT %dus = {whole} dynamic-update-slice(%p0, %slice, %p1, %zero, %zero)
}}"""
    costs = analyse(program(f"""
  %a = {whole} parameter(0)
  %b = {whole} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  ROOT %fusion = {whole} fusion(%a, %i, %b), kind=kLoop, calls=%update""", others))
    assert costs.total('hbm_bytes') == 3 * 4 * MIB


def test_convolutions_count_without_padding():
    # a product of [16384, 1, 1, 768] with kernels [3, 768, 12, 64], written as a convolution
    window = 'window={size=3x12 pad=2_2x11_11 rhs_reversal=1x1}, dim_labels=bf01_0i1o->b01f'
    costs = analyse(program(f"""
  %x = bf16[16384,768,1,1] parameter(0)
  %w = bf16[3,768,12,64] parameter(1)
  ROOT %c = f32[16384,3,12,64] convolution(%x, %w), {window}"""))
    assert costs.total('flops') == 2 * 16384 * 768 * 3 * 12 * 64
    window = 'window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f'
    strided = analyse(program(f"""
  %x = bf16[2,9,9,4] parameter(0)
  %w = bf16[3,3,2,8] parameter(1)
  ROOT %c = f32[2,5,5,8] convolution(%x, %w), {window}, feature_group_count=2"""))
    assert strided.total('flops') == 2 * 2 * 2 * 8 * (5 * 3 - 2) ** 2


def test_dots():
    left = 'lhs_batch_dims={0}, lhs_contracting_dims={2}'
    right = 'rhs_batch_dims={0}, rhs_contracting_dims={1}'
    costs = analyse(program(f"""
  %x = f32[4,128,64] parameter(0)
  %w = f32[4,64,256] parameter(1)
  ROOT %d = f32[4,128,256] dot(%x, %w), {left}, {right}, algorithm=dot_bf16_bf16_f32_x3"""))
    assert costs.total('flops') == 2 * 4 * 128 * 64 * 256
    assert costs.total('mxu_flops') == 3 * costs.total('flops')


def test_fused_reduce_scatter():
    others = f"""
%all-reduce-scatter (p: f32[1024,1024]) -> f32[64,1024] {{
  %p = {BIG} parameter(0)
  %sum = {BIG} all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add
  %id = u32[] partition-id()
  ROOT %mine = {SHARD} dynamic-slice(%sum, %id, %id), dynamic_slice_sizes={{64,1024}}
}}"""
    costs = analyse(program(f"""
  %g = {BIG} parameter(0)
  ROOT %f = {SHARD} fusion(%g), kind=kCustom, calls=%all-reduce-scatter""", others))
    assert costs.by_kind() == {'reduce-scatter': (1, 4 * MIB)}


GATHER = 'replica_groups=[1,16]<=[16], dimensions={0}, frontend_attributes={chain_id="0"}'
SMALL = 'f32[64,1024]{1,0:T(8,128)S(1)}'
TARGET = 'custom_call_target="AsyncCollective'
GOING = f'({BIG}, {SMALL}, {BIG}, {BIG}, {CONTEXT})'
PIECES = f"""
%begin (p: f32[64,1024]) -> (f32[64,1024], f32[1024,1024], u32[]) {{
  %p = {SMALL} parameter(0)
  %all-gather = {BIG} all-gather(%p), {GATHER}
  ROOT %s = ({SMALL}, {BIG}, {CONTEXT}) custom-call(%all-gather), {TARGET}Start"
}}
%go_on (p: f32[64,1024], q: f32[1024,1024], r: u32[], x: f32[1024,1024]) -> () {{
  %p.1 = {SMALL} parameter(0)
  %q.1 = {BIG} parameter(1)
  %r.1 = {CONTEXT} parameter(2)
  %x.1 = {BIG} parameter(3)
  %product = {BIG} convolution(%x.1, %x.1), dim_labels=bf_io->bf
  %all-gather.1 = {BIG} all-gather(%p.1), {GATHER}
  ROOT %t = {GOING} tuple(%product, %p.1, %q.1, %all-gather.1, %r.1)
}}
%end (p: f32[64,1024], q: f32[1024,1024], r: u32[]) -> f32[1024,1024] {{
  %p.2 = {SMALL} parameter(0)
  %q.2 = {BIG} parameter(1)
  %r.2 = {CONTEXT} parameter(2)
  %all-gather.2 = {BIG} all-gather(%p.2), {GATHER}
  ROOT %d = {BIG} custom-call(%p.2, %q.2, %all-gather.2, %r.2), {TARGET}Done"
}}"""


def test_a_collective_in_pieces_counts_once_and_overlaps():
    costs = analyse(program(f"""
  %shard = {SMALL} parameter(0)
  %x = {BIG} parameter(1)
  %start = ({SMALL}, {BIG}, {CONTEXT}) fusion(%shard), kind=kCustom, calls=%begin
  %s0 = {SMALL} get-tuple-element(%start), index=0
  %s1 = {BIG} get-tuple-element(%start), index=1
  %s2 = {CONTEXT} get-tuple-element(%start), index=2
  %step = {GOING} fusion(%s0, %s1, %s2, %x), kind=kOutput, calls=%go_on
  %product = {BIG} get-tuple-element(%step), index=0
  %t0 = {SMALL} get-tuple-element(%step), index=1
  %t1 = {BIG} get-tuple-element(%step), index=2
  %t2 = {CONTEXT} get-tuple-element(%step), index=4
  %done = {BIG} fusion(%t0, %t1, %t2), kind=kCustom, calls=%end
  ROOT %sum = {BIG} add(%product, %done)""", PIECES))
    assert costs.by_kind() == {'all-gather': (1, 4 * MIB)}
    # the gathered array written; x read and the product written; two read and their sum written
    assert costs.total('hbm_bytes') == (1 + 2 + 3) * 4 * MIB
    product = max(2 * 1024**3 / V5E.bf16_flops, 8 * MIB / V5E.hbm_bandwidth)
    assert costs.exposed_seconds == pytest.approx(costs.interconnect_seconds - product)
    rest = 12 * MIB / V5E.hbm_bandwidth
    assert costs.predicted_seconds == pytest.approx(costs.interconnect_seconds + rest)


def test_a_collective_carried_around_a_loop_that_does_not_wait_for_it():
    loop = f"""
%body (p: (f32[1024,1024], f32[64,1024], u32[])) -> (f32[1024,1024], f32[64,1024], u32[]) {{
  %b = ({BIG}, {SMALL}, {CONTEXT}) parameter(0)
  %b0 = {BIG} get-tuple-element(%b), index=0
  %b1 = {SMALL} get-tuple-element(%b), index=1
  %b2 = {CONTEXT} get-tuple-element(%b), index=2
  %twice = {BIG} add(%b0, %b0)
  ROOT %next = ({BIG}, {SMALL}, {CONTEXT}) tuple(%twice, %b1, %b2)
}}
%condition (p: (f32[1024,1024], f32[64,1024], u32[])) -> pred[] {{
  %c = ({BIG}, {SMALL}, {CONTEXT}) parameter(0)
  ROOT %go_on = pred[] constant(true)
}}"""
    begin = 'known_trip_count={"n":"2"}'
    costs = analyse(program(f"""
  %shard = {SMALL} parameter(0)
  %x = {BIG} parameter(1)
  %start = ({SMALL}, {BIG}, {CONTEXT}) fusion(%shard), kind=kCustom, calls=%begin
  %s0 = {SMALL} get-tuple-element(%start), index=0
  %s1 = {BIG} get-tuple-element(%start), index=1
  %s2 = {CONTEXT} get-tuple-element(%start), index=2
  %state = ({BIG}, {SMALL}, {CONTEXT}) tuple(%x, %s0, %s2)
  %loop = ({BIG}, {SMALL}, {CONTEXT}) while(%state), condition=%condition, body=%body, {begin}
  %t0 = {SMALL} get-tuple-element(%loop), index=1
  %t2 = {CONTEXT} get-tuple-element(%loop), index=2
  ROOT %done = {BIG} fusion(%t0, %s1, %t2), kind=kCustom, calls=%end""", PIECES + loop))
    sums = 2 * 12 * MIB / V5E.hbm_bandwidth
    assert costs.exposed_seconds == pytest.approx(costs.interconnect_seconds - sums)


def test_what_goes_between_slices_takes_the_datacenter_network():
    sent = f"""
  %x = {BIG} parameter(0)
  %token = token[] after-all()
  %send = ({BIG}, u32[], token[]) send(%x, %token), channel_id=4, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_rendezvous="a_0",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %recv = ({BIG}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_rendezvous="a_0",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %sent = token[] send-done(%send), channel_id=4, is_host_transfer=true
  %received = ({BIG}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true
  ROOT %sum = {BIG} get-tuple-element(%received), index=0"""
    costs = cost.analyse(program(sent), Slice(V5E, (4, 4), slices=2))
    assert costs.by_kind() == {'all-reduce of slices': (1, 4 * MIB)}
    assert costs.dcn_seconds == pytest.approx(4 * MIB / V5E.dcn_bandwidth)
    assert costs.interconnect_seconds == 0
    assert 0.9 * costs.dcn_seconds < costs.dcn_exposed_seconds <= costs.dcn_seconds


@pytest.mark.parametrize(
    'shape, work, seconds',
    [
        (ON_CHIP, 'convolution(%x, %x), dim_labels=bf_io->bf', 2 * 1024**3 / V5E.bf16_flops),
        (BIG, 'add(%x, %x)', (8 + 4 + 4) * MIB / V5E.hbm_bandwidth),
    ],
)
def test_a_prefetch_hides_behind_arithmetic_but_not_behind_other_traffic(shape, work, seconds):
    costs = analyse(program(f"""
  %p = {BIG} parameter(0)
  %x = {shape} parameter(1)
  %start = ({ON_CHIP}, {BIG}, {CONTEXT}) copy-start(%p)
  %work = {shape} {work}
  ROOT %done = {ON_CHIP} copy-done(%start)"""))
    assert costs.predicted_seconds == pytest.approx(seconds)


def test_the_slower_branch_counts():
    others = f"""
%sum (p: f32[1024,1024]) -> f32[1024,1024] {{
  %p = {BIG} parameter(0)
  ROOT %r = {BIG} add(%p, %p)
}}
%product (q: f32[1024,1024]) -> f32[1024,1024] {{
  %q = {BIG} parameter(0)
  ROOT %s = {BIG} dot(%q, %q), lhs_contracting_dims={{1}}, operand_precision={{highest,highest}}
}}"""
    costs = analyse(program(f"""
  %i = s32[] parameter(0)
  %x = {BIG} parameter(1)
  ROOT %c = {BIG} conditional(%i, %x, %x), branch_computations={{%sum, %product}}""", others))
    assert costs.total('hbm_bytes') == 12 * MIB and costs.total('flops') == 2 * 1024**3
    assert costs.predicted_seconds == pytest.approx(6 * 2 * 1024**3 / V5E.bf16_flops)


def test_partitions_may_sit_anywhere():
    text = program(f"""
  %x = {BIG} parameter(0)
  ROOT %r = {BIG} all-reduce(%x), replica_groups=[8,2]<=[16], to_apply=%add""")
    places = tuple((i % 2, i // 2) for i in range(16))
    size = 2 * 1 / 2 * 4 * MIB
    seconds = cost.analyse(text, Slice(V5E, (2, 8), places)).interconnect_seconds
    assert seconds == pytest.approx(size / 50e9 + 2 * HOP_SECONDS)
    with pytest.raises(ValueError, match='16 devices, but the slice has 8'):
        cost.analyse(text, Slice(V5E, (2, 4)))
