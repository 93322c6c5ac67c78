"""The paper's choices compared on the tiny base: every arm with the same budget and three seeds.

    python tests/experiments.py run [NAME ...]           # two runs at a time, one core each; goes on where it was stopped
    python tests/experiments.py report                   # tables on the screen, results/experiments/NAME.png
    python tests/experiments.py look                     # the two factors of Eq. 14, iteration by iteration

A run is train.py --model shapes --no-kl --filter-low with BUDGET and the flags of its arm. It leaves one row in
results/experiments/NAME.jsonl: flags, seed, the curve of GenEval's overall score (63 held-out prompts x 8 pictures) and of exact, and
means over steps of what the log holds. Intervals are 95%, Student's t over seeds."""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results/experiments"
SEEDS = (1, 2, 3)
BUDGET = "--model shapes --filter-low --steps 24 --prompts-per-step 12 --eval-every 12 --sample-every 0 --save-every 0".split()
PREDICTED = {  # written before any run of the experiment but the first two of "transition"
    "transition": "p2 best at 7e-4. ar close behind, at a smaller rate, since it sums over every masked token. p1 below both at every rate: on the "
                  "base its re-masked factor sends 6 to 60 times the gradient of the first in the first nine iterations (look). The mean over "
                  "positions helps p1 without closing the gap. gumbel between p1 and p2.",
    "kl": "Without KL the score falls at 2.8e-3; beta 0.1 holds there and loses a little at 7e-4; beta 0.01 makes no difference.",
    "filter": "No difference beyond the noise: rewards are 0 or 1, a low std means an all-right or all-wrong group, and a second try is as likely one.",
    "reduction": "random 8 close to all 16, its estimate being unbiased; first better than last, because the first tokens decide how many objects there "
                 "are; quarters worse than halves; critical as first. T 8 loses 0.05, T 5 0.15 when evaluated at 16.",
    "epochs": "Two epochs learn faster than one with p2, four no better than two. With p1 the sum's ratios spread so far that most are clipped from the "
              "second epoch on; the mean mends that.",
    "groups": "8 x 12 and 16 x 6 alike; 4 x 24 a little worse (noisy baselines), 32 x 3 worst (three prompts a step).",
    "transfer": "Trained on four families, counting gains half of what it gains when rewarded, position nothing.",
    "beyond": "adv mean within the noise. ratio mean (T 8, since at T = N one token moves per iteration and it is the sum) a little better "
              "than T 8: the iterations that move several tokens weigh less. forward with the first 4 iterations at "
              "least as good as the rollout's 16, at a third of the update's time."}
MEANS = ("reward_mean", "reward_std", "adv_zero", "resampled", "grad_norm", "ratio_max", "approx_kl", "clip_fraction", "kl_ref", "entropy", "skipped",
         "s_step")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def arms():
    """{experiment: {arm: flags over BUDGET}}; the first arm is the default, but in "epochs", where several tokens move at once."""
    out = {"transition": {}}
    rates = {"p2": ("7e-4", "1.4e-3", "3.5e-4"), "ar": ("7e-4", "1.4e-3", "3.5e-4"), "p1": ("7e-4", "3.5e-4", "1.75e-4"), "gumbel": ("7e-4", "3.5e-4")}
    for kind in rates:
        for lr in rates[kind]:
            out["transition"][f"{kind} lr {lr}"] = f"--transition {kind} --lr {lr}"
    for lr in ("7e-4", "3.5e-4"):
        out["transition"][f"p1 mean lr {lr}"] = f"--transition p1 --ratio mean --lr {lr}"
    out["kl"] = {f"beta {beta} lr {lr}": (f"--kl-beta {beta}" if float(beta) else "--no-kl") + f" --lr {lr}"
                 for lr in ("7e-4", "1.4e-3", "2.8e-3") for beta in ("0", "0.01", "0.1")}
    out["filter"] = {"percentile 10": "", "off": "-filter-low", "percentile 0": "--filter-percentile 0", "percentile 30": "--filter-percentile 30",
                     "percentile 30, tries 3": "--filter-percentile 30 --max-resample 3"}
    out["reduction"] = {"all 16": "", **{f"{which} {k}": f"--loss-steps {k} --loss-steps-from {which}"
                                         for k in (8, 4) for which in ("first", "last", "random", "critical")},
                        "T 8": "--unmask-steps 8", "T 5": "--unmask-steps 5"}
    out["epochs"] = {f"{kind} {ratio} {n}": f"--unmask-steps 8 --transition {kind} --ratio {ratio} --inner-epochs {n}"  # several tokens an iteration
                     for kind in ("p2", "p1") for ratio in ("sum", "mean") for n in (1, 2, 4)}
    out["groups"] = {f"G {G} x {96 // G}": f"--group-size {G} --prompts-per-step {96 // G} --filter-warmup {4 * (96 // G)}" for G in (8, 4, 16, 32)}
    out["transfer"] = {"all six families": "", "four families": "--prompts FOUR"}
    out["beyond"] = {"paper": "", "adv mean": "--adv mean", "T 8": "--unmask-steps 8", "T 8, ratio mean": "--unmask-steps 8 --ratio mean", "forward, all": "--trajectory forward",
                     "forward, first 4": "--trajectory forward --loss-steps 4", "forward, first 8": "--trajectory forward --loss-steps 8"}
    return out


