"""Show-o (arXiv 2408.12528) and its image tokenizer MAGVIT-v2 (arXiv 2310.05737): load, prompt ->
ids, codes -> logits, codes -> pixels. Sizes come from the configs, so that the 1.3B model and the
tiny one in shapes/ are one class.

Everything outside this file speaks codes: Long[B, N], values 0..K-1, K = masked. Offsets into the
vocabulary stay here, and so does what makes it fast.

    showo = load_showo("showlab/show-o-512x512", device="cuda")
    prompt = showo.encode(["a red fox in the snow"])
    logits = showo.logits(torch.full((1, showo.N), showo.K, device="cuda"), prompt)   # (1, N, K)

Departures from Show-o's code:
- a prompt that spells one of Show-o's ten special tokens ("<|soi|>", "[PAD]") is plain text, never
  a control token (<|endoftext|> is the tokenizer's own, and stays one);
- the text never sees the image, so its keys and values are computed once per prompt, without
  columns that are padding in every prompt (rotary embeddings are relative: both are exact);
- of the head only the K columns of image codes, and head and last block only at wanted positions.
"""
import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support import weights as disk
from support.weights import fetch, library, load_strict, read_json, read_weights

SPECIALS = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>",
            "<|v2v|>", "<|lvg|>")
PHI_1_5 = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
               num_attention_heads=32, max_position_embeddings=2048, hidden_act="gelu_new",
               layer_norm_eps=1e-5, rope_theta=10000.0, partial_rotary_factor=0.5,
               initializer_range=0.02, qk_layernorm=True, tie_word_embeddings=False)
BUDGET = {False: 0.5, True: 0.1}    # torch.compile's activation_memory_budget: without, with
                                    # grad_checkpoint


# ------------------------------------------------------------------------------ Phi

class Phi(nn.Module):
    """The weights of Phi, under the names that transformers' PhiForCausalLM gives them; block()
    computes with them."""

    def __init__(self, vocabulary, phi):
        super().__init__()
        C, inner = phi["hidden_size"], phi["intermediate_size"]
        d = C // phi["num_attention_heads"]

        def layer():
            attention = {name: nn.Linear(C, C) for name in ("q_proj", "k_proj", "v_proj", "dense")}
            norms = {name: nn.LayerNorm(d) for name in ("q_layernorm", "k_layernorm")}
            mlp = {"fc1": nn.Linear(C, inner), "fc2": nn.Linear(inner, C)}
            return nn.ModuleDict({"self_attn": nn.ModuleDict(attention | norms),
                                  "mlp": nn.ModuleDict(mlp), "input_layernorm": nn.LayerNorm(C)})

        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(vocabulary, C),
            "layers": nn.ModuleList(layer() for _ in range(phi["num_hidden_layers"])),
            "final_layernorm": nn.LayerNorm(C)})
        self.lm_head = nn.Linear(C, vocabulary)


def block(x, w, text, rotary, mask, at, heads, dtype):
    """Compute a layer of Phi as Show-o has it: attention, with layer norms of q and k, and MLP side
    by side on one layer norm. Return Float32 (B, n, C), or (B, M, C).

    x Float32 (B, n, C): the residual stream. w: {name: (weight, bias, ...)}. text: keys and values
    (B, heads, n_text, d) of the tokens before x; None: x is the text itself, and its keys and
    values are returned, too. rotary: cos and sin, (n, r) each. mask: of attention, (B, 1, 1 or n,
    n_text + n), or None. at Long (B, M): the positions that are wanted, or None. dtype: of the
    matrix products; norms and sums are float32.
    Source: transformers' PhiDecoderLayer with qk_layernorm, which Show-o forces."""
    h = norm(x, w["input_layernorm"]).to(dtype)                                      # (B, n, C)
    keys = norm(split(linear(h, *w["k_proj"]), heads), w["k_layernorm"])    # (B, heads, n, d)
    keys, values = turn(keys, *rotary).to(dtype), split(linear(h, *w["v_proj"]), heads)
    if text is not None:
        keys, values = torch.cat([text[0], keys], 2), torch.cat([text[1], values], 2)
    if at is not None:
        x, h = (y.gather(1, at[..., None].expand(-1, -1, y.shape[2])) for y in (x, h))
        rotary = [table[at][:, None] for table in rotary]                           # (B, 1, M, r)
    queries = norm(split(linear(h, *w["q_proj"]), heads), w["q_layernorm"])
    queries = turn(queries, *rotary).to(dtype)
    if mask is not None:
        mask = mask.expand(-1, -1, queries.shape[2], -1)

    attended = F.scaled_dot_product_attention(queries, keys, values, mask)
    attended = linear(attended.transpose(1, 2).flatten(2), *w["dense"])
    inner = F.gelu(linear(h, *w["fc1"]), approximate="tanh")
    x = x + attended + linear(inner, *w["fc2"])
    return x if text is not None else (x, keys, values)


