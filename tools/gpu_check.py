"""Check on a CUDA machine, without a network, that training runs there, and measure it.

    TMPDIR=/dev/shm python tools/gpu_check.py --json results/gpu.json     # one GPU of 48 GB
    python tools/pretend_gpu.py tools/gpu_check.py --size shapes --no-compile   # seconds, on a CPU

First a rollout and updates of a Show-o 512 of random weights, beside plain's (bench.py), with the
seconds and the graphs that they needed to compile, their share of a large product's rate, and the
peak of memory. Then train.py's main, on models of random weights in the hub's layouts, in a
temporary folder (TMPDIR: 25 GB): whole steps, a resume, a KL, two epochs of Eq. 14; what memory.py
counts for them, with --micro-batch 6, is in results/memory.md. Each figure is printed, and written
to --json, as soon as it is known; speed.py makes tables of it. Ends with status 1 when something
fails.
"""
import argparse
import functools
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import rehearsal  # noqa: E402
from speed import shown  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from sample import Trajectory, transition_log_prob  # noqa: E402
from support import processes, run, weights  # noqa: E402

# by the size in bench.py: open_clip's name of the reward; T of whole steps, and of the rest
SIZES = {"showo-512": ("ViT-H-14", 50, 8), "shapes": ("rehearsed", 4, 2)}
G = 6               # pictures of a group, and of a micro-batch
CLOSE = {"float32": 5e-3, "bfloat16": 2e-2}     # relative, to a CPU's float32


class Findings:
    """What is known so far, printed and written at once."""

    def __init__(self, path):
        self.path, self.found = path, {}

    def add(self, part, **figures):
        """Add figures {name: number, bool or text} to a part of the report."""
        self.found.setdefault(part, {}).update(figures)
        for name, value in figures.items():
            print(f"{part:<10} {name:<58} {shown(value)}", flush=True)
        if self.path:
            weights.write_json(self.path, self.found)


def forget_graphs():
    """Let the next call compile anew, as a process does that begins with other settings."""
    torch._dynamo.reset()
    model.compiled_block.cache_clear()
    free()


def free():
    """Free what no one holds, and begin to look for the peak of memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------ two layers

def two_layers(size, device, compiled, found):
    """How far logits and gradients of two layers are from a CPU's in float32: the norm of the
    difference over the norm."""
    showo, _, _ = bench.random_showo(size, "cpu", num_hidden_layers=2)
    codes = torch.randint(showo.K, (2, showo.N))
    order = torch.arange(showo.N).expand(2, -1) % 2     # every other token is unmasked at t = 0
    prompt = bench.random_prompt(showo)

    def outcome(device, dtype, compiled):
        """Return logits and the gradient of a log-probability, as one vector each."""
        showo.to(device).compute_in(dtype)
        showo.compiled = compiled
        showo.zero_grad()
        traj = Trajectory(codes.to(device), order.to(device), None, showo.K)
        text = model.Prompt(prompt.ids.to(device), prompt.row.to(device)).repeat(2)
        logits = showo.logits(traj.state(0), text)
        transition_log_prob(logits, traj, 0, "p2").sum().backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in showo.parameters()])
        return logits.detach().flatten().cpu(), gradient

    exact = outcome("cpu", torch.float32, False)
    for name, close in CLOSE.items():
        ours = outcome(device, getattr(torch, name), compiled)
        far = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True))
        found.add("holds", **{f"two layers are the CPU's in {name}, to {close}": far < close})


# ------------------------------------------------------------------------------ speed

def speed(size, T, device, compiled, rate, found):
    """Rollouts and updates of a group, beside plain's."""
    showo, _, _ = bench.random_showo(size, device)
    showo.compiled, prompt = compiled, bench.random_prompt(showo)
    mid, steps, traj = T // 2, min(4, T // 2), bench.random_trajectory(showo, G, T)
    flop = bench.needed_flops(showo, traj, G, T, mid, steps, "p2")
    bench.zero_gradients(showo)

    def seconds_of(run, repeat):
        """Return the seconds of the first run, and the median of the next ones."""
        first, *others = (bench.timed(run, device) for _ in range(1 + repeat))
        return first, statistics.median(others)

    def measure(part, what, n, run, needed=None, plain=None, repeat=3):
        """Add the seconds of one `what` of the n that run() makes, and of plain()."""
        torch.cuda.reset_peak_memory_stats()
        before = graphs()
        first, s = seconds_of(run, repeat)
        found.add(part, **{f"seconds_{what}": s / n}, compile_seconds=first - s,
                  graphs=graphs() - before, peak_gb=torch.cuda.max_memory_allocated() / 1e9)
        if needed:
            found.add(part, share_of_matmul_rate=needed * n / s / rate)
        if plain:
            _, plain_s = seconds_of(plain, repeat)
            found.add(part, **{f"plain_seconds_{what}": plain_s}, ratio=plain_s / (s / n))

    def update(kind):
        return lambda: bench.our_update(showo, prompt, traj, mid, kind, steps)

    measure("rollout", "a_picture", G, lambda: bench.our_rollout(showo, prompt, G, T),
            flop["rollout"], lambda: bench.plain_rollout(showo, prompt, T), 1)
    s = bench.timed(lambda: bench.our_rollout(showo, prompt, 2 * G, T), device)
    found.add("rollout", seconds_a_picture_of_12=s / (2 * G))
    measure("p2", "an_iteration", steps, update("p2"), flop["update"],
            lambda: bench.plain_update(showo, prompt, traj, mid, "p2"))
    found.add("p2", log_prob_difference=bench.check_equal(showo, prompt, traj, mid, "p2"))
    bench.plain_phi.cache_clear()       # and its gradients
    measure("p1", "an_iteration", steps, update("p1"))
    forget_graphs()
    showo.grad_checkpoint = True
    measure("p2 --grad-checkpoint", "an_iteration", steps, update("p2"), flop["update"])


