"""Show-o (arXiv 2408.12528) and its image tokenizer MAGVIT-v2 (arXiv 2310.05737): load, prompt ->
ids, codes -> logits, codes -> pixels. Sizes come from the configs, so that the 1.3B model and the
tiny one in shapes/ are one class.

Everything outside this file speaks codes: Long[B, N], values 0..K-1, K = masked. Offsets into the
vocabulary stay here, and so does what makes it fast.

    showo = load_showo("showlab/show-o-512x512", device="cuda")
    prompt = showo.encode(["a red fox in the snow"])
    logits = showo.logits(torch.full((1, showo.N), showo.K, device="cuda"), prompt)   # (1, N, K)

Departures from Show-o's code:
- a prompt that spells a special token ("<|soi|>", "[PAD]") is plain text, never a control token;
- the text never sees the image, so its keys and values are computed once per prompt, without
  columns that are padding in every prompt (rotary embeddings are relative: both are exact);
- of the head only the K columns of image codes, and head and last block only at wanted positions.
"""
import contextlib
import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import (
    InputError,
    build,
    fetch,
    first_line,
    is_shapes,
    load_strict,
    read_json,
    read_weights,
    write_json,
    write_weights,
)

try:
    import torchvision  # noqa: F401  (transformers and open_clip import it when it is there)
except ImportError:
    pass
except RuntimeError as error:  # a CUDA build of torchvision beside a CPU build of torch
    if "torchvision::nms" not in str(error):
        raise
    _ops = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM  # noqa: E402
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb  # noqa: E402

SPECIALS = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>",
            "<|v2v|>", "<|lvg|>")
PHI_1_5 = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
               num_attention_heads=32, max_position_embeddings=2048, hidden_act="gelu_new",
               layer_norm_eps=1e-5, rope_theta=10000.0, partial_rotary_factor=0.5)


# ------------------------------------------------------------------------------ Show-o

class Text:
    """What all image passes over the same P prompts share: keys and values of the text, and the
    rows of embeddings and head that image tokens use (no gradient of the whole vocabulary's size).

    Stands in the place of transformers' cache: the text pass records keys and values, image passes
    put them before their own."""

    def __init__(self):
        self.layers = []                # (key, value), Float (P, heads, text, d) each
        self.row = None                 # Long (B,), the prompt of every row of the image pass
        self.image = None               # (key, value) of all positions, where a block computes some
        self.embed = None               # Float (K + 3, width): codes, mask, soi, eoi
        self.head = self.bias = None    # Float32 (K, width), (K,)

    def update(self, key, value, layer, *_, **__):
        """Return the keys and values that a layer attends to; transformers' attention calls it."""
        if len(self.layers) == layer:
            self.layers.append((key, value))
            return key, value
        text_key, text_value = self.layers[layer]
        key, value = self.image or (key, value)
        return (torch.cat([text_key.index_select(0, self.row), key], 2),
                torch.cat([text_value.index_select(0, self.row), value], 2))


