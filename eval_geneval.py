"""GenEval (arXiv 2310.11513): draw the prompts, detect objects and colours, score, summarise.

    python eval_geneval.py --model showlab/show-o-512x512 --out runs/geneval
    torchrun --nproc_per_node 8 eval_geneval.py --ckpt runs/NAME/checkpoint-1000 --out runs/after
    python eval_geneval.py --score-only DIR                   # pictures of any other model
    python eval_geneval.py --model shapes --out runs/eval     # the tiny base, its exact detector
    python eval_geneval.py --write-prompts geneval-train.jsonl --n 50000        # to train on

Three things are passed around:

    example     a prompt with its metadata, {"tag": "counting", "include": [{"class": "cow",
                "count": 2}], "exclude": [{"class": "cow", "count": 3}], "prompt": "a photo of ..."}
    detections  {class: [[x1, y1, x2, y2, score], ...]}, in pixels
    colours     {class: [colour, ...]}, one per box that filter_detections keeps, in its order

Rules and texts are those of djghosh13/geneval, evaluate_images.py and summary_scores.py.

Departures:
- the detector is transformers' Mask2Former with mmdet's post-processing. Its weights come from
  another training run than mmdet's, so absolute numbers shift, those of counting most: numbers of
  different detectors cannot be compared, and summary.json names the one that was used;
- summary.json also holds 95% intervals, by bootstrap over prompts;
- strict_score and exact_score are no part of GenEval, but its rules made into training rewards.
"""
import functools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import common
import shapes
from checkpoint import InputError, fetch, first_line, is_shapes, read_json, write_json
from model import describe, load_models
from sample import generate

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOUR_CLIP = "ViT-L-14-quickgelu/openai"
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, OVERLAP = 0.3, 0.9, 16, 0.1
SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
RELATIONS = ["left of", "right of", "above", "below"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
CLASSES = (  # entry i is the detector's class i
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")


# ------------------------------------------------------------------------------------- prompts

def geneval_prompts(seed: int = 43, n: int = 100) -> list[dict]:
    """Return the examples, n of each tag less duplicates; the defaults give the official 553.

    Source: djghosh13/geneval, prompts/create_prompts.py."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in rng.choice(len(CLASSES), size=min(n, len(CLASSES)), replace=False):
        x = {"class": CLASSES[i], "count": 1}
        examples.append(_example("single_object", [x], _an(x)))
    for tag in ("two_object", "counting", "colors", "position", "color_attr"):
        examples += [draw_example(tag, rng) for _ in range(n)]
    return list({json.dumps(example): example for example in examples}.values())


def draw_example(tag, rng) -> dict:
    """Return a random example of a tag (not single_object), with GenEval's random numbers."""
    things = CLASSES[1:]  # all but a person
    if tag == "counting":
        name, count = _pick(rng, CLASSES), int(rng.integers(2, 4, endpoint=True))
        x, more = {"class": name, "count": count}, {"class": name, "count": count + 1}
        text = f"{shapes.NUMBERS[count]} {shapes.plural(name)}"
        return _example(tag, [x], text, exclude=[more])
    if tag == "colors":
        x = {"class": _pick(rng, things), "count": 1, "color": _pick(rng, COLOURS)}
        return _example(tag, [x], _an(x))
    names = _pick_two(rng, things if tag == "color_attr" else CLASSES)
    x, y = ({"class": name, "count": 1} for name in names)
    if tag == "position":
        relation = _pick(rng, RELATIONS)
        text = f"{_an(x)} {relation} {_an(y)}"
        return _example(tag, [y, x | {"position": [relation, 0]}], text)
    if tag == "color_attr":
        x["color"], y["color"] = _pick_two(rng, COLOURS)
    return _example(tag, [x, y], f"{_an(x)} and {_an(y)}")


def training_prompts(n: int, seed: int = 0) -> list[dict]:
    """Return n examples to train on, none of which asks what an official prompt asks, whatever the
    order of its two objects.

    Position : counting : color_attr : colors : two_object = 7:5:3:1:1, as in yifan123/flow_grpo."""
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
    """Return what a prompt asks, less the order of its objects and the sense of its relation."""
    axis = {"left of": 0, "right of": 0, "above": 1, "below": 1}
    return example["tag"], frozenset(
        (clause["class"], clause["count"], clause.get("color")) for clause in example["include"]), {
        axis[clause["position"][0]] for clause in example["include"] if "position" in clause} == {1}


def _example(tag, include, text, **exclude):
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {text}"}


def _an(clause):
    return shapes.an(f"{clause.get('color', '')} {clause['class']}".strip())


def _pick(rng, names):
    return names[rng.choice(len(names))]


def _pick_two(rng, names):
    return [names[i] for i in rng.choice(len(names), size=2, replace=False)]


def is_geneval(example) -> bool:
    """Return whether a JSON value is an example: tag, prompt, and clauses of the right form."""
    try:
        texts = [example["tag"], example["prompt"]]
        for clauses in (example["include"], example.get("exclude", [])):
            for i, clause in enumerate(clauses):
                texts.append(clause["class"])
                if type(clause["count"]) is not int or not 1 <= clause["count"] <= 1000:
                    return False
                if "position" in clause:
                    relation, target = clause["position"]
                    texts.append(relation)
                    if type(target) is not int or not 0 <= target < i:  # an earlier clause
                        return False
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return len(example["include"]) > 0 and all(isinstance(text, str) for text in texts)


def check_example(example, where, tiny=False):
    """Raise InputError unless an example has metadata, and asks for classes, colours and relations
    that the detector can find (else its reward would be 0 for ever).

    tiny: the detector is that of shapes.py."""
    if not is_geneval(example):
        raise InputError(f"{where} lacks GenEval metadata (tag, include, prompt)")
    if example["tag"] in common.NOT_TAGS:
        raise InputError(f"{where}: the tag {example['tag']!r} is the name of another number")
    classes, colours = (shapes.CLASSES, shapes.COLOURS) if tiny else (CLASSES, COLOURS)
    unknown = []
    for clause in [*example["include"], *example.get("exclude", [])]:
        relation = clause.get("position", [None])[0]
        unknown += [] if clause["class"] in classes else [clause["class"]]
        unknown += [] if clause.get("color") in (None, *colours) else [str(clause["color"])]
        unknown += [] if relation in (None, *RELATIONS) else [relation]
    if unknown:
        raise InputError(f"{where}: the detector does not know {', '.join(unknown)}")


# ------------------------------------------------------------------------------------- scoring

def filter_detections(raw: dict, tag: str) -> dict:
    """Return the detections that count: score over 0.3 (0.9 for counting), 16 a class, best first.

    Scores are compared in float32, equal ones come in reverse order; empty classes are dropped."""
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    kept = {}
    for name, boxes in raw.items():
        best_first = sorted(boxes, key=lambda box: np.float32(box[4]))[::-1]
        confident = [box for box in best_first if np.float32(box[4]) > threshold]
        if confident:
            kept[name] = confident[:MAX_OBJECTS]
    return kept


def compute_iou(a, b) -> float:
    """Return the official intersection over union of boxes (x1, y1, x2, y2, ...), sides + 1."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


def relative_position(a, b) -> set[str]:
    """Return where box a lies seen from box b: at most two of left of, right of, above, below.

    The centres' offset is first shortened by a tenth of the boxes' sizes; none if that is all."""
    offset, shortened = [], []
    for k in (0, 1):
        distance = (a[k] + a[k + 2] - b[k] - b[k + 2]) / 2
        slack = OVERLAP * (abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]))
        offset.append(distance)
        shortened.append(math.copysign(max(abs(distance) - slack, 0), distance))
    if max(map(abs, shortened)) < 1e-3:
        return set()
    x, y = (side / math.hypot(*offset) for side in shortened)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def check_clauses(detections, metadata, colours, strict):
    """Return what is wrong (texts), and credits for each count, colour and position (1 = right).

    strict: a class needs exactly its number of boxes, and exclude is not looked at; else the
    official rules, which look at the best boxes alone."""
    faults, credits = [], []
    matched = []  # the boxes of each clause, None when it is not fulfilled
    for clause in metadata.get("include", []):
        name, wanted = clause["class"], clause["count"]
        boxes = detections.get(name, [])
        if not strict:
            boxes = boxes[:wanted]
        credits.append(1 - abs(wanted - len(boxes)) / wanted)

        fault = None
        if len(boxes) != wanted:
            sign = "==" if strict else ">="
            fault = f"expected {name}{sign}{wanted}, found {len(boxes)}"
            if "color" in clause or "position" in clause:
                credits.append(0.0)
        elif "color" in clause:
            colour, seen = clause["color"], colours[name][:wanted]
            found = seen.count(colour)
            credits.append(1 - abs(wanted - found) / wanted)
            if found < wanted:
                others = ", ".join(f"{seen.count(c)} {c}" for c in COLOURS if c in seen)
                fault = f"expected {colour} {name}>={wanted}, found {found} {colour}; and {others}"
        if fault is None and "position" in clause:
            relation, target = clause["position"]
            fault = _check_position(name, boxes, relation, matched[target])
            credits.append(float(fault is None))

        matched.append(boxes if fault is None else None)
        if fault is not None:
            faults.append(fault)

    exclude = [] if strict else metadata.get("exclude", [])
    for clause in exclude:
        found = len(detections.get(clause["class"], []))
        if found >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return faults, credits


def _check_position(name, boxes, relation, targets):
    if targets is None:
        return f"no target for {name} to be {relation}"
    for box in boxes:
        for target in targets:
            found = relative_position(box, target)
            if relation not in found:
                found = " and ".join(sorted(found))
                return f"expected {name} {relation} target, found {found} target"
    return None


def score(detections: dict, metadata: dict, colours: dict) -> tuple[bool, str]:
    """Return the official verdict: whether a picture is correct, and why not, a line per fault.

    detections: filtered; metadata: an example; colours: of the classes with a colour clause."""
    faults, _ = check_clauses(detections, metadata, colours, strict=False)
    return not faults, "\n".join(faults)


def strict_score(detections: dict, metadata: dict, colours: dict) -> tuple[bool, str, float]:
    """Return the verdict of GenEval as a training reward: correct, reason, partial credit.

    Correct needs exactly the wanted number of each class. The credit is the mean over all counts,
    colours and positions; many boxes too many make it very negative. Source:
    yifan123/reward-server, but a position counts once (as in Yovecent/UDM-GRPO)."""
    faults, credits = check_clauses(detections, metadata, colours, strict=True)
    return not faults, "\n".join(faults), sum(credits) / len(credits) if credits else 0.0


def exact_score(raw: dict, metadata: dict, colours: dict) -> bool:
    """Return whether strict_score accepts raw detections that hold nothing else over 0.3.

    The one verdict of the three that cannot be pleased by drawing more objects."""
    strict, _, _ = strict_score(filter_detections(raw, metadata["tag"]), metadata, colours)
    return strict and _n_objects(raw) == _n_asked(metadata)


def _n_objects(raw):
    return sum(map(len, filter_detections(raw, "").values()))


def _n_asked(metadata):
    return sum(clause["count"] for clause in metadata.get("include", []))


def verdicts(examples: list[dict], found: list) -> dict:
    """Return numbers, Float[B] each, of B examples and what a detector found in their pictures.

    found: B pairs (raw detections, colours). "overall": the official verdict; "exact": exact_score;
    "objects": boxes over 0.3 in the picture; "objects_asked": those of the prompt."""
    rows = {"overall": [], "exact": [], "objects": [], "objects_asked": []}
    for example, (raw, colours) in zip(examples, found, strict=True):
        kept = filter_detections(raw, example["tag"])
        rows["overall"].append(score(kept, example, colours)[0])
        rows["exact"].append(exact_score(raw, example, colours))
        rows["objects"].append(_n_objects(raw))
        rows["objects_asked"].append(_n_asked(example))
    return {name: torch.tensor(values, dtype=torch.float) for name, values in rows.items()}


def summary(rows: list[dict]) -> str:
    """Return the official summary text of results rows (tag, correct, metadata)."""
    by_tag, by_prompt = {}, {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        by_prompt.setdefault(row["metadata"], []).append(bool(row["correct"]))
    images = np.mean([bool(row["correct"]) for row in rows])
    prompts = np.mean([any(correct) for correct in by_prompt.values()])
    overall = np.mean([np.mean(correct) for correct in by_tag.values()])
    tags = [f"{tag:<16} = {np.mean(correct):.2%} ({sum(correct)} / {len(correct)})"
            for tag, correct in by_tag.items()]
    return "\n".join([
        "Summary", "=======", f"Total images: {len(rows)}", f"Total prompts: {len(by_prompt)}",
        f"% correct images: {images:.2%}", f"% correct prompts: {prompts:.2%}", "",
        "Task breakdown", "==============", *tags, "",
        f"Overall score (avg. over tasks): {overall:.5f}", ""])


def scores(rows: list[dict], resamples: int = 2000) -> dict:
    """Return {"overall" and each tag: [share of correct pictures, low, high]} of results rows.

    A 95% interval by bootstrap over the prompts of each tag; overall is the mean over tags."""
    rng = np.random.default_rng(0)
    by_tag = {}
    for row in rows:
        by_prompt = by_tag.setdefault(row["tag"], {})
        by_prompt.setdefault(row["metadata"], []).append(bool(row["correct"]))
    shares, resampled = {}, {}
    for tag, by_prompt in by_tag.items():
        right = np.array([sum(correct) for correct in by_prompt.values()])
        total = np.array([len(correct) for correct in by_prompt.values()])
        picks = rng.integers(len(by_prompt), size=(resamples, len(by_prompt)))
        shares[tag] = right.sum() / total.sum()
        resampled[tag] = right[picks].sum(1) / total[picks].sum(1)                  # (resamples,)
    shares = {"overall": np.mean(list(shares.values())), **shares}
    resampled["overall"] = sum(again / len(by_tag) for again in resampled.values())
    return {tag: [round(float(x), 5) for x in (share, *np.percentile(resampled[tag], [2.5, 97.5]))]
            for tag, share in shares.items()}


# ----------------------------------------------------------------------------------- detection

def load_clip(name: str, device="cpu"):
    """Load open_clip's MODEL/PRETRAINED, or its local folder, such as shapes/clip: (model, its
    transform of PIL pictures, tokenizer).

    PRETRAINED may be a file. Raises InputError when open_clip cannot load it."""
    import open_clip
    architecture, _, pretrained = name.partition("/")
    folder = Path(__file__).parent / name if architecture == "shapes" else Path(name)
    if (folder / "open_clip_config.json").is_file():
        architecture, pretrained = f"local-dir:{folder}", None
    elif not pretrained:
        raise InputError(f"clip {name}: wanted MODEL/PRETRAINED, such as {COLOUR_CLIP}")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=pretrained, require_pretrained=True, device=device)
    except Exception as error:  # the hub client's errors have no common class
        raise InputError(f"clip {name}: open_clip cannot load it ({first_line(error)}); check the "
                         "name and the network, or give MODEL/PATH-TO-WEIGHTS or open_clip's "
                         "local folder") from None
    return freeze_for_scoring(model, device), transform, open_clip.get_tokenizer(architecture)


def freeze_for_scoring(model, device):
    """Return a CLIP model on device without gradients, in half precision on a GPU.

    logit_scale stays in float32: exp() would magnify its rounding."""
    scale = model.logit_scale.data.float()
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    model.eval().requires_grad_(False).to(device, dtype)
    model.logit_scale.data = scale.to(device)
    return model


def _resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def instances(class_logits, mask_logits, padded, resized, original, max_per_image=100,
              min_score=0.0):
    """Return labels Long[n], boxes Float[n, 5] and masks Bool[n, H, W], best class score first.

    class_logits Float[Q, C + 1] and mask_logits Float[Q, h, w]: Mask2Former's of one picture;
    padded, resized, original: (height, width) of the network's input, of the picture in its upper
    left corner, and of the picture itself. Boxes are x1, y1, x2, y2 in pixels of the original, and
    a score: class score times mask score. Class scores up to min_score are left out; no mask
    could lift them. Source: mmdet 2.28.2, MaskFormerFusionHead.instance_postprocess."""
    probs = class_logits.float().softmax(-1)[:, :-1]                                # (Q, C)
    class_scores, pair = probs.flatten().topk(min(max_per_image, probs.numel()))
    class_scores, pair = class_scores[class_scores > min_score], pair[class_scores > min_score]
    query, labels = pair // probs.shape[1], pair % probs.shape[1]
    if not len(pair):
        return labels, torch.zeros(0, 5), torch.zeros(0, *original, dtype=torch.bool)

    used, index = query.unique(return_inverse=True)  # a query may stand for several classes
    logits = _resize(mask_logits[used][None].float(), padded)[..., :resized[0], :resized[1]]
    logits = _resize(logits, original)[0]                                           # (used, H, W)
    masks = logits > 0
    mask_scores = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    edges = []
    for line in (masks.any(1), masks.any(2)):  # columns, rows: the first, the last + 1
        last = line.shape[1] - line.flip(1).int().argmax(1)
        edges.append([line.int().argmax(1), torch.where(line.any(1), last, 0)])
    (x1, x2), (y1, y2) = edges
    boxes = torch.stack([x1, y1, x2, y2, mask_scores], 1).float()[index]
    boxes[:, 4] *= class_scores
    return labels, boxes, masks[index]


class Detector(torch.nn.Module):
    """Mask2Former for the objects, zero-shot CLIP for their colours.

    Called with images uint8[B, 3, H, W] and B examples, it returns B pairs: detections in ascending
    score, and colours of the classes whose colour is asked for. batch: pictures at a time, about
    1 GB each at 800 x 800. Raises InputError when the weights are not a COCO detector's."""

    def __init__(self, name=DETECTOR, device="cpu", batch=8):
        from transformers import Mask2FormerForUniversalSegmentation
        super().__init__()
        self.batch, self.texts = batch, {}
        folder = fetch(name, ["config", "weights"])
        try:
            self.model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, output_loading_info=True)
        except (OSError, ImportError, RuntimeError, ValueError) as error:
            raise InputError(f"--detector {name}: cannot load it ({first_line(error)}); "
                             "give its hub id or a folder") from None
        parameters = dict(self.model.named_parameters())
        missing = sorted(set(info["missing_keys"]) & parameters.keys())
        n_classes = self.model.config.num_labels
        if missing or n_classes != len(CLASSES):
            raise InputError(
                f"--detector {name}: not a Mask2Former for the {len(CLASSES)} COCO classes "
                f"({n_classes} classes, {len(missing)} weights missing, e.g. {missing[:1]})")
        self.clip, self.transform, self.tokenizer = load_clip(COLOUR_CLIP, device)
        self.eval().requires_grad_(False).to(device)

    def forward(self, images, examples):
        """Return B pairs (detections, colours); see above."""
        found = []
        for i in range(0, len(examples), self.batch):
            found += self.detect_batch(images[i:i + self.batch], examples[i:i + self.batch])
        return found

    @torch.no_grad()
    def detect_batch(self, images, examples):
        """Do the work of forward() for as many pictures as fit into memory."""
        original = images.shape[-2:]
        pixels, padded, resized = self.preprocess(images)
        raw = self.model(pixel_values=pixels)
        found = []
        for i, image in enumerate(images):
            objects = instances(raw.class_queries_logits[i], raw.masks_queries_logits[i],
                                padded, resized, original, min_score=THRESHOLD)
            labels, boxes, masks = (x.cpu() for x in objects)
            detections, best_masks = {}, {}
            for k in boxes[:, 4].argsort(stable=True).tolist():
                name = CLASSES[labels[k]]
                detections.setdefault(name, []).append(boxes[k].tolist())
                best_masks.setdefault(name, []).insert(0, masks[k])
            kept = filter_detections(detections, examples[i]["tag"])
            asked = {clause["class"] for clause in examples[i]["include"] if "color" in clause}
            colours = {name: self.colours(image, name, kept[name], best_masks[name])
                       for name in asked & kept.keys()}
            found.append((detections, colours))
        return found

    def preprocess(self, images):
        """Return the network's input Float[B, 3, h, w], its size, and the size without padding.

        The short side to 800 pixels, the long one at most 1333; grey up to multiples of 32."""
        height, width = images.shape[-2:]
        scale = min(1333 / max(height, width), 800 / min(height, width))
        resized = [int(side * scale + 0.5) for side in (height, width)]
        padded = [math.ceil(side / 32) * 32 for side in resized]
        pixels = _resize(images.to(self.model.device).float(), resized).round()
        pixels = F.pad(pixels, (0, padded[1] - resized[1], 0, padded[0] - resized[0]), value=128)
        mean = pixels.new_tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        std = pixels.new_tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        return (pixels - mean) / std, padded, resized

    def colour_texts(self, name):
        """Return the mean direction of three sentences per colour, Float[10, E]."""
        if name not in self.texts:
            texts = [f"a photo of a {words}" for colour in COLOURS for words in
                     (f"{colour} {name}", f"{colour}-colored {name}", f"{colour} object")]
            features = self.clip.encode_text(self.tokenizer(texts).to(self.model.device)).float()
            features = F.normalize(features, dim=-1).view(len(COLOURS), 3, -1).mean(1)
            self.texts[name] = F.normalize(features, dim=-1)
        return self.texts[name].to(self.model.device)

    def colours(self, image, name, boxes, masks):
        """Return the colours of a class's boxes, by CLIP on their crops, grey outside the masks.

        The preprocessing is PIL's own: an argmax can hang on the last bit."""
        picture = image.permute(1, 2, 0).cpu().numpy()
        crops = []
        for box, mask in zip(boxes, masks, strict=False):  # masks of boxes that do not count follow
            masked = np.where(mask.numpy()[..., None], picture, np.uint8(153))
            crops.append(self.transform(Image.fromarray(masked).crop(box[:4])))
        weight = self.clip.token_embedding.weight
        features = self.clip.encode_image(torch.stack(crops).to(weight.device, weight.dtype))
        similarity = F.normalize(features.float(), dim=-1) @ self.colour_texts(name).T
        return [COLOURS[i] for i in similarity.argmax(1).tolist()]


