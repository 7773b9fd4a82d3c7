"""LoRA: adapters equal the merged model, nothing else changes, and a step stands for plain merged weights."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import llada_jax
from llada_jax import sharding
from llada_jax.checkpoint import arrays, files, merge, weights
from llada_jax.checkpoint.weights import load_checkpoint, load_params, write_weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.order import Batch
from llada_jax.data.pack_preference import pack_preference
from llada_jax.errors import InputError
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint
from llada_jax.model import lora, parameters
from llada_jax.model.config import PRESETS, preset
from llada_jax.model.forward import forward
from llada_jax.training import loop, train_state
from llada_jax.training.config import default_config, execution, objective
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.step import denoising_loss, make_train_step
from tests.helpers.kill_loop import metrics_of

SMALL = preset("tiny_moe").replace(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=8, intermediate_size=64,
    moe_intermediate_size=16,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 500, (2, 24))


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    PRESETS["small_moe"] = SMALL
    yield
    del PRESETS["small_moe"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base")


def write_base(out, seed=0):
    """A checkpoint of random float32 weights."""
    leaves = parameters.unstack(parameters.initialize(SMALL, jax.random.key(seed)), SMALL)
    tokenizer = byte_tokenizer(SMALL.eos_token_id, SMALL.mask_token_id)
    write_weights(out, SMALL, ((name, np.asarray(leaf)) for name, leaf in leaves.items()), tokenizer.files, {})
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents so short that every packed row holds some."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"the {i} foxes"}) + "\n" for i in range(120)))
    return folder


def config_of(text, base, **changes):
    config = default_config("small_moe")
    config.init_from = str(base)
    with config.unlocked():
        config.data.update(source=str(text), cache=str(text) + "-rows", length=32, held_out_rows=4)
        config.batch.rows = 8
        config.schedule.update(kind="constant", block_size=8, steps=3)
        config.optimizer.update(learning_rate=1e-2, warmup_steps=0, decay_steps=0)
        config.lora.rank = 4
        config.checkpoint.update(every_steps=2, keep_last=None)
        config.evaluation.update(every_steps=100, block_sizes=(8,), rows=4)
        config.log_every_steps = 1
        for field, value in changes.items():
            section, name = field.split("__")
            config[section][name] = value
    return config


def train(config, workdir, devices=1):
    loop.train(config, workdir, jax.devices()[:devices])
    return metrics_of(workdir)


def tensors(step):
    return json.loads((step / "digests.json").read_text())["tensors"]


@pytest.fixture(scope="module")
def trained(text, base, tmp_path_factory):
    """The workdir of three steps."""
    workdir = tmp_path_factory.mktemp("trained")
    train(config_of(text, base), workdir)
    return workdir


def test_declarations_derive_from_the_weights():
    assert parameters.adaptable(preset("qwen3_30b_a3b")) == ("query", "key", "value", "output")
    attention, mlp = ("query", "key", "value", "output"), ("gate", "up", "down")
    assert parameters.adaptable(SMALL) == attention + mlp + tuple(f"shared_{name}" for name in mlp)
    declared = parameters.declare(lora.Lora(SMALL, 3, 1.0, ("output", "gate")))
    assert set(declared["sparse"]) == {"output_lora_a", "output_lora_b"}  # the routed experts' gate is frozen
    a, b = declared["dense"]["output_lora_a"], declared["dense"]["output_lora_b"]
    assert (a.shape, a.axes) == ((2, 16, 3), ("heads", None, None))
    assert (b.shape, b.axes, b.init) == ((3, 32), (None, "embed"), "zeros")
    assert declared["dense"]["gate_lora_b"].axes == (None, "mlp")


def explicitly_merged(params, values, scale):
    """W + scale A B of every adapted weight, in float64 and as plain matrices."""
    merged = {name: dict(node) if isinstance(node, dict) else node for name, node in params.items()}
    for group, node in values.items():
        for name in {lora.weight_of(name) for name in node}:
            weights = (params[group][name], *(node[adapter] for adapter in lora.adapter_names(name)))
            w, a, b = (np.asarray(x, np.float64) for x in weights)
            low_rank = np.einsum("lir,lro->lio", a.reshape(len(a), -1, 3), b.reshape(len(b), 3, -1))
            merged[group][name] = jnp.asarray(w + scale * low_rank.reshape(w.shape), jnp.float32)
    return merged


@pytest.mark.parametrize("targets", [parameters.adaptable(SMALL), ("query", "output", "shared_down")])
def test_adapters_are_the_merged_model(targets):
    params = parameters.initialize(SMALL, jax.random.key(0))
    adapters = lora.Lora(SMALL, 3, 7.0, targets)
    values = jax.tree.map(
        lambda x: 0.2 * jnp.sin(jnp.arange(float(x.size))).reshape(x.shape), parameters.abstract(adapters)
    )
    expected = forward(explicitly_merged(params, values, 7 / 3), SMALL, TOKENS)
    np.testing.assert_allclose(forward(lora.attach(params, values, adapters), SMALL, TOKENS), expected, atol=2e-5)
    assert np.abs(expected - forward(params, SMALL, TOKENS)).max() > 1e-2


def train_step_of(trained, params, **edits):
    """(compiled step, its arguments) of a ModelConfig or a Lora. edits: of config.editing."""
    config = default_config("small_moe")
    config.editing.update(edits)
    optimizer = make_optimizer(config.optimizer, trained, 3)
    step = make_train_step(trained, denoising_loss(SMALL, objective(config), execution(config), 0), optimizer)
    ids = np.random.default_rng(3).integers(0, 500, (4, 32)).astype(np.int32)
    row_ids = np.arange(4, dtype=np.uint32)
    batch = Batch(ids, np.ones_like(ids), np.ones(ids.shape, bool), row_ids, np.zeros_like(row_ids))
    frozen = parameters.initialize(SMALL, jax.random.key(0), jnp.bfloat16)
    arguments = (train_state.create(params, optimizer), frozen, jax.device_put(batch), jnp.int32(8), jnp.float32(0))
    return step.lower(*arguments, "both").compile(), arguments


def test_steps_leave_the_base_alone_and_compute_no_gradient_of_its_size():
    adapters = lora.Lora(SMALL, 3, 7.0, parameters.adaptable(SMALL))
    step, (state, frozen, *rest) = train_step_of(adapters, parameters.initialize(adapters, jax.random.key(1)))
    before = jax.tree.map(np.array, (state.params, frozen))
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, *rest)
        losses.append(metrics["loss"])
    assert jax.tree.all(jax.tree.map(np.array_equal, before[1], frozen))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before[0], state.params)))
    assert losses[2] < losses[0]

    full, arguments = train_step_of(SMALL, jax.tree.map(lambda x: x.astype(jnp.float32), frozen))
    gradient_of_experts = re.compile(r"= b?f\d+\[(1,)?16,(32,16|16,32)\]\S* (broadcast|add|dynamic-update-slice)\(")
    assert not gradient_of_experts.search(step.as_text()) and gradient_of_experts.search(full.as_text())
    np.testing.assert_allclose(full(*arguments)[1]["loss"], losses[0], rtol=1e-6)  # B = 0: the base


def test_drafts_are_those_of_base_and_adapters():
    edits = dict(weight=0.5, replace_high=0.3, turns=2, threshold_low=0.0, threshold_high=0.0)
    adapters = lora.Lora(SMALL, 3, 7.0, parameters.adaptable(SMALL))
    values = jax.tree.map(
        lambda x: 0.2 * jnp.sin(jnp.arange(float(x.size))).reshape(x.shape), parameters.abstract(adapters)
    )
    frozen = jax.tree.map(
        lambda x: x.astype(jnp.float32), parameters.initialize(SMALL, jax.random.key(0), jnp.bfloat16)
    )
    merged = explicitly_merged(frozen, values, 7 / 3)
    step, arguments = train_step_of(adapters, values, **edits)
    full, of_merged = train_step_of(SMALL, merged, **edits)
    metrics, expected = step(*arguments)[1], full(*of_merged)[1]
    for name in ("loss", "unmasked_nll", "wrong_share", "wrong_accuracy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-2)
    assert metrics["wrong_share"] > 0.3


def test_a_step_holds_adapters_and_the_name_of_their_base(trained, base):
    step = trained / "checkpoints" / "3"
    adapters = weights.read_stored_config(step)
    assert set(tensors(step)["params"]) == set(parameters.leaves(adapters))
    moments = {name.split(".mu.")[1] for name in tensors(step)["optimizer"] if ".mu." in name}
    assert moments == {f"{group}.{name}" for group, node in parameters.abstract(adapters).items() for name in node}
    record = json.loads((step / "config.json").read_text())["lora"]
    assert (record["base"], record["rank"], record["alpha"]) == (str(base), 4, 16.0)
    assert record["base_digest"] == json.loads((base / "digests.json").read_text())["sha256"]


def test_the_run_says_what_trains(trained, text, base, capsys):
    train(config_of(text, base), trained)  # finished already
    model, adapters = (
        parameters.count(SMALL),
        parameters.count(weights.read_stored_config(trained / "checkpoints" / "3")),
    )
    targets = "query, key, value, output, gate, up, down, shared_gate, shared_up, shared_down"
    said = f"LoRA rank 4 on {targets}: {adapters:,} of {model + adapters:,} parameters train\n"
    assert said in capsys.readouterr().out


def test_a_step_stands_for_its_merged_weights_however_it_is_read(trained, base, tmp_path):
    step = trained / "checkpoints" / "3"
    adapters = weights.read_stored_config(step)
    names, treedef = jax.tree.flatten(arrays.stacked_names(adapters), is_leaf=arrays.is_names)
    reader = files.TensorReader(step, "params", files.read_digests(step).tensors["params"])
    values = jax.tree.unflatten(treedef, [arrays.read_whole(reader, each) for each in names])
    plain = load_params(base, dtype="float32")
    attached = forward(lora.attach(plain, values, adapters), SMALL, TOKENS)
    model = load_checkpoint(trained)
    assert model.config == SMALL and model.tokenizer is not None
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert np.abs(attached - forward(plain, SMALL, TOKENS)).max() > 0.05
    np.testing.assert_allclose(forward(model.params, SMALL, TOKENS), attached, atol=1e-4)

    everywhere = jax.sharding.NamedSharding(sharding.make_mesh(fsdp=8), jax.sharding.PartitionSpec())
    sharded = load_params(step, shardings=jax.tree.map(lambda _: everywhere, model.params))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6, atol=1e-7), sharded, model.params))
    export_checkpoint(str(trained), str(tmp_path / "hf"))
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "again"))
    merge.merge_checkpoints([step], tmp_path / "mean")
    for other in (tmp_path / "again", tmp_path / "mean"):
        assert jax.tree.all(jax.tree.map(np.array_equal, load_params(other), model.params))


def test_merging_keeps_the_dtype_of_the_base():
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((4, 2, 8), (4, 2, 3), (3, 8)))
    w = w.astype(ml_dtypes.bfloat16)
    expected = (w.astype(np.float64) + 0.5 * np.einsum("hkr,rd->hkd", a.astype(np.float64), b)).astype(np.float32)
    for xp in (np, jnp):
        merged = lora.merge(xp.asarray(w), xp.asarray(a), xp.asarray(b), 0.5, xp)
        assert merged.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(merged), expected.astype(ml_dtypes.bfloat16))


# --- a base of bfloat16, in which most of a small update would be lost ----------------------------------------------


def small_step(folder, base, text, name="run", **changes):
    """The newest step of a run of adapters at a rate of 1e-4."""
    train(config_of(text, base, optimizer__learning_rate=1e-4, **changes), folder / name)
    return folder / name / "checkpoints" / "3"


@pytest.fixture(scope="module")
def narrow(text, base, tmp_path_factory):
    """(base in bfloat16, a LoRA step on it, a LoRA step on that)"""
    folder = tmp_path_factory.mktemp("narrow")
    merge.merge_checkpoints([base], folder / "base", np.dtype(ml_dtypes.bfloat16))
    first = small_step(folder, folder / "base", text)
    targets = ("query", "shared_down")
    return folder / "base", first, small_step(folder, first, text, "again", lora__rank=2, lora__targets=targets)


def exactly(step):
    """{name: W + sum of scale A B} of all LoRA steps below `step`, float64."""
    adapters = weights.read_stored_config(step)
    reader = files.TensorReader(step, "params", files.read_digests(step).tensors["params"])
    if not isinstance(adapters, lora.Lora):
        return {name: reader.read(name).astype(np.float64) for name in reader.entries}
    exact = exactly(weights.base_of(adapters, step))
    for name in {lora.weight_of(name) for name in reader.entries}:
        a, b = (reader.read(each).astype(np.float64) for each in lora.adapter_names(name))
        exact[name] = exact[name] + adapters.scale * np.tensordot(a, b, 1)
    return exact


def error_of(rounded, step, base):
    """Of `rounded`, {name: tensor}: its distance from the exact weights, over theirs from the base."""
    exact, start = exactly(step), exactly(base)
    squares = [
        (np.square(rounded[n].astype(np.float64) - w).sum(), np.square(w - start[n]).sum()) for n, w in exact.items()
    ]
    lost, update = np.sqrt(np.sum(squares, axis=0))
    return lost / update


def test_a_step_on_bfloat16_is_read_exactly_and_so_is_one_on_that(narrow, tmp_path):
    base, *steps = narrow
    rounded = {name: w.astype(ml_dtypes.bfloat16) for name, w in exactly(steps[0]).items()}
    assert error_of(rounded, steps[0], base) > 0.15  # or there would be nothing to lose
    for step in steps:
        reader = weights.open_weights(step)
        assert error_of({name: reader.read(name) for name in reader.entries}, step, base) < 1e-3
        assert {e.dtype for n, e in reader.entries.items() if e.dtype != reader.stored[n].dtype} == {
            np.dtype("float32")
        }
        shardings = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), parameters.abstract(SMALL)
        )
        for params in (load_params(step, dtype="float32"), load_params(step, dtype="float32", shardings=shardings)):
            assert error_of({n: np.asarray(w) for n, w in parameters.unstack(params, SMALL).items()}, step, base) < 1e-3


def test_a_full_run_starts_from_the_exact_weights(narrow, text, tmp_path):
    base, _, step = narrow
    config = config_of(text, step, lora__rank=0, optimizer__learning_rate=1e-30, optimizer__weight_decay=0.0)
    config.schedule.steps = 1
    train(config, tmp_path)
    reader = weights.open_weights(tmp_path / "checkpoints" / "1")
    assert error_of({name: reader.read(name) for name in reader.entries}, step, base) < 1e-3


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_that_stay_narrow_keep_the_adapters_beside_them(narrow, base, dtype):
    """What samples and evaluates is the model that was trained."""
    narrow_base, *steps = narrow
    everywhere = jax.sharding.NamedSharding(sharding.make_mesh(fsdp=8), jax.sharding.PartitionSpec())
    for step, ranks in zip(steps, (4, 6), strict=True):
        params = load_params(step, dtype=dtype)
        assert params["embedding"].dtype == params["dense"]["query"].dtype == jnp.bfloat16
        assert params["dense"]["query_lora_a"].shape[-1] == params["dense"]["query_lora_b"].shape[1] == ranks
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        exact = parameters.stack({n: w.astype(np.float32) for n, w in exactly(step).items()}, SMALL)
        start = load_params(narrow_base, dtype="float32")
        actual, expected, before = (forward(each, SMALL, TOKENS) for each in (wide, exact, start))
        assert np.abs(actual - expected).max() < 0.02 * np.abs(expected - before).max()
        sharded = load_params(
            step, dtype=dtype, shardings=jax.tree.map(lambda _: everywhere, parameters.abstract(SMALL))
        )
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), sharded, params))


def test_they_decode_in_the_dtype_of_the_base(narrow):
    model = load_checkpoint(narrow[2])
    out = llada_jax.generate(model.params, model.config, [TOKENS[0, :5]], llada_jax.GenerateConfig(8, block_length=8))
    assert len(out.tokens[0]) == 8 or out.tokens[0][-1] == SMALL.eos_token_id
    wide = load_params(narrow[1], dtype="bfloat16")
    assert forward(wide, SMALL, TOKENS).dtype == jnp.float32


def test_export_and_merge_round_once_and_say_what_that_costs(narrow, tmp_path, capsys):
    base, _, step = narrow
    lost = error_of({name: w.astype(ml_dtypes.bfloat16) for name, w in exactly(step).items()}, step, base)
    says = re.compile(r"rounding lost ([\d.]+)% of the adapters' update; --dtype=float32 keeps it")

    def said():
        return [float(share) / 100 for share in says.findall(capsys.readouterr().out)]

    for narrow_again in (None, np.dtype(ml_dtypes.bfloat16)):
        merge.merge_checkpoints([step], tmp_path / f"merged-{narrow_again}", narrow_again)
        assert said() == [pytest.approx(lost, abs=2e-3)]
        assert load_params(tmp_path / f"merged-{narrow_again}")["dense"]["query"].dtype == jnp.bfloat16
    merge.merge_checkpoints([step, step], tmp_path / "wide", np.dtype("float32"))
    assert said() == []
    reader = weights.open_weights(tmp_path / "wide")
    assert error_of({name: reader.read(name) for name in reader.entries}, step, base) < 1e-3

    export_checkpoint(str(step), str(tmp_path / "hf"))
    assert said() == [pytest.approx(lost, abs=2e-3)]
    export_checkpoint(str(step), str(tmp_path / "hf32"), dtype="float32")
    assert said() == []
    for name, same in (("hf", tmp_path / "merged-None"), ("hf32", tmp_path / "wide")):
        import_checkpoint(str(tmp_path / name), str(tmp_path / f"{name}-again"))
        for tensor, leaf in parameters.unstack(load_params(tmp_path / f"{name}-again"), SMALL).items():
            np.testing.assert_array_equal(leaf, weights.open_weights(same).read(tensor))


def test_resumed_run_is_the_uninterrupted_one(trained, text, base, tmp_path):
    run, moved = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(base, tmp_path / "moved")
    shutil.rmtree(run / "checkpoints" / "3")
    assert train(config_of(text, moved), run) == metrics_of(trained)
    assert tensors(run / "checkpoints" / "3") == tensors(trained / "checkpoints" / "3")
    assert weights.read_stored_config(run / "checkpoints" / "3").base == str(moved)


def test_a_mesh_agrees_with_one_device(trained, text, base, tmp_path):
    split = train(config_of(text, base, mesh__data=2, mesh__fsdp=4), tmp_path, devices=8)
    for one, other in zip(metrics_of(trained), split, strict=True):
        assert one.keys() == other.keys()
        assert other.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=2e-4)
        assert other.get("nelbo", 0) == pytest.approx(one.get("nelbo", 0), rel=2e-4)


def test_dpo_starts_at_log_2_on_the_adapters_of_the_stage_before(trained, text, base, tmp_path):
    """The base is itself a LoRA step; policy and reference are one frozen model, whenever it scores."""
    answers = [{"prompt": f"{i} plus 1 is", "chosen": f" {i + 1}.", "rejected": " 0, I think."} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    tokenizer = weights.load_tokenizer(base)
    pack_preference(str(tmp_path / "pairs.jsonl"), tokenizer, str(tmp_path / "rows"), 64, block_align=8)
    config = config_of(text, trained, data__path=str(tmp_path / "rows"), data__source="", data__length=64)
    config.preference.enabled, config.schedule.steps = True, 2
    frozen = train(config, tmp_path / "frozen")
    first, second = (row for row in frozen if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == 0
    assert first["gradient_norm"] > 0 and abs(second["margin"]) > 1e-3
    assert weights.read_stored_config(tmp_path / "frozen" / "checkpoints" / "2").base == str(
        trained / "checkpoints" / "3"
    )
    after, before, start = (forward(load_params(path), SMALL, TOKENS) for path in (tmp_path / "frozen", trained, base))
    assert 0 < np.abs(after - before).max() < np.abs(after - start).max()  # merged twice

    config.preference.reference = "precomputed"
    for a, b in zip(frozen, train(config, tmp_path / "precomputed"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "margin", "gradient_norm", "nelbo", "preference_margin"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), (a["step"], name)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(lora__rank=-1), "config.lora.rank=-1"),
        (dict(lora__alpha=0.0), "config.lora.alpha=0.0"),
        (
            dict(lora__targets=("query", "router")),
            "config.lora.targets: 'router' takes no adapter, expected some of q",
        ),
        (dict(lora__targets=("embedding",)), "config.lora.targets: 'embedding'"),
        (dict(lora__targets=()), r"config.lora.targets=\(\)"),
        (dict(lora__rank=4, base=""), 'config.init_from="": config.lora.rank=4'),
    ],
)
def test_bad_configs_name_the_field_and_write_nothing(text, base, tmp_path, changes, message):
    base = changes.pop("base", base)
    with pytest.raises(InputError, match=message):
        train(config_of(text, base, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_kind_of_run_does_not_resume(trained, text, base):
    with pytest.raises(InputError, match="lora.rank=4, this run None"):
        train(config_of(text, base, lora__rank=0, schedule__steps=4), trained)
    with pytest.raises(InputError, match="lora.alpha=16.0, this run 8.0"):
        train(config_of(text, base, lora__alpha=8.0, schedule__steps=4), trained)


def test_a_base_that_is_gone_or_changed_is_refused(trained, text, base, tmp_path):
    step, out = trained / "checkpoints" / "3", tmp_path / "out"
    attempts = [
        lambda: load_checkpoint(trained),
        lambda: load_params(step),
        lambda: export_checkpoint(str(trained), str(out)),
        lambda: merge.merge_checkpoints([step], out),
        lambda: train(config_of(text, trained), out),  # a second stage
    ]
    assert weights.verify(step) == []
    base.rename(tmp_path / "moved")
    try:
        for attempt in attempts:
            with pytest.raises(InputError, match=f"the base of its adapters cannot be read: checkpoint {base}"):
                attempt()
        write_base(base, seed=1)
        for attempt in attempts:
            with pytest.raises(InputError, match=f"the base of its adapters, {base}, has changed since"):
                attempt()
        (problem,) = weights.verify(step)
        assert "has changed since" in problem and not out.exists()
        with pytest.raises(InputError, match="lora.base_digest"):
            train(config_of(text, base, schedule__steps=4), trained)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        (tmp_path / "moved").rename(base)
