"""Mask-GRPO (arXiv 2510.13418): RL for masked text-to-image models, one readable loop.

    python train.py --model shapes --no-kl --filter-low                     # minutes on 2 CPU cores
    torchrun --nproc_per_node 8 train.py --no-kl --filter-low               # Show-o 512, CLIP reward, the paper's settings
    python train.py --model shapes --recipe best                            # what results/experiments favours

One optimizer step: sample G pictures for each prompt (sample.py, Eq. 1-9), score them (reward.py), turn rewards into
advantages (grpo.py, Eq. 12), and climb Eq. 10 over the T unmasking iterations (Eq. 11, 13-15).

Departures from the paper:
- the default transition is p2 (Eq. 15), which is what the released training really computes; --transition p1 is Eq. 14;
- Eq. 10's mean runs over all groups of all processes; a group still under the filter's bar after --max-resample is used;
- a step in which something is not finite is skipped by all processes;
- beyond it, off by default: --adv mean, --ratio mean, --trajectory forward, --loss-steps-from critical, --transition gumbel (whose
  noise has a floor of 0.05 here: the gradient grows as 1 / noise);
- prompts: LAION captions cannot be shipped, prompts/train.txt holds captions of our own making.
Randomness is a function of (seed, step, prompt slot), so a run is the same when resumed, and on another number of processes
that together take as many prompts a step (but for the last digits, where other prompts share a batch).
"""
import argparse
import contextlib
import functools
import importlib.util
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial

import checkpoint
import shapes
from eval_geneval import is_geneval, verdicts
from grpo import SampleFilter, clipped_objective, group_advantages, kl_k3
from model import InputError, Prompt, load_showo, to_uint8
from reward import make_reward
from sample import (Parser, Trajectory, barrier, generate, grid, half_or_float, in_range, load_models, mask_schedule, peak_gib, read_prompts, remask,
                    rollout, run, setup, temperatures, transition_log_prob)

PRESETS = {
    "showo": dict(steps=1000, group_size=6, prompts_per_step=2, unmask_steps=50, eval_unmask_steps=50, eval_guidance=5.0,
                  lr=3e-6, warmup=62, weight_decay=0.02, reward="clip", eval_every=0, eval_n=1, sample_every=50, save_every=100,
                  micro_batch=6, filter_warmup=50),
    "shapes": dict(steps=45, group_size=8, prompts_per_step=24, unmask_steps=16, eval_unmask_steps=16, eval_guidance=0.0,
                   lr=7e-4, warmup=3, weight_decay=0.0, reward="geneval:exact", eval_every=15, eval_n=8, sample_every=15,
                   save_every=15, micro_batch=256, filter_warmup=48)}
RECIPES = {"paper": dict(no_kl=True, filter_low=True, transition="p1"),                 # Sec. 3.2, 3.3
           "best": dict(no_kl=True, filter_low=True, loss_steps_from="last")}           # results/experiments; and --loss-steps T // 4


def flags_of(values):
    """Flags as one line: {"no_kl": True, "lr": 3e-6} -> --no-kl --lr 3e-06."""
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in values.items()
                    if value is not None and value is not False)


