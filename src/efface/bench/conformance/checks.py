"""The fast checks: what every method promises, each asked of a tiny model. A check returns nothing, raises `Failed` with what is
wrong, or `Skipped` with why the question does not arise."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, get_type_hints

import torch
from torch import Tensor

from efface.bench.conformance.case import Case, contents, same, saved, unlike
from efface.bench.conformance.state import State, told
from efface.core import catalog
from efface.core.card import Card
from efface.core.edit import Edit, WeightEdit
from efface.core.errors import InvalidTask, NoEffect, Overlap, Unsupported
from efface.core.method import Expectation, Method, Paper
from efface.core.model import Model
from efface.core.task import Concept, Swap, Task
from efface.models import tiny

DRAWS = 6
"""Further fits, each with another seed, where a cost is an expectation."""
TOLERANCE = 4.0
"""How many standard errors the mean of these may be off."""
ALIKE = 0.5
"""The least cosine between what a kept concept's prompt adds to a prediction before and after."""


class Failed(Exception):
    """A promise that is not kept."""


class Skipped(Exception):
    """A question that does not arise."""


# -- of the class alone --------------------------------------------------------------------------------------------------


def defaults(cls: type[Method]) -> None:
    """The class makes a frozen dataclass without arguments."""
    if "__dataclass_fields__" not in vars(cls):
        raise Failed("it is no dataclass of its own; write @dataclass(frozen=True)")
    if not vars(cls)["__dataclass_params__"].frozen:
        raise Failed("it is not frozen; write @dataclass(frozen=True)")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    if missing:
        raise Failed(f"the field {missing[0]!r} has no default")
    cls()


def documented(cls: type[Method]) -> None:
    """The module has a card, the paper a title, and every field a string under it."""
    bare = [f.name for f in dataclasses.fields(cls) if not cls.field_docs().get(f.name)]  # type: ignore[arg-type]
    if bare:
        raise Failed(f"no string under the field{'s' * (len(bare) > 1)} {', '.join(bare)}")
    if not inspect.cleandoc(inspect.getmodule(cls).__doc__ or ""):
        raise Failed("its module has no docstring, which is the method's card")
    if not isinstance(cls.paper, Paper) or not cls.paper.title:
        raise Failed("its `paper` has no title")


def presets(cls: type[Method]) -> None:
    """Every preset builds."""
    for name in cls.presets:
        try:
            cls.build(preset=name)
        except (ValueError, TypeError) as error:
            raise Failed(f"the preset {name!r} cannot be built: {error}") from error


def text(cls: type[Method]) -> None:
    """The text form reads back as the same method, for the defaults, every preset, and every field off its default."""
    for method in _variants(cls):
        again = catalog.method(str(method))
        if again != method:
            raise Failed(f"{str(method)!r} reads back as {again!r}")


def _variants(cls: type[Method]) -> Iterator[Method]:
    """The defaults, the presets that build, and each number or switch moved a little where the method takes that."""
    yield cls()
    for name in cls.presets:
        try:
            yield cls.build(preset=name)
        except (ValueError, TypeError):
            continue
    moves: dict[type, Callable[[Any], Any]] = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.7 + 1e-7}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if type(f.default) in moves:
            try:
                yield cls.build(**{f.name: moves[type(f.default)](f.default)})
            except (ValueError, TypeError):
                continue


# -- of a fit ------------------------------------------------------------------------------------------------------------


def fits(case: Case) -> None:
    """A fit ends with an edit of the kind that `fit` declares."""
    declared = get_type_hints(type(case.method).fit).get("return", Edit)
    kinds = tuple(kind for kind in (declared, *getattr(declared, "__args__", ())) if inspect.isclass(kind))
    if not isinstance(case.edit, kinds):
        raise Failed(f"it declares {declared} and returned a {type(case.edit).__name__}")


def unchanged(case: Case) -> None:
    """The model and the process are as they were: names, tensors, flags, modes, hooks, random state."""
    changes = case.fitted.before.changes(case.fitted.after)
    if changes:
        raise Failed(told(changes))


