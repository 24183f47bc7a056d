"""The two ops: schemas, fakes and the choice of backend.

For each element of each chunk of a plan, in one pass:

    g <- grad * inv_scale                     bf16, fp16 or fp32 in; fp32 arithmetic
    if ema:       m <- beta m + (1 - beta) g
    if previous:  delta <- g - previous; previous <- g
    if adamw:     torch's AdamW update of (param, exp_avg, exp_avg_sq)
    sums:         sum g^2, sum m^2, sum |g|, sum delta^2, sum |delta|, count of non-finite g

A non-finite element (NaN, infinite or beyond +-1e16 after inv_scale) is counted, and left out of sums, `ema` and
`previous`; the AdamW update treats it as torch does.

Moments in bfloat16, and bfloat16 parameters on request, are rounded stochastically: to one of the two neighbours, with
probabilities that make the result right on average. A second moment that decays by 0.999 per step loses at most a
quarter of a bfloat16 place in each, so rounded to the nearest it would never fall. The random bits are a hash of seed,
step, segment and the element's place in its segment: no generator state, and the same bits for every backend, number of
threads, order of chunks and run (`backends.reference.random_bits` is the definition).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .backends import Repeated, Update, cpu, cuda, reference, triton
from .bucket import Plan
from .checks import check_adamw, check_scalar, check_states, checked
from .stream import Stream

STATS = ("grad_sq", "ema_sq", "grad_abs", "delta_sq", "delta_abs", "nonfinite")
"""Names of the six columns of the stats tensor: sums of g^2, m^2, |g|, delta^2, |delta|, and the non-finite count."""

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}

PREFERRED_BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
"""Device type -> backends in order of preference; every other device runs the reference."""

PREFERRED = PREFERRED_BACKENDS

_library = torch.library.Library("grgauge", "DEF")
_library.define(
    "measure_(Tensor[] grads, Tensor rows, int segments, Tensor(a!)? ema, Tensor(b!)? previous, float beta, "
    "Tensor? inv_scale, str? backend=None) -> Tensor"
)
# Without states nothing is changed, and a compiler must see that in the schema.
_library.define("measure(Tensor[] grads, Tensor rows, int segments, Tensor? inv_scale, str? backend=None) -> Tensor")
_library.define(
    "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor rows, "
    "int segments, Tensor step, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, "
    "float weight_decay, Tensor(e!)? ema, Tensor(f!)? previous, float beta, Tensor? inv_scale, Tensor? found_inf, "
    "Tensor? clip, bool zero_grad, bool maximize, bool sums, str? backend=None, int seed=0, "
    "bool stochastic_rounding=False, Tensor? origins=None) -> Tensor"
)


def backends() -> dict[str, bool | str]:
    """Name of each backend -> True if it runs here, else the reason why it does not.

    Examples:
        >>> backends()["reference"]
        True
    """
    return {name: module.unavailable() or True for name, module in BACKENDS.items()}


@functools.cache
def _backend(name: str | None, device: torch.device) -> ModuleType:
    if name is None:
        for preferred in PREFERRED_BACKENDS.get(device.type, ()):
            if BACKENDS[preferred].unavailable(device) is None:
                return BACKENDS[preferred]
        return reference
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}, or None to choose by device")
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run on {device}: {reason}")
    return BACKENDS[name]


def _measure(grads, rows, segments, ema, previous, beta, inv_scale, backend=None):  # type: ignore[no-untyped-def]
    return _backend(backend, rows.device).measure_(grads, rows, segments, ema, previous, beta, inv_scale)


def _measure_only(grads, rows, segments, inv_scale, backend=None):  # type: ignore[no-untyped-def]
    return _measure(grads, rows, segments, None, None, 0.5, inv_scale, backend)


def _adamw(*args, **kwargs):  # type: ignore[no-untyped-def]
    update = Update(*args, **kwargs)
    return _backend(update.backend, update.rows.device).prepare_adamw_(update)()


_library.impl("measure_", _measure, "CompositeExplicitAutograd")
_library.impl("measure", _measure_only, "CompositeExplicitAutograd")
_library.impl("adamw_", _adamw, "CompositeExplicitAutograd")


@torch.library.register_fake("grgauge::measure_", lib=_library)
def _(grads, rows, segments, ema, previous, beta, inv_scale, backend=None):  # type: ignore[no-untyped-def]
    return rows.new_empty((segments, len(STATS)), dtype=torch.float64)


@torch.library.register_fake("grgauge::measure", lib=_library)
def _(grads, rows, segments, inv_scale, backend=None):  # type: ignore[no-untyped-def]
    return rows.new_empty((segments, len(STATS)), dtype=torch.float64)


@torch.library.register_fake("grgauge::adamw_", lib=_library)
def _(*args, **kwargs):  # type: ignore[no-untyped-def]
    update = Update(*args, **kwargs)
    return update.rows.new_empty((update.segments if update.sums else 0, len(STATS)), dtype=torch.float64)


def measure_(
    grads: Sequence[Tensor],
    plan: Plan,
    *,
    ema: Tensor | None = None,
    previous: Tensor | None = None,
    beta: float = 0.9,
    inv_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Read the gradients once; update `ema` and `previous`; return the six sums of each segment.

    Args:
        grads: One dense tensor per segment, or the one flat buffer of a flat plan; float32, bfloat16 or float16.
        plan: The chunks to visit, from `Bucket.plan`.
        ema: float32 [plan.states], updated in place: m <- beta m + (1 - beta) g.
        previous: float32 [plan.states], the gradient of the last call, replaced in place.
        beta: Smoothing factor of `ema`, in (0, 1).
        inv_scale: float32 [1] or [] on the device: g = grad * inv_scale.
        backend: A name from `backends()`, or None for the best one of the device.

    Returns:
        float64 [segments, 6], the columns named by STATS, over the visited elements (see `Plan.scale`). Columns of a
        state that was not given are 0.

    Raises:
        ValueError: For a wrong size, device, layout or number. It names the argument; nothing has been changed.
        TypeError: For a wrong dtype, likewise.

    Examples:
        >>> from grgauge_kernels import Bucket
        >>> grads = [torch.tensor([3.0, -4.0]), torch.tensor([1.0, torch.inf])]
        >>> stats = measure_(grads, Bucket(grads).plan())
        >>> stats[:, STATS.index("grad_sq")]
        tensor([25.,  1.], dtype=torch.float64)
        >>> stats[:, STATS.index("nonfinite")]
        tensor([0., 1.], dtype=torch.float64)
    """
    traced = _traced()
    (grads,) = checked(plan, traced, grads=grads)
    check_states(plan, ema, previous, beta)
    if inv_scale is not None:
        check_scalar("inv_scale", inv_scale, plan)
    args = (grads, plan.rows, plan.segments, ema, previous, beta, inv_scale)
    if traced and ema is None and previous is None:
        return torch.ops.grgauge.measure.default(grads, plan.rows, plan.segments, inv_scale, backend)
    if traced:
        return torch.ops.grgauge.measure_.default(*args, backend)
    try:
        return _backend(backend, plan.rows.device).measure_(*args)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"measure_: {error}") from error


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    plan: Plan,
    *,
    step: Tensor | int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema: Tensor | None = None,
    previous: Tensor | None = None,
    beta: float = 0.9,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    zero_grad: bool = False,
    maximize: bool = False,
    sums: bool = True,
    seed: int = 0,
    stochastic_rounding: bool = False,
    backend: str | None = None,
) -> Tensor:
    """torch's AdamW update of every visited element, and the sums of `measure_` in the same pass.

    Moments in bfloat16 are computed in float32 and rounded stochastically: the same bits for every number of threads,
    on every run and by every backend. The second sum is then over exp_avg as computed in this step, before it is
    rounded. It still contains the noise of earlier roundings. One rounding adds r m^2 to the expected square of an
    element, where r is at most 2^-16 and 5.5e-6 on average. So the sum is too large by a share of
    r beta1^2 / (1 - beta1^2): at most 6.5e-5, and 2.3e-5 on average with beta1 = 0.9. (Over the rounded values it would
    be r / (1 - beta1^2).)

    Args:
        params: float32, bfloat16 or float16, updated in place; one tensor for each segment, or one flat buffer.
        grads: Like `params`; they may have another dtype.
        exp_avgs: float32 or bfloat16, updated in place. The parameter's update takes them as they are before rounding.
        exp_avg_sqs: Like `exp_avgs`, and of the same dtype.
        plan: The chunks to visit, from `Bucket.plan`.
        step: Number of this update, from 1: an int, or float32 [] or [segments] on the device.
        lr: A number, or a tensor of one element on the device.
        betas: As in torch.optim.AdamW.
        eps: As in torch.optim.AdamW.
        weight_decay: As in torch.optim.AdamW.
        ema: As in `measure_`. Without it the second sum is over exp_avg^2: with betas[0] = beta and no clipping,
            exp_avg is the gauge's own m.
        previous: As in `measure_`.
        beta: As in `measure_`.
        inv_scale: g = grad * inv_scale, for the sums and for the update.
        found_inf: One float32 element on the device. If it is not 0, nothing is changed and the sums are NaN.
        clip: One float32 element on the device. The update uses g * clip, the sums use g.
        zero_grad: Write zeros to the gradient after the update.
        maximize: Ascend instead of descend.
        sums: If False, take no sums and return an empty tensor.
        seed: In [0, 2**32): which random bits stochastic rounding takes. Buckets of one optimizer should have different
            seeds; all ranks that hold the same parameters must have the same.
        stochastic_rounding: Round bfloat16 parameters stochastically instead of to nearest, so that updates below half
            a place are not lost. Refused for parameters of other dtypes.
        backend: A name from `backends()`, or None for the best one of the device.

    Returns:
        float64 [segments, 6] as from `measure_`.

    Raises:
        ValueError: As for `measure_`, before anything is changed.
        TypeError: As for `measure_`, before anything is changed.

    Examples:
        >>> from grgauge_kernels import Bucket
        >>> params, grads = [torch.ones(4)], [torch.full((4,), 0.5)]
        >>> moments, squares = [torch.zeros(4)], [torch.zeros(4)]
        >>> plan = Bucket(params).plan()
        >>> stats = adamw_(
        ...     params, grads, moments, squares, plan, step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        ... )
        >>> params[0]
        tensor([0.9000, 0.9000, 0.9000, 0.9000])
        >>> dict(zip(STATS, stats[0].tolist()))["grad_sq"]
        1.0
    """
    return prepare_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        plan,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        ema=ema,
        previous=previous,
        beta=beta,
        inv_scale=inv_scale,
        found_inf=found_inf,
        clip=clip,
        zero_grad=zero_grad,
        maximize=maximize,
        sums=sums,
        seed=seed,
        stochastic_rounding=stochastic_rounding,
        backend=backend,
    )()


