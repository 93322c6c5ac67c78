"""The unmasking MDP of Mask-GRPO (arXiv 2510.13418, Eq. 1-9 and 13-15), and the image sampler built on it.

    python sample.py --prompt "a red fox in the snow" --n 4                # Show-o 512, one PNG grid
    python sample.py --model shapes --prompt "a photo of a red circle" --n 8

The upper half needs torch alone and one function, so it can be copied into other code:

    policy(codes: Long[B, N]) -> logits: Float[B, N, K]                    # closed over the prompts; code K = masked

State s_t = (c, t, Y_t), action a_t = Y_{t+1}, start all masked. Iterations t count from 0, as in the code of Show-o.

Departures from the released code, all towards the paper: the last iteration unmasks every token that is left (there, one
stays masked in the last state and never enters the loss); min(cs_t) of Eq. 14 is a number (there a bool, so Eq. 14 lost
its second factor); a group is one batch. Kept from it: the compounding temperature (`annealing="compound"`).
Departure from the paper: the default transition is Eq. 15 (p2), which is what the released training really computes. Beyond it:
the transition "gumbel", and remask().
"""
import argparse
import datetime
import errno
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------ the unmasking MDP

@dataclass
class Trajectory:
    """A whole rollout. State t is where(order < t, codes, K); newly unmasked at t: order == t; re-masked: order > t."""
    codes: torch.Tensor             # Long (B, N), the final tokens, 0..K-1
    order: torch.Tensor             # Long (B, N), the iteration at which each token was unmasked, 0..T-1
    threshold: torch.Tensor         # Float (B, T), min over the newly unmasked of their probability; inf if there are none
    sampled: torch.Tensor | None    # Long (T, B, N), the tokens drawn at every iteration; only Eq. 13 needs them
    cut: torch.Tensor | None = None  # Float (B, T, 2), for "gumbel": the least noisy confidence that was unmasked, and where
    predicted: torch.Tensor | None = None  # Long (T, B, N), at every iteration the codes so far and the likeliest elsewhere

    def state(self, t, K):
        """Y_t: Long (B, N), masked positions hold K."""
        return torch.where(self.order < t, self.codes, K)


def mask_schedule(N: int, T: int, kind: str = "cosine") -> torch.Tensor:
    """Long[T]: how many of N tokens stay masked after each of T iterations; the last entry is 0 (n_t of Eq. 4 by difference).

    floor(N r_t) with r_t = cos(pi/2 (t+1)/T) or 1 - (t+1)/T in float32, clamped to [1, masked - 1] as in Show-o.
    Raises ValueError for an unknown kind or N, T < 1."""
    if N < 1 or T < 1 or kind not in ("cosine", "linear"):
        raise ValueError(f"mask_schedule: N={N} and T={T} must be at least 1, and kind {kind!r} cosine or linear")
    stay, masked = [], N
    for t in range(T):
        u = torch.tensor((t + 1) / T)
        ratio = torch.cos(u * math.pi * 0.5) if kind == "cosine" else 1 - u
        masked = max(1, min(masked - 1, int(torch.floor(N * ratio))))
        stay.append(masked)
    return torch.tensor(stay[:-1] + [0])


def temperatures(T: int, start: float = 1.0, annealing: str = "compound") -> list[float]:
    """The factor of the Gumbel noise at each iteration: "compound" start * prod_{k<=t} (1 - (k+1)/T), what Show-o's
    sampler does; "linear" start * (1 - (t+1)/T), what its papers describe; "none" start throughout."""
    if annealing not in ("compound", "linear", "none"):
        raise ValueError(f"temperatures: annealing {annealing!r} must be compound, linear or none")
    out, running = [], start
    for t in range(T):
        ratio = 1.0 - (t + 1) / T
        running *= ratio
        out.append({"compound": running, "linear": start * ratio, "none": start}[annealing])
    return out


