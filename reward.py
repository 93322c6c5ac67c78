"""What a picture is worth: the rewards of the papers, in one process, and weighted sums of them.

    reward = make_reward("clip", device="cuda")         # or "clip:1.0,hpsv2:0.5"
    values = reward(images, prompts)                    # uint8[B, 3, H, W], list[str] -> Float[B]
    reward.log                                          # each part on its own, Float[B]

    python reward.py --reward clip,hpsv2,imagereward --images DIR --prompts FILE

A part of the sum is NAME[:ARGUMENT][:WEIGHT]:
    clip[:ID|MODEL/PRETRAINED]      logits_per_image of open_clip (default: the paper's reward);
                                    shapes/clip is a tiny one for --model shapes
    hpsv2[:v2.0|v2.1|FILE]          HPSv2's cosine, not times 100 (tgxs002/HPSv2 img_score.py)
    pickscore[:ID]                  PickScore / 26 (yifan123/flow_grpo pickscore_scorer.py)
    imagereward[:ID|FILE]           ImageReward-v1.0 (THUDM/ImageReward)
    geneval[:exact|strict|partial]  GenEval's rules on detected objects (eval_geneval.py)
    http:URL                        a server's scores, for judges that live elsewhere: HttpReward
    vlm:URL:MODEL                   a chat server's verdict, 1 to 5: VlmReward

GenEval's own rule asks for "at least": under it, and under strict, drawing more and more objects
pays. exact also demands that nothing else is in the picture.

Departures:
- pictures are resized on the device and not by PIL, to the same 8-bit values but for rare last
  bits (none in the pictures of tests/data);
- ImageReward runs in transformers' Blip, with the official weights under other names.
"""
import base64
import contextlib
import http.client
import io
import json
import math
import re
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import eval_geneval
from checkpoint import InputError, fetch, first_line, load_strict, parse_json, read_weights
from eval_geneval import DETECTOR, freeze_for_scoring, load_clip, load_detector, read_batches

CLIP_DEFAULT = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS_ARCHITECTURE = "ViT-H-14"
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
PICKSCORE_DEFAULT = "yuvalkirstain/PickScore_v1"
IMAGEREWARD_DEFAULT = "THUDM/ImageReward"
USAGE = ("clip[:ID|MODEL/PRETRAINED], hpsv2[:v2.0|v2.1|FILE], pickscore[:ID], "
         "imagereward[:ID|FILE], geneval[:exact|strict|partial], http:URL or vlm:URL:MODEL, each "
         "with an optional :WEIGHT, joined by commas")


class Reward:
    """A weighted sum of parts [(name, weight, function)].

    function(images, prompts, metadata) returns (Float[B], {log name: Float[B]}). finite: raise
    InputError for a score that is not (train.py does not want that, it skips such a step)."""

    def __init__(self, parts, finite=True):
        self.parts, self.finite, self.log = parts, finite, {}
        # GenEval's, for whoever else needs one
        self.detector = next((f.detector for _, _, f in parts if hasattr(f, "detector")), None)

    @torch.no_grad()
    def __call__(self, images, prompts, metadata=None):
        """Return the sum, Float[B] on the CPU, and note each part in self.log.

        images uint8[B, 3, H, W]; prompts: B texts; metadata: None or B examples of GenEval. Raises
        ValueError when the lengths differ, InputError as above."""
        if len(images) != len(prompts) or (metadata is not None and len(metadata) != len(prompts)):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, "
                             f"{metadata and len(metadata)} metadata: not as many")
        self.log, total = {}, torch.zeros(len(images))
        for name, weight, function in self.parts:
            values, extra = function(images, prompts, metadata)
            values = values.float().cpu()
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            if bad and self.finite:
                raise InputError(f"--reward {name}: the score of a picture of "
                                 f"{prompts[bad[0]]!r} is {values[bad[0]].item()}")
            self.log |= {name: values, **extra}
            total += weight * values
        return total


