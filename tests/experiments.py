"""The paper's choices, and some beyond it, compared on the tiny base, with seeds 1, 2, 3 (or SEEDS) and a budget of 24 steps unless an arm says otherwise.

    python tests/experiments.py run [NAME ...]           # two runs at a time, one core each; goes on where it was stopped
    python tests/experiments.py report                   # results/experiments/: README.md, NAME.png
    python tests/experiments.py look                     # the two factors of Eq. 14, iteration by iteration

An arm is DEFAULT with some flags of train.py exchanged. A run leaves one row in results/experiments/rows.jsonl: its flags, its seed,
its evaluations (GenEval's overall score and others, 63 held-out prompts x 8 pictures), and means over steps of what the log holds; arms
with the same flags share their runs. Intervals are 95%, Student's t over seeds."""
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
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import shapes  # noqa: E402
from model import load_magvit, load_showo, to_uint8  # noqa: E402
from sample import rollout, transition_log_prob  # noqa: E402
from train import flags_of  # noqa: E402

OUT = ROOT / "results/experiments"
SEEDS = {"recipe": (4, 5, 6, 7, 8), "epochs-again": (4, 5, 6, 7, 8),     # fresh ones, since their arms were chosen on the others
         "kl": range(1, 9), "filter": range(1, 9)}   # since three told nothing
DEFAULT = dict(model="shapes", steps=24, prompts_per_step=12, group_size=8, unmask_steps=16, no_kl=True, filter_low=True, transition="p2",
               ratio="sum", inner_epochs=1, lr="7e-4", eval_every=12, sample_every=0, save_every=0)
MEANS = ("reward_mean", "reward_std", "adv_zero", "resampled", "grad_norm", "clip_fraction", "kl_ref", "entropy", "skipped", "s_rollout", "s_update",
         "s_step")
MEDIANS = ("ratio_max", "approx_kl")    # of a few steps with far ratios the mean would tell nothing else
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# What was expected, written before any run of the experiment but the first two of "transition". Added to look further when results were there:
# p1 with the mean at 1.4e-3, ar with the mean, p1 last 8, p1 with the mean first 8, 40 steps, forward with the mean, p1 with both means.
# 1.75e-4 for p2 and ar came last, when one seed of each was known (0.573, 0.592).
PREDICTED = {
    "transition": "p2 best at 7e-4. ar close behind, at a smaller rate, since it sums over every masked token. p1 below both at every rate: on the "
                  "base its re-masked factor sends 6 to 60 times the gradient of the first in the first nine iterations (look). The mean over "
                  "positions helps p1 without closing the gap. gumbel between p1 and p2.",
    "kl": "Without KL the score falls at 2.8e-3; beta 0.1 holds there and loses a little at 7e-4; beta 0.01 makes no difference. "
          "(Added before seeds 4 to 8 and 1.4e-3: no beta gains at any rate, but at 2.8e-3 exact is 0.05 higher with 0.1 than without.)",
    "filter": "No difference beyond the noise: rewards are 0 or 1, a low std means an all-right or all-wrong group, and a second try is as likely one. "
              "(Added before seeds 4 to 8 and three tries: these sample twice as many groups again as one try does, and gain nothing.)",
    "reduction": "random 8 close to all 16, its estimate being unbiased; first better than last, because the first tokens decide how many objects there "
                 "are; quarters worse than halves; critical as first. T 8 loses 0.05, T 5 0.15 when evaluated at 16.",
    "epochs": "Two epochs learn faster than one with p2, four no better than two. With p1 the sum's ratios spread so far that most are clipped from the "
              "second epoch on; the mean mends that. (Added after the runs with one and two epochs: clipping at 0.98 and 1.02 clips half and learns as one "
              "epoch does; not clipping changes nothing, since only 6% are clipped.)",
    "epochs-again": "On fresh seeds four epochs lead one by 0.1 and two lie between.",
    "groups": "8 x 12 and 16 x 6 alike; 4 x 24 a little worse (noisy baselines), 32 x 3 worst (three prompts a step).",
    "transfer": "Trained on four families, counting gains half of what it gains when rewarded, position nothing.",
    "beyond": "adv mean within the noise. ratio mean (T 8, since at T = N one token moves per iteration and it is the sum) a little better "
              "than T 8: the iterations that move several tokens weigh less. forward with the first 4 iterations at "
              "least as good as the rollout's 16, at a third of the update's time.",
    "recipe": "On fresh seeds p1 with the mean and forward (first 4, with as many steps as take the same time) both lead p2 by 0.03 to 0.04 and are "
              "not told apart; the paper's p1 stays at 0.6. (Added when the reduction's results were there: the rollout's last 4, as often.)"}
