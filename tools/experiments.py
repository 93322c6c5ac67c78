"""The paper's tables on the tiny base, and some beyond them.

    python tools/experiments.py run [NAME ...]    # two at a time, a core each; can be stopped
    python tools/experiments.py report            # README.md and a plot of each, into --folder
    python tools/experiments.py look              # the two factors of Eq. 14, by iteration
    python tools/experiments.py ceiling           # what the base can draw at all: best of 64
    python tools/experiments.py iterations --ckpt runs/NAME/checkpoint-N    # scores by T
    python tools/experiments.py curves --folder results     # the README's three seeds, a plot

An experiment compares arms; an arm is DEFAULT with some flags of train.py exchanged, run once per
seed. The reward is the tiny CLIP unless an arm says otherwise; the score is GenEval's, of 63
held-out prompts x 8 pictures. A run leaves one row in rows.jsonl: flags, seed, evaluations, and
means over steps of what the log holds. Arms with the same flags share their runs.
results/experiments/notes.md holds what was predicted and found; report puts tables and plots into
it.
Intervals are 95%, Student's t over seeds; arms are compared seed by seed.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure
from speed import markdown

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shapes import world  # noqa: E402
from support.run import read_rows  # noqa: E402

DEFAULT = dict(
    model="shapes", reward="clip:shapes/clip",
    eval_reward="geneval:official,geneval:exact:0,clip:shapes/clip:0", steps=20,
    prompts_per_step=8, group_size=8, unmask_steps=12, no_kl=True, filter_low=True,
    transition="p2", ratio="sum", lr="8e-4", eval_every=20, save_every=0)
SEEDS = {"long": (3, 4), "lr": (1, 2), "work": (3, 4, 5)}    # of the others 3 to 7
DRAWN_WITH = dict.fromkeys(("work", "work30", "weight"), (6, 20))   # T of two more evaluations
WORKS = {"work": (5, 10, 20), "work30": (5, 10, 20, 30)}     # at which their tables have scores

# of the log, over steps
MEANS = ("adv_zero", "resampled", "grad_norm", "kl_ref", "taken")

# half width of a 95% interval in standard errors, by number of seeds
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# beside the overall score; all but those of MEANS are of the last evaluation
EXACT, CLIP = "geneval:exact", "clip:shapes/clip"
FAMILIES = tuple(world.FAMILIES)
COLUMNS = {
    "transition": (EXACT, CLIP, "grad_norm"),
    "kl": (EXACT, CLIP, "kl_ref"),
    "filter": (EXACT, CLIP, "resampled", "adv_zero"),
    "reduction": (EXACT, CLIP),
    "reward": (EXACT, CLIP, *FAMILIES),
    "weight": (EXACT, CLIP, *FAMILIES),
    "long": (EXACT, CLIP, *FAMILIES),
    "longer": (EXACT, CLIP, *FAMILIES),
}


# ----------------------------------------------------------------------------------- experiments

FIRST = dict(ratio="mean", prompts_per_step=16, lr="7e-4")      # the former first command
LONG = FIRST | dict(steps=200, eval_every=25)
SLOW, BOTH = dict(lr="2e-4"), dict(reward="clip:shapes/clip,geneval:exact")
KL = {beta: dict(no_kl=False, kl_beta=beta) for beta in (0.01, 0.05, 0.2)}
HALF = {which: dict(loss_steps=6, loss_steps_from=which) for which in ("first", "last")}
EXPERIMENTS = {
    "transition": {
        "p2": {}, "p2, ratio mean": dict(ratio="mean"),
        "p1": dict(transition="p1"), "p1, ratio mean": dict(transition="p1", ratio="mean"),
        "p1, KL 0.01": dict(transition="p1") | KL[0.01],
        "ar": dict(transition="ar", lr="4e-4")},
    "kl": {"none": {}, "beta 0.01": KL[0.01], "beta 0.2": KL[0.2]},
    "filter": {"off": dict(filter_low=False), "on": {}},
    "reduction": {"all 12": {}, "first 6": HALF["first"], "last 6": HALF["last"],
                  "T 6": dict(unmask_steps=6)},
    "reward": {"clip": {}, "geneval:exact": dict(reward="geneval:exact"),
               "both": BOTH},
    "long": {"no KL": LONG, "KL 0.05": LONG | KL[0.05], "lr 2e-4": LONG | SLOW,
             "lr 2e-4, both": LONG | SLOW | BOTH},
}


# Work is counted in steps of 128 pictures x 12 iterations, each rolled out once (1) and trained
# once (3): that is how a step's time divides.
def work_of(arm):
    """Return the work of a step of an arm."""
    arm = DEFAULT | arm
    T, pictures = arm["unmask_steps"], arm["prompts_per_step"] * arm["group_size"]
    return pictures / 128 * (T + 3 * arm.get("loss_steps", T)) / (4 * 12)


def to_work(work, arm, every):
    """Return an arm that ends after this work, and is evaluated each time after `every`."""
    step = work_of(arm)
    return arm | dict(steps=round(work / step), eval_every=round(every / step))


T4, RANDOM = FIRST | dict(unmask_steps=4), dict(loss_steps_from="random")
WORK = {
    "T 12": FIRST, **{f"T {T}": FIRST | dict(unmask_steps=T) for T in (8, 6, 4, 3)},
    "T 12, loss on 6": FIRST | RANDOM | dict(loss_steps=6),
    "T 12, loss on 3": FIRST | RANDOM | dict(loss_steps=3),
    "T 4, 64 pictures": T4 | dict(prompts_per_step=8),
    "T 4, 256 pictures": T4 | dict(prompts_per_step=32)}
CHOSEN = {"T 12": "8e-4", "T 8": "8e-4", "T 6": "8e-4", "T 4": "8e-4", "T 3": "5e-4",   # by "lr"
          "T 12, loss on 6": "5e-4", "T 12, loss on 3": "3e-4",
          "T 4, 64 pictures": "5e-4", "T 4, 256 pictures": "5e-4"}
RATES = {label: {lr: to_work(10, arm | dict(lr=lr, eval_n=4), every=10)
                 for lr in ("3e-4", "5e-4", "8e-4", "1.2e-3")} for label, arm in WORK.items()}
EXPERIMENTS["lr"] = {f"{label}, {lr}": arm for label, arms in RATES.items()
                     for lr, arm in arms.items()}
EXPERIMENTS["work"] = {label: to_work(20, arm | dict(lr=CHOSEN[label]), every=5)
                       for label, arm in WORK.items()}
EXPERIMENTS["work30"] = {label: to_work(30, WORK[label] | dict(lr=CHOSEN[label]), every=5)
                         for label in ("T 12", "T 4")}

# of an advantage the rule has the share weight / (1 + weight)
RULE = {weight: dict(reward=f"clip:shapes/clip,geneval:exact:{weight}") for weight in (1, 10)}
MANY, FEW = EXPERIMENTS["work30"].values()
EXPERIMENTS["weight"] = {
    "T 4, clip": FEW, **{f"T 4, rule x {weight}": FEW | arm for weight, arm in RULE.items()},
    "T 4, rule alone": FEW | dict(reward=EXACT), "T 12, rule alone": MANY | dict(reward=EXACT)}
EXPERIMENTS["longer"] = {"T 4, rule x 10, lr 3e-4": T4 | RULE[10] | dict(
    steps=240, eval_every=60, lr="3e-4")}


def flags_of(arm):
    """Return the flags of train.py for an arm, as one line."""
    words = []
    for name, value in (DEFAULT | arm).items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return " ".join(words)


def seeds_of(name):
    """Return the seeds of an experiment."""
    return SEEDS.get(name, range(3, 8))


def runs_in(folder):
    """Return {(flags, seed): row} of the runs that are there."""
    return {(row["flags"], row["seed"]): row for row in read_rows(folder / "rows.jsonl")}


# ------------------------------------------------------------------------------------------- run

def row_of(flags, seed, out):
    """Return the row that a run of train.py leaves; None when it was stopped before its end."""
    steps, evaluations = read_rows(out / "metrics.jsonl"), read_rows(out / "eval.jsonl")
    if f"--steps {evaluations[-1]['step']} " not in flags:
        return None
    row = {"flags": flags, "seed": seed, "eval": evaluations}
    for before, after in itertools.pairwise(evaluations):       # of the steps between the two
        after["entropy"] = mean_of("entropy", steps[before["step"]:after["step"]])
    return row | {key: mean_of(key, steps) for key in MEANS}


def mean_of(key, steps):
    """Return the mean of what the rows of a log have under a key; NaN where none has."""
    values = [step[key] for step in steps if step.get(key) is not None]
    return round(statistics.fmean(values or [math.nan]), 5)


def call(script, *flags):
    """Run a script on one thread; return whether it ended well."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        last_line = done.stderr.strip().splitlines()[-1:]
        print(script, *flags, *last_line, file=sys.stderr, flush=True)
    return not done.returncode


