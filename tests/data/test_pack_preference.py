import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import pack
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_preference import pack_preference
from llada_jax.errors import InputError
from tests.helpers.data_helpers import (
    CHATML,
    EOS,
    kill_everywhere,
    message,
    read_back,
    run_tool,
    with_template,
    write_rows,
    write_saved_dataset,
    write_tokenizer,
)

LENGTH, ALIGN = 64, 8


@pytest.fixture(scope="module")
def rows():
    """Pairs of many lengths, of which some are too long for a row."""
    lengths = np.random.default_rng(0).integers(1, 45, (60, 2))
    pairs = [{"prompt": f"{i}?", "chosen": "c" * a, "rejected": "r" * b} for i, (a, b) in enumerate(lengths)]
    pairs[3:3] = [{"prompt": "p", "chosen": "x", "rejected": "x"}, {"prompt": "p", "chosen": "x", "rejected": ""}]
    return pairs


@pytest.fixture
def source(tmp_path, rows):
    return write_rows(tmp_path / "a.jsonl", rows)


def rounded(text):
    return (len(text) + 1 + ALIGN - 1) // ALIGN * ALIGN  # with the end-of-sequence token


@pytest.mark.parametrize("tail", ["all", "none", 2])
def test_a_pair_is_two_neighbouring_documents(tmp_path, source, rows, tail):
    """Odd segments are chosen answers, the next even ones the rejected answers to the same prompt."""
    tokenizer = byte_tokenizer(EOS)
    dataset = pack_preference(source, tokenizer, str(tmp_path / "out"), LENGTH, tail=tail, block_align=ALIGN)
    found, tokens, supervised = [], 0, 0
    for row in read_back(tmp_path / "out"):
        assert row.segment_ids.max() == len(row.sources) and len(row.sources) % 2 == 0
        assert row.sources[::2] == row.sources[1::2]
        end, documents = 0, []
        for segment in range(1, row.segment_ids.max() + 1):
            (positions,) = np.nonzero(row.segment_ids == segment)
            assert positions[0] == end and positions.tolist() == [*range(positions[0], positions[-1] + 1)]
            end = -(-(positions[-1] + 1) // ALIGN) * ALIGN
            text = tokenizer.decode(row.ids[positions], skip_special_tokens=True)
            prompt, answer = text[: text.index("?") + 1], text[text.index("?") + 1 :]
            first = positions[0] + len(prompt)
            last = min(end, positions[0] + len(text) + 1 + {"all": end, "none": 0}.get(tail, tail))
            assert np.flatnonzero(row.supervised & (row.segment_ids == segment)).tolist() == [*range(first, last)]
            assert (row.ids[positions[0] + len(text) : end] == EOS).all()
            documents.append((prompt, answer))
        for (prompt, chosen), (same, rejected) in zip(documents[::2], documents[1::2], strict=True):
            assert prompt == same
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        tokens += (row.segment_ids > 0).sum()
        supervised += row.supervised.sum()
    usable = [
        row
        for row in rows
        if row["chosen"] != row["rejected"] and row["rejected"]
        if sum(rounded(row["prompt"] + row[name]) for name in ("chosen", "rejected")) <= LENGTH
    ]

    def number(row):
        return int(row["prompt"][:-1])

    assert sorted(found, key=number) == usable
    unusable = {"no response": 1, "identical answers": 1, "too long": len(rows) - 2 - len(usable), "malformed": 0}
    assert dataset["unusable"] == unusable and unusable["too long"] > 5
    assert (dataset["kind"], dataset["pairs"], dataset["used"]) == ("preference", len(rows), len(usable))
    assert dataset["documents"] == 2 * len(usable)
    assert (dataset["tokens"], dataset["supervised_tokens"]) == (tokens, supervised)


def test_a_row_holds_at_most_max_pairs(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(9)])
    for max_pairs, documents in ((1, [2] * 9), (3, [6] * 3), (16, [8, 8, 2])):
        out = tmp_path / str(max_pairs)
        dataset = pack_preference(source, byte_tokenizer(EOS), str(out), LENGTH, max_pairs=max_pairs, block_align=ALIGN)
        assert [len(row.sources) for row in read_back(out)] == documents and dataset["max_pairs"] == max_pairs
    with pytest.raises(InputError, match="max_pairs 0 must be at least 1"):
        pack_preference(source, byte_tokenizer(EOS), str(tmp_path / "out"), LENGTH, max_pairs=0)


def test_every_format_packs_to_the_same_rows(tmp_path):
    tokenizer = with_template(CHATML)
    rows = [{"prompt": [message("user", "a")], "chosen": [message("assistant", "b" * i)],
             "rejected": [message("assistant", "c")]} for i in range(1, 8)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    sources = [
        write_rows(tmp_path / "a.jsonl", rows),
        tmp_path / "a.parquet",
        write_saved_dataset(tmp_path / "s", rows),
    ]
    packed = []
    for i, source in enumerate(sources):
        pack_preference(str(source), tokenizer, str(tmp_path / str(i)), 128, block_align=ALIGN)
        packed.append([(row.ids.tolist(), row.supervised.tolist()) for row in read_back(tmp_path / str(i))])
    assert packed[0] == packed[1] == packed[2]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, source, monkeypatch):
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 5)

    def run(out):
        pack_preference(source, byte_tokenizer(EOS), str(out), LENGTH, block_align=ALIGN, rows_per_shard=9)

    kills = kill_everywhere(run, tmp_path, monkeypatch)
    assert kills >= 4 * len(json.loads((tmp_path / "whole" / "dataset.json").read_text())["shards"]) >= 8


def test_malformed_pairs_stop_with_their_place_or_are_counted(tmp_path, source):
    with open(source, "a") as stream:
        stream.write('{"prompt": "a", "chosen": "b"}\n')
    arguments = (source, byte_tokenizer(EOS), str(tmp_path / "out"), LENGTH)
    with pytest.raises(InputError, match=f"{source}:63: rejected is missing"):
        pack_preference(*arguments)
    assert not (tmp_path / "out").exists()
    assert pack_preference(*arguments, skip_malformed=True)["unusable"]["malformed"] == 1


def test_nothing_usable_is_an_error(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2)
    with pytest.raises(InputError, match=r"none of 2 pairs is usable \(identical answers: 2\)"):
        pack_preference(source, byte_tokenizer(EOS), str(tmp_path / "out"), LENGTH)


def test_the_tool_packs_pairs_and_reports_the_unusable(tmp_path, source, rows):
    flag_values = {"kind": "preference", "source": source, "out": tmp_path / "out", "length": LENGTH}
    flag_values |= {"tokenizer": write_tokenizer(tmp_path / "tokenizer", byte_tokenizer(EOS))}
    result = run_tool(**flag_values, block_align=ALIGN, max_pairs=2)
    assert result.returncode == 0, result.stderr
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (dataset["kind"], dataset["max_pairs"], dataset["block_align"]) == ("preference", 2, ALIGN)
    assert result.stdout.splitlines()[-1].endswith(
        f", {dataset['used']} of {len(rows)} pairs used (unusable: 1 no response, 1 identical answers, "
        f"{dataset['unusable']['too long']} too long, 0 malformed)"
    )
    result = run_tool(**flag_values, turns="all")
    assert result.returncode == 2 and result.stderr == "error: --turns is for --kind=chat\n"
