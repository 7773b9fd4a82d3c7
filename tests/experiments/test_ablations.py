"""The ablations: documents, declared runs, the driver end to end at a very small size, and the recorded tables."""

import functools
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from llada_jax.checkpoint import weights
from llada_jax.config_fields import flat
from llada_jax.data.pack_chat import pack_chat
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS, preset
from llada_jax.tokenizer import load_tokenizer
from llada_jax.training.config import check, phases
from tests.helpers.experiments import EXPERIMENTS, importable

FOLDER = EXPERIMENTS / "ablations"
NAMES = ("base", "functions", "records", "report", "runs")


@pytest.fixture(scope="module")
def ablations():
    """The modules of experiments/ablations, by name, as when run.py runs."""
    with importable("ablations"):
        yield {name: importlib.import_module(name) for name in NAMES}


@pytest.fixture
def place(ablations, tmp_path, monkeypatch):
    """A place with a model of 50 k parameters, and twenty modules of text."""
    small = preset("tiny").replace(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16, intermediate_size=64
    )
    monkeypatch.setitem(PRESETS, "tiny", small)
    base = ablations["base"]
    one = jax.devices()[:1]
    monkeypatch.setattr(base.loop, "train", functools.partial(base.loop.train, devices=one))
    jax.config.update("jax_disable_most_optimizations", True)  # these tests compile much and compute little
    yield base.Place("tiny", tmp_path / "out", tmp_path / "post_training", smoke=True)
    jax.config.update("jax_disable_most_optimizations", False)


SOURCE = '''
class A:
    @property
    def f(self):
        """Doc."""
        def inner():
            return 1
        return inner

    x = 1

async def g():
    pass
'''


def test_functions_come_whole_and_once(ablations):
    found = list(ablations["functions"].functions(SOURCE))
    assert [text.splitlines()[0] for text in found] == ["@property", "async def g():"]
    assert found[0].endswith("    return inner") and "inner():" in found[0] and "x = 1" not in found[0]


def test_every_run_has_a_valid_config_that_differs_in_its_fields_only(ablations, tmp_path, monkeypatch):
    base, runs = ablations["base"], ablations["runs"]
    monkeypatch.setattr(base, "start", lambda place, name, seed: name)
    (tmp_path / "0" / "wsd").mkdir(parents=True)
    for model in ("tiny", "smollm2_135m"):
        place = base.Place(model, tmp_path, tmp_path)
        tokens = {}
        for name, run in runs.RUNS.items():
            config = base.run_config(run, 0, place)
            check(config)
            if run.of_text:
                steps = sum(phase.steps for phase in phases(config))
                tokens[name] = steps * config.batch.rows * config.data.length
        assert len(set(tokens.values())) == 1, "text runs read equal tokens"
    reference, changed = (
        dict(flat(json.loads(base.run_config(runs.RUNS[name], 0, place).to_json())))
        for name in ("block_32", "no_document_mask")
    )
    differ = {field for field in reference if reference[field] != changed[field]}
    assert differ == {"schedule.kind", "objective.document_mask"}


def test_runs_are_shared_and_a_merge_brings_the_run_it_is_of(ablations):
    runs = ablations["runs"]
    assert runs.runs_of(["merge"])[0] == "wsd" and runs.runs_of(["curriculum", "merge"]).count("wsd") == 1
    assert set(runs.runs_of(runs.ABLATIONS)) == set(runs.RUNS) and not runs.runs_of(["complementary", "cap"])
    for ablation in runs.ABLATIONS.values():
        assert set(ablation.compared) <= {column.key for column in ablation.columns}


def test_dry_run_prints_the_command_of_every_run(ablations):
    records, base = ablations["records"], ablations["base"]
    place = base.Place("tiny", Path("out"), Path("post"))
    assert records.command(place, 1, "document_origin") == (
        "python -m llada_jax.train --config=experiments/ablations/config.py:wsd,tiny --workdir=out/document_origin-1 "
        "--config.seed=1 --config.data.path=out/rows --config.init_from=out/ar --config.objective.block_origin=document"
    )
    assert "--config.init_from=post/1/wsd --config.objective.rate_low" in records.command(place, 1, "band_wide")
    assert records.command(place, 0, "merge_3") == (
        "python tools/merge_checkpoints.py --workdir=out/wsd-0 --best=3 --out=out/merge_3-0"
    )


