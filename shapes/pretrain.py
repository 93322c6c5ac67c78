"""Make the tiny base of --model shapes, and the tiny CLIP that judges its pictures.

    python shapes/pretrain.py --out shapes          # from a seed; 25 minutes on 2 CPU cores
    python train.py --model shapes --reward clip:shapes/clip

The base is a word tokenizer, an image tokenizer and a transformer. It learns first from right
captions, until it knows what every word means, relations too, and then from captions of which a
share belongs to another picture of the same family, as captions found on the web often do: it can
draw everything, and often draws something else than asked. That is what RL then mends.

The CLIP has open_clip's architecture and its local folder. It learns only from right captions. As
larger ones do, it knows what is in a picture and not how that belongs together (tools/world.py):
it ranks a right picture over one with another class, count or colour every time, over one whose
relation is turned round, or whose two colours are exchanged, half of the time.
"""
import argparse
import concurrent.futures
import itertools
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

from model import SPECIALS, MAGVITv2, Prompt, Showo  # noqa: E402
from shapes import world  # noqa: E402
from support.weights import library, mend_tokenizer, write_model  # noqa: E402

GRID, CELL = world.GRID, world.CELL
CELLS = GRID ** 2
OBJECTS = len(world.LABELS)
BITS = 8            # of a code: 40 objects and 216 textures are 256


# ---------------------------------------------------------------------------- the world's pictures

def codes_of(objects: dict, rng: random.Random) -> list[int]:
    """Return 36 codes: objects {(row, column): (class, colour)}, and ground drawn at random."""
    codes = [rng.randrange(OBJECTS, world.CODES) for _ in range(CELLS)]
    for (row, column), label in objects.items():
        codes[row * GRID + column] = world.LABELS.index(label)
    return codes


def paint(objects: dict, seed: int) -> torch.Tensor:
    """Paint objects on ground that the seed draws -> uint8 (3, 48, 48)."""
    return world.assemble(torch.tensor([codes_of(objects, random.Random(seed))]))[0]


def _stands(relation, dy, dx):
    """Return whether an offset of (dy, dx) cells is clearly in the relation."""
    return {
        "left of": dx < 0 and -dx >= abs(dy),
        "right of": dx > 0 and dx >= abs(dy),
        "above": dy < 0 and -dy >= abs(dx),
        "below": dy > 0 and dy >= abs(dx),
    }[relation]


def arrange(metadata: dict, rng: random.Random) -> dict:
    """Return objects {(row, column): (class, colour)}, just those that the metadata asks for.
    Places, and colours that are not asked for, are left to chance."""
    cells = list(itertools.product(range(GRID), repeat=2))
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    relation = wanted[-1].get("position", [None])[0]
    while True:
        places = rng.sample(cells, len(wanted))
        dy, dx = places[-1][0] - places[0][0], places[-1][1] - places[0][1]
        if relation is None or _stands(relation, dy, dx):
            break

    objects = {}
    for place, clause in zip(places, wanted, strict=True):
        colour = clause.get("color") or rng.choice(list(world.COLOURS))
        objects[place] = clause["class"], colour
    return objects


def render(metadata: dict, rng: random.Random) -> tuple[torch.Tensor, dict]:
    """Draw a picture of just what the metadata asks -> (uint8 (3, 48, 48), its objects)."""
    objects = arrange(metadata, rng)
    return paint(objects, rng.getrandbits(32)), objects


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Scale uint8 pictures to Float in [-1, 1], as MAGVITv2 takes them."""
    return images.float() / 127.5 - 1


# ------------------------------------------------------------------------------------- training


def word_tokenizer():
    """Return a tokenizer of the world's words in Hugging Face's format.

    bos = eos = <|endoftext|>, as in Phi's.
    """
    PreTrainedTokenizerFast = library("transformers").PreTrainedTokenizerFast
    words = "<|endoftext|> <|unk|> a an photo of and left right above below".split()
    words += [*world.NUMBERS.values(), *world.COLOURS]
    words += world.CLASSES + [world.plural(name) for name in world.CLASSES]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", unk_token="<|unk|>")


def one_cycle(optimizer, lr, steps, warmup):
    """Return torch's OneCycleLR: from lr / 25 up to lr in a share `warmup` of the steps, then by a
    cosine to almost 0; AdamW's first beta goes from 0.95 down to 0.85 and back.

    OneCycleLR divides by warmup * steps - 1: a warm-up of just one step has to be left out.
    """
    if warmup * steps == 1:
        warmup = 0.0
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warmup)


def descend(name, model, loss_at, steps, lr, decay=0.05):
    """Train a model in place: AdamW down loss_at(step), the gradient clipped to norm 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98),
                                  weight_decay=decay)       # the first beta is the schedule's
    schedule = one_cycle(optimizer, lr, steps, warmup=0.05)
    start, running = time.time(), None
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name} {step:5d}/{steps} loss {running:.4f} {time.time() - start:.0f} s",
                  flush=True)
    model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- the image tokenizer

