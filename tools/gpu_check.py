"""Check on a CUDA machine, without a network, that training runs there, and measure it.

    TMPDIR=/dev/shm python tools/gpu_check.py --json results/gpu.json     # one GPU of 48 GB
    python tools/gpu_check.py --table results/gpu.json                    # its tables, of a file
    python tools/pretend_gpu.py tools/gpu_check.py --size tiny --no-compile   # seconds, on a CPU

First a rollout and updates of a Show-o 512 of random weights, beside plain's (bench.py), with the
seconds and the graphs that they needed to compile, their share of a large product's rate, and the
peak of memory. Then train.py's main, on models of random weights in the hub's layouts, in a
temporary folder (TMPDIR: 25 GB): whole steps, a resume, a KL, two epochs of Eq. 14. Each figure is
printed, and written to --json, as soon as it is known. Ends with status 1 when something fails.
"""
import argparse
import functools
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402

import checkpoint  # noqa: E402
import common  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from sample import Trajectory, transition_log_prob  # noqa: E402

# the size in bench.py; MAGVIT's sizes; open_clip's name of the reward; T of whole steps, and of
# the rest; the side of the product that is timed
SIZES = {"showo-512": ("showo-512", None, "ViT-H-14", 50, 8, 8192),
         "tiny": ("shapes", dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=[1, 1, 1], z_channels=8),
                  "tiny", 4, 2, 256)}
TINY_CLIP = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32,
                                             "patch_size": 16, "head_width": 16},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                          "layers": 1}}
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
            shown = value if isinstance(value, bool | str) else f"{value:.4g}"
            print(f"{part:<10} {name:<58} {shown}", flush=True)
        if self.path:
            checkpoint.write_json(self.path, self.found)


def forget_graphs():
    """Let the next call compile anew, as a process does that begins with other settings."""
    torch._dynamo.reset()
    model.compiled_block.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------ two layers

def two_layers(size, device, compiled, found):
    """How far logits and gradients of two layers are from a CPU's in float32: the norm of the
    difference over the norm."""
    phi, *rest = bench.SIZES[size]
    with mock.patch.dict(bench.SIZES, {"two layers": ({**phi, "num_hidden_layers": 2}, *rest)}):
        showo, _, _ = bench.random_showo("two layers", torch.device("cpu"))
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

