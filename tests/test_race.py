"""The race: planted faults get their verdicts, and the page shows the result file."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from scripts import DOCS, ROOT

from torch_nnmath import race
from torch_nnmath.__main__ import main
from torch_nnmath.race import PEERS, RACE_ROWS, Peer, define_head, judge, race_peer

RESULTS = ROOT / "examples" / "results"
ROW = {row.name: row for row in RACE_ROWS}


class PlantedHead(torch.autograd.Function):
    """The head with a backward of its own, right if no fault is planted."""

    fault = ""

    @classmethod
    def run(cls, x, W, t):
        return cls.apply(x, W, t)

    @staticmethod
    def forward(x, W, t):
        return define_head(x, W, t)

    @classmethod
    def setup_context(cls, ctx, inputs, output):
        x, W, t = inputs
        ctx.t = t
        ctx.save_for_backward(x, W)
        ctx.save_for_forward(x, W)
        z = torch.func.grad(lambda x: define_head(x, W.detach(), t))(x.detach())
        ctx.dx = z

    @classmethod
    def backward(cls, ctx, upstream):
        x, W = ctx.saved_tensors
        with torch.enable_grad():
            x, W = x.detach().requires_grad_(), W.detach().requires_grad_()
            dx, dW = torch.autograd.grad(define_head(x, W, ctx.t), (x, W))
        if cls.fault == "factor":
            dx = 0.5 * dx
        if cls.fault == "consumed":  # a second backward multiplies what the first one left
            dx = ctx.dx.mul_(upstream)
            return dx, upstream * dW, None
        return upstream * dx, upstream * dW, None

    @classmethod
    def jvp(cls, ctx, dx, dW, _):
        if cls.fault == "tangent":
            return (dx if dx is not None else dW).new_zeros(())
        x, W = ctx.saved_tensors
        parts = [
            (gradient * direction).sum()
            for gradient, direction in zip(
                torch.func.grad(define_head, (0, 1))(x, W, ctx.t), (dx, dW), strict=True
            )
            if direction is not None
        ]
        return sum(parts)


class FactorHead(PlantedHead):
    fault = "factor"


class ConsumedHead(PlantedHead):
    fault = "consumed"


class ZeroTangentHead(PlantedHead):
    fault = "tangent"


def judge_planted(function, name, **options):
    return judge(Peer(lambda: function, "planted", **options), function, ROW[name])


@pytest.mark.parametrize(
    ("function", "name", "verdict"),
    [
        (PlantedHead.run, "gradient", "right"),
        (PlantedHead.run, "forward mode", "right"),
        (PlantedHead.run, "second backward, accumulation", "right"),
        (FactorHead.run, "gradient", "wrong"),
        (ConsumedHead.run, "gradient", "right"),
        (ConsumedHead.run, "second backward, accumulation", "wrong"),
        (ZeroTangentHead.run, "forward mode", "silent zero"),
        (ZeroTangentHead.run, "gradient", "right"),
    ],
)
def test_planted_fault_gets_its_verdict(function, name, verdict):
    assert judge_planted(function, name).verdict == verdict


def test_missing_factor_is_the_error_of_its_cell():
    cell = judge_planted(FactorHead.run, "gradient")
    assert cell.error == pytest.approx(0.5, rel=1e-3)


def read_value(x, W, t):
    """Refuses every transform."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError("no transforms")
    return define_head(x, W, t)


def test_error_is_not_promised_only_with_a_source():
    assert judge_planted(read_value, "vmap").verdict == "raises"
    cell = judge_planted(read_value, "vmap", limits={"vmap": "the manual"})
    assert (cell.verdict, cell.not_promised) == ("not promised", "the manual")


def test_silent_fault_stays_a_fault_where_nothing_is_promised():
    cell = judge_planted(ZeroTangentHead.run, "forward mode", limits={"forward mode": "the manual"})
    assert (cell.verdict, cell.not_promised) == ("silent zero", "the manual")
    assert race.format_cell(cell.to_dict()).startswith("silent zero*")


