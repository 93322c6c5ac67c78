"""Measure speed and memory, ours beside a plain implementation, in one run.

    python tools/bench.py --size small            # rollout, update, peak memory of an update
    python tools/bench.py memory --size small     # only the peak memory of an update
    python tools/bench.py load                    # peak memory of loading a Show-o of full size
                                                    # (5.8 GB of zeros, a sparse file), of decoding

plain does what the released code does: rollouts of one image at a time, the padded row of 129 text
columns in every pass, the whole head, a 4-D mask, probabilities of all positions; its update takes
a group at a time and keeps all logits. Weights are random and the same for both. Before anything
is timed, both must give the same log-probabilities of the same trajectories. --json FILE keeps the
numbers; with --size shapes --repeat 1 each takes seconds.
"""
import argparse
import functools
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import SPECIALS, MAGVITv2, Prompt, Showo, load_showo  # noqa: E402
from sample import (  # noqa: E402
    Trajectory,
    choose_and_move,
    mask_schedule,
    rollout,
    temperatures,
    transition_log_prob,
)
from support.weights import library, write_json  # noqa: E402

# Phi's sizes, then Show-o's: text vocabulary, K, N, and T and G of the run they stand for; "shapes"
# is the smallest, for all tools
SIZES = {
    "shapes": (dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                    num_attention_heads=4), 35, 256, 36, 12, 8),
    "small": (dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                   num_attention_heads=8), 50295, 8192, 256, 18, 6),
    "showo-256": ({}, 50295, 8192, 256, 50, 6),
    "showo-512": ({}, 50295, 8192, 1024, 50, 6),
}
TINY_VQ = dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=[1, 1, 1], z_channels=8)
TEXT = 129          # columns of text in a padded row


# ---------------------------------------------------------------------------------------- set-up

def random_showo(size, device, **sizes):
    """Return a Showo with random weights, computing in bf16 on a GPU, and its size's T and G.

    sizes: of Phi, in place of the size's own."""
    phi, n_text, K, N, T, G = SIZES[size]
    config = {"vocab_size": n_text + len(SPECIALS) + K + 1, "llm_vocab_size": n_text,
              "codebook_size": K, "num_vq_tokens": N}
    torch.manual_seed(0)
    with torch.device(device):
        showo = Showo(config, phi | sizes, None)
    if torch.device(device).type == "cuda":
        showo.dtype, showo.compiled = torch.bfloat16, True
    return showo.eval(), T, G


def random_magvit(size):
    """Return a MAGVITv2 with random weights: Show-o's, or a tiny one."""
    return MAGVITv2({"encoder": TINY_VQ, "decoder": TINY_VQ} if size == "shapes" else None).eval()


@functools.cache
def plain_phi(showo):
    """Return transformers' PhiForCausalLM with the very weights of a Showo, and gradients of its
    own."""
    transformers = library("transformers")
    with torch.device("meta"):
        # as Show-o has them, whatever its file says
        config = transformers.PhiConfig.from_dict(
            {**showo.phi, "qk_layernorm": True, "tie_word_embeddings": False})
        phi = transformers.PhiForCausalLM._from_config(config, attn_implementation="sdpa")
    phi.load_state_dict(showo.showo.state_dict(), assign=True)
    rotary = phi.model.rotary_emb           # its buffers are computed, not loaded
    phi.model.rotary_emb = type(rotary)(config).to(showo.device)
    return phi.eval()


def random_prompt(showo, length=20):
    """Return a Prompt of one text of `length` random tokens."""
    ids = torch.full((1, TEXT), showo.pad)
    generator = torch.Generator().manual_seed(1)
    ids[:, -length:] = torch.randint(showo.text_vocab, (1, length), generator=generator)
    ids = ids.to(showo.device)
    return Prompt(ids, torch.zeros(1, dtype=torch.long, device=showo.device))


def random_trajectory(showo, G, T):
    """Return a Trajectory of the right shapes and schedule, without a rollout."""
    stay_masked = mask_schedule(showo.N, T)
    moved = -stay_masked.diff(prepend=torch.tensor([showo.N]))
    times = torch.arange(T).repeat_interleave(moved)                        # (N,)
    order = torch.stack([times[torch.randperm(showo.N)] for _ in range(G)])
    codes = torch.randint(showo.K, (G, showo.N))
    threshold = torch.full((G, T), 0.01, device=showo.device)
    return Trajectory(codes.to(showo.device), order.to(showo.device), threshold, showo.K)


