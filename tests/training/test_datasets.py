"""The datasets of a run: mixtures, their held-out rows, and corrupt rows in training."""

import json
from fractions import Fraction

import jax
import numpy as np
import pytest

from llada_jax.checkpoint import weights
from llada_jax.data import pack
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.mixture import parse_mixture
from llada_jax.data.order import Rows
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS, preset
from llada_jax.tokenizer import from_files
from llada_jax.training import datasets, inputs, loop
from llada_jax.training.config import check, default_config
from tests.helpers.foreign_tokenizers import llama_like
from tests.helpers.kill_loop import metrics_of

LENGTH = 32
TOKENIZER = byte_tokenizer(preset("tiny").eos_token_id, preset("tiny").mask_token_id)


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    PRESETS["small"] = preset("tiny").replace(
        hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16, intermediate_size=64
    )
    yield
    del PRESETS["small"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """40 rows of a's, 24 of b's."""
    root = tmp_path_factory.mktemp("datasets")
    for name, rows in (("a", 40), ("b", 24)):
        (root / f"{name}.txt").write_text(name * (rows * LENGTH - 1))
        pack.pack(str(root / f"{name}.txt"), TOKENIZER, str(root / name), LENGTH, rows_per_shard=16)
    return root


def config_of(folders, **data):
    config = default_config("small")
    with config.unlocked():
        config.data.update({"tokenizer": "bytes", "length": LENGTH, "held_out_rows": 8} | data)
        config.batch.rows = 8
        config.schedule.update(kind="constant", block_size=8, steps=6)
        config.checkpoint.update(every_steps=3, keep_last=None)
        config.evaluation.update(every_steps=3, block_sizes=(8,), rows=4)
        config.log_every_steps = 1
    return config


def mixture_of(folders, weights=(3, 1)):
    return f"{folders / 'a'}:{weights[0]},{folders / 'b'}:{weights[1]}"


def open_of(config):
    return datasets.open_rows(config, parse_mixture(config.data.mixture), TOKENIZER)


def test_a_mixture_holds_rows_out_of_each_component(folders):
    rows, held_out, components = open_of(config_of(folders, mixture=mixture_of(folders)))
    assert [(part.name, part.share) for part in components] == [("a", 0.75), ("b", 0.25)]
    assert held_out.row_ids.tolist() == [32, 33, 34, 35, 56, 57, 58, 59]  # the last 8 rows of 40, and of 40 + 24
    for part, letter in zip(components, b"ab", strict=True):
        assert (held_out.ids[part.held_out] == letter).all() and len(held_out.ids[part.held_out]) == 4
    trained = {rows.index(n)[0] for n in range(400)}
    assert trained == {*range(32), *range(40, 56)}


def test_a_single_dataset_is_what_it_was(folders):
    """Old runs go on: rows, ids and order of one dataset do not know of mixtures."""
    config = config_of(folders, path=str(folders / "a"))
    rows, held_out, components = datasets.open_rows(config, [(config.data.path, Fraction(1))], TOKENIZER)
    alone = Rows(config.data.path, config.seed, 0, 32)
    assert [rows.index(n) for n in range(70)] == [alone.index(n) for n in range(70)]
    assert held_out.row_ids.tolist() == [32, 33, 34, 35] and components[0].held_out == slice(0, 4)
    assert rows.digest == alone.dataset["digest"]


def test_what_does_not_fit_is_named(folders, tmp_path):
    (tmp_path / "b").symlink_to(folders / "b")
    same_names = f"{folders / 'b'}:1,{tmp_path / 'b'}:1"
    assert [part.name for part in open_of(config_of(folders, mixture=same_names))[2]] == [
        str(folders / "b"), str(tmp_path / "b")
    ]  # fmt: skip
    for config, message in (
        (config_of(folders, mixture="/nowhere:1"), "/nowhere: no such folder"),
        (config_of(folders, mixture=mixture_of(folders), held_out_rows=24), "b: 24 rows, of which data.held_out"),
    ):
        with pytest.raises(InputError, match=message):
            open_of(config)
    looks = {"tokenizer.json": json.dumps(json.loads(TOKENIZER.files["tokenizer.json"]), indent=2).encode()}
    alike = from_files(TOKENIZER.files | looks | {"generation_config.json": b'{"temperature": 0.6}'})
    assert alike.digest != TOKENIZER.digest  # and yet the same ids and texts
    datasets.open_rows(config_of(folders), [(str(folders / "a"), Fraction(1))], alike)
    other = byte_tokenizer(300)
    with pytest.raises(InputError, match="a: packed with another tokenizer"):
        datasets.open_rows(config_of(folders), [(str(folders / "a"), Fraction(1))], other)
    for data in ({}, {"path": "x", "mixture": "y:1"}):
        with pytest.raises(InputError, match="config.data: set one of path="):
            loop.train(config_of(folders, **data), str(tmp_path / "run"), jax.devices()[:1])
    with pytest.raises(InputError, match="config.data.corrupt_share=1.0"):
        check(config_of(folders, path="x", corrupt_share=1.0))


def test_a_run_begins_and_ends_documents_as_its_model_does(tmp_path):
    """The end of sequence of the tokenizer is one of the model's, or one line says which is not."""
    model = PRESETS["small"].replace(vocab_size=512, eos_token_id=508)
    leaves = {n: np.zeros(p.shape, np.float32) for n, (p, _) in parameters.leaves(model).items()}
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("the cat " * 200)
    for name, ends in (("fits", (2,)), ("older", ())):
        config = model.replace(other_eos_token_ids=ends)
        weights.write_weights(tmp_path / name, config, leaves.items(), llama_like(bos=True).files, {})
    for add_bos, first in (("auto", 1), ("true", 1), ("false", llama_like().token_to_id("▁the"))):
        config = config_of(None, source=str(source), tokenizer="", held_out_rows=1, add_bos=add_bos)
        config.init_from = str(tmp_path / "fits")
        opened = inputs.open_inputs(config, tmp_path / "run")
        assert opened.rows.read(0).ids[0] == first and opened.tokenizer.adds_bos == (first == 1)
        assert inputs.lineage(config, opened)["config"]["data"]["add_bos"] == add_bos
    config.data.add_bos = "yes"
    with pytest.raises(InputError, match="^config.data.add_bos='yes', expected auto, true, false$"):
        inputs.open_inputs(config, tmp_path / "run")
    config.data.add_bos, config.init_from = "auto", str(tmp_path / "older")
    with pytest.raises(InputError, match=r"older: documents end in '</s>' \(id 2\), .* are \[508\]; import it again"):
        inputs.open_inputs(config, tmp_path / "run")


CHATS = "".join(json.dumps({"prompt": "q" * (1 + i % 5), "completion": "a" * (1 + i % 7)}) + "\n" for i in range(60))


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({}, "--block_align=8), but config.schedule has blocks of 16"),
        ({"schedule.block_size": 4}, "but config.evaluation.block_sizes has blocks of 16"),
        ({"schedule.block_size": 4, "evaluation.block_sizes": (4, 8)}, None),
        ({"schedule.block_size": 32, "evaluation.block_sizes": (32,)}, None),  # of a row: each document is one block
        ({"objective.block_origin": "document"}, None),
        ({"objective.document_mask": False}, None),  # a row is one document
        ({"schedule.kind": "wsd", "schedule.warmup_blocks": (1, 4), "schedule.warmup_steps": (1, 1),
          "schedule.decay_blocks": (16,), "schedule.decay_steps": (1,), "evaluation.block_sizes": (1,)},
         "--block_align=16, or set config.objective.block_origin"),
    ],
)  # fmt: skip
def test_blocks_are_those_that_documents_begin_at(tmp_path, changes, refused):
    (tmp_path / "chats.jsonl").write_text(CHATS)
    rows = str(tmp_path / "rows")
    pack_chat(str(tmp_path / "chats.jsonl"), TOKENIZER, rows, LENGTH, block_align=8)
    config = config_of(None, path=rows)
    config.schedule.block_size, config.evaluation.block_sizes = 16, (16,)
    config.update_from_flattened_dict(changes)

    def open_alone():
        return datasets.open_rows(config, [(rows, Fraction(1))], TOKENIZER)

    if refused:
        with pytest.raises(InputError, match=f"{rows}: documents begin at multiples of 8") as caught:
            open_alone()
        assert refused in str(caught.value) and "--block_align=16" in str(caught.value)
    else:
        open_alone()


