"""The parser, and the flags that several scripts share."""
import argparse
import re
import shlex
import sys
from argparse import SUPPRESS, BooleanOptionalAction

from support.weights import is_shapes

# defaults of the sampler, by model
SAMPLING = {"showo": dict(T=50, guidance=5.0, temperature=1.0, batch=8, n=1),
            "shapes": dict(T=12, guidance=0.0, temperature=1.0, batch=256, n=1)}


def parser(doc) -> argparse.ArgumentParser:
    """Return a parser whose errors are one plain line (see processes.run()) and whose --help begins
    with the first two paragraphs of the script's docstring."""
    p = argparse.ArgumentParser(description="\n\n".join(doc.split("\n\n")[:2]), allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = sys.exit
    # torch.distributed.launch and deepspeed add it; the environment says the same
    p.add_argument("--local-rank", "--local_rank", type=int, help=SUPPRESS)
    return p


def typed() -> str:
    """Return the flags as they were typed, without the passwords of URLs."""
    return re.sub(r"//[^/]*@", "//", shlex.join(sys.argv[1:]))


def at_least(least, kind=int):
    """Return the type of a flag: a number of a kind, and not under this."""
    def number(text):
        if not kind(text) >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return kind(text)
    number.__name__ = kind.__name__         # as argparse's message has it
    return number


def parse(p, presets):
    """Parse the command line. A flag that is not given has its value in presets["shapes"] if
    --model is the tiny base, else in presets["showo"]; --help names both."""
    for action in p._actions:
        if action.help and action.help != SUPPRESS:
            showo, tiny = (presets[name].get(action.dest) for name in ("showo", "shapes"))
            default = action.default if showo is None else f"{showo}; shapes: {tiny}"
            shown = default not in (None, SUPPRESS, []) and action.nargs != 0
            action.help += f" (default: {default})".replace("%", "%%") * shown
    args = p.parse_args()
    del args.local_rank
    for name, value in presets["shapes" if is_shapes(args.model) else "showo"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def add_model_flags(add):
    """Add the flags that say which weights to load, and where; add: a parser's add_argument."""
    add("--model", default="showlab/show-o-512x512",
        help="hub id (ID@REVISION pins it), folder or state_dict; shapes = the tiny base")
    add("--ckpt", help="weights in place of the model's: a checkpoint folder, or a state_dict")
    add("--vq", help="MAGVIT-v2 (default: showlab/magvitv2; shapes: its own)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of a layer's matrix "
        "products; auto: bf16 on a GPU. The head is float32, and float32 is never TF32")
    add("--compile", action=BooleanOptionalAction, help="fuse the kernels of a layer, by "
        "torch.compile (default: on a GPU)")


def add_sampling_flags(add):
    """Add the flags of scripts that draw pictures."""
    add("--steps", type=at_least(1), dest="T", help="unmasking iterations")
    add("--cfg", type=at_least(0, float), dest="guidance", help="guidance, 0 = none")
    add("--temperature", type=at_least(0, float), help="of the Gumbel noise")
    add("--batch", type=at_least(1), help="pictures at a time")
    # torchrun takes --n for an abbreviation of its own flags
    add("--images-per-prompt", "--n", type=at_least(1), dest="n", help="pictures of each prompt")
    add("--seed", type=int, default=0, help="of the random numbers")
