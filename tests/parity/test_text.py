"""The text encoder is transformers' CLIPTextModelWithProjection, the tokenizer its CLIPTokenizer."""
import gzip
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from peers import last_hidden, transformers_text
from tiny import TEXT, randomise, save, write_tokenizer
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

import text_encoder
from text_encoder import TextEncoder, Tokenizer

CONFIGS = {"tiny": TEXT, "quick_gelu": replace(TEXT, act="quick_gelu", layers=2),
    "wide": replace(TEXT, width=128, hidden=200, layers=2, projection=96, vocabulary=50, end=49),
    "one layer": replace(TEXT, layers=1)}


def rows(config):
    """Ids and mask of a short prompt, a long one, an empty one, and one with an end token in its middle."""
    ids = torch.randint(0, config.end - 1, (4, config.length), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate((9, config.length, 2, 30)):
        ids[row, 0], ids[row, length - 1:], mask[row, :length] = config.end - 1, config.end, 1
    ids[3, 12] = config.end
    return ids, mask


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_hidden_and_pooled_are_those_of_transformers_and_its_folder_loads(config, tmp_path):
    text = randomise(TextEncoder(config), 21)
    peer, ours = transformers_text(text), text(*rows(config))
    hidden, pooled = last_hidden(peer, *rows(config))
    assert_same(ours[0], hidden)
    assert_same(ours[1], pooled.unsqueeze(1))
    peer.save_pretrained(tmp_path)
    loaded = text_encoder.load(tmp_path / "model.safetensors")
    assert loaded.config == config and torch.equal(loaded(*rows(config))[1], ours[1])


def test_an_end_token_of_2_means_the_last_token(tmp_path):
    save(randomise(TextEncoder(TEXT), 25).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "hidden_act": "gelu"}))
    assert text_encoder.load(tmp_path / "model.safetensors").config == TEXT


# ------------------------------------------------------------------------------ the tokenizer

PROMPTS = ["", "a photo of a cat", "Anthropomorphic Cat, dressed as a PILOT",
    "it's don't I'll we've you're he'd I'm", "IT'S 'S 'T", "12345 3.14 2024-02-12", "!!!??? ...--- ;;",
    "  many   spaces \t\n and lines ", "\u00a0no-break\u3000ideographic\u2028line",
    "H\u00e9llo W\u00f6rld na\u00efve caf\u00e9's", "e\u0301 n\u0303 decomposed",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 flags \U0001f1e9\U0001f1ea",
    "\u0130stanbul \u1e9e \u01c5 \ufb01 \ufb02 \u00bd \u00b2", "a_b-c/d\\e {f} [g] <h> `i`",
    "tab\x07bell \x00 nul \x1b", "\u200bzero width", "<|endoftext|> inside",
    "a <|startoftext|>b <|endoftext|>", "<|ENDOFTEXT|>", "x" * 400, "word " * 100,
    "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f \u0e44\u0e17\u0e22 \ud55c\uad6d\uc5b4",
    "supercalifragilisticexpialidocious"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """CLIP's own vocabulary, 49408 tokens, from the file in open_clip_torch."""
    if find_spec("open_clip") is None:
        pytest.skip("the vocabulary comes with open_clip_torch")
    file = Path(find_spec("open_clip").submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1:49152 - 256 - 2 + 1]
    plain = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]  # stand for themselves
    letters = plain + sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(plain))
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = write_tokenizer(folder, letters, merges)
    assert len(tokens) == 49408 and tokens[320] == "a</w>"
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt[:24]))
def test_ids_and_mask_are_those_of_transformers(vocabulary, prompt):
    theirs = CLIPTokenizer.from_pretrained(vocabulary)([prompt], padding="max_length", max_length=77, truncation=True)
    ids, mask = Tokenizer(vocabulary)([prompt])
    assert ids.tolist() == theirs["input_ids"] and mask.tolist() == theirs["attention_mask"]


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_json_says_the_same_as_the_two_files(vocabulary, tmp_path):
    CLIPTokenizer.from_pretrained(vocabulary).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    for ours, theirs in zip(Tokenizer(vocabulary)(PROMPTS), Tokenizer(tmp_path)(PROMPTS)):
        assert torch.equal(ours, theirs)