def random_codes(B):
    """Draw B pictures with objects all over, half of them few -> codes Long (B, 36)."""
    share = torch.tensor([0.06, 0.3])[torch.randint(2, (B, 1))]
    return torch.where(torch.rand(B, CELLS) < share, torch.randint(OBJECTS, (B, CELLS)),
                       torch.randint(OBJECTS, world.CODES, (B, CELLS)))


def pretrain_tokenizer(steps, seed, *, batch=8, lr=3e-3) -> MAGVITv2:
    """Train a MAGVITv2 whose 8 bits number the world's objects and textures.

    Loss: squared error of the pictures, and logistic loss of the bits.
    """
    torch.manual_seed(seed)
    size = dict(ch=32, ch_mult=[1, 1, 2, 2], z_channels=BITS)
    model = MAGVITv2({"encoder": dict(size, num_res_blocks=[0, 0, 1, 1]),
                      "decoder": dict(size, num_res_blocks=[0, 1, 1, 2])})

    def loss_at(step):
        """Return the loss of fresh pictures, a scalar."""
        codes = random_codes(batch)                                                    # (B, 36)
        pictures = scaled(world.assemble(codes))
        signs = model.quantize.embedding[codes]                                 # (B, 36, 8), +-1
        signs = signs.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        bits = F.softplus(-signs * model.encoder(pictures)).mean()
        return bits + F.mse_loss(model.decoder(signs), pictures)
    descend("tokenizer", model, loss_at, steps, lr, decay=1e-4)
    return model


# -------------------------------------------------------------------------------- the transformer

def captioned_pictures(n, rng):
    """Draw n captioned pictures -> captions list[str], family Long (n,), codes Long (n, 36)."""
    lines = world.prompts("all", n)
    codes = torch.tensor([codes_of(arrange(line, rng), rng) for line in lines])
    family = torch.tensor([list(world.FAMILIES).index(line["tag"]) for line in lines])
    return [line["prompt"] for line in lines], family, codes


def other_ground(codes):
    """Return codes (B, 36) with all textures drawn anew: which one a cell has means nothing."""
    textures = torch.randint(OBJECTS, world.CODES, codes.shape)
    return torch.where(codes < OBJECTS, codes, textures)


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
    model = Showo(config, phi, tokenizer)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=phi["initializer_range"])
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.bias)
    return model


def random_masks(codes):
    """Choose the tokens to predict, Bool as codes (B, 36): a share cos(pi u / 2) of each picture.

    A quarter of the masks cover the objects first, with a share u: states in which ground went
    first, of which uniform masks make few.
    """
    B, N = codes.shape
    u, cover = torch.rand(B, 1), torch.rand(B, 1) < 0.25
    share = torch.where(cover, u, torch.cos(u * math.pi / 2))
    first = torch.rand(B, N) - (cover & (codes < OBJECTS)).float()
    return first.argsort(1).argsort(1) < (share * N).round().clamp(min=1)


def token_loss(logits, codes, weight=1.0):
    """Return the cross-entropy of tokens (M,), those of objects weighing `weight` times, that of
    ground averaged over all textures.

    Which texture a picture has is chance: the mean over all has the same expected gradient, and
    none of its noise.
    """
    logp, is_object = logits.log_softmax(-1), codes < OBJECTS                   # (M, 256), (M,)
    own = logp.gather(1, codes[:, None])[:, 0]
    each = torch.where(is_object, own, logp[:, OBJECTS:].mean(1))
    weights = torch.where(is_object, weight, 1.0)
    return -(weights * each).sum() / weights.sum()


# by family: its share of the training pictures, larger where words say how things belong together,
# which is learned last; and the share of its captions that in the end are another picture's
SHARES = {"single_object": 0.06, "two_object": 0.12, "counting": 0.15, "colors": 0.12,
          "position": 0.30, "color_attr": 0.25}
WRONG = {"single_object": 0.70, "two_object": 0.65, "counting": 0.58, "colors": 0.80,
         "position": 0.70, "color_attr": 0.66}


