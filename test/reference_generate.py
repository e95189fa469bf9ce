#!/usr/bin/env python3
"""Makes test/fixtures/generate/: what Transformers generates, token by token, and the distributions that it samples from.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    venv/bin/python test/reference_generate.py      # two minutes, nearly all of them to find a seed

A Qwen2 model with random weights, drawn wide, as `save_pretrained` writes it; beside it generated.safetensors:
  prompts (P,T) int32, lengths (P)      prompts from left to right, padded with 0; one is token 1 alone
  greedy.<k> (P,N) int32                generate(do_sample=False) of the whole batch, padded on the left; -1 after token 1, which ends
  greedy.<k>.penalty (1) float64        its repetition penalty
  sampled.<k> (P,S) int32               generate(do_sample=True) without an end
  sampled.<k>.probabilities (P,S,V)     of each of its tokens, after all of Transformers' processors
  sampled.<k>.settings (4) float64      temperature, top-k (0: all), top-p, repetition penalty
Token 0 is suppressed. No choice is closer than MARGIN: between the two largest logits, at the edge of top-k or of top-p.
"""

import os

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures", "generate")
V, MARGIN = 40, 1e-3
LENGTHS, NEW, DRAWN = (1, 2, 9, 64, 66, 130), 48, 3
PENALTIES = (1.0, 1.3, 0.8)
SAMPLINGS = ((1.0, 0, 1.0, 1.0), (0.8, 10, 1.0, 1.1), (0.7, 0, 0.9, 1.0), (1.3, 12, 0.8, 1.5), (2.0, 5, 0.5, 0.7))


def new_model(seed):
    c = Qwen2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32,
                    vocab_size=V, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=1, pad_token_id=0,
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(c).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if name.endswith("norm.weight") else 0.5 * torch.randn_like(p))
    return model


def generate(model, prompts, n, **settings):
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=n, suppress_tokens=[0], output_scores=True, output_logits=True,
                         return_dict_in_generate=True, **settings)
    return out.sequences[:, longest:], torch.stack(out.scores, 1), torch.stack(out.logits, 1)


def greedy(model, prompts, penalty):
    """The tokens, or None where a choice is too close."""
    tokens, scores, _ = generate(model, prompts, NEW, do_sample=False, repetition_penalty=penalty)
    kept = torch.full((len(prompts), NEW), -1, dtype=torch.int32)
    for b, row in enumerate(tokens.tolist()):
        end = row.index(1) if 1 in row else len(row)
        kept[b, :end] = torch.tensor(row[:end])
        best = scores[b, : end + 1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() < MARGIN:
            return None
        alone = generate(model, prompts[b : b + 1], NEW, do_sample=False, repetition_penalty=penalty)[0][0].tolist()
        if alone[:end] != row[:end]:
            return None
    return kept


def is_close(logits, seen, temperature, top_k, top_p, penalty):
    """Whether an edge of top-k or top-p is: the processors' mathematics once more."""
    z = logits.double().clone()
    z[0] = -torch.inf
    for v in seen:
        z[v] = z[v] / penalty if z[v] > 0 else z[v] * penalty
    z = (z / temperature).sort(descending=True).values
    k = top_k or V
    if top_k and z[k - 1] - z[k] < MARGIN:
        return True
    return top_p < 1 and (z[:k].softmax(0).cumsum(0) - top_p).abs().min() < MARGIN


def sampled(model, prompts, settings):
    temperature, top_k, top_p, penalty = settings
    tokens, scores, logits = generate(model, prompts, DRAWN, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p,
                                      repetition_penalty=penalty, min_new_tokens=None, eos_token_id=None)
    for b, p in enumerate(prompts):
        for s in range(DRAWN):
            if is_close(logits[b, s], set(p + tokens[b, :s].tolist()), *settings):
                return None
    return {"": tokens.int(), ".probabilities": scores.softmax(-1), ".settings": torch.tensor(settings, dtype=torch.float64)}


def case(seed):
    """Everything of one seed, or None where something is too close to call."""
    model = new_model(seed)
    prompts = [[1] + torch.randint(2, V, (n - 1,)).tolist() for n in LENGTHS]
    table = torch.zeros(len(prompts), max(LENGTHS), dtype=torch.int32)
    for b, p in enumerate(prompts):
        table[b, : len(p)] = torch.tensor(p)
    tensors = {"prompts": table, "lengths": torch.tensor(LENGTHS, dtype=torch.int32)}
    ended = 0
    for k, penalty in enumerate(PENALTIES):
        tokens = greedy(model, prompts, penalty)
        if tokens is None:
            return None
        ended += int((tokens[:, -1] < 0).sum())
        tensors |= {f"greedy.{k}": tokens, f"greedy.{k}.penalty": torch.tensor([penalty], dtype=torch.float64)}
    if not 2 <= ended <= 12:
        return None
    for k, settings in enumerate(SAMPLINGS):
        part = sampled(model, prompts, settings)
        if part is None:
            return None
        tensors |= {f"sampled.{k}{name}": t.contiguous() for name, t in part.items()}
    return model, tensors


def main():
    torch.set_num_threads(1)
    for seed in range(1000):
        made = case(seed)
        if made:
            break
    model, tensors = made
    os.makedirs(FOLDER, exist_ok=True)
    model.save_pretrained(FOLDER)
    save_file(tensors, os.path.join(FOLDER, "generated.safetensors"))
    print(f"seed {seed}: {FOLDER}")


if __name__ == "__main__":
    main()
