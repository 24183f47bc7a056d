"""`grgauge tune`: a training function out of a file, or the demo's, under `grgauge.tune`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import arguments, console

if TYPE_CHECKING:
    from ...tuning import Result, Trial

INSTALL = "pip install 'grgauge-kernels[tune]'"
DEMO_BUDGET, DEMO_START = 12_000, (1e-4, 64)

HELP = "run a training function at a learning rate and batch size found on the way"
DESCRIPTION = f"""\
Run a training function at a learning rate and batch size that are found on the way, read off the gauges.
It is called with a trial:

  def train(trial):
      model = Net()
      optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
      trial.watch(model, optimizer)
      for x, y in trial.batches(dataset):
          trial.step(loss_of(model(x), y))

Killed or interrupted, the same command goes on from the newest checkpoint; finished, it trains nothing. \
Needs optuna: {INSTALL}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "target", nargs="?", metavar="FILE:FUNCTION", help="the training function: path/to/train.py:train"
    )
    parser.add_argument("--demo", action="store_true", help="a small character transformer in place of FILE:FUNCTION")
    parser.add_argument(
        "--lr", type=arguments.bounds, default=(1e-5, 1.0), metavar="LOW:HIGH", help="or one number (default: 1e-5:1)"
    )
    parser.add_argument(
        "--batch",
        type=arguments.whole_bounds,
        default=(8, 512),
        metavar="LOW:HIGH",
        help="in samples, or one number (default: 8:512)",
    )
    parser.add_argument(
        "--weight-decay",
        type=arguments.bounds,
        metavar="LOW:HIGH",
        help="held in the middle or below, as gauges do not read it; the verdict says whether that matters (default: "
        "the function's own)",
    )
    parser.add_argument(
        "--budget", type=arguments.samples, help=f"in all, as 200000samples or 2e5 (with --demo: {DEMO_BUDGET}samples)"
    )
    parser.add_argument(
        "--start", type=arguments.start, metavar="LR:BATCH", help="where to begin (default: below the middle)"
    )
    parser.add_argument("--storage", default="grgauge.db", help="SQLite file or Optuna URL (default: grgauge.db)")
    parser.add_argument("--study", help="name of the study (default: that of the function)")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin again; a study of that name is kept as NAME-1, NAME-2, ... After a kill, leave it out to go on",
    )
    parser.add_argument("--policy", choices=("default", "paper"), default="default", help="rules (default: default)")
    parser.add_argument(
        "--micro-batch", type=arguments.count, help="samples of one backward pass, at most (default: all)"
    )
    parser.add_argument("--checkpoint-every", type=float, default=30.0, metavar="SECONDS", help="default: 30")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of weights and batches (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(options: argparse.Namespace) -> int:
    """Train, and print the verdict."""
    if options.demo == (options.target is not None):
        raise console.CommandError("give either FILE:FUNCTION, such as train.py:train, or --demo")
    if options.budget is None and not options.demo:
        raise console.CommandError("--budget is missing: how many samples to train on in all, such as 200000samples")
    if not console.installed("optuna"):
        raise console.CommandError(f"trials are stored with optuna: {INSTALL}")
    first = os.environ.get("RANK", "0") == "0"  # under torchrun only rank 0 prints
    live = first and not options.json and console.on_terminal()
    if live and not console.installed("rich"):
        raise console.CommandError(f"the live table needs rich: {INSTALL} (or pass --json)")

    import optuna

    from ...invariance import Space
    from ...policy import Config, Policy
    from ...tuning import TrainingError, tune
    from .. import progress

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train: Callable[[Trial], Any]
    start, budget = options.start, options.budget
    if options.demo:
        train, name = _demo_training, "demo"
        start, budget = start or DEMO_START, budget or DEMO_BUDGET
    else:
        train, name = _function(options.target)
    shown = progress.tune_live(budget) if live else nullcontext(lambda trial: None)
    space = {"lr": options.lr, "batch_size": options.batch}
    try:
        # With --json what the function prints goes to stderr.
        with redirect_stdout(sys.stderr) if options.json else nullcontext(), shown as on_step:
            result = tune(
                train,
                space if options.weight_decay is None else Space(**space, weight_decay=options.weight_decay),
                budget=budget,
                storage=options.storage,
                study_name=options.study or name,
                fresh=options.fresh,
                policy={"default": Policy.default, "paper": Policy.paper}[options.policy],
                start=None if start is None else Config(*start),
                seed=options.seed,
                micro_batch=options.micro_batch,
                checkpoint_every=options.checkpoint_every,
                on_step=on_step,
            )
    except TrainingError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"grgauge tune: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        raise console.CommandError(str(error)) from error
    if first and options.json:
        console.print_json(_document(result, options.storage, options.study or name, budget))
    elif first:
        print(result.verdict)
    return 0


def _document(result: Result, storage: str, study: str, budget: int) -> dict[str, Any]:
    return {
        "recommendation": asdict(result.config),
        "loss": result.loss,
        "used": result.used,
        "budget": budget,
        "verdict": result.verdict,
        "storage": storage,
        "study": study,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state,
                **asdict(trial.config),
                "loss": trial.loss,
                **trial.attributes(),
            }
            for trial in result.trials
        ],
    }


def _function(target: str) -> tuple[Callable[[Trial], Any], str]:
    """The function FILE:FUNCTION and its name. The file's folder is first on the path, as for a script."""
    file, colon, name = target.rpartition(":")
    path = Path(file)
    if not colon or not path.is_file():
        raise console.CommandError(f"{file or target} is not a file; the training function must be FILE:FUNCTION")
    spec = util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise console.CommandError(f"{file} is not a Python file; its name must end with .py")
    module = util.module_from_spec(spec)
    sys.path.insert(0, str(path.absolute().parent))
    sys.modules[path.stem] = module  # classes defined there can then be pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        traceback.print_exception(error)
        raise console.CommandError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    train = getattr(module, name, None)
    if not callable(train):
        raise console.CommandError(f"{file} has no function {name!r}")
    return train, name


def _demo_training(trial: Trial) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import TensorDataset

    from ...optim import AdamW
    from ..char_transformer import CONTEXT, CharTransformer, Text

    torch.set_num_threads(1)  # as the command demo does
    text = Text.manual()
    model = CharTransformer(text.characters)
    trial.watch(model, AdamW(model.parameters(), lr=trial.lr))
    for (piece,) in trial.batches(TensorDataset(text.data.unfold(0, CONTEXT + 1, CONTEXT // 4))):
        trial.step(F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten()))
