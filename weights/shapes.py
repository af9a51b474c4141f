"""The toy world of the small cascade: flat shapes on a flat ground, their captions, and a judge that reads pictures.

A picture shows one or two things. A thing has a shape, a colour, a size and a place; two things stand left of,
right of, above or below each other. Some things, and some pairs of things, are held out of training, so that a
model can be asked for what it never saw.

    scene = sample_scene(rng)        what there is
    picture = render(scene)          uint8 (128, 128, 3)
    text = caption(scene, rng)       one of many ways to say it
    seen = judge(picture)            what the pixels show, as a Scene again
    right(scene, seen)["all"]        does the picture show the scene?

Places are in pixels of a 128 x 128 picture: x to the right and y down from its top left corner, centre (64, 64).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, pi, sin

import numpy as np
from PIL import Image, ImageFilter

SIDE = 128
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
COLOURS = {"red": (230, 30, 35), "green": (25, 160, 60), "blue": (35, 75, 225), "yellow": (250, 220, 35),
           "orange": (250, 130, 20), "purple": (145, 50, 180), "white": (250, 250, 250), "black": (15, 15, 15)}
SIZES = {"small": 15.0, "large": 27.0}  # radius: half the width of a thing, in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first thing is
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    x: float  # the centre of its bounding box
    y: float


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    ground: str


def relation(scene):
    """How things[0] stands to things[1], along the axis on which they differ more; None unless there are two."""
    if len(scene.things) != 2:
        return None
    first, second = scene.things
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# ---- what training never shows ---------------------------------------------------------------------------------------

HELD_OUT_THINGS = {("purple", "circle"), ("orange", "square"), ("green", "star"),
                   ("blue", "ring"), ("yellow", "heart"), ("white", "triangle")}
HELD_OUT_PAIRS = {frozenset(tuple(thing.split()) for thing in pair.split(" + ")) for pair in (
    "red circle + blue star", "green circle + white square", "blue circle + yellow triangle",
    "yellow circle + purple ring", "white circle + red heart", "red square + green ring",
    "blue square + orange heart", "yellow square + black star", "purple square + red triangle",
    "green triangle + orange star", "blue triangle + white heart", "black triangle + yellow ring",
    "yellow star + blue heart", "white star + green heart", "red ring + purple star", "black ring + purple heart")}


def held_out(scene):
    """Whether training must never show this scene: it has a held-out thing, or a held-out pair of things."""
    names = frozenset((thing.colour, thing.shape) for thing in scene.things)
    return bool(names & HELD_OUT_THINGS) or names in HELD_OUT_PAIRS


# ---- scenes ----------------------------------------------------------------------------------------------------------

def pick(rng, options):
    """One of a list, each as likely; repeat an option to make it likelier."""
    return options[int(rng.integers(len(options)))]


def pick_names(rng, count, held):
    """The (colour, shape) of each thing: any distinct ones, or (held) a choice that is held out."""
    ordinary = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_THINGS]
    if held and count == 2 and rng.random() < 0.5:
        names = pick(rng, sorted(map(sorted, HELD_OUT_PAIRS)))
    else:
        names = [pick(rng, ordinary) for _ in range(count)]
        if held:
            names[0] = pick(rng, sorted(HELD_OUT_THINGS))
        elif len(set(names)) < count or frozenset(names) in HELD_OUT_PAIRS:
            return pick_names(rng, count, held)
    return names if rng.random() < 0.5 else names[::-1]


def sample_scene(rng, two=0.5, held=False):
    """A scene drawn at random: two things with probability `two`, else one. Never a held-out one unless `held`;
    then only held-out ones, where a pair is half of the time a held-out pair and else has one held-out thing."""
    count = 2 if rng.random() < two else 1
    names = pick_names(rng, count, held)
    ground = pick(rng, [c for c in COLOURS if c not in {colour for colour, _ in names}])
    if count == 1:
        offsets, spread = np.zeros((1, 2)), np.array([14, 14])
    else:
        towards = np.array(RELATIONS[pick(rng, list(RELATIONS))])
        offsets, spread = 31 * np.stack([towards, -towards]), np.where(towards, 2, 8)  # keeps a gap of 3 px or more
    places = SIDE / 2 + offsets + rng.uniform(-spread, spread, (count, 2))
    places = np.round(places * 8) / 8  # render draws to an eighth of a pixel
    sizes = [pick(rng, list(SIZES)) for _ in names]
    return Scene(tuple(Thing(shape, colour, size, float(x), float(y))
                       for (colour, shape), size, (x, y) in zip(names, sizes, places)), ground)


# ---- pictures --------------------------------------------------------------------------------------------------------

def inside(shape, u, v):
    """Which points lie in a shape of radius 1 around (0, 0): u to the right, v down. Bool, in u and v's shape."""
    if shape == "circle":
        return u**2 + v**2 < 0.95**2
    if shape == "ring":
        return abs(u**2 + v**2 - 0.65) < 0.35  # between radius 0.55 and 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.86
    if shape == "triangle":
        return (v < 0.9) & (abs(u) < (v + 0.9) / 1.8)
    if shape == "star":
        v = v - 0.1  # five points reach further up than down
        turn = np.abs((np.arctan2(u, -v) + pi / 5) % (2 * pi / 5) - pi / 5)  # angle from the nearest point of the star
        along, across = np.hypot(u, v) * np.cos(turn), np.hypot(u, v) * np.sin(turn)
        point, notch = 1.08, 0.5  # the edge runs from (point, 0) to the notch, a tenth of a turn away
        return (point - along) * notch * sin(pi / 5) > across * (point - notch * cos(pi / 5))
    u, v = 1.14 * u, 0.12 - 1.14 * v  # the heart: the classic curve of the sixth degree
    return (u**2 + v**2 - 1) ** 3 < u**2 * v**3


