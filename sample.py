"""The unmasking MDP of Mask-GRPO (arXiv 2510.13418, Eq. 1-9 and 13-15), and an image sampler.

    python sample.py --prompt "a red fox in the snow" --n 4             # Show-o 512, a grid
    torchrun --nproc_per_node 8 sample.py --prompts FILE --out DIR      # PNGs; repeat it to go on

All above the section "pictures" needs only torch and one function, so it can be copied:

    policy(codes: Long[B, N]) -> logits: Float[B, N, K]     # closed over the prompts; K = masked

If your model's vocabulary contains the mask token, drop that column or set it to -inf. Put the
model into eval mode: with dropout every pass is another policy than the one that sampled.

State s_t = (c, t, Y_t), action a_t = Y_{t+1}, start all masked (Eq. 7-9). t counts from 0.

Departures from the paper: Eq. 14's min(cs_t) is the number that the rollout measured, for the
policy and the old policy alike; a re-masked position whose tail mass is 0, or too small for
float32, counts as 1 in its product (Eq. 14 has 0 there; the gradient would be infinite).
Departures from the released code: the last iteration unmasks all (released: one token stays masked
and never enters the loss); min(cs_t) is a number, the least confidence (released: a bool, which
turns Eq. 14 into 15, of the token whose noisy confidence is least); with Eq. 13 the re-masked stay
masked in the next state (released: each drawn token is fed back).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.checkpoint import checkpoint


@dataclass
class Trajectory:
    """B whole rollouts of N tokens in T iterations, the states and actions of Eq. 7-9, and what
    Eq. 13-15 need to compute their probability under any policy.

    Newly unmasked at t: order == t. Re-masked (still masked after t): order > t."""
    codes: torch.Tensor                     # Long (B, N), the final tokens Y_T, 0..K-1
    order: torch.Tensor                     # Long (B, N), the iteration of each token; -1: given
    threshold: torch.Tensor | None          # Float (B, T), min(cs_t) under the policy that sampled;
                                            # inf if none moved. Only Eq. 14 needs it
    K: int                                  # codes; K itself means masked
    n_masked: list[int] | None = None       # T + 1 numbers: masked before t = 0, 1, ..., T
    sampled: torch.Tensor | None = None     # Long (B, N, T), all draws. Only Eq. 13 needs them

    def __post_init__(self):
        if self.n_masked is None:           # the same in all rows
            self.n_masked = [int((self.order[0] >= t).sum()) for t in range(self.order.max() + 2)]

    def state(self, t: int) -> torch.Tensor:
        """Return Y_t: Long (B, N), K where masked."""
        return torch.where(self.order < t, self.codes, self.K)

    def n_unmask(self, t: int) -> int:
        """Return n_t of Eq. 4, how many tokens iteration t unmasks."""
        return self.n_masked[t] - self.n_masked[t + 1]

    def positions(self, t: int, kind: str) -> torch.Tensor:
        """Return the positions that Eq. 13-15 read at iteration t, the newly unmasked first: Long
        (B, M). p2 reads only those (at least one position); p1 and ar read all masked ones."""
        N = self.codes.shape[1]
        start, end = N - self.n_masked[t], N - self.n_masked[t + 1]
        by_time = self.order.argsort(dim=1, stable=True)
        return by_time[:, start:max(end, start + 1) if kind == "p2" else None]

    def at(self, positions: torch.Tensor) -> "Trajectory":
        """Return the trajectory cut to positions Long (B, M)."""
        sampled = self.sampled
        if sampled is not None:
            sampled = sampled.gather(1, positions[..., None].expand(-1, -1, sampled.shape[2]))
        return replace(self, codes=self.codes.gather(1, positions),
                       order=self.order.gather(1, positions), sampled=sampled)

    def tensors(self):
        """Return the tensors of B rows by their names."""
        names = ("codes", "order", "threshold", "sampled")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __getitem__(self, rows):
        return replace(self, **{name: x[rows] for name, x in self.tensors().items()})

    def __setitem__(self, rows, other):
        for name, x in self.tensors().items():
            x[rows] = getattr(other, name)

    @staticmethod
    def cat(parts):
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts])
                                    for name in parts[0].tensors()})


# ------------------------------------------------------------------------------ sampling

def mask_schedule(N: int, T: int, kind: str = "cosine") -> torch.Tensor:
    """Return Long[T]: how many of N tokens stay masked after each iteration; the last entry is 0.

    n_t of Eq. 4 is the drop from one to the next. floor(N r_t) with r_t = cos(pi/2 (t+1)/T), or
    1 - (t+1)/T for "linear", in float32, clamped to [1, masked - 1] as in Show-o."""
    n_masked = [N]
    for t in range(T):
        u = torch.tensor((t + 1) / T)
        ratio = {"cosine": torch.cos(u * math.pi * 0.5), "linear": 1 - u}[kind]
        n_masked.append(max(1, min(n_masked[-1] - 1, int(torch.floor(N * ratio)))))
    return torch.tensor([*n_masked[1:-1], 0])                                       # Eq. 4


def temperatures(T: int, start: float = 1.0) -> list[float]:
    """Return the factor of the Gumbel noise at each iteration, start * prod_{k<=t} (1 - (k+1)/T):
    it compounds, as in Show-o's sampler."""
    linear = [1.0 - (t + 1) / T for t in range(T)]
    return [start * math.prod(linear[:t + 1]) for t in range(T)]


