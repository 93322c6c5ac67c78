"""The unmasking MDP of Mask-GRPO (arXiv 2510.13418, Eq. 1-9 and 13-15), and an image sampler.

    python sample.py --prompt "a red fox in the snow" --n 4             # Show-o 512, a grid
    python sample.py --model shapes --prompt "a photo of a red circle" --n 8
    torchrun --nproc_per_node 8 sample.py --prompts FILE --out DIR      # a PNG each, goes on

All but generate() and the command line needs torch alone and one function, so it can be copied:

    policy(codes: Long[B, N]) -> logits: Float[B, N, K]     # closed over the prompts; K = masked

State s_t = (c, t, Y_t), action a_t = Y_{t+1}, start all masked (Eq. 7-9). t counts from 0.

Departures from the paper:
- train.py's default transition is Eq. 15 (p2), which the released training really computes;
- Eq. 13-15 leave out the Gumbel noise by which the rollout ranks, as the paper's do: Eq. 14 is the
  probability of a move at temperature 0 alone (ties aside);
- Eq. 14's min(cs_t) is what the rollout measured, for the policy, the old policy and the reference
  alike (threshold=None takes that of the given logits); a re-masked position whose tail mass is 0,
  which noise alone brings about, or too small for a float's gradient, is left out of the product;
- forward_trajectory() and confidence="random" are later work's.
Departures from the released code, which are the paper's:
- released: the last iteration leaves one token masked, which never enters the loss; here: all are
  unmasked;
- released: min(cs_t) is a bool, so that Eq. 14's second product is 1; here: a number;
- released: one picture at a time; here: a group is one batch.
Kept from the released code and Show-o's: the temperature compounds (annealing="compound").
"""
import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------ trajectories


@dataclass
class Trajectory:
    """B whole rollouts of N tokens in T iterations, the states and actions of Eq. 7-9.

    Newly unmasked at t: order == t. Re-masked (still masked after t): order > t."""
    codes: torch.Tensor                     # Long (B, N), the final tokens Y_T, 0..K-1
    order: torch.Tensor                     # Long (B, N), the iteration that unmasked each token;
                                            # -1 where it was given at the start
    threshold: torch.Tensor                 # Float (B, T), min(cs_t) of Eq. 14; inf if none moved,
                                            # NaN if the logits were not finite
    sampled: torch.Tensor | None = None     # Long (T, B, N), all draws; only Eq. 13 needs them
    n_masked: list[int] | None = None       # T + 1 numbers: masked before t = 0, 1, ..., T

    def __post_init__(self):
        if self.n_masked is None:
            T = self.threshold.shape[1]
            self.n_masked = [int((self.order[0] >= t).sum()) for t in range(T + 1)]

    def state(self, t, K):
        """Return Y_t: Long (B, N), K where masked."""
        return torch.where(self.order < t, self.codes, K)

    def n_unmask(self, t):
        """Return n_t of Eq. 4, how many tokens iteration t unmasks."""
        return self.n_masked[t] - self.n_masked[t + 1]

    def positions(self, t, kind):
        """Return the positions that Eq. 13-15 read at iteration t: Long (B, M).

        p2 reads the newly unmasked (where none is, one that is still masked, which counts for
        nothing); p1 and ar all masked ones. The newly unmasked come first."""
        by_time = self.order.argsort(dim=1, stable=True)
        n_before = by_time.shape[1] - self.n_masked[t]
        n_after = by_time.shape[1] - self.n_masked[t + 1]
        return by_time[:, n_before:max(n_after, n_before + 1) if kind == "p2" else None]

    def __getitem__(self, rows):
        sampled = None if self.sampled is None else self.sampled[:, rows]
        return Trajectory(self.codes[rows], self.order[rows], self.threshold[rows], sampled,
                          self.n_masked)

    def __setitem__(self, rows, other):
        self.codes[rows], self.order[rows] = other.codes, other.order
        self.threshold[rows] = other.threshold
        if self.sampled is not None:
            self.sampled[:, rows] = other.sampled

    @staticmethod
    def cat(parts):
        """Join trajectories along the batch."""
        sampled = None
        if parts[0].sampled is not None:
            sampled = torch.cat([part.sampled for part in parts], 1)
        return Trajectory(*(torch.cat([getattr(part, name) for part in parts])
                            for name in ("codes", "order", "threshold")),
                          sampled, parts[0].n_masked)