@lru_cache(maxsize=2048)
def coverage(shape, radius, phase_x, phase_y):
    """How much of each pixel a shape covers when its centre lies phase/8 pixels into the middle one:
    float32 (n, n, 1) in 0..1, from 8 x 8 points a pixel. n is odd."""
    reach = ceil(radius * 1.05) + 1
    points = (np.arange((2 * reach + 1) * 8) + 0.5) / 8 - reach
    hit = inside(shape, (points[None, :] - phase_x / 8) / radius, (points[:, None] - phase_y / 8) / radius)
    return hit.reshape(2 * reach + 1, 8, 2 * reach + 1, 8).mean((1, 3), dtype=np.float32)[..., None]


def render(scene, size=SIDE):
    """Draw a scene: uint8 (size, size, 3), RGB. Edges are anti-aliased."""
    scale = size / SIDE
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = COLOURS[scene.ground]
    for thing in scene.things:
        x, y = (round(8 * scale * place) for place in (thing.x, thing.y))  # in eighths of a pixel
        cover = coverage(thing.shape, SIZES[thing.size] * scale, x % 8, y % 8)
        left, top = x // 8 - len(cover) // 2, y // 8 - len(cover) // 2
        box = picture[max(top, 0):max(top + len(cover), 0), max(left, 0):max(left + len(cover), 0)]
        cover = cover[max(-top, 0):, max(-left, 0):][:len(box), :box.shape[1]]
        box[:] = np.rint(box + cover * (np.array(COLOURS[thing.colour], np.float32) - box))
    return picture


# ---- captions --------------------------------------------------------------------------------------------------------
# Words are drawn evenly from these lists, so the plain word of each is written more often.

SHAPE_WORDS = {"circle": ["circle"] * 4 + ["disc"], "square": ["square"] * 4 + ["box"], "triangle": ["triangle"],
               "star": ["star"], "ring": ["ring"] * 4 + ["hoop"], "heart": ["heart"]}
