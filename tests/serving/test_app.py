"""A running server, asked by OpenAI's own client and by curl: it answers what decoding answers without a server."""

import concurrent.futures
import dataclasses
import json
import math
import subprocess

import numpy as np
import openai
import pytest

from llada_jax.sampling.batching import Request, in_order, serve
from tests.helpers.waiting import wait_until
from tests.serving.running import DEFAULTS, LONGEST, alone, served, small_model

HI = [{"role": "user", "content": "hi"}]
HI_TEXT = "user:hi|assistant:"


@pytest.fixture(scope="module")
def server():
    with served(small_model()) as running:
        yield running


@pytest.fixture
def expected(server):
    """expected(prompt text, seed, **config) -> the Answer without a server."""
    return lambda text, seed=0, **changes: alone(server.model, server.model.tokenizer.encode(text), seed, **changes)


def streamed(stream):
    """(text, finish_reason, usage) of choice 0, ..., for each choice; and all chunks."""
    texts, ends, usage, chunks = {}, {}, None, list(stream)
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    return texts, ends, usage, chunks


def test_a_completion_is_what_decoding_answers(server, expected):
    for model in ("tiny", "alias"):
        found = server.client.completions.create(model=model, prompt="hello", max_tokens=21)
        answer = expected("hello", gen_length=21)
        assert found.choices[0].text == answer.text and found.choices[0].finish_reason == "length"
        assert (found.model, found.object, found.choices[0].logprobs) == ("tiny", "text_completion", None)
        usage = found.usage.model_dump()
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 21, 26)
        passes = {name: usage[name] for name in ("prefill_passes", "forward_passes", "commit_passes")}
        assert passes == {name: getattr(answer, name) for name in passes}
        assert usage["tokens_per_forward"] == pytest.approx(answer.tokens_per_forward, abs=1e-4)
        assert usage["seconds"] > 0


def test_settings_of_decoding_are_the_requests_own(server, expected):
    for config in ({"threshold": 0.01}, {"steps": 1, "block_length": 8}, {"rule": "entropy", "entropy_bound": 3.0}):
        found = server.client.completions.create(model="tiny", prompt="hello", extra_body=config)
        answer = expected("hello", **config)
        assert found.choices[0].text == answer.text
        assert found.usage.forward_passes == answer.forward_passes, config


def test_a_chat_is_in_the_checkpoints_template_with_its_tools(server, expected):
    tool = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {}}}
    found = server.client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=12)
    assert found.choices[0].message.content == expected(HI_TEXT, gen_length=12).text
    assert (found.object, found.choices[0].message.role) == ("chat.completion", "assistant")
    lengths = [
        server.client.chat.completions.create(model="tiny", messages=HI, tools=[tool], **more).usage.prompt_tokens
        for more in ({}, {"tool_choice": "none"})
    ]
    assert lengths[0] > len(json.dumps(tool)) + len(HI_TEXT) and lengths[1] == len(HI_TEXT)
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert server.client.chat.completions.create(model="tiny", messages=parts).usage.prompt_tokens == len(HI_TEXT)


def test_a_client_that_sends_every_default_is_served(server, expected):
    found = server.client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, top_p=1, n=1, stream=False, presence_penalty=0, frequency_penalty=0,
        logit_bias={}, response_format={"type": "text"}, tool_choice="auto", parallel_tool_calls=True, user="me",
        logprobs=False, top_logprobs=None, stop=None, seed=None, max_tokens=None, store=False, tools=[],
    )  # fmt: skip
    assert found.choices[0].message.content == expected(HI_TEXT).text


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_stream_joins_to_the_answer(server, expected, kind):
    answer = expected("hello" if kind == "completions" else HI_TEXT, gen_length=22)
    for options in ({}, {"extra_body": {"provisional": True}}):
        common = dict(model="tiny", stream=True, max_tokens=22, stream_options={"include_usage": True}) | options
        if kind == "completions":
            stream = server.client.completions.create(prompt="hello", **common)
        else:
            stream = server.client.chat.completions.create(messages=HI, **common)
        texts, ends, usage, chunks = streamed(stream)
        assert texts == {0: answer.text} and ends == {0: "length"}
        assert usage.completion_tokens == 22 and usage.forward_passes == answer.forward_passes
        assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        assert not chunks[-1].choices and len({chunk.id for chunk in chunks}) == 1


