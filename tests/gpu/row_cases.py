"""Random arguments of the head's row kernels, and the truth in float64 written out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from torch_nnmath._records import UpstreamGradients
from torch_nnmath.kernels.gpu.records import RowInputs, RowOutputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Case(NamedTuple):
    """Arguments of `process_rows` for all N rows."""

    z: torch.Tensor  # (N, P)
    inputs: RowInputs
    upstream: UpstreamGradients


def pad_columns(C):
    return -(-C // 16) * 16


def draw_case(seed, N, C, options=(), size=3.0):
    """Random logits, nan in the padding; `options` names what is not None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    z = torch.full((N, pad_columns(C)), math.nan, device=DEVICE)
    z[:, :C] = size * draw(N, C)
    t = None
    if "t" in options:
        t = draw(1 if "shared" in options else N, C).abs()
        t[t < 0.3] = 0
    scalar = "scalar" in options
    inputs = RowInputs(
        C=C,
        b=draw(C) if "b" in options else None,
        scale=(draw() if scalar else draw(N, 1)) if "scale" in options else None,
        y=torch.randint(C, (N, 1), generator=generator).to(DEVICE) if "y" in options else None,
        p=draw(N, 1).abs() if "p" in options else None,
        t=t,
        keep=(draw(N, 1) > -0.5) if "keep" in options else None,
        base=2.0 if "base" in options else math.e,
        cap=4.0 if "cap" in options else None,
    )
    upstream = UpstreamGradients(
        *(
            (draw() if scalar else draw(N, 1)) if name in options or name == "γ" else None
            for name in ("γ", "ω", "η")
        )
    )
    return Case(z, inputs, upstream)


def compute_truth(case):
    """Results (`RowOutputs`) and Δ in float64, and the size of the terms of loss and Δ."""
    C, b, scale, y, p, t, keep, base, cap = case.inputs
    z = case.z[:, :C].double()
    if keep is not None:
        z = torch.where(keep, z, 0.0)
    N = len(z)
    z = z if scale is None else z * scale.double()
    z = z if b is None else z + b.double()
    v, slope = z, torch.ones_like(z)
    if cap is not None:
        v = cap * torch.tanh(z / cap)
        slope = 1 / torch.cosh(z / cap) ** 2
    zeros = torch.zeros((N, 1), dtype=torch.float64, device=z.device)
    p = zeros if p is None else p.double()
    target = torch.zeros_like(z) if t is None else t.double().expand(N, C).clone()
    T = p + target.sum(1, keepdim=True)
    at_class = torch.zeros_like(z)
    if y is not None:
        at_class.scatter_(1, y, 1.0)
    target = target + p * at_class
    m = v.amax(1, keepdim=True)
    shifted = v - m
    e = shifted.exp()
    s = e.sum(1, keepdim=True)
    e_shifted = torch.where(e == 0, 0.0, e * shifted)
    ev = e_shifted.sum(1, keepdim=True)
    ln = math.log(base)
    lse = m + s.log()
    l = shifted - s.log()
    a = e / s
    terms = torch.where(target == 0, 0.0, -target * l)
    if y is None:  # then p counts only in T
        terms = torch.cat((terms, p * lse), 1)
    entropy = -torch.where(a == 0, 0.0, a * l).sum(1, keepdim=True)
    γ, ω, η = (0.0 if u is None else u.double() for u in case.upstream)
    al = -entropy
    finite_l = l.clamp(min=-1e4)
    B = γ / ln * T + 2 * ω * lse - η / ln * (finite_l - al)
    delta = slope * (a * B - γ / ln * target)
    B_size = abs(γ) / ln * T + abs(2 * ω * lse) + abs(η) / ln * (abs(finite_l) + abs(al) + 1)
    size = slope * (a * B_size + abs(γ) / ln * target)
    results = RowOutputs(
        loss=terms.sum(1, keepdim=True) / ln,
        lse=lse,
        squared_lse=lse**2,
        entropy=entropy / ln,
        predicted=v.argmax(1, keepdim=True),
        sums=torch.cat((m, s, ev), 1),
        dc_dp=lse if y is None else -l.gather(1, y),
    )
    if keep is not None:
        results = RowOutputs(*(torch.where(keep, r, 0) for r in results))
        results = results._replace(
            predicted=torch.where(keep, results.predicted, -1),
            sums=torch.where(keep, results.sums, torch.tensor([0.0, 1.0, 0.0]).to(z)),
        )
        delta = torch.where(keep, delta, 0)
    loss_size = terms.abs().sum(1, keepdim=True) + T * s.log().abs()
    return results, delta, loss_size / ln, size


def allocate_outputs(N):
    def make(columns=1, dtype=torch.float32):
        return torch.full((N, columns), -7, dtype=dtype, device=DEVICE)

    outputs = RowOutputs(*(make() for _ in RowOutputs._fields))
    return outputs._replace(predicted=make(dtype=torch.int64), sums=make(3))