FOUND = {
    "transition": "Eq. 14 as written is the worst of the paper's three, as predicted, and its early iterations are the cause: on the last 8 of 16 alone "
                  "p1 reaches 0.739 (reduction), and with the mean token's ratio, which at T = N and one epoch only weighs late iterations up to 16 times "
                  "more, 0.767: against the prediction as good as p2. ar, best at 7e-4 and not at a smaller rate, is not told apart from p2, which "
                  "contradicts the paper's Fig. 1; gumbel, whose gradient grows as 1 / noise, does not get away from the base, far from between p1 and p2.",
    "beyond": "adv mean is within the noise, as predicted; ratio mean helps p1 alone. forward matches the rollout's trajectory, as predicted, and keeps "
              "0.739 on the first quarter of its iterations, where the rollout's first quarter ends at 0.287: its action is the whole picture.",
    "recipe": "forward and p1 with the mean lead p2 by 0.018 ± 0.030 and 0.010 ± 0.030, which tells them apart neither from p2 nor from the 0.03 to 0.04 "
              "predicted, and p1 is at 0.66, not 0.6. The rollout's last 4 end highest: seed by seed 0.026 ± 0.031 over p2, on all eight seeds 0.031 ± "
              "0.024; 0.120 ± 0.069 over p1.",
    "filter": "No gain: with a reward of 0 or 1 the 10th percentile soon is 0; 24 of 2,304 groups were sampled again, none in four of the eight runs, and "
              "the other four end 0.018 ± 0.006 below off (the paper: 0.73 with it, 0.60 without). At the 30th 222 were, a tenth more rollouts, for 0.017 "
              "± 0.018 less than off; three tries sample 262 times again, not twice as often, for 0.007 ± 0.014 less. percentile 0 is the run of off, "
              "digit by digit.",
    "transfer": "The overall score hardly suffers without counting and position in training, though the other families then get twice the prompts. "
                "Position ends where it does when rewarded (0.36 ± 0.24 and 0.35 ± 0.03), against the prediction, though not surely above the base's "
                "0.21; counting ends below the base's 0.53 (0.40 ± 0.10), and when rewarded varies too much to say (± 0.57 here; 0.56 ± 0.15 over eight "
                "seeds).",
    "kl": "The paper's claim that training without KL bears less of a learning rate shows in one number: from 7e-4 to 2.8e-3 exact, which is what is "
          "rewarded, falls by 0.210 ± 0.104 without KL and by 0.081 ± 0.035 with beta 0.1 (difference 0.128 ± 0.105, eight seeds). In overall (0.136 ± "
          "0.079 and 0.069 ± 0.031), at 1.4e-3, and with beta 0.01 (0.185 ± 0.097) they are not told apart, and against the prediction 0.1 "
          "does not hold the score either. At the best rate KL gains nothing, as predicted: 0.01 makes no difference (seed by seed 0.000 ± 0.016), "
          "0.1 loses 0.025 ± 0.017, and a step takes nearly twice as long; the paper has 0.73 without and 0.62 with it.",
    "groups": "Seed by seed 16 x 6 is 0.019 ± 0.004 below 8 x 12, the others are not told apart: against the prediction 4 x 24 is no worse, and 32 x 3 "
              "like 16 x 6.",
    "epochs": "With p2 two epochs lead one by 0.073 ± 0.046 on eight seeds (those of epochs-again too), and four are no better than two (0.006 ± 0.060), "
              "as predicted. Against the prediction the clip matters, though it acts on 6%: without it each of three runs with four epochs ends below "
              "each of eight with it (0.503, 0.668); at 0.98 and 1.02 it acts on a fifth, not half, and the score is told apart neither from one epoch's "
              "nor from four's. Nor is the mean from the sum with p2. With p1 and two epochs the sum's ratios run away (medians over steps of 2e6 to "
              "5e14), and the policy with them (exact 0.182, with four 0.009); the mean keeps them at 6 to 28 and still clips a fifth, without a clear "
              "gain over one epoch, and four end at exact 0.267.",
    "epochs-again": "On these seeds alone two epochs lead one by 0.075 ± 0.076 and four by 0.058 ± 0.128, which leaves open whether four lead two; a step "
                    "of four takes 1.65 times as long.",
    "reduction": "Against the prediction the last quarter is as good as all 16, and the first half or quarter ends below the base with every seed (p1's "
                 "mean with two of three): the surest tokens come first, so this base draws ground for 12 iterations and 99% of its objects in the last "
                 "four (look); the critical ones do nearly as well. T 8 loses 0.18, on eight seeds 0.157 ± 0.057 and more than predicted, T 5 0.231 ± "
                 "0.255, both with too few objects."}
