"""Updates whose float32 results are the same in every backend, so that only the rounding to bfloat16 is compared."""

from __future__ import annotations

import torch
from torch import Tensor

import grgauge_kernels as gk
from grgauge_kernels import CHUNK
from grgauge_kernels.backends import reference

SIZES = [0, 1, 17, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 333]
FEW_SIZES = [0, 1, 17, CHUNK + 333]  # for what is slow
SEED, STEP, SCALE = 1234567, 41, 0.7
EDGES = torch.tensor(
    [
        0.0, 2.0**-147, -(2.0**-146), 5 * 2.0**-147, 1e-40, -3e-39, 2.0**-126, 1e-30,  # subnormal moments
        1e-20, 3e-23, 1.2e-19,  # subnormal squares
        1.8427e19, -1.8427e19, 2e38, -1e38,  # squares beyond the largest bfloat16; infinite ones
        torch.inf, -torch.inf, torch.nan,
    ]
)  # fmt: skip


def draw(sizes: list[int], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scaled = (torch.randn(n, generator=generator) * 2.0 ** ((k % 5) * 3 - 6) for k, n in enumerate(sizes))
    return [t.to(device, dtype) for t in scaled]


def lay(tensors: list[Tensor], flat: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(the segments, the stream that an op takes for them); in a flat buffer there are gaps between them."""
    if not flat:
        return tensors, tensors
    buffer = torch.zeros(sum(t.numel() + 3 for t in tensors) + 5, dtype=tensors[0].dtype, device=tensors[0].device)
    views, start = [], 5
    for t in tensors:
        views.append(buffer[start : start + t.numel()].copy_(t))
        start += t.numel() + 3
    return views, [buffer]


def bits(segment: int, like: Tensor, step: int = STEP) -> tuple[Tensor, Tensor, Tensor]:
    return reference.random_bits(SEED, step, segment, torch.arange(len(like), device=like.device))


def updated_moments(
    backend: str,
    grads: list[Tensor],
    param: torch.dtype = torch.float32,
    flat: bool = False,
    rows: Tensor | None = None,
    **options: object,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """(float32 gradients as the update saw them, exp_avgs, exp_avg_sqs, stats) of one update from zero moments.

    With these betas exp_avg is a quarter of the gradient and exp_avg_sq its square.
    """
    seen = [g.float() * SCALE for g in grads]
    segments, stream = lay(grads, flat)
    plan = gk.Bucket(segments, base=stream[0] if flat else None).plan()
    if rows is not None:
        plan = gk.Plan(plan.bucket, rows.numpy())
    _, params = lay([torch.zeros_like(g, dtype=param) for g in grads], flat)
    exp_avgs, firsts = lay([torch.zeros_like(g, dtype=torch.bfloat16) for g in grads], flat)
    exp_avg_sqs, seconds = lay([torch.zeros_like(g, dtype=torch.bfloat16) for g in grads], flat)
    for name in [name for name, wanted in options.items() if wanted is ...]:
        options[name] = torch.zeros(plan.states, device=grads[0].device)
    arguments = {"step": STEP, "lr": 1e-3, "betas": (0.75, 0.0), "eps": 1.0, "weight_decay": 0.0, "seed": SEED}
    stats = gk.adamw_(
        params, stream, firsts, seconds, plan, inv_scale=torch.tensor(SCALE, device=grads[0].device), backend=backend,
        **{**arguments, **options},
    )  # fmt: skip
    return seen, exp_avgs, exp_avg_sqs, stats


def assert_rounded(ours: Tensor, exact: Tensor, random: Tensor) -> None:
    """Bit by bit, but for which NaN a NaN is."""
    expected = reference.rounded(exact, random)
    wrong = (ours.view(torch.int16) != expected.view(torch.int16)) & ~(ours.isnan() & expected.isnan())
    assert not wrong.any(), (exact[wrong][:5], ours[wrong][:5], expected[wrong][:5])


def check_moments(
    backend: str,
    grad: torch.dtype,
    param: torch.dtype,
    flat: bool,
    sizes: list[int] = SIZES,
    device: str = "cpu",
    **options: object,
) -> None:
    """Both moments are rounded as `reference.rounded` says, and the sum of squares is taken before that."""
    grads = draw(sizes, grad, device=device)
    seen, exp_avgs, exp_avg_sqs, stats = updated_moments(backend, grads, param, flat, **options)
    for i, g in enumerate(seen):
        _, of_m, of_v = bits(i, g)
        assert_rounded(exp_avgs[i], g / 4, of_m)
        assert_rounded(exp_avg_sqs[i], g * g, of_v)
        if options.get("sums", True) and "ema" not in options:
            torch.testing.assert_close(stats[i, 1], (g.double() / 4).square().sum(), rtol=1e-6, atol=0)
    if options.get("sums", True) and "ema" not in options:
        stored = torch.cat(exp_avgs).double().square().sum()
        assert abs(float(stats[:, 1].sum() / stored) - 1) > 1e-6  # the rounded ones would have another sum


def check_edges(backend: str, device: str = "cpu") -> None:
    """Subnormals, infinities, NaN and what lies beyond the largest bfloat16."""
    seen, (m,), (v,), _ = updated_moments(backend, [(EDGES / SCALE).to(device)])
    g = seen[0]
    _, of_m, of_v = bits(0, g)
    assert_rounded(m, g / 4, of_m)
    assert_rounded(v, g * g, of_v)
    assert torch.equal(m.isinf(), (g / 4).isinf())
    assert torch.equal(v.isinf(), (g * g).isinf())
    assert torch.equal(m.isnan(), g.isnan())
    assert torch.equal(v.isnan(), g.isnan())
    huge = (g * g > reference.LARGEST_BFLOAT16) & (g * g).isfinite()
    assert huge.any()
    assert (v[huge] == reference.LARGEST_BFLOAT16).all()


def check_params(
    backend: str, moment: torch.dtype, grad: torch.dtype, sizes: list[int] = SIZES, device: str = "cpu"
) -> None:
    """bfloat16 parameters take the third part of the random bits; where their results end does not change the moments.

    Without a gradient, with eps = 1 and lr = 4 or 3, the parameter becomes two or 1.5 times what -exp_avg was, exactly.
    """
    lr = 4.0 if moment == torch.float32 else 3.0  # a half of a bfloat16 three times: two places too many
    exp_avgs = draw(sizes, moment, seed=1, device=device)
    if moment == torch.float32:
        beyond = torch.tensor([3.3895313892515355e38, 3.39e38, -3.4028e38, 1e-40, torch.nan], device=device)
        exp_avgs[-1][: len(beyond)] = -beyond / 2
    targets = [-(m.float() / 2) * lr for m in exp_avgs]
    params = [torch.zeros(n, dtype=torch.bfloat16, device=device) for n in sizes]
    params[-1][6], exp_avgs[-1][6], targets[-1][6] = torch.inf, 0.0, torch.inf
    grads = [torch.zeros(n, dtype=grad, device=device) for n in sizes]
    steps = torch.arange(1000.0, 1000 + len(sizes), device=device)
    gk.adamw_(
        params, grads, exp_avgs, [torch.zeros_like(m) for m in exp_avgs], gk.Bucket(params).plan(), step=steps, lr=lr,
        betas=(0.5, 0.5), eps=1.0, weight_decay=0.0, seed=SEED, stochastic_rounding=True, backend=backend,
    )  # fmt: skip
    for i, (p, target) in enumerate(zip(params, targets, strict=True)):
        of_param, _, _ = bits(i, p, step=int(steps[i]))
        assert_rounded(p, target, of_param)
