"""Questions of reasoning-gym and of files: what is asked, what is right, and what is refused."""

import json

import pytest

from llada_jax.errors import InputError
from llada_jax.evaluation import questions
from tests.helpers.data_helpers import CHATML, message, with_template, write_rows


def test_reasoning_gym_questions_are_a_function_of_the_seed_and_score_their_own_solutions():
    import reasoning_gym

    settings = {"min_numbers": 3, "max_numbers": 5}
    found = questions.reasoning_gym_questions("number_filtering", 5, seed=3, settings=settings)
    data = reasoning_gym.create_dataset("number_filtering", seed=3, size=5, **settings)
    for question, entry in zip(found, data, strict=True):
        assert question.messages == [{"role": "user", "content": entry["question"]}]
        assert question.score(f" {entry['answer']}\n") == 1 and question.score("['0.123']") == 0


@pytest.mark.parametrize("name, settings", [("no_such_task", {}), ("number_filtering", {"min_lumbers": 3})])
def test_unknown_tasks_and_settings_are_named(name, settings):
    with pytest.raises(InputError, match=f"reasoning_gym:{name}: .*"):
        questions.reasoning_gym_questions(name, 5, settings=settings)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "q.jsonl:2: malformed JSON"),
        ('{"prompt": "a"}', 'q.jsonl:2: expected "answer"'),
        ('{"prompt": "a", "messages": [], "answer": "b"}', 'q.jsonl:2: expected "answer"'),
        ("3", 'q.jsonl:2: expected "answer"'),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        questions.file_questions(str(path))
    with pytest.raises(InputError, match="no such file"):
        questions.file_questions(str(tmp_path / "none.jsonl"))


def test_tools_and_the_system_turn_of_a_question_are_in_its_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [message("user", "Paris?")], "tools": tools, "system": "s", "answer": "sunny", "id": 3}
    path = write_rows(tmp_path / "q.jsonl", [row, row | {"messages": [{"role": "user"}]}])
    good, bad = questions.file_questions(path)
    whole = [message("system", "s"), message("user", "Paris?")]
    assert good.prompt(with_template(CHATML)) == with_template(CHATML).apply_chat_template(whole, tools=tools)
    plain = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match=r"q\.jsonl:1: the chat template leaves out what tools say: 'weather'"):
        good.prompt(plain)
    with pytest.raises(InputError, match=r"q\.jsonl:2: messages\[0\]: content is not a string"):
        bad.prompt(plain)
    with pytest.raises(InputError, match="prompt is empty"):
        questions.Question(None, "", float).prompt(plain)


def test_answers_by_pattern_and_the_part_that_counts(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "a", "answer": "12"}, {"prompt": "a", "pattern": "^1.$"}, {"prompt": "a", "pattern": "no"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    said = "so 3, no: The answer is 12."
    assert [question.score(said) for question in questions.file_questions(str(path))] == [0, 0, 1]
    for extract in (r"answer is (\d+)", r"\d+"):  # the first group, or the whole; of the last match
        assert [q.score(said) for q in questions.file_questions(str(path), extract=extract)] == [1, 1, 0]
        assert [q.score("none") for q in questions.file_questions(str(path), extract=extract)] == [0, 0, 0]
    with pytest.raises(InputError, match=r"extract='\('"):
        questions.file_questions(str(path), extract="(")
    path.write_text('{"prompt": "a", "pattern": "("}')
    with pytest.raises(InputError, match=r"q.jsonl:1: pattern='\('"):
        questions.file_questions(str(path))


def test_answers_of_files_are_graded_by_what_they_say(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "a", "answer": text} for text in ("1,234", "", 1234, 0.5)] + [{"prompt": "a", "pattern": ".*"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    for said, scores in (("1234.", [1, 0, 1, 0, 1]), ("", [0, 1, 0, 0, 1]), ("0.50", [0, 0, 0, 1, 1])):
        assert [question.score(said) for question in questions.file_questions(str(path))] == scores, said
    marked = questions.file_questions(str(path), extract=r"A: (\d+)|B: (\d+)")
    for said, scores in (("B: 1234", [1, 0, 1, 0, 1]), ("1234", [0] * 5), ("A: 11234", [0, 0, 0, 0, 1])):
        assert [question.score(said) for question in marked] == scores, said
