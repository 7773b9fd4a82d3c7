"""TPU chips and slices: peak rates, memory and links, on which every estimate is based.

Peaks, memory and links: the pages cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; links of v4, and those to hosts:
jax-ml.github.io/scaling-book/tpus. TensorCores and VMEM: JAX's `pallas.tpu.get_tpu_info`. Multiply-accumulates per
cycle: from the instructions of a compiled matmul (a 128 x 128 matrix unit takes one row per cycle, a 256 x 256 one two
rows); tests/pod/test_schedule_reader.py checks that for every chip. The clock follows: peak FLOP/s / (2 x
multiply-accumulates of all cores). The two efficiencies are fitted to timed runs: experiments/calibration.
"""

import dataclasses
import math

from llada_jax.errors import InputError

_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# The default shape of sizes that have several shapes (cloud.google.com/tpu/docs/v5p).
_DEFAULTS = ("4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
_NO_DEFAULT = ("v4:16x16x16",)  # the page of v4 names none of that size, and XPK's is 4x4x256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip. Rates are per second; bandwidths in bytes; `ici_bandwidth` is one way over one link."""

    name: str
    device_kind: str  # JAX's name
    peak_bf16: float
    hbm_bytes: int
    hbm_bandwidth: float
    hbm_efficiency: float  # the share of it that streaming operations reach
    host_bandwidth: float  # one way between a chip and its host
    schedule_efficiency: float  # the share of its schedule's speed that a core reaches
    ici_links: int  # also the neighbours: 4 in a 2-D torus, 6 in a 3-D torus
    ici_bandwidth: float
    dcn_bandwidth: float  # a chip's share of its host's data-centre network
    cores: int  # TensorCores
    devices: int  # JAX devices; the two TensorCores of v4 and v5p are one device, tpu7x's are two
    matrix_units: int  # of one TensorCore
    matrix_unit_size: int  # rows and columns
    rows_per_cycle: int  # rows of bfloat16 that a matrix unit takes per cycle; float32 is passed as bfloat16, 2 a row
    vmem_bytes: int  # of one TensorCore
    slices: tuple[str, ...]  # every slice, or those below a cube of 4 x 4 x 4 where larger ones are made of cubes
    largest_slice: int  # chips

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates of one TensorCore's matrix units."""
        return self.matrix_units * self.matrix_unit_size**2 * self.rows_per_cycle

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak_bf16 / (2 * self.cores * self.macs_per_cycle)

    @property
    def bundle_rate(self) -> float:
        """Bundles of a schedule per second that a core gets through, with what it waits for."""
        return self.clock * self.schedule_efficiency

    @property
    def stream_bandwidth(self) -> float:
        """Bytes per second between a device and its HBM that streaming operations reach."""
        return self.hbm_bandwidth * self.hbm_efficiency / self.devices

    @property
    def cores_per_device(self) -> int:
        return self.cores // self.devices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kind="TPU v4",
            peak_bf16=275e12,
            hbm_bytes=32 * _GIB,
            hbm_bandwidth=1.228e12,
            hbm_efficiency=0.85,
            host_bandwidth=16e9,
            schedule_efficiency=0.87,
            ici_links=6,
            ici_bandwidth=45e9,
            dcn_bandwidth=6.25e9,  # not published: a host's "typically 2.5e10" (jax-ml.github.io/scaling-book/tpus)
            cores=2,
            devices=1,
            matrix_units=4,
            matrix_unit_size=128,
            rows_per_cycle=1,
            vmem_bytes=16 * 2**20,
            slices=_BELOW_A_CUBE,
            largest_slice=4096,
        ),
        Chip(
            name="v5e",
            device_kind="TPU v5 lite",
            peak_bf16=197e12,
            hbm_bytes=16 * _GIB,
            hbm_bandwidth=819e9,
            hbm_efficiency=0.85,
            host_bandwidth=16e9,
            schedule_efficiency=0.87,
            ici_links=4,
            ici_bandwidth=50e9,
            dcn_bandwidth=3.125e9,
            cores=1,
            devices=1,
            matrix_units=4,
            matrix_unit_size=128,
            rows_per_cycle=1,
            vmem_bytes=128 * 2**20,
            slices=_FLAT,
            largest_slice=256,
        ),
        Chip(
            name="v5p",
            device_kind="TPU v5",
            peak_bf16=459e12,
            hbm_bytes=95 * _GIB,
            hbm_bandwidth=2.765e12,
            hbm_efficiency=0.85,
            host_bandwidth=16e9,
            schedule_efficiency=0.87,
            ici_links=6,
            ici_bandwidth=100e9,
            dcn_bandwidth=6.25e9,
            cores=2,
            devices=1,
            matrix_units=4,
            matrix_unit_size=128,
            rows_per_cycle=1,
            vmem_bytes=64 * 2**20,
            slices=_BELOW_A_CUBE,
            largest_slice=6144,
        ),
        Chip(
            name="v6e",
            device_kind="TPU v6 lite",
            peak_bf16=918e12,
            hbm_bytes=32 * _GIB,
            hbm_bandwidth=1.638e12,
            hbm_efficiency=0.85,
            host_bandwidth=32e9,
            schedule_efficiency=0.87,
            ici_links=4,
            ici_bandwidth=100e9,
            dcn_bandwidth=12.5e9,
            cores=1,
            devices=1,
            matrix_units=2,
            matrix_unit_size=256,
            rows_per_cycle=2,
            vmem_bytes=128 * 2**20,
            slices=_FLAT,
            largest_slice=256,
        ),
        Chip(
            name="tpu7x",
            device_kind="TPU7x",
            peak_bf16=2307e12,
            hbm_bytes=192 * _GIB,
            hbm_bandwidth=7.38e12,
            hbm_efficiency=0.85,
            host_bandwidth=32e9,
            schedule_efficiency=0.87,
            ici_links=6,
            ici_bandwidth=100e9,
            dcn_bandwidth=12.5e9,
            cores=2,
            devices=2,
            matrix_units=2,
            matrix_unit_size=256,
            rows_per_cycle=2,
            vmem_bytes=64 * 2**20,
            slices=_BELOW_A_CUBE,
            largest_slice=9216,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of one chip type, e.g. v5p:4x4x8."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape_name}"

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of each side close a ring: all sides of 4 x 4 x 4 cubes; in two dimensions, sides of 16."""
        if len(self.shape) == 3:
            return (all(side % 4 == 0 for side in self.shape),) * 3
        return tuple(side == 16 for side in self.shape)

    @property
    def accelerator_type(self) -> str:
        """The cloud's name of the slice, which counts TensorCores: v5p:4x4x4 is "v5p-128"."""
        return f"{self.type_name}-{self.chips * self.chip.cores}"

    @property
    def type_name(self) -> str:
        """The cloud's name of the chip."""
        return {"v5e": "v5litepod"}.get(self.chip.name, self.chip.name)

    @property
    def is_default(self) -> bool:
        """Whether accelerator_type alone selects this slice."""
        return self.is_the_only_one or (self.shape_name in _DEFAULTS and self.name not in _NO_DEFAULT)

    @property
    def is_the_only_one(self) -> bool:
        """Whether no other slice has the same number of chips, so that accelerator_type is unambiguous."""
        if len(self.shape) == 2 or self.chips % 64:
            return True
        cubes = self.chips // 64
        sides = range(1, cubes + 1)
        return sum(cubes % (a * b) == 0 and a <= b <= cubes // (a * b) for a in sides for b in sides) == 1


def parse_topology(name: str) -> Topology:
    """ "v5p:2x2x1" -> Topology. Raises InputError if there is no such chip or slice."""
    chip_name, _, shape_text = name.partition(":")
    if chip_name not in CHIPS:
        raise InputError(f"topology {name}: unknown chip, expected one of {', '.join(CHIPS)}, as in v5p:2x2x1")
    chip = CHIPS[chip_name]
    sides = shape_text.split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise InputError(f"topology {name}: expected sides joined by x, as in {chip_name}:{chip.slices[0]}")
    topology = Topology(chip, tuple(map(int, sides)))
    if shape_text not in chip.slices and not _is_made_of_cubes(topology):
        cubes = f", and multiples of 4x4x4 in ascending order up to {chip.largest_slice} chips"
        raise InputError(
            f"topology {name}: no such slice; {chip_name} has {', '.join(chip.slices)}"
            + (cubes if chip.ici_links == 6 else "")
        )
    return topology


def _is_made_of_cubes(topology: Topology) -> bool:
    shape = topology.shape
    return (
        topology.chip.ici_links == len(shape) * 2 == 6
        and all(side % 4 == 0 for side in shape)
        and list(shape) == sorted(shape)
        and topology.chips <= topology.chip.largest_slice
    )
