"""The conformance suite itself: sound methods pass, and for each check there is a method that fails exactly that one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from contract import controls

from efface.bench import conformance
from efface.bench.conformance import checks
from efface.bench.conformance.case import Case, small
from efface.bench.conformance.judged import Trial
from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.method import Expectation, Method
from efface.methods.ap import AP

FAST = {check.name for check in conformance.CHECKS if check.scope != "slow"}


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Controls may leave these off."""
    with torch.enable_grad():
        yield


def failures(cls: type[Method], only: tuple[str, ...] = ()) -> dict[str, str]:
    return {o.check: o.detail for o in conformance.failed(conformance.run(cls, families=["sd1"], only=only))}


@pytest.mark.parametrize(("name", "families"), [("Sound", None), ("Drawn", ["sd1"]), ("Hungry", ["sd1"]), ("Preset", ["sd2"])])
def test_a_third_party_s_sound_method_passes_by_its_dotted_path(name: str, families: list[str] | None) -> None:
    cls = catalog.find(f"contract.controls:{name}")
    outcomes = list(conformance.run(cls, families=families))
    assert not conformance.failed(outcomes)
    assert {o.check for o in outcomes} == FAST
    assert not [o for o in outcomes if o.status == "skipped"]


@pytest.mark.parametrize(
    ("check", "cls"), [(c, cls) for c, faulty in controls.FAULTS.items() for cls in faulty], ids=lambda v: getattr(v, "__name__", v)
)
def test_control_each_check_has_a_method_that_fails_it_alone(check: str, cls: type[Method]) -> None:
    assert set(failures(cls)) == {check}


@pytest.mark.parametrize("trace", controls.TRACES)
def test_control_whatever_a_fit_leaves_behind_is_seen(trace: str) -> None:
    assert set(failures(controls.tracing(trace), only=("fits", "unchanged"))) == {"unchanged"}


def test_every_check_has_its_control() -> None:
    assert set(controls.FAULTS) | {"unchanged"} == FAST


def test_a_fit_that_raises_fails_one_check_and_skips_the_others() -> None:
    class Broken(controls.Sound):
        def deltas(self, model, seed):
            raise RuntimeError("no luck")

    outcomes = [o for o in conformance.run(Broken, families=["sd1"]) if o.family]
    assert [(o.check, o.detail) for o in conformance.failed(outcomes)] == [("fits", "RuntimeError: no luck")]
    assert {o.status for o in outcomes} == {"failed", "skipped"}


def test_the_rule_that_makes_methods_small() -> None:
    lowered = small(AP)
    assert (lowered.steps, lowered.batch, lowered.latent_steps, lowered.trajectories) == (2, 2, 2, 2)
    assert dataclasses.replace(AP(), steps=2, batch=2, latent_steps=2, trajectories=2) == lowered
    assert small(AP, {"steps": 3}).steps == 3
    assert small(controls.Preset).steps == 4
    with pytest.raises(InvalidMethod, match="no field 'stepps'"):
        small(AP, {"stepps": 3})


def test_a_refused_task_is_named_and_the_one_with_an_anchor_fitted() -> None:
    case = Case(controls.Hungry, "sd1")
    assert str(case.fitted.task) == "cat -> animal | keep dog, tiger"
    assert "give an anchor" in case.fitted.note
    assert Case(controls.Sound, "sd1").fitted.note == ""


def test_random_weights_are_told_from_edits_by_a_wide_margin() -> None:
    """The cosine that decides is near 0 for the vandal and near 1 for small and for closed-form edits, on every family."""
    for family in checks.families():
        for cls, low, high in ((controls.Vandal, -0.35, 0.35), (controls.Sound, 0.9, 1.0), (catalog.find("uce"), 0.9, 1.0)):
            case = Case(cls, family)
            before = case.predictions(["dog", "tiger", ""])
            with case.edit.attach(case.model):
                after = case.predictions(["dog", "tiger", ""])
            cosine = torch.cosine_similarity(checks._told(before), checks._told(after), dim=-1).mean()
            assert low <= cosine <= high


def test_an_expectation_is_a_number_between_its_ends() -> None:
    value = Expectation(2.5, 1, 4)
    assert (value, value.low, value.high, value + 1) == (2.5, 1, 4, 3.5)
    with pytest.raises(ValueError, match="expected low ≤ mean ≤ high"):
        Expectation(5, 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "check"), [(controls.Noop, "erases"), (controls.Vandal, "preserves")])
def test_control_on_the_bundled_model_doing_nothing_and_destroying_all_fail(cls: type[Method], check: str) -> None:
    outcomes = [o for o in conformance.run(cls, families=[], slow=True) if o.family]
    assert {o.check: o.status for o in outcomes} == {c: "failed" if c == check else "passed" for c in ("erases", "preserves")}


@pytest.mark.slow
def test_what_the_slow_checks_ask_for_is_drawn_by_the_untouched_model() -> None:
    trial = Trial(controls.Noop)
    before, after = trial.seen
    assert before == after
    assert min(before.values()) >= 0.5
