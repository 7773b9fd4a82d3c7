"""llada_jax.train with a model of 50 k parameters, "tiny_hosts".

Every row of metrics tells what was trained on: two numbers made of all bits of the batch and of its noise (ids, masks,
weights by time, keys), the same on any mesh. In the environment, PACE: seconds that reading a step's rows takes at
least; FAIL: the process that cannot read those of step 5.
"""

import os

import jax
import jax.numpy as jnp
from jax._src import compilation_cache, compiler

from llada_jax import command_line, errors
from llada_jax.checkpoint import digest
from llada_jax.data.order import Rows
from llada_jax.model.config import PRESETS, preset
from llada_jax.train import main
from llada_jax.training import supervised
from tests.helpers.paced_trainer import paced

MODEL = PRESETS["tiny_hosts"] = preset("tiny").replace(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=8, intermediate_size=64
)


def with_digests(make_loss):
    """train_loss, with the digest of each step's example among the metrics."""

    def make(*arguments):
        loss, seen = make_loss(*arguments), []

        def prepare(batch, block_size, halves):
            example = loss.prepare(batch, block_size, halves)
            seen.append(lanes((batch, example)))  # of the trace that asks for the metrics next
            return example

        def metrics(sums, total):
            first, second = seen.pop()
            return loss.metrics(sums, total) | {"digest_0": first, "digest_1": second}

        return loss._replace(prepare=prepare, metrics=metrics)

    return make


def lanes(tree) -> jax.Array:
    """uint32 [2] of all bits of a tree, the same on every mesh."""
    leaves = jax.tree.leaves(tree)
    bits = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return digest.lanes(jnp.concatenate([digest.lanes(x) for x in bits]))


def hindered(read):
    def batch(self, step, *arguments):
        if step == 5 and str(jax.process_index()) == os.environ.get("FAIL"):
            raise errors.InputError("rows.array_record: record 7 is corrupt")
        return read(self, step, *arguments)

    return batch


def write_program(key, seconds, name, backend, executable, *callbacks):
    """JAX keeps only what process 0 has compiled; on CPU the other processes' programs have other keys."""
    compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))


if __name__ == "__main__":
    compiler._cache_write = write_program
    Rows.batch = hindered(paced(Rows.batch))
    supervised.train_loss = with_digests(supervised.train_loss)
    command_line.run(main)