def choose_and_move(conf_logp: torch.Tensor, masked: torch.Tensor, n_stay_masked: int,
                    temperature: float, gumbel: torch.Tensor) -> torch.Tensor:
    """Return CaM_t (Eq. 5), Bool[B, N]: the masked positions that become unmasked, which are all
    but the n_stay_masked least confident after the noise. Of equal ones the later position moves.

    conf_logp Float[B, N]: log-probability of the token sampled at each position; masked Bool[B, N];
    gumbel Float[B, N]: standard Gumbel noise."""
    score = conf_logp + temperature * gumbel if temperature else conf_logp
    score = score.masked_fill(~masked, math.inf)    # after the noise: the unmasked rank above all
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)
    return masked & (rank >= n_stay_masked)                                         # Eq. 5


@torch.no_grad()
def rollout(policy: Callable[[torch.Tensor], torch.Tensor], B: int, N: int, K: int, T: int, *,
            generator: torch.Generator | list[torch.Generator],
            temperature: float | list[float] = 1.0, schedule: str | list[int] = "cosine",
            start: torch.Tensor | None = None, keep_sampled: bool = True) -> Trajectory:
    """Sample B sequences of N tokens in T iterations (Eq. 1-9).

    generator     a torch.Generator on the policy's device, or a list for equal chunks of the rows
    temperature   of the Gumbel noise at the start, see temperatures(), or one per iteration
    schedule      "cosine", see mask_schedule(), or how many stay masked after each iteration
    start         Long[B, N], K where masked, equally often in each row (inpainting). The schedule
                  counts these masked tokens; Show-o's inpainting counts all N
    keep_sampled  False: do without Trajectory.sampled, which only Eq. 13 needs

    ValueError where the policy's shape, generators, schedule or start do not fit."""
    # what was left open, and what does not fit
    generators = generator if isinstance(generator, list | tuple) else [generator]
    codes = torch.full((B, N), K, device=generators[0].device) if start is None else start
    n_start = int((codes[0] == K).sum())
    stay = mask_schedule(n_start, T, schedule).tolist() if isinstance(schedule, str) else schedule
    if not isinstance(temperature, list | tuple):
        temperature = temperatures(T, temperature)
    if B % len(generators):
        raise ValueError(f"rollout: {len(generators)} generators cannot share {B} rows equally")
    if ((codes == K).sum(1) != n_start).any():
        raise ValueError("rollout: the rows of start have different numbers of masked tokens")
    if len(stay) != T or len(temperature) != T or stay[-1]:
        raise ValueError(f"rollout: the schedule must end with 0 masked tokens, and it and the "
                         f"temperatures need {T} entries")
    order = torch.where(codes == K, T, -1)                          # T: not yet unmasked
    thresholds, draws = [], []

    for t in range(T):
        masked = codes == K                                         # Y_t^M, Eq. 1      (B, N)
        probs = policy(codes).float().softmax(-1)                   # p_t               (B, N, K)
        if probs.shape != (B, N, K):
            raise ValueError(f"policy gave {list(probs.shape)}, wanted {[B, N, K]}")

        # a seed means these two draws in this order: tokens first, then the noise
        drawn = sample_categorical(probs, uniform((B, N, 1), generators))
        sampled = torch.where(masked, drawn, codes)
        conf = take(probs, sampled)                                 # cs_t              (B, N)
        gumbel = -(-uniform((B, N), generators).log()).log()

        newly_unmasked = choose_and_move(                           # CaM_t, Eq. 5      (B, N)
            conf.clamp(min=1e-20).log(), masked, stay[t], temperature[t], gumbel)
        codes = torch.where(newly_unmasked, sampled, codes)         # a_t = Y_{t+1}, Eq. 7-9
        order = torch.where(newly_unmasked, t, order)
        thresholds.append(conf.masked_fill(~newly_unmasked, math.inf).amin(1))      # min(cs_t)
        draws += [sampled] if keep_sampled else []

    return Trajectory(codes, order, torch.stack(thresholds, 1), K, [n_start, *stay],
                      torch.stack(draws, -1) if keep_sampled else None)


