"""Wrong arguments of the Python interface are errors of one line, raised before any work; what should work, works."""
import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import SHORT
from PIL import Image

import cascade
from cascade import Cascade, TextEmbeddings
from model import CascadeError

IMAGE = Image.new("RGB", (64, 64), "red")
NAN = float("nan")
HIDDEN, POOLED = torch.zeros(2, 77, 64), torch.zeros(2, 1, 64)
WRONG_TEXT = [
    (HIDDEN[:1], POOLED[:1]), (HIDDEN[:0], POOLED[:0]), (HIDDEN[0], POOLED), (HIDDEN, POOLED[:, 0]),
    (HIDDEN[..., :32], POOLED), (HIDDEN, POOLED[..., :32]), (HIDDEN * NAN, POOLED),
    (HIDDEN.int(), POOLED), (None, None)]
WRONG = {
    "prompts": [None, 3, [], [1], ["a", None], b"bytes", {"a": 1}, "\ud800", np.array(["a"]),
                *(TextEmbeddings(*wrong) for wrong in WRONG_TEXT)],
    "negative": [None, 3, [], ["a", "b"], "\ud800"],
    "width": [True, 100.5, "128", 0, 63, 8193, NAN, []], "images": [0, 1001, True, None, 2.0, "2"],
    "height": [0, -128, 10 ** 9, "", torch.tensor(64)], "decoder_steps": [None, 0, NAN, "x"],
    "seed": [-1, 2 ** 32, 1.0, None, "3", True, torch.tensor(3), np.int32(-1)],
    "steps": [None, 0, 2.0, "2", True, 1001,
              [], [1.0], [0.5, 0.5], [0.2, 0.5], [2, 0], [1, -1], [NAN, 0], [1, "0"]],
    "compression": [None, 3, 129, "64", NAN, True], "decoder_guidance": ["4", NAN, -1, [], False],
    "guidance": ["4", None, NAN, float("inf"), -1, 100.1, True, 1j], "colour": ["red"],
    "recipe": ["soup", None, [], {}, 3, True], "output": ["jpeg", None, [], 3],
    "strength": [1.5, -1, NAN, "0.5", None, True, 0.0, 0.5],  # half a step is none
    "interval": [(0.7, 0.3), None, 3, "ab", (0, 1, 2), (0, NAN), ("a", "b"), (0, 2)],
    "variation_images": [
        [], 3, [None], "nowhere.png", "", {"a": IMAGE}, np.zeros((1, 24)), torch.zeros(24),
        torch.zeros(1, 5), torch.zeros(0, 24), torch.zeros(1, 24).int(), torch.full((1, 24), NAN)],
    "init_image": [
        3, [IMAGE], "nowhere.png", False, torch.zeros(16, 2, 2), torch.zeros(1, 16, 3, 2),
        torch.zeros(2, 16, 2, 2), torch.zeros(1, 16, 2, 2).int(), torch.full((1, 16, 2, 2), NAN)]}
SETUP = {
    "lite": ["both", 1, None, [], {}], "decoder_dtype": ["fp8", torch.int8, "", False],
    "dtype": ["fp8", None, torch.int8, torch.float64, 3, [], "float16"], "colour": ["red"],
    "device": ["toaster", "cuda:99", "meta", "", None, []],
    "folder": [None, 3, "", "nowhere", [], "\ud800", "a\0b"],
    "loras": [None, "a", [3], [("a",)], [("a", "b")], [("a", True)], [(None, 1.0)]],
    "tokens": [3, ["[x]"], {"[x]": 3}, {"": "dog"}, {"[x]": " "}, {"\ud800": "dog"}]}
SAID = {"prompts": "", "variation_images": "", "init_image": "", "loras": "lora"}  # else the argument's name


def check_refused(function, name, value, **others):
    with pytest.raises(TypeError if name == "colour" else CascadeError) as error:
        function(**others | {name: value})
    message = str(error.value)
    assert len(message.splitlines()) == 1 and SAID.get(name, name) in message, message


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_before_any_work(pipeline, monkeypatch, name):
    monkeypatch.setattr(cascade, "sample", None)
    others = SHORT | {"init_image": IMAGE} if name == "strength" else SHORT
    for value in WRONG[name]:
        check_refused(pipeline, name, value, **others)


