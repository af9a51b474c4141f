"""What the figures share: sheets of images (PNG, drawn at more than twice the size of GitHub's column), line drawings
(SVG)."""
import math
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

INK, GREY, LINE, PALE, BLUE, ORANGE = "#222222", "#666666", "#a0a0a0", "#eaf0f8", "#2f62a8", "#c96a12"


# ---- sheets of images ------------------------------------------------------------------------------------------------

CELL, GAP, TITLE = 256, 22, 216                         # pixels of an image, between images, for the titles at the left
WIDTH = GAP + TITLE + 6 * (CELL + GAP)
SIZE, LEADING = 29, 36                                  # of the type; about 13 pixels in GitHub's column
FONT = ImageFont.load_default(SIZE)


def wrap(text, width):
    """Words -> lines that fit into a width. A line break in the text stays."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and FONT.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def write_text(draw, x, y, width, text, anchor="lt", colour=INK):
    """Wrapped text below (x, y), or around it if the anchor's second letter is m."""
    lines = wrap(text, width)
    if anchor[1] == "m":
        y -= LEADING * len(lines) / 2
    for i, line in enumerate(lines):
        draw.text((x, y + LEADING * (i + 0.5)), line, colour, FONT, anchor=f"{anchor[0]}m")


def paste(canvas, image, x, y):
    """An array (H, W, 3) in [0, 1] as a framed square of CELL pixels."""
    pixels = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    canvas.paste(pixels.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
    ImageDraw.Draw(canvas).rectangle((x - 1, y - 1, x + CELL, y + CELL), outline="#bbbbbb")


def sheet(path, rows, header=(), palette=96):
    """Saves rows of (title, images), at most six images each. The header has a text for each column; where there is
    none, a row is (title, images, captions)."""
    top = GAP + LEADING * max((len(wrap(text, CELL)) for text in header), default=0)
    canvas = Image.new("RGB", (WIDTH, top + len(rows) * (CELL + 4 * LEADING)), "white")
    draw, y = ImageDraw.Draw(canvas), top + 6
    columns = [GAP + TITLE + i * (CELL + GAP) for i in range(6)]
    for x, text in zip(columns, header):
        write_text(draw, x + CELL / 2, GAP, CELL, text, "mt")
    for title, images, *captions in rows:
        write_text(draw, GAP, y + CELL / 2, TITLE - 10, title, "lm")
        for x, image in zip(columns, images):
            paste(canvas, image, x, y)
        for x, text in zip(columns, captions[0] if captions else ()):
            write_text(draw, x + CELL / 2, y + CELL + 6, CELL, text, "mt")
        lines = max((len(wrap(text, CELL)) for text in captions[0]), default=0) if captions else 0
        y += CELL + LEADING * lines + GAP + 8
    save(path, canvas.crop((0, 0, WIDTH, y)), palette)


def save(path, canvas, palette=256):
    canvas.quantize(palette, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, flush=True)


def as_image(pixels):
    """(1, 3, H, W) -> (H, W, 3)."""
    return pixels[0].permute(1, 2, 0).numpy()


def colours(values, most):
    """Numbers as colours, (...) -> (..., 3): white is 0, blue is -most, orange is most."""
    values = np.clip(np.asarray(values, np.float32) / most, -1, 1)[..., None]
    blue, orange = (np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255 for colour in (BLUE, ORANGE))
    return 1 - np.maximum(-values, 0) * (1 - blue) - np.maximum(values, 0) * (1 - orange)


def channel_maps(latent, most=3):
    """A latent (1, C, H, W) as its C channels side by side, C a square: (CELL, CELL, 3)."""
    across = math.isqrt(latent.shape[1])
    step = CELL // across
    zoom = step // latent.shape[-1]
    canvas = np.full((CELL, CELL, 3), 0.55, np.float32)
    for i, channel in enumerate(latent[0]):
        tile = np.kron(colours(channel, most), np.ones((zoom, zoom, 1)))[:step - 2, :step - 2]
        y, x = (1 + step * n for n in divmod(i, across))
        canvas[y:y + len(tile), x:x + len(tile)] = tile
    return canvas


# ---- line drawings ---------------------------------------------------------------------------------------------------

class Drawing:
    """An SVG made of boxes, text and arrows, 824 pixels wide."""

    def __init__(self, height):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 824 {height}" width="824" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
            f'<rect width="824" height="{height}" fill="white"/>']

    def text(self, x, y, text, size=12, colour=INK, weight="normal", anchor="middle"):
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
                          f'text-anchor="{anchor}">{escape(text)}</text>')

    def rectangle(self, x, y, width, height, fill=PALE, line=LINE, corner=0):
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner}" '
                          f'fill="{fill}" stroke="{line}"/>')

    def box(self, x, y, width, height, *lines, fill=PALE, corner=0):
        """A network or a part of one, around (x, y). Lines are *bold*, [of the tiny cascade], or plain."""
        self.rectangle(x - width / 2, y - height / 2, width, height, fill, corner=corner)
        for i, line in enumerate(lines):
            bold, tiny = line[0] == "*", line[0] == "["
            self.text(x, y + 4.5 + 16 * i - 8 * (len(lines) - 1), line.strip("*"), 13 if bold else 12,
                      GREY if tiny else INK, "bold" if bold else "normal")

    def data(self, x, y, width, *lines):
        """What flows between networks."""
        self.box(x, y, width, 10 + 16 * len(lines), *lines, fill="white", corner=12)

    def line(self, points, colour=INK, width=1.2):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def dot(self, x, y):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{INK}"/>')

    def arrow(self, *points, colour=INK):
        self.line(points, colour)
        (x0, y0), (x, y) = points[-2:]
        angle = math.degrees(math.atan2(y - y0, x - x0))
        self.parts.append(f'<path d="M0 0L-7 -3.5L-7 3.5Z" fill="{colour}" '
                          f'transform="translate({x:g} {y:g}) rotate({angle:g})"/>')

    def save(self, path):
        path.write_text("\n".join([*self.parts, "</svg>\n"]), encoding="utf-8")
        print(path, flush=True)
