"""GradES on a small Llama: pre-trained on Python's library, fine-tuned on Python's documentation.

    full, full + early stopping (on validation loss), full + GradES, full + released (the package `grades`, where it is
    installed), LoRA, LoRA + GradES

All arms of a seed see the same batches, one after the other, and one AdamW; each is timed as it would be run, the
validation passes of early stopping included. FLOPs are counted by torch once for every set of frozen matrices that
occurs, outside the clock. Writes bench/results/grades.csv and grades.png, and prints the table.

    python bench/grades.py [--seeds 5] [--steps 600] [--arms full "full + GradES"] [--quick]

What there is to gain depends on how long the run is: freezing begins half-way, so it saves what the second half does in
vain. 300 steps see the text nearly five times and 600 nearly ten times. Needs transformers and peft. --quick runs
everything once, tiny, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from pydoc_data import topics
from statistics import mean, stdev
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import peft
import torch
import transformers
import turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grgauge import AdamW, GradES

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).resolve().parents[1] / "build" / "bench"
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COLUMNS = (
    "date,commit,device,torch,seed,arm,metric,tau,steps,seconds,flops,loss,accuracy,frozen,hook_share,state_share,"
    + ",".join(TYPES)
)
ARMS = ("full", "full + early stopping", "full + GradES", "full + released", "LoRA", "LoRA + GradES")


@dataclass(frozen=True)
class Size:
    """Tokens are bytes."""

    width: int = 128
    layers: int = 4
    context: int = 128
    batch: int = 8
    pretraining: int = 1000
    steps: int = 600
    text: int = 2**16
    """Of the documentation, to fine-tune on."""
    validations: int = 30
    """Validation passes of the early stopping, in a whole run."""
    held_out: int = 16
    """Batches in a validation pass, and in the final test."""


QUICK = Size(width=32, layers=2, context=32, batch=4, pretraining=20, steps=40, validations=4, held_out=2)


@dataclass
class Outcome:
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    loss: float = math.nan
    accuracy: float = math.nan
    hook_share: float = 0.0
    state_share: float = 0.0
    frozen_at: dict[str, int] = field(default_factory=dict)


# --- text, model, batches ---------------------------------------------------------------------------------------------


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def library() -> Tensor:
    """The source of the standard library's modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    return as_bytes("".join(file.read_text(errors="ignore") for file in sorted(folder.glob("*.py"))))


