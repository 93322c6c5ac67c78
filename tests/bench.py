"""Speed and memory, measured side by side in one run; JSON under results/ with --json.

    python tests/bench.py --size small              # ours against plain: rollout and update, interleaved; peak memory
    python tests/bench.py ladder --size small       # one pass of the network, an idea more at every rung
    python tests/bench.py curve --size small        # seconds of a rollout and an update over G, T and prompts
    python tests/bench.py load      # memory: loading a synthetic full-size Show-o (5.8 GB, a sparse file), decoding 6 x 512 x 512

plain does what the released code does: rollouts of one image at a time, the padded row of 129 text columns in every pass, the
whole head, a 4-D mask, probabilities of all positions; its update takes a group at a time and keeps all logits. Random weights,
the same for both; before anything is timed, both must give the same log-probabilities of the same trajectories.
"""
import argparse
import json
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT, DATA = Path(__file__).parent.parent, Path(__file__).parent / "data"
sys.path.insert(0, str(ROOT))

from model import SPECIALS, Prompt, Showo  # noqa: E402
from sample import Trajectory, choose_and_move, mask_schedule, rollout, temperatures, transition_log_prob  # noqa: E402
from train import move_at  # noqa: E402

SIZES = {  # Phi's sizes, then Show-o's; T and G of the run they stand for
    "shapes": (dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4), 35, 64, 16, 16, 8),
    "small": (dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8), 50295, 8192, 256, 18, 6),
    "showo-256": ({}, 50295, 8192, 256, 50, 6), "showo-512": ({}, 50295, 8192, 1024, 50, 6)}


# -------------------------------------------------------------------------------------------------- speed

def build(size, device):
    """-> Showo with random weights, bf16 computation on a GPU, and (T, G)."""
    phi, n_text, K, N, T, G = SIZES[size]
    config = {"vocab_size": n_text + len(SPECIALS) + K + 1, "llm_vocab_size": n_text, "codebook_size": K, "num_vq_tokens": N}
    torch.manual_seed(0)
    with torch.device(device):
        showo = Showo(config, phi | {"initializer_range": 0.05}, None)
    showo.compute_dtype = torch.bfloat16 if torch.device(device).type == "cuda" else None
    return showo.eval(), T, G


def text_of(showo, P, device, length=20):
    """P prompts of length tokens in 129 columns."""
    ids = torch.full((P, 129), showo.pad, device=device)
    ids[:, -length:] = torch.randint(showo.text_vocab, (P, length), generator=torch.Generator().manual_seed(1)).to(device)
    return Prompt(ids, ids != showo.pad, torch.arange(P, device=device))


def plain_logits(showo, codes, prompt):
    """The logits of every position of the padded row over the whole vocabulary -> (B, 131 + N, V) and the slice of image logits."""
    B, N = codes.shape
    column, text = torch.ones_like(codes[:, :1]), prompt.ids[prompt.row]
    ids = torch.cat([text, column * showo.soi, codes + showo.code_offset, column * showo.eoi], 1)
    L = ids.shape[1]
    i = torch.arange(L, device=ids.device)
    sees = (i[:, None] >= i) | ((i >= 129)[:, None] & (i >= 129))
    mask = torch.where(sees & (ids != showo.pad)[:, None] | (i[:, None] == i), 0.0, -1e9)[:, None]
    with showo.autocast():
        logits = showo.showo(input_ids=ids, attention_mask=mask, position_ids=i[None], use_cache=False).logits
    return logits, logits[:, -N - 1:-1, showo.code_offset:-1].float()