def test_viewers_see_the_blocks_as_they_stand_and_what_was_committed(server, expected):
    answer = expected("hello", gen_length=22)
    stream = server.client.completions.create(
        model="tiny", prompt="hello", stream=True, max_tokens=22, extra_body={"provisional": True}
    )
    *_, chunks = streamed(stream)
    committed = [chunk.committed for chunk in chunks if hasattr(chunk, "committed")]
    assert [step for each in committed for step in each["steps"]] == answer.written_at.tolist()
    pieces = [piece for each in committed for piece in each["pieces"]]
    tokens, text = answer.tokens.tolist(), server.model.tokenizer.text
    special = [text.special(token) is not None for token in tokens]
    assert pieces == ["" if hidden else text.piece([], t) for t, hidden in zip(tokens, special, strict=True)]
    standing = [chunk.provisional for chunk in chunks if hasattr(chunk, "provisional")]
    assert standing and all(len(each["pieces"]) == len(each["steps"]) <= 4 for each in standing)
    masked = [(piece is None, step) for each in standing for piece, step in zip(*list(each.values())[1:], strict=True)]
    assert {none for none, _ in masked} == {True, False} and all(none == (step < 0) for none, step in masked)
    plain = server.client.completions.create(model="tiny", prompt="hello", stream=True)
    assert not any(hasattr(chunk, "provisional") or hasattr(chunk, "committed") for chunk in plain)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_frees_the_row(server, expected, stream):
    """Wherever it lies, across blocks too."""
    answer = expected("abc", gen_length=200)
    cancelled, places = server.engine.stats().cancelled, (2, 6, 21)
    for at in places:
        stop = answer.text[at : at + 3]
        found = server.client.completions.create(
            model="tiny", prompt="abc", max_tokens=200, stop=[stop, "never there"], stream=stream
        )
        if stream:
            texts, ends, *_ = streamed(found)
            text, end = texts.get(0, ""), ends[0]
        else:
            text, end, usage = found.choices[0].text, found.choices[0].finish_reason, found.usage
            assert usage.completion_tokens == len(text) + len(stop) and usage.prefill_passes == answer.prefill_passes
            assert usage.completion_tokens < usage.forward_passes + 8 < answer.forward_passes
        assert (text, end) == (answer.text.partition(stop)[0], "stop")
    wait_until(lambda: server.engine.stats().busy == 0)
    assert server.engine.stats().cancelled == cancelled + len(places)


def test_the_end_of_sequence_stops_and_is_not_shown(server, expected):
    common = dict(model="tiny", prompt="x", temperature=2.0, max_tokens=60)
    found = server.client.completions.create(n=16, seed=1, **common)
    ended = [choice.index for choice in found.choices if choice.finish_reason == "stop"]
    assert 0 < len(ended)
    answer = expected("x", (1, ended[0]), temperature=2.0, gen_length=60)
    assert answer.tokens[-1] == server.model.tokenizer.eos_id and len(answer.tokens) < 60
    assert found.choices[ended[0]].text == answer.text and "endoftext" not in answer.text
    stream = server.client.completions.create(n=16, seed=1, stream=True, **common)
    texts, ends, *_ = streamed(stream)
    whole = server.client.completions.create(n=16, seed=1, extra_body={"ignore_eos": True}, **common)
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    assert whole.usage.completion_tokens == 16 * 60
    assert texts[ended[0]] == answer.text and [i for i in sorted(ends) if ends[i] == "stop"] == ended