@pytest.mark.parametrize("name", SETUP)
def test_a_wrong_setup_is_refused(folder, name):
    for value in SETUP[name]:
        check_refused(Cascade, name, value, folder=folder)


def test_a_gpu_without_bf16_is_refused(folder, monkeypatch):
    """There is no GPU here: one of the generation before bf16 is played by its answers."""
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for dtypes in ({"dtype": "bf16"}, {"dtype": "fp16", "decoder_dtype": "bf16"}):
        with pytest.raises(CascadeError, match="has no bf16; use fp16 or fp32"):
            Cascade(folder, device="cuda", **dtypes)
    Cascade(folder, device="cuda", dtype="fp16")


LATENTS = torch.zeros(1, 16, 2, 2)
WRONG_LATENTS = [
    None, 3, LATENTS.numpy(), LATENTS[0], LATENTS[:0], LATENTS[:, :4], LATENTS[..., None],
    LATENTS.int(), LATENTS * NAN, LATENTS[..., :1, :1], LATENTS[:, :, :0],
    torch.zeros(1, 16, 2, 198)]


@pytest.mark.parametrize("arguments, message", [
    *(({"latents": latents}, "expected") for latents in WRONG_LATENTS),
    ({"latents": LATENTS.repeat(3, 1, 1, 1)}, "3 latents for 2 prompts: expected"),
    ({}, "1 latents for 2 prompts"), ({"width": 128}, "expected the"), ({"steps": 0}, "steps"),
    *(({"prompts": "a", "prior_steps": value}, "prior_steps") for value in (1001, "", 2.0)),
    ({"prompts": "a", "seed": -1}, "seed"),
    ({"prompts": TextEmbeddings(HIDDEN, POOLED), "negative": "blue"}, "negative: expected none")])
def test_wrong_latents_and_what_does_not_fit_them_is_refused(pipeline, arguments, message):
    with pytest.raises(CascadeError, match=message):
        pipeline.decode(**{"latents": LATENTS, "prompts": ["a", "b"], "steps": 1} | arguments)


def test_the_seeds_of_all_images_are_checked_before_any_work(pipeline):
    for seed in (2 ** 32 - 3, np.uint32(2 ** 32 - 3)):
        with pytest.raises(CascadeError, match="seed"):
            pipeline(["a", "b"], images=2, seed=seed, **SHORT)
    assert pipeline(["a", "b", "c"], seed=2 ** 32 - 3, **SHORT).isfinite().all()


# ------------------------------------------------------------------------------ what works
def test_latents_and_kept_networks_can_be_edited_and_trained(folder):
    pipeline = Cascade(folder, keep=True)
    latents = pipeline.prior("a star", steps=1, width=64, height=64)
    assert pipeline.decode(latents.mul_(1.1), "a star", steps=1)
    unet = pipeline.network("stage_c").requires_grad_(True)
    unet(latents, torch.ones(1), torch.zeros(1, 1, 64), torch.zeros(1, 7, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in unet.clf.parameters())


WITH_IMAGES = SHORT | {"init_image": IMAGE, "variation_images": IMAGE, "steps": 2, "recipe": "lcm"}


def test_networks_can_be_pickled_and_copied(pipeline):
    image = pipeline("a star", **WITH_IMAGES)
    for another in (pickle.loads(pickle.dumps(pipeline)), copy.deepcopy(pipeline)):
        assert torch.allclose(image, another("a star", **WITH_IMAGES), atol=1e-5)


def test_numbers_of_numpy_are_numbers(pipeline):
    numbers = {"seed": np.int64(3), "guidance": np.float32(4), "steps": np.int16(1)}
    image = pipeline("a star", **SHORT | numbers)
    assert torch.equal(image, pipeline("a star", seed=3, **SHORT))


def test_the_default_dtype_changes_nothing(folder):
    image = Cascade(folder)("a star", **WITH_IMAGES)
    try:
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            assert torch.equal(Cascade(folder)("a star", **WITH_IMAGES), image)
    finally:
        torch.set_default_dtype(torch.float32)