def prepare_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    plan: Plan,
    *,
    step: Tensor | int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema: Tensor | None = None,
    previous: Tensor | None = None,
    beta: float = 0.9,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    zero_grad: bool = False,
    maximize: bool = False,
    sums: bool = True,
    seed: int = 0,
    stochastic_rounding: bool = False,
    backend: str | None = None,
) -> Callable[[], Tensor]:
    """`adamw_` up to where something changes: check everything, allocate, and return the call for the rest.

    For a step over several buckets, which must not stop halfway because the last one is refused or out of memory. A
    `step` tensor may still be incremented before the call. Arguments and errors are those of `adamw_`.
    """
    options = betas, eps, weight_decay, beta, zero_grad, maximize, sums, seed, stochastic_rounding, backend
    fixed = params, exp_avgs, exp_avg_sqs, step, ema, previous, inv_scale, found_inf, clip
    traced = _traced()
    if isinstance(lr, float) and not traced and plan.repeated is not None and plan.repeated.is_of(fixed, options):
        (grads,) = checked(plan, traced, grads=grads)
        if grads.in_order:  # type: ignore[attr-defined]  # it is a Stream
            return _prepared(functools.partial(plan.repeated.prepare, grads, lr), plan.repeated.update, grads)
    grads, params, exp_avgs, exp_avg_sqs = checked(
        plan, traced, grads=grads, params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs
    )
    check_states(plan, ema, previous, beta)
    for name, value in (("inv_scale", inv_scale), ("found_inf", found_inf), ("clip", clip)):
        if value is not None:
            check_scalar(name, value, plan)
    lr_tensor = lr if isinstance(lr, Tensor) else None
    if lr_tensor is not None:
        check_scalar("lr", lr_tensor, plan, dtypes=(torch.float32, torch.float64))
    check_adamw(plan, params, exp_avgs, exp_avg_sqs, step, betas, seed, stochastic_rounding)
    beta1, beta2 = betas
    moment = exp_avgs[0].dtype
    if not isinstance(step, Tensor):
        # a fill: a copy would wait for the device
        step = torch.full((), float(step), dtype=torch.float32, device=plan.rows.device)
    update = Update(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        plan.rows,
        plan.segments,
        step,
        0.0 if lr_tensor is not None else lr,  # type: ignore[arg-type]
        lr_tensor,
        beta1,
        beta2,
        eps,
        weight_decay,
        ema,
        previous,
        beta,
        inv_scale,
        found_inf,
        clip,
        zero_grad,
        maximize,
        sums,
        backend,
        seed,
        stochastic_rounding,
        plan.origins if stochastic_rounding or moment == torch.bfloat16 else None,
    )
    if traced:
        return functools.partial(_dispatched, update)
    chosen = _backend(backend, plan.rows.device)
    if chosen is cpu and isinstance(lr, float) and _can_be_kept(*fixed):
        plan.repeated = Repeated(fixed, step.data_ptr(), options, update._replace(grads=()), cpu.repeatable(update))
        return _prepared(functools.partial(plan.repeated.prepare, grads, lr), update, grads)
    return _prepared(functools.partial(chosen.prepare_adamw_, update), update, grads)


