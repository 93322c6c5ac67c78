"""The embedded default: a small synthetic world in GenEval's image, its prompts and its detector.

Pictures are 48 x 48, a 6 x 6 lattice of 8-pixel cells. A cell holds an object (8 classes x 5
colours) on a white tile, or ground: one of 216 textures, drawn at random, so that a token of ground
is no surer than one of an object. Each of the 256 things that a cell can show has a code of its
own. Prompts and metadata have GenEval's form, and its six families. The detector is exact: every
cell is compared with a template of everything it could show.

    prompts("eval")                           the 63 held-out prompts, with metadata
    image, objects = render(line, rng)        a picture of just what one of them asks
    detect(images)                            boxes and colours, for eval_geneval.score

The folder shapes/ holds the tiny Show-o that draws this world, a tiny CLIP that judges it, and
pretrain.py, which made both.
"""
import itertools
import math
import random

import torch

from checkpoint import InputError

CELL, GRID = 8, 6
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 190, 30),
    "green": (30, 150, 60),
    "blue": (50, 80, 220),
    "black": (30, 30, 30),
}
TINTS = ((225, 225, 225), (250, 232, 200), (200, 225, 245), (215, 240, 205), (245, 212, 220),
         (225, 212, 245), (205, 238, 235), (240, 240, 190))
SHADE = 45          # how much darker the pattern of a texture is than its tint

# 7 x 7 pixels, one hexadecimal number a row
GLYPHS = {
    "square": "7f 7f 7f 7f 7f 7f 7f",
    "circle": "1c 3e 7f 7f 7f 3e 1c",
    "triangle": "08 08 1c 1c 3e 3e 7f",
    "cross": "1c 1c 7f 7f 7f 1c 1c",
    "ring": "1c 3e 63 63 63 3e 1c",
    "heart": "36 7f 7f 7f 3e 1c 08",
    "star": "08 08 7f 3e 1c 36 41",
    "moon": "1e 3c 78 78 78 3c 1e",
}
CLASSES = list(GLYPHS)
NUMBERS = {2: "two", 3: "three", 4: "four"}

# how many combinations of each family are held out for evaluation
FAMILIES = {
    "single_object": 3,
    "two_object": 12,
    "counting": 12,
    "colors": 12,
    "position": 12,
    "color_attr": 12,
}


# ------------------------------------------------------------------------------------------ prompts

