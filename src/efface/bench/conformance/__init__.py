"""What every method promises, as one table of checks: `efface check METHOD`.

A new method, of this project or of yours, is done when it passes. Each check is asked of a tiny model of every family, with one fit
for all of them, so that the whole table takes seconds; the two slow checks erase a concept of the bundled model and ask its judge.

How a method is made small: with its preset "check", where it has one; otherwise with its defaults, but for the integer fields whose last
word counts something (`steps`, `latent_steps`, `iterations`, `epochs`, `rounds`, `trajectories`, `batch`, `samples`, `images`), which
are lowered to 2. Offer a preset "check" where that gives settings that the method refuses, or that say nothing about it.

What it is given: `cat | keep dog, tiger`, or `cat -> animal | …` where it refuses a task without an anchor; with `needs.images`
pictures of all these that the model itself drew; with `needs.assets` what the class method `make_assets` returns.

What it says it costs: `cost` is compared with what was metered, exactly. Where the figure hangs on what is drawn (random times),
return an `Expectation` with its mean, least and most.

What it says it changes is `Method.trained`: the field `group`, where it names a group of the model; otherwise all of `needs.groups`.
"""

from efface.bench.conformance.table import CHECKS, Check, Outcome, failed, run

__all__ = ["CHECKS", "Check", "Outcome", "failed", "run"]
