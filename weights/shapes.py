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

from dataclasses import dataclass, field
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
# For fine-tuning. The lists above do not have them, so that the dataset stays the same.
NEW_SHAPES = ("crescent", "hexagon")
NEW_COLOURS = {"cyan": (0, 255, 255)}
SIZES = {"small": 15.0, "large": 27.0}                          # half the width of an object, in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Object:
    """None is an attribute that a prompt leaves open."""
    shape: str | None
    colour: str | None = None
    size: str | None = None
    x: float | None = None                                      # centre of the bounding box
    y: float | None = None
    overlap: float = field(default=1.0, compare=False)          # detected: IoU with the ideal shape
    purity: float = field(default=1.0, compare=False)           # detected: share of pixels in its colour


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str | None = None
    purity: float = field(default=1.0, compare=False)           # detected: of the background


def relation(scene):
    """How objects[0] lies relative to objects[1], along the axis on which they are farther apart.
    None unless there are two objects with positions."""
    if len(scene.objects) != 2 or None in (scene.objects[0].x, scene.objects[1].x):
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


def sample_scene(rng, two=0.5, held=False, alike=0.0):
    """A random scene: two objects with probability `two`, else one; a share `alike` of the pairs are
    alike in shape, colour and size, the others differ in shape or colour.

    With `held`, only held-out scenes: half of the pairs are held-out pairs, the others contain one
    held-out object. Otherwise never a held-out scene.
    """
    count = 2 if rng.random() < two else 1
    is_alike = count == 2 and rng.random() < alike if alike else False
    names = sample_names(rng, 1, held) * 2 if is_alike else sample_names(rng, count, held)
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
    if is_alike:
        sizes[1] = sizes[0]
    objects = [
        Object(shape, colour, size, float(x), float(y))
        for (colour, shape), size, (x, y) in zip(names, sizes, positions)
    ]
    return Scene(tuple(objects), background)


# ---- images --------------------------------------------------------------------------------------

def inside(shape, u, v):
    """Which points lie in a shape of radius 1 around (0, 0); u points right, v down. A bool array."""
    if shape == "hexagon":
        return np.maximum(abs(v), abs(u) * sin(pi / 3) + abs(v) / 2) < 0.87
    if shape == "crescent":
        u = u - 0.2                                             # centred
        return (u**2 + v**2 < 0.95**2) & ((u - 0.6)**2 + v**2 > 0.75**2)
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
    colours = COLOURS | NEW_COLOURS
    image = np.empty((size, size, 3), np.uint8)
    image[:] = colours[scene.background]
    for item in scene.objects:
        x = round(8 * scale * item.x)                           # in eighths of a pixel
        y = round(8 * scale * item.y)
        cover = coverage(item.shape, SIZES[item.size] * scale, x % 8, y % 8)
        left = x // 8 - len(cover) // 2
        top = y // 8 - len(cover) // 2
        bottom, right = max(top + len(cover), 0), max(left + len(cover), 0)
        box = image[max(top, 0):bottom, max(left, 0):right]     # clipped at the image's borders
        cover = cover[max(-top, 0):, max(-left, 0):][:len(box), :box.shape[1]]
        box[:] = np.rint(box + cover * (np.array(colours[item.colour], np.float32) - box))
    return image


# ---- captions ------------------------------------------------------------------------------------
# Words are drawn uniformly from these lists, so the usual ones are repeated.

SHAPE_WORDS = {
    "circle": ["circle"] * 4 + ["disc"], "square": ["square"] * 4 + ["box"],
    "triangle": ["triangle"], "star": ["star"], "ring": ["ring"] * 4 + ["hoop"], "heart": ["heart"],
    "crescent": ["crescent"], "hexagon": ["hexagon"],
}
SIZE_WORDS = {"large": ["large"] * 3 + ["big"], "small": ["small"] * 4 + ["little", "tiny"]}
VAGUE_WORDS = ["thing", "object", "shape"]
EMPTY_ADJECTIVES = ["nice", "simple", "plain", "flat", "pretty", "solid"]
ARTICLES = ["a"] * 9 + ["the", "the", "", "", "one", "1", "a single"]
NUMBERS = ["two"] * 6 + ["2", "2", "a pair of", "a couple of"]
ARRANGEMENTS = {
    "left of": ["side by side", "next to each other"], "right of": ["side by side", "next to each other"],
    "above": ["one above the other", "one over the other"],
    "below": ["one below the other", "one under the other"],
}
RELATION_WORDS = {
    "left of": ["left of"] * 4 + ["to the left of"] * 2 + ["on the left of"],
    "right of": ["right of"] * 4 + ["to the right of"] * 2 + ["on the right of"],
    "above": ["above"] * 5 + ["over", "on top of", "directly above"],
    "below": ["below"] * 5 + ["under", "beneath", "underneath", "directly below"],
}
PHRASES = ["{a} {where} {b}"] * 6 + ["{b} and, {where} it, {a}"]        # may follow an opening
SENTENCES = ["{a} is {where} {b}", "{a} sits {where} {b}", "{where} {b} sits {a}",
             "{where} {b} there is {a}", "{a} that is {where} {b}"]
