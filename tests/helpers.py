"""What several test files use and is no fixture: scripts at tiny size, runs, models."""
import contextlib
import gc
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import train  # noqa: E402
from support import run as runs  # noqa: E402
from support.weights import library  # noqa: E402

DATA = ROOT / "tests/data"
TOKENIZER = DATA / "prompting/tokenizer"
CHECKPOINT = DATA / "showo/checkpoint"          # of Show-o's own code
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def read_json(name):
    """Return what a JSON file of tests/data holds."""
    return json.loads((DATA / name).read_text())


def read_lines(name):
    """Return what the lines of a jsonl file hold, of tests/data if the path is not whole."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# flags of train.py for a run of a second; a flag that is given again counts
TINY = ("--model shapes --no-kl --steps 2 --prompts-per-step 4 --group-size 4 --unmask-steps 2 "
        "--eval-every 0 --eval-n 1 --eval-unmask-steps 4 --save-every 1 --lr 1e-3 "
        "--reward geneval:partial").split()


def run(script, *flags):
    """Run a script's main() with flags."""
    with mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, flags)]):
        script.main()


def call(*flags):
    """Run train.py at tiny size."""
    run(train, *TINY, *flags)


def refused(script, *flags):
    """Return the line with which a script's main() ends."""
    with pytest.raises(SystemExit) as end:
        run(script, *flags)
    said = end.value.code
    assert isinstance(said, str) and "\n" not in said
    del end
    gc.collect()        # the traceback holds main's lock of its folder
    return said


def together(*command, n=2):
    """Run n processes that know of each other, as torchrun does but without its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK":
                                     str(rank), "WORLD_SIZE": str(n)}) for rank in range(n)]
    for process in started:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]


def torchrun(folder, *command, node=None, n=1, errors=subprocess.STDOUT):
    """Start torchrun in a folder, as one of two machines if node is 0 or 1."""
    start = ["--standalone"] if node is None else [
        "--nnodes", 2, "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", 29571]
    words = [sys.executable, "-m", "torch.distributed.run", *start, "--nproc-per-node", n, *command]
    return subprocess.Popen([*map(str, words)], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=errors)


@contextlib.contextmanager
def serving(handler):
    """Give an HTTP server on this machine that runs in a thread."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def metrics(out):
    """Return the rows of a run's metrics.jsonl, but for times and memory."""
    measured = re.compile("s_|images_per_s|peak_gib")
    return [{name: value for name, value in row.items() if not measured.match(name)}
            for row in runs.read_rows(out / "metrics.jsonl")]


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def trainer(folder):
    """Return what trainer.pt and optimizer.pt of a checkpoint hold."""
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    return torch.load(folder / "trainer.pt", weights_only=True) | {"optimizer": optimizer}


def moments(folder):
    """Return the optimizer's tensors by parameter and kind."""
    state, kinds = trainer(folder)["optimizer"]["state"], {"step", "exp_avg", "exp_avg_sq"}
    assert all(tensors.keys() == kinds for tensors in state.values())
    return {(i, kind): state[i][kind] for i in state for kind in kinds}


def equal(a, b):
    """Return whether two dicts hold the same tensors, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(a, b):
    """Return whether all tensors of two dicts together are equal to 1e-5 of their norm (one by one,
    Adam turns rounding of a zero gradient into steps)."""
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    a, b = (torch.cat([x[name].flatten() for name in a]) for x in (a, b))
    return a.norm() > 0 and (a - b).norm() <= 1e-5 * a.norm()


def gradient(model):
    """Return all gradients as one vector, and delete them."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def copy_configs(folder):
    """Copy the configs of the checkpoint of Show-o's own code."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "phi_config.json"):
        shutil.copy(CHECKPOINT / name, folder)


def tiny_clip(folder, **changes):
    """Let open_clip know an architecture "tiny" -> its model, and a file of its weights as HPSv2
    packs them."""
    open_clip = library("open_clip")
    config = read_json("clip_tiny/config.json")["open_clip"] | changes
    config["text_cfg"] = config["text_cfg"] | {"vocab_size": 49408}
    (folder / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "tiny.pt")
    return model.eval(), folder / "tiny.pt"