def command(flags, seed, out):
    """The command line of one run."""
    flags = flags.split()
    base = [flag for flag in BUDGET if f"-{flag.lstrip('-')}" not in flags]
    if "FOUR" in flags:
        sys.path.insert(0, str(ROOT))
        import shapes
        rows = [line for line in shapes.prompts("train") if line["tag"] not in ("position", "counting")]
        four = Path(out).parent / "four.jsonl"
        four.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags[flags.index("FOUR")] = str(four)
    flags = [flag for flag in flags if not flag.startswith("-filter")]
    kl = [] if "--kl-beta" in flags or "--no-kl" in flags else ["--no-kl"]
    return [sys.executable, str(ROOT / "train.py"), *base, *kl, *flags, "--seed", str(seed), "--out", str(out)]


def one(name, arm, flags, seed):
    """Run it, and add its row; what is there already is not run again."""
    rows = OUT / f"{name}.jsonl"
    if rows.exists() and any(row["arm"] == arm and row["seed"] == seed and current(name, row) for row in map(json.loads, rows.open())):
        return
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command(flags, seed, Path(folder) / "run"), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            print(f"{name}, {arm}, seed {seed}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return
        read = lambda file: [json.loads(line) for line in (Path(folder) / "run" / file).open()]  # noqa: E731
        steps, evals = read("metrics.jsonl"), read("eval.jsonl")
    mean = lambda key: (lambda values: round(sum(values) / max(len(values), 1), 5))([row[key] for row in steps if row.get(key) is not None])  # noqa: E731
    row = {"arm": arm, "seed": seed, "flags": flags, "budget": " ".join(BUDGET), "eval": evals, **{key: mean(key) for key in MEANS}}
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}, {arm}, seed {seed}: {evals[-1]['overall']:.3f} ({row['s_step']:.1f} s a step)", flush=True)


def current(name, row):
    """A row that was made with the flags and the budget that its arm has now."""
    return row["flags"] == arms()[name].get(row["arm"]) and row["budget"] == " ".join(BUDGET)


def interval(values):
    """Mean and half width of its 95% interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, T95.get(len(values), 2.0) * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def report(name):
    """A table of the arms, and a picture: a dot per seed, a bar from before to the mean."""
    rows = [row for row in map(json.loads, (OUT / f"{name}.jsonl").open()) if current(name, row)]
    names = [arm for arm in arms()[name] if any(row["arm"] == arm for row in rows)]
    print(f"\n{name}\n\nPredicted: {PREDICTED[name]}\n\n| arm | overall, last | best | exact, last | objects | resampled | s a step | seeds |\n|---|---|---|---|---|---|---|---|")
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (760, 40 + 26 * len(names)), "white")
    draw, x = ImageDraw.Draw(sheet), lambda v: 200 + 520 * v  # noqa: E731
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        draw.line([(x(tick), 24), (x(tick), sheet.height - 10)], "lightgray")
        draw.text((x(tick) - 8, 6), f"{tick:g}", "gray", font)
    for i, arm in enumerate(names):
        mine = [row for row in rows if row["arm"] == arm]
        last, exact, objects = ([row["eval"][-1][key] for row in mine] for key in ("overall", "exact", "objects"))
        best = [max(e["overall"] for e in row["eval"]) for row in mine]
        (m, w), (b, _), (e, _), (o, _), (s, _) = map(interval, (last, best, exact, objects, [row["s_step"] for row in mine]))
        print(f"| {arm} | {m:.3f} ± {w:.3f} | {b:.3f} | {e:.3f} | {o:.2f} | {sum(row['resampled'] for row in mine) / len(mine):.2f} | {s:.2f} | {len(mine)} |")
        y = 32 + 26 * i
        draw.text((6, y), arm, "black", font)
        draw.rectangle([x(mine[0]["eval"][0]["overall"]), y + 5, max(x(m), x(mine[0]["eval"][0]["overall"])), y + 13], "lightsteelblue")
        draw.line([(x(m), y + 1), (x(m), y + 17)], "navy", 2)
        for value in last:
            draw.ellipse([x(value) - 3, y + 6, x(value) + 3, y + 12], "firebrick")
    sheet.save(OUT / f"{name}.png")


def look():
    """Eq. 14 taken apart on the base: at each of 16 iterations the two factors' log-probability, and the norm of the gradient that each
    sends to the weights when pictures are weighed by a random sign, as advantages do -> results/experiments/p1.json."""
    sys.path.insert(0, str(ROOT))
    import torch

    import shapes
    from model import load_showo
    from sample import rollout, transition_log_prob
    showo = load_showo("shapes")
    prompts = showo.encode([line["prompt"] for line in shapes.prompts("train", 96)])
    with torch.no_grad():
        prompt = showo.prefill(prompts)
    generator = torch.Generator().manual_seed(0)
    traj = rollout(lambda codes, at: showo.logits(codes, prompt, at=at), 96, showo.N, showo.K, 16, generator=generator, masked_only=True)
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
        rows.append({"t": t, "remasked_positions": int((traj.order[0] > t).sum()), **{f"log_{name}": round(term.mean().item(), 3) for name, term in terms.items()},
                     **{f"gradient_{name}": round(norm, 4) for name, norm in norms.items()}})
        print(rows[-1], flush=True)
    (OUT / "p1.json").write_text(json.dumps(rows, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["run", "report", "look"])
    p.add_argument("names", nargs="*", help=f"of {', '.join(arms())} (default: all)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = p.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if args.what == "look":
        return look()
    for name in args.names or arms():
        if args.what == "report":
            if (OUT / f"{name}.jsonl").exists():
                report(name)
            continue
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: one(name, *job), [(arm, flags, seed) for seed in SEEDS for arm, flags in arms()[name].items()]))


if __name__ == "__main__":
    main()
