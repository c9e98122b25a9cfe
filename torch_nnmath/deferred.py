"""Logits that are computed only if something needs them, and losses that do not.

A head (a Linear whose logits go into a cross entropy) gives `DeferredLogits`: a tensor with the
logits' shape, strides, dtype and place in the graph, but without numbers. It is the output of the
affine map's Function (F1, F8), whose backward is the gradient by way of the logits, if they are
ever computed. An operation in the table `STEPS` is only noted. A loss in the table `FUNCTIONS`
takes the noted steps over to the features and calls the fused head (F14, F15); it does so only if
the graph between head and loss is exactly these steps, so that whoever stands between them, such as
a hook, a checkpoint or a Function of the user's, is heard. All else needs the numbers: they are
computed once, for every tensor that came from the same call, which is then as plain as any.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as theirs
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath import functional as ours
from torch_nnmath import _head
from torch_nnmath._precision import cast_for_product as for_product, is_autocast, widen as wide, wide_type, disable_autocast as without_autocast
from torch_nnmath._target import TargetOptions
from torch_nnmath._torch import is_transformed
from torch_nnmath.kernels.dispatch import PLAIN_TYPES as PLAIN

__all__ = ["DeferredLogits", "HeadLog", "MaterializedLogits", "linear"]

aten = torch.ops.aten
_unseen = torch._C.DisableTorchFunctionSubclass


# What a head does, for the report


class MaterializedLogits(UserWarning):
    """The logits of a head were computed while it was trained: memory was not saved."""


class HeadLog:
    """What became of a head's logits.

    `fused` counts the losses that did without them, `materialized` by which operation and where
    they had to be computed.
    """

    def __init__(self, name: str, *, is_swapped: bool = True):
        self.name, self.is_swapped, self.fused = name, is_swapped, 0
        self.materialized: Counter[str] = Counter()
        self.has_warned = False

    def __repr__(self) -> str:
        losses = f"{self.fused or 'no'} loss{'es' * (self.fused != 1)} without logits"
        lines = [f"head {self.name or '(root)'}: {losses} so far"]
        for why, times in self.materialized.most_common():
            lines.append(f"  logits computed {times} x: {why}")
        return "\n".join(lines)

    def note(self, why: str, *, is_training: bool = False) -> None:
        if is_training and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"the logits of head {self.name or '(root)'} were computed, and memory was not "
                f"saved: {why}. What to do is in docs/swapping.md; the report of swap() counts how "
                "often. If another Linear makes the logits, swap(model, head=NAME) names it; "
                "swap(model, head=None) leaves all plain",
                MaterializedLogits,
                stacklevel=_user_frame()[0],
            )
        self.materialized[why] += 1


_PACKAGES = tuple(os.path.dirname(m.__file__) + os.sep for m in (torch, check))  # type: ignore[type-var, operator]


def _user_frame() -> tuple[int, str]:
    """How far up the caller is who is neither PyTorch nor this library, and where."""
    frame: Any = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        frame, level = frame.f_back, level + 1
    code = frame.f_code
    return level, f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"


# The head


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, module: Any) -> Tensor:
    """F1 with deferred logits, where they can be deferred; else `functional.linear`."""
    if torch.compiler.is_compiling() or not _are_numbers(input, weight, bias):
        return ours.linear(input, weight, bias)
    log = module._nnmath_swapped
    if module._forward_hooks:
        is_training = module.training and torch.is_grad_enabled()
        log.note("by forward hooks of the head", is_training=is_training)
        return ours.linear(input, weight, bias)
    x, W, b = for_product(input, weight, bias)  # the loss may stand outside of autocast's region
    if not _fit(x, W, b):
        return ours.linear(input, weight, bias)
    z = _Deferral.evaluate(x, W, b)
    call = z.step.call
    call.log, call.node, call.is_training = log, _node(z), module.training
    return z


def _are_numbers(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors, which nothing transforms, traces or records."""
    if is_transformed() or torch.is_inference_mode_enabled() or _is_traced():
        return False
    given = [v for v in tensors if v is not None]
    return all(type(v) in PLAIN and not v.is_meta and not v.is_inference() for v in given)


def _is_traced() -> bool:
    """Whether operations are recorded, which are to be those of logits."""
    return torch._C._get_tracing_state() is not None or get_proxy_mode() is not None