def test_text_runs_end_to_end(ablations, place, tmp_path, monkeypatch):
    """The AR model, a curriculum, its merges and a changed start; what is recorded is not done again."""
    records, base = ablations["records"], ablations["base"]
    functions = [f"def f{i}(x):\n    return x + {i} * {i + 7} - sum(range({i}))\n" for i in range(3000)]
    module = "\n".join(f"{text}\n" for text in functions)

    def write_modules(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "stdlib.jsonl").write_text(json.dumps({"text": module}) + "\n")

    monkeypatch.setattr(ablations["functions"].stdlib_text, "main", write_modules)
    monkeypatch.setattr(ablations["functions"], "SHORTEST", 20)
    results = tmp_path / "results"
    records.record_ar(place, results / "ar.json")
    names = ("wsd", "merge_3", "zero_mask_noise")
    assert all(records.finished(place, results / "0.json", 0, name) for name in names)
    record = json.loads((results / "0.json").read_text())
    assert list(record) == list(names)
    ar = json.loads((results / "ar.json").read_text())["scores"]
    assert ar["1"] == pytest.approx(ar["ar"], rel=1e-4), "at block size 1 the converted model is the AR model"
    assert set(record["wsd"]["scores"]) == {*base.LIKELIHOODS, "ar"}
    assert record["wsd"]["steps"] == len(record["wsd"]["gradient_norm"]) == 7
    assert record["zero_mask_noise"]["mask_embedding_norm"][0] == pytest.approx(0, abs=0.02)
    assert record["wsd"]["scores"] != record["merge_3"]["scores"] != record["zero_mask_noise"]["scores"]
    monkeypatch.setattr(records, "train_and_score", None)  # would fail if it were called
    assert all(records.finished(place, results / "0.json", 0, name) for name in names)
    record["wsd"]["changed"]["seed"] = 3
    records.write(results / "0.json", record)
    with pytest.raises(ValueError, match="wsd is of"):
        records.finished(place, results / "0.json", 0, "wsd")


def test_answer_runs_end_to_end(ablations, place, monkeypatch, capsys):
    records, base = ablations["records"], ablations["base"]
    assert not records.finished(place, place.out / "0.json", 0, "sft")
    assert "no wsd; run experiments/post_training/run.sh 0 first" in capsys.readouterr().out
    folder = place.post_training / "0"
    task = base.task
    monkeypatch.setattr(task, "SIZES", {"text": 100, "chats": 400, "questions": 2})
    task.main(str(folder), "0")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    pack_chat(str(folder / "chats.jsonl"), tokenizer, str(folder / "chats"), 128, block_align=16)
    model = PRESETS["tiny"].replace(alignment="shifted")
    leaves = parameters.unstack(parameters.initialize(model, jax.random.key(0)), model)
    leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    weights.write_weights(folder / "wsd", model, leaves.items(), tokenizer.files, {})
    assert records.finished(place, place.out / "0.json", 0, "sft")
    scores = json.loads((place.out / "0.json").read_text())["sft"]["scores"]
    assert set(scores) == {"right", "tokens_per_forward", "nelbo"} and scores["nelbo"][0] > 0


def record(nats, peak=1.0):
    scores = {key: [nats, 0.1] for key in ("1", "4", "32", "full", "32 unmasked", "32 document")}
    return {"scores": scores, "tokens": 2000, "train_seconds": 60.0, "score_seconds": 30.0, "device": "1 CPU core",
            "code": "llada_jax, commit abc", "gradient_norm": [peak, 0.5]}  # fmt: skip


def test_differences_are_taken_within_a_seed(ablations, tmp_path):
    report, runs = ablations["report"], ablations["runs"]
    seeds = [{"wsd": record(2.0 + seed), "no_document_mask": record(2.5 + seed + 0.01 * seed)} for seed in range(3)]
    ablation = runs.ABLATIONS["document_mask"]
    text = report.table(ablation, seeds)
    assert "| with | 3.000 ± 0.577 |" in text and "| without | 3.510 ± 0.583 |" in text
    assert "**+0.510 ± 0.006**" in text, "0.51 is far beyond 4.3 standard errors"
    assert text.endswith("3 seeds; 9 minutes in all on 1 CPU core; commit abc.")
    noisy = [{"wsd": record(2.0), "no_document_mask": record(2.0 + x)} for x in (-0.1, 0.0, 0.2)]
    assert "| +0.033 ± 0.088 |" in report.table(ablation, noisy)
    for number, seed in enumerate([*seeds, {"wsd": record(1.0)}]):
        (tmp_path / f"{number}.json").write_text(json.dumps(seed))
    assert report.read(ablation, tmp_path) == seeds, "the last one lacks a run"
    report.draw(ablation, seeds, tmp_path / "picture.svg")
    assert "scored without the mask" in (tmp_path / "picture.svg").read_text()


def test_the_tables_of_the_gallery_are_those_of_the_records(ablations):
    report = ablations["report"]
    text = report.README.read_text()
    ar = json.loads((FOLDER / "results" / "tiny" / "ar.json").read_text())
    assert report.marked(text, "ar", report.origin(ar)) == text
    for name, ablation in report.ABLATIONS.items():
        assert len(report.read(ablation, FOLDER / "results" / "tiny")) == 3
        assert report.marked(text, name, report.section(name)) == text
        assert (FOLDER / "results" / "tiny" / f"{name}.svg").stat().st_size < 100_000
