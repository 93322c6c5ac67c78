"""sample.py: the official moves and transition probabilities, the properties that make Eq. 14 a
probability, pictures and the command."""
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bench import plain_phi
from helpers import CLOSE, DATA, ROOT, read_json, run
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import chi2

import sample
import train
from model import Prompt, Showo
from sample import Trajectory, choose_and_move, mask_schedule, rollout, take, transition_log_prob
from shapes import world
from support import processes


def seeded(*seeds):
    """Return a generator of each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def toy_policy(K, seed=3):
    """Return a policy whose logits depend on the codes up to each position."""
    weights = torch.randn(K + 1, K, generator=torch.Generator().manual_seed(seed))

    def policy(codes):
        return weights[codes].cumsum(1)
    return policy


def same(a, b):
    """Demand that two trajectories are equal."""
    for name in ("codes", "order", "threshold"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert list(a.n_masked) == list(b.n_masked)
    assert (a.sampled is None) == (b.sampled is None)
    assert a.sampled is None or torch.equal(a.sampled, b.sampled)


def test_schedule_and_temperature_are_the_official_ones():
    for case in read_json("sampling/mask_len.json"):
        ours = mask_schedule(case["N"], case["T"], case["schedule"])
        assert ours[:-1].tolist() == case["mask_len"][:-1] and ours[-1] == 0
        assert sample.temperatures(case["T"]) == pytest.approx(case["temperature"], abs=1e-12)


def test_more_iterations_than_tokens_and_noise_that_compounds():
    assert mask_schedule(3, 6).tolist() == [2, 1, 1, 1, 1, 0]
    assert mask_schedule(5, 1).tolist() == [0]
    assert sample.temperatures(4, 2.0) == pytest.approx([1.5, 0.75, 0.1875, 0.0])


# ------------------------------------------------------------------------------ moves

def test_moves_are_the_official_ones():
    tensors = load_file(DATA / "sampling/step_cases.safetensors")
    for case in read_json("sampling/step_cases.json"):
        probs, ids, unknown, mask_len, gumbel, newly_unmasked, masking, threshold = (
            tensors[f"{case['case']}.{name}"] for name in (
                "probs", "sampled_ids", "unknown", "mask_len", "gumbel", "newly_unmasked",
                "masking", "threshold_min"))
        conf = take(probs, ids)
        new = choose_and_move(conf.clamp(min=1e-20).log(), unknown, mask_len, case["temperature"],
                              gumbel)
        assert torch.equal(new, newly_unmasked)
        assert torch.equal(unknown & ~new, masking)
        assert torch.equal(conf.masked_fill(~new, math.inf).amin(1), threshold)


def one_move(logits, sampled, order, t, threshold=None):
    """Return the Trajectory of a move at iteration t that drew these tokens; its threshold by
    these logits, if none is given."""
    if threshold is None:
        conf = take(logits.detach().softmax(-1), sampled)
        threshold = conf.masked_fill(order != t, math.inf).amin(1, keepdim=True).expand(-1, t + 1)
    draws = sampled[..., None].expand(-1, -1, t + 1)
    return Trajectory(sampled, order, threshold, logits.shape[-1], None, draws)


def recorded_moves():
    """Yield the recorded moves: name, facts, logits (1, N, K), sampled (1, N), order (1, N) with
    the move at iteration 1, and noise (1, N) or None."""
    for file in ("transitions", "synthetic_transitions"):
        tensors = load_file(DATA / f"sampling/{file}.safetensors")
        entries = read_json(f"sampling/{file}.json")
        if file == "transitions":
            entries = entries["trajectories"]
        for entry in entries:
            own = {name.removeprefix(f"{entry['name']}."): value for name, value in tensors.items()
                   if name.startswith(f"{entry['name']}.")}
            for t, step in enumerate(entry.get("steps", [entry])):
                at = {name: value[t] if "steps" in entry else value for name, value in own.items()}
                order = torch.where(at["newly_unmasked"], 1, torch.where(at["remasked"], 2, 0))
                gumbel = at["gumbel"][None] if "steps" in entry else None
                yield (entry["name"], step, at["image_logits"][None], at["sampled_ids"][None],
                       order[None], gumbel)


def test_recorded_moves_and_their_log_probabilities():
    n_zero = n_moved = 0
    for name, step, logits, sampled, order, gumbel in recorded_moves():
        wanted = {"p1": step["log_p1_nonzero"], "p2": step["log_p2"], "ar": step["log_p_ar"]}
        for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            threshold = torch.tensor([[math.nan, step["threshold"]]], dtype=dtype)
            traj = one_move(logits, sampled, order, 1, threshold)
            values = {kind: transition_log_prob(logits.to(dtype), traj, 1, kind).item()
                      for kind in ("p1", "p2", "ar")}
            assert values == pytest.approx(wanted, abs=atol), name
        n_zero += step["zero_mass_count"]
        if gumbel is not None:
            conf = take(logits.softmax(-1), sampled)
            new = choose_and_move(conf.clamp(min=1e-20).log(), order > 0, step["mask_len"],
                                  step["temperature"], gumbel)
            assert torch.equal(new, order == 1)
            n_moved += 1
    assert n_zero > 10 and n_moved > 10


def test_rows_move_on_their_own():
    torch.manual_seed(5)
    logp, gumbel = torch.randn(4, 9), torch.randn(4, 9)
    masked = torch.rand(4, 9) < 0.7
    stay = torch.tensor([1, 3, 2, 5])
    together = choose_and_move(logp, masked, stay[:, None], 0.7, gumbel)
    for i in range(4):
        row = slice(i, i + 1)
        alone = choose_and_move(logp[row], masked[row], int(stay[i]), 0.7, gumbel[row])
        assert torch.equal(together[row], alone)


def test_of_equal_confidences_the_later_position_moves():
    masked = torch.tensor([[True, False, True, True]])
    new = choose_and_move(torch.zeros(1, 4), masked, 2, 0.0, None)
    assert new.tolist() == [[False, False, False, True]]


def test_infinite_noise_cannot_mask_what_is_unmasked():
    masked = torch.tensor([[False, True, True, True]])
    noise = torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]])
    new = choose_and_move(torch.zeros(1, 4), masked, 1, 1.0, noise)
    assert new.tolist() == [[False, False, True, True]]
    silent = choose_and_move(torch.zeros(1, 4), masked, 1, 0.0, torch.full((1, 4), -math.inf))
    assert silent.sum() == 2


@pytest.mark.parametrize("K", [1, 7, 64, 256, 8192])
def test_codes_are_drawn_where_the_cumulated_probabilities_pass_u(K):
    g = torch.Generator().manual_seed(0)
    probs = (6 * torch.randn(20, 50, K, generator=g)).softmax(-1)
    probs[:, :, K // 2] = 0 if K > 1 else 1
    u = torch.rand(20, 50, 1, dtype=torch.float64, generator=g)
    u[0], u[1] = 0.0, 1 - 2 ** -53
    drawn, below = sample.sample_categorical(probs, u), probs.double().cumsum(-1)

    bounds = torch.cat([torch.zeros_like(below[..., :1]), below], -1)
    low, high = (take(bounds, drawn + side)[..., None] for side in (0, 1))
    passed = u * below[..., -1:]
    assert (low - 1e-6 <= passed).all() and (passed <= high + 1e-6).all()
    assert (take(probs, drawn) > 0).all()
    assert K == 1 or len(drawn.unique()) > K ** 0.5 / 2


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2 ** -53])
def test_codes_of_probability_0_are_never_drawn(u):
    """Wherever they are: at the beginning, in the middle and at the end."""
    for K in (2, 5, 100, 8192):
        for first, last in ((0, K // 2), (K // 2, K - 1), (K // 3, K // 2)):
            probs = torch.zeros(2, 3, K)
            probs[:, :, first] = probs[:, :, last] = 0.5
            drawn = sample.sample_categorical(probs, torch.full((2, 3, 1), u, dtype=torch.float64))
            assert (take(probs, drawn) > 0).all()
            if u != 0.5:
                assert (drawn == (first if u == 0 else last)).all()


def test_probabilities_that_are_no_numbers_do_not_raise():
    probs = torch.full((3, 2, 5), 0.2)
    probs[1] = math.nan
    u = torch.full((3, 2, 1), 0.5, dtype=torch.float64)
    drawn = sample.sample_categorical(probs, u)
    assert (drawn[[0, 2]] == 2).all() and drawn.min() >= 0 and drawn.max() < 5


# ------------------------------------------------------------------------------ Eq. 14

@pytest.mark.parametrize("N, K, n_new, seed",
                         [(3, 3, 1, 0), (3, 3, 2, 1), (4, 3, 2, 2), (4, 2, 1, 3), (2, 5, 1, 4)])
def test_without_noise_only_eq_14_sums_to_one(N, K, n_new, seed):
    """Every next state that some draw of tokens leads to, each counted once."""
    torch.manual_seed(seed)
    logits = torch.randn(1, N, K, dtype=torch.float64)
    probs, all_masked = logits.softmax(-1), torch.ones(1, N, dtype=torch.bool)
    states = {}
    for tokens in itertools.product(range(K), repeat=N):
        drawn = torch.tensor([tokens])
        new = choose_and_move(take(probs, drawn).log(), all_masked, N - n_new, 0.0, None)
        state = tuple(torch.where(new, drawn, K)[0].tolist())
        states[state] = (drawn, torch.where(new, 0, 1))

    sums = {}
    for kind in ("p1", "p2", "ar"):
        sums[kind] = sum(
            transition_log_prob(logits, one_move(logits, drawn, order, 0), 0, kind).exp().item()
            for drawn, order in states.values())
    assert sums["p1"] == pytest.approx(1, abs=1e-9)
    assert abs(sums["p2"] - 1) > 0.05 and abs(sums["ar"] - 1) > 0.05


def test_sampled_frequencies_of_next_states_match_eq_14():
    torch.manual_seed(0)
    N, K, n, T = 4, 3, 40000, 2     # the first of two iterations
    logits = torch.randn(1, N, K).expand(n, N, K)
    traj = rollout(lambda codes: logits, n, N, K, T, generator=seeded(0), temperature=0.0)
    logp = transition_log_prob(logits, traj, 0, "p1")

    states, index, counts = traj.state(1).unique(dim=0, return_inverse=True, return_counts=True)
    expected = torch.zeros(len(states)).scatter(0, index, logp.exp()) * n
    assert expected.sum() == pytest.approx(n, rel=0.01)
    often = expected > 5
    chi_square = ((counts - expected).square() / expected)[often].sum()
    dof = often.sum() - 1
    assert chi_square < dof + 4 * (2 * dof) ** 0.5


@pytest.mark.parametrize("row, none_under", [([0.0, 0, 0, 0], True), ([0.0, 60, -60, 200], True),
                                             ([0.0, 95, -1, -3], False)])
def test_zero_tail_mass_is_finite_in_value_and_gradient(row, none_under):
    logits = torch.tensor(row).expand(2, 6, 4).clone().requires_grad_()
    order = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, 6)
    traj = one_move(logits, torch.full((2, 6), 1), order, 0)
    value = transition_log_prob(logits, traj, 0, "p1")
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()
    if none_under:      # nothing lies under the threshold there
        assert logits.grad[:, 2:].abs().max() == 0


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, order = torch.randn(2, 300, 16).bfloat16(), torch.zeros(2, 300, dtype=torch.long)
    codes = torch.randint(16, (2, 300))
    traj = Trajectory(codes, order, None, 16)
    value = transition_log_prob(logits, traj, 0, "p2")
    wanted = transition_log_prob(logits.double(), traj, 0, "p2").float()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-4)


def test_the_threshold_is_the_sampling_policy_s_for_every_policy():
    torch.manual_seed(0)
    logits, others = torch.randn(3, 8, 6), torch.randn(3, 8, 6)
    traj = rollout(lambda codes: logits, 3, 8, 6, 4, generator=seeded(0))
    for t in range(4):
        p, newly, remasked = others.softmax(-1), traj.order == t, traj.order > t
        tail = torch.where(p < traj.threshold[:, t, None, None], p, 0).sum(-1)
        wanted = torch.where(newly, take(p, traj.codes).log(), 0).sum(1)
        wanted += torch.where(remasked & (tail > 0), tail.log(), 0).sum(1)
        torch.testing.assert_close(transition_log_prob(others, traj, t, "p1"), wanted)
    bare = Trajectory(traj.codes, traj.order, None, 6)
    for kind, message in (("p1", "threshold"), ("ar", "sampled"), ("P1", "'P1' is none of")):
        with pytest.raises(ValueError, match=message):
            transition_log_prob(logits, bare, 0, kind)
    assert transition_log_prob(logits, bare, 0, "p2").shape == (3,)


@pytest.mark.parametrize("kind", ["p1", "p2", "ar"])
def test_rows_do_not_influence_each_other(kind):
    torch.manual_seed(0)
    B, N, K, T = 6, 8, 5, 4
    logits = torch.randn(B, N, K)
    traj = rollout(lambda c: torch.randn(*c.shape, K), B, N, K, T, generator=seeded(1))
    for t in range(T):
        together = transition_log_prob(logits, traj, t, kind)
        alone = [transition_log_prob(logits[i:i + 1], traj[i:i + 1], t, kind) for i in range(B)]
        torch.testing.assert_close(together, torch.cat(alone))


# ------------------------------------------------------------------------------ rollouts

@pytest.mark.parametrize("T", [1, 3, 9, 20])
def test_rollout_unmasks_everything_and_keeps_what_is_unmasked(T):
    N, K, seen = 9, 7, []

    def policy(codes):
        seen.append(codes.clone())
        return torch.randn(*codes.shape, K, generator=torch.Generator().manual_seed(len(seen)))
    traj = rollout(policy, 5, N, K, T, generator=seeded(0))

    assert traj.codes.shape == traj.order.shape == (5, N)
    assert traj.threshold.shape == (5, T) and traj.sampled.shape == (5, N, T)
    assert traj.codes.max() < K
    assert traj.order.max() < T                             # the last iteration leaves none masked
    stay = mask_schedule(N, T)
    assert traj.n_masked == [N, *stay.tolist()]
    for t in range(T):
        assert torch.equal(traj.state(t), seen[t])          # codes and order describe every state
        assert ((traj.order > t).sum(1) == stay[t]).all()
        moved = traj.order == t
        assert torch.equal(traj.codes[moved], traj.sampled[..., t][moved])
    none_moved = torch.stack([(traj.order == t).sum(1) == 0 for t in range(T)], 1)
    assert torch.equal(traj.threshold.isinf(), none_moved)


def test_groups_do_not_influence_each_other():
    both = rollout(toy_policy(5), 8, 7, 5, 4, generator=seeded(1, 2))
    first, second = (rollout(toy_policy(5), 4, 7, 5, 4, generator=seeded(s)) for s in (1, 2))
    assert torch.equal(both.codes, torch.cat([first.codes, second.codes]))
    assert torch.equal(both.order, torch.cat([first.order, second.order]))
    alone = rollout(toy_policy(5), 4, 7, 5, 4, generator=torch.Generator().manual_seed(1))
    same(first, alone)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_and_temperature_as_lists_are_the_named_ones(schedule):
    N, K, T = 11, 6, 5
    size = (toy_policy(K), 4, N, K, T)
    named = rollout(*size, generator=seeded(0), schedule=schedule, temperature=0.7)
    stay, noise = mask_schedule(N, T, schedule), sample.temperatures(T, 0.7)
    same(named, rollout(*size, generator=seeded(0), schedule=stay.tolist(), temperature=noise))


def test_another_schedule_is_followed():
    traj = rollout(toy_policy(4), 3, 8, 4, 3, generator=seeded(0), schedule=[7, 2, 0])
    assert traj.n_masked == [8, 7, 2, 0]
    assert [(traj.order == t).sum(1).tolist() for t in range(3)] == [[1] * 3, [5] * 3, [2] * 3]


def test_a_start_that_is_partly_masked():
    B, N, K, T = 4, 10, 6, 3
    g = torch.Generator().manual_seed(0)
    start = torch.randint(K, (B, N), generator=g)
    masked = torch.rand(B, N, generator=g).argsort(1) < 7           # 7 in each row
    start[masked] = K
    given = start.clone()
    traj = rollout(toy_policy(K), B, N, K, T, generator=seeded(1), start=start)

    assert torch.equal(start, given)                                # it is not written to
    assert torch.equal(traj.codes[~masked], start[~masked]) and traj.codes.max() < K
    assert torch.equal(traj.order == -1, ~masked)
    assert traj.n_masked == [7, *mask_schedule(7, T).tolist()]
    for t in range(T + 1):
        assert ((traj.state(t) == K).sum(1) == traj.n_masked[t]).all()
    assert torch.equal(traj.state(0), start)
    rebuilt = Trajectory(traj.codes, traj.order, None, K)
    assert rebuilt.n_masked == traj.n_masked


def test_a_policy_that_predicts_the_mask_too_is_refused():
    with pytest.raises(ValueError, match=r"\[5, 4, 4\].*\[5, 4, 3\]"):
        rollout(lambda codes: torch.zeros(5, 4, 4), 5, 4, 3, 2, generator=seeded(0))


@pytest.mark.parametrize("how, message", [
    (dict(start=torch.tensor([[3, 3, 0, 0], [3, 3, 3, 0]])), "different numbers of masked tokens"),
    (dict(generator=seeded(0, 1, 2)), "3 generators cannot share 2 rows"),
    (dict(schedule=[2, 1]), "must end with 0 masked tokens"), (dict(schedule=[2, 1, 0]), "2 entri"),
    (dict(temperature=[1.0]), "need 2 entries")])
def test_what_a_rollout_cannot_do_is_said(how, message):
    with pytest.raises(ValueError, match=message):
        rollout(toy_policy(3), 2, 4, 3, 2, **{"generator": seeded(0), **how})


def test_a_mask_inside_the_vocabulary_is_never_drawn_once_it_is_forbidden():
    def policy(codes):
        logits = torch.zeros(*codes.shape, 4)
        logits[..., 2] = -math.inf
        return logits
    traj = rollout(policy, 50, 6, 4, 3, generator=seeded(0))
    assert set(traj.codes.unique().tolist()) == {0, 1, 3} and not traj.threshold.isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_leave_a_mark(bad):
    """In the threshold, whatever the position: NaN is what the update looks for."""
    def policy(codes):
        logits = torch.zeros(*codes.shape, 4)
        logits[1, 3, 2] = bad
        return logits
    traj = rollout(policy, 3, 6, 4, 3, generator=seeded(0))
    assert traj.threshold.isnan().any(1).tolist() == [False, True, False]
    assert traj.codes.max() < 4


# ------------------------------------------------------------------------------ trajectories

def moves_of(T, seed=0):
    """Return a trajectory of 9 tokens."""
    return rollout(toy_policy(7), 5, 9, 7, T, generator=seeded(seed))


@pytest.mark.parametrize("T", [3, 20])
def test_positions_are_those_that_the_equations_read(T):
    """With 20 iterations for 9 tokens nothing moves in some."""
    traj, n_still = moves_of(T), 0
    for t in range(T):
        new, masked = traj.order == t, traj.order >= t
        n_new, n_masked = int(new[0].sum()), int(masked[0].sum())
        for kind in ("p2", "p1", "ar"):
            at = traj.positions(t, kind)
            n = n_masked if kind != "p2" else max(n_new, 1)
            assert at.shape == (5, n) and all(len(row.unique()) == n for row in at)
            assert new.gather(1, at[:, :n_new]).all()                   # these come first
            assert masked.gather(1, at).all() and not new.gather(1, at[:, n_new:]).any()
        n_still += n_new == 0
    assert (n_still > 0) == (T == 20)


@pytest.mark.parametrize("kind", ["p1", "p2", "ar"])
@pytest.mark.parametrize("T", [3, 20])
def test_log_probabilities_at_the_positions_are_those_of_the_whole_state(kind, T):
    policy, traj = toy_policy(7), moves_of(T)
    for t in range(T):
        logits, at = policy(traj.state(t)), traj.positions(t, kind)
        whole = transition_log_prob(logits, traj, t, kind)
        cut = transition_log_prob(logits.gather(1, at[..., None].expand(-1, -1, 7)), traj.at(at), t,
                                  kind)
        torch.testing.assert_close(cut, whole)
        if kind == "p2" and not (traj.order == t).any():
            assert (cut == 0).all()


def test_trajectories_are_joined_indexed_and_assigned_to():
    traj, other = moves_of(3), moves_of(3, seed=1)
    same(traj, Trajectory.cat([traj[:2], traj[2:]]))
    picked = traj[[3, 1]]
    assert torch.equal(picked.codes, traj.codes[[3, 1]])
    assert torch.equal(picked.order, traj.order[[3, 1]])
    assert torch.equal(picked.threshold, traj.threshold[[3, 1]])
    assert torch.equal(picked.sampled, traj.sampled[[3, 1]])

    mixed = Trajectory.cat([traj])
    mixed[[0, 4]] = other[[2, 3]]
    same(mixed[[0, 4]], other[[2, 3]])
    same(mixed[[1, 2, 3]], traj[[1, 2, 3]])
    assert not torch.equal(mixed.codes[[0, 4]], traj.codes[[0, 4]])

    bare = Trajectory(traj.codes, traj.order, None, 7)
    assert Trajectory.cat([bare[:2], bare[2:]]).sampled is None and bare[[1]].threshold is None
    lean = rollout(toy_policy(7), 5, 9, 7, 3, generator=seeded(0), keep_sampled=False)
    assert lean.sampled is None and torch.equal(lean.codes, traj.codes)


def plain_sampler(showo, text, B, T, generator):
    """Return final codes Long[B, N] of Show-o's sampling loop without any of our short cuts: every
    position of the padded row, the whole head, an additive mask, a plain sort for the cut-off."""
    N, L = showo.N, len(text) + showo.N + 2
    image = torch.arange(L) >= len(text)
    sees = (torch.arange(L)[:, None] >= torch.arange(L)) | (image[:, None] & image)
    itself = torch.eye(L, dtype=torch.bool)
    mask_id = showo.code_offset + showo.K
    codes = torch.full((B, N), mask_id)
    temperature, phi = 1.0, plain_phi(showo)

    for t in range(T):
        soi, eoi = torch.full((B, 1), showo.soi), torch.full((B, 1), showo.eoi)
        row = torch.cat([text.expand(B, -1), soi, codes, eoi], 1)
        mask = torch.where(sees & (row != showo.pad)[:, None] | itself, 0.0, -1e9)[:, None]
        logits = phi(input_ids=row, attention_mask=mask,
                     position_ids=torch.arange(L)[None]).logits
        probs = logits[:, -N - 1:-1, showo.code_offset:-1].softmax(-1)
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(B, N)
        unknown = codes == mask_id
        drawn = torch.where(unknown, drawn, codes - showo.code_offset)

        conf = probs.gather(2, drawn[..., None])[..., 0].log().masked_fill(~unknown, math.inf)
        temperature *= 1 - (t + 1) / T
        u = torch.rand(B, N, generator=generator).clamp(1e-9)
        conf += temperature * -u.log().neg().log()
        n_most = math.floor(N * math.cos(math.pi / 2 * (t + 1) / T))
        stay = max(1, min(int(unknown[0].sum()) - 1, n_most))
        cut = conf.sort(1).values[:, stay - 1:stay]
        codes = torch.where(conf <= cut, mask_id, drawn + showo.code_offset)
    return drawn


def distance(a, b):
    """Return the chi-square of two samples of codes over its limit at 1e-4 after Bonferroni, the
    largest over the histograms of every position and of the pairs of neighbours (mod 8)."""
    a, b = (torch.cat([x, 64 + 8 * (x % 8) + (x % 8).roll(1, 1)], 1) for x in (a, b))
    worst, columns, r = 0, a.shape[1], (len(a) / len(b)) ** 0.5
    for i in range(columns):
        n, m = (torch.bincount(x[:, i], minlength=128).double() for x in (a, b))
        used = n + m > 0
        chi_square = ((n / r - m * r)[used] ** 2 / (n + m)[used]).sum().item()
        worst = max(worst, chi_square / chi2.isf(1e-4 / columns, int(used.sum()) - 1))
    return worst


def test_marginals_are_those_of_a_plain_sampler(showo):
    """4,000 samples each."""
    T, B, times, g = 3, 200, 20, torch.Generator().manual_seed(0)
    prompt = showo.encode(["a red cat"], 16)
    policy = showo.policy(prompt.repeat(B))

    def ours(n, **how):
        return torch.cat([rollout(policy, B, showo.N, showo.K, T, generator=g, **how).codes
                          for _ in range(n)])
    with torch.no_grad():
        plain = torch.cat([plain_sampler(showo, prompt.ids[0], B, T, g) for _ in range(times)])
        assert distance(ours(times), plain) < 1
        other = ours(times // 2, temperature=[1.0] * T)
    assert distance(other, plain) > 1, "another annealing must be told apart"


# ------------------------------------------------------------------------------ pictures

# In batches of another size rounding differs, so that another token can be drawn. What shall be the
# same pictures is drawn by models that compute each row alone.

def row_by_row(plain):
    """Return Showo.policy() or Showo.logits(), computed for a row at a time."""
    def policy(self, prompt, guidance=0.0, batch=None):
        alone = [plain(self, Prompt(prompt.ids[i:i + 1], torch.tensor([0])), guidance)
                 for i in prompt.row]
        return lambda codes: torch.cat([own(row[None])
                                        for own, row in zip(alone, codes, strict=True)])

    def logits(self, codes, prompt, **more):
        rows = torch.arange(len(codes)).split(1)
        return torch.cat([plain(self, codes[i], prompt[i], **more) for i in rows])
    return {"policy": policy, "logits": logits}[plain.__name__]


def test_pictures_do_not_depend_on_the_batch(base, monkeypatch):
    prompts = ["a photo of a red circle", "a photo of two stars", "a photo of a moon"]
    encoded = base[0].encode(prompts).repeat(2)
    codes = torch.randint(256, (6, 36), generator=torch.Generator().manual_seed(0))
    codes[:, ::2] = 256
    with torch.no_grad():
        together = base[0].policy(encoded)(codes)
        monkeypatch.setattr(Showo, "policy", row_by_row(Showo.policy))
        alone = base[0].policy(encoded)(codes)
    torch.testing.assert_close(together[:, ::2], alone[:, ::2], **CLOSE)
    how = dict(n=2, T=8, guidance=0.0)
    one, many = (sample.generate(*base, prompts, seeds=[3, 4, 5], batch=b, **how)
                 for b in (2, 64))
    assert one.shape == (6, 3, 48, 48) and one.dtype == torch.uint8
    assert (one.int() - many.int()).abs().max() <= 1
    alone = sample.generate(*base, prompts[1:2], seeds=[4], **how)
    assert (alone.int() - many[2:4].int()).abs().max() <= 1
    default, named = (sample.generate(*base, prompts, seeds=s, **how)
                      for s in (None, [0, 1, 2]))
    assert torch.equal(default, named) and not torch.equal(default, many)


def test_micro_batches_bound_rollouts_and_evaluations_and_change_no_picture(base, monkeypatch):
    rows, alone = [], row_by_row(Showo.logits)

    def logits(self, codes, *args, **more):
        rows.append(len(codes))
        return alone(self, codes, *args, **more)
    args = SimpleNamespace(group_size=6, micro_batch=6, unmask_steps=4, transition="p2")
    examples, pictures = world.prompts("train", 2), []

    def rolled_out(micro_batch):
        args.micro_batch = micro_batch
        return train.sample_groups(examples, [(0, i) for i in range(2)], args, base[0])[1].codes
    with monkeypatch.context() as patch:        # of two texts or one at a time
        patch.setattr(Showo, "policy", row_by_row(Showo.policy))
        assert torch.equal(rolled_out(12), rolled_out(6))
    monkeypatch.setattr(Showo, "logits", logits)
    codes = {}
    for n in (12, 6, 2):
        rows.clear()
        codes[n] = rolled_out(n)
        pictures.append(sample.generate(*base, ["a photo of a star"], n=6, T=4, guidance=1.0,
                                        batch=n))
        assert max(rows) == n
    assert torch.equal(codes[6], codes[2])
    assert all(torch.equal(pictures[0], other) for other in pictures)


# ------------------------------------------------------------------------------ the command

SHAPES = ("--model", "shapes")


def test_the_command_says_what_it_loaded_and_writes_a_grid(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a star\na moon\n")
    run(sample, *SHAPES, "--dtype", "bf16", "--prompt", "a photo of a star", "--n", 2,
        "--prompts", tmp_path / "p.txt", "--steps", 2, "--out", tmp_path / "x.png")
    said = capsys.readouterr().out
    assert said == "shapes: 0.9M, N 36, K 256; shapes/magvitv2: 0.9M; on cpu\n"
    assert Image.open(tmp_path / "x.png").size == (3 * 148, 2 * 176)


def test_a_seed_fixes_the_picture(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(sample, *SHAPES, "--prompt", "a moon", "--steps", 4, "--seed", seed, "--out",
            tmp_path / f"{name}.png")
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c


def test_a_picture_per_file_in_shards_that_go_on(monkeypatch, tmp_path):
    """A prompt at a time, so that no batch is of another size."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a photo of a moon\na photo of two stars\na photo of a red ring\n")

    def draw(out, rank=0, world=1):
        monkeypatch.setattr(processes, "setup", lambda _: (rank, world, torch.device("cpu")))
        run(sample, *SHAPES, "--prompts", prompts, "--n", 2, "--batch", 2, "--steps", 3, "--out",
            out)

    draw(tmp_path / "one")
    files = sorted((tmp_path / "one").glob("*.png"))
    assert [f.name for f in files] == [f"00000{i}-0{k}.png" for i in range(3) for k in range(2)]
    draw(tmp_path / "two", 0, 2)
    assert len(list((tmp_path / "two").glob("*.png"))) == 4     # of the first and third prompt
    draw(tmp_path / "two", 1, 2)
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    whole, kept = files[3].read_bytes(), files[0].stat().st_mtime_ns
    files[3].unlink()
    draw(tmp_path / "one")
    assert files[3].read_bytes() == whole and files[0].stat().st_mtime_ns == kept


def test_sample_is_a_command(tmp_path):
    """Started from another folder."""
    subprocess.run([sys.executable, ROOT / "sample.py", *SHAPES, "--prompt",
                    "a photo of a red circle", "--n", "4", "--steps", "4", "--out", "grid.png"],
                   check=True, cwd=tmp_path)
    assert Image.open(tmp_path / "grid.png").size == (2 * 148, 2 * 176)
