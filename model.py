"""Show-o (arXiv 2408.12528) and its image tokenizer MAGVIT-v2 (arXiv 2310.05737): load, prompt -> ids, codes -> logits,
codes -> pixels. Sizes come from the configs, so the 1.3B model and the tiny one in shapes/ are one class.

Everything outside this file speaks codes: Long[B, N] with values 0..K-1, and K = masked. Vocabulary offsets stay here.

    showo = load_showo("showlab/show-o-512x512", device="cuda")
    prompt = showo.encode(["a red fox in the snow"])
    logits = showo.logits(torch.full((1, showo.N), showo.K, device="cuda"), prompt)     # [1, N, K]

Departures from Show-o's own code: a prompt that spells a special token ("<|soi|>", "[PAD]") is plain text, never a
control token; the text part is computed once per prompt (it never sees the image), and columns that are padding in every
prompt not at all (rotary embeddings are relative, so both are exact).
"""
import functools
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as compute_again

from checkpoint import InputError, build, fetch, first_line, load_strict, read_json, read_weights, write_json, write_weights

try:
    import torchvision  # noqa: F401  (transformers and open_clip import it when it is installed)
except ImportError:
    pass
except RuntimeError as error:  # a CUDA build of torchvision beside a CPU build of torch
    if "torchvision::nms" not in str(error):
        raise
    _torchvision_ops = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _torchvision_ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM  # noqa: E402
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb  # noqa: E402

SPECIALS = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
PHI_1_5 = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
               max_position_embeddings=2048, hidden_act="gelu_new", layer_norm_eps=1e-5, rope_theta=10000.0,
               partial_rotary_factor=0.5)


# ------------------------------------------------------------------------------------------------ Show-o

class TextCache:
    """What image passes share. Keys and values of the text part, (P, heads, text, d) per layer, in the place of transformers'
    cache: the first pass records them, later ones prepend them to the image's, for batch rows that share P prompts. And the
    rows of embeddings and head that image tokens use, so that a pass has no gradient of the size of the whole vocabulary."""

    def __init__(self):
        self.layers, self.row, self.image = [], None, None
        self.embed = self.head = self.bias = None       # Float (K + 3, width): codes, mask, soi, eoi; Float32 (K, width), (K,)

    def update(self, key, value, layer, *_, **__):
        """What transformers' attention calls: its keys and values of a layer -> those to attend to."""
        if len(self.layers) == layer:
            self.layers.append((key, value))
            return key, value
        text_key, text_value = self.layers[layer]
        key, value = self.image or (key, value)  # where the block computes some positions only
        return tuple(torch.cat([text.index_select(0, self.row), image], 2) for text, image in ((text_key, key), (text_value, value)))

    def cut(self):
        """Gradients of image passes stop here and add up, until backward() sends their sum on at once."""
        self.graph = [x for pair in self.layers for x in pair] + [self.embed, self.head, self.bias]
        self.leaves = [x.detach().float().requires_grad_() for x in self.graph]  # float: many gradients add up
        *layers, self.embed, self.head, self.bias = self.leaves
        self.layers = list(zip(layers[::2], layers[1::2]))

    def backward(self):
        """See cut()."""
        reached = [(x, leaf.grad.to(x.dtype)) for x, leaf in zip(self.graph, self.leaves) if leaf.grad is not None]
        torch.autograd.backward(*zip(*reached))


@dataclass
class Prompt:
    """P encoded prompts and B rows that use them: what logits() takes beside codes [B, N]."""
    ids: torch.Tensor                   # Long (P, max_text_len + 1), left-padded
    real: torch.Tensor                  # Bool (P, max_text_len + 1), False on padding
    row: torch.Tensor                   # Long (B,), the prompt of every row
    cache: TextCache | None = None      # of Showo.prefill, while weights stay as they are
    even: bool = False                  # nothing in real is False, so that no mask is needed
    empty: "Prompt | None" = None       # the empty prompt, prefilled, for guidance

    def __len__(self):
        return len(self.row)

    def __getitem__(self, rows):
        return replace(self, row=self.row[rows])

    def repeat(self, G: int) -> "Prompt":
        """Every row G times: the rows of a group stand together."""
        return replace(self, row=self.row.repeat_interleave(G))


class Gelu(nn.Module):
    """gelu_new, x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3); Phi's activation."""

    def forward(self, x):
        return GeluCPU.apply(x) if x.device.type == "cpu" and x.dtype == torch.float32 else F.gelu(x, approximate="tanh")


