import pytest

from llada_jax.errors import InputError
from llada_jax.interop import hf_config
from llada_jax.model.config import PRESETS, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN_MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
LLADA = LLAMA | {
    "architectures": ["LLaDA2MoeModelLM"],
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_round_trip(name):
    config = PRESETS[name]
    back = hf_config.from_hf(hf_config.to_hf(config))
    assert back == config.replace(alignment=back.alignment)


def test_class_defaults():
    llama = hf_config.from_hf(LLAMA)
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps, llama.rope_theta) == (4, 8, 1e-6, 10_000.0)
    assert (llama.alignment, llama.tie_word_embeddings, llama.rotary_dim) == ("shifted", False, 8)
    qwen = hf_config.from_hf(LLAMA | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2})
    assert (qwen.head_dim, qwen.qk_norm, qwen.qkv_bias) == (128, True, False)
    qwen2 = hf_config.from_hf(LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2})
    assert (qwen2.head_dim, qwen2.qk_norm, qwen2.qkv_bias) == (8, False, True)
    moe = hf_config.from_hf(QWEN_MOE)
    assert (moe.router, moe.normalize_expert_weights, moe.moe_intermediate_size) == ("softmax", False, 768)
    llada = hf_config.from_hf(LLADA)
    assert (llada.rms_norm_eps, llada.rotary_dim, llada.alignment, llada.qk_norm) == (1e-5, 4, "same", True)
    assert (llada.routed_scaling_factor, llada.num_groups, llada.num_selected_groups) == (2.5, 8, 4)
    assert (llada.num_shared_experts, llada.num_dense_layers, llada.router) == (0, 0, "sigmoid")
    ling = hf_config.from_hf(LLADA | {"architectures": ["BailingMoeV2ForCausalLM"], "head_dim": 8})
    assert (ling.rope_theta, ling.rotary_dim, ling.alignment, ling.rms_norm_eps) == (600_000.0, 8, "shifted", 1e-6)
    assert (ling.num_shared_experts, ling.num_dense_layers, ling.routed_scaling_factor) == (1, 1, 1.0)


def test_model_type_decides_without_a_class_name():
    hf = {key: value for key, value in LLADA.items() if key != "architectures"}
    assert hf_config.from_hf(hf | {"model_type": "llada2_moe_veomni"}).architecture == "llada2_moe"
    hf |= {"model_type": "bailing_moe_v2", "head_dim": 8}
    assert hf_config.from_hf(hf).architecture == "bailing_moe"


def test_editing_and_block_routing_of_llada2_2():
    config = hf_config.from_hf(LLADA | {"expert_capacity": 8, "delete_token_id": 90, "split_token_id": 91})
    assert (config.delete_token_id, config.insert_token_id) == (90, 91)
    assert (config.routing_block, config.routing_block_experts) == (32, 8)
    hf = hf_config.to_hf(config)
    assert (hf["delete_token_id"], hf["split_token_id"], hf["expert_capacity"]) == (90, 91, 8)
    assert hf_config.from_hf(hf) == config and "delete_token_id" not in hf_config.to_hf(hf_config.from_hf(LLADA))


def test_special_ids():
    config = hf_config.from_hf(LLAMA | {"eos_token_id": [7, 9], "pad_token_id": -1})
    assert (config.eos_token_id, config.pad_token_id) == (7, None)
    assert hf_config.from_hf(LLADA | {"pad_token_id": 5}).eos_token_id == 5
    assert hf_config.from_hf(LLADA | {"mask_token_id": 6}).mask_token_id == 6


@pytest.mark.parametrize("style", ["rope_type", "type", "transformers5"])
def test_yarn(style):
    values = dict(YARN, beta_fast=32, beta_slow=1.0, attention_factor=1.138629436111989)
    if style == "type":
        values["type"] = values.pop("rope_type")
    hf = LLAMA | {"max_position_embeddings": 2048, "rope_theta": 5e5, "rope_scaling": values}
    if style == "transformers5":
        hf = LLAMA | {"max_position_embeddings": 2048, "rope_parameters": values | {"rope_theta": 5e5}}
    config = hf_config.from_hf(hf)
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 512)
    assert config.rope_theta == 5e5


def test_llama3_and_default_rope():
    values = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = hf_config.from_hf(LLAMA | {"rope_scaling": values})
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    assert hf_config.from_hf(hf_config.to_hf(config)) == config
    assert hf_config.from_hf(LLAMA | {"rope_scaling": {"rope_type": "default"}}).rope_scaling is None


def test_partial_rotary():
    assert hf_config.from_hf(LLADA | {"rotary_dim": 2}).rotary_dim == 2
    assert hf_config.from_hf(LLADA | {"partial_rotary_factor": 0.25}).rotary_dim == 2
    assert hf_config.from_hf(LLADA | {"rope_parameters": {"partial_rotary_factor": 0.25}}).rotary_dim == 2
    with pytest.raises(InputError, match="rotary_dim=4 contradicts partial_rotary_factor=0.25"):
        hf_config.from_hf(LLADA | {"partial_rotary_factor": 0.25, "rotary_dim": 4})


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*supported: LlamaForCausalLM"),
        (LLAMA, {"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe"}, "BailingMoeForCausalLM"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size='64'"),
        (LLAMA, {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"use_sliding_window": True}, "use_sliding_window=True"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic'"),
        (LLAMA, {"rope_scaling": YARN | {"beta_fast": 16}}, "rope_scaling.beta_fast=16"),
        (LLAMA, {"rope_scaling": YARN | {"attention_factor": 1.0}}, "rope_scaling.attention_factor=1.0"),
        (LLAMA, {"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate=False"),
        (LLAMA, {"rope_scaling": YARN | {"mrope_section": [1, 2]}}, "rope_scaling.mrope_section"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        (LLAMA, {"eos_token_id": 96}, "eos_token_id=96"),
        (QWEN_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        (QWEN_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (LLADA, {"norm_head": True}, "norm_head=True"),
        (LLADA, {"use_bias": True}, "use_bias=True"),
        (LLADA, {"use_qkv_bias": True}, "use_qkv_bias=True"),
        (LLADA, {"score_function": "softmax"}, "score_function='softmax'"),
        (LLADA, {"expert_capacity": 48}, "routing_block_experts=48"),
        (LLADA, {"delete_token_id": 96}, "delete_token_id=96"),
        (LLADA, {"split_token_id": "a"}, "split_token_id='a'"),
        (LLADA, {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    ],
)
def test_refuses(base, change, message):
    with pytest.raises(InputError, match=message):
        hf_config.from_hf(base | change)