def zero_gradients(model):
    """Make the gradients, which a run holds at its peak, and keeps."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def generators(device, seeds):
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------ ours, and plain

def our_rollout(showo, prompt, G, T):
    """Roll out a group of G images -> Trajectory."""
    with torch.no_grad():
        policy = showo.policy(prompt.repeat(G))
    return rollout(policy, G, showo.N, showo.K, T, generator=generators(showo.device, range(G)))


def our_update(showo, prompt, traj, t, kind, steps=1):
    """Take gradients of a group at `steps` iterations from t on -> the first log-probabilities."""
    out = []
    with showo.shared_text(prompt.repeat(len(traj.codes))) as text:
        for s in range(t, t + steps):
            positions = traj.positions(s, kind)
            logits = showo.logits(traj.state(s), text, positions=positions)
            logp = transition_log_prob(logits, traj.at(positions), s, kind)
            (logp.mean() / steps).backward()
            out.append(logp.detach())
    return out[0]


def plain_logits(showo, codes, prompt):
    """Return the logits of the padded row over the whole vocabulary, Float (B, 131 + N, V)."""
    text, column = prompt.ids[prompt.row], torch.ones_like(codes[:, :1])
    ids = torch.cat(
        [text, column * showo.soi, codes + showo.code_offset, column * showo.eoi], 1)
    i = torch.arange(ids.shape[1], device=ids.device)
    causal, within_image = i[:, None] >= i, (i[:, None] >= TEXT) & (i >= TEXT)
    sees = (causal | within_image) & (ids != showo.pad)[:, None]
    mask = torch.where(sees | (i[:, None] == i), 0.0, -1e9)[:, None]
    half = torch.autocast(ids.device.type, torch.bfloat16, enabled=showo.dtype == torch.bfloat16)
    with half:
        return plain_phi(showo)(input_ids=ids, attention_mask=mask, position_ids=i[None],
                                use_cache=False).logits


def image_part(showo, logits):
    """Return the image positions and image columns of plain_logits()."""
    return logits[:, -showo.N - 1:-1, showo.code_offset:-1].float()


@torch.no_grad()
def plain_rollout(showo, prompt, T):
    """Run Show-o's loop for one image: multinomial at all positions, all logits kept."""
    N, K, device = showo.N, showo.K, showo.device
    generator, kept = torch.Generator(device).manual_seed(0), []
    codes = torch.full((1, N), K, device=device)
    stay_masked, temps = mask_schedule(N, T).tolist(), temperatures(T)
    for t in range(T):
        kept.append(image_part(showo, plain_logits(showo, codes, prompt)).clone())
        probs, masked = kept[-1].softmax(-1), codes == K
        drawn = torch.multinomial(probs.view(N, K), 1, generator=generator).view(1, N)
        sampled = torch.where(masked, drawn, codes)
        conf = probs.gather(-1, sampled[..., None])[..., 0].clamp(min=1e-20)
        noise = torch.rand(1, N, generator=generator, device=device).clamp(1e-20)
        gumbel = -noise.log().neg().log()
        new = choose_and_move(conf.log(), masked, stay_masked[t], temps[t], gumbel)
        codes = torch.where(new, sampled, codes)
    return codes


def plain_update(showo, prompt, traj, t, kind):
    """Take the gradient of iteration t of a group -> log-probabilities, Float (G,)."""
    state, group = traj.state(t), prompt.repeat(len(traj.codes))
    logits = plain_logits(showo, state, group)      # all of them are kept for the backward pass
    logp = image_part(showo, logits).log_softmax(-1)
    new, remasked = traj.order == t, traj.order > t
    terms = logp.gather(-1, traj.codes[..., None])[..., 0] * new                # Eq. 15
    if kind == "p1":                                                            # Eq. 14
        p = logp.exp()
        tail = (p * (p < traj.threshold[:, t, None, None])).sum(-1)
        counts = remasked & (tail > 1e-37)
        terms = terms + torch.where(counts, tail.clamp(min=1e-37).log(), 0)
    out = terms.sum(1)
    out.mean().backward()
    return out.detach()


