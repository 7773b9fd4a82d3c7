"""What the tests of the data room share: templates, readers of packed rows, kills, the tool, saved datasets."""

import json
import os
import pathlib
import types

import pyarrow as pa

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.data.order import Rows
from llada_jax.tokenizer import from_files
from tests.helpers import command_lines

ROOT = pathlib.Path(__file__).parents[2]
EOS = 256

CHATML = """
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LING = """
{{- '<role>SYSTEM</role>' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{%- if tools %}{{ '# Tools\\n<tools>' + (tools | tojson) + '</tools>' }}{% endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + message.content }}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|role_end|>' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<role>OBSERVATION</role>' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|role_end|>' }}{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""


def with_template(template, **changes):
    files = byte_tokenizer(EOS).files
    files |= {"chat_template.jinja": template.encode()} if template else {}
    tokenizer = json.loads(files["tokenizer.json"]) | changes
    return from_files(files | {"tokenizer.json": json.dumps(tokenizer).encode()})


def message(role, content, **more):
    return {"role": role, "content": content} | more


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_saved_dataset(folder, *parts):
    """What `save_to_disk` of Hugging Face's datasets writes: a table per part, in batches of three rows."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / name), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "cache-0123456789abcdef.arrow").write_bytes(b"left by a map")
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", "_split": None}))
    return str(folder)


def read_back(out):
    opened = Rows(str(out), seed=0, shuffle=False)
    return [opened.at(i)[0] for i in range(len(opened))]


def contents(folder):
    """The files of a packed dataset; progress.json stays if the run died just before removing it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "progress.json"}


class Killed(BaseException):
    pass


def kill_everywhere(run, folder, monkeypatch):
    """Kills run(out) before and after every step that leaves a trace, and expects that a second run ends in the bytes
    of an uninterrupted one. Returns the number of kills."""
    run(folder / "whole")
    expected, replace = contents(folder / "whole"), os.replace
    for point in range(200):
        # Files get their names through os.replace, so this dies before or after each of its calls.
        calls = 0

        def die(old, new, point=point):
            nonlocal calls
            calls += 1
            if calls == point // 2 + 1:
                if point % 2:
                    replace(old, new)
                raise Killed
            replace(old, new)

        out = folder / f"killed{point}"
        monkeypatch.setattr(os, "replace", die)
        try:
            run(out)
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            run(out)
            assert contents(out) == expected
        else:
            monkeypatch.setattr(os, "replace", replace)
            return point
    raise AssertionError("more steps than expected")


def run_tool(**flag_values):
    """tools/pack_data.py with --name=value flags; None is a flag that is set."""
    given = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flag_values.items()]
    return command_lines.run([ROOT / "tools" / "pack_data.py", *given])


def write_tokenizer(folder, tokenizer):
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def numbers_tokenizer(ids):
    """What pack needs of a tokenizer, for which every text is `ids`."""
    return types.SimpleNamespace(
        digest="0",
        identity=lambda chat: "0",
        eos_id=None,
        adds_bos=False,
        document_prefix=[],
        begun=list,
        encode_batch=lambda batch: [ids for _ in batch],
    )
