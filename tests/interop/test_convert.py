import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig, tokenizer
from llada_jax.checkpoint import weights
from llada_jax.errors import InputError
from llada_jax.interop import convert
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS
from tests.interop.test_huggingface import CLASSES, GOLDENS, TINY, assert_same_bits, stream, tiny_tensors, write_folder
from tests.test_tokenizer import make_files

ROOT = Path(__file__).parents[2]
LING = PRESETS["ling_mini"]
LLADA = PRESETS["llada2_mini"].replace(mask_token_id=None)
PADDED = PRESETS["tiny"].replace(mask_token_id=None, eos_token_id=None, pad_token_id=None)  # 512 ids


def command(*flags, cwd=ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "tpu"}  # it is not to wait for a TPU
    line = [sys.executable, str(ROOT / "tools/hf_to_orbax.py"), *map(str, flags)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def numbered_files(names: dict[int, str], size: int) -> dict[str, bytes]:
    """A tokenizer of `size` ids, those of `names` being special tokens."""
    vocab = {names.get(i, f"w{i}"): i for i in range(size)}
    added = [{"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
             | {"normalized": False} for i, name in names.items()]  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return {"tokenizer.json": json.dumps({"version": "1.0", "added_tokens": added, "model": model}).encode()}


@pytest.fixture
def llama(tmp_path):
    """A folder of 40 ids; its tokenizer has ids 0 to 29."""
    folder = write_folder(tmp_path / "hf", TINY | CLASSES["llama"], tiny_tensors("llama", ml_dtypes.bfloat16))
    for name, content in numbered_files({28: "<e>", 29: "<|role_end|>"}, 30).items():
        (folder / name).write_bytes(content)
    return folder


def test_import_of_a_golden(tmp_path, capsys):
    out = tmp_path / "out"
    convert.import_checkpoint(str(GOLDENS / "ling_tiny_mtp"), str(out), mask_token_id=511)
    model = weights.load_checkpoint(out)
    _, leaves = stream(GOLDENS / "ling_tiny_mtp")
    assert_same_bits(jax.tree.map(np.asarray, parameters.unstack(model.params, model.config)), leaves)
    assert (model.config.alignment, model.config.mask_token_id, model.tokenizer) == ("shifted", 511, None)
    printed = capsys.readouterr().out
    assert "tensors of multi-token prediction (layer 2)" in printed
    assert f"bailing_moe, {parameters.count(model.config):,} parameters, float32" in printed
    assert "alignment shifted, mask token id 511" in printed
    lineage = model.lineage
    assert lineage["hf_config"] == json.loads((GOLDENS / "ling_tiny_mtp/config.json").read_text())
    assert lineage["source"] == str(GOLDENS / "ling_tiny_mtp")
    assert lineage["source_files"]["model-00001-of-00002.safetensors"] == 872_944


def test_flags_and_tokenizer_reach_the_checkpoint(llama, tmp_path):
    (llama / "generation_config.json").write_text('{"eos_token_id": [28, 29]}')
    convert.import_checkpoint(str(llama), str(tmp_path / "a"), dtype="float32", alignment="same", add_mask_token=True)
    model = weights.load_checkpoint(tmp_path / "a")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    assert (model.config.alignment, model.config.mask_token_id, model.config.eos_token_id) == ("same", 30, 28)
    assert (model.config.vocab_size, model.tokenizer.mask_id) == (40, 30)
    assert model.tokenizer.files["generation_config.json"] == b'{"eos_token_id": [28, 29]}'


def test_added_row_is_the_mean(tmp_path, capsys):
    tensors = tiny_tensors("llama")
    folder = write_folder(tmp_path / "hf", TINY | CLASSES["llama"], tensors)
    convert.import_checkpoint(str(folder), str(tmp_path / "out"), add_mask_token=True)
    model = weights.load_checkpoint(tmp_path / "out")
    assert (model.config.vocab_size, model.config.mask_token_id) == (41, 40)
    for found, name in ((model.params["embedding"], "embed_tokens"), (model.params["head"].T, "lm_head")):
        stored = next(value for key, value in tensors.items() if name in key)
        assert np.array_equal(found[:40], stored)
        np.testing.assert_allclose(found[40], stored.astype(np.float64).mean(0), atol=1e-6)
    assert "mask token 40: appended to the embedding" in capsys.readouterr().out


def test_no_mask_token(llama, tmp_path, capsys):
    convert.import_checkpoint(str(llama), str(tmp_path / "out"))
    assert weights.load_checkpoint(tmp_path / "out").config.mask_token_id is None
    printed = capsys.readouterr().out
    assert "--mask_token_id=N or --add_mask_token" in printed
    assert "mask token id None" in printed


def choose(config, files, mask_token_id=None, add=False):
    choice = convert.choose_mask(config, files, mask_token_id, add)
    if choice.tokenizer_files:
        assert tokenizer.from_files(choice.tokenizer_files).mask_id == choice.config.mask_token_id
    return choice


def test_mask_of_the_tokenizer():
    files = make_files(("<e>", "<|mask|>"))
    choice = choose(PADDED, files)
    assert (choice.config.mask_token_id, choice.tokenizer_files, choice.appended) == (271, files, False)
    assert (choice.config.eos_token_id, choice.config.pad_token_id) == (270, 270)
    assert choose(PADDED, files, mask_token_id=271).config.mask_token_id == 271
    added = choose(PADDED, files, add=True)
    assert (added.config.mask_token_id, added.appended) == (271, False)
    assert "no mask token added: the tokenizer has one, id 271" in added.notices
    with pytest.raises(InputError, match="--mask_token_id=300, but the tokenizer says that the mask token is 271"):
        choose(PADDED, files, mask_token_id=300)
    with pytest.raises(InputError, match="mask token id 271 is not below vocab_size=100"):
        choose(PADDED.replace(vocab_size=100), files)


def test_mask_by_flag():
    files = make_files(("<e>", "<|role_end|>", "<mask>", "[gMASK]"))
    choice = choose(PADDED, files, mask_token_id=400)
    assert (choice.config.mask_token_id, choice.config.vocab_size, choice.appended) == (400, 512, False)
    assert choose(PADDED, files, mask_token_id=272).config.mask_token_id == 272
    for token_id, name in {271: "<|role_end|>", 273: "[gMASK]"}.items():
        message = rf"--mask_token_id: id {token_id} is '{name}' in this tokenizer, not a mask; use --add_mask_token"
        with pytest.raises(InputError, match=message.replace("|", r"\|").replace("[", r"\[")):
            choose(PADDED, files, mask_token_id=token_id)
    for token_id in (512, -1):
        with pytest.raises(InputError, match=f"mask token id {token_id} is not below vocab_size=512"):
            choose(PADDED, files, mask_token_id=token_id)


def test_mask_added():
    files = make_files(("<e>",))
    inside = choose(PADDED, files, add=True)
    assert (inside.config.mask_token_id, inside.config.vocab_size, inside.appended) == (271, 512, False)
    full = choose(PADDED.replace(vocab_size=271), files, add=True)
    assert (full.config.mask_token_id, full.config.vocab_size, full.appended) == (271, 272, True)
    with pytest.raises(InputError, match="--add_mask_token: id 100 is '.+' in this tokenizer, not a mask"):
        choose(PADDED.replace(vocab_size=100), files, add=True)


def test_mask_of_config_json():
    config = PADDED.replace(mask_token_id=300)
    assert choose(config, make_files()).config.mask_token_id == 300
    with pytest.raises(InputError, match=r"config\.json: mask_token_id=300, but the tokenizer's mask is 271"):
        choose(config, make_files(("<e>", "<|mask|>")))
    with pytest.raises(InputError, match="--mask_token_id=301, but config.json says"):
        choose(config, make_files(), mask_token_id=301)


def test_llada2_and_ling_ids_are_not_confused():
    assumed = choose(LLADA, {})
    assert assumed.config.mask_token_id == 156_895
    assert "no tokenizer: mask token id 156895" in assumed.notices[0]
    assert choose(LLADA.replace(vocab_size=157_185), {}).config.mask_token_id is None
    assert choose(LING, {}).config.mask_token_id is None
    by_hand = choose(LING, {}, mask_token_id=156_895)
    assert "<|role_end|> in Ling's chat models" in by_hand.notices[0]
    ling_files = numbered_files({156_895: "<|role_end|>"}, 156_900)
    for config in (LING, LLADA):
        with pytest.raises(InputError, match=r"id 156895 is '<\|role_end\|>' in this tokenizer, not a mask"):
            choose(config, ling_files, mask_token_id=156_895)
    mixed = choose(LLADA, ling_files)
    assert mixed.config.mask_token_id is None
    assert "not LLaDA2's tokenizer: id 156895, LLaDA2's mask, is '<|role_end|>' in it" in mixed.notices
    assert choose(LING, ling_files, add=True).config.mask_token_id == 156_900


def test_refusals(llama, tmp_path):
    def refused(message, source=llama, **options):
        with pytest.raises(InputError, match=message):
            convert.import_checkpoint(str(source), str(tmp_path / "out"), **options)
        assert not (tmp_path / "out").exists()

    refused("--mask_token_id and --add_mask_token exclude each other", mask_token_id=3, add_mask_token=True)
    refused("--dtype=float64", dtype="float64")
    refused("--alignment=left", alignment="left")
    refused(r"id 29 is '<\|role_end\|>'", mask_token_id=29)
    refused("nowhere: no such folder or file", source=tmp_path / "nowhere")
    refused(r"interop: no config\.json", source=Path(__file__).parent)
    refused(r"expected a folder with config\.json, or a \.gguf file", source=Path(__file__))
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").touch()
    refused(r"no config\.json; pass the file a\.gguf", source=tmp_path / "ggufs")
    refused("a.gguf: not a complete GGUF file", source=tmp_path / "ggufs" / "a.gguf")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refused("adapter_config.json: an adapter, not a model", source=tmp_path / "lora")
    (llama / "config.json").write_text("{")
    refused(r"config\.json: malformed JSON")


def test_keys_that_are_not_understood_are_named(llama, tmp_path, capsys):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"unsloth_version": "2026.1", "notes": "x" * 99}))
    convert.import_checkpoint(str(llama), str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "notice: config.json: unknown keys, ignored: unsloth_version='2026.1', notes='xxxx" in printed
    assert max(map(len, printed.splitlines())) < 200


def test_a_model_of_llada2_2_comes_without_a_notice_and_edits(tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(GOLDENS / "llada2_tiny", source)
    config = json.loads((source / "config.json").read_text())
    config |= {"expert_capacity": 8, "block_size": 8, "delete_token_id": 500, "split_token_id": 501}
    config |= {"use_qk_norm": True, "rope_theta": 3_000_000}
    (source / "config.json").write_text(json.dumps(config))
    assert convert.read_model(str(source)).notices == [
        f"no tokenizer.json in {source}: the checkpoint will have no tokenizer"
    ]
    convert.import_checkpoint(str(source), str(tmp_path / "ours"), mask_token_id=511)
    model = weights.load_checkpoint(tmp_path / "ours")
    g = GenerateConfig(gen_length=12, block_length=8, rule="llada2.2", threshold=0.1, editing_threshold=0.0, eos_id=-1)
    (answer,) = llada_jax.generate(model.params, model.config, [np.arange(5)], g).tokens
    assert len(answer) == 12 and not np.isin(answer, (500, 501, 511)).any()


def test_existing_out_is_kept(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(InputError, match="out"):
        convert.import_checkpoint(str(llama), str(tmp_path / "out"))
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_command(llama, tmp_path):
    done = command(f"--source={llama}", f"--out={tmp_path / 'out'}", "--mask_token_id=35")
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert "bfloat16, alignment shifted, mask token id 35" in done.stdout
    assert weights.load_checkpoint(tmp_path / "out").tokenizer.mask_id == 35


def test_command_on_bad_input(llama, tmp_path):
    done = command(f"--source={llama}", f"--out={tmp_path / 'out'}", "--mask_token_id=35", "--add_mask_token")
    assert (done.returncode, done.stderr) == (2, "error: --mask_token_id and --add_mask_token exclude each other\n")
    folder = shutil.copytree(GOLDENS / "ling_tiny", tmp_path / "golden")
    (folder / "model-00002-of-00002.safetensors").unlink()
    done = command(f"--source={folder}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "model-00002-of-00002.safetensors" in done.stderr
    assert not (tmp_path / "out").exists()


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, llada_jax.interop.convert; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