def _fit(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether there are logits, of some classes; errors are left to PyTorch."""
    given = [x, W] if b is None else [x, W, b]
    return (
        len({(v.dtype, v.device) for v in given}) == 1
        and x.is_floating_point()
        and x.dim() > 0
        and x.numel() > 0
        and W.dim() == 2
        and x.shape[-1] == W.shape[1]
        and W.shape[0] > 1
    )


class _Deferral(formulas.Affine):
    """F1 and F8, with logits that are yet to be computed."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        call = _Call(x, W, b)
        probe = x.new_empty((*x.shape[:-1], 0))
        form = Form(x.dim() - 1, probe)
        layout = _packed((*x.shape[:-1], W.shape[0]), x.dtype)
        return DeferredLogits(_Step(call, None, Noted(form, layout)))


class _Call:
    """One call of a head: its operands, and all that came from its logits.

    The operands' versions tell whether the logits can still be computed.
    """

    log: HeadLog
    node: Any  # of the logits, in the graph
    is_training = False

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None):
        self.operands: Any = x, W, b
        self.versions = [(v, v._version) for v in (x, W, b) if v is not None]
        self.steps: list[weakref.ref[_Step]] = []
        self.is_computed = False
        self.watched: str | None = None  # by whom
        self.is_passed_by = False  # by a loss's gradient
        if not _CALLS:
            _hear_of_steps()
        _CALLS.add(self)

    def check(self) -> None:
        if any(v.untyped_storage().nbytes() == 0 for v, _ in self.versions if v.numel()):
            raise RuntimeError(
                f"the logits of head {self.log.name!r} are needed, but its parameters' memory was "
                "freed since, as FSDP does after the forward: compute the loss inside the wrapped "
                "model or keep the head's parameters (reshard_after_forward=False), read logits "
                "before backward, or swap(model, head=None)"
            )
        if any(v._version != version for v, version in self.versions):
            raise RuntimeError(
                f"the logits of head {self.log.name!r} are needed, but its features, weight or "
                "bias, or what they were scaled by, were changed in place since, as by an "
                "optimizer's step: read logits before, or swap(model, head=None)"
            )

    def compute(self, operation: str) -> None:
        """All numbers that are still to be had, for the sake of an operation."""
        if self.is_computed:
            return
        self.check()
        why = f"{self.watched or operation} at {_user_frame()[1]}"
        self.log.note(why, is_training=self.is_training and self.node is not None)
        x, W, b = self.operands
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x):
            for reference in self.steps:
                step = reference()
                if step is not None and step.numbers is None:
                    step.compute(x, W, b)
        self.is_computed = True
        self.operands, self.steps, self.versions = (), [], []


_CALLS: weakref.WeakSet[_Call] = weakref.WeakSet()


@functools.cache
def _hear_of_steps() -> None:
    """A fused optimizer leaves the versions of what it changes as they were."""

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = {id(v) for call in _CALLS for v, _ in call.versions}
        changed = [p for group in optimizer.param_groups for p in group["params"] if id(p) in held]
        torch.autograd.graph.increment_version(changed)

    register_optimizer_step_post_hook(step)


class Layout(NamedTuple):
    """What a tensor is but for its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    def dim(self) -> int:
        return len(self.shape)


def _packed(shape: Any, dtype: torch.dtype) -> Layout:
    """Of a tensor without gaps, in the order of its axes."""
    stride = [math.prod(max(size, 1) for size in shape[d + 1 :]) for d in range(len(shape))]
    return Layout(torch.Size(shape), tuple(stride), dtype)


class _Origin(NamedTuple):
    """How deferred logits came from others: by an operation in PyTorch's graph."""

    parent: _Step
    func: Any
    args: tuple[Any, ...]  # where the parent stands, None
    kwargs: dict[str, Any]
    place: int  # of the parent
    output: int | None = None  # which, of several

    def on(self, parent: Tensor) -> Any:
        args = [*self.args[: self.place], parent, *self.args[self.place + 1 :]]
        out = self.func(*args, **self.kwargs)
        return out if self.output is None else out[self.output]

    def layout(self) -> Any:
        """The result's layout, or each's of several, by PyTorch's own rules."""
        args = [*self.args[: self.place], self.parent.layout, *self.args[self.place + 1 :]]
        kwargs = tuple((k, v) for k, v in self.kwargs.items() if k != "device")
        types = tuple(map(type, args))  # 2 and 2 + 0j are equal keys
        return _layout(self.func, _key(args), kwargs, self.place, types)

    @property
    def other(self) -> Any:
        """The other operand, of two."""
        return self.args[1 - self.place]


def _key(v: Any) -> Any:
    """Arguments as a key: of tensors the layouts, of lists tuples."""
    if isinstance(v, Tensor):
        return Layout(v.shape, v.stride(), v.dtype)
    return tuple(map(_key, v)) if type(v) in (list, tuple) else v


