"""Mask-GRPO (arXiv 2510.13418): RL for masked text-to-image models, one readable loop.

    python train.py --model shapes --recipe best --reward clip:shapes/clip     # minutes
    torchrun --nproc_per_node 8 train.py --no-kl --filter-low        # Show-o 512, Eq. 15
    torchrun --nproc_per_node 8 train.py --recipe paper              # the same with Eq. 14

One optimizer step: sample G pictures for each prompt (sample.py, Eq. 1-9), score them (reward.py),
turn rewards into advantages (grpo.py, Eq. 12), maximize Eq. 10 over the T unmasking iterations.

Departures from the paper:
- the default transition is p2 (Eq. 15), which the released training really computes;
- Eq. 14's min(cs_t) is the rollout's, see sample.py; a subset of the iterations is averaged over
  its own number, not over T;
- a group still under the filter's bar after --max-resample re-samplings is used;
- a step in which something is not finite is skipped by all processes;
- LAION captions cannot be shipped: prompts/train.txt holds captions of our own making;
- later work's, off by default: --adv mean, --ratio mean (the KL is then of the mean token, too),
  --trajectory forward, --guidance, --confidence random, --lora.
Departures from the released training:
- released: Eq. 13's loss feeds every sampled token back into the next state, so that from t = 1 on
  nothing is masked in it, and Eq. 14's minimum is that of the token of the least NOISY confidence;
  here: the rollout's states, and the minimum;
- released: the loss is divided by T once more, and the first step's learning rate is 0; here: no;
- released: gradients are not averaged over processes, nor clipped; here: both (to norm 1);
- released: no weight decay on biases and 1-D weights; here: on all;
- released: a cosine after the warm-up; here: the product of both (at most 5.9% of the peak apart);
- released: fp16; here: bf16 autocast, float32 weights.

Random numbers are functions of (seed, step, prompt slot): a run is the same when it is resumed, and
on any number of processes that take as many prompts a step, but for the last digits of sums: over
other processes, and on a GPU by the order in which its kernels add.
"""
import contextlib
import importlib.util
import math
import os
import random
import time
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

import checkpoint
import common
import shapes
from checkpoint import InputError, is_shapes
from common import all_cat, all_sum, in_range
from eval_geneval import check_example, geneval_prompts, is_geneval, verdicts
from grpo import SampleFilter, clipped_objective, group_advantages, kl_k3
from model import BaseOf, describe, load_models, to_uint8
from reward import Reward, make_reward, uses_geneval
from sample import Trajectory, forward_trajectory, generate, rollout, transition_log_prob

PRESETS = {
    "showo": dict(steps=1000, group_size=6, prompts_per_step=2, unmask_steps=50, lr=3e-6, warmup=62,
                  weight_decay=0.02, micro_batch=6, filter_warmup=50, reward="clip", eval_every=0,
                  eval_n=1, eval_unmask_steps=50, eval_guidance=[5.0], sample_every=50,
                  save_every=100),
    "shapes": dict(steps=45, group_size=8, prompts_per_step=16, unmask_steps=12, lr=7e-4, warmup=3,
                   weight_decay=0.0, micro_batch=256, filter_warmup=48, reward="geneval:exact",
                   eval_every=15, eval_n=8, eval_unmask_steps=12, eval_guidance=[0.0],
                   sample_every=15, save_every=15)}
RECIPES = {
    "paper": dict(kl=False, filter_low=True, transition="p1"),             # Sec. 3.2, 3.3
    "best": dict(kl=False, filter_low=True, ratio="mean"),              # results/experiments
    "udm": dict(trajectory="forward", ratio="mean", group_size=8, unmask_steps=10, loss_steps=3,
                loss_steps_from="early", lr=1e-6, lr_schedule="constant", kl_beta=0.05,
                reward="geneval:partial", eval_unmask_steps=25, eval_guidance=[0.0])}
                                                    # UDM-GRPO, arXiv 2604.18518, its URSA config


