"""What a picture is worth: the rewards of the papers, in one process, and weighted sums of them.

    reward = make_reward("clip", device="cuda")                     # or "clip:1.0,hpsv2:0.5"
    values = reward(images, prompts)                                # uint8 [B, 3, H, W], list[str] -> Float[B]
    reward.log                                                      # every part on its own, Float[B] each

    python reward.py --reward clip,hpsv2,imagereward --images DIR --prompts FILE        # score pictures that are there

A part of the sum is NAME[:ARGUMENT][:WEIGHT]:
    clip[:MODEL/PRETRAINED]        logits_per_image of open_clip (the paper's reward: ViT-H-14/laion2b_s32b_b79k)
    hpsv2[:v2.0|v2.1|FILE]         HPSv2's cosine, without a factor 100 (tgxs002/HPSv2 hpsv2/img_score.py)
    pickscore[:ID]                 PickScore / 26 (yifan123/flow_grpo pickscore_scorer.py)
    imagereward[:ID|FILE]          ImageReward-v1.0 (THUDM/ImageReward), in transformers' Blip
    geneval:exact|strict|partial   GenEval's rules on detected objects (default exact)
    http:URL                       a server's scores, for judges that live elsewhere; see HttpReward

GenEval's own rule asks for "at least": under it, and under strict, drawing more and more objects pays. exact also demands
that nothing else is in the picture.

Departures: pictures are resized on the device and not by PIL, to the same 8-bit values but for rare last bits (on the
pictures in tests/data: none). GenEval's colour classifier, whose argmax can hang on one, keeps PIL (eval_geneval.py).
"""
import base64
import io
import http.client
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from model import InputError, fetch, first_line, load_strict, read_weights

CLIP_DEFAULT, PICKSCORE_DEFAULT, HPS_ARCHITECTURE = "ViT-H-14/laion2b_s32b_b79k", "yuvalkirstain/PickScore_v1", "ViT-H-14"
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
USAGE = ("clip[:MODEL/PRETRAINED], hpsv2[:v2.0|v2.1|FILE], pickscore[:ID], imagereward[:ID|FILE], geneval[:exact|strict|partial] "
         "or http:URL, each with an optional :WEIGHT, joined by commas")


class Reward:
    """A weighted sum of parts [(name, weight, function)], function(images, prompts, metadata) -> (Float[B], {log name: Float[B]}).

    A function may have a .model; with keep=False it stays on the CPU but for the moments when it scores. finite: demand scores
    that are; train.py does not, it skips such a step."""

    def __init__(self, parts, device="cpu", keep=True, finite=True):
        self.parts, self.device, self.keep, self.finite, self.log = parts, device, keep, finite, {}

    @torch.no_grad()
    def __call__(self, images, prompts, metadata=None):
        """images uint8[B, 3, H, W], prompts of B texts, metadata None or B GenEval lines -> Float[B] on the CPU.

        Raises ValueError when the lengths differ, InputError when a score is missing, or not finite."""
        if len(images) != len(prompts) or (metadata is not None and len(metadata) != len(prompts)):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {metadata and len(metadata)} metadata: not as many")
        self.log, total = {}, torch.zeros(len(images))
        for name, weight, function in self.parts:
            model = getattr(function, "model", None)
            if model is not None and not self.keep:
                model.to(self.device)
            values, extra = function(images, prompts, metadata)
            if model is not None and not self.keep:
                model.to("cpu")
            values = values.float().cpu()
            for i in (~values.isfinite()).nonzero()[:1, 0].tolist() if self.finite else ():
                raise InputError(f"--reward {name}: the score of a picture of {prompts[i]!r} is {values[i].item()}")
            self.log |= {name: values, **extra}
            total += weight * values
        return total


