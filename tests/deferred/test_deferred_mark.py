"""The mark of swapped modules: copies and pickles carry it, a state dict does not."""

import copy
import pickle

import pytest
from torch import nn

from torch_nnmath.deferred import HeadLog, get_head_log, get_mark, set_mark


def copy_by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def test_mark_is_false_until_set_and_after_removal():
    layer = nn.Linear(2, 2)
    assert get_mark(layer) is False
    set_mark(layer, True)
    assert get_mark(layer) is True
    assert get_head_log(layer) is None
    set_mark(layer, False)
    set_mark(layer, False)
    assert get_mark(layer) is False
    assert list(vars(layer)) == list(vars(nn.Linear(2, 2)))


@pytest.mark.parametrize("copy_module", [copy.deepcopy, copy_by_pickle])
def test_copy_of_a_head_has_a_log_of_its_own(copy_module):
    layer, log = nn.Linear(2, 2), HeadLog("head")
    set_mark(layer, log)
    log.fused = 3
    copied_log = get_head_log(copy_module(layer))
    log.fused = 4
    assert get_head_log(layer) is get_mark(layer) is log
    assert (copied_log.name, copied_log.fused) == ("head", 3)


def test_mark_of_a_wrapped_module_is_not_the_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return getattr(super().__getattr__("inner"), name)

    layer = nn.Linear(2, 2)
    set_mark(layer, True)
    assert get_mark(Wrapper(layer)) is False


def test_state_dict_has_no_mark():
    layer = nn.Linear(2, 2)
    set_mark(layer, HeadLog("head"))
    assert list(layer.state_dict()) == ["weight", "bias"]