def parse_args():
    """Return the flags, with the defaults of --model and --recipe filled in."""
    p = common.Parser("Train a masked text-to-image model with Mask-GRPO. Defaults for "
                      "--model shapes differ; all flags are printed at the start.")
    whole, positive, at_least_0 = in_range(int, 0), in_range(int, 1), in_range(float, 0)
    add = p.add_argument_group("what").add_argument
    common.add_model_flags(add)
    add("--prompts", help="txt, or jsonl with metadata (default: prompts/train.txt)")
    add("--reward", help="see reward.py: clip, geneval:exact, or a weighted sum")
    add("--reward-timeout", type=in_range(float, 0.1, 1e6), default=120.0,
        help="seconds for a server's answer")
    add("--reward-patience", type=in_range(float, 0, 1e6), default=300.0,
        help="seconds to ask a server again")
    add("--out", help="output folder (default: a new one under runs/)")
    add("--resume", nargs="?", const="auto", help="the newest checkpoint in --out, or this one")
    add("--seed", type=in_range(int, 0, 2 ** 31), default=42)

    add = p.add_argument_group("the method").add_argument
    add("--recipe", choices=list(RECIPES), help="paper: --no-kl --filter-low --transition p1; best:"
        " --no-kl --filter-low --ratio mean, by the tiny base; udm: UDM-GRPO's; flags win")
    add("--steps", type=positive, help="optimizer steps with fresh rollouts")
    add("--group-size", type=in_range(int, 2, 4096), help="G, pictures per prompt")
    add("--prompts-per-step", type=positive, help="per process")
    add("--unmask-steps", type=positive, help="T while training (fewer: unmasking reduction)")
    add("--transition", choices=["p1", "p2", "ar"], default="p2", help="Eq. 14, 15 or 13")
    add("--trajectory", choices=["rollout", "forward"], default="rollout",
        help="forward: the action at random re-maskings is the final picture (UDM-GRPO)")
    add("--adv", choices=["std", "mean"], default="std", help="Eq. 12, or undivided (Dr. GRPO)")
    add("--ratio", choices=["sum", "mean"], default="sum", help="Eq. 11, or of a token (GSPO)")
    add("--clip-low", type=in_range(float, 0, 1), default=0.9, help="1 - e_low")
    add("--clip-high", type=in_range(float, 1), default=1.2, help="1 + e_high")
    add("--kl", action=BooleanOptionalAction, default=True, help="no: no reference in memory")
    add("--kl-beta", type=at_least_0, default=0.01, help="beta of Eq. 10")
    add("--filter-low", action=BooleanOptionalAction, default=False,
        help="sample a group again when its reward std is low (Sec. 3.3)")
    add("--filter-percentile", type=in_range(float, 0, 100), default=10.0, help="of past stds")
    add("--filter-warmup", type=positive, help="groups to see before the filter acts")
    add("--max-resample", type=in_range(int, 1, 100), default=1, help="re-samplings of a group")
    add("--loss-steps", type=positive, help="computational reduction (default: all T)")
    add("--loss-steps-from", choices=["first", "last", "random", "early"], default="first",
        help="early: consecutive ones, the first of them 0, 1 or 2 (UDM-GRPO)")
    add("--guidance", type=at_least_0, default=0.0,
        help="of rollouts; log-probabilities are of the conditional policy")
    add("--confidence", choices=["probability", "random"], default="probability",
        help="random: positions unmask in random order (MaskGRPO)")
    add("--inner-epochs", type=in_range(int, 1, 100), default=1, help="on the same rollouts")

    add = p.add_argument_group("optimizer").add_argument
    add("--lr", type=at_least_0, help="peak; the paper: 3e-6 without KL, 5e-6 with it")
    add("--warmup", type=whole, help="linear warm-up steps")
    add("--lr-schedule", choices=["cosine", "constant"], default="cosine", help="after it")
    add("--weight-decay", type=at_least_0)
    add("--max-grad-norm", type=at_least_0, default=1.0, help="0 = no clipping")
    add("--micro-batch", type=positive, help="pictures per forward pass; memory only")
    add("--grad-checkpoint", action="store_true", help="less memory, a third more work")
    add("--lora", type=positive, metavar="RANK", help="train adapters alone (pip install peft)")
    add("--zero", action="store_true", help="shard the optimizer state over processes (ZeRO-1)")

    add = p.add_argument_group("watching").add_argument
    add("--eval-every", type=whole, help="steps between evaluations, 0 = none")
    add("--eval-n", type=positive, help="pictures per evaluation prompt")
    add("--eval-unmask-steps", type=positive, help="T when evaluating")
    add("--eval-guidance", type=at_least_0, nargs="+", help="columns of the second one end in @G")
    add("--eval-reward", help="other rewards to evaluate beside it, as --reward")
    add("--best", metavar="COLUMN", help="keep checkpoint-best, by a column of eval.jsonl")
    add("--eval-prompts", help="as --prompts (default: shapes' held-out ones, prompts/eval.txt)")
    add("--sample-every", type=whole, help="steps between grids, 0 = none")
    add("--save-every", type=whole, help="steps between checkpoints, 0 = only the last")
    add("--keep-last", type=whole, default=0, help="checkpoints, 0 = all")
    add("--max-bad-steps", type=positive, default=20, help="skipped steps that end a run")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")

    p.set_defaults(**PRESETS["showo"])
    chosen, _ = p.parse_known_args()
    preset = PRESETS["shapes" if is_shapes(chosen.model) else "showo"]
    p.set_defaults(**preset | RECIPES.get(chosen.recipe, {}))
    args = p.parse_args()
    check_flags(p, args)
    return args


