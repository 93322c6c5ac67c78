"""The embedded default: a small synthetic world in GenEval's image, and a tiny Show-o that draws it.

Pictures are 32 x 32, a 4 x 4 lattice of 8-pixel cells, one object (8 classes x 5 colours) per cell, on one of three
backgrounds. Prompts and metadata have GenEval's form and its six families. The detector is exact: every cell is compared
with every template. The base in shapes/ is made by

    python shapes.py pretrain --out shapes        # from a seed; about 25 minutes on 2 CPU cores

It learns from captions of which a share belongs to another picture of the same family, as captions found on the web often
do: it can draw everything, and often draws something else than asked. That is what RL then mends.
"""
import concurrent.futures
import itertools
import math
import multiprocessing
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model import SPECIALS, InputError, MAGVITv2, Prompt, Showo
from sample import Parser, in_range, run

FOLDER = Path(__file__).parent / "shapes"
CELL, GRID, BITS = 8, 4, 6
COLOURS = {"red": (220, 40, 40), "yellow": (240, 190, 30), "green": (30, 150, 60), "blue": (50, 80, 220), "black": (30, 30, 30)}
BACKGROUNDS = ((235, 235, 235), (250, 238, 210), (200, 225, 240))
GLYPHS = {  # 7 x 7, one hexadecimal number a row
    "square": "7f 7f 7f 7f 7f 7f 7f", "circle": "1c 3e 7f 7f 7f 3e 1c", "triangle": "08 08 1c 1c 3e 3e 7f",
    "cross": "1c 1c 7f 7f 7f 1c 1c", "ring": "1c 3e 63 63 63 3e 1c", "heart": "36 7f 7f 7f 3e 1c 08",
    "star": "08 08 7f 3e 1c 36 41", "moon": "1e 3c 78 78 78 3c 1e"}
CLASSES = list(GLYPHS)
NUMBERS = {2: "two", 3: "three", 4: "four"}
FAMILIES = {"single_object": 3, "two_object": 12, "counting": 12, "colors": 12, "position": 12, "color_attr": 12}  # held out
MASKS = torch.tensor([[[int(row, 16) >> (6 - x) & 1 for x in range(7)] for row in rows.split()]
                      for rows in GLYPHS.values()], dtype=torch.bool)  # (8, 7, 7)


# ------------------------------------------------------------------------------------------------ prompts

def _a(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _line(tag, include, text, exclude=None):
    return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": f"a photo of {text}"}


def combinations(tag: str) -> list[list[dict]]:
    """All prompts of one family (GenEval's metadata), grouped by combination: same things asked, words in another order."""
    one = lambda c, **extra: {"class": c, "count": 1, **extra}  # noqa: E731
    pairs = list(itertools.combinations(CLASSES, 2))
    if tag == "single_object":
        return [[_line(tag, [one(c)], _a(c))] for c in CLASSES]
    if tag == "two_object":
        return [[_line(tag, [one(a), one(b)], f"{_a(a)} and {_a(b)}") for a, b in (p, p[::-1])] for p in pairs]
    if tag == "counting":
        return [[_line(tag, [{"class": c, "count": n}], f"{NUMBERS[n]} {c}{'es' if c[-1] == 's' else 's'}",
                       [{"class": c, "count": n + 1}])] for c in CLASSES for n in NUMBERS]
    if tag == "colors":
        return [[_line(tag, [one(c, color=k)], f"{_a(k)} {c}")] for c in CLASSES for k in COLOURS]
    if tag == "position":
        return [[_line(tag, [one(y), one(x, position=[r, 0])], f"{_a(x)} {r} {_a(y)}")
                 for x, r, y in ((a, rel, b), (b, inverse, a))]
                for p in pairs for a, b in (p, p[::-1]) for rel, inverse in (("left of", "right of"), ("above", "below"))]
    return [[_line(tag, [one(a, color=k), one(b, color=m)], f"{_a(k)} {a} and {_a(m)} {b}") for a, k, b, m in order]
            for a, b in pairs for k, m in itertools.permutations(COLOURS, 2) for order in [((a, k, b, m), (b, m, a, k))]]


def prompts(split: str, n: int = 1200) -> list[dict]:
    """split "eval": the 63 held-out prompts; "train": n prompts of the other combinations, the hard families more often;
    "all": n prompts of all combinations, families in turn."""
    turns = list(FAMILIES) + (["counting", "position", "color_attr", "position"] if split == "train" else [])
    out, rng = {}, random.Random(0)
    for tag, held_out in FAMILIES.items():
        groups = combinations(tag)
        (rng if split == "all" else random.Random(tag)).shuffle(groups)  # what is held out is the same for every split
        chosen = {"eval": groups[:held_out], "train": groups[held_out:], "all": groups}[split]
        many = held_out if split == "eval" else turns.count(tag) * math.ceil(n / len(turns))
        out[tag] = iter([rng.choice(chosen[i % len(chosen)]) for i in range(many)])
    if split == "eval":
        return [line for lines in out.values() for line in lines]
    return [next(out[tag]) for tag, _ in zip(itertools.cycle(turns), range(n))]


# ------------------------------------------------------------------------------- pictures and their detector

def paint(objects, background: int):
    """objects: {(row, column): (class, colour)} -> uint8 (3, 32, 32)."""
    image = torch.tensor(BACKGROUNDS[background], dtype=torch.uint8)[:, None, None].repeat(1, GRID * CELL, GRID * CELL)
    for (row, column), (name, colour) in objects.items():
        patch = image[:, row * CELL + 1:(row + 1) * CELL, column * CELL + 1:(column + 1) * CELL]
        patch[:, MASKS[CLASSES.index(name)]] = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None]
    return image