# ------------------------------------------------------------------------------------ measuring

def timed(run, device):
    """Return the seconds that run() takes."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def flops(showo, tokens, context, wanted):
    """Return the FLOPs of one forward pass of ours.

    tokens, each seeing `context` others, pass the blocks; only the wanted ones pass the last block
    (whose keys and values are of all) and the head.
    """
    width, layers = showo.phi["hidden_size"], showo.phi["num_hidden_layers"]
    parameters = sum(p.numel() for p in showo.showo.model["layers"][0].parameters())
    block = 2 * parameters + 4 * width * context                                # per token
    first = (layers - 1) * block * tokens
    last = 4 * width ** 2 * tokens + (block + 2 * width * showo.K) * wanted
    return first + last


def matmul_rate(device, size, seconds=1.0):
    """Return the FLOP/s of a large product, bf16 on a GPU, fp32 on a CPU: the best of several."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    n = 512 if size == "shapes" else n
    a = torch.randn(n, n, device=device, dtype=dtype)
    best, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        best = max(best, 2 * n ** 3 / timed(lambda: a @ a, device))
    return best


def high_water():
    """Return the bytes that were resident at most so far.

    Not ru_maxrss, which a process inherits from the one that started it.
    """
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def in_own_process(function, *args):
    """Return function(*args), called in a fresh process, so that peaks are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---------------------------------------------------------------------------------- sub-commands

def peak_of_update(who, size, device, kind):
    """Return the bytes held at the peak of an update, weights and gradients included."""
    device = torch.device(device)
    showo, T, G = random_showo(size, device)
    prompt, traj = random_prompt(showo), random_trajectory(showo, G, T)
    zero_gradients(plain_phi(showo) if who == "plain" else showo)
    update = plain_update if who == "plain" else our_update
    update(showo, prompt, traj, T // 2, kind)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else high_water()


def bench_memory(args):
    """Measure the peak memory of an update, of plain and ours, in processes of their own."""
    how = args.size, args.device, args.transition
    peaks = {who: in_own_process(peak_of_update, who, *how) / 1e9 for who in ("plain", "ours")}
    return {"update_peak_gb": peaks, "update_memory_ratio": peaks["ours"] / peaks["plain"]}


def check_equal(showo, prompt, traj, t, kind):
    """Return the largest relative difference of ours to plain's log-probabilities; assert it."""
    ours = our_update(showo, prompt, traj, t, kind)
    plain = plain_update(showo, prompt, traj, t, kind)
    difference = ((ours - plain).abs() / plain.abs()).max().item()
    tolerance = 2e-2 if showo.dtype == torch.bfloat16 else 1e-4
    assert difference < tolerance, f"log-probabilities differ by {difference}"
    return difference


def same_codes(showo, prompt, traj, T):
    """Return the share of codes that plain's logits give under our sampler and the same noise."""
    def policy(codes):
        return image_part(showo, plain_logits(showo, codes, prompt))
    with torch.no_grad():
        alone = rollout(policy, 1, showo.N, showo.K, T, generator=generators(showo.device, [0]))
    return (traj.codes[0] == alone.codes[0]).float().mean().item()


def needed_flops(showo, traj, G, T, mid, steps, kind):
    """Return the FLOPs that an image's rollout and a group's trajectory step need."""
    masked = sum([showo.N, *mask_schedule(showo.N, T).tolist()[:-1]])
    wanted = 0
    for t in range(mid, mid + steps):
        reads = traj.order == t if kind == "p2" else traj.order >= t
        wanted += reads.sum().item() / G / steps
    context = showo.N + 22
    return {
        "rollout": flops(showo, (showo.N + 2) * T, context, masked),
        "update": 3 * G * flops(showo, showo.N + 2, context, wanted),
    }


