"""Plans: the same for every method, of the promised sizes, and never asking for what was erased where it must not be."""

from __future__ import annotations

from collections import Counter

import pytest

from efface.bench.plan import FIRST_SEED, SEED_STRIDE, Plan, numbered, shares
from efface.bench.protocols import erasure
from efface.concepts import resolve
from efface.concepts.vocabulary import read
from efface.core.errors import InvalidTask
from efface.core.evidence import Shot
from efface.core.task import Task

WORLD = read()
TASKS = ("cat", "cat; dog", "santa claus", "bomb", "fruit", "retro", "cat; retro", "cat; tiger; lion; leopard")


def plan(text: str, size: str = "quick", seed: int = 0) -> Plan:
    return erasure.plan(Task.of(text, resolve=resolve), size=size, world=WORLD, seed=seed)


@pytest.mark.parametrize("text", TASKS)
def test_a_demonstration_is_small_and_a_claim_is_large(text: str) -> None:
    quick, full = (Counter(shot.role for shot in plan(text, size).shots) for size in ("quick", "full"))
    assert 2 * quick.total() <= 450
    assert full["target"] >= 100
    assert full["neighbour"] + full["unrelated"] >= 240
    if "fruit" not in text and "leopard" not in text:  # whose whole group is erased, so that no neighbour is left
        assert full["neighbour"] + full["unrelated"] >= 300


@pytest.mark.parametrize("text", TASKS)
def test_what_is_erased_is_asked_for_in_target_and_pair_shots_alone(text: str) -> None:
    task = Task.of(text, resolve=resolve)
    erased = {concept.name for concept in task.targets}
    for shot in plan(text, "full").shots:
        assert (shot.role in ("target", "pair")) == (shot.concept in erased)
        assert set(shot.labels) <= {*WORLD.objects, *(s.name for s in WORLD.styles)}
        if shot.role not in ("target", "pair"):
            rest = shot.prompt.replace(shot.concept, "")  # a hot dog is no dog
            assert not any(f" {word} " in f" {rest} " for word in erased)


def test_neighbours_are_those_of_the_group_and_pairs_hold_both() -> None:
    shots = plan("cat").shots
    assert {s.concept for s in shots if s.role == "neighbour"} == {"tiger", "lion", "leopard"}
    for shot in (s for s in shots if s.role == "pair"):
        assert "cat" in shot.prompt.split()
        assert shot.partner in shot.prompt
        assert " beside " in shot.prompt


def test_what_is_kept_is_measured() -> None:
    task = Task.of("cat", "dog,church,tiger,a zebra crossing")
    found = erasure.plan(task, world=WORLD)
    assert {"dog", "church"} <= {s.concept for s in found.shots if s.role == "unrelated"}
    assert found.unmeasured == ("'a zebra crossing' in `keep`: the bundled model and its judge do not know the word.",)


def test_a_broad_target_is_seen_in_any_of_its_members() -> None:
    targets = [s for s in plan("fruit").shots if s.role == "target"]
    assert {s.labels for s in targets} == {("apple", "banana", "grapes", "strawberry", "pineapple")}
    assert {"a fruit", "an apple on a green background"} <= {s.prompt for s in targets}


def test_a_style_is_judged_as_a_style() -> None:
    shots = plan("retro").shots
    assert {(s.role, s.kind) for s in shots if s.role != "unrelated"} == {("target", "style"), ("neighbour", "style")}
    assert all("retro" in s.prompt for s in shots if s.role == "target")


def test_prompts_take_many_forms() -> None:
    targets = [s.prompt for s in plan("cat", "full").shots if s.role == "target"]
    assert len(set(targets)) > 60
    for style in WORLD.styles:
        assert any(f" {style.name} " in f" {prompt} " for prompt in targets)
    for background in WORLD.backgrounds:
        assert any(f"{background.name} background" in prompt for prompt in targets)


def test_seeds_are_unique_far_from_those_of_fits_and_a_function_of_the_seed() -> None:
    first, again, other = plan("cat"), plan("cat"), plan("cat", seed=1)
    seeds = [shot.seed for shot in first.shots]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= FIRST_SEED
    assert first == again
    assert first.digest == again.digest != other.digest
    assert not set(seeds) & {shot.seed for shot in other.shots}


def test_the_first_shots_of_a_role_show_different_concepts() -> None:
    found = plan("cat")
    shown = [found.shots[i] for i in found.shown(8)]
    assert Counter(s.role for s in shown) == {"target": 8, "neighbour": 8, "unrelated": 8, "pair": 8}
    assert len({s.concept for s in shown if s.role == "unrelated"}) == 8


@pytest.mark.parametrize(
    ("task", "message"), [(Task.of("kat"), "no object 'kat'; did you mean 'cat'"), (Task.of("style:cat"), "no style 'cat'")]
)
def test_a_target_that_the_world_does_not_know(task: Task, message: str) -> None:
    with pytest.raises(InvalidTask, match=message):
        erasure.plan(task, world=WORLD)


def test_a_size_or_seed_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="size was 'huge'; expected one of quick, full"):
        plan("cat", "huge")
    with pytest.raises(ValueError, match="seed was -1"):
        plan("cat", seed=-1)
    with pytest.raises(ValueError, match="100001 shots"):
        numbered([Shot("a cat", 0, "target", "cat")] * (SEED_STRIDE + 1), 0)


def test_any_other_model_gets_general_prompts() -> None:
    task = Task.of("cat; style:van gogh; identity:Santa Claus", "dog")
    found = erasure.plan(task)
    assert found.name == "erasure/general/quick"
    assert found.roles == ("target", "kept", "unrelated", "pair")
    assert "a photo of a cat" in {s.prompt for s in found.shots}
    assert not any(s.concept == "dog" for s in found.shots if s.role == "unrelated")
    assert all("Santa Claus" in s.prompt for s in found.shots if s.concept == "Santa Claus")


def test_shares_are_even() -> None:
    for total in (0, 1, 7, 60):
        for parts in (1, 3, 8):
            found = shares(total, parts)
            assert sum(found) == total
            assert max(found) - min(found) <= 1