# ------------------------------------------------------------------------------ sampling

def mask_schedule(N: int, T: int, kind: str = "cosine") -> torch.Tensor:
    """Return Long[T]: how many of N tokens stay masked after each iteration; the last entry is 0.

    n_t of Eq. 4 is the drop from one to the next, so that they sum to N. floor(N r_t) with r_t =
    cos(pi/2 (t+1)/T), or 1 - (t+1)/T for "linear", in float32, clamped to [1, masked - 1] as in
    Show-o. Raises ValueError for another kind, or N or T below 1."""
    if N < 1 or T < 1 or kind not in ("cosine", "linear"):
        raise ValueError(f"mask_schedule: N={N} and T={T} must be at least 1, and kind {kind!r} "
                         "cosine or linear")
    n_masked = [N]
    for t in range(T):
        u = torch.tensor((t + 1) / T)
        ratio = torch.cos(u * math.pi * 0.5) if kind == "cosine" else 1 - u
        n_masked.append(max(1, min(n_masked[-1] - 1, int(torch.floor(N * ratio)))))
    return torch.tensor([*n_masked[1:-1], 0])                                       # Eq. 4


def temperatures(T: int, start: float = 1.0, annealing: str = "compound") -> list[float]:
    """Return the factor of the Gumbel noise at each iteration.

    "compound": start * prod_{k<=t} (1 - (k+1)/T), what Show-o's sampler does; "linear": start *
    (1 - (t+1)/T), what its papers describe; "none": start. Raises ValueError for another one."""
    linear = [1.0 - (t + 1) / T for t in range(T)]
    if annealing == "compound":
        return [start * math.prod(linear[:t + 1]) for t in range(T)]
    if annealing == "linear":
        return [start * ratio for ratio in linear]
    if annealing == "none":
        return [start] * T
    raise ValueError(f"temperatures: annealing {annealing!r} must be compound, linear or none")


def choose_and_move(conf_logp, masked, n_stay_masked, temperature, gumbel):
    """Return CaM_t (Eq. 5), Bool[B, N]: the masked positions that become unmasked, which are all
    but the n_stay_masked least confident.

    conf_logp Float[B, N]: log-probability of the token sampled at each position; masked Bool[B, N];
    n_stay_masked: int, or Long[B, 1]; gumbel Float[B, N]: standard Gumbel noise. Of equal
    confidences the later position moves."""
    score = conf_logp + temperature * gumbel if temperature else conf_logp
    score = score.masked_fill(~masked, math.inf)    # after the noise: the unmasked rank above all
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)
    return masked & (rank >= n_stay_masked)                                         # Eq. 5


