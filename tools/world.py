"""Look at the tiny world: what its base draws, in which order, and how its CLIP judges.

    python tools/world.py --json results/world.json       # a minute
    python tools/world.py --ckpt runs/NAME/checkpoint-40 --json results/world-seed42.json

base: GenEval's rule (official), and the stricter ones, by family (mean: of the families, not of the
prompts); 63 held-out prompts x --n pictures. relations: the share of pictures that show what was
asked, and that show the opposite (the relation turned round, two colours exchanged), and the share
that show the asked relation or colours among those that show both objects; of 32 combinations that
RL trains on and of the 12 that are held out, for each family x --n pictures. order: the share of
all tokens, and of all objects, that each iteration places, and the policy's entropy at the tokens
that it places, in nats. clip: how often the CLIP ranks a right picture over a wrong one, by family.
Four kinds of wrong pictures: "other", of another prompt of the family; "near", with one thing
changed (a class, the count by one, a colour, the relation, colours exchanged); "more", with an
object that nobody asked for; "drawn", what the policy draws wrong, beside what it draws right for
the same prompt. counts: the CLIP's mean score of pictures that show so many objects, by the number
that was asked for.
"""
import argparse
import copy
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import load_models, to_uint8  # noqa: E402
from reward import make_reward  # noqa: E402
from sample import rollout  # noqa: E402
from shapes import world  # noqa: E402
from shapes.pretrain import render  # noqa: E402
from support.flags import SAMPLING  # noqa: E402
from support.geneval import verdicts  # noqa: E402

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# ------------------------------------------------------------------------------- base and order

@torch.no_grad()
def draw(showo, lines, n, T):
    """Draw n pictures of each prompt -> Trajectory, and the policy that drew them."""
    prompt = showo.encode([line["prompt"] for line in lines]).repeat(n)
    policy = showo.policy(prompt)
    traj = rollout(policy, len(prompt), showo.N, showo.K, T,
                   generator=torch.Generator().manual_seed(0))
    return traj, policy


@torch.no_grad()
def entropies(traj, policy) -> list[float]:
    """Return the mean entropy of the tokens that each iteration placed, in nats."""
    out = []
    for t in range(traj.threshold.shape[1]):
        logp = policy(traj.state(t))[traj.order == t].log_softmax(-1)
        out.append(-(logp.exp() * logp).sum(1).mean().item())
    return out


def by_family(values, lines) -> dict:
    """Return the mean of values Float (B,) over each family, and the mean of these."""
    means = {}
    for tag in world.FAMILIES:
        mine = torch.tensor([line["tag"] == tag for line in lines])
        means[tag] = values[mine].mean().item()
    return {"mean": sum(means.values()) / len(means), **means}


