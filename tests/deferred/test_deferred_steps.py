"""The steps: layouts are known without values, and later changes of operands have no effect."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import (
    F64,
    MARKS,
    B,
    C,
    T,
    assert_agree,
    ce,
    compute_results,
    make_inputs,
    make_pair,
    make_params,
)

pytestmark = MARKS


AMBIGUOUS: dict[str, Any] = {
    "all classes": lambda z: z[..., : z.shape[-1]],
    "narrow": lambda z: z.narrow(-1, 0, z.shape[-1]),
    "from the end": lambda z: z[:, :, -z.shape[-1] :],
    "split in one": lambda z: z.split(z.shape[-1], -1)[0],
    "chunk in one": lambda z: z.chunk(1, -1)[0],
    "as wide as features": lambda z: z[..., :4],
    "but as many as features": lambda z: z[..., -4:],
    "squeeze": lambda z: z.squeeze(),
    "squeeze of the classes": lambda z: z.squeeze(-1),
    "temperatures, squeeze": lambda z: z.squeeze().view(-1, z.shape[-1]),
    "temperatures, all classes": lambda z: z[..., : z.shape[-1]].flatten(0, 1),
    "no classes": lambda z: torch.cat([z[..., :0], z, z[..., 4:0]], -1),
    "no classes, by a list": lambda z: torch.cat([z, z[..., []]], -1),
    "no classes, by an index": lambda z: torch.cat([z[..., torch.tensor([]).long()], z], -1),
    "classes joined with rows": lambda z: z.reshape(z.shape[0], -1).view_as(z),
    "classes taken apart": lambda z: z.unflatten(-1, (1, -1)).flatten(-2),
    "other rows": lambda z: z.transpose(0, 1).reshape(z.shape),
    "as if transposed": lambda z: z.mT.reshape(z.shape),
}
SIZES = {"1 feature": (1, 5, 3), "few classes": (9, 5, 5), "alike": (4, 4, 4), "1 token": (4, 9, 1)}


@pytest.mark.parametrize(("size", "name"), make_params(itertools.product(SIZES, AMBIGUOUS)))
def test_sizes_that_equal_classes_or_features_are_not_confused(size, name):
    """Values and gradients are right whether the loss is fused or not."""
    features, classes, tokens = SIZES[size]
    plain, swapped, _ = make_pair("temperature" not in name, features=features, classes=classes)

    def loss(z, o):
        v = AMBIGUOUS[name](z / o.t if "temperature" in name else z)
        return ce(v, o.all_y.clamp(max=v.shape[-1] - 1))

    sizes = {"tokens": tokens, "classes": classes}
    results = [compute_results(model, loss, make_inputs(**sizes)) for model in (swapped, plain)]
    assert_agree(*results)


DESCRIBED: dict[str, Any] = {
    "itself": lambda z: z,
    "slice": lambda z: z[:, 1:],
    "slice, view": lambda z: z[1:].view(-1, C),
    "transpose": lambda z: z.mT,
    "transposed slice": lambda z: z[:, ::2].transpose(0, 1),
    "select": lambda z: z[:, -1],
    "unbind": lambda z: z.unbind(1)[3],
    "index": lambda z: z[:, [1, 4]],
    "index of both": lambda z: z[[1, 0], [3, 4]],
    "index of transposed": lambda z: z.mT[:, :, [1, 4]],
    "mask": lambda z: z[torch.arange(B * T).view(B, T) % 2 == 0],
    "permuted copy": lambda z: z.permute(1, 0, 2).contiguous(),
    "permuted product": lambda z: 2 * z.permute(2, 0, 1),
    "sliced logarithms": lambda z: z[:, 1:].log_softmax(-1),
    "negated transpose": lambda z: -z.mT,
    "clone of transposed": lambda z: z.mT.clone(),
    "cast": lambda z: z.to(torch.float32),
    "unsqueeze": lambda z: z[:, None],
    "tanh of a slice": lambda z: z[:, :3].tanh(),
    "with a row": lambda z: z.mT + torch.ones(C, 1, dtype=z.dtype),
}


def describe(z):
    return {
        **{name: getattr(z, name) for name in ("shape", "dtype", "device", "layout", "ndim")},
        **{name: getattr(z, name)() for name in ("stride", "is_contiguous", "numel", "size")},
        **{name: getattr(z, name) for name in ("requires_grad", "is_leaf", "nbytes")},
        **{name: getattr(z, name)() for name in ("element_size", "is_floating_point", "type")},
        "length": len(z),
        "version": z._version,
        "view": z._is_view(),
    }


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", make_params(DESCRIBED))
def test_attributes_are_known_without_values(name, grad):
    plain, swapped, log = make_pair()
    with torch.set_grad_enabled(grad):
        logits, truth = (DESCRIBED[name](model(make_inputs().x)) for model in (swapped, plain))
    attributes, expected = describe(logits), describe(truth)
    if name == "itself":  # PyTorch's addmm may return a view
        expected["view"] = attributes["view"]
    assert attributes == expected
    if name not in ("cast", "index of transposed"):
        assert not log.materialized
    assert_agree([logits + 0], [truth + 0])
    assert logits.stride() == truth.stride()


@pytest.mark.parametrize("name", ["slice", "select", "unbind"])
def test_storage_offset_is_known_without_values(name):
    plain, swapped, _ = make_pair()
    logits, truth = (DESCRIBED[name](model(make_inputs().x)) for model in (swapped, plain))
    assert logits.storage_offset() == truth.storage_offset()
    assert (2 * logits).storage_offset() == 0


def test_layout_cache_distinguishes_complex_from_real_factors():
    plain, swapped, log = make_pair()
    (swapped(make_inputs().x)[:, :5] * (2 + 0j)).real.sum()

    def loss(z, o):
        return ce(z[:, :5] * 2, o.y[:, :5])

    assert_agree(*(compute_results(model, loss) for model in (swapped, plain)))
    assert log.fused == 1


def test_long_chain_of_steps_agrees():
    def loss(z, o):
        for _ in range(1500):
            z = z * 1.001
        return ce(z, o.y)

    plain, swapped, _ = make_pair()
    assert_agree(*(compute_results(model, loss) for model in (swapped, plain)))


OPERANDS: dict[str, Any] = {
    "index": (lambda z, v: z[:, v], torch.tensor([1, 4])),
    "index_select": (lambda z, v: z.index_select(1, v), torch.tensor([1, 4])),
    "mask": (lambda z, v: z[v], torch.arange(B * T).view(B, T) % 3 == 0),
    "scale": (lambda z, v: z * v, torch.tensor(0.7)),
    "divisor": (lambda z, v: z / v, torch.tensor([0.7], dtype=F64)),
    "temperatures": (lambda z, v: z / v, torch.full((T, 1), 0.7, dtype=F64)),
    "row": (lambda z, v: z + v, torch.ones(C, dtype=F64) * torch.arange(C)),
}


def change_in_place(v):
    if v.dtype == torch.bool:
        v.logical_not_()
    elif v.is_floating_point():
        v.mul_(2)
    else:
        v.zero_()


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("name", make_params(OPERANDS))
def test_operand_changed_after_the_step_has_no_effect(name, is_read):
    step, operand = OPERANDS[name]
    plain, swapped, log = make_pair(bias=False)
    results = []
    for model in (swapped, plain):
        v = operand.clone()
        z = step(model(make_inputs().x), v)
        if model is plain:
            z = z.detach().clone()
        change_in_place(v)
        y = torch.arange(z.shape[:-1].numel())
        results.append([z.exp() if is_read else F.cross_entropy(z.flatten(0, -2), y)])
    assert_agree(*results)
    assert log.fused == (not is_read)
