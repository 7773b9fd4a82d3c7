"""The numbers of one seed, and the table over all recorded seeds.

    python experiments/post_training/report.py --collect FOLDER OUT.json     # one seed, at the end of run.sh
    python experiments/post_training/report.py [MODEL]                       # the table of results/MODEL/*.json

Standard errors are over seeds. A ratio or a difference is taken within a seed first.
"""

import json
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_name("results")
STAGES = {
    "ar": "AR model, one token a pass",
    "wsd": "WSD",
    "sft": "SFT, complementary masks",
    "sft_single": "SFT, single masks, equal positions",
    "sft_longer": "SFT, as many steps more as CAP",
    "cap": "CAP",
    "dpo": "DPO",
}


def collect(folder: Path) -> dict:
    """All numbers of one seed for the table, from the files that run.sh wrote."""
    stages = {}
    trained = [stage for stage in STAGES if (folder / stage / "metrics.jsonl").exists()]  # an imported AR model is not
    for stage in trained:
        answered = json.loads((folder / f"{stage}.json").read_text())
        rows = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "nelbo" in row][-1]
        stages[stage] = {
            name: answered[name]
            for name in ("questions", "score", "score_stderr", "tokens_per_forward", "tokens_per_forward_stderr")
        } | {"block_size": last["block_size"], "held_out_nelbo": last["nelbo"]}
        stages[stage]["train_seconds"] = int((folder / f"train_{stage}.done").read_text())
    preference = [row for row in rows if "preference_accuracy" in row and "loss" not in row][-1]
    seconds = sum(int(path.read_text()) for path in folder.glob("*.done"))
    return {"seed": int(folder.name), "minutes": round(seconds / 60, 1), "stages": stages, "preference": preference}


def mean(values, digits: int, percent: bool = False) -> str:
    """mean ± standard error over seeds."""
    values = np.asarray(values, float) * (100 if percent else 1)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def table(seeds: list[dict]) -> str:
    def over(stage, name):
        return np.array([seed["stages"][stage][name] for seed in seeds])

    lines = ["| after | right answers, % | tokens per forward | held-out NELBO, nats per token |", "|---|---|---|---|"]
    for stage in seeds[0]["stages"]:
        title = STAGES[stage]
        lines.append(
            f"| {title} | {mean(over(stage, 'score'), 1, percent=True)} | {mean(over(stage, 'tokens_per_forward'), 2)} "
            f"| {mean(over(stage, 'held_out_nelbo'), 4)} |"
        )
    speed, score = "tokens_per_forward", "score"
    preferred = [seed["preference"]["preference_accuracy"] for seed in seeds]
    lines += [
        "",
        f"- CAP against the same steps of SFT: {mean(over('cap', speed) / over('sft_longer', speed), 2)} times the "
        f"tokens per forward, {mean(over('cap', score) - over('sft_longer', score), 1, percent=True)} points of "
        "accuracy.",
        f"- Against SFT before it: {mean(over('cap', speed) / over('sft', speed), 2)} times, "
        f"{mean(over('cap', score) - over('sft', score), 1, percent=True)} points.",
        "- Complementary pairs against single masks at equal positions: "
        f"{mean(over('sft', score) - over('sft_single', score), 1, percent=True)} points of accuracy, "
        f"{mean(over('sft', 'held_out_nelbo') - over('sft_single', 'held_out_nelbo'), 4)} nats per token.",
        f"- DPO: {mean(preferred, 1, percent=True)} % of the held-out pairs preferred.",
        f"- {len(seeds)} seeds, {mean([seed['minutes'] for seed in seeds], 0)} minutes each.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--collect"]:
        folder, out = map(Path, argv[1:])
        out.parent.mkdir(exist_ok=True, parents=True)
        out.write_text(json.dumps(collect(folder), indent=2) + "\n")
        print(f"{out}: written")
        return
    results = RESULTS / (argv[0] if argv else "tiny")
    seeds = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    if not seeds:
        sys.exit(f"error: {results}: no recorded seed; run experiments/post_training/run.sh SEED")
    print(table(seeds))


if __name__ == "__main__":
    main(sys.argv[1:])
