from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.interop import convert, gguf, huggingface, tokenizer

D, HEADS, KV, HD = 32, 4, 2, 8


@pytest.fixture(scope="module")
def smollm(smollm2_gguf):
    return gguf.open_gguf(smollm2_gguf)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp: of each head 0, d/2, 1, d/2 + 1, ..."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def write_gguf(path: Path, change=lambda writer: None, architecture="llama", tensors=None, pre="smollm") -> dict:
    """A one-layer llama; returns its tensors under their Hugging Face names."""
    rng = np.random.default_rng(0)
    names = {
        "token_embd": (40, D), "output_norm": (D,), "blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,),
        "blk.0.attn_q": (HEADS * HD, D), "blk.0.attn_k": (KV * HD, D), "blk.0.attn_v": (KV * HD, D),
        "blk.0.attn_output": (D, HEADS * HD), "blk.0.ffn_gate": (48, D), "blk.0.ffn_up": (48, D),
        "blk.0.ffn_down": (D, 48),
    }  # fmt: skip
    values = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in names.items()}
    writer = gguf_format.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b", "ab", "<|end|>", "<user>", "[PAD5]"])
    writer.add_token_types([1, 1, 1, 3, 4, 5])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    change(writer)
    stored = dict(values)
    for name, heads in (("attn_q", HEADS), ("attn_k", KV)):
        stored[f"blk.0.{name}.weight"] = interleave(values[f"blk.0.{name}.weight"], heads)
    for name, value in (stored | (tensors or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_smollm2_ids(smollm):
    tok = tokenizer.from_files(gguf.tokenizer_files(smollm))
    golden = np.load(Path(__file__).parent / "data/goldens/smollm2_135m_golden.npz")
    for i, prompt in enumerate(golden["prompts"].tolist()):
        assert tok.encode(prompt) == golden[f"ids_{i}"].tolist()
        assert tok.decode(golden[f"ids_{i}"]) == prompt
    assert (tok.eos_id, tok.pad_id, tok.bos_id, tok.vocab_size) == (2, 2, 1, 49_152)
    chat = tok.apply_chat_template([{"role": "user", "content": "Name three primary colors."}])
    assert chat.endswith(str(golden["prompts"][3]))


def test_smollm2_config(smollm):
    config = gguf.model_config(smollm)
    assert (config.vocab_size, config.num_layers, config.num_heads, config.num_kv_heads) == (49_152, 30, 9, 3)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 100_000.0, True)
    tensors = gguf.open_weights(smollm, config)
    assert len(huggingface.plan_leaves(tensors, config)) == 2 + 30 * 9
    assert tensors["model.layers.0.self_attn.q_proj.weight"].read(0, 576).shape == (576, 576)


def test_tensors_and_config(tmp_path):
    path = tmp_path / "tiny.gguf"
    values = write_gguf(path)
    source = convert.read_source(str(path))
    plans = huggingface.plan_leaves(source.tensors, source.config)
    leaves = {leaf.name: leaf.read(0, leaf.shape[leaf.axis]) for leaf in huggingface.leaves(plans)}
    assert np.array_equal(leaves["embedding"], values["token_embd.weight"])
    for h in range(HEADS):
        rows = values["blk.0.attn_q.weight"][h * HD : (h + 1) * HD]
        assert np.array_equal(leaves["layers.000.query"][:, h, :], rows.T)
    for h in range(KV):
        assert np.array_equal(leaves["layers.000.key"][:, h, :], values["blk.0.attn_k.weight"][h * HD :][:HD].T)
        assert np.array_equal(leaves["layers.000.value"][:, h, :], values["blk.0.attn_v.weight"][h * HD :][:HD].T)
    assert np.array_equal(leaves["layers.000.down"], values["blk.0.ffn_down.weight"].T)
    config = source.config
    assert (config.rms_norm_eps, config.rope_theta, config.eos_token_id) == (1e-5, 5000.0, 3)
    assert (config.tie_word_embeddings, config.alignment, config.max_position_embeddings) == (True, "shifted", 64)


def test_tokenizer_of_metadata(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    tok = tokenizer.from_files(gguf.tokenizer_files(gguf.open_gguf(tmp_path / "tiny.gguf")))
    assert tok.encode("ab<|end|>ba<user>") == [2, 3, 1, 0, 4]
    assert tok.decode([2, 3, 4], skip_special_tokens=True) == "ab<user>"
    assert tok.id_to_token(5) is None  # padding of the vocabulary: free for a mask token
    assert tok.eos_id == 3


def test_bad_files(tmp_path):
    path = tmp_path / "bad.gguf"

    def refused(message, **options):
        write_gguf(path, **options)
        with pytest.raises(InputError, match=message):
            source = convert.read_source(str(path))
            huggingface.plan_leaves(source.tensors, source.config)

    refused("general.architecture='qwen2' is not supported", architecture="qwen2")
    refused("tokenizer.ggml.pre='llama-bpe' is not supported", pre="llama-bpe")
    refused("llama.rope.dimension_count=4 is not", change=lambda w: w.add_rope_dimension_count(4))
    refused("llama.expert_count=8 is not supported", change=lambda w: w.add_expert_count(8))
    refused("unexpected tensor blk.0.attn_q.bias", tensors={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    refused(r"shape \[8, 32\], expected \[16, 32\]", tensors={"blk.0.attn_v.weight": np.ones((8, 32), np.float32)})
    refused("rope_freqs.weight", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    for size in (0, 3, 100, 700, -500):
        write_gguf(path)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match="bad.gguf: not a complete GGUF file"):
            convert.read_source(str(path))


def test_every_end_and_the_beginning_that_llama_cpp_adds(tmp_path):
    def change(writer):
        writer.add_eot_token_id(4)
        writer.add_bos_token_id(3)
        writer.add_add_bos_token(True)

    write_gguf(tmp_path / "a.gguf", change)
    file = gguf.open_gguf(tmp_path / "a.gguf")
    assert gguf.model_config(file).eos_token_ids == (3, 4)
    found = tokenizer.from_files(gguf.tokenizer_files(file))
    assert found.eos_ids == (3, 4) and found.encode_document("ab") == [3, 2]
    write_gguf(tmp_path / "b.gguf", lambda writer: writer.add_bos_token_id(3))
    plain = tokenizer.from_files(gguf.tokenizer_files(gguf.open_gguf(tmp_path / "b.gguf")))
    assert plain.encode_document("ab") == [2]
