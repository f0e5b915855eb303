"""Reading HLO text: shapes, operands, trip counts and device groups, in every printed form."""

import pytest

from tarflow_jax.ahead_of_time import hlo


def test_shapes():
    (array,) = hlo.arrays('bf16[16,1024,768]{2,1,0:T(8,128)(2,1)S(1)}')
    assert array == hlo.Array('bf16', (16, 1024, 768), hlo.VMEM, *[16 * 1024 * 768 * 2] * 2)
    first, second = hlo.arrays('(f32[], /*index=5*/pred[3,5]{0,1:T(8,128)(4,1)})')
    assert (first.dims, first.space, first.bytes) == ((), hlo.HBM, 4)
    # stored with the axis of 3 as the minor one: 5 rows and 3 columns fill a tile of 8 x 128
    assert (second.bytes, second.padded_bytes) == (15, 8 * 128)


@pytest.mark.parametrize(
    'shape, size, padded',
    [
        ('f32[]{:T(128)}', 4, 512),
        ('f32[768]{0:T(1024)}', 3072, 4096),
        ('s4[10]', 5, 5),
        ('f8e4m3fn[10]', 10, 10),
        ('token[]', 0, 0),
        ('f32[<=8,4]{1,0}', 128, 128),
    ],
)
def test_bytes(shape, size, padded):
    (array,) = hlo.arrays(shape)
    assert (array.bytes, array.padded_bytes) == (size, padded)


@pytest.mark.parametrize(
    'operands',
    [
        '%p.1, /*index=1*/%c',
        'f32[2,3]{1,0:T(8,128)} %p.1, f32[] %c',
        'p.1, c',
        'f32[2,3]{1,0} p.1, f32[] c',
    ],
)
def test_operands_with_and_without_types(operands):
    more = 'metadata={op_name="a/b, (c)" id=3}, backend_config={"x":{"n":"8"}}'
    module = hlo.parse(f"""HloModule m, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[2,3]) -> f32[2,3] {{
  %p.1 = f32[2,3]{{1,0}} parameter(0)
  %c = f32[] constant(-1)
  ROOT %pad = f32[4,3]{{1,0}} pad({operands}), padding=0_2x0_0, {more}
}}
""")
    pad = module.computations['main'].root
    assert module.num_devices == 4
    assert pad.operands == ('p.1', 'c') and pad.attribute('padding') == '0_2x0_0'
    assert pad.op_name == 'a/b, (c)' and pad.backend_config == {'x': {'n': '8'}}


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match='not HLO text'):
        hlo.parse('HloModule m\n')


LOOP = """HloModule loop, is_scheduled=true

%below (p0: s32[], p1: s32[]) -> pred[] {{
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %lt = pred[] compare(%p0, %p1), direction=LT
}}

%body (state: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {{
  %state = (s32[], f32[4], s32[]) parameter(0)
  %one = s32[] constant({step})
  %i = s32[] get-tuple-element(%state), index=0
  %i.copy = s32[]{{:S(6)}} copy(%i)
  %x = f32[4] get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
  %next = s32[] add(%i.copy, %one)
  ROOT %out = (s32[], f32[4], s32[]) tuple(%next, %x, %n)
}}

%condition (state.1: (s32[], f32[4], s32[])) -> pred[] {{
  %state.1 = (s32[], f32[4], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n.1 = s32[] get-tuple-element(%state.1), index=2
  %bound = s32[] constant({bound})
  ROOT %test = pred[] {test}
}}

ENTRY %main (x.2: f32[4]) -> (s32[], f32[4], s32[]) {{
  %x.2 = f32[4] parameter(0)
  %first = s32[] constant({first})
  %limit = s32[] constant(7)
  %tuple = (s32[], f32[4], s32[]) tuple(%first, %x.2, %limit)
  ROOT %while = (s32[], f32[4], s32[]) while(%tuple), condition=%condition, body=%body{config}
}}
"""


@pytest.mark.parametrize(
    'first, step, bound, test, count',
    [
        (0, 1, 8, 'compare(%i.1, %bound), direction=LT', 8),
        (3, 1, 8, 'compare(s32[] %i.1, s32[] %bound), direction=LT', 5),
        (0, 3, 8, 'compare(%i.1, %bound), direction=LT', 3),
        (0, 1, 8, 'compare(%i.1, %bound), direction=LE', 9),
        (0, 1, 8, 'compare(%bound, %i.1), direction=GT', 8),
        (0, 2, 8, 'compare(%i.1, %bound), direction=NE', 4),
        (9, -1, 0, 'compare(%i.1, %bound), direction=GE', 10),
        (9, 1, 8, 'compare(%i.1, %bound), direction=LT', 0),
        (0, 1, 0, 'compare(%i.1, %n.1), direction=LT', 7),  # bound kept in the loop's state
        (0, 1, 8, 'fusion(%i.1, %bound), kind=kLoop, calls=%below', 8),
        (0, -1, 8, 'compare(%i.1, %bound), direction=LT', None),  # would not end
        (0, 1, 8, 'custom-call(%i.1), custom_call_target="Who knows"', None),
    ],
)
def test_trip_count_from_the_condition(first, step, bound, test, count):
    text = LOOP.format(first=first, step=step, bound=bound, test=test, config='')
    module = hlo.parse(text)
    main = module.computations['main']
    assert hlo.trip_count(module, main, main.root, {}) == (count, {2: 7})


def test_trip_count_that_xla_knows():
    config = ', backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0"}}'
    text = LOOP.format(first=0, step=1, bound=8, test='not(%i.1)', config=config)
    module = hlo.parse(text)
    main = module.computations['main']
    assert hlo.trip_count(module, main, main.root, {})[0] == 12


ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    'printed, groups',
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', ROWS),
        ('replica_groups=[2,4]<=[8]', ROWS),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ROWS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", COLUMNS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'b'}", COLUMNS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", COLUMNS),
        ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', COLUMNS),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", COLUMNS),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ROWS),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        ('replica_groups={}', (tuple(range(8)),)),
        ('channel_id=1', (tuple(range(8)),)),
        ('source_target_pairs={{0,1},{1,0}}', ((0, 1), (1, 0))),
    ],
)
def test_groups(printed, groups):
    module = hlo.parse(f"""HloModule m, replica_count=2, num_partitions=4
ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  ROOT %it = f32[4] all-reduce(%x), {printed}, use_global_device_ids=true, to_apply=%add
}}
""")
    assert hlo.groups(module.computations['main'].root, module.num_devices) == groups
