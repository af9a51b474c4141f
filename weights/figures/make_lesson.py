"""Draws the figures of LESSON.md and the hero of README.md into weights/figures/. Shapes, parameters and operations are
read off the networks; the images come from one run of the tiny cascade.

    python weights/figures/make_lesson.py                   all of them
    python weights/figures/make_lesson.py --out FOLDER      into another folder

    hero.png            one run: prompt, tokens, noise, Stage C's prediction, image latent, image
    architecture.svg    the whole system: every network, and what flows between them
    schedule.svg        alpha_bar over time
    noise.png           an image latent, noised to six times
    compression.svg     the three grids to scale, and what each stage costs
    read.png            the run's tokens and text embeddings
    imagine.png         its way through Stage C
    unet.svg            Stage C and Stage B inside, and their three kinds of block
    paint.png           its way through Stage B, to the image
"""
import argparse
from pathlib import Path

import torch
from drawing import (
    BLUE, CELL, FONT, GAP, GREY, HERE, INK, LEADING, LINE, ORANGE, PALE, Drawing, as_image,
    channel_maps, colours, paste, save, sheet, write_text)
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

import shapes
from cascade import Cascade
from exercises import PROMPT, SEED
from model import CLIP_TOKENS, TIME_DIM
from official import OFFICIAL, official
from sampler import add_noise, alpha_bar, draw_noise, generators, sample, timesteps
from text_encoder import Tokenizer

SCENE = shapes.Scene(                                   # a true image, for the figure about noise
    (shapes.Object("star", "yellow", "small", 64, 33), shapes.Object("circle", "blue", "large", 64, 87)), "white")