def check_flags(p, args):
    """End the program with one line when flags do not fit each other."""
    if args.loss_steps and args.loss_steps > args.unmask_steps:
        p.error(f"--loss-steps {args.loss_steps} is more than --unmask-steps {args.unmask_steps}")
    if args.transition == "p1" and args.trajectory == "forward":
        p.error("--trajectory forward trains Eq. 13 on the final picture; leave --transition out")
    if args.transition == "p1" and (args.guidance or args.confidence == "random"):
        p.error("--transition p1: Eq. 14's threshold is that of a policy sampled without guidance,"
                " by confidence; take p2")
    if args.best and not args.eval_every:
        p.error("--best needs --eval-every, the steps between evaluations")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        p.error("--wandb needs the package: pip install wandb")
    if args.lora and importlib.util.find_spec("peft") is None:
        p.error("--lora needs the package: pip install peft")
    if args.zero and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--zero shards over processes: start with torchrun --nproc_per_node N")
    if args.resume == "":
        p.error("--resume is empty; give a checkpoint folder, or nothing after it")
    if args.resume == "auto" and not args.out:
        p.error("--resume without a checkpoint needs --out, the folder of the run to continue")


# ------------------------------------------------------------------------------ rollouts

@dataclass
class Batch:
    """The rollouts of a step on this process: P groups of G pictures, B = P * G rows, the rows of a
    group together."""
    examples: list[dict]        # P entries of the prompt file
    traj: Trajectory            # of B rows
    rewards: torch.Tensor       # Float (P, G)
    parts: dict                 # every part of the reward on its own, Float (P, G)
    fault: str | None = None    # why there are no rewards

    def replace(self, groups, other):
        """Put the groups of another batch in the place of some of this one."""
        G = self.rewards.shape[1]
        self.traj[[i * G + j for i in groups for j in range(G)]] = other.traj
        self.rewards[groups] = other.rewards
        self.fault = self.fault or other.fault
        for name, part in other.parts.items():
            self.parts[name][groups] = part


def generator(device, *key):
    """Return a random state that depends on the key alone."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def example_at(slot, examples, seed):
    """Return the example in a slot of the run: a new shuffle whenever all have had their turn."""
    epoch, place = divmod(slot, len(examples))
    order = torch.randperm(len(examples), generator=generator("cpu", seed, "prompts", epoch))
    return examples[order[place]]


def sample_and_score(examples, keys, args, showo, magvit, reward, clock) -> Batch:
    """Roll out G pictures of each example (Eq. 1-9), decode and score them.

    keys: what the random numbers of each group depend on."""
    G, chunk, trajs = args.group_size, max(1, args.micro_batch // args.group_size), []
    for i in range(0, len(examples), chunk):
        prompt = showo.encode([e["prompt"] for e in examples[i:i + chunk]]).repeat(G)
        generators = [generator(showo.device, *key) for key in keys[i:i + chunk]]
        with clock("rollout"), torch.no_grad(), showo.autocast():
            trajs.append(rollout(showo.policy(prompt, args.guidance), len(prompt), showo.N, showo.K,
                                 args.unmask_steps, generator=generators,
                                 confidence=args.confidence,
                                 keep_sampled=args.transition == "ar"))
    traj = Trajectory.cat(trajs)

    with clock("decode"), torch.no_grad():
        images = to_uint8(magvit.decode(traj.codes))
    with clock("reward"):
        asked, fault = [e for e in examples for _ in range(G)], None
        try:
            rewards = reward(images, [e.get("reward_prompt", e["prompt"]) for e in asked], asked)
        except InputError as error:     # of a server; all processes learn of it after the step
            rewards, fault = torch.full((len(asked),), math.nan), str(error)
    parts = {name: part.view(-1, G).to(showo.device) for name, part in reward.log.items()}
    return Batch(examples, traj, rewards.view(-1, G).to(showo.device), parts, fault)


def collect(step, examples, args, showo, magvit, reward, sample_filter, clock):
    """Sample and score the groups of a step; with --filter-low, those of low reward std once more
    (Sec. 3.3) -> the Batch, and how many groups all processes sampled again.

    All processes judge all groups by one history, and so agree on when to stop."""
    P = len(examples)
    first = P * common.get_rank()           # prompt slot, in this step, of this process's first one
    models = (args, showo, magvit, reward, clock)
    keys = [(args.seed, step, first + i, 0) for i in range(P)]
    batch, n_resampled = sample_and_score(examples, keys, *models), 0

    if args.filter_low:
        low = ~sample_filter.keep(all_cat(batch.rewards.std(1)).cpu())      # of all processes
        for attempt in range(1, args.max_resample + 1):
            if not low.any():
                break
            again = low[first:first + P].nonzero()[:, 0].tolist()
            if again:
                keys = [(args.seed, step, first + i, attempt) for i in again]
                new = sample_and_score([examples[i] for i in again], keys, *models)
                batch.replace(again, new)
            n_resampled += int(low.sum())
            std = all_cat(batch.rewards.std(1)).cpu()
            judged = low.nonzero()[:, 0]
            low[judged] = ~sample_filter.keep(std[judged])

    if args.trajectory == "forward":
        generators = [generator(showo.device, args.seed, step, first + i, "forward")
                      for i in range(P)]
        nonfinite = batch.traj.threshold.isnan().any(1)
        batch.traj = forward_trajectory(batch.traj.codes, args.unmask_steps, generators)
        batch.traj.threshold[nonfinite] = math.nan
    return batch, n_resampled


# ------------------------------------------------------------------------------ the update

def loss_iterations(step, args):
    """Return the iterations that Eq. 10 sums over: all T, or a subset (Sec. 3.3, computational
    reduction). update() divides by their number, so that a random subset's gradient is unbiased."""
    T, n = args.unmask_steps, args.loss_steps or args.unmask_steps
    if args.loss_steps_from == "random":
        return sorted(random.Random(repr((args.seed, step, "iterations"))).sample(range(T), n))
    if args.loss_steps_from == "early":
        start = random.Random(repr((args.seed, step, "iterations"))).randrange(min(3, T - n + 1))
        return list(range(start, start + n))
    return list(range(T - n, T) if args.loss_steps_from == "last" else range(n))