def score_of(checkpoint, T, out):
    """Return the overall score of a checkpoint whose pictures are drawn with T iterations."""
    call("eval_geneval.py", "--model", "shapes", "--ckpt", checkpoint, "--steps", T,
         "--images-per-prompt", 8, "--out", out)
    return json.loads((out / "summary.json").read_text())["overall"]


def train(flags, seed, drawn_with, folder):
    """Run train.py with these flags and this seed, and add its row to folder/rows.jsonl; return
    whether it ran to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        if not call("train.py", *flags.split(), "--seed", seed, "--out", out):
            return False
        row = row_of(flags, seed, out)
        if row is None:
            return False
        last = out / f"checkpoint-{row['eval'][-1]['step']}"
        row["drawn_with"] = {T: score_of(last, T, Path(scratch) / f"T{T}") for T in drawn_with}
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{flags}, seed {seed}: {row['eval'][-1]['overall']:.3f}", flush=True)
    return True


def run(args):
    """Train every arm with every seed that has no row yet."""
    there, exchanged = runs_in(args.folder), dict(pair.split("=", 1) for pair in args.set)
    todo = {}
    for name in args.names or EXPERIMENTS:
        for seed in args.seeds or seeds_of(name):
            for arm in EXPERIMENTS[name].values():
                job = flags_of(arm | exchanged), seed
                if job not in there:
                    todo[job] = DRAWN_WITH.get(name, ())
    with ThreadPoolExecutor(args.jobs) as pool:
        ended_well = list(pool.map(lambda job: train(*job, todo[job], args.folder), todo))
    if not all(ended_well):
        sys.exit(1)


# ---------------------------------------------------------------------------------------- report

def interval(values):
    """Return the mean and the half width of its 95% interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def written(mean, width, sign=""):
    """Return "mean ± width"; of one seed, the mean."""
    return f"{mean:{sign}.3f}" + ("" if math.isnan(width) else f" ± {width:.3f}")


