"""Fine-tunes Stage C or Stage B on a folder of images (x.png, x.jpg) with captions (x.txt).

    python weights/finetune.py DATA --what lora --out lora.safetensors
    python weights/finetune.py DATA --what full --out stage_c.safetensors
    python weights/finetune.py DATA --what controlnet --kind canny --out canny.safetensors
    python weights/finetune.py --plan                       # the memory that each of these needs

The default is the tiny cascade; --weights FOLDER trains other weights. weights/README.md says how to use the results.

Images and captions are encoded once, before training. A checkpoint and sample images are saved next to OUT after every
--save-every updates. The same command continues from the checkpoint, and ends with the same weights as a run without
interruption.

Loss, weighting, dropout of conditions, optimiser and defaults are those of the original code (training.py). It differs
in the following, mostly to stay short:

- Images are cropped to one size; the original has batches of several aspect ratios.
- There is no dropout inside the network (the original has 0.1, except when it trains LoRAs) and no warm-up (the
  original's is one update at rate 0).
- A LoRA may also train Stage B (--stage b).
- An inpainting ControlNet learns from random rectangles; the original finds objects with a network of its own.
- --weight x0 is new. It suits short trainings, as on the tiny cascade: the original's weights hardly count the noisiest
  latents, where the content of an image is decided.

Shapes: B batch, N images, L tokens, semantic latents (B, 16, Hc, Wc), image latents (B, 4, Hb, Wb).
"""
import argparse
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import memory                                                                           # noqa: E402
from adapters import (                                                                  # noqa: E402
    add_lora, add_tokens, lora_tensors, make_hint, mask_pixels, new_controlnet,
)
from cascade import (                                                                   # noqa: E402
    CONTROLS, Cascade, load_pixels, png, to_pillow, token_and_word, write_file,
)
from model import (                                                                     # noqa: E402
    CONTROL_BLOCKS, CascadeError, Weights, exists, load, out_of_memory, reading, require,
)
from sampler import RECIPES, generators, sample                                         # noqa: E402
from training import (                                                                  # noqa: E402
    AdaptiveWeight, Training, focus_on_objects, noise_loss, p2_weight, pyramid_noise, save, x0_weight,
)
from wire import fix, fixed_rows                                                        # noqa: E402

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLES = 4                                             # sample images, of the first captions


# ---- data --------------------------------------------------------------------------------------------

def read_folder(folder):
    """The image files and their captions, in the order of their names."""
    require(folder.is_dir(), f"{folder}: expected a folder of images with captions")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGES]
    require(files, f"{folder}: expected images ({', '.join(IMAGES)}), found none")
    captions = []
    for path in files:
        with reading(path, "an image"), Image.open(path) as image:
            image.verify()
        with reading(path.with_suffix(".txt"), "a caption in UTF-8"):
            captions.append(path.with_suffix(".txt").read_text("utf-8").strip())
    return files, captions