def make_reward(spec: str, *, device="cpu", detector=None, finite=True, **server) -> Reward:
    """Load the parts of a sum, NAME[:ARGUMENT][:WEIGHT] joined by commas (see the top).

    detector, for geneval: a function (images, examples) -> [(detections, colours), ...], or a name
    for eval_geneval.load_detector. finite: see Reward. server: timeout and patience of HttpReward.
    Raises InputError for an unknown part, argument or weight, and weights that cannot be loaded."""
    parts = []
    for part in spec.split(","):
        name, argument, weight = parse_part(part.strip())
        if not math.isfinite(weight):
            raise InputError(f"--reward {common.without_passwords(part)}: the weight must be a "
                             "finite number")
        if name == "clip":
            function = ClipReward(argument or CLIP_DEFAULT, device)
        elif name == "hpsv2":
            function = HpsReward(argument or "v2.0", device)
        elif name == "pickscore":
            function = PickScore(argument or PICKSCORE_DEFAULT, device)
        elif name == "imagereward":
            function = load_imagereward(argument or IMAGEREWARD_DEFAULT, device)
        elif name == "geneval":
            function = GenevalReward(argument or "exact", detector or DETECTOR, device)
            detector = function.detector        # one for all parts
        elif name == "http":
            function = HttpReward(argument, **server)
            argument = function.url     # without its password
        elif name == "vlm":
            function = VlmReward(*argument, **server)
            argument = function.model
        else:
            raise InputError(f"--reward {common.without_passwords(spec)}: {name!r} is not known; "
                             f"use {USAGE}")
        parts.append((f"{name}:{argument}" if argument else name, weight, function))
    return Reward(parts, finite)


def uses_geneval(spec: str) -> bool:
    """Return whether GenEval's rules are a part of a sum, so that prompts need metadata."""
    return any(part.strip().split(":")[0] == "geneval" for part in spec.split(","))


def parse_part(part):
    """Split NAME[:ARGUMENT][:WEIGHT] into name, argument and weight. Raises InputError."""
    if part.startswith("http"):
        return "http", *_parse_url(part)
    if part.startswith("vlm"):
        number = r"[-+]?[\d.]+(?:[eE][-+]?\d+)?"
        match = re.fullmatch(rf"vlm:(https?://[^/]+/[^:]*):([^:]+)(?::({number}))?", part)
        if not match:
            raise InputError(f"--reward {common.without_passwords(part)}: wanted vlm:URL:MODEL, "
                             "such as vlm:http://127.0.0.1:8000/v1:unifiedreward")
        return "vlm", (match[1], match[2]), float(match[3] or 1)
    name, *rest = part.split(":")
    weight = 1.0
    if rest and part not in ("hpsv2:2.0", "hpsv2:2.1"):  # there, a version without its v
        try:
            weight = float(rest[-1])
            rest.pop()
        except ValueError:
            pass  # the last one belongs to the argument
    return name, ":".join(rest), weight


def _parse_url(part):
    """Split http:URL[:WEIGHT]; a number right after a host is its port, after a path a weight."""
    match = re.fullmatch(r"http:(https?://[^/]+(?:/[^:]*)?)(?::([-+.\deE]+))?", part)
    if not match:
        raise InputError(f"--reward {common.without_passwords(part)}: wanted http:URL, such as "
                         "http:http://127.0.0.1:8000/score")
    try:
        _, weight = urllib.parse.urlsplit(match[1]).port, float(match[2] or 1)
    except ValueError:
        raise InputError(f"--reward {common.without_passwords(part)}: the port or the weight is no "
                         "number") from None
    return match[1], weight


# ------------------------------------------------------------------------------- CLIP's family

def prepare(images, size=224, fit="crop"):
    """Return uint8[B, 3, H, W] as CLIP's input, Float[B, 3, size, size], on the same device.

    fit "crop": short side to size, centre crop, rounded to 8 bits as PIL does (open_clip,
    PickScore, ImageReward); "pad": long side to size, black borders, not rounded (HPSv2)."""
    x, (h, w) = images.float(), images.shape[-2:]
    if fit == "crop":
        height, width = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
        for step in ((h, width), (height, width)):  # as PIL: columns, then rows, 8 bits after each
            x = _bicubic(x, step).add(0.5).floor().clamp(0, 255)
        top, left = round((height - size) / 2), round((width - size) / 2)
        x = x[..., top:top + size, left:left + size] / 255
    else:
        height, width = (round(side * (size / max(h, w))) for side in (h, w))
        x = _bicubic(x / 255, (height, width))
        top, left = (size - height) // 2, (size - width) // 2
        x = F.pad(x, (left, size - width - left, top, size - height - top))
    mean = x.new_tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = x.new_tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (x - mean) / std


