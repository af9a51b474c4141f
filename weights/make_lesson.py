"""Draws the figures of README's lesson, from prompt to pixel, into weights/gallery/. Shapes, parameters and FLOPs are
read off the networks, not typed; the pictures are those of one run of the small cascade, whose prompt and seed stand
here.

    python weights/make_lesson.py                   all of them
    python weights/make_lesson.py --out FOLDER      into another folder

    architecture.svg    the whole system: every network, and what flows between them
    why_cascade.svg     the three grids to scale, and what each stage costs
    schedule.png        alpha_bar, and a picture noised to six times
    unet.svg            Stage C and Stage B inside, and their three kinds of block
    read.png            the run's tokens and hidden states
    imagine.png         its way through Stage C
    paint.png           its way through Stage B, to the picture

It needs tests/ beside it, which hold the official sizes.
"""
import argparse
import math
import sys
import textwrap
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]

import operators                                                                        # noqa: E402
import shapes                                                                           # noqa: E402
from cascade import COMPRESSION, Cascade                                                # noqa: E402
from make_gallery import CELL, GALLERY, grid                                            # noqa: E402
from model import CLIP_TOKENS, HEAD_WIDTH                                              # noqa: E402
from sampler import alpha_bar, draw, generators, sample, timesteps                      # noqa: E402
from test_official import UNETS, on_meta                                                # noqa: E402
from text_encoder import TextConfig, Tokenizer                                          # noqa: E402

PROMPT, SEED = "a small yellow star above a large blue circle", 3
SCENE = shapes.Scene((shapes.Thing("star", "yellow", "small", 64, 33), shapes.Thing("circle", "blue", "large", 64, 87)),
                     "white")
TIMES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
WIDTH = 824                                             # of every figure, six cells of a grid
INK, GREY, LINE, PALE, BLUE, ORANGE = "#222222", "#767676", "#a0a0a0", "#eaf0f8", "#2f62a8", "#c96a12"


def written(name, folder):
    print(folder / name, flush=True)
    return folder / name


@torch.inference_mode()
def journey(cascade, prompt, seed):
    """A picture on its way, with the default options: what the text tower says, then for Stage C and Stage B the noise
    and, after every step, the latent and the guess at the clean one."""
    def walk(name, shape, condition, steps, guidance):
        state = source[0].get_state()
        start = draw(source, shape, "cpu")
        source[0].set_state(state)                      # the walk draws the same noise again
        return start, list(sample(cascade.network(name), shape, condition, steps, guidance, source))

    text, source = cascade.read(prompt), generators(seed, 1)
    condition = {"clip_text": text.hidden, "clip_text_pooled": text.pooled}
    width, height = cascade.size(None, None)
    noise_c, c = walk("stage_c", (16, *(math.ceil(n / COMPRESSION) for n in (height, width))), condition, 20, 4.0)
    condition = {"clip_text_pooled": text.pooled[:1], "effnet": c[-1][0]}
    noise_b, b = walk("stage_b", (4, *(2 * math.ceil(n / 8) for n in (height, width))), condition, 10, 0.0)
    return text, (noise_c, c), (noise_b, b)


# ---- line drawings ---------------------------------------------------------------------------------------------------

class Drawing:
    """An SVG, made of boxes, words and arrows."""
    def __init__(self, height):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                      f'height="{height}" font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
                      f'<rect width="{WIDTH}" height="{height}" fill="white"/>']

    def words(self, x, y, text, size=12, colour=INK, weight="normal", anchor="middle"):
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
                          f'text-anchor="{anchor}">{escape(text)}</text>')

    def rectangle(self, x, y, width, height, fill=PALE, line=LINE, corner=0):
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner}" '
                          f'fill="{fill}" stroke="{line}"/>')

    def lines(self, x, y, lines):
        """Lines of words around a point: *bold*, ~a remark, [the small cascade's], or plain."""
        for i, line in enumerate(lines):
            size, grey = 13 if line[0] == "*" else 12, line[0] in "~["
            self.words(x, y + 4.5 + 16 * i - 8 * (len(lines) - 1), line.strip("*~"), size - grey, GREY if grey else INK,
                       "bold" if line[0] == "*" else "normal")

    def box(self, x, y, width, height, *lines):
        """A network, or a part of one; (x, y) is its centre."""
        self.rectangle(x - width / 2, y - height / 2, width, height)
        self.lines(x, y, lines)

    def data(self, x, y, width, *lines):
        """What flows between networks."""
        height = 10 + 16 * len(lines)
        self.rectangle(x - width / 2, y - height / 2, width, height, "white", corner=12)
        self.lines(x, y, lines)

    def arrow(self, *points, colour=INK, head=True):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        if head:
            (x0, y0), (x, y) = points[-2:]
            turn = math.degrees(math.atan2(y - y0, x - x0))
            self.parts.append(f'<path d="M0 0L-7 -3.5L-7 3.5Z" fill="{colour}" '
                              f'transform="translate({x:g} {y:g}) rotate({turn:g})"/>')

    def save(self, path):
        path.write_text("\n".join([*self.parts, "</svg>\n"]), encoding="utf-8")