def render(metadata: dict, rng: random.Random):
    """A picture of just what the metadata asks -> (uint8 (3, 32, 32), objects as in paint); the rest is left to chance."""
    cells = list(itertools.product(range(GRID), repeat=2))
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    while True:
        places = rng.sample(cells, len(wanted))
        relation = wanted[-1].get("position", [None])[0]
        (dy, dx) = (places[-1][0] - places[0][0], places[-1][1] - places[0][1])
        if relation is None or {"left of": dx < 0 and -dx >= abs(dy), "right of": dx > 0 and dx >= abs(dy),
                                "above": dy < 0 and -dy >= abs(dx), "below": dy > 0 and dy >= abs(dx)}[relation]:
            break
    objects = {place: (clause["class"], clause.get("color") or rng.choice(list(COLOURS)))
               for place, clause in zip(places, wanted)}
    return paint(objects, rng.randrange(len(BACKGROUNDS))), objects


def _templates():
    """Every object on every background, then the empty cells -> Float (T, 192), and per template its label (40 = empty) and
    its code: an object's is the same on all backgrounds, an empty cell's tells the background."""
    labels = [(c, k) for c in CLASSES for k in COLOURS]
    cells = [paint({(0, 0): label}, b)[:, :CELL, :CELL] for label in labels for b in range(len(BACKGROUNDS))]
    cells += [paint({}, b)[:, :CELL, :CELL] for b in range(len(BACKGROUNDS))]
    index = [i for i in range(len(labels)) for _ in BACKGROUNDS] + [len(labels)] * len(BACKGROUNDS)
    index = torch.tensor(index)
    codes = torch.cat([index[:-len(BACKGROUNDS)], len(labels) + torch.arange(len(BACKGROUNDS))])
    return torch.stack(cells).flatten(1).float(), index, codes, labels


TEMPLATES, TEMPLATE_LABEL, TEMPLATE_CODE, LABELS = _templates()


