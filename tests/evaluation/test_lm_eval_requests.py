"""What lm-eval's tasks ask for, in our terms; where answers end."""

import re
from pathlib import Path

import lm_eval
import pytest
import yaml

from llada_jax.errors import InputError
from llada_jax.evaluation.lm_eval_requests import answer_text, continued, decoding_of, fit
from llada_jax.sampling.generate import GenerateConfig
from tests.helpers import foreign_tokenizers

DEFAULTS = GenerateConfig(256, block_length=8, steps=4)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_length_is_read(name):
    assert decoding_of({name: 5, "do_sample": False}, DEFAULTS)[0].gen_length == 5
    assert decoding_of({}, DEFAULTS)[0] == DEFAULTS


def test_sampling_is_what_was_asked_for():
    def of(**settings):
        config, _ = decoding_of(settings, DEFAULTS)
        return config.temperature, config.top_k, config.top_p

    assert of(do_sample=True, temperature=0.6, top_p=0.95, top_k=20) == (0.6, 20, 0.95)
    assert of(temperature=0.6) == (0.6, None, None) and of(do_sample=True) == (1.0, None, None)
    assert (
        of(do_sample=False, temperature=0.7)
        == of(do_sample=False, temperature=1)
        == of(temperature=0)
        == (0, None, None)
    )
    assert of(do_sample=True, temperature=0.0, top_k=0) == (0.0, None, None) == of(top_k=-1, num_beams=1)


def test_stops_and_our_own_settings():
    config, stops = decoding_of({"until": "a", "stop": ["b", "\n"], "threshold": 0.5, "steps": 2}, DEFAULTS)
    assert stops == ["a", "b", "\n"] and (config.threshold, config.steps, config.block_length) == (0.5, 2, 8)
    assert (
        decoding_of({"until": ["a", "b"]}, DEFAULTS)[1] == ["a", "b"]
        and decoding_of({"until": None}, DEFAULTS)[1] == []
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 10}, "num_beams=10 is not for this model; known: until, stop, max_gen_toks"),
        ({"max_length": 512}, "max_length=512"), ({"tempereture": 0.5}, "tempereture"), ({"min_p": 0.1}, "min_p=0.1"),
        ({"block_length": 16}, "block_length=16"), ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": "many"}, "max_gen_toks': 'many'"), ({"temperature": None}, "temperature"),
        ({"top_p": 1.5, "do_sample": True}, "gen_kwargs: top_p=1.5"), ({"top_k": 2.5}, "top_k=2.5"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature=nan"), ({"until": [3]}, "until=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        decoding_of(settings, DEFAULTS)


class _Tasks(yaml.SafeLoader):
    pass


_Tasks.add_constructor("!function", lambda loader, node: node.value)


@pytest.mark.parametrize("path", ["mmlu_pro/_default_template_yaml", "aime/aime25.yaml", "humaneval/humaneval.yaml"])
def test_the_settings_of_long_tasks_are_read_and_leave_room_for_the_question(path):
    text = (Path(lm_eval.__file__).parent / "tasks" / path).read_text()
    settings = yaml.load(text, _Tasks)["generation_kwargs"]
    config, stops = decoding_of(settings, DEFAULTS)
    assert config.gen_length == settings["max_gen_toks"] >= 1024 and config.temperature == 0
    assert stops == settings["until"]
    question = list(range(1500))
    assert fit(question, config.gen_length, 40_960) == question
    with pytest.raises(InputError, match=f"max_gen_toks={config.gen_length} of max_length=1024 tokens leaves 0"):
        fit(question, config.gen_length, 1024)


def test_a_context_is_cut_on_the_left_and_never_to_nothing():
    context = list(range(100))
    assert fit(context, 28, 128) == context and fit(context, 32, 128) == context[4:] == fit(context[4:], 32, 128)
    assert fit(context, 112, 128) == context[-16:] and fit(context[-3:], 125, 128) == context[-3:]
    for length in (113, 127, 128, 4096):
        with pytest.raises(InputError, match=f"max_gen_toks={length} of max_length=128 .* a context of 100"):
            fit(context, length, 128)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
SILENT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


def messages(prefix):
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": prefix}]


@pytest.mark.parametrize("prefix", ["The answer is", "```python\ndef f(x):\n", "Q", "x "])
def test_a_prefix_stays_open(prefix):
    start = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = foreign_tokenizers.byte_level(chat_template=CHATML)
    assert continued(tokenizer, messages(prefix)) == start + prefix
    trimmed = foreign_tokenizers.byte_level(chat_template=TRIMMED)
    assert continued(trimmed, messages(prefix)) == start + prefix.rstrip()
    conversation = messages(prefix)
    continued(tokenizer, conversation)
    assert conversation == messages(prefix)  # the caller's stays as it was


def test_a_prefix_that_a_template_drops_is_refused():
    with pytest.raises(InputError, match="leaves out the message to be continued"):
        continued(foreign_tokenizers.byte_level(chat_template=SILENT), messages("The"))
    with pytest.raises(InputError, match="no text"):
        continued(foreign_tokenizers.byte_level(chat_template=CHATML), messages(None))


@pytest.mark.parametrize("family", ["byte_level", "llama_like"])
def test_answers_end_at_texts_and_special_tokens(family):
    tokenizer = getattr(foreign_tokenizers, family)()
    prompt = tokenizer.encode("the cat:")

    def of(text, *stops, thought_end=None):
        parts = [part for part in re.split("(</?s>)", text) if part]
        ids = [tokenizer.encode(part if part in ("<s>", "</s>") else f"the cat:{part}") for part in parts]
        tokens = [i for part in ids for i in part[len(prompt) if len(part) > len(prompt) else 0 :]]
        return answer_text(tokenizer, prompt, tokens, stops, thought_end)

    assert of(" the one</s>more") == " the onemore"  # a model may write on behind the end of a turn
    assert of(" the one</s>more", "</s>") == " the one" == of(" the one</s>more", "x", "</s>m", "")
    assert of(" the one</s>more", "e</s>") == " the on" and of("a</s>b<s>c", "<s>", "\n") == "ab"
    assert of(" the hen", "hen", "the") == " " and of("abc", "cd") == "abc" and of("", "a") == ""
    assert of("</s>", "</s>") == "" and of("猫</s>猫", "</s>") == "猫" and of("猫は\n", "\n") == "猫は"
    assert of("so<s> \n42</s>so", "</s>", "so", thought_end="<s>") == "42" == of("so#42\n", "\n", thought_end="#")
    assert of("so<s> \n42\nx", "\n", thought_end="<s>") == "42" and of("so 42", thought_end="<s>") == "so 42"
