"""The shapes that the modules write beside their code are true: all is run, and what was there is compared with them.

Read are the comments beside code (`# (B, y, x, C)`; with `->` beside a class: of its forward) and the docstrings of
functions (`(B, 16, h, w) -> pixels (B, 3, 8h, 8w)`, and the rows of their tables of arguments). A size is arithmetic;
`or` separates what it may be, and each of these must be seen. One shape of several values holds for each of them. What
a letter is, LETTERS reads off what a function is given; other names are its own numbers, or the lengths of its lists.
"""

import ast
import importlib
import io
import itertools
import math
import re
import sys
import tokenize
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ENCODER, IMAGE, PREVIEWER, STAGE_A, STAGE_B, STAGE_C, TEXT, write_folder

from cascade import COMPRESSION, Cascade, Text, previews
from model import Previewer, ResidualBlock, SemanticEncoder, StageA, UNet, linear
from sampler import RECIPES, generators, sample
from text_encoder import ImageEncoder, TextEncoder, Tokenizer

FILES = ("model", "sampler", "text_encoder", "cascade")
PATHS = {name: Path(importlib.import_module(name).__file__) for name in FILES}
SOURCES = {name: path.read_text("utf-8") for name, path in PATHS.items()}


def texts(prompts):
    """How many prompts there are."""
    return len(prompts.pooled) // 2 if isinstance(prompts, Text) else 1 if isinstance(prompts, str) else len(prompts)


def pictures(embeddings):
    """How many pictures' embeddings Stage C is given for each row."""
    return embeddings.shape[1] if embeddings is not None and embeddings.dim() == 3 else 1


def grid(height, width, step=COMPRESSION):
    """The sides of a picture in steps of so many pixels."""
    return math.ceil(height / step), math.ceil(width / step)


# Function -> Python that reads the letters off its arguments; ' is written _. What is not here: the stream's, or none.
STREAM = "B, y, x, C = x.shape; "
CONDITION = "c_cond = self.config.c_cond; N = 4 if self.config.semantic else L + 4 + 4 * n; "
LETTERS = {
    "linear": "*rest, C = x.shape; C_ = len(weight)",
    "Linear.forward": "*rest, C = x.shape; C_ = self.out_features",
    "attention": "B, heads, T, _ = q.shape; T_ = k.shape[2]",
    "by_head": "B, heads, T, _ = q.shape; T_ = k.shape[2]; few = min(heads, max(1, 2 ** 21 // (T * T_)))",
    "Conv2d.forward": STREAM + "s, C_ = self.stride[0], self.out_channels",
    "ConvTranspose2d.forward": STREAM + "C_ = self.out_channels",
    "PixelUnshuffle.forward": "p = self.downscale_factor; B, C, y, x = x.shape; y //= p; x //= p",
    "PixelShuffle.forward": "p = self.upscale_factor; B, y, x, C = x.shape; C //= p * p",
    "ResidualBlock.forward": STREAM + "C_skip = self.c_skip",
    "Attention.forward": "B, T, C = x.shape; N = keys_values.shape[1]",
    "AttentionBlock.keys_values": "B, N, c_cond = cond.shape; C = self.attention.attn.out_proj.in_features",
    "UNet.prepare": "B, n = len(clip_text_pooled), pictures(clip_img); "
    "L = 0 if clip_text is None else clip_text.shape[1]; " + CONDITION,
    "Resize.forward": STREAM + "scale = self.scale",
    "UNet.embed_time": "B, extras = len(r), len(self.config.extras)",
    "UNet.embed_clip": "B, n = len(pooled), pictures(image); L = 0 if text is None else text.shape[1]; " + CONDITION,
    "UNet.forward": "p = self.config.patch; B, _, y, x, h, w = *x.shape, *(x if effnet is None else effnet).shape[2:]; "
    "H, W = 4 * y, 4 * x; y //= p; x //= p; "
    "C, D, E = self.config.widths[0], self.config.text, self.config.image; extras = len(self.config.extras); "
    "L, n = 0 if clip_text is None else clip_text.shape[1], pictures(clip_img); " + CONDITION,
    "StageA.encode": "B, _, H, W = image.shape; C = self.config.widths[0]",
    "StageA.decode": "B, _, y, x = z.shape",
    "StageA.quantise": "B, _, y, x = z.shape; K = self.config.codes",
    "SqueezeExcite.forward": "B, C, H, W = x.shape",
    "MBConv.forward": "B, C, H, W = x.shape; C_ = self.block[-1][0].out_channels; "
    "s = max(layer.stride[0] for layer in self.modules() if isinstance(layer, torch.nn.Conv2d))",
    "SemanticEncoder.forward": "B, _, H, W = image.shape",
    "Previewer.forward": "B, _, h, w = latent.shape",
    "unet_config": "c_cond, D = STAGE_C.c_cond, STAGE_C.text",
    "draw": "B = len(sources)",
    "guide": "B, C, y, x = wanted.shape",
    "sample": "B = len(sources); C, y, x = shape",
    "Tokenizer.__call__": "B, L = texts(prompts), self.bpe.padding['length']",
    "SelfAttention.forward": "B, L, D = x.shape",
    "Layer.forward": "B, L, D = x.shape",
    "TextEncoder.forward": "B, L = ids.shape; D = self.config.width",
    "ImageEncoder.forward": "B, _, S, _ = pixels.shape; L, D, E = 1 + (S // self.config.patch) ** 2, "
    "self.config.width, self.config.projection",
    "fit": "S = side",
    "to_pillow": "H, W, _ = picture.shape",
    "Cascade.read": "P = texts(prompts); L, D = TEXT.length, TEXT.width",
    "Cascade.look": "n, S, E = len(pictures), IMAGE.side, IMAGE.projection",
    "Cascade.encode": "H, W = height, width; h, w = grid(H, W)",
    "Cascade.__call__": "N, H, W = images * texts(prompts), height, width; y, x = (2 * side for side in grid(H, W, 8))",
    "Cascade._sample": "N = len(sources)",
    "Cascade.prior": "N = images * texts(prompts); h, w = grid(height, width); "
    "L, D, E = TEXT.length, TEXT.width, IMAGE.projection; "
    "n = len(variation_images) if variation_images is not None else 0",
    "Cascade.decode": "N, _, h, w = latents.shape; D = TEXT.width; H, W = height, width; "
    "y, x = (2 * side for side in grid(H, W, 8))",
    "previews.watch": "N, _, h, w = x0.shape",
}


