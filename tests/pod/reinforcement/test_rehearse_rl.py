"""A step of reinforcement learning, compiled for slices that are not there."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS, ModelConfig, preset
from llada_jax.pod import report
from llada_jax.pod.lower import Slices, abstract_run, nothing_to_read
from llada_jax.pod.reinforcement.rehearse_rl import _decoding_mesh, host_of, lower_program, num_copies, rehearse_rl
from llada_jax.reinforcement.scoring import ScoredRows
from llada_jax.training import stages
from tests.helpers.environment import process_environment

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(1500)
SLICES = Slices(parse_topology("v5p:2x2x1"))
SMALLEST = preset("tiny").replace(
    hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, rotary_dim=64, intermediate_size=256,
    vocab_size=1024, mask_token_id=1023, eos_token_id=1022, pad_token_id=1022, alignment="same",
)  # fmt: skip
DRIVER = f"""
import runpy, sys
from llada_jax.model.config import PRESETS, ModelConfig
PRESETS["smallest"] = ModelConfig.from_dict({SMALLEST.to_dict()!r})
sys.argv[0] = {str(ROOT / "tools" / "rehearse.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ROWS, LENGTH, COPIES = 8, 2048, 2


@pytest.fixture(scope="module", autouse=True)
def smallest():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(PRESETS, "smallest", ModelConfig.from_dict(SMALLEST.to_dict()))
        yield


def config_of(model="smallest", **changes):
    config = stages.rl(model, length=LENGTH)
    config.batch.rows, config.rl.copies = ROWS, COPIES
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def elbo(tmp_path_factory):
    """(text, numbers) of the command line."""
    out = tmp_path_factory.mktemp("rl") / "out.json"
    command = [
        sys.executable, "-c", DRIVER, f"--config={ROOT}/configs/rl.py:smallest,length={LENGTH}", f"--json={out}",
        "--topology=v5p:2x2x1", f"--config.batch.rows={ROWS}", f"--config.rl.copies={COPIES}",
    ]  # fmt: skip
    environment = process_environment(JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.fixture(scope="module")
def trajectory():
    return rehearse_rl(config_of(rl__estimator="trajectory", rl__shrink=4, rl__updates=2, rl__epochs=3), SLICES)


def test_what_is_in_memory_together_adds_up(elbo):
    text, values = elbo
    weights = parameters.count(SMALLEST)
    state = sum(values["update"]["hbm"][part] for part in ("parameters", "optimizer"))
    rows = ROWS / 4 * LENGTH * (4 + 4 + COPIES * (1 + 4))  # tokens, segments; hidden and weights of each copy
    assert state == pytest.approx(12 * weights + rows, rel=0.05)
    decoding = values["decoding"]["hbm_bytes"]
    assert 2 * weights < decoding  # bfloat16
    parts = values["hbm_bytes_by_part"]
    assert parts["answers"] == state + decoding
    assert state < parts["update"] == values["update"]["hbm_bytes"]
    assert values["score"] is None and "scores" not in parts and "none, as one update" in text
    assert values["hbm_bytes"] == max(parts.values()) and values["fits"]
    assert f"at most {values['hbm_bytes'] / 2**30:.2f} of 95" in text and "compiler-estimated" in text


@pytest.mark.soak
def test_every_copy_is_one_pass_of_the_scores_and_more_of_the_update(elbo, trajectory):
    _, values = elbo
    assert trajectory.copies == 8 and trajectory.update.rows == ROWS // 2
    flops = trajectory.score.flops / (ROWS // 2 * 8)
    # The backward pass is two, and computes a forward pass again.
    assert 3 < values["update"]["flops"] / (ROWS * COPIES) / flops < 5
    assert 3 < trajectory.update.flops / trajectory.score.flops < 5
    assert trajectory.update.useful_flops == 3 * trajectory.score.useful_flops
    assert trajectory.hbm_bytes["scores"] < trajectory.hbm_bytes["update"]
    assert 0 < values["update"]["serial_mfu"] < 1


@pytest.mark.soak
def test_words_and_numbers(elbo, trajectory):
    text = report.describe_rl(trajectory)
    assert "an update by 4 answers, 8 copies of each" in text and "6 of them in a step" in text
    assert "answers: 8 on each of 1 hosts (data 4), 8 together" in text
    assert elbo[1].keys() == trajectory.to_json().keys()
    assert len(trajectory.lines) == sum(
        len(x.lines) for x in (trajectory.decoding, trajectory.score, trajectory.update)
    )


ADAPTERS = {"lora__rank": 4, "lora__targets": ("query",)}


@pytest.mark.parametrize("changes", [{"rl__kl_weight": 0.1, "rl__estimator": "trajectory"}, ADAPTERS, {}])
def test_a_reference_or_a_base_is_held_beside_the_state(changes):
    config = config_of(rl__estimator=changes.get("rl__estimator", "elbo"), execution__attention="dense")
    with config.unlocked():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    run = abstract_run(nothing_to_read(config), SLICES)
    assert (run.frozen is not None) == bool(changes)
    for name in ("score", "update"):
        step = lower_program(name, config, run, num_copies(config))
        *_, rows = jax.tree.leaves(step.lowered.args_info, is_leaf=lambda x: isinstance(x, ScoredRows))
        copies = num_copies(config)
        shape = (ROWS, copies, LENGTH) if config.rl.estimator == "elbo" else (ROWS * copies, 1, LENGTH)
        assert rows.hidden.shape == rows.weights.shape == shape
        of_a_score = (ROWS,) if config.rl.estimator == "elbo" else rows.hidden.shape
        assert name == "score" or rows.old.shape == of_a_score
        assert (rows.reference is not None) == (name == "update" and "rl__kl_weight" in changes)


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"rl__estimator": "elbo"}, COPIES),
        ({"rl__estimator": "trajectory"}, 32),
        ({"rl__estimator": "trajectory", "rl__shrink": 5}, 7),
        ({"rl__estimator": "trajectory", "rl__rule": "fixed", "rl__steps": 3}, 3),
    ],
)
def test_a_block_has_at_most_as_many_steps_as_tokens(changes, copies):
    assert num_copies(config_of(**changes)) == copies


