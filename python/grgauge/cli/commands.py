"""The command line: `grgauge demo`, `grgauge tune` and `grgauge doctor`.

Nothing heavy is imported before the arguments have been checked: torch only by a command, rich and matplotlib only
where they are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tuning import Result, Trial

INSTALL = "pip install 'grgauge-kernels[cli,plot]'"
PICTURE = Path("grgauge-demo.png")
STEPS, LEAST_STEPS = 160, 10
INSTALL_TUNE = "pip install 'grgauge-kernels[tune]'"
DEMO_BUDGET, DEMO_START = 12_000, (1e-4, 64)

EXIT_CODES = """\
exit codes:
  0    done; for doctor: the device trained on here has a native backend
  1    doctor: it has none; tune: the training function failed
  2    a wrong argument, a package that is missing, or a file that cannot be written
  130  interrupted with Ctrl-C
"""


class CommandError(Exception):
    """A command cannot do what it was asked to do; the message says why, and what to do. Exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # stdout was closed by the shell: `grgauge doctor >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shows "?" for "×" instead of a traceback
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"grgauge {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"grgauge {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `grgauge doctor | head -1` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="grgauge",
        description="Learning rate and batch size, read off a gauge.",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"grgauge {metadata.version('grgauge-kernels')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train a small model at three learning rates, and see what the gauges say about each",
        description="Train a small character transformer on the CPU at three learning rates, far too low, about right "
        "and far too high,\nread the gauges on the way and draw the paths through the (GR_T, GR_S) plane. Takes about "
        "half a minute.\n\nThe live table needs rich, the picture matplotlib: " + INSTALL + "\nWithout a terminal, or "
        "with --json, rich is not needed; without matplotlib, and without --out, the picture is left out.",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    demo.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    demo.add_argument("--out", type=Path, help=f"file for the picture: .png, .pdf, .svg (default: {PICTURE})")
    demo.add_argument("--steps", type=_steps, default=STEPS, help=f"steps of each run (default: {STEPS})")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of weights and batches (default: 0)")
    demo.set_defaults(run=_demo)

    report = commands.add_parser(
        "report",
        help="write one HTML page on a stored study: its verdict, pictures and trials",
        description="Write one self-contained HTML page on a stored study: the verdict, the (GR_T, GR_S) plane, what "
        "each trial\ncost and how it went. Needs optuna: pip install 'grgauge-kernels[tune]'",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    report.add_argument("storage", help="the SQLite file of the study, or any Optuna storage URL")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    report.add_argument("--study", metavar="NAME", help="which study, where the storage holds several")
    report.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    report.set_defaults(run=_report)

    tune = commands.add_parser(
        "tune",
        help="run a training function at a learning rate and batch size found on the way",
        description="Run a training function at a learning rate and batch size that are found on the way, read off the "
        "gauges.\nIt is called with a trial:\n\n"
        "  def train(trial):\n"
        "      model = Net()\n"
        "      optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)\n"
        "      trial.watch(model, optimizer)\n"
        "      for x, y in trial.batches(dataset):\n"
        "          trial.step(loss_of(model(x), y))\n\n"
        "Killed or interrupted, the same command goes on from the newest checkpoint; finished, it trains nothing. "
        "Needs optuna: " + INSTALL_TUNE,
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    tune.add_argument(
        "target", nargs="?", metavar="FILE:FUNCTION", help="the training function: path/to/train.py:train"
    )
    tune.add_argument("--demo", action="store_true", help="a small character transformer in place of FILE:FUNCTION")
    tune.add_argument(
        "--lr", type=_range, default=(1e-5, 1.0), metavar="LOW:HIGH", help="or one number (default: 1e-5:1)"
    )
    tune.add_argument(
        "--batch",
        type=_whole_range,
        default=(8, 512),
        metavar="LOW:HIGH",
        help="in samples, or one number (default: 8:512)",
    )
    tune.add_argument(
        "--weight-decay",
        type=_range,
        metavar="LOW:HIGH",
        help="held in the middle or below, as gauges do not read it; the verdict says whether that matters (default: "
        "the function's own)",
    )
    tune.add_argument(
        "--budget", type=_samples, help=f"in all, as 200000samples or 2e5 (with --demo: {DEMO_BUDGET}samples)"
    )
    tune.add_argument("--start", type=_start, metavar="LR:BATCH", help="where to begin (default: below the middle)")
    tune.add_argument("--storage", default="grgauge.db", help="SQLite file or Optuna URL (default: grgauge.db)")
    tune.add_argument("--study", help="name of the study (default: that of the function)")
    tune.add_argument(
        "--fresh",
        action="store_true",
        help="begin again; a study of that name is kept as NAME-1, NAME-2, ... After a kill, leave it out to go on",
    )
    tune.add_argument("--policy", choices=("default", "paper"), default="default", help="rules (default: default)")
    tune.add_argument("--micro-batch", type=_count, help="samples of one backward pass, at most (default: all)")
    tune.add_argument("--checkpoint-every", type=float, default=30.0, metavar="SECONDS", help="default: 30")
    tune.add_argument("--seed", type=_seed, default=0, help="seed of weights and batches (default: 0)")
    tune.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    tune.set_defaults(run=_tune)

    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and backends, and what to do where one is missing",
        description="Show versions, devices and backends, and what to do where one is missing.",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    doctor.set_defaults(run=_doctor)
    return parser


def _steps(argument: str) -> int:
    steps = int(argument)
    if steps < LEAST_STEPS:
        raise argparse.ArgumentTypeError(f"{steps} is too few for the gauges; it must be at least {LEAST_STEPS}")
    return steps


def _seed(argument: str) -> int:
    seed = int(argument)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{seed} is out of range; it must lie in [0, 2^63)")
    return seed


def _count(argument: str) -> int:
    count = int(argument)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is too few; it must be at least 1")
    return count


def _range(argument: str) -> tuple[float, float]:
    low, colon, high = argument.partition(":")
    ends = float(low), float(high if colon else low)
    if not 0.0 < ends[0] <= ends[1] < math.inf:
        raise argparse.ArgumentTypeError(
            f"{argument} is no range; it must be LOW:HIGH with 0 < LOW <= HIGH, or one number above 0"
        )
    return ends


def _whole_range(argument: str) -> tuple[int, int]:
    low, high = _range(argument)
    if not (low.is_integer() and high.is_integer()):
        raise argparse.ArgumentTypeError(f"{argument} is no range of samples; both ends must be whole numbers")
    return int(low), int(high)


def _samples(argument: str) -> int:
    number = argument.removesuffix("samples").replace("_", "")
    return _count(str(int(float(number))) if float(number).is_integer() else number)


def _start(argument: str) -> tuple[float, int]:
    lr, colon, batch = argument.partition(":")
    if not (colon and 0.0 < float(lr) < math.inf and int(batch) >= 1):
        raise argparse.ArgumentTypeError(f"{argument} is no start; it must be LR:BATCH, such as 1e-3:32")
    return float(lr), int(batch)


# --- demo ------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    live = not options.json and _on_terminal()
    if live and not _installed("rich"):
        raise CommandError(f"the live table needs rich: {INSTALL} (or pass --json)")
    out = _picture(options.out)
    if out is None:
        print(f"No picture: it needs matplotlib: {INSTALL}", file=sys.stderr)

    import torch

    from ..policy import Target
    from ..policy.watch import WINDOW
    from . import demo, progress

    # The model is too small for several threads: they would mostly wait for each other, and for long on a busy machine.
    # One thread also gives the same numbers on any number of cores.
    torch.set_num_threads(1)
    text = demo.Text.manual()
    runs = [demo.Run(lr, options.steps) for lr in demo.LEARNING_RATES]
    started = time.perf_counter()
    if options.json:
        progress.train_quietly(runs, text, options.seed)
    else:
        print(demo.INTRODUCTION, flush=True)
        (progress.train_live if live else progress.train_in_lines)(runs, text, options.seed)
        print(demo.conclusion(runs))
    seconds = time.perf_counter() - started
    if out is not None:
        from . import plot

        paths = {str(run): plot.path(run.readings) for run in runs}
        marks = {str(run): point for run in runs if run.summary for point in plot.path([run.summary])}
        try:
            plot.save_plane(out, paths, marks=marks, title="One model, three learning rates")
        except OSError as error:
            raise CommandError(f"cannot write {out}: {error.strerror}") from error
    if options.json:
        _print_json(
            {
                "seed": options.seed,
                "steps": options.steps,
                "seconds": seconds,
                "target": asdict(Target()),
                "window": WINDOW,
                "runs": [run.to_dict() for run in runs],
                "picture": None if out is None else str(out.absolute()),
            }
        )
    elif out is not None:
        print(f"Picture: {out.absolute()}")
    return 0


def _installed(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def _on_terminal() -> bool:
    """Whether stdout is a terminal on which lines can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _picture(out: Path | None) -> Path | None:
    """Where the picture goes, found to be writable; None if matplotlib is missing and --out was not given."""
    if not _installed("matplotlib"):
        if out is not None:
            raise CommandError(f"--out needs matplotlib: {INSTALL}")
        return None
    from .plot import file_format

    out = PICTURE if out is None else out
    try:
        file_format(out)
        existed = out.exists()
        with out.open("ab"):
            pass
        if not existed:
            out.unlink()
    except ValueError as error:
        raise CommandError(f"--out {error}") from error
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror}; choose another file with --out") from error
    return out


# --- report ----------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    from .. import report

    try:
        study = report.load(options.storage, options.study)
        options.out.write_text(report.page(study), encoding="utf-8")
    except report.ReportError as error:
        raise CommandError(error) from error
    except OSError as error:
        raise CommandError(f"cannot write {options.out}: {error.strerror}; choose another file with --out") from error
    if options.json:
        _print_json({**study.to_dict(), "report": str(options.out.absolute())})
    else:
        print(f"{study.verdict or study.headline}\nReport: {options.out.absolute()}")
    return 0


# --- tune ------------------------------------------------------------------------------------------------------------


def _tune(options: argparse.Namespace) -> int:
    if options.demo == (options.target is not None):
        raise CommandError("give either FILE:FUNCTION, such as train.py:train, or --demo")
    if options.budget is None and not options.demo:
        raise CommandError("--budget is missing: how many samples to train on in all, such as 200000samples")
    if not _installed("optuna"):
        raise CommandError(f"trials are stored with optuna: {INSTALL_TUNE}")
    first = os.environ.get("RANK", "0") == "0"  # under torchrun only rank 0 prints
    live = first and not options.json and _on_terminal()
    if live and not _installed("rich"):
        raise CommandError(f"the live table needs rich: {INSTALL_TUNE} (or pass --json)")

    import optuna

    from ..invariance import Space
    from ..policy import Config, Policy
    from ..tuning import TrainingError, tune
    from . import progress

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
        raise CommandError(str(error)) from error
    if first and options.json:
        _print_json(_document(result, options.storage, options.study or name, budget))
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
        raise CommandError(f"{file or target} is not a file; the training function must be FILE:FUNCTION")
    spec = util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{file} is not a Python file; its name must end with .py")
    module = util.module_from_spec(spec)
    sys.path.insert(0, str(path.absolute().parent))
    sys.modules[path.stem] = module  # classes defined there can then be pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        traceback.print_exception(error)
        raise CommandError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    train = getattr(module, name, None)
    if not callable(train):
        raise CommandError(f"{file} has no function {name!r}")
    return train, name


def _demo_training(trial: Trial) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import TensorDataset

    from ..optim import AdamW
    from .demo import CONTEXT, CharTransformer, Text

    torch.set_num_threads(1)  # as in `_demo`
    text = Text.manual()
    model = CharTransformer(text.characters)
    trial.watch(model, AdamW(model.parameters(), lr=trial.lr))
    for (piece,) in trial.batches(TensorDataset(text.data.unfold(0, CONTEXT + 1, CONTEXT // 4))):
        trial.step(F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten()))


# --- doctor ----------------------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    facts = doctor.examine()
    if options.json:
        _print_json(facts)
    elif _on_terminal() and _installed("rich"):
        _print_table(facts)
    else:
        for section, name, value in doctor.lines(facts):
            print(f"{section:9} {name:16} {value}")
        print(facts["conclusion"])
    return 0 if facts["ok"] else 1


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from . import doctor

    table = Table.grid(padding=(0, 2))
    previous = ""
    for section, name, value in doctor.lines(facts):
        state = {"works": "green"}.get(value, "yellow" if value.startswith(("missing", "not installed")) else "")
        table.add_row(Text(section if section != previous else "", style="bold"), name, Text(value, style=state))
        previous = section
    console = Console()
    console.print(table)
    console.print(Text(facts["conclusion"], style="green" if facts["ok"] else "bold red"))


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """The same, with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
