#!/usr/bin/env python3
"""The other side of `make bench` and `make gpu-bench`: the same work by PyTorch and Transformers' Qwen2.

    python test/bench_torch.py --row hubert|vocoder --folder MODEL [--threads N] [--seconds S]
    python test/bench_torch.py --row generate [--threads N] [--seconds S]
    python test/bench_torch.py --row tiny|10m|slam [--threads N] [--seconds S] [--compile] [--attention sdpa|eager]
    python test/bench_torch.py --gpu attention|step [--keys FILE] [--seconds S] [--small] [--device cuda|cpu]

--row, on the CPU in float32: a step is forward, loss, backward, clipping and AdamW (PyTorch's fused one) on random tokens, one
document a row; of "slam" it is forward and backward alone, one micro-step. Two steps warm up ("slam": one; with --compile the first
one compiles), then steps are timed one by one for S seconds, three at least. Prints one line of JSON; its tokens_per_second comes
from the median step. A token's work is counted as 6 FLOP a parameter and 6 L T C for causal attention.

"generate": 64 prompts of 75 random tokens, continued by 150 each, sampled with a cache; tokens_per_second counts the new ones.

"hubert": the features of 15 s of noise by the HubertModel in MODEL, all of its layers; audio_seconds_per_second likewise.
"vocoder": 10 s of random units by the network of reference_vocoder.py with the weights in MODEL.

--gpu: a table on stdout, and lines `key value` in FILE, each as soon as it is known; what would begin S seconds after the start or
later is left out. attention: scaled_dot_product_attention by its flash and its cuDNN backend, forward and backward, without rotary
positions; times by events, medians. step: the Slam model's training step on whole rows of 1024 tokens. --small: tiny shapes.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time

began = time.perf_counter()
parser = argparse.ArgumentParser()
parser.add_argument("--row", choices=["tiny", "10m", "slam", "generate", "hubert", "vocoder"], default="tiny")
parser.add_argument("--folder")
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--seconds", type=float, help="10, with --gpu 300")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="sdpa is what Transformers takes by itself")
parser.add_argument("--gpu", choices=["attention", "step"])
parser.add_argument("--device", default="cuda")
parser.add_argument("--small", action="store_true")
parser.add_argument("--keys")
arguments = parser.parse_args()
if arguments.seconds is None:
    arguments.seconds = 300 if arguments.gpu else 10
if not arguments.gpu:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(arguments.threads)

import torch

#         C    L   NH  KVH  F     V    B   T
ROWS = {
    "tiny": (128, 4, 4, 2, 384, 102, 16, 256),
    "10m": (320, 8, 5, 1, 864, 502, 4, 512),
    "slam": (896, 24, 14, 2, 4864, 502, 1, 1024),
}


def qwen2(C, L, NH, KVH, F, V):
    import transformers

    config = transformers.Qwen2Config(
        hidden_size=C, num_hidden_layers=L, num_attention_heads=NH, num_key_value_heads=KVH, intermediate_size=F, vocab_size=V,
        max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-6, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation=arguments.attention,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).float().train()


def bench_cpu():
    import transformers

    C, L, NH, KVH, F, V, B, T = ROWS[arguments.row]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    model = qwen2(C, L, NH, KVH, F, V)
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
        "row": arguments.row, "tokens_per_second": round(rate, 1), "gflops": round(rate * flop / 1e9, 1),
        "threads": arguments.threads, "steps": len(times), "compile": arguments.compile,
        "attention": arguments.attention, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps(result))


def bench_generation(B=64, prompt=75, new=150):
    import transformers

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    model = qwen2(*ROWS["10m"][:6]).eval()
    rates = []

    def run():
        tokens = torch.randint(2, ROWS["10m"][5], (B, prompt))
        start = time.perf_counter()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=True, temperature=0.8, top_k=25,
                       eos_token_id=None, pad_token_id=0, use_cache=True)  # fmt: skip
        return B * new / (time.perf_counter() - start)

    run()
    began = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - began < arguments.seconds:
        rates.append(run())
    print(json.dumps({"row": "generate", "tokens_per_second": round(statistics.median(rates), 1), "threads": arguments.threads,
                      "steps": len(rates), "torch": torch.__version__, "transformers": transformers.__version__}))  # fmt: skip


def bench_hubert(seconds=15):
    import transformers

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    model = transformers.HubertModel.from_pretrained(arguments.folder, attn_implementation=arguments.attention).eval()
    audio = 0.1 * torch.randn(1, 16000 * seconds + 80)
    times = []
    with torch.inference_mode():
        for _ in range(2):
            model(audio)
        began = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < arguments.seconds:
            start = time.perf_counter()
            model(audio)
            times.append(time.perf_counter() - start)
    rate = seconds / statistics.median(times)
    print(json.dumps({"row": "hubert", "audio_seconds_per_second": round(rate, 2), "threads": arguments.threads, "steps": len(times),
                      "torch": torch.__version__, "transformers": transformers.__version__}))  # fmt: skip


def bench_vocoder(seconds=10):
    from reference_vocoder import Vocoder
    from safetensors.torch import load_file

    torch.set_num_threads(arguments.threads)
    with open(arguments.folder + "/config.json") as f:
        model = Vocoder(dict(json.load(f), dur_predictor_params=None)).eval()
    model.load_state_dict(load_file(arguments.folder + "/model.safetensors"))
    units = torch.randint(0, 500, (25 * seconds,))
    times = []
    with torch.inference_mode():
        for _ in range(2):
            model(units, torch.ones_like(units), 0, 0)
        began = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < arguments.seconds:
            start = time.perf_counter()
            model(units, torch.ones_like(units), 0, 0)
            times.append(time.perf_counter() - start)
    rate = seconds / statistics.median(times)
    print(json.dumps({"row": "vocoder", "audio_seconds_per_second": round(rate, 2), "threads": arguments.threads, "steps": len(times),
                      "torch": torch.__version__, "transformers": "-"}))  # fmt: skip


# ---- on the GPU ----


def say(text):
    print(text, flush=True)


def key(name, value):
    if arguments.keys:
        with open(arguments.keys, "a") as f:
            f.write(f"{name} {value:.6g}\n")


def left():
    return arguments.seconds - (time.perf_counter() - began)


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def synchronize():
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def seconds_of_calls(work, n):
    if arguments.device != "cuda":
        start = time.perf_counter()
        for _ in range(n):
            work()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def seconds_of(work):
    """As gpu_bench.cu: the median of seven rounds of 20 ms."""
    seconds_of_calls(work, 2)
    once = seconds_of_calls(work, 2) / 2
    n = 2 if arguments.small or once > 0.01 else min(500, int(0.02 / once))
    return statistics.median(seconds_of_calls(work, n) / n for _ in range(1 if arguments.small else 7))


def attention_time(backend, B, T, NH, KVH, HS, shared):
    """Seconds forward and backward; shared: k and v have KVH heads, otherwise they were copied to NH heads beforehand."""
    from torch.nn.attention import sdpa_kernel

    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    heads = KVH if shared else NH
    q, k, v, dout = (
        torch.randn(B, T, h, HS, device=arguments.device, dtype=dtype).transpose(1, 2).requires_grad_(i < 3)
        for i, h in enumerate((NH, heads, heads, NH))
    )

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)

    with sdpa_kernel([backend]):
        forward_time = seconds_of(forward)
        out = forward()
        backward_time = seconds_of(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    return forward_time, backward_time


def gpu_attention():
    from torch.nn.attention import SDPBackend

    NH, KVH, HS = (2, 1, 64) if arguments.small else (14, 2, 64)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if arguments.device == "cpu":
        backends = {"flash": SDPBackend.MATH}
    say(f"PyTorch {torch.__version__}, scaled_dot_product_attention, bf16, causal, one document a row, no rotation")
    say("    T    B  backend    fwd ms  TFLOP/s     bwd ms  TFLOP/s   key/value heads")
    for T in (1024, 2048, 4096):
        T = T // 16 if arguments.small else T
        B = 2 if arguments.small else 32768 // T
        flop = 4 * T * T / 2 * HS * NH * B
        for name, backend in backends.items():
            results = []
            for shared in (True, False):
                if left() < 5:
                    say(f"{T:5} {B:4}  {name}: left out, the time is used up")
                    continue
                try:
                    forward, backward = attention_time(backend, B, T, NH, KVH, HS, shared)
                    results.append((forward + backward, forward, backward, shared))
                except Exception as error:
                    say(f"{T:5} {B:4}  {name}, {'shared' if shared else 'copied'}: {first_line(error)}")
            for _, forward, backward, shared in sorted(results):
                say(
                    f"{T:5} {B:4}  {name:8} {1e3 * forward:8.3f} {1e-12 * flop / forward:8.0f} {1e3 * backward:10.3f} "
                    f"{2.5e-12 * flop / backward:8.0f}   {'shared (enable_gqa)' if shared else 'copied to all heads before'}"
                )
            if results:
                _, forward, backward, _ = min(results)
                key(f"torch/attention/forward/{T}/{name}", 1e3 * forward)
                key(f"torch/attention/backward/{T}/{name}", 1e3 * backward)


def step_time(compiled, autocast, B, T, shape, first):
    """Seconds a token of a step of 78 rows, or as many whole micro-batches as come nearest; peak memory. `first` gets the
    seconds of the first step, which compiles."""
    torch.manual_seed(1)
    model = qwen2(*shape).to(arguments.device)
    if not autocast and arguments.device == "cuda":
        model = model.bfloat16()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    run = torch.compile(model, dynamic=False) if compiled else model
    parts = 1 if arguments.small else max(1, round(78 / B))
    tokens = [torch.randint(0, shape[5], (B, T), device=arguments.device) for _ in range(parts)]
    mask = {"full_attention": None}  # causal, with nothing to build: so that attention takes the flash backend

    def step():
        for part in tokens:
            with torch.autocast(arguments.device, torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = run(input_ids=part, labels=part, attention_mask=mask, use_cache=False).loss
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    synchronize()
    first.append(time.perf_counter() - start)
    times = []
    start = time.perf_counter()
    step()
    synchronize()
    while len(times) < (1 if arguments.small else 3) or (time.perf_counter() - start < 6 and not arguments.small):
        t = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - t)
    memory = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    return statistics.median(times) / (parts * B * T), memory


def gpu_step():
    import transformers

    shape = (128, 2, 2, 1, 192, 102) if arguments.small else ROWS["slam"][:6]
    T = 64 if arguments.small else ROWS["slam"][7]
    # Autocast keeps weights and their gradients in float32, as slam does and as Trainer does with bf16=True; weights in bf16 are
    # faster, and lose updates smaller than 1/256 of a weight. The first plain row is there in case nothing compiles in time.
    rows = [(False, True, 16), (True, True, 16), (True, True, 32), (True, False, 32), (True, True, 8), (True, False, 16)]
    versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    say(f"{versions}: Qwen2ForCausalLM, sdpa, fused AdamW, clipping, rows of {T}")
    say("compile  weights             micro   tokens/s   us/token   peak GB   first step s")
    compiling = []  # seconds of the first steps that compiled
    for compiled, autocast, B in rows:
        B = B // 8 if arguments.small else B
        how = f"{'yes' if compiled else 'no':7}  {'f32, bf16 autocast' if autocast else 'bf16':18} {B:6}"
        needed = 15 + (1.3 * max(compiling, default=60) if compiled else 0)
        if not arguments.small and left() < needed:
            say(f"{how}   left out: {left():.0f} s are left, it may take {needed:.0f}")
            continue
        first = []
        try:
            seconds, memory = step_time(compiled, autocast, B, T, shape, first)
            say(f"{how} {1 / seconds:10.0f} {1e6 * seconds:10.3f} {memory / 1e9:9.1f} {first[0]:10.1f}")
            key(f"torch/step/{'compile' if compiled else 'eager'}{'' if autocast else '_bf16'}/{B}", 1 / seconds)
        except Exception as error:
            say(f"{how}   {first_line(error)}")
        if compiled and first:
            compiling.append(first[0])
        gc.collect()
        torch._dynamo.reset()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if arguments.gpu and arguments.device == "cuda" and not torch.cuda.is_available():
    raise SystemExit("bench_torch.py: this PyTorch sees no GPU")
if arguments.gpu == "attention":
    gpu_attention()
elif arguments.gpu == "step":
    gpu_step()
elif arguments.row == "hubert":
    bench_hubert()
elif arguments.row == "vocoder":
    bench_vocoder()
elif arguments.row == "generate":
    bench_generation()
else:
    bench_cpu()
