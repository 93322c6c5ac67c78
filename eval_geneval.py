"""GenEval (arXiv 2310.11513): prompts, pictures in the official folders, detection, scoring, summary.

    python eval_geneval.py --model shapes --out runs/eval                               # the tiny base
    python eval_geneval.py --model shapes --ckpt runs/shapes/checkpoint-45 --out runs/eval-rl

Rules and texts are those of djghosh13/geneval evaluation/evaluate_images.py and summary_scores.py; the arithmetic of
thresholds is float32, as there. Which detector was used is written into summary.json: numbers of different detectors are
not comparable.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sample import Parser, add_model_flags, drawer, in_range, read_prompts, run

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, OVERLAP = 0.3, 0.9, 16, 0.1
CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")  # line i is the detector's class i


# ------------------------------------------------------------------------------------------------ prompts

def geneval_prompts(seed: int = 43, n: int = 100) -> list[dict]:
    """The official prompts with their metadata; the defaults give the published 553. Source: prompts/create_prompts.py."""
    rng, people = np.random.default_rng(seed), CLASSES.index("person")
    a = lambda name: f"{'an' if name[0] in 'aeiou' else 'a'} {name}"  # noqa: E731
    pair = lambda: [CLASSES[i] for i in rng.choice(len(CLASSES), size=2, replace=False)]  # noqa: E731
    thing = lambda i: CLASSES[(i + 1 + people) % len(CLASSES)]  # noqa: E731  (anything but a person)
    lines = []

    def add(tag, include, text, **rest):
        lines.append({"tag": tag, "include": include, **rest, "prompt": f"a photo of {text}"})

    for i in rng.choice(len(CLASSES), size=min(n, len(CLASSES)), replace=False) if n else ():
        add("single_object", [{"class": CLASSES[i], "count": 1}], a(CLASSES[i]))
    for _ in range(n):
        x, y = pair()
        add("two_object", [{"class": x, "count": 1}, {"class": y, "count": 1}], f"{a(x)} and {a(y)}")
    for _ in range(n):
        x, k = CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 4, endpoint=True))
        add("counting", [{"class": x, "count": k}], f"{['two', 'three', 'four'][k - 2]} {x}{'es' if x[-1] == 's' else 's'}",
            exclude=[{"class": x, "count": k + 1}])
    for _ in range(n):
        x, c = thing(rng.choice(len(CLASSES) - 1)), COLOURS[rng.choice(len(COLOURS))]
        add("colors", [{"class": x, "count": 1, "color": c}], f"{a(c)} {x}")
    for _ in range(n):
        (x, y), where = pair(), ["left of", "right of", "above", "below"][rng.choice(4)]
        add("position", [{"class": y, "count": 1}, {"class": x, "count": 1, "position": [where, 0]}], f"{a(x)} {where} {a(y)}")
    for _ in range(n):
        x, y = (thing(i) for i in rng.choice(len(CLASSES) - 1, size=2, replace=False))
        c, d = (COLOURS[i] for i in rng.choice(len(COLOURS), size=2, replace=False))
        add("color_attr", [{"class": x, "count": 1, "color": c}, {"class": y, "count": 1, "color": d}], f"{a(c)} {x} and {a(d)} {y}")
    return list({json.dumps(line): line for line in lines}.values())


# ------------------------------------------------------------------------------------------------ scoring

def filter_detections(raw: dict, tag: str) -> dict:
    """raw {class: [[x1, y1, x2, y2, score], ...]} -> the same, best first: score over 0.3 (0.9 for counting), 16 at most.

    Equal scores come in reverse order; classes with nothing left are dropped."""
    bar, kept = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD), {}
    for name, boxes in raw.items():
        by_score = sorted(boxes, key=lambda box: np.float32(box[4]))[::-1]
        by_score = [box for box in by_score if np.float32(box[4]) > bar][:MAX_OBJECTS]
        if by_score:
            kept[name] = by_score
    return kept


def compute_iou(a, b) -> float:
    """Official intersection over union of two boxes (x1, y1, x2, y2, ...), sides counted with + 1; 0 for an empty union."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)
    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