LISTS = ["{a} and {b}"] * 8 + [                                         # in reading order
    "{a}, {b}", "{a} with {b}", "{a} next to {b}", "{a} beside {b}", "{a} and also {b}",
    "both {a} and {b}", "{a} & {b}", "{a} + {b}", "{a} and then {b}", "{a} as well as {b}",
]
OPENINGS = [""] * 10 + [
    "a picture of", "an image of", "a drawing of", "there is", "there is", "here is", "this is",
    "draw", "draw", "please draw", "show me", "paint", "make", "create", "i want", "can you draw",
]
BACKGROUND_WORDS = ["background"] * 7 + ["ground", "field", "backdrop"]
BACKGROUND_FORMS = ["{text} on {ground}"] * 12 + [
    "{text} with {ground}", "{text} with {ground}", "{text} against {ground}", "{text} over {ground}",
    "{text} in front of {ground}", "on {ground}, {text}", "on {ground} {text}", "{ground}: {text}",
]
BACKGROUND_SENTENCES = [
    "{text}, {colour} background", "{text}. the background is {colour}",
    "{text}, and the background is {colour}", "{text}, background {colour}", "{text} ({colour} background)",
]
FILLERS = (                                                             # words without a meaning here
    "please hello hi now just only ok so well very really simply maybe my your our me us you we it they "
    "he she that which who for from in as by like some any all again today here thanks thank would could "
    "should can will must need want see look give get have has had be been was are do does did "
    "at about around exactly almost completely perfectly entirely clearly immediately somewhere "
    "flat art style clean minimal digital design icon logo poster sketch illustration cartoon graphic "
    "sticker card scene view symbol sign child kids book simple bright beautiful lovely great best "
    "generate produce render depict showing shows containing placed located standing floating seen"
).split()


def with_article(article, words):
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def plural(word):
    return f"{word}es" if word.endswith("x") else f"{word}s"


def choose_attributes(full, rng, alone=False):
    """Which of size, colour and shape to name: all if full, else a random choice that has at least one
    of colour and shape, fewer of an object that is alone."""
    shares = [0.2, 0.5, 0.6] if alone else [0.3, 0.65, 0.8]
    size, colour, shape = rng.random(3) < ([1, 1, 1] if full else shares)
    return size, colour, shape or not colour


def name_object(item, article, full, rng, alone=False):
    """'a large red circle'. Unless full, some attributes may be omitted."""
    size, colour, shape = choose_attributes(full, rng, alone)
    if article == "a" and colour and not size and not shape and rng.random() < 0.5:
        return f"something {item.colour}"
    noun = pick(rng, SHAPE_WORDS[item.shape] if shape else VAGUE_WORDS)
    words = [noun]
    if colour and shape and rng.random() < 0.06:
        words = [noun, "in", item.colour]
    elif colour:
        words = [item.colour, noun]
    if size:
        words.insert(0, pick(rng, SIZE_WORDS[item.size]))
    if rng.random() < 0.05:
        words.insert(0, pick(rng, EMPTY_ADJECTIVES))
    return with_article(article, " ".join(words))


def name_plural(scene, full, rng):
    """'two large red circles'. Names only what both objects share."""
    a, b = scene.objects
    size, colour, shape = choose_attributes(full, rng)
    shape = a.shape == b.shape and (shape or a.colour != b.colour)
    words = [pick(rng, NUMBERS)]
    if size and a.size == b.size:
        words.append(pick(rng, SIZE_WORDS[a.size]))
    if a.colour == b.colour and (colour or not shape):
        words.append(a.colour)
    words.append(plural(pick(rng, SHAPE_WORDS[a.shape] if shape else VAGUE_WORDS)))
    if rng.random() < 0.3:
        words.append(pick(rng, ARRANGEMENTS[relation(scene)]))
    return " ".join(words)


def is_alike(scene):
    """Two objects of the same shape, colour and size."""
    return len({(item.shape, item.colour, item.size) for item in scene.objects}) < len(scene.objects)


