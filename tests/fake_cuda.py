"""A CUDA device that is not there: shapes and devices of CUDA code, and where its host would wait, on any machine.

torch's FakeTensorMode gives tensors shape, dtype and device and no numbers: it raises where two devices meet. `Watch`
stands above it and notes each place at which the host asks the device for a number, or copies without being told that
it need not wait. Only forward passes run: without a driver, autograd has no CUDA context.
"""

import contextlib
import sys
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = __file__


def place():
    """Return "file.py:function" of the innermost frame of an adapter or the library, with that of other code that it
    calls: "file.py:function > other.py:function"."""
    frame, inner = sys._getframe(2), None
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != HERE and "<" not in name and "/jaxtyping" not in name:
            where = f"{name.rpartition('/')[2]}:{frame.f_code.co_name}"
            inner = inner or where
            if "/poco_vla/" in name or "/adapters/" in name:
                return where if inner == where else f"{where} > {inner}"
        frame = frame.f_back
    return inner


class Watch(TorchDispatchMode):
    """Note where the host waits.

    Args:
        answers: what the host is told there, by the place; a list gives one after the other, again and again.

    Attributes:
        waits: how often, by place.
    """

    def __init__(self, answers):
        super().__init__()
        self.answers = {where: list(given) if isinstance(given, list) else [given] for where, given in answers.items()}
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            where = place()
            if args[0].device.type == "cuda":
                self.waits[where] += 1
            if where in self.answers:
                answer = self.answers[where].pop(0)
                self.answers[where].append(answer)
                return answer
            return func(*args, **kwargs)  # raises
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if name == "aten::nonzero" or (name.startswith("aten::index") and masks):
            self.waits[place()] += 1  # to learn how many are chosen: taken for all
            if name == "aten::nonzero":
                return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=args[0].device)
            args = (args[0], [all_places(index) for index in args[1]], *args[2:])
            args = (args[0], [index for some in args[1] for index in some], *args[2:])
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
            waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            if source.device.type != target.device.type and waits and source.numel():
                self.waits[place()] += 1
        return out


def all_places(index):
    """Return the indices by numbers that a mask of True stands for."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long, device=index.device) for _ in range(index.ndim)]


@contextlib.contextmanager
def fake_gpu(answers=()):
    """Inside, everything on device "cuda" is fake. Yield the watch."""
    watch, make, apply = Watch(dict(answers)), torch.tensor, torch.nn.Module._apply

    def tensor(data, *args, **kwargs):
        made = make(data, *args, **kwargs)
        if made.device.type == "cuda" and made.numel():
            watch.waits[place()] += 1  # numbers of the host: a copy from memory that is not pinned
        return made

    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        torch.tensor, torch.nn.Module._apply = tensor, apply_to_fakes
        try:
            yield watch
        finally:
            torch.tensor, torch.nn.Module._apply = make, apply


def apply_to_fakes(self, fn, recurse=True):
    """nn.Module._apply, which cannot swap FakeTensors in place: a parameter that changes becomes a new object."""
    for module in self.modules() if recurse else (self,):
        for table in (module._parameters, module._buffers):
            for name, old in list(table.items()):
                if old is None:
                    continue
                with torch.no_grad():
                    new = fn(old)
                if (new.device, new.dtype) != (old.device, old.dtype):
                    is_parameter = table is module._parameters
                    table[name] = torch.nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
    return self
