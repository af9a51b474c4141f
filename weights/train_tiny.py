"""Trains a whole small Stable Cascade from nothing on two CPU cores, with the official classes unchanged.

    python weights/train_tiny.py all                            # one stage after the other: some four hours of one core
    python weights/train_tiny.py all --quick --out /tmp/quick   # a minute: proves that everything runs, draws nothing

Stages that do not need each other can run side by side, one thread each: `a` and `encoder` first, then `b` and `c`.
Every stage continues from its last checkpoint in --work, so it can be killed at any time, and writes its result to
--out under the official single-file names, where `python cascade.py` finds it.

The chapters, in the order of the file:

    tokenizer   the merges of a byte-pair vocabulary, from captions
    a           Stage A: picture <-> 4x32x32 latent, by reconstruction
    encoder     picture -> 16x3x3 semantic latent, with a plain decoder beside it that is thrown away
    b           Stage B: image latent from semantic latent, by predicting noise
    c           Stage C and the text tower: semantic latent from a caption, by predicting noise
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BytePairTokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                           # noqa: E402
from model import (Previewer, PreviewerConfig, SemanticEncoder, SemanticEncoderConfig,  # noqa: E402
                   StageA, StageAConfig, UNet, UNetConfig, load)
from sampler import alpha_bar                                                           # noqa: E402
from text_encoder import END, START, TextConfig, TextEncoder, Tokenizer                 # noqa: E402

# ------------------------------------------------------------------------------------------------ the sizes

STAGE_A = StageAConfig(widths=(16, 48), deep_blocks=2, codes=64)
ENCODER = SemanticEncoderConfig(stem=16, stages=((True, 1, 16, 1), (True, 4, 24, 1), (True, 4, 48, 1),
                                                 (False, 4, 64, 2), (False, 4, 96, 2), (False, 4, 96, 1)), head=256)
STAGE_B = UNetConfig(widths=(64, 128, 192), down=("RT", "RTRT", "RTA"), up=("RTARTA", "RTRT", "RTRT"),
                     down_repeat=(1, 1, 1), up_repeat=(1, 1, 1), c_cond=64, latent=4, patch=2, extras=("sca",),
                     text=128, semantic=16)
STAGE_C = UNetConfig(widths=(192, 192), down=("RTA", "RTA"), up=("RTA", "RTA"), down_repeat=(1, 1), up_repeat=(1, 1),
                     c_cond=128, latent=16, patch=1, extras=("sca", "crp"), text=128, image=64, switch=(False,))
TEXT = TextConfig(width=128, layers=3, hidden=256, projection=128)      # the vocabulary is what the tokenizer says

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


# ------------------------------------------------------------------------------------------------ the loop

def train(name, network, loss_of, steps, lr, work, report=None):
    """AdamW, a short warm-up, a cosine to zero, and a moving average of the weights, which is what is kept.

    loss_of(step) -> a dict of losses whose sum is minimised. Returns the network with the averaged weights.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {key: value.clone() for key, value in network.state_dict().items()}
    checkpoint, start = work / f"{name}.safetensors", 0
    if checkpoint.exists():
        start = resume(checkpoint, network, optimizer, average)
        print(f"{name}: continues at step {start}", flush=True)
    network.train()
    clock, saved, told, every = time.time(), time.time(), [], min(100, steps // 4)
    for step in range(start, steps):
        torch.manual_seed(step)                                         # the same noise after a resume
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / min(200, steps // 4),
                                                   0.5 + 0.5 * math.cos(math.pi * step / steps))
        losses = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
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
            save_checkpoint(checkpoint, network, optimizer, average, step + 1)
            saved = time.time()
    network.load_state_dict(average)
    return network.eval()


def save_checkpoint(path, network, optimizer, average, step):
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    write(tensors, path, {"step": str(step)})


def resume(path, network, optimizer, average):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    part = {kind: {key[len(kind) + 1:]: value for key, value in tensors.items() if key.startswith(kind + ".")}
            for kind in ("network", "average", "optimizer")}
    network.load_state_dict(part["network"])
    for key, value in part["average"].items():
        average[key].copy_(value)
    state = {}
    for key, value in part["optimizer"].items():
        i, key = key.split(".")
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


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

    network = train("a", network, loss_of, options.steps or 8000, 3e-3, options.work)
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
        with torch.autocast("cpu", torch.bfloat16):
            seen = network.decoder(latent + NOISE * torch.randn_like(latent)).float()
        image, names = shrink(image, 48), shrink(names, 48)
        weight = 1 + 4 * (names.amax(1, keepdim=True) > 0.2)            # things are few pixels, and what matters
        return {"picture": (weight * (seen[:, :3] - image) ** 2).mean(),
                "names": (weight * (seen[:, 3:] - names) ** 2).mean()}

    network = train("encoder", network, loss_of, options.steps or 3000, 2e-3, options.work)
    publish(network.encoder, options.out / "effnet_encoder.safetensors")


# ------------------------------------------------------------------------------------------------ both UNets

def start_from_the_noise(unet):
    """Initial weights under which the untrained network answers epsilon = x, right at t = 1 where the sampler magnifies
    errors sixteen-fold. x travels as pairs of channels (+x, -x), among constant channels that keep the norms from
    dividing its size away, through the outermost skip: GELU(x) - GELU(-x) = x. All other blocks add nothing yet."""
    c, k = unet.config.widths[0], unet.config.latent * unet.config.patch ** 2
    enter, leave = unet.embedding[1], unet.clf[1]
    constants = 6 * torch.tensor([1.0, -1.0]).repeat((c - 2 * k) // 2)
    scale = (constants.square().sum() + 2 * k).div(c).sqrt().item()     # what the norms divide by
    scale *= math.sqrt(3) if unet.config.semantic else 1                # Stage B adds two normed maps to it
    eye = torch.eye(k)[:, :, None, None]
    with torch.no_grad():
        for block in unet.modules():
            if hasattr(block, "channelwise"):
                block.channelwise[4].weight.zero_(), block.channelwise[4].bias.zero_()
            if hasattr(block, "mappers"):
                for name in block.mappers:
                    getattr(block, name).weight.zero_(), getattr(block, name).bias.zero_()
            if hasattr(block, "out_proj"):
                block.out_proj.weight.zero_(), block.out_proj.bias.zero_()
        enter.weight.zero_(), enter.bias.zero_()
        enter.weight[:k], enter.weight[k:2 * k] = eye, -eye
        enter.bias[2 * k:] = constants
        for mapper in [unet.effnet_mapper, unet.pixels_mapper] if unet.config.semantic else []:
            mapper[2].weight[:2 * k].zero_(), mapper[2].bias[:2 * k].zero_()
            mapper[2].weight[2 * k::2].copy_(-mapper[2].weight[2 * k + 1::2])
        last = unet.up_upscalers[-2][1]
        last = last if hasattr(last, "weight") else last.blocks[1]      # Stage C's lies in a sequence of its own
        last.weight.zero_(), last.bias.zero_()
        first, second = unet.up_blocks[-1][0].channelwise[0], unet.up_blocks[-1][0].channelwise[4]
        first.weight[:2 * c].zero_(), first.bias[:2 * c].zero_()
        first.weight[:c, c:], first.weight[c:2 * c, c:] = torch.eye(c), -torch.eye(c)
        second.weight[:, :c], second.weight[:, c:2 * c] = torch.eye(c), -torch.eye(c)
        leave.weight.zero_(), leave.bias.zero_()
        leave.weight[:, :k], leave.weight[:, k:2 * k] = eye * scale / 2, -eye * scale / 2


def noise_loss(unet, x0, focus=1.0, **condition):
    """Epsilon prediction on the cosine schedule. The weight makes it nearly a loss on x0, bounded; times near 1, where
    the sampler decides what there will be, come more often, and a tenth lie right beside it, at its first step."""
    t = torch.rand(len(x0)).sqrt()
    t = torch.where(torch.rand(len(x0)) < 0.1, 0.97 + 0.03 * t, t)
    ab = alpha_bar(t)
    noise = torch.randn_like(x0)
    x = ab.sqrt()[:, None, None, None] * x0 + (1 - ab).sqrt()[:, None, None, None] * noise
    with torch.autocast("cpu", torch.bfloat16):
        epsilon = unet(x, t, **condition)
    error = (focus * (epsilon.float() - noise) ** 2).mean((1, 2, 3))
    return {"noise": (error * ((1 - ab) / ab).clamp(0.1, 20)).mean()}


def cache(options, name, batches, compute):
    """What a frozen network says of many pictures, computed once and kept in --work: (count, C, y, x), fp16."""
    path, clock = options.work / f"cache_{name}.safetensors", time.time()
    if not path.exists():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts = [compute(pictures(batch)).half() for batch in batches]
        write({"latents": torch.cat(parts)}, path)
        print(f"{name}: {len(parts)} batches of latents cached in {time.time() - clock:.0f} s", flush=True)
    return load_file(path)["latents"]


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
    unet = UNet(STAGE_B)
    start_from_the_noise(unet)
    nn.init.zeros_(unet.clip_mapper.weight)

    def loss_of(step):
        rows = torch.randint(len(images), (32,))
        semantic = semantics[rows].float()                                              # (32, 16, 3, 3)
        semantic = semantic + NOISE * torch.randn_like(semantic)
        semantic = semantic * (torch.rand(len(rows)) > 0.1)[:, None, None, None]
        x0 = images[rows].float()                                                       # (32, 4, 32, 32)
        things = (x0 - x0[:, :, :1, :1]).square().mean(1, keepdim=True) > 0.1           # what is not like the corner
        return noise_loss(unet, x0, 1 + 4 * things, clip_text_pooled=torch.zeros(len(rows), 1, 128), effnet=semantic)

    unet = train("b", unet, loss_of, options.steps or 16000, 1e-3, options.work)
    publish(unet, options.out / "stage_b.safetensors")


# ------------------------------------------------------------------------------------------------ Stage C

def train_c(options):
    """From a caption to the semantic latent; the text tower learns with it. A tenth of the captions are empty, for
    guidance."""
    encoder = load(options.out / "effnet_encoder.safetensors", dtype=torch.float32)
    batches = [scenes(64, [4, i], two=0.35) for i in range(options.count // 64 if options.count else 1920)]
    semantics = cache(options, "c_semantics", batches, lambda image: encoder(shrink(image, SEMANTIC_SIDE)))
    all_scenes = sum(batches, [])                                                       # 122880
    tokenizer = Tokenizer(options.out / "tokenizer")
    vocabulary = tokenizer.bpe.get_vocab_size()
    text = TextEncoder(replace(TEXT, vocabulary=vocabulary, end=tokenizer.end))
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.2)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.1)
    network = nn.ModuleDict({"unet": UNet(STAGE_C), "text": text})
    start_from_the_noise(network.unet)

    def loss_of(step):
        rng = np.random.default_rng([5, step])
        rows = rng.integers(len(all_scenes), size=64)
        ids, mask = tokenizer(["" if rng.random() < 0.1 else shapes.caption(all_scenes[i], rng) for i in rows])
        with torch.autocast("cpu", torch.bfloat16):
            hidden, pooled = network.text(ids, mask)
        return noise_loss(network.unet, semantics[rows].float(), clip_text_pooled=pooled, clip_text=hidden)

    network = train("c", network, loss_of, options.steps or 4600, 1e-3, options.work)
    publish(network.unet, options.out / "stage_c.safetensors", {"width": str(shapes.SIDE), "height": str(shapes.SIDE)})
    publish(network.text, options.out / "text_encoder" / "model.safetensors")


STAGES = {"tokenizer": train_tokenizer, "a": train_a, "encoder": train_encoder, "b": train_b, "c": train_c}

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
        STAGES[stage](options)