def last_scores(rows):
    """Return the overall scores of some runs at their last evaluations."""
    return [row["eval"][-1]["overall"] for row in rows]


def lead(rows, first):
    """Return by how much the rows of an arm lead those of the first, seed by seed: the mean and the
    half width of its 95% interval; None where they share no seed."""
    base = {row["seed"]: score for row, score in zip(first, last_scores(first), strict=True)}
    leads = [score - base[row["seed"]] for row, score in zip(rows, last_scores(rows), strict=True)
             if row["seed"] in base]
    return interval(leads) if leads else None


def table(columns, arms):
    """Return a Markdown table of arms {label: rows of its seeds}."""
    lines = [["arm", "overall", "lead over the first", *(key.replace("_", " ") for key in columns),
              "seeds"]]
    first = next(iter(arms.values()))
    for label, rows in arms.items():
        ahead = None if rows is first else lead(rows, first)
        means = [statistics.fmean((row | row["eval"][-1])[key] for row in rows) for key in columns]
        lines.append([label, written(*interval(last_scores(rows))),
                      written(*ahead, "+") if ahead else "-",
                      *(f"{value:.3g}" for value in means), len(rows)])
    return markdown(lines)


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
        keys = [(flags_of(arm), seed) for seed in seeds_of(name)]
        rows = [there[key] for key in keys if key in there]
        if rows:
            out[label] = rows
    return out


def ceiling_table(found):
    """Return a Markdown table of what ceiling() wrote."""
    rows = [["family", *(f"{what}{rule}" for rule in ("", ", exact")
                         for what in ("share right", "best of 64", "worst prompt"))]]
    for tag, row in found.items():
        values = [value for rule in ("official", "exact") for value in row[rule].values()]
        rows.append([tag.replace("_", " "), *(f"{value:.3f}" for value in values)])
    return markdown(rows)


