#!/usr/bin/env python3
"""Compares slam's HuBERT with Transformers' HubertModel on real recordings, at full size with random weights.

    python test/check_hubert.py [--layer 11] [--threads N] [--models mhubert,large,...] FILE.flac FILE.wav ...

Compiles slam.cu into a shared library, draws a model for each configuration, saves it, and runs both on all files, ours in one
batch. Prints the worst difference of an utterance's hidden states (Euclidean norm, relative), that of ours between alone and the
batch, the share of frames whose nearest of 500 random centroids differs though the two nearest do not tie within 1e-5, and audio seconds a second. Needs torch, transformers,
numpy, soundfile.
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
import time

import numpy
import soundfile
import torch
from transformers import HubertConfig, HubertModel

parser = argparse.ArgumentParser()
parser.add_argument("files", nargs="+")
parser.add_argument("--layer", type=int, default=11)
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--models", default="mhubert")
arguments = parser.parse_args()

EIGHT = dict(conv_dim=(512,) * 8, conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2, 2))
MODELS = {
    "mhubert": dict(EIGHT, conv_pos_batch_norm=True),
    "base": {},
    "large": dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, hidden_size=1024, num_attention_heads=16,
                  intermediate_size=4096, num_hidden_layers=12),
    "layer_batch_norm": dict(EIGHT, feat_extract_norm="layer", conv_pos_batch_norm=True, feat_proj_layer_norm=False),
    "stable": dict(EIGHT, do_stable_layer_norm=True, conv_bias=True),
    "stable_batch_norm": dict(do_stable_layer_norm=True, conv_pos_batch_norm=True, feat_proj_layer_norm=False),
    "layer": dict(EIGHT, feat_extract_norm="layer", conv_bias=True),
    "odd": dict(EIGHT, num_conv_pos_embeddings=95, num_conv_pos_embedding_groups=8, conv_bias=True),
}  # fmt: skip


class Config(ctypes.Structure):  # slam_unit_config
    _fields_ = [(name, ctypes.c_int) for name in ("features", "rate", "normalize", "dedup", "layer")]
    _fields_ += [("hubert", ctypes.c_char * 1024), ("fingerprint", ctypes.c_uint64), ("origin", ctypes.c_uint64)]


class Tokenizer(ctypes.Structure):  # the beginning of struct slam_tokenizer
    _fields_ = [("config", Config), ("K", ctypes.c_int), ("width", ctypes.c_int)]


class Units(ctypes.Structure):  # slam_units
    _fields_ = [("unit", ctypes.c_void_p), ("duration", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_size_t) for name in ("n", "frames", "samples")]


class Recording(ctypes.Structure):  # slam_recording
    _fields_ = [("samples", ctypes.c_void_p), ("n", ctypes.c_size_t)]
    _fields_ += [("features", ctypes.POINTER(ctypes.c_float)), ("units", Units)]


def library(folder):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.join(folder, "slam.so")
    subprocess.check_call(["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-x", "c", os.path.join(root, "slam.cu"), "-o", path, "-lm"])
    lib = ctypes.CDLL(path)
    lib.slam_cpu.restype = ctypes.c_void_p
    lib.slam_tokenizer_load.restype = ctypes.POINTER(Tokenizer)
    lib.slam_error.restype = ctypes.c_char_p
    return lib


def ours(lib, t, sounds):
    recordings = (Recording * len(sounds))(*(Recording(x.ctypes.data, len(x)) for x in sounds))
    if not lib.slam_units_encode(t, recordings, len(sounds)):
        raise SystemExit(lib.slam_error().decode())
    out = []
    for r in recordings:
        out.append(numpy.ctypeslib.as_array(r.features, (r.units.frames, t.contents.width)).copy())
        ctypes.CDLL(None).free(r.features)
    return out


def read(path):
    x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return numpy.ascontiguousarray(x.mean(1)), rate


def main():
    torch.set_num_threads(arguments.threads)
    sounds = [read(path)[0] for path in arguments.files]
    seconds = sum(map(len, sounds)) / 16000
    with tempfile.TemporaryDirectory() as folder:
        lib = library(folder)
        ops = lib.slam_cpu(arguments.threads)
        for name in arguments.models.split(","):
            torch.manual_seed(1)
            model = HubertModel(HubertConfig(**MODELS[name])).eval()
            with torch.no_grad():
                for key, p in list(model.named_parameters()) + list(model.named_buffers()):
                    if "running_var" in key:
                        p.uniform_(0.5, 2)
                    elif p.is_floating_point() and p.dim() == 1:
                        p.normal_(1 if key.endswith("norm.weight") else 0, 0.1)
            model.save_pretrained(folder)
            states = []
            layers = model.encoder.layers
            if arguments.layer:
                layers[arguments.layer - 1].register_forward_hook(lambda _, given, out: states.append(out[0] if isinstance(out, tuple) else out))
            else:
                layers[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))
            theirs, start = [], time.perf_counter()
            for x in sounds:
                with torch.no_grad():
                    model(torch.nn.functional.pad(torch.from_numpy(x), (40, 40))[None])
                theirs.append(states.pop().reshape(-1, model.config.hidden_size).numpy())
            their_time = time.perf_counter() - start
            config = Config(features=1, layer=arguments.layer, hubert=folder.encode())
            h = lib.slam_tokenizer_load(None, ctypes.byref(config), ctypes.c_void_p(ops))
            if not h:
                raise SystemExit(lib.slam_error().decode())
            ours(lib, h, sounds)
            start = time.perf_counter()
            batch = ours(lib, h, sounds)
            our_time = time.perf_counter() - start
            norm = numpy.linalg.norm
            worst = max(norm(a - b) / norm(b) for a, b in zip(batch, theirs))
            alone = max(norm(ours(lib, h, [x])[0] - a) / norm(a) for x, a in zip(sounds, batch))
            everything = numpy.concatenate(theirs)
            centroids = everything[numpy.random.default_rng(1).choice(len(everything), min(500, len(everything)), replace=False)] * 0.9
            units = [(centroids**2).sum(1) - 2 * numpy.concatenate(f) @ centroids.T for f in (batch, theirs)]
            two = numpy.sort(units[1] + (everything**2).sum(1, keepdims=True), 1)[:, :2]
            differ = ((units[0].argmin(1) != units[1].argmin(1)) & (two[:, 1] - two[:, 0] > 1e-5 * two[:, 1])).mean()
            print(f"{name}: frames {[len(a) for a in batch]}, worst relative difference {worst:.2g}, alone against batch {alone:.2g}, "
                  f"units that differ {differ:.2%}, slam {seconds / our_time:.1f} s/s, Transformers {seconds / their_time:.1f} s/s", flush=True)
            lib.slam_tokenizer_free(h)


main()