def form(tensor):
    """(B, 16, 24, 24): a shape whose first number is that of the rows."""
    return f"(B, {', '.join(map(str, tensor.shape[1:]))})"


def size(network):
    count = sum(parameter.numel() for parameter in network.parameters())
    return f"{count / 1e9:.1f} B" if count > 5e8 else f"{count / 1e6:.{int(count < 1e7)}f} M"


def architecture(folder, cascade, run):
    """The official shapes come from runs on the meta device, the small ones from the run of the small cascade."""
    text, (_, c), (_, b) = run
    official = {name: operators.run(title)[0::2] for title, name in (
        ("Text tower", "text"), ("Stage C lite", "c"), ("Stage B lite", "b"), ("Stage A, decoding", "a"),
        ("Semantic encoder", "encoder"), ("Image tower", "image"), ("Previewer", "previewer"))}
    net, out = ({name: pair[i] for name, pair in official.items()} for i in (0, 1))
    full_c, full_b = on_meta("stage_c"), on_meta("stage_b")
    tiny = {name: cascade.network(name) for name in (
        "text_encoder", "stage_c", "stage_b", "stage_a", "effnet_encoder", "image_encoder", "previewer")}
    semantic, image = c[-1][0], b[-1][0]
    side = {"image": tiny["image_encoder"].config.side, "encoder": 32 * semantic.shape[-1]}
    look = tiny["previewer"](semantic)
    pixels, e, d = tiny["stage_a"].decode(image), tiny["image_encoder"].config.projection, out["text"].shape[-1]

    drawing, x, left, right = Drawing(806), 420, 136, 706
    drawing.data(x, 26, 220, "“a large red circle”")
    drawing.arrow((x, 39), (x, 62))
    drawing.box(x, 84, 220, 44, "*Tokenizer*", "text_encoder.Tokenizer")
    drawing.arrow((x, 106), (x, 122))
    drawing.data(x, 135, 220, f"ids, mask (B, {TextConfig().length}) [(B, {tiny['text_encoder'].config.length})]")
    drawing.arrow((x, 148), (x, 164))
    drawing.box(x, 194, 220, 60, "*Text tower*", "text_encoder.TextEncoder",
                f"~{size(net['text'])} [{size(tiny['text_encoder'])}]")
    for shift, name, shape, small in ((-76, "hidden", out["text"], text.hidden), (76, "pooled", (1, d), text.pooled)):
        shape = form(shape) if torch.is_tensor(shape) else f"(B, 1, {d})"
        drawing.arrow((x + shift, 224), (x + shift, 240))
        drawing.data(x + shift, 261, 144, f"{name} {shape}", f"[{form(small)}]")
        drawing.arrow((x + shift, 282), (x + shift, 298))
    drawing.box(x, 340, 296, 84, "*Stage C imagines*", "model.UNet, 20 steps of sampler.sample",
                f"~{size(full_c)}, lite {size(net['c'])} [{size(tiny['stage_c'])}]",
                "~from noise of the shape below")
    drawing.arrow((x, 382), (x, 400))
    drawing.data(x, 421, 240, f"semantic latent {form(out['c'])}", f"[{form(semantic)}]")
    drawing.arrow((x, 442), (x, 460))
    drawing.box(x, 502, 296, 84, "*Stage B paints*", "model.UNet, 10 steps of sampler.sample",
                f"~{size(full_b)}, lite {size(net['b'])} [{size(tiny['stage_b'])}]",
                "~from noise of the shape below")
    drawing.arrow((x, 544), (x, 562))
    drawing.data(x, 583, 240, f"image latent {form(out['b'])}", f"[{form(image)}]")
    drawing.arrow((x, 604), (x, 622))
    drawing.box(x, 652, 220, 60, "*Stage A develops*", "model.StageA.decode",
                f"~{size(net['a'])} [{size(tiny['stage_a'])}]")
    drawing.arrow((x, 682), (x, 700))
    drawing.data(x, 721, 240, f"pixels {form(out['a'])}", f"[{form(pixels)}]")

    # pooled goes to Stage B too, round the previewer
    drawing.arrow((x + 148, 261), (816, 261), (816, 502), (x + 149, 502))
    drawing.words(right, 252, "pooled alone goes to Stage B too", 11, GREY)
    drawing.arrow((x + 120, 421), (right - 92, 421))
    drawing.box(right, 421, 184, 84, "*Previewer*", "model.Previewer",
                f"~{size(net['previewer'])} [{size(tiny['previewer'])}]")
    drawing.arrow((right, 379), (right, 351))
    drawing.data(right, 330, 184, f"pixels {form(out['previewer'])}", f"[{form(look)}]")

    # the ways in from pictures
    drawing.data(left, 194, 220, "a picture, where one is given")
    drawing.arrow((left, 207), (left, 298))
    for y, line in ((240, "224 × 224 pixels"), (256, f"[{side['image']} × {side['image']}]")):
        drawing.words(left + 8, y, line, 11, GREY, anchor="start")
    drawing.box(left, 340, 220, 84, "*Image tower*", "text_encoder.ImageEncoder",
                f"~{size(net['image'])} [{size(tiny['image_encoder'])}]",
                f"gives (B, {out['image'].shape[1]}) [(B, {e})]")
    drawing.arrow((left + 110, 340), (x - 149, 340))
    drawing.arrow((left - 110, 194), (12, 194), (12, 452), (left - 111, 452))
    drawing.words(left, 400, f"768 × 768 pixels [{side['encoder']} × {side['encoder']}]", 11, GREY)
    drawing.box(left, 452, 220, 84, "*Semantic encoder*", "model.SemanticEncoder",
                f"~{size(net['encoder'])} [{size(tiny['effnet_encoder'])}]", f"gives {form(out['encoder'])}")
    drawing.arrow((left + 110, 421), (x - 121, 421))
    for y, line in ((764, "Blue: the parts, their file and class, and their parameters. White: what flows between "
                          "them, for pictures of 1024 × 1024."),
                    (780, "In brackets: the small cascade, weights/tiny, at 128 × 128. B counts rows: one per picture, "
                          "two with guidance.")):
        drawing.words(WIDTH / 2, y, line, 11, GREY)
    drawing.save(written("architecture.svg", folder))


