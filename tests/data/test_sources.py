import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import sources, text
from llada_jax.data.pack import pack
from llada_jax.errors import InputError
from tests.helpers.data_helpers import contents, run_tool, with_template, write_saved_dataset, write_tokenizer


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    (root / "b" / ".git").mkdir(parents=True)
    (root / "a.txt").write_text("text")
    (root / "b" / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (root / "b" / ".git" / "hidden.txt").write_text("hidden")
    (root / "b" / "code.py").write_text("print()\n")
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(700)]}), root / "d.parquet", row_group_size=300)
    (root / "ignored.bin").write_bytes(b"\xff")
    (root / "state.json").write_text("{}")  # of something else: a saved dataset has a dataset_info.json too
    return root


@pytest.fixture
def saved(tmp_path):
    """A DatasetDict of two splits."""
    folder = tmp_path / "saved"
    for split in ("train", "test"):
        write_saved_dataset(folder / split, [{"text": split}] * 4, [{"text": split}] * 2)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def names(*arguments, **options):
    return [(file.name, file.format) for file in sources.list_files(*arguments, **options)]


def test_a_folder_is_searched_in_sorted_order(corpus):
    files = [("a.txt", "text"), ("b/c.jsonl", "jsonl"), ("b/code.py", "text"), ("d.parquet", "parquet")]
    assert names(str(corpus), patterns=["*.py"]) == files
    assert names(str(corpus)) == [file for file in files if file[0] != "b/code.py"]
    assert names(str(corpus), sources.ROW_SUFFIXES) == [files[1], files[3]]


@pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.csv", "c/b.tsv", "b.jsonl.xz", "b.zip", "b.arrow", "b.parquet.gz"])
def test_data_that_cannot_be_read_is_an_error(corpus, name):
    (corpus / "c").mkdir()
    (corpus / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{corpus}: {name} cannot be read; convert it"):
        sources.list_files(str(corpus))
    assert names(str(corpus), patterns=["*.py"]), "who says what to read may have other files beside it"


def test_what_is_not_read_is_said(corpus, capsys):
    for name in ("README.md", "dataset_infos.json", "LICENSE"):
        (corpus / name).write_text("{}")
    sources.list_files(str(corpus))
    assert capsys.readouterr().err == f"{corpus}: not read: ignored.bin\n"
    sources.list_files(str(corpus), sources.ROW_SUFFIXES)
    assert capsys.readouterr().err == f"{corpus}: not read: a.txt, ignored.bin\n"
    (corpus / "e.json").write_text("[]")
    assert ("e.json", "json") in names(str(corpus)) and ("e.json", "json") not in names(str(corpus), patterns=["*.py"])
    assert "e.json" in capsys.readouterr().err


def test_the_same_data_twice_is_an_error(corpus):
    (corpus / "b" / "c.jsonl.gz").write_bytes(b"")
    with pytest.raises(InputError, match=f"{corpus}: b/c.jsonl is there compressed too"):
        sources.list_files(str(corpus))


def test_one_file_is_a_source_too(corpus):
    path = corpus / "b" / "c.jsonl"
    assert sources.list_files(str(path)) == [sources.SourceFile(str(path), "c.jsonl", path.stat().st_size, "jsonl")]


def test_a_saved_dataset_is_the_files_of_its_state(saved):
    """Not the caches beside them."""
    parts = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert names(str(saved / "train")) == [(part, "arrow") for part in parts]
    assert names(str(saved), split="test") == [(f"test/{part}", "arrow") for part in parts]
    (saved / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert names(str(saved)) == [(f"test/{part}", "arrow") for part in parts]


def test_bytes_before_grows_from_nothing_to_everything(corpus, saved):
    for source in (corpus, saved / "train"):
        files = sources.list_files(str(source))
        before = [sources.bytes_before(files, (index, offset)) for index, offset, _ in text.iter_documents(files)]
        assert before[0] == 0 and before == sorted(before) and len(set(before)) > 2
        assert sources.bytes_before(files, (len(files), 0)) == sum(file.bytes for file in files)


def test_wrong_sources_are_named(tmp_path, corpus, saved):
    for source, options, message in (
        (tmp_path / "nowhere", {}, "nowhere: no such file or folder"),
        (corpus / "ignored.bin", {}, "empty dataset, no file matches *.txt, *.jsonl, *.parquet, *.py"),
        (corpus / "a.txt", {"suffixes": sources.ROW_SUFFIXES}, "empty dataset, no file matches *.jsonl, *.parquet"),
        (corpus, {"split": "train"}, "split 'train' asked for, but there is no dataset_dict.json"),
        (saved / "train", {"split": "train"}, "split 'train' asked for, but there is no dataset_dict.json"),
        (saved, {}, f"{saved}: choose one of the splits train, test (--split)"),
        (saved, {"split": "dev"}, f"{saved}: split 'dev' is none of train, test (--split)"),
    ):
        with pytest.raises(InputError) as caught:
            sources.list_files(str(source), patterns=["*.py"], **options)
        assert message in str(caught.value)


def test_damaged_saved_datasets_are_named(saved):
    state, part = saved / "train" / "state.json", saved / "train" / "data-00001-of-00002.arrow"
    for content, message in (
        ("{", f"{state}: malformed JSON"),
        ("[]", f"{state}: _data_files is not a list of at least one dict"),
        ('{"_data_files": []}', f"{state}: _data_files is not a list of at least one dict"),
        ('{"_data_files": [{}]}', f"{state}: _data_files has an entry without filename"),
        ('{"_data_files": [{"filename": "x"}]}', f"{saved}/train/x: No such file"),
    ):
        before = state.read_text()
        state.write_text(content)
        with pytest.raises(InputError) as caught:
            sources.list_files(str(saved), split="train")
        assert message in str(caught.value)
        state.write_text(before)
    files = sources.list_files(str(saved), split="train")
    whole = part.read_bytes()
    for cut in (8, 9, 200, len(whole)):
        part.write_bytes(whole[:-cut])
        with pytest.raises(InputError, match=f"{part}: unreadable arrow file"):
            list(text.iter_documents(files))


def test_the_tool_packs_the_split_that_was_asked_for(tmp_path, saved):
    tokenizer = with_template(None)
    flag_values = {"source": saved, "length": 16, "tokenizer": write_tokenizer(tmp_path / "tokenizer", tokenizer)}
    result = run_tool(out=tmp_path / "none", **flag_values)
    assert result.returncode == 2 and "choose one of the splits train, test" in result.stderr
    result = run_tool(out=tmp_path / "out", split="test", **flag_values)
    assert result.returncode == 0, result.stderr
    pack(str(saved), tokenizer, str(tmp_path / "here"), 16, split="test")
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["documents"] == 6
