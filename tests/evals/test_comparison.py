"""Non-inferiority errs no more often than it says, and quality metrics are the formulas that they name."""

from __future__ import annotations

import pytest
import torch

from efface.core.evidence import Comparison, Contrast, Samples, Score, Shot
from efface.core.sampling import seeded
from efface.evals.metrics.clip_score import ClipScore
from efface.evals.metrics.frechet import Frechet
from efface.ops.frechet import frechet
from efface.ops.intervals import jackknife, number

MARGIN = 0.03


def draw(first: float, second: float, n: int, seed: int) -> tuple[list[bool], list[bool], list[str]]:
    """n paired answers with these shares of yes, half of the time the same coin for both."""
    generator = seeded(seed)
    coins = torch.rand(2, n, generator=generator)
    shared = torch.rand(n, generator=generator) < 0.5
    coins[1] = torch.where(shared, coins[0], coins[1])
    return (coins[0] < first).tolist(), (coins[1] < second).tolist(), [str(i) for i in range(n)]


def verdicts(first: float, second: float, n: int, runs: int = 120) -> list[str]:
    found = []
    for seed in range(runs):
        a, b, clusters = draw(first, second, n, seed)
        found.append(Comparison.shares("x", a, b, [clusters], "higher", MARGIN).verdict)
    return found


def test_at_the_margin_it_is_rarely_called_not_inferior() -> None:
    """The first is worse by exactly the margin: in 2.5 % of the cases at most it may pass (with 120 runs: fewer than 9)."""
    assert verdicts(0.87, 0.90, 400).count("not inferior") < 9


def test_with_enough_pictures_an_equal_one_passes_and_a_worse_one_fails() -> None:
    assert verdicts(0.95, 0.95, 1500, runs=12).count("not inferior") >= 9
    assert verdicts(0.80, 0.95, 1500, runs=6).count("inferior") == 6


def test_with_too_few_pictures_it_is_undecided() -> None:
    a, b, clusters = draw(0.95, 0.95, 40, 0)
    assert Comparison.shares("x", a, b, [clusters], "higher", MARGIN).verdict == "undecided"


def test_control_a_difference_that_is_no_evidence_of_harm_is_no_evidence_of_safety() -> None:
    """The usual mistake: a difference that is not significant, taken for equality. Here 0 lies inside, and the verdict is undecided."""
    a, b, clusters = draw(0.85, 0.92, 60, 1)
    found = Comparison.shares("x", a, b, [clusters], "higher", MARGIN)
    assert found.difference.low < 0 < found.difference.high
    assert found.verdict == "undecided"


def test_pictures_of_one_fit_are_no_independent_evidence() -> None:
    """Ten fits of 40 pictures, of which one fails altogether: clustered by picture it looks surer than clustered by fit."""
    first = [fit != 0 for fit in range(10) for _ in range(40)]
    second = [True] * 400
    pictures, fits = [str(i) for i in range(400)], [str(i // 40) for i in range(400)]
    alone = Comparison.shares("x", first, second, [pictures], "higher", MARGIN).difference
    both = Comparison.shares("x", first, second, [pictures, fits], "higher", MARGIN).difference
    assert both.low < alone.low - 0.05
    assert (both.value, both.n) == (alone.value, 400)


def test_lower_is_better_turns_the_verdict() -> None:
    score = Score("x", 0.2, 0.1, 0.3, 100, "lower", "points")
    assert Comparison("x", score, score, score, MARGIN).verdict == "inferior"
    assert Comparison("x", score, score, Score("x", -0.2, -0.3, -0.1, 100, "lower", "points"), MARGIN).verdict == "not inferior"


def test_a_comparison_needs_a_margin_and_clusters() -> None:
    with pytest.raises(ValueError, match="margin was 3"):
        Comparison.shares("x", [True], [True], [["a"]], "higher", 3)
    with pytest.raises(ValueError, match="no clustering"):
        Comparison.shares("x", [True], [True], [], "higher", MARGIN)


def test_means_are_paired_and_clustered() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]
    contrast = Contrast.means("x", before, after, list("abcd"), "higher", "CLIP")
    assert (contrast.before.value, contrast.after.value, contrast.change.value) == (2.5, 3.5, 1)
    assert (contrast.change.low, contrast.change.high) == (1, 1)  # each rose by exactly one
    assert contrast.before.low < 2.5 < contrast.before.high


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    """For diagonal covariances ‖δ‖² + Σ (σ₁ − σ₂)²; the features are whitened so that their sample moments are exact."""
    features = whitened(400, 6, 0)
    shift, scale = torch.tensor([0.5, 0, 0, 0, 0, 0]), torch.tensor([1.0, 2, 1, 1, 3, 1])
    assert frechet(features, features) < 1e-9
    assert frechet(features, features + shift) == pytest.approx(0.25, abs=1e-6)
    assert frechet(features, features * scale) == pytest.approx(1 + 4, abs=1e-5)
    rotated = features @ torch.linalg.qr(torch.randn(6, 6, generator=seeded(1))).Q
    assert frechet(features * scale, rotated * scale) > 0  # a rotation of unequal axes moves the covariance


def test_frechet_agrees_with_the_matrix_root_also_for_fewer_rows_than_features() -> None:
    """The textbook formula by eigenvalues of Σ₁ Σ₂, against singular values."""
    for n, d in ((50, 8), (5, 20)):
        a, b = (torch.randn(n, d, generator=seeded(s), dtype=torch.float64) * (1 + s) for s in (1, 2))
        values = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0)
        expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * values.sqrt().sum()
        assert frechet(a.float(), b.float()) == pytest.approx(float(expected), rel=1e-3)


