"""grpo.py against a slow float64 version of Eq. 10-12 written out loop by loop, and against finite
differences."""
import math
import statistics

import pytest
import torch

from grpo import SampleFilter, clipped_objective, group_advantages, kl_k3
from sample import rollout, transition_log_prob


def test_advantages():
    rewards = torch.tensor([[1.0, 2, 3, 6], [5, 5, 5, 5], [0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1]])
    adv = group_advantages(rewards)
    for row, group in zip(adv.tolist(), rewards.tolist(), strict=True):
        std = statistics.stdev(group) if len(set(group)) > 1 else 1.0
        assert row == pytest.approx([(r - statistics.mean(group)) / std for r in group], abs=1e-6)
    assert (adv[1] == 0).all() and (adv[3] == 0).all()
    torch.testing.assert_close(group_advantages(rewards * 100 + 7)[[0, 2]], adv[[0, 2]])


def test_a_reward_without_a_score_stands_in_no_mean():
    rewards = torch.tensor([[1.0, math.nan, 2, 6], [math.nan, math.nan, 1, math.nan], [1, 2, 3, 4]])
    adv = group_advantages(rewards)
    torch.testing.assert_close(adv[0, [0, 2, 3]], group_advantages(torch.tensor([[1.0, 2, 6]]))[0])
    assert adv[0, 1] == 0 and (adv[1] == 0).all()
    assert torch.equal(adv[2], group_advantages(rewards[2:])[0])