def load_detector(name, device="cpu", batch=8):
    """Return the exact detector of shapes.py for the name "shapes", else a Detector."""
    return shapes.detect if name == "shapes" else Detector(name, device, batch)


# ------------------------------------------------------------------------ pictures and results

def read_batches(files, batch):
    """Yield files and their pictures, uint8[b, 3, H, W]: at most batch in a row, of one size.

    Raises InputError for a picture that cannot be read."""
    names, pictures = [], []
    for file in files:
        picture = common.read_picture(file)
        if picture is None:
            raise InputError(f"{file}: is not a readable picture; draw or copy it again")
        if pictures and (len(pictures) == batch or picture.shape != pictures[0].shape):
            yield names, torch.stack(pictures)
            names, pictures = [], []
        names.append(file)
        pictures.append(picture)
    if pictures:
        yield names, torch.stack(pictures)


def draw_folder(out, examples, n, draw, batch, rank=0, world=1) -> int:
    """Draw n pictures per example in the official layout, and return how many were drawn.

    Writes OUT/NNNNN/metadata.jsonl and samples/0000.png ...; whole pictures that are there stay.
    draw, batch: see common.draw_files; an example's seed is its number. Process rank of world draws
    every world-th example. Raises InputError when a folder holds another prompt."""
    mine = range(rank, len(examples), world)
    for i in mine:
        folder, text = out / f"{i:05d}", json.dumps(examples[i])
        metadata = folder / "metadata.jsonl"
        before = metadata.read_bytes() if metadata.exists() else b""
        if before not in (b"", text.encode()):
            raise InputError(f"--out {out}: {folder.name} belongs to another prompt; "
                             "choose a new folder")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if not before:
            metadata.write_text(text)
    files = {i: [out / f"{i:05d}/samples/{k:04d}.png" for k in range(n)] for i in mine}
    return common.draw_files(files, [example["prompt"] for example in examples], n, draw, batch)