@dataclass
class Prompt:
    """P encoded prompts, and B rows that use them."""
    ids: torch.Tensor                   # Long (P, max_text_len + 1), left-padded
    real: torch.Tensor                  # Bool (P, max_text_len + 1), False on padding
    row: torch.Tensor                   # Long (B,), the prompt of every row
    text: Text | None = None            # of prefill(), while weights stay as they are
    no_padding: bool = False            # all of real is True, so that no mask is needed
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

    .N image tokens, .K codes. config: Show-o's config.json; phi: PhiConfig's keys over those of
    Phi-1.5. compute_dtype: torch.bfloat16 for products in half precision, weights as they are.
    grad_checkpoint: compute layers again in the backward pass and keep only what lies between them.
    Raises InputError when the vocabulary does not add up.
    Source: showlab/Show-o models/modeling_showo.py and training/prompting_utils.py."""

    def __init__(self, config: dict, phi: dict, tokenizer):
        super().__init__()
        self.config, self.tokenizer = dict(config), tokenizer
        self.compute_dtype, self.grad_checkpoint = None, False
        _check_config(config)
        self.N, self.K = config["num_vq_tokens"], config["codebook_size"]
        self.text_vocab = config["llm_vocab_size"]
        self.code_offset = self.text_vocab + len(SPECIALS)
        self.pad, self.soi, self.eoi, self.t2i = (
            self.text_vocab + SPECIALS.index(name)
            for name in ("[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>"))

        self.phi = {**PHI_1_5, **phi, "vocab_size": config["vocab_size"], "qk_layernorm": True,
                    "tie_word_embeddings": False}
        self.phi_config = PhiConfig.from_dict(dict(self.phi))
        if not 0 < self.phi["partial_rotary_factor"] <= 1:
            raise InputError("phi_config.json: partial_rotary_factor must be over 0, at most 1")
        self.showo = PhiForCausalLM._from_config(self.phi_config, attn_implementation="sdpa")
        for layer in self.showo.model.layers:
            layer.input_layernorm.register_forward_hook(_cast_once)
            layer.mlp.forward = partial(_mlp, layer.mlp)
            for norm in (layer.self_attn.q_layernorm, layer.self_attn.k_layernorm):
                norm.forward = partial(_again_in_half, norm.forward)
            if self.phi_config.hidden_act == "gelu_new":    # the same, in one kernel
                layer.mlp.activation_fn = nn.GELU(approximate="tanh")

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    def autocast(self, cache=None):
        """Return the context of products in compute_dtype. Around several passes, each weight is
        cast once for all of them, unless cache is False."""
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=cache,
                              enabled=self.compute_dtype is not None)

    def compute_in(self, dtype):
        """Set compute_dtype. Frozen projections are held as it, if any: autocast would cast them in
        every pass, where it casts trained ones once. No result changes, but weights that are saved
        with adapters merged have the rounded base, which is the one that was trained."""
        self.compute_dtype = dtype
        for module in self.showo.model.layers.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(dtype or module.weight.dtype)

    def encode(self, prompts: list[str], max_text_len: int = 128) -> Prompt:
        """Return the ids of prompts, [PAD].. <|t2i|> bos text eos: Long[B, max_text_len + 1].

        Over-long text is cut, eos kept."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # lone surrogates, which no tokenizer takes, become "?"
        prompts = [text.encode("utf-8", "replace").decode() for text in prompts]
        ids = torch.full((len(prompts), max_text_len + 1), self.pad)
        for row, text in zip(ids, self.tokenizer(prompts)["input_ids"], strict=True):
            text = text if text[:1] == [bos] else [bos, *text]
            text = [self.t2i, *text, eos]
            if len(text) > len(row):
                text = [*text[:max_text_len], eos]
            row[len(row) - len(text):] = torch.tensor(text)
        ids = ids.to(self.device)
        return Prompt(ids, ids != self.pad, torch.arange(len(ids), device=self.device))

    def prefill(self, prompt: Prompt, guided=False) -> Prompt:
        """Return the prompt with the keys and values of its text, for many logits() while the
        weights stay as they are; prompts that no row uses are left out.

        guided: prefill the empty prompt too."""
        used, row = prompt.row.unique(return_inverse=True)
        ids, real = prompt.ids[used], prompt.real[used]
        n_padding = int((~real).sum(1).min())   # columns that are padding in every prompt
        ids, real = ids[:, n_padding:], real[:, n_padding:]
        no_padding = bool(real.all())

        text = _again(self._text_pass, ids, None if no_padding else real, when=self.grad_checkpoint)
        empty = self.prefill(self.encode([""])) if guided else None
        return Prompt(ids, real, row, text, no_padding, empty)

    def _text_pass(self, ids, real):
        """Return the Text of ids Long[P, n]; real: Bool[P, n], None where all are."""
        text, phi, head = Text(), self.showo.model, self.showo.lm_head
        i = torch.arange(ids.shape[1], device=ids.device)
        itself, causal = i[:, None] == i, i[:, None] >= i
        attend = None if real is None else (causal & real[:, None] | itself)[:, None]
        with self.autocast():
            hidden = F.embedding(ids, phi.embed_tokens.weight)
            rotary = phi.rotary_emb(hidden, i[None])
            for layer in phi.layers:
                hidden = layer(hidden, attention_mask=attend, past_key_values=text,
                               position_embeddings=rotary, is_causal=True)

        embed, codes = phi.embed_tokens.weight, slice(self.code_offset, self.code_offset + self.K)
        text.embed = torch.cat([embed[self.code_offset:], embed[self.soi:self.eoi + 1]])
        text.head, text.bias = head.weight[codes].float(), head.bias[codes].float()
        return text

    @contextlib.contextmanager
    def shared_text(self, prompt: Prompt):
        """Give a prefilled prompt for many backward passes: their gradients stop at the text and
        add up, and their sum goes on through it once, when the context ends."""
        # a cache keeps all weights as compute_dtype, and their gradients to the end of each pass
        with self.autocast(cache=not self.grad_checkpoint):
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

    def policy(self, prompt: Prompt, guidance: float = 0.0):
        """Return the function codes -> logits that sample.rollout calls, closed over prompts whose
        text is computed here, once. Where nothing is masked its logits may be 0."""
        prompt = self.prefill(prompt, guided=bool(guidance))

        def policy(codes):
            """Return Float32[B, N, K] of codes Long[B, N]."""
            masked = codes == self.K
            # on a GPU the host would wait for these numbers, which costs what is gained
            counts = masked.sum(1).tolist() if codes.device.type == "cpu" else [self.N]
            if min(counts) < max(counts) or counts[0] == self.N:
                return self.logits(codes, prompt, guidance=guidance)
            at = masked.nonzero()[:, 1].view(len(codes), counts[0])     # (B, M)
            logits = torch.zeros(*codes.shape, self.K)
            wanted = self.logits(codes, prompt, guidance=guidance, positions=at)
            logits[masked] = wanted.flatten(0, 1)
            return logits
        return policy

    def logits(self, codes, prompt: Prompt, *, guidance: float = 0.0, positions=None):
        """Return the logits of codes Long[B, N] (K = masked) under prompts of B rows: Float32
        [B, N, K], at a position those that predict that position.

        <|soi|>, image tokens and <|eoi|> see each other both ways and all real text. guidance g:
        (1 + g) conditional - g unconditional, the latter with the empty prompt. positions:
        Long[B, M], those that are wanted -> Float32[B, M, K]. Raises ValueError when the numbers of
        rows differ."""
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

        # the first state, all masked, is the same for all rows of a prompt
        if codes.device.type == "cpu" and bool((codes == self.K).all()):
            rows, inverse = prompt.row.unique(return_inverse=True)
            if len(rows) < B:
                logits = self.logits(codes[:len(rows)], replace(prompt, row=rows))
                return logits[inverse if positions is None else (inverse[:, None], positions)]

        if positions is None:
            positions = torch.arange(N, device=codes.device).expand(B, N)
        hidden = self._image_pass(codes, prompt, positions)
        with torch.autocast(codes.device.type, enabled=False):
            return F.linear(hidden.float(), prompt.text.head, prompt.text.bias)

    def _image_pass(self, codes, prompt, positions):
        """Return the last hidden states at positions Long[B, M]: what PhiModel does, without a mask
        wherever none is needed, so that the fastest kernels apply."""
        phi, text = self.showo.model, prompt.text
        text.row = prompt.row
        N, start = codes.shape[1], prompt.ids.shape[1]
        ids = F.pad(F.pad(codes, (1, 0), value=self.K + 1), (0, 1), value=self.K + 2)   # soi, eoi
        attend = None
        if not prompt.no_padding:
            # one row for all queries of all layers: of another type, or if its length in memory is
            # no multiple of 8, CUDA's attention makes a whole mask of it in each layer
            width = start + N + 2
            seen = F.pad(prompt.real[prompt.row], (0, N + 2 + -width % 8), value=True)
            attend = torch.zeros_like(seen, dtype=self.compute_dtype or text.embed.dtype)
            attend = attend.masked_fill_(~seen, -math.inf)[:, None, None, :width]
            attend = attend.expand(-1, -1, N + 2, -1)                   # (B, 1, N + 2, width)

        with self.autocast():
            hidden = F.embedding(ids, text.embed)
            position = torch.arange(start, start + N + 2, device=codes.device)
            rotary = phi.rotary_emb(hidden, position[None])
            how = dict(attention_mask=attend, past_key_values=text, position_embeddings=rotary,
                       is_causal=False)
            for layer in phi.layers[:-1]:
                hidden = _again(layer, hidden, when=self.grad_checkpoint, **how)

            # the last block computes at some positions alone, which see the keys of all
            last, at = phi.layers[-1], positions + 1        # after <|soi|>
            text.image = _keys_and_values(last, hidden, rotary)
            hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
            if attend is not None:
                how["attention_mask"] = attend[:, :, :1].expand(-1, -1, at.shape[1], -1)
            how["position_embeddings"] = [x[0][at] for x in rotary]
            hidden = last(hidden, **how)
            text.image = None
            return phi.final_layernorm(hidden)

    def save(self, folder):
        """Write Show-o's layout (config.json, pytorch_model.safetensors), the tokenizer's files and
        phi_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / "config.json", self.config)
        write_json(folder / "phi_config.json", {"model_type": "phi", **self.phi})
        write_weights(folder / "pytorch_model.safetensors", self.merged_state())

    def trainable(self) -> dict:
        """Return the parameters that are trained: all, or with LoRA the adapters."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def add_lora(self, rank):
        """Freeze the weights and train adapters of a rank on the projections of attention and MLP
        (LoRA, arXiv 2106.09685, by peft), scaled by 2."""
        from peft import LoraConfig, inject_adapter_in_model
        self.requires_grad_(False)
        projections = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections)
        inject_adapter_in_model(config, self.showo)

    def lora_layers(self) -> dict:
        return {name: module for name, module in self.named_modules()
                if hasattr(module, "get_delta_weight")}

    def merged_state(self) -> dict:
        """Return the state_dict with the adapters, if any, added to the weights they belong to."""
        state = {name.replace(".base_layer.", "."): weight
                 for name, weight in self.state_dict().items() if ".lora_" not in name}
        for name, layer in self.lora_layers().items():
            state[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight("default")
        return state


class BaseOf:
    """A Showo with its adapters off: the frozen reference of a policy that trains LoRA."""

    def __init__(self, showo):
        self.showo = showo

    def __getattr__(self, name):
        def without_adapters(*args, **kwargs):
            """Call the method with all adapters scaled by 0."""
            layers = self.showo.lora_layers().values()
            for layer in layers:
                layer.set_scale("default", 0.0)
            try:
                with torch.no_grad():
                    return getattr(self.showo, name)(*args, **kwargs)
            finally:
                for layer in layers:
                    layer.set_scale("default", 1.0)
        value = getattr(self.showo, name)
        return without_adapters if callable(value) else value


def _again(function, *args, when, **how):
    """Call a function; when: keep its inputs alone, and call it again in the backward pass."""
    if when and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **how)
    return function(*args, **how)