def uniform(shape, generators):
    """Return Float64 in [0, 1), the rows in equal chunks from one generator each."""
    chunk = (shape[0] // len(generators), *shape[1:])
    return torch.cat([torch.rand(chunk, generator=g, dtype=torch.float64, device=g.device)
                      for g in generators])


def sample_categorical(probs, u):
    """Return the codes Long[B, N] at which cumulated probs Float[B, N, K] pass u Float[B, N, 1] in
    [0, 1): one random number a position, where torch.multinomial draws K."""
    cdf = probs.cumsum(-1)
    total = cdf[..., -1:].contiguous()
    code = torch.searchsorted(cdf, u.to(cdf.dtype) * total, right=True)
    most = torch.searchsorted(cdf, total)           # the last code that has a probability
    return code.minimum(most).clamp(max=probs.shape[-1] - 1)[..., 0]


def take(values, codes):        # Float[..., K] at Long[...]
    return values.gather(-1, codes[..., None])[..., 0]


# ------------------------------------------------------------------------------ probabilities

def transition_log_prob(logits: torch.Tensor, traj: Trajectory, t: int, kind: str) -> torch.Tensor:
    """Return the log of the paper's p_theta(s_{t+1} | s_t, a_t) for the move of iteration t,
    Float[B]. Eq. 14 is exact if the rollout had no Gumbel noise; Eq. 13 and 15 never are.

    With U the newly unmasked (order == t), R the re-masked (order > t), p_i = softmax(logits)_i:
    "ar"  Eq. 13: sum over U and R of log p_i[sampled_i]
    "p1"  Eq. 14: sum over U of log p_i[codes_i] + sum over R of log sum_k p_ik [p_ik < min cs_t]
    "p2"  Eq. 15: sum over U of log p_i[codes_i]

    logits Float[B, N, K] of state t; both may be cut to the positions that count (traj.at).
    ValueError for another kind, and where the rollout did not keep what a kind needs."""
    if kind not in ("ar", "p1", "p2"):
        raise ValueError(f"transition_log_prob: {kind!r} is none of 'ar', 'p1', 'p2'")
    if kind == "p1" and traj.threshold is None or kind == "ar" and traj.sampled is None:
        raise ValueError("Eq. 14 needs the rollout's threshold, Eq. 13 its sampled")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))            # (B, N, K)
    log_norm = logits.logsumexp(-1)     # no log_softmax: it would keep a second (B, N, K)
    newly_unmasked, remasked = traj.order == t, traj.order > t                      # (B, N)

    tokens = traj.sampled[..., t] if kind == "ar" else traj.codes
    log_conf = take(logits, tokens) - log_norm                                      # log cs_t
    if kind == "ar":
        return (log_conf * (newly_unmasked | remasked)).sum(1)                      # Eq. 13
    log_p2 = torch.where(newly_unmasked, log_conf, 0).sum(1)                        # Eq. 15
    if kind == "p2":
        return log_p2

    # computed again in the backward pass, so that no second (B, N, K) is kept
    tail = checkpoint(tail_mass, logits, log_norm, traj.threshold[:, t], use_reentrant=False)
    counts = remasked & (tail > torch.finfo(tail.dtype).tiny)   # below it the gradient overflows
    return log_p2 + torch.where(counts, tail, 1).log().sum(1)                       # Eq. 14


