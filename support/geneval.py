"""GenEval (arXiv 2310.11513): its rules, and the detector whose objects they judge.

    example     a prompt with its metadata, {"tag": "counting", "include": [{"class": "cow",
                "count": 2}], "exclude": [{"class": "cow", "count": 3}], "prompt": "a photo of ..."}
    detections  {class: [[x1, y1, x2, y2, score], ...]}, in pixels
    colours     {class: [colour, ...]}, one per box that filter_detections keeps, in its order

Rules and texts follow djghosh13/geneval, evaluate_images.py and summary_scores.py.
Departures: the detector is transformers' Mask2Former with mmdet's post-processing. Its weights are
of another training run than mmdet's, so compare only numbers of one detector (summary.json names
it). strict_score and exact_score are not part of GenEval: they make its rules training rewards.
"""
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support.clip import load_clip, load_whole
from support.weights import library

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
RULES = ("exact", "strict", "partial", "official")      # as rewards, see verdicts()
COLOUR_CLIP = "ViT-L-14-quickgelu/openai"
THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, OVERLAP = 0.3, 0.9, 16, 0.1
RELATIONS = ["left of", "right of", "above", "below"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
CLASSES = Path(__file__).with_name("coco.txt").read_text().splitlines()     # as the detector's
_resize = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


def check_metadata(examples, classes=CLASSES, colours=COLOURS):
    """End the program with a line unless each example has metadata, of classes and colours that the
    detector knows; with an unknown one the reward would be 0 for ever."""
    for example in examples:
        for clause in [*(example.get("include") or [{}]), *(example.get("exclude") or [])]:
            if not ("tag" in example and clause.get("class") in classes and "count" in clause
                    and clause.get("color") in (None, *colours)
                    and clause.get("position", RELATIONS)[0] in RELATIONS):
                raise SystemExit(f"GenEval's rules need a tag and metadata of things that the "
                                 f"detector knows, not {clause} of {example.get('prompt')!r}")


def filter_detections(raw: dict, tag: str) -> dict:
    """Return the detections that count: score over 0.3 (0.9 for counting), 16 a class, best first,
    ties in reverse order of detection, as the original's sort."""
    threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    kept = {}
    for name, boxes in raw.items():
        best_first = sorted(boxes, key=lambda box: np.float32(box[4]))[::-1]
        confident = [box for box in best_first if np.float32(box[4]) > threshold]
        if confident:
            kept[name] = confident[:MAX_OBJECTS]
    return kept


def relative_position(a, b) -> set[str]:
    """Return where box a is, seen from box b: at most two of RELATIONS. The offset between the
    centres is first shortened by a tenth of both boxes' sizes; if nothing is left, none holds."""
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

    strict: a class needs exactly its number of boxes, exclude does not count; else the official
    rules, which look at the best boxes only."""
    faults, credits = [], []
    matched = []  # the boxes of each clause, None when it is not fulfilled
    for clause in metadata.get("include", []):
        name, wanted = clause["class"], clause["count"]
        boxes = detections.get(name, [])
        if not strict:
            boxes = boxes[:wanted]

        # the count, then the colours, then the place beside what an earlier clause has matched
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

    Correct needs exactly the wanted number of each class. The credit is the mean over counts,
    colours and positions; surplus boxes can make it very negative. Source: yifan123/reward-server,
    but a position counts once (as in Yovecent/UDM-GRPO)."""
    faults, credits = check_clauses(detections, metadata, colours, strict=True)
    return not faults, "\n".join(faults), sum(credits) / len(credits) if credits else 0.0


def exact_score(raw: dict, metadata: dict, colours: dict) -> bool:
    """Return whether strict_score accepts raw detections that hold nothing else over 0.3: the only
    verdict of the three that does not gain by more objects."""
    strict, _, _ = strict_score(filter_detections(raw, metadata["tag"]), metadata, colours)
    n_asked = sum(clause["count"] for clause in metadata.get("include", []))
    return strict and sum(map(len, filter_detections(raw, "").values())) == n_asked


def verdicts(examples: list[dict], found: list) -> dict:
    """Return numbers, Float[B] each, of B examples and what a detector found in their pictures.

    found: B pairs (raw detections, colours). "official": score(); "exact", "strict", "partial":
    exact_score and strict_score."""
    rows = []
    for example, (raw, colours) in zip(examples, found, strict=True):
        kept = filter_detections(raw, example["tag"])
        strict, _, partial = strict_score(kept, example, colours)
        rows.append({"official": score(kept, example, colours)[0], "strict": strict,
                     "partial": partial, "exact": exact_score(raw, example, colours)})
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in rows[0]}


