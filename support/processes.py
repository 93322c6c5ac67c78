"""The device, torchrun's processes and what they exchange, and one plain line when one fails."""
import contextlib
import datetime
import errno
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist

from support.weights import digest

STORE = None    # torchrun's key-value store, in which the first process that fails says so
LESS_MEMORY = "less memory"     # what run() was told


def explain(error) -> str | int | None:
    """Return one line for an error that users meet, else its traceback; an exit code as it is."""
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: take {LESS_MEMORY}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'}: no space left"
    return "".join(traceback.format_exception(error))


def run(main, less_memory="a smaller --batch"):
    """Call main(). The first process that fails prints one line, or a traceback if the error is
    unexpected. The others exit silently.

    less_memory: what the script's user can try when GPU memory runs out."""
    global LESS_MEMORY
    LESS_MEMORY = less_memory
    try:
        main()
    except BaseException as error:
        message = explain(error)
        expected = isinstance(message, int | str) and "Traceback" not in str(message)
        if STORE is None and not expected:
            raise
        number = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
                       if name in os.environ), "0")
        try:
            first = STORE.add("failed", 1) == 1 if STORE else number == "0"
        except RuntimeError:        # the store went with the process that failed first
            first = False
        with contextlib.suppress(OSError):
            if first and not isinstance(message, int):
                print(message or traceback.format_exc(), file=sys.stderr)
        flush()
        # threads of a process group can abort an exit in the usual order
        os._exit(message if isinstance(message, int) else 1)
    flush()
    if dist.is_initialized():
        dist.destroy_process_group()
        os._exit(0)


def flush():
    """Write out what was printed, if anyone still reads it."""
    try:
        sys.stdout.flush()
    except OSError:     # else Python would try once more when it ends, and end with an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def setup(device=None):
    """Choose the device and join torchrun's other processes -> rank, world size, device."""
    global STORE
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):       # srun, mpirun
        if "WORLD_SIZE" not in os.environ and int(os.environ.get(name, 1)) > 1:
            raise SystemExit(f"{os.environ[name]} processes were started that do not know of each "
                             "other: start with torchrun --nproc_per_node N (one torchrun on each "
                             "machine)")
    if world > 1:       # first of all, so that whoever fails can say so
        hour = datetime.timedelta(hours=1)
        STORE, _, _ = next(dist.rendezvous("env://", timeout=hour))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            # where each process sees one GPU only (SLURM's binding), it has number 0
            index = 0 if device.index is None and torch.cuda.device_count() == 1 else index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)     # plans anew for each length
            torch.backends.cudnn.allow_tf32 = False         # float32 is never TF32
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:     # each by a build of torch
        raise SystemExit(f"--device {device}: there is none ({str(error)[:99]})") from None
    if world > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", store=STORE, rank=rank, world_size=world,
                                timeout=hour, device_id=device if gpu else None)
    return rank, world, device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def choose_dtype(name, device) -> torch.dtype:
    """Return the type that --dtype names: auto is bf16 on a GPU, fp32 on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.bfloat16 if name == "bf16" or (name == "auto" and on_gpu) else torch.float32


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------------------ exchange

def all_sum(tensor):
    """Return the sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_cat(tensor):
    """Return the tensors of all processes, which have one shape, joined in order of ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_lists(items: list) -> list:
    """Return the lists of all processes, joined in order of ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def of_first(value):
    """Return process 0's value."""
    return all_lists([value] if rank() == 0 else [])[0]


def demand_equal(**values):
    """End the program with a line unless every process has the same values."""
    for name, value in values.items():
        if len(set(all_lists([digest(value)]))) > 1:
            raise SystemExit(f"the processes differ in their {name}: every machine needs the same "
                             "command, and the same files or a folder that all of them see")


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------ ends that all share

class Ended(SystemExit):
    """The end of the program in all processes at once, so that they can still save together."""


def together(function, *args):
    """Call a function in every process -> its result. What fails in one process, by any exception,
    ends all: Ended, with the line or the traceback of the first that failed."""
    result = failure = None
    try:
        result = function(*args)
    except (Exception, SystemExit) as error:
        failure = explain(error)
    for ending in all_lists([failure]):
        if ending is not None:
            raise Ended(ending)
    return result