# ------------------------------------------------------------------------------ train.py

def write_models(size, folder, device):
    """Write random models in the hub's layouts: folder/showo, folder/magvit, folder/weights.pt."""
    showo, _, _ = bench.random_showo(size, device)
    showo.tokenizer = weights.library("transformers").AutoTokenizer.from_pretrained(ROOT / "shapes")
    showo.config["_class_name"] = "Showo"
    showo.save(folder / "showo")
    with torch.device(device):
        bench.random_magvit(size).save(folder / "magvit")
        if size == "shapes":
            rehearsal.save_tiny_clip(folder)
        else:
            clip = weights.library("open_clip").create_model(SIZES[size][0])
            torch.save(clip.state_dict(), folder / "weights.pt")


def training(size, folder, compiled, found):
    """Whole steps; a resume; a KL; two epochs on the same rollouts under Eq. 14."""
    clip, T, short = SIZES[size]

    def training_run(name, T, steps, *flags):
        """Run train.py's main -> the rows of its metrics.jsonl."""
        free()                          # the models of the run before
        flags = ["--model", folder / "showo", "--vq", folder / "magvit", "--device", "cuda",
                 "--reward", f"clip:{clip}/{folder / 'weights.pt'}", "--prompts-per-step", 2,
                 "--group-size", G, "--micro-batch", G, "--warmup", 1, "--eval-every", 0,
                 "--compile" if compiled else "--no-compile", "--out", folder / name,
                 "--unmask-steps", T, "--steps", steps, *flags]
        with mock.patch.object(sys, "argv", ["train.py", *map(str, flags)]):
            train.main()
        return run.read_rows(folder / name / "metrics.jsonl")

    def peak(name, row):
        found.add("peak GB", **{name: row["peak_gib"] * 2 ** 30 / 1e9})

    save = run.save
    with mock.patch.object(run, "save"):     # what is not resumed is not saved
        first, row = training_run("step", T, 2, "--no-kl")
        parts = {name: row[f"s_{name}"] for name in ("rollout", "reward", "update")}
        found.add("a step of 2 x 6", **parts, all=sum(parts.values()),
                  first=sum(first[f"s_{name}"] for name in parts))
        peak("--no-kl", row)
        found.add("holds", **{
            "all steps are taken, their gradients are not 0": bool(
                first["taken"] and row["taken"] and first["grad_norm"] and row["grad_norm"]),
            "the ratio is 1 on the first pass":
                first["ratio_mean"] == first["ratio_max"] == row["ratio_max"] == 1})

        first, last = training_run("kl", short, 2, "--kl")
        found.add("holds", **{"the KL is 0 at step 0": first["kl_ref"] == 0,
                              "the KL leaves 0": last["kl_ref"] > 0})
        peak("--kl", last)
        forget_graphs()
        row, = training_run("epochs", short, 1, "--no-kl", "--inner-epochs", 2,
                            "--grad-checkpoint", "--transition", "p1")
        found.add("holds", **{"two epochs of Eq. 14 move the ratio":
                              bool(row["taken"]) and row["ratio_max"] != 1})
        peak("p1 --no-kl --grad-checkpoint", row)
        forget_graphs()

    def save_first(out, step, *rest):
        if step == 1:
            save(out, step, *rest)
    how = "resumed", short, 2, "--no-kl", "--save-every", 1
    with mock.patch.object(run, "save", save_first):
        rows, again = training_run(*how), training_run(*how, "--resume")
    found.add("holds", **{"a resumed run takes the step that it took before": (
        len(again) == 2 and again[0] == rows[0]
        and abs(again[1]["reward_mean"] - rows[1]["reward_mean"]) < 0.5 * rows[1]["reward_std"]
        and abs(again[1]["entropy"] / rows[1]["entropy"] - 1) < 0.01)})


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=list(SIZES), default="showo-512")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check.py: there is no CUDA device; tools/pretend_gpu.py runs it on a "
                         "CPU")
    start, found, T = time.perf_counter(), Findings(args.json), SIZES[args.size][1]
    _, _, device = processes.setup("cuda")
    rate = bench.matmul_rate(device, args.size)
    found.add("card", name=torch.cuda.get_device_name(), torch=torch.__version__,
              date=time.strftime("%Y-%m-%d"), matmul_tflops=rate / 1e12)
    train.make_reward = functools.cache(train.make_reward)      # loaded once for all runs
    two_layers(args.size, device, args.compile, found)
    speed(args.size, T, device, args.compile, rate, found)
    forget_graphs()
    with tempfile.TemporaryDirectory() as scratch:
        write_models(args.size, Path(scratch), device)
        training(args.size, Path(scratch), args.compile, found)
    found.add("card", seconds_of_this_check=time.perf_counter() - start)
    if not all(found.found["holds"].values()):
        sys.exit(1)


if __name__ == "__main__":
    processes.run(main)
