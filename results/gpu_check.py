"""Check on a CUDA machine, without a network, that training runs there, and measure it.

    python results/gpu_check.py --json gpu.json     # one GPU of 48 GB, 50 GB of disk
    python tests/pretend_gpu.py results/gpu_check.py --size tiny    # seconds, on a CPU

A Show-o 512, its image tokenizer and a CLIP ViT-H-14 of random weights are written into a temporary
folder (TMPDIR) in the layouts of the hub; train.py's main then rolls out, decodes, scores, updates,
saves and resumes, with a KL, and with two epochs on the same rollouts. A table says what holds, how
long each part took, which share of a large product's rate it reached, and the peak of memory beside
the one that memory.py counted. Ends with status 1 when something does not hold.
"""
import argparse
import contextlib
import gc
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import bench  # noqa: E402

import checkpoint  # noqa: E402
import common  # noqa: E402
import train  # noqa: E402
from model import SPECIALS, MAGVITv2, Showo, load_tokenizer  # noqa: E402
from sample import mask_schedule, transition_log_prob  # noqa: E402

# Phi's sizes, then Show-o's: text vocabulary, K, N; MAGVIT's sizes; open_clip's name of the reward;
# T, and the side of the product that is timed
SIZES = {
    "showo-512": ({}, 50295, 8192, 1024, None, "ViT-H-14", 50, 8192),
    "tiny": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=2), 35, 64, 16,
             dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=[1, 1, 1], z_channels=6), "tiny", 4,
             256)}
TINY_CLIP = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32,
                                             "patch_size": 16, "head_width": 16},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                          "layers": 1}}
G = 6               # pictures of a group, and of a micro-batch
CLOSE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}     # relative, to a CPU's float32


# ------------------------------------------------------------------------------ set-up

def new_showo(size, device, **phi):
    """Return a random Showo of a size; phi: what differs from it."""
    sizes, n_text, K, N, *_ = SIZES[size]
    config = {"vocab_size": n_text + len(SPECIALS) + K + 1, "llm_vocab_size": n_text,
              "codebook_size": K, "num_vq_tokens": N}
    torch.manual_seed(0)
    with torch.device(device):
        return Showo(config, sizes | phi, load_tokenizer(ROOT / "shapes")).eval()


def write_models(size, folder, device):
    """Write random models in the hub's layouts: folder/showo, folder/magvit, folder/clip.pt."""
    import open_clip
    *_, vq, clip, _, _ = SIZES[size]
    new_showo(size, device).save(folder / "showo")
    with torch.device(device):
        MAGVITv2(vq, vq).save(folder / "magvit")
    if clip == "tiny":
        checkpoint.write_json(folder / "tiny.json", TINY_CLIP)
        open_clip.add_model_config(folder / "tiny.json")
    torch.save(open_clip.create_model(clip).state_dict(), folder / "clip.pt")


def run(size, folder, name, *flags):
    """Run train.py's main -> the rows of its metrics.jsonl."""
    gc.collect()                    # the models of the run before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    *_, clip, T, _ = SIZES[size]
    flags = ["--model", folder / "showo", "--vq", folder / "magvit", "--device", "cuda",
             "--reward", f"clip:{clip}/{folder / 'clip.pt'}", "--prompts-per-step", 2,
             "--group-size", G, "--micro-batch", G, "--unmask-steps", T, "--warmup", 1,
             "--sample-every", 0, "--save-every", 0, "--out", folder / name, *flags]
    sys.argv = ["train.py", *map(str, flags)]
    train.main()
    return checkpoint.read_rows(folder / name / "metrics.jsonl")


@contextlib.contextmanager
def timing(seconds, *names):
    """While this lasts, add the seconds that train.py's functions of these names take to a dict."""
    plain = {name: getattr(train, name) for name in names}

    def timed(name):
        """Return train.py's function of a name, timed."""
        def call(*args, **kwargs):
            start = time.perf_counter()
            out = plain[name](*args, **kwargs)
            torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
            return out
        return call
    try:
        for name in names:
            setattr(train, name, timed(name))
        yield
    finally:
        for name, function in plain.items():
            setattr(train, name, function)


# ------------------------------------------------------------------------------ what holds

def two_layers(size, device) -> dict:
    """Return, by type, how far logits and gradients of two layers are from a CPU's in float32: the
    norm of the difference over the norm."""
    showo = new_showo(size, "cpu", num_hidden_layers=2)
    target = torch.randint(showo.K, (1, showo.N))
    order = torch.arange(showo.N)[None] % 2             # every other token is unmasked at t = 0
    codes = torch.where(order == 0, showo.K, target)

    def outcome(device, dtype):
        """Return logits and the gradient of a log-probability, as one vector each."""
        showo.to(device).compute_in(dtype if dtype != torch.float32 else None)
        showo.zero_grad()
        logits = showo.logits(codes.to(device), showo.encode(["a photo of a red circle"]))
        logp = transition_log_prob(logits, target.to(device), order.to(device), 0, "p2")
        logp.sum().backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in showo.parameters()])
        return logits.detach().flatten().cpu(), gradient

    exact, found = outcome("cpu", torch.float32), {}
    for dtype in CLOSE:
        ours = outcome(device, dtype)
        found[dtype] = [((a - b).norm() / b.norm()).item()
                        for a, b in zip(ours, exact, strict=True)]
    return found