def tail_mass(logits, log_norm, threshold):
    """Return sum_k p_k [p_k < min(cs_t)], Float[B, N]: a re-masked position's factor of Eq. 14, the
    probability of a token that is less likely than the least confident one that moved."""
    probs = (logits - log_norm[..., None]).exp()
    return torch.where(probs < threshold[:, None, None], probs, 0).sum(-1)


# ------------------------------------------------------------------------------ pictures

@torch.no_grad()
def generate(showo, magvit, prompts: list[str], *, n: int = 1, T: int = 50, guidance: float = 5.0,
             seeds: list[int] | None = None, batch: int = 8, **options) -> torch.Tensor:
    """Draw n pictures of each prompt -> uint8 [len(prompts) * n, 3, H, W] on the CPU.

    The pictures of prompt i depend on seeds[i] (default i) and n, not on the other prompts. batch:
    pictures at a time. options: of rollout()."""
    from model import to_uint8
    seeds = list(range(len(prompts))) if seeds is None else seeds
    pictures, chunk = [], max(1, batch // n)
    for i in range(0, len(prompts), chunk):
        prompt = showo.encode(prompts[i:i + chunk]).repeat(n)
        generators = [torch.Generator(showo.device).manual_seed(s) for s in seeds[i:i + chunk]]
        traj = rollout(showo.policy(prompt, guidance, batch), len(prompt), showo.N, showo.K, T,
                       generator=generators, **options)
        pictures.append(to_uint8(magvit.decode(traj.codes)).cpu())
    return torch.cat(pictures)


def main():
    import time
    from pathlib import Path

    from support import flags, pictures, processes
    from support.prompts import read_prompts
    p = flags.parser(__doc__)
    p.add_argument("--prompt", action="append", default=[], help="can be given several times")
    p.add_argument("--prompts", help="a file, see support/prompts.py; FILE:KEY")
    p.add_argument("--out", default=time.strftime("sample-%Y%m%d-%H%M%S.png"), type=Path,
                   help="a picture (.png, .jpg), or a folder, where what is there stays")
    flags.add_model_flags(p.add_argument)
    flags.add_sampling_flags(p.add_argument)
    args = flags.parse(p, flags.SAMPLING)

    if not args.prompt and not args.prompts:
        p.error("give --prompt TEXT, or --prompts FILE")
    rank, world, device = processes.setup(args.device)
    examples = [{"prompt": text} for text in args.prompt]
    examples += read_prompts(args.prompts) if args.prompts else []

    # a picture of all prompts, by one process, or a folder that knows what draws it
    dtype = processes.choose_dtype(args.dtype, device)
    is_picture = args.out.suffix.lower() in pictures.SUFFIXES
    if is_picture and rank > 0:
        return
    if not is_picture:
        _lock = pictures.claim_folder(args.out, pictures.drawn_with(args, examples, dtype))

    draw = drawer(args, device, dtype, [e["prompt"] for e in examples])
    if is_picture:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        images = draw([e["prompt"] for e in examples], n=args.n, seeds=range(len(examples)))
        captions = [e["prompt"] for e in examples for _ in range(args.n)]
        pictures.grid(images, captions, math.ceil(len(images) ** 0.5)).save(args.out)
    else:
        by_name = args.prompts and Path(args.prompts).is_dir() and not args.prompt
        names = [e["name"] if by_name else f"{i:06d}" for i, e in enumerate(examples)]
        files = {i: [args.out / f"{names[i]}-{k:02d}.png" for k in range(args.n)]
                 for i in range(rank, len(examples), world)}
        pictures.draw_missing(files, examples, draw, args.batch)


def drawer(args, device, dtype, prompts=()):
    """Load the models that a script's flags name -> draw(prompts, n=, seeds=) -> uint8 pictures."""
    from model import describe, load_models
    showo, magvit = load_models(args.model, ckpt=args.ckpt, vq=args.vq, device=device, dtype=dtype,
                                compiled=args.compile)
    print(describe(showo, magvit, prompts), flush=True)

    def draw(prompts, n, seeds):
        return generate(showo, magvit, prompts, n=n, T=args.T, guidance=args.guidance,
                        temperature=args.temperature, batch=args.batch,
                        seeds=[args.seed * 1_000_003 + i for i in seeds])
    return draw


if __name__ == "__main__":
    from support import processes
    processes.run(main)
