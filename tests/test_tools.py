"""The command lines, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llada_jax.checkpoint.weights import write_weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.chat import TURNS
from llada_jax.data.pack import pack
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.tokenizer import load_tokenizer
from tests.helpers import command_lines
from tests.helpers.environment import process_environment, xla_flags
from tests.helpers.foreign_tokenizers import llama_like

ROOT = Path(__file__).parent.parent


def run(tool, *arguments, **options):
    return command_lines.run([ROOT / "tools" / f"{tool}.py", *arguments], **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of one layer with a byte tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("tools") / "checkpoint")


def write_checkpoint(folder, before_messages=b""):
    config = preset("tiny").replace(num_layers=1)
    params = parameters.initialize(config, jax.random.key(0))
    files = byte_tokenizer(config.eos_token_id, config.mask_token_id).files
    files |= {"chat_template.jinja": before_messages + b"{% for m in messages %}{{ m.content }}|{% endfor %}"}
    leaves = parameters.unstack(params, config)
    write_weights(folder, config, leaves.items(), files, {})
    return folder


def test_generate_takes_the_day_of_the_chat_template(checkpoint, tmp_path):
    dated = write_checkpoint(tmp_path / "dated", b"{{ strftime_now('%d %b %Y') }}")
    arguments = "--prompt=a", "--chat", "--gen_length=4", "--block_length=4", "--template_date=2031-01-02"
    done = run("generate", f"--checkpoint={dated}", *arguments)
    assert done.returncode == 0, done.stderr
    done = run("generate", f"--checkpoint={checkpoint}", *arguments)
    assert done.returncode == 2 and "template_date 2031-01-02: the chat template writes no date" in done.stderr


def test_generate_a_prompt_and_draw_how_the_answer_filled(checkpoint, tmp_path):
    arguments = f"--checkpoint={checkpoint}", "--prompt=def f(", "--gen_length=8", "--block_length=4"
    done = run("generate", *arguments, "--trajectory", f"--save={tmp_path / 'filled.svg'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(") and "tokens per forward" in done.stdout and "0 commit" in done.stdout
    assert "block   2" in done.stdout and "steps" in (tmp_path / "filled.svg").read_text()
    done = run("generate", *arguments, f"--save={tmp_path / 'filled.html'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("filled.html\n") and '"prompt": "def f("' in (tmp_path / "filled.html").read_text()


def test_generate_with_edits_that_delete_and_insert(checkpoint):
    ids = "--rule=llada2.2", "--delete_id=5", "--insert_id=6", "--editing_threshold=0", "--max_steps_per_block=20"
    done = run("generate", f"--checkpoint={checkpoint}", "--prompt=a", "--gen_length=6", "--block_length=4", *ids)
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr


def test_an_answer_is_printed_as_the_rest_of_its_prompts_text(tmp_path):
    """Of a SentencePiece-like tokenizer, behind a beginning of sequence: when streamed, and of a file of prompts."""
    tokenizer = llama_like(bos=True)
    config = preset("tiny").replace(num_layers=1)
    leaves = {name: np.zeros(p.shape, np.float32) for name, (p, _) in parameters.leaves(config).items()}
    for name in ("embedding", "final_norm"):
        leaves[name][:] = 1
    leaves["head"][:, tokenizer.token_to_id("▁the")] = 1  # whatever comes before it
    write_weights(tmp_path / "checkpoint", config, leaves.items(), tokenizer.files, {})
    arguments = f"--checkpoint={tmp_path / 'checkpoint'}", "--gen_length=4", "--block_length=2"
    done = run("generate", *arguments, "--prompt=the", "--trajectory")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the the the the the\n") and done.stdout.count("·the") == 4
    assert "1 prefill" in done.stdout  # of [<s> the]: a whole block
    (tmp_path / "in.jsonl").write_text('{"prompt": "the"}\n')
    arguments = *arguments, f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"
    for add_bos, passes in ((), 1), (("--add_bos=false",), 0):
        assert run("generate", *arguments, *add_bos).returncode == 0
        row = json.loads((tmp_path / "out.jsonl").read_text())
        assert row["answer"] == " the the the the" and row["prefill_passes"] == passes


def test_generate_from_jsonl_with_settings_of_each_line(checkpoint, tmp_path):
    prompts = [{"prompt": text, "id": i} for i, text in enumerate(["a", "bb", "ccc"])]
    prompts[1] |= {"gen_length": 2, "temperature": 0.5, "seed": 3}
    prompts[2] |= {"steps": 3}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    output = tmp_path / "new" / "out.jsonl"
    arguments = f"--checkpoint={checkpoint}", f"--input={tmp_path / 'in.jsonl'}", "--gen_length=4", "--batch=2"
    done = run("generate", *arguments, f"--output={output}", "--block_length=4")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert all(row["tokens"] <= 4 and row["forward_passes"] >= 1 and isinstance(row["answer"], str) for row in rows)
    assert rows[1]["tokens"] <= 2 and rows[2]["steps"] == 3  # what was the row's own stays
    for row in rows:
        assert row["tokens"] == len(row["token_ids"]) == len(row["generated_steps"]) == len(row["confidences"])
        passes = row["forward_passes"] + row["commit_passes"] + row["prefill_passes"]
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / passes, abs=1e-3)


def test_generate_writes_what_a_replay_needs_when_asked_to(checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "abcde"}\n{"prompt": "bb", "active_blocks": 2}\n')
    output = tmp_path / "out.jsonl"
    arguments = f"--checkpoint={checkpoint}", f"--input={tmp_path / 'in.jsonl'}", f"--output={output}"
    arguments += "--gen_length=5", "--block_length=4", "--rule=llada2.1", "--threshold=0.1", "--replay", "--history"
    done = run("generate", *arguments)
    assert done.returncode == 0, done.stderr
    for row in map(json.loads, output.read_text().splitlines()):
        history, length = row["history"], len(row["replay_token_ids"])
        assert row["stop_length"] == row["tokens"] <= length == len(row["replay_steps"])
        assert row["replay_token_ids"][: row["tokens"]] == row["token_ids"]
        final = dict(zip(history["positions"], history["token_ids"], strict=True))
        assert [final[i] for i in range(length)] == row["replay_token_ids"]
        assert history["forwards"] == sorted(history["forwards"]) and len(history["steps"]) >= length
        assert len(row["replay_confidences"]) == length and len(history["confidences"]) == len(history["steps"])
    done = run("generate", f"--checkpoint={checkpoint}", "--prompt=a", "--history")
    assert done.returncode == 2 and "--replay and --history are for the lines of --output" in done.stderr


def test_generate_over_a_mesh_answers_as_one_device_does(checkpoint, tmp_path):
    """Over the devices that there are, unless told; the weights are laid out when they are loaded."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "{"ab" * i}"}}\n' for i in range(1, 9)))
    answers = {}
    for mesh in ("auto", "one", "data=2", "data=3"):
        arguments = f"--checkpoint={checkpoint}", f"--input={tmp_path / 'in.jsonl'}", "--gen_length=4", "--batch=8"
        arguments += f"--output={tmp_path / mesh}.jsonl", "--block_length=4", f"--mesh={mesh}"
        done = run("generate", *arguments, XLA_FLAGS=xla_flags(2))
        if mesh == "data=3":
            assert done.returncode == 2 and "--mesh=data=3: 3 devices, there are 2" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        assert ("mesh: data 2" in done.stderr) == (mesh != "one")
        rows = (tmp_path / f"{mesh}.jsonl").read_text().splitlines()
        answers[mesh] = [json.loads(row)["token_ids"] for row in rows]
    assert answers["auto"] == answers["one"] == answers["data=2"]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"prompt": "a", "temprature": 0.5}', "temprature is no setting of a request; did you mean temperature?"),
        (
            '{"prompt": "a", "max_tokens": 3}',
            "max_tokens is no setting of a request; the settings are seed, gen_length",
        ),
        ('["a"]', "not a JSON object"),
        ('{"question": "a"}', 'expected "prompt" (text) or "messages" (list); the row has question'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "content[0] is of type 'image'"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}',
            "leaves out what tools say: 'f'",
        ),
    ],
)
def test_generate_names_the_line_that_it_cannot_answer(checkpoint, tmp_path, row, message):
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "a", "id": 1, "source": "s", "messages": null}}\n\n{row}\n')
    output = tmp_path / "out.jsonl"
    done = run("generate", f"--checkpoint={checkpoint}", f"--input={tmp_path / 'in.jsonl'}", f"--output={output}")
    assert done.returncode == 2 and f"error: {tmp_path / 'in.jsonl'}:3: " in done.stderr and message in done.stderr
    assert done.stderr.count("\n") == 1 and not output.exists()


