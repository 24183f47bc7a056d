"""Ray's population based training, live."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from families import Family
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

import grgauge

from .live import LIMIT, Looks
from .replay import FORWARD
from .table import BOUNDS, CHECKS
from .training import averaged, batches, validated

MEMBERS = 4
"""So that each may train for a whole run within the limit of live tuners."""
INTERVAL = 2
"""Checks between two turns of exploiting and exploring: a tenth of a run."""


class Member(tune.Trainable):  # type: ignore[misc]
    """One of the population. It trains from check to check, and is validated at each."""

    def setup(self, config: dict[str, Any], family: Family, seed: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.family = family
        self.net = family.model()
        self.optimizer = grgauge.AdamW(family.param_groups(self.net), lr=config["lr"])  # type: ignore[arg-type]
        self.average = averaged(self.net)
        self.turn = 0
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        for group in self.optimizer.param_groups:
            group["lr"] = config["lr"]
        self.batch, self.turn = int(config["batch"]), self.turn + 1
        return True

    def step(self) -> dict[str, float]:
        goal, samples, start = self.family.samples / CHECKS, 0, time.thread_time()
        for batch in batches(self.family, self.batch, 1000 * self.turn + self.iteration):
            self.family.loss(self.net, batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.net)
            samples += self.batch
            if samples >= goal:
                break
        seconds = time.thread_time() - start
        value = self.family.validate(self.net)
        seen = {"raw": value, "average": validated(self.family, self.average)}
        loss = -value if self.family.higher else value
        return {**seen, "loss": loss if np.isfinite(loss) else 1e9, "samples": samples, "seconds": seconds}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        parts = self.net, self.optimizer, self.average
        torch.save([part.state_dict() for part in parts], Path(checkpoint_dir) / "state.pt")

    def load_checkpoint(self, checkpoint: str) -> None:
        states = torch.load(Path(checkpoint) / "state.pt", weights_only=True)
        for part, state in zip((self.net, self.optimizer, self.average), states, strict=True):
            part.load_state_dict(state)
        self.reset_config(self.config)  # the optimizer's state has the learning rate of whom it was copied from


class Watch(tune.Callback, tune.Stopper):  # type: ignore[misc]
    """Counts what all members spend, validations included, since these are shown to them; ends it once all is met."""

    def __init__(self, looks: Looks) -> None:
        self.looks, self.samples, self.seconds, self.over = looks, 0.0, 0.0, False

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        validation = FORWARD * len(self.looks.family.held_out)
        self.samples += result["samples"] + validation
        self.seconds += result["seconds"] * (1.0 + validation / result["samples"])
        if not self.over:
            self.looks.seen.append((self.samples, self.seconds, result["raw"], result["average"]))
            self.over = self.looks.arrived or self.samples >= LIMIT * self.looks.family.samples

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.over

    def stop_all(self) -> bool:
        return self.over


def pbt(family: Family, seed: int, goals: dict[bool, float]) -> Looks:
    """Population based training with Ray's defaults, over the plane. Members take turns on one processor."""
    looks = Looks(family, goals)
    random.seed(seed)  # that PBT draws from, both
    np.random.seed(seed)  # noqa: NPY002
    (low, high), (least, most) = BOUNDS["lr"], BOUNDS["batch"]
    space = {"lr": tune.loguniform(low, high), "batch": tune.lograndint(int(least), int(most) + 1)}
    watch = Watch(looks)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
        )
        try:
            scheduler = PopulationBasedTraining(
                "training_iteration", perturbation_interval=INTERVAL, hyperparam_mutations=space, log_config=False
            )
            member = tune.with_resources(tune.with_parameters(Member, family=family, seed=seed), {"cpu": 1.0 / MEMBERS})
            tune.Tuner(
                member,
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="loss",
                    mode="min",
                    num_samples=MEMBERS,
                    reuse_actors=True,
                    scheduler=scheduler,
                    search_alg=BasicVariantGenerator(random_state=seed),
                ),
                run_config=tune.RunConfig(stop=watch, callbacks=[watch], storage_path=folder, verbose=0),
            ).fit()
        finally:
            ray.shutdown()
    return looks