@pytest.mark.parametrize(
    ("name", "count", "host"),
    [("v5p:4x4x4", 2, "v5p:2x2x1"), ("v6e:16x16", 1, "v6e:2x2"), ("v5e:1x1", 1, "v5e:1x1"), ("v6e:2x2", 1, "v6e:2x2")],
)
def test_a_host_has_four_chips(name, count, host):
    assert host_of(Slices(parse_topology(name), count)) == Slices(parse_topology(host))


def test_mini_decodes_with_its_experts_shared_out_over_a_host():
    sizes = _decoding_mesh(config_of("llada2_mini", batch__rows=64), parse_topology("v5p:2x2x1"), 16)
    assert sizes == {"expert": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("changes", "topology", "message"),
    [
        ({}, "v5p:4x4x4", "config.batch.rows=8 cannot be shared by 16 hosts"),
        ({"model": "init_from"}, "v5p:2x2x1", 'config.init_from=""'),
        ({"execution__dtype": "float32"}, "v5p:2x2x1", "config.execution.dtype='float32': no estimate of decoding"),
        ({"rl__group": 3}, "v5p:2x2x1", "config.rl.group=3 does not divide batch.rows=8"),
        ({"data__path": "rows"}, "v5p:2x2x1", "config.data.path='rows': not in a run of reinforcement learning"),
        ({"batch__rows": 4, "rl__group": 4}, "v5p:2x2x4", "no mesh of the 4 devices of a host decodes 1 answers"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(changes, topology, message):
    with pytest.raises(InputError) as error:
        rehearse_rl(config_of(**changes), Slices(parse_topology(topology)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_busiest_experts_are_no_less_than_balanced():
    with pytest.raises(InputError, match="--busiest=0.5, expected at least 1"):
        rehearse_rl(config_of(), SLICES, busiest=0.5)
