import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llada_jax import tokenizer
from llada_jax.errors import InputError

TEMPLATE = (
    "{% for m in messages %}\n    {% generation %}{{ '<|im_start|>' + m['role'] }}:{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}\n{% endfor %}\n{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def make_files(special=("<|endoftext|>", "<|im_start|>"), **config) -> dict[str, bytes]:
    """A byte-level BPE of 270 tokens and then the special ones."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the quick brown fox and the lazy dog, the end of the other thing"], trainer)
    backend.add_special_tokens(list(special))
    config = {"eos_token": special[0], "pad_token": {"content": special[0]}, "chat_template": TEMPLATE} | config
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_encode_and_decode():
    tok = tokenizer.from_files(make_files())
    text = "the fox\n<|im_start|>naïve <b>"
    ids = tok.encode(text)
    assert tok.token_to_id("<|im_start|>") == 271
    assert 271 in ids
    assert tok.decode(ids) == text
    assert tok.decode(ids, skip_special_tokens=True) == text.replace("<|im_start|>", "")
    assert tok.encode_batch([text, "a", ""]) == [ids, tok.encode("a"), []]
    assert (tok.vocab_size, tok.eos_id, tok.pad_id, tok.bos_id, tok.mask_id) == (272, 270, 270, None, None)
    assert tok.id_to_token(270) == "<|endoftext|>"
    assert tok.id_to_token(400) is None


def test_truncation_and_padding_in_the_file_are_dropped():
    files = make_files()
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tok = tokenizer.from_files(files | {"tokenizer.json": backend.to_str().encode()})
    assert len(tok.encode("a b c d e f g")) > 3
    assert len(tok.encode("a")) == 1


def test_post_processor_adds_nothing():
    files = make_files()
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", None, [("<|endoftext|>", 270)]
    )
    tok = tokenizer.from_files(files | {"tokenizer.json": backend.to_str().encode()})
    assert 270 not in tok.encode("the")
    assert 270 not in tok.encode_batch(["the"])[0]


def test_ids_of_texts_are_those_without_special_ones():
    tok = tokenizer.from_files(make_files(("<e>", "<m>"), mask_token="<m>"))
    assert tok.text_ids == set(range(tok.vocab_size)) - {270, 271}


@pytest.mark.parametrize("name", tokenizer.MASK_NAMES)
def test_mask_by_name(name):
    assert tokenizer.from_files(make_files(("<e>", name))).mask_id == 271


def test_mask_as_declared():
    assert tokenizer.from_files(make_files(("<e>", "<m>"), mask_token="<m>")).mask_id == 271
    assert tokenizer.from_files(make_files(("<e>", "[gMASK]"))).mask_id is None


def test_digest_tells_files_apart():
    files = make_files()
    assert tokenizer.from_files(files).digest == tokenizer.from_files(dict(reversed(files.items()))).digest
    assert tokenizer.from_files(files | {"merges.txt": b""}).digest != tokenizer.from_files(files).digest


def test_load(tmp_path):
    files = make_files()
    folder = write(tmp_path / "hf", files | {"README.md": b"not kept"})
    assert tokenizer.load_tokenizer(folder).files == files
    write(tmp_path / "checkpoint" / "tokenizer", files)
    assert tokenizer.load_tokenizer(str(tmp_path / "checkpoint")).files == files
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        tokenizer.load_tokenizer(str(tmp_path))
    (tmp_path / "hf" / "tokenizer.json").write_text('{"model":')
    with pytest.raises(InputError, match=r"hf/tokenizer\.json"):
        tokenizer.load_tokenizer(folder)


def test_chat_template():
    tok = tokenizer.from_files(make_files())
    messages = [{"role": "user", "content": "1 < 2"}, {"role": "assistant", "content": "é"}]
    expected = "<|im_start|>user:1 < 2<|endoftext|><|im_start|>assistant:é<|endoftext|>"
    assert tok.apply_chat_template(messages, add_generation_prompt=False) == expected
    tools = tok.apply_chat_template(messages, tools=[{"name": "<f>é"}])
    assert tools == expected + '[{"name": "<f>é"}]<|im_start|>assistant'
    with pytest.raises(InputError, match="no messages"):
        tok.apply_chat_template([])
    with pytest.raises(InputError, match="chat template"):
        tok.apply_chat_template([{"role": None, "content": ""}])


def test_chat_template_sources():
    files = make_files()
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert tokenizer.from_files(make_files(chat_template=named)).chat_template == "D"
    assert tokenizer.from_files(files | {"chat_template.jinja": b"J"}).chat_template == "J"
    tok = tokenizer.from_files(make_files(chat_template=None))
    with pytest.raises(InputError, match="no chat template"):
        tok.apply_chat_template([])


def test_chat_template_is_sandboxed():
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="unsafe"):
        tokenizer.from_files(make_files(chat_template=attack)).apply_chat_template([])


@pytest.mark.parametrize("token_id", [272, 300, 511])
def test_with_mask(token_id):
    """At the next id, and beyond a gap: every other token keeps its id."""
    files = make_files(added_tokens_decoder={"270": {"content": "<|endoftext|>"}})
    files |= {"special_tokens_map.json": b"{}", "added_tokens.json": b"{}"}
    old = tokenizer.from_files(files)
    new = tokenizer.from_files(tokenizer.with_mask(files, token_id))
    assert new.mask_id == new.token_to_id("<|mask|>") == token_id
    assert new.backend.get_vocab() == old.backend.get_vocab() | {"<|mask|>": token_id}
    text = "the fox<|im_start|>the mask<|endoftext|>"
    assert new.encode(text) == old.encode(text)
    assert new.encode("the<|mask|> fox") == [*old.encode("the"), token_id, *old.encode(" fox")]
    assert new.decode([token_id]) == "<|mask|>"
    assert json.loads(new.files["tokenizer_config.json"])["added_tokens_decoder"][str(token_id)]["special"]
    assert json.loads(new.files["special_tokens_map.json"]) == {"mask_token": "<|mask|>"}
    assert json.loads(new.files["added_tokens.json"]) == {"<|mask|>": token_id}


def test_with_mask_of_a_token_that_exists():
    files = make_files(("<e>", "<mask>"))
    new = tokenizer.from_files(tokenizer.with_mask(files, 271))
    assert (new.mask_id, new.vocab_size) == (271, 272)


def test_with_mask_where_ids_cannot_be_chosen():
    backend = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("b", -1.0)]))
    files = {"tokenizer.json": backend.to_str().encode()}
    assert tokenizer.from_files(tokenizer.with_mask(files, 2)).mask_id == 2
    with pytest.raises(InputError, match="cannot hold a mask token of id 9"):
        tokenizer.with_mask(files, 9)
