"""Trains and scores the runs of the ablations, and records them.

python experiments/ablations/run.py [--ablation=curriculum,merge] [--seeds=0,1,2] [--model=tiny] [--dry_run]

The runs and what they change are declared in runs.py; runs that ablations share are trained once. A finished run is in
experiments/ablations/results/MODEL/SEED.json and is not repeated; one that was interrupted goes on. The AR model that
text runs start from is made first. Runs on answers (mask_band) start from the models of
experiments/post_training/run.sh SEED; complementary and cap are what that experiment has recorded. Tables and
pictures: python experiments/ablations/report.py.

--model=smollm2_135m is the same over SmolLM2-135M on 128 rows and ten times the steps, for an accelerator. --dry_run
prints the command that trains each run. --smoke takes one step a phase and scores little, to see that all of it works.
"""

import itertools
from pathlib import Path

from absl import flags
from runs import ABLATIONS, RUNS, runs_of

from llada_jax import command_line
from llada_jax.errors import InputError

HERE = Path(__file__).resolve().parent

_ABLATION = flags.DEFINE_list("ablation", list(ABLATIONS), f"Of {', '.join(ABLATIONS)}.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the order of the rows and of the noise.")
_MODEL = flags.DEFINE_enum("model", "tiny", ["tiny", "smollm2_135m"], "What is ablated.")
_OUT = flags.DEFINE_string("out", None, "Folder of the workdirs; runs/ablations/MODEL by default.")
_POST_TRAINING = flags.DEFINE_string("post_training", "runs/post_training", "FOLDER of its run.sh.")
_RESULTS = flags.DEFINE_string("results", None, "Folder of the records; results/MODEL here by default.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print commands, train nothing.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Try everything in little time.")


def main(argv) -> int:
    del argv
    if unknown := [name for name in _ABLATION.value if name not in ABLATIONS]:
        raise InputError(f"--ablation={unknown[0]}, expected some of {', '.join(ABLATIONS)}")
    if not all(seed.isdigit() for seed in _SEEDS.value):
        raise InputError(f"--seeds={','.join(_SEEDS.value)}, expected non-negative integers")
    import records  # importing jax takes seconds: not before the flags are right
    from base import Place

    out = Path(_OUT.value or f"runs/ablations/{_MODEL.value}")
    place = Place(_MODEL.value, out, Path(_POST_TRAINING.value), _SMOKE.value)
    results = Path(_RESULTS.value or HERE / "results" / _MODEL.value)
    runs = [(int(seed), name) for seed, name in itertools.product(_SEEDS.value, runs_of(_ABLATION.value))]
    if _DRY_RUN.value:
        for seed, name in runs:
            print(records.command(place, seed, name))
        return 0
    records.keep_programs(out)
    if any(RUNS[name].of_text for _, name in runs):
        records.record_ar(place, results / "ar.json")
    failed = [name for seed, name in runs if not records.finished(place, results / f"{seed}.json", seed, name)]
    return int(bool(failed))


if __name__ == "__main__":
    command_line.run(main)
