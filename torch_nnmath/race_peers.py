"""The heads of other libraries in the race: how each is loaded and called, and what it promises."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_nnmath import _torch, functional
from torch_nnmath.bench.works import LIGER, eager_head

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
IGNORE_INDEX = -100
NAN_ROW = "nan in an ignored row"
HIGHER_MODES = (
    "second order",
    "forward mode",
    "forward over reverse",
    "torch.func.vjp",
    "vmap",
    "per-sample gradients",
    "batched upstream gradients",
)


@dataclass(frozen=True)
class Peer:
    """A head of another library, and how its documentation says to call it.

    `load` imports the library and returns the head. `limits` has the rows that the peer does not
    promise, each with the source. `dtype` is the most precise type in which it computes.
    `is_triton` says that it needs a GPU or the interpreter. `differentiates_weight` is False if
    autograd does not deliver the weight's gradient.
    """

    load: Callable[[], Head]
    call: str
    packages: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    is_triton: bool = False
    differentiates_weight: bool = True


def import_head(module: str, name: str, **options: Any) -> Callable[[], Head]:
    """Returns a function that imports a head; the checker compiles the head without the import."""

    def load() -> Head:
        function = getattr(importlib.import_module(module), name)
        return functools.partial(function, **options) if options else function

    return load


def load_compiled_head() -> Head:
    _torch.disable_donated_buffers()
    return torch.compile(eager_head, fullgraph=True)  # never falls back to eager calls


def load_compiled_cce() -> Head:
    _torch.disable_donated_buffers()
    return import_head("cut_cross_entropy", "linear_cross_entropy", impl="torch_compile")()


def load_chunked_head(**options: Any) -> Head:
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4, **options)

    def chunked_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, W, t, options=chunks)

    return chunked_head


def load_trl_head() -> Head:
    select = importlib.import_module("trl.trainer.utils").selective_log_softmax

    def trl_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
        keep = t != IGNORE_INDEX
        log_probs = select(F.linear(x, W), t.clamp(min=0), row_mask=keep)
        return -log_probs.sum() / keep.sum().clamp(min=1)

    return trl_head


def load_deepspeed_head() -> Head:
    module = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    tiled_loss = module.TiledFusedLogitsLoss

    def deepspeed_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
        def compute_loss(_: None, x: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, W), t, reduction="sum")

        total = tiled_loss.apply(compute_loss, None, x[None], t[None], None, 2, [W], "sum")
        return total / (t != IGNORE_INDEX).sum().clamp(min=1)

    return deepspeed_head


def load_fla_head() -> Head:
    module = importlib.import_module("fla.modules.fused_linear_cross_entropy")
    loss = module.fused_linear_cross_entropy_loss
    return lambda x, W, t: loss(x, t, W)


UNMENTIONED = "its documentation does not mention it"
NOT_IN_DOCUMENTATION = {**dict.fromkeys(HIGHER_MODES, UNMENTIONED), NAN_ROW: UNMENTIONED}
WITHOUT_DONATED_BUFFERS = ", with donated_buffer = False, as PyTorch's error message advises"
CHUNKED_NOTE = "PyTorch's documentation of linear_cross_entropy, limitations of the chunked path"
CHUNKED_LIMITS = {
    **dict.fromkeys(
        [name for name in HIGHER_MODES if name != "batched upstream gradients"], CHUNKED_NOTE
    ),
    "compile, full graph": CHUNKED_NOTE,
    NAN_ROW: UNMENTIONED,
}
RETAIN_NOTE = "PyTorch's documentation of LinearCrossEntropyOptions, allow_retain_graph"
CHUNKED_CALL = (
    "F.linear_cross_entropy(x, W, t, options=LinearCrossEntropyOptions(batch_chunk_size=4, {}))"
)

CHUNKED_OPTIONS: dict[str, dict[str, Any]] = {
    "chunked accurate": {"acc_policy": "accurate"},
    "chunked balanced": {"acc_policy": "balanced"},
    "chunked compact": {"acc_policy": "compact"},
    "chunked retain": {"acc_policy": "auto", "allow_retain_graph": True},
}

PEERS = {
    "ours": Peer(
        lambda: functional.linear_cross_entropy,
        "torch_nnmath.functional.linear_cross_entropy(x, W, t)",
    ),
    "PyTorch": Peer(
        lambda: eager_head, "F.cross_entropy(F.linear(x, W), t)", limits={NAN_ROW: UNMENTIONED}
    ),
    "torch.compile": Peer(
        load_compiled_head,
        "torch.compile of F.cross_entropy(F.linear(x, W), t), with Inductor"
        + WITHOUT_DONATED_BUFFERS,
        limits={
            "second order": "PyTorch's error message: no double backward of compiled functions",
            "forward over reverse": "PyTorch's error message: no double backward of compiled "
            "functions",
            NAN_ROW: UNMENTIONED,
        },
    ),
    **{
        name: Peer(
            functools.partial(load_chunked_head, **options),
            CHUNKED_CALL.format(", ".join(f"{key}={value!r}" for key, value in options.items())),
            limits=CHUNKED_LIMITS
            if options.get("allow_retain_graph")
            else {**CHUNKED_LIMITS, "second backward, accumulation": RETAIN_NOTE},
        )
        for name, options in CHUNKED_OPTIONS.items()
    },
    "TRL": Peer(
        load_trl_head,
        "trl.trainer.utils.selective_log_softmax(F.linear(x, W), t, row_mask=t != -100)",
        ("trl",),
        NOT_IN_DOCUMENTATION,
    ),
    "DeepSpeed": Peer(
        load_deepspeed_head,
        'TiledFusedLogitsLoss.apply(loss_fn, None, x[None], t[None], None, 2, [W], "sum") over '
        "the number of kept rows; it adds the weight's gradient to W.grad in its forward, so x "
        "alone is differentiated",
        ("deepspeed",),
        {
            **NOT_IN_DOCUMENTATION,
            "second backward, accumulation": UNMENTIONED,
        },
        differentiates_weight=False,
    ),
    "CCE compile": Peer(
        load_compiled_cce,
        'cut_cross_entropy.linear_cross_entropy(x, W, t, impl="torch_compile")'
        + WITHOUT_DONATED_BUFFERS,
        ("cut-cross-entropy",),
        NOT_IN_DOCUMENTATION,
        torch.float32,
    ),
    "CCE": Peer(
        import_head("cut_cross_entropy", "linear_cross_entropy"),
        "cut_cross_entropy.linear_cross_entropy(x, W, t)",
        ("cut-cross-entropy",),
        NOT_IN_DOCUMENTATION,
        torch.float32,
        is_triton=True,
    ),
    "Liger": Peer(
        import_head(LIGER, "liger_fused_linear_cross_entropy"),
        "liger_kernel.transformers.functional.liger_fused_linear_cross_entropy(x, W, t)",
        ("liger-kernel",),
        NOT_IN_DOCUMENTATION,
        torch.float32,
        is_triton=True,
    ),
    "fla": Peer(
        load_fla_head,
        "fla.modules.fused_linear_cross_entropy.fused_linear_cross_entropy_loss(x, t, W)",
        ("flash-linear-attention", "fla-core"),
        NOT_IN_DOCUMENTATION,
        torch.float32,
        is_triton=True,
    ),
    "QuACK": Peer(
        import_head("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
        "quack.linear_cross_entropy.chunked_linear_cross_entropy(x, W, t)",
        ("quack-kernels",),
        NOT_IN_DOCUMENTATION,
        torch.float32,
    ),
}
