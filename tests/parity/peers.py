"""The same weights in the peers' classes."""
import torch
from diffusers import (DDPMWuerstchenScheduler, StableCascadeCombinedPipeline, StableCascadePriorPipeline,
                       StableCascadeUNet)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from tiny import to_diffusers
from transformers import (CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer,
                          CLIPVisionConfig, CLIPVisionModelWithProjection)

from sampler import generators
from text_encoder import CLIP_MEAN, CLIP_STD

BLOCKS = {"R": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}


def diffusers_unet(unet):
    config = unet.config
    groups = [level[:3] if "A" in level else level[:2] for level in config.down]

    def counts(levels, groups):
        return [len(level) // len(group) for level, group in zip(levels, groups)]

    peer = StableCascadeUNet(
        in_channels=config.latent_channels, out_channels=config.latent_channels, patch_size=config.patch_size,
        conditioning_dim=config.c_cond, clip_image_in_channels=config.image_dim or None,
        block_out_channels=config.widths, dropout=0.0, clip_text_pooled_in_channels=config.text_dim,
        num_attention_heads=[width // 64 for width in config.widths],
        down_num_layers_per_block=counts(config.down, groups),
        up_num_layers_per_block=counts(config.up, reversed(groups)),
        down_blocks_repeat_mappers=config.down_repeat, up_blocks_repeat_mappers=config.up_repeat,
        block_types_per_layer=[[BLOCKS[letter] for letter in group] for group in groups],
        timestep_conditioning_type=config.time_conditions,
        clip_text_in_channels=None if config.is_stage_b else config.text_dim,
        effnet_in_channels=config.semantic_channels or None,
        pixel_mapper_in_channels=3 if config.is_stage_b else None,
        switch_level=None if config.is_stage_b else [False] * (len(config.widths) - 1))
    peer.load_state_dict(to_diffusers(unet.state_dict()))
    return peer.eval()


def diffusers_stage_a(stage_a):
    config = stage_a.config
    peer = PaellaVQModel(
        levels=len(config.widths), bottleneck_blocks=config.deep_blocks, embed_dim=config.widths[-1],
        latent_channels=config.latent_channels, num_vq_embeddings=config.codes, scale_factor=config.scale_factor)
    peer.load_state_dict(to_diffusers(stage_a.state_dict()))
    return peer.eval()


def transformers_peer(network, config_class, peer_class, **settings):
    config = network.config
    peer = peer_class(config_class(
        hidden_size=config.width, intermediate_size=config.hidden, hidden_act=config.act,
        projection_dim=config.projection, num_hidden_layers=config.layers,
        num_attention_heads=config.width // 64, **settings))
    ours, theirs = network.state_dict(), peer.state_dict()
    if not any(name.startswith("text_model.") for name in theirs):  # newer versions drop this level of the name
        ours = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    found = peer.load_state_dict(ours, strict=False)
    assert not found.unexpected_keys, found
    assert all("position_ids" in name for name in found.missing_keys), found
    return peer.eval()


def transformers_text(text):
    config = text.config
    return transformers_peer(
        text, CLIPTextConfig, CLIPTextModelWithProjection, vocab_size=config.vocabulary,
        max_position_embeddings=config.length, eos_token_id=config.end, bos_token_id=config.end - 1)


def transformers_image(image):
    return transformers_peer(image, CLIPVisionConfig, CLIPVisionModelWithProjection,
                             image_size=image.config.side, patch_size=image.config.patch)


def normalised(pixels):
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def image_processor(side):
    crop = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)


def last_hidden(peer, ids, mask):
    """The last layer's output before the final norm, recorded where it leaves the layer, and the pooled embedding."""
    outputs, layer = [], getattr(peer, "text_model", peer).encoder.layers[-1]
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        pooled = peer(ids, attention_mask=mask).text_embeds
    hook.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0], pooled


def combined_pipeline(cascade, with_stage_a=True):
    """diffusers' pipeline with the weights, device and type of a Cascade."""
    torch.set_default_dtype(cascade.dtypes["stage_c"])  # of the networks made here, the largest first
    prior, decoder = (diffusers_unet(cascade.network(name)) for name in ("stage_c", "stage_b"))
    text = transformers_text(cascade.network("text_encoder"))
    vqgan = diffusers_stage_a(cascade.network("stage_a")) if with_stage_a else None
    torch.set_default_dtype(torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(
        cascade.folder / "tokenizer", model_max_length=text.config.max_position_embeddings)
    pipeline = StableCascadeCombinedPipeline(
        tokenizer, text, decoder, DDPMWuerstchenScheduler(), vqgan,
        prior, text, tokenizer, DDPMWuerstchenScheduler())
    pipeline.to(cascade.device).set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, negative, *, steps, decoder_steps, guidance=4.0, decoder_guidance=0.0, images=1,
         seed=0, output="np", **size):
    """What diffusers' pipeline draws for the arguments of a Cascade."""
    return pipeline(
        prompts, negative_prompt=negative, num_images_per_prompt=images, output_type=output,
        prior_num_inference_steps=steps, prior_guidance_scale=guidance,
        num_inference_steps=decoder_steps, decoder_guidance_scale=decoder_guidance,
        generator=generators(seed, images * len(prompts)), **size).images


def prior_pipeline(cascade):
    """The first half alone, which takes images."""
    both, image = combined_pipeline(cascade, with_stage_a=False), cascade.network("image_encoder")
    pipeline = StableCascadePriorPipeline(
        both.tokenizer, both.text_encoder, both.prior_prior, both.prior_scheduler,
        feature_extractor=image_processor(image.config.side), image_encoder=transformers_image(image))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
