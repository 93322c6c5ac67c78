import json
import os
import re
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons: the CPU on every machine
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT, DATA = Path(__file__).parent.parent, Path(__file__).parent / "data"
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import model  # noqa: E402,F401  (before open_clip: it mends a torchvision that cannot be imported)

torch.set_num_threads(2)


def read_json(name):
    return json.loads((DATA / name).read_text())


def read_lines(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def metrics(out):
    """The rows of a run's metrics.jsonl, but for times and memory."""
    return [{k: v for k, v in row.items() if not re.search("^s_|images_per_s|peak_gib", k)} for row in checkpoint.read_rows(out / "metrics.jsonl")]


@pytest.fixture(scope="session")
def base():
    """The shipped tiny base: (Showo, MAGVITv2)."""
    from model import load_magvit, load_showo
    return load_showo("shapes"), load_magvit("shapes/magvitv2")