def relative_position(a, b) -> set[str]:
    """Where box a lies seen from box b: a subset of {left of, right of, above, below}; at most two, none when they overlap."""
    offset, slack = [], []
    for k in (0, 1):
        offset.append((a[k] + a[k + 2] - b[k] - b[k + 2]) / 2)
        slack.append(OVERLAP * (abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k])))
    moved = [math.copysign(max(abs(o) - s, 0), o) for o, s in zip(offset, slack)]
    if max(map(abs, moved)) < 1e-3:
        return set()
    x, y = (m / math.hypot(*offset) for m in moved)
    return {name for name, true in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5)) if true}


def _wrong_place(boxes, targets, relation):
    """The first pair of boxes that lacks the relation -> the relations it has; None when every pair has it."""
    for box in boxes:
        for target in targets:
            has = relative_position(box, target)
            if relation not in has:
                return sorted(has)
    return None


def _judge(detections, metadata, colours, strict):
    """Faults (texts) and partial-credit terms; strict: exactly n boxes of a class, all judged, exclude not looked at."""
    faults, terms, matched = [], [], []
    for clause in metadata.get("include", []):
        name, n, fault = clause["class"], clause["count"], None
        found = detections.get(name, [])[:None if strict else n]
        terms.append(1 - abs(n - len(found)) / n)
        if len(found) != n:
            fault = f"expected {name}{'==' if strict else '>='}{n}, found {len(found)}"
            terms += [0.0] if "color" in clause or "position" in clause else []
        elif "color" in clause:
            seen, wanted = colours[name][:n], clause["color"]
            terms.append(1 - abs(n - seen.count(wanted)) / n)
            if seen.count(wanted) < n:
                fault = (f"expected {wanted} {name}>={n}, found {seen.count(wanted)} {wanted}; and "
                         + ", ".join(f"{seen.count(c)} {c}" for c in COLOURS if c in seen))
        if fault is None and "position" in clause:
            relation, target = clause["position"]
            if matched[target] is None:
                fault = f"no target for {name} to be {relation}"
            elif (has := _wrong_place(found, matched[target], relation)) is not None:
                fault = f"expected {name} {relation} target, found {' and '.join(has)} target"
            terms.append(float(fault is None))
        matched.append(found if fault is None else None)
        faults += [fault] if fault else []
    for clause in () if strict else metadata.get("exclude", []):
        found = len(detections.get(clause["class"], []))
        if found >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return faults, terms


def score(detections: dict, metadata: dict, colours: dict) -> tuple[bool, str]:
    """The official verdict -> (correct, reason: one line per fault).

    detections: what filter_detections returns; metadata: a GenEval line; colours {class: [colour of box 0, 1, ...]} in the
    order of detections (only classes with a colour clause are looked up)."""
    faults, _ = _judge(detections, metadata, colours, strict=False)
    return not faults, "\n".join(faults)


def strict_score(detections: dict, metadata: dict, colours: dict) -> tuple[bool, str, float]:
    """GenEval as a training reward: exactly the wanted number of each class -> (correct, reason, partial credit).

    Partial credit is the mean of one term per count, colour and position; many boxes too many make it very negative.
    Source: yifan123/reward-server, with its position term counted once (as in Yovecent/UDM-GRPO)."""
    faults, terms = _judge(detections, metadata, colours, strict=True)
    return not faults, "\n".join(faults), sum(terms) / len(terms) if terms else 0.0


def exact_score(raw: dict, metadata: dict, colours: dict) -> bool:
    """strict_score's verdict on raw detections, and nothing else in the picture that scores over 0.3, whatever the tag:
    the only one of the three that drawing more cannot please."""
    asked = sum(clause["count"] for clause in metadata.get("include", []))
    there = sum(map(len, filter_detections(raw, "").values()))
    return there == asked and strict_score(filter_detections(raw, metadata["tag"]), metadata, colours)[0]


def is_geneval(line: dict) -> bool:
    """Whether a prompt line has GenEval metadata: a tag, and clauses with a class and a count."""
    include = line.get("include")
    return isinstance(line.get("tag"), str) and isinstance(include, list) and bool(include) and all(
        isinstance(c, dict) and "class" in c and isinstance(c.get("count"), int) for c in include)


def verdicts(lines: list[dict], found: list) -> dict:
    """GenEval lines and a detector's (detections, colours) of as many pictures -> Float[B] each: "overall" (the official
    verdict), "exact", "objects" (boxes over 0.3 in the picture) and "objects_asked"."""
    out = {"overall": [], "exact": [], "objects": [], "objects_asked": []}
    for line, (raw, colours) in zip(lines, found):
        out["overall"].append(score(filter_detections(raw, line["tag"]), line, colours)[0])
        out["exact"].append(exact_score(raw, line, colours))
        out["objects"].append(sum(map(len, filter_detections(raw, "").values())))
        out["objects_asked"].append(sum(clause["count"] for clause in line["include"]))
    return {name: torch.tensor(values, dtype=torch.float) for name, values in out.items()}


