"""Training on several devices: a head whose classes they share, and the mean over all tokens.

`VocabularyParallel` is a style for PyTorch's `parallelize_module`, `count_tokens_per_rank` gives
the divisor of the mean, `enable_forward_mode` the forward mode that DTensors lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from torch_nnmath import _torch
from torch_nnmath._sharding import Layout, Sharding, make_dtensor, read_layout, take_local
from torch_nnmath.deferred import split
from torch_nnmath.nn import LinearCrossEntropyLoss

__all__ = ["VocabularyParallel", "count_tokens_per_rank", "enable_forward_mode"]


class VocabularyParallel(ParallelStyle):
    """Splits the classes of a head over the ranks of a mesh (F24).

    The head is a `nn.LinearCrossEntropyLoss`, or a Linear that computes logits.

    Args:
        input_layout: how each rank has the features: `Replicate()` (default), all of them; or
            `Shard(axis)`, some tokens (sequence parallel), which are gathered once.
        use_local_output: whether results are plain tensors (default): a loss that every rank has,
            or the results of the rows of the rank's features. Else DTensors.

    Weight and bias become DTensors with the classes split. Features and target may be plain
    tensors, placed as `input_layout` says, with the same number of tokens on each rank; or
    DTensors, which keep their placements.

    The logits of a Linear are a plain tensor, which every rank has, for all tokens and classes. If
    `swap` made the Linear the head, before or after, they are deferred, and a loss of them is
    computed over the split classes. All ranks must then apply the same operations to them.

    Raises:
        TypeError: if the module is neither a `nn.LinearCrossEntropyLoss` nor a Linear.
        ValueError: if the mesh has more than one dimension, the loss several outputs, or the
            results of a Linear are to be DTensors.

    >>> VocabularyParallel(input_layout=Shard(0)).use_local_output
    True
    """

    def __init__(self, *, input_layout: Placement | None = None, use_local_output: bool = True):
        super().__init__()
        self.input_layout = Replicate() if input_layout is None else input_layout
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layout={self.input_layout}, "
            f"use_local_output={self.use_local_output})"
        )

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        if not isinstance(module, LinearCrossEntropyLoss | torch.nn.Linear):
            raise TypeError(
                "VocabularyParallel needs a torch_nnmath.nn.LinearCrossEntropyLoss or a "
                f"torch.nn.Linear, got {type(module).__name__}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"VocabularyParallel needs one mesh dimension, got {device_mesh}: pass mesh['name']"
            )
        if isinstance(module, torch.nn.Linear):
            self._split_linear(module, device_mesh)
        else:
            self._split_loss(module, device_mesh)
        return module

    def _split_linear(self, linear: torch.nn.Linear, mesh: DeviceMesh) -> None:
        if not self.use_local_output:
            raise ValueError("VocabularyParallel gives the logits of a Linear as a plain tensor")
        _split_parameters(linear, mesh)

        def gather_features(_module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            def gather(input: Tensor) -> Tensor:
                x = self._place(input, mesh)
                sharding = Sharding(mesh, 0, (Replicate(),), x.shape[:-1], linear.out_features)
                return sharding.give_rows(sharding.take_rows("input", x))

            return tuple(map(gather, inputs)), {name: gather(x) for name, x in options.items()}

        linear.register_forward_pre_hook(gather_features, with_kwargs=True)
        linear.register_forward_hook(split.give_plain_logits)

    def _split_loss(self, module: LinearCrossEntropyLoss, mesh: DeviceMesh) -> None:
        if module.out_features:
            raise ValueError(
                f"VocabularyParallel splits a head with one output, got {module.out_features}"
            )
        _split_parameters(module.linear, mesh)

        def place_inputs(_module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            places = {name: self._place(x, mesh) for name, x in options.items()}
            return tuple(self._place(x, mesh) for x in inputs), places

        def localise_output(_module: Any, _inputs: Any, output: Any) -> Any:
            return self._localise(output)

        module.register_forward_pre_hook(place_inputs, with_kwargs=True)
        if self.use_local_output:
            module.register_forward_hook(localise_output)

    def _place(self, x: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(x, torch.Tensor) or read_layout("input", x) is not None:
            return x
        layout = self.input_layout if x.dim() else Replicate()
        return make_dtensor(x, Layout(mesh, (layout,)))

    def _localise(self, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            layout = read_layout("output", output)
            # a copy, since FSDP2 warns of outputs that are views
            return output if layout is None else take_local(output, layout).clone()
        if isinstance(output, tuple):  # the loss and `LossStats`
            loss, stats = output
            return self._localise(loss), type(stats)(*map(self._localise, stats))
        return output


def _split_parameters(linear: torch.nn.Linear, mesh: DeviceMesh) -> None:
    """Splits the classes, the first axis of weight and bias."""
    for name, parameter in list(linear.named_parameters()):
        shards = distribute_tensor(parameter, mesh, [Shard(0)])
        new_parameter = torch.nn.Parameter(shards, requires_grad=parameter.requires_grad)
        linear.register_parameter(name, new_parameter)


def count_tokens_per_rank(
    targets: Tensor | Sequence[Tensor],
    *,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The divisor that makes a step's loss the mean over all tokens that are not ignored (F3).

    Args:
        targets: class indices of any shape that this rank has in the step: a tensor, or one for
            each micro-batch whose gradients are accumulated.
        ignore_index: the class index of tokens that do not count.
        weight: class weights (C) of the loss, if it has any; then a token counts as its weight.
        group: the ranks with different tokens, over which gradients are averaged; all by default.
            With DDP or FSDP on a mesh of several dimensions, `mesh.get_group("data")`.

    Returns the number of all tokens divided by the number of ranks, since DDP and FSDP2 average the
    gradients over `group`: a scalar in float64, which is 0 if no token counts. Give it to the loss
    of each micro-batch as `divisor`, or divide the loss with reduction="sum" by it. Every rank of
    `group` must call this function.

    Without `torch.distributed`, or if it is not initialised, the count is that of this process.

    Raises:
        TypeError: if a target is a DTensor, since its loss is a sum over the mesh already, or is
            not of an integer type.
        ValueError: if there is no target.

    >>> count_tokens_per_rank([torch.tensor([2, -100, 0]), torch.tensor([-100, 1])])
    tensor(3., dtype=torch.float64)
    """
    targets = [targets] if isinstance(targets, Tensor) else list(targets)
    if not targets:
        raise ValueError("count_tokens_per_rank needs the target of at least one micro-batch")
    for y in targets:
        if isinstance(y, DTensor):
            raise TypeError(
                "count_tokens_per_rank got a DTensor: the loss of DTensors is over all ranks of "
                "their mesh, so divide its sum by (target != ignore_index).sum().full_tensor()"
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"targets must be class indices of an integer type, got {y.dtype}")
    counts = [_count_tokens(y, ignore_index, weight) for y in targets]
    total = torch.stack(counts).sum()
    if not dist.is_available() or not dist.is_initialized():
        return total
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def enable_forward_mode() -> None:
    """Enables forward mode of DTensors: `forward_ad.make_dual`, `torch.func.jvp`, `jacfwd`.

    PyTorch raises a NotImplementedError there, since DTensors lack the rule of one operator that
    `make_dual` calls. This function registers the rule for all DTensors of the process, by
    PyTorch's experimental `register_sharding`. Call it before the first dual DTensor is made.
    """
    _torch.support_dual_dtensors()


def _count_tokens(y: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    keep = y != ignore_index
    if weight is None:
        return keep.sum().to(torch.float64)
    return weight.detach().to(torch.float64)[y.masked_fill(~keep, 0)].masked_fill(~keep, 0).sum()
