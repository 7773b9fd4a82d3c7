"""Mixtures: shares that hold over every prefix, random access, epochs of each component, ids that never meet."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.data import mixture, pack
from llada_jax.data.mixture import Mixture, interleave, parse_mixture
from llada_jax.data.order import Rows, prefetch
from llada_jax.errors import InputError
from tests.helpers.data_helpers import numbers_tokenizer

LENGTH = 4
COUNTS = (7, 20, 11)  # rows of each component
SHARES = [share for _, share in parse_mixture("a:0.5,b:0.3,c:0.2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three datasets; row i of component c holds the number 1000 c + i."""
    root = tmp_path_factory.mktemp("mixture")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("numbers")
    for c, count in enumerate(COUNTS):
        ids = [1000 * c + i for i in range(count) for _ in range(LENGTH)]
        pack.pack(str(root / "text"), numbers_tokenizer(ids), str(root / f"{c}"), LENGTH, rows_per_shard=6)
    return [str(root / f"{c}") for c in range(len(COUNTS))]


def opened(folders, seed=0, held_out=0):
    rows = [
        Rows(path, mixture.component_seed(seed, c), stop=count - held_out)
        for c, (path, count) in enumerate(zip(folders, COUNTS, strict=True))
    ]
    return Mixture(rows, SHARES)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_shares_hold_within_one_row_over_every_prefix(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    component, earlier = interleave(shares)
    period = len(component)
    n = np.arange(1, period + 1)
    for c, share in enumerate(shares):
        so_far = np.cumsum(component == c)
        assert (abs(so_far * share.denominator - share.numerator * n) < share.denominator).all()
        assert so_far[-1] == share * period  # so periods follow each other without a drift
        assert np.array_equal(earlier[component == c], np.arange(so_far[-1]))


def test_rows_of_a_step_have_the_shares(folders):
    rows = opened(folders)
    assert len(rows) == sum(COUNTS) and rows.length == LENGTH
    for step in range(30):
        found = np.bincount(rows.batch(step, 10).ids[:, 0] // 1000, minlength=3)
        assert found.tolist() == [5, 3, 2]


def test_every_component_goes_through_its_own_epochs(folders):
    rows = opened(folders)
    seen = {c: [] for c in range(3)}
    for n in range(200):
        row, row_id, epoch = rows.at(n)
        c, i = divmod(int(row.ids[0]), 1000)
        assert row_id == sum(COUNTS[:c]) + i  # the stored index after the rows of the components before
        seen[c].append((epoch, i))
    for c, count in enumerate(COUNTS):
        epochs, order = np.array(seen[c]).T
        assert epochs.tolist() == [k // count for k in range(len(epochs))]
        whole = order[: len(order) // count * count].reshape(-1, count)
        assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(count), (len(whole), 1)))
        assert len({tuple(epoch) for epoch in whole}) == len(whole)  # permuted anew
    assert len(set(seen[0])) == len(seen[0])


def test_noise_keys_are_unique_per_component_row_and_epoch(folders):
    rows = opened(folders)
    keys = [rows.index(n) for n in range(500)]
    assert len(set(keys)) == 500


def test_a_pure_function_of_seed_step_and_offset_whatever_the_hosts(folders):
    rows, again = opened(folders, seed=3), opened(folders, seed=3)
    for step, offset in ((11, 0), (2, 5), (0, 93)):
        whole = rows.batch(step, 8, offset)
        assert np.array_equal(whole.row_ids, [again.index(offset + 8 * step + i)[0] for i in range(8)])
        parts = [again.batch(step, 8, offset, which) for which in (slice(0, 2), slice(2, 8))]
        for name in ("ids", "row_ids", "epochs"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    moved = [int(i) for _, batch in prefetch(rows, 3, 6, 4, offset=9) for i in batch.row_ids]
    assert moved == [rows.index(9 + n)[0] for n in range(12, 24)]
    assert [opened(folders, seed=4).index(n) for n in range(40)] != [rows.index(n) for n in range(40)]


def test_components_of_the_same_size_are_not_permuted_alike(folders):
    pair = [Rows(folders[1], mixture.component_seed(0, c)) for c in range(2)]
    assert [pair[0].index(n)[0] for n in range(20)] != [pair[1].index(n)[0] for n in range(20)]


def test_weights_are_divided_by_their_sum_exactly():
    assert parse_mixture("gs://b/x:3,/rows/b:1") == [("gs://b/x", Fraction(3, 4)), ("/rows/b", Fraction(1, 4))]
    assert parse_mixture("a:0.1, b:0.2") == [("a", Fraction(1, 3)), ("b", Fraction(2, 3))]


@pytest.mark.parametrize("text", ["a", "a:", ":1", "a:0", "a:-1", "a:x", "a:1,,b:1", "a:1,a:2", "a:nan", "a:1/0"])
def test_bad_mixtures_are_named(text):
    with pytest.raises(InputError, match="mixture: "):
        parse_mixture(text)


def test_weights_that_never_come_even_are_refused():
    with pytest.raises(InputError, match="common denominator 1000000007"):
        interleave([Fraction(1, 1_000_000_007), Fraction(1_000_000_006, 1_000_000_007)])


def test_rows_of_different_lengths_are_refused(folders, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    pack.pack(str(tmp_path / "a.txt"), numbers_tokenizer([1, 2]), str(tmp_path / "out"), 2)
    with pytest.raises(InputError, match="rows of 2, 4 tokens, expected one length"):
        Mixture([Rows(folders[0], 0), Rows(str(tmp_path / "out"), 0)], [Fraction(1, 2)] * 2)
