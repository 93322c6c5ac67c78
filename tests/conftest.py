import gc
import os
import signal
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # exact comparisons: the CPU on every machine
os.environ["OMP_NUM_THREADS"] = "1"         # of the processes that tests start, too
# compiled code fits the processor that it was compiled for
KIND = os.environ.get("ATEN_CPU_CAPABILITY", "own")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor-{KIND}")
import pytest  # noqa: E402
from helpers import CHECKPOINT, TOKENIZER  # noqa: E402

from model import load_magvit, load_showo  # noqa: E402


def pytest_collection_finish():
    """What is imported by then is never freed: collections, which many tests ask for, pass it."""
    gc.freeze()


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


@pytest.fixture(scope="session")
def showo():
    """The checkpoint of Show-o's own code, smaller still."""
    return load_showo(CHECKPOINT, tokenizer=TOKENIZER)
