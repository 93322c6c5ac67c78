"""Compare the paper's choices, and some beyond it, on the tiny base.

    python results/experiments.py run [NAME ...]    # two at a time, a core each; can be stopped
    python results/experiments.py report            # experiments/README.md, a plot of each
    python results/experiments.py look              # the two factors of Eq. 14, by iteration

An experiment compares arms; an arm is DEFAULT with some flags of train.py exchanged, run once per
seed. A run leaves one row in experiments/rows.jsonl: flags, seed, evaluations (GenEval's overall
score and others, 63 held-out prompts x 8 pictures), and means over steps of what the log holds.
Arms with the same flags share their runs. experiments/notes.md holds what was predicted and found;
report puts tables and plots into it. Intervals are 95%, Student's t over seeds.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent / "experiments"
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import shapes  # noqa: E402
from checkpoint import read_rows  # noqa: E402
from common import flags_line  # noqa: E402

DEFAULT = dict(
    model="shapes", steps=24, prompts_per_step=12, group_size=8, unmask_steps=16, no_kl=True,
    filter_low=True, transition="p2", ratio="sum", inner_epochs=1, lr="7e-4", eval_every=12,
    sample_every=0, save_every=0)
SEEDS = {
    "recipe": range(4, 9),              # fresh ones, since the arms were chosen on the others
    "epochs-again": range(4, 9),
    "kl": range(1, 9),                  # since three told nothing
    "filter": range(1, 9),
}

# of the log, over steps; of a few steps with far ratios a mean would tell nothing else
MEANS = ("reward_mean", "reward_std", "adv_zero", "resampled", "grad_norm", "clip_fraction",
         "kl_ref", "entropy", "skipped", "s_rollout", "s_update", "s_step")
MEDIANS = ("ratio_max", "approx_kl")

# half width of a 95% interval in standard errors, by number of seeds
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# beside the overall score; families and exact are those of the last evaluation
COLUMNS = {
    "transition": ("exact", "objects", "reward_mean"),
    "beyond": ("exact", "objects", "s_update"),
    "recipe": ("exact", "objects", "s_step"),
    "transfer": ("single_object", "two_object", "colors", "color_attr", "counting", "position"),
    "filter": ("exact", "resampled", "adv_zero", "s_step"),
    "reduction": ("exact", "objects", "s_update", "s_step"),
    "kl": ("exact", "objects", "kl_ref", "s_step"),
    "groups": ("exact", "adv_zero", "resampled"),
    "epochs": ("exact", "clip_fraction", "ratio_max", "approx_kl"),
    "epochs-again": ("exact", "clip_fraction", "ratio_max", "approx_kl", "s_step"),
}


# ----------------------------------------------------------------------------------- experiments

T8 = dict(unmask_steps=8)           # several tokens move in an iteration; at T = 16 = N it is one
FORWARD = dict(trajectory="forward")
LONGER = dict(steps=40, eval_every=20)      # with a cheaper step, as many as take no more time
P1_MEAN = dict(transition="p1", ratio="mean")


def part(which, k):
    """Return the flags of a loss on k of the iterations."""
    return dict(loss_steps=k, loss_steps_from=which)


def epochs(n):
    """Return the words for n epochs."""
    return f"{n} epoch" if n == 1 else f"{n} epochs"


def transition_arms():
    """Return the arms of the transition probability: name -> flags that differ from the default."""
    rates = {
        "p2": ("7e-4", "1.4e-3", "3.5e-4", "1.75e-4"),
        "ar": ("7e-4", "1.4e-3", "3.5e-4", "1.75e-4"),
        "p1": ("7e-4", "3.5e-4", "1.75e-4"),
        "gumbel": ("7e-4", "3.5e-4"),
    }
    arms = {
        f"{kind}, lr {lr}": dict(transition=kind, lr=lr) for kind in rates for lr in rates[kind]}
    for lr in ("7e-4", "3.5e-4", "1.4e-3"):
        arms[f"p1, ratio mean, lr {lr}"] = dict(P1_MEAN, lr=lr)
    arms["ar, ratio mean, lr 7e-4"] = dict(transition="ar", ratio="mean")
    return arms


def beyond_arms():
    """Return the arms of what goes beyond the paper: name -> flags that differ from the default."""
    return {
        "default": {},
        "adv mean": dict(adv="mean"),
        "T 8": T8,
        "T 8, ratio mean": dict(T8, ratio="mean"),
        "forward, all 16": FORWARD,
        "forward, first 8": dict(FORWARD, loss_steps=8),
        "forward, first 4": dict(FORWARD, loss_steps=4),
        "forward, first 4, 40 steps": dict(FORWARD, **LONGER, loss_steps=4),
        "forward, ratio mean": dict(FORWARD, ratio="mean"),
        "p1, ratio mean": P1_MEAN,
        "p1, ratio mean, adv mean": dict(P1_MEAN, adv="mean"),
        "rollout, first 8": part("first", 8),
        "rollout, first 4": part("first", 4),
    }


def recipe_arms():
    """Return the arms of whole recipes: name -> flags that differ from the default."""
    return {
        "p2, lr 7e-4 (default)": {},
        "p1, lr 3.5e-4 (paper)": dict(transition="p1", lr="3.5e-4"),
        "p1, ratio mean": P1_MEAN,
        "forward, first 4, 40 steps": dict(FORWARD, **LONGER, loss_steps=4),
        "p2, last 4, 40 steps": dict(part("last", 4), **LONGER),
    }


def filter_arms():
    """Return the arms of the sample filter: name -> flags that differ from the default."""
    return {
        "percentile 10": {},
        "off": dict(filter_low=False),
        "percentile 0": dict(filter_percentile=0),
        "percentile 30": dict(filter_percentile=30),
        "percentile 30, 3 tries": dict(filter_percentile=30, max_resample=3),
    }


def reduction_arms():
    """Return the arms of the paper's reductions: name -> flags that differ from the default."""
    arms = {"all 16": {}}
    for k in (8, 4):
        for which in ("first", "last", "random", "critical"):
            arms[f"{which} {k}"] = part(which, k)
    return arms | {
        "last 4, 40 steps": dict(part("last", 4), **LONGER),
        "p1, last 8": dict(transition="p1", **part("last", 8)),
        "p1, ratio mean, first 8": dict(P1_MEAN, **part("first", 8)),
        "T 8": T8,
        "T 5": dict(unmask_steps=5),
    }


