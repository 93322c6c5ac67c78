"""Mask-GRPO (arXiv 2510.13418): RL for masked text-to-image models, one readable loop.

    python train.py --model shapes --no-kl --filter-low --ratio mean          # minutes, two cores
    torchrun --nproc_per_node 8 train.py --no-kl --filter-low                 # Show-o 512, Eq. 15
    torchrun --nproc_per_node 8 train.py --no-kl --filter-low --transition p1       # with Eq. 14

One step: sample G pictures for each of P prompts (sample.py, Eq. 1-9), score them (reward.py), turn
scores into advantages (grpo.py, Eq. 12), and maximize Eq. 10, a mean over the T iterations.

Departures from the paper:
- the default transition is Eq. 15, which is what the released training really computes;
- the KL is that of the newly unmasked tokens, see kl_to_reference();
- of several rewards each is normalised in its group (Eq. 12) before they are added;
- --loss-steps divides the loss by the number of chosen iterations, not by T;
- a picture without a score, or a group with a NaN in its rollouts, is left out of the mean;
- prompts/train.txt holds captions of our own; --ratio mean and --lora are later work's.
Departures from the released training:
- gradients are averaged over processes and clipped to norm 1; all weights decay;
- the loss is not divided by T once more;
- the cosine starts with the warm-up, whose first step is not 0, and ends at 0 (released: 0.35);
- bf16 products and float32 weights in place of fp16.

Random numbers depend on (seed, step, prompt slot) alone. Resuming, or using another number of
processes with the same total of prompts per step, changes nothing but floating-point rounding.
"""
import argparse
import importlib.util
import math
import os
import random
import re
import sys
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

import checkpoint
import common
import shapes
from common import all_cat, all_sum
from eval_geneval import check_metadata, geneval_prompts
from grpo import SampleFilter, clipped_objective, group_advantages, kl_k3
from model import describe, is_shapes, load_models, to_uint8
from reward import make_reward
from sample import Trajectory, generate, rollout, transition_log_prob

PRESETS = {     # defaults, by model
    "showo": dict(steps=625, group_size=6, prompts_per_step=2, unmask_steps=50, lr=3e-6, warmup=62,
                  weight_decay=0.02, micro_batch=6, reward="clip", eval_every=50, eval_n=1,
                  eval_unmask_steps=50, eval_guidance=5.0, save_every=100),
    "shapes": dict(steps=30, group_size=8, prompts_per_step=16, unmask_steps=12, lr=7e-4, warmup=3,
                   weight_decay=0.0, micro_batch=256, reward="clip:shapes/clip", eval_every=10,
                   eval_n=8, eval_unmask_steps=12, eval_guidance=0.0, save_every=10)}