class GeluCPU(torch.autograd.Function):
    """The same as x sigmoid(2 u): on a CPU a sigmoid takes a fourth of the time of a tanh. Keeps x alone for the backward pass."""
    A, B = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715   # 2 u = A x + B x^3

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * x).mul_(GeluCPU.B).add_(GeluCPU.A).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        square = x * x
        s = (square * GeluCPU.B).add_(GeluCPU.A).mul_(x).sigmoid_()
        slope = square.mul_(3 * GeluCPU.B).add_(GeluCPU.A).mul_(x)                              # x d 2u / dx
        return torch.ops.aten.sigmoid_backward(grad, s).mul_(slope).addcmul_(grad, s)


class Showo(nn.Module):
    """Phi with q/k layer norms that predicts the code of every masked image token. N image tokens, K codes.

    config: Show-o's config.json as a dict; phi: the language model's sizes (PhiConfig keys) over those of Phi-1.5.
    Raises InputError when the vocabulary does not add up. Source: showlab/Show-o models/modeling_showo.py and training/prompting_utils.py."""

    def __init__(self, config: dict, phi: dict, tokenizer):
        super().__init__()
        self.config, self.tokenizer = dict(config), tokenizer
        for key in ("num_vq_tokens", "codebook_size", "llm_vocab_size", "vocab_size"):
            if type(config.get(key)) is not int or config[key] < 1:
                raise InputError(f"config.json: {key} is {config.get(key)!r}, wanted a positive whole number; does the tokenizer belong to the model?")
        self.N, self.K, self.text_vocab = config["num_vq_tokens"], config["codebook_size"], config["llm_vocab_size"]
        self.code_offset = self.text_vocab + len(SPECIALS)
        if config["vocab_size"] != self.code_offset + self.K + 1 or config.get("mask_token_id", config["vocab_size"] - 1) != config["vocab_size"] - 1:
            raise InputError(f"config.json: vocab_size {config['vocab_size']} is not llm_vocab_size {self.text_vocab} + "
                             f"{len(SPECIALS)} specials + codebook_size {self.K} + 1 mask, the last id")
        if self.K & (self.K - 1):
            raise InputError(f"codebook_size {self.K} is no power of two; does the tokenizer belong to the model?")
        self.pad, self.soi, self.eoi, self.t2i = (self.text_vocab + SPECIALS.index(name)
                                                  for name in ("[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>"))
        self.phi = {**PHI_1_5, **phi, "vocab_size": config["vocab_size"], "qk_layernorm": True, "tie_word_embeddings": False}
        self.phi_config = PhiConfig.from_dict(dict(self.phi))
        self.showo = PhiForCausalLM._from_config(self.phi_config, attn_implementation="sdpa")
        if self.phi_config.hidden_act == "gelu_new":
            for layer in self.showo.model.layers:
                layer.mlp.activation_fn = Gelu()
        self.compute_dtype = None  # torch.bfloat16: matrix products in half precision, weights as they are
        self.grad_checkpoint = False  # compute every layer again in the backward pass, and keep only what goes between them

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    def encode(self, prompts: list[str], max_text_len: int = 128) -> Prompt:
        """prompts -> ids Long[B, max_text_len + 1] = [PAD].. <|t2i|> bos text eos; over-long text is cut, eos kept."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), max_text_len + 1), self.pad)
        prompts = [text.encode("utf-8", "replace").decode() for text in prompts]  # lone surrogates, which no tokenizer takes
        for row, text in zip(ids, self.tokenizer(prompts)["input_ids"] if prompts else []):
            text = [self.t2i] + ([] if text[:1] == [bos] else [bos]) + list(text) + [eos]
            if len(text) > len(row):
                text = text[:max_text_len] + [eos]
            row[len(row) - len(text):] = torch.tensor(text)
        ids = ids.to(self.device)
        return Prompt(ids, ids != self.pad, torch.arange(len(ids), device=self.device))

    def prefill(self, prompt: Prompt, guided=False) -> Prompt:
        """The text part, which is causal and never sees the image: its keys and values, once per prompt, for many logits()
        while the weights stay as they are.

        Prompts that no row uses are left out; guided: the empty prompt too."""
        used, row = prompt.row.unique(return_inverse=True)
        ids, real = prompt.ids[used], prompt.real[used]
        pads = (~real).sum(1)
        ids, real = ids[:, pads.min():], real[:, pads.min():]                   # columns that are padding in every prompt
        even, cache, i = bool(real.all()), TextCache(), torch.arange(ids.shape[1], device=ids.device)
        attend = (i[:, None] >= i[None]) & real[:, None] | (i[:, None] == i[None])  # (P, text, text); padding sees itself
        embed, head, codes = self.showo.model.embed_tokens.weight, self.showo.lm_head, slice(self.code_offset, self.code_offset + self.K)
        self._blocks(F.embedding(ids, embed), i, None if even else attend[:, None], cache)
        cache.embed = torch.cat([embed[self.code_offset:], embed[[self.soi, self.eoi]]])
        cache.head, cache.bias = head.weight[codes].float(), head.bias[codes].float()               # 8,192 of 58,498
        return Prompt(ids, real, row, cache, even, self.prefill(self.encode([""])) if guided else None)

    def logits(self, codes, prompt: Prompt, *, guidance: float = 0.0, at=None):
        """codes Long[B, N] (K = masked), prompt of B rows -> Float32[B, N, K]; logits at a position predict that position.

        <|soi|>, image tokens and <|eoi|> see each other both ways and all real text. guidance g > 0: (1 + g) * conditional
        - g * unconditional, the latter with the empty prompt. at: Long[B, M], the positions whose logits are wanted ->
        Float32[B, M, K]. Raises ValueError when the numbers of rows differ."""
        B, N = codes.shape
        if len(prompt) != B:
            raise ValueError(f"logits: {B} rows of codes, {len(prompt)} rows of prompts")
        if prompt.cache is None or (guidance and prompt.empty is None):
            prompt = self.prefill(prompt, bool(guidance))
        if guidance:
            cond = self.logits(codes, prompt, at=at)
            uncond = self.logits(codes, prompt.empty[torch.zeros_like(codes[:, 0])], at=at)
            return (1 + guidance) * cond - guidance * uncond
        prompt.cache.row = prompt.row
        ids = F.pad(F.pad(codes, (1, 0), value=self.K + 1), (0, 1), value=self.K + 2)                   # (B, N + 2) soi codes eoi
        text, attend = prompt.ids.shape[1], None
        if not prompt.even:
            seen = F.pad(prompt.real[prompt.row], (0, N + 2), value=True)[:, None, None]                # (B, 1, 1, text + N + 2)
            attend = torch.zeros_like(seen, dtype=prompt.cache.embed.dtype).masked_fill(~seen, -math.inf).expand(-1, -1, N + 2, -1)
        at = torch.arange(N, device=codes.device).expand(B, N) if at is None else at
        hidden = self._blocks(F.embedding(ids, prompt.cache.embed), torch.arange(text, text + N + 2, device=codes.device), attend,
                              prompt.cache, at=at + 1)
        with torch.autocast(codes.device.type, enabled=False):
            return F.linear(hidden.float(), prompt.cache.head, prompt.cache.bias)

    def _blocks(self, hidden, position, attend, cache, at=None):
        """What PhiModel does, but with the mask as it is: none wherever none is needed, so that the fastest kernels apply. The
        text (at None) is causal; of the image, the last block computes at Long[B, M] alone, which sees the keys of all."""
        phi, causal = self.showo.model, at is None
        with self.autocast():
            rotary = phi.rotary_emb(hidden, position[None])
            for i, layer in enumerate(phi.layers):
                if i + 1 == len(phi.layers) and not causal:
                    cache.image = self._keys(layer, hidden, rotary)
                    hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
                    rotary = [x[0][at] for x in rotary]
                    attend = attend if attend is None else attend[:, :, :1].expand(-1, -1, at.shape[1], -1)
                block = functools.partial(layer, attention_mask=attend, past_key_values=cache, position_embeddings=rotary, is_causal=causal)
                again = self.grad_checkpoint and torch.is_grad_enabled() and not causal and cache.image is None
                hidden = compute_again(block, hidden, use_reentrant=False) if again else block(hidden)
            cache.image = None
            return phi.final_layernorm(hidden)

    @staticmethod
    def _keys(layer, hidden, rotary):
        """Keys and values of every position, as PhiAttention makes them."""
        part, x = layer.self_attn, layer.input_layernorm(hidden)
        key, value = (make(x).unflatten(-1, (-1, part.head_dim)).transpose(1, 2) for make in (part.k_proj, part.v_proj))
        key = part.k_layernorm(key)
        turned, _ = apply_rotary_pos_emb(key[..., :part.rotary_ndims], key[..., :part.rotary_ndims], *rotary)
        return torch.cat([turned, key[..., part.rotary_ndims:]], -1), value

    def autocast(self):
        """Matrix products in compute_dtype. Around several passes, it casts each weight once for all of them."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype is not None)

    def save(self, folder, state=None):
        """Write Show-o's layout (config.json, pytorch_model.safetensors) with the tokenizer's files and phi_config.json.
        state: the weights, where they are not self's own."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / "config.json", self.config)
        write_json(folder / "phi_config.json", {"model_type": "phi", **self.phi})
        write_weights(folder / "pytorch_model.safetensors", self.state_dict() if state is None else state)


def load_showo(path_or_hub_id, *, tokenizer=None, device="cpu", dtype=torch.float32, revision=None, like=None) -> Showo:
    """A folder or hub id with config.json and weights, or a bare state_dict file (.pth, .bin, .safetensors) -> Showo.

    tokenizer: folder or hub id; None = the folder's own files if it has them, else microsoft/phi-1_5. dtype: weights are
    cast one by one while loading. revision: of the hub repository, as is NAME@REVISION for every hub id. like: the folder or
    hub id (of that revision) whose config.json a bare file takes when none lies beside it; None = sizes from its weights, N 1024.
    Raises InputError when a file is missing or unreadable, or a weight is missing, surplus or of another shape."""
    path = fetch(path_or_hub_id, ["config", "weights"], ["tokenizer"], revision)
    folder = path if path.is_dir() else path.parent
    if path.is_file() and like and not (folder / "config.json").exists():
        folder = fetch(like, ["config"], ["tokenizer"], revision)
    config = read_json(folder / "config.json") if path.is_dir() or (folder / "config.json").exists() else None
    phi = read_json(folder / "phi_config.json") if (folder / "phi_config.json").exists() else {}
    text = load_tokenizer(tokenizer or (folder if (folder / "tokenizer_config.json").exists() else "microsoft/phi-1_5"))
    state = read_weights(path, device=device, dtype=dtype)
    if config is None:
        config, phi = _infer_config(path, state, len(text), phi)
    unused = [name for name in state if name.startswith("mm_projector.")]
    if unused:
        warnings.warn(f"{path_or_hub_id}: its mm_projector ({len(unused)} weights, for understanding pictures) is not used", stacklevel=2)
    if len(text) > config.get("llm_vocab_size", len(text)):
        raise InputError(f"--tokenizer: has {len(text)} entries, {path_or_hub_id} room for {config['llm_vocab_size']}; they do not belong together")
    model = build(folder / "config.json", Showo, config | {"w_clip_vit": False}, phi, text)  # what save() writes has no projector
    load_strict(model, {name: weight for name, weight in state.items() if name not in unused}, path)
    model.showo.model.rotary_emb = type(model.showo.model.rotary_emb)(model.phi_config).to(device)
    return model.eval()


def load_tokenizer(path_or_hub_id):
    """A folder or hub id (NAME@REVISION pins it) -> transformers' tokenizer; raises InputError."""
    path = fetch(path_or_hub_id, ["tokenizer"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise ValueError("it has no bos or eos token")
        return tokenizer
    except Exception as error:  # a damaged tokenizer.json raises plain Exceptions
        raise InputError(f"--tokenizer {path_or_hub_id}: cannot load it ({first_line(error)}); name a folder with "
                         "tokenizer.json or a hub id") from None


def _infer_config(path, state, n_text, phi):
    """A bare state_dict (the authors' RL checkpoint) has no config: take the sizes from the shapes of its weights."""
    try:
        (vocab, hidden), (inner, _) = (state[f"showo.model.{n}.weight"].shape for n in ("embed_tokens", "layers.0.mlp.fc1"))
        heads = hidden // state["showo.model.layers.0.self_attn.q_layernorm.weight"].shape[0]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path}: not a Show-o state_dict, {error} is missing or of another shape") from None
    layers = 24 if hidden == PHI_1_5["hidden_size"] else len({k.split(".")[3] for k in state if k.startswith("showo.model.layers.")})
    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=layers)
    config = {"_class_name": "Showo", "_diffusers_version": "0.30.1", "codebook_size": vocab - n_text - len(SPECIALS) - 1,
              "llm_model_path": "microsoft/phi-1_5", "llm_vocab_size": n_text, "load_from_showo": True,
              "mask_token_id": vocab - 1, "num_vq_tokens": 1024, "vocab_size": vocab, "w_clip_vit": False}
    return config, {**sizes, **phi}


# ---------------------------------------------------------------------------------------------- MAGVIT-v2

def _norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class AttnBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = _norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(h.unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Blocks at one resolution, then an optional change of it."""

    def __init__(self, c_in, c_out, n_blocks, down=False, up=False):
        super().__init__()
        self.block = nn.Sequential(*(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n_blocks)))
        if down:
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2)})
        if up:
            self.upsample = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, padding=1)})

    def forward(self, x):
        x = self.block(x)
        if hasattr(self, "downsample"):
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0))
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, in_ch=3, **_):
        super().__init__()
        width, last = [ch] + [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(in_ch, ch, 3, padding=1)
        self.down = nn.Sequential(*(Level(width[i], width[i + 1], num_res_blocks[i], down=i < last) for i in range(last + 1)))
        self.mid, self.norm_out = Middle(width[-1]), _norm(width[-1])
        self.conv_out, self.quant_conv = nn.Conv2d(width[-1], z_channels, 3, padding=1), nn.Conv2d(z_channels, z_channels, 1)

    def forward(self, x):
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(self.down(self.conv_in(x)))))))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, out_ch=3, **_):
        super().__init__()
        width = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]  # level i turns width[i + 1] into width[i], from last to 0
        self.post_quant_conv, self.conv_in = nn.Conv2d(z_channels, z_channels, 1), nn.Conv2d(z_channels, width[-1], 3, padding=1)
        self.mid = Middle(width[-1])
        self.up = nn.ModuleList(Level(width[i + 1], width[i], num_res_blocks[i], up=i > 0) for i in range(len(ch_mult)))
        self.norm_out, self.conv_out = _norm(width[0]), nn.Conv2d(width[0], out_ch, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Look-up-free: a code is the sign pattern of its channels, the most significant bit first; 0 counts as negative."""

    def __init__(self, bits):
        super().__init__()
        self.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))
        codes = torch.arange(2 ** bits)[:, None]
        self.register_buffer("embedding", (codes & self.power_vals).ne(0).float() * 2 - 1)  # (K, bits), +-1

    def forward(self, hidden):  # (B, bits, H, W) -> Long[B, H*W]
        return ((hidden > 0) * self.power_vals[:, None, None]).sum(1).flatten(1)


