"""The embedded default: a small synthetic world in GenEval's image, its prompts and its detector.

Pictures are 32 x 32, a 4 x 4 lattice of 8-pixel cells, at most one object (8 classes x 5 colours)
per cell, on one of three backgrounds. Prompts and metadata have GenEval's form, and its six
families. The detector is exact: every cell is compared with a template of everything it could show.

    prompts("eval")                           the 63 held-out prompts, with metadata
    image, objects = render(line, rng)        a picture of just what one of them asks
    detect(images)                            boxes and colours, for eval_geneval.score

The folder shapes/ holds the tiny Show-o that draws this world, and pretrain.py, which made it.
"""
import itertools
import math
import random

import torch

from checkpoint import InputError

CELL, GRID = 8, 4
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 190, 30),
    "green": (30, 150, 60),
    "blue": (50, 80, 220),
    "black": (30, 30, 30),
}
BACKGROUNDS = ((235, 235, 235), (250, 238, 210), (200, 225, 240))

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

    "eval": the 63 held-out prompts; "train": n prompts of the other combinations, the hard families
    more often; "all": n prompts of all combinations, the families in turn.
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

def _mask(glyph):
    rows = [int(row, 16) for row in glyph.split()]
    return [[row >> (6 - x) & 1 for x in range(7)] for row in rows]


MASKS = torch.tensor([_mask(glyph) for glyph in GLYPHS.values()], dtype=torch.bool)     # (8, 7, 7)


def paint(objects: dict, background: int) -> torch.Tensor:
    """Paint objects {(row, column): (class, colour)} on a background -> uint8 (3, 32, 32)."""
    ground = torch.tensor(BACKGROUNDS[background], dtype=torch.uint8)
    image = ground[:, None, None].repeat(1, GRID * CELL, GRID * CELL)
    for (row, column), (name, colour) in objects.items():
        # the first row and column of a cell stay free
        y, x = row * CELL + 1, column * CELL + 1
        patch = image[:, y:y + 7, x:x + 7]
        pixel = torch.tensor(COLOURS[colour], dtype=torch.uint8)
        patch[:, MASKS[CLASSES.index(name)]] = pixel[:, None]
    return image


def _stands(relation, dy, dx):
    """Return whether an offset of (dy, dx) cells is clearly in the relation."""
    return {
        "left of": dx < 0 and -dx >= abs(dy),
        "right of": dx > 0 and dx >= abs(dy),
        "above": dy < 0 and -dy >= abs(dx),
        "below": dy > 0 and dy >= abs(dx),
    }[relation]


def render(metadata: dict, rng: random.Random) -> tuple[torch.Tensor, dict]:
    """Draw a picture of just what the metadata asks -> (uint8 (3, 32, 32), objects as in paint).

    Places, the background and colours that are not asked for are left to chance.
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
    return paint(objects, rng.randrange(len(BACKGROUNDS))), objects


# ---------------------------------------------------------------------------------------- detector

LABELS = list(itertools.product(CLASSES, COLOURS))      # 40 objects; label 40 is an empty cell


def _templates():
    """Return every object on every background, then the empty cells.

    Pixels Float (123, 192); label and code Long (123,).
    """
    n = len(BACKGROUNDS)
    cells = [paint({(0, 0): label}, b) for label in LABELS for b in range(n)]
    cells += [paint({}, b) for b in range(n)]
    templates = torch.stack(cells)[:, :, :CELL, :CELL].flatten(1).float()

    # an object's code is the same on all backgrounds, an empty cell's tells the background
    label = torch.arange(len(LABELS)).repeat_interleave(n)
    empty = torch.full((n,), len(LABELS))
    return templates, torch.cat([label, empty]), torch.cat([label, empty + torch.arange(n)])


TEMPLATES, TEMPLATE_LABEL, TEMPLATE_CODE = _templates()


def distances(images: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of every cell, row by row, to every template.

    images uint8 [B, 3, 32, 32] -> Float [B * 16, 123].
    """
    cells = images.float().cpu().unflatten(3, (GRID, CELL)).unflatten(2, (GRID, CELL))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3)          # (B, 4, 4, 192)
    return torch.cdist(cells.flatten(0, 2), TEMPLATES).square()


def detect(images: torch.Tensor, lines=None) -> list[tuple[dict, dict]]:
    """Find the objects of every picture.

    images uint8 [B, 3, 32, 32] -> per picture boxes {class: [[x1, y1, x2, y2, score], ...]}, in
    pixels and in ascending score, and colours {class: [...]}, in the order in which
    eval_geneval.filter_detections keeps the boxes. lines, GenEval's metadata, is not needed here.

    A cell is the object whose template is nearest. Its score is 1 - d(nearest) / d(nearest of any
    other object or of an empty cell), d being the squared distance: 1 for a perfect drawing, 0
    halfway. Raises InputError for pictures of another size.
    """
    side = CELL * GRID
    height, width = images.shape[-2:]
    if (height, width) != (side, side):
        raise InputError(f"the exact detector of shapes judges pictures of {side} x {side}, "
                         f"not {width} x {height}")

    d = distances(images)
    nearest = torch.full((len(d), len(LABELS) + 1), math.inf)
    label = TEMPLATE_LABEL.expand(len(d), -1)
    nearest = nearest.scatter_reduce(1, label, d, "amin")       # (B * 16, 41)
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