def norm(x, w):
    return F.layer_norm(x.float(), x.shape[-1:], *w)        # eps 1e-5, as Phi's


def linear(x, weight, bias, A=None, B=None):
    """Return x W' + b, with adapters (LoRA, arXiv 2106.09685) + 2 x A' B'."""
    y = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    return y if A is None else y + 2 * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def split(x, heads):        # (B, n, C) -> (B, heads, n, d)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def turn(x, cos, sin):
    """Rotate the first r channels of x (B, heads, n, d) by their positions' angles, channel i with
    channel i + r/2 (rotary embeddings, arXiv 2104.09864); cos, sin (n, r)."""
    r = cos.shape[-1]
    first, second, rest = x.split([r // 2, r // 2, x.shape[-1] - r], -1)
    turned = torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1)


# ------------------------------------------------------------------------------ Show-o

@dataclass
class Text:
    """What the image passes of P prompts share until the weights change: text keys and values, and
    the rows of embedding and head that image tokens use (so that no gradient has the size of the
    vocabulary)."""
    weights: list[dict]             # of each layer, see block()
    layers: list[tuple]             # keys, values of each layer, Float (P, heads, n_text, d)
    embed: torch.Tensor             # Float32 (K + 3, C): codes, mask, soi, eoi
    head: torch.Tensor              # Float32 (K, C)
    bias: torch.Tensor              # Float32 (K,)


@dataclass
class Prompt:
    """P encoded prompts, and B rows that use them."""
    ids: torch.Tensor                   # Long (P, max_text_len + 1), left-padded; prefill() cuts
                                        # columns that are padding in all prompts
    row: torch.Tensor                   # Long (B,), the prompt of every row
    # of prefill():
    text: Text | None = None
    real: torch.Tensor | None = None    # Bool, as ids: False on padding; None where none is left
    empty: "Prompt | None" = None       # the empty prompt, prefilled, for guidance

    def __len__(self):
        return len(self.row)

    def __getitem__(self, rows):
        return replace(self, row=self.row[rows])

    def repeat(self, G: int) -> "Prompt":
        """Return every row G times, the rows of a group together."""
        return replace(self, row=self.row.repeat_interleave(G))


class Showo(nn.Module):
    """Phi with q/k layer norms that predicts the code of every masked image token.

    .N image tokens, .K codes. config: Show-o's config.json; phi: sizes that differ from
    Phi-1.5's. .dtype: of matrix products; the weights may have another. .compiled: block() runs as
    fused kernels (torch.compile). .grad_checkpoint: the backward pass computes the inside of blocks
    again. Source: showlab/Show-o modeling_showo.py, prompting_utils.py."""

    def __init__(self, config: dict, phi: dict, tokenizer):
        super().__init__()
        self.config, self.tokenizer = dict(config), tokenizer
        self.phi = {**PHI_1_5, **phi, "vocab_size": config["vocab_size"]}
        self.dtype, self.adapters_on = torch.float32, True
        self.compiled, self.grad_checkpoint = False, False
        self.N, self.K = config["num_vq_tokens"], config["codebook_size"]
        self.text_vocab = config["llm_vocab_size"]
        self.code_offset = self.text_vocab + len(SPECIALS)
        self.pad, self.soi, self.eoi, _, _, self.t2i = range(self.text_vocab, self.text_vocab + 6)
        assert config["vocab_size"] == self.code_offset + self.K + 1, "the vocabulary's parts"
        assert self.phi["hidden_act"] == "gelu_new" and not self.phi.get("rope_scaling"), "not Phi"
        self.showo = Phi(config["vocab_size"], self.phi)

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    def compute_in(self, dtype):
        """Compute the layers' matrix products in dtype. With LoRA the frozen projections are stored
        in it, too: the merged checkpoint then holds the rounded base, the one that training saw."""
        self.dtype = dtype
        for module in self.showo.model["layers"].modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(dtype)

    def encode(self, prompts: list[str], max_text_len: int = 128) -> Prompt:
        """Return the ids of B prompts, [PAD].. <|t2i|> bos text eos, as a Prompt of B rows; text
        that is too long is cut, eos kept."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), max_text_len + 1), self.pad)
        for row, text in zip(ids, self.tokenizer(prompts)["input_ids"], strict=True):
            text = text if text[:1] == [bos] else [bos, *text]
            text = [self.t2i, *text][:max_text_len] + [eos]
            row[-len(text):] = torch.tensor(text)
        return Prompt(ids.to(self.device), torch.arange(len(ids), device=self.device))

    def prefill(self, prompt: Prompt, guided: bool = False) -> Prompt:
        """Return the prompt with its Text, for many logits() while the weights stay as they are;
        prompts that no row uses are left out. guided: prefill the empty prompt, too."""
        used, row = prompt.row.unique(return_inverse=True)
        real = prompt.ids[used] != self.pad
        n_padding = int((~real).sum(1).min())   # columns that are padding in every prompt
        ids, real = prompt.ids[used, n_padding:], real[:, n_padding:]
        empty = self.prefill(self.encode([""])) if guided else None
        return Prompt(ids, row, self._text_pass(ids, real), None if real.all() else real, empty)

    def _text_pass(self, ids, real) -> Text:
        """Return the Text of ids Long[P, n], real Bool[P, n]."""
        phi, head, n = self.showo.model, self.showo.lm_head, ids.shape[1]
        i = torch.arange(n, device=ids.device)
        sees = (i[:, None] >= i) & real[:, None] | (i[:, None] == i)                # (P, n, n)
        rotary, layers = self._rotary(0, n), []
        x = F.embedding(ids, phi["embed_tokens"].weight).float()
        weights = [self._weights(layer) for layer in phi["layers"]]
        for w in weights:
            x, *keys_and_values = self._run(x, w, None, rotary, sees[:, None], None)
            layers.append(keys_and_values)

        embed, codes = phi["embed_tokens"].weight, slice(self.code_offset, -1)
        embed = torch.cat([embed[self.code_offset:], embed[self.soi:self.eoi + 1]])
        return Text(weights, layers, embed.float(), head.weight[codes].float(),
                    head.bias[codes].float())

    def _weights(self, layer) -> dict:
        """Return the weights of a layer by name, as block() takes them."""
        weights = {"input_layernorm": layer["input_layernorm"].parameters()}
        for name, module in [*layer["self_attn"].items(), *layer["mlp"].items()]:
            given = list(module.parameters())       # weight, bias, adapters
            weights[name] = given if self.adapters_on else given[:2]
        as_half = self.dtype if not (self.grad_checkpoint and torch.is_grad_enabled()) else None
        return {name: [p.float() if name.endswith("norm") else cast(p, as_half) for p in given]
                for name, given in weights.items()}

    def _rotary(self, start, n):
        """Return cos and sin, Float32 (n, r) each, of n positions from start on."""
        d = self.phi["hidden_size"] // self.phi["num_attention_heads"]
        r = int(d * self.phi["partial_rotary_factor"])
        pair = torch.arange(0, r, 2, device=self.device)
        position = torch.arange(start, start + n, device=self.device)
        angle = position[:, None] * (1 / self.phi["rope_theta"] ** (pair / r))      # (n, r / 2)
        return torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()

    @contextlib.contextmanager
    def shared_text(self, prompt: Prompt) -> Iterator[Prompt]:
        """Prefill once, backpropagate many times. Inside the context the text is a leaf that
        collects the gradients of all image passes; on exit they go through the text pass in one
        backward(). In between nothing else may use the leaves."""
        prompt = self.prefill(prompt)
        text = prompt.text
        shared = [*(x for pair in text.layers for x in pair), text.embed, text.head, text.bias]
        leaves = [x.detach().float().requires_grad_(x.requires_grad)    # float: many add up
                  for x in shared]
        *layers, text.embed, text.head, text.bias = leaves
        text.layers = list(zip(layers[::2], layers[1::2], strict=True))
        yield prompt
        reached = [(x, leaf.grad.to(x.dtype)) for x, leaf in zip(shared, leaves, strict=True)
                   if leaf.grad is not None]
        torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])

    def policy(self, prompt: Prompt, guidance: float = 0.0,
               batch: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return sample.rollout's function codes -> logits; the text is computed here, once. batch:
        rows at a time, for memory."""
        prompt = self.prefill(prompt, guided=bool(guidance))
        rows = torch.arange(len(prompt), device=self.device).split(batch or len(prompt))

        def policy(codes):
            parts = [self.logits(codes[i], prompt[i], guidance=guidance) for i in rows]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return policy

    def logits(self, codes: torch.Tensor, prompt: Prompt, *, guidance: float = 0.0,
               positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of codes Long[B, N] (K = masked) under prompts of B rows: Float32
        [B, N, K]; logits[:, i] predict the code at position i.

        <|soi|>, image tokens and <|eoi|> see each other both ways and all real text. guidance g:
        (1 + g) conditional - g unconditional, the latter with the empty prompt. positions:
        Long[B, M], those that are wanted -> Float32[B, M, K]. ValueError if B differs."""
        B, N = codes.shape
        if len(prompt) != B:
            raise ValueError(f"logits: {B} rows of codes, {len(prompt)} rows of prompts")
        if prompt.text is None or (guidance and prompt.empty is None):
            prompt = self.prefill(prompt, bool(guidance))
        if guidance:
            empty = prompt.empty[torch.zeros_like(codes[:, 0])]
            conditional = self.logits(codes, prompt, positions=positions)
            unconditional = self.logits(codes, empty, positions=positions)
            return (1 + guidance) * conditional - guidance * unconditional

        if positions is None:
            positions = torch.arange(N, device=codes.device).expand(B, N)
        hidden = self._image_pass(codes, prompt, positions)
        return F.linear(hidden, prompt.text.head, prompt.text.bias)

    def _image_pass(self, codes, prompt, positions):
        """Return the last hidden states at positions Long[B, M]: Float32 (B, M, C)."""
        text, start = prompt.text, prompt.ids.shape[1]
        ids = F.pad(F.pad(codes, (1, 0), value=self.K + 1), (0, 1), value=self.K + 2)   # soi, eoi
        n, mask = ids.shape[1], None
        if prompt.real is not None:     # without a mask the fastest kernels apply
            # one (1, n) row per picture, broadcast over heads and queries. CUDA's attention copies
            # it to full size unless it has the queries' dtype and a row stride divisible by 8: pad
            # it, then cut it
            seen = F.pad(prompt.real[prompt.row], (0, n + -(start + n) % 8), value=True)
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=codes.device)
            mask = mask.masked_fill_(~seen, -math.inf)[:, None, None, :start + n]

        rotary, x = self._rotary(start, n), F.embedding(ids, text.embed)            # (B, n, C)
        for i, (w, layer) in enumerate(zip(text.weights, text.layers, strict=True)):
            # the last block computes only the wanted positions; + 1: <|soi|> comes first
            at = positions + 1 if i == len(text.layers) - 1 else None
            before = [kv.index_select(0, prompt.row).to(self.dtype) for kv in layer]
            x = self._run(x, w, before, rotary, mask, at)
        return norm(x, [p.float() for p in self.showo.model["final_layernorm"].parameters()])

    def _run(self, x, w, before, rotary, mask, at):
        """Run block(), compiled or checkpointed as configured. One compiled graph serves all
        layers, numbers of rows and of positions, and lengths of text; a size of 1 would need a
        graph of its own, and is not compiled."""
        args = (x, w, before, rotary, mask, at, self.phi["num_attention_heads"], self.dtype)
        if self.compiled and before and 1 not in (len(x), at.shape[1] if at is not None else 0):
            # the dimensions that vary, so that no new graph is made for each value
            for tensor, dims in ((x, [0]), (mask, [0, 3]), (at, [0, 1]),
                                 *((kv, [0, 2]) for kv in before)):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, dims)
            # how much of what a block computes is kept for the backward pass
            torch._functorch.config.activation_memory_budget = BUDGET[self.grad_checkpoint]
            return compiled_block()(*args)
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def save(self, folder: Path) -> None:
        """Write Show-o's layout, with the tokenizer's files and phi_config.json."""
        self.tokenizer.save_pretrained(folder)
        disk.mend_tokenizer(folder)
        disk.write_model(folder, "pytorch_model", self.merged_state(), config=self.config,
                         phi_config={"model_type": "phi", **self.phi})

    def trainable(self) -> dict:
        """Return the parameters that are trained: all, or with LoRA the adapters."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def add_lora(self, rank):
        """Freeze the weights and train adapters of a rank on the projections of attention and MLP
        (LoRA, arXiv 2106.09685), scaled by 2; see linear()."""
        self.requires_grad_(False)
        for module in self.showo.model["layers"].modules():
            if isinstance(module, nn.Linear):
                n_out, n_in = module.weight.shape
                module.lora_A = nn.Parameter(torch.empty(rank, n_in, device=self.device))
                module.lora_B = nn.Parameter(torch.zeros(n_out, rank, device=self.device))
                nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))

    @contextlib.contextmanager
    def frozen_base(self) -> Iterator["Showo"]:
        """Within, the model is the one that it was before training: adapters off, no gradient."""
        self.adapters_on = False
        try:
            with torch.no_grad():
                yield self
        finally:
            self.adapters_on = True

    def merged_state(self) -> dict:
        """Return the state_dict with the adapters, if any, added to the weights they belong to."""
        state = self.state_dict()
        for name in [name for name in state if name.endswith("lora_A")]:
            A, B, weight = state.pop(name), state.pop(name[:-1] + "B"), name[:-6] + "weight"
            state[weight] = state[weight] + 2 * B @ A
        return state