def test_blocks_of_text_and_of_rows_with_one_document_are_not_compared(folders, tmp_path):
    """Eq. 3 cuts text anywhere; a document alone in its row begins at a block."""
    datasets.open_rows(config_of(folders), [(str(folders / "a"), Fraction(1))], TOKENIZER)
    long = "".join(json.dumps({"prompt": "q" * 20, "completion": "a"}) + "\n" for _ in range(20))
    (tmp_path / "chats.jsonl").write_text(long)
    pack_chat(str(tmp_path / "chats.jsonl"), TOKENIZER, str(tmp_path / "rows"), LENGTH, block_align=8)
    config = config_of(folders)
    config.schedule.block_size, config.evaluation.block_sizes = 16, (16,)
    datasets.open_rows(config, [(str(tmp_path / "rows"), Fraction(1))], TOKENIZER)


def test_the_template_counts_for_conversations_only(tmp_path):
    (tmp_path / "chats.jsonl").write_text(CHATS)
    (tmp_path / "text.txt").write_text("text " * 200)
    pack_chat(str(tmp_path / "chats.jsonl"), TOKENIZER, str(tmp_path / "chats"), LENGTH)
    pack.pack(str(tmp_path / "text.txt"), TOKENIZER, str(tmp_path / "text"), LENGTH)
    edited = from_files(TOKENIZER.files | {"chat_template.jinja": b"{{ messages[0].content }}"})
    config = config_of(None)
    config.schedule.block_size = 32
    datasets.open_rows(config, [(str(tmp_path / "text"), Fraction(1))], edited)
    with pytest.raises(InputError, match="chats: packed with another tokenizer"):
        datasets.open_rows(config, [(str(tmp_path / "chats"), Fraction(1))], edited)
    path = tmp_path / "chats" / "dataset.json"  # one of before: its files are compared
    dataset = json.loads(path.read_text())
    del dataset["tokenizer_identity"]
    path.write_text(json.dumps(dataset))
    datasets.open_rows(config, [(str(tmp_path / "chats"), Fraction(1))], TOKENIZER)


