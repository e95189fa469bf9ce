#!/usr/bin/env python3
"""Makes test/fixtures/: small files in which PyTorch and Transformers say what slam must compute.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 transformers safetensors numpy scipy python_speech_features
    venv/bin/python test/reference.py            # all of them, half a minute
    venv/bin/python test/reference.py mfcc       # one, by the name of its function without `make_`

Everything is float32 on one CPU thread with fixed seeds, attention is Transformers' eager one, and every model has random
weights, at most 20,000 of them, drawn wider than a fresh model's so that attention is far from uniform.

Model folders are as `save_pretrained` writes them (config.json, model.safetensors, generation_config.json). Beside them:

  FOLDER/case.safetensors   what the model must answer
    tokens, targets, doc_start   (B,T) int32. A row holds several documents, then padding: token 0, target -1, doc_start t. A
                                 document's target is its next token, -1 at its end. No document holds token 0.
    hole                         (B,T,2) int32, first and end of what a token does not see; only in pairs_*
    logits                       (B,T,V) each document computed alone; 0 at padding
    loss                         (1) mean over all targets that are not -1
    grad.<parameter>             the gradient of that loss, for every parameter
    losses20, norms20, lrs20     (20) AdamW on this one batch: before step k the loss and the gradient's norm (before clipping), and
                                 the learning rate of step k, by get_cosine_with_min_lr_schedule_with_warmup (step 0: zero)
    settings                     (9) float64: lr, min_lr, warmup, steps, beta1, beta2, eps, weight_decay (on what has two dimensions), clip
                                 The same stand by name in the metadata, as JSON.
      greedy                       (n) int32: what generate(do_sample=False) appends to the first seven tokens; in some folders
  The folders that are about loading alone have tokens, doc_start and logits only.
  qwen2_tied/logits.txt     the first document for a program without a safetensors reader: its tokens, then a line of logits for each
  FOLDER/twist.safetensors  tokens, doc_start, and the logits after embed_tokens and lm_head were cut to 102 rows
  schedules.safetensors     <cosine|linear|inverse_sqrt|constant>.<0..2>: (61) float64, the learning rate of steps 0 to 60;
                            <the same>.settings: (4) float64: lr, min_lr, warmup, steps
  adamw.safetensors         p0 (n), g (10,n), p (10,n): parameters after each of 10 steps; settings (5): lr, beta1, beta2, eps, weight_decay
  mfcc.safetensors          signal.<k> (n) int16 at 16 kHz, mfcc25.<k> and mfcc50.<k> (frames,39): see make_mfcc
"""

import json
import math
import os
import sys

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.optim import SGD, AdamW
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import get_constant_schedule_with_warmup, get_inverse_sqrt_schedule, get_linear_schedule_with_warmup
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
STEPS = 20
SETTINGS = ("lr", "min_lr", "warmup", "steps", "beta1", "beta2", "eps", "weight_decay", "clip")

# ---- models ----