def repeatable(case: Case) -> None:
    """The same seed gives the same edit, whatever the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260)
        again = case.fit(case.fitted.task).edit
    different = unlike(contents(case.edit), contents(again))
    if different:
        raise Failed(f"a second fit with the same seed differs in {told(different)}")


def restores(case: Case) -> None:
    """Detaching gives back every bit: alone, after an error, under another edit and over it; twice at once is refused."""
    before, other = State.of(case.model), _beside(case)
    for stack in ([case.edit], [case.edit, other], [other, case.edit]):
        _attached_once(case.model, stack)
        changes = before.changes(State.of(case.model))
        if changes:
            raise Failed(f"after {' and '.join(e.kind for e in stack)}: {told(changes)}")
    with case.edit.attach(case.model, check=False):
        try:
            with case.edit.attach(case.model, check=False):
                raise Failed("the same edit could be attached twice at once")
        except Overlap:
            pass
    changes = before.changes(State.of(case.model))
    if changes:
        raise Failed(f"after a refused second attachment: {told(changes)}")


def _attached_once(model: Model, stack: list[Edit]) -> None:
    """Attaches a stack and leaves it by an error."""
    try:
        with ExitStack() as attached:
            for edit in stack:
                attached.enter_context(edit.attach(model, check=False))
            model.sample(["cat"], steps=1)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def _beside(case: Case) -> Edit:
    """A change of one parameter that the edit leaves alone."""
    tensors = {f"{c}.{n}": p for c, network in case.model.components.items() for n, p in network.named_parameters()}
    name = next(n for n in tensors if n not in case.edit.names)
    task = Task.parse("dog")
    card = Card.of(case.model, method="beside", task=task, seed=0)
    return WeightEdit({name: torch.full(tensors[name].shape, 0.01)}, card)


def survives(case: Case) -> None:
    """Saved and loaded, the edit gives the same predictions and pictures, and has the same card and parts."""
    with saved(case.edit) as path:
        loaded = Edit.load(path)
    if (loaded.card, set(loaded.extras)) != (case.edit.card, set(case.edit.extras)):
        raise Failed("the loaded edit has another card or other extras")
    mine = _outputs(case, case.edit)
    case.renew()
    for what, a, b in zip(("predictions", "pictures"), mine, _outputs(case, loaded), strict=True):
        if not same(a, b):
            raise Failed(f"the loaded edit gives other {what} (off by up to {float((a - b).abs().max()):.2g})")


def _outputs(case: Case, edit: Edit) -> tuple[Tensor, Tensor]:
    words = [c.texts[0] for c in (*case.fitted.task.targets, *case.fitted.task.keep)]
    with edit.attach(case.model, check=False):
        return case.predictions([*words, ""]), case.model.sample(words)


def declared(case: Case) -> None:
    """Attached, no parameter outside the declared groups has changed (`Method.trained`)."""
    groups = case.method.trained(case.model)
    allowed = {name for group in groups for name in case.model.select(group)}
    before = _parameters(case.model)
    with case.edit.attach(case.model, check=False):
        outside = [n for n, p in _parameters(case.model).items() if n not in allowed and not same(p, before[n])]
    if outside:
        raise Failed(f"{told(outside)} changed, outside {' and '.join(groups) or 'what it declares, which is nothing'}")


def _parameters(model: Model) -> dict[str, Tensor]:
    return {f"{c}.{n}": p for c, network in model.components.items() for n, p in network.named_parameters()}


def effective(case: Case) -> None:
    """Attached, what the model makes of the target's prompt is different."""
    target = case.fitted.task.targets[0].texts[0]
    try:
        with case.edit.attach(case.model):
            after = case.model.sample([target])
    except NoEffect as error:
        raise Failed(str(error)) from error
    if same(after, case.model.sample([target])):
        raise Failed(f"the picture of {target!r} is the same to the bit")


def keeps(case: Case) -> None:
    """Kept concepts are still told: what their prompts add to a prediction keeps its direction (mean cosine of at least 0.5).

    Random weights give 0. No method promises more for a kept concept on a network that draws noise, and some, such as a
    negative prompt, move every prediction alike; but none may put noise in the place of what a prompt says."""
    words = [c.texts[0] for c in case.fitted.task.keep]
    before = case.predictions([*words, ""])
    with case.edit.attach(case.model, check=False):
        after = case.predictions([*words, ""])
    cosine = float(torch.cosine_similarity(_told(before), _told(after), dim=-1).mean())
    if not cosine >= ALIKE:
        raise Failed(
            f"what {' and '.join(words)} add to a prediction has a cosine of {cosine:.2f} to what it was; expected {ALIKE} or more"
        )


def _told(predictions: Tensor) -> Tensor:
    """(k · n, c h w): predictions less those of the empty prompt, which come last."""
    return (predictions[:-1] - predictions[-1:]).flatten(0, 1).flatten(1).double()


# -- of what it refuses and spends ---------------------------------------------------------------------------------------