def move_log_prob(showo, prompt, traj, t, kind):
    """Do a forward pass on state t, and return transition_log_prob (Eq. 13-15), Float[b], and the
    logits that it read, Float[b, M, K], those of the newly unmasked first."""
    positions = traj.positions(t, kind)                                         # (b, M)
    logits = showo.logits(traj.state(t, showo.K), prompt, positions=positions)  # (b, M, K)
    codes, order = traj.codes.gather(1, positions), traj.order.gather(1, positions)
    sampled = traj.sampled[t].gather(1, positions) if kind == "ar" else None
    logp = transition_log_prob(logits, codes, order, t, kind, threshold=traj.threshold,
                               sampled=sampled)
    return logp, logits


def update(step, batch, args, showo, reference, optimizer) -> dict:
    """Maximize Eq. 10 on one batch of rollouts, --inner-epochs times -> numbers for the log.

    J = mean over rows j and iterations t of min(r A, clip(r) A) - beta KL, over the groups of all
    processes. reference: a frozen Showo, None = no KL. When a reward, log-probability or gradient
    of any process is not finite, none takes that step, nor another one on these rollouts."""
    # forward: the action is the whole final picture, so that all masked positions count
    kind = "ar" if args.trajectory == "forward" else args.transition
    iterations = loss_iterations(step, args)
    prompt = showo.encode([e["prompt"] for e in batch.examples]).repeat(args.group_size)
    adv = group_advantages(batch.rewards, args.adv).flatten()                   # (B,)  Eq. 12
    rows_with_gradient = adv.nonzero()[:, 0]    # A = 0 has none without a KL, but counts in n_terms
    if reference:
        rows_with_gradient = torch.arange(len(adv), device=adv.device)
    logp_old = adv.new_zeros(args.unmask_steps, len(adv))                       # (T, B)
    n_terms = len(adv) * common.get_world() * len(iterations)                   # of Eq. 10's mean
    nonfinite = ~batch.rewards.isfinite().flatten() | batch.traj.threshold.isnan().any(1)   # (B,)
    skipped = all_sum(nonfinite.sum()).item() > 0
    norm, kl, stats = torch.tensor(math.nan), adv.new_zeros(()), []

    for epoch in range(0 if skipped else args.inner_epochs):
        for rows in rows_with_gradient.split(args.micro_batch):
            if not len(rows):
                continue
            traj = batch.traj[rows]
            # the text is computed once for all t; its summed gradient goes on as this block ends
            with showo.shared_text(prompt[rows]) as prefilled:
                prefilled_ref = reference.prefill(prompt[rows]) if reference else None
                for t in iterations:
                    logp, logits = move_log_prob(showo, prefilled, traj, t, kind)   # Eq. 13-15
                    if epoch == 0:      # the weights are still those that sampled: the ratio is 1
                        logp_old[t, rows] = logp.detach()
                    length = logits.shape[1] if args.ratio == "mean" else 1
                    objective = clipped_objective(                              # Eq. 10, 11
                        logp, logp_old[t, rows], adv[rows], args.clip_low, args.clip_high, length)
                    if reference:
                        logp_ref, _ = move_log_prob(reference, prefilled_ref, traj, t, kind)
                        kl = kl_k3(logp / length, logp_ref / length)
                        objective = objective - args.kl_beta * kl               # Eq. 10
                    loss = -objective * len(rows) / n_terms
                    with torch.autocast(adv.device.type, enabled=False):
                        loss.backward()

                    nonfinite[rows] |= nonfinite_rows(logp, loss)
                    log_ratio = (logp - logp_old[t, rows]) / length
                    newly_unmasked = logits[:, :traj.n_unmask(t)]
                    stats.append(move_stats(log_ratio, newly_unmasked, kl, args))
        norm, skipped = optimizer_step(showo, optimizer, args.max_grad_norm, nonfinite)
        if skipped:
            break

    bad = nonfinite.view(len(batch.examples), -1).any(1).nonzero()[:, 0].tolist()
    bad_prompts = common.all_lists([batch.examples[i]["prompt"] for i in bad]) if skipped else []
    return {"skipped": int(skipped), "bad_prompts": bad_prompts,
            **mean_stats(stats, norm, adv.device)}


def nonfinite_rows(logp, loss):
    """Return Bool[b]: rows whose log-probability is not finite; all, if only the loss is not."""
    bad = ~logp.detach().isfinite()
    return bad | (~loss.detach().isfinite() & ~bad.any())


