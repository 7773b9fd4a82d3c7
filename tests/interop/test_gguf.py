from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest

from llada_jax import tokenizer
from llada_jax.errors import InputError
from llada_jax.interop import convert, gguf, huggingface
from llada_jax.model.config import RopeScaling

D, HEADS, KV, HD = 32, 4, 2, 8


@pytest.fixture(scope="module")
def smollm(smollm2_gguf):
    return gguf.open_gguf(smollm2_gguf)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp: of each head 0, d/2, 1, d/2 + 1, ..."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def write_metadata(writer: gguf_format.GGUFWriter, pre="smollm") -> None:
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


def close(writer: gguf_format.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, change=lambda w: None, architecture="llama", tensors=None, pre="smollm", without="") -> dict:
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
    write_metadata(writer, pre)
    change(writer)
    stored = dict(values)
    for name, heads in (("attn_q", HEADS), ("attn_k", KV)):
        stored[f"blk.0.{name}.weight"] = interleave(values[f"blk.0.{name}.weight"], heads)
    for name, value in (stored | (tensors or {})).items():
        if name != without:
            writer.add_tensor(name, value)
    close(writer)
    return values


def test_smollm2_ids(smollm):
    tok = tokenizer.from_files(gguf.tokenizer_files(smollm))
    golden = np.load(Path(__file__).parents[1] / "data/goldens/smollm2_135m_golden.npz")
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
    tensors = gguf.hf_tensors(smollm, config)
    assert len(huggingface.plan_leaves(tensors, config)) == 2 + 30 * 9
    assert tensors["model.layers.0.self_attn.q_proj.weight"].read(0, 576).shape == (576, 576)


def test_tensors_and_config(tmp_path):
    path = tmp_path / "tiny.gguf"
    values = write_gguf(path)
    source = convert.read_model(str(path))
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
            source = convert.read_model(str(path))
            huggingface.plan_leaves(source.tensors, source.config)

    refused("general.architecture='qwen2' is not supported", architecture="qwen2")
    refused("tokenizer.ggml.pre='llama-bpe' is not supported", pre="llama-bpe")
    refused("llama.rope.dimension_count=4 is not", change=lambda w: w.add_rope_dimension_count(4))
    refused("llama.expert_count=8 is not supported", change=lambda w: w.add_expert_count(8))
    refused("llama.attention.sliding_window=64 is not", change=lambda w: w.add_sliding_window(64))
    refused("llama.attention.causal=False is not", change=lambda w: w.add_causal_attention(False))
    refused("llama.logit_scale=0.0625 is not", change=lambda w: w.add_logit_scale(0.0625))
    refused("llama.attention.scale=0.5 is not", change=lambda w: w.add_attention_scale(0.5))
    refused("llama.final_logit_softcapping=30.0 is not", change=lambda w: w.add_final_logit_softcapping(30.0))
    refused("llama.rope.scaling.attn_factor=2.0 is not", change=lambda w: w.add_rope_scaling_attn_factors(2.0))
    refused("llama.something.new='x' is not", change=lambda w: w.add_string("llama.something.new", "x"))
    refused("llama.rope.scaling.type='yarn' is not", change=lambda w: w.add_string("llama.rope.scaling.type", "yarn"))
    refused("llama.context_length=.* is not supported", change=lambda w: w.add_array("llama.context_length", [1, 2]))
    refused("general.type='adapter' is not supported", change=lambda w: w.add_type("adapter"))
    refused("unexpected tensor blk.0.attn_q.bias", tensors={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    refused(r"shape \[8, 32\], expected \[16, 32\]", tensors={"blk.0.attn_v.weight": np.ones((8, 32), np.float32)})
    refused("rope_freqs.weight", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    for size in (0, 3, 100, 700, -500):
        write_gguf(path)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match="bad.gguf: not a complete GGUF file"):
            convert.read_model(str(path))


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"llama.rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),  # linear, to llama.cpp
        ({"llama.rope.scaling.factor": 2.5, "llama.rope.scaling.type": "linear"}, RopeScaling("linear", 2.5)),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0}, RopeScaling("linear", 2.0)),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scale_linear": 1.0}, None),
    ],
)
def test_linear_scale_as_llama_cpp_reads_it(tmp_path, fields, scaling):
    def add(writer):
        for key, value in fields.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)

    write_gguf(tmp_path / "tiny.gguf", change=add)
    assert gguf.model_config(gguf.open_gguf(tmp_path / "tiny.gguf")).rope_scaling == scaling


