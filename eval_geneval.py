"""GenEval (arXiv 2310.11513): prompts, pictures in the official folders, detection, scoring, summary.

    python eval_geneval.py --model showlab/show-o-512x512 --out runs/geneval            # 553 prompts x 4 pictures
    torchrun --nproc_per_node 8 eval_geneval.py --ckpt runs/NAME/checkpoint-1000 --out runs/geneval-rl
    python eval_geneval.py --score-only DIR                                             # a folder drawn by any other model
    python eval_geneval.py --model shapes --out runs/eval                               # the tiny base, its exact detector

Rules and texts are those of djghosh13/geneval evaluation/evaluate_images.py and summary_scores.py; the arithmetic of
thresholds is float32, as there. Departure: the detector is transformers' Mask2Former, with mmdet's post-processing; its
weights are another training run than mmdet's, so absolute numbers shift, counting most of all. Which detector was used
stands in summary.json and in the last line printed: numbers of different detectors are not comparable.
"""
import itertools
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from model import InputError, fetch, first_line
from reward import load_clip
from sample import Parser, add_model_flags, barrier, drawer, in_range, read_prompts, run, setup

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, OVERLAP = 0.3, 0.9, 16, 0.1
DETECTOR, COLOUR_CLIP = "facebook/mask2former-swin-small-coco-instance", "ViT-L-14-quickgelu/openai"
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
    """Whether a prompt line has GenEval metadata: prompt, tag, and clauses with a class, a count, and earlier targets."""
    if not (isinstance(line, dict) and isinstance(line.get("tag"), str) and isinstance(line.get("prompt"), str) and line.get("include")):
        return False
    clauses = [line["include"], line.get("exclude", [])]
    return all(isinstance(c, list) for c in clauses) and all(
        isinstance(c, dict) and isinstance(c.get("class"), str) and type(c.get("count")) is int and c["count"] > 0
        and ("position" not in c or (isinstance(c["position"], list) and len(c["position"]) == 2 and c["position"][1] in range(i)))
        for some in clauses for i, c in enumerate(some))


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


# ---------------------------------------------------------------------------------------------- detection

def instances(class_logits, mask_logits, padded, resized, original, max_per_image=100, min_score=0.0):
    """Raw Mask2Former outputs of one picture -> labels Long[n], boxes Float[n, 5] (x1, y1, x2, y2, score; pixels of the
    original), masks Bool[n, H, W], best class score first.

    class_logits Float[Q, C + 1], mask_logits Float[Q, h, w]; sizes (height, width) of the network's input, of the picture in
    its upper left corner, and of the original. min_score: pairs (query, class) with a class score up to it are left out; as
    a mask's score is at most 1, they cannot end above it. Source: mmdet 2.28.2 MaskFormerFusionHead.instance_postprocess."""
    scores, pair = class_logits.float().softmax(-1)[:, :-1].flatten().topk(min(max_per_image, class_logits[:, 1:].numel()))
    scores, pair = scores[scores > min_score], pair[scores > min_score]
    label, query = pair % (class_logits.shape[1] - 1), pair // (class_logits.shape[1] - 1)
    if not len(pair):
        return label, torch.zeros(0, 5), torch.zeros(0, *original, dtype=torch.bool)
    used, place = query.unique(return_inverse=True)
    resize = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False)  # noqa: E731
    logits = resize(resize(mask_logits[used][None].float(), padded)[..., :resized[0], :resized[1]], original)[0]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    ends = []
    for line in (masks.any(1), masks.any(2)):                                   # columns, rows: first, last + 1
        first, last = line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
        ends.append((first, torch.where(line.any(1), last, 0)))
    (x1, x2), (y1, y2) = ends
    boxes = torch.stack([x1, y1, x2, y2], 1).float()[place]
    return label, torch.cat([boxes, (scores * inside[place])[:, None]], 1), masks[place]