def plot_ceiling(found, path):
    """Draw, per family, the share of right pictures, that of the worst prompt, and best of n."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, rule in zip(figure.subplots(1, 2, sharey=True), ("official", "exact"), strict=True):
        names = [tag.replace("_", " ") for tag in found]
        for key, label, mark in (("best", "best of 64", "_"), ("share", "share right", "o"),
                                 ("least", "worst prompt", "v")):
            values = [row[rule][key] for row in found.values()]
            axes.plot(names, values, mark, markersize=12 if mark == "_" else 6, label=label)
        axes.set(title=rule, ylim=(0, 1.05))
        axes.tick_params(axis="x", rotation=30)
        axes.grid(axis="y", alpha=0.4)
    axes.legend()
    figure.savefig(path, dpi=100)


def plot_curves(arms, path):
    """Draw GenEval's score, CLIP's and the entropy over the steps of each run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, key in zip(figure.subplots(1, 3), ("overall", CLIP, "entropy"), strict=True):
        for colour, (label, rows) in enumerate(arms.items()):
            for i, row in enumerate(rows):
                found = [(e["step"], e[key]) for e in row["eval"] if key in e]
                axes.plot(*zip(*found, strict=True), marker="o", markersize=3, color=f"C{colour}",
                          label=label if i == 0 else None)
        axes.set(xlabel="step", title={"overall": "GenEval", CLIP: "CLIP"}.get(key, key))
        axes.grid(alpha=0.4)
    axes.legend()
    figure.savefig(path, dpi=100)


def best_table(arms):
    """Return a Markdown table of the best and the last evaluation of each run."""
    lines = [["run", "seed", "best", "last", "entropy, first and last"]]
    for label, rows in arms.items():
        for row in rows:
            scored, entropy = row["eval"], [e["entropy"] for e in row["eval"] if "entropy" in e]
            best = max(scored, key=lambda e: e["overall"])
            ends = [f"{e['overall']:.3f} (step {e['step']})" for e in (best, scored[-1])]
            lines.append([label, row["seed"], *ends, f"{entropy[0]:.2f}, {entropy[-1]:.2f}"])
    return markdown(lines)


def scores_at(work, label, rows):
    """Return the scores of an arm's runs after some work, between two evaluations on the line from
    one to the other."""
    step = work_of(WORK[label])
    return [float(numpy.interp(work, [e["step"] * step for e in row["eval"]],
                               [e["overall"] for e in row["eval"]])) for row in rows]


def rates_table(there):
    """Return a Markdown table of the scores of the learning rates, the mean of their seeds."""
    rates = list(next(iter(RATES.values())))
    lines = [["arm", *(f"lr {lr}" for lr in rates)]]
    for label, arms in RATES.items():
        scores = [last_scores([there[key] for seed in seeds_of("lr")
                               if (key := (flags_of(arm), seed)) in there])
                  for arm in arms.values()]
        lines.append([label, *(f"{statistics.fmean(found):.3f} ({len(found)})" if found else "-"
                               for found in scores)])
    return markdown(lines)


def work_table(arms, works):
    """Return a Markdown table of scores after some work, of leads at its end over the first arm,
    and of the work to a mean of 0.80."""
    lines = [["arm", "lr", *(f"work {work}" for work in works), "lead", "work to 0.80",
              *(f"drawn with T {T}" for T in DRAWN_WITH["work"]), "seeds"]]
    first = next(iter(arms.values()))
    for label, rows in arms.items():
        cells = [written(*interval(scores_at(work, label, rows))) for work in works]
        reached = [work for work in numpy.arange(0, works[-1], 0.1)
                   if statistics.fmean(scores_at(work, label, rows)) >= 0.8]
        drawn = [statistics.fmean(row["drawn_with"][str(T)] for row in rows)
                 for T in DRAWN_WITH["work"]]
        ahead = None if rows is first else lead(rows, first)
        lines.append([label, CHOSEN[label], *cells, written(*ahead, "+") if ahead else "-",
                      f"{reached[0]:.1f}" if reached else "-",
                      *(f"{score:.3f}" for score in drawn), len(rows)])
    return markdown(lines)