def prompt_folders(out):
    """Return the folders of the official layout, OUT/NNNNN."""
    return sorted(f for f in out.glob("*") if f.is_dir() and f.name.isdigit())


def score_folder(out, detect, batch=8, rank=0, world=1) -> list[dict]:
    """Score the pictures of the official layout, and return the rows of results.jsonl.

    Columns as upstream: filename, tag, prompt, correct, reason, metadata, details.
    detect(uint8[B, 3, H, W], examples) returns [(detections, colours), ...]. Process rank of world
    takes every world-th prompt. Raises InputError for another layout, or a broken picture."""
    examples = {}  # of each picture
    for folder in prompt_folders(out)[rank::world]:
        example = read_json(folder / "metadata.jsonl")
        check_example(example, f"{folder}/metadata.jsonl:", detect is shapes.detect)
        files = sorted(f for f in (folder / "samples").glob("*.png") if f.stem.isdigit())
        if not files:
            raise InputError(f"{folder}/samples: holds no picture; draw it, or remove the folder")
        examples |= dict.fromkeys(files, example)

    rows = []
    for files, images in read_batches(examples, batch):
        found = detect(images, [examples[file] for file in files])
        for file, (raw, colours) in zip(files, found, strict=True):
            example = examples[file]
            kept = filter_detections(raw, example["tag"])
            correct, reason = score(kept, example, colours)
            rows.append({"filename": str(file), "tag": example["tag"], "prompt": example["prompt"],
                         "correct": correct, "reason": reason, "metadata": json.dumps(example),
                         "details": json.dumps(kept)})
    return rows