def cast(p, dtype):
    """Cast a weight. The copy's gradient is added to p.grad in float32 as soon as it is computed,
    so that the low-precision gradients never exist all at once."""
    if dtype in (None, p.dtype):
        return p
    copy = p.detach().to(dtype)
    if p.requires_grad and torch.is_grad_enabled():
        def add_up(copy):
            p.grad = copy.grad.to(p.dtype) if p.grad is None else p.grad.add_(copy.grad)
            copy.grad = None
        copy.requires_grad_().register_post_accumulate_grad_hook(add_up)
    return copy


@functools.cache
def compiled_block():
    torch._dynamo.config.recompile_limit = 64       # with and without gradient, mask, adapters ...
    return torch.compile(block)


# ------------------------------------------------------------------------------ loading

def load_showo(path_or_hub_id: str | Path, *, tokenizer: str | Path | None = None,
               device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
               like: str | Path | None = None) -> Showo:
    """Load Show-o from a folder or hub id with config.json and weights, or from a bare state_dict
    file (.pth, .bin, .safetensors). like: folder or hub id that has the config.json of a bare file,
    if there is none beside it. tokenizer: folder or hub id (default: the folder's own, or
    microsoft/phi-1_5)."""
    path = fetch(path_or_hub_id)
    state = {name: weight for name, weight in read_weights(path, device, dtype).items()
             if not name.startswith("mm_projector.")}       # for understanding pictures
    folder = path if path.is_dir() else path.parent
    if read_json(folder / "config.json").get("_class_name") != "Showo":
        folder = fetch(like or "showlab/show-o-512x512", "*config.json")
    # saved without mm_projector: config.json says so
    config = read_json(folder / "config.json") | {"w_clip_vit": False}
    phi = read_json(folder / "phi_config.json")         # {} with the released weights
    own_tokenizer = folder if (folder / "tokenizer_config.json").exists() else "microsoft/phi-1_5"
    folder = fetch(tokenizer or own_tokenizer, *disk.TOKENIZER)
    text = library("transformers").AutoTokenizer.from_pretrained(folder)
    assert len(text) <= config["llm_vocab_size"], "the tokenizer has more entries than the model"
    with torch.device("meta"):
        model = Showo(config, phi, text)
    load_strict(model, state, path)
    model.source, model.dtype = path_or_hub_id, dtype
    return model.eval()


