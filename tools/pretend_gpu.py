"""A GPU made of a CPU: run a program as if it had one, and fail where a GPU would.

    python tools/pretend_gpu.py train.py --model shapes --no-kl --steps 2 --out runs/x
    torchrun --nproc_per_node 2 tools/pretend_gpu.py train.py ...       # gloo plays nccl

Tensors stay on the CPU. Their storages carry a tag, .device tells it, and an operation that mixes
tags raises as CUDA does (CPU tensors of 0 dimensions in pointwise operations and CPU indices into
CUDA tensors pass). autocast has CUDA's lists of operations. PRETEND_SYNCS=1 prints, by line, what
makes the CPU wait for the GPU. Not seen: kernels, memory, streams, nccl itself, and devices that
are chosen in C++. Tags are global, so a program needs a process of its own.
"""
import atexit
import collections
import os
import runpy
import sys
import warnings

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), torch.device("cpu")
Tensor, aten = torch.Tensor, torch.ops.aten
DEVICE, IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__

# operations that may mix devices: copies; those with an index; those with a value of 0 dimensions
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Storage,
          aten.lift_fresh.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
           aten._index_put_impl_.default}
FILLS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor}

# operations whose result, or its shape, the CPU needs
WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default,
         aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
         aten.unique_consecutive.default, aten.bincount.default, aten.repeat_interleave.Tensor}

# what CUDA's autocast computes in float32: by its inputs, or by the type of its output.
# Source: pytorch aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE
FP32_INPUTS = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow
    softplus layer_norm native_layer_norm group_norm norm cosine_similarity nll_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss dist cdist logsumexp"""
FP32_OUTPUT = "softmax log_softmax cumprod cumsum prod linalg_vector_norm sum"

waits = collections.Counter()       # {(what, (file:line, ...) from the outermost to the line)}: n


# ------------------------------------------------------------------------------ tags

def tensors(x):
    """Return the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def on_gpu(x) -> bool:
    """Return whether a tensor is on the pretended GPU."""
    with torch._C.DisableTorchFunction():
        try:
            return getattr(x.untyped_storage(), "on_gpu", False)
        except (NotImplementedError, RuntimeError):     # sparse, or fake
            return False


def tag(x, gpu=True):
    """Put the tensors in x on the GPU, or on the CPU, and return x."""
    with torch._C.DisableTorchFunction():
        for leaf in tensors(x):
            if leaf.layout == torch.strided and leaf.untyped_storage().device.type == "cpu":
                leaf.untyped_storage().on_gpu = gpu
    return x


def is_cuda(device) -> bool:
    """Return whether a device, as programs give it (None = not given), is a GPU."""
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


