"""Tables and pictures of the recorded ablations, in seconds.

    python experiments/ablations/report.py [MODEL]

draws experiments/ablations/results/MODEL/NAME.svg, prints the tables, and puts those of `tiny` into
experiments/README.md. A value is the mean over seeds ± its standard error. A difference is taken within a seed
first: the runs of a seed read the same rows in the same order and are scored on the same masks. It is bold where it
exceeds 95% of Student's t of so few seeds (4.3 standard errors of three).
"""

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from runs import ABLATIONS, Ablation, Column

from llada_jax import config_flag

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # of 95%, two-sided, by the number of seeds
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, which colour-blind readers tell apart


def read(ablation: Ablation, folder: Path) -> list[dict]:
    """[{run: record}] of the seeds that have all runs of the ablation. folder: results/MODEL."""
    if ablation.elsewhere:
        return list(_post_training(folder.name))
    seeds = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]
    return [seed for seed in seeds if all(run in seed for run in ablation.runs)]


def _post_training(model: str) -> Iterator[dict]:
    """The stages that experiments/post_training has recorded, as runs."""
    folder = HERE.parent / "post_training"
    for path in sorted((folder / "results" / model).glob("*.json")):
        runs = {}
        for stage, recorded in json.loads(path.read_text())["stages"].items():
            config = config_flag.load([f"--config={folder / 'config.py'}:{stage},{model}"])
            names = {"right": "score", "tokens_per_forward": "tokens_per_forward", "nelbo": "held_out_nelbo"}
            runs[stage] = {
                "scores": {key: [recorded[name]] for key, name in names.items()},
                "tokens": config.schedule.steps * config.batch.rows * config.data.length,
                "train_seconds": recorded["train_seconds"],
            }
        yield runs