def summary(rows: list[dict]) -> str:
    """Return the official summary text of results rows (tag, correct, metadata)."""
    by_tag, by_prompt = {}, {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        by_prompt.setdefault(row["metadata"], []).append(bool(row["correct"]))
    share_of_images = np.mean([bool(row["correct"]) for row in rows])
    share_of_prompts = np.mean([any(correct) for correct in by_prompt.values()])
    overall = np.mean([np.mean(correct) for correct in by_tag.values()])
    tags = [f"{tag:<16} = {np.mean(correct):.2%} ({sum(correct)} / {len(correct)})"
            for tag, correct in by_tag.items()]
    return "\n".join([
        "Summary", "=======", f"Total images: {len(rows)}", f"Total prompts: {len(by_prompt)}",
        f"% correct images: {share_of_images:.2%}",
        f"% correct prompts: {share_of_prompts:.2%}", "",
        "Task breakdown", "==============", *tags, "",
        f"Overall score (avg. over tasks): {overall:.5f}", ""])


def shares(rows, correction=0) -> dict:
    """Return {"overall" and each tag: (mean, standard error)} of rows (tag, prompt, value).

    The mean is over a tag's pictures, NaN left out; overall is the mean over tags. The error is of
    the spread over the prompts of each tag: pictures of one prompt are not independent. correction:
    1 = the sample's standard deviation."""
    by_tag, found = {}, {}
    for tag, prompt, value in rows:
        by_tag.setdefault(tag, {}).setdefault(prompt, []).append(float(value))
    for tag, by_prompt in by_tag.items():
        values = torch.tensor(sum(by_prompt.values(), [])).double()
        means = torch.tensor([np.nanmean(v) if np.isfinite(v).any() else math.nan
                              for v in by_prompt.values()]).double()
        means = means[means.isfinite()]
        error = (means - means.mean()).square().sum() / max(len(means) - correction, 1)
        error = (error / max(len(means), 1)).sqrt().item()
        found[tag] = values.nanmean().item(), error
    mean, error = torch.tensor(list(found.values())).double().T
    overall = mean.nanmean().item(), error.square().sum().sqrt().item() / len(error)
    return {"overall": overall, **found}


def instances(class_logits, mask_logits, padded, resized, original, max_per_image=100,
              min_score=0.0):
    """Return labels Long[n], boxes Float[n, 5] and masks Bool[n, H, W], best class score first.

    class_logits Float[Q, C + 1] and mask_logits Float[Q, h, w]: Mask2Former's of one picture;
    padded, resized, original: (height, width) of the network's input, of the picture in its upper
    left corner, and of the picture itself. Boxes are x1, y1, x2, y2 in pixels of the original, and
    a score: class score times mask score. Queries with a class score up to min_score are dropped
    early: their final score is at most that.
    Source: mmdet 2.28.2, MaskFormerFusionHead.instance_postprocess."""
    # the best pairs of query and class
    probs = class_logits.float().softmax(-1)[:, :-1]                                # (Q, C)
    class_scores, pair = probs.flatten().topk(min(max_per_image, probs.numel()))
    class_scores, pair = class_scores[class_scores > min_score], pair[class_scores > min_score]
    query, labels = pair // probs.shape[1], pair % probs.shape[1]
    if not len(pair):
        return labels, torch.zeros(0, 5), torch.zeros(0, *original, dtype=torch.bool)

    # their masks; a query may be several classes
    used, index = query.unique(return_inverse=True)
    logits = _resize(mask_logits[used][None].float(), padded)[..., :resized[0], :resized[1]]
    logits = _resize(logits, original)[0]                                           # (used, H, W)
    masks = logits > 0
    mask_scores = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)

    # the boxes around the masks
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
    score, and colours of the classes whose colour is asked for. batch: pictures, of 1 GB each."""
    SHORT_SIDE, LONG_SIDE = 800, 1333   # pixels

    def __init__(self, name=DETECTOR, device="cpu", batch=8):
        super().__init__()
        self.batch, self.texts = batch, {}
        kind = library("transformers").Mask2FormerForUniversalSegmentation
        self.model = load_whole(kind, name)
        if self.model.config.num_labels != len(CLASSES):
            raise SystemExit(f"{name}: has {self.model.config.num_labels} classes, not COCO's 80")
        self.clip, self.transform, self.tokenizer = load_clip(COLOUR_CLIP, device)
        self.eval().requires_grad_(False).to(device)

    def forward(self, images, examples):
        found = []
        for i in range(0, len(examples), self.batch):
            found += self.detect_batch(images[i:i + self.batch], examples[i:i + self.batch])
        return found

    @torch.no_grad()
    def detect_batch(self, images, examples):
        """Find the objects of a batch of pictures -> a pair for each, see the class."""
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
        """Return the network's input Float[B, 3, h, w], its size, and the size without padding:
        the short side is SHORT_SIDE, the long one at most LONG_SIDE; grey up to multiples of 32."""
        height, width = images.shape[-2:]
        scale = min(self.LONG_SIDE / max(height, width), self.SHORT_SIDE / min(height, width))
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
        PIL resizes them, like the original: other resizers change close calls."""
        picture = image.permute(1, 2, 0).cpu().numpy()
        crops = []
        for box, mask in zip(boxes, masks, strict=False):  # masks of boxes that do not count follow
            masked = np.where(mask.numpy()[..., None], picture, np.uint8(153))
            crops.append(self.transform(Image.fromarray(masked).crop(box[:4])))
        weight = self.clip.token_embedding.weight
        features = self.clip.encode_image(torch.stack(crops).to(weight.device, weight.dtype))
        similarity = F.normalize(features.float(), dim=-1) @ self.colour_texts(name).T
        return [COLOURS[i] for i in similarity.argmax(1).tolist()]
load_detector = functools.cache(Detector)       # one for all rewards
