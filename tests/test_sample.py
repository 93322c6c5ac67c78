"""sample.py: the official moves and transition probabilities, and the properties that make Eq. 14 a probability."""
import itertools
import math

import pytest
import torch
from conftest import DATA, read_json
from PIL import Image
from safetensors.torch import load_file

from model import InputError
from sample import _categorical, choose_and_move, generate, grid, main, mask_schedule, read_prompts, remask, rollout, temperatures, transition_log_prob


def test_schedule_and_temperature_are_the_official_ones():
    for case in read_json("sampling/mask_len.json"):
        ours = mask_schedule(case["N"], case["T"], case["schedule"])
        assert ours[:-1].tolist() == case["mask_len"][:-1] and ours[-1] == 0
        assert temperatures(case["T"]) == pytest.approx(case["temperature"], abs=1e-12)


def test_schedule_with_more_iterations_than_tokens():
    assert mask_schedule(3, 6).tolist() == [2, 1, 1, 1, 1, 0]
    assert mask_schedule(5, 1).tolist() == [0]
    for bad in ((0, 4), (4, 0)):
        with pytest.raises(ValueError):
            mask_schedule(*bad)


def confidence(probs, tokens):
    return probs.gather(-1, tokens[..., None])[..., 0]


def test_moves_are_the_official_ones():
    tensors = load_file(DATA / "sampling/step_cases.safetensors")
    for case in read_json("sampling/step_cases.json"):
        get = lambda name: tensors[f"{case['case']}.{name}"]  # noqa: B023,E731
        conf = confidence(get("probs"), get("sampled_ids"))
        new = choose_and_move(conf.clamp(min=1e-20).log(), get("unknown"), get("mask_len"), case["temperature"], get("gumbel"))
        assert torch.equal(new, get("newly_unmasked"))
        assert torch.equal(get("unknown") & ~new, get("masking"))
        assert torch.equal(conf.masked_fill(~new, math.inf).amin(1), get("threshold_min"))


def recorded_moves():
    """-> name, step facts, logits (1, N, K), sampled (1, N), order (1, N) with the move at iteration 1."""
    for file in ("transitions", "synthetic_transitions"):
        tensors, facts = load_file(DATA / f"sampling/{file}.safetensors"), read_json(f"sampling/{file}.json")
        for entry in facts["trajectories"] if file == "transitions" else facts:
            steps = list(enumerate(entry["steps"])) if "steps" in entry else [(None, entry)]
            for t, step in steps:
                get = lambda name: (tensors[f"{entry['name']}.{name}"] if t is None else tensors[f"{entry['name']}.{name}"][t])[None]  # noqa: B023,E731
                order = torch.where(get("newly_unmasked"), 1, torch.where(get("remasked"), 2, 0))
                yield entry["name"], step, get("image_logits"), get("sampled_ids"), order, get("gumbel") if t is not None else None


def test_transition_log_probabilities():
    n_zero = 0
    for name, step, logits, sampled, order, _ in recorded_moves():
        for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            values = {kind: transition_log_prob(logits.to(dtype), sampled, order, 1, kind, sampled=sampled).item() for kind in ("p1", "p2", "ar")}
            wanted = {"p1": step["log_p1_nonzero"], "p2": step["log_p2"], "ar": step["log_p_ar"]}
            assert values == pytest.approx(wanted, abs=atol), name
            threshold = torch.tensor([step["threshold"]], dtype=dtype)
            given = transition_log_prob(logits.to(dtype), sampled, order, 1, "p1", threshold=threshold)
            assert given.item() == pytest.approx(step["log_p1_nonzero"], abs=atol)
        n_zero += step["zero_mass_count"]
    assert n_zero > 10


def test_recorded_trajectories_move_the_same():
    for _, step, logits, sampled, order, gumbel in recorded_moves():
        if gumbel is not None:
            conf = confidence(logits.softmax(-1), sampled)
            new = choose_and_move(conf.clamp(min=1e-20).log(), order > 0, step["mask_len"], step["temperature"], gumbel)
            assert torch.equal(new, order == 1)