def make_reward(spec: str, *, device="cpu", detector=None, keep=True, finite=True) -> Reward:
    """spec: parts joined by commas, see the top of this file. detector: (images, lines) -> [(detections, colours), ...] for
    geneval; None = eval_geneval.Detector. keep: False = models wait on the CPU. finite: see Reward. Half precision on a GPU.
    Raises InputError for an unknown part, argument or weight, and for weights that cannot be loaded."""
    parts = []
    for part in spec.split(","):
        name, weight, argument = _parse(part.strip())
        if name == "clip":
            function = ClipReward(argument or CLIP_DEFAULT, device)
        elif name == "hpsv2":
            function = HpsReward(argument or "v2.0", device)
        elif name == "pickscore":
            function = PickScore(argument or PICKSCORE_DEFAULT, device)
        elif name == "imagereward":
            function = load_imagereward(argument or "THUDM/ImageReward", device)
        elif name == "geneval":
            function = geneval_reward(argument or "exact", detector, device)
        elif name == "http":
            function = HttpReward(argument)
        else:
            raise InputError(f"--reward {spec}: {name!r} is not known; use {USAGE}")
        if not keep and hasattr(function, "model"):
            function.model.to("cpu")
        parts.append((f"{name}:{argument}" if argument else name, weight, function))
    return Reward(parts, device, keep, finite)


def _parse(part):
    """NAME[:ARGUMENT][:WEIGHT] -> name, weight, argument. A number right after a host is its port, after a path a weight."""
    if part.startswith("http"):
        match = re.fullmatch(r"http:(https?://[^/]+(?:/[^:]*)?)(?::([-+.\deE]+))?", part)
        if not match:
            raise InputError(f"--reward {part}: wanted http:URL, such as http:http://127.0.0.1:8000/score")
        try:
            urllib.parse.urlsplit(match[1]).port
            return "http", float(match[2] or 1), match[1]
        except ValueError:
            raise InputError(f"--reward {part}: the port or the weight is no number") from None
    name, *rest = part.split(":")
    try:
        weight = float(rest.pop()) if rest and not (name == "hpsv2" and len(rest) == 1 and rest[0] in ("2.0", "2.1")) else 1.0
    except ValueError:
        weight, rest = 1.0, part.split(":")[1:]
    if not math.isfinite(weight):
        raise InputError(f"--reward {part}: the weight must be a finite number")
    return name, weight, ":".join(rest)


# ---------------------------------------------------------------------------------------------- CLIP's family

def prepare(images, size=224, fit="crop"):
    """uint8[B, 3, H, W] -> Float[B, 3, size, size] with CLIP's mean and std, on the same device.

    fit "crop": short side to size, centre crop, rounded to 8 bits as PIL does (open_clip, PickScore, ImageReward); "pad": long
    side to size, black borders, not rounded (HPSv2). Bicubic with antialiasing."""
    x, (h, w) = images.float(), images.shape[-2:]
    resize = lambda x, *size: F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)  # noqa: E731
    if fit == "crop":
        new = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
        for step in ((h, new[1]), new):  # as PIL: columns, then rows, 8 bits after each
            x = resize(x, *step).add(0.5).floor().clamp(0, 255)
        top, left = (round((side - size) / 2) for side in new)
        x = x[..., top:top + size, left:left + size] / 255
    else:
        new = tuple(round(side * (size / max(h, w))) for side in (h, w))
        x = resize(x / 255, *new)
        top, left = ((size - side) // 2 for side in new)
        x = F.pad(x, (left, size - new[1] - left, top, size - new[0] - top))
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    return (x - mean) / std


def load_clip(name, device="cpu"):
    """open_clip's MODEL/PRETRAINED (PRETRAINED may be a file) -> (model, its transform of PIL pictures, tokenizer), without
    gradients, in half precision on a GPU. Raises InputError when open_clip cannot load it."""
    import open_clip
    architecture, _, pretrained = name.partition("/")
    if not pretrained:
        raise InputError(f"clip {name}: wanted MODEL/PRETRAINED, such as {CLIP_DEFAULT}")
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=pretrained, device=device)
    except Exception as error:  # unknown names are RuntimeErrors, the hub client has errors of its own
        raise InputError(f"clip {name}: open_clip cannot load it ({first_line(error)}); check the name and the network, or give "
                         "MODEL/PATH-TO-WEIGHTS") from None
    return _ready(model, device), transform, open_clip.get_tokenizer(architecture)


