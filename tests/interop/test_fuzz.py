"""Damaged inputs: each ends in one line that names the cause, with nothing written, or changes nothing."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llada_jax.errors import InputError
from llada_jax.interop.convert import import_checkpoint
from tests.helpers.paths import GOLDENS

INDEX = "model.safetensors.index.json"
INTEGERS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "max_position_embeddings", "num_experts", "num_experts_per_tok", "n_group",
            "topk_group", "moe_intermediate_size"]  # fmt: skip
ABSURD_INTEGERS = [-1, 0, 2**40, 10**400, "12", 1.5, [], {}, True]
ABSURD = {
    "rope_theta": [-1, 0, "x", [], float("nan"), float("inf")],
    "rms_norm_eps": [-1, 0, 2, "x", float("nan")],
    "partial_rotary_factor": [-1, 7, "x"],
    "rope_scaling": [3, "yarn", {"rope_type": "yarn"}, {"rope_type": "yarn", "factor": -1}, {"rope_type": "cubic"}],
    "architectures": [["GPT2LMHeadModel"], "x", [3], [[]], {}],
    "hidden_act": ["relu", 3],
    "pad_token_id": [512, -7, "x", 2**40],
    "tie_word_embeddings": ["x", 3],
    "moe_router_enable_expert_bias": ["x", 0],
    "attention_bias": [True],
    "quantization_config": [{"bits": 4}],
    "diffusion_alignment": ["left", 3],
}


def shard_of(folder: Path, chooser) -> Path:
    return chooser.choice(sorted(folder.glob("*.safetensors")))


def rewrite(folder: Path, chooser, change) -> str:
    """Changes one tensor of a shard with `change(tensors, name)`; returns its name."""
    shard = shard_of(folder, chooser)
    tensors = load_file(shard)
    name = chooser.choice(sorted(tensors))
    change(tensors, name)
    save_file(tensors, shard)
    return name


def truncated(folder, chooser):
    shard = shard_of(folder, chooser)
    os.truncate(shard, chooser.randrange(shard.stat().st_size))
    return [shard.name]


def longer(folder, chooser):
    shard = shard_of(folder, chooser)
    with shard.open("ab") as file:
        file.write(b"\0" * chooser.choice([1, 2, 4, 4096]))
    return [shard.name]


def header_byte(folder, chooser):
    """May name another tensor, and then it is that one which is missing or unexpected."""
    shard = shard_of(folder, chooser)
    data = bytearray(shard.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    data[chooser.randrange(end)] ^= 1 << chooser.randrange(8)
    shard.write_bytes(data)
    return [shard.name, "tensor", "model.", "lm_head"]


def header_text(folder, chooser):
    """Another JSON in the header."""
    shard = shard_of(folder, chooser)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = chooser.choice(sorted(set(header) - {"__metadata__"}))
    entry = chooser.choice([
        3, None, [], "x", {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [3], "data_offsets": [0, 13]},
        {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [1e300], "data_offsets": [0, 4]},
    ])  # fmt: skip
    text = json.dumps(header | {name: entry}).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return [shard.name]


def name_twice(folder, chooser):
    shard = shard_of(folder, chooser)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = chooser.choice([each for each in sorted(header) if each != "__metadata__"])
    text = data[8 : 8 + length].rstrip()[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return [f"{name} is given twice"]


def in_two_shards(folder, chooser):
    first, second = sorted(folder.glob("*.safetensors"))
    name, value = chooser.choice(sorted(load_file(first).items(), key=lambda item: item[0]))
    save_file(load_file(second) | {name: value}, second)
    return [f"tensor {name} is also in"]


def wrong_shape(folder, chooser):
    def change(tensors, name):
        value = tensors[name]
        tensors[name] = chooser.choice([value[:-1], value[None], value.reshape(-1)[: value.size - 1], value[:0]])

    return [rewrite(folder, chooser, change)]


def wrong_dtype(folder, chooser):
    def change(tensors, name):
        tensors[name] = tensors[name].astype(chooser.choice([np.int8, np.int64, np.float64, np.bool_]))

    return [rewrite(folder, chooser, change)]


def missing_tensor(folder, chooser):
    return [rewrite(folder, chooser, lambda tensors, name: tensors.pop(name))]


def extra_tensor(folder, chooser):
    extra = chooser.choice(["model.layers.9.input_layernorm.weight", "lm_head.bias", "x", "model.layers.0.mlp.gate"])
    rewrite(folder, chooser, lambda tensors, name: tensors.update({extra: np.ones(3, np.float32)}))
    return [extra]


def index_entry(folder, chooser):
    index = json.loads((folder / INDEX).read_text())
    name = chooser.choice(sorted(index["weight_map"]))
    file = chooser.choice(["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "", ".", "nowhere.x", "\0",
                           "config.json", 3, None, ["x"], "x" * 5000])  # fmt: skip
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))
    return [INDEX, "config.json", "nowhere", name]


def index_itself(folder, chooser):
    text = (folder / INDEX).read_text()
    damaged = chooser.choice(["", "{", "[]", "3", "null", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**5,
                              text[: chooser.randrange(1, len(text) - 3)],
                              text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x", ')])  # fmt: skip
    (folder / INDEX).write_text(damaged)
    return [INDEX]


def link_out(folder, chooser):
    path = folder / chooser.choice([INDEX, "config.json", *(p.name for p in folder.glob("*.safetensors"))])
    outside = folder.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    return [f"{path.name} is a link out of the folder"]


def config_value(folder, chooser):
    config = json.loads((folder / "config.json").read_text())
    field = chooser.choice([*INTEGERS, *ABSURD])
    config[field] = chooser.choice(ABSURD.get(field, ABSURD_INTEGERS))
    (folder / "config.json").write_text(json.dumps(config))
    return ["config", "tensor", ".safetensors"]  # a wrong width shows as the wrong shape of a tensor


def config_text(folder, chooser):
    text = (folder / "config.json").read_text()
    damaged = chooser.choice(["", "{", "[]", "3", "null", "[" * 10**5, text[: chooser.randrange(99)], "\xff"])
    (folder / "config.json").write_bytes(damaged.encode("latin-1"))
    return ["config.json"]


DAMAGES = [truncated, longer, header_byte, header_byte, header_text, name_twice, in_two_shards, wrong_shape,
           wrong_dtype, missing_tensor, extra_tensor, index_entry, index_itself, link_out, config_value, config_value,
           config_value,
           config_text]  # fmt: skip


def fuzz(tmp_path: Path, seeds) -> int:
    """Returns how many of the inputs were refused; the others gave the same checkpoint as the undamaged one."""
    pristine = tmp_path / "pristine"
    shutil.copytree(
        GOLDENS / "llada2_tiny", pristine, ignore=shutil.ignore_patterns("*.npz"), copy_function=shutil.copyfile
    )
    import_checkpoint(str(pristine), str(tmp_path / "expected"))
    expected = json.loads((tmp_path / "expected" / "digests.json").read_text())["tensors"]
    refused = 0
    for seed in seeds:
        chooser = random.Random(seed)
        folder = tmp_path / str(seed) / "hf"
        shutil.copytree(pristine, folder)
        damage = DAMAGES[seed % len(DAMAGES)]
        causes = damage(folder, chooser)
        out = folder.parent / "out"
        try:
            import_checkpoint(str(folder), str(out))
        except InputError as error:
            refused += 1
            assert any(cause in str(error) for cause in causes), (seed, damage.__name__, error)
            assert len(str(error)) < 500, (seed, damage.__name__, error)
            assert {path.name for path in folder.parent.iterdir()} <= {"hf", "outside"}, (seed, damage.__name__)
        else:
            assert damage is header_byte, (seed, damage.__name__)  # a bit of __metadata__, or of white space
            assert json.loads((out / "digests.json").read_text())["tensors"] == expected, (seed, damage.__name__)
        shutil.rmtree(folder.parent)
    return refused


def test_144_damaged_inputs(tmp_path):
    assert fuzz(tmp_path, range(144)) >= 140


@pytest.mark.soak
def test_500_damaged_inputs(tmp_path):
    assert fuzz(tmp_path, range(144, 644)) >= 480
