"""No key of a config.json is dropped that changes a logit; those that do not stop no import."""

import pytest

from llada_jax.errors import InputError
from llada_jax.interop import config_keys, hf_config
from tests.interop.test_hf_config import LLAMA

QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 8}
QWEN_MOE = QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
LING = QWEN_MOE | {"architectures": ["BailingMoeV2ForCausalLM"], "moe_intermediate_size": 16, "num_experts": 8}

# As transformers 5.24 writes the four families, and 4.x wrote them.
TRANSFORMERS_5 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float32", "eos_token_id": 2,
    "hidden_act": "silu", "initializer_range": 0.02, "pad_token_id": None, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False,
    "transformers_version": "5.24.0", "use_cache": True, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA_5 = {"mlp_bias": False, "pretraining_tp": 1, "head_dim": 8}
QWEN_5 = {"layer_types": ["full_attention"] * 2, "max_window_layers": 28, "sliding_window": None} | {
    "use_sliding_window": False
}
MOE_5 = {"decoder_sparse_step": 1, "mlp_only_layers": [], "num_local_experts": 4, "output_router_logits": False}
MOE_5 |= {"norm_topk_prob": True, "router_aux_loss_coef": 0.001, "sliding_window": None, "moe_intermediate_size": 16}
HUB = {
    "_name_or_path": "x", "torch_dtype": "bfloat16", "sliding_window": 4096, "use_sliding_window": False,
    "_attn_implementation_autoset": True, "is_llama_config": True, "rope_interleaved": False,
    "attn_implementation": "flash_attention_2", "output_dropout": 0.1, "rope_scaling": None, "rope_theta": 10000,
}  # fmt: skip


@pytest.mark.parametrize(
    "hf",
    [
        LLAMA | TRANSFORMERS_5 | LLAMA_5,
        QWEN2 | TRANSFORMERS_5 | QWEN_5,
        QWEN2 | {"attention_bias": True},  # has biases, whatever it says
        QWEN3 | TRANSFORMERS_5 | QWEN_5,
        QWEN_MOE | TRANSFORMERS_5 | MOE_5,
        LLAMA | HUB,
        QWEN3 | HUB,
        LING | HUB | {"mtp_loss_scaling_factor": 0.1, "router_dtype": "fp32", "moe_router_enable_expert_bias": True},
    ],
)
def test_ordinary_configurations_are_understood(hf):
    hf_config.from_hf(hf)
    assert config_keys.check(hf, hf_config.architecture_of(hf)) == []


def test_a_trainers_notes_are_named_and_ignored():
    hf = LLAMA | {"unsloth_version": "2026.1", "debug": True, "ep_size": 8, "novel": None, "tensor_flow": 0}
    assert config_keys.check(hf, "llama") == ["unsloth_version", "debug", "ep_size"]
    assert hf_config.from_hf(hf) == hf_config.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        # Of the neighbours: Granite, Cohere, MiniCPM, Gemma, OLMo, Llama 4, SmolLM3, and what somebody may invent.
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling=8.0 is not supported"),
        (LLAMA, {"logit_scale": 0.0625}, "logit_scale=0.0625"),
        (LLAMA, {"attention_multiplier": 0.0078125}, "attention_multiplier=0.0078125"),
        (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        (LLAMA, {"scale_emb": 12}, "scale_emb=12"),
        (LLAMA, {"scale_depth": 1.4}, "scale_depth=1.4"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (LLAMA, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar=256"),
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (LLAMA, {"use_qk_norm": True}, "use_qk_norm=True"),
        (LLAMA, {"attn_temperature_tuning": True}, "attn_temperature_tuning=True"),
        (LLAMA, {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]"),
        (LLAMA, {"attention_chunk_size": 8192}, "attention_chunk_size=8192"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window=4096"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA, {"num_experts": 8}, "num_experts=8"),
        (LLAMA, {"num_kv_shared_layers": 1}, "num_kv_shared_layers=1"),
        (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        (LLAMA, {"quantization": {"bits": 4, "group_size": 64}}, "quantization="),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        (LLAMA, {"compression_config": {"format": "pack-quantized"}}, "compression_config="),
        (LLAMA, {"attention_output_gate": True}, "attention_output_gate=True.*remove the key if it has no effect"),
        (QWEN3, {"use_qk_norm": False}, "use_qk_norm=False"),
        (QWEN3, {"attention_bias": True}, "attention_bias=True"),
        (QWEN3, {"layer_types": "sliding_attention"}, "layer_types=.sliding_attention."),
        (QWEN_MOE, {"score_function": "sigmoid"}, "score_function='sigmoid'"),
        (QWEN_MOE, {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        (QWEN_MOE, {"n_group": 8}, "n_group=8"),
        (QWEN_MOE, {"num_shared_experts": 1}, "num_shared_experts=1"),
        (QWEN_MOE, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True"),
        (QWEN_MOE, {"num_local_experts": 8}, "num_experts=4 contradicts num_local_experts=8"),
        (LING, {"norm_softmax": True}, "norm_softmax=True"),
        (LING, {"use_rmsnorm": False}, "use_rmsnorm=False"),
        (LING, {"use_qk_norm": False}, "use_qk_norm=False"),
        (LING, {"using_split_qkv_in_self_attention": True}, "using_split_qkv_in_self_attention=True"),
    ],
)
def test_what_the_forward_pass_cannot_honour_is_refused(base, change, message):
    with pytest.raises(InputError, match=message):
        hf_config.from_hf(base | change)


def test_null_where_transformers_takes_it():
    nulls = dict.fromkeys(["head_dim", "num_key_value_heads", "rope_scaling", "rope_theta", "sliding_window"])
    nulls |= dict.fromkeys(["layer_types", "eos_token_id", "pad_token_id", "quantization_config", "hidden_act"])
    config = hf_config.from_hf(LLAMA | nulls)
    assert config == hf_config.from_hf(LLAMA) and (config.num_kv_heads, config.head_dim) == (4, 8)
    for base in (QWEN2, QWEN3):  # as many as queries; without the key it is the class's default, 32
        assert hf_config.from_hf(base | {"num_key_value_heads": None}).num_kv_heads == 4
    moe = hf_config.from_hf(QWEN_MOE | {"mlp_only_layers": None, "num_local_experts": None})
    assert moe.num_experts == 4
