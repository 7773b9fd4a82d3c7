"""The table of tile sizes."""

import dataclasses

import pytest

from llada_jax.attention.tiles import ENTRIES, SHAPES, TABLE, TileEntry, cut, read_table, tiles_for, write_table
from llada_jax.chips import CHIPS
from llada_jax.errors import InputError


def test_table_has_every_chip_head_size_and_kind_of_row():
    kinds = {chip.device_kind for chip in CHIPS.values()}
    assert set(ENTRIES) == {(kind, head_dim, shape) for kind in kinds for head_dim in (64, 128) for shape in SHAPES}


def test_table_is_as_the_tool_writes_it(tmp_path):
    write_table(read_table(), tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == TABLE.read_text()


@pytest.mark.parametrize(
    "group,queries,expected", [(4, 8192, 128), (8, 8192, 64), (1, 8192, 512), (3, 300, 128), (4, 20, 32)]
)
def test_tiles_fill_the_rows(group, queries, expected):
    assert (
        cut(TileEntry("", 128, "row", rows=512, forward=4, backward=2, chunk=128), group, queries).queries == expected
    )


def test_a_block_against_a_cache_has_an_entry_of_its_own(monkeypatch):
    key = ("TPU v5", 128, "decode")
    monkeypatch.setitem(ENTRIES, key, dataclasses.replace(ENTRIES[key], forward=16))
    assert tiles_for("TPU v5", 128, 4, 32).forward == 16 != tiles_for("TPU v5", 128, 4, 65).forward


def test_unknown_devices_and_head_dims_are_refused():
    for kind, head_dim in (("cpu", 128), ("TPU v5", 80)):
        with pytest.raises(InputError, match=f"{kind} with head_dim {head_dim}.*blockwise"):
            tiles_for(kind, head_dim, 4, 512)