def kl_arms():
    """Return the arms of the KL: name -> flags that differ from the default."""
    arms = {}
    for lr in ("7e-4", "1.4e-3", "2.8e-3"):
        arms[f"beta 0, lr {lr}"] = dict(lr=lr)
        for beta in (0.01, 0.1):
            arms[f"beta {beta}, lr {lr}"] = dict(lr=lr, no_kl=False, kl_beta=beta)
    return arms


def groups_arms():
    arms = {"G 8, 12 prompts": {}}
    for G, P in ((4, 24), (16, 6), (32, 3)):
        # the filter warms up for four steps in every arm
        arms[f"G {G}, {P} prompts"] = dict(group_size=G, prompts_per_step=P, filter_warmup=4 * P)
    return arms


def epochs_arms():
    """Return the arms of inner epochs: name -> flags that differ from the default."""
    arms = {}
    for kind in ("p2", "p1"):
        for ratio in ("sum", "mean"):
            for n in (1, 2, 4):
                arms[f"{kind}, {ratio}, {epochs(n)}"] = dict(
                    T8, transition=kind, ratio=ratio, inner_epochs=n)
    for low, high in ((0.98, 1.02), (0, 100)):
        arms[f"p2, sum, 4 epochs, clip {low}-{high}"] = dict(
            T8, inner_epochs=4, clip_low=low, clip_high=high)
    return arms


EXPERIMENTS = {
    "transition": transition_arms(),
    "beyond": beyond_arms(),
    "recipe": recipe_arms(),
    "transfer": {"all six families": {}, "four families": dict(prompts="FOUR")},
    "filter": filter_arms(),
    "reduction": reduction_arms(),
    "kl": kl_arms(),
    "groups": groups_arms(),
    "epochs": epochs_arms(),
    "epochs-again": {f"p2, sum, {epochs(n)}": dict(T8, inner_epochs=n) for n in (1, 2, 4)},
}