def _again_in_half(function, x):
    """Under autocast, call a function again in the backward pass: of q's and k's norms the input is
    kept in half precision, not the float32 that they make of it."""
    return _again(function, x, when=x.requires_grad and torch.is_autocast_enabled(x.device.type))


def _mlp(mlp, x):
    """Do what PhiMLP does, but keep one of the two widest tensors of a layer: the activation is
    computed again (the product after it is not, the backward pass needs no result of it)."""
    return _again_in_half(lambda inner: mlp.fc2(mlp.activation_fn(inner)), mlp.fc1(x))


def _cast_once(norm, args, out):
    """Under autocast a norm returns float32, of which q, k, v and fc1 would each keep a copy."""
    device = out.device.type
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


def _keys_and_values(layer, hidden, rotary):
    """Return keys and values of every position, as transformers' PhiAttention makes them."""
    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    key = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    value = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_layernorm(key)
    turned, rest = key[..., :attention.rotary_ndims], key[..., attention.rotary_ndims:]
    turned, _ = apply_rotary_pos_emb(turned, turned, *rotary)
    return torch.cat([turned, rest], -1), value


def _check_config(config):
    """Raise InputError unless the parts of the vocabulary add up."""
    for key in ("num_vq_tokens", "codebook_size", "llm_vocab_size", "vocab_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise InputError(f"config.json: {key} is {config.get(key)!r}, wanted a positive whole "
                             "number; does the tokenizer belong to the model?")
    text, K, vocab = (config[k] for k in ("llm_vocab_size", "codebook_size", "vocab_size"))
    if vocab != text + len(SPECIALS) + K + 1 or config.get("mask_token_id", vocab - 1) != vocab - 1:
        raise InputError(f"config.json: vocab_size {vocab} is not llm_vocab_size {text} + "
                         f"{len(SPECIALS)} specials + codebook_size {K} + 1 mask, the last id")