def refuses_needs(case: Case) -> None:
    """Where a need is not met, `fit` raises Unsupported and names the need."""
    needs, task = case.method.needs, case.fitted.task
    trials: list[tuple[str, Callable[[], Edit]]] = []
    lacking = [group for group in needs.groups if group not in case.bare.groups]
    if lacking:
        trials.append((lacking[0], lambda: case.method.fit(case.bare, task, resources=case.resources(task))))
    full = case.resources(task)
    if needs.images:
        without = dataclasses.replace(full, images={})
        trials.append(("image", lambda: case.method.fit(case.model, task, resources=without)))
    for asset in needs.assets:
        fewer = dataclasses.replace(full, assets={k: v for k, v in full.assets.items() if k != asset})
        trials.append((asset, lambda fewer=fewer: case.method.fit(case.model, task, resources=fewer)))  # type: ignore[misc]
    if not needs.many:
        two = Task((*task.erase, Swap(Concept("car"), task.erase[0].anchor)), task.keep)
        trials.append(("one concept", lambda: case.method.fit(case.model, two, resources=case.resources(two))))
    if not trials:
        raise Skipped("it needs nothing that a model could lack")
    for need, trial in trials:
        _refused(trial, Unsupported, need, f"a fit without {need!r}" if need != "one concept" else "a fit for two concepts")


def refuses_tasks(case: Case) -> None:
    """An empty, a doubled and a contradictory task raise InvalidTask, even where the task was not made by its constructor."""
    cat, dog, resources = Swap(Concept("cat")), Concept("dog"), case.resources(case.fitted.task)
    bad = {
        "a task without a target": unchecked((), (dog,)),
        "a target given twice": unchecked((cat, Swap(Concept("Cat"))), ()),
        "a target that is also kept": unchecked((cat,), (Concept("CAT"),)),
    }
    for what, task in bad.items():
        _refused(lambda task=task: case.method.fit(case.model, task, resources=resources), InvalidTask, "", what)  # type: ignore[misc]


def unchecked(erase: tuple[Swap, ...], keep: tuple[Concept, ...]) -> Task:
    """A task as unpickling makes it: without its checks."""
    task = object.__new__(Task)
    object.__setattr__(task, "erase", erase)
    object.__setattr__(task, "keep", keep)
    return task


def _refused(trial: Callable[[], Edit], expected: type[Exception], word: str, what: str) -> None:
    try:
        trial()
    except expected as error:
        if word not in str(error):
            raise Failed(f"{what} raised {expected.__name__} without naming {word!r}: {error}") from error
    except Exception as error:
        raise Failed(f"{what} raised {type(error).__name__} ({error}); expected {expected.__name__}") from error
    else:
        raise Failed(f"{what} was accepted; expected {expected.__name__}")


def costs(case: Case) -> None:
    """What the fit spent is what `cost` says, and what the network itself saw.

    An `Expectation` holds when each fit lies between its ends, and the mean of several fits near its mean."""
    formula, fit = case.method.cost(case.model, case.fitted.task), case.fitted
    claimed = fit.edit.card.cost
    if claimed.get("forwards", 0) != fit.forwards:
        raise Failed(f"{fit.forwards} samples went through the denoiser, and the card says {claimed.get('forwards', 0):g}")
    draws = [_spent(fit.edit.card.cost, fit.steps)]
    if any(isinstance(value, Expectation) and value.low < value.high for value in formula.values()):
        more = [case.fit(fit.task, seed=seed) for seed in range(1, 1 + DRAWS)]
        draws += [_spent(each.edit.card.cost, each.steps) for each in more]
    for name in ("steps", "forwards", "backwards"):
        if name != "steps" or name in formula:
            _agrees(name, formula.get(name, 0.0), [draw[name] for draw in draws])


def _spent(cost: Mapping[str, float], steps: int) -> dict[str, float]:
    return {"steps": steps, "forwards": cost.get("forwards", 0), "backwards": cost.get("backwards", 0)}


def _agrees(name: str, formula: float, spent: list[float]) -> None:
    if not isinstance(formula, Expectation):
        if any(value != formula for value in spent):
            hint = "; where that hangs on what is drawn, return an Expectation" if formula else ""
            raise Failed(f"{name}: the formula gives {formula:g}, and {spent[0]:g} were metered{hint}")
        return
    if not all(formula.low <= value <= formula.high for value in spent):
        raise Failed(f"{name}: the formula gives {formula.low:g} to {formula.high:g}, and {min(spent):g} to {max(spent):g} were metered")
    if formula.low == formula.high:
        return
    values = torch.tensor(spent, dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5)
    if abs(float(values.mean()) - formula) > TOLERANCE * error + 1e-9 * abs(formula):
        raise Failed(f"{name}: the formula expects {formula:g}, and the mean of {len(spent)} fits is {values.mean():g} ± {error:g}")


def families() -> tuple[str, ...]:
    """The tiny families that methods are checked on."""
    return tuple(tiny.FAMILIES)