def documentation(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """The language reference's topics: the first `size.text` to train on, 10 % to validate on, 10 % to test on."""
    text = as_bytes("".join(topics.topics[name] for name in sorted(topics.topics)))
    a, b = int(0.8 * len(text)), int(0.9 * len(text))
    return text[: min(size.text, a)], text[a:b], text[b:]


def batches(text: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    """Random windows, int64 [batch, context], without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - size.context, (size.batch,), generator=generator)
        yield torch.stack([text[i : i + size.context] for i in starts.tolist()])


def untrained(size: Size) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=size.width,
            intermediate_size=8 * size.width // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=size.context,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TYPES)))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def scheduled(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a twentieth, then a cosine down to a tenth."""

    def factor(step: int) -> float:
        done = step / steps
        return min(1.0, (step + 1) / (0.05 * steps)) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pretrained(size: Size) -> dict[str, Tensor]:
    """The weights that every arm starts from, kept from run to run."""
    own = (size.width, size.layers, size.context, size.batch, size.pretraining)
    file = CACHE / f"llama-{'-'.join(map(str, own))}.pt"
    if not file.exists():
        torch.manual_seed(0)
        model = untrained(size)
        optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        schedule = scheduled(optimizer, size.pretraining)
        for _, tokens in zip(range(size.pretraining), batches(library(), size, 0), strict=False):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()
            schedule.step()
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights


@torch.no_grad()
def evaluated(model: nn.Module, text: Tensor, size: Size) -> tuple[float, float]:
    """(mean loss, share of next bytes that are right) on fixed windows."""
    losses, right = [], []
    for _, tokens in zip(range(size.held_out), batches(text, size, 7), strict=False):
        output = model(input_ids=tokens, labels=tokens)
        losses.append(float(output.loss))
        right.append(float((output.logits[:, :-1].argmax(-1) == tokens[:, 1:]).double().mean()))
    return mean(losses), mean(right)


# --- the arms ---------------------------------------------------------------------------------------------------------


class EarlyStopping:
    """Stops at the third validation in a row without a new best."""

    def __init__(self, model: nn.Module, text: Tensor, size: Size) -> None:
        self._model, self._text, self._size = model, text, size
        self._every = max(1, size.steps // size.validations)
        self._best, self._worse = math.inf, 0

    def done(self, step: int) -> bool:
        if step % self._every == 0:
            loss, _ = evaluated(self._model, self._text, self._size)
            self._worse = 0 if loss < self._best else self._worse + 1
            self._best = min(self._best, loss)
        return self._worse >= 3


def released_package() -> ModuleType | None:
    """The installed package `grades`, whose name this file has too; None where there is none."""
    try:
        file = metadata.distribution("grades").locate_file("grades/__init__.py")
    except metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("released_grades", str(file))
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["released_grades"] = package
    spec.loader.exec_module(package)
    return package


class Released:
    """The released callback, called as a Trainer would call it."""

    def __init__(self, package: ModuleType, model: nn.Module, steps: int, tau: float, alpha: float) -> None:
        config = package.GradEarlyStoppingConfig(tau=tau, alpha=alpha, enable_wandb_logging=False)
        self.callback = package.GradEarlyStoppingCallback(config)
        self._model, self._state = model, SimpleNamespace(max_steps=steps, global_step=0)
        self._control = SimpleNamespace(should_training_stop=False)
        self.callback.on_train_begin(SimpleNamespace(output_dir=""), self._state, self._control, model=model)

    def done(self, step: int) -> bool:
        self._state.global_step = step
        self.callback.on_step_end(SimpleNamespace(), self._state, self._control, model=self._model)
        return bool(self._control.should_training_stop)


class Comparison(NamedTuple):
    """The released package, and its tau."""

    package: ModuleType
    tau: float


class Hook:
    """Seconds spent in the step hooks that are registered inside the context."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = self._start = 0.0
        self._optimizer = optimizer

    def __enter__(self) -> Hook:
        self._optimizer.register_step_pre_hook(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        self._optimizer.register_step_pre_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def flops_of(model: nn.Module, tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_of(model, tokens).backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def trained(
    arm: str, weights: dict[str, Tensor], size: Size, seed: int, options: dict[str, Any], comparison: Comparison | None
) -> tuple[Outcome, GradES | None]:
    """One arm, from the pre-trained weights to its end."""
    torch.manual_seed(seed)
    model = untrained(size)
    model.load_state_dict(weights)
    lora = arm.startswith("LoRA")
    if lora:
        model = with_lora(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr=3e-3 if lora else 1e-3, weight_decay=0.01)
    train, validation, test = documentation(size)
    hook, grades, released = Hook(optimizer), None, None
    done: Callable[[int], bool] = lambda step: False  # noqa: E731
    if "GradES" in arm:
        with hook:
            grades = GradES(model, optimizer, total_steps=size.steps, **options)
        done = lambda step: grades.done  # noqa: E731
    elif "released" in arm:
        assert comparison is not None
        released = Released(comparison.package, model, size.steps, comparison.tau, options["alpha"])
        done = released.done
    elif "early stopping" in arm:
        done = EarlyStopping(model, validation, size).done
    schedule = scheduled(optimizer, size.steps)
    outcome, counted = Outcome(), {}
    for step, tokens in zip(range(1, size.steps + 1), batches(train, size, seed), strict=False):
        trainable = frozenset(i for i, p in enumerate(params) if p.requires_grad)
        if trainable not in counted:
            counted[trainable] = flops_of(model, tokens)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        schedule.step()
        end = done(step)
        outcome.seconds += time.perf_counter() - start
        outcome.flops += counted[trainable]
        outcome.steps = step
        if grades is not None and grades.metric == "delta" and (step + 1) % grades.every == 0:
            filled = [pair for pair in grades.state_dict()["filled"] if pair is not None]
            state = sum(4 * previous.numel() for previous, _ in filled)
            whole = sum(p.numel() * p.element_size() for p in model.parameters())
            outcome.state_share = max(outcome.state_share, state / whole)
        if end:
            break
    outcome.hook_share = hook.seconds / outcome.seconds
    outcome.loss, outcome.accuracy = evaluated(model, test, replace(size, held_out=4 * size.held_out))
    if grades is not None:
        outcome.frozen_at = grades.frozen
    if released is not None:
        stats = released.callback.component_stats
        outcome.frozen_at = {name: s.frozen_at_step for name, s in stats.items() if s.frozen}
    return outcome, grades


def comparison_with(package: ModuleType, weights: dict[str, Tensor], size: Size, options: dict[str, Any]) -> Comparison:
    """The released package has no tau for a model of this size: take the median over matrices of what it measures
    half-way between the end of its grace period and the end of a run."""
    torch.manual_seed(1000)
    model = untrained(size)
    model.load_state_dict(weights)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = scheduled(optimizer, size.steps)
    released = Released(package, model, size.steps, 1e-300, options["alpha"])
    at = math.ceil((1 + options["alpha"]) / 2 * size.steps)
    for step, tokens in zip(range(1, at + 1), batches(documentation(size)[0], size, 1000), strict=False):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        schedule.step()
        released.done(step)
    changes = sorted(s.change_history[-1][1] for s in released.callback.component_stats.values())
    return Comparison(package, float(changes[len(changes) // 2]))


# --- report -----------------------------------------------------------------------------------------------------------


def steps_by_type(frozen_at: dict[str, int]) -> dict[str, float | str]:
    """Mean freezing step of each type of matrix; empty where none froze."""
    found = defaultdict(list)
    for name, step in frozen_at.items():
        for kind in TYPES:
            if kind in name:
                found[kind].append(step)
    return {kind: mean(found[kind]) if found[kind] else "" for kind in TYPES}


def spread(values: list[float], form: str) -> str:
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Means over seeds; speed and FLOPs against the plain arm of the same kind and seed."""
    lines = [
        "| arm | steps | faster | FLOPs | loss | accuracy, % | frozen | hook, % | state, % | attention, MLP at |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|:---|",
    ]
    for arm, runs in outcomes.items():
        plain = outcomes["LoRA" if arm.startswith("LoRA") else "full"]
        pairs = list(zip(runs, plain, strict=True))
        at = [steps_by_type(run.frozen_at) for run in runs]
        halves = []
        for kinds in (TYPES[:4], TYPES[4:]):
            known = [step for steps in at for kind in kinds if isinstance(step := steps[kind], (int, float))]
            halves.append(f"{mean(known):.0f}" if known else "–")
        cells = [
            arm,
            spread([float(run.steps) for run in runs], ".0f"),
            spread([other.seconds / run.seconds for run, other in pairs], ".2f") + "×",
            spread([run.flops / other.flops for run, other in pairs], ".2f") + "×",
            spread([run.loss for run in runs], ".4f"),
            spread([100 * run.accuracy for run in runs], ".2f"),
            spread([float(len(run.frozen_at)) for run in runs], ".0f"),
            spread([100 * run.hook_share for run in runs], ".2f"),
            spread([100 * run.state_share for run in runs], ".2f"),
            ", ".join(halves),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, history: dict[str, GradES], size: Size) -> None:
    """Readings against each matrix's own level, and the share that is frozen, by type; the last seed's runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(history), figsize=(5 * len(history), 6), squeeze=False, sharex=True)
    for column, (arm, grades) in zip(grid.T, history.items(), strict=True):
        levels = [grades.levels[name] or math.nan for name in grades.matrices]
        steps = [reading.step for reading in grades.history]
        for kind in TYPES:
            own = [i for i, name in enumerate(grades.matrices) if kind in name]
            readings = [[r.values[i] / levels[i] for i in own if r.values[i] == r.values[i]] for r in grades.history]
            column[0].plot(steps, [mean(r) if r else math.nan for r in readings], label=kind, lw=1)
            at = [grades.frozen[grades.matrices[i]] for i in own if grades.matrices[i] in grades.frozen]
            share = [sum(step <= s for step in at) / len(own) for s in range(size.steps)]
            column[1].plot(share, lw=1)
        column[0].axhline(grades.tau, color="#404040", ls=":")
        column[0].set_title(arm)
        column[0].set_ylabel("reading / early level")
        column[1].set_ylabel("share frozen")
        column[1].set_xlabel("step")
    grid[0, 0].legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run everything once, tiny, and write nothing")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--metric", choices=("delta", "norm"), default="delta")
    parser.add_argument("--steps", type=int, default=Size.steps, help=f"of fine-tuning (default: {Size.steps})")
    parser.add_argument("--tau", type=float, default=1.3, help="share of each matrix's own early level (default: 1.3)")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--enough", type=float, default=0.75, help="share that is to be frozen to stop (default: 0.75)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="some of them; full ones need full")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the model is small: threads would mostly wait for each other
    size = QUICK if given.quick else Size(steps=given.steps)
    options = {"metric": given.metric, "tau": given.tau, "alpha": given.alpha, "enough": given.enough}
    if given.quick:
        options["every"] = 2
    weights = pretrained(size)
    package = released_package()
    comparison = comparison_with(package, weights, size, options) if package is not None else None
    arms = [arm for arm in ARMS if arm in given.arms and ("released" not in arm or comparison is not None)]
    outcomes: dict[str, list[Outcome]] = {arm: [] for arm in arms}
    history: dict[str, GradES] = {}
    trained("full", weights, replace(size, steps=3), 0, options, None)  # outside the comparison: the first is slower
    for seed in range(1 if given.quick else given.seeds):
        for arm in arms:
            outcome, grades = trained(arm, weights, size, seed, options, comparison)
            outcomes[arm].append(outcome)
            if grades is not None:
                history[arm] = grades
            if not given.quick:
                taus = {"released": comparison and comparison.tau, "GradES": given.tau}
                tau = next((value for word, value in taus.items() if word in arm), "")
                row = turns.origin(torch.device("cpu")) | asdict(outcome) | steps_by_type(outcome.frozen_at)
                row |= {"seed": seed, "arm": arm, "metric": given.metric if "GradES" in arm else "", "tau": tau}
                turns.append(RESULTS / "grades.csv", COLUMNS, [row | {"frozen": len(outcome.frozen_at)}])
            print(f"seed {seed}, {arm}: {outcome.seconds:.1f} s, loss {outcome.loss:.4f}", flush=True)
    print(table(outcomes))
    if comparison is None:
        print("the released package is not compared: pip install grades")
    if not given.quick and history:
        draw(RESULTS / "grades.png", history, size)


if __name__ == "__main__":
    main()