@functools.lru_cache(maxsize=4096)
def _layout(func: Any, args: Any, kwargs: Any, place: int, types: Any) -> Any:
    def of_key(v: Any) -> Any:
        if isinstance(v, Layout):
            return torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device="meta")
        return [*map(of_key, v)] if type(v) is tuple else v

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return [*map(of, x)]
        is_view = x.untyped_storage()._cdata == memory
        offset = x.storage_offset() + args[place].offset if is_view else 0
        return Layout(x.shape, x.stride(), x.dtype, offset)

    metas = of_key(args)
    memory = metas[place].untyped_storage()._cdata
    return of(func(*metas, **dict(kwargs)))


class _Step:
    """What deferred logits are made of; their numbers, once there are any."""

    def __init__(self, call: _Call, origin: _Origin | None, noted: Noted):
        self.call, self.origin, self.noted = call, origin, noted
        self.form, self.layout = noted.form, noted.layout
        self.numbers: Tensor | None = None
        call.steps.append(weakref.ref(self))

    def compute(self, x: Tensor, W: Tensor, b: Tensor | None) -> None:
        if self.origin is None:
            self.numbers = theirs.linear(x, W, b)
            return
        assert self.origin.parent.numbers is not None
        numbers = self.origin.on(self.origin.parent.numbers)
        self.numbers = numbers.contiguous() if self.origin.func in INDEXING else numbers
        self.origin = None

    def path(self) -> list[_Step]:
        """From the head on, without the head."""
        steps, step = [], self
        while step.origin is not None:
            steps.append(step)
            step = step.origin.parent
        return steps[::-1]