def optimizer_step(showo, optimizer, max_norm, nonfinite):
    """Add up the gradients of all processes, clip them and take the step, unless something is not
    finite on any -> the norm before clipping, and whether the step was skipped."""
    params = list(showo.trainable().values())
    for p in params:
        p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm or math.inf)
    skipped = all_sum(nonfinite.sum()).item() > 0 or not norm.isfinite()
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


@torch.no_grad()
def move_stats(log_ratio, logits, kl, args):
    """Return, of one pass, sums over rows and newly unmasked positions and the largest ratio."""
    ratio = log_ratio.exp()
    logp = torch.log_softmax(logits.float(), -1)
    return torch.stack([x.float() for x in (
        torch.ones_like(ratio).sum(), ratio.sum(), (log_ratio.expm1() - log_ratio).sum(),
        ((ratio < args.clip_low) | (ratio > args.clip_high)).sum(), kl * len(ratio),
        torch.ones_like(logp[..., 0]).sum(), -(logp.exp() * logp).sum(), ratio.amax())])


def mean_stats(stats, norm, device) -> dict:
    """Return means over the passes of all processes. Without any (every advantage is 0 and there is
    no KL), the ratio is 1."""
    stats = torch.stack(stats) if stats else torch.zeros(1, 8, device=device)
    n, ratio, approx_kl, clipped, kl, n_tokens, entropy = all_sum(stats[:, :7].sum(0)).tolist()
    ratio_max = all_cat(stats[:, 7].amax()[None]).amax().item()
    return {"grad_norm": norm.item() if n else math.nan,
            "ratio_mean": ratio / n if n else 1.0, "ratio_max": ratio_max if n else 1.0,
            "approx_kl": approx_kl / max(n, 1), "clip_fraction": clipped / max(n, 1),
            "kl_ref": kl / max(n, 1), "entropy": entropy / n_tokens if n_tokens else math.nan}


# ------------------------------------------------------------------------------ evaluation

@dataclass
class Judges:
    """What scores the pictures of an evaluation."""
    reward: Reward                  # of training
    detector: object                # GenEval's verdicts are "overall"; None = the reward is
    others: Reward | None = None    # evaluated beside it
    fault: str | None = None        # why there were no scores

    @property
    def names(self):
        """The columns that scores() fills."""
        own = ["overall"] if not self.detector else ["overall", "exact", "objects", "objects_asked"]
        return own + [name for name, _, _ in self.others.parts] if self.others else own

    def scores(self, examples, images) -> dict:
        """Return the values of pictures, Float[B] each; NaN, and a fault, where a server fails."""
        try:
            return self._scores(examples, images)
        except InputError as error:
            self.fault = str(error)
            return {name: torch.full((len(images),), math.nan) for name in self.names}

    def _scores(self, examples, images):
        prompts = [e.get("reward_prompt", e["prompt"]) for e in examples]
        if self.detector:
            values = verdicts(examples, self.detector(images, examples))
        else:
            values = {"overall": self.reward(images, prompts, examples)}
        if self.others:
            self.others(images, prompts, examples)
            values |= {name: self.others.log[name] for name, _, _ in self.others.parts}
        return values


def evaluate(step, examples, args, showo, magvit, judges) -> dict:
    """Draw and score --eval-n pictures of each example, with the same noise each time -> a row of
    eval.jsonl, for every --eval-guidance.

    Examples are shared out over the processes. overall and exact are means over tags, each the
    share of right pictures, as GenEval has it."""
    row = {"step": step}
    for i, guidance in enumerate(args.eval_guidance):
        suffix = f"@{guidance:g}" if i else ""
        numbers = evaluate_at(guidance, examples, args, showo, magvit, judges)
        row |= {name + suffix: value for name, value in numbers.items()}
    return row


def evaluate_at(guidance, examples, args, showo, magvit, judges) -> dict:
    """Return the numbers of one guidance; see evaluate()."""
    mine = list(range(common.get_rank(), len(examples), common.get_world()))
    values = {name: torch.zeros(len(examples), device=showo.device) for name in judges.names}
    if mine:
        images = generate(showo, magvit, [examples[i]["prompt"] for i in mine], n=args.eval_n,
                          T=args.eval_unmask_steps, guidance=guidance, seeds=mine,
                          batch=args.micro_batch)
        asked = [examples[i] for i in mine for _ in range(args.eval_n)]
        scores = judges.scores(asked, images)
        for name in values:
            values[name][mine] = scores[name].view(len(mine), -1).mean(1).to(showo.device)
    values = {name: all_sum(value).cpu() for name, value in values.items()}

    rows_of = {}
    for i, example in enumerate(examples):
        rows_of.setdefault(example.get("tag"), []).append(i)
    by_tag = {tag: values["overall"][rows].mean().item() for tag, rows in rows_of.items()}
    numbers = {"overall": sum(by_tag.values()) / len(by_tag)}
    numbers |= {tag: value for tag, value in by_tag.items() if tag}
    for name, value in values.items():
        if name == "exact":
            exact = [value[rows].mean().item() for rows in rows_of.values()]
            numbers[name] = sum(exact) / len(exact)
        elif name != "overall":
            numbers[name] = value.mean().item()
    return numbers


