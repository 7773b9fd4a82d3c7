import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.attention import visibility
from llada_jax.data import chat, pack, records, sources
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError
from llada_jax.tokenizer import from_files
from tests.helpers.data_helpers import (
    CHATML,
    EOS,
    kill_everywhere,
    message,
    read_back,
    run_tool,
    with_template,
    write_rows,
    write_tokenizer,
)

REJECTS = "{{ raise_exception('no') }}"


def test_malformed_rows_name_file_and_line_or_are_counted(tmp_path):
    tokenizer, file = with_template(CHATML), tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"})
    malformed = ["{", '{"messages": [{"role": "human"}]}', '{"input_ids": [1]}']
    for line in malformed:
        file.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(InputError, match=f"^{file}:3: "):
            pack_chat(str(file), tokenizer, str(tmp_path / "out"), 64)
        assert not (tmp_path / "out").exists()
    file.write_text("".join(f"{line}\n{good}\n" for line in malformed))
    dataset = pack_chat(str(file), tokenizer, str(tmp_path / "out"), 64, skip_malformed=True)
    assert dataset["unusable"] == {"no response": 0, "too long": 0, "malformed": 3}
    assert dataset["used"] == dataset["documents"] == 3 and dataset["conversations"] == 6


def test_what_the_template_cannot_do_is_never_skipped(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [message("user", "a"), message("assistant", "b")]}])
    with pytest.raises(InputError, match=f"{file}:1: .*has no chat template"):
        pack_chat(file, with_template(None), str(tmp_path / "out"), 64, skip_malformed=True)
    with pytest.raises(InputError, match=f"{file}:1: chat template: no"):
        pack_chat(file, with_template(REJECTS), str(tmp_path / "out"), 64)
    with pytest.raises(InputError, match=r"none of 1 conversations is usable \(malformed: 1\)"):
        pack_chat(file, with_template(REJECTS), str(tmp_path / "out"), 64, skip_malformed=True)


LENGTH, ALIGN = 64, 8


