"""Plot what runs of train.py have logged: score, reward, entropy, ratio, norms.

    python tools/curves.py runs/A [runs/B ...] --out curves.png

metrics.jsonl and eval.jsonl have a JSON object a line; pandas.read_json(path, lines=True) reads
them, too.
"""
import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.run import read_rows  # noqa: E402

# file, column, title
PANELS = (("eval", "overall", "score of the evaluation"), ("metrics", "reward_mean", "reward"),
          ("metrics", "entropy", "entropy of new tokens, nats"),
          ("metrics", "ratio_max", "largest ratio (Eq. 11)"),
          ("metrics", "grad_norm", "norm of the gradient"), ("metrics", "kl_ref", "KL to the base"))


def plot(runs, path):
    """Draw a panel for each column, a line for each run folder."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (file, column, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for run in runs:
            rows = [row for row in read_rows(run / f"{file}.jsonl") if row.get(column) is not None]
            axes.plot([row["step"] for row in rows], [row[column] for row in rows],
                      marker="o" if file == "eval" else None, label=run.name)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of train.py")
    p.add_argument("--out", type=Path, default=Path("curves.png"), help="the picture (%(default)s)")
    args = p.parse_args()
    empty = [str(run) for run in args.runs if not read_rows(run / "metrics.jsonl")]
    if empty:
        p.error(f"no steps in {', '.join(empty)}/metrics.jsonl")
    plot(args.runs, args.out)


if __name__ == "__main__":
    main()
