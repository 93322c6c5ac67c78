"""GRPO for the unmasking MDP (Mask-GRPO, arXiv 2510.13418, Eq. 10-12 and Sec. 3.3).

Tensors only; torch is the only import, so that it can be copied into any trainer. P prompts, G
samples of each, T iterations.

Departures from the paper:
- the log of a ratio is bounded by 60, so that no gradient is NaN;
- the filter sees some groups before it acts, and keeps the stds of all groups of the run;
- a reward that is not finite (no score) has advantage 0, and its group goes on without it.
Where the released code departs from the paper, and this file does not:
- released: the KL compares the policy with itself, whose gradient is 0; here: with a frozen one;
- released: the ratio is always 1; here: it leaves 1 when rollouts serve a second optimizer step;
- released: no sample filter; here: SampleFilter;
- released: advantages are divided by std + 1e-4; here: by std, and equal rewards have zero.
"""
import torch


def group_advantages(rewards):
    """Return the advantages of rewards Float[P, G], each group against its own mean: Float[P, G].

    The standard deviation is the sample's (G - 1). Equal rewards have zero advantages. A reward
    that is not finite has A = 0 and stands in no mean or standard deviation."""
    adv = torch.zeros_like(rewards)
    for group, A in zip(rewards, adv, strict=True):
        scored = group.isfinite()
        R = group[scored]
        equal = len(R) < 2 or R.std() <= 1e-6 * R.abs().amax()      # the spread is rounding alone
        if not equal:
            A[scored] = (R - R.mean()) / R.std()                                    # Eq. 12
    return adv


def clipped_objective(logp, logp_old, adv, clip_low=0.9, clip_high=1.2, length=1):
    """Return Eq. 10 without its KL, to be maximised: a scalar.

    logp Float[B] or [B, T]: transition log-probabilities; logp_old: those of the policy that
    sampled, without gradient; adv Float[B]. clip_low = 1 - e_low and clip_high = 1 + e_high bound
    the ratio. It is a mean over the rows given: weigh that of a micro-batch by its share of all
    rows, len(rows) / B, before backward().

    length: 1 for the ratio of Eq. 11. The geometric mean of the tokens' ratios (GSPO, arXiv
    2507.18071, Eq. 7) takes the number of tokens that logp sums over, which is the M of
    traj.positions(t, kind): n_t with Eq. 15, all masked ones with Eq. 13 and 14."""
    adv = adv.reshape(adv.shape + (1,) * (logp.dim() - adv.dim()))
    log_ratio = (logp - logp_old.detach()) / max(length, 1)
    ratio = log_ratio.clamp(max=60).exp()                                           # Eq. 11
    clipped = ratio.clamp(clip_low, clip_high)
    return torch.min(ratio * adv, clipped * adv).mean()                             # Eq. 10


def kl_k3(logp, logp_ref):
    """Return the KL(pi_theta || pi_ref) of Eq. 10 by its k3 estimator, exp(d) - d - 1 with d =
    logp_ref - logp: a scalar of at least 0. Its gradient flows through logp.

    Give it Eq. 15's log-probabilities even when the ratio is Eq. 14's: those jump where a code
    crosses the threshold, and after one optimizer step the estimate can reach 9e7.
    Source: J. Schulman, "Approximating KL divergence" (2020); GRPO's choice."""
    d = (logp_ref.detach() - logp).clamp(max=60)
    return (d.expm1() - d).mean()


class SampleFilter:
    """Sec. 3.3: a group whose reward std lies under a percentile of the history's is sampled again.

    percentile: of the history, 0-100; warmup: groups to see before it acts. All groups that are
    judged enter the history, the rejected ones too, so that the bar does not rise by itself."""

    def __init__(self, percentile=10.0, warmup=50):
        self.percentile, self.warmup, self.history = percentile, warmup, []

    @property
    def bar(self):
        """The std that a group must reach now; None while warming up."""
        if len(self.history) < max(self.warmup, 1):
            return None
        history = torch.tensor(self.history, dtype=torch.float64)
        return torch.quantile(history, self.percentile / 100).item()

    def judge(self, std):
        """Judge groups by their reward std Float[P], then remember it: call it once for each sample
        of a group, with the groups of all processes. Return Bool[P], False where a group is to be
        sampled again (by the caller). A std that is not finite passes, and is not remembered."""
        bar = self.bar
        passed = torch.ones_like(std, dtype=torch.bool) if bar is None else ~(std < bar)
        self.history += std[std.isfinite()].tolist()
        return passed

    keep = judge        # the old name

    def state_dict(self):
        return {"history": list(self.history)}

    def load_state_dict(self, state):
        self.history = list(state["history"])