def _bicubic(x, size):
    return F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)


def clip_cosine(model, pixels, tokens):
    """Return the cosine of picture i and text i under an open_clip model, Float32[B]."""
    image = F.normalize(model.encode_image(pixels).float(), dim=-1)
    text = F.normalize(model.encode_text(tokens).float(), dim=-1)
    return (image * text).sum(-1)


def clip_logits(model, pixels, tokens):
    """Return exp(logit_scale) * cosine under an open_clip model, Float32[B]."""
    return model.logit_scale.exp().float() * clip_cosine(model, pixels, tokens)


def pickscore(model, pixels, tokens):
    """Return exp(logit_scale) * cosine / 26 under transformers' CLIPModel, Float32[B]."""
    out = model(input_ids=tokens, pixel_values=pixels)
    image = F.normalize(out.image_embeds.float(), dim=-1)
    text = F.normalize(out.text_embeds.float(), dim=-1)
    return model.logit_scale.exp().float() * (image * text).sum(-1) / 26


class ClipReward:
    """A part of a Reward: logits_per_image of an open_clip model, see load_clip()."""
    fit, score = "crop", staticmethod(clip_logits)

    def __init__(self, name, device):
        self.model, _, self.tokenizer = load_clip(name, device)

    def __call__(self, images, prompts, metadata):
        """Return (Float[B], {}); see Reward."""
        size, weight = self.size_and_weight()
        values = []
        for some_images, texts in chunks(images, prompts):
            pixels = prepare(some_images.to(weight.device), size, self.fit).to(weight.dtype)
            tokens = self.tokenizer(texts).to(weight.device)
            values.append(self.score(self.model, pixels, tokens))
        return torch.cat(values), {}

    def size_and_weight(self):
        """Return the side of the input in pixels, and a weight of the model's dtype and device."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0], self.model.token_embedding.weight


class HpsReward(ClipReward):
    """A part of a Reward: HPSv2. Its file holds all of ViT-H-14; laion's is not needed."""
    fit, score = "pad", staticmethod(clip_cosine)

    def __init__(self, version, device):
        import open_clip
        path = Path(version)
        if version in HPS_FILES:
            path = fetch("xswu/HPSv2", [HPS_FILES[version]]) / HPS_FILES[version]
        elif not path.is_file():
            raise InputError(f"--reward hpsv2:{version}: wanted v2.0, v2.1 or a file")
        self.model = open_clip.create_model(HPS_ARCHITECTURE)
        self.tokenizer = open_clip.get_tokenizer(HPS_ARCHITECTURE)
        load_strict(self.model, read_weights(path), path)
        freeze_for_scoring(self.model, device)


class PickScore(ClipReward):
    """A part of a Reward: PickScore / 26, a hub id or folder for transformers' CLIPModel."""
    fit, score = "crop", staticmethod(pickscore)

    def __init__(self, name, device):
        import open_clip
        from transformers import CLIPModel
        folder = fetch(name, ["config", "weights"])
        try:
            model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
            missing = set(info["missing_keys"]) & dict(model.named_parameters()).keys()
            if missing:
                raise ValueError(f"{len(missing)} weights missing, e.g. {min(missing)}")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"--reward pickscore:{name}: cannot load it "
                             f"({first_line(error)})") from None
        self.model = freeze_for_scoring(model, device)
        self.tokenizer = open_clip.get_tokenizer(HPS_ARCHITECTURE)

    def size_and_weight(self):
        """See ClipReward."""
        return self.model.config.vision_config.image_size, self.model.visual_projection.weight


def chunks(images, prompts, size=64):
    """Yield images and prompts, size at a time."""
    for i in range(0, len(prompts), size):
        yield images[i:i + size], prompts[i:i + size]


# --------------------------------------------------------------------------------- ImageReward

