"""MFU and memory of a run, and traces of its steps."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.attention.visibility import block_causal, block_diffusion, layout
from llada_jax.chips import CHIPS
from llada_jax.diffusion.schedule import Phase
from llada_jax.errors import InputError
from llada_jax.model.config import preset
from llada_jax.model.useful_flops import allowed_pairs, mean_pairs, useful_flops
from llada_jax.monitoring.mfu import Speed, peak_flops
from llada_jax.monitoring.profiling import Profile, parse_steps
from llada_jax.training.config import default_config


@pytest.mark.parametrize("block_origin", ["global", "document"])
@pytest.mark.parametrize("halves,block_size", [("both", 4), ("both", 1), ("noisy", 24), ("clean", 1)])
def test_pairs_are_those_of_the_mask(halves, block_size, block_origin):
    segments = np.array([[1] * 7 + [2] * 11 + [3] * 6, [1] * 9 + [2] * 2 + [0] * 13, [0] * 24], np.int32)
    where = layout(jnp.asarray(segments), block_size, block_origin)
    mask = block_diffusion(where) if halves == "both" else block_causal(where)
    assert mean_pairs(segments, block_size, halves, block_origin) * 3 == allowed_pairs(mask)


def devices(kind, count, **memory):
    one = dict(device_kind=kind, process_index=0)
    return [
        SimpleNamespace(**one, memory_stats=lambda i=i: {k: v + i for k, v in memory.items()}) for i in range(count)
    ]


def speed_of(kind, count=4, **changes):
    config = default_config("tiny")
    for field, value in changes.items():
        node, name = field.split("__")
        config[node][name] = value
    phases = [Phase("warmup", 4, 1, "both"), Phase("stable", 256, 1, "noisy")]
    chips = devices(kind, count, bytes_in_use=5, peak_bytes_in_use=9)
    return phases, Speed(config, phases, preset("tiny"), np.ones((2, 256), np.int32), chips)


def test_mfu_is_useful_flops_over_the_peak():
    phases, speed = speed_of("TPU v5")
    # A row of one document: a noisy token sees its block and what is before, a clean one up to its block's end.
    pairs = 2 * sum(4 * (block + 1) * 4 for block in range(64))
    flops = useful_flops(preset("tiny"), 8, 256, "both", pairs)
    assert speed.fields(phases[0], 0.5)["mfu"] == pytest.approx(flops / (0.5 * 4 * 459e12))
    assert speed.fields(phases[1], 0.5)["mfu"] < speed.fields(phases[0], 0.5)["mfu"]
    complementary = speed_of("TPU v5", objective__complementary=True)[1]
    assert complementary.fields(phases[0], 0.5)["mfu"] == pytest.approx(2 * speed.fields(phases[0], 0.5)["mfu"])
    assert speed.fields(phases[0], 0.5)["hbm_bytes"] == 8 and speed.fields(phases[0], 0.5)["hbm_peak_bytes"] == 12
    assert "mfu" not in speed.fields(phases[0], 0.0)


@pytest.mark.parametrize("kind,changes", [("cpu", {}), ("NVIDIA H200", {}), ("TPU v5", dict(lora__rank=4))])
def test_no_mfu_is_claimed_where_none_is_known(kind, changes):
    phases, speed = speed_of(kind, **changes)
    assert "mfu" not in speed.fields(phases[0], 0.5)


def test_nothing_is_said_of_the_memory_of_a_cpu():
    config = default_config("tiny")
    phase = Phase("warmup", 4, 1, "both")
    documents = np.ones((2, 256), np.int32)
    assert Speed(config, [phase], preset("tiny"), documents, jax.devices()).fields(phase, 0.5) == {}


def test_peaks_count_chips_not_devices():
    assert peak_flops(devices("TPU7x", 8)) == pytest.approx(4 * CHIPS["tpu7x"].peak_bf16)
    assert peak_flops([*devices("TPU v5", 1), *devices("cpu", 1)]) is None


@pytest.mark.parametrize("text", ["10", "10:", ":13", "13:10", "10:10", "0:3", "a:b", "1:2:3"])
def test_bad_steps_to_trace(text):
    with pytest.raises(InputError, match="config.profile.steps="):
        parse_steps(text)


def traced(monkeypatch, tmp_path, steps, numbers):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    profile = Profile(tmp_path, parse_steps(steps))
    for step in numbers:
        profile.before(step, None)
        events.append(step)
        profile.after(step, None)
    profile.close()
    return events


def test_only_the_chosen_steps_are_traced(monkeypatch, tmp_path):
    assert traced(monkeypatch, tmp_path, "3:5", range(1, 7)) == [1, 2, "start", 3, 4, "stop", 5, 6]
    assert traced(monkeypatch, tmp_path, "", range(1, 4)) == [1, 2, 3]
    assert traced(monkeypatch, tmp_path, "3:9", range(5, 7)) == ["start", 5, 6, "stop"]  # resumed, then stopped
