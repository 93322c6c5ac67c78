"""The policy of diffusers' aMUSEd for rollout() and transition_log_prob(), to copy.

    library("transformers")     # of support/weights.py; before diffusers, beside a CPU torch
    policy = amused_policy(unet, text, scheduler, H, G)
    traj = rollout(policy, P * G, H * H, unet.config.codebook_size, T, generator=generator,
                   temperature=scheduler.temperatures.tolist())

text is the output of its text encoder for P prompts, with hidden states; scheduler an
AmusedScheduler after set_timesteps(T), with whose moves tests/test_third_party.py compares ours.
"""
import torch


def amused_policy(unet, text, scheduler, H, G):
    """Return policy(codes Long[P G, H H], codebook size = masked) -> logits Float[P G, H H, K].

    unet: a UVit2DModel; text: embeddings (P, ...), each for the G pictures of its group.
    """
    K, mask = unet.config.codebook_size, scheduler.config.mask_token_id
    pooled = text.text_embeds.repeat_interleave(G, 0)                           # (P G, D)
    hidden = text.hidden_states[-2].repeat_interleave(G, 0)                     # (P G, L, D)
    # the size and the crop of a training picture, and its aesthetic score
    micro = torch.tensor([[256., 256, 0, 0, 6]]).expand(len(pooled), -1)

    def policy(codes):
        ids = torch.where(codes == K, mask, codes).view(-1, H, H)
        logits = unet(ids, encoder_hidden_states=hidden, micro_conds=micro, pooled_text_emb=pooled)
        return logits.flatten(2).transpose(1, 2)
    return policy
