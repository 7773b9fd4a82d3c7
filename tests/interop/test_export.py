"""HF -> ours -> HF gives back every tensor byte for byte, and what was added on the way."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from llada_jax.checkpoint.weights import read_config, write_weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.interop import hf_config
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import check_exportable, export_checkpoint
from llada_jax.model import parameters
from llada_jax.model.config import RopeScaling, preset
from tests.helpers.paths import GOLDENS

MTP_LAYER = "model.layers.2."


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", ["llada2_tiny", "llada2_tiny_yarn", "ling_tiny", "ling_tiny_mtp"])
@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_goldens_come_back_byte_for_byte(tmp_path, name, shard_bytes):
    import_checkpoint(str(GOLDENS / name), str(tmp_path / "ours"))
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"), shard_bytes)
    source = {n: t for n, t in tensors_of(GOLDENS / name).items() if name != "ling_tiny_mtp" or MTP_LAYER not in n}
    assert_same(tensors_of(tmp_path / "hf"), source)
    if shard_bytes == 300_000:
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in source.values())
        assert {p.name for p in (tmp_path / "hf").glob("*.safetensors")} == set(index["weight_map"].values())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (GOLDENS / name, tmp_path / "hf"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == ({"num_nextn_predict_layers"} if name == "ling_tiny_mtp" else set())


DENSE = preset("tiny").replace(num_layers=2, hidden_size=32, head_dim=8, rotary_dim=8, intermediate_size=48)
SPARSE = preset("tiny_moe").replace(num_layers=2, hidden_size=32, head_dim=8, rotary_dim=4, moe_intermediate_size=16)
SOFTMAX = dict(num_shared_experts=0, num_dense_layers=0, router="softmax", expert_bias=False, num_groups=1,
               num_selected_groups=1, routed_scaling_factor=1.0, rotary_dim=8)  # fmt: skip
CONFIGS = {
    "llama": DENSE.replace(alignment="shifted", rope_scaling=RopeScaling("llama3", 8.0, 512)),
    "llama, same": DENSE,
    "llama, linear": DENSE.replace(rope_scaling=RopeScaling("linear", 4.0)),
    "tied": DENSE.replace(tie_word_embeddings=True, mask_token_id=None),
    "tied, stored": DENSE.replace(tie_word_embeddings=True, stores_tied_head=True),
    "qwen2": DENSE.replace(architecture="qwen2", qkv_bias=True),
    "qwen3": DENSE.replace(architecture="qwen3", qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 1024)),
    "qwen3_moe": SPARSE.replace(architecture="qwen3_moe", **SOFTMAX),
    "llada2": SPARSE,
    "llada2.2": SPARSE.replace(routing_block=32, routing_block_experts=8, delete_token_id=7, insert_token_id=8),
    "llama that edits": DENSE.replace(delete_token_id=7, insert_token_id=8),
    "llada2, shifted": SPARSE.replace(alignment="shifted"),
    "ling": SPARSE.replace(architecture="bailing_moe", alignment="shifted"),
    "ling, same": SPARSE.replace(architecture="bailing_moe"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_model_that_trains_is_exported_and_comes_back(tmp_path, config):
    """Without a flag: the alignment too. A Ling model that predicts its own tokens is a LLaDA2 model."""
    rng = np.random.default_rng(0)
    leaves = {n: rng.standard_normal(p.shape, np.float32) for n, (p, _) in parameters.leaves(config).items()}
    write_weights(tmp_path / "a", config, leaves.items(), {}, {})
    export_checkpoint(str(tmp_path / "a"), str(tmp_path / "hf"))
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "b"))
    found, _ = read_config(tmp_path / "b")
    if config.architecture == "bailing_moe" and config.alignment == "same":
        config = config.replace(architecture="llada2_moe")
    assert found == config
    digests = [json.loads((tmp_path / x / "digests.json").read_text())["tensors"] for x in "ab"]
    assert digests[0] == digests[1]


def test_a_converted_ling_model_is_called_llada2(tmp_path, capsys):
    import_checkpoint(str(GOLDENS / "ling_tiny_mtp"), str(tmp_path / "ours"), alignment="same", mask_token_id=511)
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (GOLDENS / "ling_tiny_mtp", tmp_path / "hf"))
    assert after == before | {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
        "mask_token_id": 511,
        "num_nextn_predict_layers": 0,
    }
    assert "wants a copy of configuration_llada2_moe.py and modeling_llada2_moe.py" in capsys.readouterr().out


def test_dtype_but_not_of_a_float32_expert_bias(tmp_path):
    import_checkpoint(str(GOLDENS / "llada2_tiny"), str(tmp_path / "ours"))
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"), dtype="bfloat16")
    stored, found = tensors_of(GOLDENS / "llada2_tiny"), tensors_of(tmp_path / "hf")
    for name, value in stored.items():
        dtype = np.float32 if name.endswith("expert_bias") else ml_dtypes.bfloat16
        assert found[name].dtype == dtype and np.array_equal(found[name], value.astype(dtype)), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(InputError, match="--dtype=int8, expected one of float32, bfloat16"):
        export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "x"), dtype="int8")


def test_step(tmp_path):
    for step in (10, 20):
        import_checkpoint(str(GOLDENS / "llada2_tiny"), str(tmp_path / "run" / "checkpoints" / str(step)))
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "hf"), step=10)
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(GOLDENS / "llada2_tiny"))
    with pytest.raises(InputError, match="--step=15: .*run has 20, 10"):
        export_checkpoint(str(tmp_path / "run"), str(tmp_path / "x"), step=15)


def test_what_config_json_cannot_say_is_refused(tmp_path):
    config = DENSE.replace(qk_norm=True)
    leaves = {n: np.zeros(p.shape, np.float32) for n, (p, _) in parameters.leaves(config).items()}
    write_weights(tmp_path / "a", config, leaves.items(), {}, {})
    with pytest.raises(InputError, match="qk_norm=True: llama has no config.json that says so"):
        export_checkpoint(str(tmp_path / "a"), str(tmp_path / "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_an_export_could_not_say_is_known_before_training():
    """Imported when the key was still dropped in silence."""
    hf = hf_config.to_hf(DENSE)
    check_exportable(DENSE.extended(2), {"source": {"hf_config": hf}})
    check_exportable(DENSE.extended(2), {})
    with pytest.raises(InputError, match="logits_scaling=8.0 is not supported"):
        check_exportable(DENSE.extended(2), {"source": {"hf_config": hf | {"logits_scaling": 8.0}}})


def test_an_added_mask_token_is_exported_and_comes_in_again(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (GOLDENS / "ling_tiny").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name, content in byte_tokenizer(508).files.items():
        (source / name).write_bytes(content)
    import_checkpoint(str(source), str(tmp_path / "a"), add_mask_token=True)
    export_checkpoint(str(tmp_path / "a"), str(tmp_path / "hf"))
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "b"))
    a, b = (json.loads((tmp_path / x / "config.json").read_text())["model"] for x in "ab")
    assert a == b and a["mask_token_id"] is not None
    digests = [json.loads((tmp_path / x / "digests.json").read_text())["tensors"] for x in "ab"]
    assert digests[0] == digests[1]


def test_existing_output_and_damaged_weights_are_refused(tmp_path):
    import_checkpoint(str(GOLDENS / "ling_tiny"), str(tmp_path / "ours"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(InputError, match="exists already"):
        export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "there"))
    data = max((p for p in (tmp_path / "ours" / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damaged = np.fromfile(data, np.uint8)
    damaged[len(damaged) // 2] ^= 4
    damaged.tofile(data)
    with pytest.raises(InputError, match="tensor"):
        export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
