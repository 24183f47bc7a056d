"""When the measured rules ask for a probe, in which direction, and what follows from its losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy.healthy import CONFIG, READING, watch

from grgauge import Config, Continue, Evidence, Policy, Retune
from grgauge.policy import Probe

UP, DOWN = 3.0, 1.0 / 3.0


def hidden(policy, first, last, config=CONFIG):
    """Readings whose GR_S hides the learning rate, from one step to another: the first probe, or None."""
    for step in range(first, last, 5):
        reading = replace(READING, step=step, gr_s=0.9, gr_s_error=0.3)
        decision = policy.observe(reading, config, loss=3.0 - step / 500)
        if isinstance(decision, Probe):
            assert decision.configs[0] == config
            return decision, step
    return None


def factor(probe):
    here, there = probe.configs
    assert there.batch_size == here.batch_size
    return there.lr / here.lr


def test_the_first_probe_goes_up():
    probe, _ = hidden(Policy(), 5, 105)
    assert factor(probe) == pytest.approx(UP)


@pytest.mark.parametrize(("times", "wanted"), [(0.1, 0.3), (0.3, 0.9), (0.5, 1.0)])
def test_from_below_a_probe_goes_no_further_than_the_usual_learning_rate(times, wanted):
    """In units of it."""
    policy = Policy()
    probe, _ = hidden(policy, 5, 105, Config(times * policy.usual_lr, 64))
    assert probe.configs[1].lr == pytest.approx(wanted * policy.usual_lr)


def test_at_a_usual_learning_rate_the_first_one_waits():
    usual = Policy(lr_bounds=(CONFIG.lr / 10 ** (5 * 4 / 9), CONFIG.lr * 10 ** (5 * 5 / 9)))
    _, step = hidden(usual, 5, 1005)
    assert step == 600


@pytest.mark.parametrize(("times", "steps"), [(0.05, 80), (0.5, 600)])
def test_a_learning_rate_that_was_raised_beyond_the_usual_one_is_given_time(times, steps):
    """GR_T raises it four times; what is beyond then is compared with a higher one as late as the usual one is."""
    policy = Policy()
    start = Config(times * policy.usual_lr, 32)
    raised = watch(policy, start, gr_t=2.0, losses=[3.0] * 20, first=55).config
    assert raised.lr == pytest.approx(4.0 * start.lr)
    _, step = hidden(policy, 65, 1005, raised)
    assert step == pytest.approx(steps, abs=20)


@pytest.mark.parametrize(("gr_t", "first"), [(14.0, 60), (18.0, 600)])
def test_the_first_one_does_not_wait_where_gradients_agree_but_for_their_noise(gr_t, first):
    """Noise alone reads 19 and has 0.896 of the squared norm: the rest reads 4.2 (6.0 at most) and 12 (22)."""
    usual = Policy(lr_bounds=(CONFIG.lr / 10 ** (5 * 4 / 9), CONFIG.lr * 10 ** (5 * 5 / 9)))
    for step in range(5, 1005, 5):
        sharp = replace(READING, step=step, gr_t=gr_t, gr_t_error=0.05 * gr_t, gr_s=0.9, gr_s_error=0.02)
        if isinstance(usual.observe(sharp, CONFIG, loss=3.0 - step / 500), Probe):
            assert step == first
            return
    pytest.fail("no probe")


@pytest.mark.parametrize("gr_t", [0.0, 5e-324, 1e300, float("inf"), float("nan"), None])
@pytest.mark.parametrize("gr_s_error", [None, float("nan"), float("inf"), 0.0])
def test_a_gr_t_without_meaning_does_not_hurry_it(gr_t, gr_s_error):
    usual = Policy(lr_bounds=(CONFIG.lr / 10 ** (5 * 4 / 9), CONFIG.lr * 10 ** (5 * 5 / 9)))
    for step in range(5, 595, 5):
        odd = replace(READING, step=step, gr_t=gr_t, gr_s=0.9, gr_s_error=gr_s_error)
        assert not isinstance(usual.observe(odd, CONFIG, loss=3.0 - step / 500), Probe)


def test_after_a_higher_one_that_is_a_little_worse_the_next_probe_goes_down_after_a_while():
    policy = Policy()
    _, step = hidden(policy, 5, 105)
    assert isinstance(policy.judge(((1.0, 1.0), (1.1, 1.1))), Continue)
    assert hidden(policy, step + 5, 8 * step) is None
    probe, _ = hidden(policy, 8 * step, 10 * step)
    assert factor(probe) == pytest.approx(DOWN)


def test_after_a_higher_one_that_is_far_worse_a_lower_one_is_tried_at_once():
    policy = Policy()
    _, step = hidden(policy, 5, 105)
    assert isinstance(policy.judge(((1.0, 1.0), (1.3, 1.3))), Continue)
    probe, now = hidden(policy, step + 5, step + 30)
    assert factor(probe) == pytest.approx(DOWN)
    assert now == step + 5


def test_after_both_are_refused_the_next_probe_goes_up_again():
    policy = Policy()
    _, step = hidden(policy, 5, 105)
    policy.judge(((1.0, 1.0), (1.3, 1.3)))
    _, step = hidden(policy, step + 5, step + 30)
    assert isinstance(policy.judge(((1.0, 1.0), (1.0, 1.0))), Continue)
    assert hidden(policy, step + 5, 8 * step) is None
    probe, _ = hidden(policy, 8 * step, 10 * step)
    assert factor(probe) == pytest.approx(UP)


def test_a_lower_one_that_is_better_is_taken_and_what_was_left_is_not_probed_again():
    policy = Policy()
    _, step = hidden(policy, 5, 105)
    policy.judge(((1.0, 1.0), (1.3, 1.3)))
    _, step = hidden(policy, step + 5, step + 30)
    decision = policy.judge(((1.0, 1.0), (0.9, 0.9)))
    assert isinstance(decision, Retune)
    assert decision.reuse
    assert decision.config.lr == pytest.approx(CONFIG.lr * DOWN)
    for _ in range(3):
        probe, step = hidden(policy, step + 5, 10 * step, decision.config)
        assert probe.configs[1].lr < CONFIG.lr * 1.001
        policy.judge(((1.0, 1.0), (1.0, 1.0)))


def test_nothing_is_probed_below_the_lowest_learning_rate():
    policy = Policy(lr_bounds=(CONFIG.lr, 1.0))
    _, step = hidden(policy, 5, 105)
    policy.judge(((1.0, 1.0), (1.3, 1.3)))
    assert hidden(policy, step + 5, 3 * step) is None


def low(batch, losses, gr_t=2.0, error=0.1, **settings):
    """Readings of a GR_T below its zone: the step of the first decision to do something, and that; None if there is
    none."""
    policy = Policy(**settings)
    for i, loss in enumerate(losses):
        reading = replace(READING, step=5 * i + 5, gr_t=gr_t, gr_t_error=error)
        decision = policy.observe(reading, replace(CONFIG, batch_size=batch), loss=loss)
        if not isinstance(decision, Continue):
            return reading.step, decision
    return None


def far(config=CONFIG):
    """A policy for which `config` is ten times the usual learning rate."""
    return Policy(lr_bounds=(config.lr / 1e5, config.lr * 1e4))


def healthy(policy, first, last, config=CONFIG, gr_s=0.58):
    """Readings in their zones but for GR_S, from one step to another: the first decision to do something, or None."""
    for step in range(first, last, 5):
        reading = replace(READING, step=step, gr_s=gr_s)
        decision = policy.observe(reading, config, loss=3.0 * 0.99 ** (step / 5))
        if not isinstance(decision, Continue):
            return decision, step
    return None


def test_weights_that_began_far_above_the_usual_learning_rate_are_compared_with_untrained_ones_at_it():
    policy = far()
    probe, step = healthy(policy, 5, 105)
    assert step == 60
    assert probe.untrained
    assert probe.samples == step * CONFIG.batch_size
    assert probe.configs == (CONFIG, replace(CONFIG, lr=policy.usual_lr))
    assert "untrained" in str(probe)


@pytest.mark.parametrize("times", [0.1, 1.0, 2.9])
def test_those_that_began_near_it_or_below_are_not(times):
    policy = Policy()
    assert healthy(policy, 5, 205, Config(times * policy.usual_lr, 64)) is None


def test_untrained_weights_that_are_behind_are_compared_again_later_and_only_where_noise_hides_the_learning_rate():
    policy = far()
    _, step = healthy(policy, 5, 105)
    decision = policy.judge(((1.0, 1.0), (1.1, 1.1)))
    assert isinstance(decision, Continue)
    assert decision.notable
    assert healthy(policy, step + 5, 20 * step) is None
    again = far()
    healthy(again, 5, 105)
    again.judge(((1.0, 1.0), (1.1, 1.1)))
    steps = [at for at in range(step + 5, 12 * step, 5) if _asks_untrained(again, at)]
    assert steps == [9 * step]


def _asks_untrained(policy, step):
    """Whether a reading that GR_S hides asks for untrained weights; what is asked is refused."""
    found = healthy(policy, step, step + 5, gr_s=0.9)
    if found is None:
        return False
    policy.judge(((1.0, 1.0), (1.01, 1.01)))
    return found[0].untrained


def test_untrained_weights_that_have_overtaken_are_gone_on_with_and_their_past_is_not_the_others():
    policy = far()
    probe, step = healthy(policy, 5, 105)
    decision = policy.judge(((1.0, 1.0), (0.9, 0.9)))
    assert isinstance(decision, Retune)
    assert decision.reuse
    assert decision.config == probe.configs[1]
    assert "the probe's weights" in str(decision)
    assert healthy(policy, step + 5, 400, decision.config) is None  # no longer far above the usual
    state = policy.state_dict()
    assert state["saved"] is None
    assert [config["lr"] for config in state["begun"]] == [CONFIG.lr, decision.config.lr]


STANDING, FALLING = [2.0] * 20, [2.0 - 0.05 * i for i in range(20)]


def test_a_low_gr_t_raises_the_learning_rate_early_only_while_nothing_is_learned():
    """The first gradients of a good run agree as well: of its bias, of what all samples have in common."""
    assert low(32, STANDING, lr_bounds=(1e-4, 1e2))[0] <= 20
    assert low(32, FALLING)[0] >= 50
    assert low(128, FALLING)[0] <= 20  # where waiting is dear


def test_early_a_small_batch_is_raised_to_the_usual_learning_rate_and_not_beyond():
    bounds = (CONFIG.lr / 1e4, CONFIG.lr * 1e6)  # 4 decades and a half above the lower one: 2.8 times what it is
    _, move = low(32, STANDING, lr_bounds=bounds)
    assert move.config.lr == pytest.approx(CONFIG.lr * 10 ** (-4 + 10 * 4 / 9))
    step, move = low(32, STANDING, lr_bounds=(CONFIG.lr / 1e4, CONFIG.lr * 1e3))
    assert step >= 50
    assert move.config.lr > 2.0 * CONFIG.lr


def test_where_gr_t_is_not_clearly_low_a_probe_is_asked_first():
    step, probe = low(32, FALLING, gr_t=8.0, error=2.5)
    assert isinstance(probe, Probe)
    assert probe.evidence.quantity == "GR_T"
    assert step >= 60
    assert factor(probe) == pytest.approx(UP)
    assert isinstance(low(32, FALLING, gr_t=3.0)[1], Retune)


@pytest.mark.parametrize(
    ("batch", "steps", "batches"),
    [(128, 10, 4), (16, 10, 4), (3, 10, 22), (128, 100, 12), (3, 1000, 125)],
)
def test_a_probe_compares_on_few_batches_but_on_enough_of_them(batch, steps, batches):
    """Four, of 64 samples in all, or one for eight steps: whatever is most."""
    here, there = Config(1e-3, batch), Config(3e-3, batch)
    assert Probe((here, there), steps * batch, "noise hides it", Evidence("probe")).batches == batches
