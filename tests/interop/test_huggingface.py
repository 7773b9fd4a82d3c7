import json
import shutil
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llada_jax.checkpoint import weights
from llada_jax.errors import InputError
from llada_jax.interop import convert, huggingface
from llada_jax.model import parameters

GOLDENS = Path(__file__).parents[1] / "data/goldens"
MOE_TINY = ["ling_tiny", "ling_tiny_mtp", "llada2_tiny", "llada2_tiny_yarn"]
D, HEADS, KV, HD = 32, 4, 2, 8
TINY = {
    "vocab_size": 40,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HD,
}
CLASSES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


def tiny_tensors(kind: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """A checkpoint as transformers would save it."""
    shapes = {"model.embed_tokens.weight": (40, D), "model.norm.weight": (D,), "lm_head.weight": (40, D)}
    for n in range(2):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for name, rows in {"q": HEADS * HD, "k": KV * HD, "v": KV * HD}.items():
            layer[f"self_attn.{name}_proj.weight"] = (rows, D)
            if kind == "qwen2":
                layer[f"self_attn.{name}_proj.bias"] = (rows,)
        layer["self_attn.o_proj.weight"] = (D, HEADS * HD)
        if kind.startswith("qwen3"):
            layer |= {"self_attn.q_norm.weight": (HD,), "self_attn.k_norm.weight": (HD,)}
        if kind == "qwen3_moe":
            layer["mlp.gate.weight"] = (4, D)
            for e in range(4):
                layer |= {f"mlp.experts.{e}.{name}_proj.weight": (16, D) for name in ("gate", "up")}
                layer[f"mlp.experts.{e}.down_proj.weight"] = (D, 16)
        else:
            layer |= {f"mlp.{name}_proj.weight": (48, D) for name in ("gate", "up")}
            layer["mlp.down_proj.weight"] = (D, 48)
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict, tensors: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read_all(leaves) -> dict[str, np.ndarray]:
    return {leaf.name: leaf.read(0, leaf.shape[leaf.axis]) for leaf in leaves}


def stream(folder: Path, dtype=None):
    """(source, {leaf name: array}) of a checkpoint folder."""
    source = convert.read_model(str(folder))
    plans = huggingface.plan_leaves(source.tensors, source.config)
    return source, read_all(huggingface.leaves(plans, dtype))


def by_columns(heads: np.ndarray) -> np.ndarray:
    """Our [in, heads, head_dim] -> Hugging Face's [heads * head_dim, in], head by head."""
    return np.concatenate([heads[:, h, :].T for h in range(heads.shape[1])])


def invert(leaves: dict, config) -> dict[str, np.ndarray]:
    """Hugging Face tensors of the leaves, written out independently of the importer."""
    ling = config.architecture in ("bailing_moe", "llada2_moe")
    embedding = "word_embeddings" if ling else "embed_tokens"
    tensors = {f"model.{embedding}.weight": leaves["embedding"], "model.norm.weight": leaves["final_norm"]}
    if "head" in leaves:
        tensors["lm_head.weight"] = leaves["head"].T
    for n in range(config.num_layers):
        x = {key.split(".")[2]: value for key, value in leaves.items() if key.startswith(f"layers.{n:03d}.")}
        layer = {"input_layernorm.weight": x["attention_norm"], "post_attention_layernorm.weight": x["mlp_norm"]}
        qkv = [by_columns(x[name]) for name in ("query", "key", "value")]
        output = np.concatenate([head.T for head in x["output"]], axis=1)
        if ling:
            layer |= {"attention.query_key_value.weight": np.concatenate(qkv), "attention.dense.weight": output}
            layer |= {f"attention.{name}_layernorm.weight": x[f"{name}_norm"] for name in ("query", "key")}
        else:
            layer |= {f"self_attn.{name}_proj.weight": w for name, w in zip("qkv", qkv, strict=True)}
            layer["self_attn.o_proj.weight"] = output
            long = {"q": "query", "k": "key", "v": "value"}
            layer |= {f"self_attn.{k}_proj.bias": x[v + "_bias"].ravel() for k, v in long.items() if config.qkv_bias}
            layer |= {f"self_attn.{k}_norm.weight": x[long[k] + "_norm"] for k in "qk" if config.qk_norm}
        for name in ("gate", "up", "down"):
            if x["gate"].ndim == 2:
                layer[f"mlp.{name}_proj.weight"] = x[name].T
                continue
            for e in range(config.num_experts):
                layer[f"mlp.experts.{e}.{name}_proj.weight"] = x[name][e].T
            if config.num_shared_experts:
                layer[f"mlp.shared_experts.{name}_proj.weight"] = x[f"shared_{name}"].T
        if "router" in x:
            layer["mlp.gate.weight"] = x["router"].T
        if "expert_bias" in x:
            layer["mlp.gate.expert_bias"] = x["expert_bias"]
        tensors |= {f"model.layers.{n}.{name}": value for name, value in layer.items()}
    return tensors


def assert_same_bits(found: dict, expected: dict):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert np.ascontiguousarray(found[name]).tobytes() == np.ascontiguousarray(value).tobytes(), name


@pytest.mark.parametrize("name", MOE_TINY)
def test_goldens_bit_for_bit(name):
    stored = {}
    for shard in sorted((GOLDENS / name).glob("*.safetensors")):
        stored |= load_file(shard)
    source, leaves = stream(GOLDENS / name)
    assert list(leaves) == list(parameters.leaves(source.config))
    if name == "ling_tiny_mtp":
        extra = [tensor for tensor in stored if tensor.startswith("model.layers.2.")]
        assert f"dropped {len(extra)} tensors of multi-token prediction (layer 2)" in source.notices
        stored = {tensor: value for tensor, value in stored.items() if tensor not in extra}
    assert_same_bits(invert(leaves, source.config), stored)
    assert source.config.alignment == ("same" if "llada2" in name else "shifted")


@pytest.mark.parametrize("kind", sorted(CLASSES))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dense_and_qwen_bit_for_bit(tmp_path, kind, dtype):
    tensors = tiny_tensors(kind, dtype)
    source, leaves = stream(write_folder(tmp_path / "hf", TINY | CLASSES[kind], tensors))
    assert_same_bits(invert(leaves, source.config), tensors)
    declared = {name: p.shape for name, (p, _) in parameters.leaves(source.config).items()}
    assert {name: leaf.shape for name, leaf in leaves.items()} == declared
    assert all(leaf.flags.c_contiguous for leaf in leaves.values())


def test_merged_experts(tmp_path):
    """dFactory's form: one tensor per projection for all the experts of a layer."""
    folder = GOLDENS / "llada2_tiny"
    stored = load_file(folder / "model-00001-of-00002.safetensors")
    stored |= load_file(folder / "model-00002-of-00002.safetensors")
    merged = {name: value for name, value in stored.items() if ".mlp.experts." not in name}
    for n in (1, 2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            experts = [stored[f"model.layers.{n}.mlp.experts.{e}.{name}.weight"] for e in range(16)]
            merged[f"model.layers.{n}.mlp.experts.{name}"] = np.stack(experts)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llada2_moe_veomni"}
    source, leaves = stream(write_folder(tmp_path / "hf", config, merged))
    assert_same_bits(invert(leaves, source.config), stored)


def test_dtype_keeps_a_float32_expert_bias(tmp_path):
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    _, leaves = stream(GOLDENS / "llada2_tiny", bfloat16)
    stays_float32 = {name for name, leaf in leaves.items() if leaf.dtype == np.float32}
    assert stays_float32 == {"layers.001.expert_bias", "layers.002.expert_bias"}
    _, exact = stream(GOLDENS / "llada2_tiny")
    for name in set(leaves) - stays_float32:
        assert np.array_equal(leaves[name], exact[name].astype(bfloat16)), name


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts as transformers 5 holds them: [experts, 2 width, embed] and [experts, embed, width]."""
    found = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    for n in range(2):
        gate, up, down = (
            np.stack([tensors[f"model.layers.{n}.mlp.experts.{e}.{name}_proj.weight"] for e in range(4)])
            for name in ("gate", "up", "down")
        )
        found[f"model.layers.{n}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"model.layers.{n}.mlp.experts.down_proj"] = down
    return found


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fused_experts(tmp_path, dtype):
    """2 width = embed: gate_up_proj has the same shape in either layout."""
    tensors = tiny_tensors("qwen3_moe", dtype)
    assert fused(tensors)["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, D, D)
    source, leaves = stream(write_folder(tmp_path / "hf", TINY | CLASSES["qwen3_moe"], fused(tensors)))
    assert_same_bits(invert(leaves, source.config), tensors)


def test_fused_experts_of_another_layout_are_refused(tmp_path):
    def refused(message, change):
        tensors = fused(tiny_tensors("qwen3_moe"))
        change(tensors)
        folder = write_folder(tmp_path / "hf", TINY | CLASSES["qwen3_moe"], tensors)
        with pytest.raises(InputError, match=message):
            convert.import_checkpoint(str(folder), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    gate_up, down = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    transposed = r"down_proj has shape \[4, 16, 32\], expected \[4, 32, 16\]"
    refused(transposed, lambda t: t.update({name: t[name].swapaxes(1, 2).copy() for name in (gate_up, down)}))
    refused(r"gate_up_proj has shape \[4, 31, 32\], expected", lambda t: t.update({gate_up: t[gate_up][:, 1:].copy()}))
    one = "model.layers.1.mlp.experts.3.up_proj.weight"
    refused(f"gate_up_proj holds {one}, which is also in", lambda t: t.update({one: np.ones((16, D), np.float32)}))
    refused("missing tensor model.layers.1.mlp.experts.0.down_proj", lambda t: t.pop(down))


def test_names_of_a_wrapped_module(tmp_path):
    tensors = tiny_tensors("llama")
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    source, leaves = stream(write_folder(tmp_path / "hf", TINY | CLASSES["llama"], wrapped))
    assert_same_bits(invert(leaves, source.config), tensors)


def test_rotary_buffers_are_ignored(tmp_path):
    tensors = tiny_tensors("llama")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    source, leaves = stream(write_folder(tmp_path / "hf", TINY | CLASSES["llama"], tensors | buffer))
    assert_same_bits(invert(leaves, source.config), tensors)


def test_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path):
    """There a snapshot is made of links to blobs."""
    blobs = write_folder(tmp_path / "blobs", TINY | CLASSES["llama"], tiny_tensors("llama"))
    for folder in (tmp_path / "snapshots" / "0123abc", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(blobs / name)
    assert len(stream(tmp_path / "snapshots" / "0123abc")[1]) == len(stream(blobs)[1])
    with pytest.raises(InputError, match="config.json is a link out of the folder, to .*blobs/config.json"):
        stream(tmp_path / "elsewhere")


def test_a_model_of_the_hub_is_downloaded_first(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "hf", TINY | CLASSES["llama"], tiny_tensors("llama"))
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert.import_checkpoint("hf://owner/name@v2", str(tmp_path / "out"))
    assert asked == [("owner/name", "v2")]
    assert weights.read_config(tmp_path / "out")[1]["source"] == "hf://owner/name@v2"


def test_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf://owner/name: cannot be downloaded"):
        convert.import_checkpoint("hf://owner/name", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# Each changes a copy of a golden and says what the error must name.
def _missing_shard(folder, index):
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors: missing shard"


def _truncated_shard(folder, index):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return "model-00001-of-00002.safetensors: truncated"


def _truncated_header(folder, index):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    return "model-00001-of-00002.safetensors: truncated"


def _empty_shard(folder, index):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    return "model-00001-of-00002.safetensors: truncated"


def _garbage_shard(folder, index):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\5\0\0\0\0\0\0\0[1,2]   ")
    return "model-00001-of-00002.safetensors: not a safetensors file"


def _traversal(folder, index):
    index["weight_map"]["lm_head.weight"] = "../other/model.safetensors"
    return r"index.json: '../other/model.safetensors' leads out of the folder"


def _absolute_path(folder, index):
    index["weight_map"]["lm_head.weight"] = "/etc/model.safetensors"
    return "'/etc/model.safetensors' leads out of the folder"


def _malformed_index(folder, index):
    index["weight_map"] = 3
    return "index.json: not an index of shards"


def _index_of_absent_tensor(folder, index):
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    return "model-00001-of-00002.safetensors: tensor model.extra.weight is missing"


def _change(folder, change):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def _missing_tensor(folder, index):
    _change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    del index["weight_map"]["lm_head.weight"]
    return r"missing tensor lm_head.weight, expected with shape \[512, 64\]"


def _missing_expert(folder, index):
    _change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    del index["weight_map"]["model.layers.1.mlp.experts.3.up_proj.weight"]
    return "missing tensor model.layers.1.mlp.experts.3.up_proj.weight"


def _extra_tensor(folder, index):
    _change(folder, lambda tensors: tensors.update({"model.layers.0.attention.dense.bias": np.ones(64, np.float32)}))
    return "unexpected tensor model.layers.0.attention.dense.bias"


def _layer_beyond_the_last(folder, index):
    _change(folder, lambda tensors: tensors.update({"model.layers.7.input_layernorm.weight": np.ones(64, np.float32)}))
    return "unexpected tensor model.layers.7.input_layernorm.weight"


def _wrong_shape(folder, index):
    name = "model.layers.0.attention.query_key_value.weight"
    _change(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    return r"query_key_value.weight has shape \[255, 64\], expected \[256, 64\]"


def _wrong_expert_shape(folder, index):
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    _change(folder, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    return r"experts.0.down_proj.weight has shape \[32, 64\], expected \[64, 32\]"


def _mixed_expert_dtypes(folder, index):
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    _change(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    return "the experts of model.layers.1.mlp.experts.down_proj are stored in several dtypes"


def _integer_dtype(folder, index):
    _change(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((512, 64), np.int8)}))
    return "lm_head.weight has dtype I8"


def _tensor_in_two_shards(folder, index):
    _change(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.float32)}))
    return "tensor model.norm.weight is also in"


@pytest.mark.parametrize(
    "damage",
    [
        _missing_shard, _truncated_shard, _truncated_header, _empty_shard, _garbage_shard, _traversal, _absolute_path,
        _malformed_index, _index_of_absent_tensor, _missing_tensor, _missing_expert, _extra_tensor,
        _layer_beyond_the_last, _wrong_shape, _wrong_expert_shape, _mixed_expert_dtypes, _integer_dtype,
        _tensor_in_two_shards,
    ],
)  # fmt: skip
def test_damaged_checkpoint(tmp_path, damage):
    folder = Path(shutil.copytree(GOLDENS / "llada2_tiny", tmp_path / "hf", ignore=shutil.ignore_patterns("*.npz")))
    path = folder / "model.safetensors.index.json"
    path.chmod(0o644)
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)
    index = json.loads(path.read_text())
    message = damage(folder, index)
    path.write_text(json.dumps(index))
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        convert.import_checkpoint(str(folder), str(out))
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_bin_that_torch_cannot_read(tmp_path):
    folder = write_folder(tmp_path / "hf", TINY | CLASSES["llama"], tiny_tensors("llama"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        stream(folder)
