"""Attacks on an erasure: which prompts are attacked, who judges, and what is written down.

    setup     the prompts of the erasure protocol that ask for the erased concepts, and the detector: the bundled model's judge, or CLIP
    aims      the erased concepts, each with its prompts and its detector
    measure   runs attacks on each, against the model with its edit in place
    report    JSON of what came out

A group ("a fruit") counts as seen where any of its members is. An attack that cannot be run, such as one that would meet the un-erased
model, or whose pictures the detector cannot judge, says so and leaves the others as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from efface.bench.draw import Judges
from efface.bench.options import DEFAULT, Options
from efface.bench.plan import Plan
from efface.bench.protocols import erasure
from efface.bench.questions import Asks
from efface.core.errors import EffaceError, InvalidTask, Unsupported
from efface.core.evidence import Detector, Evidence, Score, Sighting
from efface.core.model import Model
from efface.core.search import Search
from efface.core.task import Concept, Task

NAME = "attacks"
ASKS = Asks(())
"""Nothing of pictures that are drawn beforehand: an attack draws its own."""
PROMPTS = 16
"""Prompts of each concept that are attacked."""
FORWARDS_A_SECOND, BACKWARDS_A_SECOND = 300.0, 107.0
"""The bundled model on two cores, in large batches: samples of forward, and of forward with backward."""
MINUTES = 4.0
"""What an attack with its default settings may take there, its control included."""


@dataclass(frozen=True)
class Aim:
    """One erased concept."""

    concept: Concept
    """Its prompts are those that are attacked."""
    detector: Detector


@dataclass(frozen=True)
class Refused:
    """An attack of which nothing came out: it could not be run, or not be judged."""

    attack: str
    concept: str
    why: str


@dataclass(frozen=True)
class AnyOf(Detector):
    """A detector that sees a group wherever it sees one of its members."""

    inner: Detector
    group: str
    members: tuple[str, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def version(self) -> str:
        return self.inner.version

    def labels(self, kind: str = "object") -> tuple[str, ...]:
        return (*self.inner.labels(kind), self.group)

    def threshold(self, kind: str = "object") -> float:
        return self.inner.threshold(kind)

    def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
        """Members bear the group's name."""
        return [
            replace(sighting, labels=tuple(self.group if label in self.members else label for label in sighting.labels))
            for sighting in self.inner.look(images, kind)
        ]


def setup(model: str, task: Task, size: str = "full", options: Options = DEFAULT, *, seed: int = 0) -> tuple[Plan, Judges]:
    """What is attacked on the model of an id, the same in either size, and who judges: CLIP among all that the erasure protocol draws,
    where `options` ask for it.

    Raises Unsupported where no detector is known for the model, and as `erasure.setup`."""
    plan, judges = erasure.setup(model, task, size="full", seed=seed, options=options)
    if judges.detector is None:
        raise Unsupported(
            f"an attack needs a detector that says whether the concept came back, and none is known for {model!r}; add --detector clip, "
            "in a grid detector = 'clip'"
        )
    rows = [row for concept in task.targets for row in _rows(plan, concept)[: options.limit or PROMPTS]]
    return replace(plan.only(rows), name=f"{NAME}/{model}", steps=None, unmeasured=(), asks=ASKS), Judges(judges.detector)


def _rows(plan: Plan, concept: Concept) -> list[int]:
    """The shots that ask for an erased concept."""
    return [i for i, shot in enumerate(plan.shots) if shot.role == "target" and shot.concept.casefold() == concept.key]


def aims(plan: Plan, judges: Judges, task: Task) -> list[Aim]:
    """The erased concepts. Raises Unsupported without a detector, InvalidTask for a concept that the plan does not ask for."""
    if judges.detector is None:
        raise Unsupported("an attack needs a detector that says whether the concept came back, and none was given")
    found: dict[str, Aim] = {}
    for concept in task.targets:
        shots = [plan.shots[row] for row in _rows(plan, concept)]
        if not shots:
            raise InvalidTask(f"the erasure protocol has no prompt for {concept.name!r}; attack a concept of the bundled world")
        name, labels = shots[0].concept, shots[0].labels
        detector = judges.detector if labels == (name,) else AnyOf(judges.detector, name, labels)
        found[name] = Aim(Concept(name, concept.kind, tuple(shot.prompt for shot in shots)), detector)
    return list(found.values())