def parse_args():
    """Return the flags, whose defaults depend on the model: PRESETS."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = sys.exit      # for common.run()
    add = p.add_argument_group("what").add_argument
    common.add_model_flags(add)
    add("--prompts", help="see common.read_prompts; FILE:KEY (default: prompts/train.txt)")
    add("--reward", help="see reward.py: clip, geneval:exact, or a weighted sum")
    add("--out", help="output folder (default: a new one under runs/)")
    add("--resume", nargs="?", const="auto", help="the newest checkpoint in --out, or this one")
    add("--seed", type=int, default=42)

    add = p.add_argument_group("the method").add_argument
    add("--steps", type=int, help="optimizer steps with fresh rollouts")
    add("--group-size", type=int, help="G, pictures per prompt")
    add("--prompts-per-step", type=int, help="P, per process")
    add("--unmask-steps", type=int, help="T while training (fewer: unmasking reduction)")
    add("--transition", choices=["p1", "p2", "ar"], default="p2", help="Eq. 14, 15 or 13")
    add("--ratio", choices=["sum", "mean"], default="sum", help="Eq. 11, or per token (GSPO)")
    add("--clip", type=float, nargs=2, default=[0.9, 1.2], help="bounds of the ratio, Eq. 10")
    add("--kl", action=BooleanOptionalAction, default=True, help="no: no reference in memory")
    add("--kl-beta", type=float, default=0.01, help="beta of Eq. 10")
    add("--filter-low", action=BooleanOptionalAction, default=False,
        help="sample a group again when its reward std is low (Sec. 3.3)")
    add("--loss-steps", type=int, help="computational reduction (default: all T)")
    add("--loss-steps-from", choices=["first", "last", "random"], default="first")
    add("--inner-epochs", type=int, default=1, help="optimizer steps on the same rollouts; with p1"
        " the ratio of Eq. 11 jumps where a code crosses Eq. 14's threshold")

    add = p.add_argument_group("optimizer").add_argument
    add("--lr", type=float, help="peak; the paper: at most 3e-6 without KL, 5e-6 with it")
    add("--warmup", type=int, help="linear warm-up steps, times a cosine from step 0 on")
    add("--weight-decay", type=float)
    add("--max-grad-norm", type=float, default=1.0, help="0 = no clipping")
    add("--micro-batch", type=int, help="pictures per forward pass; memory only")
    add("--grad-checkpoint", action="store_true", help="less memory, a third more work")
    add("--lora", type=int, metavar="RANK", help="train adapters alone")
    add("--zero", action="store_true", help="shard the optimizer state over processes (ZeRO-1)")

    add = p.add_argument_group("watching").add_argument
    add("--eval-every", type=int, help="steps between evaluations, each with a grid; 0 = none")
    add("--eval-n", type=int, help="pictures per evaluation prompt")
    add("--eval-unmask-steps", type=int, help="T when evaluating")
    add("--eval-guidance", type=float)
    add("--eval-reward", help="as --reward; a part of weight 0 is only logged (default: "
        "GenEval's verdict with shapes or a geneval reward, else --reward)")
    add("--eval-prompts", help="as --prompts (default: held-out shapes, prompts/eval.txt)")
    add("--save-every", type=int, help="steps between checkpoints, 0 = only the last")
    add("--keep-last", type=int, default=0, help="checkpoints, 0 = all")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")

    p.set_defaults(**PRESETS["showo"])
    p.set_defaults(**PRESETS["shapes" if common.is_tiny(p) else "showo"])
    args = p.parse_args()
    if (args.loss_steps or 0) > args.unmask_steps:
        p.error(f"--loss-steps {args.loss_steps} is more than --unmask-steps {args.unmask_steps}")
    if args.resume == "auto" and not args.out:
        p.error("--resume: give the run's folder, --out DIR, or --resume DIR/checkpoint-STEP")
    if args.zero and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--zero shards over processes: start with torchrun --nproc_per_node N")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        p.error("--wandb needs a package: pip install wandb")
    return args


# ------------------------------------------------------------------------------ rollouts

def generator(device, *key):
    """Return a torch.Generator whose seed depends on the key alone."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def example_at(slot, examples, seed):
    """Return the example in a slot of the run; all have their turn before one comes again."""
    epoch, place = divmod(slot, len(examples))
    order = torch.randperm(len(examples), generator=generator("cpu", seed, "prompts", epoch))
    return examples[order[place]]


