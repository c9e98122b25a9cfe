"""Styles for `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from torch_nnmath.nn import LinearCrossEntropyLoss

__all__ = ["VocabularyParallel"]


class VocabularyParallel(ParallelStyle):
    """Splits the classes of a `nn.LinearCrossEntropyLoss` over the ranks of a mesh (F24).

    Args:
        input_layout: how each rank has the features: `Replicate()` (default), all of them; or
            `Shard(axis)`, some tokens (sequence parallel), which are gathered once.
        use_local_output: whether results are plain tensors (default): a loss that every rank has,
            or the results of the rows of the rank's features. Else DTensors.

    Weight and bias become DTensors with the classes split. Features and target that are plain
    tensors are taken as `input_layout` says, with as many tokens on each rank; DTensors as they are
    placed.

    Raises:
        TypeError: if the module is not a `nn.LinearCrossEntropyLoss`.
        ValueError: if the mesh has more than one dimension, or the module several outputs.

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
        if not isinstance(module, LinearCrossEntropyLoss):
            raise TypeError(
                "VocabularyParallel needs a torch_nnmath.nn.LinearCrossEntropyLoss, got "
                f"{type(module).__name__}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"VocabularyParallel needs one mesh dimension, got {device_mesh}: pass mesh['name']"
            )
        if module.out_features:
            raise ValueError(
                f"VocabularyParallel splits a head with one output, got {module.out_features}"
            )
        for name, parameter in list(module.linear.named_parameters()):
            split = distribute_tensor(parameter, device_mesh, [Shard(0)])
            new_parameter = torch.nn.Parameter(split, requires_grad=parameter.requires_grad)
            module.linear.register_parameter(name, new_parameter)

        def place_inputs(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(self._place(x, device_mesh) for x in inputs)

        def localise_output(_module: Any, _inputs: Any, output: Any) -> Any:
            return self._localise(output)

        module.register_forward_pre_hook(place_inputs)
        if self.use_local_output:
            module.register_forward_hook(localise_output)
        return module

    def _place(self, x: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, DTensor):
            return x
        return DTensor.from_local(x, mesh, [self.input_layout], run_check=False)

    def _localise(self, output: Any) -> Any:
        if isinstance(output, DTensor):
            return output.to_local()
        if isinstance(output, tuple):  # the loss and `LossStats`
            loss, stats = output
            return self._localise(loss), type(stats)(*map(self._localise, stats))
        return output
