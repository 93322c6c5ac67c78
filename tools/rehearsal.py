"""A rehearsal: every command that the README tells a user of GPUs, at tiny size, on any machine.

    python tools/rehearsal.py                                   # one process
    torchrun --nproc_per_node 2 tools/rehearsal.py              # two
    python tools/rehearsal.py --hub DIR                         # only the models, as a hub cache:
    HF_HOME=DIR HF_HUB_OFFLINE=1 torchrun --nproc_per_node 8 train.py --no-kl --filter-low

The models have random weights. A hub cache holds them under the real names, in the real layouts.
Sizes that are no part of a folder (HPSv2's, ImageReward's, the colour CLIP's) are set to tiny ones
while a command runs. What is drawn and scored is noise; that all of it runs is the point.
"""
import argparse
import contextlib
import gc
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import reward  # noqa: E402
from support import geneval, pictures, processes  # noqa: E402
from support.prompts import read_prompts  # noqa: E402
from support.weights import library  # noqa: E402

CLIP = reward.CLIP_DEFAULT
SMALL = {
    "train.py": "--steps 2 --group-size 2 --prompts-per-step 2 --unmask-steps 3 --save-every 1 "
                "--eval-unmask-steps 2 --eval-every 2",
    "sample.py": "--steps 2",
    "eval_geneval.py": "--images-per-prompt 1 --steps 2 --prompts eval.jsonl",
    "reward.py": "",
    "prompts/make_geneval.py": "--n 20",
    "prompts/draw_prompts.py": "--n 2",
    "fidelity": "--cpu --feature-extractor-weights-path inception.pth --feature-layer-fid 64"}
REWARDS = ("imagereward", "hpsv2:50", "pickscore", "geneval:partial", "clip:1,geneval:1")


# ------------------------------------------------------------------------------ tiny models

def save_tiny_mask2former(folder):
    """Write a tiny Mask2Former of random weights for the 80 classes, sure of some objects."""
    transformers = library("transformers")
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=32, num_queries=6, num_labels=80)
    config.id2label = dict(enumerate(geneval.CLASSES))
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.weight.data *= 60
    detector.save_pretrained(folder)


def save_tiny_clip(folder):
    """Write a tiny open_clip model of random weights: its folder, a file of its sizes
    (sizes.json) and one of its weights (weights.pt)."""
    open_clip = library("open_clip")
    sizes = json.loads((DATA / "clip_tiny/config.json").read_text())["open_clip"]
    sizes["text_cfg"]["vocab_size"] = 49408
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rehearsed.json").write_text(json.dumps(sizes))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    open_clip.add_model_config(folder / "rehearsed.json")
    torch.manual_seed(0)
    weights = open_clip.create_model("rehearsed").state_dict()
    save_file({name: weight.contiguous() for name, weight in weights.items()},
              folder / "open_clip_model.safetensors")
    torch.save(weights, folder / "weights.pt")


def tiny_clip_model(**text):
    """Return transformers' CLIPModel of the fixture's sizes, the text's changed by text."""
    transformers = library("transformers")
    config = json.loads((DATA / "clip_tiny/config.json").read_text())["transformers"]
    config["text_config"] |= text
    return transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()


def tiny_imagereward_sizes():
    """Return (vision, text) sizes of the fixture's ImageReward, and its vocabulary."""
    facts = json.loads((DATA / "imagereward_tiny/cases.json").read_text())
    config, med = facts["config"], facts["config"]["med_config"]
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "max_position_embeddings")
    text = {name: med[name] for name in names} | {"encoder_hidden_size": config["vision_width"]}
    return vision, text, facts["vocab"]