@torch.no_grad()
def sample_groups(examples, keys, args, showo) -> Trajectory:
    """Roll out G pictures of each of P examples (Eq. 1-9): P G rows, those of a group together.
    keys: what the random numbers of each group depend on."""
    G, trajs, chunk = args.group_size, [], max(1, args.micro_batch // args.group_size)
    for i in range(0, len(examples), chunk):
        prompt = showo.encode([e["prompt"] for e in examples[i:i + chunk]]).repeat(G)
        generators = [generator(showo.device, *key) for key in keys[i:i + chunk]]
        trajs.append(rollout(showo.policy(prompt, batch=args.micro_batch), len(prompt), showo.N,
                             showo.K, args.unmask_steps, generator=generators,
                             keep_sampled=args.transition == "ar"))
    return Trajectory.cat(trajs)


@torch.no_grad()
def score_groups(examples, traj, magvit, reward) -> dict:
    """Decode and score -> {"reward": the weighted sum, and each part by its name}, Float (P, G)."""
    P, device = len(examples), traj.codes.device
    images = to_uint8(magvit.decode(traj.codes))
    scores = reward.score(images, examples, len(images) // P)
    return {name: values.view(P, -1).to(device) for name, values in scores.items()}


def sample_again(examples, keys, traj, rewards, sample_filter, args, showo, magvit, reward) -> int:
    """Sample and score the groups of low reward std once more (Sec. 3.3), and put them in the place
    of the old ones -> how many, in all processes, which judge by one history."""
    P, G = rewards["reward"].shape
    low = ~sample_filter.judge(all_cat(rewards["reward"].std(1)).cpu())     # Bool (P of all,)
    mine = low[common.rank() * P:][:P].nonzero()[:, 0].tolist()
    if mine:
        some = [examples[i] for i in mine]
        new = sample_groups(some, [(*keys[i][:3], 1) for i in mine], args, showo)
        traj[[i * G + j for i in mine for j in range(G)]] = new
        for name, values in score_groups(some, new, magvit, reward).items():
            rewards[name][mine] = values
    sample_filter.judge(all_cat(rewards["reward"].std(1)).cpu()[low])       # to remember them
    return int(low.sum())


# ------------------------------------------------------------------------------ the update

def advantages(rewards, weights, traj):
    """Return the advantages Float (B,) of rewards {"reward": their sum, part: ...}, Float (P, G)
    each, and the sound rows, Bool (B,): they have a reward, and their group's rollouts met finite
    logits. The others have A = 0. Eq. 12 is for each part of weights {part: weight}; their weighted
    mean counts (GDPO, arXiv 2601.05242), since in a sum the largest spread would drown all."""
    scored, total = rewards["reward"].isfinite(), sum(map(abs, weights.values()))       # (P, G)
    adv = sum(weight / total * group_advantages(rewards[part].where(scored, math.nan))  # Eq. 12
              for part, weight in weights.items() if weight)
    broken = traj.threshold.isnan().any(1).view_as(scored).any(1, keepdim=True)         # (P, 1)
    return torch.where(scored & ~broken, adv, 0).flatten(), (scored & ~broken).flatten()


def loss_iterations(step, args):
    """Return the iterations that Eq. 10 averages over: all T, or a subset (Sec. 3.3)."""
    T, n = args.unmask_steps, args.loss_steps or args.unmask_steps
    if args.loss_steps_from == "random":
        return sorted(random.Random(repr((args.seed, step, "iterations"))).sample(range(T), n))
    return list(range(T - n, T) if args.loss_steps_from == "last" else range(n))


def kl_to_reference(logits, logp, traj, t, reference, text, args):
    """Return the KL of Eq. 10 at iteration t, by k3. Departure: it is that of the newly unmasked
    tokens, Eq. 15, for every transition. Eq. 14 jumps where a code crosses its threshold, and k3
    turns such a jump into a gradient of norm 1e8. With --ratio mean it is divided by n_t.

    logits Float (b, M, K), those of the newly unmasked first; text: the reference's prompt."""
    positions = traj.positions(t, "p2")                                         # (b, n_t)
    moved, n = traj.at(positions), positions.shape[1]
    with reference.frozen_base():
        logits_ref = reference.logits(traj.state(t), text, positions=positions)
        logp_ref = transition_log_prob(logits_ref, moved, t, "p2")
    if args.transition != "p2":
        logp = transition_log_prob(logits[:, :n], moved, t, "p2")
    length = n if args.ratio == "mean" else 1
    return kl_k3(logp / length, logp_ref / length)


def update(step, examples, traj, adv, sound, args, showo, reference, optimizer) -> dict:
    """Maximize Eq. 10 on the rollouts of a step, --inner-epochs times -> numbers for the log.

    J = mean of [min(r A, clip(r) A) - beta KL] over the iterations t and the sound rows j of all
    processes. A step whose gradient is not finite, or that has no sound row, is not taken."""
    iterations, kind, tally = loss_iterations(step, args), args.transition, Tally(adv.device)
    prompt = showo.encode([e["prompt"] for e in examples]).repeat(args.group_size)
    has_gradient = sound & ((adv != 0) | bool(reference))       # where A = 0, only the KL has one
    rows_of_loss = has_gradient.nonzero()[:, 0]
    n_terms = all_sum(sound.sum()).item() * len(iterations)                     # of Eq. 10's mean
    logp_old = adv.new_zeros(args.unmask_steps, len(adv))                       # (T, B)
    kl = adv.new_zeros(())

    for epoch in range(args.inner_epochs):
        for rows in rows_of_loss.split(args.micro_batch) if len(rows_of_loss) else ():
            part = traj[rows]
            with showo.shared_text(prompt[rows]) as text:           # its gradient waits for all t
                if reference:
                    with reference.frozen_base():
                        text_ref = reference.prefill(prompt[rows])
                for t in iterations:
                    positions = part.positions(t, kind)                             # (b, M)
                    logits = showo.logits(part.state(t), text, positions=positions)
                    logp = transition_log_prob(logits, part.at(positions), t, kind)  # Eq. 13-15
                    if epoch == 0:      # with the weights of the rollout: the ratio is 1
                        logp_old[t, rows] = logp.detach()
                    length = logits.shape[1] if args.ratio == "mean" else 1
                    objective = clipped_objective(                                  # Eq. 10, 11
                        logp, logp_old[t, rows], adv[rows], *args.clip, length)
                    if reference:
                        kl = kl_to_reference(logits, logp, part, t, reference, text_ref, args)
                        objective = objective - args.kl_beta * kl                   # Eq. 10
                    loss = -objective * len(rows) / n_terms
                    loss.backward()
                    log_ratio = (logp.detach() - logp_old[t, rows]) / length
                    tally.add(log_ratio, kl.detach(), logits[:, :traj.n_unmask(t)], args.clip)

        params = list(showo.trainable().values())
        for p in params:
            p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm or math.inf).item()
        taken = n_terms > 0 and math.isfinite(norm)             # alike on all processes
        if taken:
            optimizer.step()
        optimizer.zero_grad()
    return {"taken": int(taken), "grad_norm": norm if n_terms else math.nan, **tally.means()}


class Tally:
    """Means for the log, over rows or tokens of all passes and processes. approx_kl: from the
    rollout's policy; clip_fraction: ratios out of bounds, whichever term of Eq. 10 counts."""
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


def evaluate(step, examples, args, showo, magvit, judge, out) -> dict:
    """Draw and score --eval-n pictures of each example, with the same noise each time -> a row of
    eval.jsonl. "overall" is the mean over tags, as GenEval has it. Process 0 saves a grid."""
    mine, rows, n = list(range(common.rank(), len(examples), common.world())), [], args.eval_n
    if mine:        # a process may have none
        images = generate(showo, magvit, [examples[i]["prompt"] for i in mine], n=n,
                          T=args.eval_unmask_steps, guidance=args.eval_guidance, seeds=mine,
                          batch=args.micro_batch)
        scores = judge.score(images, [examples[i] for i in mine], n)
        rows = [(i, {name: x[k * n:(k + 1) * n].nanmean().item() for name, x in scores.items()})
                for k, i in enumerate(mine)]
    if common.rank() == 0:
        some = list(range(0, len(images), max(n, len(images) // 12)))[:12]
        captions = [f"{scores['reward'][i]:.3g} | {examples[mine[i // n]]['prompt']}" for i in some]
        (out / "samples").mkdir(exist_ok=True)
        common.grid(images[some], captions, 6).save(out / f"samples/step-{step:06d}.png")

    by_tag = {}
    for i, values in sorted(common.all_lists(rows), key=lambda row: row[0]):
        by_tag.setdefault(examples[i].get("tag", ""), []).append(values)

    def mean(rows):         # of those that have a score
        return {name: torch.tensor([row[name] for row in rows]).double().nanmean().item()
                for name in rows[0]}
    means = {tag: mean(group) for tag, group in by_tag.items()}
    overall = mean(list(means.values()))
    return {"step": step, "overall": overall.pop("reward"), **overall,
            **{tag: m["reward"] for tag, m in means.items() if tag}}


# ------------------------------------------------------------------------------ the run

def load_task(args, device):
    """Return the examples and the reward of training, then those of evaluation."""
    here, tiny = Path(__file__).parent, is_shapes(args.model)
    learns_geneval = "geneval" in re.split("[:,]", args.reward)
    judged_by = args.eval_reward or ("geneval:official" if tiny or learns_geneval else args.reward)
    by_geneval = "geneval" in re.split("[:,]", judged_by)
    examples = (shapes.prompts("train") if tiny and not args.prompts else
                common.read_prompts(args.prompts or here / "prompts/train.txt"))
    if args.eval_prompts or not (tiny or by_geneval):
        held_out = common.read_prompts(args.eval_prompts or here / "prompts/eval.txt")
    else:
        held_out = shapes.prompts("eval") if tiny else geneval_prompts()[::9]   # 62, of all tags
    check_metadata(examples if learns_geneval else [], tiny)
    check_metadata(held_out if by_geneval and args.eval_every else [], tiny)
    kit = dict(device=device, detector=shapes.detect if tiny else None)
    reward = judge = make_reward(args.reward, **kit)
    if args.eval_every and judged_by != args.reward:
        judge = make_reward(judged_by, **kit)
    args.reward, args.eval_reward = reward.spec, judge.spec     # without passwords
    return examples, reward, held_out, judge


def load_policy(args, device, folder, trainer):
    """Return the policy, its image tokenizer, the frozen reference of the KL, if any, and AdamW,
    with --zero its state in shards; as they were in a checkpoint folder, if any."""
    weights = args.ckpt if args.lora else folder or args.ckpt       # adapters are in trainer.pt
    showo, magvit = load_models(args.model, ckpt=weights, vq=args.vq, device=device,
                                compiled=args.compile)
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
    if common.choose_dtype(args.dtype, device) == torch.bfloat16:
        for model in {showo, reference} - {None}:
            model.compute_in(torch.bfloat16)
    showo.grad_checkpoint = args.grad_checkpoint

    settings = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    params = list(showo.trainable().values())
    if args.zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **settings)
    else:
        optimizer = torch.optim.AdamW(params, **settings, fused=device.type == "cuda")
    if trainer:
        optimizer.load_state_dict(trainer["optimizer"])
    return showo, magvit, reference, optimizer


def learning_rate(step, args):
    """Return the linear warm-up times a cosine from 1 at the first step to 0 after the last."""
    warmup = min(1, (step + 1) / max(args.warmup, 1))
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def main():
    args = parse_args()
    rank, world, device = common.setup(args.device)
    out, folder, lock = checkpoint.open_run(args, rank)     # held as long as the name lives
    trainer = checkpoint.load_trainer(folder, args) if folder else None
    examples, reward, held_out, judge = load_task(args, device)
    showo, magvit, reference, optimizer = load_policy(args, device, folder, trainer)
    sample_filter, start, bad_steps = SampleFilter(warmup=48), 0, 0
    if trainer:
        start = trainer["step"]
        sample_filter.load_state_dict(trainer["filter"])
    if rank == 0:
        checkpoint.rewind(out, start if trainer else -1)

    log, stop, models = common.Log(out, args, start), common.StopSignal(), (showo, magvit)
    P, G = args.prompts_per_step, args.group_size
    log.say(describe(*models, [e["prompt"] for e in examples]))
    log.say(f"{world} x {device.type}; {len(examples)} prompts; {args}\n"
            f"one step: {P * world} prompts x {G} = {P * world * G} pictures, x "
            f"{len(loss_iterations(0, args))} of {args.unmask_steps} iterations; output in {out}")

    for step in range(start, args.steps + 1):           # the last pass only evaluates and saves
        stopped = all_cat(torch.tensor([stop.number], device=device)).amax().item()
        last, fresh = stopped > 0 or step == args.steps, step > start or not trainer
        if fresh and args.eval_every and (step % args.eval_every == 0 or last):
            log.evaluation(evaluate(step, held_out, args, *models, judge, out))
        due = last or (args.save_every and step % args.save_every == 0)
        if due and step > start and not bad_steps:
            if args.zero:
                optimizer.consolidate_state_dict(to=0)
            if rank == 0:
                checkpoint.save(out, step, showo, optimizer, sample_filter, args)
        if last:
            break

        times, n_again = [common.now(device)], 0
        first = (step * world + rank) * P               # of its places in the order of prompts
        chosen = [example_at(first + i, examples, args.seed) for i in range(P)]
        keys = [(args.seed, step, rank * P + i, 0) for i in range(P)]
        traj = sample_groups(chosen, keys, args, showo)                         # Eq. 1-9
        times.append(common.now(device))
        rewards = score_groups(chosen, traj, magvit, reward)                    # (P, G) each
        if args.filter_low:                                                     # Sec. 3.3
            n_again = sample_again(chosen, keys, traj, rewards, sample_filter, args, *models,
                                   reward)
        times.append(common.now(device))
        adv, sound = advantages(rewards, reward.weights, traj)                  # Eq. 12, (B,)
        for group in optimizer.param_groups:
            group.update(lr=learning_rate(step, args), weight_decay=args.weight_decay)
        numbers = update(step, chosen, traj, adv, sound, args, showo, reference, optimizer)
        times.append(common.now(device))

        every = {name: all_cat(r) for name, r in rewards.items()}               # (P of all, G)
        log.step({"step": step + 1, "reward_mean": every["reward"].nanmean().item(),
                  "reward_std": every["reward"].std(1).nanmean().item(), "resampled": n_again,
                  "adv_zero": (all_cat(adv) == 0).float().mean().item(),
                  **{name: r.nanmean().item() for name, r in every.items()}, **numbers,
                  "lr": learning_rate(step, args), "s_rollout": times[1] - times[0],
                  "s_reward": times[2] - times[1], "s_update": times[3] - times[2],
                  "images_per_s": P * G * world / (times[3] - times[0]),
                  "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30})     # 0 on a CPU
        bad_steps = 0 if numbers["taken"] else bad_steps + 1
        if bad_steps == 20:
            raise SystemExit("20 steps in a row were not taken (no score, or not finite): "
                             f"go on from a checkpoint in {out}, with a smaller --lr")

    log.close()
    if stopped:
        log.say(f"stopped by a signal after step {step}; go on with --resume --out {out}")
        sys.exit(128 + stopped)         # `train.py && ...` does not go on


if __name__ == "__main__":
    common.run(main)
