"""`HeadLog` and the warning: why logits were computed, where, and how often."""

import re
from pathlib import Path

import pytest
import torch
from deferred_helpers import MARKS, Model, ce, collect_warnings, make_inputs, make_pair, seed

from torch_nnmath import functional, swap

pytestmark = MARKS
FILE = Path(__file__).name


@pytest.mark.parametrize("model", ["one", "another"])
def test_warning_is_raised_once_for_each_head_with_reason_and_line(model):
    _, swapped, log = make_pair()
    x = make_inputs().x
    (warning,) = collect_warnings(lambda: swapped(x).exp())
    message = str(warning.message)
    reason = rf"exp at .*{FILE}:\d+ in <lambda> \(logits.logsumexp.*return_stats=True"
    assert re.search(f"head lm_head were computed.*: {reason}", message)
    assert "report of swap() counts how often" in message
    assert "swap(model, head=None)" in message
    assert warning.filename.endswith(FILE)
    assert not collect_warnings(lambda: swapped(x).exp())
    assert not collect_warnings(lambda: swapped(x).cos())
    assert sum(log.materialized.values()) == 3


def test_forward_hook_of_the_head_warns():
    _, swapped, log = make_pair()
    swapped.lm_head.register_forward_hook(lambda *args: None)
    (warning,) = collect_warnings(lambda: swapped(make_inputs().x))
    assert "forward hooks of the head" in str(warning.message)
    assert [*log.materialized.values()] == [1]


@pytest.mark.parametrize("name", ["loss", "eval", "no_grad", "frozen", "inference", "hook in eval"])
def test_no_warning_outside_of_training(name):
    _, swapped, _ = make_pair()
    o = make_inputs()

    def use_logits():
        swapped.train("eval" not in name)
        if name == "loss":
            ce(swapped(o.x), o.y).backward()
        elif name == "frozen":
            swapped.requires_grad_(False)(o.x.detach()).exp()
        elif name == "inference":
            with torch.inference_mode():
                swapped(o.x).exp()
        else:
            if "hook" in name:
                swapped.lm_head.register_forward_hook(lambda *args: None)
            with torch.set_grad_enabled(name != "no_grad"):
                swapped(o.x).exp()

    assert not collect_warnings(use_logits)
    swapped.lm_head._forward_hooks.clear()
    swapped.train().requires_grad_()
    assert len(collect_warnings(lambda: swapped(o.x).exp())) == 1  # earlier uses do not count


def test_report_counts_losses_and_materializations():
    seed(0)
    model = Model().double()
    report = swap(model)
    log, o = report.heads["lm_head"], make_inputs()
    for _ in range(2):
        ce(model(o.x), o.y)
    for _ in range(3):
        model(o.x).cos()
    model(o.x).square()
    first, second = log.materialized.most_common()
    assert (log.fused, first[1], second[1]) == (2, 3, 1)
    *table, head, first_line, second_line = str(report).splitlines()
    assert "head lm_head: 2 losses without logits" in head
    assert first_line == f"  logits computed 3 x: {first[0]}"
    assert second_line == f"  logits computed 1 x: {second[0]}"
    assert first[0].startswith("cos at ")
    assert second[0].startswith("pow at ")
    assert "2 modules changed" in table


@pytest.mark.parametrize("use", ["exp", "difference", "several classes", "detach"])
def test_report_says_what_to_do_instead(use):
    _, swapped, log = make_pair()
    o = make_inputs()
    z = swapped(o.x)
    if use == "exp":
        expected, _ = "a sum of exponentials without logits", z.exp()
    elif use == "difference":
        expected, _ = "logits.log_softmax(-1) is not computed", z - z.logsumexp(-1, keepdim=True)
    elif use == "several classes":
        expected = "only gather of one class"
        z.log_softmax(-1).gather(-1, o.all_y[..., None].repeat(1, 1, 2)).sum().backward()
    else:
        expected, d = "such as logits.detach().mean()", z.detach()
        ce(z, o.y).backward()
        torch.optim.SGD(swapped.parameters(), 0.1).step()
        assert d.shape == z.shape
    (reason,) = log.materialized
    lines = repr(log).splitlines()
    assert lines[-2].endswith(reason)
    assert expected in lines[-1]


@pytest.mark.parametrize("is_deferred", [True, False])
def test_entropy_of_the_remedies_needs_no_logits(is_deferred):
    plain, swapped, log = make_pair()
    o = make_inputs()
    l = plain(o.x).log_softmax(-1)
    entropy = -(l.exp() * l).sum(-1)
    if is_deferred:
        z = swapped(o.x)
        _, stats = functional.cross_entropy(
            z.flatten(0, -2), o.all_y.flatten(), reduction="none", return_stats=True
        )
        found = stats.entropy.view(entropy.shape)
    else:
        head = swapped.lm_head
        _, found = functional.linear_log_probs(
            swapped.body(o.x).tanh(),
            head.weight,
            o.all_y,
            linear_bias=head.bias,
            return_entropy=True,
        )
    torch.testing.assert_close(found, entropy, check_dtype=False)
    assert not log.materialized
