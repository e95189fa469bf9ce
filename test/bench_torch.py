#!/usr/bin/env python3
"""The other side of `make bench`: the same training steps by PyTorch and Transformers' Qwen2, float32 on the CPU.

    python test/bench_torch.py --row tiny|10m|slam [--threads N] [--seconds S] [--compile] [--attention sdpa|eager]

A step is forward, loss, backward, clipping and AdamW (PyTorch's fused one) on random tokens, one document a row; of "slam" it is
forward and backward alone, one micro-step. Two steps warm up ("slam": one; with --compile the first one compiles), then steps are
timed one by one for S seconds, three at least. Prints one line of JSON; its tokens_per_second comes from the median step. A token's work is counted
as 6 FLOP a parameter and 6 L T C for causal attention.
"""

import argparse
import json
import os
import statistics
import time

parser = argparse.ArgumentParser()
parser.add_argument("--row", choices=["tiny", "10m", "slam"], default="tiny")
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--seconds", type=float, default=10)
parser.add_argument("--compile", action="store_true")
parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="sdpa is what Transformers takes by itself")
arguments = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(arguments.threads)

import torch
import transformers

#         C    L   NH  KVH  F     V    B   T
ROWS = {
    "tiny": (128, 4, 4, 2, 384, 102, 16, 256),
    "10m": (320, 8, 5, 1, 864, 502, 4, 512),
    "slam": (896, 24, 14, 2, 4864, 502, 1, 1024),
}


def main():
    C, L, NH, KVH, F, V, B, T = ROWS[arguments.row]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        hidden_size=C, num_hidden_layers=L, num_attention_heads=NH, num_key_value_heads=KVH, intermediate_size=F, vocab_size=V,
        max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-6, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation=arguments.attention,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).float().train()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    run = torch.compile(model) if arguments.compile else model
    tokens = torch.randint(0, V, (B, T))

    def step():
        optimiser.zero_grad(set_to_none=True)
        run(input_ids=tokens, labels=tokens).loss.backward()
        if arguments.row != "slam":
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimiser.step()

    times = []
    for _ in range(1 if arguments.row == "slam" else 2):
        step()
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < arguments.seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    rate = B * T / statistics.median(times)
    flop = 6 * sum(p.numel() for p in parameters) + 6 * L * T * C
    result = {
        "row": arguments.row, "tokens_per_second": round(rate, 1), "gflops": round(rate * flop / 1e9, 1), "threads": arguments.threads,
        "steps": len(times), "compile": arguments.compile, "attention": arguments.attention, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps(result))


main()
