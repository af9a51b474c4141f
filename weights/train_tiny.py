"""Trains a complete small Stable Cascade from scratch on two CPU cores, with the official classes.

    python weights/train_tiny.py all                            # every stage in turn
    python weights/train_tiny.py all --quick --out /tmp/quick   # a minute: tests the code, learns nothing
    python weights/train_tiny.py c --minutes 10                 # watch Stage C learn, from scratch

The stages, in the order of this file (b needs a and encoder; clip needs encoder; c needs clip):

    tokenizer   a byte-pair vocabulary, from captions
    a           Stage A: image <-> 4x32x32 latent, by reconstruction
    encoder     image -> 16x3x3 semantic latent, with a plain decoder that is discarded afterwards
    clip        text encoder and image encoder, by matching captions to images
    b           Stage B: image latent from semantic latent, by predicting noise
    c           Stage C: semantic latent from caption, by predicting noise
    previewer   semantic latent -> 24x24 image, by reconstruction

Every stage resumes from its last checkpoint in --work, so it can be interrupted at any time. It saves
sample images there, and writes its result to --out under the official name, where `python cascade.py`
finds it. With --minutes one stage starts from scratch on fewer images and adds a row to its sample images
every minute; its result goes to --work, and --out stays as it is.

Shapes: B batch, 128x128 pixels, image latents (B, 4, 32, 32), semantic latents (B, 16, 3, 3).
"""
import argparse
import hashlib
import itertools
import json
import math
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as BytePairTokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                           # noqa: E402
import text_encoder                                                                     # noqa: E402
from model import (                                                                     # noqa: E402
    Previewer, PreviewerConfig, SemanticEncoder, SemanticEncoderConfig, StageA, StageAConfig, UNet,
    UNetConfig, load,
)
from sampler import add_noise, alpha_bar, generators, predict_x0, sample                # noqa: E402
from text_encoder import (                                                              # noqa: E402
    END, START, ImageConfig, ImageEncoder, TextConfig, TextEncoder, Tokenizer,
)
from training import focus_on_objects, save                                             # noqa: E402
from wire import wire                                                                   # noqa: E402

STAGE_A = StageAConfig(widths=(16, 48), deep_blocks=2, codes=64)
ENCODER = SemanticEncoderConfig(
    stem=16,
    stages=((True, 1, 16, 1), (True, 4, 24, 1), (True, 4, 48, 1),
            (False, 4, 64, 2), (False, 4, 96, 2), (False, 4, 96, 1)),
    head=256,
)
STAGE_B = UNetConfig(
    widths=(64, 128, 192), down=("RT", "RT", "RTA"), up=("RTARTARTA", "RTRT", "RTRT"),
    down_repeat=(1, 1, 1), up_repeat=(1, 1, 1), c_cond=64, latent_channels=4, patch_size=2,
    time_conditions=("sca",), text_dim=128, semantic_channels=16,
)
STAGE_C = UNetConfig(
    widths=(192, 192), down=("RTA", "RTA"), up=("RTA", "RTA"),
    down_repeat=(1, 1), up_repeat=(1, 1), c_cond=128, latent_channels=16, patch_size=1,
    time_conditions=("sca", "crp"), text_dim=128, image_dim=128,
)
TEXT = TextConfig(length=32, width=128, layers=3, hidden=256, projection=128)   # vocabulary: later
IMAGE = ImageConfig(side=64, patch=8, width=128, layers=4, hidden=256, projection=128)
PREVIEWER = PreviewerConfig(widths=(128, 96, 48, 32))
SEMANTIC_SIDE = 96          # the encoder sees images at 3/4 of their size, as in the official cascade
ENCODER_FILE = "effnet_encoder.safetensors"
LATENT_NOISE = 0.1          # added to semantic latents while decoders train: Stage C makes errors too


# ---- batches of the synthetic dataset --------------------------------------------------------------

def sample_scenes(count, seed, two=0.6):
    """The same scenes for the same seed, a fifth of the pairs alike. Every stage has its own range of
    seeds, so no two training steps see the same batch."""
    rng = np.random.default_rng(seed)
    return [shapes.sample_scene(rng, two, alike=0.2) for _ in range(count)]