def parse_args():
    """The flags, with the defaults of --model filled in; a bad one ends the program with one line and exit code 2."""
    p = Parser("Train a masked text-to-image model with Mask-GRPO. Defaults with --model shapes differ; they are printed at the start.")
    g = p.add_argument_group("what")
    g.add_argument("--model", default="showlab/show-o-512x512", help="hub id, folder or state_dict of Show-o; shapes = the tiny base")
    g.add_argument("--revision", help="commit or tag of the model's hub repository; ID@REVISION does the same for any hub id")
    g.add_argument("--vq", help="hub id or folder of MAGVIT-v2 (default: showlab/magvitv2, or that of shapes)")
    g.add_argument("--tokenizer", help="hub id or folder of the text tokenizer (default: the model's own, or microsoft/phi-1_5)")
    g.add_argument("--prompts", help="txt, or jsonl with prompt, optional reward_prompt and metadata (default: prompts/train.txt)")
    g.add_argument("--reward", help="see reward.py: clip, geneval:exact, or a weighted sum")
    g.add_argument("--offload-reward", action="store_true", help="reward models wait on the CPU while they do not score")
    g.add_argument("--out", help="output folder (default: a new one under runs/)")
    g.add_argument("--resume", nargs="?", const="auto", help="continue: the newest checkpoint in --out, or this checkpoint folder")
    g = p.add_argument_group("the method")
    g.add_argument("--recipe", choices=list(RECIPES), help="; ".join(f"{name}: {flags_of(recipe)}" for name, recipe in RECIPES.items())
                   + " --loss-steps a quarter of T; flags given beside it win")
    g.add_argument("--steps", type=in_range(int, 1), help="optimizer steps with fresh rollouts")
    g.add_argument("--group-size", type=in_range(int, 2, 4096), help="G, pictures per prompt")
    g.add_argument("--prompts-per-step", type=in_range(int, 1), help="prompts per optimizer step and process")
    g.add_argument("--unmask-steps", type=in_range(int, 1), help="T while training (fewer = the paper's unmasking reduction)")
    g.add_argument("--transition", choices=["p1", "p2", "ar", "gumbel"], default="p2",
                   help="Eq. 14, 15 or 13; gumbel: Eq. 14 under the sampler's own noise")
    g.add_argument("--trajectory", choices=["rollout", "forward"], default="rollout", help="forward: states are random re-maskings of the final "
                   "picture, the action at each is that picture (UDM-GRPO); --transition has no effect")
    g.add_argument("--adv", choices=["std", "mean"], default="std", help="Eq. 12; mean: not divided by the standard deviation (Dr. GRPO)")
    g.add_argument("--ratio", choices=["sum", "mean"], default="sum", help="Eq. 11; mean: of the mean token of an iteration (GSPO)")
    g.add_argument("--clip-low", type=in_range(float, 0, 1), default=0.9, help="lower bound of the ratio, 1 - e_low")
    g.add_argument("--clip-high", type=in_range(float, 1), default=1.2, help="upper bound of the ratio, 1 + e_high")
    g.add_argument("--no-kl", action="store_true", help="beta = 0: no reference model in memory")
    g.add_argument("--kl", dest="no_kl", action="store_false", default=argparse.SUPPRESS, help="the opposite, against a recipe")
    g.add_argument("--kl-beta", type=in_range(float, 0), default=0.01, help="beta of Eq. 10")
    g.add_argument("--filter-low", action=argparse.BooleanOptionalAction, default=False,
                   help="sample a group again when its reward std is low (Sec. 3.3)")
    g.add_argument("--filter-percentile", type=in_range(float, 0, 100), default=10.0, help="of the history of group stds")
    g.add_argument("--filter-warmup", type=in_range(int, 1), help="groups to see before the filter acts")
    g.add_argument("--max-resample", type=in_range(int, 1, 100), default=1, help="times a group is sampled again at most")
    g.add_argument("--loss-steps", type=in_range(int, 1), help="computational reduction: iterations in the loss (default: all)")
    g.add_argument("--loss-steps-from", choices=["first", "last", "random", "critical"], default="first",
                   help="which; critical: those at which the predicted picture changes most (MaskFocus)")
    g.add_argument("--inner-epochs", type=in_range(int, 1, 100), default=1, help="optimizer steps on the same rollouts")
    g.add_argument("--temperature", type=in_range(float, 0), default=1.0, help="of the Gumbel noise in choose-and-move")
    g = p.add_argument_group("optimizer")
    g.add_argument("--lr", type=in_range(float, 0), help="peak learning rate; the paper: 3e-6 without KL, 5e-6 with")
    g.add_argument("--warmup", type=in_range(int, 0), help="linear warm-up steps, times a cosine from the start to 0 at the end")
    g.add_argument("--weight-decay", type=in_range(float, 0))
    g.add_argument("--max-grad-norm", type=in_range(float, 0), default=1.0, help="0 = no clipping")
    g.add_argument("--micro-batch", type=in_range(int, 1), help="pictures per forward pass, in rollout and update; memory only")
    g.add_argument("--grad-checkpoint", action="store_true", help="compute layers again in the backward pass: less memory, a third more work")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of the computation; weights stay fp32; auto: bf16 on a GPU")
    g.add_argument("--fsdp", action="store_true", help="optimizer state, and between steps weights and gradients, in shards over the processes")
    g.add_argument("--seed", type=in_range(int, 0, 2 ** 31), default=42)
    g = p.add_argument_group("watching")
    g.add_argument("--eval-every", type=in_range(int, 0), help="steps between evaluations, 0 = none")
    g.add_argument("--eval-n", type=in_range(int, 1), help="pictures per evaluation prompt")
    g.add_argument("--eval-unmask-steps", type=in_range(int, 1), help="T when evaluating")
    g.add_argument("--eval-guidance", type=in_range(float, 0), help="guidance when evaluating; training uses none")
    g.add_argument("--eval-prompts", help="as --prompts (default: 63 held-out prompts of shapes, else 8 lines of prompts/eval.txt)")
    g.add_argument("--sample-every", type=in_range(int, 0), help="steps between picture grids, 0 = none")
    g.add_argument("--save-every", type=in_range(int, 0), help="steps between checkpoints, 0 = only the last")
    g.add_argument("--keep-last", type=in_range(int, 0), default=0, help="checkpoints to keep, 0 = all")
    g.add_argument("--check-every", type=in_range(int, 0), default=50, help="steps between comparisons of the processes' parameters, 0 = none")
    g.add_argument("--max-bad-steps", type=in_range(int, 1), default=20, help="steps skipped (a reward, loss or gradient not finite) that end a run")
    g.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases (pip install wandb)")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--recipe"):
        first.add_argument(flag, nargs="?")
    chosen = first.parse_known_args()[0]
    p.set_defaults(**PRESETS["shapes" if chosen.model == "shapes" else "showo"], **RECIPES.get(chosen.recipe, {}))
    args = p.parse_args()
    if args.trajectory == "forward" and args.loss_steps_from == "critical":
        p.error("--loss-steps-from critical ranks the iterations of a rollout, which --trajectory forward does not have; take first, last or random")
    if args.recipe == "best" and not args.loss_steps:
        args.loss_steps = max(1, args.unmask_steps // 4)
    if args.loss_steps and args.loss_steps > args.unmask_steps:
        p.error(f"--loss-steps {args.loss_steps} is more than --unmask-steps {args.unmask_steps}")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        p.error("--wandb needs the package: pip install wandb")
    if args.fsdp and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--fsdp shards over processes: start train.py with torchrun --nproc_per_node N")
    if args.resume == "auto" and not args.out:
        p.error("--resume without a checkpoint needs --out, the folder of the run to continue")
    return args


# ------------------------------------------------------------------------------------------------ processes

def all_sum(tensor):
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_cat(tensor):
    """The equally shaped tensors of all processes, in the order of ranks, joined along dim 0."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_lists(items):
    """The lists of all processes, joined."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def sum_gradients(showo):
    """Add up the gradients of all processes, once per optimizer step -> the parameters that the optimizer knows. With --fsdp each
    process goes on with its shards; since nothing is exchanged before, processes may take different numbers of passes."""
    whole = list(showo.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
    if not isinstance(showo, FSDPModule):
        for p, gradient in zip(whole, gradients):
            p.grad = all_sum(gradient)
        return whole
    for p in whole:
        p.grad = None
    showo.reshard()
    for p, gradient in zip(showo.parameters(), gradients):
        p.grad = DTensor.from_local(gradient, p.device_mesh, [Partial()]).redistribute(placements=p.placements)
    return list(showo.parameters())


def generator(device, *key):
    """A random state that depends on the key alone."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def prompt_at(slot, n, seed):
    """Which of n prompts comes in a slot of the run: a new shuffle every n slots."""
    epoch, place = divmod(slot, n)
    return shuffled(n, seed, epoch)[place]


@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=generator("cpu", seed, "prompts", epoch)).tolist()


# ---------------------------------------------------------------------------------------------- one step

@dataclass
class Batch:
    """The rollouts of one step on this process: P prompts of G pictures, B = P * G rows, the rows of a group together."""
    texts: list                     # P prompts
    prompt: Prompt
    traj: Trajectory
    rewards: torch.Tensor           # Float (P, G)
    log: dict                       # parts of the reward, Float (P, G) each
    resampled: int = 0              # groups sampled again
    change: torch.Tensor | None = None  # Float (T,), see picture_change()


def keeps(args) -> dict:
    """What a rollout must keep for the loss."""
    return dict(keep_sampled=args.transition == "ar", keep_cut=args.transition == "gumbel", keep_predicted=args.loss_steps_from == "critical")


def empty_batch(lines, showo, args):
    """A Batch of the right shapes, to be filled."""
    P, G, T, device = len(lines), args.group_size, args.unmask_steps, showo.device
    long = lambda *shape: torch.zeros(*shape, showo.N, dtype=torch.long, device=device)  # noqa: E731
    sampled, cut, predicted = keeps(args).values()
    traj = Trajectory(long(P * G), long(P * G), torch.zeros(P * G, T, device=device), long(T, P * G) if sampled else None,
                      torch.zeros(P * G, T, 2, device=device) if cut else None, long(T, P * G) if predicted else None)
    texts = [line["prompt"] for line in lines]
    return Batch(texts, showo.encode(texts).repeat(G), traj, torch.zeros(P, G), {})


def collect(step, lines, args, showo, magvit, reward, sample_filter, clock) -> Batch:
    """Roll out, decode and score the groups of this step; with a filter, groups of low reward std again (Sec. 3.3).

    All processes judge all groups against one common history, in lockstep, so they agree on when to stop."""
    P, G, device = len(lines), args.group_size, showo.device
    first = P * (dist.get_rank() if dist.is_initialized() else 0)               # prompt slot of this process's first group
    batch, pending = empty_batch(lines, showo, args), torch.ones(P, dtype=torch.bool)
    for attempt in range(1 + args.max_resample):
        if pending.any():
            chosen, rows = pending.nonzero()[:, 0].tolist(), pending.repeat_interleave(G).nonzero()[:, 0].to(device)
            asked = [lines[i] for i in chosen for _ in range(G)]
            per = max(1, args.micro_batch // G)                                                 # groups in one batch
            with clock("rollout"), torch.no_grad(), showo.autocast():
                for some in (chosen[k:k + per] for k in range(0, len(chosen), per)):
                    at_rows = torch.tensor([i * G + g for i in some for g in range(G)], device=device)
                    prompt = showo.prefill(batch.prompt[at_rows])
                    traj = rollout(policy_of(showo, prompt, G), len(at_rows), showo.N, showo.K, args.unmask_steps,
                                   generator=[generator(device, args.seed, step, first + i, attempt) for i in some],
                                   temperature=args.temperature, masked_only=True, **keeps(args))
                    for name in ("codes", "order", "threshold", *(["cut"] if traj.cut is not None else [])):
                        getattr(batch.traj, name)[at_rows] = getattr(traj, name)
                    for name in ("sampled", "predicted"):
                        if getattr(traj, name) is not None:
                            getattr(batch.traj, name)[:, at_rows] = getattr(traj, name)
            with clock("decode"), torch.no_grad():
                images = to_uint8(magvit.decode(batch.traj.codes[rows]))
            with clock("reward"):
                values = reward(images, [line.get("reward_prompt", line["prompt"]) for line in asked], asked)
            for name, part in {"": values, **reward.log}.items():
                (batch.log.setdefault(name, torch.zeros(P, G)) if name else batch.rewards)[pending] = part.reshape(-1, G)
        if sample_filter is None:
            break
        std = all_cat(torch.where(pending, batch.rewards.std(1), torch.nan).to(device)).cpu()    # NaN: not judged this time
        rejected = torch.zeros_like(std, dtype=torch.bool)
        rejected[~std.isnan()] = ~sample_filter.keep(std[~std.isnan()])
        if attempt == args.max_resample or not rejected.any():
            break
        pending = rejected[first:first + P]
        batch.resampled += int(pending.sum())
    if args.loss_steps_from == "critical":
        with clock("decode"), torch.no_grad():
            batch.change = picture_change(batch.traj, magvit, G)
    if args.trajectory == "forward":
        batch.traj = remask(batch.traj.codes, args.unmask_steps, [generator(device, args.seed, step, first + i, "forward") for i in range(P)])
    return batch


def picture_change(traj, magvit, G):
    """By how much the picture that each iteration predicts differs from that of the iteration before: mean absolute difference of pixels,
    summed over the first pictures of all groups -> Float[T]. What MaskFocus (arXiv 2512.18766) ranks iterations by, a step's gain of
    information, is taken in this plainest form."""
    predicted = magvit.decode(traj.predicted[:, ::G].flatten(0, 1)).unflatten(0, (len(traj.predicted), -1))     # (T, P, 3, H, W)
    change = predicted.diff(dim=0).abs().mean((2, 3, 4)).sum(1)
    return all_sum(torch.nn.functional.pad(change, (1, 0)))     # before the first iteration nothing is predicted


def policy_of(showo, prompt, G):
    """The policy of a rollout of groups of G; its first state, all masked, is the same for a whole group."""
    def policy(codes, at):
        if at.shape[1] == showo.N:
            return showo.logits(codes[::G], prompt[slice(None, None, G)], at=at[::G]).repeat_interleave(G, 0)
        return showo.logits(codes, prompt, at=at)
    return policy


def first_rows(row):
    """row Long[b] -> the first index at which each value stands, and for every row the place of its value among them."""
    values, of = row.unique(return_inverse=True)
    return torch.full_like(values, len(row)).scatter_reduce(0, of, torch.arange(len(row), device=row.device), "amin"), of


def loss_iterations(step, args, change=None):
    """The iterations Eq. 10 sums over: all T, or a subset (Sec. 3.3, computational reduction). change: of picture_change()."""
    T, k = args.unmask_steps, args.loss_steps or args.unmask_steps
    if change is not None:
        return sorted(change.topk(k).indices.tolist())
    if args.loss_steps_from == "random":
        return sorted(random.Random(repr((args.seed, step, "iterations"))).sample(range(T), k))
    return list(range(T - k, T) if args.loss_steps_from == "last" else range(k))


def update(step, batch, args, showo, reference, optimizer) -> dict:
    """Climb Eq. 10 on one batch of rollouts, --inner-epochs times; gradients are those of the mean over the groups of all
    processes -> numbers for the log. reference: a frozen Showo, None = no KL. When a reward, log-probability or gradient of any
    process is not finite, none takes that step, nor another one on these rollouts."""
    iterations, device = loss_iterations(step, args, batch.change), batch.traj.codes.device
    kind = "ar" if args.trajectory == "forward" else args.transition
    adv = group_advantages(batch.rewards, args.adv).flatten().to(device)                        # (B,)  Eq. 12
    used = torch.arange(len(adv), device=device) if reference else adv.nonzero()[:, 0]          # the rest has no gradient
    B = all_sum(torch.tensor(float(len(adv)), device=device)).item()                            # pictures of all processes
    logp_old = torch.zeros(args.unmask_steps, len(adv), device=device)
    place = batch.traj.order.argsort(dim=1, stable=True)                                        # positions, the first unmasked first
    ends = [showo.N - n for n in mask_schedule(showo.N, args.unmask_steps).tolist()]            # how many are unmasked after t
    faulty = ~batch.rewards.isfinite().flatten().to(device)                                     # (B,)
    skipped, norm, stats = all_sum(faulty.sum()).item() > 0, torch.zeros(()), []                # the same on all processes
    for epoch in range(0 if skipped else args.inner_epochs):
        for rows in used.split(args.micro_batch) if len(used) else ():
            with showo.autocast():
                prompt = showo.prefill(batch.prompt[rows])                                      # the text once for all iterations
                prompt.cache.cut()
                if reference:
                    with torch.no_grad():
                        prompt_ref = reference.prefill(batch.prompt[rows])
                for t in iterations:
                    first, last = ends[t - 1] if t else 0, ends[t]
                    at = place[rows, first:max(last, first + 1) if kind == "p2" else None]  # only these enter the loss
                    move = move_at(batch.traj, rows, at, t, kind, args)
                    length = at.shape[1] if args.ratio == "mean" else 1
                    state = batch.traj.state(t, showo.K)[rows]                                  # Y_t
                    if t == 0:                                                                  # a group starts from one state
                        one, of = first_rows(prompt.row)
                        logits = showo.logits(state[one], prompt[one])[of[:, None], at]         # (b, M, K)
                    else:
                        logits = showo.logits(state, prompt, at=at)                             # (b, M, K)
                    logp = transition_log_prob(logits, **move)                                  # (b,)
                    odd = ~logp.detach().isfinite()
                    if epoch == 0:
                        logp_old[t, rows] = logp.detach()                                       # on policy: the ratio is 1
                    share = len(rows) / (B * len(iterations))                                   # Eq. 10 is a mean
                    loss = -share * clipped_objective(logp, logp_old[t, rows], adv[rows], args.clip_low, args.clip_high, length)
                    kl = torch.zeros((), device=device)
                    if reference:
                        with torch.no_grad():
                            logp_ref = transition_log_prob(reference.logits(state, prompt_ref, at=at), **move)
                        kl = kl_k3(logp, logp_ref)
                        loss = loss + share * args.kl_beta * kl
                    faulty[rows] |= odd | (~loss.detach().isfinite() & ~odd.any())             # one, or any of these rows
                    with torch.autocast(device.type, enabled=False):  # backward in the precision of each forward op
                        loss.backward()
                    stats.append(move_stats((logp - logp_old[t, rows]) / length, logits[:, :last - first], kl, args))
                with torch.autocast(device.type, enabled=False):
                    prompt.cache.backward()
        params = sum_gradients(showo)
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skipped = all_sum(faulty.sum()).item() > 0 or not norm.isfinite()
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(showo, FSDPModule):
            showo.unshard()
        if skipped:
            break
    stats = torch.stack(stats) if stats else torch.zeros(1, 8, device=device)                   # (passes, 8)
    n, ratio, off, clipped, kl, entropy, n_new = all_sum(stats[:, :7].sum(0)).tolist()
    if not n:  # every group was all right or all wrong: nothing to learn from, no ratio
        ratio = n = 1
    faults = all_lists([batch.texts[i] for i in faulty.view(len(batch.texts), -1).any(1).nonzero()[:, 0].tolist()]) if skipped else []
    return {"grad_norm": norm.item(), "skipped": int(skipped), "faults": faults, "ratio_mean": ratio / n, "ratio_max": all_cat(stats[:, 7].amax()[None]).amax().item() or 1.0,
            "approx_kl": off / n, "clip_fraction": clipped / n, "kl_ref": kl / n, "entropy": entropy / max(n_new, 1)}


def move_at(traj, rows, at, t, kind, args) -> dict:
    """What transition_log_prob takes beside logits, of these rows, at the positions at Long[b, M]."""
    noisy = {} if kind != "gumbel" else dict(cut=traj.cut[rows, t, 0], at_cut=at == traj.cut[rows, t, 1:],
                                             noise=max(temperatures(args.unmask_steps, args.temperature)[t], 0.05))  # or few pictures decide
    pick = lambda x: x[rows].gather(1, at)  # noqa: E731
    return dict(codes=pick(traj.codes), order=pick(traj.order), t=t, kind=kind, threshold=traj.threshold[rows],
                sampled=None if kind != "ar" else pick(traj.sampled[t]), **noisy)


@torch.no_grad()
def move_stats(log_ratio, logits, kl, args):
    """Sums over the rows of one pass: rows, ratio, k3 of the old against the new policy, clipped, KL to the reference,
    entropy at the newly unmasked positions, whose logits (b, n, K) are given, how many of these; and the largest ratio."""
    ratio = log_ratio.exp()
    p = torch.log_softmax(logits.float(), -1)
    sums = [torch.tensor(float(len(ratio))), ratio.sum(), (log_ratio.expm1() - log_ratio).sum(),
            ((ratio < args.clip_low) | (ratio > args.clip_high)).sum(), kl * len(ratio), -(p.exp() * p).sum(),
            torch.tensor(float(logits.shape[0] * logits.shape[1])), ratio.amax()]
    return torch.stack([x.float().to(ratio.device, non_blocking=True) for x in sums])


# ---------------------------------------------------------------------------------------------- evaluation

def judge(lines, pictures, reward, detector) -> dict:
    """Values of pictures, Float[B] each: with a detector GenEval's verdicts(), else the reward as "overall"."""
    if detector:
        return verdicts(lines, detector(pictures, lines))
    return {"overall": reward(pictures, [line.get("reward_prompt", line["prompt"]) for line in lines], lines)}


def evaluate(step, lines, args, showo, magvit, reward, detector) -> dict:
    """Draw --eval-n pictures of every evaluation prompt at evaluation settings, the same noise each time -> eval.jsonl's row.

    Prompts are shared out over the processes. overall and exact are means over tags, each the share of right pictures."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(range(rank, len(lines), world)) or [0]          # more processes than prompts: some draw the first one too
    times = torch.zeros(len(lines), device=showo.device)
    times[mine] = 1
    all_sum(times)
    pictures = generate(showo, magvit, [lines[i]["prompt"] for i in mine], n=args.eval_n, T=args.eval_unmask_steps,
                        guidance=args.eval_guidance, seeds=mine, batch=args.micro_batch)
    values = judge([lines[i] for i in mine for _ in range(args.eval_n)], pictures, reward, detector)
    for name in values:                                                                  # -> (prompts), the mean of each
        values[name], local = torch.zeros_like(times), values[name]
        values[name][mine] = local.reshape(len(mine), -1).mean(1).to(showo.device)
        values[name] = all_sum(values[name]) / times
    tags = {}
    for i, line in enumerate(lines):
        tags.setdefault(line.get("tag"), []).append(i)
    mean = lambda name, rows: values[name][rows].mean().item()  # noqa: E731
    over_tags = lambda name: sum(mean(name, rows) for rows in tags.values()) / len(tags)  # noqa: E731
    row = {"step": step, "overall": over_tags("overall"), **{tag: mean("overall", rows) for tag, rows in tags.items() if tag}}
    if "exact" in values:
        everything = list(range(len(lines)))
        row |= {"exact": over_tags("exact"), **{name: mean(name, everything) for name in ("objects", "objects_asked")}}
    return row


def picture_grid(path, lines, args, showo, magvit, reward, detector):
    """Fixed evaluation prompts at evaluation settings, prompt and score under each picture."""
    pictures = generate(showo, magvit, [line["prompt"] for line in lines], T=args.eval_unmask_steps,
                        guidance=args.eval_guidance, seeds=list(range(len(lines))), batch=args.micro_batch)
    values = judge(lines, pictures, reward, detector)["overall"].tolist()
    path.parent.mkdir(exist_ok=True)
    grid(pictures, [f"{line['prompt']} | {v:.3g}" for line, v in zip(lines, values)], min(6, len(lines))).save(path)


# -------------------------------------------------------------------------------------------------- clock

class Clock(dict):
    """Seconds by part: with clock("rollout"): ..."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    @contextlib.contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self[part] = self.get(part, 0.0) + time.perf_counter() - start


# --------------------------------------------------------------------------------------------------- main

def main():
    args = parse_args()
    rank, world, device = setup()
    folder, resumed = checkpoint.find(args, rank) if args.resume else (None, None)
    start = resumed["step"] if resumed else 0
    tiny = args.model == "shapes"

    # prompts, reward: everything that can be wrong in them is found before a model is loaded
    here = Path(__file__).parent
    lines = (read_prompts(args.prompts) if args.prompts else shapes.prompts("train") if tiny else read_prompts(here / "prompts/train.txt"))
    eval_lines = (read_prompts(args.eval_prompts) if args.eval_prompts else shapes.prompts("eval") if tiny
                  else read_prompts(here / "prompts/eval.txt"))
    shown = eval_lines[::max(1, len(eval_lines) // 12)][:12]
    detector = shapes.detect if tiny else None
    for flag, used, needed in (("--prompts", lines, "geneval" in args.reward), ("--eval-prompts", eval_lines, tiny)):
        for number, line in enumerate(used, 1):
            if needed and not is_geneval(line):
                raise InputError(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}: prompt {number} lacks GenEval metadata (tag, include)")
    reward = make_reward(args.reward, device=device, detector=detector, keep=not args.offload_reward, finite=False)
    out = checkpoint.output_folder(args, rank)

    # the policy: logits of every position, closed over its prompts
    showo, magvit, loaded = load_models(args.model, ckpt=folder, vq=args.vq, tokenizer=args.tokenizer, revision=args.revision, device=device)
    if half_or_float(args.dtype, device) != torch.float32:
        showo.compute_dtype = torch.bfloat16
    showo.grad_checkpoint = args.grad_checkpoint
    reference = None
    if not args.no_kl and args.kl_beta:
        reference = load_showo(args.model, tokenizer=args.tokenizer, device=device, revision=args.revision).requires_grad_(False)
        reference.compute_dtype = showo.compute_dtype
    if args.fsdp:
        fully_shard(showo, mesh=init_device_mesh(device.type, (world,)))
    optimizer = torch.optim.AdamW(showo.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    sample_filter = SampleFilter(args.filter_percentile, args.filter_warmup) if args.filter_low else None
    n_bad = resumed["bad"] if resumed else 0
    if resumed:
        checkpoint.load_optimizer(showo, optimizer, resumed.pop("optimizer"))
        if sample_filter:
            sample_filter.load_state_dict(resumed["filter"])
    if args.fsdp:
        showo.unshard()

    log, stop = checkpoint.Log(out, args, rank, start if resumed else -1), checkpoint.Stop()
    per_step = args.prompts_per_step * world
    log.say(f"{loaded}\n{world} x {device.type}, computing in {showo.compute_dtype or torch.float32}; {len(lines)} prompts, "
            f"reward {args.reward}; output in {out}\n"
            f"one step: {per_step} prompts x {args.group_size} = {per_step * args.group_size} pictures, x "
            f"{len(loss_iterations(0, args))} of {args.unmask_steps} iterations = "
            f"{per_step * args.group_size * len(loss_iterations(0, args))} trajectory steps, over all processes\n"
            f"{flags_of(vars(args) | {'recipe': None})}")

    for line in checkpoint.differences(resumed, args, world) if resumed else ():
        log.say(line)

    def watch(step, stopping=False):
        """Evaluate, draw and save when it is time; always at the start of a run and at its end."""
        last = step == args.steps
        due = lambda every: every and (step % every == 0 or last)  # noqa: E731
        if due(args.eval_every):
            with clock("eval"):
                row = evaluate(step, eval_lines, args, showo, magvit, reward, detector)
            log("eval.jsonl", row)
            log.say("eval " + " ".join(f"{k} {v:.3f}" if k != "step" else f"{k} {v}" for k, v in row.items()))
        if due(args.sample_every) and rank == 0:
            picture_grid(out / "samples" / f"step-{step:06d}.png", shown, args, showo, magvit, reward, detector)
        if step > start and (due(args.save_every) or last or stopping):
            if args.check_every:
                checkpoint.in_step(list(showo.parameters()), all_cat)
            weights, moments = checkpoint.whole(showo, optimizer)
            if rank == 0:
                history = sample_filter.state_dict() if sample_filter else resumed["filter"] if resumed else {"history": []}
                state = {"step": step, "args": vars(args), "world": world, "bad": n_bad, "optimizer": moments, "filter": history}
                checkpoint.save(out / f"checkpoint-{step}", state, weights, showo, args.keep_last)

    total = Clock(device)
    clock = total
    if not resumed:
        watch(0)
    for step in range(start, args.steps):
        clock = Clock(device)
        with clock("step"):
            first = step * per_step + rank * args.prompts_per_step
            chosen = [lines[prompt_at(first + i, len(lines), args.seed)] for i in range(args.prompts_per_step)]
            batch = collect(step, chosen, args, showo, magvit, reward, sample_filter, clock)
            lr = args.lr * min(1, (step + 1) / max(args.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            with clock("update"):
                numbers = update(step, batch, args, showo, reference, optimizer)
        rewards = all_cat(batch.rewards.to(device))                                             # (P of all processes, G)
        parts = {name: all_cat(part.to(device)).mean().item() for name, part in batch.log.items()}
        log.step({"step": step + 1, "reward_mean": rewards[rewards.isfinite()].mean().item(), "reward_std": rewards.std(1).nanmean().item(),
                  "adv_zero": (group_advantages(rewards) == 0).float().mean().item(),
                  "resampled": all_sum(torch.tensor(batch.resampled, device=device)).item(), **parts, **numbers, "lr": lr,
                  "images_per_s": rewards.numel() / clock["step"], **{f"s_{k}": v for k, v in clock.items()},
                  "peak_gib": peak_gib(device)})
        for part, seconds in clock.items():
            total[part] = total.get(part, 0.0) + seconds
        clock = total
        n_bad += numbers["skipped"]
        if args.check_every and (step + 1) % args.check_every == 0:
            checkpoint.in_step(list(showo.parameters()), all_cat)
        stopping = all_sum(torch.tensor(float(stop.asked > 0), device=device)).item() > 0       # all stop, or none
        too_bad = numbers["skipped"] and n_bad >= args.max_bad_steps
        watch(step + 1, stopping or too_bad)
        if too_bad:
            barrier()  # what process 0 saves is there
            raise InputError(f"{n_bad} steps had something that is not finite; the last good checkpoint is {out / f'checkpoint-{step + 1}'}; "
                             "look at the prompts logged with them, and continue with --resume and a larger --max-bad-steps")
        if stopping:
            log.say(f"stopped after step {step + 1}, as a signal asked; continue with --resume --out {out}")
            break

    if rank == 0 and (out / "samples/step-000000.png").exists():
        checkpoint.before_and_after(out / "samples")
    done = max(step + 1 - start if start < args.steps else 0, 1)
    checkpoint.closing_table(out, log.say)
    log.say("\nseconds per step: " + ", ".join(f"{k} {v / done:.2f}" for k, v in total.items() if k != "eval")
            + f"; all evaluations {total.get('eval', 0):.0f} s; peak memory {peak_gib(device):.2f} GiB; {out}")


if __name__ == "__main__":
    run(main)