# ------------------------------------------------------------------------------ loading

def load_showo(path_or_hub_id, *, tokenizer=None, device="cpu", dtype=torch.float32,
               like=None) -> Showo:
    """Load Show-o from a folder or hub id (NAME@REVISION pins it) with config.json and weights, or
    from a bare state_dict file (.pth, .bin, .safetensors).

    tokenizer: folder or hub id; None = the folder's own files if it has them, else
    microsoft/phi-1_5. dtype: weights are cast one by one. like: the folder or hub id whose
    config.json a bare file takes when none lies beside it; None = sizes from its weights, N 1024.
    Raises InputError when a file is missing or unreadable, or weights do not fit."""
    path = fetch(path_or_hub_id, ["config", "weights"], ["tokenizer"])
    folder = path if path.is_dir() else path.parent
    if path.is_file() and like and not (folder / "config.json").exists():
        folder = fetch(like, ["config"], ["tokenizer"])
    config, phi = None, {}
    if path.is_dir() or (folder / "config.json").exists():
        config = read_json(folder / "config.json")
    if (folder / "phi_config.json").exists():
        phi = read_json(folder / "phi_config.json")
    state = read_weights(path, device=device, dtype=dtype)
    own_tokenizer = folder if (folder / "tokenizer_config.json").exists() else "microsoft/phi-1_5"
    text = load_tokenizer(tokenizer or own_tokenizer)
    if config is None:
        config, sizes = _infer_config(path, state, len(text))
        phi = {**sizes, **phi}
    room = config.get("llm_vocab_size", len(text))
    if isinstance(room, int) and len(text) > room:
        raise InputError(f"--tokenizer: has {len(text)} entries, {path_or_hub_id} room for {room}; "
                         "they do not belong together")

    unused = [name for name in state if name.startswith("mm_projector.")]
    if unused:
        warnings.warn(f"{path_or_hub_id}: its mm_projector ({len(unused)} weights, for "
                      "understanding pictures) is not used", stacklevel=2)
        state = {name: weight for name, weight in state.items() if name not in unused}
    config = config | {"w_clip_vit": False}     # what save() writes has no projector
    model = build(folder / "config.json", Showo, config, phi, text)
    load_strict(model, state, path)
    rotary = model.showo.model.rotary_emb       # its buffers are computed, not loaded
    model.showo.model.rotary_emb = type(rotary)(model.phi_config).to(device)
    model.source = path_or_hub_id
    return model.eval()