def counted(size, *how):
    """Return the GB that memory.py counted for a setting, None for a size that it did not."""
    if size != "showo-512":
        return None
    rows = json.loads((ROOT / "results/memory.json").read_text())["GB"]
    transition, checkpointing, column = how
    row, = (row for row in rows if row["transition"] == transition and row["--lora"] == "no"
            and row["--micro-batch"] == G and row["--grad-checkpoint"] == checkpointing)
    return row[column]


def needed_flops(size, showo, n_images):
    """Return the FLOPs that rollout and update of so many pictures need."""
    *_, T, _ = SIZES[size]
    n_masked = [showo.N, *mask_schedule(showo.N, T).tolist()]
    tokens, context = showo.N + 2, showo.N + 22
    rollout = bench.flops(showo, tokens * T, context, sum(n_masked[:-1]))
    update = 3 * bench.flops(showo, tokens * T, context, showo.N)      # p2: each token once
    return {"rollout": n_images * rollout, "update": n_images * update}


def check(size, folder, device) -> dict:
    """Return {"holds": {statement: bool}, "seconds", "share_of_matmul_rate", "memory_gb", ...}."""
    holds, seconds, memory = {}, {}, {}
    write_models(size, folder, device)
    with timing(seconds, "load_policy", "save_checkpoint"):
        rows = run(size, folder, "plain", "--no-kl", "--steps", 2, "--save-every", 1)
    holds["no step was skipped"] = not any(row["skipped"] for row in rows)
    holds["the ratio is 1 on the first pass"] = all(
        row["ratio_mean"] == row["ratio_max"] == 1 for row in rows)
    holds["the gradient is not 0"] = all(row["grad_norm"] > 0 for row in rows)
    seconds |= {part: rows[1][f"s_{part}"] for part in ("rollout", "decode", "reward", "update")}
    memory["--no-kl"] = rows[1]["peak_gib"], counted(size, "p2", "no", "--no-kl")

    shutil.rmtree(folder / "plain/checkpoint-2")
    again = run(size, folder, "plain", "--no-kl", "--steps", 2, "--resume")
    shutil.rmtree(folder / "plain")
    holds["a resumed run takes the step that it took before"] = (
        len(again) == 2 and again[0] == rows[0]
        and abs(again[1]["reward_mean"] - rows[1]["reward_mean"]) < 0.5 * rows[1]["reward_std"]
        and abs(again[1]["entropy"] / rows[1]["entropy"] - 1) < 0.01)

    first, last = run(size, folder, "kl", "--kl", "--steps", 2)
    shutil.rmtree(folder / "kl")
    holds["ratio 1 and KL 0 against the reference at step 0"] = (
        first["ratio_max"] == 1 and first["kl_ref"] == 0)
    holds["the KL leaves 0"] = last["kl_ref"] > 0
    memory["--kl"] = last["peak_gib"], counted(size, "p2", "no", "--kl")
    row, = run(size, folder, "epochs", "--no-kl", "--steps", 1, "--inner-epochs", 2,
               "--grad-checkpoint", "--transition", "p1")
    holds["two epochs on the same rollouts move the ratio"] = (
        not row["skipped"] and row["ratio_max"] != 1)
    memory["p1 --no-kl --grad-checkpoint"] = row["peak_gib"], counted(size, "p1", "yes", "--no-kl")

    far = two_layers(size, device)
    for dtype, (logits, gradient) in far.items():
        holds[f"two layers are the CPU's in {str(dtype)[6:]}, to {CLOSE[dtype]}"] = (
            max(logits, gradient) < CLOSE[dtype])
    rate = bench.matmul_rate(device, side=SIZES[size][-1])
    flops = needed_flops(size, new_showo(size, "meta"), 2 * G)
    return {
        "size": size, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "holds": holds, "seconds": seconds, "matmul_tflops": rate / 1e12,
        "share_of_matmul_rate": {part: n / seconds[part] / rate for part, n in flops.items()},
        "far_from_cpu": {str(dtype)[6:]: values for dtype, values in far.items()},
        "memory_gb": {how: {"measured": peak * 2 ** 30 / 1e9, "counted": count}
                      for how, (peak, count) in memory.items()}}


def table(found) -> str:
    """Return the findings as text."""
    lines = [f"{found['device']}, torch {found['torch']}, {found['size']}: seconds of a step of 2 "
             f"prompts x {G} pictures; a large product: {found['matmul_tflops']:.1f} TFLOP/s", ""]
    for part, seconds in found["seconds"].items():
        share = found["share_of_matmul_rate"].get(part)
        lines.append(f"{part:<36} {seconds:9.2f} s" + (f" {share:7.1%} of it" if share else ""))
    for how, gb in found["memory_gb"].items():
        count = "not counted" if gb["counted"] is None else f"counted {gb['counted']:.1f}"
        lines.append(f"{'peak ' + how:<36} {gb['measured']:9.1f} GB, {count}")
    for statement, right in found["holds"].items():
        lines.append(f"{'holds' if right else 'FAILS'}  {statement}")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=list(SIZES), default="showo-512")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise checkpoint.InputError("gpu_check.py: no CUDA device is there; tests/pretend_gpu.py "
                                    "runs it on a CPU")
    with tempfile.TemporaryDirectory() as scratch:
        found = check(args.size, Path(scratch), torch.device("cuda", torch.cuda.current_device()))
    print(table(found))
    if args.json:
        checkpoint.write_json(args.json, found)
    if not all(found["holds"].values()):
        sys.exit(1)


if __name__ == "__main__":
    common.run(main)