SHOW = {"transition": ("exact", "objects", "reward_mean"), "kl": ("exact", "objects", "kl_ref", "s_step"), "filter": ("exact", "resampled", "adv_zero", "s_step"),
        "reduction": ("exact", "objects", "s_update", "s_step"), "epochs": ("exact", "clip_fraction", "ratio_max", "approx_kl"),
        "epochs-again": ("exact", "clip_fraction", "ratio_max", "approx_kl", "s_step"), "groups": ("exact", "adv_zero", "resampled"),
        "transfer": ("single_object", "two_object", "colors", "color_attr", "counting", "position"), "beyond": ("exact", "objects", "s_update"),
        "recipe": ("exact", "objects", "s_step")}


def arms():
    """{experiment: {arm: what differs from DEFAULT}}."""
    several = dict(unmask_steps=8)  # several tokens move in an iteration; at T = 16 = N it is one
    forward, longer = dict(trajectory="forward"), dict(steps=40, eval_every=20)     # as many steps as take no more time
    rollout = {f"{which} {k}": dict(loss_steps=k, loss_steps_from=which) for k in (8, 4) for which in ("first", "last", "random", "critical")}
    rates = ("7e-4", "1.4e-3", "3.5e-4", "1.75e-4")
    rates = {"p2": rates, "ar": rates, "p1": ("7e-4", "3.5e-4", "1.75e-4"), "gumbel": ("7e-4", "3.5e-4")}
    return {
        "transition": {**{f"{kind}, lr {lr}": dict(transition=kind, lr=lr) for kind in rates for lr in rates[kind]},
                       **{f"p1, ratio mean, lr {lr}": dict(transition="p1", ratio="mean", lr=lr) for lr in ("7e-4", "3.5e-4", "1.4e-3")},
                       "ar, ratio mean, lr 7e-4": dict(transition="ar", ratio="mean")},
        "beyond": {"default": {}, "adv mean": dict(adv="mean"), "T 8": several, "T 8, ratio mean": dict(**several, ratio="mean"),
                   "forward, all 16": forward, "forward, first 8": dict(**forward, loss_steps=8), "forward, first 4": dict(**forward, loss_steps=4),
                   "forward, first 4, 40 steps": dict(**forward, **longer, loss_steps=4),
                   "forward, ratio mean": dict(**forward, ratio="mean"), "p1, ratio mean": dict(transition="p1", ratio="mean"),
                   "p1, ratio mean, adv mean": dict(transition="p1", ratio="mean", adv="mean"),
                   **{f"rollout, {name}": rollout[name] for name in ("first 8", "first 4")}},
        "recipe": {"p2, lr 7e-4 (default)": {}, "p1, lr 3.5e-4 (paper)": dict(transition="p1", lr="3.5e-4"),
                   "p1, ratio mean": dict(transition="p1", ratio="mean"),
                   "forward, first 4, 40 steps": dict(**forward, **longer, loss_steps=4),
                   "p2, last 4, 40 steps": dict(**rollout["last 4"], **longer)},
        "transfer": {"all six families": {}, "four families": dict(prompts="FOUR")},
        "filter": {"percentile 10": {}, "off": dict(filter_low=False), "percentile 0": dict(filter_percentile=0), "percentile 30": dict(filter_percentile=30),
                   "percentile 30, 3 tries": dict(filter_percentile=30, max_resample=3)},
        "reduction": {"all 16": {}, **rollout, "last 4, 40 steps": dict(**rollout["last 4"], **longer),
                      "p1, last 8": dict(transition="p1", **rollout["last 8"]),
                      "p1, ratio mean, first 8": dict(transition="p1", ratio="mean", **rollout["first 8"]), "T 8": several, "T 5": dict(unmask_steps=5)},
        "kl": {f"beta {beta}, lr {lr}": dict(lr=lr, **(dict(no_kl=False, kl_beta=beta) if beta else {}))
               for lr in ("7e-4", "1.4e-3", "2.8e-3") for beta in (0, 0.01, 0.1)},
        "groups": {f"G {G}, {96 // G} prompts": dict(group_size=G, prompts_per_step=96 // G, **(dict(filter_warmup=4 * (96 // G)) if G != 8 else {}))
                   for G in (8, 4, 16, 32)},
        "epochs": {f"{kind}, {ratio}, {n} epoch{'s' * (n > 1)}": dict(**several, transition=kind, ratio=ratio, inner_epochs=n)
                   for kind in ("p2", "p1") for ratio in ("sum", "mean") for n in (1, 2, 4)}
        | {f"p2, sum, 4 epochs, clip {low}-{high}": dict(**several, inner_epochs=4, clip_low=low, clip_high=high) for low, high in ((0.98, 1.02), (0, 100))},
        "epochs-again": {f"p2, sum, {n} epoch{'s' * (n > 1)}": dict(**several, inner_epochs=n) for n in (1, 2, 4)}}


def flags(arm):
    """The flags of train.py for an arm, as one line; FOUR stands for a file of training prompts."""
    return flags_of({**DEFAULT, **arm})


def made():
    """{(flags, seed): row} of the runs that are there."""
    file = OUT / "rows.jsonl"
    return {(row["flags"], row["seed"]): row for row in map(json.loads, file.open() if file.exists() else ())}


def one(line, seed):
    """Run train.py with these flags, and add its row."""
    with tempfile.TemporaryDirectory() as folder:
        four = Path(folder) / "four.jsonl"
        if "FOUR" in line:
            four.write_text("".join(json.dumps(row) + "\n" for row in shapes.prompts("train") if row["tag"] not in ("position", "counting")))
        command = [sys.executable, str(ROOT / "train.py"), *line.replace("FOUR", str(four)).split(), "--seed", str(seed), "--out", f"{folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            print(f"{line}, seed {seed}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return
        steps, evals = ([json.loads(text) for text in (Path(folder) / "run" / file).open()] for file in ("metrics.jsonl", "eval.jsonl"))
    if f"--steps {evals[-1]['step']} " not in line:
        return  # stopped by a signal
    row = {"flags": line, "seed": seed, "eval": evals}
    for average, keys in ((statistics.fmean, MEANS), (statistics.median, MEDIANS)):
        row |= {key: round(average([step[key] for step in steps if step.get(key) is not None] or [math.nan]), 5) for key in keys}
    with (OUT / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{line}, seed {seed}: {evals[-1]['overall']:.3f} ({row['s_step']:.1f} s a step)", flush=True)


def interval(values):
    """Mean and half width of its 95% interval."""
    mean = statistics.fmean(values)
    return mean, T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(name, rows):
    """rows: {arm: rows of its seeds} -> lines of Markdown."""
    show = SHOW[name]
    yield f"| arm | overall | {' | '.join(key.replace('_', ' ') for key in show)} | seeds |"
    yield "|---" * (3 + len(show)) + "|"
    for arm, mine in rows.items():
        mean, width = interval([row["eval"][-1]["overall"] for row in mine])
        cells = [statistics.fmean((row | row["eval"][-1]).get(key, math.nan) for row in mine) for key in show]
        yield f"| {arm} | {mean:.3f} ± {width:.3f} | {' | '.join(f'{value:.3g}' for value in cells)} | {len(mine)} |"


def plot(name, rows):
    """NAME.png: per arm a bar from the base's score to the mean, and a dot for each seed."""
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (780, 40 + 26 * len(rows)), "white")
    draw, x = ImageDraw.Draw(sheet), lambda v: 220 + 520 * v  # noqa: E731
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        draw.line([(x(tick), 24), (x(tick), sheet.height - 10)], "lightgray")
        draw.text((x(tick) - 8, 6), f"{tick:g}", "gray", font)
    for y, (arm, mine) in zip(range(32, sheet.height, 26), rows.items()):
        values, base = [row["eval"][-1]["overall"] for row in mine], mine[0]["eval"][0]["overall"]
        mean = statistics.fmean(values)
        draw.text((6, y), arm, "black", font)
        draw.rectangle([x(min(base, mean)), y + 5, x(max(base, mean)), y + 13], "lightsteelblue")
        draw.line([(x(mean), y + 1), (x(mean), y + 17)], "navy", 2)
        for value in values:
            draw.ellipse([x(value) - 3, y + 6, x(value) + 3, y + 12], "firebrick")
    sheet.save(OUT / f"{name}.png")


def report():
    """results/experiments/README.md and its pictures, from the rows that are there."""
    there, text = made(), [
        "# Experiments on the tiny base", "", "Written by `python tests/experiments.py report` from rows.jsonl; two runs at a time, one core each (AMD EPYC, "
        "torch 2.13.0).", "", "overall: GenEval's score at the last evaluation, with its 95% interval over seeds (Student's t); exact, objects (1.98 are "
        "asked) and families: at the last evaluation too. Means over steps: reward mean; resampled, how often a step samples a group again; adv zero, the share of "
        "pictures without an advantage; s, seconds (identical runs differ by up to 1.4 times); clip fraction, kl ref. Medians over steps: ratio max, approx kl."]
    for name, mine in arms().items():
        rows = {arm: [there[key] for key in ((flags(arm_flags), seed) for seed in SEEDS.get(name, (1, 2, 3))) if key in there] for arm, arm_flags in mine.items()}
        rows = {arm: found for arm, found in rows.items() if found}
        if rows:
            plot(name, rows)
            text += ["", f"## {name}", "", f"Predicted: {PREDICTED[name]}", "", *table(name, rows), "", f"![{name}]({name}.png)", "",
                     f"Found: {FOUND.get(name, '')}"]
    text += ["", "## look", "", "Eq. 14 on the base, iteration by iteration: the share of newly unmasked tokens that show an object, log-probability of the two factors, "
             "and the norm of the gradient that each sends to the weights.", "",
             "| iteration | objects | re-masked positions | log, newly unmasked | log, re-masked | gradient, newly unmasked | gradient, re-masked |", "|---" * 7 + "|"]
    text += ["| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |" for row in json.loads((OUT / "p1.json").read_text())]
    (OUT / "README.md").write_text("\n".join(text) + "\n")


def look():
    """Eq. 14 taken apart on the base: at each of 16 iterations the share of newly unmasked tokens that show an object, the two factors'
    log-probability, and the norm of the gradient that each sends to the weights when pictures are weighed by a random sign, as advantages
    do -> results/experiments/p1.json."""
    showo = load_showo("shapes")
    prompts = showo.encode([line["prompt"] for line in shapes.prompts("train", 96)])
    with torch.no_grad():
        prompt = showo.prefill(prompts)
    generator = torch.Generator().manual_seed(0)
    traj = rollout(lambda codes, at: showo.logits(codes, prompt, at=at), 96, showo.N, showo.K, 16, generator=generator, masked_only=True)
    with torch.no_grad():
        cells = shapes.distances(to_uint8(load_magvit("shapes/magvitv2").decode(traj.codes))).argmin(1).view(96, 16)
    shown = shapes.TEMPLATE_LABEL[cells] < len(shapes.LABELS)
    signs = torch.randint(2, (96,), generator=generator) * 2.0 - 1
    rows = []
    for t in range(16):
        logp = {kind: transition_log_prob(showo.logits(traj.state(t, showo.K), prompts), traj.codes, traj.order, t, kind,
                                          threshold=traj.threshold) for kind in ("p1", "p2")}
        terms = {"new": logp["p2"], "remasked": logp["p1"] - logp["p2"]}
        norms = {}
        for name, term in terms.items():
            gradients = torch.autograd.grad((term * signs).sum() / 96, showo.parameters(), retain_graph=True, allow_unused=True) if term.requires_grad else []
            norms[name] = sum(g.square().sum().item() for g in gradients if g is not None) ** 0.5
        rows.append({"t": t, "objects": round(shown[traj.order == t].float().mean().item(), 3), "remasked_positions": int((traj.order[0] > t).sum()),
                     **{f"log_{name}": round(term.mean().item(), 3) for name, term in terms.items()},
                     **{f"gradient_{name}": round(norm, 4) for name, norm in norms.items()}})
        print(rows[-1], flush=True)
    (OUT / "p1.json").write_text(json.dumps(rows, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["run", "report", "look"])
    p.add_argument("names", nargs="*", choices=[[], *arms()], metavar="NAME", help=f"to run: {', '.join(arms())} (default: all)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = p.parse_args()
    if args.names and args.what != "run":
        p.error(f"{args.what} takes no NAME")
    if args.what != "run":
        return report() if args.what == "report" else look()
    there = made()
    todo = {(flags(arm), seed): None for name in args.names or arms() for seed in SEEDS.get(name, (1, 2, 3)) for arm in arms()[name].values()}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: one(*job), [job for job in todo if job not in there]))


if __name__ == "__main__":
    main()
