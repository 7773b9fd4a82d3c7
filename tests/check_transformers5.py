"""What transformers 5 saves, imported here, and what is exported here, loaded there; no part of the suite: needs torch.

    pip install -e '.[hf]' && python tests/check_transformers5.py

Tiny Llama, Qwen2, Qwen3 and Qwen3-MoE models with each rotary embedding, tied and not, sharded and not, fused experts,
stored heads, .bin files old, new and nested, nulls in config.json, and YaRN added here. Prints a line each: the size of
the logits, the largest difference of ours (at most 2e-4) from transformers' own, and that of what transformers computes
from the exported folder, which it must load strictly. Exits with 1 where one fails.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

import llada_jax
from llada_jax.checkpoint import weights
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint

TOLERANCE = 2e-4
LENGTH = 96
TOKENS = np.random.default_rng(1).integers(0, 64, (2, LENGTH))
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
KINDS = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "Qwen3-MoE": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def tiny(kind: str, rope: str = "default", **changes):
    """A random model of transformers' in float32, of which no norm or bias is trivial."""
    config_class, model_class = KINDS[kind]
    values = SIZES | (EXPERTS if kind == "Qwen3-MoE" else {}) | {"rope_parameters": dict(ROPES[rope])} | changes
    torch.manual_seed(0)
    model = model_class(config_class(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(40 if "embed" in name else 8)
    return model


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def loaded_strictly(folder: Path):
    """transformers' model of a folder. Raises when a tensor is missing, unexpected or of another shape."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    if wrong := {name: sorted(map(str, keys)) for name, keys in info.items() if keys}:
        raise ValueError(f"transformers: {wrong}")
    return model.eval()


def tensors_of(folder: Path) -> dict:
    return json.loads((folder / "digests.json").read_text())["tensors"]


def round_trip(folder: Path, out: Path, yarn: float | None = None) -> tuple[float, float, float]:
    """(largest logit of the folder in transformers, how far ours are from them, and those of the exported folder)"""
    before = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval())
    import_checkpoint(str(folder), str(out / "ours"))
    model = llada_jax.load_checkpoint(out / "ours")
    if (folder / "model.safetensors").exists():
        nested_bin(out / "nested", folder)
        import_checkpoint(str(out / "nested"), str(out / "again"))
        if tensors_of(out / "again") != tensors_of(out / "ours"):
            raise ValueError("{'model': ...} in a .bin gave other tensors")
    config, source = model.config, out / "ours"
    ours = np.asarray(llada_jax.forward(model.params, config, TOKENS, mask="causal"))
    imported = float(np.abs(ours - before).max())
    if yarn is not None:
        config, source = config.extended(yarn), out / "extended"
        leaves = llada_jax.model.parameters.unstack(model.params, config)
        weights.write_weights(source, config, leaves.items(), {}, {"source": model.lineage})
        before = np.asarray(llada_jax.forward(model.params, config, TOKENS, mask="causal"))
    export_checkpoint(str(source), str(out / "hf"))
    return float(np.abs(before).max()), imported, float(np.abs(logits_of(loaded_strictly(out / "hf")) - before).max())


# --- what a folder may be, written at `folder` ----------------------------------------------------------------------


def plain(folder: Path, kind: str, rope: str = "default", **changes) -> None:
    tiny(kind, rope, **changes).save_pretrained(folder)


def tied(folder: Path, kind: str) -> None:
    plain(folder, kind, tie_word_embeddings=True)


def sharded(folder: Path, kind: str) -> None:
    tiny(kind, "yarn").save_pretrained(folder, max_shard_size="20KB")
    if not (folder / "model.safetensors.index.json").exists():
        raise ValueError("transformers wrote one shard")


def fused(folder: Path, kind: str) -> None:
    """Experts as transformers 5 holds them: gate_up_proj and down_proj of a layer."""
    tiny(kind).save_pretrained(folder, save_original_format=False)
    if "model.layers.0.mlp.experts.gate_up_proj" not in load_file(folder / "model.safetensors"):
        raise ValueError("transformers wrote the experts one by one")


def with_head(folder: Path, kind: str, factor: float) -> None:
    """Tied, with a head in the file, `factor` times the embedding."""
    tied(folder, kind)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_bin(folder: Path, kind: str, zipped: bool) -> None:
    """`zipped`: not the format of before torch 1.6. Tied, so that the two names share their memory, as in any .bin."""
    model = tiny(kind, tie_word_embeddings=True)
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()


def nested_bin(out: Path, folder: Path) -> None:
    """The weights of `folder` as a trainer saves them: wrapped, with the step, as parameters."""
    names = {
        f"module.{name}": torch.nn.Parameter(value) for name, value in load_file(folder / "model.safetensors").items()
    }
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"model": names, "step": 7}, out / "pytorch_model.bin")


def with_nulls(folder: Path, kind: str) -> None:
    """null for every key that transformers takes it for."""
    plain(folder, kind, num_key_value_heads=SIZES["num_attention_heads"])
    values = json.loads((folder / "config.json").read_text())
    nulls = ["sliding_window", "layer_types", "eos_token_id", "bos_token_id", "pad_token_id", "rope_scaling"]
    nulls += {"Llama": ["head_dim", "num_key_value_heads"], "Qwen2": ["num_key_value_heads"]}.get(kind, [])
    (folder / "config.json").write_text(json.dumps(values | dict.fromkeys(nulls)))


def cases() -> dict[str, tuple]:
    """{name: (function that writes the folder, its arguments, YaRN factor or None)}"""
    found = {}
    for kind in KINDS:
        for rope in ROPES:
            found[f"{kind}, {rope}"] = plain, (kind, rope), None
        found[f"{kind}, tied"] = tied, (kind,), None
        found[f"{kind}, yarn, sharded"] = sharded, (kind,), None
        found[f"{kind}, YaRN added here"] = plain, (kind,), 2.0
        found[f"{kind}, nulls"] = with_nulls, (kind,), None
        found[f"{kind}, tied, equal head stored"] = with_head, (kind, 1), None
        found[f"{kind}, tied, other head stored"] = with_head, (kind, 2), None
    found["Qwen3-MoE, fused experts"] = fused, ("Qwen3-MoE",), None
    found["Llama, .bin"] = as_bin, ("Llama", True), None
    found["Llama, .bin of before torch 1.6"] = as_bin, ("Llama", False), None
    return found


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {LENGTH} tokens, float32")
    failed = 0
    print(f"{'':38}{'logits up to':>14}{'ours differ':>14}{'after export':>14}")
    for name, (write, arguments, yarn) in cases().items():
        said = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    write(Path(folder) / "source", *arguments)
                    size, imported, exported = round_trip(Path(folder) / "source", Path(folder), yarn)
                right = imported <= TOLERANCE and exported <= TOLERANCE
                print(f"{name:38}{size:14.1f}{imported:14.1e}{exported:14.1e}{'' if right else '  WRONG'}", flush=True)
            except Exception:  # of any of the libraries: a line of the table, and the next case
                right = False
                print(f"{name:38}  FAILED\n{said.getvalue()[-2000:]}{traceback.format_exc()}", flush=True)
        failed += not right
    print(f"{failed} of {len(cases())} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