# ------------------------------------------------------------------------------------------------ what is said


@dataclass(frozen=True)
class Claim:
    """What a place in a file says of some values of a function."""

    file: str
    line: int
    says: str
    function: str
    of: tuple  # expressions, read after the lines; "return": what these lines return or yield
    lines: tuple = ()  # first and last of the statement; none: the function's arguments or results


SHAPE = re.compile(r"\((?:[^()]|\([^()]*\))*\)")  # where it has a comma
LETTER = "[BCDEHKLNPSTWhnpwxy]"
PROSE = re.compile(rf"\((?!\d|{LETTER}\b)[^()]*\w[.']?(?<!\bor) (?!or )\w[^()]*\)")  # two words without an operator


def shapes(text):
    """'(2B or B, C), (B,)' -> for each shape all that it may be, as Python: [['(2*B, C,)', '(B, C,)'], ['(B,)']]."""
    found, end = [], 0
    for match in SHAPE.finditer(text):
        if "," not in match[0]:
            continue
        python = re.sub(r"(\d)(?=[A-Za-z])", r"\1*", match[0][1:-1]).replace("'", "_")
        options = itertools.product(*(size.strip().split(" or ") for size in python.split(",") if size.strip()))
        variants = [f"({', '.join(one)},)" for one in options]
        if found and re.search(r"\bor\b", text[end : match.start()]):
            found[-1] += variants
        else:
            found.append(variants)
        end = match.end()
    return found


def names(text):
    """The names in the shapes, with the star of those that stand for several sizes."""
    return {name for variants in shapes(text) for name in re.findall(r"\*?\b[A-Za-z_]\w*", " ".join(variants))}


def is_shape(comment):
    """Anything that looks like one must be one: brackets around a comma, or a letter of the legends before one."""
    return re.search(rf"\([^()]*,|\b{LETTER}\s*,|\({LETTER}\)", comment)


def of_function(file, line, text, function, first):
    """The claims of 'shapes of the first argument -> shapes of the results'."""
    given, _, result = text.rpartition("->")
    sides = ((given, (first,)), (result, ("return",))) if first else ((result, ("return",)),)
    return [Claim(file, line, side.strip(), function, of) for side, of in sides if shapes(side)]