def _prepared(
    prepare: Callable[[], Callable[[], Tensor]], update: Update, grads: Sequence[Tensor]
) -> Callable[[], Tensor]:
    """The call that changes something, once all memory for it is allocated."""
    try:
        return functools.partial(_run, prepare(), update, grads)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"adamw_: {error}") from error


def _can_be_kept(params: object, exp_avgs: object, exp_avg_sqs: object, step: object, *others: Tensor | None) -> bool:
    """True if only gradients and learning rate of an update may have changed as long as these are the same objects."""
    streams = params, exp_avgs, exp_avg_sqs
    plain = all(isinstance(stream, Stream) and stream.in_order for stream in streams)
    return plain and isinstance(step, Tensor) and all(other is None for other in others)


@torch.no_grad()
def _dispatched(update: Update) -> Tensor:
    stats: Tensor = torch.ops.grgauge.adamw_.default(*update)
    return stats


def _run(run: Callable[[], Tensor], update: Update, grads: Sequence[Tensor]) -> Tensor:
    """Holds `update` and `grads`, and with them the tensors, until the kernel is launched: it gets addresses only."""
    try:
        stats = run()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"adamw_: {error}") from error
    # As the dispatcher would have done: a backward that needs an old value must fail rather than be wrong.
    torch.autograd.graph.increment_version(update.params)
    return stats


def _traced() -> bool:
    """True if ops are being recorded or redirected: calls then go through torch's dispatcher, at three times the cost.

    Otherwise the kernel is called directly, which saves a quarter of a step at 0.1 M parameters.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
