"""The synthetic dataset of the small cascade: flat shapes on a plain background, their captions, and an evaluator.

An image shows one or two objects. An object has a shape, a colour, a size and a position; of two
objects, one is left of, right of, above or below the other. Some objects and some pairs are held
out of training, to test whether a model generalises to combinations it has never seen.

    scene = sample_scene(rng)               a random description of an image
    image = render(scene)                   uint8 (128, 128, 3)
    text = caption(scene, rng)              one of many phrasings
    detected = detect(image)                the Scene that the pixels show
    score(scene, detected)["all"]           does the image show the scene?

Positions are in pixels of a 128 x 128 image: x to the right and y down from the top left corner.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, pi, sin

import numpy as np
from PIL import Image, ImageFilter

SIDE = 128
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
COLOURS = {
    "red": (230, 30, 35), "green": (25, 160, 60), "blue": (35, 75, 225), "yellow": (250, 220, 35),
    "orange": (250, 130, 20), "purple": (145, 50, 180), "white": (250, 250, 250), "black": (15, 15, 15),
}
SIZES = {"small": 15.0, "large": 27.0}                          # half the width of an object, in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    x: float                                                    # centre of the bounding box
    y: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str


def relation(scene):
    """How objects[0] lies relative to objects[1], along the axis on which they are farther apart.
    None unless there are two objects."""
    if len(scene.objects) != 2:
        return None
    first, second = scene.objects
    dx = first.x - second.x
    dy = first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# ---- held-out combinations -----------------------------------------------------------------------

HELD_OUT_OBJECTS = {
    ("purple", "circle"), ("orange", "square"), ("green", "star"),
    ("blue", "ring"), ("yellow", "heart"), ("white", "triangle"),
}


def parse_pair(text):
    """'red circle + blue star' -> the set of its two (colour, shape)."""
    return frozenset(tuple(name.split()) for name in text.split(" + "))


HELD_OUT_PAIRS = {parse_pair(text) for text in (
    "red circle + blue star", "green circle + white square", "blue circle + yellow triangle",
    "yellow circle + purple ring", "white circle + red heart", "red square + green ring",
    "blue square + orange heart", "yellow square + black star", "purple square + red triangle",
    "green triangle + orange star", "blue triangle + white heart", "black triangle + yellow ring",
    "yellow star + blue heart", "white star + green heart", "red ring + purple star",
    "black ring + purple heart",
)}


def held_out(scene):
    """True if training must never show this scene: it has a held-out object or is a held-out pair."""
    names = frozenset((item.colour, item.shape) for item in scene.objects)
    return bool(names & HELD_OUT_OBJECTS) or names in HELD_OUT_PAIRS


# ---- scenes --------------------------------------------------------------------------------------

def pick(rng, options):
    """A random element; repeat an option to make it more likely."""
    return options[int(rng.integers(len(options)))]


def sample_names(rng, count, held):
    """The (colour, shape) of each object: distinct ones, none held out unless `held`."""
    ordinary = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_OBJECTS]
    if held and count == 2 and rng.random() < 0.5:
        names = pick(rng, sorted(map(sorted, HELD_OUT_PAIRS)))
    else:
        names = [pick(rng, ordinary) for _ in range(count)]
        if held:
            names[0] = pick(rng, sorted(HELD_OUT_OBJECTS))
        elif len(set(names)) < count or frozenset(names) in HELD_OUT_PAIRS:
            return sample_names(rng, count, held)
    return names if rng.random() < 0.5 else names[::-1]


def sample_scene(rng, two=0.5, held=False):
    """A random scene: two objects with probability `two`, else one.

    With `held`, only held-out scenes: half of the pairs are held-out pairs, the others contain one
    held-out object. Otherwise never a held-out scene.
    """
    count = 2 if rng.random() < two else 1
    names = sample_names(rng, count, held)
    used = {colour for colour, _ in names}
    background = pick(rng, [colour for colour in COLOURS if colour not in used])
    if count == 1:
        offsets = np.zeros((1, 2))
        spread = np.array([14, 14])
    else:
        direction = np.array(RELATIONS[pick(rng, list(RELATIONS))])
        offsets = 31 * np.stack([direction, -direction])
        spread = np.where(direction, 2, 8)                      # keeps a gap of at least 3 pixels
    positions = SIDE / 2 + offsets + rng.uniform(-spread, spread, (count, 2))
    positions = np.round(positions * 8) / 8                     # render() draws to an eighth of a pixel
    sizes = [pick(rng, list(SIZES)) for _ in names]
    objects = [
        Object(shape, colour, size, float(x), float(y))
        for (colour, shape), size, (x, y) in zip(names, sizes, positions)
    ]
    return Scene(tuple(objects), background)


# ---- images --------------------------------------------------------------------------------------

def inside(shape, u, v):
    """Which points lie in a shape of radius 1 around (0, 0); u points right, v down. A bool array."""
    if shape == "circle":
        return u**2 + v**2 < 0.95**2
    if shape == "ring":
        return abs(u**2 + v**2 - 0.65) < 0.35                   # between the radii 0.55 and 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.86
    if shape == "triangle":
        return (v < 0.9) & (abs(u) < (v + 0.9) / 1.8)
    if shape == "star":
        v = v - 0.1                                             # five points reach further up than down
        angle = (np.arctan2(u, -v) + pi / 5) % (2 * pi / 5) - pi / 5
        angle = np.abs(angle)                                   # from the nearest point of the star
        along = np.hypot(u, v) * np.cos(angle)
        across = np.hypot(u, v) * np.sin(angle)
        point = 1.08                                            # the edge runs from (point, 0) ...
        notch = 0.5                                             # ... to the notch, a tenth of a turn away
        return (point - along) * notch * sin(pi / 5) > across * (point - notch * cos(pi / 5))
    u = 1.14 * u                                                # the heart: the classic sextic curve
    v = 0.12 - 1.14 * v
    return (u**2 + v**2 - 1) ** 3 < u**2 * v**3


@lru_cache(maxsize=2048)
def coverage(shape, radius, phase_x, phase_y):
    """The fraction of each pixel that a shape covers, from 8 x 8 samples per pixel: float32 (n, n, 1).
    The centre of the shape lies phase/8 pixels inside the middle pixel; n is odd."""
    reach = ceil(radius * 1.05) + 1
    points = (np.arange((2 * reach + 1) * 8) + 0.5) / 8 - reach
    u = (points[None, :] - phase_x / 8) / radius
    v = (points[:, None] - phase_y / 8) / radius
    samples = inside(shape, u, v).reshape(2 * reach + 1, 8, 2 * reach + 1, 8)
    return samples.mean((1, 3), dtype=np.float32)[..., None]


def render(scene, size=SIDE):
    """Draws a scene with anti-aliased edges: uint8 (size, size, 3), RGB."""
    scale = size / SIDE
    image = np.empty((size, size, 3), np.uint8)
    image[:] = COLOURS[scene.background]
    for item in scene.objects:
        x = round(8 * scale * item.x)                           # in eighths of a pixel
        y = round(8 * scale * item.y)
        cover = coverage(item.shape, SIZES[item.size] * scale, x % 8, y % 8)
        left = x // 8 - len(cover) // 2
        top = y // 8 - len(cover) // 2
        bottom, right = max(top + len(cover), 0), max(left + len(cover), 0)
        box = image[max(top, 0):bottom, max(left, 0):right]     # clipped at the image's borders
        cover = cover[max(-top, 0):, max(-left, 0):][:len(box), :box.shape[1]]
        box[:] = np.rint(box + cover * (np.array(COLOURS[item.colour], np.float32) - box))
    return image


# ---- captions ------------------------------------------------------------------------------------
# Words are drawn uniformly from these lists, so the usual word of each is repeated.

SHAPE_WORDS = {
    "circle": ["circle"] * 4 + ["disc"], "square": ["square"] * 4 + ["box"],
    "triangle": ["triangle"], "star": ["star"], "ring": ["ring"] * 4 + ["hoop"], "heart": ["heart"],
}
SIZE_WORDS = {"large": ["large"] * 3 + ["big"], "small": ["small"] * 4 + ["little", "tiny"]}
BACKGROUND_WORDS = ["background"] * 7 + ["ground", "field", "backdrop"]
RELATION_WORDS = {
    "left of": ["left of"] * 4 + ["to the left of"] * 2 + ["on the left of"],
    "right of": ["right of"] * 4 + ["to the right of"] * 2 + ["on the right of"],
    "above": ["above"] * 4 + ["over"], "below": ["below"] * 4 + ["under", "beneath"],
}
ARTICLES = ["a"] * 8 + ["the", ""]
OPENINGS = [""] * 9 + ["a picture of", "an image of", "a drawing of", "there is", "here is"]
PHRASES = ["{a} {where} {b}"] * 6 + ["{b} and, {where} it, {a}"]        # may follow an opening
SENTENCES = ["{a} is {where} {b}", "{a} sits {where} {b}", "{where} {b} sits {a}"]


def with_article(article, words):
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def name_object(item, article, full, rng):
    """'a large red circle'. Unless full, attributes may be omitted, but not both colour and shape."""
    size, colour, shape = rng.random(3) < ([1, 1, 1] if full else [0.35, 0.75, 0.8])
    if not colour and not shape:
        colour = shape = True
    if article == "a" and colour and not size and not shape and rng.random() < 0.5:
        return f"something {item.colour}"
    words = []
    if size:
        words.append(pick(rng, SIZE_WORDS[item.size]))
    if colour:
        words.append(item.colour)
    words.append(pick(rng, SHAPE_WORDS[item.shape] if shape else ["thing", "object"]))
    return with_article(article, " ".join(words))


def caption(scene, rng):
    """A random description in plain English. About half of the captions are full: they name size,
    colour and shape of each object, the relation and the background. Others omit some of it.
    Every caption is true."""
    full = rng.random() < 0.5
    article = pick(rng, ARTICLES)
    opening = pick(rng, OPENINGS) if article == "a" else ""
    names = [name_object(item, article, full, rng) for item in scene.objects]
    if len(names) == 1:
        text = names[0]
    else:
        a, b = names
        where = relation(scene)
        if rng.random() < 0.5:                                  # the same from the other object's side
            a, b = b, a
            where = OPPOSITE[where]
        forms = list(PHRASES)
        if not full:
            forms.append("{a} and {b}")
        if not opening and article:
            forms += SENTENCES
        form = pick(rng, forms)
        text = form.format(a=a, b=b, where=pick(rng, RELATION_WORDS[where]))
    text = f"{opening} {text}".strip()
    if full or rng.random() < 0.35:
        background = scene.background
        if rng.random() < 0.85:
            background = with_article(article, f"{background} {pick(rng, BACKGROUND_WORDS)}")
        if opening in ("", "there is") and rng.random() < 0.12:
            text = f"on {background}, {text}"
        else:
            text = f"{text} on {background}"
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.1 else "")


def full_caption(scene):
    """The plain full caption: 'a large red circle left of a small blue star on a white background'."""
    names = [with_article("a", f"{item.size} {item.colour} {item.shape}") for item in scene.objects]
    background = with_article("a", f"{scene.background} background")
    return f" {relation(scene)} ".join(names) + f" on {background}"


# ---- the evaluator -------------------------------------------------------------------------------

PALETTE = np.array(list(COLOURS.values()), np.float32)
CONTRAST = 40       # pixels closer to the background's colour belong to it; two colours differ by 90
SMALLEST = 100      # pixels; a small star, the smallest object, has 350


def nearest_colour(pixels):
    """The index of each pixel's nearest named colour: (..., 3) -> (...)."""
    return ((pixels[..., None, :] - PALETTE) ** 2).sum(-1).argmin(-1)


