"""Deferred logits in inference mode, whose tensors have no versions."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder, limit_head_blocks
from deferred_helpers import (
    F64,
    MARKS,
    C,
    assert_agree,
    assert_fused,
    ce,
    has_logits_shape,
    make_inputs,
    make_pair,
    make_params,
)

pytestmark = MARKS


LOSSES: dict[str, Any] = {
    "flattened": lambda z, o: ce(z, o.y),
    "shifted": lambda z, o: ce(z[..., :-1, :].contiguous(), o.y[..., 1:]),
    "reshaped, moved": lambda z, o: F.cross_entropy(z.reshape(1, *z.shape)[0].mT, o.y),
    "movedim": lambda z, o: F.cross_entropy(z.movedim(-1, 1), o.y),
    "narrowed": lambda z, o: F.cross_entropy(z.narrow(1, 2, 4).mT, o.y.narrow(1, 2, 4)),
    "chunks": lambda z, o: sum(ce(v, y) for v, y in zip(z.chunk(2), o.y.chunk(2), strict=True)),
    "capped": lambda z, o: ce(3 * torch.tanh(z / 3), o.y),
    "scaled by a parameter": lambda z, o: ce(z * o.s, o.y),
    "a row added": lambda z, o: ce(z + o.row, o.y),
    "masked": lambda z, o: F.cross_entropy(z[o.y >= 0], o.y[o.y >= 0]),
    "smoothed": lambda z, o: ce(z, o.y, label_smoothing=0.1),
    "probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT),
    "nll_loss": lambda z, o: F.nll_loss(F.log_softmax(z, -1).mT, o.y),
    "log-probabilities": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).mean(),
    "logsumexp": lambda z, o: torch.logsumexp(z, -1).square().mean(),
    "detached": lambda z, o: ce(z.detach(), o.y),
    "accuracy": lambda z, o: (z.argmax(-1) == o.y).double().mean() + ce(z, o.y),
}


@pytest.mark.parametrize("name", make_params(LOSSES))
def test_losses_in_inference_mode_agree_without_logits(name):
    plain, swapped, log = make_pair()
    o = make_inputs(tokens=50)
    with torch.inference_mode():
        expected = LOSSES[name](plain(o.x), o)
        with limit_head_blocks(), OperationRecorder() as recorder:
            result = LOSSES[name](swapped(o.x), o)
    assert_agree([result], [expected])
    assert result.is_inference()
    if name != "probabilities":  # which have as many entries
        assert recorder.list_outputs(lambda s: has_logits_shape(s) and math.prod(s) > 32 * C) == []
    assert_fused(log)


@pytest.mark.parametrize("name", make_params(LOSSES))
def test_autocast_in_inference_mode_agrees(name):
    plain, swapped, log = make_pair(dtype=torch.float32)
    o = make_inputs(torch.float32)
    results = []
    for model in (swapped, plain):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            results.append([LOSSES[name](model(o.x), o)])
    assert_agree(*results, rtol=2e-2, atol=2e-2)
    assert log.fused or name == "logsumexp"  # its dtype depends on the device


# Modes of the features, of the head and of the loss


USES: dict[str, Any] = {
    **LOSSES,
    "a sum": lambda z, o: z.sum(),
    "a view": lambda z, o: z[:, 1:],
    "a copy": lambda z, o: z.clone(),
    "a cast": lambda z, o: z.float(),
    "detach": lambda z, o: z.detach(),
    "data": lambda z, o: z.data,
    "exp": lambda z, o: z.exp(),
    "an edit": lambda z, o: z.mul_(2),
    "an edit of a part": lambda z, o: z[0].mul_(2),
    "probabilities that require grad": lambda z, o: F.cross_entropy(z.mT, (o.s * o.probs).mT),
    "made a leaf": lambda z, o: ce(z.clone().requires_grad_(), o.y),
    "backward": lambda z, o: ce(z, o.y).backward(),
}
MODES = ["grad", "no_grad", "inference"]


def enter(mode):
    return {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[mode]()


def describe(function):
    """Returns a result's value and properties, or the type of an error."""
    try:
        out = function()
    except RuntimeError as error:
        return str(error).split(".")[0], None
    if out is None:
        return None, None
    return (out.is_inference(), out.requires_grad, out.dtype, out.shape, out.stride()), out