def test_far_ratios_have_a_finite_gradient():
    logp = torch.tensor([95.0, 95.0, -95.0, -95.0], requires_grad=True)
    value = clipped_objective(logp, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    value.backward()
    assert value.isfinite() and logp.grad.isfinite().all()

    far = torch.tensor([-95.0], requires_grad=True)
    kl_k3(far, torch.zeros(1)).backward()
    assert far.grad.isfinite().all()


def slow_objective(logp, old, ref, adv, low, high, beta):
    """Return Eq. 10 for logp[j][t] as Python floats."""
    total = 0.0
    for j in range(len(logp)):
        over_t = 0.0
        for t in range(len(logp[j])):
            ratio = math.exp(logp[j][t] - old[j][t])                                # Eq. 11
            clipped = min(max(ratio, low), high)
            d = ref[j][t] - logp[j][t]
            kl = math.exp(d) - d - 1
            over_t += min(ratio * adv[j], clipped * adv[j]) - beta * kl
        total += over_t / len(logp[j])
    return total / len(logp)


def test_objective_is_equation_10():
    torch.manual_seed(0)
    logp, old, ref = (torch.randn(6, 5, dtype=torch.float64) * s for s in (0.3, 0.3, 0.2))
    adv = torch.randn(6, dtype=torch.float64)
    ours = clipped_objective(logp - old, adv[:, None], 0.9, 1.2) - 0.3 * kl_k3(logp, ref)
    as_lists = [x.tolist() for x in (logp, old, ref, adv)]
    assert ours.item() == pytest.approx(slow_objective(*as_lists, 0.9, 1.2, 0.3), abs=1e-12)
    assert kl_k3(logp, ref) > 0 and kl_k3(logp, logp) == 0


@pytest.mark.parametrize("sign, free", [(1.0, [True, True, True, True, False]),
                                        (-1.0, [False, True, True, True, True])])
def test_clip_is_asymmetric_and_stops_the_gradient(sign, free):
    ratio = torch.tensor([0.8, 0.95, 1.0, 1.1, 1.3], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    clipped_objective(logp, torch.full((5,), sign)).backward()
    assert [g != 0 for g in logp.grad.tolist()] == free


def objective_of(weights, traj, adv, kind, old, reference, low=0.9, high=1.2):
    """Return Eq. 10 of a toy policy, logits = weights[state] mixed along the row, all iterations at
    once, and its log-probabilities. old: None = those of this policy."""
    columns, ref_columns = [], []
    for t in range(traj.threshold.shape[1]):
        state = traj.state(t)
        columns.append(transition_log_prob(weights[state].cumsum(1), traj, t, kind))
        ref_columns.append(transition_log_prob(reference[state].cumsum(1), traj, t, kind))
    logp, logp_ref = torch.stack(columns, 1), torch.stack(ref_columns, 1)
    old = logp.detach() if old is None else old
    objective = clipped_objective(logp - old, adv[:, None], low, high)
    return objective - 0.05 * kl_k3(logp, logp_ref), logp


@pytest.mark.parametrize("kind", ["p1", "p2", "ar"])
@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_gradient_matches_finite_differences(kind, moved):
    generator = torch.Generator().manual_seed(0)
    K, T = 4, 3

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)
    sampling = noise(K + 1, K)
    traj = rollout(lambda codes: sampling[codes].cumsum(1), 6, 5, K, T, generator=generator)
    traj.threshold = traj.threshold.double()
    adv = group_advantages(noise(2, 3)).flatten()
    reference = sampling + 0.1 * noise(K + 1, K)
    _, old = objective_of(sampling, traj, adv, kind, None, reference)

    weights = (sampling + moved * noise(K + 1, K)).requires_grad_()
    value, logp = objective_of(weights, traj, adv, kind, old.detach(), reference)
    value.backward()
    ratio = (logp - old).exp()
    for kink in (0.9, 1.2):     # none within the difference
        assert (ratio.sub(kink).abs() > 1e-4).all()
    assert moved == 0 or ((ratio > 1.2) | (ratio < 0.9)).any()

    numeric = torch.zeros_like(weights)
    with torch.no_grad():
        for i in range(weights.numel()):
            for sign in (1, -1):
                nudged = weights.clone()
                nudged.view(-1)[i] += sign * 1e-6
                value, _ = objective_of(nudged, traj, adv, kind, old, reference)
                numeric.view(-1)[i] += sign * value / 2e-6
    torch.testing.assert_close(weights.grad, numeric, atol=1e-7, rtol=1e-5)


def judge(f, std):
    """Ask a filter about groups and let it remember them -> Bool[P]."""
    passed = f.passes(std)
    f.remember(std)
    return passed


def test_filter_rejects_low_groups_after_its_warmup():
    f = SampleFilter(percentile=10, warmup=10)
    assert judge(f, torch.tensor([0.0] + [1.0] * 8)).all() and f.bar is None
    assert judge(f, torch.tensor([0.0])).all()
    assert judge(f, torch.tensor([0.5])).all()      # 2 of 10 are 0: the 10th percentile is 0
    judge(f, torch.linspace(1, 2, 30))
    assert f.bar == pytest.approx(sorted(f.history)[4])     # of 41, the fifth smallest
    passed = judge(f, torch.tensor([0.4, 0.99, 1.0, 3.0]))
    assert passed.tolist() == [False, False, True, True]
    assert len(f.history) == 45                     # rejected groups are remembered too
    assert f.passes(torch.ones(9)).all() and len(f.history) == 45       # asking changes nothing


def test_a_group_without_spread_is_low_even_where_the_bar_is_0():
    """Rewards of 0 and 1: nearly half of all groups have no spread, nothing lies under the bar."""
    f = SampleFilter(percentile=10, warmup=4)
    judge(f, torch.tensor([0.0, 0.0, 0.5, 0.5]))
    assert f.bar == 0
    assert judge(f, torch.tensor([0.0, 0.5, math.nan])).tolist() == [False, True, True]


def test_filter_keeps_what_is_not_finite_and_forgets_it():
    f = SampleFilter(percentile=50, warmup=1)
    judge(f, torch.ones(4))
    passed = judge(f, torch.tensor([math.nan, math.inf, 0.5]))
    assert passed.tolist() == [True, True, False] and f.history == [1, 1, 1, 1, 0.5]


def test_filter_state():
    f, g = SampleFilter(warmup=2), SampleFilter(warmup=2)
    f.remember(torch.rand(30))
    g.load_state_dict(f.state_dict())
    assert g.bar == f.bar is not None
    f.remember(torch.ones(3))
    assert len(g.history) == 30