def test_what_changes_nothing_is_no_obstacle(tmp_path):
    def add(writer):
        writer.add_vocab_size(40)
        writer.add_rope_dimension_count(HD)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_expert_count(0)
        writer.add_logit_scale(0.0)  # off
        writer.add_causal_attention(True)
        writer.add_type("model")
        writer.add_file_type(1)

    write_gguf(tmp_path / "plain.gguf")
    write_gguf(tmp_path / "tiny.gguf", change=add)
    plain, tiny = (gguf.model_config(gguf.open_gguf(tmp_path / f"{name}.gguf")) for name in ("plain", "tiny"))
    assert plain == tiny


@pytest.mark.parametrize("kind", ["F64", "I8"])
def test_a_type_that_cannot_be_dequantised_is_named_before_anything_is_written(tmp_path, kind):
    dtype = {"F64": np.float64, "I8": np.int8}[kind]
    write_gguf(tmp_path / "tiny.gguf", tensors={"blk.0.ffn_down.weight": np.ones((D, 48), dtype)})
    message = f"tiny.gguf: blk.0.ffn_down.weight is of type {kind}, which the package gguf cannot dequantise"
    with pytest.raises(InputError, match=message):
        convert.import_checkpoint(str(tmp_path / "tiny.gguf"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_every_type_that_gguf_dequantises_is_taken(tmp_path):
    for kind in (gguf_format.GGMLQuantizationType.Q8_0, gguf_format.GGMLQuantizationType.Q5_1):
        path = tmp_path / f"{kind.name}.gguf"

        def add(writer, kind=kind):
            data = gguf_format.quants.quantize(np.ones((48, D), np.float32), kind)
            writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)

        write_gguf(path, change=add, without="blk.0.ffn_up.weight")
        file = gguf.open_gguf(path)
        value = gguf.hf_tensors(file, gguf.model_config(file))["model.layers.0.mlp.up_proj.weight"].read(0, 48)
        np.testing.assert_allclose(value, 1, atol=0.01)


def split(folder: Path, count: int) -> list[Path]:
    """A model in `count` parts, as llama-gguf-split makes them: the first has the metadata."""
    whole = gguf.open_gguf(folder / "whole.gguf")
    paths = [folder / f"tiny-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    for n, path in enumerate(paths):
        writer = gguf_format.GGUFWriter(path, "llama")
        if n == 0:
            write_metadata(writer)
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[n::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        close(writer)
    return paths


def test_all_parts_of_a_split_model_are_read(tmp_path):
    values = write_gguf(tmp_path / "whole.gguf")
    whole = convert.read_model(str(tmp_path / "whole.gguf"))
    paths = split(tmp_path, 3)
    for named in paths:  # whichever is named
        source = convert.read_model(str(named))
        assert (source.config, source.tokenizer_files) == (whole.config, whole.tokenizer_files)
        assert [path.name for path in source.paths] == [path.name for path in paths]
        huggingface.plan_leaves(source.tensors, source.config)
        found = source.tensors["model.layers.0.self_attn.q_proj.weight"].read(0, HEADS * HD)
        assert np.array_equal(found, values["blk.0.attn_q.weight"])


def test_a_split_model_that_is_not_whole_is_refused(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    paths = split(tmp_path, 3)

    def refused(message, path=paths[0]):
        with pytest.raises(InputError, match=message):
            convert.import_checkpoint(str(path), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    paths[1].rename(tmp_path / "away")
    refused(r"tiny-00002-of-00003.gguf: missing; split.count=3 in tiny-00001-of-00003.gguf")
    paths[1].write_bytes(paths[2].read_bytes())
    refused("tiny-00002-of-00003.gguf: split.no=2, expected 1")
    paths[0].rename(tmp_path / "model.gguf")
    refused("model.gguf: one of 3 parts, expected the name NAME-00001-of-00003.gguf", tmp_path / "model.gguf")


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