def load_tokenizer(path_or_hub_id):
    """Load transformers' tokenizer of a folder or hub id. Raises InputError."""
    path = fetch(path_or_hub_id, ["tokenizer"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True,
                                                  trust_remote_code=False)
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise ValueError("it has no bos or eos token")
    except Exception as error:  # a damaged tokenizer.json raises plain Exceptions
        raise InputError(f"--tokenizer {path_or_hub_id}: cannot load it ({first_line(error)}); "
                         "name a folder with tokenizer.json or a hub id") from None
    return tokenizer


def _infer_config(path, state, n_text):
    """Return config.json and Phi's sizes from the shapes of a bare state_dict's weights (the
    authors' RL checkpoint is one)."""
    try:
        vocab, hidden = state["showo.model.embed_tokens.weight"].shape
        inner, _ = state["showo.model.layers.0.mlp.fc1.weight"].shape
        head_dim, = state["showo.model.layers.0.self_attn.q_layernorm.weight"].shape
        heads = hidden // head_dim
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: not a Show-o state_dict, {error} is missing or of another "
                         "shape") from None
    K = vocab - n_text - len(SPECIALS) - 1
    if K < 1 or K & (K - 1):
        raise InputError(f"{path}: codebook_size {K} is no power of two; does the tokenizer belong "
                         "to the model?")
    layers = {name.split(".")[3] for name in state if name.startswith("showo.model.layers.")}
    config = {"_class_name": "Showo", "_diffusers_version": "0.30.1", "codebook_size": K,
              "llm_model_path": "microsoft/phi-1_5", "llm_vocab_size": n_text,
              "load_from_showo": True, "mask_token_id": vocab - 1, "num_vq_tokens": 1024,
              "vocab_size": vocab, "w_clip_vit": False}
    return config, dict(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
                        num_hidden_layers=len(layers))


