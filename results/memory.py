"""Count the GPU memory of training Show-o 512, without a GPU and without weights.

    python results/memory.py        # minutes; with --size tiny seconds

train.py's own code runs on tensors that have shapes but no values (FakeTensorMode), and the bytes
of all live storages are added up. Not seen: what kernels use inside, the allocator's gaps, CUDA's
context, the activations of the reward (few, and no gradients beside them).
"""
import argparse
import gc
import itertools
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_json  # noqa: E402
from grpo import clipped_objective, kl_k3  # noqa: E402
from model import SPECIALS, BaseOf, MAGVITv2, Prompt, Showo  # noqa: E402
from sample import Trajectory, mask_schedule, rollout  # noqa: E402
from train import move_log_prob, move_stats  # noqa: E402

# Phi's sizes, then Show-o's: text vocabulary, K, N, and T and G; MAGVIT's sizes; the reward's bytes
# (fp16; the parameters of open_clip.create_model("ViT-H-14", device="meta"), added up once)
SIZES = {
    "showo-512": ({}, 50295, 8192, 1024, 50, 6, None, 2 * 986_109_441),
    "tiny": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2), 35, 64, 16, 4, 6,
             dict(ch=32, ch_mult=[1], num_res_blocks=[1], z_channels=6), 0)}
TEXT, PROCESSES, RANK = 25, 8, 16   # tokens of the prompt; processes of --zero; of --lora


class Memory(TorchDispatchMode):
    """Adds up the bytes of live storages: .now, and the most there were, .peak."""
    # What fakes say when asked for a value. At "no" and N (set below) model.py does as on a GPU:
    # logits() looks for no first state that rows share, policy() computes all N positions.
    answers = {torch.bool: False, torch.float32: 1.0}

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answers[args[0].dtype]
        if func is torch.ops.aten._unique2.default:     # all rows use one prompt
            return args[0][:1], torch.zeros_like(args[0]), args[0][:0]
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.count, storage._cdata, -storage.nbytes())
        return out

    def count(self, key, size):
        self.live ^= {key}      # new, or freed
        self.now += size
        self.peak = max(self.peak, self.now)

    def peak_of(self, function, *args):
        """Return the most bytes that a call holds beyond those held before it."""
        gc.collect()
        before = self.peak = self.now
        function(*args)
        return self.peak - before


def prefill(self, prompt, guided=False, original=Showo.prefill):
    """Call Showo.prefill, with the answers that nothing is padding and all text is real."""
    with mock.patch.object(Memory, "answers", {torch.bool: True, torch.long: 0}):
        return original(self, prompt, guided)


def layer_norm(x, *args):
    """Normalize in float32, as CUDA's autocast does; for the other operations here both agree."""
    with torch.autocast("cpu", enabled=False):
        return torch.layer_norm(x.float(), *args)


def roll_out(showo, prompt):
    """Roll out in two iterations: the second one holds what the first one left."""
    with torch.no_grad(), showo.autocast():
        rollout(showo.policy(prompt), len(prompt), showo.N, showo.K, 2,
                generator=torch.Generator(), schedule=[showo.N // 2, 0])


def update(showo, reference, prompt, n_masked, kind):
    """Do what train.update does, at the first two iterations and at the one that unmasks most."""
    adv, kl = torch.ones(len(prompt)), torch.zeros(())
    tokens = torch.zeros(len(prompt), showo.N, dtype=torch.long)
    traj = Trajectory(tokens, tokens, torch.zeros(len(prompt), len(n_masked)), n_masked=n_masked)
    bounds = argparse.Namespace(clip_low=0.9, clip_high=1.2)
    n_moved = [before - after for before, after in itertools.pairwise(n_masked)]
    with showo.shared_text(prompt) as text:
        text_ref = reference.prefill(prompt) if reference else None
        for t in (0, 1, n_moved.index(max(n_moved))):
            logp, logits = move_log_prob(showo, text, traj, t, kind)
            objective = clipped_objective(logp, logp.detach(), adv)
            if reference:
                logp_ref, _ = move_log_prob(reference, text_ref, traj, t, kind)
                kl = kl_k3(logp, logp_ref)
                objective = objective - 0.01 * kl
            with torch.autocast("cpu", enabled=False):
                objective.backward()
            move_stats(logp - logp.detach(), logits[:, :n_moved[t]], kl, bounds)


def new_showo(config, phi):
    """Return a policy as load_policy makes it, with weights that have no values."""
    showo = Showo(config, phi, None).eval()
    showo.compute_dtype = torch.bfloat16
    return showo


def nbytes(tensors) -> int:
    """Return the bytes of the storages of tensors."""
    return sum(x.untyped_storage().nbytes() for x in tensors)


def state_of_training(showo, prompt, n_masked) -> dict:
    """Make gradients and moments -> {name: the tensors that stay}."""
    trained = list(showo.trainable().values())
    update(showo, None, prompt, n_masked, "p2")
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    return {"weights": list(showo.parameters()), "gradients": [p.grad for p in trained],
            "moments": moments}


def measure_updates(showo, reference, fixed, prompt, n_masked, other, lora):
    """Return a row of the table for each setting. fixed: the bytes that stay; other: what rollout
    and decoding hold beyond."""
    rows, base = [], fixed["weights"] + fixed["MAGVIT decoder"] + fixed["reward"]
    for kind, B, checkpointing in itertools.product(("p2", "p1"), (6, 3, 1), ("no", "yes")):
        row = {"transition": kind, "--micro-batch": B, "--grad-checkpoint": checkpointing,
               "--lora": lora or "no"}
        showo.grad_checkpoint = checkpointing == "yes"
        for flag, frozen in (("--no-kl", None), ("--kl", reference)):
            needed = memory_of_update(showo, frozen, prompt.repeat(B), n_masked, kind)
            peak = base + max(fixed["gradients"] + needed, *other.values())
            peak += fixed["reference"] if frozen else 0
            row[flag] = (peak + fixed["moments"]) / 1e9
            row[f"{flag} --zero"] = (peak + fixed["moments"] / PROCESSES) / 1e9
        rows.append(row)
    return rows


def measure(size) -> dict:
    """Return the bytes of what stays and of what phases hold beyond, and a row for each setting."""
    phi, n_text, K, N, T, G, vq, n_reward = SIZES[size]
    n_masked = [N, *mask_schedule(N, T).tolist()]
    config = {"vocab_size": n_text + len(SPECIALS) + K + 1, "llm_vocab_size": n_text,
              "codebook_size": K, "num_vq_tokens": N}
    Memory.answers[torch.long] = N
    return NotImplemented


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=list(SIZES), default="showo-512")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    p.add_argument("--md", type=Path, metavar="FILE", help="write the table")
    args = p.parse_args()
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    library.impl("layer_norm", layer_norm)
    Showo.prefill = prefill
    found = measure(args.size)
    sizes = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in found["bytes"].items())
    lines = [f"`python results/memory.py {' '.join(sys.argv[1:])}`", "",
             "Peak memory of training in GB (1e9), counted without a GPU; with --zero on each of "
             f"{PROCESSES} processes. {found['parameters']:,} parameters; {sizes}.", "",
             f"| {' | '.join(found['GB'][0])} |", "|---" * 7 + "|"]
    for row in found["GB"]:
        cells = [f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.md:
        args.md.write_text("\n".join(lines) + "\n")
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