@pytest.fixture
def source(tmp_path):
    """Pairs and conversations of many lengths; some have no response, and some are longer than a row."""
    folder, random = tmp_path / "source", np.random.default_rng(0)
    folder.mkdir()
    lengths = [*range(1, 12), 55, 61, 62, 63, 64, *random.integers(1, 80, 60).tolist()]
    lines = [{"prompt": "p", "response": "é" * (n // 2) + "r" * (n % 2)} for n in lengths]
    lines[5:5] = [{"prompt": "p", "response": ""}, {"messages": [message("user", "a"), message("assistant", "b")]}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [[1, 2, 3, 4], [5] * LENGTH, [6] * (LENGTH + 1), [7]]
    table = {"input_ids": ids, "prompt_lengths": [1, LENGTH - 1, 0, 1], "ignored": ["x"] * 4}
    pq.write_table(pa.table(table), folder / "b.parquet", row_group_size=2)
    return folder


def with_end(conversation):
    *spans, (first, last) = conversation.spans
    return chat.Conversation(np.append(conversation.ids, EOS).astype(np.int32), [*spans, (first, last + 1)])


def expected(source, tokenizer):
    """{source: conversation} of those that are usable, each with its end, and the counts of the others."""
    used, unusable = {}, {"no response": 0, "too long": 0, "malformed": 0}
    files = sources.list_files(str(source), sources.ROW_SUFFIXES)
    for file, offset, row in records.read_rows(files, chat.COLUMNS):
        found = chat.tokenise(chat.prepare(records.parse_row(row), tokenizer), tokenizer)
        conversation = found[0] if found else None
        cut = conversation is not None and conversation.given and len(conversation.ids) == LENGTH
        if conversation is not None and conversation.ids[-1] != EOS and not cut:
            conversation = with_end(conversation)
        if conversation is None or len(conversation.ids) > LENGTH:
            unusable["no response" if conversation is None else "too long"] += 1
        else:
            used[file, offset] = conversation
    return used, unusable


@pytest.mark.parametrize("tail", ["all", "none", 0, 3])
def test_conversations_are_packed_whole_with_their_tails(tmp_path, source, tail):
    tokenizer = with_template(CHATML)
    arguments = {"tail": tail, "block_align": ALIGN, "rows_per_shard": 9}
    dataset = pack_chat(str(source), tokenizer, str(tmp_path / "out"), LENGTH, **arguments)
    used, unusable = expected(source, tokenizer)
    found = {}
    rows = read_back(tmp_path / "out")
    for row in rows:
        assert row.ids.shape == (LENGTH,) and row.segment_ids.max() == len(row.sources)
        for segment, origin in enumerate(row.sources, 1):
            assert origin not in found
            positions = np.flatnonzero(row.segment_ids == segment)
            conversation = used[origin]
            count = len(conversation.ids)
            rounded = count + -count % ALIGN
            assert positions[0] % ALIGN == 0
            assert positions.tolist() == list(
                range(positions[0], positions[0] + (count if tail == "none" else rounded))
            )
            ids, supervised = (x[positions[0] : positions[0] + rounded] for x in (row.ids, row.supervised))
            assert ids[:count].tolist() == conversation.ids.tolist() and (ids[count:] == EOS).all()
            tail_supervised = {"all": rounded, "none": 0}.get(tail, tail)
            spans = [*conversation.spans, (count, min(rounded, count + tail_supervised))]
            assert np.flatnonzero(supervised).tolist() == [i for span in spans for i in range(*span)]
            found[origin] = True
        assert not row.supervised[row.segment_ids == 0].any() and (row.ids[row.segment_ids == 0] == EOS).all()
    assert found.keys() == used.keys()
    assert dataset["unusable"] == unusable and min(unusable["no response"], unusable["too long"]) >= 2
    assert dataset["used"] == dataset["documents"] == len(used) == dataset["conversations"] - sum(unusable.values())
    assert dataset["tokens"] == sum((row.segment_ids > 0).sum() for row in rows)
    assert dataset["supervised_tokens"] == sum(row.supervised.sum() for row in rows)
    assert [count for _, count in dataset["shards"]][:-1] == [9] * (len(dataset["shards"]) - 1)
    if tail == "all":  # rows are well filled
        assert dataset["rows"] <= 1.25 * dataset["tokens"] / LENGTH


@pytest.mark.parametrize("tail", ["all", "none", 0, 2])
@pytest.mark.parametrize("shape", ["messages", "completion", "input_ids"])
def test_every_answer_ends_in_a_supervised_end_of_sequence(tmp_path, shape, tail):
    """Of every length around that of a block, whatever the form, the marker of the template, and the tail."""
    tokenizer = with_template(CHATML)
    made = {
        "messages": lambda n: {"messages": [message("user", "a"), message("assistant", "x" * n)]},
        "completion": lambda n: {"prompt": "a", "completion": "x" * n},
        "input_ids": lambda n: {"input_ids": [1] * (n + 1), "labels": [-100] + [1] * n},
    }
    lines = [made[shape](n) for n in range(1, 2 * ALIGN + 2)]
    out = tmp_path / "out"
    pack_chat(write_rows(tmp_path / "a.jsonl", lines), tokenizer, str(out), 2 * LENGTH, tail=tail, block_align=ALIGN)
    lengths = set()
    for row in read_back(out):
        for segment in range(1, len(row.sources) + 1):
            at = row.segment_ids == segment
            ids, supervised = row.ids[at], row.supervised[at]
            end = int(np.argmax(ids == EOS))
            lengths.add(end % ALIGN)
            assert ids[end] == EOS and supervised[end] and supervised[end - 1] and (ids[end:] == EOS).all()
            after = {"all": len(ids), "none": 0}.get(tail, tail)
            assert supervised[end + 1 :].sum() == min(len(ids) - end - 1, after)
    assert lengths == set(range(ALIGN))


def test_a_marker_that_is_an_end_of_sequence_gets_no_other(tmp_path):
    """As Llama 3's: one of the ids that generation_config.json names."""
    tokenizer = with_template("{% for m in messages %}{{ m.content + '\x01' }}{% endfor %}")
    files = tokenizer.files | {"generation_config.json": json.dumps({"eos_token_id": [1, EOS]}).encode()}
    row = {"messages": [message("user", "a"), message("assistant", "x" * 5)]}
    file = write_rows(tmp_path / "a.jsonl", [row])
    for given, tokens in ((files, ALIGN), (tokenizer.files, 2 * ALIGN)):
        dataset = pack_chat(file, from_files(given), str(tmp_path / str(tokens)), LENGTH, block_align=ALIGN)
        assert dataset["tokens"] == tokens


def test_at_most_sixteen_rows_are_open(tmp_path):
    """Conversations of 5 blocks of 8 go to rows of their own; those of 3 fill the rows that are still open."""
    tokenizer, file = byte_tokenizer(EOS), tmp_path / "a.jsonl"
    lines = [{"input_ids": [i] * (39 if i < 18 else 23), "prompt_length": 1} for i in range(36)]  # and their ends
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pack_chat(str(file), tokenizer, str(tmp_path / "out"), LENGTH, block_align=ALIGN)
    first_tokens = [row.ids[[0, 40]].tolist() for row in read_back(tmp_path / "out")]
    assert first_tokens == [[0, EOS], [1, EOS], *([i, 16 + i] for i in range(2, 18)), [34, 35]]


@pytest.mark.parametrize(("turns", "rows_per_shard"), [("all", 4), ("all", 20), ("each", 4)])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, source, monkeypatch, turns, rows_per_shard):
    tokenizer = with_template(CHATML)
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 5)
    if turns == "each":  # shards end between two documents of one conversation
        source = write_rows(tmp_path / "c.jsonl", [{"input_ids": [*range(33)], "supervised": [0, 0, 1] * 11}] * 3)

    def run(out):
        pack_chat(
            str(source), tokenizer, str(out), LENGTH, turns=turns, block_align=ALIGN, rows_per_shard=rows_per_shard
        )

    kills = kill_everywhere(run, tmp_path, monkeypatch)
    dataset = json.loads((tmp_path / "whole" / "dataset.json").read_text())
    assert kills >= 4 * len(dataset["shards"]) >= 8
    if turns == "each":
        rows = read_back(tmp_path / "whole")
        assert {*rows[rows_per_shard - 1].sources} & {*rows[rows_per_shard].sources}


def test_settings_are_checked(tmp_path, source):
    tokenizer = with_template(CHATML)
    arguments = {"source": str(source), "tokenizer": tokenizer, "out": str(tmp_path / "out"), "length": LENGTH}
    dataset = pack_chat(**arguments)
    assert pack_chat(**arguments) == json.loads(json.dumps(dataset))
    for changes, reason in (
        ({"turns": "last"}, "turns is 'all' there but 'last' now"),
        ({"tail": 3}, "tail is 'all' there but 3 now"),
        ({"skip_malformed": True}, "skip_malformed is False there but True now"),
        ({"turns": "first"}, "turns 'first' is none of all, last, each"),
        ({"tail": "some"}, "tail 'some'"),
        ({"tail": -1}, "tail -1"),
        ({"block_align": 48}, "block_align 48 must"),
        ({"tokenizer": dataclasses.replace(tokenizer, special_tokens={})}, "no end-of-sequence token"),
    ):
        with pytest.raises(InputError) as caught:
            pack_chat(**(arguments | changes))
        assert reason in str(caught.value)
    with pytest.raises(InputError, match="field is None there but 'text' now"):
        pack.pack(str(source / "a.jsonl"), tokenizer, str(tmp_path / "out"), LENGTH, block_align=32)
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(InputError, match="c.jsonl: empty dataset, no conversation"):
        pack_chat(str(tmp_path / "c.jsonl"), tokenizer, str(tmp_path / "new"), LENGTH)
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(InputError, match="d.txt: empty dataset, no file matches"):
        pack_chat(str(tmp_path / "d.txt"), tokenizer, str(tmp_path / "new"), LENGTH)


@pytest.mark.parametrize("turns", ["all", "each", "last"])
def test_only_with_turns_all_an_answer_sees_the_next_turn(tmp_path, turns):
    """Turn number k is a run of the letter number k, so a letter later than a query's own comes from the future."""
    turns_of = [message(("user", "assistant")[k % 2], chr(ord("a") + k) * 5) for k in range(6)]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = write_rows(tmp_path / "a.jsonl", [{"messages": turns_of}])
    pack_chat(file, with_template(template), str(tmp_path / "out"), LENGTH, turns=turns, block_align=ALIGN)
    leaks, queries = 0, 0
    for row in read_back(tmp_path / "out"):
        view = visibility.block_diffusion(visibility.make_layout(row.segment_ids[None], ALIGN))
        answers = row.supervised & (row.ids != EOS)
        for query in np.flatnonzero(answers):
            clean = row.ids[int(view.clean_start[0, query]) : int(view.clean_end[0, query])]
            noisy = row.ids[int(view.noisy_start[0, query]) : int(view.noisy_end[0, query])]
            seen = np.concatenate([clean, noisy])
            leaks += (seen[seen != EOS] > row.ids[query]).any()
            queries += 1
    assert queries == (5 if turns == "last" else 15)
    assert (leaks > 0) == (turns == "all")


DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_a_templates_date_is_no_day_of_packing_but_a_setting(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [message("user", "a"), message("assistant", "b")]}])
    first = pack_chat(file, with_template(DATED), str(tmp_path / "first"), 128)
    assert first["template_date"] == "2024-07-26" and "26 Jul 2024" in text_of(tmp_path / "first")
    later = with_template(DATED).with_template_date("2031-01-02")
    assert pack_chat(file, later, str(tmp_path / "later"), 128)["template_date"] == "2031-01-02"
    assert "02 Jan 2031" in text_of(tmp_path / "later")
    with pytest.raises(InputError, match="template_date is '2024-07-26' there but '2031-01-02' now"):
        pack_chat(file, later, str(tmp_path / "first"), 128)
    assert "template_date" not in pack_chat(file, with_template(CHATML), str(tmp_path / "none"), 128)


