"""The rows, counts and baselines behind tools/bench.py attention."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import llada_jax
from llada_jax.attention.dense import dense_attention
from llada_jax.attention.tiles import tiles_for
from llada_jax.attention.visibility import block_diffusion, check_contiguous, make_layout
from llada_jax.bench import attention, splash
from llada_jax.chips import CHIPS
from llada_jax.pod import packings
from tests.test_tools import run


@pytest.mark.parametrize("length", packings.LENGTHS + packings.LONG_LENGTHS)
@pytest.mark.parametrize("mean", packings.MEANS)
def test_rows_are_full(length, mean):
    segments = packings.segment_ids(length, mean)
    assert segments.shape == (packings.ROWS, length)
    check_contiguous(segments)
    lengths = np.concatenate(packings.document_lengths(length, mean))
    if mean:
        # The last document of a row is cut, so the mean is below that of the distribution.
        assert 0.6 * mean < lengths.mean() < 1.1 * mean
        assert (lengths % attention.BLOCK_SIZE != 0).mean() > 0.8


def test_needed_pairs_are_those_of_the_mask():
    segments = packings.segment_ids(2048, 512)[:1, :300]
    mask = llada_jax.block_diffusion_mask(300, 32, segments[0])
    assert attention.needed_pairs(segments, 32) == mask.sum()


@pytest.fixture(scope="module")
def packed():
    """[256] segment ids, three documents that are not aligned to blocks of 32 or tiles of 128."""
    return jnp.asarray(np.repeat([1, 2, 3], [100, 37, 119]).astype(np.int32))


@pytest.mark.parametrize("static", [True, False])
def test_splash_computes_the_same_attention(packed, static):
    heads, kv_heads, head_dim, length = 2, 1, 128, packed.size
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (
        jax.random.normal(key, (n, 2 * length, head_dim))
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    visibility = block_diffusion(make_layout(packed[None], 32))
    lists = splash.tile_lists(length, 32, packed, static, 128)

    def dense(q, k, v):
        return dense_attention(*(x.swapaxes(0, 1)[None] for x in (q, k, v)), visibility)[0].swapaxes(0, 1)

    def baseline(q, k, v):
        return splash.attention(q, k, v, lists, packed, 32, 128, pltpu.InterpretParams())

    results = []
    for function in (dense, baseline):
        out, backward = jax.vjp(function, q, k, v)
        results.append((out, *backward(cotangent)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), *results)


def test_tile_lists_hold_every_tile_that_the_mask_needs(packed):
    mask = llada_jax.block_diffusion_mask(packed.size, 32, np.asarray(packed))
    needed = mask.reshape(4, 128, 4, 128).any((1, 3))
    for by_key, info in enumerate(splash.tile_lists(packed.size, 32, packed, False, 128)):
        count = int(info.num_active_blocks[0])
        listed = set(zip(*(np.asarray(x)[:count].tolist() for x in (info.active_rows, info.active_cols)), strict=True))
        assert {tuple(tile) for tile in np.argwhere(needed.T if by_key else needed).tolist()} <= listed


def test_documents_shorten_the_list_only_at_run_time():
    segments = jnp.asarray(packings.segment_ids(2048, 512)[0])
    counts = [
        int(splash.tile_lists(2048, 32, segments, static, splash.TILE)[0].num_active_blocks[0])
        for static in (True, False)
    ]
    assert counts[1] < counts[0] == 24  # 4 noisy diagonal tiles, 10 noisy to clean, 10 clean to clean


def test_walk_counts_regions_and_copies():
    segments = jnp.ones(1024, jnp.int32)
    lists = splash.tile_lists(1024, 32, segments, True, splash.TILE)
    forward, backward = (splash.kernel_counts(lists, name, 4, 2, 128) for name in ("forward", "backward"))
    # Noisy: two diagonal tiles, one full tile below the clean diagonal, two partial on it. Clean: two on the diagonal.
    assert forward.regions == {"full": 2 * 4, "partial": 6 * 4, "init": 4 * 4, "write": 4 * 4, "step": 8 * 4}
    assert backward.regions["step"] == 8 * 4
    assert backward.regions["write"] + backward.regions["add"] == 4 * 4
    assert forward.dma_bytes > 4 * 2 * 2 * 4 * splash.TILE * 128  # at least q and the output


def test_the_table_of_a_compiled_kernel(tmp_path):
    """Splash on v5p, whose tiles are known: 1,195 and 3,414 bundles forward with floors of 1,024 cycles; compiled by
    the libtpu of JAX 0.12 (0.0.50), 1,168 and 3,395.
    """
    full, partial = (1195, 3414) if jax.__version_info__ < (0, 12) else (1168, 3395)
    output = tmp_path / "rows.json"
    arguments = "--lengths=2048", "--implementations=splash_tiles", "--passes=forward", f"--json={output}"
    done = run("bench", "attention", *arguments, timeout=590)
    assert done.returncode == 0, done.stderr
    table = json.loads(output.read_text())
    assert [row["mean_document"] for row in table] == list(packings.MEANS)
    for row in table:
        classes = row["classes"]
        assert classes["full"]["bundles"] == pytest.approx(full, rel=0.02)
        assert classes["partial"]["bundles"] == pytest.approx(partial, rel=0.02)
        assert classes["full"]["mxu_cycles"] == classes["partial"]["mxu_cycles"] == 1024
        assert row["cycles"] == sum(c["tiles"] * max(c["bundles"], c["mxu_cycles"]) for c in classes.values())
        assert classes["full"]["tiles"] == row["tiles"]["full"] / 2  # v5p's two cores share the heads
        assert 0 < row["peak_share"] < 1 and 0 < row["temp_bytes"] < 2**30
    assert table[0]["cycles"] > table[1]["cycles"]


def test_our_kernel_in_the_table(tmp_path):
    output = tmp_path / "rows.json"
    arguments = "--lengths=2048", "--implementations=llada", "--passes=forward", f"--json={output}"
    done = run("bench", "attention", *arguments, timeout=590)
    assert done.returncode == 0, done.stderr
    row = json.loads(output.read_text())[-1]
    tiles = tiles_for("TPU v5", attention.HEAD_DIM, attention.HEADS // attention.KV_HEADS, 4096)
    macs = tiles.queries * 4 * tiles.forward * tiles.chunk * 2 * attention.HEAD_DIM
    for name in ("full", "partial"):
        assert row["classes"][name]["mxu_cycles"] == macs / CHIPS["v5p"].macs_per_cycle
        assert row["classes"][name]["tiles"] == row["tiles"][name] / 2  # v5p's two cores share the key/value heads
    assert row["cycles"] == sum(c["tiles"] * max(c["bundles"], c["mxu_cycles"]) for c in row["classes"].values())


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "expected a command"),
        (["sort"], "attention"),
        (["attention", "--topology=v5p:3x3x3"], "no such slice"),
        (["attention", "--implementations=flash"], "flash"),
        (["attention", "--lengths=1000"], "2048"),
        (["attention", "--lengths=x"], "positive"),
        (["attention", "--passes=sideways"], "sideways"),
        (["attention", "--device=cpu", "--model=huge"], "huge"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run("bench", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