def new_model(kind, seed, std=0.2, **config):
    """A model of a model_type with random weights; `config` in this project's letters, theta: of the rotary positions, or all of their
    settings."""
    letters = {"C": "hidden_size", "L": "num_hidden_layers", "NH": "num_attention_heads", "KVH": "num_key_value_heads", "HS": "head_dim",
               "F": "intermediate_size", "V": "vocab_size", "T": "max_position_embeddings", "eps": "rms_norm_eps", "tied": "tie_word_embeddings"}
    theta = config.pop("theta")
    given = {letters.get(key, key): value for key, value in config.items()}
    rope = theta if isinstance(theta, dict) else {"rope_type": "default", "rope_theta": theta}
    c = AutoConfig.for_model(kind, rope_parameters=rope, bos_token_id=1, eos_token_id=1, pad_token_id=0, **given)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(c, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(std * torch.randn_like(p))
    n = sum(p.numel() for p in model.parameters())
    assert n <= 20000, f"{n} parameters"
    return model


def folder_of(name):
    """The fixture's folder, without what an earlier run wrote there."""
    path = os.path.join(FIXTURES, name)
    os.makedirs(path, exist_ok=True)
    for file in os.listdir(path):
        if file.endswith((".json", ".safetensors")):
            os.remove(os.path.join(path, file))
    return path


def in_float32(path):
    """The saved model again. (`.float()` on one that was brought to 16 bits would keep its rotary frequencies rounded.)"""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


# ---- batches ----


def documents(lengths, V, seed):
    """Random documents by row of lengths; token 0 is kept for padding."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(1, V, (n,), generator=g) for n in row] for row in lengths]


def packed(rows, T):
    """tokens, targets, doc_start (B,T) of rows of documents, padded to T."""
    tokens = torch.zeros(len(rows), T, dtype=torch.int32)
    targets = torch.full((len(rows), T), -1, dtype=torch.int32)
    doc_start = torch.arange(T, dtype=torch.int32).repeat(len(rows), 1)
    for b, row in enumerate(rows):
        t = 0
        for d in row:
            tokens[b, t : t + len(d)] = d
            targets[b, t : t + len(d) - 1] = d[1:]
            doc_start[b, t : t + len(d)] = t
            t += len(d)
        assert t <= T
    return {"tokens": tokens, "targets": targets, "doc_start": doc_start}


def is_padding(batch):
    """(B,T): the positions of token 0, a piece of its own each."""
    T = batch["tokens"].shape[1]
    return (batch["tokens"] == 0) & (batch["doc_start"] == torch.arange(T))


def logits_alone(model, rows, T):
    """(B,T,V): every document run by itself, padding 0."""
    out = []
    for row in rows:
        parts = [model(input_ids=d[None].long()).logits[0] for d in row]
        parts.append(torch.zeros(T - sum(len(d) for d in row), model.config.vocab_size))
        out.append(torch.cat(parts))
    return torch.stack(out)


def logits_packed(model, batch):
    """(B,T,V): the rows as they are, by a mask of documents and holes and positions that begin again."""
    tokens, doc_start = batch["tokens"].long(), batch["doc_start"].long()
    B, T = tokens.shape
    hole = batch.get("hole", torch.zeros(B, T, 2, dtype=torch.int32)).long()
    i, j = torch.arange(T)[None, :, None], torch.arange(T)[None, None, :]
    sees = (j <= i) & (j >= doc_start[:, :, None]) & ((j < hole[:, :, :1]) | (j >= hole[:, :, 1:]))
    mask = torch.zeros(B, 1, T, T).masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
    positions = torch.arange(T) - doc_start - (hole[..., 1] - hole[..., 0])
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits


def mean_loss(logits, targets):
    flat = targets.flatten().long()
    return functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1, reduction="sum") / (flat >= 0).sum()


def check_packing(model, batch, logits):
    """What stands in one row, masked, is what each document says alone."""
    real = ~is_padding(batch)
    with torch.no_grad():
        difference = (logits_packed(model, batch) - logits)[real].norm() / logits[real].norm()
    assert difference < 2e-6, f"packed and alone differ by {difference:.1e}"


# ---- cases ----


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()}


def train(model, rows, batch, s):
    """STEPS steps of AdamW as Hugging Face's Trainer takes them: losses, norms, learning rates."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": s["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimiser = AdamW(groups, lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["eps"], foreach=False)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimiser, s["warmup"], s["steps"], min_lr=s["min_lr"])
    losses, norms, lrs = [], [], []
    for _ in range(s["steps"]):
        loss = mean_loss(logits_alone(model, rows, batch["tokens"].shape[1]), batch["targets"])
        optimiser.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip"]).item())
        losses.append(loss.item())
        lrs.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return losses, norms, lrs


def check_conditioning(model, rows, batch, s, losses, norms):
    """The 20 losses and norms must not depend on float32's last bits, or no other program could reproduce them."""
    exact, exact_norms, _ = train(model.double(), rows, batch, s)
    worst, worst_norm = (max(abs(a - b) / b for a, b in zip(x, y)) for x, y in ((losses, exact), (norms, exact_norms)))
    assert worst < 3e-6 and worst_norm < 3e-5, f"float32 and float64 losses differ by {worst:.1e}, norms by {worst_norm:.1e}"
    return worst


def greedy(model, prompt, n):
    """The n tokens that follow the prompt, none of them closely; never token 0, as nothing ends a fixture's generation."""
    out = model.generate(prompt[None].long(), max_new_tokens=n, do_sample=False, suppress_tokens=[0], eos_token_id=None, output_scores=True,
                         return_dict_in_generate=True)
    best = torch.stack(out.scores).squeeze(1).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "two tokens are about as likely"
    return out.sequences[0, len(prompt) :].int()


def write_case(name, model, lengths, T, seed, new=0, **settings):
    """FOLDER/ and FOLDER/case.safetensors: the whole of it."""
    path = folder_of(name)
    model.save_pretrained(path)
    rows = documents(lengths, model.config.vocab_size, seed)
    batch = packed(rows, T)
    logits = logits_alone(model, rows, T)
    loss = mean_loss(logits, batch["targets"])
    check_packing(model, batch, logits.detach())
    case = dict(batch, logits=logits.detach(), loss=loss.detach().reshape(1), **gradients(model, loss))
    if new:
        case.update(greedy=greedy(model, rows[0][0][:7], new))
    s = {"lr": 1e-2, "min_lr": 5e-4, "warmup": 3, "steps": STEPS, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip": 0.5}
    s.update(settings)
    losses, norms, lrs = train(model, rows, batch, s)
    case.update(losses20=torch.tensor(losses), norms20=torch.tensor(norms), lrs20=torch.tensor(lrs, dtype=torch.float64))
    case["settings"] = torch.tensor([s[key] for key in SETTINGS], dtype=torch.float64)
    save_file(case, os.path.join(path, "case.safetensors"), metadata={"settings": json.dumps(s)})
    # from the saved weights again, for training has moved this model's
    worst = check_conditioning(in_float32(path), rows, batch, s, losses, norms)
    n = sum(p.numel() for p in model.parameters())
    print(f"{name}: {n} parameters, loss {losses[0]:.4f} -> {losses[-1]:.4f}, norm {norms[0]:.2f} -> {norms[-1]:.2f}, float64 within {worst:.0e}")


def write_logits(path, model, lengths, T, seed, file="case.safetensors"):
    """tokens, doc_start and logits alone."""
    rows = documents(lengths, model.config.vocab_size, seed)
    batch = packed(rows, T)
    with torch.no_grad():
        logits = logits_alone(model, rows, T)
    check_packing(model, batch, logits)
    save_file({"tokens": batch["tokens"], "doc_start": batch["doc_start"], "logits": logits}, os.path.join(path, file))
    print(f"{os.path.basename(path)}/{file}: {sum(p.numel() for p in model.parameters())} parameters")


# ---- the fixtures ----


def make_qwen2_tied():
    model = new_model("qwen2", 1, C=36, L=2, NH=6, KVH=2, F=48, V=61, T=128, theta=10000.0, eps=1e-6, tied=True)
    write_case("qwen2_tied", model, [[7, 1, 19, 2, 10], [40], [3, 25, 8]], 40, 11)
    path = os.path.join(FIXTURES, "qwen2_tied")
    case = load_file(os.path.join(path, "case.safetensors"))
    with open(os.path.join(path, "logits.txt"), "w") as f:
        f.write(" ".join(str(t) for t in case["tokens"][0, :7].tolist()) + "\n")
        for row in case["logits"][0, :7].tolist():
            f.write(" ".join(f"{x:.6f}" for x in row) + "\n")


def make_qwen2_untied():
    model = new_model("qwen2", 2, C=28, L=3, NH=7, KVH=1, F=32, V=102, T=64, theta=1000000.0, eps=1e-5, tied=False)
    write_case("qwen2_untied", model, [[30, 2, 17], [1, 1, 5, 33, 9]], 52, 12, weight_decay=0.1)


def make_qwen2_wide_heads():
    """head_dim stands in the config and is not C/NH."""
    model = new_model("qwen2", 3, std=0.3, C=20, L=4, NH=5, KVH=5, HS=6, F=33, V=19, T=256, theta=1000.0, eps=1e-3, tied=False)
    write_case("qwen2_wide_heads", model, [[64], [2, 50], [11, 12, 13, 1, 14], [9]], 64, 13, lr=5e-3, clip=1.0)


def make_llama_tied():
    model = new_model("llama", 4, C=36, L=1, NH=4, KVH=4, HS=14, F=60, V=37, T=128, theta=10000.0, eps=1e-5, tied=True)
    write_case("llama_tied", model, [[20, 1, 7], [2, 27]], 31, 14)


def make_llama_untied():
    model = new_model("llama", 5, C=32, L=2, NH=4, KVH=2, HS=10, F=40, V=45, T=2048, theta=500000.0, eps=1e-6, tied=False)
    write_case("llama_untied", model, [[15, 2, 30], [48], [1, 40, 4]], 48, 15)


def make_llama3():
    """The wavelengths of the twelve pairs lie on both sides of the band and in it: 64 / 4 to 64 / 1 positions."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = new_model("llama", 31, C=16, L=2, NH=2, KVH=1, HS=24, F=20, V=23, T=512, theta=rope, eps=1e-5, tied=True)
    write_case("llama3", model, [[70, 2], [30, 41]], 72, 31, new=24)


def make_llama3_wide_heads():
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "original_max_position_embeddings": 40}
    model = new_model("llama", 32, C=12, L=1, NH=2, KVH=2, HS=80, F=16, V=21, T=1280, theta=rope, eps=1e-6, tied=False)
    write_case("llama3_wide_heads", model, [[60], [20, 35]], 60, 32, new=24)


def make_llama_linear():
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
    model = new_model("llama", 33, C=16, L=2, NH=4, KVH=2, F=20, V=23, T=128, theta=rope, eps=1e-6, tied=True)
    write_case("llama_linear", model, [[20, 1, 7], [2, 27]], 31, 33, new=24)


def make_mistral():
    model = new_model("mistral", 34, C=16, L=2, NH=4, KVH=2, HS=6, F=20, V=23, T=128, theta=1000000.0, eps=1e-5, tied=False, sliding_window=None)
    write_case("mistral", model, [[20, 1, 7], [2, 27]], 31, 34, new=24)


def make_qwen3_tied():
    model = new_model("qwen3", 35, C=16, L=2, NH=4, KVH=2, HS=10, F=24, V=23, T=128, theta=1000000.0, eps=1e-6, tied=True)
    write_case("qwen3_tied", model, [[20, 1, 7], [2, 27]], 31, 35, new=24)


def make_qwen3_untied():
    """Heads of another size than C / NH."""
    model = new_model("qwen3", 36, C=12, L=2, NH=3, KVH=1, HS=48, F=20, V=21, T=64, theta=10000.0, eps=1e-3, tied=False)
    write_case("qwen3_untied", model, [[40], [3, 25, 8]], 40, 36, weight_decay=0.1, lr=2e-3, new=24)


def make_olmo2_tied():
    model = new_model("olmo2", 37, C=16, L=3, NH=4, KVH=4, F=20, V=23, T=128, theta=500000.0, eps=1e-6, tied=True)
    write_case("olmo2_tied", model, [[20, 1, 7], [2, 27]], 31, 37, lr=2e-3, new=24)


def make_olmo2_untied():
    model = new_model("olmo2", 38, C=24, L=2, NH=6, KVH=2, F=28, V=21, T=64, theta=10000.0, eps=1e-4, tied=False)
    write_case("olmo2_untied", model, [[40], [3, 25, 8]], 40, 38, lr=2e-3, new=24)


def make_smollm3():
    """Every fourth layer without positions, as it is where the config does not say which."""
    model = new_model("smollm3", 39, C=12, L=5, NH=2, KVH=1, F=16, V=23, T=128, theta=5000000.0, eps=1e-6, tied=True)
    write_case("smollm3", model, [[20, 1, 7], [2, 27]], 31, 39, new=24)


def make_smollm3_untied():
    model = new_model("smollm3", 41, C=16, L=3, NH=4, KVH=2, F=20, V=21, T=64, theta=10000.0, eps=1e-5, tied=False, no_rope_layers=[0, 1, 0])
    write_case("smollm3_untied", model, [[40], [3, 25, 8]], 40, 40, new=24)


def make_sharded():
    model = new_model("llama", 6, C=24, L=2, NH=4, KVH=2, F=20, V=30, T=64, theta=10000.0, eps=1e-5, tied=False)
    path = folder_of("sharded")
    model.save_pretrained(path, max_shard_size="12KB")
    assert os.path.exists(os.path.join(path, "model.safetensors.index.json"))
    write_logits(path, model, [[9, 1, 6], [16]], 18, 16)


def make_bfloat16():
    model = new_model("qwen2", 7, C=24, L=2, NH=3, KVH=1, F=28, V=26, T=64, theta=10000.0, eps=1e-6, tied=True).to(torch.bfloat16)
    path = folder_of("bfloat16")
    model.save_pretrained(path)
    write_logits(path, in_float32(path), [[9, 2, 5], [16]], 18, 17)


def make_float16():
    """Some weights lie below float16's smallest normal number."""
    model = new_model("qwen2", 8, C=24, L=1, NH=2, KVH=2, F=28, V=26, T=64, theta=10000.0, eps=1e-6, tied=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] *= 1e-4
        model.model.embed_tokens.weight[1] *= 1e-4
    model = model.to(torch.float16)
    path = folder_of("float16")
    model.save_pretrained(path)
    write_logits(path, in_float32(path), [[9, 2, 5], [16]], 18, 18)


def make_extra_tensors():
    """A tied model whose file repeats the embedding as lm_head and brings old checkpoints' rotary_emb.inv_freq along."""
    model = new_model("llama", 9, C=16, L=2, NH=4, KVH=2, F=20, V=22, T=64, theta=10000.0, eps=1e-5, tied=True)
    path = folder_of("extra_tensors")
    model.save_pretrained(path)
    file = os.path.join(path, "model.safetensors")
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for k in range(2):
        weights[f"model.layers.{k}.self_attn.rotary_emb.inv_freq"] = model.model.rotary_emb.inv_freq.clone()
    save_file(weights, file, metadata={"format": "pt"})
    write_logits(path, model, [[9, 2, 5], [16]], 18, 19)


def to_slamkit(name, model, text_vocabulary):
    """The folder of a SlamKit UnitLM around `model`: `lm.` before every name, and a config.json as its Transformers 4 writes it. There
    the transformer's settings stand under base_config, the rotary base as a bare number (once more outside), and base_config keeps
    the text model's vocabulary: what counts is the outer vocab_size."""
    path = folder_of(name)
    c = model.config
    weights = {f"lm.{key}": value.clone() for key, value in model.state_dict().items() if not (c.tie_word_embeddings and key == "lm_head.weight")}
    save_file(weights, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    theta = int(c.rope_parameters["rope_theta"])
    text_model = {"qwen2": "Qwen/Qwen2.5-0.5B", "llama": "HuggingFaceTB/SmolLM2-135M"}[c.model_type]
    base = {
        "_attn_implementation_autoset": True, "_name_or_path": text_model, "add_cross_attention": False,
        "architectures": [type(model).__name__], "attention_dropout": 0.0, "bad_words_ids": None, "bos_token_id": 1, "diversity_penalty": 0.0,
        "eos_token_id": 1, "hidden_act": "silu", "hidden_size": c.hidden_size, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "initializer_range": 0.02, "intermediate_size": c.intermediate_size, "is_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "max_length": 20, "max_position_embeddings": c.max_position_embeddings, "max_window_layers": 24, "model_type": c.model_type,
        "num_attention_heads": c.num_attention_heads, "num_hidden_layers": c.num_hidden_layers, "num_key_value_heads": c.num_key_value_heads,
        "pad_token_id": 0, "pruned_heads": {}, "repetition_penalty": 1.0, "rms_norm_eps": c.rms_norm_eps, "rope_scaling": None,
        "rope_theta": theta, "sliding_window": None, "tie_word_embeddings": c.tie_word_embeddings, "torch_dtype": "float32",
        "use_cache": True, "use_sliding_window": False, "vocab_size": text_vocabulary,
    }  # fmt: skip
    if c.model_type == "llama":
        base.update(attention_bias=False, mlp_bias=False, pretraining_tp=1, head_dim=c.head_dim)
    outer = {} if c.tie_word_embeddings else {"tie_word_embeddings": False}
    outer.update({
        "architectures": ["UnitLM"], "base_config": base, "base_model_name": text_model,
        "max_position_embeddings": c.max_position_embeddings, "model_type": "speech_language_model", "rope_theta": theta,
        "torch_dtype": "float32", "transformers_version": "4.48.3", "trust_remote_code": None, "twist_init": True, "use_cache": True,
        "use_safetensors": None, "vocab_size": c.vocab_size,
    })  # fmt: skip
    for file, content in (("config.json", outer), ("generation_config.json", {"_from_model_config": True, "transformers_version": "4.48.3"})):
        with open(os.path.join(path, file), "w") as f:
            f.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return path


def make_slamkit_qwen2():
    model = new_model("qwen2", 10, C=24, L=2, NH=3, KVH=1, F=28, V=26, T=64, theta=10000.0, eps=1e-6, tied=True)
    write_logits(to_slamkit("slamkit_qwen2", model, 151936), model, [[9, 2, 5], [16]], 18, 20)


def make_slamkit_llama():
    model = new_model("llama", 11, C=24, L=1, NH=4, KVH=2, F=28, V=26, T=64, theta=100000.0, eps=1e-5, tied=False)
    write_logits(to_slamkit("slamkit_llama", model, 26), model, [[9, 2, 5], [16]], 18, 21)


def make_twist_tied():
    twist("twist_tied", new_model("qwen2", 12, C=16, L=2, NH=4, KVH=2, F=24, V=300, T=64, theta=1000000.0, eps=1e-6, tied=True), 22)


def make_twist_untied():
    twist("twist_untied", new_model("llama", 13, C=16, L=1, NH=4, KVH=1, F=24, V=300, T=64, theta=10000.0, eps=1e-5, tied=False), 23)


def twist(name, model, seed):
    """A text model, and what it says with the first 102 rows of its vocabulary."""
    path = folder_of(name)
    model.save_pretrained(path)
    head = model.lm_head.weight[:102].clone()
    model.resize_token_embeddings(102)
    assert torch.equal(model.lm_head.weight, head)
    write_logits(path, model, [[9, 2, 5], [16]], 18, seed, "twist.safetensors")


def make_pairs_qwen2():
    model = new_model("qwen2", 14, C=24, L=2, NH=6, KVH=2, F=28, V=26, T=128, theta=10000.0, eps=1e-6, tied=True)
    pairs("pairs_qwen2", model, [[(6, 9, 4)], [(1, 2, 3), (5, 1, 7)], [(3, 7, 1), (2, 4, 6)]], 27, 24)


def make_pairs_llama():
    model = new_model("llama", 15, C=20, L=3, NH=2, KVH=1, HS=8, F=24, V=26, T=128, theta=1000000.0, eps=1e-5, tied=False)
    pairs("pairs_llama", model, [[(30, 21, 25)], [(2, 35, 40)]], 80, 25)


def pairs(name, model, lengths, T, seed):
    """Preference pairs that share their prompt. A piece is `prompt but its last, last, chosen, last, rejected`; for the second last
    and rejected the hole is `last, chosen`. Logits come from the sequences `prompt chosen` and `prompt rejected`, one at a time; the
    targets inside the prompt count once. The first piece of a row is not the only one, so doc_start and holes do not begin at 0."""
    path = folder_of(name)
    model.save_pretrained(path)
    g = torch.Generator().manual_seed(seed)
    V, B = model.config.vocab_size, len(lengths)
    batch = packed([[]] * B, T)
    batch["hole"] = torch.zeros(B, T, 2, dtype=torch.int32)
    rows = []
    for b, row in enumerate(lengths):
        t, parts = 0, []
        for sizes in row:
            prompt, chosen, rejected = (torch.randint(1, V, (n,), generator=g) for n in sizes)
            P, N = len(prompt), len(chosen)
            piece = torch.cat([prompt, chosen, prompt[-1:], rejected])
            second = P + N  # where the second `last` stands
            with_chosen = model(input_ids=torch.cat([prompt, chosen])[None]).logits[0]
            with_rejected = model(input_ids=torch.cat([prompt, rejected])[None]).logits[0]
            batch["tokens"][b, t : t + len(piece)] = piece
            batch["targets"][b, t : t + second - 1] = piece[1:second]
            batch["targets"][b, t + second : t + len(piece) - 1] = rejected
            batch["doc_start"][b, t : t + len(piece)] = t
            batch["hole"][b, t + second : t + len(piece)] = torch.tensor([t + P - 1, t + second])
            parts += [with_chosen, with_rejected[P - 1 :]]
            t += len(piece)
        rows.append(torch.cat(parts + [torch.zeros(T - t, V)]))
    logits = torch.stack(rows)
    loss = mean_loss(logits, batch["targets"])
    check_packing(model, batch, logits.detach())
    case = dict(batch, logits=logits.detach(), loss=loss.detach().reshape(1), **gradients(model, loss))
    save_file(case, os.path.join(path, "case.safetensors"))
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, loss {loss.item():.4f}")


def make_schedules():
    def rates(lr, schedule):
        optimiser = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = schedule(optimiser)
        out = []
        for _ in range(61):
            out.append(scheduler.get_last_lr()[0])
            optimiser.step()
            scheduler.step()
        return out

    kinds = {
        "cosine": lambda min_lr, warmup, steps: lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, warmup, steps, min_lr=min_lr),
        "linear": lambda min_lr, warmup, steps: lambda o: get_linear_schedule_with_warmup(o, warmup, steps),
        "inverse_sqrt": lambda min_lr, warmup, steps: lambda o: get_inverse_sqrt_schedule(o, warmup),
        "constant": lambda min_lr, warmup, steps: lambda o: get_constant_schedule_with_warmup(o, warmup),
    }
    out = {}
    for kind, make in kinds.items():
        for k, (lr, min_lr, warmup, steps) in enumerate([(1e-3, 5e-5, 10, 60), (5e-3, 0.0, 0, 61), (2e-4, 1e-4, 1, 1000)]):
            out[f"{kind}.{k}"] = torch.tensor(rates(lr, make(min_lr, warmup, steps)), dtype=torch.float64)
            out[f"{kind}.{k}.settings"] = torch.tensor([lr, min_lr, warmup, steps], dtype=torch.float64)
    save_file(out, os.path.join(FIXTURES, "schedules.safetensors"))
    print(f"schedules: {len(out) // 2}")


def make_adamw():
    """Gradients of many magnitudes, zero among them (eps decides there)."""
    torch.manual_seed(31)
    n, settings = 64, (3e-3, 0.9, 0.95, 1e-8, 0.1)
    p = torch.nn.Parameter(torch.randn(n))
    start, after = p.detach().clone(), []
    g = torch.randn(10, n) * 10.0 ** torch.linspace(-10, 2, n)
    g[:, ::9] = 0
    optimiser = AdamW([p], lr=settings[0], betas=settings[1:3], eps=settings[3], weight_decay=settings[4], foreach=False)
    for k in range(10):
        p.grad = g[k].clone()
        optimiser.step()
        after.append(p.detach().clone())
    out = {"p0": start, "g": g, "p": torch.stack(after), "settings": torch.tensor(settings, dtype=torch.float64)}
    save_file(out, os.path.join(FIXTURES, "adamw.safetensors"))
    print("adamw")


def make_mfcc():
    """13 MFCC (the first is the log of the frame's energy), their deltas, and the deltas' deltas, by python_speech_features:
    frames of 64 ms every 40 ms (25 Hz) and of 32 ms every 20 ms (50 Hz). The second signal has 150 ms of digital silence."""
    from python_speech_features import delta, mfcc

    rate = 16000
    rng = numpy.random.default_rng(41)
    t = numpy.arange(rate) / rate
    chirp = 0.4 * numpy.sin(2 * math.pi * (100 * t + 1900 * t * t)) + 0.05 * rng.standard_normal(rate)
    t = numpy.arange(10007) / rate
    voice = sum(0.3 / k * numpy.sin(2 * math.pi * k * 140 * t + k) for k in range(1, 25)) * (0.6 + 0.4 * numpy.sin(2 * math.pi * 3 * t))
    voice += 0.002 * rng.standard_normal(len(t))
    voice[4000:6400] = 0
    out = {}
    for k, x in enumerate((chirp, voice)):
        signal = numpy.clip(numpy.round(x * 32768), -32768, 32767).astype(numpy.int16)
        out[f"signal.{k}"] = torch.from_numpy(signal)
        for hertz, length, step, nfft in ((25, 0.064, 0.04, 1024), (50, 0.032, 0.02, 512)):
            c = mfcc(signal / 32768.0, rate, winlen=length, winstep=step, numcep=13, nfilt=40, nfft=nfft, lowfreq=0, highfreq=8000, preemph=0.97,
                     ceplifter=22, appendEnergy=True, winfunc=numpy.hamming)  # fmt: skip
            d = delta(c, 2)
            out[f"mfcc{hertz}.{k}"] = torch.from_numpy(numpy.concatenate([c, d, delta(d, 2)], axis=1)).float()
    save_file(out, os.path.join(FIXTURES, "mfcc.safetensors"))
    print("mfcc:", {name: tuple(x.shape) for name, x in out.items()})


def make_sizes():
    """Prints the table `sizes` of test_model.c: parameters of Transformers' models, and the FLOP a token of forward and backward
    that PyTorch counts, those of the weights apart from those of attention, which eager attention computes for all T x T pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    for kind, V, C, L, NH, KVH, HS, F, tied, T in (
        ("qwen2", 151936, 896, 24, 14, 2, 64, 4864, 1, 128),
        ("qwen2", 502, 896, 24, 14, 2, 64, 4864, 1, 1024),
        ("qwen2", 102, 128, 4, 4, 2, 32, 384, 1, 256),
        ("llama", 2000, 192, 3, 6, 2, 32, 500, 0, 100),
    ):
        config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
        c = config(vocab_size=V, hidden_size=C, num_hidden_layers=L, num_attention_heads=NH, num_key_value_heads=KVH, head_dim=HS,
                   intermediate_size=F, tie_word_embeddings=bool(tied), attn_implementation="eager")  # fmt: skip
        with torch.device("meta"):  # shapes alone: no memory, no arithmetic
            m = model(c)
            positions, mask = torch.zeros(1, T, dtype=torch.long), torch.zeros(1, 1, T, T)
        with FlopCounterMode(display=False) as counter:
            m(positions, position_ids=positions, attention_mask=mask, use_cache=False).logits.sum().backward()
        flop = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        attention = flop.pop("aten.bmm")
        n = sum(p.numel() for p in m.parameters())
        row = [V, C, L, NH, KVH, HS, F, tied, int(kind == "qwen2"), T, n, sum(flop.values()) // T, attention // T]
        print("{" + ", ".join(map(str, row)) + "},")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.makedirs(FIXTURES, exist_ok=True)
    made = {name[5:]: function for name, function in globals().items() if name.startswith("make_")}
    for name in sys.argv[1:] or made:
        if name not in made:
            sys.exit(f"reference.py: no fixture '{name}'; there are {', '.join(made)}")
        made[name]()


if __name__ == "__main__":
    main()
