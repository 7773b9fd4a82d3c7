"""Compiles MaxText's own training step of Qwen3-30B-A3B for v5p:4x4x4 and writes its HLO and memory.

    python3.12 -m venv .venv-maxtext && .venv-maxtext/bin/pip install 'maxtext[tpu]'
    .venv-maxtext/bin/python experiments/maxtext/compile.py OUT.hlo        # OUT.hlo.json: bytes per device

MaxText's defaults with remat_policy=full: an AR step, 2 rows of 4,096 tokens per chip, weights split over all 64.
"""

import json
import os
import sys
from pathlib import Path

SETTINGS = (
    "model_name=qwen3-30b-a3b", "compile_topology=v5p-128", "compile_topology_num_slices=1", "per_device_batch_size=2",
    "max_target_length=4096", "remat_policy=full", "dataset_type=synthetic", "enable_checkpointing=false",
    "base_output_directory=/tmp/maxtext", "run_name=compile",
)  # fmt: skip


def main(out: Path) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    import maxtext
    from absl import app
    from maxtext.trainers.pre_train import train_compile

    compile_step = train_compile.jit_and_compile

    def writing(*arguments, **options):
        compiled = compile_step(*arguments, **options)
        memory = compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        out.write_text(compiled.as_text())
        out.with_suffix(out.suffix + ".json").write_text(
            json.dumps({"bytes": total + memory.temp_size_in_bytes, "version": maxtext.__version__})
        )
        return compiled

    train_compile.jit_and_compile = writing
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    app.run(train_compile.main, [sys.argv[0], str(base), *SETTINGS])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