def picture_grid(path, examples, args, showo, magvit, judges):
    """Draw fixed evaluation prompts at evaluation settings, score and prompt under each picture
    (no score where the reward needs metadata that the prompts lack)."""
    prompts = [e["prompt"] for e in examples]
    images = generate(showo, magvit, prompts, T=args.eval_unmask_steps,
                      guidance=args.eval_guidance[0], batch=args.micro_batch)
    captions = prompts
    if not uses_geneval(args.reward) or all(map(is_geneval, examples)):
        scores = judges.scores(examples, images)["overall"].tolist()
        captions = [f"{score:.3g} | {text}" for score, text in zip(scores, prompts, strict=True)]
    path.parent.mkdir(exist_ok=True)
    common.grid(images, captions, min(6, len(examples))).save(path)


# ------------------------------------------------------------------------------ the run

class Clock:
    """Seconds by part, of a step and of the run: with clock("rollout"): ..."""

    def __init__(self, device):
        self.device, self.step, self.total = device, {}, {}

    @contextlib.contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.step[part] = self.step.get(part, 0.0) + seconds
        self.total[part] = self.total.get(part, 0.0) + seconds


def load_examples(args):
    """Return training and evaluation examples. Raises InputError for a bad file, or metadata that
    is missing."""
    here, tiny, sets = Path(__file__).parent, is_shapes(args.model), []
    geneval = uses_geneval(args.reward) or uses_geneval(args.eval_reward or "")
    for split, path in (("train", args.prompts), ("eval", args.eval_prompts)):
        if tiny and not path:
            examples = shapes.prompts(split)
        elif split == "eval" and geneval and not path:
            examples = geneval_prompts()[::9]       # 62 of the 553, of all tags
        else:
            examples = common.read_prompts(path or here / f"prompts/{split}.txt")
        evaluated = tiny or (geneval and args.eval_every)
        if evaluated if split == "eval" else uses_geneval(args.reward):
            flag = "--prompts" if split == "train" else "--eval-prompts"
            for number, example in enumerate(examples, 1):
                check_example(example, f"{flag} {path}: prompt {number}", tiny)
        sets.append(examples)
    return sets


def load_policy(args, device, folder, resumed):
    """Load the policy, its image tokenizer, and the frozen reference of the KL (None without one).

    folder: the checkpoint to continue. Raises InputError."""
    weights = args.ckpt if args.lora else folder or args.ckpt   # adapters are in trainer.pt
    showo, magvit = load_models(args.model, ckpt=weights, vq=args.vq, tokenizer=args.tokenizer,
                                device=device)
    if args.lora:
        torch.manual_seed(args.seed)
        showo.add_lora(args.lora)
        if resumed:
            adapters, own = resumed.get("lora"), showo.trainable()
            if not isinstance(adapters, dict) or adapters.keys() != own.keys() or any(
                    getattr(adapters[name], "shape", None) != p.shape for name, p in own.items()):
                raise InputError("--resume: the adapters in trainer.pt do not fit --lora")
            showo.load_state_dict(adapters, strict=False)
    if common.choose_dtype(args.dtype, device) == torch.bfloat16:
        showo.compute_in(torch.bfloat16)
    showo.grad_checkpoint = args.grad_checkpoint
    reference = None
    if args.kl and args.kl_beta and args.lora:
        reference = BaseOf(showo)
    elif args.kl and args.kl_beta:
        reference, _ = load_models(args.model, ckpt=args.ckpt, vq=args.vq,
                                   tokenizer=args.tokenizer, device=device)
        reference.requires_grad_(False).compute_in(showo.compute_dtype)
    return showo, magvit, reference


def make_optimizer(args, showo, resumed):
    """Return AdamW over all weights, its state in shards with --zero, restored on a resume."""
    settings = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                    # fused AdamW wants its steps on the GPU, where ZeRO does not load them
                    fused=showo.device.type == "cuda" and not args.zero)
    params = list(showo.trainable().values())
    if args.zero:
        optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **settings)
    else:
        optimizer = torch.optim.AdamW(params, **settings)
    if resumed:
        checkpoint.check_state(resumed, optimizer)
        optimizer.load_state_dict(resumed["optimizer"])
        for group in optimizer.param_groups:
            group["weight_decay"] = args.weight_decay       # as the flag says now
    return optimizer


def is_sound(showo, T) -> bool:
    """Return whether parameters, and a picture rolled out with them, are finite."""
    with torch.no_grad(), showo.autocast():
        policy = showo.policy(showo.encode([""]))
        traj = rollout(policy, 1, showo.N, showo.K, T, generator=generator(showo.device, "sound"))
        finite = [p.isfinite().all() for p in showo.trainable().values()]
    return bool(torch.stack(finite).all()) and not bool(traj.threshold.isnan().any())


