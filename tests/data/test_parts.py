"""Parts of a source, and the processes that read them: nothing is lost, doubled or reordered."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import pack, parts, sources, text
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError
from tests.helpers.data_helpers import (
    CHATML,
    ROOT,
    contents,
    message,
    run_tool,
    with_template,
    write_rows,
    write_saved_dataset,
    write_tokenizer,
)
from tests.helpers.waiting import wait_until

LENGTH = 64


@pytest.fixture
def source(tmp_path):
    """Every format, files larger and smaller than a part of 1000 bytes, an empty one, blank lines."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [{"text": f"{i} " * (i % 50)} for i in range(120)]
    for i in range(5):
        (folder / f"a{i}.txt").write_text("short " * i)
    (folder / "b.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=7)
    (folder / "d.txt").write_text("long " * 1000)
    (folder / "e.jsonl").write_text("")
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "_PART_BYTES", 1000)


def test_parts_cover_the_source_once_and_begin_at_documents(tmp_path, source, small_parts):
    saved = write_saved_dataset(tmp_path / "saved", [{"text": "x" * 900}] * 7, [{"text": "y"}] * 4)
    for files in (sources.list_files(str(source)), sources.list_files(saved)):
        documents = list(text.iter_documents(files))
        for first in (0, 3, len(documents) // 2, len(documents) - 1):
            start = documents[first][:2]
            found = list(parts.split(files, start))
            assert found[0][0] == start and found[-1][1] == (len(files), 0)
            assert [stop for _, stop in found[:-1]] == [begin for begin, _ in found[1:]]
            read = [list(text.iter_documents(files, "text", *part)) for part in found]
            assert sum(read, []) == documents[first:]
            assert all(part[0][:2] >= begin for part, (begin, _) in zip(read, found, strict=True) if part)
    assert len(list(parts.split(sources.list_files(str(source)), (0, 0)))) > 10


def test_many_small_files_share_a_part(source):
    assert list(parts.split(sources.list_files(str(source)), (0, 0))) == [((0, 0), (9, 0))]


def test_processes_give_what_one_gives(source, small_parts):
    files = sources.list_files(str(source))
    read = functools.partial(text.iter_documents, files, "text")
    expected = list(text.iter_documents(files))
    for processes in (1, 3):
        assert list(parts.read_parts(read, files, (0, 0), processes)) == expected
    some = parts.read_parts(read, files, (0, 0), 2)
    assert [next(some) for _ in range(9)] == expected[:9]
    some.close()
    with pytest.raises(InputError, match="processes 0"):
        list(parts.read_parts(read, files, (0, 0), 0))


def test_bad_input_is_raised_in_its_place(source, small_parts):
    lines = (source / "b.jsonl").read_text().splitlines()
    (source / "b.jsonl").write_text("\n".join([*lines[:100], "broken", *lines[100:]]))
    files = sources.list_files(str(source))
    read = parts.read_parts(functools.partial(text.iter_documents, files, "text"), files, (0, 0), 2)
    seen = []
    with pytest.raises(InputError, match=r"b\.jsonl:101: malformed JSON"):
        for document in read:
            seen.append(document)
    assert 20 < len(seen) <= 55


def test_an_unreadable_table_is_named_by_who_reads_it(source, small_parts):
    (source / "c.parquet").write_bytes(b"PAR1 not really")
    files = sources.list_files(str(source))
    with pytest.raises(InputError, match=r"c\.parquet: unreadable parquet file"):
        list(parts.read_parts(functools.partial(text.iter_documents, files, "text"), files, (0, 0)))


def die(start, stop):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_an_error(source):
    with pytest.raises(InputError, match=r"exit code -9 .*goes on from the last whole shard"):
        list(parts.read_parts(die, sources.list_files(str(source)), (0, 0), 2))


def test_any_number_of_processes_packs_the_same_bytes(tmp_path, source, small_parts):
    tokenizer = byte_tokenizer(256)
    for processes in (1, 2):
        out = str(tmp_path / f"text{processes}")
        pack.pack(str(source), tokenizer, out, LENGTH, rows_per_shard=40, processes=processes)
    assert contents(tmp_path / "text1") == contents(tmp_path / "text2")
    assert len(contents(tmp_path / "text1")) > 5
    chats = [
        {"messages": [message("user", "?" * (i % 9)), message("assistant", "a" * (i * 7 % 90))]} for i in range(150)
    ]
    rows = write_rows(tmp_path / "chats.jsonl", [*chats[:80], {"messages": 3}, *chats[80:]])
    for processes in (1, 2):
        out = str(tmp_path / f"chat{processes}")
        pack_chat(
            rows, with_template(CHATML), out, 128, rows_per_shard=16, skip_malformed=True, processes=processes
        )  # fmt: skip
    assert contents(tmp_path / "chat1") == contents(tmp_path / "chat2")
    assert json.loads((tmp_path / "chat1" / "dataset.json").read_text())["unusable"]["malformed"] == 1


def alive_in(group):
    """Number of processes in a process group that are not zombies."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        count += int(of) == group and state != "Z"
    return count


# A script that packs, and stands still in the fourth shard of 2048 rows.
HELD = """
import itertools, runpy, sys, time
from llada_jax.data import pack
advance, rows = pack._advance, itertools.count()
def held(*arguments):
    if next(rows) == 3 * 2048 + 100:
        time.sleep(600)
    return advance(*arguments)
pack._advance = held
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_in_the_middle_and_started_again_with_other_processes(tmp_path):
    """kill -9 of the packing process ends its readers too; the next run ends in the bytes of an uninterrupted one."""
    rows = [{"text": "some words of text " * (i % 40)} for i in range(24_000)]
    source = write_rows(tmp_path / "rows.jsonl", rows)  # 9 MB: two parts
    tokenizer = byte_tokenizer(256)
    expected = pack.pack(source, tokenizer, str(tmp_path / "whole"), 512, rows_per_shard=2048)
    assert len(expected["shards"]) >= 8
    out = tmp_path / "out"
    flags = dict(
        source=source,
        tokenizer=write_tokenizer(tmp_path / "tokenizer", tokenizer),
        out=out,
        length=512,
        rows_per_shard=2048,
    )
    command = [sys.executable, "-c", HELD, str(ROOT / "tools" / "pack_data.py"), "--processes=2"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    packing = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: (out / "rows-00003.array_record.tmp").exists() or packing.poll() is not None)
    assert alive_in(packing.pid) >= 3
    packing.kill()
    packing.wait()
    wait_until(lambda: not alive_in(packing.pid))
    assert (out / "progress.json").exists() and not (out / "dataset.json").exists()
    assert run_tool(**flags, processes=3).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