def an(words: str) -> str:
    """Return the words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """Return the plural of a class name."""
    return name + ("es" if name.endswith("s") else "s")


def _clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def _line(tag, text, *include, **more):
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {text}"}


def combinations(tag: str) -> list[list[dict]]:
    """Return all prompts of one family, with GenEval's metadata, grouped by combination.

    The prompts of a group ask the same things, in another order of words. Raises ValueError for an
    unknown family.
    """
    pairs = list(itertools.combinations(CLASSES, 2))
    if tag == "single_object":
        return [[_line(tag, an(c), _clause(c))] for c in CLASSES]
    if tag == "two_object":
        return [[_two_objects(a, b), _two_objects(b, a)] for a, b in pairs]
    if tag == "counting":
        return [
            [_line(tag, f"{NUMBERS[n]} {plural(c)}", _clause(c, n), exclude=[_clause(c, n + 1)])]
            for c, n in itertools.product(CLASSES, NUMBERS)
        ]
    if tag == "colors":
        return [
            [_line(tag, f"{an(colour)} {c}", _clause(c, color=colour))]
            for c, colour in itertools.product(CLASSES, COLOURS)
        ]
    if tag == "position":
        ordered = [(a, b) for pair in pairs for a, b in (pair, pair[::-1])]
        relations = ("left of", "right of"), ("above", "below")
        return [
            [_position(a, relation, b), _position(b, inverse, a)]
            for (a, b), (relation, inverse) in itertools.product(ordered, relations)
        ]
    if tag == "color_attr":
        return [
            [_two_colours(a, k, b, m), _two_colours(b, m, a, k)]
            for (a, b), (k, m) in itertools.product(pairs, itertools.permutations(COLOURS, 2))
        ]
    raise ValueError(f"combinations: there is no family {tag!r}")


def _two_objects(a, b):
    return _line("two_object", f"{an(a)} and {an(b)}", _clause(a), _clause(b))


def _position(x, relation, y):
    text = f"{an(x)} {relation} {an(y)}"
    return _line("position", text, _clause(y), _clause(x, position=[relation, 0]))


def _two_colours(a, k, b, m):
    text = f"{an(k)} {a} and {an(m)} {b}"
    return _line("color_attr", text, _clause(a, color=k), _clause(b, color=m))


def prompts(split: str, n: int = 1200) -> list[dict]:
    """Return the prompts of a split, always the same ones.

    "eval": the 63 held-out prompts, whatever n is; "train": n prompts of the other combinations,
    the hard families more often; "all": n prompts of all combinations, the families in turn.
    Raises KeyError for another split.
    """
    turns = list(FAMILIES)
    if split == "train":
        turns += ["counting", "position", "color_attr", "position"]

    drawn, rng = {}, random.Random(0)
    for tag, held_out in FAMILIES.items():
        groups = combinations(tag)
        # what is held out must not depend on the split
        shuffler = rng if split == "all" else random.Random(tag)
        shuffler.shuffle(groups)
        chosen = {"eval": groups[:held_out], "train": groups[held_out:], "all": groups}[split]
        many = held_out if split == "eval" else turns.count(tag) * math.ceil(n / len(turns))
        drawn[tag] = [rng.choice(chosen[i % len(chosen)]) for i in range(many)]

    if split == "eval":
        return [line for lines in drawn.values() for line in lines]
    queues = {tag: iter(lines) for tag, lines in drawn.items()}
    return [next(queues[tag]) for tag in itertools.islice(itertools.cycle(turns), n)]


# ---------------------------------------------------------------------------------------- pictures

LABELS = list(itertools.product(CLASSES, COLOURS))      # 40 objects: codes 0-39
CODES = 256         # and patterns 5 to 31 in 8 tints: codes 40-255, 8 * pattern + tint


def _glyph(rows):
    """Return the pixels of hexadecimal rows, Bool (7, 7)."""
    rows = [int(row, 16) for row in rows.split()]
    return torch.tensor([[row >> (6 - x) & 1 for x in range(7)] for row in rows]).bool()


def _pattern(p):
    """Return stripes or checks of 2 x 2 pixels, Bool (8, 8): a word of the Reed-Muller code (1, 4).

    The 32 words differ in half of their pixels at least, so that none is nearly another one.
    """
    blocks = [[(p & (16 | 4 * y | x)).bit_count() & 1 for x in range(4)] for y in range(4)]
    return torch.tensor(blocks).bool().repeat_interleave(2, 0).repeat_interleave(2, 1)


def _cells():
    """Return what a cell shows for every code, uint8 (256, 3, 8, 8)."""
    cells = torch.full((CODES, 3, CELL, CELL), 255, dtype=torch.uint8)
    for code, (name, colour) in enumerate(LABELS):
        # the first row and column of a cell stay free
        pixel = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
        cells[code, :, 1:, 1:] = torch.where(_glyph(GLYPHS[name]), pixel, 255)
    for code in range(len(LABELS), CODES):
        pattern, tint = divmod(code, len(TINTS))
        tint = torch.tensor(TINTS[tint], dtype=torch.uint8)[:, None, None]
        cells[code] = torch.where(_pattern(pattern), tint - SHADE, tint)
    return cells


TEMPLATES = _cells()


def assemble(codes: torch.Tensor) -> torch.Tensor:
    """Paint codes Long [B, 36], row by row -> uint8 [B, 3, 48, 48]."""
    cells = TEMPLATES[codes].unflatten(1, (GRID, GRID))             # (B, 6, 6, 3, 8, 8)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(codes), 3, GRID * CELL, GRID * CELL)


def codes_of(objects: dict, rng: random.Random) -> list[int]:
    """Return 36 codes: objects {(row, column): (class, colour)}, and ground drawn at random."""
    codes = [rng.randrange(len(LABELS), CODES) for _ in range(GRID ** 2)]
    for (row, column), label in objects.items():
        codes[row * GRID + column] = LABELS.index(label)
    return codes


def paint(objects: dict, seed: int) -> torch.Tensor:
    """Paint objects on ground that the seed draws -> uint8 (3, 48, 48)."""
    return assemble(torch.tensor([codes_of(objects, random.Random(seed))]))[0]


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

    Places, and colours that are not asked for, are left to chance.
    """
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
        colour = clause.get("color") or rng.choice(list(COLOURS))
        objects[place] = clause["class"], colour
    return objects


