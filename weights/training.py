"""The loss that Stable Cascade was trained with, as the original code computes it, and a loop with checkpoints.

The time t is drawn uniformly; the squared error of the predicted noise is weighted by the noise level.
The letters are those of sampler.py: a = alpha_bar(t), x0 a clean latent, B the number of rows.
"""
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from model import CascadeError, exists, reading, require
from sampler import add_noise, noise_levels


def training_times(u):
    """Uniform numbers u from 0 to 1 -> times from 0.001 to 1."""
    return (1 - u + 0.001).clamp(0.001, 1)


def noise_loss(unet, x0, noise, u, weight, focus=1.0, **condition):
    """The weighted mean squared error of the predicted noise (DDPM, eq. 14). u: (B,), uniform from 0 to 1; focus: factors
    of the squared errors, or 1."""
    a, r = noise_levels(training_times(u), shift=1.0)                                   # (B,), (B,)
    x = add_noise(x0, noise, a[:, None, None, None])
    error = unet(x, r, **condition).float() - noise
    losses = (focus * error.square()).mean((1, 2, 3))                                   # (B,)
    return (weight(a, losses.detach()) * losses).mean()


def focus_on_objects(x0):
    """For image latents of objects on a plain background: errors at objects count five times, and at their edges nine
    times. Objects are a seventh of an image of the tiny cascade but matter most, and their edges most of all. This does
    not move the optimum, it only speeds up the way there."""
    background = x0[:, :, :1, :1]
    objects = (x0 - background).square().mean(1, keepdim=True) > 0.1                    # (B, 1, H, W)
    blurred = F.avg_pool2d(x0, 3, stride=1, padding=1, count_include_pad=False)
    edges = (x0 - blurred).square().mean(1, keepdim=True) > 0.1                         # (B, 1, H, W)
    return 1 + 4 * objects + 4 * edges


def p2_weight(a, losses):
    """1 / (1 + SNR) (Choi et al., 2022, arXiv 2204.00227, with k = gamma = 1)."""
    return 1 - a


def x0_weight(a, losses):
    """1 / SNR, which makes it a loss on x0; 100 at most. Not in the original: see finetune.py."""
    return ((1 - a) / a).clamp(max=100)


class AdaptiveWeight:
    """1 / the running mean of the losses at similar noise levels: every level counts the same."""
    def __init__(self):
        self.edges = torch.linspace(-10, 10, 299)       # of the log signal-to-noise ratio
        self.means = torch.ones(300)

    def __call__(self, a, losses):
        buckets = torch.searchsorted(self.edges, torch.logit(a).cpu())                  # (B,)
        before = self.means[buckets]                                                    # (B,)
        after = 0.99 * before + 0.01 * losses.cpu()
        for bucket, mean in zip(buckets.tolist(), after):
            self.means[bucket] = mean                   # of two rows in one bucket the last one counts
        return (1 / before).clamp(1e-7, 1e7).to(losses.device)


def pyramid_noise(noise, randn=torch.randn):
    """Stage B's noise: Gaussian noise plus upsampled noise of coarser grids (2, 4, 8, … times coarser, 16 rows at most),
    each 0.75 times as strong as the previous one; scaled back to variance 1."""
    variance = 1.0
    for i in range(1, 10):
        side = noise.shape[2] // 2 ** i
        if 1 <= side <= 16:
            coarse = randn(*noise.shape[:2], side, side).to(noise)
            noise = noise + 0.75 ** i * F.interpolate(coarse, noise.shape[2:], mode="nearest")
            variance += 0.75 ** (2 * i)
        if side <= 1:
            break
    return noise / math.sqrt(variance)


def save(tensors, path, metadata=None):
    """All or nothing: a failure or an interruption leaves the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CascadeError(f"{path}: cannot be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)


class Training:
    """AdamW, with checkpoints from which it continues as if it had not stopped."""
    def __init__(self, options, parameters, weight):
        self.options = options
        self.parameters = parameters                    # {name: parameter}
        self.weight = weight
        self.device = next(iter(parameters.values())).device
        self.update = 0
        self.losses = []
        decay = 0.0 if options.wired else 0.01
        self.optimizer = torch.optim.AdamW(parameters.values(), options.lr, weight_decay=decay)
        self.path = options.out.with_suffix(".checkpoint.safetensors")
        may_change = ("data", "weights", "out", "device", "updates", "save_every", "checkpointing")
        settings = {name: value for name, value in vars(options).items() if name not in may_change}
        self.settings = json.dumps(settings, sort_keys=True)

    def save(self):
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"{name} weight"] = parameter.detach()
            tensors[f"{name} exp_avg"] = self.optimizer.state[parameter]["exp_avg"]
            tensors[f"{name} exp_avg_sq"] = self.optimizer.state[parameter]["exp_avg_sq"]
        if isinstance(self.weight, AdaptiveWeight):
            tensors["means"] = self.weight.means
        save(tensors, self.path, {"update": str(self.update), "settings": self.settings})

    @torch.no_grad()
    def resume(self):
        with reading(self.path, "a checkpoint of this training"):
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
            require(metadata["settings"] == self.settings, "this checkpoint has other options: "
                    f"{metadata['settings']}; delete it or choose another --out")
            tensors = load_file(self.path)
            self.update = int(metadata["update"])
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"{name} weight"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.update)),
                    "exp_avg": tensors[f"{name} exp_avg"].to(parameter.device),
                    "exp_avg_sq": tensors[f"{name} exp_avg_sq"].to(parameter.device)}
            if isinstance(self.weight, AdaptiveWeight):
                self.weight.means = tensors["means"]

    def run(self, compute_loss, preview):
        """compute_loss() -> the loss of one random batch. Every update has a random seed of its own."""
        if exists(self.path):
            self.resume()
        updates = range(self.update, self.options.updates)
        with tqdm(updates, initial=self.update, total=self.options.updates, unit="update") as progress:
            for update in progress:
                torch.manual_seed(update)
                self.losses.append(self.do_update(compute_loss))
                progress.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}")
                self.update = update + 1
                if self.update % self.options.save_every == 0:
                    self.save()
                    preview()

    def do_update(self, compute_loss):
        """One step of the optimiser -> the mean loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(self.options.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                loss = compute_loss() / self.options.accumulate
            require(loss.isfinite(), f"update {self.update}: the loss is not finite; try a lower --lr")
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if self.options.decay:
            progress = self.update / self.options.updates
            self.optimizer.param_groups[0]["lr"] = self.options.lr * (0.5 + 0.5 * math.cos(math.pi * progress))
        self.optimizer.step()
        return total
