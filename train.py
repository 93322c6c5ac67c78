"""Mask-GRPO (arXiv 2510.13418): RL for masked text-to-image models, one readable loop.

    python train.py --model shapes --no-kl --filter-low --ratio mean          # a laptop, see README
    torchrun --nproc_per_node 8 train.py --no-kl --filter-low                 # Show-o 512, Eq. 15
    torchrun --nproc_per_node 8 train.py --no-kl --filter-low --transition p1       # with Eq. 14

One step: sample G pictures for each of P prompts (sample.py, Eq. 1-9), score them (reward.py), turn
scores into advantages (grpo.py, Eq. 12), and maximize Eq. 10, a mean over the T iterations.

Departures from the paper:
- the default transition is Eq. 15, which is what the released training really computes;
- the KL covers only the newly unmasked tokens, see kl_to_reference();
- with several rewards, each is normalised in its group (Eq. 12), and then they are added;
- --loss-steps divides the loss by the number of chosen iterations, not by T;
- a picture without a score, or a group with a NaN in its rollouts, is left out of the mean;
- prompts/train.txt holds captions of our own; --ratio mean (GSPO) and --lora are not in the paper.
Departures from the released training:
- gradients are averaged over processes and clipped to norm 1; all weights decay;
- the loss is not divided by T once more;
- the cosine starts with the warm-up, whose first step is not 0, and ends at 0 (released: 0.35);
- bf16 products and float32 weights in place of fp16.

Random numbers depend only on (seed, step, prompt slot). A resumed run repeats them bit by bit.
Another number of processes with the same total of prompts per step repeats them up to rounding, and
rounding can flip a draw: from the second step on such runs agree in their statistics, not in every
token.
"""
import functools
import importlib.util
import itertools
import math
import os
import random
from argparse import BooleanOptionalAction
from dataclasses import dataclass

import torch

from grpo import SampleFilter, clipped_objective, group_advantages, kl_k3
from model import Prompt, describe, load_models, to_uint8
from reward import make_reward, needs_metadata
from sample import Trajectory, generate, rollout, transition_log_prob
from shapes import world
from support import flags, geneval, pictures, processes, run
from support.processes import all_cat, all_lists, all_sum
from support.prompts import read_prompts
from support.weights import digest, fingerprint, is_shapes

PRESETS = {     # defaults, by model
    "showo": dict(steps=625, group_size=6, prompts_per_step=2, unmask_steps=50, lr=3e-6, warmup=62,
                  weight_decay=0.02, micro_batch=6, prompts="prompts/train.txt", reward="clip",
                  eval_every=50, eval_n=1, eval_unmask_steps=50, eval_guidance=5.0,
                  eval_prompts=None, eval_reward=None, save_every=100),
    "shapes": dict(steps=40, group_size=8, prompts_per_step=16, unmask_steps=4, lr=8e-4, warmup=3,
                   weight_decay=0.0, micro_batch=256, prompts="shapes/train.jsonl",
                   reward="clip:shapes/clip", eval_every=20, eval_n=8, eval_unmask_steps=12,
                   eval_guidance=0.0, eval_prompts="shapes/eval.jsonl",
                   eval_reward="geneval:official", save_every=20)}