def test_the_tool_takes_a_date(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": [message("user", "a")], "chosen": "b", "rejected": "c"}])
    flag_values = {"source": file, "out": tmp_path / "out", "length": 256, "kind": "preference"}
    flag_values |= {"tokenizer": write_tokenizer(tmp_path / "tokenizer", with_template(DATED))}
    result = run_tool(**flag_values, template_date="2031-01-02")
    assert result.returncode == 0 and "02 Jan 2031" in text_of(tmp_path / "out"), result.stderr
    for changes, reason in (
        ({"template_date": "today"}, "template_date 'today' is not a date, YYYY-MM-DD"),
        ({"kind": "text", "template_date": "2031-01-02"}, "--template_date is for --kind=chat or --kind=preference"),
    ):
        result = run_tool(**(flag_values | changes))
        assert result.returncode == 2 and reason in result.stderr
    with pytest.raises(InputError, match="template_date 2031-01-02: the chat template writes no date"):
        with_template(CHATML).with_template_date("2031-01-02")


def text_of(folder):
    return "".join(byte_tokenizer(EOS).decode(row.ids) for row in read_back(folder))


def test_the_tool_packs_conversations_and_reports_the_unusable(tmp_path, source):
    flag_values = {"source": source, "out": tmp_path / "out", "length": LENGTH, "kind": "chat"}
    flag_values |= {"tokenizer": write_tokenizer(tmp_path / "tokenizer", with_template(CHATML))}
    with (source / "a.jsonl").open("a") as stream:
        stream.write("broken\n")
    result = run_tool(**flag_values)
    line = (source / "a.jsonl").read_bytes().count(b"\n")
    assert result.returncode == 2
    assert result.stderr == f"error: {source / 'a.jsonl'}:{line}: malformed JSON (Expecting value)\n"
    result = run_tool(**flag_values, skip_malformed=None, tail=2, turns="last", block_align=8)
    assert result.returncode == 0, result.stderr
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (dataset["tail"], dataset["turns"], dataset["block_align"]) == (2, "last", 8)
    used, unusable = dataset["used"], dataset["unusable"]
    summary = result.stdout.splitlines()[-1]
    assert summary.startswith(f"{dataset['rows']} rows, {dataset['tokens']} tokens, {used} documents, 1 shards, ")
    assert summary.endswith(
        f", {dataset['supervised_tokens']} supervised tokens, {used} of {dataset['conversations']} conversations used "
        f"(unusable: {unusable['no response']} no response, {unusable['too long']} too long, 1 malformed)"
    )


def test_the_tool_refuses_flags_of_the_other_kind(tmp_path, source):
    flag_values = {"source": source, "out": tmp_path / "out", "length": LENGTH}
    flag_values |= {"tokenizer": write_tokenizer(tmp_path / "tokenizer", with_template(CHATML))}
    for extra, reason in (
        ({"turns": "last"}, "--turns is for --kind=chat"),
        ({"tail": "all"}, "--tail is for --kind=chat or --kind=preference"),
        ({"kind": "chat", "tail": "x"}, "tail 'x'"),
    ):
        result = run_tool(**flag_values, **extra)
        assert result.returncode == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
