"""Collects what run.sh measured into OUT.json, draws OUT.svg and prints the tables.

python experiments/conversion/report.py FOLDER OUT      # at the end of run.sh
python experiments/conversion/report.py OUT.json        # the tables of a recorded run
"""

import json
import sys
from pathlib import Path

THRESHOLDS = (0.95, 0.3)  # of prompts.jsonl
BLOCKS = (4, 32)  # block sizes of the samples
PHASE = ("step", "phase", "block_size")


def collect(folder: Path) -> dict:
    """{"seconds", "commit", "phases": rows of training, "measured": one entry per checkpoint, by tokens seen}."""
    config = json.loads((folder / "wsd" / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "wsd" / "metrics.jsonl").read_text().splitlines()]
    header = json.loads((folder / "ar" / "config.json").read_text())
    step_tokens = config["batch"]["rows"] * config["data"]["length"]
    measured = []
    for path in sorted((folder / "measured").glob("*.json"), key=lambda path: int(path.stem)):
        scores = json.loads(path.read_text())
        likelihood = {name: entry for name, entry in scores.items() if isinstance(entry, dict) and "nats" in entry}
        entry = {"step": int(path.stem), "tokens": int(path.stem) * step_tokens, "likelihood": likelihood}
        decoded = [_decoded(path, block) for block in BLOCKS if _answers(path, block).exists()]
        measured.append(entry | ({"decoding": decoded} if len(decoded) == len(BLOCKS) else {}))
    return {
        "code": header["code"],
        "minutes": round(sum(map(int, (folder / "seconds").read_text().split())) / 60, 1),
        "step_tokens": step_tokens,
        "phases": [{name: row[name] for name in PHASE} for row in rows if "phase" in row],
        "measured": measured,
    }


def _answers(path: Path, block: int) -> Path:
    return path.with_suffix(f".block{block}.jsonl")


def _decoded(path: Path, block: int) -> dict:
    """Tokens per denoising pass at each threshold, and the answers."""
    answers = [json.loads(line) for line in _answers(path, block).read_text().splitlines()]
    speeds = {}
    for threshold in THRESHOLDS:
        chosen = [row for row in answers if row["threshold"] == threshold]
        speeds[str(threshold)] = sum(r["tokens"] for r in chosen) / sum(r["forward_passes"] for r in chosen)
    samples = [{name: row[name] for name in ("prompt", "threshold", "answer")} for row in answers]
    return {"block": block, "tokens_per_forward": speeds, "samples": samples}


def table(record: dict) -> str:
    """Markdown: nats per token and tokens per forward (TPF, BLOCK at THRESHOLD) at each checkpoint; the AR skill."""
    names = list(record["measured"][0]["likelihood"])
    titles = {"ar": "AR loss", "full": "MDLM over the row"} | {n: n for n in names if n.startswith("block")}
    speeds = [(block, threshold) for block in range(len(BLOCKS)) for threshold in THRESHOLDS]
    heading = ["tokens seen", *(titles[name] for name in names)]
    heading += [f"TPF, {BLOCKS[block]} at {threshold}" for block, threshold in speeds]
    lines = [heading, ["---"] * len(heading)]
    for entry in record["measured"]:
        cells = [f"{e['nats']:.3f} ± {e['stderr']:.3f}" for e in (entry["likelihood"][name] for name in names)]
        decoded = entry.get("decoding")
        cells += [f"{decoded[b]['tokens_per_forward'][str(t)]:.2f}" if decoded else "n/a" for b, t in speeds]
        lines.append([f"{entry['tokens']:,}", *cells])
    first, last = (record["measured"][place]["likelihood"] for place in (0, -1))
    before, after = first["ar"]["nats"], last["block 1"]["nats"]
    end = (
        f"AR loss before {before:.3f}, NELBO at block size 1 after {after:.3f} nats per token: {after - before:+.3f}. "
        f"Before training the two differ by {abs(before - first['block 1']['nats']):.1e}. {record['minutes']} minutes."
    )
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", end])


def samples(record: dict) -> str:
    """The answer to the first prompt at each checkpoint, in blocks of BLOCKS[0] at the least threshold."""
    lines = []
    for entry in (entry for entry in record["measured"] if "decoding" in entry):
        row = next(s for s in entry["decoding"][0]["samples"] if s["threshold"] == min(THRESHOLDS))
        lines.append(f"{entry['tokens']:>9,}  {row['answer']!r}")
    return "\n".join(lines)


def draw(record: dict, path: str) -> None:
    """NELBO at each block size over the tokens seen, and the phases of the curriculum."""
    from llada_jax.monitoring.curves import draw_runs

    runs = {}
    for name in record["measured"][0]["likelihood"]:
        if name != "ar":  # that of block size 1
            runs[name] = [
                {"step": e["tokens"], "nelbo": e["likelihood"][name]["nats"]}
                | {"nelbo_stderr": e["likelihood"][name]["stderr"]}
                for e in record["measured"]
            ]
    phases = [row | {"step": row["step"] * record["step_tokens"]} for row in record["phases"]]
    first = next(iter(runs))
    draw_runs(runs | {first: phases + runs[first]}, path, "nelbo", x_label="tokens seen")


def main(source: str, out: str | None = None) -> None:
    if out is None:
        record = json.loads(Path(source).read_text())
    else:
        record = collect(Path(source))
        Path(f"{out}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(record, f"{out}.svg")
    print(table(record), samples(record), sep="\n\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
