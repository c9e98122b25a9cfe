"""Functions that read the memory of logits, and the lifetime of logits and features."""

import copy
import ctypes
import gc
import io
import pickle
import re
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder
from deferred_helpers import (
    F64,
    MARKS,
    assert_fused,
    ce,
    has_logits_shape,
    make_inputs,
    make_pair,
    make_params,
    run_seeded,
)

pytestmark = MARKS


# Reading memory


def save_and_load(z):
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    return torch.load(file)


def read_double(address):
    return ctypes.c_double.from_address(address).value


READ: dict[str, Any] = {
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "numpy by force": lambda z: torch.from_numpy(z.numpy(force=True)),
    "asarray": lambda z: torch.from_numpy(np.asarray(z.detach())),
    "array": lambda z: torch.from_numpy(np.array(z.detach(), dtype=np.float64)),
    "ufunc": lambda z: torch.as_tensor(np.exp(z.detach())),
    "tolist": lambda z: z.tolist(),
    "list": lambda z: [v.square().sum().item() for v in z],
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "save": save_and_load,
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "deepcopy with gradient": copy.deepcopy,
    "copy": copy.copy,
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "dlpack of numpy": lambda z: torch.from_numpy(np.from_dlpack(z.detach())),
    "address": lambda z: read_double(z.data_ptr()),
    "address of a part": lambda z: read_double(z[1, 2:].data_ptr()),
    "distance in memory": lambda z: z[1, 2:].data_ptr() - z.data_ptr(),
    "storage": lambda z: z.untyped_storage().nbytes(),
    "typed storage": lambda z: z.untyped_storage().tolist()[:99],
    "repr": repr,
    "str": str,
    "format": lambda z: f"{z[0, 0, 0]:.3f}",
    "item": lambda z: z[1, 2, 3].item(),
    "float": lambda z: float(z[0, 0, 0]),
    "int": lambda z: int(z[0, 0, 0] * 10),
    "bool": lambda z: bool(z[0, 0, 0] > 0),
    "contains": lambda z: 5.0 in z,
    "equal": lambda z: torch.equal(z, z.clone()) and torch.allclose(z, z + 0),
    "cpu": lambda z: z.cpu() + 0,
    "meta": lambda z: z.to("meta").shape,
    "numpy of steps": lambda z: torch.from_numpy((2 * z[:, 1:]).mT.numpy(force=True)),
    "new_tensor": lambda z: z.new_tensor([1.0, 2.0]),
    "as_tensor": lambda z: torch.as_tensor(z) + 0,
    "new": lambda z: z.new(2).shape,
    "zeros_like": lambda z: torch.zeros_like(z),
    "share_memory_": lambda z: z.detach().share_memory_().is_shared(),
    "is_shared": lambda z: z.is_shared(),
    "apply_": lambda z: z.detach().apply_(lambda v: 2 * v),
    "map_": lambda z: z.detach().map_(z.detach().clone(), lambda a, b: a + 2 * b),
    "set_": lambda z: torch.empty(0, dtype=F64).set_(z.detach()),
    "collate": lambda z: torch.utils.data.default_collate([z.detach(), z.detach()]),
    "unfold": lambda z: z.unfold(1, 2, 1) + 0,
    "view of bytes": lambda z: z.detach().view(torch.uint8),
    "isnan": lambda z: torch.isnan(z).any(),
    "unique": lambda z: z.unique(),
    "multinomial": lambda z: run_seeded(torch.multinomial, z[:, -1].softmax(-1), 3),
    "gradcheck": lambda z: torch.autograd.gradcheck(
        torch.sin, z.detach()[0, :1, :3].clone().requires_grad_()
    ),
    "hash": lambda z: hash(z) == hash(z),
    "numpy with gradient": lambda z: torch.from_numpy(z.numpy()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of Tensor.__array__
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", make_params(READ))
def test_readers_of_memory_get_plain_tensors(name, grad):
    plain, swapped, _ = make_pair()
    results = []
    for model in (swapped, plain):
        with torch.set_grad_enabled(grad):
            z = model(make_inputs().x)
            try:
                out = READ[name](z)
            except RuntimeError as error:
                out = str(error)
        results.append(re.sub("grad_fn=<.*>", "", out) if isinstance(out, str) else out)
    result, expected = results
    assert isinstance(result, type(expected))
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    else:
        assert result == expected


def test_factories_materialize_nothing():
    _, swapped, log = make_pair()
    o = make_inputs()
    z = swapped(o.x)
    loss = ce(z, o.y) + z.new_zeros(()) + z.new_ones((2,)).sum() + z.new_full((), 3.0)
    assert z.new_empty(3).dtype == z.dtype
    assert loss.requires_grad
    assert_fused(log, 1)
    assert type(z).__name__ == "DeferredLogits"
    assert isinstance(z, torch.Tensor)


# Lifetimes


ALIVE: dict[str, Any] = {
    "loss": lambda z, o: ce(z, o.y),
    "cap": lambda z, o: ce(3 * torch.tanh(z / 3), o.y),
    "logarithms": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).mean(),
    "both": lambda z, o: (2 * (z * o.s).tanh()).mT.log_softmax(1).mean(1).mean(),
    "learnt temperatures": lambda z, o: ce(z / o.t, o.y),
    "plain": lambda z, o: ce(z, o.y) + z.exp().mean(),
    "plain, cap": lambda z, o: ce(3 * torch.tanh(z / 3) - 1.0, o.y),
    "plain, logarithms": lambda z, o: z.log_softmax(-1).exp().mean(),
    "watched": lambda z, o: (z.register_hook(lambda g: None), ce(z, o.y))[1],
    "edited": lambda z, o: ce(z.mul_(2), o.y),
}


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("name", make_params(ALIVE))
def test_tensors_are_freed_without_garbage_collection(name, backward):
    _, swapped, _ = make_pair(bias="temperature" not in name)
    o = make_inputs()

    def references():
        h = swapped.body(o.x).tanh()
        z = swapped.lm_head(h)
        v = z[:, :]
        loss = ALIVE[name](z, o)
        if backward:
            loss.backward()
        return [weakref.ref(x) for x in (h, z, v, loss)]

    references()  # the first call may leave reference cycles of imports
    gc.disable()
    try:
        assert [r() for r in references()] == [None] * 4
    finally:
        gc.enable()


def test_materialized_logits_free_the_features():
    _, swapped, _ = make_pair()
    with torch.no_grad():
        h = swapped.body(make_inputs().x).tanh()
        z = swapped.lm_head(h)
        z.exp()
        features = weakref.ref(h)
        del h
    assert features() is None
    assert z.isfinite().all()


def test_deferred_logits_that_stay_alive_take_no_memory():
    _, swapped, log = make_pair()
    o, alive = make_inputs(), []
    with OperationRecorder() as recorder:
        for _ in range(3):
            z = swapped(o.x)
            v, l = z[:, 1:].mT, (3 * torch.tanh(z / 3)).log_softmax(-1)
            loss = F.cross_entropy(v, o.y[:, 1:]) - l.gather(-1, o.all_y[..., None]).mean()
            loss.backward()
            alive += [z, v, l, loss]
    assert recorder.list_outputs(has_logits_shape) == []
    # One call for the mean; a forward and a backward for gather.
    assert recorder.count(torch.ops.torch_nnmath.head.default) == 3 * 3
    assert_fused(log, 6)


def test_logits_are_computed_once_and_views_share_memory():
    _, swapped, log = make_pair()
    z = swapped(make_inputs().x)
    v = z[:, 1:]
    with OperationRecorder() as recorder:
        z.exp().sum() + z.square().sum() + v.sum()
    assert sum("mm" in line for line in recorder.list_outputs(has_logits_shape)) == 1
    assert sum(log.materialized.values()) == 1
    assert z.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