def our_rollout(showo, prompt, B, T, device, seeds):
    with torch.no_grad(), showo.autocast():
        ready = showo.prefill(prompt.repeat(B // len(prompt)))
        return rollout(lambda codes, at: showo.logits(codes, ready, at=at), B, showo.N, showo.K, T, masked_only=True,
                       generator=[torch.Generator(device).manual_seed(s) for s in seeds])


def plain_rollout(showo, prompt, T, device, seed):
    """Show-o's loop for one image: probabilities of all positions, multinomial, all logits kept -> the final codes."""
    N, K, generator, kept = showo.N, showo.K, torch.Generator(device).manual_seed(seed), []
    codes, stay, temps = torch.full((1, N), K, device=device), mask_schedule(N, T).tolist(), temperatures(T)
    with torch.no_grad():
        for t in range(T):
            kept.append(plain_logits(showo, codes, prompt)[1].clone())
            probs, masked = kept[-1].softmax(-1), codes == K
            drawn = torch.where(masked, torch.multinomial(probs.view(N, K), 1, generator=generator).view(1, N), codes)
            conf = probs.gather(-1, drawn.clamp(max=K - 1)[..., None])[..., 0]
            gumbel = -torch.rand(1, N, generator=generator, device=device).clamp(1e-20).log().neg().log()
            new = choose_and_move(conf.clamp(min=1e-20).log(), masked, stay[t], temps[t], gumbel)
            codes = torch.where(new, drawn, codes)
    return codes


def our_step(showo, prompt, traj, t, kind, steps=1):
    """log-probabilities and the backward pass of trajectory steps t .. t + steps - 1 of a group."""
    ends = [showo.N - n for n in mask_schedule(showo.N, traj.threshold.shape[1]).tolist()]
    place, rows = traj.order.argsort(dim=1, stable=True), torch.arange(len(traj.codes), device=traj.codes.device)
    with showo.autocast():
        ready, out = showo.prefill(prompt.repeat(len(rows))), []
        ready.cache.cut()
        for s in range(t, t + steps):
            first = ends[s - 1] if s else 0
            at = place[:, first:max(ends[s], first + 1) if kind == "p2" else None]
            logits = showo.logits(traj.state(s, showo.K), ready, at=at)
            out.append(transition_log_prob(logits, **move_at(traj, rows, at, s, kind)))
            (out[-1].mean() / steps).backward()
        ready.cache.backward()
    return out[0].detach()


def plain_step(showo, prompt, traj, t, kind, steps=1):
    out = []
    for s in range(t, t + steps):
        _, image = plain_logits(showo, traj.state(s, showo.K), prompt.repeat(len(traj.codes)))
        logp, new, remasked = image.log_softmax(-1), traj.order == s, traj.order > s
        terms = logp.gather(-1, traj.codes[..., None])[..., 0] * new
        if kind == "p1":
            mass = (logp.exp() * (logp.exp() < traj.threshold[:, s, None, None])).sum(-1)
            terms = terms + torch.where(remasked & (mass > 1e-37), mass.clamp(min=1e-37).log(), 0)
        out.append(terms.sum(1))
        (out[-1].mean() / steps).backward()
    return out[0].detach()


def flops(showo, tokens, context, wanted):
    """Of one forward pass of ours: tokens, each seeing context others, through the blocks, but only the wanted ones through the
    last one (whose keys and values are of all) and the head."""
    width, layers = showo.phi_config.hidden_size, showo.phi_config.num_hidden_layers
    block = 2 * sum(p.numel() for p in showo.showo.model.layers[0].parameters()) + 4 * width * context      # per token
    return (layers - 1) * block * tokens + 4 * width ** 2 * tokens + (block + 2 * width * showo.K) * wanted


def matmul_rate(device, seconds=1.0):
    """FLOP/s of a large product, bf16 on a GPU, fp32 on a CPU: the best of several in about as many seconds."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, best, end = torch.randn(n, n, device=device, dtype=dtype), 0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        best = max(best, 2 * n ** 3 / timed(lambda: a @ a, device))
    return best


def timed(run, device):
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def peak_of(args, who):
    """GB at the peak of an update in a process of its own, weights and gradients included."""
    command = [sys.executable, __file__, "memory", "--who", who, "--size", args.size, "--device", args.device, "--transition", args.transition]
    command += ["--group", str(args.group)] if args.group else []
    command += ["--unmask-steps", str(args.unmask_steps)] if args.unmask_steps else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def high_water():
    """Bytes resident at most so far. Not ru_maxrss, which a process inherits from the one that started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def memory(args):
    device = torch.device(args.device)
    showo, T, G = build(args.size, device)
    prompt, G, T = text_of(showo, 1, device), args.group or G, args.unmask_steps or T
    traj = random_trajectory(showo, G, T, device)
    for p in showo.parameters():
        p.grad = torch.zeros_like(p)
    (plain_step if args.who == "plain" else our_step)(showo, prompt, traj, T // 2, args.transition)
    print(torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else high_water() / 1e9)


def bench_speed(args):
    """Ratios plain / ours of the medians of interleaved runs."""
    device = torch.device(args.device)
    showo, T, G = build(args.size, device)
    T, G, kind, mid = args.unmask_steps or T, args.group or G, args.transition, (args.unmask_steps or T) // 2
    prompt = text_of(showo, 1, device)
    traj = our_rollout(showo, prompt, G, T, device, range(G))
    with torch.no_grad():  # the same noise: plain's logits under our sampler
        alone = rollout(lambda codes: plain_logits(showo, codes, prompt)[1], 1, showo.N, showo.K, T, generator=torch.Generator(device).manual_seed(0))
    ours, plain = (step(showo, prompt, traj, mid, kind) for step in (our_step, plain_step))
    off = ((ours - plain).abs() / plain.abs()).max().item()
    assert off < (2e-2 if showo.compute_dtype else 1e-4), f"log-probabilities differ by {off}"
    runs = {"rollout_plain": lambda: plain_rollout(showo, prompt, T, device, 0), "rollout_ours": lambda: our_rollout(showo, prompt, G, T, device, range(G)),
            "update_plain": lambda: plain_step(showo, prompt, traj, mid, kind), "update_ours": lambda: our_step(showo, prompt, traj, mid, kind, args.steps)}
    seconds, rates = {name: [] for name in runs}, []
    for _ in range(args.repeat):
        rates.append(matmul_rate(device))
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
            showo.zero_grad(set_to_none=False)
    s = {name: statistics.median(values) for name, values in seconds.items()}
    s["rollout_ours"], s["update_ours"] = s["rollout_ours"] / G, s["update_ours"] / args.steps
    masked = sum([showo.N] + mask_schedule(showo.N, T).tolist()[:-1])
    steps = range(mid, mid + args.steps)
    new = sum(((traj.order == t) if kind == "p2" else (traj.order >= t)).sum().item() for t in steps) / G / args.steps
    needed = {"rollout": flops(showo, (showo.N + 2) * T, showo.N + 22, masked),
              "update": 3 * G * flops(showo, showo.N + 2, showo.N + 22, new)}
    rate = max(rates)
    out = {"size": args.size, "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
           "torch": torch.__version__, "T": T, "G": G, "transition": kind, "repeat": args.repeat, "log_prob_relative_difference": off,
           "same_codes_as_plain": (traj.codes[0] == alone.codes[0]).float().mean().item(),
           "rollout_ratio": s["rollout_plain"] / s["rollout_ours"], "update_ratio": s["update_plain"] / s["update_ours"],
           "images_per_s": {k: 1 / s[f"rollout_{k}"] for k in ("plain", "ours")}, "trajectory_steps_per_s": {k: 1 / s[f"update_{k}"] for k in ("plain", "ours")},
           "tokens_per_s": {k: showo.N / s[f"rollout_{k}"] for k in ("plain", "ours")}, "matmul_tflops": rate / 1e12,
           "share_of_matmul_rate": {name: flop / s[f"{name}_ours"] / rate for name, flop in needed.items()},
           "floor_s": {name: flop / rate for name, flop in needed.items()}, "seconds": s, "all_seconds": seconds}
    out["update_peak_gb"] = {who: peak_of(args, who) for who in ("plain", "ours")}
    out["update_memory_ratio"] = out["update_peak_gb"]["ours"] / out["update_peak_gb"]["plain"]
    print(json.dumps({k: v for k, v in out.items() if k != "all_seconds"}, indent=2))
    return out


def bench_ladder(args):
    """Milliseconds of one pass for a group in the middle of a rollout, forward, and forward and backward for p2: medians."""
    device = torch.device(args.device)
    showo, T, G = build(args.size, device)
    prompt, mid, T = text_of(showo, 1, device), T // 2, T
    traj = random_trajectory(showo, G, T, device)
    codes, ready = traj.state(mid, showo.K), showo.prefill(prompt.repeat(G))
    place, stay = traj.order.argsort(dim=1, stable=True), [showo.N] + mask_schedule(showo.N, T).tolist()
    at = {"all": None, "masked": place[:, showo.N - stay[mid]:], "new": place[:, showo.N - stay[mid]:showo.N - stay[mid + 1]]}

    def image_columns():
        """plain's body, then the image columns of the head alone."""
        model, showo.showo.lm_head.forward = showo.showo, lambda x: torch.nn.functional.linear(x[:, -showo.N - 1:-1], *columns)
        out = plain_logits(showo, codes, prompt.repeat(G))[0]
        del model.lm_head.forward
        return out

    head, part = showo.showo.lm_head, slice(showo.code_offset, showo.code_offset + showo.K)
    columns = head.weight[part].detach(), head.bias[part].detach()
    forward = {"plain: an image at a time": lambda: [plain_logits(showo, codes[i:i + 1], prompt)[1] for i in range(G)],
               "a group in one batch": lambda: plain_logits(showo, codes, prompt.repeat(G))[1], "only the image columns of the head": image_columns,
               "the text once": lambda: showo.logits(codes, ready),
               "head and last block at masked positions only": lambda: showo.logits(codes, ready, at=at["masked"])}
    backward = {"plain, a group in one batch": lambda: plain_step(showo, prompt, traj, mid, "p2"),
                "the text once, image columns only": lambda: showo.logits(codes, ready, at=None).log_softmax(-1)[..., 0].mean().backward(retain_graph=False),
                "head and last block at new positions only": lambda: showo.logits(codes, ready, at=at["new"]).log_softmax(-1)[..., 0].mean().backward()}
    ready.cache.cut()
    out = {"size": args.size, "device": args.device, "threads": torch.get_num_threads(), "masked": stay[mid], "new": stay[mid] - stay[mid + 1]}
    for name, runs, grad in (("forward_ms", forward, False), ("forward_and_backward_ms", backward, True)):
        took = {rung: [] for rung in runs}
        with torch.set_grad_enabled(grad):
            for _ in range(args.repeat):
                for rung, run in runs.items():
                    took[rung].append(1000 * timed(run, device))
        out[name] = {rung: statistics.median(values) for rung, values in took.items()}
    print(json.dumps(out, indent=2))
    return out


def random_trajectory(showo, G, T, device):
    """Of the right shape and schedule, without a rollout."""
    moved = -mask_schedule(showo.N, T).diff(prepend=torch.tensor([showo.N]))
    order = torch.arange(T).repeat_interleave(moved)
    return Trajectory(torch.randint(showo.K, (G, showo.N)).to(device), torch.stack([order[torch.randperm(showo.N)] for _ in range(G)]).to(device),
                      torch.full((G, T), 0.01, device=device), None)


def bench_curve(args):
    """Seconds of a rollout and of an update over all T iterations, as G, T and the number of prompts grow."""
    device = torch.device(args.device)
    showo, T0, G0 = build(args.size, device)
    rows = []
    for P, G, T in [(1, G, T0) for G in (2, 6, 12, 24)] + [(1, G0, T) for T in (10, 20, 50)] + [(P, G0, 10) for P in (1, 2, 4)]:
        took = {"rollout": [], "update": []}
        for _ in range(args.repeat):
            trajs = []
            took["rollout"].append(timed(lambda: trajs.extend(our_rollout(showo, text_of(showo, 1, device), G, T, device, range(G)) for _ in range(P)), device))  # noqa: B023
            took["update"].append(timed(lambda: [our_step(showo, text_of(showo, 1, device), traj, 0, "p2", T) for traj in trajs], device))  # noqa: B023
        rows.append({"prompts": P, "G": G, "T": T, **{k: statistics.median(v) for k, v in took.items()}})
        rows[-1] |= {f"{k}_per_image_and_iteration": rows[-1][k] / (P * G * T) for k in took}
        print(json.dumps(rows[-1]), flush=True)
    return {"size": args.size, "device": args.device, "rows": rows}


# --------------------------------------------------------------------------------------------------- load

LOAD = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from bench import high_water as peak
from model import load_showo
before = peak()
showo = load_showo({folder!r}, tokenizer={tokenizer!r}, dtype=torch.{dtype})
for p in showo.parameters():
    p.data.view(-1)[::1024].sum()                   # every page of a mapped weight is read
print(sum(p.numel() * p.element_size() for p in showo.parameters()), peak() - before)
"""


CONVERT = """
import os, torch
from safetensors.torch import load_file
torch.save(load_file({folder!r} + "/pytorch_model.safetensors"), {folder!r} + "/pytorch_model.bin")
os.unlink({folder!r} + "/pytorch_model.safetensors")
"""

DECODE = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from bench import high_water as peak
from model import MAGVITv2
magvit = MAGVITv2().requires_grad_(False)
before = peak()
magvit.decode(torch.randint(8192, (6, 1024)))
print(peak() - before)
"""


def measure(code, **names):
    """The whole numbers that a Python process of its own prints."""
    text = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), **names)], check=True, capture_output=True, text=True).stdout
    return [int(word) for word in text.split()]