class Run:
    """One image on its way, with the default options: Stage C's and Stage B's noise, and after every step the latent and
    the predicted x0."""

    def __init__(self, cascade):
        self.cascade = cascade
        self.text = cascade.encode_prompt(PROMPT)
        generator = generators(SEED, 1)
        side = shapes.SIDE
        condition = {"clip_text": self.text.hidden, "clip_text_pooled": self.text.pooled}
        self.noise_c, self.steps_c = self.walk("stage_c", (16, side // 42, side // 42), condition, 20, 4.0, generator)
        self.semantic = self.steps_c[-1][0]             # (1, 16, 3, 3)
        condition = {"clip_text_pooled": self.text.pooled[:1], "effnet": self.semantic}
        self.noise_b, self.steps_b = self.walk("stage_b", (4, side // 4, side // 4), condition, 10, 0.0, generator)
        self.latent = self.steps_b[-1][0]               # (1, 4, 32, 32)
        assert torch.equal(self.latent, cascade(PROMPT, seed=SEED, output="latent")), "not the command's image"
        self.pixels = cascade.network("stage_a").decode(self.latent)    # (1, 3, 128, 128)

    def walk(self, name, shape, condition, steps, guidance, generator):
        state = generator[0].get_state()
        noise = draw_noise(generator, shape, "cpu")
        generator[0].set_state(state)                   # sample draws the same noise again
        return noise, list(sample(self.cascade.network(name), shape, condition, steps, guidance, generator))

    def tokens(self):
        """The words and ids of the prompt's tokens from start to end, and the number of padding tokens."""
        config = self.cascade.network("text_encoder").config
        tokenizer = Tokenizer(self.cascade.folder / "tokenizer", config.length)
        ids, mask = (row[0] for row in tokenizer(PROMPT))
        used = int(mask.sum())
        names = [tokenizer.bpe.id_to_token(token).removesuffix("</w>") for token in ids[:used].tolist()]
        words = ["start", *names[1:-1], "end"]
        return words, ids[:used].tolist(), len(ids) - used


def shape(tensor):
    return f"(B, {', '.join(map(str, tensor.shape[1:]))})"


def parameters(network):
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > 5e8:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:.0f} M" if count > 1e7 else f"{count / 1e6:.1f} M"


# ---- line drawings ---------------------------------------------------------------------------------------------------

def column(drawing, x, y, items):
    """Boxes and data from y downwards, each (width, *lines) and joined by arrows -> the y of their centres. What begins
    with a bold line is a network."""
    centres = []
    for width, *lines in items:
        height = 12 + 16 * len(lines)
        if centres:
            drawing.arrow((x, y - 18), (x, y))
        network = lines[0][0] == "*"
        fill, corner = (PALE, 0) if network else ("white", 12)
        drawing.box(x, y + height / 2, width, height, *lines, fill=fill, corner=corner)
        centres.append(y + height / 2)
        y += height + 18
    return centres


def architecture(path, run):
    """Official shapes, and the tiny cascade's in brackets."""
    size = {}
    for name, network in OFFICIAL.items():
        if not name.endswith("lite"):
            lite = f", lite {parameters(official(name + '_lite'))}" if f"{name}_lite" in OFFICIAL else ""
            size[name] = f"{parameters(official(name))}{lite} [{parameters(run.cascade.network(name))}]"
    preview = run.cascade.network("previewer")(run.semantic)
    drawing, x, left, right = Drawing(786), 424, 138, 706
    start = "from noise of the shape below"
    y = column(drawing, x, 14, [
        (230, "“a large red circle”"),
        (230, "*Tokenizer*", "text_encoder.Tokenizer"),
        (230, f"ids, mask (B, 77) [(B, {run.text.hidden.shape[1]})]"),
        (230, "*Read: text encoder*", "text_encoder.TextEncoder", size["text_encoder"]),
        (290, f"hidden (B, 77, 1280) [{shape(run.text.hidden)}]", f"pooled (B, 1, 1280) [{shape(run.text.pooled)}]"),
        (290, "*Imagine: Stage C*", "model.UNet, 20 steps of sampler.sample", size["stage_c"], start),
        (250, "semantic latent (B, 16, 24, 24)", f"[{shape(run.semantic)}]"),
        (290, "*Paint: Stage B*", "model.UNet, 10 steps of sampler.sample", size["stage_b"], start),
        (250, "image latent (B, 4, 256, 256)", f"[{shape(run.latent)}]"),
        (230, "*Develop: Stage A*", "model.StageA.decode", size["stage_a"]),
        (250, "pixels (B, 3, 1024, 1024)", f"[{shape(run.pixels)}]")])
    drawing.arrow((x + 145, y[4]), (814, y[4]), (814, y[7]), (x + 145, y[7]))
    drawing.text(right - 8, y[4] - 8, "pooled also goes to Stage B", 12, GREY)
    drawing.arrow((x + 125, y[6]), (right - 92, y[6]))
    drawing.box(right, y[6], 184, 60, "*Previewer*", "model.Previewer", size["previewer"])
    drawing.arrow((right, y[6] - 30), (right, y[6] - 50))
    drawing.data(right, y[6] - 71, 184, "pixels (B, 3, 192, 192)", f"[{shape(preview)}]")
    drawing.data(left, y[3], 236, "optional: an image")
    drawing.arrow((left, y[3] + 13), (left, y[5] - 38))
    drawing.box(left, y[5], 236, 76, "*Image encoder*", "text_encoder.ImageEncoder", size["image_encoder"],
                "224 × 224 pixels to (B, 768)")
    drawing.arrow((left + 118, y[5]), (x - 145, y[5]))
    drawing.arrow((left - 118, y[3]), (8, y[3]), (8, y[6] + 20), (left - 118, y[6] + 20))
    drawing.box(left, y[6] + 20, 236, 76, "*Semantic encoder*", "model.SemanticEncoder", size["effnet_encoder"],
                "768 × 768 pixels to (B, 16, 24, 24)")
    drawing.arrow((left + 118, y[6]), (x - 125, y[6]))
    drawing.text(412, y[-1] + 44, "Blue: the networks, their classes and parameters. White: what flows between them, for "
                 "an image of 1024 × 1024.", 12, GREY)
    drawing.text(412, y[-1] + 62, "In brackets: the tiny cascade at 128 × 128. B counts rows: one per image, two with "
                 "guidance.", 12, GREY)
    drawing.save(path)


def schedule(path):
    drawing, left, right, top, bottom = Drawing(290), 44, 806, 20, 216

    def place(t, value):
        return left + (right - left) * t, bottom - (bottom - top) * value

    for value in (0, 0.5, 1):
        drawing.line([place(0, value), place(1, value)], "#dddddd")
        drawing.text(left - 8, place(0, value)[1] + 4, f"{value:g}", anchor="end")
    for t in (0, 0.25, 0.5, 0.75, 1):
        drawing.text(place(t, 0)[0], bottom + 22, f"{t:g}")
    t = torch.linspace(0, 1, 200)
    a = alpha_bar(t)
    for values, colour, width in ((a.sqrt(), BLUE, 1.5), ((1 - a).sqrt(), ORANGE, 1.5), (a, INK, 2)):
        drawing.line([place(*pair) for pair in zip(t.tolist(), values.tolist())], colour, width)
    for pair in zip(timesteps(20).tolist(), alpha_bar(timesteps(20)).tolist()):
        drawing.dot(*place(*pair))
    for t, value, text, colour in ((0.36, 0.93, "√a, the weight of x0", BLUE), (0.17, 0.7, "a = alpha_bar(t)", INK),
                                   (0.68, 0.77, "√(1 − a), the weight of the noise", ORANGE)):
        x, y = place(t, value)
        drawing.text(x, y, text, 13, colour, anchor="start")
    drawing.text(412, bottom + 46, "time t: 0 is no noise, 1 is only noise", 13)
    drawing.text(412, bottom + 64, "The dots are the 21 times of Stage C’s 20 steps, from right to left.", 12, GREY)
    drawing.save(path)


def tflop(network, method="forward", **inputs):
    """Operations of one call, in units of 10^12; a multiplication and its addition are two."""
    types = {"ids": torch.long, "mask": torch.long}
    inputs = {name: torch.empty(size, dtype=types.get(name), device="meta") for name, size in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        getattr(network, method)(**inputs)
    return counter.get_total_flops() / 1e12


def compression(path):
    """The grids, to one scale; and the operations of the official lite pair."""
    grids = [(name, side, channels, side * side * channels) for name, side, channels in (
        ("pixels", 1024, 3), ("image latent", 256, 4), ("semantic latent", 24, 16))]
    drawing, floor = Drawing(490), 262
    for x, (name, side, channels, numbers) in zip((140, 420, 684), grids):
        width = 240 * side / 1024
        drawing.rectangle(x - width / 2, floor - width, width, width, BLUE if side == 24 else PALE, BLUE)
        drawing.text(x, floor + 22, name, 14, weight="bold")
        drawing.text(x, floor + 42, f"{side} × {side} × {channels} = {numbers:,} numbers", 13)
        if side < 1024:
            drawing.text(x, floor + 62, f"{1024 / side:.3g} times smaller on each side", 12, GREY)
            drawing.text(x, floor + 79, f"{grids[0][3] / numbers:.0f} times fewer numbers", 12, GREY)

    stage_c = official("stage_c_lite")
    for_c = {"r": (2,), "clip_text_pooled": (2, 1, 1280), "clip_text": (2, 77, 1280)}
    for_b = {"x": (1, 4, 256, 256), "r": (1,), "clip_text_pooled": (1, 1, 1280), "effnet": (1, 16, 24, 24)}
    spent = {
        "text encoder, 2 prompts": tflop(official("text_encoder"), ids=(2, 77), mask=(2, 77)),
        "Stage C lite, 20 steps": 20 * tflop(stage_c, x=(2, 16, 24, 24), **for_c),
        "Stage B lite, 10 steps": 10 * tflop(official("stage_b_lite"), **for_b),
        "Stage A": tflop(official("stage_a"), "decode", z=(1, 4, 256, 256))}
    drawing.text(20, 380, f"Operations for one image of 1024 × 1024: {sum(spent.values()):.0f} TFLOP", 14, weight="bold",
                 anchor="start")
    for i, (title, value) in enumerate(spent.items()):
        y = 394 + 22 * i
        drawing.text(180, y + 12, title, 13, anchor="end")
        drawing.rectangle(190, y, max(1, 4 * value), 15, BLUE, BLUE)
        drawing.text(198 + 4 * value, y + 12, f"{value:.1f}", 13, anchor="start")
    there = 20 * tflop(stage_c, x=(2, 16, 256, 256), **for_c)
    for i, line in enumerate(("On the image latent’s 256 × 256 positions,", f"Stage C lite would take {there:,.0f} TFLOP,",
                              f"{there / spent['Stage C lite, 20 steps']:.0f} times as many.")):
        drawing.text(480, 410 + 20 * i, line, 13, anchor="start")
    drawing.save(path)


def groups(level):
    """A level's string of block letters as (the group that repeats, how often)."""
    unit = next(level[:n] for n in range(1, len(level) + 1) if level[:n] * (len(level) // n) == level)
    return unit, len(level) // len(unit)


def level_text(config, side, i, up):
    """The blocks of level i, and its grid; None if the config has no such level."""
    if i >= len(config.widths):
        return None
    letters = config.up[-1 - i] if up else config.down[i]
    repeat = config.up_repeat[-1 - i] if up else config.down_repeat[i]
    side = side // config.patch_size // (2 ** i if config.is_stage_b else 1)
    unit, count = groups(letters)
    repeated = f", run {repeat} times" if repeat > 1 else ""
    return f"{unit} × {count}{repeated}", f"{side} × {side} × {config.widths[i]}"


def unet_panel(drawing, left, title, config, side, tiny, tiny_side, inputs):
    """The U: down on the left, up on the right."""
    columns = ((left + 98, False), (left + 302, True))
    (x_down, _), (x_up, _) = columns
    patches = f"patches of {config.patch_size} × {config.patch_size}, " if config.patch_size > 1 else ""
    drawing.text(left + 200, 20, title, 14, weight="bold")
    drawing.data(x_down, 48, 176, f"x {config.latent_channels} × {side} × {side}")
    drawing.data(x_up, 48, 176, f"eps {config.latent_channels} × {side} × {side}")
    drawing.box(x_down, 98, 176, 44, "*embedding*", f"{patches}1×1 conv")
    drawing.box(x_up, 98, 176, 44, "*clf*", f"norm, 1×1 conv{patches and ', patches'}")
    drawing.arrow((x_down, 61), (x_down, 76))
    drawing.arrow((x_up, 76), (x_up, 61))
    change = "conv 2 × 2" if config.is_stage_b else "1×1 conv"
    depth = len(config.widths)
    for i in range(depth):
        middle = 165 + 82 * i
        above = middle - 29 - (24 if i else 16)         # where the box above ends
        for x, up in columns:
            blocks, grid = level_text(config, side, i, up)
            small = level_text(tiny, tiny_side, i, up)
            tiny_text = f"[{small[0]}: {small[1]}]" if small else "[no such level]"
            drawing.box(x, middle, 176, 58, f"*{blocks}*", grid, tiny_text)
            if i:
                drawing.text(x + 8, middle - 37, change, 12, GREY, anchor="start")
        drawing.arrow((x_down, above), (x_down, middle - 29))
        drawing.arrow((x_up, middle - 29), (x_up, above))
        deepest = i == depth - 1
        drawing.arrow((x_down + 88, middle), (x_up - 88, middle), colour=INK if deepest else BLUE)
        if not deepest:
            drawing.text(left + 200, middle - 7, "skip", 12, BLUE)
    for i, line in enumerate(inputs):
        drawing.data(left + 200, 165 + 82 * depth + 32 * i - 18, 388, line)


def block_row(drawing, y, title, purpose, start, end, parts):
    """One kind of block: what goes in passes through the parts in turn."""
    drawing.text(14, y - 34, title, 13, weight="bold", anchor="start")
    drawing.text(150, y - 34, purpose, 12, GREY, anchor="start")
    drawing.text(14, y + 4, start, 13, anchor="start")
    gap, x = 16, 26 if start == "x" else 56
    scale = (824 - 44 - x - gap * (len(parts) + 1)) / sum(width for width, _ in parts)
    for width, lines in parts:
        width *= scale
        drawing.arrow((x, y), (x + gap, y))
        drawing.box(x + gap + width / 2, y, width, 42, *lines)
        x += gap + width
    drawing.arrow((x, y), (x + gap, y))
    drawing.text(x + gap + 16, y + 4, end, 13)


def unet(path, run):
    def inputs(config, tokens, count):
        times = ", ".join(("r", *config.time_conditions))
        return [f"times {times} (B, {TIME_DIM * (1 + len(config.time_conditions))}), to every T",
                f"{tokens}: (B, {count}, {config.c_cond}), to every A"]

    drawing, c, b = Drawing(824), OFFICIAL["stage_c_lite"][1], OFFICIAL["stage_b_lite"][1]
    tiny = {name: run.cascade.network(name).config for name in ("stage_c", "stage_b")}
    unet_panel(drawing, 6, "Stage C lite", c, 24, tiny["stage_c"], run.semantic.shape[-1],
               inputs(c, "hidden, pooled, R images", f"77 + {CLIP_TOKENS} + {CLIP_TOKENS}R"))
    unet_panel(drawing, 418, "Stage B lite", b, 256, tiny["stage_b"], run.latent.shape[-1],
               [*inputs(b, "pooled", CLIP_TOKENS), "semantic latent 16 × 24 × 24, added after embedding"])
    for i, line in enumerate((
            "In brackets: the tiny cascade. The first R of a level on",
            "the way up also reads the level’s skip. The full networks",
            "are wider and deeper: see UNetConfig in model.py.")):
        drawing.text(16, 402 + 18 * i, line, 12, GREY, anchor="start")

    drawing.line([(14, 572), (810, 572)], LINE)
    block_row(drawing, 630, "R  ResidualBlock", "mixes neighbours, then the channels of each position", "x", "+ x", [
        (96, ["depthwise", "conv 3 × 3"]), (50, ["norm"]), (104, ["concat skip", "(way up)"]), (70, ["linear", "C to 4C"]),
        (50, ["GELU"]), (92, ["GlobalRe-", "sponseNorm"]), (70, ["linear", "4C to C"])])
    block_row(drawing, 712, "T  TimestepBlock", "scales and shifts every channel, depending on the time", "t_emb", "", [
        (280, ["linear, 64 to 2C, for each time; their sum", "is scale and shift, C numbers each"]),
        (120, ["x · (1 + scale) + shift"])])
    block_row(drawing, 794, "A  AttentionBlock", "positions attend to all positions and to the condition", "x", "+ x", [
        (50, ["norm"]), (150, ["queries: positions"]), (220, ["keys, values: positions", "and condition tokens"]),
        (90, ["attention,", "heads of 64"]), (60, ["linear"])])
    drawing.save(path)


# ---- images ----------------------------------------------------------------------------------------------------------

def noise(path, run):
    """The image latent of a true image, noised, seen through Stage A."""
    stage_a = run.cascade.network("stage_a")
    pixels = torch.from_numpy(shapes.render(SCENE)).permute(2, 0, 1)[None] / 255        # (1, 3, 128, 128)
    x0 = stage_a.encode(pixels)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
    header, cells = [], []
    for t in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        a = alpha_bar(torch.tensor(t))
        cells.append(as_image(stage_a.decode(add_noise(x0, eps, a))))
        header.append(f"t = {t:g}\na = {a:.{4 if min(a, 1 - a) < 0.005 else 2}f}")
    sheet(path, [("x, seen through Stage A", cells)], header)


def read(path, run):
    """The prompt's tokens, and below each its row of `hidden` as a column of colours."""
    words, ids, pads = run.tokens()
    hidden, pooled = run.text.hidden[0], run.text.pooled[0]                             # (L, D), (1, D)
    wide, narrow, zoom, left = 112, 18, 4, GAP
    canvas = Image.new("RGB", (2 * left + wide * len(ids) + narrow * pads, 270 + zoom * hidden.shape[1]), "white")
    draw, width = ImageDraw.Draw(canvas), canvas.width - 2 * left

    def stripes(values, x, y, width, height):
        drawn = Image.fromarray((values * 255).round().astype("uint8"))
        canvas.paste(drawn.resize((width, height), Image.Resampling.NEAREST), (x, y))

    top, height, most = 2 * LEADING + 24, zoom * hidden.shape[1], float(hidden.abs().quantile(0.99))
    for i, (word, token) in enumerate(zip(words, ids)):
        x = left + wide * i
        write_text(draw, x + wide / 2, 12, wide, f"{word}\n{token}", "mt")
        stripes(colours(hidden[i:i + 1].T, most), x, top, wide - 6, height)
    x = left + wide * len(ids)
    write_text(draw, x + narrow * pads / 2, 12, narrow * pads, f"{pads} padding tokens\n{ids[-1]} each", "mt")
    stripes(colours(hidden[len(ids):].T, most), x, top, narrow * pads, height)
    bottom = top + height + 8
    draw.text((left, bottom), f"hidden: {len(hidden)} tokens of {hidden.shape[1]} numbers. Blue is below 0, orange above; "
              f"full colour at ±{most:.1f}.", INK, FONT)
    most = float(pooled.abs().max())
    stripes(colours(pooled, most), left, bottom + 60, width, 40)
    draw.text((left, bottom + 108), f"pooled: {pooled.shape[1]} numbers for the whole prompt; full colour at ±{most:.1f}.",
              INK, FONT)
    save(path, canvas)


def denoising(path, noise, steps, chosen, decode, through):
    """Rows: x before the chosen steps, the x0 predicted in them, and that x0 as an image."""
    t = timesteps(len(steps))
    header, rows = [], [("x, the noisy latent", []), ("x0, as predicted in this step", []), (f"x0, {through}", [])]
    for step in chosen:
        x = noise if step == 1 else steps[step - 2][0]
        x0 = steps[step - 1][1]
        header.append(f"step {step}\nt = {t[step - 1]:.2f}")
        for (_, cells), image in zip(rows, (channel_maps(x), channel_maps(x0), as_image(decode(x0)))):
            cells.append(image)
    sheet(path, rows, header, palette=256)


def hero(path, run):
    """The whole way in one row, and the prompt's tokens above it."""
    previewer, gap = run.cascade.network("previewer"), 52
    words, _, pads = run.tokens()
    predicted = [(f"x0, step {step}", as_image(previewer(run.steps_c[step - 1][1]))) for step in (1, 8, 20)]
    cells = [("noise", channel_maps(run.noise_c)), *predicted, ("image latent", channel_maps(run.latent)),
             ("image", as_image(run.pixels))]
    width = 2 * GAP + 6 * CELL + 5 * gap
    canvas = Image.new("RGB", (width, 760), "white")
    draw = ImageDraw.Draw(canvas)

    def arrow(x, y, dx, dy):
        draw.line((x, y, x + dx, y + dy), INK, 4)
        tip = [(x + dx + 12 * (dx > 0), y + dy + 12 * (dy > 0)), (x + dx - 11 * (dy > 0), y + dy - 11 * (dx > 0)),
               (x + dx + 11 * (dy > 0), y + dy + 11 * (dx > 0))]
        draw.polygon(tip, INK)

    draw.text((width / 2, 40), f"“{PROMPT}”", INK, FONT.font_variant(size=40), anchor="mm")
    arrow(width / 2, 70, 0, 22)
    chips = [*words, f"+ {pads} padding"]
    sizes = [FONT.getlength(word) + 28 for word in chips]
    x = (width - sum(sizes) - 10 * (len(chips) - 1)) / 2
    for word, size in zip(chips, sizes):
        draw.rounded_rectangle((x, 112, x + size, 160), 10, PALE, LINE, 2)
        draw.text((x + size / 2, 136), word, INK, FONT, anchor="mm")
        x += size + 10
    hidden, pooled = (tuple(tensor[:1].shape) for tensor in (run.text.hidden, run.text.pooled))
    draw.text((width / 2, 186), f"text_encoder.py: hidden {hidden}, pooled {pooled}", GREY, FONT, anchor="mm")
    arrow(width / 2, 210, 0, 22)

    y, places = 300, [GAP + i * (CELL + gap) for i in range(6)]
    for x, (title, image) in zip(places, cells):
        draw.text((x + CELL / 2, y - 26), title, INK, FONT, anchor="mm")
        paste(canvas, image, x, y)
    for x in places[1:]:
        arrow(x - gap + 8, y + CELL / 2, gap - 30, 0)
    captions = (
        (0, 0, f"sampler.py\ndraw_noise\n{tuple(run.noise_c.shape)}"),
        (1, 3, "sampler.py and model.py\nStage C: 20 denoising steps with guidance\n"
               f"semantic latent {tuple(run.semantic.shape)}, seen through the previewer"),
        (4, 4, f"model.py\nStage B: 10 steps\n{tuple(run.latent.shape)}"),
        (5, 5, f"model.py\nStage A: decoder\n{tuple(run.pixels.shape)}"))
    for first, last, text in captions:
        left, right = places[first], places[last] + CELL
        draw.line((left, y + CELL + 18, right, y + CELL + 18), BLUE, 4)
        write_text(draw, (left + right) / 2, y + CELL + 30, right - left + 40, text, "mt")
    canvas = canvas.crop((0, 0, width, y + CELL + 36 + 3 * LEADING + 14))
    save(path, canvas)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder (default: weights/figures)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(Cascade(device="cpu", keep=True))
    hero(folder / "hero.png", run)
    architecture(folder / "architecture.svg", run)
    schedule(folder / "schedule.svg")
    noise(folder / "noise.png", run)
    compression(folder / "compression.svg")
    read(folder / "read.png", run)
    previewer, stage_a = run.cascade.network("previewer"), run.cascade.network("stage_a").decode
    denoising(folder / "imagine.png", run.noise_c, run.steps_c, (1, 4, 8, 12, 16, 20), previewer, "through the previewer")
    unet(folder / "unet.svg", run)
    denoising(folder / "paint.png", run.noise_b, run.steps_b, (1, 2, 4, 6, 8, 10), stage_a, "through Stage A")


if __name__ == "__main__":
    main()
