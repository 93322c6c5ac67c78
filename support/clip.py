"""CLIPs of open_clip and transformers: find, load, freeze, preprocess."""
import torch
import torch.nn.functional as F

from support.pictures import to_pil
from support.weights import fetch, library


def load_clip(name: str, device="cpu"):
    """Load a CLIP model by open_clip: (model, its transform of PIL pictures, tokenizer).

    name: MODEL/PRETRAINED of open_clip, PRETRAINED a tag or a file; or a hub id or folder with
    open_clip_config.json and weights."""
    open_clip = library("open_clip")
    model_name, _, pretrained = name.partition("/")
    sound = pretrained
    if model_name not in open_clip.list_models():
        folder, pretrained = fetch(name), None
        sound, model_name = any(folder.glob("open_clip_*model.*")), f"local-dir:{folder}"
    if not sound:       # open_clip would go on with random weights
        raise SystemExit(f"clip:{name}: wanted MODEL/PRETRAINED, such as ViT-L-14-quickgelu/openai,"
                         " or a folder with open_clip_config.json and open_clip_model.safetensors")
    try:
        trained = open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained else {}
        model, _, transform = open_clip.create_model_and_transforms(
            model_name, pretrained=pretrained, device=device,
            force_quick_gelu=trained.get("quick_gelu", False))      # else open_clip only warns
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"clip:{name}: open_clip cannot load it ({str(error).splitlines()[0]}); "
                         "check the name, the file and the network") from None
    return freeze_for_scoring(model, device), transform, open_clip.get_tokenizer(model_name)


def load_whole(kind, name):
    """Load a model of transformers' class `kind`; SystemExit where weights are missing, for which
    from_pretrained() only warns."""
    model, info = kind.from_pretrained(fetch(name), output_loading_info=True)
    if info["missing_keys"]:
        raise SystemExit(f"{name}: lacks {len(info['missing_keys'])} weights of {kind.__name__}")
    return model


def freeze_for_scoring(model, device):
    """Return a CLIP model on device without gradients, in half precision on a GPU, but for
    logit_scale: exp() would magnify its rounding."""
    scale = model.logit_scale.data.float()
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    model.eval().requires_grad_(False).to(device, dtype)
    model.logit_scale.data = scale.to(device)
    return model


def prepare(images, size=224, fit="crop"):
    """Return uint8[B, 3, H, W] as CLIP's input, Float[B, 3, size, size]. fit "crop": short side to
    size by PIL, centre crop (open_clip, PickScore, ImageReward); "pad": the long side to size,
    black borders, not rounded to 8 bits (HPSv2)."""
    open_clip = library("open_clip")
    if fit == "crop":
        transform = open_clip.image_transform(size, is_train=False)
        return torch.stack([transform(to_pil(x)) for x in images.cpu()]).to(images.device)
    h, w = images.shape[-2:]
    height, width = (round(side * (size / max(h, w))) for side in (h, w))
    x = F.interpolate(images.float() / 255, (height, width), mode="bicubic", align_corners=False,
                      antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    x = F.pad(x, (left, size - width - left, top, size - height - top))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
