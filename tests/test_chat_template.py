import dataclasses
import datetime
import json

import pytest

from llada_jax import chat_template, tokenizer
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.interop import gguf
from llada_jax.interop.convert import import_checkpoint
from llada_jax.interop.export import export_checkpoint
from tests.interop.test_gguf import write_gguf
from tests.interop.test_huggingface import GOLDENS
from tests.test_tokenizer import make_files

NAMED = {"default": "D", "tool_use": "T"}
LIST = [{"name": name, "template": template} for name, template in NAMED.items()]
FOLDER = {"chat_template.jinja": b"D", "additional_chat_templates/tool_use.jinja": b"T"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "files",
    [
        make_files(chat_template=LIST),
        make_files(chat_template=NAMED),
        make_files(chat_template=None) | {"chat_template.json": json.dumps({"chat_template": NAMED}).encode()},
        make_files(chat_template="old") | {"chat_template.json": json.dumps({"chat_template": LIST}).encode()},
        make_files(chat_template="old") | FOLDER,
    ],
)
def test_the_template_for_tools_is_taken_when_there_are_some(files):
    tok = tokenizer.from_files(files)
    assert tok.chat_templates == NAMED and tok.chat_template == "D"
    assert tok.apply_chat_template([], tools=TOOLS) == "T"
    assert tok.apply_chat_template([]) == tok.apply_chat_template([], tools=[]) == "D"


def test_one_template_is_for_all():
    tok = tokenizer.from_files(make_files(chat_template="{{ tools }}"))
    assert tok.apply_chat_template([], tools=[]) == tok.apply_chat_template([]) == "None"
    assert tok.apply_chat_template([], tools=TOOLS) == str(TOOLS)
    tok = tokenizer.from_files(make_files(chat_template={"rag": "R", "tool_use": "T"}))
    assert tok.apply_chat_template([], tools=TOOLS) == "T"
    with pytest.raises(InputError, match="none of rag, tool_use is for a conversation without tools"):
        tok.apply_chat_template([])


@pytest.mark.parametrize("value", [3, ["D"], [{"name": "default"}], {"default": None}])
def test_malformed_templates_are_named(value):
    with pytest.raises(InputError, match="x/tokenizer_config.json: chat_template is neither a text nor named texts"):
        tokenizer.from_files(make_files(chat_template=value), "x")
    with pytest.raises(InputError, match=r"x/chat_template\.jinja: not UTF-8"):
        tokenizer.from_files(make_files() | {"chat_template.jinja": b"\xff"}, "x")
    with pytest.raises(InputError, match="chat template: .*end of template"):
        tokenizer.from_files(make_files(chat_template="{% if")).apply_chat_template([])


@pytest.mark.parametrize("files", [FOLDER, {"chat_template.json": json.dumps({"chat_template": NAMED}).encode()}])
def test_every_template_comes_back_on_export(tmp_path, files):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for path in (GOLDENS / "ling_tiny").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name, content in (byte_tokenizer(508).files | files).items():
        (source / name).write_bytes(content)
    import_checkpoint(str(source), str(tmp_path / "ours"))
    assert tokenizer.load_tokenizer(str(tmp_path / "ours")).chat_templates == NAMED
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "hf"))
    assert tokenizer.load_tokenizer(str(tmp_path / "hf")).chat_templates == NAMED
    assert all((tmp_path / "hf" / name).read_bytes() == content for name, content in files.items())


def test_templates_of_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "a.gguf", lambda writer: writer.add_chat_template(LIST))
    tok = tokenizer.from_files(gguf.tokenizer_files(gguf.open_gguf(tmp_path / "a.gguf")))
    assert tok.chat_templates == NAMED
    write_gguf(tmp_path / "b.gguf", lambda writer: writer.add_chat_template("D"))
    assert tokenizer.from_files(gguf.tokenizer_files(gguf.open_gguf(tmp_path / "b.gguf"))).chat_templates == {
        "default": "D"
    }


def test_the_date_is_the_tokenizers_and_not_todays():
    asks = "{% set d = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}{{ d }}"
    tok = tokenizer.from_files(make_files(chat_template={"default": "D", "tool_use": asks}))
    assert tok.asks_for_the_date and not tokenizer.from_files(make_files()).asks_for_the_date
    assert tok.apply_chat_template([], tools=TOOLS) == "26 Jul 2024" == chat_template.DATE.strftime("%d %b %Y")
    other = dataclasses.replace(tok, template_date=datetime.date(2031, 1, 2))
    assert other.apply_chat_template([], tools=TOOLS) == "02 Jan 2031"