def why_cascade(folder):
    """The grids' positions to one scale, and the FLOPs of the lite pair as tests/OPERATORS.md counts them."""
    grids = [(name, side, numbers, side * side * numbers) for name, side, numbers in (
        ("pixels", 1024, 3), ("image latent", 256, 4), ("semantic latent", 24, 16))]
    drawing, x, floor, most = Drawing(410), 20, 330, grids[0][3]
    drawing.words(x, 20, "The grids, to one scale", 13, weight="bold", anchor="start")
    for name, side, numbers, all_numbers in grids:
        wide = 300 * side / 1024
        drawing.rectangle(x, floor - wide, wide, wide, BLUE if side == 24 else PALE, BLUE)
        drawing.words(x + wide / 2, floor + 20, name, 13, weight="bold")
        drawing.words(x + wide / 2, floor + 37, f"{side} × {side} × {numbers} = {all_numbers:,}")
        if all_numbers < most:
            drawing.words(x + wide / 2, floor + 53, f"{most / all_numbers:.0f} times fewer numbers", 11, GREY)
            drawing.words(x + wide / 2, floor + 68, f"{1024 / side:.3g} times fewer on each side", 11, GREY)
        x += wide + 150

    titles = ("Text tower", "Stage C lite", "Stage B lite", "Stage A, decoding")
    runs = {title: operators.run(title) for title in titles}
    spent = {title: operators.STAGES[title][3] * flops(runs[title][1]) for title in titles}
    drawing.words(400, 20, f"TFLOP for one picture, lite pair: {sum(spent.values()):.1f}", 13, weight="bold",
                  anchor="start")
    for i, (title, value) in enumerate(spent.items()):
        y, calls = 36 + 20 * i, operators.STAGES[title][3]
        steps = f", {calls} steps" if calls > 1 else ""
        drawing.words(532, y + 11, f"{title.split(',')[0]}{steps}", anchor="end")
        drawing.rectangle(540, y, max(1, 5 * value), 14, BLUE, BLUE)
        drawing.words(546 + 5 * value, y + 11, f"{value:.1f}", anchor="start")
    given = {key: torch.empty(shape, dtype=operators.TYPES.get(key, operators.BF16), device="meta")
             for key, shape in (operators.FOR_C | {"x": (2, 16, 256, 256)}).items()}
    with torch.inference_mode(), operators.Record() as record:
        runs["Stage C lite"][0](**given)
    there = operators.STAGES["Stage C lite"][3] * flops(record)
    for y, line in ((136, "The same Stage C on the image latent's 256 × 256 positions"),
                    (152, f"would take {there:,.0f} TFLOP, {there / spent['Stage C lite']:.0f} times as many.")):
        drawing.words(400, y, line, anchor="start")
    drawing.save(written("why_cascade.svg", folder))