class ImageReward(nn.Module):
    """A part of a Reward: ImageReward-v1.0 (arXiv 2304.05977), BLIP's encoders and an affine head.

    vision, text: what differs from the sizes of the release. (The defaults of transformers' configs
    are wrong for it: eps, heads, decoder.)"""
    VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 224, "patch_size": 16,
              "layer_norm_eps": 1e-6}
    TEXT = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024,
            "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "is_decoder": True}
    MEAN, STD, MAX_LENGTH = 0.16717362830052426, 1.0333394966054072, 35

    # official names -> ours; the text encoder's differ in nothing else
    RENAMES = (
        ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
        ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
        ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
        ("blip.visual_encoder.norm.", "vision.post_layernorm."),
        ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
        (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
        (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
        ("blip.text_encoder.", "text."))
    UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

    def __init__(self, tokenizer=None, vision=None, text=None):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        super().__init__()
        vision, text = self.VISION | (vision or {}), self.TEXT | (text or {})
        self.tokenizer, self.size = tokenizer, vision["image_size"]
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        layers = nn.Sequential(  # Identity: upstream's dropouts
            nn.Linear(text["hidden_size"], 1024), nn.Identity(), nn.Linear(1024, 128),
            nn.Identity(), nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))
        self.mlp = nn.ModuleDict({"layers": layers})

    def forward(self, images, prompts, metadata=None):
        """Return (Float32[B], {}); see Reward."""
        device, values = self.mlp["layers"][0].weight.device, []
        for some_images, texts in chunks(images, prompts):
            tokens = self.tokenizer(texts, padding="max_length", truncation=True,
                                    max_length=self.MAX_LENGTH, return_tensors="pt").to(device)
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                seen = self.vision(prepare(some_images.to(device), self.size)).last_hidden_state
                read = self.text(tokens["input_ids"], tokens["attention_mask"],
                                 encoder_hidden_states=seen).last_hidden_state
            value = self.mlp["layers"](read[:, 0].float())[:, 0]
            values.append((value - self.MEAN) / self.STD)
        return torch.cat(values), {}

    @classmethod
    def from_official(cls, state) -> dict:
        """Return the official state_dict under our names, less what does not enter the score."""
        out = {}
        for name, weight in state.items():
            if not name.startswith(cls.UNUSED):
                for old, new in cls.RENAMES:
                    name = name.replace(old, new)
                out[name] = weight
        return out


def load_imagereward(name, device="cpu") -> ImageReward:
    """Load ImageReward from a hub id with ImageReward.pt, or from that file. Raises InputError."""
    path = fetch(name, ["ImageReward.pt"])
    path = path / "ImageReward.pt" if path.is_dir() else path
    from transformers import BertTokenizer
    bert = "google-bert/bert-base-uncased"
    try:
        tokenizer = BertTokenizer.from_pretrained(fetch(bert, ["tokenizer"]))
    except OSError as error:
        raise InputError(f"--reward imagereward: the tokenizer {bert} cannot be read "
                         f"({first_line(error)})") from None
    model = ImageReward(tokenizer).eval().requires_grad_(False)
    load_strict(model, model.from_official(read_weights(path)), path)
    return model.to(device)


# ---------------------------------------------------------------------------- GenEval, servers

class GenevalReward:
    """A part of a Reward: GenEval's rules. Logs objects and objects_asked of each picture.

    rule: exact (exact_score of eval_geneval.py, 0 or 1), strict (strict_score, 0 or 1) or partial
    (its partial credit). Raises InputError for another rule."""

    def __init__(self, rule, detector, device):
        if rule not in ("exact", "strict", "partial"):
            raise InputError(f"--reward geneval:{rule}: the rule must be exact, strict or partial")
        self.rule = rule
        self.detector = detector if callable(detector) else load_detector(detector, device)

    def __call__(self, images, prompts, metadata):
        """Return (Float[B], log); see Reward. Raises InputError for prompts without metadata."""
        if metadata is None or not all(map(eval_geneval.is_geneval, metadata)):
            raise InputError("--reward geneval: every prompt needs GenEval metadata (tag, include) "
                             "in the prompt file")
        found = self.detector(images, metadata)
        log = eval_geneval.verdicts(metadata, found)
        values = []
        for i, (raw, colours) in enumerate(found):
            kept = eval_geneval.filter_detections(raw, metadata[i]["tag"])
            strict, _, partial = eval_geneval.strict_score(kept, metadata[i], colours)
            verdict = {"exact": log["exact"][i], "strict": strict, "partial": partial}
            values.append(float(verdict[self.rule]))
        return torch.tensor(values), {name: log[name] for name in ("objects", "objects_asked")}


class Server:
    """A server that is asked over HTTP; NAME:PASSWORD@ in its URL is sent as basic authentication.

    An answer has timeout seconds and 16 MB in all. A server that is away, too slow, or answers 5xx
    is asked again for patience seconds. Raises InputError when that does not help."""
    MOST = 2 ** 24

    def __init__(self, url, timeout=120.0, patience=300.0):
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        self.url = urllib.parse.urlunsplit(parts._replace(netloc=host))
        self.headers = {"Content-Type": "application/json"}
        if login:
            login = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
            self.headers["Authorization"] = f"Basic {login}"
        self.timeout, self.patience = timeout, patience

    def ask(self, body: dict):
        """Return the JSON of the answer to a request, made again while there is patience."""
        body = json.dumps(body).encode()
        end, wait = time.monotonic() + self.patience, 1.0
        while True:
            try:
                return parse_json(self.post(body), f"--reward {self.url}: its answer")
            except InputError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                wrong_url = isinstance(error, ValueError | http.client.InvalidURL)
                refused = wrong_url or getattr(error, "status", 500) < 500
                if refused or time.monotonic() + wait > end:
                    raise InputError(
                        f"--reward {self.url}: no scores ({first_line(error)}); is the server up, "
                        f"and fast enough for {self.timeout:g} s? (--reward-timeout, "
                        "--reward-patience)") from None
            time.sleep(wait)
            wait = min(2 * wait, 30.0)

    def post(self, body) -> bytes:
        """Return the answer to one request, no redirect. Raises OSError when it takes too long."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPConnection
        if parts.scheme == "https":
            kind = http.client.HTTPSConnection
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        connection.connect()
        expired = threading.Event()         # the time of the whole answer
        timer = threading.Timer(self.timeout, cut, [connection.sock, expired])
        timer.start()
        try:
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("POST", path, body, self.headers)
            answer = connection.getresponse()
            data = answer.read(self.MOST + 1)
            if expired.is_set():
                raise TimeoutError("it was cut off")
        except (OSError, http.client.HTTPException):
            if expired.is_set():
                raise TimeoutError(f"no whole answer within {self.timeout:g} s") from None
            raise
        finally:
            timer.cancel()
            connection.close()
        if answer.status != 200:
            raise StatusError(answer.status, f"HTTP Error {answer.status}: {answer.reason}")
        if len(data) > self.MOST:
            raise InputError(f"--reward {self.url}: its answer is over {self.MOST // 2 ** 20} MB")
        return data


class StatusError(OSError):
    """An answer with another status than 200."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def cut(sock, expired):
    """Shut a connection down, so that whoever reads from it goes on."""
    expired.set()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class HttpReward(Server):
    """A part of a Reward: the scores of a server, 32 pictures a request.

    POST {"images": [base64 PNG, ...], "prompts": [...], "metadata": [...] or null} as JSON answers
    {"scores": [number, ...]}, one per picture; null = no score. Raises InputError for an answer of
    another form."""

    def __call__(self, images, prompts, metadata):
        """Return (Float[B], {}), nan where there is no score; see Reward."""
        values = []
        for i in range(0, len(prompts), 32):
            rows = slice(i, i + 32)
            answer = self.ask({
                "images": [encode_png(image) for image in images[rows]],
                "prompts": list(prompts[rows]),
                "metadata": None if metadata is None else list(metadata[rows])})
            values += self.read_scores(answer, len(prompts[rows]))
        return torch.tensor(values), {}

    def read_scores(self, answer, n) -> list[float]:
        """Return the n numbers of an answer."""
        where = f"--reward {self.url}: its answer"
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or not all(
                score is None or type(score) in (int, float) for score in scores):
            raise InputError(f'{where} is not {{"scores": [number, ...]}}')
        if len(scores) != n:
            raise InputError(f"{where} has {len(scores)} scores for {n} pictures")
        try:
            return [math.nan if score is None else float(score) for score in scores]
        except OverflowError:
            raise InputError(f"{where} has a number that no float can hold") from None


class VlmReward(Server):
    """A part of a Reward: a vision-language model behind an OpenAI-compatible chat server (vLLM)
    judges one picture a request, several at once; its last "Final Score:" from 1 to 5 counts.

    An answer without one is no score. The paper's UnifiedReward-qwen-7b is such a model."""
    PROMPT = (
        "Judge a picture that was generated for a caption. Look at two things: how well it shows "
        "what the caption says (the objects, their attributes, how they stand to each other), and "
        "how good a picture it is (sharpness, detail, colours, beauty). Then give one score from "
        "1, the worst, to 5, the best, after the words 'Final Score:'.\nCaption: {}")
    AT_ONCE = 16

    def __init__(self, url, model, **how):
        super().__init__(url.rstrip("/") + "/chat/completions", **how)
        self.model = model

    def __call__(self, images, prompts, metadata):
        """Return (Float[B], {}), nan where there is no score; see Reward."""
        with ThreadPoolExecutor(self.AT_ONCE) as pool:
            return torch.tensor(list(pool.map(self.judge, images, prompts))), {}

    def judge(self, image, prompt) -> float:
        """Return the score of one picture."""
        picture = {"url": f"data:image/png;base64,{encode_png(image)}"}
        answer = self.ask({
            "model": self.model, "temperature": 0, "max_tokens": 1024,
            "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": picture},
                {"type": "text", "text": self.PROMPT.format(prompt)}]}]})
        try:
            text = answer["choices"][0]["message"]["content"]
            scores = re.findall(r"Final Score:\W*(\d+(?:\.\d+)?)", text)
        except (KeyError, IndexError, TypeError):
            raise InputError(f"--reward {self.url}: its answer is no chat completion") from None
        return float(scores[-1]) if scores and 1 <= float(scores[-1]) <= 5 else math.nan