def bench_speed(args):
    """Time rollouts and updates of plain and ours, interleaved -> ratios of their medians."""
    device = torch.device(args.device)
    showo, T, G = random_showo(args.size, device)
    kind, mid, prompt = args.transition, T // 2, random_prompt(showo)
    traj = our_rollout(showo, prompt, G, T)
    difference = check_equal(showo, prompt, traj, mid, kind)
    runs = {
        "rollout_plain": lambda: plain_rollout(showo, prompt, T),
        "rollout_ours": lambda: our_rollout(showo, prompt, G, T),
        "update_plain": lambda: plain_update(showo, prompt, traj, mid, kind),
        "update_ours": lambda: our_update(showo, prompt, traj, mid, kind, args.steps),
    }
    seconds, rate = {name: [] for name in runs}, 0
    for _ in range(args.repeat):
        rate = max(rate, matmul_rate(device, args.size))
        for name, run in runs.items():
            seconds[name].append(timed(run, device))

    s = {name: statistics.median(values) for name, values in seconds.items()}
    s["rollout_ours"] /= G                      # per image
    s["update_ours"] /= args.steps              # per trajectory step of a group
    flop = needed_flops(showo, traj, G, T, mid, args.steps, kind)
    name = f"CPU, {torch.get_num_threads()} threads"
    return {
        "size": args.size, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else name,
        "T": T, "G": G, "transition": kind, "repeat": args.repeat,
        "log_prob_relative_difference": difference,
        "same_codes_as_plain": same_codes(showo, prompt, traj, T),
        **{f"{part}_ratio": s[f"{part}_plain"] / s[f"{part}_ours"] for part in flop},
        "matmul_tflops": rate / 1e12,
        "share_of_matmul_rate": {part: flop[part] / s[f"{part}_ours"] / rate for part in flop},
        "seconds": s, **bench_memory(args),
    }


# ------------------------------------------------------------------------------------------ load

def write_zeros(size, folder):
    """Write a checkpoint of a size's names and shapes, all zeros, as a sparse file."""
    showo, _, _ = random_showo(size, "meta")
    header, end = {}, 0
    for name, weight in showo.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(weight.shape),
                        "data_offsets": [end, end + 4 * weight.numel()]}
        end += 4 * weight.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "pytorch_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    write_json(folder / "config.json", {"_class_name": "Showo", **showo.config})
    write_json(folder / "phi_config.json", SIZES[size][0])


def convert(folder):
    """Turn the safetensors file of a folder into pytorch_model.bin."""
    from safetensors.torch import load_file
    path = folder / "pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def peak_of_load(folder, dtype):
    """Return the bytes of the weights, and the most that were resident for loading them."""
    before = high_water()
    showo = load_showo(folder, tokenizer="shapes", dtype=dtype)
    for p in showo.parameters():
        p.data.view(-1)[::1024].sum()           # every page of a mapped weight
    return sum(p.nbytes for p in showo.parameters()), high_water() - before


def peak_of_decode(size):
    """Return the bytes resident at most while six pictures are decoded, beyond the weights."""
    magvit = random_magvit(size).requires_grad_(False)
    n_codes = len(magvit.quantize.embedding)
    before = high_water()
    magvit.decode(torch.randint(n_codes, (6, SIZES[size][3])))
    return high_water() - before


def bench_load(args):
    """Measure the peak of resident memory while loading, over the weights' bytes (Linux, CPU)."""
    # decoding first: this process has held little so far
    out, decode = {}, peak_of_decode(args.size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_zeros(args.size, folder)
        for kind, dtype in (("safetensors", torch.float32), ("safetensors", torch.bfloat16),
                            ("bin", torch.bfloat16)):
            if kind == "bin":
                convert(folder)
            weights, peak = in_own_process(peak_of_load, folder, dtype)
            out[f"{kind} as {str(dtype).removeprefix('torch.')}"] = {
                "weights_gb": weights / 1e9, "peak_gb": peak / 1e9, "ratio": peak / weights}
    return out | {"decode_gb": decode / 1e9}


COMMANDS = {"speed": bench_speed, "load": bench_load, "memory": bench_memory}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", default="speed", choices=list(COMMANDS))
    p.add_argument("--size", choices=list(SIZES), help="default: small; of load: showo-512")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--transition", choices=["p1", "p2"], default="p2")
    p.add_argument("--steps", type=int, default=4,
                   help="iterations in one timed update of ours; they share the text")
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--json", type=Path, help="also write the numbers there")
    args = p.parse_args()
    args.size = args.size or ("showo-512" if args.what == "load" else "small")
    numbers = COMMANDS[args.what](args)
    print(json.dumps(numbers, indent=2))
    if args.json:
        write_json(args.json, numbers)


if __name__ == "__main__":
    main()