def parse_args():
    """Return the flags, whose defaults depend on the model: PRESETS."""
    p, count = flags.parser(__doc__), flags.at_least(1)
    from_0, positive = flags.at_least(0), flags.at_least(0, float)
    add = p.add_argument_group("what").add_argument
    flags.add_model_flags(add)
    add("--prompts", help="see support/prompts.py; FILE:KEY")
    add("--reward", help="see reward.py: clip, geneval:exact, or a weighted sum")
    add("--out", help="output folder (default: a new one under runs/)")
    add("--resume", nargs="?", const="auto", help="go on from the newest checkpoint in --out, if "
        "there is one, or from this one")
    add("--seed", type=int, default=42, help="of all random numbers")

    add = p.add_argument_group("the method").add_argument
    add("--steps", type=count, help="optimizer steps with fresh rollouts")
    add("--group-size", type=flags.at_least(2), help="G, pictures per prompt")
    add("--prompts-per-step", type=count, help="P, per process")
    add("--unmask-steps", type=count, help="T while training (fewer: unmasking reduction)")
    add("--transition", choices=["p1", "p2", "ar"], default="p2", help="Eq. 14, 15 or 13")
    add("--ratio", choices=["sum", "mean"], default="sum", help="Eq. 11, or per token (GSPO)")
    add("--clip", type=float, nargs=2, default=[0.9, 1.2], help="bounds of the ratio, Eq. 10")
    add("--kl", action=BooleanOptionalAction, default=True,
        help="KL to the frozen base (Eq. 10); --no-kl does not load it")
    add("--kl-beta", type=positive, default=0.01, help="beta of Eq. 10")
    add("--filter-low", action=BooleanOptionalAction, default=False,
        help="sample a group again when its reward std is low (Sec. 3.3)")
    add("--loss-steps", type=count, help="computational reduction (default: all T)")
    add("--loss-steps-from", choices=["first", "last", "random"], default="first",
        help="which iterations --loss-steps takes")
    add("--inner-epochs", type=count, default=1, help="optimizer steps on the same rollouts. With "
        "p1 in bf16 the ratio is noisy after the first: at 60%% of the positions a code crosses "
        "Eq. 14's threshold between two computations of the same weights, which moves the log by "
        "0.14 (p2: 0.0003), as much as the clip allows; the gradient is 2.3e-2 from float32's "
        "(p2: 1.9e-3)")

    add = p.add_argument_group("optimizer").add_argument
    add("--lr", type=positive, help="peak; the paper: at most 3e-6 without KL, 5e-6 with it")
    add("--warmup", type=from_0, help="linear warm-up steps, times a cosine from step 0 on")
    add("--weight-decay", type=positive, help="AdamW's, on all weights")
    add("--max-grad-norm", type=positive, default=1.0, help="0 = no clipping")
    add("--micro-batch", type=count, help="pictures per forward pass; memory only")
    add("--grad-checkpoint", action="store_true", help="less memory, a third more work")
    add("--lora", type=count, metavar="RANK", help="train adapters only")
    add("--zero", action="store_true", help="shard the optimizer state over processes (ZeRO-1)")

    add = p.add_argument_group("watching").add_argument
    add("--eval-every", type=from_0, help="steps between evaluations, each with a grid; 0 = none")
    add("--eval-n", type=count, help="pictures per evaluation prompt")
    add("--eval-unmask-steps", type=count, help="T when evaluating")
    add("--eval-guidance", type=positive, help="guidance when evaluating")
    add("--eval-reward", help="like --reward; parts of weight 0 are logged only (default: "
        "geneval:official with shapes or a geneval reward, else --reward)")
    add("--eval-prompts", help="like --prompts (default: shapes/eval.jsonl; Show-o: 62 of "
        "GenEval's if the evaluation's reward is geneval, else prompts/eval.txt)")
    add("--save-every", type=from_0, help="steps between checkpoints, 0 = only the last")
    add("--keep-last", type=from_0, default=0, help="checkpoints, 0 = all")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")

    args = flags.parse(p, PRESETS)
    if (args.loss_steps or 0) > args.unmask_steps:
        p.error(f"--loss-steps {args.loss_steps} is more than --unmask-steps {args.unmask_steps}")
    if not args.clip[0] <= 1 <= args.clip[1]:
        p.error(f"--clip {args.clip[0]} {args.clip[1]}: wanted the ratio's bounds, such as 0.9 1.2")
    if args.resume == "auto" and not args.out:
        p.error("--resume: give the run's folder, --out DIR, or --resume DIR/checkpoint-STEP")
    if args.zero and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--zero shards over processes: start with torchrun --nproc_per_node N")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        p.error("--wandb needs a package: pip install wandb")
    return args


# ------------------------------------------------------------------------------ rollouts

@dataclass
class Groups:
    """The P groups of G pictures of a step, of this process; the rows of a group are adjacent."""
    examples: list[dict]        # P
    keys: list[tuple]           # P, what the random numbers of a group depend on
    prompt: Prompt              # P G rows
    traj: Trajectory            # P G rows
    rewards: dict               # {"reward": the sum, part: ...}, Float (P, G) each