def encode_png(image) -> str:
    """Return uint8[3, H, W] as a PNG in base64."""
    file = io.BytesIO()
    common.to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# -------------------------------------------------------------------------------- command line

def by_number(path):
    """Return a key that sorts 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def main():
    p = common.Parser("Score pictures: the mean of every part of a reward, and its standard error "
                      "over prompts.")
    p.add_argument("--reward", required=True, help=USAGE)
    p.add_argument("--images", required=True, help="a folder of PNGs in the order of their names "
                   "and numbers, the same number for every prompt; subfolders count")
    p.add_argument("--prompts", required=True,
                   help="txt, or jsonl with prompt, optional reward_prompt and metadata")
    p.add_argument("--detector", default=DETECTOR,
                   help="for geneval: hub id or folder of a Mask2Former, or shapes")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--batch", type=common.in_range(int, 1), default=64,
                   help="pictures read at a time")
    args = p.parse_args()
    prompts = common.read_prompts(args.prompts)
    files = sorted((f for f in Path(args.images).rglob("*.png") if f.name != "grid.png"),
                   key=by_number)
    n = len(files) // len(prompts)
    if not files or n * len(prompts) != len(files):
        p.error(f"--images {args.images}: {len(files)} PNGs for {len(prompts)} prompts; wanted the "
                "same number for every prompt")

    _, _, device = common.setup(args.device)
    reward = make_reward(args.reward, device=device, detector=args.detector)
    example_of = {file: prompts[i // n] for i, file in enumerate(files)}
    values = {}  # name of a part -> a tensor per batch
    for names, images in read_batches(files, args.batch):
        examples = [example_of[name] for name in names]
        texts = [example.get("reward_prompt", example["prompt"]) for example in examples]
        total = reward(images, texts, examples)
        for name, part in {**reward.log, "sum": total}.items():
            values.setdefault(name, []).append(part)

    print(f"{len(files)} pictures of {len(prompts)} prompts")
    for name, parts in values.items():
        means = torch.cat(parts).view(len(prompts), n).mean(1)
        error = ""
        if len(prompts) > 1:
            error = f" +- {means.std().item() / len(prompts) ** 0.5:.4f}"
        print(f"{name:<24} {means.mean().item():.4f}{error}")


if __name__ == "__main__":
    common.run(main)