def value(record: dict, column: Column) -> float:
    """Of one run, in the units of the column."""
    if column.key == "gradient_norm":  # geometric mean of the warm-up, but for its steps at block size 1
        norms = record["gradient_norm"]
        return float(np.exp(np.log(norms[len(norms) // 10 : 4 * len(norms) // 10]).mean()))
    return record["scores"][column.key][0] * column.scale


def values(seeds: list[dict], run: str, column: Column) -> np.ndarray:
    return np.array([value(seed[run], column) for seed in seeds])


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and its standard error, nan of one seed."""
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")


def cell(x: np.ndarray, digits: int, signed: bool = False, mark: bool = False) -> str:
    mean, error = mean_and_error(x)
    text = f"{mean:{'+' if signed else ''}.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if mark and abs(mean) > STUDENT.get(len(x), 2.0) * error else text


def table(ablation: Ablation, seeds: list[dict]) -> str:
    """Markdown, and a line that says the cost."""
    first, *_ = ablation.runs
    compared = [column for column in ablation.columns if column.key in ablation.compared]
    headings = [column.heading for column in ablation.columns]
    headings += [f"{column.heading}: difference" for column in compared] + ["tokens, thousands", "seconds"]
    lines = [f"| | {' | '.join(headings)} |", f"|{'---|' * (len(headings) + 1)}"]
    for run, label in ablation.runs.items():
        cells = [cell(values(seeds, run, column), column.digits) for column in ablation.columns]
        for column in compared:
            difference = values(seeds, run, column) - values(seeds, first, column)
            cells.append("" if run == first else cell(difference, column.digits, signed=True, mark=True))
        cells += cost(seeds, run)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{_footer(ablation, seeds)}"


def _footer(ablation: Ablation, seeds: list[dict]) -> str:
    """Seeds, minutes, device and commit, in one line."""
    used = [seed[run] for seed in seeds for run in ablation.runs]
    minutes = sum(record.get("train_seconds", 0) + record.get("score_seconds", 0) for record in used) / 60
    if ablation.elsewhere:
        return f"{len(seeds)} seeds, recorded by experiments/post_training; {minutes:.0f} minutes of training."
    devices = ", ".join(sorted({record["device"] for record in used}))
    commits = ", ".join(sorted({record["code"].removeprefix("llada_jax, commit ")[:10] for record in used}))
    return f"{len(seeds)} seeds; {minutes:.0f} minutes in all on {devices}; commit {commits}."


def cost(seeds: list[dict], run: str) -> list[str]:
    """Thousands of tokens read and mean seconds of training, both per seed."""
    if "tokens" not in seeds[0][run]:  # a merge
        return ["", ""]
    seconds = np.mean([seed[run]["train_seconds"] for seed in seeds])
    return [f"{seeds[0][run]['tokens'] / 1000:.0f}", f"{seconds:.0f}"]


def draw(ablation: Ablation, seeds: list[dict], path: Path) -> None:
    """A panel a column: every seed a dot, the mean with its standard error beside it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "llada_jax", "font.family": "sans-serif"}
    from matplotlib import pyplot

    count = len(ablation.columns) + ablation.gradients
    figure, panels = pyplot.subplots(
        1, count, figsize=(1.8 + 2.3 * count, 0.9 + 0.42 * len(ablation.runs)), layout="constrained", squeeze=False
    )
    for place, (panel, column) in enumerate(zip(panels[0], ablation.columns, strict=False)):
        for row, run in enumerate(ablation.runs):
            scores = values(seeds, run, column)
            mean, error = mean_and_error(scores)
            color = COLORS[row % len(COLORS)]
            panel.plot(scores, [row] * len(scores), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
            panel.errorbar(mean, row, xerr=np.nan_to_num(error), fmt="|", color=color, markersize=11, capsize=3)
        panel.set_title(column.heading.replace(", scored", ",\nscored"), fontsize=9)
        panel.set_yticks(range(len(ablation.runs)), list(ablation.runs.values()) if place == 0 else [])
        panel.set_ylim(len(ablation.runs) - 0.5, -0.5)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=4)
    if ablation.gradients:
        _draw_gradients(panels[0, -1], ablation, seeds)
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#e4e7ec")
        panel.set_axisbelow(True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_gradients(panel, ablation: Ablation, seeds: list[dict]) -> None:
    """The norm of the gradient before clipping over the first steps, geometric mean over seeds."""
    for row, run in enumerate(ablation.runs):
        norms = np.exp(np.log([seed[run]["gradient_norm"][:100] for seed in seeds]).mean(0))
        panel.plot(np.arange(1, len(norms) + 1), norms, color=COLORS[row % len(COLORS)], linewidth=1)
    panel.set_yscale("log")
    panel.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    panel.minorticks_off()
    panel.set_title("gradient norm by step", fontsize=9)
    panel.tick_params(labelsize=8)


def section(name: str) -> str:
    """What stands between the marks of README.md."""
    ablation = ABLATIONS[name]
    picture = f"![{ablation.title}](ablations/results/tiny/{name}.svg)"
    command = f"python experiments/ablations/run.py --ablation={name}"
    if ablation.elsewhere:
        command = "for seed in 0 1 2; do bash experiments/post_training/run.sh $seed; done"
    return f"{picture}\n\n{table(ablation, read(ablation, HERE / 'results' / 'tiny'))}\n\n    {command}\n"


def origin(record: dict) -> str:
    """What all text runs start from, in words. record: ar.json."""
    ar, four, blocks, full = (record["scores"][key][0] for key in ("ar", "4", "32", "full"))
    documents, tokens = record["text"]["documents"], record["text"]["tokens"] / 1e6
    parameters, seen, minutes = record["parameters"] / 1e6, record["tokens"] / 1e6, record["train_seconds"] / 60
    words = (
        f"The AR model has {parameters:.1f} M parameters and a vocabulary of 512; it was trained on {seen:.1f} M tokens"
        f" in {minutes:.0f} minutes on {record['device']}. The text is the functions of the standard library of Python "
        f"{record['python']}: {documents:,} documents, {tokens:.1f} M tokens. On held-out rows the AR loss is {ar:.3f} "
        f"nats per token; read as a block-diffusion model before any conversion, its NELBO is {four:.3f} at "
        f"block size 4, {blocks:.3f} at 32 and {full:.3f} over the full sequence."
    )
    return textwrap.fill(words, 120) + "\n"


def marked(text: str, name: str, new: str) -> str:
    """`text` with what stands between the marks of the ablation replaced."""
    begin, end = f"<!-- ablation {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        sys.exit(f"error: {README}: no {begin.strip()} and {end}")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{new}{end}", text, flags=re.DOTALL)


def main(model: str = "tiny") -> None:
    folder = HERE / "results" / model
    text = README.read_text()
    for name, ablation in ABLATIONS.items():
        if not (seeds := read(ablation, folder)):
            print(f"{name}: no seed has all of its runs")
            continue
        draw(ablation, seeds, folder / f"{name}.svg")
        if model == "tiny":
            text = marked(text, name, section(name))
        print(f"\n{ablation.title}\n\n{table(ablation, seeds)}")
    if model == "tiny":
        README.write_text(marked(text, "ar", origin(json.loads((folder / "ar.json").read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
