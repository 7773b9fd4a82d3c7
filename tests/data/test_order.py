import json
import threading
import types

import numpy as np
import pytest

from llada_jax.data import order, pack
from llada_jax.errors import InputError
from tests.helpers.data_helpers import numbers_tokenizer

LENGTH = 8
COUNT = 50


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """COUNT rows in shards of 20; row i holds the numbers from i * LENGTH."""
    folder = tmp_path_factory.mktemp("order")
    (folder / "source").mkdir()
    (folder / "source" / "a.txt").write_text("numbers")
    tokenizer = numbers_tokenizer(list(range(COUNT * LENGTH)))
    pack.pack(str(folder / "source"), tokenizer, str(folder / "out"), LENGTH, rows_per_shard=20)
    return folder / "out"


def row_ids(rows, count):
    return [rows.at(n)[1] for n in range(count)]


def test_every_epoch_is_a_different_permutation(packed):
    rows = order.Rows(str(packed), seed=3)
    assert len(rows) == COUNT and rows.length == LENGTH
    epochs = np.array(row_ids(rows, 5 * COUNT)).reshape(5, COUNT)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(COUNT), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [rows.at(n)[2] for n in (0, COUNT - 1, COUNT, 7 * COUNT + 1)] == [0, 0, 1, 7]
    # A pure function of seed and n: another instance, another order of calls.
    again = order.Rows(str(packed), seed=3)
    assert [again.at(n)[1] for n in reversed(range(5 * COUNT))] == epochs.ravel().tolist()[::-1]
    # Seed s in epoch e is no other seed's other epoch.
    others = [row_ids(order.Rows(str(packed), seed=seed), COUNT) for seed in (2, 4, 5, 2**40)]
    assert len({tuple(ids) for ids in [*epochs, *others]}) == 9


def test_at_returns_the_stored_row(packed):
    rows = order.Rows(str(packed), seed=0)
    for n in (0, 1, 49, 50, 1234):
        row, row_id, _ = rows.at(n)
        assert row.ids.tolist() == list(range(row_id * LENGTH, (row_id + 1) * LENGTH))


def test_ranges_part_training_from_evaluation(packed):
    training = order.Rows(str(packed), seed=0, stop=COUNT - 10)
    held_out = order.Rows(str(packed), seed=0, start=COUNT - 10, shuffle=False)
    assert sorted(row_ids(training, len(training))) == list(range(40))
    assert row_ids(held_out, 12) == [*range(40, 50), 40, 41]


def test_batches_are_slices_of_the_order(packed):
    rows = order.Rows(str(packed), seed=1)
    for step, offset in ((0, 0), (5, 0), (20, 7)):
        batch = rows.batch(step, 6, offset=offset)
        expected = [rows.at(offset + 6 * step + i) for i in range(6)]
        assert batch.row_ids.tolist() == [row_id for _, row_id, _ in expected]
        assert batch.epochs.tolist() == [epoch for *_, epoch in expected]
        for name in ("ids", "segment_ids", "supervised"):
            assert np.array_equal(getattr(batch, name), [getattr(row, name) for row, *_ in expected])
        assert batch.ids.shape == batch.segment_ids.shape == batch.supervised.shape == (6, LENGTH)
        types_found = [getattr(batch, name).dtype for name in ("ids", "segment_ids", "supervised", "row_ids", "epochs")]
        assert types_found == [np.int32, np.int32, bool, np.uint32, np.uint32]


def test_two_hosts_make_up_the_whole_batch(packed):
    whole = order.Rows(str(packed), seed=1).batch(9, 8)
    halves = [order.Rows(str(packed), seed=1).batch(9, 8, which=which) for which in (slice(0, 4), slice(4, 8))]
    picked = order.Rows(str(packed), seed=1).batch(9, 8, which=[6, 1])
    for name in ("ids", "segment_ids", "supervised", "row_ids", "epochs"):
        assert np.array_equal(np.concatenate([getattr(half, name) for half in halves]), getattr(whole, name))
        assert np.array_equal(getattr(picked, name), getattr(whole, name)[[6, 1]])
    nothing = order.Rows(str(packed), seed=1).batch(9, 8, which=slice(0, 0))
    assert nothing.ids.shape == (0, LENGTH)


