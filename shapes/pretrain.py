"""Make the tiny base of --model shapes: word tokenizer, image tokenizer and transformer.

    python shapes/pretrain.py --out shapes          # from a seed; about 25 minutes on 2 CPU cores

The base learns from captions of which a share belongs to another picture of the same family, as
captions found on the web often do: it can draw everything, and often draws something else than
asked. That is what RL then mends. The weights that lie here were made at commit c48f290, whose GELU
was another kernel: made again, they differ by rounding, which training then spreads.
"""
import concurrent.futures
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import shapes  # noqa: E402
from common import Parser, in_range, run  # noqa: E402
from model import SPECIALS, MAGVITv2, Prompt, Showo  # noqa: E402

GRID, CELL = shapes.GRID, shapes.CELL
CELLS = GRID ** 2
BITS = 6            # of a code: 40 objects and 3 empty cells fit into 64


def word_tokenizer():
    """Return a tokenizer of the world's words in Hugging Face's format.

    bos = eos = <|endoftext|>, as in Phi's.
    """
    from transformers import PreTrainedTokenizerFast
    words = "<|endoftext|> <|unk|> a an photo of and left right above below".split()
    words += [*shapes.NUMBERS.values(), *shapes.COLOURS]
    words += shapes.CLASSES + [shapes.plural(name) for name in shapes.CLASSES]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        unk_token="<|unk|>")


def one_cycle(optimizer, lr, steps, warmup):
    """Return a schedule that rises to lr for a share `warmup` of the steps, then falls.

    OneCycleLR divides by warmup * steps - 1: a warm-up of just one step has to be left out.
    """
    if warmup * steps == 1:
        warmup = 0.0
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warmup)


