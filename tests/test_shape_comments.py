"""The shapes in the comments next to the code are true: the modules run at odd sizes, and every claim is compared.

A claim is a comment after a statement that begins with a bracket and a size, `# (B, H, W, C)` or `# (C, C) each`; or, in
the docstring of a function, the one shape before `->`, which is that of its first tensor argument, and the shapes after
it, which are those of its result. A letter is bound to the number at which it first stands alone within a call; a sum of
letters may bind its last unknown one; variables have their values; other words are like letters. Every other size must
then be equal. `or` separates alternatives, each of which must be seen. Not checked: the comments of a dataclass's fields.
"""
import ast
import io
import itertools
import re
import sys
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, noise, unet_inputs
from PIL import Image
from tiny import CONTROLNETS, IMAGE, STAGE_A, STAGE_B, STAGE_C, TEXT, networks, randomise, write_folder

import model
from cascade import CONTROLS, Animation, Cascade, show_previews
from model import ControlNet
from sampler import RECIPES

FILES = [str(ROOT / f"{name}.py") for name in ("model", "sampler", "text_encoder", "cascade")]
LETTER = "[A-Z][a-z]?"
FIRST = rf"(?:\d+{LETTER}|\d+|\*?{LETTER}|len)"         # how the first size of a shape begins
SHAPE = re.compile(rf"\(({FIRST}(?:(?: or\b|,| [*/+-]|\()(?:[^()]|\(\w+\))*)?)\)")
KNOWN = {"D": TEXT.width, "E": IMAGE.projection, "K": STAGE_A.codes}


# ------------------------------------------------------------------------------ what is claimed

@dataclass(frozen=True)
class Claim:
    line: int
    text: str
    shapes: tuple                                       # for each shape its alternatives, which are tuples of sizes
    values: tuple                                       # expressions, or "argument", or "result"
    lines: range = range(0)                             # of the statement; a docstring has none

    def altered(self):
        """The same claim with one size larger by one."""
        for i, variants in enumerate(self.shapes):
            for variant in variants:
                for k in [k for k, size in enumerate(variant) if size[0] != "*"]:
                    other = *variant[:k], f"{variant[k]} + 1", *variant[k + 1:]
                    others = tuple(other if each == variant else each for each in variants)
                    yield replace(self, shapes=(*self.shapes[:i], others, *self.shapes[i + 1:]))


def parse(text):
    """'(2N or N, C), (B)' -> ((('2 * N', 'C'), ('N', 'C')), (('B',),))"""
    shapes = []
    for group in SHAPE.findall(text):
        sizes = re.sub(rf"(\d)({LETTER})", r"\1 * \2", group).split(", ")
        shapes.append(tuple(itertools.product(*(size.split(" or ") for size in sizes))))
    return tuple(shapes)


def lines_of(node):
    return range(node.lineno, node.end_lineno + 1)