def test_seeds_make_draws_again_and_several_answers_have_pairs_of_them(server, expected):
    common = dict(model="tiny", prompt="x", temperature=1.0)
    texts = [server.client.completions.create(seed=7, **common).choices[0].text for _ in range(2)]
    assert texts == [expected("x", 7, temperature=1.0).text] * 2
    assert len({server.client.completions.create(**common).choices[0].text for _ in range(4)}) > 1
    found = server.client.completions.create(n=3, seed=7, **common)
    wanted = [expected("x", (7, i), temperature=1.0) for i in range(3)]
    assert [choice.text for choice in found.choices] == [answer.text for answer in wanted]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and found.usage.prompt_tokens == 1
    assert found.usage.forward_passes == sum(answer.forward_passes for answer in wanted)
    texts, ends, *_ = streamed(server.client.completions.create(n=3, seed=7, stream=True, **common))
    assert texts == {i: answer.text for i, answer in enumerate(wanted)} and set(ends) == {0, 1, 2}


def test_several_prompts_as_texts_or_ids_have_choices_in_their_order(server, expected):
    wanted = [expected(text).text for text in ("one", "two")]
    for prompt in (["one", "two"], [list(b"one"), list(b"two")]):
        found = server.client.completions.create(model="tiny", prompt=prompt)
        assert [choice.text for choice in found.choices] == wanted and found.usage.prompt_tokens == 6
        echoed = server.client.completions.create(model="tiny", prompt=prompt, echo=True)
        assert [choice.text for choice in echoed.choices] == ["one" + wanted[0], "two" + wanted[1]]
    texts, *_ = streamed(server.client.completions.create(model="tiny", prompt=prompt, echo=True, stream=True, n=2))
    assert texts == {i: ("one", "two")[i // 2] + wanted[i // 2] for i in range(4)}


def test_logprobs_are_of_the_steps_that_wrote_the_tokens(server, expected):
    answer = expected(HI_TEXT, gen_length=10)
    logs = [math.log(p) for p in answer.confidence]
    common = dict(model="tiny", messages=HI, max_tokens=10, logprobs=True)
    found = server.client.chat.completions.create(top_logprobs=1, **common).choices[0].logprobs.content
    assert [entry.logprob for entry in found] == pytest.approx(logs, rel=1e-4)
    assert [entry.top_logprobs[0].logprob for entry in found] == pytest.approx(logs, rel=1e-4)
    shown = b"".join(bytes(e.bytes) for e, t in zip(found, answer.tokens, strict=True) if t < 256)
    assert shown.decode("utf-8", "replace") == answer.text
    stream = server.client.chat.completions.create(stream=True, **common)
    parts = [c.choices[0].logprobs.content for c in stream if c.choices and c.choices[0].logprobs]
    assert [entry.logprob for part in parts for entry in part] == pytest.approx(logs, rel=1e-4)
    answer = expected("hello", gen_length=10)
    found = (
        server.client.completions.create(model="tiny", prompt="hello", max_tokens=10, logprobs=1).choices[0].logprobs
    )
    assert found.token_logprobs == pytest.approx([math.log(p) for p in answer.confidence], rel=1e-4)
    assert found.text_offset == sorted(found.text_offset) and len(found.top_logprobs) == len(found.tokens) == 10
    none = server.client.completions.create(model="tiny", prompt="hello", logprobs=0).choices[0].logprobs
    assert none.top_logprobs is None and len(none.tokens) == 8


def test_sixty_four_clients_at_once_get_what_they_would_get_alone(server):
    rng = np.random.default_rng(0)
    asked = [
        dict(prompt=rng.integers(32, 127, rng.integers(1, 12)).tolist(), max_tokens=int(rng.integers(1, 30)))
        | dict(temperature=float(i % 3) / 2, seed=i, top_p=0.9 if i % 4 else None, stream=bool(i % 2))
        for i in range(64)
    ]

    def ask(fields):
        found = server.client.completions.create(model="tiny", **fields)
        return streamed(found)[0][0] if fields["stream"] else found.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, asked))
    model = server.model
    changes = [{"gen_length": f["max_tokens"], "temperature": f["temperature"], "top_p": f["top_p"]} for f in asked]
    requests = [
        Request(np.array(f["prompt"], np.int32), dataclasses.replace(DEFAULTS, **change), f["seed"])
        for f, change in zip(asked, changes, strict=True)
    ]
    answers = in_order(serve(model.params, model.config, requests, 4, LONGEST, model.tokenizer))
    assert texts == [answer.text for answer in answers]


