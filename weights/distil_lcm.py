"""Distils Stage C into a LoRA that draws in a few steps and without guidance, so with one row per image.

    python weights/distil_lcm.py DATA --out lcm.safetensors
    python cascade.py "a red circle" --lora lcm.safetensors --recipe lcm --steps 4 --decoder-steps 4 --guidance 1

Latent consistency distillation (Luo et al., 2023, arXiv 2310.04378, algorithm 1). The teacher, Stage C as it is, takes
one DDIM step with classifier-free guidance along the path from noise to image. The student, Stage C with the LoRA,
learns to predict the same x0 at both ends of that step. So, from step to step, it learns to predict at every time the
end of the teacher's path. Differences from the paper: the target comes from the student itself, without gradient,
instead of its moving average; the guidance scale is fixed and not an input; x0 is predicted from eps as in
sampler.lcm, without the factors c_skip and c_out.

DATA is a folder of images with captions. The options are those of finetune.py, and --guidance.
"""
import sys

import finetune
import torch
from adapters import add_lora, disabled, lora_tensors
from finetune import encode_text, make_preview
from training import Training, save

from model import require
from sampler import RECIPES, add_noise, guide, noise_levels, predict_x0, timesteps

TIMES = 20                                              # of the teacher's path, as many as sampling takes


def distil(options):
    is_plain = options.what == "lora" and options.stage == "c" and not options.token
    require(is_plain, "expected --what lora and --stage c, without --token: only that can be distilled")
    cascade, unet = finetune.load_unet(options)
    added = add_lora(unet, options.rank, options.layers)
    parameters = dict(torch.nn.ModuleDict(added).named_parameters())
    data = finetune.encode_data(options, cascade, unet)
    a, r = noise_levels(timesteps(TIMES), shift=1.0)                                    # (TIMES + 1) each
    a, r = a.to(cascade.device), r.to(cascade.device)
    empty = encode_text(cascade, "").detach()                                           # (1, L + 1, D)

    def predict(x, i, condition):
        """eps and x0, predicted from x at the times i."""
        eps = unet(x, r[i], **condition).float()
        return eps, predict_x0(x, eps, a[i][:, None, None, None])

    @torch.no_grad()
    def teacher_step(x, i, condition):
        """One DDIM step (Song et al., 2020, eq. 12) with guidance, from the times i to the next."""
        rows = {"clip_text": empty[:, :-1], "clip_text_pooled": empty[:, -1:]}
        uncond, _ = predict(x, i, {name: value.expand(len(x), -1, -1) for name, value in rows.items()})
        cond, _ = predict(x, i, condition)
        eps = guide(cond, uncond, options.guidance)
        x0 = predict_x0(x, eps, a[i][:, None, None, None])
        return add_noise(x0, eps, a[i + 1][:, None, None, None])

    def compute_loss():
        x0, condition, _ = data.batch()
        condition.pop("clip_img", None)
        i = torch.randint(TIMES, (len(x0),))
        x = add_noise(x0, torch.randn(x0.shape).to(x0), a[i][:, None, None, None])
        with disabled(added):
            x_next = teacher_step(x, i, condition)
        with torch.no_grad():
            _, target = predict(x_next, i + 1, condition)
        _, prediction = predict(x, i, condition)
        return (prediction - target).square().mean()

    training = Training(options, parameters, weight=None)
    preview = make_preview(options, cascade, unet, None, data, steps=4, guidance=1.0, recipe=RECIPES["lcm"])
    training.run(compute_loss, preview)
    save(lora_tensors(added, "c"), options.out)
    training.path.unlink(missing_ok=True)


def main(arguments=None):
    parser = finetune.make_parser("distil_lcm.py", __doc__)
    parser.add_argument("--guidance", type=float, default=4.0, help="of the teacher (default: %(default)s)")
    return finetune.main(arguments, parser, distil)


if __name__ == "__main__":
    sys.exit(main())