def make_hub(home):
    """Write every model of the README's commands into HOME/hub, as huggingface_hub lays it out."""
    BertTokenizer = library("transformers").BertTokenizer

    def repository(name):
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("tiny")
        (folder / "snapshots/tiny").mkdir(parents=True)
        return folder / "snapshots/tiny"

    for name, source in (("showlab/show-o-512x512", "showo/checkpoint"),
                         ("microsoft/phi-1_5", "prompting/tokenizer"),
                         ("showlab/magvitv2", "magvit")):
        shutil.copytree(DATA / source, repository(name), dirs_exist_ok=True)
    clip = repository(CLIP)
    save_tiny_clip(clip)
    save_tiny_mask2former(repository(geneval.DETECTOR))
    (clip / "weights.pt").rename(repository("xswu/HPSv2") / reward.HPS_FILES["v2.0"])
    pickscore = tiny_clip_model(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
    pickscore.save_pretrained(repository(reward.PICKSCORE_DEFAULT))
    weights = load_file(DATA / "imagereward_tiny/weights.safetensors")
    torch.save(weights, repository(reward.IMAGEREWARD_DEFAULT) / "ImageReward.pt")
    vocabulary = repository("google-bert/bert-base-uncased")
    (vocabulary / "vocab.txt").write_text("\n".join(tiny_imagereward_sizes()[2]) + "\n")
    BertTokenizer(str(vocabulary / "vocab.txt")).save_pretrained(vocabulary)


def make_work(work):
    """Write the files that the README's commands name, and a few GenEval prompts."""
    lines = [json.dumps(example) + "\n" for example in read_prompts("prompts/geneval.jsonl")[::180]]
    (work / "eval.jsonl").write_text("".join(lines))
    captions = [{"id": i, "caption": text} for i, text in enumerate(
        ("a cat", "two dogs in the snow", "a fox"))]
    (work / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    (work / "train.json").write_text(json.dumps([{"caption": "a cat"}, {"caption": "a fox"}]))
    state = load_file(DATA / "showo/checkpoint/pytorch_model.safetensors")
    torch.save(state, work / "mycheckpoint.pth")
    (work / "val2014").mkdir()
    for i in range(2):                      # of two sizes, as in MS-COCO
        noise = torch.randint(0, 256, (3, 40 + 10 * i, 30), dtype=torch.uint8)
        pictures.to_pil(noise).save(work / f"val2014/{i}.png")


def save_random_inception(path):
    """Write weights of torch-fidelity's Inception network, its initial ones."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    torch.save({}, path)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        inception = FeatureExtractorInceptionV3(
            "inception", ["64"], feature_extractor_weights_path=str(path))
    torch.save(inception.state_dict(), path)


@contextlib.contextmanager
def rehearsing(home):
    """Take models only from HOME/hub, and tiny sizes for those whose folders have none."""
    from huggingface_hub import constants
    vision, text, _ = tiny_imagereward_sizes()
    blip = reward.ImageReward
    changes = [
        (constants, "HF_HUB_CACHE", str(home / "hub")), (constants, "HF_HUB_OFFLINE", True),
        (reward, "HPS_ARCHITECTURE", "rehearsed"), (geneval, "COLOUR_CLIP", CLIP),
        (geneval, "THRESHOLD", 0.05), (geneval.Detector, "SHORT_SIDE", 64),
        (blip, "VISION", blip.VISION | vision), (blip, "TEXT", blip.TEXT | text)]
    with contextlib.ExitStack() as stack:
        for where, name, value in changes:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


# ------------------------------------------------------------------------------ the commands

def readme_commands():
    """Return the README's commands for Show-o, as lists of words that begin with the script."""
    text = (ROOT / "README.md").read_text()
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    lines += re.findall(r"\| `((?:python|torchrun) [^`]*)` ", text)
    commands = []
    for line in lines:
        words = shlex.split(line.split(" && ")[-1], comments=True)
        while words and words[0] in ("python", "torchrun", "--nproc_per_node", "8"):
            words = words[1:]
        if words and words[0] in SMALL and "shapes" not in words:
            commands.append(words)
    return commands


def commands():
    """Return every command of the rehearsal; the first one trains runs/NAME."""
    with_rewards = [["train.py", "--reward", spec] + ["--no-kl"] * (spec != REWARDS[-1])
                    for spec in REWARDS]
    return readme_commands() + with_rewards


def shrink(words, out):
    """Return a command with small numbers, its new results in the folder out."""
    script, *flags = words
    flags = [flag.replace("checkpoint-625", "checkpoint-2") for flag in flags]
    if processes.world() == 1:
        flags = [flag for flag in flags if flag != "--zero"]
    if "--gpu" in flags:
        del flags[flags.index("--gpu"):flags.index("--gpu") + 2]
    more = SMALL[script].split()
    if script == "train.py":
        more += ["--out", str(out)]
    if script == "sample.py" and "--out" not in flags:
        more += ["--out", f"{out}.png"]
    if "geneval" in "".join(flags) and script == "train.py":
        more += ["--prompts", "geneval.jsonl", "--eval-prompts", "eval.jsonl", "--eval-every", "1"]
    return [script, *flags, *more]


def run(words):
    """Run a script's main() in this process, in the working folder."""
    gc.collect()        # of a run before: its lock goes with it
    with mock.patch.object(sys, "argv", words):
        if words[0] == "fidelity":
            save_random_inception("inception.pth")
            from torch_fidelity.fidelity import main
            main()
        else:
            importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main()


def rehearse(n=None):
    """Run the first n commands, None = all, in the working folder, and the README's training runs
    once more from their first step.

    Yields the words of each command and the folder of its run, whenever one has ended."""
    first = processes.rank() == 0
    n_readme = len(readme_commands())
    for number, words in enumerate(commands()[:n]):
        out = Path("runs") / ("NAME" if number == 0 else f"run-{number}")
        if words[0] == "train.py" and "--out" in words:
            out = Path(words[words.index("--out") + 1])
        words = shrink(words, out)
        if first:
            print(f"\n$ {shlex.join(words)}", flush=True)
        # the others know one process
        if first or words[0] in ("train.py", "sample.py", "eval_geneval.py"):
            run(words)
        yield words, out
        if words[0] == "train.py" and number < n_readme:
            processes.barrier()
            if first:
                shutil.rmtree(out / "checkpoint-2")
            processes.barrier()
            run([*words, "--resume"])
            yield [*words, "--resume"], out
        processes.barrier()


def main():
    p = argparse.ArgumentParser(description="Rehearse the README's commands for Show-o with tiny "
                                "models.")
    p.add_argument("--hub", metavar="DIR", help="only write the tiny models, as a hub cache")
    p.add_argument("--first", type=int, help="only the first commands")
    p.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    args = p.parse_args()
    if args.hub:
        make_hub(Path(args.hub))
        return
    place = rank, _, _ = processes.setup(args.device)
    folder = processes.all_lists([tempfile.mkdtemp(prefix="rehearsal-")] if rank == 0 else [])[0]
    folder = Path(folder)
    if rank == 0:
        make_hub(folder)
        make_work(folder)
    processes.barrier()
    if rank > 0:
        open_clip = library("open_clip")
        open_clip.add_model_config(next((folder / "hub").rglob("rehearsed.json")))
    os.chdir(folder)
    with rehearsing(folder), mock.patch.object(processes, "setup", lambda device: place):
        n = sum(1 for _ in rehearse(args.first))
    print(f"process {rank}: {n} runs, all of them ended well, in {folder}")


if __name__ == "__main__":
    processes.run(main)
