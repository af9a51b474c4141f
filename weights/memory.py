"""The GPU memory that fine-tuning at the official sizes needs, computed on the meta device, without any weights.

Training needs 16 bytes for each trained weight (the weight, its gradient and Adam's two moments, fp32), 2 for each
frozen one (bf16), and what autograd keeps of a batch for the backward pass. CUDA itself and
fragmentation come on top. `python weights/finetune.py --plan` prints the table.
"""
from itertools import chain

import torch
from official import official

from model import ControlNet, ControlNetConfig, SemanticEncoderConfig

UNETS = ("stage_c", "stage_c_lite", "stage_b", "stage_b_lite")


def kept_bytes(unet, controlnet):
    """What autograd keeps of one 1024x1024 image, without and with --checkpointing. With it: the input of every block,
    and what the largest block keeps while it is computed again."""
    networks = [unet, controlnet] if controlnet else [unet]
    seen = {weight.untyped_storage()._cdata for network in networks for weight in network.parameters()}
    kept = []                                           # tensors; they stay alive, so that no storage is reused
    inputs = []                                         # of the blocks
    before = []                                         # len(kept) at the start of each block
    blocks = []                                         # bytes kept by each block

    def keep(tensor):
        storage = tensor.untyped_storage()._cdata
        if storage not in seen:
            seen.add(storage)
            kept.append(tensor)
        return tensor

    def size(tensors):
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def enter_block(_, arguments):
        inputs.append(arguments[0])
        before.append(len(kept))

    def leave_block(*_):
        blocks.append(size(kept[before[-1]:]))

    for block in chain(*unet.down_blocks, *unet.up_blocks):
        block.register_forward_pre_hook(enter_block)
        block.register_forward_hook(leave_block)
    condition = {"clip_text_pooled": torch.zeros(1, 1, 1280), "clip_text": torch.zeros(1, 77, 1280)}
    x = torch.zeros(1, 16, 24, 24)
    if unet.config.is_stage_b:
        condition["effnet"] = x
        x = torch.zeros(1, 4, 256, 256)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if controlnet:
            condition["control"] = controlnet(torch.zeros(1, 1, 768, 768))
        unet(x, torch.zeros(1, dtype=torch.float32), **condition)
    return size(kept), size(kept) - sum(blocks) + size(inputs) + max(blocks)


def memory(name, what, add_lora):
    """GiB without and with --checkpointing, for a batch of one 1024x1024 image. add_lora(unet) adds the LoRA's weights."""
    controlnet = None
    torch.set_default_dtype(torch.bfloat16)
    unet = official(name).requires_grad_(what == "full")
    with torch.device("meta"):
        if what == "lora":
            add_lora(unet)
        if what == "controlnet":
            controlnet = ControlNet(ControlNetConfig(1, SemanticEncoderConfig())).eval()
        kept = kept_bytes(unet, controlnet)
    torch.set_default_dtype(torch.float32)
    frozen = 0
    trained = 0
    for weight in chain(unet.parameters(), controlnet.parameters() if controlnet else ()):
        if weight.requires_grad:
            trained += weight.numel()
        else:
            frozen += weight.numel()
    return [(16 * trained + 2 * frozen + activations) / 2 ** 30 for activations in kept]


def print_table(add_lora):
    print("| GiB, without / with --checkpointing | " + " | ".join(UNETS) + " |")
    print("|---" * (len(UNETS) + 1) + "|")
    for what in ("lora", "full", "controlnet"):
        cells = []
        for name in UNETS:
            if what == "controlnet" and name != "stage_c":
                cells.append("")
            else:
                cells.append("{:.1f} / {:.1f}".format(*memory(name, what, add_lora)))
        print(f"| {what} | " + " | ".join(cells) + " |")