def of_docstring(file, function, node, arguments):
    """Its first paragraph says what goes in and out; a row 'name  ... shape' below says what an argument may be."""
    text = PROSE.sub(lambda prose: "\n" * prose[0].count("\n"), ast.get_docstring(node))
    line, first = node.body[0].lineno, arguments[0] if arguments else None
    claims = of_function(file, line, text.partition("\n\n")[0], function, first)
    for row in re.finditer(r"(?m)^(\w+(?:, \w+)*)  +(.*(?:\n .*)*)", text):
        says = " or ".join(shape[0] for shape in SHAPE.finditer(row[2]) if "," in shape[0])
        for name in row[1].split(", ") if says else ():
            of = "return" if name == "output" else name  # which says how the result is given
            if name in arguments:
                claims.append(Claim(file, line + text.count("\n", 0, row.start()), says, function, (of,)))
    return claims


def values_of(node, line):
    """What a comment beside a statement speaks of."""
    if isinstance(node, ast.Return) or isinstance(getattr(node, "value", None), ast.Yield):
        return ("return",)
    if isinstance(node, ast.AnnAssign):  # a field
        return (node.target.id,)
    if not isinstance(node, ast.Assign):
        return ()
    target, value = node.targets[0], node.value
    if isinstance(value, ast.Dict):  # an entry of it
        return tuple(
            f"{ast.unparse(target)}[{ast.unparse(key)}]"
            for key, x in zip(value.keys, value.values)
            if x.lineno <= line <= x.end_lineno
        )
    return tuple(ast.unparse(x) for x in getattr(target, "elts", [target]))


