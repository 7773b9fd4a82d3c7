"""What tokens say inside a text: against decoding prompt and answer together, and against the text's own bytes."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from llada_jax.data.byte_tokenizer import byte_tokenizer
from tests.helpers.foreign_tokenizers import byte_level, llama_like, metaspace, words

FAMILIES = [llama_like, metaspace, byte_level, words, lambda: byte_tokenizer(256)]
TEXTS = ("def f():\n    return 'the'", " the  cat 猫は 🙂é.", "the", "    x", "猫", "a.b")


@pytest.mark.parametrize("make", FAMILIES)
def test_an_answer_is_the_rest_of_the_whole_wherever_it_begins(make):
    tokenizer = make()
    for text in TEXTS:
        ids = tokenizer.encode_document(text)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        for cut in range(len(ids) + 1):
            prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            found = tokenizer.text.text_after(ids[:cut], ids[cut:])
            if whole.startswith(prompt):  # no character is cut
                assert prompt + found == whole, (text, cut)
            assert found.replace("\ufffd", "") in whole


def test_the_space_of_the_first_word_is_kept_behind_a_prompt_and_not_without_one():
    for make in (llama_like, metaspace):
        tokenizer = make()
        indent = [tokenizer.token_to_id("▁")] * 4
        for prompt in ("def f():", "the"):
            assert tokenizer.text.text_after(tokenizer.encode(prompt), indent) == "    "
        the = tokenizer.encode("the")
        for nothing in ([], [1], [1, 2]):  # special tokens are not text
            assert tokenizer.text.text_after(nothing, the) == "the"
        assert tokenizer.text.text_after([*tokenizer.encode("a"), *[1] * 20], the) == " the"  # nor do they hide it


def test_a_character_cut_by_the_border_is_completed_and_one_cut_at_the_end_is_marked():
    for tokenizer in (llama_like(), byte_level(), byte_tokenizer(256)):
        ids = tokenizer.encode("x日本")
        assert tokenizer.text.text_after(ids[:-1], ids[-1:]) == "本"
        assert tokenizer.text.text_after(ids[:-4], ids[-4:-1]) == "日\ufffd"
        assert tokenizer.text.text_after(ids[:-5], ids[-5:]) == "日本"


def test_special_tokens_are_left_out_or_written_out():
    for make in FAMILIES[:4]:
        tokenizer = make()
        the, eos = tokenizer.encode("the"), tokenizer.eos_id
        assert tokenizer.text.text_after(the, [eos]) == ""
        assert tokenizer.text.text_after(the, [eos], skip_special=False).strip() == "</s>"
        assert tokenizer.text.text_after(the, [10**6]) == ""


def test_a_named_end_is_special_whatever_the_backend_says():
    for make in (llama_like, byte_level, words):
        tokenizer = make(eos_token="the" if make is words else "he")
        ids = [*tokenizer.encode("a"), tokenizer.eos_id]
        assert tokenizer.text.text_after(ids[:-1], ids[-1:]) == "" and tokenizer.text.text_after([], ids[-1:]) == ""
        assert tokenizer.text.count_bytes(ids[-1:], [True], False) == 0
        assert tokenizer.text.piece(ids[:-1], ids[-1]).strip() == tokenizer.special_tokens["eos_token"]
        assert pickle.loads(pickle.dumps(tokenizer)).text.text_after(ids[:-1], ids[-1:]) == ""


def test_a_token_that_is_added_and_not_special_is_its_text():
    tokenizer = byte_level()
    tokenizer.backend.add_tokens([tokenizers.AddedToken("<think>", normalized=False), "é猫"])
    fresh = dataclasses.replace(tokenizer)
    ids = fresh.encode("a<think>é猫")
    assert fresh.text.text_after(ids[:1], ids[1:]) == "<think>é猫"
    assert fresh.text.count_bytes(ids, [True] * len(ids), True) == len("a<think>é猫".encode())


@pytest.mark.parametrize("make", [llama_like, byte_level, lambda: byte_tokenizer(256)])
def test_bytes_are_those_of_the_text_in_windows_of_any_size(make):
    tokenizer = make()
    for text in (*TEXTS, "吾輩は猫である。" * 3, "🙂🚀" * 5, "семья несчастлива"):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        for size in (1, 2, 3, 7, len(ids)):
            total = 0
            for start in range(0, len(ids), size):
                window = ids[start : start + size]
                total += tokenizer.text.count_bytes(window, [True] * len(window), begins=start == 0)
            assert total == len(text.encode()), (text, size)


def test_bytes_of_words_and_unigrams_are_counted_behind_what_precedes_them():
    for make, text in ((metaspace, "the cat é猫"), (words, "the cat sat")):
        tokenizer = make()
        ids = tokenizer.with_bos(True).encode_document(text)
        chosen = np.arange(len(ids)) > 1
        rest = tokenizer.text.text_after(ids[:2], ids[2:])
        assert tokenizer.text.count_bytes(ids, chosen, True) == len(rest.encode())
        assert tokenizer.text.count_bytes(ids, [True] * len(ids), True) == len(text.encode())


def test_a_decoder_that_looks_at_its_neighbours_is_shown_them():
    tokenizer = words()
    for decoder in (decoders.WordPiece(prefix="##", cleanup=True), decoders.CTC(), decoders.BPEDecoder(suffix="</w>")):
        files = json.loads(tokenizer.files["tokenizer.json"]) | {"decoder": json.loads(_state(decoder))}
        backend = tokenizers.Tokenizer.from_str(json.dumps(files))
        changed = dataclasses.replace(tokenizer, backend=backend)
        ids = changed.encode("the cat sat the cat sat the cat sat the cat sat .")
        for cut in range(len(ids)):
            whole, prompt = changed.decode(ids), changed.decode(ids[:cut])
            assert changed.text.text_after(ids[:cut], ids[cut:]) == whole[len(prompt) :]


def _state(decoder) -> str:
    return decoder.__getstate__().decode()


@pytest.mark.parametrize("make", FAMILIES)
def test_what_has_settled_can_be_read_alone(make):
    """Whatever follows: at every cut the text of what has settled, and of the rest behind it, join to the whole."""
    tokenizer, rng = make(), np.random.default_rng(0)
    for text in (*TEXTS, *([None] * 20)):
        ids = tokenizer.encode(text) if text else rng.integers(0, tokenizer.vocab_size + 2, 9).tolist()
        for before in ([], tokenizer.encode("a")):
            whole = tokenizer.text.text_after(before, ids)
            for cut in range(len(ids) + 1):
                settled = tokenizer.text.settled(before, ids[:cut])
                first = tokenizer.text.text_after(before, ids[:settled]) if settled else ""
                assert first + tokenizer.text.text_after([*before, *ids[:settled]], ids[settled:]) == whole
