"""Trains a whole small Stable Cascade from nothing on two CPU cores, with the official classes unchanged.

    python weights/train_tiny.py all                            # one stage after the other: some five hours of one core
    python weights/train_tiny.py all --quick --out /tmp/quick   # a minute: proves that everything runs, draws nothing

The chapters, in the order of the file (b needs a and encoder, c needs clip):

    tokenizer   the merges of a byte-pair vocabulary, from captions
    a           Stage A: picture <-> 4x32x32 latent, by reconstruction
    encoder     picture -> 16x3x3 semantic latent, with a plain decoder beside it that is thrown away
    clip        the text tower and the image tower, by telling which caption belongs to which picture
    b           Stage B: image latent from semantic latent, by predicting noise
    c           Stage C: semantic latent from a caption, by predicting noise
    previewer   semantic latent -> a picture of 24x24, by reconstruction

Every stage goes on from its last checkpoint in --work, so it can be killed at any time, leaves pictures of what it has
learned so far there, and writes its result to --out under the official name, where `python cascade.py` finds it.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BytePairTokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                                           # noqa: E402
from model import (Previewer, PreviewerConfig, SemanticEncoder, SemanticEncoderConfig, StageA,          # noqa: E402
                   StageAConfig, UNet, UNetConfig, load)
from sampler import alpha_bar                                                                           # noqa: E402
from text_encoder import END, START, ImageConfig, ImageEncoder, TextConfig, TextEncoder, Tokenizer      # noqa: E402
from text_encoder import load as load_tower                                                             # noqa: E402
from wire import wire                                                                                   # noqa: E402

STAGE_A = StageAConfig(widths=(16, 48), deep_blocks=2, codes=64)
ENCODER = SemanticEncoderConfig(stem=16, stages=((True, 1, 16, 1), (True, 4, 24, 1), (True, 4, 48, 1),
                                                 (False, 4, 64, 2), (False, 4, 96, 2), (False, 4, 96, 1)), head=256)
STAGE_B = UNetConfig(widths=(64, 128, 192), down=("RT", "RT", "RTA"), up=("RTARTARTA", "RTRT", "RTRT"),
                     down_repeat=(1, 1, 1), up_repeat=(1, 1, 1), c_cond=64, latent=4, patch=2, extras=("sca",),
                     text=128, semantic=16)
STAGE_C = UNetConfig(widths=(192, 192), down=("RTA", "RTA"), up=("RTA", "RTA"), down_repeat=(1, 1), up_repeat=(1, 1),
                     c_cond=128, latent=16, patch=1, extras=("sca", "crp"), text=128, image=128, switch=(False,))
TEXT = TextConfig(length=32, width=128, layers=3, hidden=256, projection=128)       # the tokenizer says its vocabulary
IMAGE = ImageConfig(side=64, patch=8, width=128, layers=4, hidden=256, projection=128)
PREVIEWER = PreviewerConfig((128, 96, 48, 32))
SEMANTIC_SIDE = 96          # the encoder sees pictures at 3/4 of their size, as in the official cascade
NOISE = 0.1                 # added to semantic latents while decoders train, so that Stage C may err that much


# ------------------------------------------------------------------------------------------------ the world, in batches

def scenes(count, seed, two=0.5):
    """Always the same for a seed; a stage takes its own range of seeds, so no two steps see the same batch."""
    rng = np.random.default_rng(seed)
    return [shapes.sample_scene(rng, two) for _ in range(count)]


def pictures(batch):
    """Scenes -> (B, 3, 128, 128) in [0, 1]."""
    return torch.from_numpy(np.stack([shapes.render(scene) for scene in batch])).permute(0, 3, 1, 2).float() / 255


def shrink(image, side):
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)


def cache(options, name, batches, compute):
    """What a frozen network says of many pictures, computed once and kept in --work: (count, ...), fp16."""
    path, clock = options.work / f"cache_{name}.safetensors", time.time()
    if not path.exists():
        with torch.inference_mode():
            parts = [compute(pictures(batch)).half() for batch in batches]
        write({"latents": torch.cat(parts)}, path)
        print(f"{name}: {len(parts)} batches of latents cached in {time.time() - clock:.0f} s", flush=True)
    return load_file(path)["latents"]


# ------------------------------------------------------------------------------------------------ the loop

def adamw(network, lr):
    return [torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)]


def muon(network, lr):
    """Matrices learn from orthogonalised gradients (Jordan et al., Muon, 2024), more from every step; the rest, and
    what maps conditions, from AdamW's. Nothing decays: what is wired must stay."""
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if p.dim() == 2 and "mapper" not in name and "embedding" not in name]
    others = [p for name, p in learning if p.dim() != 2 or "mapper" in name or "embedding" in name]
    return [torch.optim.Muon(matrices, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0)]