def connected_components(mask):
    """The connected regions of a bool mask (h, w), without specks: integer arrays (n, 2) of
    (row, column)."""
    width = mask.shape[1] + 2
    todo = set(np.flatnonzero(np.pad(mask, 1)).tolist())
    regions = []
    while todo:
        region = [todo.pop()]
        for pixel in region:                                    # grows while we iterate over it
            for neighbour in (pixel - 1, pixel + 1, pixel - width, pixel + width):
                if neighbour in todo:
                    todo.remove(neighbour)
                    region.append(neighbour)
        if len(region) >= SMALLEST:
            regions.append(np.stack(np.divmod(region, width), 1) - 1)
    return regions


@lru_cache(maxsize=None)
def area_and_centroid(shape):
    """Area and centroid (u, v) of a shape of radius 1."""
    v, u = np.mgrid[-1.1:1.1:441j, -1.1:1.1:441j]
    mask = inside(shape, u, v)
    return mask.mean() * 2.2**2, u[mask].mean(), v[mask].mean()


def fit_shape(region):
    """The (shape, size, x, y) that fits a connected region best: each shape is drawn with the region's
    area and centroid, and the one with the largest intersection over union wins."""
    y, x = region.mean(0) + 0.5
    low = region.min(0) - 4
    high = region.max(0) + 5
    rows, columns = np.mgrid[low[0]:high[0], low[1]:high[1]] + 0.5
    mask = np.zeros(rows.shape, bool)
    mask[tuple((region - low).T)] = True
    best = (-1,)
    for shape in SHAPES:
        area, u, v = area_and_centroid(shape)
        radius = (len(region) / area) ** 0.5
        ideal = inside(shape, (columns - x) / radius + u, (rows - y) / radius + v)
        overlap = (ideal & mask).sum() / (ideal | mask).sum()
        best = max(best, (overlap, shape, radius, x - u * radius, y - v * radius))
    _, shape, radius, x, y = best
    size = "small" if radius < (SIZES["small"] * SIZES["large"]) ** 0.5 else "large"
    return shape, size, float(x), float(y)


