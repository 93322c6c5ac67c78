"""GRPO for the unmasking MDP (Mask-GRPO, arXiv 2510.13418, Eq. 10-12, and the sample filter of Sec. 3.3).

Tensors only; imports torch alone, so it can be copied into any trainer. P prompts, G samples each, T iterations.

Departures from the paper: ratios are bounded by e^60, so that no gradient is NaN; `kind` and `length` are later work's, off by
default. From the released code: its KL compares the policy with itself (no gradient) and its ratio is always 1 (the clip never
acts); here the KL is against a frozen reference, and the ratio leaves 1 as soon as rollouts are used for a second optimizer
step. Its filter is missing; here is one.
"""
import torch


def group_advantages(rewards, kind="std"):
    """Eq. 12: A^j = (R^j - mean R) / std R within each group. rewards Float[P, G] -> Float[P, G].

    kind "mean": no division by the standard deviation, so that groups of little spread weigh less (Dr. GRPO, arXiv 2503.20783).

    The standard deviation is the sample's (divided by G - 1). A group whose rewards are all equal teaches nothing: its
    advantages are 0. Raises ValueError when G < 2."""
    if rewards.dim() != 2 or rewards.shape[1] < 2 or kind not in ("std", "mean"):
        raise ValueError(f"group_advantages: rewards of shape {list(rewards.shape)}, wanted [P, G] with G of at least 2; kind {kind!r}, wanted std or mean")
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    equal = std <= 1e-6 * rewards.abs().amax(1, keepdim=True)  # the rounding error of the mean, not a difference
    return torch.where(equal, 0.0, centred / torch.where(equal | (kind == "mean"), 1.0, std))


def clipped_objective(logp, logp_old, adv, clip_low=0.9, clip_high=1.2, length=1):
    """Eq. 10 without its KL, to be maximised: the mean of min(r A, clip(r, clip_low, clip_high) A) -> Float, a scalar.

    Eq. 11: r = exp(logp - logp_old), logp Float[..., T] or [B] the transition log-probabilities, logp_old those of the
    policy that sampled (no gradient); adv broadcasts over the trailing dimensions it lacks. clip_low and clip_high bound
    the ratio itself: 1 - e_low and 1 + e_high. length: how many tokens a log-probability sums over; given, the ratio is that of
    the mean token, r^(1 / length) (GSPO, arXiv 2507.18071, Eq. 7)."""
    adv = adv.reshape(adv.shape + (1,) * (logp.dim() - adv.dim()))
    ratio = ((logp - logp_old.detach()) / length).clamp(max=60).exp()       # Eq. 11; of an infinite one the clipped branch's gradient is NaN
    return torch.min(ratio * adv, ratio.clamp(clip_low, clip_high) * adv).mean()


def kl_k3(logp, logp_ref):
    """Mean of the k3 estimator of KL(pi_theta || pi_ref), exp(d) - d - 1 with d = logp_ref - logp -> Float, a scalar >= 0.

    Its gradient flows through logp. Source: J. Schulman, "Approximating KL divergence" (2020); used by GRPO."""
    d = (logp_ref.detach() - logp).clamp(max=60)
    return (d.expm1() - d).mean()


class SampleFilter:
    """Sec. 3.3: a group whose reward std lies under a percentile of the history's is to be sampled again.

    percentile: of the history, 0-100; warmup: groups to see before it acts; window: groups remembered, None = all.
    Every group that is judged enters the history, the rejected ones too, so that the bar does not rise by itself."""

    def __init__(self, percentile=10.0, warmup=50, window=None):
        if not 0 <= percentile <= 100:
            raise ValueError(f"SampleFilter: percentile {percentile} is not between 0 and 100")
        self.percentile, self.warmup, self.window, self.history = percentile, warmup, window, []

    @property
    def bar(self):
        """The std a group must reach now; None while warming up."""
        if len(self.history) < max(self.warmup, 1):
            return None
        return torch.quantile(torch.tensor(self.history, dtype=torch.float64), self.percentile / 100).item()

    def keep(self, std):
        """std Float[P] of new groups -> Bool[P], False where the group is to be sampled again; then remembers them."""
        bar = self.bar
        kept = torch.ones_like(std, dtype=torch.bool) if bar is None else std >= bar
        self.history += std.tolist()
        if self.window:
            self.history = self.history[-self.window:]
        return kept

    def state_dict(self):
        return {"history": list(self.history)}

    def load_state_dict(self, state):
        self.history = list(state["history"])
