"""A pass of decoding, compiled for a slice that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llada_jax.attention.decoding import cached
from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.model.config import preset
from llada_jax.model.parameters import count
from llada_jax.pod import report, step_cost
from llada_jax.pod.decoding import rehearse_decode as rehearse_decode_module
from llada_jax.pod.decoding.rehearse_decode import rehearse_decode
from llada_jax.pod.lower import Slices
from llada_jax.sampling import predict
from llada_jax.training.config import default_config

ROOT = Path(__file__).parents[3]
SLICES = Slices(parse_topology("v5p:2x2x1"))
GIB = 2**30
FILLED = 1056  # whole chunks, and a part of one


def config(model="smollm2_135m"):
    config = default_config(model)
    config.alignment = "same"
    return config


@pytest.fixture(scope="module")
def results():
    return {filled: rehearse_decode(config(), SLICES, 8, 2048, filled) for filled in (0, FILLED)}


def test_a_pass_reads_its_weights_and_its_caches(results):
    empty, half = results[0], results[FILLED]
    assert half.memory.parameters == 2 * 134_515_008  # bfloat16, whole on every chip
    positions = 8 / 4 * 2048
    assert half.memory.optimizer == pytest.approx(2 * 30 * positions * 64 * 3 * 2, rel=0.15)  # and padding
    assert half.fits and half.memory.total < GIB
    assert half.roofline.bytes > empty.roofline.bytes
    # The weights take 0.1 ms from a chip's memory.
    assert 0.05e-3 < sum(empty.seconds.values()) < sum(half.seconds.values()) < 50e-3


def test_the_loop_over_the_cache_runs_as_often_as_it_is_filled(results):
    def runs(result, scope):
        return max((line.runs for line in result.lines if f"/{scope}/" in line.scope), default=0)

    chunks = FILLED // cached.chunk_of(2048)
    assert chunks > 1
    assert runs(results[FILLED], cached.WHOLE_CHUNKS) == 30 * chunks and runs(results[0], cached.WHOLE_CHUNKS) <= 30
    assert 0 < runs(results[FILLED], cached.OTHER_CHUNKS) <= 30


@pytest.mark.parametrize(("model", "layers"), [("smollm2_135m", 30), ("tiny_moe", 4)])
def test_attention_and_head_are_parts(model, layers, monkeypatch):
    """What is neither keeps its weights' matmuls; no second is lost or won."""
    plain = []

    def both(*arguments, parts, **others):
        plain.extend(step_cost.step_lines(*arguments, **others))
        return step_cost.step_lines(*arguments, parts=parts, **others)

    monkeypatch.setattr(rehearse_decode_module, "step_lines", both)
    rows, filled = 8, 288
    result = rehearse_decode(config(model), SLICES, rows, 512, filled)
    assert [(line.name, line.seconds) for line in plain] == [(line.name, line.seconds) for line in result.lines]
    assert not any(line.part in ("attention", "head") for line in plain)
    assert result.seconds["attention"] > 0 and result.seconds["head"] > 0

    in_cache = [x for x in result.lines if {cached.WHOLE_CHUNKS, cached.OTHER_CHUNKS} & set(x.scope.split("/"))]
    assert in_cache and {line.part for line in in_cache} == {"attention"}
    predicted = [line for line in result.lines if f"/{predict.TILES}/" in line.scope]
    assert predicted and {line.part for line in predicted} <= {"head", "collectives"}

    flops = {part: sum(line.flops for line in result.lines if line.part == part) for part in step_cost.PARTS}
    values, tokens = preset(model), rows / 4 * 2 * 32
    # tokens: of two blocks, on one of four devices; each scores its quarter of the vocabulary for all rows.
    tile = min(predict.MESH_TILE, 4 * tokens / 2)
    tiles = predict.num_tiles(4 * tokens / 4, on_mesh=True)
    times = flops["head"] / (2 * values.hidden_size * values.vocab_size / 4 * tile * tiles)
    assert times == 1 or (times == 2 and model == "tiny_moe")  # small products XLA makes again instead of keeping them
    if model == "smollm2_135m":
        heads = values.head_dim * 2 * (values.num_heads + values.num_kv_heads)
        weights = layers * values.hidden_size * (heads + 3 * values.intermediate_size)
        assert flops["dense"] == pytest.approx(2 * tokens * weights)