def has_common_attribute(scene):
    """Two objects of the same shape or colour."""
    shape_count = len({item.shape for item in scene.objects})
    colour_count = len({item.colour for item in scene.objects})
    return min(shape_count, colour_count) < len(scene.objects)


def name_pair(scene, article, full, rng, sentences):
    """'a large red circle left of a small blue star', or the two joined by 'and'.

    Where the caption says nothing about their positions, objects are named in reading order: left
    before right, above before below. It is what people mean, and otherwise the positions would be a
    coin toss that Stage C could only average.
    """
    where = relation(scene)
    joined = rng.random() < 0.5
    swap = where in ("right of", "below") if joined else rng.random() < 0.5
    a, b = scene.objects
    if swap:
        a, b = b, a
        where = OPPOSITE[where]
    a = name_object(a, article, full, rng)
    b = name_object(b, "another" if is_alike(scene) and article else article, full, rng)
    if joined:
        return pick(rng, LISTS).format(a=a, b=b)
    form = pick(rng, PHRASES + SENTENCES if sentences else PHRASES)
    return form.format(a=a, b=b, where=pick(rng, RELATION_WORDS[where]))


def add_background(text, scene, article, rng):
    colour = scene.background
    if rng.random() < 0.12:
        return pick(rng, BACKGROUND_SENTENCES).format(text=text, colour=colour)
    article = article if article in ("a", "the") else pick(rng, ["a", ""])
    ground = with_article(article, f"{colour} {pick(rng, BACKGROUND_WORDS)}")
    if rng.random() < 0.15:
        return f"{text} on {colour}"
    if rng.random() < 0.06 and text.split()[0] in ("a", "an", "two"):
        return f"{ground} with {text}"
    return pick(rng, BACKGROUND_FORMS).format(text=text, ground=ground)


def random_word(rng):
    """A word that means nothing here: a known one, or random syllables in place of any unknown one."""
    if rng.random() < 0.6:
        return pick(rng, FILLERS)
    word = ""
    for _ in range(int(rng.integers(1, 4))):
        word += pick(rng, ["", *"bcdfghklmnprstvw"]) + pick(rng, "aeiou") + pick(rng, ["", *"lmnrst"])
    return word


def add_fillers(text, rng):
    """One to three words that mean nothing, anywhere."""
    words = text.split()
    for _ in range(int(rng.integers(1, 4))):
        words.insert(int(rng.integers(len(words) + 1)), random_word(rng))
    return " ".join(words)


def caption(scene, rng, fillers=0.25):
    """A random description in plain English. A third of the captions are full: they name size, colour
    and shape of each object and the background. The others omit some of it. Every caption is true. A
    share `fillers` contains words that mean nothing, so that an unknown word does no harm."""
    full = rng.random() < 0.35
    article = pick(rng, ARTICLES)
    opening = pick(rng, OPENINGS)
    if is_alike(scene):
        plural_share = 0.7
    else:
        plural_share = 0.4 if has_common_attribute(scene) and not full else 0.0
    if rng.random() < plural_share:
        text = name_plural(scene, full, rng)
        if opening.endswith(" is"):
            opening = opening.replace("this is", "these are").replace(" is", " are")
    elif len(scene.objects) == 2:
        text = name_pair(scene, article, full, rng, sentences=not opening and article)
    else:
        text = name_object(scene.objects[0], article, full, rng, alone=True)
    text = f"{opening} {text}".strip()
    if full or rng.random() < 0.3:
        text = add_background(text, scene, article, rng)
    if rng.random() < fillers and len(text.split()) < 17:       # the text encoder reads 32 tokens
        text = add_fillers(text, rng)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + pick(rng, [""] * 12 + [".", ".", "!"])


def full_caption(scene):
    """The plain full caption: 'a large red circle left of a small blue star on a white background'."""
    names = [with_article("a", f"{item.size} {item.colour} {item.shape}") for item in scene.objects]
    background = with_article("a", f"{scene.background} background")
    return f" {relation(scene)} ".join(names) + f" on {background}"


# ---- the evaluator -------------------------------------------------------------------------------

CONTRAST = 40       # pixels closer to the background's colour belong to it; two colours differ by 90
SMALLEST = 100      # pixels; a small star, the smallest object, has 350


def nearest_colour(pixels, colours):
    """The index of each pixel's nearest named colour: (..., 3) -> (...)."""
    palette = np.array(list(colours.values()), np.float32)
    return ((pixels[..., None, :] - palette) ** 2).sum(-1).argmin(-1)


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