def test_per_row_iterations_and_stored_thresholds():
    torch.manual_seed(0)
    B, N, K, T = 6, 8, 5, 4
    logits, traj = torch.randn(B, N, K), rollout(lambda c: torch.randn(*c.shape, K), B, N, K, T, generator=torch.Generator().manual_seed(1), keep_sampled=True)
    t = torch.tensor([0, 3, 1, 2, 0, 3])
    for kind in ("p1", "p2", "ar"):
        together = transition_log_prob(logits, traj.codes, traj.order, t, kind, threshold=traj.threshold, sampled=traj.sampled)
        alone = [transition_log_prob(logits[i:i + 1], traj.codes[i:i + 1], traj.order[i:i + 1], int(t[i]), kind,
                                     threshold=traj.threshold[i:i + 1, t[i]], sampled=traj.sampled[t[i], i:i + 1]) for i in range(B)]
        torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("N, K, n_new, seed", [(3, 3, 1, 0), (3, 3, 2, 1), (4, 3, 2, 2), (4, 2, 1, 3), (2, 5, 1, 4)])
def test_without_noise_only_eq_14_sums_to_one(N, K, n_new, seed):
    """Every next state that some draw of tokens leads to, each counted once."""
    torch.manual_seed(seed)
    logits = torch.randn(1, N, K, dtype=torch.float64)
    probs = logits.softmax(-1)
    states = {}
    for tokens in itertools.product(range(K), repeat=N):
        drawn = torch.tensor([tokens])
        new = choose_and_move(confidence(probs, drawn).log(), torch.ones(1, N, dtype=torch.bool), N - n_new, 0.0, None)
        states[tuple(torch.where(new, drawn, K)[0].tolist())] = (torch.where(new, 0, 1), drawn)
    sums = {}
    for kind in ("p1", "p2", "ar"):
        sums[kind] = sum(transition_log_prob(logits, drawn, order, 0, kind, sampled=drawn).exp().item() for order, drawn in states.values())
    assert sums["p1"] == pytest.approx(1, abs=1e-9)
    assert abs(sums["p2"] - 1) > 0.05 and abs(sums["ar"] - 1) > 0.05


def test_sampled_frequencies_of_next_states_match_eq_14():
    torch.manual_seed(0)
    N, K, n, T = 4, 3, 40000, 2     # the first of two iterations
    logits = torch.randn(1, N, K)
    traj = rollout(lambda codes: logits.expand(len(codes), N, K), n, N, K, T, generator=torch.Generator().manual_seed(0), temperature=0.0)
    state = traj.state(1, K)
    logp = transition_log_prob(logits.expand(n, N, K), traj.codes, traj.order, 0, "p1", threshold=traj.threshold)
    states, index, counts = state.unique(dim=0, return_inverse=True, return_counts=True)
    expected = torch.zeros(len(states)).scatter(0, index, logp.exp()) * n
    assert expected.sum() == pytest.approx(n, rel=0.01)
    often = expected > 5
    chi_square = ((counts - expected).square() / expected)[often].sum()
    dof = often.sum() - 1
    assert chi_square < dof + 4 * (2 * dof) ** 0.5


def test_zero_tail_mass_is_finite_in_value_and_gradient():
    for logits in (torch.zeros(2, 6, 4), torch.tensor([0.0, 60, -60, 200]).expand(2, 6, 4), torch.tensor([0.0, 95, -1, -3]).expand(2, 6, 4)):
        logits = logits.clone().requires_grad_()
        order = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, 6)
        value = transition_log_prob(logits, torch.full((2, 6), 1), order, 0, "p1")
        value.sum().backward()
        assert value.isfinite().all() and logits.grad.isfinite().all()
        if logits[0, 0, 1] != 95:
            assert logits.grad[:, 2:].abs().max() == 0     # nothing lies under the threshold there


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, order = torch.randn(2, 300, 16).bfloat16(), torch.zeros(2, 300, dtype=torch.long)
    codes = torch.randint(16, (2, 300))
    value = transition_log_prob(logits, codes, order, 0, "p2")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, transition_log_prob(logits.double(), codes, order, 0, "p2").float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("T", [1, 3, 9, 20])