class MAGVITv2(nn.Module):
    """Images <-> codes. Source: showlab/Show-o models/modeling_magvitv2.py (the defaults are the released sizes)."""

    FULL = dict(encoder=dict(ch=128, ch_mult=[1, 2, 2, 4, 4], num_res_blocks=[4, 3, 4, 3, 4], z_channels=13),
                decoder=dict(ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=[4, 4, 3, 4, 3], z_channels=13))

    def __init__(self, encoder=None, decoder=None, **_):
        super().__init__()
        self.config = {"encoder": encoder or self.FULL["encoder"], "decoder": decoder or self.FULL["decoder"]}
        self.encoder, self.decoder = Encoder(**self.config["encoder"]), Decoder(**self.config["decoder"])
        self.quantize = Quantizer(self.config["encoder"]["z_channels"])

    def encode(self, images):
        """images Float[B, 3, H, W] in [-1, 1] -> codes Long[B, N], row by row; H and W multiples of the downsampling."""
        return self.quantize(self.encoder(images))

    def decode(self, codes, shape=None):
        """codes Long[B, N] -> Float[B, 3, H, W], about [-1, 1], not clamped; shape (h, w) of the code grid, None = square.

        Chunks of about 1024 codes (a 512 x 512 picture) keep its memory small. Raises ValueError when the codes do not fill the grid."""
        h, w = shape or (int(codes.shape[1] ** 0.5),) * 2
        if h * w != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes do not fill a {h} x {w} grid; give shape=(h, w)")
        z = self.quantize.embedding[codes].unflatten(1, (h, w)).permute(0, 3, 1, 2).contiguous()
        return torch.cat([self.decoder(part) for part in z.split(max(1, 1024 // (h * w)))])

    def save(self, folder, dtype=torch.float32):
        """Write config.json and model.safetensors, floating-point weights as dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"_class_name": "MAGVITv2", **self.config})
        write_weights(folder / "model.safetensors", {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state_dict().items()})


def load_magvit(path_or_hub_id, *, device="cpu") -> MAGVITv2:
    """A folder or hub id (showlab/magvitv2) with config.json and weights -> MAGVITv2 in float32; raises InputError."""
    path = fetch(path_or_hub_id, ["config", "weights"])
    config = read_json(path / "config.json")
    model = build(path / "config.json", MAGVITv2, **{k: config[k] for k in ("encoder", "decoder") if k in config})
    load_strict(model, read_weights(path, device=device, dtype=torch.float32), path)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # a third less time in convolutions


def to_uint8(images):
    """Float[B, 3, H, W] in [-1, 1] -> uint8, truncated as Show-o's scripts do."""
    return ((images.float() + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