class Detector(torch.nn.Module):
    """Mask2Former and the colour classifier: images uint8[B, 3, H, W], B GenEval lines -> B times (detections {class: [[x1, y1,
    x2, y2, score], ...]} in ascending score, colours {class: [colour, ...]} in the order in which filter_detections keeps
    the boxes, for the classes whose colour the line asks for). batch: pictures at a time, about 1 GB each at 800 x 800.

    Only pairs with a class score over 0.3 are looked at, since nothing below is ever kept. Raises InputError when the
    weights are not those of a COCO detector."""

    def __init__(self, name=DETECTOR, device="cpu", batch=8):
        from transformers import Mask2FormerForUniversalSegmentation
        super().__init__()
        self.name, self.batch, self.texts, folder = str(name), batch, {}, fetch(name, ["config", "weights"])
        try:
            self.model, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
        except (OSError, ImportError, RuntimeError, ValueError) as error:
            raise InputError(f"--detector {name}: cannot load it ({first_line(error)}); give its hub id or a folder") from None
        wrong = sorted(set(info["missing_keys"]) & dict(self.model.named_parameters()).keys())
        if wrong or self.model.config.num_labels != len(CLASSES):
            raise InputError(f"--detector {name}: not a Mask2Former for the {len(CLASSES)} COCO classes ({self.model.config.num_labels} "
                             f"classes, {len(wrong)} weights missing, e.g. {wrong[:1]})")
        self.clip, self.transform, self.tokenizer = load_clip(COLOUR_CLIP, device)
        self.eval().requires_grad_(False).to(device)

    def forward(self, images, lines):
        """See above."""
        return [pair for i in range(0, len(lines), self.batch) for pair in self.some(images[i:i + self.batch], lines[i:i + self.batch])]

    @torch.no_grad()
    def some(self, images, lines):
        """One batch of forward()."""
        height, width = images.shape[-2:]
        scale = min(1333 / max(height, width), 800 / min(height, width))
        resized = [int(side * scale + 0.5) for side in (height, width)]
        padded = [-(-side // 32) * 32 for side in resized]
        pixels = F.interpolate(images.to(self.model.device).float(), resized, mode="bilinear", align_corners=False).round()
        pixels = F.pad(pixels, (0, padded[1] - resized[1], 0, padded[0] - resized[0]), value=128)
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        raw = self.model(pixel_values=(pixels - mean) / std)
        out = []
        for image, line, classes, masks in zip(images, lines, raw.class_queries_logits, raw.masks_queries_logits):
            labels, boxes, masks = (x.cpu() for x in instances(classes, masks, padded, resized, (height, width), min_score=THRESHOLD))
            found, kept_masks = {}, {}
            for i in boxes[:, 4].argsort(stable=True).tolist():
                found.setdefault(CLASSES[labels[i]], []).append(boxes[i].tolist())
                kept_masks.setdefault(CLASSES[labels[i]], []).insert(0, masks[i])
            kept = filter_detections(found, line["tag"])
            asked = {clause["class"] for clause in line["include"] if "color" in clause} & kept.keys()
            out.append((found, {name: self.colours(image, name, kept[name], kept_masks[name]) for name in asked}))
        return out

    def colour_texts(self, name):
        """Float (10, E): the mean direction of three sentences per colour."""
        if name not in self.texts:
            texts = [template.format(colour, name) for colour in COLOURS for template in
                     ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")]
            features = F.normalize(self.clip.encode_text(self.tokenizer(texts).to(self.model.device)).float(), dim=-1)
            self.texts[name] = F.normalize(features.view(len(COLOURS), 3, -1).mean(1), dim=-1)
        return self.texts[name].to(self.model.device)

    def colours(self, image, name, boxes, masks):
        """The colour of every box of a class: zero-shot CLIP on its crop, everything outside its mask grey. The preprocessing
        stays PIL's own: an argmax can hang on the last bit."""
        picture = image.permute(1, 2, 0).cpu().numpy()
        crops = [Image.fromarray(np.where(mask.numpy()[..., None], picture, np.uint8(153))).crop(box[:4]) for box, mask in zip(boxes, masks)]
        pixels = torch.stack([self.transform(crop) for crop in crops]).to(self.model.device, self.clip.token_embedding.weight.dtype)
        features = F.normalize(self.clip.encode_image(pixels).float(), dim=-1)
        return [COLOURS[i] for i in (features @ self.colour_texts(name).T).argmax(1).tolist()]


# -------------------------------------------------------------------------------------- pictures and results

def read_picture(path):
    """A picture file -> uint8 [3, H, W], None when it is missing or broken."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError):
        return None


def draw_folder(out, lines, n, draw, batch, rank=0, world=1):
    """The official layout: OUT/NNNNN/metadata.jsonl and samples/0000.png ...; draw(prompts, n, seeds) -> uint8 pictures.

    Process rank of world draws every world-th prompt; whole pictures that are there stay. -> how many were drawn.
    Raises InputError when a folder holds another prompt."""
    todo, drawn = [], 0
    for i in range(rank, len(lines), world):
        folder, text = out / f"{i:05d}", json.dumps(lines[i])
        seen = (folder / "metadata.jsonl").read_text() if (folder / "metadata.jsonl").exists() else ""
        if seen not in ("", text):
            raise InputError(f"--out {out}: {folder.name} belongs to another prompt; choose a new folder")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if not seen:
            (folder / "metadata.jsonl").write_text(text)
        files = [folder / "samples" / f"{k:04d}.png" for k in range(n)]
        lacking = {k for k in range(n) if read_picture(files[k]) is None}
        todo += [(i, files, lacking)] if lacking else []
    per = max(1, batch // n)
    for chunk in (todo[k:k + per] for k in range(0, len(todo), per)):
        pictures = draw([lines[i]["prompt"] for i, _, _ in chunk], n, [i for i, _, _ in chunk])
        for k, picture in enumerate(pictures):
            _, files, lacking = chunk[k // n]
            if k % n in lacking:
                aside = files[k % n].with_suffix(".part")
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(aside, "PNG")
                aside.rename(files[k % n])
                drawn += 1
    return drawn


def score_folder(out, detect, batch=8, rank=0, world=1) -> list[dict]:
    """Judge the pictures of the official layout; detect(uint8 [B, 3, H, W], lines) -> [(detections, colours), ...].

    Process rank of world judges every world-th prompt. -> rows of results.jsonl, columns as upstream: filename, tag, prompt,
    correct, reason, metadata, details. Raises InputError for a folder that is not of this layout, or a broken picture."""
    work, rows = [], []
    for folder in sorted(f for f in out.iterdir() if f.is_dir() and f.name.isdigit())[rank::world]:
        try:
            line = json.loads((folder / "metadata.jsonl").read_text())
            work += [(file, line) for file in sorted((folder / "samples").iterdir()) if file.suffix == ".png" and file.stem.isdigit()]
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: needs metadata.jsonl and samples/ ({error})") from None
        if not is_geneval(line):
            raise InputError(f"{folder}/metadata.jsonl: lacks GenEval metadata (tag, include, prompt)")
        if not work or work[-1][1] is not line:
            raise InputError(f"{folder}/samples: holds no picture; draw it, or remove the folder")
    chunks = [work[i:i + batch] for i in range(0, len(work), batch)]
    with ThreadPoolExecutor(4) as pool:
        read = lambda chunk: [pool.submit(read_picture, file) for file, _ in chunk]  # noqa: E731
        ahead = [read(chunk) for chunk in chunks[:2]]
        for k, chunk in enumerate(chunks):
            pictures = [future.result() for future in ahead.pop(0)]
            ahead += [read(chunks[k + 2])] if k + 2 < len(chunks) else []
            for (file, _), picture in zip(chunk, pictures):
                if picture is None:
                    raise InputError(f"{file}: is not a readable picture; draw or copy it again")
            for _, same in itertools.groupby(zip(chunk, pictures), key=lambda pair: pair[1].shape):
                same = list(same)
                found = detect(torch.stack([picture for _, picture in same]), [line for (_, line), _ in same])
                for ((file, line), _), (raw, colours) in zip(same, found):
                    kept = filter_detections(raw, line["tag"])
                    correct, reason = score(kept, line, colours)
                    rows.append({"filename": str(file), "tag": line["tag"], "prompt": line["prompt"], "correct": correct,
                                 "reason": reason, "metadata": json.dumps(line), "details": json.dumps(kept)})
    return rows


def scores(rows, resamples=2000) -> dict:
    """results rows -> {"overall" and each tag: [share of right pictures, low, high]}, a 95% interval by bootstrap over the
    prompts of each tag; overall is the mean over tags."""
    rng, by_tag = np.random.default_rng(0), {}
    for row in rows:
        by_tag.setdefault(row["tag"], {}).setdefault(row["metadata"], []).append(bool(row["correct"]))
    out, over = {}, 0
    for tag, prompts in by_tag.items():
        right, all_ = (np.array([f(v) for v in prompts.values()]) for f in (sum, len))
        picks = rng.integers(len(prompts), size=(resamples, len(prompts)))
        again = right[picks].sum(1) / all_[picks].sum(1)
        over = over + again / len(by_tag)
        out[tag] = [right.sum() / all_.sum(), *np.percentile(again, [2.5, 97.5])]
    out = {"overall": [np.mean([v[0] for v in out.values()]), *np.percentile(over, [2.5, 97.5])], **out}
    return {tag: [round(float(x), 5) for x in v] for tag, v in out.items()}


def report(out, rows, facts):
    """Write results.jsonl, summary.txt, summary.json (numbers, 95% intervals, facts) and failures.txt, and print the summary."""
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "failures.txt").write_text("".join(f"{row['filename']}: {row['prompt']}: {'; '.join(row['reason'].splitlines())}\n"
                                              for row in rows if not row["correct"]))
    text, numbers = summary(rows), scores(rows)
    (out / "summary.txt").write_text(text)
    seen = [row["details"] != "{}" for row in rows if row["tag"] == "single_object"]
    if len(seen) >= 20 and np.mean(seen) < 0.25:
        facts["warning"] = (f"in only {np.mean(seen):.0%} of the single_object pictures the detector is sure of any object; its weights look "
                            "wrong (or the pictures are)")
    (out / "summary.json").write_text(json.dumps({**{tag: v[0] for tag, v in numbers.items()}, "images": len(rows), **facts,
                                                  "interval95": {tag: v[1:] for tag, v in numbers.items()}}, indent=2) + "\n")
    print(text + "\n95% intervals (bootstrap over prompts): " + ", ".join(f"{tag} {v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for tag, v in numbers.items()))
    print(", ".join(f"{name}: {value}" for name, value in facts.items() if name != "warning"))
    if "warning" in facts:
        print(f"WARNING: {facts['warning']}", file=sys.stderr)


def main():
    import shapes
    p = Parser("Draw the evaluation prompts, detect, score: results.jsonl, summary.txt, summary.json, failures.txt. Several processes by torchrun.")
    p.add_argument("--out", help="folder for pictures and results; whole pictures that are there are kept")
    p.add_argument("--score-only", metavar="DIR", help="score the pictures in this folder of the official layout")
    p.add_argument("--images-only", action="store_true", help="draw, for another scorer")
    p.add_argument("--prompts", help="a jsonl file with GenEval metadata (default: the 553 official prompts; shapes: its 63 held-out ones)")
    p.add_argument("--n", "--images-per-prompt", dest="n", type=in_range(int, 1), default=4,
                   help="pictures per prompt (torchrun takes the short name for one of its own)")
    p.add_argument("--detector", help=f"hub id or folder of a Mask2Former, or shapes (default: {DETECTOR}; shapes for --model shapes)")
    p.add_argument("--detect-batch", type=in_range(int, 1), default=8, help="pictures at a time in the detector")
    add_model_flags(p)
    args = p.parse_args()
    if bool(args.out) == bool(args.score_only) or (args.images_only and args.score_only):
        p.error("give --out DIR to draw (and score), or --score-only DIR")
    out = Path(args.out or args.score_only)
    lines = read_prompts(args.prompts) if args.prompts else shapes.prompts("eval") if args.model == "shapes" else geneval_prompts()
    if not all(map(is_geneval, lines)):
        p.error(f"--prompts {args.prompts}: every line needs GenEval metadata (tag, include, prompt)")
    if args.score_only and not any(f.name.isdigit() for f in (out.iterdir() if out.is_dir() else ())):
        p.error(f"--score-only {out}: not a folder of the official layout (NNNNN/metadata.jsonl, NNNNN/samples/0000.png)")
    rank, world, args.device = setup(args.device)
    name, facts = args.detector or ("shapes" if args.model == "shapes" else DETECTOR), {}
    detector = None if args.images_only else shapes.detect if name == "shapes" else Detector(name, args.device, args.detect_batch)
    if args.out:
        draw, batch, settings = drawer(args, say=rank == 0)
        settings["n"], kept = args.n, out / "settings.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            before = json.loads(kept.read_text() or "null") if kept.exists() else None
        except (OSError, ValueError) as error:
            raise InputError(f"--out {out}: cannot be used ({first_line(error)})") from None
        if before not in (None, settings):
            p.error(f"--out {out}: was drawn with other settings ({kept.name}); give the same ones or choose a new folder")
        if before is None and any(f.name != kept.name for f in out.iterdir()):
            p.error(f"--out {out}: is not empty, and not a folder of this program; choose a new one")
        barrier()
        if rank == 0 and before is None:
            kept.write_text(json.dumps(settings, indent=2) + "\n")
        barrier()
        start = time.time()
        drawn = draw_folder(out, lines, args.n, draw, batch, rank, world)
        print(f"process {rank}: drew {drawn} pictures, {drawn / (time.time() - start):.2f} a second", flush=True)
        del draw
        barrier()
    if not args.images_only:
        start = time.time()
        rows = score_folder(out, detector, args.detect_batch, rank, world)
        part = out / f".rows-{rank}.jsonl"
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        barrier()
        if rank == 0:
            parts = [out / f".rows-{r}.jsonl" for r in range(world)]
            rows = sorted((json.loads(line) for f in parts for line in f.read_text().splitlines()), key=lambda row: row["filename"])
            facts |= {"detector": "shapes, exact" if name == "shapes" else name, "colours": "shapes, exact" if name == "shapes" else COLOUR_CLIP,
                      "judged_per_s": round(len(rows) / (time.time() - start), 2)}
            report(out, rows, facts)
            for f in parts:
                f.unlink()
    barrier()


if __name__ == "__main__":
    run(main)
