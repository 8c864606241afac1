"""A training step on CUDA tensors that are fake, on a machine without a GPU, a driver or a compiler.

Tensors on the CPU stay real; those on 'cuda' have a shape, a dtype, strides and a device, but no values
(torch's FakeTensor). Written down is what a step on a real GPU would pay or die for: an operation on two
devices, a copy to the host, a value that the host reads, a copy from the host that blocks. A process that
called `arm` believes in a GPU until it ends, so each case runs in one of its own: see test_fake_cuda.py.
"""
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pixcon

CHECKED_WITH = '2.14'
OURS = str(Path(pixcon.__file__).parent)


def missing():
    "Private names that this file stands on and this torch does not have, as a list."
    on_c = ['_ensureCUDADeviceGuardSet', '_set_only_lift_cpu_tensors', '_select_conv_backend',
            '_conv_determine_backend_memory_format', '_ConvBackend']
    absent = [n for n in on_c if not hasattr(torch._C, n)]
    return absent + [n for n in ['avoid_device_init'] if not hasattr(FakeTensorMode, n)]


# ---- a GPU that is not there

def as_channels_last(t):
    "Whether a tensor counts as channels last, by the rule of at::suggest_memory_format."
    if t.ndim != 4 or t.stride(1) == 0: return False
    least = 0
    for d in (1, 3, 2, 0):
        if t.shape[d] == 0 or t.stride(d) < least: return False
        if d == 0 and least == t.stride(1): return False
        least = t.stride(d)*max(t.shape[d], 1)
    return True


def convolution_layout(x, weight, backend):
    "Memory layout of a convolution's result on a GPU."
    either = as_channels_last(x) or as_channels_last(weight)
    return torch.channels_last if either else torch.contiguous_format


def arm():
    "Lets this process believe in a GPU."
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)      # torch.tensor(v, device='cuda'): a CPU tensor, and a copy that is seen
    answers = dict(is_available=True, is_bf16_supported=True, current_device=0, device_count=1,
                   synchronize=None, _lazy_init=None, manual_seed_all=None,
                   mem_get_info=(80 << 30, 80 << 30))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
    torch._C._select_conv_backend = lambda *a, **k: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = convolution_layout
    torch.Tensor.backward = backward


# ---- the autograd engine, which refuses to start for CUDA without a driver, in Python

def in_order(root):
    "Nodes of a graph, each after all that it feeds."
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    return order


def accumulate(p, gradient):
    "Adds to a parameter's gradient as autograd does: on its device, in its layout."
    assert gradient.device == p.device, f'gradient on {gradient.device}, parameter on {p.device}'
    own = torch.empty_like(p).copy_(gradient.sum_to_size(p.shape))
    p.grad = own if p.grad is None else p.grad + own


def fitted(gradient, meta):
    "A gradient in the shape and dtype that its node expects."
    if gradient is None: return None
    if gradient.shape != meta.shape: gradient = gradient.sum_to_size(meta.shape)
    return gradient.to(meta.dtype)


def backward(loss):
    "Each node once, after all that feed it."
    order = in_order(loss.grad_fn)
    waiting = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        given = waiting.pop(node, {})
        if hasattr(node, 'variable'):                              # AccumulateGrad
            if given.get(0) is not None: accumulate(node.variable, given[0])
            continue
        meta = node._input_metadata
        given = [fitted(given.get(i), m) for i, m in enumerate(meta)]
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        with torch.no_grad(): out = (node.apply if own else node)(*given)
        out = out if isinstance(out, tuple) else (out,)
        for (following, i), gradient in zip(node.next_functions, out):
            if following is None or gradient is None: continue
            there = waiting.setdefault(following, {})
            there[i] = gradient if i not in there else there[i] + gradient


# ---- operations on fake tensors, and what must not happen

def our_line():
    "The innermost line of ours that is being executed."
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
    return f'{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}' if frames else '?'


def layout(t):
    "What a fused kernel wants to be alike."
    return t.dtype, t.shape, *(s for s, n in zip(t.stride(), t.shape) if n > 1)


class FakeCuda(TorchDispatchMode):
    "Fakes operations on CUDA tensors and leaves others alone; `seen` lists what must not happen in a step."
    waits = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'allclose', 'is_nonzero', '_unique2'}

    def __init__(self):
        super().__init__()
        self.fake, self.seen = FakeTensorMode(allow_non_fake_inputs=True), []

    def note(self, what): self.seen.append(f'{what} at {our_line()}')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.split('.')[0]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        cuda = any(isinstance(t, FakeTensor) for t in tensors)
        to = torch.device(kwargs['device']).type if kwargs.get('device') is not None else None
        if not cuda and to != 'cuda': return func(*args, **kwargs)
        self.judge(name, args, kwargs, tensors, cuda, to)
        if name == '_to_copy' and to == 'cpu': return torch.ones(tensors[0].shape, dtype=kwargs.get('dtype') or tensors[0].dtype)
        if name == '_local_scalar_dense': return tensors[0].dtype == torch.bool or 1
        if name in ('allclose', 'equal'): return True
        if name == 'index' and self.masked(args): return self.all_of(args[0])
        if name == '_scaled_dot_product_flash_attention' and tensors[0].dtype == torch.float:
            raise RuntimeError('fp16 and bf16 only')               # as on a GPU
        if name.startswith('_fused_'): return self.fused(args, kwargs)
        with self.fake: return func(*args, **kwargs)

    def judge(self, name, args, kwargs, tensors, cuda, to):
        "Writes down what a GPU would wait or fail for."
        others = any(t.ndim and not isinstance(t, FakeTensor) for t in tensors)
        if name == '_to_copy':
            shape = tuple(tensors[0].shape)
            if not cuda and not kwargs.get('non_blocking'): self.note(f'copy from the host that blocks, {shape}')
            if cuda and to == 'cpu': self.note(f'copy to the host, {shape}')
        elif name == 'copy_':
            into, source = args[:2]
            if not isinstance(source, FakeTensor) and source.ndim: self.note(f'copy from the host, {tuple(source.shape)}')
            if not isinstance(into, FakeTensor): self.note(f'copy to the host, {tuple(into.shape)}')
        elif cuda and others: self.note(f'{name} of tensors on two devices')
        if name in self.waits: self.note(name)
        if name.startswith('index') and self.masked(args): self.note(f'{name} by a mask')

    @staticmethod
    def masked(args):
        "Whether an indexing has a mask among its indices."
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        return any(i is not None and i.dtype == torch.bool for i in indices)

    def all_of(self, t):
        "As if a mask chose everything."
        with self.fake: return t.clone().flatten()

    @staticmethod
    def fused(args, kwargs):
        "The optimizer's kernel: parameters and states must be alike; nothing is computed."
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
        lists = [ts for ts in lists if ts[0].shape == args[0][0].shape]
        for ts in zip(*lists):
            layouts = {layout(t) for t in ts}
            assert len(layouts) == 1, f'the fused kernel refuses {layouts}'
        for name in ('grad_scale', 'found_inf'):
            t = kwargs.get(name)
            assert t is None or t.device.type == 'cuda' and t.dtype == torch.float, (name, t)
