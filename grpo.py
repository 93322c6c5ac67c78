"""GRPO for the unmasking MDP (Mask-GRPO, arXiv 2510.13418, Eq. 10-12 and Sec. 3.3).

Tensors only; torch is the only import, so that it can be copied into any trainer. P prompts, G
samples of each, T iterations.

Departures from the paper:
- the log of a ratio is bounded by 60, so that no gradient is NaN;
- the filter sees some groups before it acts, and keeps the stds of all groups of the run;
- the "mean" advantage and the mean token's ratio are later work's, off by default.
Departures from the released code, which are the paper's:
- released: the KL compares the policy with itself, whose gradient is 0; here: with a frozen one;
- released: the ratio is always 1; here: it leaves 1 when rollouts serve a second optimizer step;
- released: no sample filter; here: SampleFilter;
- released: advantages are divided by std + 1e-4; here: by std, and equal rewards have zero.
"""
import torch


def group_advantages(rewards, kind="std"):
    """Return the advantages of rewards Float[P, G], each group against its own mean: Float[P, G].

    kind "mean": not divided by the standard deviation (Dr. GRPO, arXiv 2503.20783). The standard
    deviation is the sample's (G - 1). A group of equal rewards has zero advantages. Raises
    ValueError for another kind, or G below 2."""
    if rewards.dim() != 2 or rewards.shape[1] < 2 or kind not in ("std", "mean"):
        raise ValueError(f"group_advantages: rewards of shape {list(rewards.shape)}, wanted [P, G] "
                         f"with G of at least 2; kind {kind!r}, wanted std or mean")
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    equal = std <= 1e-6 * rewards.abs().amax(1, keepdim=True)   # rounding of the mean, no more
    scale = torch.where(equal | (kind == "mean"), 1.0, std)
    return torch.where(equal, 0.0, (rewards - mean) / scale)                        # Eq. 12


def clipped_objective(logp, logp_old, adv, clip_low=0.9, clip_high=1.2, length=1):
    """Return Eq. 10 without its KL, to be maximised: a scalar.

    logp Float[B] or [B, T]: transition log-probabilities; logp_old: those of the policy that
    sampled, without gradient; adv Float[B]. clip_low = 1 - e_low and clip_high = 1 + e_high bound
    the ratio. length: tokens that a log-probability sums over; given, the ratio is that of the mean
    token (GSPO, arXiv 2507.18071, Eq. 7)."""
    adv = adv.reshape(adv.shape + (1,) * (logp.dim() - adv.dim()))
    log_ratio = (logp - logp_old.detach()) / length
    ratio = log_ratio.clamp(max=60).exp()                                           # Eq. 11
    clipped = ratio.clamp(clip_low, clip_high)
    return torch.min(ratio * adv, clipped * adv).mean()                             # Eq. 10


def kl_k3(logp, logp_ref):
    """Return the KL(pi_theta || pi_ref) of Eq. 10 by its k3 estimator, exp(d) - d - 1 with d =
    logp_ref - logp: a scalar of at least 0. Its gradient flows through logp.

    With Eq. 14, d jumps where a code crosses the threshold: after one optimizer step the estimate
    can reach 9e7, and a few moves dominate the gradient; with a KL, prefer Eq. 15.
    Source: J. Schulman, "Approximating KL divergence" (2020); GRPO's choice."""
    d = (logp_ref.detach() - logp).clamp(max=60)
    return (d.expm1() - d).mean()


class SampleFilter:
    """Sec. 3.3: a group whose reward std lies under a percentile of the history's is sampled again.

    percentile: of the history, 0-100; warmup: groups to see before it acts. All groups that are
    judged enter the history, the rejected ones too, so that the bar does not rise by itself."""

    def __init__(self, percentile=10.0, warmup=50):
        if not 0 <= percentile <= 100:
            raise ValueError(f"SampleFilter: percentile {percentile} is not between 0 and 100")
        self.percentile, self.warmup, self.history = percentile, warmup, []

    @property
    def bar(self):
        """The std that a group must reach now; None while warming up."""
        if len(self.history) < max(self.warmup, 1):
            return None
        history = torch.tensor(self.history, dtype=torch.float64)
        return torch.quantile(history, self.percentile / 100).item()

    def keep(self, std):
        """Return Bool[P], False where a new group of reward std Float[P] is to be sampled again;
        then remember them. A std that is not finite is kept and not remembered."""
        bar = self.bar
        kept = torch.ones_like(std, dtype=torch.bool) if bar is None else ~(std < bar)
        self.history += std[std.isfinite()].tolist()
        return kept

    def state_dict(self):
        return {"history": list(self.history)}

    def load_state_dict(self, state):
        self.history = list(state["history"])