def generator(device, *key):
    """Return a torch.Generator whose seed depends on the key only. The key's repr is the seed: do
    not change its types."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


@functools.lru_cache(2)
def order_of_epoch(n, seed, epoch):
    return torch.randperm(n, generator=generator("cpu", seed, "prompts", epoch))


def example_at(slot, examples, seed):
    """Return example number `slot` of the run. Each epoch is a new random order of all examples."""
    epoch, place = divmod(slot, len(examples))
    return examples[order_of_epoch(len(examples), seed, epoch)[place]]


@torch.no_grad()
def sample_groups(examples, keys, args, showo):
    """Roll out G pictures of each of P examples (Eq. 1-9) -> Prompt and Trajectory, P G rows."""
    G, trajs = args.group_size, []
    prompt = showo.encode([e["prompt"] for e in examples]).repeat(G)
    chunk = max(1, args.micro_batch // G)       # whole groups: each has a generator of its own
    for i in range(0, len(examples), chunk):
        rows = slice(i * G, (i + chunk) * G)
        generators = [generator(showo.device, *key) for key in keys[i:i + chunk]]
        policy = showo.policy(prompt[rows], batch=args.micro_batch)
        trajs.append(rollout(policy, len(prompt[rows]), showo.N, showo.K, args.unmask_steps,
                             generator=generators, keep_sampled=args.transition == "ar"))
    return prompt, Trajectory.cat(trajs)


@torch.no_grad()
def score_groups(examples, traj, magvit, reward) -> dict:
    """Decode and score -> {"reward": the weighted sum, and each part by its name}, Float (P, G)."""
    P, device = len(examples), traj.codes.device
    images = to_uint8(magvit.decode(traj.codes))
    scores = reward.score(images, examples, len(images) // P)
    return {name: values.view(P, -1).to(device) for name, values in scores.items()}


def sample_again(groups, sample_filter, args, showo, magvit, reward, stop) -> int:
    """Sec. 3.3: sample and score the groups of low reward std again, once, in place. Return how
    many, over all processes, which share one history of stds."""
    P, G = groups.rewards["reward"].shape
    std = all_cat(groups.rewards["reward"].std(1)).cpu()                    # (P of all,)
    low = ~sample_filter.passes(std)
    mine = low[processes.rank() * P:][:P].nonzero()[:, 0].tolist()
    examples = [groups.examples[i] for i in mine]
    keys = [(*groups.keys[i][:3], 1) for i in mine]         # the last entry: the second attempt

    def again():
        if mine:
            _, traj = sample_groups(examples, keys, args, showo)
            return traj, score_groups(examples, traj, magvit, reward)
    if (new := stop.call(again)) is not None:
        groups.traj[[i * G + j for i in mine for j in range(G)]] = new[0]
        for name, values in new[1].items():
            groups.rewards[name][mine] = values

    # only now: a step that ends before this is done again by the resumed run
    sample_filter.remember(std)
    sample_filter.remember(all_cat(groups.rewards["reward"].std(1)).cpu()[low])
    return int(low.sum())


# ------------------------------------------------------------------------------ the update

def advantages(groups, weights):
    """Return the advantages Float (B,), NaN in rows that do not count: they have no reward, or
    their group's rollouts met logits that are not finite. Eq. 12 is for each part of weights {part:
    weight}; their weighted mean counts (GDPO, arXiv 2601.05242), because in a raw sum the reward
    with the largest spread would dominate."""
    rewards, total = groups.rewards, sum(map(abs, weights.values()))
    scored = rewards["reward"].isfinite()                                               # (P, G)
    adv = sum(weight / total * group_advantages(rewards[part].where(scored, math.nan))  # Eq. 12
              for part, weight in weights.items() if weight)
    broken = groups.traj.threshold.isnan().any(1).view_as(scored).any(1, keepdim=True)  # (P, 1)
    return adv.where(scored & ~broken, math.nan).flatten()


def loss_iterations(step, args):
    """Return the iterations that Eq. 10 averages over: all T, or a subset (Sec. 3.3)."""
    T, n = args.unmask_steps, args.loss_steps or args.unmask_steps
    if args.loss_steps_from == "random":
        return sorted(random.Random(repr((args.seed, step, "iterations"))).sample(range(T), n))
    return list(range(T - n, T) if args.loss_steps_from == "last" else range(n))


def kl_to_reference(logits, logp, traj, t, reference, prompt, args):
    """Return the KL of Eq. 10 at iteration t, by k3. Departure: it covers only the newly
    unmasked tokens (Eq. 15), for every transition (why: see kl_k3). With --ratio mean the logs are
    divided by n_t.

    logits Float (b, M, K), the newly unmasked positions first; prompt: prefilled by reference."""
    positions = traj.positions(t, "p2")                                         # (b, n_t)
    moved, n = traj.at(positions), positions.shape[1]
    with reference.frozen_base():
        logits_ref = reference.logits(traj.state(t), prompt, positions=positions)
        logp_ref = transition_log_prob(logits_ref, moved, t, "p2")
    if args.transition != "p2":
        logp = transition_log_prob(logits[:, :n], moved, t, "p2")
    length = n if args.ratio == "mean" else 1
    return kl_k3(logp / length, logp_ref / length)


def frozen_prefill(reference, prompt):
    """Return the prompt, prefilled by the reference, if there is one."""
    if reference:
        with reference.frozen_base():
            return reference.prefill(prompt)


def update(groups, adv, iterations, args, showo, reference, optimizer) -> dict:
    """Maximize Eq. 10 on the rollouts of a step, --inner-epochs times -> numbers for the log.

    J = mean of [min(r A, clip(r) A) - beta KL] over the iterations t and the rows j, of all
    processes, whose adv is a number. An optimizer step without such a row, or whose gradient is not
    finite, is not taken; "taken": whether one was."""
    traj, kind, tally = groups.traj, args.transition, Tally(adv.device)
    counts = adv.isfinite()
    n_terms = all_sum(counts.sum()).item() * len(iterations)    # that Eq. 10 averages over
    logp_old = adv.new_zeros(args.unmask_steps, len(adv))                           # (T, B)
    kl, taken = adv.new_zeros(()), 0

    # rows with A = 0 count in the mean; without a KL their gradient is 0, so they are skipped
    trained = (counts & ((adv != 0) | bool(reference))).nonzero()[:, 0]
    for epoch in range(args.inner_epochs):
        for rows in trained.split(args.micro_batch) if len(trained) else ():
            part, A = traj[rows], adv[rows]
            # the text is computed once per micro-batch; one backward through it after all t
            with showo.shared_text(groups.prompt[rows]) as prompt:
                prompt_ref = frozen_prefill(reference, groups.prompt[rows])
                for t in iterations:
                    positions = part.positions(t, kind)                             # (b, M)
                    logits = showo.logits(part.state(t), prompt, positions=positions)
                    logp = transition_log_prob(logits, part.at(positions), t, kind)  # Eq. 13-15

                    # first epoch: the weights are still the rollout's, so the ratio is 1
                    if epoch == 0:
                        logp_old[t, rows] = logp.detach()
                    n_tokens = positions.shape[1] if args.ratio == "mean" else 1
                    log_ratio = (logp - logp_old[t, rows]) / n_tokens               # Eq. 11
                    objective = clipped_objective(log_ratio, A, *args.clip)         # Eq. 10
                    if reference:
                        kl = kl_to_reference(logits, logp, part, t, reference, prompt_ref, args)
                        objective = objective - args.kl_beta * kl                   # Eq. 10

                    # this micro-batch's share of the mean
                    loss = -objective * len(rows) / n_terms
                    loss.backward()
                    # positions() puts the newly unmasked first
                    tally.add(log_ratio.detach(), kl.detach(), logits[:, :traj.n_unmask(t)],
                              args.clip)

        # the sum over processes; each of them decides alike whether the step is taken
        params = list(showo.trainable().values())
        for p in params:
            p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm or math.inf).item()
        if n_terms > 0 and math.isfinite(norm):
            optimizer.step()
            taken = 1
        optimizer.zero_grad()
    return {"taken": taken, "grad_norm": norm if n_terms else math.nan, **tally.means()}


class Tally:
    """Running means for the log, over all forward passes and processes. approx_kl: k3 between the
    rollout's policy and the current one; clip_fraction: share of ratios outside the bounds, whether
    or not the clipped term of Eq. 10 won."""
    NAMES = ("ratio_mean", "approx_kl", "clip_fraction", "kl_ref", "entropy")

    def __init__(self, device):
        self.sums = torch.zeros(2, len(self.NAMES), device=device)      # of values, of ones
        self.ratio_max = torch.zeros(1, device=device)

    @torch.no_grad()
    def add(self, log_ratio, kl, logits, clip):
        """log_ratio Float (b,); kl: a mean; logits Float (b, n_t, K), of the newly unmasked."""
        ratio, logp = log_ratio.exp(), logits.float().log_softmax(-1)
        values = [ratio, log_ratio.expm1() - log_ratio, (ratio < clip[0]) | (ratio > clip[1]),
                  kl.expand_as(ratio), -(logp.exp() * logp).sum(-1)]
        self.sums[0] += torch.stack([x.float().sum() for x in values])
        self.sums[1] += torch.stack([torch.ones_like(x, dtype=logp.dtype).sum() for x in values])
        self.ratio_max = self.ratio_max.maximum(ratio.amax())

    def means(self) -> dict:
        total, number = all_sum(self.sums)
        return dict(zip(self.NAMES, (total / number).tolist(), strict=True),
                    ratio_max=all_cat(self.ratio_max).amax().item())


# ------------------------------------------------------------------------------ evaluation

def draw_and_score(step, examples, args, showo, magvit, reward, out) -> list:
    """Draw and score --eval-n pictures of this process's examples, with the same noise each time ->
    [(example's number, {part: mean over its pictures})]. Process 0 saves a grid."""
    mine, n = list(range(processes.rank(), len(examples), processes.world())), args.eval_n
    if not mine:
        return []
    images = generate(showo, magvit, [examples[i]["prompt"] for i in mine], n=n,
                      T=args.eval_unmask_steps, guidance=args.eval_guidance, seeds=mine,
                      batch=args.micro_batch)
    scores = reward.score(images, [examples[i] for i in mine], n)
    if processes.rank() == 0:
        shown = list(range(0, len(images), max(n, len(images) // 12)))[:12]
        scored = [f"{scores['reward'][i]:.3g} | {examples[mine[i // n]]['prompt']}"
                  for i in shown]
        (out / "samples").mkdir(exist_ok=True)
        path = run.grid_path(out, step)
        pictures.grid(images[shown], scored, 6).save(path.with_suffix(".part"), "PNG")
        path.with_suffix(".part").replace(path)
    return [(i, {name: x[k * n:(k + 1) * n].nanmean().item() for name, x in scores.items()})
            for k, i in enumerate(mine)]


def evaluate(step, examples, args, showo, magvit, reward, out, stop) -> dict:
    """Return a row of eval.jsonl. "overall" is the mean over tags, as GenEval has it; several parts
    of a reward have a number each."""
    rows = all_lists(stop.call(draw_and_score, step, examples, args, showo, magvit, reward, out))
    rows.sort(key=lambda row: row[0])
    means = {name: geneval.shares([(examples[i].get("tag", ""), i, scores[name])
                                   for i, scores in rows]) for name in rows[0][1]}
    total, parts = means.pop("reward"), means if len(means) > 1 else {}
    return {"step": step, "overall": total.pop("overall")[0],
            **{name: shares["overall"][0] for name, shares in parts.items()},
            **{tag: mean for tag, (mean, _) in total.items() if tag}}


# ------------------------------------------------------------------------------ the run

def load_task(args, device):
    """Return examples and reward of training, then examples and reward of evaluation."""
    tiny = is_shapes(args.model)
    known, detector = (), None
    if tiny:
        known, detector = (world.CLASSES, list(world.COLOURS)), world.detect
    by_geneval = needs_metadata(args.reward)
    eval_reward = args.eval_reward or ("geneval:official" if by_geneval else args.reward)
    eval_prompts = args.eval_prompts or (
        "prompts/geneval.jsonl" if needs_metadata(eval_reward) else "prompts/eval.txt")
    examples, held_out = read_prompts(args.prompts), read_prompts(eval_prompts)
    if not args.eval_prompts and needs_metadata(eval_reward):
        held_out = held_out[::9]                    # 62, of all tags
    if by_geneval:
        geneval.check_metadata(examples, *known)
    if args.eval_every and needs_metadata(eval_reward):
        geneval.check_metadata(held_out, *known)

    reward = judged_by = make_reward(args.reward, device=device, detector=detector)
    if args.eval_every and eval_reward != args.reward:
        judged_by = make_reward(eval_reward, device=device, detector=detector)
    return examples, reward, held_out, judged_by


def load_policy(args, device, folder, trainer):
    """Return the policy, its image tokenizer, the frozen reference of the KL, if any, and AdamW,
    with --zero its state in shards; as they were in a checkpoint folder, if any."""
    # LoRA: always start from the base; the adapters come from trainer.pt
    weights = args.ckpt if args.lora else folder or args.ckpt
    showo, magvit = load_models(args.model, ckpt=weights, vq=args.vq, device=device,
                                compiled=args.compile)

    # the frozen reference is the same model without its adapters, or a second one
    reference = None
    if args.lora:
        torch.manual_seed(args.seed)
        showo.add_lora(args.lora)
        showo.load_state_dict(trainer["lora"] if trainer else {}, strict=False)
    if args.kl and args.kl_beta and args.lora:
        reference = showo                   # with its adapters off
    elif args.kl and args.kl_beta:
        reference, _ = load_models(args.model, ckpt=args.ckpt, vq=args.vq, device=device,
                                   compiled=args.compile)
        reference.requires_grad_(False)
    if processes.choose_dtype(args.dtype, device) == torch.bfloat16:
        for model in {showo, reference} - {None}:
            model.compute_in(torch.bfloat16)
    showo.grad_checkpoint = args.grad_checkpoint

    # AdamW, whose state can be sharded
    settings = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                    fused=(device.type == "cuda" and not args.zero) or None)
    params = list(showo.trainable().values())
    if args.zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **settings)
    else:
        optimizer = torch.optim.AdamW(params, **settings)
    if trainer:
        # mapped on a GPU, where it is copied; here nothing holds the file when this returns
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True,
                           mmap=device.type == "cuda")
        for group in state["param_groups"]:
            group.update(settings)          # what this run wants, not what the file says
        optimizer.load_state_dict(state)
    return showo, magvit, reference, optimizer


def learning_rate(step, args):
    """Return the linear warm-up times a cosine from 1 at the first step to 0 after the last."""
    warmup = min(1, (step + 1) / max(args.warmup, 1))
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def bits(showo):
    """Return the sum of all weights' bits, the same number wherever the weights are the same."""
    ints = {2: torch.int16, 4: torch.int32}
    return sum(p.detach().view(ints[p.element_size()]).sum(dtype=torch.int64).item()
               for p in showo.parameters())


def settings_of(args, examples, reward, held_out, eval_reward, trainer) -> dict:
    """Return what a run depends on: its flags, without the passwords of URLs, and what they name:
    its prompts and weights."""
    # a resumed run needs the base for adapters and for the KL only; it may be gone
    if trainer and not (args.lora or args.kl and args.kl_beta):
        base = trainer["args"].get("weights of the base")
    else:
        base = fingerprint(args.ckpt or args.model)
    return {**vars(args), "reward": reward.spec, "eval_reward": eval_reward.spec,
            "number of processes": processes.world(), "texts of the prompts": digest(examples),
            "texts of the evaluation's prompts": digest(held_out),
            "weights of the base": base}


def describe_run(args, settings, examples, showo, magvit, trainer, out) -> str:
    """Return what a run prints at its start."""
    n_processes = settings["number of processes"]
    n = args.prompts_per_step * n_processes
    lines = [describe(showo, magvit, [e["prompt"] for e in examples]),
             f"{n_processes} x {showo.device.type}; {len(examples)} prompts; {flags.typed()}",
             f"one step: {n} prompts x {args.group_size} = {n * args.group_size} pictures, x "
             f"{len(loss_iterations(0, args))} of {args.unmask_steps} iterations; output in {out}"]
    if trainer and (changed := run.changes(trainer["args"], settings)):
        lines.append(f"changed since: {changed}")
    return "\n".join(lines)


def row_of_step(step, groups, adv, numbers, n_again, times, args) -> dict:
    """Return a row of metrics.jsonl, over all processes."""
    s_rollout, s_reward, s_update = (b - a for a, b in itertools.pairwise(times))
    rewards = {name: all_cat(r) for name, r in groups.rewards.items()}      # (P of all, G)
    return {"step": step + 1, "reward_mean": rewards["reward"].nanmean().item(),
            "reward_std": rewards["reward"].std(1).nanmean().item(), "resampled": n_again,
            "adv_zero": (all_cat(adv.nan_to_num(0)) == 0).float().mean().item(),
            **{name: r.nanmean().item() for name, r in rewards.items()}, **numbers,
            "lr": learning_rate(step, args), "s_rollout": s_rollout, "s_reward": s_reward,
            "s_update": s_update,
            "images_per_s": rewards["reward"].numel() / (times[-1] - times[0]),
            "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30}        # 0 on a CPU


def in_vain(bad_steps, row, reward, out):
    """Return the line that ends a run, if its last bad_steps steps were not taken and a judge gave
    no score in a form that is read, or they are 20. row: of metrics.jsonl, of the last one."""
    no_score = bad_steps > 0 and math.isnan(row["reward_mean"])
    unread = all_lists([getattr(reward, "unread", "")]) if no_score else []     # each process's
    if any(unread):
        unread = next(filter(None, unread))
        return f"no picture of the step has a score. A judge's answer that was not read: {unread!r}"
    if bad_steps < 20:
        return None
    if no_score:
        why, what = "no score", "see what the reward answers, then go on with --resume"
    else:
        why, what = "not finite", "with a smaller --lr"
    return f"20 steps in a row were not taken ({why}): go on from a checkpoint in {out}, {what}"


def main():
    args = parse_args()
    rank, world_size, device = processes.setup(args.device)
    out, folder, lock = run.open_run(args)          # held as long as the name lives
    trainer = run.load_trainer(folder, args) if folder else None
    examples, reward, held_out, eval_reward = load_task(args, device)
    showo, magvit, reference, optimizer = load_policy(args, device, folder, trainer)
    sample_filter = SampleFilter(warmup=48)         # three steps of 16 prompts
    settings = settings_of(args, examples, reward, held_out, eval_reward, trainer)
    facts = {k: v for k, v in settings.items() if k not in run.FREE}
    processes.demand_equal(**{"flags or prompts": facts}, weights=bits(showo))

    start, evaluated = run.begin(out, trainer, sample_filter)
    log, stop = run.Log(out, settings, start), run.StopSignal()
    if rank == 0:       # prompts may be many
        log.say(describe_run(args, settings, examples, showo, magvit, trainer, out))
    P, unsaved, bad_steps, row = args.prompts_per_step, False, 0, {}
    to_save = (showo, optimizer, sample_filter, settings, stop)
    try:
        for step in range(start, args.steps + 1):       # the last pass only saves and evaluates
            stop.check()
            last = step == args.steps
            # first of all: what comes next may fail, or take longer than a stop has time
            if unsaved and (last or args.save_every and step % args.save_every == 0):
                run.save(out, step, *to_save)
                unsaved = False
            if ending := in_vain(bad_steps, row, reward, out):
                raise processes.Ended(ending)
            due = args.eval_every and (last or step % args.eval_every == 0)
            if due and not (step == start and evaluated):
                log.evaluation(evaluate(step, held_out, args, showo, magvit, eval_reward, out,
                                        stop))
            if last:
                break

            # the groups of this step; slots and keys are numbered over all processes
            times, n_again = [processes.now(device)], 0
            first = (step * world_size + rank) * P
            chosen = [example_at(first + i, examples, args.seed) for i in range(P)]
            keys = [(args.seed, step, rank * P + i, 0) for i in range(P)]       # 0: first attempt
            prompt, traj = stop.call(sample_groups, chosen, keys, args, showo)      # Eq. 1-9
            times.append(processes.now(device))
            rewards = stop.call(score_groups, chosen, traj, magvit, reward)         # (P, G) each
            groups = Groups(chosen, keys, prompt, traj, rewards)
            if args.filter_low:                                                     # Sec. 3.3
                n_again = sample_again(groups, sample_filter, args, showo, magvit, reward, stop)
            times.append(processes.now(device))

            adv = advantages(groups, reward.weights)                                # Eq. 12, (B,)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            numbers = update(groups, adv, loss_iterations(step, args), args, showo, reference,
                             optimizer)                                             # Eq. 10
            times.append(processes.now(device))
            unsaved = unsaved or bool(numbers["taken"])
            bad_steps = 0 if numbers["taken"] else bad_steps + 1
            row = row_of_step(step, groups, adv, numbers, n_again, times, args)
            log.step(row)
    except processes.Ended as end:
        # a signal, a reward that fails, 20 steps in vain: what has been learnt is kept
        stop.saving = True
        if unsaved:
            run.save(out, step, *to_save)
        if isinstance(end.code, int):
            log.say(f"stopped by a signal after step {step}; go on with --resume --out {out}")
        log.close()
        processes.barrier()     # torchrun kills the others as soon as one ends
        raise
    log.close()
    log.say(f"plot it: python tools/curves.py {out} --out curves.png")


if __name__ == "__main__":
    processes.run(main, "a smaller --micro-batch, --grad-checkpoint or --lora")