@torch.no_grad()
def rollout(policy, B, N, K, T, *, generator, temperature=1.0, schedule="cosine",
            annealing="compound", confidence="probability", start=None, keep_sampled=False):
    """Sample B sequences of N tokens in T iterations (Eq. 1-9) -> Trajectory.

    generator: a torch.Generator on the policy's device, or a list of them for equal chunks of the
    rows, so that a group's samples depend on its own alone. schedule: a name, or how many stay
    masked after each iteration. temperature: of the noise at the start, see temperatures(), or one
    for each iteration. confidence "random": positions unmask in random order, whatever cs_t, and
    Eq. 15 is the probability of a move up to a constant (martian422/MaskGRPO). start: Long[B, N]
    with K where masked, as many in each row (inpainting); None = all masked. keep_sampled: keep all
    draws, which Eq. 13 needs. Raises ValueError when shapes or lengths do not fit."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    codes, n_masked = _start(start, B, N, K, generators)
    if confidence not in ("probability", "random"):
        raise ValueError(f"rollout: confidence {confidence!r} must be probability or random")
    if confidence == "random":
        temperature = [1.0] * T
    n_masked, temps = _plan(n_masked, T, schedule, temperature, annealing)
    order = torch.where(codes == K, T, -1)                          # T: not yet unmasked
    thresholds, draws = [], []

    for t in range(T):
        masked = codes == K                                         # Y_t^M, Eq. 1      (B, N)
        logits = _checked(policy(codes), (B, N, K))
        probs = logits.float().softmax(-1)                          # p_t               (B, N, K)
        drawn = sample_categorical(probs, uniform((B, N, 1), generators))
        sampled = torch.where(masked, drawn, codes)
        conf = take(probs, sampled)                                 # cs_t              (B, N)
        gumbel = -(-uniform((B, N), generators).log()).log()
        # a NaN ranks as 0 and shows in the threshold, which callers check
        log_conf = conf.nan_to_num().clamp(min=1e-20).log()
        if confidence == "random":
            log_conf = torch.zeros_like(log_conf)
        newly_unmasked = choose_and_move(                           # CaM_t, Eq. 5      (B, N)
            log_conf, masked, n_masked[t + 1], temps[t], gumbel)
        codes = torch.where(newly_unmasked, sampled, codes)         # a_t = Y_{t+1}, Eq. 7-9
        order = torch.where(newly_unmasked, t, order)
        thresholds.append(conf.masked_fill(~newly_unmasked, math.inf).amin(1))      # min(cs_t)
        draws += [sampled] if keep_sampled else []

    sampled = torch.stack(draws) if keep_sampled else None
    return Trajectory(codes, order, torch.stack(thresholds, 1), sampled, n_masked)


def _start(start, B, N, K, generators):
    """Return the codes of state 0 and how many are masked in each row. Raises ValueError."""
    if B % len(generators):
        raise ValueError(f"rollout: {B} rows do not split evenly over {len(generators)} generators")
    if start is None:
        return torch.full((B, N), K, device=generators[0].device), N
    if start.shape != (B, N):
        raise ValueError(f"rollout: start has shape {list(start.shape)}, wanted {[B, N]}")
    counts = sorted(set((start == K).sum(1).tolist()))
    if len(counts) > 1 or counts[0] < 1:
        raise ValueError(f"rollout: the rows of start have {counts} masked tokens, wanted one "
                         "number for all, at least 1")
    return start, counts[0]


def _plan(n_masked, T, schedule, temperature, annealing):
    """Return how many tokens are masked before t = 0, 1, ..., T, and T temperatures."""
    if isinstance(schedule, str):
        schedule = mask_schedule(n_masked, T, schedule).tolist()
    if isinstance(temperature, int | float):
        temperature = temperatures(T, temperature, annealing)
    n_masked = [n_masked, *map(int, schedule)]
    if len(n_masked) != T + 1 or n_masked != sorted(n_masked, reverse=True) or n_masked[-1] != 0:
        raise ValueError(f"rollout: schedule {n_masked[1:]} must have {T} entries, falling from at "
                         f"most {n_masked[0]} to 0")
    if len(temperature) != T:
        raise ValueError(f"rollout: {len(temperature)} temperatures for {T} iterations")
    return n_masked, temperature


def _checked(logits, shape):
    """Return logits. Raises ValueError when they have another shape."""
    if logits.shape != shape:
        raise ValueError(f"rollout: the policy's logits have shape {list(logits.shape)}, wanted "
                         f"[B, N, K] = {list(shape)}")
    return logits


def uniform(shape, generators):
    """Return Float64 in [0, 1), the rows in equal chunks from one generator each."""
    chunk = (shape[0] // len(generators), *shape[1:])
    return torch.cat([torch.rand(chunk, generator=g, dtype=torch.float64, device=g.device)
                      for g in generators])


def sample_categorical(probs, u):
    """Return the code at which the cumulated probs Float[B, N, K] pass u Float[B, N, 1] in [0, 1):
    Long[B, N]. One random number a position, where torch.multinomial draws K. The sums are float32:
    of codes less likely than 6e-8, which one is drawn is rounded."""
    cdf = probs.cumsum(-1)
    total = cdf[..., -1:].contiguous()
    code = torch.searchsorted(cdf, u.to(cdf.dtype) * total, right=True)
    most = torch.searchsorted(cdf, total)           # the last code that has a probability
    return code.minimum(most).clamp(max=probs.shape[-1] - 1)[..., 0]


def take(values, codes):
    """Return values Float[..., K] at codes Long[...]."""
    return values.gather(-1, codes[..., None])[..., 0]


def forward_trajectory(codes, T, generators, schedule="cosine"):
    """Mask finished tokens Long[B, N] in a random order (the forward process) -> Trajectory whose
    action at every state is the final picture; its threshold is a dummy, use "ar".

    generators: a list, as for rollout(). Source: UDM-GRPO, arXiv 2604.18518."""
    B, N = codes.shape
    n_masked = [N, *mask_schedule(N, T, schedule).tolist()]
    n_moved = torch.tensor(n_masked[:-1]) - torch.tensor(n_masked[1:])
    times = torch.arange(T).repeat_interleave(n_moved).to(codes.device).expand(B, N)
    places = uniform((B, N), generators).argsort(1)
    order = torch.empty_like(codes).scatter(1, places, times)
    threshold = torch.zeros(B, T, device=codes.device)
    return Trajectory(codes, order, threshold, codes.expand(T, B, N), n_masked)


# ------------------------------------------------------------------------------ probabilities

def transition_log_prob(logits, codes, order, t, kind, *, threshold=None, sampled=None):
    """Return log pi_theta(Y_{t+1} | Y_t, c), the paper's p_theta(s_{t+1} | s_t, a_t), of the move
    that iteration t made: Float[B].

    With U the newly unmasked (order == t), R the re-masked (order > t), p_i = softmax(logits)_i:
    "ar"  Eq. 13: sum over U and R of log p_i[sampled_i]
    "p1"  Eq. 14: sum over U of log p_i[codes_i] + sum over R of log sum_k p_ik [p_ik < min cs_t]
    "p2"  Eq. 15: sum over U of log p_i[codes_i]

    logits Float[B, N, K] of state t; codes, order Long[B, N] as in Trajectory; t: int. N may be cut
    to the positions that count, see Trajectory.positions().
    threshold Float[B] or [B, T]: min(cs_t) under the policy that sampled, None = under these
    logits. sampled Long[B, N] or [T, B, N]: the tokens drawn at every masked position.
    Sums are float32, float64 for float64 logits. Raises ValueError for another kind, or "ar"
    without sampled."""
    if kind not in ("p1", "p2", "ar") or (kind == "ar" and sampled is None):
        raise ValueError(f"transition_log_prob: kind {kind!r} must be p1, p2 or ar; ar needs "
                         "sampled")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))            # (B, N, K)
    log_norm = logits.logsumexp(-1)     # no log_softmax: it would keep a second (B, N, K)
    newly_unmasked, remasked = order == t, order > t                                # (B, N)

    if kind == "ar":
        sampled = sampled[t] if sampled.dim() == 3 else sampled
        log_conf = take(logits, sampled) - log_norm
        return (log_conf * (newly_unmasked | remasked)).sum(1)                      # Eq. 13

    codes = codes.clamp(max=logits.shape[-1] - 1)       # K where a third party's are still masked
    log_conf = take(logits, codes) - log_norm                                       # log cs_t
    log_p2 = torch.where(newly_unmasked, log_conf, 0).sum(1)                        # Eq. 15
    if kind == "p2":
        return log_p2

    if threshold is None:
        threshold = log_conf.detach().exp().masked_fill(~newly_unmasked, math.inf).amin(1)
    elif threshold.dim() == 2:
        threshold = threshold[:, t]
    # computed again in the backward pass, so that no second (B, N, K) is kept
    tail = checkpoint(tail_mass, logits, log_norm, threshold, use_reentrant=False)  # (B, N)
    counts = remasked & (tail > torch.finfo(tail.dtype).tiny)   # of less, the gradient overflows
    return log_p2 + torch.where(counts, tail, 1).log().sum(1)                       # Eq. 14


def tail_mass(logits, log_norm, threshold):
    """Return sum_k p_k [p_k < min(cs_t)], Float[B, N]: a re-masked position's factor of Eq. 14, the
    probability of a token that is less likely than the least confident one that moved."""
    probs = (logits - log_norm[..., None]).exp()
    return torch.where(probs < threshold[:, None, None], probs, 0).sum(-1)


# ------------------------------------------------------------------------------ pictures

@torch.no_grad()
def generate(showo, magvit, prompts, *, n=1, T=50, guidance=5.0, seeds=None, batch=8, **how):
    """Draw n pictures of each prompt -> uint8 [len(prompts) * n, 3, H, W] on the CPU, the pictures
    of a prompt together.

    The pictures of prompt i depend on seeds[i] (default i) and n, not on the other prompts. batch:
    pictures at a time, but never fewer than n. how: for rollout(). Raises InputError when the
    logits are not finite."""
    from checkpoint import InputError
    from model import to_uint8
    seeds = list(range(len(prompts))) if seeds is None else seeds
    pictures, chunk = [], max(1, batch // n)
    for i in range(0, len(prompts), chunk):
        prompt = showo.encode(prompts[i:i + chunk]).repeat(n)
        generators = [torch.Generator(showo.device).manual_seed(s) for s in seeds[i:i + chunk]]
        with showo.autocast():
            policy = showo.policy(prompt, guidance)
            traj = rollout(policy, len(prompt), showo.N, showo.K, T, generator=generators, **how)
        if traj.threshold.isnan().any():
            raise InputError("the model's logits are not finite: its weights are damaged, or the "
                             "guidance is too large")
        pictures.append(to_uint8(magvit.decode(traj.codes)).cpu())
    return torch.cat(pictures)


def draw_grid(showo, magvit, prompts, args, settings):
    """Draw --n pictures of each prompt into the PNG --out, a grid when there are several."""
    import common
    seeds = [args.seed * 1_000_003 + i for i in range(len(prompts))]
    pictures = generate(showo, magvit, prompts, n=args.n, seeds=seeds, **settings)
    captions = [prompt for prompt in prompts for _ in range(args.n)]
    a_row_each = args.n > 1 and len(prompts) > 1
    columns = args.n if a_row_each else math.ceil(math.sqrt(len(pictures)))
    one = len(pictures) == 1
    image = common.to_pil(pictures[0]) if one else common.grid(pictures, captions, columns)
    image.save(args.out)
    print(f"{len(pictures)} pictures of {len(prompts)} prompts in {args.out}")


def draw_folder(showo, magvit, prompts, args, settings):
    """Draw --n pictures of each prompt into the folder --out, a PNG each, shared out over
    processes; whole ones are kept. Raises InputError when it was drawn with other settings."""
    import hashlib
    from pathlib import Path

    import common
    out, rank, batch = Path(args.out), common.get_rank(), settings.pop("batch")
    digest = hashlib.sha256("\n".join(prompts).encode("utf-8", "replace")).hexdigest()
    common.prepare_out(out, {
        "model": args.model, "ckpt": args.ckpt, "vq": args.vq, "dtype": str(showo.showo.dtype),
        "n": args.n, "seed": args.seed, "prompts": digest, **settings}, rank)
    files = {i: [out / f"{i:06d}-{k:02d}.png" for k in range(args.n)]
             for i in range(rank, len(prompts), common.get_world())}

    def draw(prompts, n, seeds):
        seeds = [args.seed * 1_000_003 + i for i in seeds]
        return generate(showo, magvit, prompts, n=n, seeds=seeds, batch=batch, **settings)
    drawn = common.draw_files(files, prompts, args.n, draw, batch)
    print(f"process {rank}: drew {drawn} pictures in {out}")


def main():
    import time

    import common
    from model import describe, load_models
    p = common.Parser("Draw pictures with Show-o: one PNG, a grid when there are several.")
    p.add_argument("--prompt", action="append", default=[], help="can be given several times")
    p.add_argument("--prompts", help='a file: txt, a prompt a line, or jsonl with "prompt"')
    p.add_argument("--n", type=common.in_range(int, 1), default=1, help="pictures per prompt")
    p.add_argument("--seed", type=common.in_range(int, 0, 2 ** 40), default=0)
    p.add_argument("--out", default=time.strftime("sample-%Y%m%d-%H%M%S.png"),
                   help="a PNG; or a folder, for a PNG per picture, where whole ones are kept")
    common.add_model_flags(p.add_argument)
    common.add_sampling_flags(p.add_argument)
    args = p.parse_args()
    prompts = list(args.prompt)
    if args.prompts:
        prompts += [example["prompt"] for example in common.read_prompts(args.prompts)]
    if not prompts:
        p.error("give --prompt TEXT or --prompts FILE")
    draw = draw_folder if common.check_output(p, args.out) else draw_grid

    rank, _, device = common.setup(args.device)
    showo, magvit = load_models(args.model, ckpt=args.ckpt, vq=args.vq, tokenizer=args.tokenizer,
                                device=device, dtype=common.choose_dtype(args.dtype, device))
    if rank == 0:
        print(describe(showo, magvit), flush=True)
    draw(showo, magvit, prompts, args, common.sampling_settings(args))


if __name__ == "__main__":
    from common import run
    run(main)
