"""Scenes and captions: seeded by their generator alone, and captions say what is there."""

from __future__ import annotations

import pytest
import torch

from efface.concepts.vocabulary import read
from efface.world import captions, scenes, sprites


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_world_is_large_enough() -> None:
    vocabulary = read()
    assert len(vocabulary.objects) >= 100
    assert len(vocabulary.styles) == 7
    assert len(vocabulary.backgrounds) == 8
    assert {g.kind for g in vocabulary.groups} == {"object", "identity", "unsafe"}


def test_same_seed_same_scenes_and_pictures(art: sprites.Sprites) -> None:
    first, again, other = (scenes.draw(16, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.objects, again.objects) and torch.equal(first.place, again.place)
    assert not torch.equal(first.objects, other.objects)
    assert torch.equal(scenes.render(art, first), scenes.render(art, again))


def test_global_randomness_is_untouched(art: sprites.Sprites) -> None:
    before = torch.get_rng_state()
    drawn = scenes.draw(8, generator())
    captions.describe(drawn, generator())
    scenes.render(art, drawn)
    assert torch.equal(before, torch.get_rng_state())


def test_pictures_are_in_range_and_show_their_background(art: sprites.Sprites) -> None:
    drawn = scenes.draw(64, generator(), pairs=0.0)
    pictures = scenes.render(art, drawn)
    assert pictures.shape == (64, 3, scenes.SIZE, scenes.SIZE)
    assert pictures.min() >= 0 and pictures.max() <= 1
    colours = torch.tensor([b.rgb for b in read().backgrounds]) / 255
    corners = torch.stack([pictures[:, :, y, x] for y in (0, -1) for x in (0, -1)])
    shown = (corners - colours[drawn.background]).abs().amax(-1) < 1e-4
    assert shown.any(dim=0).float().mean() > 0.95  # a large object may reach into some corners, hardly into all


def test_one_object_moves_as_its_placement_says(art: sprites.Sprites) -> None:
    drawn = scenes.draw(2, generator(), pairs=0.0)
    place = torch.tensor([0.3, 0.0, 0.0, 0.0, 1.0]).repeat(2, 2, 1)
    place[1, 0, 2] = 0.6  # to the right
    still = scenes.Scenes(drawn.objects[:1].repeat(2, 1), drawn.style[:1].repeat(2), torch.zeros(2, dtype=torch.long), place)
    middle, right = (scenes.render(art, still) < 0.99).any(dim=1).float()
    columns = torch.arange(scenes.SIZE)
    centres = [(mask.sum(0) * columns).sum() / mask.sum() for mask in (middle, right)]
    assert centres[0] == pytest.approx(31.5, abs=1)
    assert centres[1] - centres[0] == pytest.approx(0.6 * 32, abs=1)


def test_pairs_have_two_different_objects_side_by_side() -> None:
    drawn = scenes.draw(500, generator(), pairs=1.0)
    assert (drawn.objects >= 0).all()
    assert (drawn.objects[:, 0] != drawn.objects[:, 1]).all()
    assert (drawn.place[:, 0, 2] < 0).all() and (drawn.place[:, 1, 2] > 0).all()
    assert (drawn.labels(len(read().objects)).sum(1) == 2).all()
    share = (scenes.draw(4000, generator()).objects[:, 1] >= 0).float().mean().item()
    assert share == pytest.approx(scenes.PAIRS, abs=0.03)


def test_captions_are_true_of_their_scenes() -> None:
    drawn = scenes.draw(2000, generator())
    said = captions.describe(drawn, generator(1))
    true = captions.true_of(said, drawn)
    assert true.diagonal().all()
    assert true.float().mean() < 0.05


def test_captions_name_what_is_there() -> None:
    vocabulary = read()
    drawn = scenes.draw(1000, generator())
    said = captions.describe(drawn, generator(1))
    for i, text in enumerate(said.texts):
        first, second = drawn.objects[i].tolist()
        name = vocabulary.groups[int(said.objects[i, 0])].name if said.grouped[i] else vocabulary.objects[first]
        assert name in text
        assert second < 0 or vocabulary.objects[second] in text
        for index, words in ((said.style[i], vocabulary.styles), (said.background[i], vocabulary.backgrounds)):
            assert index < 0 or words[int(index)].name in text.split()


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("cat", "", False, "", "", False, 0), "a cat"),
        (("cat", "dog", False, "", "", False, 0), "a cat beside a dog"),
        (("cat", "", False, "retro", "", True, 0), "a retro cat"),
        (("cat", "", False, "retro", "", False, 1), "an emoji of a cat in retro style"),
        (("owl", "", False, "", "orange", False, 0), "an owl on an orange background"),
        (("french fries", "", False, "", "", False, 2), "a picture of french fries"),
        (("fruit", "", True, "", "", False, 0), "a fruit"),
    ],
)
def test_captions_read_well(parts: tuple[str, str, bool, str, str, bool, int], text: str) -> None:
    vocabulary = read()
    first, second, grouped, style, background, adjective, template = parts
    names = [g.name for g in vocabulary.groups] if grouped else list(vocabulary.objects)
    number = {w.name: i for words in (vocabulary.styles, vocabulary.backgrounds) for i, w in enumerate(words)} | {"": -1}
    objects = (names.index(first), vocabulary.objects.index(second) if second else -1)
    made = captions.phrase(vocabulary, objects, grouped, number[style], number[background], adjective, template, 0)
    assert made == text


def test_every_prompt_form_occurs() -> None:
    texts = " | ".join(captions.describe(scenes.draw(20000, generator()), generator(1)).texts)
    for words in ("beside a", "next to a", "in retro style", "a retro ", "on a blue background", "an emoji of", "| a fruit |", "| a cat |"):
        assert words in texts


def test_sprites_of_another_world_are_refused(tmp_path, cache) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "sprites.safetensors"
    save_file({"pixels": torch.zeros(1, 1, 4, 2, 2, dtype=torch.uint8)}, path, metadata={"world": "emoji", "objects": "[]", "styles": "[]"})
    with pytest.raises(ValueError, match="built from another vocabulary \\(objects, styles differ\\); build it again"):
        sprites.load(path)
    with pytest.raises(FileNotFoundError, match="npm ci"):
        sprites.load(tmp_path / "none.safetensors")


def test_aliases_are_followed_and_unknown_icons_named() -> None:
    body = '<circle cx="8" cy="8" r="8" fill="#f00"/>'
    icons = {"prefix": "set", "icons": {"ball": {"body": body}}, "aliases": {"orb": {"parent": "ball"}}, "width": 16, "height": 16}
    assert sprites.body(icons, "orb") == sprites.body(icons, "ball")
    with pytest.raises(KeyError, match="'set' has no icon 'cube'"):
        sprites.body(icons, "cube")


def test_art_is_rasterised_with_premultiplied_alpha() -> None:
    pytest.importorskip("resvg_py")
    icons = {"prefix": "set", "icons": {"ball": {"body": '<circle cx="8" cy="8" r="8" fill="#f00"/>'}}, "width": 16, "height": 16}
    picture = sprites.rasterise(sprites.body(icons, "ball"))
    assert picture.shape == (4, sprites.PIXELS, sprites.PIXELS) and picture.dtype == torch.uint8
    assert picture[:, 48, 48].tolist() == [255, 0, 0, 255]
    assert picture[:, 0, 0].tolist() == [0, 0, 0, 0]
    assert (picture[0] <= picture[3]).all()