class Data:
    """Everything that a training reads, encoded by the frozen networks of a cascade."""
    def __init__(self, options, cascade, files, captions):
        self.options = options
        self.captions = captions
        self.device = cascade.device
        size = {"width": options.width, "height": options.height}
        self.images = None                              # CLIP embeddings: (N, E)
        self.hints = None

        def semantic(file):
            return cascade.encode_semantic(file, **size)                                # (1, 16, Hc, Wc)

        def pixels(file):
            return load_pixels(file, **size, compression=32)                            # (1, 3, H, W)

        def image_latent(file):
            stage_a = cascade.network("stage_a")
            return stage_a.encode(pixels(file).to(cascade.device, cascade.dtypes["stage_a"]))

        self.samples = encode("samples", files[:SAMPLES], semantic)
        if options.token:
            self.tokenizer, self.encoder, self.new_tokens = add_tokens(cascade, options.token)
        else:
            texts = encode("captions", [*captions, ""], lambda text: encode_text(cascade, text))
            self.hidden = texts[:, :-1]                                                 # (N + 1, L, D)
            self.pooled = texts[:, -1:]                                                 # (N + 1, 1, D)
        if options.stage == "c":
            self.x0 = encode("semantic latents", files, semantic)
            if has_network(cascade, "image_encoder"):
                self.images = encode("image embeddings", files, cascade.encode_image)
        else:
            self.x0 = encode("image latents", files, image_latent)
            self.semantics = []                         # at several sizes: (N, 16, Hc, Wc) each
            low, high = (int(scale * options.height) // 32 for scale in options.semantic_scale)
            for rows in range(low, high + 1):
                sides = 32 * rows, 32 * (rows * options.width // options.height)
                self.semantics.append(encode(
                    f"semantic latents of {sides[0]} x {sides[1]} pixels", files,
                    lambda file: cascade.encode_pixels(F.interpolate(pixels(file), sides))))
        if options.what == "controlnet":
            self.hints = encode(
                "hints", files,
                lambda file: make_hint(options.kind, cascade, load_pixels(file, **size)))

    def text(self, rows, no_caption):
        """hidden (B, L, D) and pooled (B, 1, D) of the captions of these images, or of ""."""
        if self.options.token:
            captions = ["" if drop else self.captions[row] for row, drop in zip(rows, no_caption)]
            ids, mask = self.tokenizer(captions)
            return self.encoder(ids.to(self.device), mask.to(self.device))
        rows = torch.where(no_caption, len(self.captions), rows)
        return self.to_device(self.hidden[rows]), self.to_device(self.pooled[rows])

    def to_device(self, rows):
        return rows.to(self.device).float()

    def hint(self, rows):
        """What the ControlNet sees of these images; for inpainting with a new mask each time."""
        hint = self.hints[rows].float()
        if self.options.kind == "inpainting":
            hint = torch.stack([mask_pixels(image) for image in hint])
        return hint.to(self.device)

    def batch(self):
        """A random batch: x0, the condition, and the numbers of the images."""
        rows = torch.randint(len(self.captions), (self.options.batch,))                 # (B)
        hidden, pooled = self.text(rows, no_caption=torch.rand(len(rows)) < 0.05)
        if self.options.stage == "c":
            condition = {"clip_text": hidden, "clip_text_pooled": pooled}
            if self.images is not None:
                shown = torch.rand(len(rows), 1) < 0.1
                condition["clip_img"] = self.to_device(self.images[rows] * shown)       # (B, E)
        else:
            size = int(torch.randint(len(self.semantics), ()))
            shown = torch.rand(len(rows), 1, 1, 1) < 0.9
            semantic = self.to_device(self.semantics[size][rows] * shown)               # (B, 16, Hc, Wc)
            condition = {"clip_text_pooled": pooled, "effnet": semantic}
        return self.to_device(self.x0[rows]), condition, rows


def encode(what, items, function):
    """function(item) -> (1, ...) for every item, in fp16 on the CPU: (N, ...)."""
    with torch.no_grad(), tqdm(items, what, leave=False) as progress:
        return torch.cat([function(item).half().cpu() for item in progress])


def encode_text(cascade, caption):
    """The rows of the text encoder, and after them the pooled one: (1, L + 1, D)."""
    text = cascade.encode_prompt(caption)
    return torch.cat([text.hidden[:1], text.pooled[:1]], dim=1)


def has_network(cascade, name):
    try:
        return exists(cascade.file(name))
    except CascadeError:
        return False


# ---- training ----------------------------------------------------------------------------------------

def make_preview(options, cascade, unet, controlnet, data, steps=20, guidance=4.0,
                 recipe=RECIPES["diffusers"]):
    """Returns a function that adds a row to OUT.png: an image for each of the first captions."""
    rows = []
    size = {"width": options.width, "height": options.height}

    @torch.no_grad()
    def preview():
        images = []
        for i in range(len(data.samples)):
            text = cascade.encode_prompt(data.captions[i])
            latents = data.samples[i:i + 1].float()                                     # (1, 16, Hc, Wc)
            if options.stage == "c":
                condition = {"clip_text": text.hidden, "clip_text_pooled": text.pooled}
                control = controlnet and controlnet(data.hint(torch.tensor([i])))
                latents_of_steps = sample(unet, latents.shape[1:], condition, steps, guidance,
                                          generators(i, 1), recipe, control=control)
                *_, (latents, _) = latents_of_steps
            images.extend(cascade.decode(latents, text, seed=i, output="np", **size))
        rows.append(np.concatenate(images, axis=1))                                     # (H, 4 * W, 3)
        sheet = to_pillow(np.concatenate(rows))
        write_file(options.out.with_suffix(".png"), png(sheet, {}))

    return preview


def load_unet(options):
    """The cascade, and the UNet that is trained."""
    require(options.out.suffix == ".safetensors", f"{options.out}: expected a name in .safetensors")
    require(options.out.parent.is_dir(), f"{options.out.parent}: there is no such folder")
    require(not exists(options.out), f"{options.out}: this file exists; choose another --out")
    cascade = Cascade(options.weights, options.device, lite=options.lite, keep=True)
    options.width, options.height = cascade.size(options.width, options.height)
    name = f"stage_{options.stage}"
    options.bf16 = cascade.dtypes[name] == torch.bfloat16
    dtype = torch.bfloat16 if options.bf16 and options.what != "full" else torch.float32
    unet = load(cascade.file(name), cascade.device, dtype, name)
    if options.checkpointing:
        for block in chain(*unet.down_blocks, *unet.up_blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(0)                                # for what is added to it
    return cascade, unet


def encode_data(options, cascade, unet):
    """The data, encoded. From now on the cascade loads other networks than the UNet for each preview."""
    data = Data(options, cascade, *read_folder(options.data))
    trained = ("text_encoder", "tokenizer") if options.token else ()
    cascade.kept = {key: cascade.kept[key] for key in trained} | {f"stage_{options.stage}": unet}
    cascade.keep = False
    return data


def finetune(options):
    cascade, unet = load_unet(options)
    controlnet = None
    if options.what == "lora":
        added = add_lora(unet, options.rank, options.layers, fixed_rows(unet) if options.wired else ())
        parameters = dict(nn.ModuleDict(added).named_parameters())
    elif options.what == "full":
        copy = {key: value.clone() for key, value in unet.state_dict().items()}         # not the mapped file
        unet.load_state_dict(copy, assign=True)
        unet.requires_grad_(True)
        if options.wired:
            fix(unet)
        parameters = {key: value for key, value in unet.named_parameters() if value.requires_grad}
    else:
        controlnet = new_controlnet(options, cascade, unet.config.residual_widths)
        parameters = dict(controlnet.named_parameters())
    data = encode_data(options, cascade, unet)
    if options.token:
        parameters["new_tokens"] = data.new_tokens.change
    weight = {"p2": p2_weight, "x0": x0_weight, "adaptive": AdaptiveWeight()}[options.weight]

    def compute_loss():
        x0, condition, rows = data.batch()
        noise = torch.randn(x0.shape)
        if options.stage == "b":
            noise = pyramid_noise(noise)
        if options.kind in ("inpainting", "super_resolution"):
            noise = noise + 0.1 * torch.randn(*x0.shape[:2], 1, 1)
        u = torch.rand(len(x0))
        if controlnet:
            condition["control"] = controlnet(data.hint(rows))
        focus = focus_on_objects(x0) if options.focus else 1.0
        return noise_loss(unet, x0, noise.to(x0), u.to(x0), weight, focus, **condition)

    training = Training(options, parameters, weight)
    training.run(compute_loss, make_preview(options, cascade, unet, controlnet, data))
    metadata = None
    if options.what == "lora":
        tensors = lora_tensors(added, options.stage)
        if options.token:
            tensors["embeddings.embeddings"] = data.new_tokens.change.detach()
            tensors["embeddings.indices"] = data.new_tokens.ids
    elif options.what == "full":
        original = Weights(cascade.file(f"stage_{options.stage}"))
        metadata = original.metadata
        tensors = unet.state_dict()
        tensors = {key: value.to(original.tensor(key).dtype) for key, value in tensors.items()}
    else:
        tensors = controlnet.state_dict()
        metadata = {"blocks": json.dumps(controlnet.config.blocks)}
    save(tensors, options.out, metadata)
    training.path.unlink(missing_ok=True)


# ---- the command -------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CascadeError(f"{message} (--help explains the options)")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def make_parser(prog="finetune.py", description=__doc__):
    parser = Parser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, nargs="?", metavar="DATA", help="folder of images with captions")
    add("--plan", action="store_true", help="print the memory that training needs, and exit")
    add("--weights", type=Path, default=HERE / "tiny", help="weights folder (default: the tiny cascade)")
    add("--out", type=Path, help="the file to write")
    add("--what", choices=("lora", "full", "controlnet"), default="lora")
    add("--stage", choices=("c", "b"), default="c")
    add("--lite", action="store_true", help="the lite Stage C or B")
    add("--kind", choices=CONTROLS, help="of the ControlNet")
    add("--blocks", type=int, nargs="+",
        help="residual blocks of Stage C that the ControlNet is for (default: as the official ones)")
    add("--rank", type=positive, help="of the LoRA (default: 4)")
    add("--layers", nargs="+", metavar="TEXT",
        help="linear layers and 1x1 convolutions whose path contains one of these strings (default: .attn)")
    add("--token", type=token_and_word, action="append", metavar="NEW=WORD",
        help="a new token to train, which starts as this word")
    add("--width", type=positive, help="of the images (default: as Stage C was trained, or 1024)")
    add("--height", type=positive)
    add("--semantic-scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="Stage B: the image is encoded at sizes between these fractions (default: 0.5 1)")
    add("--updates", type=positive, default=10000, help="default: %(default)s")
    add("--batch", type=positive, default=4, help="default: %(default)s")
    add("--accumulate", type=positive, default=8, help="batches per update (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    add("--decay", action="store_true", help="let the learning rate fall to 0 along a cosine")
    add("--weight", choices=("p2", "adaptive", "x0"),
        help="of the loss (default: adaptive with --what full, but not for Stage C lite; else p2)")
    add("--focus", action="store_true", help="Stage B: count errors at objects and edges more, as train_tiny.py does")
    add("--wired", action="store_true", help="keep the weights that wire.py has fixed in the tiny cascade")
    add("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    add("--save-every", type=positive, default=500, metavar="UPDATES", help="default: %(default)s")
    add("--device", default="auto")
    return parser


DEFAULTS = {                                            # of options that only some trainings have
    "rank": ("what", "lora", 4), "layers": ("what", "lora", [".attn"]), "token": ("what", "lora", []),
    "kind": ("what", "controlnet", None), "blocks": ("what", "controlnet", CONTROL_BLOCKS),
    "semantic_scale": ("stage", "b", (0.5, 1.0)), "focus": ("stage", "b", False), "wired": ("what", "lora or full", False)}


def parse(parser, arguments):
    options = parser.parse_args(arguments)
    require(options.plan or options.data and options.out, "expected DATA and --out")
    for name, (option, value, default) in DEFAULTS.items():
        if not getattr(options, name):
            setattr(options, name, default)
        else:
            flag = f"--{name.replace('_', '-')}"
            require(getattr(options, option) in value.split(), f"{flag}: expected with --{option} {value} only")
    if options.what == "controlnet":
        require(options.kind, f"--kind: expected one of {', '.join(CONTROLS)}")
    require(options.stage == "c" or options.what != "controlnet" and not options.token,
            "--stage b: a ControlNet or a new token is for Stage C")
    require(0 < options.lr < np.inf,
            f"--lr: expected a positive number, got {options.lr}")
    low, high = options.semantic_scale
    require(0 < low <= high <= 1, f"--semantic-scale: expected 0 < LOW <= HIGH <= 1, got {low} {high}")
    if options.weight is None:
        is_adaptive = options.what == "full" and not (options.stage == "c" and options.lite)
        options.weight = "adaptive" if is_adaptive else "p2"
    return options


def main(arguments=None, parser=make_parser(), train=finetune):
    """Returns the exit status: 0, or after one line on stderr 2 (error) or 130 (interrupted)."""
    try:
        options = parse(parser, arguments)
        if options.plan:
            memory.print_table(partial(add_lora, rank=options.rank, layers=options.layers))
        else:
            train(options)
        return 0
    except CascadeError as error:
        message, status = error, 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command continues from the last checkpoint", 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message, status = "out of memory; try --checkpointing or a smaller --batch", 2
    print(f"{parser.prog}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