def full_size_folder(folder):
    """A checkpoint of Show-o 512's names and shapes, all zeros, as a sparse file."""
    tensors = json.loads((DATA / "showo/showo_512_manifest.json").read_text())["w_clip_vit_false"]["tensors"]
    header, end = {}, 0
    for name, entry in tensors.items():
        size = 4
        for n in entry["shape"]:
            size *= n
        header[name] = {"dtype": "F32", "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(dict(vocab_size=58498, llm_vocab_size=50295, codebook_size=8192, num_vq_tokens=1024)))


def bench_load():
    """Peak of the resident memory while loading and then reading all weights, over the weights' bytes."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        full_size_folder(Path(folder))
        for name, dtype in (("safetensors", "float32"), ("safetensors", "bfloat16"), ("bin", "bfloat16")):
            if name == "bin":
                measure(CONVERT, folder=folder)
            stays, peak = measure(LOAD, folder=folder, tokenizer=str(DATA / "prompting/tokenizer"), dtype=dtype)
            out[f"{name} as {dtype}"] = {"weights_gb": stays / 1e9, "peak_gb": peak / 1e9, "ratio": peak / stays}
            print(f"load {name} as {dtype}: weights {stays / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ratio {peak / stays:.3f}", flush=True)
    [chunked] = measure(DECODE)
    out["decode_gb"] = chunked / 1e9
    print(f"decode 6 pictures of 512 x 512: {chunked / 1e9:.2f} GB on top of the weights", flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", default="speed", choices=["speed", "ladder", "curve", "load", "memory"])
    p.add_argument("--size", choices=list(SIZES), default="small")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--group", type=int, help="G (default: that of the size)")
    p.add_argument("--unmask-steps", type=int, help="T (default: that of the size)")
    p.add_argument("--transition", choices=["p1", "p2"], default="p2")
    p.add_argument("--steps", type=int, default=4, help="trajectory steps in one timed update of ours; they share the text")
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--who", choices=["plain", "ours"], help="of memory")
    p.add_argument("--json", type=Path, help="also write the numbers there")
    args = p.parse_args()
    numbers = {"speed": lambda: bench_speed(args), "ladder": lambda: bench_ladder(args), "curve": lambda: bench_curve(args), "load": bench_load, "memory": lambda: memory(args)}[args.what]()
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