def render_batch(scenes):
    """Scenes -> images (B, 3, 128, 128) in [0, 1]."""
    images = np.stack([shapes.render(scene) for scene in scenes])                       # (B, 128, 128, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def downscale(images, side):
    size = (side, side)
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def cached(options, name, batches, network, file):
    """The output of a frozen network for many images, fp16. It is computed once for each number of
    batches and each content of the network's file, and kept in --work."""
    key = hashlib.sha256((options.out / file).read_bytes() + str(len(batches)).encode()).hexdigest()
    path = options.work / f"cache_{name}_{key[:12]}.safetensors"
    if not path.exists():
        start = time.time()
        with torch.inference_mode():
            parts = [network(render_batch(batch)).half() for batch in batches]
        save({"latents": torch.cat(parts)}, path)
        print(f"{name}: {len(parts)} batches cached in {time.time() - start:.0f} s", flush=True)
    return load_file(path)["latents"]


# ---- the training loop -----------------------------------------------------------------------------

def adamw(network, lr):
    return [torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)]


def muon(network, lr):
    """Muon (Jordan et al., 2024) for matrices: orthogonalised gradients learn more from every step.
    AdamW for everything else and for the mappers of conditions. No weight decay: it would change the
    fixed weights of wire.py."""
    matrices = []
    others = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() == 2 and "mapper" not in name and "embedding" not in name
            (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0),
    ]


def learning_rate(lr, warm_up, progress):
    """A linear warm-up and a cosine decay to zero, both from 0 to 1."""
    return lr * min(warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))


def update_average(average, network, step):
    """The exponential moving average of the weights, with a shorter memory in the first steps."""
    decay = min(0.999, (step + 1) / (step + 20))
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


def save_checkpoint(path, network, average, step):
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    state |= {f"average.{key}": value for key, value in average.items()}
    save(state, path, {"step": str(step)})


def load_checkpoint(path, network, resume):
    """Fills the network -> (the moving average, the number of steps done)."""
    if not resume or not path.exists():
        return {key: value.clone() for key, value in network.state_dict().items()}, 0
    state = load_file(path)
    network.load_state_dict({key: state[f"network.{key}"] for key in network.state_dict()})
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    return {key: state[f"average.{key}"] for key in network.state_dict()}, step