def report(out, rows, facts):
    """Write results.jsonl, failures.txt, summary.txt and summary.json, and print the summary.

    facts: what else belongs into summary.json, such as the detector's name."""
    failures = [f"{row['filename']}: {row['prompt']}: {'; '.join(row['reason'].splitlines())}\n"
                for row in rows if not row["correct"]]
    text, numbers = summary(rows), scores(rows)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "failures.txt").write_text("".join(failures))
    (out / "summary.txt").write_text(text)

    # almost any generator draws single objects that a sound detector finds
    seen = [row["details"] != "{}" for row in rows if row["tag"] == "single_object"]
    warning = {}
    if len(seen) >= 20 and np.mean(seen) < 0.25:
        warning["warning"] = (f"in only {np.mean(seen):.0%} of the single_object pictures the "
                              "detector is sure of any object; its weights look wrong (or the "
                              "pictures are)")
    shares = {tag: share for tag, (share, _, _) in numbers.items()}
    intervals = {tag: [low, high] for tag, (_, low, high) in numbers.items()}
    write_json(out / "summary.json",
               {**shares, "images": len(rows), **facts, **warning, "interval95": intervals})

    with_intervals = [f"{tag} {share:.3f} [{low:.3f}, {high:.3f}]"
                      for tag, (share, low, high) in numbers.items()]
    print(f"{text}\n95% intervals (bootstrap over prompts): {', '.join(with_intervals)}")
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    if warning:
        print(f"WARNING: {warning['warning']}", file=sys.stderr)


