"""Make geneval.jsonl, the 553 official prompts of GenEval, or prompts in its form to train on.

    python prompts/make_geneval.py                              # writes prompts/geneval.jsonl
    python prompts/make_geneval.py --train FILE --n 50000       # none of what the official ask

Source: djghosh13/geneval, prompts/create_prompts.py, whose random numbers these are.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support.geneval import CLASSES, COLOURS, RELATIONS  # noqa: E402

NUMBERS = {2: "two", 3: "three", 4: "four"}
SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


def geneval_prompts(seed: int = 43, n: int = 100) -> list[dict]:
    """Return the examples, n of each tag less duplicates; the defaults give the official 553 of
    djghosh13/geneval, prompts/create_prompts.py."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in rng.choice(len(CLASSES), size=min(n, len(CLASSES)), replace=False):
        x = {"class": CLASSES[i], "count": 1}
        examples.append(_example("single_object", _an(x), x))
    for tag in ("two_object", "counting", "colors", "position", "color_attr"):
        examples += [draw_example(tag, rng) for _ in range(n)]
    return list({json.dumps(example): example for example in examples}.values())


def draw_example(tag, rng) -> dict:
    """Return a random example of a tag (not single_object), with GenEval's random numbers."""
    things = CLASSES[1:]  # all but a person
    if tag == "counting":
        name, count = _pick(rng, CLASSES), int(rng.integers(2, 4, endpoint=True))
        x, more = {"class": name, "count": count}, {"class": name, "count": count + 1}
        text = f"{NUMBERS[count]} {_plural(name)}"
        return _example(tag, text, x, exclude=[more])
    if tag == "colors":
        x = {"class": _pick(rng, things), "count": 1, "color": _pick(rng, COLOURS)}
        return _example(tag, _an(x), x)
    names = _pick_two(rng, things if tag == "color_attr" else CLASSES)
    x, y = ({"class": name, "count": 1} for name in names)
    if tag == "position":
        relation = _pick(rng, RELATIONS)
        text = f"{_an(x)} {relation} {_an(y)}"
        return _example(tag, text, y, x | {"position": [relation, 0]})
    if tag == "color_attr":
        x["color"], y["color"] = _pick_two(rng, COLOURS)
    return _example(tag, f"{_an(x)} and {_an(y)}", x, y)


def training_prompts(n: int, seed: int = 0) -> list[dict]:
    """Return n examples to train on, none of which asks what an official prompt asks, whatever the
    order of its two objects. The SHARES of the tags are those of yifan123/flow_grpo."""
    rng, held_out = np.random.default_rng(seed), {_asks(e) for e in geneval_prompts()}
    shares = np.array(list(SHARES.values())) / sum(SHARES.values())
    examples = []
    for tag in rng.choice(list(SHARES), size=n, p=shares):
        example = draw_example(tag, rng)
        while _asks(example) in held_out:
            example = draw_example(tag, rng)
        examples.append(example)
    return examples


def _asks(example):
    """Return a key that is equal for prompts that differ only in the order of their objects, or in
    left for right, above for below."""
    clauses = example["include"]
    things = frozenset((c["class"], c["count"], c.get("color")) for c in clauses)
    is_vertical = any(c.get("position", [""])[0] in ("above", "below") for c in clauses)
    return example["tag"], things, is_vertical


def _an(clause):
    words = f"{clause.get('color', '')} {clause['class']}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name):
    return name + ("es" if name.endswith("s") else "s")


def _example(tag, text, *include, **more):
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {text}"}


def _pick(rng, names):
    return names[rng.choice(len(names))]


def _pick_two(rng, names):
    return [names[i] for i in rng.choice(len(names), size=2, replace=False)]


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=Path, metavar="FILE", help="write training prompts")
    p.add_argument("--n", type=int, default=50_000, help="how many training prompts (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the training prompts (%(default)s)")
    p.add_argument("--out", type=Path, default=HERE / "geneval.jsonl", metavar="FILE",
                   help="of the official ones (prompts/geneval.jsonl)")
    args = p.parse_args()
    examples = training_prompts(args.n, args.seed) if args.train else geneval_prompts()
    lines = [json.dumps(example) + "\n" for example in examples]
    (args.train or args.out).write_text("".join(lines))


if __name__ == "__main__":
    main()