def take_step(model, loss, optimizer, schedule):
    """Take one optimizer step down the loss, with the gradient's norm cut at 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


# ---------------------------------------------------------------------------- the image tokenizer

def crowd(rng, B):
    """Draw B pictures with objects all over, half of them sparse.

    -> uint8 (B, 3, 32, 32), and the template of each cell, Long (B, 16).
    """
    shares = [rng.choice((0.15, 0.7)) for _ in range(B)]
    grounds = [rng.randrange(len(shapes.BACKGROUNDS)) for _ in range(B)]
    empty, n = len(shapes.LABELS), len(shapes.BACKGROUNDS)
    labels = [
        [rng.randrange(empty) if rng.random() < share else empty for _ in range(CELLS)]
        for share in shares
    ]
    template = torch.tensor(labels) * n + torch.tensor(grounds)[:, None]            # (B, 16)
    cells = shapes.TEMPLATES[template].view(B, GRID, GRID, 3, CELL, CELL)
    pictures = cells.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, GRID * CELL, GRID * CELL)
    return pictures, template


def pretrain_tokenizer(steps, seed, *, batch=64, lr=2e-3) -> MAGVITv2:
    """Train a MAGVITv2 whose 6 bits number the world's objects and grounds.

    Loss: squared error of the pictures, and logistic loss of the bits.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    size = dict(ch=32, ch_mult=[1, 1, 2, 4], z_channels=BITS)
    model = MAGVITv2(encoder=dict(size, num_res_blocks=[0, 0, 1, 1]),
                     decoder=dict(size, num_res_blocks=[0, 1, 1, 1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = one_cycle(optimizer, lr, steps, warmup=0.1)
    for step in range(steps):
        pictures, template = crowd(rng, batch)
        codes = shapes.TEMPLATE_CODE[template]                                  # (B, 16)
        signs = model.quantize.embedding[codes]                                 # (B, 16, 6), +-1
        signs = signs.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        bits = F.softplus(-signs * model.encoder(shapes.scaled(pictures))).mean()
        mse = F.mse_loss(model.decoder(signs), shapes.scaled(pictures))
        take_step(model, bits + mse, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            print(f"tokenizer {step:5d}/{steps} mse {mse.item():.5f} bits {bits.item():.5f}",
                  flush=True)
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------- the transformer

def lessons(n, rng):
    """Draw n captioned pictures -> captions list[str], family Long (n,), codes Long (n, 16)."""
    lines = shapes.prompts("all", n)
    templates = []
    for i in range(0, n, 256):
        pictures = torch.stack([shapes.render(line, rng)[0] for line in lines[i:i + 256]])
        templates.append(shapes.distances(pictures).argmin(1))
    family = torch.tensor([list(shapes.FAMILIES).index(line["tag"]) for line in lines])
    codes = shapes.TEMPLATE_CODE[torch.cat(templates)].view(n, CELLS)
    return [line["prompt"] for line in lines], family, codes


def new_showo(hidden, layers) -> Showo:
    """Return a Showo with random weights for the world's words and codes."""
    tokenizer = word_tokenizer()
    K, n_text = 2 ** BITS, len(tokenizer)
    vocabulary = n_text + len(SPECIALS) + K + 1
    config = {
        "_class_name": "Showo", "vocab_size": vocabulary, "llm_vocab_size": n_text,
        "codebook_size": K, "num_vq_tokens": CELLS, "mask_token_id": vocabulary - 1,
        "w_clip_vit": False, "llm_model_path": "shapes", "load_from_showo": True,
    }
    phi = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
               num_attention_heads=hidden // 32, max_position_embeddings=256,
               initializer_range=0.05)
    return Showo(config, phi, tokenizer)


def masks(codes):
    """Choose the tokens to predict, Bool as codes (B, 16): a share cos(pi u / 2) of each picture.

    Half of the masks cover the objects first, with a share u. Such states are common when sampling,
    where empty cells, which are sure, go first.
    """
    B, N = codes.shape
    u, cover = torch.rand(B, 1), torch.rand(B, 1) < 0.5
    share = torch.where(cover, u, torch.cos(u * math.pi / 2))
    is_object = codes < len(shapes.LABELS)
    first = torch.rand(B, N) - (cover & is_object).float()
    return first.argsort(1).argsort(1) < (share * N).round().clamp(min=1)


def pretrain_base(steps, seed, *, pool=30000, batch=64, lr=2e-3, clean=0.75, wrong=0.5,
                  hidden=128, layers=4) -> Showo:
    """Train Show-o's masked-token prediction: cross-entropy on the masked tokens of pictures.

    Captions are right for a share of the steps (clean); then a share of them (wrong) is exchanged
    for another one of the same family. A tenth are dropped, for guidance. pool: pictures in all.
    """
    torch.manual_seed(seed)
    model = new_showo(hidden, layers)
    captions, family, codes = lessons(pool, random.Random(seed))
    ids, empty = model.encode(captions).ids, model.encode([""]).ids
    members = [(family == f).nonzero()[:, 0] for f in range(len(shapes.FAMILIES))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = one_cycle(optimizer, lr, steps, warmup=0.05)
    start, running = time.time(), None
    for step in range(steps):
        row = torch.randint(pool, (batch,))
        others = [members[f][torch.randint(len(members[f]), ())] for f in family[row]]
        exchanged = torch.rand(batch) < (wrong if step >= clean * steps else 0)
        told = torch.where(exchanged, torch.stack(others), row)
        text = torch.where(torch.rand(batch, 1) < 0.1, empty, ids[told])
        masked = masks(codes[row])
        logits = model.logits(torch.where(masked, model.K, codes[row]),
                              Prompt(text, text != model.pad, torch.arange(batch)))
        loss = F.cross_entropy(logits[masked], codes[row][masked])
        take_step(model, loss, optimizer, schedule)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"base {step:5d}/{steps} loss {running:.4f} {time.time() - start:.0f} s",
                  flush=True)
    return model.eval()


def main():
    p = Parser("Make the tiny base of --model shapes: its image tokenizer and its transformer, "
               "at once, a thread each.")
    p.add_argument("--out", default=str(HERE), help="folder; the tokenizer goes to OUT/magvitv2")
    p.add_argument("--seed", type=in_range(int, 0), default=0)
    p.add_argument("--steps", type=in_range(int, 1), default=5000)
    p.add_argument("--tokenizer-steps", type=in_range(int, 1), default=2400)
    p.add_argument("--pool", type=in_range(int, 100), default=30000, help="captioned pictures")
    args = p.parse_args()

    # the sums, and so the weights, must not depend on the number of cores
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        magvit = pool.submit(pretrain_tokenizer, args.tokenizer_steps, args.seed)
        pretrain_base(args.steps, args.seed, pool=args.pool).save(args.out)
        magvit.result().save(Path(args.out) / "magvitv2", torch.float16)


if __name__ == "__main__":
    run(main)