def flags(arm):
    """Return the flags of train.py for an arm, as one line; FOUR stands for a file of prompts."""
    return flags_line(DEFAULT | arm)


def is_gone(arm):
    """Return whether train.py no longer has what an arm needs; commit c48f290 had it."""
    return arm.get("transition") == "gumbel" or arm.get("loss_steps_from") == "critical"


def seeds_of(name):
    return SEEDS.get(name, (1, 2, 3))


def runs_in(folder):
    """Return {(flags, seed): row} of the runs that are there."""
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["flags"], row["seed"]): row for row in map(json.loads, lines)}


# ------------------------------------------------------------------------------------------- run

def four_families():
    """Return the training prompts without counting and position, as jsonl."""
    lines = [row for row in shapes.prompts("train") if row["tag"] not in ("position", "counting")]
    return "".join(json.dumps(row) + "\n" for row in lines)


def row_of(line, seed, out):
    """Return the row that a run of train.py leaves; None when it was stopped before its end."""
    steps, evaluations = read_rows(out / "metrics.jsonl"), read_rows(out / "eval.jsonl")
    if f"--steps {evaluations[-1]['step']} " not in line:
        return None
    row = {"flags": line, "seed": seed, "eval": evaluations}
    for average, keys in ((statistics.fmean, MEANS), (statistics.median, MEDIANS)):
        for key in keys:
            values = [step[key] for step in steps if step.get(key) is not None]
            row[key] = round(average(values or [math.nan]), 5)
    return row


def train(line, seed, folder):
    """Run train.py with these flags and this seed, and add its row to folder/rows.jsonl."""
    with tempfile.TemporaryDirectory() as scratch:
        prompts, out = Path(scratch) / "four.jsonl", Path(scratch) / "run"
        prompts.write_text(four_families())
        command = [sys.executable, str(ROOT / "train.py"),
                   *line.replace("FOUR", str(prompts)).split(),
                   "--seed", str(seed), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            print(f"{line}, seed {seed}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return
        row = row_of(line, seed, out)
    if row is None:
        return
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{line}, seed {seed}: {row['eval'][-1]['overall']:.3f} ({row['s_step']:.1f} s a step)",
          flush=True)


def run(args):
    """Train every arm with every seed that has no row yet."""
    there, exchanged = runs_in(args.folder), dict(pair.split("=") for pair in args.set)
    todo = {}
    for name in args.names or EXPERIMENTS:
        for seed in args.seeds or seeds_of(name):
            for arm in EXPERIMENTS[name].values():
                job = flags(arm | exchanged), seed
                if not is_gone(arm) and job not in there:
                    todo[job] = None            # a set that keeps its order
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job, args.folder), todo))


# ---------------------------------------------------------------------------------------- report

