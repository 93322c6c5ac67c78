"""What a picture is worth: CLIP, GenEval's rules, and weighted sums of them.

    reward = make_reward("clip", device="cuda")                     # or "clip:1.0,geneval:exact:0.5"
    values = reward(images, prompts)                                # uint8 [B, 3, H, W], list[str] -> Float[B]
    reward.log                                                      # every part on its own, Float[B] each

A part of the sum is NAME[:ARGUMENT][:WEIGHT]:
    clip[:MODEL/PRETRAINED]        logits_per_image of open_clip (the paper's reward: ViT-H-14/laion2b_s32b_b79k)
    geneval:exact|strict|partial   GenEval's rules on detected objects (default exact)

GenEval's own rule asks for "at least": under it, and under strict, drawing more and more objects pays. exact also demands
that nothing else is in the picture.
"""
import torch
from PIL import Image

from model import InputError

CLIP_DEFAULT = "ViT-H-14/laion2b_s32b_b79k"


class Reward:
    """A weighted sum of parts [(name, weight, function)], each (images, prompts, metadata) -> Float[B]."""

    def __init__(self, parts):
        self.parts, self.log = parts, {}

    @torch.no_grad()
    def __call__(self, images, prompts, metadata=None):
        """images uint8[B, 3, H, W], prompts of B texts, metadata None or B GenEval lines -> Float[B] on the CPU.

        Raises ValueError when the lengths differ."""
        if len(images) != len(prompts) or (metadata is not None and len(metadata) != len(prompts)):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {metadata and len(metadata)} metadata: not as many")
        self.log, total = {}, torch.zeros(len(images))
        for name, weight, function in self.parts:
            values, extra = function(images, prompts, metadata)
            self.log |= {name: values.float().cpu(), **extra}
            total += weight * self.log[name]
        return total


def make_reward(spec: str, *, device="cpu", detector=None) -> Reward:
    """spec: parts joined by commas, see the top of this file. detector: images -> [(detections, colours), ...], which
    geneval needs (shapes.detect). Raises InputError for an unknown part, argument or weight."""
    parts = []
    for part in spec.split(","):
        name, *rest = part.strip().split(":")
        weight = 1.0
        if rest and _is_number(rest[-1]):
            weight = float(rest.pop())
        argument = ":".join(rest)
        if name == "clip":
            function = clip_reward(argument or CLIP_DEFAULT, device)
        elif name == "geneval":
            function = geneval_reward(argument or "exact", detector)
        else:
            raise InputError(f"--reward {spec}: {name!r} is not known; use clip[:MODEL/PRETRAINED] or geneval[:exact|strict|partial]")
        parts.append((part.strip().rpartition(":")[0] if weight != 1.0 else part.strip(), weight, function))
    return Reward(parts)


def _is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


# --------------------------------------------------------------------------------------------------- CLIP

def clip_logits(model, pixels, tokens):
    """logits_per_image[i, i] of an open_clip model -> Float32[B]: exp(logit_scale) * cosine of picture i and text i."""
    image = torch.nn.functional.normalize(model.encode_image(pixels).float(), dim=-1)
    text = torch.nn.functional.normalize(model.encode_text(tokens).float(), dim=-1)
    return model.logit_scale.exp().float() * (image * text).sum(-1)


def clip_reward(name, device):
    """open_clip's MODEL/PRETRAINED (PRETRAINED may be a file), with its own preprocessing of PIL images -> a part of a Reward.

    Half precision on a GPU. Raises InputError when open_clip cannot load it."""
    import open_clip
    architecture, _, pretrained = name.partition("/")
    half = torch.device(device).type == "cuda"
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            architecture, pretrained=pretrained, device=device, precision="fp16" if half else "fp32")
    except Exception as error:  # unknown names are RuntimeErrors, the hub client has errors of its own
        raise InputError(f"--reward clip:{name}: open_clip cannot load it ({str(error).splitlines()[0][:200]}); "
                         "check the name and the network, or give clip:MODEL/PATH-TO-WEIGHTS") from None
    model.eval().requires_grad_(False)
    tokenizer, dtype = open_clip.get_tokenizer(architecture), torch.float16 if half else torch.float32

    def score(images, prompts, metadata):
        pictures = [preprocess(Image.fromarray(image)) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return clip_logits(model, torch.stack(pictures).to(device, dtype), tokenizer(prompts).to(device)), {}
    return score


# ------------------------------------------------------------------------------------------------ GenEval

def geneval_reward(rule, detector):
    """GenEval's rules as a reward: exact and strict are 0 or 1, partial is a mean of terms; logs objects per picture.

    -> a part of a Reward. Raises InputError for an unknown rule, without a detector, or for prompts without metadata."""
    from eval_geneval import filter_detections, is_geneval, strict_score, verdicts  # late: its command line draws with all the rest
    if rule not in ("exact", "strict", "partial"):
        raise InputError(f"--reward geneval:{rule}: the rule must be exact, strict or partial")
    if detector is None:
        raise InputError("--reward geneval: no detector for this model; it works with --model shapes")

    def score(images, prompts, metadata):
        if metadata is None or not all(map(is_geneval, metadata)):
            raise InputError("--reward geneval: every prompt needs GenEval metadata (tag, include) in the prompt file")
        found = detector(images)
        log = verdicts(metadata, found)
        values = log["exact"] if rule == "exact" else torch.tensor(
            [strict_score(filter_detections(raw, line["tag"]), line, colours)[0 if rule == "strict" else 2]
             for (raw, colours), line in zip(found, metadata)], dtype=torch.float)
        return values, {name: log[name] for name in ("objects", "objects_asked")}
    return score
