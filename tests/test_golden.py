"""The networks, the sampler and the pipeline give the peers' answers (tests/make_golden.py), and every parameter counts
in them."""
import pytest
import torch
from helpers import RUNS, assert_same, golden, noise, relative_error
from tiny import file_name, networks, weight_sum, write_folder

import sampler
from cascade import NETWORKS, Cascade
from model import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.mark.parametrize("name", RUNS)
def test_a_network_gives_its_peers_answer(folder, name):
    inputs, theirs, weights = golden(name)
    network = load(folder / file_name(name), networks=NETWORKS)
    assert torch.isclose(weight_sum(network), weights), "this PyTorch draws other random weights"
    ours = RUNS[name](network, **inputs)
    for key in theirs:
        assert theirs[key].std() > 0.1
        assert_same(ours[key], theirs[key])


# The answers do not depend on the codebook, which neither encode nor decode reads, or on the bias of the keys, which
# adds the same to every score of a query.
WITHOUT_EFFECT = ("num_batches_tracked", "vquantizer.codebook.weight", "k_proj.bias")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_small_change_of_any_parameter_is_seen(name):
    (inputs, theirs, _), network = golden(name), networks()[name]
    for key, tensor in network.state_dict().items():
        if key.endswith(WITHOUT_EFFECT):
            continue
        before = tensor.clone()
        tensor += 0.05 * noise(*tensor.shape, seed=1)
        ours = RUNS[name](network, **inputs)
        tensor.copy_(before)
        error = max(relative_error(ours[answer], theirs[answer]) for answer in theirs)
        assert error > 2e-5, f"{key}: {error:.1e}"


def test_every_step_is_that_of_diffusers_scheduler():
    inputs, theirs, _ = golden("scheduler")
    assert (sampler.alpha_bar(inputs["t"]) - theirs["alpha_bar"]).abs().max() <= 1e-6
    a, x = sampler.alpha_bar(sampler.timesteps(10)), inputs["start"]
    generators = sampler.generators(4, 1)
    for i, expected in enumerate(theirs["steps"]):
        noise = sampler.draw_noise(generators, (2, 4, 4), "cpu") * (i < 9)
        x = sampler.ddpm(x, inputs["epsilon"][i:i + 1], noise, a[i], a[i + 1])
        assert relative_error(x, expected[None]) <= 1e-5, f"step {i + 1}"


def test_the_image_is_that_of_diffusers_pipeline(folder):
    _, theirs, _ = golden("pipeline")
    pixels = theirs["pixels"]
    assert pixels.std() > 0.1 and ((pixels > 0) & (pixels < 1)).float().mean() > 0.5
    arguments = ["a red circle", "three stars"], ["blue", "a wall"]
    options = dict(steps=4, guidance=4.0, decoder_steps=3, decoder_guidance=1.5, seed=7)
    latents, ours = (Cascade(folder)(*arguments, output=kind, **options) for kind in ("latent", "pt"))
    assert_same(latents, theirs["latents"])
    assert_same(ours[:, :, ::4, ::4], pixels)
