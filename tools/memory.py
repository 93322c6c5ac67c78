"""Count the GPU memory of training Show-o 512, without a GPU and without weights.

    python tools/memory.py        # minutes; with --size shapes seconds

What train.py's update does runs on tensors that have shapes but no values (FakeTensorMode), and the
bytes of all live storages are added up. Not seen: what kernels use inside, the allocator's gaps,
CUDA's context, the activations of the reward (few, and no gradients beside them).
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
import bench  # noqa: E402
from speed import markdown  # noqa: E402

from grpo import clipped_objective  # noqa: E402
from model import Prompt, Showo  # noqa: E402
from sample import Trajectory, mask_schedule, rollout, transition_log_prob  # noqa: E402
from support.weights import write_json  # noqa: E402
from train import Tally, kl_to_reference  # noqa: E402

# the reward's bytes (fp16; the parameters of open_clip.create_model("ViT-H-14", device="meta")),
# the micro-batches of the table, and the number of layers
SIZES = {"showo-512": (2 * 986_109_441, (6, 3, 1), 24), "shapes": (0, (6,), 1)}
TEXT, PROCESSES, RANK = 25, 8, 16   # tokens of the prompt; processes of --zero; of --lora


class Memory(TorchDispatchMode):
    """Adds up the bytes of live storages: .now, and the most there were, .peak."""
    answers = {torch.bool: False, torch.float32: 1.0}       # when fakes are asked for a value

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


def roll_out(showo, prompt):
    """Roll out in two iterations: the second one holds what the first one left."""
    with torch.no_grad():
        rollout(showo.policy(prompt), len(prompt), showo.N, showo.K, 2,
                generator=torch.Generator(), schedule=[showo.N // 2, 0])


def update(showo, reference, prompt, n_masked, kind):
    """Do what train.update does, at the first two iterations and at the one that unmasks most."""
    adv, kl, tally = torch.ones(len(prompt)), torch.zeros(()), Tally("cpu")
    tokens = torch.zeros(len(prompt), showo.N, dtype=torch.long)
    threshold = torch.zeros(len(prompt), len(n_masked))
    traj = Trajectory(tokens, tokens, threshold, showo.K, n_masked)
    args = argparse.Namespace(transition=kind, ratio="sum")
    n_moved = [before - after for before, after in itertools.pairwise(n_masked)]
    with showo.shared_text(prompt) as text:
        if reference:
            with reference.frozen_base():
                text_ref = reference.prefill(prompt)
        for t in sorted({0, 1, n_moved.index(max(n_moved))}):
            positions = traj.positions(t, kind)
            logits = showo.logits(traj.state(t), text, positions=positions)
            logp = transition_log_prob(logits, traj.at(positions), t, kind)
            log_ratio = logp - logp.detach()
            objective = clipped_objective(log_ratio, adv)
            if reference:
                kl = kl_to_reference(logits, logp, traj, t, reference, text_ref, args)
                objective = objective - 0.01 * kl
            objective.backward()
            tally.add(log_ratio.detach(), kl.detach(), logits[:, :n_moved[t]], (0.9, 1.2))


def policy_and_reference(size, rank):
    """Return what train.load_policy makes: rank 0 trains all weights, another one adapters."""
    showo, _, _ = bench.random_showo(size, "cpu", num_hidden_layers=SIZES[size][2])
    if rank:
        showo.add_lora(rank)
        reference = showo
    else:
        reference, _, _ = bench.random_showo(size, "cpu", num_hidden_layers=SIZES[size][2])
        reference.requires_grad_(False).compute_in(torch.bfloat16)
    showo.compute_in(torch.bfloat16)
    return showo, reference


def what_stays(showo, reference, prompt, n_masked) -> dict:
    """Make gradients and moments, and return the bytes of all that stays through a step."""
    trained = list(showo.trainable().values())
    update(showo, None, prompt, n_masked, "p2")
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    kept = {"weights": showo.parameters(), "gradients": [p.grad for p in trained],
            "moments": moments, "reference": ()}
    if reference is not showo:
        kept["reference"] = reference.parameters()
    return {name: sum(x.untyped_storage().nbytes() for x in tensors)
            for name, tensors in kept.items()}


def measure(size) -> dict:
    """Return the bytes of what stays and of what phases hold beyond, without and with LoRA, and a
    row for each setting."""
    (_, _, _, N, T, G), (n_reward, micro_batches, _) = bench.SIZES[size], SIZES[size]
    n_masked, found = [N, *mask_schedule(N, T).tolist()], {"bytes": {}, "GB": []}
    Memory.answers[torch.long] = N
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        magvit = bench.random_magvit(size).requires_grad_(False)
        others = {"MAGVIT-v2": sum(x.nbytes for x in magvit.state_dict().values()),
                  "reward": n_reward}
        decode = memory.peak_of(magvit.decode, torch.zeros(1, N, dtype=torch.long))
        ids = torch.zeros(1, TEXT, dtype=torch.long)
        prompt = Prompt(ids, ids[0, :1])
        for rank in (0, RANK):
            showo, reference = policy_and_reference(size, rank)
            fixed = what_stays(showo, reference, prompt, n_masked) | others
            # before any gradients; train.py rolls out whole groups if micro-batches are small
            early = {"rollout": memory.peak_of(roll_out, showo, prompt.repeat(G)), "decode": decode}
            found["bytes"]["--lora" if rank else "all weights"] = fixed | early
            found.setdefault("parameters", sum(p.numel() for p in showo.parameters()))

            for kind, B, checkpointing in itertools.product(
                    ("p2", "p1"), micro_batches, ("no", "yes")):
                row = {"transition": kind, "--micro-batch": B, "--grad-checkpoint": checkpointing,
                       "--lora": rank or "no"}
                showo.grad_checkpoint = checkpointing == "yes"
                for flag, frozen in (("--no-kl", None), ("--kl", reference)):
                    needed = memory.peak_of(update, showo, frozen, prompt.repeat(B), n_masked, kind)
                    peak = max(fixed["gradients"] + needed, *early.values())
                    peak += fixed["weights"] + sum(others.values())
                    peak += fixed["reference"] if frozen else 0
                    row[flag] = (peak + fixed["moments"]) / 1e9
                    row[f"{flag} --zero"] = (peak + fixed["moments"] / PROCESSES) / 1e9
                found["GB"].append(row)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=list(SIZES), default="showo-512")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    p.add_argument("--md", type=Path, metavar="FILE", help="write the table")
    args = p.parse_args()
    Showo.prefill = prefill
    gc.freeze()         # peak_of() collects often, and what is imported is much
    found = measure(args.size)
    sizes = "; ".join(
        f"{how}: " + ", ".join(f"{name} {n / 1e9:.2f}" for name, n in sizes.items())
        for how, sizes in found["bytes"].items())
    rows = [found["GB"][0], *([f"{x:.1f}" if isinstance(x, float) else x for x in row.values()]
                              for row in found["GB"])]
    text = (f"`python tools/memory.py {' '.join(sys.argv[1:])}`\n\n"
            "Peak memory of training in GB (1e9), counted without a GPU; with --zero on each of "
            f"{PROCESSES} processes. {found['parameters']:,} parameters. {sizes}.\n\n"
            f"{markdown(rows)}\n")
    print(text, end="")
    if args.md:
        args.md.write_text(text)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