def choose_and_move(conf_logp, masked, n_stay_masked, temperature, gumbel):
    """Eq. 5 -> Bool[B, N], the newly unmasked: all masked positions but the n_stay_masked least confident.

    conf_logp Float[B, N]: log-probability of the token sampled at each position; masked Bool[B, N]; n_stay_masked an int
    or Long[B] / [B, 1]; gumbel Float[B, N] standard Gumbel noise. Ties go to the later position."""
    conf = conf_logp + temperature * gumbel if temperature else conf_logp
    conf = conf.masked_fill(~masked, math.inf)  # after the noise: what is unmasked stays so
    rank = conf.argsort(dim=1, stable=True).argsort(dim=1)
    if not isinstance(n_stay_masked, int):
        n_stay_masked = torch.as_tensor(n_stay_masked, device=conf.device).reshape(-1, 1)
    return masked & (rank >= n_stay_masked)


def _uniform(shape, generators, device):
    """Float64 in [0, 1) for a batch whose rows fall into equal chunks, one generator each: a chunk's do not depend on the others."""
    return torch.cat([torch.rand(shape[0] // len(generators), *shape[1:], generator=g, dtype=torch.float64, device=device) for g in generators])


def _categorical(probs, u):
    """The code at which the cumulated probabilities pass u Float64[B, M, 1] -> Long[B, M]; blocks first, then inside the one."""
    blocks = probs.unflatten(-1, (-1, math.gcd(probs.shape[-1], 64)))                           # (B, M, blocks, in a block)
    below = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    block = torch.searchsorted(below, u * below[..., -1:], right=True).clamp(max=blocks.shape[2] - 1)
    inside = blocks.gather(2, block[..., None].expand(-1, -1, -1, blocks.shape[3]))[:, :, 0].cumsum(-1, dtype=torch.float64)
    rest = u * below[..., -1:] - below.gather(2, block) + blocks.sum(-1).gather(2, block)       # what u leaves for the block
    place = torch.searchsorted(inside, rest.clamp(min=0).minimum(inside[..., -1:] * (1 - 1e-12)), right=True)
    return (block * blocks.shape[3] + place)[..., 0]


@torch.no_grad()
def rollout(policy, B, N, K, T, *, generator, temperature=1.0, schedule="cosine", annealing="compound", keep_sampled=False, keep_cut=False,
            keep_predicted=False, masked_only=False):
    """Sample B token sequences from all masked in T iterations -> Trajectory.

    generator: a torch.Generator on the policy's device, or a list of them, one per equal chunk of the rows (so that a
    group's samples depend on nothing but its own). temperature, annealing: of the Gumbel noise on the confidence, see
    temperatures(). keep_sampled: also keep [T, B, N] sampled tokens, for Eq. 13; keep_cut, keep_predicted: see Trajectory.
    masked_only: the policy is called as policy(codes, at), at Long[B, M] the masked positions, and returns their logits
    Float[B, M, K] alone; the samples are the same. Raises ValueError when the chunks are unequal."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if B % len(generators):
        raise ValueError(f"rollout: {B} rows cannot be split evenly over {len(generators)} generators")
    device = generators[0].device
    stay = mask_schedule(N, T, schedule).tolist()
    temps = temperatures(T, temperature, annealing)
    codes = torch.full((B, N), K, device=device)
    order = torch.full((B, N), T, device=device)
    threshold, kept, cut, predicted = [], [], [], []
    for t, M in enumerate([N] + stay[:-1]):                                                     # M positions are masked
        at = (order < T).long().argsort(dim=1, stable=True)[:, :M]                                  # (B, M)
        logits = policy(codes, at) if masked_only else policy(codes).gather(1, at[..., None].expand(-1, -1, K))
        probs = torch.softmax(logits.float(), -1)                                               # (B, M, K)
        drawn = _categorical(probs, _uniform((B, M, 1), generators, device))
        conf = _at(probs, drawn)                                                                # cs_t
        gumbel = -(-_uniform((B, M), generators, device).log()).log()
        log_conf = conf.clamp(min=1e-20).log()
        new = choose_and_move(log_conf, torch.ones_like(conf, dtype=torch.bool), stay[t], temps[t], gumbel)  # Eq. 5
        if keep_cut:
            least, i = (log_conf + temps[t] * gumbel).masked_fill(~new, math.inf).min(1)
            cut.append(torch.stack([least, at.gather(1, i[:, None])[:, 0]], 1).float())
        if keep_sampled:
            kept.append(codes.scatter(1, at, drawn))
        if keep_predicted:
            predicted.append(codes.scatter(1, at, probs.argmax(-1)))
        codes, order = codes.scatter(1, at, torch.where(new, drawn, K)), order.scatter(1, at, torch.where(new, t, T))
        threshold.append(conf.masked_fill(~new, math.inf).amin(1))
    return Trajectory(codes, order, torch.stack(threshold, 1), torch.stack(kept) if keep_sampled else None, torch.stack(cut, 1) if keep_cut else None,
                      torch.stack(predicted) if keep_predicted else None)


def remask(codes, T, generators, schedule="cosine"):
    """The forward process on finished tokens Long[B, N] -> a Trajectory to the same codes that unmasks in random order, with codes as
    the tokens sampled at every iteration: under "ar" the action at each state is the final picture (UDM-GRPO, arXiv 2604.18518).
    generators: a list, as for rollout()."""
    B, N = codes.shape
    stay = mask_schedule(N, T, schedule)
    when = torch.arange(T).repeat_interleave(torch.cat([torch.tensor([N]), stay[:-1]]) - stay).to(codes.device)    # (N,)
    place = _uniform((B, N), generators, codes.device).argsort(1)
    return Trajectory(codes, torch.empty_like(codes).scatter(1, place, when.expand(B, N)), codes.new_zeros(B, T, dtype=torch.float32), codes.expand(T, B, N))


def transition_log_prob(logits, codes, order, t, kind, *, threshold=None, sampled=None, cut=None, at_cut=None, noise=0.0):
    """log p_theta(s_{t+1} | s_t, a_t) -> Float[B], of the move that iteration t made; logits are those of state t.

    logits Float[B, N, K]; codes, order Long[B, N] as in Trajectory; t an int, or Long[B] where rows differ. All may be cut to
    the positions that count: the newly unmasked for p2, all masked ones for p1 and ar.
    kind "p2": Eq. 15, the newly unmasked alone. "p1": Eq. 14, times the probability, at every re-masked position, of a
    token less likely than threshold (Float[B] or [B, T]; None = its value under these logits); a re-masked position whose
    tail mass is zero (or too small for a float) is left out of the product (value and gradient 0). "ar": Eq. 13, every masked
    position with the token drawn there (sampled Long[B, N] or [T, B, N]).
    kind "gumbel": the move under the sampler's own noise, given the least noisy confidence that was unmasked (cut Float[B]), its
    position (at_cut Bool[B, N]) and the noise's temperature. With token k a position's confidence is log p_k + noise g, g standard
    Gumbel, which stays under the cut with probability F_k = exp(-exp(-(cut - log p_k) / noise)). So a re-masked position
    contributes sum_k p_k F_k, a newly unmasked one p_k (1 - F_k), the one at the cut p_k (the density of the cut itself is left
    out: it grows without bound as noise falls, and Eq. 14 has no such factor); where noise falls to 0, this becomes Eq. 14. The
    gradient grows as 1 / noise. All rows share one t. Where nothing is re-masked, the move is Eq. 15's. Sums are float32, float64 for float64 logits.
    Raises ValueError for an unknown kind, "ar" without sampled, "gumbel" without cut and at_cut."""
    if kind not in ("p1", "p2", "ar", "gumbel") or (kind == "ar" and sampled is None) or (kind == "gumbel" and (cut is None or at_cut is None)):
        raise ValueError(f"transition_log_prob: kind {kind!r} must be p1, p2, ar or gumbel; ar needs sampled, gumbel cut and at_cut")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))                            # (B, N, K)
    norm = logits.logsumexp(-1)  # and not log_softmax: no second (B, N, K) is kept for the backward pass
    rows = torch.arange(len(codes), device=codes.device)
    t = t.to(codes.device).expand(len(codes)) if torch.is_tensor(t) else int(t)
    pick = (lambda x: x[:, t]) if isinstance(t, int) else (lambda x: x[rows, t])                    # (B, T) -> (B,)
    now = t if isinstance(t, int) else t[:, None]
    new, remasked = order == now, order > now
    if kind == "ar":
        tokens = pick(sampled.transpose(0, 1)) if sampled.dim() == 3 else sampled
        return ((_at(logits, tokens) - norm) * (new | remasked)).sum(1)                             # Eq. 13
    conf = _at(logits, codes.clamp(max=logits.shape[-1] - 1)) - norm
    log_p2 = torch.where(new, conf, 0).sum(1)                                                       # Eq. 15
    if kind == "p2":
        return log_p2
    if kind == "gumbel":
        mass = checkpoint(_noisy_tail, logits, norm, cut.to(norm.dtype), noise, use_reentrant=False)
        above = (-torch.expm1(-_under(conf, cut[:, None].to(norm.dtype), noise))).log()             # log (1 - F)
        log_p2 = log_p2 + torch.where(new & ~at_cut & remasked.any(1, keepdim=True), above, 0).sum(1)
        counts = remasked & (mass > torch.finfo(mass.dtype).tiny)
        return log_p2 + torch.where(counts, mass, 1).log().sum(1)
    if threshold is None:
        threshold = conf.detach().exp().masked_fill(~new, math.inf).amin(1)
    elif threshold.dim() == 2:
        threshold = pick(threshold)
    mass = checkpoint(_tail, logits, norm, threshold, use_reentrant=False)                          # (B, N)
    counts = remasked & (mass > torch.finfo(mass.dtype).tiny)  # of a smaller one the gradient would overflow
    return log_p2 + torch.where(counts, mass, 1).log().sum(1)                                       # Eq. 14


def _tail(logits, norm, threshold):
    p = (logits - norm[..., None]).exp()
    return torch.where(p < threshold[:, None, None], p, 0).sum(-1)


def _under(log_p, cut, noise):
    """-log F of a confidence log_p + noise * Gumbel that stays under cut."""
    return ((log_p - cut) / max(noise, 1e-6)).clamp(-80, 80).exp()


def _noisy_tail(logits, norm, cut, noise):
    log_p = logits - norm[..., None]
    return (log_p.exp() * (-_under(log_p, cut[:, None, None], noise)).exp()).sum(-1)


def _at(logp, tokens):
    return logp.gather(-1, tokens[..., None])[..., 0]


# ------------------------------------------------------------------------------------- pictures from Show-o

import torch.distributed as dist  # noqa: E402  (not needed above)

from model import InputError, load_magvit, load_showo, to_uint8  # noqa: E402


def add_model_flags(p):
    """--model, --ckpt, --vq, --tokenizer, --device, --dtype and the sampler's settings, shared with eval_geneval.py."""
    p.add_argument("--model", default="showlab/show-o-512x512", help="hub id, folder or state_dict of Show-o; shapes = the tiny base")
    p.add_argument("--ckpt", help="weights to use in place of the model's: a checkpoint folder of train.py, or a state_dict")
    p.add_argument("--revision", help="commit or tag of the model's hub repository; ID@REVISION does the same for any hub id")
    p.add_argument("--vq", help="hub id or folder of MAGVIT-v2 (default: showlab/magvitv2, or that of shapes)")
    p.add_argument("--tokenizer", help="hub id or folder of the text tokenizer (default: the model's own, or microsoft/phi-1_5)")
    p.add_argument("--steps", type=in_range(int, 1), help="T, unmasking iterations (default: 50; shapes 16)")
    p.add_argument("--cfg", type=in_range(float, 0), help="guidance, 0 = none (default: 5; shapes 0)")
    p.add_argument("--temperature", type=in_range(float, 0), default=1.0, help="of the Gumbel noise in choose-and-move")
    p.add_argument("--schedule", choices=["cosine", "linear"], default="cosine")
    p.add_argument("--annealing", choices=["compound", "linear", "none"], default="compound", help="of the temperature; compound is Show-o's")
    p.add_argument("--batch", type=in_range(int, 1), help="pictures at a time, at least those of one prompt (default: 8; shapes 256)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of the weights, cast while loading; auto: bf16 on a GPU")


def load_models(model, *, ckpt=None, vq=None, tokenizer=None, revision=None, device="cpu", dtype=torch.float32):
    """Show-o and its image tokenizer -> (Showo, MAGVITv2, a line that says what was loaded). model "shapes" = the tiny base;
    ckpt: weights in place of the model's. Raises InputError, also when the two do not share a codebook."""
    where, images = ckpt or model, vq or ("shapes/magvitv2" if model == "shapes" else "showlab/magvitv2")
    showo = load_showo(where, tokenizer=tokenizer, device=device, dtype=dtype, revision=revision, like=model if ckpt else None)
    magvit = load_magvit(images, device=device)
    if math.isqrt(showo.N) ** 2 != showo.N:
        raise InputError(f"{where}: {showo.N} image tokens do not fill a square")
    if len(magvit.quantize.embedding) != showo.K:
        raise InputError(f"--vq {images}: has {len(magvit.quantize.embedding)} codes, but {where} {showo.K}; they do not belong together")
    size = lambda model: f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"  # noqa: E731
    phi = showo.phi_config
    return showo, magvit, (
        f"Show-o from {where}: {size(showo)} in {str(dtype)[6:]}, {phi.num_hidden_layers} layers of {phi.hidden_size}, N {showo.N}, "
        f"K {showo.K}; MAGVIT-v2 from {images}: {size(magvit)}; on {device}, peak memory of the load {peak_gib(device):.2f} GiB")


def drawer(args, say=True):
    """The flags of add_model_flags -> (draw(prompts, n, seeds) -> uint8 [len(prompts) * n, 3, H, W], pictures at a time, and
    what the pictures depend on); loads the models, and says which."""
    steps, cfg, batch = (default if value is None else value for value, default in zip(
        (args.steps, args.cfg, args.batch), (16, 0.0, 256) if args.model == "shapes" else (50, 5.0, 8)))
    showo, magvit, said = load_models(args.model, ckpt=args.ckpt, vq=args.vq, tokenizer=args.tokenizer, revision=args.revision,
                                      device=args.device, dtype=half_or_float(args.dtype, args.device))
    if say:
        print(said, flush=True)
    how = dict(T=steps, guidance=cfg, batch=batch, schedule=args.schedule, annealing=args.annealing, temperature=args.temperature)
    models = {"model": args.model, "ckpt": args.ckpt and str(Path(args.ckpt).absolute()), "revision": args.revision, "vq": args.vq}
    facts = models | {k: v for k, v in how.items() if k != "batch"} | {"dtype": str(showo.showo.dtype)[6:]}
    return lambda prompts, n, seeds: generate(showo, magvit, prompts, n=n, seeds=seeds, **how), batch, facts


def half_or_float(name, device):
    """--dtype -> torch.bfloat16 or torch.float32; auto: bf16 on a GPU."""
    half = name == "bf16" or (name == "auto" and torch.device(device).type == "cuda")
    if half and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # the head's products in tensor cores, 10 bits of mantissa
    return torch.bfloat16 if half else torch.float32


def peak_gib(device) -> float:
    """The most memory this process has held so far, in GiB: of the GPU, or resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


@torch.no_grad()
def generate(showo, magvit, prompts, *, n=1, T=50, guidance=5.0, seeds=None, batch=8, **how):
    """Draw n pictures of each prompt -> uint8 [len(prompts) * n, 3, H, W] on the CPU, the pictures of a prompt together.

    The n pictures of prompt i depend on seeds[i] (default i) and n, not on the other prompts. batch: pictures at a time, but
    never fewer than n. how: for rollout()."""
    pictures, per = [], max(1, batch // n)
    for i in range(0, len(prompts), per):
        chunk = prompts[i:i + per]
        prompt = showo.prefill(showo.encode(chunk), guided=bool(guidance)).repeat(n)
        generators = [torch.Generator(showo.device).manual_seed(seeds[i + k] if seeds else i + k) for k in range(len(chunk))]
        with showo.autocast():
            codes = rollout(lambda codes, at: showo.logits(codes, prompt, guidance=guidance, at=at), len(prompt), showo.N, showo.K, T,
                            generator=generators, masked_only=True, **how).codes
        pictures.append(to_uint8(magvit.decode(codes)).cpu())
    return torch.cat(pictures)


def grid(images, captions, columns, scale=None):
    """uint8 [B, 3, H, W] and a caption (or "") under each -> PIL image; small pictures are enlarged to about 128 pixels."""
    scale = scale or max(1, 128 // images.shape[-1])
    font, (h, w) = ImageFont.load_default(size=11), (side * scale for side in images.shape[-2:])
    text = 28 if any(captions) else 0
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (w + 4), rows * (h + 4 + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * (w + 4) + 2, i // columns * (h + 4 + text) + 2
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.NEAREST), (x, y))
        for line, words in enumerate(_wrap(caption, w, font)[:2]):
            draw.text((x, y + h + 1 + 13 * line), words, "black", font)
    return sheet


def _wrap(text, width, font):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = lines[:-1] + [longer] if font.getlength(longer) <= width else lines + [word]
    return lines


def read_prompts(path) -> list[dict]:
    """A prompt file -> [{"prompt": ..., ...}]: .jsonl, one object a line with "prompt", optional "reward_prompt" and GenEval
    metadata; any other name, one prompt a line. Empty lines are skipped. Raises InputError with the line's number."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read ({error.strerror or error if isinstance(error, OSError) else 'it is not UTF-8 text'})") from None
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = {"prompt": line.strip()}
        if str(path).endswith(".jsonl"):
            try:
                entry = json.loads(line)
            except ValueError:
                raise InputError(f"--prompts {path}: line {number} is not JSON") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not isinstance(entry.get("reward_prompt", ""), str):
                raise InputError(f'--prompts {path}: line {number} has no "prompt" text, or a "reward_prompt" that is none')
        out.append(entry)
    if not out:
        raise InputError(f"--prompts {path}: no prompts in it")
    return out


# ------------------------------------------------------------------------------------------ command lines

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose --help shows the defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def in_range(kind, low, high=float("inf")):
    """An argparse type: kind (int or float) between low and high, both included."""
    def parse(text):
        """The text of a flag -> its value; raises ArgumentTypeError."""
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not low <= value <= high or abs(value) == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {f'at least {low}' if high == float('inf') else f'from {low} to {high}'}")
        return value
    return parse


def run(main):
    """Call main(); an InputError, or a disk that refuses, becomes one line and exit code 2, of one process while all do the same."""
    try:
        main()
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EFBIG):
                raise
            error = f"{error.filename or 'a file'}: {error.strerror}; make room, or choose another place"
        rank = os.environ.get("RANK", "0")
        if rank == "0" or dist.is_initialized():
            print(f"{Path(sys.argv[0]).name}: {f'process {rank}: ' if rank != '0' else ''}error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def setup(device=None):
    """device: a name, None = a GPU where there is one -> rank, world size, torch.device; under torchrun, joins the others.
    Raises InputError for a device that is not there."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise InputError(f"--device {device}: cannot be used ({str(error).splitlines()[0][:100]})") from None
    if world > 1:  # several processes on a CPU, or one GPU each
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return rank, world, device


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def main():
    p = Parser("Draw pictures with Show-o: one PNG, a grid when there are several.")
    p.add_argument("--prompt", action="append", default=[], help="a text; can be given several times")
    p.add_argument("--prompts", help="a file of prompts: txt, one a line, or jsonl with \"prompt\"")
    p.add_argument("--n", type=in_range(int, 1), default=1, help="pictures per prompt")
    p.add_argument("--seed", type=in_range(int, 0, 2 ** 40), default=0)
    p.add_argument("--out", help="the PNG to write (default: sample-TIME.png)")
    add_model_flags(p)
    args = p.parse_args()
    prompts = args.prompt + [line["prompt"] for line in (read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        p.error("give --prompt TEXT or --prompts FILE")
    out = Path(args.out or time.strftime("sample-%Y%m%d-%H%M%S.png"))
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir() or out.is_dir():
        p.error(f"--out {out}: must be a .png in a folder that exists")
    _, _, args.device = setup(args.device)
    draw, _, _ = drawer(args)
    pictures = draw(prompts, args.n, [args.seed * 1_000_003 + i for i in range(len(prompts))])
    if len(pictures) == 1:
        Image.fromarray(pictures[0].permute(1, 2, 0).numpy()).save(out)
    else:
        columns = args.n if len(prompts) > 1 and args.n > 1 else math.ceil(math.sqrt(len(pictures)))
        grid(pictures, [prompt for prompt in prompts for _ in range(args.n)], columns).save(out)
    print(f"{len(pictures)} pictures of {len(prompts)} prompts in {out}")


if __name__ == "__main__":
    run(main)
