"""Trajectories: the authors' sampler with its quirks, the aligned one as the head of a full walk, and what replay keeps."""

import pytest
import torch

from efface.core.sampling import seeded
from efface.ops.latents import (
    KINDS,
    Latents,
    Pools,
    aligned_route,
    aligned_times,
    authors_route,
    authors_times,
    calls,
    replay_route,
    route,
    walk,
)

GRID = list(range(981, 0, -20))


def test_the_authors_sampler_leaves_out_the_noisiest_time_and_ends_two_grid_times_too_clean():
    for k in range(50):
        times = authors_times(GRID, k)
        assert times[0] == 961
        assert len(times) - 1 == (50 - k if k else 49)
        assert times[-1] == (20 * (k - 2) + 1 if k >= 2 else -1)
        assert aligned_times(GRID, k)[0] == 981
        assert aligned_times(GRID, k)[-1] == 20 * k + 1
    assert authors_times(GRID, 0) == authors_times(GRID, 1)


def test_the_authors_networks_are_told_a_noisier_time_than_they_get():
    g, seen = seeded(0), set()
    for _ in range(400):
        route = authors_route(GRID, 20, 3, g)
        told, level = int(route.told[0, 0]), int(route.level[0, 0])
        k = (level - 1) // 20
        assert level == 20 * k + 1
        assert 20 * k <= told < 20 * k + 20
        assert route.times[:, 0].tolist() == authors_times(GRID, k)
        assert route.times.shape[1] == route.told.shape[1] == 3
        if k >= 2:
            assert 39 <= told - int(route.times[-1, 0]) <= 58
        seen.add(k)
    assert len(seen) == 50


def test_the_aligned_route_is_told_where_it_is():
    g = seeded(0)
    for _ in range(50):
        route = aligned_route(GRID, 2, g)
        assert torch.equal(route.told[0], route.times[-1])
        assert torch.equal(route.level, route.told)


def test_a_jittered_route_is_told_a_time_of_its_interval():
    g, seen = seeded(0), set()
    for _ in range(300):
        jittered = aligned_route(GRID, 2, g, jitter=20)
        k, told = (int(jittered.level[0, 0]) - 1) // 20, int(jittered.told[0, 0])
        assert jittered.times[-1].tolist() == [20 * k + 1] * 2
        assert 20 * k <= told < 20 * k + 20
        seen.add(told - 20 * k)
    assert seen == set(range(20))


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_of_a_route_are_foretold(kind):
    g, mean_least_most = seeded(0), calls(kind, 50)
    walked = [len(route(kind, GRID, 1000, 1, g).times) - 1 for _ in range(500)]
    assert (min(walked), max(walked)) == mean_least_most[1:]
    assert sum(walked) / 500 == pytest.approx(mean_least_most[0], rel=0.05)


def test_an_unknown_kind_of_route_is_refused():
    with pytest.raises(ValueError, match="the kind of latents was 'fresh'; expected one of replay, authors, aligned, jittered"):
        route("fresh", GRID, 1000, 1, seeded(0))


def test_pools_come_back_from_their_state():
    x, t = torch.randn(3, 4, 8, 8, generator=seeded(0)), torch.tensor([1, 2, 3])
    pools, other = Pools([Latents(x, t, t, t, x[:, :0, 0, 0])]), Pools()
    other.load_state_dict(pools.state_dict())
    assert torch.equal(other[0].x, x)
    assert other[0].noise.shape == (3, 0)
    assert len(other) == 1


def test_replay_reaches_every_time_at_even_steps():
    route = replay_route(1000, 10, 400, seeded(0))
    assert torch.equal(route.times[:-1] - route.times[1:], torch.full((9, 400), 100))
    assert set(range(900, 1000)) >= set(route.times[0].tolist())
    assert len(set(route.times.flatten().tolist())) > 950
    assert int(route.times.min()) >= 0
    assert replay_route(1000, 7, 50, seeded(0)).times.min() >= 0


@pytest.mark.parametrize("k", [1, 3, 5])
def test_an_aligned_walk_is_the_head_of_a_full_ddim_run(tiny_model, k):
    grid = tiny_model.schedule.grid(6)
    x, cond, null = (
        torch.randn(2, *tiny_model.latent_shape, generator=seeded(1)),
        tiny_model.encode(["cat", "dog"]),
        tiny_model.encode([""]),
    )

    def walked(times):
        rows = torch.tensor(times)[:, None].expand(-1, 2)
        return walk(x, rows, lambda z, t: tiny_model.guided(z, t, cond, null, 3.0), tiny_model.schedule.ddim_step)

    tiny_model.meter.reset()
    head = walked(aligned_times(grid, k))
    assert tiny_model.meter.calls == len(head) - 1 == 5 - k
    full = walked(grid)
    assert torch.equal(head, full[: len(head)])
    assert not torch.equal(full[0], full[1])


def test_the_walk_agrees_with_diffusers_own_ddim(tiny_model):
    scheduler = tiny_model.pipeline.scheduler
    scheduler.set_timesteps(5)
    z, cond, null = torch.randn(1, *tiny_model.latent_shape, generator=seeded(1)), tiny_model.encode(["cat"]), tiny_model.encode([""])
    times = torch.tensor([*scheduler.timesteps.tolist(), -1])[:, None]
    found = walk(z, times, lambda x, t: tiny_model.guided(x, t, cond, null, 3.0), tiny_model.schedule.ddim_step)[-1]
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(tiny_model.guided(z, t, cond, null, 3.0), t, z, return_dict=False)[0]
    assert torch.allclose(found, z, atol=1e-4)


def test_rows_keep_what_belongs_together():
    route = replay_route(1000, 4, 3, seeded(0))
    visited = route.times[:, :, None, None, None].float()  # each latent holds its own time
    target, noise = torch.tensor([0, 1, 2]), torch.arange(3.0)[:, None]
    rows = route.latents(visited, target, noise)
    picked = rows.pick(7, seeded(1))
    assert len(rows) == 12
    assert len(set(picked.x.flatten().tolist())) == 7
    assert torch.equal(picked.x.flatten(), picked.told.float())
    assert torch.equal(picked.noise.flatten(), picked.target.float())
    assert (route.times[:, picked.target] == picked.told).any(0).all()
    assert not (route.times[:, picked.target.roll(1)] == picked.told).any(0).all()