def distances(images):
    """uint8 [B, 3, 32, 32] -> Float [B * 16, T], squared distance of every cell, row by row, to every template."""
    cells = images.float().cpu().unflatten(3, (GRID, CELL)).unflatten(2, (GRID, CELL)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return torch.cdist(cells.flatten(0, 2), TEMPLATES).square()


def detect(images, lines=None) -> list[tuple[dict, dict]]:
    """images uint8 [B, 3, 32, 32] -> per image (detections {class: [[x1, y1, x2, y2, score], ...]}, colours {class: [...]}).

    A cell is the object whose template is nearest; score = 1 - d(nearest) / d(nearest of any other object or of an empty
    cell), d = squared distance: 1 for a perfect drawing, 0 halfway. Rows are in ascending score, colours in the order in
    which eval_geneval.filter_detections keeps the boxes. Boxes in pixels. lines: GenEval's, not needed here."""
    if images.shape[-2:] != (CELL * GRID, CELL * GRID):
        raise InputError(f"the exact detector of shapes judges pictures of {CELL * GRID} x {CELL * GRID}, not {images.shape[-1]} x {images.shape[-2]}")
    B, d = len(images), distances(images)
    best = torch.full((len(d), len(LABELS) + 1), math.inf).scatter_reduce(
        1, TEMPLATE_LABEL.expand(len(d), -1), d, "amin")                                    # (B * 16, 41)
    (first, second), (label, _) = (x.T for x in best.topk(2, 1, largest=False))
    score = 1 - first / second.clamp(min=1e-6)
    found = [[] for _ in range(B)]
    for i in (label < len(LABELS)).nonzero()[:, 0].tolist():
        found[i // GRID ** 2].append((score[i].item(), i % GRID ** 2, *LABELS[label[i]]))
    out = []
    for rows in found:
        boxes, colours = {}, {}
        for s, cell, name, colour in sorted(rows):
            x, y = cell % GRID * CELL + 1, cell // GRID * CELL + 1
            boxes.setdefault(name, []).append([float(x), float(y), x + 7.0, y + 7.0, s])
            colours.setdefault(name, []).insert(0, colour)
        out.append((boxes, colours))
    return out


# ---------------------------------------------------------------------------------------------- pretraining

def word_tokenizer():
    """A tokenizer of the world's words in Hugging Face's format; bos = eos = <|endoftext|>, as Phi's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = "a an photo of and left right above below".split() + list(NUMBERS.values()) + list(COLOURS) + CLASSES
    words += [c + ("es" if c[-1] == "s" else "s") for c in CLASSES]
    vocab = {w: i for i, w in enumerate(["<|endoftext|>", "<|unk|>"] + words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                   unk_token="<|unk|>")


def scaled(images):
    """uint8 -> Float in [-1, 1]."""
    return images.float() / 127.5 - 1


def _crowd(rng, B):
    """B pictures with objects all over, half of them sparse -> uint8 (B, 3, 32, 32) and the template of each cell (B, 16)."""
    share, ground = [rng.choice((0.15, 0.7)) for _ in range(B)], [rng.randrange(len(BACKGROUNDS)) for _ in range(B)]
    label = torch.tensor([[rng.randrange(len(LABELS)) if rng.random() < s else len(LABELS) for _ in range(GRID ** 2)] for s in share])
    template = label * len(BACKGROUNDS) + torch.tensor(ground)[:, None]
    cells = TEMPLATES[template].unflatten(1, (GRID, GRID)).unflatten(3, (3, CELL, CELL)).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(B, 3, GRID * CELL, GRID * CELL), template


def pretrain_tokenizer(steps, seed, *, batch=64, lr=2e-3) -> MAGVITv2:
    """MAGVITv2 whose 6 bits number the world's objects and grounds: squared error of the pictures, logistic loss of the bits."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    size = dict(ch=32, ch_mult=[1, 1, 2, 4], z_channels=BITS)
    model = MAGVITv2(encoder=dict(size, num_res_blocks=[0, 0, 1, 1]), decoder=dict(size, num_res_blocks=[0, 1, 1, 1]))
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pictures, template = _crowd(rng, batch)
        signs = model.quantize.embedding[TEMPLATE_CODE[template]].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        bits = F.softplus(-signs * model.encoder(scaled(pictures))).mean()
        mse = F.mse_loss(model.decoder(signs), scaled(pictures))
        opt.zero_grad()
        (bits + mse).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"tokenizer {step:5d}/{steps} mse {mse.item():.5f} bits {bits.item():.5f}", flush=True)
    return model.eval().requires_grad_(False)


def lessons(n, rng):
    """n captioned pictures -> captions list[str], family Long (n,), codes Long (n, N)."""
    lines = prompts("all", n)
    codes = [distances(torch.stack([render(line, rng)[0] for line in lines[i:i + 256]])).argmin(1) for i in range(0, n, 256)]
    family = torch.tensor([list(FAMILIES).index(line["tag"]) for line in lines])
    return [line["prompt"] for line in lines], family, TEMPLATE_CODE[torch.cat(codes)].view(n, GRID ** 2)


def pretrain_base(steps, seed, *, pool=30000, batch=64, lr=2e-3, clean=0.75, wrong=0.5, hidden=128, layers=4) -> Showo:
    """Show-o's masked-token prediction: a share of the tokens, cos(pi u / 2), is masked; cross-entropy on those. Half of the
    masks cover the objects first, with a share u: such states are common when sampling, where sure, empty cells go first.

    Captions are right for a share of the steps (clean), then a share of them (wrong) is exchanged for another one of the same
    family; a tenth are dropped, for guidance."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    N, K, n_text = GRID ** 2, 2 ** BITS, len(tokenizer)
    config = {"_class_name": "Showo", "vocab_size": n_text + len(SPECIALS) + K + 1, "llm_vocab_size": n_text,
              "codebook_size": K, "num_vq_tokens": N, "mask_token_id": n_text + len(SPECIALS) + K, "w_clip_vit": False,
              "llm_model_path": "shapes", "load_from_showo": True}
    model = Showo(config, dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                               num_attention_heads=hidden // 32, max_position_embeddings=256, initializer_range=0.05), tokenizer)
    captions, family, codes = lessons(pool, random.Random(seed))
    ids, empty = model.encode(captions).ids, model.encode([""]).ids
    members = [(family == f).nonzero()[:, 0] for f in range(len(FAMILIES))]
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.05)
    start, running = time.time(), None
    for step in range(steps):
        row = torch.randint(pool, (batch,))
        other = torch.stack([members[f][torch.randint(len(members[f]), ())] for f in family[row]])
        told = torch.where(torch.rand(batch) < (wrong if step >= clean * steps else 0), other, row)
        text = torch.where(torch.rand(batch, 1) < 0.1, empty, ids[told])
        u, cover = torch.rand(batch, 1), torch.rand(batch, 1) < 0.5
        share = torch.where(cover, u, torch.cos(u * math.pi / 2))
        first = torch.rand(batch, N) - (cover & (codes[row] < len(LABELS))).float()
        masked = first.argsort(1).argsort(1) < (share * N).round().clamp(min=1)
        logits = model.logits(torch.where(masked, K, codes[row]), Prompt(text, text != model.pad, torch.arange(batch)))
        loss = F.cross_entropy(logits[masked], codes[row][masked])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"base {step:5d}/{steps} loss {running:.4f} {time.time() - start:.0f} s", flush=True)
    return model.eval()


def main():
    p = Parser("Make the tiny base of --model shapes: its tokenizer and its transformer, at once, a thread each.")
    p.add_argument("what", choices=["pretrain"])
    p.add_argument("--out", default=str(FOLDER), help="folder for the base; its tokenizer goes to OUT/magvitv2")
    p.add_argument("--seed", type=in_range(int, 0), default=0)
    p.add_argument("--tokenizer-steps", type=in_range(int, 1), default=2400)
    p.add_argument("--steps", type=in_range(int, 1), default=5000)
    args = p.parse_args()
    torch.set_num_threads(1)  # the sums, and so the weights, do not depend on the number of cores
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"),
                                                initializer=torch.set_num_threads, initargs=(1,)) as pool:
        magvit = pool.submit(pretrain_tokenizer, args.tokenizer_steps, args.seed)
        pretrain_base(args.steps, args.seed).save(args.out)
        magvit.result().save(Path(args.out) / "magvitv2", torch.float16)


if __name__ == "__main__":
    run(main)