def load_models(model, *, ckpt=None, vq=None, tokenizer=None, device="cpu", dtype=torch.float32):
    """Load Show-o and its image tokenizer, whose encoder stays on the CPU -> (Showo, MAGVITv2).

    model: as for load_showo, or "shapes", the tiny base; ckpt: weights in place of the model's.
    Raises InputError, also when the two do not share a codebook."""
    where = ckpt or model
    vq = vq or ("shapes/magvitv2" if is_shapes(model) else "showlab/magvitv2")
    showo = load_showo(where, tokenizer=tokenizer, device=device, dtype=dtype,
                       like=model if ckpt else None)
    magvit = load_magvit(vq, device=device)
    magvit.encoder.cpu()    # 0.2 GB; only decode() is asked of it
    if math.isqrt(showo.N) ** 2 != showo.N:
        raise InputError(f"{where}: {showo.N} image tokens do not fill a square")
    n_codes = len(magvit.quantize.embedding)
    if n_codes != showo.K:
        raise InputError(f"--vq {vq}: has {n_codes} codes, but {where} {showo.K}; they do not "
                         "belong together")
    return showo, magvit


def describe(showo, magvit) -> str:
    """Return a line that says what was loaded."""
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (showo, magvit)]
    phi = showo.phi_config
    return (f"Show-o from {showo.source}: {millions[0]:.1f}M parameters in "
            f"{str(showo.showo.dtype)[6:]}, {phi.num_hidden_layers} layers of {phi.hidden_size}, "
            f"N {showo.N}, K {showo.K}; MAGVIT-v2 from {magvit.source}: {millions[1]:.1f}M; on "
            f"{showo.device}")


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