def plot_work(panels, path):
    """Draw, on each panel, the mean score of its arms over the work, and the range of their seeds.
    panels: [(work of the last evaluation, {label: rows of its seeds})]."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (last, arms) in zip(figure.subplots(1, len(panels), sharey=True), panels,
                                  strict=True):
        works = numpy.arange(0, last + 0.1, 0.5)
        for label, rows in arms.items():
            scores = numpy.array([scores_at(work, label, rows) for work in works])
            colour = f"C{list(WORK).index(label)}"
            axes.plot(works, scores.mean(1), label=label, color=colour)
            axes.fill_between(works, scores.min(1), scores.max(1), alpha=0.12, color=colour)
        axes.set(xlabel="work", ylim=(0.5, 0.9))
        axes.grid(alpha=0.4)
        axes.legend()
    figure.savefig(path, dpi=100)


def iterations_table(found):
    """Return a Markdown table of what iterations() wrote."""
    values = list(found.values())
    return markdown([["drawn with", *(f"T {T}" for T in values[0])],
                     *([name, *(f"{score:.3f}" for score in scores.values())]
                       for name, scores in found.items())])


def look_table(rows):
    """Return a Markdown table of what look() wrote."""
    header = ["iteration", "objects", "re-masked positions", "log, newly unmasked",
              "log, re-masked", "gradient, newly unmasked", "gradient, re-masked"]
    return markdown([header, *([f"{value:.3g}" for value in row.values()] for row in rows)])


def report(args):
    """Put tables and plots into notes.md where it says [table NAME] -> folder/README.md."""
    there, folder = runs_in(args.folder), args.folder
    blocks = dict.fromkeys(("look", "ceiling", "best", "iterations"), "no numbers yet")
    if (folder / "p1.json").exists():
        blocks["look"] = look_table(json.loads((folder / "p1.json").read_text()))
    if (folder / "ceiling.json").exists():
        found = json.loads((folder / "ceiling.json").read_text())
        plot_ceiling(found, folder / "ceiling.png")
        blocks["ceiling"] = ceiling_table(found) + "\n\n![ceiling](ceiling.png)"
    if (folder / "iterations.json").exists():
        blocks["iterations"] = iterations_table(json.loads((folder /
                                                            "iterations.json").read_text()))
    blocks["rates"] = rates_table(there)
    arms, longer = found_arms("work", there), found_arms("work30", there)
    blocks["work"] = work_table(arms, WORKS["work"]) if arms else "no runs yet"
    blocks["work30"] = work_table(longer, WORKS["work30"]) if longer else "no runs yet"
    if arms and longer:
        few = {label: rows for label, rows in arms.items() if "," not in label}
        others = {label: arms[label] for label in arms if label not in few or label in longer}
        plot_work([(20, few), (20, others), (30, longer)], folder / "work.png")
        blocks["work"] += "\n\n![work](work.png)"
    for name, columns in COLUMNS.items():
        arms = found_arms(name, there)
        blocks[name] = "no runs yet"
        if arms:
            (plot_curves if name.startswith("long") else plot)(arms, folder / f"{name}.png")
            blocks[name] = f"{table(columns, arms)}\n\n![{name}]({name}.png)"
    if arms := found_arms("long", there):
        blocks["best"] = best_table(arms)
    text = (ROOT / "results/experiments/notes.md").read_text()
    for name, block in blocks.items():
        text = text.replace(f"[table {name}]", block)
    (folder / "README.md").write_text(text)


# ------------------------------------------------------------------------------------------ look

def gradient_norm(value, model):
    """Return the norm of the gradient that a value sends to the weights."""
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True,
                                    allow_unused=True)
    return sum(g.square().sum().item() for g in gradients if g is not None) ** 0.5


def look(args, B=96):
    """Take Eq. 14 apart on the base -> folder/p1.json, a row per iteration.

    The share of newly unmasked tokens that show an object, the log-probabilities of the two
    factors, and the norm of the gradient that each sends to the weights when pictures are weighed
    by a random sign, as advantages do.
    """
    from model import load_models
    from sample import rollout, transition_log_prob
    T = DEFAULT["unmask_steps"]
    showo, _ = load_models("shapes")
    prompt = showo.encode([line["prompt"] for line in world.prompts("train", B)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        traj = rollout(showo.policy(prompt), B, showo.N, showo.K, T, generator=generator)
    shows_object = traj.codes < len(world.LABELS)
    signs = torch.randint(2, (B,), generator=generator) * 2.0 - 1
    rows = []
    for t in range(T):
        logits = showo.logits(traj.state(t), prompt)
        p1, p2 = (transition_log_prob(logits, traj, t, kind) for kind in ("p1", "p2"))
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


# ------------------------------------------------------------------------------------------ ceiling

def ceiling(args, n=64):
    """Draw n pictures of each held-out prompt with the base -> folder/ceiling.json: by family, the
    share of right pictures, of prompts of which at least one picture is right, and the share of
    right pictures of the worst prompt."""
    from model import load_models
    from sample import generate
    from support.geneval import verdicts
    lines, found = world.prompts("eval"), {}
    showo, magvit = load_models("shapes")
    images = generate(showo, magvit, [line["prompt"] for line in lines], n=n, guidance=0.0,
                      T=DEFAULT["unmask_steps"], batch=256)
    judged = verdicts([line for line in lines for _ in range(n)], world.detect(images))
    for tag in FAMILIES:
        mine, found[tag] = [i for i, line in enumerate(lines) if line["tag"] == tag], {}
        for rule in ("official", "exact"):
            right = judged[rule].view(-1, n)[mine]
            found[tag][rule] = {"share": round(right.mean().item(), 4),
                                "best": round(right.amax(1).mean().item(), 4),
                                "least": round(right.mean(1).amin().item(), 4)}
    (args.folder / "ceiling.json").write_text(json.dumps(found, indent=1) + "\n")
    print(ceiling_table(found))


# -------------------------------------------------------------------------------------- iterations

def iterations(args):
    """Score pictures that are drawn with few and with many iterations, by the base and by a trained
    checkpoint -> folder/iterations.json."""
    found = {}
    for name, checkpoint in (("base", ROOT / "shapes"), ("trained", args.ckpt)):
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = {T: score_of(checkpoint, T, Path(scratch) / str(T))
                           for T in (6, 12, 16, 20, 24, 36)}
    (args.folder / "iterations.json").write_text(json.dumps(found, indent=1) + "\n")
    print(iterations_table(found))


# ------------------------------------------------------------------------------------------ curves

def curves(args):
    """Draw the held-out scores of the README's first command, --seed SEED, whose eval.jsonl are
    results/shapes-p2-seedSEED.jsonl, and that of the base -> folder/curves.png."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for path in sorted((ROOT / "results").glob("shapes-p2-seed*.jsonl")):
        rows, seed = read_rows(path), path.stem.removeprefix("shapes-p2-seed")
        steps, base = [row["step"] for row in rows], rows[0]["overall"]
        axes.plot(steps, [row["overall"] for row in rows], marker="o", label=f"seed {seed}")
    axes.axhline(base, color="gray", linestyle="--", linewidth=1, zorder=1.9)
    axes.annotate(f"base {base:.3f}", (steps[-1], base), (0, 4), textcoords="offset points",
                  ha="right", color="gray")
    axes.set(xlabel="optimizer steps", ylabel="GenEval score, held-out prompts", xticks=steps,
             ylim=(0.45, 0.95))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(args.folder / "curves.png", dpi=120)


def main():
    commands = {"run": run, "report": report, "look": look, "ceiling": ceiling,
                "iterations": iterations, "curves": curves}
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=list(commands))
    p.add_argument("names", nargs="*", metavar="NAME",
                   help=f"to run: {', '.join(EXPERIMENTS)} (default: all)")
    p.add_argument("--folder", type=Path, default=Path("runs/experiments"),
                   help="of rows.jsonl, the other numbers and the report")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--seeds", type=int, nargs="+",
                   help="to run in place of an experiment's own")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                   help="flags to exchange in every arm, such as steps=1; give another --folder")
    p.add_argument("--ckpt", type=Path, default=ROOT / "shapes", help="for iterations")
    args = p.parse_args()
    unknown = set(args.names) - set(EXPERIMENTS)
    if unknown:
        p.error(f"there is no experiment {', '.join(sorted(unknown))}")
    if args.names and args.what != "run":
        p.error(f"{args.what} takes no NAME")
    args.folder.mkdir(parents=True, exist_ok=True)
    commands[args.what](args)


if __name__ == "__main__":
    main()
