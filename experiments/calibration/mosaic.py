"""The grid and the blocks of a Pallas kernel, read from the compiled program that calls it.

The kernel's code stands in the call as MLIR bytecode, whose main function says, for a grouped matmul,

    iteration_bounds = array<i64: 2, -9223372036854775808, 2>, scalar_prefetch = 4 : i64,
    window_params = [{transform_indices = @transform_0, window_bounds = array<i64: 512, 1024>}, ...]

The smallest integer stands for a bound that is known at run time only.
"""

import base64
import dataclasses
import json
import re

from jax._src.lib import tpu
from jax._src.lib.mlir import ir

from llada_jax.pod.hlo import Operation

_UNKNOWN = -(2**63)
_BODY = re.compile(r'"body":"([^"]*)"')
_METADATA = re.compile(r'"xprof_metadata":"((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Grid:
    """bounds: of the grid's axes, None where the data decide. blocks: shape of each operand's and result's block, in
    the order of the call without its prefetched scalars. prefetched: their number. options: what the kernel's author
    noted for the profiler, e.g. tile sizes.
    """

    bounds: tuple[int | None, ...]
    blocks: tuple[tuple[int, ...], ...]
    prefetched: int
    options: dict


def body(op: Operation) -> str:
    """The kernel's code; equal codes are compiled once."""
    return _BODY.search(op.attributes).group(1)


def grid(op: Operation) -> Grid:
    """Of a call to a Pallas kernel. Raises ValueError if its code has no grid."""
    context = ir.Context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(base64.b64decode(body(op)))
        for function in module.body.operations:
            attributes = function.operation.attributes
            if "iteration_bounds" in attributes:
                return _grid(attributes, op)
    raise ValueError(f"{op.name}: a kernel without a grid")


def _grid(attributes, op: Operation) -> Grid:
    bounds = tuple(None if n == _UNKNOWN else n for n in ir.DenseI64ArrayAttr(attributes["iteration_bounds"]))
    blocks = tuple(
        tuple(map(int, numbers.split(",")))
        for numbers in re.findall(r"window_bounds = array<i64: ([^>]*)>", str(attributes["window_params"]))
    )
    noted = _METADATA.search(op.attributes)
    options = json.loads(json.loads(f'"{noted.group(1)}"')) if noted else {}
    return Grid(bounds, blocks, ir.IntegerAttr(attributes["scalar_prefetch"]).value, options)