def precision(options):
    """Matrix products in bf16, with --bf16: twice as fast where the CPU has instructions for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)


@torch.inference_mode()
def preview_row(network, average, preview):
    """Images (B, 3, H, W) drawn with the moving average, side by side: uint8 (H, B * W, 3)."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(average)
    network.eval()
    row = torch.cat(list(preview()), dim=2)                                             # (3, H, B * W)
    network.train()
    network.load_state_dict(state)
    return (row.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


def train(name, network, compute_losses, steps, lr, options, optimizers=adamw, preview=None):
    """Minimises the sum of the losses and returns the network with the moving average of its weights.

    compute_losses(step)    -> {name: loss}
    preview()               -> images (B, 3, H, W) that show the current state of the network

    Saves a checkpoint and a preview every five minutes. With --minutes it starts from scratch, stops after
    that time instead of `steps`, and adds a row to the preview every minute.
    """
    checkpoint = options.work / f"{name}.safetensors"
    average, start = load_checkpoint(checkpoint, network, resume=not options.minutes)
    if start:
        print(f"{name}: continues at step {start}", flush=True)
    optimizers = optimizers(network.train(), lr)
    interval = min(100, steps // 4)
    history = []
    rows = []
    start_time = time.time()
    saved = 0.0

    def save_progress(step):
        if not options.minutes:
            save_checkpoint(checkpoint, network, average, step)
        if preview:
            if not options.minutes:
                rows.clear()
            rows.append(preview_row(network, average, preview))
            Image.fromarray(np.concatenate(rows)).save(options.work / f"{name}.png")

    step = start
    while True:
        minutes = (time.time() - start_time) / 60
        progress = minutes / options.minutes if options.minutes else step / steps
        if progress >= 1:
            break
        torch.manual_seed(step)
        losses = compute_losses(step)
        network.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        warm_up = (step - start + 1) / min(200, steps // 4)                 # also after resuming
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(lr, warm_up, progress)
            optimizer.step()
        update_average(average, network, step)
        step += 1

        history.append([value.item() for value in losses.values()])
        if step % interval == 0:
            means = "  ".join(f"{key} {mean:.5f}" for key, mean in zip(losses, np.mean(history, 0)))
            print(f"{name} {step}/{steps}  {means}  {60 * minutes:.0f} s", flush=True)
            history = []
        if minutes - saved > (1 if options.minutes else 5):
            saved = minutes
            save_progress(step)
    if step > start:
        save_progress(step)
    network.load_state_dict(average)
    return network.eval()


def save_fp16(network, path, metadata=None):
    """The result. Integers, the counters of batch norms, keep their type."""
    state = network.state_dict()
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save(tensors, path, metadata)


def start_from(network, options, file):
    """With --start: the weights of an earlier training, by name. Tokens of another vocabulary keep their
    embeddings."""
    if not options.start:
        return
    state = {key: value.float() for key, value in load_file(options.start / file).items()}
    for key, value in state.items():
        if key.endswith("token_embedding.weight"):
            before = json.loads((options.start / "tokenizer" / "vocab.json").read_text("utf-8"))
            now = json.loads((options.out / "tokenizer" / "vocab.json").read_text("utf-8"))
            state[key] = network.state_dict()[key].clone()
            for token in now.keys() & before.keys():
                state[key][now[token]] = value[before[token]]
    network.load_state_dict(state)


# ---- tokenizer -------------------------------------------------------------------------------------

def train_tokenizer(options):
    """A small version of CLIP's vocabulary, in its order: 256 bytes, the same at the end of a word,
    merges until every common word of the captions is one token, start and end."""
    rng = np.random.default_rng(0)
    captions = [shapes.caption(scene, rng).lower() for scene in sample_scenes(40000, seed=0)]
    bpe = BytePairTokenizer(models.BPE(end_of_word_suffix="</w>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe_trainer = trainers.BpeTrainer(                          # the random words of captions are too rare
        vocab_size=2000, min_frequency=25, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, bpe_trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(merge) for merge in merges]
    tokens += [START, END]

    folder = options.out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    lines = ["#version: 0.2"] + [f"{a} {b}" for a, b in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"tokenizer: {len(tokens)} tokens, {len(merges)} merges")


# ---- Stage A ---------------------------------------------------------------------------------------

def train_a(options):
    """Reconstruction of 64x64 crops: Stage A only sees a small neighbourhood anyway. A little noise on
    the latents makes the decoder tolerate the errors of Stage B."""
    network = StageA(STAGE_A)
    for block in network.modules():
        if hasattr(block, "gammas"):
            nn.init.constant_(block.gammas[2], 0.3)
            nn.init.constant_(block.gammas[5], 0.3)
    nn.init.normal_(network.vquantizer.codebook.weight)

    def compute_losses(step):
        images = render_batch(sample_scenes(16, seed=[1, step]))
        top, left = torch.randint(0, 17, (2,)) * 4
        images = images[:, :, top:top + 64, left:left + 64]
        latents = network.encode(images)                                                # (16, 4, 16, 16)
        latents = latents + 0.15 * torch.rand(16, 1, 1, 1) * torch.randn_like(latents)
        reconstruction = network.decode(latents)
        mse = F.mse_loss(reconstruction, images)
        return {"mse": mse, "l1": 0.1 * F.l1_loss(reconstruction, images)}

    def preview():
        return network.decode(network.encode(render_batch(sample_scenes(8, 8))))

    start_from(network, options, "stage_a.safetensors")
    steps = options.steps or 14000
    network = train("a", network, compute_losses, steps, 3e-3, options, preview=preview)
    save_fp16(network, options.results / "stage_a.safetensors")


# ---- semantic encoder ------------------------------------------------------------------------------

SHAPE_CODES = dict(zip(shapes.SHAPES, shapes.COLOURS))          # shape -> the colour that stands for it


def shape_map(scene):
    """The same scene on black, each object in a colour that stands for its shape."""
    objects = tuple(replace(item, colour=SHAPE_CODES[item.shape]) for item in scene.objects)
    return replace(scene, objects=objects, background="black")


def train_encoder(options):
    """The official encoder starts from an ImageNet classifier, which knows classes before it learns
    to compress. Ours learns both at once: from the latent, a plain decoder must reconstruct the image
    at 48x48 and, next to it, a map of the shapes, which asks for the class of each object."""
    encoder = SemanticEncoder(ENCODER)
    decoder = Previewer(PreviewerConfig(widths=(192, 128, 64, 32, 16)))
    network = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    network.decoder.blocks[-1] = nn.Conv2d(16, 6, 1)            # 3 channels of the image, 3 of the map
    network.to(memory_format=torch.channels_last)

    def compute_losses(step):
        scenes = sample_scenes(64, seed=[2, step])
        images = render_batch(scenes)
        maps = render_batch([shape_map(scene) for scene in scenes])
        small = downscale(images, SEMANTIC_SIDE).contiguous(memory_format=torch.channels_last)
        latent = network.encoder(small)                                                 # (64, 16, 3, 3)
        latent = latent + LATENT_NOISE * torch.randn_like(latent)
        decoded = network.decoder(latent)                                               # (64, 6, 48, 48)
        images = downscale(images, 48)
        maps = downscale(maps, 48)
        weight = 1 + 4 * (maps.amax(1, keepdim=True) > 0.2)     # objects are few pixels but matter most
        return {"image": (weight * (decoded[:, :3] - images) ** 2).mean(),
                "map": (weight * (decoded[:, 3:] - maps) ** 2).mean()}

    def preview():
        images = downscale(render_batch(sample_scenes(8, 8)), SEMANTIC_SIDE)
        return network.decoder(network.encoder(images))[:, :3]

    start_from(network.encoder, options, ENCODER_FILE)
    steps = options.steps or 10000
    network = train("encoder", network, compute_losses, steps, 2e-3, options, preview=preview)
    save_fp16(network.encoder, options.results / ENCODER_FILE)


# ---- text encoder and image encoder ----------------------------------------------------------------

def load_encoder(options):
    """The semantic encoder as a function of images (B, 3, 128, 128)."""
    encoder = load(options.out / ENCODER_FILE, dtype=torch.float32)
    return lambda images: encoder(downscale(images, SEMANTIC_SIDE))


def sampled_scenes(options):
    """The scenes of clip, b and c, and their semantic latents (122880, 16, 3, 3)."""
    count = options.count or 122880
    batches = [sample_scenes(64, [4, i]) for i in range(count // 64)]
    return sum(batches, []), cached(options, "semantics", batches, load_encoder(options), ENCODER_FILE)


def swapped_colours(scene):
    """The hardest distractor: two objects that have exchanged their colours."""
    a, b = scene.objects
    return replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def write_captions(scenes, seed, count):
    """A caption of every scene, then distractors: captions of the first `count` scenes in the same words
    but with the colours of the two objects swapped, where that changes the caption."""
    captions = []
    for i, scene in enumerate(scenes):
        captions.append(shapes.caption(scene, np.random.default_rng([*seed, i])))
    for i, scene in enumerate(scenes[:count]):
        if len(scene.objects) == 2:
            swapped = shapes.caption(swapped_colours(scene), np.random.default_rng([*seed, i]))
            if swapped != captions[i]:
                captions.append(swapped)
    return captions


def train_clip(options):
    """Which of 192 captions belongs to each of 64 images? From that alone, encoders this small learn
    colours and little else. So each must also predict the semantic latent from its embedding, both
    with the same plain decoder, which is discarded: that requires shapes, sizes and positions. And
    every image must be told from its own caption with the colours of its two objects swapped: which
    colour belongs to which shape is learned only where it is asked for."""
    tokenizer = Tokenizer(options.out / "tokenizer", TEXT.length)
    vocabulary = tokenizer.bpe.get_vocab_size()
    text = TextEncoder(replace(TEXT, vocabulary=vocabulary, end=tokenizer.end))
    image = ImageEncoder(IMAGE)
    scenes, semantics = sampled_scenes(options)
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.2)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.1)
    nn.init.normal_(image.vision_model.embeddings.position_embedding.weight, std=0.1)
    decoder = nn.Sequential(nn.Linear(TEXT.projection, 512), nn.GELU(), nn.Linear(512, 144))
    network = nn.ModuleDict({"text": text, "image": image, "decoder": decoder})
    network.logit_scale = nn.Parameter(torch.tensor(2.7))       # a logarithm, as in CLIP

    def compute_losses(step):
        rows = np.random.default_rng([6, step]).integers(len(scenes), size=192)
        batch = [scenes[i] for i in rows]
        latents = semantics[rows].float().flatten(1)                                    # (192, 144)
        ids, mask = tokenizer(write_captions(batch, [6, step], 64))     # 192 captions, K with distractors
        longest = int(mask.sum(1).max())                        # padding after it is not used
        with precision(options):
            _, pooled = network.text(ids[:, :longest], mask[:, :longest])               # (K, 1, 128)
            image_embedding = network.image(downscale(render_batch(batch[:64]), IMAGE.side))
        image_embedding = image_embedding.float()                                       # (64, 128)
        text_embedding = pooled.squeeze(1).float()                                      # (K, 128)
        similarity = F.normalize(image_embedding) @ F.normalize(text_embedding).T       # (64, K)
        logits = network.logit_scale.exp() * similarity
        pairs = torch.arange(64)
        return {"caption": F.cross_entropy(logits, pairs),
                "image": F.cross_entropy(logits[:, :64].T, pairs),
                "text_latent": 5 * F.mse_loss(network.decoder(text_embedding[:192]), latents),
                "image_latent": 5 * F.mse_loss(network.decoder(image_embedding), latents[:64])}

    start_from(text, options, "text_encoder/model.safetensors")
    start_from(image, options, "image_encoder/model.safetensors")
    network = train("clip", network, compute_losses, options.steps or 6000, 2e-3, options, muon)
    save_fp16(network.text, options.results / "text_encoder" / "model.safetensors")
    save_fp16(network.image, options.results / "image_encoder" / "model.safetensors")


# ---- both UNets ------------------------------------------------------------------------------------

def noise_loss(unet, x0, focus=1.0, **condition):
    """Predicts the noise on the cosine schedule, in fp32: half precision would drown x0 near t = 1.

    The weight makes it a loss on x0, larger at middle times, where the sampler settles on one of the
    images that it still mixes. Late times are sampled more often, and a tenth lie next to the sampler's
    first step.
    """
    t = torch.rand(len(x0)) ** 0.6
    t = torch.where(torch.rand(len(x0)) < 0.1, 0.97 + 0.03 * t, t)                      # (B,)
    a = alpha_bar(t)                                                                    # (B,)
    noise = torch.randn_like(x0)
    x = add_noise(x0, noise, a[:, None, None, None])
    error = (focus * (unet(x, t, **condition) - noise) ** 2).mean((1, 2, 3))            # (B,)
    on_x0 = (1 - a) / a                                         # an error of eps causes this error of x0
    weight = on_x0 * (1 / (1 - a)).clamp(max=10)
    return {"noise": (error * weight.clamp(0.1, 200)).mean()}


def use_precision(unet, options):
    """Everything except the outermost level's residual and timestep blocks, through which x passes to
    the output unchanged, may run in bf16."""
    outermost = {*unet.down_blocks[0], *unet.up_blocks[-1]}
    for block in itertools.chain(*unet.down_blocks, *unet.up_blocks):
        if block not in outermost or hasattr(block, "attention"):
            block.forward = precision(options)(block.forward)
    return unet


def predict_from_noise(unet, x0, t=0.9, **condition):
    """The network's prediction of x0 from its noisy version at time t."""
    t = torch.full((len(x0),), t)
    a = alpha_bar(t)[:, None, None, None]                                               # (B, 1, 1, 1)
    x = add_noise(x0, torch.randn_like(x0), a)
    return predict_x0(x, unet(x, t, **condition), a)


# ---- Stage B ---------------------------------------------------------------------------------------

def train_b(options):
    """From a semantic latent with noise, between none and twice LATENT_NOISE, to the image latent. In this
    dataset the caption adds nothing to the semantic latent, so the text is zero and its mapper's weights
    stay zero: any prompt gives the same condition. A tenth of the semantic latents are zero too, for
    guidance."""
    stage_a = load(options.out / "stage_a.safetensors", dtype=torch.float32)
    scenes, semantics = sampled_scenes(options)
    batches = [scenes[i:i + 64] for i in range(0, len(scenes) // 2, 64)]
    latents = cached(options, "latents", batches, stage_a.encode, "stage_a.safetensors")
    unet = use_precision(wire(UNet(STAGE_B)), options)
    nn.init.zeros_(unet.clip_mapper.weight)

    def compute_losses(step):
        rows = torch.randint(len(latents), (32,))
        semantic = semantics[rows].float()                                              # (32, 16, 3, 3)
        level = 2 * LATENT_NOISE * torch.rand(len(rows), 1, 1, 1)
        semantic = semantic + level * torch.randn_like(semantic)
        semantic = semantic * (torch.rand(len(rows)) > 0.1)[:, None, None, None]
        x0 = latents[rows].float()                              # (32, 4, 32, 32), of 61440
        text = torch.zeros(len(rows), 1, 128)
        return noise_loss(unet, x0, focus_on_objects(x0), clip_text_pooled=text, effnet=semantic)

    def preview():
        condition = {"clip_text_pooled": torch.zeros(8, 1, 128), "effnet": semantics[:8].float()}
        return stage_a.decode(predict_from_noise(unet, latents[:8].float(), **condition))

    steps = options.steps or 20000
    start_from(unet, options, "stage_b.safetensors")
    unet = train("b", unet, compute_losses, steps, 2e-3, options, muon, preview)
    save_fp16(unet, options.results / "stage_b.safetensors")


# ---- Stage C ---------------------------------------------------------------------------------------

PREVIEW_PROMPTS = [
    "a red circle", "a blue star on a white background", "a green square and a yellow heart",
    "a small black ring above a large orange triangle", "two purple hearts", "something white",
    "a ring", "a red heart left of a blue square",
]


def draw_prompts(options, stage_c, text, tokenizer, prompts):
    """N prompts -> images (N, 3, 128, 128)."""
    n = len(prompts)
    hidden, pooled = text(*tokenizer(prompts + [""] * n))               # (2N, 32, 128), (2N, 1, 128)
    stage_b = load(options.out / "stage_b.safetensors", dtype=torch.float32)
    stage_a = load(options.out / "stage_a.safetensors", dtype=torch.float32)
    condition = {"clip_text": hidden, "clip_text_pooled": pooled}
    *_, (semantic, _) = sample(stage_c, (16, 3, 3), condition, 20, 4.0, generators(0, n))
    condition = {"clip_text_pooled": pooled[:n], "effnet": semantic}
    *_, (latents, _) = sample(stage_b, (4, 32, 32), condition, 10, 0.0, generators(n, n))
    return stage_a.decode(latents)


def train_c(options):
    """From a caption to the semantic latent, with frozen text and image encoders. A fifth of the captions
    are empty: guidance of 4 multiplies errors of the unconditional prediction by 3, and what a prompt
    leaves open is decided there. As in the original, a tenth of the rows see the embedding of the image
    itself; half of these have no caption."""
    files = [options.out / name / "model.safetensors" for name in ("text_encoder", "image_encoder")]
    text, image = (text_encoder.load(file, dtype=torch.float32) for file in files)
    tokenizer = Tokenizer(options.out / "tokenizer", TEXT.length)
    scenes, semantics = sampled_scenes(options)
    batches = [scenes[i:i + 64] for i in range(0, len(scenes), 64)]
    embeddings = cached(
        options, "images", batches, lambda x: image(downscale(x, IMAGE.side)),
        "image_encoder/model.safetensors")
    unet = use_precision(wire(UNet(STAGE_C)), options)

    def compute_losses(step):
        rng = np.random.default_rng([5, step])
        rows = rng.integers(len(scenes), size=128)
        with_image = rng.random(128) < 0.1
        without_text = rng.random(128) < np.where(with_image, 0.5, 0.2)
        captions = []
        for i, empty in zip(rows, without_text):
            captions.append("" if empty else shapes.caption(scenes[i], rng))
        with torch.no_grad():
            hidden, pooled = text(*tokenizer(captions))                 # (128, 32, 128), (128, 1, 128)
        embedding = embeddings[rows].float() * torch.from_numpy(with_image)[:, None]    # (128, 128)
        x0 = semantics[rows].float()                                                    # (128, 16, 3, 3)
        return noise_loss(unet, x0, clip_text_pooled=pooled, clip_text=hidden, clip_img=embedding)

    def preview():
        """Also prints how many of 40 prompts for one object are right."""
        prompts = PREVIEW_PROMPTS + [shapes.full_caption(scene) for scene in test_scenes]
        images = draw_prompts(options, unet, text, tokenizer, prompts)                  # (48, 3, 128, 128)
        pixels = (images[-40:].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        right = [shapes.score(scene, shapes.detect(image))["all"]
                 for scene, image in zip(test_scenes, pixels)]
        print(f"c: {100 * np.mean(right):.0f} % of {len(right)} prompts for one object are right", flush=True)
        return images[:len(PREVIEW_PROMPTS)]

    test_scenes = sample_scenes(40, 9, two=0)
    has_decoder = (options.out / "stage_b.safetensors").exists()
    steps = options.steps or 14000
    start_from(unet, options, "stage_c.safetensors")
    unet = train("c", unet, compute_losses, steps, 2e-3, options, muon, preview if has_decoder else None)
    size = {"width": str(shapes.SIDE), "height": str(shapes.SIDE)}
    save_fp16(unet, options.results / "stage_c.safetensors", size)


# ---- previewer -------------------------------------------------------------------------------------

def train_previewer(options):
    """Reconstruction from the semantic latent alone."""
    encoder = load_encoder(options)
    network = Previewer(PREVIEWER)

    def compute_losses(step):
        images = render_batch(sample_scenes(64, [7, step]))
        with torch.no_grad():
            latent = encoder(images)                                                    # (64, 16, 3, 3)
        decoded = network(latent + LATENT_NOISE * torch.randn_like(latent))             # (64, 3, 24, 24)
        return {"mse": F.mse_loss(decoded, downscale(images, decoded.shape[-1]))}

    def preview():
        return network(encoder(render_batch(sample_scenes(8, 8))))

    start_from(network, options, "previewer.safetensors")
    steps = options.steps or 2000
    network = train("previewer", network, compute_losses, steps, 3e-3, options, preview=preview)
    save_fp16(network, options.results / "previewer.safetensors")


STAGES = {
    "tokenizer": train_tokenizer, "a": train_a, "encoder": train_encoder, "clip": train_clip,
    "b": train_b, "c": train_c, "previewer": train_previewer,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="folder of the finished files")
    parser.add_argument("--work", type=Path, help="checkpoints and caches (default: work, next to OUT)")
    parser.add_argument("--start", type=Path, help="folder of an earlier training to continue from")
    parser.add_argument("--steps", type=int, help="steps of each stage (default: the stage's own)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, help="train one stage from scratch for this time")
    parser.add_argument("--bf16", action="store_true", help="faster on a CPU with bf16 instructions")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    if options.quick and options.out.resolve() == HERE / "tiny":
        parser.error("--quick learns nothing: expected another --out than the trained weights")
    if options.minutes and (len(options.stages) > 1 or options.stages[0] in ("all", "tokenizer")):
        parser.error("--minutes: expected one stage, and not the tokenizer")
    options.work = options.work or options.out.parent / "work"
    options.results = options.work if options.minutes else options.out
    options.steps = 12 if options.quick else options.steps
    options.count = 128 if options.quick else 16384 if options.minutes else None
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", ".* is cut to")         # few captions are longer than 32 tokens
    for stage in STAGES if "all" in options.stages else options.stages:
        torch.manual_seed(0)
        STAGES[stage](options)


if __name__ == "__main__":
    main()
