"""The load test of the server: its clients, and its table."""

import pytest

from llada_jax.bench import clients, serve
from tests.serving.running import served, small_model


def test_clients_tell_what_requests_took():
    bodies = [{"model": "tiny", "prompt": "ab" * i, "max_tokens": 3 * i, "ignore_eos": True} for i in range(1, 5)]
    with served(small_model()) as server:
        asked, seconds = clients.ask_all(int(server.url.rpartition(":")[2]), bodies, 2)
    assert [each.tokens for each in asked] == [3, 6, 9, 12]
    assert all(0 < each.first_block < seconds for each in asked)


def test_the_table_has_both_throughputs(capsys):
    (row,) = serve.table("tiny", rows=2, count=4, at_once=2, rounds=1)
    assert row["alone"] > 0 and row["first_block_p50"] > 0
    assert row["ratio"] == pytest.approx(row["served"] / row["alone"])
    assert "4 requests, 2 rows, 2 clients" in capsys.readouterr().out
