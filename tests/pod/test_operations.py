"""The traffic of operations to and from HBM, and the memory that arrays take."""

import pytest

from llada_jax.chips import CHIPS
from llada_jax.pod import hlo
from llada_jax.pod.operations import moved_bytes, operation_cost

LAYER = 1024 * 2048 * 2  # bytes of one layer's weights
ARRAYS = {
    "STACK": "bf16[24,1024,2048]{2,1,0:T(8,128)(2,1)}",
    "SLICE": "bf16[1,1024,2048]{2,1,0:T(8,128)(2,1)}",
    "LAYER": "bf16[1024,2048]{1,0:T(8,128)(2,1)}",
    "FAST": "bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)}",
    "PART": "bf16[256,2048]{1,0:T(8,128)(2,1)}",
    "INDEX": "s32[]{:T(128)}",
}
PROGRAM = """\
HloModule program

%fused (stack: bf16[24,1024,2048], layer: s32[], x: bf16[1024,2048]) -> bf16[1024,2048] {
  %stack = STACK parameter(0)
  %x = LAYER parameter(2)
  %layer = INDEX parameter(1)
  %zero = INDEX constant(0)
  %slice = SLICE dynamic-slice(%stack, %layer, %zero, %zero)
  %weights = LAYER bitcast(%slice)
  ROOT %sum = LAYER add(%weights, %x)
}

%kept (stack: bf16[24,1024,2048], layer: s32[], x: bf16[1024,2048]) -> bf16[24,1024,2048] {
  %stack.1 = STACK parameter(0)
  %layer.1 = INDEX parameter(1)
  %x.1 = LAYER parameter(2)
  %zero.1 = INDEX constant(0)
  %row = SLICE bitcast(%x.1)
  ROOT %update = STACK dynamic-update-slice(%stack.1, %row, %layer.1, %zero.1, %zero.1)
}

%sent (part: bf16[256,2048], gathered: bf16[1024,2048], x: bf16[1024,2048]) -> (bf16[1024,2048], bf16[256,2048]) {
  %x.3 = LAYER parameter(2)
  %doubled = LAYER add(%x.3, %x.3)
  %part = PART parameter(0)
  %gathered = LAYER parameter(1)
  %gather = LAYER all-gather(%part), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %tuple = (LAYER, PART, LAYER, LAYER) tuple(%doubled, %part, %gathered, %gather)
}

ENTRY %main (stack.2: bf16[24,1024,2048], layer.2: s32[], x.2: bf16[1024,2048]) -> bf16[24,1024,2048] {
  %stack.2 = STACK parameter(0)
  %layer.2 = INDEX parameter(1)
  %x.2 = LAYER parameter(2)
  %near = FAST copy(%x.2)
  %sliced = LAYER fusion(%stack.2, %layer.2, %x.2), calls=%fused, backend_config={"estimated_cycles":"900000"}
  %fast = FAST fusion(%stack.2, %layer.2, %near), kind=kLoop, calls=%fused
  %piece = PART slice(%x.2), slice={[0:256], [0:2048]}
  %chained = (LAYER, PART, LAYER, LAYER) fusion(%piece, %x.2, %x.2), kind=kOutput, calls=%sent
  ROOT %out = STACK fusion(%stack.2, %layer.2, %x.2), kind=kLoop, calls=%kept
}
"""
for _name, _array in ARRAYS.items():
    PROGRAM = PROGRAM.replace(_name, _array)


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


@pytest.mark.parametrize(
    "name, layers",
    [
        ("near", 1),  # read in HBM, written in fast memory
        ("sliced", 3),  # a layer of the stack and x are read, the sum is written
        ("fast", 1),  # a layer of the stack alone
        ("out", 2),  # x is read, and written into the stack in place
        ("chained", 2),  # x is read and its double written; the gather's buffers are of the links
    ],
)
def test_only_what_is_touched_moves(module, name, layers):
    op = module.operand("main", name)
    small = 4  # bytes of the index of the layer
    assert moved_bytes(module, "main", op) == pytest.approx(layers * LAYER, abs=small)


def test_an_operation_takes_the_longer_of_its_schedule_and_its_bytes(module):
    chip, op = CHIPS["v5e"], module.operand("main", "sliced")
    by_bytes = operation_cost(module, "main", op, chip)
    assert (
        by_bytes.seconds == by_bytes.from_bytes == pytest.approx(3 * LAYER / chip.stream_bandwidth, rel=1e-6)
    )  # XLA's own estimate of what multiplies no matrices is no time
    scheduled = operation_cost(module, "main", op, chip, {"sliced": 10**6})
    assert scheduled.seconds == 10**6 / chip.bundle_rate and scheduled.from_bytes == 0


@pytest.mark.parametrize(
    "text, size",
    [
        ("bf16[100,6,2048]{2,1,0:T(8,128)(2,1)}", 100 * 8 * 2048 * 2),  # six rows fill tiles of eight
        ("bf16[100,6,2048]{2,0,1:T(8,128)(2,1)}", 104 * 6 * 2048 * 2),
        ("f32[16,1]{1,0:T(8,128)}", 16 * 128 * 4),
        ("f32[1000]{0:T(1024)S(1)}", 1024 * 4),
        ("f32[1000,3]", 3000 * 4),
        ("s32[]{:T(128)}", 4),
    ],
)
def test_padded_bytes_are_those_of_whole_tiles(text, size):
    (array,) = hlo.arrays(text)
    assert array.padded_bytes == size


def test_memories():
    fast, host, hbm = hlo.arrays("(f32[8]{0:T(1024)S(1)}, f32[8]{0:T(1024)S(5)}, f32[8]{0:T(1024)})")
    assert (fast.space, host.space, hbm.space) == (hlo.FAST, hlo.HOST, hlo.HBM)
    assert hbm.in_hbm and not fast.in_hbm and not host.in_hbm


def test_metadata_over_several_lines():
    text = PROGRAM.replace(
        "copy(%x.2)", 'copy(%x.2), frontend_attributes={metadata={\n"tiles":"{8}"\n}}, backend_config={"n":"1"}'
    )
    module = hlo.parse(text)
    assert module.operand("main", "near").attributes.endswith('backend_config={"n":"1"}')
    assert len(module.computations["main"]) == 9