def lines() -> tuple:
    """Return file:line of the program's own frames, the outermost first."""
    found, frame = [], sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if "/lib/python" not in file and file[:1] != "<" and file != __file__:
            found.append(f"{os.path.basename(file)}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(reversed(found))


def place() -> str:
    """Return file:line of the program's line that is being run."""
    return (lines() or ("?",))[-1]


def wait(what):
    """Note that the CPU waits for the GPU here."""
    waits[what, lines()] += 1


def move(x, gpu, dtype=None, non_blocking=False, **how):
    """Return a tensor on the GPU or on the CPU, as Tensor.to does."""
    dtype = dtype or x.dtype
    if gpu == on_gpu(x):
        return Tensor.to(x, dtype=dtype, **how)
    if not non_blocking:
        wait("to the GPU" if gpu else "to the CPU")
    return tag(Tensor.to(x, dtype=dtype, **how | {"copy": True}), gpu)


class Program(TorchFunctionMode):
    """What a program sees: devices, transfers, new tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == DEVICE:
            return GPU if on_gpu(args[0]) else func(*args)
        if func == IS_CUDA:
            return on_gpu(args[0])
        if func in (Tensor.numpy, Tensor.__array__) and on_gpu(args[0]):
            raise TypeError(f"can't convert {GPU} device type tensor to numpy [{place()}]")
        if func is Tensor.tolist and on_gpu(args[0]):
            wait("tolist")
        if func in (Tensor.cpu, Tensor.cuda):
            return move(args[0], func is Tensor.cuda)
        if func is Tensor.to:
            return self.to(*args, **kwargs)

        device = kwargs.get("device")
        if func in (Tensor.new_tensor, torch.as_tensor):
            kwargs.pop("device", None)
            gpu = is_cuda(device)
            if device is None:
                gpu = isinstance(args[0], Tensor) and on_gpu(args[0])
            return move(func(*args, **kwargs), gpu)
        if device is None or torch.device(device).type == "meta":
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and is_cuda(generator.device) != is_cuda(device):
            raise RuntimeError(f"Expected a '{torch.device(device).type}' device type for "
                               f"generator [{place()}]")
        if func is torch.tensor and is_cuda(device):
            wait("tensor to the GPU")
        return tag(func(*args, **kwargs | {"device": CPU}), is_cuda(device))

    def to(self, x, *args, copy=False, **kwargs):
        """Do what Tensor.to does, in all its forms."""
        if args and isinstance(args[0], Tensor):
            return move(x, on_gpu(args[0]), args[0].dtype)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "meta":
            return Tensor.to(x, *args, **kwargs)
        gpu = on_gpu(x) if device is None else device.type == "cuda"
        how = {"memory_format": layout} if layout is not None else {}
        return move(x, gpu, dtype, non_blocking, copy=copy, **how)


class Operations(TorchDispatchMode):
    """What the operations see, below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        gpu = [x for x in given if on_gpu(x)]
        if gpu and len(gpu) < len(given) and not self.may_mix(func, args, given):
            seen = ", ".join(f"{'cuda' if on_gpu(x) else 'cpu'} {list(x.shape)}" for x in given)
            raise RuntimeError("Expected all tensors to be on the same device, but found "
                               f"{seen} in {func} [{place()}]")
        if gpu and self.needs_the_host(func, args):
            wait(str(func).removeprefix("aten."))
        out = func(*args, **kwargs)
        return tag(out) if gpu and func is not aten._local_scalar_dense.default else out

    def may_mix(self, func, args, given) -> bool:
        """Return whether CUDA takes tensors of both devices in this operation."""
        if func in COPIES:
            return True
        if func in INDEXED and on_gpu(args[0]):         # the values must be there; indices may not
            return all(on_gpu(x) or x.dim() == 0 for x in tensors(args[2:]))
        pointwise = torch.Tag.pointwise in func.tags or func in FILLS or "_foreach_" in str(func)
        scalars = all(x.dim() == 0 for x in given if not on_gpu(x))
        return pointwise and scalars and (on_gpu(given[0]) or not func._schema.is_mutable)

    def needs_the_host(self, func, args) -> bool:
        """Return whether the CPU waits: for a number, a shape, or an index's copy to the GPU."""
        if func in INDEXED:
            indices = tensors(args[1])
            return any(x.dtype == torch.bool or x.dim() and not on_gpu(x) for x in indices)
        return func in WAITS


# ------------------------------------------------------------------------------ torch's parts

class Generator(torch.Generator):
    """A CPU generator that says where it is."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.where = GPU if is_cuda(device) else CPU
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.where


def low(x) -> bool:
    """Return whether x is a tensor in half precision."""
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)


def float32_kernel(op, by_output):
    """Return what autocast does for an operation of FP32_INPUTS, or of FP32_OUTPUT."""
    autocast_off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(autocast_off):
            if not by_output:
                args, kwargs = tree_map(lambda x: x.float() if low(x) else x, (args, kwargs))
            elif kwargs.get("dtype") is None and low(args[0]):
                kwargs["dtype"] = torch.float32
            return op(*args, **kwargs)
    return run


def pretend_autocast():
    """Make torch.autocast("cuda") the CPU's, with CUDA's lists -> what must stay alive."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    for names, by_output in ((FP32_INPUTS, False), (FP32_OUTPUT, True)):
        for name in names.split():
            for overload in getattr(aten, name).overloads():
                if "out" in overload or "dimname" in overload:
                    continue
                op = getattr(getattr(aten, name), overload)
                name_of = name if overload == "default" else f"{name}.{overload}"
                with warnings.catch_warnings(action="ignore"):      # it overrides the CPU's own
                    library.impl(name_of, float32_kernel(op, by_output))

    autocast = torch.amp.autocast_mode.autocast
    plain, enabled, dtype_of = (autocast.__init__, torch.is_autocast_enabled,
                                torch.get_autocast_dtype)

    def cpu_for(name):
        return "cpu" if name == "cuda" else name

    def init(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        plain(self, cpu_for(device_type), dtype, enabled, cache_enabled)
    autocast.__init__ = init
    torch.is_autocast_enabled = lambda name="cuda": enabled(cpu_for(name))
    torch.get_autocast_dtype = lambda name: dtype_of(cpu_for(name))
    return library


def pretend_files():
    """Let torch.save note where a tensor is, and torch.load put it there, as for CUDA."""
    def location(storage):
        return str(GPU) if getattr(storage, "on_gpu", False) else None

    def put(storage, where):
        if where.startswith("cuda"):
            storage.on_gpu = True
            return storage
    torch.serialization.register_package(0, location, put)      # before the CPU's and CUDA's own


def pretend_collectives():
    """Let gloo play nccl, which takes only tensors on the GPU."""
    begin, backends = dist.init_process_group, []

    def init_process_group(name=None, *args, **kwargs):
        kwargs.pop("device_id", None)
        backends.append(name)
        return begin("gloo" if name == "nccl" else name, *args, **kwargs)

    def strict(call):
        def run(*args, **kwargs):
            if "nccl" in backends and not all(map(on_gpu, tensors((args, kwargs)))):
                raise RuntimeError("No backend type associated with device type cpu: "
                                   f"{call.__name__} [{place()}]")
            return call(*args, **kwargs)
        return run
    dist.init_process_group = init_process_group
    for name in ("all_reduce", "all_gather", "broadcast"):
        setattr(dist, name, strict(getattr(dist, name)))


def pretend_backward():
    """Let the backward pass, where checkpoints run the program again, see devices, too."""
    plain = torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with Program():
            return plain(*args, **kwargs)
    torch.autograd._engine_run_backward = run_backward

    def facts(x):
        """Return what a checkpoint compares with the first pass."""
        return {"shape": x.shape, "dtype": x.dtype, "on_gpu": on_gpu(x)}
    torch.utils.checkpoint._allowed_determinism_checks_to_fns["default"] = facts


def start():
    """From here on there is a GPU; for good."""
    answers = {"is_available": True, "is_initialized": True, "is_bf16_supported": True,
               "device_count": 8, "current_device": GPU.index, "max_memory_allocated": 1,
               "memory_allocated": 1, "get_device_name": "pretended",
               "get_rng_state": torch.get_rng_state()}
    quiet = ("_lazy_init", "init", "set_device", "empty_cache", "reset_peak_memory_stats",
             "set_rng_state", "manual_seed", "manual_seed_all")
    for name, value in (answers | dict.fromkeys(quiet)).items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.synchronize = lambda *_: wait("synchronize")
    torch.Generator = Generator
    start.library = pretend_autocast()
    pretend_files()
    pretend_collectives()
    pretend_backward()
    Operations().__enter__()
    Program().__enter__()


def print_waits():
    """Print how often the program waited for the GPU, and where."""
    by_line = collections.Counter()
    for (what, stack), n in waits.items():
        by_line[f"{(stack or ('?',))[-1]} {what}"] += n
    for line, n in by_line.most_common():
        print(f"{n:8d} {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.modules["pretend_gpu"] = sys.modules["__main__"]    # one, for a program that imports it
    sys.argv = sys.argv[1:]
    start()
    if os.environ.get("PRETEND_SYNCS"):
        atexit.register(print_waits)
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