def claims_of(file, source):
    """All claims of a file, and its functions {first line: (name, statements)}."""
    tree, claims, functions, statements = ast.parse(source), [], {}, []

    def enter(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                name = ".".join([*inside, child.name])
                documented = ast.get_docstring(child) is not None
                functions[min(x.lineno for x in [child, *child.decorator_list])] = name, len(child.body) - documented
                arguments = [argument.arg for argument in child.args.args if argument.arg != "self"]
                claims.extend(of_docstring(file, name, child, arguments) if documented else [])
            if isinstance(child, ast.stmt):
                statements.append((child, ".".join(inside)))
            enter(child, [*inside, child.name] if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else inside)

    enter(tree, [])
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT and line in code and is_shape(token.string):
            node, function = max(
                (x for x in statements if x[0].lineno <= line <= x[0].end_lineno), key=lambda x: x[0].lineno
            )
            says, lines = token.string[1:].strip(), (node.lineno, node.end_lineno)
            if isinstance(node, ast.ClassDef):
                forward = next(x for x in node.body if getattr(x, "name", "") == "forward")
                name = f"{node.name}.forward"
                claims += of_function(file, line, says, name, forward.args.args[1].arg) or [
                    Claim(file, line, says, name, ())
                ]
            else:
                field = isinstance(node, ast.AnnAssign)
                claims.append(Claim(file, line, says, function, values_of(node, line), () if field else lines))
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            code |= {line, token.end[0]}
    return claims, functions


# ------------------------------------------------------------------------------------------------ what is there


def sizes(value):
    """The shapes of a value: one of a tensor, all of a list of tensors, none of anything else."""
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return (tuple(value.shape),)
    return sum(map(sizes, value), ()) if isinstance(value, (tuple, list)) else ()


class Watch:
    """Follows the functions while everything runs. `seen` has, for every claim, all (letters, shapes) that it met."""

    def __init__(self, sources=SOURCES):
        self.claims, self.functions = defaultdict(list), {}
        self.seen, self.changed = defaultdict(dict), set()  # dicts keep the order
        for file, source in sources.items():
            claims, functions = claims_of(file, source)
            self.functions |= {(str(PATHS[file]), line): (file, name) for line, (name, _) in functions.items()}
            for claim in claims:
                if claim.of:
                    self.claims[file, claim.function].append(claim)

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def note(self, claim, values, letters, own):
        """Keeps the shapes of the values, and the names of the claim as the function has them just then."""
        shape = isinstance(values[0], tuple) and all(isinstance(x, int) for x in values[0])  # told as numbers
        known, values = {}, tuple(values) if shape else sizes(values)
        for name in names(claim.says):
            value = letters.get(name.strip("*"), own.get(name.strip("*")))
            if isinstance(value, (tuple, list)):
                value = tuple(value) if name[0] == "*" else len(value)
            if isinstance(value, (int, float, tuple)):
                known[name.strip("*")] = value
        if values:
            self.seen[claim][tuple(sorted(known.items())), values] = None

    def call(self, frame, *_):
        """A function begins: reads its letters, looks at its arguments and follows its lines. (sys.settrace)"""
        function = self.functions.get((frame.f_code.co_filename, frame.f_code.co_firstlineno))
        if function is None or function[1].rpartition(".")[2] != frame.f_code.co_name:
            return None
        if frame.f_trace:  # a generator goes on
            return frame.f_trace
        given, letters = dict(frame.f_locals), {}
        default = STREAM if function[0] == "model" and getattr(given.get("x"), "ndim", 0) == 4 else ""
        with suppress(Exception):  # what then lacks is told where it is used
            exec(LETTERS.get(function[1], default), globals() | given, letters)
        claims = self.claims[function]
        shapes_given = {shape for value in given.values() for shape in sizes(value)}
        for claim in claims:
            if not claim.lines and claim.of[0] in given:
                self.note(claim, [given[claim.of[0]]], letters, given)
        now = []  # of the statement under way

        def local(frame, event, result):
            nonlocal now
            line, own, over = frame.f_lineno, frame.f_locals, event == "return"
            if not over and (event != "line" or any(claim.lines[0] <= line <= claim.lines[1] for claim in now)):
                return local
            for claim in now + [claim for claim in claims if over and not claim.lines]:
                if claim.of != ("return",) and claim.lines:
                    self.note(claim, [eval(x, frame.f_globals, own) for x in claim.of], letters, own)
                elif claim.of == ("return",) and over:
                    self.note(claim, [result], letters, own)
            now = [claim for claim in claims if claim.lines and claim.lines[0] <= line <= claim.lines[1]]
            for claim in self.claims[function[0], type(result).__name__] if over else ():  # a dataclass's fields
                self.note(claim, [getattr(result, claim.of[0])], letters, own)
            if over and set(sizes(result)) - shapes_given:
                self.changed.add(function)
            return local

        return local


def complaint(claim, seen):
    """What is wrong with a claim, or None."""
    where = f"{claim.file}.py, line {claim.line}, {claim.function} says {claim.says!r}"
    said = shapes(claim.says)
    if not said or not claim.of:
        return f"{where}: that cannot be read, or not there"
    if not seen:
        return f"{where}: that was never run"
    unseen = {variant for variants in said for variant in variants}
    for letters, values in seen:
        wanted = said * len(values) if len(said) == 1 else said
        true = []
        for variants, value in zip(wanted, values):
            try:
                true.append([x for x in variants if eval(x, {"int": int, "any": ANY}, dict(letters)) == value])
            except (NameError, SyntaxError, TypeError) as error:
                return f"{where}: that cannot be read ({error})"
        if len(wanted) != len(values) or not all(true):
            return f"{where}: seen was {', '.join(map(str, values))} where {dict(letters)}"
        unseen -= set(sum(true, []))
    return f"{where}: never seen was {' or '.join(sorted(unseen))}" if unseen else None


def silent(file, source, changed):
    """The functions that do not say, beside their code, what they do to shapes: of the forwards, and of those that gave
    a shape that they were not given, which must be said of the result. Two statements may leave it to the docstring."""
    (claims, functions), lines = claims_of(file, source), source.split("\n")
    beside = {claim.function for claim in claims if claim.lines or lines[claim.line - 1].startswith("class ")}
    beside |= {claim.function for claim in claims} & {
        name for name, statements in functions.values() if statements <= 2
    }
    told = {claim.function for claim in claims if claim.of == ("return",)} & beside
    forwards = {name for name, _ in functions.values() if name.endswith((".forward", "Cascade.read", "previews.watch"))}
    changed = {name for where, name in changed if where == file and name != "Weights.tensor"}  # which may have any
    return (forwards - beside) | (changed - told)


# ------------------------------------------------------------------------------------------------ everything runs


@torch.no_grad()
def run_networks():
    """Tiny and odd: 3 rows, sides 5 and 7, 11 tokens, 2 pictures; and no two widths alike."""
    B, L, D = 3, 11, 40
    r = torch.rand(B)
    pooled, text = torch.randn(B, 1, D), torch.randn(B, L, D)
    for switch in ((False,), (True,)):
        unet, x = UNet(replace(STAGE_C, text=D, switch=switch)), torch.randn(B, 16, 5, 7)
        unet(x, r, pooled, text)
        unet(x, r, pooled[:, 0], text, torch.randn(B, 24), sca=r)
        unet(x, r, pooled, text, torch.randn(B, 2, 24), sca=r, crp=r)
    unet, x = UNet(replace(STAGE_B, text=D)), torch.randn(B, 4, 10, 14)
    unet(x, r, pooled)
    unet(x, r, pooled[:, 0], effnet=torch.randn(B, 16, 3, 2), pixels=torch.rand(B, 3, 40, 56), sca=r)
    stage_a = StageA(STAGE_A).eval()
    stage_a.encode(torch.rand(B, 3, 20, 28))
    stage_a.decode(torch.randn(B, 4, 5, 7))
    stage_a.quantise(torch.randn(B, 4, 5, 7))
    SemanticEncoder(ENCODER).eval()(torch.rand(B, 3, 32 * 5, 32 * 7))
    Previewer(PREVIEWER).eval()(torch.randn(B, 16, 5, 7))
    ResidualBlock(5, 2)(torch.randn(B, 3, 4, 5), None, None, torch.randn(B, 3, 4, 2))
    TextEncoder(TEXT)(torch.randint(0, 519, (B, L)), torch.ones(B, L))
    ImageEncoder(IMAGE)(torch.rand(B, 3, 30, 30))
    linear(torch.randn(B, 7), torch.randn(5, 7).half(), torch.randn(5).half())


@torch.no_grad()
def run_sampler():
    def unet(x, r, cond):
        return x

    unet.clf, unet.prepare = [None, SimpleNamespace(weight=torch.zeros(1))], dict
    for recipe, guidance in itertools.product(RECIPES.values(), (0.0, 3.0)):
        for rows in (None, 1, 3):
            start = None if rows is None else torch.randn(rows, 16, 5, 7)
            cond = torch.randn(6 if guidance > 1 else 3, 11)
            list(sample(unet, (16, 5, 7), {"cond": cond}, 2, guidance, generators(0, 3), recipe, start))


def run_pipeline(folder):
    cascade = Cascade(write_folder(folder / "weights"), keep=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8))
    size, prompts = {"width": 100, "height": 150}, ["a red circle", "a star", "two"]
    few = {"steps": 2, "images": 2, **size}
    for recipe, output, guidance in zip(RECIPES, ("pil", "np", "pt"), (4.0, 0.0, 2.0)):
        options = {"recipe": recipe, "output": output, "guidance": guidance, "decoder_guidance": guidance, **few}
        watch = previews(cascade, folder)
        cascade(prompts, "blue", decoder_steps=1, variation_images=[picture] * 4, watch=watch, **options)
    embeddings, latent = cascade.look([picture] * 4), cascade.encode(picture, **size)
    cascade.prior(prompts, **few, variation_images=embeddings, init_image=picture)
    text = cascade.read(prompts, ["blue", "", "red"])
    for start in (latent, latent.expand(6, -1, -1, -1)):
        latents = cascade.prior(text, **few, init_image=start, guidance=0.0)
    cascade.decode(latents, text, **size, steps=1, output="latent")
    cascade(prompts, **few, decoder_steps=1, output="latent")
    Tokenizer(folder / "weights" / "tokenizer")(prompts)


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    with Watch() as watch:
        run_networks()
        run_sampler()
        run_pipeline(tmp_path_factory.mktemp("shapes"))
    return watch