def pretrain_base(steps, seed, *, pool=60000, batch=64, lr=2e-3, hidden=128, layers=4) -> Showo:
    """Train Show-o's masked-token prediction: cross-entropy on the masked tokens of pictures.

    pool: pictures in all. A tenth of the captions are dropped, for guidance. Two things change on
    the way. Only a few tokens show objects, and only these show a relation: their loss counts 20
    times for the first 70% of the steps, then once, so that the base ends calibrated. And from 75%
    of the steps on a share of the captions, WRONG, is exchanged for others of the same family.
    """
    torch.manual_seed(seed)
    model = new_showo(hidden, layers)
    captions, family, codes = captioned_pictures(pool, random.Random(seed))
    ids, empty = model.encode(captions).ids, model.encode([""]).ids
    members = [(family == f).nonzero()[:, 0] for f in range(len(world.FAMILIES))]
    share, wrong = (torch.tensor([numbers[tag] for tag in world.FAMILIES])
                    for numbers in (SHARES, WRONG))

    def draw(families):
        """Draw a picture of each of the families -> their places in the pool, Long (batch,)."""
        return torch.stack([members[f][torch.randint(len(members[f]), ())] for f in families])

    def loss_at(step):
        """Return the cross-entropy of a batch of the pool, a scalar."""
        families = torch.multinomial(share, batch, replacement=True)
        row, another = draw(families), draw(families)
        exchanged = torch.rand(batch) < (wrong[families] if step >= 0.75 * steps else 0)
        caption_of = torch.where(exchanged, another, row)
        text = torch.where(torch.rand(batch, 1) < 0.1, empty, ids[caption_of])
        drawn = other_ground(codes[row])                                        # (B, 36)
        masked = random_masks(drawn)
        logits = model.logits(torch.where(masked, model.K, drawn),
                              Prompt(text, torch.arange(batch)))
        return token_loss(logits[masked], drawn[masked], 20.0 if step < 0.7 * steps else 1.0)
    descend("base", model, loss_at, steps, lr)
    return model


# -------------------------------------------------------------------------------- CLIP

CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": GRID * CELL, "patch_size": CELL, "width": 96, "layers": 3,
                   "head_width": 32},
    # causal: the last place, which is padding, sees all of the text
    "text_cfg": {"context_length": 12, "vocab_size": len(word_tokenizer()), "width": 96,
                 "heads": 3, "layers": 3, "pool_type": "last", "hf_tokenizer_name": "shapes"},
}


def pretrain_clip(steps, seed, *, pool=60000, batch=128, lr=1e-3):
    """Train open_clip's CLIP with its own loss on pictures and right captions of the world."""
    open_clip = library("open_clip")
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CLIP)
    captions, _, codes = captioned_pictures(pool, random.Random(seed + 1))
    tokens = word_tokenizer()(captions, padding="max_length", return_tensors="pt",
                              max_length=CLIP["text_cfg"]["context_length"])["input_ids"]

    mean, std = (torch.tensor(x).view(3, 1, 1)
                 for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def loss_at(step):
        """Return CLIP's loss of a batch of the pool, a scalar."""
        row = torch.randint(pool, (batch,))
        pixels = (world.assemble(other_ground(codes[row])) / 255 - mean) / std
        return open_clip.ClipLoss()(*model(pixels, tokens[row]))
    descend("clip", model, loss_at, steps, lr)
    return model


def save_clip(model, folder):
    """Write open_clip's local folder: config, weights in half precision, tokenizer."""
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    write_model(folder, "open_clip_model", state, open_clip_config={"model_cfg": CLIP})
    word_tokenizer().save_pretrained(folder)
    mend_tokenizer(folder)


def make_tokenizer(steps, seed, folder):
    """Train and save the image tokenizer."""
    pretrain_tokenizer(steps, seed).half().save(folder)


def make_clip(steps, seed, pool, folder):
    """Train and save the CLIP."""
    save_clip(pretrain_clip(steps, seed, pool=pool), folder)


def main():
    p = argparse.ArgumentParser(description="Make the tiny base of --model shapes, its transformer "
                                "in one process, its image tokenizer and the tiny CLIP in another, "
                                "a thread each.")
    p.add_argument("--out", default=str(HERE), help="folder; OUT/magvitv2 and OUT/clip are made")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--tokenizer-steps", type=int, default=5000)
    p.add_argument("--clip-steps", type=int, default=1400)
    p.add_argument("--pool", type=int, default=60000, help="captioned pictures")
    args = p.parse_args()

    # the sums, and so the weights, must not depend on the number of cores
    torch.set_num_threads(1)
    out, spawn = Path(args.out), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        others = [pool.submit(make_tokenizer, args.tokenizer_steps, args.seed, out / "magvitv2"),
                  pool.submit(make_clip, args.clip_steps, args.seed, args.pool, out / "clip")]
        pretrain_base(args.steps, args.seed, pool=args.pool).save(args.out)
        for other in others:
            other.result()


if __name__ == "__main__":
    main()
