import contextlib
import http.server
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # exact comparisons: the CPU on every machine
os.environ["OMP_NUM_THREADS"] = "1"         # of the processes that tests start, too
import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests/data"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import checkpoint  # noqa: E402
from model import load_magvit, load_showo  # noqa: E402  (it mends a torchvision for open_clip)


def read_json(name):
    """Return what a JSON file of tests/data holds."""
    return json.loads((DATA / name).read_text())


def read_lines(name):
    """Return what the lines of a jsonl file of tests/data hold."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def metrics(out):
    """Return the rows of a run's metrics.jsonl, but for times and memory."""
    measured = re.compile("s_|images_per_s|peak_gib")
    return [{name: value for name, value in row.items() if not measured.match(name)}
            for row in checkpoint.read_rows(out / "metrics.jsonl")]


@pytest.fixture(autouse=True)
def signals():
    """Signal handlers, left as they were: a run of train.py puts its own there, but for signals
    that are ignored, as SIGINT and SIGHUP are in a shell's background."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def base():
    """The shipped tiny base: (Showo, MAGVITv2)."""
    return load_showo("shapes"), load_magvit("shapes/magvitv2")


@contextlib.contextmanager
def serving(handler):
    """Give an HTTP server on this machine that runs in a thread."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