def test_experts_in_int8_take_half_of_the_memory():
    """Experts too narrow for the kernel: megablox gets a layer dequantised."""
    found, values = rehearse_decode(config("tiny_moe"), SLICES, 8, 512, 288, int8_experts=True), preset("tiny_moe")
    layers, width = len(values.layer_groups["sparse"]), values.moe_intermediate_size
    stacks = 3 * layers * values.num_experts * values.hidden_size * width
    scales = 4 * layers * values.num_experts * (2 * width + values.hidden_size)
    assert found.memory.parameters == 2 * (count(values) - stacks) + stacks + scales
    assert found.seconds["experts"] > 0


def test_words_and_numbers(results):
    text = report.describe_decoding(results[FILLED])
    values = results[FILLED].to_json()
    assert f"{sum(values['seconds'].values()) * 1e3:.2f} ms" in text and "compute-bound" in text
    assert values["fits"] and values["passes_per_second"] == pytest.approx(1 / sum(values["seconds"].values()))
    json.dumps(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 2048, 1000), "--filled=1000, expected a multiple of 32, at most --canvas=2048"),
        ((8, 2048, 4096), "--filled=4096, expected a multiple of 32, at most --canvas=2048"),
        ((8, 100, 64), "--canvas=100, expected a multiple of 32"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(InputError, match=message):
        rehearse_decode(config(), SLICES, *arguments)


def test_rows_that_cannot_be_shared():
    with pytest.raises(InputError, match="--rows=6 cannot be shared by 4 devices"):
        rehearse_decode(config(), SLICES, 6, 2048, 0)


def test_from_the_command_line(tmp_path):
    line = [
        sys.executable, str(ROOT / "tools" / "rehearse.py"), "--decode", "--topology=v5p:2x2x1", "--rows=4",
        f"--config={ROOT / 'configs' / 'wsd.py'}:smollm2_135m", "--config.alignment=same", "--canvas=256",
        "--filled=128", f"--json={tmp_path / 'out.json'}",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a pass over 4 rows" in done.stdout and json.loads((tmp_path / "out.json").read_text())["filled"] == 128


@pytest.mark.parametrize("chunk", [256, 512])  # one by the kernel of windows, one by that of training
def test_a_chunk_of_a_prompt(chunk):
    """By kernels. The head, and what follows the last keys, cost nothing."""
    model = config()
    model.execution.attention = "kernel"
    model.mesh.data, model.mesh.fsdp = 4, 1
    result = rehearse_decode(model, SLICES, 8, 2048, 1024, chunk=chunk)
    assert result.positions == 4 * chunk and result.seconds["head"] == 0 < result.seconds["attention"]
    values = preset("smollm2_135m")
    heads = values.head_dim * 2 * (values.num_heads + values.num_kv_heads)
    a_layer = values.hidden_size * (heads + 3 * values.intermediate_size)
    own = values.hidden_size * 2 * values.num_kv_heads * values.head_dim
    flops = sum(line.flops for line in result.lines if line.part == "dense")
    assert flops == pytest.approx(2 * chunk * (29 * a_layer + own))
    text = report.describe_decoding(result)
    assert f"a chunk of {chunk} tokens of 4 prompts, 1024 cached positions per row" in text
    assert 0 < result.share_of_peak < 1 and f"{result.share_of_peak:.0%} of the peak" in text
    assert result.to_json()["chunk"] == chunk
    with pytest.raises(InputError, match="--filled=1024 and --prefill=1056 are more than --canvas=2048"):
        rehearse_decode(model, SLICES, 8, 2048, 1024, chunk=1056)
