"""The learning rate by the step, and what of it may surprise."""

import math

from fpdm.training.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of the step after `step` are done: linear warm-up, then constant or half a cosine down to 0."""
    optimizer = config.optimizer
    if step < optimizer.warmup:
        return optimizer.lr * (step + 1) / optimizer.warmup
    if optimizer.lr_schedule == "constant":
        return optimizer.lr
    done = (step - optimizer.warmup) / max(1, optimizer.steps - optimizer.warmup)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * done))


def notes(config: Config, step: int, former: int | None) -> list[str]:
    """What may surprise in the learning rate of a run, a line each.

    step    how many are done
    former  how many there were to be when the last of them was made; None of a new run

    Raises ValueError for more steps of a run that has made all of its cosine.
    """
    steps, warmup = config.optimizer.steps, config.optimizer.warmup
    found = []
    if warmup >= steps:
        found.append(
            f"all {steps:,} steps are warm-up, of {warmup:,}: the learning rate does not come down, nor beyond "
            f"{learning_rate(config, steps - 1):.3g} (--lr is {config.optimizer.lr:g}); take a smaller --warmup"
        )
    if former is None or step > former or config.optimizer.lr_schedule == "constant":
        return found
    was, now = learning_rate(config.with_fields(steps=former), step), learning_rate(config, step)
    if step >= steps or was == now:
        return found
    # The weights have settled at a rate of 0. A longer cosine is often at half the peak there, which would undo that:
    # who asks for a little more would get a worse model, and one of neither schedule.
    if step == former:
        raise ValueError(
            f"all {former:,} steps are done, and the learning rate came down to 0 with them: --steps {steps} would "
            f"raise it to {now:.3g} at once. Train longer from the start under another --name, go on from the model "
            "with --init-from and another --name, or train with --lr-schedule constant, which can be prolonged"
        )
    return [
        *found,
        f"--steps was {former:,}, is {steps:,}, and the cosine of the learning rate is as long: at step {step:,} it "
        f"goes from {was:.3g} to {now:.3g}",
    ]
