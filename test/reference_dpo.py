#!/usr/bin/env python3
"""Makes test/fixtures/dpo/: what direct preference optimisation of a Transformers model gives, by its formula in PyTorch.

    venv/bin/python test/reference_dpo.py        # with the Python of test/reference.py; a few seconds

Every ending is computed by itself, as the sequence `prompt ending`, in float64; nothing is packed or shared.

  policy/, reference/   two models of one shape with other weights, as `save_pretrained` writes them
  pairs.jsonl           the pairs, in every spelling there is, one a line; the last prompts are empty and of one unit
  pairs.safetensors      logps, reference_logps (n,2) float64: of the chosen and the rejected ending of each pair, the closing 1 included
                        for label smoothing e = 0 and 0.1:
                        loss.<e>, margin.<e> (n) float64, of each pair; grad.<e>.<parameter> of the mean of the losses
                        settings (1) float64: beta
"""

import json
import os

import torch
from reference import folder_of, in_float32, new_model
from safetensors.torch import save_file
from torch.nn import functional

BETA = 0.1
SMOOTHING = {"0": 0.0, "0.1": 0.1}
LENGTHS = [(9, 5, 7), (14, 3, 3), (4, 12, 2), (20, 8, 11), (6, 1, 4), (3, 9, 9), (0, 5, 4), (1, 6, 3)]  # units of prompt, chosen, rejected


def spelled(units):
    return "".join(f"<Un{u}>" for u in units)


def line(k, parts):
    """The k-th pair as one of the three spellings."""
    names = ("prompt", "chosen", "rejected")
    if k % 3 == 0:
        pair = {name: {"units": units, "duration": [1 + u % 3 for u in units]} for name, units in zip(names, parts)}
        pair = {"prompt_path": f"{k}.wav", "chosen_path": f"{k}a.wav", "rejected_path": f"{k}b.wav", **pair}
    elif k % 3 == 1:
        pair = {name: spelled(units) for name, units in zip(names, parts)}
    else:
        pair = {name: {"audio_repr": spelled(units)} for name, units in zip(names, parts)}
        pair.update(prompt_text="a text", chosen_text="that never comes again")
    return json.dumps(pair)


def logp(model, prompt, ending):
    """Sum of the log-probabilities of `u.. 1` after `1 u..`."""
    before = [1] + [u + 2 for u in prompt]
    after = [u + 2 for u in ending] + [1]
    logits = model(input_ids=torch.tensor([before + after])).logits[0]
    said = functional.log_softmax(logits, dim=-1)
    return sum(said[len(before) - 1 + k, token] for k, token in enumerate(after))


def logps(model, pairs):
    return torch.stack([torch.stack([logp(model, prompt, chosen), logp(model, prompt, rejected)]) for prompt, chosen, rejected in pairs])


def main():
    torch.set_num_threads(1)
    path = folder_of("dpo")
    shape = dict(C=16, L=2, NH=4, KVH=2, F=20, V=23, T=64, theta=10000.0, eps=1e-6, tied=True)
    for name, seed in (("policy", 21), ("reference", 22)):
        new_model("qwen2", seed, std=0.4, **shape).save_pretrained(os.path.join(path, name))
    policy, reference = (in_float32(os.path.join(path, name)).double() for name in ("policy", "reference"))
    g = torch.Generator().manual_seed(23)
    pairs = [[torch.randint(0, shape["V"] - 2, (n,), generator=g).tolist() for n in lengths] for lengths in LENGTHS]
    with open(os.path.join(path, "pairs.jsonl"), "w") as f:
        f.writelines(line(k, parts) + "\n" for k, parts in enumerate(pairs))
    with torch.no_grad():
        kept = logps(reference, pairs)
    case = {"reference_logps": kept, "settings": torch.tensor([BETA], dtype=torch.float64)}
    for name, e in SMOOTHING.items():
        said = logps(policy, pairs)
        ratios = said - kept
        margin = ratios[:, 0] - ratios[:, 1]
        loss = -(1 - e) * functional.logsigmoid(BETA * margin) - e * functional.logsigmoid(-BETA * margin)
        policy.zero_grad()
        loss.mean().backward()
        case.update({f"loss.{name}": loss.detach(), f"margin.{name}": margin.detach(), "logps": said.detach()})
        case.update({f"grad.{name}.{key}": p.grad.float().clone() for key, p in policy.named_parameters()})
        print(f"dpo, smoothing {e}: loss {loss.mean().item():.4f}, margins {' '.join(f'{x:.2f}' for x in margin.tolist())}")
    save_file(case, os.path.join(path, "pairs.safetensors"))


if __name__ == "__main__":
    main()
