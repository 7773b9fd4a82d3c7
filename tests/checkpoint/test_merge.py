"""The mean of checkpoints, and which steps are the best."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from llada_jax.checkpoint import merge, saver
from llada_jax.checkpoint.weights import load_params, write_weights
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset

CONFIG = preset("tiny").replace(num_layers=2, hidden_size=16, intermediate_size=16, vocab_size=512)


def write(path, seed, dtype=np.float32, config=CONFIG):
    rng = np.random.default_rng(seed)
    leaves = {n: rng.normal(size=p.shape).astype(dtype) for n, (p, _) in parameters.leaves(config).items()}
    write_weights(path, config, leaves.items(), {"tokenizer.json": b"{}"}, {})
    return leaves


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge_is_the_float32_mean(tmp_path, dtype):
    parts = [write(tmp_path / str(seed), seed, dtype) for seed in range(3)]
    merge.merge_checkpoints([tmp_path / str(seed) for seed in range(3)], tmp_path / "out")
    flat = parameters.unstack(load_params(tmp_path / "out"), CONFIG)
    for name, value in flat.items():
        mean = sum(part[name].astype(np.float32) for part in parts) / np.float32(3)
        assert value.dtype == dtype and np.array_equal(np.asarray(value), mean.astype(dtype))


def test_merging_one_checkpoint_changes_nothing(tmp_path):
    write(tmp_path / "a", 0)
    merge.merge_checkpoints([tmp_path / "a"], tmp_path / "out")
    tensors = [json.loads((tmp_path / x / "digests.json").read_text())["tensors"] for x in ("a", "out")]
    assert tensors[0] == tensors[1]


def test_another_model_is_refused_by_field(tmp_path):
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 0, config=CONFIG.replace(rope_theta=1e6))
    with pytest.raises(InputError, match="rope_theta"):
        merge.merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_best_steps_by_the_score_recorded_with_them(tmp_path):
    writer = saver.Saver(tmp_path / "checkpoints")
    params = parameters.initialize(CONFIG, jax.random.key(0))
    for step, score in {10: 4.0, 20: 3.0, 30: 2.75, 40: None}.items():
        writer.save(step, params, {}, {}, CONFIG, {}, {}, score)
    writer.wait()
    assert [(path.name, score) for path, score in merge.best_steps(tmp_path, 2)] == [("30", 2.75), ("20", 3.0)]
    with pytest.raises(InputError, match="3 saved steps have a held-out score, expected 4; .* checkpoint.keep_best=4"):
        merge.best_steps(tmp_path, 4)
    with pytest.raises(InputError, match="not a workdir"):
        merge.best_steps(tmp_path / "checkpoints", 1)


def test_steps_scored_in_another_way_are_left_out(tmp_path, capsys):
    params = parameters.initialize(CONFIG, jax.random.key(0))
    four, full, fewer = {"block_size": 4}, {"block_size": 32}, {"block_size": 32, "rows": 2}
    scored = [(10, 1.0, four), (20, 3.0, full), (30, 2.75, full), (40, 0.5, fewer), (50, 2.9, full), (60, None, four)]
    for step, score, scored_by in scored:
        writer = saver.Saver(tmp_path / "checkpoints", scored_by=scored_by)
        writer.save(step, params, {}, {}, CONFIG, {}, {}, score)
        writer.wait()
    assert [(path.name, score) for path, score in merge.best_steps(tmp_path, 3)] == [
        ("30", 2.75),
        ("50", 2.9),
        ("20", 3.0),
    ]
    said = capsys.readouterr().out
    assert said == (
        "step 10 is left out: scored by block_size=4, not 32\nstep 40 is left out: scored by rows=2, not None\n"
    )
    with pytest.raises(
        InputError, match="3 saved steps have a held-out score that can be compared with the last one, expected 4"
    ):
        merge.best_steps(tmp_path, 4)
