"""Ends of sequence: every id that a source names is kept, and an export writes back what was read."""

import json
import shutil

import pytest

from llada_jax.checkpoint.weights import load_tokenizer, read_config
from llada_jax.errors import InputError
from llada_jax.interop import hf_config
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint
from llada_jax.model.config import ModelConfig, preset
from llada_jax.tokenizer import from_files
from tests.helpers.foreign_tokenizers import byte_level
from tests.helpers.paths import GOLDENS


def hf_folder(folder, eos, generation=None, tokenizer=None):
    shutil.copytree(GOLDENS / "ling_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "eos_token_id"} | {"pad_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config | ({} if eos is ... else {"eos_token_id": eos})))
    for name, content in ({} if tokenizer is None else tokenizer.files).items():
        (folder / name).write_bytes(content)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    "eos, generation, named, expected",
    [
        ([5, 6, 2], {"eos_token_id": [5, 6, 2]}, "</s>", [5, 6, 2]),  # Llama 3.1: the last one ends a turn
        (5, {"eos_token_id": [2, 5]}, "</s>", [2, 5]),  # Qwen's chat models
        (5, None, "</s>", [5, 2]),  # a tokenizer that was changed for chat
        (5, {"eos_token_id": None}, None, [5]),
        ([5], {}, None, [5]),
        (None, {"eos_token_id": 6}, "</s>", [6, 2]),
        (..., None, None, [7]),  # Ling's is its pad
        (-1, {"eos_token_id": [-1, 6, 6]}, None, [6]),
        ([], {"eos_token_id": []}, "</s>", [7, 2]),
    ],
)
def test_every_named_end_is_kept_and_written_back(tmp_path, eos, generation, named, expected):
    tokenizer = byte_level(eos_token=named)
    source = hf_folder(tmp_path / "source", eos, generation, tokenizer)
    import_checkpoint(str(source), str(tmp_path / "ours"), alignment="shifted")
    config, _ = read_config(tmp_path / "ours")
    assert list(config.eos_token_ids) == expected and config.eos_token_id == expected[0]
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "hf"))
    if eos == [] and named:  # neither file names an end, the tokenizer does
        assert after["eos_token_id"] == expected
    else:
        assert after.get("eos_token_id", ...) == eos  # as it was, a list or none too
    if generation is not None:
        read, written = ((f / "generation_config.json").read_bytes() for f in (source, tmp_path / "hf"))
        assert read == written
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "again"))
    assert read_config(tmp_path / "again")[0].eos_token_ids == config.eos_token_ids
    assert before.keys() - {"eos_token_id"} <= after.keys()


def test_a_tokenizers_own_names_for_the_end_of_a_turn():
    tokenizer = byte_level(eot_token="<unk>", eom_token="nowhere")
    assert tokenizer.eos_ids == (2, 0)
    files = tokenizer.files | {"generation_config.json": b'{"eos_token_id": [2, 9]}'}
    assert from_files(files).eos_ids == (2, 0, 9)
    assert byte_level(eos_token=None).eos_ids == ()


def test_malformed_ones_are_named_with_their_file():
    hf = {"eos_token_id": "2"}
    with pytest.raises(InputError, match="^config.json: eos_token_id='2', expected an integer"):
        hf_config.ends_of_sequence(hf, {})
    with pytest.raises(InputError, match="^generation_config.json: eos_token_id=True, expected an integer"):
        hf_config.ends_of_sequence({}, {"eos_token_id": [1, True]})
    with pytest.raises(InputError, match=r"other_eos_token_ids=\(512,\)"):
        preset("tiny").replace(other_eos_token_ids=(512,))


def test_configs_of_older_checkpoints_are_read():
    values = preset("tiny").to_dict()
    del values["other_eos_token_ids"]
    assert ModelConfig.from_dict(values) == preset("tiny")
    ends = preset("tiny").with_ends([3, 508, 4])
    assert ends.eos_token_ids == (508, 3, 4)
    assert ModelConfig.from_dict(json.loads(json.dumps(ends.to_dict()))) == ends and hash(ends)
    assert preset("tiny").replace(eos_token_id=None).eos_token_ids == ()
    assert preset("tiny").replace(eos_token_id=None).with_ends([4, 5]).eos_token_ids == (4, 5)


def test_a_checkpoints_tokenizer_knows_them(tmp_path):
    source = hf_folder(tmp_path / "source", 5, {"eos_token_id": [2, 5]}, byte_level())
    import_checkpoint(str(source), str(tmp_path / "ours"), alignment="shifted")
    assert load_tokenizer(tmp_path / "ours").eos_ids == (2, 5)
