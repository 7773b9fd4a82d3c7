"""HF -> ours -> HF gives back every tensor byte for byte, and what was added on the way."""

import json

import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint

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
    assert changed <= {"torch_dtype", "num_nextn_predict_layers"}


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
