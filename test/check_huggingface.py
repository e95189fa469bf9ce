#!/usr/bin/env python3
"""Does Transformers read a model that slam wrote as slam does?

    python test/check_huggingface.py FOLDER LOGITS.json

LOGITS.json is {"tokens": [t, ...], "logits": [[V numbers], ...]}, slam's own for one sequence. FOLDER is loaded by
AutoModelForCausalLM.from_pretrained; nothing in it may be missing or left over. The error is the largest difference over the largest
logit. Exits 1 above 2e-5, 2 where the file does not fit the model. Needs: pip install torch==2.13.0 transformers safetensors numpy
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

ALLOWED = 2e-5


def refuse(sentence):
    print(f"check_huggingface: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def main():
    if len(sys.argv) != 3:
        refuse("usage: check_huggingface.py FOLDER LOGITS.json")
    folder, path = sys.argv[1:]
    with open(path) as f:
        given = json.load(f)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            refuse(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))}")
    tokens, got = torch.tensor([given["tokens"]]), torch.tensor(given["logits"], dtype=torch.float64)
    V = model.config.vocab_size
    if tuple(got.shape) != (tokens.shape[1], V):
        refuse(f"{path}: logits are {tuple(got.shape)}, expected {(tokens.shape[1], V)}")
    if not torch.isfinite(got).all():
        refuse(f"{path}: logits are not finite")
    if int(tokens.min()) < 0 or int(tokens.max()) >= V:
        refuse(f"{path}: tokens {int(tokens.min())} to {int(tokens.max())}, expected 0 to {V - 1}")
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits[0].double()
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    kind = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters"
    print(f"{folder}: {kind}: largest error {error:.2e} of the largest logit over {tokens.shape[1]} tokens, allowed {ALLOWED:.0e}")
    sys.exit(error > ALLOWED)


main()