def load_judges(args, device) -> Judges:
    """Load the reward of training and what evaluation needs beside it, with one GenEval detector
    for all; then args' rewards have no passwords. Raises InputError."""
    detector = shapes.detect if is_shapes(args.model) else None
    how = dict(device=device, finite=False, timeout=args.reward_timeout,
               patience=args.reward_patience)
    reward = make_reward(args.reward, detector=detector, **how)
    detector = detector or reward.detector
    others = None
    if args.eval_reward:
        others = make_reward(args.eval_reward, detector=detector, **how)
        args.eval_reward = common.without_passwords(args.eval_reward)
    args.reward = common.without_passwords(args.reward)
    return Judges(reward, detector, others)


def is_best(row, out, args) -> bool:
    """Return whether an evaluation is the best of the run by --best. Raises InputError."""
    if not args.best:
        return False
    if args.best not in row:
        raise InputError(f"--best {args.best}: no column of eval.jsonl; there are {', '.join(row)}")
    rows = common.on_rank_0(checkpoint.read_rows, out / "eval.jsonl")
    best = max((r[args.best] for r in rows if r.get(args.best) is not None), default=math.inf)
    return row[args.best] >= best


def save_checkpoint(step, folder, args, showo, optimizer, sample_filter, n_bad):
    """Save on process 0 while the others wait. Raises InputError on all when it cannot, when the
    policy is no longer sound, or a process no longer holds the parameters of process 0."""
    if not common.on_rank_0(is_sound, showo, args.unmask_steps):
        raise InputError(f"the policy after step {step} is not finite and is not saved; "
                         f"{checkpoint.last_one(folder.parent)}: go back with --resume and a "
                         "smaller --lr")
    params = showo.trainable()
    checksum = sum(p.detach().view(torch.int32).sum(dtype=torch.int64) for p in params.values())
    checksums = all_cat(checksum[None]).tolist()
    off = [str(rank) for rank, value in enumerate(checksums) if value != checksums[0]]
    if off:
        raise InputError(f"process {', '.join(off)} of {len(checksums)} no longer holds the "
                         "parameters of process 0; look at the memory and the links of its "
                         "machine, and go back to a checkpoint with --resume")
    if args.zero:
        optimizer.consolidate_state_dict(to=0)
    trainer = None
    if common.get_rank() == 0:
        trainer = {"step": step, "args": vars(args), "world": common.get_world(), "n_bad": n_bad,
                   "optimizer": optimizer.state_dict(), "filter": sample_filter.state_dict(),
                   "lora": params if args.lora else {}}
    common.on_rank_0(checkpoint.save, folder, showo, trainer, args.keep_last)


def learning_rate(step, args):
    """Return the linear warm-up times a cosine from the first step to 0 at the last, or 1."""
    warmup, decay = min(1, (step + 1) / max(args.warmup, 1)), 1.0
    if args.lr_schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * warmup * decay


def first_lines(args, out, showo, magvit, n_examples) -> str:
    """Return what a run says at its start: models, devices, the sizes of a step, all flags."""
    world = common.get_world()
    per_step, n_iterations = args.prompts_per_step * world, len(loss_iterations(0, args))
    n_images = per_step * args.group_size
    notices = []
    if args.kl and args.transition == "p1":
        notices.append("notice: with p1 the KL can jump, see grpo.kl_k3")
    if showo.device.type == "cpu" and torch.get_num_threads() > 1 and os.getloadavg()[0] > 1.5:
        notices.append("notice: other work keeps these cores busy; OMP_NUM_THREADS=1 may be ten "
                       "times as fast")
    return "\n".join((
        describe(showo, magvit),
        f"{world} x {showo.device.type}, computing in {showo.compute_dtype or torch.float32}; "
        f"{n_examples} prompts, reward {args.reward}; output in {out}",
        f"one step: {per_step} prompts x {args.group_size} = {n_images} pictures, x {n_iterations} "
        f"of {args.unmask_steps} iterations = {n_images * n_iterations} trajectory steps, over all "
        "processes",
        common.flags_line(vars(args) | {"kl": None, "no_kl": not args.kl, "recipe": None}),
        *notices))


def last_lines(out, clock, n_steps) -> str:
    """Return what a run says at its end: scores before and after, where the time went."""
    rows = checkpoint.read_rows(out / "eval.jsonl")
    table = common.before_after_table(rows) + "\n" if len(rows) > 1 else ""
    seconds = ", ".join(f"{part} {value / max(n_steps, 1):.2f}"
                        for part, value in clock.total.items() if part != "eval")
    return (f"\n{table}\nseconds per step: {seconds}; all evaluations "
            f"{clock.total.get('eval', 0):.0f} s; peak memory {common.peak_gib(clock.device):.2f} "
            f"GiB; {out}")


def step_row(step, batch, parts, n_resampled, numbers, lr, clock) -> dict:
    """Return a row of metrics.jsonl: what process 0 knows of a step, and means over all."""
    rewards = all_cat(batch.rewards)                                    # (P of all processes, G)
    return {
        "step": step + 1, "reward_mean": rewards[rewards.isfinite()].mean().item(),
        "reward_std": rewards.std(1).nanmean().item(),
        "adv_zero": (group_advantages(rewards) == 0).float().mean().item(),
        "resampled": n_resampled,
        **{name: all_cat(part).mean().item() for name, part in parts.items()},
        **numbers, "lr": lr, "images_per_s": rewards.numel() / clock.step["step"],
        **{f"s_{part}": seconds for part, seconds in clock.step.items()},
        "peak_gib": common.peak_gib(clock.device)}