class DeferredLogits(Tensor):
    """Logits without numbers, until something needs them."""

    step: _Step

    @staticmethod
    def __new__(cls, step: _Step) -> DeferredLogits:
        layout = step.layout
        options: dict[str, Any] = {"dtype": layout.dtype, "device": step.form.probe.device}
        if torch.is_inference_mode_enabled():  # what is a view of a tensor with a version has one
            with torch.inference_mode(False):
                return DeferredLogits(step)
        z: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, layout.shape, strides=layout.stride, storage_offset=layout.offset, **options
        )
        z.step = step
        return z

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _unseen_by_compiler(_function)(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _unseen_by_compiler(_dispatch)(func, args, kwargs or {})


def _unseen_by_compiler(function: Any) -> Any:
    """`torch.compiler.disable`, which imports the compiler, once somebody else has."""
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _UNSEEN:
        _UNSEEN[function] = torch.compiler.disable(function)
    return _UNSEEN[function]


_UNSEEN: dict[Any, Any] = {}


def _function(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """A function of PyTorch or of ours, before autograd."""
    if not all(t in (DeferredLogits, *PLAIN) for t in types):  # another subclass has the say
        args, kwargs = tree_map(lambda v: _ordinary(v, func), (args, kwargs))
        return func(*args, **kwargs)
    rule = FUNCTIONS.get(func)
    with _unseen():
        if rule is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation after autograd: noted, or of numbers."""
    rule = STEPS.get(func)
    if rule is not None:
        out = _noted(func, rule, args, kwargs)
        if out is not None:
            return out
    if func in FACTORIES:
        z = args[0]
        return func(torch.empty(0, dtype=z.dtype, device=z.device), *args[1:], **kwargs)
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"deferred logits cannot change their shape in place by {_operation(func)}: "
            f"use {_operation(func).rstrip('_')}"
        )
    plain: dict[int, Tensor] = {}

    def numbers(v: Any) -> Any:
        if not isinstance(v, DeferredLogits):
            return v
        v.step.call.compute(_operation(func))
        assert v.step.numbers is not None
        plain[id(v.step.numbers)] = v
        return v.step.numbers

    out = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
    # what was written to in place is returned as itself
    return tree_map(lambda v: plain.get(id(v), v) if isinstance(v, Tensor) else v, out)


def _operation(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.")


def _name(func: Any) -> str:
    """An operation's, or an attribute's that is read."""
    name: str = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name


def _ordinary(v: Any, func: Any) -> Any:
    """A tensor that is no subclass, with the same memory and the same gradient."""
    if not isinstance(v, DeferredLogits):
        return v
    with _unseen(), _disable_current_modes():  # as of fake tensors, which know no numbers
        v.step.call.compute(_name(func))
        return aten.alias(v)


def _node(z: Tensor) -> Any:
    with _unseen():
        return z.grad_fn


# Operations that are noted


class Scale(NamedTuple):
    """A product of numbers over a product of numbers, times tensors () to a power, 1 or -1."""

    over: float = 1.0
    under: float = 1.0
    tensors: tuple[tuple[Tensor, int], ...] = ()

    def __bool__(self) -> bool:
        """Whether it is another than 1."""
        return self.over != self.under or bool(self.tensors)

    def times(self, over: float, under: float, *tensors: tuple[Tensor, int]) -> Scale:
        return Scale(self.over * over, self.under * under, self.tensors + tensors)

    def value(self, dtype: torch.dtype) -> Any:
        s: Any = self.over / self.under
        for v, power in self.tensors:
            factor = v.to(torch.promote_types(wide_type(v.dtype), dtype))
            s = s * factor if power == 1 else s / factor
        return s


class Form(NamedTuple):
    """What deferred logits are, as mathematics.

    Of the head's logits z and a row r, with z' = s (z + r) or, capped, t tanh(s (z + r)): they are
    z', or the logarithms of its softmax, or these with the other sign.
    """

    axis: int  # of the classes
    probe: Tensor  # the logits, if there were no class
    scale: Scale = Scale()  # s; when capped, t
    inner: Scale | None = None  # when capped, s
    row: tuple[Tensor, ...] = ()  # r, a sum
    sign: int = 0  # of logarithms; 0 for logits
    is_by_row: bool = False  # whether each row has a scale too

    def shape_of_rows(self) -> torch.Size:
        return self.probe.shape[: self.axis] + self.probe.shape[self.axis + 1 :]


class Noted(NamedTuple):
    """An operation's result: what it is, its layout, and as what it comes to the
    features: `onto` of rows of any width at the classes' axis, then a scale for each row.
    """

    form: Form
    layout: Layout
    onto: Callable[[Tensor], Tensor] | None = None
    row_scale: Callable[[], Tensor] | None = None


def _noted(func: Any, rule: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result as deferred logits; None if it is no step."""
    places = [i for i, v in enumerate(args) if isinstance(v, DeferredLogits)]
    if len(places) != 1 or any(isinstance(v, DeferredLogits) for v in kwargs.values()):
        return None
    (place,) = places
    step = args[place].step
    call, form, its = step.call, step.form, step.layout
    if call.is_computed or _is_traced():
        return None
    C, entries = its.shape[form.axis], math.prod(its.shape)
    tensors = [v for v in tree_leaves(args) if isinstance(v, Tensor)]
    if any(v.numel() > max(C, entries // C) for v in tensors if v is not args[place]):
        return None  # neither a row nor of rows: not to be copied
    rest = tuple(None if i == place else _kept(v, call) for i, v in enumerate(args))
    origin = _Origin(step, func, rest, kwargs, place)
    try:
        found = rule(form, its, origin)
    except (RuntimeError, IndexError):  # the operation itself will say so
        return None
    several = isinstance(found, list)
    results = []
    for i, noted in enumerate(found if several else [found]):
        if noted is None or noted.layout.shape[noted.form.axis] != C:
            return None
        if torch.promote_types(noted.layout.dtype, its.dtype) != noted.layout.dtype:
            return None
        its_origin = origin._replace(output=i) if several else origin
        results.append(DeferredLogits(_Step(call, its_origin, noted)))
    return results if several else results[0]


def _kept(v: Any, call: _Call) -> Any:
    """An operand as it is now. One with a gradient stays itself, for the graph to find."""
    if isinstance(v, list | tuple):
        return [_kept(x, call) for x in v]
    if not isinstance(v, Tensor):
        return v
    if not v.requires_grad:
        return v.clone()
    call.versions.append((v, v._version))
    return v


def _copied(form: Form, its: Layout, origin: _Origin) -> Any:
    """What leaves numbers, shape and all as they are, or widens the type."""
    device = origin.kwargs.get("device")
    if device is not None and torch.device(device) != form.probe.device:
        return None
    return Noted(form, origin.layout())


def _moved(form: Form, its: Layout, origin: _Origin) -> Any:
    """What takes rows and moves axes, but leaves each row whole, whatever it is wide.

    Where the classes are then, the probe shows: where nothing is left.
    """
    probes, axis = origin.on(form.probe), form.axis
    several = not isinstance(probes, Tensor)
    if origin.func in INDEXING:
        width, layouts = 1, None  # a mask's numbers tell the shape; the result is packed
    else:
        width, layouts = its.shape[axis] + 1, origin.layout() if several else [origin.layout()]
    shape = [width if d == axis else size for d, size in enumerate(form.probe.shape)]
    others = origin.on(form.probe.new_empty(()).expand(shape))
    probes, others = (p if several else [p] for p in (probes, others))
    if len(others) != len(probes):
        return None
    found = []
    for i, (probe, other) in enumerate(zip(probes, others, strict=True)):
        axes = [d for d, size in enumerate(probe.shape) if size == 0]
        if len(axes) != 1 or other.shape[axes[0]] != width:
            return None
        shape = [its.shape[axis] if size == 0 else size for size in probe.shape]
        layout = layouts[i] if layouts else _packed(shape, its.dtype)
        if [*layout.shape] != shape:
            return None
        onto = origin._replace(output=i).on if several else origin.on
        found.append(Noted(form._replace(axis=axes[0], probe=probe), layout, onto))
    return found if several else found[0]


def _reshaped(form: Form, its: Layout, origin: _Origin) -> Any:
    """What splits and joins axes of rows: the classes are where as many entries come after them."""
    out = origin.layout()
    C, after = its.shape[form.axis], math.prod(its.shape[form.axis + 1 :])
    for axis, size in enumerate(out.shape):
        if size == C and math.prod(out.shape[axis + 1 :]) == after:
            break
    else:
        return None
    before, then = out.shape[:axis], out.shape[axis + 1 :]

    def onto(rows: Tensor) -> Tensor:
        return rows.reshape(*before, rows.shape[form.axis], *then)

    return Noted(form._replace(axis=axis, probe=onto(form.probe)), out, onto)


def _scaled(form: Form, its: Layout, origin: _Origin) -> Any:
    """F18: times a number or a tensor (), or of a head without bias times one for each row."""
    is_division = origin.func is aten.div.Tensor
    if is_division and origin.place:
        return None
    out, other = origin.layout(), origin.other
    if isinstance(other, Tensor) and other.dim():
        return _scaled_by_row(form, origin, out, -1 if is_division else 1)
    if isinstance(other, Tensor) and other.device.type == "cpu" and not other.requires_grad:
        other = other.item()
    if isinstance(other, Tensor):
        if form.inner is not None or form.sign or other.is_complex():
            return None
        factor = other, -1 if is_division else 1
        return Noted(form._replace(scale=form.scale.times(1, 1, factor)), out)
    if isinstance(other, complex) or not (math.isfinite(other) and other):
        return None
    if form.sign:
        return Noted(form._replace(sign=-form.sign), out) if other == -1 else None
    over, under = (1.0, other) if is_division else (other, 1.0)
    return Noted(form._replace(scale=form.scale.times(over, under)), out)


def _scaled_by_row(form: Form, origin: _Origin, out: Layout, power: int) -> Any:
    other, its = origin.other, origin.parent.layout
    has_bias = bool(form.row) or origin.parent.call.operands[2] is not None
    if has_bias or form.inner is not None or form.sign or out.shape != its.shape:
        return None
    shape = [1] * (its.dim() - other.dim()) + [*other.shape]
    if shape[form.axis] != 1 or not other.is_floating_point():
        return None
    rows = [1 if d == form.axis else size for d, size in enumerate(its.shape)]

    def row_scale() -> Tensor:
        scale = other.to(torch.promote_types(wide_type(other.dtype), out.dtype))
        return (scale if power == 1 else 1 / scale).expand(rows)

    return Noted(form._replace(is_by_row=True), out, None, row_scale)


def _shifted(form: Form, its: Layout, origin: _Origin) -> Any:
    """Plus one row, for all: it goes into the bias."""
    r, out = origin.other, origin.layout()
    is_logits = not (form.scale or form.inner is not None or form.sign or form.is_by_row)
    if not is_logits or origin.kwargs or not isinstance(r, Tensor) or not r.is_floating_point():
        return None
    shape = [1] * (its.dim() - r.dim()) + [*r.shape]
    C = its.shape[form.axis]
    if out.shape != its.shape or not r.numel() == C == shape[form.axis]:
        return None
    return Noted(form._replace(row=(*form.row, r)), out)


def _negated(form: Form, its: Layout, origin: _Origin) -> Any:
    out = origin.layout()
    if form.sign:
        return Noted(form._replace(sign=-form.sign), out)
    return Noted(form._replace(scale=form.scale.times(-1, 1)), out)


def _capped(form: Form, its: Layout, origin: _Origin) -> Any:
    """F19 but for the factor: tanh of scaled logits."""
    if form.inner is not None or form.sign or form.is_by_row:
        return None
    return Noted(form._replace(inner=form.scale, scale=Scale()), origin.layout())


def _normalized(form: Form, its: Layout, origin: _Origin) -> Any:
    """F7: logarithms of the softmax over the classes."""
    if form.sign or origin.args[1] % its.dim() != form.axis:
        return None
    return Noted(form._replace(sign=1), origin.layout())


INDEXING = (aten.index.Tensor, aten.index_select.default)

STEPS: dict[Any, Any] = {
    **dict.fromkeys([aten.alias.default, aten.detach.default, aten.clone.default], _copied),
    aten._to_copy.default: _copied,
    **dict.fromkeys([aten.view.default, aten._unsafe_view.default], _reshaped),
    **dict.fromkeys([aten.slice.Tensor, aten.select.int], _moved),
    **dict.fromkeys([aten.transpose.int, aten.permute.default, aten.t.default], _moved),
    **dict.fromkeys([aten.unsqueeze.default, aten.squeeze.default], _reshaped),
    **dict.fromkeys([aten.squeeze.dim, aten.squeeze.dims], _reshaped),
    **dict.fromkeys([aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int], _moved),
    **dict.fromkeys(INDEXING, _moved),
    **dict.fromkeys([aten.mul.Tensor, aten.div.Tensor], _scaled),
    aten.neg.default: _negated,
    aten.add.Tensor: _shifted,
    aten.tanh.default: _capped,
    aten._log_softmax.default: _normalized,
}
# need a type and a device only
FACTORIES = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
FACTORIES |= {aten.new_empty.default, aten.new_empty_strided.default}


# Losses


class _Rows(NamedTuple):
    """What a loss needs in place of logits."""

    features: Tensor  # (*, in_features), in the order of the logits' other axes
    weight: Tensor
    bias: Tensor | None
    scale: Any
    cap: float | None
    dtype: torch.dtype  # of the logits
    row: Any  # that is added to each
    row_scale: Tensor | None  # a factor of each

    def any_class(self) -> Tensor:
        """A target of each row, where it does not matter which."""
        shape = self.features.shape[:-1]
        return torch.zeros(shape, dtype=torch.int64, device=self.features.device)

    def head(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        base: float = math.e,
        logit_scale: Any = 1.0,
        softcap: float | None = None,
    ) -> Any:
        cap = self.cap if softcap is None else softcap
        return _head.prepare_head(
            self.features, self.weight, target, self.bias,
            TargetOptions(weight, ignore_index, label_smoothing),
            _head.LogitOptions(base, self.scale * logit_scale, cap),
            _head.LogitSource(self.dtype, self.row, self.row_scale),
        )


def _obstacle(z: DeferredLogits) -> str | None:
    """Why a loss may not pass by what is between it and the head."""
    call, node = z.step.call, _node(z)
    if call.watched or not (torch.is_grad_enabled() and z.requires_grad):
        return call.watched
    for step in reversed(z.step.path()):
        origin = step.origin
        assert origin is not None
        name = origin.func.overloadpacket.__name__.replace("_", "")
        is_theirs = node is not None and not isinstance(node, BackwardCFunction)
        if not is_theirs or re.sub(r"Backward\d+$", "", node.name()).lower() != name:
            found = "nothing" if node is None else node.name()
            return f"{found} stands between head and loss, where {origin.func} was expected"
        node = node.next_functions[origin.place][0]
    if node is not call.node:
        return f"{'nothing' if node is None else node.name()} stands between head and loss"
    return None


def _rows(z: DeferredLogits, is_log: bool, axis: int) -> Any:
    """The rows of a loss over the classes at `axis`, of logits or of their logarithms."""
    step, form = z.step, z.step.form
    call = step.call
    is_of_these = bool(form.sign) == is_log and form.axis == axis % z.dim()
    if call.is_computed or _is_traced() or not is_of_these:
        return NotImplemented
    obstacle = _obstacle(z)
    if obstacle is not None:
        call.compute(obstacle)
        return NotImplemented
    call.check()

    def of(v: Any, has_gradient: bool = z.requires_grad) -> Any:
        """Of logits without a gradient nothing has one."""
        return v if has_gradient or not isinstance(v, Tensor) else v.detach()

    x, W, b = (of(v, z.requires_grad and call.node is not None) for v in call.operands)
    if z.dtype == torch.float64:
        x, W, b = (v if v is None else v.double() for v in (x, W, b))
    row = sum(of(r).flatten().to(wide_type(W.dtype)) for r in form.row) if form.row else None
    rows, row_scale = x, None
    for s in step.path():
        if s.noted.onto is not None:
            rows = s.noted.onto(rows)
            row_scale = None if row_scale is None else s.noted.onto(row_scale)
        if s.noted.row_scale is not None:
            its = of(s.noted.row_scale())
            row_scale = its if row_scale is None else row_scale * its
    for v, width in ((rows, x.shape[-1]), (row_scale, 1)):
        expected = [width if d == form.axis else size for d, size in enumerate(z.shape)]
        if v is not None and [*v.shape] != expected:
            return NotImplemented  # the features' axis was met by what leaves the classes' alone
    scale, cap = of(form.scale.value(z.dtype)), None
    if form.inner is not None:  # t tanh(s z) = |t| tanh((s t) z / |t|)
        cap, inner = abs(scale), form.inner.times(form.scale.over, form.scale.under)
        scale = of(inner.value(z.dtype))
    if row_scale is not None:
        row_scale = row_scale.movedim(form.axis, -1)
    return _Rows(rows.movedim(form.axis, -1), W, b, scale, cap, z.dtype, row, row_scale)


def _loss(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of a function of deferred logits, which it computes without them if it can."""

    def loss(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DeferredLogits):
            return NotImplemented
        is_wide = is_autocast(input)  # the loss; the product is what it was at the head
        with without_autocast(input):
            result = rule(func, input, is_wide, *args, **kwargs)
        if result is not NotImplemented:
            call = input.step.call
            call.log.fused += 1
            call.is_passed_by |= torch.is_grad_enabled() and input.requires_grad
        return result

    return loss


@_loss
def _cross_entropy(
    func: Any,
    input: DeferredLogits,
    is_wide: bool,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """F14, F15 in place of `cross_entropy` or, of logarithms, of `nll_loss`."""
    is_log = func is theirs.nll_loss
    if not isinstance(target, Tensor):
        return NotImplemented
    form, axis = input.step.form, min(input.dim() - 1, 1)
    is_changed = options.get("softcap") is not None or _head.is_scaled(options.get("logit_scale", 1))
    if form.sign < 0 or (form.inner is not None and is_changed):
        return NotImplemented
    is_distribution = target.shape == input.shape and target.is_floating_point()
    if is_distribution and not is_log:
        check.probabilities(target, ignore_index)
        target = target.movedim(axis, -1)
    elif target.shape != form.shape_of_rows() or target.dtype not in (torch.int64, torch.uint8):
        return NotImplemented
    rows = _rows(input, is_log, axis)
    if rows is NotImplemented:
        return NotImplemented
    if is_wide:
        rows = rows._replace(dtype=wide_type(rows.dtype))
        target, weight = wide(target), None if weight is None else wide(weight)
    head = rows.head(
        target,
        weight=weight,
        ignore_index=None if is_distribution else ignore_index,
        label_smoothing=label_smoothing,
        **options,
    )
    reduction = check.reduction(reduction, size_average, reduce)
    return head.compute_loss(reduction, z_loss, return_stats)


@_loss
def _gather(
    func: Any, input: DeferredLogits, is_wide: bool, dim: Any, index: Any, **kwargs: Any
) -> Any:
    """One class of each row: of logarithms F22, of logits F1."""
    form, axis = input.step.form, input.step.form.axis
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or "out" in kwargs:
        return NotImplemented
    if [*index.shape] != [1 if d == axis else size for d, size in enumerate(input.shape)]:
        return NotImplemented
    rows = _rows(input, bool(form.sign), dim)
    if rows is NotImplemented:
        return NotImplemented
    try:
        head = rows.head(index.squeeze(axis), ignore_index=torch.iinfo(torch.int64).min)
    except IndexError:  # `gather` has a RuntimeError of its own
        return NotImplemented
    if form.sign:
        result = form.sign * head.compute_log_probs(False)
    else:
        result = head.compute_class_logits()
    return result.to(input.dtype).unsqueeze(axis)


def _only_axis(dim: Any) -> int | None:
    axes = dim if isinstance(dim, list | tuple) else [dim]
    return axes[0] if len(axes) == 1 and isinstance(axes[0], int) else None


@_loss
def _summed(
    func: Any,
    input: DeferredLogits,
    is_wide: bool,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    **kwargs: Any,
) -> Any:
    """The sum or mean over the classes, of logarithms: a cross entropy with every class alike."""
    form, axis, dtype = input.step.form, _only_axis(dim), dtype or input.dtype
    if kwargs or axis is None or torch.promote_types(dtype, input.dtype) != dtype:
        return NotImplemented
    rows = _rows(input, True, axis)
    if rows is NotImplemented:
        return NotImplemented
    head = rows._replace(dtype=dtype).head(rows.any_class(), label_smoothing=1.0)
    factor = -form.sign * (1 if func in MEANS else input.shape[form.axis])
    result = factor * head.compute_loss("none", 0.0, False).to(dtype)
    return result.unsqueeze(form.axis) if keepdim else result


@_loss
def _log_sum_exp(
    func: Any, input: DeferredLogits, is_wide: bool, dim: Any, keepdim: bool = False, **kwargs: Any
) -> Any:
    """F7's denominator: the cross entropy without a class."""
    form, axis = input.step.form, _only_axis(dim)
    if kwargs or axis is None or (is_wide and input.dtype.itemsize < 4):
        return NotImplemented  # of half precision autocast makes another type on some devices
    rows = _rows(input, False, axis)
    if rows is NotImplemented:
        return NotImplemented
    result = rows.head(rows.any_class()).compute_log_sum_exp().to(input.dtype)
    return result.unsqueeze(form.axis) if keepdim else result


# Who watches logits; who reads their memory


def _watched(func: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
    """Whoever is to hear of the gradient in the logits: from then on they are plain."""
    if isinstance(z, DeferredLogits):
        call = z.step.call
        name = _name(func)
        is_fsdp = any(
            (getattr(v, "__module__", None) or "").startswith("torch.distributed") for v in args
        )
        if call.is_passed_by and func in HOOKS and not is_fsdp:
            raise RuntimeError(
                f"{name} on logits of head {call.log.name!r} after their loss was computed, "
                "which passed them by: no gradient will come. Call it before the loss, or "
                "swap(model, head=None)"
            )
        call.watched = call.watched or f"{name} of logits"
    return NotImplemented


def _gradient(func: Any, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    for z in inputs if isinstance(inputs, list | tuple) else [inputs]:
        if isinstance(z, DeferredLogits) and z.step.call.is_passed_by:
            raise RuntimeError(
                f"the gradient in logits of head {z.step.call.log.name!r} is asked for, but their "
                "loss was computed past them: call logits.retain_grad() before the loss, or "
                "swap(model, head=None)"
            )
    return NotImplemented


def _grad(func: Any, z: Any) -> Any:
    """PyTorch would warn too, but not after a `backward(inputs=[z])`."""
    if not isinstance(z, DeferredLogits) or not z.step.call.is_passed_by:
        return NotImplemented
    warnings.warn(
        f"the gradient in logits of head {z.step.call.log.name!r} is read, but their loss was "
        "computed past them: call logits.retain_grad() before the loss, or swap(model, head=None)",
        stacklevel=_user_frame()[0],
    )
    return None


def _eager(func: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
    """Logits that the user takes out of the graph, to keep: the numbers of now."""
    if isinstance(z, DeferredLogits):
        z.step.call.compute(_name(func))
    return NotImplemented


def _refused(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("deferred logits have no memory that could be set: use copy_()")


def _read(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What reads memory gets tensors that have some."""
    args, kwargs = tree_map(lambda v: _ordinary(v, func), (args, kwargs))
    return func(*args, **kwargs)


HOOKS = (Tensor.register_hook, Tensor.retain_grad)
MEANS = (torch.mean, Tensor.mean)
READ_GRAD_FN, READ_GRAD, READ_DATA = (
    getattr(Tensor, name).__get__ for name in ("grad_fn", "grad", "data")
)

FUNCTIONS: dict[Any, Any] = {
    theirs.cross_entropy: _cross_entropy,
    ours.cross_entropy: _cross_entropy,
    theirs.nll_loss: _cross_entropy,  # whose arguments begin with these
    **dict.fromkeys([torch.gather, Tensor.gather], _gather),
    **dict.fromkeys([torch.sum, Tensor.sum, *MEANS], _summed),
    **dict.fromkeys([torch.logsumexp, torch.special.logsumexp, Tensor.logsumexp], _log_sum_exp),
    **dict.fromkeys([*HOOKS, READ_GRAD_FN], _watched),
    torch.autograd.grad: _gradient,
    READ_GRAD: _grad,
    **dict.fromkeys([Tensor.detach, torch.detach, READ_DATA], _eager),
    getattr(Tensor, "data").__set__: _refused,  # noqa: B009 (mypy knows no descriptor)
    **{
        getattr(Tensor, name): _read
        for name in (
            *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "_typed_storage"),
            *("share_memory_", "is_shared", "apply_", "map_", "__array__", "__dlpack__"),
            *("__deepcopy__", "__reduce_ex__", "__repr__", "__format__", "new_tensor"),
        )
    },
}