def test_rollout_unmasks_everything_and_keeps_what_is_unmasked(T):
    N, K, seen = 9, 7, []

    def policy(codes):
        seen.append(codes.clone())
        return torch.randn(*codes.shape, K, generator=torch.Generator().manual_seed(len(seen)))

    traj = rollout(policy, 5, N, K, T, generator=torch.Generator().manual_seed(0), keep_sampled=True)
    assert traj.codes.shape == traj.order.shape == (5, N) and traj.threshold.shape == (5, T) and traj.sampled.shape == (T, 5, N)
    assert traj.codes.max() < K and traj.order.max() < T                   # the last iteration leaves nothing masked
    stay = mask_schedule(N, T)
    for t in range(T):
        assert torch.equal(traj.state(t, K), seen[t])                      # codes and order describe every state
        assert ((traj.order > t).sum(1) == stay[t]).all()
        assert torch.equal(traj.codes[traj.order == t], traj.sampled[t][traj.order == t])
    empty = torch.stack([(traj.order == t).sum(1) == 0 for t in range(T)], 1)
    assert torch.equal(traj.threshold.isinf(), empty)


def test_threshold_is_that_of_the_sampling_policy():
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 6)
    traj = rollout(lambda codes: logits, 3, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    for t in range(4):
        args = (logits, traj.codes, traj.order, t, "p1")
        torch.testing.assert_close(transition_log_prob(*args), transition_log_prob(*args, threshold=traj.threshold))


def test_rows_and_groups_do_not_influence_each_other():
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    policy = lambda codes: weights[codes].cumsum(1)  # noqa: E731
    generators = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    both = rollout(policy, 8, 7, 5, 4, generator=generators(1, 2))
    first, second = (rollout(policy, 4, 7, 5, 4, generator=generators(s)) for s in (1, 2))
    assert torch.equal(both.codes, torch.cat([first.codes, second.codes])) and torch.equal(both.order, torch.cat([first.order, second.order]))
    torch.manual_seed(5)
    logp, gumbel = torch.randn(4, 9), torch.randn(4, 9)
    masked = torch.rand(4, 9) < 0.7
    together = choose_and_move(logp, masked, torch.tensor([1, 3, 2, 5]), 0.7, gumbel)
    for i, stay in enumerate([1, 3, 2, 5]):
        assert torch.equal(together[i:i + 1], choose_and_move(logp[i:i + 1], masked[i:i + 1], stay, 0.7, gumbel[i:i + 1]))


@pytest.mark.parametrize("kind", ["p1", "p2", "ar"])
def test_an_iteration_is_a_number_or_a_tensor(kind):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 6, generator=g)
    traj = rollout(lambda codes: logits, 3, 8, 6, 4, generator=g, keep_sampled=True)
    values = [transition_log_prob(logits, traj.codes, traj.order, t, kind, threshold=traj.threshold, sampled=traj.sampled)
              for t in (2, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2, 2]))]
    assert all(torch.equal(values[0], value) for value in values)


def test_infinite_noise_cannot_mask_what_is_unmasked():
    masked = torch.tensor([[False, True, True, True]])
    new = choose_and_move(torch.zeros(1, 4), masked, 1, 1.0, torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]]))
    assert new.tolist() == [[False, False, True, True]]
    assert choose_and_move(torch.zeros(1, 4), masked, 1, 0.0, torch.full((1, 4), -math.inf)).sum() == 2


@pytest.mark.parametrize("call", [lambda: transition_log_prob(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), 0, "p3"),
                                  lambda: transition_log_prob(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), 0, "ar"),
                                  lambda: rollout(None, 5, 4, 3, 2, generator=[torch.Generator()] * 2), lambda: temperatures(4, annealing="cold")])
def test_misuse_is_said(call):
    with pytest.raises(ValueError, match="rollout|transition_log_prob|temperatures"):
        call()