SIZE_WORDS = {"large": ["large"] * 3 + ["big"], "small": ["small"] * 4 + ["little", "tiny"]}
GROUND_WORDS = ["background"] * 7 + ["ground", "field", "backdrop"]
RELATION_WORDS = {"left of": ["left of"] * 4 + ["to the left of"] * 2 + ["on the left of"],
                  "right of": ["right of"] * 4 + ["to the right of"] * 2 + ["on the right of"],
                  "above": ["above"] * 4 + ["over"], "below": ["below"] * 4 + ["under", "beneath"]}
ARTICLES = ["a"] * 8 + ["the", ""]
OPENINGS = [""] * 9 + ["a picture of", "an image of", "a drawing of", "there is", "here is"]
PHRASES = ["{a} {where} {b}"] * 6 + ["{b} and, {where} it, {a}"]  # these may follow an opening
SENTENCES = ["{a} is {where} {b}", "{a} sits {where} {b}", "{where} {b} sits {a}"]


def with_article(article, words):
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def name_thing(thing, article, full, rng):
    """'a large red circle'. Unless full, some words are left out, but never both the colour and the shape."""
    size, colour, shape = rng.random(3) < ([1, 1, 1] if full else [0.35, 0.75, 0.8])
    if not colour and not shape:
        colour = shape = True
    if article == "a" and colour and not size and not shape and rng.random() < 0.5:
        return f"something {thing.colour}"
    words = [pick(rng, SIZE_WORDS[thing.size])] if size else []
    words += [thing.colour] if colour else []
    words += [pick(rng, SHAPE_WORDS[thing.shape] if shape else ["thing", "object"])]
    return with_article(article, " ".join(words))


def caption(scene, rng):
    """Say a scene in plain English, one of many ways. About half of the captions name everything: the size, colour
    and shape of each thing, their relation and the ground. The others leave some of it out. None says a wrong thing."""
    full = rng.random() < 0.5
    article = pick(rng, ARTICLES)
    opening = pick(rng, OPENINGS) if article == "a" else ""
    names = [name_thing(thing, article, full, rng) for thing in scene.things]
    if len(names) == 1:
        text = names[0]
    else:
        where, (a, b) = relation(scene), names
        if rng.random() < 0.5:  # the same, said from the other thing's side
            where, a, b = OPPOSITE[where], b, a
        forms = PHRASES + ([] if full else ["{a} and {b}"]) + ([] if opening or not article else SENTENCES)
        text = pick(rng, forms).format(a=a, b=b, where=pick(rng, RELATION_WORDS[where]))
    text = f"{opening} {text}".strip()
    if full or rng.random() < 0.35:
        ground = scene.ground
        if rng.random() < 0.85:
            ground = with_article(article, f"{ground} {pick(rng, GROUND_WORDS)}")
        first = opening in ("", "there is") and rng.random() < 0.12
        text = f"on {ground}, {text}" if first else f"{text} on {ground}"
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.1 else "")


def full_caption(scene):
    """The one plain sentence that says it all: 'a large red circle left of a small blue star on a white background'."""
    names = [with_article("a", f"{thing.size} {thing.colour} {thing.shape}") for thing in scene.things]
    return f" {relation(scene)} ".join(names) + f" on {with_article('a', scene.ground)} background"


# ---- the judge -------------------------------------------------------------------------------------------------------

PALETTE = np.array(list(COLOURS.values()), np.float32)
CONTRAST = 40  # what differs less from the ground is ground; the two most alike colours differ by 90
SMALLEST = 100  # pixels; a small star, the smallest thing, has 350


def nearest_colour(pixels):
    """Index of the nearest named colour of each pixel: (..., 3) to (...)."""
    return ((pixels[..., None, :] - PALETTE) ** 2).sum(-1).argmin(-1)


def find_parts(mask):
    """The connected parts of a bool mask (h, w), without specks: a list of integer arrays (n, 2) of (row, column)."""
    width = mask.shape[1] + 2
    todo = set(np.flatnonzero(np.pad(mask, 1)).tolist())
    parts = []
    while todo:
        part = [todo.pop()]
        for pixel in part:  # grows while we walk it
            for near in (pixel - 1, pixel + 1, pixel - width, pixel + width):
                if near in todo:
                    todo.remove(near)
                    part.append(near)
        if len(part) >= SMALLEST:
            parts.append(np.stack(np.divmod(part, width), 1) - 1)
    return parts