def summary(rows: list[dict]) -> str:
    """The official summary text of results rows (tag, correct, metadata): shares of pictures and prompts, then per tag."""
    by_tag, by_prompt = {}, {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        by_prompt.setdefault(row["metadata"], []).append(bool(row["correct"]))
    right = [bool(row["correct"]) for row in rows]
    lines = ["Summary", "=======", f"Total images: {len(rows)}", f"Total prompts: {len(by_prompt)}",
             f"% correct images: {np.mean(right):.2%}", f"% correct prompts: {np.mean([any(v) for v in by_prompt.values()]):.2%}",
             "", "Task breakdown", "=============="]
    lines += [f"{tag:<16} = {np.mean(v):.2%} ({sum(v)} / {len(v)})" for tag, v in by_tag.items()]
    return "\n".join(lines + ["", f"Overall score (avg. over tasks): {np.mean([np.mean(v) for v in by_tag.values()]):.5f}"]) + "\n"


# -------------------------------------------------------------------------------------- pictures and results

def draw_folder(out, lines, n, draw):
    """The official layout: OUT/NNNNN/metadata.jsonl and samples/0000.png ...; draw(prompts, n, seeds) -> uint8 pictures."""
    for i in range(0, len(lines), 32):
        chunk = lines[i:i + 32]
        pictures = draw([line["prompt"] for line in chunk], n, list(range(i, i + len(chunk))))
        for k, picture in enumerate(pictures):
            folder = out / f"{i + k // n:05d}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(json.dumps(chunk[k // n]))
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "samples" / f"{k % n:04d}.png")


def score_folder(out, detect) -> list[dict]:
    """Judge every picture of the official layout; detect(uint8 [B, 3, H, W]) -> [(detections, colours), ...].

    -> rows of results.jsonl, columns as upstream: filename, tag, prompt, correct, reason, metadata, details."""
    rows = []
    for folder in sorted(f for f in out.iterdir() if f.is_dir() and f.name.isdigit()):
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        files = sorted(f for f in (folder / "samples").iterdir() if f.suffix == ".png" and f.stem.isdigit())
        pictures = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files])
        for file, (raw, colours) in zip(files, detect(pictures)):
            kept = filter_detections(raw, metadata["tag"])
            correct, reason = score(kept, metadata, colours)
            rows.append({"filename": str(file), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct,
                         "reason": reason, "metadata": json.dumps(metadata), "details": json.dumps(kept)})
    return rows


def main():
    from shapes import detect
    from shapes import prompts as shapes_prompts
    p = Parser("Draw the evaluation prompts, detect, score: results.jsonl, summary.txt, summary.json.")
    p.add_argument("--out", required=True, help="a new folder for pictures and results")
    p.add_argument("--prompts", help="a jsonl file with GenEval metadata (default: the 63 held-out prompts of shapes)")
    p.add_argument("--n", type=in_range(int, 1), default=4, help="pictures per prompt")
    add_model_flags(p)
    args = p.parse_args()
    out = Path(args.out)
    if args.model != "shapes":
        p.error("only --model shapes has a detector so far; sample.py draws with any model")
    if out.exists() and any(out.iterdir()):
        p.error(f"--out {out}: is not empty; choose a new folder")
    lines = read_prompts(args.prompts) if args.prompts else shapes_prompts("eval")
    if not all(map(is_geneval, lines)):
        p.error(f"--prompts {args.prompts}: every line needs GenEval metadata (tag, include, prompt)")
    draw_folder(out, lines, args.n, drawer(args))
    rows = score_folder(out, detect)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = summary(rows)
    (out / "summary.txt").write_text(text)
    by_tag = {tag: float(np.mean([r["correct"] for r in rows if r["tag"] == tag])) for tag in dict.fromkeys(r["tag"] for r in rows)}
    (out / "summary.json").write_text(json.dumps({"overall": float(np.mean(list(by_tag.values()))), **by_tag, "images": len(rows),
                                                  "detector": "shapes, exact"}, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    run(main)
