#!/usr/bin/env python3
"""Makes test/fixtures/hubert/: small HuBERT models with random weights, and what Transformers' HubertModel says of short sounds.

    python3 -m venv venv && venv/bin/pip install torch transformers safetensors numpy
    venv/bin/python test/reference_hubert.py

    NAME/config.json, model.safetensors   as save_pretrained writes them, but for the spellings that a name speaks of
    NAME/case.safetensors                 audio.<i> (n) float16, samples at 16 kHz before the 40 zeros on each side;
                                          hidden.<i>.<l> (frames,C) float32, each utterance alone: 0 is what enters the first layer
                                          of the transformer, l what leaves layer l

Everything is float32 on one thread with fixed seeds. The sounds are tones in noise, short ones among them. Weights are drawn wider
than a fresh model's, so that attention is far from uniform; norms, biases and running statistics are drawn as well.
"""

import json
import os
import shutil

import numpy
import torch
from safetensors.torch import load_file, save_file
from transformers import HubertConfig, HubertForCTC, HubertModel

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures", "hubert")
SMALL = dict(conv_dim=(16, 16, 16), conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=40, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)  # fmt: skip
BASE = dict(conv_dim=(12,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2))
MODELS = {
    # HuBERT base; mHuBERT-25Hz; HuBERT large
    "base": dict(SMALL, **BASE),
    "mhubert": dict(SMALL, conv_dim=(12,) * 8, conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2, 2), conv_pos_batch_norm=True),
    "large": dict(SMALL, feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, num_conv_pos_embeddings=9),
    # the other combinations of switches
    "older_spelling": dict(SMALL),
    "with_head": dict(SMALL, conv_bias=True),
    "no_projection_norm": dict(SMALL, feat_proj_layer_norm=False, conv_dim=(5, 7, 9), conv_kernel=(7, 3, 1), conv_stride=(3, 3, 2),
                               hidden_size=18, num_attention_heads=3, num_conv_pos_embedding_groups=3, num_conv_pos_embeddings=5),
    "stable_batch_norm": dict(SMALL, do_stable_layer_norm=True, conv_pos_batch_norm=True, num_conv_pos_embeddings=7),
    "layer_unstable": dict(SMALL, feat_extract_norm="layer", layer_norm_eps=1e-3, num_conv_pos_embeddings=16),
    "one_convolution": dict(SMALL, conv_dim=(20,), conv_kernel=(25,), conv_stride=(20,), conv_bias=True, feat_proj_layer_norm=False,
                            num_conv_pos_embedding_groups=1, num_conv_pos_embeddings=3, do_stable_layer_norm=True),
    "large_batch_norm": dict(SMALL, feat_extract_norm="layer", conv_bias=True, conv_pos_batch_norm=True, feat_proj_layer_norm=False),
    "wide_heads": dict(SMALL, hidden_size=64, num_attention_heads=1, num_hidden_layers=1, intermediate_size=64, num_conv_pos_embedding_groups=8),
}  # fmt: skip


def draw(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if not p.is_floating_point():
                continue
            if "running_var" in name:
                p.uniform_(0.5, 2)
            elif p.dim() == 1:
                p.normal_(1 if name.endswith("norm.weight") else 0, 0.2)
            elif "original0" in name or "weight_g" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 1.5 / numpy.sqrt(p[0].numel()))


def sound(n, seed):
    rng = numpy.random.default_rng(seed)
    t = numpy.arange(n) / 16000
    x = 0.1 * rng.standard_normal(n) + 0.01
    for _ in range(3):
        x += rng.uniform(0.05, 0.3) * numpy.sin(2 * numpy.pi * rng.uniform(80, 4000) * t + rng.uniform(0, 6)) * (t > rng.uniform(0, t[-1] if n else 1))
    return x.astype(numpy.float16)


def hidden_states(model, audio):
    """From hooks: the list that output_hidden_states gives has had another last entry in earlier versions."""
    states = []
    layers = model.encoder.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, given: states.append(given[0][0]))]
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda _, given, out: states.append((out[0] if isinstance(out, tuple) else out)[0])))
    with torch.no_grad():
        model(torch.nn.functional.pad(torch.from_numpy(audio.astype(numpy.float32)), (40, 40))[None])
    for hook in hooks:
        hook.remove()
    return [s.clone() for s in states]


def make(name, settings, seed):
    folder = os.path.join(FIXTURES, name)
    shutil.rmtree(folder, ignore_errors=True)
    config = HubertConfig(**settings)
    head = HubertForCTC(config).eval() if name == "with_head" else None
    model = head.hubert if head else HubertModel(config).eval()
    model.eval()
    draw(head or model, seed)
    (head or model).save_pretrained(folder)
    path = os.path.join(folder, "model.safetensors")
    if name == "older_spelling":
        spelled = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        tensors = load_file(path)
        for new, old in spelled.items():
            tensors = {key.replace(new, old): value for key, value in tensors.items()}
        save_file(tensors, path, {"format": "pt"})
    step = int(numpy.prod(config.conv_stride))
    lengths = (60 * step, 23 * step + 7, 150 * step + 1, 1) if step <= 20 else (9000, 12345, 400)
    case = {}
    for i, n in enumerate(lengths):
        audio = sound(n, 100 * seed + i)
        case[f"audio.{i}"] = torch.from_numpy(audio)
        try:
            states = hidden_states(model, audio)
        except RuntimeError:  # too short for one frame
            states = []
        for l, state in enumerate(states):
            case[f"hidden.{i}.{l}"] = state.contiguous()
    save_file(case, os.path.join(folder, "case.safetensors"))
    print(name, sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder)), [tuple(case[f"hidden.{i}.0"].shape) for i in range(len(lengths)) if f"hidden.{i}.0" in case])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed, (name, settings) in enumerate(MODELS.items(), 1):
        make(name, dict(settings, attn_implementation="eager"), seed)
