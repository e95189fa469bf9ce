/* slam.h - train speech language models, in one file

   A speech language model is a language model over units. A feature extractor turns speech into frames, and each frame
   is replaced by the index of its nearest centroid, its unit. A transformer learns to predict the next unit. This file
   holds all of it: audio to units, units to packed batches, a Qwen-style transformer forward and backward on CPU and
   CUDA, AdamW, DPO, evaluation, and checkpoints that Hugging Face loads. The recipe is Slam (Maimon, Elmakies and Adi
   2025, arXiv 2502.15814).

   USE
   Copy slam.h and slam.cu. Add slam.cu to your build (`nvcc -c slam.cu`, or `cc -x c -c slam.cu` without CUDA) and
   include slam.h where you call it. Load a model and score a sequence of n tokens (token 1 opens and closes a
   document, unit u is token u + 2):

       slam_ops *ops = slam_cpu(0);                              // 0: OpenMP's number of threads
       slam_model *m = slam_model_load(ops, "runs/train/latest");
       slam_batch batch = slam_batch_new(1, n, 0);               // one row
       for (int t = 0; t < n; t++) batch.tokens[t] = tokens[t];
       for (int t = 0; t + 1 < n; t++) batch.targets[t] = tokens[t + 1];
       if (!m || !slam_model_plan(m, 1, n, SLAM_INFERENCE) || !slam_forward(m, &batch)) return puts(slam_error());
       // batch.losses[t]: -log p(tokens[t + 1] | tokens[0..t]), in nats
       slam_batch_free(&batch);
       slam_model_free(m);
       slam_ops_free(ops);

   CONTENTS (declarations: search for "---- n."; implementation: "SECTION n."; 2, 4 and 5 are declared in 1 and 3)
      1. BASE           errors, memory, strings, random numbers, threads, files
      2. FORMATS        JSON, CSV, safetensors, npy, token shards, unit lines
      3. OPS            every operation of the model with its mathematics (declarations only: struct slam_ops)
      4. OPS ON THE CPU the reference implementation: read it first
      5. OPS ON CUDA    the same operations as kernels
      6. COMM           several processes: MPI and NCCL
      7. MODEL          configuration, weights, forward, backward, decoding
      8. OPTIMISER      AdamW, schedules, gradient clipping, ZeRO-1
      9. BATCHES        documents -> chunks -> packed rows -> batches
     10. AUDIO          files, resampler, segmenter
     11. UNITS          MFCC, HuBERT, k-means, unit tokenizer, inputs, reader, writer, vocoder
     12. OBJECTIVES     language modelling, DPO, scores of sequences
     13. EVALUATION     n-grams, test sets, generation
     14. CHECKPOINTS    run folders, trainer state, log
     15. PROGRAMS       flags, progress bar, signals, devices

   BUILD SWITCHES
     SLAM_IMPLEMENTATION  this file defines the functions (slam.cu sets it)
     SLAM_SNDFILE         read FLAC, Ogg, MP3, AIFF, ... through libsndfile (-lsndfile); WAV needs nothing
     SLAM_BLAS            CPU matrix products by cblas_sgemm (-lopenblas, or -framework Accelerate)
     SLAM_MPI             several processes (flags of `mpicc -show`)
     SLAM_NCCL            with SLAM_MPI and nvcc: exchange GPU memory through NCCL (-lnccl)
     SLAM_OUT_OF_MEMORY(bytes)  called when host memory runs out; must not return. Default: message on stderr, exit(1)
     SLAM_EMULATOR        section 5 on the CPU by a C++17 compiler, with test/cuda_emulator.h
   Compiler flags: -fopenmp for parallel loops (else one thread); nvcc -arch=native adds section 5 (-lcublasLt).

   ERRORS
   A function that can fail returns 0 or NULL (-1 where 0 is a result) and sets slam_error(). The exception: when host
   memory outside slam_ops.alloc runs out, SLAM_OUT_OF_MEMORY is called. Only it and section 15 print. A slam_ops and
   everything made with it belong to one thread at a time. MIT licence. */
#ifndef SLAM_H
#define SLAM_H
#if defined(SLAM_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE // before the first system header: fsync, mmap, fileno under -std=c11
#endif
#include <stddef.h>
#include <stdint.h>
#if UINTPTR_MAX <= 0xffffffff
#error "slam needs a 64-bit system: sizes of files and models do not fit into 32 bits"
#endif
#ifdef __cplusplus
extern "C" {
#endif
#define SLAM_VERSION "0.2.0"

/* ---- 1. BASE ---- */

/* The message of this thread's last error: file and place, what was found, what was expected. */
const char *slam_error(void);
/* Sets it as printf does and returns 0. */
int slam_set_error(const char *format, ...);
/* Seconds on a monotonic clock. */
double slam_clock(void);

/* A growing list of strings, which it owns. */
typedef struct slam_strings {
    char **at;
    size_t n, capacity;
} slam_strings;
void slam_strings_add(slam_strings *, const char *item); /* a copy of item */
void slam_strings_free(slam_strings *);

/* A path by value: nothing to free. One that is too long is cut at a length that no system call accepts. */
typedef struct slam_path {
    char at[4160];
} slam_path;

/* Progress of long work, passed to a callback. The callback returns 0 to cancel. */
typedef struct slam_progress {
    const char *stage;    /* "fit", "tokenize", "score", ... */
    double done, total;   /* total 0: unknown */
    double audio_seconds; /* of audio decoded so far */
    const char *skipped;  /* the file or line that is skipped in this call, or NULL */
    const char *reason;   /* why it is skipped */
} slam_progress;
typedef int slam_progress_fn(void *context, const slam_progress *);

/* ---- 3. OPS: every operation of the model, its mathematics stated once ----

   B batch, T time, C channels, V vocabulary, NH heads, KVH key/value heads, HS head size, F MLP width, N = B T.
   (N,C) is a matrix of N rows, row-major. `slam_act` is the type of activations and of the weights that ops read: float
   on the CPU, bf16 or float on CUDA (`act_bytes`). rstd, lse, losses and gradients of parameters are float, sums
   double. "=" overwrites, "+=" adds: gradients of parameters accumulate over micro-batches. Arrays are device memory
   from `alloc`; structs of arguments and `host` are host memory. Ops return nothing: `finish` reports the first
   error. */
typedef struct slam_act slam_act;
typedef struct slam_ops slam_ops;
typedef struct slam_comm slam_comm; /* section 6 */

/* The algorithm of a GPU's matrix products, by shape. Plain data: with a copy of it products have the same bits. */
enum { SLAM_PRODUCTS = 64 };
typedef struct slam_products {
    char library[160];               /* "cuBLASLt 130100, NVIDIA H100 80GB HBM3, bf16": the list is for this one only */
    int tune;                        /* 1: the first product of a shape measures algorithms and stores the fastest */
    int measured;                    /* entries of the list that were measured: the first ones, never replaced */
    int unmeasured;                  /* number of others stored so far; the oldest is replaced */
    uint64_t list[SLAM_PRODUCTS][9]; /* hash of a shape, its algorithm (cublasLtMatmulAlgo_t) */
} slam_products;

/* Which keys each query sees, and the rotary table. Query i sees key j iff doc_start[i] <= j < doc_end[i] and not
   mask_start[i] <= j < mask_end[i]. Rotary positions count from doc_start and skip the masked span:
   i - doc_start[i] - (mask_end[i] - mask_start[i]). A span that is not empty lies within doc_start .. doc_end, and
   every query sees at least one key. */
typedef struct slam_mask {
    int B, T, NH, KVH, HS;
    int pairs;                        /* c < pairs: (c, c + pairs) of a head is rotated. HS/2: all of it; 0: nothing */
    const int *doc_start;             /* (B,T) */
    const int *doc_end;               /* (B,T), NULL: i + 1 (causal) */
    const int *mask_start, *mask_end; /* (B,T), NULL: no masked spans */
    const float *rope;                /* (T,2 pairs) rotary table, see rope_table */
} slam_mask;

typedef struct slam_adamw_params {
    double lr, beta1, beta2, eps, weight_decay, clip; /* clip: maximum norm of the gradient; 0: no clipping */
    long step;                                        /* 1 for the first update */
} slam_adamw_params;

enum { SLAM_IDENTITY, SLAM_GELU, SLAM_RELU, SLAM_ADD };

/* B rows of T frames, of which lengths_b count (NULL: all); G groups of C input and OC output channels each; TO output
   frames; K taps that are `dilation` frames apart, the first one `before` frames before the output frame's place. The
   input is scale x + shift (G C) (NULL: x), then leaky ReLU (Maas, Hannun and Ng 2013) with that slope (1: none). */
typedef struct slam_conv {
    int B, G, T, C, TO, OC, K, stride, dilation, before;
    float slope;
    int output; /* what follows the sum; SLAM_ADD: out += */
    const int *lengths;
    const slam_act *scale, *shift;
} slam_conv;

/* N rows of V logits, `stride` apart. */
typedef struct slam_xent {
    int N, V, stride;
    float scale;          /* of the gradient; 0: losses only */
    const float *weights; /* (N) of the losses in the gradient, NULL: 1 */
} slam_xent;

struct slam_ops {
    const char *name;        /* "cpu, 2 threads", "cuda:0 NVIDIA H100 80GB HBM3" */
    int act_bytes;           /* 4: float, 2: bf16 */
    int threads;             /* CPU threads of parallel loops */
    size_t memory;           /* total bytes of the device */
    int asynchronous;        /* the device computes while the host continues */
    int batch_invariant;     /* a row of a matmul's output has the same bits whatever the other rows are */
    slam_comm *comm;         /* the processes that train together; NULL: one process */
    slam_products *products; /* NULL: there is nothing to choose */

    /* Device memory: zeroed, aligned to 256 bytes. NULL and slam_error() when there is not enough. */
    void *(*alloc)(slam_ops *, size_t bytes);
    void (*release)(slam_ops *, void *p);
    void (*upload)(slam_ops *, void *to, const void *host, size_t bytes);     /* `host` may be reused at once */
    void (*download)(slam_ops *, void *host, const void *from, size_t bytes); /* waits for the work queued before */
    void (*copy)(slam_ops *, void *to, const void *from, size_t bytes);       /* within the device's memory */
    void (*zero)(slam_ops *, void *p, size_t bytes);
    int (*finish)(slam_ops *); /* waits for all queued work; 0 and slam_error() if any of it failed */
    void (*close)(slam_ops *);
    /* comm_stream: the CUDA stream of NCCL; NULL: MPI accesses the memory directly. comm_begin: the stream waits
       for all queued work. comm_end: later work waits for the stream. comm_done: 1 if the stream is idle. */
    void *comm_stream;
    void (*comm_begin)(slam_ops *);
    void (*comm_end)(slam_ops *);
    int (*comm_done)(slam_ops *);

    /* out (n) = in (n), converted */
    void (*to_act)(slam_ops *, slam_act *out, const float *in, size_t n);
    void (*to_float)(slam_ops *, float *out, const slam_act *in, size_t n);

    /* Embedding      x_i = table[tokens_i]            dtable_v += sum over i with tokens_i = v of dx_i
       x (N,C)  tokens (N)  table (V,C) */
    void (*embedding_forward)(slam_ops *, slam_act *x, const int *tokens, const slam_act *table, int N, int C);
    void (*embedding_backward)(slam_ops *, float *dtable, const slam_act *dx, const int *tokens, int N, int C, int V);

    /* Residual add and RMSNorm (Zhang and Sennrich 2019)
           s = x + delta
           rstd_i = 1 / sqrt(mean_c s_ic^2 + eps)           y_ic = w_c rstd_i s_ic
           ds_ic += rstd_i (w_c dy_ic - s_ic rstd_i^2 mean_k(w_k dy_ik s_ik))
           dw_c  += sum_i dy_ic rstd_i s_ic
       s, y, x, delta and their gradients hold N groups of G rows of C elements; groups begin `stride` elements apart.
       A matrix: G = 1, stride = C. QK-norm of query heads: G = NH, C = HS, stride = (NH + 2 KVH) HS. w (C)  rstd (N G)
       delta NULL: s is x, not written. y may be x. On entry ds holds the gradient that reaches s by other paths (0 if
       none), on return that of x and delta. dy may be ds: then no other path reaches s. */
    void (*rmsnorm_forward)(slam_ops *, slam_act *s, slam_act *y, float *rstd, const slam_act *x, const slam_act *delta,
                            const slam_act *w, float eps, int N, int G, int C, int stride);
    void (*rmsnorm_backward)(slam_ops *, slam_act *ds, float *dw, const slam_act *dy, const slam_act *s,
                             const slam_act *w, const float *rstd, int N, int G, int C, int stride);

    /* Linear layer
           out_io = sum_c x_ic w_oc + b_o
           dx_ic  = sum_o dout_io w_oc
           dw_oc += sum_i dout_io x_ic                      db_o += sum_i dout_io
       out (N,OC)  x (N,C)  w (OC,C)  b (OC) or NULL */
    void (*matmul_forward)(slam_ops *, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b, int N,
                           int C, int OC);
    void (*matmul_backward_input)(slam_ops *, slam_act *dx, const slam_act *dout, const slam_act *w, int N, int C,
                                  int OC);
    void (*matmul_backward_weight)(slam_ops *, float *dw, float *db, const slam_act *dout, const slam_act *x, int N,
                                   int C, int OC);

    /* Grouped-query attention with rotary positions (Vaswani et al. 2017; Ainslie et al. 2023; Su et al. 2021). A row
       of qkv has NH query, KVH key and KVH value heads, and KVH divides NH: query head h reads key/value head
       floor(h KVH / NH). R_i rotates each pair (c, c + pairs) by the angles of i's rotary position (see slam_mask).
           q'_i = R_i q_i    k'_j = R_j k_j
           s_ij = q'_i . k'_j / sqrt(HS)  for visible j     lse_i = log sum_j exp(s_ij)
           p_ij = exp(s_ij - lse_i)                         out_i = sum_j p_ij v_j
           dv_j  = sum_i p_ij dout_i       D_i = dout_i . out_i     ds_ij = p_ij (dout_i . v_j - D_i)
           dq'_i = sum_j ds_ij k'_j / sqrt(HS)    dk'_j = sum_i ds_ij q'_i / sqrt(HS)
           dq_i = R_i^-1 dq'_i                             dk_j = R_j^-1 dk'_j
       Sums over i for dk and dv also run over the query heads of a group. The forward pass leaves q' and k' in qkv,
       and the backward pass reads them.
       out (B,T,NH HS)  lse (B,NH,T)  qkv, dqkv (B,T,(NH + 2 KVH) HS)  D (B,NH,T) scratch */
    void (*attention_forward)(slam_ops *, slam_act *out, float *lse, slam_act *qkv, const slam_mask *);
    void (*attention_backward)(slam_ops *, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out,
                               const float *lse, const slam_act *qkv, const slam_mask *);
    /* Decoding: one token for each of the first B cache slots of capacity T. Row b of qkv is the token at position
       lengths_b < T of slot b. Its k' and v are appended to the cache, and it attends to 0..lengths_b. It uses B, T,
       NH, KVH, HS, pairs and rope of the mask.
       out (B,NH HS)  cache (B,T,2 KVH HS)  qkv (B,(NH + 2 KVH) HS)  lengths (B) */
    void (*attention_decode)(slam_ops *, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths,
                             const slam_mask *);
    /* Prefill: copies k' and v of the first lengths_b <= T tokens of row b of qkv to sequence slots_b of the cache.
       cache (slots,capacity,2 KVH HS)  qkv (B,T,(NH + 2 KVH) HS) after attention_forward  slots (B)  lengths (B) */
    void (*attention_fill)(slam_ops *, slam_act *cache, const slam_act *qkv, const int *slots, const int *lengths,
                           int capacity, const slam_mask *);

    /* SwiGLU (Shazeer 2020)      h = g sigmoid(g) u       with g, u the halves of a row of gate_up
           dg = dh u sigmoid(g) (1 + g (1 - sigmoid(g)))    du = dh g sigmoid(g)
       h, dh (N,F)  gate_up, dgate_up (N,2F), may be the same */
    void (*swiglu_forward)(slam_ops *, slam_act *h, const slam_act *gate_up, int N, int F);
    void (*swiglu_backward)(slam_ops *, slam_act *dgate_up, const slam_act *dh, const slam_act *gate_up, int N, int F);

    /* Cross-entropy, loss and gradient in one pass
           loss_i = log sum_v exp(z_iv) - z_i,target_i      dz_iv = scale weight_i (softmax(z_i)_v - [v = target_i])
       loss (N), 0 where target is -1; logits (N,stride). scale 0: logits are unchanged. Else dz replaces them, with 0
       in rows whose target is -1 and in the stride - V columns of padding. */
    void (*crossentropy)(slam_ops *, float *loss, slam_act *logits, const int *targets, const slam_xent *);

    /* sum: out[0] += sum_i x_i. sum_squares: out[0] += sum_i x_i^2. The order of summation depends on n alone. x (n) */
    void (*sum)(slam_ops *, double *out, const float *x, size_t n);
    void (*sum_squares)(slam_ops *, double *out, const float *x, size_t n);

    /* AdamW (Loshchilov and Hutter 2019, as torch.optim.AdamW)
           g' = g min(1, clip / (norm + 1e-6))     m = beta1 m + (1 - beta1) g'      v = beta2 v + (1 - beta2) g'^2
           w = w (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
       w, m, v (n) in place; w_act (n) = w converted (may be w). stats: sum of losses, squared norm of the whole
       gradient; if either is not finite, nothing changes. */
    void (*adamw)(slam_ops *, slam_act *w_act, float *w, float *m, float *v, const float *g, const double *stats,
                  const slam_adamw_params *, size_t n);

    /* The rest is for speech encoders and vocoders, and layernorm as an addition. It has no backward pass. */

    /* Convolution over time
           out[b,t,g,o] = output(sum_k,c input[b,t stride + k dilation - before,g,c] w[g,o,k,c] + bias[g,o])
       out (B,TO,G OC)  x (B,T,G C)  w (G OC,K,C)  b (G OC) or NULL. The input is 0 before its first and after its last
       frame. */
    void (*conv1d)(slam_ops *, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b,
                   const slam_conv *);
    /* Exact GELU (Hendrycks and Gimpel 2016): y = x Phi(x), Phi the standard normal distribution;  y (n) may be x */
    void (*gelu_forward)(slam_ops *, slam_act *y, const slam_act *x, size_t n);
    /* Residual add and layer norm (Ba, Kiros and Hinton 2016), optionally followed by GELU
           s = x + delta      y_ic = w_c (s_ic - mean_i) / sqrt(var_i + eps) + b_c
       s, y, x, delta (N,C)  w, b (C). delta NULL: s is x, not written. s or y NULL: not kept (without y no w and b).
       s, y may be x */
    void (*layernorm)(slam_ops *, slam_act *s, slam_act *y, const slam_act *x, const slam_act *delta, const slam_act *w,
                      const slam_act *b, float eps, int gelu, int N, int C);
    /* Norm of each channel over the frames of its row (group norm, one channel per group: Wu and He 2018), then GELU
           x_btc = gelu(w_c (x_btc - mean_bc) / sqrt(var_bc + eps) + b_c)    over t < length_b; later frames = 0
       x (B,T,C)  w, b (C)  lengths (B) */
    void (*channelnorm)(slam_ops *, slam_act *x, const slam_act *w, const slam_act *b, const int *lengths, float eps,
                        int B, int T, int C);
    /* Nearest centroid by squared distance; of equal ones the first. Minimises |c_k|^2 - 2 x_i . c_k
       nearest (N)  x (N,D)  centroids (K,D)  squares (K), |c_k|^2;  scores (N,K) scratch */
    void (*nearest)(slam_ops *, int *nearest, float *scores, const slam_act *x, const slam_act *centroids,
                    const float *squares, int N, int D, int K);
};

/* threads 0: OpenMP's number. act_bytes 2: bf16; 4: float, without tf32. NULL and slam_error() on failure. */
slam_ops *slam_cpu(int threads);
slam_ops *slam_cuda(int device, int act_bytes);
int slam_cuda_count(void); /* number of GPUs */
void slam_ops_free(slam_ops *);

/* ---- 6. COMM: several processes that work together, over MPI and NCCL ----
   The processes of one mpirun or srun, numbered by rank. All call the same collective functions in the same order. A
   NULL slam_comm * is a single process everywhere. */
struct slam_comm {
    int rank, size;                /* this process, number of processes; rank 0 prints and writes */
    int local_rank, local_size;    /* the same among the processes of this machine: local rank k uses GPU k */
    int zero;                      /* 1: ZeRO-1, a rank keeps a shard of the optimiser state; 0: all of it */
    int failed;                    /* slam_all_ok returned 0: every rank has the same slam_error() */
    struct slam_comm_state *state; /* MPI and NCCL */
};
slam_comm *slam_comm_init(void); /* size 1: there are no other processes. NULL and slam_error() on failure */
/* status 0: waits for all ranks and frees. Else aborts all ranks, unless `failed`: then each rank ends by itself. */
void slam_comm_finalize(slam_comm *, int status);
void slam_comm_attach(slam_comm *, slam_ops *); /* makes training and evaluation with these ops data-parallel */
/* Collectives. After a failed exchange a rank skips all further ones; slam_all_ok then returns 0. */
int slam_all_ok(slam_comm *, int ok); /* 1 if ok on all ranks; else 0, with the first one's slam_error() */
long slam_comm_max(slam_comm *, long x);
void slam_comm_sum(slam_comm *, double *x, size_t n); /* in rank order: the same bits on every rank */

/* ---- 7. MODEL: transformers of the types of Llama and Qwen, forward and backward ---- */

enum { SLAM_LLAMA, SLAM_QWEN2, SLAM_MISTRAL, SLAM_QWEN3, SLAM_OLMO2, SLAM_SMOLLM3 }; /* model_type of config.json */
typedef struct slam_config {
    int V, C, L, NH, KVH, HS, F; /* vocabulary, channels, layers, heads, key/value heads, head size, MLP width */
    int T;                       /* max_position_embeddings */
    int tied, family;            /* lm_head is the embedding; SLAM_LLAMA, ...: biases and norms of a layer */
    double eps, init_std, rope_theta;
    /* Scaling of the rotary frequencies. rope_factor 0: none; else they are divided by it: with rope_high 0 all
       (linear), else those of long waves (Llama 3), longer than rope_original / rope_high positions */
    double rope_factor, rope_low, rope_high, rope_original;
    uint64_t no_rope; /* bit l: layer l has no rotary positions */
} slam_config;
/* "tiny", "slam" (the shape of Qwen2.5-0.5B) or the path of a config.json (of Hugging Face or SlamKit). */
int slam_config_load(slam_config *, const char *name_or_path);
size_t slam_config_parameters(const slam_config *);
double slam_config_flops(const slam_config *, int T); /* per token, forward and backward, causal attention over T */

/* RECOMPUTE: the backward pass computes the inputs of sub-layers and SwiGLU again, same bits, to save memory. */
enum { SLAM_INFERENCE, SLAM_TRAIN, SLAM_TRAIN_RECOMPUTE };
typedef struct slam_memory {
    double weights, grads, optimiser, activations, logits, total; /* bytes of device memory */
} slam_memory;
/* shards: ranks that share the optimiser state (ZeRO-1), else 1. */
slam_memory slam_config_memory(const slam_config *, int act_bytes, int B, int T, int mode, int shards);

typedef struct slam_sequence {
    size_t item;    /* index of a chunk, of a pair's completion, of a scored sequence */
    int first, end; /* its targets are at positions first <= i < end of the batch (row * T + column) */
} slam_sequence;
/* Rows of tokens for one forward pass, on the host. */
typedef struct slam_batch {
    int B, T, capacity;         /* rows in use, tokens per row, rows there is space for */
    int *tokens, *targets;      /* (B,T); target: the next token, -1 where there is none (padding too) */
    int *doc_start;             /* (B,T) column at which the token's sequence (chunk) starts; see slam_mask */
    int *mask_start, *mask_end; /* (B,T) masked spans, NULL: none */
    float *losses;              /* (B,T) result of slam_forward, 0 where there is no target */
    slam_sequence *sequences;
    size_t n_sequences, sequence_capacity;
} slam_batch;
slam_batch slam_batch_new(int rows, int T, int masked); /* B = rows, no targets; masked: with mask_start, mask_end */
void slam_batch_free(slam_batch *);

typedef struct slam_model {
    slam_ops *ops;
    slam_config config;          /* rope_theta may be changed before the first slam_model_plan */
    size_t n_weights, n_decayed; /* elements of the arrays below; of the matrices, which come first: they decay */
    slam_act *weights;
    float *master;  /* float weights: `weights` itself if activations are float; NULL: sharded (see slam_adamw) */
    float *grads;   /* (n_weights), NULL until planned for training */
    double *stats;  /* device: sum of losses since the last update, squared gradient norm */
    int B, T, mode; /* planned for B rows of T tokens, or more but shorter ones */
    struct slam_layout *layout;
    /* Called in the next backward pass when gradients are complete. l = 0 .. config.L - 1: of a layer; l = config.L:
       of an untied head; l = -1: all. */
    void (*grads_ready)(void *context, int l);
    void *grads_context;
} slam_model;
/* Matrices from normal(0, init_std), norms 1, biases 0. */
slam_model *slam_model_new(slam_ops *, const slam_config *, uint64_t seed);
slam_model *slam_model_load(slam_ops *, const char *folder); /* Hugging Face or SlamKit format */
/* The same, with the first V rows of a text model's vocabulary (TWIST: Hassid et al. 2023). */
slam_model *slam_model_twist(slam_ops *, const char *folder, int V);
enum { SLAM_FORMAT_HF, SLAM_FORMAT_SLAMKIT };
/* Writes config.json, generation_config.json and model.safetensors (F32) into a folder. Fails if master is NULL. */
int slam_model_save(slam_model *, const char *folder, int format);
void slam_model_free(slam_model *);
int slam_model_hash(slam_model *, uint64_t *hash); /* of configuration and float weights; fails if master is NULL */
/* Allocates activations for B rows of T tokens, and gradients for training; keeps buffers that are large enough. */
int slam_model_plan(slam_model *, int B, int T, int mode);

int slam_forward(slam_model *, slam_batch *); /* sets batch->losses */
/* After slam_forward: adds the gradient of sum_i weights_i loss_i to grads, `loss` to stats[0]. weights (B,T), host */
int slam_backward(slam_model *, const float *weights, double loss);
/* Forward and backward in one: adds scale * d(sum of losses) to the gradients and the sum of losses to stats. */
int slam_forward_backward(slam_model *, const slam_batch *, float scale);
int slam_logits(slam_model *, const slam_batch *, float *logits); /* (B,T,V) on the host */

/* Generation with a key/value cache: up to `slots` sequences of up to T tokens. The logits of one do not depend on the
   others (to the bit where ops->batch_invariant). slam_decoder_new plans the model for inference, unless its plan is
   large enough. The model must outlive the decoder. */
typedef struct slam_decoder {
    slam_model *model;
    int slots, T;
    int *length; /* (slots) tokens of the sequence; 0: the slot is free */
    int *last;   /* (slots) its last token */
    struct slam_decoder_state *state;
} slam_decoder;
slam_decoder *slam_decoder_new(slam_model *, int slots, int T);
void slam_decoder_free(slam_decoder *);
/* Starts n sequences in the given slots: tokens[i] (lengths[i]), with lengths 1 to T. */
int slam_decoder_start(slam_decoder *, int n, const int *slots, const int *const *tokens, const int *lengths);
/* Logits (slots,V) on the host for the token after each sequence; those of free slots mean nothing. */
int slam_decoder_logits(slam_decoder *, float *logits);
/* Appends a token to a sequence; token < 0 frees the slot. 0 and slam_error() for a token >= V or beyond T tokens. */
int slam_decoder_append(slam_decoder *, int slot, int token);

/* How a token is drawn (as Hugging Face's generate; nucleus: Holtzman et al. 2020). */
typedef struct slam_sampling {
    double temperature;        /* 0: greedy */
    int top_k;                 /* keep the k largest logits and ties with the last; 0: all */
    double top_p;              /* keep the fewest most probable tokens (and ties) with total probability >= p; 1: all */
    double repetition_penalty; /* divides positive and multiplies negative logits of seen tokens; 1: none */
} slam_sampling;
/* Draws from logits (V), which are changed. seen (V): 1 for tokens the penalty applies to, or NULL. uniform in [0,1).
   Token 0 (padding) is never drawn. -1 and slam_error() if a setting is out of range. */
int slam_sample(float *logits, int V, const unsigned char *seen, const slam_sampling *, double uniform);

/* ---- 8. OPTIMISER: AdamW, schedules, gradient clipping, ZeRO-1 (Rajbhandari et al. 2020) ---- */

enum { SLAM_COSINE, SLAM_INVERSE_SQRT, SLAM_LINEAR, SLAM_CONSTANT };
typedef struct slam_schedule {
    int kind;
    double lr, min_lr; /* cosine ends at min_lr */
    long warmup, steps;
} slam_schedule;
/* Learning rate of update `step` (from 0), as in Hugging Face Transformers: linear warm-up from 0, then the curve. */
double slam_learning_rate(const slam_schedule *, long step);

typedef struct slam_adamw {
    double beta1, beta2, eps, weight_decay, clip; /* weight decay applies to matrices only; clip 0: none */
    long updates;                                 /* applied, skipped ones not counted */
    slam_model *model;
    float *m, *v;  /* moments, or this rank's shard of them (ZeRO-1) */
    float *master; /* this rank's shard of the float weights, with bf16; else NULL */
    struct slam_buckets *buckets;
} slam_adamw;
/* Allocates the state for a model planned for training; the caller sets the hyperparameters. Collective. */
int slam_adamw_init(slam_adamw *, slam_model *);
void slam_adamw_free(slam_adamw *);
/* Called before the last backward pass of a step: gradients are then summed over the ranks during that pass. */
void slam_adamw_overlap(slam_adamw *);
typedef struct slam_step {
    double loss_sum, grad_norm; /* over all ranks since the last update; norm before clipping */
    int skipped;                /* loss or norm was not finite: nothing changed */
} slam_step;
/* Sums the gradients over the ranks, updates the weights, and zeroes gradients and model->stats. Collective. */
int slam_adamw_step(slam_adamw *, double lr, slam_step *);
void slam_adamw_reset(slam_adamw *); /* moments and updates back to zero */

/* ---- 9. BATCHES: documents -> chunks -> packed rows -> batches ----

   A document longer than the context is split into chunks of at most `context` tokens; each chunk is a sequence of its
   own. Rows of `context` tokens hold several whole chunks. An epoch has every chunk of a source of weight 1 once; its
   order, if shuffled, depends on seed and epoch. */
typedef struct slam_chunk {
    uint32_t file, first, n; /* tokens first .. first + n - 1 of a file */
} slam_chunk;
typedef struct slam_source {
    char *name;
    double weight; /* how often an epoch has each chunk; 0.5: one half, the other half in the next epoch */
    size_t first_file, end_file, first_chunk, end_chunk, documents;
} slam_source;
typedef struct slam_data {
    int context;
    int V;                /* vocabulary size in the shards' headers, 0: none; after slam_data_prepare its V */
    uint32_t fingerprint; /* of the unit tokenizer that the shards state, 0: none */
    slam_source *sources;
    slam_chunk *chunks;
    size_t n_sources, n_chunks, source_capacity, chunk_capacity;
    uint64_t hash; /* of tokens, context, weights and split (held-out data have the same), after slam_data_prepare */
    struct slam_data *held_out; /* a part of it, or NULL; freed with it */
    struct token_file *files;
    size_t n_files, file_capacity;
} slam_data;
slam_data *slam_data_new(int context); /* an empty data set; context: longest chunk and length of a row, at least 2 */
/* Adds a source: a file or glob of token shards (.bin) or SlamKit units (.jsonl). */
int slam_data_add(slam_data *, const char *pattern, double weight);
/* Call once, after the last add. Checks that tokens are < V and documents are `1 u.. 1`. Moves round(fraction *
   documents) of each source, at least one if it has two, chosen by seed, to held_out (0: none). */
int slam_data_prepare(slam_data *, int V, double fraction, uint64_t seed);
void slam_data_free(slam_data *);
/* Iterates over epochs. Chunks: a whole epoch is packed into rows of T. Pairs: each global batch is packed, into rows
   of about equal length. Rows do not depend on the number of ranks. */
typedef struct slam_loader {
    int shuffle;               /* 0: everything once, whatever the weights (evaluation) */
    uint64_t seed, epoch, row; /* position: the current epoch, and the rows (or pairs) of it that are done */
    uint64_t epoch_rows;       /* rows (or pairs) of the current epoch */
    int n;                     /* size of the global batch: rows of the epoch, or pairs */
    int rows, T;               /* packed rows of the global batch, tokens per row */
    uint64_t tokens, targets;  /* of the global batch, on all ranks; targets: of chunks only */
    int rows_left;             /* rows of this rank that slam_loader_next has not returned yet */
    struct slam_packer *packer;
} slam_loader;
slam_loader *slam_loader_new(const slam_data *, uint64_t seed, int shuffle);
void slam_loader_free(slam_loader *);
/* Moves to a position; fails if the epoch has fewer rows. */
int slam_loader_seek(slam_loader *, uint64_t epoch, uint64_t row);
/* Begins the next global batch of n rows (or pairs). At the end of an epoch a shuffled loader continues with the next
   one; else the batch is smaller. Reads no tokens. Returns how many, 0 at the end. */
int slam_loader_begin(slam_loader *, int n, const slam_comm *);
/* Fills `batch` with the next rows of this rank's share, at most batch->capacity. Returns how many, 0 when there are no
   more. batch->sequences[].item: a chunk, or 2 p for the chosen and 2 p + 1 for the rejected completion of pair p. */
int slam_loader_next(slam_loader *, slam_batch *batch);

/* auto-BLEU (Lakhotia et al. 2021): the share of a text's n-grams of `order` words that occur in it more than once;
   0 if it has none. A punctuation mark is a word. */
double slam_auto_bleu(const char *text, int order);

/* ---- 10. AUDIO ---- */

/* in (n) at `rate` (1000..192000) resampled to 16 kHz by a windowed sinc (Kaiser and Schafer 1980): flat to 0.001 dB up
   to 0.9 of the lower Nyquist frequency, attenuated by 100 dB from there on. Zero phase; samples beyond the ends are 0.
   *n_out = ceil(16000 n / rate). free() the result; NULL: the rate is out of range. Thread-safe. */
float *slam_resample(const float *in, size_t n, int rate, size_t *n_out);
/* A whole audio file as mono samples at 16 kHz, full scale -1 to 1; free() them. NULL: it cannot be decoded. */
float *slam_audio_load(const char *path, size_t *n);

/* ---- 11. UNITS: audio -> features -> units ---- */

enum { SLAM_MFCC, SLAM_HUBERT };
/* How audio becomes units; km.json beside the centroids in km.npy. MFCC: python_speech_features.mfcc in Python with
   nfilt=40, winfunc=numpy.hamming, and first and second differences. HuBERT (Hsu et al. 2021): hidden_states[layer] of
   Transformers' HubertModel, of samples with zeros around them, without the final norm of do_stable_layer_norm. */
typedef struct slam_unit_config {
    int features;         /* SLAM_MFCC, SLAM_HUBERT */
    int rate;             /* frames per second; MFCC: 25 (64 ms windows) or 50 (32 ms); HuBERT: the model's, or 0 */
    int normalize, dedup; /* each segment to zero mean and unit variance; merge equal neighbouring units */
    int layer, pad;       /* HuBERT: zeros before and after the samples; SlamKit has 40, fairseq's pipelines 0 */
    int channel;          /* of files with several, from 1; 0: their mean. Not part of the fingerprint */
    char hubert[1024];    /* HuBERT: its folder, in Hugging Face's format */
    uint64_t fingerprint, origin; /* of km.json, 0: unknown. Hash of the tokenizer; of the fit's arguments */
} slam_unit_config;
slam_unit_config slam_unit_config_default(void); /* MFCC, 25, not normalised, deduplicated */
/* Reads km.json beside KM.npy, if there is one. Keeps config->hubert if it is set, because models may be moved. */
int slam_unit_config_load(slam_unit_config *, const char *km_npy);

/* Units of one recording, segment or sequence. */
typedef struct slam_units {
    int *unit, *duration;      /* (n) units, frames of each; duration NULL: unknown */
    size_t n, frames, samples; /* samples at 16 kHz */
    double start, end;         /* of a segment of a longer file, in seconds; end 0: the whole file */
    char *name;                /* file_name of a line of units, or NULL */
} slam_units;
void slam_units_free(slam_units *);

typedef struct slam_recording {
    const float *samples; /* (n) at 16 kHz */
    size_t n;
    float *features; /* (units.frames,width), set by slam_units_encode without centroids; free() them */
    slam_units units;
} slam_recording;

/* Features and centroids (K,width). Converts audio to units 0..K-1; without centroids (NULL, K = 0), to features. */
typedef struct slam_tokenizer {
    slam_unit_config config;
    int K, width;         /* centroids; numbers per frame */
    int do_normalize;     /* of the model's preprocessor_config.json; the caller sets config.normalize */
    uint32_t fingerprint; /* hash of config and centroids, never 0; at byte 16 of a shard's header */
    float *centroids;
    int *durations; /* (K) mean duration of each unit in milliseconds; NULL: KM.json has none */
    struct slam_mfcc *mfcc;
    struct slam_hubert *hubert;
} slam_tokenizer;
/* Loads the centroids of KM.npy (NULL: none, features only). Fails if the config's fingerprint, unless 0, is not
   theirs. ops: the device of HuBERT, NULL for MFCC. */
slam_tokenizer *slam_tokenizer_load(const char *km_npy, const slam_unit_config *, slam_ops *);
void slam_tokenizer_free(slam_tokenizer *);
/* Units (or features) of n recordings. The result of one does not depend on the others. */
int slam_units_encode(const slam_tokenizer *, slam_recording *, int n);

/* ---- 11. UNITS: from files to units; the loop is tokenize() in tokenize.c ---- */

enum { SLAM_INPUT_AUDIO, SLAM_INPUT_UNITS, SLAM_INPUT_PAIRS, SLAM_INPUT_TEXT };
/* Audio files, or lines of files. An input that cannot be used is skipped. */
typedef struct slam_inputs {
    int kind, pairs_out;            /* pairs_out: the output is preference pairs */
    slam_strings paths;             /* the audio files, or the files of the lines */
    size_t n, capacity, first, end; /* inputs; those to process are first <= i < end */
    double max_seconds;    /* AUDIO: splits longer files, at the quietest 20 ms of the last fifth of this; 0: never */
    double max_repetition; /* pairs whose text has an auto-BLEU-2 >= max_repetition are skipped; 0: none */
    slam_strings voices;   /* TTS commands: {text} is replaced by the text, else it is on stdin; WAV on stdout */
    slam_strings notes;    /* messages for the user: files that are not read, folders in a list */
    struct slam_line *lines;
    struct file_map *files;
    size_t passed_over[39]; /* files in folders that are not inputs, by extension */
} slam_inputs;
/* AUDIO: files, folders (recursively, in byte order of names), @LIST files with a path per line (# begins a comment),
   or manifests of fairseq (a root; then lines of path, tab, number of samples). Else lines: SlamKit features or tokens
   (UNITS); objects with prompt_path, chosen_path, rejected_path (PAIRS); text or, if the first line has a tab, prompt,
   chosen and rejected between tabs (TEXT, with voices). LIST or a file of lines may be -: stdin. */
int slam_inputs_open(slam_inputs *, int kind, const char *const *paths, size_t n);
void slam_inputs_free(slam_inputs *);

/* The units of an input: segments of a recording, or the three sides of a pair. */
typedef struct slam_item slam_item;
typedef struct slam_reader slam_reader;
slam_reader *slam_reader_open(const slam_inputs *, const slam_tokenizer *, size_t first); /* UNITS: it may be NULL */
/* Returns 1, 0 at the end, -1 on error. *item: the next input, valid until the next call; *skipped: why it cannot be
   used, or NULL. If it is not decoded yet, this call decodes one chunk and sets *item to NULL: call again. */
int slam_reader_next(slam_reader *, const slam_item **item, const char **skipped);
void slam_reader_close(slam_reader *);

/* Writes OUT: NAME.bin (token shards; a full one becomes NAME-00001.bin and so on, the last NAME.bin), else lines
   (SlamKit features or tokens, pairs). While writing, OUT.partial has the data, OUT.journal how many bytes of it are
   valid: after a kill, the same call resumes and produces the same bytes. OUT.failed lists inputs with errors. */
typedef struct slam_writer {
    uint64_t inputs, failed, repetitive, documents, samples, frames, units, tokens, shards; /* so far */
    uint64_t earlier;                       /* inputs already done when resumed */
    uint64_t identity, bytes, failed_bytes; /* in the journal; identity: hash of settings and inputs */
    int binary, audio_repr;
    uint64_t shard_tokens;
    const char *out;
    const slam_inputs *in;
    const slam_tokenizer *tokenizer;
    slam_path partial, journal;
    struct append_file *data, *failures; /* OUT.partial; OUT.failed, locked while the writer is open */
    double committed;                    /* when the journal was written */
} slam_writer;
/* Opens or resumes OUT; inputs->first + writer->inputs is the input to start at. */
int slam_writer_open(slam_writer *, const char *out, const slam_inputs *, const slam_tokenizer *, int audio_repr,
                     uint64_t shard_tokens);
int slam_writer_add(slam_writer *, const slam_item *); /* once a second, also syncs the data and updates the journal */
/* ok: renames OUT.partial to OUT if all inputs are done (no documents: an error). 0: keeps it as of the journal. */
int slam_writer_close(slam_writer *, int ok);

typedef struct slam_kmeans_report {
    size_t frames;    /* 0: nothing was fitted, KM.npy was there already, made by the same call */
    double inertia;   /* mean squared distance of a frame to its centroid */
    int passes, dead; /* full passes; empty clusters */
} slam_kmeans_report;
/* Writes KM.npy and KM.json. Reads inputs in random order until there are 8 * `frames` frames, draws `frames` of them
   at random and runs k-means. */
slam_tokenizer *slam_tokenizer_fit(const char *km_npy, const slam_unit_config *, slam_ops *, const slam_inputs *, int K,
                                   size_t frames, uint64_t seed, slam_progress_fn *, void *context,
                                   slam_kmeans_report *);
/* Units of whole audio files, units (paths->n); a skipped file has n and samples 0. The ranks share the work. */
int slam_audio_units(const slam_tokenizer *, slam_comm *, const slam_strings *paths, slam_units *units,
                     slam_progress_fn *, void *context);

/* ---- 11. UNITS: units to audio ---- */

/* A vocoder synthesises one sequence of units at a time. */
typedef struct slam_vocoder {
    int K, step;                  /* units 0..K-1; samples per frame */
    size_t tail;                  /* more of them at the end */
    int *frame;                   /* (frames) the unit of each frame of the sequence */
    size_t frames, samples, done; /* of the sequence; samples at 16 kHz: in all, synthesised so far */
    size_t capacity;
    const slam_tokenizer *tokenizer;
    struct slam_voice *voice;
    struct slam_gan *gan;
} slam_vocoder;
/* folder NULL: from the tokenizer's MFCC centroids, whose tokenizer has to outlive the vocoder. Else a unit HiFi-GAN of
   textlesslib or speech-resynthesis: config.json and model.safetensors; speaker, style: 0, or one that it has. */
slam_vocoder *slam_vocoder_open(const char *folder, int speaker, int style, const slam_tokenizer *, slam_ops *);
void slam_vocoder_free(slam_vocoder *);
/* Starts a sequence: unit, duration (n). A duration (in frames) of 0, or NULL, stands for the unit's mean, or for what
   the HiFi-GAN predicts (one frame, if it has no predictor). */
int slam_vocoder_start(slam_vocoder *, const int *unit, const int *duration, size_t n);
/* The next samples of the sequence, until the next call: how many, 0 at the end, -1 and slam_error(). */
ptrdiff_t slam_vocoder_next(slam_vocoder *, const float **samples);
/* Writes the sequence that was started as a WAV file (16 kHz, 16 bits). 0 also if the callback cancels. */
int slam_vocoder_write(slam_vocoder *, const char *path, slam_progress_fn *, void *context);

/* ---- 12. OBJECTIVES: losses of a data set, preference pairs and DPO, scores of sequences ---- */

/* Mean losses (nats per target): losses[0] over all targets, losses[1 + s] over those of source s (NaN if it has none).
   The ranks share the work. The model must be planned for batch->capacity rows of T = context. */
int slam_data_loss(slam_model *, const slam_data *, slam_batch *batch, double *losses, uint64_t *targets);

/* Preference pairs. The prompt is `1 u..`, a completion `u.. 1`; its log-probability is the sum over its tokens. */
typedef struct slam_pair {
    uint16_t *tokens; /* prompt, chosen, rejected, one after the other */
    uint32_t n_prompt, n_chosen, n_rejected;
} slam_pair;
/* Why a pair is skipped: its text repeats itself, a completion has no units, both are equal, one is too long. */
enum { SLAM_REPETITIVE, SLAM_EMPTY, SLAM_IDENTICAL, SLAM_TOO_LONG, SLAM_SKIPS };
typedef struct slam_pairs {
    int V, context;        /* vocabulary; most tokens of prompt and completion */
    int share;             /* both completions attend to one copy of the prompt */
    double max_repetition; /* pairs whose text has an auto-BLEU-2 >= max_repetition are skipped; 0: none */
    slam_pair *at;         /* training pairs first, then validation pairs */
    size_t n, n_train, capacity;
    double *reference; /* (n,2) the reference model's log-probabilities of chosen and rejected; NULL: not computed */
    size_t skipped[SLAM_SKIPS]; /* pairs that cannot be used */
    size_t truncated;           /* pairs whose prompt lost its beginning to fit the context */
    size_t unshared;            /* pairs that are too long to share their prompt */
    int T;         /* longest row, set by slam_pairs_prepare: 2 * context rounded up to 16, at least 1024 */
    uint64_t hash; /* after slam_pairs_prepare: of all pairs */
} slam_pairs;
/* Reads a file or glob of SlamKit preference pairs (.jsonl), those for validation last. The struct starts as zeros with
   V, context, share and max_repetition. */
int slam_pairs_add(slam_pairs *, const char *pattern, int validation);
/* After the last add: moves round(fraction * pairs), at least one, chosen by seed, to validation (0: none). */
int slam_pairs_prepare(slam_pairs *, double fraction, uint64_t seed);
const char *slam_pairs_skipped(const slam_pairs *, char text[200]); /* "8 too long, ..." or "none" */
void slam_pairs_free(slam_pairs *);                                 /* what is in the struct, not the struct */

/* A loader of training pairs (validation 0), validation pairs (1) or all (-1). Its batches are made for pairs->T
   tokens, with masks if pairs are shared. */
slam_loader *slam_loader_new_pairs(const slam_pairs *, int validation, uint64_t seed, int shuffle);

/* After slam_forward: the log-probability of a sequence, the sum over its targets. */
double slam_sequence_logp(const slam_batch *, const slam_sequence *);
/* DPO (Rafailov et al. 2023; label smoothing e: Mitchell 2023), s(x) = 1 / (1 + exp(-x))
       margin D = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))
       loss = -(1 - e) log s(b D) - e log s(-b D)      dloss/dD = -b ((1 - e) s(-b D) - e s(b D)) */
double slam_dpo_loss(double beta, double label_smoothing, double margin, double *dloss);
/* Computes pairs->reference with a model planned for batch->capacity rows of pairs->T; the ranks share the work. 0
   also if cancelled by the callback. */
int slam_pairs_reference(slam_pairs *, slam_model *reference, slam_batch *, slam_progress_fn *, void *context);
/* As a safetensors file with the hashes of pairs and model. Load: without a file, reference stays NULL. */
int slam_pairs_save_reference(const slam_pairs *, const char *path, uint64_t model_hash);
int slam_pairs_load_reference(slam_pairs *, const char *path, uint64_t model_hash);

/* scores (n): log-probability of the tokens after the leading 1, their mean or (sum) total. Sequences are packed into
   rows of up to T tokens, B at a time (this plans the model). Longer ones are scored in windows of T, of which each but
   the first predicts at most its second half. Equal sequences get equal scores. The ranks share the work. */
int slam_score(slam_model *, const slam_units *, size_t n, int B, int T, int sum, double *scores, slam_progress_fn *,
               void *context);

/* ---- 13. EVALUATION: n-grams, test sets, generation ---- */

/* Cross-entropies (nats per token, orders 1 to 5) of interpolated Witten-Bell n-gram models (Witten and Bell 1991)
   counted on `train`, over all targets of `test`. Contexts do not cross chunks.
       p_k(w|h) = (c(hw) + T(h) p_{k-1}(w|h')) / (c(h) + T(h))   p_0 = 1/V   T(h): number of distinct tokens after h */
int slam_ngrams(const slam_data *train, const slam_data *test, int V, double nll[5], uint64_t *targets);

/* A test set: pairs of sequences, of which the correct one should get the higher score. */
enum { SLAM_SWUGGY, SLAM_SBLIMP, SLAM_STORYCLOZE, SLAM_SALMON };
typedef struct slam_accuracy {
    const char *group, *name; /* group "": all pairs; then "vocabulary", "frequency", "length", "type", "part" */
    size_t n;                 /* pairs; one in several voices counts once, with their mean */
    double mean, deviation;   /* NaN without pairs; sample standard deviation, NaN if n < 2 */
} slam_accuracy;
typedef struct slam_testset {
    int kind;
    slam_strings items;        /* the sequences: names in gold.csv, or files */
    char *folder;              /* of gold.csv, with a / at its end; "" if there is none */
    char *units;               /* the file of units; NULL: the items are audio */
    double *scores;            /* (items.n) after slam_testset_score, as are the accuracies */
    slam_accuracy *accuracies; /* (n_accuracies) */
    struct slam_test_pair *pairs;
    struct slam_test_member *members;
    struct slam_test_name *names;
    size_t n_accuracies, n_pairs, n_cells, n_members, depth;
} slam_testset;
/* PATH: gold.csv of ZeroSpeech 2021 (Nguyen et al. 2020), its folder, or the folder of all of ZeroSpeech (split NULL:
   "dev"); or a folder of pairs of audio files; NULL if there is a file of units. units NULL: units.jsonl in the folder,
   if it is there and not `audio`. */
slam_testset *slam_testset_open(int kind, const char *path, const char *split, int audio, const char *units);
void slam_testset_free(slam_testset *);
int slam_testset_audio(const slam_testset *, slam_strings *paths); /* the items' audio files */
/* Fills units (items.n), which are zero, by file name. A missing item or a unit >= n_units is an error. */
int slam_testset_read_units(const slam_testset *, int n_units, slam_units *units);
/* Accuracies as the official scorer computes them: from nine digits of each score; a tie counts half. */
void slam_testset_score(slam_testset *, const double *scores);
int slam_testset_write(const slam_testset *, const char *task, int sum, const char *path); /* JSON of everything */
int slam_testset_submission(const slam_testset *, const char *path); /* a line `filename score` per item */

typedef struct slam_prompt {
    char *name;
    int *tokens, *durations, n; /* (n) the first token is 1; frames, 0: unknown */
    int truncated;              /* tokens removed from the beginning to fit the context */
    int *continuation, length;  /* (length) without the closing 1; NULL: missing */
    int ended;                  /* the continuation was closed by a 1, not by max_new */
    uint64_t rng;               /* random stream of the continuation */
} slam_prompt;
typedef struct slam_prompts {
    slam_prompt *at;
    size_t n, capacity;
    size_t max_units;   /* length of prompts in units; 0: by max_seconds */
    double max_seconds; /* length of prompts in seconds; 0: whole recordings */
    int rate;           /* frames per second. Without durations 18 units count as a second */
    size_t guessed;     /* prompts that were cut without durations */
} slam_prompts;
void slam_prompts_add(slam_prompts *, const char *name, const int *units, const int *duration, size_t n);
int slam_prompts_add_lines(slam_prompts *, const char *path);   /* the lines of a file of units */
void slam_prompts_add_data(slam_prompts *, const slam_data *);  /* the first chunk of each document */
int slam_prompts_write(const slam_prompts *, const char *path); /* lines {"file_name", "prompt": [..], "units": [..]} */
void slam_prompts_free(slam_prompts *);
typedef struct slam_generation {
    slam_sampling sampling;
    int max_new; /* most tokens of a continuation */
    int context; /* most tokens of prompt and continuation */
    int batch;   /* sequences at once, per rank */
    uint64_t seed;
} slam_generation;
/* Generates the missing continuations; the ranks share the work. Random streams depend on the seed, the prompt and the
   number of equal prompts before it, not on batch, order or ranks. Also returns 1 if the callback cancels. */
int slam_generate(slam_model *, const slam_generation *, slam_prompts *, slam_progress_fn *, void *context);
double slam_unit_auto_bleu(const int *units, size_t n, int order);

typedef struct slam_metric {
    const char *name;
    double value;
} slam_metric;
int slam_metrics_write(const char *task, const slam_metric *, int n, const char *path); /* as a JSON object */
int slam_output_check(const char *path); /* 0 and slam_error() if no file can be written there; creates "folder/" */

/* ---- 14. CHECKPOINTS: a run's folder with step_000200/, links latest and best, trainer.json, log.jsonl ---- */

/* State of a run besides model and optimiser: trainer.json. */
typedef struct slam_trainer {
    long step, steps, skipped; /* updates applied; planned, which fix the schedule; skipped as not finite */
    uint64_t tokens;           /* tokens seen, without padding */
    uint64_t epoch, row;       /* position of the loader (dpo: pair) */
    uint64_t log_bytes;        /* of log.jsonl; a resumed run cuts off what follows */
    double seconds, best_loss; /* training time so far; lowest validation loss ... */
    long best_step;            /* ... and its step; 0: none yet */
    uint64_t data, units;      /* hash of the data; fingerprint of the unit tokenizer, 0: unknown */
    slam_strings settings;     /* "batch=16", "data=a.bin", ...: the values of the flags, lists item by item */
} slam_trainer;
int slam_trainer_load(slam_trainer *, const char *folder);
void slam_trainer_free(slam_trainer *);
/* Value number i (from 0) of a setting; NULL: there is none. Set: replaces it, or adds it. */
const char *slam_trainer_setting(const slam_trainer *, const char *name, size_t i);
void slam_trainer_set(slam_trainer *, const char *name, size_t i, const char *value);
/* Appends the paths of a setting, "data" or "val". A relative path is looked for in the current folder if it is not in
   the one where the run was begun (it was moved together with its data). */
void slam_trainer_paths(const slam_trainer *, const char *name, slam_strings *paths);

/* Writes RUN/step_NNNNNN, points `latest` (and `best`) at it, then removes all but the best and the `keep` newest (0:
   removes none). The files do not depend on the number of ranks. A failure leaves what was there before. Call it right
   after an update, because shards are gathered in the array of gradients. Collective. */
int slam_checkpoint_save(const char *run, slam_model *, slam_adamw *, const slam_trainer *, int format, int keep);
/* PATH if it is a model folder, a run's newest checkpoint if it is a run; path NULL: that of the newest run in runs/ of
   this program (NULL: any program). free() it. */
char *slam_run_model(const char *path, const char *program);

/* ---- 15. PROGRAMS: what the four programs share. The only section that prints ---- */

/* A command line flag of type int (SWITCH, INT), long (LONG; 1e9 is one), double (REAL; TIME: seconds from HH:MM:SS,
   MM:SS or SS), char * (TEXT; PATH: made absolute; DEVICE: auto, cpu, cuda or cuda:N; CHOICE: of `argument`, "a|b|c")
   or slam_strings (LIST: may be repeated). "auto" counts as not given. A resumed run needs the same value, unless the
   type has | SLAM_FREE (may differ), | SLAM_LIMIT (may grow) or | SLAM_UNSAVED (is no setting of the run). */
enum { SLAM_SWITCH, SLAM_INT, SLAM_LONG, SLAM_REAL, SLAM_TIME };
enum { SLAM_TEXT = 5, SLAM_PATH, SLAM_DEVICE, SLAM_CHOICE, SLAM_LIST };
enum { SLAM_FREE = 16, SLAM_LIMIT = 32, SLAM_UNSAVED = 64 };
typedef struct slam_flag {
    const char *name; /* without dashes; NULL: the heading `help` of a group */
    int type;
    void *to;
    const char *argument;
    const char *fallback; /* default; "a | b": a or b, see slam_flags_defaults; "-": none */
    const char *help;
    double min, max; /* equal: any */
    int given;       /* on the command line */
    char *text;      /* the value, numbers in their shortest spelling; NULL: none yet, or a list */
} slam_flag;
/* clang-format off */
#define SLAM_HEADING(text) {NULL, 0, NULL, NULL, NULL, text, 0, 0, 0, NULL}
#define SLAM_FLAG(name, type, to, argument, fallback, help) {name, type, to, argument, fallback, help, 0, 0, 0, NULL}
#define SLAM_NUMBER(name, type, to, argument, fallback, min, max, help) \
    {name, type, to, argument, fallback, help, min, max, 0, NULL}
/* clang-format on */
typedef struct slam_flags {
    const char *program, *usage, *about;
    slam_flag *at; /* (n) */
    int n;
    slam_strings rest; /* arguments that are not flags */
} slam_flags;
/* 1: continue; 0: wrong, slam_error(); 2: --help or --version, printed. `--flag value`, `--flag=value`; -o is --out. */
int slam_flags_parse(slam_flags *, int argc, char **argv);
int slam_flags_defaults(slam_flags *, int right); /* of flags without a value: what is left or right of " | " */
int slam_flags_given(const slam_flags *, const char *name);
int slam_flags_set(slam_flags *, const char *name, const char *value); /* does not count as given */
void slam_flags_free(slam_flags *);

/* A progress bar: one line that is rewritten on a terminal, plain lines ten seconds apart elsewhere. */
typedef struct slam_bar {
    double began, shown; /* slam_clock() at the beginning and when it was last shown */
    double first;        /* `done` of the first call, -1: none yet */
    int terminal;        /* stdout is one */
} slam_bar;
void slam_bar_begin(slam_bar *);
void slam_bar_show(slam_bar *, double done, double total, const char *text); /* rate limited; total 0: unknown */
void slam_bar_clear(slam_bar *);                                             /* before other output, and at the end */

/* Start of a program: joins the ranks, of which only rank 0 has a stdout. NULL: failed, and said why. */
slam_comm *slam_program_begin(const char *program);
/* End: prints slam_error() if status is 1 or 2, and the usage if it is 2, once if all ranks know of the failure. Then
   finalises the comm. Returns the status. */
int slam_program_end(const slam_flags *, slam_comm *, int status);
/* From now on SIGINT, SIGTERM or, unless it is ignored (nohup), SIGHUP requests a stop. A second one of the first two
   exits at once. */
void slam_signals_catch(void);
int slam_stop_requested(void);
/* Sets and returns the number of threads. 0: OpenMP's, or with several ranks on a machine their share of the cores. */
int slam_threads(const slam_comm *, int threads);
/* Opens a DEVICE for dtype "auto", "f32" or "bf16", prints which, and attaches the comm. */
slam_ops *slam_device(slam_comm *, const char *device, const char *dtype, int threads);
const char *slam_format_count(char s[32], double n);             /* 950, 12.3k, 1.40M */
const char *slam_format_time(char s[32], double seconds);        /* 0:32, 12:03:04 */
void slam_print_path(const char *path);                          /* quoted for a shell if needed */
slam_path slam_path_beside(const char *argv0, const char *name); /* NAME in the folder of the program */
slam_path slam_path_absolute(const char *path);

/* Flags that say how audio becomes units, as far as a program has them. */
typedef struct slam_unit_flags {
    char *kmeans, *features, *rate, *hubert, *channel;
    int layer, pad, normalize, no_dedup;
} slam_unit_flags;
/* Their configuration. Unless a new km.npy is fitted, KM.json decides, and a flag that contradicts it is an error (but
   `channel` may differ: each often holds one speaker). */
int slam_unit_flags_config(const slam_flags *, const slam_unit_flags *, int fit, slam_unit_config *);
int slam_bundled_units(const char *argv0, uint64_t units); /* an error unless 0 or the bundled data's fingerprint */

/* What train and dpo share; their loops are in train.c and dpo.c. First the values of the common flags. */
typedef struct slam_options {
    slam_strings val;
    char *init, *warmup, *schedule, *out, *device, *dtype, *tune, *format;
    double val_fraction, epochs, seconds, flops, bandwidth;
    long steps, tokens, seed, eval_every, save_every, log_every;
    int context, batch, micro, zero, recompute, resume, threads, keep, dry_run, ranks;
} slam_options;
typedef struct slam_run {
    /* set by the program: name of the DATA setting; files used without DATA, training and validation */
    const char *data_name, *bundled_data[2];
    slam_comm *comm;
    slam_config config;
    slam_model *model;
    slam_options o;         /* values of flags ... */
    slam_adamw opt;         /* ... with those of AdamW */
    slam_schedule schedule; /* ... and of the schedule */
    slam_flag table[64];
    slam_flags flags; /* flags.rest: DATA */
    slam_trainer trainer;
    char folder[4096]; /* of the run, "" until it has one */
    char *checkpoint;  /* to resume from, or NULL */
    const char *argv0;
    int fresh;   /* not resumed */
    int grows;   /* fresh, or a limit is larger than before */
    int limited; /* a limit was given, on the command line or when the run began */
    int bundled; /* DATA is the bundled data */
    slam_ops *ops;
    int micro, T, mode;         /* after slam_run_plan: rows at once, tokens per row, SLAM_TRAIN... */
    long saved_step, eval_step; /* steps of the last checkpoint and of the last evaluation */
    double began;               /* slam_clock() at the start, less the training time of earlier sessions */
    double lap;                 /* slam_clock() when what is timed now began; 0: before the first step */
    double slowest_step, eval_seconds, save_seconds;
    double peak_flops;    /* FLOP/s that all ranks reach at most; 0: unknown */
    int state;            /* RUN_ON, or why the run ends */
    int skipped_in_a_row; /* updates that were not finite */
    int lock;             /* descriptor of the locked folder */
    void *log;            /* rank 0: FILE * of log.jsonl */
    slam_bar bar;
} slam_run;
/* Makes the table of the program's own flags and the common ones. presets: {flag, default, help} of common flags, NULL:
   as it is. */
void slam_run_flags(slam_run *, const slam_flag *own, int n, const char *const presets[][3], int n_presets);
int slam_run_parse(slam_run *, int argc, char **argv); /* slam_flags_parse and more checks; signals are caught */
/* Resolves flags (command line, else resumed run, else slam_flags_set, else defaults) and data; opens the device. */
int slam_run_open(slam_run *);
/* Plans and prints micro-batch, memory and schedule for `rows` rows of T tokens per step. trainer.steps: the smallest
   limit, 0: only --time. token_steps: steps until --tokens, 0: none. */
int slam_run_plan(slam_run *, int rows, int T, double steps_per_epoch, double tokens_per_step, long token_steps);
/* With --tune on: restores the run's algorithms of matrix products; rank 0 measures those of other shapes, in a pass
   over a batch. After slam_adamw_init. Collective. */
int slam_run_tune(slam_run *);
/* Names and locks the folder, cuts the log to the checkpoint, saves the settings, loads the optimiser. data: a hash
   that must be the resumed run's. Collective. */
int slam_run_begin(slam_run *, uint64_t data);
int slam_run_continues(slam_run *);      /* 0: a limit or signal has ended the run; 1: starts the clock of a step */
int slam_run_eval_due(const slam_run *); /* every eval_every steps (0: never), and the end unless it was a signal */
int slam_run_save_due(const slam_run *); /* every save_every steps, a new best loss, the end */
/* After an update: counts, logs and shows it. loss: mean of the step. 0 also after 20 skipped updates in a row. */
int slam_run_finish_step(slam_run *, const slam_step *, double loss, uint64_t tokens, const slam_metric *, int n);
/* After an evaluation: losses[0] of all, [1 + s] of source s if there are several. Updates best_loss, logs and shows
   it. */
int slam_run_finish_eval(slam_run *, const double *losses, size_t n_sources, const slam_metric *, int n);
int slam_run_save(slam_run *);
void slam_run_print_end(slam_run *, const char *validation); /* the result, and how to resume */
int slam_run_end(slam_run *, int status);                    /* slam_program_end, and frees what is in the struct */

#ifdef __cplusplus
}
#endif
#endif /* SLAM_H */

#ifdef SLAM_IMPLEMENTATION
/* ==========================================================================================
   SECTION 1. BASE      errors, memory, strings, random numbers, threads, files
   ========================================================================================== */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#define SLAM_PRAGMA(text) _Pragma(#text)
#else
#define SLAM_PRAGMA(text)
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static void omp_set_num_threads(int threads) { (void)threads; }
#endif

/* A loop whose iterations write to different places; a thread takes a contiguous range of them. */
#define PARALLEL_FOR SLAM_PRAGMA(omp parallel for schedule(static))

// clang-format off
#ifdef __cplusplus
#define THREAD_LOCAL thread_local
#define ZERO {} // initialiser of a struct: `strbuf s = ZERO;` (C and C++ each warn about the other's spelling)
#else
#define THREAD_LOCAL _Thread_local
#define ZERO {0}
#endif
// clang-format on
#ifdef __GNUC__
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF_LIKE(text, first)
#endif

/* ---- errors ---- */

static THREAD_LOCAL char error_text[1024];

const char *slam_error(void) { return error_text; }

/* Returns 0: `return set_error("%s: ...", path);` */
#define set_error slam_set_error

int PRINTF_LIKE(1, 2) slam_set_error(const char *format, ...) {
    char text[sizeof error_text]; // not error_text itself: it may be one of the arguments
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *c = text; *c; c++) // file names may contain terminal escape sequences
        if (iscntrl((unsigned char)*c)) *c = '?';
    memcpy(error_text, text, sizeof text);
    return 0;
}

/* ---- memory: a size that comes from a file is checked against the file before it is allocated ---- */

#ifndef SLAM_OUT_OF_MEMORY
#define SLAM_OUT_OF_MEMORY(bytes)                                                                                      \
    do {                                                                                                               \
        fprintf(stderr, "slam: out of memory: cannot allocate %.1f MB\n", (double)(bytes) / 1e6);                      \
        exit(1);                                                                                                       \
    } while (0)
#endif

/* n zeroed elements of `size` bytes. */
static void *mem_new(size_t n, size_t size) {
    void *p = n <= SIZE_MAX / 2 / size ? calloc(n ? n : 1, size) : NULL;
    if (!p) SLAM_OUT_OF_MEMORY((double)n * (double)size);
    return p;
}

/* p, an array of *capacity elements, with space for `need`. It grows by half: appending takes constant time. */
static void *mem_grow(void *p, size_t *capacity, size_t need, size_t size) {
    if (need <= *capacity) return p;
    size_t n = *capacity + *capacity / 2 + 16;
    if (n < need) n = need;
    p = n <= SIZE_MAX / 2 / size ? realloc(p, n * size) : NULL;
    if (!p) SLAM_OUT_OF_MEMORY((double)n * (double)size);
    *capacity = n;
    return p;
}

#define NEW(T, n)                  ((T *)mem_new(n, sizeof(T)))
#define GROW(T, p, capacity, need) ((p) = (T *)mem_grow(p, &(capacity), need, sizeof(T)))

/* ---- strings ---- */

static char *string_copy_n(const char *s, size_t n) {
    char *copy = NEW(char, n + 1);
    memcpy(copy, s, n);
    return copy;
}

static char *string_copy(const char *s) { return string_copy_n(s, strlen(s)); }

/* A growing string; at[n] is 0 once something was added. */
typedef struct strbuf {
    char *at;
    size_t n, capacity;
} strbuf;

static void strbuf_add_bytes(strbuf *s, const void *bytes, size_t n) {
    GROW(char, s->at, s->capacity, s->n + n + 1);
    if (n) memcpy(s->at + s->n, bytes, n);
    s->n += n;
    s->at[s->n] = 0;
}

static void PRINTF_LIKE(2, 3) strbuf_add(strbuf *s, const char *format, ...) {
    va_list args;
    va_start(args, format);
    const size_t n = (size_t)vsnprintf(NULL, 0, format, args);
    va_end(args);
    GROW(char, s->at, s->capacity, s->n + n + 1);
    va_start(args, format);
    vsnprintf(s->at + s->n, n + 1, format, args);
    va_end(args);
    s->n += n;
}

static void strbuf_free(strbuf *s) {
    free(s->at);
    memset(s, 0, sizeof *s);
}

/* The formatted string in memory of its own. */
static char *PRINTF_LIKE(1, 2) string_print(const char *format, ...) {
    char *s = NULL;
    va_list args;
    va_start(args, format);
    if (vasprintf(&s, format, args) < 0) SLAM_OUT_OF_MEMORY(strlen(format));
    va_end(args);
    return s;
}

static int string_ends(const char *s, const char *end) {
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

void slam_strings_add(slam_strings *list, const char *item) {
    GROW(char *, list->at, list->capacity, list->n + 1);
    list->at[list->n++] = string_copy(item);
}

void slam_strings_free(slam_strings *list) {
    for (size_t i = 0; i < list->n; i++) free(list->at[i]);
    free(list->at);
    memset(list, 0, sizeof *list);
}

static int compare_strings(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* The next line of *at .. end, without its line break (\n or \r\n), and its length; NULL at the end. */
static const char *next_line(const char **at, const char *end, size_t *n) {
    const char *line = *at;
    if (line >= end) return NULL;
    const char *newline = (const char *)memchr(line, '\n', (size_t)(end - line));
    *at = newline ? newline + 1 : end;
    *n = (size_t)((newline ? newline : end) - line);
    if (*n && line[*n - 1] == '\r') --*n;
    return line;
}

/* ---- clock ---- */

double slam_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- random numbers ---- */

/* SplitMix64 (Steele, Lea and Flood 2014). The state is a counter: a hash of numbers names a stream of its own. */
static uint64_t rng_next(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* The initial state of the stream (seed, a, b), e.g. seed, epoch, source. */
static uint64_t rng_stream(uint64_t seed, uint64_t a, uint64_t b) {
    uint64_t s = seed;
    s = rng_next(&s) ^ a;
    s = rng_next(&s) ^ b;
    return rng_next(&s);
}

/* Uniform in [0, n): values beyond the last whole multiple of n are drawn again. */
static uint64_t rng_below(uint64_t *state, uint64_t n) {
    const uint64_t limit = (uint64_t)-1 - (uint64_t)-1 % n;
    uint64_t x;
    do x = rng_next(state);
    while (x >= limit);
    return x % n;
}

/* Uniform in [0, 1), 53 bits. */
static double rng_uniform(uint64_t *state) { return (double)(rng_next(state) >> 11) * 0x1p-53; }

/* Standard normal (Box and Muller 1958). */
static double rng_normal(uint64_t *state) {
    const double u = 1 - rng_uniform(state), v = rng_uniform(state);
    return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

/* Fisher-Yates shuffle of n numbers. */
static void rng_shuffle(uint64_t *state, uint32_t *x, size_t n) {
    for (size_t i = n; i > 1; i--) {
        const size_t j = (size_t)rng_below(state, i);
        const uint32_t swap = x[i - 1];
        x[i - 1] = x[j];
        x[j] = swap;
    }
}

/* FNV-1a, 64 bits (Fowler, Noll and Vo). Start with HASH_START, continue with the last result. */
#define HASH_START 0xcbf29ce484222325u
#define HASH_PRIME 0x100000001b3u

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < n; i++) hash = (hash ^ p[i]) * HASH_PRIME;
    return hash;
}

/* ---- files ---- */

/* "folder/name" */
static slam_path path_join(const char *folder, const char *name) {
    slam_path p;
    const size_t n = strlen(folder);
    // a path that does not fit is longer than PATH_MAX, and opening it fails
    if (snprintf(p.at, sizeof p.at, "%s%s%s", folder, n && folder[n - 1] == '/' ? "" : "/", name) < 0) p.at[0] = 0;
    return p;
}

/* The part after the last slash. */
static const char *path_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* S_IFREG, S_IFDIR, ...; 0: there is nothing. */
static int path_type(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 ? s.st_mode & S_IFMT : 0;
}

static int path_is_file(const char *path) { return path_type(path) == S_IFREG; }
static int path_is_folder(const char *path) { return path_type(path) == S_IFDIR; }

/* Creates the folder and its parents; an existing folder is fine. */
static int folder_create(const char *path) {
    const char *end = path;
    int ok = 1;
    do {
        end += 1 + strcspn(end + 1, "/");
        char *p = string_copy_n(path, (size_t)(end - path));
        const int error = mkdir(p, 0777) == 0 ? 0 : errno;
        if (error && !path_is_folder(p)) ok = set_error("%s: cannot create this folder: %s", p, strerror(error));
        free(p);
    } while (ok && *end);
    return ok;
}

/* Adds the names in a folder, sorted by their bytes, without "." and "..". */
static int folder_list(const char *path, slam_strings *list) {
    DIR *folder = opendir(path);
    if (!folder) return set_error("%s: cannot list this folder: %s", path, strerror(errno));
    const size_t first = list->n;
    for (struct dirent *e; (e = readdir(folder)) != NULL;)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) slam_strings_add(list, e->d_name);
    closedir(folder);
    if (list->n > first) qsort(list->at + first, list->n - first, sizeof *list->at, compare_strings);
    return 1;
}

static int remove_entry(const char *path, const struct stat *s, int type, struct FTW *place) {
    (void)s, (void)type, (void)place;
    return remove(path) != 0 && !set_error("%s: cannot be removed: %s", path, strerror(errno));
}

/* Removes a file, or a folder and everything below it. Symbolic links are removed, not followed. */
static int remove_tree(const char *path) {
    const int status = nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    if (status < 0 && errno != ENOENT) return set_error("%s: %s", path, strerror(errno));
    return status <= 0;
}

/* Opens a file for reading; errors call it `name`. A pipe is replaced by a temporary copy, which can be read twice. */
static FILE *file_open(const char *path, const char *name, size_t *size) {
    static const char *const not_it[][3] = {
        // first bytes of what is found in its place, what it is, what to do
        {"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself",
         "run `git lfs pull` in its folder"},
        {"/annex/objects/", "a git-annex pointer, not the file itself", "run `git annex get .` in its folder"},
        {"<!DOCTYPE html", "a web page, not the file itself", "on Hugging Face its address has /resolve/, not /blob/"},
        {"\x1f\x8b", "compressed by gzip", "decompress it with gunzip"},
        {"\xff\xfe{", "UTF-16", "save it as UTF-8"}};
    char start[64] = "", block[65536];
    FILE *f = fopen(path, "rbe"), *pipe = f; // e: not inherited by programs that are started
    struct stat s;
    int ok = f && fstat(fileno(f), &s) == 0;
    if (ok && !S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode)) {
        f = tmpfile();
        for (size_t n = 1; f && n > 0; fwrite(block, 1, n, f)) n = fread(block, 1, sizeof block, pipe);
        ok = f && !ferror(pipe) && fflush(f) == 0 && !ferror(f) && fstat(fileno(f), &s) == 0;
        if (f) rewind(f);
        fclose(pipe);
    }
    if (!ok) set_error("%s: cannot be opened: %s", name, strerror(errno));
    else if (S_ISDIR(s.st_mode)) ok = set_error("%s: is a folder, expected a file", name);
    if (ok && pread(fileno(f), start, sizeof start - 1, 0) < 0) *start = 0;
    for (int i = 0; ok && i < 5; i++)
        if (!strncasecmp(start, not_it[i][0], strlen(not_it[i][0])))
            ok = set_error("%s: is %s; %s", name, not_it[i][1], not_it[i][2]);
    *size = ok ? (size_t)s.st_size : 0;
    if (ok) return f;
    if (f) fclose(f);
    return NULL;
}

/* A whole file as read-only memory. */
typedef struct file_map {
    const unsigned char *data;
    size_t size;
} file_map;

static int file_map_open(file_map *map, const char *path) {
    FILE *f = file_open(path, path, &map->size);
    map->data = NULL;
    if (!f) return 0;
    void *p = map->size ? mmap(NULL, map->size, PROT_READ, MAP_PRIVATE, fileno(f), 0) : NULL;
    fclose(f);
    if (p == MAP_FAILED) {
        map->size = 0;
        return set_error("%s: cannot be mapped: %s", path, strerror(errno));
    }
    map->data = (const unsigned char *)p;
    return 1;
}

static void file_map_close(file_map *map) {
    if (map->size) munmap((void *)(uintptr_t)map->data, map->size);
    memset(map, 0, sizeof *map);
}

/* Pipes cannot be synced, nor folders, or anything, on some network file systems. */
static int fd_sync(int fd) { return fsync(fd) == 0 || errno == EINVAL || errno == ENOTSUP || errno == ENOSYS; }

/* Syncs a folder: only then are renames and new files in it on the disk. */
static int folder_sync(const char *path) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC), ok = fd >= 0 && fd_sync(fd);
    if (!ok) set_error("%s: cannot be synced: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

typedef struct bytes {
    const void *at;
    size_t n;
} bytes;

/* Whether a path is a pipe, a device or a name of an open file, which no other file may replace. */
static int path_is_direct(const char *path) {
    const int type = path_type(path);
    return !strncmp(path, "/dev/std", 8) || !strncmp(path, "/dev/fd/", 8) ||
           (type && type != S_IFREG && type != S_IFDIR);
}

/* Writes n parts to PATH.part and renames it, so that PATH is never half written; if path_is_direct, to PATH itself. */
static int file_write_parts(const char *path, const bytes *parts, size_t n) {
    const int direct = path_is_direct(path);
    char *part = string_print("%s%s", path, direct ? "" : ".part");
    FILE *f = fopen(part, "wb");
    int ok = f != NULL;
    for (const bytes *p = parts; ok && p < parts + n; p++) ok = p->n == 0 || fwrite(p->at, p->n, 1, f) == 1;
    ok = ok && fflush(f) == 0 && fd_sync(fileno(f));
    if (f && fclose(f) != 0) ok = 0;
    ok = ok && (direct || rename(part, path) == 0);
    if (!ok) set_error("%s: cannot be written: %s", path, strerror(errno));
    if (!ok && f && !direct) unlink(part);
    free(part);
    return ok;
}

static int file_write(const char *path, const void *data, size_t n) {
    const bytes part = {data, n};
    return file_write_parts(path, &part, 1);
}

/* ==========================================================================================
   SECTION 2. FORMATS   JSON, safetensors, npy, token shards, CSV, unit lines
   A reader returns what the file says, or an error. Files are little-endian, as are the machines.
   ========================================================================================== */
#include <locale.h>

/* ---- JSON (RFC 8259) ---- */

enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };
typedef struct json {
    int type;
    const char *key;           // name within an object
    double number;             // finite
    const char *string;        // UTF-8 (and bytes from \udcXX), ends with 0; of a number: its text
    size_t n;                  // items of an array or object
    struct json *first, *next; // first item; next item of the same array or object
} json;

typedef struct json_parser {
    char *text, *at, *end; // a copy of the text that ends with 0; strings are unescaped in place
    int depth;
    json *node; // the next unused node
    const char *what;
} json_parser;

#define JSON_SIZE  100000000 // the largest header that the safetensors library reads
#define HEX_DIGITS "0123456789abcdefABCDEF"

/* Bytes of the UTF-8 character at `at`, in a string that ends with 0; 0 if it is not valid (RFC 3629). */
static size_t utf8_length(const char *at) {
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *s = (const unsigned char *)at;
    const size_t n = s[0] < 0x80 ? 1 : s[0] < 0xc2 || s[0] > 0xf4 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    if (n < 2) return n;
    uint32_t code = s[0] & (0xffu >> (n + 1));
    for (size_t k = 1; k < n; code = code << 6 | (s[k++] & 0x3fu))
        if ((s[k] & 0xc0) != 0x80) return 0;
    return code >= smallest[n] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? n : 0;
}

/* The error "what: byte 14: found '}', expected ..." */
static int json_expected(const json_parser *p, const char *expected) {
    const int c = (unsigned char)*p->at;
    char found[16] = "the end";
    if (p->at < p->end) snprintf(found, sizeof found, c > ' ' && c < 127 ? "'%c'" : "byte 0x%02x", c);
    return set_error("%s: byte %td: found %s, expected %s", p->what, p->at - p->text + 1, found, expected);
}

/* The next character that is not white space. */
static char json_peek(json_parser *p) {
    while (*p->at == ' ' || *p->at == '\n' || *p->at == '\r' || *p->at == '\t') p->at++;
    return *p->at;
}

/* The code of uXXXX, or -1. */
static long json_parse_code(const char *s) {
    char digits[5] = "";
    if (*s != 'u' || strspn(s + 1, HEX_DIGITS) < 4) return -1;
    memcpy(digits, s + 1, 4);
    return strtol(digits, NULL, 16);
}

/* A backslash and what follows it. */
static int json_parse_escape(json_parser *p, char **out) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *letter = *++p->at ? strchr(letters, *p->at) : NULL;
    long code = letter ? meanings[letter - letters] : json_parse_code(p->at);
    if (code <= 0) return json_expected(p, "\", \\, /, b, f, n, r, t or uXXXX (not 0000) after a backslash");
    p->at += letter ? 1 : 5;
    if (code >= 0xdc80 && code <= 0xdcff) { // Python's surrogateescape: a byte that is not UTF-8
        *(*out)++ = (char)(code & 0xff);
        return 1;
    }
    if (code >= 0xd800 && code <= 0xdfff) { // a character beyond 16 bits is a surrogate pair, \uD83D\uDE00
        const long low = code < 0xdc00 && *p->at == '\\' ? json_parse_code(p->at + 1) : -1;
        if (low < 0xdc00 || low > 0xdfff) return json_expected(p, "the other half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        p->at += 6;
    }
    const int n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int k = n - 1; k > 0; k--, code >>= 6) (*out)[k] = (char)(0x80 | (code & 0x3f));
    **out = (char)(n == 1 ? code : (0xf00 >> n & 0xf0) | code);
    *out += n;
    return 1;
}

/* The string whose opening quote is next. Unescaped it is never longer than its text. */
static int json_parse_string(json_parser *p, const char **string) {
    char *out = ++p->at;
    *string = out;
    while (*p->at != '"') {
        size_t length = utf8_length(p->at);
        if (*p->at == '\\') {
            if (!json_parse_escape(p, &out)) return 0;
            continue;
        }
        if (length == 0) return json_expected(p, "UTF-8");
        if ((unsigned char)*p->at < ' ')
            return json_expected(p, "a closing quote, or an escape sequence for a control character");
        while (length-- > 0) *out++ = *p->at++;
    }
    *out = 0;
    p->at++;
    return 1;
}

static int json_parse_number(json_parser *p, json *j) {
    char *first = p->at + (*p->at == '-'), *s = first, *text = p->at - 1, *end;
    double x = 0; // exact up to 15 digits
    while (isdigit((unsigned char)*s)) x = 10 * x + (*s++ - '0');
    int ok = s > first && (s == first + 1 || *first != '0') && (*s != '.' || isdigit((unsigned char)s[1]));
    const int whole = s - first <= 15 && *s != '.' && *s != 'e' && *s != 'E';
    if (!whole) s += strspn(s, "0123456789.+-eE");
    // one byte to the left, over the character before it, so that its 0 does not overwrite the one behind it
    const size_t n = (size_t)(s - p->at);
    memmove(text, p->at, n);
    text[n] = 0;
    j->string = text;
    j->number = *text == '-' ? -x : x;
    if (!whole) {
        char *point = strchr(text, '.');
        if (point) *point = *localeconv()->decimal_point;
        j->number = strtod(text, &end);
        if (point) *point = '.';
        ok = ok && !*end;
    }
    if (!ok || !isfinite(j->number))
        return set_error("%s: found %.40s, expected a decimal number that a double can hold", p->what, text);
    p->at += n;
    return 1;
}

static int json_parse_value(json_parser *p, json *j);

/* The items of an array or object whose opening bracket is next. */
static int json_parse_items(json_parser *p, json *j, char close) {
    json **link = &j->first;
    if (++p->depth > 64) return json_expected(p, "at most 64 levels of nesting");
    p->at++;
    for (; json_peek(p) != close; j->n++) {
        json *item = *link = p->node++;
        link = &item->next;
        if (j->n > 0 && *p->at != ',') return json_expected(p, close == '}' ? "',' or '}'" : "',' or ']'");
        if (j->n > 0) p->at++;
        if (close == '}') {
            if (json_peek(p) != '"') return json_expected(p, "a key in quotes");
            if (!json_parse_string(p, &item->key)) return 0;
            if (json_peek(p) != ':') return json_expected(p, "':' after a key");
            p->at++;
        }
        if (!json_parse_value(p, item)) return 0;
    }
    p->depth--;
    p->at++;
    return 1;
}

static int json_parse_value(json_parser *p, json *j) {
    static const char *const words[] = {"null", "false", "true"}; // in the order of the types
    const char c = json_peek(p);
    j->type = c == '"' ? JSON_STRING : c == '[' ? JSON_ARRAY : c == '{' ? JSON_OBJECT : JSON_NUMBER;
    if (c == '"') return json_parse_string(p, &j->string);
    if (c == '[' || c == '{') return json_parse_items(p, j, c == '[' ? ']' : '}');
    if (c == '-' || isdigit((unsigned char)c)) return json_parse_number(p, j);
    for (j->type = JSON_NULL; j->type <= JSON_TRUE; j->type++) {
        const size_t n = strlen(words[j->type]);
        if (strncmp(p->at, words[j->type], n)) continue;
        p->at += n;
        return 1;
    }
    return json_expected(p, "a value");
}

static void json_free(json *root) { free(root); }

/* The value of n bytes of text, NULL on error (which starts with `what`). A byte order mark is skipped, no \u0000. */
static json *json_parse(const char *text, size_t n, const char *what) {
    json_parser p = ZERO;
    size_t nodes = 1;
    if (n > JSON_SIZE) {
        set_error("%s: found %zu bytes, expected at most %d of JSON", what, n, JSON_SIZE);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) nodes += text[i] == ',' || text[i] == '[' || text[i] == '{'; // one before each item
    json *root = (json *)(void *)NEW(char, nodes * sizeof(json) + n + 2); // and the copy behind them
    p.what = what;
    p.node = root + 1;
    p.at = p.text = (char *)(root + nodes) + 1;
    p.end = p.at + n;
    if (n) memcpy(p.at, text, n);
    if (!strncmp(p.at, "\xef\xbb\xbf", 3)) p.at += 3;
    if (json_parse_value(&p, root)) {
        json_peek(&p);
        if (p.at == p.end) return root;
        json_expected(&p, "nothing more");
    }
    json_free(root);
    return NULL;
}

static json *json_load(const char *path) {
    file_map map;
    if (!file_map_open(&map, path)) return NULL;
    json *root = json_parse((const char *)map.data, map.size, path);
    file_map_close(&map);
    return root;
}

static int json_is(const json *j, int type) { return j && j->type == type; }

/* The member of that name, of several the last; NULL if there is none, or if `object` is no object. */
static const json *json_find(const json *object, const char *key) {
    const json *found = NULL;
    for (const json *j = json_is(object, JSON_OBJECT) ? object->first : NULL; j; j = j->next)
        if (strcmp(j->key, key) == 0) found = j;
    return found;
}

/* The same; NULL also if it is null. */
static const json *json_get(const json *object, const char *key) {
    const json *found = json_find(object, key);
    return json_is(found, JSON_NULL) ? NULL : found;
}

static const char *json_string(const json *object, const char *key, const char *fallback) {
    const json *j = json_get(object, key);
    return json_is(j, JSON_STRING) ? j->string : fallback;
}

/* A whole number that a double holds exactly. */
static int json_whole(const json *j) {
    return json_is(j, JSON_NUMBER) && fabs(j->number) <= 0x1p53 && j->number == floor(j->number);
}

/* For error messages: what was found. */
static const char *json_describe(const json *j) {
    static const char *const names[] = {"null", "false", "true", "", "a string", "an array", "an object"};
    return !j ? "missing" : json_is(j, JSON_NUMBER) ? j->string : names[j->type];
}

static const char *json_text(const json *j) { return json_is(j, JSON_STRING) ? j->string : json_describe(j); }

/* A string in quotes, escaped. Bytes that are not UTF-8 (file names) become \udc80 to \udcff, as in Python. */
static void strbuf_add_json(strbuf *out, const char *utf8) {
    strbuf_add(out, "\"");
    for (size_t n; *utf8; utf8 += n ? n : 1) {
        n = utf8_length(utf8);
        if (*utf8 == '"' || *utf8 == '\\') strbuf_add(out, "\\%c", *utf8);
        else if (*utf8 == '\n' || *utf8 == '\t') strbuf_add(out, *utf8 == '\n' ? "\\n" : "\\t");
        else if (n == 1 && *utf8 < ' ') strbuf_add(out, "\\u%04x", (unsigned)*utf8);
        else if (n) strbuf_add_bytes(out, utf8, n);
        else strbuf_add(out, "\\udc%02x", (unsigned char)*utf8);
    }
    strbuf_add(out, "\"");
}

/* The shortest text of at least 15 digits that reads back as the same double; null if it is not finite. */
static void strbuf_add_number(strbuf *out, double x) {
    char text[40];
    int digits = 14;
    do snprintf(text, sizeof text, "%.*g", ++digits, x);
    while (digits < 17 && strtod(text, NULL) != x); // 17 tell any two doubles apart
    char *point = strchr(text, *localeconv()->decimal_point);
    if (point) *point = '.';
    strbuf_add(out, "%s", isfinite(x) ? text : "null");
}

/* A member of a JSON object that is a member of a struct. */
enum { FIELD_INT, FIELD_LONG, FIELD_U64, FIELD_REAL, FIELD_BOOL, FIELD_HEX };
typedef struct field {
    const char *name;
    int type;        // int, long, uint64_t (up to 2^53), double, int, uint64_t as "00c0ffee..."
    size_t offset;   // offsetof(struct, member)
    double min, max; // limits of a number
    int required;
} field;

/* Reads n members into the struct `to`. One that is absent or null leaves it as it is, unless it is required. */
static int fields_read(const json *object, const field *f, size_t n, void *to, const char *what) {
    for (const field *end = f + n; f < end; f++) {
        const json *j = json_get(object, f->name);
        const int type = j ? j->type : JSON_NULL, whole = f->type != FIELD_REAL;
        const char *digits = type == JSON_STRING ? j->string : "";
        void *at = (char *)to + f->offset;
        char expected[80] = "true or false";
        if (!j && !f->required) continue;
        int ok = type == JSON_TRUE || type == JSON_FALSE;
        if (f->type == FIELD_HEX) {
            ok = *digits && strlen(digits) <= 16 && !digits[strspn(digits, HEX_DIGITS)];
            snprintf(expected, sizeof expected, "hexadecimal digits in quotes");
        } else if (f->type != FIELD_BOOL) {
            ok = type == JSON_NUMBER && j->number >= f->min && j->number <= f->max && (!whole || json_whole(j));
            snprintf(expected, sizeof expected, "a %snumber from %.16g to %.16g", whole ? "whole " : "", f->min,
                     f->max);
        }
        if (!ok) return set_error("%s: '%s' is %.60s, expected %s", what, f->name, json_describe(j), expected);
        if (f->type == FIELD_INT) *(int *)at = (int)j->number;
        if (f->type == FIELD_LONG) *(long *)at = (long)j->number;
        if (f->type == FIELD_U64) *(uint64_t *)at = (uint64_t)j->number;
        if (f->type == FIELD_REAL) *(double *)at = j->number;
        if (f->type == FIELD_BOOL) *(int *)at = type == JSON_TRUE;
        if (f->type == FIELD_HEX) *(uint64_t *)at = strtoull(digits, NULL, 16);
    }
    return 1;
}

/* Reads whole numbers from 1 on, `expected` (0: any number), as many as `like`. Returns their number, 0 on error. */
enum { LIST_MOST = 16, LIST_LIMIT = 1 << 14 };
static int json_list(const json *list, const char *key, int *out, int n, int expected, const char *like,
                     const char *what) {
    const json *j = list ? list->first : NULL;
    if (list) n = 0;
    for (; n < LIST_MOST && json_whole(j) && j->number >= 1 && j->number <= LIST_LIMIT; j = j->next)
        out[n++] = (int)j->number;
    if (!j && n >= 1 && (!expected || n == expected)) return n;
    return set_error("%s: '%s' has %d numbers, then %.60s, expected 1 to %d from 1 to %d, as many as %s", what, key, n,
                     j ? json_describe(j) : "its end", LIST_MOST, LIST_LIMIT, like);
}

/* Adds a line `"name": value,` for each field, the last without a comma. A number that is not finite becomes null. */
static void fields_write(strbuf *out, const field *f, size_t n, const void *from, const char *indent) {
    for (const field *end = f + n; f < end; f++) {
        const void *at = (const char *)from + f->offset;
        strbuf_add(out, "%s\"%s\": ", indent, f->name);
        if (f->type == FIELD_INT) strbuf_add(out, "%d", *(const int *)at);
        if (f->type == FIELD_LONG) strbuf_add(out, "%ld", *(const long *)at);
        if (f->type == FIELD_U64) strbuf_add(out, "%llu", (unsigned long long)*(const uint64_t *)at);
        if (f->type == FIELD_REAL) strbuf_add_number(out, *(const double *)at);
        if (f->type == FIELD_BOOL) strbuf_add(out, "%s", *(const int *)at ? "true" : "false");
        if (f->type == FIELD_HEX) strbuf_add(out, "\"%016llx\"", (unsigned long long)*(const uint64_t *)at);
        strbuf_add(out, f + 1 < end ? ",\n" : "\n");
    }
}

/* ---- safetensors ----
   8 bytes: n, the length of the header. n bytes: the header, a JSON object that may end in spaces:
       {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "F32", "shape": [2,3], "data_offsets": [begin, end]}, ...}
   Then the data in row order. Offsets count from its first byte. Tensors neither overlap nor leave gaps.
   A large model is several such files and model.safetensors.index.json: {"weight_map": {"NAME": "FILE", ...}}. */

enum { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_F64, DTYPE_I32, DTYPE_I64, DTYPE_U8, DTYPES = 17 };
static const size_t dtype_bytes[DTYPES] = {4, 2, 2, 8, 4, 8, 1, 1, 1, 2, 2, 4, 8, 8, 1, 1, 1};
static const char *const dtype_names[] = {"F32", "F16", "BF16", "F64", "I32", "I64",     "U8",      "I8",     "BOOL",
                                          "I16", "U16", "U32",  "U64", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0"};

typedef struct tensor {
    const char *name;
    int dtype, rank;
    size_t shape[8];
    const void *data; // not necessarily aligned
    size_t count;
    const char *file; // that it was read from
} tensor;

typedef struct tensors_file {
    char *path;
    file_map map;
    json *header; // holds the names of the tensors
} tensors_file;

typedef struct tensors {
    tensor *at; // sorted by name
    size_t n, capacity;
    tensors_file *file;
    size_t files, file_capacity;
} tensors;

static void tensors_close(tensors *t) {
    if (!t) return;
    for (size_t i = 0; i < t->files; i++) {
        file_map_close(&t->file[i].map);
        json_free(t->file[i].header);
        free(t->file[i].path);
    }
    free(t->file);
    free(t->at);
    free(t);
}

/* Whole numbers from 0 on; 0 if it is not an array of at most `max` of them. */
static int json_sizes(const json *array, size_t *out, size_t max) {
    if (!json_is(array, JSON_ARRAY) || array->n > max) return 0;
    for (const json *j = array->first; j; j = j->next) {
        if (!json_whole(j) || j->number < 0) return 0;
        *out++ = (size_t)j->number;
    }
    return 1;
}

/* An entry of the header, with `data` the `size` bytes behind the header. */
static int tensor_parse(tensor *t, const json *entry, const unsigned char *data, size_t size, const char *path) {
    const json *shape = json_get(entry, "shape"), *offsets = json_get(entry, "data_offsets");
    const char *dtype = json_string(entry, "dtype", "missing"), *name = entry->key;
    size_t place[2] = {0, 0};
    double count = 1; // a double, because it may be beyond a size_t
    memset(t, 0, sizeof *t);
    t->name = name;
    t->file = path;
    while (t->dtype < DTYPES && strcmp(dtype_names[t->dtype], dtype)) t->dtype++;
    if (t->dtype == DTYPES) return set_error("%s: tensor '%s' has dtype %.40s, expected e.g. F32", path, name, dtype);
    if (!json_sizes(shape, t->shape, 8))
        return set_error("%s: tensor '%s' has no valid shape, expected up to 8 whole numbers", path, name);
    if (!json_sizes(offsets, place, 2) || offsets->n != 2 || place[0] > place[1] || place[1] > size)
        return set_error("%s: tensor '%s' has no valid data_offsets, expected two up to %zu, or the file is truncated",
                         path, name, size);
    t->rank = (int)shape->n;
    for (int k = 0; k < t->rank; k++) count *= (double)t->shape[k];
    size = place[1] - place[0];
    if (count * (double)dtype_bytes[t->dtype] != (double)size)
        return set_error("%s: tensor '%s' has %zu bytes, expected %.0f numbers of %s", path, name, size, count, dtype);
    t->count = (size_t)count;
    t->data = data + place[0];
    return 1;
}

static int compare_tensor_places(const void *a, const void *b) {
    const tensor *x = (const tensor *)a, *y = (const tensor *)b;
    return x->data == y->data ? (x->count > 0) - (y->count > 0) : x->data < y->data ? -1 : 1; // empty ones first
}

static int compare_tensors(const void *a, const void *b) {
    return strcmp(((const tensor *)a)->name, ((const tensor *)b)->name);
}

/* Sorts the tensors from `first` on by name. Two of a name are an error. */
static int tensors_sort(tensors *t, size_t first) {
    qsort(t->at + first, t->n - first, sizeof *t->at, compare_tensors);
    for (const tensor *x = t->at + first + 1; x < t->at + t->n; x++)
        if (!strcmp(x[-1].name, x->name))
            return set_error("%s: found a second tensor '%s', after that in %s", x->file, x->name, x[-1].file);
    return 1;
}

/* Adds the tensors of a file. Takes over its bytes, on failure too. */
static int tensors_add(tensors *t, const char *path, const file_map *map) {
    const size_t first = t->n, size = map->size;
    uint64_t n = 0;
    GROW(tensors_file, t->file, t->file_capacity, t->files + 1);
    tensors_file *file = &t->file[t->files++];
    file->path = string_copy(path);
    file->map = *map;
    file->header = NULL;
    if (size > 8) memcpy(&n, map->data, 8);
    if (n == 0 || n > size - 8 || map->data[8] != '{')
        return set_error("%s: %zu bytes, expected a header of %.0f: truncated, or not safetensors", path, size,
                         (double)n);
    file->header = json_parse((const char *)map->data + 8, (size_t)n, path);
    if (!file->header) return 0;
    const unsigned char *data = map->data + 8 + n;
    const size_t bytes = size - 8 - (size_t)n;
    size_t at = 0;
    GROW(tensor, t->at, t->capacity, t->n + file->header->n + 1);
    for (const json *j = file->header->first; j; j = j->next)
        if (strcmp(j->key, "__metadata__") && !tensor_parse(&t->at[t->n++], j, data, bytes, file->path)) return 0;
    if (!tensors_sort(t, first)) return 0;
    qsort(t->at + first, t->n - first, sizeof *t->at, compare_tensor_places);
    for (const tensor *x = t->at + first; x < t->at + t->n; at += x->count * dtype_bytes[x->dtype], x++)
        if (x->data != data + at) return set_error("%s: there is a gap or overlap before tensor '%s'", path, x->name);
    if (at != bytes) return set_error("%s: found %zu bytes of data, expected tensors of %zu", path, bytes, at);
    return tensors_sort(t, 0);
}

static int tensors_add_file(tensors *t, const char *path) {
    file_map map;
    return file_map_open(&map, path) && tensors_add(t, path, &map);
}

static const tensor *tensors_find(const tensors *t, const char *name) {
    tensor key = ZERO;
    key.name = name;
    return t->n ? (const tensor *)bsearch(&key, t->at, t->n, sizeof *t->at, compare_tensors) : NULL;
}

/* The value of `key` in the metadata of the (first) file, or NULL. */
static const char *tensors_metadata(const tensors *t, const char *key) {
    return t->files ? json_string(json_get(t->file[0].header, "__metadata__"), key, NULL) : NULL;
}

/* Adds the files that an index names; only files beside it are opened. */
static int tensors_add_index(tensors *t, const char *folder, const char *index) {
    json *root = json_load(index);
    const json *map = json_get(root, "weight_map");
    int ok =
        root && (json_is(map, JSON_OBJECT) ||
                 set_error("%s: 'weight_map' is %.60s, expected an object of file names", index, json_describe(map)));
    for (const json *j = ok ? map->first : NULL; ok && j; j = j->next) {
        const char *name = json_is(j, JSON_STRING) ? j->string : "";
        const slam_path p = path_join(folder, name);
        size_t i = 0;
        while (i < t->files && strcmp(path_name(t->file[i].path), name)) i++;
        if (!*name || strchr(name, '/') || !path_is_file(p.at))
            ok = set_error("%s: tensor '%s' is in '%s', expected a file in the same folder", index, j->key, name);
        else if (i == t->files) ok = tensors_add_file(t, p.at);
    }
    json_free(root);
    return ok;
}

/* The tensors of a .safetensors file or of a model's folder; NULL and an error if anything in them is wrong. */
static tensors *tensors_open(const char *path) {
    tensors *t = NEW(tensors, 1);
    const slam_path model = path_join(path, "model.safetensors"),
                    index = path_join(path, "model.safetensors.index.json");
    int ok = 0;
    if (!path_is_folder(path)) ok = tensors_add_file(t, path);
    else if (path_is_file(model.at)) ok = tensors_add_file(t, model.at);
    else if (path_is_file(index.at)) ok = tensors_add_index(t, path, index.at);
    else if (path_is_file(path_join(path, "pytorch_model.bin").at))
        set_error(
            "%s: found only pytorch_model.bin, which can contain programs and is not read, expected "
            "model.safetensors; convert it, in this folder, with python3 -c \"import torch, safetensors.torch as s; "
            "s.save_file({k: v.clone().contiguous() for k, v in torch.load('pytorch_model.bin', map_location='cpu', "
            "weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})\"",
            path);
    else
        set_error("%s: found no model in this folder, expected %s or %s", path, path_name(model.at),
                  path_name(index.at));
    if (ok) return t;
    tensors_close(t);
    return NULL;
}

static void strbuf_add_shape(strbuf *out, int rank, const size_t *shape) {
    for (int k = 0; k < rank; k++) strbuf_add(out, "%s%zu", k ? "," : "", shape[k]);
}

/* Whether the shape is () or (a) or (a,b), depending on rank. */
static int tensor_has_shape(const tensor *t, int rank, size_t a, size_t b) {
    const size_t shape[2] = {a, b};
    strbuf s = ZERO;
    if (t->rank == rank && !memcmp(t->shape, shape, (size_t)rank * sizeof *shape)) return 1;
    strbuf_add_shape(&s, t->rank, t->shape);
    strbuf_add(&s, "), expected (");
    strbuf_add_shape(&s, rank, shape);
    set_error("%s: tensor '%s' has shape (%s)", t->file, t->name, s.at);
    strbuf_free(&s);
    return 0;
}

static float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* IEEE half: sign, 5 bits of exponent (bias 15), 10 bits of fraction. Exact as a float. */
static float float_from_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return float_from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

/* Numbers first .. first + n - 1 as floats. bfloat16 is the upper half of a float. */
static int tensor_floats(const tensor *t, float *out, size_t first, size_t n) {
    const int dtype = t->dtype;
    uint16_t half = 0;
    double wide = 0;
    if (dtype > DTYPE_F64)
        return set_error("%s: tensor '%s' is %s, expected F32, F16, BF16 or F64", t->file, t->name, dtype_names[dtype]);
    if (first > t->count || n > t->count - first)
        return set_error("%s: tensor '%s' has %zu numbers, expected %zu + %zu", t->file, t->name, t->count, first, n);
    const unsigned char *from = (const unsigned char *)t->data + first * dtype_bytes[dtype];
    if (dtype == DTYPE_F32 && n) memcpy(out, from, n * sizeof *out);
    for (size_t i = 0; dtype != DTYPE_F32 && i < n; i++) {
        if (dtype == DTYPE_F64) memcpy(&wide, from + 8 * i, 8);
        else memcpy(&half, from + 2 * i, 2);
        if (dtype == DTYPE_F64) out[i] = (float)wide;
        else out[i] = dtype == DTYPE_F16 ? float_from_f16(half) : float_from_bits((uint32_t)half << 16);
    }
    return 1;
}

/* Writes n tensors in the given order. metadata: key, value, ..., NULL, or NULL; "format": "pt" is added. */
static int tensors_write(const char *path, const tensor *list, size_t n, const char *const *metadata) {
    strbuf header = ZERO;
    size_t begin = 0;
    bytes *parts = NEW(bytes, n + 2); // length, header, tensors
    strbuf_add(&header, "{\"__metadata__\":{\"format\":\"pt\"");
    for (int k = 0; metadata && metadata[k]; k++) {
        strbuf_add(&header, k % 2 ? ":" : ",");
        strbuf_add_json(&header, metadata[k]);
    }
    strbuf_add(&header, "}");
    for (size_t i = 0; i < n; i++) {
        const bytes data = {list[i].data, list[i].count * dtype_bytes[list[i].dtype]};
        strbuf_add(&header, ",");
        strbuf_add_json(&header, list[i].name);
        strbuf_add(&header, ":{\"dtype\":\"%s\",\"shape\":[", dtype_names[list[i].dtype]);
        strbuf_add_shape(&header, list[i].rank, list[i].shape);
        strbuf_add(&header, "],\"data_offsets\":[%zu,%zu]}", begin, begin + data.n);
        parts[2 + i] = data;
        begin += data.n;
    }
    strbuf_add(&header, "}%*s", (int)(7 - header.n % 8), ""); // the data start at a multiple of 8
    const uint64_t length = header.n;
    const bytes start[2] = {{&length, 8}, {header.at, header.n}};
    memcpy(parts, start, sizeof start);
    const int ok = file_write_parts(path, parts, n + 2);
    strbuf_free(&header);
    free(parts);
    return ok;
}

/* ---- npy (NumPy's format, version 1) ----
   "\x93NUMPY", 1, 0, the length of the header (16 bits), the header {'descr': '<f4', 'fortran_order': False, 'shape':
   (100, 39), }, filled with spaces and a newline so that the data, in row order, start at a multiple of 64. */

static int npy_parse(const file_map *map, const char *path, float **data, size_t *rows, size_t *cols) {
    char header[256] = "";
    int width = 0, used = 0;
    size_t length = 0;
    if (map->size < 10 || memcmp(map->data, "\x93NUMPY", 6))
        return set_error("%s: is not an .npy file; a k-means of scikit-learn (joblib, pickle) can contain programs and "
                         "is not read; convert it with python3 -c \"import joblib, numpy; numpy.save('km.npy', "
                         "joblib.load('%s').cluster_centers_.astype('float32'))\"",
                         path, path);
    length = map->data[8] | (size_t)map->data[9] << 8;
    if (map->size < 10 + length || map->data[6] != 1)
        return set_error("%s: is not an .npy file of version 1, or is truncated", path);
    memcpy(header, map->data + 10, length < 255 ? length : 255);
    sscanf(header, "{'descr': '<f%1d', 'fortran_order': False, 'shape': (%18zu, %18zu), }%n", &width, rows, cols,
           &used);
    if (!used || header[used + (int)strspn(header + used, " \n")] || (width != 4 && width != 8))
        return set_error("%s: found %.99s, expected float32 or float64, row order, two dimensions: save it with "
                         "numpy.save(path, numpy.ascontiguousarray(x, 'float32'))",
                         path, header);
    const size_t R = *rows, C = *cols, n = R * C, bytes = map->size - 10 - length;
    if ((C && R > bytes / C) || n * (size_t)width != bytes)
        return set_error("%s: found %zu bytes of data, expected %zu x %zu float%d", path, bytes, R, C, 8 * width);
    const tensor t = {path, width == 4 ? DTYPE_F32 : DTYPE_F64, 2, {R, C}, map->data + 10 + length, n, path};
    float *x = NEW(float, n);
    int ok = tensor_floats(&t, x, 0, n);
    for (size_t i = 0; ok && i < n; i++)
        if (!isfinite(x[i])) ok = set_error("%s: row %zu has %g, expected finite numbers", path, i / C, (double)x[i]);
    if (ok) *data = x;
    else free(x);
    return ok;
}

/* Reads a (rows,cols) matrix of finite float32 or float64 as floats, in memory of its own. */
static int npy_read(const char *path, float **data, size_t *rows, size_t *cols) {
    file_map map;
    const int ok = file_map_open(&map, path) && npy_parse(&map, path, data, rows, cols);
    file_map_close(&map);
    return ok;
}

static int npy_write(const char *path, const float *data, size_t rows, size_t cols) {
    char header[129], text[118];
    snprintf(text, sizeof text, "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }", rows, cols);
    snprintf(header, sizeof header, "\x93NUMPY\x01 v %-117s\n", text);
    header[7] = header[9] = 0; // version 1.0; 'v' is 118, the length of the header
    const bytes parts[2] = {{header, 128}, {data, rows * cols * sizeof *data}};
    return file_write_parts(path, parts, 2);
}

/* ---- token shards (llm.c's format) ----
   256 int32: 20240520, version 1, number of tokens, V, fingerprint of the unit tokenizer (both 0: unknown; llm.c leaves
   them 0), zeros; then the tokens, uint16. */

enum { SHARD_MAGIC = 20240520, SHARD_VERSION = 1, SHARD_HEADER = 1024 };
enum { DOCUMENT_TOKEN = 1, FIRST_UNIT = 2 }; // 1 opens and closes a document, unit u is token u + 2, 0 is padding

typedef struct shard {
    file_map map;
    const uint16_t *tokens;
    size_t n;
    int V;                // 0: unknown
    uint32_t fingerprint; // 0: unknown
} shard;

static int shard_parse(shard *s, const char *path) {
    int32_t h[5] = {0, 0, 0, 0, 0};
    if (s->map.size >= SHARD_HEADER) memcpy(h, s->map.data, sizeof h);
    if (h[0] != SHARD_MAGIC || h[1] != SHARD_VERSION)
        return set_error("%s: starts with %d and %d, expected a token shard (20240520 and 1)", path, h[0], h[1]);
    const size_t bytes = s->map.size - SHARD_HEADER;
    if (h[2] < 0 || bytes != 2 * (size_t)h[2])
        return set_error("%s: found %zu bytes of tokens, expected 2 for each of the header's %d", path, bytes, h[2]);
    if (h[3] < 0 || h[3] > 65536) return set_error("%s: the vocabulary is %d, expected 0 to 65536", path, h[3]);
    s->tokens = (const uint16_t *)(const void *)(s->map.data + SHARD_HEADER);
    s->n = (size_t)h[2];
    s->V = h[3];
    s->fingerprint = (uint32_t)h[4];
    return 1;
}

static int shard_open(shard *s, const char *path) {
    memset(s, 0, sizeof *s);
    const int ok = file_map_open(&s->map, path) && shard_parse(s, path);
    if (!ok) file_map_close(&s->map);
    return ok;
}

/* A file that is appended to and resumed after a kill: sync it, then note `bytes` in a journal; a later process cuts it
   to the noted bytes and continues there. While it is open, no other process can open it this way. */
typedef struct append_file {
    FILE *f;
    char *path;
    uint64_t bytes;
} append_file;

static int append_ok(const append_file *a, int ok) {
    return ok || set_error("%s: cannot be written: %s", a->path, strerror(errno));
}

/* Opens or creates the file and locks it, without changing it. */
static int append_open(append_file *a, const char *path) {
    struct stat s, t;
    memset(a, 0, sizeof *a);
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return set_error("%s: cannot be written: %s", path, strerror(errno));
    // a file system without locks goes without; a file that was renamed or removed just now belonged to another process
    int locked = 0;
    for (int i = 0; !locked && i < 20; i++) { // a child of a killed process has its lock until it executes a program
        if (i) usleep(10000);
        locked = flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
    }
    const int same = fstat(fd, &s) == 0 && stat(path, &t) == 0 && s.st_ino == t.st_ino && s.st_dev == t.st_dev;
    if (!locked || !same) {
        close(fd);
        return set_error("%s: is being written by another process", path);
    }
    a->f = fdopen(fd, "r+b");
    a->path = string_copy(path);
    a->bytes = (uint64_t)s.st_size;
    return 1;
}

/* Cuts the file to its first `bytes` (0: starts anew), and continues there. */
static int append_resume(append_file *a, uint64_t bytes) {
    const off_t at = (off_t)bytes;
    if (a->bytes < bytes)
        return set_error("%s: has %.0f bytes, expected the journal's %.0f", a->path, (double)a->bytes, (double)bytes);
    a->bytes = bytes;
    return append_ok(a, fflush(a->f) == 0 && ftruncate(fileno(a->f), at) == 0 && fseeko(a->f, at, SEEK_SET) == 0);
}

static int append_write(append_file *a, const void *data, size_t n) {
    a->bytes += n;
    return append_ok(a, n == 0 || fwrite(data, 1, n, a->f) == n);
}

/* Then all `bytes` are on the disk. */
static int append_sync(append_file *a) {
    return append_ok(a, fflush(a->f) == 0 && !ferror(a->f) && fd_sync(fileno(a->f)));
}

static int append_close(append_file *a) {
    const int ok = !a->f || append_sync(a);
    if (a->f) fclose(a->f);
    free(a->path);
    memset(a, 0, sizeof *a);
    return ok;
}

/* Writes the header for the tokens so far: into an empty file to reserve its place, and again when all are there. */
static int shard_write_header(append_file *a, int V, uint32_t fingerprint) {
    if (a->bytes < SHARD_HEADER) a->bytes = SHARD_HEADER;
    const uint64_t tokens = (a->bytes - SHARD_HEADER) / 2;
    const int32_t header[SHARD_HEADER / 4] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)tokens, V, (int32_t)fingerprint};
    if (tokens > INT32_MAX)
        return set_error("%s: has %.0f tokens, expected at most %d", a->path, (double)tokens, INT32_MAX);
    return append_ok(a, fseeko(a->f, 0, SEEK_SET) == 0 && fwrite(header, sizeof header, 1, a->f) == 1 &&
                            fseeko(a->f, (off_t)a->bytes, SEEK_SET) == 0);
}

/* ---- CSV (RFC 4180) ----
   Fields between commas; "..." may contain commas, line ends and "" for a quote. The first row names the columns. */

typedef struct csv {
    char **cells; // (rows,cols) row 0 is the header
    size_t rows, cols;
    size_t *lines; // (rows) from 1
    char *text;    // the file, in which each cell ends with 0
    size_t capacity, line_capacity;
} csv;

static void csv_free(csv *c) {
    free(c->cells);
    free(c->lines);
    free(c->text);
    memset(c, 0, sizeof *c);
}

static int csv_row(csv *c, char **at, size_t *line, const char *path) {
    const size_t first = c->rows * c->cols, start = *line;
    size_t n = 0;
    for (char end = ','; end == ',';) {
        char *from = *at, *to = from;
        GROW(char *, c->cells, c->capacity, first + n + 1);
        c->cells[first + n++] = from;
        if (*from == '"') {
            for (from++;; *to++ = *from++) {
                if (!*from) return set_error("%s:%zu: found no end of a field in quotes, expected \"", path, start);
                if (*from == '"' && *++from != '"') break;
                *line += *from == '\n';
            }
            if (*from == '\r' && from[1] == '\n') from++;
            if (*from && *from != ',' && *from != '\n')
                return set_error("%s:%zu: found '%c' after a closing quote, expected a comma", path, *line, *from);
        } else {
            to = from += strcspn(from, ",\n");
            if (*from != ',' && to > *at && to[-1] == '\r') to--;
        }
        end = *from;
        *at = from + (end != 0);
        *to = 0;
    }
    ++*line;
    if (n == 1 && !*c->cells[first]) return 1; // a blank line
    if (!c->cols) c->cols = n;
    if (n != c->cols) return set_error("%s:%zu: found %zu fields, expected %zu", path, start, n, c->cols);
    GROW(size_t, c->lines, c->line_capacity, c->rows + 1);
    c->lines[c->rows++] = start;
    return 1;
}

static int csv_read(csv *c, const char *path) {
    file_map map;
    size_t line = 1;
    memset(c, 0, sizeof *c);
    if (!file_map_open(&map, path)) return 0;
    c->text = string_copy_n(map.size ? (const char *)map.data : "", map.size);
    int ok = strlen(c->text) == map.size || set_error("%s: found a zero byte, expected a table (CSV)", path);
    file_map_close(&map);
    char *at = c->text + (strncmp(c->text, "\xef\xbb\xbf", 3) ? 0 : 3); // a byte order mark
    while (ok && *at) ok = csv_row(c, &at, &line, path);
    if (ok && c->rows < 2) ok = set_error("%s: found %zu rows, expected the names of columns and more", path, c->rows);
    if (!ok) csv_free(c);
    return ok;
}

/* (size_t)-1 if there is no column of that name. */
static size_t csv_column(const csv *c, const char *name) {
    for (size_t k = 0; k < c->cols; k++)
        if (strcmp(c->cells[k], name) == 0) return k;
    return (size_t)-1;
}

/* ---- unit lines (SlamKit's JSON lines) ----
   features:   {"units": [3, 49, 7], "duration": [1, 2, 1], "file_name": "a.wav"}
   tokens:     {"file_name": "a.wav", "audio_repr": "<Un3><Un49><Un7>"}
   and for a segment of a longer file, in either, "start": 60.5, "end": 118.25 (seconds) */

void slam_units_free(slam_units *u) {
    free(u->name);
    free(u->unit);
    free(u->duration);
    memset(u, 0, sizeof *u);
}

static int units_parse_list(const json *list, const char *what, int **out) {
    const char *key = list->key;
    if (!json_is(list, JSON_ARRAY))
        return set_error("%s: '%s' is %.60s, expected an array", what, key, json_describe(list));
    int *x = *out = NEW(int, list->n);
    for (const json *j = list->first; j; *x++ = (int)j->number, j = j->next)
        if (!json_whole(j) || j->number < 0 || j->number > INT_MAX)
            return set_error("%s: '%s' has %.60s, expected whole numbers from 0 on", what, key, json_describe(j));
    return 1;
}

/* "<Un3><Un49>" */
static int units_parse_repr(const json *repr, const char *what, slam_units *u) {
    const char *p = json_text(repr);
    u->unit = NEW(int, strlen(p) / 5); // "<Un3>" is the shortest
    for (char *end; *p; p = end + 1) {
        const long unit = !strncmp(p, "<Un", 3) && isdigit((unsigned char)p[3]) ? strtol(p + 3, &end, 10) : -1;
        if (unit < 0 || unit > INT_MAX || *end != '>')
            return set_error("%s: unit %zu is '%.20s', expected <Un and a number and >", what, u->n + 1, p);
        u->unit[u->n++] = (int)unit;
    }
    return 1;
}

/* Replaces *u by the units of an object of either kind, or of a string "<Un3><Un49>". Errors start with `what`. */
static int units_from_json(const json *value, const char *what, slam_units *u) {
    const json *list = json_get(value, "units"), *duration = json_get(value, "duration");
    const json *repr = json_is(value, JSON_STRING) ? value : json_get(value, "audio_repr");
    const json *start = json_get(value, "start"), *end = json_get(value, "end");
    slam_units_free(u);
    u->name = string_copy(json_string(value, "file_name", ""));
    if (json_is(start, JSON_NUMBER) && json_is(end, JSON_NUMBER)) { // else they mean something else
        u->start = start->number;
        u->end = end->number;
    }
    if (!list && repr) return units_parse_repr(repr, what, u);
    if (!list) return set_error("%s: found %s, expected 'units' or 'audio_repr'", what, json_describe(value));
    u->n = list->n;
    return units_parse_list(list, what, &u->unit) && (!duration || units_parse_list(duration, what, &u->duration)) &&
           (!duration || duration->n == u->n ||
            set_error("%s: has %zu durations, expected %zu", what, duration->n, u->n));
}

typedef struct units_reader {
    file_map map;
    const char *at, *end;
    const char *path; // the caller's
    char what[4200];  // "path:line", for errors
    size_t line;      // number of the last line that was read, from 1
    json *root;       // that line
} units_reader;

static int units_open(units_reader *r, const char *path) {
    memset(r, 0, sizeof *r);
    if (!file_map_open(&r->map, path)) return 0;
    r->at = r->map.size ? (const char *)r->map.data : "";
    r->end = r->at + r->map.size;
    r->path = path;
    return 1;
}

static void units_close(units_reader *r) {
    file_map_close(&r->map);
    json_free(r->root);
    memset(r, 0, sizeof *r);
}

/* The next line that is not blank, into r->root and, unless u is NULL, its units into u: 1, 0 at the end, -1: error. */
static int units_next(units_reader *r, slam_units *u) {
    const char *line;
    size_t n, blank;
    do {
        line = next_line(&r->at, r->end, &n);
        if (!line) return 0;
        r->line++;
        for (blank = 0; blank < n && isspace((unsigned char)line[blank]);) blank++;
    } while (blank == n);
    json_free(r->root);
    snprintf(r->what, sizeof r->what, "%s:%zu", r->path, r->line);
    r->root = json_parse(line, n, r->what);
    return r->root && (!u || units_from_json(r->root, r->what, u)) ? 1 : -1;
}

static void strbuf_add_ints(strbuf *out, const int *x, size_t n, const char *between) {
    for (size_t i = 0; i < n; i++) strbuf_add(out, "%s%d", i ? between : "", x[i]);
}

/* Adds a tokens line or a features line, without its newline. name NULL: without file_name. */
static void strbuf_add_units(strbuf *out, const slam_units *u, int tokens) {
    strbuf_add(out, "{");
    if (!tokens) {
        strbuf_add(out, "\"units\": [");
        strbuf_add_ints(out, u->unit, u->n, ", ");
        if (u->duration) strbuf_add(out, "], \"duration\": [");
        if (u->duration) strbuf_add_ints(out, u->duration, u->n, ", ");
        strbuf_add(out, "]");
    }
    if (u->name) {
        strbuf_add(out, tokens ? "\"file_name\": " : ", \"file_name\": ");
        strbuf_add_json(out, u->name);
    }
    if (tokens) {
        strbuf_add(out, ", \"audio_repr\": \"%s", u->n ? "<Un" : "");
        strbuf_add_ints(out, u->unit, u->n, "><Un");
        strbuf_add(out, u->n ? ">\"" : "\"");
    }
    for (int k = 0; k < 2 && u->end > 0; k++) {
        strbuf_add(out, k ? ", \"end\": " : ", \"start\": ");
        strbuf_add_number(out, k ? u->end : u->start);
    }
    strbuf_add(out, "}");
}

/* ==========================================================================================
   SECTION 4. OPS ON THE CPU      the reference implementation; at a first reading skip the matrix product

   Every op of section 3 in float, in its order; the mathematics is there. In a parallel loop every output belongs to
   one thread and sums have a fixed order: results do not depend on the number of threads (SLAM_BLAS aside).
   ========================================================================================== */

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter" // most ops do not need their slam_ops

/* ---- matrix products ----
   C (M,N) = A (M,K) B (K,N). Three plain loops load two numbers for every multiplication and are bound by memory. Here
   a loaded number is used many times, at three levels (Goto and van de Geijn 2008, with A and B exchanged):
     registers  a tile of C, TILE_ROWS x TILE_COLUMNS; each k loads TILE_ROWS + TILE_COLUMNS numbers
     L1 cache   a panel of A, TILE_ROWS x BLOCK_K (16 kB with AVX-512), serves all tiles side by side
     L2 cache   a block of B, BLOCK_K x BLOCK_COLUMNS (512 kB with AVX-512), serves all panels of A
   Panel and block are packed: copied into the order in which a tile reads them, transposed where necessary. An element
   of C is summed in order of k, in blocks that depend on K alone: threads and tiles do not change its bits. */

/* First item of part i when n items are split as evenly as possible into `parts` parts, in multiples of `unit`. */
static int part_start(int n, int unit, int parts, int i) {
    const long long at = ((long long)n + unit - 1) / unit * i / parts * unit;
    return at < n ? (int)at : n;
}

static inline int min_int(int a, int b) { return a < b ? a : b; }

#ifdef SLAM_BLAS
#ifdef __APPLE__
#include <Accelerate/Accelerate.h>
#else
#include <cblas.h>
#endif
enum { TILE_COLUMNS = 32, GEMM_IS_OURS = 0 };

/* Like our gemm below, but rows of A may not overlap, and the bits of a row may depend on the other rows. */
static void gemm(int transA, int transB, int M, int N, int K, const float *A, size_t lda, const float *B, size_t ldb,
                 float beta, float *C, size_t ldc) {
    cblas_sgemm(CblasRowMajor, transA ? CblasTrans : CblasNoTrans, transB ? CblasTrans : CblasNoTrans, M, N, K, 1, A,
                (int)lda, B, (int)ldb, beta, C, (int)ldc);
}
#else
/* Floats of a vector register, and rows of the tile that fills the registers, 32 with AVX-512 and AArch64 (gcc uses
   several of those for A), else 16: two for each row of C, two for B, one for A. */
#if defined __AVX512F__
enum { VECTOR = 16, TILE_ROWS = 14 };
#elif defined __aarch64__
enum { VECTOR = 4, TILE_ROWS = 10 };
#elif defined __AVX__
enum { VECTOR = 8, TILE_ROWS = 6 };
#else
enum { VECTOR = 4, TILE_ROWS = 6 };
#endif
enum { TILE_COLUMNS = 2 * VECTOR, BLOCK_K = 256, BLOCK_COLUMNS = 16 * TILE_COLUMNS };
enum { PANEL_STRIDE = (TILE_ROWS + 3) / 4 * 4, GEMM_IS_OURS = 1 };

typedef float gemm_vector __attribute__((vector_size(VECTOR * 4)));
typedef float gemm_vector4 __attribute__((vector_size(16)));
typedef gemm_vector gemm_memory __attribute__((aligned(4), may_alias)); // a vector anywhere in memory
typedef gemm_vector4 gemm_memory4 __attribute__((aligned(4), may_alias));

static THREAD_LOCAL float packed_a[BLOCK_K * PANEL_STRIDE] __attribute__((aligned(64)));
static THREAD_LOCAL float packed_b[BLOCK_K * BLOCK_COLUMNS] __attribute__((aligned(64)));

/* gcc -std=c11 does not contract a product and a sum to a fused multiply-add; other modes and compilers do. */
#if defined __GNUC__ && !defined __clang__ && !defined __cplusplus && defined __STRICT_ANSI__
#define FUSED __attribute__((optimize("fp-contract=fast")))
#else
#define FUSED
#endif
#define ALWAYS_INLINE     static inline __attribute__((always_inline))

/* C = a b + beta C, a tile of the product. a_ik is a[i ld + k step], b is (K,TILE_COLUMNS). p and q of a row are its
   left and right half; of a narrow tile, which is one vector wide, rows i and i + second. The accumulators p0 q0 p1 q1
   ... are separate variables because compilers keep an array in memory, and a0, a1, ... so that few registers reach all
   rows of a. `rows` and narrow are constants wherever this is inlined: the code for further rows disappears. */
#define TILE_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13)
ALWAYS_INLINE FUSED void gemm_tile(const int rows, const int narrow, const size_t ld, size_t second, int K,
                                   const float *a, size_t step, const float *b, float beta, float *C, size_t ldc) {
    float *D = narrow ? C + second * ldc : C + VECTOR;
    const float *a0 = a, *a1 = a + 3 * ld, *a2 = a + 6 * ld, *a3 = a + 9 * ld, *a4 = a + 12 * ld;
    const float *c0 = a0 + second * ld, *c1 = a1 + second * ld, *c2 = a2 + second * ld;
#define TILE_AT(at, i)    ((gemm_memory *)(at + i * ldc))
#define TILE_A(i)         (i < 3 ? a0 : i < 6 ? a1 : i < 9 ? a2 : i < 12 ? a3 : a4)[i % 3 * ld]
#define TILE_A2(i)        (i < 3 ? c0 : i < 6 ? c1 : c2)[i % 3 * ld]
#define TILE_CLEAR(i)     gemm_vector p##i = ZERO, q##i = ZERO;
#define TILE_MULTIPLY(i)                                                                                               \
    if (i < rows) p##i += TILE_A(i) * x, q##i += narrow ? TILE_A2(i) * x : TILE_A(i) * y;
#define TILE_ADD(i)                                                                                                    \
    if (i < rows) p##i += *TILE_AT(C, i), q##i += *TILE_AT(D, i);
#define TILE_STORE(i)                                                                                                  \
    if (i < rows) *TILE_AT(C, i) = p##i, *TILE_AT(D, i) = q##i;
    for (int i = 0; i < rows; i++) __builtin_prefetch(TILE_AT(C, i)), __builtin_prefetch(TILE_AT(D, i));
    TILE_EACH_ROW(TILE_CLEAR)
    for (int k = 0; k < K; k++, b += TILE_COLUMNS) {
        const gemm_vector x = ((const gemm_memory *)b)[0], y = ((const gemm_memory *)b)[1];
        TILE_EACH_ROW(TILE_MULTIPLY)
        a0 += step, a1 += step, a2 += step, a3 += step, a4 += step, c0 += step, c1 += step, c2 += step;
    }
    if (beta != 0) { TILE_EACH_ROW(TILE_ADD) }
    TILE_EACH_ROW(TILE_STORE)
}

/* C (rows,n) = a panel of A times packed_b + beta C. gemm_tile is compiled for each number of rows. The last tile may
   be wider than C and goes through `edge`. */
static FUSED void gemm_panel(int rows, int n, int K, const float *a, size_t ld, size_t step, float beta, float *C,
                             size_t ldc) {
    float edge[TILE_ROWS * TILE_COLUMNS];
    const float *b = packed_b;
#define TILE_CASE(i)                                                                                                   \
    case i + 1:                                                                                                        \
        if (i < TILE_ROWS && !narrow) gemm_tile(i + 1, 0, ld, 0, K, a, step, b, add, to, width);                       \
        if (2 * i < TILE_ROWS && narrow) gemm_tile(i + 1, 1, ld, rows - i - 1, K, a, step, b, add, to, width);         \
        break;
    for (; n > 0; n -= TILE_COLUMNS, b += (size_t)K * TILE_COLUMNS, C += TILE_COLUMNS) {
        const int narrow = n <= VECTOR, whole = n >= TILE_COLUMNS || n == VECTOR;
        float *to = whole ? C : edge, add = whole ? beta : 0;
        const size_t width = whole ? ldc : (size_t)TILE_COLUMNS;
        switch (narrow ? (rows + 1) / 2 : rows) { TILE_EACH_ROW(TILE_CASE) }
        for (int i = 0; i < rows && !whole; i++)
            for (int j = 0; j < n; j++) C[i * ldc + j] = edge[i * TILE_COLUMNS + j] + (beta != 0 ? C[i * ldc + j] : 0);
    }
}

/* out_ki = in_ki, `step` numbers at a time; the last copy may overlap the one before. */
ALWAYS_INLINE void gemm_copy(float *out, int stride, const float *in, size_t ld, int width, int K, const int step) {
    for (int k = 0; k < K; k++, out += stride, in += ld)
        for (int i = 0; i < width; i += step) {
            const int at = i + step < width ? i : width - step;
            memcpy(out + at, in + at, step * sizeof(float));
        }
}

#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int gemm_index __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, __extension__(gemm_index){i, j, k, l})
#endif

/* out (4,4), rows `ld` apart, is the transpose of four numbers from each of r0 .. r3. */
ALWAYS_INLINE void gemm_transpose4(float *out, int ld, const float *r0, const float *r1, const float *r2,
                                   const float *r3) {
    const gemm_vector4 a = *(const gemm_memory4 *)r0, b = *(const gemm_memory4 *)r1;
    const gemm_vector4 c = *(const gemm_memory4 *)r2, d = *(const gemm_memory4 *)r3;
    const gemm_vector4 ab0 = SHUFFLE(a, b, 0, 4, 1, 5), cd0 = SHUFFLE(c, d, 0, 4, 1, 5); // a0 b0 a1 b1, c0 d0 c1 d1
    const gemm_vector4 ab2 = SHUFFLE(a, b, 2, 6, 3, 7), cd2 = SHUFFLE(c, d, 2, 6, 3, 7); // a2 b2 a3 b3, c2 d2 c3 d3
    *(gemm_memory4 *)out = SHUFFLE(ab0, cd0, 0, 1, 4, 5);
    *(gemm_memory4 *)(out + ld) = SHUFFLE(ab0, cd0, 2, 3, 6, 7);
    *(gemm_memory4 *)(out + 2 * ld) = SHUFFLE(ab2, cd2, 0, 1, 4, 5);
    *(gemm_memory4 *)(out + 3 * ld) = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
}

/* out (K,stride): out_ki = trans ? in_ik : in_ki for i < width. Numbers beyond that are arbitrary: their products are
   not stored. */
static void gemm_pack(float *out, int stride, const float *in, size_t ld, int trans, int width, int K) {
    if (!trans && width >= 8) gemm_copy(out, stride, in, ld, width, K, 8);
    else if (!trans && width >= 4) gemm_copy(out, stride, in, ld, width, K, 4);
    else if (!trans) gemm_copy(out, stride, in, ld, width, K, 1);
    else
        for (int i = 0; i < width; i += 4) {
            const int last = width - 1 - i; // rows beyond the last are copies of it
            const float *r0 = in + i * ld, *r1 = r0 + min_int(1, last) * ld;
            const float *r2 = r0 + min_int(2, last) * ld, *r3 = r0 + min_int(3, last) * ld;
            int k = 0;
            for (; k + 4 <= K; k += 4) gemm_transpose4(out + k * stride + i, stride, r0 + k, r1 + k, r2 + k, r3 + k);
            for (; k < K; k++) {
                float *o = out + k * stride + i;
                o[0] = r0[k], o[1] = r1[k], o[2] = r2[k], o[3] = r3[k];
            }
        }
}

/* C (M,N) = op(A) (M,K) op(B) (K,N) + beta C on the calling thread, as in BLAS; beta is 0 (C is not read) or 1, and
   rows of A may overlap. */
static void gemm(int transA, int transB, int M, int N, int K, const float *A, size_t lda, const float *B, size_t ldb,
                 float beta, float *C, size_t ldc) {
    const int m_parts = (M + TILE_ROWS - 1) / TILE_ROWS, n_parts = (N + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    const int k_parts = K > 0 ? (K + BLOCK_K - 1) / BLOCK_K : 1;
    // not worth packing: a panel that at most two tiles use, or rows that lie together in the L1 cache as they are
    const int unpacked = transA ? N <= 2 * TILE_COLUMNS : lda <= BLOCK_K;
    for (int part = 0; part < n_parts * k_parts; part++) {
        const int np = part / k_parts, kp = part % k_parts;
        const int n0 = part_start(N, TILE_COLUMNS, n_parts, np), n1 = part_start(N, TILE_COLUMNS, n_parts, np + 1);
        const int k0 = part_start(K, 1, k_parts, kp), depth = part_start(K, 1, k_parts, kp + 1) - k0;
        for (int n = n0; n < n1; n += TILE_COLUMNS)
            gemm_pack(packed_b + (size_t)(n - n0) * depth, TILE_COLUMNS, transB ? B + n * ldb + k0 : B + k0 * ldb + n,
                      ldb, transB, min_int(TILE_COLUMNS, n1 - n), depth);
        for (int mp = 0; mp < m_parts; mp++) {
            const int m0 = part_start(M, 1, m_parts, mp), m1 = part_start(M, 1, m_parts, mp + 1);
            const float *a = transA ? A + k0 * lda + m0 : A + m0 * lda + k0;
            if (!unpacked) gemm_pack(packed_a, PANEL_STRIDE, a, lda, !transA, m1 - m0, depth);
            gemm_panel(m1 - m0, n1 - n0, depth, unpacked ? a : packed_a, unpacked && !transA ? lda : 1,
                       unpacked ? transA ? lda : 1 : (size_t)PANEL_STRIDE, kp ? 1 : beta, C + m0 * ldc + n0, ldc);
        }
    }
}
#endif

/* The same on several threads, each with a rectangle of C. Of the grids r by threads / r it takes the one whose largest
   rectangle costs least; packing a number counts as 16 multiplications. */
static void gemm_parallel(int threads, int transA, int transB, int M, int N, int K, const float *A, size_t lda,
                          const float *B, size_t ldb, float beta, float *C, size_t ldc) {
    int rows = 1, columns = 1;
    double least = HUGE_VAL;
    for (int r = 1; r <= threads; r++) {
        const double m = ceil((double)M / r), n = ceil((double)N / TILE_COLUMNS / (threads / r)) * TILE_COLUMNS;
        const double cost = m * n + 16 * (m + n);
        if (cost < least) least = cost, rows = r, columns = threads / r;
    }
    PARALLEL_FOR
    for (int i = 0; i < rows * columns; i++) {
        const int r = i / columns, c = i % columns;
        const int m0 = part_start(M, 1, rows, r), m1 = part_start(M, 1, rows, r + 1);
        const int n0 = part_start(N, TILE_COLUMNS, columns, c), n1 = part_start(N, TILE_COLUMNS, columns, c + 1);
        if (m0 < m1 && n0 < n1)
            gemm(transA, transB, m1 - m0, n1 - n0, K, transA ? A + m0 : A + m0 * lda, lda,
                 transB ? B + n0 * ldb : B + n0, ldb, beta, C + m0 * ldc + n0, ldc);
    }
}

/* ---- memory ---- */

typedef struct cpu_ops {
    slam_ops ops; // first: a slam_ops * of this backend is also a cpu_ops *
    char name[64];
    float *scratch;
    size_t scratch_n;
} cpu_ops;

/* Large blocks use huge pages, which save a training step several per cent. calloc's pointer is stored in front. */
static void *cpu_alloc(slam_ops *ops, size_t bytes) {
    const size_t align = bytes >= (4u << 20) ? 2u << 20 : 256;
    char *raw = bytes < SIZE_MAX / 2 ? (char *)calloc(bytes + align + sizeof(void *), 1) : NULL;
    if (!raw) {
        set_error("out of memory (%.1f MB): reduce --micro-batch (eval: --batch) or --context, or use --recompute",
                  (double)bytes / 1e6);
        return NULL;
    }
    char *p = (char *)(((uintptr_t)raw + sizeof(void *) + align - 1) / align * align);
    ((void **)p)[-1] = raw;
#ifdef MADV_HUGEPAGE
    if (align > 256) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}

static void cpu_release(slam_ops *ops, void *p) { free(p ? ((void **)p)[-1] : NULL); }

/* n floats of scratch memory for one op, not zeroed. */
static float *cpu_scratch(slam_ops *ops, size_t n) {
    cpu_ops *cpu = (cpu_ops *)ops;
    if (n > cpu->scratch_n) {
        cpu_release(ops, cpu->scratch);
        cpu->scratch = (float *)cpu_alloc(ops, n * sizeof(float));
        if (!cpu->scratch) SLAM_OUT_OF_MEMORY((double)n * sizeof(float));
        cpu->scratch_n = n;
    }
    return cpu->scratch;
}

static void cpu_copy(slam_ops *ops, void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void cpu_zero(slam_ops *ops, void *p, size_t bytes) { memset(p, 0, bytes); }
static int cpu_finish(slam_ops *ops) { return 1; }
static void cpu_to_act(slam_ops *ops, slam_act *out, const float *x, size_t n) { memcpy(out, x, n * sizeof *x); }
static void cpu_to_float(slam_ops *ops, float *out, const slam_act *x, size_t n) { memcpy(out, x, n * sizeof *out); }

static void cpu_close(slam_ops *ops) {
    cpu_release(ops, ((cpu_ops *)ops)->scratch);
    free(ops);
}

/* ---- rows ---- */

/* Row i of a matrix whose rows are `stride` numbers apart; slam_act is float on the CPU. NULL stays NULL. */
static inline float *row(const slam_act *x, int i, int stride) {
    return x ? (float *)(uintptr_t)x + (ptrdiff_t)i * stride : NULL;
}

/* Asserts that the iterations of the next loop are independent, also where an op works in place (y is x). */
#define VECTORISE SLAM_PRAGMA(omp simd)

/* Compilers may not reorder a sum of floats. ROW_SUM defines a function that adds `term` over c = 0 .. n - 1 in a fixed
   order for vector instructions: lane k adds the terms k, k + LANES, ...; then lanes are added in pairs. */
enum { LANES = 16 };
#define ROW_SUM(type, name, parameters, term) ROW_FOLD(type, name, parameters, 0, PLUS, term)
#define ROW_FOLD(type, name, parameters, initial, op, term)                                                            \
    static __attribute__((noinline)) type name parameters {                                                            \
        type lane[LANES];                                                                                              \
        size_t start = 0;                                                                                              \
        for (int k = 0; k < LANES; k++) lane[k] = initial;                                                             \
        for (; start + LANES <= n; start += LANES)                                                                     \
            for (size_t k = 0; k < LANES; k++) {                                                                       \
                const size_t c = start + k;                                                                            \
                lane[k] = op(lane[k], term);                                                                           \
            }                                                                                                          \
        for (size_t c = start; c < n; c++) lane[c - start] = op(lane[c - start], term);                                \
        for (int half = LANES / 2; half > 0; half /= 2)                                                                \
            for (int k = 0; k < half; k++) lane[k] = op(lane[k], lane[k + half]);                                      \
        return lane[0];                                                                                                \
    }
#define PLUS(a, b)   ((a) + (b))
#define LARGER(a, b) ((b) > (a) ? (b) : (a))

/* condition ? a : b without a branch, which would keep the loop around it from being vectorised. */
static inline float choose(int condition, float a, float b) {
    const uint32_t mask = 0 - (uint32_t)condition;
    uint32_t i, j;
    memcpy(&i, &a, sizeof i), memcpy(&j, &b, sizeof j);
    j = (i & mask) | (j & ~mask);
    memcpy(&b, &j, sizeof b);
    return b;
}

/* e^x within 2 units in the last place for x in [-87, 88], clamped outside; NaN stays NaN. Can be vectorised, unlike
   expf. x = n log 2 + r with |r| <= log(2)/2, so e^x = 2^n e^r; e^r is the polynomial of Cephes' expf (Moshier 1989).
   Adding 1.5 2^23 rounds to an integer, held by the low bits of t. */
static inline float exp_float(float x) {
    x = choose(x < -87.0f, -87.0f, x);
    x = choose(x > 88.0f, 88.0f, x);
    const float t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // log 2 in two parts, the first exact in few bits
    float p = 1.9875691500e-4f, two_n;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    uint32_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits + 127) << 23; // the exponent of 2^n
    memcpy(&two_n, &bits, sizeof two_n);
    return p * two_n;
}

ROW_FOLD(float, row_max, (const float *x, size_t n), -HUGE_VALF, LARGER, x[c])
ROW_SUM(float, dot, (const float *a, const float *b, size_t n), a[c] * b[c])
ROW_SUM(float, dot3, (const float *a, const float *b, const float *w, size_t n), a[c] * b[c] * w[c])
ROW_SUM(float, row_sum, (const float *x, size_t n), x[c])
ROW_SUM(float, row_squares_about, (const float *x, float mean, size_t n), (x[c] - mean) * (x[c] - mean))
ROW_SUM(float, row_exp_sum, (const float *x, float max, size_t n), exp_float(x[c] - max))
/* x_c = exp(scale x_c - shift) in place; returns their sum */
ROW_SUM(float, row_exp, (float *x, float scale, float shift, size_t n), (x[c] = exp_float(x[c] * scale - shift)))
ROW_SUM(double, part_sum, (const float *x, size_t n), (double)x[c])
ROW_SUM(double, part_squares, (const float *x, size_t n), (double)x[c] * x[c])

/* s (C) = x + delta. Returns s, or x where delta is NULL. */
static const float *row_add(float *s, const float *x, const float *delta, int C) {
    if (!delta) return x;
    VECTORISE
    for (int c = 0; c < C; c++) s[c] = x[c] + delta[c];
    return s;
}

/* sum_c += sum over i of x_ic      x (N,C). A thread takes COLUMNS columns and goes down the rows. */
enum { COLUMNS = 64 };
static void add_rows(float *sum, const float *x, int N, int C) {
    PARALLEL_FOR
    for (int first = 0; first < C; first += COLUMNS) {
        const int end = min_int(first + COLUMNS, C);
        for (int i = 0; i < N; i++)
            for (int c = first; c < end; c++) sum[c] += x[(size_t)i * C + c];
    }
}

/* ---- embedding ---- */

/* x (N,C)  tokens (N)  table (V,C) */
static void cpu_embedding_forward(slam_ops *ops, slam_act *x, const int *tokens, const slam_act *table, int N, int C) {
    PARALLEL_FOR
    for (int i = 0; i < N; i++) memcpy(row(x, i, C), row(table, tokens[i], C), (size_t)C * sizeof(float));
}

/* dtable (V,C)  dx (N,C)  tokens (N). Two rows may have the same token, so threads share out the columns. */
static void cpu_embedding_backward(slam_ops *ops, float *dtable, const slam_act *dx, const int *tokens, int N, int C,
                                   int V) {
    PARALLEL_FOR
    for (int first = 0; first < C; first += COLUMNS) {
        const int n = min_int(COLUMNS, C - first);
        for (int i = 0; i < N; i++) {
            const float *dxi = row(dx, i, C) + first;
            float *d = dtable + (size_t)tokens[i] * C + first;
            for (int c = 0; c < n; c++) d[c] += dxi[c];
        }
    }
}

/* ---- residual add and RMSNorm ---- */

/* s, y, x, delta: N groups, `stride` apart, of (G,C)  w (C)  rstd (N,G) */
static void cpu_rmsnorm_forward(slam_ops *ops, slam_act *s_, slam_act *y_, float *rstd, const slam_act *x_,
                                const slam_act *delta_, const slam_act *w_, float eps, int N, int G, int C,
                                int stride) {
    const float *w = (const float *)w_;
    PARALLEL_FOR
    for (int i = 0; i < N; i++)
        for (int g = 0; g < G; g++) {
            const float *delta = delta_ ? row(delta_, i, stride) + g * C : NULL;
            const float *s = row_add(s_ ? row(s_, i, stride) + g * C : NULL, row(x_, i, stride) + g * C, delta, C);
            const float r = 1 / sqrtf(dot(s, s, C) / (float)C + eps);
            float *y = row(y_, i, stride) + g * C;
            VECTORISE
            for (int c = 0; c < C; c++) y[c] = w[c] * (r * s[c]);
            rstd[(size_t)i * G + g] = r;
        }
}

/* ds, dy, s: N groups, `stride` apart, of (G,C)  w, dw (C)  rstd (N,G). A task is NORM_GROUPS groups with a sum for dw
   of its own; these, (parts,C), are added in order. */
enum { NORM_GROUPS = 64 };
static void cpu_rmsnorm_backward(slam_ops *ops, slam_act *ds_, float *dw, const slam_act *dy_, const slam_act *s_,
                                 const slam_act *w_, const float *rstd, int N, int G, int C, int stride) {
    const float *w = (const float *)w_;
    const int parts = (N + NORM_GROUPS - 1) / NORM_GROUPS;
    float *sums = cpu_scratch(ops, (size_t)parts * 2 * C);
    PARALLEL_FOR
    for (int part = 0; part < parts; part++) {
        float *sum = sums + (size_t)part * C, *copy = sums + (size_t)(parts + part) * C;
        const int first = part * NORM_GROUPS, end = min_int(first + NORM_GROUPS, N);
        memset(sum, 0, (size_t)C * sizeof(float));
        for (int i = first; i < end; i++)
            for (int g = 0; g < G; g++) {
                const float *dy = row(dy_, i, stride) + g * C, *s = row(s_, i, stride) + g * C;
                float *ds = row(ds_, i, stride) + g * C;
                const float r = rstd[(size_t)i * G + g], mean = dot3(dy, s, w, C) * r * r / (float)C;
                if (ds == dy) {
                    dy = (const float *)memcpy(copy, dy, (size_t)C * sizeof(float));
                    memset(ds, 0, (size_t)C * sizeof(float));
                }
                VECTORISE
                for (int c = 0; c < C; c++) {
                    sum[c] += dy[c] * r * s[c];
                    ds[c] += r * (w[c] * dy[c] - s[c] * mean);
                }
            }
    }
    add_rows(dw, sums, parts, C);
}

/* ---- linear layer ---- */

/* out (N,OC)  x (N,C)  w (OC,C)  b (OC) or NULL */
static void cpu_matmul_forward(slam_ops *ops, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b,
                               int N, int C, int OC) {
    PARALLEL_FOR
    for (int i = 0; i < (b ? N : 0); i++) memcpy(row(out, i, OC), b, (size_t)OC * sizeof(float));
    gemm_parallel(ops->threads, 0, 1, N, OC, C, row(x, 0, C), C, row(w, 0, C), C, b ? 1 : 0, row(out, 0, OC), OC);
}

/* dx (N,C)  dout (N,OC)  w (OC,C) */
static void cpu_matmul_backward_input(slam_ops *ops, slam_act *dx, const slam_act *dout, const slam_act *w, int N,
                                      int C, int OC) {
    gemm_parallel(ops->threads, 0, 0, N, C, OC, row(dout, 0, OC), OC, row(w, 0, C), C, 0, row(dx, 0, C), C);
}

/* dw (OC,C)  db (OC) or NULL  dout (N,OC)  x (N,C) */
static void cpu_matmul_backward_weight(slam_ops *ops, float *dw, float *db, const slam_act *dout, const slam_act *x,
                                       int N, int C, int OC) {
    gemm_parallel(ops->threads, 1, 0, OC, C, N, row(dout, 0, OC), OC, row(x, 0, C), C, 1, dw, C);
    if (db) add_rows(db, row(dout, 0, OC), N, OC);
}

/* ---- attention ----
   A tile is QUERIES queries of one head with all keys that any of them sees. Scores and weighted sums of a tile are
   matrix products with a softmax between them. Only (QUERIES,keys) scores exist at a time, never (T,T). */

enum { QUERIES = 64 };
typedef struct query_tile {
    int i, n;        // queries i .. i + n - 1 of their row of the batch
    int first, keys; // keys first .. first + keys - 1 of the same row
} query_tile;

/* The keys that query i of row b sees: [a,b) and [c,d), before and after its masked span. Each may be empty. */
typedef struct key_ranges {
    int a, b, c, d;
} key_ranges;

static key_ranges visible_keys(const slam_mask *mask, int b, int i) {
    const size_t at = (size_t)b * mask->T + i;
    const int start = mask->doc_start[at], end = mask->doc_end ? mask->doc_end[at] : i + 1;
    const int span = mask->mask_start && mask->mask_start[at] < mask->mask_end[at];
    const key_ranges see = {start, span ? mask->mask_start[at] : start, span ? mask->mask_end[at] : start, end};
    return see;
}

static query_tile tile_of(const slam_mask *mask, int b, int index) {
    query_tile t = {index * QUERIES, min_int(QUERIES, mask->T - index * QUERIES), mask->T, 0};
    int end = 0;
    for (int i = t.i; i < t.i + t.n; i++) {
        const key_ranges see = visible_keys(mask, b, i);
        t.first = min_int(t.first, see.a);
        if (see.d > end) end = see.d;
    }
    t.keys = end - t.first;
    return t;
}

/* x_j = exp(scale x_j - shift) for visible keys, else 0; j = t.first .. t.first + t.keys - 1. Returns the sum. */
static float exp_visible(float *x, query_tile t, key_ranges see, float scale, float shift) {
    for (int j = t.first; j < see.a; j++) x[j] = 0;
    float sum = row_exp(x + see.a, scale, shift, see.b - see.a);
    for (int j = see.b; j < see.c; j++) x[j] = 0;
    sum += row_exp(x + see.c, scale, shift, see.d - see.c);
    for (int j = see.d; j < t.first + t.keys; j++) x[j] = 0;
    return sum;
}

/* Position t rotates pair i by the angle t f_i, f_i = theta^(-i / pairs), or scaled (see slam_config). In the float
   arithmetic of Transformers, so that the angles are the same. */
static float rope_frequency(const slam_config *c, int i, int pairs) {
    const float f = 1 / powf((float)c->rope_theta, (float)(2 * i) / (float)(2 * pairs)), factor = (float)c->rope_factor;
    const float waves = (float)c->rope_original / (6.2831853f / f); // within the original context
    const float low = (float)c->rope_low, high = (float)c->rope_high, share = (waves - low) / (high - low);
    if (factor == 0 || (high > 0 && waves > high)) return f;
    if (high == 0 || waves < low) return f / factor;
    return (1 - share) * f / factor + share * f;
}

/* The rotary table (T,2 pairs). A row holds the cosines of all pairs, then their sines. free() it. */
static float *rope_table(int T, int pairs, const slam_config *c) {
    float *table = NEW(float, 2 * (size_t)T * pairs);
    for (int i = 0; i < pairs; i++) {
        const float frequency = rope_frequency(c, i, pairs);
        for (int t = 0; t < T; t++) {
            float *cosine = table + 2 * (size_t)t * pairs + i;
            cosine[0] = cosf((float)t * frequency);
            cosine[pairs] = sinf((float)t * frequency);
        }
    }
    return table;
}

/* The rotary position of row i of (B T). */
static int rotary_position(const slam_mask *mask, int i) {
    const int masked = mask->mask_start ? mask->mask_end[i] - mask->mask_start[i] : 0;
    return i % mask->T - mask->doc_start[i] - masked;
}

/* x (heads,HS) = R_p x, or its inverse with sign -1 */
static void rotate(float *x, int heads, const slam_mask *mask, int p, float sign) {
    const int pairs = mask->pairs;
    if (!pairs) return;
    const float *cosine = mask->rope + 2 * (size_t)p * pairs, *sine = cosine + pairs;
    for (int h = 0; h < heads; h++, x += mask->HS) {
        VECTORISE
        for (int c = 0; c < pairs; c++) {
            const float x0 = x[c], x1 = x[c + pairs], s = sign * sine[c];
            x[c] = x0 * cosine[c] - x1 * s;
            x[c + pairs] = x1 * cosine[c] + x0 * s;
        }
    }
}

/* out (B,T,NH HS)  lse (B,NH,T)  qkv (B,T,(NH + 2 KVH) HS). A task is one tile. */
static void cpu_attention_forward(slam_ops *ops, slam_act *out, float *lse, slam_act *qkv, const slam_mask *mask) {
    const int B = mask->B, T = mask->T, NH = mask->NH, KVH = mask->KVH, HS = mask->HS;
    const int W = (NH + 2 * KVH) * HS, O = NH * HS, tiles = (T + QUERIES - 1) / QUERIES;
    const float scale = 1 / sqrtf((float)HS);
    float *scratch = cpu_scratch(ops, (size_t)omp_get_max_threads() * QUERIES * T);
    PARALLEL_FOR
    for (int i = 0; i < B * T; i++) rotate(row(qkv, i, W), NH + KVH, mask, rotary_position(mask, i), 1);
    /* The last tiles of a row see the most keys and come first, for load balance. */
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int task = 0; task < tiles * B * NH; task++) {
        const int h = task % NH, b = task / NH % B;
        const query_tile t = tile_of(mask, b, tiles - 1 - task / NH / B);
        const float *q = row(qkv, b * T + t.i, W) + h * HS;
        const float *k = row(qkv, b * T + t.first, W) + (NH + h * KVH / NH) * HS, *v = k + KVH * HS;
        float *o = row(out, b * T + t.i, O) + h * HS, *l = lse + ((size_t)b * NH + h) * T + t.i, sum[QUERIES];
        float *s = scratch + (size_t)omp_get_thread_num() * QUERIES * T; // (t.n, t.keys)
        gemm(0, 1, t.n, t.keys, HS, q, W, k, W, 0, s, t.keys);
        for (int i = 0; i < t.n; i++) {
            float *si = s + (size_t)i * t.keys - t.first; // si[j] is q'_i . k'_j
            const key_ranges see = visible_keys(mask, b, t.i + i);
            const float max = fmaxf(row_max(si + see.a, see.b - see.a), row_max(si + see.c, see.d - see.c));
            sum[i] = exp_visible(si, t, see, scale, max * scale);
            l[i] = max * scale + logf(sum[i]);
        }
        gemm(0, 0, t.n, HS, t.keys, s, t.keys, v, W, 0, o, O);
        for (int i = 0; i < t.n; i++)
            for (int c = 0; c < HS; c++) o[(size_t)i * O + c] /= sum[i];
    }
}

/* dqkv, qkv (B,T,(NH + 2 KVH) HS)  D, lse (B,NH,T)  dout, out (B,T,NH HS). A task is a query head of a row. Each has
   its own dk and dv, (B,NH,2,T,HS); those of a group are added in order afterwards. */
static void cpu_attention_backward(slam_ops *ops, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out,
                                   const float *lse, const slam_act *qkv, const slam_mask *mask) {
    const int B = mask->B, T = mask->T, NH = mask->NH, KVH = mask->KVH, HS = mask->HS;
    const int W = (NH + 2 * KVH) * HS, O = NH * HS;
    const float scale = 1 / sqrtf((float)HS);
    const size_t work = (size_t)QUERIES * T, head = (size_t)T * HS;
    float *scratch = cpu_scratch(ops, 2 * omp_get_max_threads() * work + 2 * B * NH * head);
    float *dkv = scratch + 2 * omp_get_max_threads() * work;
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int task = 0; task < B * NH; task++) {
        const int b = task / NH, h = task % NH, kv = (NH + h * KVH / NH) * HS;
        float *p = scratch + 2 * omp_get_thread_num() * work, *ds = p + work; // (t.n, t.keys) each
        float *dk = dkv + 2 * task * head, *dv = dk + head, *Di = D + (size_t)task * T;
        memset(dk, 0, 2 * head * sizeof(float));
        for (int i = 0; i < T; i++) Di[i] = dot(row(dout, b * T + i, O) + h * HS, row(out, b * T + i, O) + h * HS, HS);
        for (int index = 0; index * QUERIES < T; index++) {
            const query_tile t = tile_of(mask, b, index);
            const float *q = row(qkv, b * T + t.i, W) + h * HS, *d = row(dout, b * T + t.i, O) + h * HS;
            const float *k = row(qkv, b * T + t.first, W) + kv, *v = k + KVH * HS;
            float *dq = row(dqkv, b * T + t.i, W) + h * HS;
            gemm(0, 1, t.n, t.keys, HS, q, W, k, W, 0, p, t.keys);
            gemm(0, 1, t.n, t.keys, HS, d, O, v, W, 0, ds, t.keys);
            for (int i = 0; i < t.n; i++) {
                float *pi = p + (size_t)i * t.keys - t.first, *dsi = ds + (size_t)i * t.keys - t.first;
                exp_visible(pi, t, visible_keys(mask, b, t.i + i), scale, lse[(size_t)task * T + t.i + i]);
                for (int j = t.first; j < t.first + t.keys; j++) dsi[j] = pi[j] * (dsi[j] - Di[t.i + i]) * scale;
            }
            gemm(0, 0, t.n, HS, t.keys, ds, t.keys, k, W, 0, dq, W);
            gemm(1, 0, t.keys, HS, t.n, ds, t.keys, q, W, 1, dk + (size_t)t.first * HS, HS);
            gemm(1, 0, t.keys, HS, t.n, p, t.keys, d, O, 1, dv + (size_t)t.first * HS, HS);
        }
    }
    PARALLEL_FOR
    for (int i = 0; i < B * T; i++) {
        float *di = row(dqkv, i, W);
        memset(di + O, 0, (size_t)(2 * KVH * HS) * sizeof(float));
        for (int h = 0; h < NH; h++) {
            const float *dk = dkv + 2 * ((size_t)(i / T) * NH + h) * head + (size_t)(i % T) * HS, *dv = dk + head;
            float *to = di + (NH + h * KVH / NH) * HS;
            for (int c = 0; c < HS; c++) to[c] += dk[c];
            for (int c = 0; c < HS; c++) to[KVH * HS + c] += dv[c];
        }
        rotate(di, NH + KVH, mask, rotary_position(mask, i), -1);
    }
}

/* out (B,NH HS)  cache (B,T,2 KVH HS)  qkv (B,(NH + 2 KVH) HS)  lengths (B). A task is one group of query heads. */
static void cpu_attention_decode(slam_ops *ops, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths,
                                 const slam_mask *mask) {
    const int B = mask->B, T = mask->T, NH = mask->NH, KVH = mask->KVH, HS = mask->HS, heads = NH / KVH;
    const int W = (NH + 2 * KVH) * HS, O = NH * HS, KV = 2 * KVH * HS;
    const float scale = 1 / sqrtf((float)HS);
    float *scratch = cpu_scratch(ops, (size_t)omp_get_max_threads() * heads * T);
    for (int b = 0; b < B; b++) {
        rotate(row(qkv, b, W), NH + KVH, mask, lengths[b], 1);
        memcpy(row(cache, b * T + lengths[b], KV), row(qkv, b, W) + O, (size_t)KV * sizeof(float));
    }
    PARALLEL_FOR
    for (int task = 0; task < B * KVH; task++) {
        const int b = task / KVH, g = task % KVH, n = lengths[b] + 1;
        const float *q = row(qkv, b, W) + g * heads * HS, *k = row(cache, b * T, KV) + g * HS, *v = k + KVH * HS;
        float *s = scratch + (size_t)omp_get_thread_num() * heads * T; // (heads,n)
        gemm(0, 1, heads, n, HS, q, HS, k, KV, 0, s, n);
        for (int h = 0; h < heads; h++) {
            float *sh = s + (size_t)h * n;
            const float sum = row_exp(sh, scale, row_max(sh, n) * scale, n);
            for (int j = 0; j < n; j++) sh[j] /= sum;
        }
        gemm(0, 0, heads, HS, n, s, n, v, KV, 0, row(out, b, O) + g * heads * HS, HS);
    }
}

/* cache (slots,capacity,2 KVH HS)  qkv (B,T,(NH + 2 KVH) HS)  slots, lengths (B) */
static void cpu_attention_fill(slam_ops *ops, slam_act *cache, const slam_act *qkv, const int *slots,
                               const int *lengths, int capacity, const slam_mask *mask) {
    const int T = mask->T, O = mask->NH * mask->HS, KV = 2 * mask->KVH * mask->HS;
    PARALLEL_FOR
    for (int i = 0; i < mask->B * T; i++) {
        const int b = i / T, t = i % T;
        if (t < lengths[b])
            memcpy(row(cache, slots[b] * capacity + t, KV), row(qkv, i, O + KV) + O, (size_t)KV * sizeof(float));
    }
}

/* ---- SwiGLU ---- */

/* h (N,F)  gate_up (N,2F) */
static void cpu_swiglu_forward(slam_ops *ops, slam_act *h, const slam_act *gate_up, int N, int F) {
    PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *g = row(gate_up, i, 2 * F), *u = g + F;
        float *hi = row(h, i, F);
        VECTORISE
        for (int c = 0; c < F; c++) hi[c] = g[c] / (1 + exp_float(-g[c])) * u[c];
    }
}

/* dgate_up, gate_up (N,2F)  dh (N,F) */
static void cpu_swiglu_backward(slam_ops *ops, slam_act *dgate_up, const slam_act *dh, const slam_act *gate_up, int N,
                                int F) {
    PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *g = row(gate_up, i, 2 * F), *u = g + F, *dhi = row(dh, i, F);
        float *dg = row(dgate_up, i, 2 * F), *du = dg + F;
        VECTORISE
        for (int c = 0; c < F; c++) {
            const float gc = g[c], uc = u[c], sigmoid = 1 / (1 + exp_float(-gc));
            dg[c] = dhi[c] * uc * sigmoid * (1 + gc * (1 - sigmoid));
            du[c] = dhi[c] * gc * sigmoid;
        }
    }
}

/* ---- cross-entropy ---- */

/* loss, targets (N)  logits (N,stride) */
static void cpu_crossentropy(slam_ops *ops, float *loss, slam_act *logits, const int *targets, const slam_xent *x) {
    const int V = x->V, gradient = x->scale != 0;
    PARALLEL_FOR
    for (int i = 0; i < x->N; i++) {
        float *z = row(logits, i, x->stride);
        loss[i] = 0;
        if (gradient) memset(z + V, 0, (size_t)(x->stride - V) * sizeof(float));
        if (targets[i] < 0) {
            if (gradient) memset(z, 0, (size_t)V * sizeof(float));
            continue;
        }
        const float max = row_max(z, V), z_target = z[targets[i]];
        const float sum = gradient ? row_exp(z, 1, max, V) : row_exp_sum(z, max, V); // row_exp: z = exp(z - max)
        loss[i] = logf(sum) - (z_target - max);
        if (!gradient) continue;
        const float weight = x->weights ? x->scale * x->weights[i] : x->scale;
        for (int v = 0; v < V; v++) z[v] *= weight / sum;
        z[targets[i]] -= weight;
    }
}

/* ---- sums ---- */

/* x (n) is summed in SUM_PARTS parts, each in double; the parts are added in order. */
enum { SUM_PARTS = 256 };
static void sum_parts(double *out, const float *x, size_t n, double (*sum)(const float *, size_t)) {
    const size_t m = n / SUM_PARTS;
    double part[SUM_PARTS];
    PARALLEL_FOR
    for (int k = 0; k < SUM_PARTS; k++) part[k] = sum(x + m * k, k + 1 < SUM_PARTS ? m : n - m * k);
    for (int k = 0; k < SUM_PARTS; k++) *out += part[k];
}

static void cpu_sum(slam_ops *ops, double *out, const float *x, size_t n) { sum_parts(out, x, n, part_sum); }
static void cpu_sum_squares(slam_ops *ops, double *out, const float *x, size_t n) {
    sum_parts(out, x, n, part_squares);
}

/* ---- AdamW ---- */

/* w_act, w, m, v, g (n)  stats (2) */
static void cpu_adamw(slam_ops *ops, slam_act *w_act, float *w, float *m, float *v, const float *g, const double *stats,
                      const slam_adamw_params *h, size_t n) {
    if (!isfinite(stats[0]) || !isfinite(stats[1])) return;
    const double clip = h->clip > 0 ? h->clip / (sqrt(stats[1]) + 1e-6) : 1;
    const float scale = clip < 1 ? (float)clip : 1, decay = (float)(1 - h->lr * h->weight_decay), eps = (float)h->eps;
    const float beta2 = (float)h->beta2, rest1 = (float)(1 - h->beta1), rest2 = (float)(1 - h->beta2);
    const float step_size = (float)(h->lr / (1 - pow(h->beta1, (double)h->step)));
    const float root = (float)sqrt(1 - pow(h->beta2, (double)h->step));
    PARALLEL_FOR
    for (size_t i = 0; i < n; i++) {
        const float gi = g[i] * scale;
        m[i] += rest1 * (gi - m[i]);
        v[i] = beta2 * v[i] + rest2 * gi * gi;
        w[i] = w[i] * decay - step_size * m[i] / (sqrtf(v[i]) / root + eps);
    }
    if ((void *)w_act != (void *)w) cpu_to_act(ops, w_act, w, n);
}

/* ---- convolution ---- */

/* x Phi(x), Phi(-z) = exp(-z^2/2) P(t) with t = 1 / (1 + 0.26 z), z = |x|. P is fitted to the scaled erfc within 2e-8:
   the relative error stays below 5e-6 down to x = -12. */
static inline float gelu_float(float x) {
    const float z = fabsf(x), t = 1 / (1 + 0.26f * z);
    float p = 0.0308966339f;
    p = p * t - 0.154742836f;
    p = p * t + 0.255471989f;
    p = p * t - 0.155542006f;
    p = p * t + 0.164156649f;
    p = p * t + 0.0496407005f;
    p = p * t + 0.103391797f;
    p = p * t + 0.102964868f;
    p = p * t + 0.103762195f;
    const float below = exp_float(-0.5f * z * z) * p * t; // Phi(-|x|)
    return x * choose(x < 0, below, 1 - below);
}

static void row_gelu(float *y, const float *x, size_t n) {
    VECTORISE
    for (size_t i = 0; i < n; i++) y[i] = gelu_float(x[i]);
}

/* out (B,TO,G OC)  x (B,T,G C)  w (G OC,K,C)  b (G OC) or NULL. The K frames that an output frame reads are K C
   neighbouring numbers, and the next output frame reads those stride C further: a matrix product whose left side is x
   with overlapping rows. With dilation d, output frames r, r + d, ... read every d-th frame: a product for each r. What
   a product reads is copied only if it is not in x as it is. */
enum { CONV_FRAMES = 768 }; // output frames per task: output and weights of a task stay in the L2 cache
static void cpu_conv1d(slam_ops *ops, slam_act *out_, const slam_act *x_, const slam_act *w_, const slam_act *b_,
                       const slam_conv *conv) {
    const slam_conv c = *conv;
    const int frames = min_int(CONV_FRAMES, c.TO / ops->threads + 1), parts = (c.TO + frames - 1) / frames;
    const int ldx = c.G * c.C, ldo = c.G * c.OC, d = c.dilation;
    const int taps = GEMM_IS_OURS ? c.K : c.stride; // per product: rows may not overlap in BLAS
    const size_t copy_n = ((size_t)frames * c.stride + c.K) * c.C;
    float *copies = cpu_scratch(ops, ops->threads * copy_n);
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int task = 0; task < c.B * c.G * parts; task++) {
        const int first = task % parts * frames, g = task / parts % c.G, i = task / parts / c.G;
        const int n = min_int(frames, c.TO - first);
        float *out = row(out_, i * c.TO + first, ldo) + g * c.OC, *copy = copies + omp_get_thread_num() * copy_n;
        const float *w = row(w_, g * c.OC, c.K * c.C), *bias = row(b_, g, c.OC);
        const float *scale = row(c.scale, g, c.C), *shift = row(c.shift, g, c.C);
        const int T = c.lengths ? c.lengths[i] : c.T;
        for (int t = 0; bias && t < n; t++) {
            float *to = out + (size_t)t * ldo;
            VECTORISE
            for (int o = 0; o < c.OC; o++) to[o] = c.output == SLAM_ADD ? to[o] + bias[o] : bias[o];
        }
        for (int r = 0; r < min_int(d, n); r++) { // m output frames from `count` input frames: at, at + d, ...
            const int m = (n - r + d - 1) / d, at = (first + r) * c.stride - c.before, count = (m - 1) * c.stride + c.K;
            const float *x = row(x_, i * c.T + at, ldx) + g * c.C;
            if (ldx > c.C || d > 1 || c.slope != 1 || scale || at < 0 || at + count > T) {
                const int last = T > at ? min_int(count, (T - at + d - 1) / d) : 0; // those from u on are inside
                int u = at < 0 ? min_int(last, (d - 1 - at) / d) : 0;
                const int run = ldx == c.C && d == 1 && !scale ? last - u : 1;
                memset(copy, 0, (size_t)u * c.C * sizeof *copy);
                memset(copy + last * c.C, 0, (size_t)(count - last) * c.C * sizeof *copy);
                for (; u < last; u += run) {
                    const float *from = x + (ptrdiff_t)u * d * ldx;
                    float *to = copy + u * c.C;
                    VECTORISE
                    for (int k = 0; k < run * c.C; k++) {
                        const float y = scale ? from[k] * scale[k] + shift[k] : from[k];
                        to[k] = choose(y > 0, y, c.slope * y);
                    }
                }
                x = copy;
            }
            for (int k = 0; k < c.K; k += taps)
                gemm(0, 1, m, c.OC, min_int(taps, c.K - k) * c.C, x + k * c.C, (size_t)c.stride * c.C, w + k * c.C,
                     (size_t)c.K * c.C, bias || c.output == SLAM_ADD || k ? 1 : 0, out + r * ldo, (size_t)d * ldo);
        }
        for (int t = 0; c.output == SLAM_GELU && t < n; t++)
            row_gelu(out + (size_t)t * ldo, out + (size_t)t * ldo, c.OC);
        for (int t = 0; c.output == SLAM_RELU && t < n; t++)
            for (float *y = out + (size_t)t * ldo, *end = y + c.OC; y < end; y++) *y = choose(*y < 0, 0, *y);
    }
}

/* ---- GELU, layer norm, channel norm ---- */

/* y, x (n) */
static void cpu_gelu_forward(slam_ops *ops, slam_act *y, const slam_act *x, size_t n) {
    SLAM_PRAGMA(omp parallel for simd schedule(static))
    for (size_t i = 0; i < n; i++) ((float *)y)[i] = gelu_float(((const float *)x)[i]);
}

/* s, y, x, delta (N,C)  w, b (C) */
static void cpu_layernorm(slam_ops *ops, slam_act *s_, slam_act *y_, const slam_act *x_, const slam_act *delta_,
                          const slam_act *w_, const slam_act *b_, float eps, int gelu, int N, int C) {
    const float *w = (const float *)w_, *b = (const float *)b_;
    PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        float *y = row(y_, i, C);
        const float *s = row_add(s_ ? row(s_, i, C) : y, row(x_, i, C), row(delta_, i, C), C);
        if (!y) continue;
        const float mean = row_sum(s, C) / (float)C, r = 1 / sqrtf(row_squares_about(s, mean, C) / (float)C + eps);
        VECTORISE
        for (int c = 0; c < C; c++) y[c] = w[c] * ((s[c] - mean) * r) + b[c];
        if (gelu) row_gelu(y, y, C);
    }
}

/* x (B,T,C)  w, b (C)  lengths (B). A block of n frames, in the cache, gets its sum and its sum of squared deviations
   from its own mean, in float: sums (B,blocks,2,C). Then, in double: length variance = sum over blocks of squares + n
   (sum / n - mean)^2. */
enum { NORM_FRAMES = 128 };
static void cpu_channelnorm(slam_ops *ops, slam_act *x_, const slam_act *w_, const slam_act *b_, const int *lengths,
                            float eps, int B, int T, int C) {
    const float *w = (const float *)w_, *bias = (const float *)b_;
    const int blocks = (T + NORM_FRAMES - 1) / NORM_FRAMES;
    float *sums = cpu_scratch(ops, (size_t)B * (blocks + 1) * 2 * C), *statistics = sums + (size_t)B * blocks * 2 * C;
    PARALLEL_FOR
    for (int i = 0; i < B * blocks; i++) {
        const int b = i / blocks, first = i % blocks * NORM_FRAMES, n = min_int(NORM_FRAMES, lengths[b] - first);
        const float *x = row(x_, b * T + first, C);
        float *sum = sums + (size_t)i * 2 * C, *squares = sum + C;
        memset(sum, 0, 2 * (size_t)C * sizeof(float));
        for (int t = 0; t < n; t++)
            for (int c = 0; c < C; c++) sum[c] += x[(size_t)t * C + c];
        for (int t = 0; t < n; t++)
            for (int c = 0; c < C; c++) {
                const float d = x[(size_t)t * C + c] - sum[c] / (float)n;
                squares[c] += d * d;
            }
    }
    PARALLEL_FOR
    for (int i = 0; i < B * C; i++) {
        const int b = i / C, c = i % C;
        const float *sum = sums + (size_t)b * blocks * 2 * C + c;
        double mean = 0, squares = 0;
        for (int k = 0; k < blocks; k++) mean += sum[(size_t)k * 2 * C] / (double)lengths[b];
        for (int first = 0, k = 0; first < lengths[b]; first += NORM_FRAMES, k++) {
            const double n = min_int(NORM_FRAMES, lengths[b] - first), d = sum[(size_t)k * 2 * C] / n - mean;
            squares += sum[(size_t)k * 2 * C + C] + n * d * d;
        }
        statistics[(size_t)b * 2 * C + c] = (float)mean;
        statistics[(size_t)b * 2 * C + C + c] = (float)(1 / sqrt(squares / lengths[b] + eps));
    }
    PARALLEL_FOR
    for (int i = 0; i < B * T; i++) {
        const float *mean = statistics + (size_t)(i / T) * 2 * C, *r = mean + C;
        float *x = row(x_, i, C);
        if (i % T >= lengths[i / T]) memset(x, 0, (size_t)C * sizeof(float));
        else
            for (int c = 0; c < C; c++) x[c] = gelu_float(w[c] * ((x[c] - mean[c]) * r[c]) + bias[c]);
    }
}

/* ---- nearest centroid ---- */

/* nearest (N)  scores (N,K)  x (N,D)  centroids (K,D)  squares (K) */
static void cpu_nearest(slam_ops *ops, int *nearest, float *scores, const slam_act *x, const slam_act *centroids,
                        const float *squares, int N, int D, int K) {
    gemm_parallel(ops->threads, 0, 1, N, K, D, row(x, 0, D), D, row(centroids, 0, D), D, 0, scores, K);
    PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *dots = scores + (size_t)i * K;
        float least = HUGE_VALF;
        nearest[i] = 0;
        for (int k = 0; k < K; k++) {
            const float distance = squares[k] - 2 * dots[k];
            if (distance < least) least = distance, nearest[i] = k;
        }
    }
}

/* ---- the backend ---- */

slam_ops *slam_cpu(int threads) {
    cpu_ops *cpu = NEW(cpu_ops, 1);
    slam_ops *ops = &cpu->ops;
    if (threads > 0) omp_set_num_threads(threads);
    threads = omp_get_max_threads();
#if defined SLAM_BLAS && defined OPENBLAS_VERSION
    openblas_set_num_threads(1);  // gemm_parallel makes the threads
    omp_set_num_threads(threads); // OpenBLAS with OpenMP has changed them, too
#endif
    snprintf(cpu->name, sizeof cpu->name, "cpu, %d thread%s", threads, threads == 1 ? "" : "s");
    ops->name = cpu->name;
    ops->act_bytes = sizeof(float);
    ops->threads = threads;
    ops->memory = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    ops->batch_invariant = GEMM_IS_OURS;
    ops->upload = ops->copy = cpu_copy;
    ops->download = cpu_copy;
#define CPU_OP(name) ops->name = cpu_##name
    CPU_OP(alloc), CPU_OP(release), CPU_OP(zero), CPU_OP(finish), CPU_OP(close), CPU_OP(to_act), CPU_OP(to_float);
    CPU_OP(embedding_forward), CPU_OP(embedding_backward), CPU_OP(rmsnorm_forward), CPU_OP(rmsnorm_backward);
    CPU_OP(matmul_forward), CPU_OP(matmul_backward_input), CPU_OP(matmul_backward_weight);
    CPU_OP(attention_forward), CPU_OP(attention_backward), CPU_OP(attention_decode), CPU_OP(attention_fill);
    CPU_OP(swiglu_forward), CPU_OP(swiglu_backward), CPU_OP(crossentropy), CPU_OP(sum), CPU_OP(sum_squares);
    CPU_OP(adamw), CPU_OP(conv1d), CPU_OP(gelu_forward), CPU_OP(layernorm), CPU_OP(channelnorm);
    CPU_OP(nearest);
    return ops;
}

void slam_ops_free(slam_ops *ops) {
    if (ops) ops->close(ops);
}
#pragma GCC diagnostic pop

/* ==========================================================================================
   SECTION 5. OPS ON CUDA      the same operations as kernels
   A kernel's comment says how threads map to data and what bounds it, bytes or arithmetic. T is the type of
   activations, float or bf16, P the neighbours that one access moves: 16 bytes where rows and pointers allow it, else 1
   number. All work is in one stream. Sums have a fixed order and there are no atomics: every run gives the same bits.

   nvcc compiles this section, or a C++17 compiler with -DSLAM_EMULATOR -include test/cuda_emulator.h, for the CPU.
   ========================================================================================== */
#if !defined(__CUDACC__) && !defined(SLAM_EMULATOR)
slam_ops *slam_cuda(int device, int act_bytes) {
    (void)act_bytes;
    set_error("cuda:%d: this build has no CUDA: compile slam.cu with nvcc and link cuBLASLt", device);
    return NULL;
}
int slam_cuda_count(void) { return 0; }
#else

#define DEVICE      static __device__ __forceinline__
#define KERNEL(...) static __global__ void __launch_bounds__(__VA_ARGS__)

/* ---- what the emulator defines in plain C++: launches, shared memory and PTX ---- */

#ifndef SLAM_EMULATOR
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <utility>
/* A kernel with several template arguments goes in parentheses. */
#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                    \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

/* PTX of compute capability 8.0. nvcc without -arch compiles for less; slam_cuda() fails in such a build. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PTX(statement)
#else
#define PTX(statement) statement
#endif

#define UNROLL _Pragma("unroll") // for a loop that nvcc finds too long, whose arrays would then not be registers

/* The dynamic shared memory of the block. */
DEVICE char *shared_memory(void) {
    extern __shared__ __align__(128) char slam_shared[];
    return slam_shared;
}

/* Two floats rounded to bf16, lo in the lower half. */
DEVICE uint32_t pack_bf16(float lo, float hi) {
    uint32_t out = 0;
    PTX(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo)));
    return out;
}

/* 2^x on the special function unit. */
DEVICE float exp2_fast(float x) {
    float y = x;
    PTX(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
    return y;
}

/* Keeps *p, a multiple of 4 bytes, packed: the compiler would keep its numbers as floats, in twice the registers. */
template <typename R> DEVICE void stay_packed(R *p) {
    uint32_t *word = (uint32_t *)p;
    for (int k = 0; k < (int)sizeof *p / 4; k++) asm volatile("" : "+r"(word[k]));
}

/* Product of a warp: C (16,8) += A (16,16) B (16,8) in bf16, sums in float. With g = lane / 4 and t = lane % 4 a lane
   holds, in pairs of neighbours (the first in the lower half of a register):
       a[0]: row g,     columns 2t, 2t+1      a[2]: row g,     columns 2t+8, 2t+9
       a[1]: row g + 8, columns 2t, 2t+1      a[3]: row g + 8, columns 2t+8, 2t+9
       b0:   rows 2t, 2t+1, column g          b1:   rows 2t+8, 2t+9, column g
       c[0], c[1]: row g, columns 2t, 2t+1    c[2], c[3]: row g + 8, columns 2t, 2t+1 */
DEVICE void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    PTX(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

/* Four 8x8 matrices of bf16 from shared memory. Lane l passes the address of row l % 8 of matrix l / 8 (16 bytes,
   aligned); r[m] receives row lane / 4, columns 2 (lane % 4) and the next, of matrix m, or of its transpose. */
#define LDMATRIX(trans)                                                                                                \
    PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];"                          \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                  \
                     : "r"((uint32_t)__cvta_generic_to_shared(row))                                                    \
                     : "memory"))
template <int TRANSPOSED> DEVICE void ldmatrix(uint32_t r[4], const void *row) {
    if constexpr (TRANSPOSED) LDMATRIX(".trans");
    else LDMATRIX("");
}

/* Starts a copy of 16 bytes from global to shared memory (cp.async), of zeros if not `valid`; copy_async_wait waits for
   this thread's. Other threads see them after a barrier. */
DEVICE void copy_async(void *shared, const void *global, int valid) {
    PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                     "l"(global), "r"(valid ? 16 : 0)
                     : "memory"));
}
DEVICE void copy_async_wait(void) { PTX(asm volatile("cp.async.wait_all;" ::: "memory")); }
#endif

typedef __nv_bfloat16 bf16;

/* ---- the device ---- */

enum {
    CUDA_WORKSPACE = 64 << 20,    // bytes: partial sums, or the workspace of a product and unfolded frames behind it
    PRODUCT_WORKSPACE = 32 << 20, // what cuBLASLt recommends on Hopper
    PROPOSED = 32                 // algorithms of a product that are measured at most
};

typedef struct cuda_ops {
    slam_ops ops; // first: a slam_ops * of this backend is also a cuda_ops *
    char name[320];
    int device, processors; // its number, its multiprocessors
    cudaStream_t stream, comm;
    cudaEvent_t order;        // of the two streams
    char *workspace;          // CUDA_WORKSPACE bytes, free again when an op's last kernel is queued
    const char *failed, *why; // the first op that failed since the last finish; NULL: none
    int late;                 // the failure may be an earlier kernel's
    cublasLtHandle_t lt;
    slam_products products;
} cuda_ops;

/* Records the first failure, which finish reports. */
static void cuda_fail(slam_ops *ops, const char *operation, const char *why, int late) {
    cuda_ops *cuda = (cuda_ops *)ops;
    if (cuda->failed) return;
    cuda->failed = operation;
    cuda->why = why;
    cuda->late = late;
}

static int cuda_check(slam_ops *ops, cudaError_t error, const char *operation) {
    const int late = error != cudaErrorInvalidConfiguration && error != cudaErrorInvalidValue;
    if (error != cudaSuccess) cuda_fail(ops, operation, cudaGetErrorString(error), late);
    return error == cudaSuccess;
}

/* Launches a kernel and checks the launch, which also returns the errors of kernels before it. */
#define LAUNCH_FOR(operation, ops, kernel, grid, block, shared_bytes, ...)                                             \
    (CUDA_LAUNCH(kernel, grid, block, shared_bytes, ((cuda_ops *)(ops))->stream, __VA_ARGS__),                         \
     cuda_check(ops, cudaGetLastError(), operation))
#define LAUNCH(...) LAUNCH_FOR(__func__, __VA_ARGS__)

/* The numbers of T in 16 bytes. */
template <typename T> constexpr int WIDE = 16 / sizeof(T);

/* Executes a statement with P, the numbers of one access, and TEAM. WITH_P: 16 bytes of T where `wide`, else 1. */
#define WITH(P_, TEAM_, ...)                                                                                           \
    {                                                                                                                  \
        [[maybe_unused]] constexpr int P = P_, TEAM = TEAM_;                                                           \
        __VA_ARGS__;                                                                                                   \
    }
#define WITH_P(wide, ...)                                                                                              \
    if (wide) WITH(WIDE<T>, 0, __VA_ARGS__)                                                                            \
    else WITH(1, 0, __VA_ARGS__)

/* Blocks of a grid that has `each` of n items in a block. */
static unsigned blocks(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

/* Are all of these aligned to 16 bytes? */
template <typename... R> static int aligned16(const R *...p) { return (((uintptr_t)p | ...) & 15) == 0; }

/* ---- memory ---- */

/* Selects the device for the calling thread. */
static cuda_ops *cuda_of(slam_ops *ops) {
    cuda_ops *cuda = (cuda_ops *)ops;
    cuda_check(ops, cudaSetDevice(cuda->device), "cudaSetDevice");
    return cuda;
}

static void cuda_zero(slam_ops *ops, void *p, size_t bytes) {
    if (bytes) cuda_check(ops, cudaMemsetAsync(p, 0, bytes, cuda_of(ops)->stream), "zero");
}

static void *cuda_alloc(slam_ops *ops, size_t bytes) {
    cuda_ops *cuda = cuda_of(ops);
    void *p = NULL;
    size_t available = 0, total = 0;
    const cudaError_t error = cudaMalloc(&p, bytes ? bytes : 1);
    if (error == cudaSuccess) {
        cuda_zero(ops, p, bytes);
        return p;
    }
    cudaGetLastError(); // or the next launch would return it
    cudaMemGetInfo(&available, &total);
    set_error("%s: cannot allocate %.2f GB, %.2f of %.2f GB are free: %s: %s", cuda->name, (double)bytes / 1e9,
              (double)available / 1e9, (double)total / 1e9, cudaGetErrorString(error),
              error == cudaErrorMemoryAllocation
                  ? "reduce --micro-batch (eval: --batch) or --context, or use --recompute"
                  : "an operation before it failed (CUDA_LAUNCH_BLOCKING=1 in the environment shows which)");
    return NULL;
}

static void cuda_release(slam_ops *ops, void *p) {
    if (!p) return;
    cuda_check(ops, cudaStreamSynchronize(cuda_of(ops)->stream), "release"); // kernels may still use it
    cuda_check(ops, cudaFree(p), "release");
}

static void cuda_upload(slam_ops *ops, void *to, const void *host, size_t bytes) {
    const cudaStream_t stream = cuda_of(ops)->stream;
    cuda_check(ops, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream), "upload");
    cuda_check(ops, cudaStreamSynchronize(stream), "upload"); // `host` may be reused now
}

static void cuda_copy(slam_ops *ops, void *to, const void *from, size_t bytes) {
    cuda_check(ops, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_of(ops)->stream), "copy");
}

/* After a failure `host` holds zeros. */
static void cuda_download(slam_ops *ops, void *host, const void *from, size_t bytes) {
    const cudaStream_t stream = cuda_of(ops)->stream;
    if (!bytes) return;
    const int ok = cuda_check(ops, cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream), "download");
    if (!cuda_check(ops, cudaStreamSynchronize(stream), "download") || !ok) memset(host, 0, bytes);
}

static int cuda_finish(slam_ops *ops) {
    cuda_ops *cuda = cuda_of(ops);
    size_t available = 0, total = 0;
    cuda_check(ops, cudaStreamSynchronize(cuda->stream), "finish");
    cudaGetLastError();
    if (!cuda->failed) return 1;
    cudaMemGetInfo(&available, &total);
    set_error("%s: %s%s failed: %s (%.2f GB of memory are free)", cuda->name, cuda->failed,
              cuda->late && !getenv("CUDA_LAUNCH_BLOCKING")
                  ? " or an operation before it (CUDA_LAUNCH_BLOCKING=1 in the environment shows which)"
                  : "",
              cuda->why, (double)available / 1e9);
    cuda->failed = NULL;
    return 0;
}

/* ---- the communication stream ---- */

/* Work that is queued in `waiting` from now on starts after all that is in `before`. */
static void stream_wait(slam_ops *ops, cudaStream_t waiting, cudaStream_t before) {
    cuda_check(ops, cudaEventRecord(cuda_of(ops)->order, before), "cudaEventRecord");
    cuda_check(ops, cudaStreamWaitEvent(waiting, ((cuda_ops *)ops)->order, 0), "cudaStreamWaitEvent");
}

static void cuda_comm_begin(slam_ops *ops) { stream_wait(ops, ((cuda_ops *)ops)->comm, ((cuda_ops *)ops)->stream); }
static void cuda_comm_end(slam_ops *ops) { stream_wait(ops, ((cuda_ops *)ops)->stream, ((cuda_ops *)ops)->comm); }

static int cuda_comm_done(slam_ops *ops) {
    const int done = cudaStreamQuery(cuda_of(ops)->comm) != cudaErrorNotReady;
    if (!done) cudaGetLastError();
    return done;
}

/* Also closes a device that was opened only in part. */
static void cuda_close(slam_ops *ops) {
    cuda_ops *cuda = cuda_of(ops);
    if (cuda->stream) cudaStreamSynchronize(cuda->stream);
    if (cuda->comm) cudaStreamSynchronize(cuda->comm);
    if (cuda->lt) cublasLtDestroy(cuda->lt);
    cudaFree(cuda->workspace);
    if (cuda->order) cudaEventDestroy(cuda->order);
    if (cuda->comm) cudaStreamDestroy(cuda->comm);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    free(cuda);
}

/* ---- what kernels are made of ---- */

/* P neighbouring numbers, loaded and stored at most 16 bytes at a time. */
template <typename T, int P> struct alignas(P * sizeof(T) < 16 ? P * sizeof(T) : 16) packet { T at[P]; };

template <int P, typename T> DEVICE packet<T, P> &packed(T *p) { return *(packet<T, P> *)p; }
template <int P, typename T> DEVICE const packet<T, P> &packed(const T *p) { return *(const packet<T, P> *)p; }

/* P neighbours as floats. */
template <int P, typename T> DEVICE void load(float (&x)[P], const T *from) {
    const packet<T, P> p = packed<P>(from);
    for (int k = 0; k < P; k++) x[k] = (float)p.at[k];
}
template <int P, typename T> DEVICE void store(T *to, const float (&x)[P]) {
    packet<T, P> p;
    for (int k = 0; k < P; k++) p.at[k] = (T)x[k];
    packed<P>(to) = p;
}

/* out_k += x_k */
template <int P> DEVICE void add_floats(float *out, const float (&x)[P]) {
    float sum[P];
    load(sum, out);
    for (int k = 0; k < P; k++) sum[k] += x[k];
    store(out, sum);
}

/* Sum over groups of LANES lanes of a warp, always in the same order; every lane gets it. */
template <int LANES = 32, typename R> DEVICE R warp_sum(R x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

DEVICE float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

/* Combines x of all warps, in order, with barriers on both sides. `shared`: a number for each warp. */
template <typename R, typename F> DEVICE R block_combine(R x, R *shared, const F &combine) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) x = combine(x, shared[warp]);
    __syncthreads();
    return x;
}
template <typename R> DEVICE R block_sum(R x, R *shared) {
    return block_combine(warp_sum(x), shared, [](R a, R b) { return a + b; });
}
DEVICE float block_max(float x, float *shared) {
    return block_combine(warp_max(x), shared, [](float a, float b) { return fmaxf(a, b); });
}

/* exp and the logistic function: accurate for float, fast for bf16. */
template <typename T> DEVICE float exp_of(float x) { return sizeof(T) == 2 ? __expf(x) : expf(x); }
template <typename T> DEVICE float sigmoid_of(float x) {
    return sizeof(T) == 2 ? __fdividef(1.0f, 1 + __expf(-x)) : 1 / (1 + expf(-x));
}
DEVICE float gelu_of(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

/* Second half of sums over rows: out (n) += sum of the rows of partial (parts,n). A block has 32 columns, of which a
   warp adds every 32nd row; then the 32 sums of a column are added in order. Bound by latency: partial is in L2. */
KERNEL(1024) add_partial_kernel(float *out, const float *partial, int parts, int n) {
    float *sums = (float *)shared_memory(), sum = 0; // (32,32)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    if (c < n)
        for (int k = warp; k < parts; k += 32) sum += partial[(size_t)k * n + c];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || c >= n) return;
    sum = 0;
    for (int k = 0; k < 32; k++) sum += sums[k * 32 + lane];
    out[c] += sum;
}

/* partial is in the workspace. */
static void add_partial(slam_ops *ops, const char *operation, float *out, int parts, int n) {
    const float *partial = (const float *)((cuda_ops *)ops)->workspace;
    LAUNCH_FOR(operation, ops, add_partial_kernel, blocks(n, 32), 1024, 1024 * sizeof(float), out, partial, parts, n);
}

/* ---- element-wise kernels ----
   An op is a struct with its arguments and a function run<P>(row, column), which computes P neighbours. All are bound
   by memory; a comment says how many bytes. */

template <int P, typename Op> KERNEL(256) each_kernel(Op op, unsigned packs, unsigned n) {
    const unsigned i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) op.template run<P>(i / packs, (size_t)(i % packs) * P);
}

/* Runs op for all rows and columns, a thread for P neighbours if all arrays allow it, else for one. */
template <int P, typename Op, typename... R>
static void each(slam_ops *ops, const char *operation, size_t rows, size_t columns, const Op &op, const R *...arrays) {
    const int wide = columns % P == 0 && aligned16(arrays...);
    const size_t packs = wide ? columns / P : columns, n = rows * packs;
    if (n == 0) return;
    if (n > UINT_MAX - 255) cuda_fail(ops, operation, "more than 4294967040 elements", 0);
    else if (wide) LAUNCH_FOR(operation, ops, (each_kernel<P, Op>), blocks(n, 256), 256, 0, op, packs, n);
    else LAUNCH_FOR(operation, ops, (each_kernel<1, Op>), blocks(n, 256), 256, 0, op, packs, n);
}

/* n (sizeof(To) + sizeof(From)) bytes */
template <typename To, typename From> struct convert_op {
    To *out;
    const From *in;
    template <int P> __device__ void run(unsigned, size_t i) const {
        float x[P];
        load(x, in + i);
        store(out + i, x);
    }
};

/* With float activations both may be the same array. */
template <typename T> static void cuda_to_act(slam_ops *ops, slam_act *out, const float *in, size_t n) {
    if ((void *)out != (void *)in) each<4>(ops, __func__, 1, n, convert_op<T, float>{(T *)out, in}, out, in);
}

template <typename T> static void cuda_to_float(slam_ops *ops, float *out, const slam_act *in, size_t n) {
    if ((void *)out != (void *)in) each<4>(ops, __func__, 1, n, convert_op<float, T>{out, (const T *)in}, out, in);
}

/* GELU or ReLU: 2 n sizeof(T) bytes */
template <typename T> struct activation_op {
    T *y;
    const T *x;
    int relu;
    template <int P> __device__ void run(unsigned, size_t i) const {
        float a[P];
        load(a, x + i);
        for (int k = 0; k < P; k++) a[k] = !relu ? gelu_of(a[k]) : a[k] < 0 ? 0 : a[k];
        store(y + i, a);
    }
};

template <typename T> static void cuda_gelu_forward(slam_ops *ops, slam_act *y, const slam_act *x, size_t n) {
    each<WIDE<T>>(ops, __func__, 1, n, activation_op<T>{(T *)y, (const T *)x, 0}, y, x);
}

/* 3 N F sizeof(T) bytes */
template <typename T> struct swiglu_forward_op {
    T *h;
    const T *gate_up;
    int F;
    template <int P> __device__ void run(unsigned i, size_t c) const {
        float g[P], u[P];
        load(g, gate_up + (size_t)i * 2 * F + c);
        load(u, gate_up + (size_t)i * 2 * F + F + c);
        for (int k = 0; k < P; k++) u[k] *= g[k] * sigmoid_of<T>(g[k]);
        store(h + (size_t)i * F + c, u);
    }
};

template <typename T>
static void cuda_swiglu_forward(slam_ops *ops, slam_act *h, const slam_act *gate_up, int N, int F) {
    each<WIDE<T>>(ops, __func__, N, F, swiglu_forward_op<T>{(T *)h, (const T *)gate_up, F}, h, gate_up);
}

/* 5 N F sizeof(T) bytes. A thread reads its g and u before it overwrites them. */
template <typename T> struct swiglu_backward_op {
    T *dgate_up;
    const T *dh, *gate_up;
    int F;
    template <int P> __device__ void run(unsigned i, size_t c) const {
        const size_t at = (size_t)i * 2 * F + c;
        float g[P], u[P], d[P];
        load(g, gate_up + at);
        load(u, gate_up + at + F);
        load(d, dh + (size_t)i * F + c);
        for (int k = 0; k < P; k++) {
            const float s = sigmoid_of<T>(g[k]), du = d[k] * g[k] * s;
            g[k] = d[k] * u[k] * s * (1 + g[k] * (1 - s));
            u[k] = du;
        }
        store(dgate_up + at, g);
        store(dgate_up + at + F, u);
    }
};

template <typename T>
static void cuda_swiglu_backward(slam_ops *ops, slam_act *dgate_up, const slam_act *dh, const slam_act *gate_up, int N,
                                 int F) {
    const swiglu_backward_op<T> op = {(T *)dgate_up, (const T *)dh, (const T *)gate_up, F};
    each<WIDE<T>>(ops, __func__, N, F, op, dgate_up, dh, gate_up);
}

/* 28 n + n sizeof(T) bytes: w, m, v and g are read, w, m, v and w_act written */
template <typename T> struct adamw_op {
    T *act; // NULL: none
    float *w, *m, *v;
    const float *g;
    const double *stats;
    float clip, decay, eps, beta2, rest1, rest2, step_size, root;
    template <int P> __device__ void run(unsigned, size_t i) const {
        if (!isfinite(stats[0]) || !isfinite(stats[1])) return;
        const float norm = sqrtf((float)(stats[1] * 0x1p-64)) * 0x1p32f; // a float holds no squared norm above 3e38
        const float scale = clip > 0 ? fminf(1, clip / (norm + 1e-6f)) : 1;
        float wi[P], mi[P], vi[P], gi[P];
        load(wi, w + i), load(mi, m + i), load(vi, v + i), load(gi, g + i);
        for (int k = 0; k < P; k++) {
            const float gk = gi[k] * scale;
            mi[k] += rest1 * (gk - mi[k]);
            vi[k] = beta2 * vi[k] + rest2 * gk * gk;
            wi[k] = wi[k] * decay - step_size * mi[k] / (sqrtf(vi[k]) / root + eps);
        }
        store(w + i, wi), store(m + i, mi), store(v + i, vi);
        if (act) store(act + i, wi);
    }
};

template <typename T>
static void cuda_adamw(slam_ops *ops, slam_act *w_act, float *w, float *m, float *v, const float *g,
                       const double *stats, const slam_adamw_params *h, size_t n) {
    T *act = (void *)w_act == (void *)w ? NULL : (T *)w_act;
    const double step = (double)h->step, step_size = h->lr / (1 - pow(h->beta1, step)),
                 root = sqrt(1 - pow(h->beta2, step));
    const float clip = (float)h->clip, decay = (float)(1 - h->lr * h->weight_decay), eps = (float)h->eps;
    const float beta2 = (float)h->beta2, rest1 = (float)(1 - h->beta1), rest2 = (float)(1 - h->beta2);
    const adamw_op<T> op = {act,        w, m, v, g, stats, clip, decay, eps, beta2, rest1, rest2, (float)step_size,
                            (float)root};
    each<4>(ops, __func__, 1, n, op, act, w, m, v, g);
}

/* ---- embedding ---- */

/* 2 N C sizeof(T) bytes; of a small table they come from L2. */
template <typename T> struct embedding_op {
    T *x;
    const int *tokens;
    const T *table;
    int C;
    template <int P> __device__ void run(unsigned i, size_t c) const {
        packed<P>(x + (size_t)i * C + c) = packed<P>(table + (size_t)tokens[i] * C + c);
    }
};

template <typename T>
static void cuda_embedding_forward(slam_ops *ops, slam_act *x, const int *tokens, const slam_act *table, int N, int C) {
    each<WIDE<T>>(ops, __func__, N, C, embedding_op<T>{(T *)x, tokens, (const T *)table, C}, x, table);
}

/* A warp has `rows` rows of the table and 32 P of their channels, P in each lane. It goes through all tokens, 8 in a
   lane at a time, and adds the rows of dx that belong to its rows, in registers while the token stays the same: each
   sum has one owner and one order. Bound by memory for a small vocabulary: dx once, N C sizeof(T) bytes. */
template <typename T, int P>
KERNEL(256)
embedding_backward_kernel(float *dtable, const T *__restrict__ dx, const int *tokens, int N, int C, int V, int rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = (blockIdx.y * 32 + lane) * P;
    const int first = (blockIdx.x * 8 + warp) * rows, end = min(first + rows, V);
    float sum[P] = {0}, x[P];
    int last = -1; // the token that sum belongs to
    for (int i = 0; i < N; i += 256) {
        int token[8];
        for (int k = 0; k < 8; k++) token[k] = i + 32 * k + lane < N ? tokens[i + 32 * k + lane] : -1;
        UNROLL
        for (int k = 0; k < 8; k++)
            for (unsigned hits = __ballot_sync(0xffffffffu, token[k] >= first && token[k] < end); hits;
                 hits &= hits - 1) {
                const int hit = __ffs(hits) - 1, now = __shfl_sync(0xffffffffu, token[k], hit);
                if (c >= C) continue;
                if (now != last && last >= 0) add_floats(dtable + (size_t)last * C + c, sum);
                load(x, dx + (size_t)(i + 32 * k + hit) * C + c);
                for (int j = 0; j < P; j++) sum[j] = (now == last ? sum[j] : 0) + x[j];
                last = now;
            }
    }
    if (last >= 0) add_floats(dtable + (size_t)last * C + c, sum);
}

template <typename T>
static void cuda_embedding_backward(slam_ops *ops, float *dtable, const slam_act *dx, const int *tokens, int N, int C,
                                    int V) {
    const int rows = (int)blocks(V, 4096);
    WITH_P(C % WIDE<T> == 0 && aligned16(dx, dtable),
           LAUNCH(ops, (embedding_backward_kernel<T, P>), dim3(blocks(V, 8 * rows), blocks(C, 32 * P)), 256, 0, dtable,
                  (const T *)dx, tokens, N, C, V, rows));
}

/* ---- norms ----
   A team of threads has a row in registers, up to ROW_NUMBERS numbers in each, so that it is read once: 8 threads for
   up to 256 numbers (the heads of qkv), a warp for up to 1024, a block of 256 threads for up to 8192. */

enum { ROW_NUMBERS = 32 };

/* Executes a statement with P and TEAM. */
#define WITH_TEAM(wide, C, ...)                                                                                        \
    if (!(wide) && C <= 32 * ROW_NUMBERS) WITH(1, 32, __VA_ARGS__)                                                     \
    else if (!(wide)) WITH(1, 256, __VA_ARGS__)                                                                        \
    else if (C <= 8 * ROW_NUMBERS) WITH(WIDE<T>, 8, __VA_ARGS__)                                                       \
    else if (C <= 32 * ROW_NUMBERS) WITH(WIDE<T>, 32, __VA_ARGS__)                                                     \
    else WITH(WIDE<T>, 256, __VA_ARGS__)

template <int TEAM> DEVICE float team_sum(float x, float *shared) {
    if constexpr (TEAM <= 32) return warp_sum<TEAM>(x);
    else return block_sum(x, shared);
}

/* n rows of C numbers: row i is number i % G of a group, and groups are `stride` apart. */
typedef struct norm_rows {
    int n, G, C, stride;
    __device__ size_t at(int i) const { return (size_t)(i / G) * stride + (size_t)(i % G) * C; }
} norm_rows;

static int norm_fits(slam_ops *ops, int C, const char *operation) {
    if (C > 256 * ROW_NUMBERS) cuda_fail(ops, operation, "rows of more than 8192 channels", 0);
    return C <= 256 * ROW_NUMBERS;
}

/* Residual add, then RMSNorm or, if LAYER, layer norm. Bound by memory: x and delta are read, s and y written, at most
   4 N C sizeof(T) bytes. */
template <typename T, int P, int TEAM, int LAYER>
KERNEL(256, 1)
norm_kernel(T *s, T *y, float *rstd, const T *x, const T *delta, const T *w, const T *bias, float eps, int gelu,
            const norm_rows rows) {
    constexpr int M = ROW_NUMBERS / P, STEP = TEAM * P;
    const int i = blockIdx.x * (256 / TEAM) + threadIdx.x / TEAM, first = threadIdx.x % TEAM * P;
    const int C = i < rows.n ? rows.C : 0; // a team without a row takes part in the sums of its warp
    const size_t row = rows.at(i) + first;
    float *shared = (float *)shared_memory(), sum = 0, mean = 0;
    packet<T, P> a[M], b[M];
    for (int m = 0; m < M; m++)
        if (first + m * STEP < C) a[m] = packed<P>(x + row + m * STEP);
    if (delta) {
        for (int m = 0; m < M; m++)
            if (first + m * STEP < C) b[m] = packed<P>(delta + row + m * STEP);
        for (int m = 0; m < M; m++) {
            if (first + m * STEP >= C) continue;
            for (int k = 0; k < P; k++) a[m].at[k] = (T)((float)a[m].at[k] + (float)b[m].at[k]);
            if (s) packed<P>(s + row + m * STEP) = a[m];
        }
    }
    if (LAYER && !y) return;
    if (LAYER) {
        for (int m = 0; m < M; m++)
            if (first + m * STEP < C)
                for (int k = 0; k < P; k++) sum += (float)a[m].at[k];
        mean = team_sum<TEAM>(sum, shared) / (float)rows.C;
        sum = 0;
    }
    for (int m = 0; m < M; m++)
        if (first + m * STEP < C)
            for (int k = 0; k < P; k++) sum += ((float)a[m].at[k] - mean) * ((float)a[m].at[k] - mean);
    const float r = 1 / sqrtf(team_sum<TEAM>(sum, shared) / (float)rows.C + eps);
    if (!LAYER && first == 0 && i < rows.n) rstd[i] = r;
    for (int m = 0; m < M; m++)
        if (first + m * STEP < C) b[m] = packed<P>(w + first + m * STEP);
    UNROLL
    for (int m = 0; m < M; m++) {
        if (first + m * STEP >= C) continue;
        for (int k = 0; k < P; k++) {
            float out = (float)b[m].at[k] * (r * ((float)a[m].at[k] - mean));
            if (LAYER) out += (float)bias[first + m * STEP + k];
            a[m].at[k] = (T)(LAYER && gelu ? gelu_of(out) : out);
        }
        packed<P>(y + row + m * STEP) = a[m];
    }
}

template <typename T>
static void cuda_rmsnorm_forward(slam_ops *ops, slam_act *s, slam_act *y, float *rstd, const slam_act *x,
                                 const slam_act *delta, const slam_act *w, float eps, int N, int G, int C, int stride) {
    const norm_rows rows = {N * G, G, C, stride};
    if (N == 0 || !norm_fits(ops, C, __func__)) return;
    WITH_TEAM(C % WIDE<T> == 0 && stride % WIDE<T> == 0 && aligned16(delta ? s : NULL, y, x, delta, w), C,
              LAUNCH(ops, (norm_kernel<T, P, TEAM, 0>), blocks(rows.n, 256 / TEAM), 256, 8 * sizeof(float), (T *)s,
                     (T *)y, rstd, (const T *)x, (const T *)delta, (const T *)w, (const T *)NULL, eps, 0, rows));
}

template <typename T>
static void cuda_layernorm(slam_ops *ops, slam_act *s, slam_act *y, const slam_act *x, const slam_act *delta,
                           const slam_act *w, const slam_act *b, float eps, int gelu, int N, int C) {
    const norm_rows rows = {N, 1, C, C};
    if (N == 0 || !norm_fits(ops, C, __func__)) return;
    WITH_TEAM(C % WIDE<T> == 0 && aligned16(s, y, x, delta, w), C,
              LAUNCH(ops, (norm_kernel<T, P, TEAM, 1>), blocks(N, 256 / TEAM), 256, 8 * sizeof(float), (T *)s, (T *)y,
                     (float *)NULL, (const T *)x, (const T *)delta, (const T *)w, (const T *)b, eps, gelu, rows));
}

/* Teams take rows in turn with their part of dw in registers; at the end those of a block add theirs, in order, to a
   row of partial (blocks,C). Bound by memory: dy, s and ds are read, ds written, 4 N C sizeof(T) bytes. */
template <typename T, int P, int TEAM>
KERNEL(256, sizeof(T) == 2 && P > 1 ? 2 : 1)
rmsnorm_backward_kernel(T *ds, float *partial, const T *dy, const T *s, const T *w, const float *rstd,
                        const norm_rows rows) {
    constexpr int M = ROW_NUMBERS / P, STEP = TEAM * P, TEAMS = 256 / TEAM;
    const int team = threadIdx.x / TEAM, first = threadIdx.x % TEAM * P;
    float *shared = (float *)shared_memory(), dw[ROW_NUMBERS]; // shared: (TEAMS,C), or the sums of a block's warps
    for (int k = 0; k < ROW_NUMBERS; k++) dw[k] = 0;
    for (int begin = blockIdx.x * TEAMS; begin < rows.n; begin += gridDim.x * TEAMS) {
        const int i = begin + team, C = i < rows.n ? rows.C : 0;
        const size_t row = rows.at(i) + first;
        const float r = i < rows.n ? rstd[i] : 0;
        packet<T, P> a[M], b[M], d[M];
        float sum = 0;
        for (int m = 0; m < M; m++) {
            if (first + m * STEP >= C) continue;
            a[m] = packed<P>(dy + row + m * STEP);
            b[m] = packed<P>(s + row + m * STEP);
            d[m] = packed<P>(ds + row + m * STEP);
        }
        for (int m = 0; m < M; m++) {
            if (first + m * STEP >= C) continue;
            const packet<T, P> W = packed<P>(w + first + m * STEP);
            for (int k = 0; k < P; k++) {
                const float g = (float)a[m].at[k], x = (float)b[m].at[k];
                sum += g * x * (float)W.at[k];
                dw[m * P + k] += g * r * x;
            }
        }
        const float mean = team_sum<TEAM>(sum, shared) * r * r / (float)rows.C;
        for (int m = 0; m < M; m++) {
            if (first + m * STEP >= C) continue;
            const packet<T, P> W = packed<P>(w + first + m * STEP); // again, from L1: the registers are full
            stay_packed(&a[m]), stay_packed(&b[m]);
            for (int k = 0; k < P; k++) {
                const float g = (float)W.at[k] * (float)a[m].at[k] - (float)b[m].at[k] * mean;
                d[m].at[k] = (T)((ds == dy ? 0 : (float)d[m].at[k]) + r * g);
            }
            packed<P>(ds + row + m * STEP) = d[m];
        }
    }
    float *out = partial + (size_t)blockIdx.x * rows.C, *of_team = TEAMS > 1 ? shared + (size_t)team * rows.C : out;
    for (int m = 0; m < M; m++)
        if (first + m * STEP < rows.C)
            for (int k = 0; k < P; k++) of_team[first + m * STEP + k] = dw[m * P + k];
    if (TEAMS == 1) return;
    __syncthreads();
    for (int c = threadIdx.x; c < rows.C; c += 256) {
        float sum = 0;
        for (int k = 0; k < TEAMS; k++) sum += shared[(size_t)k * rows.C + c];
        out[c] = sum;
    }
}

template <typename T>
static void cuda_rmsnorm_backward(slam_ops *ops, slam_act *ds, float *dw, const slam_act *dy, const slam_act *s,
                                  const slam_act *w, const float *rstd, int N, int G, int C, int stride) {
    cuda_ops *cuda = (cuda_ops *)ops;
    const norm_rows rows = {N * G, G, C, stride};
    if (N == 0 || !norm_fits(ops, C, __func__)) return;
    unsigned grid = 2 * cuda->processors;
    WITH_TEAM(C % WIDE<T> == 0 && stride % WIDE<T> == 0 && aligned16(ds, dy, s, w), C, {
        const unsigned most = blocks(rows.n, 256 / TEAM);
        if (grid > most) grid = most;
        LAUNCH(ops, (rmsnorm_backward_kernel<T, P, TEAM>), grid, 256, (TEAM < 256 ? 256 / TEAM * C : 8) * sizeof(float),
               (T *)ds, (float *)cuda->workspace, (const T *)dy, (const T *)s, (const T *)w, rstd, rows);
    });
    add_partial(ops, __func__, dw, grid, C);
}

/* ---- matrix products: cuBLASLt ----
   It is column-major. A row-major matrix read that way is its transpose, so it computes C^T = op(B)^T op(A)^T: the
   operands change places. Sums are float, without tf32. */

enum { TRANS_A = 1, TRANS_B = 2, ADD = 4, FLOAT_OUT = 8 }; // of a product: A^T, B^T, += instead of =, C is float

/* What decides which algorithms cuBLASLt may use for a product. Alignments in bytes; of the bias 0 if there is none. */
typedef struct product_shape {
    int flags, M, N, K, ldc;
    uint32_t align_A, align_B, align_C, align_bias;
} product_shape;

typedef struct product_plan {
    cublasLtMatmulDescOpaque_t op;
    cublasLtMatrixLayoutOpaque_t A, B, C;
} product_plan;

static cublasStatus_t product_describe(product_plan *p, const product_shape *s, cudaDataType act, const void *bias) {
    const int trans_A = s->flags & TRANS_A, trans_B = s->flags & TRANS_B;
    const int lda = trans_A ? s->M : s->K, ldb = trans_B ? s->K : s->N;
    const cublasOperation_t op_A = trans_A ? CUBLAS_OP_T : CUBLAS_OP_N, op_B = trans_B ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    cublasStatus_t status = cublasLtMatmulDescInit(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const auto set = [&](cublasLtMatmulDescAttributes_t name, const auto &value) {
        if (!status) status = cublasLtMatmulDescSetAttribute(&p->op, name, &value, sizeof value);
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, op_B);
    set(CUBLASLT_MATMUL_DESC_TRANSB, op_A);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (!status) status = cublasLtMatrixLayoutInit(&p->A, act, lda, trans_A ? s->K : s->M, lda);
    if (!status) status = cublasLtMatrixLayoutInit(&p->B, act, ldb, trans_B ? s->N : s->K, ldb);
    if (!status) status = cublasLtMatrixLayoutInit(&p->C, s->flags & FLOAT_OUT ? CUDA_R_32F : act, s->N, s->M, s->ldc);
    return status;
}

/* The algorithms that cuBLASLt proposes, the best guess first, always the same for the same shape. Sums that are split
   over K are added in float in the workspace, in a fixed order. cuBLASLt 13.1 loses the last K % 64 terms of some on
   Hopper (facebookexperimental/triton, PR 2767), so those with K % 64 != 0 are not split. */
static cublasStatus_t product_propose(cublasLtMatmulHeuristicResult_t *found, int most, int *n, cuda_ops *cuda,
                                      product_plan *p, const product_shape *s) {
    cublasLtMatmulPreferenceOpaque_t preference;
    const size_t workspace = PRODUCT_WORKSPACE;
    const uint32_t schemes = s->K % 64 ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    cublasStatus_t status = cublasLtMatmulPreferenceInit(&preference);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto &value) {
        if (!status) status = cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof value);
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s->align_B);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s->align_A);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s->align_C);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s->align_C);
    if (status) return status;
    return cublasLtMatmulAlgoGetHeuristic(cuda->lt, &p->op, &p->B, &p->A, &p->C, &p->C, &preference, most, found, n);
}

/* The largest power of two up to 256 that divides p; 0 for NULL. */
static uint32_t alignment(const void *p) {
    const uintptr_t at = (uintptr_t)p | (p ? 256 : 0);
    return (uint32_t)(at & -at);
}

/* Moves the fastest of n proposed algorithms to the front: the best of three times after one that loads its kernels. A
   later algorithm must be 2 % faster. */
template <typename F>
static void product_measure(slam_ops *ops, cublasLtMatmulHeuristicResult_t *found, int n, void *to, const F &multiply) {
    const cudaStream_t stream = ((cuda_ops *)ops)->stream;
    cudaEvent_t moments[PROPOSED + 1];
    float best[PROPOSED], ms = 0;
    int first = 0;
    for (int k = 0; k <= n; k++) cuda_check(ops, cudaEventCreate(&moments[k]), __func__);
    for (int round = 0; round < 4; round++) {
        for (int k = 0; k <= n; k++) {
            if (k > 0 && !found[k - 1].state) found[k - 1].state = multiply(&found[k - 1].algo, to);
            cuda_check(ops, cudaEventRecord(moments[k], stream), __func__);
        }
        cuda_check(ops, cudaStreamSynchronize(stream), __func__);
        for (int k = 0; k < n; k++) {
            cuda_check(ops, cudaEventElapsedTime(&ms, moments[k], moments[k + 1]), __func__);
            if (round < 2 || ms < best[k]) best[k] = ms;
        }
    }
    for (int k = 1; k < n; k++)
        if (!found[k].state && (found[first].state || best[k] < 0.98f * best[first])) first = k;
    std::swap(found[0], found[first]);
    for (int k = 0; k <= n; k++) cudaEventDestroy(moments[k]);
}

/* C (M,N) = op(A) (M,K) op(B) (K,N) + bias (N) or, with ADD, C += op(A) op(B), rows of C ldc numbers apart. By the
   algorithm known for the shape, else the first proposed or the fastest. Bound by arithmetic: 2 M N K. */
static void product(slam_ops *ops, const char *operation, int flags, int M, int N, int K, const void *A, const void *B,
                    const void *bias, void *C, int ldc) {
    cuda_ops *cuda = (cuda_ops *)ops;
    slam_products *known = &cuda->products;
    const product_shape s = {flags, M, N, K, ldc, alignment(A), alignment(B), alignment(C), alignment(bias)};
    const uint64_t hash = hash_bytes(HASH_START, &s, sizeof s);
    const float one = 1, beta = flags & ADD ? 1.0f : 0.0f;
    const int tune = known->tune && known->measured < SLAM_PRODUCTS / 2, end = tune ? known->measured : SLAM_PRODUCTS;
    cublasLtMatmulHeuristicResult_t found[PROPOSED];
    product_plan p;
    int at = 0, n = 0;
    if (M == 0 || N == 0) return;
    cublasStatus_t status = product_describe(&p, &s, ops->act_bytes == 2 ? CUDA_R_16BF : CUDA_R_32F, bias);
    const auto multiply = [&](const cublasLtMatmulAlgo_t *algorithm, void *to) {
        status = cublasLtMatmul(cuda->lt, &p.op, &one, B, &p.B, A, &p.A, &beta, to, &p.C, to, &p.C, algorithm,
                                cuda->workspace, PRODUCT_WORKSPACE, cuda->stream);
        cudaGetLastError(); // or the next launch would return it
        return status;
    };
    while (at < end && known->list[at][0] != hash) at++;
    if (!status && at < end && !multiply((cublasLtMatmulAlgo_t *)&known->list[at][1], C)) return;
    if (!status || at < end) status = product_propose(found, tune ? PROPOSED : 8, &n, cuda, &p, &s);
    if (tune && at == end && n > 1) { // += is measured on other memory, with which C stays as it is
        void *to = flags & ADD ? ops->alloc(ops, (size_t)M * ldc * sizeof(float)) : C;
        if (to) product_measure(ops, found, n, to, multiply);
        if (to != C) ops->release(ops, to);
    }
    for (int k = 0; k < n; k++) {
        if (found[k].state || multiply(&found[k].algo, C)) continue;
        if (at == SLAM_PRODUCTS) at = known->measured + known->unmeasured++ % (SLAM_PRODUCTS - known->measured);
        if (at == known->measured && tune) known->measured++;
        known->list[at][0] = hash;
        memcpy(&known->list[at][1], &found[k].algo, sizeof found[k].algo);
        return;
    }
    cuda_fail(ops, operation, cublasLtGetStatusString(status ? status : CUBLAS_STATUS_NOT_SUPPORTED), 1);
}

static void cuda_matmul_forward(slam_ops *ops, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b,
                                int N, int C, int OC) {
    product(ops, __func__, TRANS_B, N, OC, C, x, w, b, out, OC);
}

static void cuda_matmul_backward_input(slam_ops *ops, slam_act *dx, const slam_act *dout, const slam_act *w, int N,
                                       int C, int OC) {
    product(ops, __func__, 0, N, C, OC, dout, w, NULL, dx, C);
}

/* Sums over rows: partial (gridDim.y,OC). A lane has P columns; warps and blocks take rows in turn, and the sums of a
   block's warps meet in shared memory. Bound by memory: dout once, N OC sizeof(T) bytes. */
template <typename T, int P> KERNEL(256) column_sums_kernel(float *partial, const T *dout, int N, int OC) {
    float *sums = (float *)shared_memory(), sum[P] = {0}, d[P]; // sums: (8, 32 P)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * 32 * P, c = first + lane * P;
    for (int i = blockIdx.y * 8 + warp; c < OC && i < N; i += gridDim.y * 8) {
        load(d, dout + (size_t)i * OC + c);
        for (int k = 0; k < P; k++) sum[k] += d[k];
    }
    for (int k = 0; k < P; k++) sums[warp * 32 * P + lane * P + k] = sum[k];
    __syncthreads();
    for (int k = threadIdx.x; k < 32 * P && first + k < OC; k += 256) {
        float total = 0;
        for (int w = 0; w < 8; w++) total += sums[w * 32 * P + k];
        partial[(size_t)blockIdx.y * OC + first + k] = total;
    }
}

template <typename T>
static void cuda_matmul_backward_weight(slam_ops *ops, float *dw, float *db, const slam_act *dout, const slam_act *x,
                                        int N, int C, int OC) {
    cuda_ops *cuda = (cuda_ops *)ops;
    product(ops, __func__, TRANS_A | ADD | FLOAT_OUT, OC, C, N, dout, x, NULL, dw, C);
    if (!db || N == 0) return;
    unsigned parts = blocks(N, 8);
    WITH_P(OC % WIDE<T> == 0 && aligned16(dout), {
        const unsigned columns = blocks(OC, 32 * P), most = 8 * cuda->processors / columns + 1;
        if (parts > most) parts = most;
        LAUNCH(ops, (column_sums_kernel<T, P>), dim3(columns, parts), 256, 256 * P * sizeof(float),
               (float *)cuda->workspace, (const T *)dout, N, OC);
    });
    add_partial(ops, __func__, db, parts, OC);
}

/* ---- cross-entropy ---- */

/* A row has a warp up to 1024 numbers, else a block of 512 threads. One pass for the largest logit and the sum, which
   is rescaled when a larger logit appears (Milakov and Gimelshein 2018), and one, from the caches, for the gradient.
   Bound by memory: 2 N V sizeof(T) bytes, half of that without a gradient. */
template <typename T, int P, int TEAM>
KERNEL(TEAM == 32 ? 256 : 512)
crossentropy_kernel(float *loss, T *logits, const int *targets, slam_xent a) {
    const int column = threadIdx.x % TEAM * P, i = TEAM == 32 ? blockIdx.x * 8 + threadIdx.x / 32 : blockIdx.x;
    if (i >= a.N) return; // the whole warp
    float *shared = (float *)shared_memory(), max = -INFINITY, sum = 0, x[P];
    T *row = logits + (size_t)i * a.stride;
    const int target = targets[i];
    const float z_target = target < 0 ? 0 : (float)row[target];
    for (int first = column; first < a.V; first += TEAM * P) {
        load(x, row + first);
        float larger = max;
        for (int k = 0; k < P; k++)
            if (first + k < a.V) larger = fmaxf(larger, x[k]);
        if (larger > max) sum *= exp_of<T>(max - larger), max = larger;
        for (int k = 0; k < P; k++)
            if (first + k < a.V) sum += exp_of<T>(x[k] - max);
    }
    const float top = TEAM == 32 ? warp_max(max) : block_max(max, shared);
    sum = team_sum<TEAM>(sum * exp_of<T>(max - top), shared);
    if (column == 0) loss[i] = target < 0 ? 0 : logf(sum) - (z_target - top);
    if (a.scale == 0) return;
    __syncwarp(); // the team has read z_target (a block: before team_sum)
    const float weight = target < 0 ? 0 : a.weights ? a.scale * a.weights[i] : a.scale, factor = weight / sum;
    for (int first = column; first < a.stride; first += TEAM * P) {
        load(x, row + first);
        for (int k = 0; k < P; k++) {
            const float p = exp_of<T>(x[k] - top) * factor;
            x[k] = target < 0 || first + k >= a.V ? 0 : p - (first + k == target ? weight : 0);
        }
        store(row + first, x);
    }
}

template <typename T>
static void cuda_crossentropy(slam_ops *ops, float *loss, slam_act *logits, const int *targets, const slam_xent *a) {
    const int wide = a->stride % WIDE<T> == 0 && aligned16(logits);
    T *z = (T *)logits;
    if (a->N == 0) return;
    if (a->stride <= 1024) {
        WITH_P(wide, LAUNCH(ops, (crossentropy_kernel<T, P, 32>), blocks(a->N, 8), 256, 0, loss, z, targets, *a));
    } else {
        WITH_P(wide,
               LAUNCH(ops, (crossentropy_kernel<T, P, 512>), a->N, 512, 16 * sizeof(float), loss, z, targets, *a));
    }
}

/* ---- sums ---- */

/* out (gridDim.x) = sums of X, or += if `add`. A thread adds four numbers in X, all else in double, which is slow on
   most GPUs. Bound by memory: 4 n bytes. */
template <typename X, int SQUARES> KERNEL(256) sum_kernel(double *out, const X *x, size_t n, int add) {
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * 1024 + threadIdx.x; i < n; i += (size_t)gridDim.x * 1024) {
        X four = 0;
        for (int k = 0; k < 4; k++) {
            const X a = i + 256 * k < n ? x[i + 256 * k] : 0;
            four += SQUARES ? a * a : a;
        }
        sum += four;
    }
    sum = block_sum(sum, (double *)shared_memory());
    if (threadIdx.x == 0) out[blockIdx.x] = add ? out[blockIdx.x] + sum : sum;
}

template <int SQUARES> static void cuda_sum(slam_ops *ops, double *out, const float *x, size_t n) {
    const char *operation = SQUARES ? "cuda_sum_squares" : __func__;
    const size_t parts = n < 1 << 20 ? blocks(n, 1024) : 1024;
    double *partial = (double *)((cuda_ops *)ops)->workspace;
    if (n == 0) return;
    LAUNCH_FOR(operation, ops, (sum_kernel<float, SQUARES>), parts, 256, 8 * sizeof(double), partial, x, n, 0);
    LAUNCH_FOR(operation, ops, (sum_kernel<double, 0>), 1, 256, 8 * sizeof(double), out, (const double *)partial, parts,
               1);
}

/* ---- attention ----
   Plain kernels serve float, all head sizes up to 256, and decoding; read these first. Fast ones serve bf16 and head
   sizes 32, 64 and 128 with all products on tensor cores.

   None holds a (T,T) matrix. A softmax goes over one run of keys after the other (Milakov and Gimelshein 2018): with m
   the maximum so far, l = sum_j exp(s_j - m) and o = sum_j exp(s_j - m) v_j, a run with maximum m' first scales l and o
   by exp(m - max(m, m')), then adds its own. In the end out = o / l and lse = m + log l. The backward pass computes s
   again, and p_ij = exp(s_ij - lse_i) (Dao 2023). Kernels that own queries sum dq, kernels that own keys dk and dv:
   seven products instead of five, but no block adds to what another has written. */

/* The keys that query i of row b sees: x <= j < y and not z <= j < w. None if i >= T. */
DEVICE int4 keys_of(const slam_mask &mask, int b, int i) {
    int4 keys = {0, 0, 0, 0};
    if (i >= mask.T) return keys;
    const size_t at = (size_t)b * mask.T + i;
    keys.x = mask.doc_start[at];
    keys.y = mask.doc_end ? mask.doc_end[at] : i + 1;
    if (mask.mask_start) keys.z = mask.mask_start[at], keys.w = mask.mask_end[at];
    return keys;
}

DEVICE int rotary_position(int4 keys, int i) { return i - keys.x - (keys.w - keys.z); }

DEVICE int sees(int4 keys, int j) { return j >= keys.x && j < keys.y && (j < keys.z || j >= keys.w); }

/* Does it see any of the keys first to end - 1? All of them? */
DEVICE int sees_any(int4 keys, int first, int end) {
    first = max(first, keys.x), end = min(end, keys.y);
    return first < end && (first < keys.z || end > keys.w);
}
DEVICE int sees_all(int4 keys, int first, int end) {
    return first >= keys.x && end <= keys.y && max(first, keys.z) >= min(end, keys.w);
}

/* Bit k: does it see key j + k? 32 keys. */
DEVICE unsigned seen_bits(int4 keys, int j) {
    const int a = min(max(keys.x - j, 0), 32), b = min(max(keys.y - j, a), 32);
    const int c = min(max(keys.z - j, 0), 32), d = min(max(keys.w - j, c), 32);
    return (unsigned)((1ull << b) - (1ull << a)) & ~(unsigned)((1ull << d) - (1ull << c));
}

/* Rotates the pairs c .. c + P - 1 of a head, numbers x and y, by the angles of a position, or back with sign -1. */
template <int P>
DEVICE void rotate_pairs(float (&x)[P], float (&y)[P], const float *rope, int pairs, int position, int c, float sign) {
    const float *at = rope + 2 * (size_t)position * pairs + c;
    float cosine[P], sine[P];
    load(cosine, at), load(sine, at + pairs);
    for (int k = 0; k < P; k++) {
        const float a = x[k];
        x[k] = a * cosine[k] - sign * sine[k] * y[k];
        y[k] = y[k] * cosine[k] + sign * sine[k] * a;
    }
}

/* Rotates the query and key heads of qkv in place; when decoding, also appends keys and values to the cache. A row is a
   head of a token; column c is the pair (c, c + pairs) or, behind the pairs, number c + pairs. 2 N (NH + KVH) HS
   sizeof(T) bytes. */
template <typename T> struct rotate_op {
    T *qkv, *cache;     // cache: NULL if not decoding
    const int *lengths; // positions when decoding
    slam_mask mask;
    template <int P> __device__ void run(unsigned row, size_t c) const {
        const int HS = mask.HS, pairs = mask.pairs, is_pair = c < (size_t)pairs, heads = mask.NH + 2 * mask.KVH;
        const int h = row % heads, rotated = h < mask.NH + mask.KVH;
        const int token = row / heads, b = cache ? token : token / mask.T, i = token % mask.T;
        if (!cache && !rotated) return;
        const int position = cache ? lengths[b] : rotary_position(keys_of(mask, b, i), i);
        T *x = qkv + (size_t)row * HS + c, *y = x + pairs;
        float x0[P] = ZERO, x1[P];
        if (is_pair) load(x0, x);
        load(x1, y);
        if (is_pair && rotated) {
            rotate_pairs(x0, x1, mask.rope, pairs, position, c, 1);
            store(x, x0), store(y, x1);
        }
        if (!cache || h < mask.NH) return;
        T *to = cache + (((size_t)b * mask.T + position) * 2 * mask.KVH + h - mask.NH) * HS + c;
        if (is_pair) store(to, x0);
        store(to + pairs, x1);
    }
};

template <typename T>
static void rotate_heads(slam_ops *ops, const char *operation, T *qkv, T *cache, const int *lengths,
                         const slam_mask *mask) {
    const size_t tokens = (size_t)mask->B * (cache ? 1 : mask->T);
    if (mask->pairs || cache)
        each<WIDE<T>>(ops, operation, tokens * (mask->NH + 2 * mask->KVH), mask->HS - mask->pairs,
                      rotate_op<T>{qkv, cache, lengths, *mask}, qkv, qkv + mask->pairs, cache);
}

/* ---- attention: plain kernels ----
   Lanes have channels lane, lane + 32, ... of a head in registers; keys and values come from the caches. Bound by
   arithmetic, 4 HS FLOP for a pair of query and key, without tensor cores. */

enum { PLAIN_CHANNELS = 256 / 32, PLAIN_WARPS = 2, DECODE_WARPS = 8 };

/* Dot product of HS floats in shared memory with a row; P divides HS. */
template <typename T, int P> DEVICE float plain_dot(const float *a, const T *row, int HS) {
    float sum = 0, x[P];
    for (int c = 0; c < HS; c += P) {
        load(x, row + c);
        for (int k = 0; k < P; k++) sum += a[c + k] * x[k];
    }
    return sum;
}

/* sums_c += sum over n rows of weight_k x_kc, for the channels of this lane. */
template <typename T>
DEVICE void plain_add(float *sums, const float *weight, const T *x, size_t stride, int n, int HS) {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < n; k++)
        for (int m = 0; m < PLAIN_CHANNELS; m++)
            if (lane + 32 * m < HS) sums[m] += weight[k] * (float)x[k * stride + lane + 32 * m];
}

/* to (HS) = R^-1 (scale sums), by a warp; `head` is HS floats of shared memory. */
template <typename T>
DEVICE void plain_rotate_back(T *to, const float *sums, float scale, float *head, const slam_mask &mask, int position) {
    const int lane = threadIdx.x % 32, HS = mask.HS, pairs = mask.pairs;
    for (int m = 0; m < PLAIN_CHANNELS; m++)
        if (lane + 32 * m < HS) head[lane + 32 * m] = sums[m] * scale;
    __syncwarp();
    for (int c = lane; c < pairs; c += 32) {
        float x[1] = {head[c]}, y[1] = {head[c + pairs]};
        rotate_pairs(x, y, mask.rope, pairs, position, c, -1);
        head[c] = x[0], head[c + pairs] = y[0];
    }
    __syncwarp();
    for (int c = lane; c < HS; c += 32) to[c] = (T)head[c];
}

/* A block has a query, or a new token if `lengths` is not NULL; its warps take runs of 32 keys in turn. For the scores
   a lane has a key, for the values its channels of all 32 keys. In the end the warps' sums are joined as those of runs.
   q: the first query head, rows W numbers apart; key: the first key head, rows K numbers apart. Decoding is bound by
   memory: the cache, 2 KVH HS sizeof(T) bytes a token. */
template <typename T, int P>
KERNEL(32 * DECODE_WARPS)
attention_forward_plain(T *out, float *lse, const T *q, const T *key, int W, int K, const int *lengths,
                        const slam_mask mask) {
    const int NH = mask.NH, HS = mask.HS, queries = lengths ? 1 : mask.T, warps = blockDim.x / 32;
    const int h = blockIdx.x % NH, token = blockIdx.x / NH, b = token / queries, i = token % queries;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *query = (float *)shared_memory(), *p = query + HS + 32 * warp; // (HS), (warps,32)
    float *part = query + HS + 32 * warps, *maxima = part + warps * HS,
          *totals = maxima + warps; // (warps,HS), (warps), (warps)
    const float scale = rsqrtf((float)HS);
    q += (size_t)token * W + h * HS;
    key += (size_t)b * mask.T * K + h * mask.KVH / NH * HS;
    const T *value = key + mask.KVH * HS;
    int4 keys = {0, 0, 0, 0};
    if (lengths) keys.y = lengths[b] + 1;
    else keys = keys_of(mask, b, i);
    for (int c = threadIdx.x; c < HS; c += blockDim.x) query[c] = (float)q[c] * scale;
    __syncthreads();
    float max = -INFINITY, sum = 0, o[PLAIN_CHANNELS] = {0};
    for (int j = keys.x + 32 * warp; j < keys.y; j += 32 * warps) {
        const int see = sees(keys, j + lane);
        if (!__any_sync(0xffffffffu, see)) continue;
        const float s = see ? plain_dot<T, P>(query, key + (size_t)(j + lane) * K, HS) : -INFINITY;
        const float larger = fmaxf(max, warp_max(s)), keep = expf(max - larger), e = expf(s - larger);
        __syncwarp(); // all have read the last p
        p[lane] = e;
        __syncwarp();
        max = larger;
        sum = sum * keep + warp_sum(e);
        for (int m = 0; m < PLAIN_CHANNELS; m++) o[m] *= keep;
        plain_add(o, p, value + (size_t)j * K, K, min(32, keys.y - j), HS);
    }
    if (lane == 0) maxima[warp] = max;
    __syncthreads();
    float top = -INFINITY, total = 0;
    for (int w = 0; w < warps; w++) top = fmaxf(top, maxima[w]);
    const float keep = expf(max - top); // 0 for a warp that saw no key
    for (int m = 0; m < PLAIN_CHANNELS; m++)
        if (lane + 32 * m < HS) part[warp * HS + lane + 32 * m] = o[m] * keep;
    if (lane == 0) totals[warp] = sum * keep;
    __syncthreads();
    for (int w = 0; w < warps; w++) total += totals[w];
    for (int c = threadIdx.x; c < HS; c += blockDim.x) {
        float x = 0;
        for (int w = 0; w < warps; w++) x += part[w * HS + c];
        out[((size_t)token * NH + h) * HS + c] = (T)(x / total);
    }
    if (lse && threadIdx.x == 0) lse[((size_t)b * NH + h) * queries + i] = top + logf(total);
}

/* dq and D: a block, which is a warp, has a query. */
template <typename T, int P>
KERNEL(32)
attention_backward_queries_plain(T *dqkv, float *D, const T *dout, const T *out, const float *lse, const T *qkv,
                                 const slam_mask mask) {
    const int NH = mask.NH, HS = mask.HS, W = (NH + 2 * mask.KVH) * HS, lane = threadIdx.x;
    const int i = blockIdx.x % mask.T, h = blockIdx.x / mask.T % NH, b = blockIdx.x / mask.T / NH;
    const size_t token = (size_t)b * mask.T + i, at = (token * NH + h) * HS;
    float *query = (float *)shared_memory(), *d = query + HS, *ds = d + HS; // (HS), (HS), (32)
    const T *key = qkv + (size_t)b * mask.T * W + (NH + h * mask.KVH / NH) * HS, *value = key + mask.KVH * HS;
    const float scale = rsqrtf((float)HS), shift = lse[blockIdx.x];
    float dot = 0, dq[PLAIN_CHANNELS] = {0};
    for (int c = lane; c < HS; c += 32) {
        query[c] = (float)qkv[token * W + h * HS + c] * scale;
        d[c] = (float)dout[at + c];
        dot += d[c] * (float)out[at + c];
    }
    const float Di = warp_sum(dot);
    if (lane == 0) D[blockIdx.x] = Di;
    const int4 keys = keys_of(mask, b, i);
    for (int j = keys.x; j < keys.y; j += 32) {
        const int see = sees(keys, j + lane);
        const size_t row = (size_t)(j + lane) * W;
        if (!__any_sync(0xffffffffu, see)) continue;
        __syncwarp();
        const float p = see ? expf(plain_dot<T, P>(query, key + row, HS) - shift) : 0;
        ds[lane] = see ? p * (plain_dot<T, P>(d, value + row, HS) - Di) : 0;
        __syncwarp();
        plain_add(dq, ds, key + (size_t)j * W, W, min(32, keys.y - j), HS);
    }
    plain_rotate_back(dqkv + token * W + h * HS, dq, scale, query, mask, rotary_position(keys, i));
}

/* dk and dv: a warp has a key. It goes through the queries of all heads that read it, 32 at a time. */
template <typename T, int P>
KERNEL(32)
attention_backward_keys_plain(T *dqkv, const float *D, const T *dout, const float *lse, const T *qkv,
                              const slam_mask mask) {
    const int NH = mask.NH, KVH = mask.KVH, HS = mask.HS, W = (NH + 2 * KVH) * HS, O = NH * HS, lane = threadIdx.x;
    const int j = blockIdx.x % mask.T, g = blockIdx.x / mask.T % KVH, b = blockIdx.x / mask.T / KVH;
    float *key = (float *)shared_memory(), *value = key + HS, *p = value + HS, *ds = p + 32; // (HS), (HS), (32), (32)
    const size_t first_token = (size_t)b * mask.T, at = (first_token + j) * W + (NH + g) * HS;
    const float scale = rsqrtf((float)HS);
    float dk[PLAIN_CHANNELS] = {0}, dv[PLAIN_CHANNELS] = {0};
    for (int c = lane; c < HS; c += 32) {
        key[c] = (float)qkv[at + c] * scale;
        value[c] = (float)qkv[at + KVH * HS + c];
    }
    for (int h = g * (NH / KVH); h < (g + 1) * (NH / KVH); h++) {
        const T *q = qkv + first_token * W + h * HS, *d = dout + first_token * O + h * HS;
        const size_t head = ((size_t)b * NH + h) * mask.T;
        for (int first = mask.doc_end ? 0 : j; first < mask.T; first += 32) {
            const int i = first + lane, see = sees(keys_of(mask, b, i), j);
            if (!__any_sync(0xffffffffu, see)) continue;
            __syncwarp();
            p[lane] = see ? expf(plain_dot<T, P>(key, q + (size_t)i * W, HS) - lse[head + i]) : 0;
            ds[lane] = see ? p[lane] * (plain_dot<T, P>(value, d + (size_t)i * O, HS) - D[head + i]) : 0;
            __syncwarp();
            plain_add(dv, p, d + (size_t)first * O, O, min(32, mask.T - first), HS);
            plain_add(dk, ds, q + (size_t)first * W, W, min(32, mask.T - first), HS);
        }
    }
    plain_rotate_back(dqkv + at, dk, scale, key, mask, rotary_position(keys_of(mask, b, j), j));
    for (int m = 0; m < PLAIN_CHANNELS; m++)
        if (lane + 32 * m < HS) dqkv[at + KVH * HS + lane + 32 * m] = (T)dv[m];
}

/* Forward of all queries, or of a new token for each sequence. */
template <typename T>
static void attention_plain(slam_ops *ops, const char *operation, T *out, float *lse, const T *q, const T *key, int K,
                            const int *lengths, const slam_mask *mask) {
    const int warps = lengths ? DECODE_WARPS : PLAIN_WARPS, W = (mask->NH + 2 * mask->KVH) * mask->HS;
    const unsigned grid = (unsigned)mask->B * (lengths ? 1 : mask->T) * mask->NH;
    const size_t shared = (mask->HS + warps * (32 + mask->HS + 2)) * sizeof(float);
    WITH_P(mask->HS % WIDE<T> == 0, LAUNCH_FOR(operation, ops, (attention_forward_plain<T, P>), grid, 32 * warps,
                                               shared, out, lse, q, key, W, K, lengths, *mask));
}

/* ---- attention: what the fast kernels are made of ----
   Tiles of rows of HS numbers lie in shared memory in chunks of 16 bytes. ldmatrix reads a chunk of each of 8 rows at
   once, from different banks: chunk c of row r is stored where chunk c ^ r would be. A tile is named by its offset, a
   multiple of 128 bytes. */

#define LOG2_E 1.44269504f // exp(s) = 2^(s log2 e)

template <int HS> DEVICE int tile_at(int row, int chunk) {
    return row * HS * 2 + (chunk ^ (HS == 32 ? row >> 1 & 3 : row & 7)) * 16;
}

/* Starts the copy of ROWS rows, `stride` numbers apart, to a tile by THREADS threads; rows from `valid` on become 0. */
template <int HS, int ROWS, int THREADS>
DEVICE void tile_load(int tile, const bf16 *from, int stride, int valid, int thread) {
    constexpr int CHUNKS = HS / 8, STEP = THREADS / CHUNKS; // rows at a time
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "every step places its chunks alike");
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    char *to = shared_memory() + tile + tile_at<HS>(row, chunk);
    from += (ptrdiff_t)row * stride + chunk * 8;
    for (int k = 0; k < ROWS; k += STEP, from += STEP * stride) copy_async(to + k * HS * 2, from, row + k < valid);
}

/* Where this lane reads the first 16 x 16 of a tile, as A operand (or, transposed, as B), and as B operand. tile_part:
   those at row and column, multiples of 16. */
template <int HS> DEVICE int tile_a(int tile) {
    const int lane = threadIdx.x % 32;
    return tile + tile_at<HS>(lane % 16, lane / 16);
}
template <int HS> DEVICE int tile_b(int tile) {
    const int lane = threadIdx.x % 32;
    return tile + tile_at<HS>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
template <int HS> DEVICE const char *tile_part(int tile, int row, int column) {
    return shared_memory() + row * HS * 2 + (tile ^ column * 2);
}

template <int M, int N> DEVICE void sums_fill(float (&c)[M][N][4], float x) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int k = 0; k < 4; k++) c[m][n][k] = x;
}

/* c *= factor of each row; rows of a lane are 16 m + 8 r + lane / 4. */
template <int M, int N> DEVICE void sums_scale(float (&c)[M][N][4], const float (&factor)[M][2]) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int k = 0; k < 4; k++) c[m][n][k] *= factor[m][k / 2];
}

/* c (16 M,8 N) += a (16 M,16) times rows 16 k .. of a tile or, if not ROWS, columns 16 k .. of its 8 N rows. */
template <int HS, int ROWS, int M, int N>
DEVICE void product_step(float (&c)[M][N][4], const uint32_t (&a)[M][4], int tile, int k) {
    for (int n = 0; n < N / 2; n++) {
        uint32_t b[4];
        ldmatrix<ROWS>(b, ROWS ? tile_part<HS>(tile, 16 * k, 16 * n) : tile_part<HS>(tile, 16 * n, 16 * k));
        for (int m = 0; m < M; m++) {
            mma_bf16(c[m][2 * n], a[m], b[0], b[1]);
            mma_bf16(c[m][2 * n + 1], a[m], b[2], b[3]);
        }
    }
}

/* c (16 M,8 N) += a (16 M,HS) tile^T, a tile of 8 N rows; a in registers, as A operands. */
template <int HS, int M, int N>
DEVICE void product_rows(float (&c)[M][N][4], const uint32_t (&a)[HS / 16][M][4], int tile) {
    tile = tile_b<HS>(tile);
    for (int k = 0; k < HS / 16; k++) product_step<HS, 0>(c, a[k], tile, k);
}

/* The same with a, 16 M rows, in a tile. */
template <int HS, int M, int N> DEVICE void product_tiles(float (&c)[M][N][4], int tile_of_a, int tile) {
    tile_of_a = tile_a<HS>(tile_of_a), tile = tile_b<HS>(tile);
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[M][4];
        for (int m = 0; m < M; m++) ldmatrix<0>(a[m], tile_part<HS>(tile_of_a, 16 * m, 16 * k));
        product_step<HS, 0>(c, a, tile, k);
    }
}

/* c (16 M,HS) += p (16 M,8 N) tile, a tile of 8 N rows. p are sums of a product, rounded: two neighbouring tiles of 8
   columns lie in a lane as an A operand does. */
template <int HS, int M, int N>
DEVICE void product_columns(float (&c)[M][HS / 8][4], const float (&p)[M][N][4], int tile) {
    tile = tile_a<HS>(tile);
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[M][4];
        for (int m = 0; m < M; m++)
            for (int e = 0; e < 4; e++)
                a[m][e] = pack_bf16(p[m][2 * k + e / 2][e % 2 * 2], p[m][2 * k + e / 2][e % 2 * 2 + 1]);
        product_step<HS, 1>(c, a, tile, k);
    }
}

/* A operands of 16 M rows from global memory; rows from `valid` on are 0. */
template <int HS, int M> DEVICE void rows_load(uint32_t (&a)[HS / 16][M][4], const bf16 *from, int stride, int valid) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int m = 0; m < M; m++)
        for (int k = 0; k < HS / 16; k++)
            for (int e = 0; e < 4; e++) {
                const int row = 16 * m + g + e % 2 * 8;
                const bf16 *at = from + (ptrdiff_t)row * stride + k * 16 + e / 2 * 8 + 2 * t;
                a[k][m][e] = row < valid ? *(const uint32_t *)at : 0;
            }
}

/* Dot product of rows 16 m + 8 r + lane / 4 of two operands; the four lanes that share it all get it. */
template <int K, int M>
DEVICE float rows_dot(const uint32_t (&a)[K][M][4], const uint32_t (&b)[K][M][4], int m, int r) {
    float sum = 0;
    for (int k = 0; k < K; k++)
        for (int e = r; e < 4; e += 2) {
            sum += __uint_as_float(a[k][m][e] << 16) * __uint_as_float(b[k][m][e] << 16);
            sum += __uint_as_float(a[k][m][e] & 0xffff0000u) * __uint_as_float(b[k][m][e] & 0xffff0000u);
        }
    return warp_sum<4>(sum);
}

/* 16 M rows of sums of a warp, rounded, to global memory, through a tile of its own, so that accesses are 16 bytes. */
template <int HS, int M>
DEVICE void rows_store(bf16 *to, int stride, int valid, const float (&c)[M][HS / 8][4], int at) {
    char *tile = shared_memory() + at;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < HS / 8; n++)
            for (int r = 0; r < 2; r++) {
                const uint32_t pair = pack_bf16(c[m][n][2 * r], c[m][n][2 * r + 1]);
                *(uint32_t *)(tile + tile_at<HS>(16 * m + 8 * r + g, n) + 4 * t) = pair;
            }
    __syncwarp();
    for (int k = lane; k < 16 * M * HS / 8; k += 32) {
        const int row = k / (HS / 8), chunk = k % (HS / 8);
        if (row < valid)
            *(uint4 *)(to + (ptrdiff_t)row * stride + chunk * 8) = *(const uint4 *)(tile + tile_at<HS>(row, chunk));
    }
}

/* The same for gradients of rotated rows i, i + 1, ... of row b of the batch: scale * R^-1 c. A lane has both numbers
   of each pair: tiles n and n + pairs/8 of its columns. */
template <int HS, int M>
DEVICE void rows_store_rotated(bf16 *to, int stride, float (&c)[M][HS / 8][4], int at, const slam_mask &mask, int b,
                               int i) {
    constexpr int PAIRS = HS / 2;
    const float scale = rsqrtf((float)HS);
    int position[M][2];
    for (int m = 0; m < M; m++)
        for (int r = 0; r < 2; r++) {
            const int row = i + 16 * m + 8 * r + threadIdx.x % 32 / 4;
            position[m][r] = row < mask.T ? rotary_position(keys_of(mask, b, row), row) : 0;
            for (int n = 0; n < HS / 8; n++) c[m][n][2 * r] *= scale, c[m][n][2 * r + 1] *= scale;
        }
    for (int m = 0; mask.pairs && m < M; m++)
        for (int r = 0; r < 2; r++)
            for (int n = 0; n < PAIRS / 8; n++) {
                float *at[] = {c[m][n] + 2 * r, c[m][n + PAIRS / 8] + 2 * r};
                float x[] = {at[0][0], at[0][1]}, y[] = {at[1][0], at[1][1]};
                rotate_pairs(x, y, mask.rope, PAIRS, position[m][r], 8 * n + threadIdx.x % 4 * 2, -1);
                for (int e = 0; e < 2; e++) at[0][e] = x[e], at[1][e] = y[e];
            }
    rows_store<HS, M>(to, stride, mask.T - i, c, at);
}

/* Adds the sums of GROUPS groups of THREADS threads, pairwise, into those of group 0; half of them fit `shared`. */
template <int GROUPS, int THREADS, int M, int N> DEVICE void groups_add(float (&c)[M][N][4], float *shared) {
    const int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
    for (int half = GROUPS / 2; half > 0; half /= 2) {
        float *at = shared + group % half * (M * N * 4) * THREADS + thread;
        __syncthreads();
        for (int k = 0; k < M * N * 4 && group >= half && group < 2 * half; k++)
            at[k * THREADS] = c[k / 4 / N][k / 4 % N][k % 4];
        __syncthreads();
        for (int k = 0; k < M * N * 4 && group < half; k++) c[k / 4 / N][k / 4 % N][k % 4] += at[k * THREADS];
    }
}

/* Scores of 16 M queries and KEYS keys from j on become -INFINITY where the query does not see the key. Each lane
   computes the bits of one query. */
template <int KEYS, int M> DEVICE void scores_mask(float (&s)[M][KEYS / 8][4], const int4 *keys, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int4 of_lane = keys[lane % (16 * M)];
    for (int part = 0; part < KEYS / 32; part++) {
        const unsigned bits = seen_bits(of_lane, j + 32 * part);
        for (int m = 0; m < M; m++)
            for (int r = 0; r < 2; r++) {
                const unsigned seen = __shfl_sync(0xffffffffu, bits, 16 * m + 8 * r + g) >> 2 * t;
                for (int n = 0; n < 4; n++)
                    for (int e = 0; e < 2; e++)
                        if (!(seen >> (8 * n + e) & 1)) s[m][4 * part + n][2 * r + e] = -INFINITY;
            }
    }
}

/* What a warp's queries see of the keys j to end - 1. 0: nothing; 1: some, so the scores are masked; 2: all see all.
   keys (QUERIES): what the queries see */
template <int QUERIES> DEVICE int seen_of(const int4 *keys, int j, int end) {
    const int4 of_lane = keys[threadIdx.x % QUERIES];
    const int some = __any_sync(0xffffffffu, sees_any(of_lane, j, end));
    const int all = __all_sync(0xffffffffu, of_lane.y == 0 || sees_all(of_lane, j, end)); // y == 0: no query
    return some ? 1 + all : 0;
}

/* Calls f(stage, j, seen, keys) for the tiles of KEYS keys, j and the next, that a warp sees. A block of 128 threads
   has 64 M queries, i and the next; keys: what the 16 M of this warp see. stage: where the tile of keys lies, before
   that of values; the next ones arrive meanwhile. In the end all warps have read the last tiles. */
template <int HS, int M, int KEYS, typename F>
DEVICE void for_key_tiles(const slam_mask &mask, int b, int i, const bf16 *key, int W, const F &f) {
    constexpr int TILE = KEYS * HS * 2;
    int4 *keys = (int4 *)(shared_memory() + 4 * TILE);
    int first = mask.T, end = 0;
    for (int k = threadIdx.x; k < 64 * M; k += 128) keys[k] = keys_of(mask, b, i + k);
    __syncthreads();
    for (int k = threadIdx.x % 32; k < 64 * M; k += 32)
        if (keys[k].y > 0) first = min(first, keys[k].x), end = max(end, keys[k].y);
    first = (int)-warp_max(-(float)first) / KEYS, end = ((int)warp_max((float)end) + KEYS - 1) / KEYS;
    keys += threadIdx.x / 32 * 16 * M;
    const auto start = [&](int tile) {
        const int stage = (tile & 1) * 2 * TILE, j = tile * KEYS;
        const bf16 *from = key + (ptrdiff_t)j * W;
        tile_load<HS, KEYS, 128>(stage, from, W, mask.T - j, threadIdx.x);
        tile_load<HS, KEYS, 128>(stage + TILE, from + mask.KVH * HS, W, mask.T - j, threadIdx.x);
    };
    if (first < end) start(first);
    for (int tile = first; tile < end; tile++) {
        copy_async_wait();
        __syncthreads(); // the tiles are there, and no warp reads those before them
        if (tile + 1 < end) start(tile + 1);
        const int seen = seen_of<16 * M>(keys, tile * KEYS, (tile + 1) * KEYS);
        if (seen) f((tile & 1) * 2 * TILE, tile * KEYS, seen, keys);
    }
    __syncthreads();
}

/* ---- attention: fast kernels ---- */

/* Forward. A block has 64 M queries of a head: 4 warps, 16 M queries each, whose q and o stay in registers. It goes
   through tiles of KEYS keys; a warp skips those that it does not see. With M = 2 each fragment of k and v that is read
   from shared memory serves two products; with 1 the reads, 128 bytes a clock, would take longer than the products.
   Bound by arithmetic: 4 HS FLOP and one exponential, of which a multiprocessor makes 16 a clock, for a pair of query
   and key. Late queries, which see the most keys, start first. */
template <int HS, int M, int KEYS>
KERNEL(128, HS == 128 ? 1 : 2)
attention_forward_kernel(bf16 *out, float *lse, const bf16 *qkv, const slam_mask mask) {
    constexpr int QUERIES = 64 * M, TILE = KEYS * HS * 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int h = blockIdx.x % mask.NH, b = blockIdx.x / mask.NH, i0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int W = (mask.NH + 2 * mask.KVH) * HS, O = mask.NH * HS, i = i0 + warp * 16 * M; // i: first query of the warp
    const bf16 *row = qkv + (size_t)b * mask.T * W, *key = row + (mask.NH + h * mask.KVH / mask.NH) * HS;

    uint32_t q[HS / 16][M][4];
    rows_load<HS, M>(q, row + (ptrdiff_t)i * W + h * HS, W, mask.T - i);

    float o[M][HS / 8][4], maximum[M][2], sum[M][2];
    sums_fill(o, 0);
    for (int m = 0; m < M; m++)
        for (int r = 0; r < 2; r++) maximum[m][r] = -INFINITY, sum[m][r] = 0;
    const float scale = rsqrtf((float)HS) * LOG2_E;
    for_key_tiles<HS, M, KEYS>(mask, b, i0, key, W, [&](int stage, int j, int seen, const int4 *keys) {
        float s[M][KEYS / 8][4];
        sums_fill(s, 0);
        product_rows<HS>(s, q, stage);
        if (seen == 1) scores_mask<KEYS>(s, keys, j);
        float larger[M][2], rise = 0;
        for (int m = 0; m < M; m++)
            for (int r = 0; r < 2; r++) {
                float x = s[m][0][2 * r];
                for (int n = 0; n < KEYS / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                larger[m][r] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                // -inf - -inf is NaN where nothing is seen yet: fmaxf ignores it
                rise = fmaxf(rise, (larger[m][r] - maximum[m][r]) * scale);
            }
        if (__any_sync(0xffffffffu, rise > 8)) { // only then: p may grow to 2^8, far from any limit
            float keep[M][2];
            for (int m = 0; m < M; m++)
                for (int r = 0; r < 2; r++) {
                    const float higher = fmaxf(maximum[m][r], larger[m][r]);
                    keep[m][r] = exp2_fast(maximum[m][r] * scale - (higher == -INFINITY ? 0 : higher * scale));
                    maximum[m][r] = higher;
                    sum[m][r] *= keep[m][r];
                }
            sums_scale(o, keep);
        }
        for (int m = 0; m < M; m++)
            for (int r = 0; r < 2; r++) {
                const float shift = maximum[m][r] == -INFINITY ? 0 : maximum[m][r] * scale;
                for (int n = 0; n < KEYS / 8; n++)
                    for (int e = 0; e < 2; e++) {
                        s[m][n][2 * r + e] = exp2_fast(s[m][n][2 * r + e] * scale - shift);
                        sum[m][r] += s[m][n][2 * r + e];
                    }
            }
        product_columns<HS>(o, s, stage + TILE);
    });

    float inverse[M][2];
    for (int m = 0; m < M; m++)
        for (int r = 0; r < 2; r++) {
            const int at = i + 16 * m + 8 * r + g;
            const float total = warp_sum<4>(sum[m][r]);
            if (t == 0 && at < mask.T)
                lse[(size_t)blockIdx.x * mask.T + at] = maximum[m][r] * rsqrtf((float)HS) + logf(total);
            inverse[m][r] = 1 / total;
        }
    sums_scale(o, inverse);
    rows_store<HS, M>(out + ((size_t)b * mask.T + i) * O + h * HS, O, mask.T - i, o, warp * 16 * M * HS * 2);
}

/* dq and D, as in the forward pass; q and dout stay in registers. Bound by arithmetic: 6 HS FLOP a pair. */
template <int HS, int M, int KEYS>
KERNEL(128, HS == 128 ? 1 : 2)
attention_backward_queries_kernel(bf16 *dqkv, float *D, const bf16 *dout, const bf16 *out, const float *lse,
                                  const bf16 *qkv, const slam_mask mask) {
    constexpr int QUERIES = 64 * M, TILE = KEYS * HS * 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int h = blockIdx.x % mask.NH, b = blockIdx.x / mask.NH, i0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int W = (mask.NH + 2 * mask.KVH) * HS, O = mask.NH * HS, i = i0 + warp * 16 * M; // i: first query of the warp
    const size_t first = (size_t)b * mask.T;
    const bf16 *key = qkv + first * W + (mask.NH + h * mask.KVH / mask.NH) * HS;

    uint32_t q[HS / 16][M][4], d[HS / 16][M][4];
    float shift[M][2], Di[M][2]; // lse log2 e, D
    rows_load<HS, M>(q, out + (first + i) * O + h * HS, O, mask.T - i);
    rows_load<HS, M>(d, dout + (first + i) * O + h * HS, O, mask.T - i);
    for (int m = 0; m < M; m++)
        for (int r = 0; r < 2; r++) {
            const int at = i + 16 * m + 8 * r + g;
            const size_t query = (size_t)blockIdx.x * mask.T + at;
            Di[m][r] = rows_dot(q, d, m, r);
            shift[m][r] = at < mask.T ? lse[query] * LOG2_E : 0;
            if (at < mask.T && t == 0) D[query] = Di[m][r];
        }
    rows_load<HS, M>(q, qkv + (first + i) * W + h * HS, W, mask.T - i);

    float dq[M][HS / 8][4];
    sums_fill(dq, 0);
    const float scale = rsqrtf((float)HS);
    for_key_tiles<HS, M, KEYS>(mask, b, i0, key, W, [&](int stage, int j, int seen, const int4 *keys) {
        float p[M][KEYS / 8][4], ds[M][KEYS / 8][4];
        sums_fill(p, 0), sums_fill(ds, 0);
        product_rows<HS>(p, q, stage);
        product_rows<HS>(ds, d, stage + TILE);
        if (seen == 1) scores_mask<KEYS>(p, keys, j);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < KEYS / 8; n++)
                for (int k = 0; k < 4; k++) {
                    p[m][n][k] = exp2_fast(p[m][n][k] * (scale * LOG2_E) - shift[m][k / 2]);
                    ds[m][n][k] = p[m][n][k] * (ds[m][n][k] - Di[m][k / 2]);
                }
        product_columns<HS>(dq, ds, stage);
    });
    rows_store_rotated<HS, M>(dqkv + (first + i) * W + h * HS, W, dq, warp * 16 * M * HS * 2, mask, b, i);
}

/* dk and dv: a block has 16 M KW keys of a key/value head. Its warps form GROUPS groups of KW, to which the pairs of a
   head that reads this one and a tile of QUERIES queries are dealt in turn; in the end the groups' sums are added. So a
   block has many warps and yet few keys: there are enough blocks even where heads share keys. A warp has 16 M keys,
   whose dk and dv stay in registers. s and dp are computed transposed, keys by queries, so that p and ds come out as
   the products with dout and q need them. Bound by arithmetic: four products, 8 HS FLOP a pair of query and key. */
template <int HS, int M, int KW, int GROUPS, int QUERIES>
KERNEL(32 * KW * GROUPS, 1)
attention_backward_keys_kernel(bf16 *dqkv, const float *D, const bf16 *dout, const float *lse, const bf16 *qkv,
                               const slam_mask mask) {
    constexpr int KEYS = 16 * M * KW, THREADS = 32 * KW, TILE = QUERIES * HS * 2, V = KEYS * HS * 2, STAGES = 2 * V;
    static_assert(2 * QUERIES <= THREADS && QUERIES <= 32 && KW <= 4,
                  "a thread for each number that is kept with a query");
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS, warp = thread / 32;
    const int kv = blockIdx.x % mask.KVH, b = blockIdx.x / mask.KVH, j0 = blockIdx.y * KEYS, j = j0 + warp * 16 * M;
    const int heads = mask.NH / mask.KVH, W = (mask.NH + 2 * mask.KVH) * HS, O = mask.NH * HS;
    const size_t first = (size_t)b * mask.T;
    // Shared memory: tiles of k and v; for each group two stages of q and dout; for the queries of a stage the keys
    // that they see, lse log2 e and -D.
    int4 *keys = (int4 *)(shared_memory() + STAGES + GROUPS * 4 * TILE);
    float *statistics = (float *)(keys + GROUPS * 2 * QUERIES);
    float *range = statistics + GROUPS * 4 * QUERIES; // (warps)
    const bf16 *key = qkv + (first + j0) * W + (mask.NH + kv) * HS;
    tile_load<HS, KEYS, THREADS * GROUPS>(0, key, W, mask.T - j0, threadIdx.x);
    tile_load<HS, KEYS, THREADS * GROUPS>(V, key + mask.KVH * HS, W, mask.T - j0, threadIdx.x);
    int begin = mask.T, end = 0; // the queries that see a key here
    for (int i = (mask.doc_end ? 0 : j0) + threadIdx.x; i < mask.T; i += THREADS * GROUPS)
        if (sees_any(keys_of(mask, b, i), j0, j0 + KEYS)) begin = min(begin, i), end = i + 1;
    const int tile0 = (int)-block_max(-(float)begin, range) / QUERIES; // their tiles: tile0 and the next ones
    const int tiles = ((int)block_max((float)end, range) + QUERIES - 1) / QUERIES - tile0;

    float dk[M][HS / 8][4], dv[M][HS / 8][4];
    sums_fill(dk, 0), sums_fill(dv, 0);
    const float scale = rsqrtf((float)HS);
    int next_head = group / max(tiles, 1), next = group % max(tiles, 1), arrived = 0; // the group's next head and tile
    for (int round = -1; tiles > 0 && round * GROUPS < heads * tiles; round++) {
        copy_async_wait();
        __syncthreads();            // the tiles are there, and no warp reads those of the round before
        int4 queued = {0, 0, 0, 0}; // for a query of the next tiles: its keys, or lse log2 e and -D
        const int next_stage = (round + 1) % 2 + 2 * group, more = next_head < heads;
        if (more) {
            const int h = kv * heads + next_head, i0 = (tile0 + next) * QUERIES, i = i0 + thread % QUERIES;
            const int tile = STAGES + next_stage * 2 * TILE;
            tile_load<HS, QUERIES, THREADS>(tile, qkv + (first + i0) * W + h * HS, W, mask.T - i0, thread);
            tile_load<HS, QUERIES, THREADS>(tile + TILE, dout + (first + i0) * O + h * HS, O, mask.T - i0, thread);
            if (thread < QUERIES) queued = keys_of(mask, b, i);
            else if (thread < 2 * QUERIES && i < mask.T) {
                const size_t query = ((size_t)b * mask.NH + h) * mask.T + i;
                queued.x = __float_as_int(lse[query] * LOG2_E);
                queued.y = __float_as_int(-D[query]);
            }
        }
        const int stage = (round & 1) + 2 * group;
        const int seen = arrived ? seen_of<QUERIES>(keys + stage * QUERIES, j, j + 16 * M) : 0;
        if (seen) {
            const int q_tile = STAGES + stage * 2 * TILE, own = warp * 16 * M * HS * 2;
            const float *shift = statistics + stage * 2 * QUERIES + 2 * t, *minus_D = shift + QUERIES;
            float p[M][QUERIES / 8][4], ds[M][QUERIES / 8][4];
            sums_fill(p, 0);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < QUERIES / 8; n++)
                    for (int k = 0; k < 4; k++) ds[m][n][k] = minus_D[8 * n + k % 2];
            product_tiles<HS>(p, own, q_tile);
            product_tiles<HS>(ds, V + own, q_tile + TILE);
            if (seen == 1) {
                const unsigned bits = seen_bits(keys[stage * QUERIES + lane % QUERIES], j);
                for (int n = 0; n < QUERIES / 8; n++)
                    for (int e = 0; e < 2; e++) {
                        const unsigned see = __shfl_sync(0xffffffffu, bits, 8 * n + 2 * t + e) >> g;
                        for (int m = 0; m < M; m++)
                            for (int r = 0; r < 2; r++)
                                if (!(see >> (16 * m + 8 * r) & 1)) p[m][n][2 * r + e] = -INFINITY;
                    }
            }
            for (int m = 0; m < M; m++)
                for (int n = 0; n < QUERIES / 8; n++)
                    for (int k = 0; k < 4; k++) {
                        p[m][n][k] = exp2_fast(p[m][n][k] * (scale * LOG2_E) - shift[8 * n + k % 2]);
                        ds[m][n][k] *= p[m][n][k];
                    }
            product_columns<HS>(dv, p, q_tile + TILE);
            product_columns<HS>(dk, ds, q_tile);
        }
        if (more && thread < QUERIES) keys[next_stage * QUERIES + thread] = queued;
        else if (more && thread < 2 * QUERIES) {
            statistics[next_stage * 2 * QUERIES + thread - QUERIES] = __int_as_float(queued.x);
            statistics[next_stage * 2 * QUERIES + thread] = __int_as_float(queued.y);
        }
        arrived = more;
        for (next += GROUPS; next >= tiles; next -= tiles) next_head++;
    }

    copy_async_wait();
    __syncthreads(); // without tiles k and v are still arriving, and below they are overwritten
    groups_add<GROUPS, THREADS>(dk, (float *)(shared_memory() + STAGES));
    groups_add<GROUPS, THREADS>(dv, (float *)(shared_memory() + STAGES));
    if (group > 0) return;
    bf16 *to = dqkv + (first + j) * W + (mask.NH + kv) * HS; // only this warp reads these rows of the tiles of k and v
    rows_store_rotated<HS, M>(to, W, dk, warp * 16 * M * HS * 2, mask, b, j);
    rows_store<HS, M>(to + mask.KVH * HS, W, mask.T - j, dv, V + warp * 16 * M * HS * 2);
}

/* Launches a kernel that may use more than 48 kB of shared memory. */
#define LAUNCH_LARGE(ops, kernel, grid, block, shared_bytes, ...)                                                      \
    (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(shared_bytes)),                   \
     LAUNCH(ops, kernel, grid, block, shared_bytes, __VA_ARGS__))

template <int HS, int M, int KEYS>
static void attention_forward_fast(slam_ops *ops, bf16 *out, float *lse, const bf16 *qkv, const slam_mask *mask) {
    const size_t shared = 4 * KEYS * HS * 2 + 64 * M * sizeof(int4);
    const dim3 grid(mask->B * mask->NH, blocks(mask->T, 64 * M));
    LAUNCH_LARGE(ops, (attention_forward_kernel<HS, M, KEYS>), grid, 128, shared, out, lse, qkv, *mask);
}

template <int HS, int M, int KW, int GROUPS>
static void attention_backward_fast(slam_ops *ops, bf16 *dqkv, float *D, const bf16 *dout, const bf16 *out,
                                    const float *lse, const bf16 *qkv, const slam_mask *mask) {
    constexpr int KEYS = 32, OWN_KEYS = 16 * M * KW, QUERIES = 32;
    const size_t of_query = 2 * HS * 2 + sizeof(int4) + 2 * sizeof(float); // bytes of a query in a stage
    const size_t shared = 4 * KEYS * HS * 2 + 64 * M * sizeof(int4);
    const size_t shared_keys = 2 * OWN_KEYS * HS * 2 + GROUPS * 2 * QUERIES * of_query + KW * GROUPS * sizeof(float);
    const dim3 grid(mask->B * mask->NH, blocks(mask->T, 64 * M)),
        grid_keys(mask->B * mask->KVH, blocks(mask->T, OWN_KEYS));
    LAUNCH_LARGE(ops, (attention_backward_queries_kernel<HS, M, KEYS>), grid, 128, shared, dqkv, D, dout, out, lse, qkv,
                 *mask);
    LAUNCH_LARGE(ops, (attention_backward_keys_kernel<HS, M, KW, GROUPS, QUERIES>), grid_keys, 32 * KW * GROUPS,
                 shared_keys, dqkv, (const float *)D, dout, lse, qkv, *mask);
}

/* ---- attention: the ops ---- */

static int attention_fits(slam_ops *ops, const slam_mask *mask, const char *operation) {
    if (mask->HS > 32 * PLAIN_CHANNELS) cuda_fail(ops, operation, "heads of more than 256 channels", 0);
    return mask->HS <= 32 * PLAIN_CHANNELS && mask->B * mask->T > 0;
}

template <typename T>
static void cuda_attention_forward(slam_ops *ops, slam_act *out, float *lse, slam_act *qkv, const slam_mask *mask) {
    const int W = (mask->NH + 2 * mask->KVH) * mask->HS;
    const T *q = (const T *)qkv;
    if (!attention_fits(ops, mask, __func__)) return;
    rotate_heads(ops, __func__, (T *)qkv, (T *)NULL, NULL, mask);
    if constexpr (sizeof(T) == 2) {
        if (mask->HS == 32) return attention_forward_fast<32, 2, 64>(ops, (T *)out, lse, q, mask);
        if (mask->HS == 64) return attention_forward_fast<64, 2, 64>(ops, (T *)out, lse, q, mask);
        if (mask->HS == 128) return attention_forward_fast<128, 1, 64>(ops, (T *)out, lse, q, mask);
    }
    attention_plain(ops, __func__, (T *)out, lse, q, q + mask->NH * mask->HS, W, (const int *)NULL, mask);
}

template <typename T>
static void cuda_attention_backward(slam_ops *ops, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out,
                                    const float *lse, const slam_act *qkv, const slam_mask *mask) {
    T *to = (T *)dqkv;
    const T *d = (const T *)dout, *o = (const T *)out, *from = (const T *)qkv;
    if (!attention_fits(ops, mask, __func__)) return;
    if constexpr (sizeof(T) == 2) {
        const int HS = mask->pairs == 0 || 2 * mask->pairs == mask->HS ? mask->HS : 0; // rotated as a whole
        if (HS == 32) return attention_backward_fast<32, 2, 2, 4>(ops, to, D, d, o, lse, from, mask);
        if (HS == 64) return attention_backward_fast<64, 2, 2, 4>(ops, to, D, d, o, lse, from, mask);
        if (HS == 128) return attention_backward_fast<128, 1, 4, 1>(ops, to, D, d, o, lse, from, mask);
    }
    const unsigned tokens = (unsigned)mask->B * mask->T;
    const size_t shared = (2 * mask->HS + 64) * sizeof(float);
    WITH_P(mask->HS % WIDE<T> == 0, {
        LAUNCH(ops, (attention_backward_queries_plain<T, P>), tokens * mask->NH, 32, shared, to, D, d, o, lse, from,
               *mask);
        LAUNCH(ops, (attention_backward_keys_plain<T, P>), tokens * mask->KVH, 32, shared, to, (const float *)D, d, lse,
               from, *mask);
    });
}

template <typename T>
static void cuda_attention_decode(slam_ops *ops, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths,
                                  const slam_mask *mask) {
    if (!attention_fits(ops, mask, __func__)) return;
    rotate_heads(ops, __func__, (T *)qkv, (T *)cache, lengths, mask);
    attention_plain(ops, __func__, (T *)out, NULL, (const T *)qkv, (const T *)cache, 2 * mask->KVH * mask->HS, lengths,
                    mask);
}

/* 4 KVH HS sizeof(T) bytes a token. A row is a key or value head of a token. */
template <typename T> struct fill_op {
    T *cache;
    const T *qkv;
    const int *slots, *lengths;
    int capacity;
    slam_mask mask;
    template <int P> __device__ void run(unsigned row, size_t c) const {
        const int heads = 2 * mask.KVH, h = row % heads, token = row / heads, t = token % mask.T, b = token / mask.T;
        const size_t to = (((size_t)slots[b] * capacity + t) * heads + h) * mask.HS + c;
        const size_t from = ((size_t)token * (mask.NH + heads) + mask.NH + h) * mask.HS + c;
        if (t < lengths[b]) packed<P>(cache + to) = packed<P>(qkv + from);
    }
};

template <typename T>
static void cuda_attention_fill(slam_ops *ops, slam_act *cache, const slam_act *qkv, const int *slots,
                                const int *lengths, int capacity, const slam_mask *mask) {
    const fill_op<T> op = {(T *)cache, (const T *)qkv, slots, lengths, capacity, *mask};
    each<WIDE<T>>(ops, __func__, (size_t)mask->B * mask->T * 2 * mask->KVH, mask->HS, op, cache, qkv);
}

/* ---- speech encoders ---- */

/* Unfolds frames first, first + 1, ... of group g, counted through the batch, to rows of a matrix (frames,K C), so that
   a convolution is a product. A row is a tap of a frame. n K C sizeof(T) bytes written; most reads hit the caches. */
template <typename T> struct unfold_op {
    T *columns;
    const T *x;
    slam_conv conv;
    int g, first;
    template <int P> __device__ void run(unsigned row, size_t c) const {
        const int tap = row % conv.K, frame = first + row / conv.K, b = frame / conv.TO;
        const int t = frame % conv.TO * conv.stride + tap * conv.dilation - conv.before;
        float a[P] = {0}, scale[P], shift[P];
        if (t >= 0 && t < (conv.lengths ? conv.lengths[b] : conv.T)) {
            load(a, x + (((size_t)b * conv.T + t) * conv.G + g) * conv.C + c);
            if (conv.scale) load(scale, (const T *)conv.scale + g * conv.C + c);
            if (conv.scale) load(shift, (const T *)conv.shift + g * conv.C + c);
            for (int k = 0; k < P; k++) {
                if (conv.scale) a[k] = a[k] * scale[k] + shift[k];
                a[k] = a[k] > 0 ? a[k] : conv.slope * a[k];
            }
        }
        store(columns + (size_t)row * conv.C + c, a);
    }
};

/* As many frames at a time as fit behind the workspace of the product. Bound by arithmetic; the first convolution of an
   encoder, from one channel, by memory. */
template <typename T>
static void cuda_conv1d(slam_ops *ops, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b,
                        const slam_conv *conv) {
    const int W = conv->K * conv->C, OC = conv->OC, N = conv->B * conv->TO,
              flags = TRANS_B | (conv->output == SLAM_ADD ? ADD : 0);
    const int most = (CUDA_WORKSPACE - PRODUCT_WORKSPACE) / (int)sizeof(T) / W;
    T *columns = (T *)(((cuda_ops *)ops)->workspace + PRODUCT_WORKSPACE), *to = (T *)out;
    if (most == 0) return cuda_fail(ops, __func__, "too many taps and channels", 0);
    for (int g = 0; g < conv->G; g++)
        for (int first = 0, n; first < N; first += n) {
            n = min(most, N - first);
            each<WIDE<T>>(ops, __func__, (size_t)n * conv->K, conv->C,
                          unfold_op<T>{columns, (const T *)x, *conv, g, first}, x, conv->scale, conv->shift);
            product(ops, __func__, flags, n, OC, W, columns, (const T *)w + (size_t)g * OC * W,
                    b ? (const T *)b + g * OC : NULL, to + ((size_t)first * conv->G + g) * OC, conv->G * OC);
        }
    if (conv->output == SLAM_GELU || conv->output == SLAM_RELU)
        each<WIDE<T>>(ops, __func__, 1, (size_t)N * conv->G * OC, activation_op<T>{to, to, conv->output == SLAM_RELU},
                      out);
}

/* A block has 32 channels of a row, a lane one of them; its 16 warps take frames in turn. Three passes: mean, variance,
   output. Bound by memory: x is read three times and written once, 4 B T C sizeof(T) bytes. */
template <typename T>
KERNEL(512)
channelnorm_kernel(T *x, const T *w, const T *b, const int *lengths, float eps, int frames, int C) {
    float *sums = (float *)shared_memory(), mean = 0, r = 0; // sums: (16,32)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane, n = lengths[blockIdx.y];
    T *row = x + (size_t)blockIdx.y * frames * C + c;
    for (int pass = 0; pass < 2; pass++) {
        float sum = 0, total = 0;
        for (int t = warp; t < n && c < C; t += 16) {
            const float a = (float)row[(size_t)t * C] - mean;
            sum += pass ? a * a : a;
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        for (int k = 0; k < 16; k++) total += sums[k * 32 + lane];
        if (pass) r = 1 / sqrtf(total / (float)n + eps);
        else mean = total / (float)n;
        __syncthreads();
    }
    for (int t = warp; t < frames && c < C; t += 16) {
        T *to = row + (size_t)t * C;
        *to = (T)(t < n ? gelu_of((float)w[c] * (((float)*to - mean) * r) + (float)b[c]) : 0);
    }
}

template <typename T>
static void cuda_channelnorm(slam_ops *ops, slam_act *x, const slam_act *w, const slam_act *b, const int *lengths,
                             float eps, int B, int frames, int C) {
    if (B == 0 || frames == 0) return;
    LAUNCH(ops, (channelnorm_kernel<T>), dim3(blocks(C, 32), B), 512, 512 * sizeof(float), (T *)x, (const T *)w,
           (const T *)b, lengths, eps, frames, C);
}

/* A warp has a row, a lane every 32nd centroid in order; then lanes are compared, the lower number where distances are
   equal. Bound by memory: 4 N K bytes. */
KERNEL(256) nearest_kernel(int *nearest, const float *scores, const float *squares, int N, int K) {
    const int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= N) return; // the whole warp
    float least = INFINITY;
    int at = K;
    for (int k = lane; k < K; k += 32) {
        const float distance = squares[k] - 2 * scores[(size_t)i * K + k];
        if (distance < least) least = distance, at = k;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, least, offset);
        const int other_at = __shfl_xor_sync(0xffffffffu, at, offset);
        if (other < least || (other == least && other_at < at)) least = other, at = other_at;
    }
    if (lane == 0) nearest[i] = at < K ? at : 0; // K: no distance was a number
}

static void cuda_nearest(slam_ops *ops, int *nearest, float *scores, const slam_act *x, const slam_act *centroids,
                         const float *squares, int N, int D, int K) {
    if (N == 0) return;
    product(ops, __func__, TRANS_B | FLOAT_OUT, N, K, D, x, centroids, NULL, scores, K);
    LAUNCH(ops, nearest_kernel, blocks(N, 8), 256, 0, nearest, (const float *)scores, squares, N, K);
}

/* ---- the backend ---- */

int slam_cuda_count(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) n = 0;
    cudaGetLastError(); // or the first launch would return it
    return n;
}

/* Is there such a GPU, and can it run this build? */
static int cuda_usable(int device, cudaDeviceProp *p) {
    int n = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (!error && device >= 0 && device < n) error = cudaGetDeviceProperties(p, device);
    if (!error && device >= 0 && device < n) error = cudaSetDevice(device);
    cudaGetLastError();
    if (error) // no driver, one older than this build's CUDA, no GPU, ...
        return set_error("cuda:%d: cannot be used: %s (nvidia-smi shows the driver and the GPUs)", device,
                         cudaGetErrorString(error));
    if (device < 0 || device >= n) return set_error("cuda:%d: no such GPU: found %d, numbered from 0", device, n);
    if (p->major < 8)
        return set_error("cuda:%d: %s has compute capability %d.%d, expected 8.0 or higher (Ampere, 2020)", device,
                         p->name, p->major, p->minor);
    error = cudaFuncGetAttributes(&attributes, add_partial_kernel);
    cudaGetLastError();
    if (error || attributes.ptxVersion < 80) // older PTX would be compiled for any newer GPU, but without these kernels
        return set_error("cuda:%d: this build has no code for %s (%d.%d): use nvcc -arch=native "
                         "(make CUDA_ARCH=native)",
                         device, p->name, p->major, p->minor);
    return 1;
}

template <typename T> static void cuda_fill_ops(slam_ops *ops) {
#define CUDA_OP(name)  ops->name = cuda_##name
#define TYPED_OP(name) ops->name = cuda_##name<T>
    CUDA_OP(alloc), CUDA_OP(release), CUDA_OP(upload), CUDA_OP(download), CUDA_OP(copy), CUDA_OP(zero);
    CUDA_OP(finish), CUDA_OP(close), CUDA_OP(comm_begin), CUDA_OP(comm_end), CUDA_OP(comm_done);
    TYPED_OP(to_act), TYPED_OP(to_float), TYPED_OP(embedding_forward), TYPED_OP(embedding_backward);
    TYPED_OP(rmsnorm_forward), TYPED_OP(rmsnorm_backward), CUDA_OP(matmul_forward), CUDA_OP(matmul_backward_input);
    TYPED_OP(matmul_backward_weight), TYPED_OP(attention_forward), TYPED_OP(attention_backward);
    TYPED_OP(attention_decode), TYPED_OP(attention_fill), TYPED_OP(swiglu_forward), TYPED_OP(swiglu_backward);
    TYPED_OP(crossentropy), TYPED_OP(adamw), TYPED_OP(conv1d);
    TYPED_OP(gelu_forward), TYPED_OP(layernorm), TYPED_OP(channelnorm);
    CUDA_OP(nearest), ops->sum = cuda_sum<0>, ops->sum_squares = cuda_sum<1>;
}

slam_ops *slam_cuda(int device, int act_bytes) {
    cudaDeviceProp p;
    if (act_bytes != 2 && act_bytes != 4) {
        set_error("cuda:%d: activations of %d bytes, expected 2 (bf16) or 4 (float)", device, act_bytes);
        return NULL;
    }
    if (!cuda_usable(device, &p)) return NULL;
    cuda_ops *cuda = NEW(cuda_ops, 1);
    slam_ops *ops = &cuda->ops;
    snprintf(cuda->name, sizeof cuda->name, "cuda:%d %s%s", device, p.name, act_bytes == 4 ? ", f32" : "");
    cuda->device = device;
    cuda->processors = p.multiProcessorCount;
    ops->name = cuda->name;
    ops->act_bytes = act_bytes;
    ops->asynchronous = 1;
    ops->threads = omp_get_max_threads();
    ops->memory = p.totalGlobalMem;
    ops->products = &cuda->products;
    snprintf(cuda->products.library, sizeof cuda->products.library, "cuBLASLt %zu, %.100s, %s", cublasLtGetVersion(),
             p.name, act_bytes == 2 ? "bf16" : "f32");
    if (act_bytes == 2) cuda_fill_ops<bf16>(ops);
    else cuda_fill_ops<float>(ops);
    cudaError_t error = cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking);
    if (!error) error = cudaStreamCreateWithFlags(&cuda->comm, cudaStreamNonBlocking);
    if (!error) error = cudaEventCreateWithFlags(&cuda->order, cudaEventDisableTiming);
    if (!error) error = cudaMalloc(&cuda->workspace, CUDA_WORKSPACE);
    cudaGetLastError();
    ops->comm_stream = cuda->comm;
    const cublasStatus_t status = error ? CUBLAS_STATUS_SUCCESS : cublasLtCreate(&cuda->lt);
    if (error) set_error("%s: cannot be used: %s", cuda->name, cudaGetErrorString(error));
    else if (status) set_error("%s: cuBLASLt does not start: %s", cuda->name, cublasLtGetStatusString(status));
    else {
        // cuBLASLt loads its kernels with its first products: now, before a model takes the rest of the memory
        enum { N = 256 };
        slam_act *x = (slam_act *)(cuda->workspace + PRODUCT_WORKSPACE),
                 *y = (slam_act *)(cuda->workspace + PRODUCT_WORKSPACE * 5 / 4);
        ops->matmul_forward(ops, y, x, x, x, N, N, N);
        ops->matmul_backward_input(ops, y, x, x, N, N, N);
        ops->matmul_backward_weight(ops, (float *)y, NULL, x, x, N, N, N);
        if (ops->finish(ops)) return ops;
    }
    cuda_close(ops);
    return NULL;
}
#endif

/* ==========================================================================================
   SECTION 6. COMM       several processes: MPI and NCCL
   Data parallelism: rank k computes the gradient of its rows; an update needs the sum G over the n ranks.
     reduce-scatter   each rank gets the sum of its part of G         (n - 1) / n |G| sent by each
     update           of that part's weights, whose moments it alone keeps (ZeRO-1)
     all-gather       each rank gets the new weights of all parts     (n - 1) / n |W| sent by each
   Together that is the traffic of one ring all-reduce, and an n-th of the update's work. MPI starts the processes and
   exchanges host memory, NCCL the memory of GPUs.
   ========================================================================================== */
#ifdef SLAM_MPI
#define OMPI_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#endif
#if defined(SLAM_NCCL) && !defined(SLAM_EMULATOR)
#include <nccl.h>
#endif

struct slam_comm_state {
    slam_ops *ops;
    int started; // MPI_Init was called here, so MPI_Finalize is as well
    int lost;    // an exchange failed here. The others may be inside it, so this rank takes no further part
    float *x;    // (n) array of the reduce-scatter under way; NULL: there is none
    size_t n, capacity;
    float *received; // (size,part)
#ifdef SLAM_MPI
    MPI_Request *requests; // (2,size): from each rank, to each rank
#endif
#ifdef SLAM_NCCL
    ncclComm_t nccl;
#endif
};

static int takes_part(const slam_comm *c) { return c && c->size > 1 && !c->state->lost; }

typedef struct range {
    size_t first, end; // first <= i < end
} range;

/* This rank's share of n items: contiguous, nearly equal. */
static range comm_share(const slam_comm *c, size_t n) {
    const size_t size = c ? c->size : 1, rank = c ? c->rank : 0;
    const range r = {n * rank / size, n * (rank + 1) / size};
    return r;
}

/* The part of n numbers that a rank reduces and updates: n / size rounded down to 64, because NCCL needs equal parts
   and kernels an alignment of 256 bytes. The last rank's part includes the rest. */
static range comm_part(const slam_comm *c, int rank, size_t n) {
    const size_t each = n / (c ? c->size : 1) / 64 * 64;
    const range r = {rank * each, !c || rank == c->size - 1 ? n : (rank + 1) * each};
    return r;
}

/* 1 if mpirun or srun started this process. (MPI_Init without them takes a tenth of a second.) */
static int comm_launched(void) {
    return getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK") || getenv("PMI_RANK") || getenv("PMI_SIZE");
}

/* Processes that do not see each other would each train the whole run in the same folder. mpirun may be in an srun. */
static int launcher_check(void) {
    const char *mpirun = getenv("OMPI_COMM_WORLD_SIZE") ? getenv("OMPI_COMM_WORLD_SIZE") : getenv("PMI_SIZE");
    const char *tasks = mpirun ? mpirun : getenv("SLURM_STEP_NUM_TASKS"), *launcher = mpirun ? "mpirun" : "srun";
    if (!tasks || atoi(tasks) < 2) return 1;
    return set_error("%s started %s processes, but this one sees only itself: build with this launcher's MPI "
                     "(libopenmpi-dev, then make); srun needs --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH)",
                     launcher, tasks);
}

/* ---- host memory, over MPI ---- */

#ifdef SLAM_MPI
static long ranks_max(long x) {
    MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_LONG, MPI_MAX, MPI_COMM_WORLD);
    return x;
}

static void ranks_broadcast(void *x, size_t bytes, int from) {
    MPI_Bcast(x, (int)bytes, MPI_BYTE, from, MPI_COMM_WORLD);
}

/* all (size,bytes): every rank's x. x may be this rank's part of it. */
static void ranks_gather(slam_comm *c, void *all, const void *x, size_t bytes) {
    const int in_place = x == (char *)all + c->rank * bytes, n = (int)bytes;
    MPI_Allgather(in_place ? MPI_IN_PLACE : x, n, MPI_BYTE, all, n, MPI_BYTE, MPI_COMM_WORLD);
}

/* Starts to send each rank its part of s->x and to receive this rank's part of every rank's. */
static void ranks_send_parts(slam_comm *c) {
    struct slam_comm_state *s = c->state;
    const range own = comm_part(c, c->rank, s->n);
    const size_t size = c->size, own_n = own.end - own.first;
    if (!s->requests) s->requests = NEW(MPI_Request, 2 * size);
    GROW(float, s->received, s->capacity, size *own_n);
    for (int k = 0; k < c->size; k++) {
        const range part = comm_part(c, k, s->n);
        const int part_n = (int)(part.end - part.first);
        MPI_Irecv(s->received + k * own_n, (int)own_n, MPI_FLOAT, k, 0, MPI_COMM_WORLD, &s->requests[k]);
        MPI_Isend(s->x + part.first, part_n, MPI_FLOAT, k, 0, MPI_COMM_WORLD, &s->requests[size + k]);
    }
}

/* Completes the reduce-scatter under way: sums this rank's part over the ranks, in their order. */
static void reduction_end(slam_comm *c) {
    struct slam_comm_state *s = c->state;
    if (!s->x) return;
    MPI_Waitall(2 * c->size, s->requests, MPI_STATUSES_IGNORE);
    const range part = comm_part(c, c->rank, s->n);
    const size_t n = part.end - part.first;
    PARALLEL_FOR
    for (size_t i = 0; i < n; i++) {
        float sum = s->received[i];
        for (int k = 1; k < c->size; k++) sum += s->received[k * n + i];
        s->x[part.first + i] = sum;
    }
    s->x = NULL;
}

/* MPI moves messages only while it is called. */
static void comm_progress(slam_comm *c) {
    int done;
    if (c && c->state->x) MPI_Testall(2 * c->size, c->state->requests, &done, MPI_STATUSES_IGNORE);
}

#else
// clang-format off
static long ranks_max(long x) { return x; }
static void ranks_broadcast(void *x, size_t bytes, int from) { (void)x; (void)bytes; (void)from; }
static void ranks_gather(slam_comm *c, void *all, const void *x, size_t n) { (void)c; (void)all; (void)x; (void)n; }
static void ranks_send_parts(slam_comm *c) { (void)c; }
static void reduction_end(slam_comm *c) { (void)c; }
static void comm_progress(slam_comm *c) { (void)c; }
// clang-format on
#endif

void slam_comm_finalize(slam_comm *c, int status) {
    if (!c) return;
    struct slam_comm_state *s = c->state;
    if (s->ops) s->ops->comm = NULL;
#ifdef SLAM_MPI
    if (s->started && status && c->size > 1 && !c->failed) {
        fflush(NULL);
        MPI_Abort(MPI_COMM_WORLD, status);
    }
#ifdef SLAM_NCCL
    if (s->nccl) ncclCommDestroy(s->nccl);
#endif
    if (s->started) MPI_Finalize();
    free(s->requests);
#endif
    (void)status;
    free(s->received);
    free(s);
    free(c);
}

slam_comm *slam_comm_init(void) {
    slam_comm *c = NEW(slam_comm, 1);
    c->state = NEW(struct slam_comm_state, 1);
    c->size = c->local_size = c->zero = 1;
#ifdef SLAM_MPI
    int running = 0, level;
    MPI_Comm machine;
    MPI_Initialized(&running);
    c->state->started = !running && comm_launched();
    if (c->state->started) MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    if (running || c->state->started) {
        MPI_Comm_rank(MPI_COMM_WORLD, &c->rank);
        MPI_Comm_size(MPI_COMM_WORLD, &c->size);
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &machine);
        MPI_Comm_rank(machine, &c->local_rank);
        MPI_Comm_size(machine, &c->local_size);
        MPI_Comm_free(&machine);
    }
#endif
    if (c->size > 1 || launcher_check()) return c;
    slam_comm_finalize(c, 1);
    return NULL;
}

void slam_comm_attach(slam_comm *c, slam_ops *ops) {
    if (!c || c->size == 1) return;
    ops->comm = c;
    c->state->ops = ops;
}

int slam_all_ok(slam_comm *c, int ok) {
    char text[sizeof error_text];
    if (!c || c->size == 1) return ok;
    if (c->failed || !takes_part(c)) return 0;
    const int first = c->size - (int)ranks_max(ok ? 0 : c->size - c->rank); // the lowest rank that failed
    if (first == c->size) return 1;
    memcpy(text, error_text, sizeof text);
    ranks_broadcast(text, sizeof text, first);
    c->failed = 1;
    return first ? set_error("rank %d: %s", first, text) : set_error("%s", text);
}

long slam_comm_max(slam_comm *c, long x) { return takes_part(c) ? ranks_max(x) : x; }

/* 1 if x is the same on every rank: the minimum, ~max(~x), is the maximum. */
static int comm_equal(slam_comm *c, uint64_t x) { return slam_comm_max(c, (long)x) == ~slam_comm_max(c, ~(long)x); }

void slam_comm_sum(slam_comm *c, double *x, size_t n) {
    if (!takes_part(c)) return;
    double *all = NEW(double, c->size *n);
    ranks_gather(c, all, x, n * sizeof *x);
    memcpy(x, all, n * sizeof *x);
    for (int k = 1; k < c->size; k++)
        for (size_t i = 0; i < n; i++) x[i] += all[k * n + i];
    free(all);
}

/* From rank 0; fewer than 2^31 bytes. */
static void comm_broadcast(slam_comm *c, void *x, size_t bytes) {
    if (takes_part(c)) ranks_broadcast(x, bytes, 0);
}

/* Every rank's bytes (fewer than 2^31 each), in rank order. */
static strbuf comm_all_gather(slam_comm *c, const strbuf *own) {
    const int several = takes_part(c);
    strbuf all = ZERO;
    for (int k = 0; k < (several ? c->size : 1); k++) {
        size_t n = own->n;
        if (several) ranks_broadcast(&n, sizeof n, k);
        GROW(char, all.at, all.capacity, all.n + n);
        if (n && (!several || c->rank == k)) memcpy(all.at + all.n, own->at, n);
        if (several) ranks_broadcast(all.at + all.n, n, k);
        all.n += n;
    }
    return all;
}

/* ---- what the devices exchange ----
   comm_reduce_scatter and comm_gather_parts return at once; device work that is queued after comm_wait follows them.
   x has n numbers on every rank, of which comm_part is rank k's. NULL comm: nothing to do.

   Over MPI each rank sends the others their parts and sums its own in rank order. MPI_Reduce_scatter may add in an
   order that depends on the message size, and the bits must not. An error of MPI ends all processes
   (MPI_ERRORS_ARE_FATAL, the default); after an error of NCCL this rank is lost. */

static int comm_lost(slam_comm *c) {
    c->state->lost = 1;
    return 0;
}

#ifdef SLAM_NCCL
/* The stream of all NCCL calls (cudaStream_t as the driver names it), after the work queued so far. NULL: memory is
   exchanged by MPI. */
static struct CUstream_st *nccl_begin(slam_comm *c) {
    slam_ops *ops = c->state->ops;
    if (ops->comm_stream) ops->comm_begin(ops);
    return (struct CUstream_st *)ops->comm_stream;
}

static int nccl_ok(slam_comm *c, ncclResult_t result, const char *operation) {
    if (result == ncclSuccess) return 1;
    set_error("NCCL failed in %s: %s", operation, ncclGetErrorString(result));
    return comm_lost(c);
}
#endif

/* Before the first exchange of device memory. Collective. */
static int comm_connect(slam_comm *c) {
    if (!takes_part(c) || !c->state->ops->comm_stream) return 1;
#ifdef SLAM_NCCL
    ncclUniqueId id;
    if (c->state->nccl) return 1;
    memset(&id, 0, sizeof id);
    if (c->rank == 0 && !nccl_ok(c, ncclGetUniqueId(&id), "ncclGetUniqueId")) return 0;
    comm_broadcast(c, &id, sizeof id);
    return nccl_ok(c, ncclCommInitRank(&c->state->nccl, c->size, id, c->rank),
                   "ncclCommInitRank (two ranks on one GPU? NCCL_DEBUG=WARN shows more)");
#else
    return set_error(
        "%d ranks on GPUs, but this build has no NCCL: install libnccl-dev (or Python's nvidia-nccl), then make",
        c->size);
#endif
}

/* This rank's part of x becomes the sum over ranks; the other parts become undefined. n at most 2^28. */
static int comm_reduce_scatter(slam_comm *c, float *x, size_t n) {
    if (!c) return 1;
    struct slam_comm_state *s = c->state;
#ifdef SLAM_NCCL
    struct CUstream_st *stream = nccl_begin(c);
    if (stream) {
        const size_t each = comm_part(c, 0, n).end, even = each * c->size;
        ncclResult_t result = ncclSuccess;
        if (each) result = ncclReduceScatter(x, x + each * c->rank, each, ncclFloat, ncclSum, s->nccl, stream);
        if (result == ncclSuccess && even < n)
            result = ncclReduce(x + even, x + even, n - even, ncclFloat, ncclSum, c->size - 1, s->nccl, stream);
        return nccl_ok(c, result, "a reduction");
    }
#endif
    if (!s->ops->finish(s->ops)) return comm_lost(c);
    reduction_end(c);
    s->x = x;
    s->n = n;
    ranks_send_parts(c);
    return 1;
}

/* Sets x (n elements of `bytes` bytes) to the parts of all ranks. This rank's is at `part`, which may be in x. */
static int comm_gather_parts(slam_comm *c, void *x, const void *part, size_t n, size_t bytes) {
    if (!c) return 1;
    struct slam_comm_state *s = c->state;
    const size_t each = comm_part(c, 0, n).end * bytes, even = each * c->size, rest = n * bytes - even;
    char *tail = (char *)x + even; // the rest, which belongs to the last rank's part
    const char *from = c->rank == c->size - 1 ? (const char *)part + each : tail;
#ifdef SLAM_NCCL
    struct CUstream_st *stream = nccl_begin(c);
    if (stream) {
        ncclResult_t result = ncclSuccess;
        if (each) result = ncclAllGather(part, x, each, ncclChar, s->nccl, stream);
        if (result == ncclSuccess && rest)
            result = ncclBroadcast(from, tail, rest, ncclChar, c->size - 1, s->nccl, stream);
        return nccl_ok(c, result, "an all-gather");
    }
#endif
    if (!s->ops->finish(s->ops)) return comm_lost(c);
    ranks_gather(c, x, part, each);
    if (from != tail) memcpy(tail, from, rest);
    ranks_broadcast(tail, rest, c->size - 1);
    return 1;
}

static void comm_wait(slam_comm *c) {
    if (!c) return;
    if (c->state->ops->comm_stream) c->state->ops->comm_end(c->state->ops);
    reduction_end(c);
}

/* Called before the host waits for the device, which would never end if the network or another machine is gone. */
static int comm_finish(slam_comm *c) {
#ifdef SLAM_NCCL
    struct slam_comm_state *s = c ? c->state : NULL;
    while (s && s->ops->comm_stream && !s->ops->comm_done(s->ops)) {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t result = ncclCommGetAsyncError(s->nccl, &state);
        if (result != ncclSuccess || state != ncclSuccess) {
            nccl_ok(c, result != ncclSuccess ? result : state, "an exchange (NCCL_DEBUG=WARN shows more)");
            ncclCommAbort(s->nccl);
            s->nccl = NULL;
            return 0;
        }
        usleep(100);
    }
#endif
    (void)c;
    return 1;
}

/* ==========================================================================================
   SECTION 7. MODEL      configuration, weights, forward, backward, decoding
   Written once against slam_ops, for all devices. A layer is defined in three places: its tensors (layer_weights and
   the table in tensors_of), its activations (layer_acts and acts_place), and layer_forward with layer_backward. Files,
   counts of parameters and FLOPs, memory, initialisation and ZeRO's buckets follow from these.
   ========================================================================================== */

/* ---- configuration ---- */

#define AT(name) offsetof(slam_config, name)
/* Numbers of config.json: read, written and hashed from here. A new one changes the hash of every model. */
static const field config_fields[] = {
    {"vocab_size", FIELD_INT, AT(V), 1, 1 << 20, 1},
    {"hidden_size", FIELD_INT, AT(C), 1, 1 << 16, 1},
    {"intermediate_size", FIELD_INT, AT(F), 1, 1 << 20, 1},
    {"num_hidden_layers", FIELD_INT, AT(L), 1, 1 << 10, 1},
    {"num_attention_heads", FIELD_INT, AT(NH), 1, 1 << 10, 1},
    {"num_key_value_heads", FIELD_INT, AT(KVH), 1, 1 << 10, 0},
    {"head_dim", FIELD_INT, AT(HS), 2, 1 << 12, 0},
    {"max_position_embeddings", FIELD_INT, AT(T), 1, 1 << 28, 0},
    {"tie_word_embeddings", FIELD_BOOL, AT(tied), 0, 1, 0},
    {"rms_norm_eps", FIELD_REAL, AT(eps), 1e-12, 1, 0},
    {"initializer_range", FIELD_REAL, AT(init_std), 0, 10, 0},
    {"rope_theta", FIELD_REAL, AT(rope_theta), 1, 1e12, 0},
};
#undef AT
enum { CONFIG_FIELDS = sizeof config_fields / sizeof *config_fields };

/* What config.json leaves to the family, with the defaults of Transformers. */
typedef struct family {
    const char *type, *architecture, *text_model; // text_model: of SlamKit's config.json
    const char *members;                          // further ones that are written
    int bias;                                     // q, k and v have biases
    int qk_norm;                                  // norms of q and k: 0, NORM_PER_HEAD, NORM_ALL_HEADS
    int post_norm;                                // norms of the outputs of sub-layers instead of their inputs
    int HS, KVH, T, tied;                         // HS 0: C / NH; KVH 0: NH
    int no_rope_interval;                         // the last layer of each has no rotary positions; 0: all have
    double eps, rope_theta;
} family;
enum { NORM_PER_HEAD = 1, NORM_ALL_HEADS };
/* clang-format off */
#define NO_BIAS "\"attention_bias\": false"
static const family families[] = {
    // the numbers: bias, qk_norm, post_norm, HS, KVH, T, tied, no_rope_interval, eps, rope_theta
    {"llama", "LlamaForCausalLM", "HuggingFaceTB/SmolLM2-135M", NO_BIAS ", \"mlp_bias\": false",
     0, 0, 0, 0, 0, 2048, 0, 0, 1e-6, 1e4},
    {"qwen2", "Qwen2ForCausalLM", "Qwen/Qwen2.5-0.5B", "\"use_sliding_window\": false",
     1, 0, 0, 0, 32, 32768, 0, 0, 1e-6, 1e4},
    {"mistral", "MistralForCausalLM", "mistralai/Mistral-7B-v0.3", "\"sliding_window\": null",
     0, 0, 0, 0, 8, 131072, 0, 0, 1e-6, 1e4},
    {"qwen3", "Qwen3ForCausalLM", "Qwen/Qwen3-0.6B-Base", NO_BIAS ", \"use_sliding_window\": false",
     0, NORM_PER_HEAD, 0, 128, 32, 32768, 0, 0, 1e-6, 1e4},
    {"olmo2", "Olmo2ForCausalLM", "allenai/OLMo-2-0425-1B", NO_BIAS,
     0, NORM_ALL_HEADS, 1, 0, 0, 2048, 0, 0, 1e-5, 1e4},
    {"smollm3", "SmolLM3ForCausalLM", "HuggingFaceTB/SmolLM3-3B-Base",
     NO_BIAS ", \"mlp_bias\": false, \"use_sliding_window\": false",
     0, 0, 0, 0, 4, 32768, 1, 4, 1e-6, 2e6},
};
#undef NO_BIAS
/* clang-format on */
enum { FAMILIES = sizeof families / sizeof *families };

#define AT(name) offsetof(slam_config, name)
static const field rope_fields[] = {
    {"factor", FIELD_REAL, AT(rope_factor), 1e-3, 1e6, 1},
    {"low_freq_factor", FIELD_REAL, AT(rope_low), 1e-3, 1e6, 1},
    {"high_freq_factor", FIELD_REAL, AT(rope_high), 1e-3, 1e6, 1},
    {"original_max_position_embeddings", FIELD_REAL, AT(rope_original), 1, 1 << 28, 0},
};
#undef AT

/* Rotary base and scaling as Transformers 5 finds them: read from rope_scaling if it is not empty, else from
   rope_parameters; a base there overrides the one at the top level. */
static int config_read_rope(slam_config *config, const json *c, const char *path) {
    const field *theta = &config_fields[CONFIG_FIELDS - 1];
    static const field rotated = {"partial_rotary_factor", FIELD_REAL, 0, 0, 1, 0};
    const json *scaling = json_get(c, "rope_scaling");
    const char *key = scaling && (scaling->n || !json_is(scaling, JSON_OBJECT)) ? "rope_scaling" : "rope_parameters";
    const json *rope = json_get(c, key), *type = json_find(rope, "rope_type"), *base = json_find(rope, theta->name);
    double share = 1;
    if (rope && !json_is(rope, JSON_OBJECT))
        return set_error("%s: %s is %.60s, expected an object", path, key, json_describe(rope));
    for (const json *j = rope ? rope->first : NULL; j; j = j->next)
        if (json_is(j, JSON_OBJECT))
            return set_error("%s: %s has settings for '%s', expected those of all layers", path, key, j->key);
    if (!type) type = json_find(rope, "type");
    const char *name = type ? json_text(type) : "default";
    const int n = !strcmp(name, "default") ? 0 : !strcmp(name, "linear") ? 1 : !strcmp(name, "llama3") ? 4 : -1;
    if (n < 0) return set_error("%s: %s has rope_type '%.60s', expected default, linear or llama3", path, key, name);
    config->rope_original = n == 4 ? config->T : 0;
    if (json_is(base ? base : json_find(c, theta->name), JSON_NULL))
        return set_error("%s: %s is null, expected a number", path, theta->name);
    if (!fields_read(c, theta, 1, config, path) || !fields_read(rope, theta, 1, config, path) ||
        !fields_read(rope, rope_fields, n, config, path) || !fields_read(c, &rotated, 1, &share, path) ||
        !fields_read(rope, &rotated, 1, &share, path))
        return 0;
    if (n == 4 && config->rope_high <= config->rope_low)
        return set_error("%s: high_freq_factor is %g, expected more than low_freq_factor %g", path, config->rope_high,
                         config->rope_low);
    return share == 1 || set_error("%s: partial_rotary_factor is %g, expected 1", path, share);
}

/* The layers without rotary positions (SmolLM3): where no_rope_layers has a 0 or, without it, the last of each
   no_rope_layer_interval (4). */
static int config_read_no_rope(slam_config *c, const json *from, const char *path) {
    const json *list = json_get(from, "no_rope_layers"), *every = json_get(from, "no_rope_layer_interval");
    const int interval = every && every->number >= 1 ? (int)every->number : families[c->family].no_rope_interval;
    if (!families[c->family].no_rope_interval) return 1;
    if (c->L > 64 || (list && list->n < (size_t)c->L))
        return set_error("%s: no_rope_layers: expected an entry for each of the %d layers, of which 64 at most", path,
                         c->L);
    const json *rotary = list ? list->first : NULL;
    for (int l = 0; l < c->L; l++, rotary = list ? rotary->next : NULL)
        if (list ? rotary->number == 0 && rotary->type != JSON_TRUE : (l + 1) % interval == 0)
            c->no_rope |= (uint64_t)1 << l;
    return 1;
}

/* No window may slide. Mistral: in all layers, if it is shorter than the context. Others: where use_sliding_window is
   set, in the layers that layer_types names or, without it, in those from max_window_layers on (SmolLM3: in some). */
static int config_read_window(const slam_config *config, const json *c, const char *path) {
    const json *slides = json_get(c, "use_sliding_window"), *window = json_find(c, "sliding_window");
    const json *layers = json_get(c, "layer_types"), *first = json_get(c, "max_window_layers");
    const int is_null = window && window->type == JSON_NULL;
    const double full_layers = config->family == SLAM_SMOLLM3 ? 0 : first ? first->number : 28;
    size_t full = 0;
    if (config->family == SLAM_MISTRAL) {
        const double length = window ? window->number : 4096;
        return is_null || length >= config->T ||
               set_error("%s: sliding_window is %g, expected null or at least the %d positions", path, length,
                         config->T);
    }
    if (!layers && slides && slides->type != JSON_FALSE && !is_null && full_layers < config->L)
        return set_error("%s: use_sliding_window is true, max_window_layers %s, expected at least the %d layers", path,
                         json_describe(first), config->L);
    for (const json *l = layers ? layers->first : NULL; l; l = l->next)
        full += l->type == JSON_STRING && !strcmp(l->string, "full_attention");
    return !layers || (full == (size_t)config->L && layers->n == full) ||
           set_error("%s: layer_types: expected full_attention in each of the %d layers", path, config->L);
}

static int config_read(slam_config *c, const json *root, const char *path) {
    static const char *const fixed[][2] = {
        {"hidden_act", "silu"}, {"attention_bias", "false"}, {"mlp_bias", "false"}, {"is_causal", "true"}};
    const json *base = json_get(root, "base_config"), *from = base ? base : root; // SlamKit nests the transformer's
    const char *type = json_string(from, "model_type", "");
    if (!from || from->type != JSON_OBJECT) return set_error("%s: expected an object with a model's settings", path);
    while (c->family < FAMILIES && strcmp(type, families[c->family].type)) c->family++;
    if (c->family == FAMILIES)
        return set_error("%s: model_type is '%s', expected llama, qwen2, mistral, qwen3, olmo2 or smollm3", path, type);
    if (json_get(from, "quantization_config"))
        return set_error("%s: quantization_config: expected weights that are not quantised", path);
    for (int i = 0; i < 4; i++) {
        const json *j = json_find(from, fixed[i][0]);
        const char *is = j && j->type == JSON_STRING && i == 0 ? j->string : json_describe(j);
        if (j && strcmp(is, fixed[i][1]))
            return set_error("%s: %s is '%.60s', expected '%s'", path, fixed[i][0], is, fixed[i][1]);
    }
    const family *f = &families[c->family];
    c->HS = f->HS;
    c->KVH = f->KVH;
    c->T = f->T;
    c->tied = f->tied;
    c->eps = f->eps;
    c->init_std = 0.02;
    c->rope_theta = f->rope_theta;
    if (!fields_read(from, config_fields, CONFIG_FIELDS - 1, c, path) || !config_read_rope(c, from, path) ||
        !config_read_no_rope(c, from, path) || !config_read_window(c, from, path))
        return 0;
    slam_config outer = *c; // SlamKit states the rotary base beside base_config, too
    if (base && (!fields_read(root, config_fields, 1, c, path) || !config_read_rope(&outer, root, path))) return 0;
    if (outer.rope_theta != c->rope_theta || outer.rope_factor != c->rope_factor || outer.rope_high != c->rope_high)
        return set_error("%s: rope_theta is %g, scaled by %g, but %g and %g in base_config, expected the same", path,
                         outer.rope_theta, outer.rope_factor, c->rope_theta, c->rope_factor);
    const json *kv_heads = json_find(from, "num_key_value_heads");
    if (!c->KVH || (kv_heads && kv_heads->type == JSON_NULL)) c->KVH = c->NH;
    if (c->NH % c->KVH)
        return set_error("%s: %d attention heads, expected a multiple of the %d key/value heads", path, c->NH, c->KVH);
    if (!c->HS && c->C % c->NH)
        return set_error("%s: hidden_size is %d, expected a multiple of the %d heads", path, c->C, c->NH);
    if (!c->HS) c->HS = c->C / c->NH;
    return c->HS % 2 == 0 || set_error("%s: head size is %d, expected an even number", path, c->HS);
}

int slam_config_load(slam_config *config, const char *name_or_path) {
    static const slam_config tiny = {102, 128, 4, 4, 2, 32, 384, 1024, 1, 1, 1e-6, 0.02, 10000, 0, 0, 0, 0, 0};
    static const slam_config slam = {502, 896, 24, 14, 2, 64, 4864, 32768, 1, 1, 1e-6, 0.02, 10000, 0, 0, 0, 0, 0};
    slam_config c = ZERO;
    if (!strcmp(name_or_path, "tiny") || !strcmp(name_or_path, "slam")) {
        *config = *name_or_path == 't' ? tiny : slam;
        return 1;
    }
    if (strstr(name_or_path, ".gguf/"))
        return set_error("%s: GGUF files cannot be read, expected a folder of Hugging Face", name_or_path);
    json *root = json_load(name_or_path);
    const int ok = root && config_read(&c, root, name_or_path);
    if (ok) *config = c;
    json_free(root);
    return ok;
}

static int has_rope(const slam_config *c, int l) { return l >= 64 || !(c->no_rope >> l & 1); }

/* The members of a config.json for Transformers 4 and 5, in which rotary base and dtype have different names. */
static void config_write(strbuf *s, const slam_config *c, const char *indent) {
    const family *f = &families[c->family];
    static const char *const members[] = {
        "\"hidden_act\": \"silu\", \"attention_dropout\": 0.0",
        "\"bos_token_id\": 1, \"eos_token_id\": 1, \"pad_token_id\": 0",
        "\"dtype\": \"float32\", \"torch_dtype\": \"float32\", \"use_cache\": true",
    };
    strbuf_add(s, "%s\"architectures\": [\"%s\"],\n%s\"model_type\": \"%s\",\n%s%s,\n", indent, f->architecture, indent,
               f->type, indent, f->members);
    for (int i = 0; i < 3; i++) strbuf_add(s, "%s%s,\n", indent, members[i]);
    const int llama3 = c->rope_high > 0, linear = !llama3 && c->rope_factor > 0;
    for (int k = 0; k < (llama3 || linear ? 2 : 1); k++) { // a scaling by both names: Transformers 4 reads rope_scaling
        strbuf_add(s, "%s\"%s\": {\"rope_type\": \"%s\", \"rope_theta\": ", indent,
                   k ? "rope_scaling" : "rope_parameters",
                   llama3   ? "llama3"
                   : linear ? "linear"
                            : "default");
        strbuf_add_number(s, c->rope_theta);
        for (int i = 0; i < (llama3 ? 4 : linear); i++) {
            strbuf_add(s, ", \"%s\": ", rope_fields[i].name);
            strbuf_add_number(s, *(const double *)((const char *)c + rope_fields[i].offset));
        }
        strbuf_add(s, "},\n");
    }
    for (int l = 0; f->no_rope_interval && l < c->L; l++)
        strbuf_add(s, "%s%s%d%s", l ? "" : indent, l ? "" : "\"no_rope_layers\": [", has_rope(c, l),
                   l + 1 < c->L ? ", " : "],\n");
    fields_write(s, config_fields, CONFIG_FIELDS, c, indent);
}

/* ---- weights ----
   All weights are one array, over which the optimiser loops: first the matrices, with weight decay, then norms and
   biases. Some tensors of a file are rows of one param: one matrix product computes q, k and v (or gate and up).

   Embedding and head are padded with rows of zeros from V to P, a multiple of 8, because tensor cores need rows of
   logits that are aligned to 16 bytes. The padding is not in files; its gradients are zero, so it stays zero. */

typedef struct param {
    slam_act *data; // NULL: this model does not have it
    float *grad;    // NULL until planned for training
} param;

typedef struct layer_weights {
    param attn_norm, qkv, qkv_bias, q_norm, k_norm, out, mlp_norm, gate_up, down; // shapes: tensors_of
} layer_weights;

typedef struct model_weights {
    param embed, head, norm; // head is embed if tied
} model_weights;

enum { MATRIX, NORM, BIAS }; // initialised from normal(0, init_std), to 1, to 0

/* A tensor of the file: a param, or some rows of one. */
typedef struct model_tensor {
    char name[80];
    int kind, layer;   // layer -1: outside the layers
    size_t rows, cols; // rows 0: a vector (cols)
    size_t param;      // offset of its param in layer_weights or model_weights
    size_t offset;     // where it begins in the array of weights
} model_tensor;

typedef struct model_tensors {
    model_tensor *list; // in the order of the file and of the random streams that initialise them
    size_t n;
    size_t n_decayed, n_weights;    // elements of the matrices (they have weight decay), of the array; with padding
    size_t first_layer, layers_end; // the layers' matrices in the array
    size_t parameters;              // without padding
    size_t matmul_parameters;       // those that a token is multiplied with, for FLOPs
} model_tensors;

static int padded_vocabulary(const slam_config *c) { return (c->V + 7) / 8 * 8; }
static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static size_t tensor_size(const model_tensor *t) { return (t->rows ? t->rows : 1) * t->cols; }

/* The tensors of a model; free() the list. */
static model_tensors tensors_of(const slam_config *c) {
    const size_t V = c->V, C = c->C, F = c->F, Q = (size_t)c->NH * c->HS, K = (size_t)c->KVH * c->HS;
    const family *f = &families[c->family];
    const size_t each = f->qk_norm == NORM_PER_HEAD ? c->HS : 0; // norms of q and k
    const int bias = f->bias, all = f->qk_norm == NORM_ALL_HEADS, post = f->post_norm;
#define MODEL(name) offsetof(model_weights, name), 0
#define LAYER(name) offsetof(layer_weights, name), 0
    const size_t after_attention = post ? offsetof(layer_weights, attn_norm) : offsetof(layer_weights, mlp_norm);
    const model_tensor table[] = {
        // name, kind, layer (0: in each), rows, cols (0: not in this model), param
        {"model.embed_tokens.weight", MATRIX, -1, V, C, MODEL(embed)},
        {"model.layers.%d.input_layernorm.weight", NORM, 0, 0, post ? 0 : C, LAYER(attn_norm)},
        {"model.layers.%d.self_attn.q_proj.weight", MATRIX, 0, Q, C, LAYER(qkv)},
        {"model.layers.%d.self_attn.k_proj.weight", MATRIX, 0, K, C, LAYER(qkv)},
        {"model.layers.%d.self_attn.v_proj.weight", MATRIX, 0, K, C, LAYER(qkv)},
        {"model.layers.%d.self_attn.q_proj.bias", BIAS, 0, 0, bias ? Q : 0, LAYER(qkv_bias)},
        {"model.layers.%d.self_attn.k_proj.bias", BIAS, 0, 0, bias ? K : 0, LAYER(qkv_bias)},
        {"model.layers.%d.self_attn.v_proj.bias", BIAS, 0, 0, bias ? K : 0, LAYER(qkv_bias)},
        {"model.layers.%d.self_attn.q_norm.weight", NORM, 0, 0, all ? Q : each, LAYER(q_norm)},
        {"model.layers.%d.self_attn.k_norm.weight", NORM, 0, 0, all ? K : each, LAYER(k_norm)},
        {"model.layers.%d.self_attn.o_proj.weight", MATRIX, 0, C, Q, LAYER(out)},
        {"model.layers.%d.post_attention_layernorm.weight", NORM, 0, 0, C, after_attention, 0},
        {"model.layers.%d.post_feedforward_layernorm.weight", NORM, 0, 0, post ? C : 0, LAYER(mlp_norm)},
        {"model.layers.%d.mlp.gate_proj.weight", MATRIX, 0, F, C, LAYER(gate_up)},
        {"model.layers.%d.mlp.up_proj.weight", MATRIX, 0, F, C, LAYER(gate_up)},
        {"model.layers.%d.mlp.down_proj.weight", MATRIX, 0, C, F, LAYER(down)},
        {"model.norm.weight", NORM, -1, 0, C, MODEL(norm)},
        {"lm_head.weight", MATRIX, -1, V, c->tied ? 0 : C, MODEL(head)},
    };
#undef MODEL
#undef LAYER
    enum { ROWS = sizeof table / sizeof *table };
    const size_t padded = padded_vocabulary(c) * C;
    model_tensors m = ZERO;
    size_t end[2] = {0, 0}; // of the matrices and of the vectors so far; each param begins at a multiple of 256
    m.list = NEW(model_tensor, ROWS * (size_t)c->L);
    for (int l = 0; l < c->L; l++)
        for (const model_tensor *row = table; row < table + ROWS; row++) {
            const int outside = row->layer < 0; // before the first layer, or after the last
            size_t *at = &end[row->kind != MATRIX];
            if (row->cols == 0 || (outside && l != (row == table ? 0 : c->L - 1))) continue;
            if (row == table || row->param != row[-1].param || row->layer != row[-1].layer) *at = round_up(*at, 256);
            model_tensor *t = &m.list[m.n++];
            *t = *row;
            snprintf(t->name, sizeof t->name, row->name, l);
            t->layer = outside ? -1 : l;
            t->offset = *at;
            *at += outside && t->rows ? padded : tensor_size(t);
            m.parameters += tensor_size(t);
            if (!outside && t->rows) m.matmul_parameters += tensor_size(t);
        }
    m.matmul_parameters += V * C; // of the head; looking up the embedding is no product
    m.n_decayed = round_up(end[0], 256);
    m.n_weights = m.n_decayed + round_up(end[1], 256);
    m.first_layer = round_up(padded, 256);
    m.layers_end = m.n_decayed - (c->tied ? 0 : m.first_layer);
    for (size_t i = 0; i < m.n; i++) m.list[i].offset += m.list[i].kind == MATRIX ? 0 : m.n_decayed;
    return m;
}

/* Without the list. */
static model_tensors tensors_count(const slam_config *c) {
    model_tensors m = tensors_of(c);
    free(m.list);
    m.list = NULL;
    return m;
}

size_t slam_config_parameters(const slam_config *c) { return tensors_count(c).parameters; }

/* Forward: 2 per matmul parameter, and 4 HS per layer, head and visible key (T/2 on average). Backward: twice that. */
double slam_config_flops(const slam_config *c, int T) {
    return 6.0 * (double)tensors_count(c).matmul_parameters + 6.0 * c->L * T * c->NH * c->HS;
}

/* ---- activations ---- */

/* Pairs of a head that are rotated. */
static int rope_pairs(const slam_config *c) { return c->HS / 2; }

typedef struct layer_acts { // shapes: acts_place
    slam_act *x, *attn_in, *qkv, *qkv_raw, *attn, *attn_out, *x_mid, *mlp_in, *gate_up, *swiglu, *mlp_out;
    float *attn_rstd, *q_rstd, *k_rstd, *lse, *mlp_rstd;
} layer_acts;

typedef struct model_acts {
    slam_act *delta, *x_end, *head_in, *logits, *dx, *dnorm, *dattn, *dswiglu, *dqkv;
    float *head_rstd, *losses, *rope, *loss_weights, *attn_scratch;
    int *tokens, *targets, *doc_start, *mask_start, *mask_end, *slots, *lengths; // the last two are of the decoder
} model_acts;

typedef struct model_layer {
    layer_weights w;
    layer_acts a;
} model_layer;

typedef struct slam_layout {
    model_tensors tensors;
    model_layer *layers; // (L)
    model_weights w;
    model_acts a;
    int head_rows; // rows of logits in memory at once
    char *arena;   // the memory of all activations
    size_t arena_bytes;
    slam_mask mask; // of the last forward pass
    int valid;      // the backward pass can still use its activations
} slam_layout;

/* The next `bytes` of the arena, behind the first *end, which are in use. */
static void *take(const char *arena, size_t *end, size_t bytes) {
    const uintptr_t at = (uintptr_t)arena + *end;
    *end += round_up(bytes, 256);
    return (void *)at;
}

/* Places the activations for B rows of T tokens in k->arena, which may be NULL, and returns its size. Without a
   backward pass all layers share the memory of the first; SLAM_TRAIN_RECOMPUTE shares what it computes again. */
static size_t acts_place(slam_layout *k, const slam_config *c, size_t act_bytes, int B, size_t T, int mode) {
    const size_t N = B * T, C = c->C, F = c->F, HS = c->HS, Q = c->NH * HS, QKV = Q + 2 * c->KVH * HS;
    const size_t P = padded_vocabulary(c), rows = ((size_t)64 << 20) / (P * act_bytes) / 64 * 64; // 64 MB of logits
    const int train = mode != SLAM_INFERENCE, qk_norm = families[c->family].qk_norm,
              post = families[c->family].post_norm;
    size_t end = 0;
#define ACTS(n)   (slam_act *)take(k->arena, &end, (n)*act_bytes)
#define FLOATS(n) (float *)take(k->arena, &end, (n) * sizeof(float))
    for (int l = 0; l < c->L; l++) {
        layer_acts *a = &k->layers[l].a;
        *a = k->layers[0].a;
        if (l == 0 || train) {
            a->x = ACTS(N * C); // residual stream before attention
            a->attn_rstd = FLOATS(N);
            a->qkv = ACTS(N * QKV); // q and k normed and rotated
            a->qkv_raw = train && qk_norm ? ACTS(N * QKV) : NULL;
            a->q_rstd = qk_norm ? FLOATS(N * c->NH) : NULL;
            a->k_rstd = qk_norm ? FLOATS(N * c->KVH) : NULL;
            a->attn = ACTS(N * Q);
            a->attn_out = post ? ACTS(N * C) : NULL; // before its norm
            a->lse = FLOATS(N * c->NH);              // (B,NH,T)
            a->x_mid = ACTS(N * C);                  // residual stream before the MLP
            a->mlp_rstd = FLOATS(N);
            a->gate_up = ACTS(N * 2 * F);
            a->mlp_out = post ? ACTS(N * C) : NULL;
        }
        if (l == 0 || mode == SLAM_TRAIN) {
            a->attn_in = post ? NULL : ACTS(N * C); // norm of x
            a->mlp_in = post ? NULL : ACTS(N * C);  // norm of x_mid
            a->swiglu = ACTS(N * F);
        }
        if (post) a->attn_in = a->x, a->mlp_in = a->x_mid;
    }
    model_acts *a = &k->a;
    k->head_rows = (int)(rows < 1 ? 1 : rows < N ? rows : N);
    a->delta = ACTS(N * C); // what a sub-layer adds to the residual stream
    a->x_end = ACTS(N * C); // residual stream after the last layer
    a->head_in = ACTS(N * C);
    a->head_rstd = FLOATS(N);
    a->losses = FLOATS(N);
    a->logits = ACTS(k->head_rows * P);
    int **ints[] = {&a->tokens, &a->targets, &a->doc_start, &a->mask_start, &a->mask_end, &a->slots, &a->lengths};
    for (int i = 0; i < 7; i++) *ints[i] = (int *)take(k->arena, &end, N * sizeof(int));
    a->rope = FLOATS(2 * T * rope_pairs(c));
    if (train) {
        a->loss_weights = FLOATS(N);                       // of slam_backward
        a->dx = ACTS(N * C);                               // gradient of the residual stream
        a->dnorm = ACTS(N * C);                            // of the output of a norm
        a->dattn = a->dswiglu = ACTS(N * (F > Q ? F : Q)); // never needed at once
        a->dqkv = ACTS(N * QKV);
        a->attn_scratch = FLOATS(N * c->NH);
    }
#undef ACTS
#undef FLOATS
    return end;
}

slam_memory slam_config_memory(const slam_config *c, int act_bytes, int B, int T, int mode, int shards) {
    const double n = (double)tensors_count(c).n_weights;
    const int train = mode != SLAM_INFERENCE;
    slam_memory m;
    slam_layout k = ZERO;
    k.layers = NEW(model_layer, c->L);
    const double activations = (double)acts_place(&k, c, act_bytes, B, T, mode);
    m.weights = n * (act_bytes == 4 ? 4 : act_bytes + 4.0 / (train ? shards : 1));
    m.grads = train ? 4 * n : 0;
    m.optimiser = train ? 8 * n / shards : 0;
    m.logits = (double)k.head_rows * padded_vocabulary(c) * act_bytes;
    m.activations = activations - m.logits;
    m.total = m.weights + m.grads + m.optimiser + activations;
    free(k.layers);
    return m;
}

/* ---- a model ---- */

/* x + n, for activations of either size. */
static slam_act *act_at(const slam_ops *ops, slam_act *x, size_t n) {
    return (slam_act *)((char *)x + n * ops->act_bytes);
}

static void params_place(slam_model *m) {
    slam_layout *k = m->layout;
    for (size_t i = k->tensors.n; i-- > 0;) { // backwards: a param begins at its first tensor
        const model_tensor *t = &k->tensors.list[i];
        param *p = (param *)((t->layer < 0 ? (char *)&k->w : (char *)&k->layers[t->layer].w) + t->param);
        p->data = act_at(m->ops, m->weights, t->offset);
        p->grad = m->grads ? m->grads + t->offset : NULL;
    }
    if (m->config.tied) k->w.head = k->w.embed;
}

void slam_model_free(slam_model *m) {
    if (!m) return;
    m->ops->release(m->ops, m->layout->arena);
    m->ops->release(m->ops, m->stats);
    m->ops->release(m->ops, m->grads);
    if ((void *)m->master != (void *)m->weights) m->ops->release(m->ops, m->master);
    m->ops->release(m->ops, m->weights);
    free(m->layout->tensors.list);
    free(m->layout->layers);
    free(m->layout);
    free(m);
}

/* Its weights are zero. */
static slam_model *model_alloc(slam_ops *ops, const slam_config *c) {
    slam_model *m = NEW(slam_model, 1);
    m->ops = ops;
    m->config = *c;
    m->layout = NEW(slam_layout, 1);
    m->layout->layers = NEW(model_layer, c->L);
    m->layout->tensors = tensors_of(c);
    m->n_decayed = m->layout->tensors.n_decayed;
    m->n_weights = m->layout->tensors.n_weights;
    m->weights = (slam_act *)ops->alloc(ops, m->n_weights * ops->act_bytes);
    m->master = ops->act_bytes == 4 ? (float *)m->weights : (float *)ops->alloc(ops, m->n_weights * sizeof(float));
    m->stats = (double *)ops->alloc(ops, 2 * sizeof(double));
    if (m->weights && m->master && m->stats) {
        params_place(m);
        return m;
    }
    slam_model_free(m);
    return NULL;
}

/* The weights (n_weights) on the host; free() them. NULL on failure. */
static float *weights_download(slam_model *m) {
    if (!m->master) {
        set_error("the float weights are sharded over the ranks: slam_checkpoint_save collects them");
        return NULL;
    }
    float *host = NEW(float, m->n_weights);
    m->ops->download(m->ops, host, m->master, m->n_weights * sizeof *host);
    if (m->ops->finish(m->ops)) return host;
    free(host);
    return NULL;
}

/* Converts the float weights to those that the ops read. */
static void weights_to_act(slam_model *m) {
    if ((void *)m->master != (void *)m->weights) m->ops->to_act(m->ops, m->weights, m->master, m->n_weights);
}

/* Each row has its own random stream, so the result does not depend on the number of threads. */
slam_model *slam_model_new(slam_ops *ops, const slam_config *config, uint64_t seed) {
    slam_model *m = model_alloc(ops, config);
    for (size_t k = 0; m && k < m->layout->tensors.n; k++) {
        const model_tensor *t = &m->layout->tensors.list[k];
        float *host = NEW(float, tensor_size(t));
        if (t->kind == NORM)
            for (size_t c = 0; c < t->cols; c++) host[c] = 1;
        PARALLEL_FOR
        for (size_t i = 0; i < t->rows; i++) {
            uint64_t stream = rng_stream(seed, k, i);
            for (size_t c = 0; c < t->cols; c++)
                host[i * t->cols + c] = (float)(config->init_std * rng_normal(&stream));
        }
        ops->upload(ops, m->master + t->offset, host, tensor_size(t) * sizeof *host);
        free(host);
    }
    if (m) weights_to_act(m);
    return m;
}

int slam_model_hash(slam_model *m, uint64_t *hash) {
    strbuf config = ZERO;
    float *host = weights_download(m);
    if (!host) return 0;
    config_write(&config, &m->config, "");
    *hash = hash_bytes(hash_bytes(HASH_START, config.at, config.n), host, m->n_weights * sizeof *host);
    strbuf_free(&config);
    free(host);
    return 1;
}

/* ---- files ---- */

/* Files of old Transformers hold the frequencies, some rounded to 16 bits. Others would make another model. */
static int rope_check(const slam_config *c, const tensor *t) {
    float x[2048]; // head_dim is at most 4096
    if (!tensor_has_shape(t, 1, (size_t)c->HS / 2, 0) || !tensor_floats(t, x, 0, t->count)) return 0;
    for (int i = 0; i < c->HS / 2; i++) {
        const double frequency = rope_frequency(c, i, c->HS / 2);
        if (!(fabs(x[i] - frequency) <= frequency * 0x1p-8 + 0x1p-24))
            return set_error("%s: tensor '%s' is not that of rope_theta %g in config.json", t->file, t->name,
                             c->rope_theta);
    }
    return 1;
}

/* Tensor NAME SUFFIX of a file; NULL if it is missing or its shape is not t's. twist: the vocabulary may be larger. */
static const tensor *weights_find(const tensors *file, const model_tensor *t, const char *suffix, int twist) {
    char name[100];
    snprintf(name, sizeof name, "%s%s", t->name, suffix);
    const tensor *found = tensors_find(file, name);
    if (!found)
        set_error("%s: tensor '%s' is missing, found e.g. '%s'", file->file[0].path, name,
                  file->n ? file->at[0].name : "none");
    if (!found) return NULL;
    const size_t rows = t->rows ? t->rows : t->cols;
    const int larger = twist && t->layer < 0 && t->rows && found->rank == 2 && found->shape[0] > rows;
    return tensor_has_shape(found, t->rows ? 2 : 1, larger ? found->shape[0] : rows, t->cols) ? found : NULL;
}

/* Its first n numbers, all of them finite; free() them. NULL on failure, and of NULL. */
static float *weights_read(const tensor *t, size_t n) {
    if (!t) return NULL;
    float *x = NEW(float, n);
    int ok = tensor_floats(t, x, 0, n);
    for (size_t i = 0; ok && i < n; i++)
        if (!isfinite(x[i])) ok = set_error("%s: tensor '%s' has a number that is not finite", t->file, t->name);
    if (ok) return x;
    free(x);
    return NULL;
}

/* Checks that a file has the tensors of a model and no unknown ones, before memory is allocated for them. */
static int weights_check(const slam_config *c, const tensors *file, int twist) {
    const model_tensors list = tensors_of(c);
    int ok = 1;
    for (size_t k = 0; ok && k < list.n; k++) ok = weights_find(file, &list.list[k], "", twist) != NULL;
    for (const tensor *t = file->at; ok && t < file->at + file->n; t++) {
        size_t i = 0;
        while (i < list.n && strcmp(list.list[i].name, t->name)) i++;
        if (string_ends(t->name, "rotary_emb.inv_freq")) ok = rope_check(c, t);
        else if (i == list.n && !(c->tied && !strcmp(t->name, "lm_head.weight"))) // a copy of the embedding
            ok = set_error("%s: tensor '%s' is not part of this model", t->file, t->name);
    }
    free(list.list);
    return ok;
}

/* V 0: keeps the whole vocabulary. */
slam_model *slam_model_twist(slam_ops *ops, const char *folder, int V) {
    slam_config c;
    slam_model *m = NULL;
    const slam_path path = path_join(folder, "config.json");
    int ok = slam_config_load(&c, path.at);
    if (ok && V > c.V) ok = set_error("%s: vocab_size is %d, expected at least the %d to keep", path.at, c.V, V);
    tensors *file = ok ? tensors_open(folder) : NULL;
    if (!file) return NULL;
    const int slamkit = tensors_find(file, "lm.model.embed_tokens.weight") != NULL;
    for (tensor *t = file->at; slamkit && t < file->at + file->n; t++)
        if (!strncmp(t->name, "lm.", 3)) t->name += 3;
        else ok = set_error("%s: tensor '%s' is not part of this model", t->file, t->name);
    const tensor *embed = tensors_find(file, "model.embed_tokens.weight"), *head = tensors_find(file, "lm_head.weight");
    if (c.tied && embed && head) // Transformers 5 unties a stored head that differs
        c.tied = embed->dtype == head->dtype && embed->count == head->count &&
                 !memcmp(embed->data, head->data, embed->count * dtype_bytes[embed->dtype]);
    if (V) c.V = V;
    if (ok && weights_check(&c, file, V != 0)) m = model_alloc(ops, &c);
    ok = m != NULL;
    for (size_t k = 0; ok && k < m->layout->tensors.n; k++) {
        const model_tensor *t = &m->layout->tensors.list[k];
        float *host = weights_read(weights_find(file, t, "", V != 0), tensor_size(t));
        ok = host != NULL;
        if (ok) ops->upload(ops, m->master + t->offset, host, tensor_size(t) * sizeof *host);
        free(host);
    }
    tensors_close(file);
    if (ok) weights_to_act(m);
    if (ok) return m;
    slam_model_free(m);
    return NULL;
}

slam_model *slam_model_load(slam_ops *ops, const char *folder) { return slam_model_twist(ops, folder, 0); }

/* Writes n arrays of weights or moments x (n,n_weights): for each tensor PREFIX NAME SUFFIX of each array. */
static int weights_write(const char *path, const model_tensors *list, const char *prefix, const char *const *suffixes,
                         size_t n, const float *x, const char *const *metadata) {
    tensor *out = NEW(tensor, n * list->n);
    slam_strings names = ZERO;
    for (size_t k = 0; k < n * list->n; k++) {
        const model_tensor *t = &list->list[k / n];
        char name[100];
        snprintf(name, sizeof name, "%s%s%s", prefix, t->name, suffixes[k % n]);
        slam_strings_add(&names, name);
        out[k].name = names.at[k];
        out[k].rank = t->rows ? 2 : 1;
        out[k].shape[0] = t->rows ? t->rows : t->cols;
        out[k].shape[1] = t->cols;
        out[k].data = x + k % n * list->n_weights + t->offset;
        out[k].count = tensor_size(t);
    }
    const int ok = tensors_write(path, out, n * list->n, metadata);
    slam_strings_free(&names);
    free(out);
    return ok;
}

/* The model with these weights (n_weights) as a folder. SlamKit reads settings that base_config lacks from the config
   of base_model_name. */
static int model_write(const slam_model *m, const float *host, const char *folder, int format) {
    const slam_config *c = &m->config;
    const int slamkit = format == SLAM_FORMAT_SLAMKIT;
    static const char *const suffix = "";
    static const char generation[] = "{\"bos_token_id\": 1, \"eos_token_id\": 1, \"pad_token_id\": 0}\n";
    strbuf config = ZERO;
    strbuf_add(&config, "{\n");
    if (slamkit) {
        strbuf_add(&config, "  \"architectures\": [\"UnitLM\"],\n  \"model_type\": \"speech_language_model\",\n");
        strbuf_add(&config, "  \"base_model_name\": \"%s\",\n  \"twist_init\": true,\n  \"vocab_size\": %d,\n",
                   families[c->family].text_model, c->V);
        strbuf_add(&config, "  \"max_position_embeddings\": %d,\n  \"rope_theta\": ", c->T);
        strbuf_add_number(&config, c->rope_theta);
        strbuf_add(&config, ",\n  \"torch_dtype\": \"float32\",\n  \"use_cache\": true,\n  \"base_config\": {\n");
    }
    config_write(&config, c, slamkit ? "    " : "  ");
    strbuf_add(&config, slamkit ? "  }\n}\n" : "}\n");
    const int ok = file_write(path_join(folder, "config.json").at, config.at, config.n) &&
                   file_write(path_join(folder, "generation_config.json").at, generation, sizeof generation - 1) &&
                   weights_write(path_join(folder, "model.safetensors").at, &m->layout->tensors, slamkit ? "lm." : "",
                                 &suffix, 1, host, NULL);
    strbuf_free(&config);
    return ok;
}

int slam_model_save(slam_model *m, const char *folder, int format) {
    float *host = weights_download(m);
    const int ok = host && model_write(m, host, folder, format);
    free(host);
    return ok;
}

/* ---- batches and plans ---- */

slam_batch slam_batch_new(int rows, int T, int masked) {
    const size_t N = (size_t)rows * T;
    slam_batch b = ZERO;
    b.B = b.capacity = rows;
    b.T = T;
    b.tokens = NEW(int, 5 * N);
    b.targets = b.tokens + N;
    b.doc_start = b.targets + N;
    b.mask_start = masked ? b.doc_start + N : NULL;
    b.mask_end = masked ? b.mask_start + N : NULL;
    b.losses = NEW(float, N);
    memset(b.targets, -1, N * sizeof(int));
    return b;
}

void slam_batch_free(slam_batch *b) {
    free(b->tokens);
    free(b->losses);
    free(b->sequences);
    memset(b, 0, sizeof *b);
}

int slam_model_plan(slam_model *m, int B, int T, int mode) {
    slam_ops *ops = m->ops;
    slam_layout *k = m->layout;
    if (B < 1 || T < 1 || (size_t)B * T > INT_MAX / 4)
        return set_error("a batch of %d rows of %d tokens, expected both positive and fewer than 2^29 tokens", B, T);
    if ((size_t)B * T <= (size_t)m->B * m->T && T <= m->T && (mode == m->mode || mode == SLAM_INFERENCE)) return 1;
    ops->release(ops, k->arena);
    k->arena = NULL;
    m->B = m->T = k->valid = 0;
    k->arena_bytes = acts_place(k, &m->config, ops->act_bytes, B, T, mode);
    k->arena = (char *)ops->alloc(ops, k->arena_bytes);
    if (mode != SLAM_INFERENCE && !m->grads) m->grads = (float *)ops->alloc(ops, m->n_weights * sizeof(float));
    if (!k->arena || (mode != SLAM_INFERENCE && !m->grads)) return 0;
    acts_place(k, &m->config, ops->act_bytes, B, T, mode);
    params_place(m);
    const int pairs = rope_pairs(&m->config);
    float *rope = rope_table(T, pairs, &m->config);
    ops->upload(ops, k->a.rope, rope, 2 * (size_t)T * pairs * sizeof *rope);
    free(rope);
    m->B = B;
    m->T = T;
    m->mode = mode;
    return 1;
}

static slam_mask model_mask(const slam_model *m, int B, int T) {
    const slam_config *c = &m->config;
    const slam_mask mask = {B, T, c->NH, c->KVH, c->HS, rope_pairs(c), NULL, NULL, NULL, NULL, m->layout->a.rope};
    return mask;
}

/* Checks that no op would read out of bounds, copies the batch to the device and sets the mask. */
static int batch_upload(slam_model *m, const slam_batch *b, int with_targets) {
    const slam_config *c = &m->config;
    slam_ops *ops = m->ops;
    model_acts *a = &m->layout->a;
    const size_t N = (size_t)b->B * b->T, bytes = N * sizeof(int);
    slam_mask *mask = &m->layout->mask;
    m->layout->valid = 0;
    if (b->B < 1 || b->T < 1 || N > (size_t)m->B * m->T || b->T > m->T)
        return set_error("a batch of %d rows of %d tokens, planned for %d rows of %d", b->B, b->T, m->B, m->T);
    for (size_t i = 0; i < N; i++) {
        const int t = (int)(i % b->T), start = b->doc_start[i];
        const int first = b->mask_start ? b->mask_start[i] : 0, end = b->mask_start ? b->mask_end[i] : 0;
        if (b->tokens[i] < 0 || b->tokens[i] >= c->V)
            return set_error("token %d at position %zu of the batch, expected 0 to %d", b->tokens[i], i, c->V - 1);
        if (with_targets && b->targets[i] >= c->V)
            return set_error("target %d at position %zu of the batch, expected below %d", b->targets[i], i, c->V);
        if (start < 0 || start > t) return set_error("doc_start %d at column %d, expected 0 to %d", start, t, t);
        if (end != first && (first < start || end < first || end > t))
            return set_error("masked span [%d,%d) at column %d, expected within [%d,%d)", first, end, t, start, t);
    }
    ops->upload(ops, a->tokens, b->tokens, bytes);
    ops->upload(ops, a->doc_start, b->doc_start, bytes);
    *mask = model_mask(m, b->B, b->T);
    mask->doc_start = a->doc_start;
    if (with_targets) ops->upload(ops, a->targets, b->targets, bytes);
    if (b->mask_start) {
        ops->upload(ops, a->mask_start, b->mask_start, bytes);
        ops->upload(ops, a->mask_end, b->mask_end, bytes);
        mask->mask_start = a->mask_start;
        mask->mask_end = a->mask_end;
    }
    return 1;
}

/* ---- forward ---- */

struct slam_decoder_state {
    slam_act *cache;   // (L,slots,capacity,2 KVH HS) keys and values
    size_t layer_size; // elements of a layer
    int capacity;      // T rounded up to whole tiles
    int prefill;       // 1: stores row b's first lengths[b] tokens in slots[b]; 0: decodes one, at position lengths[b]
    slam_batch batch;  // of a prefill
};

/* The mask of layer l, with or without rotary positions. */
static slam_mask layer_mask(const slam_model *m, int l, const slam_mask *mask) {
    slam_mask own = *mask;
    if (!has_rope(&m->config, l)) own.pairs = 0;
    return own;
}

static void attend(slam_model *m, int l, const slam_mask *shared_mask, const struct slam_decoder_state *decoder) {
    slam_ops *ops = m->ops;
    const layer_acts *a = &m->layout->layers[l].a;
    const model_acts *shared = &m->layout->a;
    const slam_mask mask = layer_mask(m, l, shared_mask);
    slam_act *kv = decoder ? act_at(ops, decoder->cache, l * decoder->layer_size) : NULL;
    const int decode = decoder && !decoder->prefill, fill = decoder && decoder->prefill;
    if (decode) ops->attention_decode(ops, a->attn, kv, a->qkv, shared->lengths, &mask);
    else ops->attention_forward(ops, a->attn, a->lse, a->qkv, &mask);
    if (fill) ops->attention_fill(ops, kv, a->qkv, shared->slots, shared->lengths, decoder->capacity, &mask);
}

/* Norms of q and k, in place, each head by itself or all at once; the backward pass takes the gradient in dqkv through
   them. The values before stay in qkv_raw. */
static void norm_qk(slam_model *m, int l, int N, slam_act *dqkv) {
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const layer_weights *w = &m->layout->layers[l].w;
    const layer_acts *a = &m->layout->layers[l].a;
    const int QKV = (c->NH + 2 * c->KVH) * c->HS, per_head = families[c->family].qk_norm == NORM_PER_HEAD;
    if (!w->q_norm.data) return;
    if (!dqkv && a->qkv_raw) ops->copy(ops, a->qkv_raw, a->qkv, (size_t)N * QKV * ops->act_bytes);
    for (int k = 0; k < 2; k++) {
        const param *norm = k ? &w->k_norm : &w->q_norm;
        float *rstd = k ? a->k_rstd : a->q_rstd;
        const int heads = k ? c->KVH : c->NH, G = per_head ? heads : 1, C = heads * c->HS / G;
        const size_t first = k ? (size_t)c->NH * c->HS : 0;
        slam_act *x = act_at(ops, dqkv ? dqkv : a->qkv, first);
        if (!dqkv) ops->rmsnorm_forward(ops, NULL, x, rstd, x, NULL, norm->data, (float)c->eps, N, G, C, QKV);
        else
            ops->rmsnorm_backward(ops, x, norm->grad, x, act_at(ops, a->qkv_raw, first), norm->data, rstd, N, G, C,
                                  QKV);
    }
}

/* sum = x + y, all (N,C); sum may be x. */
static void act_add(slam_ops *ops, slam_act *sum, const slam_act *x, const slam_act *y, int N, int C) {
    ops->layernorm(ops, sum, NULL, x, y, NULL, NULL, 0, 0, N, C);
}

/* x = x_prev + delta, and the input of a sub-layer: the norm of x or, where norms come after sub-layers, x. */
static void norm_input(slam_model *m, slam_act *x, slam_act *in, float *rstd, const slam_act *x_prev,
                       const slam_act *delta, const param *norm, int N) {
    slam_ops *ops = m->ops;
    const int C = m->config.C;
    if (in != x) ops->rmsnorm_forward(ops, x, in, rstd, x_prev, delta, norm->data, (float)m->config.eps, N, 1, C, C);
    else if (delta) act_add(ops, x, x_prev, delta, N, C);
}

/* The norm of a sub-layer's output, or the output itself. */
static void norm_output(slam_model *m, slam_act *delta, const slam_act *out, float *rstd, const param *norm, int N) {
    const int C = m->config.C;
    if (out == delta) return;
    m->ops->rmsnorm_forward(m->ops, NULL, delta, rstd, out, NULL, norm->data, (float)m->config.eps, N, 1, C, C);
}

/* One transformer layer:
       x_mid = x + out(attention(qkv(norm(x))))      x_next = x_mid + down(swiglu(gate_up(norm(x_mid))))
   or, in OLMo 2,
       x_mid = x + norm(out(attention(qkv(x))))      x_next = x_mid + norm(down(swiglu(gate_up(x_mid))))
   Each sum is computed by the norm that follows, if there is one, which saves a pass over memory: the first norm here
   computes x = x_prev + delta_prev, and the next layer adds x_mid and delta. x_prev (N,C), delta_prev (N,C) or NULL;
   widths: Q of the queries, QKV of q, k and v. */
static void layer_forward(slam_model *m, int l, const slam_act *x_prev, const slam_act *delta_prev, int N,
                          const slam_mask *mask, const struct slam_decoder_state *decoder) {
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const layer_weights *w = &m->layout->layers[l].w;
    const layer_acts *a = &m->layout->layers[l].a;
    const int C = c->C, F = c->F, Q = c->NH * c->HS, QKV = Q + 2 * c->KVH * c->HS;
    slam_act *delta = m->layout->a.delta;
    slam_act *attn_out = a->attn_out ? a->attn_out : delta, *mlp_out = a->mlp_out ? a->mlp_out : delta;
    norm_input(m, a->x, a->attn_in, a->attn_rstd, x_prev, delta_prev, &w->attn_norm, N);
    ops->matmul_forward(ops, a->qkv, a->attn_in, w->qkv.data, w->qkv_bias.data, N, C, QKV);
    norm_qk(m, l, N, NULL);
    attend(m, l, mask, decoder);
    ops->matmul_forward(ops, attn_out, a->attn, w->out.data, NULL, N, Q, C);
    norm_output(m, delta, attn_out, a->attn_rstd, &w->attn_norm, N);
    norm_input(m, a->x_mid, a->mlp_in, a->mlp_rstd, a->x, delta, &w->mlp_norm, N);
    ops->matmul_forward(ops, a->gate_up, a->mlp_in, w->gate_up.data, NULL, N, C, 2 * F);
    ops->swiglu_forward(ops, a->swiglu, a->gate_up, N, F);
    ops->matmul_forward(ops, mlp_out, a->swiglu, w->down.data, NULL, N, F, C);
    norm_output(m, delta, mlp_out, a->mlp_rstd, &w->mlp_norm, N);
}

/* From tokens to head_in. N is B T; while decoding it is B, one token per sequence. */
static void forward(slam_model *m, int N, const slam_mask *mask, const struct slam_decoder_state *decoder) {
    slam_ops *ops = m->ops;
    const model_weights *w = &m->layout->w;
    const model_acts *a = &m->layout->a;
    const model_layer *layers = m->layout->layers;
    const int C = m->config.C;
    slam_act *x = layers[0].a.x;
    ops->embedding_forward(ops, x, a->tokens, w->embed.data, N, C);
    for (int l = 0; l < m->config.L; l++) {
        layer_forward(m, l, x, l ? a->delta : NULL, N, mask, decoder);
        x = layers[l].a.x_mid;
    }
    ops->rmsnorm_forward(ops, a->x_end, a->head_in, a->head_rstd, x, a->delta, w->norm.data, (float)m->config.eps, N, 1,
                         C, C);
}

static int forward_batch(slam_model *m, const slam_batch *b, int targets, const struct slam_decoder_state *decoder) {
    if (!batch_upload(m, b, targets)) return 0;
    forward(m, b->B * b->T, &m->layout->mask, decoder);
    return 1;
}

/* The first n rows of logits, (n,P) on the device, as (n,V) on the host. */
static void logits_download(slam_model *m, float *logits, int n) {
    const size_t V = m->config.V, P = padded_vocabulary(&m->config), bytes = m->ops->act_bytes;
    unsigned char *host = NEW(unsigned char, n *P *bytes);
    m->ops->download(m->ops, host, m->layout->a.logits, n * P * bytes);
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t v = 0; v < V; v++) {
            uint32_t bits = 0; // bf16 is the upper half of a float
            memcpy((char *)&bits + 4 - bytes, host + (i * P + v) * bytes, bytes);
            logits[i * V + v] = float_from_bits(bits);
        }
    free(host);
}

/* The head, over head_rows rows of head_in at a time. Computes logits (N,V) on the host, or if that is NULL the losses
   and, unless scale is 0, the gradients of scale * sum_i weights_i loss_i: that of head_in, in dnorm, and adds that of
   the head's weight. weights (N), NULL: 1. */
static void head(slam_model *m, int N, float scale, const float *weights, float *logits) {
    slam_ops *ops = m->ops;
    const model_acts *a = &m->layout->a;
    const param *w = &m->layout->w.head;
    const int C = m->config.C, V = m->config.V, P = padded_vocabulary(&m->config), rows = m->layout->head_rows;
    for (int i = 0; i < N; i += rows) {
        const int n = N - i < rows ? N - i : rows;
        const slam_act *x = act_at(ops, a->head_in, (size_t)i * C);
        const slam_xent xent = {n, V, P, scale, weights ? weights + i : NULL};
        slam_act *dlogits = a->logits; // crossentropy replaces the logits
        ops->matmul_forward(ops, a->logits, x, w->data, NULL, n, C, P);
        if (logits) {
            logits_download(m, logits + (size_t)i * V, n);
            continue;
        }
        ops->crossentropy(ops, a->losses + i, a->logits, a->targets + i, &xent);
        if (scale == 0) continue;
        ops->matmul_backward_input(ops, act_at(ops, a->dnorm, (size_t)i * C), dlogits, w->data, n, C, P);
        ops->matmul_backward_weight(ops, w->grad, NULL, dlogits, x, n, C, P);
    }
}

/* ---- backward ---- */

/* The gradient of a sub-layer's output: that of the residual stream, dx (N,C), or through the norm, in dnorm. */
static const slam_act *norm_output_backward(slam_model *m, const slam_act *out, const float *rstd, const param *norm,
                                            int N) {
    slam_ops *ops = m->ops;
    const model_acts *g = &m->layout->a;
    const int C = m->config.C;
    if (!out) return g->dx;
    ops->zero(ops, g->dnorm, (size_t)N * C * ops->act_bytes);
    ops->rmsnorm_backward(ops, g->dnorm, norm->grad, g->dx, out, norm->data, rstd, N, 1, C, C);
    return g->dnorm;
}

/* Adds to dx the gradient that comes through a sub-layer, in dnorm, and the norm of its input x, if it has one. */
static void norm_input_backward(slam_model *m, const slam_act *x, const slam_act *in, const float *rstd,
                                const param *norm, int N) {
    slam_ops *ops = m->ops;
    const model_acts *g = &m->layout->a;
    const int C = m->config.C;
    if (in != x) ops->rmsnorm_backward(ops, g->dx, norm->grad, g->dnorm, x, norm->data, rstd, N, 1, C, C);
    else act_add(ops, g->dx, g->dx, g->dnorm, N, C);
}

/* One layer, from its end to its beginning. dx (N,C) is the gradient of the residual stream: after the layer on
   entry, before it on return. */
static void layer_backward(slam_model *m, int l, const slam_mask *shared_mask) {
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const layer_weights *w = &m->layout->layers[l].w;
    const layer_acts *a = &m->layout->layers[l].a;
    const model_acts *g = &m->layout->a;
    const slam_mask mask = layer_mask(m, l, shared_mask);
    const int N = mask.B * mask.T, C = c->C, F = c->F, Q = c->NH * c->HS, QKV = Q + 2 * c->KVH * c->HS;
    const int recompute = m->mode == SLAM_TRAIN_RECOMPUTE;
    slam_act *dgate_up = a->gate_up; // swiglu_backward overwrites gate_up, which is not needed again

    const slam_act *dout = norm_output_backward(m, a->mlp_out, a->mlp_rstd, &w->mlp_norm, N);
    if (recompute) ops->swiglu_forward(ops, a->swiglu, a->gate_up, N, F);
    ops->matmul_backward_weight(ops, w->down.grad, NULL, dout, a->swiglu, N, F, C);
    ops->matmul_backward_input(ops, g->dswiglu, dout, w->down.data, N, F, C);
    ops->swiglu_backward(ops, dgate_up, g->dswiglu, a->gate_up, N, F);
    if (recompute) norm_input(m, a->x_mid, a->mlp_in, a->mlp_rstd, a->x_mid, NULL, &w->mlp_norm, N);
    ops->matmul_backward_weight(ops, w->gate_up.grad, NULL, dgate_up, a->mlp_in, N, C, 2 * F);
    ops->matmul_backward_input(ops, g->dnorm, dgate_up, w->gate_up.data, N, C, 2 * F);
    norm_input_backward(m, a->x_mid, a->mlp_in, a->mlp_rstd, &w->mlp_norm, N);

    dout = norm_output_backward(m, a->attn_out, a->attn_rstd, &w->attn_norm, N);
    ops->matmul_backward_weight(ops, w->out.grad, NULL, dout, a->attn, N, Q, C);
    ops->matmul_backward_input(ops, g->dattn, dout, w->out.data, N, Q, C);
    ops->attention_backward(ops, g->dqkv, g->attn_scratch, g->dattn, a->attn, a->lse, a->qkv, &mask);
    norm_qk(m, l, N, g->dqkv);
    if (recompute) norm_input(m, a->x, a->attn_in, a->attn_rstd, a->x, NULL, &w->attn_norm, N);
    ops->matmul_backward_weight(ops, w->qkv.grad, w->qkv_bias.grad, g->dqkv, a->attn_in, N, C, QKV);
    ops->matmul_backward_input(ops, g->dnorm, g->dqkv, w->qkv.data, N, C, QKV);
    norm_input_backward(m, a->x, a->attn_in, a->attn_rstd, &w->attn_norm, N);
}

/* From dnorm, the gradient of head_in, to the gradients of all weights but the head's. */
static void backward(slam_model *m) {
    slam_ops *ops = m->ops;
    slam_layout *k = m->layout;
    const model_acts *a = &k->a;
    const int N = k->mask.B * k->mask.T, C = m->config.C, L = m->config.L;
    k->valid = 0;
    ops->zero(ops, a->dx, (size_t)N * C * ops->act_bytes);
    ops->rmsnorm_backward(ops, a->dx, k->w.norm.grad, a->dnorm, a->x_end, k->w.norm.data, a->head_rstd, N, 1, C, C);
    if (m->grads_ready) m->grads_ready(m->grads_context, L);
    for (int l = L - 1; l >= 0; l--) {
        layer_backward(m, l, &k->mask);
        if (m->grads_ready) m->grads_ready(m->grads_context, l);
    }
    ops->embedding_backward(ops, k->w.embed.grad, a->dx, a->tokens, N, C, m->config.V);
    if (m->grads_ready) m->grads_ready(m->grads_context, -1);
    m->grads_ready = NULL;
}

/* ---- passes over a batch ---- */

int slam_forward(slam_model *m, slam_batch *b) {
    const int N = b->B * b->T;
    if (!forward_batch(m, b, 1, NULL)) return 0;
    head(m, N, 0, NULL, NULL);
    m->ops->download(m->ops, b->losses, m->layout->a.losses, N * sizeof(float));
    m->layout->valid = m->mode != SLAM_INFERENCE;
    return m->ops->finish(m->ops);
}

/* Computes the logits again: slam_forward keeps head_rows rows of them only. */
int slam_backward(slam_model *m, const float *weights, double loss) {
    slam_ops *ops = m->ops;
    const model_acts *a = &m->layout->a;
    const int N = m->layout->mask.B * m->layout->mask.T;
    const float sum = (float)loss;
    if (!m->layout->valid)
        return set_error("slam_backward: expected a slam_forward just before it, with a plan for training");
    ops->upload(ops, a->loss_weights, weights, N * sizeof *weights);
    head(m, N, 1, a->loss_weights, NULL);
    ops->upload(ops, a->losses, &sum, sizeof sum);
    ops->sum(ops, m->stats, a->losses, 1);
    backward(m);
    return 1;
}

int slam_forward_backward(slam_model *m, const slam_batch *b, float scale) {
    const int N = b->B * b->T;
    if (!m->grads || m->mode == SLAM_INFERENCE) return set_error("the model is not planned for training");
    if (!forward_batch(m, b, 1, NULL)) return 0;
    head(m, N, scale, NULL, NULL);
    m->ops->sum(m->ops, m->stats, m->layout->a.losses, N);
    backward(m);
    return 1;
}

int slam_logits(slam_model *m, const slam_batch *b, float *logits) {
    if (!forward_batch(m, b, 0, NULL)) return 0;
    head(m, b->B * b->T, 0, NULL, logits);
    return m->ops->finish(m->ops);
}

/* ---- decoding ----
   The step that predicts the next token runs the last one, and stores its keys and values in the cache. The first step
   after a prefill runs the prompt's last token again, so that a prefill needs no logits. */

/* About the number of tokens per forward pass of a prefill. Its rows have a multiple of 64 tokens, so that attention
   sums over keys in an order that does not depend on the longest sequence. */
enum { PREFILL_TOKENS = 4096, PREFILL_TILE = 64 };

void slam_decoder_free(slam_decoder *d) {
    if (!d) return;
    d->model->ops->release(d->model->ops, d->state->cache);
    slam_batch_free(&d->state->batch);
    free(d->state);
    free(d->length);
    free(d);
}

static int decoder_plan(slam_decoder *d) {
    return slam_model_plan(d->model, d->state->batch.capacity, d->state->capacity, SLAM_INFERENCE);
}

slam_decoder *slam_decoder_new(slam_model *m, int slots, int T) {
    const slam_config *c = &m->config;
    if (slots < 1 || slots > 1 << 20 || T < 1 || T > 1 << 28 || (size_t)slots * T > INT_MAX / 4) {
        set_error("a decoder of %d sequences of %d tokens, expected 1 to 2^29 tokens in all", slots, T);
        return NULL;
    }
    slam_decoder *d = NEW(slam_decoder, 1);
    struct slam_decoder_state *s = d->state = NEW(struct slam_decoder_state, 1);
    d->model = m;
    d->slots = slots;
    d->T = T;
    d->length = NEW(int, 2 * (size_t)slots);
    d->last = d->length + slots;
    s->capacity = (int)round_up(T, PREFILL_TILE);
    s->layer_size = (size_t)slots * s->capacity * 2 * c->KVH * c->HS;
    s->cache = (slam_act *)m->ops->alloc(m->ops, c->L * s->layer_size * m->ops->act_bytes);
    const int prefill = PREFILL_TOKENS / s->capacity, step = (slots - 1) / s->capacity + 1; // rows that each needs
    s->batch = slam_batch_new(prefill > step ? prefill : step, s->capacity, 0);
    if (s->cache && decoder_plan(d)) return d;
    slam_decoder_free(d);
    return NULL;
}

int slam_decoder_start(slam_decoder *d, int n, const int *slots, const int *const *tokens, const int *lengths) {
    slam_model *m = d->model;
    struct slam_decoder_state *s = d->state;
    slam_batch *b = &s->batch;
    int longest = 1;
    for (int i = 0; i < n; i++) {
        if (slots[i] < 0 || slots[i] >= d->slots || lengths[i] < 1 || lengths[i] > d->T)
            return set_error("a sequence of %d tokens for slot %d, expected 1 to %d tokens and slots 0 to %d",
                             lengths[i], slots[i], d->T, d->slots - 1);
        if (lengths[i] > longest) longest = lengths[i];
    }
    if (!decoder_plan(d)) return 0;
    const int T = (int)round_up(longest, PREFILL_TILE), rows = b->capacity * s->capacity / T;
    s->prefill = 1;
    for (int first = 0; first < n; first += rows) {
        b->B = n - first < rows ? n - first : rows;
        b->T = T;
        for (int i = 0; i < b->B * T; i++) { // padding follows each sequence
            const int k = first + i / T, t = i % T, in = t < lengths[k];
            b->tokens[i] = in ? tokens[k][t] : 0;
            b->doc_start[i] = in ? 0 : t;
        }
        m->ops->upload(m->ops, m->layout->a.slots, slots + first, b->B * sizeof(int));
        m->ops->upload(m->ops, m->layout->a.lengths, lengths + first, b->B * sizeof(int));
        if (!forward_batch(m, b, 0, s)) return 0;
    }
    for (int i = 0; i < n; i++) {
        d->length[slots[i]] = lengths[i];
        d->last[slots[i]] = tokens[i][lengths[i] - 1];
    }
    return m->ops->finish(m->ops);
}

int slam_decoder_logits(slam_decoder *d, float *logits) {
    slam_model *m = d->model;
    int n = d->slots; // without the free slots at the end; others compute token 0
    while (n && !d->length[n - 1]) n--;
    if (!decoder_plan(d)) return 0;
    if (n == 0) return 1;
    int *cached = NEW(int, n);
    for (int i = 0; i < n; i++) cached[i] = d->length[i] ? d->length[i] - 1 : 0;
    m->ops->upload(m->ops, m->layout->a.lengths, cached, n * sizeof(int));
    m->ops->upload(m->ops, m->layout->a.tokens, d->last, n * sizeof(int));
    free(cached);
    const slam_mask mask = model_mask(m, n, d->state->capacity);
    m->layout->valid = 0;
    d->state->prefill = 0;
    forward(m, n, &mask, d->state);
    head(m, n, 0, NULL, logits);
    return m->ops->finish(m->ops);
}

int slam_decoder_append(slam_decoder *d, int slot, int token) {
    const int V = d->model->config.V;
    if (slot < 0 || slot >= d->slots || token >= V)
        return set_error("token %d for slot %d, expected below %d and slots 0 to %d", token, slot, V, d->slots - 1);
    if (token >= 0 && d->length[slot] == d->T)
        return set_error("the sequence in slot %d has %d tokens, the most that it can have", slot, d->T);
    d->last[slot] = token < 0 ? 0 : token;
    d->length[slot] = token < 0 ? 0 : d->length[slot] + 1;
    return 1;
}

/* ---- sampling ----
   In the order of Hugging Face's processors: penalty, temperature, top-k, top-p. The last three do not change the
   ranking of the tokens, so top-k and top-p together are one threshold. */

static int sampling_check(const slam_sampling *s) {
    return (s->temperature >= 0 && s->temperature < HUGE_VAL && s->top_k >= 0 && s->top_p >= 0 && s->top_p <= 1 &&
            s->repetition_penalty > 0 && s->repetition_penalty < HUGE_VAL) ||
           set_error("a temperature of %g, top-k of %d, top-p of %g, repetition penalty of %g, expected >= 0, >= 0, "
                     "0 to 1, > 0",
                     s->temperature, s->top_k, s->top_p, s->repetition_penalty);
}

static int compare_larger_first(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* The smallest of n probabilities, which need not be normalised, that top-k and top-p keep. */
static double sampling_threshold(const double *p, int n, const slam_sampling *s) {
    int kept = s->top_k > 0 && s->top_k < n ? s->top_k : n;
    double total = 0, sum = 0, *sorted = NEW(double, n);
    memcpy(sorted, p, n * sizeof *p);
    qsort(sorted, n, sizeof *sorted, compare_larger_first);
    while (kept < n && sorted[kept] == sorted[kept - 1]) kept++;
    for (int i = 0; i < kept; i++) total += sorted[i];
    for (int i = 0; s->top_p < 1 && i < kept; i++)
        if ((sum += sorted[i]) >= s->top_p * total) kept = i + 1;
    const double threshold = sorted[kept - 1];
    free(sorted);
    return threshold;
}

int slam_sample(float *logits, int V, const unsigned char *seen, const slam_sampling *s, double uniform) {
    const float penalty = (float)s->repetition_penalty;
    double total = 0, sum = 0, threshold = 0;
    int drawn = 1;
    if (!sampling_check(s)) return -1;
    for (int v = 1; v < V; v++) {
        float *z = &logits[v];
        if (isnan(*z)) *z = -HUGE_VALF;
        if (seen && seen[v]) *z = *z < 0 ? *z * penalty : *z / penalty;
        if (*z > logits[drawn]) drawn = v;
    }
    if (s->temperature == 0) return drawn;
    double *p = NEW(double, V); // not normalised
    for (int v = 1; v < V; v++) p[v] = exp((double)(logits[v] - logits[drawn]) / s->temperature);
    if (s->top_k > 0 || s->top_p < 1) threshold = sampling_threshold(p + 1, V - 1, s);
    for (int v = 1; v < V; v++) total += p[v] >= threshold ? p[v] : 0;
    for (int v = 1; v < V && sum <= uniform * total; v++) {
        sum += p[v] >= threshold ? p[v] : 0;
        if (sum > uniform * total) drawn = v;
    }
    free(p);
    return drawn;
}

/* ==========================================================================================
   SECTION 8. OPTIMISER  AdamW, schedules, gradient clipping, ZeRO-1
   AdamW over the model's one array of weights. Several ranks sum their gradients bucket by bucket, and each updates its
   part of every bucket.
   ========================================================================================== */

/* get_cosine_with_min_lr_schedule_with_warmup, get_inverse_sqrt_schedule (its time scale is the warm-up), ... of
   Transformers. As there, the first update of a warm-up has learning rate 0. */
double slam_learning_rate(const slam_schedule *s, long step) {
    const double t = (double)(step - s->warmup), decay = s->steps - s->warmup > 1 ? (double)(s->steps - s->warmup) : 1;
    const double floor = s->lr > 0 ? s->min_lr / s->lr : 0, scale = s->warmup > 0 ? (double)s->warmup : 10000;
    double factor = 1;
    if (t < 0) return s->lr * (double)step / (double)(s->warmup > 1 ? s->warmup : 1);
    if (s->kind == SLAM_COSINE) factor = 0.5 * (1 + cos(3.14159265358979323846 * (t / decay))) * (1 - floor) + floor;
    if (s->kind == SLAM_LINEAR) factor = (double)(s->steps - step) / decay;
    if (s->kind == SLAM_INVERSE_SQRT) return s->lr / sqrt((t + scale) / scale);
    return s->lr * (factor > 0 ? factor : 0);
}

/* ---- buckets ----
   Ranges of the array of weights, in the order in which the backward pass completes their gradients: an untied head,
   the layers from last to first, the embedding, then norms and biases. A bucket is as many layers as make a message
   worth sending, or a part of something large. */

enum { BUCKET_MIN = 1 << 18, BUCKET_MAX = 1 << 24 }; // numbers: 1 and 64 MB; PyTorch takes 25 MB

typedef struct bucket {
    size_t first, n;         // in the array of weights
    int after;               // its gradients are complete after this layer (as grads_ready counts)
    size_t part, part_n;     // the range that this rank reduces
    size_t update, update_n; // the range that it updates: the same with ZeRO-1, else all
    size_t state;            // where the moments and the float weights of that range begin in m, v and master
} bucket;

typedef struct slam_buckets {
    bucket *list;
    size_t n, capacity;
    size_t reduced;  // buckets whose reduction has begun since the last update
    int failed;      // the reduction of one has failed
    int sharded;     // ZeRO-1
    size_t moments;  // numbers of m, of v
    slam_comm *comm; // NULL: a single process
} slam_buckets;

static void bucket_add(slam_buckets *b, size_t first, size_t n, int after) {
    const size_t parts = b->comm ? (n + BUCKET_MAX - 1) / BUCKET_MAX : 1;
    const size_t each = n ? round_up((n + parts - 1) / parts, 256) : 0;
    for (size_t end = first + n; first < end; first += each) {
        const size_t size = end - first < each ? end - first : each;
        const range part = comm_part(b->comm, b->comm ? b->comm->rank : 0, size);
        bucket k = {first, size, after, first + part.first, part.end - part.first, first, size, first};
        if (b->sharded) {
            k.update = k.part;
            k.update_n = k.part_n;
            k.state = b->moments;
        }
        b->moments += k.update_n;
        GROW(bucket, b->list, b->capacity, b->n + 1);
        b->list[b->n++] = k;
    }
}

static void buckets_plan(slam_buckets *b, const slam_model *m) {
    const model_tensors *t = &m->layout->tensors;
    const int L = m->config.L;
    const size_t layer = (t->layers_end - t->first_layer) / L;
    bucket_add(b, t->layers_end, m->n_decayed - t->layers_end, L);
    for (int end = L, l = L - 1; l >= 0; l--) {
        if (l && (end - l) * layer < BUCKET_MIN) continue;
        bucket_add(b, t->first_layer + l * layer, (end - l) * layer, l);
        end = l;
    }
    bucket_add(b, 0, t->first_layer, -1);
    bucket_add(b, m->n_decayed, m->n_weights - m->n_decayed, -1);
}

/* ---- state ---- */

void slam_adamw_free(slam_adamw *o) {
    if (!o->model) return;
    slam_ops *ops = o->model->ops;
    ops->release(ops, o->m);
    ops->release(ops, o->v);
    ops->release(ops, o->master);
    free(o->buckets->list);
    free(o->buckets);
    o->model = NULL;
}

/* Copies weights or moments first .. first + n - 1 to o->m, o->v or o->master, as far as this rank keeps them. */
static void adamw_upload(slam_adamw *o, float *to, const float *host, size_t first, size_t n) {
    slam_ops *ops = o->model->ops;
    for (const bucket *k = o->buckets->list; k < o->buckets->list + o->buckets->n; k++) {
        const size_t begin = k->update > first ? k->update : first;
        const size_t end = k->update + k->update_n < first + n ? k->update + k->update_n : first + n;
        if (begin < end)
            ops->upload(ops, to + k->state + (begin - k->update), host + (begin - first), (end - begin) * sizeof *host);
    }
}

/* Copies o->m, o->v or the float weights (o->master, or the model's if it has them) of all ranks to host (n_weights),
   which is NULL on ranks other than 0. Between two steps: shards are gathered in the array of gradients. Collective. */
static int adamw_download(slam_adamw *o, const float *from, float *host) {
    slam_model *m = o->model;
    const slam_buckets *b = o->buckets;
    const int sharded = b->sharded && from != m->master;
    int ok = 1;
    for (const bucket *k = b->list; ok && sharded && k < b->list + b->n; k++)
        ok = comm_gather_parts(b->comm, m->grads + k->first, from + k->state, k->n, sizeof *from);
    comm_wait(b->comm);
    ok = ok && comm_finish(b->comm);
    if (ok && host) m->ops->download(m->ops, host, sharded ? m->grads : from, m->n_weights * sizeof *host);
    if (sharded) m->ops->zero(m->ops, m->grads, m->n_weights * sizeof *m->grads);
    return ok && m->ops->finish(m->ops);
}

/* Keeps this rank's shard of the float weights and frees the model's. */
static int master_shard(slam_adamw *o) {
    slam_model *m = o->model;
    float *host = weights_download(m);
    if (host) o->master = (float *)m->ops->alloc(m->ops, o->buckets->moments * sizeof *host);
    if (o->master) adamw_upload(o, o->master, host, 0, m->n_weights);
    free(host);
    m->ops->release(m->ops, m->master);
    m->master = NULL;
    return o->master != NULL;
}

int slam_adamw_init(slam_adamw *o, slam_model *m) {
    slam_ops *ops = m->ops;
    slam_buckets *b = o->buckets = NEW(slam_buckets, 1);
    b->comm = ops->comm;
    b->sharded = b->comm && b->comm->zero;
    o->model = m;
    o->updates = 0;
    o->m = o->v = o->master = NULL;
    buckets_plan(b, m);
    int ok = m->grads || set_error("the model is not planned for training");
    ok = ok && (m->master || set_error("the float weights of this model are sharded by another optimiser"));
    ok = ok && comm_connect(b->comm) && (!b->sharded || ops->act_bytes == 4 || master_shard(o));
    if (ok) o->m = (float *)ops->alloc(ops, b->moments * sizeof(float));
    if (o->m) o->v = (float *)ops->alloc(ops, b->moments * sizeof(float));
    if (slam_all_ok(b->comm, o->v != NULL)) return 1;
    slam_adamw_free(o);
    return 0;
}

void slam_adamw_reset(slam_adamw *o) {
    slam_ops *ops = o->model->ops;
    ops->zero(ops, o->m, o->buckets->moments * sizeof(float));
    ops->zero(ops, o->v, o->buckets->moments * sizeof(float));
    o->updates = 0;
}

/* ---- a step ---- */

/* grads_ready: begins the reduction of the buckets that are complete after layer l. */
static void reduce_ready(void *context, int l) {
    const slam_adamw *o = (const slam_adamw *)context;
    slam_buckets *b = o->buckets;
    comm_progress(b->comm);
    for (; b->reduced < b->n && b->list[b->reduced].after >= l; b->reduced++) {
        const bucket *k = &b->list[b->reduced];
        if (!comm_reduce_scatter(b->comm, o->model->grads + k->first, k->n)) b->failed = 1;
    }
}

void slam_adamw_overlap(slam_adamw *o) {
    if (!o->buckets->comm) return;
    o->model->grads_ready = reduce_ready;
    o->model->grads_context = o;
}

int slam_adamw_step(slam_adamw *o, double lr, slam_step *step) {
    slam_model *m = o->model;
    slam_ops *ops = m->ops;
    slam_buckets *b = o->buckets;
    const bucket *end = b->list + b->n;
    slam_adamw_params h = {lr, o->beta1, o->beta2, o->eps, o->weight_decay, o->clip, o->updates + 1};
    double stats[2];
    int ok = 1;
    if (b->comm) {
        reduce_ready(o, -1);
        comm_wait(b->comm);
        b->reduced = 0;
        for (const bucket *k = b->list; k < end; k++)
            if (k->part_n) ops->sum_squares(ops, m->stats + 1, m->grads + k->part, k->part_n);
        if (b->failed || !comm_finish(b->comm)) return 0;
        ops->download(ops, stats, m->stats, sizeof stats);
        slam_comm_sum(b->comm, stats, 2);
        ops->upload(ops, m->stats, stats, sizeof stats);
        for (const bucket *k = b->list; ok && !b->sharded && k < end; k++)
            ok = comm_gather_parts(b->comm, m->grads + k->first, m->grads + k->part, k->n, sizeof(float));
        comm_wait(b->comm);
    } else ops->sum_squares(ops, m->stats + 1, m->grads, m->n_weights);
    for (const bucket *k = b->list; ok && k < end; k++) {
        slam_act *w = act_at(ops, m->weights, k->update);
        float *master = o->master ? o->master + k->state : m->master + k->update;
        h.weight_decay = k->first < m->n_decayed ? o->weight_decay : 0; // as in Hugging Face's Trainer
        if (k->update_n)
            ops->adamw(ops, w, master, o->m + k->state, o->v + k->state, m->grads + k->update, m->stats, &h,
                       k->update_n);
        if (b->sharded) ok = comm_gather_parts(b->comm, act_at(ops, m->weights, k->first), w, k->n, ops->act_bytes);
    }
    comm_wait(b->comm);
    ops->zero(ops, m->grads, m->n_weights * sizeof(float));
    if (!ok || !comm_finish(b->comm)) return 0;
    ops->download(ops, stats, m->stats, sizeof stats);
    ops->zero(ops, m->stats, sizeof stats);
    step->loss_sum = stats[0];
    step->grad_norm = sqrt(stats[1]);
    step->skipped = !isfinite(stats[0]) || !isfinite(stats[1]);
    if (!step->skipped) o->updates++;
    return ops->finish(ops);
}

/* ==========================================================================================
   SECTION 9. BATCHES   documents -> chunks -> packed rows -> batches
   ========================================================================================== */
#include <glob.h>

/* ---- text repetition, by which preference pairs are skipped ---- */

static int compare_u64(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The share of the n-grams of length `order` that occur more than once; 0: there are none. words (n): hashes,
   overwritten. */
static double repeated_share(uint64_t *words, size_t n, int order) {
    const size_t grams = n >= (size_t)order ? n - (size_t)order + 1 : 0;
    size_t repeated = 0;
    for (size_t i = 0; i < grams; i++) words[i] = hash_bytes(HASH_START, words + i, (size_t)order * sizeof *words);
    if (grams) qsort(words, grams, sizeof *words, compare_u64);
    for (size_t i = 0; i < grams; i++)
        repeated += (i > 0 && words[i] == words[i - 1]) || (i + 1 < grams && words[i] == words[i + 1]);
    return grams ? (double)repeated / (double)grams : 0;
}

double slam_auto_bleu(const char *text, int order) {
    uint64_t *words = NULL;
    size_t n = 0, capacity = 0, length;
    for (const char *at = text; *at; at += length) {
        length = 1;
        if (isspace((unsigned char)*at)) continue;
        if (!ispunct((unsigned char)*at))
            while (at[length] && !isspace((unsigned char)at[length]) && !ispunct((unsigned char)at[length])) length++;
        GROW(uint64_t, words, capacity, n + 1);
        words[n++] = hash_bytes(HASH_START, at, length);
    }
    const double share = repeated_share(words, n, order);
    free(words);
    return share;
}

/* Whether the text of a pair repeats itself too much to learn from: its auto-BLEU-2 is max_repetition or more (0: no
   limit). */
static int pair_repeats(const char *prompt, const char *chosen, double max_repetition) {
    if (max_repetition <= 0) return 0;
    char *text = string_print("%s %s", prompt, chosen);
    const int repeats = slam_auto_bleu(text, 2) >= max_repetition;
    free(text);
    return repeats;
}

/* ---- files and sources ---- */

enum { LONGEST_CONTEXT = 1 << 24 }; // small enough that a sum of a few lengths fits into an int

/* A file's tokens: a mapped shard, or the units of a .jsonl file as a shard would hold them. */
typedef struct token_file {
    char *path;
    const uint16_t *tokens;
    size_t n;
    shard mapped;
    uint16_t *memory;    // of a .jsonl file
    int largest;         // of a .jsonl file: the largest unit
    size_t largest_line; // and the first line that has it, 0: none
} token_file;

slam_data *slam_data_new(int context) {
    if (context < 2 || context > LONGEST_CONTEXT) {
        set_error("context %d, expected 2 to %d tokens", context, LONGEST_CONTEXT);
        return NULL;
    }
    slam_data *d = NEW(slam_data, 1);
    d->context = context;
    return d;
}

void slam_data_free(slam_data *d) {
    if (!d) return;
    for (size_t i = 0; i < d->n_files; i++) {
        file_map_close(&d->files[i].mapped.map);
        free(d->files[i].memory);
        free(d->files[i].path);
    }
    for (size_t i = 0; i < d->n_sources; i++) free(d->sources[i].name);
    free(d->files);
    for (slam_data *part = d, *next; part; part = next) {
        next = part->held_out;
        free(part->sources);
        free(part->chunks);
        free(part);
    }
}

/* Reads the lines of a .jsonl file as documents; lines without units are skipped. */
static int token_file_read(token_file *f) {
    units_reader reader;
    slam_units u = ZERO;
    size_t capacity = 0;
    int status;
    if (!units_open(&reader, f->path)) return 0;
    while ((status = units_next(&reader, &u)) > 0) {
        if (u.n == 0) continue;
        GROW(uint16_t, f->memory, capacity, f->n + u.n + 2);
        f->memory[f->n++] = DOCUMENT_TOKEN;
        for (size_t i = 0; i < u.n; i++) {
            if (u.unit[i] > f->largest || !f->largest_line) f->largest = u.unit[i], f->largest_line = reader.line;
            f->memory[f->n++] = (uint16_t)(u.unit[i] + FIRST_UNIT);
        }
        f->memory[f->n++] = DOCUMENT_TOKEN;
    }
    slam_units_free(&u);
    units_close(&reader);
    f->tokens = f->memory;
    if (status == 0 && f->n > UINT32_MAX)
        return set_error("%s: found %zu tokens, expected at most %u; make it token shards", f->path, f->n, UINT32_MAX);
    return status == 0;
}

/* Opens a file of tokens. Shards that are read together must have the same units. */
static int data_add_file(slam_data *d, const char *path) {
    const int is_shard = string_ends(path, ".bin");
    if (!is_shard && !string_ends(path, ".jsonl"))
        return set_error("%s: expected token shards (.bin) or unit lines (.jsonl)", path);
    GROW(token_file, d->files, d->file_capacity, d->n_files + 1);
    token_file *f = &d->files[d->n_files++];
    memset(f, 0, sizeof *f);
    f->path = string_copy(path);
    if (!is_shard) return token_file_read(f);
    shard *s = &f->mapped;
    if (!shard_open(s, path)) return 0;
    if (s->V && d->V && s->V != d->V)
        return set_error("%s: the vocabulary is %d, expected %d as in the files before it", path, s->V, d->V);
    if (s->fingerprint && d->fingerprint && s->fingerprint != d->fingerprint)
        return set_error("%s: units of unit tokenizer %08x, expected %08x as in the files before it", path,
                         (unsigned)s->fingerprint, (unsigned)d->fingerprint);
    if (s->V) d->V = s->V;
    if (s->fingerprint) d->fingerprint = s->fingerprint;
    f->tokens = s->tokens;
    f->n = s->n;
    return 1;
}

/* Adds the files that a pattern matches, in byte order. Its longest beginning that exists, a folder or the whole, is a
   name, not a pattern. */
static int path_glob(const char *pattern, slam_strings *list) {
    glob_t found;
    strbuf escaped = ZERO;
    char *name = string_copy(pattern);
    size_t exists = strlen(name);
    while (exists > 0 && access(name, F_OK) != 0) {
        do exists--;
        while (exists > 0 && name[exists] != '/');
        name[exists] = 0;
    }
    free(name);
    for (size_t i = 0; pattern[i]; i++)
        strbuf_add(&escaped, "%s%c", i < exists && strchr("*?[\\", pattern[i]) ? "\\" : "", pattern[i]);
    const int status = glob(escaped.n ? escaped.at : "", GLOB_NOSORT, NULL, &found); // its order depends on the locale
    strbuf_free(&escaped);
    if (status != 0) return set_error("%s: no such file", pattern);
    for (size_t i = 0; i < found.gl_pathc; i++) slam_strings_add(list, found.gl_pathv[i]);
    globfree(&found);
    qsort(list->at, list->n, sizeof *list->at, compare_strings);
    return 1;
}

int slam_data_add(slam_data *d, const char *pattern, double weight) {
    slam_strings list = ZERO;
    if (d->chunks) return set_error("%s: sources cannot be added to prepared data", pattern);
    if (!(weight > 0 && weight <= 1000))
        return set_error("%s: weight %g, expected more than 0 and at most 1000", pattern, weight);
    GROW(slam_source, d->sources, d->source_capacity, d->n_sources + 1);
    slam_source *s = &d->sources[d->n_sources++];
    memset(s, 0, sizeof *s);
    s->weight = weight;
    s->name = string_copy(pattern);
    s->first_file = d->n_files;
    int ok = path_glob(pattern, &list);
    for (size_t i = 0; ok && i < list.n; i++) ok = data_add_file(d, list.at[i]);
    s->end_file = d->n_files;
    slam_strings_free(&list);
    return ok;
}

/* ---- files -> documents: the only pass over all tokens ---- */

typedef struct document_list {
    slam_chunk *at; // whole documents
    size_t n, capacity;
} document_list;

/* Adds the documents of a file: `1 u.. 1`, one right after the other. `1 1`, a recording without units, is skipped. The
   hash h becomes h P + t mod 2^64 with each token t; P is odd, so that another token makes another hash. */
static int scan_file(const token_file *f, uint32_t file, int V, document_list *list, uint64_t *hash) {
    const int token_end = V < 65536 ? V : 65536;
    const uint64_t P = 0x9e3779b97f4a7c15u;
    uint64_t h = *hash;
    size_t start = 0;
    int open = 0;
    if (f->largest >= token_end - FIRST_UNIT)
        return set_error("%s:%zu: unit %d, expected below %d (the vocabulary is %d)", f->path, f->largest_line,
                         f->largest, token_end - FIRST_UNIT, V);
    for (size_t at = 0; at < f->n; at++) {
        const int token = f->tokens[at];
        h = h * P + (uint64_t)token;
        if (token < 1 || token >= token_end)
            return set_error("%s: token %zu (from 0) is %d, expected 1 to %d", f->path, at, token, token_end - 1);
        if (!open && token != DOCUMENT_TOKEN)
            return set_error("%s: token %zu (from 0) is %d, expected 1: no document is open", f->path, at, token);
        if (token != DOCUMENT_TOKEN) continue;
        if (open && at > start + 1) {
            const slam_chunk document = {file, (uint32_t)start, (uint32_t)(at + 1 - start)};
            GROW(slam_chunk, list->at, list->capacity, list->n + 1);
            list->at[list->n++] = document;
        }
        open = !open;
        start = at;
    }
    *hash = h;
    return !open || set_error("%s: the document at token %zu (from 0) has no closing 1", f->path, start);
}

/* ---- documents -> chunks ---- */

/* Streams of random numbers: (seed, source or epoch, one of these). */
enum { STREAM_HELD_OUT, STREAM_EXTRAS, STREAM_ORDER };

/* Splits a source's documents into chunks; a last chunk of one token has nothing to predict and is dropped. n_held
   documents, chosen by selection sampling (Knuth, The Art of Computer Programming 2, algorithm 3.4.2 S), go to
   held_out. */
static void split_source(slam_data *d, size_t source, const document_list *list, uint64_t n_held, uint64_t seed) {
    const uint32_t context = (uint32_t)d->context;
    uint64_t rng = rng_stream(seed, source, STREAM_HELD_OUT), left = n_held;
    for (slam_data *part = d; part; part = part->held_out) {
        part->sources[source].documents = part == d ? list->n - (size_t)n_held : (size_t)n_held;
        part->sources[source].first_chunk = part->n_chunks;
    }
    for (size_t i = 0; i < list->n; i++) {
        const int held = left && rng_below(&rng, list->n - i) < left;
        slam_data *part = held ? d->held_out : d;
        left -= (uint64_t)held;
        for (slam_chunk rest = list->at[i]; rest.n >= 2;) {
            GROW(slam_chunk, part->chunks, part->chunk_capacity, part->n_chunks + 1);
            slam_chunk *c = &part->chunks[part->n_chunks++];
            *c = rest;
            if (c->n > context) c->n = context;
            rest.first += c->n;
            rest.n -= c->n;
        }
    }
    for (slam_data *part = d; part; part = part->held_out) part->sources[source].end_chunk = part->n_chunks;
}

int slam_data_prepare(slam_data *d, int V, double fraction, uint64_t seed) {
    if (d->chunks) return set_error("data can be prepared only once");
    if (d->n_sources == 0) return set_error("no data: no source was added");
    if (V <= FIRST_UNIT) return set_error("a vocabulary of %d, expected at least %d", V, FIRST_UNIT + 1);
    if (!(fraction >= 0 && fraction < 1))
        return set_error("held-out fraction %g, expected at least 0 and below 1", fraction);
    const uint64_t split[] = {(uint64_t)d->context, fraction > 0 ? seed : 0};
    uint64_t hash = hash_bytes(HASH_START, split, sizeof split);
    document_list list = ZERO;
    int ok = 1;
    d->V = V;
    if (fraction > 0) {
        slam_data *held = NEW(slam_data, 1);
        *held = *d;
        held->sources = NEW(slam_source, d->n_sources);
        memcpy(held->sources, d->sources, d->n_sources * sizeof *d->sources);
        for (size_t i = 0; i < d->n_sources; i++) held->sources[i].weight = 1;
        d->held_out = held;
    }
    for (size_t i = 0; ok && i < d->n_sources; i++) {
        const slam_source *s = &d->sources[i];
        list.n = 0;
        for (size_t file = s->first_file; ok && file < s->end_file; file++)
            ok = scan_file(&d->files[file], (uint32_t)file, V, &list, &hash);
        if (ok && list.n == 0) ok = set_error("%s: contains no documents", s->name);
        uint64_t n_held = (uint64_t)(fraction * (double)list.n + 0.5);
        if (fraction > 0 && n_held < 1) n_held = 1;
        if (list.n && n_held > list.n - 1) n_held = list.n - 1;
        if (ok) split_source(d, i, &list, n_held, seed);
        hash = hash_bytes(hash_bytes(hash, &n_held, sizeof n_held), &s->weight, sizeof s->weight);
        if (d->n_chunks > UINT32_MAX) ok = set_error("%s: more than %u chunks", s->name, UINT32_MAX);
    }
    free(list.at);
    d->hash = hash;
    if (d->held_out) d->held_out->hash = hash;
    if (ok && d->held_out && !d->held_out->chunks)
        ok = set_error("%s: has one document, which cannot be held out", d->sources[0].name);
    return ok;
}

/* ---- packing: lengths -> rows ---- */

typedef struct packed_row {
    uint32_t first, n; // items first .. first + n - 1 of the list
    uint32_t length;   // the sum of their lengths
} packed_row;

/* Rows of items (indices of chunks, pairs, ...), one after the other. */
typedef struct packed_rows {
    uint32_t *items; // (n_items) of all rows
    packed_row *at;  // (n)
    size_t n_items, n, item_capacity, capacity;
} packed_rows;

static void packed_rows_free(packed_rows *rows) {
    free(rows->items);
    free(rows->at);
}

/* Adds a row of n items. */
static void packed_rows_add(packed_rows *rows, const uint32_t *items, uint32_t n, uint32_t length) {
    const packed_row row = {(uint32_t)rows->n_items, n, length};
    GROW(uint32_t, rows->items, rows->item_capacity, rows->n_items + n);
    GROW(packed_row, rows->at, rows->capacity, rows->n + 1);
    memcpy(rows->items + rows->n_items, items, n * sizeof *items);
    rows->n_items += n;
    rows->at[rows->n++] = row;
}

/* The greatest length of an unpacked item up to `room`; 0: none. fit[l] is l while items of length l remain, else a
   smaller length to try (a disjoint-set forest with path halving: Tarjan and van Leeuwen 1984). */
static uint32_t longest_fit(uint32_t *fit, uint32_t room) {
    while (fit[room] != room) room = fit[room] = fit[fit[room]];
    return room;
}

/* Packs n items of lengths[item] 1 .. T into rows of T by first fit decreasing (Johnson 1973), computed row by row:
   each takes the longest remaining item that fits, again and again. */
static void pack(packed_rows *rows, const uint32_t *items, const uint32_t *lengths, size_t n, uint32_t T) {
    uint32_t *count = NEW(uint32_t, 3 * ((size_t)T + 1) + 2 * n), *first = count + T + 1, *fit = first + T + 1;
    uint32_t *sorted = fit + T + 1, *row = sorted + n; // sorted: by length; row: items of one
    for (size_t i = 0; i < n; i++) count[lengths[items[i]]]++;
    for (uint32_t l = 1; l <= T; l++) {
        first[l] = first[l - 1] + count[l];
        fit[l] = count[l] ? l : fit[l - 1];
    }
    for (size_t i = n; i-- > 0;) sorted[--first[lengths[items[i]]]] = items[i];
    for (rows->n = rows->n_items = 0; rows->n_items < n;) {
        uint32_t length = 0, k = 0;
        for (uint32_t l; (l = longest_fit(fit, T - length)) > 0; length += l) {
            row[k++] = sorted[first[l]++];
            if (--count[l] == 0) fit[l] = l - 1;
        }
        packed_rows_add(rows, row, k, length);
    }
    free(count);
}

/* Packs the items again. Finds by bisection a small length of rows that needs no more rows than T does: MULTIFIT
   (Coffman, Garey and Johnson 1978). Returns this length. */
static uint32_t pack_evenly(packed_rows *rows, const uint32_t *lengths, uint32_t T) {
    const size_t n = rows->n_items;
    uint32_t low = 1, high = T, *items = NEW(uint32_t, n);
    for (size_t i = 0; i < n; i++) {
        items[i] = rows->items[i];
        if (lengths[items[i]] > low) low = lengths[items[i]];
    }
    pack(rows, items, lengths, n, T);
    const size_t fewest = rows->n;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        pack(rows, items, lengths, n, middle);
        if (rows->n <= fewest) high = middle;
        else low = middle + 1;
    }
    pack(rows, items, lengths, n, high);
    free(items);
    return high;
}

/* ---- rows -> batches ---- */

/* Writes n tokens to positions at .. at + n - 1 (row * T + column) of the sequence that starts in column doc_start.
   The target of each is the token after it, of the last one `next` (-1: none); the first `skip` positions have none.
   Returns the position after them. */
static int batch_put(slam_batch *b, int at, const uint16_t *tokens, int n, int next, int skip, int doc_start) {
    for (int k = 0; k < n; k++) {
        b->tokens[at + k] = tokens[k];
        b->targets[at + k] = k < skip ? -1 : k + 1 < n ? tokens[k + 1] : next;
        b->doc_start[at + k] = doc_start;
    }
    return at + n;
}

/* Notes that the targets of an item are at positions first .. end - 1. */
static void batch_add_sequence(slam_batch *b, size_t item, int first, int end) {
    const slam_sequence sequence = {item, first, end};
    GROW(slam_sequence, b->sequences, b->sequence_capacity, b->n_sequences + 1);
    b->sequences[b->n_sequences++] = sequence;
}

static const uint16_t *chunk_tokens(const slam_data *d, const slam_chunk *c) {
    return d->files[c->file].tokens + c->first;
}

static int batch_put_chunk(slam_batch *b, int at, const void *context, uint32_t item) {
    const slam_data *d = (const slam_data *)context;
    const slam_chunk *c = &d->chunks[item];
    const int n = (int)c->n;
    batch_add_sequence(b, item, at, at + n - 1);
    return batch_put(b, at, chunk_tokens(d, c), n, -1, 0, at % b->T);
}

/* ---- the loader ----
   An epoch's items (chunks, pairs, windows of scored sequences) are packed. If shuffled, they are put in random order
   before, and the rows after. Both orders depend only on seed, epoch, weights and lengths, so that a position
   (epoch,row) can be restored. With longest_row an epoch is not packed: its rows are single items, and the items of
   each global batch (that of all ranks) are packed when it begins. */

struct slam_packer {
    const void *context; // argument of put: the slam_data, the slam_pairs, ...
    int (*put)(slam_batch *, int at, const void *context, uint32_t item); // writes an item, returns its end
    uint32_t *lengths;                                                    // of all items
    const slam_data *data; // its sources decide how often an epoch has a chunk; NULL: items first .. end - 1, once
    size_t first, end;
    int longest_row; // 0: epochs are packed
    uint32_t *order; // the epoch's items in the order in which they are drawn
    size_t n_order, order_capacity;
    packed_rows epoch, batch;    // rows of the epoch, of the global batch
    const packed_row *share_end; // end of this rank's rows of the batch
};

/* Adds the chunks that an epoch has of a source of weight w: each of the n chunks floor(w) times, and on average (w -
   floor(w)) n extra ones, taken cyclically from a fixed random permutation, from where the last epoch stopped. So no
   chunk is an extra twice in an epoch, and all come equally often in the long run. */
static void packer_add_source(struct slam_packer *p, const slam_loader *l, size_t source, uint64_t epoch) {
    const slam_source *s = &p->data->sources[source];
    const size_t n = s->end_chunk - s->first_chunk, times = (size_t)s->weight;
    double extra = (s->weight - (double)times) * (double)n;
    if (fabs(extra - floor(extra + 0.5)) < 1e-6) extra = floor(extra + 0.5); // 2.3 - 2 is not quite 0.3
    const uint64_t first = (uint64_t)((double)epoch * extra), end = (uint64_t)((double)(epoch + 1) * extra);
    GROW(uint32_t, p->order, p->order_capacity, p->n_order + times * n + (size_t)(end - first));
    for (size_t k = 0; k < times * n; k++) p->order[p->n_order++] = (uint32_t)(s->first_chunk + k % n);
    if (first == end) return;
    uint32_t *permutation = NEW(uint32_t, n);
    uint64_t rng = rng_stream(l->seed, source, STREAM_EXTRAS);
    for (size_t k = 0; k < n; k++) permutation[k] = (uint32_t)(s->first_chunk + k);
    rng_shuffle(&rng, permutation, n);
    for (uint64_t k = first; k < end; k++) p->order[p->n_order++] = permutation[k % n];
    free(permutation);
}

static void loader_begin_epoch(slam_loader *l, uint64_t epoch) {
    struct slam_packer *p = l->packer;
    uint64_t rng = rng_stream(l->seed, epoch, STREAM_ORDER);
    l->epoch = epoch;
    l->row = 0;
    p->n_order = p->epoch.n = p->epoch.n_items = 0;
    for (size_t i = 0; p->data && i < p->data->n_sources; i++) packer_add_source(p, l, i, epoch);
    GROW(uint32_t, p->order, p->order_capacity, p->n_order + p->end - p->first);
    for (size_t i = p->first; i < p->end; i++) p->order[p->n_order++] = (uint32_t)i;
    if (l->shuffle) rng_shuffle(&rng, p->order, p->n_order);
    for (size_t i = 0; p->longest_row && i < p->n_order; i++)
        packed_rows_add(&p->epoch, &p->order[i], 1, p->lengths[p->order[i]]);
    if (!p->longest_row) pack(&p->epoch, p->order, p->lengths, p->n_order, (uint32_t)l->T);
    l->epoch_rows = p->epoch.n;
    if (p->longest_row) return;
    for (size_t i = p->epoch.n; l->shuffle && i > 1; i--) { // pack has sorted them by length
        const size_t k = (size_t)rng_below(&rng, i);
        const packed_row swap = p->epoch.at[i - 1];
        p->epoch.at[i - 1] = p->epoch.at[k];
        p->epoch.at[k] = swap;
    }
}

/* A loader of n items; the caller sets their lengths, and data or first and end. */
static slam_loader *loader_new(const void *context, int (*put)(slam_batch *, int, const void *, uint32_t), size_t n,
                               int T, uint64_t seed, int shuffle) {
    slam_loader *l = NEW(slam_loader, 1);
    l->packer = NEW(struct slam_packer, 1);
    l->packer->context = context;
    l->packer->put = put;
    l->packer->lengths = NEW(uint32_t, n);
    l->T = T;
    l->seed = seed;
    l->shuffle = shuffle;
    return l;
}

slam_loader *slam_loader_new(const slam_data *d, uint64_t seed, int shuffle) {
    if (!d->chunks) {
        set_error("the data is not prepared");
        return NULL;
    }
    slam_loader *l = loader_new(d, batch_put_chunk, d->n_chunks, d->context, seed, shuffle);
    for (size_t i = 0; i < d->n_chunks; i++) l->packer->lengths[i] = d->chunks[i].n;
    if (shuffle) l->packer->data = d;
    else l->packer->end = d->n_chunks;
    loader_begin_epoch(l, 0);
    if (l->packer->n_order) return l;
    set_error("%s: its weight, %g, gives no chunk per epoch", d->sources[0].name, d->sources[0].weight);
    slam_loader_free(l);
    return NULL;
}

void slam_loader_free(slam_loader *l) {
    if (!l) return;
    packed_rows_free(&l->packer->epoch);
    packed_rows_free(&l->packer->batch);
    free(l->packer->order);
    free(l->packer->lengths);
    free(l->packer);
    free(l);
}

int slam_loader_seek(slam_loader *l, uint64_t epoch, uint64_t row) {
    if (epoch != l->epoch) loader_begin_epoch(l, epoch);
    if (row > l->epoch_rows)
        return set_error("row %llu of epoch %llu, but the epoch has %llu rows: this is other data",
                         (unsigned long long)row, (unsigned long long)epoch, (unsigned long long)l->epoch_rows);
    l->row = row;
    return 1;
}

int slam_loader_begin(slam_loader *l, int n, const slam_comm *comm) {
    struct slam_packer *p = l->packer;
    packed_rows *b = &p->batch;
    b->n = b->n_items = l->tokens = l->targets = 0;
    for (l->n = 0; l->n < n; l->n++, l->row++) {
        if (l->row >= l->epoch_rows && !l->shuffle) break;
        if (l->row >= l->epoch_rows) loader_begin_epoch(l, l->epoch + 1);
        const packed_row *row = &p->epoch.at[l->row];
        packed_rows_add(b, p->epoch.items + row->first, row->n, row->length);
        l->tokens += row->length;
        l->targets += row->length - row->n; // the last token of a chunk has no target
    }
    if (p->longest_row) l->T = (int)round_up(pack_evenly(b, p->lengths, (uint32_t)p->longest_row), 16);
    const range share = comm_share(comm, b->n);
    p->share_end = b->at + share.end;
    l->rows = (int)b->n;
    l->rows_left = (int)(share.end - share.first);
    return l->n;
}

/* Positions without an item are padding, each a sequence of its own, so that no other attends to it. */
int slam_loader_next(slam_loader *l, slam_batch *b) {
    const struct slam_packer *p = l->packer;
    const packed_row *row = p->share_end - l->rows_left;
    b->B = l->rows_left < b->capacity ? l->rows_left : b->capacity;
    b->T = l->T;
    b->n_sequences = 0;
    for (int i = 0; i < b->B * b->T; i++) {
        b->tokens[i] = 0;
        b->targets[i] = -1;
        b->doc_start[i] = i % b->T;
        if (b->mask_start) b->mask_start[i] = b->mask_end[i] = 0;
    }
    for (int i = 0; i < b->B; i++)
        for (int k = 0, at = i * b->T; k < (int)row[i].n; k++)
            at = p->put(b, at, p->context, p->batch.items[row[i].first + k]);
    l->rows_left -= b->B;
    return b->B;
}

/* ==========================================================================================
   SECTION 10. AUDIO      resampler, audio files, segmenter
   ========================================================================================== */

#include <pthread.h>

enum { SAMPLE_RATE = 16000 };
#define PI 3.14159265358979323846

/* Without FMA contraction (a * b + c rounded once) MFCC and k-means have the same bits in every build. gcc has an
   attribute of functions for this, clang a pragma, which holds to the end of the file. */
#if defined __GNUC__ && !defined __clang__
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#else
#define UNFUSED
#endif
#ifdef __clang__
#pragma clang fp contract(off)
#endif

/* ---- resampler ----
   A polyphase filter: with up / down = 16000 / rate in lowest terms, output k is at input position k down / up, whose
   fraction takes `up` values, the phases. The coefficients of a phase are samples of the windowed sinc
       h(t) = sin(2 pi f t) / (pi t) kaiser(t / half)         f = 0.95 of the lower Nyquist frequency
   A transition band of `width` (from 0.9 to 1.0 of that Nyquist frequency) and an attenuation of A dB need a window of
   (Kaiser's formulas, as in Oppenheim and Schafer):
       half = (A - 7.95) / (2 * 14.36 * width)     beta = 0.1102 (A - 8.7) */

#define RESAMPLER_ATTENUATION 108.0
enum { RESAMPLER_LANES = 16 };

typedef struct resampler {
    int left, taps; // coefficients to the left of a position; of a phase, a multiple of RESAMPLER_LANES
    uint64_t up, down;
    float *tap; // (up,taps)
} resampler;

/* Modified Bessel function of the first kind, order 0. */
UNFUSED static double bessel_i0(double x) {
    double sum = 1, term = 1;
    for (int k = 1; term > 1e-17 * sum; k++) {
        term *= x * x / (4.0 * k * k);
        sum += term;
    }
    return sum;
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

UNFUSED static resampler *resampler_new(int rate) {
    const double nyquist = 0.5 * (rate < SAMPLE_RATE ? rate : SAMPLE_RATE) / rate, f = 0.95 * nyquist;
    const double half = (RESAMPLER_ATTENUATION - 7.95) / (2 * 14.36 * 0.1 * nyquist);
    const double beta = 0.1102 * (RESAMPLER_ATTENUATION - 8.7), scale = 1 / bessel_i0(beta);
    const uint64_t divisor = greatest_common_divisor(SAMPLE_RATE, (uint64_t)rate);
    resampler *r = NEW(resampler, 1);
    r->up = SAMPLE_RATE / divisor;
    r->down = (uint64_t)rate / divisor;
    r->left = (int)half;
    r->taps = (2 * r->left + 2 + RESAMPLER_LANES - 1) / RESAMPLER_LANES * RESAMPLER_LANES;
    r->tap = NEW(float, r->up *(uint64_t)r->taps);
    for (uint64_t phase = 0; phase < r->up; phase++) {
        float *tap = r->tap + phase * (uint64_t)r->taps;
        double sum = 0;
        for (int i = 0; i < 2 * r->left + 2; i++) {
            const double t = i - r->left - (double)phase / (double)r->up, u = t / half;
            if (fabs(u) >= 1) continue;
            const double sinc = t == 0 ? 2 * f : sin(2 * PI * f * t) / (PI * t);
            const double h = sinc * scale * bessel_i0(beta * sqrt(1 - u * u));
            tap[i] = (float)h;
            sum += h;
        }
        for (int i = 0; i < r->taps; i++) tap[i] = (float)(tap[i] / sum); // unit DC gain
    }
    return r;
}

static resampler *resamplers[192001]; // by rate; never freed: there are few rates

static const resampler *resampler_of(int rate) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    if (rate < 1000 || rate > 192000) { // limits the size of the output
        set_error("%d samples per second, expected 1000 to 192000", rate);
        return NULL;
    }
    pthread_mutex_lock(&lock);
    if (!resamplers[rate]) resamplers[rate] = resampler_new(rate);
    pthread_mutex_unlock(&lock);
    return resamplers[rate];
}

/* Sum of tap_i in_(first + i), in 16 partial sums (near the ends of the input in one) for every width of vectors. */
UNFUSED static float resampler_dot(const float *tap, int taps, const float *in, int64_t first, int64_t n) {
    float lane[RESAMPLER_LANES] = {0};
    if (first < 0 || first + taps > n) { // samples beyond the ends are 0
        for (int64_t i = first < 0 ? -first : 0; i < taps && first + i < n; i++) lane[0] += tap[i] * in[first + i];
        return lane[0];
    }
    for (int i = 0; i < taps; i += RESAMPLER_LANES)
        for (int j = 0; j < RESAMPLER_LANES; j++) lane[j] += tap[i + j] * in[first + i + j];
    for (int width = RESAMPLER_LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
}

float *slam_resample(const float *in, size_t n, int rate, size_t *n_out) {
    const resampler *r = resampler_of(rate);
    if (!r) return NULL;
    const int64_t outputs = (int64_t)((n * r->up + r->down - 1) / r->down);
    float *out = NEW(float, outputs);
    *n_out = (size_t)outputs;
    if (rate == SAMPLE_RATE) return (float *)memcpy(out, in, n * sizeof *out);
    PARALLEL_FOR
    for (int64_t k = 0; k < outputs; k++) {
        const uint64_t at = (uint64_t)k * r->down;
        const float *tap = r->tap + at % r->up * (uint64_t)r->taps;
        out[k] = resampler_dot(tap, r->taps, in, (int64_t)(at / r->up) - r->left, (int64_t)n);
    }
    return out;
}

/* ---- audio files ----
   Frames (one sample per channel; not those of features) are read in blocks: memory holds a segment, not the file. WAV
   with PCM or float samples is read here, the same in every build; everything else by libsndfile. */

#ifdef SLAM_SNDFILE
#include <sndfile.h>
#endif

enum { AUDIO_BLOCK = 8192 }; // samples; also the maximum number of channels

typedef struct audio {
    char *name, kind[48]; // in error messages
    FILE *f;
    int channel;                         // the one that is read, from 1; 0: their mean
    int rate, channels, bytes, is_float; // bytes, is_float: type of a sample
    uint64_t frames, at;                 // in the file, 0: unknown; read so far
    float *waiting;                      // segmenter: (n) samples read ahead, at the rate of the file
    size_t n, capacity;
    uint64_t first;    // waiting[0] is this frame of the file
    double start, end; // of the segment that was read last, in seconds
    int last;          // it ends the file
    void *codec;       // SNDFILE *; NULL: WAV, read here
} audio;

static void audio_close(audio *a) {
#ifdef SLAM_SNDFILE
    if (a->codec) sf_close((SNDFILE *)a->codec);
#endif
    if (a->f) fclose(a->f);
    free(a->name);
    free(a->waiting);
    memset(a, 0, sizeof *a);
}

static int audio_open_codec(audio *a) {
#ifdef SLAM_SNDFILE
    SF_INFO info = ZERO;
    char path[32];
    snprintf(path, sizeof path, "/dev/fd/%d", fileno(a->f)); // sf_open_fd closes the descriptor if it fails
    lseek(fileno(a->f), 0, SEEK_SET);                        // on some systems it shares the file offset
    a->codec = sf_open(path, SFM_READ, &info);
    if (!a->codec) return set_error("%s: %s, and libsndfile cannot read it: %s", a->name, a->kind, sf_strerror(NULL));
    const int estimate = (info.format & SF_FORMAT_TYPEMASK) == 0x230000; // SF_FORMAT_MPEG
    a->frames = estimate || info.frames == SF_COUNT_MAX ? 0 : (uint64_t)info.frames;
    a->rate = info.samplerate;
    a->channels = info.channels;
    a->bytes = sizeof(float);
    a->is_float = 1;
    return 1;
#else
    return set_error("%s: %s; to read it, install libsndfile1-dev and build again", a->name, a->kind);
#endif
}

/* Reads a fmt chunk of n bytes: type (1: PCM, 3: float, 0xfffe: see subtype), channels, rate (32 bits), bytes per
   second (32), bytes per frame, bits per sample, 4 more, subtype. Returns 1, 0 on error, -1: for libsndfile. */
static int wav_read_format(audio *a, size_t n) {
    static const unsigned types[] = {2, 6, 7, 17, 49, 64, 80, 85, 255};
    static const char *const names[] = {"Microsoft ADPCM", "A-law", "mu-law", "IMA ADPCM", "GSM 6.10",
                                        "G.721",           "MPEG",  "MP3",    "AAC"};
    uint16_t w[13] = {0};
    if (fread(w, n < sizeof w ? n : sizeof w, 1, a->f) != 1) return set_error("%s: an empty fmt chunk", a->name);
    const unsigned type = w[0] == 0xfffe ? w[12] : w[0], channels = w[1], frame = w[6], bits = w[7];
    snprintf(a->kind, sizeof a->kind, "a WAV file of codec %u", type);
    for (int i = 0; i < 9; i++)
        if (type == types[i]) snprintf(a->kind, sizeof a->kind, "a WAV file of codec %s", names[i]);
    if (type != 1 && type != 3) return -1;
    a->rate = w[3] < 0x8000 ? w[2] | w[3] << 16 : INT_MAX;
    a->channels = (int)channels;
    a->bytes = (int)(bits + 7) / 8;
    a->is_float = type == 3;
    if (channels < 1 || channels > AUDIO_BLOCK || (int)frame != a->channels * a->bytes ||
        (a->is_float ? bits != 32 && bits != 64 : bits < 1 || bits > 32))
        return set_error("%s: %u channels of %u bits in %u bytes, expected PCM of 1 to 32 bits, or float of 32 or 64",
                         a->name, channels, bits, frame);
    return 1;
}

/* Moves past ID3v2 tags (a header that ends in 28 bits of length, a footer if h[5] & 16) and returns their size. */
static uint64_t skip_tags(FILE *f) {
    unsigned char h[10];
    uint64_t end = 0;
    for (; fread(h, sizeof h, 1, f) == 1 && !memcmp(h, "ID3", 3); fseeko(f, (off_t)end, SEEK_SET)) {
        const unsigned length = (h[6] & 127u) << 21 | (h[7] & 127u) << 14 | (h[8] & 127u) << 7 | (h[9] & 127u);
        end += length + (h[5] & 16 ? 20 : 10);
    }
    fseeko(f, (off_t)end, SEEK_SET);
    return end;
}

/* Finds 'fmt ' and 'data' among the chunks (4-byte name, size, data, padding to an even size). In streamed files the
   size of 'data' is 0, or 0x7ffff000 or more, beyond the end of the file: the data are all that follows. But 0 is an
   empty recording if the size after "RIFF" is known and counts more than the header. RF64 (EBU Tech 3306) has both
   sizes as 64 bits in chunk 'ds64'. Returns as wav_read_format. */
static int wav_open(audio *a, uint64_t size) {
    enum { UNKNOWN = 0x7ffff000 };
    uint32_t riff[3], chunk[2]; // name, size, type
    const uint64_t start = skip_tags(a->f);
    if (fread(riff, 12, 1, a->f) != 1 || memcmp(&riff[2], "WAVE", 4)) return -1;
    if (memcmp(riff, "RIFF", 4) && memcmp(riff, "RF64", 4) && memcmp(riff, "BW64", 4)) return -1;
    uint64_t sizes[2] = {riff[1], UINT32_MAX}; // of all that follows it, of the data
    for (uint64_t at = start + 12, n; fread(chunk, 8, 1, a->f) == 1; fseeko(a->f, (off_t)at, SEEK_SET)) {
        at += 8;
        const uint64_t rest = size - at;
        const int is_data = !memcmp(chunk, "data", 4), is_format = !memcmp(chunk, "fmt ", 4) && !a->channels;
        if (!memcmp(chunk, "ds64", 4) && fread(sizes, sizeof sizes, 1, a->f) != 1)
            return set_error("%s: chunk 'ds64' is longer than the rest of the file", a->name);
        n = is_data && chunk[1] == UINT32_MAX ? sizes[1] : chunk[1];
        const int empty = n == 0 && sizes[0] && sizes[0] < UNKNOWN && start + 8 + sizes[0] > at;
        const int to_end = is_data && (n == 0 ? !empty : n >= UNKNOWN && n > rest);
        if (n > rest && !to_end)
            return set_error("%s: chunk '%.4s' is longer than the rest of the file", a->name, (const char *)chunk);
        if (is_data && !a->channels) return set_error("%s: chunk 'data' comes before chunk 'fmt '", a->name);
        const int format = is_format ? wav_read_format(a, n) : 1;
        if (format != 1) return format;
        a->frames = is_data ? (to_end ? rest : n) / ((uint64_t)a->channels * (uint64_t)a->bytes) : 0;
        if (is_data) return 1;
        at += n + (n & 1);
    }
    return set_error("%s: it has no chunk 'data'", a->name);
}

/* Opens the file at path. name: in error messages, NULL: path. Call audio_close even after an error. */
static int audio_open(audio *a, const char *path, const char *name) {
    size_t size;
    memset(a, 0, sizeof *a);
    a->name = string_copy(name ? name : path);
    snprintf(a->kind, sizeof a->kind, "not a WAV file");
    a->f = file_open(path, a->name, &size);
    const int wav = a->f ? wav_open(a, size) : 0;
    return wav < 0 ? audio_open_codec(a) : wav;
}

/* One sample. PCM: up to 8 bits are unsigned, more signed, left-aligned in their bytes; scaled to -1..1. */
static double wav_sample(const unsigned char *p, int is_float, int bytes) {
    double wide;
    float single;
    uint32_t bits = 0;
    if (bytes == 8) return memcpy(&wide, p, 8), wide;
    if (is_float) return memcpy(&single, p, 4), (double)single;
    if (bytes == 1) return (p[0] - 128) / 128.0;
    for (int i = 0; i < bytes; i++) bits = bits >> 8 | (uint32_t)p[i] << 24;
    return (int32_t)bits / 2147483648.0;
}

/* Reads up to n frames, of each a channel or the mean of all. How many, 0 at the end, -1: an error, or no frames. */
static ptrdiff_t audio_read(audio *a, float *out, size_t n) {
    size_t done = 0;
    for (size_t got = 1; got && done < n; done += got, a->at += got) {
        double block[AUDIO_BLOCK]; // frames as in the file, or floats of libsndfile
        const unsigned char *p = (const unsigned char *)block;
        const size_t fit = (size_t)(AUDIO_BLOCK / a->channels), most = n - done < fit ? n - done : fit;
        const uint64_t rest = a->frames > a->at ? a->frames - a->at : 0;
        int error = 0;
#ifdef SLAM_SNDFILE
        if (a->codec) {
            got = (size_t)sf_readf_float((SNDFILE *)a->codec, (float *)block, (sf_count_t)most);
            error = sf_error((SNDFILE *)a->codec);
        } else
#endif
            got = fread(block, (size_t)(a->channels * a->bytes), most < rest ? most : (size_t)rest, a->f);
        if (!got && (rest || error))
            return set_error("%s: damaged or truncated after %llu frames", a->name, (unsigned long long)a->at) - 1;
        for (size_t i = done; i < done + got; i++) {
            double sum = 0;
            for (int c = 1; c <= a->channels; c++, p += a->bytes)
                if (!a->channel || c == a->channel) sum += wav_sample(p, a->is_float, a->bytes);
            out[i] = (float)(a->channel ? sum : sum / a->channels);
            if (!(fabsf(out[i]) <= 1e6f)) // float files may exceed full scale
                return set_error("%s: a sample is %g, expected -1e6 to 1e6", a->name, (double)out[i]) - 1;
        }
    }
    return n == 0 || a->at > 0 ? (ptrdiff_t)done : set_error("%s: it holds no audio", a->name) - 1;
}

/* ---- segmenter ----
   A file longer than the limit is split. A segment is resampled as if it were a separate file. */

/* Where to split x (limit): in the middle of the 20 ms with the least energy in its last fifth. */
UNFUSED static size_t split_position(const float *x, int rate, size_t limit) {
    const size_t window = (size_t)rate / 50;
    size_t best = limit < window ? limit : limit - window;
    double least = INFINITY;
    for (size_t at = limit - limit / 5; at + window <= limit; at += window / 2) {
        double sum = 0;
        for (size_t i = at; i < at + window; i++) sum += (double)x[i] * (double)x[i];
        if (sum < least) {
            least = sum;
            best = at;
        }
    }
    return limit < window ? limit : best + window / 2;
}

/* Reads a segment of at most max_seconds (0: the file), at 16 kHz. Returns 1, 0 at the end, -1 on error. */
static int audio_next_segment(audio *a, double max_seconds, float **samples, size_t *n) {
    const double most = max_seconds > 0 ? max_seconds * a->rate : 1e15;
    const size_t limit = (size_t)fmax(1, fmin(most, 1e15));
    if (!resampler_of(a->rate)) return set_error("%s: %s", a->name, slam_error()) - 1;
    for (ptrdiff_t got = 1; got && a->n <= limit; a->n += (size_t)got) { // in steps: the limit may be huge
        const size_t step = limit + 1 - a->n < (1 << 20) ? limit + 1 - a->n : 1 << 20;
        GROW(float, a->waiting, a->capacity, a->n + step);
        if ((got = audio_read(a, a->waiting + a->n, step)) < 0) return -1;
    }
    if (a->n == 0) return 0;
    a->last = a->n <= limit;
    const size_t used = a->last ? a->n : split_position(a->waiting, a->rate, limit);
    *samples = slam_resample(a->waiting, used, a->rate, n);
    a->start = (double)a->first / a->rate;
    a->first += used;
    a->end = (double)a->first / a->rate;
    a->n -= used;
    memmove(a->waiting, a->waiting + used, a->n * sizeof(float));
    return 1;
}

float *slam_audio_load(const char *path, size_t *n) {
    audio a;
    float *samples = NULL;
    if (audio_open(&a, path, NULL)) audio_next_segment(&a, 0, &samples, n);
    audio_close(&a);
    return samples;
}
/* ==========================================================================================
   SECTION 11. UNITS      MFCC, HuBERT, k-means, unit tokenizer, inputs, reader, writer

   Audio at 16 kHz becomes frames of features; the nearest centroid of a frame is its unit. The units of a recording
   depend neither on other recordings nor on the number of threads; those of HuBERT do on device and data type.
   ========================================================================================== */

/* ---- MFCC ----
   Davis and Mermelstein 1980, as the Python package python_speech_features computes them:
       y_t = x_t - 0.97 x_(t-1)        P_k = |FFT(hamming y)_k|^2 / N        E_j = sum_k filter_jk P_k
       c_0 = log sum_k P_k             c_i = lifter_i DCT(log E)_i           filter: 40 triangles, evenly spaced in mel
       d_t = sum_n n (c_(t+n) - c_(t-n)) / (2 sum_n n^2),  n = 1, 2; the first and last frame are repeated
   The second differences are the d of d. The window, which is also the size of the FFT, is a power of two. */

enum { MFCC_CEPSTRA = 13, MFCC_WIDTH = 3 * MFCC_CEPSTRA, MFCC_FILTERS = 40, MFCC_WINDOW = 1024 }; // the largest

struct slam_mfcc {
    int window, step;
    double hamming[MFCC_WINDOW];
    double cosine[MFCC_WINDOW], sine[MFCC_WINDOW]; // of 2 pi k / window
    int edge[MFCC_FILTERS + 2];                    // filter j rises from edge j to j + 1 and falls to j + 2
    double dct[MFCC_FILTERS][MFCC_CEPSTRA];        // includes the lifter
};

UNFUSED static struct slam_mfcc *mfcc_new(int rate) {
    struct slam_mfcc *m = NEW(struct slam_mfcc, 1);
    m->step = SAMPLE_RATE / rate;
    m->window = rate == 25 ? 1024 : 512;
    for (int k = 0; k < m->window; k++) {
        m->hamming[k] = 0.54 - 0.46 * cos(2 * PI * k / (m->window - 1));
        m->cosine[k] = cos(2 * PI * k / m->window);
        m->sine[k] = sin(2 * PI * k / m->window);
    }
    const double top = 2595 * log10(1 + SAMPLE_RATE / 2.0 / 700); // mel (O'Shaughnessy 1987)
    for (int j = 0; j < MFCC_FILTERS + 2; j++) {
        const double hz = 700 * (pow(10, top * j / (MFCC_FILTERS + 1) / 2595) - 1);
        m->edge[j] = (int)floor((m->window + 1) * hz / SAMPLE_RATE);
    }
    m->edge[MFCC_FILTERS + 1] = m->window / 2; // exact; above, pow() may round to a number below it
    for (int i = 0; i < MFCC_CEPSTRA; i++) {
        const double lifter = 1 + 11 * sin(PI * i / 22), norm = sqrt((i ? 2.0 : 1.0) / MFCC_FILTERS);
        for (int j = 0; j < MFCC_FILTERS; j++)
            m->dct[j][i] = lifter * norm * cos(PI * i * (2 * j + 1) / (2.0 * MFCC_FILTERS));
    }
    return m;
}

/* Fourier transform of n real samples x[0], x[stride], ...: out[k] = Re X_k for k <= n/2, out[n - k] = Im X_k for
   0 < k < n/2. From E of the even and O of the odd samples (Cooley and Tukey 1965), with w = exp(-2 pi i / n):
       X_k = E_k + w^k O_k     X_(n/2-k) = conj(E_k - w^k O_k) */
UNFUSED static void mfcc_fft(const struct slam_mfcc *m, double *out, double *x, int n, int stride) {
    const int half = n / 2;
    double *e = out, *o = out + half;
    if (n == 2) {
        e[0] = x[0] + x[stride];
        o[0] = x[0] - x[stride];
        return;
    }
    mfcc_fft(m, e, x, half, 2 * stride);
    mfcc_fft(m, o, x + stride, half, 2 * stride);
    const double e_0 = e[0], o_0 = o[0];
    e[0] = e_0 + o_0;
    o[0] = e_0 - o_0;
    for (int k = 1; k < half - k; k++) {
        const double c = m->cosine[k * stride], s = m->sine[k * stride], e_re = e[k], e_im = e[half - k];
        const double wo_re = c * o[k] + s * o[half - k], wo_im = c * o[half - k] - s * o[k];
        e[k] = e_re + wo_re;
        o[half - k] = e_im + wo_im;
        e[half - k] = e_re - wo_re;
        o[k] = wo_im - e_im;
    }
    o[half / 2] = -o[half / 2]; // k = n / 4: w^k = -i
}

/* Log of an energy; 0 counts as DBL_EPSILON. */
static double log_energy(double x) { return log(x > 0 ? x : 2.220446049250313e-16); }

/* out (13), the cepstra of the frame of x (n) that begins at sample `start` */
UNFUSED static void mfcc_frame(const struct slam_mfcc *m, float *out, const float *x, size_t n, size_t start) {
    double frame[MFCC_WINDOW], X[MFCC_WINDOW], power[MFCC_WINDOW / 2 + 1], cepstra[MFCC_CEPSTRA] = ZERO, sum = 0;
    const int N = m->window;
    for (int i = 0; i < N; i++) {
        const size_t t = start + (size_t)i;
        frame[i] = t < n ? m->hamming[i] * (x[t] - (t ? 0.97 * x[t - 1] : 0)) : 0;
    }
    mfcc_fft(m, X, frame, N, 1);
    for (int k = 0; k <= N / 2; k++) {
        const double im = k > 0 && k < N / 2 ? X[N - k] : 0;
        power[k] = (X[k] * X[k] + im * im) / N;
        sum += power[k];
    }
    for (int j = 0; j < MFCC_FILTERS; j++) {
        const int a = m->edge[j], b = m->edge[j + 1], c = m->edge[j + 2];
        double e = 0;
        for (int k = a; k < b; k++) e += power[k] * (k - a) / (b - a);
        for (int k = b; k < c; k++) e += power[k] * (c - k) / (c - b);
        e = log_energy(e);
        for (int i = 1; i < MFCC_CEPSTRA; i++) cepstra[i] += m->dct[j][i] * e;
    }
    cepstra[0] = log_energy(sum);
    for (int i = 0; i < MFCC_CEPSTRA; i++) out[i] = (float)cepstra[i];
}

/* out = x or, if normalize, (x - mean) / sqrt(variance + 1e-7), as Hugging Face's Wav2Vec2FeatureExtractor */
UNFUSED static void copy_waveform(float *out, const float *x, size_t n, int normalize) {
    double mean = 0, variance = 0;
    for (size_t i = 0; normalize && i < n; i++) mean += x[i];
    mean /= (double)n;
    for (size_t i = 0; normalize && i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / sqrt(variance / (double)n + 1e-7);
    for (size_t i = 0; i < n; i++) out[i] = normalize ? (float)((x[i] - mean) * scale) : x[i];
}

/* out (frames,39) of x (n) */
static void mfcc_compute(const struct slam_mfcc *m, int normalize, float *out, size_t frames, const float *x,
                         size_t n) {
    float *copy = NEW(float, n);
    copy_waveform(copy, x, n, normalize);
    PARALLEL_FOR
    for (size_t t = 0; t < frames; t++) mfcc_frame(m, out + t * MFCC_WIDTH, copy, n, t * (size_t)m->step);
    free(copy);
    for (int from = 0; from < 2 * MFCC_CEPSTRA; from += MFCC_CEPSTRA) // differences of columns `from` to `from + 12`
        for (size_t t = 0, last = frames - 1; t < frames; t++)
            for (int i = from; i < from + MFCC_CEPSTRA; i++) {
                float sum = 0;
                for (size_t n = 1; n <= 2; n++) {
                    const size_t before = t > n ? t - n : 0, after = t + n < last ? t + n : last;
                    sum += (float)n * (out[after * MFCC_WIDTH + i] - out[before * MFCC_WIDTH + i]);
                }
                out[t * MFCC_WIDTH + i + MFCC_CEPSTRA] = sum / 10;
            }
}

/* ---- networks: weights from a folder of a Hugging Face or PyTorch model ---- */

typedef struct network_module { // a linear layer, a norm, or a convolution (OC,K,C), as conv1d reads it
    slam_act *w, *b;
} network_module;

typedef struct network { // first member of a model
    slam_ops *ops;
    slam_act *weights;
    char *arena;             // activations of a batch
    size_t arena_bytes, end; // end: numbers in `weights`
    uint64_t hash;           // of the weights in use, and of what the caller has hashed before
    const char *prefix;      // that names of tensors may have
    tensors *file;           // while the weights are read
    int ok;                  // no error so far
} network;

/* At least `bytes` in n->arena. */
static int network_grow(network *n, size_t bytes) {
    if (bytes <= n->arena_bytes) return 1;
    n->ops->release(n->ops, n->arena);
    n->arena = (char *)n->ops->alloc(n->ops, bytes);
    n->arena_bytes = n->arena ? bytes : 0;
    return n->arena != NULL;
}

/* Loads the weights in `folder` by load(n), which is called twice: it checks shapes and counts numbers while n->weights
   is NULL, then it reads. */
static int network_load(network *n, const char *folder, const char *prefix, void (*load)(network *)) {
    n->prefix = prefix;
    n->file = tensors_open(folder);
    n->ok = n->file != NULL;
    if (n->ok) load(n);
    if (n->ok) n->weights = (slam_act *)n->ops->alloc(n->ops, n->end * n->ops->act_bytes);
    n->ok = n->weights != NULL;
    n->end = 0;
    if (n->ok) load(n);
    tensors_close(n->file);
    return n->ok && n->ops->finish(n->ops);
}

static void network_free(network *n) {
    n->ops->release(n->ops, n->weights);
    n->ops->release(n->ops, n->arena);
}

/* The tensor NAME.suffix, with or without the prefix. */
static const tensor *network_find(const network *n, const char *name, const char *suffix) {
    char *full = string_print("%s%s.%s", n->prefix, name, suffix);
    const tensor *t = tensors_find(n->file, full);
    if (!t) t = tensors_find(n->file, full + strlen(n->prefix));
    free(full);
    return t;
}

/* The numbers of tensor NAME.suffix of shape (a,b,c), or (a,b) or (a) where the rest is 1. NULL on error, and while
   shapes are checked. */
static float *network_read(network *n, const char *name, const char *suffix, size_t a, size_t b, size_t c) {
    const tensor *t = network_find(n, name, suffix);
    const size_t count = a * b * c;
    strbuf shape = ZERO;
    if (t) strbuf_add_shape(&shape, t->rank, t->shape);
    if (n->ok && (!t || t->count != count || t->shape[0] != a || (b > 1 && t->shape[1] != b)))
        n->ok = set_error("%s: tensor '%s.%s' %s%s%s, expected (%zu,%zu,%zu)", n->file->file->path, name, suffix,
                          shape.n ? "has shape (" : "is missing", shape.n ? shape.at : "", shape.n ? ")" : "", a, b, c);
    strbuf_free(&shape);
    if (!n->ok || !n->weights) return NULL;
    float *x = NEW(float, count);
    n->ok = tensor_floats(t, x, 0, count);
    for (size_t i = 0; n->ok && i < count; i++)
        if (!isfinite(x[i]))
            n->ok = set_error("%s: tensor '%s.%s' has a number that is not finite", t->file, name, suffix);
    return x;
}

/* The weight (a,b,c) of module NAME, plain or with weight norm (Salimans and Kingma 2016) over all but one axis:
       w = g v / |v|      g has one number for each index of the first axis, or of the last if by_last */
UNFUSED static float *network_weight(network *n, const char *name, int by_last, size_t a, size_t b, size_t c) {
    static const char *const names[][2] = {{"weight", ""}, // then older and newer names of PyTorch
                                           {"weight_v", "weight_g"},
                                           {"parametrizations.weight.original1", "parametrizations.weight.original0"}};
    int kind = 2;
    while (kind > 0 && !network_find(n, name, names[kind][0])) kind--;
    float *v = network_read(n, name, names[kind][0], a, b, c);
    if (kind == 0) return v;
    float *g = network_read(n, name, names[kind][1], by_last ? 1 : a, 1, by_last ? c : 1);
    for (size_t i = 0, norms = by_last ? c : a, each = b * (by_last ? a : c); g && i < norms; i++) {
        double squares = 0;
        float *first = v + i * (by_last ? 1 : each);
        const size_t step = by_last ? c : 1;
        for (size_t k = 0; k < each; k++) squares += (double)first[k * step] * first[k * step];
        const float scale = squares > 0 ? (float)(g[i] / sqrt(squares)) : 0;
        for (size_t k = 0; k < each; k++) first[k * step] *= scale;
    }
    free(g);
    return v;
}

/* Places x (a,b,c) at n->end as (a,c,b) and frees it. The hash takes places and numbers in the order of the calls. */
static slam_act *network_store(network *n, float *x, size_t a, size_t b, size_t c) {
    const size_t count = a * b * c, at = n->end;
    n->end += round_up(count, 256);
    if (!x) return NULL;
    float *host = NEW(float, count), *next = host;
    n->hash ^= at;
    for (size_t i = 0; i < a; i++)
        for (size_t k = 0; k < c; k++)
            for (size_t j = 0; j < b; j++) {
                uint32_t bits;
                *next = x[(i * b + j) * c + k];
                memcpy(&bits, next++, sizeof bits);
                n->hash = (n->hash ^ bits) * HASH_PRIME;
            }
    slam_act *to = act_at(n->ops, n->weights, at);
    n->ok = n->ok && network_grow(n, count * sizeof *x);
    if (n->ok) n->ops->upload(n->ops, n->arena, host, count * sizeof *host);
    if (n->ok) n->ops->to_act(n->ops, to, (float *)n->arena, count);
    free(host);
    free(x);
    return to;
}

static slam_act *network_tensor(network *n, const char *name, const char *suffix, size_t a, size_t b, size_t c) {
    return network_store(n, network_read(n, name, suffix, a, b, c), a, b, c);
}

/* NAME.weight (a,b,c) and NAME.bias (a); %d in NAME: the layer */
static void network_module_load(network *n, network_module *m, const char *format, int layer, size_t a, size_t b,
                                size_t c, int bias) {
    char *name = string_print(format, layer);
    m->w = network_tensor(n, name, "weight", a, b, c);
    if (bias) m->b = network_tensor(n, name, "bias", a, 1, 1);
    free(name);
}

/* ---- HuBERT (Hsu et al. 2021): configuration ----
   Samples, with zeros before and after them, pass a stack of convolutions (after the first or after each a norm, after
   each GELU), a linear layer, a convolution over many frames that adds positions, and a transformer. */

enum { HUBERT_MOST_FRAMES = 1 << 19 };

typedef struct hubert_config { // its bytes are part of the model's hash
    int convs, width[LIST_MOST], kernel[LIST_MOST], stride[LIST_MOST];
    int conv_bias, all_norms; // all_norms: a layer norm after each convolution, else a channel norm after the first
    int projection_norm, C, L, NH, F;
    int taps, groups, batch_norm; // of the convolution for positions
    int stable;                   // norms before attention and MLP, else after them
    double eps;
} hubert_config;

static const field hubert_fields[] = {
    {"conv_bias", FIELD_BOOL, offsetof(hubert_config, conv_bias), 0, 0, 0},
    {"feat_proj_layer_norm", FIELD_BOOL, offsetof(hubert_config, projection_norm), 0, 0, 0},
    {"hidden_size", FIELD_INT, offsetof(hubert_config, C), 1, 1 << 14, 0},
    {"num_hidden_layers", FIELD_INT, offsetof(hubert_config, L), 1, 1 << 10, 0},
    {"num_attention_heads", FIELD_INT, offsetof(hubert_config, NH), 1, 1 << 10, 0},
    {"intermediate_size", FIELD_INT, offsetof(hubert_config, F), 1, 1 << 16, 0},
    {"num_conv_pos_embeddings", FIELD_INT, offsetof(hubert_config, taps), 1, 1 << 10, 0},
    {"num_conv_pos_embedding_groups", FIELD_INT, offsetof(hubert_config, groups), 1, 1 << 7, 0},
    {"conv_pos_batch_norm", FIELD_BOOL, offsetof(hubert_config, batch_norm), 0, 0, 0},
    {"do_stable_layer_norm", FIELD_BOOL, offsetof(hubert_config, stable), 0, 0, 0},
    {"layer_norm_eps", FIELD_REAL, offsetof(hubert_config, eps), 0, 1, 0},
};

/* *step: samples per frame */
static int hubert_config_load(hubert_config *k, const char *path, int *step) {
    static const char *const words[][2] = {
        {"model_type", "hubert"}, {"hidden_act", "gelu"}, {"feat_extract_activation", "gelu"}};
    static const char *const lists[] = {"conv_dim", "conv_kernel", "conv_stride"};
    int *const numbers[] = {k->width, k->kernel, k->stride};
    // clang-format off
    const hubert_config defaults = { // of Transformers' HubertConfig
        7, {512, 512, 512, 512, 512, 512, 512}, {10, 3, 3, 3, 3, 2, 2}, {5, 2, 2, 2, 2, 2, 2}, 0, 0, 1,
        768, 12, 12, 3072, 128, 16, 0, 0, 1e-5};
    // clang-format on
    json *c = json_load(path);
    *k = defaults;
    int ok = c && fields_read(c, hubert_fields, sizeof hubert_fields / sizeof *hubert_fields, k, path);
    for (int i = 0; ok && i < 3; i++) {
        const char *word = json_string(c, words[i][0], words[i][1]);
        if (strcmp(word, words[i][1]))
            ok = set_error("%s: %s is '%s', expected '%s'", path, words[i][0], word, words[i][1]);
    }
    const char *norm = json_string(c, "feat_extract_norm", "group");
    k->all_norms = !strcmp(norm, "layer");
    if (ok && !k->all_norms && strcmp(norm, "group"))
        ok = set_error("%s: feat_extract_norm is '%s', expected 'group' or 'layer'", path, norm);
    for (int i = 0; ok && i < 3; i++)
        ok = k->convs = json_list(json_get(c, lists[i]), lists[i], numbers[i], 7, i ? k->convs : 0, lists[0], path);
    *step = 1;
    for (int i = 0; ok && i < k->convs; i++)
        if ((*step *= k->stride[i]) > 1 << 11)
            ok = set_error("%s: conv_stride multiplies to more than %d samples per frame", path, 1 << 11);
    if (ok && json_get(c, "adapter_attn_dim"))
        ok = set_error("%s: adapter_attn_dim is set, but adapters are not supported", path);
    if (ok && (k->C % k->NH || k->C % k->groups))
        ok = set_error("%s: hidden_size is %d, expected a multiple of num_attention_heads, %d, and of "
                       "num_conv_pos_embedding_groups, %d",
                       path, k->C, k->NH, k->groups);
    json_free(c);
    return ok;
}

/* ---- HuBERT: weights ---- */

typedef struct hubert_layer {
    network_module qkv, out, up, down, attention_norm, mlp_norm; // qkv: one matrix (3C,C)
} hubert_layer;

typedef struct slam_hubert {
    network net;
    hubert_config config;
    int layer, pad, step, do_normalize; // layers in use; as in slam_unit_config; samples per frame; of the model
    network_module conv[LIST_MOST], conv_norm[LIST_MOST], projection_norm, projection, positions, norm;
    network_module batch_norm; // scale and shift of the input of `positions`
    hubert_layer *layers;
    slam_act *centroids; // (K,C)
    float *squares;      // (K) of the centroids
} slam_hubert;

/* The convolution for positions, with weight norm over all but the taps, or with batch norm and fixed statistics (Ioffe
   and Szegedy 2015): scale x + shift before the convolution,
       scale = w / sqrt(var + 1e-5)      shift = b - mean scale */
UNFUSED static void hubert_load_positions(slam_hubert *h) {
    static const char *const conv = "encoder.pos_conv_embed.conv", *const norm = "encoder.pos_conv_embed.batch_norm";
    const size_t C = h->config.C, K = h->config.taps, width = C / h->config.groups, at = h->net.end;
    const int batch_norm = h->config.batch_norm;
    network *n = &h->net;
    n->end += round_up(C * width * K, 256); // the bias is read first, and comes second
    h->positions.b = network_tensor(n, conv, "bias", C, 1, 1);
    const size_t end = n->end;
    n->end = at;
    float *weight = batch_norm ? network_read(n, conv, "weight", C, width, K) : network_weight(n, conv, 1, C, width, K);
    h->positions.w = network_store(n, weight, C, width, K);
    n->end = end;
    if (!batch_norm) return;
    float *w = network_read(n, norm, "weight", C, 1, 1), *b = network_read(n, norm, "bias", C, 1, 1);
    float *mean = network_read(n, norm, "running_mean", C, 1, 1), *var = network_read(n, norm, "running_var", C, 1, 1);
    for (size_t c = 0; var && c < C; c++) {
        const double scale = w[c] / sqrt((double)var[c] + 1e-5);
        if (!isfinite(scale)) n->ok = set_error("%s: '%s.running_var' is %g < 0", n->file->file->path, norm, var[c]);
        w[c] = (float)scale;
        b[c] = (float)(b[c] - mean[c] * scale);
    }
    free(mean);
    free(var);
    h->batch_norm.w = network_store(n, w, C, 1, 1);
    h->batch_norm.b = network_store(n, b, C, 1, 1);
}

/* What the output of layer h->layer needs. */
static void hubert_load_weights(network *n) {
    slam_hubert *h = (slam_hubert *)n;
    const hubert_config *k = &h->config;
    const size_t C = k->C, F = k->F;
    size_t before = 1;
    for (int i = 0; i < k->convs; i++) {
        const size_t OC = k->width[i];
        network_module_load(n, &h->conv[i], "feature_extractor.conv_layers.%d.conv", i, OC, before, k->kernel[i],
                            k->conv_bias);
        if (i == 0 || k->all_norms)
            network_module_load(n, &h->conv_norm[i], "feature_extractor.conv_layers.%d.layer_norm", i, OC, 1, 1, 1);
        before = OC;
    }
    if (k->projection_norm)
        network_module_load(n, &h->projection_norm, "feature_projection.layer_norm", 0, before, 1, 1, 1);
    network_module_load(n, &h->projection, "feature_projection.projection", 0, C, before, 1, 1);
    hubert_load_positions(h);
    if (!k->stable) network_module_load(n, &h->norm, "encoder.layer_norm", 0, C, 1, 1, 1);
    for (int i = 0; i < h->layer; i++) {
        hubert_layer *w = &h->layers[i];
        const size_t at = n->end, bias_at = at + round_up(3 * C * C, 256);
        for (size_t j = 0; j < 3; j++) {
            char *name = string_print("encoder.layers.%d.attention.%c_proj", i, "qkv"[j]);
            n->end = at + j * C * C;
            network_tensor(n, name, "weight", C, C, 1);
            n->end = bias_at + j * C;
            network_tensor(n, name, "bias", C, 1, 1);
            free(name);
        }
        n->end = bias_at + round_up(3 * C, 256);
        w->qkv.w = act_at(n->ops, n->weights, at);
        w->qkv.b = act_at(n->ops, n->weights, bias_at);
        network_module_load(n, &w->out, "encoder.layers.%d.attention.out_proj", i, C, C, 1, 1);
        network_module_load(n, &w->up, "encoder.layers.%d.feed_forward.intermediate_dense", i, F, C, 1, 1);
        network_module_load(n, &w->down, "encoder.layers.%d.feed_forward.output_dense", i, C, F, 1, 1);
        network_module_load(n, &w->attention_norm, "encoder.layers.%d.layer_norm", i, C, 1, 1, 1);
        network_module_load(n, &w->mlp_norm, "encoder.layers.%d.final_layer_norm", i, C, 1, 1, 1);
    }
}

static void hubert_free(slam_hubert *h) {
    if (!h) return;
    h->net.ops->release(h->net.ops, h->centroids);
    h->net.ops->release(h->net.ops, h->squares);
    network_free(&h->net);
    free(h->layers);
    free(h);
}

static slam_hubert *hubert_load(slam_ops *ops, const char *folder, int layer, int pad) {
    const slam_path path = path_join(folder, "config.json"),
                    preprocessor = path_join(folder, "preprocessor_config.json");
    static const field normalize = {"do_normalize", FIELD_BOOL, offsetof(slam_hubert, do_normalize), 0, 0, 0};
    slam_hubert *h = NEW(slam_hubert, 1);
    h->net.ops = ops;
    h->layer = layer;
    h->pad = pad;
    int ok = hubert_config_load(&h->config, path.at, &h->step);
    if (ok && (layer < 0 || layer > h->config.L))
        ok = set_error("%s: layer is %d, expected 0 to %d (num_hidden_layers)", path.at, layer, h->config.L);
    h->net.hash = hash_bytes(HASH_START, &h->config, sizeof h->config);
    h->layers = ok ? NEW(hubert_layer, layer) : NULL;
    json *p = ok && path_is_file(preprocessor.at) ? json_load(preprocessor.at) : NULL;
    ok = ok && fields_read(p, &normalize, 1, h, preprocessor.at) &&
         network_load(&h->net, folder, "hubert.", hubert_load_weights);
    json_free(p);
    if (ok) return h;
    hubert_free(h);
    return NULL;
}

/* Uploads the tokenizer's centroids (K,C) for ops->nearest, and the squared norms of these as to_act rounds them. */
static int hubert_set_centroids(slam_hubert *h, const float *centroids, size_t K) {
    slam_ops *ops = h->net.ops;
    const size_t C = h->config.C, bytes = K * C * sizeof(float);
    h->centroids = (slam_act *)ops->alloc(ops, K * C * ops->act_bytes);
    h->squares = (float *)ops->alloc(ops, K * sizeof *h->squares);
    if (!h->centroids || !h->squares || !network_grow(&h->net, bytes)) return 0;
    float *wide = (float *)h->net.arena, *host = NEW(float, K *C), *squares = NEW(float, K);
    ops->upload(ops, wide, centroids, bytes);
    ops->to_act(ops, h->centroids, wide, K * C);
    ops->to_float(ops, wide, h->centroids, K * C);
    ops->download(ops, host, wide, bytes);
    for (size_t k = 0; k < K; k++) squares[k] = (float)part_squares(host + k * C, C);
    ops->upload(ops, h->squares, squares, K * sizeof *squares);
    free(host);
    free(squares);
    return ops->finish(ops);
}

/* ---- HuBERT: from samples to features ----
   The recordings of a batch are zero-padded to rows of S = T * step samples, so each convolution divides the length of
   a row by its stride. The padding does not change features: the convolutions of valid frames do not reach it, norms
   over time and attention stop before it, and the convolution for positions reads zeros there. Where the bits of a row
   of a product may depend on the other rows (batch_invariant 0), the shape of a batch depends on the length of one
   recording alone, and unused rows are 0: so the units of a recording do not depend on the rest of the batch. */

enum { HUBERT_BATCH_FRAMES = 512, HUBERT_BATCH_FRAMES_GPU = 8192 }; // or one recording, if it is longer

typedef struct hubert_batch {
    int B, n, S, T;                    // B rows, n of them with a recording, of S samples and T frames
    slam_recording *const *recordings; // (n)
    float *scratch;                    // (B,S) samples; (B,NH,T) lse; (B,T,C) features or (B,T,K) scores
    slam_act *large[2];         // alternating outputs of the convolutions, the samples first; (B,T,3C) qkv; (B,T,F) MLP
    slam_act *x, *delta, *in;   // (B,T,C) residual stream; output of a sublayer; its input, or output of attention
    int *nearest;               // (B,T) centroids
    int *doc_start, *doc_end;   // (B,T) keys of attention
    int *frames, *first_frames; // (B) valid frames, after all convolutions and after the first
} hubert_batch;

/* Frames of a recording after the first n convolutions. */
static size_t hubert_frames(const slam_hubert *h, size_t samples, int n) {
    const hubert_config *k = &h->config;
    size_t frames = samples + 2 * (size_t)h->pad;
    for (int i = 0; i < n; i++)
        frames = frames < (size_t)k->kernel[i] ? 0 : (frames - (size_t)k->kernel[i]) / (size_t)k->stride[i] + 1;
    return frames;
}

/* Places the batch in the arena, which may be NULL, and returns its size. */
static size_t hubert_place(const slam_hubert *h, hubert_batch *b, size_t columns, const char *arena) {
    const hubert_config *k = &h->config;
    const size_t B = b->B, S = b->S, N = B * b->T, C = k->C, act = h->net.ops->act_bytes;
    size_t end = 0, frames = B * S, largest[2] = {B * S, N * (3 * C > (size_t)k->F ? 3 * C : (size_t)k->F)};
    for (int i = 0; i < k->convs; i++) {
        frames /= k->stride[i];
        if (frames * k->width[i] > largest[(i + 1) % 2]) largest[(i + 1) % 2] = frames * k->width[i];
    }
    b->scratch = (float *)take(arena, &end, (B * S > N * columns ? B * S : N * columns) * sizeof(float));
    for (int i = 0; i < 2; i++) b->large[i] = (slam_act *)take(arena, &end, largest[i] * act);
    b->x = (slam_act *)take(arena, &end, N * C * act);
    b->delta = (slam_act *)take(arena, &end, N * C * act);
    b->in = (slam_act *)take(arena, &end, N * C * act);
    b->nearest = (int *)take(arena, &end, (3 * N + 2 * B) * sizeof(int));
    b->doc_start = b->nearest + N;
    b->doc_end = b->doc_start + N;
    b->frames = b->doc_end + N;
    b->first_frames = b->frames + B;
    return end;
}

/* Uploads the samples with zeros around them, the frames of the recordings, and the keys of attention. Frames after a
   recording attend to its first frame alone, so that no tile of attention is wider than the recording. */
static void hubert_upload(slam_hubert *h, const hubert_batch *b, int normalize) {
    slam_ops *ops = h->net.ops;
    const size_t B = b->B, S = b->S, N = B * b->T, n_ints = 2 * N + 2 * B;
    float *host = NEW(float, B *S);
    int *starts = NEW(int, n_ints), *ends = starts + N, *frames = ends + N;
    for (size_t i = 0; i < B; i++) {
        const slam_recording *r = i < (size_t)b->n ? b->recordings[i] : NULL;
        if (r) copy_waveform(host + i * S + h->pad, r->samples, r->n, normalize);
        frames[i] = r ? (int)r->units.frames : 1;
        frames[B + i] = r ? (int)hubert_frames(h, r->n, 1) : 1;
        for (int t = 0; t < b->T; t++) *ends++ = t < frames[i] ? frames[i] : 1;
    }
    ops->upload(ops, b->scratch, host, B * S * sizeof *host);
    ops->to_act(ops, b->large[0], b->scratch, B * S);
    ops->upload(ops, b->doc_start, starts, n_ints * sizeof *starts);
    free(host);
    free(starts);
}

/* Samples (B,S) to x (B,T,C). A layer:
       if stable   x += O attention(norm x)             x += D gelu(U norm x)
       else        x = norm(x + O attention x)          x = norm(x + D gelu(U x)) */
static void hubert_forward(const slam_hubert *h, const hubert_batch *b) {
    slam_ops *ops = h->net.ops;
    const hubert_config *k = &h->config;
    const network_module *norm = h->conv_norm;
    const int B = b->B, T = b->T, N = B * T, C = k->C, F = k->F, G = k->groups, NH = k->NH, stable = k->stable;
    const float eps = (float)k->eps;
    slam_act *x = b->large[0], *in = stable ? b->in : b->x, *wide = b->large[1];
    int frames = b->S, channels = 1;
    for (int i = 0; i < k->convs; i++, norm++) {
        const int TO = frames / k->stride[i], OC = k->width[i], gelu = i > 0 && !k->all_norms ? SLAM_GELU : 0;
        const slam_conv conv = {B, 1, frames, channels, TO,   OC,   k->kernel[i], k->stride[i],
                                1, 0, 1,      gelu,     NULL, NULL, NULL};
        slam_act *out = b->large[(i + 1) % 2];
        ops->conv1d(ops, out, x, h->conv[i].w, h->conv[i].b, &conv);
        if (k->all_norms) ops->layernorm(ops, NULL, out, out, NULL, norm->w, norm->b, 1e-5f, 1, B * TO, OC);
        else if (i == 0) ops->channelnorm(ops, out, norm->w, norm->b, b->first_frames, 1e-5f, B, TO, OC);
        x = out;
        frames = TO;
        channels = OC;
    }
    norm = &h->projection_norm;
    if (k->projection_norm) ops->layernorm(ops, NULL, x, x, NULL, norm->w, norm->b, eps, 0, N, channels);
    ops->matmul_forward(ops, b->x, x, h->projection.w, h->projection.b, N, channels, C);
    x = b->x;
    const slam_conv positions = {B, G,           T, C / G,     T,         C / G,           k->taps,        1,
                                 1, k->taps / 2, 1, SLAM_GELU, b->frames, h->batch_norm.w, h->batch_norm.b};
    ops->conv1d(ops, b->delta, x, h->positions.w, h->positions.b, &positions);
    if (stable) act_add(ops, x, x, b->delta, N, C);
    else ops->layernorm(ops, NULL, x, x, b->delta, h->norm.w, h->norm.b, eps, 0, N, C);
    const slam_mask mask = {B, T, NH, NH, C / NH, 0, b->doc_start, b->doc_end, NULL, NULL, NULL};
    for (const hubert_layer *w = h->layers; w < h->layers + h->layer; w++) {
        const network_module *norm1 = &w->attention_norm, *norm2 = &w->mlp_norm;
        if (stable) ops->layernorm(ops, NULL, in, x, NULL, norm1->w, norm1->b, eps, 0, N, C);
        ops->matmul_forward(ops, wide, in, w->qkv.w, w->qkv.b, N, C, 3 * C);
        ops->attention_forward(ops, b->in, b->scratch, wide, &mask);
        ops->matmul_forward(ops, b->delta, b->in, w->out.w, w->out.b, N, C, C);
        if (stable) ops->layernorm(ops, x, in, x, b->delta, norm2->w, norm2->b, eps, 0, N, C);
        else ops->layernorm(ops, NULL, x, x, b->delta, norm1->w, norm1->b, eps, 0, N, C);
        ops->matmul_forward(ops, wide, in, w->up.w, w->up.b, N, C, F);
        ops->gelu_forward(ops, wide, wide, (size_t)N * F);
        ops->matmul_forward(ops, b->delta, wide, w->down.w, w->down.b, N, F, C);
        if (stable) act_add(ops, x, x, b->delta, N, C);
        else ops->layernorm(ops, NULL, x, x, b->delta, norm2->w, norm2->b, eps, 0, N, C);
    }
}

/* Length in frames of a row for a recording; fixed: rounded up to one of 8 lengths per octave. */
static int hubert_row_frames(const slam_hubert *h, const slam_recording *r, int fixed) {
    const int frames = ((int)r->n + 2 * h->pad + h->step - 1) / h->step;
    int grain = 1;
    while (fixed && frames / grain >= 16) grain *= 2;
    return (frames + grain - 1) / grain * grain;
}

static int compare_recordings(const void *a, const void *b) { // the longest first
    const size_t x = (*(slam_recording *const *)a)->n, y = (*(slam_recording *const *)b)->n;
    return (x < y) - (x > y);
}

/* Encodes the recordings that have a frame, in batches of rows of about the same length, to units.unit (the nearest
   centroid of each frame) or, without centroids, to features. Sorts the list. */
static int hubert_compute(const slam_tokenizer *t, slam_recording **r, int n) {
    slam_hubert *h = t->hubert;
    slam_ops *ops = h->net.ops;
    const int C = t->width, K = t->K;
    int frames = ops->asynchronous ? HUBERT_BATCH_FRAMES_GPU : HUBERT_BATCH_FRAMES, ok = 1;
    if (ops->asynchronous && ops->memory >> 21 < (size_t)frames) frames = (int)(ops->memory >> 21); // a small GPU
    slam_recording **const end = r + n;
    if (n) qsort((void *)r, n, sizeof *r, compare_recordings);
    if (n && (*r)->n / h->step >= HUBERT_MOST_FRAMES)
        return set_error("a recording of %zu samples, expected fewer than %d", (*r)->n, HUBERT_MOST_FRAMES * h->step);
    for (; ok && r < end && (*r)->units.frames; ok = ok && ops->finish(ops)) {
        hubert_batch b = ZERO;
        b.recordings = r;
        b.T = hubert_row_frames(h, *r, 1);
        b.B = b.T < frames ? frames / b.T : 1;
        while (r + b.n < end && b.n < b.B && r[b.n]->units.frames && hubert_row_frames(h, r[b.n], 1) == b.T) b.n++;
        if (ops->batch_invariant) b.B = b.n, b.T = hubert_row_frames(h, *r, 0);
        b.S = b.T * h->step;
        if (!(ok = network_grow(&h->net, hubert_place(h, &b, K > C ? K : C, NULL)))) break;
        hubert_place(h, &b, K > C ? K : C, h->net.arena);
        hubert_upload(h, &b, t->config.normalize);
        hubert_forward(h, &b);
        if (K) ops->nearest(ops, b.nearest, b.scratch, b.x, h->centroids, h->squares, b.B * b.T, C, K);
        else ops->to_float(ops, b.scratch, b.x, (size_t)b.B * b.T * C);
        for (size_t row = 0; b.n > 0; b.n--, row += b.T, r++)
            if (K) ops->download(ops, (*r)->units.unit, b.nearest + row, (*r)->units.frames * sizeof(int));
            else ops->download(ops, (*r)->features, b.scratch + row * C, (*r)->units.frames * C * sizeof(float));
    }
    return ok;
}

/* ---- nearest centroids ----
   Centroids are packed in blocks of 16, (K / 16, D, 16), one for each lane of a vector. A distance is summed over its D
   differences in order, so the units are the same for every vector width. */

enum { CENTROID_LANES = 16, CENTROID_FRAMES = 4 }; // frames per pass over the centroids
typedef float centroid_vector __attribute__((vector_size(4 * CENTROID_LANES), aligned(4), may_alias));

/* For n frames, frame order[i] or, without order, frame i: unit[i] is the nearest of centroids (K,D), of equal ones the
   first; distance[i], unless NULL, the squared distance. */
UNFUSED static void centroids_nearest(const float *frames, const uint32_t *order, size_t n, const float *centroids,
                                      int K, int D, int *unit, float *distance) {
    float *packed = NEW(float, (size_t)(K + CENTROID_LANES) * D);
    for (int k = 0; k < K; k++)
        for (int d = 0; d < D; d++)
            packed[((size_t)(k / CENTROID_LANES) * D + d) * CENTROID_LANES + k % CENTROID_LANES] = *centroids++;
    PARALLEL_FOR
    for (size_t first = 0; first < n; first += CENTROID_FRAMES) {
        const size_t left = n - first, m = left < CENTROID_FRAMES ? left : (size_t)CENTROID_FRAMES;
        float least[CENTROID_FRAMES];
        const float *x[CENTROID_FRAMES];
        for (size_t i = 0; i < CENTROID_FRAMES; i++) {
            const size_t at = first + (i < m ? i : 0);
            x[i] = frames + (order ? order[at] : at) * D;
            least[i] = INFINITY;
            unit[at] = 0;
        }
        for (int k = 0; k < K; k += CENTROID_LANES) {
            const centroid_vector *c = (const centroid_vector *)(packed + (size_t)k * D);
            centroid_vector sum0 = ZERO, sum1 = ZERO, sum2 = ZERO, sum3 = ZERO; // gcc keeps an array in memory
            for (int d = 0; d < D; d++) {
                const centroid_vector e0 = c[d] - x[0][d], e1 = c[d] - x[1][d], e2 = c[d] - x[2][d],
                                      e3 = c[d] - x[3][d];
                sum0 += e0 * e0;
                sum1 += e1 * e1;
                sum2 += e2 * e2;
                sum3 += e3 * e3;
            }
            const centroid_vector block[] = {sum0, sum1, sum2, sum3};
            for (size_t i = 0; i < m; i++)
                for (int j = 0; j < CENTROID_LANES && k + j < K; j++)
                    if (block[i][j] < least[i]) {
                        least[i] = block[i][j];
                        unit[first + i] = k + j;
                    }
        }
        if (distance) memcpy(distance + first, least, m * sizeof *least);
    }
    free(packed);
}

/* ---- k-means ---- */

/* k-means of x (n,D) to centroids (K,D): k-means++ (Arthur and Vassilvitskii 2007), 100 mini-batches (Sculley 2010),
   full passes (Lloyd 1982; at most 101) until one lowers the inertia by less than 0.01 %. The result does not depend on
   the number of threads. */
UNFUSED static int kmeans_fit(const float *x, size_t n, size_t D, size_t K, uint64_t seed, float *centroids,
                              slam_progress_fn *progress, void *context, slam_kmeans_report *report) {
    enum { COLUMNS_AT_ONCE = 16 };
    const size_t candidates = n < 100 * K ? n : 100 * K, m = n < 10000 ? n : 10000;
    uint64_t state = rng_stream(seed, 0x6b6d, 0); // "km"; slam_tokenizer_fit has streams 1 and 2
    double before = INFINITY;
    slam_progress p = {"fit", 0, 0, 0, NULL, NULL};
    memset(report, 0, sizeof *report);
    report->frames = n;
    if (n < K || n > UINT32_MAX)
        return set_error("k-means: %zu frames, expected at least one per centroid (%zu), below 2^32", n, K);
    for (size_t i = 0; i < n * D; i++)
        if (!isfinite(x[i])) return set_error("k-means: frame %zu has a number that is not finite", i / D);
    uint32_t *order = NEW(uint32_t, n);                        // permuted; candidates and mini-batches are ranges of it
    int *unit = NEW(int, n), more = 1;                         // nearest centroids
    float *distance = NEW(float, 2 * n), *last = distance + n; // squared, to these; to the centroid that was drawn last
    size_t *count = NEW(size_t, K);                            // frames per centroid
    double *sum = NEW(double, K *D);                           // of the frames of each
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    rng_shuffle(&state, order, n);

    // k-means++ draws the next centroid with probability proportional to the squared distance from the nearest so far
    for (size_t i = 0; i < candidates; i++) distance[i] = INFINITY;
    for (size_t k = 0, drawn = 0; k < K; k++) {
        const float *c = x + order[drawn] * D;
        double all = 0, passed = 0;
        memcpy(centroids + k * D, c, D * sizeof *c);
        centroids_nearest(x, order, candidates, c, 1, (int)D, unit, last);
        for (size_t i = 0; i < candidates; i++) all += distance[i] = fminf(distance[i], last[i]);
        const double until = all * rng_uniform(&state);
        drawn = k + 1 < candidates ? k + 1 : 0; // if all distances are 0
        for (size_t i = 0; all > 0 && passed <= until && i < candidates; i++) {
            if (distance[i] > 0) drawn = i;
            passed += distance[i];
        }
    }

    // a mini-batch moves a centroid to the mean of all frames assigned to it so far
    for (size_t batch = 0, at = 0; more && batch < 100; batch++, at += m) {
        if (at + m > n) {
            rng_shuffle(&state, order, n);
            at = 0;
        }
        centroids_nearest(x, order + at, m, centroids, (int)K, (int)D, unit, NULL);
        for (size_t i = 0; i < m; i++) {
            const float *frame = x + order[at + i] * D, step = 1 / (float)++count[unit[i]];
            float *c = centroids + unit[i] * D;
            for (size_t d = 0; d < D; d++) c[d] += step * (frame[d] - c[d]);
        }
        more = !progress || progress(context, &p);
    }

    // a full pass moves centroids to the mean of their frames, an empty cluster to the frame furthest from its centroid
    while (more) {
        centroids_nearest(x, NULL, n, centroids, (int)K, (int)D, unit, distance);
        memset(count, 0, K * sizeof *count);
        report->inertia = 0;
        for (size_t i = 0; i < n; i++) {
            count[unit[i]]++;
            report->inertia += distance[i];
        }
        report->inertia /= (double)n;
        p.done = ++report->passes;
        more = !progress || progress(context, &p);
        if (report->passes > 100 || report->inertia == 0 || before - report->inertia < 1e-4 * before) break;
        before = report->inertia;
        memset(sum, 0, K * D * sizeof *sum);
        PARALLEL_FOR
        for (size_t d = 0; d < D; d += COLUMNS_AT_ONCE)
            for (size_t i = 0; i < n; i++)
                for (size_t j = d; j < D && j < d + COLUMNS_AT_ONCE; j++) sum[unit[i] * D + j] += x[i * D + j];
        for (size_t k = 0; k < K; k++) {
            size_t far = 0;
            for (size_t d = 0; count[k] && d < D; d++)
                centroids[k * D + d] = (float)(sum[k * D + d] / (double)count[k]);
            for (size_t i = 1; !count[k] && i < n; i++)
                if (distance[i] > distance[far]) far = i;
            if (count[k] || distance[far] <= 0) continue; // 0: every frame equals a centroid
            memcpy(centroids + k * D, x + far * D, D * sizeof *x);
            distance[far] = 0;
            before = INFINITY;
        }
    }
    for (size_t k = 0; k < K; k++) report->dead += count[k] == 0;
    free(order);
    free(unit);
    free(distance);
    free(count);
    free(sum);
    return more || set_error("stopped during k-means");
}

/* ---- unit tokenizer: features and centroids ---- */

static const char *const feature_names[] = {"mfcc", "hubert"};

slam_unit_config slam_unit_config_default(void) {
    const slam_unit_config c = {SLAM_MFCC, 25, 0, 1, 11, 40, 0, "", 0, 0};
    return c;
}

static const field unit_config_fields[] = {
    {"rate", FIELD_INT, offsetof(slam_unit_config, rate), 1, SAMPLE_RATE, 0},
    {"normalize", FIELD_BOOL, offsetof(slam_unit_config, normalize), 0, 0, 0},
    {"dedup", FIELD_BOOL, offsetof(slam_unit_config, dedup), 0, 0, 0},
    {"layer", FIELD_INT, offsetof(slam_unit_config, layer), 0, 1 << 10, 0},
    {"pad", FIELD_INT, offsetof(slam_unit_config, pad), 0, SAMPLE_RATE, 0},
    {"channel", FIELD_INT, offsetof(slam_unit_config, channel), 0, AUDIO_BLOCK, 0},
    {"fingerprint", FIELD_U64, offsetof(slam_unit_config, fingerprint), 1, UINT32_MAX, 0},
    {"origin", FIELD_HEX, offsetof(slam_unit_config, origin), 0, 0, 0},
};
enum { N_UNIT_FIELDS = sizeof unit_config_fields / sizeof *unit_config_fields };

/* km.npy -> km.json */
static slam_path unit_config_path(const char *km_npy) {
    slam_path path;
    snprintf(path.at, sizeof path.at, "%.*s.json", (int)strlen(km_npy) - 4 * string_ends(km_npy, ".npy"), km_npy);
    return path;
}

int slam_unit_config_load(slam_unit_config *config, const char *km_npy) {
    const slam_path path = unit_config_path(km_npy);
    slam_unit_config c = *config;
    if (!path_is_file(path.at)) return 1;
    json *root = json_load(path.at);
    const char *features = json_string(root, "features", "");
    int ok = root && fields_read(root, unit_config_fields, N_UNIT_FIELDS, &c, path.at);
    c.features = !strcmp(features, "hubert");
    if (!*c.hubert) snprintf(c.hubert, sizeof c.hubert, "%s", json_string(root, "hubert", ""));
    if (ok && strcmp(features, feature_names[c.features]))
        ok = set_error("%s: 'features' is \"%s\", expected \"mfcc\" or \"hubert\"", path.at, features);
    if (ok) *config = c;
    json_free(root);
    return ok;
}

/* Writes KM.json and then KM.npy: if KM.npy exists, both are complete. */
static int tokenizer_save(const slam_tokenizer *t, const char *km_npy, const slam_kmeans_report *report) {
    slam_unit_config c = t->config;
    strbuf s = ZERO;
    c.fingerprint = t->fingerprint;
    strbuf_add(&s, "{\n  \"features\": \"%s\",\n  \"hubert\": ", feature_names[c.features]);
    strbuf_add_json(&s, c.hubert);
    strbuf_add(&s, ",\n  \"units\": %d,\n  \"width\": %d,\n  \"frames\": %zu,\n  \"inertia\": ", t->K, t->width,
               report->frames);
    strbuf_add_number(&s, report->inertia);
    if (t->durations) strbuf_add(&s, ",\n  \"durations\": [");
    if (t->durations) strbuf_add_ints(&s, t->durations, (size_t)t->K, ", ");
    strbuf_add(&s, t->durations ? "],\n" : ",\n");
    fields_write(&s, unit_config_fields, N_UNIT_FIELDS, &c, "  ");
    strbuf_add(&s, "}\n");
    const int ok =
        file_write(unit_config_path(km_npy).at, s.at, s.n) && npy_write(km_npy, t->centroids, t->K, t->width);
    strbuf_free(&s);
    return ok;
}

/* Hash of all that defines the units, except device, data type and the channel, which often is a speaker. */
static uint32_t tokenizer_hash(const slam_tokenizer *t) {
    const slam_unit_config *c = &t->config;
    strbuf s = ZERO;
    strbuf_add(&s, "%s rate %d normalize %d dedup %d units %d width %d", feature_names[c->features], c->rate,
               c->normalize != 0, c->dedup != 0, t->K, t->width);
    if (t->hubert) strbuf_add(&s, " layer %d model %016llx", c->layer, (unsigned long long)t->hubert->net.hash);
    if (t->hubert && c->pad != 40) strbuf_add(&s, " pad %d", c->pad);
    const uint64_t hash = hash_bytes(hash_bytes(HASH_START, s.at, s.n), t->centroids, sizeof(float) * t->K * t->width);
    const uint32_t folded = (uint32_t)(hash ^ hash >> 32);
    strbuf_free(&s);
    return folded ? folded : 1;
}

/* Checks the shape of t->centroids (K,D), sets K and the fingerprint, and uploads them for HuBERT. */
static int tokenizer_complete(slam_tokenizer *t, const char *km_npy, size_t K, size_t D) {
    if (K < 1 || K > 65534 || D != (size_t)t->width)
        return set_error("%s: has shape (%zu, %zu), expected 1 to 65534 centroids of %d numbers (%s)", km_npy, K, D,
                         t->width, feature_names[t->config.features]);
    t->K = (int)K;
    t->fingerprint = tokenizer_hash(t);
    return !t->hubert || hubert_set_centroids(t->hubert, t->centroids, K);
}

/* Reads the centroids, and their units' mean durations from KM.json, if it has them. */
static int tokenizer_read(slam_tokenizer *t, const char *km_npy) {
    const slam_path path = unit_config_path(km_npy);
    const uint64_t made = t->config.fingerprint;
    size_t K, D;
    if (!npy_read(km_npy, &t->centroids, &K, &D) || !tokenizer_complete(t, km_npy, K, D)) return 0;
    if (made && made != t->fingerprint)
        return set_error("%s: its .json has fingerprint %llu, centroids and settings%s %u: they do not belong together",
                         km_npy, (unsigned long long)made, t->hubert ? " and model" : "", t->fingerprint);
    json *root = path_is_file(path.at) ? json_load(path.at) : NULL;
    const json *list = json_get(root, "durations");
    int ok = !list || units_parse_list(list, path.at, &t->durations);
    if (ok && list && list->n != K) ok = set_error("%s: has %zu durations, expected %zu", path.at, list->n, K);
    json_free(root);
    return ok;
}

void slam_tokenizer_free(slam_tokenizer *t) {
    if (!t) return;
    hubert_free(t->hubert);
    free(t->mfcc);
    free(t->centroids);
    free(t->durations);
    free(t);
}

slam_tokenizer *slam_tokenizer_load(const char *km_npy, const slam_unit_config *config, slam_ops *ops) {
    slam_tokenizer *t = NEW(slam_tokenizer, 1);
    slam_unit_config *c = &t->config;
    int ok = 1;
    *c = *config;
    if (c->features == SLAM_HUBERT) {
        if (!ops) set_error("%s: HuBERT needs a device to run on", c->hubert);
        else t->hubert = hubert_load(ops, c->hubert, c->layer, c->pad);
        if ((ok = t->hubert != NULL)) {
            t->width = t->hubert->config.C;
            t->do_normalize = t->hubert->do_normalize;
            c->rate = SAMPLE_RATE / t->hubert->step;
        }
        if (ok && config->rate && config->rate != c->rate)
            ok = set_error("%s: has %d frames per second, expected %d", c->hubert, c->rate, config->rate);
    } else if (c->rate == 25 || c->rate == 50) {
        t->mfcc = mfcc_new(c->rate);
        t->width = MFCC_WIDTH;
    } else ok = set_error("MFCC of %d frames per second, expected 25 or 50", c->rate);
    if (ok && (!km_npy || tokenizer_read(t, km_npy))) return t;
    slam_tokenizer_free(t);
    return NULL;
}

/* ---- units ---- */

/* Run-length encodes unit (n) in place; without dedup all durations are 1. Returns how many remain. */
static size_t units_merge(int *unit, int *duration, size_t n, int dedup) {
    size_t to = 0;
    for (size_t i = 0; i < n; i++)
        if (dedup && to && unit[to - 1] == unit[i]) duration[to - 1]++;
        else {
            unit[to] = unit[i];
            duration[to++] = 1;
        }
    return to;
}

static size_t tokenizer_frames(const slam_tokenizer *t, size_t samples) {
    if (t->hubert) return hubert_frames(t->hubert, samples, t->hubert->config.convs);
    const size_t window = (size_t)t->mfcc->window, step = (size_t)t->mfcc->step;
    return samples <= window ? samples > 0 : 1 + (samples - window + step - 1) / step;
}

int slam_units_encode(const slam_tokenizer *t, slam_recording *recordings, int n) {
    slam_recording **list = NEW(slam_recording *, n);
    for (int i = 0; i < n; i++) {
        slam_recording *r = list[i] = &recordings[i];
        slam_units *u = &r->units;
        u->samples = r->n;
        u->frames = tokenizer_frames(t, r->n);
        u->n = 0;
        u->unit = t->K ? NEW(int, u->frames) : NULL;
        u->duration = t->K ? NEW(int, u->frames) : NULL;
        r->features = t->K && t->hubert ? NULL : NEW(float, u->frames *(size_t)t->width);
    }
    const int ok = !t->hubert || hubert_compute(t, list, n);
    SLAM_PRAGMA(omp parallel for schedule(dynamic) if (n > 1))
    for (int i = 0; i < n; i++) {
        slam_recording *r = &recordings[i];
        slam_units *u = &r->units;
        if (t->mfcc) mfcc_compute(t->mfcc, t->config.normalize, r->features, u->frames, r->samples, r->n);
        if (t->mfcc && t->K)
            centroids_nearest(r->features, NULL, u->frames, t->centroids, t->K, t->width, u->unit, NULL);
        if (t->K) u->n = units_merge(u->unit, u->duration, u->frames, t->config.dedup);
        if (ok && !t->K) continue;
        free(r->features);
        r->features = NULL;
        if (!ok) slam_units_free(u);
    }
    free((void *)list);
    return ok;
}

#include <sys/wait.h>

/* ---- voices: shell commands that synthesise speech ---- */

/* Opens the audio that a voice synthesises. Returns 1, 0 if it fails for this text, -1 if the command cannot be run.
   {text} becomes ${text}: the shell does not parse a variable's value and, after `set -f; IFS=`, does not split it. */
static int voice_open(audio *a, const char *voice, const char *text, const char *name) {
    FILE *log = tmpfile();
    char line[390], last[400] = "", path[32]; // last: the last line on stderr
    strbuf s = ZERO;
    strbuf_add(&s, "trap '' HUP INT QUIT TERM; exec </dev/null 2>/dev/fd/%d; set -f; IFS=\n", log ? fileno(log) : 2);
    strbuf_add(&s, *text == '-' ? "text=' " : "text='"); // else a text that starts with - would be a flag
    for (; *text; text++) strbuf_add(&s, "%s%c", *text == '\'' ? "'\\'" : "", *text); // it's: 'it'\''s'
    strbuf_add(&s, "'; export text; %s{ ", strstr(voice, "{text}") ? "" : "printf '%s\\n' \"$text\" | ");
    for (; *voice; voice++) strbuf_add(&s, "%s%c", strncmp(voice, "{text}", 6) ? "" : "$", *voice);
    strbuf_add(&s, "\n}");
    FILE *out = log ? popen(s.at, "r") : NULL;
    strbuf_free(&s);
    if (!out) {
        if (log) fclose(log);
        return set_error("%s: the voice cannot be started: %s", name, strerror(errno)) - 1;
    }
    snprintf(path, sizeof path, "/dev/fd/%d", fileno(out));
    int ok = audio_open(a, path, name);
    const int status = pclose(out), code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    for (rewind(log); fgets(line, sizeof line, log);)
        if (*line != '\n') snprintf(last, sizeof last, ": %.*s", (int)strcspn(line, "\r\n"), line);
    fclose(log);
    if (code) ok = set_error("%s: the voice failed with status %d%s", name, code, last) - (code == 126 || code == 127);
    return ok;
}

/* ---- inputs ---- */

struct slam_line {
    const char *text, *path; // text (n) in a mapped file, whose path this is
    size_t n, number;        // number: from 1
};

void slam_inputs_free(slam_inputs *in) {
    for (size_t i = 0; in->files && i < in->paths.n; i++) file_map_close(&in->files[i]);
    free(in->files);
    free(in->lines);
    slam_strings_free(&in->paths);
    slam_strings_free(&in->voices);
    slam_strings_free(&in->notes);
    memset(in, 0, sizeof *in);
}

/* In a folder, files with the first READ_EXTENSIONS of these are inputs (in every build); others are counted. */
enum { READ_EXTENSIONS = 18, AUDIO_EXTENSIONS = 38 };
static const char *const audio_extensions[AUDIO_EXTENSIONS] = {
    "wav", "flac", "ogg", "oga",  "opus", "mp3", "mp2", "aif", "aiff", "aifc", "au",  "snd", "caf",
    "w64", "rf64", "sph", "nist", "voc",  "m4a", "m4b", "mp4", "aac",  "webm", "wma", "amr", "3gp",
    "mka", "mkv",  "mov", "avi",  "spx",  "ac3", "ape", "wv",  "tta",  "shn",  "pcm", "raw"};

/* Index of the name's extension in audio_extensions; AUDIO_EXTENSIONS: none. */
static int audio_extension(const char *name) {
    const char *dot = strrchr(name, '.');
    int i = dot ? 0 : AUDIO_EXTENSIONS;
    while (i < AUDIO_EXTENSIONS && strcasecmp(dot + 1, audio_extensions[i])) i++;
    return i;
}

/* A folder and those above it, to detect loops of symbolic links. */
typedef struct folder_chain {
    dev_t device;
    ino_t inode;
    const struct folder_chain *above;
} folder_chain;

/* Adds a path to in->paths, or the audio files in a folder and below it. */
static int inputs_add_audio(slam_inputs *in, const char *path, const folder_chain *above) {
    struct stat s;
    const int exists = stat(path, &s) == 0; // a missing file is reported when it is opened
    const size_t before = in->paths.n;
    slam_strings names = ZERO;
    if (!exists || !S_ISDIR(s.st_mode)) {
        const int i = !exists || S_ISREG(s.st_mode) ? audio_extension(path) : AUDIO_EXTENSIONS;
        if (!above || i < READ_EXTENSIONS) slam_strings_add(&in->paths, path);
        else in->passed_over[i]++;
        return 1;
    }
    for (const folder_chain *f = above; f; f = f->above)
        if (f->device == s.st_dev && f->inode == s.st_ino) return 1;
    const folder_chain here = {s.st_dev, s.st_ino, above};
    int ok = folder_list(path, &names);
    for (size_t i = 0; ok && i < names.n; i++) ok = inputs_add_audio(in, path_join(path, names.at[i]).at, &here);
    slam_strings_free(&names);
    if (ok && !above && in->paths.n == before)
        ok = set_error("%s: no audio file (.wav, .flac, .ogg, .mp3, ...) in this folder or below it", path);
    return ok;
}

/* Adds the non-blank lines of a file (-: stdin), without leading spaces and trailing white space other than tabs. In a
   list of audio files, lines that begin with # are comments. */
static int inputs_add_lines(slam_inputs *in, const char *path) {
    file_map *map = &in->files[in->paths.n];
    if (!strcmp(path, "-")) path = "/dev/stdin";
    slam_strings_add(&in->paths, path);
    if (!file_map_open(map, path)) return 0;
    const char *at = (const char *)map->data, *end = at + map->size;
    struct slam_line l = {NULL, in->paths.at[in->paths.n - 1], 0, 1};
    if (map->size >= 3 && !memcmp(at, "\xef\xbb\xbf", 3)) at += 3; // a byte order mark
    for (; (l.text = next_line(&at, end, &l.n)) != NULL; l.number++) {
        while (l.n && isspace((unsigned char)l.text[l.n - 1]) && l.text[l.n - 1] != '\t') l.n--;
        while (l.n && *l.text == ' ') l.text++, l.n--;
        if (!l.n || (in->kind == SLAM_INPUT_AUDIO && *l.text == '#')) continue;
        GROW(struct slam_line, in->lines, in->capacity, in->n + 1);
        in->lines[in->n++] = l;
    }
    return 1;
}

/* Length of the path in a line of a list; in a manifest a tab and a number of samples follow it. */
static size_t line_path_length(const struct slam_line *l) {
    size_t n = l->n;
    while (n && isdigit((unsigned char)l->text[n - 1])) n--;
    return n > 1 && l->text[n - 1] == '\t' ? n - 1 : l->n;
}

/* Adds the audio files of a list, or of fairseq's manifest: a root (without a tab), then path, tab, samples. */
static int inputs_add_list(slam_inputs *in, const char *path) {
    slam_inputs list = ZERO;
    char name[PATH_MAX];
    size_t folder = 0; // line of the first one
    list.files = NEW(file_map, 1);
    int ok = inputs_add_lines(&list, path) && (list.n > 0 || set_error("%s: has no lines", path));
    const struct slam_line *l = list.lines;
    const int manifest = list.n > 1 && !memchr(l->text, '\t', l->n) && line_path_length(&l[1]) < l[1].n;
    for (size_t i = manifest; ok && i < list.n; i++) {
        const int below_root = manifest && *l[i].text != '/';
        snprintf(name, sizeof name, "%.*s%s%.*s", below_root ? (int)l->n : 0, l->text, below_root ? "/" : "",
                 (int)line_path_length(&l[i]), l[i].text);
        if (memchr(l[i].text, 0, l[i].n))
            ok = set_error("%s:%zu: contains a zero byte, expected UTF-8", l->path, l[i].number);
        else ok = inputs_add_audio(in, name, NULL);
        if (!folder && path_is_folder(name)) folder = l[i].number;
    }
    snprintf(name, sizeof name, "%s:%zu: is a folder; all audio files in it are inputs", path, folder);
    if (folder) slam_strings_add(&in->notes, name);
    slam_inputs_free(&list);
    return ok;
}

int slam_inputs_open(slam_inputs *in, int kind, const char *const *paths, size_t n) {
    strbuf note = ZERO;
    int ok = 1;
    in->kind = kind;
    if (kind != SLAM_INPUT_AUDIO) in->files = NEW(file_map, n);
    for (size_t i = 0; ok && i < n; i++) {
        const int is_list = *paths[i] == '@';
        if (kind != SLAM_INPUT_AUDIO) ok = inputs_add_lines(in, paths[i]);
        else if (is_list || !strcmp(paths[i], "-")) ok = inputs_add_list(in, paths[i] + is_list);
        else ok = inputs_add_audio(in, paths[i], NULL);
    }
    for (int i = READ_EXTENSIONS; i < AUDIO_EXTENSIONS; i++)
        if (in->passed_over[i])
            strbuf_add(&note, "%s%zu .%s", note.n ? ", " : "", in->passed_over[i], audio_extensions[i]);
    if (note.n) strbuf_add(&note, ": not read; convert them, e.g. with ffmpeg -i IN.m4a OUT.wav");
    if (note.n && ok) slam_strings_add(&in->notes, note.at);
    else if (note.n) set_error("%s; %s", slam_error(), note.at);
    strbuf_free(&note);
    if (kind == SLAM_INPUT_AUDIO) in->n = in->paths.n;
    in->end = in->n;
    in->pairs_out = kind == SLAM_INPUT_PAIRS ||
                    (kind == SLAM_INPUT_TEXT && in->n && memchr(in->lines->text, '\t', in->lines->n) != NULL);
    return ok && (in->n > 0 || set_error("%s: has no lines", n ? paths[0] : "no file"));
}

/* Hash of settings, names of inputs and sizes of files of lines; contents are not read. */
static uint64_t inputs_hash(uint64_t hash, const slam_inputs *in) {
    const double numbers[] = {(double)in->kind,    (double)in->pairs_out, (double)in->first, (double)in->end,
                              (double)in->paths.n, in->max_seconds,       in->max_repetition};
    hash = hash_bytes(hash, numbers, sizeof numbers);
    for (size_t i = 0; i < in->paths.n; i++) {
        hash = hash_bytes(hash, in->paths.at[i], strlen(in->paths.at[i]) + 1);
        if (in->files) hash = hash_bytes(hash, &in->files[i].size, sizeof in->files[i].size);
    }
    for (size_t i = 0; i < in->voices.n; i++) hash = hash_bytes(hash, in->voices.at[i], strlen(in->voices.at[i]) + 1);
    return hash;
}

/* ---- reading: inputs -> segments -> units ----
   An input becomes an item. Its sources (audio files, texts) are decoded to segments: documents, or sides of a pair.
   The segments of a chunk are decoded in parallel and encoded together. It ends after `limit` samples, to bound memory,
   or at `deadline`, to react to signals; the next chunk continues in the middle of a file. */

static const char *const pair_sides[3] = {"prompt", "chosen", "rejected"};

struct slam_item {
    char *name;               // "a.wav" or "stories.txt:12"
    char *members;            // pairs: members that are copied to the output, as JSON: `"id": 7, `
    slam_recording *segments; // (n) samples, until they are encoded; then units, or features for a fit
    size_t n, capacity;
    slam_strings sources; // audio files, or texts to synthesise; none: a line of units, or a repetitive pair
    size_t input, source; // source: index of the current one
    audio file;           // the current source, while it is open
    char *error;          // why the input is skipped, or NULL
    int done;             // 1: nothing is left to decode; -1: the voice cannot be run, for any input
};

enum { READER_ITEMS = 256 };
struct slam_reader {
    const slam_inputs *inputs;
    const slam_tokenizer *tokenizer; // without centroids during a fit; NULL: of units, unknown
    slam_item *items[READER_ITEMS];  // (n) in input order
    size_t n, taken, next;           // taken: 1 if the caller has items[0]; next: index of the next input to start
    double audio_seconds, deadline;  // decoded in all
    int64_t samples, limit;          // decoded in this chunk
};

slam_reader *slam_reader_open(const slam_inputs *in, const slam_tokenizer *t, size_t first) {
    slam_reader *r = NEW(slam_reader, 1);
    r->inputs = in;
    r->tokenizer = t;
    r->next = first;
    return r;
}

static void item_free(slam_item *item) {
    for (slam_recording *s = item->segments; s < item->segments + item->n; s++) {
        free((void *)s->samples);
        free(s->features);
        slam_units_free(&s->units);
    }
    audio_close(&item->file);
    slam_strings_free(&item->sources);
    free(item->segments);
    free(item->name);
    free(item->members);
    free(item->error);
    free(item);
}

void slam_reader_close(slam_reader *r) {
    for (size_t i = 0; i < r->n; i++) item_free(r->items[i]);
    free(r);
}

/* Parses a line that names three audio files, relative to the file of lines. All its members except arrays, objects and
   those named as sides are copied to the output. */
static int item_parse_pair(slam_item *item, const json *line, const char *file, double max_repetition) {
    const char *prompt = json_string(line, "prompt_text", NULL), *chosen = json_string(line, "chosen_text", NULL);
    strbuf members = ZERO;
    if (prompt && chosen && pair_repeats(prompt, chosen, max_repetition)) return 1;
    for (int side = 0; side < 3; side++) {
        char key[16];
        snprintf(key, sizeof key, "%s_path", pair_sides[side]);
        const char *name = json_string(line, key, "");
        if (!*name) return set_error("%s: expected an object with a string '%s'", item->name, key);
        slam_path path;
        snprintf(path.at, sizeof path.at, "%.*s%s", *name == '/' ? 0 : (int)(path_name(file) - file), file, name);
        slam_strings_add(&item->sources, path.at);
    }
    for (const json *j = line->first; j; j = j->next) {
        int copied = j->type != JSON_ARRAY && j->type != JSON_OBJECT;
        for (int side = 0; side < 3; side++) copied &= strcmp(j->key, pair_sides[side]) != 0;
        if (!copied) continue;
        strbuf_add_json(&members, j->key);
        strbuf_add(&members, ": ");
        if (j->type == JSON_STRING) strbuf_add_json(&members, j->string);
        else strbuf_add(&members, "%s", json_describe(j)); // a number's text, true, false or null
        strbuf_add(&members, ", ");
    }
    item->members = members.at;
    return 1;
}

/* Parses a line of text, or of the texts of a pair, separated by tabs. */
static int item_parse_text(slam_item *item, const struct slam_line *l, const slam_inputs *in) {
    slam_strings *texts = &item->sources;
    char *line = string_copy_n(l->text, l->n), *rest = line;
    strbuf members = ZERO;
    while (rest) slam_strings_add(texts, strsep(&rest, in->pairs_out ? "\t" : "")); // "": all of it
    free(line);
    if (memchr(l->text, 0, l->n)) return set_error("%s: contains a zero byte, expected text", item->name);
    if (!in->pairs_out) return 1;
    if (texts->n != 3) return set_error("%s: %zu fields separated by tabs, expected 3", item->name, texts->n);
    for (int side = 0; side < 3; side++) {
        strbuf_add(&members, "\"%s_text\": ", pair_sides[side]);
        strbuf_add_json(&members, texts->at[side]);
        strbuf_add(&members, ", ");
    }
    item->members = members.at;
    if (pair_repeats(texts->at[0], texts->at[1], in->max_repetition)) slam_strings_free(texts);
    return 1;
}

/* Parses the input's line: units, each less than K, or sources. */
static int item_parse(slam_item *item, const slam_inputs *in, const struct slam_line *l, int K) {
    if (in->kind == SLAM_INPUT_TEXT) return item_parse_text(item, l, in);
    json *line = json_parse(l->text, l->n, item->name);
    int ok = line != NULL;
    if (ok && in->kind == SLAM_INPUT_PAIRS) ok = item_parse_pair(item, line, l->path, in->max_repetition);
    else if (ok) {
        item->segments = NEW(slam_recording, item->n = 1);
        slam_units *u = &item->segments->units;
        ok = units_from_json(line, item->name, u);
        for (size_t i = 0; ok && i < u->n; i++) {
            u->frames += u->duration ? (size_t)u->duration[i] : 1;
            if (u->unit[i] >= K)
                ok = set_error("%s: unit %zu is %d, expected less than %d", item->name, i + 1, u->unit[i], K);
        }
    }
    json_free(line);
    return ok;
}

/* Decodes the next segment of the current source. Returns 1, 0 on error, -1 if the voice cannot be run. */
static int item_decode(slam_reader *r, slam_item *item, const struct slam_line *l) {
    const slam_strings *voices = &r->inputs->voices; // in turn, by line number
    const slam_hubert *hubert = r->tokenizer->hubert;
    const size_t limit = hubert ? HUBERT_MOST_FRAMES * (size_t)hubert->step : INT_MAX / 4;
    const char *source = item->sources.at[item->source];
    audio *a = &item->file;
    float *samples;
    size_t n;
    if (!a->name) {
        char *name = string_print("%s%s%s", l ? item->name : "", l ? ": " : "", source);
        const int ok = voices->n ? voice_open(a, voices->at[(l->number - 1) % voices->n], source, item->name)
                                 : audio_open(a, source, name);
        free(name);
        if (ok <= 0) return ok;
        a->channel = r->tokenizer->config.channel;
        if (a->channel > a->channels)
            return set_error("%s: channel %d is to be read, the file has %d", a->name, a->channel, a->channels);
    }
    if (audio_next_segment(a, l ? 0 : r->inputs->max_seconds, &samples, &n) <= 0) return 0;
    SLAM_PRAGMA(omp atomic)
    r->samples += (int64_t)n;
    const int whole = a->start == 0 && a->last, any = tokenizer_frames(r->tokenizer, n) > 0;
    const slam_recording s = {samples, n, NULL, {NULL, NULL, 0, 0, 0, whole ? 0 : a->start, whole ? 0 : a->end, NULL}};
    GROW(slam_recording, item->segments, item->capacity, item->n + 1);
    if (any && n < limit) item->segments[item->n++] = s;
    else free(samples);
    if (n >= limit) return set_error("%s: %zu samples, expected fewer than %zu; split it", a->name, n, limit);
    if (whole && !any) // a segment is dropped
        return set_error("%s: %.1f ms of audio, too short for a frame", a->name, (double)n / 16);
    if (!a->last) return 1;
    audio_close(a);
    item->source++;
    return 1;
}

/* Parses the input and decodes its sources until all are done or the chunk ends; the next call continues. */
static void item_read(slam_reader *r, slam_item *item) {
    const slam_inputs *in = r->inputs;
    const struct slam_line *l = in->lines ? &in->lines[item->input] : NULL;
    int ok = 1;
    if (!item->name) {
        item->name = l ? string_print("%s:%zu", l->path, l->number) : string_copy(in->paths.at[item->input]);
        if (!l) slam_strings_add(&item->sources, item->name);
        else ok = item_parse(item, in, l, r->tokenizer ? r->tokenizer->K : 65534);
    }
    while (ok > 0 && item->source < item->sources.n) {
        int64_t decoded;
        SLAM_PRAGMA(omp atomic read)
        decoded = r->samples;
        if (decoded >= r->limit || slam_clock() > r->deadline) return;
        ok = item_decode(r, item, l);
    }
    item->done = ok < 0 ? -1 : 1;
    if (ok <= 0) item->error = string_copy(slam_error());
}

/* Decodes a chunk of segments in parallel, and encodes them. */
static int reader_chunk(slam_reader *r) {
    const slam_hubert *hubert = r->tokenizer ? r->tokenizer->hubert : NULL;
    slam_recording *chunk = NULL;
    size_t n = 0, capacity = 0;
    for (; r->n < READER_ITEMS && r->next < r->inputs->end; r->next++) {
        r->items[r->n] = NEW(slam_item, 1);
        r->items[r->n++]->input = r->next;
    }
    r->limit = SAMPLE_RATE * (hubert && !hubert->net.ops->asynchronous ? 300 : 3600); // seconds
    r->samples = 0;
    r->deadline = slam_clock() + 0.25;
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int64_t i = 0; i < (int64_t)r->n; i++)
        if (!r->items[i]->done) item_read(r, r->items[i]);
    r->audio_seconds += (double)r->samples / SAMPLE_RATE;
    for (slam_item **i = r->items; i < r->items + r->n; i++)
        for (slam_recording *s = (*i)->segments; s < (*i)->segments + (*i)->n; s++) {
            if (!s->samples) continue;
            GROW(slam_recording, chunk, capacity, n + 1);
            chunk[n++] = *s;
        }
    const int ok = !n || slam_units_encode(r->tokenizer, chunk, (int)n);
    n = 0;
    for (slam_item **i = r->items; i < r->items + r->n; i++)
        for (slam_recording *s = (*i)->segments; s < (*i)->segments + (*i)->n; s++) {
            if (!s->samples) continue;
            free((void *)s->samples);
            *s = chunk[n++];
            s->samples = NULL;
        }
    free(chunk);
    return ok;
}

int slam_reader_next(slam_reader *r, const slam_item **item, const char **skipped) {
    if (r->taken) {
        item_free(r->items[0]);
        memmove(r->items, r->items + 1, --r->n * sizeof *r->items);
    }
    r->taken = r->n && r->items[0]->done;
    *item = r->taken ? r->items[0] : NULL;
    *skipped = r->taken ? r->items[0]->error : NULL;
    if (r->taken) return r->items[0]->done > 0 ? 1 : set_error("%s", *skipped) - 1;
    if (!r->n && r->next >= r->inputs->end) return 0;
    return reader_chunk(r) ? 1 : -1;
}

/* Gets the next item and calls the progress callback. Returns 1, 0 at the end, -1 on error. */
static int reader_item(slam_reader *r, const slam_item **item, slam_progress *p, slam_progress_fn *progress,
                       void *context) {
    int more;
    do more = slam_reader_next(r, item, &p->reason);
    while (more > 0 && !*item);
    if (more <= 0) return more;
    p->done++;
    p->skipped = p->reason ? (*item)->name : NULL;
    p->audio_seconds = r->audio_seconds;
    return !progress || progress(context, p) ? 1 : set_error("stopped before all audio was processed") - 1;
}

/* ---- writing: units -> token shards or lines ----
   The journal has the number of inputs done and the sizes of the files then. A resumed call repeats what came after it:
   it truncates the files to these sizes, and renames a shard (or OUT) that was completed later back to OUT.partial. */

#define JOURNAL(type, name)                                                                                            \
    { #name, type, offsetof(slam_writer, name), 0, 9e15, 1 }
static const field journal_fields[] = {
    JOURNAL(FIELD_HEX, identity),     JOURNAL(FIELD_U64, inputs),    JOURNAL(FIELD_U64, bytes),
    JOURNAL(FIELD_U64, failed_bytes), JOURNAL(FIELD_U64, shards),    JOURNAL(FIELD_U64, failed),
    JOURNAL(FIELD_U64, repetitive),   JOURNAL(FIELD_U64, documents), JOURNAL(FIELD_U64, samples),
    JOURNAL(FIELD_U64, frames),       JOURNAL(FIELD_U64, units),     JOURNAL(FIELD_U64, tokens)};
enum { N_JOURNAL_FIELDS = sizeof journal_fields / sizeof *journal_fields };

static int path_exists(const char *path) { return access(path, F_OK) == 0; }

static int path_is_free(const char *path) {
    return !path_exists(path) || set_error("%s: exists; remove it or choose another name", path);
}

static int file_rename(const char *from, const char *to) {
    return rename(from, to) == 0 || set_error("%s: cannot be renamed to %s: %s", from, to, strerror(errno));
}

/* NAME-00001.bin for NAME.bin */
static const char *shard_path(char path[PATH_MAX], const char *out, uint64_t number) {
    snprintf(path, PATH_MAX, "%.*s-%05llu.bin", (int)strlen(out) - 4, out, (unsigned long long)number);
    return path;
}

/* Syncs the data, then replaces the journal. */
static int writer_commit(slam_writer *w) {
    strbuf s = ZERO;
    w->bytes = w->data->bytes;
    w->failed_bytes = w->failures->bytes;
    strbuf_add(&s, "{\n");
    fields_write(&s, journal_fields, N_JOURNAL_FIELDS, w, "  ");
    strbuf_add(&s, "}\n");
    const int ok = append_sync(w->data) && append_sync(w->failures) && file_write(w->journal.at, s.at, s.n);
    strbuf_free(&s);
    w->committed = slam_clock();
    return ok;
}

static int writer_header(slam_writer *w) {
    const slam_tokenizer *t = w->tokenizer;
    return !w->binary || shard_write_header(w->data, t ? t->K + FIRST_UNIT : 0, t ? t->fingerprint : 0);
}

/* Opens OUT.partial, truncated to the size in the journal. */
static int writer_open_data(slam_writer *w) {
    return append_open(w->data, w->partial.at) && append_resume(w->data, w->bytes) && (w->bytes || writer_header(w));
}

/* Completes OUT.partial and renames it to path. */
static int writer_close_data(slam_writer *w, const char *path) {
    return writer_header(w) && append_close(w->data) && file_rename(w->partial.at, path);
}

/* Reads the journal. If OUT.partial was renamed after it was written, renames it back. */
static int writer_read_journal(slam_writer *w, uint64_t identity) {
    char path[PATH_MAX];
    json *root = json_load(w->journal.at);
    const int ok = root && fields_read(root, journal_fields, N_JOURNAL_FIELDS, w, w->journal.at);
    json_free(root);
    w->earlier = w->inputs;
    if (!ok) return 0;
    if (w->identity != identity || w->inputs > w->in->end - w->in->first)
        return set_error("%s: of a call with other files or settings; repeat that, or remove this file to start again",
                         w->journal.at);
    if (w->binary && path_exists(shard_path(path, w->out, w->shards + 1))) return file_rename(path, w->partial.at);
    return path_exists(w->partial.at) || !path_exists(w->out) || file_rename(w->out, w->partial.at);
}

int slam_writer_open(slam_writer *w, const char *out, const slam_inputs *in, const slam_tokenizer *t, int audio_repr,
                     uint64_t shard_tokens) {
    char path[PATH_MAX];
    memset(w, 0, sizeof *w);
    w->data = NEW(append_file, 2);
    w->failures = w->data + 1;
    w->out = out;
    w->in = in;
    w->tokenizer = t;
    w->binary = string_ends(out, ".bin");
    w->audio_repr = audio_repr;
    w->shard_tokens = shard_tokens;
    snprintf(w->partial.at, sizeof w->partial.at, "%s.partial", out);
    snprintf(w->journal.at, sizeof w->journal.at, "%s.journal", out);
    snprintf(path, sizeof path, "%s.failed", out);
    const uint64_t numbers[] = {(uint64_t)w->binary, (uint64_t)audio_repr, shard_tokens, t ? t->fingerprint : 0,
                                t ? (uint64_t)t->config.channel : 0};
    const uint64_t identity = w->identity = inputs_hash(hash_bytes(HASH_START, numbers, sizeof numbers), in);
    int ok = append_open(w->failures, path);
    if (ok && path_exists(w->journal.at)) ok = writer_read_journal(w, identity);
    else ok = ok && path_is_free(out) && (!w->binary || path_is_free(shard_path(path, out, 1)));
    if (ok && append_resume(w->failures, w->failed_bytes) && writer_open_data(w) && writer_commit(w)) return 1;
    return slam_writer_close(w, 0);
}

/* Appends a document, to a new shard if it does not fit. */
static int writer_append(slam_writer *w, const strbuf *document) {
    char path[PATH_MAX];
    if (w->binary && w->data->bytes > SHARD_HEADER &&
        w->data->bytes + document->n > SHARD_HEADER + 2 * w->shard_tokens) {
        w->bytes = 0;
        if (!writer_close_data(w, shard_path(path, w->out, ++w->shards)) || !writer_open_data(w)) return 0;
    }
    return append_write(w->data, document->at, document->n);
}

int slam_writer_add(slam_writer *w, const slam_item *item) {
    const size_t n = item->error ? 0 : item->n; // 0 without an error: a repetitive pair, or no segment has a frame
    const int pairs = w->in->pairs_out;
    strbuf s = ZERO;
    int ok = 1;
    for (size_t i = 0; ok && i < n; i++) {
        slam_units u = item->segments[i].units;
        u.name = pairs ? NULL : u.name ? u.name : item->name;
        if (pairs) strbuf_add(&s, "%s%s\"%s\": ", i ? ", " : "{", i ? "" : item->members, pair_sides[i]);
        for (size_t k = 0; w->binary && k < u.n + 2; k++) {
            uint16_t token = DOCUMENT_TOKEN;
            if (k > 0 && k <= u.n) token = (uint16_t)(u.unit[k - 1] + FIRST_UNIT);
            strbuf_add_bytes(&s, &token, sizeof token);
        }
        if (!w->binary) strbuf_add_units(&s, &u, w->audio_repr);
        w->samples += u.samples;
        w->frames += u.frames;
        w->units += u.n;
        w->tokens += u.n + (pairs ? 1 : 2);
        if (pairs && i < 2) continue;
        if (!w->binary) strbuf_add(&s, pairs ? "}\n" : "\n");
        ok = writer_append(w, &s);
        s.n = 0;
        w->documents++;
    }
    strbuf_free(&s);
    if (ok && item->error)
        ok = append_write(w->failures, item->name, strlen(item->name)) && append_write(w->failures, "\n", 1);
    w->inputs++;
    w->failed += item->error != NULL;
    w->repetitive += !item->error && !n;
    return ok && (slam_clock() - w->committed < 1 || writer_commit(w));
}

int slam_writer_close(slam_writer *w, int ok) {
    const int all = ok && w->inputs == w->in->end - w->in->first, opened = w->data->f != NULL;
    if (all) ok = append_sync(w->failures) && (!w->documents || writer_close_data(w, w->out));
    else if (ok) ok = writer_commit(w);
    if (opened && (all ? ok : !w->inputs && !w->shards)) { // nothing is left to resume
        unlink(w->journal.at);
        unlink(w->partial.at);
    }
    if (w->failures->f && !w->failures->bytes) unlink(w->failures->path);
    append_close(w->data);
    append_close(w->failures);
    free(w->data);
    if (all && ok && !w->documents)
        ok = set_error("none of the %llu files or lines could be used", (unsigned long long)w->inputs);
    return ok;
}

/* ---- fitting centroids ---- */

/* Algorithm R (Waterman, in Knuth's volume 2): every frame seen so far is in the sample with the same probability. */
typedef struct reservoir {
    float *frames;               // (n,D)
    size_t n, capacity, most, D; // most: size of the sample
    uint64_t seen, state;
} reservoir;

static void reservoir_add(reservoir *r, const float *frames, size_t n) {
    const size_t need = r->n + n < r->most ? r->n + n : r->most;
    r->frames = (float *)mem_grow(r->frames, &r->capacity, need, r->D * sizeof(float));
    for (size_t i = 0; i < n; i++, r->seen++) {
        const uint64_t at = r->n < r->most ? r->n++ : rng_below(&r->state, r->seen + 1);
        if (at < r->most) memcpy(r->frames + at * r->D, frames + i * r->D, r->D * sizeof(float));
    }
}

/* Reads recordings until they have `most` frames: without centroids for the sample, else for t->durations. */
static int fit_read(slam_tokenizer *t, const slam_inputs *in, size_t most, reservoir *sample,
                    slam_progress_fn *progress, void *context) {
    slam_progress p = {"decode", 0, (double)in->n, 0, NULL, NULL};
    slam_reader *reader = slam_reader_open(in, t, 0);
    const slam_item *item;
    int *frames = t->durations = t->K ? NEW(int, t->K) : NULL, *times = NEW(int, t->K), more = 1;
    for (size_t seen = 0; seen < most && (more = reader_item(reader, &item, &p, progress, context)) > 0;)
        for (size_t i = 0; !item->error && i < item->n; i++) {
            const slam_recording *r = &item->segments[i];
            seen += r->units.frames;
            if (!t->K) reservoir_add(sample, r->features, r->units.frames);
            for (size_t j = 0; j < r->units.n; j++) {
                frames[r->units.unit[j]] += r->units.duration[j];
                times[r->units.unit[j]]++;
            }
        }
    for (int k = 0; k < t->K; k++) frames[k] = 1000 * frames[k] / (times[k] + !times[k]) / t->config.rate;
    slam_reader_close(reader);
    free(times);
    return more >= 0;
}

slam_tokenizer *slam_tokenizer_fit(const char *km_npy, const slam_unit_config *c, slam_ops *ops, const slam_inputs *in,
                                   int K, size_t frames, uint64_t seed, slam_progress_fn *progress, void *context,
                                   slam_kmeans_report *report) {
    const uint64_t numbers[] = {(uint64_t)K, frames, seed};
    const uint64_t settings = hash_bytes(HASH_START, c, offsetof(slam_unit_config, hubert) + sizeof c->hubert);
    const slam_path km_json = unit_config_path(km_npy);
    slam_unit_config config = *c, stored = *c;
    slam_inputs shuffled = *in;
    const int exists = path_exists(km_npy);
    memset(report, 0, sizeof *report);
    config.origin = inputs_hash(hash_bytes(settings, numbers, sizeof numbers), in);
    if (!slam_output_check(km_npy) || !slam_unit_config_load(&stored, km_npy)) return NULL;
    if (stored.origin != config.origin && !(path_is_free(km_npy) && path_is_free(km_json.at))) return NULL;
    if (exists) return slam_tokenizer_load(km_npy, &stored, ops);
    slam_tokenizer *t = slam_tokenizer_load(NULL, &config, ops);
    if (!t) return NULL;
    reservoir sample = {NULL, 0, 0, frames, (size_t)t->width, 0, rng_stream(seed, 0x6b6d, 1)};
    uint64_t state = rng_stream(seed, 0x6b6d, 2);
    shuffled.paths.at = NEW(char *, in->paths.n);
    for (size_t i = 0; i < in->paths.n; i++) { // inside-out Fisher-Yates
        const size_t j = (size_t)rng_below(&state, i + 1);
        shuffled.paths.at[i] = shuffled.paths.at[j];
        shuffled.paths.at[j] = in->paths.at[i];
    }
    t->centroids = NEW(float, (size_t)K *sample.D);
    const int ok = fit_read(t, &shuffled, 8 * frames, &sample, progress, context) &&
                   kmeans_fit(sample.frames, sample.n, sample.D, K, seed, t->centroids, progress, context, report) &&
                   tokenizer_complete(t, km_npy, K, sample.D) &&
                   fit_read(t, &shuffled, 50 * (size_t)K, NULL, NULL, NULL) && tokenizer_save(t, km_npy, report);
    free(sample.frames);
    free(shuffled.paths.at);
    if (ok) return t;
    slam_tokenizer_free(t);
    return NULL;
}

/* ---- units of audio files in memory ---- */

int slam_audio_units(const slam_tokenizer *t, slam_comm *comm, const slam_strings *paths, slam_units *units,
                     slam_progress_fn *progress, void *context) {
    const range share = comm_share(comm, paths->n);
    const slam_inputs in = {
        SLAM_INPUT_AUDIO, 0, *paths, paths->n, 0, share.first, share.end, 0, 0, ZERO, ZERO, NULL, NULL, ZERO};
    slam_progress p = {"tokenize", 0, (double)(share.end - share.first), 0, NULL, NULL};
    slam_reader *reader = slam_reader_open(&in, t, share.first);
    const slam_item *item;
    strbuf s = ZERO; // for each file: its slam_units (pointers are ignored), unit (n), duration (n)
    int more;
    while ((more = reader_item(reader, &item, &p, progress, context)) > 0) {
        const slam_units none = ZERO, *u = item->error ? &none : &item->segments->units;
        strbuf_add_bytes(&s, u, sizeof *u);
        strbuf_add_bytes(&s, u->unit, u->n * sizeof(int));
        strbuf_add_bytes(&s, u->duration, u->n * sizeof(int));
    }
    slam_reader_close(reader);
    memset(units, 0, paths->n * sizeof *units);
    const int ok = slam_all_ok(comm, more == 0);
    strbuf all = ZERO;
    if (ok) all = comm_all_gather(comm, &s);
    const char *at = all.at;
    for (slam_units *u = units; ok && u < units + paths->n; u++) {
        memcpy(u, at, sizeof *u);
        const size_t bytes = u->n * sizeof(int);
        u->unit = (int *)memcpy(NEW(int, u->n), at + sizeof *u, bytes);
        u->duration = (int *)memcpy(NEW(int, u->n), at + sizeof *u + bytes, bytes);
        at += sizeof *u + 2 * bytes;
    }
    strbuf_free(&all);
    strbuf_free(&s);
    return ok;
}

/* ---- synthesis: units -> audio ----
   A vocoder of source and filter (Oppenheim 1969). A centroid's cepstra are a short-time spectrum, rounded off: they
   give the amplitude of a filter at each frequency, exp A. Its phase is chosen as the one with minimum delay, which
   follows from the amplitude; the filter's impulse response h is then exp of a power series (Oppenheim and Schafer):
       a_n = 1/N sum_k A_k cos(2 pi k n / N)     h_0 = exp a_0     h_n = 1/n sum_(k=1..n) 2 k a_k h_(n-k)
   The filters, interpolated between the centres of the frames, are excited by pulses where speech is voiced, elsewhere
   by noise. MFCC do not say the pitch: it falls, as in a sentence, and starts again after a silence. */

enum { VOICE_HOP = 80, VOICE_TAPS = MFCC_WINDOW / 2 }; // samples: 5 ms, from one filter to the next; of h

struct slam_voice {
    float *filter;             // (K,taps) of each unit: a_0, then 2 n a_n
    double phase, pitch, last; // periods since the last pulse; Hz; the last sample
    uint64_t rng;
    float ahead[VOICE_TAPS + VOICE_HOP]; // what the excitation so far adds to the samples from here on
    float out[VOICE_HOP];
};

/* The filter that turns white noise of variance 1 into frames with cepstra c. c_1 .. c_12 give the log energies of the
   40 triangles, up to a constant: the lifter is divided out, the cosines are an orthogonal transform, and a triangle
   collects energy in proportion to its area. c_0, the log energy of the frame, gives the constant.
       E_j = sum_i dct_ji c_i / lifter_i^2 - log area_j      L = E, linear between the centres of the triangles
       A = (L + c_0 - log sum_k exp L_k - log sum_t hamming_t^2 / N) / 2 */
static void voice_filter(const struct slam_mfcc *m, const float *c, float *filter) {
    double E[MFCC_FILTERS], A[MFCC_WINDOW], a[MFCC_WINDOW], sum = 0, window = 0;
    const int N = m->window;
    for (int j = 0; j < MFCC_FILTERS; j++) {
        E[j] = -log(0.5 * (m->edge[j + 2] - m->edge[j]));
        for (int i = 1; i < MFCC_CEPSTRA; i++) E[j] += m->dct[j][i] * c[i] / pow(1 + 11 * sin(PI * i / 22), 2);
    }
    for (int k = 0, j = 0; k <= N / 2; k++) { // centre j <= k <= centre j + 1
        while (j + 2 < MFCC_FILTERS && k > m->edge[j + 2]) j++;
        const double at = (double)(k - m->edge[j + 1]) / (m->edge[j + 2] - m->edge[j + 1]), w = fmin(fmax(at, 0), 1);
        A[k] = (1 - w) * E[j] + w * E[j + 1];
        sum += exp(A[k]);
    }
    for (int t = 0; t < N; t++) window += m->hamming[t] * m->hamming[t] / N;
    for (int k = 0; k <= N / 2; k++) A[k] = A[(N - k) % N] = (A[k] + c[0] + 0.5 - log(sum * window)) / 2;
    mfcc_fft(m, a, A, N, 1);
    filter[0] = (float)(a[0] / N);
    for (int n = 1; n < N / 2; n++) filter[n] = (float)(2 * n * a[n] / N);
}

/* A unit is silent, or voiced where low frequencies dominate. Autocorrelation agrees in 87 % of espeak's frames. */
static int unit_silent(const slam_tokenizer *t, int unit) { return t->centroids[(size_t)unit * t->width] < -7; }
static int unit_voiced(const slam_tokenizer *t, int unit) {
    return !unit_silent(t, unit) && t->centroids[(size_t)unit * t->width + 1] > -38;
}

/* The next 5 ms. */
static void voice_next(slam_vocoder *v) {
    const slam_tokenizer *t = v->tokenizer;
    struct slam_voice *s = v->voice;
    const int taps = t->mfcc->window / 2; // also the centre of the first frame
    const double at = ((double)v->done + VOICE_HOP / 2 - taps) / v->step,
                 place = fmax(0, fmin(at, (double)v->frames - 1));
    const int before = v->frame[(size_t)place], after = v->frame[(size_t)ceil(place)];
    const float *x = s->filter + (size_t)before * taps, *y = s->filter + (size_t)after * taps;
    const float w = (float)(place - floor(place));
    const double voiced = (1 - w) * unit_voiced(t, before) + w * unit_voiced(t, after);
    float a[VOICE_TAPS] = ZERO, h[VOICE_TAPS] = ZERO;
    for (int n = 0; n < taps; n++) a[n] = (1 - w) * x[n] + w * y[n];
    h[0] = expf(a[0]);
    for (int n = 0; n < taps; n++) { // h_n is complete, and goes into those after it
        if (n) h[n] /= (float)n;
        for (int k = 1; k < taps - n; k++) h[n + k] += a[k] * h[n];
    }
    s->pitch = unit_silent(t, before) ? 130 : fmax(90, s->pitch - 40.0 / 3 * VOICE_HOP / SAMPLE_RATE); // 40 Hz in 3 s
    for (int i = 0; i < VOICE_HOP; i++) {
        s->phase += s->pitch / SAMPLE_RATE;
        const double pulse = s->phase >= 1 ? sqrt(SAMPLE_RATE / s->pitch) : 0; // of variance 1, too
        const float e = (float)(sqrt(voiced) * pulse + sqrt(1 - voiced) * rng_normal(&s->rng));
        s->phase -= floor(s->phase);
        for (int n = 0; n < taps; n++) s->ahead[i + n] += e * h[n];
        s->last = s->ahead[i] + 0.97 * s->last; // undoes the pre-emphasis
        s->out[i] = (float)fmax(-1, fmin(1, s->last));
    }
    memmove(s->ahead, s->ahead + VOICE_HOP, sizeof s->ahead - sizeof s->out);
    memset(s->ahead + VOICE_TAPS, 0, sizeof s->out);
}

/* ---- synthesis by a network: HiFi-GAN from units (Kong et al. 2020; Polyak et al. 2021), as in textlesslib ----
   A frame is the embedding of its unit, followed by those of speaker and style.
       x = conv(frames)
       each stage:  x = transposed conv(leaky x)             rate times as many frames, half the channels
                    x = mean over blocks: three times        x = x + conv(leaky(dilated conv(leaky x)))
       samples = tanh(conv(leaky x))
   Leaky ReLU has slope 0.1, the last one 0.01. Predicted durations are max(1, round(exp(y) - 1)),
       y = linear(norm(relu(conv(norm(relu(conv(embedding))))))) */

enum { GAN_WINDOW = 1 << 18, GAN_LONGEST = 1000 }; // samples of a window; frames of a predicted duration

typedef struct slam_gan {
    network net;
    int V, E, in, C, H; // units; channels of an embedding, of a frame, of the first convolution, of predicted durations
    int stages, rate[LIST_MOST], kernel[LIST_MOST], sampling_rate;
    int blocks, taps[LIST_MOST], dilation[LIST_MOST][LIST_MOST];
    int voice[3];              // rows of the tables of embeddings: not used, speaker, style
    size_t window, step, tail; // frames at once; samples per frame; more of them at the end
    double halo;               // frames that a sample depends on, to each side, at most
    size_t widest;             // most numbers per frame
    slam_act *frames, *units;  // (V,in) (V,E)
    network_module conv[4 + LIST_MOST * (1 + 6 * LIST_MOST)], *next; // in the order of the passes
    network_module norm[2], linear;                                  // of predicted durations
    int *duration;                                                   // of the sequence's units, where none are given
    float *out;                                                      // of a window
    size_t capacity;
} slam_gan;

static const field gan_fields[] = {
    {"num_embeddings", FIELD_INT, offsetof(slam_gan, V), 1, 1 << 16, 1},
    {"embedding_dim", FIELD_INT, offsetof(slam_gan, E), 1, 1 << 14, 1},
    {"upsample_initial_channel", FIELD_INT, offsetof(slam_gan, C), 1, 1 << 14, 1},
    {"sampling_rate", FIELD_INT, offsetof(slam_gan, sampling_rate), SAMPLE_RATE, SAMPLE_RATE, 0},
};

/* Settings, and the sizes that follow from them. */
static int gan_config_load(slam_gan *g, const char *path) {
    static const char *const others[] = {"f0", "embedder_params", "lambda_commit", "lambda_commit_code"};
    static const char *const lists[] = {"upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes",
                                        "resblock_dilation_sizes"};
    json *c = json_load(path);
    int ok = c && fields_read(c, gan_fields, 4, g, path), reach = 0;
    for (int i = 0; ok && i < 4; i++) {
        const json *j = json_get(c, others[i]);
        if (j && j->type != JSON_FALSE)
            ok = set_error("%s: '%s' is set, expected a vocoder of units, speakers and styles alone", path, others[i]);
    }
    if (ok && strcmp(json_string(c, "resblock", "1"), "1"))
        ok = set_error("%s: resblock is '%s', expected '1'", path, json_string(c, "resblock", "1"));
    if (ok) ok = g->stages = json_list(json_get(c, lists[0]), lists[0], g->rate, 0, 0, lists[0], path);
    if (ok) ok = json_list(json_get(c, lists[1]), lists[1], g->kernel, 0, g->stages, lists[0], path);
    if (ok) ok = g->blocks = json_list(json_get(c, lists[2]), lists[2], g->taps, 0, 0, lists[2], path);
    const json *list = json_get(c, lists[3]), *j = list ? list->first : NULL;
    for (int i = 0; ok && i < g->blocks; i++, j = ok ? j->next : NULL) {
        int *d = g->dilation[i];
        ok = json_list(j, lists[3], d, 0, 3, "[1, 3, 5]", path);
        const int read = ok ? g->taps[i] / 2 * (d[0] + d[1] + d[2] + 3) : 0; // frames to each side
        if (ok && (g->taps[i] % 2 == 0 || read > 1 << 12))
            ok = set_error("%s: block %d has kernel size %d and reads %d frames to each side, expected an odd size and "
                           "at most %d frames",
                           path, i, g->taps[i], read, 1 << 12);
        if (read > reach) reach = read;
    }
    g->step = 1;
    g->halo = 12; // of the first convolution, the last one and those of durations, and for the ends of T frames
    g->widest = (size_t)(3 * g->E > g->C ? 3 * g->E : g->C) + 1;
    for (int i = 0; ok && i < g->stages; i++) {
        const int K = g->kernel[i], u = g->rate[i], C = g->C >> (i + 1);
        g->halo += ((double)K / u + 1 + (double)reach / u) / (double)g->step;
        g->step *= u;
        g->tail = g->tail * u + (K - u) % 2;
        if (g->step * (C + 1) > g->widest) g->widest = g->step * (C + 1); // one more: samples are float
        if (g->step > 1 << 11 || K < u || C == 0)
            ok = set_error("%s: stage %d has rate %d, kernel size %d and %d channels, expected a rate up to the size "
                           "and %d in all",
                           path, i, u, K, C, 1 << 11);
    }
    g->window = GAN_WINDOW / g->step;
    json_free(c);
    return ok;
}

/* out = the next convolution, of leaky ReLU of x (*T,C), to OC channels; *T becomes its number of frames. If out is
   NULL, it is loaded instead, the weights multiplied by scale. Frees the name. With a rate u it is transposed,
       out_j = sum_t x_t w_(j + p - t u)      p = (K - u) / 2
   Its u output frames j = q u + r are one frame of a plain convolution, in which x_(q - m) meets w_(m u + r + p), 0
   outside of 0 .. K - 1. */
static void gan_conv(slam_gan *g, char *name, slam_act *out, const slam_act *x, int *T, int C, int OC, int K,
                     int dilation, int rate, float slope, float scale, int output) {
    network *n = &g->net;
    network_module *m = g->next++;
    const int u = rate ? rate : 1, p = (K - u) / 2, last = (K - 1 - p) / u, taps = last + 1 + (u - 1 + p) / u;
    const int more = rate ? (K - u) % 2 : 0, N = u * OC;
    const slam_conv conv = {1,     1,      *T,   C,    *T + more, N, taps, 1, dilation, last * dilation,
                            slope, output, NULL, NULL, NULL};
    float *w = out ? NULL : network_weight(n, name, 0, rate ? C : OC, rate ? OC : C, K);
    float *b = out ? NULL : network_read(n, name, "bias", OC, 1, 1);
    float *rows = b ? NEW(float, (size_t)N *C *taps) : NULL, *bias = b ? NEW(float, N) : NULL, *next = rows;
    for (int i = 0; b && i < N; i++) {
        bias[i] = b[i % OC];
        for (int c = 0; c < C; c++)
            for (int k = last * u + i / OC + p, end = k - taps * u; k > end; k -= u, next++) {
                const size_t from = rate ? ((size_t)c * OC + i % OC) * K + k : ((size_t)i * C + c) * K + K - 1 - k;
                if (k >= 0 && k < K) *next = scale * w[from];
            }
    }
    if (!out) m->w = network_store(n, rows, N, C, taps);
    if (!out) m->b = network_store(n, bias, N, 1, 1);
    if (out) n->ops->conv1d(n->ops, out, x, m->w, m->b, &conv);
    *T = *T * u + more;
    free(w);
    free(b);
    free(name);
}

/* y = x + y (T,C) */
static void gan_add(const slam_gan *g, slam_act *y, const slam_act *x, int T, int C) {
    if (y) act_add(g->net.ops, y, y, x, T, C);
}

/* x: frames (T,in), on return the samples before tanh; y, h, z: space. With NULL and T = 0 it loads. The mean over
   blocks is a sum here: the weights that follow have the factor. */
static void gan_synthesize(slam_gan *g, slam_act *x, slam_act *y, slam_act *h, slam_act *z, int T) {
    const float mean = 1 / (float)g->blocks;
    g->next = g->conv + 2;
    gan_conv(g, string_copy("conv_pre"), y, x, &T, g->in, g->C, 7, 1, 0, 1, 1, 0);
    for (int i = 0, k = 0; i < g->stages; i++) {
        const int C = g->C >> (i + 1);
        gan_conv(g, string_print("ups.%d", i), x, y, &T, g->C >> i, C, g->kernel[i], 1, g->rate[i], 0.1f, i ? mean : 1,
                 0);
        for (int b = 0; b < g->blocks; b++, k++) {
            slam_act *to = b ? z : y; // y: the sum of the blocks
            for (int d = 0; d < 3; d++) {
                gan_conv(g, string_print("resblocks.%d.convs1.%d", k, d), h, d ? to : x, &T, C, C, g->taps[b],
                         g->dilation[b][d], 0, 0.1f, 1, 0);
                gan_conv(g, string_print("resblocks.%d.convs2.%d", k, d), to, h, &T, C, C, g->taps[b], 1, 0, 0.1f, 1,
                         d ? SLAM_ADD : 0);
                if (d == 0) gan_add(g, to, x, T, C);
            }
            if (b) gan_add(g, y, z, T, C);
        }
    }
    gan_conv(g, string_copy("conv_post"), x, y, &T, g->C >> g->stages, 1, 7, 1, 0, 0.01f, mean, 0);
}

/* x: embeddings of units (T,E); y (T): log (1 + duration). With NULL it loads. */
static void gan_predict(slam_gan *g, slam_act *x, slam_act *y, int T) {
    network *n = &g->net;
    g->next = g->conv;
    for (int i = 0; i < 2; i++) {
        gan_conv(g, string_print("dur_predictor.conv%d.0", i + 1), y, x, &T, i ? g->H : g->E, g->H, 3, 1, 0, 1, 1,
                 SLAM_RELU);
        if (y) n->ops->layernorm(n->ops, NULL, x, y, NULL, g->norm[i].w, g->norm[i].b, 1e-5f, 0, T, g->H);
        else network_module_load(n, &g->norm[i], "dur_predictor.ln%d", i + 1, g->H, 1, 1, 1);
    }
    if (y) n->ops->matmul_forward(n->ops, y, x, g->linear.w, g->linear.b, T, g->H, 1);
    else network_module_load(n, &g->linear, "dur_predictor.proj", 0, 1, g->H, 1, 1);
}

static void gan_load_weights(network *n) {
    static const char *const tables[] = {"dict", "spkr", "style"};
    slam_gan *g = (slam_gan *)n;
    const size_t V = g->V, E = g->E;
    float *frames = n->weights ? NEW(float, 3 * E * V) : NULL; // (in,V)
    g->in = 0;
    for (int i = 0; n->ok && i < 3; i++) {
        const tensor *t = network_find(n, tables[i], "weight"),
                     *linear = network_find(n, "dur_predictor.proj", "weight");
        const int rows = i == 0 ? g->V : t ? (int)t->shape[0] : 0;
        g->H = linear ? (int)linear->count : 0;
        if (i && (g->voice[i] < 0 || g->voice[i] >= (t ? rows : 1)))
            n->ok = set_error("%s: found %d rows of %s.weight, expected number %d", n->file->file->path, rows,
                              tables[i], g->voice[i]);
        if (i && !t) continue;
        float *x = network_read(n, tables[i], "weight", rows, E, 1);
        for (size_t k = 0; x && k < E * V; k++)
            frames[g->in * V + k] = x[(i ? (size_t)g->voice[i] : k % V) * E + k / V];
        g->in += g->E;
        if (i) free(x);
        else g->units = network_store(n, x, V, E, 1);
    }
    if ((size_t)g->H >= g->widest) g->widest = g->H + 1;
    g->frames = network_store(n, frames, 1, g->in, V);
    if (g->H) gan_predict(g, NULL, NULL, 0);
    gan_synthesize(g, NULL, NULL, NULL, NULL, 0);
}

/* g->out: the samples of a window of frames, from `first` on, in a longer one that has all frames which they depend on;
   or of units, log (1 + duration). Returns how many, 0 on error. */
static size_t gan_window(slam_gan *g, const int *units, size_t n, size_t first, int predict) {
    slam_ops *ops = g->net.ops;
    const size_t length = g->window, halo = (size_t)ceil(g->halo), step = predict ? 1 : g->step;
    const size_t begin = first > halo ? first - halo : 0, left = n - first;
    const int T = (int)((left > length + halo ? first + length + halo : n) - begin);
    const size_t count = left > length ? length * step : left * step + (predict ? 0 : g->tail);
    const size_t size = round_up((T + LIST_MOST + 1) * g->widest, 256);
    if (!network_grow(&g->net, 4 * size * ops->act_bytes)) return 0;
    slam_act *x = (slam_act *)g->net.arena, *y = act_at(ops, x, size), *h = act_at(ops, y, size);
    slam_act *z = act_at(ops, h, size), *from = predict ? y : x;
    ops->upload(ops, z, units + begin, T * sizeof *units);
    ops->embedding_forward(ops, x, (const int *)z, predict ? g->units : g->frames, T, predict ? g->E : g->in);
    if (predict) gan_predict(g, x, y, T);
    else gan_synthesize(g, x, y, h, z, T);
    GROW(float, g->out, g->capacity, count);
    ops->to_float(ops, (float *)h, act_at(ops, from, (first - begin) * step), count);
    ops->download(ops, g->out, h, count * sizeof *g->out);
    for (size_t i = 0; !predict && i < count; i++) g->out[i] = tanhf(g->out[i]);
    return ops->finish(ops) ? count : 0;
}

/* g->duration (n): the predicted ones, or 1 */
static int gan_durations(slam_gan *g, const int *units, size_t n) {
    free(g->duration);
    g->duration = NEW(int, n);
    for (size_t i = 0; i < n; i++) g->duration[i] = 1;
    for (size_t first = 0, count; g->H && first < n; first += count) {
        if (!(count = gan_window(g, units, n, first, 1))) return 0;
        for (size_t i = 0; i < count; i++)
            g->duration[first + i] = (int)fminf(fmaxf(rintf(expf(g->out[i]) - 1), 1), GAN_LONGEST);
    }
    return 1;
}

void slam_vocoder_free(slam_vocoder *v) {
    if (!v) return;
    if (v->voice) free(v->voice->filter);
    free(v->voice);
    if (v->gan) {
        network_free(&v->gan->net);
        free(v->gan->duration);
        free(v->gan->out);
    }
    free(v->gan);
    free(v->frame);
    free(v);
}

slam_vocoder *slam_vocoder_open(const char *folder, int speaker, int style, const slam_tokenizer *t, slam_ops *ops) {
    slam_vocoder *v = NEW(slam_vocoder, 1);
    if (folder) {
        slam_gan *g = v->gan = NEW(slam_gan, 1);
        g->net.ops = ops;
        g->voice[1] = speaker;
        g->voice[2] = style;
        if (gan_config_load(g, path_join(folder, "config.json").at) &&
            network_load(&g->net, folder, "generator.", gan_load_weights)) {
            v->K = g->V;
            v->step = (int)g->step;
            v->tail = g->tail;
            return v;
        }
    } else if (t && t->mfcc && t->K) {
        const size_t taps = (size_t)t->mfcc->window / 2;
        v->tokenizer = t;
        v->K = t->K;
        v->step = t->mfcc->step;
        v->tail = (size_t)(t->mfcc->window - v->step);
        v->voice = NEW(struct slam_voice, 1);
        v->voice->filter = NEW(float, t->K *taps);
        for (int k = 0; k < t->K; k++)
            voice_filter(t->mfcc, t->centroids + (size_t)k * t->width, v->voice->filter + k * taps);
        return v;
    } else set_error("these units are not of MFCC: their audio needs a vocoder");
    slam_vocoder_free(v);
    return NULL;
}

int slam_vocoder_start(slam_vocoder *v, const int *unit, const int *duration, size_t n) {
    const slam_tokenizer *t = v->tokenizer;
    const size_t most = (UINT32_MAX - 44) / 2 / (size_t)v->step - 2 - LIST_MOST; // frames in a WAV file
    double owed = 0;                                                             // frames, by rounding
    v->frames = v->samples = v->done = 0;
    if (!n) return set_error("has no units, expected at least one");
    for (size_t i = 0; i < n; i++)
        if (unit[i] < 0 || unit[i] >= v->K)
            return set_error("unit %zu is %d, expected 0 to %d", i + 1, unit[i], v->K - 1);
    if (v->gan && !gan_durations(v->gan, unit, n)) return 0;
    for (size_t i = 0; i < n; i++) {
        size_t frames = duration && duration[i] ? (size_t)duration[i] : v->gan ? (size_t)v->gan->duration[i] : 0;
        if (!frames) {
            owed += !t->config.dedup ? 1 : t->durations ? t->durations[unit[i]] * t->config.rate / 1000.0 : 1.4;
            frames = owed < 1.5 ? 1 : (size_t)(owed + 0.5);
            owed -= (double)frames;
        }
        if (frames > most - v->frames) return set_error("lasts more than %zu frames, too long for a WAV file", most);
        GROW(int, v->frame, v->capacity, v->frames + frames);
        for (; frames; frames--) v->frame[v->frames++] = unit[i];
    }
    v->samples = v->frames * (size_t)v->step + v->tail;
    if (v->voice) {
        const struct slam_voice start = {v->voice->filter, 0, 130, 0, 0, ZERO, ZERO};
        *v->voice = start;
    }
    return 1;
}

ptrdiff_t slam_vocoder_next(slam_vocoder *v, const float **samples) {
    const size_t left = v->samples - v->done;
    size_t n = left < VOICE_HOP ? left : (size_t)VOICE_HOP;
    if (n && v->gan) n = gan_window(v->gan, v->frame, v->frames, v->done / v->gan->step, 0);
    else if (n) voice_next(v);
    if (left && !n) return -1;
    *samples = v->gan ? v->gan->out : v->voice->out;
    v->done += n;
    return (ptrdiff_t)n;
}

int slam_vocoder_write(slam_vocoder *v, const char *path, slam_progress_fn *progress, void *context) {
    const uint32_t n_bytes = (uint32_t)(2 * v->samples);
    enum { RIFF = 0x46464952, WAVE = 0x45564157, FMT = 0x20746d66, DATA = 0x61746164 };
    const uint32_t header[] = {RIFF,        n_bytes + 36,    WAVE,         FMT,  16,     1 | 1 << 16,
                               SAMPLE_RATE, 2 * SAMPLE_RATE, 2 | 16 << 16, DATA, n_bytes};
    slam_progress p = {"synthesize", 0, (double)v->samples, 0, NULL, NULL};
    char *part = string_print("%s.part", path);
    append_file file;
    const float *x;
    ptrdiff_t n = 1;
    const int opened = append_open(&file, part);
    int ok = opened && append_resume(&file, 0) && append_write(&file, header, sizeof header);
    while (ok && (n = slam_vocoder_next(v, &x)) > 0) {
        for (ptrdiff_t i = 0; ok && i < n; i++) {
            const int16_t sample = (int16_t)lrintf(32767 * x[i]);
            ok = append_write(&file, &sample, 2);
        }
        p.done = (double)v->done;
        if (ok && progress && !progress(context, &p)) ok = set_error("%s: stopped before its end", path);
    }
    ok = append_close(&file) && ok && n == 0 && file_rename(part, path);
    if (!ok && opened) unlink(part);
    free(part);
    return ok;
}

/* ==========================================================================================
   SECTION 12. OBJECTIVES   language modelling, preference pairs and DPO, scores of sequences
   ========================================================================================== */

double slam_sequence_logp(const slam_batch *b, const slam_sequence *s) {
    double sum = 0;
    for (int i = s->first; i < s->end; i++) sum -= b->losses[i];
    return sum;
}

static int report_progress(slam_progress_fn *progress, void *context, const char *stage, double done, double total) {
    slam_progress p = ZERO;
    p.stage = stage;
    p.done = done;
    p.total = total;
    if (!progress || progress(context, &p)) return 1;
    return set_error("stopped (%s: %.0f of %.0f)", stage, done, total);
}

static int units_check(const int *unit, size_t n, int V, const char *what) {
    const int n_units = (V < 65536 ? V : 65536) - FIRST_UNIT;
    for (size_t i = 0; i < n; i++)
        if (unit[i] < 0 || unit[i] >= n_units)
            return set_error("%s: unit %zu is %d, expected below %d (the vocabulary is %d)", what, i + 1, unit[i],
                             n_units, V);
    return 1;
}

/* Forward passes over all rows of a loader. Sets logp[item] of every sequence (n). The ranks share the work: each logp
   is 0 on all but one, so that the sums have the bits of a single process. */
static int loader_logps(slam_loader *l, slam_model *m, slam_batch *b, double *logp, size_t n, const char *stage,
                        double total, slam_progress_fn *progress, void *context) {
    slam_comm *comm = m->ops->comm;
    int ok = 1;
    slam_loader_begin(l, INT_MAX, comm);
    const double share = l->rows_left;
    while (slam_comm_max(comm, ok ? l->rows_left > 0 : 2) == 1) { // all stop when one has failed or is cancelled
        if (slam_loader_next(l, b) == 0) continue;
        ok = slam_forward(m, b);
        for (const slam_sequence *s = b->sequences; ok && s < b->sequences + b->n_sequences; s++)
            logp[s->item] = slam_sequence_logp(b, s);
        ok = ok && report_progress(progress, context, stage, floor(total * (1 - l->rows_left / share)), total);
    }
    if (!slam_all_ok(comm, ok)) return 0;
    slam_comm_sum(comm, logp, n);
    return 1;
}

int slam_data_loss(slam_model *m, const slam_data *data, slam_batch *b, double *losses, uint64_t *targets) {
    if (data->V > m->config.V)
        return set_error("the data have a vocabulary of %d, the model has one of %d", data->V, m->config.V);
    if (data->context > m->config.T)
        return set_error("a context of %d tokens, the model has %d positions", data->context, m->config.T);
    slam_loader *l = slam_loader_new(data, 0, 0);
    if (!l) return 0;
    double *logp = NEW(double, data->n_chunks), sum = 0;
    const int ok = loader_logps(l, m, b, logp, data->n_chunks, "loss", 0, NULL, NULL);
    for (size_t s = 0; s < data->n_sources; s++) {
        double source_sum = 0, n = 0;
        for (size_t i = data->sources[s].first_chunk; i < data->sources[s].end_chunk; i++) {
            source_sum -= logp[i];
            n += data->chunks[i].n - 1;
        }
        losses[1 + s] = source_sum / n;
        sum += source_sum;
    }
    *targets = l->targets;
    losses[0] = sum / (double)l->targets;
    slam_loader_free(l);
    free(logp);
    return ok;
}

/* ---- preference pairs ---- */

/* A pair's positions in a row: the prompt without its last token, once if shared; and for each completion the prompt's
   last token, which predicts its first one, and its own tokens without the closing 1, which is only a target. */
static uint32_t pair_length(const slam_pair *q, int shared) {
    return (q->n_prompt - 1) * (shared ? 1 : 2) + q->n_chosen + q->n_rejected;
}

static int pair_is_shared(const slam_pairs *p, const slam_pair *q) {
    return p->share && pair_length(q, 1) <= (uint32_t)p->context;
}

const char *slam_pairs_skipped(const slam_pairs *p, char text[200]) {
    static const char *const why[] = {"repetitive", "with an empty completion", "with identical completions",
                                      "too long"};
    size_t n = 0;
    snprintf(text, 200, "none");
    for (int k = 0; k < SLAM_SKIPS; k++)
        if (p->skipped[k]) n += (size_t)snprintf(text + n, 200 - n, "%s%zu %s", n ? ", " : "", p->skipped[k], why[k]);
    return text;
}

/* Adds the pair of a line, or counts why it is skipped. u: buffers of the caller. */
static int pairs_add_line(slam_pairs *p, const json *root, const char *what, slam_units u[3]) {
    static const char *const names[] = {"prompt", "chosen", "rejected"};
    int ok = 1;
    for (int k = 0; ok && k < 3; k++) {
        const json *value = json_get(root, names[k]);
        char *name = string_print("%s: '%s'", what, names[k]);
        ok = value ? units_from_json(value, name, &u[k]) : set_error("%s is missing", name);
        ok = ok && units_check(u[k].unit, u[k].n, p->V, name);
        free(name);
    }
    if (!ok) return 0;
    const char *prompt = json_string(root, "prompt_text", NULL), *chosen = json_string(root, "chosen_text", NULL);
    const size_t longer = u[1].n > u[2].n ? u[1].n : u[2].n, most = (size_t)p->context - 2;
    int skip = SLAM_SKIPS;
    if (prompt && chosen && pair_repeats(prompt, chosen, p->max_repetition)) skip = SLAM_REPETITIVE;
    else if (!u[1].n || !u[2].n) skip = SLAM_EMPTY;
    else if (u[1].n == u[2].n && !memcmp(u[1].unit, u[2].unit, u[1].n * sizeof(int))) skip = SLAM_IDENTICAL;
    else if (longer > most) skip = SLAM_TOO_LONG;
    if (skip < SLAM_SKIPS) return ++p->skipped[skip] > 0;
    const size_t cut = u[0].n + longer > most ? u[0].n + longer - most : 0; // the completion continues the prompt's end
    GROW(slam_pair, p->at, p->capacity, p->n + 1);
    slam_pair *q = &p->at[p->n++];
    q->n_prompt = (uint32_t)(1 + u[0].n - cut);
    q->n_chosen = (uint32_t)u[1].n + 1;
    q->n_rejected = (uint32_t)u[2].n + 1;
    q->tokens = NEW(uint16_t, (size_t)q->n_prompt + q->n_chosen + q->n_rejected);
    uint16_t *to = q->tokens;
    *to++ = DOCUMENT_TOKEN;
    for (int k = 0; k < 3; k++) {
        for (size_t i = k ? 0 : cut; i < u[k].n; i++) *to++ = (uint16_t)(u[k].unit[i] + FIRST_UNIT);
        if (k > 0) *to++ = DOCUMENT_TOKEN;
    }
    p->truncated += cut > 0;
    p->unshared += p->share && !pair_is_shared(p, q);
    return 1;
}

static int pairs_add_file(slam_pairs *p, const char *path) {
    units_reader reader;
    slam_units u[3];
    int status, ok = 1;
    if (!string_ends(path, ".jsonl")) return set_error("%s: expected preference pairs (.jsonl)", path);
    if (!units_open(&reader, path)) return 0;
    memset(u, 0, sizeof u);
    while (ok && (status = units_next(&reader, NULL)) != 0)
        ok = status > 0 && pairs_add_line(p, reader.root, reader.what, u);
    for (int k = 0; k < 3; k++) slam_units_free(&u[k]);
    units_close(&reader);
    return ok;
}

int slam_pairs_add(slam_pairs *p, const char *pattern, int validation) {
    slam_strings list = ZERO;
    const slam_pairs before = *p;
    char skipped[200];
    if (p->context < 4 || p->context > LONGEST_CONTEXT)
        return set_error("pairs with a context of %d, expected 4 to %d", p->context, LONGEST_CONTEXT);
    if (!validation && p->n > p->n_train) return set_error("%s: add pairs for training before validation", pattern);
    int ok = path_glob(pattern, &list);
    for (size_t i = 0; ok && i < list.n; i++) ok = pairs_add_file(p, list.at[i]);
    if (ok && validation && p->n == before.n) {
        for (int k = 0; k < SLAM_SKIPS; k++) p->skipped[k] -= before.skipped[k]; // of this call only
        ok = set_error("%s: contains no pairs to validate on; skipped: %s", pattern, slam_pairs_skipped(p, skipped));
    }
    if (!validation) p->n_train = p->n;
    slam_strings_free(&list);
    return ok;
}

/* Chosen by selection sampling, as documents are. */
int slam_pairs_prepare(slam_pairs *p, double fraction, uint64_t seed) {
    const size_t n = p->n_train;
    uint64_t held = (uint64_t)(fraction * (double)n + 0.5), rng = rng_stream(seed, 0, STREAM_HELD_OUT);
    if (fraction > 0 && held < 1) held = 1;
    char skipped[200];
    if (n <= held)
        return set_error("no pairs left to train on: %zu are held out for validation; skipped: %s", n,
                         slam_pairs_skipped(p, skipped));
    slam_pair *sorted = NEW(slam_pair, p->n);
    size_t train = 0, validation = p->n_train = n - (size_t)held;
    for (size_t i = 0; i < p->n; i++) {
        const int is_held = i < n && held && rng_below(&rng, n - i) < held;
        held -= (uint64_t)is_held;
        sorted[i >= n || is_held ? validation++ : train++] = p->at[i];
    }
    free(p->at);
    p->at = sorted;
    p->capacity = p->n;
    p->T = p->context < 512 ? 1024 : (int)round_up(2 * p->context, 16);
    const uint64_t numbers[] = {(uint64_t)p->V, (uint64_t)p->context, p->n, p->n_train};
    p->hash = hash_bytes(HASH_START, numbers, sizeof numbers);
    for (size_t i = 0; i < p->n; i++) {
        const slam_pair *q = &p->at[i];
        const uint32_t lengths[] = {q->n_prompt, q->n_chosen, q->n_rejected};
        const size_t tokens = (size_t)lengths[0] + lengths[1] + lengths[2];
        p->hash = hash_bytes(hash_bytes(p->hash, lengths, sizeof lengths), q->tokens, tokens * sizeof *q->tokens);
    }
    return 1;
}

void slam_pairs_free(slam_pairs *p) {
    for (size_t i = 0; i < p->n; i++) free(p->at[i].tokens);
    free(p->at);
    free(p->reference);
    memset(p, 0, sizeof *p);
}

/* ---- pairs -> rows -> batches ---- */

/* A shared prompt is written once: the rejected completion then starts at its last token, and the chosen one is
   hidden from it. */
static int batch_put_pair(slam_batch *b, int at, const void *context, uint32_t pair) {
    const slam_pairs *p = (const slam_pairs *)context;
    const slam_pair *q = &p->at[pair];
    const int shared = pair_is_shared(p, q);
    const uint16_t *completion = q->tokens + q->n_prompt;
    int start = at % b->T, chosen = 0;
    for (int side = 0; side < 2; side++) {
        const int n = (int)(side ? q->n_rejected : q->n_chosen), skip = side && shared ? (int)q->n_prompt - 1 : 0;
        const int n_prompt = (int)q->n_prompt - skip, head = at + n_prompt - 1;
        if (!shared) start = at % b->T;
        at = batch_put(b, at, q->tokens + skip, n_prompt, completion[0], n_prompt - 1, start);
        at = batch_put(b, at, completion, n - 1, completion[n - 1], 0, start);
        batch_add_sequence(b, 2 * (size_t)pair + (size_t)side, head, at);
        for (int i = head; side && shared && i < at; i++) {
            b->mask_start[i] = chosen % b->T;
            b->mask_end[i] = head % b->T;
        }
        chosen = head;
        completion += n;
    }
    return at;
}

slam_loader *slam_loader_new_pairs(const slam_pairs *p, int validation, uint64_t seed, int shuffle) {
    const size_t first = validation > 0 ? p->n_train : 0, end = validation ? p->n : p->n_train;
    if (first == end || !p->T) {
        set_error("a loader of no prepared pairs: there are %zu for training and %zu in all", p->n_train, p->n);
        return NULL;
    }
    slam_loader *l = loader_new(p, batch_put_pair, p->n, 0, seed, shuffle);
    for (size_t i = 0; i < p->n; i++) l->packer->lengths[i] = pair_length(&p->at[i], pair_is_shared(p, &p->at[i]));
    l->packer->longest_row = p->T;
    l->packer->first = first;
    l->packer->end = end;
    loader_begin_epoch(l, 0);
    return l;
}

/* ---- DPO ---- */

static double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

double slam_dpo_loss(double beta, double label_smoothing, double margin, double *dloss) {
    const double x = beta * margin, e = label_smoothing;
    *dloss = -beta * ((1 - e) / (1 + exp(x)) - e / (1 + exp(-x)));
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x);
}

static int reference_is_finite(const slam_pairs *p, const char *of) {
    for (size_t i = 0; i < 2 * p->n; i++)
        if (!isfinite(p->reference[i]))
            return set_error("%s: the log-probability of pair %zu is not finite", of, i / 2 + 1);
    return 1;
}

int slam_pairs_reference(slam_pairs *p, slam_model *m, slam_batch *b, slam_progress_fn *progress, void *context) {
    slam_loader *l = slam_loader_new_pairs(p, -1, 0, 0);
    if (!l) return 0;
    free(p->reference);
    p->reference = NEW(double, 2 * p->n);
    const int ok = loader_logps(l, m, b, p->reference, 2 * p->n, "reference", (double)p->n, progress, context);
    slam_loader_free(l);
    return slam_all_ok(m->ops->comm, ok && reference_is_finite(p, "the reference model"));
}

int slam_pairs_save_reference(const slam_pairs *p, const char *path, uint64_t model_hash) {
    char hashes[2][20];
    snprintf(hashes[0], sizeof hashes[0], "%016llx", (unsigned long long)p->hash);
    snprintf(hashes[1], sizeof hashes[1], "%016llx", (unsigned long long)model_hash);
    const char *const metadata[] = {"pairs", hashes[0], "model", hashes[1], NULL};
    const tensor out = {"logp", DTYPE_F64, 2, {p->n, 2}, p->reference, 2 * p->n, NULL};
    return tensors_write(path, &out, 1, metadata);
}

int slam_pairs_load_reference(slam_pairs *p, const char *path, uint64_t model_hash) {
    if (!path_is_file(path)) return 1;
    tensors *file = tensors_open(path);
    if (!file) return 0;
    const tensor *t = tensors_find(file, "logp");
    const char *pairs = tensors_metadata(file, "pairs"), *model = tensors_metadata(file, "model");
    int ok = t && t->dtype == DTYPE_F64 && pairs && strtoull(pairs, NULL, 16) == p->hash && model &&
             strtoull(model, NULL, 16) == model_hash;
    if (!ok) set_error("%s: not the log-probabilities of these pairs by this reference model", path);
    ok = ok && tensor_has_shape(t, 2, p->n, 2);
    if (ok) {
        free(p->reference);
        p->reference = (double *)memcpy(NEW(double, 2 * p->n), t->data, 2 * p->n * sizeof(double));
    }
    tensors_close(file);
    return ok && reference_is_finite(p, path);
}

/* ---- scores of sequences of units ----
   A sequence `1 u.. 1` of n units has n + 1 tokens to predict. One that is longer than a row is scored in windows of T
   tokens: in the first, the token after each of them is scored, in later ones after each of its second half. */

typedef struct score_window {
    size_t sequence;
    const uint16_t *tokens; // (n + 1) n tokens and the one after them
    int n, skip;            // the tokens after the first `skip` are not scored
} score_window;

static int compare_sequences(const void *a, const void *b) {
    const slam_units *x = *(const slam_units *const *)a, *y = *(const slam_units *const *)b;
    if (x->n != y->n) return x->n < y->n ? -1 : 1;
    return x->n ? memcmp(x->unit, y->unit, x->n * sizeof *x->unit) : 0;
}

static int batch_put_window(slam_batch *b, int at, const void *context, uint32_t item) {
    const score_window *w = &((const score_window *)context)[item];
    batch_add_sequence(b, item, at + w->skip, at + w->n);
    return batch_put(b, at, w->tokens, w->n, w->tokens[w->n], w->skip, at % b->T);
}

int slam_score(slam_model *m, const slam_units *units, size_t n, int B, int T, int sum, double *scores,
               slam_progress_fn *progress, void *context) {
    size_t n_windows = 0, capacity = 0, n_tokens = 0;
    if (B < 1 || T < 2) return set_error("%d rows of %d tokens, expected at least 1 and 2", B, T);
    if (T > m->config.T) return set_error("a context of %d tokens, the model has %d positions", T, m->config.T);
    for (size_t i = 0; i < n; i++) {
        char what[40];
        snprintf(what, sizeof what, "sequence %zu", i + 1);
        if (!units_check(units[i].unit, units[i].n, m->config.V, what)) return 0;
        n_tokens += units[i].n + 2;
    }
    const slam_units **sorted = NEW(const slam_units *, n); // equal sequences are neighbours, and scored once
    for (size_t i = 0; i < n; i++) sorted[i] = &units[i];
    if (n) qsort(sorted, n, sizeof *sorted, compare_sequences);
    uint16_t *tokens = NEW(uint16_t, n_tokens), *t = tokens;
    score_window *list = NULL;
    for (size_t i = 0; i < n; i++) {
        const slam_units *u = sorted[i];
        const size_t length = u->n + 1;
        if (i > 0 && !compare_sequences(&sorted[i - 1], &sorted[i])) continue;
        t[0] = t[length] = DOCUMENT_TOKEN;
        for (size_t k = 1; k < length; k++) t[k] = (uint16_t)(u->unit[k - 1] + FIRST_UNIT);
        for (size_t done = 0, end; done < length; done = end) {
            end = done ? done + (size_t)(T - T / 2) : (size_t)T;
            if (end > length) end = length;
            const size_t start = end < (size_t)T ? 0 : end - (size_t)T;
            const score_window w = {(size_t)(u - units), t + start, (int)(end - start), (int)(done - start)};
            GROW(score_window, list, capacity, n_windows + 1);
            list[n_windows++] = w;
        }
        t += length + 1;
    }
    if (t - tokens < T) T = (int)(t - tokens); // all in one row
    double *logp = NEW(double, n_windows);
    slam_loader *l = loader_new(list, batch_put_window, n_windows, T, 0, 0);
    for (size_t i = 0; i < n_windows; i++) l->packer->lengths[i] = (uint32_t)list[i].n;
    l->packer->end = n_windows;
    loader_begin_epoch(l, 0);
    slam_batch b = slam_batch_new((uint64_t)B < l->epoch_rows ? B : (int)l->epoch_rows, T, 0);
    int ok = slam_all_ok(m->ops->comm, !n || slam_model_plan(m, b.capacity, T, SLAM_INFERENCE)) &&
             loader_logps(l, m, &b, logp, n_windows, "score", (double)(t - tokens), progress, context);
    for (size_t i = 0; i < n; i++) scores[i] = 0;
    for (size_t i = 0; i < n_windows; i++) scores[list[i].sequence] += logp[i];
    for (size_t i = 0; ok && i < n; i++) {
        double *score = &scores[sorted[i] - units];
        if (i > 0 && !compare_sequences(&sorted[i - 1], &sorted[i])) *score = scores[sorted[i - 1] - units];
        else if (!sum) *score /= (double)(sorted[i]->n + 1);
        if (!isfinite(*score))
            ok = set_error("sequence %zu: the log-probability is not finite", (size_t)(sorted[i] - units) + 1);
    }
    slam_batch_free(&b);
    slam_loader_free(l);
    free(logp);
    free(list);
    free(tokens);
    free(sorted);
    return slam_all_ok(m->ops->comm, ok);
}

/* ==========================================================================================
   SECTION 13. EVALUATION   n-grams, test sets, generation
   ========================================================================================== */

/* ---- n-grams ----
   Only contexts of the test data are counted, so memory does not depend on the size of the training data. */

/* A context h, or a context with a follower hw. */
typedef struct ngram {
    uint64_t key;              // 0: an empty slot
    uint64_t count, followers; // c(h) and T(h), or c(hw)
} ngram;

/* The n-grams of one order: a hash table with linear probing, at most half full. */
typedef struct ngram_table {
    ngram *slots; // (2^bits)
    size_t n;
    int bits;
} ngram_table;

/* A hash as FNV-1a, by tokens: two of a hundred million n-grams get the same key with a probability of 0.1 %. */
static uint64_t ngram_key(const uint16_t *tokens, int n) {
    uint64_t key = HASH_START;
    for (int i = 0; i < n; i++) key = (key ^ tokens[i]) * 0x9e3779b97f4a7c15u;
    return key | 1;
}

/* The slot of this key, or the empty one where it belongs: multiplicative hashing (Knuth, TAOCP 3, 6.4). */
static ngram *ngram_find(const ngram_table *t, uint64_t key) {
    const size_t mask = ((size_t)1 << t->bits) - 1;
    size_t i = (size_t)((key * 0x9e3779b97f4a7c15u) >> (64 - t->bits));
    while (t->slots[i].key && t->slots[i].key != key) i = (i + 1) & mask;
    return &t->slots[i];
}

static void ngrams_grow(ngram_table *t) {
    const ngram_table old = *t;
    t->slots = NEW(ngram, (size_t)1 << ++t->bits);
    for (size_t i = 0; i < (size_t)1 << old.bits; i++)
        if (old.slots[i].key) *ngram_find(t, old.slots[i].key) = old.slots[i];
    free(old.slots);
}

/* Adds the contexts of k tokens in the test data. In the training data, counts them and their followers. */
static void ngrams_count(ngram_table *t, int k, const slam_data *d, int training) {
    for (size_t c = 0; c < d->n_chunks; c++) {
        const uint16_t *tokens = chunk_tokens(d, &d->chunks[c]);
        for (int i = k ? k : 1; i < (int)d->chunks[c].n; i++) {
            uint64_t key = ngram_key(tokens + i - k, k);
            if (2 * (t->n + 1) > (size_t)1 << t->bits) ngrams_grow(t);
            ngram *context = ngram_find(t, key), *added = context;
            if (training && !context->key) continue;
            if (training) {
                key = ngram_key(tokens + i - k, k + 1);
                added = ngram_find(t, key);
                context->count++;
                context->followers += added->key == 0;
                added->count++;
            }
            t->n += added->key == 0;
            added->key = key;
        }
    }
}

int slam_ngrams(const slam_data *train, const slam_data *test, int V, double nll[5], uint64_t *targets) {
    ngram_table orders[5];
    double sum[5] = {0};
    if (V < train->V || V < test->V)
        return set_error("n-grams of %d tokens, but the data has %d", V, V < train->V ? train->V : test->V);
    PARALLEL_FOR
    for (int k = 0; k < 5; k++) {
        orders[k].bits = 10;
        orders[k].n = 0;
        orders[k].slots = NEW(ngram, 1 << 10);
        ngrams_count(&orders[k], k, test, 0);
        ngrams_count(&orders[k], k, train, 1);
    }
    *targets = 0;
    for (size_t c = 0; c < test->n_chunks; c++) {
        const uint16_t *tokens = chunk_tokens(test, &test->chunks[c]);
        for (int i = 1; i < (int)test->chunks[c].n; i++, ++*targets) {
            double p = 1.0 / V;
            for (int k = 0; k < 5; k++) { // a context that is not in the training data leaves p as it is
                const ngram *h = k <= i ? ngram_find(&orders[k], ngram_key(tokens + i - k, k)) : NULL;
                if (h && h->count) {
                    const ngram *hw = ngram_find(&orders[k], ngram_key(tokens + i - k, k + 1));
                    p = ((double)hw->count + (double)h->followers * p) / ((double)h->count + (double)h->followers);
                }
                sum[k] -= log(p);
            }
        }
    }
    for (int k = 0; k < 5; k++) {
        nll[k] = sum[k] / (double)*targets;
        free(orders[k].slots);
    }
    return *targets > 0 || set_error("the test data has no token to predict");
}

/* ---- test sets: rows -> pairs ----
   A set comes from gold.csv or from the names of files. Either gives rows, and rows 2k and 2k + 1 in sorted order are a
   pair. */

enum { ALL_PAIRS, BY_VOCABULARY, BY_FREQUENCY, BY_LENGTH, BY_TYPE, BY_PART };
static const char *const group_names[] = {"", "vocabulary", "frequency", "length", "type", "part"};
enum { BANDS = 5 }; // of frequencies
static const char *const band_names[BANDS] = {"oov", "1-5", "6-20", "21-100", ">100"};
static const long band_starts[BANDS] = {0, 1, 5, 20, 100};
#define NONE ((size_t)-1)

struct slam_test_pair {
    size_t correct, wrong; // items
    size_t cell;           // pairs that are averaged before anything else: the same words in several voices
    double score;
};

/* A cell that counts for an accuracy, whose group, order in the group and name are the key: "%d%016ld%s". */
struct slam_test_member {
    char *key;
    size_t cell; // NONE: the accuracy is listed even if it has no cell
};
enum { MEMBER_NAME = 17 }; // where the name begins in the key

typedef struct test_row {
    const char *key[4]; // what both of a pair have: type, subtype, id, voice of gold.csv; the folder of a file
    const char *name;
    size_t item;
    int correct;
    long number;            // of the pair among those with its key
    long frequency, length; // of a word, -1: unknown
} test_row;

static int compare_keys(const test_row *x, const test_row *y, int n) {
    int differ = 0;
    for (int i = 0; !differ && i < n; i++) differ = strcmp(x->key[i], y->key[i]);
    return differ;
}

static int compare_test_rows(const void *a, const void *b) {
    const test_row *x = (const test_row *)a, *y = (const test_row *)b;
    int differ = compare_keys(x, y, 4);
    if (!differ) differ = (x->number > y->number) - (x->number < y->number);
    if (!differ) differ = y->correct - x->correct;
    return differ ? differ : strcmp(x->name, y->name);
}

static int compare_members(const void *a, const void *b) {
    const struct slam_test_member *x = (const struct slam_test_member *)a, *y = (const struct slam_test_member *)b;
    const int differ = strcmp(x->key, y->key);
    return differ ? differ : (x->cell > y->cell) - (x->cell < y->cell);
}

static void testset_add_member(slam_testset *s, int group, long order, const char *name, size_t cell) {
    const struct slam_test_member member = {string_print("%d%016ld%s", group, order, name), cell};
    s->members[s->n_members++] = member;
}

static void testset_add_word(slam_testset *s, const test_row *word, size_t cell) {
    char length[32];
    int band = -1;
    while (band + 1 < BANDS && word->frequency >= band_starts[band + 1]) band++;
    snprintf(length, sizeof length, "%ld", word->length);
    if (band >= 0) testset_add_member(s, BY_FREQUENCY, band, band_names[band], cell);
    if (band > 0) testset_add_member(s, BY_VOCABULARY, 0, "in", cell);
    if (word->length >= 0) testset_add_member(s, BY_LENGTH, word->length, length, cell);
}

/* Pairs of gold.csv with the same type, subtype and id are a cell. A word's frequency and length are those of its first
   correct row in the file. */
static int testset_pair(slam_testset *s, const char *path, test_row *rows, int is_gold) {
    const size_t n = s->items.n;
    int n_bands = 0;
    s->pairs = NEW(struct slam_test_pair, n / 2);
    s->members = NEW(struct slam_test_member, 2 * n + BANDS); // at most 4 for each cell
    if (n) qsort(rows, n, sizeof *rows, compare_test_rows);
    for (size_t i = 0, end = 0; i < n; i = end, s->n_cells++) {
        const test_row *word = &rows[i];
        for (; end < n && (end == i || (is_gold && !compare_keys(&rows[i], &rows[end], 3))); end += 2) {
            const test_row *x = &rows[end], *y = x + 1;
            if (end + 1 == n || !x->correct || y->correct || x->number != y->number || compare_keys(x, y, 4))
                return set_error("%s: '%s' has no partner: in sorted order, '%s' follows, expected pairs that differ "
                                 "in nothing but one being correct",
                                 path, x->name, end + 1 < n ? y->name : "nothing");
            const struct slam_test_pair pair = {x->item, y->item, s->n_cells, 0};
            s->pairs[s->n_pairs++] = pair;
            if (x->item < word->item) word = x;
        }
        testset_add_member(s, ALL_PAIRS, 0, "", s->n_cells);
        if (!is_gold) testset_add_member(s, BY_PART, 0, path_name(word->key[0]), s->n_cells);
        else if (s->kind == SLAM_SBLIMP) testset_add_member(s, BY_TYPE, 0, word->key[0], s->n_cells);
        else testset_add_word(s, word, s->n_cells);
        if (word->frequency >= 0) n_bands = BANDS;
    }
    for (int band = 0; band < n_bands; band++) testset_add_member(s, BY_FREQUENCY, band, band_names[band], NONE);
    qsort(s->members, s->n_members, sizeof *s->members, compare_members);
    return 1;
}

/* ---- test sets: gold.csv -> rows ---- */

enum { FILENAME, CORRECT, ID, VOICE, TYPE, SUBTYPE, FREQUENCY = TYPE, LENGTH = SUBTYPE, N_GOLD };
static const char *const gold_names[][N_GOLD] = {{"filename", "correct", "id", "voice", "frequency", "length"},
                                                 {"filename", "correct", "id", "voice", "type", "subtype"}};

/* A whole number, also spelled 12.0. -1: empty, -2: something else. */
static long whole_number(const char *text) {
    const size_t n = strspn(text, "0123456789"), zeros = text[n] == '.' ? 1 + strspn(text + n + 1, "0") : 0;
    if (!*text) return -1;
    return n > 0 && n <= 15 && !text[n + zeros] ? atol(text) : -2;
}

/* The official scorer drops rows that have an empty key, and pairs the k-th correct row of sBLIMP's file with its k-th
   wrong one, whatever they are. Here both are errors where they would change a result. */
static int testset_read_gold(slam_testset *s, const char *path) {
    const int sblimp = s->kind == SLAM_SBLIMP;
    const char *const *names = gold_names[sblimp], *cell[N_GOLD];
    size_t column[N_GOLD];
    long number[N_GOLD], order[2] = {0, 0};
    csv table;
    if (!csv_read(&table, path)) return 0;
    test_row *rows = NEW(test_row, table.rows);
    int ok = 1;
    for (int k = 0; ok && k < N_GOLD; k++) {
        column[k] = csv_column(&table, names[k]);
        if (column[k] == NONE && (sblimp || k < FREQUENCY)) ok = set_error("%s: has no column '%s'", path, names[k]);
    }
    if (ok && column[FREQUENCY] == column[LENGTH] && csv_column(&table, "subtype") != NONE)
        ok = set_error("%s: has sBLIMP's columns 'type' and 'subtype', expected 'frequency', 'length'", path);
    for (size_t i = 1; ok && i < table.rows; i++) {
        for (int k = 0; ok && k < N_GOLD; k++) {
            const char *expected = NULL;
            cell[k] = column[k] == NONE ? "" : table.cells[i * table.cols + column[k]];
            number[k] = whole_number(cell[k]);
            if (k == CORRECT && number[k] != 0 && number[k] != 1) expected = "1 or 0";
            if ((k < FREQUENCY ? k != VOICE : sblimp) && !*cell[k]) expected = "a name";
            if (k >= FREQUENCY && !sblimp && number[CORRECT] && number[k] == -2) expected = "a whole number";
            if (expected)
                ok = set_error("%s:%zu: '%s' is '%.40s', expected %s", path, table.lines[i], names[k], cell[k],
                               expected);
        }
        if (!ok) break;
        const int correct = (int)number[CORRECT];
        const char *file = cell[FILENAME], *id = cell[ID], *voice = cell[VOICE];
        const test_row word = {{"", "", id, voice}, file, i - 1, correct, 0, number[FREQUENCY], number[LENGTH]};
        const test_row phrase = {
            {cell[TYPE], cell[SUBTYPE], id, voice}, file, i - 1, correct, order[correct]++, -1, -1};
        slam_strings_add(&s->items, file);
        rows[i - 1] = sblimp ? phrase : word;
    }
    ok = ok && testset_pair(s, path, rows, 1);
    csv_free(&table);
    free(rows);
    return ok;
}

/* PATH, PATH/gold.csv or PATH/lexical/dev/gold.csv; NULL: none of these. */
static char *find_gold(int kind, const char *path, const char *split) {
    const char *task = kind == SLAM_SWUGGY ? "lexical" : "syntactic";
    char *const places[] = {string_copy(path), string_print("%s/gold.csv", path),
                            string_print("%s/%s/%s/gold.csv", path, task, split)};
    char *gold = NULL;
    for (int i = 0; i < 3; i++) {
        if (!gold && path_is_file(places[i]) && string_ends(places[i], ".csv")) gold = places[i];
        else free(places[i]);
    }
    return gold;
}

/* ---- test sets: names of files -> rows ----
   SlamKit's NUMBER_name, of sBLIMP NUMBER+name: in each folder by number, the correct one first. SALMon's
   PART/sample_NUMBER_0 is correct, sample_NUMBER_1 wrong. */

/* The items: the audio files of a folder, else the lines of a file of units. */
static int testset_list_files(slam_testset *s, const char *path) {
    units_reader r;
    slam_units u = ZERO;
    slam_inputs in = ZERO;
    int status;
    if (path ? !path_is_folder(path) : !s->units)
        return set_error("%s: expected a folder of audio files, or units", path ? path : "no PATH");
    const int found = path && inputs_add_audio(&in, path, NULL);
    s->items = in.paths;
    if (found) return 1;
    if (!s->units || !units_open(&r, s->units)) return 0;
    slam_strings_free(&s->items);
    while ((status = units_next(&r, &u)) > 0) slam_strings_add(&s->items, u.name);
    slam_units_free(&u);
    units_close(&r);
    return status == 0 && (s->items.n > 0 || set_error("%s: is empty, expected lines of units", s->units));
}

/* Sets `correct` and the number of the pair in sorted rows of files NUMBER_name. A folder has either two files of each
   number or one of each, without a gap. */
static void number_pairs(test_row *rows, size_t n) {
    long first = 0;
    int twins = 0;
    for (test_row *x = rows; x < rows + n; x++) {
        const int begins = x == rows || compare_keys(x, x - 1, 1);
        if (begins) {
            first = x->number;
            twins = x + 1 < rows + n && !compare_keys(x, x + 1, 1) && x[1].number == first;
        }
        x->correct = twins ? begins || x->number != x[-1].number : (x->number - first) % 2 == 0;
        if (!twins) x->number = (x->number - first) / 2;
    }
}

static int testset_read_files(slam_testset *s, const char *path) {
    static const char *const names[][2] = {{"%9ld_%n", "NUMBER_..., or gold.csv with it"},
                                           {"%9ld+%n", "NUMBER+..., or gold.csv with it"},
                                           {"%9ld_%n", "NUMBER_..."},
                                           {"sample_%9ld_%n", "sample_NUMBER_0 or sample_NUMBER_1"}};
    const int salmon = s->kind == SLAM_SALMON;
    slam_strings folders = ZERO;
    int ok = testset_list_files(s, path);
    const size_t n = s->items.n;
    test_row *rows = NEW(test_row, n);
    for (size_t i = 0; ok && i < n; i++) {
        const char *file = s->items.at[i], *name = path_name(file);
        int end = 0;
        slam_strings_add(&folders, file);
        folders.at[i][name > file ? name - file - 1 : 0] = 0;
        const test_row row = {{folders.at[i], "", "", ""}, file, i, 1, 0, -1, -1};
        rows[i] = row;
        ok = sscanf(name, names[s->kind][0], &rows[i].number, &end) == 1 && end > 0;
        if (salmon) {
            ok = ok && (name[end] == '0' || name[end] == '1') && (!name[end + 1] || name[end + 1] == '.');
            rows[i].correct = name[end] == '0';
        }
        if (!ok) set_error("%s: expected a name %s", file, names[s->kind][1]);
    }
    if (ok && !salmon) {
        qsort(rows, n, sizeof *rows, compare_test_rows);
        number_pairs(rows, n);
    }
    ok = ok && testset_pair(s, path ? path : s->units, rows, 0);
    slam_strings_free(&folders);
    free(rows);
    return ok;
}

/* ---- test sets: opening, audio, units ---- */

/* A hash of the last `depth` names of an item's path, without an extension. */
struct slam_test_name {
    uint64_t hash; // first, for compare_u64
    size_t item;
};

static struct slam_test_name item_name(const char *path, size_t depth, size_t item) {
    const char *last = path_name(path), *dot = strrchr(last, '.');
    const char *end = dot && dot > last ? dot : last + strlen(last), *at = end;
    while (at > path && (at[-1] != '/' || --depth > 0)) at--;
    const struct slam_test_name name = {hash_bytes(HASH_START, at, (size_t)(end - at)), item};
    return name;
}

/* Sorts the items by the last `depth` names of their paths, the fewest by which all differ. */
static int testset_sort_names(slam_testset *s, const char *path) {
    const char *twice = "";
    s->names = NEW(struct slam_test_name, s->items.n);
    while (twice && s->depth++ < 9) {
        twice = NULL;
        for (size_t i = 0; i < s->items.n; i++) s->names[i] = item_name(s->items.at[i], s->depth, i);
        qsort(s->names, s->items.n, sizeof *s->names, compare_u64);
        for (size_t i = 1; i < s->items.n; i++)
            if (s->names[i].hash == s->names[i - 1].hash) twice = s->items.at[s->names[i].item];
    }
    return !twice || set_error("%s: two sequences have the name '%s'", path, twice);
}

void slam_testset_free(slam_testset *s) {
    if (!s) return;
    for (size_t i = 0; i < s->n_members; i++) free(s->members[i].key);
    slam_strings_free(&s->items);
    free(s->folder);
    free(s->units);
    free(s->scores);
    free(s->accuracies);
    free(s->pairs);
    free(s->members);
    free(s->names);
    free(s);
}

slam_testset *slam_testset_open(int kind, const char *path, const char *split, int audio, const char *units) {
    slam_testset *s = NEW(slam_testset, 1);
    char *gold = path && kind <= SLAM_SBLIMP ? find_gold(kind, path, split ? split : "dev") : NULL;
    char *end = string_print("/%s/gold.csv", split ? split : "");
    const char *where = gold ? gold : path ? path : "units";
    s->kind = kind;
    s->folder = string_copy_n(where, gold ? (size_t)(path_name(gold) - gold) : 0);
    const slam_path beside = path_join(gold ? s->folder : where, "units.jsonl");
    if (units || (path && !audio && path_is_file(beside.at))) s->units = string_copy(units ? units : beside.at);
    const int ok = (!split || (gold && string_ends(gold, end)) ||
                    set_error("%s: is not split %s, expected the folder with lexical/ and syntactic/", where, split)) &&
                   (gold ? testset_read_gold(s, gold) : testset_read_files(s, path)) && testset_sort_names(s, where);
    free(gold);
    free(end);
    if (ok) return s;
    slam_testset_free(s);
    return NULL;
}

int slam_testset_audio(const slam_testset *s, slam_strings *paths) {
    static const char *const extensions[] = {"", ".wav", ".flac", ".ogg", ".mp3"};
    for (size_t i = 0; i < s->items.n; i++) {
        const size_t before = paths->n;
        for (size_t k = 0; paths->n == before && k < sizeof extensions / sizeof *extensions; k++) {
            slam_path path;
            snprintf(path.at, sizeof path.at, "%s%s%s", s->folder, s->items.at[i], extensions[k]);
            if (path_is_file(path.at)) slam_strings_add(paths, path.at);
        }
        if (paths->n == before)
            return set_error("%s%s: no such file, also not with .wav, .flac, ...", s->folder, s->items.at[i]);
    }
    return 1;
}

int slam_testset_read_units(const slam_testset *s, int n_units, slam_units *list) {
    units_reader r;
    slam_units u = ZERO;
    int status = 0, ok = 1;
    if (!units_open(&r, s->units)) return 0;
    while (ok && (status = units_next(&r, &u)) > 0) {
        const struct slam_test_name key = item_name(u.name, s->depth, 0);
        const struct slam_test_name *name =
            (const struct slam_test_name *)bsearch(&key, s->names, s->items.n, sizeof *s->names, compare_u64);
        if (!name) continue;
        slam_units *item = &list[name->item];
        if (item->unit) ok = set_error("%s: an earlier line has the name '%s'", r.what, u.name);
        else if ((ok = units_check(u.unit, u.n, n_units + FIRST_UNIT, r.what)) != 0) {
            item->n = u.n;
            item->unit = u.unit;
            u.unit = NULL;
        }
    }
    ok = ok && status == 0;
    for (size_t i = 0; ok && i < s->items.n; i++)
        if (!list[i].unit) ok = set_error("%s: has no line with the name '%s'", s->units, s->items.at[i]);
    slam_units_free(&u);
    units_close(&r);
    return ok;
}

/* ---- test sets: accuracies ---- */

void slam_testset_score(slam_testset *s, const double *scores) {
    double *mean = NEW(double, s->n_cells), *n = NEW(double, s->n_cells);
    char text[32];
    if (!s->scores) s->scores = NEW(double, s->items.n);
    if (!s->accuracies) s->accuracies = NEW(slam_accuracy, s->n_members);
    for (size_t i = 0; i < s->items.n; i++) {
        snprintf(text, sizeof text, "%.9g", scores[i]);
        s->scores[i] = strtod(text, NULL);
    }
    for (struct slam_test_pair *p = s->pairs; p < s->pairs + s->n_pairs; p++) {
        const double correct = s->scores[p->correct], wrong = s->scores[p->wrong];
        p->score = correct > wrong ? 1 : correct == wrong ? 0.5 : 0;
        mean[p->cell] += p->score;
        n[p->cell]++;
    }
    for (size_t i = 0; i < s->n_cells; i++) mean[i] /= n[i];
    s->n_accuracies = 0;
    for (size_t i = 0, end = 0; i < s->n_members; i = end) {
        const struct slam_test_member *m = &s->members[i];
        slam_accuracy a = {group_names[*m->key - '0'], m->key + MEMBER_NAME, 0, 0, 0};
        for (; end < s->n_members && !strcmp(s->members[end].key, m->key); end++) a.n += s->members[end].cell != NONE;
        for (size_t k = 0; k < a.n; k++) a.mean += mean[m[k].cell];
        a.mean = a.n ? a.mean / (double)a.n : NAN;
        for (size_t k = 0; k < a.n; k++) a.deviation += pow(mean[m[k].cell] - a.mean, 2);
        a.deviation = a.n > 1 ? sqrt(a.deviation / (double)(a.n - 1)) : NAN;
        const int is_part = *m->key - '0' == BY_PART; // listed if there are several
        if (!is_part || a.n < s->n_cells || s->kind == SLAM_SALMON) s->accuracies[s->n_accuracies++] = a;
    }
    free(mean);
    free(n);
}

int slam_testset_submission(const slam_testset *s, const char *path) {
    strbuf out = ZERO;
    int ok = 1;
    for (size_t i = 0; ok && i < s->items.n; i++) {
        const char *name = s->items.at[i];
        if (strpbrk(name, " \t\r\n\"")) ok = set_error("%s: the name '%s' has spaces or quotes", path, name);
        strbuf_add(&out, "%s ", name);
        strbuf_add_number(&out, s->scores[i]);
        strbuf_add(&out, "\n");
    }
    ok = ok && file_write(path, out.at, out.n);
    strbuf_free(&out);
    return ok;
}

/* `before` and a string. */
static void strbuf_add_name(strbuf *out, const char *before, const char *name) {
    strbuf_add(out, "%s", before);
    strbuf_add_json(out, name);
}

static void strbuf_add_metrics(strbuf *out, const char *prefix, const slam_metric *m, int n) {
    for (int i = 0; i < n; i++) {
        strbuf_add(out, ", \"%s%s\": ", prefix, m[i].name);
        strbuf_add_number(out, m[i].value);
    }
}

static void strbuf_add_accuracy(strbuf *out, const slam_accuracy *a) {
    const double half = 1.96 * a->deviation / sqrt((double)a->n); // of the 95 % interval
    const slam_metric m[] = {
        {"accuracy", a->mean}, {"std", a->deviation}, {"low", a->mean - half}, {"high", a->mean + half}};
    strbuf_add(out, ", \"n\": %zu", a->n);
    strbuf_add_metrics(out, "", m, 4);
}

/* {"task", "of", accuracy, "by_GROUP": [{"GROUP": name, accuracy}, ...], "pairs": [...], "scores": [...]} */
int slam_testset_write(const slam_testset *s, const char *task, int sum, const char *path) {
    const slam_accuracy *a = s->accuracies;
    strbuf out = ZERO;
    strbuf_add(&out, "{\"task\": \"%s\", \"of\": \"%s\"", task, sum ? "sum" : "mean");
    strbuf_add_accuracy(&out, a);
    for (size_t i = 1; i < s->n_accuracies; i++) {
        if (!strcmp(a[i].group, a[i - 1].group)) strbuf_add(&out, ", {\"%s\": ", a[i].group);
        else strbuf_add(&out, "%s, \"by_%s\": [{\"%s\": ", i > 1 ? "]" : "", a[i].group, a[i].group);
        strbuf_add_json(&out, a[i].name);
        strbuf_add_accuracy(&out, &a[i]);
        strbuf_add(&out, "}");
    }
    strbuf_add(&out, "%s, \"pairs\": [\n", s->n_accuracies > 1 ? "]" : "");
    for (size_t i = 0; i < s->n_pairs; i++) {
        strbuf_add_name(&out, i ? ",\n{\"right\": " : "{\"right\": ", s->items.at[s->pairs[i].correct]);
        strbuf_add_name(&out, ", \"wrong\": ", s->items.at[s->pairs[i].wrong]);
        strbuf_add(&out, ", \"score\": ");
        strbuf_add_number(&out, s->pairs[i].score);
        strbuf_add(&out, "}");
    }
    for (size_t i = 0; i < s->items.n; i++) {
        strbuf_add_name(&out, i ? "},\n{\"name\": " : "], \"scores\": [\n{\"name\": ", s->items.at[i]);
        strbuf_add(&out, ", \"score\": ");
        strbuf_add_number(&out, s->scores[i]);
    }
    strbuf_add(&out, "}]}\n");
    const int ok = file_write(path, out.at, out.n);
    strbuf_free(&out);
    return ok;
}

int slam_metrics_write(const char *task, const slam_metric *m, int n, const char *path) {
    strbuf out = ZERO;
    strbuf_add(&out, "{\"task\": \"%s\"", task);
    strbuf_add_metrics(&out, "", m, n);
    strbuf_add(&out, "}\n");
    const int ok = file_write(path, out.at, out.n);
    strbuf_free(&out);
    return ok;
}

/* Whether a file can be created at this path and written: tries it with another one in the same folder. */
static int path_writable(const char *path) {
    const int n = (int)(path_name(path) - path);
    char *folder = string_print("%.*s", n ? n : 1, n ? path : "."), *other = string_print("%s/.slam-XXXXXX", folder);
    const int fd = mkstemp(other), ok = fd >= 0 && write(fd, "", 1) == 1 && fd_sync(fd);
    if (!ok) set_error("%s: cannot be written: %s: %s", path, folder, strerror(errno));
    if (fd >= 0) unlink(other);
    if (fd >= 0) close(fd);
    free(folder);
    free(other);
    return ok;
}

int slam_output_check(const char *path) {
    struct stat s;
    if (string_ends(path, "/")) return folder_create(path) && path_writable(path);
    if (path_is_folder(path)) return set_error("%s: is a folder, expected a file", path);
    if (!path_is_direct(path)) return path_writable(path);
    const int device = stat(path, &s) == 0 && S_ISCHR(s.st_mode); // a write shows whether it is full
    const int fd = device ? open(path, O_WRONLY | O_NOCTTY | O_CLOEXEC) : -1;
    const int ok = device ? fd >= 0 && (isatty(fd) || write(fd, "\n", 1) == 1) : access(path, W_OK) == 0;
    if (!ok) set_error("%s: cannot be written: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

/* ---- prompts ---- */

void slam_prompts_free(slam_prompts *p) {
    for (size_t i = 0; i < p->n; i++) {
        free(p->at[i].name);
        free(p->at[i].tokens);
        free(p->at[i].durations);
        free(p->at[i].continuation);
    }
    free(p->at);
    memset(p, 0, sizeof *p);
}

/* Without durations there are 18 units per second: about what is left of 25 frames. */
void slam_prompts_add(slam_prompts *p, const char *name, const int *units, const int *duration, size_t n) {
    double frames = 0;
    size_t length = p->max_units && p->max_units < n ? p->max_units : n;
    if (!p->max_units && p->max_seconds > 0) {
        p->guessed += !duration;
        for (length = 0; length < n && frames < p->max_seconds * p->rate; length++)
            frames += duration ? duration[length] : p->rate / 18.0;
    }
    GROW(slam_prompt, p->at, p->capacity, p->n + 1);
    slam_prompt *q = &p->at[p->n++];
    memset(q, 0, sizeof *q);
    q->name = string_copy(name);
    q->n = (int)length + 1;
    q->tokens = NEW(int, length + 1);
    q->tokens[0] = DOCUMENT_TOKEN;
    q->durations = NEW(int, length + 1);
    for (size_t i = 0; i < length; i++) q->tokens[i + 1] = (int)((unsigned)units[i] + FIRST_UNIT);
    if (duration) memcpy(q->durations + 1, duration, length * sizeof *duration);
}

int slam_prompts_add_lines(slam_prompts *p, const char *path) {
    units_reader r;
    slam_units u = ZERO;
    int status;
    if (!units_open(&r, path)) return 0;
    while ((status = units_next(&r, &u)) > 0) slam_prompts_add(p, *u.name ? u.name : r.what, u.unit, u.duration, u.n);
    slam_units_free(&u);
    units_close(&r);
    return status == 0;
}

void slam_prompts_add_data(slam_prompts *p, const slam_data *d) {
    int *unit = NEW(int, d->context);
    for (size_t i = 0; i < d->n_chunks; i++) {
        const uint16_t *tokens = chunk_tokens(d, &d->chunks[i]);
        size_t n = 0;
        if (tokens[0] != DOCUMENT_TOKEN) continue; // not the first chunk of its document
        for (; n + 1 < d->chunks[i].n && tokens[n + 1] != DOCUMENT_TOKEN; n++) unit[n] = tokens[n + 1] - FIRST_UNIT;
        char *name = string_print("%s:%zu", d->files[d->chunks[i].file].path, i + 1);
        slam_prompts_add(p, name, unit, NULL, n);
        free(name);
    }
    free(unit);
}

static void strbuf_add_tokens(strbuf *out, const char *before, const int *tokens, int n) {
    strbuf_add(out, "%s[", before);
    for (int i = 0; i < n; i++) strbuf_add(out, i ? ", %d" : "%d", tokens[i] - FIRST_UNIT);
    strbuf_add(out, "]");
}

int slam_prompts_write(const slam_prompts *p, const char *path) {
    strbuf out = ZERO;
    for (size_t i = 0; i < p->n; i++) {
        const slam_prompt *q = &p->at[i];
        if (!q->continuation) continue;
        strbuf_add_name(&out, "{\"file_name\": ", q->name);
        strbuf_add_tokens(&out, ", \"prompt\": ", q->tokens + 1, q->n - 1);
        strbuf_add_tokens(&out, ", \"units\": ", q->continuation, q->length);
        strbuf_add(&out, "}\n");
    }
    const int ok = file_write(path, out.at, out.n);
    strbuf_free(&out);
    return ok;
}

double slam_unit_auto_bleu(const int *units, size_t n, int order) {
    uint64_t *words = NEW(uint64_t, n);
    for (size_t i = 0; i < n; i++) words[i] = (uint64_t)units[i];
    const double share = repeated_share(words, n, order);
    free(words);
    return share;
}

/* ---- generation ----
   A sequence has a slot of the decoder, which the next prompt gets when it ends. */

typedef struct generator {
    const slam_generation *how;
    slam_decoder *decoder;
    slam_prompt **prompts; // (n) without a continuation
    size_t n, next, size;  // this rank's prompts: `next` is the one to start, then every size-th
    slam_prompt **slots;   // (n_slots) NULL: a free slot
    int V, n_slots, n_free;
    float *logits;       // (n_slots,V)
    unsigned char *seen; // (n_slots,V) for slam_sample
    double n_drawn;      // tokens so far
    double n_unused;     // tokens that sequences would have had if they had not ended before max_new
} generator;

static int compare_prompts(const void *a, const void *b) {
    const slam_prompt *x = *(slam_prompt *const *)a, *y = *(slam_prompt *const *)b;
    if (x->n != y->n) return x->n < y->n ? 1 : -1; // the longest first: little is left to wait for at the end
    const int differ = memcmp(x->tokens, y->tokens, (size_t)x->n * sizeof *x->tokens);
    return differ ? differ : (x > y) - (x < y);
}

static int generation_check(const slam_generation *how, const slam_config *c) {
    if (how->max_new < 1) return set_error("%d new tokens, expected at least 1", how->max_new);
    if (how->batch < 1) return set_error("a batch of %d sequences, expected at least 1", how->batch);
    if (how->context > c->T) return set_error("a context of %d tokens, the model has %d positions", how->context, c->T);
    if (how->max_new >= how->context)
        return set_error("%d new tokens in a context of %d leave no space for a prompt", how->max_new, how->context);
    return sampling_check(&how->sampling);
}

/* Truncates the prompts to the context, sorts them, chooses their random streams and lists those without a
   continuation. */
static int generator_open(generator *g, slam_model *m, slam_prompts *p) {
    const slam_comm *comm = m->ops->comm;
    const int most = g->how->context - g->how->max_new;
    uint64_t hash = 0, equal = 0;
    g->V = m->config.V;
    g->prompts = NEW(slam_prompt *, p->n);
    for (size_t i = 0; i < p->n; i++) {
        slam_prompt *q = g->prompts[i] = &p->at[i];
        const int cut = q->n > most ? q->n - most : 0;
        for (int t = 1; t < q->n; t++)
            if (q->tokens[t] < FIRST_UNIT || q->tokens[t] >= g->V)
                return set_error("%s: unit %d is %d, expected below %d (the model's vocabulary is %d)", q->name, t,
                                 (int)((unsigned)q->tokens[t] - FIRST_UNIT), g->V - FIRST_UNIT, g->V);
        q->n -= cut;
        q->truncated += cut;
        memmove(q->tokens + 1, q->tokens + 1 + cut, (size_t)(q->n - 1) * sizeof *q->tokens);
        memmove(q->durations + 1, q->durations + 1 + cut, (size_t)(q->n - 1) * sizeof *q->durations);
    }
    if (p->n) qsort(g->prompts, p->n, sizeof *g->prompts, compare_prompts);
    for (size_t i = 0; i < p->n; i++) {
        slam_prompt *q = g->prompts[i];
        const uint64_t before = hash;
        hash = hash_bytes(HASH_START, q->tokens, (size_t)q->n * sizeof *q->tokens);
        equal = hash == before ? equal + 1 : 0;
        q->rng = rng_stream(g->how->seed, hash, equal);
        if (!q->continuation) g->prompts[g->n++] = q;
    }
    g->next = comm ? (size_t)comm->rank : 0;
    g->size = comm ? (size_t)comm->size : 1;
    if (g->next >= g->n) return 1;
    const size_t own = (g->n - 1 - g->next) / g->size + 1;
    g->n_slots = g->n_free = (size_t)g->how->batch < own ? g->how->batch : (int)own;
    g->slots = NEW(slam_prompt *, g->n_slots);
    g->logits = NEW(float, (size_t)g->n_slots * g->V);
    g->seen = NEW(unsigned char, (size_t)g->n_slots * g->V);
    return (g->decoder = slam_decoder_new(m, g->n_slots, g->prompts[0]->n + g->how->max_new)) != NULL;
}

/* Starts prompts in the free slots. */
static int generator_start(generator *g) {
    int n = 0, *slots = NEW(int, g->n_free), *lengths = NEW(int, g->n_free);
    const int **tokens = NEW(const int *, g->n_free);
    for (int i = 0; i < g->n_slots && g->next < g->n; i++) {
        if (g->slots[i]) continue;
        slam_prompt *q = g->slots[i] = g->prompts[g->next];
        g->next += g->size;
        q->continuation = NEW(int, g->how->max_new);
        q->length = 0;
        slots[n] = i;
        tokens[n] = q->tokens;
        lengths[n++] = q->n;
    }
    g->n_free -= n;
    const int ok = slam_decoder_start(g->decoder, n, slots, tokens, lengths);
    free(slots);
    free(lengths);
    free(tokens);
    return ok;
}

/* The next token of a sequence; -1: the logits are not finite. */
static int generator_draw(const generator *g, int slot) {
    const int penalty = g->how->sampling.repetition_penalty != 1;
    slam_prompt *q = g->slots[slot];
    float *logits = g->logits + (size_t)slot * g->V;
    unsigned char *seen = g->seen + (size_t)slot * g->V;
    for (int v = 0; v < g->V; v++)
        if (!isfinite(logits[v])) return -1;
    memset(seen, 0, (size_t)g->V);
    for (int t = 0; t < q->n; t++) seen[q->tokens[t]] = 1;
    for (int t = 0; t < q->length; t++) seen[q->continuation[t]] = 1;
    return slam_sample(logits, g->V, penalty ? seen : NULL, &g->how->sampling, rng_uniform(&q->rng));
}

static int generator_busy(const generator *g) { return g->next < g->n || g->n_free < g->n_slots; }

/* One more token for each sequence. Starting one sequence costs as much as a step of all, so that a few free slots are
   waited for. */
static int generator_step(generator *g) {
    if (g->next < g->n && g->n_free > g->n_slots / 8 && !generator_start(g)) return 0;
    if (!slam_decoder_logits(g->decoder, g->logits)) return 0;
    PARALLEL_FOR
    for (int i = 0; i < g->n_slots; i++)
        if (g->slots[i]) g->slots[i]->continuation[g->slots[i]->length] = generator_draw(g, i);
    for (int i = 0; i < g->n_slots; i++) {
        slam_prompt *q = g->slots[i];
        if (!q) continue;
        const int token = q->continuation[q->length];
        if (token < 0) return set_error("%s: the model's logits are not finite", q->name);
        q->ended = token == DOCUMENT_TOKEN;
        q->length += !q->ended;
        const int done = q->ended || q->length == g->how->max_new;
        slam_decoder_append(g->decoder, i, done ? -1 : token);
        g->n_drawn++;
        if (!done) continue;
        g->n_unused += g->how->max_new - q->length - q->ended;
        g->slots[i] = NULL;
        g->n_free++;
    }
    return 1;
}

/* Gives every rank the continuations of all: sums over the ranks, of which at most one has the continuation. */
static int generator_exchange(const generator *g, slam_comm *comm) {
    const int n = g->how->max_new + 2;
    double *sum = NEW(double, n); // 1 + length, ended, tokens; zeros: there is no continuation
    for (size_t i = 0; g->size > 1 && i < g->n; i++) {
        slam_prompt *q = g->prompts[i];
        memset(sum, 0, (size_t)n * sizeof *sum);
        if (q->continuation) {
            sum[0] = 1 + q->length;
            sum[1] = q->ended;
            for (int t = 0; t < q->length; t++) sum[2 + t] = q->continuation[t];
        }
        slam_comm_sum(comm, sum, (size_t)n);
        if (sum[0] == 0) continue;
        if (!q->continuation) q->continuation = NEW(int, g->how->max_new);
        q->length = (int)sum[0] - 1;
        q->ended = (int)sum[1];
        for (int t = 0; t < q->length; t++) q->continuation[t] = (int)sum[2 + t];
    }
    free(sum);
    return slam_all_ok(comm, 1);
}

int slam_generate(slam_model *m, const slam_generation *how, slam_prompts *p, slam_progress_fn *progress,
                  void *context) {
    slam_comm *comm = m->ops->comm;
    const int steps = comm && comm->size > 1 ? 16 : 1; // between reports, which the ranks make together
    generator g = ZERO;
    g.how = how;
    int ok = slam_all_ok(comm, generation_check(how, &m->config) && generator_open(&g, m, p)), stop = g.n == 0;
    while (ok && !stop) {
        for (int i = 0; ok && i < steps && generator_busy(&g); i++) ok = generator_step(&g);
        if (!(ok = slam_all_ok(comm, ok))) break;
        double sums[] = {(double)generator_busy(&g), g.n_drawn, g.n_unused};
        slam_comm_sum(comm, sums, 3);
        stop = !report_progress(progress, context, "generate", sums[1], (double)g.n * how->max_new - sums[2]);
        stop = sums[0] == 0 || slam_comm_max(comm, stop) > 0; // a signal may have reached one rank only
    }
    for (int i = 0; i < g.n_slots; i++) {
        if (!g.slots[i]) continue; // else it was stopped
        free(g.slots[i]->continuation);
        g.slots[i]->continuation = NULL;
    }
    ok = ok && generator_exchange(&g, comm);
    slam_decoder_free(g.decoder);
    free(g.prompts);
    free(g.slots);
    free(g.logits);
    free(g.seen);
    return ok;
}

/* ==========================================================================================
   SECTION 14. CHECKPOINTS
   A checkpoint is written to a temporary folder, synced and renamed: a folder with its final name
   is complete, whenever the program was killed. Links are replaced by renaming, too.
   ========================================================================================== */

static int is_root(const slam_comm *comm) { return !comm || comm->rank == 0; }

/* ---- trainer.json ---- */

static const field trainer_fields[] = {
    {"units", FIELD_HEX, offsetof(slam_trainer, units), 0, 0, 1},
    {"step", FIELD_LONG, offsetof(slam_trainer, step), 0, 9e15, 1},
    {"steps", FIELD_LONG, offsetof(slam_trainer, steps), 1, 9e15, 1},
    {"tokens", FIELD_U64, offsetof(slam_trainer, tokens), 0, 9e15, 1},
    {"epoch", FIELD_U64, offsetof(slam_trainer, epoch), 0, 9e15, 1},
    {"row", FIELD_U64, offsetof(slam_trainer, row), 0, 9e15, 1},
    {"skipped", FIELD_LONG, offsetof(slam_trainer, skipped), 0, 9e15, 1},
    {"seconds", FIELD_REAL, offsetof(slam_trainer, seconds), 0, 1e12, 1},
    {"best_val_loss", FIELD_REAL, offsetof(slam_trainer, best_loss), -1e300, 1e300, 0},
    {"best_step", FIELD_LONG, offsetof(slam_trainer, best_step), 0, 9e15, 1},
    {"data", FIELD_HEX, offsetof(slam_trainer, data), 0, 0, 1},
    {"log_bytes", FIELD_U64, offsetof(slam_trainer, log_bytes), 0, 9e15, 1},
};
enum { N_TRAINER_FIELDS = sizeof trainer_fields / sizeof *trainer_fields };

static char **setting_find(const slam_trainer *t, const char *name, size_t i) {
    const size_t n = strlen(name);
    for (char **item = t->settings.at; item < t->settings.at + t->settings.n; item++)
        if (!strncmp(*item, name, n) && (*item)[n] == '=' && i-- == 0) return item;
    return NULL;
}

const char *slam_trainer_setting(const slam_trainer *t, const char *name, size_t i) {
    char **item = setting_find(t, name, i);
    return item ? *item + strlen(name) + 1 : NULL;
}

void slam_trainer_set(slam_trainer *t, const char *name, size_t i, const char *value) {
    char **item = setting_find(t, name, i), *text = string_print("%s=%s", name, value);
    if (!item) slam_strings_add(&t->settings, "");
    if (!item) item = &t->settings.at[t->settings.n - 1];
    free(*item);
    *item = text;
}

static int trainer_save(const slam_trainer *t, const char *folder) {
    const slam_strings *settings = &t->settings;
    strbuf s = ZERO;
    strbuf_add(&s, "{\n  \"slam\": \"%s\",\n", SLAM_VERSION);
    fields_write(&s, trainer_fields, N_TRAINER_FIELDS, t, "  ");
    s.n--; // the line break
    strbuf_add(&s, ",\n  \"settings\": {");
    for (size_t i = 0, list = 0; i < settings->n; i++) { // neighbours of the same name are the items of a list
        const char *item = settings->at[i];
        const size_t n = strcspn(item, "=") + 1, more = i + 1 < settings->n && !strncmp(settings->at[i + 1], item, n);
        if (!list) strbuf_add(&s, "%s\n    \"%.*s\": %s", i ? "," : "", (int)n - 1, item, more ? "[" : "");
        strbuf_add_json(&s, item + n);
        strbuf_add(&s, more ? ", " : list ? "]" : "");
        list = more;
    }
    strbuf_add(&s, "\n  }\n}\n");
    const int ok = file_write(path_join(folder, "trainer.json").at, s.at, s.n);
    strbuf_free(&s);
    return ok;
}

static int trainer_from_json(slam_trainer *t, const json *root, const char *path) {
    const json *settings = json_get(root, "settings");
    if (!json_get(root, "log_bytes"))
        return set_error("%s: is a run of slam %s, which cannot be resumed; --init starts a new run from its model",
                         path, json_string(root, "slam", "?"));
    if (!fields_read(root, trainer_fields, N_TRAINER_FIELDS, t, path)) return 0;
    if (t->steps < t->step)
        return set_error("%s: 'step' is %ld, expected at most 'steps', %ld", path, t->step, t->steps);
    if (!settings || settings->type != JSON_OBJECT)
        return set_error("%s: 'settings' is missing or not an object", path);
    for (const json *j = settings->first; j; j = j->next) {
        const json *item = j->type == JSON_ARRAY ? j->first : j;
        for (size_t i = 0; item; i++, item = item == j ? NULL : item->next) {
            if (item->type != JSON_STRING)
                return set_error("%s: setting '%s' is neither a string nor a list of strings", path, j->key);
            slam_trainer_set(t, j->key, i, item->string);
        }
    }
    return 1;
}

int slam_trainer_load(slam_trainer *t, const char *folder) {
    const slam_path path = path_join(folder, "trainer.json");
    json *root = json_load(path.at);
    memset(t, 0, sizeof *t);
    const int ok = root && trainer_from_json(t, root, path.at);
    if (!ok) slam_trainer_free(t);
    json_free(root);
    return ok;
}

void slam_trainer_free(slam_trainer *t) {
    slam_strings_free(&t->settings);
    memset(t, 0, sizeof *t);
}

void slam_trainer_paths(const slam_trainer *t, const char *name, slam_strings *paths) {
    const char *folder = slam_trainer_setting(t, "folder", 0), *given;
    for (size_t i = 0; (given = slam_trainer_setting(t, name, i)) != NULL; i++) {
        const slam_path there = path_join(folder ? folder : "", given);
        const int as_given = *given == '/' || !folder || (path_is_file(given) && !path_is_file(there.at));
        slam_strings_add(paths, as_given ? given : there.at);
    }
}

/* ---- optimizer.safetensors: NAME.m and NAME.v of each tensor, and in the metadata the number of updates ---- */

static const char *const moment_suffixes[] = {".m", ".v"};

/* Collective. */
static int optimiser_save(slam_adamw *opt, const char *folder) {
    slam_comm *comm = opt->model->ops->comm;
    const size_t n = opt->model->n_weights;
    float *m = is_root(comm) ? NEW(float, 2 * n) : NULL, *v = m ? m + n : NULL;
    int ok = slam_all_ok(comm, adamw_download(opt, opt->m, m)) && slam_all_ok(comm, adamw_download(opt, opt->v, v));
    if (ok && m) {
        char updates[32];
        const char *const metadata[] = {"updates", updates, NULL};
        snprintf(updates, sizeof updates, "%ld", opt->updates);
        ok = weights_write(path_join(folder, "optimizer.safetensors").at, &opt->model->layout->tensors, "",
                           moment_suffixes, 2, m, metadata);
    }
    free(m);
    return ok;
}

/* Collective. `step`: that of trainer.json, the expected number of updates. */
static int optimiser_load(slam_adamw *opt, const char *folder, long step) {
    slam_ops *ops = opt->model->ops;
    const model_tensors *list = &opt->model->layout->tensors;
    const slam_path path = path_join(folder, "optimizer.safetensors");
    tensors *file = tensors_open(path.at);
    int ok = file != NULL;
    for (size_t k = 0; ok && k < 2 * list->n; k++) {
        const model_tensor *t = &list->list[k / 2];
        float *host = weights_read(weights_find(file, t, moment_suffixes[k % 2], 0), tensor_size(t));
        ok = host != NULL;
        if (ok) adamw_upload(opt, k % 2 ? opt->v : opt->m, host, t->offset, tensor_size(t));
        free(host);
    }
    const char *updates = ok ? tensors_metadata(file, "updates") : NULL;
    opt->updates = updates ? atol(updates) : -1;
    if (ok && opt->updates != step)
        ok = set_error("%s: %ld updates, expected %ld, the step of trainer.json", path.at, opt->updates, step);
    ok = ops->finish(ops) && ok;
    tensors_close(file);
    return slam_all_ok(ops->comm, ok);
}

/* ---- folders and links ---- */

#define CHECKPOINT_PART ".checkpoint.part"

static slam_path checkpoint_path(const char *run, long step) {
    char name[32];
    snprintf(name, sizeof name, "step_%06ld", step);
    return path_join(run, name);
}

/* The steps of the checkpoints in ascending order; free() them. NULL on failure. */
static uint64_t *checkpoint_steps(const char *run, size_t *n) {
    slam_strings list = ZERO;
    uint64_t *steps = folder_list(run, &list) ? NEW(uint64_t, list.n + 1) : NULL;
    *n = 0;
    for (size_t i = 0; steps && i < list.n; i++) {
        const char *number = list.at[i] + strlen("step_");
        if (!strncmp(list.at[i], "step_", 5) && *number && !number[strspn(number, "0123456789")])
            steps[(*n)++] = strtoull(number, NULL, 10);
    }
    if (steps) qsort(steps, *n, sizeof *steps, compare_u64);
    slam_strings_free(&list);
    return steps;
}

/* *folder: the newest checkpoint; NULL: there is none. */
static int checkpoint_find(const char *run, char **folder) {
    size_t n;
    uint64_t *steps = checkpoint_steps(run, &n);
    *folder = n ? string_copy(checkpoint_path(run, (long)steps[n - 1]).at) : NULL;
    free(steps);
    return steps != NULL;
}

/* Points run/NAME at the checkpoint of a step, if that is there. NAME exists at any time, unless the file system has no
   links (exFAT, some network drives): nothing here needs it. */
static int checkpoint_link(const char *run, const char *name, long step) {
    const slam_path part = path_join(run, ".link.part"), path = path_join(run, name), to = checkpoint_path(run, step);
    if (!remove_tree(part.at)) return 0;
    if (!path_is_folder(to.at)) return 1;
    if (symlink(path_name(to.at), part.at) == 0 ? rename(part.at, path.at) == 0
                                                : errno == EPERM || errno == ENOTSUP || errno == ENOSYS)
        return folder_sync(run);
    const char *why = strerror(errno);
    return set_error("%s: cannot be made a link to %s: %s%s", path.at, path_name(to.at), why,
                     path_is_folder(path.at) ? "; remove it (a copy of a link?)" : "");
}

static int checkpoint_links(const char *run, const slam_trainer *t) {
    return checkpoint_link(run, "latest", t->step) && (!t->best_step || checkpoint_link(run, "best", t->best_step));
}

/* Removes all but the `keep` newest and the best. A folder is renamed first, so that a half removed one is never taken
   for a checkpoint. */
static int checkpoint_prune(const char *run, int keep, long best) {
    size_t n;
    uint64_t *steps = checkpoint_steps(run, &n);
    const slam_path part = path_join(run, CHECKPOINT_PART);
    int ok = steps != NULL;
    for (size_t i = 0; ok && i + (size_t)keep < n; i++) {
        const long step = (long)steps[i];
        if (step != best) ok = file_rename(checkpoint_path(run, step).at, part.at) && remove_tree(part.at);
    }
    free(steps);
    return ok;
}

int slam_checkpoint_save(const char *run, slam_model *model, slam_adamw *opt, const slam_trainer *t, int format,
                         int keep) {
    slam_comm *comm = model->ops->comm;
    const int root = is_root(comm);
    const slam_path part_path = path_join(run, CHECKPOINT_PART);
    const char *part = part_path.at;
    float *host = root ? NEW(float, model->n_weights) : NULL;
    int ok = slam_all_ok(comm, !root || (remove_tree(part) && folder_create(part))) &&
             slam_all_ok(comm, adamw_download(opt, opt->master ? opt->master : model->master, host)) &&
             slam_all_ok(comm, !root || model_write(model, host, part, format));
    free(host);
    ok = ok && slam_all_ok(comm, optimiser_save(opt, part)) &&
         slam_all_ok(comm, !root || (trainer_save(t, part) && folder_sync(part) &&
                                     file_rename(part, checkpoint_path(run, t->step).at) && folder_sync(run)));
    if (!ok && root) remove_tree(part);
    return ok && slam_all_ok(
                     comm, !root || (checkpoint_links(run, t) && (!keep || checkpoint_prune(run, keep, t->best_step))));
}

/* ---- runs/ ---- */

#ifdef __APPLE__
#define st_mtim st_mtimespec
#endif

/* The run in runs/ whose log was last written, of this program (NULL: of any, if it has a checkpoint). free() it. */
static char *run_newest(const char *program) {
    slam_strings list = ZERO;
    slam_path newest;
    double newest_time = 0;
    if (path_is_folder("runs") && !folder_list("runs", &list)) return NULL;
    for (size_t i = 0; i < list.n; i++) {
        const slam_path run = path_join("runs", list.at[i]);
        char *checkpoint = NULL;
        slam_trainer t = ZERO;
        struct stat s;
        if (stat(path_join(run.at, "log.jsonl").at, &s) != 0 || !checkpoint_find(run.at, &checkpoint)) continue;
        if (program) slam_trainer_load(&t, checkpoint ? checkpoint : run.at); // empty on failure
        const char *of = slam_trainer_setting(&t, "program", 0);
        const double time = (double)s.st_mtim.tv_sec + 1e-9 * (double)s.st_mtim.tv_nsec;
        if ((program ? of && !strcmp(of, program) : checkpoint != NULL) && time > newest_time) {
            newest = run;
            newest_time = time;
        }
        slam_trainer_free(&t);
        free(checkpoint);
    }
    slam_strings_free(&list);
    if (newest_time > 0) return string_copy(newest.at);
    set_error("runs: there is no run of %s yet", program ? program : "train with a checkpoint");
    return NULL;
}

char *slam_run_model(const char *path, const char *program) {
    char *model = path ? string_copy(path) : run_newest(program), *checkpoint = NULL;
    if (!model || path_is_file(path_join(model, "config.json").at) || !path_is_folder(model)) return model;
    if (checkpoint_find(model, &checkpoint) && !checkpoint) return model; // opening it reports what is missing
    free(model);
    return checkpoint;
}

/* ==========================================================================================
   SECTION 15. PROGRAMS      flags, progress bar, signals, devices, and the run of train and dpo
   ========================================================================================== */
#include <signal.h>
#include <sys/ioctl.h>

/* ---- signals ---- */

static volatile sig_atomic_t stop_requested, interrupts;

/* A closing terminal sends SIGHUP, some shells send it again: that never exits at once, so that the run is saved. */
static void on_signal(int number) {
    if (number != SIGHUP && interrupts++) _exit(128 + number);
    stop_requested = 1;
}

/* Writing to a closed pipe then fails and loses only the output. SIG_IGN would be inherited by child processes. */
static void on_closed_pipe(int number) { (void)number; }

void slam_signals_catch(void) {
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN); // nohup
}

int slam_stop_requested(void) { return stop_requested != 0; }

/* ---- start and end ---- */

/* An instruction set that the compiler was allowed to use and this CPU does not have; NULL: it has all. */
static const char *missing_instructions(void) {
#if defined(__x86_64__) && defined(__GNUC__)
#define SPELL(macro) #macro
#define IS_ONE(text) (*SPELL(text) == '1')
#define NEEDS(macro, set)                                                                                              \
    if (IS_ONE(macro) && !__builtin_cpu_supports(set)) return set
    NEEDS(__AVX__, "avx");
    NEEDS(__AVX2__, "avx2");
    NEEDS(__AVX512F__, "avx512f");
    NEEDS(__AVX512VL__, "avx512vl");
    NEEDS(__AVX512VBMI__, "avx512vbmi");
#endif
    return NULL;
}

slam_comm *slam_program_begin(const char *program) {
    const char *missing = missing_instructions();
    if (missing) {
        fprintf(stderr,
                "%s: error: this CPU does not have %s, for which the program was compiled; make on this machine, or "
                "make CFLAGS='-O3 -march=x86-64-v3' for all with AVX2\n",
                program, missing);
        return NULL;
    }
    for (int fd = 0; fd >= 0 && fd <= STDERR_FILENO;)
        fd = open("/dev/null", O_RDWR); // if one is closed, a file would get its number
    signal(SIGPIPE, on_closed_pipe);
    slam_comm *comm = slam_comm_init();
    if (comm && (is_root(comm) || freopen("/dev/null", "w", stdout))) return comm;
    fprintf(stderr, "%s: error: %s\n", program, comm ? "/dev/null cannot be opened" : slam_error());
    if (comm) slam_comm_finalize(comm, 1);
    return NULL;
}

int slam_program_end(const slam_flags *flags, slam_comm *comm, int status) {
    const char *name = flags->program;
    if (status == 2) slam_all_ok(comm, 0); // all ranks have the same command line
    if ((status == 1 || status == 2) && (is_root(comm) || !comm->failed)) {
        fprintf(stderr, "%s: error: ", name);
        if (!comm->failed && comm->size > 1) fprintf(stderr, "rank %d: ", comm->rank);
        fprintf(stderr, "%s\n", slam_error());
        if (status == 2) fprintf(stderr, "usage: ./%s %s\n./%s --help lists all flags\n", name, flags->usage, name);
    }
    slam_comm_finalize(comm, status == 1);
    return status;
}

/* ---- flags ---- */

static int flag_type(const slam_flag *f) { return f->type & (SLAM_FREE - 1); }

static slam_flag *flag_find(const slam_flags *f, const char *name, size_t n) {
    for (slam_flag *a = f->at; a < f->at + f->n; a++)
        if (a->name && strlen(a->name) == n && !strncmp(a->name, name, n)) return a;
    return NULL;
}

/* Whether the value is one of the words a|b|c. */
static int is_choice(const char *words, const char *value) {
    for (size_t n; *words; words += n + (words[n] == '|')) {
        n = strcspn(words, "|");
        if (strlen(value) == n && !strncmp(words, value, n)) return 1;
    }
    return 0;
}

static int flag_set_number(const slam_flag *f, const char *value, strbuf *text) {
    const int type = flag_type(f);
    char *end;
    double x = strtod(value, &end);
    while (type == SLAM_TIME && *end == ':') x = 60 * x + strtod(end + 1, &end);
    if (end == value || *end || !isfinite(x))
        return set_error("--%s %s: expected %s", f->name, value, type == SLAM_TIME ? f->argument : "a number");
    if (type < SLAM_REAL && (x != floor(x) || fabs(x) > (type == SLAM_LONG ? 9e15 : INT_MAX)))
        return set_error("--%s %s: expected a whole number", f->name, value);
    if (f->min < f->max && (x < f->min || x > f->max))
        return set_error("--%s %s: expected %.10g to %.10g", f->name, value, f->min, f->max);
    if (type < SLAM_LONG) *(int *)f->to = (int)x;
    else if (type == SLAM_LONG) *(long *)f->to = (long)x;
    else *(double *)f->to = x;
    strbuf_add_number(text, x);
    return 1;
}

static int flag_set(slam_flag *f, const char *value) {
    const int type = flag_type(f);
    strbuf text = ZERO;
    int gpu, end = 0;
    if (type < SLAM_TEXT && !strcmp(value, "auto")) return 1;
    if (type < SLAM_TEXT && !flag_set_number(f, value, &text)) return 0;
    if (type == SLAM_CHOICE && !is_choice(f->argument, value))
        return set_error("--%s %s: expected %s", f->name, value, f->argument);
    if (type == SLAM_DEVICE && !is_choice("auto|cpu|cuda", value) &&
        (sscanf(value, "cuda:%4d%n", &gpu, &end) != 1 || value[end] || gpu < 0))
        return set_error("--%s %s: expected auto, cpu, cuda or cuda:N", f->name, value);
    if (type == SLAM_LIST) {
        slam_strings_add((slam_strings *)f->to, value);
        return 1;
    }
    if (type >= SLAM_TEXT) strbuf_add(&text, "%s", type == SLAM_PATH ? slam_path_absolute(value).at : value);
    free(f->text);
    f->text = text.at;
    if (type >= SLAM_TEXT) *(char **)f->to = f->text;
    return 1;
}

/* Words in lines of up to 79 columns. `column`: where the first line stands; `margin`: where the others begin. */
static void print_wrapped(const char *words, int column, int margin) {
    while (*words) {
        const int n = (int)strcspn(words, " ");
        if (column > margin && column + 1 + n > 79) {
            printf("\n%*s", margin, "");
            column = margin;
        } else if (column > margin) column += printf(" ");
        column += printf("%.*s", n, words);
        words += n + (words[n] == ' ');
    }
    printf("\n");
}

static void flags_help(const slam_flags *f) {
    const int margin = 26;
    printf("usage: ./%s %s\n\n", f->program, f->usage);
    print_wrapped(f->about, 0, 0);
    for (const slam_flag *a = f->at; a < f->at + f->n; a++) {
        if (!a->name) {
            printf("\n%s\n", a->help);
            continue;
        }
        char words[400];
        snprintf(words, sizeof words, a->fallback ? "%s [%s]" : "%s", a->help, a->fallback);
        const int column = printf("  --%s%s%s", a->name, a->argument ? " " : "", a->argument ? a->argument : "");
        if (column > margin - 2) printf("\n%*s", margin, "");
        else printf("%*s", margin - column, "");
        print_wrapped(words, margin, margin);
    }
    printf("\nHelp\n  --help, -h              this text; defaults stand in brackets\n  --version\n");
}

int slam_flags_parse(slam_flags *f, int argc, char **argv) {
    int only_rest = 0;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        if (only_rest || a[0] != '-' || !a[1]) {
            slam_strings_add(&f->rest, a);
            continue;
        }
        only_rest = !strcmp(a, "--");
        if (only_rest) continue;
        if (is_choice("-h|--help", a)) flags_help(f);
        if (!strcmp(a, "--version")) printf("%s (slam) %s\n", f->program, SLAM_VERSION);
        if (is_choice("-h|--help|--version", a)) return 2;
        if (!strcmp(a, "-o")) a = "--out";
        const size_t n = strcspn(a, "=");
        slam_flag *flag = a[1] == '-' ? flag_find(f, a + 2, n - 2) : NULL;
        if (!flag) return set_error("%s: there is no such flag", a);
        const int is_switch = flag_type(flag) == SLAM_SWITCH;
        if (is_switch && a[n]) return set_error("--%s: takes no value", flag->name);
        const char *value = a[n] ? a + n + 1 : is_switch ? "1" : argv[++i]; // argv[argc] is NULL
        if (!value) return set_error("--%s: its value is missing (%s)", flag->name, flag->argument);
        flag->given = strcmp(value, "auto") != 0;
        if (!flag_set(flag, value)) return 0;
    }
    return 1;
}

int slam_flags_defaults(slam_flags *f, int right) {
    for (slam_flag *a = f->at; a < f->at + f->n; a++) {
        if (!a->name || a->text || !a->fallback) continue;
        const char *bar = strstr(a->fallback, " | "), *from = right && bar ? bar + 3 : a->fallback;
        char value[64];
        snprintf(value, sizeof value, "%.*s", (int)(bar && !right ? (size_t)(bar - from) : strlen(from)), from);
        if (strcmp(value, "-") && !flag_set(a, value)) return 0;
    }
    return 1;
}

int slam_flags_given(const slam_flags *f, const char *name) {
    const slam_flag *a = flag_find(f, name, strlen(name));
    return a ? a->given : 0;
}

int slam_flags_set(slam_flags *f, const char *name, const char *value) {
    return flag_set(flag_find(f, name, strlen(name)), value);
}

void slam_flags_free(slam_flags *f) {
    for (slam_flag *a = f->at; a < f->at + f->n; a++) {
        if (flag_type(a) == SLAM_LIST) slam_strings_free((slam_strings *)a->to);
        free(a->text);
    }
    slam_strings_free(&f->rest);
}

/* ---- progress bar ---- */

void slam_bar_begin(slam_bar *b) {
    b->began = b->shown = slam_clock();
    b->first = -1;
    b->terminal = isatty(STDOUT_FILENO) && !comm_launched(); // mpirun gives its ranks one wherever its output goes
}

/* The time left at the mean speed since the first call; "" if unknown. */
static const char *bar_left(slam_bar *b, double done, double total, char text[64]) {
    char left[32];
    if (b->first < 0) b->first = done;
    const double speed = (done - b->first) / (slam_clock() - b->began);
    snprintf(text, 64, "  %s left", slam_format_time(left, (total - done) / speed));
    return speed > 0 && done <= total ? text : "";
}

/* On a terminal, at most its width less one column: a line that wraps would not be overwritten. */
void slam_bar_show(slam_bar *b, double done, double total, const char *text) {
    const int filled = total > 0 && done <= total ? (int)(12 * done / total) : 0;
    struct winsize window;
    char left[64];
    const char *end = bar_left(b, done, total, left);
    if (slam_clock() - b->shown < (b->terminal ? 0.1 : 10)) return;
    b->shown = slam_clock();
    if (!b->terminal) printf("%.50s%s\n", text, end);
    else {
        const int known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0;
        int space = (known ? window.ws_col : 80) - 1 - (int)strlen(end); // for the text
        printf("\r\033[K");
        if (space > 50) space -= printf("[%.*s%.*s] ", filled, "############", 12 - filled, "------------");
        printf("%.*s%s", space > 0 ? space : 0, text, space >= 0 ? end : "");
    }
    fflush(stdout);
}

void slam_bar_clear(slam_bar *b) {
    if (b->terminal) printf("\r\033[K");
    fflush(stdout);
}

const char *slam_format_count(char s[32], double n) {
    static const char *const units[] = {"", "k", "M", "B", "T"};
    int u = 0;
    for (; u < 4 && n >= 999.5; u++) n /= 1000;
    snprintf(s, 32, "%.*f%s", !u || n >= 99.95 ? 0 : n >= 9.995 ? 1 : 2, n, units[u]);
    return s;
}

const char *slam_format_time(char s[32], double seconds) {
    const unsigned t = seconds > 0 ? seconds < 4e9 ? (unsigned)(seconds + 0.5) : 4000000000u : 0;
    if (t < 3600) snprintf(s, 32, "%u:%02u", t / 60, t % 60);
    else snprintf(s, 32, "%u:%02u:%02u", t / 3600, t / 60 % 60, t % 60);
    return s;
}

/* ---- paths ---- */

void slam_print_path(const char *path) {
    const char *quote = strpbrk(path, " \t\n'\"\\$&;|<>()*?[]{}#~!`") ? "'" : "";
    printf("%s", quote);
    for (const char *c = path; *c; c++) printf(*c == '\'' ? "'\\''" : "%c", *c);
    printf("%s", quote);
}

slam_path slam_path_beside(const char *argv0, const char *name) {
    slam_path program, beside;
    snprintf(program.at, sizeof program.at, "%s", argv0);
    const ssize_t n = readlink("/proc/self/exe", program.at, sizeof program.at - 1); // macOS has none
    if (n > 0) program.at[n] = 0;
    snprintf(beside.at, sizeof beside.at, "%.*s%s", (int)(path_name(program.at) - program.at), program.at, name);
    return beside;
}

slam_path slam_path_absolute(const char *path) {
    slam_path whole, here;
    if (realpath(path, whole.at)) return whole;
    if (path[0] != '/')
        return path_join(getcwd(here.at, sizeof here.at) ? here.at : ".", path); // to be made, or a glob
    snprintf(whole.at, sizeof whole.at, "%s", path);
    return whole;
}

/* ---- devices ---- */

static int is_cuda(const slam_ops *ops) { return !strncmp(ops->name, "cuda", 4); }

int slam_threads(const slam_comm *comm, int threads) {
    const int ranks = comm ? comm->local_size : 1, cores = (int)sysconf(_SC_NPROCESSORS_ONLN) / ranks;
    const int bound = omp_get_max_threads(); // fewer, if mpirun binds the rank
    if (!threads && ranks > 1) threads = cores < 1 ? 1 : cores < bound ? cores : bound;
    if (threads > 0) omp_set_num_threads(threads);
    return omp_get_max_threads();
}

slam_ops *slam_device(slam_comm *comm, const char *device, const char *dtype, int threads) {
    const int ranks = comm ? comm->size : 1, cpu = !strcmp(device, "cpu"), act_bytes = strcmp(dtype, "f32") ? 2 : 4;
    int gpu = ranks == 1 || cpu || slam_cuda_count() == 1 ? 0 : comm->local_rank; // Slurm may show a rank only its own
    char why[256] = ""; // ": " and the reason why the GPU is not used
    slam_ops *ops = NULL;
    int ok = 1;
    if (sscanf(device, "cuda:%d", &gpu) == 1 && ranks > 1)
        ok = set_error("--device %s: %d ranks cannot share a GPU; --device cuda gives each its own", device, ranks);
    threads = slam_threads(comm, threads);
    if (ok && !cpu && !(ops = slam_cuda(gpu, act_bytes))) snprintf(why, sizeof why, ": %.250s", slam_error());
    if (ok && (cpu || (!ops && !strcmp(device, "auto")))) ops = slam_cpu(threads);
    if (ops && strcmp(dtype, "auto") && ops->act_bytes != act_bytes)
        ok = set_error("--dtype %s: the CPU computes in f32 only%s", dtype, why);
    ok = slam_all_ok(comm, ok && ops) && (comm_equal(comm, (uint64_t)is_cuda(ops)) ||
                                          set_error("--device auto: only some of the ranks have a GPU%s", why));
    if (!slam_all_ok(comm, ok)) {
        slam_ops_free(ops);
        return NULL;
    }
    slam_comm_attach(comm, ops);
    printf("device   %s%s", ops->name, why);
    if (ranks > 1) printf(" on each of %d ranks", ranks);
    printf("\n");
    fflush(stdout);
    return ops;
}

/* FLOP/s of the model's largest product, the best of some calls; 0: no memory for it. Its inputs are weights, because
   products of zeros are faster. */
static double measure_peak(const slam_model *m, int rows) {
    slam_ops *ops = m->ops;
    const int C = m->config.C, O = 2 * m->config.F; // gate and up
    const int most = rows < 8192 ? rows : 8192, N = m->n_weights / C < (size_t)most ? (int)(m->n_weights / C) : most;
    slam_act *out = (slam_act *)ops->alloc(ops, (size_t)N * O * ops->act_bytes);
    double shortest = INFINITY;
    for (double began = slam_clock(), start = began; out && start < began + 0.03;) {
        ops->matmul_forward(ops, out, m->weights, m->weights, NULL, N, C, O);
        if (!ops->finish(ops)) break;
        shortest = fmin(shortest, slam_clock() - start);
        start = slam_clock();
    }
    ops->release(ops, out);
    return 2.0 * N * C * O / shortest;
}

/* ---- flags of the unit tokenizer ---- */

int slam_unit_flags_config(const slam_flags *flags, const slam_unit_flags *f, int fit, slam_unit_config *c) {
    *c = slam_unit_config_default();
    if (f->hubert) snprintf(c->hubert, sizeof c->hubert, "%s", f->hubert);
    if (!fit && !slam_unit_config_load(c, f->kmeans)) return 0;
    const slam_unit_config made = *c; // by KM.json; its fingerprint is 0 if there is none
    if (slam_flags_given(flags, "features")) c->features = !strcmp(f->features, "hubert");
    else if (f->hubert) c->features = SLAM_HUBERT;
    if (c->features == SLAM_HUBERT && !made.fingerprint) c->rate = 0;
    if (slam_flags_given(flags, "rate")) c->rate = atoi(f->rate);
    if (slam_flags_given(flags, "layer")) c->layer = f->layer;
    if (slam_flags_given(flags, "pad")) c->pad = f->pad;
    if (slam_flags_given(flags, "channel")) {
        const size_t digits = strspn(f->channel, "0123456789");
        c->channel = atoi(f->channel);
        if (strcmp(f->channel, "mix") && (f->channel[digits] || digits > 4 || c->channel < 1))
            return set_error("--channel %s: expected mix, or a number from 1", f->channel);
    }
    c->normalize |= f->normalize;
    c->dedup &= !f->no_dedup;
    const int same = c->features == made.features && c->rate == made.rate && c->layer == made.layer &&
                     c->pad == made.pad && c->normalize == made.normalize && c->dedup == made.dedup;
    if (made.fingerprint && !same)
        return set_error(
            "%s was made for %s, layer %d, pad %d, %d frames a second, %s; omit flags that differ, or fit others",
            f->kmeans, made.features == SLAM_HUBERT ? "HuBERT features" : "MFCC", made.layer, made.pad, made.rate,
            made.dedup ? "deduplicated" : "not deduplicated");
    if (c->features == SLAM_HUBERT)
        return *c->hubert || set_error("HuBERT features: expected --hubert DIR, a model in Hugging Face's format");
    if (f->hubert) return set_error("--hubert: MFCC need no model; omit --features mfcc");
    if (slam_flags_given(flags, "pad")) return set_error("--pad: expected --hubert DIR as well");
    return !slam_flags_given(flags, "layer") || set_error("--layer: expected --hubert DIR as well");
}

int slam_bundled_units(const char *argv0, uint64_t units) {
    slam_unit_config config = slam_unit_config_default();
    const int ok = !units || slam_unit_config_load(&config, slam_path_beside(argv0, "test/corpus/km.npy").at);
    if (!ok || !units || config.fingerprint == units) return ok;
    return set_error("the bundled data has units of tokenizer %08x, the model was trained on units of %08x",
                     (unsigned)config.fingerprint, (unsigned)units);
}

/* ---- a training run: flags ---- */

void slam_run_flags(slam_run *r, const slam_flag *own, int n, const char *const presets[][3], int n_presets) {
    slam_options *o = &r->o;
    slam_adamw *a = &r->opt;
    slam_schedule *s = &r->schedule;
    const slam_flag common[] = {
        SLAM_HEADING("Optimiser"),
        SLAM_NUMBER("batch", SLAM_INT, &o->batch, "N", NULL, 1, 1 << 20, NULL),
        SLAM_NUMBER("micro-batch", SLAM_INT, &o->micro, "N|auto", "auto", 1, 1 << 20, "rows computed at once"),
        SLAM_FLAG("recompute", SLAM_SWITCH | SLAM_FREE, &o->recompute, NULL, NULL,
                  "compute norms and SwiGLU again in the backward pass: up to a third less memory for activations"),
        SLAM_NUMBER("lr", SLAM_REAL, &s->lr, "X", NULL, 0, 1e30, "peak learning rate"),
        SLAM_NUMBER("min-lr", SLAM_REAL, &s->min_lr, "X", NULL, 0, 1e30, "where cosine ends (lr / 20)"),
        SLAM_FLAG("warmup", SLAM_TEXT, &o->warmup, "N|P%", NULL, "steps of warm-up, or their share of all"),
        SLAM_FLAG("schedule", SLAM_CHOICE, &o->schedule, "cosine|inverse-sqrt|linear|constant", NULL, "after warm-up"),
        SLAM_NUMBER("beta1", SLAM_REAL, &a->beta1, "X", "0.9", 0, 0.999999, "of AdamW"),
        SLAM_NUMBER("beta2", SLAM_REAL, &a->beta2, "X", "0.999", 0, 0.999999999, "of AdamW"),
        SLAM_NUMBER("eps", SLAM_REAL, &a->eps, "X", "1e-8", 1e-30, 1, "of AdamW"),
        SLAM_NUMBER("weight-decay", SLAM_REAL, &a->weight_decay, "X", "0", 0, 100, "of AdamW"),
        SLAM_NUMBER("clip", SLAM_REAL, &a->clip, "X", "0.5", 0, 1e9, "maximum norm of the gradient; 0: no clipping"),
        SLAM_HEADING("Run"),
        SLAM_FLAG("out", SLAM_TEXT | SLAM_UNSAVED, &o->out, "DIR", NULL, NULL),
        SLAM_FLAG("resume", SLAM_SWITCH | SLAM_UNSAVED, &o->resume, NULL, NULL,
                  "resume the run in --out, or the newest one; limits may grow"),
        SLAM_NUMBER("eval-every", SLAM_LONG, &o->eval_every, "N", "500", 0, 1e12, "steps between evaluations; 0: none"),
        SLAM_NUMBER("save-every", SLAM_LONG | SLAM_FREE, &o->save_every, "N", "500", 0, 1e12,
                    "steps between checkpoints; 0: only the last and the best"),
        SLAM_NUMBER("keep", SLAM_INT | SLAM_FREE, &o->keep, "N", "3", 0, 1 << 30, "newest checkpoints to keep; 0: all"),
        SLAM_NUMBER("log-every", SLAM_LONG | SLAM_FREE, &o->log_every, "N", "10", 0, 1e12,
                    "steps between lines; a terminal shows a bar, lines only if this is given"),
        SLAM_FLAG("format", SLAM_CHOICE, &o->format, "hf|slamkit", "hf", "format of the checkpoints"),
        SLAM_FLAG("device", SLAM_DEVICE | SLAM_FREE, &o->device, "NAME", "auto", "auto, cpu, cuda or cuda:N"),
        SLAM_FLAG("dtype", SLAM_CHOICE, &o->dtype, "auto|f32|bf16", "auto", "f32 on the CPU, bf16 on CUDA"),
        SLAM_FLAG("tune", SLAM_CHOICE, &o->tune, "on|off", "on",
                  "measure algorithms of matrix products on a GPU, once for a run; off: two runs have the same bits"),
        SLAM_NUMBER("threads", SLAM_INT | SLAM_FREE, &o->threads, "N", "0", 0, 4096, "CPU threads; 0: one per core"),
        SLAM_NUMBER("seed", SLAM_LONG, &o->seed, "N", "0", 0, 9e15, NULL),
        SLAM_FLAG("dry-run", SLAM_SWITCH | SLAM_UNSAVED, &o->dry_run, NULL, NULL, "print the plan, do not train"),
        SLAM_HEADING("Several ranks, started by mpirun -np N or srun"),
        SLAM_NUMBER("zero", SLAM_INT | SLAM_FREE, &o->zero, "0|1", "1", 0, 1, "1: shard optimiser state (ZeRO-1)"),
        SLAM_NUMBER("ranks", SLAM_INT | SLAM_UNSAVED, &o->ranks, "N", NULL, 1, 1 << 20, "--dry-run: plan for N ranks"),
        SLAM_NUMBER("flops", SLAM_REAL | SLAM_UNSAVED, &o->flops, "X", NULL, 1, 1e18, "--dry-run: FLOP/s of a rank"),
        SLAM_NUMBER("bandwidth", SLAM_REAL | SLAM_UNSAVED, &o->bandwidth, "X", NULL, 1, 1e15,
                    "--dry-run: bytes per second that a rank sends"),
    };
    memcpy(r->table, own, (size_t)n * sizeof *own);
    memcpy(r->table + n, common, sizeof common);
    r->flags.at = r->table;
    r->flags.n = n + (int)(sizeof common / sizeof *common);
    s->min_lr = -1;
    r->began = slam_clock();
    for (int i = 0; i < n_presets; i++) {
        slam_flag *f = flag_find(&r->flags, presets[i][0], strlen(presets[i][0]));
        if (presets[i][1]) f->fallback = presets[i][1];
        if (presets[i][2]) f->help = presets[i][2];
    }
}

/* --warmup N, P% or max(N, P%): steps of warm-up in a run of `steps`, -1 and the error if it is none of them. */
static long warmup_steps(const char *text, long steps) {
    double n = 0, percent = 0;
    int end = 0;
    sscanf(text, "max(%lf,%lf%%)%n", &n, &percent, &end);
    if (!end) n = 0;
    if (!end) sscanf(text, "%lf%%%n", &percent, &end);
    if (!end) percent = 0;
    if (!end) sscanf(text, "%lf%n", &n, &end);
    if (!end || text[end] || !(n >= 0 && n <= 1e12) || n != floor(n) || !(percent >= 0 && percent <= 100)) {
        set_error("--warmup %s: expected steps (100), a share of all (1%%) or the larger of both, max(100, 1%%)", text);
        return -1;
    }
    return (long)fmax(n, ceil(percent / 100 * (double)steps));
}

int slam_run_parse(slam_run *r, int argc, char **argv) {
    const slam_options *o = &r->o;
    const int parsed = slam_flags_parse(&r->flags, argc, argv);
    r->argv0 = argv[0];
    if (parsed != 1) return parsed;
    if (o->val.n && o->val_fraction > 0)
        return set_error("--val and --val-fraction: expected one of them, validation data or a share to hold out");
    if (o->ranks && !o->dry_run)
        return set_error("--ranks %d: expected with --dry-run; mpirun -np %d ./%s trains on %d ranks", o->ranks,
                         o->ranks, r->flags.program, o->ranks);
    if (o->warmup && warmup_steps(o->warmup, 0) < 0) return 0;
    slam_signals_catch();
    return 1;
}

/* ---- a training run: settings ---- */

static int is_setting(const slam_flag *f) { return f->name && flag_type(f) != SLAM_LIST && !(f->type & SLAM_UNSAVED); }

/* Gives the flags the run's values and checks those of the command line against them. */
static int settings_restore(slam_run *r) {
    const char *device = slam_trainer_setting(&r->trainer, "device", 0);
    const int moves = device && slam_flags_given(&r->flags, "device") && strncmp(r->o.device, device, strlen(device));
    for (slam_flag *f = r->table; f < r->table + r->flags.n; f++) {
        if (!is_setting(f)) continue;
        if (moves && is_choice("dtype|micro-batch", f->name)) continue; // another kind of device has its own
        const char *stored = slam_trainer_setting(&r->trainer, f->name, 0);
        if (!f->given && stored && !flag_set(f, stored)) return 0;
        if (!f->given || (f->type & SLAM_FREE)) continue;
        const int limit = (f->type & SLAM_LIMIT) != 0, same = stored && !strcmp(f->text, stored);
        if (!same && (!limit || (stored && strtod(stored, NULL) >= strtod(f->text, NULL))))
            return set_error("--%s %s: the resumed run has %s%s", f->name, f->text, stored ? stored : "none",
                             limit ? ", and a limit may only grow" : "");
        r->grows |= !same;
    }
    return 1;
}

/* Whether the run can be written, in its folder or the nearest one above it that exists. */
static int run_writable(const slam_run *r) {
    slam_path path = path_join(*r->folder ? r->folder : "runs", "log.jsonl"), folder = path;
    for (char *slash; (slash = strrchr(folder.at, '/')) != NULL && slash > folder.at; path = folder) {
        *slash = 0;
        if (path_exists(folder.at)) break;
    }
    return path_writable(path.at) || (r->o.out ? 0 : set_error("%s; --out DIR puts the run elsewhere", slam_error()));
}

/* Finds the run to resume and its newest checkpoint; --resume where there is none begins one. Without --resume, --out
   must not hold a run. */
static int run_find(slam_run *r) {
    const slam_options *o = &r->o;
    char *newest = o->out || !o->resume ? NULL : run_newest(r->flags.program);
    r->fresh = r->grows = 1;
    snprintf(r->folder, sizeof r->folder, "%s", o->out ? o->out : newest ? newest : "");
    free(newest);
    if (!o->dry_run && is_root(r->comm) && !run_writable(r)) return 0;
    if (!path_is_folder(r->folder) || (o->dry_run && !o->resume)) return 1;
    if (!checkpoint_find(r->folder, &r->checkpoint)) return 0;
    if (!r->checkpoint && !path_is_file(path_join(r->folder, "trainer.json").at)) return 1;
    if (!o->resume)
        return set_error(
            "%s: holds a run already; --resume continues it, another --out begins a new one (nothing is overwritten)",
            r->folder);
    r->fresh = r->grows = 0;
    if (!slam_trainer_load(&r->trainer, r->checkpoint ? r->checkpoint : r->folder)) return 0;
    r->began -= r->trainer.seconds;
    return settings_restore(r);
}

/* DATA and --val. A new run saves their names as they are given, and the folder that they are relative to. A resumed
   run has its own; the command line must have the same, or none. The bundled data's path is not saved, because it moves
   with the program. */
static int run_data(slam_run *r) {
    slam_strings *lists[] = {&r->flags.rest, &r->o.val};
    const char *const names[] = {r->data_name, "val"};
    int ok = 1;
    if (r->fresh) slam_trainer_set(&r->trainer, "program", 0, r->flags.program);
    if (r->fresh) slam_trainer_set(&r->trainer, "folder", 0, slam_path_absolute(".").at);
    for (int k = 0; ok && k < 2; k++) {
        slam_strings *list = lists[k], given = *list;
        for (size_t i = 0; r->fresh && i < given.n; i++) slam_trainer_set(&r->trainer, names[k], i, given.at[i]);
        if (!r->fresh) {
            memset(list, 0, sizeof *list);
            slam_trainer_paths(&r->trainer, names[k], list);
            for (size_t i = 0; ok && given.n && (i < given.n || i < list->n); i++) {
                const char *a = i < given.n ? given.at[i] : "none", *b = i < list->n ? list->at[i] : "none";
                if (strcmp(slam_path_absolute(a).at, slam_path_absolute(b).at))
                    ok = set_error("%s %s: the resumed run has %s", names[k], a, b);
            }
            slam_strings_free(&given);
        }
        if (k == 0) r->bundled = list->n == 0;
        if (r->bundled && !list->n && (k == 0 || r->o.val_fraction <= 0))
            slam_strings_add(list, slam_path_beside(r->argv0, r->bundled_data[k]).at);
    }
    return ok;
}

int slam_run_open(slam_run *r) {
    const slam_options *o = &r->o;
    char min_lr[32];
    if (!run_find(r) || !run_data(r)) return 0;
    if (r->fresh && o->resume && r->bundled)
        return set_error("%s: there is no run to resume, nor data to begin one", o->out ? o->out : "--resume");
    for (const slam_flag *f = r->table; f < r->table + r->flags.n; f++) r->limited |= (f->type & SLAM_LIMIT) && f->text;
    for (slam_flag *f = r->table; f < r->table + r->flags.n; f++)
        if ((f->type & SLAM_LIMIT) && (r->limited || !r->fresh)) f->fallback = NULL;
    if (!slam_flags_defaults(&r->flags, r->bundled)) return 0;
    snprintf(min_lr, sizeof min_lr, "%.15g", r->schedule.lr / 20);
    if (r->schedule.min_lr < 0) slam_flags_set(&r->flags, "min-lr", min_lr);
    if (r->fresh && !strcmp(o->schedule, "cosine") && r->schedule.min_lr > r->schedule.lr)
        return set_error("--min-lr %g: is above --lr %g, where cosine begins", r->schedule.min_lr, r->schedule.lr);
    /* --dry-run --dtype bf16 plans for a GPU where there is none */
    const int no_gpu = o->dry_run && !strcmp(o->dtype, "bf16") && strncmp(o->device, "cuda", 4);
    if (!(r->ops = slam_device(r->comm, o->device, no_gpu ? "auto" : o->dtype, o->threads))) return 0;
    if (no_gpu) r->ops->act_bytes = 2;
    const char *kind = is_cuda(r->ops) ? "cuda" : "cpu", *before = slam_trainer_setting(&r->trainer, "device", 0);
    if (before && strcmp(before, kind))
        printf("         the run was on %s before: its numbers will differ a little\n", before);
    return slam_flags_set(&r->flags, "device", kind) &&
           slam_flags_set(&r->flags, "dtype", r->ops->act_bytes == 4 ? "f32" : "bf16");
}

/* ---- a training run: the plan ---- */

/* How many of a rank's rows fit into memory at once. */
static int auto_micro_batch(const slam_run *r, int rows, int shards) {
    /* A CPU gains nothing beyond some thousand tokens: its caches hold no more. */
    const double space = (is_cuda(r->ops) ? 0.9 : 0.6) * (double)r->ops->memory;
    const int most = is_cuda(r->ops) ? rows : 4096 / r->T > 1 ? 4096 / r->T : 1;
    int micro = rows < most ? rows : most;
    while (micro > 1 && slam_config_memory(&r->config, r->ops->act_bytes, micro, r->T, r->mode, shards).total > space)
        micro--;
    const int passes = (rows + micro - 1) / micro; // as many with equal micro-batches, which need less memory
    return (rows + passes - 1) / passes;
}

/* Seconds of a step by --flops and --bandwidth. The reduction of gradients overlaps the backward pass of the last of
   `passes` micro-batches, two thirds of its work. */
static void print_speed(const slam_run *r, int ranks, int passes, double tokens) {
    const slam_options *o = &r->o;
    const int act = o->zero ? r->ops->act_bytes : 4; // gathered: weights, or without ZeRO sums of gradients
    const double sent = (double)slam_config_parameters(&r->config) * (ranks - 1) / ranks;
    const double work = slam_config_flops(&r->config, o->context);
    char a[32];
    printf("work     %s FLOP per token\n", slam_format_count(a, work));
    if (ranks > 1) printf("ranks    %d; each sends %.3g GB per step\n", ranks, (4 + act) * sent / 1e9);
    if (!o->flops) return;
    const double compute = work * tokens / ranks / o->flops, second = o->bandwidth ? 1 / o->bandwidth : 0;
    const double reduce = fmax(0, 4 * sent * second - compute / passes * 2 / 3), gather = act * sent * second;
    const double step = compute + reduce + gather;
    printf("step     %.4g s = compute %.4g + reduce %.4g + gather %.4g: %s tokens a day\n", step, compute, reduce,
           gather, slam_format_count(a, 86400 * tokens / step));
}

int slam_run_plan(slam_run *r, int rows, int T, double steps_per_epoch, double tokens_per_step, long token_steps) {
    static const char *const kinds[] = {"cosine", "inverse-sqrt", "linear", "constant"};
    const slam_options *o = &r->o;
    const int ranks = o->ranks ? o->ranks : r->comm->size, shards = o->zero ? ranks : 1;
    const long before = r->trainer.steps, limits[] = {o->steps, (long)ceil(o->epochs * steps_per_epoch), token_steps};
    long steps = 0;
    char a[32];
    if (o->batch < ranks) return set_error("--batch %d: expected at least the number of ranks, %d", o->batch, ranks);
    r->comm->zero = o->zero;
    r->mode = o->recompute ? SLAM_TRAIN_RECOMPUTE : SLAM_TRAIN;
    r->T = T;
    while (strcmp(o->schedule, kinds[r->schedule.kind])) r->schedule.kind++;
    rows = (rows + ranks - 1) / ranks;
    snprintf(a, sizeof a, "%d", o->micro ? o->micro : auto_micro_batch(r, rows, shards));
    slam_flags_set(&r->flags, "micro-batch", a); // saved with the run: another number would change the last bits
    r->micro = o->micro < rows ? o->micro : rows;
    for (int i = 0; i < 3; i++)
        if (limits[i] > 0 && (!steps || limits[i] < steps)) steps = limits[i];
    if (!r->grows) steps = before;
    if (steps && steps < before)
        return set_error("the limits make %ld steps, the resumed run has %ld, and a limit may only grow", steps,
                         before);
    r->trainer.steps = steps;

    if (!steps) printf("steps    as many as fit into the time\n");
    else
        printf("steps    %ld, batch size %d: %s tokens, %.3g epochs\n", steps, o->batch,
               slam_format_count(a, (double)steps * tokens_per_step), (double)steps / steps_per_epoch);
    const slam_memory m = slam_config_memory(&r->config, r->ops->act_bytes, r->micro, T, r->mode, shards);
    printf("memory   %.1f MB%s: weights %.1f, gradients %.1f, optimiser %.1f, activations %.1f,\n"
           "         logits %.1f; %d of %d rows at once\n",
           m.total / 1e6, ranks > 1 ? " per rank" : "", m.weights / 1e6, m.grads / 1e6, m.optimiser / 1e6,
           m.activations / 1e6, m.logits / 1e6, r->micro, rows);
    printf("schedule lr %g, %s, warm-up %s\n", r->schedule.lr, o->schedule, o->warmup);
    if (steps && steps < warmup_steps(o->warmup, steps))
        printf("         the warm-up is longer than the run: lr does not reach its peak\n");
    if (o->dry_run) print_speed(r, ranks, (rows + r->micro - 1) / r->micro, tokens_per_step);
    fflush(stdout);
    return 1;
}

/* ---- a training run: algorithms of matrix products ----
   The setting "products": library|list, nine numbers in hexadecimal for each shape that was measured. */

static void products_restore(const slam_run *r) {
    slam_products *p = r->ops->products;
    const char *text = slam_trainer_setting(&r->trainer, "products", 0);
    const size_t n = text ? strcspn(text, "|") : 0;
    if (!text) return;
    if (n != strlen(p->library) || strncmp(text, p->library, n)) {
        printf("products measured again, since the run's are for %.*s: its bits change\n", (int)n, text);
        return;
    }
    for (char *at = (char *)text + n; *at && p->measured < SLAM_PRODUCTS / 2; p->measured++)
        for (int i = 0; i < 9; i++) p->list[p->measured][i] = *at ? strtoull(at + 1, &at, 16) : 0;
}

/* Forward and backward over a full micro-batch; the gradients are discarded. */
static int products_measure(const slam_run *r) {
    slam_model *m = r->model;
    slam_ops *ops = m->ops;
    slam_batch b = slam_batch_new(r->micro, r->T, 0);
    for (int i = 0; i < b.B * b.T; i++) b.tokens[i] = b.targets[i] = i % m->config.V;
    ops->products->tune = 1;
    const int ok = slam_forward_backward(m, &b, 1) && ops->finish(ops);
    ops->products->tune = 0;
    ops->zero(ops, m->grads, m->n_weights * sizeof *m->grads);
    ops->zero(ops, m->stats, 2 * sizeof *m->stats);
    slam_batch_free(&b);
    return ok;
}

int slam_run_tune(slam_run *r) {
    slam_products *p = r->ops->products;
    const double began = slam_clock();
    strbuf s = ZERO;
    if (!p || strcmp(r->o.tune, "on")) return 1;
    if (is_root(r->comm)) products_restore(r);
    const int restored = p->measured;
    if (!slam_all_ok(r->comm, !is_root(r->comm) || products_measure(r))) return 0;
    comm_broadcast(r->comm, p, sizeof *p);
    strbuf_add(&s, "%s", p->library);
    for (int i = 0; i < 9 * p->measured; i++)
        strbuf_add(&s, "%c%llx", i ? ' ' : '|', (unsigned long long)p->list[i / 9][i % 9]);
    slam_trainer_set(&r->trainer, "products", 0, s.at);
    strbuf_free(&s);
    if (p->measured > restored)
        printf("products %d measured in %.1f s\n", p->measured - restored, slam_clock() - began);
    return 1;
}

/* ---- a training run: the clock and the end ---- */

enum { RUN_ON, RUN_DONE, RUN_OUT_OF_TIME, RUN_STOPPED };

/* Training time of the run, with that of the calls that it was resumed from. */
static double run_seconds(const slam_run *r) { return slam_clock() - r->began; }

/* Seconds since the last call. */
static double run_lap(slam_run *r) {
    const double now = slam_clock(), seconds = now - r->lap;
    r->lap = now;
    return seconds;
}

/* Whether another step begins. There must be time left for an evaluation and a checkpoint before and after it. If a
   limit and a signal come together, the limit counts: nothing is left to resume. Clocks and signals differ between
   ranks, so all take the largest state. */
static void run_update_state(slam_run *r) {
    const slam_trainer *t = &r->trainer;
    const double end = run_seconds(r) + r->slowest_step + 2 * (r->eval_seconds + r->save_seconds);
    int state = RUN_ON;
    if (t->step >= t->steps || (r->o.tokens && t->tokens >= (uint64_t)r->o.tokens)) state = RUN_DONE;
    else if (slam_stop_requested()) state = RUN_STOPPED;
    else if (r->o.seconds > 0 && end >= r->o.seconds) state = RUN_OUT_OF_TIME;
    r->state = (int)slam_comm_max(r->comm, state);
}

/* ---- a training run: folder and log ---- */

/* Names the folder, if it has no name yet, by the first of runs/NAME, runs/NAME-2, ... that is free. */
static int run_name(slam_run *r) {
    int ok = *r->folder || !is_root(r->comm) || folder_create("runs");
    for (int n = 1; ok && is_root(r->comm) && !*r->folder; n++) {
        snprintf(r->folder, sizeof r->folder, n == 1 ? "runs/%s" : "runs/%s-%d", r->flags.program, n);
        if (mkdir(r->folder, 0777) == 0) break;
        if (errno != EEXIST) ok = set_error("%s: cannot create this folder: %s", r->folder, strerror(errno));
        *r->folder = 0;
    }
    if (!slam_all_ok(r->comm, ok)) return 0;
    comm_broadcast(r->comm, r->folder, sizeof r->folder);
    return 1;
}

/* Locks the folder against a second process (the lock ends with the process), checks that the newest checkpoint is
   still the one to resume, and removes and repairs what a kill has left. */
static int run_open_folder(slam_run *r) {
    const char *folder = r->folder;
    const off_t log_bytes = (off_t)r->trainer.log_bytes;
    const slam_path log = path_join(folder, "log.jsonl");
    char *newest = NULL;
    struct stat s;
    int ok = folder_create(folder);
    if (ok && (r->lock = open(folder, O_RDONLY | O_CLOEXEC)) < 0) ok = set_error("%s: %s", folder, strerror(errno));
    if (ok && flock(r->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        ok = set_error("%s: another process is training this run", folder);
    ok = ok && checkpoint_find(folder, &newest);
    if (ok && (newest ? !r->checkpoint || strcmp(newest, r->checkpoint) : r->checkpoint != NULL))
        ok = set_error("%s: another process has trained this run meanwhile", folder);
    ok = ok && remove_tree(path_join(folder, CHECKPOINT_PART).at) &&
         (!newest || checkpoint_links(folder, &r->trainer)) && trainer_save(&r->trainer, newest ? newest : folder) &&
         folder_sync(folder);
    const int longer = ok && stat(log.at, &s) == 0 && s.st_size > log_bytes;
    if (ok && ((longer && truncate(log.at, log_bytes) != 0) || !(r->log = fopen(log.at, "ab"))))
        ok = set_error("%s: cannot be written: %s", log.at, strerror(errno));
    free(newest);
    return ok;
}

int slam_run_begin(slam_run *r, uint64_t data) {
    slam_trainer *t = &r->trainer;
    const uint64_t seen[] = {data, (uint64_t)t->step, (uint64_t)t->steps};
    const int equal = comm_equal(r->comm, hash_bytes(HASH_START, seen, sizeof seen));
    const int ok =
        (r->fresh || data == t->data ||
         set_error("%s: is not the data that this run was begun with", r->flags.rest.at[0])) &&
        (equal || set_error("the ranks see different data or checkpoints: expected files that all machines share"));
    if (!slam_all_ok(r->comm, ok) || !run_name(r)) return 0;
    printf("run      %s\n", r->folder);
    fflush(stdout);
    t->data = data;
    for (const slam_flag *f = r->table; f < r->table + r->flags.n; f++) {
        const int is_default = (f->type & SLAM_LIMIT) && !r->limited; // another limit may be given later
        if (is_setting(f) && f->text && !is_default) slam_trainer_set(t, f->name, 0, f->text);
    }
    r->schedule.warmup = warmup_steps(r->o.warmup, t->steps);
    r->schedule.steps = t->steps;
    r->saved_step = r->eval_step = t->step;
    slam_bar_begin(&r->bar);
    if (!slam_all_ok(r->comm, !is_root(r->comm) || run_open_folder(r))) return 0;
    if (r->checkpoint && !optimiser_load(&r->opt, r->checkpoint, t->step)) return 0;
    run_update_state(r);
    return 1;
}

/* ---- a training run: the steps ---- */

int slam_run_continues(slam_run *r) {
    run_lap(r);
    return r->state == RUN_ON;
}

/* A stopped run is evaluated when it is resumed, so that its log is the one of a run that was not stopped. */
int slam_run_eval_due(const slam_run *r) {
    const long every = r->o.eval_every, step = r->trainer.step;
    if (!every || r->eval_step == step) return 0;
    return r->state == RUN_DONE || r->state == RUN_OUT_OF_TIME || step % every == 0;
}

int slam_run_save_due(const slam_run *r) {
    const long every = r->o.save_every, step = r->trainer.step;
    if (r->saved_step == step) return 0;
    return r->state != RUN_ON || (every && step % every == 0) || r->trainer.best_step == step;
}

/* Writes a line of the log and flushes it, so that it survives a kill. Frees s. */
static int log_write(slam_run *r, strbuf *s) {
    FILE *f = (FILE *)r->log;
    strbuf_add(s, "}\n");
    const int ok = !f || (fwrite(s->at, 1, s->n, f) == s->n && fflush(f) == 0) ||
                   set_error("%s/log.jsonl: cannot be written: %s", r->folder, strerror(errno));
    strbuf_free(s);
    return ok;
}

static int report_skipped(slam_run *r, double loss, double grad_norm) {
    const slam_trainer *t = &r->trainer;
    slam_bar_clear(&r->bar);
    printf("step %ld/%ld  loss (%g) or gradient norm (%g) is not finite: update skipped, %ld so far\n", t->step + 1,
           t->steps, loss, grad_norm, t->skipped);
    fflush(stdout);
    if (++r->skipped_in_a_row < 20) return 1;
    set_error("loss or gradient norm was not finite 20 times in a row after step %ld%s", t->step,
              r->saved_step ? "; the last checkpoint is intact" : "");
    return slam_all_ok(r->comm, 0);
}

int slam_run_finish_step(slam_run *r, const slam_step *step, double loss, uint64_t tokens, const slam_metric *m,
                         int n) {
    slam_trainer *t = &r->trainer;
    const double seconds = run_lap(r), rate = (double)tokens / seconds;
    const double flops = slam_config_flops(&r->config, r->T) * rate, lr = slam_learning_rate(&r->schedule, t->step);
    if (!r->peak_flops) r->peak_flops = r->comm->size * measure_peak(r->model, r->micro * r->T);
    if (r->peak_flops > 0)
        r->peak_flops = fmax(r->peak_flops, flops); // others may use the machine while it is measured
    r->slowest_step = fmax(r->slowest_step, seconds);
    t->tokens += tokens;
    t->step += !step->skipped;
    t->skipped += step->skipped;
    run_update_state(r);
    if (step->skipped) return report_skipped(r, loss, step->grad_norm);
    r->skipped_in_a_row = 0;

    strbuf line = ZERO;
    const double share = r->peak_flops > 0 ? flops / r->peak_flops : 0;
    const slam_metric first[] = {{"loss", loss}, {"grad_norm", step->grad_norm}, {"lr", lr}};
    const slam_metric last[] = {{"seconds", run_seconds(r)}, {"tokens_per_second", rate}, {"peak_share", share}};
    strbuf_add(&line, "{\"step\": %ld, \"tokens\": %llu", t->step, (unsigned long long)t->tokens);
    strbuf_add_metrics(&line, "", first, 3);
    if (t->skipped) strbuf_add(&line, ", \"skipped\": %ld", t->skipped);
    strbuf_add_metrics(&line, "", m, n);
    strbuf_add_metrics(&line, "", last, 3);
    if (!log_write(r, &line)) return 0;

    char s[64];
    const int due = r->o.log_every && t->step % r->o.log_every == 0;
    strbuf_add(&line, "step %ld/%ld  %s tokens  loss %.4f", t->step, t->steps, slam_format_count(s, (double)t->tokens),
               loss);
    for (int i = 0; i < n && i < 2; i++) strbuf_add(&line, "  %s %.3f", m[i].name, m[i].value);
    strbuf_add(&line, "  norm %.3f  lr %.2e  %s tok/s", step->grad_norm, lr, slam_format_count(s, rate));
    if (share > 0) strbuf_add(&line, "  %.0f%% of peak", 100 * share);
    if (r->bar.terminal ? due && slam_flags_given(&r->flags, "log-every") : due || r->state || t->step == 1) {
        slam_bar_clear(&r->bar);
        printf("%s%s\n", line.at, bar_left(&r->bar, (double)t->step, (double)t->steps, s));
        fflush(stdout);
    }
    if (r->bar.terminal) slam_bar_show(&r->bar, (double)t->step, (double)t->steps, line.at);
    strbuf_free(&line);
    return 1;
}

int slam_run_finish_eval(slam_run *r, const double *losses, size_t n_sources, const slam_metric *m, int n) {
    slam_trainer *t = &r->trainer;
    const char *sources = r->o.val_fraction > 0 ? r->data_name : "val"; // settings that have their names as given
    const slam_metric loss = {"loss", losses[0]};
    strbuf line = ZERO;
    r->eval_seconds = run_lap(r);
    r->eval_step = t->step;
    if (isfinite(losses[0]) && (t->best_step == 0 || losses[0] < t->best_loss)) {
        t->best_loss = losses[0];
        t->best_step = t->step;
    }
    strbuf_add(&line, "{\"step\": %ld", t->step);
    strbuf_add_metrics(&line, "val_", &loss, 1);
    strbuf_add_metrics(&line, "val_", m, n);
    for (size_t s = 0; n_sources > 1 && s < n_sources; s++) {
        strbuf_add_name(&line, s ? ", " : ", \"val_loss_by_source\": {", slam_trainer_setting(t, sources, s));
        strbuf_add(&line, ": ");
        strbuf_add_number(&line, losses[1 + s]);
    }
    if (n_sources > 1) strbuf_add(&line, "}");
    slam_bar_clear(&r->bar);
    printf("step %ld/%ld  val_loss %.4f", t->step, t->steps, losses[0]);
    for (int i = 0; i < n && i < 2; i++) printf("  %s %.3f", m[i].name, m[i].value);
    printf("\n");
    fflush(stdout);
    return log_write(r, &line);
}

/* The log is on the disk before the checkpoint, so that no line is missing of what the checkpoint has seen. */
int slam_run_save(slam_run *r) {
    const int format = strcmp(r->o.format, "hf") ? SLAM_FORMAT_SLAMKIT : SLAM_FORMAT_HF;
    FILE *log = (FILE *)r->log;
    if (log && !fd_sync(fileno(log)))
        return set_error("%s/log.jsonl: cannot be written: %s", r->folder, strerror(errno));
    if (log) r->trainer.log_bytes = (uint64_t)ftell(log);
    r->trainer.seconds = run_seconds(r);
    if (!slam_checkpoint_save(r->folder, r->model, &r->opt, &r->trainer, format, r->o.keep)) return 0;
    r->saved_step = r->trainer.step;
    r->save_seconds = run_lap(r);
    return 1;
}

void slam_run_print_end(slam_run *r, const char *validation) {
    static const char *const words[] = {"", "done", "out of time", "stopped"};
    const slam_trainer *t = &r->trainer;
    const int stopped = r->state == RUN_STOPPED;
    char a[32], b[32];
    slam_bar_clear(&r->bar);
    printf("%s after %ld of %ld steps, %s tokens, %s", words[r->state], t->step, t->steps,
           slam_format_count(a, (double)t->tokens), slam_format_time(b, t->seconds));
    if (t->skipped) printf(", %ld updates skipped", t->skipped);
    printf(*validation ? ": %s\n" : "\n", validation);
    if (t->step) printf("checkpoint %s/latest is step %ld\n", r->folder, t->step);
    if (t->best_step) printf("checkpoint %s/best is step %ld: loss %.4f\n", r->folder, t->best_step, t->best_loss);
    printf("\nnext  ./%s --resume --out ", r->flags.program);
    slam_print_path(r->folder);
    if (!stopped && !r->limited) printf(" --steps %ld", 2 * t->steps);
    for (const slam_flag *f = r->table; !stopped && r->limited && f < r->table + r->flags.n; f++)
        if ((f->type & SLAM_LIMIT) && f->text) printf(" --%s %.15g", f->name, 2 * strtod(f->text, NULL));
    printf("\n          %s\n", stopped ? "resumes it" : "trains for as long again");
}

/* Before the first step a signal is no error. */
int slam_run_end(slam_run *r, int status) {
    const int all_know = r->comm->size == 1 || r->comm->failed;
    slam_bar_clear(&r->bar);
    if (status == 1 && r->lap == 0 && all_know && slam_comm_max(r->comm, slam_stop_requested())) {
        printf("stopped before the first step\n");
        status = 0;
    }
    slam_program_end(&r->flags, r->comm, status);
    slam_adamw_free(&r->opt);
    slam_model_free(r->model);
    slam_ops_free(r->ops);
    slam_trainer_free(&r->trainer);
    slam_flags_free(&r->flags);
    if (r->log) fclose((FILE *)r->log);
    if (r->lock > 0) close(r->lock);
    free(r->checkpoint);
    return status;
}
#endif /* SLAM_IMPLEMENTATION */
