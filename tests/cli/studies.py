"""Studies in SQLite: a usual one, and those that are hard to draw."""

from __future__ import annotations

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

SPACE = {
    "lr": FloatDistribution(1e-5, 1.0, log=True),
    "batch_size": IntDistribution(8, 512, log=True),
    "weight_decay": FloatDistribution(0.0, 1.0),
}
ATTACK = (
    """</title></script><script>document.title = "owned"</script><img src=x onerror=alert(1)> "'&amp; \x00\x1b\ud800"""
)


def reading(samples, gr_t, gr_s, ready=True, **other):
    place = {"samples": samples, "step": samples // 32}
    return {**place, "gr_t": gr_t, "gr_s": gr_s, "ready": ready, **other}


def trial(state="PRUNED", lr=1e-3, batch=64, value=None, **said):
    params = {"lr": lr, "batch_size": batch, "weight_decay": 0.01}
    return create_trial(
        state=TrialState[state],
        params=params,
        distributions=SPACE,
        user_attrs=said,
        value=2.0 if state == "COMPLETE" and value is None else value,
    )


def segment(i, state="PRUNED", lr=1e-3, batch=64, parent=None, gr_t=8.0, gr_s=0.6, **said):
    """A trial that says everything; each costs 4000 samples."""
    readings = [reading(4000 * i + 200 * k, gr_t * (1 + 0.02 * (k % 3)), gr_s, ready=k > 3) for k in range(20)]
    return trial(
        state,
        lr,
        batch,
        **{
            "parent": parent,
            "reason": "GR_T below its zone",
            "decision": {
                "kind": "retune",
                "rule": "too low",
                "evidence": {"rule": "too low", "step": 60, "quantity": "GR_T", "value": gr_t, "interval": [7.1, 9.2]},
            },
            "samples": 4000,
            "start_samples": 4000 * i,
            "seconds": 90.0,
            "readings": readings,
            "losses": [[4000 * i + 40 * k, 4.0 - 0.01 * k - 0.2 * i] for k in range(100)],
            **said,
        },
    )


def stored(path, trials, name="letters", **attributes):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name=name)
    study.add_trials(trials)
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    study._storage._backend.engine.dispose()
    optuna.logging.set_verbosity(before)
    return path


def typical(path):
    """Up, too far up, back to the saved weights, afresh, and on to the recommendation."""
    return stored(
        path,
        [
            segment(0, lr=1e-4, batch=256, gr_t=1.5, gr_s=0.2),
            segment(1, lr=1e-3, parent=0, probes=1),
            segment(2, "FAIL", lr=5e-2, parent=1, gr_t=90.0, reason="rolled back", error="loss is nan"),
            segment(3, lr=8e-3, gr_t=35.0),
            segment(4, "COMPLETE", lr=4e-3, batch=48, parent=1, gr_t=19.5, gr_s=0.58, reason="in the zone"),
            segment(5, "RUNNING", lr=4e-3, batch=48, parent=4, gr_t=20.0, gr_s=0.58, reason=None, decision=None),
        ],
        target={"gr_t": 20.0, "gr_s": 0.58, "gr_t_zone": [18.0, 22.0], "gr_s_zone": [0.5, 0.65]},
        verdict="Train with lr 4e-3 and batch 48: GR_T and GR_S are in the zone.",
        recommendation={"lr": 4e-3, "batch_size": 48, "weight_decay": 0.01},
        used=24_000,
        budget=60_000,
    )


def awkward(path):
    """Everything that may be missing, not finite, far too long or hostile."""
    nan, inf = float("nan"), float("inf")
    readings = [reading(0, None, None), reading(50, nan, 0.5), reading(100, inf, inf), reading(150, -1.0, 2.0), {}, 3]
    return stored(
        path,
        [
            create_trial(state=TrialState.FAIL),
            trial("RUNNING"),
            trial("COMPLETE", value=1e30, readings=readings, losses=[[0, nan], [5, inf], [9, 1e30], [10], "x"]),
            trial("PRUNED", reason=ATTACK * 40, error="word" * 3000, decision=[ATTACK], parent=99, samples="many"),
            trial(
                "PRUNED", reason=7, decision={"kind": ATTACK, "rule": ATTACK, "evidence": ATTACK}, parent=0, samples=0
            ),
            trial("PRUNED", decision={"evidence": {"quantity": ATTACK, "value": 1, "interval": [None]}}, samples=1e9),
            trial("WAITING", readings={"a": 1}, losses=None, seconds=nan),
        ],
        name=ATTACK[:-1],
        verdict=ATTACK,
        recommendation={"lr": nan, "batch_size": "all"},
        target={"gr_t": -3, "gr_s_zone": "wide"},
        used=nan,
        budget=0,
    )


def many(path, n=200):
    def each(i):
        state, parent = ("PRUNED", "COMPLETE", "FAIL")[i % 3], None if i % 9 == 0 else i - 1
        return segment(i, state, lr=1e-4 * 1.04**i, parent=parent, gr_t=1.0 + i, gr_s=0.2 + 0.6 * (i % 7) / 7)

    trials = [each(i) for i in range(n)]
    return stored(path, trials, verdict="many")


def one(path):
    return stored(path, [segment(0)])


def empty(path):
    return stored(path, [])


STUDIES = (typical, awkward, many, one, empty)
