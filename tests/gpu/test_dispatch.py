"""Which path a call takes, and gradients that the forward computed."""

from unittest import mock

import pytest
import torch
from conftest import OperationRecorder
from torch.func import vmap

from torch_nnmath import functional, kernels
from torch_nnmath.kernels import dispatch, scaling

LARGE = 2**15 + 1
UNFIT_TYPES = "block by block: the types of features and weight do not fit together."


class OnGpu:
    """Stands for a tensor on a GPU where only type, size and device are asked for."""

    def __init__(self, dtype: torch.dtype, size: int = LARGE):
        self.dtype, self.size = dtype, size
        self.device, self.is_cpu, self.is_cuda = torch.device("cuda"), False, True

    def numel(self) -> int:
        return self.size

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@pytest.fixture
def tensors_on_gpu(monkeypatch):
    """Makes the rules take `OnGpu` for a plain tensor."""
    monkeypatch.setattr(dispatch, "Tensor", (torch.Tensor, OnGpu))
    monkeypatch.setattr(dispatch, "PLAIN_TYPES", (torch.Tensor, OnGpu))
    monkeypatch.setattr(dispatch._torch, "is_legacy_batch", lambda x: False)


@pytest.mark.parametrize(
    ("dtype", "has_triton", "size", "sentence"),
    [
        (torch.float32, True, LARGE, "is computed by a Triton kernel."),
        (torch.bfloat16, True, LARGE, "is computed by a Triton kernel."),
        (torch.float64, True, LARGE, "as it is written: a type is not float32"),
        (torch.float32, False, LARGE, "as it is written: Triton is not installed."),
        (torch.float32, True, 100, "as it is written: no tensor has more than 32768 entries"),
    ],
)
def test_explain_names_the_path_on_a_gpu_and_the_reason(
    tensors_on_gpu, monkeypatch, dtype, has_triton, size, sentence
):
    monkeypatch.setattr(dispatch, "has_triton", lambda: has_triton)
    a = OnGpu(dtype, size)
    assert sentence in kernels.explain("tanh_product", a, a)
    with torch.no_grad():
        assert dispatch.may_use_kernel([a, a]) == sentence.endswith("Triton kernel.")


def test_explain_of_an_operator_that_only_gpus_have(tensors_on_gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    cpu, gpu = torch.rand(2, LARGE), OnGpu(torch.float32)
    sentences = [kernels.explain("entropy", None, z, 1, 2.0, True) for z in (cpu, gpu)]
    assert sentences[0].endswith("as it is written: there is a kernel for GPUs only.")
    assert sentences[1] == "entropy is computed by a Triton kernel."
    with torch.no_grad():
        assert not dispatch.may_use_kernel([cpu], is_gpu_only=True)
        assert dispatch.may_use_kernel([gpu], is_gpu_only=True)


def test_explain_of_an_operator_without_kernels_for_gpus(tensors_on_gpu):
    x = OnGpu(torch.float32, 1)
    sentence = "divergence is computed by PyTorch operations, block by block"
    assert kernels.explain("divergence", torch.rand(2, 3)) == f"{sentence}."
    assert kernels.explain("divergence", x) == f"{sentence}: it has no Triton kernel."


def test_explain_of_an_unknown_operator_raises():
    with pytest.raises(ValueError, match="no operator torch_nnmath::tanh"):
        kernels.explain("tanh", torch.rand(3))


def test_explain_names_who_watches_a_call():
    a = torch.rand(LARGE)
    assert kernels.explain("tanh_product", a, a).endswith("by PyTorch operations, block by block.")
    sentences = []

    def note(v):
        sentences.append(kernels.explain("tanh_product", v, v))
        return v

    vmap(note)(a.expand(2, -1))
    with OperationRecorder():
        note(a)
    note(a.as_subclass(Subclass))
    reasons = [s.split(": ")[1] for s in sentences]
    assert reasons == [
        "a transform or forward mode is active.",
        "a dispatch mode observes the call.",
        "an argument is a tensor subclass.",
    ]


class Subclass(torch.Tensor):
    """A tensor subclass."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "matrix products and Triton kernels."),
        ({"has_triton": False}, "PyTorch operations on rows, since Triton is not installed."),
        ({"needs_t": True}, "block by block: the target needs a gradient."),
        (
            {"W": torch.float16},
            UNFIT_TYPES,
        ),
        (
            {"W": torch.float64},
            UNFIT_TYPES,
        ),
        ({"size": 0}, "block by block: a tensor is empty."),
    ],
)
def test_explain_of_the_head_names_what_its_plan_cannot(
    tensors_on_gpu, monkeypatch, change, reason
):
    has_triton = change.get("has_triton", True)
    monkeypatch.setattr(dispatch, "has_triton", lambda: has_triton)
    x = OnGpu(torch.bfloat16, change.get("size", 1))
    W = OnGpu(change.get("W", torch.bfloat16), 1)
    arguments = x, W, *[None] * 11, [False] * 2, [*[True] * 4, change.get("needs_t", False)]
    assert kernels.explain("head", *arguments).endswith(reason)


@pytest.mark.parametrize("dC", [1.0, -2.5, float("inf"), float("nan")])
def test_scaled_gradient_of_ignored_rows_is_0_on_every_device(dC):
    gradient, keep = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[True], [False]])
    expected = torch.where(keep, gradient * dC, 0)
    with mock.patch.object(scaling, "are_plain_tensors", return_value=False):
        result = scaling.scale_gradient_(gradient.clone(), torch.tensor(dC), keep)
    assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("n", [3, 2**15 + 1])
def test_mean_of_integer_errors_equals_that_of_their_floats(n):
    a, t = torch.arange(n) % 7, torch.arange(n) % 5
    with torch.no_grad():
        loss = functional.mse_loss(a, t, weight=torch.ones(n))
    assert loss == functional.mse_loss(a.double(), t.double(), weight=torch.ones(n)).float()
