"""Datasets of very many shards, and shards with flipped bytes."""

import json
import os
import resource
import time

import numpy as np
import pytest

from llada_jax.data import pack
from llada_jax.data.order import Rows
from llada_jax.errors import InputError
from tests.helpers.data_helpers import numbers_tokenizer
from tests.helpers.waiting import open_files

LENGTH = 64
RECORDS_END = 5500  # about where the records of a shard end; its index is last, padding between


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """48 rows of random tokens in shards of 16."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.txt").write_text("numbers")
    ids = np.random.default_rng(0).integers(0, 50_000, 48 * LENGTH).tolist()
    tokenizer = numbers_tokenizer(ids)
    pack.pack(str(folder / "a.txt"), tokenizer, str(folder / "out"), LENGTH, rows_per_shard=16)
    return folder / "out"


@pytest.fixture
def damaged(packed, tmp_path):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def flip(path, position, bits=0xFF):
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def stored(rows):
    return [rows.at(n)[0].ids for n in range(len(rows))]


def repeated(packed, folder, copies):
    """A dataset of `copies` times the first shard, by links."""
    folder.mkdir()
    for i in range(copies):
        os.link(packed / "rows-00000.array_record", folder / f"rows-{i:05d}.array_record")
    dataset = json.loads((packed / "dataset.json").read_text())
    names = [[f"rows-{i:05d}.array_record", 16] for i in range(copies)]
    (folder / "dataset.json").write_text(json.dumps(dataset | {"shards": names, "rows": 16 * copies}))
    return folder


def test_ten_thousand_shards_open_fast_and_hold_few_files(packed, tmp_path, monkeypatch):
    folder = repeated(packed, tmp_path / "many", 10_000)
    begin = time.thread_time()  # of this thread: others may be running
    rows = Rows(str(folder), seed=0)
    seconds = time.thread_time() - begin
    one = Rows(str(packed), seed=0, shuffle=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (240, 240))
    for n in range(300):
        row, row_id, _ = rows.at(n)
        if n % 50 == 0:
            assert np.array_equal(row.ids, one.at(row_id % 16)[0].ids)
    assert 0 < len(open_files(folder)) + len(open_files(packed)) <= 120
    assert seconds < 2, "no shard may be opened, nor asked for one by one"


def test_opening_reads_no_shard(packed, tmp_path):
    """Neither records nor footers: files of the right names are enough until the first read."""
    (tmp_path / "rows-00000.array_record").write_bytes(b"")
    dataset = json.loads((packed / "dataset.json").read_text())
    dataset |= {"shards": [["rows-00000.array_record", 3_000_000_000]]}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    rows = Rows(str(tmp_path), seed=0)
    assert len(rows) == 3_000_000_000
    with pytest.raises(InputError, match=r"rows-00000\.array_record: record \d+ is corrupt"):
        rows.at(0)


@pytest.mark.parametrize("part", ["records", "index", "end"])
def test_a_flipped_byte_is_found_or_changes_nothing(packed, damaged, part):
    """Wherever it is: no crash, no wrong row, and the rows that are lost are counted."""
    shard = damaged / "rows-00001.array_record"
    size = shard.stat().st_size
    first, last = {"records": (0, RECORDS_END), "index": (RECORDS_END, size - 64), "end": (size - 64, size)}[part]
    expected, found = stored(Rows(str(packed), seed=0, shuffle=False)), 0
    for position in np.random.default_rng(1).integers(first, last, 25):
        shard.write_bytes((packed / shard.name).read_bytes())
        flip(shard, position)
        rows = Rows(str(damaged), seed=0, shuffle=False, corrupt_share=0.5)
        for n, ids in enumerate(stored(rows)):
            assert np.array_equal(ids, 0 * ids if n in rows.corrupt else expected[n])
        assert rows.corrupt <= set(range(16, 32))
        found += len(rows.corrupt)
    if part == "records":
        assert found >= 15


@pytest.fixture(scope="module")
def places(packed, tmp_path_factory):
    """{row: a byte of it in the second shard}, by trying."""
    folder = tmp_path_factory.mktemp("places")
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "rows-00001.array_record"
    found = {}
    for place in range(40, RECORDS_END, 200):
        flip(shard, place)
        rows = Rows(str(folder), seed=0, start=16, stop=32, shuffle=False, corrupt_share=0.9)
        stored(rows)
        found |= {row: place for row in rows.corrupt if len(rows.corrupt) == 1}
        flip(shard, place)
    return found


@pytest.fixture
def two_lost(damaged, places):
    """Rows 18 and 25 of the second shard have a flipped byte."""
    for row in (18, 25):
        flip(damaged / "rows-00001.array_record", places[row])
    return damaged


def test_corrupt_rows_are_padding_and_leave_the_others_where_they_are(packed, two_lost, capsys):
    good, rows = Rows(str(packed), seed=5), Rows(str(two_lost), seed=5, corrupt_share=0.05)
    capsys.readouterr()
    for step in range(18):  # three epochs
        expected, batch = good.batch(step, 8), rows.batch(step, 8)
        lost = np.isin(batch.row_ids, [18, 25])
        for name in ("row_ids", "epochs"):
            assert np.array_equal(getattr(batch, name), getattr(expected, name))
        for name in ("ids", "segment_ids", "supervised"):
            found = getattr(batch, name)
            assert np.array_equal(found[~lost], getattr(expected, name)[~lost]) and not found[lost].any()
        # The same rows whichever host reads them.
        part = Rows(str(two_lost), seed=5, corrupt_share=0.05).batch(step, 8, which=slice(3, 6))
        assert np.array_equal(part.ids, batch.ids[3:6])
    reported = {line for line in capsys.readouterr().err.splitlines()}
    assert rows.corrupt == {18, 25}
    for record in (2, 9):
        assert any(f"rows-00001.array_record: record {record} is corrupt (" in line for line in reported)
    assert any("skipped, 2 of 48 rows" in line for line in reported)


def test_more_than_the_share_is_an_error_that_names_the_record(two_lost):
    for share, allowed in ((0.0, 0), (1 / 48, 1)):
        rows = Rows(str(two_lost), seed=0, shuffle=False, corrupt_share=share)
        message = r"rows-00001\.array_record: record " + str((2, 9)[allowed]) + r" is corrupt \("
        with pytest.raises(InputError, match=message) as caught:
            stored(rows)
        assert ("the 2th of 48 rows: more than config.data.corrupt_share" in str(caught.value)) == bool(allowed)
    rows = Rows(str(two_lost), seed=0, shuffle=False, corrupt_share=2 / 48)
    stored(rows), stored(rows)  # met twice, counted once
    assert len(rows.corrupt) == 2


def test_a_shard_that_cannot_be_read_is_not_a_corrupt_record(damaged):
    rows = Rows(str(damaged), seed=0, corrupt_share=0.9)
    (damaged / "rows-00002.array_record").unlink()
    with pytest.raises(InputError, match=r"rows-00002\.array_record: No such file"):
        stored(rows)
    with pytest.raises(InputError, match=r"rows-00002\.array_record: missing shard"):
        Rows(str(damaged), seed=0, corrupt_share=0.9)


def test_a_shard_of_another_number_of_records_is_corrupt(damaged):
    shard = damaged / "rows-00001.array_record"
    dataset = json.loads((damaged / "dataset.json").read_text())
    dataset["shards"][1][1] = 15
    (damaged / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(
        InputError, match=f"{shard.name}: record 0 is corrupt .the shard holds 16 records instead of 15"
    ):
        stored(Rows(str(damaged), seed=0, shuffle=False))


def test_a_mended_shard_is_read_again(packed, damaged):
    shard = damaged / "rows-00000.array_record"
    rows = Rows(str(damaged), seed=0, shuffle=False)
    rows.at(3)
    shard.write_bytes(b"")
    with pytest.raises(InputError, match="record 5 is corrupt"):
        rows.at(5)
    shard.write_bytes((packed / shard.name).read_bytes())
    rows.at(5)
