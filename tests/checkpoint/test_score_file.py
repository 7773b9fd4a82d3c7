"""The file of scores: what survives a kill, and what is refused."""

import numpy as np
import pytest

from llada_jax.checkpoint.score_file import ScoreFile
from llada_jax.errors import InputError

DEPENDS = {"config.seed": 0, "schedule": [[4, 10, "both"]]}
VALUES = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)


def open_file(tmp_path, **changes):
    return ScoreFile(tmp_path / "scores.bin", DEPENDS | changes, (3, 2), 5)


def filled(tmp_path, count=5):
    file = open_file(tmp_path)
    for values in VALUES[:count]:
        file.append(values)
    return file


def test_what_was_appended_is_read_back(tmp_path):
    assert open_file(tmp_path).stored == 0 and len(open_file(tmp_path).read()) == 0
    assert filled(tmp_path).complete
    again = open_file(tmp_path)
    assert again.complete and again.stored == 5 and np.array_equal(again.read(), VALUES)


@pytest.mark.parametrize("cut", [1, 4, 27, 28])
def test_a_torn_record_is_cut_off_and_written_again(tmp_path, cut):
    filled(tmp_path, 3)
    path = tmp_path / "scores.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    again = open_file(tmp_path)
    assert again.stored == 2 and not again.complete
    for values in VALUES[2:]:
        again.append(values)
    assert np.array_equal(open_file(tmp_path).read(), VALUES)


def test_a_flipped_bit_costs_the_records_from_there_on(tmp_path):
    filled(tmp_path)
    path = tmp_path / "scores.bin"
    data = bytearray(path.read_bytes())
    data[-2 * 28 - 9] ^= 1  # a record is 3 x 2 x 4 bytes and 4 of CRC-32
    path.write_bytes(data)
    assert open_file(tmp_path).stored == 2


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"config.seed": 1}, "scored with config.seed=0, this run has 1; remove the file"),
        ({"schedule": [[4, 20, "both"]]}, r"schedule=\[\[4, 10, 'both'\]\], this run has"),
        ({"new": 1}, "scored with new=None, this run has 1"),
    ],
)
def test_scores_of_other_settings_are_refused_by_name(tmp_path, changes, message):
    filled(tmp_path, 1)
    with pytest.raises(InputError, match=message):
        open_file(tmp_path, **changes)
    assert open_file(tmp_path).stored == 1


def test_what_may_be_replaced_begins_anew_and_says_why(tmp_path, capsys):
    filled(tmp_path)
    anew = ScoreFile(tmp_path / "scores.bin", DEPENDS | {"config.seed": 1}, (3, 2), 5, replace=True)
    assert anew.stored == 0 and "scored with config.seed=0, this run has 1: scoring again\n" in capsys.readouterr().out
    anew.append(VALUES[0])
    assert ScoreFile(tmp_path / "scores.bin", DEPENDS | {"config.seed": 1}, (3, 2), 5, replace=True).stored == 1
    (tmp_path / "scores.bin").write_bytes(b"not json\n")
    assert ScoreFile(tmp_path / "scores.bin", DEPENDS, (3, 2), 5, replace=True).stored == 0


@pytest.mark.parametrize("content", [b"", b"not json\n", b"[1]\n", b"\xff\xfe"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "scores.bin").write_bytes(content)
    with pytest.raises(InputError, match="scores.bin: .*remove"):
        open_file(tmp_path)
    with pytest.raises(InputError, match="of another format"):
        (tmp_path / "scores.bin").unlink()
        filled(tmp_path)
        ScoreFile(tmp_path / "scores.bin", DEPENDS, (3, 4), 5)


def test_processes_that_follow_count_and_read_what_one_writes(tmp_path):
    path, record = tmp_path / "scores.bin", np.arange(4, dtype=np.float32).reshape(2, 2)
    ScoreFile(path, {"seed": 0}, (2, 2), 3).append(record)
    with open(path, "ab") as file:
        file.write(b"half a record")  # of the process that writes, at this moment
    size = path.stat().st_size
    follower = ScoreFile(path, {"seed": 0}, (2, 2), 3, writes=False)
    follower.append(record + 1)
    assert path.stat().st_size == size and follower.stored == 2
    writer = ScoreFile(path, {"seed": 0}, (2, 2), 3)
    assert writer.stored == 1
    writer.append(record + 1)
    np.testing.assert_array_equal(follower.read(), np.stack([record, record + 1]))