@pytest.mark.parametrize("name", make_params(USES))
def test_modes_of_features_head_and_use_agree(name):
    """Every combination gives the value, the kind of tensor or the error of PyTorch."""
    plain, swapped, _ = make_pair()
    for modes in itertools.product(MODES, repeat=3):
        results = []
        for model in (swapped, plain):
            o = make_inputs()
            with enter(modes[0]):
                h = model.body(o.x).tanh()
            try:
                with enter(modes[1]):
                    z = model.lm_head(h)
            except RuntimeError as error:
                results.append((str(error).split(".")[0], None))
                continue
            with enter(modes[2]):
                results.append(describe(lambda z=z, o=o: USES[name](z, o)))
        (kind, value), (expected_kind, expected) = results
        assert kind == expected_kind, modes
        if expected is not None:
            with torch.no_grad():
                assert_agree([value + 0], [expected + 0], rtol=1e-6)


# Changes between the head and the use


def change_features(h, head):
    h.mul_(2)


def change_weight(h, head):
    head.weight.mul_(2)


def change_bias(h, head):
    head.bias.mul_(2)


@pytest.mark.parametrize("use", [lambda z, o: ce(z, o.y), lambda z, o: z.argmax(-1)])
@pytest.mark.parametrize("change", [None, change_features, change_weight, change_bias])
@pytest.mark.parametrize("modes", [*itertools.product(MODES[1:], repeat=4)], ids="-".join)
def test_operands_changed_after_the_head_never_change_the_result(modes, change, use):
    """The features are inference tensors, which were copied, or a change raises."""
    plain, swapped, log = make_pair()
    o = make_inputs()
    with enter(modes[0]):
        h = swapped.body(o.x).tanh()
    with enter(modes[1]):
        z = swapped.lm_head(h)
        expected = use(plain.lm_head(h.clone()), o)
    if change is change_features and h.is_inference() and modes[2] != "inference":
        pytest.skip("PyTorch refuses to change an inference tensor outside of inference mode")
    if change:
        with enter(modes[2]):
            change(h, swapped.lm_head)
    with enter(modes[3]):
        if change is None or (change is change_features and h.is_inference()):
            assert_agree([use(z, o)], [expected])
        else:
            with pytest.raises(RuntimeError, match="were changed in place since"):
                use(z, o)
    assert not log.materialized


# What stays plain


def test_weight_that_is_an_inference_tensor_gives_plain_logits():
    with torch.inference_mode():
        plain, swapped, log = make_pair()
        o = make_inputs()
        z = swapped(o.x)
        assert type(z) is torch.Tensor
        swapped.lm_head.weight.zero_()  # which no version tells
        assert_agree([z], [plain(o.x)])
    assert not log.fused


def test_features_are_not_copied_where_they_have_versions():
    _, swapped, log = make_pair()
    o = make_inputs()
    with torch.no_grad():
        h = swapped.body(o.x).tanh()
    with torch.inference_mode(), OperationRecorder() as recorder:
        swapped.lm_head(h)
    assert "clone" not in recorder.names
    with torch.inference_mode():
        h = swapped.body(o.x).tanh()
        with OperationRecorder() as recorder:
            swapped.lm_head(h)
    assert recorder.names.count("clone") == 1
    assert not log.materialized


def test_transforms_in_inference_mode_agree():
    plain, swapped, log = make_pair()
    o = make_inputs()
    with torch.inference_mode():
        for transform in (
            lambda m: torch.vmap(lambda x, y: ce(m(x), y))(o.x, o.all_y),
            lambda m: torch.vmap(lambda s: ce(m(o.x) * s, o.y))(
                torch.tensor([0.5, 2.0], dtype=F64)
            ),
        ):
            assert_agree([transform(swapped)], [transform(plain)])
        z = swapped(o.x)
        scales = torch.tensor([0.5, 2.0], dtype=F64)
        assert_agree(
            [torch.vmap(lambda s: ce(z * s, o.y))(scales)],
            [torch.vmap(lambda s: ce(plain(o.x) * s, o.y))(scales)],
        )
    assert log.materialized


def test_inference_logits_have_the_classes_of_the_plain_ones():
    plain, swapped, _ = make_pair()
    o = make_inputs()
    with torch.inference_mode():
        z, expected = swapped(o.x), plain(o.x)
    assert z.is_inference()
    assert (z.shape, z.stride(), z.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert z.shape[-1] == C
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        z.mul_(2)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        z * o.probs