def load_models(model, *, ckpt=None, vq=None, tokenizer=None, device="cpu", dtype=torch.float32,
                compiled=None):
    """Load Show-o and its image tokenizer -> (Showo, MAGVITv2).

    model: as for load_showo, or "shapes", the tiny base; ckpt: weights in place of the model's.
    compiled: None = on a GPU."""
    vq = vq or disk.image_tokenizer(model)
    showo = load_showo(ckpt or model, tokenizer=tokenizer, device=device, dtype=dtype,
                       like=model if ckpt else None)
    showo.compiled = showo.device.type == "cuda" if compiled is None else compiled
    magvit = load_magvit(vq, device=device)
    if len(magvit.quantize.embedding) != showo.K:
        raise SystemExit(f"--vq {vq}: its codebook is not of the model's size, {showo.K}")
    return showo, magvit


def describe(showo, magvit, prompts=()) -> str:
    """Return a line that says what was loaded, whether prompts repeat, and how many of the
    first 10,000 are too long for encode()."""
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (showo, magvit)]
    line = (f"{showo.source}: {millions[0]:.1f}M, N {showo.N}, K {showo.K}; {magvit.source}: "
            f"{millions[1]:.1f}M; on {showo.device}")
    if len(set(prompts)) < len(prompts):
        line += f"; {len(prompts):,} prompts, {len(set(prompts)):,} different"
    checked = list(prompts[:10_000])
    n_cut = sum(len(ids) > 128 - 2 for ids in                           # <|t2i|> and bos
                showo.tokenizer(checked)["input_ids"]) if checked else 0
    return line + f"; {n_cut} of {len(checked)} prompts are cut to 128 tokens" * bool(n_cut)