def train(config, workdir):
    loop.train(config, str(workdir), jax.devices()[:1])
    return metrics_of(workdir)


def test_a_run_over_a_mixture_with_a_corrupt_row(folders, tmp_path):
    """The row is counted where it falls, the loss stays finite, and a resumed run is the uninterrupted one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for path in (folders / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "b" / "rows-00000.array_record"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    config = config_of(folders, mixture=mixture_of(tmp_path, (1, 1)), corrupt_share=0.7)
    rows = train(config, tmp_path / "whole")
    opened, *_ = open_of(config)
    lost = [int((opened.batch(step, 8).segment_ids == 0).all(1).sum()) for step in range(6)]
    assert sum(lost) > 4
    assert [row["corrupt_rows"] for row in rows if "loss" in row] == lost
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    scored = [row for row in rows if "nelbo" in row]
    assert len(scored) == 2
    for row in scored:
        assert row["nelbo"] == pytest.approx(0.5 * row["nelbo/a"] + 0.5 * row["nelbo/b"])
    train(config, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "6").rename(tmp_path / "lost")
    assert train(config, tmp_path / "cut") == rows
    digests = [json.loads((tmp_path / run / "digests.json").read_text()) for run in ("whole/checkpoints/6", "lost")]
    assert digests[0]["tensors"] == digests[1]["tensors"]
    strict = config_of(folders, mixture=config.data.mixture, corrupt_share=0.01)
    strict, *_ = open_of(strict)
    with pytest.raises(InputError, match=r"rows-00000\.array_record: record \d+ is corrupt .*corrupt_share=0\.01"):
        strict.batch(0, 8)