def render(metadata: dict, rng: random.Random) -> tuple[torch.Tensor, dict]:
    """Draw a picture of just what the metadata asks -> (uint8 (3, 48, 48), its objects)."""
    objects = arrange(metadata, rng)
    return paint(objects, rng.getrandbits(32)), objects


# ---------------------------------------------------------------------------------------- detector

def distances(images: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of every cell, row by row, to the template of every code.

    images uint8 [B, 3, 48, 48] -> Float [B * 36, 256].
    """
    cells = images.float().cpu().unflatten(3, (GRID, CELL)).unflatten(2, (GRID, CELL))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3)          # (B, 6, 6, 192)
    return torch.cdist(cells.flatten(0, 2), TEMPLATES.flatten(1).float()).square()


def detect(images: torch.Tensor, lines=None) -> list[tuple[dict, dict]]:
    """Find the objects of every picture.

    images uint8 [B, 3, 48, 48] -> per picture boxes {class: [[x1, y1, x2, y2, score], ...]}, in
    pixels and in ascending score, and colours {class: [...]}, in the order in which
    eval_geneval.filter_detections keeps the boxes. lines, GenEval's metadata, is not needed here.

    A cell is the object whose template is nearest. Its score is 1 - d(nearest) / d(nearest of any
    other object or of ground), d being the squared distance: 1 for a perfect drawing, 0
    halfway. Raises InputError for pictures of another size.
    """
    side = CELL * GRID
    height, width = images.shape[-2:]
    if (height, width) != (side, side):
        raise InputError(f"the exact detector of shapes judges pictures of {side} x {side}, "
                         f"not {width} x {height}")

    d = distances(images)
    objects, ground = d[:, :len(LABELS)], d[:, len(LABELS):]
    nearest = torch.cat([objects, ground.amin(1, keepdim=True)], 1)     # (B * 36, 41)
    two, labels = nearest.topk(2, 1, largest=False)
    scores = 1 - two[:, 0] / two[:, 1].clamp(min=1e-6)

    found = [[] for _ in images]
    for i in (labels[:, 0] < len(LABELS)).nonzero()[:, 0].tolist():
        picture, cell = divmod(i, GRID ** 2)
        found[picture].append((scores[i].item(), cell, *LABELS[labels[i, 0]]))
    return [_as_geneval(rows) for rows in found]


def _as_geneval(rows):
    """Turn (score, cell, class, colour) of one picture into what detect returns."""
    boxes, colours = {}, {}
    for score, cell, name, colour in sorted(rows):
        x, y = cell % GRID * CELL + 1.0, cell // GRID * CELL + 1.0
        boxes.setdefault(name, []).append([x, y, x + 7, y + 7, score])
        colours.setdefault(name, []).insert(0, colour)
    return boxes, colours


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Scale uint8 pictures to Float in [-1, 1], as MAGVITv2 takes them."""
    return images.float() / 127.5 - 1
