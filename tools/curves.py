"""Plot the held-out score of the first command's three seeds over optimizer steps -> curves.png.

    python tools/curves.py

shapes-p2-seedSEED.jsonl is the eval.jsonl of
`python train.py --model shapes --no-kl --filter-low --ratio mean --seed SEED`.
"""
import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"


def plot(runs: dict, path):
    """Draw one line per run {label: rows of eval.jsonl}, and the score of the base, into a PNG."""
    first = next(iter(runs.values()))
    steps, base = [row["step"] for row in first], first[0]["overall"]
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.axhline(base, color="gray", linestyle="--", linewidth=1)
    axes.annotate(f"base {base:.3f}", (steps[-1], base), (0, 4), textcoords="offset points",
                  ha="right", color="gray")
    for label, rows in runs.items():
        axes.plot(steps, [row["overall"] for row in rows], marker="o", label=label)
    axes.set(xlabel="optimizer steps", ylabel="GenEval score, held-out prompts",
             xticks=steps, ylim=(0.45, 0.95))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=RESULTS / "curves.png")
    args = p.parse_args()
    runs = {}
    for path in sorted(RESULTS.glob("shapes-p2-seed*.jsonl")):
        seed = path.stem.removeprefix("shapes-p2-seed")
        runs[f"seed {seed}"] = [json.loads(line) for line in path.read_text().splitlines()]
    plot(runs, args.out)


if __name__ == "__main__":
    main()
