"""The toy world: its scenes, its pictures, its captions, and the judge that reads pictures."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))
from shapes import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_THINGS,
    OPPOSITE,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    Thing,  # noqa: E402
    caption,
    full_caption,
    held_out,
    judge,
    relation,
    render,
    right,
    sample_scene,
)


def sample_scenes(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **options) for _ in range(count)]


def names(scene):
    return [(thing.colour, thing.shape) for thing in scene.things]


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_scenes():
    assert sample_scenes(100) == sample_scenes(100)
    assert sample_scenes(100) != sample_scenes(100, seed=1)


def test_training_scenes_hold_nothing_held_out_and_everything_else():
    things, relations, pairs = set(), set(), set()
    for scene in sample_scenes(20_000):
        assert not held_out(scene)
        assert not set(names(scene)) & HELD_OUT_THINGS
        assert frozenset(names(scene)) not in HELD_OUT_PAIRS
        things |= {(thing.colour, thing.shape, thing.size) for thing in scene.things}
        relations.add(relation(scene))
        pairs.add(frozenset(names(scene)))
    assert len(things) == (len(COLOURS) * len(SHAPES) - 6) * len(SIZES)
    assert relations == set(OPPOSITE) | {None}
    assert len(pairs) == 42 + 42 * 41 // 2 - 16


def test_held_out_scenes_are_of_both_kinds_and_all_held_out():
    scenes = sample_scenes(4_000, held=True)
    assert all(held_out(scene) for scene in scenes)
    pairs = {frozenset(names(scene)) for scene in scenes}
    assert HELD_OUT_PAIRS <= pairs and len(HELD_OUT_PAIRS) == 16
    assert {name for scene in scenes if len(scene.things) == 1 for name in names(scene)} == HELD_OUT_THINGS
    two = [scene for scene in scenes if len(scene.things) == 2]
    assert 0.45 < np.mean([frozenset(names(scene)) in HELD_OUT_PAIRS for scene in two]) < 0.55
    assert all(len(set(names(scene)) & HELD_OUT_THINGS) <= 1 for scene in two)
    assert not any(name in HELD_OUT_THINGS for pair in HELD_OUT_PAIRS for name in pair)


def test_things_differ_from_each_other_and_from_the_ground_and_stand_apart_inside_the_picture():
    for scene in sample_scenes(5_000):
        assert scene.ground not in {thing.colour for thing in scene.things}
        for thing in scene.things:
            reach = 1.03 * SIZES[thing.size]
            assert min(thing.x, thing.y) - reach > 1 and max(thing.x, thing.y) + reach < SIDE - 1
        if len(scene.things) == 2:
            a, b = scene.things
            assert (a.colour, a.shape) != (b.colour, b.shape)
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - SIZES[a.size] - SIZES[b.size]
            assert gap >= 3


def test_relation_is_the_first_things_and_turns_with_their_order():
    for scene in sample_scenes(200, two=1):
        first, second = scene.things
        assert relation(Scene((second, first), scene.ground)) == OPPOSITE[relation(scene)]
        if relation(scene) == "above":
            assert first.y < second.y


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_shows_what_its_scene_says():
    for scene in sample_scenes(500):
        picture = render(scene)
        assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
        assert all(tuple(picture[corner]) == COLOURS[scene.ground] for corner in [(0, 0), (0, -1), (-1, 0), (-1, -1)])
        for thing in scene.things:
            centre = tuple(picture[int(thing.y), int(thing.x)])
            assert centre == COLOURS[scene.ground if thing.shape == "ring" else thing.colour]  # a ring has a hole
            on_the_band = tuple(picture[int(thing.y + 0.78 * SIZES[thing.size]), int(thing.x)])
            assert thing.shape != "ring" or on_the_band == COLOURS[thing.colour]


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_soft_and_places_are_finer_than_a_pixel(shape):
    def weight(x):  # grey pixels on black give the coverage; its centre of mass gives the place
        cover = render(Scene((Thing(shape, "white", "small", x, 64.0),), "black"))[..., 0].astype(float) - 15
        assert len(np.unique(cover)) > (2 if shape == "square" else 10)
        return (cover.sum(0) * np.arange(SIDE)).sum() / cover.sum()

    assert weight(64.25) - weight(64.0) == pytest.approx(0.25, abs=0.02)


def test_a_picture_of_another_size_is_the_same_picture():
    for scene in sample_scenes(20):
        small = np.asarray(Image.fromarray(render(scene, 256)).resize((SIDE, SIDE), Image.Resampling.BOX), float)
        assert abs(small - render(scene)).mean() < 0.5


# ---- the judge -------------------------------------------------------------------------------------------------------


def blurred(picture):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)))


def noisy(picture):
    noise = np.random.default_rng(int(picture.sum())).normal(0, 12, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "spoil",
    [lambda p: p, noisy, blurred, lambda p: noisy(blurred(p))],
    ids=["clean", "noisy", "blurred", "noisy and blurred"],
)
def test_the_judge_reads_at_least_99_percent_of_everything(spoil):
    scenes = sample_scenes(75, seed=3) + sample_scenes(50, seed=4, held=True)
    verdicts = [right(scene, judge(spoil(render(scene)))) for scene in scenes]
    for part in verdicts[0]:
        assert np.mean([verdict[part] for verdict in verdicts]) >= 0.99, part


def test_the_judge_says_where_things_are():
    for scene in sample_scenes(40):
        seen = judge(render(scene)).things
        for thing in scene.things:
            assert min(np.hypot(thing.x - other.x, thing.y - other.y) for other in seen) < 1


def test_the_judge_ignores_specks_and_bears_any_picture():
    scene = Scene((Thing("ring", "red", "small", 60.0, 70.0),), "yellow")
    picture = render(scene)
    picture[10:18, 100:108] = COLOURS["blue"]
    assert right(scene, judge(picture))["all"]
    assert right(scene, judge(render(scene, 256)))["all"]
    assert judge(np.full((SIDE, SIDE, 3), 250, np.uint8)) == Scene((), "white")
    judge(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def test_a_wrong_picture_is_judged_wrong():
    wanted = Scene((Thing("circle", "red", "large", 33.0, 64.0), Thing("star", "blue", "small", 95.0, 60.0)), "white")
    a, b = wanted.things

    def wrong(*things, ground="white"):
        verdict = right(wanted, judge(render(Scene(things, ground))))
        return {part for part, value in verdict.items() if not value}

    assert wrong(a, b) == wrong(b, a) == set()
    assert wrong(replace(a, shape="square"), b) == {"shape", "all"}
    assert wrong(replace(a, colour="green"), b) == {"colour", "all"}
    assert wrong(replace(a, size="small"), b) == {"size"}
    assert wrong(a, b, ground="black") == {"ground", "all"}
    assert wrong(replace(a, x=95.0), replace(b, x=33.0)) == {"relation", "all"}
    assert wrong(replace(a, x=64.0, y=33.0), replace(b, x=64.0, y=95.0)) == {"relation", "all"}
    assert "all" in wrong(replace(a, colour="blue"), replace(b, colour="red"))  # the colours swapped
    assert "all" in wrong(replace(a, shape="star"), replace(b, shape="circle"))  # the shapes swapped
    assert wrong(a) == {"count", "shape", "colour", "size", "relation", "all"}


# ---- captions --------------------------------------------------------------------------------------------------------

PLAIN = {
    "disc": "circle",
    "box": "square",
    "hoop": "ring",
    "big": "large",
    "little": "small",
    "tiny": "small",
    "over": "above",
    "under": "below",
    "beneath": "below",
}
ONE_OF = {"colour": "|".join(COLOURS), "shape": "|".join(SHAPES), "size": "|".join(SIZES), "where": "|".join(OPPOSITE)}


def read_caption(text):
    """What a caption names: a list of {size, colour, shape} (None where unsaid), the relation of the first to the
    second, and the ground."""
    text = " ".join(PLAIN.get(word, word) for word in re.findall(r"\w+|,", text.lower()))
    ground = r"on (?:an? |the )?(%s)(?: background| ground| field| backdrop)?" % ONE_OF["colour"]
    found = re.search(rf"^{ground} ,|{ground}$", text)
    if found:
        text = text[: found.start()] + text[found.end() :]
    thing = r"(?:(?P<size>%(size)s) )?(?:(?P<colour>%(colour)s) )?\b(?P<shape>%(shape)s|thing|object)\b" % ONE_OF
    text = re.sub(r"something (\w+)", r"a \1 thing", text)
    things = [match.groupdict() for match in re.finditer(thing, text)]
    for each in things:
        each["shape"] = each["shape"] if each["shape"] in SHAPES else None
    where = re.search(ONE_OF["where"], text)
    where = where and where[0]
    if where and re.search(rf"{where} it|{where} .* sits", text):  # here the second thing is the one that is there
        where = OPPOSITE[where]
    return things, where, found and (found[1] or found[2])


def test_captions_follow_from_the_rng():
    scenes = sample_scenes(100)
    first, second, other = ([caption(scene, rng) for scene in scenes] for rng in map(np.random.default_rng, (7, 7, 8)))
    assert first == second != other


def test_captions_name_nothing_wrong_and_about_half_name_everything():
    rng = np.random.default_rng(0)
    full, words = [], set()
    for scene in sample_scenes(5_000) + sample_scenes(500, held=True):
        text = caption(scene, rng)
        words |= set(re.findall(r"\w+", text.lower()))
        said, where, ground = read_caption(text)
        assert len(said) == len(scene.things), text
        assert ground in (None, scene.ground), text
        assert all(each["colour"] or each["shape"] for each in said), text
        fits = False
        for order in (scene.things, scene.things[::-1]):
            named = [(value, getattr(thing, part)) for each, thing in zip(said, order) for part, value in each.items()]
            named.append((where, relation(Scene(order, scene.ground))))
            fits |= all(value in (None, truth) for value, truth in named)
        assert fits, (text, scene)
        full.append(
            None not in [value for each in said for value in each.values()] + [ground] and (where or len(said) == 1)
        )
    assert 0.45 < np.mean([bool(value) for value in full]) < 0.6
    assert 45 < len(words) < 100


def test_captions_have_the_right_article():
    rng = np.random.default_rng(1)
    for scene in sample_scenes(2_000):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", caption(scene, rng).lower())


def test_the_full_caption_says_it_all():
    scene = Scene((Thing("circle", "red", "large", 33.0, 64.0), Thing("star", "blue", "small", 95.0, 60.0)), "white")
    assert full_caption(scene) == "a large red circle left of a small blue star on a white background"
    one = Scene((Thing("ring", "white", "small", 64.0, 64.0),), "orange")
    assert full_caption(one) == "a small white ring on an orange background"
