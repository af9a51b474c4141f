"""The same weights in the peers' classes."""

import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from model import load
from text_encoder import load as load_tower
from tiny import to_diffusers

BLOCKS = {"R": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}


def diffusers_unet(unet):
    config = unet.config
    groups = [level[:3] if "A" in level else level[:2] for level in config.down]
    peer = StableCascadeUNet(
        in_channels=config.latent,
        out_channels=config.latent,
        patch_size=config.patch,
        conditioning_dim=config.c_cond,
        block_out_channels=config.widths,
        num_attention_heads=[width // 64 for width in config.widths],
        down_num_layers_per_block=[len(level) // len(group) for level, group in zip(config.down, groups)],
        up_num_layers_per_block=[len(level) // len(group) for level, group in zip(config.up, groups[::-1])],
        down_blocks_repeat_mappers=config.down_repeat,
        up_blocks_repeat_mappers=config.up_repeat,
        block_types_per_layer=[[BLOCKS[kind] for kind in group] for group in groups],
        dropout=0.0,
        clip_text_pooled_in_channels=config.text,
        clip_text_in_channels=None if config.semantic else config.text,
        clip_image_in_channels=config.image or None,
        effnet_in_channels=config.semantic or None,
        pixel_mapper_in_channels=3 if config.semantic else None,
        timestep_conditioning_type=config.extras,
        switch_level=config.switch,
    )
    peer.load_state_dict(to_diffusers(unet.state_dict()))
    return peer.eval()


def diffusers_stage_a(stage_a):
    config = stage_a.config
    peer = PaellaVQModel(
        levels=len(config.widths),
        bottleneck_blocks=config.deep_blocks,
        embed_dim=config.widths[-1],
        latent_channels=config.latent,
        num_vq_embeddings=config.codes,
        scale_factor=config.scale_factor,
    )
    peer.load_state_dict(to_diffusers(stage_a.state_dict()))
    return peer.eval()


def transformers_text(text):
    config = text.config
    peer = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            hidden_act=config.act,
            projection_dim=config.projection,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // 64,
            max_position_embeddings=config.length,
            eos_token_id=config.end,
            bos_token_id=config.end - 1,
        )
    )
    ours, theirs = text.state_dict(), peer.state_dict()
    if "text_model.final_layer_norm.weight" not in theirs:  # newer versions drop this level of the name
        ours = {name.replace("text_model.", ""): tensor for name, tensor in ours.items()}
    missing = peer.load_state_dict(ours, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys), missing
    return peer.eval()


def transformers_image(image):
    config = image.config
    peer = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.hidden,
            hidden_act=config.act,
            projection_dim=config.projection,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // 64,
            image_size=config.side,
            patch_size=config.patch,
        )
    )
    peer.load_state_dict(image.state_dict())
    return peer.eval()


def last_hidden(peer, ids, mask):
    """The last layer's output before the final norm, caught where it leaves the layer."""
    caught = []
    tower = getattr(peer, "text_model", peer)
    hook = tower.encoder.layers[-1].register_forward_hook(
        lambda module, inputs, output: caught.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        pooled = peer(ids, attention_mask=mask).text_embeds
    hook.remove()
    return caught[0], pooled


def scheduler():
    return DDPMWuerstchenScheduler()


def combined_pipeline(folder):
    """diffusers' pipeline with the weights of a folder of original files."""
    unets = [diffusers_unet(load(folder / f"{name}.safetensors")) for name in ("stage_c", "stage_b")]
    text = transformers_text(load_tower(folder / "text_encoder" / "model.safetensors"))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    pipeline = StableCascadeCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        decoder=unets[1],
        scheduler=scheduler(),
        vqgan=diffusers_stage_a(load(folder / "stage_a.safetensors")),
        prior_prior=unets[0],
        prior_text_encoder=text,
        prior_tokenizer=tokenizer,
        prior_scheduler=scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prior_pipeline(folder):
    """Its first half alone, which takes pictures."""
    image = load_tower(folder / "image_encoder" / "model.safetensors")
    side = image.config.side
    pipeline = StableCascadePriorPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        text_encoder=transformers_text(load_tower(folder / "text_encoder" / "model.safetensors")),
        prior=diffusers_unet(load(folder / "stage_c.safetensors")),
        scheduler=scheduler(),
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        image_encoder=transformers_image(image),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same(ours, theirs, relative=1e-5):
    """Equal to `relative` of the largest value, and not because there is nothing to see."""
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all() and theirs.std() > 1e-2, "the comparison would say nothing"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= relative, f"relative error {error:.2e}"
