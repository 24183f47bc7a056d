"""Every number that steers the measured rules, and why it is what it is.

Those without another reason were chosen, with the rules, on the trainings that `Policy` names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    # GR_T
    readings: int = 3  # averaged, as single ones jump; few, as the oldest of them were read at younger weights
    least_readings: int = 2  # before a low GR_T is believed
    least_error: float = 0.1  # relative, of one reading: the error of three readings may come out at nothing by chance
    most_error: float = 10.0  # relative: beyond, the interval has no lower end to speak of, and exp() would overflow
    jumps: float = 0.7  # an error that is such a share of GR_T itself: GR_T says nothing about the learning rate
    largest: float = 1e30  # a loss or GR_T beyond counts as not finite: its square would overflow

    # GR_T below its zone: approaching from below is cheap and safe, but an early reading belongs to no target yet
    target_step: int = 50  # the iteration that the published target belongs to
    patience: float = 8.0  # steps before a raise where GR_T is nearly 0, ...
    patience_per_gr_t: float = 2.0  # ... and with GR_T: the nearer to its zone, the more is still to come with time
    trend: float = 1.5  # an interval that wide, as a factor, may be a trend and not noise, ...
    trend_steps: int = 30  # ... up to that age
    clearly_low: float = 0.5  # share of that end: above it a probe is asked first, as one raise too many costs most
    far_below: float = 0.4  # share of the zone's lower end: only below it a learning rate found good is raised again
    decayed: float = 0.9  # a schedule below that share of its peak makes GR_T low by itself
    least_raise: float = 1.15  # a smaller one is not worth a cold start of the gauges

    # GR_T above its zone: from above it destroys weights
    overshot: float = 1.5  # times the zone's upper end: too high whatever the loss says
    settled_steps: int = 20  # before a GR_T that high, or a loss that stands still, is believed
    start_steps: int = 15  # before weights are said to have started badly: three checks
    lower_power: float = 0.5  # lr goes down by (GR_T*/GR_T)^power, ...
    least_lowered: float = 0.7  # ... but at least to that share: less would be lost in the noise of GR_T

    # losses
    kept_blocks: int = 256  # points of a curve; beyond, every second of its older half goes
    noise_differences: float = 8.0  # of successive losses, before jumps are told from noise ...
    jump: float = 9.0  # ... half of whose square is beyond so many variances: three standard deviations
    fading: float = 0.97  # weight of the noise's history at each loss: about the 30 newest count
    recent_blocks: int = 2  # blocks of losses for the level before and after a raise: a change shows at once
    level_blocks: int = 4  # blocks for a level that nothing depends on at once
    learned_blocks: int = 5  # blocks for what is learned
    learned: float = 0.02  # share of the untrained loss, by which it must have fallen, ...
    learned_errors: float = 2.0  # ... and standard errors
    judged_errors: float = 3.0  # standard errors of a loss that is called worse: one check in a thousand by chance
    exploded: float = 1.5  # times the first loss above what was known: beyond what noise and a cold Adam do
    lost_blocks: int = 20  # that stay exploded before it is given up where no lower learning rate is allowed
    hurt: float = 0.2  # times the first loss above it: more than the losses of healthy starts differ by
    worse: float = 0.03  # share of the loss before a raise, beside its errors
    worse_steps: int = 100  # after a raise: of hundreds of checks one is beyond three standard errors
    rising_blocks: int = 20  # whose level is compared with the lowest of as many in a row before, ...
    rising: float = 0.05  # ... share of the untrained loss by which it must be above: spikes of a solved task heal, ...
    rising_errors: float = 6.0  # ... beside standard errors: the lowest of many is two or three below by chance
    dead_steps: int = 40  # that hurt weights get to learn something
    max_broken: int = 2  # losses in a row that are not finite; one may be an overflow that a gradient scaler skips

    # what has failed, and where to begin again
    same_lr: float = 0.02  # relative difference up to which two runs are equivalent: seeds alone do more
    failed: float = 0.5  # share of a learning rate that failed, which is not reached again
    far_raised: float = 4.0  # a raise by more is halved in the logarithm and not taken back whole
    max_rollbacks: int = 2  # to the same saved weights; then they are in doubt themselves
    restart: float = 30.0  # what lr is divided by where weights were destroyed: a decade and a half, for below is cheap
    restart_high: float = 6.0  # ... where they were not, but GR_T says too high
    cheap_share: int = 4  # what a batch is divided by on a plateau or where weights were destroyed: its gauges are void
    small_batch: int = 16  # ... but not below that: small batches are cheap, and smaller ones no cheaper in steps
    rival: float = 0.05  # share of the loss by which abandoned weights must have been further at equal samples
    rival_raise: float = 2.0  # towards their learning rate, in one move

    # GR_S
    far_above: float = 0.5  # share of the zone's lower end: so far too large a batch is left at the first reading
    noise_scale_error: float = 0.5  # relative, up to which a noise scale is solved for a batch
    near_one: float = 0.999  # GR_S at 1 has no noise scale
    unsure_steps: int = 40  # until a GR_S whose interval reaches beyond 1 is acted on by its value
    batch_change: float = 1.5  # a smaller factor is not worth a cold start of the gauges
    found_batch_change: float = 1.8  # ... where lr is found good
    found_checks: int = 4  # in a row that must ask for another batch then
    # Only before lr is found good is a batch raised, and up to `small_batch`: noise in a larger one costs less than the
    # samples that would average it out. Before `target_step` none is lowered below it.
    young_steps: int = 150  # until then a learning rate far too low is left ...
    cheap_batch: int = 32  # ... at no larger batch than that, as is a plateau: steps count, and are cheaper so

    # a probe: of two learning rates on the same batches, where GR_S is so high that GR_T says little of either
    probe_gr_s: float = 0.8
    probe_steps: int = 60  # before one, and of each side: with half as many two tasks of three were lost, ...
    probe_usual: float = 10.0  # times as many first at a usual learning rate: most are good, so it may cost a tenth;
    # and where one was raised beyond: an early comparison asks for one raise too many, a later one does not
    probe_signal: float = 8.0  # ... but not where GR_T without noise, `signal_of`, is below that by its interval, in
    # `readings` in a row: of the public table's early ones at LR 1.7e-3 one in two hundred is, at a tenth six in ten
    probe_share: float = 0.15  # ... but at least that share of all steps so far
    probe_factor: float = 3.0  # between the two
    untrained_again: float = 10.0  # times the usual learning rate: from there on untrained weights get a second chance
    probe_better: float = 0.02  # share of the loss, beside its error, by which the higher must be better
    probe_edge: float = 0.2  # share of the loss by which the higher is worse: a lower one is tried at once
    probe_again: float = 9.0  # times the samples so far, until the next one, where one has found nothing better
    compared_least: int = 4  # batches that both sides are compared on: the error of fewer differences says too little
    compared_samples: int = 64  # in them, at least: losses of a few samples differ by chance
    compared_part: int = 8  # and one for so many steps of a side: without a backward pass, 4 % of their cost

    # a plateau: nothing learned, where noise alone reads GR_T 19 at any learning rate
    plateau_error: float = 0.01  # relative error of the loss, ...
    plateau_fall: float = 0.02  # ... before a fall of that share would have been seen
    plateau_errors: float = 4.0  # standard errors of all of it, two of the fall between its halves, ...
    plateau_slope: float = 0.005  # ... beside that share of the untrained loss: beyond, the loss falls
    plateau_raise: float = 3.0  # by which lr goes up, and one move back when it was enough
    plateau_steps: int = 200  # to wait at the usual learning rate and above: some tasks begin with a plateau
    plateau_most: float = 30.0  # times the usual learning rate: weights are lost there, if anywhere
    plateau_below: float = 0.1  # share of a learning rate that failed: the weights there may have been just as lost


RULES = Rules()