def train(name, network, loss_of, steps, lr, work, method=adamw, show=None):
    """A short warm-up (after a resume too), a cosine to zero, and a moving average of the weights, which is what stays.
    loss_of(step) is a dict of losses whose sum is minimised, show() what the network can do by now, (B, 3, H, W)."""
    checkpoint, start, clock, told, every = work / f"{name}.safetensors", 0, time.time(), [], min(100, steps // 4)
    if checkpoint.exists():
        state = load_file(checkpoint)
        network.load_state_dict({key: state[f"network.{key}"] for key in network.state_dict()})
        with safe_open(checkpoint, framework="pt") as file:
            start = int(file.metadata()["step"])
        print(f"{name}: continues at step {start}", flush=True)
    average = {key: state[f"average.{key}"] if start else value.clone() for key, value in network.state_dict().items()}
    optimizers, saved = method(network.train(), lr), time.time()
    for step in range(start, steps):
        torch.manual_seed(step)
        losses = loss_of(step)
        network.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * min((step - start + 1) / min(200, steps // 4),
                                                       0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimizer.step()
        decay = min(0.999, (step + 1) / (step + 20))
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        told.append([value.item() for value in losses.values()])
        if (step + 1) % every == 0:
            means = "  ".join(f"{key} {mean:.5f}" for key, mean in zip(losses, np.mean(told, 0)))
            print(f"{name} {step + 1}/{steps}  {means}  {time.time() - clock:.0f} s", flush=True)
            told = []
        if time.time() - saved > 120 or step == steps - 1:
            state = {f"network.{key}": value for key, value in network.state_dict().items()}
            state |= {f"average.{key}": value for key, value in average.items()}
            write(state, checkpoint, {"step": str(step + 1)})
            if show:
                with torch.inference_mode():
                    row = torch.cat([*(network.eval() and show())], dim=2)              # (3, H, B * W)
                Image.fromarray((row.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(work / f"{name}.png")
            network.train()
            saved = time.time()
    network.load_state_dict(average)
    return network.eval()


def write(tensors, path, metadata=None):
    """All or nothing: a kill while writing leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, f"{path}.part", metadata)
    os.replace(f"{path}.part", path)


def publish(network, path, metadata=None):
    """The result: fp16, but for what a batch norm counts."""
    write({key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()},
          path, metadata)


# ------------------------------------------------------------------------------------------------ tokenizer

def train_tokenizer(options):
    """CLIP's vocabulary in small: 256 bytes, the same at a word's end, then merges until every word of the captions is
    one token, then start and end, in CLIP's order."""
    rng = np.random.default_rng(0)
    captions = [shapes.caption(scene, rng).lower() for scene in scenes(20000, seed=0)]
    bpe = BytePairTokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + [START, END]
    folder = options.out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    print(f"tokenizer: {len(words)} tokens, {len(merges)} merges")


# ------------------------------------------------------------------------------------------------ Stage A

def train_a(options):
    """Reconstruction, on 64 x 64 crops: Stage A only looks at what is near."""
    network = StageA(STAGE_A)
    for block in network.modules():
        if hasattr(block, "gammas"):
            nn.init.constant_(block.gammas[2], 0.3), nn.init.constant_(block.gammas[5], 0.3)
    nn.init.normal_(network.vquantizer.codebook.weight)

    def loss_of(step):
        image = pictures(scenes(16, seed=[1, step]))
        corner = torch.randint(0, 17, (2,)) * 4
        image = image[:, :, corner[0]:corner[0] + 64, corner[1]:corner[1] + 64]
        seen = network.decode(network.encode(image))
        return {"mse": F.mse_loss(seen, image), "l1": 0.1 * F.l1_loss(seen, image)}

    def show():
        return network.decode(network.encode(pictures(scenes(8, 8))))

    network = train("a", network, loss_of, options.steps or 8000, 3e-3, options.work, show=show)
    publish(network, options.out / "stage_a.safetensors")


# ------------------------------------------------------------------------------------------------ the semantic encoder

def train_encoder(options):
    """The official encoder started from an ImageNet classifier, so it knew names before it learned to compress. Ours
    learns both at once: a plain decoder must paint from the latent, at 48 x 48, the picture and beside it the same
    scene with every shape in a colour of its own on black, which asks for the name of what lies there."""
    codes = dict(zip(shapes.SHAPES, shapes.COLOURS))                    # shape -> the colour that names it
    network = nn.ModuleDict({"encoder": SemanticEncoder(ENCODER),
                             "decoder": Previewer(PreviewerConfig((192, 128, 64, 32, 16)))})
    network.decoder.blocks[-1] = nn.Conv2d(16, 6, 1)
    network.to(memory_format=torch.channels_last)

    def loss_of(step):
        batch = scenes(64, seed=[2, step])
        names = [replace(scene, things=tuple(replace(thing, colour=codes[thing.shape]) for thing in scene.things),
                         ground="black") for scene in batch]
        image, names = pictures(batch), pictures(names)
        latent = network.encoder(shrink(image, SEMANTIC_SIDE).contiguous(memory_format=torch.channels_last))
        seen = network.decoder(latent + NOISE * torch.randn_like(latent))
        image, names = shrink(image, 48), shrink(names, 48)
        weight = 1 + 4 * (names.amax(1, keepdim=True) > 0.2)            # things are few pixels, and what matters
        return {"picture": (weight * (seen[:, :3] - image) ** 2).mean(),
                "names": (weight * (seen[:, 3:] - names) ** 2).mean()}

    def show():
        return network.decoder(network.encoder(shrink(pictures(scenes(8, 8)), SEMANTIC_SIDE)))[:, :3]

    network = train("encoder", network, loss_of, options.steps or 3000, 2e-3, options.work, show=show)
    publish(network.encoder, options.out / "effnet_encoder.safetensors")


# ------------------------------------------------------------------------------------------------ the two CLIP towers

def described(options):
    """Scenes that will be told in captions, and their semantic latents (122880, 16, 3, 3)."""
    encoder = load(options.out / "effnet_encoder.safetensors", dtype=torch.float32)
    batches = [scenes(64, [4, i], two=0.6) for i in range(options.count // 64 if options.count else 1920)]
    return sum(batches, []), cache(options, "semantics", batches, lambda image: encoder(shrink(image, SEMANTIC_SIDE)))


def train_clip(options):
    """Of 128 captions and 128 pictures, which belong together? Asked that alone, towers so small that see so little
    learn the colours and not much more. So they must also tell the semantic latent, each from its one vector and both
    through the same plain decoder, which is thrown away: that asks for shapes, sizes and who stands where."""
    tokenizer = Tokenizer(options.out / "tokenizer", TEXT.length)
    text = TextEncoder(replace(TEXT, vocabulary=tokenizer.bpe.get_vocab_size(), end=tokenizer.end))
    image, all_scenes, semantics = ImageEncoder(IMAGE), *described(options)
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.2)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.1)
    nn.init.normal_(image.vision_model.embeddings.position_embedding.weight, std=0.1)
    decoder = nn.Sequential(nn.Linear(TEXT.projection, 512), nn.GELU(), nn.Linear(512, 144))
    network = nn.ModuleDict({"text": text, "image": image, "decoder": decoder})
    network.scale = nn.Parameter(torch.tensor(2.7))                                     # of the logits, as a logarithm

    def loss_of(step):
        rng = np.random.default_rng([6, step])
        rows = rng.integers(len(all_scenes), size=128)
        batch, latents = [all_scenes[i] for i in rows], semantics[rows].float().flatten(1)      # (128, 144)
        ids, mask = tokenizer([shapes.caption(scene, rng) for scene in batch])
        longest = int(mask.sum(1).max())                                                # nobody reads what follows
        said = network.text(ids[:, :longest], mask[:, :longest])[1].squeeze(1)          # (128, 128)
        seen = network.image(shrink(pictures(batch), IMAGE.side))                       # (128, 128)
        logits, pairs = network.scale.exp() * F.normalize(seen) @ F.normalize(said).T, torch.arange(128)
        return {"caption": F.cross_entropy(logits, pairs), "picture": F.cross_entropy(logits.T, pairs),
                "said": 5 * F.mse_loss(network.decoder(said), latents),
                "seen": 5 * F.mse_loss(network.decoder(seen), latents)}

    network = train("clip", network, loss_of, options.steps or 2800, 2e-3, options.work, muon)
    publish(network.text, options.out / "text_encoder" / "model.safetensors")
    publish(network.image, options.out / "image_encoder" / "model.safetensors")


# ------------------------------------------------------------------------------------------------ both UNets

def noise_loss(unet, x0, focus=1.0, **condition):
    """Epsilon prediction on the cosine schedule, in fp32: half precision would drown x0 near t = 1. The weight makes it
    a loss on x0, bounded; late times come more often, and a tenth lie right beside the sampler's first."""
    t = torch.rand(len(x0)) ** 0.4
    t = torch.where(torch.rand(len(x0)) < 0.1, 0.97 + 0.03 * t, t)
    ab = alpha_bar(t)
    noise = torch.randn_like(x0)
    x = ab.sqrt()[:, None, None, None] * x0 + (1 - ab).sqrt()[:, None, None, None] * noise
    error = (focus * (unet(x, t, **condition) - noise) ** 2).mean((1, 2, 3))
    return {"noise": (error * ((1 - ab) / ab).clamp(0.1, 200)).mean()}


def guess(unet, x0, t=0.9, **condition):
    """What the network makes of x0 seen through the noise of time t."""
    ab, noise = alpha_bar(torch.tensor(t)), torch.randn_like(x0)
    x = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
    return (x - (1 - ab).sqrt() * unet(x, torch.full((len(x),), t), **condition)) / ab.sqrt()


# ------------------------------------------------------------------------------------------------ Stage B

def train_b(options):
    """From the semantic latent, a little noised, to the image latent. The text adds nothing to what the latent says in
    this world, so it is fed as zeros and its mapper's weights stay zero: any prompt gives the same condition. A tenth
    of the semantic latents are zeros too, for guidance. Things are a seventh of the picture and most of what matters,
    so errors on them count five times; that moves no optimum, only the way there."""
    stage_a = load(options.out / "stage_a.safetensors", dtype=torch.float32)
    encoder = load(options.out / "effnet_encoder.safetensors", dtype=torch.float32)
    batches = [scenes(64, [3, i]) for i in range(options.count // 64 if options.count else 640)]
    images = cache(options, "b_images", batches, stage_a.encode)                        # (40960, 4, 32, 32)
    semantics = cache(options, "b_semantics", batches, lambda image: encoder(shrink(image, SEMANTIC_SIDE)))
    unet = wire(UNet(STAGE_B))
    nn.init.zeros_(unet.clip_mapper.weight)

    def loss_of(step):
        rows = torch.randint(len(images), (32,))
        semantic = semantics[rows].float()                                              # (32, 16, 3, 3)
        semantic = semantic + NOISE * torch.randn_like(semantic)
        semantic = semantic * (torch.rand(len(rows)) > 0.1)[:, None, None, None]
        x0 = images[rows].float()                                                       # (32, 4, 32, 32)
        things = (x0 - x0[:, :, :1, :1]).square().mean(1, keepdim=True) > 0.1           # what is not like the corner
        return noise_loss(unet, x0, 1 + 4 * things, clip_text_pooled=torch.zeros(len(rows), 1, 128), effnet=semantic)

    def show():
        return stage_a.decode(guess(unet, images[:8].float(), clip_text_pooled=torch.zeros(8, 1, 128),
                                    effnet=semantics[:8].float()))

    unet = train("b", unet, loss_of, options.steps or 11000, 2e-3, options.work, muon, show)
    publish(unet, options.out / "stage_b.safetensors")


# ------------------------------------------------------------------------------------------------ Stage C

def train_c(options):
    """From a caption to the semantic latent, the towers frozen. A tenth of the captions are empty, for guidance, and a
    tenth of the rows see the picture's own embedding, as in the original; half of these have no caption beside it."""
    text, image = (load_tower(options.out / tower / "model.safetensors", dtype=torch.float32)
                   for tower in ("text_encoder", "image_encoder"))
    tokenizer = Tokenizer(options.out / "tokenizer", TEXT.length)
    all_scenes, semantics = described(options)
    batches = [all_scenes[i:i + 64] for i in range(0, len(all_scenes), 64)]
    images = cache(options, "images", batches, lambda picture: image(shrink(picture, IMAGE.side)))
    unet = wire(UNet(STAGE_C))

    def loss_of(step):
        rng = np.random.default_rng([5, step])
        rows, shown = rng.integers(len(all_scenes), size=128), rng.random(128) < 0.1
        silent = rng.random(128) < np.where(shown, 0.5, 0.1)
        captions = ["" if hush else shapes.caption(all_scenes[i], rng) for i, hush in zip(rows, silent)]
        with torch.no_grad():
            hidden, pooled = text(*tokenizer(captions))                                 # (128, 32, 128), (128, 1, 128)
        picture = images[rows].float() * torch.from_numpy(shown)[:, None]               # (128, 128)
        return noise_loss(unet, semantics[rows].float(), clip_text_pooled=pooled, clip_text=hidden,
                          clip_img=picture)

    unet = train("c", unet, loss_of, options.steps or 5300, 2e-3, options.work, muon)
    publish(unet, options.out / "stage_c.safetensors", {"width": str(shapes.SIDE), "height": str(shapes.SIDE)})


# ------------------------------------------------------------------------------------------------ the previewer

def train_previewer(options):
    """Reconstruction again, from the semantic latent alone."""
    encoder = load(options.out / "effnet_encoder.safetensors", dtype=torch.float32)
    network = Previewer(PREVIEWER)

    def loss_of(step):
        image = pictures(scenes(64, [7, step]))
        with torch.no_grad():
            latent = encoder(shrink(image, SEMANTIC_SIDE))
        seen = network(latent + NOISE * torch.randn_like(latent))
        return {"mse": F.mse_loss(seen, shrink(image, seen.shape[-1]))}

    def show():
        return network(encoder(shrink(pictures(scenes(8, 8)), SEMANTIC_SIDE)))

    network = train("previewer", network, loss_of, options.steps or 2000, 3e-3, options.work, show=show)
    publish(network, options.out / "previewer.safetensors")


STAGES = {name: globals()[f"train_{name}"] for name in ("tokenizer", "a", "encoder", "clip", "b", "c", "previewer")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="where the finished files go")
    parser.add_argument("--work", type=Path, help="for checkpoints and caches (default: work, beside OUT)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    options.work = options.work or options.out.parent / "work"
    options.steps, options.count = (20, 128) if options.quick else (None, None)
    torch.set_num_threads(options.threads)
    for stage in STAGES if "all" in options.stages else options.stages:
        torch.manual_seed(0)
        STAGES[stage](options)
