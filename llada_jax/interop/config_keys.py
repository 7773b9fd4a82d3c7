"""Sorts the keys of a config.json: read, harmless, or refused unless the value is what our forward pass computes.

A key in none of these tables is refused if its name suggests the forward pass (_FORWARD), unless its value switches
the feature off. Any other unknown key is ignored, and import prints it. So a new release of transformers or a trainer's
notes do not stop an import, but an unknown scale of the logits does.
"""

import re

from llada_jax.errors import InputError
from llada_jax.interop.config_values import unsupported

_READ = """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor rotary_dim
    original_max_position_embeddings max_position_embeddings tie_word_embeddings initializer_range mask_token_id
    eos_token_id pad_token_id delete_token_id split_token_id diffusion_alignment layer_types
"""
_READ_MOE = "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob"
_READ_LING = """
    num_shared_experts first_k_dense_replace n_group topk_group routed_scaling_factor moe_router_enable_expert_bias
    expert_capacity block_size num_nextn_predict_layers
"""
# How a model is called, trained, loaded or sampled, which changes no logit. `sliding_window` and `max_window_layers`
# only count with use_sliding_window; the slices of pretraining_tp add up to the same product.
_HARMLESS = """
    _name_or_path name_or_path _commit_hash transformers_version auto_map torch_dtype dtype use_cache return_dict
    bos_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params torchscript use_bfloat16 is_decoder
    output_hidden_states output_attentions output_router_logits output_scores return_dict_in_generate
    tf_legacy_loss chunk_size_feed_forward cross_attention_hidden_size
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation experts_implementation _flash_attn_2_enabled use_flash_attn use_flash_attention
    flash_attention flash_attn_varlen gradient_checkpointing
    pretraining_tp max_window_layers sliding_window max_sequence_length model_max_length seq_length
    router_aux_loss_coef router_jitter_noise router_dtype moe_shared_expert_intermediate_size
    is_llama_config transformers.js_config
"""
_TRAINING = re.compile("dropout|pdrop|loss|grad_|z_loss|_coef$")
_FORWARD = re.compile(
    "attn|attention|rope|rotary|alibi|position|scal|multiplier|softcap|logit|clip|norm|bias|window|sliding|chunk|expert|moe|"
    "rout|gate|gating|topk|group|dense|sparse|shared|layer|head|activation|temperature|residual|quant|compress|prun|embed|lora|tie_"
)
_SILU = ("silu", "swish")
# Field -> the values that our forward pass computes, beside null, which is the class's default. In no other table: a
# field that is not here may have any value that switches it off.
_EXPECTED = {
    "hidden_act": _SILU,
    "hidden_activation": _SILU,
    "activation_function": _SILU,
    "attention_bias": (False,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "scale_emb": (1,),
}
_EXPECTED_QWEN_MOE = {
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "mlp_only_layers": ([],),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1,),
    "score_function": ("softmax",),
    "scoring_func": ("softmax",),
}
_EXPECTED_LING = {"score_function": ("sigmoid",), "scoring_func": ("sigmoid",), "norm_softmax": (False,)}
_LING = ("bailing_moe", "llada2_moe")


def check(hf: dict, architecture: str) -> list[str]:
    """Returns the unknown keys that are ignored. Raises InputError naming a key that the forward pass does not
    implement.
    """
    known = set(f"{_READ} {_HARMLESS}".split())
    expected = dict(_EXPECTED)
    if architecture == "qwen3_moe":
        expected |= _EXPECTED_QWEN_MOE
    if architecture in _LING:
        expected |= _EXPECTED_LING
        known |= set(_READ_LING.split())
    if architecture in (*_LING, "qwen3_moe"):
        known |= set(_READ_MOE.split())
    if architecture == "qwen2":  # has biases, whatever it says
        expected["attention_bias"] = expected["qkv_bias"] = (False, True)
    if architecture == "bailing_moe" or architecture.startswith("qwen3"):
        expected["use_qk_norm"] = (True,)
    if architecture == "llada2_moe":  # always normalises: its class default is false
        known.add("use_qk_norm")
    _check_layers(hf, architecture)
    unknown = []
    for key, value in hf.items():
        if key in expected:
            if value is not None and value not in expected[key]:
                raise unsupported(key, value)
        elif key not in known and not _is_off(value) and not _TRAINING.search(key):
            if _FORWARD.search(key.lower()):
                raise InputError(
                    f"config.json: {key}={value!r} is not supported: the name suggests that it changes the forward "
                    "pass, which does not implement it; remove the key if it has no effect"
                )
            unknown.append(key)
    return unknown


def _is_off(value) -> bool:
    return value is None or value in (False, 0, "", [], {})


def _check_layers(hf: dict, architecture: str) -> None:
    """Checks that every layer has full attention; configs of Qwen and Ling name a window without switching it on."""
    kinds = hf.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind != "full_attention":
            raise unsupported("layer_types", kind)
    if architecture == "llama" and hf.get("sliding_window") and hf.get("use_sliding_window") is not False:
        raise unsupported("sliding_window", hf["sliding_window"])