def _ready(model, device):
    """For scoring: no gradients, half precision on a GPU but for the scale, which exp() would quantise."""
    scale = model.logit_scale.data.float()
    model.eval().requires_grad_(False).to(device, torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    model.logit_scale.data = scale.to(device)
    return model


def clip_cosine(model, pixels, tokens):
    """Cosine of picture i and text i under an open_clip model -> Float32[B]."""
    image = F.normalize(model.encode_image(pixels).float(), dim=-1)
    text = F.normalize(model.encode_text(tokens).float(), dim=-1)
    return (image * text).sum(-1)


def clip_logits(model, pixels, tokens):
    """logits_per_image[i, i] of an open_clip model -> Float32[B]: exp(logit_scale) * cosine of picture i and text i."""
    return model.logit_scale.exp().float() * clip_cosine(model, pixels, tokens)


class ClipReward:
    """A part of a Reward: logits_per_image of open_clip's MODEL/PRETRAINED."""
    fit, score = "crop", staticmethod(clip_logits)

    def __init__(self, name, device):
        self.model, _, self.tokenizer = load_clip(name, device)

    def __call__(self, images, prompts, metadata):
        weight = self.model.token_embedding.weight
        size = self.model.visual.image_size
        size = size if isinstance(size, int) else size[0]
        values = [self.score(self.model, prepare(some.to(weight.device), size, self.fit).to(weight.dtype), self.tokenizer(texts).to(weight.device))
                  for some, texts in _chunks(images, prompts)]
        return torch.cat(values), {}


class HpsReward(ClipReward):
    """A part of a Reward: HPSv2. Its file holds all of ViT-H-14, so laion's weights are not needed."""
    fit, score = "pad", staticmethod(clip_cosine)

    def __init__(self, version, device):
        import open_clip
        path = version
        if version in HPS_FILES:
            path = fetch("xswu/HPSv2", [HPS_FILES[version]]) / HPS_FILES[version]
        elif not Path(version).is_file():
            raise InputError(f"--reward hpsv2:{version}: wanted v2.0, v2.1 or a file")
        self.model, self.tokenizer = open_clip.create_model(HPS_ARCHITECTURE), open_clip.get_tokenizer(HPS_ARCHITECTURE)
        load_strict(self.model, read_weights(path), path)
        _ready(self.model, device)


class PickScore:
    """A part of a Reward: exp(logit_scale) * cosine / 26 of transformers' CLIPModel, near 0..1 by the division."""

    def __init__(self, name, device):
        import open_clip
        from transformers import CLIPModel
        folder = fetch(name, ["config", "weights"])
        try:
            model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
            if lacking := set(info["missing_keys"]) & dict(model.named_parameters()).keys():
                raise ValueError(f"{len(lacking)} weights missing, e.g. {min(lacking)}")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"--reward pickscore:{name}: cannot load it ({first_line(error)})") from None
        self.model = _ready(model, device)
        self.tokenizer = open_clip.get_tokenizer(HPS_ARCHITECTURE)

    def __call__(self, images, prompts, metadata):
        weight, size = self.model.visual_projection.weight, self.model.config.vision_config.image_size
        return torch.cat([pickscore(self.model, prepare(some.to(weight.device), size).to(weight.dtype), self.tokenizer(texts).to(weight.device))
                          for some, texts in _chunks(images, prompts)]), {}


def pickscore(model, pixels, tokens):
    """exp(logit_scale) * cosine of picture i and text i / 26 under transformers' CLIPModel -> Float32[B]."""
    out = model(input_ids=tokens, pixel_values=pixels)
    cosine = (F.normalize(out.image_embeds.float(), dim=-1) * F.normalize(out.text_embeds.float(), dim=-1)).sum(-1)
    return model.logit_scale.exp().float() * cosine / 26


def _chunks(images, prompts, size=64):
    return ((images[i:i + size], prompts[i:i + size]) for i in range(0, len(prompts), size))


# ------------------------------------------------------------------------------------------------ ImageReward

