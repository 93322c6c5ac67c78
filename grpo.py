"""GRPO for the unmasking MDP (Mask-GRPO, arXiv 2510.13418, Eq. 10-12 and Sec. 3.3).

Tensors only; torch is the only import, so that it can be copied into any trainer. P prompts, G
samples of each, T iterations.

Departures from the paper:
- the log of a ratio is bounded by 60, so that no gradient is NaN;
- the filter sees some groups before it acts, and keeps the stds of all groups of the run; a group
  without any spread is low, too; a second sample is taken as it is;
- a reward that is not finite (no score) has advantage 0, and its group goes on without it.
Where the released code departs from the paper, and this file does not:
- released: the KL compares the policy with itself, whose gradient is 0; here: with a frozen one;
- released: the ratio is always 1; here: it leaves 1 when rollouts serve a second optimizer step;
- released: no sample filter; here: SampleFilter;
- released: the least of two means over a group's terms; here: Eq. 10's mean of least terms;
- released: advantages are divided by std + 1e-4; here: by std, and equal rewards have zero.
"""
import torch


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantages of rewards Float[P, G], each group against its own mean: Float[P, G].

    The standard deviation is the sample's (G - 1). Equal rewards have zero advantages. A reward
    that is not finite has A = 0 and is left out of its group's mean and standard deviation."""
    adv = torch.zeros_like(rewards)
    for group, A in zip(rewards, adv, strict=True):
        scored = group.isfinite()
        R = group[scored]
        equal = len(R) < 2 or R.std() <= 1e-6 * R.abs().amax()      # equal up to rounding
        if not equal:
            A[scored] = (R - R.mean()) / R.std()                                    # Eq. 12
    return adv


def clipped_objective(log_ratio: torch.Tensor, adv: torch.Tensor, clip_low: float = 0.9,
                      clip_high: float = 1.2) -> torch.Tensor:
    """Return Eq. 10 without its KL, to be maximised: a scalar, the mean over the rows given.

    log_ratio Float[B]: the log of Eq. 11, transition_log_prob() minus its value under the policy
    that sampled, which has no gradient. For the geometric mean of the tokens' ratios (GSPO, arXiv
    2507.18071, Eq. 7) divide it by their number, at least 1: the M of traj.positions(t, kind).
    adv Float[B]. clip_low = 1 - e_low and clip_high = 1 + e_high bound the ratio. Weigh a
    micro-batch by its share of all rows."""
    ratio = log_ratio.clamp(max=60).exp()                                           # Eq. 11
    clipped = ratio.clamp(clip_low, clip_high)
    return torch.min(ratio * adv, clipped * adv).mean()                             # Eq. 10


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """Return the KL(pi_theta || pi_ref) of Eq. 10 by its k3 estimator, exp(d) - d - 1 with d =
    logp_ref - logp: a scalar of at least 0. Its gradient flows through logp.

    Give it Eq. 15's log-probabilities even when the ratio is Eq. 14's: those jump where a code
    crosses the threshold, and after one optimizer step the estimate can reach 9e7.
    Source: J. Schulman, "Approximating KL divergence" (2020); GRPO's choice."""
    d = (logp_ref.detach() - logp).clamp(max=60)
    return (d.expm1() - d).mean()


class SampleFilter:
    """Sec. 3.3: a group whose reward std is below a percentile of all stds so far is sampled again.

    percentile: of the history, 0-100; warmup: groups to see before it acts. The history holds all
    sampled groups: if only those that passed counted, the bar would climb by itself."""

    def __init__(self, percentile: float = 10.0, warmup: int = 50):
        self.percentile, self.warmup, self.history = percentile, warmup, []

    @property
    def bar(self) -> float | None:
        """The std that a group must reach now; None while warming up."""
        if len(self.history) < max(self.warmup, 1):
            return None
        history = torch.tensor(self.history, dtype=torch.float64)
        return torch.quantile(history, self.percentile / 100).item()

    def passes(self, std: torch.Tensor) -> torch.Tensor:
        """Return Bool[P], False where the caller should sample again, for groups' reward stds
        Float[P]. After the warm-up equal rewards never pass (the bar of 0-1 rewards is often 0);
        NaN always does."""
        bar = self.bar
        low = torch.zeros_like(std, dtype=torch.bool) if bar is None else (std < bar) | (std == 0)
        return ~low

    def remember(self, std: torch.Tensor) -> None:
        """Add the stds of groups, of all processes, to the history; NaN is left out."""
        self.history += std[std.isfinite()].tolist()

    def state_dict(self) -> dict:
        return {"history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        self.history = list(state["history"])