def test_frechet_refuses_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="needs two rows"):
        frechet(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="not finite"):
        frechet(torch.full((3, 3), float("nan")), torch.zeros(5, 3))


def test_the_jackknife_of_a_mean_holds_it() -> None:
    """Of a mean it is Student's interval, nearly: it holds the truth in some 95 % of the cases, and with no spread it has no width."""
    hits = 0
    for seed in range(200):
        values = torch.randn(60, generator=seeded(seed))
        low, high = jackknife(lambda rows, v=values: float(v[rows].mean()), number(list(range(60))), float(values.mean()))
        hits += low < 0 < high
    assert 180 <= hits <= 199
    ones = torch.ones(60)
    assert jackknife(lambda rows: float(ones[rows].mean()), number(list(range(60))), 1.0) == (1.0, 1.0)
    assert jackknife(lambda rows: 1.0, number(["a", "b"]), 1.0) == (-float("inf"), float("inf"))


def whitened(n: int, d: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return (x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T).float()


def embedded(agreement: tuple[float, ...], features: torch.Tensor | None) -> Samples:
    shots = tuple(Shot(f"p{i}", i, "unrelated", "dog", ("dog",)) for i in range(len(agreement)))
    return Samples(shots, agreement=agreement, features=features)


def test_the_clip_score_is_100_for_equal_and_0_for_opposite_embeddings() -> None:
    same, opposite = embedded((1.0, 1.0), None), embedded((-1.0, -1.0), None)
    contrast = ClipScore().measure(same, opposite)
    assert (contrast.before.value, contrast.after.value, contrast.change.value) == (100, 0, -100)
    with pytest.raises(ValueError, match="needs an embedder"):
        ClipScore().measure(same, Samples(same.shots))


def test_the_frechet_metric_is_zero_for_the_very_same_pictures_alone() -> None:
    features = torch.nn.functional.normalize(torch.randn(40, 8, generator=seeded(0)), dim=-1)
    moved = torch.nn.functional.normalize(features + 0.5 * torch.randn(40, 8, generator=seeded(1)) + 0.3, dim=-1)
    agreement = (0.5,) * 40
    same = Frechet().measure(embedded(agreement, features), embedded(agreement, features)).after
    other = Frechet().measure(embedded(agreement, features), embedded(agreement, moved)).after
    assert same.value == pytest.approx(0, abs=1e-4)
    assert 0 < other.low < other.value < other.high
    assert other.n == 40
    with pytest.raises(ValueError, match="needs an embedder's features"):
        Frechet().measure(embedded(agreement, None), embedded(agreement, None))