@lru_cache(maxsize=None)
def area_and_centre(shape):
    """Area and centre of mass (u, v) of a shape of radius 1."""
    v, u = np.mgrid[-1.1:1.1:441j, -1.1:1.1:441j]
    hit = inside(shape, u, v)
    return hit.mean() * 2.2**2, u[hit].mean(), v[hit].mean()


def name_part(part):
    """The (shape, size, x, y) that fits a connected part best: each shape is laid over it, with the same area and
    centre of mass, and the one wins that shares most with it (intersection over union)."""
    y, x = part.mean(0) + 0.5
    low, high = part.min(0) - 4, part.max(0) + 5
    rows, columns = np.mgrid[low[0]:high[0], low[1]:high[1]] + 0.5
    seen = np.zeros(rows.shape, bool)
    seen[tuple((part - low).T)] = True
    best = (-1,)
    for shape in SHAPES:
        area, u, v = area_and_centre(shape)
        radius = (len(part) / area) ** 0.5
        drawn = inside(shape, (columns - x) / radius + u, (rows - y) / radius + v)
        fit = (drawn & seen).sum() / (drawn | seen).sum()
        best = max(best, (fit, shape, radius, x - u * radius, y - v * radius))
    _, shape, radius, x, y = best
    size = "small" if radius < (SIZES["small"] * SIZES["large"]) ** 0.5 else "large"
    return shape, size, float(x), float(y)


def judge(picture):
    """Read a picture: uint8 (s, s, 3) to the Scene that its pixels show, with any number of things, from left to right.
    It needs no model and knows nothing of the caption; it bears noise, blur, specks and colours a little off."""
    image = Image.fromarray(picture)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.asarray(image, np.float32)

    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3),
                             pixels[3:-3, :3].reshape(-1, 3), pixels[3:-3, -3:].reshape(-1, 3)])
    votes = nearest_colour(border)
    ground = np.bincount(votes).argmax()
    away = np.linalg.norm(pixels - np.median(border[votes == ground], 0), axis=-1)

    # An edge lies half way up to the thing's own contrast, which is the largest within a few pixels.
    peak = np.asarray(Image.fromarray(np.minimum(away, 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(9)))
    names = list(COLOURS)
    things = []
    for part in find_parts((away > CONTRAST) & (away > 0.5 * peak)):
        shape, size, x, y = name_part(part)
        inner = away[tuple(part.T)]
        colour = np.median(pixels[tuple(part.T)][inner >= np.median(inner)], 0)  # the half that the edges blur least
        things.append(Thing(shape, names[nearest_colour(colour)], size, x, y))
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), names[ground])


def right(wanted, seen):
    """What a picture got right, as bools: count, ground, shape, colour, size, relation, and all (everything but the
    size). Of two things, the seen ones are matched to the wanted ones in the order that agrees best in shape and
    colour, then in relation; with the wrong count, nothing can be matched and only the ground may be right."""
    parts = ("shape", "colour", "size")
    best = dict.fromkeys(parts + ("relation",), False)
    best_score = (-1,)
    if len(wanted.things) == len(seen.things):
        for order in (seen.things, seen.things[::-1]):
            pairs = list(zip(wanted.things, order))
            same = {part: [getattr(a, part) == getattr(b, part) for a, b in pairs] for part in parts}
            verdict = {part: all(same[part]) for part in parts}
            verdict["relation"] = relation(wanted) == relation(Scene(order, seen.ground))
            score = (sum(same["shape"] + same["colour"]), verdict["relation"], sum(same["size"]))
            if score > best_score:
                best_score, best = score, verdict
    best = {"count": len(wanted.things) == len(seen.things), "ground": wanted.ground == seen.ground} | best
    return best | {"all": all(best[part] for part in ("count", "ground", "shape", "colour", "relation"))}