@pytest.mark.parametrize("K", [1, 7, 64, 256, 8192])
def test_codes_are_drawn_where_the_cumulated_probabilities_pass_u(K):
    g = torch.Generator().manual_seed(0)
    probs = (6 * torch.randn(20, 50, K, generator=g)).softmax(-1)
    probs[:, :, K // 2] = 0 if K > 1 else 1
    u = torch.rand(20, 50, 1, dtype=torch.float64, generator=g)
    u[0], u[1] = 0.0, 1 - 2 ** -53
    drawn, below = _categorical(probs, u), probs.double().cumsum(-1)
    low, high = (torch.cat([torch.zeros_like(below[..., :1]), below], -1).gather(-1, (drawn + side)[..., None]) for side in (0, 1))
    assert (low - 1e-6 <= u * below[..., -1:]).all() and (u * below[..., -1:] <= high + 1e-6).all()
    assert (probs.gather(-1, drawn[..., None]) > 0).all() and (K == 1 or len(drawn.unique()) > K ** 0.5 / 2)


def plain_sampler(showo, text, B, T, generator):
    """Show-o's sampling loop without any of our short cuts: every position of the padded row, the whole head, an additive mask,
    a plain sort for the cut-off -> the final codes Long[B, N]."""
    N, L = showo.N, len(text) + showo.N + 2
    image = torch.arange(L) >= len(text)
    sees = (torch.arange(L)[:, None] >= torch.arange(L)) | (image[:, None] & image)
    codes = torch.full((B, N), showo.code_offset + showo.K)
    temperature = 1.0
    for t in range(T):
        row = torch.cat([text.expand(B, -1), torch.full((B, 1), showo.soi), codes, torch.full((B, 1), showo.eoi)], 1)
        mask = torch.where(sees & (row != showo.pad)[:, None] | torch.eye(L, dtype=torch.bool), 0.0, -1e9)[:, None]
        logits = showo.showo(input_ids=row, attention_mask=mask, position_ids=torch.arange(L)[None]).logits
        probs = logits[:, -N - 1:-1, showo.code_offset:-1].softmax(-1)
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(B, N)
        unknown = codes == showo.code_offset + showo.K
        drawn = torch.where(unknown, drawn, codes - showo.code_offset)
        conf = probs.gather(2, drawn[..., None])[..., 0].log().masked_fill(~unknown, math.inf)
        temperature *= 1 - (t + 1) / T
        conf += temperature * -torch.rand(B, N, generator=generator).clamp(1e-9).log().neg().log()
        stay = max(1, min(int(unknown[0].sum()) - 1, math.floor(N * math.cos(math.pi / 2 * (t + 1) / T))))
        cut = conf.sort(1).values[:, stay - 1:stay]
        codes = torch.where(conf <= cut, showo.code_offset + showo.K, drawn + showo.code_offset)
    return drawn


def test_marginals_are_those_of_a_plain_sampler():
    """20,000 samples each; chi-square of two histograms at every position, and of the pairs of neighbouring codes (mod 8)."""
    from scipy.stats import chi2

    from model import load_showo
    from train import policy_of
    showo = load_showo(DATA / "showo/checkpoint", tokenizer=DATA / "prompting/tokenizer")
    T, B, times, g = 3, 200, 100, torch.Generator().manual_seed(0)
    prompt = showo.prefill(showo.encode(["a red cat"], 16))
    text, shared = showo.encode(["a red cat"], 16).ids[0], prompt.repeat(B)
    with torch.no_grad():
        plain = torch.cat([plain_sampler(showo, text, B, T, g) for _ in range(times)])
        sample = lambda n, **how: torch.cat([rollout(policy_of(showo, shared, B), B, showo.N, showo.K, T, generator=g,  # noqa: E731
                                                     masked_only=True, **how).codes for _ in range(n)])
        ours, other = sample(times), sample(times // 4, annealing="none")

    def distance(a, b):
        """-> chi-square over its limit at 1e-4 after Bonferroni, the largest over the histograms."""
        a, b = (torch.cat([x, 64 + 8 * (x % 8) + (x % 8).roll(1, 1)], 1) for x in (a, b))
        worst, columns = 0, a.shape[1]
        for i in range(columns):
            n, m = (torch.bincount(x[:, i], minlength=128).double() for x in (a, b))
            used, r = n + m > 0, (len(a) / len(b)) ** 0.5
            worst = max(worst, ((n / r - m * r)[used] ** 2 / (n + m)[used]).sum().item() / chi2.isf(1e-4 / columns, int(used.sum()) - 1))
        return worst
    assert distance(ours, plain) < 1
    assert distance(other, plain) > 1, "another annealing must be told apart"


def test_pictures_do_not_depend_on_the_batch(base):
    prompts = ["a photo of a red circle", "a photo of two stars", "a photo of a moon"]
    one, many = (generate(*base, prompts, n=2, T=8, guidance=0.0, seeds=[3, 4, 5], batch=b) for b in (2, 64))
    assert one.shape == (6, 3, 32, 32) and one.dtype == torch.uint8
    assert (one.int() - many.int()).abs().max() <= 1
    assert grid(one, ["a long caption that needs two lines"] * 6, 3).size == (3 * 132, 2 * 160)


def test_the_command_says_what_it_loaded_and_writes_a_png(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["sample.py", "--model", "shapes", "--dtype", "bf16", "--prompt", "a photo of a star", "--out", str(tmp_path / "x.png")])
    main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Show-o from shapes: 0.8M parameters in bfloat16, 4 layers of 128, N 16, K 64; MAGVIT-v2 from shapes/magvitv2: 2.3M")
    assert "GiB" in said[0] and Image.open(tmp_path / "x.png").size == (32, 32)


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two words \n")
    assert [line["prompt"] for line in read_prompts(tmp_path / "p.txt")] == ["one", "two words"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "reward_prompt": "b"}\n{"prompt": "c"}\n')
    assert read_prompts(tmp_path / "p.jsonl")[0] == {"prompt": "a", "reward_prompt": "b"}
    for name, text, message in (("a.jsonl", '{"prompt": "x"}\nnot json\n', "line 2 is not JSON"), ("b.jsonl", '{"text": "x"}', 'line 1 has no "prompt"'),
                                ("c.jsonl", "[1]", "line 1 has no"), ("d.txt", " \n", "no prompts"), ("e.txt", None, "cannot be read")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_prompts(tmp_path / name)
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(tmp_path / "f.txt")


def test_the_noisy_transition_is_that_of_sampled_moves():
    """Frequencies of 400,000 draws of token and noise at every position, given a cut, against "gumbel"."""
    g, noise, draws = torch.Generator().manual_seed(0), 0.6, 400_000
    logits = torch.randn(1, 4, 5, generator=g, dtype=torch.float64)
    p = logits.softmax(-1)[0]
    codes, order, cut = torch.tensor([[2, 0, 5, 5]]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([-1.1])
    token = torch.stack([torch.multinomial(p[i], draws, True, generator=g) for i in range(4)], 1)
    confidence = p.log()[torch.arange(4), token] - noise * (-torch.rand(draws, 4, generator=g, dtype=torch.float64).log()).log()
    kept = ((token[:, 1] == 0) & (confidence[:, 1] > cut)).double().mean()
    under = (confidence[:, 2:] < cut).double().mean(0)
    at_cut = torch.tensor([[True, False, False, False]])
    ours = transition_log_prob(logits, codes, order, 0, "gumbel", cut=cut, at_cut=at_cut, noise=noise)
    sampled = p[0, 2].log() + kept.log() + under.log().sum()
    error = sum(((1 - f) / f / draws) ** 0.5 for f in (kept, *under))
    assert abs(ours - sampled) < 3 * error and error < 0.02
    assert (ours - transition_log_prob(logits, codes, order, 0, "p2")).abs() > 0.3      # what it is not


def test_the_noisy_transition_becomes_eq_14_without_noise():
    logits = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    codes = torch.randint(8, (3, 6), generator=torch.Generator().manual_seed(2))
    order = torch.tensor([[0, 1, 1, 2, 2, 3]]).expand(3, 6)
    conf = logits.detach().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    least, i = conf.masked_fill(order != 1, 9).min(1)
    at_cut = torch.arange(6) == i[:, None]
    gradients = []
    for kind, extra in (("p1", {}), ("gumbel", dict(cut=least, at_cut=at_cut, noise=1e-5))):
        value = transition_log_prob(logits, codes, order, 1, kind, **extra)
        gradients.append((value, *torch.autograd.grad(value.sum(), logits)))
    torch.testing.assert_close(gradients[0], gradients[1])
    last = transition_log_prob(logits, codes, order, 3, "gumbel", cut=least, at_cut=at_cut, noise=0.0)
    assert torch.equal(last, transition_log_prob(logits, codes, order, 3, "p2"))        # nothing is re-masked
    far = transition_log_prob(logits * 300, codes, order, 1, "gumbel", cut=least, at_cut=at_cut, noise=1e-3)
    assert far.isfinite().all() and torch.autograd.grad(far.sum(), logits)[0].isfinite().all()


def test_predictions_are_the_likeliest_codes():
    policy = lambda codes: torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(int((codes < 7).sum())))  # noqa: E731
    traj = rollout(policy, 5, 12, 7, 6, generator=torch.Generator().manual_seed(3), keep_predicted=True)
    for t in range(6):
        state = traj.state(t, 7)
        assert torch.equal(traj.predicted[t], torch.where(state < 7, state, policy(state).argmax(-1)))


def test_cuts_are_those_of_the_moves():
    policy = lambda codes: torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(int((codes < 7).sum())))  # noqa: E731
    kept, plain = (rollout(policy, 5, 12, 7, 6, generator=torch.Generator().manual_seed(3), keep_cut=keep) for keep in (True, False))
    assert torch.equal(kept.codes, plain.codes) and plain.cut is None and kept.cut.shape == (5, 6, 2)
    for t in range(6):
        assert (kept.order.gather(1, kept.cut[:, t, 1:].long()) == t).all()
    g = torch.Generator().manual_seed(3)                                                # iteration 0 again, from the same numbers
    probs = policy(torch.full((5, 12), 7)).softmax(-1)
    drawn = _categorical(probs, torch.rand(5, 12, 1, generator=g, dtype=torch.float64))
    noisy = probs.gather(-1, drawn[..., None])[..., 0].log() - temperatures(6)[0] * (-torch.rand(5, 12, generator=g, dtype=torch.float64).log()).log()
    torch.testing.assert_close(kept.cut[:, 0, 0], noisy.masked_fill(kept.order != 0, 99).amin(1).float())
    assert (noisy.masked_fill(kept.order == 0, -99).amax(1) < kept.cut[:, 0, 0]).all()
    quiet = rollout(policy, 5, 12, 7, 6, generator=torch.Generator().manual_seed(3), keep_cut=True, temperature=0.0)
    torch.testing.assert_close(quiet.cut[:, 0, 0].float(), quiet.threshold[:, 0].log())


def test_remasking_is_uniform_and_ends_at_the_same_codes():
    codes = torch.arange(8).repeat(3000, 1)
    traj = remask(codes, 4, [torch.Generator().manual_seed(i) for i in range(3)])
    stay = mask_schedule(8, 4)
    for t in range(4):
        masked = traj.state(t + 1, 99) == 99
        assert (masked.sum(1) == stay[t]).all() and torch.equal(traj.state(4, 99), codes)
        assert (masked.double().mean(0) - stay[t] / 8).abs().max() < 0.05
    assert torch.equal(traj.sampled, codes.expand(4, -1, -1))
    again = remask(codes[:1000], 4, [torch.Generator().manual_seed(0)])
    assert torch.equal(again.order, traj.order[:1000])                                  # a group's depends on its own generator
