"""Somebody else's masked model, diffusers' aMUSEd (amused.py): its own sampler, and inpainting. The
model is tiny and random."""
from types import SimpleNamespace

import pytest
import torch
from amused import amused_policy

from sample import choose_and_move, mask_schedule, rollout, transition_log_prob
from support.weights import library

library("transformers")     # before diffusers: it mends a torchvision that cannot be imported
from diffusers import AmusedScheduler, UVit2DModel  # noqa: E402
from diffusers.schedulers import scheduling_amused  # noqa: E402

P, G, H, T, K, MASK = 2, 3, 4, 6, 64, 71
N = H * H


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UVit2DModel(
        hidden_size=32, use_bias=False, hidden_dropout=0.0, cond_embed_dim=24,
        micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=24,
        vocab_size=K + 8, codebook_size=K, in_channels=32, block_out_channels=32, num_res_blocks=1,
        downsample=False, upsample=False, block_num_heads=2, num_hidden_layers=2,
        num_attention_heads=2, attention_dropout=0.0, intermediate_size=64).eval()


@pytest.fixture(scope="module")
def amused(unet):
    """A policy of P x G rows, its trajectory, and the scheduler whose temperatures it had."""
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(T, temperature=(2, 0))
    generator = torch.Generator().manual_seed(0)
    text = SimpleNamespace(text_embeds=torch.randn(P, 24, generator=generator),
                           hidden_states=[None, torch.randn(P, 5, 24, generator=generator), None])
    policy = amused_policy(unet, text, scheduler, H, G)
    with torch.no_grad():
        traj = rollout(policy, P * G, N, K, T, generator=generator,
                       temperature=scheduler.temperatures.tolist())
    return SimpleNamespace(policy=policy, traj=traj, scheduler=scheduler)


def test_the_policy_learns(amused, unet):
    logp = transition_log_prob(amused.policy(amused.traj.state(2)), amused.traj, 2, "p2")
    logp.sum().backward()
    gradients = [p.grad.abs().max() for p in unet.parameters() if p.grad is not None]
    assert logp.shape == (P * G,) and max(gradients) > 0
    unet.zero_grad()


def test_moves_are_those_of_its_own_scheduler(monkeypatch, amused):
    """Its step and ours under the same draws and the same noise, over a whole trajectory."""
    generator = torch.Generator().manual_seed(1)
    temperatures = amused.scheduler.temperatures.tolist()
    codes = torch.full((P * G, N), K)
    stay_masked = mask_schedule(N, T).tolist()
    for t in range(T):
        with torch.no_grad():
            logits = amused.policy(codes)
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        gumbel = -(-torch.rand(P * G, N, generator=generator).log()).log()
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn, **__: drawn)
        monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda *_, g=gumbel, **__: g)
        ids = torch.where(codes == K, MASK, codes)
        theirs = amused.scheduler.step(logits, amused.scheduler.timesteps[t], ids).prev_sample
        monkeypatch.undo()

        sampled = torch.where(codes == K, drawn.view(P * G, N), codes)
        conf = logits.softmax(-1).gather(-1, sampled[..., None])[..., 0]
        newly = choose_and_move(conf.log(), codes == K, stay_masked[t], temperatures[t], gumbel)
        codes = torch.where(newly, sampled, codes)
        assert torch.equal(torch.where(codes == K, MASK, codes), theirs)
    assert codes.max() < K


def test_inpainting(amused):
    """A start whose upper half is given: it stays, and the rest is drawn."""
    start = torch.full((P * G, N), K)
    start[:, :N // 2] = torch.arange(N // 2)
    with torch.no_grad():
        traj = rollout(amused.policy, P * G, N, K, T, generator=torch.Generator().manual_seed(2),
                       start=start)
    assert torch.equal(traj.codes[:, :N // 2], start[:, :N // 2])
    assert (traj.order[:, :N // 2] == -1).all() and (traj.order[:, N // 2:] >= 0).all()
    assert traj.codes.max() < K and traj.n_masked[0] == N // 2