class ImageReward(nn.Module):
    """A part of a Reward: ImageReward-v1.0 (arXiv 2304.05977), BLIP's picture and text encoders and an affine head. vision,
    text: sizes over those of the release (the defaults of the config classes are wrong for it: eps, heads, decoder)."""
    VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16,
                  layer_norm_eps=1e-6)
    TEXT = dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=512, layer_norm_eps=1e-12, is_decoder=True)
    MEAN, STD, MAX_LENGTH = 0.16717362830052426, 1.0333394966054072, 35

    def __init__(self, tokenizer=None, vision=None, text=None):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        super().__init__()
        self.tokenizer, vision, text = tokenizer, {**self.VISION, **(vision or {})}, {**self.TEXT, **(text or {})}
        self.size, widths = vision["image_size"], (text["hidden_size"], 1024, 128, 64, 16, 1)
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.Identity())]  # its dropouts
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*layers[:7], layers[8])})

    @property
    def model(self):
        return self

    def forward(self, images, prompts, metadata=None):
        """uint8[B, 3, H, W], B texts -> (Float32[B], {})."""
        device, out = self.mlp["layers"][0].weight.device, []
        for some, texts in _chunks(images, prompts):
            tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.MAX_LENGTH, return_tensors="pt").to(device)
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                seen = self.vision(prepare(some.to(device), self.size)).last_hidden_state
                read = self.text(tokens["input_ids"], tokens["attention_mask"], encoder_hidden_states=seen).last_hidden_state
            out.append((self.mlp["layers"](read[:, 0].float())[:, 0] - self.MEAN) / self.STD)
        return torch.cat(out), {}

    @staticmethod
    def from_official(state) -> dict:
        """The names of the official state_dict -> ours; what does not enter the score is left out."""
        renames = (("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"), ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
                   ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."), ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
                   ("blip.visual_encoder.norm.", "vision.post_layernorm."), ("blip.text_encoder.", "text."))
        inner = ((".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."))
        out = {}
        for name, weight in state.items():
            if name.startswith(("blip.vision_proj.", "blip.text_proj.")) or name == "blip.text_encoder.embeddings.position_ids":
                continue
            for old, new in renames:
                name = name.replace(old, new)
            for old, new in inner if name.startswith("vision.encoder.") else ():
                name = name.replace(old, new)
            out[name] = weight
        return out


def load_imagereward(name, device="cpu") -> ImageReward:
    """A hub id with ImageReward.pt, or that file -> ImageReward, without gradients. Raises InputError."""
    path = fetch(name, ["ImageReward.pt"])
    path = path / "ImageReward.pt" if path.is_dir() else path
    from transformers import BertTokenizer
    try:
        tokenizer = BertTokenizer.from_pretrained(fetch("google-bert/bert-base-uncased", ["tokenizer"]))
    except OSError as error:
        raise InputError(f"--reward imagereward: the tokenizer google-bert/bert-base-uncased cannot be read ({first_line(error)})") from None
    model = ImageReward(tokenizer).eval().requires_grad_(False)
    load_strict(model, model.from_official(read_weights(path)), path)
    return model.to(device)


# ------------------------------------------------------------------------------------------------ GenEval, servers

def geneval_reward(rule, detector, device):
    """GenEval's rules as a reward: exact and strict are 0 or 1, partial is a mean of terms; logs objects per picture.

    -> a part of a Reward. Raises InputError for an unknown rule, or for prompts without metadata."""
    from eval_geneval import Detector, filter_detections, is_geneval, strict_score, verdicts  # late: it imports this file
    if rule not in ("exact", "strict", "partial"):
        raise InputError(f"--reward geneval:{rule}: the rule must be exact, strict or partial")
    detector = detector or Detector(device=device)

    def score(images, prompts, metadata):
        """See Reward; raises InputError for prompts without metadata."""
        if metadata is None or not all(map(is_geneval, metadata)):
            raise InputError("--reward geneval: every prompt needs GenEval metadata (tag, include) in the prompt file")
        found = detector(images, metadata)
        log = verdicts(metadata, found)
        values = log["exact"] if rule == "exact" else torch.tensor(
            [strict_score(filter_detections(raw, line["tag"]), line, colours)[0 if rule == "strict" else 2]
             for (raw, colours), line in zip(found, metadata)], dtype=torch.float)
        return values, {name: log[name] for name in ("objects", "objects_asked")}
    if isinstance(detector, torch.nn.Module):
        score.model = detector
    return score


