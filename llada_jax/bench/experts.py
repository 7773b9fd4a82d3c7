"""The table of tools/bench.py experts: grouped matmuls of a layer's experts, with megablox and tokamax."""

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator

from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.model.config import preset
from llada_jax.pod.experts_cost import IMPLEMENTATIONS, PASSES, TOKENS, group_sizes, kernel_cost, matmuls


def check_implementations(names) -> None:
    """Raises InputError on an unknown name, or one that is not installed."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise InputError(f"--implementations={name}, expected some of {', '.join(IMPLEMENTATIONS)}")
        if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
            raise InputError("--implementations=tokamax: it is not installed; pip install 'llada_jax[bench]'")


def table(implementations, models, topology_name: str) -> Iterator[dict]:
    """Prints a line per cost and yields its values. Raises InputError on an unknown name."""
    check_implementations(implementations)
    topology = parse_topology(topology_name)
    chip = topology.chip
    print(f"{topology.name}: one device of {chip.cores_per_device} TensorCores at {chip.clock / 1e9:.2f} GHz")
    print(f"{TOKENS} positions, compiler-estimated: Mcycles of the busiest core, share of matrix-unit peak")
    print("model         matmul  pass    implementation  tile             Mcycles  peak  copies")
    for model, name, direction in itertools.product(models, implementations, PASSES):
        config = preset(model)
        sizes = group_sizes(TOKENS * config.num_experts_per_token, config.num_experts)
        for matmul, sides in matmuls(config).items():
            cost = kernel_cost(name, direction, sizes, *sides, topology.name)
            tile = "x".join(map(str, cost.tile))
            print(
                f"{model:13} {matmul:7} {direction:7} {name:15} {tile:16} {cost.cycles / 1e6:7.2f} "
                f"{cost.peak_share:5.1%} {cost.dma_cycles / 1e6:7.2f}",
                flush=True,
            )
            row = {"implementation": name, "model": model, "matmul": matmul, "pass": direction}
            yield row | dataclasses.asdict(cost) | {"topology": topology.name}