def order_of(traj) -> dict:
    """Return the shares of all tokens and of all objects that each iteration placed, and that the
    first half of the iterations placed."""
    T, is_object = traj.threshold.shape[1], traj.codes < len(world.LABELS)
    out = {}
    for name, order in (("tokens", traj.order.flatten()), ("objects", traj.order[is_object])):
        shares = torch.bincount(order, minlength=T) / len(order)
        out[name] = shares.tolist()
        out[f"{name}_in_first_half"] = shares[:T // 2].sum().item()
    return out


# ----------------------------------------------------------------------------------- relations

def relations(showo, magvit, n, T, split="train") -> dict:
    """Return, of pictures of position and of two colours, the shares in which GenEval's rule finds
    what was asked, and the opposite, and what was asked among those that show both objects."""
    rng, out = random.Random(0), {}
    for tag in ("position", "color_attr"):
        lines = [line for line in world.prompts(split) if line["tag"] == tag][:32]
        traj, _ = draw(showo, lines, n, T)
        found = world.detect(to_uint8(magvit.decode(traj.codes)))
        asked = [line for line in lines for _ in range(n)]
        objects = [line | {"include": [{"class": clause["class"], "count": 1}
                                       for clause in line["include"]]} for line in asked]
        right, opposite, both = (verdicts(wanted, found)["official"].mean().item() for wanted in
                                 (asked, [nearly(line, rng) for line in asked], objects))
        out[tag] = {"asked": right, "opposite": opposite, "given both objects": right / both}
    return out


# ---------------------------------------------------------------------------------------- CLIP

def nearly(line, rng) -> dict:
    """Return the metadata of a picture that is wrong by one thing."""
    other = copy.deepcopy(line)
    first, last = other["include"][0], other["include"][-1]
    if line["tag"] in ("single_object", "two_object"):
        named = {clause["class"] for clause in line["include"]}
        last["class"] = rng.choice([name for name in world.CLASSES if name not in named])
    elif line["tag"] == "counting":
        last["count"] += rng.choice((-1, 1))
    elif line["tag"] == "colors":
        last["color"] = rng.choice([name for name in world.COLOURS if name != last["color"]])
    elif line["tag"] == "position":
        last["position"] = [INVERSE[last["position"][0]], 0]
    else:
        first["color"], last["color"] = last["color"], first["color"]
    return other


def with_more(line, rng) -> dict:
    """Return the metadata of a picture that shows one object more, of a class that is not named."""
    other = copy.deepcopy(line)
    named = {clause["class"] for clause in line["include"]}
    more = rng.choice([name for name in world.CLASSES if name not in named])
    other["include"].insert(len(other["include"]) - 1, {"class": more, "count": 1})
    return other


def wrong_pictures(lines, change, rng):
    """Return a picture for each of the lines that its changed metadata asks for, and that is wrong
    for the line itself: uint8 (B, 3, 48, 48)."""
    pictures = []
    for line in lines:
        while True:
            picture, _ = render(change(line, rng), rng)
            if not verdicts([line], world.detect(picture[None]))["exact"].item():
                break
        pictures.append(picture)
    return torch.stack(pictures)


def ranked(clip, lines, right, wrong) -> dict:
    """Return, by family, how often the CLIP scores picture i of right over picture i of wrong."""
    texts = [line["prompt"] for line in lines]
    return by_family((clip(right, texts) > clip(wrong, texts)).float(), lines)


def ranked_drawn(clip, lines, pictures, right) -> dict:
    """Return, by family, how often the CLIP scores what was drawn right over what was drawn wrong,
    over all such pairs of a prompt; None where there is none. The mean is of the other families.

    pictures: n of each prompt, together; right Float (B,).
    """
    texts = [line["prompt"] for line in lines]
    n = len(pictures) // len(lines)
    scores = clip(pictures, [text for text in texts for _ in range(n)]).view(-1, n)
    right, pairs = right.view(-1, n).bool(), {tag: [] for tag in world.FAMILIES}
    for line, score, ok in zip(lines, scores, right, strict=True):
        over = score[ok][:, None] > score[~ok]
        pairs[line["tag"]] += over.float().flatten().tolist()
    shares = {tag: sum(won) / len(won) if won else None for tag, won in pairs.items()}
    known = [share for share in shares.values() if share is not None]
    return {"mean": sum(known) / len(known) if known else None, **shares}


def counts(clip, n) -> dict:
    """Return the mean score of the CLIP by the number of objects that is asked for, and that is
    shown, 1 to 6: {asked: [Float]}; n pictures of each held-out prompt."""
    rng, out = random.Random(0), {}
    for asked in world.NUMBERS:
        lines = [line for line in world.prompts("eval") if line["include"][0]["count"] == asked]
        texts, out[asked] = [line["prompt"] for line in lines for _ in range(n)], []
        for shown in range(1, 7):
            metadata = [{"include": [line["include"][0] | {"count": shown}]} for line in lines]
            pictures = torch.stack([render(one, rng)[0] for one in metadata for _ in range(n)])
            out[asked].append(clip(pictures, texts).mean().item())
    return out


def look(n, clip_name, ckpt, T, only_relations=False) -> dict:
    """Return all numbers; see the top."""
    showo, magvit = load_models("shapes", ckpt=ckpt)
    known = {"relations": relations(showo, magvit, n, T),
             "held-out relations": relations(showo, magvit, n, T, "eval")}
    if only_relations:
        return known
    clip, rng = make_reward(f"clip:{clip_name}"), random.Random(0)
    lines = world.prompts("eval")
    traj, policy = draw(showo, lines, n, T)
    pictures = to_uint8(magvit.decode(traj.codes))
    asked = [line for line in lines for _ in range(n)]
    found = verdicts(asked, world.detect(pictures))

    def another(line, rng):
        return rng.choice(rng.choice(world.combinations(line["tag"])))
    right = torch.stack([render(line, rng)[0] for line in asked])
    return {
        "base": {name: by_family(values, asked) for name, values in found.items()},
        **known,
        "order": {**order_of(traj), "entropy": entropies(traj, policy)},
        "clip": {
            "other": ranked(clip, asked, right, wrong_pictures(asked, another, rng)),
            "near": ranked(clip, asked, right, wrong_pictures(asked, nearly, rng)),
            "more": ranked(clip, asked, right, wrong_pictures(asked, with_more, rng)),
            "drawn": ranked_drawn(clip, lines, pictures, found["exact"]),
        },
        "counts": counts(clip, n),
    }


def show(numbers):
    """Print the numbers of look(), a line for each row of each part."""
    for part, rows in numbers.items():
        for name, row in rows.items():
            row = dict(enumerate(row)) if isinstance(row, list) else row
            row = row if isinstance(row, dict) else {"": row}
            cells = (f"{key} {'-' if x is None else f'{x:.3f}'}" for key, x in row.items())
            print(f"{part:<18} {name}:", ", ".join(cells))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", help="a checkpoint trained from the base, in its place")
    p.add_argument("--clip", default="shapes/clip", help="open_clip's folder")
    p.add_argument("--n", type=int, default=8, help="pictures per prompt")
    p.add_argument("--steps", type=int, default=SAMPLING["shapes"]["T"], dest="T",
                   help="T, unmasking iterations")
    p.add_argument("--only-relations", action="store_true")
    p.add_argument("--json", type=Path, help="where to write")
    args = p.parse_args()
    numbers = look(args.n, args.clip, args.ckpt, args.T, args.only_relations)
    show(numbers)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