def test_generate_holds_a_conversation(checkpoint):
    arguments = f"--checkpoint={checkpoint}", "--chat", "--gen_length=4", "--block_length=4"
    done = run("generate", *arguments, stdin="hello\nagain\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens per forward") == 2


def test_pack_then_evaluate(checkpoint, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the quick brown fox " * 40)
    packed = tmp_path / "rows"
    done = run(
        "pack_data", f"--source={tmp_path / 'text'}", f"--tokenizer={checkpoint}", f"--out={packed}", "--length=32"
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "out.json"
    done = run(
        "evaluate",
        f"--checkpoint={checkpoint}",
        f"--data={packed}",
        "--rows=4",
        "--block_sizes=1,8",
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["block 8"]["tokens"] == 4 * 32 - 31 and result["block 8"]["stderr"] > 0  # the last row is padded
    assert result["ar"]["tokens"] < result["block 1"]["tokens"]  # the first token of a document has no AR loss
    assert 1 < result["block 8"]["bits_per_byte"] and result["ar"]["perplexity"] > 1
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": "q" * n, "answer": "a" * n}) + "\n" for n in (3, 5)))
    output = tmp_path / "pairs.json"
    done = run(
        "evaluate", f"--checkpoint={checkpoint}", f"--data={pairs}", "--block_sizes=4,full", "--samples=2",
        "--repeats=2", f"--reference={checkpoint}", f"--output={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["full"]["tokens"] == result["block 4"]["tokens"] == 4 + 6 and result["full"]["noise_stderr"] > 0
    assert result["source ar"] == result["ar"]
    done = run("evaluate", f"--table={output}")
    assert done.stdout.startswith("| result | ar | block 4 | full | source ar |\n"), done.stderr


def test_evaluate_preference_of_a_checkpoint_with_itself(checkpoint, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in (5, 6, 4, 7)))
    pack(str(tmp_path / "text"), load_tokenizer(str(checkpoint / "tokenizer")), str(tmp_path / "rows"), 64)
    output = tmp_path / "out.json"
    arguments = "--task=preference", f"--checkpoint={checkpoint}", f"--reference={checkpoint}", "--samples=2"
    done = run("evaluate", *arguments, f"--data={tmp_path / 'rows'}", "--block_sizes=4", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "accuracy 0.000 ± 0.000   margin 0.0000 ± 0.0000" in done.stdout
    found = json.loads(output.read_text())
    assert found["block 4"]["pairs"] == 2 and found["block 4"]["variance"] == 0


def test_evaluate_one_question(checkpoint, tmp_path):
    """Its seed is that of the draws; it has no standard error; the folder of its result is made."""
    (tmp_path / "q.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "answer": 12}\n')
    arguments = "--task=answers", f"--checkpoint={checkpoint}", f"--data={tmp_path / 'q.jsonl'}", "--temperature=1"
    found = []
    for seed in (0, 1):
        folder = tmp_path / "new" / str(seed)
        written = f"--output={folder / 'out.json'}", f"--records={folder / 'records.jsonl'}", f"--seed={seed}"
        done = run("evaluate", *arguments, "--gen_length=8", "--block_length=8", *written)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("score 0.0000 ± n/a over 1 questions")
        result = json.loads((folder / "out.json").read_text())
        assert result["score_stderr"] is result["tokens_per_forward_stderr"] is None and result["seed"] == seed
        found.append(json.loads((folder / "records.jsonl").read_text())["answer"])
    assert found[0] != found[1]


def test_evaluate_needles_at_twice_the_context(checkpoint, tmp_path):
    output = tmp_path / "out.json"
    arguments = "--context=300", "--questions=2", "--gen_length=4", "--block_length=4", "--yarn=2"
    done = run("evaluate", "--task=needle", f"--checkpoint={checkpoint}", *arguments, f"--output={output}")
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["yarn"] == result["model"]["rope_scaling"]["factor"] == 2 and result["questions"] == 2
    assert result["model"]["max_position_embeddings"] == 2 * result["model"]["rope_scaling"]["original_length"]
    assert 2**26 < result["peak_memory_bytes"] < 2**34


def test_verify(checkpoint):
    done = run("verify_checkpoint", f"--checkpoint={checkpoint}")
    assert done.returncode == 0 and done.stdout.startswith("ok: ")


@pytest.mark.parametrize(
    "tool,arguments,message",
    [
        ("generate", ["--checkpoint=/nowhere", "--prompt=x"], "/nowhere"),
        ("generate", ["--prompt=x"], "--checkpoint"),
        ("generate", ["--checkpoint=CHECKPOINT", "--prompt=x", "--rule=best"], "rule='best'"),
        ("generate", ["--checkpoint=CHECKPOINT", "--prompt=x", "--rule=llada2.2"], "give delete_id"),
        ("generate", ["--checkpoint=CHECKPOINT", "--prompt=x", "--gen_length=0"], "gen_length=0"),
        ("generate", ["--checkpoint=CHECKPOINT", "--input=/nowhere.jsonl", "--output=/tmp/x"], "/nowhere.jsonl"),
        ("generate", ["--checkpoint=CHECKPOINT", "--prompt=x", "--save=picture.txt"], "--save=picture.txt"),
        ("generate", ["--checkpoint=CHECKPOINT", "--prompt=x", "--output=/tmp/x"], "--input"),
        ("bench", ["decode", "--parts=speed"], "--parts=speed"),
        ("bench", ["--layers=3", "attention"], "--layers=3 is for convert, not for attention"),
        ("bench", ["layers"], "expected a command, one of attention, train"),
        ("evaluate", ["--task=nelbo", "--gen_length=3"], "--gen_length=3 is for reasoning_gym, answers, needle, human"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--data=/nowhere"], "/nowhere"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--data=x", "--task=mmlu"], "mmlu"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--data=x", "--task=preference"], "--task=preference needs one"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=humaneval"], "--allow_code_execution"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=needle", "--yarn=0.5"], "yarn"),
        ("evaluate", ["--table=/nowhere.json"], "/nowhere.json"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=needle", "--yarn=nan"], "--yarn=nan"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=needle", "--beta=nan"], "--beta=nan"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=needle", "--threshold=nan"], "threshold=nan"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=needle", "--seed=-1"], "seed"),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--task=needle", "--output=/dev/null/x"], "/dev/null/x: "),
        ("evaluate", ["--checkpoint=CHECKPOINT", "--data=x", "--records=r.jsonl"], "--records=r.jsonl"),
        ("verify_checkpoint", ["--checkpoint=/nowhere"], "/nowhere"),
        ("verify_checkpoint", [], "--checkpoint"),
        ("inspect_checkpoint", ["--checkpoint=/nowhere"], "/nowhere"),
        ("pack_data", ["--source=/nowhere", "--tokenizer=CHECKPOINT", "--out=/tmp/no", "--length=8"], "/nowhere"),
        ("hf_to_orbax", ["--source=/nowhere", "--out=/tmp/no"], "/nowhere"),
        ("hf_to_orbax", ["--source=/nowhere", "--out=/tmp/no", "--precision=8"], "precision"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, tool, arguments, message):
    done = run(tool, *(a.replace("CHECKPOINT", str(checkpoint)) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0 and done.stderr.startswith("error: ") and message in done.stderr
    assert not Path("/tmp/no").exists()


@pytest.mark.parametrize("tool", ["generate", "evaluate", "hf_to_orbax", "pack_data", "inspect_checkpoint"])
def test_help_shows_flags_and_use(tool):
    """In a process of its own, which has imported nothing yet."""
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--help"]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 0 and f"tools/{tool}.py" in done.stdout and "--" in done.stdout
    assert ("--gen_length" in done.stdout) == (tool == "generate")
    assert (f"--turns: <{'|'.join(TURNS)}>" in done.stdout) == (tool == "pack_data")


@pytest.mark.parametrize(
    "arguments,shown,hidden",
    [
        (["bench"], ["tools/bench.py COMMAND", "attention  Attention of", "--json"], ["--topology"]),
        (["bench", "convert"], ["tools/bench.py convert [--layers=6]", "--layers", "--json"], ["--topology", "tiles"]),
        (["bench", "--topology=v5p:2x2x1", "attention"], ["--topology", "--passes"], ["--layers", "--parts"]),
        (["evaluate"], ["tools/evaluate.py", "needle  ", "--checkpoint"], ["--gen_length", "--context"]),
        (["evaluate", "--task", "needle"], ["--gen_length", "--context", "--seed"], ["--block_sizes", "--extract"]),
        (["evaluate", "--task=reasoning_gym:sum"], ["--gen_length", "--task_settings"], ["--samples", "--beta"]),
        (["evaluate", "--task=nelbo"], ["--block_sizes", "--repeats"], ["--gen_length", "--beta"]),
    ],
)
def test_every_command_and_task_has_a_help_of_its_own(arguments, shown, hidden):
    done = run(*arguments, "--help")
    assert done.returncode == 0 and not done.stderr
    assert [text for text in shown if text not in done.stdout] == []
    assert [text for text in hidden if text in done.stdout] == []


@pytest.mark.parametrize("tool,table,shared", [("bench", "COMMANDS", '("json",)'), ("evaluate", "TASKS", "_COMMON")])
def test_every_flag_is_of_a_command_or_of_all(tool, table, shared):
    """So that the help of one at least shows it."""
    code = f"""
from absl import flags
from tools.{tool} import *
import tools.{tool} as tool
shared = {shared if "(" in shared else "tool." + shared}
taken = {{name for command in {table}.values() for name in command.flags}}
modules = flags.FLAGS.flags_by_module_dict()
defined = {{flag.name for module in modules if "absl" not in module for flag in modules[module]}}
assert taken & set(shared) == set() and taken | set(shared) == defined, taken ^ defined
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=process_environment(), check=True)


def test_string_hashes_are_fixed_before_questions_are_made(tmp_path):
    """By starting the program again, with its arguments."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom llada_jax import command_line\ncommand_line.fix_string_hashes()\n"
        "print(os.environ['PYTHONHASHSEED'], hash('a'), *sys.argv[1:])\n"
    )
    free = {name: value for name, value in process_environment().items() if name != "PYTHONHASHSEED"}
    command = [sys.executable, str(program), "--x=a b", "c"]

    def said(env):
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert said(free) == said(free) == said(free | {"PYTHONHASHSEED": "0"})
    assert said(free).endswith(" --x=a b c\n") and said(free | {"PYTHONHASHSEED": "7"}).startswith("7 ")