def values_of(statement, line):
    """What a comment after a statement describes."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Return) or isinstance(value, ast.Yield):
        return ("result",)
    if not isinstance(statement, ast.Assign):
        return ()
    target = statement.targets[0]
    if isinstance(value, ast.Dict):
        keys = [key for key, entry in zip(value.keys, value.values) if line in lines_of(entry)]
        return tuple(f"{ast.unparse(target)}[{ast.unparse(key)}]" for key in keys)
    return tuple(map(ast.unparse, getattr(target, "elts", [target])))


def claims_of(source):
    """{(name of a function, its first line): [Claim]}"""
    found, tokens = {}, tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens
                if token.type == tokenize.COMMENT and SHAPE.match(token.string, len("# "))}
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for function in reversed(functions):                # the inner ones first
        claims = []
        before, _, after = (ast.get_docstring(function) or "").partition("->")
        for text, value in (before, "argument"), (after.split("\n\n")[0], "result"):
            if parse(text) and after and (value == "result" or len(parse(text)) == 1):
                claims.append(Claim(function.lineno, text, parse(text), (value,)))
        for node in ast.walk(function):
            if isinstance(node, ast.stmt) and not hasattr(node, "body"):
                for line in comments.keys() & lines_of(node):
                    text = comments.pop(line)
                    claims.append(Claim(line, text, parse(text), values_of(node, line), lines_of(node)))
        if claims:
            first_line = min(node.lineno for node in [function, *function.decorator_list])
            found[function.name, first_line] = claims
    return found


# ------------------------------------------------------------------------------ what is seen

def shapes_of(value):
    """The shapes of a tensor, or of all tensors in a list."""
    if hasattr(value, "shape"):
        return (tuple(value.shape),)
    return sum(map(shapes_of, value), ()) if isinstance(value, (tuple, list)) else ()


class Watch:
    """calls: {function: its calls}; a call is (the shapes seen at each claim, the variables that its claims name)."""

    def __init__(self, files):
        self.claims = {}
        for file in files:
            for function, claims in claims_of(Path(file).read_text("utf-8")).items():
                self.claims[(file, *function)] = claims
        self.calls = {function: {} for function in self.claims}

    def trace_call(self, frame, *_):
        function = frame.f_code.co_filename, frame.f_code.co_name, frame.f_code.co_firstlineno
        if function not in self.claims or frame.f_trace:
            return frame.f_trace                        # that of a generator that goes on
        claims = dict(enumerate(self.claims[function]))
        words = set(re.findall(r"[a-zA-Z]\w*", str([claim.shapes for claim in claims.values()])))
        first = sum(map(shapes_of, frame.f_locals.values()), ())[:1]
        seen = [(i, first) for i, claim in claims.items() if claim.values == ("argument",)]
        pending = []

        def trace_line(frame, event, result):
            nonlocal pending
            line, ends = frame.f_lineno, event == "return"
            now = [i for i, claim in claims.items() if line in claim.lines]
            if not ends and (event != "line" or set(now) & set(pending)):
                return trace_line
            if ends and shapes_of(result):
                pending += [i for i, claim in claims.items() if claim.values == ("result",) and not claim.lines]
            variables = {**frame.f_locals, "result": result}
            for i in pending:
                values = [eval(value, frame.f_globals, variables) for value in claims[i].values]
                seen.append((i, shapes_of(values)))
            pending = now
            if ends:
                numbers = {name: variables[name] for name in words & variables.keys()
                           if isinstance(variables[name], (int, tuple, list))}
                numbers |= {name: range(len(value)) for name, value in numbers.items() if isinstance(value, list)}
                self.calls[function][str((seen, numbers))] = [*seen], numbers
            return trace_line

        return trace_line


# ------------------------------------------------------------------------------ whether it is true

def bind(rows, letters):
    columns = [column for _, variants, numbers in rows for column in zip(numbers, *variants)]
    pairs = [(column[1], column[0]) for column in columns if len(set(column[1:])) == 1]  # the same in all alternatives
    for size, number in pairs:
        if re.fullmatch(r"[a-zA-Z]\w*", size):
            letters.setdefault(size, number)
    for size, number in pairs:
        names = size.split(" + ")
        unknown = [name for name in names if name not in letters]
        if len(unknown) == 1 and all(re.fullmatch(LETTER, name) for name in names):
            letters[unknown[0]] = number - sum(letters.get(name, 0) for name in names)


def complaints(claims, calls):
    """What is wrong with the claims of one function."""
    wrong = {i: "it has no value" for i, claim in enumerate(claims) if not claim.values}
    unseen = {(i, variant) for i, claim in enumerate(claims) for variant in sum(claim.shapes, ())}
    for seen, variables in calls.values():
        rows, letters = [], KNOWN | variables
        for i, found in seen:
            each = len(found) if claims[i].text.endswith("each") else 1
            if len(claims[i].shapes) * each != len(found):
                wrong[i] = f"got {found}"
            rows += [(i, variants, sizes) for variants, sizes in zip(claims[i].shapes * each, found)]
        bind(rows, letters)
        for i, variants, sizes in rows:
            try:
                true = [variant for variant in variants if eval(f"({','.join(variant)},)", {}, letters) == sizes]
                unseen -= {(i, variant) for variant in true}
                if not true:
                    wrong[i] = f"got {sizes} with {letters}"
            except (NameError, SyntaxError, TypeError) as error:
                wrong[i] = f"cannot be read: {error}"
    wrong |= {i: "it was never seen" for i, _ in unseen if i not in wrong}
    return [f"line {claims[i].line}: {claims[i].text}: {why}" for i, why in wrong.items()]


# ------------------------------------------------------------------------------ everything runs

@torch.no_grad()
def run_networks():
    """Tiny and odd: 3 rows, sides of 5 and 7, 11 tokens, 2 images."""
    tiny = networks()
    for config, name in (STAGE_C, "stage_c"), (STAGE_B, "stage_b"):
        inputs = unet_inputs(config, rows=3, height=5, width=7, tokens=11)
        tiny[name](**inputs)
        x, r, pooled, text = (inputs.get(name) for name in ("x", "r", "clip_text_pooled", "clip_text"))
        tiny[name](x, r, pooled[:, 0], text, sca=r)
    tiny["stage_a"].encode(noise(3, 3, 20, 28))
    tiny["stage_a"].decode(noise(3, 4, 5, 7))
    tiny["stage_a"].quantise(noise(3, 4, 5, 7))
    tiny["effnet_encoder"](noise(3, 3, 32 * 5, 32 * 7))
    for kind, channels, side in ("canny", 1, 32), ("super_resolution", 16, 1):
        hint = noise(3, channels, 5 * side, 7 * side)
        maps = randomise(ControlNet(CONTROLNETS[kind]), 0)(hint)
        tiny["stage_c"](**unet_inputs(STAGE_C, rows=3, height=4, width=6), control=maps)
    tiny["previewer"](noise(3, 16, 5, 7))
    tiny["text_encoder"](torch.randint(0, 519, (3, 11)), torch.ones(3, 11))
    tiny["image_encoder"](noise(3, 3, IMAGE.side, IMAGE.side))


def run_pipeline(folder):
    cascade = Cascade(write_folder(folder / "weights"), keep=True)
    image, prompts = Image.effect_noise((70, 90), 50), ["a red circle", "a star", "two"]
    size, few = {"width": 100, "height": 150}, {"steps": 2, "decoder_steps": 1, "images": 2}
    animation = Animation(cascade, "a red circle", **size)
    callback = show_previews(cascade, folder, animation)
    for recipe, output in zip(RECIPES, ("pil", "np", "pt")):
        cascade(prompts, "blue", recipe=recipe, output=output, variation_images=[image] * 4,
                callback=callback, **few, **size)
    text = cascade.encode_prompt(prompts, ["blue", "", "red"])
    latent = cascade.encode_semantic(image, **size)
    for init_image in (latent, latent.expand(6, -1, -1, -1)):
        latents = cascade.prior(text, steps=2, images=2, init_image=init_image, **size)
    cascade.decode(
        latents, text, steps=1, output="latent", callback=animation.add_image_latents, **size)
    masked = {"init_image": image, "mask": Image.new("L", image.size, "white"), "strength": 1.0}
    for control in CONTROLS:
        cascade.prior(text, steps=1, control=control, hint=image, **masked, **size)


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    watch, before = Watch(FILES), sys.gettrace()
    sys.settrace(watch.trace_call)
    run_networks()
    run_pipeline(tmp_path_factory.mktemp("shapes"))
    sys.settrace(before)
    return watch


def test_every_shape_next_to_the_code_is_true(watch):
    wrong = [f"{function[0]} {line}" for function, claims in watch.claims.items()
             for line in complaints(claims, watch.calls[function])]
    assert {file for file, *_ in watch.claims} == set(FILES) and not wrong, "\n".join(wrong)


def test_every_altered_size_and_every_claim_that_is_not_reached_is_rejected(watch):
    for function, claims in watch.claims.items():
        assert len(complaints(claims, {})) == len(claims)
        for i, claim in enumerate(claims):
            for other in claim.altered():
                altered = [*claims[:i], other, *claims[i + 1:]]
                assert complaints(altered, watch.calls[function]), (claim, other.shapes)


def test_every_letter_is_in_the_legend(watch):
    sizes = str([claim.shapes for claims in watch.claims.values() for claim in claims])
    legend = model.__doc__.split("Letters in shape comments")[1].split("\n\nInside")[0]
    used, explained = (set(re.findall(rf"\b{LETTER}\b", text)) for text in (sizes, legend))
    assert used and used <= explained