def seconds_of(run, device, repeat=3):
    """Return the seconds of the first run, and the median of the next ones."""
    first = bench.timed(run, device)
    return first, sorted(bench.timed(run, device) for _ in range(repeat))[repeat // 2]


def speed(size, T, device, compiled, rate, found):
    """Rollouts and updates of a group, beside plain's."""
    showo, _, _ = bench.random_showo(size, device)
    showo.compiled, prompt = compiled, bench.random_prompt(showo)
    mid, steps = T // 2, min(4, T // 2)
    for p in showo.parameters():
        p.grad = torch.zeros_like(p)
    traj = bench.random_trajectory(showo, G, T)
    flop = bench.needed_flops(showo, traj, G, T, mid, steps, "p2")

    before = graphs()
    first, s = seconds_of(lambda: bench.our_rollout(showo, prompt, G, T), device, 1)
    found.add("rollout", seconds_a_picture=s / G, compile_seconds=first - s,
              share_of_matmul_rate=flop["rollout"] * G / s / rate, graphs=graphs() - before)
    s = bench.timed(lambda: bench.our_rollout(showo, prompt, 2 * G, T), device)
    found.add("rollout", seconds_a_picture_of_12=s / (2 * G))
    plain = bench.timed(lambda: bench.plain_rollout(showo, prompt, T), device)
    found.add("rollout", plain_seconds_a_picture=plain,
              ratio=plain / found.found["rollout"]["seconds_a_picture"])

    for name, kind, checkpointing in (("p2", "p2", False), ("p1", "p1", False),
                                      ("p2 --grad-checkpoint", "p2", True)):
        if checkpointing:
            forget_graphs()
        showo.grad_checkpoint, before = checkpointing, graphs()
        torch.cuda.reset_peak_memory_stats()

        def run(kind=kind):
            return bench.our_update(showo, prompt, traj, mid, kind, steps)
        first, s = seconds_of(run, device)
        found.add(name, seconds_an_iteration=s / steps, compile_seconds=first - s,
                  graphs=graphs() - before, peak_gb=torch.cuda.max_memory_allocated() / 1e9)
        if kind == "p2":
            found.add(name, share_of_matmul_rate=flop["update"] * steps / s / rate)
        if name == "p2":
            difference = bench.check_equal(showo, prompt, traj, mid, kind)
            _, plain = seconds_of(lambda: bench.plain_update(showo, prompt, traj, mid, "p2"),
                                  device)
            found.add(name, plain_seconds_an_iteration=plain, ratio=plain / (s / steps),
                      log_prob_difference=difference)
    bench.plain_phi.cache_clear()


# ------------------------------------------------------------------------------ train.py

def write_models(size, folder, device):
    """Write random models in the hub's layouts: folder/showo, folder/magvit, folder/clip.pt."""
    import open_clip
    name, vq, clip, *_ = SIZES[size]
    showo, _, _ = bench.random_showo(name, device)
    showo.tokenizer = model.AutoTokenizer.from_pretrained(ROOT / "shapes")
    showo.config["_class_name"] = "Showo"
    showo.save(folder / "showo")
    with torch.device(device):
        model.MAGVITv2(vq and {"encoder": vq, "decoder": vq}).save(folder / "magvit")
        if clip == "tiny":
            checkpoint.write_json(folder / "tiny.json", TINY_CLIP)
            open_clip.add_model_config(folder / "tiny.json")
        torch.save(open_clip.create_model(clip).state_dict(), folder / "clip.pt")


def counted(size, *how):
    """Return the GB that memory.py counted for a setting without torch.compile; NaN: it did not."""
    if size != "showo-512":
        return float("nan")
    rows = json.loads((ROOT / "results/memory.json").read_text())["GB"]
    transition, checkpointing, column = how
    row, = (row for row in rows if row["transition"] == transition and row["--lora"] == "no"
            and row["--micro-batch"] == G and row["--grad-checkpoint"] == checkpointing)
    return row[column]


def training(size, folder, compiled, found):
    """Whole steps; a resume; a KL; two epochs on the same rollouts under Eq. 14."""
    _, _, clip, T, short, _ = SIZES[size]

    def run(name, *flags):
        """Run train.py's main -> the rows of its metrics.jsonl."""
        gc.collect()                    # the models of the run before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        flags = ["--model", folder / "showo", "--vq", folder / "magvit", "--device", "cuda",
                 "--reward", f"clip:{clip}/{folder / 'clip.pt'}", "--prompts-per-step", 2,
                 "--group-size", G, "--micro-batch", G, "--warmup", 1, "--eval-every", 0,
                 "--compile" if compiled else "--no-compile", "--out", folder / name, *flags]
        with mock.patch.object(sys, "argv", ["train.py", *map(str, flags)]):
            train.main()
        return checkpoint.read_rows(folder / name / "metrics.jsonl")

    def memory(name, row, *how):
        found.add("peak GB", **{f"{name}, measured": row["peak_gib"] * 2 ** 30 / 1e9,
                                f"{name}, counted": counted(size, *how)})

    save = checkpoint.save
    with mock.patch.object(checkpoint, "save"):     # what is not resumed is not saved
        first, row = run("step", "--no-kl", "--unmask-steps", T, "--steps", 2)
        parts = {name: row[f"s_{name}"] for name in ("rollout", "reward", "update")}
        found.add("a step of 2 x 6", **parts, all=sum(parts.values()),
                  first=sum(first[f"s_{name}"] for name in parts))
        memory("--no-kl", row, "p2", "no", "--no-kl")
        found.add("holds", **{
            "all steps are taken, their gradients are not 0": bool(
                first["taken"] and row["taken"] and first["grad_norm"] and row["grad_norm"]),
            "the ratio is 1 on the first pass":
                first["ratio_mean"] == first["ratio_max"] == row["ratio_max"] == 1})

        first, last = run("kl", "--kl", "--unmask-steps", short, "--steps", 2)
        found.add("holds", **{"the KL is 0 at step 0": first["kl_ref"] == 0,
                              "the KL leaves 0": last["kl_ref"] > 0})
        memory("--kl", last, "p2", "no", "--kl")
        forget_graphs()
        row, = run("epochs", "--no-kl", "--unmask-steps", short, "--steps", 1, "--inner-epochs", 2,
                   "--grad-checkpoint", "--transition", "p1")
        found.add("holds", **{"two epochs of Eq. 14 move the ratio":
                              bool(row["taken"]) and row["ratio_max"] != 1})
        memory("p1 --no-kl --grad-checkpoint", row, "p1", "yes", "--no-kl")
        forget_graphs()

    flags = ("resumed", "--no-kl", "--unmask-steps", short, "--steps", 2, "--save-every", 1)

    def save_first(out, step, *rest):
        if step == 1:
            save(out, step, *rest)
    with mock.patch.object(checkpoint, "save", save_first):
        rows = run(*flags)
        again = run(*flags, "--resume")
    found.add("holds", **{"a resumed run takes the step that it took before": (
        len(again) == 2 and again[0] == rows[0]
        and abs(again[1]["reward_mean"] - rows[1]["reward_mean"]) < 0.5 * rows[1]["reward_std"]
        and abs(again[1]["entropy"] / rows[1]["entropy"] - 1) < 0.01)})


# ------------------------------------------------------------------------------ tables

def table(found) -> str:
    """Return the findings as Markdown, a table for each part."""
    lines = []
    for part, figures in found.items():
        lines += ["", f"| {part} | |", "|---|---|"]
        for name, value in figures.items():
            shown = value if isinstance(value, bool | str) else f"{value:.4g}"
            lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines[1:])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=list(SIZES), default="showo-512")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    p.add_argument("--table", type=Path, metavar="FILE", help="only print what such a file holds")
    args = p.parse_args()
    if args.table:
        return print(table(json.loads(args.table.read_text())))
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check.py: there is no CUDA device; tools/pretend_gpu.py runs it on a "
                         "CPU")
    start, found = time.perf_counter(), Findings(args.json)
    _, _, device = common.setup("cuda")
    size, _, _, T, _, side = SIZES[args.size]
    rate = bench.matmul_rate(device, side=side)
    found.add("card", name=torch.cuda.get_device_name(), torch=torch.__version__,
              date=time.strftime("%Y-%m-%d"), matmul_tflops=rate / 1e12)
    train.make_reward = functools.cache(train.make_reward)      # loaded once for all runs
    two_layers(size, device, args.compile, found)
    speed(size, T, device, args.compile, rate, found)
    forget_graphs()
    with tempfile.TemporaryDirectory() as scratch:
        write_models(args.size, Path(scratch), device)
        training(args.size, Path(scratch), args.compile, found)
    found.add("card", seconds_of_this_check=time.perf_counter() - start)
    if not all(found.found["holds"].values()):
        sys.exit(1)


if __name__ == "__main__":
    common.run(main)
