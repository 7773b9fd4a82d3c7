"""llada_jax.train. In the environment, PACE: seconds that reading a step's rows takes at least."""

import os
import time

from llada_jax import command_line
from llada_jax.data.order import Rows
from llada_jax.train import main


def paced(read):
    def batch(self, step, *arguments):
        time.sleep(float(os.environ.get("PACE", "0")))
        return read(self, step, *arguments)

    return batch


if __name__ == "__main__":
    Rows.batch = paced(Rows.batch)
    command_line.run(main)