def flops(record):
    """TFLOP of what ran within it."""
    return sum(row.flops for row in record.rows.values()) / 1e12


def groups(level):
    """A level's string of block kinds as (the group that repeats, how often)."""
    unit = next(level[:n] for n in range(1, len(level) + 1) if level[:n] * (len(level) // n) == level)
    return unit, len(level) // len(unit)


def unet_panel(drawing, left, title, config, side, small, small_side, inputs):
    """The U: levels down on the left, up on the right. side: of the latent that goes in, in numbers."""
    def level(config, side, i, way):
        """What a level does, and on which grid; nothing where the config has no such level."""
        if i >= len(config.widths):
            return "", ""
        kinds, repeat = ((config.down[i], config.down_repeat[i]) if way == "down" else
                         (config.up[-1 - i], config.up_repeat[-1 - i]))
        y = side // config.patch >> (i if config.switch is None else sum(config.switch[:i]))
        unit, count = groups(kinds)
        return f"{unit} × {count}" + (f", {repeat} times" if repeat > 1 else ""), f"{y} × {y} × {config.widths[i]}"

    x, depth = {"down": left + 98, "up": left + 302}, len(config.widths)
    patch = f"patches {config.patch} × {config.patch}, " if config.patch > 1 else ""
    drawing.words(left + 200, 20, title, 14, weight="bold")
    for way, what in (("down", "latent"), ("up", "epsilon")):
        drawing.data(x[way], 48, 166, f"{what} {config.latent} × {side} × {side}")
    drawing.box(x["down"], 98, 166, 44, "embedding", f"~{patch}linear, norm")
    drawing.box(x["up"], 98, 166, 44, "clf", f"~norm, linear{patch and ', patches'}")
    drawing.arrow((x["down"], 61), (x["down"], 76))
    drawing.arrow((x["up"], 76), (x["up"], 61))
    for i in range(depth):
        middle, change = 165 + 82 * i, "linear" if config.switch is not None else "conv 2 × 2"
        above = middle - 29 - (24 if i else 16)                                         # where the box above ends
        for way in x:
            (blocks, grid_), (said, small_grid) = level(config, side, i, way), level(small, small_side, i, way)
            drawing.box(x[way], middle, 166, 58, f"*{blocks}*", grid_, f"[{said}: {small_grid}]" if said else "[none]")
            if i:
                drawing.words(x[way] + 8, middle - 37, change, 11, GREY, anchor="start")
        drawing.arrow((x["down"], above), (x["down"], middle - 29))
        drawing.arrow((x["up"], middle - 29), (x["up"], above))
        drawing.arrow((x["down"] + 83, middle), (x["up"] - 83, middle), colour=BLUE if i < depth - 1 else INK)
        if i < depth - 1:
            drawing.words(left + 200, middle - 5, "skip", 11, BLUE)
    for i, line in enumerate(inputs):
        drawing.data(left + 200, 165 + 82 * depth + 32 * i - 18, 380, line)


def chain(drawing, y, title, why, start, parts):
    """One kind of block: what goes in passes through the parts in turn, and x is added to what comes out."""
    drawing.words(14, y - 32, title, 13, weight="bold", anchor="start")
    drawing.words(152, y - 32, why, 11, GREY, anchor="start")
    drawing.words(20, y + 4, start, 13)
    gap, x = 16, 28
    scale = (WIDTH - 70 - gap * (len(parts) + 1)) / sum(width for width, _ in parts)
    for width, lines in parts:
        width *= scale
        drawing.arrow((x, y), (x + gap, y))
        drawing.box(x + gap + width / 2, y, width, 40, *lines)
        x += gap + width
    drawing.arrow((x, y), (x + gap, y))
    drawing.words(x + gap + 14, y + 4, "+ x", 13)


def unet(folder, cascade):
    def inputs(config, tokens, rows):
        return [f"time {', '.join(('r', *config.extras))} (B, {HEAD_WIDTH * (1 + len(config.extras))}), to every T",
                f"{tokens} (B, {rows}, {config.c_cond}), to every A"]

    drawing, c, b = Drawing(804), UNETS["stage_c_lite"], UNETS["stage_b_lite"]
    text, clip = TextConfig().length, CLIP_TOKENS
    unet_panel(drawing, 6, "Stage C lite", c, 24, cascade.network("stage_c").config,
               math.ceil(cascade.size(None, None)[0] / COMPRESSION),
               inputs(c, "text, pooled, n pictures", f"{text} + {clip} + {clip}n"))
    unet_panel(drawing, 418, "Stage B lite", b, 256, cascade.network("stage_b").config,
               2 * math.ceil(cascade.size(None, None)[0] / 8),
               [*inputs(b, "pooled", clip), f"semantic latent {b.semantic} × 24 × 24, added after embedding"])
    notes = ["In brackets: the small cascade.", "The skip goes to the first R of its level, in every repeat."]
    for name, title in (("stage_c", "Stage C"), ("stage_b", "Stage B")):
        levels = zip(UNETS[name].widths, map(groups, UNETS[name].down))
        full = f"Full {title}: " + ", ".join(f"{unit} × {count} at {wide}" for wide, (unit, count) in levels)
        notes += textwrap.wrap(full, 52)
    for i, line in enumerate(notes):
        drawing.words(16, 400 + 17 * i, line, 11, GREY, anchor="start")

    drawing.arrow((14, 568), (810, 568), colour=LINE, head=False)
    chain(drawing, 622, "R  ResidualBlock", "looks at the neighbours, then at all channels of each position", "x", [
        (96, ["depthwise", "conv 3 × 3"]), (50, ["norm"]), (110, ["join the skip", "~going up, once"]),
        (70, ["linear", "C to 4C"]), (50, ["GELU"]), (92, ["GlobalRe-", "sponseNorm"]), (70, ["linear", "4C to C"])])
    chain(drawing, 700, "T  TimestepBlock", "scales and shifts every channel by the time", "t", [
        (250, ["linear, 64 to 2C, for each kind of time", "summed: scale and shift, C numbers each"]),
        (120, ["x · scale + shift"])])
    chain(drawing, 778, "A  AttentionBlock", "every position looks at all positions and at the condition", "x", [
        (50, ["norm"]), (170, ["query, key and value", "of every position"]),
        (220, ["key and value of the condition's", "tokens (SiLU, linear) beside them"]),
        (90, ["attention,", f"heads of {HEAD_WIDTH}"]), (60, ["linear"])])
    drawing.save(written("unet.svg", folder))


# ---- pictures --------------------------------------------------------------------------------------------------------

def colours(values, most):
    """Numbers as colours, (...) -> (..., 3): white is 0, blue is -most, orange is most."""
    share = np.clip(np.asarray(values, np.float32) / most, -1, 1)[..., None]
    ends = [np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255 for colour in (BLUE, ORANGE)]
    return 1 - np.maximum(-share, 0) * (1 - ends[0]) - np.maximum(share, 0) * (1 - ends[1])


def maps(latent, most=3):
    """A latent (1, C, y, x) as its C maps side by side, C a square: (CELL, CELL, 3)."""
    across = math.isqrt(latent.shape[1])
    step = CELL // across
    zoom = step // latent.shape[-1]
    canvas = np.full((CELL, CELL, 3), 0.8, np.float32)
    for i, values in enumerate(latent[0]):
        drawn = np.kron(colours(values, most), np.ones((zoom, zoom, 1)))[:step - 1, :step - 1]
        y, x = (step * n + (step - len(drawn)) // 2 for n in divmod(i, across))
        canvas[y:y + len(drawn), x:x + len(drawn)] = drawn
    return canvas


def show(pixels):
    return pixels[0].permute(1, 2, 0).numpy()                                           # (H, W, 3)


def save(name, folder, *parts):
    """Pictures of pillow's, one above the other."""
    canvas, y = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white"), 0
    for part in parts:
        canvas.paste(part, (0, y))
        y += part.height
    canvas.quantize(256, dither=Image.Dither.NONE).save(written(name, folder), optimize=True)


def curve():
    """alpha_bar over t as a picture; drawn large and made small, so that its lines are smooth."""
    zoom, height, left, right, top, bottom = 3, 230, 44, 806, 14, 190
    canvas = Image.new("RGB", (zoom * WIDTH, zoom * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11 * zoom)

    def place(t, value):
        return zoom * (left + (right - left) * t), zoom * (bottom - (bottom - top) * value)

    for value in (0, 0.5, 1):
        draw.line([place(0, value), place(1, value)], "#dddddd", zoom)
        draw.text(place(-0.012, value), f"{value:g}", INK, font, anchor="rm")
    for t in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(t, 0)
        draw.text((x, y + 8 * zoom), f"{t:g}", INK, font, anchor="mt")
    draw.text((place(0.5, 0)[0], zoom * (bottom + 24)), "t: the sampler walks from 1, noise, to 0, the latent; "
              "the dots are where Stage C's 20 steps begin and end", INK, font, anchor="mt")
    t = torch.linspace(0, 1, 400)
    a = alpha_bar(t)
    for values, colour, wide in ((a.sqrt(), BLUE, 1), ((1 - a).sqrt(), ORANGE, 1), (a, INK, 2)):
        draw.line([place(*pair) for pair in zip(t.tolist(), values.tolist())], colour, wide * zoom, "curve")
    for when, value in zip(timesteps(20).tolist(), alpha_bar(timesteps(20)).tolist()):
        x, y = place(when, value)
        draw.ellipse((x - 3.5 * zoom, y - 3.5 * zoom, x + 3.5 * zoom, y + 3.5 * zoom), INK)
    for when, value, words, colour in ((0.36, 0.93, "sqrt(a): how much of the latent is in x", BLUE),
                                       (0.75, 0.8, "sqrt(1 - a): how much noise", ORANGE),
                                       (0.2, 0.72, "a = alpha_bar(t)", INK)):
        draw.text(place(when, value), words, colour, font, anchor="lm")
    return canvas.resize((WIDTH, height), Image.Resampling.LANCZOS)


def schedule(folder, cascade):
    """One true picture: its image latent noised and seen through Stage A, its semantic latent through the previewer."""
    picture, stage_a = shapes.render(SCENE), cascade.network("stage_a")
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    rows = []
    semantic = cascade.encode(Image.fromarray(picture))
    for words, latent, see in (("image latent", stage_a.encode(pixels), stage_a.decode),
                               ("semantic latent", semantic, cascade.network("previewer"))):
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
        row = []
        for t in TIMES:
            a = alpha_bar(torch.tensor(t))
            x = a.sqrt() * latent + (1 - a).sqrt() * noise
            row.append((show(see(x)), f"t = {t:g}, a = {a:.{4 if min(a, 1 - a) < 0.005 else 2}f}; {words}"))
        rows.append(row)
    save("schedule.png", folder, curve(), grid(rows))


def read(folder, cascade, run):
    """The tokens, and below every row of `hidden` as a column of colours."""
    tower, text = cascade.network("text_encoder"), run[0]
    tokenizer = Tokenizer(cascade.folder / "tokenizer", tower.config.length)
    ids, mask = (row[0].tolist() for row in tokenizer(PROMPT))
    used = sum(mask)
    tokens = [tokenizer.bpe.id_to_token(number).removesuffix("</w>") for number in ids]
    shown = [(word.replace("<|", "").replace("|>", "").replace("oftext", ""), str(number))
             for word, number in zip(tokens[:used], ids)]
    shown += [("the same", f"{ids[-1]},  {len(ids) - used}  times")]
    hidden, pooled = text.hidden[0], text.pooled[0]                                     # (L, D), (1, D)
    zoom = 772 // len(ids)                                                              # a column's width
    left = (WIDTH - zoom * len(ids)) // 2
    canvas = Image.new("RGB", (WIDTH, 72 + 2 * hidden.shape[1] + 78), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(12), ImageFont.load_default(11)
    wide = (zoom * len(ids) - 40) // len(shown)
    x = left
    for i, (word, number) in enumerate(shown):
        end = x + (wide if i < used else left + zoom * len(ids) - x)
        draw.rectangle((x, 6, end - 4, 44), "white" if i < used else "#f0f0f0", LINE)
        draw.text(((x + end - 4) / 2, 17), word, INK, font, anchor="mm")
        draw.text(((x + end - 4) / 2, 34), number, GREY, small, anchor="mm")
        x = end
    y, most = 66, float(hidden.abs().quantile(0.99))
    draw.text((left, y - 15), f"hidden: {len(ids)} columns, one per token, of {hidden.shape[1]} numbers; blue is "
              f"below 0, orange above, full colour at {most:.1f}", INK, font)
    drawn = (colours(hidden.T, most) * 255).round().astype(np.uint8)                    # (D, L, 3)
    drawn = Image.fromarray(drawn).resize((zoom * len(ids), 2 * hidden.shape[1]), Image.Resampling.NEAREST)
    canvas.paste(drawn, (left, y))
    bottom = y + drawn.height
    draw.rectangle((left - 1, y - 1, left + drawn.width, bottom), outline="#cccccc")
    cut = left + zoom * used
    draw.line((cut, y, cut, bottom + 8), INK)
    draw.text((left + zoom * used / 2, bottom + 5), "start to end", INK, font, anchor="mt")
    draw.text((cut + 8, bottom + 5), f"{len(ids) - used} pads: the same token, at other places; Stage C sees them too",
              INK, font)
    most = float(pooled.abs().max())
    drawn = (colours(pooled, most) * 255).round().astype(np.uint8)                      # (1, D, 3)
    canvas.paste(Image.fromarray(drawn).resize((zoom * len(ids), 16), Image.Resampling.NEAREST), (left, bottom + 44))
    draw.text((left, bottom + 28), f"pooled: {pooled.shape[1]} numbers for the whole prompt, full colour at {most:.1f}",
              INK, font)
    draw.rectangle((left - 1, bottom + 43, left + zoom * len(ids), bottom + 60), outline="#cccccc")
    save("read.png", folder, canvas)


def way(walked, chosen, see, names):
    """Rows of a grid: x before the chosen steps and at the end, what the network takes for x0 in it, and that seen."""
    start, walk = walked
    times, rows = timesteps(len(walk)), [[], [], []]
    for step in chosen:
        x, guess = start if step == 1 else walk[step - 2][0], walk[step - 1][1]
        rows[0].append((maps(x), f"t = {times[step - 1]:.2f}: " + ("noise" if step == 1 else f"step {step}'s x")))
        rows[1].append((maps(guess), f"step {step}'s guess"))
        rows[2].append((show(see(guess)), f"the guess, seen by {names[0]}"))
    x, guess = walk[-1]
    rows[0].append((maps(x), f"t = 0: {names[1]}"))
    rows[1].append((maps(guess), f"step {len(walk)}'s guess"))
    rows[2].append((show(see(x)), names[2]))
    return rows


def imagine(folder, cascade, run):
    rows = way(run[1], (1, 4, 8, 12, 16), cascade.network("previewer"),
               ("the previewer", "semantic latent", "the semantic latent, seen by the previewer"))
    save("imagine.png", folder, grid(rows))


def paint(folder, cascade, run):
    rows = way(run[2], (1, 3, 5, 7, 9), cascade.network("stage_a").decode,
               ("Stage A", "image latent", "Stage A: the picture"))
    save("paint.png", folder, grid(rows))


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GALLERY, help="the folder (default: weights/gallery)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    cascade = Cascade(keep=True)
    run = journey(cascade, PROMPT, SEED)
    architecture(folder, cascade, run)
    why_cascade(folder)
    schedule(folder, cascade)
    unet(folder, cascade)
    read(folder, cascade, run)
    imagine(folder, cascade, run)
    paint(folder, cascade, run)


if __name__ == "__main__":
    main()
