#!/usr/bin/env python3
"""Makes test/fixtures/vocoder/: small unit vocoders (HiFi-GAN) with random weights, and what PyTorch computes from units.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 safetensors numpy
    venv/bin/python test/reference_vocoder.py

    NAME/config.json, model.safetensors   the config and the tensors of textlesslib's CodeHiFiGAN, as README's command saves them
    NAME/case.safetensors                 units (n) int32, durations (n) int32: given (an input) or predicted (what is expected);
                                          neither: one frame a unit; samples (m) float32
    The metadata of case.safetensors has "speaker", "style" and "durations": given, predicted or none.

The network is written here from the papers and the published configs with torch.nn's own layers, float32 on one thread. Weights
are drawn so that tanh is not saturated and predicted durations are far from where they round.
"""

import json
import os
import shutil

import numpy
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures", "vocoder")
BASE = {
    "resblock": "1", "upsample_rates": [5, 4, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 8, 4], "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]], "num_embeddings": 50,
    "embedding_dim": 8, "model_in_dim": 8, "code_hop_size": 640, "f0": False, "sampling_rate": 16000,
    "dur_predictor_params": {"encoder_embed_dim": 8, "var_pred_hidden_dim": 12, "var_pred_kernel_size": 3, "var_pred_dropout": 0.5},
}  # fmt: skip
SMALL = dict(BASE, upsample_rates=[3, 2], upsample_kernel_sizes=[7, 4], upsample_initial_channel=16, resblock_kernel_sizes=[3, 5],
             resblock_dilation_sizes=[[1, 3, 5], [1, 2, 4]], code_hop_size=6)  # fmt: skip
NO_DURATIONS = {key: None for key in ["dur_predictor_params"]}
# name: config, durations, speaker, style, spelling of the weights
MODELS = {
    "lj_25hz": (BASE, "predicted", 0, 0, "older"),  # the stages of the published 25 Hz and 50 Hz vocoders
    "expresso_50hz": (dict(BASE, upsample_rates=[5, 4, 4, 2, 2], upsample_kernel_sizes=[11, 8, 8, 4, 4], model_in_dim=24, code_hop_size=320,
                           resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5]] * 2,
                           multispkr="from_input_file", multistyle="from_input_file", num_speakers=4, num_styles=7, **NO_DURATIONS),
                      "none", 3, 6, "newer"),
    "given_durations": (SMALL, "given", 0, 0, "newer"),
    "plain_weights": (SMALL, "predicted", 0, 0, "plain"),
    "no_predictor": (dict(SMALL, **NO_DURATIONS), "given", 0, 0, "older"),
    "speakers": (dict(SMALL, multispkr="_", num_speakers=5, model_in_dim=16), "predicted", 4, 0, "older"),
    "default_speakers": (dict(SMALL, multispkr=True, multistyle=False, embedding_dim=4, model_in_dim=8, **NO_DURATIONS), "none", 199, 0, "older"),
    "styles": (dict(SMALL, multispkr=None, multistyle=True, num_styles=3, model_in_dim=16, **NO_DURATIONS), "none", 0, 1, "newer"),
    # kernels that are odd where the rate is even and the other way round: a sample more at the end of each stage
    "uneven_kernels": (dict(SMALL, upsample_rates=[2, 3, 1], upsample_kernel_sizes=[5, 8, 4], upsample_initial_channel=16,
                            resblock_kernel_sizes=[1, 3, 9], resblock_dilation_sizes=[[1, 1, 1], [7, 2, 1], [1, 1, 3]]),
                       "given", 0, 0, "older"),
    "short_kernels": (dict(SMALL, upsample_rates=[4, 8], upsample_kernel_sizes=[4, 9], resblock_kernel_sizes=[5],
                           resblock_dilation_sizes=[[1, 3, 5]], num_embeddings=7), "predicted", 0, 0, "plain"),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, channels, kernel, dilations):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, dilation=d, padding="same") for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding="same") for _ in dilations)

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(functional.leaky_relu(first(functional.leaky_relu(x, 0.1)), 0.1))
        return x


class Predictor(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(channels, hidden, 3, padding=1), nn.ReLU())
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, 3, padding=1), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)

    def forward(self, x):  # (n,C)
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = norm(conv(x.T[None])[0].T)
        return self.proj(x)[:, 0]


class Vocoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, E = c["upsample_initial_channel"], c["embedding_dim"]
        self.dict = nn.Embedding(c["num_embeddings"], E)
        if c.get("multispkr"):
            self.spkr = nn.Embedding(c.get("num_speakers", 200), E)
        if c.get("multistyle"):
            self.style = nn.Embedding(c.get("num_styles", 100), E)
        if c["dur_predictor_params"]:
            self.dur_predictor = Predictor(E, c["dur_predictor_params"]["var_pred_hidden_dim"])
        self.conv_pre = nn.Conv1d(c["model_in_dim"], C, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(C >> i, C >> i + 1, k, u, padding=(k - u) // 2)
            for i, (u, k) in enumerate(zip(c["upsample_rates"], c["upsample_kernel_sizes"]))
        )
        self.n_blocks = len(c["resblock_kernel_sizes"])
        self.resblocks = nn.ModuleList(
            Block(C >> i + 1, k, d) for i in range(len(self.ups)) for k, d in zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"])
        )
        self.conv_post = nn.Conv1d(C >> len(self.ups), 1, 7, padding=3)

    def log_durations(self, units):
        return self.dur_predictor(self.dict(units))

    def forward(self, units, durations, speaker, style):
        x = self.dict(units).repeat_interleave(durations, dim=0)
        for name, i in (("spkr", speaker), ("style", style)):
            if hasattr(self, name):
                x = torch.cat([x, getattr(self, name).weight[i].expand(len(x), -1)], dim=1)
        x = self.conv_pre(x.T[None])
        for i, up in enumerate(self.ups):
            x = up(functional.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in self.resblocks[i * self.n_blocks :][: self.n_blocks]]).mean(0)
        return torch.tanh(self.conv_post(functional.leaky_relu(x, 0.01)))[0, 0]


def draw(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
            elif ".ln" in name:
                p.normal_(1, 0.2)
            elif p.dim() == 3:
                taps = p[0].numel() if not name.startswith("ups") else p.shape[0] * p.shape[2] / 2
                p.normal_(0, (0.6 if "resblocks" in name else 1.2) / numpy.sqrt(taps))
            else:
                p.normal_(0, 1)
        if hasattr(model, "dur_predictor"):
            model.dur_predictor.proj.weight.mul_(0.25)
            model.dur_predictor.proj.bias.fill_(1)


def normed(model, spelling):
    """PyTorch's weight norm, one of its two spellings, on each convolution outside the duration predictor; g is not |v|."""
    for name, module in model.named_modules():
        if spelling != "plain" and isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and not name.startswith("dur_predictor"):
            (nn.utils.weight_norm if spelling == "older" else nn.utils.parametrizations.weight_norm)(module)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("weight_v", "original1")):
                p.mul_(torch.rand(len(p), 1, 1) + 0.5)
    return model


def make(name, config, durations, speaker, style, spelling):
    folder = os.path.join(FIXTURES, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    n = 5 if "hz" in name else 25
    small = n == 5 or name == "uneven_kernels"  # float16
    for seed in range(1000):
        torch.manual_seed(seed)
        model = Vocoder(config).eval()
        draw(model)
        normed(model, spelling)
        if small:
            model.half().float()
        units = torch.randint(0, config["num_embeddings"], (n,))
        units[0], units[1] = config["num_embeddings"] - 1, 0
        expected = torch.ones(n, dtype=torch.int64)
        if durations == "given":
            expected = torch.randint(1, 6, (n,))
        with torch.no_grad():
            if durations == "predicted":
                real = torch.exp(model.log_durations(units)) - 1
                expected = torch.clamp(torch.round(real).long(), min=1)
                if ((real - real.floor() - 0.5).abs() < 0.08).any() or len(set(expected.tolist())) < 4 or expected.max() > (5 if small else 12):
                    continue
            samples = model(units, expected, speaker, style)
        if 0.1 < samples.std() < 0.6:
            break
    tensors = {key: value.half() if small else value for key, value in model.state_dict().items()}
    case = {"units": units.int(), "samples": samples.contiguous()}
    if durations != "none":
        case["durations"] = expected.int()
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    save_file(case, os.path.join(folder, "case.safetensors"), {"durations": durations, "speaker": str(speaker), "style": str(style)})
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(name, size, "bytes,", len(samples), "samples, rms", float(samples.square().mean().sqrt()), expected.tolist(), "seed", seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, settings in MODELS.items():
        make(name, *settings)