# ------------------------------------------------------------------------------ MAGVIT-v2

def _norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = _norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None]                 # (B, 1, HW, C)
                   for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(h.unflatten(2, x.shape[2:]))


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def middle(c):
    return named(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c))


def level(c_in, c_out, n_blocks, change=None):
    """Return blocks at one resolution, and then a change of it, if any."""
    blocks = [ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n_blocks)]
    layers = {"block": nn.Sequential(*blocks)}
    if change == "downsample":
        layers[change] = named(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                               conv=nn.Conv2d(c_out, c_out, 3, stride=2))
    if change == "upsample":
        layers[change] = named(resize=nn.Upsample(scale_factor=2.0),
                               conv=nn.Conv2d(c_out, c_out, 3, padding=1))
    return named(**layers)


def encoder(ch, ch_mult, num_res_blocks, z_channels, in_ch=3, **_):
    """Return the network from images Float[B, 3, H, W] to bits Float[B, z_channels, h, w]."""
    width, n_levels = [ch, *(ch * m for m in ch_mult)], len(ch_mult)
    changes = ["downsample"] * (n_levels - 1) + [None]
    down = [level(width[i], width[i + 1], num_res_blocks[i], changes[i]) for i in range(n_levels)]
    return named(conv_in=nn.Conv2d(in_ch, ch, 3, padding=1), down=nn.Sequential(*down),
                 mid=middle(width[-1]), norm_out=_norm(width[-1]), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(width[-1], z_channels, 3, padding=1),
                 quant_conv=nn.Conv2d(z_channels, z_channels, 1))