@pytest.mark.parametrize("name", [race.NAN_ROW, "all rows ignored"])
def test_plain_mean_over_all_rows_is_wrong_with_ignored_rows(name):
    def divide_by_rows(x, W, t):
        z = x @ W.T
        l = z.logsumexp(-1) - z.gather(-1, t.clamp(min=0)[:, None])[:, 0]
        return (l * (t != race.IGNORE_INDEX)).sum() / (t != race.IGNORE_INDEX).sum()

    assert judge_planted(divide_by_rows, name).verdict == "wrong"
    assert judge_planted(PEERS["ours"].load(), name).verdict == "right"


def test_peer_that_raises_at_its_first_call_cannot_run():
    def load():
        raise ImportError("no such library")

    result = race_peer(Peer(load, "planted", ("no-such-package",)))
    assert {cell["verdict"] for cell in result["cells"].values()} == {"cannot run"}
    assert result["reason"] == "ImportError: no such library"
    assert result["versions"] == "no-such-package is not installed"


def test_process_that_fails_is_a_peer_that_cannot_run(monkeypatch):
    """The name is unknown to the new process."""
    monkeypatch.setitem(PEERS, "planted", replace(PEERS["ours"], packages=()))
    result = race.race_in_process("planted")
    assert "status 2" in result["reason"]
    assert "no peer 'planted'" in result["reason"]


def test_weight_is_not_differentiated_if_autograd_does_not_deliver_its_gradient():
    def drop_gradient(x, W, t):
        return define_head(x, W.detach(), t)

    assert judge_planted(drop_gradient, "gradient").verdict == "silent zero"
    assert judge_planted(drop_gradient, "gradient", differentiates_weight=False).verdict == "right"


@pytest.mark.parametrize("row", RACE_ROWS, ids=lambda row: row.name)
def test_ours_is_right_in_every_row(row):
    peer = PEERS["ours"]
    assert judge(peer, peer.load(), row).verdict == "right"


def test_command_with_one_peer_writes_its_files(tmp_path, capsys):
    files = {name: str(tmp_path / f"race.{name}") for name in ("json", "text", "markdown")}
    options = [part for name, file in files.items() for part in (f"--{name}", file)]
    assert main(["race", "PyTorch", *options]) == 0
    with open(files["json"], encoding="utf-8") as file:
        report = json.load(file)
    cells = report["peers"]["PyTorch"]["cells"]
    assert {*cells} == {*ROW}
    assert cells["second order"]["verdict"] == "right"
    assert cells[race.NAN_ROW]["verdict"] == "wrong"
    assert capsys.readouterr().out == race.format_report(report)


def test_unknown_peer_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["race", "nobody"])
    assert "no peer 'nobody'" in capsys.readouterr().err


# The stored result


@functools.cache
def load_result():
    return json.loads((RESULTS / "race.json").read_text(encoding="utf-8"))


def test_stored_result_has_five_other_peers_that_ran():
    ran = [name for name, peer in load_result()["peers"].items() if not peer["reason"]]
    assert len({*ran} - {"ours"}) >= 5
    assert {*load_result()["peers"]} <= {*PEERS}
    for name, peer in load_result()["peers"].items():
        assert peer["call"] == PEERS[name].call
        assert [*peer["cells"]] == [*ROW]


def test_stored_text_and_page_are_those_of_the_stored_result():
    report = load_result()
    assert (RESULTS / "race.txt").read_text(encoding="utf-8") == race.format_report(report)
    assert race.format_markdown(report) in (DOCS / "race.md").read_text(encoding="utf-8")


def test_picture_shows_each_cell():
    report = load_result()
    axes = race.plot_report(report).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        race.format_cell(cell)
        for peer in report["peers"].values()
        for cell in peer["cells"].values()
    ]