class Level(nn.Module):
    """Blocks at one resolution, then a change of it, if any."""

    def __init__(self, c_in, c_out, n_blocks, down=False, up=False):
        super().__init__()
        blocks = [ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n_blocks)]
        self.block = nn.Sequential(*blocks)
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
        width, n_levels = [ch, *(ch * m for m in ch_mult)], len(ch_mult)
        self.conv_in = nn.Conv2d(in_ch, ch, 3, padding=1)
        self.down = nn.Sequential(*(
            Level(width[i], width[i + 1], num_res_blocks[i], down=i < n_levels - 1)
            for i in range(n_levels)))
        self.mid, self.norm_out = Middle(width[-1]), _norm(width[-1])
        self.conv_out = nn.Conv2d(width[-1], z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def forward(self, x):
        x = self.mid(self.down(self.conv_in(x)))
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, out_ch=3, **_):
        super().__init__()
        width = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]  # level i: width[i + 1] -> width[i]
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.conv_in = nn.Conv2d(z_channels, width[-1], 3, padding=1)
        self.mid = Middle(width[-1])
        self.up = nn.ModuleList(Level(width[i + 1], width[i], num_res_blocks[i], up=i > 0)
                                for i in range(len(ch_mult)))
        self.norm_out = _norm(width[0])
        self.conv_out = nn.Conv2d(width[0], out_ch, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Look-up-free: a code is the sign pattern of its channels, the most significant bit first; 0
    counts as negative."""

    def __init__(self, bits):
        super().__init__()
        self.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))
        codes = torch.arange(2 ** bits)[:, None]
        signs = (codes & self.power_vals).ne(0).float() * 2 - 1                 # (K, bits), +-1
        self.register_buffer("embedding", signs)

    def forward(self, hidden):
        """Return the codes of hidden Float[B, bits, H, W]: Long[B, H * W]."""
        return ((hidden > 0) * self.power_vals[:, None, None]).sum(1).flatten(1)


class MAGVITv2(nn.Module):
    """Images <-> codes. Source: showlab/Show-o models/modeling_magvitv2.py, whose released sizes
    are the defaults."""

    ENCODER = dict(ch=128, ch_mult=[1, 2, 2, 4, 4], num_res_blocks=[4, 3, 4, 3, 4], z_channels=13)
    DECODER = dict(ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=[4, 4, 3, 4, 3], z_channels=13)

    def __init__(self, encoder=None, decoder=None):
        super().__init__()
        self.config = {"encoder": encoder or self.ENCODER, "decoder": decoder or self.DECODER}
        self.encoder = Encoder(**self.config["encoder"])
        self.decoder = Decoder(**self.config["decoder"])
        self.quantize = Quantizer(self.config["encoder"]["z_channels"])

    def encode(self, images):
        """Return the codes of images Float[B, 3, H, W] in [-1, 1], row by row: Long[B, N]. H and W
        are multiples of the downsampling."""
        return self.quantize(self.encoder(images))

    def decode(self, codes, shape=None):
        """Return the images of codes Long[B, N]: Float[B, 3, H, W], about [-1, 1], not clamped.

        shape: (h, w) of the code grid, None = square. Chunks of about 1024 codes (a 512 x 512
        picture) keep its memory small. Raises ValueError when the codes do not fill the grid."""
        h, w = shape or (math.isqrt(codes.shape[1]),) * 2
        if h * w != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes do not fill a {h} x {w} grid; give "
                             "shape=(h, w)")
        z = self.quantize.embedding[codes].unflatten(1, (h, w)).permute(0, 3, 1, 2).contiguous()
        chunk = max(1, 1024 // (h * w))
        return torch.cat([self.decoder(part) for part in z.split(chunk)])

    def save(self, folder, dtype=torch.float32):
        """Write config.json and model.safetensors, floating-point weights as dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"_class_name": "MAGVITv2", **self.config})
        state = {name: weight.to(dtype) if weight.is_floating_point() else weight
                 for name, weight in self.state_dict().items()}
        write_weights(folder / "model.safetensors", state)


def load_magvit(path_or_hub_id, *, device="cpu") -> MAGVITv2:
    """Load MAGVIT-v2 in float32 from a folder or hub id (showlab/magvitv2) with config.json and
    weights. Raises InputError."""
    path = fetch(path_or_hub_id, ["config", "weights"])
    config = read_json(path / "config.json")
    parts = {key: config[key] for key in ("encoder", "decoder") if key in config}
    model = build(path / "config.json", MAGVITv2, **parts)
    load_strict(model, read_weights(path, device=device, dtype=torch.float32), path)
    model.source = path_or_hub_id
    if torch.device(device).type == "cpu":  # a third less time there; CUDA's GroupNorm undoes it
        model = model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def to_uint8(images):
    """Return Float[B, 3, H, W] in [-1, 1] as uint8, truncated as in Show-o's scripts."""
    return ((images.float() + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