def interval(values):
    """Return the mean and the half width of its 95% interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def last_scores(rows):
    """Return the overall scores of some runs at their last evaluations."""
    return [row["eval"][-1]["overall"] for row in rows]


def table(columns, arms):
    """Return the lines of a Markdown table of arms {label: rows of its seeds}."""
    header = ["arm", "overall", *(key.replace("_", " ") for key in columns), "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for label, rows in arms.items():
        mean, width = interval(last_scores(rows))
        cells = [label, f"{mean:.3f} ± {width:.3f}"]
        for key in columns:
            cells.append(f"{statistics.fmean((row | row['eval'][-1])[key] for row in rows):.3g}")
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return lines


def plot(arms, path):
    """Draw, per arm, a bar from the base's score to the mean and a dot for each seed."""
    figure = Figure(figsize=(7.8, 0.8 + 0.27 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for y, rows in enumerate(arms.values()):
        scores, base = last_scores(rows), rows[0]["eval"][0]["overall"]
        mean = statistics.fmean(scores)
        axes.barh(y, mean - base, left=base, height=0.4, color="lightsteelblue")
        axes.plot([mean, mean], [y - 0.35, y + 0.35], color="navy", linewidth=2)
        axes.plot(scores, [y] * len(scores), "o", color="firebrick", markersize=4)
    axes.axvline(base, color="gray", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), xlabel="overall", yticks=range(len(arms)), yticklabels=list(arms))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    figure.savefig(path, dpi=100)


def found_arms(name, there):
    """Return {label: rows} of the arms of an experiment that have rows."""
    out = {}
    for label, arm in EXPERIMENTS[name].items():
        keys = [(flags(arm), seed) for seed in seeds_of(name)]
        rows = [there[key] for key in keys if key in there]
        if rows:
            out[label + (" (run at commit c48f290)" if is_gone(arm) else "")] = rows
    return out


def look_table(rows):
    """Return the lines of a Markdown table of what look() wrote."""
    header = ["iteration", "objects", "re-masked positions", "log, newly unmasked",
              "log, re-masked", "gradient, newly unmasked", "gradient, re-masked"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    return lines


def report(args):
    """Put tables and plots into notes.md where it says [table NAME] -> folder/README.md."""
    there, look_file = runs_in(args.folder), args.folder / "p1.json"
    blocks = {"look": ["no numbers yet"]}
    if look_file.exists():
        blocks["look"] = look_table(json.loads(look_file.read_text()))
    for name, columns in COLUMNS.items():
        arms = found_arms(name, there)
        blocks[name] = ["no runs yet"]
        if arms:
            plot(arms, args.folder / f"{name}.png")
            blocks[name] = [*table(columns, arms), "", f"![{name}]({name}.png)"]
    text = (HERE / "notes.md").read_text()
    for name, lines in blocks.items():
        text = text.replace(f"[table {name}]\n", "\n".join(lines) + "\n")
    (args.folder / "README.md").write_text(text)


# ------------------------------------------------------------------------------------------ look

def gradient_norm(value, model):
    """Return the norm of the gradient that a value sends to the weights."""
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True,
                                    allow_unused=True)
    return sum(g.square().sum().item() for g in gradients if g is not None) ** 0.5


def look(args):
    """Take Eq. 14 apart on the base -> folder/p1.json, a row per iteration.

    The share of newly unmasked tokens that show an object, the log-probabilities of the two
    factors, and the norm of the gradient that each sends to the weights when pictures are weighed
    by a random sign, as advantages do.
    """
    from model import load_models
    from sample import rollout, transition_log_prob
    B, T = 96, 12
    showo, _ = load_models("shapes")
    prompt = showo.encode([line["prompt"] for line in shapes.prompts("train", B)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        traj = rollout(showo.policy(prompt), B, showo.N, showo.K, T, generator=generator)
    shows_object = traj.codes < len(shapes.LABELS)
    signs = torch.randint(2, (B,), generator=generator) * 2.0 - 1
    rows = []
    for t in range(T):
        logits = showo.logits(traj.state(t, showo.K), prompt)
        p1, p2 = (transition_log_prob(logits, traj.codes, traj.order, t, kind,
                                      threshold=traj.threshold) for kind in ("p1", "p2"))
        rows.append({
            "t": t,
            "objects": round(shows_object[traj.order == t].float().mean().item(), 3),
            "remasked_positions": int((traj.order[0] > t).sum()),
            "log_new": round(p2.mean().item(), 3),
            "log_remasked": round((p1 - p2).mean().item(), 3),
            "gradient_new": round(gradient_norm((p2 * signs).mean(), showo), 4),
            "gradient_remasked": round(gradient_norm(((p1 - p2) * signs).mean(), showo), 4),
        })
        print(rows[-1], flush=True)
    (args.folder / "p1.json").write_text(json.dumps(rows, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["run", "report", "look"])
    p.add_argument("names", nargs="*", metavar="NAME",
                   help=f"to run: {', '.join(EXPERIMENTS)} (default: all)")
    p.add_argument("--folder", type=Path, default=HERE,
                   help="of rows.jsonl, p1.json and the report")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--seeds", type=int, nargs="+", help="to run in place of an experiment's own")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                   help="flags to exchange in every arm, such as steps=1; give another --folder")
    args = p.parse_args()
    unknown = set(args.names) - set(EXPERIMENTS)
    if unknown:
        p.error(f"there is no experiment {', '.join(sorted(unknown))}")
    if args.names and args.what != "run":
        p.error(f"{args.what} takes no NAME")
    if args.set and args.folder == HERE:
        p.error("--set makes other runs than these; give another --folder for them")
    {"run": run, "report": report, "look": look}[args.what](args)


if __name__ == "__main__":
    main()