def main():
    args = parse_args()
    _, _, device = common.setup(args.device)

    # what can be wrong in files is found before a model is loaded
    folder = args.resume
    if folder == "auto":
        folder = common.on_rank_0(checkpoint.newest, args.out)
    resumed = checkpoint.read_resumed(folder, args) if folder else None
    examples, eval_examples = load_examples(args)
    for name in (args.model, args.ckpt) if args.model != "shapes" else (args.ckpt,):
        if name:
            checkpoint.fetch(name, ["config", "weights"])
    judges = load_judges(args, device)
    out = common.on_rank_0(checkpoint.output_path, args)

    lock = checkpoint.Lock(out)
    try:
        common.on_rank_0(checkpoint.claim_output, args, out, lock)
        train(args, out, device, folder, resumed, examples, eval_examples, judges)
    finally:
        lock.release()


def train(args, out, device, folder, resumed, examples, eval_examples, judges):
    """Load the models and take the optimizer steps of a run, or those that it lacks."""
    rank, world, start = common.get_rank(), common.get_world(), resumed["step"] if resumed else 0

    showo, magvit, reference = load_policy(args, device, folder, resumed)
    optimizer = make_optimizer(args, showo, resumed)
    sample_filter, n_bad = SampleFilter(args.filter_percentile, args.filter_warmup), 0
    if resumed:
        sample_filter.load_state_dict(resumed["filter"])
        n_bad = resumed["n_bad"]
    if args.resume:         # all of the checkpoint is loaded: now drop what came after it
        common.on_rank_0(checkpoint.rewind, out, start if resumed else -1)

    log, stop, clock = common.Log(out, args, start), common.StopSignal(), Clock(device)
    log.say(first_lines(args, out, showo, magvit, len(examples)))
    log.say(checkpoint.resume_notice(resumed, args, world) if resumed else "")
    shown = eval_examples[::max(1, len(eval_examples) // 12)][:12]
    how, stopping, error = (args, showo, magvit, judges), False, ""

    for step in range(start, args.steps + 1):       # the last pass only looks and saves
        # evaluate, draw and save the policy of this step
        last = step == args.steps
        fresh = (step > start or not resumed) and not error
        if fresh:
            if args.eval_every and (step % args.eval_every == 0 or last):
                with clock("eval"):
                    row = evaluate(step, eval_examples, *how)
                log.evaluation(row)
                if is_best(row, out, args) and step:
                    save_checkpoint(step, out / "checkpoint-best", args, showo, optimizer,
                                    sample_filter, n_bad)
            if rank == 0 and args.sample_every and (step % args.sample_every == 0 or last):
                picture_grid(out / f"samples/step-{step:06d}.png", shown, *how)
            faults = common.all_lists([judges.fault] if judges.fault else [])
            error = faults[0] if faults else ""
            stopping = stopping or bool(error)
        to_save = last or stopping or (args.save_every and step % args.save_every == 0)
        if to_save and step > start:
            save_checkpoint(step, out / f"checkpoint-{step}", args, showo, optimizer, sample_filter,
                            n_bad)
        if last or stopping:
            break

        # one optimizer step
        clock.step = {}
        with clock("step"):
            first = (step * world + rank) * args.prompts_per_step       # prompt slot of the run
            chosen = [example_at(first + i, examples, args.seed)
                      for i in range(args.prompts_per_step)]
            batch, n_resampled = collect(step, chosen, args, showo, magvit, judges.reward,
                                         sample_filter, clock)
            lr = learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with clock("update"):
                numbers = update(step, batch, args, showo, reference, optimizer)
        # a process whose reward failed has not all of its parts
        faults = common.all_lists([batch.fault] if batch.fault else [])
        parts = {} if faults else batch.parts
        log.step(step_row(step, batch, parts, n_resampled, numbers, lr, clock))

        # what ends a run early: a server, too many skipped steps, a signal to any process
        n_bad += numbers["skipped"]
        if faults:
            error = faults[0]
        elif numbers["skipped"] and n_bad >= args.max_bad_steps:
            error = (f"{n_bad} steps had something that is not finite; look at the prompts logged "
                     "with them, a larger --max-bad-steps goes on")
        signalled = all_sum(torch.tensor(float(stop.asked > 0), device=device)).item() > 0
        stopping = signalled or bool(error)

    if error:
        saved = [f"saved: {folder}" for folder in checkpoint.checkpoints(out)]
        raise InputError(f"{error}; {(saved or ['nothing was saved before'])[-1]}, continue with "
                         f"--resume --out {out}")
    if stopping:
        log.say(f"stopped after step {step}, as a signal asked; continue with --resume --out {out}")
    if rank == 0 and (out / "samples/step-000000.png").exists():
        common.before_and_after(out / "samples")
    log.say(last_lines(out, clock, step - start))


if __name__ == "__main__":
    common.run(main)
