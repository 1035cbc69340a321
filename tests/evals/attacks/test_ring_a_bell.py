"""Ring-A-Bell: its fitness, its direction, and what its generations keep."""

from __future__ import annotations

import pytest
import torch

from efface.core import tokens
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.evals.attacks.ring_a_bell import RingABell, default_pairs, direction, fitness, written
from efface.ops import evolve


def test_the_prompt_itself_is_a_perfect_individual(before: Model) -> None:
    (body,) = tokens.bodies(before, ["a cat on a red car"])
    goal = before.encode(["a cat on a red car"]).tokens.detach()
    others = evolve.population(5, len(body), tokens.alphabet(before, "words"), seeded(0))
    (scores,) = fitness(before, [torch.cat([torch.tensor([body]), others])], goal, tokens.frame(before))
    assert float(scores[0]) < 1e-6
    assert float(scores[1:].min()) > 1


def test_the_fitness_of_several_populations_is_that_of_each(before: Model) -> None:
    letters, goals = tokens.alphabet(before, "words"), before.encode(["a cat", "a dog"]).tokens.detach()
    crowds = [evolve.population(n, 3, letters, seeded(n)) for n in (2, 5)]
    together = fitness(before, crowds, goals, tokens.frame(before))
    for crowd, goal, scores in zip(crowds, goals, together, strict=True):
        (alone,) = fitness(before, [crowd], goal[None], tokens.frame(before))
        assert (alone - scores).abs().max() < 1e-3 * float(alone.max())


def test_the_direction_of_equal_pairs_is_nothing(before: Model) -> None:
    assert float(direction(before, (("a cat", "a cat"), ("a dog", "a dog"))).abs().max()) == 0
    pairs = default_pairs("cat")
    assert all(absent == present.replace("cat", "thing") for present, absent in pairs)
    assert float(direction(before, pairs).norm()) > 1


def best(members: int, elite: int) -> list[float]:
    """The best fitness of each generation of a search for the row of zeros."""
    generator, letters = seeded(0), torch.arange(50)
    crowd, curve = evolve.population(members, 6, letters, generator), []
    for _ in range(40):
        scores = crowd.float().square().sum(1)
        curve.append(float(scores.min()))
        top = evolve.parents(crowd, scores, members // 2)
        assert scores.sort().values[: members // 2].tolist() == top.float().square().sum(1).tolist()
        crowd = evolve.mutated(evolve.children(top, 0.5, generator), 0.25, letters, generator, elite=elite)
    return curve


def test_the_best_is_kept_with_an_elite_and_may_be_lost_without() -> None:
    kept, loose = best(10, 1), best(10, 0)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0] / 4
    assert loose != sorted(loose, reverse=True)


def test_children_are_made_of_their_parents_tokens() -> None:
    parents = torch.arange(12).reshape(3, 4)
    found = evolve.children(parents, 1.0, seeded(0))
    assert len(found) == 9
    assert torch.equal(found[::3], parents)
    assert all(int(token) % 4 == place for row in found for place, token in enumerate(row))
    assert torch.equal(evolve.children(parents, 0.0, seeded(0)), parents)


def test_no_special_token_is_ever_drawn(before: Model) -> None:
    letters, around = tokens.alphabet(before, "tokens"), tokens.frame(before)
    generator = seeded(0)
    crowd = evolve.population(200, 8, letters, generator)
    crowd = evolve.mutated(evolve.children(crowd, 0.5, generator), 1.0, letters, generator)
    ids = written(crowd, around)
    assert not {around.start, around.end, around.pad} & set(crowd.flatten().tolist())
    assert set(ids[:, 0].tolist()) == {around.start}
    assert set(ids[:, 9].tolist()) == {around.end}


@pytest.mark.parametrize(("candidates", "generations"), [(1, 7), (3, 10), (4, 60), (5, 5)])
def test_candidates_are_spread_evenly_and_the_last_is_the_end(candidates: int, generations: int) -> None:
    attack = RingABell(candidates=candidates, generations=generations)
    due = [g for g in range(1, generations + 1) if attack.due(g)]
    assert len(due) == candidates
    assert due[-1] == generations