# -------------------------------------------------------------------------------- command line

def add_flags(add):
    """Add the flags of this script; add: a parser's add_argument."""
    add("--out", help="folder for pictures and results; whole pictures in it are kept")
    add("--score-only", metavar="DIR", help="score pictures that lie in the official layout")
    add("--images-only", action="store_true", help="draw, for another scorer")
    add("--write-prompts", metavar="FILE", help="write --n training prompts, none of the 553")
    add("--seed", type=common.in_range(int, 0, 2 ** 31), default=0, help="of --write-prompts")
    add("--prompts", help="jsonl with GenEval metadata (default: the 553 official prompts, or the "
        "63 held-out ones of shapes)")
    add("--n", "--images-per-prompt", dest="n", type=common.in_range(int, 1), default=4,
        help="pictures per prompt (under torchrun, give the long name), or training prompts")
    add("--detector", help=f"hub id or folder of a Mask2Former, or shapes (default: {DETECTOR}; "
        "shapes for --model shapes)")
    add("--detect-batch", type=common.in_range(int, 1), default=8, help="pictures at a time")
    common.add_model_flags(add)
    common.add_sampling_flags(add)


def main():
    p = common.Parser("Draw the evaluation prompts, detect, score: results.jsonl, summary.txt, "
                      "summary.json, failures.txt. Several processes by torchrun.")
    add_flags(p.add_argument)
    args = p.parse_args()

    if args.write_prompts:
        lines = [json.dumps(example) + "\n" for example in training_prompts(args.n, args.seed)]
        Path(args.write_prompts).write_text("".join(lines))
        return
    if bool(args.out) == bool(args.score_only) or (args.images_only and args.score_only):
        p.error("give --out DIR to draw (and score), or --score-only DIR")
    out = Path(args.out or args.score_only)
    if args.score_only and not prompt_folders(out):
        p.error(f"--score-only {out}: not a folder of the official layout (NNNNN/metadata.jsonl, "
                "NNNNN/samples/0000.png)")
    if args.prompts:
        examples = common.read_prompts(args.prompts)
    else:
        examples = shapes.prompts("eval") if is_shapes(args.model) else geneval_prompts()
    name = args.detector or ("shapes" if is_shapes(args.model) else DETECTOR)
    for number, example in enumerate(examples, 1):
        check_example(example, f"--prompts {args.prompts}: prompt {number}", name == "shapes")

    rank, world, device = common.setup(args.device)
    sampling, dtype = common.sampling_settings(args), common.choose_dtype(args.dtype, device)
    batch = sampling.pop("batch")  # the pictures do not depend on it
    if args.out:
        ckpt = str(Path(args.ckpt).absolute()) if args.ckpt else None
        common.prepare_out(out, {"model": args.model, "ckpt": ckpt, "vq": args.vq, **sampling,
                                 "dtype": str(dtype).removeprefix("torch."), "n": args.n}, rank)

    if not args.images_only:  # before the drawing, so that its faults show at once
        detector = load_detector(name, device, args.detect_batch)

    if args.out:
        showo, magvit = load_models(args.model, ckpt=args.ckpt, vq=args.vq,
                                    tokenizer=args.tokenizer, device=device, dtype=dtype)
        if rank == 0:
            print(describe(showo, magvit), flush=True)
        start = time.time()
        draw = functools.partial(generate, showo, magvit, batch=batch, **sampling)
        drawn = draw_folder(out, examples, args.n, draw, batch, rank, world)
        speed = drawn / (time.time() - start)
        print(f"process {rank}: drew {drawn} pictures, {speed:.2f} a second", flush=True)
        del showo, magvit, draw
        common.barrier()

    if not args.images_only:
        start = time.time()
        rows = score_folder(out, detector, args.detect_batch, rank, world)
        rows = sorted(common.all_lists(rows), key=lambda row: row["filename"])
        facts = {"detector": name, "colours": COLOUR_CLIP}
        if name == "shapes":
            facts = dict.fromkeys(facts, "shapes, exact")
        facts["judged_per_s"] = round(len(rows) / (time.time() - start), 2)
        if rank == 0:
            report(out, rows, facts)
    common.barrier()


if __name__ == "__main__":
    common.run(main)