def measure(
    before: Model,
    after: Model,
    targets: Sequence[Aim],
    attacks: Sequence[Search],
    *,
    attacked: str,
    budget: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    done: Callable[[Evidence | Refused], None] = lambda outcome: None,
) -> list[Evidence | Refused]:
    """Runs every attack on every concept.

    Args:
        before, after: the un-erased model, and another object that holds the erased one, edit attached.
        attacked: what `after` is, in words.
        budget: samples through the denoisers for each search; by default what its own settings ask for at most, with the samplers of
            the two models.
        steps, guidance: of the sampler; by default the models' own.
        done: called with what came out of each attack, as soon as it has.

    What efface raises on purpose is the outcome of that one attack (`Refused`); what is a bug, or a lack of memory, is raised."""
    found: list[Evidence | Refused] = []
    with _sampling(before, steps, guidance), _sampling(after, steps, guidance):
        for aim in targets:
            for attack in attacks:
                found.append(_one(attack, aim, before, after, attacked, budget, seed))
                done(found[-1])
    return found


def _one(attack: Search, aim: Aim, before: Model, after: Model, attacked: str, budget: int | None, seed: int) -> Evidence | Refused:
    started = time.perf_counter()
    allowed = _budget(attack, before, after, aim) if budget is None else budget
    try:
        evidence = attack.search(before, after, aim.concept, aim.detector, budget=allowed, seed=seed)
    except EffaceError as error:
        return Refused(str(attack), aim.concept.name, str(error))
    taken = {"seconds": round(time.perf_counter() - started, 1)}
    return replace(evidence, attacked=attacked, cost={**evidence.cost, **taken})


@contextmanager
def _sampling(model: Model, steps: int | None, guidance: float | None) -> Iterator[None]:
    """While it lasts the model draws with other steps and guidance by default."""
    own = model.default_steps, model.default_guidance
    model.default_steps, model.default_guidance = own[0] if steps is None else steps, own[1] if guidance is None else guidance
    try:
        yield
    finally:
        model.default_steps, model.default_guidance = own


def _budget(attack: Search, before: Model, after: Model, aim: Aim) -> int:
    """The most that a search costs, by the dearer sampler of the two, with the forwards that sampling rules add."""
    most = max(attack.cost(model, len(aim.concept.texts))["forwards"] for model in (before, after))
    if not after.rules:
        return round(most)
    guided = 2 if after.default_guidance > 1 else 1
    return round(most * (2 + sum(rule.forwards for rule in after.rules)) / guided)


def seconds(cost: Mapping[str, float]) -> float:
    """What a cost takes with the bundled model on two quiet cores."""
    backwards = cost.get("backwards", 0.0)
    return (cost.get("forwards", 0.0) - backwards) / FORWARDS_A_SECOND + backwards / BACKWARDS_A_SECOND


def report(found: Sequence[Evidence | Refused]) -> list[dict[str, Any]]:
    """One JSON object for each attack and concept, without tensors."""
    return [_refused(item) if isinstance(item, Refused) else _row(item) for item in found]


def _refused(item: Refused) -> dict[str, Any]:
    return {"attack": item.attack, "concept": item.concept, "refused": item.why}


def _row(evidence: Evidence) -> dict[str, Any]:
    scores = {"un-erased": evidence.original, "pre_asr": evidence.before, "asr": evidence.success, "control": evidence.control}
    forwards, backwards = (evidence.cost[name] for name in ("forwards", "backwards"))
    quiet = seconds({"forwards": forwards + evidence.cost["control_forwards"], "backwards": backwards})
    return {
        "attack": evidence.attack,
        "concept": evidence.concept,
        "threat": evidence.threat,
        "access": evidence.access,
        "attacked": evidence.attacked,
        **{name: None if score is None else _ends(score) for name, score in scores.items()},
        "candidates": evidence.candidates,
        "found": list(evidence.found),
        "cost": dict(evidence.cost),
        "budget_rule": {"small_minutes_on_two_cores": MINUTES, "estimated_minutes": round(quiet / 60, 2)},
        "details": dict(evidence.details),
    }


def _ends(score: Score) -> dict[str, Any]:
    values = asdict(score)
    return {name: values[name] for name in ("value", "low", "high", "n", "undetermined", "items")}