def fit_shape(region, shapes):
    """The (shape, size, x, y, overlap) that fits a connected region best: each shape is drawn with the
    region's area and centroid, and the one with the largest overlap, intersection over union, wins."""
    y, x = region.mean(0) + 0.5
    low = region.min(0) - 4
    high = region.max(0) + 5
    rows, columns = np.mgrid[low[0]:high[0], low[1]:high[1]] + 0.5
    mask = np.zeros(rows.shape, bool)
    mask[tuple((region - low).T)] = True
    best = (-1,)
    for shape in shapes:
        area, u, v = area_and_centroid(shape)
        radius = (len(region) / area) ** 0.5
        ideal = inside(shape, (columns - x) / radius + u, (rows - y) / radius + v)
        overlap = (ideal & mask).sum() / (ideal | mask).sum()
        best = max(best, (overlap, shape, radius, x - u * radius, y - v * radius))
    overlap, shape, radius, x, y = best
    size = "small" if radius < (SIZES["small"] * SIZES["large"]) ** 0.5 else "large"
    return shape, size, float(x), float(y), float(overlap)


def detect(image, shapes=SHAPES, colours=COLOURS):
    """Reads an image, uint8 (s, s, 3): the Scene that its pixels show, objects from left to right.
    `shapes` and `colours` are those that it may show. It uses no model and no caption; it tolerates noise, blur, specks and slightly wrong colours."""
    image = Image.fromarray(image)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.asarray(image, np.float32)

    border = np.concatenate([
        pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3),
        pixels[3:-3, :3].reshape(-1, 3), pixels[3:-3, -3:].reshape(-1, 3),
    ])
    votes = nearest_colour(border, colours)
    background = np.bincount(votes).argmax()
    background_rgb = np.median(border[votes == background], 0)
    contrast = np.linalg.norm(pixels - background_rgb, axis=-1)

    # An edge lies where the contrast is half of the largest contrast within a few pixels.
    peak = Image.fromarray(np.minimum(contrast, 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(9))
    foreground = (contrast > CONTRAST) & (contrast > 0.5 * np.asarray(peak))
    names = list(colours)
    objects = []
    for region in connected_components(foreground):
        shape, size, x, y, overlap = fit_shape(region, shapes)
        inner = contrast[tuple(region.T)]
        inner = inner >= np.median(inner)                       # the half least blurred by edges
        inner = pixels[tuple(region.T)][inner]                                          # (n, 3)
        colour = np.median(inner, 0)
        purity = float((np.linalg.norm(inner - colour, axis=-1) < CONTRAST).mean())
        objects.append(Object(shape, names[nearest_colour(colour, colours)], size, x, y, overlap, purity))
    objects.sort(key=lambda item: item.x)
    far = np.asarray(Image.fromarray(foreground).convert("L").filter(ImageFilter.MaxFilter(9))) == 0
    purity = float((contrast[far] < CONTRAST).mean()) if far.any() else 0.0
    return Scene(tuple(objects), names[background], purity)


def is_intact(detected):
    """One plain background, and complete shapes of a single colour."""
    parts = [detected.purity > 0.98]
    for item in detected.objects:
        parts.append(item.overlap > 0.8 and item.purity > 0.9)
    return all(parts)


def score(scene, detected):
    """What a detected scene gets right, as bools: count, background, shape, colour, size, relation,
    intact, and all (everything but size and intact). What the scene leaves open (None) is right.

    Two objects are matched in the order that agrees best in shape and colour, then in relation. With
    a wrong count nothing can be matched, and only the background may be right.
    """
    attributes = ("shape", "colour", "size")
    best = dict.fromkeys((*attributes, "relation"), False)
    best_rank = (-1,)
    if len(scene.objects) == len(detected.objects):
        for order in (detected.objects, detected.objects[::-1]):
            pairs = list(zip(scene.objects, order))
            same = {}
            for name in attributes:
                same[name] = [getattr(a, name) in (None, getattr(b, name)) for a, b in pairs]
            result = {name: all(same[name]) for name in attributes}
            found = relation(Scene(order))
            result["relation"] = relation(scene) in (None, found)
            rank = (sum(same["shape"] + same["colour"]), result["relation"], sum(same["size"]))
            if rank > best_rank:
                best_rank = rank
                best = result
    best["count"] = len(scene.objects) == len(detected.objects)
    best["background"] = scene.background in (None, detected.background)
    best["intact"] = is_intact(detected)
    required = ("count", "background", "shape", "colour", "relation")
    return best | {"all": all(best[name] for name in required)}