@pytest.mark.parametrize(
    "status, param, code, fields",
    [
        (404, "model", "model_not_found", {"model": "other"}),
        (400, "temperature", "invalid_value", {"temperature": 3}),
        (400, "threshold", None, {"threshold": -1}),
        (400, "rule", None, {"rule": "no such"}),
        (400, "block_length", "invalid_value", {"block_length": 2**30}),
        (400, "block_length", None, {"block_length": 0}),
        (400, "max_tokens", "context_length_exceeded", {"max_tokens": 4096}),
        (400, None, "context_length_exceeded", {"messages": [{"role": "user", "content": "x" * 300}]}),
        (400, None, None, {"messages": [{"role": "user", "content": "raise"}]}),
        (400, "messages", None, {"messages": [{"role": "wizard", "content": "x"}]}),
        (400, "messages", None, {"messages": [{"role": "user", "content": 5}]}),
        (400, None, None, {"messages": [{"role": "user", "content": "\ud800"}]}),
        (400, None, None, {"messages": [{"role": "assistant", "content": "x"}]}),
        (400, "chat_template_kwargs", None, {"chat_template_kwargs": {"messages": []}}),
        (400, "top_logprobs", "unsupported", {"logprobs": True, "top_logprobs": 1, "temperature": 0.5}),
        (400, "n", "invalid_value", {"n": 128}),
        (400, "response_format", "unsupported", {"response_format": {"type": "json_object"}}),
    ],
)
def test_what_is_wrong_is_told_as_openai_tells_it(server, status, param, code, fields):
    with pytest.raises(openai.APIStatusError) as caught:
        body = json.dumps({"model": "tiny", "messages": HI} | fields).encode()
        server.client.post(
            "/chat/completions", content=body, cast_to=object, options={"headers": {"Content-Type": "application/json"}}
        )
    error = caught.value
    assert (error.status_code, error.param, error.code) == (status, param, code), error.message
    assert error.type == "invalid_request_error" and "Traceback" not in error.message


def test_ids_that_the_model_does_not_know_are_refused(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(model="tiny", prompt=[10**6])
    assert caught.value.param == "prompt"


def test_models_are_listed(server):
    assert [model.id for model in server.client.models.list()] == ["tiny", "alias"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_curl_is_served(server, expected):
    def curl(*arguments):
        done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    address, json_body = f"{server.url}/v1/completions", ("-H", "Content-Type: application/json")
    found = curl(address, *json_body, "-d", '{"model": "tiny", "prompt": "hello"}')
    assert json.loads(found)["choices"][0]["text"] == expected("hello").text
    lines = curl("-N", address, *json_body, "-d", '{"model": "tiny", "prompt": "hello", "stream": true}').split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith(("data: ", ": ")) for line in lines[:-1])
    assert json.loads(curl(f"{server.url}/health"))["status"] == "ok"
    assert json.loads(curl(f"{server.url}/v1/nothing"))["error"]["type"] == "invalid_request_error"
    assert "application/json" in json.loads(curl(address, "-d", "{}"))["error"]["message"]


def test_metrics_count_what_was_served(server):
    def value(name):
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    good = 'llada_jax_http_requests_total{code="200",route="/v1/completions"}'
    names = [good, "llada_jax_tokens_total", "llada_jax_first_block_seconds_count", "llada_jax_answer_seconds_count"]
    before = [value(name) for name in names]
    server.client.completions.create(model="tiny", prompt="a", max_tokens=5)
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 5, 1, 1]
    server.http.get("/no/such/path")
    assert value('llada_jax_http_requests_total{code="404",route="other"}') >= 1
    assert value("llada_jax_rows") == 4 and value("llada_jax_busy") == 0