@pytest.fixture
def prefetch_threads():
    """prefetch_threads(): those of this test."""
    before = threading.enumerate()
    return lambda: [each for each in threading.enumerate() if each.name.startswith("prefetch") and each not in before]


def test_prefetch_yields_the_steps_in_order(packed, prefetch_threads):
    rows = order.Rows(str(packed), seed=1)
    for first, last in ((0, 9), (4, 5), (3, 3)):
        steps = list(order.prefetch(rows, first, last, 4, offset=2, which=slice(1, 3)))
        assert [step for step, _ in steps] == list(range(first, last))
        for step, batch in steps:
            assert np.array_equal(batch.ids, rows.batch(step, 4, 2, slice(1, 3)).ids)
    assert not prefetch_threads()


def test_closing_prefetch_stops_its_thread(packed, prefetch_threads):
    rows = order.Rows(str(packed), seed=1)
    steps = order.prefetch(rows, 0, 10**9, 4)
    assert next(steps)[0] == 0
    assert prefetch_threads()
    steps.close()
    assert not prefetch_threads()


def test_prefetch_raises_in_the_consumer_at_the_step_that_failed(prefetch_threads):
    def batch(step, *_):
        if step == 3:
            raise InputError("step 3")
        return step

    seen = []
    with pytest.raises(InputError, match="step 3"):
        for step, _ in order.prefetch(types.SimpleNamespace(batch=batch), 0, 9, 1):
            seen.append(step)
    assert seen == [0, 1, 2]
    assert not prefetch_threads()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expected_length": 16}, "dataset.json: length is 8, not 16"),
        ({"start": 50}, "rows [50, 50) are empty or exceed the 50 stored rows"),
        ({"stop": 51}, "rows [0, 51) are empty or exceed the 50 stored rows"),
        ({"start": -1}, "rows [-1, 50) are empty"),
        ({"stop": 0}, "rows [0, 0) are empty"),
        ({"seed": -1}, "seed -1 must not be negative"),
    ],
)
def test_bad_arguments_are_named(packed, arguments, message):
    with pytest.raises(InputError) as caught:
        order.Rows(str(packed), **({"seed": 0} | arguments))
    assert message in str(caught.value)


def copied(packed, folder):
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_bad_datasets_are_named(packed, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        order.Rows(str(tmp_path / "nowhere"), seed=0)
    with pytest.raises(InputError, match=r"dataset\.json: missing, so the dataset is incomplete"):
        order.Rows(str(tmp_path), seed=0)
    folder = copied(packed, tmp_path)
    dataset = json.loads((folder / "dataset.json").read_text())
    for content, message in (
        ("{", "dataset.json: not readable as JSON"),
        ("{}", "dataset.json: format is not llada-jax-rows-1"),
        (json.dumps(dataset | {"shards": []}), "dataset.json: the dataset has no rows"),
    ):
        (folder / "dataset.json").write_text(content)
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            order.Rows(str(folder), seed=0)
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "rows-00001.array_record").unlink()
    with pytest.raises(InputError, match=r"rows-00001\.array_record: missing shard"):
        order.Rows(str(folder), seed=0)


def test_corrupt_records_are_named_by_shard_and_index(packed, tmp_path):
    folder = copied(packed, tmp_path)
    shard = folder / "rows-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:100])
    rows = order.Rows(str(folder), seed=0, shuffle=False)
    assert rows.at(19)[1] == 19
    with pytest.raises(InputError, match=r"rows-00001\.array_record: record 5 is corrupt"):
        rows.at(25)
    shard.write_bytes((packed / shard.name).read_bytes())
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dataset | {"length": LENGTH + 1}))
    with pytest.raises(InputError, match=r"rows-00000\.array_record: record 0 is corrupt \(8 tokens instead of 9\)"):
        order.Rows(str(folder), seed=0, shuffle=False).batch(0, 2)