class HttpReward:
    """A part of a Reward: POST {"images": [base64 PNG, ...], "prompts": [...], "metadata": [...] or null} as JSON to url, which
    answers {"scores": [number, ...]}, one per picture.

    Connection errors, time-outs and 5xx answers are tried again; raises InputError when that does not help, or for an answer
    of another form. A score of null counts as missing."""

    def __init__(self, url, timeout=120.0, tries=3, wait=2.0):
        self.url, self.timeout, self.tries, self.wait = url, timeout, tries, wait

    def __call__(self, images, prompts, metadata):
        values = []
        for i in range(0, len(prompts), 32):
            body = {"images": [_png(image) for image in images[i:i + 32]], "prompts": list(prompts[i:i + 32]),
                    "metadata": None if metadata is None else list(metadata[i:i + 32])}
            values += self.ask(json.dumps(body).encode(), len(body["prompts"]))
        return torch.tensor(values), {}

    def ask(self, body, n) -> list[float]:
        """One request of n pictures -> n scores, nan where one is null."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(1, self.tries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    scores = json.loads(answer.read())["scores"]
                if len(scores) != n:
                    raise InputError(f"--reward http:{self.url}: {len(scores)} scores for {n} pictures")
                return [float("nan") if score is None else float(score) for score in scores]
            except (ValueError, KeyError, TypeError) as error:
                raise error if isinstance(error, InputError) else InputError(
                    f'--reward http:{self.url}: its answer is not {{"scores": [number, ...]}} ({first_line(error)})') from None
            except (OSError, http.client.HTTPException) as error:  # time-outs, refused connections, half answers
                if attempt == self.tries or getattr(error, "code", 500) < 500:
                    raise InputError(f"--reward http:{self.url}: no scores after {attempt} tries ({first_line(error)}); is the server "
                                     f"up, and fast enough for {self.timeout:.0f} s?") from None
                time.sleep(self.wait * attempt)


def _png(image):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------ command line

def main():
    from eval_geneval import read_picture
    from sample import Parser, in_range, read_prompts, setup
    p = Parser("Score pictures: the mean of every part of a reward, and its standard error over prompts.")
    p.add_argument("--reward", required=True, help=USAGE)
    p.add_argument("--images", required=True, help="a folder of PNGs in the order of their names and numbers, the same number for every prompt; subfolders count")
    p.add_argument("--prompts", required=True, help="txt, or jsonl with prompt, optional reward_prompt and metadata")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--batch", type=in_range(int, 1), default=64, help="pictures read at a time")
    args = p.parse_args()
    number = lambda f: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(f))]  # noqa: E731  (2 before 10)
    lines, files = read_prompts(args.prompts), sorted((f for f in Path(args.images).rglob("*.png") if f.name != "grid.png"), key=number)
    n = len(files) // len(lines)
    if not n or n * len(lines) != len(files):
        p.error(f"--images {args.images}: {len(files)} PNGs for {len(lines)} prompts; wanted the same number for every prompt")
    reward, values = make_reward(args.reward, device=setup(args.device)[2]), {}
    for i in range(0, len(files), args.batch):
        by_size = {}
        for k in range(i, min(i + args.batch, len(files))):
            picture = read_picture(files[k])
            if picture is None:
                raise InputError(f"{files[k]}: is not a readable picture")
            by_size.setdefault(picture.shape, []).append((k, picture))
        for same in by_size.values():
            asked = [lines[k // n] for k, _ in same]
            total = reward(torch.stack([picture for _, picture in same]), [line.get("reward_prompt", line["prompt"]) for line in asked], asked)
            for name, part in {**reward.log, "sum": total}.items():
                values.setdefault(name, torch.zeros(len(files)))[[k for k, _ in same]] = part
    print(f"{len(files)} pictures of {len(lines)} prompts")
    for name, part in values.items():
        over = part.view(len(lines), n).mean(1)
        error = f" +- {over.std().item() / len(lines) ** 0.5:.4f}" if len(lines) > 1 else ""
        print(f"{name:<24} {over.mean().item():.4f}{error}")


if __name__ == "__main__":
    from sample import run
    run(main)
