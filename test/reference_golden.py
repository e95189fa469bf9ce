#!/usr/bin/env python3
"""Checks the run of test/fixtures/golden/ against PyTorch and writes what PyTorch gets.

    venv/bin/python test/reference_golden.py     # with the Python of test/reference.py; a few seconds

Trains Transformers' model from init/ for the 20 steps of run/ in float64, with torch.optim.AdamW, every document alone. Writes

  torch.txt           `train STEP LOSS` and `val STEP LOSS` as losses.txt has them, `ppl NLL` of the weights after step 10
  torch.safetensors   <parameter>.exp_avg and <parameter>.exp_avg_sq after step 20, float32
  not_finite/         a model whose loss is NaN for rows with unit 49 and finite for all others, also after training: see not_finite()

and fails unless losses.txt is within 1e-5 of torch.txt, and the moments and weights of run/step_000010 within 1e-4 of PyTorch's, as
a part of each tensor's norm. optimizer.safetensors has exp_avg as <parameter>.m and exp_avg_sq as <parameter>.v.
"""

import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures", "golden")


def path(*names):
    return os.path.join(GOLDEN, *names)


def documents(name):
    """Token 1, the units + 2, token 1."""
    with open(path(name)) as file:
        return [torch.tensor([1] + [u + 2 for u in json.loads(line)["units"]] + [1]) for line in file]


def mean_loss(model, batch):
    losses = [functional.cross_entropy(model(input_ids=d[None, :-1]).logits[0], d[1:], reduction="sum") for d in batch]
    return sum(losses) / sum(len(d) - 1 for d in batch)


def distance(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def not_finite():
    """Unit 49 (token 51) alone has a value in channel 0. One unit of the MLP multiplies it by 3e38, which is infinite, and goes into the
    output with weight 0, which makes NaN. For other tokens the channel is 0, and whatever reads it or writes to it has weights of 0
    and gradients of 0, so that this stays as it is."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=52, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
                         max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    model = Qwen2ForCausalLM(config).float()
    layer = model.model.layers[0]
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(0.2 * torch.randn_like(p))
        embedding, mlp = model.model.embed_tokens.weight, layer.mlp
        embedding[:, 0] = 0
        embedding[51] = 0
        embedding[51, 0] = 100
        layer.input_layernorm.weight[0] = model.model.norm.weight[0] = 0
        layer.self_attn.o_proj.weight[0] = 0
        mlp.gate_proj.weight[:, 0] = mlp.up_proj.weight[:, 0] = 0
        mlp.gate_proj.weight[0, 0] = 3e38
        mlp.down_proj.weight[:, 0] = 0
    model.save_pretrained(path("not_finite"))


def main():
    setting = json.load(open(path("run", "step_000010", "trainer.json")))["settings"]
    number = {key: float(setting[key]) for key in ("lr", "min-lr", "beta1", "beta2", "eps", "weight-decay", "clip", "steps", "warmup")}
    batch, validation = documents("units.jsonl"), documents("val.jsonl")
    model = AutoModelForCausalLM.from_pretrained(path("init"), attn_implementation="eager").double()
    parameters = dict(model.named_parameters())
    groups = [{"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": number["weight-decay"]},
              {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=number["lr"], betas=(number["beta1"], number["beta2"]), eps=number["eps"])
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, int(number["warmup"]), int(number["steps"]), min_lr=number["min-lr"])
    lines, worst = [], 0.0
    for step in range(1, int(number["steps"]) + 1):
        optimizer.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), number["clip"])
        optimizer.step()
        schedule.step()
        lines.append(("train", step, loss.item()))
        if step % int(setting["eval-every"]) == 0:
            with torch.no_grad():
                lines.append(("val", step, mean_loss(model, validation).item()))
        if step == 10:
            saved = load_file(path("run", "step_000010", "optimizer.safetensors"))
            weights = load_file(path("run", "step_000010", "model.safetensors"))
            for name, p in parameters.items():
                state = optimizer.state[p]
                found = (distance(saved[name + ".m"], state["exp_avg"]), distance(saved[name + ".v"], state["exp_avg_sq"]),
                         distance(weights[name], p.detach()))
                worst = max(worst, *found)
                if max(found) > 1e-4:
                    sys.exit(f"{name}: moments and weights differ by {found} of PyTorch's norm")
    moments = {}
    for name, p in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{key}"] = optimizer.state[p][key].float().contiguous()
    save_file(moments, path("torch.safetensors"))
    not_finite()
    lines.append(("ppl", next(loss for kind, step, loss in lines if (kind, step) == ("val", 10))))
    with open(path("torch.txt"), "w") as file:
        file.writelines(" ".join([*map(str, line[:-1]), f"{line[-1]:.9f}"]) + "\n" for line in lines)
    theirs = {tuple(map(str, line[:-1])): line[-1] for line in lines}
    compared = 0
    for line in open(path("losses.txt")):
        *key, loss = line.split()
        if key[0] == "dpo":
            continue
        compared += 1
        if abs(float(loss) - theirs[tuple(key)]) > 1e-5:
            sys.exit(f"losses.txt: {line.strip()}, PyTorch has {theirs[tuple(key)]:.9f}")
    print(f"{compared} losses within 1e-5; moments and weights differ by {worst:.1e} of their norm at most")


main()