def decoder(ch, ch_mult, num_res_blocks, z_channels, out_ch=3, **_):
    """Return the network back, from bits of +-1 to images in about [-1, 1]."""
    width = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]
    up = {str(i): level(width[i + 1], width[i], num_res_blocks[i], "upsample" if i > 0 else None)
          for i in reversed(range(len(ch_mult)))}       # level 0, the finest, comes last
    return named(post_quant_conv=nn.Conv2d(z_channels, z_channels, 1),
                 conv_in=nn.Conv2d(z_channels, width[-1], 3, padding=1), mid=middle(width[-1]),
                 up=named(**up), norm_out=_norm(width[0]), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(width[0], out_ch, 3, padding=1))


class Quantizer(nn.Module):
    """Look-up-free: a code is the sign pattern of its channels, the most significant bit first; 0
    counts as negative."""

    def __init__(self, bits):
        super().__init__()
        self.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))
        codes = torch.arange(2 ** bits)[:, None]
        signs = (codes & self.power_vals).ne(0).float() * 2 - 1                 # (K, bits), +-1
        self.register_buffer("embedding", signs)


class MAGVITv2(nn.Module):
    """Images <-> codes. Source, and the sizes: showlab/Show-o models/modeling_magvitv2.py."""
    SIZES = {
        "encoder": dict(ch=128, ch_mult=[1, 2, 2, 4, 4], num_res_blocks=[4, 3, 4, 3, 4],
                        z_channels=13),
        "decoder": dict(ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=[4, 4, 3, 4, 3],
                        z_channels=13)}

    def __init__(self, config=None):
        super().__init__()
        self.config = {"_class_name": "MAGVITv2", **self.SIZES, **(config or {})}
        self.encoder = encoder(**self.config["encoder"])
        self.decoder = decoder(**self.config["decoder"])
        self.quantize = Quantizer(self.config["encoder"]["z_channels"])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the codes of images Float[B, 3, H, W] in [-1, 1], row by row: Long[B, N]. H and W
        are multiples of the downsampling."""
        bits = self.encoder(images) > 0                                     # (B, bits, h, w)
        return (bits * self.quantize.power_vals[:, None, None]).sum(1).flatten(1)

    def decode(self, codes: torch.Tensor, shape: tuple | None = None) -> torch.Tensor:
        """Return the images of codes Long[B, N]: Float[B, 3, H, W], about [-1, 1], not clamped.
        shape: rows and columns of codes, None = square. Chunks of 1024 codes bound the memory."""
        h, w = shape or (math.isqrt(codes.shape[1]),) * 2
        z = self.quantize.embedding[codes].unflatten(1, (h, w)).permute(0, 3, 1, 2)
        parts = z.contiguous().split(max(1, 1024 // (h * w)))
        return torch.cat([self.decoder(part) for part in parts])

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        disk.write_model(folder, "model", self.state_dict(), config=self.config)


def load_magvit(path_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> MAGVITv2:
    """Load MAGVIT-v2 in float32 from a folder or hub id with config.json and weights."""
    path = fetch(path_or_hub_id)
    with torch.device("meta"):
        model = MAGVITv2(read_json(path / "config.json"))
    load_strict(model, read_weights(path, device, torch.float32), path)
    model.source = path_or_hub_id
    if torch.device(device).type == "cpu":  # channels_last: a third faster there, no gain on CUDA
        model = model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def to_uint8(images):
    """Return Float[B, 3, H, W] in [-1, 1] as uint8, truncated as in Show-o's scripts."""
    return ((images.float() + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