def detect(image):
    """Reads an image, uint8 (s, s, 3): the Scene that its pixels show, objects from left to right.
    It uses no model and no caption; it tolerates noise, blur, specks and slightly wrong colours."""
    image = Image.fromarray(image)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.asarray(image, np.float32)

    border = np.concatenate([
        pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3),
        pixels[3:-3, :3].reshape(-1, 3), pixels[3:-3, -3:].reshape(-1, 3),
    ])
    votes = nearest_colour(border)
    background = np.bincount(votes).argmax()
    background_rgb = np.median(border[votes == background], 0)
    contrast = np.linalg.norm(pixels - background_rgb, axis=-1)

    # An edge lies where the contrast is half of the largest contrast within a few pixels.
    peak = Image.fromarray(np.minimum(contrast, 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(9))
    foreground = (contrast > CONTRAST) & (contrast > 0.5 * np.asarray(peak))
    names = list(COLOURS)
    objects = []
    for region in connected_components(foreground):
        shape, size, x, y = fit_shape(region)
        inner = contrast[tuple(region.T)]
        inner = inner >= np.median(inner)                       # the half least blurred by edges
        colour = np.median(pixels[tuple(region.T)][inner], 0)
        objects.append(Object(shape, names[nearest_colour(colour)], size, x, y))
    return Scene(tuple(sorted(objects, key=lambda item: item.x)), names[background])


def score(scene, detected):
    """What a detected scene gets right, as bools: count, background, shape, colour, size, relation,
    and all (everything but the size).

    Two objects are matched in the order that agrees best in shape and colour, then in relation. With
    a wrong count nothing can be matched, and only the background may be right.
    """
    attributes = ("shape", "colour", "size")
    best = dict.fromkeys((*attributes, "relation"), False)
    best_rank = (-1,)
    if len(scene.objects) == len(detected.objects):
        for order in (detected.objects, detected.objects[::-1]):
            pairs = list(zip(scene.objects, order))
            same = {
                name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in attributes
            }
            result = {name: all(same[name]) for name in attributes}
            result["relation"] = relation(scene) == relation(Scene(order, detected.background))
            rank = (sum(same["shape"] + same["colour"]), result["relation"], sum(same["size"]))
            if rank > best_rank:
                best_rank = rank
                best = result
    count = len(scene.objects) == len(detected.objects)
    best = {"count": count, "background": scene.background == detected.background} | best
    required = ("count", "background", "shape", "colour", "relation")
    return best | {"all": all(best[name] for name in required)}