# ------------------------------------------------------------------------------------------------ the claims hold


@pytest.mark.parametrize("file", FILES)
def test_every_shape_beside_the_code_is_true(watch, file):
    claims = claims_of(file, SOURCES[file])[0]
    told = [told for claim in claims if (told := complaint(claim, watch.seen[claim]))]
    assert claims
    assert not told, "\n".join(told)


@pytest.mark.parametrize("file", FILES)
def test_every_function_that_changes_a_shape_says_so(watch, file):
    assert not silent(file, SOURCES[file], watch.changed)


@pytest.mark.parametrize("file", FILES)
def test_every_letter_is_in_the_legend_of_its_file(file):
    legend = re.search(r"(?s)Letters: (.*?)\.(?:$|\s)", SOURCES[file])[1].replace("'", "_")
    used = set().union(*(names(claim.says) for claim in claims_of(file, SOURCES[file])[0]))
    assert {name for name in used if re.fullmatch(r"[A-Za-z]_?", name)} <= set(re.findall(r"\w+", legend))


def test_letters_are_read_for_functions_that_are_there():
    assert set(LETTERS) <= {name for file in FILES for name, _ in claims_of(file, SOURCES[file])[1].values()}


# ------------------------------------------------------------------------------------------------ and wrong ones do not


def changes(says):
    """Every number one more, every letter doubled or another of the same comment, every first size left out."""
    for shape in SHAPE.finditer(says):
        if "," not in shape[0]:
            continue
        rest = says[: shape.start()], says[shape.end() :]
        yield re.sub(r"\((?:[^,]*), *", "(", shape[0]).join(rest)
        for size in re.finditer(r"\d+|\b(?!or\b|int\b|any\b)[A-Za-z]\w*'?", shape[0]):
            others = {name.replace("_", "'") if len(name) == 2 else name for name in names(says) if name[0] != "*"}
            others = others - {size[0], "int", "any"} if shape[0][size.start() - 1] != "*" else set()
            for other in {str(int(size[0]) + 1)} if size[0].isdigit() else {f"{size[0]}*2", *others}:
                yield f"{shape[0][: size.start()]}{other}{shape[0][size.end() :]}".join(rest)


