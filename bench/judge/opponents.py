"""The opponents that are replayed on the table, each driven as its own package says."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from .protocol import Curve
from .replay import Bench, Run, Spent
from .table import BOUNDS, CHECKS, SEEDS, Config, Family, grid

FAILED = 1e9
"""Loss that is reported of a run that failed, to packages that take no infinity."""
Tuner = Callable[[Bench, int], None]
"""Spends a bench's budget; the second argument is its seed."""


def start_of(seed: int) -> Config:
    """A blind start: log-uniform over the plane."""
    rng = random.Random(seed)
    (low, high), (least, most) = BOUNDS["lr"], BOUNDS["batch"]
    return Config(low * (high / low) ** rng.random(), round(least * (most / least) ** rng.random()))


def random_search(bench: Bench, seed: int) -> None:
    """Whole runs at configurations drawn log-uniformly."""
    _optuna(bench, optuna.samplers.RandomSampler(seed=seed), optuna.pruners.NopPruner(), [CHECKS])


def successive_halving(bench: Bench, seed: int) -> None:
    """Optuna's asynchronous successive halving, with its defaults, from one check up."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1)
    _optuna(bench, optuna.samplers.RandomSampler(seed=seed), pruner, [1, 4, 16, CHECKS])


def hyperband(bench: Bench, seed: int) -> None:
    """Optuna's Hyperband, with its defaults, over random configurations."""
    _optuna(bench, optuna.samplers.RandomSampler(seed=seed), _hyperband(), [1, 3, 9, CHECKS])


def tpe_hyperband(bench: Bench, seed: int) -> None:
    """Optuna's TPE under its Hyperband."""
    _optuna(bench, optuna.samplers.TPESampler(seed=seed), _hyperband(), [1, 3, 9, CHECKS])


def _hyperband() -> optuna.pruners.BasePruner:
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=CHECKS)


def _optuna(
    bench: Bench, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner, rungs: list[int]
) -> None:
    """Trials one after the other. They report, and pay for a validation, at the rungs alone: nothing is pruned between
    them."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=sampler, pruner=pruner, study_name="judge")
        while True:
            trial = study.ask()
            lr = trial.suggest_float("lr", *BOUNDS["lr"], log=True)
            batch = trial.suggest_int("batch", *BOUNDS["batch"], log=True)
            run, value = bench.trial(lr, batch), math.inf
            for rung in rungs:
                run.train(rung)
                value = run.validate()
                if not math.isfinite(value):
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    break
                trial.report(value, rung)
                if rung < CHECKS and trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
            else:
                study.tell(trial, value)
    finally:
        optuna.logging.set_verbosity(level)


def cfo(bench: Bench, seed: int) -> None:
    """FLAML's CFO over whole runs, from a blind start, as its low-cost point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flaml.automl is not available")  # nor needed
        from flaml import CFO, tune

    start = start_of(seed)
    (low, high), (least, most) = BOUNDS["lr"], BOUNDS["batch"]
    at = {"lr": start.lr, "batch": start.batch}
    logging.getLogger("flaml").setLevel(logging.WARNING)
    search = CFO(
        metric="loss",
        mode="min",
        space={"lr": tune.loguniform(low, high), "batch": tune.lograndint(int(least), int(most) + 1)},
        points_to_evaluate=[at],
        low_cost_partial_config=at,
        seed=seed,
    )
    for number in range(10**6):
        config = search.suggest(str(number))
        if config is None:  # nothing new to propose: this thread has converged
            continue
        run = bench.trial(config["lr"], config["batch"])
        run.train(CHECKS)
        loss = run.validate()
        result = {"config": config, "loss": loss if math.isfinite(loss) else FAILED, "time_total_s": run.seconds}
        search.on_trial_complete(str(number), result=result)
    raise RuntimeError("CFO proposed nothing new a million times")


def smac(bench: Bench, seed: int) -> None:
    """SMAC3's multi-fidelity facade, random forests under Hyperband, with its defaults, from one check up to a whole
    run. A configuration that is promoted trains on from where it was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Importing from 'dask")
        from ConfigSpace import ConfigurationSpace, Float, Integer
        from smac import MultiFidelityFacade, Scenario
        from smac.runhistory import StatusType, TrialValue

    space = ConfigurationSpace(seed=seed)
    (low, high), (least, most) = BOUNDS["lr"], BOUNDS["batch"]
    space.add(Float("lr", (low, high), log=True), Integer("batch", (int(least), int(most)), log=True))
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            space,
            output_directory=Path(folder),
            deterministic=True,  # one seed each, as for the others
            n_trials=10**6,  # the bench ends it
            min_budget=1,
            max_budget=CHECKS,
            seed=seed,
        )
        facade = MultiFidelityFacade(scenario, lambda config, seed, budget: math.nan, logging_level=False)
        begun: dict[Any, Run] = {}
        while True:
            trial = facade.ask()
            if trial.config not in begun:
                begun[trial.config] = bench.trial(trial.config["lr"], trial.config["batch"])
            run = begun[trial.config]
            run.train(trial.budget)
            loss = run.validate()
            value = TrialValue(loss) if math.isfinite(loss) else TrialValue(FAILED, status=StatusType.CRASHED)
            facade.tell(trial, value, save=False)


def static(config: Config, seed: int | None = None) -> Tuner:
    """A tuner that never moves: one run."""

    def tuner(bench: Bench, tuner_seed: int) -> None:
        bench.trial(config.lr, config.batch, SEEDS[tuner_seed % len(SEEDS)] if seed is None else seed).train(CHECKS)

    return tuner


def calibrated(others: list[Family]) -> Config:
    """The configuration with the least mean rank over other families, by the metric at the end.

    Raises ValueError if there are no other families.
    """
    if not others:
        raise ValueError(
            "others is empty; one configuration is calibrated over other families, of which there are none"
        )
    configs = grid()
    ranks = np.zeros(len(configs))
    for family in others:
        losses = np.array([family.loss(family.final(config)) for config in configs])
        ranks += np.array([(losses < loss).sum() + 0.5 * (losses == loss).sum() for loss in losses])
    return configs[int(ranks.argmin())]


REPLAYED: dict[str, Tuner] = {
    "random search": random_search,
    "successive halving (Optuna)": successive_halving,
    "Hyperband (Optuna)": hyperband,
    "TPE + Hyperband (Optuna)": tpe_hyperband,
    "CFO (FLAML)": cfo,
    "SMAC3 multi-fidelity": smac,
}


def replayed(tuner: Tuner, family: Family, seed: int, held_out: int, **options: Any) -> Curve:
    """Everything that a tuner trains, as seen from outside."""
    bench = Bench(family, seed, held_out, **options)
    with contextlib.suppress(Spent):
        tuner(bench, seed)
    return bench.curve()
