"""Where an answer ends, and its text behind the prompt."""

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from llada_jax.checkpoint.weights import Model
from llada_jax.errors import InputError
from llada_jax.evaluation.tasks import Question, answer_questions
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import eos_ids_of
from tests.helpers.foreign_tokenizers import byte_level, llama_like, metaspace

CONFIG = preset("tiny").replace(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
ENDS = CONFIG.with_ends([3, 4])


def always(token_id, config=CONFIG):
    """A model that predicts one token everywhere."""
    params = jax.tree.map(np.zeros_like, parameters.initialize(config, jax.random.key(0)))
    head = np.zeros(params["head"].shape, np.float32)
    head[:, token_id] = 1
    return params | {"embedding": np.ones_like(params["embedding"]), "head": head, "final_norm": np.ones(32)}


def asked(**changes):
    return GenerateConfig(**dict(gen_length=8, block_length=4) | changes)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rule", ["llada2", "sglang", "dinfer", "entropy", "fixed"])
def test_any_end_of_sequence_of_the_checkpoint_ends_an_answer(rule, early):
    g = asked(rule=rule, eos_early_stop=early)
    for end in ENDS.eos_token_ids:
        out = llada_jax.generate(always(end), ENDS, [np.arange(6)], g)
        assert out.tokens[0].tolist() == [end]
    other = llada_jax.generate(always(5), ENDS, [np.arange(6)], g)
    assert len(other.tokens[0]) == 8


def test_one_asked_for_is_the_only_one_and_minus_one_is_none():
    for eos_id, length in ((3, 1), (4, 8), (508, 8), (-1, 8), (None, 1)):
        out = llada_jax.generate(always(3), ENDS, [np.arange(6)], asked(eos_id=eos_id))
        assert len(out.tokens[0]) == length, eos_id
    assert eos_ids_of(ENDS, asked()) == [508, 3, 4] and eos_ids_of(ENDS, asked(eos_id=3)) == [3, -1, -1]
    nothing = CONFIG.replace(eos_token_id=None)
    assert eos_ids_of(nothing, asked()) == [-1]
    with pytest.raises(InputError, match="eos_id=\\[3\\], expected a token id, or -1"):
        asked(eos_id=[3])


def test_requests_with_ends_of_their_own_share_a_batch():
    requests = [Request(np.arange(5), asked(eos_id=eos_id)) for eos_id in (None, 4, -1, 3)]
    for rows in (1, 4):
        told = {}

        def tell(index, tokens, told=told):
            told.setdefault(index, []).extend(tokens.tolist())

        answers = serve(always(3), ENDS, requests, rows, 16, on_tokens=tell)
        found = {answer.index: answer.tokens.tolist() for answer in answers}
        assert {i: len(tokens) for i, tokens in found.items()} == {0: 1, 1: 8, 2: 8, 3: 1} and told == found


@pytest.mark.parametrize("make", [llama_like, metaspace])
def test_an_answers_text_keeps_the_spaces_that_it_begins_with(make):
    """An indented completion of code, and a word after a word."""
    tokenizer = make()
    space = tokenizer.token_to_id("▁")
    for prompt, text in (("def f():", "    "), ("the", "    "), ("", "   ")):
        prompt = np.array(tokenizer.encode(prompt) or [1])
        (answer,) = serve(always(space), CONFIG, [Request(prompt, asked(gen_length=4))], 1, 16, tokenizer)
        assert answer.text.startswith(text) and (prompt[0] == 1 or answer.text == text)


def test_a_character_begun_by_the_prompt_is_in_the_answer():
    tokenizer = byte_level()
    ids = tokenizer.encode("日")
    g = asked(gen_length=1, eos_id=-1)
    (answer,) = serve(always(ids[-1]), CONFIG, [Request(np.array(ids[:-1]), g)], 1, 16, tokenizer)
    assert answer.text == "日"


def test_questions_are_asked_behind_the_beginning_and_end_at_any_end():
    for tokenizer, length in ((llama_like(bos=True), 4), (llama_like(bos=False), 3)):
        model = Model(ENDS, always(4), tokenizer, {})
        question = Question(None, "the", lambda answer: 1.0)
        assert question.encode(tokenizer)[-1] == tokenizer.encode("the")[-1]
        assert len(question.encode(tokenizer)) == len(tokenizer.encode("the")) + (length == 4)
        result, (record,) = answer_questions(model, [question], asked(), 1)
        assert result.ended == 1.0 and record["tokens"] == 1 and record["ended"]