@pytest.mark.parametrize("file", FILES)
def test_no_shape_could_be_written_otherwise(watch, file):
    for claim in claims_of(file, SOURCES[file])[0]:
        for says in changes(claim.says):
            assert complaint(replace(claim, says=says), watch.seen[claim]), f"{claim} could say {says}"


@pytest.mark.parametrize(
    "line, old, new, seen",
    [
        ("rows = ", "2B or B, C, y, x", "2B or B, C, x, y", "seen was (3, 16, 5, 7) where"),
        ("rows = ", "2B or B, C, y, x", "2B or B or 3B, C, y, x", "never seen was (3*B, C, y, x,)"),
        ("return torch.linspace", "steps + 1,", "steps,", "seen was (3,) where {'steps': 2}"),
        ("yield x, x0", "B, C, y, x", "B, Q, y, x", "name 'Q' is not defined"),
        ("yield x, x0", "B, C, y, x", "B, C y, x", "cannot be read"),
        ("Gaussian noise", "B, *shape", "*shape, B", "seen was (3, 16, 5, 7) where"),
        ("weight = unet", "# ", "# (C, 3) ", "seen was (1,) where {'C': 16}"),
        ("if start is not None", ":", ":  # B, C, y, x", "cannot be read"),
    ],
)
def test_a_wrong_shape_is_told_with_its_place_what_it_says_and_what_was_seen(line, old, new, seen):
    lines = SOURCES["sampler"].split("\n")
    i = next(i for i, text in enumerate(lines) if text.strip(' "').startswith(line))
    assert old in lines[i]
    source = "\n".join([*lines[:i], lines[i].replace(old, new), *lines[i + 1 :]])
    with Watch({"sampler": source}) as watch:
        run_sampler()
    (told,) = (told for claim in claims_of("sampler", source)[0] if (told := complaint(claim, watch.seen[claim])))
    assert told.startswith(f"sampler.py, line {i + 1}, ") and new.strip(" :#") in told and seen in told


def test_a_comment_that_no_run_reaches_is_told():
    claims = claims_of("cascade", SOURCES["cascade"])[0]
    assert all(complaint(claim, {}).endswith("that was never run") for claim in claims)


LOSERS = {
    "model": "resize Conv2d.forward Attention.forward UNet.embed_clip UNet.forward StageA.decode MBConv.forward",
    "sampler": "sample",
    "text_encoder": "fit Tokenizer.__call__ Layer.forward TextEncoder.forward ImageEncoder.forward",
    "cascade": "Cascade.read Cascade.encode Cascade._sample Cascade.prior Cascade.decode previews.watch",
}


@pytest.mark.parametrize("file", FILES)
def test_a_function_that_lost_its_comments_is_told(watch, file):
    bare = re.sub(r"# .*", "", SOURCES[file])
    assert set(LOSERS[file].split()) <= silent(file, bare, watch.changed)
