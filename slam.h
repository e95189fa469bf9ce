/* slam.h - train speech language models, in one file

   A speech language model is a language model over units: speech goes through a feature extractor, every frame becomes the
   number of its nearest centroid, and a transformer learns which number comes next. This file holds all of it: audio to
   units, units to packed batches, a Qwen-style transformer forward and backward, AdamW, checkpoints that Hugging Face loads,
   evaluation. The recipe is Slam's (Maimon, Elmakies and Adi 2025, arXiv 2502.15814).

   Copy slam.h and slam.cu; add slam.cu to your build (nvcc -c slam.cu, or cc -x c -c slam.cu where there is no nvcc);
   include slam.h where you call it.

   Load a model and score a sequence of tokens (1 opens and closes a document, unit u is token u + 2):

       slam_ops *ops = slam_cpu(0);                          // 0 threads: as many as there are cores
       slam_model *m = slam_model_load(ops, "runs/train/latest");
       if (!m) { fprintf(stderr, "%s\n", slam_error()); return 1; }
       double nll = slam_model_nll(m, tokens, n);            // nats a token, mean over tokens[1..n-1]
       slam_model_free(m);
       slam_ops_free(ops);

   CONTENTS (search for a number with its dot and name)
      1. BASE               errors, memory, clock, RNG, threads, files
      2. FORMATS            JSON, CSV, safetensors, npy, token shards, JSONL units, audio files
      3. OPS                the list of operations (`slam_ops`) with each one's mathematics
      4. OPS ON THE CPU     the plain loops: read these first
      5. OPS ON CUDA        the same operations, one kernel or a few each
      6. RANKS              one process, or many that work together: MPI, NCCL
      7. MODEL              Qwen2 and Llama, forward and backward, written ONCE against `slam_ops`
      8. OPTIMISER          optimiser, schedules, gradient clipping, ZeRO-1
      9. DATA               documents, pieces, packing, shuffling, mixing
     10. SPEECH             resampler, MFCC, HuBERT, k-means, units, token files from audio files
     11. PREFERENCE         pairs of endings, of which one is preferred: DPO
     12. SCORING            perplexity, n-grams, test sets, generation
     13. CHECKPOINTS        a run's folders step_000200/, the links latest and best, trainer.json
     14. RUN                what the programs share: flags, the training loop, log, progress, signals

   BUILD SWITCHES
     SLAM_IMPLEMENTATION   this unit holds the definitions (slam.cu sets it)
     SLAM_OPENBLAS         CPU matrix products by OpenBLAS (link with -lopenblas)
     SLAM_ACCELERATE       CPU matrix products by Apple's Accelerate (link with -framework Accelerate)
     SLAM_SNDFILE          audio other than WAV by libsndfile: FLAC, Ogg, MP3, AIFF, ... (link with -lsndfile)
     SLAM_MPI              several processes by MPI (what `mpicc -show` adds to the compiler's call)
     SLAM_NCCL             section 5 on several GPUs as well: with SLAM_MPI, by nvcc (link with -lnccl)
     -fopenmp              loops are dealt to threads; without it there is one
     nvcc -arch=native     section 5 as well (link with -lcublasLt); nvcc by itself is for older GPUs, and slam_cuda() refuses
     SLAM_EMULATOR         section 5 by a C++17 compiler, against test/cuda_emulator.h

   Functions that can fail return 0 or NULL and leave a sentence for slam_error(). Nothing exits, and only section 14 prints.
   A slam_ops and what was made with it belong to one thread at a time. MIT licence. */
#ifndef SLAM_H
#define SLAM_H
#if defined(SLAM_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE // before the first system header: fsync, mmap, fileno under -std=c11
#endif
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------
   1. BASE
   ------------------------------------------------------------------------------------------ */
#define SLAM_VERSION "0.1.0"

/* The sentence that explains the last failure in this thread: what was read, what was found, what was expected. */
const char *slam_error(void);

/* Seconds on a clock that only goes forward. */
double slam_clock(void);

/* ------------------------------------------------------------------------------------------
   2. FORMATS      of what stands in files, what a program may want to know by itself
   ------------------------------------------------------------------------------------------ */
/* The share of a text's n-grams that occur in it more than once, 0 if it has none (auto-BLEU: Lakhotia et al. 2021); words lie
   between blanks, marks of punctuation are words. Negative where there is no memory. */
double slam_auto_bleu(const char *text, int order);

/* ------------------------------------------------------------------------------------------
   3. OPS          every operation that a model needs: its mathematics, stated once

   (N,C) is a matrix of N rows in row order. `slam_act` is an activation or a weight that takes part in products: float on
   the CPU, bf16 or float on CUDA (`bytes_per_act`); statistics, losses and gradients of parameters are float everywhere.
   "=" overwrites, "+=" adds: gradients of parameters add up over micro-batches.
   Letters: B batch, T time, C channels, V vocabulary, NH heads, KVH key/value heads, HS head size, F MLP width, N = B T.
   All pointers are memory of the device, from `alloc`. An operation that fails is remembered: `finish` tells.
   ------------------------------------------------------------------------------------------ */
typedef struct slam_act slam_act;
typedef struct slam_ops slam_ops;
typedef struct slam_ranks slam_ranks; /* section 6 */

/* What attention needs to know of a batch, besides the numbers in q, k and v. */
typedef struct slam_window {
    int B, T, NH, KVH, HS;
    const int *doc_start; /* (B,T)   query i sees key j iff doc_start[i] <= j < doc_end[i] ...                           */
    const int *doc_end;   /* (B,T)   ... NULL: i + 1, which is causal                                                      */
    const int *hole;      /* (B,T,2) ... and not first <= j < end <= i, the hole of i; NULL: no holes. i sees some key */
    const float *rope;    /* (T,HS)  for each position HS/2 cosines, then HS/2 sines; position = i - doc_start[i] - (end - first);
                             NULL: no rotation */
} slam_window;

/* AdamW's numbers for one step (Loshchilov and Hutter 2019; as torch.optim.AdamW). */
typedef struct slam_adamw {
    double lr, beta1, beta2, eps, weight_decay;
    double clip; /* the gradient is scaled to this norm where its own is larger; 0: never */
    long step;   /* which update this is, from 1: beta^step corrects the moments' bias */
} slam_adamw;

/* How a token is drawn (as Hugging Face's generate; the nucleus: Holtzman et al. 2020). */
typedef struct slam_sampling {
    double temperature;        /* logits are divided by it; 0: greedy, the largest logit */
    int top_k;                 /* only so many of the largest, ties with the last included; 0: all */
    double top_p;              /* only the fewest largest whose probabilities sum to this at least, ties included; 1: all */
    double repetition_penalty; /* logits of what was seen are divided by it, multiplied where negative; 1: none */
} slam_sampling;

/* A convolution over time: rows, groups, frames of a row, channels of a group, each in and out; taps, frames from one output to the
   next. */
typedef struct slam_conv {
    int B, G, T, C, TO, OC, K, stride;
    int gelu; /* the output goes through GELU */
} slam_conv;

struct slam_ops {
    const char *name;  /* "cpu, 2 threads", "cuda:0 NVIDIA H100 80GB HBM3" */
    int bytes_per_act; /* 4: float, 2: bf16 */
    int threads;       /* CPU threads that the loops use */
    size_t memory;     /* bytes that the device has in all */
    int asynchronous;  /* 1: it computes while the host does other things */
    int same_rows;     /* 1: a row of a product has the same bits whatever rows, and how many, there are beside it */
    slam_ranks *ranks; /* with whom it computes (slam_ranks_attach); NULL: alone */

    /* Memory of the device: zeroed, aligned to 256 bytes; NULL and slam_error() where there is no room. */
    void *(*alloc)(slam_ops *, size_t bytes);
    void (*release)(slam_ops *, void *p);
    void (*upload)(slam_ops *, void *to, const void *host, size_t bytes);     /* the host may change its memory at once */
    void (*download)(slam_ops *, void *host, const void *from, size_t bytes); /* waits for what was asked before */
    void (*zero)(slam_ops *, void *p, size_t bytes);
    /* Waits for all that was asked. 0 and slam_error() where something failed since the last finish. */
    int (*finish)(slam_ops *);
    void (*close)(slam_ops *);
    /* A second queue of the device (a cudaStream_t), in which ranks exchange numbers while more are computed. comm_begin: what goes
       there from now on waits for all that was asked so far; comm_end: what is asked from now on waits for all that went there.
       NULL: there is none, and the host can read what alloc returns: then MPI exchanges it. */
    void *comm_stream;
    void (*comm_begin)(slam_ops *);
    void (*comm_end)(slam_ops *);
    int (*comm_done)(slam_ops *); /* 0: something there is still under way */

    /* out = (n) rounded from in (n) */
    void (*to_act)(slam_ops *, slam_act *out, const float *in, size_t n);
    /* out = (n) from in (n) */
    void (*to_float)(slam_ops *, float *out, const slam_act *in, size_t n);

    /* Embedding      x_i = table[tokens_i]            dtable_v += sum over i with tokens_i = v of dx_i
       x = (N,C)  from  tokens (N)  table (V,C);       dtable += (V,C)  from  dx (N,C) */
    void (*embedding_forward)(slam_ops *, slam_act *x, const int *tokens, const slam_act *table, int N, int C);
    void (*embedding_backward)(slam_ops *, float *dtable, const slam_act *dx, const int *tokens, int N, int C, int V);

    /* Residual and RMSNorm (Zhang and Sennrich 2019)
           s = x + delta
           r_i = 1 / sqrt(mean_c s_ic^2 + eps)              y_ic = w_c r_i s_ic
           ds_ic += r_i (w_c dy_ic - s_ic r_i^2 mean_k(w_k dy_ik s_ik))
           dw_c  += sum_i dy_ic r_i s_ic
       s = (N,C)  y = (N,C)  r = (N)  from  x (N,C)  delta (N,C)  w (C); delta NULL: s is x and is not written. r and y are those of
       s as it is stored, so that they come out the same when they are computed again.
       ds adds: it comes in holding the gradient that reaches s along the residual stream, and leaves as that of x and of delta. */
    void (*rmsnorm_forward)(slam_ops *, slam_act *s, slam_act *y, float *r, const slam_act *x, const slam_act *delta,
                            const slam_act *w, float eps, int N, int C);
    void (*rmsnorm_backward)(slam_ops *, slam_act *ds, float *dw, const slam_act *dy, const slam_act *s, const slam_act *w,
                             const float *r, int N, int C);

    /* Linear layer
           out_io = sum_c x_ic w_oc + b_o
           dx_ic  = sum_o dout_io w_oc
           dw_oc += sum_i dout_io x_ic                      db_o += sum_i dout_io
       out = (N,OC)  from  x (N,C)  w (OC,C)  b (OC) or NULL */
    void (*matmul_forward)(slam_ops *, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b, int N, int C,
                           int OC);
    void (*matmul_backward_input)(slam_ops *, slam_act *dx, const slam_act *dout, const slam_act *w, int N, int C, int OC);
    void (*matmul_backward_weight)(slam_ops *, float *dw, float *db, const slam_act *dout, const slam_act *x, int N, int C, int OC);

    /* Attention within documents, causal or not, with rotary positions (Vaswani et al. 2017; Su et al. 2021; grouped queries:
       Ainslie et al. 2023). A row of qkv holds NH query heads, then KVH key heads, then KVH value heads, each of HS numbers;
       query head h reads key/value head g = h KVH / NH (rounded down). With R_p the rotation by the angles of position p, which
       turns the pair (c, c + HS/2):
           q'_i = R_i q_i    k'_j = R_j k_j
           s_ij = q'_i . k'_j / sqrt(HS)   for the j that i sees    lse_i = log sum_j exp(s_ij)
           p_ij = exp(s_ij - lse_i)                                 out_i = sum_j p_ij v_j
           dv_j  = sum_i p_ij dout_i       D_i = dout_i . out_i     ds_ij = p_ij (dout_i . v_j - D_i)
           dq'_i = sum_j ds_ij k'_j / sqrt(HS)    dk'_j = sum_i ds_ij q'_i / sqrt(HS)    dq = R^-1 dq'    dk = R^-1 dk'
       with sums over i in dk and dv also running over the query heads of a group.
       out = (B,T,NH HS)  lse = (B,NH,T)  from  qkv (B,T,(NH + 2 KVH) HS), which the forward pass leaves with q' and k' for q and k;
       the backward pass wants that.  dqkv = (B,T,(NH + 2 KVH) HS)  D = (B,NH,T), scratch. */
    void (*attention_forward)(slam_ops *, slam_act *out, float *lse, slam_act *qkv, const slam_window *);
    void (*attention_backward)(slam_ops *, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out, const float *lse,
                               const slam_act *qkv, const slam_window *);
    /* The same for one more token of each of B sequences, with keys and values of the tokens before in a cache: row b of qkv, at
       position and place n = lengths_b < T, gets q' and k' for q and k; its k' and v go to place n of the cache; out_b reads
       places 0 to n. Of the window B, T, NH, KVH, HS and rope count.
       out = (B,NH HS)  from  cache (B,T,2 KVH HS)  qkv (B,(NH + 2 KVH) HS)  lengths (B) */
    void (*attention_decode)(slam_ops *, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths, const slam_window *);
    /* What begins a sequence in that cache: row b of qkv, as the forward pass left it, gives k' and v' of its first lengths_b <= T
       tokens to the same places of sequence slots_b, whose places lie `room` to a sequence. Of the window B, T, NH, KVH, HS count.
       cache (slots,room,2 KVH HS)  from  qkv (B,T,(NH + 2 KVH) HS)  slots (B)  lengths (B) */
    void (*attention_fill)(slam_ops *, slam_act *cache, const slam_act *qkv, const int *slots, const int *lengths, int room,
                           const slam_window *);

    /* SwiGLU (Shazeer 2020)      h = g sigmoid(g) u       with g, u the halves of a row of gate_up
           dg = dh u sigmoid(g) (1 + g (1 - sigmoid(g)))    du = dh g sigmoid(g)
       h = (N,F)  from  gate_up (N,2F);  dgate_up = (N,2F)  from  dh (N,F); dgate_up may be gate_up itself */
    void (*swiglu_forward)(slam_ops *, slam_act *h, const slam_act *gate_up, int N, int F);
    void (*swiglu_backward)(slam_ops *, slam_act *dgate_up, const slam_act *dh, const slam_act *gate_up, int N, int F);

    /* Cross-entropy, loss and gradient in one pass
           loss_i = log sum_v exp(z_iv) - z_i,target_i      dz_iv = scale weight_i (softmax(z_i)_v - [v = target_i])
       loss = (N), 0 where target is -1;  logits (N,V), in rows `stride` numbers apart, become dz where scale is not 0 (rows without
       a target, and what follows a row's V numbers, become 0);  weights (N), NULL: 1 */
    void (*crossentropy)(slam_ops *, float *loss, slam_act *logits, const int *targets, const float *weights, float scale, int N,
                         int V, int stride);

    /* Sampling: of what slam_sampling leaves, with probabilities that sum to 1, the first token in order of v up to which they sum
       to more than uniform_b; greedy: the first of the largest. Token 0 is never drawn.
       tokens = (B)  from  logits (B,V), in rows `stride` numbers apart  uniform (B) in [0,1)  seen (B,V), bytes that are 1 for what
       the penalty concerns, and become 1 for what is drawn; NULL: none */
    void (*sample)(slam_ops *, int *tokens, const slam_act *logits, unsigned char *seen, const float *uniform,
                   const slam_sampling *, int B, int V, int stride);

    /* out[0] += sum of x,  out[0] += sum of squares of x; x (n), added in an order that depends on n alone */
    void (*sum)(slam_ops *, double *out, const float *x, size_t n);
    void (*sum_squares)(slam_ops *, double *out, const float *x, size_t n);

    /* AdamW, one update of n parameters
           g' = g min(1, clip / (norm + 1e-6))     m = beta1 m + (1 - beta1) g'      v = beta2 v + (1 - beta2) g'^2
           w = w (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
       w, m, v (n) are changed in place; w_act (n) = w rounded, and may be w. `stats` holds the sum of the losses and the
       squared norm of the whole gradient: where either is not finite nothing is changed. */
    void (*adamw)(slam_ops *, slam_act *w_act, float *w, float *m, float *v, const float *g, const double *stats,
                  const slam_adamw *, size_t n);

    /* What follows serves speech encoders; there are no backward passes.

       Convolution over time, in groups of channels, without padding
           out_bt(g o) = sum_k sum_c x_bg(t stride + k)c w_(g o)kc + b_(g o)      with `gelu` followed by GELU
       out = (B,TO,G OC)  from  x (B,G,T,C)  w (G OC,K,C)  b (G OC) or NULL. A frame with t stride + K > T reads on into what lies
       behind its row, which has to be memory but may hold anything: nobody uses such frames. */
    void (*conv1d)(slam_ops *, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b, const slam_conv *);
    /* What conv1d reads, with zeros around each row: channels in groups, `before` frames of zeros in front, zeros after the last
           out_bgtc = scale_(g c) x_b(t - before)(g c) + shift_(g c)   where 0 <= t - before < length_b, else 0
       out = (B,G,TO,C/G)  from  x (B,T,C)  lengths (B)  scale (C)  shift (C), both may be NULL: 1, 0 */
    void (*group_frames)(slam_ops *, slam_act *out, const slam_act *x, const int *lengths, const slam_act *scale,
                         const slam_act *shift, int before, int B, int T, int TO, int C, int G);
    /* x_bt = 0 for t >= length_b      x = (B,T,C)  lengths (B) */
    void (*mask_frames)(slam_ops *, slam_act *x, const int *lengths, int B, int T, int C);

    /* GELU (Hendrycks and Gimpel 2016), exact: x = x Phi(x), Phi the normal distribution's;  x = (n) */
    void (*gelu)(slam_ops *, slam_act *x, size_t n);

    /* Residual and layer norm (Ba, Kiros and Hinton 2016), with `gelu` followed by GELU
           s = x + delta      y_ic = w_c (s_ic - mean_i) / sqrt(mean_c (s_ic - mean_i)^2 + eps) + b_c
       s = (N,C)  y = (N,C)  from  x (N,C)  delta (N,C)  w (C)  b (C); delta NULL: s is x and is not written; s NULL: it is not kept;
       y NULL: only s. s and y may be x. */
    void (*layernorm)(slam_ops *, slam_act *s, slam_act *y, const slam_act *x, const slam_act *delta, const slam_act *w,
                      const slam_act *b, float eps, int gelu, int N, int C);

    /* Norm of each channel over the frames of its row (group norm with a channel a group: Wu and He 2018), followed by GELU
           x_btc = gelu(w_c (x_btc - mean_bc) / sqrt(var_bc + eps) + b_c),    mean and var over t < length_b; later frames become 0
       x = (B,T,C)  w (C)  b (C)  lengths (B) */
    void (*channelnorm)(slam_ops *, slam_act *x, const slam_act *w, const slam_act *b, const int *lengths, float eps, int B, int T,
                        int C);

    /* The nearest centroid by squared distance, the first of those that tie: the least |c_k|^2 - 2 x_i . c_k
       nearest = (N)  from  x (N,D)  centroids (K,D)  squares (K), |c_k|^2;  scores (N,K), scratch */
    void (*nearest)(slam_ops *, int *nearest, float *scores, const slam_act *x, const slam_act *centroids, const float *squares,
                    int N, int D, int K);
};

/* NULL and slam_error() where there is no memory, no such device, or no CUDA in this build. threads 0: one a core.
   bytes_per_act 2: bf16, 4: float, without tf32. */
slam_ops *slam_cpu(int threads);
slam_ops *slam_cuda(int device, int bytes_per_act);
int slam_cuda_count(void); /* GPUs that there are */
void slam_ops_free(slam_ops *);

/* ------------------------------------------------------------------------------------------
   6. RANKS        one process, or many that work together: MPI, NCCL
   ------------------------------------------------------------------------------------------ */
/* The processes that one mpirun or srun has started, numbered from 0. They call the same functions with the same arguments, see the
   same files, and each does its share. A slam_ranks * that is NULL stands for one alone. */
/* Joins the ranks that this process was started as one of; by itself it is alone. NULL and slam_error() where there is no memory, or where
   others were started with it whom it cannot see. */
slam_ranks *slam_ranks_join(void);
/* Frees; ops that were attached are alone from then on. status 0: waits for the other ranks (MPI_Finalize). Anything else ends them all
   at once (MPI_Abort), unless slam_ranks_agree has told each of them of the failure. */
void slam_ranks_leave(slam_ranks *, int status);
int slam_ranks_failed(const slam_ranks *); /* 1: slam_ranks_agree has returned 0, and all have the same slam_error() */
int slam_ranks_rank(const slam_ranks *);
int slam_ranks_root(const slam_ranks *); /* 1: rank 0, which alone prints and writes */
int slam_ranks_count(const slam_ranks *);
/* This rank's number among the ranks of its machine, and *count of those: rank k of a machine takes GPU k. */
int slam_ranks_local(const slam_ranks *, int *count);
/* 0: another rank of this machine has died. Async-signal-safe. */
int slam_ranks_alive(const slam_ranks *);
/* From here on what is computed with these ops is computed by all ranks together, each with ops of its own: training, checkpoints,
   scoring, generation. Gradients and weights that are in a GPU's memory are exchanged by NCCL, all else by MPI. */
void slam_ranks_attach(slam_ranks *, slam_ops *);
/* ZeRO (Rajbhandari et al. 2020): 1, as it is at first: each rank keeps a part of the optimiser's state; 0: each keeps all of it. The
   numbers are the same. Before there is an optimiser. */
void slam_ranks_zero(slam_ranks *, int stage);
/* first <= i < end: this rank's share of n things, neighbours; shares differ by one at most. */
void slam_ranks_share(const slam_ranks *, size_t n, size_t *first, size_t *end);

/* Collective calls: all ranks make the same ones in the same order. One that has failed inside an exchange (an error of NCCL's, say),
   which the others may still wait in, takes no part any more: its numbers stay as they are, agree returns 0, and slam_ranks_leave ends all.
   agree: 1 where ok is 1 on all ranks. Else 0, slam_error() is that of the lowest rank that failed, and later calls return 0 at once. */
int slam_ranks_agree(slam_ranks *, int ok);
int slam_ranks_same(slam_ranks *, uint64_t x); /* 1: it is the same number on all */
long slam_ranks_max(slam_ranks *, long x);
/* x (n) = sum over the ranks, in their order: the same bits on all. */
void slam_ranks_sum(slam_ranks *, double *x, size_t n);
void slam_ranks_broadcast(slam_ranks *, void *x, size_t bytes); /* x of rank 0 becomes everyone's */
/* Everyone's bytes in the order of ranks, in memory of the caller's; *all: how many. NULL and slam_error(), on all ranks, where one has
   no memory. */
void *slam_ranks_all_gather(slam_ranks *, const void *x, size_t bytes, size_t *all);

/* ------------------------------------------------------------------------------------------
   7. MODEL        Qwen2 and Llama-type transformers: forward, backward, Hugging Face's files
   ------------------------------------------------------------------------------------------ */
typedef struct slam_config {
    int V, C, L, NH, KVH, HS, F; /* vocabulary, channels, layers, heads, key/value heads, head size, MLP width */
    int T;                       /* max_position_embeddings */
    int tied, qkv_bias;          /* lm_head is embed_tokens; q, k, v have biases (Qwen2) or not (Llama) */
    double eps;                  /* of RMSNorm */
    double init_std;             /* standard deviation of a new model's matrices (initializer_range) */
    double rope_theta;           /* base of the rotary angles */
} slam_config;

/* "tiny", "slam" (Qwen2.5-0.5B's shape) or the path of a config.json (Hugging Face Qwen2 or Llama, SlamKit). V is what it says
   there. */
int slam_config_read(slam_config *, const char *name_or_path);
size_t slam_config_parameters(const slam_config *);
/* FLOP of forward and backward a token at context T: 6 for each parameter that multiplies, and attention's products. */
double slam_config_flops(const slam_config *, int T);

/* What room is planned for: forward passes; training; training in less memory, where the norms and SwiGLU, which cost little, are
   not kept for the backward pass but computed again in it, to the same bits. */
enum { SLAM_INFERENCE, SLAM_TRAIN, SLAM_TRAIN_RECOMPUTE };

/* Bytes of device memory by kind. parts: among how many ranks the moments and, with bf16, the float weights are divided
   (slam_ranks_zero); 1: not divided. */
typedef struct slam_memory {
    double weights, gradients, optimiser, activations, logits, total;
} slam_memory;
slam_memory slam_config_memory(const slam_config *, int bytes_per_act, int B, int T, int mode, int parts);

/* A batch of B rows of T tokens on the host: token, next token (-1: none), first index of the token's piece in its row,
   holes (B,T,2) or NULL: see slam_window. */
typedef struct slam_batch {
    int B, T;
    int *tokens, *targets, *doc_start, *hole;
} slam_batch;

/* Called by a backward pass when the gradients of layer l (L: the head and final norm; -1: the embedding) are complete. */
typedef void slam_after_layer(void *context, int l);

typedef struct slam_model slam_model;
slam_model *slam_model_new(slam_ops *, const slam_config *, uint64_t seed); /* matrices normal(0, init_std), norms 1, biases 0 */
slam_model *slam_model_load(slam_ops *, const char *folder);                /* Hugging Face or SlamKit folder */
/* A text model whose vocabulary is cut to its first V rows (TWIST: Hassid et al. 2023). */
slam_model *slam_model_twist(slam_ops *, const char *folder, int V);
/* Writes config.json, generation_config.json and model.safetensors (F32) into a folder that is there. */
enum { SLAM_FORMAT_HF, SLAM_FORMAT_SLAMKIT };
int slam_model_save(slam_model *, const char *folder, int format);
void slam_model_free(slam_model *);
const slam_config *slam_model_config(const slam_model *);
/* A hash of configuration and weights: tells one model from another. */
int slam_model_hash(slam_model *, uint64_t *hash);
/* The recipe starts from a text model but takes another base for the rotary angles. */
void slam_model_set_rope_theta(slam_model *, double rope_theta);

/* Plans and allocates room for batches of up to B rows of up to T tokens; mode: SLAM_INFERENCE and so on. May be called again. */
int slam_model_plan(slam_model *, int B, int T, int mode);
/* Forward: loss of every token (B,T) on the host, 0 where there is no target. */
int slam_model_losses(slam_model *, const slam_batch *, float *losses);
/* Forward: logits (B,T,V) on the host. */
int slam_model_logits(slam_model *, const slam_batch *, float *logits);
/* Forward and backward: adds scale * d(sum of losses) to the gradients and the sum of losses to the step's statistics. The
   slam_after_layer may be NULL. */
int slam_model_backward(slam_model *, const slam_batch *, float scale, slam_after_layer *, void *context);
/* Backward of the pass that slam_model_losses made last, planned for training, for a loss that hangs on those of the tokens: adds
   d(sum of weights_i losses_i) to the gradients, weights (B,T) on the host, and `loss` to the step's statistics. An error where the
   model has done anything else since. */
int slam_model_backward_from(slam_model *, const float *weights, double loss, slam_after_layer *, void *context);
/* Mean loss of tokens[1..n-1] given what stands before each, in windows of the config's T; negative and slam_error() on failure. */
double slam_model_nll(slam_model *, const int *tokens, int n);

/* Sequences that grow by a token at a time, with keys and values of their tokens in a cache: `slots` of them, of up to T tokens.
   What is computed for one does not depend on the others (to the bit on the CPU, where the products are section 4's own). The
   model is planned for inference and must outlive the decoder; it may do other things in between. */
typedef struct slam_decoder slam_decoder;
slam_decoder *slam_decoder_new(slam_model *, int slots, int T);
void slam_decoder_free(slam_decoder *);
/* n sequences begin, in slots that differ, in place of what was there: tokens[i] (lengths[i]), at least one. */
int slam_decoder_begin(slam_decoder *, int n, const int *slots, const int *const *tokens, const int *lengths);
/* A slot's sequence ends. */
void slam_decoder_end(slam_decoder *, int slot);
/* Draws the next token of every sequence and appends it. tokens (slots), on the host: -1 where there is no sequence. uniform
   (slots) in [0,1), which greedy does without (NULL); the penalty concerns all tokens of the sequence. */
int slam_decoder_step(slam_decoder *, const slam_sampling *, const float *uniform, int *tokens);
/* The logits (slots,V), on the host, that the last step drew from. */
int slam_decoder_logits(slam_decoder *, float *logits);

/* ------------------------------------------------------------------------------------------
   8. OPTIMISER    AdamW, schedules, clipping, ZeRO-1
   ------------------------------------------------------------------------------------------ */
enum { SLAM_COSINE, SLAM_INVERSE_SQRT, SLAM_LINEAR, SLAM_CONSTANT };
/* Learning rate of update `step` (from 0) of `steps`, as Hugging Face's schedules: linear warm-up from 0, then the curve;
   cosine ends at lr_min. */
double slam_schedule(int kind, long step, long steps, long warmup, double lr, double lr_min);

typedef struct slam_optimiser slam_optimiser;
/* lr and step of settings are not used. Of several ranks with bf16 the optimiser takes the model's float weights, each rank its part:
   then slam_model_save and slam_model_hash see them rounded, and slam_checkpoint_save has them whole. */
slam_optimiser *slam_optimiser_new(slam_model *, const slam_adamw *settings);
void slam_optimiser_free(slam_optimiser *);
typedef struct slam_step {
    double loss_sum, grad_norm; /* sum of the losses since the last step; norm of the gradient before clipping */
    int skipped;                /* 1: loss or norm was not finite and nothing was changed */
} slam_step;
/* An after_layer for the step's last backward pass: the ranks add up the gradients that are complete while others are computed. What
   it was not told of is added up when the update begins. */
void slam_optimiser_after_layer(void *optimiser, int l);
/* One update with learning rate lr; gradients and statistics are zero afterwards. Of several ranks each has gradients and losses of
   its own, which count together. */
int slam_optimiser_step(slam_optimiser *, double lr, slam_step *);
/* The same in two parts: the first asks for the update and returns, the second waits for it. Meanwhile the host is free. */
int slam_optimiser_begin(slam_optimiser *, double lr);
int slam_optimiser_end(slam_optimiser *, slam_step *);
long slam_optimiser_updates(const slam_optimiser *); /* finished updates: Adam's step count */
void slam_optimiser_reset(slam_optimiser *);         /* as it was when it was new */

/* ------------------------------------------------------------------------------------------
   9. DATA         documents -> pieces -> packed rows
   ------------------------------------------------------------------------------------------ */
typedef struct slam_data slam_data; /* the pieces of one or more sources, cut to a context; belongs to one thread */

/* Collects sources. context: the longest piece, and the length of a row; at least 2. */
slam_data *slam_data_new(int context);
void slam_data_free(slam_data *);
/* Adds a source: a file or glob of token shards (.bin) or SlamKit JSONL (.jsonl), drawn `weight` times an epoch (2: each piece
   twice; 0.5: half of them, other ones every epoch). All files of one call are one source. After a failure there is nothing to
   do but to free. */
int slam_data_add(slam_data *, const char *pattern, double weight);
/* What the data say about the vocabulary (the shards' header word 3; two that differ are an error of slam_data_add); 0:
   nothing. Fingerprint of the quantiser (word 4) likewise. */
int slam_data_vocabulary(const slam_data *, int *V);
uint32_t slam_data_fingerprint(const slam_data *);
/* Cuts and checks: every token must be < V (else the sentence names file and position), documents are `1 u.. 1` (`1 1`, without
   a unit, is passed over). Moves round(fraction * documents) of each source, at least one where it has two, chosen by seed,
   into *held_out: a slam_data of its own with the same sources, each of weight 1; the files are shared and either may be freed
   first (NULL with fraction 0). Call once, after the last add. */
int slam_data_prepare(slam_data *, int V, double fraction, uint64_t seed, slam_data **held_out);
typedef struct slam_data_size {
    uint64_t documents, pieces, tokens, targets, rows;
    double fill;
} slam_data_size;
int slam_data_sources(const slam_data *);
const char *slam_data_source_name(const slam_data *, int source);
/* Of one source, or of all with -1: the documents there are, and what epoch 0 draws of them by weight: pieces, their tokens and
   targets, the rows they make and the fill (share of positions that are real tokens). Packs an epoch without reading a token:
   10 million pieces a second. */
int slam_data_measure(const slam_data *, int source, uint64_t seed, slam_data_size *);

typedef struct slam_rows slam_rows; /* a stream of packed rows of `context` tokens; the data must outlive it */
/* shuffle 1: each epoch draws by weight, in an order of its own that hangs on seed and epoch alone. shuffle 0: every piece
   once, in file order as far as packing allows, whatever the weights (evaluation). source -1: all. */
slam_rows *slam_rows_new(const slam_data *, int source, uint64_t seed, int shuffle);
void slam_rows_free(slam_rows *);
/* Writes the next row (context numbers each; padding is token 0, target -1, a piece of its own; tokens NULL: passes over it without
   reading it) and returns its real tokens (> 0), its targets in *n_targets; 0: an epoch has ended (the next call begins the next
   one); -1: error. */
int slam_rows_next(slam_rows *, int *tokens, int *targets, int *doc_start, int *n_targets);
/* Where the stream stands: epochs finished and rows given of the current one; seek goes there from anywhere (what a resumed run
   needs), fails where the epoch has fewer rows. */
void slam_rows_tell(const slam_rows *, uint64_t *epoch, uint64_t *row);
int slam_rows_seek(slam_rows *, uint64_t epoch, uint64_t row);

/* ------------------------------------------------------------------------------------------
   10. SPEECH      audio -> features -> units
   ------------------------------------------------------------------------------------------ */
/* What makes audio into units: km.json says it, beside the centroids in km.npy. */
enum { SLAM_MFCC, SLAM_HUBERT };
typedef struct slam_speech_settings {
    int features;      /* SLAM_MFCC: 13 cepstra with their first and second differences, 39 numbers a frame; SLAM_HUBERT: below */
    int rate;          /* frames a second; MFCC: 25 (windows of 64 ms) or 50 (of 32 ms); HuBERT: the model's, or 0 */
    int normalize;     /* each file's waveform to zero mean and unit variance first */
    int dedup;         /* neighbouring frames of the same unit become one unit with a duration */
    int layer;         /* of HuBERT: hidden_states[layer] */
    char hubert[1024]; /* its folder, in Hugging Face's format */
} slam_speech_settings;
void slam_speech_defaults(slam_speech_settings *); /* MFCC, 25, not normalised, deduplicated */

/* Audio of `rate` samples a second (1000..768000) to 16 kHz by a sinc under a Kaiser window (Kaiser and Schafer 1980), one set of
   taps for each phase of 16000 / rate: within 0.001 dB up to 0.9 of the lower Nyquist frequency, over 100 dB down from 1.0 on.
   There is no delay: output k is the input at time k / 16000, k < ceil(16000 n / rate); beyond its ends the input counts as 0.
   One resampler serves any number of threads. */
typedef struct slam_resampler slam_resampler;
slam_resampler *slam_resampler_new(int rate);
void slam_resampler_free(slam_resampler *);
size_t slam_resampler_length(const slam_resampler *, size_t n);
void slam_resample(const slam_resampler *, float *out, const float *in, size_t n);

/* 16 kHz samples in [-1,1] -> features (frames, width). Frame t is the window that begins at sample t 16000 / rate. The last one
   reaches past the end, where the signal counts as 0, so that every sample is in some frame: none for no samples, 1 for up to a
   window (1024 samples at 25 frames a second, 512 at 50), else 1 + ceil((n - window) / step).
   The numbers are those of the Python package python_speech_features (mfcc, then delta with N = 2, twice).
   HuBERT's frames are those of slam_hubert_frames; it needs the ops, which MFCC does not (NULL). */
typedef struct slam_speech slam_speech;
slam_speech *slam_speech_new(const slam_speech_settings *, slam_ops *);
void slam_speech_free(slam_speech *);
int slam_speech_width(const slam_speech *);
size_t slam_speech_frames(const slam_speech *, size_t n);
int slam_speech_features(const slam_speech *, float *out, const float *sample, size_t n);

/* A HuBERT encoder (Hsu et al. 2021) from a Hugging Face folder: 16 kHz samples -> hidden states of a transformer layer, which are
   hidden_states[layer] of Transformers' HubertModel: 0 is what enters the first layer, n what leaves layer n, never with the final
   norm of a do_stable_layer_norm model. Only what that layer needs is loaded and computed. NULL and slam_error() where the folder
   is not a HuBERT model or asks for what is not built. */
typedef struct slam_hubert slam_hubert;
slam_hubert *slam_hubert_load(slam_ops *, const char *folder, int layer);
void slam_hubert_free(slam_hubert *);
int slam_hubert_width(const slam_hubert *);
int slam_hubert_step(const slam_hubert *); /* samples from one frame to the next */
/* A hash of the configuration and of the weights, as far as they are used: tells one encoder and layer from another. */
uint64_t slam_hubert_hash(const slam_hubert *);
/* Frames of so many samples, with 40 zeros on each side, as the encoder gets them; 0 where they are too few for one. */
long slam_hubert_frames(const slam_hubert *, long samples);
/* n utterances at once: features[i] = (frames_i, width) on the host. An utterance's features are the same in any batch. */
int slam_hubert_features(slam_hubert *, int n, const float *const *samples, const long *lengths, float *const *features);

/* 1: the folder's preprocessor_config.json asks for waveforms of zero mean and unit variance (do_normalize). */
int slam_hubert_asks_normalize(const char *folder);

/* How far a long job is, told from time to time; a watch that returns 0 stops it in good order. Where `failed` is set that file is
   left out, and `because` is the sentence. */
typedef struct slam_speech_progress {
    const char *stage; /* "listen" (to audio, for a fit), "fit", "tokenize" */
    size_t done, of;   /* files or lines, or passes of an unknown number (0) */
    double seconds;    /* of audio that were heard since the job started */
    const char *failed, *because;
} slam_speech_progress;
typedef int slam_speech_watch(void *context, const slam_speech_progress *);

/* k-means of frames (n, D): k-means++ seeds (Arthur and Vassilvitskii 2007), mini-batches (Sculley 2010), then full passes (Lloyd
   1982) until the inertia stands still. The same seed gives the same centroids (K, D) whatever the number of threads. The watch
   may be NULL. */
typedef struct slam_kmeans_report {
    size_t frames;
    double inertia;  /* mean squared distance of a frame to its centroid */
    int passes;      /* full passes at the end */
    int reseeded;    /* how often a centroid without frames was put onto the frame furthest from its own */
    int dead;        /* centroids without frames in the end: there are fewer different frames than centroids */
    uint64_t origin; /* of slam_quantiser_fit: a hash of settings, files, K, frames and seed, which km.json keeps */
} slam_kmeans_report;
int slam_kmeans(const float *frames, size_t n, int D, int K, uint64_t seed, float *centroids, slam_speech_watch *, void *context,
                slam_kmeans_report *);

/* Units of one piece of audio. */
typedef struct slam_units {
    int *unit, *duration;      /* (n), duration in frames */
    size_t n, frames, samples; /* samples at 16 kHz */
} slam_units;
void slam_units_free(slam_units *);

/* Features and centroids: what turns audio into units 0..K-1. */
typedef struct slam_quantiser slam_quantiser;
slam_quantiser *slam_quantiser_new(const slam_speech_settings *, slam_ops *, const float *centroids, int K);
/* The settings become those of KM.json beside KM.npy; where there is none, they stay. The folder of HuBERT stays where there is one:
   models move. Says which device, if any, slam_quantiser_open will need. */
int slam_quantiser_settings_read(const char *path, slam_speech_settings *);
/* KM.npy (K, D) with the settings of KM.json; `otherwise` where there is no such file. ops: for HuBERT, which must outlive it. */
slam_quantiser *slam_quantiser_open(const char *path, const slam_speech_settings *otherwise, slam_ops *);
/* Writes KM.npy and KM.json; the report may be NULL. */
int slam_quantiser_save(const slam_quantiser *, const char *path, const slam_kmeans_report *);
void slam_quantiser_free(slam_quantiser *);
const slam_speech_settings *slam_quantiser_settings(const slam_quantiser *);
int slam_quantiser_count(const slam_quantiser *); /* K */
/* A hash of settings and centroids, never 0: what stands in word 4 of a shard's header. */
uint32_t slam_quantiser_fingerprint(const slam_quantiser *);
/* The nearest centroid of each frame by squared distance, the first of those that tie; distance (n) may be NULL. */
void slam_quantiser_nearest(const slam_quantiser *, const float *frames, size_t n, int *unit, float *distance);
int slam_quantiser_units(const slam_quantiser *, const float *sample, size_t n, slam_units *); /* of 16 kHz samples */
int slam_quantiser_file(const slam_quantiser *, const char *path, slam_units *);               /* of an audio file of any rate */

/* A list of strings in memory of its own. */
typedef struct slam_list {
    char **at;
    size_t n, capacity;
} slam_list;
int slam_list_add(slam_list *, const char *item); /* a copy of item */
void slam_list_free(slam_list *);

/* Adds the paths of audio files: of files as they are, of folders (searched to the bottom in the order of their names; what ends in
   .wav, .flac, .ogg, .mp3 and so on) and of manifests (@LIST: a file or folder a line, as seen from the current folder). */
int slam_audio_list(slam_list *, const char *const *arguments, size_t n);

/* What becomes units: audio files, or lines of files; each is done or failed for itself. */
typedef struct slam_sources slam_sources;
/* A file that is longer than max_seconds (at least 1; 0: no limit) is cut into parts, each in the middle of the quietest 20 ms
   of the limit's last fifth: no more than one part is ever in memory, and each becomes a document, with `start` and `end` in
   seconds. */
slam_sources *slam_sources_audio(const slam_list *files, double max_seconds);
/* Lines of SlamKit features or tokens: units that are there already. */
slam_sources *slam_sources_units(const slam_list *files);
/* Lines with prompt_path, chosen_path and rejected_path: audio files, where the file of pairs is unless they begin with a slash.
   What else they hold (texts) is passed through. Where they have prompt_text and chosen_text, pairs whose slam_auto_bleu of both,
   order 2, is max_repetition or more are left out; 0: none are. */
slam_sources *slam_sources_pairs(const char *path, double max_repetition);
/* Lines of text, to be spoken by `voices` in turn: commands that write WAV to stdout, in which {text} stands for the words; one
   without {text} reads them from its stdin. They are run without a shell; blanks part their arguments, '...', "..." and \ keep them together. Lines of prompt, chosen and rejected
   with tabs between them become pairs, the text beside the units. */
slam_sources *slam_sources_text(const char *path, const slam_list *voices, double max_repetition);
void slam_sources_free(slam_sources *);
size_t slam_sources_count(const slam_sources *);
int slam_sources_pairs_out(const slam_sources *); /* 1: what comes out are pairs */
/* Keeps neighbours only: the 1st of `of` equal parts, the 2nd, ...; what comes out of all parts in order is what comes out of
   all. */
int slam_sources_part(slam_sources *, size_t part, size_t of);
/* From here on they are heard by all ranks together: slam_quantiser_fit, slam_tokenize and slam_quantiser_sources are called by
   all of them with the same arguments, each hears its share, and what comes out, of errors too, is the same on all: the bits of one
   process. The watches of all are told of every source that failed; one that says stop is enough. */
void slam_sources_ranks(slam_sources *, slam_ranks *);

/* Fits K centroids to at most `frames` frames, drawn evenly from audio files in an order of the seed's: as many as hold 8 x
   frames. Each rank keeps all frames that were drawn, and looks for the nearest centroids of its share. */
slam_quantiser *slam_quantiser_fit(const slam_speech_settings *, slam_ops *, const slam_sources *, int K, size_t frames,
                                   uint64_t seed, slam_speech_watch *, void *context, slam_kmeans_report *);
/* Whether such a fit, with these arguments, may be saved as KM.npy and KM.json, before it is begun. 1: yes. 2: it is there
   already, made by the same call. 0 and the sentence: one of them is there and is another's, or they cannot be written. */
int slam_quantiser_may_fit(const char *path, const slam_speech_settings *, const slam_sources *, int K, size_t frames,
                           uint64_t seed);

/* All sources' units, in their order, into OUT = NAME.bin (token shards: one that is full becomes NAME-00001.bin and so on, the
   last is NAME.bin) or NAME.jsonl (SlamKit features; audio_repr: SlamKit tokens; SlamKit pairs). For units that are there already
   the quantiser may be NULL: then a shard's header says nothing of them. Those that fail are listed in OUT.failed, that is
   NAME.bin.failed, lines as FILE:12. OUT.partial and OUT.journal hold what is done so far: the same call goes on from there, to the
   same bytes, also after the machine ran out of memory, and on another number of ranks; rank 0 alone writes. An OUT that exists, or
   that another process is at work on, is an error. */
typedef struct slam_tokenize_report {
    size_t files, failed, repeats, earlier; /* sources done, failed or left out as repeating, with those of earlier calls */
    size_t documents;
    uint64_t samples, frames, units, tokens;
    int shards, stopped; /* stopped: by the watch */
} slam_tokenize_report;
int slam_tokenize(const slam_quantiser *, const slam_sources *, const char *out, int audio_repr, uint64_t shard_tokens,
                  slam_speech_watch *, void *context, slam_tokenize_report *);
/* 0 and the sentence where slam_tokenize would refuse OUT, whatever goes into it. */
int slam_tokenize_may(const char *out);
/* The same in memory, of audio files: units (count), to be freed each. One that fails has no unit and no sample, and the watch is
   told. */
int slam_quantiser_sources(const slam_quantiser *, const slam_sources *, slam_units *units, slam_speech_watch *, void *context);

/* ------------------------------------------------------------------------------------------
   11. PREFERENCE  two endings of a prompt, one of them preferred: DPO
   ------------------------------------------------------------------------------------------ */
/* Pairs: a prompt with an ending that is preferred (chosen) and another one (rejected). As tokens the prompt is `1 u..`, an ending
   `u.. 1`; an ending's log-probability is the sum over all of its tokens. Belongs to one thread. */
typedef struct slam_pairs slam_pairs;
/* V: the vocabulary of the model that reads them, all units are below V - 2. context (at least 4): the most tokens of `1 prompt
   ending 1`; a prompt that is too long for that loses its beginning. share 1: a prompt is computed once for both endings (which see
   it, and not each other) where all three fit into the context. max_repetition: pairs with prompt_text and
   chosen_text whose slam_auto_bleu of both, order 2, is that or more are left out; 0: none are. */
slam_pairs *slam_pairs_new(int V, int context, int share, double max_repetition);
void slam_pairs_free(slam_pairs *);
/* Adds a file or glob of SlamKit preference pairs (.jsonl): objects with `prompt`, `chosen` and `rejected`, each with units, with
   audio_repr, or a string "<Un3><Un49>". validation 1: they are not trained on. A pair that says nothing is left out: with an ending
   that has no unit, or with two endings that are the same. */
int slam_pairs_add(slam_pairs *, const char *pattern, int validation);
/* Moves round(fraction * pairs), at least one, chosen by seed, from training to validation (0: none). Call once, after the last
   add; an error where nothing is left to train on. */
int slam_pairs_prepare(slam_pairs *, double fraction, uint64_t seed);
typedef struct slam_pairs_size {
    uint64_t train, validation;            /* pairs that there are */
    uint64_t repeats, silent, same, large; /* that were left out: by their text; an ending without a unit; the same ending twice; an
                                              ending that is too long even without a prompt */
    uint64_t cut, apart;                   /* with a prompt that lost its beginning; computed apart though prompts are shared */
    uint64_t tokens, rows, positions; /* of epoch 0: positions that are not padding; the rows they are packed into; and theirs */
    int most_rows;                    /* of a batch */
} slam_pairs_size;
/* The longest row that pairs are packed into: twice the context, so that the endings of a pair always stand in one row, and 1024
   at least, so that rows of some pairs each come out about equally long. */
int slam_pairs_row(const slam_pairs *);
/* Of batches of `batch` pairs, in the order of `seed`. */
int slam_pairs_measure(const slam_pairs *, int batch, uint64_t seed, slam_pairs_size *);
/* A hash of all that the pairs say, as they will be read: tells one set of pairs from another. */
uint64_t slam_pairs_hash(const slam_pairs *);

/* The reference's log-probabilities of every ending, which DPO sets the model's beside. They are computed once, before training, and
   appended to a file, some hundred pairs at a time: what a kill leaves is good as far as it goes.
   recall: takes what the file says, *known pairs. An error where it is of other pairs or another model; what is torn or damaged, or
   no file at all, is not known.
   compute: the rest, by `reference`, which is planned for `micro` rows of slam_pairs_row. `model`: its slam_model_hash. path NULL: no
   file. The watch (NULL: none) is told how many of how many are known. 1; 2 where the watch returned 0; 0: failed. Of several ranks
   each computes some of the rows, and the first one writes; all call recall first. */
typedef int slam_pairs_watch(void *context, uint64_t done, uint64_t of);
int slam_pairs_recall(slam_pairs *, const char *path, uint64_t model, uint64_t *known);
int slam_pairs_compute(slam_pairs *, slam_model *reference, int micro, const char *path, uint64_t model, slam_pairs_watch *,
                       void *context);

/* Direct preference optimisation (Rafailov et al. 2023, with label smoothing: Mitchell 2023). With D how much more the model
   prefers the chosen ending than the reference does,
       D = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))        s(x) = 1 / (1 + exp(-x))
       loss = -(1 - e) log s(b D) - e log s(-b D)              dloss/dD = -b ((1 - e) s(-b D) - e s(b D))
   b: beta, e: label_smoothing. Takes `batch` pairs a step, in an order of seed and epoch alone, over the ends of epochs; packs them
   into rows of which `micro` are computed at once, and plans the model for it (mode: SLAM_TRAIN or SLAM_TRAIN_RECOMPUTE). */
typedef struct slam_dpo slam_dpo;
slam_dpo *slam_dpo_new(slam_model *, const slam_pairs *, double beta, double label_smoothing, int batch, int micro, int mode,
                       uint64_t seed);
void slam_dpo_free(slam_dpo *);
/* Means over pairs: loss, D, the share with D > 0, log-probabilities of the endings; the share of those of which the model, and of
   which the reference, gives the chosen ending the higher log-probability. What is equal counts half. */
typedef struct slam_dpo_figures {
    double loss, margin, accuracy, logp_chosen, logp_rejected, preferred, reference_preferred;
} slam_dpo_figures;
/* The next batch: positions that are not padding, and pairs. */
int slam_dpo_next(slam_dpo *, uint64_t *tokens, uint64_t *pairs);
/* Forward and backward over it, a rank over its share: adds d(sum of losses) / pairs to the gradients, the sum of losses to the step's
   statistics. */
int slam_dpo_accumulate(slam_dpo *, uint64_t pairs, slam_after_layer *, void *context);
/* Over all pairs of the validation, where there are any. */
int slam_dpo_validates(const slam_dpo *);
int slam_dpo_evaluate(slam_dpo *);
/* Of the last batch that was accumulated, or of the last evaluation. */
slam_dpo_figures slam_dpo_last(const slam_dpo *, int evaluation);
/* Epochs finished and pairs taken of the current one; seek goes there from anywhere. */
void slam_dpo_tell(const slam_dpo *, uint64_t *epoch, uint64_t *pair);
int slam_dpo_seek(slam_dpo *, uint64_t epoch, uint64_t pair);

/* ------------------------------------------------------------------------------------------
   12. SCORING     perplexity, n-grams, test sets, generation
   ------------------------------------------------------------------------------------------ */
/* The model's ranks (slam_ranks_attach) share the work of slam_score_data, slam_score_units and slam_generate: all of them call, with
   the same model and the same data, and all get the whole result, which is that of one process, to the bit where what is computed
   for a row does not depend on its neighbours. A failure, or a stop, of one is that of all. */

/* Mean loss in nats a token of a model over every target of `data` (source -1: all), and how many targets there were (0 of
   them: a loss of 0). B rows a rank at a time: the caller has planned the model for B rows of the data's context. */
int slam_score_data(slam_model *, const slam_data *, int source, int B, double *nll, uint64_t *targets);
/* Cross-entropies (nats a token, orders 1..5) on the same targets of interpolated Witten-Bell n-gram models (Witten and Bell
   1991) counted on `train`, every piece once; contexts do not cross pieces. Memory goes with the test data, one pass over the
   training data:
       p_k(w|h) = (c(hw) + T(h) p_{k-1}(w|h')) / (c(h) + T(h))      p_0 = 1/V      T(h): how many different words follow h */
int slam_ngrams(const slam_data *train, const slam_data *test, int V, double nll[5], uint64_t *targets);

/* ---- sequences of units, one more likely than another ---- */

/* What was computed: sequences that differ, of these longer than a row and slid over, tokens that were predicted. How many sequences
   have no unit: then the closing 1 is all that is predicted. */
typedef struct slam_scored {
    size_t different, slid, silent;
    uint64_t tokens;
} slam_scored;
/* How many tokens of how many were predicted, by all ranks; returns 0 to stop. */
typedef int slam_score_watch(void *context, uint64_t done, uint64_t of);
/* Log-probabilities of sequences of units `1 u.. 1` given the first 1: of all the other tokens the mean, or the sum (sum 1).
   scores (n). Sequences are packed into rows of up to T tokens, B of them a rank at a time (this plans the model); one that is longer is
   slid over by windows of T, of which each but the first predicts what lies in its second half, so that each token is predicted
   once. Equal sequences have equal scores. units V - 2 and above, more tokens than the config's T, a score that is not finite, and
   a watch (may be NULL) that stops are errors. */
int slam_score_units(slam_model *, const slam_units *, size_t n, int B, int T, int sum, double *scores, slam_scored *,
                     slam_score_watch *, void *context);

/* A test set: pairs of sequences, of which the right one should be the more likely. */
enum { SLAM_SWUGGY, SLAM_SBLIMP, SLAM_STORYCLOZE, SLAM_SALMON };
typedef struct slam_testset slam_testset;
/* ZeroSpeech 2021's gold.csv (Nguyen et al. 2020). Columns of sWUGGY: id, filename, voice, correct, and where they are there frequency
   and length; of sBLIMP: id, filename, voice, type, subtype, correct. sWUGGY's words and non-words meet by id and voice, sBLIMP's
   k-th right row meets the k-th wrong one. A row without a partner, or two that cannot be told apart, are errors. */
slam_testset *slam_testset_gold(int kind, const char *path);
/* Files of SlamKit's folders: within each folder by the number before the separator (`_`, sBLIMP `+`), the right one first, the wrong
   one second; SALMon's <part>/sample_<i>_<0|1>, 0 the right one. The numbers of a pair are the same in all of a folder, or follow each
   other in all: anything else is an error. They need not be there: names of units do as well. */
slam_testset *slam_testset_files(int kind, const slam_list *files);
void slam_testset_free(slam_testset *);
const slam_list *slam_testset_items(const slam_testset *); /* names of gold.csv, or the files */
/* Where the audio of gold.csv's names is: beside it, with or without an ending. */
int slam_testset_audio(const slam_testset *, slam_list *paths);
/* units (items), to be freed each, of lines of SlamKit features or tokens: an item's line is the one whose file_name has the same
   name, folders and what follows the last point aside; where items of several folders have one name (SALMon's parts), the folder's
   name counts as well. One that is missing or there twice, or a unit of `below` and more, is an error. */
int slam_testset_units(const slam_testset *, const char *path, int below, slam_units *units);
/* The set in PATH: a gold.csv, or the folder of one, or what holds ZeroSpeech's folders (split: "dev", which NULL is as well, or
   "test"; it must not contradict the PATH), or a folder with pairs of audio files. *units: a file of units (NULL: none); PATH may then be NULL, or need no audio, and its lines are the items. Where *units
   is NULL, `listen` 0, and units.jsonl lies in the folder, *units gets its path. */
slam_testset *slam_testset_open(int kind, const char *path, const char *split, int listen, char **units);

/* A share of pairs in which the right one is the likelier, 0.5 of a tie; as the official scorer, a pair's voices are averaged first.
   Of all pairs (group ""), of the words that are in LibriSpeech ("vocabulary", "in"), then by "frequency", "length", "type", "part":
   where the set has them. */
typedef struct slam_accuracy {
    const char *group, *name;
    size_t n;
    double mean, deviation; /* sample standard deviation over pairs; NaN where there are fewer than two, or none */
} slam_accuracy;
/* In memory of the set's; NULL and slam_error() on failure. scores (items): what is written with 9 significant digits is what counts. */
const slam_accuracy *slam_testset_accuracies(slam_testset *, const double *scores, size_t *n);
/* All that is known as JSON: task, of ("mean", "sum"), n, accuracy, std, low and high (the 95 % interval), the same by group, then pairs
   with their names and what each counts, and the items' scores. After slam_testset_accuracies of these scores. */
int slam_testset_write(const slam_testset *, const char *task, int sum, const double *scores, const char *path);
/* ZeroSpeech's form: a line `filename score` for each item. */
int slam_testset_submission(const slam_testset *, const double *scores, const char *path);

/* Generation: prompts, and what a model continues them with. */
typedef struct slam_generation {
    slam_sampling sampling;
    int max_new; /* tokens at most; where token 1 is drawn a sequence ends before that */
    int context; /* tokens of prompt and continuation at most, within the config's T: a longer prompt loses its left, but for its
                    leading 1 */
    int batch;   /* sequences of a rank at once */
    uint64_t seed;
} slam_generation;
typedef struct slam_prompt {
    char *name;        /* where it is from */
    int *tokens;       /* (n), the first of them 1 */
    int n, cut;        /* cut: tokens that it lost because the context had no room for them */
    int *continuation; /* (length), without the 1 that ended it; NULL: not made yet */
    int length, ended; /* ended: 1 by token 1, 0 by max_new */
} slam_prompt;
typedef struct slam_prompts {
    slam_prompt *at;
    size_t n, capacity;
} slam_prompts;
void slam_prompts_free(slam_prompts *);
/* One more prompt, of units 0, 1, ...: token 1, then unit u as token u + 2. */
int slam_prompts_add(slam_prompts *, const char *name, const int *units, size_t n);
/* How much of a recording is its prompt. */
typedef struct slam_prompt_length {
    size_t units;   /* the first so many; 0: by seconds */
    double seconds; /* units that begin before that many seconds, by their durations; 0: all. Without durations 18 units count as a
                       second, about what is left of 25 frames a second without repeats */
    int rate;       /* frames of a duration a second */
} slam_prompt_length;
/* The lines of a file of SlamKit features or tokens. *guessed (may be NULL) counts those whose durations were missed. */
int slam_prompts_units(slam_prompts *, const char *path, const slam_prompt_length *, size_t *guessed);
/* The documents of token shards: the data's pieces that open one. */
int slam_prompts_data(slam_prompts *, const slam_data *, const slam_prompt_length *);
/* Audio files, each heard whole, so that the units of a prompt are those of its recording. One that fails is no prompt, and the
   watch (may be NULL) is told. All ranks (NULL: alone) call it and have all prompts. */
int slam_prompts_audio(slam_prompts *, const slam_quantiser *, slam_ranks *, const slam_list *files, const slam_prompt_length *,
                       slam_speech_watch *, void *context);

/* Called after every step, or where there are ranks every 16 steps; returns 0 to stop. Of all ranks, done: prompts whose continuations
   are made; tokens: that were drawn. */
typedef int slam_generate_watch(void *context, size_t done, uint64_t tokens);
/* Makes the continuations that are not made yet, a batch at a time; a sequence that ends makes room for the next prompt. One
   uniform number a token decides, from a stream that hangs on the seed and the prompt's tokens (of equal prompts also on how many
   of them stand before it), so that a continuation is the same alone, in any batch, in any order and of any rank. 1 also where the
   watch of one rank has stopped it: then all have what was made so far. The watch may be NULL. */
int slam_generate(slam_model *, const slam_generation *, slam_prompts *, slam_generate_watch *, void *context);
/* The continuations that are made as a file of SlamKit features, whole or not at all: {"file_name", "prompt": [units], "units":
   [units]} a line; prompt is what the model saw of it. */
int slam_prompts_write(const slam_prompts *, const char *path);
/* 0 and the sentence where a file of this name cannot be made. */
int slam_prompts_may_write(const char *path);
/* slam_auto_bleu of units (n). */
double slam_unit_auto_bleu(const int *units, size_t n, int order);
/* Its means: over the continuations that are made; over the lines of a file of texts, *n of them. Negative and slam_error() on
   failure; 0 of nothing. */
double slam_prompts_auto_bleu(const slam_prompts *, int order);
double slam_texts_auto_bleu(const char *path, int order, size_t *n);

/* ------------------------------------------------------------------------------------------
   13. CHECKPOINTS     a run's folders step_000200/, the links latest and best, trainer.json
   ------------------------------------------------------------------------------------------ */

/* The settings of a run, each by its flag's name and as the command line spells it; a list has a newline after each item. */
typedef struct slam_setting {
    char *name, *value;
} slam_setting;
typedef struct slam_settings {
    slam_setting *at;
    size_t n, capacity;
} slam_settings;
const char *slam_settings_get(const slam_settings *, const char *name); /* NULL: there is no such setting */
int slam_settings_set(slam_settings *, const char *name, const char *value);
void slam_settings_free(slam_settings *);

/* Where a run stands, besides its model and optimiser: trainer.json. */
typedef struct slam_trainer {
    long step, steps;    /* finished updates; how many there will be, which fixes the schedule */
    long skipped;        /* updates that were left out because loss or gradient was not finite */
    uint64_t tokens;     /* real tokens seen */
    uint64_t epoch, row; /* where the stream of batches stands */
    double seconds;      /* that the run took so far, over all its parts */
    double best_loss;    /* the lowest val_loss, ... */
    long best_step;      /* ... and its step; 0: none */
    uint64_t data;       /* what the batches are made of, as a hash */
    uint32_t units;      /* fingerprint of the units (km.json), from the shards */
    slam_settings settings;
} slam_trainer;
int slam_trainer_read(slam_trainer *, const char *folder); /* folder/trainer.json */
void slam_trainer_free(slam_trainer *);

/* The optimiser's moments and its count of updates, as FOLDER/optimizer.safetensors: rank 0 writes it, all ranks read their parts. */
int slam_optimiser_save(slam_optimiser *, const char *folder);
int slam_optimiser_load(slam_optimiser *, const char *folder);

/* Writes RUN/step_NNNNNN (model, optimizer.safetensors, trainer.json), points `latest` and `best` at what they name, and
   removes older ones but for the `keep` newest (0: all) and the best. A complete one of the same step is an error. On failure
   what was there before is still there and complete. All ranks call it, rank 0 writes: the files do not depend on how
   many there are. */
int slam_checkpoint_save(const char *run, slam_model *, slam_optimiser *, const slam_trainer *, int format, int keep);
/* The newest complete checkpoint's folder, in memory of the caller's; NULL in *folder where there is none. */
int slam_checkpoint_find(const char *run, char **folder);
/* Removes what a kill may have left half written and mends the links. */
int slam_checkpoint_mend(const char *run);

/* ------------------------------------------------------------------------------------------
   14. RUN         what the programs share. This section prints: progress and step lines, on stdout.
   ------------------------------------------------------------------------------------------ */

/* What a flag's value is and where it goes: SWITCH int (no value), INT int, LONG long (1e9 is one), REAL double, TEXT char *,
   CHOICE char * (one of argument's words a|b|c), LIST slam_list (each use adds an item), TIME double (seconds; written SS, MM:SS
   or HH:MM:SS). */
enum { SLAM_SWITCH, SLAM_INT, SLAM_LONG, SLAM_REAL, SLAM_TEXT, SLAM_CHOICE, SLAM_LIST, SLAM_TIME };
typedef struct slam_flag {
    const char *name; /* without its dashes; NULL: only opens the group that `help` names */
    int type;
    void *to;
    const char *argument; /* how the value is called in the help; NULL for a switch */
    const char *fallback; /* the value without the flag: "8", or for two ways to call the program "8 | 16"; "-": none */
    const char *help;
    double min, max; /* of a number; both 0: any */
    int given, set;  /* how often it stood on the command line; 1: it has a value */
} slam_flag;
typedef struct slam_flags {
    const char *program, *usage, *about; /* "train", "[options] [DATA...]", a paragraph */
    slam_flag *at;
    int n;
    slam_list rest; /* what is no flag */
} slam_flags;

/* 1: go on; 0: wrong, slam_error() says how; 2: --help or --version, which was printed. Every program has those two, -h, and
   -o for --out. `--flag value` and `--flag=value` are the same; all after `--` is no flag. */
int slam_flags_parse(slam_flags *, int argc, char **argv);
/* Gives every flag without a value its fallback: the part before " | " for column 0, after it for column 1. */
int slam_flags_defaults(slam_flags *, int column);
void slam_flags_free(slam_flags *);
int slam_flags_given(const slam_flags *, const char *name);
/* As the command line would, without counting as given; a list's items each end with a newline. */
int slam_flags_set(slam_flags *, const char *name, const char *value);
/* The value as slam_flags_set reads it, in memory of the caller's; NULL on failure, "" where there is none. */
char *slam_flags_text(const slam_flags *, const char *name);
/* `program: error: ` and slam_error(), then how the program is called, on stderr. */
void slam_flags_usage(const slam_flags *);

/* How many threads parallel loops use, from here on; 0: one a core, of which the ranks on one machine get equal parts. Returns the
   number. */
int slam_threads(const slam_ranks *, int threads);

/* One line on stdout that is written over, where that is a terminal; plain lines, ten seconds apart, where it is not. */
typedef struct slam_progress {
    double began, shown, first; /* first: done when it was shown first, of which nothing was done here */
    int terminal;
} slam_progress;
void slam_progress_begin(slam_progress *);
/* `what` may take 50 columns; bar and time left go by done of `of`; the first call says what is done already. Called as often
   as one likes: it shows what can be read. */
void slam_progress_show(slam_progress *, double done, double of, const char *what);
void slam_progress_clear(slam_progress *); /* before other output, and in the end */

/* A program's own sentence for slam_error(); returns 0. */
int slam_refuse(const char *format, ...);

/* The flags that say how units are made, as far as a program has them (NULL and 0: it has not). */
typedef struct slam_unit_flags {
    char *kmeans, *features, *rate, *hubert;
    int layer, normalize, no_dedup;
} slam_unit_flags;
/* What they say; where --kmeans is there already (fit 0) KM.json beside it decides, and a flag that contradicts it is an error. With
   SLAM_HUBERT in it slam_quantiser_open needs a device. */
int slam_unit_settings(const slam_flags *, const slam_unit_flags *, int fit, slam_speech_settings *);
/* The bundled pairs and test sets are lines, which do not say of which quantiser: an error where `units`, a model's (0: not known), are
   others than theirs. */
int slam_bundled_units(const char *argv0, uint32_t units);

/* How a program begins: its ranks, of which the first alone has a stdout. NULL: it failed, and has said so. */
slam_ranks *slam_program_begin(const char *program);
/* How it ends, before it frees anything: says why (status 1) or how it is called (2), once where all ranks know, and leaves them.
   Returns the status. */
int slam_program_end(const slam_flags *, slam_ranks *, int status);

/* The first SIGINT or SIGTERM after this call asks what runs to end well; a second one, or one that comes because another rank has died,
   ends the program at once. */
void slam_signals_catch(const slam_ranks *);
int slam_signals_stop(void); /* 1 once one has come */

/* 1: auto, cpu, cuda or cuda:N, whether or not there is one */
int slam_device_check(const char *device);
/* device: "auto", "cpu", "cuda" or "cuda:N"; dtype: "auto", "f32" or "bf16"; threads 0: one a core. `note` gets why auto took
   the CPU, or "". Of several ranks each has a GPU of its own (then cuda:N is an error), or its part of the machine's cores; all of
   them call it, and the ranks are attached. */
slam_ops *slam_device(slam_ranks *, const char *device, const char *dtype, int threads, char note[256]);

/* 950, 12.3k, 1.40M, 2.81B;  0:32, 12:03:04 */
const char *slam_spell_count(char s[32], double n);
const char *slam_spell_time(char s[32], double seconds);

/* Paths, in memory of the caller's; NULL and slam_error() on failure. */
char *slam_path_beside(const char *argv0, const char *name); /* NAME beside the running program */
char *slam_path_absolute(const char *path); /* where there is no such file yet, or a glob: the folder's path made absolute */
char *slam_run_new(const char *name);       /* makes runs/NAME, or runs/NAME-2 and so on: the first that is free */
int slam_run_claim(const char *folder);     /* an error where the folder holds a run */
char *slam_run_newest(const char *name);    /* in runs/: that program NAME has begun; NULL name: that holds a checkpoint */
char *slam_run_model(const char *path);     /* a model folder as it is, a run's newest checkpoint; NULL: of the newest run */

/* Keeps the value of every flag but of those named in `without` (words parted by spaces). */
int slam_settings_keep(slam_settings *, const slam_flags *, const char *without);
/* Gives the flags the values that a run was begun with. One that was given on the command line and says another is an error,
   unless it may change, or may grow and does; "auto" contradicts nothing. `without`: flags that are no settings. With a --device
   of another kind than the run's, --dtype and --micro-batch are free. */
int slam_settings_recall(const slam_settings *, slam_flags *, const char *without, const char *may_change, const char *may_grow);

/* slam_device for a run with these settings (none: a new one). The flags device, dtype get what came out; `note` also says where
   the run was on another kind of device before. */
slam_ops *slam_run_device(slam_ranks *, const slam_settings *, slam_flags *, const char *device, const char *dtype, int threads,
                          char note[256]);

/* Lists of data files: kept as given and in full, so that a run can be resumed from another folder, or moved along with them.
   Recall: given ones must be the run's, none given become the run's, which may be none (the bundled corpus); `paths` gets what
   to open. */
int slam_settings_keep_paths(slam_settings *, const char *name, const slam_list *given);
int slam_settings_recall_paths(const slam_settings *, const char *name, slam_list *given, slam_list *paths);
/* What --resume goes on with: the folder `out`, NULL: the newest run of program NAME; its newest checkpoint, NULL: none yet;
   how it stands, steps 0: nothing is there yet. */
int slam_run_find(const char *name, const char *out, char **folder, char **checkpoint, slam_trainer *);

typedef struct slam_figure {
    const char *name;
    double value;
} slam_figure;

/* What is trained on: train has rows of units, dpo has pairs. */
typedef struct slam_task {
    void *context;
    /* Takes the next global batch, of which a rank computes its share: the real tokens of all of it, and of how many terms the
       step's loss is the mean (targets; pairs). Called while the device still computes with the one before, of which only the host's
       copy may be given up. */
    int (*next)(void *context, uint64_t *tokens, uint64_t *terms);
    /* Forward and backward over the share, whose loss is the sum of its terms' losses / terms. The last backward pass calls
       after_layer (NULL: none). */
    int (*accumulate)(void *context, uint64_t terms, slam_after_layer *after_layer, void *after);
    /* Validation: losses[0] of all, losses[1 + s] of source s where there are several. NULL: nothing to validate on. */
    int (*evaluate)(void *context, double *losses);
    int sources;
    const char *(*source_name)(void *context, int source);
    /* Figures beside the loss of the last step, or of the last evaluation, into the log; the first two are shown as well. Writes up
       to 8 and returns how many; NULL: there are none. Called when next has taken the batch after it. */
    int (*figures)(void *context, int evaluation, slam_figure *figures);
    /* Where the batches stand; seek goes there from anywhere. */
    void (*tell)(void *context, uint64_t *epoch, uint64_t *row);
    int (*seek)(void *context, uint64_t epoch, uint64_t row);
} slam_task;

/* Pre-training: rows of `data`, micro rows at a time, the model planned for `mode`; val NULL: no validation; its sources go by
   val_names. */
typedef struct slam_pretraining slam_pretraining;
slam_pretraining *slam_pretraining_new(slam_model *, const slam_data *data, const slam_data *val, const slam_list *val_names,
                                       int context, int batch, int micro, int mode, uint64_t seed);
void slam_pretraining_free(slam_pretraining *);
slam_task slam_pretraining_task(slam_pretraining *);
/* Preference optimisation: the pairs of a slam_dpo. */
slam_task slam_dpo_task(slam_dpo *);
/* How many steps of `batch` rows it takes to see that many tokens. */
int slam_steps_for_tokens(const slam_data *, int context, int batch, uint64_t seed, uint64_t tokens, long *steps);
/* A hash of the data's size (slam_data_measure of all) and of its first rows: tells one data set from another. */
int slam_data_hash(const slam_data *, const slam_data_size *, int context, uint64_t seed, uint64_t *hash);

/* Rows that a device holds at once: goes by its memory in all, so that it is the same every time. parts: see slam_memory. */
int slam_micro_batch(const slam_ops *, const slam_config *, int batch, int T, int mode, int parts);

enum { SLAM_ENDED_LIMIT, SLAM_ENDED_TIME, SLAM_ENDED_SIGNAL };
/* A training run: what it is made of, how it goes, where it stands. Of several ranks the first alone writes, and a signal to any of
   them ends it. */
typedef struct slam_run {
    const char *folder; /* log.jsonl and the checkpoints */
    slam_ops *ops;
    slam_model *model;
    slam_optimiser *optimiser; /* made by slam_run_begin, or slam_run_time before it */
    slam_adamw adamw;
    slam_task task;
    slam_trainer trainer;
    double began;        /* slam_clock() when the program started */
    uint64_t max_tokens; /* limits; 0: none */
    double max_seconds;
    double lr, min_lr;
    int schedule;
    long warmup;
    double warmup_share; /* at least this part of all steps */
    long eval_every, save_every, log_every;
    long min_steps; /* of slam_run_time: that the run has already, and a limit may only grow; 0: none */
    slam_progress bar;
    int lines; /* step lines on a terminal as well, beside the bar */
    int keep, format;
    int context, micro; /* tokens of a row and rows at once, for the peak and the share of it */

    /* what slam_run_train leaves */
    int ended;
    double val_loss; /* the last evaluation's, ... */
    long val_step;   /* ... of this step; 0: there was none */
    long saved_step;
    double before, val_seconds, save_seconds; /* seconds of the run's earlier parts, of the last evaluation and checkpoint */
    uint64_t epoch, row;                      /* where the batches of finished steps end */
    int ready;                                /* 1: the batch after them is taken already, ... */
    uint64_t ready_tokens, ready_terms;       /* ... of which task.next said this */
    int lock;                                 /* the folder's, which keeps a second process out; 0: none */
} slam_run;

/* Fixes trainer.steps by the time that steps take, trying some without effect, so that evaluations and checkpoints fit into
   max_seconds as well; no more than trainer.steps where that is not 0. Before slam_run_begin. 2: stopped by a signal. */
int slam_run_time(slam_run *);
/* Makes the optimiser; goes on from `checkpoint` (NULL: from the start): moments, place in the data; makes or mends the folder,
   cuts the log, and writes the settings as they are now into trainer.json, so that a limit that has grown survives a kill. An
   error where another process trained here since the checkpoint was found. */
int slam_run_begin(slam_run *, const char *checkpoint);
/* Trains until a limit or a signal, evaluating, logging and saving. */
int slam_run_train(slam_run *);
void slam_run_end(slam_run *); /* frees the optimiser and the settings */

/* A call of a program that trains: the flags that all of them have, and what comes of them. Fields are filled by the functions below
   in their order. */
typedef struct slam_options {
    slam_list val;
    char *init, *micro, *warmup, *schedule, *out, *device, *dtype, *format, *zero;
    double val_fraction, epochs, lr, min_lr, beta1, beta2, eps, weight_decay, clip, flops, bandwidth;
    long steps, seed, eval_every, save_every, log_every;
    int context, batch, recompute, resume, threads, keep, dry_run, ranks;
} slam_options;
typedef struct slam_job {
    slam_ranks *ranks;   /* of slam_program_begin */
    const char *program; /* whose runs are resumed, and what new ones are called */
    const char *key;     /* how a run's settings call its data */
    /* Names of flags, parted by spaces: those that concern a call alone, may differ when a run goes on, may then be greater (the
       limits of a run). */
    const char *not_kept, *may_change, *may_grow;
    slam_options o;
    slam_flags flags; /* rest: the data, as they are called */
    slam_flag table[64];
    slam_list data, val; /* what is opened */
    int fresh;           /* it is not resumed */
    int any_limit;       /* one was asked for */
    int is_bundled;      /* the data are those beside the program */
    char *folder, *checkpoint;
    slam_run run;
} slam_job;
/* The table: n of the program's own flags, then those of the optimiser and of the run. presets: name, fallback, help (NULL: as it
   is) of such that this program has its own for. */
void slam_job_flags(slam_job *, const slam_flag *own, int n, const char *const presets[][3], int n_presets);
/* What the table cannot say of what stands on the command line. */
int slam_job_check(slam_job *);
/* A flag's path made absolute, so that a run can be resumed from another folder. */
int slam_job_absolute(slam_job *, const char *flag);
/* Finds the run to resume, and recalls its settings. */
int slam_job_recall(slam_job *);
/* Fallbacks (without data those of the second column) for what neither the command line nor the run has said. */
int slam_job_defaults(slam_job *);
/* Data and validation data: as they are called, or where there are none the bundled ones. Such a run keeps empty lists, so that it
   goes on wherever the program lies. */
int slam_job_name_data(slam_job *, const char *argv0, const char *bundled, const char *bundled_val);
/* slam_run_device; a --dry-run with --dtype bf16 plans for a GPU where there is none. */
slam_ops *slam_job_device(slam_job *, char note[256]);
/* The run's part of the options; of `rows` rows of T tokens that a step has in all how many a rank computes at once. */
int slam_job_fill(slam_job *, slam_ops *, const slam_config *, int rows, int T);
int slam_job_mode(const slam_job *); /* SLAM_TRAIN, or with --recompute SLAM_TRAIN_RECOMPUTE */
/* Whether the command line gives a limit that the run does not have already; NULL: any of them, or the run is a new one. */
int slam_job_grows(const slam_job *, const char *limit);
/* Fixes the number of steps by the first of the limits: --steps, --epochs of so many steps, most (0: none). A resumed run keeps its
   own unless a limit grows. */
int slam_job_steps(slam_job *, double epoch, long most);
/* Writes down what the run has to be resumed with; `data`: a hash, an error where the resumed run had another. */
int slam_job_keep(slam_job *, uint64_t data);
/* Names the folder, and slam_run_begin. */
int slam_job_begin(slam_job *);
/* Lines of the plan: the device, with a note ("": none); memory, of `rows` a step; learning rate. */
void slam_job_print_device(const slam_job *, const char *note);
void slam_job_print_memory(const slam_job *, const slam_config *, int rows);
void slam_job_print_schedule(const slam_job *);
/* Of several ranks, or of as many as --ranks plans: what they exchange in a step of so many rows and tokens, and how long it takes. */
void slam_job_print_ranks(const slam_job *, const slam_config *, int rows, double tokens);
/* What came of it: a line, with `validation` in it ("": none), and the checkpoints; first: the step it began with. */
void slam_job_print_end(const slam_job *, long first, const char *validation);
/* The call that goes on with the run, up to its limits. */
void slam_job_print_resume(const slam_job *);
void slam_print_path(const char *path); /* as a shell takes it */
/* Ends the run and frees; prints the sentence of an error (status 1), and how the program is called (2). Returns the status. */
int slam_job_end(slam_job *, int status);

#ifdef __cplusplus
}
#endif
#endif /* SLAM_H */

#ifdef SLAM_IMPLEMENTATION
/* ==========================================================================================
   1. BASE               errors, memory, clock, RNG, threads, files
   What every other section stands on: a failure is a sentence, memory is asked for politely,
   random numbers depend on a seed and nothing else, files are mapped, listed and replaced whole.
   may use: nothing
   ========================================================================================== */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
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
#endif
/* A loop whose iterations write to different places, dealt to the threads in equal runs of neighbours. */
#define SLAM_PARALLEL_FOR SLAM_PRAGMA(omp parallel for schedule(static))

#ifdef __cplusplus
#define SLAM_THREAD_LOCAL thread_local
#else
#define SLAM_THREAD_LOCAL _Thread_local
#endif
#ifdef __GNUC__
#define SLAM_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define SLAM_PRINTF(text, first)
#endif
/* A struct that begins empty: `text t = SLAM_ZERO;` (each language warns about the other's way to say it) */
// clang-format off
#ifdef __cplusplus
#define SLAM_ZERO {}
#else
#define SLAM_ZERO {0}
#endif
// clang-format on

/* ---- errors ---- */

static SLAM_THREAD_LOCAL char error_text[1024];
const char *slam_error(void) { return error_text; }

/* Leaves the sentence and returns 0, the library's "it failed": `return fail("...")`. */
static int SLAM_PRINTF(1, 2) fail(const char *format, ...) {
    char text[sizeof error_text]; // apart, because an argument may be the sentence that stands there
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *c = text; *c; c++) // a name from a hostile file must not speak to the terminal
        if (iscntrl((unsigned char)*c)) *c = '?';
    memcpy(error_text, text, sizeof text);
    return 0;
}

/* ---- memory ---- */

/* Set where memory, or the files that a process may hold open, ran out: then the machine failed, not what was being read. Whoever
   wants to know clears it first. */
static SLAM_THREAD_LOCAL int machine_failed;

static int out_of_memory(size_t n, size_t size) {
    machine_failed = 1;
    return fail("out of memory: %.1f MB were asked for", (double)n * (double)size / 1e6);
}

/* n zeroed elements of `size` bytes; NULL and the sentence where there is no room. */
static void *mem_new(size_t n, size_t size) {
    void *p = NULL;
    if (n == 0) n = 1;
    if (size == 0) size = 1;
    if (n <= SIZE_MAX / 2 / size) p = calloc(n, size);
    if (!p) out_of_memory(n, size);
    return p;
}

/* Room for `need` elements of `size` bytes in *p, which holds *capacity; grows by half at least, so that adding one at a time
   costs constant time each. Returns 0 and leaves *p as it was where there is no room. */
static int mem_grow(void **p, size_t *capacity, size_t need, size_t size) {
    if (need <= *capacity) return 1;
    size_t more = *capacity + *capacity / 2 + 16;
    if (more < need) more = need;
    void *grown = more <= SIZE_MAX / 2 / size ? realloc(*p, more * size) : NULL;
    if (!grown) return out_of_memory(more, size);
    *p = grown;
    *capacity = more;
    return 1;
}

static char *text_copy(const char *text) {
    char *copy = (char *)mem_new(strlen(text) + 1, 1);
    if (copy) memcpy(copy, text, strlen(text));
    return copy;
}

/* Text that grows as it is added to. When memory ends `failed` is set and stays; at[n] is always 0 once something was added. */
typedef struct text {
    char *at;
    size_t n, capacity;
    int failed;
} text;

static void text_add_bytes(text *t, const char *bytes, size_t n) {
    if (t->failed) return;
    if (!mem_grow((void **)&t->at, &t->capacity, t->n + n + 1, 1)) {
        t->failed = 1;
        return;
    }
    memcpy(t->at + t->n, bytes, n);
    t->n += n;
    t->at[t->n] = 0;
}

static void SLAM_PRINTF(2, 3) text_add(text *t, const char *format, ...) {
    char small[512], *big = NULL;
    va_list args;
    va_start(args, format);
    int n = vsnprintf(small, sizeof small, format, args);
    va_end(args);
    if (n >= (int)sizeof small) {
        big = (char *)mem_new((size_t)n + 1, 1);
        if (!big) {
            t->failed = 1;
            return;
        }
        va_start(args, format);
        vsnprintf(big, (size_t)n + 1, format, args);
        va_end(args);
    }
    if (n > 0) text_add_bytes(t, big ? big : small, (size_t)n);
    free(big);
}

static void text_free(text *t) {
    free(t->at);
    memset(t, 0, sizeof *t);
}

/* The formatted text in memory of its own; NULL and the sentence where there is none. */
static char *SLAM_PRINTF(1, 2) text_print(const char *format, ...) {
    char *out = NULL;
    va_list args;
    va_start(args, format);
    const int n = vasprintf(&out, format, args);
    va_end(args);
    if (n >= 0) return out;
    out_of_memory(strlen(format), 1);
    return NULL;
}

/* ---- clock ---- */

double slam_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- random numbers ---- */

/* SplitMix64 (Steele, Lea and Flood 2014): the n-th number is a hash of state + n * gamma. The state is all there is, so a
   stream can be named by mixing numbers into it and never depends on who drew before. */
static uint64_t rng_next(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* The state of a stream of its own for (seed, a, b): e.g. seed, epoch, source. */
static uint64_t rng_stream(uint64_t seed, uint64_t a, uint64_t b) {
    uint64_t s = seed;
    s = rng_next(&s) ^ a;
    s = rng_next(&s) ^ b;
    return rng_next(&s);
}

/* uniform in [0, n), without bias: what lies beyond the last whole multiple of n is drawn again */
static uint64_t rng_below(uint64_t *state, uint64_t n) {
    uint64_t limit = (uint64_t)-1 - (uint64_t)-1 % n, x;
    do x = rng_next(state);
    while (x >= limit);
    return x % n;
}

/* uniform in [0, 1), 53 bits */
static double rng_uniform(uint64_t *state) { return (double)(rng_next(state) >> 11) * 0x1p-53; }

/* standard normal, by Box and Muller (1958) */
static double rng_normal(uint64_t *state) {
    double u = 1 - rng_uniform(state), v = rng_uniform(state);
    return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

/* FNV-1a, 64 bits (Fowler, Noll and Vo): continue with the last result, begin with HASH_START. */
#define HASH_START 0xcbf29ce484222325u
#define HASH_PRIME 0x100000001b3u
static uint64_t hash_bytes(uint64_t hash, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < n; i++) hash = (hash ^ p[i]) * HASH_PRIME;
    return hash;
}

/* ---- threads ---- */

/* How many threads parallel loops use; 0 asks for one a core. Returns what was set. */
static int threads_set(int threads) {
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads(threads);
    return omp_get_max_threads();
#else
    (void)threads;
    return 1;
#endif
}

static int threads_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* which of them this one is, from 0 */
static int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* ---- files ---- */

/* "a/b" in memory of its own */
static char *path_join(const char *folder, const char *name) {
    size_t n = strlen(folder);
    return text_print("%s%s%s", folder, n && folder[n - 1] == '/' ? "" : "/", name);
}

/* the part after the last slash */
static const char *path_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int path_is_file(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

static int path_is_folder(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

static int path_ends(const char *path, const char *end) {
    size_t n = strlen(path), m = strlen(end);
    return n >= m && strcmp(path + n - m, end) == 0;
}

/* Makes the folder and those above it; one that is there already is fine. */
static int make_folders(const char *path) {
    char *p = text_copy(path);
    if (!p) return 0;
    for (char *s = p; *s; s++)
        if (*s == '/' && s > p) {
            *s = 0;
            mkdir(p, 0777);
            *s = '/';
        }
    free(p);
    if (mkdir(path, 0777) != 0 && !path_is_folder(path)) return fail("%s: cannot make this folder: %s", path, strerror(errno));
    return 1;
}

/* A list of names in memory of its own. */
typedef struct names {
    char **at;
    size_t n, capacity;
} names;

static int names_add(names *list, const char *name) {
    char *copy = text_copy(name);
    if (!copy || !mem_grow((void **)&list->at, &list->capacity, list->n + 1, sizeof *list->at)) {
        free(copy);
        return 0;
    }
    list->at[list->n++] = copy;
    return 1;
}

static void names_free(names *list) {
    for (size_t i = 0; i < list->n; i++) free(list->at[i]);
    free(list->at);
    memset(list, 0, sizeof *list);
}

static int names_compare(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* The names in a folder in the order of their bytes, without "." and "..". */
static int folder_list(const char *path, names *list) {
    DIR *folder = opendir(path);
    if (!folder) return fail("%s: cannot list this folder: %s", path, strerror(errno));
    size_t first = list->n;
    int ok = 1;
    for (struct dirent *e; ok && (e = readdir(folder));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) ok = names_add(list, e->d_name);
    closedir(folder);
    if (ok && list->n > first) qsort(list->at + first, list->n - first, sizeof *list->at, names_compare);
    return ok;
}

/* Removes a folder of files and all below it; links are removed, not followed. */
static int remove_tree(const char *path) {
    struct stat s;
    if (lstat(path, &s) != 0) return errno == ENOENT ? 1 : fail("%s: %s", path, strerror(errno));
    if (!S_ISDIR(s.st_mode)) return unlink(path) == 0 ? 1 : fail("%s: cannot be removed: %s", path, strerror(errno));
    names list = SLAM_ZERO;
    int ok = folder_list(path, &list);
    for (size_t i = 0; ok && i < list.n; i++) {
        char *below = path_join(path, list.at[i]);
        ok = below && remove_tree(below);
        free(below);
    }
    names_free(&list);
    if (ok && rmdir(path) != 0) return fail("%s: cannot be removed: %s", path, strerror(errno));
    return ok;
}

/* A whole file as read-only memory, mapped where that is possible and read where it is not (a pipe). */
typedef struct file_map {
    const unsigned char *data;
    size_t size;
    int mapped;
} file_map;

static int map_read_pipe(file_map *map, const char *path, int fd) {
    text t = SLAM_ZERO;
    char block[65536];
    ssize_t n;
    while ((n = read(fd, block, sizeof block)) > 0) text_add_bytes(&t, block, (size_t)n);
    if (n < 0 || t.failed) {
        if (n < 0) fail("%s: %s", path, strerror(errno));
        text_free(&t);
        return 0;
    }
    map->data = (const unsigned char *)t.at;
    map->size = t.n;
    return 1;
}

/* `fail` for a call that left errno */
static int map_fail(const char *path, const char *what) {
    machine_failed |= errno == ENOMEM || errno == EMFILE || errno == ENFILE;
    return fail("%s: %s: %s", path, what, strerror(errno));
}

static int map_open(file_map *map, const char *path) {
    memset(map, 0, sizeof *map);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat s;
    if (fd < 0) return map_fail(path, "cannot be opened");
    int ok = fstat(fd, &s) == 0;
    if (!ok) {
        fail("%s: %s", path, strerror(errno));
    } else if (S_ISDIR(s.st_mode)) {
        ok = fail("%s: is a folder, expected a file", path);
    } else if (!S_ISREG(s.st_mode)) {
        ok = map_read_pipe(map, path, fd);
    } else if (s.st_size > 0) {
        void *p = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        ok = p != MAP_FAILED;
        if (!ok) map_fail(path, "cannot be mapped");
        if (ok) {
            map->data = (const unsigned char *)p;
            map->size = (size_t)s.st_size;
            map->mapped = 1;
        }
    }
    close(fd);
    return ok;
}

static void map_close(file_map *map) {
    if (map->mapped) munmap((void *)(uintptr_t)map->data, map->size);
    else free((void *)(uintptr_t)map->data);
    memset(map, 0, sizeof *map);
}

/* Ends a file that was being written: flushed, on the disk, closed. A full disk shows itself here at the latest. */
static int file_finish(FILE *f, const char *path) {
    int ok = !ferror(f);
    ok = fflush(f) == 0 && ok;
    ok = fsync(fileno(f)) == 0 && ok;
    int why = errno;
    ok = fclose(f) == 0 && ok;
    return ok ? 1 : fail("%s: cannot be written: %s", path, strerror(why ? why : EIO));
}

/* What was renamed or made in a folder is on the disk only when the folder itself is. */
static int folder_sync(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail("%s: %s", path, strerror(errno));
    int ok = fsync(fd) == 0 || errno == EINVAL; // some file systems cannot sync a folder, and say so
    close(fd);
    return ok ? 1 : fail("%s: cannot be synced: %s", path, strerror(errno));
}

/* ---- files written as PATH.part and renamed when whole ---- */

/* Opens PATH.part and leaves its name in memory of its own; NULL and the sentence. What is no file (/dev/stdout, a pipe) is written
   as it is, and has no part. */
static FILE *part_open(const char *path, char **part) {
    struct stat s;
    const int whole = stat(path, &s) == 0 && !S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode);
    *part = whole ? text_copy(path) : text_print("%s.part", path);
    FILE *f = *part ? fopen(*part, "wb") : NULL;
    if (f && whole) {
        free(*part);
        *part = NULL;
    }
    if (f) return f;
    if (*part) fail("%s: cannot be written: %s", path, strerror(errno));
    free(*part);
    *part = NULL;
    return NULL;
}

/* Syncs, closes and renames, or, where not `ok`, removes. Frees `part`. */
static int part_close(FILE *f, const char *path, char *part, int ok) {
    if (!part) return (fclose(f) == 0 || fail("%s: cannot be written: %s", path, strerror(errno))) && ok;
    if (ok) ok = file_finish(f, path);
    else fclose(f);
    if (ok && rename(part, path) != 0) ok = fail("%s: cannot be renamed into place: %s", path, strerror(errno));
    if (!ok) unlink(part);
    free(part);
    return ok;
}

static int part_write(FILE *f, const char *path, const void *data, size_t n) {
    return n == 0 || fwrite(data, 1, n, f) == n ? 1 : fail("%s: cannot be written: %s", path, strerror(errno));
}

/* Writes a whole file, so that PATH is never half written. */
static int file_write(const char *path, const void *data, size_t n) {
    char *part;
    FILE *f = part_open(path, &part);
    return f && part_close(f, path, part, part_write(f, path, data, n));
}

/* ==========================================================================================
   2. FORMATS            JSON, CSV, safetensors, npy, token shards, JSONL units, audio files
   Readers and writers of files that others made or will read. Whatever a file holds, a reader returns what it says or
   a sentence: every length is held against what is there before it is used. Files are little-endian, as are the machines.
   may use: 1 base
   ========================================================================================== */

/* ---- JSON (RFC 8259) ---- */

typedef enum json_type { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } json_type;
typedef struct json {
    json_type type;
    double number;
    const char *string;        // unescaped UTF-8; of a number: as the file spells it
    size_t n;                  // bytes of string, or members
    const char *key;           // of a member of an object
    struct json *first, *next; // first member, next one of the same array or object
} json;

/* A parsed text: its root, the nodes in blocks (the first of each only points to the block before), all strings in one piece. */
typedef struct json_tree {
    json root, *blocks;
    char *strings;
} json_tree;

typedef struct json_reader {
    const char *text, *at, *end, *what;
    json_tree *tree;
    char *strings;     // where the next string goes
    size_t used, room; // nodes of the newest block
    int depth;
} json_reader;

#define JSON_DEPTH 64
#define JSON_SIZE  100000000 // the largest header that the safetensors library takes, and more than any other JSON file needs

/* Bytes of the UTF-8 character that begins at s, of which n > 0 are there; 0 where it is none (RFC 3629). */
static size_t utf8_length(const char *at, size_t n) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *s = (const unsigned char *)at;
    if (s[0] < 0x80) return 1;
    const size_t length = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    if (s[0] < 0xc2 || s[0] > 0xf4 || length > n) return 0;
    uint32_t code = s[0] & (0xffu >> (length + 1));
    for (size_t k = 1; k < length; k++) {
        if ((s[k] & 0xc0) != 0x80) return 0;
        code = code << 6 | (s[k] & 0x3fu);
    }
    return code >= least[length] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? length : 0;
}

/* Writes the character as UTF-8 and returns its bytes. */
static size_t utf8_put(char *out, uint32_t code) {
    const size_t length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t k = length; k-- > 1; code >>= 6) out[k] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)(length == 1 ? code : (0xf00u >> length & 0xf0) | code);
    return length;
}

/* "what: line 3, byte 14: sentence"; the line where there are several */
static int SLAM_PRINTF(2, 3) json_fail(const json_reader *r, const char *format, ...) {
    char sentence[300], line[32] = "";
    size_t lines = 1;
    const char *start = r->text;
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    for (const char *p = r->text; p < r->at; p++)
        if (*p == '\n') {
            lines++;
            start = p + 1;
        }
    if (lines > 1) snprintf(line, sizeof line, "line %zu, ", lines);
    return fail("%s: %sbyte %zu: %s", r->what, line, (size_t)(r->at - start) + 1, sentence);
}

static int json_expected(const json_reader *r, const char *expected) {
    if (r->at == r->end) return json_fail(r, "found the end, expected %s", expected);
    if (*r->at > ' ' && *r->at < 127) return json_fail(r, "found '%c', expected %s", *r->at, expected);
    return json_fail(r, "found byte 0x%02x, expected %s", (unsigned char)*r->at, expected);
}

/* The next character that is not white space; -1 at the end. */
static int json_peek(json_reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t')) r->at++;
    return r->at < r->end ? (unsigned char)*r->at : -1;
}

static json *json_new(json_reader *r) {
    if (r->used == r->room) {
        const size_t rest = (size_t)(r->end - r->at) / 4 + 16; // numbers of a few digits, so that one block holds most lines
        json *nodes = (json *)mem_new(rest < 16384 ? rest : 16384, sizeof *nodes);
        if (!nodes) return NULL;
        nodes->next = r->tree->blocks;
        r->tree->blocks = nodes;
        r->used = 1;
        r->room = rest < 16384 ? rest : 16384;
    }
    return &r->tree->blocks[r->used++];
}

/* \uXXXX, of which the backslash is read; two of them for a character beyond the 16 bits. */
static int json_unicode(json_reader *r, uint32_t *code) {
    uint32_t unit[2] = {0, 0};
    for (int u = 0; u < 2; u++) {
        if (r->at == r->end || *r->at != 'u') return json_expected(r, "the second half of a surrogate pair");
        r->at++;
        for (int k = 0; k < 4; k++, r->at++) {
            const int c = r->at < r->end ? (unsigned char)*r->at : 0;
            if (!isxdigit(c)) return json_expected(r, "four hexadecimal digits");
            unit[u] = unit[u] << 4 | (uint32_t)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
        }
        if (u == 0 && (unit[0] < 0xd800 || unit[0] > 0xdfff)) {
            *code = unit[0];
            return unit[0] ? 1 : json_fail(r, "the character \\u0000, which no name or path can hold");
        }
        if (u == 0 && (r->at == r->end || *r->at++ != '\\')) return json_fail(r, "half of a surrogate pair");
    }
    if (unit[0] > 0xdbff || unit[1] < 0xdc00 || unit[1] > 0xdfff) return json_fail(r, "half of a surrogate pair");
    *code = 0x10000 + ((unit[0] & 0x3ff) << 10) + (unit[1] & 0x3ff);
    return 1;
}

static int json_escape(json_reader *r, char **out) {
    static const char names[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    uint32_t code = 0;
    r->at++;
    const char *found = r->at < r->end && *r->at ? strchr(names, *r->at) : NULL;
    if (found) {
        *(*out)++ = meant[found - names];
        r->at++;
        return 1;
    }
    if (r->at == r->end || *r->at != 'u') return json_expected(r, "one of \"\\/bfnrtu after a backslash");
    if (!json_unicode(r, &code)) return 0;
    *out += utf8_put(*out, code);
    return 1;
}

/* The string whose opening quote is next. Unescaped it is never longer than it stands there. */
static int json_string(json_reader *r, const char **string, size_t *n) {
    char *out = r->strings;
    r->at++;
    for (;;) {
        const char *run = r->at;
        while (r->at < r->end && (signed char)*r->at >= ' ' && *r->at != '"' && *r->at != '\\') r->at++;
        memcpy(out, run, (size_t)(r->at - run));
        out += r->at - run;
        if (r->at == r->end) return json_expected(r, "the closing quote of a string");
        if (*r->at == '"') break;
        if (*r->at == '\\') {
            if (!json_escape(r, &out)) return 0;
            continue;
        }
        const size_t length = utf8_length(r->at, (size_t)(r->end - r->at));
        if (length == 0) return json_fail(r, "byte 0x%02x is not UTF-8 here", (unsigned char)*r->at);
        if (length == 1) return json_fail(r, "a bare control character 0x%02x in a string", (unsigned char)*r->at);
        memcpy(out, r->at, length);
        out += length;
        r->at += length;
    }
    r->at++;
    *string = r->strings;
    *n = (size_t)(out - r->strings);
    *out++ = 0;
    r->strings = out;
    return 1;
}

static int json_digits(json_reader *r) {
    if (r->at == r->end || (unsigned)(*r->at - '0') > 9) return json_expected(r, "a digit");
    while (r->at < r->end && (unsigned)(*r->at - '0') <= 9) r->at++;
    return 1;
}

/* The double nearest to a number as JSON spells it. Whole numbers below 2^53 times or over a power of ten that is itself exact
   need one rounding (Clinger 1990); others go to strtod as digits and an exponent, without the point that depends on the locale. */
static double number_from_text(const char *s) {
    static const double ten[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    char plain[1100], *p = plain;
    const int negative = *s == '-';
    long exponent = 0;
    uint64_t whole = 0;
    int point = 0;
    for (s += negative; (unsigned)(*s - '0') <= 9 || *s == '.'; s++) {
        if (*s == '.') {
            point = 1;
        } else {
            if (whole < (uint64_t)1 << 54) whole = whole * 10 + (uint64_t)(*s - '0');
            exponent -= point;
            *p++ = *s;
        }
    }
    if (*s) {
        const long spelled = strtol(s + 1, NULL, 10);
        exponent += spelled > 100000 ? 100000 : spelled < -100000 ? -100000 : spelled;
    }
    double x;
    if (whole <= (uint64_t)1 << 53 && labs(exponent) <= 22) {
        x = exponent < 0 ? (double)whole / ten[-exponent] : (double)whole * ten[exponent];
    } else {
        snprintf(p, 24, "e%ld", exponent);
        x = strtod(plain, NULL);
    }
    return negative ? -x : x;
}

static int json_read_number(json_reader *r, json *j) {
    const char *start = r->at;
    r->at += *r->at == '-';
    if (r->at < r->end && *r->at == '0') r->at++; // nothing may follow a leading zero
    else if (!json_digits(r)) return 0;
    if (r->at < r->end && *r->at == '.') {
        r->at++;
        if (!json_digits(r)) return 0;
    }
    if (r->at < r->end && (*r->at == 'e' || *r->at == 'E')) {
        r->at++;
        if (r->at < r->end && (*r->at == '+' || *r->at == '-')) r->at++;
        if (!json_digits(r)) return 0;
    }
    j->type = JSON_NUMBER;
    j->n = (size_t)(r->at - start);
    j->string = r->strings;
    if (j->n > 1000) return json_fail(r, "a number of %zu characters, at most 1000 are read", j->n);
    memcpy(r->strings, start, j->n);
    r->strings[j->n] = 0;
    r->strings += j->n + 1;
    j->number = number_from_text(j->string);
    return isfinite(j->number) ? 1 : json_fail(r, "the number %.40s is beyond a double", j->string);
}

static int json_compare_keys(const void *a, const void *b) { return strcmp((*(json *const *)a)->key, (*(json *const *)b)->key); }

/* Equal keys are found by sorting, so that an object of a million members costs no more than reading it. */
static int json_keys_differ(const json_reader *r, const json *object) {
    const json *few[16], **sorted = few;
    size_t n = 0;
    int ok = 1;
    if (object->n > 16) sorted = (const json **)mem_new(object->n, sizeof *sorted);
    if (!sorted) return 0;
    for (const json *j = object->first; j; j = j->next) sorted[n++] = j;
    qsort((void *)sorted, n, sizeof *sorted, json_compare_keys);
    for (size_t i = 1; ok && i < n; i++)
        if (strcmp(sorted[i - 1]->key, sorted[i]->key) == 0)
            ok = json_fail(r, "the key '%.100s' stands twice in an object", sorted[i]->key);
    if (sorted != few) free((void *)sorted);
    return ok;
}

static int json_value(json_reader *r, json *j);

/* The members of an array or object, of which the opening bracket is next. */
static int json_members(json_reader *r, json *j, char close) {
    json **link = &j->first;
    size_t length;
    j->type = close == '}' ? JSON_OBJECT : JSON_ARRAY;
    if (++r->depth > JSON_DEPTH) return json_fail(r, "nested deeper than %d", JSON_DEPTH);
    r->at++;
    int next = json_peek(r);
    while (next != close) {
        json *member = json_new(r);
        if (!member) return 0;
        if (close == '}') {
            if (json_peek(r) != '"') return json_expected(r, "a key in quotes");
            if (!json_string(r, &member->key, &length)) return 0;
            if (json_peek(r) != ':') return json_expected(r, "':' after a key");
            r->at++;
        }
        if (!json_value(r, member)) return 0;
        *link = member;
        link = &member->next;
        j->n++;
        next = json_peek(r);
        if (next == close) break;
        if (next != ',') return json_expected(r, close == '}' ? "',' or '}'" : "',' or ']'");
        r->at++;
        if (json_peek(r) == close) return json_expected(r, "another member after ','");
    }
    r->at++;
    r->depth--;
    return close == ']' || json_keys_differ(r, j);
}

static int json_value(json_reader *r, json *j) {
    static const char *const words[] = {"null", "false", "true"}; // in the order of json_type
    const int c = json_peek(r);
    if (c == '{') return json_members(r, j, '}');
    if (c == '[') return json_members(r, j, ']');
    if (c == '"') {
        j->type = JSON_STRING;
        return json_string(r, &j->string, &j->n);
    }
    if (c == '-' || (c >= '0' && c <= '9')) return json_read_number(r, j);
    for (int w = 0; w < 3; w++) {
        const size_t n = strlen(words[w]);
        if ((size_t)(r->end - r->at) >= n && memcmp(r->at, words[w], n) == 0) {
            j->type = (json_type)w;
            r->at += n;
            return 1;
        }
    }
    return json_expected(r, "a value");
}

static void json_free(json *root) {
    json_tree *tree = (json_tree *)(void *)root; // a tree begins with its root
    if (!tree) return;
    for (json *nodes = tree->blocks, *before; nodes; nodes = before) {
        before = nodes->next;
        free(nodes);
    }
    free(tree->strings);
    free(tree);
}

/* The value that n bytes of text spell, to be freed with json_free; NULL and a sentence that begins with `what`. Strict: UTF-8, no
   key twice in an object, no number beyond a double, nothing after the end; and no \u0000, so that strings are C's. */
static json *json_parse(const char *text, size_t n, const char *what) {
    json_reader r = SLAM_ZERO;
    r.text = r.at = n ? text : ""; // an empty file is mapped nowhere
    r.end = r.text + n;
    r.what = what;
    if (n > JSON_SIZE) {
        fail("%s: %zu bytes of JSON, at most %d are read", what, n, JSON_SIZE);
        return NULL;
    }
    r.tree = (json_tree *)mem_new(1, sizeof *r.tree);
    if (!r.tree) return NULL;
    // a string loses its quotes and gains a zero; a number only gains one, where what ends it stood
    r.strings = r.tree->strings = (char *)malloc(n + 1);
    int ok = r.strings ? 1 : fail("%s: out of memory", what);
    ok = ok && json_value(&r, &r.tree->root);
    if (ok && json_peek(&r) >= 0) ok = json_expected(&r, "nothing more");
    if (ok) return &r.tree->root;
    json_free(&r.tree->root);
    return NULL;
}

static json *json_read(const char *path) {
    file_map map;
    if (!map_open(&map, path)) return NULL;
    json *root = json_parse((const char *)map.data, map.size, path);
    map_close(&map);
    return root;
}

/* The member of that name; NULL where there is none or `object` is none. */
static const json *json_get(const json *object, const char *key) {
    if (!object || object->type != JSON_OBJECT) return NULL;
    for (const json *j = object->first; j; j = j->next)
        if (strcmp(j->key, key) == 0) return j;
    return NULL;
}

static const char *json_describe(const json *j) {
    static const char *const names[] = {"null", "false", "true", "", "a string", "an array", "an object"};
    return j->type == JSON_NUMBER ? j->string : names[j->type];
}

/* Whether it is a whole number that a double holds for certain. */
static int json_whole(const json *j) {
    return j->type == JSON_NUMBER && fabs(j->number) <= 0x1p53 && j->number == floor(j->number);
}

/* A whole number in [min, max] (both within 2^53), a number in [min, max], true or false. Absent or null: 1, and *out stays as it
   was. 0 and the sentence where the member is of another kind or out of range. */
static int json_int(const json *object, const char *key, const char *what, long min, long max, long *out) {
    const json *j = json_get(object, key);
    if (!j || j->type == JSON_NULL) return 1;
    if (!json_whole(j) || j->number < (double)min || j->number > (double)max)
        return fail("%s: '%s' is %.60s, expected a whole number from %ld to %ld", what, key, json_describe(j), min, max);
    *out = (long)j->number;
    return 1;
}

static int json_real(const json *object, const char *key, const char *what, double min, double max, double *out) {
    const json *j = json_get(object, key);
    if (!j || j->type == JSON_NULL) return 1;
    if (j->type != JSON_NUMBER || j->number < min || j->number > max)
        return fail("%s: '%s' is %.60s, expected a number from %g to %g", what, key, json_describe(j), min, max);
    *out = j->number;
    return 1;
}

static int json_flag(const json *object, const char *key, const char *what, int *out) {
    const json *j = json_get(object, key);
    if (!j || j->type == JSON_NULL) return 1;
    if (j->type != JSON_TRUE && j->type != JSON_FALSE)
        return fail("%s: '%s' is %.60s, expected true or false", what, key, json_describe(j));
    *out = j->type == JSON_TRUE;
    return 1;
}

/* The member's string; `fallback` where it is absent or no string. */
static const char *json_text(const json *object, const char *key, const char *fallback) {
    const json *j = json_get(object, key);
    return j && j->type == JSON_STRING ? j->string : fallback;
}

/* A JSON string in quotes. Bytes that are not UTF-8 (a file's name may hold any) become U+FFFD. */
static void text_add_json(text *t, const char *utf8) {
    size_t n = strlen(utf8);
    text_add_bytes(t, "\"", 1);
    while (n > 0) {
        const size_t length = utf8_length(utf8, n);
        if (*utf8 == '"' || *utf8 == '\\') {
            text_add_bytes(t, "\\", 1);
            text_add_bytes(t, utf8, 1);
        } else if (*utf8 == '\n') text_add_bytes(t, "\\n", 2);
        else if (*utf8 == '\t') text_add_bytes(t, "\\t", 2);
        else if (length == 1 && *utf8 < ' ') text_add(t, "\\u%04x", (unsigned)*utf8);
        else if (length == 0) text_add_bytes(t, "\xef\xbf\xbd", 3);
        else text_add_bytes(t, utf8, length);
        utf8 += length ? length : 1;
        n -= length ? length : 1;
    }
    text_add_bytes(t, "\"", 1);
}

/* The shortest spelling that reads back as the same double; null where it is not finite, for which JSON has no word. */
static void text_add_number(text *t, double x) {
    char spelled[40], digits[20];
    if (!isfinite(x)) {
        text_add(t, "null");
        return;
    }
    // 15 digits survive the way through a double (not a subnormal one), so trailing zeros of 15 can go; 17 tell any two apart
    for (int precision = fabs(x) < 0x1p-1022 ? 1 : 15; precision <= 17; precision++) {
        snprintf(spelled, sizeof spelled, "%.*e", precision - 1, fabs(x));
        if (strtod(spelled, NULL) == fabs(x)) break;
    }
    int n = 0;
    const char *p = spelled;
    for (; *p != 'e'; p++)
        if (*p >= '0' && *p <= '9') digits[n++] = *p; // the point between them depends on the locale
    const int exponent = atoi(p + 1);
    while (n > 1 && digits[n - 1] == '0') n--;
    if (signbit(x)) text_add_bytes(t, "-", 1);
    if (exponent < -5 || exponent > 15) {
        text_add(t, "%.1s%s%.*se%d", digits, n > 1 ? "." : "", n - 1, digits + 1, exponent);
    } else if (exponent < 0) {
        text_add(t, "0.%.*s%.*s", -exponent - 1, "00000", n, digits);
    } else if (n <= exponent + 1) {
        text_add(t, "%.*s%.*s", n, digits, exponent + 1 - n, "0000000000000000");
    } else {
        text_add(t, "%.*s.%.*s", exponent + 1, digits, n - exponent - 1, digits + exponent + 1);
    }
}

/* ---- safetensors ----
   8 bytes: n, the header's length. n bytes: the header, a JSON object, blanks at its end allowed:
       {"__metadata__": {"format": "pt", ...}, "NAME": {"dtype": "F32", "shape": [2,3], "data_offsets": [begin, end]}, ...}
   Then the data in row order; offsets count from their first byte; tensors neither overlap nor leave gaps.
   A large model is several such files and model.safetensors.index.json, {"weight_map": {"NAME": "FILE", ...}}. */

enum { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_F64, DTYPE_I32, DTYPE_I64, DTYPE_U8 }; // then those that are only passed over
static const struct {
    const char *name;
    unsigned bytes;
} dtypes[] = {{"F32", 4}, {"F16", 2},     {"BF16", 2},    {"F64", 8},     {"I32", 4}, {"I64", 8},
              {"U8", 1},  {"I8", 1},      {"BOOL", 1},    {"I16", 2},     {"U16", 2}, {"U32", 4},
              {"U64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"C64", 8}};

typedef struct tensor {
    const char *name;
    int dtype, rank;
    size_t shape[8], count;
    const unsigned char *data; // maybe unaligned
    const char *file;
} tensor;

typedef struct tensor_file {
    char *path;
    file_map map;
    json *header; // names of tensors point into it
} tensor_file;

typedef struct tensors {
    tensor_file *file;
    tensor *list;
    const tensor **by_name;
    size_t files, file_capacity, n, capacity;
} tensors;

static void tensors_close(tensors *t) {
    if (!t) return;
    for (size_t i = 0; i < t->files; i++) {
        map_close(&t->file[i].map);
        json_free(t->file[i].header);
        free(t->file[i].path);
    }
    free(t->file);
    free(t->list);
    free((void *)t->by_name);
    free(t);
}

/* A whole number of at most 2^53 */
static int json_size(const json *j, size_t *out) {
    if (!j || !json_whole(j) || j->number < 0) return 0;
    *out = (size_t)j->number;
    return 1;
}

/* One entry of a header; `data` are the `size` bytes behind the header. */
static int tensor_from_json(tensor *t, const json *entry, const unsigned char *data, size_t size, const char *path) {
    const json *shape = json_get(entry, "shape"), *offsets = json_get(entry, "data_offsets");
    const char *dtype = json_text(entry, "dtype", NULL);
    const int known = (int)(sizeof dtypes / sizeof *dtypes);
    size_t begin, end;
    t->name = entry->key;
    t->file = path;
    if (!dtype) return fail("%s: tensor '%s' has no dtype", path, t->name);
    while (t->dtype < known && strcmp(dtypes[t->dtype].name, dtype)) t->dtype++;
    if (t->dtype == known) return fail("%s: tensor '%s' has the unknown dtype '%.40s'", path, t->name, dtype);
    if (!shape || shape->type != JSON_ARRAY) return fail("%s: tensor '%s' has no shape", path, t->name);
    if (shape->n > 8) return fail("%s: tensor '%s' has %zu dimensions, expected at most 8", path, t->name, shape->n);
    t->count = 1;
    for (const json *j = shape->first; j; j = j->next) {
        size_t length = 0;
        if (!json_size(j, &length)) return fail("%s: tensor '%s' has a dimension of %.40s", path, t->name, json_describe(j));
        if (length && t->count > ((size_t)1 << 56) / length)
            return fail("%s: tensor '%s' has a shape beyond any memory", path, t->name);
        t->shape[t->rank++] = length;
        t->count *= length;
    }
    if (!offsets || offsets->type != JSON_ARRAY || offsets->n != 2 || !json_size(offsets->first, &begin) ||
        !json_size(offsets->first->next, &end))
        return fail("%s: tensor '%s' has no data_offsets of two whole numbers", path, t->name);
    if (begin > end || end > size)
        return fail("%s: tensor '%s' lies at %zu to %zu, expected within the file's %zu bytes of data", path, t->name, begin, end,
                    size);
    if (end - begin != t->count * dtypes[t->dtype].bytes)
        return fail("%s: tensor '%s' has %zu bytes, expected %zu numbers of %s", path, t->name, end - begin, t->count, dtype);
    t->data = data + begin;
    return 1;
}

static size_t tensor_bytes(const tensor *t) { return t->count * dtypes[t->dtype].bytes; }

static int tensor_compare_places(const void *a, const void *b) {
    const tensor *x = *(const tensor *const *)a, *y = *(const tensor *const *)b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return tensor_bytes(x) < tensor_bytes(y) ? -1 : tensor_bytes(x) > tensor_bytes(y);
}

static int tensor_compare_names(const void *a, const void *b) {
    return strcmp((*(const tensor *const *)a)->name, (*(const tensor *const *)b)->name);
}

/* The n tensors of one file lie one behind the other and fill its data. */
static int tensors_fill(const tensor *list, size_t n, const unsigned char *data, size_t size, const char *path) {
    const tensor **sorted = (const tensor **)mem_new(n, sizeof *sorted);
    size_t at = 0;
    int ok = sorted != NULL;
    for (size_t i = 0; ok && i < n; i++) sorted[i] = &list[i];
    if (ok) qsort((void *)sorted, n, sizeof *sorted, tensor_compare_places);
    for (size_t i = 0; ok && i < n; i++) {
        const size_t begin = (size_t)(sorted[i]->data - data);
        if (begin != at)
            ok = fail("%s: tensor '%s' begins at byte %zu of the data, expected %zu: %s", path, sorted[i]->name, begin, at,
                      begin < at ? "it overlaps another" : "there is a gap before it");
        at = begin + tensor_bytes(sorted[i]);
    }
    if (ok && at != size) ok = fail("%s: its tensors end at byte %zu of %zu bytes of data", path, at, size);
    free((void *)sorted);
    return ok;
}

/* Reads the header of the newest file, whose bytes are there. */
static int tensors_parse(tensors *t) {
    tensor_file *file = &t->file[t->files - 1];
    const char *path = file->path;
    const size_t first = t->n, size = file->map.size;
    uint64_t n;
    if (size < 8) return fail("%s: %zu bytes, which is no safetensors file", path, size);
    memcpy(&n, file->map.data, 8);
    if (n > JSON_SIZE)
        return fail("%s: a header of %llu bytes, expected at most %d; is this a safetensors file?", path, (unsigned long long)n,
                    JSON_SIZE);
    if (n > size - 8)
        return fail("%s: a header of %llu bytes, but only %zu follow: the file is cut short", path, (unsigned long long)n,
                    size - 8);
    if (n == 0 || file->map.data[8] != '{') return fail("%s: its header does not begin with '{'", path);
    file->header = json_parse((const char *)file->map.data + 8, (size_t)n, path);
    if (!file->header) return 0;
    const unsigned char *data = file->map.data + 8 + n;
    if (!mem_grow((void **)&t->list, &t->capacity, t->n + file->header->n + 1, sizeof *t->list)) return 0;
    for (const json *j = file->header->first; j; j = j->next) {
        if (strcmp(j->key, "__metadata__") == 0) {
            if (j->type != JSON_OBJECT) return fail("%s: __metadata__ is %.60s, expected an object", path, json_describe(j));
            for (const json *m = j->first; m; m = m->next)
                if (m->type != JSON_STRING)
                    return fail("%s: __metadata__ '%s' is %.60s, expected a string", path, m->key, json_describe(m));
        } else {
            memset(&t->list[t->n], 0, sizeof *t->list);
            if (!tensor_from_json(&t->list[t->n], j, data, size - 8 - (size_t)n, path)) return 0;
            t->n++;
        }
    }
    return tensors_fill(t->list + first, t->n - first, data, size - 8 - (size_t)n, path);
}

/* Takes the bytes of one file over, also where it fails. */
static int tensors_add(tensors *t, const char *path, file_map *map) {
    char *copy = text_copy(path);
    if (!copy || !mem_grow((void **)&t->file, &t->file_capacity, t->files + 1, sizeof *t->file)) {
        free(copy);
        map_close(map);
        return 0;
    }
    tensor_file *file = &t->file[t->files++];
    file->path = copy;
    file->map = *map;
    file->header = NULL;
    return tensors_parse(t);
}

static int tensors_add_path(tensors *t, const char *path) {
    file_map map;
    return map_open(&map, path) && tensors_add(t, path, &map);
}

/* Sorts by name, when all files are there; the same name in two of them is an error. */
static int tensors_sort(tensors *t) {
    t->by_name = (const tensor **)mem_new(t->n, sizeof *t->by_name);
    if (!t->by_name) return 0;
    for (size_t i = 0; i < t->n; i++) t->by_name[i] = &t->list[i];
    qsort((void *)t->by_name, t->n, sizeof *t->by_name, tensor_compare_names);
    for (size_t i = 1; i < t->n; i++) {
        const tensor *a = t->by_name[i - 1], *b = t->by_name[i];
        if (strcmp(a->name, b->name) == 0) return fail("%s: tensor '%s' is also in %s", a->file, a->name, b->file);
    }
    return 1;
}

static size_t tensors_count(const tensors *t) { return t->n; }
static const tensor *tensors_at(const tensors *t, size_t i) { return &t->list[i]; }

static const tensor *tensors_find(const tensors *t, const char *name) {
    tensor wanted = SLAM_ZERO;
    const tensor *key = &wanted;
    wanted.name = name;
    const void *found = bsearch(&key, t->by_name, t->n, sizeof *t->by_name, tensor_compare_names);
    return found ? *(const tensor *const *)found : NULL;
}

/* What the (first) file's __metadata__ says of `key`, or NULL. */
static const char *tensors_metadata(const tensors *t, const char *key) {
    return t->files ? json_text(json_get(t->file[0].header, "__metadata__"), key, NULL) : NULL;
}

/* Opens the file that an entry of the index names, if it is not open yet. It lies beside the index: nothing leads out of the
   folder. */
static int tensors_add_shard(tensors *t, const char *folder, const json *entry, const char *index) {
    if (entry->type != JSON_STRING)
        return fail("%s: tensor '%s' is in %.60s, expected a file's name", index, entry->key, json_describe(entry));
    if (!entry->n || strchr(entry->string, '/') || strcmp(entry->string, ".") == 0 || strcmp(entry->string, "..") == 0)
        return fail("%s: tensor '%s' is in '%s', expected a file in the same folder", index, entry->key, entry->string);
    for (size_t i = t->files; i-- > 0;)
        if (strcmp(path_name(t->file[i].path), entry->string) == 0) return 1;
    char *path = path_join(folder, entry->string);
    int ok = path != NULL;
    if (ok && !path_is_file(path)) ok = fail("%s: the shard '%s' that it names is not there", index, entry->string);
    ok = ok && tensors_add_path(t, path);
    free(path);
    return ok;
}

static int tensors_add_index(tensors *t, const char *folder, const char *index) {
    json *root = json_read(index);
    const json *map = json_get(root, "weight_map");
    int ok = root != NULL;
    if (ok && (!map || map->type != JSON_OBJECT)) ok = fail("%s: no weight_map, which names the file of each tensor", index);
    for (const json *j = ok ? map->first : NULL; ok && j; j = j->next) ok = tensors_add_shard(t, folder, j, index);
    ok = ok && tensors_sort(t);
    for (const json *j = ok ? map->first : NULL; ok && j; j = j->next) {
        const tensor *found = tensors_find(t, j->key);
        if (!found || strcmp(path_name(found->file), j->string))
            ok = fail("%s: tensor '%s' is not in '%s', where it should be", index, j->key, j->string);
    }
    json_free(root);
    return ok;
}

static int tensors_add_folder(tensors *t, const char *folder) {
    char *single = path_join(folder, "model.safetensors"), *index = path_join(folder, "model.safetensors.index.json");
    char *pickled = path_join(folder, "pytorch_model.bin");
    int ok = single && index && pickled;
    if (ok && path_is_file(single)) ok = tensors_add_path(t, single) && tensors_sort(t);
    else if (ok && path_is_file(index)) ok = tensors_add_index(t, folder, index);
    else if (ok && path_is_file(pickled))
        ok = fail(
            "%s: only pytorch_model.bin is here, which can hold programs and is not read; convert it, in this folder, by python3 -c \"import torch, "
            "safetensors.torch as s; s.save_file({k: v.clone().contiguous() for k, v in torch.load('pytorch_model.bin', "
            "map_location='cpu', weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})\"",
            folder);
    else if (ok) ok = fail("%s: neither model.safetensors nor model.safetensors.index.json is in this folder", folder);
    free(single);
    free(index);
    free(pickled);
    return ok;
}

/* The tensors of a model's folder, or of one .safetensors file; NULL and the sentence where something is wrong with any of them. */
static tensors *tensors_open(const char *path) {
    tensors *t = (tensors *)mem_new(1, sizeof *t);
    if (!t) return NULL;
    if (path_is_folder(path) ? tensors_add_folder(t, path) : tensors_add_path(t, path) && tensors_sort(t)) return t;
    tensors_close(t);
    return NULL;
}

static void text_add_shape(text *t, int rank, const size_t *shape) {
    text_add(t, "(");
    for (int k = 0; k < rank; k++) text_add(t, "%s%zu", k ? "," : "", shape[k]);
    text_add(t, ")");
}

/* Whether the shape is (a) or (a,b), as `rank` says. */
static int tensor_shape_is(const tensor *t, int rank, size_t a, size_t b) {
    const size_t shape[2] = {a, b};
    text found = SLAM_ZERO, expected = SLAM_ZERO;
    if (t->rank == rank && (rank < 1 || t->shape[0] == a) && (rank < 2 || t->shape[1] == b)) return 1;
    text_add_shape(&found, t->rank, t->shape);
    text_add_shape(&expected, rank, shape);
    if (!found.failed && !expected.failed)
        fail("%s: tensor '%s' has shape %s, expected %s", t->file, t->name, found.at, expected.at);
    text_free(&found);
    text_free(&expected);
    return 0;
}

static float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* IEEE half: sign, 5 bits of exponent (bias 15), 10 of fraction; exact as a float. */
static float float_from_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | fraction << 13);
    return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* n numbers from `first` on, as floats. bfloat16 is the upper half of a float; a double beyond a float's range becomes infinite. */
static int tensor_floats(const tensor *t, float *out, size_t first, size_t n) {
    const unsigned char *data = t->data;
    uint16_t half;
    double x;
    if (t->dtype > DTYPE_F64)
        return fail("%s: tensor '%s' is %s, expected F32, F16, BF16 or F64", t->file, t->name, dtypes[t->dtype].name);
    if (first > t->count || n > t->count - first)
        return fail("%s: tensor '%s' has %zu numbers, not %zu from %zu on", t->file, t->name, t->count, n, first);
    if (n == 0) return 1;
    data += first * dtypes[t->dtype].bytes;
    if (t->dtype == DTYPE_F32) memcpy(out, data, n * sizeof *out);
    for (size_t i = 0; t->dtype == DTYPE_F16 && i < n; i++) {
        memcpy(&half, data + 2 * i, sizeof half);
        out[i] = float_from_f16(half);
    }
    for (size_t i = 0; t->dtype == DTYPE_BF16 && i < n; i++) {
        memcpy(&half, data + 2 * i, sizeof half);
        out[i] = float_from_bits((uint32_t)half << 16);
    }
    for (size_t i = 0; t->dtype == DTYPE_F64 && i < n; i++) {
        memcpy(&x, data + 8 * i, sizeof x);
        out[i] = (float)x;
    }
    return 1;
}

/* A tensor to be written as it lies in memory. */
typedef struct tensor_out {
    const char *name;
    int rank;
    size_t shape[4];
    int dtype;
    const void *data;
} tensor_out;

static size_t tensor_out_bytes(const tensor_out *t) {
    size_t bytes = dtypes[t->dtype].bytes;
    for (int k = 0; k < t->rank; k++) bytes *= t->shape[k];
    return bytes;
}

/* Writes n tensors in the order given. metadata: key, value, ..., NULL, or NULL; "format": "pt" is always there, as Hugging
   Face wants. */
static int tensors_write(const char *path, const tensor_out *list, size_t n, const char *const *metadata) {
    text header = SLAM_ZERO;
    uint64_t begin = 0;
    char *part;
    text_add(&header, "{\"__metadata__\":{\"format\":\"pt\"");
    for (; metadata && metadata[0]; metadata += 2) {
        text_add(&header, ",");
        text_add_json(&header, metadata[0]);
        text_add(&header, ":");
        text_add_json(&header, metadata[1]);
    }
    text_add(&header, "}");
    for (size_t i = 0; i < n; i++) {
        text_add(&header, ",");
        text_add_json(&header, list[i].name);
        text_add(&header, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[list[i].dtype].name);
        for (int k = 0; k < list[i].rank; k++) text_add(&header, "%s%zu", k ? "," : "", list[i].shape[k]);
        text_add(&header, "],\"data_offsets\":[%llu,", (unsigned long long)begin);
        begin += tensor_out_bytes(&list[i]);
        text_add(&header, "%llu]}", (unsigned long long)begin);
    }
    text_add(&header, "}");
    while (header.n % 8 && !header.failed) text_add_bytes(&header, " ", 1);
    FILE *f = header.failed ? NULL : part_open(path, &part);
    if (!f) {
        text_free(&header);
        return 0;
    }
    const uint64_t length = header.n;
    int ok = part_write(f, path, &length, 8) && part_write(f, path, header.at, header.n);
    for (size_t i = 0; ok && i < n; i++) ok = part_write(f, path, list[i].data, tensor_out_bytes(&list[i]));
    text_free(&header);
    return part_close(f, path, part, ok);
}

/* ---- npy (NumPy's format, versions 1 to 3) ----
   "\x93NUMPY", major, minor, the header's length (16 bits; 32 from version 2 on), the header, a Python dictionary:
       {'descr': '<f4', 'fortran_order': False, 'shape': (100, 39), }
   filled with blanks and ended by a newline so that the data, which follow in row order, begin at a multiple of 64. */

typedef struct npy_header {
    size_t bytes, shape[2];
    int rank;
} npy_header;

/* The next character that is not blank. */
static char npy_peek(const char **at) {
    while (**at == ' ' || **at == '\n') ++*at;
    return **at;
}

/* Passes over blanks and then `word`, if it stands there. */
static int npy_take(const char **at, const char *word) {
    npy_peek(at);
    const size_t n = strlen(word);
    if (strncmp(*at, word, n)) return 0;
    *at += n;
    return 1;
}

/* (rows, cols): digits, each number followed by a comma or the end. Lengths beyond the second are counted, not kept. */
static int npy_shape(const char **at, npy_header *h) {
    if (!npy_take(at, "(")) return 0;
    while (!npy_take(at, ")")) {
        size_t length = 0, digits = 0;
        for (; (unsigned)(**at - '0') <= 9; ++*at, digits++) length = length * 10 + (size_t)(**at - '0');
        if (digits == 0 || digits > 18) return 0;
        if (h->rank < 2) h->shape[h->rank] = length;
        h->rank++;
        if (!npy_take(at, ",") && npy_peek(at) != ')') return 0;
    }
    return 1;
}

static int npy_refuse_type(const char *type, const char *path) {
    const int n = (int)strcspn(type, ",}");
    return fail("%s: numbers of type %.*s, expected '<f4' or '<f8' (save it with .astype('float32'))", path, n < 30 ? n : 30, type);
}

static int npy_parse_header(const char *at, npy_header *h, const char *path) {
    int fortran = -1;
    h->rank = -1;
    int ok = npy_take(&at, "{");
    while (ok && !npy_take(&at, "}")) {
        if (npy_take(&at, "'descr'") && npy_take(&at, ":")) {
            if (npy_take(&at, "'<f4'")) h->bytes = 4;
            else if (npy_take(&at, "'<f8'")) h->bytes = 8;
            else return npy_refuse_type(at, path);
        } else if (npy_take(&at, "'fortran_order'") && npy_take(&at, ":")) {
            fortran = npy_take(&at, "True") ? 1 : npy_take(&at, "False") ? 0 : -1;
            ok = fortran >= 0;
        } else if (npy_take(&at, "'shape'") && npy_take(&at, ":")) {
            h->rank = 0;
            ok = npy_shape(&at, h);
        } else ok = 0;
        if (ok && !npy_take(&at, ",")) ok = npy_peek(&at) == '}';
    }
    ok = ok && npy_peek(&at) == 0;
    if (!ok || !h->bytes || fortran < 0 || h->rank < 0)
        return fail("%s: its header is not {'descr': ..., 'fortran_order': ..., 'shape': ...}", path);
    if (fortran) return fail("%s: it is in column order, expected row order (save it with numpy.ascontiguousarray)", path);
    if (h->rank != 2) return fail("%s: %d dimensions, expected 2", path, h->rank);
    return 1;
}

static int npy_parse(const unsigned char *bytes, size_t size, const char *path, float **data, size_t *rows, size_t *cols) {
    npy_header h = SLAM_ZERO;
    uint32_t length = 0;
    if (size < 12 || memcmp(bytes, "\x93NUMPY", 6)) return fail("%s: not a .npy file", path);
    if (bytes[6] < 1 || bytes[6] > 3) return fail("%s: .npy version %d, expected 1 to 3", path, bytes[6]);
    const size_t start = bytes[6] == 1 ? 10 : 12;
    memcpy(&length, bytes + 8, start - 8);
    if (length > size - start)
        return fail("%s: a header of %u bytes, but only %zu follow: the file is cut short", path, length, size - start);
    if (length > 65535) return fail("%s: a header of %u bytes, expected a short one", path, length);
    char *header = (char *)mem_new((size_t)length + 1, 1);
    if (!header) return 0;
    memcpy(header, bytes + start, length);
    int ok = strlen(header) == length ? npy_parse_header(header, &h, path) : fail("%s: a zero byte in its header", path);
    free(header);
    if (!ok) return 0;
    const size_t there = size - start - length, limit = ((size_t)1 << 56) / h.bytes;
    if ((h.shape[1] && h.shape[0] > limit / h.shape[1]) || h.shape[0] * h.shape[1] * h.bytes != there)
        return fail("%s: %zu bytes of data, expected %zu x %zu numbers of %zu", path, there, h.shape[0], h.shape[1], h.bytes);
    const size_t n = h.shape[0] * h.shape[1];
    float *out = (float *)mem_new(n, sizeof *out);
    for (size_t i = 0; out && i < n; i++) {
        double wide;
        const unsigned char *from = bytes + start + length + i * h.bytes;
        if (h.bytes == 4) memcpy(&out[i], from, 4);
        if (h.bytes == 8) {
            memcpy(&wide, from, 8);
            out[i] = (float)wide;
        }
        if (!isfinite(out[i])) {
            fail("%s: row %zu holds %g, expected finite numbers", path, i / h.shape[1], (double)out[i]);
            free(out);
            return 0;
        }
    }
    if (!out) return 0;
    *data = out;
    *rows = h.shape[0];
    *cols = h.shape[1];
    return 1;
}

/* A matrix of finite float32 or float64, as floats in memory of its own. */
static int npy_read(const char *path, float **data, size_t *rows, size_t *cols) {
    file_map map;
    if (!map_open(&map, path)) return 0;
    const int ok = npy_parse(map.data, map.size, path, data, rows, cols);
    map_close(&map);
    return ok;
}

static int npy_write(const char *path, const float *data, size_t rows, size_t cols) {
    char header[128], *part;
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10); // 0x76: 118 more to make 128
    const int n =
        snprintf(header + 10, sizeof header - 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }", rows, cols);
    header[10 + n] = ' ';
    header[127] = '\n';
    FILE *f = part_open(path, &part);
    if (!f) return 0;
    const int ok = part_write(f, path, header, sizeof header) && part_write(f, path, data, rows * cols * sizeof *data);
    return part_close(f, path, part, ok);
}

/* ---- token shards (llm.c's) ----
   256 int32: 20240520, version 1, count of tokens, then V and the quantiser's fingerprint (both 0 where unsaid; llm.c leaves
   them 0), zeros; then the tokens, uint16. */

enum { SHARD_MAGIC = 20240520, SHARD_VERSION = 1, SHARD_HEADER = 1024 };
enum { DOCUMENT_MARK = 1, UNIT_TOKEN = 2 }; // 1 opens and closes a document, unit u is token u + 2, 0 is padding

typedef struct shard {
    file_map map;
    const uint16_t *tokens;
    size_t n;
    int V;                // 0: unsaid
    uint32_t fingerprint; // 0: unsaid
    char *path;
} shard;

static void shard_close(shard *s) {
    map_close(&s->map);
    free(s->path);
    memset(s, 0, sizeof *s);
}

static int shard_parse(shard *s) {
    int32_t header[5];
    if (s->map.size < SHARD_HEADER)
        return fail("%s: %zu bytes, expected a header of %d and tokens", s->path, s->map.size, SHARD_HEADER);
    memcpy(header, s->map.data, sizeof header);
    if (header[0] != SHARD_MAGIC)
        return fail("%s: not a token shard: it begins with %d, expected %d", s->path, header[0], SHARD_MAGIC);
    if (header[1] != SHARD_VERSION) return fail("%s: token shard of version %d, expected %d", s->path, header[1], SHARD_VERSION);
    const size_t bytes = s->map.size - SHARD_HEADER;
    if (header[2] < 0 || bytes != 2 * (size_t)header[2])
        return fail("%s: its header says %d tokens, but %zu bytes follow, expected 2 a token", s->path, header[2], bytes);
    if (header[3] < 0 || header[3] > 65536) return fail("%s: a vocabulary of %d, expected at most 65536", s->path, header[3]);
    s->tokens = (const uint16_t *)(const void *)(s->map.data + SHARD_HEADER);
    s->n = (size_t)header[2];
    s->V = header[3];
    s->fingerprint = (uint32_t)header[4];
    return 1;
}

static int shard_open(shard *s, const char *path) {
    memset(s, 0, sizeof *s);
    s->path = text_copy(path);
    if (s->path && map_open(&s->map, path) && shard_parse(s)) return 1;
    shard_close(s);
    return 0;
}

typedef struct shard_writer {
    FILE *file;
    char *path, *part;
    size_t n;
    int V;
    uint32_t fingerprint;
} shard_writer;

static int shard_header(shard_writer *w) {
    int32_t header[256] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)w->n, w->V, 0};
    memcpy(&header[4], &w->fingerprint, 4);
    return part_write(w->file, w->path, header, sizeof header);
}

/* What was written so far goes away; nothing stands at the path that did not before. */
static void shard_abandon(shard_writer *w) {
    if (w->file) part_close(w->file, w->path, w->part, 0);
    free(w->path);
    memset(w, 0, sizeof *w);
}

static int shard_begin(shard_writer *w, const char *path, int V, uint32_t fingerprint) {
    memset(w, 0, sizeof *w);
    w->V = V;
    w->fingerprint = fingerprint;
    w->path = text_copy(path);
    w->file = w->path ? part_open(path, &w->part) : NULL;
    if (w->file && shard_header(w)) return 1;
    shard_abandon(w);
    return 0;
}

static int shard_add(shard_writer *w, const uint16_t *tokens, size_t n) {
    if (n > INT32_MAX - w->n) return fail("%s: more than %d tokens, which one shard can hold", w->path, INT32_MAX);
    w->n += n;
    return part_write(w->file, w->path, tokens, n * sizeof *tokens);
}

/* The shard appears at its path, whole; or not at all, and 0. */
static int shard_end(shard_writer *w) {
    const int ok = fflush(w->file) == 0 && fseek(w->file, 0, SEEK_SET) == 0;
    if (!ok) fail("%s: cannot be written: %s", w->path, strerror(errno));
    const int done = part_close(w->file, w->path, w->part, ok && shard_header(w));
    w->file = NULL;
    shard_abandon(w);
    return done;
}

/* ---- CSV ----
   Fields parted by commas; "..." may hold commas, line ends and "" for a quote (RFC 4180). The first line names the columns. */

typedef struct csv {
    char *text;   // of the file, in which the fields end with zeros
    char **field; // (rows,columns)
    size_t *line; // (rows), from 1
    size_t rows, columns, capacity, line_capacity;
    char **column; // (columns), names
} csv;

static void csv_free(csv *c) {
    free(c->text);
    free(c->field);
    free(c->line);
    memset(c, 0, sizeof *c);
}

/* The field that begins at *at, which moves behind it; what ended it (',', '\n', 0 at the end) in *end. NULL and the sentence. */
static char *csv_field(char **at, char *end, const char *path, size_t *line) {
    char *from = *at, *to = from, *field = from;
    const size_t first = *line;
    if (*from == '"') {
        for (from++;; from++) {
            if (!*from) {
                fail("%s:%zu: a quote (\") that is not closed", path, first);
                return NULL;
            }
            *line += *from == '\n';
            if (*from == '"' && *++from != '"') break;
            *to++ = *from;
        }
        if (*from == '\r' && from[1] == '\n') from++;
        if (*from && *from != ',' && *from != '\n') {
            fail("%s:%zu: '%c' after a closing quote, expected a comma", path, *line, *from);
            return NULL;
        }
    } else {
        while (*from && *from != ',' && *from != '\n') from++;
        to = from;
    }
    *end = *from;
    *at = *from ? from + 1 : from;
    if (to == from && *end != ',' && to > field && to[-1] == '\r') to--; // a line of an unquoted field may end with both
    *to = 0;
    return field;
}

/* A line's fields; the first line's are the columns. */
static int csv_row(csv *c, char **at, const char *path, size_t *line) {
    const size_t first = c->columns * c->rows, number = *line;
    size_t n = 0;
    char end = ',';
    while (end == ',') {
        char *field = csv_field(at, &end, path, line);
        if (!field) return 0;
        if (!mem_grow((void **)&c->field, &c->capacity, first + n + 1, sizeof *c->field)) return 0;
        c->field[first + n++] = field;
    }
    ++*line;
    if (n == 1 && !*c->field[first]) return 1; // a blank line
    if (!c->columns) c->columns = n;
    if (n != c->columns) return fail("%s:%zu: %zu fields, expected %zu as in the first line", path, number, n, c->columns);
    if (!mem_grow((void **)&c->line, &c->line_capacity, c->rows + 1, sizeof *c->line)) return 0;
    c->line[c->rows++] = number;
    return 1;
}

static int csv_read(csv *c, const char *path) {
    file_map map;
    size_t line = 1;
    memset(c, 0, sizeof *c);
    if (!map_open(&map, path)) return 0;
    int ok = !map.size || !memchr(map.data, 0, map.size) || fail("%s: holds a zero byte, expected a table (CSV)", path);
    ok = ok && (c->text = (char *)mem_new(map.size + 1, 1)) != NULL;
    if (ok && map.size) memcpy(c->text, map.data, map.size);
    map_close(&map);
    char *at = c->text;
    if (ok && !strncmp(at, "\xef\xbb\xbf", 3)) at += 3;
    while (ok && *at) ok = csv_row(c, &at, path, &line);
    if (ok && c->rows < 2) ok = fail("%s: has no rows, expected the names of columns and at least a row", path);
    if (ok) {
        c->column = c->field;
        c->rows--;
        return 1;
    }
    csv_free(c);
    return 0;
}

static const char *csv_at(const csv *c, size_t row, size_t column) { return c->field[(row + 1) * c->columns + column]; }
static size_t csv_line(const csv *c, size_t row) { return c->line[row + 1]; }

/* The column's number; `columns` where there is none of that name. */
static size_t csv_column(const csv *c, const char *name) {
    size_t k = 0;
    while (k < c->columns && strcmp(c->column[k], name)) k++;
    return k;
}

/* ---- units (SlamKit's JSON lines) ----
   features:   {"units": [3, 49, 7], "duration": [1, 2, 1], "file_name": "a.wav"}
   tokens:     {"file_name": "a.wav", "audio_repr": "<Un3><Un49><Un7>"}
   and of a part of a longer file, in either, , "start": 60.5, "end": 118.25 (seconds) */

typedef struct units {
    char *name; // file_name, "" where the line has none
    int *unit;
    int *duration; // in frames; NULL where the line has none
    size_t n;
    double start, end;  // in seconds, of a part of a longer file; end 0: it is the whole
    int *duration_room; // the rest: memory that is used again for the next line
    size_t unit_capacity, duration_capacity, name_capacity;
} units;

static void units_free(units *u) {
    free(u->name);
    free(u->unit);
    free(u->duration_room);
    memset(u, 0, sizeof *u);
}

/* The whole numbers of an array. */
static int units_numbers(const json *array, const char *what, const char *key, int **out, size_t *capacity) {
    size_t n = 0;
    if (array->type != JSON_ARRAY) return fail("%s: '%s' is %.60s, expected an array", what, key, json_describe(array));
    if (!mem_grow((void **)out, capacity, array->n, sizeof **out)) return 0;
    for (const json *j = array->first; j; j = j->next) {
        if (!json_whole(j) || j->number < 0 || j->number > INT_MAX)
            return fail("%s: number %zu of '%s' is %.60s, expected a whole number from 0", what, n + 1, key, json_describe(j));
        (*out)[n++] = (int)j->number;
    }
    return 1;
}

/* "<Un3><Un49>" */
static int units_spelled(const json *spelled, const char *what, units *u) {
    const char *p = spelled->string;
    if (!mem_grow((void **)&u->unit, &u->unit_capacity, spelled->n / 5, sizeof *u->unit)) return 0; // "<Un3>" is the shortest
    for (u->n = 0; *p; u->n++) {
        long unit = 0;
        const char *digits = p + 3;
        int ok = strncmp(p, "<Un", 3) == 0;
        if (ok)
            for (p = digits; (unsigned)(*p - '0') <= 9 && p - digits < 9; p++) unit = unit * 10 + (*p - '0');
        if (!ok || p == digits || *p++ != '>')
            return fail("%s: unit %zu is spelled '%.20s', expected <Un and a number and >", what, u->n + 1, ok ? digits - 3 : p);
        u->unit[u->n] = (int)unit;
    }
    return 1;
}

/* The units of an object of either kind, or of a string of the second kind. `what` begins the sentence of an error. */
static int units_from_json(const json *value, const char *what, units *u) {
    const json *list = json_get(value, "units"), *duration = json_get(value, "duration"), *spelled = json_get(value, "audio_repr");
    const json *start = json_get(value, "start"), *end = json_get(value, "end");
    const char *name = json_text(value, "file_name", "");
    u->n = 0;
    u->start = u->end = 0;
    u->duration = NULL;
    if (start && end && start->type == JSON_NUMBER && end->type == JSON_NUMBER) { // others may mean something else by these names
        u->start = start->number;
        u->end = end->number;
    }
    if (!mem_grow((void **)&u->name, &u->name_capacity, strlen(name) + 1, 1)) return 0;
    memcpy(u->name, name, strlen(name) + 1);
    if (value->type == JSON_STRING) spelled = value;
    if (!list && !spelled)
        return fail("%s: found %s without 'units' or 'audio_repr'", what,
                    value->type == JSON_OBJECT ? "an object" : json_describe(value));
    if (!list) {
        if (spelled->type != JSON_STRING) return fail("%s: 'audio_repr' is %.60s, expected a string", what, json_describe(spelled));
        return units_spelled(spelled, what, u);
    }
    if (!units_numbers(list, what, "units", &u->unit, &u->unit_capacity)) return 0;
    u->n = list->n;
    if (!duration || duration->type == JSON_NULL) return 1;
    if (!units_numbers(duration, what, "duration", &u->duration_room, &u->duration_capacity)) return 0;
    if (duration->n != list->n) return fail("%s: %zu durations for %zu units", what, duration->n, list->n);
    u->duration = u->duration_room;
    return 1;
}

/* Reads a file line by line, holding one line (and what was read ahead) at a time. */
typedef struct units_reader {
    int file;
    char *path, *what;
    char *buffer;
    size_t start, end, capacity; // of what was read and not yet used
    size_t line;                 // number of the line that was read last, from 1
} units_reader;

#define UNITS_LINE 64000000 // bytes of a line; units of some hundred hours

static int units_open(units_reader *r, const char *path) {
    memset(r, 0, sizeof *r);
    r->file = open(path, O_RDONLY | O_CLOEXEC);
    if (r->file < 0) return fail("%s: cannot be opened: %s", path, strerror(errno));
    r->path = text_copy(path);
    r->what = (char *)mem_new(strlen(path) + 32, 1);
    if (r->path && r->what && mem_grow((void **)&r->buffer, &r->capacity, 1 << 16, 1)) return 1;
    close(r->file);
    free(r->path);
    free(r->what);
    memset(r, 0, sizeof *r);
    return 0;
}

static void units_close(units_reader *r) {
    if (r->path) close(r->file);
    free(r->path);
    free(r->what);
    free(r->buffer);
    memset(r, 0, sizeof *r);
}

/* Reads more behind buffer[end]; the number of bytes, 0 at the file's end, -1 and the sentence. */
static ssize_t units_fill(units_reader *r) {
    if (r->start > 0) {
        memmove(r->buffer, r->buffer + r->start, r->end - r->start);
        r->end -= r->start;
        r->start = 0;
    }
    if (r->end > UNITS_LINE) {
        fail("%s:%zu: a line of more than %d bytes", r->path, r->line + 1, UNITS_LINE);
        return -1;
    }
    if (!mem_grow((void **)&r->buffer, &r->capacity, r->end + 65536, 1)) return -1;
    const size_t room = r->capacity - r->end, allowed = UNITS_LINE + 1 - r->end;
    ssize_t got;
    do got = read(r->file, r->buffer + r->end, room < allowed ? room : allowed);
    while (got < 0 && errno == EINTR);
    if (got < 0) fail("%s: %s", r->path, strerror(errno));
    if (got > 0) r->end += (size_t)got;
    return got;
}

/* The next line, without its end: 1, 0 at the file's end, -1 and the sentence. */
static int units_line(units_reader *r, const char **line, size_t *n) {
    size_t searched = 0;
    for (;;) {
        const size_t there = r->end - r->start;
        char *from = r->buffer + r->start;
        const char *newline = there > searched ? (const char *)memchr(from + searched, '\n', there - searched) : NULL;
        ssize_t got = newline ? 1 : units_fill(r);
        if (got < 0) return -1;
        if (got > 0 && !newline) {
            searched = there;
            continue;
        }
        if (!newline && there == 0) return 0;
        *line = r->buffer + r->start;
        *n = newline ? (size_t)(newline - *line) : there;
        r->start += newline ? *n + 1 : there;
        r->line++;
        return 1;
    }
}

/* The next line that is not empty, parsed (to be freed by json_free): 1, 0 at the file's end, -1 and a sentence that begins with
   file:line, as r->what does. */
static int units_json(units_reader *r, json **root) {
    const char *line = NULL;
    size_t n = 0;
    int got;
    while ((got = units_line(r, &line, &n)) > 0) {
        size_t blank = 0;
        while (blank < n && (line[blank] == ' ' || line[blank] == '\t' || line[blank] == '\r')) blank++;
        if (blank < n) break;
    }
    if (got <= 0) return got;
    snprintf(r->what, strlen(r->path) + 32, "%s:%zu", r->path, r->line);
    *root = json_parse(line, n, r->what);
    return *root ? 1 : -1;
}

/* The units of the next line that is not empty: 1, 0 at the file's end, -1 and a sentence that begins with file:line. */
static int units_next(units_reader *r, units *u) {
    json *root;
    const int got = units_json(r, &root);
    if (got <= 0) return got;
    const int ok = units_from_json(root, r->what, u);
    json_free(root);
    return ok ? 1 : -1;
}

static void text_add_ints(text *t, const int *x, size_t n) {
    text_add_bytes(t, "[", 1);
    for (size_t i = 0; i < n; i++) {
        char digits[16];
        size_t at = sizeof digits;
        unsigned rest = x[i] < 0 ? 0u - (unsigned)x[i] : (unsigned)x[i];
        do digits[--at] = (char)('0' + rest % 10);
        while (rest /= 10);
        if (x[i] < 0) digits[--at] = '-';
        if (i) text_add_bytes(t, ", ", 2);
        text_add_bytes(t, digits + at, sizeof digits - at);
    }
    text_add_bytes(t, "]", 1);
}

/* "units": [...], "duration": [...] */
static void text_add_unit_lists(text *t, const units *u) {
    text_add(t, "\"units\": ");
    text_add_ints(t, u->unit, u->n);
    if (!u->duration) return;
    text_add(t, ", \"duration\": ");
    text_add_ints(t, u->duration, u->n);
}

static void text_add_part(text *t, const units *u) {
    if (u->end <= 0) return;
    text_add(t, ", \"start\": ");
    text_add_number(t, u->start);
    text_add(t, ", \"end\": ");
    text_add_number(t, u->end);
}

/* A line of SlamKit features, with its newline. */
static void text_add_units(text *t, const units *u) {
    text_add(t, "{");
    text_add_unit_lists(t, u);
    text_add(t, ", \"file_name\": ");
    text_add_json(t, u->name ? u->name : "");
    text_add_part(t, u);
    text_add(t, "}\n");
}

/* A line of SlamKit tokens. */
static void text_add_spelled(text *t, const units *u) {
    text_add(t, "{\"file_name\": ");
    text_add_json(t, u->name ? u->name : "");
    text_add(t, ", \"audio_repr\": \"");
    for (size_t i = 0; i < u->n; i++) text_add(t, "<Un%d>", u->unit[i]);
    text_add(t, "\"");
    text_add_part(t, u);
    text_add(t, "}\n");
}

/* ---- repetition ---- */

static int compare_hashes(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The next word: a mark of punctuation, or what lies between blanks and such marks; NULL at the end. */
static const char *next_word(const char *at, size_t *n) {
    while (isspace((unsigned char)*at)) at++;
    if (!*at) return NULL;
    for (*n = 0; at[*n] && !isspace((unsigned char)at[*n]) && !ispunct((unsigned char)at[*n]);) ++*n;
    if (*n == 0) *n = 1;
    return at;
}

double slam_auto_bleu(const char *text, int order) {
    uint64_t *word = NULL;
    size_t n = 0, capacity = 0, length = 0, again = 0;
    for (const char *at = next_word(text, &length); at; at = next_word(at + length, &length)) {
        if (!mem_grow((void **)&word, &capacity, n + 1, sizeof *word)) {
            free(word);
            return -1;
        }
        word[n++] = hash_bytes(HASH_START, at, length);
    }
    const size_t grams = n >= (size_t)order ? n - (size_t)order + 1 : 0;
    for (size_t i = 0; i < grams; i++) word[i] = hash_bytes(HASH_START, word + i, (size_t)order * sizeof *word);
    if (grams) qsort(word, grams, sizeof *word, compare_hashes);
    for (size_t i = 0; i < grams; i++) again += (i > 0 && word[i] == word[i - 1]) || (i + 1 < grams && word[i] == word[i + 1]);
    free(word);
    return grams ? (double)again / (double)grams : 0;
}

static const char *const pair_names[] = {"prompt", "chosen", "rejected"};

/* 1: the text of prompt and chosen is as it should be; 0: it repeats itself that much or more (0: never); -1: no memory */
static int pair_may(const char *prompt, const char *chosen, double max_repetition) {
    if (max_repetition <= 0) return 1;
    char *both = text_print("%s %s", prompt, chosen);
    const double repetition = both ? slam_auto_bleu(both, 2) : -1;
    free(both);
    return repetition < 0 ? -1 : repetition < max_repetition;
}

/* ---- WAV ----
   "RIFF", size, "WAVE", then chunks: four letters, size (32 bits), that many bytes, one more where the size is odd. Of them
       fmt:  format (1 PCM, 3 float, 0xfffe: as bytes 24, 25 say), channels, rate (32 bits), bytes a second (32 bits),
             bytes of a frame,
             bits of a sample                                                             (16 bits where nothing else is said)
       data: frames of one sample for each channel: unsigned bytes, or signed 16, 24, 32 bits, or float32, float64
   The size that stands behind RIFF is not needed, and many writers get it wrong. */

typedef struct wav_format {
    unsigned format, channels, rate, frame, bits;
    const unsigned char *data;
    size_t size;
} wav_format;

static unsigned load16(const unsigned char *p) { return (unsigned)(p[0] | p[1] << 8); }
static uint32_t load32(const unsigned char *p) { return load16(p) | (uint32_t)load16(p + 2) << 16; }

static int wav_format_read(wav_format *w, const unsigned char *p, size_t n, const char *name) {
    if (n < 16) return fail("%s: a fmt chunk of %zu bytes, expected at least 16", name, n);
    w->format = load16(p);
    w->channels = load16(p + 2);
    w->rate = load32(p + 4);
    w->frame = load16(p + 12);
    w->bits = load16(p + 14);
    if (w->format == 0xfffe) {
        if (n < 40) return fail("%s: an extensible fmt chunk of %zu bytes, expected 40", name, n);
        w->format = load16(p + 24);
    }
    const int known = w->format == 1 ? w->bits == 8 || w->bits == 16 || w->bits == 24 || w->bits == 32
                                     : w->format == 3 && (w->bits == 32 || w->bits == 64);
    if (w->format != 1 && w->format != 3) return fail("%s: WAV format %u, expected 1 (PCM) or 3 (float)", name, w->format);
    if (!known) return fail("%s: %u bits a sample, expected %s", name, w->bits, w->format == 1 ? "8, 16, 24 or 32" : "32 or 64");
    if (w->channels == 0) return fail("%s: no channels, expected at least 1", name);
    // a rate below speech would let a small file grow without bound when it is resampled; the upper end is the highest that is sold
    if (w->rate < 1000 || w->rate > 768000) return fail("%s: %u samples a second, expected 1000 to 768000", name, w->rate);
    if (w->frame != w->channels * w->bits / 8)
        return fail("%s: frames of %u bytes, expected %u channels of %u bits", name, w->frame, w->channels, w->bits);
    return 1;
}

/* Finds format and data. A program that writes into a pipe cannot know how much data will come, and puts 0, 0x7ffff000 or more,
   or 0xffffffff: then all to the end is data. */
static int wav_chunks(wav_format *w, const unsigned char *bytes, size_t size, const char *name) {
    if (size < 12 || memcmp(bytes, "RIFF", 4) || memcmp(bytes + 8, "WAVE", 4)) return fail("%s: not a WAV file", name);
    for (size_t at = 12; size - at >= 8;) {
        const unsigned char *chunk = bytes + at;
        const size_t rest = size - at - 8;
        size_t n = load32(chunk + 4);
        if (memcmp(chunk, "data", 4) == 0) {
            const int piped = n == 0 || n >= 0x7ffff000;
            if (w->channels == 0) return fail("%s: its data come before its format", name);
            if (!piped && n > rest)
                return fail("%s: its header says %zu bytes of data, but only %zu follow: the file is cut short", name, n, rest);
            if (!piped && n % w->frame) return fail("%s: %zu bytes of data, expected a multiple of %u", name, n, w->frame);
            w->data = chunk + 8;
            w->size = piped && (n > rest || n == 0) ? rest : n;
            return w->size >= w->frame ? 1 : fail("%s: it holds no audio", name);
        }
        if (n > rest)
            return fail("%s: a chunk of %zu bytes at byte %zu, but only %zu follow: the file is damaged or cut short", name, n, at,
                        rest);
        if (memcmp(chunk, "fmt ", 4) == 0 && !wav_format_read(w, chunk + 8, n, name)) return 0;
        n += n & 1;
        at += 8 + (n < rest ? n : rest);
    }
    return fail("%s: it holds no data", name);
}

/* One sample on the scale of -1 to 1 */
static double wav_sample(const unsigned char *p, unsigned format, unsigned bits) {
    double wide; // only float64 is left at the end
    if (bits == 8) return (p[0] - 128) / 128.0;
    if (bits == 16) return (int16_t)load16(p) / 32768.0;
    if (bits == 24) return (int32_t)(load16(p) << 8 | (uint32_t)p[2] << 24) / 2147483648.0;
    if (format == 1) return (int32_t)load32(p) / 2147483648.0;
    if (bits == 32) return (double)float_from_bits(load32(p));
    memcpy(&wide, p, 8);
    return wide;
}

/* ---- audio files ----
   Frames are read in order, some at a time, so that a long file needs no memory for the whole of it. WAV is read by what stands
   above, the same in every build; other formats by libsndfile, where it was found. */

#ifdef SLAM_SNDFILE
#include <sndfile.h>
#endif

typedef struct sound {
    const char *name; // begins the sentences of errors; the caller's
    int rate;
    uint64_t at; // frames that were read
    file_map map;
    size_t dropped; // bytes at the map's start that need no memory any more
    wav_format wav; // no channels: it is no WAV file
#ifdef SLAM_SNDFILE
    SNDFILE *codec;
    SF_INFO info;
    sf_count_t place; // of the codec in the map
    float *room;      // frames of all channels
#endif
} sound;

enum { SOUND_BLOCK = 16384 }; // samples of all channels that are decoded at once

static void sound_close(sound *s) {
#ifdef SLAM_SNDFILE
    if (s->codec) sf_close(s->codec);
    free(s->room);
#endif
    map_close(&s->map);
    memset(s, 0, sizeof *s);
}

/* What the file's first bytes say it is; NULL: nothing known. */
static const char *sound_kind(const unsigned char *p, size_t n) {
    static const struct {
        const char *begins, *name;
    } kinds[] = {{"fLaC", "FLAC"}, {"OggS", "Ogg"}, {"ID3", "MP3"}, {"FORM", "AIFF"}, {".snd", "AU"}, {"caff", "CAF"}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (n >= 4 && !memcmp(p, kinds[i].begins, strlen(kinds[i].begins))) return kinds[i].name;
    return n >= 4 && p[0] == 0xff && p[1] >= 0xe0 ? "MP3" : NULL;
}

#ifdef SLAM_SNDFILE
/* libsndfile reads the file from the map: a pipe can be read only once, and nothing is opened a second time. */
static sf_count_t sound_file_length(void *context) { return (sf_count_t)((sound *)context)->map.size; }
static sf_count_t sound_file_tell(void *context) { return ((sound *)context)->place; }

static sf_count_t sound_file_seek(sf_count_t by, int from, void *context) {
    sound *s = (sound *)context;
    const sf_count_t size = (sf_count_t)s->map.size, base = from == SEEK_SET ? 0 : from == SEEK_CUR ? s->place : size;
    if (by < -base || by > size - base) return -1;
    return s->place = base + by;
}

static sf_count_t sound_file_read(void *to, sf_count_t n, void *context) {
    sound *s = (sound *)context;
    const sf_count_t rest = (sf_count_t)s->map.size - s->place;
    if (n > rest) n = rest;
    if (n <= 0) return 0;
    memcpy(to, s->map.data + s->place, (size_t)n);
    s->place += n;
    return n;
}

static sf_count_t sound_file_write(const void *from, sf_count_t n, void *context) {
    (void)from, (void)n, (void)context;
    return 0;
}

static int sound_codec(sound *s, const char *kind) {
    SF_VIRTUAL_IO file;
    file.get_filelen = sound_file_length;
    file.seek = sound_file_seek;
    file.read = sound_file_read;
    file.write = sound_file_write;
    file.tell = sound_file_tell;
    s->codec = sf_open_virtual(&file, SFM_READ, &s->info, s);
    if (!s->codec) return fail("%s: %s: libsndfile: %s", s->name, kind ? kind : "not a WAV file", sf_strerror(NULL));
    if (s->info.channels < 1 || s->info.channels > SOUND_BLOCK)
        return fail("%s: %d channels, expected 1 to %d", s->name, s->info.channels, SOUND_BLOCK);
    if (s->info.samplerate < 1000 || s->info.samplerate > 768000)
        return fail("%s: %d samples a second, expected 1000 to 768000", s->name, s->info.samplerate);
    s->rate = s->info.samplerate;
    s->room = (float *)mem_new(SOUND_BLOCK, sizeof *s->room);
    return s->room != NULL;
}
#else
static int sound_codec(sound *s, const char *kind) {
    if (!kind) return fail("%s: not a WAV file", s->name);
    return fail("%s: is %s, and this program reads WAV alone: install libsndfile1-dev and build again", s->name, kind);
}
#endif

/* What s->map holds. */
static int sound_begin(sound *s) {
    const unsigned char *p = s->map.data;
    const size_t n = s->map.size;
    const int wav = n >= 12 && !memcmp(p, "RIFF", 4) && !memcmp(p + 8, "WAVE", 4);
    if (!(wav ? wav_chunks(&s->wav, p, n, s->name) : sound_codec(s, sound_kind(p, n)))) return 0;
    if (wav) s->rate = (int)s->wav.rate;
    return 1;
}

/* What the map holds, which becomes the sound's to close. The name must stay where it is until sound_close, and the sound as
   well. */
static int sound_take(sound *s, const file_map *map, const char *name) {
    memset(s, 0, sizeof *s);
    s->name = name;
    s->map = *map;
    if (sound_begin(s)) return 1;
    sound_close(s);
    return 0;
}

static int sound_open(sound *s, const char *path) {
    file_map map;
    memset(s, 0, sizeof *s);
    return map_open(&map, path) && sound_take(s, &map, path);
}

/* One sample of a frame of `channels` numbers whose sum this is. Float files may go beyond full scale, some to that of 16-bit
   numbers; what is further out is no audio (nor is NaN). */
static int sound_sample(const sound *s, size_t i, double sum, int channels, float *out) {
    const double mean = sum / channels;
    *out = (float)mean;
    if (fabs(mean) <= 1e6) return 1;
    return fail("%s: sample %llu is %g, expected about -1 to 1", s->name, (unsigned long long)(s->at + i), mean);
}

static ptrdiff_t sound_read_wav(const sound *s, float *out, size_t n) {
    const wav_format *w = &s->wav;
    const uint64_t rest = w->size / w->frame - s->at;
    if (n > rest) n = (size_t)rest;
    for (size_t i = 0; i < n; i++) {
        const unsigned char *frame = w->data + (s->at + i) * w->frame;
        double sum = 0;
        for (unsigned c = 0; c < w->channels; c++) sum += wav_sample(frame + c * (w->bits / 8), w->format, w->bits);
        if (!sound_sample(s, i, sum, (int)w->channels, out + i)) return -1;
    }
    return (ptrdiff_t)n;
}

#ifdef SLAM_SNDFILE
/* At the end: whether it is the one that the header promised. MPEG headers promise nothing. */
static int sound_whole(const sound *s) {
    const uint64_t frames = (uint64_t)s->info.frames, no_word = (uint64_t)SF_COUNT_MAX;
    if (sf_error(s->codec))
        return fail("%s: cannot be decoded after %llu frames: %s", s->name, (unsigned long long)s->at, sf_strerror(s->codec));
    if (s->at < frames && frames < no_word && (s->info.format & SF_FORMAT_TYPEMASK) != SF_FORMAT_MPEG)
        return fail("%s: its header says %llu frames, but only %llu follow: the file is cut short or damaged", s->name,
                    (unsigned long long)frames, (unsigned long long)s->at);
    return 1;
}

static ptrdiff_t sound_read_codec(sound *s, float *out, size_t n) {
    const int channels = s->info.channels;
    const size_t most = SOUND_BLOCK / (size_t)channels;
    const sf_count_t got = sf_readf_float(s->codec, s->room, (sf_count_t)(n < most ? n : most));
    if (got <= 0) return sound_whole(s) ? 0 : -1;
    for (size_t i = 0; i < (size_t)got; i++) {
        double sum = 0;
        for (int c = 0; c < channels; c++) sum += (double)s->room[i * (size_t)channels + (size_t)c];
        if (!sound_sample(s, i, sum, channels, out + i)) return -1;
    }
    return (ptrdiff_t)got;
}
#endif

/* Memory of what was read already goes back to the system. */
static void sound_drop(sound *s) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t upto = s->wav.channels ? (size_t)(s->wav.data - s->map.data) + (size_t)s->at * s->wav.frame : 0;
#ifdef SLAM_SNDFILE
    if (s->codec) upto = (size_t)s->place;
#endif
    upto = upto / page * page;
    if (!s->map.mapped || upto < s->dropped + ((size_t)1 << 22)) return;
    madvise((char *)(uintptr_t)s->map.data + s->dropped, upto - s->dropped, MADV_DONTNEED);
    s->dropped = upto;
}

/* The next frames as one channel, the mean of the file's; full scale is 1. How many of the n asked for: 0 at the end, -1 and the
   sentence. A file without any frame is an error. */
static ptrdiff_t sound_read(sound *s, float *out, size_t n) {
    size_t done = 0;
    while (done < n) {
#ifdef SLAM_SNDFILE
        const ptrdiff_t got = s->codec ? sound_read_codec(s, out + done, n - done) : sound_read_wav(s, out + done, n - done);
#else
        const ptrdiff_t got = sound_read_wav(s, out + done, n - done);
#endif
        if (got < 0) return -1;
        if (got == 0) break;
        done += (size_t)got;
        s->at += (uint64_t)got;
    }
    sound_drop(s);
    if (n && s->at == 0) {
        fail("%s: it holds no audio", s->name);
        return -1;
    }
    return (ptrdiff_t)done;
}

/* Frames until there are `most` of them in *room, which holds *n, or until the end. */
static int sound_fill(sound *s, float **room, size_t *n, size_t *capacity, size_t most) {
    while (*n < most) {
        const size_t step = most - *n < (1 << 20) ? most - *n : 1 << 20; // a header may promise more than there is memory for
        if (!mem_grow((void **)room, capacity, *n + step, sizeof **room)) return 0;
        const ptrdiff_t got = sound_read(s, *room + *n, step);
        if (got < 0) return 0;
        *n += (size_t)got;
        if ((size_t)got < step) break;
    }
    return 1;
}

/* ==========================================================================================
   3. OPS                the list of operations (`slam_ops`) with each one's mathematics
   The list itself stands above, among the public declarations: a struct of function pointers that
   slam_cpu() and slam_cuda() fill. Here is only what both backends and their callers share.
   may use: 1 base
   ========================================================================================== */

void slam_ops_free(slam_ops *ops) {
    if (ops) ops->close(ops);
}

/* ==========================================================================================
   4. OPS ON THE CPU     the plain loops: read these first
   Every operation of section 3 in float, in its order. Loops are dealt to threads so that each
   number has one writer and every sum an order that does not depend on timing.
   may use: 1 base, 3 ops
   ========================================================================================== */
/* ---- matrix products ----
   C (M,N) = A (M,K) B (K,N) is M N K multiplications, each with an addition. A core with AVX-512 begins two instructions a cycle
   that do both for 16 numbers, but fetches two vectors a cycle at most, and those only from the nearest cache. Three plain loops
   fetch two numbers for each product, so they wait for memory nearly all the time. What was fetched has to be used often:

   registers  hold a tile of C, TILE_ROWS x TILE_COLUMNS, while k runs. A step of k fetches two vectors of B's row and TILE_ROWS
              numbers of A's column for 2 TILE_ROWS vector products: now the arithmetic is what is waited for.
   L1         holds a panel of A, TILE_ROWS x BLOCK_K (16 kB with AVX-512), for all the tiles beside each other;
   L2         holds a block of B, BLOCK_K x BLOCK_COLUMNS (512 kB), for all panels of A below each other.

   Panel and block are copied ("packed") into the order in which a tile reads them, whatever their transposes and leading
   dimensions were. That moves each number of A once per BLOCK_COLUMNS products, each of B once per M, and makes every fetch one
   of neighbours. (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008; their A and B change places.)

   A number of C is one chain of sums over k, cut into pieces by K alone. Neither the number of threads nor its place in a tile
   changes a bit of it. */

#if defined SLAM_OPENBLAS || defined SLAM_ACCELERATE
#ifdef SLAM_OPENBLAS
#include <cblas.h>
#else
#include <Accelerate/Accelerate.h>
#endif
enum { TILE_COLUMNS = 32 };

/* The threads are ours (matmul_parallel): a second set of them would fight over the cores. OpenBLAS may be built with OpenMP,
   where its "one thread" would be for everyone. */
static void gemm_start(void) {
#ifdef SLAM_OPENBLAS
    const int threads = threads_count();
    openblas_set_num_threads(1);
    threads_set(threads);
#endif
}

static void gemm(int transA, int transB, int M, int N, int K, const float *A, size_t lda, const float *B, size_t ldb, float beta,
                 float *C, size_t ldc) {
    const CBLAS_TRANSPOSE turnA = transA ? CblasTrans : CblasNoTrans, turnB = transB ? CblasTrans : CblasNoTrans;
    cblas_sgemm(CblasRowMajor, turnA, turnB, M, N, K, 1, A, (int)lda, B, (int)ldb, beta, C, (int)ldc);
}
#else
static void gemm_start(void) {}

/* The widest vector, and the tile that fills the registers: two vectors for each row of C, two of B, one of A. */
#if defined __AVX512F__
#define GEMM_BYTES 64
#elif defined __AVX__
#define GEMM_BYTES 32
#else
#define GEMM_BYTES 16
#endif
/* AVX-512 and AArch64 have 32 registers (gcc for AArch64 spreads A's numbers over several), others 16. */
#if defined __AVX512F__
#define GEMM_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13)
enum { TILE_ROWS = 14, PANEL_STRIDE = 16 };
#elif defined __aarch64__
#define GEMM_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9)
enum { TILE_ROWS = 10, PANEL_STRIDE = 12 };
#else
#define GEMM_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
enum { TILE_ROWS = 6, PANEL_STRIDE = 8 };
#endif
enum { VECTOR = GEMM_BYTES / 4, TILE_COLUMNS = 2 * VECTOR, BLOCK_K = 256, BLOCK_COLUMNS = 16 * TILE_COLUMNS };

typedef float gemm_vector __attribute__((vector_size(GEMM_BYTES)));
typedef float gemm_four __attribute__((vector_size(16)));

/* One of each for every thread, of fixed size: no product has to ask for memory, so none can fail. */
static SLAM_THREAD_LOCAL float packed_a[BLOCK_K * PANEL_STRIDE] __attribute__((aligned(64)));
static SLAM_THREAD_LOCAL float packed_b[BLOCK_K * BLOCK_COLUMNS] __attribute__((aligned(64)));

/* gcc -std=c11 keeps product and sum apart, at half the speed, unless told that it may fuse them; others fuse unasked. */
#if defined __GNUC__ && !defined __clang__ && !defined __cplusplus && defined __STRICT_ANSI__
#define GEMM_FUSED __attribute__((optimize("fp-contract=fast")))
#else
#define GEMM_FUSED
#endif

/* C (rows, TILE_COLUMNS) = a b + beta C. Row k of a begins at a + k a_step, that of b at b + k TILE_COLUMNS. The accumulators p
   and q are variables with names, because compilers leave an array of them in memory; `rows` is a constant wherever this is
   inlined, so that what concerns rows beyond it disappears. */
static inline __attribute__((always_inline)) GEMM_FUSED void gemm_tile(const int rows, int K, const float *a, size_t a_step,
                                                                       const float *b, float beta, float *C, size_t ldc) {
    gemm_vector x, y;
#define GEMM_CLEAR(i) gemm_vector p##i = SLAM_ZERO, q##i = SLAM_ZERO;
#define GEMM_MULTIPLY(i)                                                                                                           \
    if (i < rows) p##i += a[i] * x, q##i += a[i] * y;
#define GEMM_ADD(i)                                                                                                                \
    if (i < rows) {                                                                                                                \
        memcpy(&x, C + i * ldc, sizeof x);                                                                                         \
        memcpy(&y, C + i * ldc + VECTOR, sizeof y);                                                                                \
        p##i += x, q##i += y;                                                                                                      \
    }
#define GEMM_STORE(i)                                                                                                              \
    if (i < rows) {                                                                                                                \
        memcpy(C + i * ldc, &p##i, sizeof p##i);                                                                                   \
        memcpy(C + i * ldc + VECTOR, &q##i, sizeof q##i);                                                                          \
    }
    for (int i = 0; i < rows; i++) __builtin_prefetch(C + i * ldc), __builtin_prefetch(C + i * ldc + VECTOR);
    GEMM_ROWS(GEMM_CLEAR)
    for (int k = 0; k < K; k++, a += a_step, b += TILE_COLUMNS) {
        memcpy(&x, b, sizeof x);
        memcpy(&y, b + VECTOR, sizeof y);
        GEMM_ROWS(GEMM_MULTIPLY)
    }
    if (beta != 0) { GEMM_ROWS(GEMM_ADD) }
    GEMM_ROWS(GEMM_STORE)
}

/* gemm_tiles[rows - 1] is the one for that many rows. */
#define GEMM_TILE(i)                                                                                                               \
    static GEMM_FUSED void gemm_tile_##i(int K, const float *a, size_t a_step, const float *b, float beta, float *C, size_t ldc) { \
        gemm_tile(i + 1, K, a, a_step, b, beta, C, ldc);                                                                           \
    }
#define GEMM_NAME(i) gemm_tile_##i,
GEMM_ROWS(GEMM_TILE)
static void (*const gemm_tiles[])(int, const float *, size_t, const float *, float, float *, size_t) = {GEMM_ROWS(GEMM_NAME)};

/* A panel of A (rows, K) times packed_b (K,n). The last tile may be wider than what is left of C: it is made aside. */
static void gemm_panel(int rows, int n, int K, const float *a, size_t a_step, float beta, float *C, size_t ldc) {
    float edge[TILE_ROWS * TILE_COLUMNS];
    const float *b = packed_b;
    for (; n >= TILE_COLUMNS; n -= TILE_COLUMNS, b += (size_t)K * TILE_COLUMNS, C += TILE_COLUMNS)
        gemm_tiles[rows - 1](K, a, a_step, b, beta, C, ldc);
    if (n == 0) return;
    gemm_tiles[rows - 1](K, a, a_step, b, 0, edge, TILE_COLUMNS);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < n; j++) C[i * ldc + j] = edge[i * TILE_COLUMNS + j] + (beta != 0 ? C[i * ldc + j] : 0);
}

#if defined __clang__ || __GNUC__ >= 12
#define GEMM_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int gemm_places __attribute__((vector_size(16)));
#define GEMM_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (gemm_places){i, j, k, l})
#endif

/* Four numbers of each of four rows become four rows of out, `stride` apart. */
static inline void gemm_turn(float *out, int stride, const float *r0, const float *r1, const float *r2, const float *r3) {
    gemm_four a, b, c, d;
    memcpy(&a, r0, sizeof a), memcpy(&b, r1, sizeof b), memcpy(&c, r2, sizeof c), memcpy(&d, r3, sizeof d);
    const gemm_four ab = GEMM_PICK(a, b, 0, 4, 1, 5), cd = GEMM_PICK(c, d, 0, 4, 1, 5); // a0 b0 a1 b1, c0 d0 c1 d1
    const gemm_four AB = GEMM_PICK(a, b, 2, 6, 3, 7), CD = GEMM_PICK(c, d, 2, 6, 3, 7); // a2 b2 a3 b3, c2 d2 c3 d3
    a = GEMM_PICK(ab, cd, 0, 1, 4, 5), b = GEMM_PICK(ab, cd, 2, 3, 6, 7);
    c = GEMM_PICK(AB, CD, 0, 1, 4, 5), d = GEMM_PICK(AB, CD, 2, 3, 6, 7);
    memcpy(out, &a, sizeof a), memcpy(out + stride, &b, sizeof b), memcpy(out + 2 * stride, &c, sizeof c),
        memcpy(out + 3 * stride, &d, sizeof d);
}

/* out_ki = in_ki, `some` numbers at a time; the last of them may overlap those before. */
static inline __attribute__((always_inline)) void gemm_copy(float *out, int stride, const float *in, size_t ld, int width, int K,
                                                            const int some) {
    for (int k = 0; k < K; k++, out += stride, in += ld)
        for (int i = 0; i < width; i += some) {
            const int at = i + some < width ? i : width - some;
            memcpy(out + at, in + at, some * sizeof(float));
        }
}

/* out (K, stride): out_ki = in_ik where k runs along the rows of `in`, else in_ki; i < width. What follows the width, up to a
   multiple of four, is of no account: it makes numbers that are thrown away. */
static void gemm_pack(float *out, int stride, const float *in, size_t ld, int along_k, int width, int K) {
    if (!along_k && width >= 8) gemm_copy(out, stride, in, ld, width, K, 8);
    else if (!along_k && width >= 4) gemm_copy(out, stride, in, ld, width, K, 4);
    else if (!along_k) gemm_copy(out, stride, in, ld, width, K, 1);
    else
        for (int i = 0; i < width; i += 4) {
            const int last = width - 1 - i; // rows beyond it are copies of it
            const float *r0 = in + i * ld, *r1 = r0 + (last < 1 ? last : 1) * ld, *r2 = r0 + (last < 2 ? last : 2) * ld;
            const float *r3 = r0 + (last < 3 ? last : 3) * ld;
            int k = 0;
            for (; k + 4 <= K; k += 4) gemm_turn(out + k * stride + i, stride, r0 + k, r1 + k, r2 + k, r3 + k);
            for (; k < K; k++) {
                float *o = out + k * stride + i;
                o[0] = r0[k], o[1] = r1[k], o[2] = r2[k], o[3] = r3[k];
            }
        }
}

/* Asks for (rows, n) of a matrix to be brought near, as there is other work until it is needed. */
static void gemm_fetch(const float *in, size_t ld, int rows, int n) {
    for (int i = 0; i < rows; i++, in += ld) {
        for (int k = 0; k < n; k += 16) __builtin_prefetch(in + k); // 16 floats: a cache line
        if (n > 0) __builtin_prefetch(in + n - 1);
    }
}
#endif

/* Where part i begins of n things dealt in whole units to `parts` as evenly as can be. */
static int gemm_cut(int n, int unit, int parts, int i) {
    const long long at = (long long)(n / unit + (n % unit != 0)) * i / parts * unit;
    return at < n ? (int)at : n;
}

#if !defined SLAM_OPENBLAS && !defined SLAM_ACCELERATE
static int gemm_parts(int n, int most) { return n > most ? (n - 1) / most + 1 : 1; }

/* C (M,N) = op(A) (M,K) op(B) (K,N) + beta C by this thread, beta 0 (C is not read) or 1; op transposes what lies in memory
   where `trans` says so. Rows of the matrices in memory are lda, ldb, ldc apart. */
static void gemm(int transA, int transB, int M, int N, int K, const float *A, size_t lda, const float *B, size_t ldb, float beta,
                 float *C, size_t ldc) {
    const int m_parts = gemm_parts(M, TILE_ROWS), n_parts = gemm_parts(N, BLOCK_COLUMNS), k_parts = gemm_parts(K, BLOCK_K);
    const int in_place = transA && N <= 2 * TILE_COLUMNS; // a tile could read A where it lies, and few will: copying costs more
    for (int block = 0; M > 0 && block < n_parts * k_parts; block++) {
        const int in = block / k_parts, ik = block % k_parts; // which columns, which part of K
        const int n0 = gemm_cut(N, TILE_COLUMNS, n_parts, in), n1 = gemm_cut(N, TILE_COLUMNS, n_parts, in + 1);
        const int k0 = gemm_cut(K, 1, k_parts, ik), depth = gemm_cut(K, 1, k_parts, ik + 1) - k0;
        for (int n = n0; n < n1; n += TILE_COLUMNS)
            gemm_pack(packed_b + (size_t)(n - n0) * depth, TILE_COLUMNS, transB ? B + n * ldb + k0 : B + k0 * ldb + n, ldb, transB,
                      n1 - n < TILE_COLUMNS ? n1 - n : TILE_COLUMNS, depth);
        for (int im = 0; im < m_parts; im++) {
            const int m0 = gemm_cut(M, 1, m_parts, im), m1 = gemm_cut(M, 1, m_parts, im + 1);
            const int next = M - m1 < TILE_ROWS ? M - m1 : TILE_ROWS; // rows of the next panel
            const float *a = transA ? A + k0 * lda + m0 : A + m0 * lda + k0;
            if (!in_place) {
                gemm_fetch(transA ? a + (m1 - m0) : a + (m1 - m0) * lda, lda, transA ? depth : next, transA ? next : depth);
                gemm_pack(packed_a, PANEL_STRIDE, a, lda, !transA, m1 - m0, depth);
            }
            gemm_panel(m1 - m0, n1 - n0, depth, in_place ? a : packed_a, in_place ? lda : (size_t)PANEL_STRIDE, ik ? 1 : beta,
                       C + m0 * ldc + n0, ldc);
        }
    }
}
#endif

/* The same by `threads` threads, each with a rectangle of C of its own, K whole. Of all grids of rectangles it takes the one
   whose largest costs least: its products, and a row or column packed about as much as 16 products a number. */
static void matmul_parallel(int threads, int transA, int transB, int M, int N, int K, const float *A, size_t lda, const float *B,
                            size_t ldb, float beta, float *C, size_t ldc) {
    int rows = 1, columns = 1;
    double least = HUGE_VAL;
    for (int p = 1; p <= threads; p++) {
        const double m = ceil((double)M / p), n = ceil((double)N / TILE_COLUMNS / (threads / p)) * TILE_COLUMNS,
                     cost = m * n + 16 * (m + n);
        if (cost < least) least = cost, rows = p, columns = threads / p;
    }
    SLAM_PARALLEL_FOR
    for (int i = 0; i < rows * columns; i++) {
        const int m0 = gemm_cut(M, 1, rows, i / columns), m1 = gemm_cut(M, 1, rows, i / columns + 1);
        const int n0 = gemm_cut(N, TILE_COLUMNS, columns, i % columns), n1 = gemm_cut(N, TILE_COLUMNS, columns, i % columns + 1);
        if (m0 < m1 && n0 < n1)
            gemm(transA, transB, m1 - m0, n1 - n0, K, transA ? A + m0 : A + m0 * lda, lda, transB ? B + n0 * ldb : B + n0, ldb,
                 beta, C + m0 * ldc + n0, ldc);
    }
}

typedef struct cpu_ops {
    slam_ops ops; // first, so that a slam_ops pointer is also one to this
    char name[64];
    float *scratch; // attention's, grown to the largest that was asked for
    size_t scratch_n;
    int failed; // memory ended within an operation
} cpu_ops;

static float *cpu_scratch(slam_ops *ops, size_t n) {
    cpu_ops *cpu = (cpu_ops *)ops;
    if (n > cpu->scratch_n) {
        ops->release(ops, cpu->scratch);
        cpu->scratch = (float *)ops->alloc(ops, n * sizeof(float));
        cpu->scratch_n = cpu->scratch ? n : 0;
        if (!cpu->scratch) cpu->failed = 1;
    }
    return cpu->scratch;
}

/* ---- memory ---- */

/* Large blocks begin on a 2 MB boundary and ask for large pages: a step walks through gigabytes, and a page table of 4 kB
   pages costs it several per cent. What calloc returned stands in front of the block. */
static void *cpu_alloc(slam_ops *ops, size_t bytes) {
    (void)ops;
    const size_t align = bytes >= (4u << 20) ? 2u << 20 : 256;
    char *raw = bytes < SIZE_MAX / 2 ? (char *)mem_new(bytes + align + sizeof(void *), 1) : NULL;
    if (!raw) {
        fail(
            "out of memory: %.1f MB were asked for; a smaller --micro-batch (of eval: --batch), a shorter --context or --recompute "
            "needs less",
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

static void cpu_release(slam_ops *ops, void *p) {
    (void)ops;
    if (p) free(((void **)p)[-1]);
}

static void cpu_copy(slam_ops *ops, void *to, const void *from, size_t bytes) {
    (void)ops;
    memcpy(to, from, bytes);
}

static void cpu_zero(slam_ops *ops, void *p, size_t bytes) {
    (void)ops;
    memset(p, 0, bytes);
}

static int cpu_finish(slam_ops *ops) {
    cpu_ops *cpu = (cpu_ops *)ops;
    if (!cpu->failed) return 1;
    cpu->failed = 0;
    return fail(
        "out of memory within an operation on the CPU: a smaller --micro-batch (of eval: --batch) or a shorter --context needs less");
}

static void cpu_close(slam_ops *ops) {
    cpu_release(ops, ((cpu_ops *)ops)->scratch);
    free(ops);
}

static void cpu_to_act(slam_ops *ops, slam_act *out, const float *in, size_t n) { cpu_copy(ops, out, in, n * sizeof(float)); }
static void cpu_to_float(slam_ops *ops, float *out, const slam_act *in, size_t n) { cpu_copy(ops, out, in, n * sizeof(float)); }

/* ---- what several operations need ----
   A sum of floats may not be reordered by the compiler, so a plain loop adds one number at a time. These add LANES at a time,
   in an order that is written down: lane k takes the numbers k, k + LANES, ...; then the lanes are added pairwise. */

enum { LANES = 16 };

static float lanes_sum(float *lane) {
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int k = 0; k < n; k++) lane[k] += lane[k + n];
    return lane[0];
}

static float dot(const float *a, const float *b, int n) {
    float lane[LANES] = SLAM_ZERO;
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += a[c + k] * b[c + k];
    for (int k = 0; c + k < n; k++) lane[k] += a[c + k] * b[c + k];
    return lanes_sum(lane);
}

static float dot3(const float *a, const float *b, const float *w, int n) {
    float lane[LANES] = SLAM_ZERO;
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += a[c + k] * b[c + k] * w[c + k];
    for (int k = 0; c + k < n; k++) lane[k] += a[c + k] * b[c + k] * w[c + k];
    return lanes_sum(lane);
}

static float row_max(const float *x, int n) {
    float lane[LANES], max = x[0];
    for (int k = 0; k < LANES; k++) lane[k] = x[0];
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) lane[k] = x[c + k] > lane[k] ? x[c + k] : lane[k];
    for (; c < n; c++) max = x[c] > max ? x[c] : max;
    for (int k = 0; k < LANES; k++) max = lane[k] > max ? lane[k] : max;
    return max;
}

/* e^x within 2 units in the last place for x in [-87, 88], where it stays in range; the compiler can turn a loop over it into
   vector instructions, which it cannot with the C library's.  x = n log 2 + r, |r| <= log(2)/2:  e^x = 2^n e^r, with e^r by the
   polynomial of Cephes' expf (Moshier 1989). Adding and taking away 1.5 * 2^23 rounds to a whole number. NaN stays NaN. */
static inline float exp_float(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // log 2 in two parts, the first exact in few bits
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    union {
        int32_t i;
        float f;
    } two_n; // 2^n, by its exponent bits
    two_n.i = ((int32_t)(n == n ? n : 0) + 127) << 23;
    return p * two_n.f;
}

/* out_c = exp(x_c scale - shift), and their sum */
static float row_exp(float *out, const float *x, float scale, float shift, int n) {
    float lane[LANES] = SLAM_ZERO;
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) {
            out[c + k] = exp_float(x[c + k] * scale - shift);
            lane[k] += out[c + k];
        }
    for (int k = 0; c + k < n; k++) {
        out[c + k] = exp_float(x[c + k] * scale - shift);
        lane[k] += out[c + k];
    }
    return lanes_sum(lane);
}

static float row_exp_sum(const float *x, float shift, int n) {
    float lane[LANES] = SLAM_ZERO;
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += exp_float(x[c + k] - shift);
    for (int k = 0; c + k < n; k++) lane[k] += exp_float(x[c + k] - shift);
    return lanes_sum(lane);
}

/* Sums over the rows of a matrix are dealt to threads by blocks of columns: each sum has one owner and runs down the rows. */
enum { COLUMNS = 64 };
static int column_block(int first, int C) { return first + COLUMNS < C ? COLUMNS : C - first; }

/* ---- embedding ---- */

static void cpu_embedding_forward(slam_ops *ops, slam_act *x, const int *tokens, const slam_act *table, int N, int C) {
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++)
        memcpy((float *)x + (size_t)i * C, (const float *)table + (size_t)tokens[i] * C, (size_t)C * sizeof(float));
}

static void cpu_embedding_backward(slam_ops *ops, float *dtable, const slam_act *dx, const int *tokens, int N, int C, int V) {
    (void)ops, (void)V;
    SLAM_PARALLEL_FOR
    for (int first = 0; first < C; first += COLUMNS) {
        const int n = column_block(first, C);
        for (int i = 0; i < N; i++) {
            float *d = dtable + (size_t)tokens[i] * C + first;
            const float *dxi = (const float *)dx + (size_t)i * C + first;
            for (int c = 0; c < n; c++) d[c] += dxi[c];
        }
    }
}

/* ---- residual and RMSNorm ---- */

static void cpu_rmsnorm_forward(slam_ops *ops, slam_act *s_, slam_act *y_, float *r, const slam_act *x_, const slam_act *delta_,
                                const slam_act *w_, float eps, int N, int C) {
    const float *w = (const float *)w_;
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *s = (const float *)x_ + (size_t)i * C;
        float *y = (float *)y_ + (size_t)i * C;
        if (delta_) {
            const float *x = s, *delta = (const float *)delta_ + (size_t)i * C;
            float *sum = (float *)s_ + (size_t)i * C;
            for (int c = 0; c < C; c++) sum[c] = x[c] + delta[c];
            s = sum;
        }
        r[i] = 1 / sqrtf(dot(s, s, C) / (float)C + eps);
        for (int c = 0; c < C; c++) y[c] = w[c] * (r[i] * s[c]);
    }
}

static void cpu_rmsnorm_backward(slam_ops *ops, slam_act *ds_, float *dw, const slam_act *dy_, const slam_act *s_,
                                 const slam_act *w_, const float *r, int N, int C) {
    const float *DY = (const float *)dy_, *S = (const float *)s_, *w = (const float *)w_;
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *dy = DY + (size_t)i * C, *s = S + (size_t)i * C;
        float *ds = (float *)ds_ + (size_t)i * C;
        const float mean = dot3(dy, s, w, C) * r[i] * r[i] / (float)C;
        for (int c = 0; c < C; c++) ds[c] += r[i] * (w[c] * dy[c] - s[c] * mean);
    }
    SLAM_PARALLEL_FOR
    for (int first = 0; first < C; first += COLUMNS) {
        const int n = column_block(first, C);
        for (int i = 0; i < N; i++) {
            const float *dy = DY + (size_t)i * C + first, *s = S + (size_t)i * C + first;
            for (int c = 0; c < n; c++) dw[first + c] += dy[c] * r[i] * s[c];
        }
    }
}

/* ---- linear layer ---- */

static void cpu_matmul_forward(slam_ops *ops, slam_act *out_, const slam_act *x, const slam_act *w, const slam_act *b, int N, int C,
                               int OC) {
    float *out = (float *)out_;
    if (b) {
        SLAM_PARALLEL_FOR
        for (int i = 0; i < N; i++) memcpy(out + (size_t)i * OC, b, (size_t)OC * sizeof(float));
    }
    matmul_parallel(ops->threads, 0, 1, N, OC, C, (const float *)x, C, (const float *)w, C, b ? 1.0f : 0.0f, out, OC);
}

static void cpu_matmul_backward_input(slam_ops *ops, slam_act *dx, const slam_act *dout, const slam_act *w, int N, int C, int OC) {
    matmul_parallel(ops->threads, 0, 0, N, C, OC, (const float *)dout, OC, (const float *)w, C, 0.0f, (float *)dx, C);
}

static void cpu_matmul_backward_weight(slam_ops *ops, float *dw, float *db, const slam_act *dout, const slam_act *x, int N, int C,
                                       int OC) {
    matmul_parallel(ops->threads, 1, 0, OC, C, N, (const float *)dout, OC, (const float *)x, C, 1.0f, dw, C);
    if (!db) return;
    SLAM_PARALLEL_FOR
    for (int first = 0; first < OC; first += COLUMNS) {
        const int n = column_block(first, OC);
        for (int i = 0; i < N; i++)
            for (int c = 0; c < n; c++) db[first + c] += ((const float *)dout)[(size_t)i * OC + first + c];
    }
}

/* ---- attention ----
   A tile is QUERIES queries of one head against all keys that any of them sees: s, the softmax and the products with v are
   small matrix products and a loop, and no (T,T) matrix ever stands in memory, only (QUERIES, keys). */

enum { QUERIES = 64 };

typedef struct tile {
    int i, n;        // its queries: rows i .. i + n - 1
    int first, keys; // its keys: rows first .. first + keys - 1
} tile;

static tile tile_of(const slam_window *win, size_t row, int index) {
    const int *doc_start = win->doc_start + row, *doc_end = win->doc_end ? win->doc_end + row : NULL;
    tile t;
    t.i = index * QUERIES;
    t.n = win->T - t.i < QUERIES ? win->T - t.i : QUERIES;
    t.first = t.i;
    int end = doc_end ? 0 : t.i + t.n;
    for (int q = t.i; q < t.i + t.n; q++) {
        t.first = doc_start[q] < t.first ? doc_start[q] : t.first;
        end = doc_end && doc_end[q] > end ? doc_end[q] : end;
    }
    t.keys = end - t.first;
    return t;
}

/* The keys that query i of a row sees: two runs [a,b) and [c,d) on either side of its hole, either of which may be empty. */
typedef struct runs {
    int a, b, c, d;
} runs;

static runs visible(const slam_window *win, size_t row, int i) {
    const int start = win->doc_start[row + i], *hole = win->hole ? win->hole + 2 * (row + i) : NULL;
    runs see = {start, start, start, win->doc_end ? win->doc_end[row + i] : i + 1};
    if (hole && hole[1] > hole[0]) {
        see.b = hole[0];
        see.c = hole[1];
    }
    return see;
}

/* Row of a tile: x_j = exp(x_j scale - shift) where the query sees key j, 0 elsewhere; returns the sum. x begins at key `first`. */
static float softmax_row(float *x, tile t, runs see, float scale, float shift) {
    x -= t.first;
    for (int j = t.first; j < see.a; j++) x[j] = 0;
    float sum = row_exp(x + see.a, x + see.a, scale, shift, see.b - see.a);
    for (int j = see.b; j < see.c; j++) x[j] = 0;
    sum += row_exp(x + see.c, x + see.c, scale, shift, see.d - see.c);
    for (int j = see.d; j < t.first + t.keys; j++) x[j] = 0;
    return sum;
}

static int position(const slam_window *win, size_t row, int i) {
    const int *hole = win->hole ? win->hole + 2 * (row + i) : NULL;
    return i - win->doc_start[row + i] - (hole ? hole[1] - hole[0] : 0);
}

/* Turns `heads` heads of x by the angles of position p (R_p), or back with sign -1 (R^-1 is its transpose). */
static void rotate(float *x, int heads, int HS, const float *rope, int p, float sign) {
    if (!rope) return;
    const float *cosine = rope + (size_t)p * HS, *sine = cosine + HS / 2;
    for (int h = 0; h < heads; h++, x += HS)
        for (int c = 0; c < HS / 2; c++) {
            const float x0 = x[c], x1 = x[c + HS / 2], s = sign * sine[c];
            x[c] = x0 * cosine[c] - x1 * s;
            x[c + HS / 2] = x1 * cosine[c] + x0 * s;
        }
}

/* One tile of one head. q, k, v, out point at the head's first row in this row of the batch; s (QUERIES, keys) is scratch. */
static void attention_tile_forward(float *out, float *lse, const float *q, const float *k, const float *v, float *s,
                                   const slam_window *win, size_t row, tile t) {
    const int HS = win->HS;
    const size_t W = (size_t)(win->NH + 2 * win->KVH) * HS, O = (size_t)win->NH * HS;
    const float scale = 1 / sqrtf((float)HS);
    float sum[QUERIES];
    gemm(0, 1, t.n, t.keys, HS, q + t.i * W, W, k + t.first * W, W, 0, s, t.keys);
    for (int i = 0; i < t.n; i++) {
        float *x = s + (size_t)i * t.keys;
        const runs see = visible(win, row, t.i + i);
        const float before = see.b > see.a ? row_max(x + see.a - t.first, see.b - see.a) : -HUGE_VALF,
                    after = see.d > see.c ? row_max(x + see.c - t.first, see.d - see.c) : -HUGE_VALF,
                    max = before > after ? before : after;
        sum[i] = softmax_row(x, t, see, scale, max * scale);
        lse[t.i + i] = max * scale + logf(sum[i]);
    }
    gemm(0, 0, t.n, HS, t.keys, s, t.keys, v + t.first * W, W, 0, out + t.i * O, O);
    for (int i = 0; i < t.n; i++)
        for (int c = 0; c < HS; c++) out[(t.i + i) * O + c] /= sum[i];
}

static void cpu_attention_forward(slam_ops *ops, slam_act *out, float *lse, slam_act *qkv_, const slam_window *win) {
    const int T = win->T, NH = win->NH, KVH = win->KVH, HS = win->HS, W = (NH + 2 * KVH) * HS, tiles = (T + QUERIES - 1) / QUERIES;
    float *qkv = (float *)qkv_, *scratch = cpu_scratch(ops, (size_t)threads_count() * QUERIES * T);
    if (!scratch) return;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < win->B * T; i++) rotate(qkv + (size_t)i * W, NH + KVH, HS, win->rope, position(win, i / T * T, i % T), 1);
    /* late tiles see the most keys and come first, so that no thread is left alone with one */
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int task = 0; task < win->B * NH * tiles; task++) {
        const int h = task % NH, b = task / NH % win->B;
        const size_t row = (size_t)b * T;
        const tile t = tile_of(win, row, tiles - 1 - task / NH / win->B);
        const float *q = qkv + row * W + h * HS, *k = qkv + row * W + (NH + h * KVH / NH) * HS, *v = k + KVH * HS;
        attention_tile_forward((float *)out + row * NH * HS + h * HS, lse + ((size_t)b * NH + h) * T, q, k, v,
                               scratch + (size_t)thread_index() * QUERIES * T, win, row, t);
    }
}

/* One tile of one head: dq = (its rows), dk and dv (T,HS) += ; p and ds (QUERIES, keys) are scratch. */
static void attention_tile_backward(float *dq, float *dk, float *dv, const float *dout, const float *D, const float *lse,
                                    const float *q, const float *k, const float *v, float *p, float *ds, const slam_window *win,
                                    size_t row, tile t) {
    const int HS = win->HS;
    const size_t W = (size_t)(win->NH + 2 * win->KVH) * HS, O = (size_t)win->NH * HS;
    const float scale = 1 / sqrtf((float)HS);
    gemm(0, 1, t.n, t.keys, HS, q + t.i * W, W, k + t.first * W, W, 0, p, t.keys);
    gemm(0, 1, t.n, t.keys, HS, dout + t.i * O, O, v + t.first * W, W, 0, ds, t.keys);
    for (int i = 0; i < t.n; i++) {
        float *pi = p + (size_t)i * t.keys, *dsi = ds + (size_t)i * t.keys;
        softmax_row(pi, t, visible(win, row, t.i + i), scale, lse[t.i + i]);
        for (int j = 0; j < t.keys; j++) dsi[j] = pi[j] * (dsi[j] - D[t.i + i]) * scale;
    }
    gemm(0, 0, t.n, HS, t.keys, ds, t.keys, k + t.first * W, W, 0, dq + t.i * W, W);
    gemm(1, 0, t.keys, HS, t.n, ds, t.keys, q + t.i * W, W, 1, dk + (size_t)t.first * HS, HS);
    gemm(1, 0, t.keys, HS, t.n, p, t.keys, dout + t.i * O, O, 1, dv + (size_t)t.first * HS, HS);
}

/* A task is one head of one row, all its tiles; dk and dv of each query head stand apart until those of a group are added in
   order. */
static void cpu_attention_backward(slam_ops *ops, slam_act *dqkv_, float *D, const slam_act *dout_, const slam_act *out_,
                                   const float *lse, const slam_act *qkv_, const slam_window *win) {
    const int B = win->B, T = win->T, NH = win->NH, KVH = win->KVH, HS = win->HS, W = (NH + 2 * KVH) * HS;
    const size_t head = (size_t)T * HS, work = (size_t)QUERIES * T;
    const float *qkv = (const float *)qkv_, *dout = (const float *)dout_, *out = (const float *)out_;
    float *dqkv = (float *)dqkv_, *scratch = cpu_scratch(ops, 2 * threads_count() * work + 2 * B * NH * head);
    if (!scratch) return;
    float *dkv = scratch + 2 * threads_count() * work; // (B,NH,2,T,HS)
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int task = 0; task < B * NH; task++) {
        const int b = task / NH, h = task % NH;
        const size_t row = (size_t)b * T;
        const float *q = qkv + row * W + h * HS, *k = qkv + row * W + (NH + h * KVH / NH) * HS, *v = k + KVH * HS;
        float *dk = dkv + 2 * task * head, *p = scratch + 2 * thread_index() * work, *Dh = D + (size_t)task * T;
        memset(dk, 0, 2 * head * sizeof(float));
        for (int i = 0; i < T; i++) Dh[i] = dot(dout + ((row + i) * NH + h) * HS, out + ((row + i) * NH + h) * HS, HS);
        for (int index = 0; index * QUERIES < T; index++)
            attention_tile_backward(dqkv + row * W + h * HS, dk, dk + head, dout + (row * NH + h) * HS, Dh, lse + (size_t)task * T,
                                    q, k, v, p, p + work, win, row, tile_of(win, row, index));
    }
    SLAM_PARALLEL_FOR
    for (int i = 0; i < B * T; i++) {
        float *d = dqkv + (size_t)i * W;
        memset(d + NH * HS, 0, (size_t)(2 * KVH * HS) * sizeof(float));
        for (int h = 0; h < NH; h++) {
            const float *dk = dkv + 2 * ((size_t)(i / T) * NH + h) * head + (size_t)(i % T) * HS, *dv = dk + head;
            float *to = d + (NH + h * KVH / NH) * HS;
            for (int c = 0; c < HS; c++) to[c] += dk[c];
            for (int c = 0; c < HS; c++) to[KVH * HS + c] += dv[c];
        }
        rotate(d, NH + KVH, HS, win->rope, position(win, i / T * T, i % T), -1);
    }
}

/* The query heads of a group are the rows of two small products, with keys and with values; between them a softmax. */
static void cpu_attention_decode(slam_ops *ops, slam_act *out, slam_act *cache_, slam_act *qkv_, const int *lengths,
                                 const slam_window *win) {
    const int T = win->T, NH = win->NH, KVH = win->KVH, HS = win->HS, W = (NH + 2 * KVH) * HS, heads = NH / KVH;
    const size_t K = 2 * (size_t)KVH * HS; // numbers of a place in the cache
    const float scale = 1 / sqrtf((float)HS);
    float *qkv = (float *)qkv_, *cache = (float *)cache_, *scratch = cpu_scratch(ops, (size_t)threads_count() * heads * T);
    if (!scratch) return;
    for (int b = 0; b < win->B; b++) {
        float *q = qkv + (size_t)b * W;
        rotate(q, NH + KVH, HS, win->rope, lengths[b], 1);
        memcpy(cache + ((size_t)b * T + lengths[b]) * K, q + NH * HS, K * sizeof(float));
    }
    SLAM_PARALLEL_FOR
    for (int task = 0; task < win->B * KVH; task++) {
        const int b = task / KVH, g = task % KVH, n = lengths[b] + 1;
        const float *q = qkv + (size_t)b * W + g * heads * HS, *k = cache + (size_t)b * T * K + g * HS, *v = k + KVH * HS;
        float *s = scratch + (size_t)thread_index() * heads * T, *o = (float *)out + ((size_t)b * NH + g * heads) * HS;
        gemm(0, 1, heads, n, HS, q, HS, k, K, 0, s, n);
        for (int h = 0; h < heads; h++) {
            float *sh = s + (size_t)h * n;
            const float sum = row_exp(sh, sh, scale, row_max(sh, n) * scale, n);
            for (int j = 0; j < n; j++) sh[j] /= sum;
        }
        gemm(0, 0, heads, HS, n, s, n, v, K, 0, o, HS);
    }
}

static void cpu_attention_fill(slam_ops *ops, slam_act *cache, const slam_act *qkv, const int *slots, const int *lengths, int room,
                               const slam_window *win) {
    const int T = win->T, O = win->NH * win->HS;
    const size_t K = 2 * (size_t)win->KVH * win->HS, W = O + K;
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < win->B * T; i++) {
        const int b = i / T, t = i % T;
        if (t < lengths[b])
            memcpy((float *)cache + ((size_t)slots[b] * room + t) * K, (const float *)qkv + i * W + O, K * sizeof(float));
    }
}

/* ---- SwiGLU ---- */

static void cpu_swiglu_forward(slam_ops *ops, slam_act *h_, const slam_act *gate_up, int N, int F) {
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *g = (const float *)gate_up + (size_t)i * 2 * F, *u = g + F;
        float *h = (float *)h_ + (size_t)i * F;
        for (int c = 0; c < F; c++) h[c] = g[c] / (1 + exp_float(-g[c])) * u[c];
    }
}

static void cpu_swiglu_backward(slam_ops *ops, slam_act *dgate_up, const slam_act *dh_, const slam_act *gate_up, int N, int F) {
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *g = (const float *)gate_up + (size_t)i * 2 * F, *u = g + F, *dh = (const float *)dh_ + (size_t)i * F;
        float *dg = (float *)dgate_up + (size_t)i * 2 * F, *du = dg + F;
        for (int c = 0; c < F; c++) {
            const float gc = g[c], uc = u[c], sigmoid = 1 / (1 + exp_float(-gc));
            dg[c] = dh[c] * uc * sigmoid * (1 + gc * (1 - sigmoid));
            du[c] = dh[c] * gc * sigmoid;
        }
    }
}

/* ---- cross-entropy ---- */

static void cpu_crossentropy(slam_ops *ops, float *loss, slam_act *logits, const int *targets, const float *weights, float scale,
                             int N, int V, int stride) {
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        float *z = (float *)logits + (size_t)i * stride;
        const float weight = weights ? scale * weights[i] : scale;
        const int target = targets[i];
        loss[i] = 0;
        if (scale != 0) memset(z + V, 0, (size_t)(stride - V) * sizeof(float));
        if (target < 0) {
            if (scale != 0) memset(z, 0, (size_t)V * sizeof(float));
            continue;
        }
        const float max = row_max(z, V), z_target = z[target];
        float sum;
        if (scale != 0) {
            sum = row_exp(z, z, 1, max, V);
            for (int v = 0; v < V; v++) z[v] *= weight / sum;
            z[target] -= weight;
        } else {
            sum = row_exp_sum(z, max, V);
        }
        loss[i] = logf(sum) - (z_target - max);
    }
}

/* ---- sampling ----
   In the order of Hugging Face's processors: penalty, temperature, top-k, top-p. Each but the penalty leaves the order of the
   logits alone, so what stays of a row is what is not below one of them. */

static int larger_first(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The smallest logit that stays, of n with the largest first. */
static float sample_threshold(const float *z, int n, const slam_sampling *s) {
    int k = s->top_k > 0 && s->top_k < n ? s->top_k : n, p = 0;
    while (k < n && z[k] == z[k - 1]) k++;
    if (s->top_p >= 1) return z[k - 1];
    double total = 0, sum = 0;
    for (int i = 0; i < k; i++) total += exp((double)(z[i] - z[0]) / s->temperature);
    do sum += exp((double)(z[p++] - z[0]) / s->temperature);
    while (p < k && sum < s->top_p * total);
    return z[p - 1];
}

/* Draws for one row; z and sorted (V) are scratch. A logit that is not a number counts as -infinity. */
static int sample_row(const float *logits, const unsigned char *seen, double uniform, const slam_sampling *s, int V, float *z,
                      float *sorted) {
    const float penalty = (float)s->repetition_penalty;
    int drawn = 1;
    z[0] = -HUGE_VALF;
    for (int v = 1; v < V; v++) {
        z[v] = logits[v] == logits[v] ? logits[v] : -HUGE_VALF;
        if (seen && seen[v]) z[v] = z[v] < 0 ? z[v] * penalty : z[v] / penalty;
        if (z[v] > z[drawn]) drawn = v;
    }
    if (s->temperature == 0) return drawn;
    const float max = z[drawn];
    float least = -HUGE_VALF;
    double total = 0, sum = 0;
    if (s->top_k > 0 || s->top_p < 1) {
        memcpy(sorted, z + 1, (size_t)(V - 1) * sizeof *z);
        qsort(sorted, (size_t)(V - 1), sizeof *sorted, larger_first);
        least = sample_threshold(sorted, V - 1, s);
    }
    for (int v = 1; v < V; v++) total += z[v] >= least ? exp((double)(z[v] - max) / s->temperature) : 0;
    for (int v = 1; v < V; v++) {
        sum += z[v] >= least ? exp((double)(z[v] - max) / s->temperature) : 0;
        if (sum > uniform * total) return v;
    }
    return drawn;
}

static void cpu_sample(slam_ops *ops, int *tokens, const slam_act *logits, unsigned char *seen, const float *uniform,
                       const slam_sampling *s, int B, int V, int stride) {
    float *scratch = cpu_scratch(ops, 2 * (size_t)threads_count() * V);
    if (!scratch) return;
    SLAM_PARALLEL_FOR
    for (int b = 0; b < B; b++) {
        unsigned char *seen_b = seen ? seen + (size_t)b * V : NULL;
        float *z = scratch + 2 * (size_t)thread_index() * V;
        tokens[b] = sample_row((const float *)logits + (size_t)b * stride, seen_b, uniform[b], s, V, z, z + V);
        if (seen_b) seen_b[tokens[b]] = 1;
    }
}

/* ---- sums ----
   in SUM_PARTS runs, whatever the number of threads, each in double; the runs are added in order */

enum { SUM_PARTS = 256 };

static void sum_parts(double *out, const float *x, size_t n, int squares) {
    double part[SUM_PARTS];
    SLAM_PARALLEL_FOR
    for (int k = 0; k < SUM_PARTS; k++) {
        const size_t end = n / SUM_PARTS * (k + 1) + (k + 1 == SUM_PARTS ? n % SUM_PARTS : 0);
        size_t i = n / SUM_PARTS * k;
        double lane[8] = SLAM_ZERO, rest = 0;
        for (; i + 8 <= end; i += 8)
            for (int l = 0; l < 8; l++) lane[l] += squares ? (double)x[i + l] * x[i + l] : (double)x[i + l];
        for (; i < end; i++) rest += squares ? (double)x[i] * x[i] : (double)x[i];
        part[k] = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7])) + rest;
    }
    for (int k = 0; k < SUM_PARTS; k++) *out += part[k];
}

static void cpu_sum(slam_ops *ops, double *out, const float *x, size_t n) {
    (void)ops;
    sum_parts(out, x, n, 0);
}

static void cpu_sum_squares(slam_ops *ops, double *out, const float *x, size_t n) {
    (void)ops;
    sum_parts(out, x, n, 1);
}

/* ---- AdamW ---- */

static void cpu_adamw(slam_ops *ops, slam_act *w_act, float *w, float *m, float *v, const float *g, const double *stats,
                      const slam_adamw *h, size_t n) {
    if (!isfinite(stats[0]) || !isfinite(stats[1])) return;
    const double clip = h->clip > 0 ? h->clip / (sqrt(stats[1]) + 1e-6) : 1;
    const float scale = clip < 1 ? (float)clip : 1, decay = (float)(1 - h->lr * h->weight_decay), eps = (float)h->eps;
    const float beta2 = (float)h->beta2, rest1 = (float)(1 - h->beta1), rest2 = (float)(1 - h->beta2);
    const float step_size = (float)(h->lr / (1 - pow(h->beta1, (double)h->step))),
                root = (float)sqrt(1 - pow(h->beta2, (double)h->step));
    SLAM_PARALLEL_FOR
    for (size_t i = 0; i < n; i++) {
        const float gi = g[i] * scale;
        m[i] += rest1 * (gi - m[i]);
        v[i] = beta2 * v[i] + rest2 * gi * gi;
        w[i] = w[i] * decay - step_size * m[i] / (sqrtf(v[i]) / root + eps);
    }
    if ((void *)w_act != (void *)w) cpu_to_act(ops, w_act, w, n);
}

/* ---- GELU ----
   x Phi(x) with Phi(-z) = exp(-z^2/2) P(t), t = 1 / (1 + 0.26 z), z = |x|: P is a polynomial fitted to scaled erfc (in double,
   least largest relative error: 2e-8). It is as exact far out on the negative side as near 0, and vanishes at infinity. */

static inline float gelu_float(float x) {
    const float z = x < 0 ? -x : x, t = 1 / (1 + 0.26f * z);
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
    return x * (x < 0 ? below : 1 - below);
}

static void row_gelu(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = gelu_float(x[i]);
}

enum { GELU_RUN = 4096 };

static void cpu_gelu(slam_ops *ops, slam_act *x, size_t n) {
    (void)ops;
    SLAM_PARALLEL_FOR
    for (size_t i = 0; i < n; i += GELU_RUN) row_gelu((float *)x + i, n - i < (size_t)GELU_RUN ? n - i : (size_t)GELU_RUN);
}

/* ---- convolution ----
   With channels last the K frames that an output frame reads are neighbours in memory: a row of K C numbers, `stride` C further on
   for the next one. So it is a matrix product whose left side is x itself, in rows that overlap, and nothing is copied. Rows of the
   batch whose length is a multiple of the stride go on into each other at the same pace: they are one long row. */

enum { CONV_FRAMES = 768 }; // output frames at once: what they add up to, and GELU after it, stays in L2

/* out (n, OC) of one group, in rows G OC apart. Libraries want rows that do not overlap: they get `stride` taps at a time. */
static void conv1d_frames(float *out, const float *x, const float *w, const float *b, const slam_conv *c, int n) {
    const size_t ldx = (size_t)c->stride * c->C, ldw = (size_t)c->K * c->C, ldo = (size_t)c->G * c->OC;
#if defined SLAM_OPENBLAS || defined SLAM_ACCELERATE
    const int taps = c->stride;
#else
    const int taps = c->K;
#endif
    for (int t = 0; b && t < n; t++) memcpy(out + t * ldo, b, (size_t)c->OC * sizeof(float));
    for (int k = 0; k < c->K; k += taps)
        gemm(0, 1, n, c->OC, (c->K - k < taps ? c->K - k : taps) * c->C, x + (size_t)k * c->C, ldx, w + (size_t)k * c->C, ldw,
             b || k ? 1.0f : 0.0f, out, ldo);
    for (int t = 0; c->gelu && t < n; t++) row_gelu(out + t * ldo, (size_t)c->OC);
}

static void cpu_conv1d(slam_ops *ops, slam_act *out_, const slam_act *x_, const slam_act *w_, const slam_act *b_,
                       const slam_conv *conv) {
    slam_conv c = *conv;
    const float *x = (const float *)x_, *w = (const float *)w_, *b = (const float *)b_;
    float *out = (float *)out_;
    if (c.G == 1 && c.T == c.stride * c.TO) c.TO *= c.B, c.T *= c.B, c.B = 1;
    const int most = c.TO / ops->threads + 1, frames = most < CONV_FRAMES ? most : CONV_FRAMES,
              parts = (c.TO + frames - 1) / frames;
    const size_t row = (size_t)c.T * c.C;
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int task = 0; task < c.B * c.G * parts; task++) {
        const int first = task % parts * frames, g = task / parts % c.G, r = task / parts / c.G;
        conv1d_frames(out + (((size_t)r * c.TO + first) * c.G + g) * c.OC,
                      x + ((size_t)r * c.G + g) * row + (size_t)first * c.stride * c.C, w + (size_t)g * c.OC * c.K * c.C,
                      b ? b + (size_t)g * c.OC : NULL, &c, c.TO - first < frames ? c.TO - first : frames);
    }
}

static void cpu_group_frames(slam_ops *ops, slam_act *out_, const slam_act *x_, const int *lengths, const slam_act *scale_,
                             const slam_act *shift_, int before, int B, int T, int TO, int C, int G) {
    const float *scale = (const float *)scale_, *shift = (const float *)shift_;
    const int width = C / G;
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int row = 0; row < B * G * TO; row++) {
        const int t = row % TO - before, g = row / TO % G, b = row / TO / G;
        float *out = (float *)out_ + (size_t)row * width;
        if (t < 0 || t >= lengths[b]) {
            memset(out, 0, (size_t)width * sizeof *out);
            continue;
        }
        const float *x = (const float *)x_ + ((size_t)b * T + t) * C + g * width;
        for (int c = 0; c < width; c++) out[c] = (scale ? scale[g * width + c] * x[c] : x[c]) + (shift ? shift[g * width + c] : 0);
    }
}

static void cpu_mask_frames(slam_ops *ops, slam_act *x, const int *lengths, int B, int T, int C) {
    (void)ops;
    for (int b = 0; b < B; b++)
        memset((float *)x + ((size_t)b * T + lengths[b]) * C, 0, (size_t)(T - lengths[b]) * C * sizeof(float));
}

/* ---- layer norm, channel norm ---- */

static float row_sum(const float *x, int n) {
    float lane[LANES] = SLAM_ZERO;
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += x[c + k];
    for (int k = 0; c + k < n; k++) lane[k] += x[c + k];
    return lanes_sum(lane);
}

/* sum of (x_c - mean)^2 */
static float row_variation(const float *x, float mean, int n) {
    float lane[LANES] = SLAM_ZERO;
    int c = 0;
    for (; c + LANES <= n; c += LANES)
        for (int k = 0; k < LANES; k++) lane[k] += (x[c + k] - mean) * (x[c + k] - mean);
    for (int k = 0; c + k < n; k++) lane[k] += (x[c + k] - mean) * (x[c + k] - mean);
    return lanes_sum(lane);
}

static void cpu_layernorm(slam_ops *ops, slam_act *s_, slam_act *y_, const slam_act *x_, const slam_act *delta_, const slam_act *w_,
                          const slam_act *b_, float eps, int gelu, int N, int C) {
    const float *w = (const float *)w_, *bias = (const float *)b_;
    (void)ops;
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const size_t row = (size_t)i * C;
        const float *s = (const float *)x_ + row;
        float *y = y_ ? (float *)y_ + row : NULL;
        if (delta_) {
            const float *x = s, *delta = (const float *)delta_ + row;
            float *sum = s_ ? (float *)s_ + row : y;
            for (int c = 0; c < C; c++) sum[c] = x[c] + delta[c];
            s = sum;
        }
        if (!y) continue;
        const float mean = row_sum(s, C) / (float)C, r = 1 / sqrtf(row_variation(s, mean, C) / (float)C + eps);
        for (int c = 0; c < C; c++) y[c] = w[c] * ((s[c] - mean) * r) + bias[c];
        if (gelu) row_gelu(y, (size_t)C);
    }
}

/* Frames are taken in runs of NORM_FRAMES from a row's first on, whose sums and variations are added in order, in double (Chan,
   Golub and LeVeque 1979): with counts n and m, means p and q
       variation of both = their variations + (p - q)^2 n m / (n + m) */
enum { NORM_FRAMES = 128 };

/* sum, variation = (C) of n frames */
static void channels_sum(float *sum, float *variation, const float *x, int n, int C) {
    for (int c = 0; c < C; c++) sum[c] = variation[c] = 0;
    for (int t = 0; t < n; t++)
        for (int c = 0; c < C; c++) sum[c] += x[(size_t)t * C + c];
    for (int t = 0; t < n; t++)
        for (int c = 0; c < C; c++) {
            const float d = x[(size_t)t * C + c] - sum[c] / (float)n;
            variation[c] += d * d;
        }
}

static void channels_join(float *mean, float *r, const float *sums, int n, float eps, int C) {
    for (int c = 0; c < C; c++) {
        double m = 0, variation = 0;
        for (int first = 0; first < n; first += NORM_FRAMES) {
            const float *part = sums + (size_t)(first / NORM_FRAMES) * 2 * C;
            const double k = n - first < NORM_FRAMES ? n - first : NORM_FRAMES, d = part[c] / k - m;
            variation += part[C + c] + d * d * first * k / (first + k);
            m += d * k / (first + k);
        }
        mean[c] = (float)m;
        r[c] = (float)(1 / sqrt(variation / n + eps));
    }
}

static void cpu_channelnorm(slam_ops *ops, slam_act *x_, const slam_act *w_, const slam_act *b_, const int *lengths, float eps,
                            int B, int T, int C) {
    const float *w = (const float *)w_, *bias = (const float *)b_;
    const int parts = (T + NORM_FRAMES - 1) / NORM_FRAMES;
    float *x = (float *)x_, *sums = cpu_scratch(ops, (size_t)B * (parts + 1) * 2 * C), *joined = sums + (size_t)B * parts * 2 * C;
    if (!sums) return;
    SLAM_PARALLEL_FOR
    for (int task = 0; task < B * parts; task++) {
        const int b = task / parts, first = task % parts * NORM_FRAMES, rest = lengths[b] - first;
        float *sum = sums + (size_t)task * 2 * C;
        if (rest > 0) channels_sum(sum, sum + C, x + ((size_t)b * T + first) * C, rest < NORM_FRAMES ? rest : NORM_FRAMES, C);
    }
    SLAM_PARALLEL_FOR
    for (int b = 0; b < B; b++) {
        float *mean = joined + (size_t)b * 2 * C;
        channels_join(mean, mean + C, sums + (size_t)b * parts * 2 * C, lengths[b], eps, C);
    }
    SLAM_PARALLEL_FOR
    for (int i = 0; i < B * T; i++) {
        const float *mean = joined + (size_t)(i / T) * 2 * C, *r = mean + C;
        float *xi = x + (size_t)i * C;
        if (i % T >= lengths[i / T]) {
            memset(xi, 0, (size_t)C * sizeof *xi);
            continue;
        }
        for (int c = 0; c < C; c++) xi[c] = gelu_float(w[c] * ((xi[c] - mean[c]) * r[c]) + bias[c]);
    }
}

/* ---- nearest centroid ---- */

static void cpu_nearest(slam_ops *ops, int *nearest, float *scores, const slam_act *x, const slam_act *centroids,
                        const float *squares, int N, int D, int K) {
    matmul_parallel(ops->threads, 0, 1, N, K, D, (const float *)x, D, (const float *)centroids, D, 0.0f, scores, K);
    SLAM_PARALLEL_FOR
    for (int i = 0; i < N; i++) {
        const float *dots = scores + (size_t)i * K;
        float least = HUGE_VALF;
        nearest[i] = 0;
        for (int k = 0; k < K; k++)
            if (squares[k] - 2 * dots[k] < least) {
                least = squares[k] - 2 * dots[k];
                nearest[i] = k;
            }
    }
}

/* ---- the backend ---- */

slam_ops *slam_cpu(int threads) {
    cpu_ops *cpu = (cpu_ops *)mem_new(1, sizeof *cpu);
    if (!cpu) return NULL;
    slam_ops *ops = &cpu->ops;
    ops->threads = threads_set(threads);
    gemm_start();
    snprintf(cpu->name, sizeof cpu->name, "cpu, %d thread%s", ops->threads, ops->threads == 1 ? "" : "s");
    ops->name = cpu->name;
    ops->bytes_per_act = sizeof(float);
    ops->memory = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
#if !defined SLAM_OPENBLAS && !defined SLAM_ACCELERATE
    ops->same_rows = 1;
#endif
    ops->alloc = cpu_alloc;
    ops->release = cpu_release;
    ops->upload = cpu_copy;
    ops->download = cpu_copy;
    ops->zero = cpu_zero;
    ops->finish = cpu_finish;
    ops->close = cpu_close;
    ops->to_act = cpu_to_act;
    ops->to_float = cpu_to_float;
    ops->embedding_forward = cpu_embedding_forward;
    ops->embedding_backward = cpu_embedding_backward;
    ops->rmsnorm_forward = cpu_rmsnorm_forward;
    ops->rmsnorm_backward = cpu_rmsnorm_backward;
    ops->matmul_forward = cpu_matmul_forward;
    ops->matmul_backward_input = cpu_matmul_backward_input;
    ops->matmul_backward_weight = cpu_matmul_backward_weight;
    ops->attention_forward = cpu_attention_forward;
    ops->attention_backward = cpu_attention_backward;
    ops->attention_decode = cpu_attention_decode;
    ops->attention_fill = cpu_attention_fill;
    ops->swiglu_forward = cpu_swiglu_forward;
    ops->swiglu_backward = cpu_swiglu_backward;
    ops->crossentropy = cpu_crossentropy;
    ops->sample = cpu_sample;
    ops->sum = cpu_sum;
    ops->sum_squares = cpu_sum_squares;
    ops->adamw = cpu_adamw;
    ops->conv1d = cpu_conv1d;
    ops->group_frames = cpu_group_frames;
    ops->mask_frames = cpu_mask_frames;
    ops->gelu = cpu_gelu;
    ops->layernorm = cpu_layernorm;
    ops->channelnorm = cpu_channelnorm;
    ops->nearest = cpu_nearest;
    return ops;
}

/* ==========================================================================================
   5. OPS ON CUDA        the same operations, one kernel or a few each
   Names are those of section 4, whose loops say what is computed; here it is said how threads map
   to data, what bounds a kernel, and how many bytes it has to move. N and C as in section 3, T a
   number of `bytes_per_act` bytes. All work is in one stream, so each kernel sees what was asked
   before it. Sums have a fixed order and there are no atomics: the same bits every time.

   The kernels compile with nvcc, and with any C++ compiler against test/cuda_emulator.h, which runs
   them on the CPU (`make emulate`). What only a GPU understands, PTX, stands in small functions that
   the emulator has in plain C++.
   may use: 1 base, 3 ops
   ========================================================================================== */
#if !defined __CUDACC__ && !defined SLAM_EMULATOR
slam_ops *slam_cuda(int device, int bytes_per_act) {
    (void)bytes_per_act;
    fail("cuda:%d: this build has no CUDA: build it where nvcc and cuBLASLt are found (make says what it finds)", device);
    return NULL;
}
int slam_cuda_count(void) { return 0; }
#else
#ifndef SLAM_EMULATOR
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
/* kernel<<<...>>>, in a form that a C++ compiler reads as well; a kernel with several template arguments stands in parentheses */
#define SLAM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

/* ---- what kernels are made of ---- */

/* PTX that wants compute capability 8.0. nvcc without -arch compiles for less: there these functions are empty, and slam_cuda()
   refuses such a build. */
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ < 800
#define SLAM_PTX(statement)
#else
#define SLAM_PTX(statement) statement
#endif

typedef __nv_bfloat16 bf16;

/* P numbers that move in one access: 16 bytes where rows are a multiple of that, else one at a time. */
template <typename T, int P> struct alignas(P * sizeof(T)) pack { T at[P]; };

/* The block's shared memory, as many bytes as its launch asked for. */
static __device__ __forceinline__ char *shared_memory(void) {
#ifdef SLAM_EMULATOR
    return emulator_shared();
#else
    extern __shared__ __align__(128) char slam_shared[];
    return slam_shared;
#endif
}

/* Sum and maximum over the 32 lanes of a warp; every lane gets it, always added in the same order. */
static __device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

/* Two floats, rounded, side by side: lo in the lower half. */
static __device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
#ifdef SLAM_EMULATOR
    return emulator_pack_bf16(lo, hi);
#else
    uint32_t out = 0;
    SLAM_PTX(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo)));
    return out;
#endif
}

/* A warp's product C (16,8) += A (16,16) B (16,8) in bf16 with float sums (PTX: mma.sync.m16n8k16). With g = lane / 4 and
   t = lane % 4 a lane holds, in pairs of neighbours (the lower half of a register first):
       a[0]: row g,     columns 2t, 2t+1      a[2]: row g,     columns 2t+8, 2t+9
       a[1]: row g + 8, columns 2t, 2t+1      a[3]: row g + 8, columns 2t+8, 2t+9
       b[0]: rows 2t, 2t+1, column g          b[1]: rows 2t+8, 2t+9, column g
       c[0], c[1]: row g, columns 2t, 2t+1    c[2], c[3]: row g + 8, columns 2t, 2t+1 */
static __device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#ifdef SLAM_EMULATOR
    emulator_mma_bf16(c, a, b0, b1);
#else
    SLAM_PTX(
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
#endif
}

/* Four 8x8 matrices of bf16 from shared memory (PTX: ldmatrix). Lane l says where row l % 8 of matrix l / 8 begins (16 bytes,
   aligned); r[m] of a lane gets of matrix m row lane / 4, columns 2 (lane % 4) and the next. */
static __device__ __forceinline__ void ldmatrix(uint32_t r[4], const void *row) {
#ifdef SLAM_EMULATOR
    emulator_ldmatrix(r, row, 0);
#else
    SLAM_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                          : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                          : "r"((uint32_t)__cvta_generic_to_shared(row))
                          : "memory"));
#endif
}

/* The same, each matrix transposed: r[m] gets rows 2 (lane % 4) and the next, column lane / 4. */
static __device__ __forceinline__ void ldmatrix_transposed(uint32_t r[4], const void *row) {
#ifdef SLAM_EMULATOR
    emulator_ldmatrix(r, row, 1);
#else
    SLAM_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                          : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                          : "r"((uint32_t)__cvta_generic_to_shared(row))
                          : "memory"));
#endif
}

/* 16 bytes from global to shared memory, past the registers and without waiting; zeros, and nothing is read, where not `valid`
   (PTX: cp.async). commit closes a group of copies, wait<n> waits until at most n of this thread's groups are under way; other
   threads see them after a barrier. */
static __device__ __forceinline__ void copy_async(void *shared, const void *global, int valid) {
#ifdef SLAM_EMULATOR
    emulator_copy_async(shared, global, valid ? 16 : 0);
#else
    SLAM_PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                          "l"(global), "r"(valid ? 16 : 0)
                          : "memory"));
#endif
}

static __device__ __forceinline__ void copy_async_commit(void) {
#ifdef SLAM_EMULATOR
    emulator_copy_async_commit();
#else
    SLAM_PTX(asm volatile("cp.async.commit_group;" ::: "memory"));
#endif
}

template <int n> static __device__ __forceinline__ void copy_async_wait(void) {
#ifdef SLAM_EMULATOR
    emulator_copy_async_wait(n);
#else
    SLAM_PTX(asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"));
#endif
}

/* ---- the device ---- */

enum {
    CUDA_WORKSPACE = 64 << 20,    // bytes: partial sums; convolutions' windows, behind
    PRODUCT_WORKSPACE = 32 << 20, // the first part, which is what cuBLASLt asks for on Hopper
    SLOT = 4 << 20,               // bytes of pinned memory that a copy goes through,
    SLOTS = 8,                    // and how many of them make the ring
    ALGORITHMS = 64               // algorithms of products that are remembered
};

/* What decides which algorithm cuBLASLt may use. */
typedef struct cuda_shape {
    int transA, transB, M, N, K, lda, ldb, ldc, accumulates, biased, c_is_float, alignA, alignB, alignC;
} cuda_shape;

typedef struct cuda_ops {
    slam_ops ops; // first, so that a slam_ops pointer is also one to this
    char name[320];
    int device, processors; // its number, its multiprocessors
    cudaStream_t stream, comm;
    cudaEvent_t comm_begins, comm_ends;
    char *workspace; // CUDA_WORKSPACE bytes; whoever uses it is done with it before the next kernel in the stream begins
    const char *failed_in, *failed_why; // the first failure since the last finish; NULL: none
    char *ring;                         // (SLOTS, SLOT) pinned bytes of the host
    cudaEvent_t copied[SLOTS];          // each slot's last copy is done
    int slot;                           // the next in turn
#ifndef SLAM_EMULATOR
    cublasLtHandle_t products;
    int algorithms, oldest; // how many are known; the next to be replaced once the table is full
    cuda_shape shape[ALGORITHMS];
    cublasLtMatmulAlgo_t algorithm[ALGORITHMS];
#endif
} cuda_ops;

static void cuda_failed(cuda_ops *cuda, const char *operation, const char *why) {
    if (cuda->failed_in) return;
    cuda->failed_in = operation;
    cuda->failed_why = why;
}

/* Records the first failure. Returns 1 if there was none. */
static int cuda_noted(cuda_ops *cuda, cudaError_t error, const char *operation) {
    if (error != cudaSuccess) cuda_failed(cuda, operation, cudaGetErrorString(error));
    return error == cudaSuccess;
}

/* After every launch. */
static void cuda_launched(slam_ops *ops, const char *operation) { cuda_noted((cuda_ops *)ops, cudaGetLastError(), operation); }

static cudaStream_t stream_of(slam_ops *ops) { return ((cuda_ops *)ops)->stream; }

/* Blocks of a grid that deals n things, `each` to a block. */
static int blocks(size_t n, size_t each) { return (int)((n + each - 1) / each); }

/* Can all of these be read 16 bytes at a time? */
static int aligned16(const void *a, const void *b = NULL, const void *c = NULL, const void *d = NULL, const void *e = NULL) {
    return ((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)d | (uintptr_t)e) % 16 == 0;
}

/* ---- memory ----
   The host's memory goes through a ring of pinned slots: a copy to the GPU takes its turn in the stream while the host goes on,
   and the caller may use its own memory again at once. The host waits only for a slot that is still under way when the ring has
   gone round. */

/* Chooses this device for the calling thread, for which CUDA otherwise takes the first. */
static cuda_ops *cuda_of(slam_ops *ops) {
    cuda_ops *cuda = (cuda_ops *)ops;
    cuda_noted(cuda, cudaSetDevice(cuda->device), "cudaSetDevice");
    return cuda;
}

static void cuda_zero(slam_ops *ops, void *p, size_t bytes) {
    cuda_ops *cuda = cuda_of(ops);
    if (bytes) cuda_noted(cuda, cudaMemsetAsync(p, 0, bytes, cuda->stream), "zero");
}

static void *cuda_alloc(slam_ops *ops, size_t bytes) {
    cuda_ops *cuda = cuda_of(ops);
    void *p = NULL;
    size_t room = 0, all = 0;
    const cudaError_t error = cudaMalloc(&p, bytes ? bytes : 1);
    if (error == cudaSuccess) {
        cuda_zero(ops, p, bytes);
        return p;
    }
    cudaGetLastError(); // or the next launch would report it
    if (error == cudaErrorMemoryAllocation && cudaMemGetInfo(&room, &all) == cudaSuccess)
        fail("%s: out of memory: %.2f GB were asked for, %.2f of %.2f GB are free: a smaller --micro-batch (of eval: --batch), a "
             "shorter --context or --recompute needs less",
             cuda->name, (double)bytes / 1e9, (double)room / 1e9, (double)all / 1e9);
    else fail("%s: no memory, %.2f GB were asked for: %s", cuda->name, (double)bytes / 1e9, cudaGetErrorString(error));
    return NULL;
}

static void cuda_release(slam_ops *ops, void *p) {
    cuda_ops *cuda = cuda_of(ops);
    if (!p) return;
    cuda_noted(cuda, cudaStreamSynchronize(cuda->stream), "release"); // kernels may still use it
    cuda_noted(cuda, cudaFree(p), "release");
}

/* The next slot of the ring, when its last copy is done; NULL after a failure. */
static char *cuda_slot(cuda_ops *cuda, const char *operation) {
    const int slot = cuda->slot;
    if (!cuda_noted(cuda, cudaEventSynchronize(cuda->copied[slot]), operation)) return NULL;
    return cuda->ring + (size_t)slot * SLOT;
}

/* Bytes of the part of a copy that begins at `done` and goes through one slot. */
static size_t part_bytes(size_t bytes, size_t done) { return bytes - done < (size_t)SLOT ? bytes - done : (size_t)SLOT; }

static void cuda_upload(slam_ops *ops, void *to, const void *host, size_t bytes) {
    cuda_ops *cuda = cuda_of(ops);
    for (size_t done = 0; done < bytes; done += SLOT) {
        const size_t n = part_bytes(bytes, done);
        char *slot = cuda_slot(cuda, "upload");
        if (!slot) return;
        memcpy(slot, (const char *)host + done, n);
        cuda_noted(cuda, cudaMemcpyAsync((char *)to + done, slot, n, cudaMemcpyHostToDevice, cuda->stream), "upload");
        cuda_noted(cuda, cudaEventRecord(cuda->copied[cuda->slot], cuda->stream), "upload");
        cuda->slot = (cuda->slot + 1) % SLOTS;
    }
}

/* Parts are asked for ahead, as many as there are slots, so that the bus carries one while the host copies another. After a
   failure the host's memory holds zeros. */
static void cuda_download(slam_ops *ops, void *host, const void *from, size_t bytes) {
    cuda_ops *cuda = cuda_of(ops);
    const size_t parts = (bytes + SLOT - 1) / SLOT;
    const int first = cuda->slot;
    int ok = 1;
    for (size_t asked = 0, got = 0; got < parts; got++) {
        for (; asked < parts && asked < got + SLOTS; asked++) {
            const int k = (int)((first + asked) % SLOTS);
            const size_t n = part_bytes(bytes, asked * SLOT);
            ok = ok && cuda_noted(cuda,
                                  cudaMemcpyAsync(cuda->ring + (size_t)k * SLOT, (const char *)from + asked * SLOT, n,
                                                  cudaMemcpyDeviceToHost, cuda->stream),
                                  "download");
            ok = ok && cuda_noted(cuda, cudaEventRecord(cuda->copied[k], cuda->stream), "download");
        }
        const size_t n = part_bytes(bytes, got * SLOT);
        cuda->slot = (int)((first + got) % SLOTS);
        const char *slot = ok ? cuda_slot(cuda, "download") : NULL;
        ok = slot != NULL;
        if (ok) memcpy((char *)host + got * SLOT, slot, n);
        else memset((char *)host + got * SLOT, 0, n);
    }
    cuda->slot = (int)((first + parts) % SLOTS);
}

static int cuda_finish(slam_ops *ops) {
    cuda_ops *cuda = cuda_of(ops);
    cuda_noted(cuda, cudaStreamSynchronize(cuda->stream), "an operation (CUDA_LAUNCH_BLOCKING=1 in the environment tells which)");
    cudaGetLastError();
    if (!cuda->failed_in) return 1;
    fail("%s: failed in %s: %s", cuda->name, cuda->failed_in, cuda->failed_why);
    cuda->failed_in = NULL;
    return 0;
}

/* ---- the second queue ---- */

static void cuda_after(cuda_ops *cuda, cudaStream_t waits, cudaEvent_t event, cudaStream_t before) {
    cuda_noted(cuda, cudaEventRecord(event, before), "the second queue");
    cuda_noted(cuda, cudaStreamWaitEvent(waits, event, 0), "the second queue");
}

static void cuda_comm_begin(slam_ops *ops) {
    cuda_ops *cuda = cuda_of(ops);
    cuda_after(cuda, cuda->comm, cuda->comm_begins, cuda->stream);
}

static void cuda_comm_end(slam_ops *ops) {
    cuda_ops *cuda = cuda_of(ops);
    cuda_after(cuda, cuda->stream, cuda->comm_ends, cuda->comm);
}

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
#ifndef SLAM_EMULATOR
    if (cuda->products) cublasLtDestroy(cuda->products);
#endif
    for (int k = 0; k < SLOTS; k++)
        if (cuda->copied[k]) cudaEventDestroy(cuda->copied[k]);
    if (cuda->ring) cudaFreeHost(cuda->ring);
    if (cuda->workspace) cudaFree(cuda->workspace);
    if (cuda->comm_begins) cudaEventDestroy(cuda->comm_begins);
    if (cuda->comm_ends) cudaEventDestroy(cuda->comm_ends);
    if (cuda->comm) cudaStreamDestroy(cuda->comm);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    free(cuda);
}

/* ---- what several operations need ---- */

/* Sum over the threads of a block, always added in the same order; every thread gets it. `room` is a number a warp in shared
   memory. Barriers on both sides: what was written before can be read after. */
template <typename R> static __device__ R block_sum(R x, R *room) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    R sum = room[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) sum += room[warp];
    __syncthreads();
    return sum;
}

template <typename R> static __device__ R block_max(R x, R *room) {
    for (int offset = 16; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    R most = room[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) most = max(most, room[warp]);
    __syncthreads();
    return most;
}

/* out_k += x_k for P neighbours, at most 16 bytes at a time */
template <int P> static __device__ void add_floats(float *out, const float x[P]) {
    constexpr int Q = P < 4 ? P : 4;
    for (int k = 0; k < P; k += Q) {
        pack<float, Q> sum = *(const pack<float, Q> *)(out + k);
        for (int j = 0; j < Q; j++) sum.at[j] += x[k + j];
        *(pack<float, Q> *)(out + k) = sum;
    }
}

/* exp(x), exact to a few units in the last place where activations are float; bf16 has no use for that. */
template <typename T> static __device__ __forceinline__ float exp_for(float x) { return sizeof(T) == 2 ? __expf(x) : expf(x); }

/* The second half of sums over rows: out (n) += the sum of `parts` rows of partial (parts,n). A block has 32 columns, a warp
   every 32nd row of them; then the 32 sums of a column are added in order. Latency alone: a few hundred kB from L2. */
static __global__ void __launch_bounds__(1024) add_partial_kernel(float *out, const float *partial, int parts, int n) {
    float *sums = (float *)shared_memory(); // (32,32)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0;
    if (c < n)
        for (int k = warp; k < parts; k += 32) sum += partial[(size_t)k * n + c];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || c >= n) return;
    sum = 0;
    for (int k = 0; k < 32; k++) sum += sums[k * 32 + lane];
    out[c] += sum;
}

static void add_partial(slam_ops *ops, float *out, int parts, int n) {
    SLAM_LAUNCH(add_partial_kernel, blocks(n, 32), 1024, 1024 * sizeof(float), stream_of(ops), out,
                (const float *)((cuda_ops *)ops)->workspace, parts, n);
}

/* ---- rounding ---- */

/* A thread has P neighbours. Bound by memory: n (sizeof(To) + sizeof(From)) bytes. */
template <typename To, typename From, int P>
static __global__ void __launch_bounds__(256) convert_kernel(To *__restrict__ out, const From *__restrict__ in, size_t n) {
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * P;
    if (i >= n) return;
    const pack<From, P> from = *(const pack<From, P> *)(in + i);
    pack<To, P> to;
    for (int k = 0; k < P; k++) to.at[k] = (To)(float)from.at[k];
    *(pack<To, P> *)(out + i) = to;
}

template <typename To, typename From> static void cuda_convert(slam_ops *ops, To *out, const From *in, size_t n) {
    if (n == 0 || (const void *)out == (const void *)in) return;
    if (n % 4 == 0 && aligned16(out, in))
        SLAM_LAUNCH((convert_kernel<To, From, 4>), blocks(n / 4, 256), 256, 0, stream_of(ops), out, in, n);
    else SLAM_LAUNCH((convert_kernel<To, From, 1>), blocks(n, 256), 256, 0, stream_of(ops), out, in, n);
}

template <typename T> static void cuda_to_act(slam_ops *ops, slam_act *out, const float *in, size_t n) {
    cuda_convert(ops, (T *)out, in, n);
    cuda_launched(ops, "to_act");
}

template <typename T> static void cuda_to_float(slam_ops *ops, float *out, const slam_act *in, size_t n) {
    cuda_convert(ops, out, (const T *)in, n);
    cuda_launched(ops, "to_float");
}

/* ---- embedding ---- */

/* A warp a row. Bound by memory: 2 N C sizeof(T) bytes, of which the table's come from L2 where the vocabulary is small. */
template <typename T, int P>
static __global__ void __launch_bounds__(256)
    embedding_forward_kernel(T *__restrict__ x, const int *tokens, const T *__restrict__ table, int N, int C) {
    const int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= N) return;
    const pack<T, P> *from = (const pack<T, P> *)(table + (size_t)tokens[i] * C);
    pack<T, P> *to = (pack<T, P> *)(x + (size_t)i * C);
    for (int p = lane; p < C / P; p += 32) to[p] = from[p];
}

template <typename T>
static void cuda_embedding_forward(slam_ops *ops, slam_act *x_, const int *tokens, const slam_act *table_, int N, int C) {
    constexpr int P = 16 / sizeof(T);
    T *x = (T *)x_;
    const T *table = (const T *)table_;
    if (C % P == 0 && aligned16(x, table))
        SLAM_LAUNCH((embedding_forward_kernel<T, P>), blocks(N, 8), 256, 0, stream_of(ops), x, tokens, table, N, C);
    else SLAM_LAUNCH((embedding_forward_kernel<T, 1>), blocks(N, 8), 256, 0, stream_of(ops), x, tokens, table, N, C);
    cuda_launched(ops, "embedding_forward");
}

enum {
    EMBEDDING_THREADS = 128,                  // 112 have work with the Slam model's 896 channels of bf16
    SCAN = 8,                                 // tokens that a thread looks at in one go
    SCANNED = EMBEDDING_THREADS * SCAN,       // and a block
    MATCHES = 2 * SCANNED,                    // the list's length: what is left of the last go, and a whole one more
    EMBEDDING_SHARED = (2 * MATCHES + 4) * 4, // bytes: the list, and a count for each of the four warps
    EMBEDDING_BLOCKS = 4096
};

/* dtable_v += dx_i for the i of the list whose token is v; thread by channels, so that each sum has one owner and the list's
   order. Four rows are on their way at once. */
template <typename T, int P>
static __device__ void embedding_add(float *dtable, const T *dx, const int *at, const int *row, int n, int first, int rows, int C) {
    for (int c = threadIdx.x * P; c < C; c += EMBEDDING_THREADS * P)
        for (int v = 0; v < rows; v++) {
            float sum[P];
            int found = 0;
            for (int k = 0; k < P; k++) sum[k] = 0;
            for (int j = 0; j < n; j += 4) {
                pack<T, P> x[4];
                for (int u = 0; u < 4; u++) {
                    const int mine = j + u < n && row[j + u] == v;
                    for (int k = 0; k < P; k++) x[u].at[k] = (T)0.0f;
                    if (mine) x[u] = *(const pack<T, P> *)(dx + (size_t)at[j + u] * C + c);
                    found |= mine;
                }
                for (int u = 0; u < 4; u++)
                    for (int k = 0; k < P; k++) sum[k] += (float)x[u].at[k];
            }
            if (found) add_floats<P>(dtable + (size_t)(first + v) * C + c, sum);
        }
}

/* A block has `rows` rows of the table (one, up to 4096 of them). It looks through all tokens and lists those that are its own
   in order: a warp's votes tell each lane how many stand before it, the warps' counts do it between warps. When the list may not
   hold another go, and at the end, the rows of dx that it names are added. Bound by memory where the vocabulary is small: dx once,
   N C sizeof(T) bytes, and the table's gradient, 8 V C. Reading the tokens costs each block 4 N bytes from L2. */
template <typename T, int P>
static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_backward_kernel(float *dtable, const T *dx, const int *tokens, int N, int C, int V, int rows) {
    int *at = (int *)shared_memory(), *row = at + MATCHES, *counts = row + MATCHES;
    const int first = blockIdx.x * rows, end = min(first + rows, V), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int n = 0;
    for (int i = 0; i < N; i += SCANNED) {
        int token[SCAN], mine = 0;
        unsigned hits[SCAN];
        for (int k = 0; k < SCAN; k++) {
            const int j = i + (warp * SCAN + k) * 32 + lane;
            token[k] = j < N ? tokens[j] : -1;
            hits[k] = __ballot_sync(0xffffffffu, token[k] >= first && token[k] < end);
            mine += __popc(hits[k]);
        }
        if (lane == 0) counts[warp] = mine;
        __syncthreads();
        int place = n;
        for (int w = 0; w < EMBEDDING_THREADS / 32; w++) {
            if (w < warp) place += counts[w];
            n += counts[w];
        }
        for (int k = 0; k < SCAN; k++) {
            const int to = place + __popc(hits[k] & ((1u << lane) - 1));
            if (hits[k] >> lane & 1) at[to] = i + (warp * SCAN + k) * 32 + lane, row[to] = token[k] - first;
            place += __popc(hits[k]);
        }
        __syncthreads();
        if (n <= MATCHES - SCANNED && i + SCANNED < N) continue;
        embedding_add<T, P>(dtable, dx, at, row, n, first, end - first, C);
        n = 0;
        __syncthreads();
    }
}

template <typename T>
static void cuda_embedding_backward(slam_ops *ops, float *dtable, const slam_act *dx_, const int *tokens, int N, int C, int V) {
    constexpr int P = 16 / sizeof(T);
    const T *dx = (const T *)dx_;
    const int rows = blocks(V, EMBEDDING_BLOCKS), grid = blocks(V, rows);
    if (C % P == 0 && aligned16(dx, dtable))
        SLAM_LAUNCH((embedding_backward_kernel<T, P>), grid, EMBEDDING_THREADS, EMBEDDING_SHARED, stream_of(ops), dtable, dx,
                    tokens, N, C, V, rows);
    else
        SLAM_LAUNCH((embedding_backward_kernel<T, 1>), grid, EMBEDDING_THREADS, EMBEDDING_SHARED, stream_of(ops), dtable, dx,
                    tokens, N, C, V, rows);
    cuda_launched(ops, "embedding_backward");
}

/* ---- residual and RMSNorm ----
   A row is read once and stays in registers, ROW_NUMBERS of it in each thread of its team: a warp for up to 1024 channels, a
   block of 256 threads for up to 8192. In bf16 it is s as rounded and stored that is normalised, so that the backward pass, which
   reads it, differentiates what was computed. */

enum { ROW_NUMBERS = 32, NORM_MOST = 256 * ROW_NUMBERS };

/* Makes the compiler forget what it knows of a pack. It would keep the numbers as floats from one use to the next, in twice the
   registers; this way it keeps the pack. */
template <typename T, int P> static __device__ __forceinline__ void stay_packed(pack<T, P> *p) {
#ifndef SLAM_EMULATOR
    uint32_t *word = (uint32_t *)p;
    for (int k = 0; k < (int)sizeof *p / 4; k++) asm volatile("" : "+r"(word[k]));
#endif
    (void)p;
}

template <int TEAM> static __device__ float team_sum(float x, float *room) { return TEAM == 32 ? warp_sum(x) : block_sum(x, room); }

/* Bound by memory: x and delta are read, s and y written, 4 N C sizeof(T) bytes; half of that without delta. */
template <typename T, int P, int TEAM>
static __global__ void __launch_bounds__(256)
    rmsnorm_forward_kernel(T *s, T *y, float *r, const T *x, const T *delta, const T *w, float eps, int N, int C) {
    constexpr int M = ROW_NUMBERS / P;
    const int i = blockIdx.x * (256 / TEAM) + threadIdx.x / TEAM, lane = threadIdx.x % TEAM, packs = C / P;
    const size_t row = (size_t)i * packs;
    if (i >= N) return; // all threads of a team return together
    pack<T, P> a[M], b[M];
    float sum = 0;
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs) a[m] = ((const pack<T, P> *)x)[row + lane + m * TEAM];
    if (delta) {
        for (int m = 0; m < M; m++)
            if (lane + m * TEAM < packs) b[m] = ((const pack<T, P> *)delta)[row + lane + m * TEAM];
        for (int m = 0; m < M; m++) {
            if (lane + m * TEAM >= packs) continue;
            for (int k = 0; k < P; k++) a[m].at[k] = (T)((float)a[m].at[k] + (float)b[m].at[k]);
            ((pack<T, P> *)s)[row + lane + m * TEAM] = a[m];
        }
    }
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs)
            for (int k = 0; k < P; k++) sum += (float)a[m].at[k] * (float)a[m].at[k];
    const float ri = 1 / sqrtf(team_sum<TEAM>(sum, (float *)shared_memory()) / (float)C + eps);
    if (lane == 0) r[i] = ri;
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs) b[m] = ((const pack<T, P> *)w)[lane + m * TEAM];
    for (int m = 0; m < M; m++) {
        if (lane + m * TEAM >= packs) continue;
        for (int k = 0; k < P; k++) a[m].at[k] = (T)((float)b[m].at[k] * (ri * (float)a[m].at[k]));
        ((pack<T, P> *)y)[row + lane + m * TEAM] = a[m];
    }
}

/* Teams take rows in turn and keep their part of dw in registers. At the end the eight warps of a block add theirs, in order,
   through shared memory, so that a block leaves one row of partial (blocks,C), which add_partial_kernel sums. Bound by memory: dy,
   s and ds are read, ds written, 4 N C sizeof(T) bytes. */
template <typename T, int P, int TEAM>
static __global__ void __launch_bounds__(256, sizeof(T) == 2 && P > 1 ? 2 : 1)
    rmsnorm_backward_kernel(T *ds, float *partial, const T *dy, const T *s, const T *w, const float *r, int N, int C) {
    constexpr int M = ROW_NUMBERS / P, TEAMS = 256 / TEAM;
    const int team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM, packs = C / P;
    float *shared = (float *)shared_memory(), dw[ROW_NUMBERS];
    for (int k = 0; k < ROW_NUMBERS; k++) dw[k] = 0;
    for (int i = blockIdx.x * TEAMS + team; i < N; i += gridDim.x * TEAMS) {
        const size_t row = (size_t)i * packs;
        const float ri = r[i];
        pack<T, P> a[M], b[M], d[M];
        float sum = 0;
        for (int m = 0; m < M; m++) {
            if (lane + m * TEAM >= packs) continue;
            a[m] = ((const pack<T, P> *)dy)[row + lane + m * TEAM];
            b[m] = ((const pack<T, P> *)s)[row + lane + m * TEAM];
            d[m] = ((const pack<T, P> *)ds)[row + lane + m * TEAM];
        }
        for (int m = 0; m < M; m++) {
            if (lane + m * TEAM >= packs) continue;
            const pack<T, P> W = ((const pack<T, P> *)w)[lane + m * TEAM];
            for (int k = 0; k < P; k++) {
                const float g = (float)a[m].at[k], x = (float)b[m].at[k];
                sum += g * x * (float)W.at[k];
                dw[m * P + k] += g * ri * x;
            }
        }
        const float mean = team_sum<TEAM>(sum, shared) * ri * ri / (float)C;
        for (int m = 0; m < M; m++) {
            if (lane + m * TEAM >= packs) continue;
            const pack<T, P> W = ((const pack<T, P> *)w)[lane + m * TEAM]; // again: L1 has it, the registers are full
            stay_packed(&a[m]), stay_packed(&b[m]);
            for (int k = 0; k < P; k++) {
                const float g = (float)W.at[k] * (float)a[m].at[k] - (float)b[m].at[k] * mean;
                d[m].at[k] = (T)((float)d[m].at[k] + ri * g);
            }
            ((pack<T, P> *)ds)[row + lane + m * TEAM] = d[m];
        }
    }
    float *out = partial + (size_t)blockIdx.x * C, *mine = TEAM == 32 ? shared + (size_t)team * C : out;
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs)
            for (int k = 0; k < P; k++) mine[(lane + m * TEAM) * P + k] = dw[m * P + k];
    if (TEAM != 32) return;
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += 256) {
        float sum = 0;
        for (int k = 0; k < TEAMS; k++) sum += shared[(size_t)k * C + c];
        out[c] = sum;
    }
}

/* Teams of a warp, of a block, or of a block whose rows cannot be read 16 bytes at a time; 0: there is no kernel for such rows. */
static int norm_team(slam_ops *ops, int C, int wide, const char *operation) {
    if (C > NORM_MOST) cuda_failed((cuda_ops *)ops, operation, "rows of more than 8192 channels");
    return C > NORM_MOST ? 0 : wide && C <= 32 * ROW_NUMBERS ? 32 : 256;
}

template <typename T>
static void cuda_rmsnorm_forward(slam_ops *ops, slam_act *s_, slam_act *y_, float *r, const slam_act *x_, const slam_act *delta_,
                                 const slam_act *w_, float eps, int N, int C) {
    constexpr int P = 16 / sizeof(T);
    T *s = (T *)s_, *y = (T *)y_;
    const T *x = (const T *)x_, *delta = (const T *)delta_, *w = (const T *)w_;
    const cudaStream_t stream = stream_of(ops);
    const int wide = C % P == 0 && aligned16(delta ? s : NULL, y, x, delta, w);
    const int team = norm_team(ops, C, wide, "rmsnorm_forward");
    if (team == 0) return;
    if (team == 32) SLAM_LAUNCH((rmsnorm_forward_kernel<T, P, 32>), blocks(N, 8), 256, 0, stream, s, y, r, x, delta, w, eps, N, C);
    else if (wide)
        SLAM_LAUNCH((rmsnorm_forward_kernel<T, P, 256>), N, 256, 8 * sizeof(float), stream, s, y, r, x, delta, w, eps, N, C);
    else SLAM_LAUNCH((rmsnorm_forward_kernel<T, 1, 256>), N, 256, 8 * sizeof(float), stream, s, y, r, x, delta, w, eps, N, C);
    cuda_launched(ops, "rmsnorm_forward");
}

template <typename T>
static void cuda_rmsnorm_backward(slam_ops *ops, slam_act *ds_, float *dw, const slam_act *dy_, const slam_act *s_,
                                  const slam_act *w_, const float *r, int N, int C) {
    constexpr int P = 16 / sizeof(T);
    cuda_ops *cuda = (cuda_ops *)ops;
    T *ds = (T *)ds_;
    const T *dy = (const T *)dy_, *s = (const T *)s_, *w = (const T *)w_;
    const cudaStream_t stream = stream_of(ops);
    const int wide = C % P == 0 && aligned16(ds, dy, s, w), team = norm_team(ops, C, wide, "rmsnorm_backward");
    if (team == 0) return;
    const int rows = blocks(N, 256 / team), most = 2 * cuda->processors, grid = rows < most ? rows : most;
    const size_t shared = (team == 32 ? 8 * (size_t)C : 8) * sizeof(float);
    float *partial = (float *)cuda->workspace;
    if (team == 32) SLAM_LAUNCH((rmsnorm_backward_kernel<T, P, 32>), grid, 256, shared, stream, ds, partial, dy, s, w, r, N, C);
    else if (wide) SLAM_LAUNCH((rmsnorm_backward_kernel<T, P, 256>), grid, 256, shared, stream, ds, partial, dy, s, w, r, N, C);
    else SLAM_LAUNCH((rmsnorm_backward_kernel<T, 1, 256>), grid, 256, shared, stream, ds, partial, dy, s, w, r, N, C);
    add_partial(ops, dw, grid, C);
    cuda_launched(ops, "rmsnorm_backward");
}

/* ---- matrix products: cuBLASLt ----
   It counts columns first. A matrix in row order is, read that way, its transpose, so it is asked for C^T = op(B)^T op(A)^T: the
   operands change places and nothing is moved. Sums are float, without tf32; the bias is added as C is written. */

#ifndef SLAM_EMULATOR
/* The largest power of two up to 256 that divides p. */
static int alignment(const void *p) {
    int bytes = 1;
    while (bytes < 256 && (uintptr_t)p % (2 * bytes) == 0) bytes *= 2;
    return bytes;
}

typedef struct cuda_product_plan {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t A, B, C;
} cuda_product_plan;

static cublasStatus_t product_describe(cuda_product_plan *plan, const cuda_shape *s, cudaDataType type, const void *bias) {
    const cublasOperation_t opA = s->transA ? CUBLAS_OP_T : CUBLAS_OP_N, opB = s->transB ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasStatus_t status = cublasLtMatmulDescInit(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!status) status = cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &opB, sizeof opB);
    if (!status) status = cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &opA, sizeof opA);
    if (!status && bias) {
        status = cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
        if (!status) status = cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    }
    if (!status) status = cublasLtMatrixLayoutInit(&plan->A, type, s->transA ? s->M : s->K, s->transA ? s->K : s->M, s->lda);
    if (!status) status = cublasLtMatrixLayoutInit(&plan->B, type, s->transB ? s->K : s->N, s->transB ? s->N : s->K, s->ldb);
    if (!status) status = cublasLtMatrixLayoutInit(&plan->C, s->c_is_float ? CUDA_R_32F : type, s->N, s->M, s->ldc);
    return status;
}

/* The library's candidates, best guess first; for the same shape always the same. A sum split over K is
   added in float (in place only into floats), in an order that does not depend on timing. */
static cublasStatus_t product_candidates(cublasLtMatmulHeuristicResult_t *found, int most, int *n, cuda_ops *cuda,
                                         cuda_product_plan *plan, const cuda_shape *s) {
    cublasLtMatmulPreferenceOpaque_t wish;
    const size_t workspace = PRODUCT_WORKSPACE;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | (s->c_is_float ? CUBLASLT_REDUCTION_SCHEME_INPLACE : 0);
    const uint32_t alignA = s->alignA, alignB = s->alignB, alignC = s->alignC;
    cublasStatus_t status = cublasLtMatmulPreferenceInit(&wish);
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t bytes;
    } attributes[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
                      {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignB, sizeof alignB},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignA, sizeof alignA},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignC, sizeof alignC},
                      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignC, sizeof alignC}};
    for (int k = 0; k < 6 && !status; k++)
        status = cublasLtMatmulPreferenceSetAttribute(&wish, attributes[k].name, attributes[k].value, attributes[k].bytes);
    if (status) return status;
    return cublasLtMatmulAlgoGetHeuristic(cuda->products, &plan->product, &plan->B, &plan->A, &plan->C, &plan->C, &wish, most,
                                          found, n);
}

/* With the algorithm that is remembered for the shape, or the first candidate that works, which is remembered then. */
static cublasStatus_t product_run(cuda_ops *cuda, const cuda_shape *s, const void *A, const void *B, void *C, const void *bias) {
    enum { CANDIDATES = 8 };
    cuda_product_plan plan;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    const float one = 1, beta = s->accumulates ? 1.0f : 0.0f;
    int n = 1, known = 0;
    while (known < cuda->algorithms && memcmp(&cuda->shape[known], s, sizeof *s) != 0) known++;
    cublasStatus_t status = product_describe(&plan, s, cuda->ops.bytes_per_act == 2 ? CUDA_R_16BF : CUDA_R_32F, bias);
    if (!status && known == cuda->algorithms) status = product_candidates(found, CANDIDATES, &n, cuda, &plan, s);
    if (status) return status;
    status = CUBLAS_STATUS_NOT_SUPPORTED;
    for (int k = 0; k < n && status; k++) {
        const cublasLtMatmulAlgo_t *algorithm = known < cuda->algorithms ? &cuda->algorithm[known] : &found[k].algo;
        status = cublasLtMatmul(cuda->products, &plan.product, &one, B, &plan.B, A, &plan.A, &beta, C, &plan.C, C, &plan.C,
                                algorithm, cuda->workspace, PRODUCT_WORKSPACE, cuda->stream);
        cudaGetLastError(); // or the next launch would report it
        if (status || known < cuda->algorithms) continue;
        const int place = cuda->algorithms < ALGORITHMS ? cuda->algorithms : cuda->oldest++ % ALGORITHMS;
        cuda->shape[place] = *s;
        cuda->algorithm[place] = *algorithm;
        if (cuda->algorithms < ALGORITHMS) cuda->algorithms++;
        break;
    }
    return status;
}
#endif

/* C (M,N) = op(A) op(B), or += with `accumulates`, plus bias (N) where there is one, in row order; A, B and bias hold activations,
   and so does C unless it is float. Bound by arithmetic: 2 M N K. */
static void cuda_product(slam_ops *ops, const char *operation, int transA, int transB, int M, int N, int K, const void *A, int lda,
                         const void *B, int ldb, int accumulates, void *C, int ldc, const void *bias, int c_is_float) {
    if (M == 0 || N == 0) return;
#ifdef SLAM_EMULATOR
    const int is_bf16 = ops->bytes_per_act == 2;
    (void)operation;
    emulator_product(transA, transB, M, N, K, A, lda, B, ldb, accumulates ? 1.0f : 0.0f, C, ldc, bias, is_bf16,
                     is_bf16 && !c_is_float);
#else
    const cuda_shape shape = {transA,       transB,       M,           N, K, lda, ldb, ldc, accumulates, bias != NULL, c_is_float,
                              alignment(A), alignment(B), alignment(C)};
    const cublasStatus_t status = product_run((cuda_ops *)ops, &shape, A, B, C, bias);
    if (status) cuda_failed((cuda_ops *)ops, operation, cublasLtGetStatusString(status));
#endif
}

/* ---- linear layer ---- */

template <typename T>
static void cuda_matmul_forward(slam_ops *ops, slam_act *out, const slam_act *x, const slam_act *w, const slam_act *b, int N, int C,
                                int OC) {
    cuda_product(ops, "matmul_forward", 0, 1, N, OC, C, x, C, w, C, 0, out, OC, b, sizeof(T) == 4);
}

template <typename T>
static void cuda_matmul_backward_input(slam_ops *ops, slam_act *dx, const slam_act *dout, const slam_act *w, int N, int C, int OC) {
    cuda_product(ops, "matmul_backward_input", 0, 0, N, C, OC, dout, OC, w, C, 0, dx, C, NULL, sizeof(T) == 4);
}

/* Sums over rows: partial (gridDim.y,OC). Lane by columns, P of them; the 8 warps of a block and the blocks of a column take rows
   in turn, and the warps' sums meet in shared memory. Bound by memory: dout once, N OC sizeof(T) bytes. */
template <typename T, int P>
static __global__ void __launch_bounds__(256) column_sums_kernel(float *partial, const T *dout, int N, int OC) {
    float *sums = (float *)shared_memory(), sum[P]; // (8, 32 P)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * 32 * P, c = first + lane * P;
    for (int k = 0; k < P; k++) sum[k] = 0;
    if (c < OC)
        for (int i = blockIdx.y * 8 + warp; i < N; i += gridDim.y * 8) {
            const pack<T, P> d = *(const pack<T, P> *)(dout + (size_t)i * OC + c);
            for (int k = 0; k < P; k++) sum[k] += (float)d.at[k];
        }
    for (int k = 0; k < P; k++) sums[warp * 32 * P + lane * P + k] = sum[k];
    __syncthreads();
    for (int k = threadIdx.x; k < 32 * P && first + k < OC; k += 256) {
        float total = 0;
        for (int j = 0; j < 8; j++) total += sums[j * 32 * P + k];
        partial[(size_t)blockIdx.y * OC + first + k] = total;
    }
}

template <typename T>
static void cuda_matmul_backward_weight(slam_ops *ops, float *dw, float *db, const slam_act *dout_, const slam_act *x, int N, int C,
                                        int OC) {
    cuda_ops *cuda = (cuda_ops *)ops;
    const T *dout = (const T *)dout_;
    cuda_product(ops, "matmul_backward_weight", 1, 0, OC, C, N, dout, OC, x, C, 1, dw, C, NULL, 1);
    if (!db) return;
    constexpr int wide = 16 / sizeof(T);
    const int P = OC % wide == 0 && aligned16(dout) ? wide : 1, columns = blocks(OC, 32 * P), rows = blocks(N, 8);
    const int most = 8 * cuda->processors / columns, parts = most < 1 ? 1 : most < rows ? most : rows;
    const dim3 grid(columns, parts);
    float *partial = (float *)cuda->workspace;
    if (P > 1) SLAM_LAUNCH((column_sums_kernel<T, wide>), grid, 256, 256 * P * sizeof(float), cuda->stream, partial, dout, N, OC);
    else SLAM_LAUNCH((column_sums_kernel<T, 1>), grid, 256, 256 * sizeof(float), cuda->stream, partial, dout, N, OC);
    add_partial(ops, db, parts, OC);
    cuda_launched(ops, "matmul_backward_weight");
}

/* ---- SwiGLU ----
   A thread has P neighbours of a row of h: blockIdx.x is the row, blockIdx.y and the thread say where in it. */

template <typename T> static __device__ __forceinline__ float sigmoid_of(float x) {
    return sizeof(T) == 2 ? __fdividef(1.0f, 1 + __expf(-x)) : 1 / (1 + expf(-x));
}

/* Bound by memory: 3 N F sizeof(T) bytes. */
template <typename T, int P>
static __global__ void __launch_bounds__(128) swiglu_forward_kernel(T *__restrict__ h, const T *__restrict__ gate_up, int F) {
    const int c = (blockIdx.y * 128 + threadIdx.x) * P;
    if (c >= F) return;
    const T *from = gate_up + (size_t)blockIdx.x * 2 * F + c;
    const pack<T, P> g = *(const pack<T, P> *)from, u = *(const pack<T, P> *)(from + F);
    pack<T, P> out;
    for (int k = 0; k < P; k++) out.at[k] = (T)((float)g.at[k] * sigmoid_of<T>((float)g.at[k]) * (float)u.at[k]);
    *(pack<T, P> *)(h + (size_t)blockIdx.x * F + c) = out;
}

/* A thread reads its own g and u before it writes over them. Bound by memory: 5 N F sizeof(T) bytes. */
template <typename T, int P>
static __global__ void __launch_bounds__(128) swiglu_backward_kernel(T *dgate_up, const T *dh, const T *gate_up, int F) {
    const int c = (blockIdx.y * 128 + threadIdx.x) * P;
    if (c >= F) return;
    const size_t at = (size_t)blockIdx.x * 2 * F + c;
    const pack<T, P> g = *(const pack<T, P> *)(gate_up + at), u = *(const pack<T, P> *)(gate_up + at + F),
                     d = *(const pack<T, P> *)(dh + (size_t)blockIdx.x * F + c);
    pack<T, P> dg, du;
    for (int k = 0; k < P; k++) {
        const float gk = (float)g.at[k], dk = (float)d.at[k], sigmoid = sigmoid_of<T>(gk);
        dg.at[k] = (T)(dk * (float)u.at[k] * sigmoid * (1 + gk * (1 - sigmoid)));
        du.at[k] = (T)(dk * gk * sigmoid);
    }
    *(pack<T, P> *)(dgate_up + at) = dg;
    *(pack<T, P> *)(dgate_up + at + F) = du;
}

template <typename T> static void cuda_swiglu_forward(slam_ops *ops, slam_act *h_, const slam_act *gate_up_, int N, int F) {
    constexpr int P = 16 / sizeof(T);
    T *h = (T *)h_;
    const T *gate_up = (const T *)gate_up_;
    if (F % P == 0 && aligned16(h, gate_up))
        SLAM_LAUNCH((swiglu_forward_kernel<T, P>), dim3(N, blocks(F, 128 * P)), 128, 0, stream_of(ops), h, gate_up, F);
    else SLAM_LAUNCH((swiglu_forward_kernel<T, 1>), dim3(N, blocks(F, 128)), 128, 0, stream_of(ops), h, gate_up, F);
    cuda_launched(ops, "swiglu_forward");
}

template <typename T>
static void cuda_swiglu_backward(slam_ops *ops, slam_act *dgate_up_, const slam_act *dh_, const slam_act *gate_up_, int N, int F) {
    constexpr int P = 16 / sizeof(T);
    T *dgate_up = (T *)dgate_up_;
    const T *dh = (const T *)dh_, *gate_up = (const T *)gate_up_;
    if (F % P == 0 && aligned16(dgate_up, dh, gate_up))
        SLAM_LAUNCH((swiglu_backward_kernel<T, P>), dim3(N, blocks(F, 128 * P)), 128, 0, stream_of(ops), dgate_up, dh, gate_up, F);
    else SLAM_LAUNCH((swiglu_backward_kernel<T, 1>), dim3(N, blocks(F, 128)), 128, 0, stream_of(ops), dgate_up, dh, gate_up, F);
    cuda_launched(ops, "swiglu_backward");
}

/* ---- cross-entropy ---- */

/* A warp a row of up to 1024 numbers, which stays in registers. Bound by memory: 2 N V sizeof(T) bytes, half of that without a
   gradient. */
template <typename T, int P>
static __global__ void __launch_bounds__(256)
    crossentropy_warp_kernel(float *loss, T *logits, const int *targets, const float *weights, float scale, int N, int V,
                             int stride) {
    constexpr int M = ROW_NUMBERS / P;
    const int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= N) return;
    pack<T, P> *row = (pack<T, P> *)(logits + (size_t)i * stride);
    const int target = targets[i];
    float z[ROW_NUMBERS], most = -INFINITY, z_target = 0, sum = 0;
    for (int m = 0; m < M; m++) {
        const int p = m * 32 + lane;
        for (int k = 0; k < P; k++) z[m * P + k] = -INFINITY;
        if (p * P >= V) continue;
        const pack<T, P> x = row[p];
        for (int k = 0; k < P; k++) {
            if (p * P + k < V) z[m * P + k] = (float)x.at[k];
            most = fmaxf(most, z[m * P + k]);
            if (p * P + k == target) z_target = z[m * P + k];
        }
    }
    most = warp_max(most);
    for (int k = 0; k < ROW_NUMBERS; k++) {
        z[k] = exp_for<T>(z[k] - most);
        sum += z[k];
    }
    sum = warp_sum(sum);
    if (lane == (target < 0 ? 0 : target / P % 32)) loss[i] = target < 0 ? 0 : logf(sum) - (z_target - most);
    if (scale == 0) return;
    const float weight = target < 0 ? 0 : weights ? scale * weights[i] : scale, factor = weight / sum;
    for (int m = 0; m < M; m++) {
        const int p = m * 32 + lane;
        pack<T, P> dz;
        for (int k = 0; k < P; k++)
            dz.at[k] = (T)(target < 0 || p * P + k >= V ? 0 : z[m * P + k] * factor - (p * P + k == target ? weight : 0));
        if (p * P < stride) row[p] = dz;
    }
}

/* A block a row of any length, in two passes: one for the largest logit and the sum, which is rescaled where a larger logit
   appears (Milakov and Gimelshein 2018), one for the gradient. Bound by memory: 2 N V sizeof(T) bytes, and the second reading,
   from L2. */
template <typename T, int P>
static __global__ void __launch_bounds__(512)
    crossentropy_block_kernel(float *loss, T *logits, const int *targets, const float *weights, float scale, int V, int stride) {
    float *room = (float *)shared_memory();
    const size_t i = blockIdx.x;
    pack<T, P> *row = (pack<T, P> *)(logits + i * stride);
    const int target = targets[i];
    const float z_target = target < 0 ? 0 : (float)logits[i * stride + target]; // read before the barriers, written after
    float most = -INFINITY, sum = 0;
    for (int p = threadIdx.x; p * P < V; p += 512) {
        const pack<T, P> x = row[p];
        float here = (float)x.at[0];
        for (int k = 1; k < P; k++)
            if (p * P + k < V) here = fmaxf(here, (float)x.at[k]);
        if (here > most) {
            sum *= exp_for<T>(most - here);
            most = here;
        }
        for (int k = 0; k < P; k++)
            if (p * P + k < V) sum += exp_for<T>((float)x.at[k] - most);
    }
    const float top = block_max(most, room);
    sum = block_sum(sum * exp_for<T>(most - top), room);
    if (threadIdx.x == 0) loss[i] = target < 0 ? 0 : logf(sum) - (z_target - top);
    if (scale == 0) return;
    const float weight = target < 0 ? 0 : weights ? scale * weights[i] : scale, factor = weight / sum;
    for (int p = threadIdx.x; p * P < stride; p += 512) {
        const pack<T, P> x = row[p];
        pack<T, P> dz;
        for (int k = 0; k < P; k++) {
            const float q = exp_for<T>((float)x.at[k] - top) * factor - (p * P + k == target ? weight : 0);
            dz.at[k] = (T)(target < 0 || p * P + k >= V ? 0 : q);
        }
        row[p] = dz;
    }
}

template <typename T>
static void cuda_crossentropy(slam_ops *ops, float *loss, slam_act *logits_, const int *targets, const float *weights, float scale,
                              int N, int V, int stride) {
    constexpr int P = 16 / sizeof(T);
    T *logits = (T *)logits_;
    const cudaStream_t stream = stream_of(ops);
    const int wide = stride % P == 0 && aligned16(logits), room = 16 * sizeof(float);
    if (stride <= 32 * ROW_NUMBERS && wide)
        SLAM_LAUNCH((crossentropy_warp_kernel<T, P>), blocks(N, 8), 256, 0, stream, loss, logits, targets, weights, scale, N, V,
                    stride);
    else if (stride <= 32 * ROW_NUMBERS)
        SLAM_LAUNCH((crossentropy_warp_kernel<T, 1>), blocks(N, 8), 256, 0, stream, loss, logits, targets, weights, scale, N, V,
                    stride);
    else if (wide)
        SLAM_LAUNCH((crossentropy_block_kernel<T, P>), N, 512, room, stream, loss, logits, targets, weights, scale, V, stride);
    else SLAM_LAUNCH((crossentropy_block_kernel<T, 1>), N, 512, room, stream, loss, logits, targets, weights, scale, V, stride);
    cuda_launched(ops, "crossentropy");
}

/* ---- sampling ----
   A block a sequence. What top_k and top_p leave are all logits from a threshold upwards. A float's bits, read as a whole number
   all flipped where it is negative and else with the sign bit set, have the order of the floats, so a threshold is found bit by
   bit from the top: keep a bit where enough still lies at or above it. 32 passes over the logits each, without a sort and for
   any V. Bound by latency where V is small. */

enum { SAMPLE_THREADS = 512, SAMPLE_SHARED = (SAMPLE_THREADS + 1 + 16) * 8 };

template <typename T> struct scores {
    const T *z;
    const unsigned char *seen;
    float penalty, temperature;
    int V;
};

/* A logit with its penalty. NaN counts as -infinity; -0 becomes 0, because their bits differ. */
template <typename T> static __device__ float score(const scores<T> *s, int v) {
    float x = (float)s->z[v];
    if (x != x) x = -INFINITY;
    if (s->seen && s->seen[v]) x = x < 0 ? x * s->penalty : x / s->penalty;
    return x + 0.0f;
}

/* exp((score - most) / temperature): its probability over that of the largest. */
template <typename T> static __device__ double weight_of(const scores<T> *s, float x, float most) {
    return expf((x - most) / s->temperature);
}

static __device__ unsigned ordered_bits(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* How many scores are at or above a threshold. */
template <typename T> static __device__ int count_above(const scores<T> *s, unsigned threshold, void *room) {
    int n = 0;
    for (int v = 1 + threadIdx.x; v < s->V; v += SAMPLE_THREADS) n += ordered_bits(score(s, v)) >= threshold;
    return block_sum(n, (int *)room);
}

/* The sum of their weights. */
template <typename T> static __device__ double mass_above(const scores<T> *s, unsigned threshold, float most, void *room) {
    double sum = 0;
    for (int v = 1 + threadIdx.x; v < s->V; v += SAMPLE_THREADS) {
        const float x = score(s, v);
        if (ordered_bits(x) >= threshold) sum += weight_of(s, x, most);
    }
    return block_sum(sum, (double *)room);
}

/* The largest threshold that leaves k scores, or the share top_p of what these weigh; at most the largest score's own. */
template <typename T>
static __device__ unsigned sample_threshold(const scores<T> *s, int top_k, double top_p, float most, void *room) {
    unsigned threshold = 0;
    if (top_k > 0 && top_k < s->V - 1)
        for (unsigned bit = 1u << 31; bit; bit >>= 1)
            if (count_above(s, threshold | bit, room) >= top_k) threshold |= bit;
    if (top_p < 1) {
        const unsigned least = threshold;
        const double enough = top_p * mass_above(s, least, most, room);
        threshold = 0;
        for (unsigned bit = 1u << 31; bit; bit >>= 1)
            if (mass_above(s, max(threshold | bit, least), most, room) >= enough) threshold |= bit;
        threshold = max(threshold, least);
    }
    return min(threshold, ordered_bits(most));
}

/* The first token at which the sum, in order of v, passes its share; -1 where there is none (infinities). Threads have runs of
   neighbours: edges (SAMPLE_THREADS + 1) are the sums up to each run, and the one whose run holds the token walks through it. */
template <typename T>
static __device__ int sample_draw(const scores<T> *s, unsigned threshold, float most, float uniform, double *edges, void *room) {
    const int run = (s->V + SAMPLE_THREADS - 1) / SAMPLE_THREADS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = max(1, (int)threadIdx.x * run), end = min(s->V, ((int)threadIdx.x + 1) * run);
    double sum = 0, before = 0, *warps = (double *)room;
    for (int v = first; v < end; v++)
        if (ordered_bits(score(s, v)) >= threshold) sum += weight_of(s, score(s, v), most);
    for (int offset = 1; offset < 32; offset *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    for (int k = 0; k < warp; k++) before += warps[k];
    edges[threadIdx.x + 1] = before + sum;
    if (threadIdx.x == 0) edges[0] = 0;
    __syncthreads();
    double at = edges[threadIdx.x];
    const double share = uniform * edges[SAMPLE_THREADS];
    int drawn = -1;
    if (at <= share && share < edges[threadIdx.x + 1])
        for (int v = first; v < end && at <= share; v++) {
            if (ordered_bits(score(s, v)) < threshold) continue;
            at += weight_of(s, score(s, v), most);
            drawn = v;
        }
    // rounding may let two runs claim it: the first
    const int owner = -block_max(drawn < 0 ? -SAMPLE_THREADS : -(int)threadIdx.x, (int *)room);
    return block_max((int)threadIdx.x == owner ? drawn : -1, (int *)room);
}

template <typename T>
static __global__ void __launch_bounds__(SAMPLE_THREADS)
    sample_kernel(int *tokens, const T *logits, unsigned char *seen, const float *uniform, float temperature, int top_k,
                  double top_p, float penalty, int V, int stride) {
    double *edges = (double *)shared_memory();
    void *room = edges + SAMPLE_THREADS + 1;
    const size_t b = blockIdx.x;
    const scores<T> s = {logits + b * stride, seen ? seen + b * V : NULL, penalty, temperature, V};
    float most = -INFINITY;
    for (int v = 1 + threadIdx.x; v < V; v += SAMPLE_THREADS) most = fmaxf(most, score(&s, v));
    most = block_max(most, (float *)room);
    int drawn = -1;
    if (temperature > 0) {
        const unsigned threshold = sample_threshold(&s, top_k, top_p, most, room);
        drawn = sample_draw(&s, threshold, most, uniform[b], edges, room);
    }
    int largest = V;
    for (int v = 1 + threadIdx.x; v < V; v += SAMPLE_THREADS)
        if (score(&s, v) == most) largest = min(largest, v);
    largest = -block_max(-largest, (int *)room);
    if (threadIdx.x > 0) return;
    if (drawn < 0) drawn = largest; // greedy, or infinities left no sum
    tokens[b] = drawn;
    if (seen) seen[b * V + drawn] = 1;
}

template <typename T>
static void cuda_sample(slam_ops *ops, int *tokens, const slam_act *logits, unsigned char *seen, const float *uniform,
                        const slam_sampling *how, int B, int V, int stride) {
    SLAM_LAUNCH((sample_kernel<T>), B, SAMPLE_THREADS, SAMPLE_SHARED, stream_of(ops), tokens, (const T *)logits, seen, uniform,
                (float)how->temperature, how->top_k, how->top_p, (float)how->repetition_penalty, V, stride);
    cuda_launched(ops, "sample");
}

/* ---- sums ----
   Four neighbours are added in float, all else in double, which is slow on most GPUs. The number of blocks depends on n alone. */

enum { SUM_BLOCKS = 1024 };

/* Threads take fours in turn. Bound by memory: 4 n bytes. partial (gridDim.x) */
template <int P, int squares> static __global__ void __launch_bounds__(256) sum_kernel(double *partial, const float *x, size_t n) {
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n / 4; i += (size_t)gridDim.x * 256) {
        float four[4];
        for (int k = 0; k < 4; k += P) {
            const pack<float, P> a = *(const pack<float, P> *)(x + 4 * i + k);
            for (int j = 0; j < P; j++) four[k + j] = squares ? a.at[j] * a.at[j] : a.at[j];
        }
        sum += (four[0] + four[1]) + (four[2] + four[3]);
    }
    if (blockIdx.x == 0 && threadIdx.x < n % 4) {
        const double rest = x[n / 4 * 4 + threadIdx.x];
        sum += squares ? rest * rest : rest;
    }
    sum = block_sum(sum, (double *)shared_memory());
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/* One block: out[0] += the sum of partial (n). */
static __global__ void __launch_bounds__(256) sum_partial_kernel(double *out, const double *partial, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += 256) sum += partial[i];
    sum = block_sum(sum, (double *)shared_memory());
    if (threadIdx.x == 0) out[0] += sum;
}

template <int squares> static void cuda_sums(slam_ops *ops, double *out, const float *x, size_t n) {
    const size_t room = 8 * sizeof(double);
    const int grid = n / 1024 < SUM_BLOCKS ? (int)(n / 1024) + 1 : (int)SUM_BLOCKS;
    double *partial = (double *)((cuda_ops *)ops)->workspace;
    if (n == 0) return;
    if (aligned16(x)) SLAM_LAUNCH((sum_kernel<4, squares>), grid, 256, room, stream_of(ops), partial, x, n);
    else SLAM_LAUNCH((sum_kernel<1, squares>), grid, 256, room, stream_of(ops), partial, x, n);
    SLAM_LAUNCH(sum_partial_kernel, 1, 256, room, stream_of(ops), out, (const double *)partial, grid);
    cuda_launched(ops, squares ? "sum_squares" : "sum");
}

/* ---- AdamW ---- */

typedef struct adamw_numbers {
    double clip;
    float decay, eps, beta2, rest1, rest2, step_size, root;
} adamw_numbers;

/* A thread has P neighbours. Its block's first works out by how much the gradient is scaled, since that takes double, while the
   others fetch their numbers. Bound by memory: w, m, v and g are read, w, m, v and w_act written, 28 n + n sizeof(T) bytes. */
template <typename T, int P>
static __global__ void __launch_bounds__(256)
    adamw_kernel(T *w_act, float *w, float *m, float *v, const float *g, const double *stats, adamw_numbers h, size_t n) {
    float *shared = (float *)shared_memory();
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * P;
    pack<float, P> wi, mi, vi, gi;
    if (i < n) {
        wi = *(const pack<float, P> *)(w + i), mi = *(const pack<float, P> *)(m + i);
        vi = *(const pack<float, P> *)(v + i), gi = *(const pack<float, P> *)(g + i);
    }
    if (threadIdx.x == 0) {
        const double clip = h.clip > 0 ? h.clip / (sqrt(stats[1]) + 1e-6) : 1;
        shared[0] = isfinite(stats[0]) && isfinite(stats[1]) ? (clip < 1 ? (float)clip : 1) : -1;
    }
    __syncthreads();
    const float scale = shared[0];
    if (scale < 0 || i >= n) return;
    pack<T, P> act;
    for (int k = 0; k < P; k++) {
        const float gk = gi.at[k] * scale;
        mi.at[k] += h.rest1 * (gk - mi.at[k]);
        vi.at[k] = h.beta2 * vi.at[k] + h.rest2 * gk * gk;
        wi.at[k] = wi.at[k] * h.decay - h.step_size * mi.at[k] / (sqrtf(vi.at[k]) / h.root + h.eps);
        act.at[k] = (T)wi.at[k];
    }
    *(pack<float, P> *)(w + i) = wi;
    *(pack<float, P> *)(m + i) = mi;
    *(pack<float, P> *)(v + i) = vi;
    if (w_act) *(pack<T, P> *)(w_act + i) = act;
}

template <typename T>
static void cuda_adamw(slam_ops *ops, slam_act *w_act, float *w, float *m, float *v, const float *g, const double *stats,
                       const slam_adamw *h, size_t n) {
    T *act = (void *)w_act == (void *)w ? NULL : (T *)w_act;
    adamw_numbers a;
    if (n == 0) return;
    a.clip = h->clip;
    a.decay = (float)(1 - h->lr * h->weight_decay);
    a.eps = (float)h->eps;
    a.beta2 = (float)h->beta2;
    a.rest1 = (float)(1 - h->beta1);
    a.rest2 = (float)(1 - h->beta2);
    a.step_size = (float)(h->lr / (1 - pow(h->beta1, (double)h->step)));
    a.root = (float)sqrt(1 - pow(h->beta2, (double)h->step));
    if (n % 4 == 0 && aligned16(w, m, v, g) && (uintptr_t)act % (4 * sizeof(T)) == 0)
        SLAM_LAUNCH((adamw_kernel<T, 4>), blocks(n / 4, 256), 256, sizeof(float), stream_of(ops), act, w, m, v, g, stats, a, n);
    else SLAM_LAUNCH((adamw_kernel<T, 1>), blocks(n, 256), 256, sizeof(float), stream_of(ops), act, w, m, v, g, stats, a, n);
    cuda_launched(ops, "adamw");
}

/* ---- attention ----
   Section 3 has the mathematics. There are two sets of kernels. The plain ones take floats, and any head size up to 256: a warp
   works on one query, or on one key. The fast ones take bf16 and head sizes 32, 64 and 128: all products run on tensor cores.

   Neither holds a (T,T) matrix. The softmax of a query is taken over one run of keys after the other (Milakov and Gimelshein
   2018): with m the maximum so far, l = sum_j exp(s_j - m) and o = sum_j exp(s_j - m) v_j over the keys so far, a new run with
   maximum m' first scales l and o by exp(m - max(m, m')), then adds its own. In the end out = o / l and lse = m + log l. The
   backward pass has lse, so that p_ij = exp(s_ij - lse_i) needs no second maximum: it computes s again, tile by tile, which costs
   less than to store and to read it (Dao 2023).

   Sums over queries and sums over keys are taken by different kernels, each of which owns what it writes: dq by tiles of queries,
   dk and dv by tiles of keys. Both compute s and p, seven products instead of five, and in exchange nobody adds to what another
   block has written: no atomics, the same bits every time. */

/* The window of query i of row b: x, y: its first key and the one after its last; z, w: its hole likewise. Empty for i >= T. */
static __device__ __forceinline__ int4 window_of(const slam_window &win, int b, int i) {
    int4 w = {0, 0, 0, 0};
    if (i >= win.T) return w;
    const size_t at = (size_t)b * win.T + i;
    w.x = win.doc_start[at];
    w.y = win.doc_end ? win.doc_end[at] : i + 1;
    if (win.hole) w.z = win.hole[2 * at], w.w = win.hole[2 * at + 1];
    return w;
}

static __device__ __forceinline__ int window_sees(int4 w, int j) { return j >= w.x && j < w.y && (j < w.z || j >= w.w); }
/* Does it see any of the keys a to b - 1? All of them? */
static __device__ __forceinline__ int window_sees_any(int4 w, int a, int b) {
    a = max(a, w.x), b = min(b, w.y);
    return a < b && (a < w.z || b > w.w);
}
static __device__ __forceinline__ int window_sees_all(int4 w, int a, int b) {
    return a >= w.x && b <= w.y && max(a, w.z) >= min(b, w.w);
}
/* Bit k: key j + k, of 32 */
static __device__ __forceinline__ unsigned window_bits(int4 w, int j) {
    const int a = min(max(w.x - j, 0), 32), b = min(max(w.y - j, a), 32);
    const int c = min(max(w.z - j, 0), 32), d = min(max(w.w - j, c), 32);
    return (unsigned)((1ull << b) - (1ull << a)) & ~(unsigned)((1ull << d) - (1ull << c));
}
static __device__ __forceinline__ int window_position(int4 w, int i) { return i - w.x - (w.w - w.z); }

/* Rotation of the query and key heads of qkv in place, R_p of section 3. A thread turns P neighbouring pairs: two accesses of P
   numbers each way. Bound by memory: 2 N (NH + KVH) HS sizeof(T) bytes; the table of angles stays in the cache. */
template <typename T, int P> static __global__ void __launch_bounds__(256) rotate_kernel(T *qkv, const slam_window win) {
    const int half = win.HS / 2, heads = win.NH + win.KVH, threads = heads * half / P;
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, row = index / threads, pair = index % threads * P;
    if (row >= (unsigned)(win.B * win.T)) return;
    const int h = pair / half, c = pair % half, b = row / win.T, i = row % win.T;
    const float *angle = win.rope + (size_t)window_position(window_of(win, b, i), i) * win.HS + c;
    const pack<float, P> cosine = *(const pack<float, P> *)angle, sine = *(const pack<float, P> *)(angle + half);
    T *x = qkv + ((size_t)row * (heads + win.KVH) + h) * win.HS + c;
    pack<T, P> x0 = *(const pack<T, P> *)x, x1 = *(const pack<T, P> *)(x + half);
    for (int k = 0; k < P; k++) {
        const float a = (float)x0.at[k], d = (float)x1.at[k];
        x0.at[k] = (T)(a * cosine.at[k] - d * sine.at[k]);
        x1.at[k] = (T)(d * cosine.at[k] + a * sine.at[k]);
    }
    *(pack<T, P> *)x = x0;
    *(pack<T, P> *)(x + half) = x1;
}

template <typename T> static void cuda_rotate(slam_ops *ops, slam_act *qkv, const slam_window *win) {
    enum { P = 16 / sizeof(T) };
    const cudaStream_t stream = ((cuda_ops *)ops)->stream;
    const size_t pairs = (size_t)win->B * win->T * (win->NH + win->KVH) * (win->HS / 2);
    if (win->HS / 2 % P == 0)
        SLAM_LAUNCH((rotate_kernel<T, P>), (unsigned)((pairs / P + 255) / 256), 256, 0, stream, (T *)qkv, *win);
    else SLAM_LAUNCH((rotate_kernel<T, 1>), (unsigned)((pairs + 255) / 256), 256, 0, stream, (T *)qkv, *win);
}

/* ---- attention: plain kernels ----
   Blocks of PLAIN_WARPS warps, each on its own, with HS numbers a lane apart in registers: channels lane, lane + 32, ... */

enum { PLAIN_WARPS = 4, PLAIN_CHANNELS = 256 / 32 };

/* Dot product of a row of T with floats in shared memory; P divides HS. */
template <typename T, int P> static __device__ __forceinline__ float plain_dot(const float *a, const T *row, int HS) {
    float sum = 0;
    for (int c = 0; c < HS; c += P) {
        const pack<T, P> x = *(const pack<T, P> *)(row + c);
        for (int k = 0; k < P; k++) sum += a[c + k] * (float)x.at[k];
    }
    return sum;
}

/* sums_c += sum over n rows of weight_k x_kc, for this lane's channels */
template <typename T>
static __device__ __forceinline__ void plain_add(float *sums, const float *weight, const T *x, size_t stride, int n, int HS) {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < n; k++)
        for (int m = 0; m < PLAIN_CHANNELS; m++)
            if (lane + 32 * m < HS) sums[m] += weight[k] * (float)x[k * stride + lane + 32 * m];
}

/* to = (HS) from this lane's channels times scale, turned back where there is a table; `turn` is HS floats in shared memory */
template <typename T>
static __device__ __forceinline__ void plain_store(T *to, const float *sums, float scale, float *turn, const slam_window &win,
                                                   int position) {
    const int lane = threadIdx.x % 32, HS = win.HS, half = HS / 2;
    __syncwarp();
    for (int m = 0; m < PLAIN_CHANNELS; m++)
        if (lane + 32 * m < HS) turn[lane + 32 * m] = sums[m] * scale;
    __syncwarp();
    for (int c = lane; c < HS; c += 32) {
        float x = turn[c];
        if (win.rope) {
            const float *angle = win.rope + (size_t)position * HS + c % half;
            x = c < half ? x * angle[0] + turn[c + half] * angle[half] : x * angle[0] - turn[c - half] * angle[half];
        }
        to[c] = (T)x;
    }
}

/* Forward: a warp a query. Of a run of 32 keys each lane takes one, for its score; then each lane takes its channels of all 32
   values. Keys and values come from the caches, where the next query finds them again; bound by arithmetic,
   4 HS flops a pair without tensor cores. */
template <typename T, int P>
static __global__ void __launch_bounds__(32 * PLAIN_WARPS, 1)
    attention_forward_plain(T *out, float *lse, const T *qkv, const slam_window win) {
    const int T_ = win.T, NH = win.NH, HS = win.HS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int index = blockIdx.x * PLAIN_WARPS + warp; // (b,h,i)
    const size_t W = (size_t)(NH + 2 * win.KVH) * HS;
    if (index >= win.B * NH * T_) return;
    const int i = index % T_, h = index / T_ % NH, b = index / T_ / NH;
    float *query = (float *)shared_memory() + warp * (HS + 32), *p = query + HS;
    const T *row = qkv + (size_t)b * T_ * W, *q = row + i * W + h * HS, *key = row + (NH + h * win.KVH / NH) * HS;
    const T *value = key + win.KVH * HS;
    const float scale = rsqrtf((float)HS);
    for (int c = lane; c < HS; c += 32) query[c] = (float)q[c] * scale;
    const int4 w = window_of(win, b, i);
    float max = -INFINITY, sum = 0, o[PLAIN_CHANNELS] = {0};
    for (int j = w.x; j < w.y; j += 32) {
        if (j >= w.z && j < w.w) j = w.w; // so that key j is always one that is seen
        if (j >= w.y) break;
        __syncwarp();
        const int see = window_sees(w, j + lane);
        const float s = see ? plain_dot<T, P>(query, key + (j + lane) * W, HS) : -INFINITY;
        const float above = fmaxf(max, warp_max(s)), keep = expf(max - above), e = see ? expf(s - above) : 0;
        p[lane] = e;
        max = above;
        sum = sum * keep + warp_sum(e);
        for (int m = 0; m < PLAIN_CHANNELS; m++) o[m] *= keep;
        __syncwarp();
        plain_add(o, p, value + j * W, W, min(32, w.y - j), HS);
    }
    T *to = out + (((size_t)b * T_ + i) * NH + h) * HS;
    for (int m = 0; m < PLAIN_CHANNELS; m++)
        if (lane + 32 * m < HS) to[lane + 32 * m] = (T)(o[m] / sum);
    if (lane == 0) lse[index] = max + logf(sum);
}

/* Backward for dq and D: as the forward pass, a warp a query. */
template <typename T, int P>
static __global__ void __launch_bounds__(32 * PLAIN_WARPS, 1)
    attention_backward_queries_plain(T *dqkv, float *D, const T *dout, const T *out, const float *lse, const T *qkv,
                                     const slam_window win) {
    const int T_ = win.T, NH = win.NH, HS = win.HS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int index = blockIdx.x * PLAIN_WARPS + warp; // (b,h,i)
    const size_t W = (size_t)(NH + 2 * win.KVH) * HS;
    if (index >= win.B * NH * T_) return;
    const int i = index % T_, h = index / T_ % NH, b = index / T_ / NH;
    float *query = (float *)shared_memory() + warp * (2 * HS + 32), *d = query + HS, *ds = d + HS;
    const T *row = qkv + (size_t)b * T_ * W, *q = row + i * W + h * HS, *key = row + (NH + h * win.KVH / NH) * HS;
    const T *value = key + win.KVH * HS;
    const size_t at = (((size_t)b * T_ + i) * NH + h) * HS;
    const float scale = rsqrtf((float)HS), shift = lse[index];
    float product = 0;
    for (int c = lane; c < HS; c += 32) {
        query[c] = (float)q[c] * scale;
        d[c] = (float)dout[at + c];
        product += d[c] * (float)out[at + c];
    }
    const float Di = warp_sum(product);
    if (lane == 0) D[index] = Di;
    const int4 w = window_of(win, b, i);
    float dq[PLAIN_CHANNELS] = {0};
    for (int j = w.x; j < w.y; j += 32) {
        if (j >= w.z && j < w.w) j = w.w;
        if (j >= w.y) break;
        __syncwarp();
        float x = 0;
        if (window_sees(w, j + lane))
            x = expf(plain_dot<T, P>(query, key + (j + lane) * W, HS) - shift) *
                (plain_dot<T, P>(d, value + (j + lane) * W, HS) - Di);
        ds[lane] = x;
        __syncwarp();
        plain_add(dq, ds, key + j * W, W, min(32, w.y - j), HS);
    }
    plain_store(dqkv + (size_t)b * T_ * W + i * W + h * HS, dq, scale, query, win, window_position(w, i));
}

/* Backward for dk and dv: a warp a key; it goes through the queries of all heads that read it, 32 at a time. */
template <typename T, int P>
static __global__ void __launch_bounds__(32 * PLAIN_WARPS, 1)
    attention_backward_keys_plain(T *dqkv, const float *D, const T *dout, const float *lse, const T *qkv, const slam_window win) {
    const int T_ = win.T, NH = win.NH, KVH = win.KVH, HS = win.HS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int index = blockIdx.x * PLAIN_WARPS + warp; // (b,g,j)
    const size_t W = (size_t)(NH + 2 * KVH) * HS, O = (size_t)NH * HS;
    if (index >= win.B * KVH * T_) return;
    const int j = index % T_, g = index / T_ % KVH, b = index / T_ / KVH;
    float *key = (float *)shared_memory() + warp * (2 * HS + 64), *value = key + HS, *p = value + HS, *ds = p + 32;
    const T *row = qkv + (size_t)b * T_ * W, *k = row + j * W + (NH + g) * HS;
    const float scale = rsqrtf((float)HS);
    for (int c = lane; c < HS; c += 32) {
        key[c] = (float)k[c] * scale;
        value[c] = (float)k[KVH * HS + c];
    }
    float dk[PLAIN_CHANNELS] = {0}, dv[PLAIN_CHANNELS] = {0};
    for (int h = g * (NH / KVH); h < (g + 1) * (NH / KVH); h++) {
        const T *q = row + h * HS, *d = dout + (size_t)b * T_ * O + h * HS;
        const size_t head = ((size_t)b * NH + h) * T_;
        for (int first = win.doc_end ? 0 : j; first < T_; first += 32) {
            const int i = first + lane, see = window_sees(window_of(win, b, i), j);
            if (!__any_sync(0xffffffffu, see)) continue;
            __syncwarp();
            p[lane] = see ? expf(plain_dot<T, P>(key, q + i * W, HS) - lse[head + i]) : 0;
            ds[lane] = see ? p[lane] * (plain_dot<T, P>(value, d + i * O, HS) - D[head + i]) : 0;
            __syncwarp();
            plain_add(dv, p, d + first * O, O, min(32, T_ - first), HS);
            plain_add(dk, ds, q + first * W, W, min(32, T_ - first), HS);
        }
    }
    T *to = dqkv + ((size_t)b * T_ + j) * W + (NH + g) * HS;
    plain_store(to, dk, scale, key, win, window_position(window_of(win, b, j), j));
    for (int m = 0; m < PLAIN_CHANNELS; m++)
        if (lane + 32 * m < HS) to[KVH * HS + lane + 32 * m] = (T)dv[m];
}

template <typename T, int P>
static void cuda_forward_plain(slam_ops *ops, slam_act *out, float *lse, const slam_act *qkv, const slam_window *win) {
    const size_t queries = (size_t)win->B * win->NH * win->T, shared = PLAIN_WARPS * (win->HS + 32) * sizeof(float);
    SLAM_LAUNCH((attention_forward_plain<T, P>), (unsigned)((queries + PLAIN_WARPS - 1) / PLAIN_WARPS), 32 * PLAIN_WARPS, shared,
                stream_of(ops), (T *)out, lse, (const T *)qkv, *win);
    cuda_launched(ops, "attention_forward");
}

template <typename T, int P>
static void cuda_backward_plain(slam_ops *ops, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out,
                                const float *lse, const slam_act *qkv, const slam_window *win) {
    const cudaStream_t stream = ((cuda_ops *)ops)->stream;
    const size_t queries = (size_t)win->B * win->NH * win->T, keys = (size_t)win->B * win->KVH * win->T;
    const size_t shared = PLAIN_WARPS * (2 * win->HS + 64) * sizeof(float);
    SLAM_LAUNCH((attention_backward_queries_plain<T, P>), (unsigned)((queries + PLAIN_WARPS - 1) / PLAIN_WARPS), 32 * PLAIN_WARPS,
                shared, stream, (T *)dqkv, D, (const T *)dout, (const T *)out, lse, (const T *)qkv, *win);
    SLAM_LAUNCH((attention_backward_keys_plain<T, P>), (unsigned)((keys + PLAIN_WARPS - 1) / PLAIN_WARPS), 32 * PLAIN_WARPS, shared,
                stream, (T *)dqkv, D, (const T *)dout, lse, (const T *)qkv, *win);
    cuda_launched(ops, "attention_backward");
}

/* ---- attention: what the fast kernels are made of ----
   Tiles of rows of HS numbers lie in shared memory, row after row, in chunks of 16 bytes. ldmatrix reads one chunk of each of 8
   rows at a time, which must lie in different banks: so chunk c of row r is kept where chunk c ^ r would be. A tile is named by
   its byte in shared memory, a multiple of 128. */
template <int HS> static __device__ __forceinline__ int tile_at(int row, int chunk) {
    return row * HS * 2 + (chunk ^ (HS == 32 ? row >> 1 & 3 : row & 7)) * 16;
}

/* ROWS rows, `stride` numbers apart, on their way to a tile by THREADS threads; rows from `valid` on become 0. */
template <int HS, int ROWS, int THREADS>
static __device__ __forceinline__ void tile_load(int tile, const bf16 *from, int stride, int valid, int thread) {
    constexpr int CHUNKS = HS / 8, STEP = THREADS / CHUNKS; // rows at a time
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "every step places its chunks alike");
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    char *to = shared_memory() + tile + tile_at<HS>(row, chunk);
    from += (ptrdiff_t)row * stride + chunk * 8;
    for (int k = 0; k < ROWS; k += STEP, from += STEP * stride) copy_async(to + k * HS * 2, from, row + k < valid);
}

/* Operands of mma_bf16 from a tile, 16 rows by 16 columns of it: an A with the tile's rows; Bs whose 8 columns are rows of the
   tile and whose 16 rows are its columns (b[0], b[1] of rows 0..7; b[2], b[3] of rows 8..15); and Bs whose 16 rows are rows of
   the tile (b[0], b[1] of columns 0..7; b[2], b[3] of columns 8..15). `at` is the tile plus where this lane reads of its first
   16 x 16: row and column being multiples of 16, an exclusive or gets from there to the lane's chunk of any other. */
template <int HS> static __device__ __forceinline__ int tile_lane(void) {
    const int lane = threadIdx.x % 32;
    return tile_at<HS>(lane % 16, lane / 16);
}
template <int HS> static __device__ __forceinline__ int tile_lane_b(void) {
    const int lane = threadIdx.x % 32;
    return tile_at<HS>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
template <int HS> static __device__ __forceinline__ void tile_read(uint32_t r[4], int at, int row, int column) {
    ldmatrix(r, shared_memory() + row * HS * 2 + (at ^ column * 2));
}
template <int HS> static __device__ __forceinline__ void tile_read_transposed(uint32_t r[4], int at, int row, int column) {
    ldmatrix_transposed(r, shared_memory() + row * HS * 2 + (at ^ column * 2));
}

/* The A operands of 16 whole rows straight from global memory; rows from `valid` on are 0. */
template <int HS> static __device__ __forceinline__ void rows_a(uint32_t a[HS / 16][4], const bf16 *from, int stride, int valid) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int k = 0; k < HS / 16; k++)
        for (int r = 0; r < 4; r++) {
            const int row = g + r % 2 * 8;
            a[k][r] = row < valid ? *(const uint32_t *)(from + (ptrdiff_t)row * stride + k * 16 + r / 2 * 8 + 2 * t) : 0;
        }
}

/* Dot products of rows of two operands, of row g + 8 r; the four lanes that share it all get it. */
template <int HS>
static __device__ __forceinline__ float rows_dot(const uint32_t a[HS / 16][4], const uint32_t b[HS / 16][4], int r) {
    float sum = 0;
    for (int k = 0; k < HS / 16; k++)
        for (int e = r; e < 4; e += 2) {
            sum += __uint_as_float(a[k][e] << 16) * __uint_as_float(b[k][e] << 16);
            sum += __uint_as_float(a[k][e] & 0xffff0000u) * __uint_as_float(b[k][e] & 0xffff0000u);
        }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

/* Sums (16 by 16) of a product as the A operand of the next: two neighbours of C's tiles of 8 columns lie as A's fragments do. */
static __device__ __forceinline__ void sums_a(uint32_t a[4], const float left[4], const float right[4]) {
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}

/* A warp's 16 MT rows of sums, rounded, to global memory: by way of a tile of its own, so that accesses are 16 bytes and
   sectors whole. */
template <int HS, int MT>
static __device__ __forceinline__ void rows_store(bf16 *to, int stride, int valid, const float c[MT][HS / 8][4], int at) {
    char *tile = shared_memory() + at;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp(); // other lanes may still read what lies there
    for (int m = 0; m < MT; m++)
        for (int n = 0; n < HS / 8; n++)
            for (int r = 0; r < 2; r++)
                *(uint32_t *)(tile + tile_at<HS>(16 * m + 8 * r + g, n) + 4 * t) = pack_bf16(c[m][n][2 * r], c[m][n][2 * r + 1]);
    __syncwarp();
    for (int k = lane; k < 16 * MT * HS / 8; k += 32) {
        const int row = k / (HS / 8), chunk = k % (HS / 8);
        if (row < valid) *(uint4 *)(to + (ptrdiff_t)row * stride + chunk * 8) = *(const uint4 *)(tile + tile_at<HS>(row, chunk));
    }
}

/* R^-1 of a warp's rows of sums. A thread has both numbers of each pair, as tiles n and n + HS/16 of its columns. */
template <int HS, int MT>
static __device__ __forceinline__ void rows_turn_back(float c[MT][HS / 8][4], const float *rope, const int position[MT][2]) {
    const int t = threadIdx.x % 4;
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < 2; r++) {
            const float *angle = rope + (size_t)position[m][r] * HS + 2 * t;
            for (int n = 0; n < HS / 16; n++) {
                const float2 cosine = *(const float2 *)(angle + 8 * n), sine = *(const float2 *)(angle + HS / 2 + 8 * n);
                float *x = c[m][n] + 2 * r, *y = c[m][n + HS / 16] + 2 * r;
                const float x0 = x[0], x1 = x[1];
                x[0] = x0 * cosine.x + y[0] * sine.x;
                x[1] = x1 * cosine.y + y[1] * sine.y;
                y[0] = y[0] * cosine.x - x0 * sine.x;
                y[1] = y[1] * cosine.y - x1 * sine.y;
            }
        }
}

/* Adds the sums of GROUPS groups of THREADS threads, pairwise, into those of group 0; `room` is for half of them. */
template <int HS, int MT, int GROUPS, int THREADS>
static __device__ __forceinline__ void groups_add(float c[MT][HS / 8][4], float *room) {
    const int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
    for (int half = GROUPS / 2; half > 0; half /= 2) {
        float *place = room + group % half * (MT * HS / 2) * THREADS + thread;
        __syncthreads();
        if (group >= half && group < 2 * half)
            for (int m = 0; m < MT; m++)
                for (int n = 0; n < HS / 8; n++)
                    for (int k = 0; k < 4; k++) place[((m * HS / 8 + n) * 4 + k) * THREADS] = c[m][n][k];
        __syncthreads();
        if (group < half)
            for (int m = 0; m < MT; m++)
                for (int n = 0; n < HS / 8; n++)
                    for (int k = 0; k < 4; k++) c[m][n][k] += place[((m * HS / 8 + n) * 4 + k) * THREADS];
    }
}

/* 2^x on the special function unit */
static __device__ __forceinline__ float exp2_fast(float x) {
#ifdef SLAM_EMULATOR
    return exp2f(x);
#else
    float y = x;
    SLAM_PTX(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
    return y;
#endif
}

#define LOG2_E 1.44269504f // exp(s) = 2^(s log2 e)

/* Scores (16 MT queries by KEYS keys from j on) of what is not seen become -INFINITY. windows: of these queries. */
template <int MT, int KEYS> static __device__ __forceinline__ void rows_hide(float s[MT][KEYS / 8][4], const int4 *windows, int j) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int4 w = windows[lane % (16 * MT)]; // each lane works out the bits of one query
    for (int part = 0; part < KEYS / 32; part++) {
        const unsigned bits = window_bits(w, j + 32 * part);
        for (int m = 0; m < MT; m++)
            for (int r = 0; r < 2; r++) {
                const unsigned see = __shfl_sync(0xffffffffu, bits, 16 * m + 8 * r + g) >> 2 * t;
                for (int n = 0; n < 4; n++)
                    for (int e = 0; e < 2; e++)
                        if (!(see >> (8 * n + e) & 1)) s[m][4 * part + n][2 * r + e] = -INFINITY;
            }
    }
}

/* Which pairs of tiles have anything to compute. For every tile that a block may visit there is a word, and in it a byte for
   each warp (or group of warps) w: 0: nothing is seen, 1: something, so the window decides for each pair, 2: everything. This
   leaves only tiles that somebody visits, in order, as tile << 8 | sum of byte_w << 2 w, and returns how many there are.
   All threads call it, after a barrier that follows the writes; visits has tiles + 1 words. */
static __device__ __forceinline__ int visits_list(int *visits, int tiles) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        int n = 0;
        for (int first = 0; first < tiles; first += 32) {
            const int tile = first + lane, seen = tile < tiles ? visits[tile] : 0;
            const unsigned some = __ballot_sync(0xffffffffu, seen != 0);
            const int bits = (seen & 3) | (seen >> 6 & 12) | (seen >> 12 & 48) | (seen >> 18 & 192);
            __syncwarp(); // all have read what is written over now
            if (seen) visits[n + __popc(some & ((1u << lane) - 1))] = tile << 8 | bits;
            n += __popc(some);
        }
        if (lane == 0) visits[tiles] = n;
    }
    __syncthreads();
    return visits[tiles];
}

/* The same for a tile of queries, 16 MT from i on for each of 4 warps, and tiles of KEYS keys; windows (64 MT) gets theirs. */
template <int MT, int KEYS>
static __device__ __forceinline__ int visits_of_queries(int *visits, int4 *windows, const slam_window &win, int b, int i) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (win.T + KEYS - 1) / KEYS;
    const int4 w = window_of(win, b, i + warp * 16 * MT + lane % (16 * MT));
    if (lane < 16 * MT) windows[warp * 16 * MT + lane] = w;
    for (int k = threadIdx.x; k < tiles; k += 128) visits[k] = 0;
    int first = w.y > w.x ? w.x : win.T, end = w.y;
    for (int offset = 16; offset > 0; offset /= 2) {
        first = min(first, __shfl_xor_sync(0xffffffffu, first, offset));
        end = max(end, __shfl_xor_sync(0xffffffffu, end, offset));
    }
    __syncthreads();
    for (int k = first / KEYS; k * KEYS < end; k++) {
        const int some = __any_sync(0xffffffffu, window_sees_any(w, k * KEYS, k * KEYS + KEYS));
        const int all = __all_sync(0xffffffffu, w.y == 0 || window_sees_all(w, k * KEYS, k * KEYS + KEYS));
        if (lane == 0 && some) ((unsigned char *)(visits + k))[warp] = all ? 2 : 1;
    }
    __syncthreads();
    return visits_list(visits, tiles);
}

/* ---- attention: fast forward pass ----
   A block is a tile of 64 MT queries of one head: 4 warps, 16 MT queries each, whose q and o stay in registers. It goes through
   the tiles of KEYS keys that any of them sees; while one is worked on, the next comes into the other half of shared memory.
   With MT = 2 each fragment of k and v that is read from shared memory serves two products: with one the reads, 128 bytes a
   clock, would take longer than the products. What bounds it: 4 HS flops and one exponential, of which a processor makes 16 a
   clock, for each pair of query and key. At the tensor cores' peak, which mma.sync does not reach on Hopper, both would take
   equally long for HS = 64; other warps do the one during the other. Blocks start in the order of their numbers, so those with
   late queries, which have most to do in long documents, get low ones. */
template <int HS, int MT, int KEYS>
static __global__ void __launch_bounds__(128, HS == 128 ? 1 : 2)
    attention_forward_kernel(bf16 *out, float *lse, const bf16 *qkv, const slam_window win) {
    constexpr int QUERY_TILE = 64 * MT, TILE = KEYS * HS * 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int h = blockIdx.x % win.NH, b = blockIdx.x / win.NH, i0 = (gridDim.y - 1 - blockIdx.y) * QUERY_TILE;
    const int W = (win.NH + 2 * win.KVH) * HS, O = win.NH * HS;
    const bf16 *row = qkv + (size_t)b * win.T * W, *key = row + (win.NH + h * win.KVH / win.NH) * HS, *value = key + win.KVH * HS;
    int4 *windows = (int4 *)(shared_memory() + 4 * TILE); // after two stages, each a tile of k and one of v
    int *visits = (int *)(windows + QUERY_TILE);

    const int i = i0 + warp * 16 * MT; // this warp's first query
    uint32_t q[MT][HS / 16][4];
    for (int m = 0; m < MT; m++) rows_a<HS>(q[m], row + (ptrdiff_t)(i + 16 * m) * W + h * HS, W, win.T - i - 16 * m);
    const int n_visits = visits_of_queries<MT, KEYS>(visits, windows, win, b, i0);

    float o[MT][HS / 8][4], max_[MT][2], sum[MT][2];
    for (int m = 0; m < MT; m++) {
        for (int n = 0; n < HS / 8; n++)
            for (int k = 0; k < 4; k++) o[m][n][k] = 0;
        for (int r = 0; r < 2; r++) max_[m][r] = -INFINITY, sum[m][r] = 0;
    }
    const float scale = rsqrtf((float)HS) * LOG2_E;
    for (int visit = -1; visit < n_visits; visit++) {
        copy_async_wait<0>();
        __syncthreads(); // the tile has come, and nobody reads the one before it any more
        if (visit + 1 < n_visits) {
            const int j0 = (visits[visit + 1] >> 8) * KEYS;
            const int stage = (visit + 1) % 2 * 2 * TILE;
            tile_load<HS, KEYS, 128>(stage, key + (ptrdiff_t)j0 * W, W, win.T - j0, threadIdx.x);
            tile_load<HS, KEYS, 128>(stage + TILE, value + (ptrdiff_t)j0 * W, W, win.T - j0, threadIdx.x);
        }
        copy_async_commit();
        if (visit < 0) continue;
        const int seen = visits[visit] >> 2 * warp & 3, j0 = (visits[visit] >> 8) * KEYS;
        if (seen == 0) continue;
        const int k_tile = visit % 2 * 2 * TILE + tile_lane_b<HS>(), v_tile = visit % 2 * 2 * TILE + TILE + tile_lane<HS>();

        float s[MT][KEYS / 8][4];
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < KEYS / 8; n++)
                for (int k = 0; k < 4; k++) s[m][n][k] = 0;
        for (int k = 0; k < HS / 16; k++)
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t x[4];
                tile_read<HS>(x, k_tile, 16 * n, 16 * k);
                for (int m = 0; m < MT; m++) {
                    mma_bf16(s[m][2 * n], q[m][k], x[0], x[1]);
                    mma_bf16(s[m][2 * n + 1], q[m][k], x[2], x[3]);
                }
            }
        if (seen == 1) rows_hide<MT, KEYS>(s, windows + warp * 16 * MT, j0);
        float above[MT][2], rise = 0;
        for (int m = 0; m < MT; m++)
            for (int r = 0; r < 2; r++) {
                float x = s[m][0][2 * r];
                for (int n = 0; n < KEYS / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                above[m][r] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                rise = fmaxf(rise,
                             (above[m][r] - max_[m][r]) * scale); // -inf - -inf is NaN where nothing is seen yet: fmaxf ignores it
            }
        if (__any_sync(0xffffffffu, rise > 8)) // p may grow to 2^8 before o and the sum are rescaled: far from any limit
            for (int m = 0; m < MT; m++)
                for (int r = 0; r < 2; r++) {
                    const float higher = fmaxf(max_[m][r], above[m][r]);
                    const float keep = exp2_fast(max_[m][r] * scale - (higher == -INFINITY ? 0 : higher * scale));
                    max_[m][r] = higher;
                    sum[m][r] *= keep;
                    for (int n = 0; n < HS / 8; n++) o[m][n][2 * r] *= keep, o[m][n][2 * r + 1] *= keep;
                }
        for (int m = 0; m < MT; m++)
            for (int r = 0; r < 2; r++) {
                const float shift = max_[m][r] == -INFINITY ? 0 : max_[m][r] * scale;
                for (int n = 0; n < KEYS / 8; n++)
                    for (int e = 0; e < 2; e++) {
                        s[m][n][2 * r + e] = exp2_fast(s[m][n][2 * r + e] * scale - shift);
                        sum[m][r] += s[m][n][2 * r + e];
                    }
            }
        for (int k = 0; k < KEYS / 16; k++) {
            uint32_t p[MT][4];
            for (int m = 0; m < MT; m++) sums_a(p[m], s[m][2 * k], s[m][2 * k + 1]);
            for (int n = 0; n < HS / 16; n++) {
                uint32_t x[4];
                tile_read_transposed<HS>(x, v_tile, 16 * k, 16 * n);
                for (int m = 0; m < MT; m++) {
                    mma_bf16(o[m][2 * n], p[m], x[0], x[1]);
                    mma_bf16(o[m][2 * n + 1], p[m], x[2], x[3]);
                }
            }
        }
    }

    for (int m = 0; m < MT; m++)
        for (int r = 0; r < 2; r++) {
            sum[m][r] += __shfl_xor_sync(0xffffffffu, sum[m][r], 1);
            sum[m][r] += __shfl_xor_sync(0xffffffffu, sum[m][r], 2);
            const int at = i + 16 * m + 8 * r + g;
            if (t == 0 && at < win.T) lse[(size_t)blockIdx.x * win.T + at] = max_[m][r] * rsqrtf((float)HS) + logf(sum[m][r]);
            const float inverse = 1 / sum[m][r];
            for (int n = 0; n < HS / 8; n++) o[m][n][2 * r] *= inverse, o[m][n][2 * r + 1] *= inverse;
        }
    __syncthreads(); // all have read the last tiles, whose place the output takes on its way
    rows_store<HS, MT>(out + ((size_t)b * win.T + i) * O + h * HS, O, win.T - i, o, warp * 16 * MT * HS * 2);
}

template <int HS, int MT, int KEYS>
static void cuda_forward_fast(slam_ops *ops, slam_act *out, float *lse, const slam_act *qkv, const slam_window *win) {
    const int tiles = (win->T + 64 * MT - 1) / (64 * MT);
    const size_t shared = 4 * KEYS * HS * 2 + 64 * MT * sizeof(int4) + ((win->T + KEYS - 1) / KEYS + 1) * sizeof(int);
    cudaFuncSetAttribute(attention_forward_kernel<HS, MT, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    SLAM_LAUNCH((attention_forward_kernel<HS, MT, KEYS>), dim3(win->B * win->NH, tiles), 128, shared, stream_of(ops), (bf16 *)out,
                lse, (const bf16 *)qkv, *win);
    cuda_launched(ops, "attention_forward");
}

/* ---- attention: fast backward pass ----
   dq: a block is a tile of 64 MT queries of one head, as in the forward pass; q and dout stay in registers. ds comes out of its
   sums just as the product with k wants it. D is computed first; the kernel of dk and dv reads it. What bounds it:
   three products for each tile, 6 HS flops a pair. */
template <int HS, int MT, int KEYS>
static __global__ void __launch_bounds__(128, HS == 128 ? 1 : 2)
    attention_backward_queries_kernel(bf16 *dqkv, float *D, const bf16 *dout, const bf16 *out, const float *lse, const bf16 *qkv,
                                      const slam_window win) {
    constexpr int QUERY_TILE = 64 * MT, TILE = KEYS * HS * 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int h = blockIdx.x % win.NH, b = blockIdx.x / win.NH, i0 = (gridDim.y - 1 - blockIdx.y) * QUERY_TILE;
    const int W = (win.NH + 2 * win.KVH) * HS, O = win.NH * HS;
    const size_t first = (size_t)b * win.T;
    const bf16 *key = qkv + first * W + (win.NH + h * win.KVH / win.NH) * HS;
    int4 *windows = (int4 *)(shared_memory() + 4 * TILE); // after two stages, each a tile of k and one of v
    int *visits = (int *)(windows + QUERY_TILE);

    const int i = i0 + warp * 16 * MT; // this warp's first query
    uint32_t q[MT][HS / 16][4], d[MT][HS / 16][4];
    float shift[MT][2], Di[MT][2]; // lse log2 e, D
    for (int m = 0; m < MT; m++) {
        rows_a<HS>(q[m], out + (first + i + 16 * m) * O + h * HS, O, win.T - i - 16 * m);
        rows_a<HS>(d[m], dout + (first + i + 16 * m) * O + h * HS, O, win.T - i - 16 * m);
    }
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < 2; r++) {
            const int at = i + 16 * m + 8 * r + g;
            const size_t query = (size_t)blockIdx.x * win.T + at;
            Di[m][r] = rows_dot<HS>(q[m], d[m], r);
            shift[m][r] = at < win.T ? lse[query] * LOG2_E : 0;
            if (at < win.T && t == 0) D[query] = Di[m][r];
        }
    for (int m = 0; m < MT; m++) rows_a<HS>(q[m], qkv + (first + i + 16 * m) * W + h * HS, W, win.T - i - 16 * m);
    const int n_visits = visits_of_queries<MT, KEYS>(visits, windows, win, b, i0);

    float dq[MT][HS / 8][4];
    for (int m = 0; m < MT; m++)
        for (int n = 0; n < HS / 8; n++)
            for (int k = 0; k < 4; k++) dq[m][n][k] = 0;
    const float scale = rsqrtf((float)HS);
    for (int visit = -1; visit < n_visits; visit++) {
        copy_async_wait<0>();
        __syncthreads(); // the tile has come, and nobody reads the one before it any more
        if (visit + 1 < n_visits) {
            const int j0 = (visits[visit + 1] >> 8) * KEYS;
            const int stage = (visit + 1) % 2 * 2 * TILE;
            const bf16 *k = key + (ptrdiff_t)j0 * W;
            tile_load<HS, KEYS, 128>(stage, k, W, win.T - j0, threadIdx.x);
            tile_load<HS, KEYS, 128>(stage + TILE, k + win.KVH * HS, W, win.T - j0, threadIdx.x);
        }
        copy_async_commit();
        if (visit < 0) continue;
        const int seen = visits[visit] >> 2 * warp & 3, j0 = (visits[visit] >> 8) * KEYS;
        if (seen == 0) continue;
        const int stage = visit % 2 * 2 * TILE, k_tile = stage + tile_lane_b<HS>(), v_tile = k_tile + TILE;

        float p[MT][KEYS / 8][4], ds[MT][KEYS / 8][4];
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < KEYS / 8; n++)
                for (int k = 0; k < 4; k++) p[m][n][k] = 0, ds[m][n][k] = -Di[m][k / 2];
        for (int k = 0; k < HS / 16; k++)
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t x[4], y[4];
                tile_read<HS>(x, k_tile, 16 * n, 16 * k);
                tile_read<HS>(y, v_tile, 16 * n, 16 * k);
                for (int m = 0; m < MT; m++) {
                    mma_bf16(p[m][2 * n], q[m][k], x[0], x[1]);
                    mma_bf16(p[m][2 * n + 1], q[m][k], x[2], x[3]);
                    mma_bf16(ds[m][2 * n], d[m][k], y[0], y[1]);
                    mma_bf16(ds[m][2 * n + 1], d[m][k], y[2], y[3]);
                }
            }
        if (seen == 1) rows_hide<MT, KEYS>(p, windows + warp * 16 * MT, j0);
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < KEYS / 8; n++)
                for (int k = 0; k < 4; k++) ds[m][n][k] *= exp2_fast(p[m][n][k] * (scale * LOG2_E) - shift[m][k / 2]);
        for (int k = 0; k < KEYS / 16; k++) {
            uint32_t a[MT][4];
            for (int m = 0; m < MT; m++) sums_a(a[m], ds[m][2 * k], ds[m][2 * k + 1]);
            for (int n = 0; n < HS / 16; n++) {
                uint32_t x[4];
                tile_read_transposed<HS>(x, stage + tile_lane<HS>(), 16 * k, 16 * n);
                for (int m = 0; m < MT; m++) {
                    mma_bf16(dq[m][2 * n], a[m], x[0], x[1]);
                    mma_bf16(dq[m][2 * n + 1], a[m], x[2], x[3]);
                }
            }
        }
    }

    int position[MT][2];
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < 2; r++) {
            const int at = warp * 16 * MT + 16 * m + 8 * r + g;
            position[m][r] = i0 + at < win.T ? window_position(windows[at], i0 + at) : 0;
            for (int n = 0; n < HS / 8; n++) dq[m][n][2 * r] *= scale, dq[m][n][2 * r + 1] *= scale;
        }
    if (win.rope) rows_turn_back<HS, MT>(dq, win.rope, position);
    __syncthreads(); // all have read the last tiles, whose place dq takes on its way
    rows_store<HS, MT>(dqkv + (first + i) * W + h * HS, W, win.T - i, dq, warp * 16 * MT * HS * 2);
}

/* dk and dv: a block is a tile of 16 MT KW keys of one key/value head. Its warps form GROUPS groups of KW, and the pairs of (head
   that reads this one, tile of QUERY_TILE queries) are dealt to the groups in turn; in the end the groups' sums are added pairwise.
   So a block has many warps and yet few keys: there are enough blocks for all processors even where heads share keys, and since
   the longest come first they end together. A warp has 16 MT keys, whose dk and dv stay in registers. s and dp are computed
   transposed, keys by queries, which makes p and ds come out of their sums just as the products with dout and q want them.
   What bounds it: four products for each pair of tiles, 8 HS flops a pair of query and key. */
template <int HS, int MT, int KW, int GROUPS, int QUERY_TILE>
static __global__ void __launch_bounds__(32 * KW * GROUPS, 1)
    attention_backward_keys_kernel(bf16 *dqkv, const float *D, const bf16 *dout, const float *lse, const bf16 *qkv,
                                   const slam_window win) {
    constexpr int KEYS = 16 * MT * KW, THREADS = 32 * KW, TILE = QUERY_TILE * HS * 2;
    static_assert(2 * QUERY_TILE <= THREADS && QUERY_TILE <= 32 && KW <= 4, "threads for what is kept with each query");
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS, warp = thread / 32;
    const int kv = blockIdx.x % win.KVH, b = blockIdx.x / win.KVH, j0 = blockIdx.y * KEYS;
    const int heads = win.NH / win.KVH, tiles = (win.T + QUERY_TILE - 1) / QUERY_TILE;
    const int W = (win.NH + 2 * win.KVH) * HS, O = win.NH * HS;
    const size_t first = (size_t)b * win.T;
    constexpr int V = KEYS * HS * 2, STAGES = 2 * V; // tiles of k, of v, and for each group twice a tile of q and of dout
    int4 *windows = (int4 *)(shared_memory() + STAGES + GROUPS * 4 * TILE); // for each of these tiles of its queries,
    float *statistics = (float *)(windows + GROUPS * 2 * QUERY_TILE);       // and their lse log2 e, then -D
    int *visits = (int *)(statistics + GROUPS * 4 * QUERY_TILE);
    {
        const bf16 *key = qkv + (first + j0) * W + (win.NH + kv) * HS;
        tile_load<HS, KEYS, THREADS * GROUPS>(0, key, W, win.T - j0, threadIdx.x);
        tile_load<HS, KEYS, THREADS * GROUPS>(V, key + win.KVH * HS, W, win.T - j0, threadIdx.x);
        copy_async_commit();
    }
    const int none = win.doc_end ? 0 : j0 / QUERY_TILE; // tiles before this one see no key here
    for (int k = threadIdx.x; k < none; k += THREADS * GROUPS) visits[k] = 0;
    for (int k = none + threadIdx.x / 32; k < tiles; k += KW * GROUPS) {
        const int i = k * QUERY_TILE + lane % QUERY_TILE;
        const int4 w = window_of(win, b, i);
        int word = 0;
        for (int part = 0; part < KW; part++) {
            const int j = j0 + part * 16 * MT;
            const int some = __any_sync(0xffffffffu, window_sees_any(w, j, j + 16 * MT));
            const int all = __all_sync(0xffffffffu, i >= win.T || window_sees_all(w, j, j + 16 * MT));
            word |= (some ? all ? 2 : 1 : 0) << 8 * part;
        }
        if (lane == 0) visits[k] = word;
    }
    __syncthreads();
    const int n_visits = visits_list(visits, tiles);

    float dk[MT][HS / 8][4], dv[MT][HS / 8][4];
    for (int m = 0; m < MT; m++)
        for (int n = 0; n < HS / 8; n++)
            for (int k = 0; k < 4; k++) dk[m][n][k] = 0, dv[m][n][k] = 0;
    const float scale = rsqrtf((float)HS);
    /* the next query head of the group, the next visit; what this warp sees of the tiles that have come */
    int next_head = group / max(n_visits, 1), next = group % max(n_visits, 1), seen = 0;
    for (int round = -1; n_visits > 0 && round * GROUPS < heads * n_visits; round++) {
        copy_async_wait<0>();
        __syncthreads(); // the tiles have come, and nobody reads those before them any more
        int4 held = {0, 0, 0, 0};
        const int next_stage = (round + 1) % 2 + 2 * group, more = next_head < heads;
        if (more) {
            const int h = kv * heads + next_head, i0 = (visits[next] >> 8) * QUERY_TILE;
            const int stage = STAGES + next_stage * 2 * TILE;
            tile_load<HS, QUERY_TILE, THREADS>(stage, qkv + (first + i0) * W + h * HS, W, win.T - i0, thread);
            tile_load<HS, QUERY_TILE, THREADS>(stage + TILE, dout + (first + i0) * O + h * HS, O, win.T - i0, thread);
            const int i = i0 + thread % QUERY_TILE;
            if (thread < QUERY_TILE) held = window_of(win, b, i);
            else if (thread < 2 * QUERY_TILE && i < win.T) {
                const size_t query = ((size_t)b * win.NH + h) * win.T + i;
                held.x = __float_as_int(lse[query] * LOG2_E);
                held.y = __float_as_int(-D[query]);
            }
        }
        copy_async_commit();
        if (seen) {
            const int stage = (round & 1) + 2 * group;
            const int tile = STAGES + stage * 2 * TILE, q_tile = tile + tile_lane_b<HS>(), d_tile = q_tile + TILE;
            const int k_tile = warp * 16 * MT * HS * 2 + tile_lane<HS>(), v_tile = k_tile + V;
            const float *shift = statistics + stage * 2 * QUERY_TILE + 2 * t, *minus_D = shift + QUERY_TILE;
            float p[MT][QUERY_TILE / 8][4], ds[MT][QUERY_TILE / 8][4];
            for (int n = 0; n < QUERY_TILE / 8; n++)
                for (int k = 0; k < 4; k++) {
                    for (int m = 0; m < MT; m++) p[m][n][k] = 0, ds[m][n][k] = minus_D[8 * n + k % 2];
                }
            for (int k = 0; k < HS / 16; k++) {
                uint32_t x[MT][4];
                for (int m = 0; m < MT; m++) tile_read<HS>(x[m], k_tile, 16 * m, 16 * k);
                for (int n = 0; n < QUERY_TILE / 16; n++) {
                    uint32_t q[4];
                    tile_read<HS>(q, q_tile, 16 * n, 16 * k);
                    for (int m = 0; m < MT; m++) {
                        mma_bf16(p[m][2 * n], x[m], q[0], q[1]);
                        mma_bf16(p[m][2 * n + 1], x[m], q[2], q[3]);
                    }
                }
            }
            for (int k = 0; k < HS / 16; k++) {
                uint32_t x[MT][4];
                for (int m = 0; m < MT; m++) tile_read<HS>(x[m], v_tile, 16 * m, 16 * k);
                for (int n = 0; n < QUERY_TILE / 16; n++) {
                    uint32_t d[4];
                    tile_read<HS>(d, d_tile, 16 * n, 16 * k);
                    for (int m = 0; m < MT; m++) {
                        mma_bf16(ds[m][2 * n], x[m], d[0], d[1]);
                        mma_bf16(ds[m][2 * n + 1], x[m], d[2], d[3]);
                    }
                }
            }
            if (seen == 1) {
                const int4 w = windows[stage * QUERY_TILE + lane % QUERY_TILE];
                const unsigned bits = window_bits(w, j0 + 16 * MT * warp);
                for (int n = 0; n < QUERY_TILE / 8; n++)
                    for (int e = 0; e < 2; e++) {
                        const unsigned see = __shfl_sync(0xffffffffu, bits, 8 * n + 2 * t + e) >> g;
                        for (int m = 0; m < MT; m++)
                            for (int r = 0; r < 2; r++)
                                if (!(see >> (16 * m + 8 * r) & 1)) p[m][n][2 * r + e] = -INFINITY;
                    }
            }
            for (int n = 0; n < QUERY_TILE / 8; n++)
                for (int k = 0; k < 4; k++) {
                    for (int m = 0; m < MT; m++) {
                        p[m][n][k] = exp2_fast(p[m][n][k] * (scale * LOG2_E) - shift[8 * n + k % 2]);
                        ds[m][n][k] *= p[m][n][k];
                    }
                }
            for (int k = 0; k < QUERY_TILE / 16; k++) {
                uint32_t x[MT][4], y[MT][4];
                for (int m = 0; m < MT; m++) {
                    sums_a(x[m], p[m][2 * k], p[m][2 * k + 1]);
                    sums_a(y[m], ds[m][2 * k], ds[m][2 * k + 1]);
                }
                for (int n = 0; n < HS / 16; n++) {
                    uint32_t q[4], d[4];
                    tile_read_transposed<HS>(d, tile + TILE + tile_lane<HS>(), 16 * k, 16 * n);
                    tile_read_transposed<HS>(q, tile + tile_lane<HS>(), 16 * k, 16 * n);
                    for (int m = 0; m < MT; m++) {
                        mma_bf16(dv[m][2 * n], x[m], d[0], d[1]);
                        mma_bf16(dv[m][2 * n + 1], x[m], d[2], d[3]);
                        mma_bf16(dk[m][2 * n], y[m], q[0], q[1]);
                        mma_bf16(dk[m][2 * n + 1], y[m], q[2], q[3]);
                    }
                }
            }
        }
        if (more && thread < QUERY_TILE) windows[next_stage * QUERY_TILE + thread] = held;
        else if (more && thread < 2 * QUERY_TILE) {
            statistics[next_stage * 2 * QUERY_TILE + thread - QUERY_TILE] = __int_as_float(held.x);
            statistics[next_stage * 2 * QUERY_TILE + thread] = __int_as_float(held.y);
        }
        seen = more ? visits[next] >> 2 * warp & 3 : 0;
        for (next += GROUPS; next >= n_visits; next -= n_visits) next_head++;
    }

    copy_async_wait<0>(); // where nothing was seen the keys are still on their way
    groups_add<HS, MT, GROUPS, THREADS>(dk, (float *)(shared_memory() + STAGES));
    groups_add<HS, MT, GROUPS, THREADS>(dv, (float *)(shared_memory() + STAGES));
    if (group > 0) return;
    int position[MT][2];
    const int j = j0 + warp * 16 * MT;
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < 2; r++) {
            const int at = j + 16 * m + 8 * r + g;
            position[m][r] = at < win.T ? window_position(window_of(win, b, at), at) : 0;
            for (int n = 0; n < HS / 8; n++) dk[m][n][2 * r] *= scale, dk[m][n][2 * r + 1] *= scale;
        }
    if (win.rope) rows_turn_back<HS, MT>(dk, win.rope, position);
    bf16 *to = dqkv + (first + j) * W + (win.NH + kv) * HS; // only this warp reads these rows of k and v, so it may write over them
    rows_store<HS, MT>(to, W, win.T - j, dk, warp * 16 * MT * HS * 2);
    rows_store<HS, MT>(to + win.KVH * HS, W, win.T - j, dv, V + warp * 16 * MT * HS * 2);
}

template <int HS, int MT, int KEYS>
static void cuda_backward_queries_fast(slam_ops *ops, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out,
                                       const float *lse, const slam_act *qkv, const slam_window *win) {
    const int tiles = (win->T + 64 * MT - 1) / (64 * MT);
    const size_t shared = 4 * KEYS * HS * 2 + 64 * MT * sizeof(int4) + ((win->T + KEYS - 1) / KEYS + 1) * sizeof(int);
    cudaFuncSetAttribute(attention_backward_queries_kernel<HS, MT, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    SLAM_LAUNCH((attention_backward_queries_kernel<HS, MT, KEYS>), dim3(win->B * win->NH, tiles), 128, shared, stream_of(ops),
                (bf16 *)dqkv, D, (const bf16 *)dout, (const bf16 *)out, lse, (const bf16 *)qkv, *win);
    cuda_launched(ops, "attention_backward");
}

template <int HS, int MT, int KW, int GROUPS, int QUERY_TILE>
static void cuda_backward_keys_fast(slam_ops *ops, slam_act *dqkv, const float *D, const slam_act *dout, const float *lse,
                                    const slam_act *qkv, const slam_window *win) {
    enum { KEYS = 16 * MT * KW };
    const size_t visits = (win->T + QUERY_TILE - 1) / QUERY_TILE + 1, stages = GROUPS * 2 * QUERY_TILE;
    const size_t shared = 2 * KEYS * HS * 2 + stages * (2 * HS * 2 + sizeof(int4) + 2 * sizeof(float)) + visits * sizeof(int);
    cudaFuncSetAttribute(attention_backward_keys_kernel<HS, MT, KW, GROUPS, QUERY_TILE>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    SLAM_LAUNCH((attention_backward_keys_kernel<HS, MT, KW, GROUPS, QUERY_TILE>),
                dim3(win->B * win->KVH, (win->T + KEYS - 1) / KEYS), 32 * KW * GROUPS, shared, stream_of(ops), (bf16 *)dqkv, D,
                (const bf16 *)dout, lse, (const bf16 *)qkv, *win);
    cuda_launched(ops, "attention_backward");
}

/* ---- attention: one token more ----
   A block is a key/value head of one sequence. It turns the new queries and key and puts key and value into the cache, so that
   it needs nobody else's; then each of its warps takes runs of 32 places, HEADS of the heads that read this one at a time. For the
   scores a lane has a place, for the values its channels of all places. In the end the warps' sums are added, in order, as those
   of two runs. Bound by memory: 2 HS (n + 1) sizeof(T) bytes of cache, read once for each HEADS heads. */

enum { DECODE_WARPS = 8 };

template <typename T, int P, int HEADS, int CHANNELS>
static __global__ void __launch_bounds__(32 * DECODE_WARPS, 1)
    attention_decode_kernel(T *out, T *cache, T *qkv, const int *lengths, const slam_window win) {
    const int NH = win.NH, KVH = win.KVH, HS = win.HS, half = HS / 2, heads = NH / KVH, warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32, g = blockIdx.x % KVH, b = blockIdx.x / KVH, n = lengths[b];
    const size_t K = (size_t)2 * KVH * HS;
    T *row = qkv + (size_t)b * (NH + 2 * KVH) * HS, *keys = cache + (size_t)b * win.T * K + g * HS, *values = keys + KVH * HS;
    float *query = (float *)shared_memory();                                              // (HEADS,HS)
    float *p = query + HEADS * HS + warp * 32 * HEADS;                                    // (warps,32,HEADS)
    float *part = query + HEADS * (HS + DECODE_WARPS * 32);                               // (warps,HEADS,HS)
    float *most = part + DECODE_WARPS * HEADS * HS, *total = most + DECODE_WARPS * HEADS; // (warps,HEADS)

    for (int k = threadIdx.x; k < (heads + 1) * half; k += blockDim.x) {
        const int c = k % half;
        T *x = row + (k / half < heads ? g * heads + k / half : NH + g) * HS + c;
        T x0 = x[0], x1 = x[half];
        if (win.rope) {
            const float *angle = win.rope + (size_t)n * HS + c;
            x[0] = (T)((float)x0 * angle[0] - (float)x1 * angle[half]);
            x[half] = (T)((float)x1 * angle[0] + (float)x0 * angle[half]);
        }
        if (k / half < heads) continue;
        keys[n * K + c] = x[0];
        keys[n * K + c + half] = x[half];
        values[n * K + c] = x[KVH * HS];
        values[n * K + c + half] = x[KVH * HS + half];
    }
    const float scale = rsqrtf((float)HS);
    for (int first = 0; first < heads; first += HEADS) {
        const int h = g * heads + first, now = min(HEADS, heads - first);
        __syncthreads();
        for (int k = threadIdx.x; k < HEADS * HS; k += blockDim.x) query[k] = k < now * HS ? (float)row[h * HS + k] * scale : 0;
        __syncthreads();
        float max_[HEADS], sum[HEADS], o[HEADS][CHANNELS];
        for (int r = 0; r < HEADS; r++) {
            max_[r] = -INFINITY, sum[r] = 0;
            for (int m = 0; m < CHANNELS; m++) o[r][m] = 0;
        }
        for (int j = 32 * warp; j <= n; j += 32 * DECODE_WARPS) {
            float s[HEADS];
            for (int r = 0; r < HEADS; r++) s[r] = j + lane <= n ? 0 : -INFINITY;
            for (int c = 0; c < HS && j + lane <= n; c += P) {
                const pack<T, P> x = *(const pack<T, P> *)(keys + (j + lane) * K + c);
                for (int r = 0; r < HEADS; r++)
                    for (int k = 0; k < P; k++) s[r] += query[r * HS + c + k] * (float)x.at[k];
            }
            __syncwarp();
            for (int r = 0; r < HEADS; r++) {
                const float above = fmaxf(max_[r], warp_max(s[r])), keep = expf(max_[r] - above), e = expf(s[r] - above);
                max_[r] = above;
                sum[r] = sum[r] * keep + e;
                p[lane * HEADS + r] = e;
                for (int m = 0; m < CHANNELS; m++) o[r][m] *= keep;
            }
            __syncwarp();
            for (int k = 0; k < min(32, n + 1 - j); k++)
                for (int m = 0; m < CHANNELS; m++)
                    if (lane + 32 * m < HS) {
                        const float x = (float)values[(j + k) * K + lane + 32 * m];
                        for (int r = 0; r < HEADS; r++) o[r][m] += p[k * HEADS + r] * x;
                    }
        }
        for (int r = 0; r < HEADS; r++) {
            sum[r] = warp_sum(sum[r]);
            if (lane == 0) most[warp * HEADS + r] = max_[r];
        }
        __syncthreads();
        for (int r = 0; r < HEADS; r++) {
            float above = -INFINITY;
            for (int w = 0; w < DECODE_WARPS; w++) above = fmaxf(above, most[w * HEADS + r]);
            const float keep = expf(max_[r] - above); // 0 for a warp that had no place
            for (int m = 0; m < CHANNELS; m++)
                if (lane + 32 * m < HS) part[(warp * HEADS + r) * HS + lane + 32 * m] = o[r][m] * keep;
            if (lane == 0) total[warp * HEADS + r] = sum[r] * keep;
        }
        __syncthreads();
        for (int k = threadIdx.x; k < now * HS; k += blockDim.x) {
            float x = 0, l = 0;
            for (int w = 0; w < DECODE_WARPS; w++) x += part[w * HEADS * HS + k], l += total[w * HEADS + k / HS];
            out[((size_t)b * NH + h) * HS + k] = (T)(x / l);
        }
    }
}

template <typename T, int P, int HEADS, int CHANNELS>
static void cuda_decode(slam_ops *ops, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths, const slam_window *win) {
    const size_t shared = HEADS * (win->HS + DECODE_WARPS * (win->HS + 34)) * sizeof(float);
    cudaFuncSetAttribute(attention_decode_kernel<T, P, HEADS, CHANNELS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    SLAM_LAUNCH((attention_decode_kernel<T, P, HEADS, CHANNELS>), win->B * win->KVH, 32 * DECODE_WARPS, shared, stream_of(ops),
                (T *)out, (T *)cache, (T *)qkv, lengths, *win);
    cuda_launched(ops, "attention_decode");
}

template <typename T>
static void cuda_decode_any(slam_ops *ops, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths,
                            const slam_window *win) {
    enum { P = 16 / sizeof(T) };
    if (win->HS % P != 0) cuda_decode<T, 1, 8, PLAIN_CHANNELS>(ops, out, cache, qkv, lengths, win);
    else if (win->HS > 64) cuda_decode<T, P, 8, PLAIN_CHANNELS>(ops, out, cache, qkv, lengths, win);
    else if (win->NH > win->KVH) cuda_decode<T, P, 8, 2>(ops, out, cache, qkv, lengths, win);
    else cuda_decode<T, P, 1, 2>(ops, out, cache, qkv, lengths, win);
}

/* The plain kernels' lanes have room for 256 channels of a head. */
static int attention_fits(slam_ops *ops, const slam_window *win, const char *operation) {
    if (win->HS > 32 * PLAIN_CHANNELS) cuda_failed((cuda_ops *)ops, operation, "heads of more than 256 channels");
    return win->HS <= 32 * PLAIN_CHANNELS;
}

static void cuda_attention_forward(slam_ops *ops, slam_act *out, float *lse, slam_act *qkv, const slam_window *win) {
    if (!attention_fits(ops, win, "attention_forward")) return;
    const int is_float = ops->bytes_per_act == 4;
    if (win->rope && is_float) cuda_rotate<float>(ops, qkv, win);
    if (win->rope && !is_float) cuda_rotate<bf16>(ops, qkv, win);
    cuda_launched(ops, "attention_forward");
    if (is_float && win->HS % 4 == 0) cuda_forward_plain<float, 4>(ops, out, lse, qkv, win);
    else if (is_float) cuda_forward_plain<float, 1>(ops, out, lse, qkv, win);
    else if (win->HS == 32) cuda_forward_fast<32, 2, 64>(ops, out, lse, qkv, win);
    else if (win->HS == 64) cuda_forward_fast<64, 2, 64>(ops, out, lse, qkv, win);
    else if (win->HS == 128) cuda_forward_fast<128, 1, 64>(ops, out, lse, qkv, win);
    else if (win->HS % 8 == 0) cuda_forward_plain<bf16, 8>(ops, out, lse, qkv, win);
    else cuda_forward_plain<bf16, 1>(ops, out, lse, qkv, win);
}

static void cuda_attention_backward(slam_ops *ops, slam_act *dqkv, float *D, const slam_act *dout, const slam_act *out,
                                    const float *lse, const slam_act *qkv, const slam_window *win) {
    if (!attention_fits(ops, win, "attention_backward")) return;
    const int is_float = ops->bytes_per_act == 4;
    if (is_float && win->HS % 4 == 0) cuda_backward_plain<float, 4>(ops, dqkv, D, dout, out, lse, qkv, win);
    else if (is_float) cuda_backward_plain<float, 1>(ops, dqkv, D, dout, out, lse, qkv, win);
    else if (win->HS == 32) {
        cuda_backward_queries_fast<32, 2, 32>(ops, dqkv, D, dout, out, lse, qkv, win);
        cuda_backward_keys_fast<32, 2, 2, 4, 32>(ops, dqkv, D, dout, lse, qkv, win);
    } else if (win->HS == 64) {
        cuda_backward_queries_fast<64, 2, 32>(ops, dqkv, D, dout, out, lse, qkv, win);
        cuda_backward_keys_fast<64, 2, 2, 4, 32>(ops, dqkv, D, dout, lse, qkv, win);
    } else if (win->HS == 128) {
        cuda_backward_queries_fast<128, 1, 32>(ops, dqkv, D, dout, out, lse, qkv, win);
        cuda_backward_keys_fast<128, 1, 4, 1, 32>(ops, dqkv, D, dout, lse, qkv, win);
    } else if (win->HS % 8 == 0) cuda_backward_plain<bf16, 8>(ops, dqkv, D, dout, out, lse, qkv, win);
    else cuda_backward_plain<bf16, 1>(ops, dqkv, D, dout, out, lse, qkv, win);
}

static void cuda_attention_decode(slam_ops *ops, slam_act *out, slam_act *cache, slam_act *qkv, const int *lengths,
                                  const slam_window *win) {
    if (!attention_fits(ops, win, "attention_decode")) return;
    if (ops->bytes_per_act == 4) cuda_decode_any<float>(ops, out, cache, qkv, lengths, win);
    else cuda_decode_any<bf16>(ops, out, cache, qkv, lengths, win);
}

/* A thread has a number of a place in the cache. Bound by memory: 4 KVH HS sizeof(T) bytes a token. */
template <typename T>
static __global__ void __launch_bounds__(256)
    attention_fill_kernel(T *cache, const T *qkv, const int *slots, const int *lengths, int room, const slam_window win, size_t n) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, K = (size_t)2 * win.KVH * win.HS, O = (size_t)win.NH * win.HS;
    if (i >= n) return;
    const int t = (int)(i / K % win.T), b = (int)(i / K / win.T);
    if (t < lengths[b]) cache[((size_t)slots[b] * room + t) * K + i % K] = qkv[i / K * (O + K) + O + i % K];
}

template <typename T>
static void cuda_attention_fill(slam_ops *ops, slam_act *cache, const slam_act *qkv, const int *slots, const int *lengths, int room,
                                const slam_window *win) {
    const size_t n = (size_t)win->B * win->T * 2 * win->KVH * win->HS;
    SLAM_LAUNCH((attention_fill_kernel<T>), blocks(n, 256), 256, 0, stream_of(ops), (T *)cache, (const T *)qkv, slots, lengths,
                room, *win, n);
    cuda_launched(ops, "attention_fill");
}

/* ---- GELU ---- */

static __device__ __forceinline__ float gelu_of(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

/* A thread has P neighbours. Bound by memory: 2 n sizeof(T) bytes. */
template <typename T, int P> static __global__ void __launch_bounds__(256) gelu_kernel(T *x, size_t n) {
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * P;
    if (i >= n) return;
    pack<T, P> a = *(const pack<T, P> *)(x + i);
    for (int k = 0; k < P; k++) a.at[k] = (T)gelu_of((float)a.at[k]);
    *(pack<T, P> *)(x + i) = a;
}

template <typename T> static void cuda_gelu(slam_ops *ops, slam_act *x, size_t n) {
    constexpr int P = 16 / sizeof(T);
    if (n == 0) return;
    if (n % P == 0 && aligned16(x)) SLAM_LAUNCH((gelu_kernel<T, P>), blocks(n / P, 256), 256, 0, stream_of(ops), (T *)x, n);
    else SLAM_LAUNCH((gelu_kernel<T, 1>), blocks(n, 256), 256, 0, stream_of(ops), (T *)x, n);
    cuda_launched(ops, "gelu");
}

/* ---- convolution ----
   As on the CPU it is a matrix product whose left side is x itself. But cuBLASLt wants the rows of a matrix apart: what overlaps is
   cut into runs of `stride` taps, whose rows do not, and whose products add up. The convolutions that make frames from samples
   have one or two such runs. Where there are more (positions: 128 taps, stride 1) the rows are written out for a run of frames
   at a time. And where a row is only a few numbers, as of samples, a product has nothing to do: there is a kernel for that. */

enum { NARROW_TAPS = 64, NARROW_CHANNELS = 128, NARROW_FRAMES = 64, NARROW_EACH = 4 };

/* Rows of W = K C <= NARROW_TAPS numbers. A block makes NARROW_FRAMES frames of NARROW_CHANNELS channels, from x and w in shared
   memory; a thread four neighbouring frames of as many neighbouring channels, so that eight numbers are fetched for sixteen
   products. Bound by memory: the output, N OC sizeof(T) bytes. grid: runs of frames, runs of channels, rows and groups. */
template <typename T>
static __global__ void __launch_bounds__(NARROW_CHANNELS *NARROW_FRAMES / 16)
    conv1d_narrow_kernel(T *out, const T *x, const T *w, const T *b, const slam_conv c) {
    const int W = c.K * c.C, step = c.stride * c.C, first = blockIdx.x * NARROW_FRAMES, channel = blockIdx.y * NARROW_CHANNELS;
    const int row = blockIdx.z / c.G, g = blockIdx.z % c.G, frames = min(c.TO - first, (int)NARROW_FRAMES);
    const int n = (frames - 1) * step + W, threads = NARROW_CHANNELS * NARROW_FRAMES / 16;
    float *weights = (float *)shared_memory(), *samples = weights + W * NARROW_CHANNELS; // (W,NARROW_CHANNELS), then x
    const T *from = x + ((size_t)row * c.G + g) * c.T * c.C + (size_t)first * step;
    for (int i = threadIdx.x; i < n; i += threads) samples[i] = (float)from[i];
    for (int i = threadIdx.x; i < W * NARROW_CHANNELS; i += threads) {
        const int o = channel + i / W;
        weights[i % W * NARROW_CHANNELS + i / W] = o < c.OC ? (float)w[((size_t)g * c.OC + o) * W + i % W] : 0.0f;
    }
    __syncthreads();
    const int o = threadIdx.x % (NARROW_CHANNELS / NARROW_EACH) * NARROW_EACH,
              t = threadIdx.x / (NARROW_CHANNELS / NARROW_EACH) * NARROW_EACH;
    float sum[NARROW_EACH][NARROW_EACH];
    for (int i = 0; i < NARROW_EACH; i++)
        for (int k = 0; k < NARROW_EACH; k++) sum[i][k] = b && channel + o + k < c.OC ? (float)b[g * c.OC + channel + o + k] : 0;
    for (int j = 0; j < W; j++) {
        const pack<float, NARROW_EACH> wj = *(const pack<float, NARROW_EACH> *)(weights + j * NARROW_CHANNELS + o);
        for (int i = 0; i < NARROW_EACH; i++) {
            const float xi = samples[min(t + i, frames - 1) * step + j];
            for (int k = 0; k < NARROW_EACH; k++) sum[i][k] += xi * wj.at[k];
        }
    }
    for (int i = 0; i < NARROW_EACH; i++) {
        T *to = out + (((size_t)row * c.TO + first + t + i) * c.G + g) * c.OC + channel + o;
        for (int k = 0; k < NARROW_EACH; k++)
            if (t + i < frames && channel + o + k < c.OC) to[k] = (T)(c.gelu ? gelu_of(sum[i][k]) : sum[i][k]);
    }
}

/* Writes rows out: columns (gridDim.x, W) from the frames first, first + 1, ... of group g, counted through the batch. A block a
   row. Bound by memory: n W sizeof(T) bytes written; those read are neighbours' and come from the cache. */
template <typename T, int P>
static __global__ void __launch_bounds__(256) conv1d_rows_kernel(T *columns, const T *x, const slam_conv c, int g, int first) {
    const int i = first + blockIdx.x, W = c.K * c.C;
    const T *from = x + (((size_t)(i / c.TO) * c.G + g) * c.T + (size_t)(i % c.TO) * c.stride) * c.C;
    T *to = columns + (size_t)blockIdx.x * W;
    for (int k = threadIdx.x * P; k < W; k += 256 * P) *(pack<T, P> *)(to + k) = *(const pack<T, P> *)(from + k);
}

/* Rows written out into the second part of the workspace, the first being cuBLASLt's */
template <typename T> static void conv1d_by_rows(slam_ops *ops, T *out, const T *x, const T *w, const T *b, const slam_conv *c) {
    constexpr int P = 16 / sizeof(T);
    const int W = c->K * c->C, wide = c->C % P == 0 && aligned16(x), N = c->B * c->TO;
    const size_t room = (CUDA_WORKSPACE - PRODUCT_WORKSPACE) / sizeof(T) / W;
    T *columns = (T *)(((cuda_ops *)ops)->workspace + PRODUCT_WORKSPACE);
    if (room == 0) cuda_failed((cuda_ops *)ops, "conv1d", "too many taps and channels");
    for (int g = 0; g < c->G && room; g++)
        for (int first = 0; first < N;) {
            const int n = (size_t)(N - first) < room ? N - first : (int)room;
            if (wide) SLAM_LAUNCH((conv1d_rows_kernel<T, P>), n, 256, 0, stream_of(ops), columns, x, *c, g, first);
            else SLAM_LAUNCH((conv1d_rows_kernel<T, 1>), n, 256, 0, stream_of(ops), columns, x, *c, g, first);
            cuda_product(ops, "conv1d", 0, 1, n, c->OC, W, columns, W, w + (size_t)g * c->OC * W, W, 0,
                         out + ((size_t)first * c->G + g) * c->OC, c->G * c->OC, b ? b + g * c->OC : NULL, sizeof(T) == 4);
            first += n;
        }
}

template <typename T>
static void cuda_conv1d(slam_ops *ops, slam_act *out_, const slam_act *x_, const slam_act *w_, const slam_act *b_,
                        const slam_conv *conv) {
    slam_conv c = *conv;
    T *out = (T *)out_;
    const T *x = (const T *)x_, *w = (const T *)w_, *b = (const T *)b_;
    if (c.G == 1 && c.T == c.stride * c.TO) c.TO *= c.B, c.T *= c.B, c.B = 1; // rows that go on into each other
    const int W = c.K * c.C, step = c.stride * c.C;
    const size_t samples = (size_t)(NARROW_FRAMES - 1) * step + W, shared = (samples + (size_t)W * NARROW_CHANNELS) * sizeof(float);
    if (c.B * c.TO == 0) return;
    if (W <= NARROW_TAPS && shared <= 48 << 10 && c.B * c.G <= 65535) {
        const dim3 grid(blocks(c.TO, NARROW_FRAMES), blocks(c.OC, NARROW_CHANNELS), c.B * c.G);
        SLAM_LAUNCH((conv1d_narrow_kernel<T>), grid, NARROW_CHANNELS * NARROW_FRAMES / 16, shared, stream_of(ops), out, x, w, b, c);
        cuda_launched(ops, "conv1d");
        return;
    }
    if (c.B * c.G > 1 || c.K > 2 * c.stride) conv1d_by_rows(ops, out, x, w, b, &c);
    else
        for (int k = 0; k < c.K; k += c.stride)
            cuda_product(ops, "conv1d", 0, 1, c.TO, c.OC, (c.K - k < c.stride ? c.K - k : c.stride) * c.C, x + (size_t)k * c.C,
                         step, w + (size_t)k * c.C, W, k > 0, out, c.OC, k ? NULL : b, sizeof(T) == 4);
    cuda_launched(ops, "conv1d");
    if (c.gelu) cuda_gelu<T>(ops, out_, (size_t)c.B * c.TO * c.G * c.OC);
}

/* A thread has a number of the output. Bound by memory: 2 B TO C sizeof(T) bytes. */
template <typename T>
static __global__ void __launch_bounds__(256)
    group_frames_kernel(T *out, const T *x, const int *lengths, const T *scale, const T *shift, int before, int T_, int TO, int C,
                        int G, size_t n) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const int width = C / G, t = (int)(i / width % TO) - before, g = (int)(i / width / TO % G), b = (int)(i / width / TO / G);
    const int c = g * width + (int)(i % width);
    float y = 0;
    if (t >= 0 && t < lengths[b]) {
        y = (float)x[((size_t)b * T_ + t) * C + c];
        y = (scale ? (float)scale[c] * y : y) + (shift ? (float)shift[c] : 0);
    }
    out[i] = (T)y;
}

template <typename T>
static void cuda_group_frames(slam_ops *ops, slam_act *out, const slam_act *x, const int *lengths, const slam_act *scale,
                              const slam_act *shift, int before, int B, int T_, int TO, int C, int G) {
    const size_t n = (size_t)B * TO * C;
    if (n == 0) return;
    SLAM_LAUNCH((group_frames_kernel<T>), blocks(n, 256), 256, 0, stream_of(ops), (T *)out, (const T *)x, lengths, (const T *)scale,
                (const T *)shift, before, T_, TO, C, G, n);
    cuda_launched(ops, "group_frames");
}

/* A thread has a number. Bound by memory: what is behind the lengths, once. */
template <typename T>
static __global__ void __launch_bounds__(256) mask_frames_kernel(T *x, const int *lengths, int T_, int C, size_t n) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n && (int)(i / C % T_) >= lengths[i / C / T_]) x[i] = (T)0.0f;
}

template <typename T> static void cuda_mask_frames(slam_ops *ops, slam_act *x, const int *lengths, int B, int T_, int C) {
    const size_t n = (size_t)B * T_ * C;
    if (n == 0) return;
    SLAM_LAUNCH((mask_frames_kernel<T>), blocks(n, 256), 256, 0, stream_of(ops), (T *)x, lengths, T_, C, n);
    cuda_launched(ops, "mask_frames");
}

/* ---- layer norm, channel norm ---- */

/* Rows in registers, as in RMSNorm. Bound by memory: x and delta are read, s and y written, up to 4 N C sizeof(T) bytes. */
template <typename T, int P, int TEAM>
static __global__ void __launch_bounds__(256)
    layernorm_kernel(T *s, T *y, const T *x, const T *delta, const T *w, const T *b, float eps, int gelu, int N, int C) {
    constexpr int M = ROW_NUMBERS / P;
    const int i = blockIdx.x * (256 / TEAM) + threadIdx.x / TEAM, lane = threadIdx.x % TEAM, packs = C / P;
    const size_t row = (size_t)i * packs;
    float *room = (float *)shared_memory();
    if (i >= N) return; // a team as a whole
    pack<T, P> a[M];
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs) a[m] = ((const pack<T, P> *)x)[row + lane + m * TEAM];
    for (int m = 0; delta && m < M; m++) {
        if (lane + m * TEAM >= packs) continue;
        const pack<T, P> d = ((const pack<T, P> *)delta)[row + lane + m * TEAM];
        for (int k = 0; k < P; k++) a[m].at[k] = (T)((float)a[m].at[k] + (float)d.at[k]);
        if (s) ((pack<T, P> *)s)[row + lane + m * TEAM] = a[m];
    }
    if (!y) return;
    float sum = 0, variation = 0;
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs)
            for (int k = 0; k < P; k++) sum += (float)a[m].at[k];
    const float mean = team_sum<TEAM>(sum, room) / (float)C;
    for (int m = 0; m < M; m++)
        if (lane + m * TEAM < packs)
            for (int k = 0; k < P; k++) variation += ((float)a[m].at[k] - mean) * ((float)a[m].at[k] - mean);
    const float r = 1 / sqrtf(team_sum<TEAM>(variation, room) / (float)C + eps);
    for (int m = 0; m < M; m++) {
        if (lane + m * TEAM >= packs) continue;
        const pack<T, P> wm = ((const pack<T, P> *)w)[lane + m * TEAM], bm = ((const pack<T, P> *)b)[lane + m * TEAM];
        for (int k = 0; k < P; k++) {
            const float out = (float)wm.at[k] * (((float)a[m].at[k] - mean) * r) + (float)bm.at[k];
            a[m].at[k] = (T)(gelu ? gelu_of(out) : out);
        }
        ((pack<T, P> *)y)[row + lane + m * TEAM] = a[m];
    }
}

template <typename T>
static void cuda_layernorm(slam_ops *ops, slam_act *s_, slam_act *y_, const slam_act *x_, const slam_act *delta_,
                           const slam_act *w_, const slam_act *b_, float eps, int gelu, int N, int C) {
    constexpr int P = 16 / sizeof(T);
    T *s = (T *)s_, *y = (T *)y_;
    const T *x = (const T *)x_, *delta = (const T *)delta_, *w = (const T *)w_, *b = (const T *)b_;
    const int wide = C % P == 0 && aligned16(s, y, x, delta, w) && aligned16(b), team = norm_team(ops, C, wide, "layernorm");
    const cudaStream_t stream = stream_of(ops);
    const size_t room = 8 * sizeof(float);
    if (team == 0 || N == 0) return;
    if (team == 32) SLAM_LAUNCH((layernorm_kernel<T, P, 32>), blocks(N, 8), 256, 0, stream, s, y, x, delta, w, b, eps, gelu, N, C);
    else if (wide) SLAM_LAUNCH((layernorm_kernel<T, P, 256>), N, 256, room, stream, s, y, x, delta, w, b, eps, gelu, N, C);
    else SLAM_LAUNCH((layernorm_kernel<T, 1, 256>), N, 256, room, stream, s, y, x, delta, w, b, eps, gelu, N, C);
    cuda_launched(ops, "layernorm");
}

/* Sums of a run of frames: partial (B,parts,2,C), sum and variation. Lane by channels, P of them; the 8 warps take frames in turn,
   and the warps' sums meet in shared memory. The second pass over the run finds it in the cache. Bound by memory: x once. */
template <typename T, int P>
static __global__ void __launch_bounds__(256)
    channels_sum_kernel(float *partial, const T *x, const int *lengths, int run, int T_, int C) {
    float *sums = (float *)shared_memory(), sum[P], mean[P]; // (8, 32 P)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * 32 * P, c = first + lane * P, b = blockIdx.z;
    const int begin = blockIdx.y * run, n = min(lengths[b] - begin, run);
    float *out = partial + ((size_t)b * gridDim.y + blockIdx.y) * 2 * C;
    if (n <= 0) return; // the block as a whole
    for (int k = 0; k < P; k++) mean[k] = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int k = 0; k < P; k++) sum[k] = 0;
        for (int t = warp; t < n && c < C; t += 8) {
            const pack<T, P> a = *(const pack<T, P> *)(x + ((size_t)b * T_ + begin + t) * C + c);
            for (int k = 0; k < P; k++) {
                const float d = (float)a.at[k] - mean[k];
                sum[k] += pass ? d * d : d;
            }
        }
        for (int k = 0; k < P; k++) sums[warp * 32 * P + lane * P + k] = sum[k];
        __syncthreads();
        for (int k = 0; k < P; k++) {
            float total = 0;
            for (int j = 0; j < 8; j++) total += sums[j * 32 * P + lane * P + k];
            mean[k] = total / (float)n;
            if (warp == 0 && c < C) out[pass * C + c + k] = total;
        }
        __syncthreads();
    }
}

/* Joins the runs of a row, in order: moments (B,2,C), mean and 1 / sqrt(variance + eps). A thread a channel; latency alone. */
static __global__ void __launch_bounds__(128)
    channels_join_kernel(float *moments, const float *partial, const int *lengths, int run, int parts, float eps, int C) {
    const int c = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y, n = lengths[row];
    if (c >= C || n <= 0) return;
    const float *part = partial + (size_t)row * parts * 2 * C + c;
    double mean = 0, variation = 0;
    for (int first = 0; first < n; first += run, part += 2 * C) {
        const double k = min(n - first, run), d = part[0] / k - mean;
        variation += part[C] + d * d * first * k / (first + k);
        mean += d * k / (first + k);
    }
    moments[(size_t)row * 2 * C + c] = (float)mean;
    moments[(size_t)row * 2 * C + C + c] = (float)(1 / sqrt(variation / n + eps));
}

/* A thread has P channels of a frame. Bound by memory: 2 B T C sizeof(T) bytes. */
template <typename T, int P>
static __global__ void __launch_bounds__(256)
    channels_apply_kernel(T *x, const float *moments, const T *w, const T *b, const int *lengths, int T_, int C, size_t n) {
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * P;
    if (i >= n) return;
    const int c = (int)(i % C), row = (int)(i / C / T_), inside = (int)(i / C % T_) < lengths[row];
    const float *mean = moments + (size_t)row * 2 * C + c, *r = mean + C;
    pack<T, P> a = *(const pack<T, P> *)(x + i);
    for (int k = 0; k < P; k++)
        a.at[k] = (T)(inside ? gelu_of((float)w[c + k] * (((float)a.at[k] - mean[k]) * r[k]) + (float)b[c + k]) : 0.0f);
    *(pack<T, P> *)(x + i) = a;
}

template <typename T, int P>
static void channels_norm(slam_ops *ops, T *x, const T *w, const T *b, const int *lengths, float eps, int B, int T_, int C) {
    const size_t room = CUDA_WORKSPACE / sizeof(float) / (2 * (size_t)C) / B, n = (size_t)B * T_ * C;
    int run = 128; // frames; more where the sums would not fit
    while (run < T_ && (size_t)blocks(T_, run) + 1 > room) run *= 2;
    const int parts = blocks(T_, run);
    float *partial = (float *)((cuda_ops *)ops)->workspace, *moments = partial + (size_t)B * parts * 2 * C;
    if ((size_t)parts + 1 > room || B > 65535 || parts > 65535) {
        cuda_failed((cuda_ops *)ops, "channelnorm", "too many rows and channels");
        return;
    }
    SLAM_LAUNCH((channels_sum_kernel<T, P>), dim3(blocks(C, 32 * P), parts, B), 256, 256 * P * sizeof(float), stream_of(ops),
                partial, x, lengths, run, T_, C);
    SLAM_LAUNCH(channels_join_kernel, dim3(blocks(C, 128), B), 128, 0, stream_of(ops), moments, (const float *)partial, lengths,
                run, parts, eps, C);
    SLAM_LAUNCH((channels_apply_kernel<T, P>), blocks(n / P, 256), 256, 0, stream_of(ops), x, (const float *)moments, w, b, lengths,
                T_, C, n);
    cuda_launched(ops, "channelnorm");
}

template <typename T>
static void cuda_channelnorm(slam_ops *ops, slam_act *x, const slam_act *w, const slam_act *b, const int *lengths, float eps, int B,
                             int T_, int C) {
    constexpr int P = 16 / sizeof(T);
    if (B == 0 || T_ == 0) return;
    if (C % P == 0 && aligned16(x)) channels_norm<T, P>(ops, (T *)x, (const T *)w, (const T *)b, lengths, eps, B, T_, C);
    else channels_norm<T, 1>(ops, (T *)x, (const T *)w, (const T *)b, lengths, eps, B, T_, C);
}

/* ---- nearest centroid ---- */

/* A warp a row; a lane has every 32nd centroid, in order; then lanes are compared, the lower number where they tie. Bound by
   memory: 4 N K bytes. */
static __global__ void __launch_bounds__(256)
    nearest_kernel(int *nearest, const float *scores, const float *squares, int N, int K) {
    const int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= N) return; // a warp as a whole
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
    if (lane == 0) nearest[i] = at < K ? at : 0; // nothing was less than infinity: no number
}

static void cuda_nearest(slam_ops *ops, int *nearest, float *scores, const slam_act *x, const slam_act *centroids,
                         const float *squares, int N, int D, int K) {
    if (N == 0) return;
    cuda_product(ops, "nearest", 0, 1, N, K, D, x, D, centroids, D, 0, scores, K, NULL, 1);
    SLAM_LAUNCH(nearest_kernel, blocks(N, 8), 256, 0, stream_of(ops), nearest, (const float *)scores, squares, N, K);
    cuda_launched(ops, "nearest");
}

/* ---- the backend ---- */

/* The compute capabilities that nvcc's -arch named, as text. */
static void cuda_built_for(char *text, size_t size) {
    text[0] = 0;
#ifdef __CUDA_ARCH_LIST__
    const int list[] = {__CUDA_ARCH_LIST__}; // 800: 8.0
    for (const int arch : list) {
        const size_t n = strlen(text);
        snprintf(text + n, size - n, "%s%d.%d", n ? ", " : "", arch / 100, arch / 10 % 10);
    }
#else
    (void)size;
#endif
}

int slam_cuda_count(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) n = 0;
    cudaGetLastError();
    return n;
}

/* Is there such a GPU, and can it run what was built? */
static int cuda_usable(int device, cudaDeviceProp *p) {
    int n = 0;
    char built_for[100];
    cudaFuncAttributes attributes;
    cudaError_t error = cudaGetDeviceCount(&n);
    cudaGetLastError(); // or the first launch would report it
    if (error == cudaErrorInsufficientDriver)
        return fail(
            "cuda:%d: no NVIDIA driver, or one older than this build's CUDA: install or update it (nvidia-smi shows it), or build "
            "with an older toolkit",
            device);
    if (error == cudaErrorNoDevice || (error == cudaSuccess && n == 0))
        return fail("cuda:%d: no GPU was found: nvidia-smi lists those that the driver sees, CUDA_VISIBLE_DEVICES may hide them",
                    device);
    if (error != cudaSuccess) return fail("cuda:%d: CUDA does not start: %s", device, cudaGetErrorString(error));
    if (device < 0 || device >= n)
        return fail("cuda:%d: no such GPU: %d found, %s", device, n, n > 1 ? "numbered from 0" : "which is cuda:0");
    error = cudaGetDeviceProperties(p, device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return fail("cuda:%d: the GPU cannot be used: %s", device, cudaGetErrorString(error));
    if (p->major < 8)
        return fail("cuda:%d: %s has compute capability %d.%d, 8.0 is needed (Ampere, 2020, or newer)", device, p->name, p->major,
                    p->minor);
    error = cudaFuncGetAttributes(&attributes, sum_partial_kernel);
    cudaGetLastError();
    cuda_built_for(built_for, sizeof built_for);
    if (error != cudaSuccess || attributes.ptxVersion < 80) // PTX of less is compiled for any newer GPU, but it has no kernels
        return fail("cuda:%d: %s has compute capability %d.%d, this build has code for %s%s%s: build with nvcc -arch=native (make "
                    "CUDA_ARCH=native)",
                    device, p->name, p->major, p->minor, built_for, error == cudaSuccess ? "" : ", ",
                    error == cudaSuccess ? "" : cudaGetErrorString(error));
    return 1;
}

/* All that an operation needs besides its arguments, made once. */
static int cuda_open(cuda_ops *cuda) {
    cudaError_t error = cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&cuda->comm, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&cuda->comm_begins, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&cuda->comm_ends, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaMalloc(&cuda->workspace, CUDA_WORKSPACE);
    if (error == cudaSuccess) error = cudaMallocHost(&cuda->ring, (size_t)SLOTS * SLOT);
    for (int k = 0; k < SLOTS && error == cudaSuccess; k++)
        error = cudaEventCreateWithFlags(&cuda->copied[k], cudaEventDisableTiming);
    cudaGetLastError();
    if (error != cudaSuccess) return fail("%s: cannot be used: %s", cuda->name, cudaGetErrorString(error));
#ifndef SLAM_EMULATOR
    const cublasStatus_t status = cublasLtCreate(&cuda->products);
    if (status) return fail("%s: cuBLASLt does not start: %s", cuda->name, cublasLtGetStatusString(status));
#endif
    return 1;
}

template <typename T> static void cuda_fill(slam_ops *ops) {
    ops->to_act = cuda_to_act<T>;
    ops->to_float = cuda_to_float<T>;
    ops->embedding_forward = cuda_embedding_forward<T>;
    ops->embedding_backward = cuda_embedding_backward<T>;
    ops->rmsnorm_forward = cuda_rmsnorm_forward<T>;
    ops->rmsnorm_backward = cuda_rmsnorm_backward<T>;
    ops->matmul_forward = cuda_matmul_forward<T>;
    ops->matmul_backward_input = cuda_matmul_backward_input<T>;
    ops->matmul_backward_weight = cuda_matmul_backward_weight<T>;
    ops->attention_forward = cuda_attention_forward;
    ops->attention_backward = cuda_attention_backward;
    ops->attention_decode = cuda_attention_decode;
    ops->attention_fill = cuda_attention_fill<T>;
    ops->swiglu_forward = cuda_swiglu_forward<T>;
    ops->swiglu_backward = cuda_swiglu_backward<T>;
    ops->crossentropy = cuda_crossentropy<T>;
    ops->sample = cuda_sample<T>;
    ops->sum = cuda_sums<0>;
    ops->sum_squares = cuda_sums<1>;
    ops->adamw = cuda_adamw<T>;
    ops->conv1d = cuda_conv1d<T>;
    ops->group_frames = cuda_group_frames<T>;
    ops->mask_frames = cuda_mask_frames<T>;
    ops->gelu = cuda_gelu<T>;
    ops->layernorm = cuda_layernorm<T>;
    ops->channelnorm = cuda_channelnorm<T>;
    ops->nearest = cuda_nearest;
}

slam_ops *slam_cuda(int device, int bytes_per_act) {
    cudaDeviceProp p;
    if (bytes_per_act != 2 && bytes_per_act != 4) {
        fail("cuda:%d: activations of %d bytes: they have 2 (bf16) or 4 (float)", device, bytes_per_act);
        return NULL;
    }
    if (!cuda_usable(device, &p)) return NULL;
    cuda_ops *cuda = (cuda_ops *)mem_new(1, sizeof *cuda);
    if (!cuda) return NULL;
    slam_ops *ops = &cuda->ops;
    snprintf(cuda->name, sizeof cuda->name, "cuda:%d %s%s", device, p.name, bytes_per_act == 4 ? ", f32" : "");
    cuda->device = device;
    cuda->processors = p.multiProcessorCount;
    ops->name = cuda->name;
    ops->bytes_per_act = bytes_per_act;
    ops->asynchronous = 1;
    ops->threads = threads_set(0); // reading and packing data is the host's
    ops->memory = p.totalGlobalMem;
    ops->alloc = cuda_alloc;
    ops->release = cuda_release;
    ops->upload = cuda_upload;
    ops->download = cuda_download;
    ops->zero = cuda_zero;
    ops->finish = cuda_finish;
    ops->close = cuda_close;
    ops->comm_begin = cuda_comm_begin;
    ops->comm_end = cuda_comm_end;
    ops->comm_done = cuda_comm_done;
    if (bytes_per_act == 2) cuda_fill<bf16>(ops);
    else cuda_fill<float>(ops);
    if (cuda_open(cuda)) {
        ops->comm_stream = cuda->comm;
        return ops;
    }
    cuda_close(ops);
    return NULL;
}
#endif

/* ==========================================================================================
   6. RANKS              one process, or many that work together: MPI, NCCL
   Data parallelism: rank k computes the gradient g_k of its rows, an update needs their sum G.
     reduce-scatter   each rank gets the sum of its part of G         (n - 1) / n |G| sent by each
     update           of that part's weights, whose moments it alone keeps: ZeRO-1
     all-gather       each rank gets the new weights of all parts     (n - 1) / n |W| sent by each
   Together that is the traffic of one ring all-reduce, and an n-th of the update's work. MPI starts
   the processes, lets them agree, and carries the host's memory; NCCL carries GPUs' memory. The
   other sections do not know which.
   may use: 1 base, 3 ops
   ========================================================================================== */
#include <signal.h>
#ifdef SLAM_MPI
#define OMPI_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#endif
#if defined(SLAM_NCCL) && !defined(SLAM_EMULATOR)
#include <nccl.h>
#endif

/* What carries the memory of devices. */
enum { TRANSPORT_NONE, TRANSPORT_MPI, TRANSPORT_NCCL };

#ifdef SLAM_MPI
/* A reduce-scatter that has begun: each rank's numbers of this rank's part arrive one rank after the other. */
typedef struct reduction {
    float *x;                                     // (n), of which the part becomes the sum; NULL: nothing has begun
    size_t n, capacity;                           // capacity of `arrived`
    float *arrived;                               // (ranks - 1, part)
    int *sent, *sent_at, *received, *received_at; // (ranks), numbers
    MPI_Request request;
} reduction;
enum { REDUCTIONS = 2 }; // one is added up while the next is on its way
#endif

enum { RANKS_TABLE = 512 }; // doubles that slam_ranks_sum exchanges at a time

struct slam_ranks {
    int rank, n, local, local_n; // number and how many: of all, of this machine
    int failed;                  // all ranks know that one of them has failed
    int lost;                    // this one has failed where the others may wait for it: it waits for nobody any more
    int zero;                    // stage of ZeRO
    int transport;
    slam_ops *ops;
    double *table;   // (n, RANKS_TABLE)
    int64_t *pids;   // (local_n), processes of this machine's ranks; 0: in another name space, where its number means nothing here
    uint64_t *sizes; // (n), of slam_ranks_all_gather
#ifdef SLAM_MPI
    int started;      // MPI_Init was called here, so MPI_Finalize is as well
    int *counts, *at; // (n), of mpi_all_gather
    unsigned turn;    // reductions so far: the next one takes place turn % REDUCTIONS
    reduction pending[REDUCTIONS];
#endif
#ifdef SLAM_NCCL
    ncclComm_t nccl;
#endif
};

int slam_ranks_rank(const slam_ranks *r) { return r ? r->rank : 0; }
int slam_ranks_root(const slam_ranks *r) { return slam_ranks_rank(r) == 0; }
int slam_ranks_count(const slam_ranks *r) { return r ? r->n : 1; }
int slam_ranks_failed(const slam_ranks *r) { return r ? r->failed : 0; }

void slam_ranks_zero(slam_ranks *r, int stage) {
    if (r) r->zero = stage;
}

int slam_ranks_local(const slam_ranks *r, int *count) {
    *count = r ? r->local_n : 1;
    return r ? r->local : 0;
}

int slam_ranks_alive(const slam_ranks *r) {
    for (int k = 0; r && r->pids && k < r->local_n; k++)
        if (r->pids[k] > 0 && kill((pid_t)r->pids[k], 0) != 0 && errno == ESRCH) return 0;
    return 1;
}

void slam_ranks_share(const slam_ranks *r, size_t n, size_t *first, size_t *end) {
    const size_t ranks = (size_t)slam_ranks_count(r), rank = (size_t)slam_ranks_rank(r), each = n / ranks, more = n % ranks;
    *first = rank * each + (rank < more ? rank : more);
    *end = *first + each + (rank < more);
}

/* NCCL's reduce-scatter and all-gather want equal parts, and kernels an alignment of 256 bytes: n / ranks, rounded down to 64 floats.
   The last rank takes what is left as well, in a reduction and a broadcast of its own. */
static size_t part_size(const slam_ranks *r, size_t n) { return n / (size_t)slam_ranks_count(r) / 64 * 64; }
static void part_of(const slam_ranks *r, int rank, size_t n, size_t *first, size_t *count) {
    const size_t each = part_size(r, n);
    *first = (size_t)rank * each;
    *count = rank == slam_ranks_count(r) - 1 ? n - *first : each;
}

/* ---- MPI: start and end ---- */

/* Whether mpirun or srun has started this process. (MPI_Init without either takes a tenth of a second.) */
static int ranks_launched(void) {
    static const char *const marks[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE"};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (getenv(marks[i])) return 1;
    return 0;
}

/* How many processes the launcher says that it has started (1: there is none), and which launcher. Inside an srun's step mpirun's number
   counts. */
static int ranks_claimed(const char **launcher) {
    const char *mpirun = getenv("OMPI_COMM_WORLD_SIZE") ? getenv("OMPI_COMM_WORLD_SIZE") : getenv("PMI_SIZE");
    const char *said = mpirun ? mpirun : getenv("SLURM_STEP_NUM_TASKS");
    *launcher = mpirun ? "mpirun" : "srun";
    return said ? atoi(said) : 1;
}

/* Several processes that do not see each other would each train the whole run, in the same folder. */
static int check_launcher(void) {
    const char *launcher;
    const int n = ranks_claimed(&launcher);
    if (n < 2) return 1;
#ifdef SLAM_MPI
    if (!strcmp(launcher, "srun"))
        return fail(
            "srun has started %d processes, but this one sees only itself: srun --mpi=pmix with Open MPI, --mpi=pmi2 with MPICH "
            "(runs that have nothing to do with each other: unset SLURM_STEP_NUM_TASKS)",
            n);
    return fail("mpirun has started %d processes, but this one sees only itself: mpirun and this build belong to different MPIs",
                n);
#else
    return fail("%s has started %d processes, but this build has no MPI: install libopenmpi-dev, then make", launcher, n);
#endif
}

#ifdef SLAM_MPI
/* Process numbers of this machine's ranks; 0 for one in another name space. */
static int find_local_pids(slam_ranks *r, MPI_Comm machine) {
    struct stat space = SLAM_ZERO;
    const int known = stat("/proc/self/ns/pid", &space);
    int64_t me[2] = {getpid(), known == 0 ? (int64_t)space.st_ino : 0}, *all = (int64_t *)mem_new((size_t)r->local_n, sizeof me);
    r->pids = (int64_t *)mem_new((size_t)r->local_n, sizeof *r->pids);
    if (all && r->pids) MPI_Allgather(me, 2, MPI_INT64_T, all, 2, MPI_INT64_T, machine);
    for (int k = 0; all && r->pids && k < r->local_n; k++) r->pids[k] = all[2 * k + 1] == me[1] ? all[2 * k] : 0;
    free(all);
    return all && r->pids;
}

static int ranks_start(slam_ranks *r) {
    int running = 0, level;
    MPI_Comm machine;
    MPI_Initialized(&running);
    if (!running && !ranks_launched()) return 1;
    if (!running) MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    r->started = !running;
    r->transport = TRANSPORT_MPI;
    MPI_Comm_rank(MPI_COMM_WORLD, &r->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &r->n);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, r->rank, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &r->local);
    MPI_Comm_size(machine, &r->local_n);
    const int ok = find_local_pids(r, machine);
    MPI_Comm_free(&machine);
    return ok;
}

static int exchanges_new(slam_ranks *r) {
    const size_t n = (size_t)r->n;
    r->counts = (int *)mem_new(n, 2 * sizeof(int));
    if (!r->counts) return 0;
    r->at = r->counts + n;
    for (int k = 0; k < REDUCTIONS; k++) {
        reduction *p = &r->pending[k];
        p->sent = (int *)mem_new(n, 4 * sizeof(int));
        if (!p->sent) return 0;
        p->sent_at = p->sent + n;
        p->received = p->sent + 2 * n;
        p->received_at = p->sent + 3 * n;
    }
    return 1;
}
#endif

slam_ranks *slam_ranks_join(void) {
    slam_ranks *r = (slam_ranks *)mem_new(1, sizeof *r);
    if (!r) return NULL;
    r->n = r->local_n = r->zero = 1;
    int ok = 1;
#ifdef SLAM_MPI
    ok = ranks_start(r) && (r->transport == TRANSPORT_NONE || exchanges_new(r));
#endif
    ok = ok && (r->table = (double *)mem_new((size_t)r->n * RANKS_TABLE, sizeof *r->table)) != NULL &&
         (r->sizes = (uint64_t *)mem_new((size_t)r->n, sizeof *r->sizes)) != NULL;
    ok = ok && (r->n > 1 || check_launcher());
    if (ok) return r;
    slam_ranks_leave(r, 1);
    return NULL;
}

void slam_ranks_leave(slam_ranks *r, int status) {
    if (!r) return;
#ifdef SLAM_MPI
    if (r->started && status && r->n > 1 && !r->failed) {
        fflush(NULL);
        MPI_Abort(MPI_COMM_WORLD, status);
    }
#endif
    if (r->ops) r->ops->ranks = NULL;
#ifdef SLAM_NCCL
    if (r->nccl) ncclCommDestroy(r->nccl);
#endif
#ifdef SLAM_MPI
    free(r->counts);
    for (int k = 0; k < REDUCTIONS; k++) {
        free(r->pending[k].sent);
        free(r->pending[k].arrived);
    }
    if (r->started) MPI_Finalize();
#endif
    free(r->pids);
    free(r->sizes);
    free(r->table);
    free(r);
    (void)status;
}

void slam_ranks_attach(slam_ranks *r, slam_ops *ops) {
    if (!r || r->transport == TRANSPORT_NONE) return;
    ops->ranks = r;
    r->ops = ops;
}

/* ---- what the hosts tell each other ---- */

#ifdef SLAM_MPI
static int takes_part(const slam_ranks *r) { return r && r->n > 1 && !r->lost; }

/* MPI counts in int. */
static void mpi_broadcast(void *x, size_t bytes, int root) {
    const size_t most = (size_t)1 << 30;
    for (size_t at = 0; at < bytes; at += most)
        MPI_Bcast((char *)x + at, (int)(bytes - at < most ? bytes - at : most), MPI_BYTE, root, MPI_COMM_WORLD);
}
#endif

void slam_ranks_broadcast(slam_ranks *r, void *x, size_t bytes) {
#ifdef SLAM_MPI
    if (takes_part(r)) mpi_broadcast(x, bytes, 0);
#endif
    (void)r, (void)x, (void)bytes;
}

int slam_ranks_agree(slam_ranks *r, int ok) {
#ifdef SLAM_MPI
    int first = r && !ok ? r->rank : INT_MAX;
    char sentence[sizeof error_text];
    if (slam_ranks_count(r) == 1) return ok;
    if (r->failed || r->lost) return 0;
    MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (first == INT_MAX) return 1;
    memcpy(sentence, error_text, sizeof sentence);
    MPI_Bcast(sentence, (int)sizeof sentence, MPI_CHAR, first, MPI_COMM_WORLD);
    r->failed = 1;
    return first ? fail("rank %d: %s", first, sentence) : fail("%s", sentence);
#else
    (void)r;
    return ok;
#endif
}

long slam_ranks_max(slam_ranks *r, long x) {
#ifdef SLAM_MPI
    if (takes_part(r)) MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_LONG, MPI_MAX, MPI_COMM_WORLD);
#endif
    (void)r;
    return x;
}

int slam_ranks_same(slam_ranks *r, uint64_t x) {
    uint64_t ends[2] = {x, ~x}; // the largest, and the inverse of the smallest
#ifdef SLAM_MPI
    if (takes_part(r)) MPI_Allreduce(MPI_IN_PLACE, ends, 2, MPI_UINT64_T, MPI_MAX, MPI_COMM_WORLD);
#endif
    (void)r;
    return ends[0] == ~ends[1];
}

void slam_ranks_sum(slam_ranks *r, double *x, size_t n) {
#ifdef SLAM_MPI
    for (size_t at = 0; takes_part(r) && at < n; at += RANKS_TABLE) {
        const int some = n - at < RANKS_TABLE ? (int)(n - at) : (int)RANKS_TABLE;
        MPI_Allgather(x + at, some, MPI_DOUBLE, r->table, some, MPI_DOUBLE, MPI_COMM_WORLD);
        for (int i = 0; i < some; i++) {
            double sum = r->table[i];
            for (int k = 1; k < r->n; k++) sum += r->table[k * some + i];
            x[at + (size_t)i] = sum;
        }
    }
#endif
    (void)r, (void)x, (void)n;
}

void *slam_ranks_all_gather(slam_ranks *r, const void *x, size_t bytes, size_t *all) {
    size_t before = 0;
    *all = bytes;
#ifdef SLAM_MPI
    if (takes_part(r)) {
        const uint64_t mine = bytes;
        MPI_Allgather(&mine, 1, MPI_UINT64_T, r->sizes, 1, MPI_UINT64_T, MPI_COMM_WORLD);
        *all = 0;
        for (int k = 0; k < r->n; *all += (size_t)r->sizes[k++])
            if (k < r->rank) before += (size_t)r->sizes[k];
    }
#endif
    char *whole = (char *)mem_new(*all, 1);
    if (!slam_ranks_agree(r, whole != NULL)) {
        free(whole);
        return NULL;
    }
    if (bytes) memcpy(whole + before, x, bytes);
#ifdef SLAM_MPI
    char *of = whole;
    for (int k = 0; takes_part(r) && k < r->n; of += r->sizes[k++]) mpi_broadcast(of, (size_t)r->sizes[k], k);
#endif
    return whole;
}

/* ---- NCCL ---- */

/* From here on this rank takes part in nothing: the others may be inside an exchange that it has left. */
static int rank_lost(slam_ranks *r) {
    r->lost = 1;
    return 0;
}

#ifdef SLAM_NCCL
static int nccl_check(slam_ranks *r, ncclResult_t result, const char *operation) {
    if (result == ncclSuccess) return 1;
    fail("NCCL failed in %s: %s", operation, ncclGetErrorString(result));
    return rank_lost(r);
}

/* The stream in which NCCL does all that it does. (The type is CUDA's cudaStream_t, as the driver calls it.) */
static struct CUstream_st *nccl_stream(const slam_ranks *r) { return (struct CUstream_st *)r->ops->comm_stream; }
#endif

/* Before the first exchange of what lies in the device's memory: all ranks together. */
static int ranks_connect(slam_ranks *r) {
    if (!r->ops->comm_stream || r->transport == TRANSPORT_NCCL) return 1; // the host's memory is MPI's
#ifdef SLAM_NCCL
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    if (r->rank == 0 && !nccl_check(r, ncclGetUniqueId(&id), "its start")) return 0;
    slam_ranks_broadcast(r, &id, sizeof id);
    r->transport = TRANSPORT_NCCL;
    return nccl_check(r, ncclCommInitRank(&r->nccl, r->n, id, r->rank),
                      "meeting the other ranks (two of them on one GPU? NCCL_DEBUG=WARN tells more)");
#else
    if (r->n > 1)
        return fail("%d ranks on GPUs: this build has no NCCL: install libnccl-dev (or Python's nvidia-nccl), then make", r->n);
    r->transport = TRANSPORT_NONE;
    return 1;
#endif
}

/* ---- what the devices exchange ----
   reduce_scatter and all_gather begin and return; exchange_wait sees to it that what is asked of the ops from then on finds them done.
   x, n: a run of numbers, the same on all ranks; rank k's part of it: part_of.

   Over MPI a reduce-scatter is an all-to-all and a sum in the order of ranks here: MPI_Reduce_scatter may add in another order where a
   message has another size, and the same numbers shall have the same bits however they are cut into messages. Errors of MPI's end all
   processes (MPI_ERRORS_ARE_FATAL, as it is by itself), so that nobody reads what its calls return; those of NCCL's lose the rank. */

#ifdef SLAM_MPI
/* Adds up what has arrived, in the order of ranks. */
static void reduction_end(slam_ranks *r, reduction *p) {
    size_t first, n;
    if (!p->x) return;
    MPI_Wait(&p->request, MPI_STATUS_IGNORE);
    part_of(r, r->rank, p->n, &first, &n);
    float *x = p->x + first;
    SLAM_PARALLEL_FOR
    for (int64_t i = 0; i < (int64_t)n; i++) {
        float sum = 0;
        for (int k = 0; k < r->n; k++) {
            const float y = k == r->rank ? x[i] : p->arrived[(size_t)(k - (k > r->rank)) * n + (size_t)i];
            sum = k ? sum + y : y;
        }
        x[i] = sum;
    }
    p->x = NULL;
}

static int reduction_begin(slam_ranks *r, float *x, size_t n) {
    reduction *p = &r->pending[r->turn++ % REDUCTIONS];
    size_t first, mine, count;
    reduction_end(r, p);
    part_of(r, r->rank, n, &first, &mine);
    for (int k = 0, others = 0; k < r->n; k++) {
        const int self = k == r->rank;
        part_of(r, k, n, &first, &count);
        p->sent[k] = self ? 0 : (int)count;
        p->sent_at[k] = (int)first;
        p->received[k] = self ? 0 : (int)mine;
        p->received_at[k] = (int)((size_t)others * mine);
        others += !self;
    }
    const size_t room = (size_t)(r->n - 1) * mine;
    if (!mem_grow((void **)&p->arrived, &p->capacity, room ? room : 1, sizeof *p->arrived)) return 0;
    p->x = x;
    p->n = n;
    MPI_Ialltoallv(x, p->sent, p->sent_at, MPI_FLOAT, p->arrived, p->received, p->received_at, MPI_FLOAT, MPI_COMM_WORLD,
                   &p->request);
    return 1;
}

static void mpi_all_gather(slam_ranks *r, void *x, const void *part, size_t n, size_t size) {
    for (int k = 0; k < r->n; k++) {
        size_t first, count;
        part_of(r, k, n, &first, &count);
        r->at[k] = (int)(first * size);
        r->counts[k] = (int)(count * size);
    }
    const int own = (const char *)part == (char *)x + r->at[r->rank];
    MPI_Allgatherv(own ? MPI_IN_PLACE : part, own ? 0 : r->counts[r->rank], MPI_BYTE, x, r->counts, r->at, MPI_BYTE,
                   MPI_COMM_WORLD);
}
#endif

/* The part of x becomes the sum over ranks; what its other parts hold is lost. At most 2^28 numbers. */
static int exchange_reduce_scatter(slam_ranks *r, float *x, size_t n) {
    if (!r || r->transport == TRANSPORT_NONE) return 1;
#ifdef SLAM_NCCL
    if (r->transport == TRANSPORT_NCCL) {
        const size_t each = part_size(r, n), even = each * (size_t)r->n;
        r->ops->comm_begin(r->ops);
        if (even &&
            !nccl_check(r, ncclReduceScatter(x, x + each * (size_t)r->rank, each, ncclFloat, ncclSum, r->nccl, nccl_stream(r)),
                        "a reduction"))
            return 0;
        return even == n ||
               nccl_check(r, ncclReduce(x + even, x + even, n - even, ncclFloat, ncclSum, r->n - 1, r->nccl, nccl_stream(r)),
                          "a reduction");
    }
#endif
#ifdef SLAM_MPI
    return (r->ops->finish(r->ops) && reduction_begin(r, x, n)) || rank_lost(r);
#else
    (void)x, (void)n;
    return 1;
#endif
}

/* x (n elements of `size` bytes) = the parts of all ranks; this one's is `part`, which may lie in x. */
static int exchange_all_gather(slam_ranks *r, void *x, const void *part, size_t n, size_t size) {
    if (!r || r->transport == TRANSPORT_NONE) return 1;
#ifdef SLAM_NCCL
    if (r->transport == TRANSPORT_NCCL) {
        const size_t each = part_size(r, n) * size, even = each * (size_t)r->n, rest = n * size - even;
        char *tail = (char *)x + even;
        r->ops->comm_begin(r->ops);
        if (each && !nccl_check(r, ncclAllGather(part, x, each, ncclChar, r->nccl, nccl_stream(r)), "gathering")) return 0;
        return !rest || nccl_check(r,
                                   ncclBroadcast(r->rank == r->n - 1 ? (const char *)part + each : tail, tail, rest, ncclChar,
                                                 r->n - 1, r->nccl, nccl_stream(r)),
                                   "gathering");
    }
#endif
#ifdef SLAM_MPI
    if (!r->ops->finish(r->ops)) return rank_lost(r);
    mpi_all_gather(r, x, part, n, size);
#else
    (void)x, (void)part, (void)n, (void)size;
#endif
    return 1;
}

/* x (n), of the device, n at most RANKS_TABLE: the sum over ranks, the same bits on all. */
static int exchange_all_reduce(slam_ranks *r, double *x, size_t n) {
    if (!r || r->transport == TRANSPORT_NONE) return 1;
#ifdef SLAM_NCCL
    if (r->transport == TRANSPORT_NCCL) {
        r->ops->comm_begin(r->ops);
        if (!nccl_check(r, ncclAllReduce(x, x, n, ncclDouble, ncclSum, r->nccl, nccl_stream(r)), "a sum")) return 0;
        r->ops->comm_end(r->ops);
        return 1;
    }
#endif
    if (!r->ops->finish(r->ops)) return rank_lost(r);
    slam_ranks_sum(r, x, n);
    return 1;
}

static void exchange_wait(slam_ranks *r) {
    if (!r || r->transport == TRANSPORT_NONE) return;
    if (r->transport == TRANSPORT_NCCL) r->ops->comm_end(r->ops);
#ifdef SLAM_MPI
    else
        for (int k = 0; k < REDUCTIONS; k++) reduction_end(r, &r->pending[k]);
#endif
}

/* Before the host waits for the device: what NCCL has under way is waited for here, as it would go on for ever where the network, or a
   rank on another machine, is gone. */
static int exchange_finish(slam_ranks *r) {
#ifdef SLAM_NCCL
    while (r && r->transport == TRANSPORT_NCCL && !r->ops->comm_done(r->ops)) {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(r->nccl, &state);
        if (asked != ncclSuccess || state != ncclSuccess) {
            nccl_check(r, asked != ncclSuccess ? asked : state, "an exchange (NCCL_DEBUG=WARN tells more)");
            ncclCommAbort(r->nccl);
            r->nccl = NULL;
            return 0;
        }
        usleep(100);
    }
#endif
    (void)r;
    return 1;
}

/* MPI moves messages on only while it is called. */
static void exchange_progress(slam_ranks *r) {
#ifdef SLAM_MPI
    for (int k = 0; r && k < REDUCTIONS; k++) {
        int done;
        if (r->pending[k].x) MPI_Test(&r->pending[k].request, &done, MPI_STATUS_IGNORE);
    }
#endif
    (void)r;
}

/* ==========================================================================================
   7. MODEL              Qwen2 and Llama, forward and backward, written ONCE against `slam_ops`
   The configuration, where each weight and activation lies in memory, Hugging Face's files, the
   passes, and decoding a token at a time. Nothing here knows a backend.
   may use: 1 base, 2 formats, 3 ops
   ========================================================================================== */

/* ---- configuration ---- */

static const slam_config config_tiny = {102, 128, 4, 4, 2, 32, 384, 1024, 1, 1, 1e-6, 0.02, 10000};
static const slam_config config_slam = {502, 896, 24, 14, 2, 64, 4864, 32768, 1, 1, 1e-6, 0.02, 10000};

/* What is asked for by name in a config and is not built here is refused by that name. */
static int config_refuse(const json *c, const char *path) {
    const char *type = json_text(c, "model_type", ""), *act = json_text(c, "hidden_act", "silu");
    const json *scaling = json_get(c, "rope_scaling"), *rope = json_get(c, "rope_parameters"), *layers = json_get(c, "layer_types");
    int sliding = 0, bias = 0;
    double rotary = 1;
    if (strcmp(type, "qwen2") && strcmp(type, "llama"))
        return fail("%s: model_type is '%s', expected 'qwen2' or 'llama'", path, type);
    if (strcmp(act, "silu")) return fail("%s: hidden_act is '%s', expected 'silu'", path, act);
    if (scaling && scaling->type == JSON_OBJECT) {
        const char *kind = json_text(scaling, "rope_type", json_text(scaling, "type", ""));
        if (strcmp(kind, "default")) return fail("%s: rope_scaling '%s' is not supported, expected none", path, kind);
    }
    const char *kind = json_text(rope, "rope_type", "default");
    if (strcmp(kind, "default")) return fail("%s: rope_parameters has rope_type '%s', expected 'default'", path, kind);
    if (!json_flag(c, "use_sliding_window", path, &sliding)) return 0;
    for (const json *l = layers ? layers->first : NULL; l; l = l->next)
        if (l->type != JSON_STRING || strcmp(l->string, "full_attention")) sliding = 1;
    if (sliding) return fail("%s: asks for a sliding window, expected full attention in every layer", path);
    if (!json_flag(c, "attention_bias", path, &bias)) return 0;
    if (bias) return fail("%s: attention_bias is true, expected biases on q, k, v only (Qwen2) or none (Llama)", path);
    if (!json_flag(c, "mlp_bias", path, &bias)) return 0;
    if (bias) return fail("%s: mlp_bias is true, expected an MLP without biases", path);
    if (!json_real(c, "partial_rotary_factor", path, 0, 1, &rotary) ||
        !json_real(rope, "partial_rotary_factor", path, 0, 1, &rotary))
        return 0;
    if (rotary != 1) return fail("%s: partial_rotary_factor is %g, expected 1", path, rotary);
    return 1;
}

/* A whole number that has to be there. */
static int config_int(const json *c, const char *key, const char *path, long max, int *out) {
    long n = 0;
    if (!json_int(c, key, path, 1, max, &n)) return 0;
    if (n == 0) return fail("%s: '%s' is missing", path, key);
    *out = (int)n;
    return 1;
}

static int config_from_json(slam_config *config, const json *root, const char *path) {
    const json *base = json_get(root, "base_config"), *c = base ? base : root; // SlamKit keeps the transformer's settings apart
    slam_config k = {0, 0, 0, 0, 0, 0, 0, 2048, 0, 0, 1e-6, 0.02, 10000};
    long kv = 0, head = 0, T = k.T;
    if (!c || c->type != JSON_OBJECT) return fail("%s: no JSON object with a model's configuration", path);
    if (!config_refuse(c, path)) return 0;
    k.qkv_bias = strcmp(json_text(c, "model_type", ""), "qwen2") == 0;
    if (!config_int(c, "vocab_size", path, 1 << 20, &k.V) || !config_int(c, "hidden_size", path, 1 << 16, &k.C) ||
        !config_int(c, "num_hidden_layers", path, 1 << 10, &k.L) || !config_int(c, "num_attention_heads", path, 1 << 10, &k.NH) ||
        !config_int(c, "intermediate_size", path, 1 << 20, &k.F))
        return 0;
    if (base && json_get(root, "vocab_size") && !config_int(root, "vocab_size", path, 1 << 20, &k.V)) return 0;
    if (!json_int(c, "num_key_value_heads", path, 1, 1 << 10, &kv) || !json_int(c, "head_dim", path, 2, 1 << 12, &head) ||
        !json_int(c, "max_position_embeddings", path, 1, 1 << 28, &T))
        return 0;
    k.KVH = kv ? (int)kv : k.NH;
    k.T = (int)T;
    if (k.NH % k.KVH) return fail("%s: %d attention heads over %d key/value heads, expected a multiple", path, k.NH, k.KVH);
    if (!head && k.C % k.NH) return fail("%s: hidden_size %d over %d heads, expected a multiple", path, k.C, k.NH);
    k.HS = head ? (int)head : k.C / k.NH;
    if (k.HS % 2) return fail("%s: head size is %d, expected an even one (rotary positions turn pairs)", path, k.HS);
    if (!json_flag(c, "tie_word_embeddings", path, &k.tied) || !json_real(c, "rms_norm_eps", path, 1e-12, 1, &k.eps) ||
        !json_real(c, "initializer_range", path, 0, 10, &k.init_std) || !json_real(c, "rope_theta", path, 1, 1e12, &k.rope_theta) ||
        !json_real(json_get(c, "rope_parameters"), "rope_theta", path, 1, 1e12, &k.rope_theta))
        return 0;
    *config = k;
    return 1;
}

int slam_config_read(slam_config *config, const char *name_or_path) {
    if (!strcmp(name_or_path, "tiny") || !strcmp(name_or_path, "slam")) {
        *config = name_or_path[0] == 't' ? config_tiny : config_slam;
        return 1;
    }
    json *root = json_read(name_or_path);
    int ok = root && config_from_json(config, root, name_or_path);
    json_free(root);
    return ok;
}

/* ---- weights ----
   All weights are one array, so that the optimiser is a loop over it: first the matrices, which weight decay concerns, then the
   vectors. q, k and v are rows of one matrix, gate and up of another: one product computes them together, and since they are
   neighbours Hugging Face's tensors are simply its parts. Blocks begin at multiples of 256 numbers.

   The vocabulary has P rows: V, and up to seven of zeros, which no file holds. They make a row of logits a multiple of 16 bytes,
   which is what tensor cores read at once. Their gradients are zero, and so they stay zero. */

static int padded_vocabulary(const slam_config *c) { return (c->V + 7) / 8 * 8; }

typedef struct weights_layout {
    size_t embed, head;                    // (P,C); head is embed where they are tied
    size_t layer, layer_size;              // the first layer's matrices; layer l is layer_size * l further
    size_t qkv, out, gate_up, down;        // within it: (W,C) (C,O) (2F,C) (C,F)   W = (NH + 2 KVH) HS, O = NH HS
    size_t vectors, vectors_size;          // the first layer's vectors, likewise
    size_t attention_norm, mlp_norm, bias; // within it: (C) (C) (W)
    size_t norm;                           // (C)
    size_t matrices, total;                // numbers in the first part, in both
} weights_layout;

static size_t place(size_t *end, size_t n) {
    const size_t at = *end;
    *end += (n + 255) / 256 * 256;
    return at;
}

static weights_layout weights_of(const slam_config *c) {
    weights_layout w;
    const size_t P = padded_vocabulary(c), C = c->C, L = c->L, F = c->F, O = (size_t)c->NH * c->HS,
                 W = O + 2 * (size_t)c->KVH * c->HS;
    size_t end = 0, within = 0;
    w.embed = place(&end, P * C);
    w.head = c->tied ? w.embed : place(&end, P * C);
    w.qkv = place(&within, W * C);
    w.out = place(&within, C * O);
    w.gate_up = place(&within, 2 * F * C);
    w.down = place(&within, C * F);
    w.layer_size = within;
    w.layer = place(&end, L * within);
    w.matrices = end;
    within = 0;
    w.attention_norm = place(&within, C);
    w.mlp_norm = place(&within, C);
    w.bias = place(&within, c->qkv_bias ? W : 0);
    w.vectors_size = within;
    w.vectors = place(&end, L * within);
    w.norm = place(&end, C);
    w.total = end;
    return w;
}

/* A tensor by Hugging Face's name: (rows, cols), or (cols) where rows is 0; `at` in the array of weights. */
typedef struct parameter {
    char name[80];
    size_t rows, cols, at;
} parameter;

static parameter *parameter_add(parameter *p, size_t rows, size_t cols, size_t at, const char *format, int l) {
    snprintf(p->name, sizeof p->name, format, l);
    p->rows = rows;
    p->cols = cols;
    p->at = at;
    return p + 1;
}

/* All of a model's tensors in memory of their own, in the file's order; NULL where there is no room. */
static parameter *parameters_of(const slam_config *c, size_t *n) {
    const weights_layout w = weights_of(c);
    const size_t C = c->C, F = c->F, O = (size_t)c->NH * c->HS, K = (size_t)c->KVH * c->HS;
    parameter *list = (parameter *)mem_new(3 + 12 * (size_t)c->L, sizeof *list), *p = list;
    if (!list) return NULL;
    p = parameter_add(p, c->V, C, w.embed, "model.embed_tokens.weight", 0);
    for (int l = 0; l < c->L; l++) {
        const size_t m = w.layer + l * w.layer_size, v = w.vectors + l * w.vectors_size;
        p = parameter_add(p, 0, C, v + w.attention_norm, "model.layers.%d.input_layernorm.weight", l);
        p = parameter_add(p, O, C, m + w.qkv, "model.layers.%d.self_attn.q_proj.weight", l);
        p = parameter_add(p, K, C, m + w.qkv + O * C, "model.layers.%d.self_attn.k_proj.weight", l);
        p = parameter_add(p, K, C, m + w.qkv + (O + K) * C, "model.layers.%d.self_attn.v_proj.weight", l);
        if (c->qkv_bias) {
            p = parameter_add(p, 0, O, v + w.bias, "model.layers.%d.self_attn.q_proj.bias", l);
            p = parameter_add(p, 0, K, v + w.bias + O, "model.layers.%d.self_attn.k_proj.bias", l);
            p = parameter_add(p, 0, K, v + w.bias + O + K, "model.layers.%d.self_attn.v_proj.bias", l);
        }
        p = parameter_add(p, C, O, m + w.out, "model.layers.%d.self_attn.o_proj.weight", l);
        p = parameter_add(p, 0, C, v + w.mlp_norm, "model.layers.%d.post_attention_layernorm.weight", l);
        p = parameter_add(p, F, C, m + w.gate_up, "model.layers.%d.mlp.gate_proj.weight", l);
        p = parameter_add(p, F, C, m + w.gate_up + F * C, "model.layers.%d.mlp.up_proj.weight", l);
        p = parameter_add(p, C, F, m + w.down, "model.layers.%d.mlp.down_proj.weight", l);
    }
    p = parameter_add(p, 0, C, w.norm, "model.norm.weight", 0);
    if (!c->tied) p = parameter_add(p, c->V, C, w.head, "lm_head.weight", 0);
    *n = (size_t)(p - list);
    return list;
}

static size_t parameter_size(const parameter *p) { return (p->rows ? p->rows : 1) * p->cols; }

/* ---- activations ----
   One arena, planned from the configuration. What backward needs is kept for every layer; without training the layers share
   one place. What is cheap to compute, from what is kept, stands apart: where it is recomputed, the layers share its place alone.
   N = B T. */

typedef struct activations_layout {
    size_t layer, layer_size;                      // the first layer's block in bytes; layer l is layer_size * l further
    size_t residual, attention_r;                  // within it: the stream before attention (N,C), its 1/rms (N)
    size_t qkv, attention, lse;                    //            (N,W) (N,O) (B,NH,T)
    size_t residual_mid, mlp_r;                    //            the stream before the MLP, likewise
    size_t gate_up;                                //            (N,2F)
    size_t cheap, cheap_size;                      // the first layer's block of what is cheap, likewise
    size_t attention_in, mlp_in, swiglu;           // within it: the streams, normed (N,C), (N,C); (N,F)
    size_t delta;                                  // what a sub-layer adds to the stream (N,C)
    size_t residual_end, head_in, head_r;          // the stream after the last layer, likewise
    size_t losses, logits, weights;                // (N) (head_rows,P) (N)
    size_t dresidual, dnormed, dwide, dqkv, D;     // backward: (N,C) (N,C) (N,max(F,O)) (N,W) (B,NH,T)
    size_t tokens, targets, doc_start, hole, rope; // (N) (N) (N) (N,2) (T,HS)
    size_t total;                                  // bytes
    int head_rows;                                 // rows of logits that stand in memory at once
} activations_layout;

/* The head works on runs of rows, so that a large vocabulary does not ask for N V numbers at once. */
enum { HEAD_BYTES = 64 << 20 };

static activations_layout activations_of(const slam_config *c, size_t act, int B, int T, int mode) {
    activations_layout a;
    const size_t N = (size_t)B * T, C = c->C, F = c->F, O = (size_t)c->NH * c->HS, W = O + 2 * (size_t)c->KVH * c->HS,
                 H = N * c->NH;
    const size_t f = sizeof(float), i = sizeof(int);
    const int train = mode != SLAM_INFERENCE;
    size_t end = 0, within = 0, cheap = 0;
    a.residual = place(&within, N * C * act);
    a.attention_r = place(&within, N * f);
    a.qkv = place(&within, N * W * act);
    a.attention = place(&within, N * O * act);
    a.lse = place(&within, H * f);
    a.residual_mid = place(&within, N * C * act);
    a.mlp_r = place(&within, N * f);
    a.gate_up = place(&within, 2 * N * F * act);
    a.layer_size = train ? within : 0;
    a.layer = place(&end, train ? c->L * within : within);
    a.attention_in = place(&cheap, N * C * act);
    a.mlp_in = place(&cheap, N * C * act);
    a.swiglu = place(&cheap, N * F * act);
    a.cheap_size = mode == SLAM_TRAIN ? cheap : 0;
    a.cheap = place(&end, mode == SLAM_TRAIN ? c->L * cheap : cheap);
    a.delta = place(&end, N * C * act);
    a.residual_end = place(&end, N * C * act);
    a.head_in = place(&end, N * C * act);
    a.head_r = place(&end, N * f);
    a.losses = place(&end, N * f);
    const size_t P = padded_vocabulary(c), rows = HEAD_BYTES / (P * act);
    a.head_rows = rows < 1 ? 1 : rows < N ? (int)rows : (int)N;
    a.logits = place(&end, a.head_rows * P * act);
    a.weights = place(&end, train ? N * f : 0);
    a.dresidual = place(&end, train ? N * C * act : 0);
    a.dnormed = place(&end, train ? N * C * act : 0);
    a.dwide = place(&end, train ? N * (F > O ? F : O) * act : 0);
    a.dqkv = place(&end, train ? N * W * act : 0);
    a.D = place(&end, train ? H * f : 0);
    a.tokens = place(&end, N * i);
    a.targets = place(&end, N * i);
    a.doc_start = place(&end, N * i);
    a.hole = place(&end, 2 * N * i);
    a.rope = place(&end, (size_t)T * c->HS * f);
    a.total = end;
    return a;
}

size_t slam_config_parameters(const slam_config *c) {
    const size_t C = c->C, F = c->F, O = (size_t)c->NH * c->HS, W = O + 2 * (size_t)c->KVH * c->HS;
    return (c->tied ? 1 : 2) * (size_t)c->V * C + c->L * (W * C + C * O + 3 * F * C + 2 * C + (c->qkv_bias ? W : 0)) + C;
}

double slam_config_flops(const slam_config *c, int T) {
    const double C = c->C, F = c->F, O = (double)c->NH * c->HS, W = O + 2.0 * c->KVH * c->HS;
    return 6 * (c->V * C + c->L * (W * C + C * O + 3 * F * C)) + 6.0 * c->L * T * O;
}

slam_memory slam_config_memory(const slam_config *c, int bytes_per_act, int B, int T, int mode, int parts) {
    slam_memory m;
    const int train = mode != SLAM_INFERENCE;
    const double n = (double)weights_of(c).total;
    const activations_layout a = activations_of(c, bytes_per_act, B, T, mode);
    m.weights = n * (bytes_per_act == 4 ? 4 : bytes_per_act + 4.0 / (train ? parts : 1));
    m.gradients = train ? 4 * n : 0;
    m.optimiser = train ? 8 * n / parts : 0;
    m.logits = (double)a.head_rows * padded_vocabulary(c) * bytes_per_act;
    m.activations = (double)a.total - m.logits;
    m.total = m.weights + m.gradients + m.optimiser + m.logits + m.activations;
    return m;
}

/* ---- a model ---- */

struct slam_model {
    slam_ops *ops;
    slam_config config;
    weights_layout w;
    slam_act *weights; // (w.total), what products read
    float *master; // (w.total), what the optimiser changes; the same memory where an activation is a float; NULL: ranks have parts
    float *gradients; // (w.total), from the first plan that trains
    double *stats;    // sum of the losses since the last step, squared norm of the gradient
    activations_layout a;
    char *arena;
    int B, T, mode;   // what the arena was planned for
    int held;         // 1: the arena holds all that the backward pass of ...
    slam_window pass; // ... this forward pass needs
};

static slam_act *act_at(const slam_model *m, size_t bytes) { return (slam_act *)(m->arena + bytes); }
static slam_act *act_in(const slam_model *m, int l, size_t within) { return act_at(m, m->a.layer + l * m->a.layer_size + within); }
static slam_act *cheap_in(const slam_model *m, int l, size_t within) {
    return act_at(m, m->a.cheap + l * m->a.cheap_size + within);
}
static float *float_at(const slam_model *m, size_t bytes) { return (float *)(m->arena + bytes); }
static float *float_in(const slam_model *m, int l, size_t within) { return (float *)act_in(m, l, within); }
static int *int_at(const slam_model *m, size_t bytes) { return (int *)(m->arena + bytes); }
static slam_act *weight_at(const slam_model *m, size_t at) { return (slam_act *)((char *)m->weights + at * m->ops->bytes_per_act); }
static size_t matrix_of(const slam_model *m, int l, size_t within) { return m->w.layer + l * m->w.layer_size + within; }
static size_t vector_of(const slam_model *m, int l, size_t within) { return m->w.vectors + l * m->w.vectors_size + within; }

const slam_config *slam_model_config(const slam_model *m) { return &m->config; }

void slam_model_free(slam_model *m) {
    if (!m) return;
    m->ops->release(m->ops, m->arena);
    m->ops->release(m->ops, m->stats);
    m->ops->release(m->ops, m->gradients);
    if ((void *)m->master != (void *)m->weights) m->ops->release(m->ops, m->master);
    m->ops->release(m->ops, m->weights);
    free(m);
}

/* A model whose weights are all zero. */
static slam_model *model_empty(slam_ops *ops, const slam_config *config) {
    slam_model *m = (slam_model *)mem_new(1, sizeof *m);
    if (!m) return NULL;
    m->ops = ops;
    m->config = *config;
    m->w = weights_of(config);
    m->weights = (slam_act *)ops->alloc(ops, m->w.total * ops->bytes_per_act);
    m->master = ops->bytes_per_act == sizeof(float) ? (float *)m->weights : (float *)ops->alloc(ops, m->w.total * sizeof(float));
    m->stats = (double *)ops->alloc(ops, 2 * sizeof(double));
    if (m->weights && m->master && m->stats) return m;
    slam_model_free(m);
    return NULL;
}

/* The weights (w.total), on the host. Where ranks have parts of them: as products read them. */
static int weights_download(slam_model *m, float *host) {
    slam_ops *ops = m->ops;
    float *rounded = m->master ? NULL : (float *)ops->alloc(ops, m->w.total * sizeof *rounded);
    if (!m->master && !rounded) return 0;
    if (rounded) ops->to_float(ops, rounded, m->weights, m->w.total);
    ops->download(ops, host, m->master ? m->master : rounded, m->w.total * sizeof *host);
    ops->release(ops, rounded);
    return ops->finish(ops);
}

static void weights_changed(slam_model *m) {
    if ((void *)m->master != (void *)m->weights) m->ops->to_act(m->ops, m->weights, m->master, m->w.total);
}

/* Each row has a random stream of its own, so that the weights depend on the seed and not on the number of threads. */
slam_model *slam_model_new(slam_ops *ops, const slam_config *config, uint64_t seed) {
    size_t n = 0, largest = 0;
    slam_model *m = model_empty(ops, config);
    parameter *list = m ? parameters_of(config, &n) : NULL;
    for (size_t k = 0; list && k < n; k++) largest = parameter_size(&list[k]) > largest ? parameter_size(&list[k]) : largest;
    float *host = list ? (float *)mem_new(largest, sizeof *host) : NULL;
    for (size_t k = 0; host && k < n; k++) {
        const parameter p = list[k];
        const int is_norm = strstr(p.name, "norm.weight") != NULL;
        SLAM_PARALLEL_FOR
        for (size_t i = 0; i < (p.rows ? p.rows : 1); i++) {
            uint64_t stream = rng_stream(seed, k, i);
            for (size_t c = 0; c < p.cols; c++)
                host[i * p.cols + c] = p.rows ? (float)(config->init_std * rng_normal(&stream)) : is_norm ? 1.0f : 0.0f;
        }
        ops->upload(ops, m->master + p.at, host, parameter_size(&p) * sizeof(float));
    }
    const int ok = host != NULL;
    free(host);
    free(list);
    if (!ok) {
        slam_model_free(m);
        return NULL;
    }
    weights_changed(m);
    return m;
}

void slam_model_set_rope_theta(slam_model *m, double rope_theta) {
    m->config.rope_theta = rope_theta;
    m->B = m->T = m->held = 0; // the table in the arena is the old one's: the next pass plans again
}

int slam_model_hash(slam_model *m, uint64_t *hash) {
    const slam_config *c = &m->config;
    const int shape[] = {c->V, c->C, c->L, c->NH, c->KVH, c->HS, c->F, c->tied, c->qkv_bias};
    const double reals[] = {c->eps, c->rope_theta};
    float *host = (float *)mem_new(m->w.total, sizeof *host);
    if (!host) return 0;
    const int ok = weights_download(m, host);
    *hash = hash_bytes(hash_bytes(HASH_START, shape, sizeof shape), reals, sizeof reals);
    *hash = hash_bytes(*hash, host, m->w.total * sizeof *host);
    free(host);
    return ok;
}

/* ---- Hugging Face's files ---- */

/* Tensors that files hold and a model does not need. */
static int tensor_is_extra(const slam_config *c, const char *name) {
    return path_ends(name, "rotary_emb.inv_freq") || (c->tied && !strcmp(name, "lm_head.weight"));
}

static int is_vocabulary(const char *name) { return !strcmp(name, "model.embed_tokens.weight") || !strcmp(name, "lm_head.weight"); }

/* Pairs every parameter with the file's tensor of its name and shape, and sees that the file holds nothing else. `cut` allows a
   vocabulary with more rows than the model's. A file's claims are checked here, before any memory is asked for on their account. */
static int weights_match(const parameter *list, size_t n, const tensor **match, const slam_config *c, const tensors *file,
                         const char *folder, int cut) {
    const char *prefix = tensors_find(file, "lm.model.embed_tokens.weight") ? "lm." : "";
    for (size_t k = 0; k < n; k++) {
        const parameter *p = &list[k];
        char name[96];
        snprintf(name, sizeof name, "%s%s", prefix, p->name);
        const tensor *t = match[k] = tensors_find(file, name);
        if (!t) return fail("%s: tensor '%s' is missing", folder, name);
        const int more = cut && is_vocabulary(p->name) && t->rank == 2 && t->shape[0] > p->rows;
        if (!(p->rows ? tensor_shape_is(t, 2, more ? t->shape[0] : p->rows, p->cols) : tensor_shape_is(t, 1, p->cols, 0))) return 0;
    }
    for (size_t k = 0; k < tensors_count(file); k++) {
        const tensor *t = tensors_at(file, k);
        const char *name = t->name + (strncmp(t->name, prefix, strlen(prefix)) ? 0 : strlen(prefix));
        size_t i = 0;
        while (i < n && match[i] != t) i++;
        if (i == n && !tensor_is_extra(c, name)) return fail("%s: tensor '%s' is not part of this model", t->file, t->name);
    }
    return 1;
}

static int weights_load(slam_model *m, const parameter *list, size_t n, const tensor *const *match) {
    for (size_t k = 0; k < n; k++) {
        const size_t count = parameter_size(&list[k]);
        float *host = (float *)mem_new(count, sizeof *host);
        int ok = host && tensor_floats(match[k], host, 0, count);
        for (size_t i = 0; ok && i < count; i++)
            if (!isfinite(host[i])) ok = fail("%s: tensor '%s' holds a number that is not finite", match[k]->file, match[k]->name);
        if (ok) m->ops->upload(m->ops, m->master + list[k].at, host, count * sizeof *host);
        free(host);
        if (!ok) return 0;
    }
    weights_changed(m);
    return 1;
}

/* V 0: the vocabulary as it is; otherwise its first V rows. */
static slam_model *model_load(slam_ops *ops, const char *folder, int V) {
    slam_config config;
    slam_model *m = NULL;
    size_t n = 0;
    char *path = path_join(folder, "config.json");
    int ok = path && slam_config_read(&config, path);
    if (ok && V > config.V) ok = fail("%s: vocab_size is %d, expected at least %d to cut it to", path, config.V, V);
    if (ok && V) config.V = V;
    tensors *file = ok ? tensors_open(folder) : NULL;
    parameter *list = file ? parameters_of(&config, &n) : NULL;
    const tensor **match = list ? (const tensor **)mem_new(n, sizeof *match) : NULL;
    ok = match && weights_match(list, n, match, &config, file, folder, V != 0) && (m = model_empty(ops, &config)) != NULL &&
         weights_load(m, list, n, match);
    free((void *)match);
    free(list);
    tensors_close(file);
    free(path);
    if (ok) return m;
    slam_model_free(m);
    return NULL;
}

slam_model *slam_model_load(slam_ops *ops, const char *folder) { return model_load(ops, folder, 0); }
slam_model *slam_model_twist(slam_ops *ops, const char *folder, int V) { return model_load(ops, folder, V); }

/* The configuration as Transformers 4 and 5 both read it: the rotary base and the type of numbers stand in either's spelling. */
static void config_add_transformer(text *t, const slam_config *c, const char *indent) {
    const char *q = c->qkv_bias ? "qwen2" : "llama";
    text_add(t, "%s\"architectures\": [\"%s\"],\n%s\"model_type\": \"%s\",\n", indent,
             c->qkv_bias ? "Qwen2ForCausalLM" : "LlamaForCausalLM", indent, q);
    text_add(t, "%s\"vocab_size\": %d,\n%s\"hidden_size\": %d,\n%s\"intermediate_size\": %d,\n", indent, c->V, indent, c->C, indent,
             c->F);
    text_add(t, "%s\"num_hidden_layers\": %d,\n%s\"num_attention_heads\": %d,\n%s\"num_key_value_heads\": %d,\n", indent, c->L,
             indent, c->NH, indent, c->KVH);
    text_add(t, "%s\"head_dim\": %d,\n%s\"max_position_embeddings\": %d,\n%s\"hidden_act\": \"silu\",\n", indent, c->HS, indent,
             c->T, indent);
    text_add(t, "%s\"rms_norm_eps\": ", indent);
    text_add_number(t, c->eps);
    text_add(t, ",\n%s\"initializer_range\": ", indent);
    text_add_number(t, c->init_std);
    text_add(t, ",\n%s\"rope_theta\": ", indent);
    text_add_number(t, c->rope_theta);
    text_add(t, ",\n%s\"rope_parameters\": {\"rope_theta\": ", indent);
    text_add_number(t, c->rope_theta);
    text_add(t, ", \"rope_type\": \"default\"},\n%s\"tie_word_embeddings\": %s,\n%s\"attention_dropout\": 0.0,\n", indent,
             c->tied ? "true" : "false", indent);
    text_add(t, "%s%s,\n", indent,
             c->qkv_bias ? "\"use_sliding_window\": false" : "\"attention_bias\": false,\n  \"mlp_bias\": false");
    text_add(t, "%s\"bos_token_id\": 1,\n%s\"eos_token_id\": 1,\n%s\"pad_token_id\": 0,\n", indent, indent, indent);
    text_add(t, "%s\"dtype\": \"float32\",\n%s\"torch_dtype\": \"float32\",\n%s\"use_cache\": true", indent, indent, indent);
}

static int write_text(const char *folder, const char *name, text *t) {
    char *path = path_join(folder, name);
    int ok = path && !t->failed && file_write(path, t->at, t->n);
    if (t->failed) fail("%s/%s: out of memory", folder, name);
    free(path);
    text_free(t);
    return ok;
}

static int weights_write(const slam_model *m, const float *host, const char *folder, const char *prefix) {
    size_t n = 0;
    parameter *list = parameters_of(&m->config, &n);
    tensor_out *out = list ? (tensor_out *)mem_new(n, sizeof *out) : NULL;
    char *path = path_join(folder, "model.safetensors");
    names spelled = SLAM_ZERO;
    int ok = out && path;
    for (size_t k = 0; ok && k < n; k++) {
        char name[96];
        snprintf(name, sizeof name, "%s%s", prefix, list[k].name);
        ok = names_add(&spelled, name);
        if (!ok) break;
        out[k].name = spelled.at[k];
        out[k].dtype = DTYPE_F32;
        out[k].rank = list[k].rows ? 2 : 1;
        out[k].shape[0] = list[k].rows ? list[k].rows : list[k].cols;
        out[k].shape[1] = list[k].cols;
        out[k].data = host + list[k].at;
    }
    ok = ok && tensors_write(path, out, n, NULL);
    names_free(&spelled);
    free(path);
    free(out);
    free(list);
    return ok;
}

/* The model with these weights (w.total). */
static int model_write(const slam_model *m, const float *host, const char *folder, int format) {
    const int slamkit = format == SLAM_FORMAT_SLAMKIT;
    text t = SLAM_ZERO, g = SLAM_ZERO;
    text_add(&t, "{\n");
    if (slamkit) { // the transformer's settings stand apart; SlamKit asks base_model_name's config for what they leave out
        text_add(
            &t,
            "  \"architectures\": [\"UnitLM\"],\n  \"model_type\": \"speech_language_model\",\n  \"base_model_name\": \"%s\",\n",
            m->config.qkv_bias ? "Qwen/Qwen2.5-0.5B" : "HuggingFaceTB/SmolLM2-135M");
        text_add(&t, "  \"twist_init\": true,\n  \"vocab_size\": %d,\n  \"max_position_embeddings\": %d,\n  \"rope_theta\": ",
                 m->config.V, m->config.T);
        text_add_number(&t, m->config.rope_theta);
        text_add(&t, ",\n  \"torch_dtype\": \"float32\",\n  \"use_cache\": true,\n  \"base_config\": {\n");
    }
    config_add_transformer(&t, &m->config, slamkit ? "    " : "  ");
    text_add(&t, slamkit ? "\n  }\n}\n" : "\n}\n");
    text_add(&g, "{\n  \"bos_token_id\": 1,\n  \"eos_token_id\": 1,\n  \"pad_token_id\": 0\n}\n");
    const int ok = write_text(folder, "config.json", &t);
    return write_text(folder, "generation_config.json", &g) && ok && weights_write(m, host, folder, slamkit ? "lm." : "");
}

int slam_model_save(slam_model *m, const char *folder, int format) {
    float *host = (float *)mem_new(m->w.total, sizeof *host);
    const int ok = host && weights_download(m, host) && model_write(m, host, folder, format);
    free(host);
    return ok;
}

/* ---- a plan: room for batches, and the table of rotary angles ---- */

/* cos and sin of position * theta^(-2c/HS), in the float arithmetic of Transformers, so that the same angles come out */
static int rope_table(slam_model *m, int T) {
    const int HS = m->config.HS, half = HS / 2;
    float *table = (float *)mem_new((size_t)T * HS, sizeof *table);
    if (!table) return 0;
    for (int c = 0; c < half; c++) {
        const float frequency = 1 / powf((float)m->config.rope_theta, (float)(2 * c) / (float)HS);
        for (int p = 0; p < T; p++) {
            table[(size_t)p * HS + c] = cosf((float)p * frequency);
            table[(size_t)p * HS + half + c] = sinf((float)p * frequency);
        }
    }
    m->ops->upload(m->ops, float_at(m, m->a.rope), table, (size_t)T * HS * sizeof *table);
    free(table);
    return 1;
}

int slam_model_plan(slam_model *m, int B, int T, int mode) {
    slam_ops *ops = m->ops;
    const int train = mode != SLAM_INFERENCE;
    if (B < 1 || T < 1 || (size_t)B * T > INT_MAX / 4)
        return fail("a batch of %d rows of %d tokens: expected both positive and fewer than 2^29 tokens", B, T);
    if (B <= m->B && T == m->T && (mode == m->mode || !train)) return 1;
    ops->release(ops, m->arena);
    m->B = m->T = m->held = 0;
    m->a = activations_of(&m->config, ops->bytes_per_act, B, T, mode);
    m->arena = (char *)ops->alloc(ops, m->a.total);
    if (!m->arena || !rope_table(m, T)) return 0;
    if (train && !m->gradients && !(m->gradients = (float *)ops->alloc(ops, m->w.total * sizeof(float)))) return 0;
    m->B = B;
    m->T = T;
    m->mode = mode;
    return 1;
}

/* ---- the passes ---- */

/* A batch that no pass can run out of bounds on, copied to the device. */
static int batch_upload(slam_model *m, const slam_batch *b, slam_window *window) {
    const slam_config *c = &m->config;
    const size_t N = (size_t)b->B * b->T;
    m->held = 0;
    if (!m->arena || b->B < 1 || b->T < 1 || N > (size_t)m->B * m->T || b->T > m->T)
        return fail("a batch of %d rows of %d tokens, expected no more tokens than the planned %d rows of %d have", b->B, b->T,
                    m->B, m->T);
    for (size_t i = 0; i < N; i++) {
        const int t = (int)(i % b->T), start = b->doc_start[i], first = b->hole ? b->hole[2 * i] : 0,
                  end = b->hole ? b->hole[2 * i + 1] : 0;
        if (b->tokens[i] < 0 || b->tokens[i] >= c->V)
            return fail("token %d at position %zu of the batch, expected 0 to %d", b->tokens[i], i, c->V - 1);
        if (b->targets && b->targets[i] >= c->V)
            return fail("target %d at position %zu of the batch, expected below %d", b->targets[i], i, c->V);
        if (start < 0 || start > t) return fail("doc_start %d at column %d, expected 0 to %d", start, t, t);
        if (end != first && (first < start || end < first || end > t))
            return fail("hole [%d,%d) at column %d, expected within [%d,%d)", first, end, t, start, t);
    }
    m->ops->upload(m->ops, int_at(m, m->a.tokens), b->tokens, N * sizeof(int));
    if (b->targets) m->ops->upload(m->ops, int_at(m, m->a.targets), b->targets, N * sizeof(int));
    m->ops->upload(m->ops, int_at(m, m->a.doc_start), b->doc_start, N * sizeof(int));
    if (b->hole) m->ops->upload(m->ops, int_at(m, m->a.hole), b->hole, 2 * N * sizeof(int));
    const slam_window w = {b->B,
                           b->T,
                           c->NH,
                           c->KVH,
                           c->HS,
                           int_at(m, m->a.doc_start),
                           NULL,
                           b->hole ? int_at(m, m->a.hole) : NULL,
                           float_at(m, m->a.rope)};
    *window = w;
    return 1;
}

/* Keys and values of sequences that are continued. A pass over what they begin with fills it; a pass over one more token of each
   reads it and adds to it. */
typedef struct key_cache {
    char *at;           // (L,slots,room,2 KVH HS)
    size_t layer;       // bytes of a layer
    int room;           // tokens of a sequence
    const int *slots;   // (B), of the sequences that begin; NULL: one more token of each
    const int *lengths; // (B), tokens of a row that go into the cache; or that are there before this one
} key_cache;

static void attend(slam_model *m, int l, slam_act *out, slam_act *qkv, const slam_window *win, const key_cache *cache) {
    slam_ops *ops = m->ops;
    slam_act *kept = cache ? (slam_act *)(cache->at + l * cache->layer) : NULL;
    if (cache && !cache->slots) {
        ops->attention_decode(ops, out, kept, qkv, cache->lengths, win);
        return;
    }
    ops->attention_forward(ops, out, float_in(m, l, m->a.lse), qkv, win);
    if (cache) ops->attention_fill(ops, kept, qkv, cache->slots, cache->lengths, cache->room, win);
}

/* Embedding, L times (norm, attention, norm, MLP) around a residual stream, norm:
       x_0 = embed(tokens)      x_mid = x_l + O attention(QKV norm(x_l))      x_{l+1} = x_mid + D swiglu(GU norm(x_mid))
   What a sub-layer adds (delta) is added by the norm that follows it. Leaves norm(x_L) in head_in. cache NULL: N = B T. */
static void layers(slam_model *m, int N, const slam_window *win, const key_cache *cache) {
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const activations_layout *a = &m->a;
    const weights_layout *w = &m->w;
    const int C = c->C, F = c->F, O = c->NH * c->HS, W = O + 2 * c->KVH * c->HS;
    const float eps = (float)c->eps;
    slam_act *delta = act_at(m, a->delta), *stream = act_in(m, 0, a->residual);
    ops->embedding_forward(ops, stream, int_at(m, a->tokens), weight_at(m, w->embed), N, C);
    for (int l = 0; l < c->L; l++) {
        slam_act *residual = act_in(m, l, a->residual), *residual_mid = act_in(m, l, a->residual_mid);
        slam_act *attention_in = cheap_in(m, l, a->attention_in), *qkv = act_in(m, l, a->qkv),
                 *attention = act_in(m, l, a->attention);
        slam_act *mlp_in = cheap_in(m, l, a->mlp_in), *gate_up = act_in(m, l, a->gate_up), *swiglu = cheap_in(m, l, a->swiglu);
        ops->rmsnorm_forward(ops, residual, attention_in, float_in(m, l, a->attention_r), stream, l ? delta : NULL,
                             weight_at(m, vector_of(m, l, w->attention_norm)), eps, N, C);
        ops->matmul_forward(ops, qkv, attention_in, weight_at(m, matrix_of(m, l, w->qkv)),
                            c->qkv_bias ? weight_at(m, vector_of(m, l, w->bias)) : NULL, N, C, W);
        attend(m, l, attention, qkv, win, cache);
        ops->matmul_forward(ops, delta, attention, weight_at(m, matrix_of(m, l, w->out)), NULL, N, O, C);
        ops->rmsnorm_forward(ops, residual_mid, mlp_in, float_in(m, l, a->mlp_r), residual, delta,
                             weight_at(m, vector_of(m, l, w->mlp_norm)), eps, N, C);
        ops->matmul_forward(ops, gate_up, mlp_in, weight_at(m, matrix_of(m, l, w->gate_up)), NULL, N, C, 2 * F);
        ops->swiglu_forward(ops, swiglu, gate_up, N, F);
        ops->matmul_forward(ops, delta, swiglu, weight_at(m, matrix_of(m, l, w->down)), NULL, N, F, C);
        stream = residual_mid;
    }
    ops->rmsnorm_forward(ops, act_at(m, a->residual_end), act_at(m, a->head_in), float_at(m, a->head_r), stream, delta,
                         weight_at(m, w->norm), eps, N, C);
}

static void forward(slam_model *m, const slam_window *win) { layers(m, win->B * win->T, win, NULL); }

static slam_act *act_row(const slam_model *m, slam_act *x, int row, int width) {
    return (slam_act *)((char *)x + (size_t)row * width * m->ops->bytes_per_act);
}

/* Logits and losses, a run of rows at a time; with scale not 0 the gradients of the head, and of head_in into dnormed. weights (N)
   of the losses, NULL: 1. */
static void head(slam_model *m, int N, float scale, const float *weights) {
    slam_ops *ops = m->ops;
    const int C = m->config.C, P = padded_vocabulary(&m->config);
    slam_act *logits = act_at(m, m->a.logits), *w = weight_at(m, m->w.head);
    for (int i = 0; i < N; i += m->a.head_rows) {
        const int n = N - i < m->a.head_rows ? N - i : m->a.head_rows;
        slam_act *x = act_row(m, act_at(m, m->a.head_in), i, C);
        ops->matmul_forward(ops, logits, x, w, NULL, n, C, P);
        ops->crossentropy(ops, float_at(m, m->a.losses) + i, logits, int_at(m, m->a.targets) + i, weights ? weights + i : NULL,
                          scale, n, m->config.V, P);
        if (scale == 0) continue;
        ops->matmul_backward_input(ops, act_row(m, act_at(m, m->a.dnormed), i, C), logits, w, n, C, P);
        ops->matmul_backward_weight(ops, m->gradients + m->w.head, NULL, logits, x, n, C, P);
    }
}

/* One layer, from its end to its beginning. dresidual comes in as the gradient of the stream after the layer and leaves as that
   of the stream before it: each sub-layer's gradient is added by the backward pass of its norm. */
static void backward_layer(slam_model *m, int l, const slam_window *win) {
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const activations_layout *a = &m->a;
    const weights_layout *w = &m->w;
    const int N = win->B * win->T, C = c->C, F = c->F, O = c->NH * c->HS, W = O + 2 * c->KVH * c->HS,
              again = m->mode == SLAM_TRAIN_RECOMPUTE;
    const float eps = (float)c->eps;
    float *g = m->gradients, *attention_r = float_in(m, l, a->attention_r), *mlp_r = float_in(m, l, a->mlp_r);
    slam_act *dresidual = act_at(m, a->dresidual), *dnormed = act_at(m, a->dnormed), *dwide = act_at(m, a->dwide),
             *dqkv = act_at(m, a->dqkv);
    slam_act *residual = act_in(m, l, a->residual), *attention_in = cheap_in(m, l, a->attention_in), *qkv = act_in(m, l, a->qkv),
             *attention = act_in(m, l, a->attention);
    slam_act *residual_mid = act_in(m, l, a->residual_mid), *mlp_in = cheap_in(m, l, a->mlp_in),
             *gate_up = act_in(m, l, a->gate_up), *swiglu = cheap_in(m, l, a->swiglu);
    const size_t w_qkv = matrix_of(m, l, w->qkv), w_out = matrix_of(m, l, w->out), w_gate_up = matrix_of(m, l, w->gate_up),
                 w_down = matrix_of(m, l, w->down);
    const size_t attention_norm = vector_of(m, l, w->attention_norm), mlp_norm = vector_of(m, l, w->mlp_norm);

    if (again) ops->swiglu_forward(ops, swiglu, gate_up, N, F);
    ops->matmul_backward_weight(ops, g + w_down, NULL, dresidual, swiglu, N, F, C);
    ops->matmul_backward_input(ops, dwide, dresidual, weight_at(m, w_down), N, F, C);
    ops->swiglu_backward(ops, gate_up, dwide, gate_up, N, F);
    if (again) ops->rmsnorm_forward(ops, residual_mid, mlp_in, mlp_r, residual_mid, NULL, weight_at(m, mlp_norm), eps, N, C);
    ops->matmul_backward_weight(ops, g + w_gate_up, NULL, gate_up, mlp_in, N, C, 2 * F);
    ops->matmul_backward_input(ops, dnormed, gate_up, weight_at(m, w_gate_up), N, C, 2 * F);
    ops->rmsnorm_backward(ops, dresidual, g + mlp_norm, dnormed, residual_mid, weight_at(m, mlp_norm), mlp_r, N, C);

    ops->matmul_backward_weight(ops, g + w_out, NULL, dresidual, attention, N, O, C);
    ops->matmul_backward_input(ops, dwide, dresidual, weight_at(m, w_out), N, O, C);
    ops->attention_backward(ops, dqkv, float_at(m, a->D), dwide, attention, float_in(m, l, a->lse), qkv, win);
    if (again)
        ops->rmsnorm_forward(ops, residual, attention_in, attention_r, residual, NULL, weight_at(m, attention_norm), eps, N, C);
    ops->matmul_backward_weight(ops, g + w_qkv, c->qkv_bias ? g + vector_of(m, l, w->bias) : NULL, dqkv, attention_in, N, C, W);
    ops->matmul_backward_input(ops, dnormed, dqkv, weight_at(m, w_qkv), N, C, W);
    ops->rmsnorm_backward(ops, dresidual, g + attention_norm, dnormed, residual, weight_at(m, attention_norm), attention_r, N, C);
}

/* From the gradient that the head has left in dnormed down to the embedding. */
static void backward(slam_model *m, const slam_window *win, slam_after_layer *after_layer, void *context) {
    slam_ops *ops = m->ops;
    const activations_layout *a = &m->a;
    const int N = win->B * win->T, C = m->config.C;
    ops->zero(ops, act_at(m, a->dresidual), (size_t)N * C * ops->bytes_per_act);
    ops->rmsnorm_backward(ops, act_at(m, a->dresidual), m->gradients + m->w.norm, act_at(m, a->dnormed), act_at(m, a->residual_end),
                          weight_at(m, m->w.norm), float_at(m, a->head_r), N, C);
    if (after_layer) after_layer(context, m->config.L);
    for (int l = m->config.L - 1; l >= 0; l--) {
        backward_layer(m, l, win);
        if (after_layer) after_layer(context, l);
    }
    ops->embedding_backward(ops, m->gradients + m->w.embed, act_at(m, a->dresidual), int_at(m, a->tokens), N, C, m->config.V);
    if (after_layer) after_layer(context, -1);
}

int slam_model_backward(slam_model *m, const slam_batch *batch, float scale, slam_after_layer *after_layer, void *context) {
    const int N = batch->B * batch->T;
    slam_window win;
    if (!m->gradients || m->mode == SLAM_INFERENCE) return fail("the model was not planned for training");
    if (!batch->targets) return fail("a batch without targets cannot be trained on");
    if (!batch_upload(m, batch, &win)) return 0;
    forward(m, &win);
    head(m, N, scale, NULL);
    m->ops->sum(m->ops, m->stats, float_at(m, m->a.losses), N);
    backward(m, &win, after_layer, context);
    return 1;
}

int slam_model_losses(slam_model *m, const slam_batch *batch, float *losses) {
    const int N = batch->B * batch->T;
    slam_window win;
    if (!batch->targets) return fail("a batch without targets has no loss");
    if (!batch_upload(m, batch, &win)) return 0;
    forward(m, &win);
    head(m, N, 0, NULL);
    m->ops->download(m->ops, losses, float_at(m, m->a.losses), N * sizeof(float));
    m->held = m->mode != SLAM_INFERENCE;
    m->pass = win;
    return m->ops->finish(m->ops);
}

/* The logits are made once more, into gradients this time: for a vocabulary of units that is next to nothing. */
int slam_model_backward_from(slam_model *m, const float *weights, double loss, slam_after_layer *after_layer, void *context) {
    slam_ops *ops = m->ops;
    const slam_window win = m->pass;
    const int N = win.B * win.T;
    const float sum = (float)loss;
    if (!m->held || !m->gradients)
        return fail("no forward pass to go back from: slam_model_losses, planned for training, comes first");
    m->held = 0; // the backward pass writes over what it needs no more
    ops->upload(ops, float_at(m, m->a.weights), weights, (size_t)N * sizeof *weights);
    head(m, N, 1, float_at(m, m->a.weights));
    ops->upload(ops, float_at(m, m->a.losses), &sum, sizeof sum);
    ops->sum(ops, m->stats, float_at(m, m->a.losses), 1);
    backward(m, &win, after_layer, context);
    return 1;
}

int slam_model_logits(slam_model *m, const slam_batch *batch, float *logits) {
    slam_ops *ops = m->ops;
    const int N = batch->B * batch->T, C = m->config.C, V = m->config.V, P = padded_vocabulary(&m->config);
    slam_window win;
    if (!batch_upload(m, batch, &win)) return 0;
    float *rows = (float *)ops->alloc(ops, (size_t)m->a.head_rows * P * sizeof(float)),
          *host = (float *)mem_new((size_t)m->a.head_rows * P, sizeof *host);
    int ok = rows && host;
    if (ok) forward(m, &win);
    for (int i = 0; ok && i < N; i += m->a.head_rows) {
        const int n = N - i < m->a.head_rows ? N - i : m->a.head_rows;
        ops->matmul_forward(ops, act_at(m, m->a.logits), act_row(m, act_at(m, m->a.head_in), i, C), weight_at(m, m->w.head), NULL,
                            n, C, P);
        ops->to_float(ops, rows, act_at(m, m->a.logits), (size_t)n * P);
        ops->download(ops, host, rows, (size_t)n * P * sizeof(float));
        for (int k = 0; k < n; k++) memcpy(logits + (size_t)(i + k) * V, host + (size_t)k * P, V * sizeof(float));
    }
    ok = ok && ops->finish(ops);
    ops->release(ops, rows);
    free(host);
    return ok;
}

/* Windows of the config's T; each but the first repeats half a window as context and scores what follows it. */
double slam_model_nll(slam_model *m, const int *tokens, int n) {
    if (n < 2) {
        fail("a sequence of %d tokens has nothing to score, expected 2 or more", n);
        return -1;
    }
    const int T = n < m->config.T ? n : m->config.T, stride = T > 1 ? T - T / 2 : 1;
    int *ints = (int *)mem_new(3 * (size_t)T, sizeof *ints);
    float *losses = ints ? (float *)mem_new(T, sizeof *losses) : NULL;
    double sum = 0;
    int ok = losses && slam_model_plan(m, 1, T, m->mode);
    for (int start = 0, scored = 1; ok && scored < n; start += stride) {
        slam_batch b = {1, n - start < T ? n - start : T, ints, ints + T, ints + 2 * T, NULL};
        for (int t = 0; t < b.T; t++) {
            b.tokens[t] = tokens[start + t];
            b.targets[t] = start + t + 1 < n && start + t + 1 >= scored ? tokens[start + t + 1] : -1;
            b.doc_start[t] = 0;
        }
        ok = slam_model_losses(m, &b, losses);
        for (int t = 0; ok && t < b.T; t++) sum += losses[t];
        scored = start + b.T + 1 < n ? start + b.T + 1 : n;
    }
    free(ints);
    free(losses);
    return ok ? sum / (n - 1) : -1;
}

/* ---- decoding ----
   The last token of a sequence is not in the cache yet: the step that predicts what follows computes it. So one kind of step makes
   all predictions, the first included, and a sequence of one token has nothing to fill the cache with. */

/* PREFILL_UNIT: rows of a pass that begins sequences are a multiple of it long. Queries are worked on in tiles of so many at most:
   whole tiles see as many keys, and add them up in the same order, whatever the longest row beside them. */
enum { PREFILL_TOKENS = 4096, PREFILL_UNIT = 64 };

struct slam_decoder {
    slam_model *model;
    int slots, T, room;   // room: T in whole units
    slam_act *cache;      // (L,slots,room,2 KVH HS)
    slam_act *logits;     // (slots,P)
    unsigned char *seen;  // (slots,V), 1: the token is in the sequence
    int *drawn;           // (slots)
    int *state;           // (3,slots): of a step last tokens, lengths without them, uniform numbers (as floats); of a beginning
                          // slots, lengths
    int *host;            // the same on the host
    int *last, *length;   // (slots), on the host: a sequence's last token, its length with it (0: there is none)
    int *batch;           // (2,planned tokens), on the host
    unsigned char *marks; // (V), on the host
};

/* Rows that are as long as the cache's, for one pass of a beginning or a step. */
static int decoder_rows(const slam_decoder *d) {
    const int rows = PREFILL_TOKENS / d->room, least = (d->slots - 1) / d->room + 1;
    return rows > least ? rows : least;
}

static int decoder_plan(slam_decoder *d) { return slam_model_plan(d->model, decoder_rows(d), d->room, SLAM_INFERENCE); }

slam_decoder *slam_decoder_new(slam_model *m, int slots, int T) {
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const size_t act = ops->bytes_per_act, K = 2 * (size_t)c->KVH * c->HS;
    if (slots < 1 || slots > 1 << 20 || T < 1 || T > 1 << 28 || (size_t)slots * T > INT_MAX / 4) {
        fail("a decoder of %d sequences of %d tokens, expected both positive and fewer than 2^29 tokens", slots, T);
        return NULL;
    }
    slam_decoder *d = (slam_decoder *)mem_new(1, sizeof *d);
    if (!d) return NULL;
    d->model = m;
    d->slots = slots;
    d->T = T;
    d->room = (T + PREFILL_UNIT - 1) / PREFILL_UNIT * PREFILL_UNIT;
    d->cache = (slam_act *)ops->alloc(ops, c->L * (size_t)slots * d->room * K * act);
    d->logits = (slam_act *)ops->alloc(ops, (size_t)slots * padded_vocabulary(c) * act);
    d->seen = (unsigned char *)ops->alloc(ops, (size_t)slots * c->V);
    d->drawn = (int *)ops->alloc(ops, slots * sizeof(int));
    d->state = (int *)ops->alloc(ops, 3 * (size_t)slots * sizeof(int));
    if (d->cache && d->logits && d->seen && d->drawn && d->state) {
        d->host = (int *)mem_new(3 * (size_t)slots, sizeof(int));
        d->last = (int *)mem_new(slots, sizeof(int));
        d->length = (int *)mem_new(slots, sizeof(int));
        d->batch = (int *)mem_new(2 * (size_t)decoder_rows(d) * d->room, sizeof(int));
        d->marks = (unsigned char *)mem_new(c->V, 1);
        if (d->host && d->last && d->length && d->batch && d->marks && decoder_plan(d)) return d;
    }
    slam_decoder_free(d);
    return NULL;
}

void slam_decoder_free(slam_decoder *d) {
    if (!d) return;
    slam_ops *ops = d->model->ops;
    ops->release(ops, d->cache);
    ops->release(ops, d->logits);
    ops->release(ops, d->seen);
    ops->release(ops, d->drawn);
    ops->release(ops, d->state);
    free(d->host), free(d->last), free(d->length), free(d->batch), free(d->marks);
    free(d);
}

/* Rows of T tokens: what goes into the cache, then padding, each a document of its own. */
static int decoder_fill(slam_decoder *d, int n, int T, const int *slots, const int *const *tokens, const int *lengths) {
    slam_model *m = d->model;
    slam_ops *ops = m->ops;
    const size_t K = 2 * (size_t)m->config.KVH * m->config.HS;
    slam_batch b = {n, T, d->batch, NULL, d->batch + (size_t)n * T, NULL};
    slam_window win;
    for (int i = 0; i < n; i++) {
        d->host[i] = slots[i];
        d->host[d->slots + i] = lengths[i] - 1;
        for (int t = 0; t < T; t++) {
            b.tokens[(size_t)i * T + t] = t < lengths[i] - 1 ? tokens[i][t] : 0;
            b.doc_start[(size_t)i * T + t] = t < lengths[i] - 1 ? 0 : t;
        }
    }
    if (!batch_upload(m, &b, &win)) return 0;
    ops->upload(ops, d->state, d->host, 2 * (size_t)d->slots * sizeof(int));
    const key_cache cache = {(char *)d->cache, (size_t)d->slots * d->room * K * ops->bytes_per_act, d->room, d->state,
                             d->state + d->slots};
    layers(m, n * T, &win, &cache);
    return 1;
}

static int decoder_check(const slam_decoder *d, int slot, const int *tokens, int length) {
    const int V = d->model->config.V;
    if (slot < 0 || slot >= d->slots) return fail("slot %d of a decoder, expected 0 to %d", slot, d->slots - 1);
    if (length < 1 || length > d->T) return fail("a sequence begins with %d tokens, expected 1 to %d", length, d->T);
    for (int t = 0; t < length; t++)
        if (tokens[t] < 0 || tokens[t] >= V) return fail("token %d at position %d, expected 0 to %d", tokens[t], t, V - 1);
    return 1;
}

int slam_decoder_begin(slam_decoder *d, int n, const int *slots, const int *const *tokens, const int *lengths) {
    slam_ops *ops = d->model->ops;
    const size_t V = d->model->config.V, most = (size_t)decoder_rows(d) * d->room;
    for (int i = 0; i < n; i++)
        if (!decoder_check(d, slots[i], tokens[i], lengths[i])) return 0;
    if (!decoder_plan(d)) return 0;
    for (int i = 0; i < n; i++) {
        memset(d->marks, 0, V);
        for (int t = 0; t < lengths[i]; t++) d->marks[tokens[i][t]] = 1;
        ops->upload(ops, d->seen + slots[i] * V, d->marks, V);
        d->length[slots[i]] = lengths[i];
        d->last[slots[i]] = tokens[i][lengths[i] - 1];
    }
    for (int i = 0, rows; i < n; i += rows) { // as many rows as the plan has room for, the longest among them
        int T = 0;
        for (rows = 0; i + rows < n; rows++) {
            const int need = (lengths[i + rows] - 1 + PREFILL_UNIT - 1) / PREFILL_UNIT * PREFILL_UNIT, longer = need > T ? need : T;
            if (rows && (size_t)(rows + 1) * longer > most) break;
            T = longer;
        }
        if (T && !decoder_fill(d, rows, T, slots + i, tokens + i, lengths + i)) return 0;
    }
    return ops->finish(ops);
}

void slam_decoder_end(slam_decoder *d, int slot) {
    if (slot >= 0 && slot < d->slots) d->length[slot] = 0;
}

static int sampling_check(const slam_sampling *s) {
    if (!(s->temperature >= 0 && s->temperature < HUGE_VAL))
        return fail("a temperature of %g, expected a number from 0 (greedy)", s->temperature);
    if (s->top_k < 0) return fail("top-k of %d, expected 1 or more, or 0 for all", s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1)) return fail("top-p of %g, expected 0 to 1", s->top_p);
    if (!(s->repetition_penalty > 0 && s->repetition_penalty < HUGE_VAL))
        return fail("a repetition penalty of %g, expected a positive number (1: none)", s->repetition_penalty);
    return 1;
}

int slam_decoder_step(slam_decoder *d, const slam_sampling *sampling, const float *uniform, int *tokens) {
    slam_model *m = d->model;
    slam_ops *ops = m->ops;
    const slam_config *c = &m->config;
    const size_t K = 2 * (size_t)c->KVH * c->HS;
    const int P = padded_vocabulary(c);
    int n = 0; // up to the last slot with a sequence
    if (!sampling_check(sampling) || !decoder_plan(d)) return 0;
    for (int s = 0; s < d->slots; s++) {
        if (d->length[s] > d->T) return fail("the sequence in slot %d has %d tokens: there is no room for more", s, d->length[s]);
        d->host[s] = d->length[s] ? d->last[s] : 0;
        d->host[d->slots + s] = d->length[s] ? d->length[s] - 1 : 0;
        if (uniform) memcpy(d->host + 2 * (size_t)d->slots + s, uniform + s, sizeof(float));
        if (d->length[s]) n = s + 1;
    }
    ops->upload(ops, d->state, d->host, 3 * (size_t)d->slots * sizeof(int));
    ops->upload(ops, int_at(m, m->a.tokens), d->host, d->slots * sizeof(int));
    const slam_window win = {n, d->room, c->NH, c->KVH, c->HS, NULL, NULL, NULL, float_at(m, m->a.rope)};
    const key_cache cache = {(char *)d->cache, (size_t)d->slots * d->room * K * ops->bytes_per_act, d->room, NULL,
                             d->state + d->slots};
    if (n) {
        layers(m, n, &win, &cache);
        ops->matmul_forward(ops, d->logits, act_at(m, m->a.head_in), weight_at(m, m->w.head), NULL, n, c->C, P);
        ops->sample(ops, d->drawn, d->logits, sampling->repetition_penalty == 1 ? NULL : d->seen,
                    (const float *)(d->state + 2 * (size_t)d->slots), sampling, n, c->V, P);
        ops->download(ops, tokens, d->drawn, n * sizeof(int));
    }
    if (!ops->finish(ops)) return 0;
    for (int s = 0; s < d->slots; s++) {
        if (!d->length[s]) tokens[s] = -1;
        else d->last[s] = tokens[s], d->length[s]++;
    }
    return 1;
}

int slam_decoder_logits(slam_decoder *d, float *logits) {
    slam_ops *ops = d->model->ops;
    const int V = d->model->config.V, P = padded_vocabulary(&d->model->config);
    const size_t n = (size_t)d->slots * P;
    float *wide = (float *)ops->alloc(ops, n * sizeof(float)), *host = (float *)mem_new(n, sizeof *host);
    int ok = wide && host;
    if (ok) {
        ops->to_float(ops, wide, d->logits, n);
        ops->download(ops, host, wide, n * sizeof(float));
        for (int s = 0; s < d->slots; s++) memcpy(logits + (size_t)s * V, host + (size_t)s * P, V * sizeof(float));
        ok = ops->finish(ops);
    }
    ops->release(ops, wide);
    free(host);
    return ok;
}

/* ==========================================================================================
   8. OPTIMISER          optimiser, schedules, gradient clipping, ZeRO-1
   AdamW over the model's one array of weights; learning rates as Hugging Face's schedules give them.
   Several ranks add up their gradients in buckets, each updates its part of every bucket.
   may use: 1 base, 3 ops, 6 ranks, 7 model
   ========================================================================================== */

/* get_cosine_with_min_lr_schedule_with_warmup, get_inverse_sqrt_schedule (its time scale is the warm-up), ..., of Transformers.
   Step 0 of a warm-up has learning rate 0, there and here. */
double slam_schedule(int kind, long step, long steps, long warmup, double lr, double lr_min) {
    if (step < warmup) return lr * (double)step / (double)(warmup > 1 ? warmup : 1);
    const double decay = (double)(steps - warmup > 1 ? steps - warmup : 1), progress = (double)(step - warmup) / decay;
    const double rest = (double)(steps - step) / decay, floor = lr > 0 ? lr_min / lr : 0;
    if (kind == SLAM_COSINE) {
        const double factor = 0.5 * (1 + cos(3.14159265358979323846 * progress)) * (1 - floor) + floor;
        return lr * (factor > 0 ? factor : 0);
    }
    if (kind == SLAM_LINEAR) return lr * (rest > 0 ? rest : 0);
    if (kind == SLAM_INVERSE_SQRT) {
        const double scale = warmup > 0 ? (double)warmup : 10000;
        return lr / sqrt((double)(step - warmup + scale) / scale);
    }
    return lr;
}

/* ---- buckets ----
   Gradients are added up over the ranks a bucket at a time, in the order in which the backward pass completes them: the head where it is
   not the embedding, the layers from the last to the first, the embedding, then all vectors. A bucket is a run of neighbours: as many
   layers as make a message worth sending, or a piece of something large. Alone there is one bucket, which is everything. */

enum { BUCKET_LEAST = 1 << 18, BUCKET_MOST = 1 << 24 }; // numbers: 1 and 64 MB, not measured on GPUs yet; PyTorch's DDP takes 25 MB

typedef struct bucket {
    size_t first, n;        // in the array of weights
    int after;              // the layer whose gradients complete it, as after_layer counts
    size_t mine, count, at; // of these this rank updates `count` from `mine` on; their moments stand at `at`
} bucket;

struct slam_optimiser {
    slam_model *model;
    slam_adamw settings;
    slam_ranks *ranks; // NULL: alone
    int apart;         // 1: each rank keeps the moments of its parts alone
    bucket *all;
    size_t buckets, capacity;
    size_t reduced; // of the step under way: so many buckets are on their way
    int failed;     // one of them failed
    size_t n;       // numbers of all parts, or of everything
    float *m, *v;   // (n), the moments
    float *master;  // (n), the parts of the float weights; NULL: the model has them all
    long updates;
};

static int bucket_add(slam_optimiser *o, size_t first, size_t n, int after) {
    const size_t pieces = (n + BUCKET_MOST - 1) / BUCKET_MOST, each = ((n + pieces - 1) / pieces + 255) / 256 * 256;
    for (size_t at = 0; at < n; at += each) {
        if (!mem_grow((void **)&o->all, &o->capacity, o->buckets + 1, sizeof *o->all)) return 0;
        bucket *b = &o->all[o->buckets++];
        memset(b, 0, sizeof *b);
        b->first = first + at;
        b->n = n - at < each ? n - at : each;
        b->after = after;
    }
    return 1;
}

static int buckets_plan(slam_optimiser *o) {
    const weights_layout *w = &o->model->w;
    const int L = o->model->config.L;
    int ok = 1;
    if (!o->ranks) {
        ok = mem_grow((void **)&o->all, &o->capacity, 1, sizeof *o->all);
        if (ok) memset(o->all, 0, sizeof *o->all), o->all->n = w->total, o->all->after = -1, o->buckets = 1;
    } else {
        if (w->head != w->embed) ok = bucket_add(o, w->head, w->layer - w->head, L);
        for (int end = L, l = L - 1; ok && l >= 0; l--) {
            const size_t n = (size_t)(end - l) * w->layer_size;
            if (l && n < BUCKET_LEAST) continue;
            ok = bucket_add(o, w->layer + (size_t)l * w->layer_size, n, l);
            end = l;
        }
        ok = ok && bucket_add(o, w->embed, (w->head != w->embed ? w->head : w->layer) - w->embed, -1) &&
             bucket_add(o, w->matrices, w->total - w->matrices, -1);
    }
    for (size_t i = 0; ok && i < o->buckets; i++) {
        bucket *b = &o->all[i];
        size_t first;
        part_of(o->ranks, slam_ranks_rank(o->ranks), b->n, &first, &b->count);
        b->mine = b->first + first;
        b->at = o->apart ? o->n : b->mine;
        o->n += o->apart ? b->count : b->n;
    }
    return ok;
}

/* ---- the optimiser ---- */

void slam_optimiser_free(slam_optimiser *o) {
    if (!o) return;
    slam_ops *ops = o->model->ops;
    ops->release(ops, o->m);
    ops->release(ops, o->v);
    ops->release(ops, o->master);
    free(o->all);
    free(o);
}

/* Of the float weights this rank keeps its parts; the model's go. */
static int divide_master(slam_optimiser *o) {
    slam_model *m = o->model;
    slam_ops *ops = m->ops;
    size_t most = 0;
    for (size_t i = 0; i < o->buckets; i++) most = o->all[i].count > most ? o->all[i].count : most;
    float *host = (float *)mem_new(most, sizeof *host);
    o->master = host ? (float *)ops->alloc(ops, o->n * sizeof *o->master) : NULL;
    for (size_t i = 0; o->master && i < o->buckets; i++) {
        const bucket *b = &o->all[i];
        ops->download(ops, host, m->master + b->mine, b->count * sizeof *host);
        ops->upload(ops, o->master + b->at, host, b->count * sizeof *host);
    }
    free(host);
    if (!o->master || !ops->finish(ops)) return 0;
    ops->release(ops, m->master);
    m->master = NULL;
    return 1;
}

slam_optimiser *slam_optimiser_new(slam_model *model, const slam_adamw *settings) {
    slam_ops *ops = model->ops;
    slam_optimiser *o = (slam_optimiser *)mem_new(1, sizeof *o);
    if (!o) return NULL;
    o->model = model;
    o->settings = *settings;
    int ok = model->master || fail("the weights of this model are in parts: its first optimiser is the only one");
    ok = ok && (!ops->ranks || ranks_connect(ops->ranks));
    o->ranks = ops->ranks && ops->ranks->transport != TRANSPORT_NONE ? ops->ranks : NULL;
    o->apart = o->ranks && o->ranks->zero;
    ok = ok && buckets_plan(o) && (!o->apart || (void *)model->master == (void *)model->weights || divide_master(o));
    ok = ok && (o->m = (float *)ops->alloc(ops, o->n * sizeof(float))) != NULL &&
         (o->v = (float *)ops->alloc(ops, o->n * sizeof(float))) != NULL;
    if (slam_ranks_agree(o->ranks, ok)) return o;
    slam_optimiser_free(o);
    return NULL;
}

long slam_optimiser_updates(const slam_optimiser *o) { return o->updates; }

void slam_optimiser_reset(slam_optimiser *o) {
    slam_ops *ops = o->model->ops;
    ops->zero(ops, o->m, o->n * sizeof(float));
    ops->zero(ops, o->v, o->n * sizeof(float));
    o->updates = 0;
}

/* ---- a step ---- */

static void reduce_next(slam_optimiser *o) {
    const bucket *b = &o->all[o->reduced++];
    if (!exchange_reduce_scatter(o->ranks, o->model->gradients + b->first, b->n)) o->failed = 1;
}

void slam_optimiser_after_layer(void *optimiser, int l) {
    slam_optimiser *o = (slam_optimiser *)optimiser;
    if (!o->ranks) return;
    exchange_progress(o->ranks);
    while (o->reduced < o->buckets && o->all[o->reduced].after >= l) reduce_next(o);
}

/* Weights first..first+n-1, whose moments stand at `at`. Decay concerns the matrices alone, as in Hugging Face's Trainer: norms and
   biases are not drawn to 0. */
static void adamw_range(slam_optimiser *o, slam_adamw h, size_t first, size_t n, size_t at) {
    slam_model *m = o->model;
    const size_t end = first + n, border = m->w.matrices < first ? first : m->w.matrices < end ? m->w.matrices : end;
    for (int vectors = 0; vectors < 2; vectors++) {
        const size_t from = vectors ? border : first, to = vectors ? end : border, k = at + from - first;
        if (vectors) h.weight_decay = 0;
        if (from < to)
            m->ops->adamw(m->ops, weight_at(m, from), o->master ? o->master + k : m->master + from, o->m + k, o->v + k,
                          m->gradients + from, m->stats, &h, to - from);
    }
}

int slam_optimiser_begin(slam_optimiser *o, double lr) {
    slam_model *m = o->model;
    slam_ops *ops = m->ops;
    int ok = 1;
    if (!m->gradients) return fail("the model was not planned for training");
    slam_adamw h = o->settings;
    h.lr = lr;
    h.step = o->updates + 1;
    while (o->reduced < o->buckets) reduce_next(o);
    exchange_wait(o->ranks);
    if (o->failed) return 0;
    o->reduced = 0;
    for (size_t i = 0; i < o->buckets; i++)
        if (o->all[i].count) ops->sum_squares(ops, m->stats + 1, m->gradients + o->all[i].mine, o->all[i].count);
    ok = exchange_all_reduce(o->ranks, m->stats, 2);
    for (size_t i = 0; ok && !o->apart && i < o->buckets; i++) {
        const bucket *b = &o->all[i];
        ok = exchange_all_gather(o->ranks, m->gradients + b->first, m->gradients + b->mine, b->n, sizeof(float));
    }
    exchange_wait(o->ranks);
    for (size_t i = 0; ok && i < o->buckets; i++) {
        const bucket *b = &o->all[i];
        if (!o->apart) adamw_range(o, h, b->first, b->n, b->first);
        else {
            adamw_range(o, h, b->mine, b->count, b->at);
            ok = exchange_all_gather(o->ranks, weight_at(m, b->first), weight_at(m, b->mine), b->n, (size_t)ops->bytes_per_act);
        }
    }
    exchange_wait(o->ranks);
    if (ok) ops->zero(ops, m->gradients, m->w.total * sizeof(float));
    return ok;
}

int slam_optimiser_end(slam_optimiser *o, slam_step *step) {
    slam_model *m = o->model;
    slam_ops *ops = m->ops;
    double stats[2];
    if (!exchange_finish(o->ranks)) return 0;
    ops->download(ops, stats, m->stats, sizeof stats);
    ops->zero(ops, m->stats, sizeof stats);
    step->loss_sum = stats[0];
    step->grad_norm = sqrt(stats[1]);
    step->skipped = !isfinite(stats[0]) || !isfinite(stats[1]);
    if (!step->skipped) o->updates++;
    return ops->finish(ops);
}

int slam_optimiser_step(slam_optimiser *o, double lr, slam_step *step) {
    return slam_optimiser_begin(o, lr) && slam_optimiser_end(o, step);
}

/* ---- the state, whole, on the host ---- */

/* host (w.total) on rank 0, NULL on the others, which all take part: o->m, o->v or o->master. */
static int state_download(slam_optimiser *o, const float *from, float *host) {
    slam_model *m = o->model;
    slam_ops *ops = m->ops;
    size_t most = 0;
    if (!o->apart) {
        if (host) ops->download(ops, host, from, m->w.total * sizeof *host);
        return ops->finish(ops);
    }
    for (size_t i = 0; i < o->buckets; i++) most = o->all[i].n > most ? o->all[i].n : most;
    float *whole = (float *)ops->alloc(ops, most * sizeof *whole);
    int ok = slam_ranks_agree(o->ranks, whole != NULL);
    for (size_t i = 0; ok && i < o->buckets; i++) {
        const bucket *b = &o->all[i];
        ok = exchange_all_gather(o->ranks, whole, from + b->at, b->n, sizeof *whole);
        exchange_wait(o->ranks);
        ok = ok && exchange_finish(o->ranks);
        if (ok && host) ops->download(ops, host + b->first, whole, b->n * sizeof *host);
    }
    ops->release(ops, whole);
    return ok && ops->finish(ops);
}

/* The float weights, likewise. */
static int master_download(slam_optimiser *o, float *host) {
    if (o->master) return state_download(o, o->master, host);
    return !host || weights_download(o->model, host);
}

/* Numbers first..first+n-1 of the whole, on the host, into `to` (o->m or o->v), as far as this rank keeps them. */
static void state_upload(slam_optimiser *o, float *to, const float *host, size_t first, size_t n) {
    slam_ops *ops = o->model->ops;
    for (size_t i = 0; i < o->buckets; i++) {
        const bucket *b = &o->all[i];
        const size_t own = o->apart ? b->mine : b->first, end = own + (o->apart ? b->count : b->n), at = o->apart ? b->at : own;
        const size_t from = own > first ? own : first, until = end < first + n ? end : first + n;
        if (from < until) ops->upload(ops, to + at + (from - own), host + (from - first), (until - from) * sizeof *host);
    }
}

/* ==========================================================================================
   9. DATA               documents, pieces, packing, shuffling, mixing
   Token shards and unit files become documents, documents longer than the context are cut into
   pieces, an epoch draws the pieces in an order of its own, and rows of whole pieces are packed
   from it. All of it hangs on the seed alone: any row of any epoch can be found again.
   may use: 1 base, 2 formats
   ========================================================================================== */
#include <glob.h>

/* ---- files and sources ---- */

enum { LONGEST_CONTEXT = 1 << 24 }; // so that sums of a few lengths stay within an int

/* A file's tokens: a mapped shard, or the units of a JSONL file kept as a shard would hold them. */
typedef struct token_file {
    char *path;
    const uint16_t *tokens;
    size_t n;
    shard mapped;
    int is_mapped;
    uint16_t *kept;
    int largest; // of a JSONL file: its largest unit, and the line where it stands first
    size_t largest_line;
} token_file;

/* The files of all sources; training and held-out part share them, and the last to go closes them. */
typedef struct token_files {
    token_file *at;
    size_t n, capacity;
    int users;
} token_files;

/* Tokens first .. first + n - 1 of a file: a whole document, or the piece of one that is a training sequence. Twelve bytes,
   because 60,000 hours of utterances are 14 million of them. */
typedef struct piece {
    uint32_t file, first, n;
} piece;

typedef struct data_source {
    char *name;
    double weight;
    size_t first_file, end_file, first_piece, end_piece, documents;
} data_source;

struct slam_data {
    int context, V, prepared;
    int said_V; // what the shards' headers say, and which file said it first
    uint32_t said_fingerprint;
    size_t said_V_file, said_fingerprint_file;
    token_files *files;
    data_source *source;
    size_t sources, sources_capacity;
    piece *pieces;
    size_t n, capacity;
};

static slam_data *data_new(int context, token_files *files) {
    slam_data *d = (slam_data *)mem_new(1, sizeof *d);
    if (!d) return NULL;
    d->context = context;
    d->files = files ? files : (token_files *)mem_new(1, sizeof *d->files);
    if (!d->files) {
        free(d);
        return NULL;
    }
    d->files->users++;
    return d;
}

slam_data *slam_data_new(int context) {
    if (context < 2 || context > LONGEST_CONTEXT) {
        fail("context %d, expected at least 2 tokens, one to read and one to predict, and at most %d", context, LONGEST_CONTEXT);
        return NULL;
    }
    return data_new(context, NULL);
}

static void token_file_close(token_file *f) {
    if (f->is_mapped) shard_close(&f->mapped);
    free(f->kept);
    free(f->path);
}

void slam_data_free(slam_data *d) {
    if (!d) return;
    if (--d->files->users == 0) {
        for (size_t i = 0; i < d->files->n; i++) token_file_close(&d->files->at[i]);
        free(d->files->at);
        free(d->files);
    }
    for (size_t i = 0; i < d->sources; i++) free(d->source[i].name);
    free(d->source);
    free(d->pieces);
    free(d);
}

/* Appends one line's units as a document; a line without units says nothing and is passed over. */
static int keep_units(token_file *f, const units *u, size_t *capacity, size_t line) {
    if (u->n == 0) return 1;
    if (f->n + u->n + 2 > UINT32_MAX) return fail("%s: more than %u tokens; make it token shards", f->path, UINT32_MAX);
    if (!mem_grow((void **)&f->kept, capacity, f->n + u->n + 2, sizeof *f->kept)) return 0;
    f->kept[f->n++] = DOCUMENT_MARK;
    for (size_t i = 0; i < u->n; i++) {
        if (u->unit[i] < 0 || u->unit[i] > UINT16_MAX - UNIT_TOKEN)
            return fail("%s:%zu: unit %d, expected 0 to %d", f->path, line, u->unit[i], UINT16_MAX - UNIT_TOKEN);
        if (u->unit[i] > f->largest || f->largest_line == 0) {
            f->largest = u->unit[i];
            f->largest_line = line;
        }
        f->kept[f->n++] = (uint16_t)(u->unit[i] + UNIT_TOKEN);
    }
    f->kept[f->n++] = DOCUMENT_MARK;
    return 1;
}

static int read_units(token_file *f) {
    units_reader reader = SLAM_ZERO;
    units u = SLAM_ZERO;
    size_t capacity = 0;
    if (!units_open(&reader, f->path)) return 0;
    int got;
    while ((got = units_next(&reader, &u)) > 0)
        if (!keep_units(f, &u, &capacity, reader.line)) {
            got = -1;
            break;
        }
    units_free(&u);
    units_close(&reader);
    uint16_t *fitted = f->kept ? (uint16_t *)realloc(f->kept, f->n * sizeof *f->kept) : NULL;
    if (fitted) f->kept = fitted;
    f->tokens = f->kept;
    return got == 0;
}

/* Shards that are read together must speak of the same units. */
static int hear_shard(slam_data *d, size_t file) {
    const token_file *f = &d->files->at[file];
    const shard *s = &f->mapped;
    if (s->V && d->said_V && s->V != d->said_V)
        return fail("%s: a vocabulary of %d, but %s has one of %d", f->path, s->V, d->files->at[d->said_V_file].path, d->said_V);
    if (s->fingerprint && d->said_fingerprint && s->fingerprint != d->said_fingerprint)
        return fail("%s: units of quantiser %08x, but those of %s are of %08x", f->path, (unsigned)s->fingerprint,
                    d->files->at[d->said_fingerprint_file].path, (unsigned)d->said_fingerprint);
    if (s->V && !d->said_V) {
        d->said_V = s->V;
        d->said_V_file = file;
    }
    if (s->fingerprint && !d->said_fingerprint) {
        d->said_fingerprint = s->fingerprint;
        d->said_fingerprint_file = file;
    }
    return 1;
}

static int add_file(slam_data *d, const char *path) {
    token_files *files = d->files;
    if (path_is_folder(path)) return fail("%s: is a folder, expected a file or a pattern such as %s/*.bin", path, path);
    if (!path_ends(path, ".bin") && !path_ends(path, ".jsonl"))
        return fail("%s: expected token shards (.bin) or unit files (.jsonl)", path);
    if (files->n == UINT32_MAX) return fail("%s: more than %u files", path, UINT32_MAX);
    if (!mem_grow((void **)&files->at, &files->capacity, files->n + 1, sizeof *files->at)) return 0;
    token_file *f = &files->at[files->n];
    memset(f, 0, sizeof *f);
    f->path = text_copy(path);
    if (!f->path) return 0;
    files->n++;
    if (path_ends(path, ".jsonl")) return read_units(f);
    if (!shard_open(&f->mapped, path)) return 0;
    f->is_mapped = 1;
    f->tokens = f->mapped.tokens;
    f->n = f->mapped.n;
    return hear_shard(d, files->n - 1);
}

/* The files that a pattern means, in the order of their bytes. A file whose own name looks like a pattern is meant itself. */
static int match_files(const char *pattern, names *list) {
    if (path_is_file(pattern)) return names_add(list, pattern);
    glob_t found;
    int status = glob(pattern, GLOB_NOSORT, NULL, &found), ok = 1;
    if (status == GLOB_NOMATCH) return fail("%s: no such file", pattern);
    if (status != 0) return fail("%s: this pattern cannot be searched for", pattern);
    for (size_t i = 0; ok && i < found.gl_pathc; i++) ok = names_add(list, found.gl_pathv[i]);
    globfree(&found);
    if (ok && list->n > 1) qsort(list->at, list->n, sizeof *list->at, names_compare); // glob's own order hangs on the locale
    return ok;
}

int slam_data_add(slam_data *d, const char *pattern, double weight) {
    names list = SLAM_ZERO;
    if (d->prepared) return fail("%s: sources cannot be added to data that are prepared", pattern);
    if (!(weight > 0 && weight <= 1000)) return fail("%s: weight %g, expected more than 0 and at most 1000", pattern, weight);
    if (!mem_grow((void **)&d->source, &d->sources_capacity, d->sources + 1, sizeof *d->source)) return 0;
    data_source *s = &d->source[d->sources];
    memset(s, 0, sizeof *s);
    s->weight = weight;
    s->name = text_copy(pattern);
    if (!s->name) return 0;
    d->sources++;
    s->first_file = d->files->n;
    int ok = match_files(pattern, &list);
    for (size_t i = 0; ok && i < list.n; i++) ok = add_file(d, list.at[i]);
    s->end_file = d->files->n;
    names_free(&list);
    return ok;
}

int slam_data_vocabulary(const slam_data *d, int *V) {
    *V = d->said_V;
    return 1;
}

uint32_t slam_data_fingerprint(const slam_data *d) { return d->said_fingerprint; }
int slam_data_sources(const slam_data *d) { return (int)d->sources; }
const char *slam_data_source_name(const slam_data *d, int source) { return d->source[source].name; }

/* ---- tokens -> documents: the one time that every token is looked at ---- */

/* A stretch of a file, small enough that threads share a single big file evenly. */
enum { SCAN_BLOCK = 1 << 22 };
typedef struct scan {
    uint32_t file, first, n;
    uint32_t *marks; // where in the file the 1s stand
    size_t n_marks, capacity;
    int64_t bad; // the first token that no document may hold, or -1
    int failed;  // no memory
} scan;

/* Notes the 1s and the first token that is 0 or not below V. 64 tokens at a time are only asked whether there is anything to
   note among them (which compiles to vector instructions), since a 1 comes once in hundreds of tokens. */
static void scan_block(scan *s, const uint16_t *tokens, int V) {
    const uint16_t allowed = (uint16_t)((V < 65536 ? V : 65536) - 1); // tokens 1 .. V - 1 are those with t - 1 below this
    s->bad = -1;
    for (size_t i = s->first, end = (size_t)s->first + s->n; i < end;) {
        if (end - i >= 64) {
            int found = 0;
            for (int k = 0; k < 64; k++) found |= (tokens[i + k] == DOCUMENT_MARK) | ((uint16_t)(tokens[i + k] - 1) >= allowed);
            if (!found) {
                i += 64;
                continue;
            }
        }
        for (size_t stop = end - i < 64 ? end : i + 64; i < stop; i++) {
            if ((uint16_t)(tokens[i] - 1) >= allowed) {
                s->bad = (int64_t)i;
                return;
            }
            if (tokens[i] != DOCUMENT_MARK) continue;
            if (!mem_grow((void **)&s->marks, &s->capacity, s->n_marks + 1, sizeof *s->marks)) {
                s->failed = 1;
                return;
            }
            s->marks[s->n_marks++] = (uint32_t)i;
        }
    }
}

static int bad_token(const token_file *f, size_t at, int V) {
    if (f->kept) // a JSONL file: its structure is ours, so only the size of a unit can be wrong
        return fail("%s:%zu: unit %d, expected below %d (a vocabulary of %d tokens)", f->path, f->largest_line, f->largest,
                    V - UNIT_TOKEN, V);
    if (f->tokens[at] == 0) return fail("%s: token %zu (from 0) is 0, padding, which no document holds", f->path, at);
    return fail("%s: token %zu (from 0) is %d, expected below %d (the vocabulary)", f->path, at, f->tokens[at], V);
}

/* The documents of a file from its 1s, which open and close in turn. Mark by mark: `open` is where a document began, -1 outside
   of one; the next document must begin right behind. `1 1` is a recording without a unit and is passed over. */
static int find_documents(piece **documents, size_t *n, size_t *capacity, const scan *s, const scan *end, const token_file *f) {
    int64_t open = -1, next = 0;
    uint32_t file = s->file;
    for (; s < end && s->file == file; s++)
        for (size_t k = 0; k < s->n_marks; k++) {
            int64_t at = s->marks[k];
            if (open < 0 && at != next) break;
            if (open < 0) {
                open = at;
                continue;
            }
            if (at - open > 1) {
                if (!mem_grow((void **)documents, capacity, *n + 1, sizeof **documents)) return 0;
                piece *document = &(*documents)[(*n)++];
                document->file = file;
                document->first = (uint32_t)open;
                document->n = (uint32_t)(at - open + 1);
            }
            next = at + 1;
            open = -1;
        }
    if (open >= 0)
        return fail("%s: the document that token %lld (from 0) opens is not closed by another 1", f->path, (long long)open);
    if ((size_t)next < f->n)
        return fail("%s: token %lld (from 0) is %d, expected 1: it stands between documents", f->path, (long long)next,
                    f->tokens[next]);
    return 1;
}

static size_t list_scans(const slam_data *d, scan *list) {
    size_t n = 0;
    for (size_t i = 0; i < d->files->n; i++)
        for (size_t first = 0; first < d->files->at[i].n; first += SCAN_BLOCK, n++)
            if (list) {
                size_t left = d->files->at[i].n - first, block = SCAN_BLOCK;
                list[n].file = (uint32_t)i;
                list[n].first = (uint32_t)first;
                list[n].n = (uint32_t)(left < block ? left : block);
            }
    return n;
}

static void free_scans(scan *list, size_t n) {
    for (size_t i = 0; list && i < n; i++) free(list[i].marks);
    free(list);
}

/* Every block of every file, dealt to the threads. A sentence is the thread's own, so the first failure is told afterwards. */
static scan *scan_files(const slam_data *d, int V, size_t *n) {
    *n = list_scans(d, NULL);
    scan *list = (scan *)mem_new(*n, sizeof *list);
    if (!list) return NULL;
    list_scans(d, list);
    SLAM_PARALLEL_FOR
    for (long i = 0; i < (long)*n; i++) scan_block(&list[i], d->files->at[list[i].file].tokens, V);
    int ok = 1;
    for (size_t i = 0; ok && i < *n; i++) {
        if (list[i].failed) ok = fail("out of memory while the documents of %s were listed", d->files->at[list[i].file].path);
        if (list[i].bad >= 0) ok = bad_token(&d->files->at[list[i].file], (size_t)list[i].bad, V);
    }
    if (ok) return list;
    free_scans(list, *n);
    return NULL;
}

/* ---- documents -> pieces ---- */

/* Streams of random numbers, each named by the seed, a number of its own, and one of these or (shuffling an epoch's rows) the
   number of the look-ahead window. */
enum { STREAM_HELD_OUT = 0, STREAM_TURNS = 1, STREAM_ORDER = 2, STREAM_WINDOWS = 3 };

/* A document longer than the context is cut from its beginning; each piece is a sequence of its own. A last piece of one token
   has nothing to predict and is dropped. */
static int cut_document(slam_data *d, const piece *document) {
    uint32_t longest = (uint32_t)d->context;
    if (!mem_grow((void **)&d->pieces, &d->capacity, d->n + document->n / longest + 1, sizeof *d->pieces)) return 0;
    for (uint32_t done = 0; document->n - done >= 2;) {
        piece *p = &d->pieces[d->n++];
        p->file = document->file;
        p->first = document->first + done;
        p->n = document->n - done < longest ? document->n - done : longest;
        done += p->n;
    }
    return 1;
}

/* Cuts a source's documents, `held` of them chosen at random (selection sampling: Knuth, The Art of Computer Programming 2,
   algorithm 3.4.2 S) for the other part. */
static int cut_source(slam_data *d, slam_data *other, size_t source, const piece *documents, size_t n, uint64_t held,
                      uint64_t seed) {
    data_source *s = &d->source[source], *o = other ? &other->source[source] : NULL;
    uint64_t random = rng_stream(seed, source, STREAM_HELD_OUT);
    s->first_piece = d->n;
    s->documents = n - (size_t)held;
    if (o) {
        o->first_piece = other->n;
        o->documents = (size_t)held;
    }
    for (size_t i = 0; i < n; i++) {
        int chosen = held && rng_below(&random, n - i) < held;
        held -= (uint64_t)chosen;
        if (!cut_document(chosen ? other : d, &documents[i])) return 0;
    }
    s->end_piece = d->n;
    if (o) o->end_piece = other->n;
    return d->n <= UINT32_MAX ? 1 : fail("%s: more than %u pieces", s->name, UINT32_MAX);
}

static int cut_sources(slam_data *d, slam_data *other, const scan *scans, size_t n_scans, double fraction, uint64_t seed) {
    piece *documents = NULL;
    size_t capacity = 0, at = 0;
    int ok = 1;
    for (size_t source = 0; ok && source < d->sources; source++) {
        const data_source *s = &d->source[source];
        size_t n = 0;
        for (size_t file = s->first_file; ok && file < s->end_file; file++) {
            size_t first = at;
            while (at < n_scans && scans[at].file == file) at++;
            if (at > first) ok = find_documents(&documents, &n, &capacity, &scans[first], &scans[at], &d->files->at[file]);
        }
        if (ok && n == 0) ok = fail("%s: holds no document", s->name);
        uint64_t held = (uint64_t)(fraction * (double)n + 0.5);
        if (other && held < 1) held = 1;
        if (n > 0 && held > n - 1) held = n - 1;
        ok = ok && cut_source(d, other, source, documents, n, held, seed);
    }
    free(documents);
    return ok;
}

/* The other part: the same sources, each drawn once, since it is there to be measured. */
static slam_data *data_beside(slam_data *d) {
    slam_data *other = data_new(d->context, d->files);
    if (!other) return NULL;
    other->said_V = d->said_V;
    other->said_fingerprint = d->said_fingerprint;
    int ok = mem_grow((void **)&other->source, &other->sources_capacity, d->sources, sizeof *other->source);
    for (size_t i = 0; ok && i < d->sources; i++) {
        other->source[i] = d->source[i];
        other->source[i].weight = 1;
        other->source[i].name = text_copy(d->source[i].name);
        ok = other->source[i].name != NULL;
        other->sources++;
    }
    if (ok) return other;
    slam_data_free(other);
    return NULL;
}

int slam_data_prepare(slam_data *d, int V, double fraction, uint64_t seed, slam_data **held_out) {
    if (held_out) *held_out = NULL;
    if (d->prepared) return fail("data can be prepared only once");
    if (d->sources == 0) return fail("there are no data: no source was added");
    if (V <= UNIT_TOKEN)
        return fail("a vocabulary of %d, expected at least %d: padding, the document mark and a unit", V, UNIT_TOKEN + 1);
    if (!(fraction >= 0 && fraction < 1)) return fail("held-out fraction %g, expected at least 0 and below 1", fraction);
    if (fraction > 0 && !held_out) return fail("a held-out fraction of %g, but nowhere to put it", fraction);
    size_t n_scans;
    scan *scans = scan_files(d, V, &n_scans);
    slam_data *other = scans && fraction > 0 ? data_beside(d) : NULL;
    int ok = scans && (other || fraction == 0) && cut_sources(d, other, scans, n_scans, fraction, seed);
    free_scans(scans, n_scans);
    if (ok && other && other->n == 0) ok = fail("%s: one document, of which none can be held out", d->source[0].name);
    if (!ok) {
        slam_data_free(other);
        return 0;
    }
    d->prepared = 1;
    d->V = V;
    if (other) {
        other->prepared = 1;
        other->V = V;
        *held_out = other;
    }
    return 1;
}

static const uint16_t *piece_tokens(const slam_data *d, const piece *p) { return d->files->at[p->file].tokens + p->first; }

/* ---- packing ---- */

/* Pieces are packed a window at a time: so many wait, sorted by length, and rows are built from them. Larger windows pack a
   little better and mix less locally; at 8192 utterances a window is about 2,000 rows. */
enum { WINDOW = 8192 };

/* The pieces that wait, as a stack for each length: which lengths there are is a bit set, so that the longest that fits a gap
   is found by looking at a word or two. */
typedef struct lengths {
    uint64_t *present;     // bit l: a piece of length l waits
    uint32_t *count, *top; // (longest + 1): how many, and the last that came
    uint32_t *below;       // (WINDOW): the one that came before it
} lengths;

static void lengths_free(lengths *w) {
    free(w->present);
    free(w->count);
    free(w->top);
    free(w->below);
}

static int lengths_new(lengths *w, int longest) {
    size_t n = (size_t)longest + 1;
    w->present = (uint64_t *)mem_new(n / 64 + 1, sizeof *w->present);
    w->count = (uint32_t *)mem_new(n, sizeof *w->count);
    w->top = (uint32_t *)mem_new(n, sizeof *w->top);
    w->below = (uint32_t *)mem_new(WINDOW, sizeof *w->below);
    return w->present && w->count && w->top && w->below;
}

/* One piece more, or one less, of a length. */
static void lengths_more(lengths *w, int length) {
    w->count[length]++;
    w->present[length / 64] |= (uint64_t)1 << (length % 64);
}

static void lengths_less(lengths *w, int length) {
    if (--w->count[length] == 0) w->present[length / 64] &= ~((uint64_t)1 << (length % 64));
}

/* The largest length that waits and is at most `room`; 0: there is none. */
static int lengths_fit(const lengths *w, int room) {
    if (room <= 0) return 0;
    int word = room / 64;
    uint64_t bits = w->present[word] & (~(uint64_t)0 >> (63 - room % 64));
    while (!bits) {
        if (word == 0) return 0;
        bits = w->present[--word];
    }
    return word * 64 + 63 - __builtin_clzll(bits);
}

/* The two lengths (the second may be 0) that fill `room` best, the first as long as possible. Returns their sum. */
static int lengths_pair(const lengths *w, int room, int pair[2]) {
    int best = 0;
    for (int a = lengths_fit(w, room); 2 * a > best; a = lengths_fit(w, a - 1)) {
        int b = lengths_fit(w, room - a < a ? room - a : a);
        if (b == a && w->count[a] < 2) b = lengths_fit(w, a - 1);
        if (a + b <= best) continue;
        best = a + b;
        pair[0] = a;
        pair[1] = b;
        if (best == room) break;
    }
    return best;
}

/* The up to three lengths that fill `room` best, as far as a few tries of the first one tell. */
static int lengths_triple(lengths *w, int room, int triple[3]) {
    int best = 0;
    for (int a = lengths_fit(w, room), tries = 0; a && tries < 16 && 3 * a > best && best < room; tries++) {
        int pair[2] = {0, 0};
        lengths_less(w, a);
        int sum = a + lengths_pair(w, room - a, pair);
        lengths_more(w, a);
        if (sum > best) {
            best = sum;
            triple[0] = a;
            triple[1] = pair[0];
            triple[2] = pair[1];
        }
        a = lengths_fit(w, a - 1);
    }
    return best;
}

/* Lengths for one row: the longest piece first, because it is the hardest to place; then the longest that fits, until what is
   left can be closed by up to three, which are chosen together to leave no gap. Writes the lengths, returns how many. */
static int lengths_row(lengths *w, int room, int *row) {
    int n = 0;
    for (int a = lengths_fit(w, room); a; a = lengths_fit(w, room)) {
        int end[3] = {a, 0, 0};
        if (n > 0 && room <= 3 * a) lengths_triple(w, room, end);
        for (int k = 0; k < 3 && end[k]; k++) {
            lengths_less(w, end[k]);
            row[n++] = end[k];
            room -= end[k];
        }
    }
    return n;
}

/* ---- rows ---- */

typedef struct packed_row {
    uint32_t first, n; // its pieces: picked[first .. first + n - 1]
    int tokens;
} packed_row;

struct slam_rows {
    const slam_data *data;
    int shuffle, begun; // begun: the order of this epoch stands
    size_t first_source, end_source;
    uint64_t seed, epoch, row; // rows given of this epoch
    uint32_t *turns;           // for sources with a fraction in their weight: the order in which their pieces take turns
    uint32_t *order;           // this epoch's draws: numbers of pieces
    size_t draws, drawn;       // drawn: how many have come into the window
    lengths waiting;
    uint32_t *window, *picked; // pieces that wait; pieces of the rows that are ready
    size_t in_window;
    packed_row *ready;
    size_t n_ready, given;
    uint64_t windows; // of this epoch so far
    int *row_lengths; // of the row that is packed
};

static size_t source_pieces(const data_source *s) { return s->end_piece - s->first_piece; }

/* Draws an epoch beyond the whole times of a source's weight, in the mean: f n, with f the fraction of the weight and n the
   pieces. */
static double mean_extra_draws(const data_source *s) {
    const double mean = (s->weight - floor(s->weight)) * (double)source_pieces(s), whole = floor(mean + 0.5);
    return fabs(mean - whole) < 1e-6 ? whole : mean; // 2.3 - 2 is no 0.3
}

/* Those before an epoch: floor(epoch f n), so that a source whose f n is less than 1 comes round too, once in 1 / (f n) epochs. */
static uint64_t draws_before(const data_source *s, uint64_t epoch) { return (uint64_t)((double)epoch * mean_extra_draws(s)); }

static size_t extra_draws(const data_source *s, uint64_t epoch) {
    return (size_t)(draws_before(s, epoch + 1) - draws_before(s, epoch));
}

static int has_fraction(const data_source *s) { return mean_extra_draws(s) > 0; }

static void shuffle_numbers(uint32_t *list, size_t n, uint64_t random) {
    for (size_t i = n; i > 1; i--) {
        size_t k = (size_t)rng_below(&random, i);
        uint32_t kept = list[k];
        list[k] = list[i - 1];
        list[i - 1] = kept;
    }
}

/* Whether no epoch is empty: a source is drawn at least once in each. */
static int always_draws(const slam_rows *r) {
    for (size_t i = r->first_source; i < r->end_source; i++)
        if (r->data->source[i].weight * (double)source_pieces(&r->data->source[i]) > 1 - 1e-6) return 1;
    return 0;
}

/* Room for the draws of any epoch, and the pieces that take turns; returns how many pieces there are. */
static size_t count_draws(const slam_rows *r, size_t *draws, size_t *turns) {
    size_t pieces = 0;
    for (size_t i = r->first_source; i < r->end_source; i++) {
        const data_source *s = &r->data->source[i];
        *draws += source_pieces(s) * (r->shuffle ? (size_t)s->weight : 1);
        if (r->shuffle && has_fraction(s)) {
            *draws += (size_t)mean_extra_draws(s) + 1; // the mean of an epoch, rounded up
            *turns += source_pieces(s);
        }
        pieces += source_pieces(s);
    }
    return pieces;
}

/* The order in which a source's pieces take turns at being drawn once more than others. */
static void shuffle_turns(slam_rows *r) {
    uint32_t *turns = r->turns;
    for (size_t i = r->first_source; i < r->end_source; i++) {
        const data_source *s = &r->data->source[i];
        if (!r->shuffle || !has_fraction(s)) continue;
        for (size_t k = s->first_piece; k < s->end_piece; k++) turns[k - s->first_piece] = (uint32_t)k;
        shuffle_numbers(turns, source_pieces(s), rng_stream(r->seed, i, STREAM_TURNS));
        turns += source_pieces(s);
    }
}

slam_rows *slam_rows_new(const slam_data *d, int source, uint64_t seed, int shuffle) {
    if (!d->prepared || source < -1 || source >= (int)d->sources) {
        if (!d->prepared) fail("rows of data that are not prepared");
        else fail("source %d, expected 0 to %d, or -1 for all", source, (int)d->sources - 1);
        return NULL;
    }
    slam_rows *r = (slam_rows *)mem_new(1, sizeof *r);
    if (!r) return NULL;
    size_t turns = 0, draws = 0, pieces;
    r->data = d;
    r->seed = seed;
    r->shuffle = shuffle;
    r->first_source = source < 0 ? 0 : (size_t)source;
    r->end_source = source < 0 ? d->sources : (size_t)source + 1;
    pieces = count_draws(r, &draws, &turns);
    int ok = lengths_new(&r->waiting, d->context);
    ok = ok && (r->turns = (uint32_t *)mem_new(turns, sizeof *r->turns)) != NULL;
    ok = ok && (r->order = (uint32_t *)mem_new(draws, sizeof *r->order)) != NULL;
    ok = ok && (r->window = (uint32_t *)mem_new(WINDOW, sizeof *r->window)) != NULL;
    ok = ok && (r->picked = (uint32_t *)mem_new(WINDOW, sizeof *r->picked)) != NULL;
    ok = ok && (r->ready = (packed_row *)mem_new(WINDOW, sizeof *r->ready)) != NULL;
    ok = ok && (r->row_lengths = (int *)mem_new((size_t)d->context, sizeof *r->row_lengths)) != NULL;
    if (ok && shuffle && source < 0 && pieces > 0 && !always_draws(r))
        ok = fail("%s: an epoch draws nothing from it", d->source[r->first_source].name);
    if (ok) {
        shuffle_turns(r);
        return r;
    }
    slam_rows_free(r);
    return NULL;
}

void slam_rows_free(slam_rows *r) {
    if (!r) return;
    lengths_free(&r->waiting);
    free(r->turns);
    free(r->order);
    free(r->window);
    free(r->picked);
    free(r->ready);
    free(r->row_lengths);
    free(r);
}

/* The draws of an epoch. Of a source with weight w every piece comes floor(w) times; the further ones are those whose turn it is:
   epochs take their turns one after the other out of an endless round, so that those of an epoch are different pieces, others than
   the last epoch's where there are enough, and all pieces come equally often in the long run. */
static void begin_epoch(slam_rows *r, uint64_t epoch) {
    const uint32_t *turns = r->turns;
    uint32_t *to = r->order;
    for (size_t i = r->first_source; i < r->end_source; i++) {
        const data_source *s = &r->data->source[i];
        size_t n = source_pieces(s), extra = r->shuffle ? extra_draws(s, epoch) : 0;
        for (int times = r->shuffle ? (int)s->weight : 1; times > 0; times--)
            for (size_t k = s->first_piece; k < s->end_piece; k++) *to++ = (uint32_t)k;
        if (!r->shuffle || !has_fraction(s) || !n) continue;
        size_t turn = (size_t)(draws_before(s, epoch) % n);
        for (size_t k = 0; k < extra; k++) *to++ = turns[turn + k < n ? turn + k : turn + k - n];
        turns += n;
    }
    r->draws = (size_t)(to - r->order);
    if (r->shuffle) shuffle_numbers(r->order, r->draws, rng_stream(r->seed, epoch, STREAM_ORDER));
    r->epoch = epoch;
    r->row = r->windows = 0;
    r->drawn = r->in_window = r->n_ready = r->given = 0;
    r->begun = 1;
}

/* Rows that are more than 1/64 empty wait for the next window's pieces, up to half a window of them (or a length that nothing
   matches would stop the stream); from the last row on, for those are the emptiest. */
static void keep_poor_rows(slam_rows *r) {
    int poor = r->data->context - r->data->context / 64;
    size_t kept = 0;
    for (size_t i = r->n_ready; i > 0; i--) {
        packed_row row = r->ready[i - 1];
        if (row.tokens >= poor || kept + row.n > WINDOW / 2) continue;
        memcpy(r->window + kept, r->picked + row.first, row.n * sizeof *r->window);
        kept += row.n;
        r->ready[i - 1].n = 0;
    }
    size_t n = 0;
    for (size_t i = 0; i < r->n_ready; i++)
        if (r->ready[i].n) r->ready[n++] = r->ready[i];
    r->n_ready = n;
    r->in_window = kept;
}

/* The next rows: fills the window from the epoch's order and packs it. */
static void pack_window(slam_rows *r) {
    lengths *w = &r->waiting;
    const piece *pieces = r->data->pieces;
    while (r->in_window < WINDOW && r->drawn < r->draws) r->window[r->in_window++] = r->order[r->drawn++];
    for (size_t i = 0; i < r->in_window; i++) {
        int length = (int)pieces[r->window[i]].n;
        w->below[i] = w->top[length];
        w->top[length] = (uint32_t)i;
        lengths_more(w, length);
    }
    size_t picked = 0;
    r->n_ready = r->given = 0;
    while (picked < r->in_window) {
        packed_row *row = &r->ready[r->n_ready++];
        row->first = (uint32_t)picked;
        row->n = (uint32_t)lengths_row(w, r->data->context, r->row_lengths);
        row->tokens = 0;
        for (uint32_t i = 0; i < row->n; i++) {
            uint32_t *top = &w->top[r->row_lengths[i]];
            row->tokens += r->row_lengths[i];
            r->picked[picked++] = r->window[*top];
            *top = w->below[*top];
        }
    }
    r->in_window = 0;
    if (r->drawn < r->draws) keep_poor_rows(r);
    uint64_t random = rng_stream(r->seed, r->epoch, STREAM_WINDOWS + r->windows++);
    for (size_t i = r->n_ready; r->shuffle && i > 1; i--) { // or rows would come sorted by the length of their pieces
        size_t k = (size_t)rng_below(&random, i);
        packed_row row = r->ready[k];
        r->ready[k] = r->ready[i - 1];
        r->ready[i - 1] = row;
    }
}

/* The next row of this epoch; NULL where it has ended. */
static const packed_row *next_row(slam_rows *r) {
    if (!r->begun) begin_epoch(r, r->epoch);
    while (r->given == r->n_ready) {
        if (r->in_window == 0 && r->drawn == r->draws) return NULL;
        pack_window(r);
    }
    r->row++;
    return &r->ready[r->given++];
}

int slam_rows_next(slam_rows *r, int *tokens, int *targets, int *doc_start, int *n_targets) {
    const packed_row *row = next_row(r);
    int t = 0, T = r->data->context;
    *n_targets = 0;
    if (!row) {
        r->epoch++;
        r->row = 0;
        r->begun = 0;
        return 0;
    }
    *n_targets = row->tokens - (int)row->n; // each piece has one less than tokens
    if (!tokens) return row->tokens;
    for (uint32_t i = 0; i < row->n; i++) {
        const piece *p = &r->data->pieces[r->picked[row->first + i]];
        const uint16_t *from = piece_tokens(r->data, p);
        int start = t, n = (int)p->n;
        for (int k = 0; k < n; k++, t++) {
            tokens[t] = from[k];
            targets[t] = k + 1 < n ? from[k + 1] : -1;
            doc_start[t] = start;
        }
    }
    for (; t < T; t++) { // padding: each a piece of its own
        tokens[t] = 0;
        targets[t] = -1;
        doc_start[t] = t;
    }
    return row->tokens;
}

void slam_rows_tell(const slam_rows *r, uint64_t *epoch, uint64_t *row) {
    *epoch = r->epoch;
    *row = r->row;
}

/* Only lengths are read: the rows before this one are packed again and passed over. */
int slam_rows_seek(slam_rows *r, uint64_t epoch, uint64_t row) {
    if (!r->begun || epoch != r->epoch || row < r->row) begin_epoch(r, epoch);
    while (r->row < row)
        if (!next_row(r))
            return fail("row %llu of epoch %llu, but this epoch has %llu rows: the data are not those of before",
                        (unsigned long long)row, (unsigned long long)epoch, (unsigned long long)r->row);
    return 1;
}

int slam_data_measure(const slam_data *d, int source, uint64_t seed, slam_data_size *size) {
    memset(size, 0, sizeof *size);
    slam_rows *r = slam_rows_new(d, source, seed, 1);
    if (!r) return 0;
    for (size_t i = r->first_source; i < r->end_source; i++) size->documents += d->source[i].documents;
    const packed_row *row;
    while ((row = next_row(r)) != NULL) size->tokens += (uint64_t)row->tokens;
    size->rows = r->row;
    size->pieces = r->draws;
    size->targets = size->tokens - size->pieces;
    if (size->rows) size->fill = (double)size->tokens / ((double)size->rows * d->context);
    slam_rows_free(r);
    return 1;
}

/* ==========================================================================================
   10. SPEECH             resampler, MFCC, HuBERT, k-means, units, token files from audio files
   Audio of any rate becomes 16 kHz, 16 kHz becomes features, the nearest centroid of a frame of
   features is its unit. What is computed for a file depends on nothing but the file and the
   settings, so that threads take files in any order and the output stands in the input's.
   may use: 1 base, 2 formats, 3 ops, 6 ranks
   ========================================================================================== */
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#ifdef __APPLE__
#include <crt_externs.h>
#endif

#define SPEECH_RATE 16000
#define SPEECH_PI   3.14159265358979323846

/* Units are the same in every build, so product and sum must not become one rounding where the processor has an instruction for it:
   gcc is told function by function, clang for this section. */
#if defined __GNUC__ && !defined __clang__
#define SPEECH_EXACT __attribute__((optimize("fp-contract=off")))
#else
#define SPEECH_EXACT
#endif
#ifdef __clang__
#pragma clang fp contract(off)
#endif

/* ---- resampler ----
   With up / down = 16000 / rate in lowest terms, output k stands at input time k down / up: between samples, at one of `up` phases.
   h(t) = sin(2 pi f t) / (pi t) * kaiser(t / half), f = 0.95 of the lower Nyquist frequency, and what lies from 0.9 to 1.0 of it is
   the transition, whose width decides the window's length for the attenuation A (Kaiser's formulas, as in Oppenheim and Schafer):
       half = (A - 7.95) / (2 * 14.36 * width)     beta = 0.1102 (A - 8.7) */

#define RESAMPLER_ATTENUATION 108.0
enum { RESAMPLER_LANES = 16 };

struct slam_resampler {
    int rate;
    uint64_t up, down;
    int before, taps; // the first tap's place before the sample that an output follows; taps of a phase, whole lanes of them
    float *tap;       // (up, taps); NULL: too many to be kept
};

/* Floats of a table that is kept, 16 MB: the rates in use need up to 2.4 MB, an odd one at 768 kHz would need 430 MB. Without a
   table a call computes each phase that it meets once, in up to 10 s a file at such a rate. */
#define RESAMPLER_TABLE ((uint64_t)1 << 22)
enum { RESAMPLER_LONGEST = 6720 }; // taps of a phase at 768 kHz

/* modified Bessel function of the first kind, order 0 */
SPEECH_EXACT static double bessel_i0(double x) {
    double sum = 1, term = 1;
    for (int k = 1; term > 1e-17 * sum; k++) {
        term *= x * x / (4.0 * k * k);
        sum += term;
    }
    return sum;
}

/* The lower Nyquist frequency in cycles an input sample, and half the window's length in input samples. */
static double resampler_nyquist(int rate) { return 0.5 * (rate < SPEECH_RATE ? rate : SPEECH_RATE) / rate; }
static double resampler_half(int rate) { return (RESAMPLER_ATTENUATION - 7.95) / (2 * 14.36 * 0.1 * resampler_nyquist(rate)); }

/* tap = (taps) of a phase */
SPEECH_EXACT static void resampler_phase(const slam_resampler *r, uint64_t phase, float *tap) {
    const double beta = 0.1102 * (RESAMPLER_ATTENUATION - 8.7), scale = 1 / bessel_i0(beta);
    const double frequency = 0.95 * resampler_nyquist(r->rate), half = resampler_half(r->rate);
    double sum = 0;
    memset(tap, 0, (size_t)r->taps * sizeof *tap);
    for (int i = 0; i < 2 * r->before + 2; i++) {
        const double t = i - r->before - (double)phase / (double)r->up, u = t / half;
        if (fabs(u) >= 1) continue;
        const double sinc = t == 0 ? 2 * frequency : sin(2 * SPEECH_PI * frequency * t) / (SPEECH_PI * t);
        const double h = sinc * scale * bessel_i0(beta * sqrt(1 - u * u));
        tap[i] = (float)h;
        sum += h;
    }
    for (int i = 0; i < r->taps; i++) tap[i] = (float)(tap[i] / sum); // every phase lets a constant through as it is
}

slam_resampler *slam_resampler_new(int rate) {
    if (rate < 1000 || rate > 768000) {
        fail("a sample rate of %d Hz: expected 1000 to 768000", rate);
        return NULL;
    }
    slam_resampler *r = (slam_resampler *)mem_new(1, sizeof *r);
    if (!r) return NULL;
    uint64_t a = SPEECH_RATE, b = (uint64_t)rate;
    while (b) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    r->rate = rate;
    r->up = SPEECH_RATE / a;
    r->down = (uint64_t)rate / a;
    r->before = (int)resampler_half(rate);
    r->taps = (2 * r->before + 2 + RESAMPLER_LANES - 1) / RESAMPLER_LANES * RESAMPLER_LANES;
    if (r->up * (uint64_t)r->taps > RESAMPLER_TABLE) return r;
    r->tap = (float *)mem_new(r->up * (uint64_t)r->taps, sizeof *r->tap);
    if (!r->tap) {
        slam_resampler_free(r);
        return NULL;
    }
    SLAM_PARALLEL_FOR
    for (int64_t phase = 0; phase < (int64_t)r->up; phase++) resampler_phase(r, (uint64_t)phase, r->tap + phase * (int64_t)r->taps);
    return r;
}

void slam_resampler_free(slam_resampler *r) {
    if (r) free(r->tap);
    free(r);
}

size_t slam_resampler_length(const slam_resampler *r, size_t n) { return (size_t)((n * r->up + r->down - 1) / r->down); }

/* Lanes that are added up at the end: the compiler may use vectors, and the sum has one order whatever vectors there are. */
SPEECH_EXACT static float resampler_dot(const float *tap, const float *in, int n) {
    float lane[RESAMPLER_LANES] = {0};
    for (int i = 0; i < n; i += RESAMPLER_LANES)
        for (int j = 0; j < RESAMPLER_LANES; j++) lane[j] += tap[i + j] * in[i + j];
    for (int width = RESAMPLER_LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
}

/* Near the ends: the taps that reach beyond them meet zeros. */
SPEECH_EXACT static float resampler_edge(const float *tap, const float *in, int64_t first, int taps, int64_t n) {
    float sum = 0;
    const int64_t from = first < 0 ? -first : 0, to = first + taps > n ? n - first : taps;
    for (int64_t i = from; i < to; i++) sum += tap[i] * in[first + i];
    return sum;
}

/* Output k, whose phase has these taps. */
static float resampler_output(const slam_resampler *r, const float *tap, int64_t k, const float *in, int64_t n) {
    const int64_t first = (int64_t)((uint64_t)k * r->down / r->up) - r->before;
    const int inside = first >= 0 && first + r->taps <= n;
    return inside ? resampler_dot(tap, in + first, r->taps) : resampler_edge(tap, in, first, r->taps, n);
}

/* Outputs k, k + up, k + 2 up, ... share a phase: the taps are computed once for all of them. */
static void resample_by_phase(const slam_resampler *r, float *out, int64_t n_out, const float *in, int64_t n) {
    const int64_t up = (int64_t)r->up, phases = up < n_out ? up : n_out;
    SLAM_PARALLEL_FOR
    for (int64_t k = 0; k < phases; k++) {
        float tap[RESAMPLER_LONGEST];
        resampler_phase(r, (uint64_t)k * r->down % r->up, tap);
        for (int64_t i = k; i < n_out; i += up) out[i] = resampler_output(r, tap, i, in, n);
    }
}

void slam_resample(const slam_resampler *r, float *out, const float *in, size_t n) {
    const int64_t n_out = (int64_t)slam_resampler_length(r, n);
    if (r->up == r->down) {
        if (n) memcpy(out, in, n * sizeof *out);
        return;
    }
    if (!r->tap) {
        resample_by_phase(r, out, n_out, in, (int64_t)n);
        return;
    }
    SLAM_PARALLEL_FOR
    for (int64_t k = 0; k < n_out; k++)
        out[k] = resampler_output(r, r->tap + (uint64_t)k * r->down % r->up * (uint64_t)r->taps, k, in, (int64_t)n);
}

/* ---- MFCC ----
   Davis and Mermelstein 1980, with the choices of the Python package python_speech_features, whose units many have:
       y_t = x_t - 0.97 x_(t-1)        P_k = |FFT(hamming y)_k|^2 / N        E_j = sum_k filter_jk P_k
       c_0 = log sum_k P_k             c_i = lifter_i DCT(log E)_i           filter: 40 triangles, evenly spaced on the mel scale
       d_t = sum_n n (c_(t+n) - c_(t-n)) / (2 sum_n n^2),  n = 1, 2; beyond the ends the first and last frame stand. d's own are the
   second differences. The window is a power of two long, and so is the FFT. */

enum { MFCC_CEPSTRA = 13, MFCC_WIDTH = 3 * MFCC_CEPSTRA, MFCC_FILTERS = 40, MFCC_LONGEST = 1024 };

typedef struct mfcc {
    int window, step;
    double hamming[MFCC_LONGEST];
    double cosine[MFCC_LONGEST / 2], sine[MFCC_LONGEST / 2]; // of 2 pi k / window
    int edge[MFCC_FILTERS + 2];                              // filter j rises from edge j to j + 1 and falls to j + 2
    double dct[MFCC_CEPSTRA][MFCC_FILTERS];                  // with the lifter in it
} mfcc;

/* The scale of O'Shaughnessy 1987 */
SPEECH_EXACT static double mel_from_hz(double hz) { return 2595 * log10(1 + hz / 700); }
SPEECH_EXACT static double hz_from_mel(double mel) { return 700 * (pow(10, mel / 2595) - 1); }

SPEECH_EXACT static void mfcc_init(mfcc *m, int rate) {
    m->step = SPEECH_RATE / rate;
    m->window = rate == 25 ? 1024 : 512;
    for (int i = 0; i < m->window; i++) m->hamming[i] = 0.54 - 0.46 * cos(2 * SPEECH_PI * i / (m->window - 1));
    for (int k = 0; k < m->window / 2; k++) {
        m->cosine[k] = cos(2 * SPEECH_PI * k / m->window);
        m->sine[k] = sin(2 * SPEECH_PI * k / m->window);
    }
    const double top = mel_from_hz(SPEECH_RATE / 2.0);
    for (int j = 0; j < MFCC_FILTERS + 2; j++)
        m->edge[j] = (int)floor((m->window + 1) * hz_from_mel(top * j / (MFCC_FILTERS + 1)) / SPEECH_RATE);
    m->edge[MFCC_FILTERS + 1] = m->window / 2; // (window + 1) / 2 rounded down, whatever pow() made of it
    for (int i = 0; i < MFCC_CEPSTRA; i++) {
        const double lifter = 1 + 11 * sin(SPEECH_PI * i / 22), norm = sqrt((i ? 2.0 : 1.0) / MFCC_FILTERS);
        for (int j = 0; j < MFCC_FILTERS; j++)
            m->dct[i][j] = lifter * norm * cos(SPEECH_PI * i * (2 * j + 1) / (2.0 * MFCC_FILTERS));
    }
}

/* In place, n a power of two (Cooley and Tukey 1965): Z_k = sum_t z_t exp(-2 pi i k t / n). The tables are of 2 n. */
SPEECH_EXACT static void fft(double *re, double *im, int n, const double *cosine, const double *sine) {
    for (int i = 1, j = 0; i < n; i++) {
        int bit = n >> 1;
        for (; j & bit; bit >>= 1) j ^= bit;
        j ^= bit;
        if (i >= j) continue;
        const double a = re[i], b = im[i];
        re[i] = re[j];
        im[i] = im[j];
        re[j] = a;
        im[j] = b;
    }
    for (int half = 1; half < n; half *= 2)
        for (int start = 0; start < n; start += 2 * half)
            for (int k = 0; k < half; k++) {
                const int p = start + k, q = p + half;
                const double c = cosine[k * (n / half)], s = sine[k * (n / half)];
                const double a = re[q] * c + im[q] * s, b = im[q] * c - re[q] * s;
                re[q] = re[p] - a;
                im[q] = im[p] - b;
                re[p] += a;
                im[p] += b;
            }
}

/* power = (window / 2 + 1) from a windowed frame. Its even samples are the real, its odd ones the imaginary parts of a transform Z
   of half the length; E_k = (Z_k + conj Z_-k) / 2 and O_k = (Z_k - conj Z_-k) / 2i are theirs, and X_k = E_k + w^k O_k. */
SPEECH_EXACT static void mfcc_power(const mfcc *m, double *power, const double *frame) {
    double re[MFCC_LONGEST / 2], im[MFCC_LONGEST / 2];
    const int n = m->window / 2;
    for (int t = 0; t < n; t++) {
        re[t] = frame[2 * t];
        im[t] = frame[2 * t + 1];
    }
    fft(re, im, n, m->cosine, m->sine);
    for (int k = 0; k <= n; k++) {
        const int p = k % n, q = (n - k) % n;
        const double c = k < n ? m->cosine[k] : -1, s = k < n ? m->sine[k] : 0;
        const double even_re = (re[p] + re[q]) / 2, even_im = (im[p] - im[q]) / 2, odd_re = (im[p] + im[q]) / 2,
                     odd_im = (re[q] - re[p]) / 2;
        const double x_re = even_re + c * odd_re + s * odd_im, x_im = even_im + c * odd_im - s * odd_re;
        power[k] = (x_re * x_re + x_im * x_im) / m->window;
    }
}

/* The log of an energy; of none, that of the smallest step at 1. */
static double log_energy(double x) { return log(x > 0 ? x : 2.220446049250313e-16); }

/* out = (13), the cepstra of the frame that begins at sample `start` of n */
SPEECH_EXACT static void mfcc_frame(const mfcc *m, float *out, const float *x, size_t n, size_t start) {
    double frame[MFCC_LONGEST], power[MFCC_LONGEST / 2 + 1], energy[MFCC_FILTERS], sum = 0;
    for (int i = 0; i < m->window; i++) {
        const size_t t = start + (size_t)i;
        frame[i] = t < n ? m->hamming[i] * (x[t] - (t ? 0.97 * x[t - 1] : 0)) : 0;
    }
    mfcc_power(m, power, frame);
    for (int k = 0; k <= m->window / 2; k++) sum += power[k];
    for (int j = 0; j < MFCC_FILTERS; j++) {
        const int a = m->edge[j], b = m->edge[j + 1], c = m->edge[j + 2];
        double e = 0;
        for (int k = a; k < b; k++) e += power[k] * (k - a) / (b - a);
        for (int k = b; k < c; k++) e += power[k] * (c - k) / (c - b);
        energy[j] = log_energy(e);
    }
    out[0] = (float)log_energy(sum);
    for (int i = 1; i < MFCC_CEPSTRA; i++) {
        double c = 0;
        for (int j = 0; j < MFCC_FILTERS; j++) c += m->dct[i][j] * energy[j];
        out[i] = (float)c;
    }
}

/* Columns `to`.. of (frames, 39) from columns `from`.. */
SPEECH_EXACT static void mfcc_differences(float *out, size_t frames, int from, int to) {
    for (size_t t = 0; t < frames; t++) {
        const size_t last = frames - 1;
        const float *back2 = out + (t > 1 ? t - 2 : 0) * MFCC_WIDTH + from, *back1 = out + (t > 0 ? t - 1 : 0) * MFCC_WIDTH + from;
        const float *next1 = out + (t + 1 < last ? t + 1 : last) * MFCC_WIDTH + from;
        const float *next2 = out + (t + 2 < last ? t + 2 : last) * MFCC_WIDTH + from;
        for (int i = 0; i < MFCC_CEPSTRA; i++)
            out[t * MFCC_WIDTH + to + i] = ((next1[i] - back1[i]) + 2 * (next2[i] - back2[i])) / 10;
    }
}

/* ---- features ---- */

/* One thread's way from a file to 16 kHz: the tables of the rates that it met last. */
typedef struct decoder {
    slam_resampler *resampler[4];
    int oldest;
} decoder;

struct slam_speech {
    slam_speech_settings settings;
    mfcc tables;
    slam_hubert *hubert; // NULL: MFCC
};

void slam_speech_defaults(slam_speech_settings *s) {
    memset(s, 0, sizeof *s);
    s->features = SLAM_MFCC;
    s->rate = 25;
    s->dedup = 1;
    s->layer = 11;
}

slam_speech *slam_speech_new(const slam_speech_settings *settings, slam_ops *ops) {
    slam_speech *s = (slam_speech *)mem_new(1, sizeof *s);
    int ok = s != NULL;
    if (s) s->settings = *settings;
    if (ok && settings->features == SLAM_HUBERT) {
        if (!ops) ok = fail("%s: HuBERT needs a device to run on", settings->hubert);
        ok = ok && (s->hubert = slam_hubert_load(ops, settings->hubert, settings->layer)) != NULL;
        if (ok) s->settings.rate = SPEECH_RATE / slam_hubert_step(s->hubert);
        if (ok && settings->rate && settings->rate != s->settings.rate)
            ok = fail("%s: has %d frames a second, not %d", settings->hubert, s->settings.rate, settings->rate);
    } else if (ok && settings->rate != 25 && settings->rate != 50)
        ok = fail("%d frames of features a second: expected 25 or 50", settings->rate);
    else if (ok) mfcc_init(&s->tables, settings->rate);
    if (ok) return s;
    slam_speech_free(s);
    return NULL;
}

void slam_speech_free(slam_speech *s) {
    if (!s) return;
    slam_hubert_free(s->hubert);
    free(s);
}

int slam_speech_width(const slam_speech *s) { return s->hubert ? slam_hubert_width(s->hubert) : MFCC_WIDTH; }

size_t slam_speech_frames(const slam_speech *s, size_t n) {
    if (s->hubert) return (size_t)slam_hubert_frames(s->hubert, (long)n);
    const size_t window = (size_t)s->tables.window, step = (size_t)s->tables.step;
    return n == 0 ? 0 : n <= window ? 1 : 1 + (n - window + step - 1) / step;
}

/* (x - mean) / sqrt(variance + 1e-7), as Hugging Face's Wav2Vec2FeatureExtractor; the sums are of doubles, in order */
SPEECH_EXACT static void normalize_waveform(float *out, const float *x, size_t n) {
    double mean = 0, variance = 0;
    for (size_t i = 0; i < n; i++) mean += x[i];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / sqrt(variance / (double)n + 1e-7);
    for (size_t i = 0; i < n; i++) out[i] = (float)((x[i] - mean) * scale);
}

static int speech_mfcc(const mfcc *m, float *out, const float *sample, size_t n, size_t frames) {
    SLAM_PARALLEL_FOR
    for (int64_t t = 0; t < (int64_t)frames; t++) mfcc_frame(m, out + t * MFCC_WIDTH, sample, n, (size_t)t * (size_t)m->step);
    mfcc_differences(out, frames, 0, MFCC_CEPSTRA);
    mfcc_differences(out, frames, MFCC_CEPSTRA, 2 * MFCC_CEPSTRA);
    return 1;
}

int slam_speech_features(const slam_speech *s, float *out, const float *sample, size_t n) {
    const long samples = (long)n;
    float *normal = NULL;
    if (s->settings.normalize && n) {
        normal = (float *)mem_new(n, sizeof *normal);
        if (!normal) return 0;
        normalize_waveform(normal, sample, n);
        sample = normal;
    }
    const int ok = s->hubert ? slam_hubert_features(s->hubert, 1, &sample, &samples, &out)
                             : speech_mfcc(&s->tables, out, sample, n, slam_speech_frames(s, n));
    free(normal);
    return ok;
}

static void decoder_close(decoder *d) {
    for (int i = 0; i < 4; i++) slam_resampler_free(d->resampler[i]);
    memset(d, 0, sizeof *d);
}

static const slam_resampler *decoder_resampler(decoder *d, int rate) {
    for (int i = 0; i < 4; i++)
        if (d->resampler[i] && d->resampler[i]->rate == rate) return d->resampler[i];
    slam_resampler *r = slam_resampler_new(rate);
    if (!r) return NULL;
    slam_resampler_free(d->resampler[d->oldest]);
    d->resampler[d->oldest] = r;
    d->oldest = (d->oldest + 1) % 4;
    return r;
}

/* ---- parts of audio ----
   A file longer than the limit is cut: each part is what a file of its own with these frames would be, so that no more than a part
   is ever in memory. The cut lies in the middle of the quietest 20 ms of the limit's last fifth. */

typedef struct audio_parts {
    sound from;
    decoder *tables;
    double max_seconds;          // 0: all is one part
    float *frame;                // of the file, from the part's first on
    size_t n, capacity, used;    // that are there; of them the part's
    uint64_t first;              // where the part begins in the file
    int cut;                     // there are more parts than one
    double start, end;           // of the part, in seconds
    float *sample, *resampled;   // the part at 16 kHz
    size_t samples, resampled_n; // resampled_n: capacity
} audio_parts;

static void parts_close(audio_parts *p) {
    sound_close(&p->from);
    free(p->frame);
    free(p->resampled);
    memset(p, 0, sizeof *p);
}

/* Of the sound that stands in p->from. */
static void parts_begin(audio_parts *p, decoder *d, double max_seconds) {
    p->tables = d;
    p->max_seconds = max_seconds;
}

static int parts_open(audio_parts *p, decoder *d, const char *path, double max_seconds) {
    memset(p, 0, sizeof *p);
    parts_begin(p, d, max_seconds);
    return sound_open(&p->from, path);
}

/* Where to cut x so that no more than `most` frames come before: the first of the places that tie. */
SPEECH_EXACT static size_t quietest_place(const float *x, int rate, size_t most) {
    const size_t window = (size_t)rate / 50;
    size_t best = most - window;
    double least = INFINITY;
    for (size_t at = most - most / 5; at + window <= most; at += window / 2) {
        double sum = 0;
        for (size_t i = at; i < at + window; i++) sum += (double)x[i] * (double)x[i];
        if (sum < least) {
            least = sum;
            best = at;
        }
    }
    return best + window / 2;
}

static int parts_resample(audio_parts *p) {
    const slam_resampler *r = decoder_resampler(p->tables, p->from.rate);
    if (!r) return fail("%s: %s", p->from.name, slam_error());
    p->samples = slam_resampler_length(r, p->used);
    p->sample = p->frame;
    if (p->from.rate == SPEECH_RATE) return 1;
    if (!mem_grow((void **)&p->resampled, &p->resampled_n, p->samples, sizeof *p->resampled)) return 0;
    slam_resample(r, p->resampled, p->frame, p->used);
    p->sample = p->resampled;
    return 1;
}

/* The next part: 1, 0 at the end, -1 and the sentence. */
static int parts_next(audio_parts *p) {
    const int rate = p->from.rate;
    const size_t most = p->max_seconds > 0 ? (size_t)(p->max_seconds * rate) : SIZE_MAX - 1;
    p->n -= p->used;
    if (p->n) memmove(p->frame, p->frame + p->used, p->n * sizeof *p->frame);
    p->first += p->used;
    p->used = 0;
    if (!sound_fill(&p->from, &p->frame, &p->n, &p->capacity, most + 1)) return -1;
    if (p->n == 0) return 0;
    p->cut |= p->n > most;
    p->used = p->n > most ? quietest_place(p->frame, rate, most) : p->n;
    p->start = (double)p->first / rate;
    p->end = (double)(p->first + p->used) / rate;
    return parts_resample(p) ? 1 : -1;
}

/* ---- HuBERT: configuration ----
   Samples go through convolutions without padding (each followed by GELU; a norm after the first or after all of them), a linear
   layer, a convolution over many frames that stands for positions, and a transformer. Hugging Face has a few switches for each. */

enum { HUBERT_CONVS = 16, HUBERT_PADDING = 40 };
#ifndef HUBERT_SLICE           // a test defines it
#define HUBERT_SLICE (1 << 20) // samples that are convolved at once
#endif

typedef struct hubert_config {
    int convs, width[HUBERT_CONVS], kernel[HUBERT_CONVS], stride[HUBERT_CONVS];
    int conv_bias, all_norms,
        projection_norm; // all_norms: a layer norm after each convolution, else a channel norm after the first
    int C, L, NH, F;
    int taps, groups, batch_norm; // of the convolution for positions
    int stable;                   // norms stand before attention and MLP, else after them
    double eps;
} hubert_config;

static int hubert_refuse(const json *c, const char *path) {
    const char *type = json_text(c, "model_type", "");
    const char *const activations[] = {"hidden_act", "feat_extract_activation"};
    const json *adapter = json_get(c, "adapter_attn_dim");
    if (strcmp(type, "hubert")) return fail("%s: model_type is '%s', expected 'hubert'", path, type);
    for (int k = 0; k < 2; k++) {
        const char *name = json_text(c, activations[k], json_get(c, activations[k]) ? "" : "gelu");
        if (strcmp(name, "gelu")) return fail("%s: %s is '%s', expected 'gelu'", path, activations[k], name);
    }
    if (adapter && adapter->type != JSON_NULL) return fail("%s: adapter_attn_dim is set: adapters are not supported", path);
    return 1;
}

/* One number for each convolution, 1..max, and how many; where the key is absent both stay as they are. */
static int hubert_list(const json *c, const char *key, const char *path, int max, int *out, int *n) {
    const json *list = json_get(c, key);
    int k = 0;
    if (!list || list->type == JSON_NULL) return 1;
    if (list->type != JSON_ARRAY || list->n < 1 || list->n > HUBERT_CONVS)
        return fail("%s: '%s' is %.60s, expected a list of 1 to %d numbers", path, key, json_describe(list), HUBERT_CONVS);
    for (const json *j = list->first; j; j = j->next) {
        if (!json_whole(j) || j->number < 1 || j->number > max)
            return fail("%s: '%s' holds %.60s, expected whole numbers from 1 to %d", path, key, json_describe(j), max);
        out[k++] = (int)j->number;
    }
    *n = k;
    return 1;
}

/* A whole number from 1 to max; where the key is absent it stays as it is. */
static int hubert_int(const json *c, const char *key, const char *path, long max, int *out) {
    long n = *out;
    if (!json_int(c, key, path, 1, max, &n)) return 0;
    *out = (int)n;
    return 1;
}

static int hubert_convolutions(hubert_config *k, const json *c, const char *path) {
    const char *norm = json_text(c, "feat_extract_norm", json_get(c, "feat_extract_norm") ? "" : "group");
    int widths = 7, kernels = 7, strides = 7, product = 1;
    long n = 0;
    const int kernel[] = {10, 3, 3, 3, 3, 2, 2};
    for (int i = 0; i < 7; i++) { // HubertConfig's own values where a file is silent
        k->width[i] = 512;
        k->kernel[i] = kernel[i];
        k->stride[i] = i ? 2 : 5;
    }
    if (!hubert_list(c, "conv_dim", path, 1 << 14, k->width, &widths) ||
        !hubert_list(c, "conv_kernel", path, 1 << 10, k->kernel, &kernels) ||
        !hubert_list(c, "conv_stride", path, 1 << 10, k->stride, &strides) ||
        !json_int(c, "num_feat_extract_layers", path, 1, HUBERT_CONVS, &n))
        return 0;
    if (widths != kernels || widths != strides || (n && n != widths))
        return fail("%s: conv_dim, conv_kernel and conv_stride have %d, %d and %d numbers, expected as many of each%s", path,
                    widths, kernels, strides, n && n != widths ? " as num_feat_extract_layers says" : "");
    k->convs = widths;
    for (int i = 0; i < widths; i++) {
        product *= k->stride[i];
        if (product > 1 << 16) return fail("%s: conv_stride multiplies to more than %d samples a frame", path, 1 << 16);
    }
    if (strcmp(norm, "group") && strcmp(norm, "layer"))
        return fail("%s: feat_extract_norm is '%s', expected 'group' or 'layer'", path, norm);
    k->all_norms = norm[0] == 'l';
    return json_flag(c, "conv_bias", path, &k->conv_bias);
}

static int hubert_config_read(hubert_config *k, const char *path) {
    json *c = json_read(path);
    int ok = c && hubert_refuse(c, path);
    memset(k, 0, sizeof *k);
    k->C = 768, k->L = k->NH = 12, k->F = 3072, k->taps = 128, k->groups = 16, k->projection_norm = 1, k->eps = 1e-5;
    ok = ok && hubert_convolutions(k, c, path) && json_flag(c, "feat_proj_layer_norm", path, &k->projection_norm) &&
         hubert_int(c, "hidden_size", path, 1 << 14, &k->C) && hubert_int(c, "num_hidden_layers", path, 1 << 10, &k->L) &&
         hubert_int(c, "num_attention_heads", path, 1 << 10, &k->NH) && hubert_int(c, "intermediate_size", path, 1 << 16, &k->F) &&
         hubert_int(c, "num_conv_pos_embeddings", path, 1 << 12, &k->taps) &&
         hubert_int(c, "num_conv_pos_embedding_groups", path, 1 << 12, &k->groups) &&
         json_flag(c, "conv_pos_batch_norm", path, &k->batch_norm) && json_flag(c, "do_stable_layer_norm", path, &k->stable) &&
         json_real(c, "layer_norm_eps", path, 0, 1, &k->eps);
    if (ok && k->C % k->NH) ok = fail("%s: hidden_size %d over %d heads, expected a multiple", path, k->C, k->NH);
    if (ok && k->C % k->groups)
        ok = fail("%s: hidden_size %d over %d groups (num_conv_pos_embedding_groups), expected a multiple", path, k->C, k->groups);
    json_free(c);
    return ok;
}

int slam_hubert_asks_normalize(const char *folder) {
    char *path = path_join(folder, "preprocessor_config.json");
    json *c = path && path_is_file(path) ? json_read(path) : NULL;
    int asks = 0;
    if (c) json_flag(c, "do_normalize", path, &asks);
    json_free(c);
    free(path);
    return asks;
}

/* ---- HuBERT: weights ----
   One array. A convolution's (OC,C,K) is stored as (OC,K,C), as conv1d reads it; q, k and v are one matrix. */

typedef struct hubert_norm {
    size_t w, b;
} hubert_norm;

typedef struct hubert_places {
    size_t conv[HUBERT_CONVS], conv_bias[HUBERT_CONVS];
    hubert_norm conv_norm[HUBERT_CONVS], projection_norm, norm; // norm: the encoder's, before the first layer
    size_t projection, projection_bias;
    size_t positions, positions_bias, scale, shift;                    // scale, shift: the batch norm before it
    size_t layer, layer_size;                                          // the first layer; layer l is layer_size * l further
    size_t qkv, qkv_bias, out, out_bias, up, up_bias, down, down_bias; // within it
    hubert_norm attention_norm, mlp_norm;
    size_t total;
} hubert_places;

/* A tensor of the file: its name and shape, and where it goes. */
enum { HUBERT_PLAIN, HUBERT_CONV, HUBERT_ELSEWHERE }; // elsewhere: what weight norm and batch norm are computed from
typedef struct hubert_tensor {
    char name[96];
    int rank, kind;
    size_t shape[3], at;
    const tensor *from;
} hubert_tensor;

struct slam_hubert {
    slam_ops *ops;
    hubert_config config;
    hubert_places at;
    int layer;
    uint64_t hash;
    slam_act *weights;
    char *arena;
    size_t arena_bytes;
};

/* The list of tensors as it is made, and the end of the array so far. */
typedef struct hubert_list_of {
    hubert_tensor *list;
    size_t n, end;
} hubert_list_of;

static size_t hubert_place(size_t *end, size_t n) {
    const size_t at = *end;
    *end += (n + 255) / 256 * 256;
    return at;
}

static void SLAM_PRINTF(8, 9)
    hubert_add(hubert_list_of *l, int kind, size_t at, int rank, size_t a, size_t b, size_t c, const char *format, ...) {
    hubert_tensor *t = &l->list[l->n++];
    va_list args;
    va_start(args, format);
    vsnprintf(t->name, sizeof t->name, format, args);
    va_end(args);
    t->kind = kind;
    t->at = at;
    t->rank = rank;
    t->shape[0] = a, t->shape[1] = b, t->shape[2] = c;
}

static hubert_norm hubert_add_norm(hubert_list_of *l, size_t *end, size_t base, size_t C, const char *name) {
    const hubert_norm norm = {hubert_place(end, C), hubert_place(end, C)};
    hubert_add(l, HUBERT_PLAIN, base + norm.w, 1, C, 0, 0, "%s.weight", name);
    hubert_add(l, HUBERT_PLAIN, base + norm.b, 1, C, 0, 0, "%s.bias", name);
    return norm;
}

static void hubert_add_convolutions(hubert_list_of *l, const hubert_config *k, hubert_places *p) {
    char name[64];
    for (int i = 0; i < k->convs; i++) {
        const size_t OC = k->width[i], C = i ? k->width[i - 1] : 1, K = k->kernel[i];
        p->conv[i] = hubert_place(&l->end, OC * C * K);
        hubert_add(l, HUBERT_CONV, p->conv[i], 3, OC, C, K, "feature_extractor.conv_layers.%d.conv.weight", i);
        if (k->conv_bias) {
            p->conv_bias[i] = hubert_place(&l->end, OC);
            hubert_add(l, HUBERT_PLAIN, p->conv_bias[i], 1, OC, 0, 0, "feature_extractor.conv_layers.%d.conv.bias", i);
        }
        snprintf(name, sizeof name, "feature_extractor.conv_layers.%d.layer_norm", i);
        if (i == 0 || k->all_norms) p->conv_norm[i] = hubert_add_norm(l, &l->end, 0, OC, name);
    }
    const size_t C = k->width[k->convs - 1];
    if (k->projection_norm) p->projection_norm = hubert_add_norm(l, &l->end, 0, C, "feature_projection.layer_norm");
    p->projection = hubert_place(&l->end, C * k->C);
    p->projection_bias = hubert_place(&l->end, k->C);
    hubert_add(l, HUBERT_PLAIN, p->projection, 2, k->C, C, 0, "feature_projection.projection.weight");
    hubert_add(l, HUBERT_PLAIN, p->projection_bias, 1, k->C, 0, 0, "feature_projection.projection.bias");
}

/* Weight norm has two spellings: by PyTorch's newer parametrizations, and the older one. */
static void hubert_add_positions(hubert_list_of *l, const hubert_config *k, hubert_places *p, int newer) {
    const char *conv = "encoder.pos_conv_embed.conv", *norm = "encoder.pos_conv_embed.batch_norm";
    const size_t C = k->C, K = k->taps, width = C / k->groups;
    p->positions = hubert_place(&l->end, C * width * K);
    p->positions_bias = hubert_place(&l->end, C);
    hubert_add(l, HUBERT_PLAIN, p->positions_bias, 1, C, 0, 0, "%s.bias", conv);
    if (k->batch_norm) {
        p->scale = hubert_place(&l->end, C);
        p->shift = hubert_place(&l->end, C);
        hubert_add(l, HUBERT_CONV, p->positions, 3, C, width, K, "%s.weight", conv);
        hubert_add(l, HUBERT_ELSEWHERE, 0, 1, C, 0, 0, "%s.weight", norm);
        hubert_add(l, HUBERT_ELSEWHERE, 0, 1, C, 0, 0, "%s.bias", norm);
        hubert_add(l, HUBERT_ELSEWHERE, 0, 1, C, 0, 0, "%s.running_mean", norm);
        hubert_add(l, HUBERT_ELSEWHERE, 0, 1, C, 0, 0, "%s.running_var", norm);
    } else {
        hubert_add(l, HUBERT_ELSEWHERE, 0, 3, 1, 1, K, "%s.%s", conv, newer ? "parametrizations.weight.original0" : "weight_g");
        hubert_add(l, HUBERT_ELSEWHERE, 0, 3, C, width, K, "%s.%s", conv, newer ? "parametrizations.weight.original1" : "weight_v");
    }
    if (!k->stable) p->norm = hubert_add_norm(l, &l->end, 0, C, "encoder.layer_norm");
}

static void hubert_add_layer(hubert_list_of *l, const hubert_config *k, hubert_places *p, int i) {
    static const char *const qkv[] = {"q_proj", "k_proj", "v_proj"};
    const size_t C = k->C, F = k->F, base = p->layer + i * p->layer_size;
    char name[64];
    size_t end = 0;
    p->qkv = hubert_place(&end, 3 * C * C);
    p->qkv_bias = hubert_place(&end, 3 * C);
    for (int j = 0; j < 3; j++) {
        hubert_add(l, HUBERT_PLAIN, base + p->qkv + j * C * C, 2, C, C, 0, "encoder.layers.%d.attention.%s.weight", i, qkv[j]);
        hubert_add(l, HUBERT_PLAIN, base + p->qkv_bias + j * C, 1, C, 0, 0, "encoder.layers.%d.attention.%s.bias", i, qkv[j]);
    }
    p->out = hubert_place(&end, C * C), p->out_bias = hubert_place(&end, C);
    p->up = hubert_place(&end, F * C), p->up_bias = hubert_place(&end, F);
    p->down = hubert_place(&end, C * F), p->down_bias = hubert_place(&end, C);
    hubert_add(l, HUBERT_PLAIN, base + p->out, 2, C, C, 0, "encoder.layers.%d.attention.out_proj.weight", i);
    hubert_add(l, HUBERT_PLAIN, base + p->out_bias, 1, C, 0, 0, "encoder.layers.%d.attention.out_proj.bias", i);
    hubert_add(l, HUBERT_PLAIN, base + p->up, 2, F, C, 0, "encoder.layers.%d.feed_forward.intermediate_dense.weight", i);
    hubert_add(l, HUBERT_PLAIN, base + p->up_bias, 1, F, 0, 0, "encoder.layers.%d.feed_forward.intermediate_dense.bias", i);
    hubert_add(l, HUBERT_PLAIN, base + p->down, 2, C, F, 0, "encoder.layers.%d.feed_forward.output_dense.weight", i);
    hubert_add(l, HUBERT_PLAIN, base + p->down_bias, 1, C, 0, 0, "encoder.layers.%d.feed_forward.output_dense.bias", i);
    snprintf(name, sizeof name, "encoder.layers.%d.layer_norm", i);
    p->attention_norm = hubert_add_norm(l, &end, base, C, name);
    snprintf(name, sizeof name, "encoder.layers.%d.final_layer_norm", i);
    p->mlp_norm = hubert_add_norm(l, &end, base, C, name);
    p->layer_size = end;
}

/* What a HuBERT file may hold and this use of it does not need: layers above, what training and other heads add. */
static int hubert_is_extra(const slam_hubert *h, const char *name, int with_head) {
    int layer = 0, end = 0;
    if (sscanf(name, "encoder.layers.%d.%n", &layer, &end) == 1 && end) return layer >= h->layer && layer < h->config.L;
    return !strcmp(name, "masked_spec_embed") || path_ends(name, "num_batches_tracked") ||
           (h->config.stable && !strncmp(name, "encoder.layer_norm.", 19)) ||
           (with_head && (!strncmp(name, "lm_head.", 8) || !strncmp(name, "projector.", 10) || !strncmp(name, "classifier.", 11) ||
                          !strcmp(name, "layer_weights")));
}

/* Every tensor of the list is in the file, with its shape; nothing unknown is. */
static int hubert_match(const slam_hubert *h, hubert_list_of *l, const tensors *file, const char *folder, const char *prefix) {
    const size_t skip = strlen(prefix);
    for (size_t i = 0; i < l->n; i++) {
        hubert_tensor *t = &l->list[i];
        char name[128];
        snprintf(name, sizeof name, "%s%s", prefix, t->name);
        t->from = tensors_find(file, name);
        if (!t->from) return fail("%s: tensor '%s' is missing", folder, name);
        if (t->rank < 3 && !tensor_shape_is(t->from, t->rank, t->shape[0], t->shape[1])) return 0;
        if (t->rank == 3 && (t->from->rank != 3 || memcmp(t->from->shape, t->shape, sizeof t->shape) != 0))
            return fail("%s: tensor '%s' has another shape than the expected (%zu,%zu,%zu)", folder, name, t->shape[0], t->shape[1],
                        t->shape[2]);
    }
    for (size_t k = 0; k < tensors_count(file); k++) {
        const tensor *t = tensors_at(file, k);
        const int inside = !strncmp(t->name, prefix, skip);
        size_t i = 0;
        while (i < l->n && l->list[i].from != t) i++;
        if (i == l->n && !hubert_is_extra(h, t->name + (inside ? skip : 0), !inside || !skip))
            return fail("%s: tensor '%s' is not part of this model", t->file, t->name);
    }
    return 1;
}

/* The tensor's numbers in memory of the caller's */
static float *hubert_floats(const tensor *t) {
    float *host = (float *)mem_new(t->count, sizeof *host);
    int ok = host && tensor_floats(t, host, 0, t->count);
    for (size_t i = 0; ok && i < t->count; i++)
        if (!isfinite(host[i])) ok = fail("%s: tensor '%s' holds a number that is not finite", t->file, t->name);
    if (ok) return host;
    free(host);
    return NULL;
}

static slam_act *hubert_weight(const slam_hubert *h, size_t at) {
    return (slam_act *)((char *)h->weights + at * h->ops->bytes_per_act);
}

/* n numbers to the device, rounded to its type; the hash takes them as they were, four bytes at a time for its speed */
static int hubert_upload(slam_hubert *h, size_t at, const float *host, size_t n) {
    slam_ops *ops = h->ops;
    float *wide = (float *)ops->alloc(ops, n * sizeof *wide);
    if (!wide) return 0;
    h->hash ^= at;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &host[i], sizeof bits);
        h->hash = (h->hash ^ bits) * HASH_PRIME;
    }
    ops->upload(ops, wide, host, n * sizeof *wide);
    ops->to_act(ops, hubert_weight(h, at), wide, n);
    ops->release(ops, wide);
    return 1;
}

/* (OC,C,K) to (OC,K,C), with what stands at tap k times scale[k], where there is one */
static int hubert_upload_conv(slam_hubert *h, size_t at, const float *w, const float *scale, const size_t *shape) {
    const size_t OC = shape[0], C = shape[1], K = shape[2];
    float *turned = (float *)mem_new(OC * C * K, sizeof *turned);
    if (!turned) return 0;
    for (size_t o = 0; o < OC; o++)
        for (size_t c = 0; c < C; c++)
            for (size_t k = 0; k < K; k++) turned[(o * K + k) * C + c] = w[(o * C + c) * K + k] * (scale ? scale[k] : 1);
    const int ok = hubert_upload(h, at, turned, OC * C * K);
    free(turned);
    return ok;
}

/* Weight norm (Salimans and Kingma 2016) over all but the taps: w_ock = g_k v_ock / |v_k| */
static int hubert_weight_norm(slam_hubert *h, const hubert_tensor *g, const hubert_tensor *v) {
    const size_t K = v->shape[2], rows = v->shape[0] * v->shape[1];
    float *scale = hubert_floats(g->from), *w = hubert_floats(v->from);
    for (size_t k = 0; scale && w && k < K; k++) {
        double squares = 0;
        for (size_t i = 0; i < rows; i++) squares += (double)w[i * K + k] * w[i * K + k];
        scale[k] = squares > 0 ? (float)(scale[k] / sqrt(squares)) : 0;
    }
    const int ok = scale && w && hubert_upload_conv(h, h->at.positions, w, scale, v->shape);
    free(scale);
    free(w);
    return ok;
}

/* Batch norm (Ioffe and Szegedy 2015) with the statistics of training: x (w / sqrt(var + 1e-5)) + b - mean (...); `list` has w, b,
   mean and var */
static int hubert_batch_norm(slam_hubert *h, const hubert_tensor *list) {
    const size_t C = list->shape[0];
    float *x[4];
    int ok = 1;
    for (int i = 0; i < 4; i++) ok = (x[i] = hubert_floats(list[i].from)) != NULL && ok;
    for (size_t c = 0; ok && c < C; c++) {
        const double scale = x[0][c] / sqrt((double)x[3][c] + 1e-5);
        if (!isfinite(scale)) ok = fail("%s: tensor '%s' holds a variance of %g", list[3].from->file, list[3].from->name, x[3][c]);
        x[0][c] = (float)scale;
        x[1][c] = (float)(x[1][c] - x[2][c] * scale);
    }
    ok = ok && hubert_upload(h, h->at.scale, x[0], C) && hubert_upload(h, h->at.shift, x[1], C);
    for (int i = 0; i < 4; i++) free(x[i]);
    return ok;
}

static int hubert_fill(slam_hubert *h, const hubert_list_of *l) {
    for (size_t i = 0; i < l->n; i++) {
        const hubert_tensor *t = &l->list[i];
        if (t->kind == HUBERT_ELSEWHERE) {
            if (!(h->config.batch_norm ? hubert_batch_norm(h, t) : hubert_weight_norm(h, t, t + 1))) return 0;
            i += h->config.batch_norm ? 3 : 1;
            continue;
        }
        float *host = hubert_floats(t->from);
        const int ok = host && (t->kind == HUBERT_CONV ? hubert_upload_conv(h, t->at, host, NULL, t->shape)
                                                       : hubert_upload(h, t->at, host, t->from->count));
        free(host);
        if (!ok) return 0;
    }
    return h->ops->finish(h->ops);
}

void slam_hubert_free(slam_hubert *h) {
    if (!h) return;
    h->ops->release(h->ops, h->arena);
    h->ops->release(h->ops, h->weights);
    free(h);
}

/* The list is checked against the file before memory for the weights is asked for. */
static int hubert_load(slam_hubert *h, const tensors *file, const char *folder) {
    const char *prefix = tensors_find(file, "hubert.encoder.pos_conv_embed.conv.bias") ? "hubert." : "";
    hubert_list_of l = {NULL, 0, 0};
    char name[96];
    l.list = (hubert_tensor *)mem_new(4 * HUBERT_CONVS + 16 + 16 * (size_t)h->layer, sizeof *l.list);
    if (!l.list) return 0;
    snprintf(name, sizeof name, "%sencoder.pos_conv_embed.conv.parametrizations.weight.original0", prefix);
    hubert_add_convolutions(&l, &h->config, &h->at);
    hubert_add_positions(&l, &h->config, &h->at, tensors_find(file, name) != NULL);
    h->at.layer = l.end;
    for (int i = 0; i < h->layer; i++) hubert_add_layer(&l, &h->config, &h->at, i);
    h->at.total = l.end + h->layer * h->at.layer_size;
    int ok = hubert_match(h, &l, file, folder, prefix);
    if (ok) h->weights = (slam_act *)h->ops->alloc(h->ops, h->at.total * h->ops->bytes_per_act);
    ok = ok && h->weights && hubert_fill(h, &l);
    free(l.list);
    return ok;
}

slam_hubert *slam_hubert_load(slam_ops *ops, const char *folder, int layer) {
    slam_hubert *h = (slam_hubert *)mem_new(1, sizeof *h);
    char *path = path_join(folder, "config.json");
    int ok = h && path && hubert_config_read(&h->config, path);
    if (ok && (layer < 0 || layer > h->config.L))
        ok = fail("%s: layer %d was asked for, expected 0 to %d (num_hidden_layers)", path, layer, h->config.L);
    tensors *file = ok ? tensors_open(folder) : NULL;
    if (h) {
        h->ops = ops;
        h->layer = layer;
        h->hash = hash_bytes(HASH_START, &h->config, sizeof h->config);
    }
    ok = file && hubert_load(h, file, folder);
    tensors_close(file);
    free(path);
    if (ok) return h;
    slam_hubert_free(h);
    return NULL;
}

int slam_hubert_width(const slam_hubert *h) { return h->config.C; }
uint64_t slam_hubert_hash(const slam_hubert *h) { return h->hash; }

int slam_hubert_step(const slam_hubert *h) {
    int step = 1;
    for (int i = 0; i < h->config.convs; i++) step *= h->config.stride[i];
    return step;
}

/* ---- HuBERT: from samples to features ----
   Utterances lie in rows of equal length, a multiple of what a frame of features covers, so that after each convolution a row has
   its length divided by the stride. A frame that lies in an utterance never reads past its end; norms over time and attention are
   told where it ends; before the convolution for positions, which looks both ways, later frames are zeroed. So nothing that stands
   behind an utterance can change its features. */

/* Frames after the first `convs` convolutions */
static long hubert_frames(const hubert_config *k, long samples, int convs) {
    long n = samples < 0 ? 0 : samples + 2 * HUBERT_PADDING;
    for (int i = 0; i < convs; i++) n = n < k->kernel[i] ? 0 : (n - k->kernel[i]) / k->stride[i] + 1;
    return n;
}

long slam_hubert_frames(const slam_hubert *h, long samples) { return hubert_frames(&h->config, samples, h->config.convs); }

/* A batch as it goes through: places in the arena, in bytes. First what stays, then either the convolutions' or the
   transformer's. */
typedef struct hubert_batch {
    int B, n, T, slice; // rows, of which the first n have an utterance; frames of a row, rows convolved at once
    size_t S;           // samples of a row
    int K;              // centroids that the nearest is found of; 0: none are
    size_t x, doc_start, doc_end, frames,
        first_frames;                // (B,T,C) (B,T) (B,T) (B) (B): frames in the end, after the first convolution
    size_t wide, samples, even, odd; // (slice,S) float, (slice,S), outputs of the convolutions in turn
    size_t grouped, delta, normed, qkv, attention, lse; // (B,G,T+K-1,C/G) (B,T,C) (B,T,C) (B,T,3C) (B,T,C) (B,NH,T)
    size_t mlp;                                         // (B,T,F); in the end (B,T,C) or (B,T,K) float
    size_t nearest;                                     // (B,T)
    size_t total;
} hubert_batch;

static size_t hubert_bytes(size_t *end, size_t bytes) {
    const size_t at = *end;
    *end += (bytes + 255) / 256 * 256;
    return at;
}

/* Frames behind the last row that the next convolution may read */
static size_t hubert_slack(const hubert_config *k, int conv) { return conv < k->convs ? (size_t)k->kernel[conv] : 0; }

static void hubert_plan(const slam_hubert *h, hubert_batch *b) {
    const hubert_config *k = &h->config;
    const size_t act = h->ops->bytes_per_act, C = k->C, N = (size_t)b->B * b->T, rows = b->slice;
    size_t end = 0, frames = rows * b->S, largest[2] = {0, 0};
    b->x = hubert_bytes(&end, N * C * act);
    b->doc_start = hubert_bytes(&end, N * sizeof(int));
    b->doc_end = hubert_bytes(&end, N * sizeof(int));
    b->frames = hubert_bytes(&end, b->B * sizeof(int));
    b->first_frames = hubert_bytes(&end, b->B * sizeof(int));
    size_t other = end;
    for (int i = 0; i < k->convs; i++) {
        frames /= k->stride[i];
        const size_t n = (frames + hubert_slack(k, i + 1)) * k->width[i];
        if (n > largest[i % 2]) largest[i % 2] = n;
    }
    b->wide = hubert_bytes(&end, act == sizeof(float) ? 0 : rows * b->S * sizeof(float));
    b->samples = hubert_bytes(&end, (rows * b->S + hubert_slack(k, 0)) * act);
    b->even = hubert_bytes(&end, largest[0] * act);
    b->odd = hubert_bytes(&end, largest[1] * act);
    b->grouped = hubert_bytes(&other, (size_t)b->B * (b->T + k->taps - 1) * C * act);
    b->delta = hubert_bytes(&other, N * C * act);
    b->normed = hubert_bytes(&other, N * C * act);
    b->qkv = hubert_bytes(&other, 3 * N * C * act);
    b->attention = hubert_bytes(&other, N * C * act);
    b->lse = hubert_bytes(&other, N * k->NH * sizeof(float));
    b->mlp = hubert_bytes(&other, N *
                                      (size_t)(k->F > k->C   ? k->F > b->K ? k->F : b->K
                                               : k->C > b->K ? k->C
                                                             : b->K) *
                                      sizeof(float));
    b->nearest = hubert_bytes(&other, N * sizeof(int));
    b->total = other > end ? other : end;
}

static slam_act *hubert_act(const slam_hubert *h, size_t at) { return (slam_act *)(h->arena + at); }

/* Samples of rows first .. first + rows - 1, with zeros around them */
static int hubert_samples(slam_hubert *h, const hubert_batch *b, int first, int rows, const float *const *samples,
                          const long *lengths) {
    slam_ops *ops = h->ops;
    const size_t n = (size_t)rows * b->S;
    float *host = (float *)mem_new(n, sizeof *host);
    if (!host) return 0;
    for (int r = 0; r < rows && first + r < b->n; r++)
        memcpy(host + r * b->S + HUBERT_PADDING, samples[first + r], (size_t)lengths[first + r] * sizeof *host);
    void *to = h->arena + (ops->bytes_per_act == sizeof(float) ? b->samples : b->wide);
    ops->upload(ops, to, host, n * sizeof *host);
    if (ops->bytes_per_act != sizeof(float)) ops->to_act(ops, hubert_act(h, b->samples), (const float *)to, n);
    free(host);
    return 1;
}

/* x rows first .. first + rows - 1 from the samples in the arena: convolutions with their norms, and the projection. */
static void hubert_convolve(slam_hubert *h, const hubert_batch *b, int first, int rows) {
    slam_ops *ops = h->ops;
    const hubert_config *k = &h->config;
    const hubert_places *at = &h->at;
    const size_t act = ops->bytes_per_act;
    const int *first_frames = (const int *)(h->arena + b->first_frames) + first;
    char *x = h->arena + b->samples;
    int T = (int)b->S, C = 1;
    for (int i = 0; i < k->convs; i++) {
        const int has_norm = i == 0 || k->all_norms, TO = T / k->stride[i], OC = k->width[i];
        const slam_conv c = {rows, 1, T, C, TO, OC, k->kernel[i], k->stride[i], !has_norm};
        slam_act *out = hubert_act(h, i % 2 ? b->odd : b->even), *w = hubert_weight(h, at->conv_norm[i].w),
                 *bias = hubert_weight(h, at->conv_norm[i].b);
        ops->zero(ops, x + (size_t)rows * T * C * act, hubert_slack(k, i) * C * act);
        ops->conv1d(ops, out, (const slam_act *)x, hubert_weight(h, at->conv[i]),
                    k->conv_bias ? hubert_weight(h, at->conv_bias[i]) : NULL, &c);
        if (k->all_norms) ops->layernorm(ops, NULL, out, out, NULL, w, bias, 1e-5f, 1, rows * TO, OC);
        else if (i == 0) ops->channelnorm(ops, out, w, bias, first_frames, 1e-5f, rows, TO, OC);
        x = (char *)out;
        T = TO;
        C = OC;
    }
    slam_act *features = (slam_act *)x;
    if (k->projection_norm)
        ops->layernorm(ops, NULL, features, features, NULL, hubert_weight(h, at->projection_norm.w),
                       hubert_weight(h, at->projection_norm.b), (float)k->eps, 0, rows * T, C);
    ops->matmul_forward(ops, hubert_act(h, b->x + (size_t)first * T * k->C * act), features, hubert_weight(h, at->projection),
                        hubert_weight(h, at->projection_bias), rows * T, C, k->C);
}

static void hubert_positions(slam_hubert *h, const hubert_batch *b) {
    slam_ops *ops = h->ops;
    const hubert_config *k = &h->config;
    const hubert_places *at = &h->at;
    const int C = k->C, width = C / k->groups, T = b->T, padded = T + k->taps - 1;
    const int *frames = (const int *)(h->arena + b->frames);
    const slam_conv c = {b->B, k->groups, padded, width, T, width, k->taps, 1, 1};
    slam_act *x = hubert_act(h, b->x), *grouped = hubert_act(h, b->grouped), *delta = hubert_act(h, b->delta);
    ops->mask_frames(ops, x, frames, b->B, T, C);
    ops->group_frames(ops, grouped, x, frames, k->batch_norm ? hubert_weight(h, at->scale) : NULL,
                      k->batch_norm ? hubert_weight(h, at->shift) : NULL, k->taps / 2, b->B, T, padded, C, k->groups);
    ops->conv1d(ops, delta, grouped, hubert_weight(h, at->positions), hubert_weight(h, at->positions_bias), &c);
    if (k->stable) ops->layernorm(ops, x, NULL, x, delta, NULL, NULL, 0, 0, b->B * T, C);
    else
        ops->layernorm(ops, NULL, x, x, delta, hubert_weight(h, at->norm.w), hubert_weight(h, at->norm.b), (float)k->eps, 0,
                       b->B * T, C);
}

static void hubert_layer(slam_hubert *h, const hubert_batch *b, const slam_window *win, int l) {
    slam_ops *ops = h->ops;
    const hubert_config *k = &h->config;
    const hubert_places *at = &h->at;
    const int C = k->C, F = k->F, N = b->B * b->T;
    const size_t base = at->layer + l * at->layer_size;
    const float eps = (float)k->eps;
    slam_act *x = hubert_act(h, b->x), *delta = hubert_act(h, b->delta), *qkv = hubert_act(h, b->qkv),
             *attention = hubert_act(h, b->attention), *mlp = hubert_act(h, b->mlp), *in = k->stable ? hubert_act(h, b->normed) : x;
    slam_act *w1 = hubert_weight(h, base + at->attention_norm.w), *b1 = hubert_weight(h, base + at->attention_norm.b),
             *w2 = hubert_weight(h, base + at->mlp_norm.w), *b2 = hubert_weight(h, base + at->mlp_norm.b);
    if (k->stable) ops->layernorm(ops, NULL, in, x, NULL, w1, b1, eps, 0, N, C);
    ops->matmul_forward(ops, qkv, in, hubert_weight(h, base + at->qkv), hubert_weight(h, base + at->qkv_bias), N, C, 3 * C);
    ops->attention_forward(ops, attention, (float *)(h->arena + b->lse), qkv, win);
    ops->matmul_forward(ops, delta, attention, hubert_weight(h, base + at->out), hubert_weight(h, base + at->out_bias), N, C, C);
    if (k->stable) ops->layernorm(ops, x, in, x, delta, w2, b2, eps, 0, N, C);
    else ops->layernorm(ops, NULL, x, x, delta, w1, b1, eps, 0, N, C);
    ops->matmul_forward(ops, mlp, in, hubert_weight(h, base + at->up), hubert_weight(h, base + at->up_bias), N, C, F);
    ops->gelu(ops, mlp, (size_t)N * F);
    ops->matmul_forward(ops, delta, mlp, hubert_weight(h, base + at->down), hubert_weight(h, base + at->down_bias), N, F, C);
    if (k->stable) ops->layernorm(ops, x, NULL, x, delta, NULL, NULL, 0, 0, N, C);
    else ops->layernorm(ops, NULL, x, x, delta, w2, b2, eps, 0, N, C);
}

/* Frames of the utterances, and the windows of attention. Frames behind an utterance see its first one, so that no tile of
   attention is wider than the utterance. A row without an utterance has a frame of silence. */
static int hubert_lengths(slam_hubert *h, const hubert_batch *b, const long *lengths) {
    const size_t N = (size_t)b->B * b->T;
    int *ints = (int *)mem_new(N + 2 * (size_t)b->B, sizeof *ints), *frames = ints + N, *first = frames + b->B;
    if (!ints) return 0;
    for (int i = 0; i < b->B; i++) {
        frames[i] = i < b->n ? (int)slam_hubert_frames(h, lengths[i]) : 1;
        first[i] = i < b->n ? (int)hubert_frames(&h->config, lengths[i], 1) : 1;
        for (int t = 0; t < b->T; t++) ints[(size_t)i * b->T + t] = t < frames[i] ? frames[i] : 1;
    }
    h->ops->upload(h->ops, h->arena + b->doc_end, ints, N * sizeof *ints);
    h->ops->upload(h->ops, h->arena + b->frames, frames, b->B * sizeof *ints);
    h->ops->upload(h->ops, h->arena + b->first_frames, first, b->B * sizeof *ints);
    h->ops->zero(h->ops, h->arena + b->doc_start, N * sizeof *ints);
    free(ints);
    return 1;
}

/* Room for B rows of S samples, a multiple of slam_hubert_step. */
static int hubert_room(slam_hubert *h, hubert_batch *b) {
    const hubert_config *k = &h->config;
    slam_ops *ops = h->ops;
    b->T = (int)(b->S / (size_t)slam_hubert_step(h));
    b->slice = (long)HUBERT_SLICE / (long)b->S < 1 ? 1 : (int)(HUBERT_SLICE / b->S);
    if (b->slice > b->B) b->slice = b->B;
    if ((double)b->B * b->T * (k->F > 3 * k->C ? k->F : 3 * k->C) > 1e15)
        return fail("a batch of %d utterances is too large", b->B);
    if ((double)b->B * (b->T + k->taps) * k->groups > INT_MAX)
        return fail("a batch of %d rows of %d frames: expected fewer", b->B, b->T);
    hubert_plan(h, b);
    if (b->total <= h->arena_bytes) return 1;
    ops->release(ops, h->arena);
    h->arena = (char *)ops->alloc(ops, b->total);
    h->arena_bytes = h->arena ? b->total : 0;
    return h->arena != NULL;
}

/* The batch of n utterances, each of one frame at least, as far as the layer: x in the arena. */
static int hubert_run(slam_hubert *h, const hubert_batch *b, const float *const *samples, const long *lengths) {
    if (!hubert_lengths(h, b, lengths)) return 0;
    for (int first = 0; first < b->B; first += b->slice) {
        const int rows = b->B - first < b->slice ? b->B - first : b->slice;
        if (!hubert_samples(h, b, first, rows, samples, lengths)) return 0;
        hubert_convolve(h, b, first, rows);
    }
    const slam_window win = {b->B,
                             b->T,
                             h->config.NH,
                             h->config.NH,
                             h->config.C / h->config.NH,
                             (const int *)(h->arena + b->doc_start),
                             (const int *)(h->arena + b->doc_end),
                             NULL,
                             NULL};
    hubert_positions(h, b);
    for (int l = 0; l < h->layer; l++) hubert_layer(h, b, &win, l);
    return 1;
}

/* features[i] (frames_i, C) */
static int hubert_features(slam_hubert *h, const hubert_batch *b, const long *lengths, float *const *features) {
    slam_ops *ops = h->ops;
    const size_t row = (size_t)b->T * h->config.C;
    float *out = (float *)(h->arena + b->x);
    if (ops->bytes_per_act != sizeof(float)) {
        out = (float *)(h->arena + b->mlp);
        ops->to_float(ops, out, hubert_act(h, b->x), b->B * row);
    }
    for (int i = 0; i < b->n; i++)
        ops->download(ops, features[i], out + i * row, (size_t)slam_hubert_frames(h, lengths[i]) * h->config.C * sizeof(float));
    return ops->finish(ops);
}

/* The utterances that have a frame, in a batch whose rows are as long as the longest. */
int slam_hubert_features(slam_hubert *h, int n, const float *const *samples, const long *lengths, float *const *features) {
    const size_t room = (size_t)(n > 0 ? n : 0), step = (size_t)slam_hubert_step(h);
    hubert_batch b = SLAM_ZERO;
    long most = 0, *long_enough = (long *)mem_new(room, sizeof *long_enough);
    const float **from = (const float **)mem_new(room, sizeof *from);
    float **to = (float **)mem_new(room, sizeof *to);
    int ok = long_enough && from && to;
    for (int i = 0; ok && i < n; i++) {
        if (lengths[i] > INT_MAX / 4) ok = fail("an utterance of %ld samples: expected at most %d", lengths[i], INT_MAX / 4);
        if (!ok || slam_hubert_frames(h, lengths[i]) == 0) continue;
        if (lengths[i] > most) most = lengths[i];
        from[b.n] = samples[i];
        to[b.n] = features[i];
        long_enough[b.n++] = lengths[i];
    }
    b.B = b.n;
    b.S = ((size_t)most + 2 * HUBERT_PADDING + step - 1) / step * step;
    ok =
        ok && (b.n == 0 || (hubert_room(h, &b) && hubert_run(h, &b, from, long_enough) && hubert_features(h, &b, long_enough, to)));
    free(long_enough);
    free(from);
    free(to);
    return ok;
}

/* ---- nearest centroids ----
   Centroids lie in blocks of 16, (K / 16, D, 16), so that 16 distances are summed side by side, each over its D differences in
   order: the sums, and with them the units, are the same for every vector width. */

enum { CENTROID_LANES = 16 };

static size_t centroid_blocks(int K) { return ((size_t)K + CENTROID_LANES - 1) / CENTROID_LANES; }

static void centroid_lanes(float *lanes, const float *centroids, int K, int D) {
    for (int k = 0; k < K; k++)
        for (int d = 0; d < D; d++)
            lanes[((size_t)(k / CENTROID_LANES) * (size_t)D + (size_t)d) * CENTROID_LANES + (size_t)(k % CENTROID_LANES)] =
                centroids[(size_t)k * (size_t)D + (size_t)d];
}

typedef float centroid_vector __attribute__((vector_size(4 * CENTROID_LANES), aligned(4), may_alias));
enum { CENTROID_FRAMES = 4 }; // that share what is loaded of a block

/* distance = (4, 16) from four frames and a block of centroids */
SPEECH_EXACT static void centroid_distances(float *distance, const float *const *x, const float *lanes, int D) {
    centroid_vector sum0 = SLAM_ZERO, sum1 = SLAM_ZERO, sum2 = SLAM_ZERO, sum3 = SLAM_ZERO;
    for (int d = 0; d < D; d++) {
        const centroid_vector c = *(const centroid_vector *)(lanes + d * CENTROID_LANES);
        const centroid_vector e0 = c - x[0][d], e1 = c - x[1][d], e2 = c - x[2][d], e3 = c - x[3][d];
        sum0 += e0 * e0;
        sum1 += e1 * e1;
        sum2 += e2 * e2;
        sum3 += e3 * e3;
    }
    centroid_vector *out = (centroid_vector *)distance;
    out[0] = sum0;
    out[1] = sum1;
    out[2] = sum2;
    out[3] = sum3;
}

/* The first of the nearest to each of up to four frames; its squared distance in *least. */
static void centroids_nearest(const float *frames, int n, const float *lanes, int K, int D, int *nearest, float *least) {
    float distance[CENTROID_FRAMES * CENTROID_LANES];
    const float *x[CENTROID_FRAMES];
    for (int i = 0; i < CENTROID_FRAMES; i++) x[i] = frames + (size_t)(i < n ? i : 0) * (size_t)D;
    for (int i = 0; i < n; i++) {
        nearest[i] = 0;
        least[i] = INFINITY;
    }
    for (int first = 0; first < K; first += CENTROID_LANES) {
        centroid_distances(distance, x, lanes + (size_t)first * (size_t)D, D);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < CENTROID_LANES && first + j < K; j++)
                if (distance[i * CENTROID_LANES + j] < least[i]) {
                    least[i] = distance[i * CENTROID_LANES + j];
                    nearest[i] = first + j;
                }
    }
}

static void centroids_assign(const float *frames, size_t n, const float *lanes, int K, int D, int *unit, float *distance) {
    SLAM_PARALLEL_FOR
    for (int64_t i = 0; i < (int64_t)n; i += CENTROID_FRAMES) {
        float least[CENTROID_FRAMES];
        const int count = (int64_t)n - i < CENTROID_FRAMES ? (int)((int64_t)n - i) : CENTROID_FRAMES;
        centroids_nearest(frames + (size_t)i * (size_t)D, count, lanes, K, D, unit + i, least);
        if (distance) memcpy(distance + i, least, (size_t)count * sizeof *least);
    }
}

/* ---- fitting centroids ---- */

typedef struct kmeans_fit {
    slam_ranks *ranks; // all have all frames; the search for the nearest centroids is shared among them
    const float *x;
    size_t n;
    int D, K;
    uint64_t state;
    float *centroid, *lanes;
    size_t *order;         // (n), a permutation: seeds and mini-batches are its runs
    int *unit;             // (n)
    float *distance;       // (n), squared, to the nearest centroid
    size_t *count, *first; // (K), (K + 1): frames of a centroid, their place in `order` once it is sorted by centroid
    slam_speech_watch *watch;
    void *context;
} kmeans_fit;

static int fit_tell(const kmeans_fit *f, size_t passes) {
    slam_speech_progress p = SLAM_ZERO;
    p.stage = "fit";
    p.done = passes;
    const int stop = f->watch && !f->watch(f->context, &p);
    return !slam_ranks_max(f->ranks, stop) || fail("stopped before the centroids were found");
}

static const float *fit_frame(const kmeans_fit *f, size_t i) { return f->x + i * (size_t)f->D; }
static float *fit_centroid(const kmeans_fit *f, int k) { return f->centroid + (size_t)k * (size_t)f->D; }

SPEECH_EXACT static float squared_distance(const float *a, const float *b, int D) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += (a[d] - b[d]) * (a[d] - b[d]);
    return sum;
}

static void fit_shuffle(kmeans_fit *f) {
    for (size_t i = f->n; i > 1; i--) {
        const size_t j = (size_t)rng_below(&f->state, i), swap = f->order[i - 1];
        f->order[i - 1] = f->order[j];
        f->order[j] = swap;
    }
}

/* x (n elements of `size` bytes): what each rank has of its share becomes everyone's. */
static int fit_gather(const kmeans_fit *f, void *x, size_t n, size_t size) {
    const int ranks = slam_ranks_count(f->ranks);
    size_t first, end, bytes;
    if (ranks == 1) return 1;
    slam_ranks_share(f->ranks, n, &first, &end);
    void *all = slam_ranks_all_gather(f->ranks, (char *)x + first * size, (end - first) * size, &bytes);
    if (all) memcpy(x, all, n * size);
    free(all);
    return all != NULL;
}

/* The nearest centroids of frames x (n): `unit`, and `distance` where it is not NULL */
static int fit_nearest(kmeans_fit *f, const float *x, size_t n, float *distance) {
    size_t first, end;
    slam_ranks_share(f->ranks, n, &first, &end);
    centroid_lanes(f->lanes, f->centroid, f->K, f->D);
    centroids_assign(x + first * (size_t)f->D, end - first, f->lanes, f->K, f->D, f->unit + first,
                     distance ? distance + first : NULL);
    return fit_gather(f, f->unit, n, sizeof *f->unit) && (!distance || fit_gather(f, distance, n, sizeof *distance));
}

/* k-means++: each further centroid is a frame drawn with probability proportional to its squared distance from those before,
   among the first m frames of the order. */
static void fit_seed(kmeans_fit *f, size_t m) {
    for (size_t i = 0; i < m; i++) f->distance[i] = INFINITY;
    size_t drawn = 0;
    for (int k = 0; k < f->K; k++) {
        const float *c = fit_frame(f, f->order[drawn]);
        memcpy(fit_centroid(f, k), c, (size_t)f->D * sizeof *c);
        SLAM_PARALLEL_FOR
        for (int64_t i = 0; i < (int64_t)m; i++) {
            const float d = squared_distance(fit_frame(f, f->order[i]), c, f->D);
            if (d < f->distance[i]) f->distance[i] = d;
        }
        double all = 0, sum = 0;
        for (size_t i = 0; i < m; i++) all += f->distance[i];
        const double until = all * rng_uniform(&f->state);
        drawn = (size_t)k + 1 < m ? (size_t)k + 1 : 0; // where all are centroids already
        for (size_t i = 0; all > 0 && i < m; i++) {
            if (f->distance[i] > 0) drawn = i;
            sum += f->distance[i];
            if (sum > until) break;
        }
    }
}

/* Each centroid moves to the running mean of all frames that the batches so far gave it. */
SPEECH_EXACT static int fit_mini_batch(kmeans_fit *f, size_t first, size_t m, float *batch) {
    const size_t D = (size_t)f->D;
    for (size_t i = 0; i < m; i++) memcpy(batch + i * D, fit_frame(f, f->order[first + i]), D * sizeof *batch);
    if (!fit_nearest(f, batch, m, NULL)) return 0;
    for (size_t i = 0; i < m; i++) {
        float *c = fit_centroid(f, f->unit[i]);
        const float step = 1 / (float)++f->count[f->unit[i]];
        for (size_t d = 0; d < D; d++) c[d] += step * (batch[i * D + d] - c[d]);
    }
    return 1;
}

/* Assigns every frame; `order` becomes the frames of centroid 0, of 1, ... *inertia: the mean squared distance. */
static int fit_assign(kmeans_fit *f, double *inertia) {
    double sum = 0;
    if (!fit_nearest(f, f->x, f->n, f->distance)) return 0;
    memset(f->first, 0, ((size_t)f->K + 1) * sizeof *f->first);
    for (size_t i = 0; i < f->n; i++) {
        f->first[f->unit[i] + 1]++;
        sum += f->distance[i];
    }
    for (int k = 0; k < f->K; k++) {
        f->count[k] = f->first[k + 1];
        f->first[k + 1] += f->first[k];
    }
    for (size_t i = f->n; i-- > 0;) f->order[f->first[f->unit[i]] + --f->count[f->unit[i]]] = i;
    for (int k = 0; k < f->K; k++) f->count[k] = f->first[k + 1] - f->first[k];
    *inertia = sum / (double)f->n;
    return 1;
}

/* Centroids to the means of their frames; one without frames goes to the frame furthest from its own. How many those were. */
static int fit_update(kmeans_fit *f) {
    int reseeded = 0;
    SLAM_PARALLEL_FOR
    for (int k = 0; k < f->K; k++)
        for (int d = 0; d < f->D && f->count[k]; d++) {
            double sum = 0;
            for (size_t i = f->first[k]; i < f->first[k + 1]; i++) sum += fit_frame(f, f->order[i])[d];
            fit_centroid(f, k)[d] = (float)(sum / (double)f->count[k]);
        }
    for (int k = 0; k < f->K; k++) {
        if (f->count[k]) continue;
        size_t far = 0;
        for (size_t i = 1; i < f->n; i++)
            if (f->distance[i] > f->distance[far]) far = i;
        if (f->distance[far] <= 0) break; // every frame is a centroid
        memcpy(fit_centroid(f, k), fit_frame(f, far), (size_t)f->D * sizeof *f->centroid);
        f->distance[far] = 0;
        reseeded++;
    }
    return reseeded;
}

static int fit_run(kmeans_fit *f, float *batch, size_t batch_size, slam_kmeans_report *report) {
    for (size_t i = 0; i < f->n; i++) f->order[i] = i;
    fit_shuffle(f);
    const size_t seeds = 100 * (size_t)f->K;
    fit_seed(f, f->n < seeds ? f->n : seeds);
    size_t at = 0;
    for (int i = 0; i < 100; i++, at += batch_size) {
        if (at + batch_size > f->n) {
            fit_shuffle(f);
            at = 0;
        }
        if (!fit_mini_batch(f, at, batch_size, batch) || !fit_tell(f, 0)) return 0;
    }
    double before = INFINITY;
    for (;;) {
        if (!fit_assign(f, &report->inertia) || !fit_tell(f, (size_t)++report->passes)) return 0;
        if (report->passes > 100 || (before - report->inertia < 1e-4 * before && report->passes > 1)) break;
        const int reseeded = fit_update(f);
        report->reseeded += reseeded;
        before = reseeded ? INFINITY : report->inertia;
    }
    for (int k = 0; k < f->K; k++) report->dead += f->count[k] == 0;
    return 1;
}

static int kmeans_on(slam_ranks *ranks, const float *frames, size_t n, int D, int K, uint64_t seed, float *centroids,
                     slam_speech_watch *watch, void *context, slam_kmeans_report *report) {
    kmeans_fit f = SLAM_ZERO;
    const size_t batch_size = n < 10000 ? n : 10000;
    memset(report, 0, sizeof *report);
    report->frames = n;
    if (K < 1 || D < 1) return fail("k-means: %d centroids of %d numbers, expected at least 1 of 1", K, D);
    if (n < (size_t)K) return fail("k-means: %zu frames are fewer than the %d centroids to be found", n, K);
    for (size_t i = 0; i < n * (size_t)D; i++)
        if (!isfinite(frames[i])) return fail("k-means: frame %zu holds a number that is not finite", i / (size_t)D);
    f.ranks = ranks;
    f.x = frames;
    f.n = n;
    f.D = D;
    f.K = K;
    f.watch = watch;
    f.context = context;
    f.state = rng_stream(seed, 0x6b6d, 0);
    f.centroid = centroids;
    f.lanes = (float *)mem_new(centroid_blocks(K) * CENTROID_LANES * (size_t)D, sizeof *f.lanes);
    f.order = (size_t *)mem_new(n, sizeof *f.order);
    f.unit = (int *)mem_new(n, sizeof *f.unit);
    f.distance = (float *)mem_new(n, sizeof *f.distance);
    f.count = (size_t *)mem_new((size_t)K, sizeof *f.count);
    f.first = (size_t *)mem_new((size_t)K + 1, sizeof *f.first);
    float *batch = (float *)mem_new(batch_size * (size_t)D, sizeof *batch);
    int ok = f.lanes && f.order && f.unit && f.distance && f.count && f.first && batch;
    ok = slam_ranks_agree(ranks, ok) && fit_run(&f, batch, batch_size, report);
    free(f.lanes);
    free(f.order);
    free(f.unit);
    free(f.distance);
    free(f.count);
    free(f.first);
    free(batch);
    return ok;
}

int slam_kmeans(const float *frames, size_t n, int D, int K, uint64_t seed, float *centroids, slam_speech_watch *watch,
                void *context, slam_kmeans_report *report) {
    return kmeans_on(NULL, frames, n, D, K, seed, centroids, watch, context, report);
}

/* ---- the quantiser: settings and centroids ---- */

struct slam_quantiser {
    slam_speech *speech;
    int K, D;
    float *centroid, *lanes;
    slam_ops *ops; // of HuBERT, with the centroids and their squares
    slam_act *on_device;
    float *squares;
    uint32_t fingerprint;
};

static const char *const feature_names[] = {"mfcc", "hubert"};

/* Whatever changes a unit, or what stands in a document, changes it. */
static uint32_t quantiser_hash(const slam_quantiser *q) {
    const slam_speech_settings *s = &q->speech->settings;
    char spelled[192];
    int n = snprintf(spelled, sizeof spelled, "%s rate %d normalize %d dedup %d units %d width %d", feature_names[s->features],
                     s->rate, s->normalize != 0, s->dedup != 0, q->K, q->D);
    if (q->speech->hubert)
        n += snprintf(spelled + n, sizeof spelled - (size_t)n, " layer %d model %016llx", s->layer,
                      (unsigned long long)slam_hubert_hash(q->speech->hubert));
    uint64_t hash = hash_bytes(HASH_START, spelled, (size_t)n);
    hash = hash_bytes(hash, q->centroid, (size_t)q->K * (size_t)q->D * sizeof *q->centroid);
    const uint32_t folded = (uint32_t)(hash ^ hash >> 32);
    return folded ? folded : 1;
}

/* The squares are of the centroids as the device rounds them. */
static int quantiser_upload(slam_quantiser *q, slam_ops *ops) {
    const size_t n = (size_t)q->K * (size_t)q->D;
    float *host = (float *)mem_new(n, sizeof *host), *wide = (float *)ops->alloc(ops, n * sizeof *wide);
    q->ops = ops;
    q->on_device = (slam_act *)ops->alloc(ops, n * ops->bytes_per_act);
    q->squares = (float *)ops->alloc(ops, (size_t)q->K * sizeof *q->squares);
    int ok = host && wide && q->on_device && q->squares;
    if (ok) {
        ops->upload(ops, wide, q->centroid, n * sizeof *wide);
        ops->to_act(ops, q->on_device, wide, n);
        ops->to_float(ops, wide, q->on_device, n);
        ops->download(ops, host, wide, n * sizeof *wide);
        for (int k = 0; k < q->K; k++) {
            double sum = 0;
            for (int d = 0; d < q->D; d++) sum += (double)host[(size_t)k * q->D + d] * host[(size_t)k * q->D + d];
            host[k] = (float)sum; // which stands in a row that was read
        }
        ops->upload(ops, q->squares, host, (size_t)q->K * sizeof *host);
        ok = ops->finish(ops);
    }
    if (wide) ops->release(ops, wide);
    free(host);
    return ok;
}

/* Takes the speech, which may be NULL: an error is there already. */
static slam_quantiser *quantiser_of(slam_speech *speech, slam_ops *ops, const float *centroids, int K) {
    slam_quantiser *q = speech ? (slam_quantiser *)mem_new(1, sizeof *q) : NULL;
    if (!q) {
        slam_speech_free(speech);
        return NULL;
    }
    q->speech = speech;
    q->K = K;
    q->D = slam_speech_width(speech);
    q->centroid = (float *)mem_new((size_t)K * (size_t)q->D, sizeof *q->centroid);
    q->lanes = (float *)mem_new(centroid_blocks(K) * CENTROID_LANES * (size_t)q->D, sizeof *q->lanes);
    int ok = q->centroid && q->lanes;
    if (ok) {
        memcpy(q->centroid, centroids, (size_t)K * (size_t)q->D * sizeof *centroids);
        centroid_lanes(q->lanes, centroids, K, q->D);
        q->fingerprint = quantiser_hash(q);
        ok = !speech->hubert || quantiser_upload(q, ops);
    }
    if (ok) return q;
    slam_quantiser_free(q);
    return NULL;
}

slam_quantiser *slam_quantiser_new(const slam_speech_settings *settings, slam_ops *ops, const float *centroids, int K) {
    if (K >= 1 && K <= 65534) return quantiser_of(slam_speech_new(settings, ops), ops, centroids, K);
    fail("%d centroids: expected 1 to 65534, so that a token fits 16 bits", K);
    return NULL;
}

void slam_quantiser_free(slam_quantiser *q) {
    if (!q) return;
    slam_speech_free(q->speech);
    if (q->ops) q->ops->release(q->ops, q->on_device);
    if (q->ops) q->ops->release(q->ops, q->squares);
    free(q->centroid);
    free(q->lanes);
    free(q);
}

const slam_speech_settings *slam_quantiser_settings(const slam_quantiser *q) { return &q->speech->settings; }
int slam_quantiser_count(const slam_quantiser *q) { return q->K; }
uint32_t slam_quantiser_fingerprint(const slam_quantiser *q) { return q->fingerprint; }

void slam_quantiser_nearest(const slam_quantiser *q, const float *frames, size_t n, int *unit, float *distance) {
    centroids_assign(frames, n, q->lanes, q->K, q->D, unit, distance);
}

/* km.npy -> km.json */
static char *settings_path(const char *path) {
    return text_print("%.*s.json", (int)(strlen(path) - (path_ends(path, ".npy") ? 4 : 0)), path);
}

int slam_quantiser_save(const slam_quantiser *q, const char *path, const slam_kmeans_report *report) {
    const slam_speech_settings *s = &q->speech->settings;
    text t = SLAM_ZERO;
    text_add(
        &t,
        "{\"features\": \"%s\", \"rate\": %d, \"normalize\": %s, \"dedup\": %s, \"units\": %d, \"width\": %d, \"fingerprint\": %u",
        feature_names[s->features], s->rate, s->normalize ? "true" : "false", s->dedup ? "true" : "false", q->K, q->D,
        (unsigned)q->fingerprint);
    if (q->speech->hubert) {
        text_add(&t, ", \"layer\": %d, \"hubert\": ", s->layer);
        text_add_json(&t, s->hubert);
    }
    if (report) {
        text_add(&t, ", \"frames\": %zu, \"inertia\": ", report->frames);
        text_add_number(&t, report->inertia);
        text_add(&t, ", \"origin\": \"%016llx\"", (unsigned long long)report->origin);
    }
    text_add(&t, "}\n");
    char *json_path = settings_path(path);
    const int ok =
        json_path && !t.failed && file_write(json_path, t.at, t.n) && npy_write(path, q->centroid, (size_t)q->K, (size_t)q->D);
    free(json_path);
    text_free(&t);
    return ok;
}

static int settings_parse(const json *root, const char *path, slam_speech_settings *s, long *fingerprint) {
    const char *features = json_text(root, "features", ""), *hubert = json_text(root, "hubert", "");
    long rate = s->rate, layer = s->layer;
    if (strcmp(features, "mfcc") && strcmp(features, "hubert"))
        return fail("%s: 'features' is \"%s\", expected \"mfcc\" or \"hubert\"", path, features);
    s->features = features[0] == 'm' ? SLAM_MFCC : SLAM_HUBERT;
    if (!json_int(root, "rate", path, 1, SPEECH_RATE, &rate) || !json_flag(root, "normalize", path, &s->normalize) ||
        !json_flag(root, "dedup", path, &s->dedup) || !json_int(root, "fingerprint", path, 1, UINT32_MAX, fingerprint) ||
        !json_int(root, "layer", path, 0, 1 << 10, &layer))
        return 0;
    if (s->features == SLAM_MFCC && rate != 25 && rate != 50) return fail("%s: 'rate' is %ld, expected 25 or 50", path, rate);
    if (strlen(hubert) >= sizeof s->hubert) return fail("%s: 'hubert' has %zu bytes, expected a path", path, strlen(hubert));
    if (!*s->hubert) snprintf(s->hubert, sizeof s->hubert, "%s", hubert);
    s->rate = (int)rate;
    s->layer = (int)layer;
    return 1;
}

/* fingerprint: 0 where KM.json does not say */
static int settings_read(const char *path, slam_speech_settings *s, long *fingerprint) {
    char *json_path = settings_path(path);
    int ok = json_path != NULL;
    *fingerprint = 0;
    if (ok && path_is_file(json_path)) {
        json *root = json_read(json_path);
        ok = root && settings_parse(root, json_path, s, fingerprint);
        json_free(root);
    }
    free(json_path);
    return ok;
}

int slam_quantiser_settings_read(const char *path, slam_speech_settings *s) {
    long fingerprint;
    return settings_read(path, s, &fingerprint);
}

slam_quantiser *slam_quantiser_open(const char *path, const slam_speech_settings *otherwise, slam_ops *ops) {
    slam_speech_settings settings = *otherwise;
    slam_quantiser *q = NULL;
    float *centroids = NULL;
    size_t K = 0, D = 0;
    long fingerprint = 0;
    if (!settings_read(path, &settings, &fingerprint) || !npy_read(path, &centroids, &K, &D)) return NULL;
    slam_speech *speech = slam_speech_new(&settings, ops);
    const size_t width = speech ? (size_t)slam_speech_width(speech) : D;
    if (D != width || K < 1 || K > 65534) {
        fail("%s: has shape (%zu, %zu), expected 1 to 65534 centroids of %zu numbers (%s)", path, K, D, width,
             feature_names[settings.features]);
        slam_speech_free(speech);
    } else q = quantiser_of(speech, ops, centroids, (int)K);
    if (q && fingerprint && (uint32_t)fingerprint != q->fingerprint) {
        fail(
            "%s: the 'fingerprint' beside it is %ld, but that of its centroids with its settings%s is %u: they do not belong together",
            path, fingerprint, q->speech->hubert ? " and the model" : "", (unsigned)q->fingerprint);
        slam_quantiser_free(q);
        q = NULL;
    }
    free(centroids);
    return q;
}

/* ---- units ---- */

void slam_units_free(slam_units *u) {
    free(u->unit);
    free(u->duration);
    memset(u, 0, sizeof *u);
}

/* Runs of a unit become one with the run's length, in place. Without `dedup` every frame stays, of length 1. */
static size_t units_merge(int *unit, int *duration, size_t n, int dedup) {
    size_t to = 0;
    for (size_t i = 0; i < n; i++) {
        if (dedup && to && unit[to - 1] == unit[i] && duration[to - 1] < INT_MAX) {
            duration[to - 1]++;
            continue;
        }
        unit[to] = unit[i];
        duration[to++] = 1;
    }
    return to;
}

/* A frame's unit for each frame; they become runs. */
static int units_new(slam_units *u, size_t frames) {
    u->frames = frames;
    u->unit = (int *)mem_new(frames, sizeof *u->unit);
    u->duration = (int *)mem_new(frames, sizeof *u->duration);
    return u->unit && u->duration;
}

static void units_runs(slam_units *u, int dedup) { u->n = units_merge(u->unit, u->duration, u->frames, dedup); }

/* ---- clips: audio on its way to features or units ----
   MFCC are computed where a clip is decoded. HuBERT's clips wait, until they go to the device with others of about the same length.
   Where a row of a matrix product may hang on how many there are (same_rows 0), a batch has a shape that hangs on the length of
   its clips alone, and is filled up with silence: so a clip's units are the same bits in any company. */

typedef struct clip {
    slam_units u;
    float *sample;     // (u.samples), while they wait; else NULL
    float *feature;    // (u.frames, width), where they are asked for
    double start, end; // of its file, in seconds; ...
    int cut;           // ... of which it is a part
} clip;

typedef struct clip_list {
    clip **at;
    size_t n, capacity;
} clip_list;

static int clips_add(clip_list *list, clip *c) {
    if (!mem_grow((void **)&list->at, &list->capacity, list->n + 1, sizeof *list->at)) return 0;
    list->at[list->n++] = c;
    return 1;
}

static void clip_free(clip *c) {
    if (!c) return;
    slam_units_free(&c->u);
    free(c->sample);
    free(c->feature);
    free(c);
}

/* Samples become what is wanted of them: units, or features where there is no quantiser. */
static int clip_mfcc(clip *c, const slam_speech *s, const slam_quantiser *q, const float *sample) {
    const size_t n = slam_speech_frames(s, c->u.samples), D = (size_t)slam_speech_width(s);
    c->u.frames = n;
    c->feature = (float *)mem_new(n, D * sizeof *c->feature);
    if (!c->feature || !slam_speech_features(s, c->feature, sample, c->u.samples)) return 0;
    if (!q) return 1;
    if (!units_new(&c->u, n)) return 0;
    slam_quantiser_nearest(q, c->feature, n, c->u.unit, NULL);
    units_runs(&c->u, s->settings.dedup);
    free(c->feature);
    c->feature = NULL;
    return 1;
}

/* Keeps the samples for the device. */
static int clip_wait(clip *c, const slam_speech *s, const float *sample) {
    c->u.frames = slam_speech_frames(s, c->u.samples);
    c->sample = (float *)mem_new(c->u.samples, sizeof *c->sample);
    if (!c->sample) return 0;
    if (s->settings.normalize) normalize_waveform(c->sample, sample, c->u.samples);
    else memcpy(c->sample, sample, c->u.samples * sizeof *sample);
    return 1;
}

enum { ENCODE_FRAMES = 512, ENCODE_FRAMES_ASYNCHRONOUS = 8192 }; // of a batch, where a clip is not longer

/* Frames of a row for a clip: its own, rounded up in eight to sixteen steps an octave. */
static size_t encode_frames(const slam_hubert *h, size_t samples) {
    const size_t step = (size_t)slam_hubert_step(h), frames = (samples + 2 * HUBERT_PADDING + step - 1) / step;
    size_t grain = 1;
    while (frames / grain >= 16) grain *= 2;
    return (frames + grain - 1) / grain * grain;
}

static size_t encode_rows(const slam_hubert *h, size_t frames) {
    const size_t most = h->ops->asynchronous ? ENCODE_FRAMES_ASYNCHRONOUS : ENCODE_FRAMES;
    return frames < most ? most / frames : 1;
}

/* The units of a batch of clips: the nearest centroids of x in the arena. */
static int encode_nearest(slam_hubert *h, const hubert_batch *b, const slam_quantiser *q, clip *const *c) {
    slam_ops *ops = h->ops;
    const size_t N = (size_t)b->B * b->T;
    int *nearest = (int *)(h->arena + b->nearest), *host = (int *)mem_new(N, sizeof *host), ok = host != NULL;
    if (!ok) return 0;
    ops->nearest(ops, nearest, (float *)(h->arena + b->mlp), hubert_act(h, b->x), q->on_device, q->squares, (int)N, q->D, q->K);
    ops->download(ops, host, nearest, N * sizeof *host);
    ok = ops->finish(ops);
    for (int i = 0; ok && i < b->n; i++) {
        slam_units *u = &c[i]->u;
        if (!(ok = units_new(u, u->frames))) break;
        memcpy(u->unit, host + (size_t)i * b->T, u->frames * sizeof *host);
        units_runs(u, q->speech->settings.dedup);
    }
    free(host);
    return ok;
}

static int encode_features(slam_hubert *h, const hubert_batch *b, const long *lengths, clip *const *c) {
    float **to = (float **)mem_new((size_t)b->n, sizeof *to);
    int ok = to != NULL;
    for (int i = 0; ok && i < b->n; i++) {
        c[i]->feature = (float *)mem_new(c[i]->u.frames, (size_t)h->config.C * sizeof *c[i]->feature);
        ok = (to[i] = c[i]->feature) != NULL;
    }
    ok = ok && hubert_features(h, b, lengths, to);
    free(to);
    return ok;
}

/* n clips whose encode_frames are `frames`, the longest first, no more than encode_rows; their samples go. */
static int encode_batch(const slam_speech *s, const slam_quantiser *q, clip *const *c, size_t n, size_t frames) {
    slam_hubert *h = s->hubert;
    const size_t step = (size_t)slam_hubert_step(h);
    hubert_batch b = SLAM_ZERO;
    const float **samples = (const float **)mem_new(n, sizeof *samples);
    long *lengths = (long *)mem_new(n, sizeof *lengths);
    int ok = samples && lengths;
    for (size_t i = 0; ok && i < n; i++) {
        samples[i] = c[i]->sample;
        lengths[i] = (long)c[i]->u.samples;
    }
    b.n = (int)n;
    b.B = (int)(h->ops->same_rows ? n : encode_rows(h, frames));
    b.S = h->ops->same_rows ? (c[0]->u.samples + 2 * HUBERT_PADDING + step - 1) / step * step : frames * step;
    b.K = q ? q->K : 0;
    ok = ok && hubert_room(h, &b) && hubert_run(h, &b, samples, lengths) &&
         (q ? encode_nearest(h, &b, q, c) : encode_features(h, &b, lengths, c));
    for (size_t i = 0; i < n; i++) {
        free(c[i]->sample);
        c[i]->sample = NULL;
    }
    free(samples);
    free(lengths);
    return ok;
}

static int clip_is_shorter(const void *a, const void *b) {
    const size_t x = (*(clip *const *)a)->u.samples, y = (*(clip *const *)b)->u.samples;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* How many of the n clips, sorted, from the first on, go into one batch. */
static size_t encode_next(const slam_hubert *h, clip *const *c, size_t n, size_t *frames) {
    size_t k = 1;
    *frames = encode_frames(h, c[0]->u.samples);
    while (k < n && k < encode_rows(h, *frames) && encode_frames(h, c[k]->u.samples) == *frames) k++;
    return k;
}

int slam_quantiser_units(const slam_quantiser *q, const float *sample, size_t n, slam_units *u) {
    const slam_speech *s = q->speech;
    clip c = SLAM_ZERO, *one = &c;
    memset(u, 0, sizeof *u);
    c.u.samples = n;
    const int ok = !s->hubert
                       ? clip_mfcc(&c, s, q, sample)
                       : clip_wait(&c, s, sample) && (c.u.frames == 0 || encode_batch(s, q, &one, 1, encode_frames(s->hubert, n)));
    free(c.sample);
    free(c.feature); // where it failed
    if (ok) *u = c.u;
    else slam_units_free(&c.u);
    return ok;
}

int slam_quantiser_file(const slam_quantiser *q, const char *path, slam_units *u) {
    decoder d = SLAM_ZERO;
    audio_parts p;
    memset(u, 0, sizeof *u);
    const int ok = parts_open(&p, &d, path, 0) && parts_next(&p) > 0 && slam_quantiser_units(q, p.sample, p.samples, u);
    parts_close(&p);
    decoder_close(&d);
    return ok;
}

/* ---- lists of audio files ---- */

int slam_list_add(slam_list *list, const char *item) {
    char *copy = text_copy(item);
    if (!copy || !mem_grow((void **)&list->at, &list->capacity, list->n + 1, sizeof *list->at)) {
        free(copy);
        return 0;
    }
    list->at[list->n++] = copy;
    return 1;
}

void slam_list_free(slam_list *list) {
    for (size_t i = 0; i < list->n; i++) free(list->at[i]);
    free(list->at);
    memset(list, 0, sizeof *list);
}

/* A folder by its identity. Links can make loops of folders: none is entered from below itself, nor by a second link. */
typedef struct folder_id {
    dev_t device;
    ino_t number;
} folder_id;

typedef struct folders {
    folder_id *at;
    size_t n, capacity; // the folders above, then ...
    folder_id *linked;
    size_t n_linked, linked_capacity; // ... those that were entered by a link
} folders;

static int folder_is_among(const folder_id *list, size_t n, const struct stat *s) {
    for (size_t i = 0; i < n; i++)
        if (list[i].device == s->st_dev && list[i].number == s->st_ino) return 1;
    return 0;
}

static int folder_note(folder_id **list, size_t *n, size_t *capacity, const struct stat *s) {
    if (!mem_grow((void **)list, capacity, *n + 1, sizeof **list)) return 0;
    (*list)[*n].device = s->st_dev;
    (*list)[(*n)++].number = s->st_ino;
    return 1;
}

/* The same in every build: what libsndfile would be needed for is then reported, not passed over. */
static int is_audio_name(const char *name) {
    static const char *const ends[] = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"};
    const size_t n = strlen(name);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        const size_t m = strlen(ends[i]);
        if (n >= m && !strcasecmp(name + n - m, ends[i])) return 1;
    }
    return 0;
}

static int list_folder(slam_list *list, folders *above, const char *path);

static int list_entry(slam_list *list, folders *above, const char *path, const char *name) {
    struct stat s, link;
    if (stat(path, &s) != 0)
        return is_audio_name(name) ? slam_list_add(list, path) : 1; // a broken link is reported when it is opened
    if (!S_ISDIR(s.st_mode)) // a pipe that was found, not named, would be waited for without end
        return S_ISREG(s.st_mode) && is_audio_name(name) ? slam_list_add(list, path) : 1;
    if (folder_is_among(above->at, above->n, &s)) return 1;
    if (lstat(path, &link) == 0 && S_ISLNK(link.st_mode)) {
        if (folder_is_among(above->linked, above->n_linked, &s)) return 1;
        if (!folder_note(&above->linked, &above->n_linked, &above->linked_capacity, &s)) return 0;
    }
    return list_folder(list, above, path);
}

static int list_folder(slam_list *list, folders *above, const char *path) {
    struct stat s;
    names found = SLAM_ZERO;
    if (stat(path, &s) != 0) return fail("%s: %s", path, strerror(errno));
    int ok = folder_note(&above->at, &above->n, &above->capacity, &s) && folder_list(path, &found);
    for (size_t i = 0; ok && i < found.n; i++) {
        char *below = path_join(path, found.at[i]);
        ok = below && list_entry(list, above, below, found.at[i]);
        free(below);
    }
    if (above->n) above->n--;
    names_free(&found);
    return ok;
}

static int list_argument(slam_list *list, const char *path) {
    if (!path_is_folder(path)) return slam_list_add(list, path);
    folders above = SLAM_ZERO;
    const size_t before = list->n;
    int ok = list_folder(list, &above, path);
    free(above.at);
    free(above.linked);
    if (ok && list->n == before)
        ok = fail("%s: no file in this folder or below it has the name of audio (.wav, .flac, .ogg, .mp3, ...)", path);
    return ok;
}

static int list_manifest(slam_list *list, const char *path) {
    file_map map;
    if (!map_open(&map, path)) return 0;
    const char *at = (const char *)map.data, *end = at + map.size;
    int ok = 1;
    for (size_t line = 1; ok && at < end; line++) {
        const char *newline = (const char *)memchr(at, '\n', (size_t)(end - at)), *next = newline ? newline + 1 : end;
        size_t n = (size_t)((newline ? newline : end) - at);
        if (n && at[n - 1] == '\r') n--;
        text name = SLAM_ZERO;
        if (n && memchr(at, 0, n)) ok = fail("%s:%zu: holds a zero byte, expected the path of an audio file", path, line);
        else if (n) {
            text_add_bytes(&name, at, n);
            ok = !name.failed && list_argument(list, name.at);
        }
        text_free(&name);
        at = next;
    }
    map_close(&map);
    return ok;
}

int slam_audio_list(slam_list *list, const char *const *arguments, size_t n) {
    int ok = 1;
    for (size_t i = 0; ok && i < n; i++)
        ok = arguments[i][0] == '@' ? list_manifest(list, arguments[i] + 1) : list_argument(list, arguments[i]);
    return ok;
}

/* ---- commands that speak ----
   A command is cut into arguments by simple rules and run without a shell, so that no text can be taken for a command. */

/* Cuts at blanks. '...' stands as it is, "..." but for \" and \\; elsewhere a backslash takes the next character as it is. */
static int command_split(slam_list *arguments, const char *command) {
    text word = SLAM_ZERO;
    const char *c = command;
    int ok = 1;
    while (ok && *c) {
        for (; *c == ' ' || *c == '\t' || *c == '\n'; c++) {}
        if (!*c) break;
        word.n = 0;
        text_add_bytes(&word, "", 0);
        char quote = 0;
        for (; *c && (quote || (*c != ' ' && *c != '\t' && *c != '\n')); c++) {
            if (*c == quote) quote = 0;
            else if (!quote && (*c == '\'' || *c == '"')) quote = *c;
            else {
                if (*c == '\\' && c[1] && (!quote || (quote == '"' && (c[1] == '"' || c[1] == '\\')))) c++;
                text_add_bytes(&word, c, 1);
            }
        }
        if (quote) ok = fail("%s: a quote (%c) that is not closed", command, quote);
        ok = ok && !word.failed && slam_list_add(arguments, word.at);
    }
    text_free(&word);
    if (ok && arguments->n == 0) ok = fail("an empty command, expected one like 'espeak-ng --stdout {text}'");
    return ok;
}

/* The argument with the words for {text}. Alone they must not look like a flag: a blank before them changes no speech. */
static char *command_argument(const char *argument, const char *words) {
    text t = SLAM_ZERO;
    if (!strcmp(argument, "{text}") && *words == '-') text_add(&t, " ");
    for (const char *at = argument, *hole;; at = hole + strlen("{text}")) {
        hole = strstr(at, "{text}");
        text_add_bytes(&t, at, hole ? (size_t)(hole - at) : strlen(at));
        if (!hole) break;
        text_add_bytes(&t, words, strlen(words));
    }
    if (!t.failed) return t.at;
    text_free(&t);
    return NULL;
}

typedef struct child {
    pid_t process;
    int out, err; // the ends to read from
    const char *program;
} child;

static void close_both(const int *ends) {
    close(ends[0]);
    close(ends[1]);
}

/* Its input is the file `in`, or empty where that is -1; it is in a process group of its own, so that a Ctrl-C which stops this
   program in good order is not its end. */
static int child_spawn(child *c, char *const *argv, int in, const int *out, const int *err) {
    posix_spawn_file_actions_t files;
    posix_spawnattr_t settings;
    sigset_t usual;
    if (posix_spawn_file_actions_init(&files) != 0) return ENOMEM;
    if (posix_spawnattr_init(&settings) != 0) {
        posix_spawn_file_actions_destroy(&files);
        return ENOMEM;
    }
    sigemptyset(&usual);
    sigaddset(&usual, SIGPIPE);
    posix_spawnattr_setsigdefault(&settings, &usual);
    posix_spawnattr_setpgroup(&settings, 0);
    posix_spawnattr_setflags(&settings, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF);
    if (in >= 0) posix_spawn_file_actions_adddup2(&files, in, 0);
    else posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&files, out[1], 1);
    posix_spawn_file_actions_adddup2(&files, err[1], 2);
#ifdef __APPLE__
    const int why = posix_spawnp(&c->process, argv[0], &files, &settings, argv, *_NSGetEnviron());
#else
    const int why = posix_spawnp(&c->process, argv[0], &files, &settings, argv, environ);
#endif
    posix_spawnattr_destroy(&settings);
    posix_spawn_file_actions_destroy(&files);
    return why;
}

/* A pipe whose ends are above the standard files, of which one may be closed, and which no program that is started inherits. */
static int pipe_open(int *ends) {
    int low[2];
    if (pipe(low) != 0) return 0;
    for (int i = 0; i < 2; i++) ends[i] = fcntl(low[i], F_DUPFD_CLOEXEC, 3);
    const int why = errno;
    close_both(low);
    if (ends[0] >= 0 && ends[1] >= 0) return 1;
    if (ends[0] >= 0) close(ends[0]);
    if (ends[1] >= 0) close(ends[1]);
    errno = why;
    return 0;
}

static int child_start(child *c, char *const *argv, int in, const char *what) {
    int out[2], err[2], why = 0;
    c->program = argv[0];
    /* one at a time: another one started meanwhile would inherit the pipes' low ends, and keep them open */
    SLAM_PRAGMA(omp critical(slam_child)) {
        if (!pipe_open(out)) why = errno;
        else if (!pipe_open(err)) {
            why = errno;
            close_both(out);
        } else {
            why = child_spawn(c, argv, in, out, err);
            close(out[1]);
            close(err[1]);
            c->out = out[0];
            c->err = err[0];
            if (why) {
                close(out[0]);
                close(err[0]);
            }
        }
    }
    if (!why) return 1;
    machine_failed = 1; // no program, no processes: the same for every line
    return fail("%s: %s cannot be started: %s", what, c->program, strerror(why));
}

enum { SAID = 400, SPOKEN = 1 << 30 };

/* All that it writes; of what it says on stderr the last bytes. 0 and the sentence where that is more than one could say. */
static int child_read(const child *c, text *wave, char *said, const char *what) {
    struct pollfd ends[2] = {{c->out, POLLIN, 0}, {c->err, POLLIN, 0}};
    char block[65536];
    size_t n = 0;
    while (ends[0].fd >= 0 || ends[1].fd >= 0) {
        if (poll(ends, 2, -1) < 0 && errno != EINTR) return fail("%s: %s", what, strerror(errno));
        for (int i = 0; i < 2; i++) {
            if (ends[i].fd < 0 || !ends[i].revents) continue;
            const ssize_t got = read(ends[i].fd, block, i ? SAID / 2 : sizeof block);
            ends[i].revents = 0;
            if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
            if (got <= 0) ends[i].fd = -1;
            else if (i == 0) text_add_bytes(wave, block, (size_t)got);
            else {
                const size_t keep = n + (size_t)got < SAID ? n : SAID - 1 - (size_t)got;
                memmove(said, said + n - keep, keep);
                memcpy(said + keep, block, (size_t)got);
                n = keep + (size_t)got;
                said[n] = 0;
            }
        }
        if (wave->failed) return 0;
        if (wave->n > SPOKEN) return fail("%s: %s writes more than %d MB", what, c->program, SPOKEN >> 20);
    }
    return 1;
}

/* The last line. */
static const char *last_said(char *said) {
    size_t n = strlen(said);
    while (n && isspace((unsigned char)said[n - 1])) said[--n] = 0;
    const char *line = strrchr(said, '\n');
    return line ? line + 1 : said;
}

/* What the command writes when it is run, as a file's bytes. */
static int child_run(char *const *argv, int in, const char *what, file_map *out) {
    child c;
    text wave = SLAM_ZERO;
    char said[SAID] = "";
    int status = 0;
    memset(out, 0, sizeof *out);
    if (!child_start(&c, argv, in, what)) return 0;
    int ok = child_read(&c, &wave, said, what);
    if (!ok) kill(c.process, SIGKILL);
    close(c.out);
    close(c.err);
    while (waitpid(c.process, &status, 0) < 0 && errno == EINTR) {}
    const char *line = last_said(said);
    if (ok && WIFSIGNALED(status)) ok = fail("%s: %s was ended by signal %d", what, c.program, WTERMSIG(status));
    else if (ok && WEXITSTATUS(status) != 0)
        ok = fail("%s: %s failed with status %d%s%s", what, c.program, WEXITSTATUS(status), *line ? ": " : "", line);
    if (!ok) text_free(&wave);
    out->data = (const unsigned char *)wave.at;
    out->size = wave.n;
    return ok;
}

/* A line of words in a file without a name, to be read; above the standard files. -1 and the sentence on failure. */
static int words_file(const char *words, const char *what) {
    FILE *f = tmpfile();
    int in = -1;
    if (f && fprintf(f, "%s\n", words) > 0 && fflush(f) == 0 && fseek(f, 0, SEEK_SET) == 0)
        in = fcntl(fileno(f), F_DUPFD_CLOEXEC, 3);
    if (in < 0) {
        machine_failed = 1;
        fail("%s: no temporary file: %s", what, strerror(errno));
    }
    if (f) fclose(f);
    return in;
}

/* The words as a voice speaks them: they stand for {text} in its arguments, or where there is none on its standard input. */
static int command_speak(const slam_list *voice, const char *words, const char *what, sound *s) {
    char **argv = (char **)mem_new(voice->n + 1, sizeof *argv);
    file_map map;
    int ok = argv != NULL, holds = 0, in = -1;
    memset(s, 0, sizeof *s);
    for (size_t i = 0; ok && i < voice->n; i++) {
        holds |= strstr(voice->at[i], "{text}") != NULL;
        ok = (argv[i] = command_argument(voice->at[i], words)) != NULL;
    }
    if (ok && !holds) ok = (in = words_file(words, what)) >= 0;
    ok = ok && child_run(argv, in, what, &map) && sound_take(s, &map, what);
    if (in >= 0) close(in);
    for (size_t i = 0; argv && i < voice->n; i++) free(argv[i]);
    free(argv);
    return ok;
}

/* ---- sources: what becomes units, one after the other ----
   A source is an audio file or a line of a file. It becomes a document (a long audio file several, a line of pairs one line), or
   it fails and is passed over; nothing else tells the kinds apart for what follows. */

enum { SOURCE_AUDIO, SOURCE_UNITS, SOURCE_PAIRS, SOURCE_TEXT };

typedef struct source_line {
    size_t file, at, n, number; // which file, bytes from where, the line's number from 1
} source_line;

struct slam_sources {
    slam_ranks *ranks; // that hear them together; NULL: this process alone
    int kind, pairs;   // pairs: lines of them come out
    size_t first, n;   // those that are taken
    slam_list files;   // audio, or the files whose lines are the sources
    file_map *map;     // of these
    source_line *line; // NULL for audio
    size_t capacity;
    double max_seconds, max_repetition;
    slam_list *voice; // (voices), each a command's arguments
    size_t voices;
};

void slam_sources_free(slam_sources *s) {
    if (!s) return;
    for (size_t i = 0; s->map && i < s->files.n; i++) map_close(&s->map[i]);
    for (size_t i = 0; i < s->voices; i++) slam_list_free(&s->voice[i]);
    slam_list_free(&s->files);
    free(s->map);
    free(s->line);
    free(s->voice);
    free(s);
}

size_t slam_sources_count(const slam_sources *s) { return s->n; }
int slam_sources_pairs_out(const slam_sources *s) { return s->pairs; }

int slam_sources_part(slam_sources *s, size_t part, size_t of) {
    if (part < 1 || part > of) return fail("part %zu of %zu: expected 1 to %zu", part, of, of);
    const size_t each = s->n / of, more = s->n % of; // the first `more` parts have one more
    s->first += (part - 1) * each + (part - 1 < more ? part - 1 : more);
    s->n = each + (part - 1 < more);
    return 1;
}

void slam_sources_ranks(slam_sources *s, slam_ranks *ranks) { s->ranks = ranks; }

static source_line *source_at(const slam_sources *s, size_t i) { return &s->line[s->first + i]; }
static const char *source_text(const slam_sources *s, size_t i) {
    return (const char *)s->map[source_at(s, i)->file].data + source_at(s, i)->at;
}

/* a.wav, or stories.txt:12; in memory of the caller's */
static char *source_name(const slam_sources *s, size_t i) {
    if (!s->line) return text_copy(s->files.at[s->first + i]);
    const source_line *l = source_at(s, i);
    return text_print("%s:%zu", s->files.at[l->file], l->number);
}

/* Settings and sources, as far as they change what comes out. A file of lines is known by its name and size. */
static uint64_t sources_hash(uint64_t hash, const slam_sources *s) {
    const uint64_t numbers[] = {(uint64_t)s->kind, (uint64_t)s->pairs, s->first, s->n, s->voices};
    const double limits[] = {s->max_seconds, s->max_repetition};
    hash = hash_bytes(hash_bytes(hash, numbers, sizeof numbers), limits, sizeof limits);
    for (size_t i = 0; !s->line && i < s->n; i++) {
        const char *path = s->files.at[s->first + i];
        hash = hash_bytes(hash, path, strlen(path) + 1);
    }
    for (size_t i = 0; s->map && i < s->files.n; i++) {
        const uint64_t size = s->map[i].size;
        hash = hash_bytes(hash_bytes(hash, s->files.at[i], strlen(s->files.at[i]) + 1), &size, sizeof size);
    }
    for (size_t i = 0; i < s->voices; i++)
        for (size_t k = 0; k < s->voice[i].n; k++) hash = hash_bytes(hash, s->voice[i].at[k], strlen(s->voice[i].at[k]) + 1);
    return hash;
}

static int list_copy(slam_list *to, const slam_list *from) {
    int ok = 1;
    for (size_t i = 0; ok && i < from->n; i++) ok = slam_list_add(to, from->at[i]);
    return ok;
}

slam_sources *slam_sources_audio(const slam_list *files, double max_seconds) {
    slam_sources *s = (slam_sources *)mem_new(1, sizeof *s);
    if (!s) return NULL;
    s->kind = SOURCE_AUDIO;
    s->n = files->n;
    s->max_seconds = max_seconds;
    if (list_copy(&s->files, files)) return s;
    slam_sources_free(s);
    return NULL;
}

/* The lines of a file that are not blank. */
static int sources_lines(slam_sources *s, size_t file) {
    const char *start = (const char *)s->map[file].data, *at = start, *end = start + s->map[file].size;
    for (size_t number = 1; at < end; number++) {
        const char *newline = (const char *)memchr(at, '\n', (size_t)(end - at)), *stop = newline ? newline : end, *from = at;
        at = newline ? newline + 1 : end;
        while (stop > from && isspace((unsigned char)stop[-1]) && stop[-1] != '\t') stop--;
        while (from < stop && (*from == ' ' || *from == '\r')) from++;
        if (from == stop) continue;
        if (!mem_grow((void **)&s->line, &s->capacity, s->n + 1, sizeof *s->line)) return 0;
        source_line *l = &s->line[s->n++];
        l->file = file;
        l->at = (size_t)(from - start);
        l->n = (size_t)(stop - from);
        l->number = number;
    }
    return 1;
}

static slam_sources *sources_of_lines(int kind, const slam_list *files) {
    slam_sources *s = (slam_sources *)mem_new(1, sizeof *s);
    if (!s) return NULL;
    s->kind = kind;
    s->map = (file_map *)mem_new(files->n, sizeof *s->map);
    int ok = s->map && list_copy(&s->files, files);
    for (size_t i = 0; ok && i < files->n; i++) ok = map_open(&s->map[i], files->at[i]) && sources_lines(s, i);
    if (ok && s->n == 0) ok = fail("%s: it holds no line", files->n ? files->at[0] : "no file");
    if (ok) return s;
    slam_sources_free(s);
    return NULL;
}

slam_sources *slam_sources_units(const slam_list *files) { return sources_of_lines(SOURCE_UNITS, files); }

static slam_sources *sources_of_file(int kind, const char *path) {
    slam_list one = SLAM_ZERO;
    slam_sources *s = slam_list_add(&one, path) ? sources_of_lines(kind, &one) : NULL;
    slam_list_free(&one);
    return s;
}

slam_sources *slam_sources_pairs(const char *path, double max_repetition) {
    slam_sources *s = sources_of_file(SOURCE_PAIRS, path);
    if (!s) return NULL;
    s->pairs = 1;
    s->max_repetition = max_repetition;
    return s;
}

static size_t count_tabs(const char *text, size_t n) {
    size_t tabs = 0;
    for (size_t i = 0; i < n; i++) tabs += text[i] == '\t';
    return tabs;
}

slam_sources *slam_sources_text(const char *path, const slam_list *voices, double max_repetition) {
    slam_sources *s = sources_of_file(SOURCE_TEXT, path);
    if (!s) return NULL;
    s->pairs = memchr(source_text(s, 0), '\t', source_at(s, 0)->n) != NULL;
    s->max_repetition = s->pairs ? max_repetition : 0;
    s->voice = (slam_list *)mem_new(voices->n, sizeof *s->voice);
    int ok = s->voice != NULL;
    for (size_t i = 0; ok && i < voices->n; i++, s->voices++) ok = command_split(&s->voice[i], voices->at[i]);
    for (size_t i = 0; ok && s->pairs && i < s->n; i++) {
        const size_t fields = 1 + count_tabs(source_text(s, i), source_at(s, i)->n);
        if (fields != 3)
            ok = fail("%s:%zu: %zu fields parted by tabs, expected 3 (prompt, chosen, rejected) as in line %zu", path,
                      source_at(s, i)->number, fields, source_at(s, 0)->number);
    }
    if (ok) return s;
    slam_sources_free(s);
    return NULL;
}

/* ---- many sources at once ----
   A block of neighbours in the list is shared among the ranks, and by each among its threads; then all ranks have what was heard,
   and it is used in order. Blocks grow until one takes about two seconds, so that a job can be stopped soon; how long they are
   changes nothing else. */

enum {
    WANT_FEATURES,
    WANT_CLIPS,
    WANT_TOKENS,
    WANT_UNITS,
    WANT_SPELLED
}; // for a fit, in memory, OUT.bin, OUT.jsonl, with --audio-repr

typedef struct heard {
    char *name;
    clip_list clips;    // of a pair, three: prompt, chosen and rejected
    audio_parts *parts; // of a long file that waits to be heard on
    text head;          // of a pair: what stands before its units
    text out;           // the documents, one after the other: their tokens, or their lines
    size_t *document;   // (documents), bytes
    size_t documents, capacity;
    uint64_t samples, frames, units, tokens;
    int finished; // heard to its end
    int failed;
    int repeats; // a pair that is left out because its text repeats itself
    int dropped; // not heard to its end: the job was stopped
    int machine; // it failed for want of memory or open files: no word about the source
    char *error; // where it failed: the sentence, NULL where there was no memory for it
} heard;

typedef struct audio_block {
    const slam_speech *speech;       // NULL: units are there already
    const slam_quantiser *quantiser; // NULL: features are wanted, or units are there already
    const slam_sources *sources;
    const size_t *order; // NULL: as they stand
    int want;
    slam_speech_watch *watch;
    void *context;
    slam_speech_progress progress;
    heard *result;
    size_t n, capacity; // n: of a block how many a rank hears
    decoder *decoders;  // one a thread
    int threads, stop;
    int64_t waiting, most_waiting; // samples that wait for the device; more are not decoded meanwhile
    double told;
} audio_block;

static size_t block_source(const audio_block *b, size_t i) { return b->order ? b->order[i] : i; }
static slam_hubert *block_hubert(const audio_block *b) { return b->speech ? b->speech->hubert : NULL; }

static void heard_parts_close(heard *h) {
    if (h->parts) parts_close(h->parts);
    free(h->parts);
    h->parts = NULL;
}

static void heard_clips_free(heard *h) {
    for (size_t i = 0; i < h->clips.n; i++) clip_free(h->clips.at[i]);
    free(h->clips.at);
    memset(&h->clips, 0, sizeof h->clips);
}

static void heard_free(heard *h) {
    heard_parts_close(h);
    heard_clips_free(h);
    free(h->name);
    free(h->document);
    free(h->error);
    text_free(&h->head);
    text_free(&h->out);
    memset(h, 0, sizeof *h);
}

static int block_begin(audio_block *b) {
    const slam_hubert *h = block_hubert(b);
    b->threads = threads_count();
    b->n = (size_t)b->threads;
    b->most_waiting = (int64_t)(h && h->ops->asynchronous ? 3600 : 300) * SPEECH_RATE;
    b->decoders = (decoder *)mem_new((size_t)b->threads, sizeof *b->decoders);
    return b->decoders != NULL;
}

/* Whether all ranks could begin, which is for one alone to say, and with the same sources. */
static int block_agree(const audio_block *b, int ok) {
    slam_ranks *ranks = b->sources->ranks;
    if (slam_ranks_count(ranks) == 1) return ok; // the hash reads all names
    return slam_ranks_agree(ranks, ok) && slam_ranks_agree(ranks, slam_ranks_same(ranks, sources_hash(HASH_START, b->sources)) ||
                                                                      fail("the ranks do not see the same files or lines"));
}

static void block_end(audio_block *b) {
    for (int i = 0; b->decoders && i < b->threads; i++) decoder_close(&b->decoders[i]);
    free(b->decoders);
    free(b->result);
}

/* Tells the watch; what it answers. */
static int block_tell(audio_block *b, size_t done, size_t of, const char *failed, const char *because) {
    b->progress.done = done;
    b->progress.of = of;
    b->progress.failed = failed;
    b->progress.because = because;
    b->told = slam_clock();
    return !b->watch || b->watch(b->context, &b->progress);
}

/* Tells the watch how many are done. 1: no rank's says stop. */
static int block_go_on(audio_block *b, size_t done) {
    const int stop = b->stop || !block_tell(b, done, b->sources->n, NULL, NULL);
    return !slam_ranks_max(b->sources->ranks, stop);
}

/* Asked by every thread before it begins something long; the first one asks the watch. */
static int block_stopping(audio_block *b) {
    int stop = 0;
    if (thread_index() == 0 && slam_clock() - b->told > 0.5 && !block_tell(b, b->progress.done, b->progress.of, NULL, NULL))
        stop = 1;
    if (stop) {
        SLAM_PRAGMA(omp atomic write)
        b->stop = 1;
    }
    SLAM_PRAGMA(omp atomic read)
    stop = b->stop;
    return stop;
}

/* A document's tokens: 1, unit + 2, ..., 1. */
static void text_add_tokens(text *t, const units *u) {
    const uint16_t mark = DOCUMENT_MARK;
    text_add_bytes(t, (const char *)&mark, sizeof mark);
    for (size_t i = 0; i < u->n; i++) {
        const uint16_t token = (uint16_t)(u->unit[i] + UNIT_TOKEN);
        text_add_bytes(t, (const char *)&token, sizeof token);
    }
    text_add_bytes(t, (const char *)&mark, sizeof mark);
}

/* What h->out got since it had `before` bytes is a document. */
static int hear_document(heard *h, size_t before) {
    if (h->out.failed || !mem_grow((void **)&h->document, &h->capacity, h->documents + 1, sizeof *h->document)) return 0;
    h->document[h->documents++] = h->out.n - before;
    return 1;
}

static int hear_units(const audio_block *b, heard *h, const units *u) {
    const size_t before = h->out.n;
    if (b->want == WANT_TOKENS) text_add_tokens(&h->out, u);
    else if (b->want == WANT_UNITS) text_add_units(&h->out, u);
    else text_add_spelled(&h->out, u);
    h->units += u->n;
    h->tokens += u->n + 2;
    return hear_document(h, before);
}

/* as a line has them; both point to the same memory */
static units units_line_of(const slam_units *u, char *name) {
    units line = SLAM_ZERO;
    line.name = name;
    line.unit = u->unit;
    line.duration = u->duration;
    line.n = u->n;
    return line;
}

/* Whether enough samples wait. */
static int block_full(audio_block *b) {
    int64_t waiting;
    SLAM_PRAGMA(omp atomic read)
    waiting = b->waiting;
    return waiting >= b->most_waiting;
}

/* Such a part of audio becomes a clip of h; `must`: an error where it is too short for a frame, else it is passed over. */
static int hear_clip(audio_block *b, heard *h, const audio_parts *p, int must) {
    const slam_hubert *hubert = block_hubert(b);
    const size_t frames = slam_speech_frames(b->speech, p->samples);
    if (hubert && p->samples > INT_MAX / 4)
        return fail("%s: %.0f s in one piece are too long; --max-seconds cuts it", p->from.name, (double)p->samples / SPEECH_RATE);
    if (frames == 0 && must)
        return fail("%s: %.1f ms of audio, which is too short for a frame of HuBERT", p->from.name,
                    1e3 * (double)p->samples / SPEECH_RATE);
    if (frames == 0) return 1;
    clip *c = (clip *)mem_new(1, sizeof *c);
    if (!c || !clips_add(&h->clips, c)) {
        free(c);
        return 0;
    }
    c->start = p->start;
    c->end = p->end;
    c->cut = p->cut;
    c->u.samples = p->samples;
    h->samples += p->samples;
    if (!hubert) return clip_mfcc(c, b->speech, b->quantiser, p->sample);
    SLAM_PRAGMA(omp atomic update)
    b->waiting += (int64_t)p->samples;
    return clip_wait(c, b->speech, p->sample);
}

/* A whole sound, which it closes. */
static int hear_whole(audio_block *b, heard *h, audio_parts *p) {
    const int ok = parts_next(p) > 0 && hear_clip(b, h, p, 1);
    parts_close(p);
    return ok;
}

/* A file's parts, until enough samples wait; h->parts then stays. */
static int hear_audio(audio_block *b, heard *h, decoder *d) {
    int more = 1;
    if (!h->parts) {
        h->parts = (audio_parts *)mem_new(1, sizeof *h->parts);
        more = h->parts && parts_open(h->parts, d, h->name, b->sources->max_seconds) ? 1 : -1;
    } else h->parts->tables = d;
    while (more > 0 && (more = parts_next(h->parts)) > 0) {
        if (h->parts->cut && block_stopping(b)) {
            h->dropped = 1;
            break;
        }
        if (!hear_clip(b, h, h->parts, !h->parts->cut)) more = -1;
        else if (h->parts->cut && block_full(b)) return 1;
    }
    heard_parts_close(h);
    h->finished = 1;
    return more >= 0;
}

/* Units that are there already, in a line of either kind. */
static int hear_line(const audio_block *b, heard *h, const char *line, size_t n) {
    units u = SLAM_ZERO;
    const int most = b->quantiser ? slam_quantiser_count(b->quantiser) : 65534;
    json *root = json_parse(line, n, h->name);
    int ok = root && units_from_json(root, h->name, &u);
    for (size_t i = 0; ok && i < u.n; i++) {
        h->frames += u.duration ? (uint64_t)u.duration[i] : 1;
        if (u.unit[i] >= most) ok = fail("%s: unit %zu is %d, expected less than %d", h->name, i + 1, u.unit[i], most);
    }
    ok = ok && hear_units(b, h, &u);
    json_free(root);
    units_free(&u);
    return ok;
}

/* The audio that a pair names is where the file of pairs is. */
static int hear_named(audio_block *b, heard *h, decoder *d, const json *root, int side) {
    const char *file = b->sources->files.at[0], *name;
    char key[24];
    audio_parts p;
    text path = SLAM_ZERO;
    snprintf(key, sizeof key, "%s_path", pair_names[side]);
    name = json_text(root, key, "");
    if (!*name) return fail("%s: has no string '%s'", h->name, key);
    if (*name != '/') text_add_bytes(&path, file, (size_t)(path_name(file) - file));
    text_add(&path, "%s", name);
    const int ok = !path.failed && parts_open(&p, d, path.at, 0) && hear_whole(b, h, &p);
    if (!ok && path.at) fail("%s: %s", h->name, slam_error());
    text_free(&path);
    return ok;
}

/* What stands in a pair besides the three: strings, numbers and truth values stay as they are. */
static void text_add_members(text *t, const json *root) {
    int first = 1;
    for (const json *j = root->first; j; j = j->next) {
        int side = 0;
        for (int i = 0; i < 3; i++) side |= !strcmp(j->key, pair_names[i]);
        if (side || j->type == JSON_ARRAY || j->type == JSON_OBJECT) continue;
        text_add(t, first ? "" : ", ");
        text_add_json(t, j->key);
        text_add(t, ": ");
        if (j->type == JSON_STRING) text_add_json(t, j->string);
        else text_add(t, "%s", json_describe(j));
        first = 0;
    }
}

static int hear_pair(audio_block *b, heard *h, decoder *d, const char *line, size_t n) {
    json *root = json_parse(line, n, h->name);
    int ok = root && (root->type == JSON_OBJECT || fail("%s: expected an object", h->name));
    const char *prompt = ok ? json_text(root, "prompt_text", NULL) : NULL,
               *chosen = ok ? json_text(root, "chosen_text", NULL) : NULL;
    const int may = prompt && chosen ? pair_may(prompt, chosen, b->sources->max_repetition) : 1;
    h->repeats = may == 0;
    ok = ok && may >= 0;
    if (ok && !h->repeats) {
        text_add(&h->head, "{");
        text_add_members(&h->head, root);
        for (int side = 0; ok && side < 3; side++) ok = hear_named(b, h, d, root, side);
    }
    json_free(root);
    return ok;
}

/* The voices take turns, line by line. */
static const slam_list *source_voice(const slam_sources *s, size_t i) {
    return &s->voice[(source_at(s, i)->number - 1) % s->voices];
}

/* Words of source i, spoken, as p. */
static int hear_spoken(const audio_block *b, const heard *h, decoder *d, size_t i, const char *words, audio_parts *p) {
    memset(p, 0, sizeof *p);
    parts_begin(p, d, 0);
    return command_speak(source_voice(b->sources, i), words, h->name, &p->from);
}

/* "prompt_text": ..., and the three as clips; side = (3) */
static int hear_sides(audio_block *b, heard *h, decoder *d, size_t i, char *const *side) {
    audio_parts p;
    int ok = 1;
    for (int k = 0; k < 3; k++) {
        text_add(&h->head, "%s\"%s_text\": ", k ? ", " : "{", pair_names[k]);
        text_add_json(&h->head, side[k]);
    }
    for (int k = 0; ok && k < 3; k++) ok = hear_spoken(b, h, d, i, side[k], &p) && hear_whole(b, h, &p);
    return ok;
}

/* A line of text; of pairs: prompt, chosen and rejected with tabs between them, which become zeros here. */
static int hear_text(audio_block *b, heard *h, decoder *d, size_t i, char *words, size_t n) {
    char *side[3] = {words, NULL, NULL};
    int sides = 1;
    if (memchr(words, 0, n)) return fail("%s: holds a zero byte, expected text", h->name);
    if (!b->sources->pairs) {
        audio_parts p;
        return hear_spoken(b, h, d, i, words, &p) && hear_whole(b, h, &p);
    }
    for (char *c = words; sides < 3 && *c; c++)
        if (*c == '\t') {
            *c = 0;
            side[sides++] = c + 1;
        }
    const int may = pair_may(side[0], side[1], b->sources->max_repetition);
    h->repeats = may == 0;
    return may > 0 ? hear_sides(b, h, d, i, side) : may == 0;
}

static int hear_source(audio_block *b, heard *h, size_t i) {
    const slam_sources *s = b->sources;
    decoder *d = &b->decoders[thread_index()];
    if (!h->name) return 0;
    if (s->kind == SOURCE_AUDIO) return hear_audio(b, h, d);
    h->finished = 1;
    const char *line = source_text(s, i);
    const size_t n = source_at(s, i)->n;
    if (s->kind == SOURCE_UNITS) return hear_line(b, h, line, n);
    if (s->kind == SOURCE_PAIRS) return hear_pair(b, h, d, line, n);
    char *words = (char *)mem_new(n + 1, 1);
    if (words) memcpy(words, line, n);
    const int ok = words && hear_text(b, h, d, i, words, n);
    free(words);
    return ok;
}

/* Says so where a source failed. */
static void heard_check(heard *h, int ok) {
    if (ok) return;
    heard_parts_close(h);
    h->finished = h->failed = 1;
    h->error = text_copy(slam_error());
    h->machine = machine_failed;
}

/* Source i, from where it was left; not where enough samples wait. */
static void block_hear(audio_block *b, size_t i, heard *h) {
    if (h->finished || block_full(b)) return;
    machine_failed = 0;
    if (block_stopping(b)) {
        heard_parts_close(h);
        h->finished = h->dropped = 1;
        return;
    }
    if (!h->name) h->name = source_name(b->sources, i);
    heard_check(h, hear_source(b, h, i));
}

/* What the device makes of the clips that wait. 0: it failed, which ends the job. */
static int block_encode(audio_block *b, clip_list *waiting) {
    size_t n, frames;
    int ok = 1;
    if (waiting->n) qsort(waiting->at, waiting->n, sizeof *waiting->at, clip_is_shorter);
    for (size_t i = 0; ok && i < waiting->n && !block_stopping(b); i += n) {
        n = encode_next(block_hubert(b), waiting->at + i, waiting->n - i, &frames);
        for (size_t k = i; k < i + n; k++) b->progress.seconds += (double)waiting->at[k]->u.samples / SPEECH_RATE;
        ok = encode_batch(b->speech, b->quantiser, waiting->at + i, n, frames);
    }
    waiting->n = 0;
    return ok;
}

/* Decodes what there is room for. An asynchronous device meanwhile encodes what was decoded before: the first thread sees to
   that, the others go ahead. */
static int block_round(audio_block *b, size_t first, size_t all, heard *result, clip_list *waiting) {
    const slam_hubert *h = block_hubert(b);
    const int beside = h && h->ops->asynchronous && b->threads > 1;
    int ok = beside || block_encode(b, waiting);
    b->waiting = 0;
    /* Where there are fewer sources than threads, the threads share each one's frames instead. */
    SLAM_PRAGMA(omp parallel if (beside || all >= (size_t)b->threads)) {
        SLAM_PRAGMA(omp master)
        if (beside) ok = block_encode(b, waiting);
        SLAM_PRAGMA(omp for schedule(dynamic))
        for (int64_t i = 0; i < (int64_t)all; i++) block_hear(b, block_source(b, first + (size_t)i), &result[i]);
    }
    for (size_t i = 0; ok && h && !b->stop && i < all; i++)
        for (size_t k = 0; ok && k < result[i].clips.n; k++)
            if (result[i].clips.at[k]->sample) ok = clips_add(waiting, result[i].clips.at[k]);
    return ok;
}

/* A source that was heard: its clips become documents. */
static int block_spell(const audio_block *b, heard *h) {
    if (b->sources->kind == SOURCE_UNITS || h->repeats) return 1;
    for (size_t i = 0; i < h->clips.n; i++) {
        clip *c = h->clips.at[i];
        units line = units_line_of(&c->u, h->name);
        h->frames += c->u.frames;
        if (c->cut) {
            line.start = c->start;
            line.end = c->end;
        }
        if (b->sources->pairs) {
            text_add(&h->head, ", \"%s\": {", pair_names[i]);
            text_add_unit_lists(&h->head, &line);
            text_add(&h->head, "}");
            h->units += c->u.n;
            h->tokens += c->u.n + 1;
        } else if (!hear_units(b, h, &line)) return 0;
    }
    if (!b->sources->pairs) return 1;
    text_add(&h->head, "}\n");
    h->out = h->head;
    memset(&h->head, 0, sizeof h->head);
    return hear_document(h, 0);
}

static void block_finish(const audio_block *b, heard *h) {
    if (!h->failed && !h->dropped && b->want > WANT_CLIPS) {
        machine_failed = 0;
        heard_check(h, block_spell(b, h));
        heard_clips_free(h);
    } else
        for (size_t i = 0; i < h->clips.n; i++) h->frames += h->clips.at[i]->u.frames;
}

/* Hears `all` sources from the first on into `result`. 0 and the sentence where the machine failed. */
static int block_listen(audio_block *b, size_t first, size_t all, heard *result) {
    clip_list waiting = SLAM_ZERO;
    size_t finished = 0;
    int ok = 1;
    while (ok && (finished < all || waiting.n)) {
        ok = block_round(b, first, all, result, &waiting);
        while (finished < all && result[finished].finished) finished++;
    }
    free(waiting.at);
    if (!ok) return 0;
    for (size_t i = 0; i < all && b->stop; i++) // what a stop left in the queue
        for (size_t k = 0; k < result[i].clips.n; k++) result[i].dropped |= result[i].clips.at[k]->sample != NULL;
    SLAM_PRAGMA(omp parallel for schedule(dynamic))
    for (int64_t i = 0; i < (int64_t)all; i++) block_finish(b, &result[i]);
    return 1;
}

/* ---- what one rank has heard, for the others: structures as they lie in memory, each followed by what its pointers show ---- */

static void pack_run(text *t, const void *x, size_t n) {
    text_add_bytes(t, (const char *)&n, sizeof n);
    if (x) text_add_bytes(t, (const char *)x, n);
}

static void pack_string(text *t, const char *string) { pack_run(t, string, string ? strlen(string) + 1 : 0); }

static void pack_heard(text *t, const heard *h, size_t D) {
    text_add_bytes(t, (const char *)h, sizeof *h);
    pack_string(t, h->name);
    pack_string(t, h->error);
    pack_run(t, h->document, h->documents * sizeof *h->document);
    pack_run(t, h->out.at, h->out.n);
    for (size_t i = 0; i < h->clips.n; i++) {
        const clip *c = h->clips.at[i];
        text_add_bytes(t, (const char *)c, sizeof *c);
        pack_run(t, c->u.unit, c->u.n * sizeof *c->u.unit);
        pack_run(t, c->u.duration, c->u.n * sizeof *c->u.duration);
        pack_run(t, c->feature, c->feature ? c->u.frames * D * sizeof *c->feature : 0);
    }
}

static void unpack_bytes(const char **at, void *x, size_t n) {
    memcpy(x, *at, n);
    *at += n;
}

/* What was packed, in memory of its own, NULL where it is nothing; clears *ok where there is no room. */
static void *unpack_run(const char **at, int *ok) {
    size_t n;
    unpack_bytes(at, &n, sizeof n);
    void *x = n && *ok ? mem_new(n, 1) : NULL;
    *ok &= x || !n;
    if (x) memcpy(x, *at, n);
    *at += n;
    return x;
}

static int unpack_clip(const char **at, clip_list *list) {
    int ok = 1;
    clip *c = (clip *)mem_new(1, sizeof *c);
    if (!c || !clips_add(list, c)) {
        free(c);
        return 0;
    }
    unpack_bytes(at, c, sizeof *c);
    c->sample = NULL;
    c->u.unit = (int *)unpack_run(at, &ok);
    c->u.duration = (int *)unpack_run(at, &ok);
    c->feature = (float *)unpack_run(at, &ok);
    return ok;
}

static int unpack_heard(const char **at, heard *h) {
    int ok = 1;
    unpack_bytes(at, h, sizeof *h);
    const size_t clips = h->clips.n;
    h->parts = NULL;
    memset(&h->clips, 0, sizeof h->clips);
    memset(&h->head, 0, sizeof h->head);
    h->name = (char *)unpack_run(at, &ok);
    h->error = (char *)unpack_run(at, &ok);
    h->document = (size_t *)unpack_run(at, &ok);
    h->out.at = (char *)unpack_run(at, &ok);
    for (size_t i = 0; ok && i < clips; i++) ok = unpack_clip(at, &h->clips);
    return ok;
}

/* What each rank has heard, results first..end-1 here, becomes everyone's, and so does a failure. */
static int block_share(audio_block *b, int ok, size_t first, size_t end, size_t all) {
    slam_ranks *ranks = b->sources->ranks;
    text t = SLAM_ZERO;
    if (slam_ranks_count(ranks) == 1) return ok;
    for (size_t i = first; ok && i < end; i++) {
        if (b->result[i].failed || b->result[i].dropped) heard_clips_free(&b->result[i]);
        pack_heard(&t, &b->result[i], b->speech ? (size_t)slam_speech_width(b->speech) : 0);
        ok = !t.failed;
    }
    size_t bytes, own = t.n;
    char *whole = slam_ranks_agree(ranks, ok) ? (char *)slam_ranks_all_gather(ranks, t.at, t.n, &bytes) : NULL;
    const char *at = whole;
    text_free(&t);
    if (!whole) return 0;
    for (size_t i = 0; ok && i < first; i++) ok = unpack_heard(&at, &b->result[i]);
    at += own;
    for (size_t i = end; ok && i < all; i++) ok = unpack_heard(&at, &b->result[i]);
    free(whole);
    return slam_ranks_agree(ranks, ok);
}

/* All ranks hear sources first..first+n-1, at most, and all have them; how many in *n: all before the first that a stop left out.
   0 and the sentence where a machine failed. */
static int block_run(audio_block *b, size_t first, size_t *n) {
    const double start = slam_clock(), heard_before = b->progress.seconds;
    slam_ranks *ranks = b->sources->ranks;
    b->n = (size_t)slam_ranks_max(ranks, (long)b->n);
    const size_t rest = b->sources->n - first, most = b->n * (size_t)slam_ranks_count(ranks), all = rest < most ? rest : most;
    size_t mine, end;
    slam_ranks_share(ranks, all, &mine, &end);
    b->told = start;
    b->stop = 0;
    b->progress.failed = NULL;
    int ok = mem_grow((void **)&b->result, &b->capacity, all, sizeof *b->result);
    if (ok) memset(b->result, 0, all * sizeof *b->result);
    const size_t ready = ok ? all : 0;
    ok = ok && block_listen(b, first + mine, end - mine, b->result + mine);
    if (!block_share(b, ok, mine, end, all)) {
        for (size_t i = 0; i < ready; i++) heard_free(&b->result[i]);
        return 0;
    }
    double seconds = b->progress.seconds - heard_before; // here, ...
    slam_ranks_sum(ranks, &seconds, 1);
    b->progress.seconds = heard_before + seconds; // ... and everywhere
    seconds = slam_clock() - start;
    if (seconds < 1 && b->n < 4096) b->n *= 2;
    if (seconds > 4 && b->n > (size_t)b->threads) b->n /= 2;
    for (*n = 0; *n < all && !b->result[*n].dropped; ++*n)
        if (!block_hubert(b)) b->progress.seconds += (double)b->result[*n].samples / SPEECH_RATE;
    for (size_t i = *n; i < all; i++) heard_free(&b->result[i]);
    return 1;
}

/* Tells of a source that failed. 0 and the sentence where the machine did: that ends the job, which can go on when there is
   room. */
static int block_tell_failed(audio_block *b, size_t i, const heard *h) {
    if (h->machine) return fail("%s", h->error ? h->error : "out of memory");
    block_tell(b, i, b->sources->n, h->name, h->error);
    return 1;
}

/* Algorithm R (Waterman, in Knuth's volume 2): each of the frames seen so far is in the sample with the same probability. */
typedef struct reservoir {
    float *frame;
    size_t n, capacity, most;
    uint64_t seen, state;
} reservoir;

static int reservoir_add(reservoir *r, const float *frames, size_t n, size_t D) {
    const size_t room = r->most - r->n;
    if (!mem_grow((void **)&r->frame, &r->capacity, r->n + (n < room ? n : room), D * sizeof *r->frame)) return 0;
    for (size_t i = 0; i < n; i++, r->seen++) {
        const uint64_t place = r->n < r->most ? r->n++ : rng_below(&r->state, r->seen + 1);
        if (place < r->most) memcpy(r->frame + place * D, frames + i * D, D * sizeof *frames);
    }
    return 1;
}

/* The frames of one source */
static int fit_add(reservoir *r, const heard *h, size_t D) {
    for (size_t i = 0; i < h->clips.n; i++)
        if (!reservoir_add(r, h->clips.at[i]->feature, h->clips.at[i]->u.frames, D)) return 0;
    return 1;
}

enum { FIT_BYTES = 1 << 28 }; // of features that a block should not exceed by much

/* Whether a file is heard hangs on those before it in the order alone: of a block, whose length hangs on the clock, what lies
   beyond the file that fills the sample is dropped. */
static int fit_listen(audio_block *b, reservoir *r) {
    const size_t D = (size_t)slam_speech_width(b->speech), of = b->sources->n;
    size_t n;
    b->progress.stage = "listen";
    if (block_hubert(b)) b->n = 1;
    block_tell(b, 0, of, NULL, NULL);
    for (size_t at = 0; at < of && r->seen / 8 < r->most; at += n) {
        if (!block_run(b, at, &n)) return 0;
        int ok = 1;
        uint64_t bytes = 0;
        for (size_t i = 0; i < n; i++) {
            const heard *h = &b->result[i];
            bytes += h->frames * D * sizeof(float);
            if (ok && r->seen / 8 < r->most) ok = h->failed ? block_tell_failed(b, at + i, h) : fit_add(r, h, D);
            heard_free(&b->result[i]);
        }
        if (!slam_ranks_agree(b->sources->ranks, ok)) return 0;
        if (bytes > FIT_BYTES) b->n = b->n / 4 + 1;
        if (!block_go_on(b, at + n)) return fail("stopped before the centroids were found");
    }
    return 1;
}

static uint64_t fit_origin(const slam_speech_settings *s, const slam_sources *sources, int K, size_t frames, uint64_t seed) {
    const uint64_t numbers[] = {
        (uint64_t)s->features, (uint64_t)s->rate, s->normalize != 0, s->dedup != 0, (uint64_t)K, frames, seed};
    uint64_t hash = hash_bytes(HASH_START, numbers, sizeof numbers);
    if (s->features == SLAM_HUBERT) hash = hash_bytes(hash_bytes(hash, &s->layer, sizeof s->layer), s->hubert, strlen(s->hubert));
    return sources_hash(hash, sources);
}

/* Whether a file can be made at this path. */
static int path_can_be_made(const char *path) {
    text folder = SLAM_ZERO;
    const char *name = path_name(path);
    if (name == path) text_add(&folder, ".");
    else text_add_bytes(&folder, path, (size_t)(name - path));
    int ok = !folder.failed;
    if (ok && access(folder.at, W_OK | X_OK) != 0) ok = fail("%s: cannot be written: %s: %s", path, folder.at, strerror(errno));
    text_free(&folder);
    return ok;
}

static int path_exists(const char *path) {
    struct stat s;
    return lstat(path, &s) == 0;
}

static int fail_exists(const char *path) {
    return fail("%s: exists already; remove it or give another name (nothing is overwritten)", path);
}

/* KM.json is written first: one without KM.npy, of the same origin, is what a kill between the two left. */
int slam_quantiser_may_fit(const char *path, const slam_speech_settings *settings, const slam_sources *sources, int K,
                           size_t frames, uint64_t seed) {
    char *json_path = settings_path(path), origin[20];
    if (!json_path) return 0;
    json *root = path_is_file(json_path) ? json_read(json_path) : NULL;
    snprintf(origin, sizeof origin, "%016llx", (unsigned long long)fit_origin(settings, sources, K, frames, seed));
    const int same = root && !strcmp(json_text(root, "origin", ""), origin);
    int may = path_can_be_made(path);
    if (may && path_exists(path)) may = same ? 2 : fail_exists(path);
    else if (may && path_exists(json_path) && !same) may = fail_exists(json_path);
    json_free(root);
    free(json_path);
    return may;
}

slam_quantiser *slam_quantiser_fit(const slam_speech_settings *settings, slam_ops *ops, const slam_sources *sources, int K,
                                   size_t frames, uint64_t seed, slam_speech_watch *watch, void *context,
                                   slam_kmeans_report *report) {
    audio_block b = SLAM_ZERO;
    reservoir r = SLAM_ZERO;
    slam_quantiser *q = NULL;
    slam_speech *speech = slam_speech_new(settings, ops);
    size_t *order = (size_t *)mem_new(sources->n, sizeof *order);
    r.most = frames;
    r.state = rng_stream(seed, 0x6b6d, 1);
    uint64_t state = rng_stream(seed, 0x6b6d, 2);
    for (size_t i = 0; order && i < sources->n; i++) {
        const size_t j = (size_t)rng_below(&state, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    b.speech = speech;
    b.sources = sources;
    b.want = WANT_FEATURES;
    b.order = order;
    b.watch = watch;
    b.context = context;
    if (block_agree(&b, speech && order && block_begin(&b)) && fit_listen(&b, &r)) {
        float *centroids = (float *)mem_new((size_t)K, (size_t)slam_speech_width(speech) * sizeof *centroids);
        if (slam_ranks_agree(sources->ranks, centroids != NULL) &&
            kmeans_on(sources->ranks, r.frame, r.n, slam_speech_width(speech), K, seed, centroids, watch, context, report))
            q = quantiser_of(speech, ops, centroids, K);
        report->origin = fit_origin(settings, sources, K, frames, seed);
        if (q) speech = NULL; // it has it now
        free(centroids);
    }
    if (!slam_ranks_agree(sources->ranks, q != NULL)) {
        slam_quantiser_free(q);
        q = NULL;
    }
    block_end(&b);
    free(r.frame);
    free(order);
    slam_speech_free(speech);
    return q;
}

#ifdef __clang__
#pragma clang fp contract(on)
#endif

/* ---- tokenising ----
   OUT.partial takes what is done: tokens (uint16) for OUT.bin, lines for OUT.jsonl. OUT.journal says how much of it counts and
   how many sources that was, and is written when that much is on the disk. A call that finds a journal cuts OUT.partial to it and
   goes on from there. */

typedef struct corpus {
    const slam_quantiser *quantiser; // NULL: the units were there, and nothing is said of them
    uint64_t shard_tokens;
    int binary, want;
    const char *out;
    char *partial, *journal, *failed, *failed_partial;
    FILE *data, *failures;
    int root;                           // this rank writes; the others only hear
    int locked;                         // OUT.partial is this process's
    uint64_t identity;                  // a hash of settings and sources
    uint64_t done, bytes, failed_bytes; // sources; of the partial files
    uint64_t shards;                    // that are written
    uint64_t part;                      // documents of the source after `done` that are in these shards already
    slam_tokenize_report *report;
    double committed;
} corpus;

/* OUT without its ending, and `end` */
static char *path_beside(const char *out, const char *end) {
    const char *name = path_name(out), *dot = strrchr(name, '.');
    return text_print("%.*s%s", (int)(dot && dot > name ? dot - out : (long)strlen(out)), out, end);
}

static char *path_with(const char *out, const char *end) { return text_print("%s%s", out, end); }

static char *shard_path(const corpus *c, uint64_t number) {
    char end[40];
    snprintf(end, sizeof end, "-%05llu.bin", (unsigned long long)number);
    return path_beside(c->out, end);
}

static uint64_t corpus_identity(const corpus *c, const slam_sources *sources) {
    const uint64_t numbers[] = {c->quantiser ? c->quantiser->fingerprint : 0, (uint64_t)c->want, c->binary ? c->shard_tokens : 0};
    return sources_hash(hash_bytes(HASH_START, numbers, sizeof numbers), sources);
}

/* What is done so far, on the disk. */
static int corpus_commit(corpus *c) {
    const slam_tokenize_report *r = c->report;
    text t = SLAM_ZERO;
    if (fflush(c->data) != 0 || fsync(fileno(c->data)) != 0) return fail("%s: cannot be written: %s", c->partial, strerror(errno));
    if (fflush(c->failures) != 0 || fsync(fileno(c->failures)) != 0)
        return fail("%s: cannot be written: %s", c->failed_partial, strerror(errno));
    text_add(&t, "{\"identity\": \"%016llx\"", (unsigned long long)c->identity);
    const struct {
        const char *name;
        uint64_t value;
    } member[] = {{"done", c->done},       {"bytes", c->bytes},         {"failed_bytes", c->failed_bytes},
                  {"shards", c->shards},   {"part", c->part},           {"failed", r->failed},
                  {"repeats", r->repeats}, {"documents", r->documents}, {"samples", r->samples},
                  {"frames", r->frames},   {"units", r->units},         {"tokens", r->tokens}};
    for (size_t i = 0; i < sizeof member / sizeof *member; i++)
        text_add(&t, ", \"%s\": %llu", member[i].name, (unsigned long long)member[i].value);
    text_add(&t, "}\n");
    const int ok = !t.failed && file_write(c->journal, t.at, t.n);
    text_free(&t);
    c->committed = slam_clock();
    return ok;
}

static int journal_number(const json *root, const char *path, const char *name, uint64_t *out) {
    long n = -1;
    if (!json_int(root, name, path, 0, 9007199254740992, &n)) return 0;
    if (n < 0) return fail("%s: '%s' is missing", path, name);
    *out = (uint64_t)n;
    return 1;
}

static int journal_read(corpus *c, const json *root) {
    slam_tokenize_report *r = c->report;
    uint64_t failed = 0, repeats = 0, documents = 0;
    char identity[20];
    snprintf(identity, sizeof identity, "%016llx", (unsigned long long)c->identity);
    if (strcmp(json_text(root, "identity", ""), identity))
        return fail(
            "%s: belongs to a call with other files or settings, cut short; repeat that one, or remove this file to begin anew",
            c->journal);
    if (!journal_number(root, c->journal, "done", &c->done) || !journal_number(root, c->journal, "bytes", &c->bytes) ||
        !journal_number(root, c->journal, "failed_bytes", &c->failed_bytes) ||
        !journal_number(root, c->journal, "shards", &c->shards) || !journal_number(root, c->journal, "part", &c->part) ||
        !journal_number(root, c->journal, "failed", &failed) || !journal_number(root, c->journal, "repeats", &repeats) ||
        !journal_number(root, c->journal, "documents", &documents) || !journal_number(root, c->journal, "samples", &r->samples) ||
        !journal_number(root, c->journal, "frames", &r->frames) || !journal_number(root, c->journal, "units", &r->units) ||
        !journal_number(root, c->journal, "tokens", &r->tokens))
        return 0;
    if (failed > c->done || repeats > c->done - failed)
        return fail("%s: counts %llu failed files of %llu", c->journal, (unsigned long long)failed, (unsigned long long)c->done);
    if (c->binary && c->bytes % 2)
        return fail("%s: counts %llu bytes of tokens, expected 2 a token", c->journal, (unsigned long long)c->bytes);
    r->failed = (size_t)failed;
    r->repeats = (size_t)repeats;
    r->documents = (size_t)documents;
    r->earlier = (size_t)c->done;
    return 1;
}

/* Cuts a partial file to what counts; further writes go there. */
static int partial_cut(FILE *f, const char *path, uint64_t bytes) {
    struct stat s;
    if (fstat(fileno(f), &s) == 0 && (uint64_t)s.st_size >= bytes && ftruncate(fileno(f), (off_t)bytes) == 0 &&
        fseeko(f, (off_t)bytes, SEEK_SET) == 0)
        return 1;
    return fail("%s: cannot be cut to the %llu bytes that its journal counts", path, (unsigned long long)bytes);
}

static FILE *partial_open(const char *path) {
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "r+b");
    if (!f) fail("%s: cannot be opened: %s", path, strerror(errno));
    if (!f && fd >= 0) close(fd);
    return f;
}

/* A kill may have come after a partial file got its last name and before the journal went. */
static int partial_take_back(const char *partial, const char *path) {
    if (path_exists(partial) || !path_is_file(path) || rename(path, partial) == 0) return 1;
    return fail("%s: cannot be renamed to %s: %s", path, partial, strerror(errno));
}

int slam_tokenize_may(const char *out) {
    if (!path_ends(out, ".bin") && !path_ends(out, ".jsonl")) return fail("%s: expected a name that ends in .bin or .jsonl", out);
    char *journal = path_with(out, ".journal"), *first = path_beside(out, "-00001.bin");
    int ok = journal && first && path_can_be_made(out);
    if (ok && !path_exists(journal)) {
        if (path_exists(out)) ok = fail_exists(out);
        else if (path_ends(out, ".bin") && path_exists(first)) ok = fail_exists(first);
    }
    free(journal);
    free(first);
    return ok;
}

/* Opens OUT.partial, or OUT.jsonl where it has that name again already, and holds it against other processes until it is closed. */
static int corpus_lock(corpus *c) {
    struct stat named, held;
    const int renamed = !c->binary && !path_exists(c->partial) && path_exists(c->journal) && path_is_file(c->out);
    const char *path = renamed ? c->out : c->partial;
    c->data = partial_open(path);
    if (!c->data) return 0;
    /* a file system without locks says so, and gets none; one that was renamed or removed meanwhile was another's just now */
    if ((flock(fileno(c->data), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) || stat(path, &named) != 0 ||
        fstat(fileno(c->data), &held) != 0 || named.st_ino != held.st_ino || named.st_dev != held.st_dev)
        return fail("%s: another process is at work on it", c->out);
    c->locked = 1;
    return !renamed || partial_take_back(c->partial, c->out);
}

static int corpus_resume(corpus *c, const slam_sources *sources) {
    if (!path_is_file(c->journal)) return 1;
    json *root = json_read(c->journal);
    int ok = root && journal_read(c, root);
    if (ok && c->done > sources->n) ok = fail("%s: counts %llu files of %zu", c->journal, (unsigned long long)c->done, sources->n);
    json_free(root);
    return ok && partial_take_back(c->failed_partial, c->failed);
}

static int corpus_begin(corpus *c, const slam_sources *sources) {
    c->binary = path_ends(c->out, ".bin");
    c->partial = path_with(c->out, ".partial");
    c->journal = path_with(c->out, ".journal");
    c->failed = path_with(c->out, ".failed");
    c->failed_partial = path_with(c->out, ".failed.partial");
    if (!c->partial || !c->journal || !c->failed || !c->failed_partial) return 0;
    if (!slam_tokenize_may(c->out)) {
        if (path_exists(c->out) && !path_exists(c->journal)) { // left by a kill after the journal was removed: no call resumes them
            unlink(c->partial);
            unlink(c->failed_partial);
        }
        return 0;
    }
    c->identity = corpus_identity(c, sources);
    /* once it is locked nothing changes any more: OUT may have come while it was looked for */
    if (!corpus_lock(c) || !slam_tokenize_may(c->out) || !corpus_resume(c, sources)) return 0;
    c->failures = partial_open(c->failed_partial);
    return c->failures && partial_cut(c->data, c->partial, c->bytes) &&
           partial_cut(c->failures, c->failed_partial, c->failed_bytes) && corpus_commit(c);
}

/* A call that was refused, or that failed before anything was done, leaves nothing that was not there before. */
static void corpus_end(corpus *c, int ok) {
    if (c->locked && !ok && c->done == 0 && c->shards == 0) unlink(c->journal);
    if (c->locked && !path_exists(c->journal)) {
        unlink(c->partial);
        unlink(c->failed_partial);
    }
    if (c->data) fclose(c->data);
    if (c->failures) fclose(c->failures);
    free(c->partial);
    free(c->journal);
    free(c->failed);
    free(c->failed_partial);
}

/* What OUT.partial holds becomes a shard. */
static int corpus_shard(corpus *c, const char *path) {
    shard_writer w;
    file_map map;
    if (fflush(c->data) != 0) return fail("%s: cannot be written: %s", c->partial, strerror(errno));
    if (!map_open(&map, c->partial)) return 0;
    int ok = map.size == c->bytes || fail("%s: has %zu bytes, expected %llu", c->partial, map.size, (unsigned long long)c->bytes);
    if (ok) {
        ok = shard_begin(&w, path, c->quantiser ? c->quantiser->K + UNIT_TOKEN : 0, c->quantiser ? c->quantiser->fingerprint : 0);
        if (ok && !shard_add(&w, (const uint16_t *)(const void *)map.data, map.size / 2)) {
            shard_abandon(&w);
            ok = 0;
        }
        ok = ok && shard_end(&w);
    }
    map_close(&map);
    return ok;
}

/* A full shard is written first, then forgotten here: a kill between the two writes the same one again. */
static int corpus_next_shard(corpus *c) {
    char *path = shard_path(c, c->shards + 1);
    int ok = path && corpus_shard(c, path);
    free(path);
    if (!ok) return 0;
    c->shards++;
    c->bytes = 0;
    if (!corpus_commit(c)) return 0;
    if (ftruncate(fileno(c->data), 0) != 0 || fseeko(c->data, 0, SEEK_SET) != 0)
        return fail("%s: cannot be emptied: %s", c->partial, strerror(errno));
    return 1;
}

/* The documents of a source. No document crosses shards. A shard may end within a source, which does not count as done then: a call
   that goes on from there leaves out the documents that are in shards. */
static int corpus_add_documents(corpus *c, const heard *h) {
    const char *at = h->out.at;
    for (size_t i = 0; i < h->documents; i++) {
        const size_t n = h->document[i];
        const char *document = at;
        at += n;
        if (i < c->part) continue;
        c->part = i;
        if (c->binary && c->bytes && (c->bytes + n) / 2 > c->shard_tokens && !corpus_next_shard(c)) return 0;
        if (fwrite(document, 1, n, c->data) != n) return fail("%s: cannot be written: %s", c->partial, strerror(errno));
        c->bytes += n;
    }
    c->part = 0;
    return 1;
}

static int corpus_add(corpus *c, const heard *h) {
    slam_tokenize_report *r = c->report;
    if (!h->failed && !corpus_add_documents(c, h)) return 0;
    c->done++;
    r->repeats += (size_t)h->repeats;
    r->failed += (size_t)h->failed;
    if (h->failed) {
        const int n = fprintf(c->failures, "%s\n", h->name);
        if (n < 0) return fail("%s: cannot be written: %s", c->failed_partial, strerror(errno));
        c->failed_bytes += (uint64_t)n;
        return 1;
    }
    r->documents += h->documents;
    r->samples += h->samples;
    r->frames += h->frames;
    r->units += h->units;
    r->tokens += h->tokens;
    return 1;
}

/* Takes n sources that were heard. */
static int corpus_take(corpus *c, audio_block *b, size_t at, size_t n) {
    int ok = 1;
    for (size_t i = 0; i < n; i++) {
        const heard *h = &b->result[i];
        if (ok && h->failed) ok = block_tell_failed(b, at + i, h);
        ok = ok && (!c->root || corpus_add(c, h));
        heard_free(&b->result[i]);
    }
    return slam_ranks_agree(b->sources->ranks, ok);
}

/* Blocks of sources until the list ends or a watch says stop. */
static int corpus_run(corpus *c, audio_block *b) {
    const size_t of = b->sources->n;
    size_t n;
    b->progress.stage = "tokenize";
    slam_ranks_broadcast(b->sources->ranks, &c->done, sizeof c->done);
    block_tell(b, (size_t)c->done, of, NULL, NULL);
    for (size_t at = (size_t)c->done; at < of; at += n) {
        if (!block_run(b, at, &n) || !corpus_take(c, b, at, n)) return 0;
        const int last = at + n == of;
        c->report->stopped = !block_go_on(b, at + n) && !last;
        const int due = c->root && (last || c->report->stopped || slam_clock() - c->committed > 1);
        if (!slam_ranks_agree(b->sources->ranks, !due || corpus_commit(c))) return 0;
        if (c->report->stopped) return 1;
    }
    return 1;
}

/* All is in OUT.partial: it becomes OUT, the journal goes last but for what it describes. */
static int corpus_finish(corpus *c) {
    const int any = c->report->documents > 0;
    int ok = 1;
    if (any && c->binary) ok = corpus_shard(c, c->out);
    if (ok && any && !c->binary && rename(c->partial, c->out) != 0)
        ok = fail("%s: cannot be renamed into place: %s", c->out, strerror(errno));
    if (ok && c->report->failed && rename(c->failed_partial, c->failed) != 0)
        ok = fail("%s: cannot be renamed into place: %s", c->failed, strerror(errno));
    if (!ok) return 0;
    if (!c->report->failed) {
        unlink(c->failed);
        unlink(c->failed_partial);
    }
    unlink(c->journal);
    unlink(c->partial);
    c->report->shards = any ? (int)c->shards + 1 : 0;
    return any || fail("none of the %zu files or lines could be used", (size_t)c->done);
}

int slam_tokenize(const slam_quantiser *quantiser, const slam_sources *sources, const char *out, int audio_repr,
                  uint64_t shard_tokens, slam_speech_watch *watch, void *context, slam_tokenize_report *report) {
    corpus c = SLAM_ZERO;
    audio_block b = SLAM_ZERO;
    memset(report, 0, sizeof *report);
    if (!quantiser && sources->kind != SOURCE_UNITS) return fail("no centroids, expected those that make audio into units");
    if (sources->pairs && !path_ends(out, ".jsonl")) return fail("%s: pairs go into a name that ends in .jsonl", out);
    c.quantiser = b.quantiser = quantiser;
    b.speech = quantiser ? quantiser->speech : NULL;
    c.shard_tokens = shard_tokens;
    c.want = b.want = path_ends(out, ".bin") ? WANT_TOKENS : audio_repr ? WANT_SPELLED : WANT_UNITS;
    c.report = report;
    c.out = out;
    b.sources = sources;
    b.watch = watch;
    b.context = context;
    c.root = slam_ranks_root(sources->ranks);
    int ok = block_agree(&b, block_begin(&b) && (!c.root || corpus_begin(&c, sources))) && corpus_run(&c, &b);
    report->files = (size_t)c.done;
    if (ok && !report->stopped) ok = slam_ranks_agree(sources->ranks, !c.root || corpus_finish(&c));
    slam_ranks_broadcast(sources->ranks, report, sizeof *report);
    corpus_end(&c, ok);
    block_end(&b);
    return ok;
}

int slam_quantiser_sources(const slam_quantiser *q, const slam_sources *sources, slam_units *units, slam_speech_watch *watch,
                           void *context) {
    audio_block b = SLAM_ZERO;
    size_t n;
    memset(units, 0, sources->n * sizeof *units);
    if (sources->kind != SOURCE_AUDIO || sources->max_seconds > 0) return fail("expected audio files that are not cut");
    b.speech = q->speech;
    b.quantiser = q;
    b.sources = sources;
    b.want = WANT_CLIPS;
    b.watch = watch;
    b.context = context;
    b.progress.stage = "tokenize";
    int ok = block_agree(&b, block_begin(&b));
    for (size_t at = 0; ok && at < sources->n; at += n) {
        if (!(ok = block_run(&b, at, &n))) break;
        for (size_t i = 0; i < n; i++) {
            heard *h = &b.result[i];
            if (ok && h->failed) ok = block_tell_failed(&b, at + i, h);
            else if (ok && h->clips.n) {
                units[at + i] = h->clips.at[0]->u;
                memset(&h->clips.at[0]->u, 0, sizeof h->clips.at[0]->u);
            }
            heard_free(h);
        }
        ok = slam_ranks_agree(sources->ranks, ok) && (block_go_on(&b, at + n) || fail("stopped before all audio was heard"));
    }
    for (size_t i = 0; !ok && i < sources->n; i++) slam_units_free(&units[i]);
    block_end(&b);
    return ok;
}

/* ==========================================================================================
   11. PREFERENCE         two endings of a prompt, one of them preferred: DPO
   Pairs are read, cut and packed into rows; a file keeps what the reference says of them; a step is
   a forward pass, the pairs' losses from its log-probabilities, and the backward pass of it.
   may use: 1 base, 2 formats, 3 ops, 6 ranks, 7 model, 9 data
   ========================================================================================== */

/* ---- pairs ---- */

/* Where in all tokens the units of a pair stand: the prompt's, the chosen ending's, the rejected one's. */
typedef struct preference {
    size_t first;
    uint32_t n[3];
} preference;
enum { PROMPT, CHOSEN, REJECTED };

struct slam_pairs {
    int V, context, share, prepared;
    double max_repetition;
    uint16_t *tokens; // of units, without the marks
    size_t n_tokens, tokens_capacity;
    preference *at;
    size_t n, capacity, validation_from; // until they are prepared those from here on are to validate on
    uint32_t *train, *validation;        // numbers of pairs
    size_t n_train, n_validation, validation_capacity;
    double *reference; // (n,2): log-probabilities of chosen and rejected
    size_t known;      // of so many pairs from the first
    slam_pairs_size size;
};

slam_pairs *slam_pairs_new(int V, int context, int share, double max_repetition) {
    if (V <= UNIT_TOKEN || context < 4 || context > LONGEST_CONTEXT) {
        fail("pairs for a vocabulary of %d and a context of %d, expected at least %d and 4 to %d", V, context, UNIT_TOKEN + 1,
             LONGEST_CONTEXT);
        return NULL;
    }
    slam_pairs *p = (slam_pairs *)mem_new(1, sizeof *p);
    if (!p) return NULL;
    p->V = V;
    p->context = context;
    p->share = share;
    p->max_repetition = max_repetition;
    return p;
}

void slam_pairs_free(slam_pairs *p) {
    if (!p) return;
    free(p->tokens);
    free(p->at);
    free(p->train);
    free(p->validation);
    free(p->reference);
    free(p);
}

/* Positions of a prompt up to its last token, which heads each ending; and of an ending with that head. The 1 that closes an ending
   is a target alone: nothing comes after it. */
static int prompt_size(const preference *q) { return (int)q->n[PROMPT]; }
static int ending_size(const preference *q, int part) { return (int)q->n[part] + 1; }
static int shared_size(const preference *q) { return prompt_size(q) + ending_size(q, CHOSEN) + ending_size(q, REJECTED); }
static int apart_size(const preference *q, int part) { return prompt_size(q) + ending_size(q, part); }
static int is_shared(const slam_pairs *p, const preference *q) { return p->share && shared_size(q) <= p->context; }
/* What a pair takes of a row. */
static int pair_size(const slam_pairs *p, const preference *q) {
    return is_shared(p, q) ? shared_size(q) : apart_size(q, CHOSEN) + apart_size(q, REJECTED);
}

int slam_pairs_row(const slam_pairs *p) { return 2 * p->context < 1024 ? 1024 : 2 * p->context; }

/* ---- reading ---- */

/* One of a pair's three parts, appended to the tokens. */
static int pair_read_part(slam_pairs *p, preference *q, const json *root, int part, const char *what, units *u) {
    const int most = (p->V < 65536 ? p->V : 65536) - UNIT_TOKEN;
    const json *value = json_get(root, pair_names[part]);
    char *name = text_print("%s: '%s'", what, pair_names[part]);
    int ok = name != NULL;
    if (ok && !value) ok = fail("%s: has no '%s'", what, pair_names[part]);
    ok = ok && units_from_json(value, name, u) &&
         mem_grow((void **)&p->tokens, &p->tokens_capacity, p->n_tokens + u->n, sizeof *p->tokens);
    for (size_t i = 0; ok && i < u->n; i++) {
        if (u->unit[i] >= most)
            ok = fail("%s: unit %zu is %d, expected below %d (a vocabulary of %d tokens)", name, i + 1, u->unit[i], most, p->V);
        else p->tokens[p->n_tokens++] = (uint16_t)(u->unit[i] + UNIT_TOKEN);
    }
    if (ok) q->n[part] = (uint32_t)u->n;
    free(name);
    return ok;
}

/* Whether a pair is good to learn from; counts those that are not. */
static int pair_speaks(slam_pairs *p, const preference *q) {
    const uint16_t *chosen = p->tokens + q->first + q->n[PROMPT], *rejected = chosen + q->n[CHOSEN];
    const uint32_t longer = q->n[CHOSEN] > q->n[REJECTED] ? q->n[CHOSEN] : q->n[REJECTED];
    if (!q->n[CHOSEN] || !q->n[REJECTED]) p->size.silent++;
    else if (q->n[CHOSEN] == q->n[REJECTED] && !memcmp(chosen, rejected, q->n[CHOSEN] * sizeof *chosen)) p->size.same++;
    else if (longer > (uint32_t)p->context - 2) p->size.large++;
    else return 1;
    return 0;
}

/* The prompt's end is what an ending goes on from: its beginning gives way. */
static void pair_cut(slam_pairs *p, preference *q) {
    const uint32_t longer = q->n[CHOSEN] > q->n[REJECTED] ? q->n[CHOSEN] : q->n[REJECTED], room = (uint32_t)p->context - 2 - longer;
    if (q->n[PROMPT] <= room) return;
    q->first += q->n[PROMPT] - room;
    q->n[PROMPT] = room;
    p->size.cut++;
}

static int pair_read(slam_pairs *p, const json *root, const char *what, units *u) {
    preference q = SLAM_ZERO;
    if (root->type != JSON_OBJECT) return fail("%s: found %s, expected an object", what, json_describe(root));
    q.first = p->n_tokens;
    for (int part = PROMPT; part <= REJECTED; part++)
        if (!pair_read_part(p, &q, root, part, what, u)) return 0;
    const char *prompt = json_text(root, "prompt_text", NULL), *chosen = json_text(root, "chosen_text", NULL);
    const int may = prompt && chosen ? pair_may(prompt, chosen, p->max_repetition) : 1;
    if (may < 0) return 0;
    p->size.repeats += !may;
    if (!may || !pair_speaks(p, &q)) {
        p->n_tokens = q.first;
        return 1;
    }
    pair_cut(p, &q);
    if (p->n == UINT32_MAX) return fail("%s: more than %u pairs", what, UINT32_MAX);
    if (!mem_grow((void **)&p->at, &p->capacity, p->n + 1, sizeof *p->at)) return 0;
    p->at[p->n++] = q;
    p->size.apart += p->share && !is_shared(p, &q);
    return 1;
}

static int pairs_read(slam_pairs *p, const char *path) {
    units_reader reader;
    units u = SLAM_ZERO;
    json *root;
    int got = 0;
    if (path_is_folder(path)) return fail("%s: is a folder, expected a file or a pattern such as %s/*.jsonl", path, path);
    if (!path_ends(path, ".jsonl")) return fail("%s: expected preference pairs (.jsonl)", path);
    if (!units_open(&reader, path)) return 0;
    while ((got = units_json(&reader, &root)) > 0) {
        const int ok = pair_read(p, root, reader.what, &u);
        json_free(root);
        if (!ok) got = -1;
        if (!ok) break;
    }
    if (got == 0 && reader.line == 0) got = fail("%s: is empty, expected preference pairs", path) - 1;
    units_free(&u);
    units_close(&reader);
    return got == 0;
}

int slam_pairs_add(slam_pairs *p, const char *pattern, int validation) {
    names list = SLAM_ZERO;
    const size_t before = p->n;
    if (p->prepared) return fail("%s: cannot be added to pairs that are prepared", pattern);
    int ok = match_files(pattern, &list);
    for (size_t i = 0; ok && i < list.n; i++) ok = pairs_read(p, list.at[i]);
    names_free(&list);
    if (ok && validation && p->n == before) ok = fail("%s: holds no pair to validate on", pattern);
    if (!ok || !validation) return ok;
    if (!mem_grow((void **)&p->validation, &p->validation_capacity, p->n_validation + p->n - before, sizeof *p->validation))
        return 0;
    for (size_t i = before; i < p->n; i++) p->validation[p->n_validation++] = (uint32_t)i;
    return 1;
}

/* Selection sampling, as documents are held out. */
int slam_pairs_prepare(slam_pairs *p, double fraction, uint64_t seed) {
    if (p->prepared) return fail("pairs can be prepared only once");
    if (!(fraction >= 0 && fraction < 1)) return fail("held-out fraction %g, expected at least 0 and below 1", fraction);
    const size_t given = p->n_validation, n = p->n - given;
    uint64_t held = fraction > 0 ? (uint64_t)(fraction * (double)n + 0.5) : 0, random = rng_stream(seed, 0, STREAM_HELD_OUT);
    if (fraction > 0 && held < 1) held = 1;
    if (n <= held)
        return fail(
            "no pair is left to train on: %zu there were, %llu held out; %llu left out that repeat themselves, %llu without a "
            "unit, %llu of which both endings are the same, %llu too long",
            n, (unsigned long long)held, (unsigned long long)p->size.repeats, (unsigned long long)p->size.silent,
            (unsigned long long)p->size.same, (unsigned long long)p->size.large);
    p->train = (uint32_t *)mem_new(n, sizeof *p->train);
    p->reference = (double *)mem_new(2 * p->n, sizeof *p->reference);
    if (!p->train || !p->reference ||
        !mem_grow((void **)&p->validation, &p->validation_capacity, given + (size_t)held, sizeof *p->validation))
        return 0;
    for (size_t i = 0, left = n, next = 0; i < p->n; i++) {
        if (next < given && p->validation[next] == i) {
            next++;
            continue;
        }
        const int chosen = held && rng_below(&random, left) < held;
        left--;
        held -= (uint64_t)chosen;
        if (chosen) p->validation[p->n_validation++] = (uint32_t)i;
        else p->train[p->n_train++] = (uint32_t)i;
    }
    p->prepared = 1;
    p->size.train = p->n_train;
    p->size.validation = p->n_validation;
    return 1;
}

uint64_t slam_pairs_hash(const slam_pairs *p) {
    const uint64_t numbers[] = {(uint64_t)p->V, (uint64_t)p->context, p->n, p->n_train};
    uint64_t hash = hash_bytes(HASH_START, numbers, sizeof numbers);
    for (size_t i = 0; i < p->n; i++) {
        const preference *q = &p->at[i];
        hash = hash_bytes(hash, q->n, sizeof q->n);
        hash = hash_bytes(hash, p->tokens + q->first, ((size_t)q->n[0] + q->n[1] + q->n[2]) * sizeof *p->tokens);
    }
    return hash_bytes(hash, p->validation, p->n_validation * sizeof *p->validation);
}

/* ---- packing: pairs -> rows ---- */

/* A pair in the rows of a batch: where the heads of its endings stand. */
typedef struct pair_place {
    uint32_t pair, turn; // turn: in the batch, as it was drawn
    int size, row, at[2];
} pair_place;

/* A batch of pairs, packed; and room for some rows of it at once. */
typedef struct pair_rows {
    const slam_pairs *pairs;
    pair_place *place; // (n), in the order of rows
    double *logp;      // (n,2), of the endings
    size_t n, capacity;
    int rows, *used; // (rows): positions that are taken
    uint64_t tokens;
    int micro;     // rows at once
    int *ints;     // (micro,T) tokens, targets, doc_start, (micro,T,2) holes
    float *losses; // (micro,T), and as many weights
} pair_rows;

static void rows_free(pair_rows *r) {
    free(r->place);
    free(r->logp);
    free(r->used);
    free(r->ints);
    free(r->losses);
    memset(r, 0, sizeof *r);
}

/* For batches of up to `capacity` pairs; micro 0: they are only counted. */
static int rows_new(pair_rows *r, const slam_pairs *p, size_t capacity, int micro) {
    const size_t n = (size_t)micro * (size_t)slam_pairs_row(p);
    memset(r, 0, sizeof *r);
    r->pairs = p;
    r->capacity = capacity;
    r->micro = micro;
    int ok = (r->place = (pair_place *)mem_new(capacity, sizeof *r->place)) != NULL;
    ok = ok && (r->logp = (double *)mem_new(capacity, 2 * sizeof *r->logp)) != NULL;
    ok = ok && (r->used = (int *)mem_new(capacity, sizeof *r->used)) != NULL;
    ok = ok && (r->ints = (int *)mem_new(n, 5 * sizeof *r->ints)) != NULL;
    ok = ok && (r->losses = (float *)mem_new(n, 2 * sizeof *r->losses)) != NULL;
    if (!ok) rows_free(r);
    return ok;
}

static int larger_pair(const void *a, const void *b) {
    const pair_place *x = (const pair_place *)a, *y = (const pair_place *)b;
    return x->size != y->size ? (x->size < y->size) - (x->size > y->size) : (x->turn > y->turn) - (x->turn < y->turn);
}

static int earlier_place(const void *a, const void *b) {
    const pair_place *x = (const pair_place *)a, *y = (const pair_place *)b;
    return x->row != y->row ? (x->row > y->row) - (x->row < y->row) : (x->at[0] > y->at[0]) - (x->at[0] < y->at[0]);
}

/* Behind what stands in the row. */
static void place_pair(pair_rows *r, pair_place *place, int row) {
    const preference *q = &r->pairs->at[place->pair];
    const int start = r->used[row], first = start + prompt_size(q), second = first + ending_size(q, CHOSEN);
    place->row = row;
    place->at[0] = first;
    place->at[1] = is_shared(r->pairs, q) ? second : second + prompt_size(q);
    r->used[row] += place->size;
}

static void order_pairs(const slam_pairs *p, uint32_t *order, uint64_t seed, uint64_t epoch) {
    memcpy(order, p->train, p->n_train * sizeof *order);
    shuffle_numbers(order, p->n_train, rng_stream(seed, epoch, STREAM_ORDER));
}

/* The row for so many positions more. rows 0: the first that has room, a new one where none has (first fit: Johnson 1973); otherwise
   the emptiest of so many, -1 where it has none (Graham 1969). */
static int row_for(pair_rows *r, int size, int rows) {
    const int most = slam_pairs_row(r->pairs);
    int row = 0;
    if (!rows) {
        while (row < r->rows && r->used[row] + size > most) row++;
        if (row == r->rows) r->rows++;
        return row;
    }
    for (int i = 1; i < rows; i++)
        if (r->used[i] < r->used[row]) row = i;
    return r->used[row] + size <= most ? row : -1;
}

/* Places the pairs, which lie the largest first; 0 where they do not fit into so many rows. */
static int pack_into(pair_rows *r, int rows) {
    r->rows = 0;
    memset(r->used, 0, r->n * sizeof *r->used);
    for (size_t i = 0; i < r->n; i++) {
        const int row = row_for(r, r->place[i].size, rows);
        if (row < 0) return 0;
        place_pair(r, &r->place[i], row);
    }
    if (rows) r->rows = rows;
    return 1;
}

/* As few rows as first fit takes, and those of about the same length where the pairs allow it: a batch is as short as its longest
   row, so hardly anything is padding. How a batch is packed hangs on its pairs and their order alone. */
static void pack_pairs(pair_rows *r, const uint32_t *list, size_t n) {
    r->n = n;
    r->tokens = 0;
    for (size_t i = 0; i < n; i++) {
        r->place[i].pair = list[i];
        r->place[i].turn = (uint32_t)i;
        r->place[i].size = pair_size(r->pairs, &r->pairs->at[list[i]]);
        r->tokens += (uint64_t)r->place[i].size;
    }
    qsort(r->place, n, sizeof *r->place, larger_pair);
    pack_into(r, 0);
    if (!pack_into(r, r->rows)) pack_into(r, 0);
    qsort(r->place, n, sizeof *r->place, earlier_place);
}

/* The longest of some rows, as a batch of them has it. */
static int rows_length(const pair_rows *r, int first, int n) {
    int T = 1;
    for (int i = first; i < first + n; i++) T = r->used[i] > T ? r->used[i] : T;
    return (T + 15) / 16 * 16 < slam_pairs_row(r->pairs) ? (T + 15) / 16 * 16 : slam_pairs_row(r->pairs);
}

static void put_token(slam_batch *b, size_t i, int token, int target, int start, int hole, int hole_end) {
    b->tokens[i] = token;
    b->targets[i] = target;
    b->doc_start[i] = start;
    b->hole[2 * i] = hole;
    b->hole[2 * i + 1] = hole_end;
}

/* All of the prompt but its last token; nothing in it is a target. */
static void put_prompt(slam_batch *b, const uint16_t *prompt, int n, int row, int start) {
    for (int k = 0; k < n; k++)
        put_token(b, (size_t)row * b->T + start + k, k ? (int)prompt[k - 1] : (int)DOCUMENT_MARK, -1, start, 0, 0);
}

/* The prompt's last token and an ending, each with what comes next for a target. The piece begins at `start`; from hole to hole_end
   stands the other ending. */
static void put_ending(slam_batch *b, int head, const uint16_t *ending, int n, int row, int at, int start, int hole, int hole_end) {
    for (int k = 0; k <= n; k++)
        put_token(b, (size_t)row * b->T + at + k, k ? ending[k - 1] : head, k < n ? (int)ending[k] : (int)DOCUMENT_MARK, start,
                  hole, hole_end);
}

static void put_pair(slam_batch *b, const slam_pairs *p, const pair_place *place, int first_row) {
    const preference *q = &p->at[place->pair];
    const uint16_t *prompt = p->tokens + q->first, *ending = prompt + q->n[PROMPT];
    const int n = prompt_size(q), head = n ? (int)prompt[n - 1] : (int)DOCUMENT_MARK, shared = is_shared(p, q);
    for (int side = 0; side < 2; side++) {
        const int row = place->row - first_row, at = place->at[side], start = shared ? place->at[0] - n : at - n,
                  hole = shared && side;
        if (!hole) put_prompt(b, prompt, n, row, start);
        put_ending(b, head, ending, (int)q->n[CHOSEN + side], row, at, start, hole ? place->at[0] : 0, hole ? place->at[1] : 0);
        ending += q->n[CHOSEN];
    }
}

/* How many rows from `row` on are computed at once: parts of about the same size. */
static int rows_at_once(const pair_rows *r, int row) {
    const int parts = (r->rows + r->micro - 1) / r->micro, even = (r->rows + parts - 1) / parts;
    return r->rows - row < even ? r->rows - row : even;
}

/* Where the places of the rows that are computed with place `first`'s end. */
static size_t rows_end(const pair_rows *r, size_t first) {
    const int row = r->place[first].row, end = row + rows_at_once(r, row);
    while (first < r->n && r->place[first].row < end) first++;
    return first;
}

/* The next rows, beginning with place `first`, as a batch as short as its longest row; returns the end of its places. */
static size_t rows_fill(pair_rows *r, size_t first, slam_batch *b) {
    const int row = r->place[first].row;
    const size_t end = rows_end(r, first);
    b->B = rows_at_once(r, row);
    b->T = rows_length(r, row, b->B);
    const size_t n = (size_t)b->B * b->T;
    b->tokens = r->ints;
    b->targets = r->ints + n;
    b->doc_start = r->ints + 2 * n;
    b->hole = r->ints + 3 * n;
    for (size_t i = 0; i < n; i++) put_token(b, i, 0, -1, (int)(i % b->T), 0, 0);
    for (size_t i = first; i < end; i++) put_pair(b, r->pairs, &r->place[i], row);
    return end;
}

/* ---- what a model says of the endings ---- */

/* The head of an ending in a batch whose first row is `row`. */
static size_t ending_at(const slam_batch *b, const pair_place *place, int side, int row) {
    return (size_t)(place->row - row) * b->T + place->at[side];
}

/* Forward of the rows that begin with place `first`: log-probabilities of their endings, up to place *end. */
static int rows_forward(pair_rows *r, slam_model *m, size_t first, slam_batch *b, size_t *end) {
    const int row = r->place[first].row;
    *end = rows_fill(r, first, b);
    if (!slam_model_losses(m, b, r->losses)) return 0;
    for (size_t i = first; i < *end; i++)
        for (int side = 0; side < 2; side++) {
            const float *losses = r->losses + ending_at(b, &r->place[i], side, row);
            const int n = ending_size(&r->pairs->at[r->place[i].pair], CHOSEN + side);
            double sum = 0;
            for (int k = 0; k < n; k++) sum += losses[k];
            r->logp[2 * i + side] = -sum;
        }
    return 1;
}

/* Forward of all rows, dealt to the ranks (NULL: alone) a batch at a time: log-probabilities of all endings. */
static int rows_forward_all(pair_rows *r, slam_model *m) {
    slam_ranks *ranks = m->ops->ranks;
    int ok = 1, turn = 0;
    memset(r->logp, 0, 2 * r->n * sizeof *r->logp);
    for (size_t first = 0, end; ok && first < r->n; first = end, turn++) {
        slam_batch b;
        if (turn % slam_ranks_count(ranks) == slam_ranks_rank(ranks)) ok = rows_forward(r, m, first, &b, &end);
        else end = rows_end(r, first);
    }
    if (!slam_ranks_agree(ranks, ok)) return 0;
    slam_ranks_sum(ranks, r->logp, 2 * r->n);
    return 1;
}

int slam_pairs_measure(const slam_pairs *p, int batch, uint64_t seed, slam_pairs_size *size) {
    pair_rows r;
    *size = p->size;
    uint32_t *order = (uint32_t *)mem_new(p->n_train, sizeof *order);
    if (!order || !rows_new(&r, p, (size_t)batch < p->n_train ? (size_t)batch : p->n_train, 0)) {
        free(order);
        return 0;
    }
    order_pairs(p, order, seed, 0);
    for (size_t first = 0; first < p->n_train; first += (size_t)batch) {
        pack_pairs(&r, order + first, p->n_train - first < (size_t)batch ? p->n_train - first : (size_t)batch);
        size->tokens += r.tokens;
        size->rows += (uint64_t)r.rows;
        size->positions += (uint64_t)r.rows * (uint64_t)rows_length(&r, 0, r.rows);
        if (r.rows > size->most_rows) size->most_rows = r.rows;
    }
    rows_free(&r);
    free(order);
    return 1;
}

/* ---- the reference's file: a header, then chunks of log-probabilities (chosen, rejected), each with its hash ---- */

enum { REFERENCE_CHUNK = 256 };

static size_t chunk_of(size_t left) { return left < REFERENCE_CHUNK ? left : (size_t)REFERENCE_CHUNK; }

typedef struct reference_header {
    char mark[8];
    uint64_t pairs, model, n, check; // hashes; how many pairs; a hash of all that
} reference_header;

static reference_header reference_describe(const slam_pairs *p, uint64_t model) {
    reference_header h;
    memcpy(h.mark, "slamref1", sizeof h.mark);
    h.pairs = slam_pairs_hash(p);
    h.model = model;
    h.n = p->n;
    h.check = hash_bytes(HASH_START, &h, offsetof(reference_header, check));
    return h;
}

static uint64_t reference_check(size_t first, const double *logp, size_t n) {
    const uint64_t at = first;
    return hash_bytes(hash_bytes(HASH_START, &at, sizeof at), logp, 2 * n * sizeof *logp);
}

/* As many whole chunks as there are from `at` on. */
static int reference_take(slam_pairs *p, const unsigned char *at, size_t size, const char *path) {
    while (p->known < p->n) {
        const size_t n = chunk_of(p->n - p->known), bytes = 2 * n * sizeof(double);
        double *logp = p->reference + 2 * p->known;
        uint64_t check;
        if (size < bytes + sizeof check) break;
        memcpy(logp, at, bytes);
        memcpy(&check, at + bytes, sizeof check);
        if (check != reference_check(p->known, logp, n)) break;
        for (size_t i = 0; i < 2 * n; i++)
            if (!isfinite(logp[i])) return fail("%s: a log-probability of pair %zu is not finite", path, p->known + i / 2 + 1);
        p->known += n;
        at += bytes + sizeof check;
        size -= bytes + sizeof check;
    }
    return 1;
}

int slam_pairs_recall(slam_pairs *p, const char *path, uint64_t model, uint64_t *known) {
    reference_header h;
    file_map map;
    *known = p->known = 0;
    if (!p->prepared) return fail("pairs that are not prepared have no reference");
    if (!path_is_file(path)) return 1;
    if (!map_open(&map, path)) return 0;
    const reference_header want = reference_describe(p, model);
    int ok = 1;
    if (map.size >= sizeof h) {
        memcpy(&h, map.data, sizeof h);
        const int whole = h.check == hash_bytes(HASH_START, &h, offsetof(reference_header, check));
        if (memcmp(h.mark, want.mark, sizeof h.mark)) ok = fail("%s: holds no log-probabilities of a reference model", path);
        else if (whole && h.model != want.model)
            ok = fail("%s: log-probabilities of model %016llx, expected those of %016llx: the reference is another one", path,
                      (unsigned long long)h.model, (unsigned long long)want.model);
        else if (whole && (h.pairs != want.pairs || h.n != want.n))
            ok = fail("%s: log-probabilities of other pairs (%llu, %016llx), expected %llu, %016llx", path, (unsigned long long)h.n,
                      (unsigned long long)h.pairs, (unsigned long long)want.n, (unsigned long long)want.pairs);
        else if (whole) ok = reference_take(p, map.data + sizeof h, map.size - sizeof h, path);
    }
    map_close(&map);
    *known = p->known;
    return ok;
}

/* The file, cut to what is known of it. */
static FILE *reference_open(const slam_pairs *p, const char *path, uint64_t model) {
    const reference_header h = reference_describe(p, model);
    const size_t chunks = (p->known + REFERENCE_CHUNK - 1) / REFERENCE_CHUNK,
                 size = sizeof h + 2 * p->known * sizeof(double) + chunks * sizeof(uint64_t);
    FILE *f = fopen(path, p->known ? "r+b" : "wb");
    if (f && (p->known ? ftruncate(fileno(f), (off_t)size) == 0 && fseek(f, 0, SEEK_END) == 0 : fwrite(&h, sizeof h, 1, f) == 1))
        return f;
    fail("%s: cannot be written: %s", path, strerror(errno));
    if (f) fclose(f);
    return NULL;
}

/* The next chunk; on the disk before the one after it is begun. */
static int reference_write(FILE *f, const char *path, const slam_pairs *p, size_t n) {
    const double *logp = p->reference + 2 * p->known;
    const uint64_t check = reference_check(p->known, logp, n);
    return part_write(f, path, logp, 2 * n * sizeof *logp) && part_write(f, path, &check, sizeof check) &&
           (fflush(f) == 0 && fsync(fileno(f)) == 0 ? 1 : fail("%s: cannot be written: %s", path, strerror(errno)));
}

static int reference_next(slam_pairs *p, pair_rows *r, slam_model *m, size_t n) {
    uint32_t list[REFERENCE_CHUNK] = SLAM_ZERO;
    for (size_t i = 0; i < n; i++) list[i] = (uint32_t)(p->known + i);
    pack_pairs(r, list, n);
    if (!rows_forward_all(r, m)) return 0;
    for (size_t i = 0; i < 2 * n; i++) {
        if (!isfinite(r->logp[i]))
            return fail("the reference's log-probability of pair %u (from 1) is not finite", r->place[i / 2].pair + 1);
        p->reference[2 * (size_t)r->place[i / 2].pair + i % 2] = r->logp[i];
    }
    return 1;
}

int slam_pairs_compute(slam_pairs *p, slam_model *reference, int micro, const char *path, uint64_t model, slam_pairs_watch *watch,
                       void *context) {
    slam_ranks *ranks = reference->ops->ranks;
    pair_rows r = SLAM_ZERO;
    FILE *f = NULL;
    int going = 1;
    if (!p->prepared) return fail("pairs that are not prepared have no reference");
    if (!slam_ranks_root(ranks)) path = NULL;
    int ok = rows_new(&r, p, REFERENCE_CHUNK, micro) && (!path || (f = reference_open(p, path, model)) != NULL);
    ok = slam_ranks_agree(ranks, ok);
    while (ok && p->known < p->n && (going = !slam_ranks_max(ranks, watch && !watch(context, p->known, p->n)))) {
        const size_t n = chunk_of(p->n - p->known);
        ok = slam_ranks_agree(ranks, reference_next(p, &r, reference, n) && (!f || reference_write(f, path, p, n)));
        if (ok) p->known += n;
    }
    if (f && ok) ok = file_finish(f, path);
    else if (f) fclose(f);
    rows_free(&r);
    return !slam_ranks_agree(ranks, ok) ? 0 : going ? 1 : 2;
}

/* ---- DPO ---- */

struct slam_dpo {
    slam_model *model;
    const slam_pairs *pairs;
    double beta, label_smoothing;
    int batch;
    uint64_t seed, epoch, turn; // turn: pairs of this epoch that were taken
    uint32_t *order, *drawn;    // the epoch's; this rank's share of the batch
    int begun;                  // the order is of this epoch
    pair_rows rows, few;        // the batch; some hundred pairs to validate on
    slam_dpo_figures step, evaluation;
};

void slam_dpo_free(slam_dpo *d) {
    if (!d) return;
    rows_free(&d->rows);
    rows_free(&d->few);
    free(d->order);
    free(d->drawn);
    free(d);
}

slam_dpo *slam_dpo_new(slam_model *model, const slam_pairs *pairs, double beta, double label_smoothing, int batch, int micro,
                       int mode, uint64_t seed) {
    if (!pairs->prepared || batch < 1 || !(beta > 0) || !(label_smoothing >= 0 && label_smoothing <= 0.5)) {
        fail("DPO with beta %g, label smoothing %g and batches of %d pairs: expected beta above 0, smoothing from 0 to 0.5, and at "
             "least 1 pair, of pairs that are prepared",
             beta, label_smoothing, batch);
        return NULL;
    }
    slam_dpo *d = (slam_dpo *)mem_new(1, sizeof *d);
    if (!d) return NULL;
    d->model = model;
    d->pairs = pairs;
    d->beta = beta;
    d->label_smoothing = label_smoothing;
    d->batch = batch;
    d->seed = seed;
    int ok = (d->order = (uint32_t *)mem_new(pairs->n_train, sizeof *d->order)) != NULL;
    ok = ok && (d->drawn = (uint32_t *)mem_new((size_t)batch, sizeof *d->drawn)) != NULL;
    ok = ok && rows_new(&d->rows, pairs, (size_t)batch, micro) && rows_new(&d->few, pairs, REFERENCE_CHUNK, micro);
    if (ok && slam_model_plan(model, micro, slam_pairs_row(pairs), mode)) return d;
    slam_dpo_free(d);
    return NULL;
}

int slam_dpo_next(slam_dpo *d, uint64_t *tokens, uint64_t *pairs) {
    size_t first, end;
    slam_ranks_share(d->model->ops->ranks, (size_t)d->batch, &first, &end);
    *tokens = 0;
    *pairs = (uint64_t)d->batch;
    for (size_t i = 0; i < (size_t)d->batch; i++) {
        if (d->begun && d->turn == d->pairs->n_train) {
            d->epoch++;
            d->turn = 0;
            d->begun = 0;
        }
        if (!d->begun) order_pairs(d->pairs, d->order, d->seed, d->epoch);
        d->begun = 1;
        const uint32_t pair = d->order[d->turn++];
        *tokens += (uint64_t)pair_size(d->pairs, &d->pairs->at[pair]);
        if (i >= first && i < end) d->drawn[i - first] = pair;
    }
    pack_pairs(&d->rows, d->drawn, end - first);
    return 1;
}

void slam_dpo_tell(const slam_dpo *d, uint64_t *epoch, uint64_t *turn) {
    *epoch = d->epoch;
    *turn = d->turn;
}

int slam_dpo_seek(slam_dpo *d, uint64_t epoch, uint64_t turn) {
    if (turn > d->pairs->n_train)
        return fail("pair %llu of epoch %llu, but there are %zu: the pairs are not those of before", (unsigned long long)turn,
                    (unsigned long long)epoch, d->pairs->n_train);
    order_pairs(d->pairs, d->order, d->seed, epoch);
    d->begun = 1;
    d->epoch = epoch;
    d->turn = turn;
    return 1;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

static double above(double x, double y) { return x > y ? 1 : x == y ? 0.5 : 0; }

/* Adds a pair to the figures and returns how its loss grows with its margin. */
static double pair_loss(const slam_dpo *d, uint32_t number, const double logp[2], slam_dpo_figures *sum) {
    const double *reference = d->pairs->reference + 2 * (size_t)number, e = d->label_smoothing;
    const double D = (logp[0] - reference[0]) - (logp[1] - reference[1]), x = d->beta * D;
    sum->loss += -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x);
    sum->margin += D;
    sum->accuracy += above(D, 0);
    sum->logp_chosen += logp[0];
    sum->logp_rejected += logp[1];
    sum->preferred += above(logp[0], logp[1]);
    sum->reference_preferred += above(reference[0], reference[1]);
    return -d->beta * ((1 - e) * sigmoid(-x) - e * sigmoid(x));
}

static slam_dpo_figures figures_mean(slam_dpo_figures sum, double n) {
    const slam_dpo_figures mean = {sum.loss / n,          sum.margin / n,    sum.accuracy / n,           sum.logp_chosen / n,
                                   sum.logp_rejected / n, sum.preferred / n, sum.reference_preferred / n};
    return mean;
}

static int reference_known(const slam_pairs *p) {
    return p->known == p->n ? 1 : fail("the reference's log-probabilities are known of %zu pairs of %zu", p->known, p->n);
}

/* The losses of tokens are -log p, so an ending's share of the gradient comes in with the sign turned: minus dloss/dD for the chosen
   one, plus for the rejected one. */
int slam_dpo_accumulate(slam_dpo *d, uint64_t pairs, slam_after_layer *after_layer, void *context) {
    pair_rows *r = &d->rows;
    slam_dpo_figures sum = SLAM_ZERO;
    if (!reference_known(d->pairs)) return 0;
    for (size_t first = 0, end; first < r->n; first = end) {
        slam_batch b;
        const int row = r->place[first].row;
        const double before = sum.loss;
        if (!rows_forward(r, d->model, first, &b, &end)) return 0;
        float *weights = r->losses + (size_t)r->micro * (size_t)slam_pairs_row(d->pairs);
        memset(weights, 0, (size_t)b.B * b.T * sizeof *weights);
        for (size_t i = first; i < end; i++) {
            const double slope = pair_loss(d, r->place[i].pair, r->logp + 2 * i, &sum) / (double)pairs;
            for (int side = 0; side < 2; side++) {
                const size_t at = ending_at(&b, &r->place[i], side, row);
                const int n = ending_size(&d->pairs->at[r->place[i].pair], CHOSEN + side);
                for (int k = 0; k < n; k++) weights[at + k] = (float)(side ? slope : -slope);
            }
        }
        if (!slam_model_backward_from(d->model, weights, sum.loss - before, end == r->n ? after_layer : NULL, context)) return 0;
    }
    slam_ranks_sum(d->model->ops->ranks, &sum.loss, sizeof sum / sizeof sum.loss);
    d->step = figures_mean(sum, (double)pairs);
    return 1;
}

int slam_dpo_validates(const slam_dpo *d) { return d->pairs->n_validation > 0; }

int slam_dpo_evaluate(slam_dpo *d) {
    const slam_pairs *p = d->pairs;
    pair_rows *r = &d->few;
    slam_dpo_figures sum = SLAM_ZERO;
    if (!reference_known(p)) return 0;
    if (p->n_validation == 0) return fail("there are no pairs to validate on");
    for (size_t done = 0; done < p->n_validation; done += r->n) {
        pack_pairs(r, p->validation + done, chunk_of(p->n_validation - done));
        if (!rows_forward_all(r, d->model)) return 0;
        for (size_t i = 0; i < r->n; i++) pair_loss(d, r->place[i].pair, r->logp + 2 * i, &sum);
    }
    d->evaluation = figures_mean(sum, (double)p->n_validation);
    return 1;
}

slam_dpo_figures slam_dpo_last(const slam_dpo *d, int evaluation) { return evaluation ? d->evaluation : d->step; }

/* ==========================================================================================
   12. SCORING            perplexity, n-grams, test sets, generation
   What a model has learned, in nats a token: its loss on data, and beside it what counting
   alone reaches on the same tokens.
   may use: 1 base, 2 formats, 3 ops, 6 ranks, 7 model, 9 data, 10 speech
   ========================================================================================== */

/* ---- loss of a model on data ----
   Ranks take batches in turn: of the next ones each rank computes one, then all of them add up the losses of all, token after token.
   So a sum has the order, and the bits, that it has where one rank computes everything. */

typedef struct scored_batch {
    slam_batch batch;
    float *own, *all; // (B,T): the losses of this rank's batch; of all ranks' (own where there is but one)
    size_t n;         // losses in `all`
} scored_batch;

static int scored_batch_new(scored_batch *s, int B, int T) {
    const size_t n = (size_t)B * (size_t)T;
    const scored_batch none = SLAM_ZERO;
    *s = none;
    s->batch.B = B;
    s->batch.T = T;
    s->batch.tokens = (int *)mem_new(n, 3 * sizeof(int));
    s->own = s->all = (float *)mem_new(n, sizeof(float));
    if (!s->batch.tokens || !s->own) return 0;
    s->batch.targets = s->batch.tokens + n;
    s->batch.doc_start = s->batch.tokens + 2 * n;
    return 1;
}

static void scored_batch_free(scored_batch *s) {
    if (s->all != s->own) free(s->all);
    free(s->batch.tokens), free(s->own);
}

/* The losses of targets, in the order of batches and their rows, where all ranks have read theirs (ok). A rank without rows (B 0) takes
   part all the same. */
static int score_batch(slam_model *model, scored_batch *s, int ok) {
    slam_ranks *ranks = model->ops->ranks;
    const slam_batch *b = &s->batch;
    const size_t positions = (size_t)b->B * (size_t)b->T;
    size_t bytes;
    ok = ok && (b->B == 0 || slam_model_losses(model, b, s->own));
    if (!slam_ranks_agree(ranks, ok)) return 0;
    s->n = 0;
    for (size_t i = 0; i < positions; i++)
        if (b->targets[i] >= 0) s->own[s->n++] = s->own[i];
    if (slam_ranks_count(ranks) == 1) return 1;
    if (s->all != s->own) free(s->all);
    s->all = (float *)slam_ranks_all_gather(ranks, s->own, s->n * sizeof *s->own, &bytes);
    s->n = bytes / sizeof *s->own;
    return s->all != NULL;
}

/* Of the next batches of B rows, one for each rank, this rank's; 0: there are no rows after them; -1: error. */
static int read_rows(slam_rows *rows, slam_ranks *ranks, slam_batch *b, int B) {
    b->B = 0;
    for (int rank = 0; rank < slam_ranks_count(ranks); rank++)
        for (int i = 0; i < B; i++) {
            const int own = rank == slam_ranks_rank(ranks);
            const size_t at = (size_t)b->B * (size_t)b->T;
            int n;
            const int got = own ? slam_rows_next(rows, b->tokens + at, b->targets + at, b->doc_start + at, &n)
                                : slam_rows_next(rows, NULL, NULL, NULL, &n);
            if (got <= 0) return got;
            b->B += own;
        }
    return 1;
}

/* Sums the losses of `rows`, B rows at a time (fewer at the end), in double and in the order of the rows. */
static int score_rows(slam_model *model, slam_rows *rows, scored_batch *s, int B, double *sum, uint64_t *targets) {
    for (int more = 1; more > 0;) {
        more = read_rows(rows, model->ops->ranks, &s->batch, B);
        if (!score_batch(model, s, more >= 0)) return 0;
        for (size_t i = 0; i < s->n; i++) *sum += s->all[i];
        *targets += s->n;
    }
    return 1;
}

int slam_score_data(slam_model *model, const slam_data *data, int source, int B, double *nll, uint64_t *targets) {
    const int V = slam_model_config(model)->V;
    scored_batch s = SLAM_ZERO;
    double sum = 0;
    *targets = 0;
    *nll = 0;
    if (B < 1) return fail("a batch of %d rows, expected at least 1", B);
    if (data->V > V) return fail("data with a vocabulary of %d, but the model has one of %d", data->V, V);
    slam_rows *rows = slam_rows_new(data, source, 0, 0);
    int ok = rows && scored_batch_new(&s, B, data->context);
    ok = slam_ranks_agree(model->ops->ranks, ok) && score_rows(model, rows, &s, B, &sum, targets);
    if (ok && *targets) *nll = sum / (double)*targets;
    scored_batch_free(&s);
    slam_rows_free(rows);
    return ok;
}

/* ---- n-grams ----
   Only the contexts that the test data ask about are counted, so memory goes with the test data, and any amount of training
   data streams past. What a context's followers are is counted whole: T(h) wants all of them. */

/* A hash table from numbers that are not 0 to numbers: open addressing, linear probing, at most half full, multiplicative hashing
   (Knuth, The Art of Computer Programming 3, 6.4). */
typedef struct table_slot {
    uint64_t key, value;
} table_slot;

typedef struct table {
    table_slot *slot;
    size_t n;
    int bits; // 2^bits slots
} table;

static int table_new(table *t, int bits) {
    t->n = 0;
    t->bits = bits;
    t->slot = (table_slot *)mem_new((size_t)1 << bits, sizeof *t->slot);
    return t->slot != NULL;
}

/* The slot of this key, or the empty one where it would stand. */
static table_slot *table_find(const table *t, uint64_t key) {
    size_t mask = ((size_t)1 << t->bits) - 1, i = (size_t)((key * 0x9e3779b97f4a7c15u) >> (64 - t->bits));
    while (t->slot[i].key && t->slot[i].key != key) i = (i + 1) & mask;
    return &t->slot[i];
}

/* The slot of this key, added with value 0 if it is new; NULL: no memory. */
static table_slot *table_add(table *t, uint64_t key) {
    table_slot *s = table_find(t, key);
    if (s->key) return s;
    if (2 * (t->n + 1) > (size_t)1 << t->bits) {
        table more;
        if (!table_new(&more, t->bits + 1)) return NULL;
        for (size_t i = 0; i < (size_t)1 << t->bits; i++)
            if (t->slot[i].key) *table_find(&more, t->slot[i].key) = t->slot[i];
        more.n = t->n;
        free(t->slot);
        *t = more;
        s = table_find(t, key);
    }
    t->n++;
    s->key = key;
    return s;
}

/* c(h) and T(h) */
typedef struct ngram_context {
    uint64_t count, followers;
} ngram_context;

/* The counts of all contexts of one length. A context is the number that its tokens make, 16 bits each; its followers are counted
   under (its place in the list, token). */
typedef struct ngram_counts {
    int length, failed;
    table contexts, followers;
    ngram_context *context;
    size_t n, capacity;
} ngram_counts;

enum { NGRAM_ORDERS = 5 };

static uint64_t context_of(uint64_t history, int length) {
    return length == 0 ? 0 : history & (~(uint64_t)0 >> (64 - 16 * length));
}

/* The place of a context in the list, or -1. The empty one is always the first. */
static int64_t context_place(const ngram_counts *c, uint64_t history) {
    if (c->length == 0) return 0;
    const table_slot *s = table_find(&c->contexts, context_of(history, c->length));
    return s->key ? (int64_t)s->value : -1;
}

static uint64_t follower_key(int64_t place, int token) { return ((uint64_t)(place + 1) << 16) | (uint64_t)token; }

static int add_context(ngram_counts *c) {
    if (!mem_grow((void **)&c->context, &c->capacity, c->n + 1, sizeof *c->context)) return 0;
    memset(&c->context[c->n++], 0, sizeof *c->context);
    return 1;
}

/* Lists the contexts that stand before the targets of the test data. */
static int ask_contexts(ngram_counts *c, const slam_data *test) {
    if (c->length == 0) return add_context(c);
    for (size_t p = 0; p < test->n; p++) {
        const uint16_t *tokens = piece_tokens(test, &test->pieces[p]);
        uint64_t history = 0;
        for (uint32_t i = 1; i < test->pieces[p].n; i++) {
            history = history << 16 | tokens[i - 1];
            if (i < (uint32_t)c->length) continue;
            size_t known = c->contexts.n;
            table_slot *s = table_add(&c->contexts, context_of(history, c->length));
            if (!s) return 0;
            if (c->contexts.n == known) continue;
            s->value = c->n;
            if (!add_context(c)) return 0;
        }
    }
    return 1;
}

/* Counts in the training data what follows the contexts that were asked for. */
static int count_followers(ngram_counts *c, const slam_data *train) {
    for (size_t p = 0; p < train->n; p++) {
        const uint16_t *tokens = piece_tokens(train, &train->pieces[p]);
        uint64_t history = 0;
        for (uint32_t i = 1; i < train->pieces[p].n; i++) {
            history = history << 16 | tokens[i - 1];
            int64_t place = i < (uint32_t)c->length ? -1 : context_place(c, history);
            if (place < 0) continue;
            table_slot *s = table_add(&c->followers, follower_key(place, tokens[i]));
            if (!s) return 0;
            c->context[place].count++;
            if (s->value++ == 0) c->context[place].followers++;
        }
    }
    return 1;
}

/* Adds the test data's negative log-probabilities, order by order. A context that the piece is too short for, or that training
   never saw, leaves the lower order's probability as it is. */
static uint64_t score_ngrams(const ngram_counts *counts, const slam_data *test, int V, double *sum) {
    uint64_t targets = 0;
    for (size_t p = 0; p < test->n; p++) {
        const uint16_t *tokens = piece_tokens(test, &test->pieces[p]);
        uint64_t history = 0;
        for (uint32_t i = 1; i < test->pieces[p].n; i++, targets++) {
            double probability = 1.0 / V;
            history = history << 16 | tokens[i - 1];
            for (int k = 0; k < NGRAM_ORDERS; k++) {
                int64_t place = i < (uint32_t)k ? -1 : context_place(&counts[k], history);
                if (place >= 0 && counts[k].context[place].count > 0) {
                    double count = (double)counts[k].context[place].count, followers = (double)counts[k].context[place].followers;
                    double seen = (double)table_find(&counts[k].followers, follower_key(place, tokens[i]))->value;
                    probability = (seen + followers * probability) / (count + followers);
                }
                sum[k] -= log(probability);
            }
        }
    }
    return targets;
}

/* The orders share nothing, so each is counted by a thread of its own. */
int slam_ngrams(const slam_data *train, const slam_data *test, int V, double nll[5], uint64_t *targets) {
    ngram_counts counts[NGRAM_ORDERS];
    double sum[NGRAM_ORDERS] = {0};
    int ok = 1;
    if (!train->prepared || !test->prepared) return fail("n-grams of data that are not prepared");
    if (V < train->V || V < test->V)
        return fail("n-grams over %d tokens of data with a vocabulary of %d", V, V < train->V ? train->V : test->V);
    memset(counts, 0, sizeof counts);
    SLAM_PARALLEL_FOR
    for (int k = 0; k < NGRAM_ORDERS; k++) {
        ngram_counts *c = &counts[k];
        c->length = k;
        c->failed =
            !table_new(&c->contexts, 10) || !table_new(&c->followers, 10) || !ask_contexts(c, test) || !count_followers(c, train);
    }
    for (int k = 0; k < NGRAM_ORDERS; k++)
        if (counts[k].failed) ok = fail("out of memory while %d-grams were counted", k + 1);
    *targets = ok ? score_ngrams(counts, test, V, sum) : 0;
    if (ok && *targets == 0) ok = fail("there is nothing to predict in the test data");
    for (int k = 0; k < NGRAM_ORDERS; k++) {
        if (ok) nll[k] = sum[k] / (double)*targets;
        free(counts[k].contexts.slot);
        free(counts[k].followers.slot);
        free(counts[k].context);
    }
    return ok;
}

/* ---- sequences of units ----
   A sequence `1 u.. 1` of n units has n + 1 tokens to predict and as many to go by. It is one piece of so many tokens, or several where
   a row is shorter; of each piece only what no piece before has predicted counts. Pieces lie in rows by first fit, the longest first. */

typedef struct scored_piece {
    size_t sequence, row;
    int start, n, from, at; // tokens start .. start + n - 1 of the sequence; those from `from` on predict; its place in the row
} scored_piece;

typedef struct scoring {
    const slam_units *units;
    size_t *same; // (n): of equal sequences the first
    scored_piece *piece;
    size_t pieces, capacity, rows;
    double *sum; // (n)
    int T;
} scoring;

typedef struct unit_sequence {
    const slam_units *u;
    size_t at;
} unit_sequence;

static int compare_sequences(const void *a, const void *b) {
    const unit_sequence *x = (const unit_sequence *)a, *y = (const unit_sequence *)b;
    if (x->u->n != y->u->n) return x->u->n < y->u->n ? -1 : 1;
    const int differ = x->u->n ? memcmp(x->u->unit, y->u->unit, x->u->n * sizeof *x->u->unit) : 0;
    return differ ? differ : x->at < y->at ? -1 : x->at > y->at;
}

static int find_equal(scoring *s, size_t n, size_t *different) {
    unit_sequence *sorted = (unit_sequence *)mem_new(n, sizeof *sorted);
    if (!sorted) return 0;
    for (size_t i = 0; i < n; i++) {
        sorted[i].u = &s->units[i];
        sorted[i].at = i;
    }
    qsort(sorted, n, sizeof *sorted, compare_sequences);
    for (size_t i = 0, first = 0; i < n; i++) {
        const slam_units *x = sorted[first].u, *y = sorted[i].u;
        if (x->n != y->n || (x->n && memcmp(x->unit, y->unit, x->n * sizeof *x->unit))) first = i;
        s->same[sorted[i].at] = sorted[first].at;
        *different += first == i;
    }
    free(sorted);
    return 1;
}

/* Windows of T tokens, the first predicts all of its own, each after it half a window. */
static int cut_sequence(scoring *s, size_t sequence) {
    const size_t n = s->units[sequence].n + 1, T = (size_t)s->T;
    for (size_t done = 0; done < n;) {
        const size_t end = done == 0 ? (n < T ? n : T) : n - done < T - T / 2 ? n : done + T - T / 2, start = end < T ? 0 : end - T;
        if (!mem_grow((void **)&s->piece, &s->capacity, s->pieces + 1, sizeof *s->piece)) return 0;
        scored_piece *p = &s->piece[s->pieces++];
        p->sequence = sequence;
        p->start = (int)start;
        p->n = (int)(end - start);
        p->from = (int)(done - start);
        done = end;
    }
    return 1;
}

static int longer_piece(const void *a, const void *b) {
    const scored_piece *x = (const scored_piece *)a, *y = (const scored_piece *)b;
    if (x->n != y->n) return x->n > y->n ? -1 : 1;
    if (x->sequence != y->sequence) return x->sequence < y->sequence ? -1 : 1;
    return (x->start > y->start) - (x->start < y->start);
}

static int earlier_row(const void *a, const void *b) {
    const scored_piece *x = (const scored_piece *)a, *y = (const scored_piece *)b;
    if (x->row != y->row) return x->row < y->row ? -1 : 1;
    return (x->at > y->at) - (x->at < y->at);
}

/* Of the rows with the same room the last one is taken first: open[room] is one of them, next[row] the one before. */
static int pack_pieces(scoring *s) {
    const size_t T = (size_t)s->T, none = (size_t)-1;
    size_t *open = (size_t *)mem_new(T + 1, sizeof *open), *next = (size_t *)mem_new(s->pieces, sizeof *next);
    const int ok = open && next;
    for (size_t room = 0; ok && room <= T; room++) open[room] = none;
    if (ok) qsort(s->piece, s->pieces, sizeof *s->piece, longer_piece);
    for (size_t i = 0; ok && i < s->pieces; i++) {
        scored_piece *p = &s->piece[i];
        size_t room = (size_t)p->n;
        while (room < T && open[room] == none) room++;
        if (open[room] == none) {
            p->row = s->rows++;
            room = T;
        } else {
            p->row = open[room];
            open[room] = next[p->row];
        }
        p->at = (int)(T - room);
        next[p->row] = open[room - (size_t)p->n];
        open[room - (size_t)p->n] = p->row;
    }
    if (ok) qsort(s->piece, s->pieces, sizeof *s->piece, earlier_row);
    free(open);
    free(next);
    return ok;
}

/* Token i of a sequence; n + 1 is the last. */
static int sequence_token(const slam_units *u, size_t i) {
    return i == 0 || i > u->n ? DOCUMENT_MARK : u->unit[i - 1] + UNIT_TOKEN;
}

/* The first piece, from piece i on, that lies in this row or behind it. */
static size_t piece_of_row(const scoring *s, size_t i, size_t row) {
    while (i < s->pieces && s->piece[i].row < row) i++;
    return i;
}

/* B rows from `row` on, as far as there are so many; i: their first piece. */
static void fill_pieces(const scoring *s, size_t i, size_t row, slam_batch *b, int B) {
    const size_t T = (size_t)b->T;
    for (size_t k = 0; k < (size_t)B * T; k++) {
        b->tokens[k] = 0;
        b->targets[k] = -1;
        b->doc_start[k] = (int)(k % T); // padding: a piece of its own
    }
    b->B = 0;
    for (; i < s->pieces && s->piece[i].row < row + (size_t)B; i++) {
        const scored_piece *p = &s->piece[i];
        const slam_units *u = &s->units[p->sequence];
        const size_t at = (p->row - row) * T + (size_t)p->at;
        b->B = (int)(p->row - row) + 1;
        for (int k = 0; k < p->n; k++) {
            b->tokens[at + (size_t)k] = sequence_token(u, (size_t)p->start + (size_t)k);
            b->targets[at + (size_t)k] = k < p->from ? -1 : sequence_token(u, (size_t)p->start + (size_t)k + 1);
            b->doc_start[at + (size_t)k] = p->at;
        }
    }
}

/* B rows a rank at a time. */
static int score_pieces(scoring *s, slam_model *model, int B, uint64_t of, slam_score_watch *watch, void *context) {
    slam_ranks *ranks = model->ops->ranks;
    const size_t rows = (size_t)B, before = (size_t)slam_ranks_rank(ranks) * rows, all = (size_t)slam_ranks_count(ranks) * rows;
    scored_batch b;
    uint64_t done = 0;
    int ok = scored_batch_new(&b, B, s->T) && slam_model_plan(model, B, s->T, SLAM_INFERENCE);
    ok = slam_ranks_agree(ranks, ok);
    for (size_t row = 0, i = 0; ok && i < s->pieces; row += all) {
        const size_t end = piece_of_row(s, i, row + all);
        fill_pieces(s, piece_of_row(s, i, row + before), row + before, &b.batch, B);
        ok = score_batch(model, &b, 1);
        for (const float *loss = b.all; ok && i < end; i++)
            for (int t = s->piece[i].from; t < s->piece[i].n; t++) s->sum[s->piece[i].sequence] += *loss++;
        done += b.n;
        const int stop = ok && watch && !watch(context, done, of);
        if (ok && slam_ranks_max(ranks, stop)) // a signal may have reached one of them
            ok = fail("stopped after %llu of %llu tokens", (unsigned long long)done, (unsigned long long)of);
    }
    scored_batch_free(&b);
    return ok;
}

int slam_score_units(slam_model *model, const slam_units *units, size_t n, int B, int T, int sum, double *scores,
                     slam_scored *report, slam_score_watch *watch, void *context) {
    const int V = slam_model_config(model)->V, longest = slam_model_config(model)->T;
    scoring s = SLAM_ZERO;
    memset(report, 0, sizeof *report);
    if (B < 1 || T < 2) return fail("rows of %d tokens, %d at a time: expected at least 2, 1", T, B);
    if (T > longest) return fail("a context of %d tokens, the model has positions for %d", T, longest);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < units[i].n; k++)
            if (units[i].unit[k] < 0 || units[i].unit[k] >= V - UNIT_TOKEN)
                return fail("unit %d, expected below %d: the model has a vocabulary of %d", units[i].unit[k], V - UNIT_TOKEN, V);
    s.units = units;
    s.T = T;
    s.same = (size_t *)mem_new(n, sizeof *s.same);
    s.sum = (double *)mem_new(n, sizeof *s.sum);
    int ok = s.same && s.sum && find_equal(&s, n, &report->different);
    for (size_t i = 0; ok && i < n; i++) {
        report->silent += units[i].n == 0;
        if (s.same[i] != i) continue;
        report->slid += units[i].n + 1 > (size_t)T;
        report->tokens += units[i].n + 1;
        ok = cut_sequence(&s, i);
    }
    if (ok && report->tokens < (uint64_t)T) s.T = report->tokens > 2 ? (int)report->tokens : 2; // all in one row
    ok = slam_ranks_agree(model->ops->ranks, ok && (!n || pack_pieces(&s)));
    ok = ok &&
         (!n || score_pieces(&s, model, B < (int)s.rows || s.rows > INT_MAX ? B : (int)s.rows, report->tokens, watch, context));
    for (size_t i = 0; ok && i < n; i++) {
        const double loss = s.sum[s.same[i]];
        scores[i] = sum ? -loss : -loss / (double)(units[i].n + 1);
        if (!isfinite(loss)) ok = fail("sequence %zu: its log-probability is not finite", i + 1);
    }
    free(s.same);
    free(s.sum);
    free(s.piece);
    return ok;
}

/* Units that a file of lines holds, each below `below`, and what their file_name says. */
static int units_read(const char *path, int below, slam_list *list, slam_units **units) {
    units_reader reader = SLAM_ZERO;
    struct units line = SLAM_ZERO;
    size_t n = 0, capacity = 0;
    int got = 0;
    *units = NULL;
    if (!units_open(&reader, path)) return 0;
    while ((got = units_next(&reader, &line)) > 0) {
        slam_units *u = mem_grow((void **)units, &capacity, n + 1, sizeof **units) ? &(*units)[n] : NULL;
        if (!u) break;
        memset(u, 0, sizeof *u);
        n++;
        u->n = line.n;
        u->unit = (int *)mem_new(line.n, sizeof *u->unit);
        if (!u->unit || !slam_list_add(list, line.name ? line.name : "")) break;
        for (size_t i = 0; i < line.n && got > 0; i++)
            if ((u->unit[i] = line.unit[i]) >= below) {
                fail("%s: unit %zu is %d, expected below %d", reader.what, i + 1, line.unit[i], below);
                got = -1;
            }
        if (got < 0) break;
    }
    units_free(&line);
    units_close(&reader);
    if (got == 0 && n) return 1;
    if (got == 0) fail("%s: it holds no line of units", path);
    for (size_t i = 0; i < n; i++) slam_units_free(&(*units)[i]);
    free(*units);
    *units = NULL;
    return 0;
}

/* ---- test sets ---- */

/* Two items; pairs of one `cell` (a pair's voices) are averaged before anything else. */
typedef struct test_pair {
    size_t right, wrong, cell;
} test_pair;

/* What figures are given for: of all cells, and of those of a group: 0 none, else the number of its name from 1. */
enum { GROUP_FREQUENCY, GROUP_LENGTH, GROUP_TYPE, GROUP_PART, GROUPS };
static const char *const group_names[] = {"frequency", "length", "type", "part"};
static const char *const frequency_bands[] = {"oov", "1-5", "6-20", "21-100", ">100"};

typedef struct test_cell {
    int group[GROUPS];
    double sum;
    size_t n;
} test_cell;

struct slam_testset {
    int kind;
    char *path; // of gold.csv; NULL: files
    int listed; // the items are the lines of a file of units
    csv gold;
    slam_list items;
    test_pair *pair;
    test_cell *cell;
    size_t pairs, cells, pair_capacity, cell_capacity;
    slam_list names[GROUPS];
    slam_accuracy *accuracy;
    size_t accuracies;
    double *written; // (items), scores as they are written
};

void slam_testset_free(slam_testset *s) {
    if (!s) return;
    csv_free(&s->gold);
    slam_list_free(&s->items);
    for (int g = 0; g < GROUPS; g++) slam_list_free(&s->names[g]);
    free(s->path);
    free(s->pair);
    free(s->cell);
    free(s->accuracy);
    free(s->written);
    free(s);
}

const slam_list *slam_testset_items(const slam_testset *s) { return &s->items; }

/* The number, from 1, of a group's name, which is added where it is new; 0: no memory. The names are few. */
static int group_number(slam_testset *s, int group, const char *name) {
    slam_list *list = &s->names[group];
    for (size_t i = list->n; i-- > 0;)
        if (!strcmp(list->at[i], name)) return (int)i + 1;
    return slam_list_add(list, name) ? (int)list->n : 0;
}

static int testset_add(slam_testset *s, size_t right, size_t wrong, size_t cell) {
    if (!mem_grow((void **)&s->pair, &s->pair_capacity, s->pairs + 1, sizeof *s->pair)) return 0;
    const test_pair pair = {right, wrong, cell};
    s->pair[s->pairs++] = pair;
    return 1;
}

static test_cell *testset_cell(slam_testset *s) {
    if (!mem_grow((void **)&s->cell, &s->cell_capacity, s->cells + 1, sizeof *s->cell)) return NULL;
    test_cell *c = &s->cell[s->cells++];
    memset(c, 0, sizeof *c);
    return c;
}

/* The columns of gold.csv; those that only figures need may be missing. */
typedef struct gold_columns {
    size_t id, filename, voice, type, subtype, correct, frequency, length;
} gold_columns;

static int gold_columns_find(const slam_testset *s, gold_columns *c) {
    const csv *g = &s->gold;
    const struct {
        const char *name;
        size_t *at;
        int kind; // of set that needs it; -1: any
    } wanted[] = {{"id", &c->id, -1},           {"filename", &c->filename, -1},  {"voice", &c->voice, -1},
                  {"correct", &c->correct, -1}, {"type", &c->type, SLAM_SBLIMP}, {"subtype", &c->subtype, SLAM_SBLIMP}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *wanted[i].at = csv_column(g, wanted[i].name);
        if (*wanted[i].at == g->columns && (wanted[i].kind < 0 || wanted[i].kind == s->kind))
            return fail("%s: has no column '%s'", s->path, wanted[i].name);
    }
    c->frequency = csv_column(g, "frequency");
    c->length = csv_column(g, "length");
    if (s->kind == SLAM_SWUGGY && c->frequency == g->columns && c->length == g->columns && c->subtype < g->columns)
        return fail("%s: has columns 'type' and 'subtype', as sBLIMP's has, expected 'frequency' and 'length'", s->path);
    return 1;
}

static int gold_correct(const slam_testset *s, const gold_columns *c, size_t row) {
    const char *said = csv_at(&s->gold, row, c->correct);
    if (!strcmp(said, "1") || !strcmp(said, "0")) return said[0] == '1';
    fail("%s:%zu: 'correct' is '%.40s', expected 1 or 0", s->path, csv_line(&s->gold, row), said);
    return -1;
}

/* A whole number of 0 or more, also as 12.0; -1 where the field is empty, -2 and the sentence where it is something else. */
static long gold_number(const slam_testset *s, size_t row, size_t column) {
    const char *said = column < s->gold.columns ? csv_at(&s->gold, row, column) : "";
    char *end;
    if (!*said) return -1;
    const double n = strtod(said, &end);
    if (!*end && n >= 0 && n <= 1e15 && n == floor(n)) return (long)n;
    fail("%s:%zu: '%s' is '%.40s', expected a number", s->path, csv_line(&s->gold, row), s->gold.column[column], said);
    return -2;
}

/* Rows of gold.csv in the order of `columns`, as many as there are, then of `correct`. */
typedef struct gold_row {
    const csv *gold;
    const size_t *columns;
    size_t n, row;
    int correct;
} gold_row;

static int compare_keys(const gold_row *x, const gold_row *y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const int differ = strcmp(csv_at(x->gold, x->row, x->columns[i]), csv_at(y->gold, y->row, y->columns[i]));
        if (differ) return differ;
    }
    return 0;
}

static int compare_rows(const void *a, const void *b) {
    const gold_row *x = (const gold_row *)a, *y = (const gold_row *)b;
    const int differ = compare_keys(x, y, x->n);
    if (differ) return differ;
    return x->correct != y->correct ? y->correct - x->correct : (x->row > y->row) - (x->row < y->row);
}

static gold_row *gold_sorted(const slam_testset *s, const gold_columns *c, const size_t *columns, size_t n) {
    gold_row *rows = (gold_row *)mem_new(s->gold.rows, sizeof *rows);
    for (size_t i = 0; rows && i < s->gold.rows; i++) {
        rows[i].gold = &s->gold;
        rows[i].columns = columns;
        rows[i].n = n;
        rows[i].row = i;
        rows[i].correct = gold_correct(s, c, i);
    }
    if (rows) qsort(rows, s->gold.rows, sizeof *rows, compare_rows);
    return rows;
}

/* The band of frequency and the length of a word, whose rows begin here, as its first row in the file has them. */
static int lexical_cell(slam_testset *s, const gold_columns *c, const gold_row *rows, size_t n) {
    size_t row = rows[0].row;
    for (size_t i = 1; i < n && !compare_keys(&rows[0], &rows[i], 1); i++)
        if (rows[i].correct && rows[i].row < row) row = rows[i].row;
    const long least[] = {0, 1, 5, 20, 100}, frequency = gold_number(s, row, c->frequency), length = gold_number(s, row, c->length);
    char spelled[32];
    test_cell *cell = frequency > -2 && length > -2 ? testset_cell(s) : NULL;
    if (!cell) return 0;
    for (int band = 0; band < 5 && frequency >= least[band]; band++) cell->group[GROUP_FREQUENCY] = band + 1;
    snprintf(spelled, sizeof spelled, "%ld", length);
    return length < 0 || (cell->group[GROUP_LENGTH] = group_number(s, GROUP_LENGTH, spelled)) > 0;
}

/* The word and the non-word with the same id and voice; cells are of ids. */
static int pair_lexical(slam_testset *s, const gold_columns *c) {
    const size_t columns[] = {c->id, c->voice}, n = s->gold.rows;
    gold_row *rows = gold_sorted(s, c, columns, 2);
    int ok = rows != NULL;
    for (int band = 0; ok && band < 5; band++) ok = group_number(s, GROUP_FREQUENCY, frequency_bands[band]) > 0;
    for (size_t i = 0, end; ok && i < n; i = end) {
        size_t words = 0;
        for (end = i; end < n && !compare_keys(&rows[i], &rows[end], 2); end++) words += (size_t)rows[end].correct;
        if (words != 1 || end - i != 2)
            ok = fail("%s:%zu: id '%s' and voice '%s' have %zu words and %zu non-words, expected one of each", s->path,
                      csv_line(&s->gold, rows[i].row), csv_at(&s->gold, rows[i].row, c->id),
                      csv_at(&s->gold, rows[i].row, c->voice), words, end - i - words);
        if (ok && (i == 0 || compare_keys(&rows[i], &rows[i - 1], 1))) ok = lexical_cell(s, c, rows + i, n - i);
        ok = ok && testset_add(s, rows[i].row, rows[i + 1].row, s->cells - 1);
    }
    free(rows);
    return ok;
}

/* The k-th right row and the k-th wrong one, which have the same type, subtype, id and voice; cells are of type, subtype and id. */
static int pair_syntactic(slam_testset *s, const gold_columns *c) {
    const size_t columns[] = {c->type, c->subtype, c->id, c->voice}, n = s->gold.rows;
    gold_row *sorted = gold_sorted(s, c, columns, 3);
    size_t *cell_of = (size_t *)mem_new(n, sizeof *cell_of), wrong = 0;
    int ok = sorted && cell_of;
    for (size_t i = 0; ok && i < n; i++) {
        if (i == 0 || compare_keys(&sorted[i], &sorted[i - 1], 3)) {
            test_cell *cell = testset_cell(s);
            ok = cell && (cell->group[GROUP_TYPE] = group_number(s, GROUP_TYPE, csv_at(&s->gold, sorted[i].row, c->type))) > 0;
        }
        cell_of[sorted[i].row] = s->cells - 1;
    }
    for (size_t row = 0; ok && row < n; row++) {
        if (gold_correct(s, c, row) != 1) continue;
        while (wrong < n && gold_correct(s, c, wrong) != 0) wrong++;
        if (wrong == n) {
            ok = fail("%s:%zu: '%s' is right, and there is no wrong row left for it", s->path, csv_line(&s->gold, row),
                      csv_at(&s->gold, row, c->filename));
            break;
        }
        const gold_row x = {&s->gold, columns, 4, row, 1}, y = {&s->gold, columns, 4, wrong, 0};
        if (compare_keys(&x, &y, 4))
            ok = fail("%s:%zu: pairs with line %zu, by their order, but type, subtype, id or voice differ", s->path,
                      csv_line(&s->gold, row), csv_line(&s->gold, wrong));
        ok = ok && testset_add(s, row, wrong++, cell_of[row]);
    }
    while (ok && wrong < n && gold_correct(s, c, wrong) != 0) wrong++;
    if (ok && wrong < n)
        ok = fail("%s:%zu: '%s' is wrong, and there is no right row left for it", s->path, csv_line(&s->gold, wrong),
                  csv_at(&s->gold, wrong, c->filename));
    free(sorted);
    free(cell_of);
    return ok;
}

static int compare_texts(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* What tells pairs apart must be said: the official scorer drops rows without it. */
static int gold_is_told(const slam_testset *s, size_t row, size_t column) {
    return *csv_at(&s->gold, row, column) ||
           fail("%s:%zu: '%s' is empty", s->path, csv_line(&s->gold, row), s->gold.column[column]);
}

/* Two items of a name would be one file. */
static int gold_names(slam_testset *s, const gold_columns *c) {
    const size_t n = s->gold.rows;
    const char **sorted = (const char **)mem_new(n, sizeof *sorted);
    int ok = sorted != NULL;
    for (size_t i = 0; ok && i < n; i++) {
        sorted[i] = csv_at(&s->gold, i, c->filename);
        ok = gold_is_told(s, i, c->filename) && gold_is_told(s, i, c->id) &&
             (s->kind != SLAM_SBLIMP || (gold_is_told(s, i, c->type) && gold_is_told(s, i, c->subtype))) &&
             slam_list_add(&s->items, sorted[i]) && gold_correct(s, c, i) >= 0;
    }
    if (ok) qsort(sorted, n, sizeof *sorted, compare_texts);
    for (size_t i = 1; ok && i < n; i++)
        if (!strcmp(sorted[i], sorted[i - 1])) ok = fail("%s: the filename '%s' stands in two rows", s->path, sorted[i]);
    free(sorted);
    return ok;
}

slam_testset *slam_testset_gold(int kind, const char *path) {
    gold_columns columns;
    slam_testset *s = (slam_testset *)mem_new(1, sizeof *s);
    int ok = s && (s->path = text_copy(path)) != NULL;
    if (ok && kind != SLAM_SWUGGY && kind != SLAM_SBLIMP) ok = fail("%s: gold.csv is for sWUGGY and sBLIMP", path);
    if (ok) s->kind = kind;
    ok = ok && csv_read(&s->gold, path) && gold_columns_find(s, &columns) && gold_names(s, &columns) &&
         (kind == SLAM_SWUGGY ? pair_lexical(s, &columns) : pair_syntactic(s, &columns));
    if (ok) return s;
    slam_testset_free(s);
    return NULL;
}

/* A file of a folder of pairs: what stands before its name, its name, its number, its side in SALMon. */
typedef struct pair_file {
    const char *path, *name;
    size_t folder, item; // folder: bytes of `path` before the name
    long number;
    int side;
} pair_file;

static int compare_pair_files(const void *a, const void *b) {
    const pair_file *x = (const pair_file *)a, *y = (const pair_file *)b;
    const size_t shorter = x->folder < y->folder ? x->folder : y->folder;
    int differ = memcmp(x->path, y->path, shorter);
    if (!differ && x->folder != y->folder) differ = x->folder < y->folder ? -1 : 1;
    if (differ) return differ;
    if (x->number != y->number) return x->number < y->number ? -1 : 1;
    return x->side != y->side ? x->side - y->side : strcmp(x->name, y->name);
}

static int pair_file_read(pair_file *f, int kind, const char *path, size_t item) {
    const char *name = path_name(path), *from = name, *wanted = "NUMBER_...";
    char *end = NULL;
    f->path = path;
    f->name = name;
    f->folder = (size_t)(name - path);
    f->item = item;
    f->side = 0;
    if (kind == SLAM_SALMON) {
        wanted = "sample_NUMBER_0 or sample_NUMBER_1";
        from = !strncmp(name, "sample_", 7) ? name + 7 : "";
    } else if (kind == SLAM_SBLIMP) wanted = "NUMBER+...";
    errno = 0;
    f->number = isdigit((unsigned char)*from) ? strtol(from, &end, 10) : -1;
    int ok = end && !errno && *end == (kind == SLAM_SBLIMP ? '+' : '_');
    if (ok && kind == SLAM_SALMON) {
        ok = (end[1] == '0' || end[1] == '1') && (!end[2] || end[2] == '.');
        f->side = end[1] == '1';
    }
    return ok || fail("%s: expected a name %s", path, wanted);
}

/* The last names of a path, `depth` of them as far as it has so many, without what follows the last point. */
static size_t last_names(const char *path, int depth, const char **name) {
    const char *dot = strrchr(path, '.'), *from = path_name(path);
    const size_t end = dot && dot > from ? (size_t)(dot - path) : strlen(path);
    while (--depth > 0 && from > path)
        for (from--; from > path && from[-1] != '/';) from--;
    *name = from;
    return end - (size_t)(from - path);
}

static int same_names(const char *x, const char *y, int depth) {
    const size_t n = last_names(x, depth, &x);
    return n == last_names(y, depth, &y) && !memcmp(x, y, n);
}

static int same_folder(const pair_file *x, const pair_file *y) {
    return x->folder == y->folder && !memcmp(x->path, y->path, x->folder);
}

/* How far the numbers of a folder's pairs are apart, of which f[0] is the first file: 0 where any two files share a number, or 1. */
static long folder_step(const pair_file *f, size_t n) {
    for (size_t i = 1; i < n && same_folder(&f[0], &f[i]); i++)
        if (f[i].number == f[i - 1].number) return 0;
    return 1;
}

/* Neighbours in the order of their numbers are a pair: in a folder all have the same number, and no others have it, or all follow each
   other. Anything else means that a file is missing, and would pair what does not belong together. */
static int pair_files(slam_testset *s, const pair_file *f, size_t n) {
    long step = 0;
    for (size_t i = 0; i < n; i += 2) {
        const int has = i + 1 < n && same_folder(&f[i], &f[i + 1]);
        if (i == 0 || !same_folder(&f[i - 1], &f[i])) step = folder_step(f + i, n - i);
        if (!has || f[i + 1].number - f[i].number != step || (s->kind == SLAM_SALMON && (step || f[i].side || !f[i + 1].side)))
            return fail("%s: has no partner: it would be paired with %s", f[i].path, i + 1 < n ? f[i + 1].path : "nothing");
        if (step == 0 && i && same_folder(&f[i - 1], &f[i]) && f[i - 1].number == f[i].number)
            return fail("%s: its number is that of %s and %s as well", f[i].path, f[i - 2].path, f[i - 1].path);
        if (same_names(f[i].path, f[i + 1].path, 1)) return fail("%s and %s are of one name", f[i].path, f[i + 1].path);
        char *part = text_print("%.*s", (int)(f[i].folder ? f[i].folder - 1 : 0), f[i].path);
        test_cell *cell = part ? testset_cell(s) : NULL;
        const int ok = cell && (cell->group[GROUP_PART] = group_number(s, GROUP_PART, path_name(part))) > 0 &&
                       testset_add(s, f[i].item, f[i + 1].item, s->cells - 1);
        free(part);
        if (!ok) return 0;
    }
    return 1;
}

slam_testset *slam_testset_files(int kind, const slam_list *files) {
    slam_testset *s = (slam_testset *)mem_new(1, sizeof *s);
    pair_file *f = (pair_file *)mem_new(files->n, sizeof *f);
    int ok = s && f && list_copy(&s->items, files);
    if (ok) s->kind = kind;
    if (ok && !files->n) ok = fail("no file, expected pairs of them");
    for (size_t i = 0; ok && i < files->n; i++) ok = pair_file_read(&f[i], kind, s->items.at[i], i);
    if (ok) qsort(f, files->n, sizeof *f, compare_pair_files);
    for (size_t i = 1; ok && i < files->n; i++)
        if (!strcmp(f[i].path, f[i - 1].path)) ok = fail("%s: stands there twice", f[i].path);
    ok = ok && pair_files(s, f, files->n);
    free(f);
    if (ok) return s;
    slam_testset_free(s);
    return NULL;
}

int slam_testset_audio(const slam_testset *s, slam_list *paths) {
    static const char *const endings[] = {"", ".wav", ".flac", ".ogg", ".mp3"};
    const size_t folder = s->path ? (size_t)(path_name(s->path) - s->path) : 0;
    for (size_t i = 0; i < s->items.n; i++) {
        int found = 0, ok = 1;
        for (size_t k = 0; ok && !found && k < sizeof endings / sizeof *endings; k++) {
            char *path = text_print("%.*s%s%s", (int)folder, s->path ? s->path : "", s->items.at[i], endings[k]);
            found = path && path_is_file(path);
            ok = path && (!found || slam_list_add(paths, path));
            free(path);
        }
        if (!ok) return 0;
        if (!found && s->path) return fail("%s: '%s' is neither beside it nor with .wav at its end", s->path, s->items.at[i]);
        if (!found) return fail("%s: there is no such file", s->items.at[i]);
    }
    return 1;
}

typedef struct named {
    const char *name;
    size_t n, at;
} named;

static int compare_named(const void *a, const void *b) {
    const named *x = (const named *)a, *y = (const named *)b;
    const int differ = memcmp(x->name, y->name, x->n < y->n ? x->n : y->n);
    return differ ? differ : (x->n > y->n) - (x->n < y->n);
}

/* By their last names; NULL where there is no memory. */
static named *sort_names(const slam_list *paths, int depth) {
    named *sorted = (named *)mem_new(paths->n, sizeof *sorted);
    for (size_t i = 0; sorted && i < paths->n; i++) {
        sorted[i].n = last_names(paths->at[i], depth, &sorted[i].name);
        sorted[i].at = i;
    }
    if (sorted) qsort(sorted, paths->n, sizeof *sorted, compare_named);
    return sorted;
}

/* One that is of the same name as the one after it; NULL: all differ. */
static const named *find_repeated(const named *sorted, size_t n) {
    for (size_t i = 1; i < n; i++)
        if (!compare_named(&sorted[i - 1], &sorted[i])) return &sorted[i - 1];
    return NULL;
}

/* The names that tell the items apart: 1, the last alone, or 2, the folder's before it; 0 and the sentence. */
static int names_needed(const slam_testset *s) {
    for (int depth = 1; depth <= 2; depth++) {
        named *sorted = sort_names(&s->items, depth);
        const named *twice = sorted ? find_repeated(sorted, s->items.n) : NULL;
        const int ok = sorted && !twice;
        if (twice && depth == 2)
            fail("two items are called '%.*s': their units cannot be found by name", (int)twice->n, twice->name);
        free(sorted);
        if (ok) return depth;
        if (!sorted) break;
    }
    return 0;
}

/* of[i] (items): which of these names is item i's. One that is missing, or there twice, is an error. */
static int testset_match(const slam_testset *s, const slam_list *names, const char *where, size_t *of) {
    const int depth = names_needed(s);
    named *sorted = depth ? sort_names(names, depth) : NULL;
    const named *twice = sorted ? find_repeated(sorted, names->n) : NULL;
    int ok = sorted != NULL;
    for (size_t i = 0; ok && i < names->n; i++)
        if (!*names->at[i]) ok = fail("%s: line %zu has no file_name", where, i + 1);
    if (ok && twice) ok = fail("%s: two lines are of '%.*s'", where, (int)twice->n, twice->name);
    for (size_t i = 0; ok && i < s->items.n; i++) {
        named wanted;
        wanted.n = last_names(s->items.at[i], depth, &wanted.name);
        wanted.at = 0;
        const named *found = (const named *)bsearch(&wanted, sorted, names->n, sizeof *sorted, compare_named);
        if (found) of[i] = found->at;
        else ok = fail("%s: has no line of '%.*s'", where, (int)wanted.n, wanted.name);
    }
    free(sorted);
    return ok;
}

int slam_testset_units(const slam_testset *s, const char *path, int below, slam_units *units) {
    slam_list names = SLAM_ZERO;
    slam_units *read = NULL;
    size_t *of = (size_t *)mem_new(s->items.n, sizeof *of);
    int ok = of && units_read(path, below, &names, &read);
    if (ok && s->listed && names.n != s->items.n) ok = fail("%s: was changed meanwhile", path);
    for (size_t i = 0; ok && i < s->items.n; i++) of[i] = i;
    if (ok && !s->listed) ok = testset_match(s, &names, path, of);
    for (size_t i = 0; ok && i < s->items.n; i++) {
        units[i] = read[of[i]];
        memset(&read[of[i]], 0, sizeof *read);
    }
    for (size_t i = 0; read && i < names.n; i++) slam_units_free(&read[i]);
    free(read);
    free(of);
    slam_list_free(&names);
    return ok;
}

/* PATH/gold.csv, or PATH/lexical/dev/gold.csv and the like; NULL: there is none (or no memory). */
static char *find_gold(int kind, const char *path, const char *split) {
    const char *task = kind == SLAM_SWUGGY ? "lexical" : "syntactic";
    char *tried = NULL;
    if (kind != SLAM_SWUGGY && kind != SLAM_SBLIMP) return NULL;
    for (int i = 0; i < 3; i++) {
        free(tried);
        tried = i == 0   ? text_copy(path)
                : i == 1 ? text_print("%s/gold.csv", path)
                         : text_print("%s/%s/%s/gold.csv", path, task, split ? split : "dev");
        if (!tried || (path_is_file(tried) && path_ends(tried, ".csv"))) return tried;
    }
    free(tried);
    return NULL;
}

/* The names in a file of units; 65534 units are the most that tokens have room for. */
static int units_names(const char *path, slam_list *names) {
    slam_units *read = NULL;
    const int ok = units_read(path, 65534, names, &read);
    for (size_t i = 0; ok && i < names->n; i++) slam_units_free(&read[i]);
    free(read);
    return ok;
}

/* The audio files of a folder; where there are none, or no folder, the lines of a file of units. */
static slam_testset *open_pairs(int kind, const char *path, const char *units) {
    slam_list files = SLAM_ZERO;
    slam_testset *s = NULL;
    const int there = !path || path_is_folder(path);
    const int found = path && there && slam_audio_list(&files, &path, 1), listed = there && !found && units;
    if (!there) fail("%s: there is no such folder", path);
    if (!path && !units) fail("expected a folder of audio files, or units");
    if (found || (listed && units_names(units, &files))) s = slam_testset_files(kind, &files);
    if (s) s->listed = listed;
    slam_list_free(&files);
    return s;
}

/* What was found is of the split that was asked for. */
static int split_fits(const char *path, const char *gold, const char *split) {
    char *end = text_print("/%s/gold.csv", split);
    const int fits = end && gold && path_ends(gold, end), made = end != NULL;
    free(end);
    if (fits || !made) return fits;
    if (gold) return fail("%s: a split %s is asked for; it is in the folder that holds lexical/ and syntactic/", gold, split);
    return fail("%s: there is no split %s, expected the folder that holds lexical/ and syntactic/", path ? path : "units", split);
}

slam_testset *slam_testset_open(int kind, const char *path, const char *split, int listen, char **units) {
    char *gold = path ? find_gold(kind, path, split) : NULL, *beside = NULL;
    slam_testset *s = NULL;
    int ok = !split || split_fits(path, gold, split);
    if (ok && path && !*units && !listen) {
        beside = gold ? text_print("%.*sunits.jsonl", (int)(path_name(gold) - gold), gold) : text_print("%s/units.jsonl", path);
        ok = beside && (!path_is_file(beside) || (*units = text_copy(beside)) != NULL);
    }
    if (ok) s = gold ? slam_testset_gold(kind, gold) : open_pairs(kind, path, *units);
    free(gold);
    free(beside);
    return s;
}

/* A score as it is written. */
static double score_written(double score, char spelled[32]) {
    snprintf(spelled, 32, "%.9g", score);
    return strtod(spelled, NULL);
}

int slam_testset_submission(const slam_testset *s, const double *scores, const char *path) {
    text t = SLAM_ZERO;
    char spelled[32];
    for (size_t i = 0; i < s->items.n; i++)
        if (s->items.at[i][strcspn(s->items.at[i], " \t\r\n\"")])
            return fail("%s: the name '%s' cannot stand in a line of names and scores, with blanks between them", path,
                        s->items.at[i]);
    for (size_t i = 0; i < s->items.n; i++) {
        score_written(scores[i], spelled);
        text_add(&t, "%s %s\n", s->items.at[i], spelled);
    }
    const int ok = !t.failed && file_write(path, t.at, t.n);
    text_free(&t);
    return ok;
}

enum { ALL_CELLS = 0, IN_VOCABULARY = -1 };

static int cell_counts(const test_cell *c, int group, int number) {
    return number == ALL_CELLS || (number == IN_VOCABULARY ? c->group[GROUP_FREQUENCY] > 1 : c->group[group] == number);
}

/* Mean and sample standard deviation over the cells of a group's name, from 1, or over those above. */
static slam_accuracy accuracy_of(const slam_testset *s, int group, int number) {
    slam_accuracy f = {number > 0 ? group_names[group]
                       : number   ? "vocabulary"
                                  : "",
                       number > 0 ? s->names[group].at[number - 1]
                       : number   ? "in"
                                  : "",
                       0, NAN, NAN};
    double sum = 0, squares = 0;
    for (size_t i = 0; i < s->cells; i++) {
        if (!cell_counts(&s->cell[i], group, number)) continue;
        sum += s->cell[i].sum / (double)s->cell[i].n;
        f.n++;
    }
    if (f.n) f.mean = sum / (double)f.n;
    for (size_t i = 0; i < s->cells; i++) {
        if (!cell_counts(&s->cell[i], group, number)) continue;
        const double d = s->cell[i].sum / (double)s->cell[i].n - f.mean;
        squares += d * d;
    }
    if (f.n > 1) f.deviation = sqrt(squares / (double)(f.n - 1));
    return f;
}

static int compare_accuracies(const void *a, const void *b) {
    const slam_accuracy *x = (const slam_accuracy *)a, *y = (const slam_accuracy *)b;
    if (!strcmp(x->group, "length")) return (int)strtol(x->name, NULL, 10) - (int)strtol(y->name, NULL, 10);
    return strcmp(x->name, y->name);
}

/* Whether figures of a group say more than that of all. */
static int group_is_told(const slam_testset *s, int group) {
    if (group == GROUP_FREQUENCY) {
        for (size_t i = 0; i < s->cells; i++)
            if (s->cell[i].group[group]) return 1;
        return 0;
    }
    return s->names[group].n > (size_t)(group == GROUP_PART && s->kind != SLAM_SALMON);
}

const slam_accuracy *slam_testset_accuracies(slam_testset *s, const double *scores, size_t *n) {
    size_t most = 2;
    char spelled[32];
    for (int g = 0; g < GROUPS; g++) most += s->names[g].n;
    free(s->accuracy);
    free(s->written);
    s->accuracy = (slam_accuracy *)mem_new(most, sizeof *s->accuracy);
    s->written = (double *)mem_new(s->items.n, sizeof *s->written);
    if (!s->accuracy || !s->written) return NULL;
    for (size_t i = 0; i < s->items.n; i++) s->written[i] = score_written(scores[i], spelled);
    for (size_t i = 0; i < s->cells; i++) {
        s->cell[i].sum = 0;
        s->cell[i].n = 0;
    }
    for (size_t i = 0; i < s->pairs; i++) {
        const double right = s->written[s->pair[i].right], wrong = s->written[s->pair[i].wrong];
        s->cell[s->pair[i].cell].sum += right > wrong ? 1 : right == wrong ? 0.5 : 0;
        s->cell[s->pair[i].cell].n++;
    }
    s->accuracy[0] = accuracy_of(s, 0, ALL_CELLS);
    s->accuracy[1] = accuracy_of(s, 0, IN_VOCABULARY);
    *n = s->accuracy[1].n ? 2 : 1;
    for (int g = 0; g < GROUPS; g++) {
        if (!group_is_told(s, g)) continue;
        const size_t first = *n;
        for (size_t k = 1; k <= s->names[g].n; k++) s->accuracy[(*n)++] = accuracy_of(s, g, (int)k);
        if (g != GROUP_FREQUENCY) qsort(s->accuracy + first, *n - first, sizeof *s->accuracy, compare_accuracies);
    }
    s->accuracies = *n;
    return s->accuracy;
}

static void text_add_accuracy(text *t, const slam_accuracy *a) {
    const double half = a->n > 1 ? 1.96 * a->deviation / sqrt((double)a->n) : NAN;
    const char *const names[] = {"accuracy", "std", "low", "high"};
    const double figures[] = {a->mean, a->deviation, a->mean - half, a->mean + half};
    text_add(t, "\"n\": %zu", a->n);
    for (int k = 0; k < 4; k++) {
        text_add(t, ", \"%s\": ", names[k]);
        text_add_number(t, figures[k]);
    }
}

/* [{"right": "a", "wrong": "b", "score": 1}, ...], then [{"name": "a", "score": -1.5}, ...] */
static void text_add_pairs(text *t, const slam_testset *s, const double *scores) {
    char spelled[32];
    text_add(t, ", \"pairs\": [");
    for (size_t i = 0; i < s->pairs; i++) {
        const double right = s->written[s->pair[i].right], wrong = s->written[s->pair[i].wrong];
        text_add(t, "%s\n{\"right\": ", i ? "," : "");
        text_add_json(t, s->items.at[s->pair[i].right]);
        text_add(t, ", \"wrong\": ");
        text_add_json(t, s->items.at[s->pair[i].wrong]);
        text_add(t, ", \"score\": %s}", right > wrong ? "1" : right == wrong ? "0.5" : "0");
    }
    text_add(t, "], \"scores\": [");
    for (size_t i = 0; i < s->items.n; i++) {
        text_add(t, "%s\n{\"name\": ", i ? "," : "");
        text_add_json(t, s->items.at[i]);
        score_written(scores[i], spelled);
        text_add(t, ", \"score\": %s}", spelled);
    }
    text_add(t, "]");
}

int slam_testset_write(const slam_testset *s, const char *task, int sum, const double *scores, const char *path) {
    text t = SLAM_ZERO;
    text_add(&t, "{\"task\": ");
    text_add_json(&t, task);
    text_add(&t, ", \"of\": \"%s\", ", sum ? "sum" : "mean");
    for (size_t i = 0; i < s->accuracies; i++) {
        const slam_accuracy *a = &s->accuracy[i];
        const int first = i && strcmp(a->group, a[-1].group), last = i + 1 == s->accuracies || strcmp(a->group, a[1].group);
        if (first) text_add(&t, ", \"by_%s\": [", a->group);
        else if (i) text_add(&t, ", ");
        if (i) {
            text_add(&t, "{\"%s\": ", a->group);
            text_add_json(&t, a->name);
            text_add(&t, ", ");
        }
        text_add_accuracy(&t, a);
        if (i) text_add(&t, last ? "}]" : "}");
    }
    text_add_pairs(&t, s, scores);
    text_add(&t, "}\n");
    const int ok = t.failed ? fail("%s: out of memory", path) : file_write(path, t.at, t.n);
    text_free(&t);
    return ok;
}

/* ---- generation ---- */

void slam_prompts_free(slam_prompts *p) {
    for (size_t i = 0; i < p->n; i++) free(p->at[i].name), free(p->at[i].tokens), free(p->at[i].continuation);
    free(p->at);
    memset(p, 0, sizeof *p);
}

int slam_prompts_add(slam_prompts *p, const char *name, const int *units, size_t n) {
    if (n >= INT_MAX / 4) return fail("%s: a prompt of %zu units", name, n);
    for (size_t i = 0; i < n; i++)
        if (units[i] < 0 || units[i] > 1 << 20) return fail("%s: unit %d at position %zu", name, units[i], i);
    if (!mem_grow((void **)&p->at, &p->capacity, p->n + 1, sizeof *p->at)) return 0;
    slam_prompt *q = &p->at[p->n];
    memset(q, 0, sizeof *q);
    q->name = text_copy(name);
    q->tokens = (int *)mem_new(n + 1, sizeof(int));
    if (!q->name || !q->tokens) {
        free(q->name), free(q->tokens);
        return 0;
    }
    q->n = (int)n + 1;
    q->tokens[0] = 1;
    for (size_t i = 0; i < n; i++) q->tokens[i + 1] = units[i] + 2;
    p->n++;
    return 1;
}

enum { PROMPT_UNITS_A_SECOND = 18 };

/* How many of n units are the prompt; duration may be NULL. */
static size_t prompt_length(const slam_prompt_length *length, const int *duration, size_t n) {
    size_t taken = length->units ? length->units : length->seconds > 0 ? 0 : n;
    if (taken) return taken < n ? taken : n;
    for (double frames = 0; taken < n && frames < length->seconds * length->rate; taken++)
        frames += duration ? duration[taken] : (double)length->rate / PROMPT_UNITS_A_SECOND;
    return taken;
}

int slam_prompts_units(slam_prompts *p, const char *path, const slam_prompt_length *length, size_t *guessed) {
    units_reader reader = SLAM_ZERO;
    units u = SLAM_ZERO;
    int got;
    if (!units_open(&reader, path)) return 0;
    if (guessed) *guessed = 0;
    while ((got = units_next(&reader, &u)) > 0) {
        if (guessed && !u.duration && !length->units && length->seconds > 0) ++*guessed;
        if (!slam_prompts_add(p, u.name && *u.name ? u.name : reader.what, u.unit, prompt_length(length, u.duration, u.n))) {
            got = -1;
            break;
        }
    }
    units_free(&u);
    units_close(&reader);
    return got == 0;
}

int slam_prompts_data(slam_prompts *p, const slam_data *data, const slam_prompt_length *length) {
    int *unit = NULL, ok = 1;
    size_t capacity = 0;
    for (size_t i = 0; ok && i < data->n; i++) {
        const uint16_t *tokens = piece_tokens(data, &data->pieces[i]);
        const char *path = data->files->at[data->pieces[i].file].path;
        size_t n = data->pieces[i].n;
        if (tokens[0] != DOCUMENT_MARK) continue;
        if (n > 1 && tokens[n - 1] == DOCUMENT_MARK) n--; // a piece that the context has cut has no end
        n = prompt_length(length, NULL, n - 1);
        ok = mem_grow((void **)&unit, &capacity, n, sizeof *unit);
        for (size_t t = 0; ok && t < n; t++) unit[t] = tokens[t + 1] - 2;
        char *name = ok ? text_print("%s:%zu", path, i + 1) : NULL;
        ok = name && slam_prompts_add(p, name, unit, n);
        free(name);
    }
    free(unit);
    return ok;
}

int slam_prompts_audio(slam_prompts *p, const slam_quantiser *q, slam_ranks *ranks, const slam_list *files,
                       const slam_prompt_length *length, slam_speech_watch *watch, void *context) {
    slam_prompt_length by = *length;
    slam_sources *sources = slam_sources_audio(files, 0);
    slam_units *units = sources ? (slam_units *)mem_new(files->n, sizeof *units) : NULL;
    if (sources) slam_sources_ranks(sources, ranks);
    int ok = slam_ranks_agree(ranks, units != NULL) && slam_quantiser_sources(q, sources, units, watch, context);
    by.rate = slam_quantiser_settings(q)->rate;
    for (size_t i = 0; ok && i < files->n; i++)
        if (units[i].samples)
            ok = slam_prompts_add(p, files->at[i], units[i].unit, prompt_length(&by, units[i].duration, units[i].n));
    for (size_t i = 0; units && i < files->n; i++) slam_units_free(&units[i]);
    free(units);
    slam_sources_free(sources);
    return ok;
}

/* The units of tokens, as an array. */
static void text_add_token_units(text *t, const int *tokens, int n) {
    for (int i = 0; i < n; i++) text_add(t, "%s%d", i ? ", " : "[", tokens[i] - 2);
    text_add(t, n ? "]" : "[]");
}

int slam_prompts_write(const slam_prompts *p, const char *path) {
    text t = SLAM_ZERO;
    char *part;
    FILE *f = part_open(path, &part);
    int ok = f != NULL;
    for (size_t i = 0; ok && i < p->n; i++) {
        const slam_prompt *q = &p->at[i];
        if (!q->continuation) continue;
        t.n = 0;
        text_add(&t, "{\"file_name\": ");
        text_add_json(&t, q->name);
        text_add(&t, ", \"prompt\": ");
        text_add_token_units(&t, q->tokens + 1, q->n - 1);
        text_add(&t, ", \"units\": ");
        text_add_token_units(&t, q->continuation, q->length);
        text_add(&t, "}\n");
        ok = t.failed ? fail("%s: out of memory", path) : part_write(f, path, t.at, t.n);
    }
    text_free(&t);
    return f && part_close(f, path, part, ok);
}

/* A prompt that waits for its turn, or is at work in a slot of the decoder. */
typedef struct generation_task {
    uint64_t hash, stream; // of its tokens; the state of its random numbers
    slam_prompt *prompt;
    int *drawn, n; // (max_new), and how many were drawn
} generation_task;

typedef struct generating {
    const slam_generation *how;
    slam_decoder *decoder;
    generation_task *tasks, **at; // (n); (room), NULL: a free slot
    size_t n, next;               // tasks of this rank, how many have begun
    int longest;                  // tokens of the longest prompt of all ranks' tasks; 0: there is nothing to do
    int room, free;               // slots, free ones
    int *slots, *lengths;         // (room), of sequences that begin
    const int **tokens;           // (room), likewise
    int *drawn, *kept;            // (room), (room,max_new)
    float *uniform;               // (room)
    size_t done;
    uint64_t count;
} generating;

static int compare_generation_hashes(const void *a, const void *b) {
    const generation_task *x = (const generation_task *)a, *y = (const generation_task *)b;
    return x->hash != y->hash ? (x->hash > y->hash) - (x->hash < y->hash) : (x->prompt > y->prompt) - (x->prompt < y->prompt);
}

/* Long ones first: rows of one pass are about as long, and little is left to wait for in the end. */
static int compare_generation_lengths(const void *a, const void *b) {
    const generation_task *x = (const generation_task *)a, *y = (const generation_task *)b;
    return x->prompt->n != y->prompt->n ? (x->prompt->n < y->prompt->n) - (x->prompt->n > y->prompt->n)
                                        : (x->prompt > y->prompt) - (x->prompt < y->prompt);
}

static int generation_check(const slam_generation *how, const slam_prompts *p, const slam_config *c) {
    const int V = c->V, T = c->T;
    if (how->max_new < 1) return fail("%d new tokens, expected at least 1", how->max_new);
    if (how->batch < 1) return fail("a batch of %d sequences, expected at least 1", how->batch);
    if (how->context > T) return fail("a context of %d tokens, the model has positions for %d", how->context, T);
    if (how->max_new >= how->context)
        return fail("%d new tokens leave no room for a prompt in a context of %d, expected fewer", how->max_new, how->context);
    for (size_t i = 0; i < p->n; i++) {
        const slam_prompt *q = &p->at[i];
        if (q->n < 1 || q->tokens[0] != 1) return fail("%s: a prompt that does not begin with token 1", q->name);
        for (int t = 0; t < q->n; t++)
            if (q->tokens[t] < 0 || q->tokens[t] >= V)
                return fail("%s: token %d at position %d of the prompt, the model has a vocabulary of %d (units 0 to %d)", q->name,
                            q->tokens[t], t, V, V - 3);
    }
    return 1;
}

/* What there is to do, cut, seeded and in order; ranks take turns, so that each has long and short ones. */
static int generation_plan(generating *g, slam_prompts *p, const slam_ranks *ranks) {
    const int most = g->how->context - g->how->max_new;
    const size_t rank = (size_t)slam_ranks_rank(ranks), count = (size_t)slam_ranks_count(ranks);
    size_t n = 0;
    generation_task *all = g->tasks = (generation_task *)mem_new(p->n, sizeof *all);
    if (!all) return 0;
    for (size_t i = 0; i < p->n; i++) {
        slam_prompt *q = all[i].prompt = &p->at[i];
        const int cut = q->n > most ? q->n - most : 0;
        memmove(q->tokens + 1, q->tokens + 1 + cut, (size_t)(q->n - 1 - cut) * sizeof *q->tokens);
        q->n -= cut;
        q->cut += cut;
        all[i].hash = hash_bytes(HASH_START, q->tokens, q->n * sizeof *q->tokens);
    }
    qsort(all, p->n, sizeof *all, compare_generation_hashes);
    uint64_t equal = 0;
    for (size_t i = 0; i < p->n; i++) {
        equal = i && all[i].hash == all[i - 1].hash ? equal + 1 : 0;
        all[i].stream = rng_stream(g->how->seed, all[i].hash, equal);
    }
    for (size_t i = 0; i < p->n; i++)
        if (!all[i].prompt->continuation) {
            const generation_task kept = all[i]; // from a place that may be its own
            all[n++] = kept;
        }
    if (n) qsort(all, n, sizeof *all, compare_generation_lengths);
    if (n) g->longest = all[0].prompt->n;
    for (size_t i = rank; i < n; i += count) {
        const generation_task own = all[i];
        all[g->n++] = own;
    }
    return 1;
}

static int generation_open(generating *g, slam_model *model, slam_prompts *p) {
    if (!generation_plan(g, p, model->ops->ranks)) return 0;
    if (g->n == 0) return 1;
    g->room = g->free = (size_t)g->how->batch < g->n ? g->how->batch : (int)g->n;
    const size_t room = g->room;
    g->at = (generation_task **)mem_new(room, sizeof *g->at);
    g->slots = (int *)mem_new(room, sizeof(int));
    g->lengths = (int *)mem_new(room, sizeof(int));
    g->tokens = (const int **)mem_new(room, sizeof *g->tokens);
    g->drawn = (int *)mem_new(room, sizeof(int));
    g->kept = room <= SIZE_MAX / g->how->max_new ? (int *)mem_new(room * g->how->max_new, sizeof(int)) : NULL;
    g->uniform = (float *)mem_new(room, sizeof(float));
    if (!g->at || !g->slots || !g->lengths || !g->tokens || !g->drawn || !g->kept || !g->uniform) return 0;
    return (g->decoder = slam_decoder_new(model, g->room, g->longest + g->how->max_new)) != NULL;
}

static void generation_close(generating *g) {
    slam_decoder_free(g->decoder);
    free(g->tasks), free(g->at), free(g->slots), free(g->lengths);
    free((void *)g->tokens), free(g->drawn), free(g->kept), free(g->uniform);
}

/* Prompts into free slots. */
static int generation_begin(generating *g) {
    int n = 0;
    for (int s = 0; s < g->room && g->next < g->n; s++) {
        if (g->at[s]) continue;
        generation_task *t = g->at[s] = &g->tasks[g->next++];
        t->drawn = g->kept + (size_t)s * g->how->max_new;
        g->slots[n] = s;
        g->tokens[n] = t->prompt->tokens;
        g->lengths[n++] = t->prompt->n;
    }
    g->free -= n;
    return slam_decoder_begin(g->decoder, n, g->slots, g->tokens, g->lengths);
}

/* What was drawn for the sequence in slot s. */
static int generation_take(generating *g, int s) {
    generation_task *t = g->at[s];
    slam_prompt *q = t->prompt;
    const int ended = g->drawn[s] == 1;
    g->count++;
    if (!ended) t->drawn[t->n++] = g->drawn[s];
    if (!ended && t->n < g->how->max_new) return 1;
    if (!(q->continuation = (int *)mem_new(t->n, sizeof(int)))) return 0;
    memcpy(q->continuation, t->drawn, t->n * sizeof(int));
    q->length = t->n;
    q->ended = ended;
    slam_decoder_end(g->decoder, s);
    g->at[s] = NULL;
    g->free++;
    g->done++;
    return 1;
}

/* A model that has gone wrong would draw token 1 and say nothing. */
static int generation_finite(const generating *g, int V) {
    float *logits = (float *)mem_new((size_t)g->room * V, sizeof *logits);
    int ok = logits && slam_decoder_logits(g->decoder, logits);
    for (int s = 0; ok && s < g->room; s++)
        for (int v = 0; ok && v < V; v++)
            if (!isfinite(logits[(size_t)s * V + v])) ok = fail("%s: the model's logits are not finite", g->at[s]->prompt->name);
    free(logits);
    return ok;
}

static int generation_works(const generating *g) { return g->next < g->n || g->free < g->room; }

/* One token more for each sequence. */
static int generation_step(generating *g, int V) {
    const int first = g->next == 0;
    int ok = 1;
    /* a pass over a single prompt costs as much as a step of all: a few free slots are waited for */
    if (g->next < g->n && g->free > g->room / 8) ok = generation_begin(g);
    for (int s = 0; s < g->room; s++) g->uniform[s] = g->at[s] ? (float)(rng_next(&g->at[s]->stream) >> 40) * 0x1p-24f : 0;
    ok = ok && slam_decoder_step(g->decoder, &g->how->sampling, g->uniform, g->drawn) && (!first || generation_finite(g, V));
    for (int s = 0; ok && s < g->room; s++) ok = !g->at[s] || generation_take(g, s);
    return ok;
}

/* This rank's continuations as numbers: of which prompt, how many tokens, whether it ended, the tokens. NULL: no memory. */
static int *generation_pack(const generating *g, const slam_prompts *p, size_t *n) {
    size_t room = 1;
    for (size_t i = 0; i < g->n; i++) room += 3 + (size_t)g->tasks[i].prompt->length;
    int *numbers = (int *)mem_new(room, sizeof *numbers);
    *n = 0;
    for (size_t i = 0; numbers && i < g->n; i++) {
        const slam_prompt *q = g->tasks[i].prompt;
        if (!q->continuation) continue; // it was stopped
        numbers[*n] = (int)(q - p->at);
        numbers[*n + 1] = q->length;
        numbers[*n + 2] = q->ended;
        memcpy(numbers + *n + 3, q->continuation, (size_t)q->length * sizeof *numbers);
        *n += 3 + (size_t)q->length;
    }
    return numbers;
}

/* Continuations of all ranks become everyone's. */
static int generation_exchange(const generating *g, slam_prompts *p, slam_ranks *ranks) {
    size_t n, bytes = 0;
    int *own = generation_pack(g, p, &n), *all = NULL, ok = slam_ranks_agree(ranks, own != NULL);
    if (ok) ok = (all = (int *)slam_ranks_all_gather(ranks, own, n * sizeof *own, &bytes)) != NULL;
    for (size_t i = 0; ok && i < bytes / sizeof *all; i += 3 + (size_t)all[i + 1]) {
        slam_prompt *q = &p->at[all[i]];
        if (q->continuation) continue; // its own
        if (!(q->continuation = (int *)mem_new((size_t)all[i + 1], sizeof(int)))) {
            ok = 0;
            break;
        }
        q->length = all[i + 1];
        q->ended = all[i + 2];
        memcpy(q->continuation, all + i + 3, (size_t)q->length * sizeof(int));
    }
    free(own), free(all);
    return slam_ranks_agree(ranks, ok);
}

/* After so many steps ranks tell each other how far they are; one that has nothing left to do waits there for those that have. */
enum { GENERATION_ROUND = 16 };

int slam_generate(slam_model *model, const slam_generation *how, slam_prompts *prompts, slam_generate_watch *watch, void *context) {
    slam_ranks *ranks = model->ops->ranks;
    const int V = slam_model_config(model)->V, together = slam_ranks_count(ranks) > 1, steps = together ? GENERATION_ROUND : 1;
    generating g = SLAM_ZERO;
    g.how = how;
    int ok = generation_check(how, prompts, slam_model_config(model)) && generation_open(&g, model, prompts), stop = 0;
    ok = slam_ranks_agree(ranks, ok);
    for (int works = g.longest > 0; ok && works && !stop;) {
        for (int i = 0; ok && i < steps && generation_works(&g); i++) ok = generation_step(&g, V);
        if (!(ok = slam_ranks_agree(ranks, ok))) break;
        double told[3] = {(double)generation_works(&g), (double)g.done, (double)g.count};
        slam_ranks_sum(ranks, told, 3);
        works = told[0] > 0;
        stop = watch && !watch(context, (size_t)told[1], (uint64_t)told[2]);
        stop = (int)slam_ranks_max(ranks, stop); // a signal may have reached one of them
    }
    if (ok && together) ok = generation_exchange(&g, prompts, ranks);
    generation_close(&g);
    return ok;
}

int slam_prompts_may_write(const char *path) {
    struct stat s;
    char *part;
    if (stat(path, &s) == 0 && !S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode)) // a pipe: whoever reads it hears of it once
        return access(path, W_OK) == 0 || fail("%s: cannot be written: %s", path, strerror(errno));
    FILE *f = path_is_folder(path) ? NULL : part_open(path, &part);
    if (!f) return path_is_folder(path) ? fail("%s: is a folder, expected the name of a file", path) : 0;
    fclose(f);
    unlink(part);
    free(part);
    return 1;
}

double slam_unit_auto_bleu(const int *units, size_t n, int order) {
    text t = SLAM_ZERO;
    for (size_t i = 0; i < n; i++) text_add(&t, "%d ", units[i]);
    const double share = t.failed ? -1 : t.n ? slam_auto_bleu(t.at, order) : 0;
    text_free(&t);
    return share;
}

double slam_prompts_auto_bleu(const slam_prompts *p, int order) {
    double sum = 0;
    size_t n = 0;
    for (size_t i = 0; i < p->n; i++) {
        const slam_prompt *q = &p->at[i];
        if (!q->continuation) continue;
        const double share = slam_unit_auto_bleu(q->continuation, (size_t)q->length, order);
        if (share < 0) return -1;
        sum += share;
        n++;
    }
    return n ? sum / (double)n : 0;
}

double slam_texts_auto_bleu(const char *path, int order, size_t *n) {
    file_map map;
    text line = SLAM_ZERO;
    double sum = 0, share = 0;
    *n = 0;
    if (!map_open(&map, path)) return -1;
    for (size_t at = 0; at < map.size && share >= 0; ++*n) {
        const char *from = (const char *)map.data + at, *end = (const char *)memchr(from, '\n', map.size - at);
        const size_t length = end ? (size_t)(end - from) : map.size - at;
        line.n = 0;
        text_add_bytes(&line, from, length);
        share = line.failed ? -1 : slam_auto_bleu(line.at, order);
        sum += share;
        at += length + 1;
    }
    map_close(&map);
    text_free(&line);
    return share < 0 ? -1 : *n ? sum / (double)*n : 0;
}

/* ==========================================================================================
   13. CHECKPOINTS        a run's folders step_000200/, the links latest and best, trainer.json
   A checkpoint is written into a temporary folder, synced, and renamed: a folder that carries its
   final name is complete, whenever the program was killed. Links are replaced by renaming, too.
   may use: 1 base, 2 formats, 3 ops, 6 ranks, 7 model, 8 optimiser
   ========================================================================================== */

/* ---- settings: names and texts, as the command line spells them ---- */

const char *slam_settings_get(const slam_settings *s, const char *name) {
    for (size_t i = 0; i < s->n; i++)
        if (!strcmp(s->at[i].name, name)) return s->at[i].value;
    return NULL;
}

int slam_settings_set(slam_settings *s, const char *name, const char *value) {
    char *copy = text_copy(value);
    if (!copy) return 0;
    for (size_t i = 0; i < s->n; i++)
        if (!strcmp(s->at[i].name, name)) {
            free(s->at[i].value);
            s->at[i].value = copy;
            return 1;
        }
    char *key = text_copy(name);
    if (!key || !mem_grow((void **)&s->at, &s->capacity, s->n + 1, sizeof *s->at)) {
        free(key);
        free(copy);
        return 0;
    }
    s->at[s->n].name = key;
    s->at[s->n++].value = copy;
    return 1;
}

void slam_settings_free(slam_settings *s) {
    for (size_t i = 0; i < s->n; i++) {
        free(s->at[i].name);
        free(s->at[i].value);
    }
    free(s->at);
    memset(s, 0, sizeof *s);
}

/* ---- trainer.json ---- */

/* A list is one item a line in memory and an array in the file. */
static void add_setting(text *t, const char *value) {
    if (!strchr(value, '\n')) {
        text_add_json(t, value);
        return;
    }
    const char *separator = "[";
    for (const char *item = value, *end; (end = strchr(item, '\n')) != NULL; item = end + 1) {
        text one = SLAM_ZERO;
        text_add_bytes(&one, item, (size_t)(end - item));
        text_add(t, "%s", separator);
        if (one.failed) t->failed = 1;
        else text_add_json(t, one.at);
        text_free(&one);
        separator = ", ";
    }
    text_add(t, "]");
}

static void add_real(text *t, const char *name, double value) {
    text_add(t, "  \"%s\": ", name);
    text_add_number(t, value);
    text_add(t, ",\n");
}

static int trainer_write(const slam_trainer *s, const char *folder) {
    text t = SLAM_ZERO;
    text_add(&t, "{\n  \"slam\": \"%s\",\n  \"step\": %ld,\n  \"steps\": %ld,\n  \"tokens\": %llu,\n", SLAM_VERSION, s->step,
             s->steps, (unsigned long long)s->tokens);
    text_add(&t, "  \"epoch\": %llu,\n  \"row\": %llu,\n  \"skipped\": %ld,\n", (unsigned long long)s->epoch,
             (unsigned long long)s->row, s->skipped);
    add_real(&t, "seconds", s->seconds);
    if (s->best_step) add_real(&t, "best_val_loss", s->best_loss);
    text_add(&t, "  \"best_step\": %ld,\n  \"data\": \"%016llx\",\n  \"units\": \"%08lx\",\n  \"settings\": {", s->best_step,
             (unsigned long long)s->data, (unsigned long)s->units);
    for (size_t i = 0; i < s->settings.n; i++) {
        text_add(&t, i ? ",\n    " : "\n    ");
        text_add_json(&t, s->settings.at[i].name);
        text_add(&t, ": ");
        add_setting(&t, s->settings.at[i].value);
    }
    text_add(&t, "\n  }\n}\n");
    char *path = path_join(folder, "trainer.json");
    const int ok = path && !t.failed && file_write(path, t.at, t.n);
    free(path);
    text_free(&t);
    return ok;
}

/* A whole number up to 2^53, all that a double can count. */
static int trainer_count(const json *root, const char *key, const char *path, uint64_t *out) {
    double n = -1;
    if (!json_real(root, key, path, 0, 9007199254740992.0, &n)) return 0;
    if (n < 0 || n != floor(n)) return fail("%s: '%s' is missing or is no whole number", path, key);
    *out = (uint64_t)n;
    return 1;
}

static int trainer_hex(const json *root, const char *key, const char *path, uint64_t *out) {
    const char *spelled = json_text(root, key, "");
    char *end;
    *out = strtoull(spelled, &end, 16);
    return *spelled && !*end ? 1 : fail("%s: '%s' is missing or is no hexadecimal number", path, key);
}

static int settings_from_json(slam_settings *s, const json *object, const char *path) {
    if (!object || object->type != JSON_OBJECT) return fail("%s: 'settings' is missing or is no object", path);
    for (const json *j = object->first; j; j = j->next) {
        text list = SLAM_ZERO;
        int ok = j->type == JSON_STRING || j->type == JSON_ARRAY;
        for (const json *item = j->type == JSON_ARRAY ? j->first : NULL; ok && item; item = item->next) {
            ok = item->type == JSON_STRING;
            if (ok) text_add(&list, "%s\n", item->string);
        }
        if (!ok) fail("%s: setting '%s' is neither a string nor a list of strings", path, j->key);
        ok = ok && !list.failed && slam_settings_set(s, j->key, j->type == JSON_STRING ? j->string : list.at ? list.at : "");
        text_free(&list);
        if (!ok) return 0;
    }
    return 1;
}

static int trainer_from_json(slam_trainer *s, const json *root, const char *path) {
    uint64_t step = 0, steps = 0, skipped = 0, best = 0, units = 0;
    if (!trainer_count(root, "step", path, &step) || !trainer_count(root, "steps", path, &steps) ||
        !trainer_count(root, "tokens", path, &s->tokens) || !trainer_count(root, "epoch", path, &s->epoch) ||
        !trainer_count(root, "row", path, &s->row) || !trainer_count(root, "skipped", path, &skipped) ||
        !trainer_count(root, "best_step", path, &best) || !json_real(root, "seconds", path, 0, 1e12, &s->seconds) ||
        !json_real(root, "best_val_loss", path, -1e300, 1e300, &s->best_loss) || !trainer_hex(root, "data", path, &s->data) ||
        !trainer_hex(root, "units", path, &units))
        return 0;
    if (steps == 0 || steps < step)
        return fail("%s: 'steps' is %llu, 'step' is %llu", path, (unsigned long long)steps, (unsigned long long)step);
    s->step = (long)step;
    s->steps = (long)steps;
    s->skipped = (long)skipped;
    s->best_step = (long)best;
    s->units = (uint32_t)units;
    return settings_from_json(&s->settings, json_get(root, "settings"), path);
}

int slam_trainer_read(slam_trainer *s, const char *folder) {
    char *path = path_join(folder, "trainer.json");
    json *root = path ? json_read(path) : NULL;
    memset(s, 0, sizeof *s);
    int ok = root && trainer_from_json(s, root, path);
    if (!ok) slam_trainer_free(s);
    json_free(root);
    free(path);
    return ok;
}

void slam_trainer_free(slam_trainer *s) {
    slam_settings_free(&s->settings);
    memset(s, 0, sizeof *s);
}

/* ---- folders and links ---- */

static const char checkpoint_part[] = ".checkpoint.part", link_part[] = ".link.part";

/* The step of a name like step_000200; -1 where it is another. */
static long checkpoint_step(const char *name) {
    char *end;
    if (strncmp(name, "step_", 5) || !isdigit((unsigned char)name[5])) return -1;
    const long step = strtol(name + 5, &end, 10);
    return *end ? -1 : step;
}

static void checkpoint_name(char name[32], long step) { snprintf(name, 32, "step_%06ld", step); }

/* run/NAME is complete once it has its name; what a hand has removed from it since makes it unfit to go on from. */
static int checkpoint_complete(const char *run, const char *name) {
    static const char *const files[] = {"config.json", "optimizer.safetensors", "trainer.json"};
    char *folder = path_join(run, name);
    int ok = folder != NULL;
    for (int i = 0; ok && i < 3; i++) {
        char *path = path_join(folder, files[i]);
        ok = path && path_is_file(path);
        free(path);
    }
    free(folder);
    return ok;
}

/* The steps of the complete checkpoints, lowest first, in memory of their own; NULL on failure. */
static long *checkpoint_steps(const char *run, size_t *n) {
    names list = SLAM_ZERO;
    *n = 0;
    long *steps = folder_list(run, &list) ? (long *)mem_new(list.n, sizeof *steps) : NULL;
    for (size_t i = 0; steps && i < list.n; i++) {
        const long step = checkpoint_step(list.at[i]);
        if (step < 0 || !checkpoint_complete(run, list.at[i])) continue;
        size_t at = (*n)++; // by number: names are in order only up to a million steps
        for (; at > 0 && steps[at - 1] > step; at--) steps[at] = steps[at - 1];
        steps[at] = step;
    }
    names_free(&list);
    return steps;
}

/* run/NAME becomes a link to a folder beside it; at no moment is there none. */
static int checkpoint_link(const char *run, const char *name, const char *to) {
    char *part = path_join(run, link_part), *path = path_join(run, name);
    int ok = part && path;
    if (ok) {
        unlink(part);
        ok = symlink(to, part) == 0 && rename(part, path) == 0;
        if (!ok && errno == EISDIR) fail("%s: a copy has made a folder of this link to a checkpoint: remove it", path);
        else if (!ok) fail("%s: cannot be linked to %s: %s", path, to, strerror(errno));
    }
    free(part);
    free(path);
    return ok;
}

static int checkpoint_links(const char *run, long latest, long best) {
    char name[32];
    checkpoint_name(name, latest);
    if (!checkpoint_link(run, "latest", name)) return 0;
    checkpoint_name(name, best);
    if (best && checkpoint_complete(run, name) && !checkpoint_link(run, "best", name)) return 0;
    return folder_sync(run);
}

/* Removes all but the `keep` newest and the best. A folder loses its name first, so that what is half removed never passes for
   a checkpoint. */
static int checkpoint_prune(const char *run, int keep, long best) {
    size_t n;
    long *steps = checkpoint_steps(run, &n);
    int ok = steps != NULL;
    for (size_t i = 0; ok && i + (size_t)keep < n; i++) {
        char name[32];
        checkpoint_name(name, steps[i]);
        if (steps[i] == best) continue;
        char *path = path_join(run, name), *part = path_join(run, checkpoint_part);
        ok = path && part && remove_tree(part);
        if (ok && rename(path, part) != 0) ok = fail("%s: cannot be removed: %s", path, strerror(errno));
        ok = ok && remove_tree(part);
        free(path);
        free(part);
    }
    free(steps);
    return ok;
}

/* Syncs every file of a folder, whoever wrote it, then the folder. */
static int sync_files(const char *folder) {
    names list = SLAM_ZERO;
    int ok = folder_list(folder, &list);
    for (size_t i = 0; ok && i < list.n; i++) {
        char *path = path_join(folder, list.at[i]);
        ok = path && folder_sync(path);
        free(path);
    }
    names_free(&list);
    return ok && folder_sync(folder);
}

/* Fills PART; all ranks together. */
static int checkpoint_fill(const char *part, slam_model *model, slam_optimiser *optimiser, const slam_trainer *trainer,
                           int format) {
    slam_ranks *ranks = optimiser->ranks;
    const int root = slam_ranks_root(ranks);
    float *host = root ? (float *)mem_new(model->w.total, sizeof *host) : NULL;
    int ok = slam_ranks_agree(ranks, !root || (host && part && remove_tree(part) && make_folders(part)));
    ok = ok && master_download(optimiser, host);
    ok = ok && slam_ranks_agree(ranks, !root || model_write(model, host, part, format));
    free(host);
    return ok && slam_optimiser_save(optimiser, part) &&
           slam_ranks_agree(ranks, !root || (trainer_write(trainer, part) && sync_files(part)));
}

/* PART becomes RUN/step_NNNNNN. */
static int checkpoint_place(const char *run, const char *part, long step) {
    char name[32];
    checkpoint_name(name, step);
    char *path = path_join(run, name);
    int ok = path != NULL;
    if (ok && checkpoint_complete(run, name)) ok = fail("%s: is complete already", path);
    if (ok && path_is_folder(path)) ok = remove_tree(path); // a hand has taken files away: nothing goes on from it
    if (ok && rename(part, path) != 0) ok = fail("%s: cannot be renamed into place: %s", path, strerror(errno));
    free(path);
    return ok && folder_sync(run);
}

int slam_checkpoint_save(const char *run, slam_model *model, slam_optimiser *optimiser, const slam_trainer *trainer, int format,
                         int keep) {
    slam_ranks *ranks = optimiser->ranks;
    const int root = slam_ranks_root(ranks);
    char *part = path_join(run, checkpoint_part);
    int ok = checkpoint_fill(part, model, optimiser, trainer, format);
    ok = ok && slam_ranks_agree(ranks, !root || checkpoint_place(run, part, trainer->step));
    if (!ok && part && root) {
        text why = SLAM_ZERO; // removing may fail as well, but what went wrong first is what to say
        text_add(&why, "%s", slam_error());
        remove_tree(part);
        fail("%s: the checkpoint of step %ld could not be saved: %s", run, trainer->step, why.at ? why.at : "out of memory");
        text_free(&why);
    }
    free(part);
    return ok && slam_ranks_agree(ranks, !root || (checkpoint_links(run, trainer->step, trainer->best_step) &&
                                                   (keep == 0 || checkpoint_prune(run, keep, trainer->best_step))));
}

int slam_checkpoint_find(const char *run, char **folder) {
    size_t n;
    long *steps = checkpoint_steps(run, &n);
    char name[32];
    *folder = NULL;
    if (!steps) return 0;
    if (n > 0) {
        checkpoint_name(name, steps[n - 1]);
        *folder = path_join(run, name);
    }
    const int ok = n == 0 || *folder;
    free(steps);
    return ok;
}

int slam_checkpoint_mend(const char *run) {
    static const char *const leftovers[] = {checkpoint_part, link_part};
    for (int i = 0; i < 2; i++) {
        char *path = path_join(run, leftovers[i]);
        const int ok = path && remove_tree(path);
        free(path);
        if (!ok) return 0;
    }
    char *folder;
    slam_trainer trainer;
    if (!slam_checkpoint_find(run, &folder)) return 0;
    int ok = !folder || slam_trainer_read(&trainer, folder);
    if (ok && folder) {
        ok = checkpoint_links(run, trainer.step, trainer.best_step);
        slam_trainer_free(&trainer);
    }
    free(folder);
    return ok;
}

/* ---- the optimiser's file: the moments under each tensor's name with ".m" or ".v", and the count of updates ---- */

static int moments_list(const slam_optimiser *o, const float *host, tensor_out **out, parameter **parameters, names *spelled,
                        size_t *n) {
    size_t count = 0;
    parameter *list = *parameters = parameters_of(&o->model->config, &count);
    tensor_out *t = *out = list ? (tensor_out *)mem_new(2 * count, sizeof *t) : NULL;
    for (size_t k = 0; t && k < 2 * count; k++) {
        const parameter *p = &list[k / 2];
        char name[96];
        snprintf(name, sizeof name, "%s.%c", p->name, k % 2 ? 'v' : 'm');
        if (!names_add(spelled, name)) return 0;
        t[k].name = spelled->at[k];
        t[k].dtype = DTYPE_F32;
        t[k].rank = p->rows ? 2 : 1;
        t[k].shape[0] = p->rows ? p->rows : p->cols;
        t[k].shape[1] = p->cols;
        t[k].data = host ? host + (k % 2 ? o->model->w.total : 0) + p->at : NULL;
    }
    *n = 2 * count;
    return t != NULL;
}

int slam_optimiser_save(slam_optimiser *o, const char *folder) {
    const size_t total = o->model->w.total;
    const int root = slam_ranks_root(o->ranks);
    float *host = root ? (float *)mem_new(2 * total, sizeof *host) : NULL;
    char *path = path_join(folder, "optimizer.safetensors"), updates[32];
    parameter *list = NULL;
    tensor_out *out = NULL;
    names spelled = SLAM_ZERO;
    size_t n = 0;
    snprintf(updates, sizeof updates, "%ld", o->updates);
    const char *const metadata[] = {"updates", updates, NULL};
    int ok = slam_ranks_agree(o->ranks, !root || (host && path && moments_list(o, host, &out, &list, &spelled, &n)));
    ok = ok && state_download(o, o->m, host) && state_download(o, o->v, host ? host + total : NULL);
    ok = ok && slam_ranks_agree(o->ranks, !root || tensors_write(path, out, n, metadata));
    names_free(&spelled);
    free(out);
    free(list);
    free(path);
    free(host);
    return ok;
}

/* The two moments of a parameter, through `host` (its size). */
static int moments_read(slam_optimiser *o, const tensors *file, const char *path, const tensor_out *out, const parameter *p,
                        float *host) {
    for (int k = 0; k < 2; k++) {
        const tensor *t = tensors_find(file, out[k].name);
        if (!t) return fail("%s: tensor '%s' is missing", path, out[k].name);
        if (!tensor_shape_is(t, out[k].rank, out[k].shape[0], out[k].rank == 2 ? out[k].shape[1] : 0) ||
            !tensor_floats(t, host, 0, t->count))
            return 0;
        state_upload(o, k ? o->v : o->m, host, p->at, parameter_size(p));
    }
    return 1;
}

int slam_optimiser_load(slam_optimiser *o, const char *folder) {
    char *path = path_join(folder, "optimizer.safetensors"), *end = NULL;
    parameter *list = NULL;
    tensor_out *out = NULL;
    names spelled = SLAM_ZERO;
    size_t n = 0, largest = 0;
    tensors *file = path ? tensors_open(path) : NULL;
    int ok = file && moments_list(o, NULL, &out, &list, &spelled, &n);
    if (ok && tensors_count(file) != n) ok = fail("%s: %zu tensors, expected %zu", path, tensors_count(file), n);
    for (size_t k = 0; ok && k < n / 2; k++) largest = parameter_size(&list[k]) > largest ? parameter_size(&list[k]) : largest;
    float *host = ok ? (float *)mem_new(largest, sizeof *host) : NULL;
    ok = host != NULL;
    for (size_t k = 0; ok && k < n / 2; k++) ok = moments_read(o, file, path, out + 2 * k, &list[k], host);
    const char *updates = ok ? tensors_metadata(file, "updates") : NULL;
    if (ok) o->updates = updates ? strtol(updates, &end, 10) : -1;
    if (ok && (!updates || end == updates || *end || o->updates < 0)) ok = fail("%s: no count of updates in its metadata", path);
    ok = ok && o->model->ops->finish(o->model->ops);
    tensors_close(file);
    names_free(&spelled);
    free(out);
    free(list);
    free(path);
    free(host);
    return slam_ranks_agree(o->ranks, ok);
}

/* ==========================================================================================
   14. RUN                what the programs share: flags, the training loop, log, progress, signals
   And what goes with them: devices, run folders, the settings of a run that goes on.
   may use: 1 base, 2 formats, 3 ops, 4 ops on the CPU, 5 ops on CUDA, 6 ranks, 7 model, 8 optimiser, 9 data, 10 speech, 11 preference,
            12 scoring, 13 checkpoints
   ========================================================================================== */
#include <signal.h>
#include <sys/file.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

/* ---- signals ---- */

static volatile sig_atomic_t signals_seen;
static const slam_ranks *signals_ranks;

/* mpirun and srun tell all ranks to end when one of them has died. The others may wait for it, and would wait until they are killed. */
static void signal_seen(int number) {
    static const char died[] = "error: another rank has died\n";
    const int kept = errno;
    if (signals_seen) _exit(128 + number);
    if (!slam_ranks_alive(signals_ranks)) {
        const ssize_t written = write(STDERR_FILENO, died, sizeof died - 1);
        _exit(written < 0 ? 1 : 128 + number);
    }
    signals_seen = 1;
    errno = kept;
}

void slam_signals_catch(const slam_ranks *ranks) {
    signals_ranks = ranks;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = signal_seen;
    action.sa_flags = SA_RESTART; // a read that is under way goes on: the loop looks between steps
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

int slam_signals_stop(void) { return signals_seen != 0; }

/* ---- how a program begins and ends ---- */

slam_ranks *slam_program_begin(const char *program) {
    slam_ranks *r = slam_ranks_join();
    if (!r) fprintf(stderr, "%s: error: %s\n", program, slam_error());
    else if (!slam_ranks_root(r) && !freopen("/dev/null", "w", stdout)) {
        fprintf(stderr, "%s: error: /dev/null: %s\n", program, strerror(errno));
        slam_ranks_leave(r, 1);
        return NULL;
    }
    return r;
}

int slam_program_end(const slam_flags *flags, slam_ranks *ranks, int status) {
    signals_ranks = NULL;
    char who[32] = "";
    if (status == 2) slam_ranks_agree(ranks, 0); // they have the same command line
    const int known = slam_ranks_failed(ranks);
    if (!known && slam_ranks_count(ranks) > 1) snprintf(who, sizeof who, "rank %d: ", slam_ranks_rank(ranks));
    if (status == 2 && slam_ranks_root(ranks)) slam_flags_usage(flags);
    if (status == 1 && (!known || slam_ranks_root(ranks))) fprintf(stderr, "%s: error: %s%s\n", flags->program, who, slam_error());
    slam_ranks_leave(ranks, status == 1);
    return status;
}

int slam_refuse(const char *format, ...) {
    char sentence[sizeof error_text];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    return fail("%s", sentence);
}

/* ---- devices ---- */

/* Where 0 are asked for, of several ranks on a machine: its part of the cores, or what mpirun has bound it to. */
static int threads_of(const slam_ranks *ranks, int threads) {
    int neighbours;
    slam_ranks_local(ranks, &neighbours);
    const int cores = (int)sysconf(_SC_NPROCESSORS_ONLN) / neighbours, bound = threads_count();
    return threads || neighbours == 1 ? threads : cores < 1 ? 1 : cores < bound ? cores : bound;
}

int slam_threads(const slam_ranks *ranks, int threads) { return threads_set(threads_of(ranks, threads)); }

int slam_device_check(const char *device) {
    char *end = NULL;
    if (!strcmp(device, "auto") || !strcmp(device, "cpu") || !strcmp(device, "cuda")) return 1;
    if (!strncmp(device, "cuda:", 5) && isdigit((unsigned char)device[5]) && strtol(device + 5, &end, 10) < 1024 && !*end) return 1;
    return fail("--device %s: expected auto, cpu, cuda or cuda:N", device);
}

static slam_ops *open_device(const char *device, const char *dtype, int threads, int gpu, char note[256]) {
    slam_ops *ops = !strcmp(device, "cpu")
                        ? slam_cpu(threads)
                        : slam_cuda(device[4] == ':' ? (int)strtol(device + 5, NULL, 10) : gpu, strcmp(dtype, "f32") ? 2 : 4);
    if (ops && threads > 0) ops->threads = threads_set(threads);
    if (!ops && !strcmp(device, "auto")) {
        snprintf(note, 256, "%.255s", slam_error());
        ops = slam_cpu(threads);
    }
    if (ops && strcmp(dtype, "auto") && ops->bytes_per_act != (strcmp(dtype, "f32") ? 2 : 4)) {
        fail("--dtype %s: the CPU computes in f32 only%s%s", dtype, *note ? ", and there is no GPU: " : "", note);
        slam_ops_free(ops);
        ops = NULL;
    }
    return ops;
}

static const char *device_kind(const char *name) { return strncmp(name, "cuda", 4) ? "cpu" : "cuda"; }

slam_ops *slam_device(slam_ranks *ranks, const char *device, const char *dtype, int threads, char note[256]) {
    int neighbours;
    const int local = slam_ranks_local(ranks, &neighbours), many = slam_ranks_count(ranks) > 1;
    note[0] = 0;
    if (!slam_device_check(device)) return NULL;
    if (many && !strncmp(device, "cuda:", 5)) {
        fail("--device %s: %d ranks cannot share a GPU; --device cuda gives each its own", device, slam_ranks_count(ranks));
        return NULL;
    }
    /* Slurm may show each rank its own GPU alone, which then is the only one */
    const int gpus = strcmp(device, "cpu") ? slam_cuda_count() : 0, gpu = gpus == 1 ? 0 : local;
    slam_ops *ops = open_device(device, dtype, threads_of(ranks, threads), gpu, note);
    int ok = slam_ranks_agree(ranks, ops != NULL);
    ok = ok &&
         slam_ranks_agree(
             ranks, slam_ranks_same(ranks, !strcmp(device_kind(ops->name), "cuda")) ||
                        fail("--device auto: GPUs for some of the ranks only%s%s; start as many as there are, or take --device cpu",
                             *note ? ": " : "", note));
    if (!ok) {
        slam_ops_free(ops);
        return NULL;
    }
    slam_ranks_attach(ranks, ops);
    return ops;
}

/* ---- how units are made ---- */

static int unit_flag_agrees(const slam_flags *flags, const slam_unit_flags *f, const char *flag, int differs, const char *says) {
    if (!differs || !slam_flags_given(flags, flag)) return 1;
    return fail("--%s: %s was made for %s; leave the flag out, or fit other centroids", flag, f->kmeans, says);
}

static int unit_settings_agree(const slam_flags *flags, const slam_unit_flags *f, const slam_speech_settings *asked,
                               const slam_speech_settings *s) {
    const char *const features[] = {"MFCC", "HuBERT's features"};
    char rate[32], layer[32];
    snprintf(rate, sizeof rate, "%d frames a second", s->rate);
    snprintf(layer, sizeof layer, "layer %d", s->layer);
    const int other = s->features != asked->features;
    return unit_flag_agrees(flags, f, "features", other, features[s->features]) &&
           unit_flag_agrees(flags, f, "hubert", other, features[s->features]) &&
           unit_flag_agrees(flags, f, "rate", s->rate != asked->rate, rate) &&
           unit_flag_agrees(flags, f, "layer", s->features == SLAM_HUBERT && s->layer != asked->layer, layer) &&
           unit_flag_agrees(flags, f, "normalize", s->normalize != asked->normalize, "waveforms as they are") &&
           unit_flag_agrees(flags, f, "no-dedup", s->dedup != asked->dedup, "deduplicated units");
}

int slam_unit_settings(const slam_flags *flags, const slam_unit_flags *f, int fit, slam_speech_settings *s) {
    slam_speech_defaults(s);
    if (f->hubert) {
        char *path = slam_path_absolute(f->hubert); // KM.json keeps it
        const int fits = path && strlen(path) < sizeof s->hubert;
        if (fits) snprintf(s->hubert, sizeof s->hubert, "%s", path);
        else if (path)
            fail("--hubert %s: the path has %zu bytes, expected fewer than %zu", f->hubert, strlen(path), sizeof s->hubert);
        free(path);
        if (!fits) return 0;
    }
    if (f->features ? !strcmp(f->features, "hubert") : f->hubert != NULL) s->features = SLAM_HUBERT;
    if (s->features == SLAM_HUBERT) s->rate = 0;
    if (f->rate && slam_flags_given(flags, "rate")) s->rate = atoi(f->rate);
    if (slam_flags_given(flags, "layer")) s->layer = f->layer;
    s->normalize = f->normalize;
    s->dedup = !f->no_dedup;
    slam_speech_settings asked = *s;
    if (!fit && (!slam_quantiser_settings_read(f->kmeans, s) || !unit_settings_agree(flags, f, &asked, s))) return 0;
    if (s->features == SLAM_HUBERT && !*s->hubert)
        return fail("HuBERT's features: expected --hubert DIR, a HuBERT model in Hugging Face's format");
    if (s->features == SLAM_MFCC && f->hubert) return fail("--hubert: MFCC need no model; leave --features mfcc out");
    return s->features == SLAM_HUBERT || !slam_flags_given(flags, "layer") || fail("--layer: is for --hubert DIR");
}

int slam_bundled_units(const char *argv0, uint32_t units) {
    slam_speech_settings settings;
    if (!units) return 1;
    slam_speech_defaults(&settings);
    char *path = slam_path_beside(argv0, "test/corpus/km.npy");
    slam_quantiser *q = path ? slam_quantiser_open(path, &settings, NULL) : NULL;
    const uint32_t made = q ? slam_quantiser_fingerprint(q) : 0;
    slam_quantiser_free(q);
    free(path);
    if (!made || made == units) return made != 0;
    return fail("the bundled data are units of quantiser %08x, the model was trained on those of %08x", (unsigned)made,
                (unsigned)units);
}

int slam_micro_batch(const slam_ops *ops, const slam_config *config, int batch, int T, int mode, int parts) {
    /* The CPU's caches hold no more of a larger one, so that it gains nothing beyond some thousand tokens. */
    const int is_gpu = !strncmp(ops->name, "cuda", 4);
    const double room = (is_gpu ? 0.9 : 0.6) * (double)ops->memory;
    const int most = is_gpu ? batch : 4096 / T;
    int micro = batch < most ? batch : most > 1 ? most : 1;
    while (micro > 1 && slam_config_memory(config, ops->bytes_per_act, micro, T, mode, parts).total > room) micro--;
    const int passes = (batch + micro - 1) / micro; // equal ones take as many, and less memory
    return (batch + passes - 1) / passes;
}

/* ---- paths ---- */

static char *program_path(const char *argv0) {
    char found[4096];
#ifdef __APPLE__
    uint32_t size = sizeof found;
    if (_NSGetExecutablePath(found, &size) == 0) return text_copy(found);
#else
    const ssize_t n = readlink("/proc/self/exe", found, sizeof found - 1);
    if (n > 0) {
        found[n] = 0;
        return text_copy(found);
    }
#endif
    if (strchr(argv0, '/') || !getenv("PATH")) return text_copy(argv0);
    for (const char *at = getenv("PATH"); *at;) {
        const size_t length = strcspn(at, ":");
        text folder = SLAM_ZERO;
        text_add_bytes(&folder, length ? at : ".", length ? length : 1);
        char *path = folder.failed ? NULL : path_join(folder.at, argv0);
        text_free(&folder);
        if (path && path_is_file(path)) return path;
        free(path);
        at += length + (at[length] == ':');
    }
    return text_copy(argv0);
}

char *slam_path_beside(const char *argv0, const char *name) {
    char *program = program_path(argv0), *path = NULL;
    if (program) {
        char *slash = strrchr(program, '/');
        if (slash) *slash = 0;
        path = path_join(slash ? (slash == program ? "/" : program) : ".", name);
    }
    free(program);
    return path;
}

char *slam_path_absolute(const char *path) {
    char *whole = realpath(path, NULL);
    if (whole) return whole;
    char here[4096];
    if (path[0] == '/') return text_copy(path);
    if (!getcwd(here, sizeof here)) {
        fail("the current folder: %s", strerror(errno));
        return NULL;
    }
    return path_join(here, path);
}

/* ---- run folders ---- */

/* What makes a folder a run's. */
static int holds_run(const char *folder) {
    names list = SLAM_ZERO;
    int found = 0;
    if (path_is_folder(folder) && folder_list(folder, &list))
        for (size_t i = 0; i < list.n; i++)
            found = found || !strcmp(list.at[i], "log.jsonl") || !strcmp(list.at[i], "trainer.json") ||
                    checkpoint_step(list.at[i]) >= 0;
    names_free(&list);
    return found;
}

char *slam_run_new(const char *name) {
    if (!make_folders("runs")) return NULL;
    for (int n = 1; n < 1000000; n++) {
        text t = SLAM_ZERO;
        text_add(&t, n == 1 ? "runs/%s" : "runs/%s-%d", name, n);
        if (!t.failed && mkdir(t.at, 0777) == 0) return t.at;
        const int taken = !t.failed && errno == EEXIST;
        if (!t.failed && !taken) fail("%s: cannot make this folder: %s", t.at, strerror(errno));
        text_free(&t);
        if (!taken) return NULL;
    }
    fail("runs: a million folders are taken");
    return NULL;
}

int slam_run_claim(const char *folder) {
    if (holds_run(folder))
        return fail("%s: holds a run already; --resume goes on with it, another --out begins a new one (nothing is overwritten)",
                    folder);
    return 1;
}

/* When a run was last written to, in nanoseconds: by its log, else by itself. */
static int64_t run_age(const char *folder) {
    struct stat s;
    char *log = path_join(folder, "log.jsonl");
    const int ok = (log && stat(log, &s) == 0) || stat(folder, &s) == 0;
    free(log);
    if (!ok) return 0;
#ifdef __APPLE__
    return (int64_t)s.st_mtimespec.tv_sec * 1000000000 + s.st_mtimespec.tv_nsec;
#else
    return (int64_t)s.st_mtim.tv_sec * 1000000000 + s.st_mtim.tv_nsec;
#endif
}

/* NAME, NAME-2, NAME-3, ... */
static int run_has_name(const char *folder, const char *name) {
    const size_t n = strlen(name);
    if (strncmp(folder, name, n)) return 0;
    return !folder[n] || (folder[n] == '-' && folder[n + 1] && folder[n + 1 + strspn(folder + n + 1, "0123456789")] == 0);
}

/* Whether a run of this program was begun in the folder (NULL program: whether it holds a checkpoint). What trainer.json does
   not say, or cannot, the folder's name does. */
static int run_fits(const char *folder, const char *program, int *fits) {
    char *checkpoint = NULL, *note = path_join(folder, "trainer.json");
    slam_trainer trainer;
    int ok = note && slam_checkpoint_find(folder, &checkpoint);
    *fits = ok && (checkpoint || (program && path_is_file(note)));
    if (*fits && program) {
        const int readable = slam_trainer_read(&trainer, checkpoint ? checkpoint : folder);
        const char *said = readable ? slam_settings_get(&trainer.settings, "program") : NULL;
        *fits = said ? !strcmp(said, program) : run_has_name(path_name(folder), program);
        if (readable) slam_trainer_free(&trainer);
    }
    free(checkpoint);
    free(note);
    return ok;
}

char *slam_run_newest(const char *name) {
    names list = SLAM_ZERO;
    char *newest = NULL;
    int64_t age = -1;
    int ok = !path_is_folder("runs") || folder_list("runs", &list);
    for (size_t i = 0; ok && i < list.n; i++) {
        char *folder = path_join("runs", list.at[i]);
        int fits = 0;
        ok = folder && (!path_is_folder(folder) || run_fits(folder, name, &fits));
        if (fits && run_age(folder) > age) {
            age = run_age(folder);
            free(newest);
            newest = folder;
        } else free(folder);
    }
    names_free(&list);
    if (ok && !newest) fail("runs: no run%s%s%s here yet", name ? " '" : " with a checkpoint", name ? name : "", name ? "'" : "");
    return newest;
}

char *slam_run_model(const char *path) {
    char *run = path ? text_copy(path) : slam_run_newest(NULL), *config = run ? path_join(run, "config.json") : NULL,
         *checkpoint = NULL;
    if (config && !path_is_file(config) && path_is_folder(run)) {
        if (!slam_checkpoint_find(run, &checkpoint)) {
            free(run);
            run = NULL;
        } else if (checkpoint) {
            free(run);
            run = checkpoint;
        }
    }
    free(config);
    return run;
}

/* ---- settings of a run that goes on ---- */

/* Whether a word is among words that are parted by spaces. */
static int among(const char *words, const char *word) {
    const size_t n = strlen(word);
    for (const char *at = words; (at = strstr(at, word)) != NULL; at += n)
        if ((at == words || at[-1] == ' ') && (at[n] == ' ' || !at[n])) return 1;
    return 0;
}

int slam_settings_keep(slam_settings *s, const slam_flags *flags, const char *without) {
    for (int i = 0; i < flags->n; i++) {
        const char *name = flags->at[i].name;
        if (!name || !flags->at[i].set || among(without, name)) continue;
        char *value = slam_flags_text(flags, name);
        const int ok = value && slam_settings_set(s, name, value);
        free(value);
        if (!ok) return 0;
    }
    return 1;
}

/* A flag that was given on the command line beside the value that the run has, NULL: none. */
static int setting_agrees(const slam_flag *flag, const char *given, const char *stored, const char *may_change,
                          const char *may_grow) {
    if (!strcmp(given, "auto") || among(may_change, flag->name) || (stored && (!strcmp(given, stored) || !strcmp(stored, "auto"))))
        return 1;
    if (!among(may_grow, flag->name))
        return fail("--%s %s: the run that is resumed has %s", flag->name, given, stored ? stored : "none");
    if (stored && strtod(stored, NULL) > strtod(given, NULL))
        return fail("--%s %s: the run that is resumed has %s, and a limit may only grow", flag->name, given, stored);
    return 1;
}

/* Whether the command line names another kind of device than the run's; -1: no memory. */
static int device_moves(const slam_settings *s, const slam_flags *flags) {
    const char *stored = slam_settings_get(s, "device");
    if (!stored || !slam_flags_given(flags, "device")) return 0;
    char *given = slam_flags_text(flags, "device");
    const int moves = !given ? -1 : strcmp(given, "auto") && strcmp(device_kind(given), stored);
    free(given);
    return moves;
}

slam_ops *slam_run_device(slam_ranks *ranks, const slam_settings *s, slam_flags *flags, const char *device, const char *dtype,
                          int threads, char note[256]) {
    const char *stored = slam_settings_get(s, "device");
    slam_ops *ops = slam_device(ranks, device, dtype, threads, note);
    if (!ops) return NULL;
    if (stored && strcmp(stored, device_kind(ops->name)))
        snprintf(note, 256, "the run was on %.64s before: its numbers will differ a little", stored);
    if (slam_flags_set(flags, "device", device_kind(ops->name)) &&
        slam_flags_set(flags, "dtype", ops->bytes_per_act == 4 ? "f32" : "bf16"))
        return ops;
    slam_ops_free(ops);
    return NULL;
}

int slam_settings_recall(const slam_settings *s, slam_flags *flags, const char *without, const char *may_change,
                         const char *may_grow) {
    const int moves = device_moves(s, flags);
    if (moves < 0) return 0;
    for (int i = 0; i < flags->n; i++) {
        const slam_flag *flag = &flags->at[i];
        if (!flag->name || among(without, flag->name) || (moves && among("dtype micro-batch", flag->name))) continue;
        const char *stored = slam_settings_get(s, flag->name);
        char *given = slam_flags_text(flags, flag->name);
        const int takes_stored = given && stored && (!flag->given || !strcmp(given, "auto"));
        int ok = given && (!flag->given || setting_agrees(flag, given, stored, may_change, may_grow));
        free(given);
        if (ok && takes_stored) ok = slam_flags_set(flags, flag->name, stored);
        if (!ok) return 0;
    }
    return 1;
}

static int list_lines(text *t, const slam_list *list, int absolute) {
    text_add_bytes(t, "", 0);
    for (size_t i = 0; i < list->n; i++) {
        char *path = absolute ? slam_path_absolute(list->at[i]) : text_copy(list->at[i]);
        if (!path) return 0;
        text_add(t, "%s\n", path);
        free(path);
    }
    return !t->failed;
}

int slam_settings_keep_paths(slam_settings *s, const char *name, const slam_list *given) {
    text as_given = SLAM_ZERO, absolute = SLAM_ZERO, key = SLAM_ZERO;
    text_add(&key, "%s_absolute", name);
    const int ok = list_lines(&as_given, given, 0) && list_lines(&absolute, given, 1) && !key.failed &&
                   slam_settings_set(s, name, as_given.at) && slam_settings_set(s, key.at, absolute.at);
    text_free(&as_given);
    text_free(&absolute);
    text_free(&key);
    return ok;
}

static int list_add_lines(slam_list *list, const char *lines) {
    for (const char *at = lines, *end; (end = strchr(at, '\n')) != NULL; at = end + 1) {
        text one = SLAM_ZERO;
        text_add_bytes(&one, at, (size_t)(end - at));
        const int ok = !one.failed && slam_list_add(list, one.at);
        text_free(&one);
        if (!ok) return 0;
    }
    return 1;
}

int slam_settings_recall_paths(const slam_settings *s, const char *name, slam_list *given, slam_list *paths) {
    text key = SLAM_ZERO, absolute = SLAM_ZERO;
    text_add(&key, "%s_absolute", name);
    const char *as_given = slam_settings_get(s, name), *stored = key.failed ? NULL : slam_settings_get(s, key.at);
    int ok = as_given && stored ? 1 : fail("trainer.json: does not say what '%s' of this run was", name);
    ok = ok && list_lines(&absolute, given, 1);
    if (ok && given->n && strcmp(absolute.at, stored))
        ok = fail("%s %.*s: the run that is resumed has %.*s", name, (int)strcspn(absolute.at, "\n"), absolute.at,
                  *stored ? (int)strcspn(stored, "\n") : 4, *stored ? stored : "none");
    if (ok && !given->n) ok = list_add_lines(given, as_given);
    ok = ok && list_add_lines(paths, stored);
    for (size_t i = 0; ok && i < paths->n && i < given->n; i++) {
        if (path_is_file(paths->at[i]) || strpbrk(paths->at[i], "*?[") || !path_is_file(given->at[i])) continue;
        free(paths->at[i]); // run and data have moved together
        ok = (paths->at[i] = text_copy(given->at[i])) != NULL;
    }
    text_free(&key);
    text_free(&absolute);
    return ok;
}

int slam_run_find(const char *name, const char *out, char **folder, char **checkpoint, slam_trainer *trainer) {
    memset(trainer, 0, sizeof *trainer);
    *checkpoint = NULL;
    *folder = out ? text_copy(out) : slam_run_newest(name);
    if (!*folder) return !out; // nothing to go on with yet
    if (!path_is_folder(*folder)) return 1;
    if (!slam_checkpoint_find(*folder, checkpoint)) return 0;
    char *note = path_join(*folder, "trainer.json");
    const int begun = *checkpoint || (note && path_is_file(note));
    free(note);
    return !begun || slam_trainer_read(trainer, *checkpoint ? *checkpoint : *folder);
}

/* ---- pre-training: a task over packed rows ---- */

struct slam_pretraining {
    slam_model *model;
    slam_rows *rows;
    const slam_data *val;
    const slam_list *val_names;
    int batch, micro, T;
    int first, end;                           // of the batch's rows those that this rank computes
    int *ints, *tokens, *targets, *doc_start; // (end - first,T) each
};

/* The next row, over the end of an epoch where it must: batches run on, rows do not. */
static int draw_row(slam_rows *rows, int *tokens, int *targets, int *doc_start, int *n_targets) {
    int n = slam_rows_next(rows, tokens, targets, doc_start, n_targets);
    if (n == 0) n = slam_rows_next(rows, tokens, targets, doc_start, n_targets);
    if (n == 0) return fail("an epoch of the data has no rows");
    return n > 0 ? n : 0;
}

/* All ranks pack all rows, for which lengths are enough; each reads the tokens of its own. */
static int pretraining_next(void *context, uint64_t *tokens, uint64_t *terms) {
    slam_pretraining *p = (slam_pretraining *)context;
    *tokens = *terms = 0;
    for (int b = 0; b < p->batch; b++) {
        const int own = b >= p->first && b < p->end;
        const size_t at = own ? (size_t)(b - p->first) * p->T : 0;
        int targets = 0;
        const int n = draw_row(p->rows, own ? p->tokens + at : NULL, p->targets + at, p->doc_start + at, &targets);
        if (!n) return 0;
        *tokens += (uint64_t)n;
        *terms += (uint64_t)targets;
    }
    return *terms > 0 ? 1 : fail("a batch of %d rows has no token to predict", p->batch);
}

static int pretraining_accumulate(void *context, uint64_t terms, slam_after_layer *after_layer, void *after) {
    slam_pretraining *p = (slam_pretraining *)context;
    for (int b = 0, all = p->end - p->first; b < all; b += p->micro) {
        const size_t at = (size_t)b * p->T;
        const int last = all - b <= p->micro;
        slam_batch batch;
        batch.B = last ? all - b : p->micro;
        batch.T = p->T;
        batch.tokens = p->tokens + at;
        batch.targets = p->targets + at;
        batch.doc_start = p->doc_start + at;
        batch.hole = NULL;
        if (!slam_model_backward(p->model, &batch, (float)(1.0 / (double)terms), last ? after_layer : NULL, after)) return 0;
    }
    return 1;
}

/* The mean over all sources' targets, which is not the mean of their means. */
static int pretraining_evaluate(void *context, double *losses) {
    slam_pretraining *p = (slam_pretraining *)context;
    double sum = 0, count = 0;
    for (int s = 0; s < slam_data_sources(p->val); s++) {
        uint64_t targets;
        if (!slam_score_data(p->model, p->val, s, p->micro, losses + 1 + s, &targets)) return 0;
        sum += losses[1 + s] * (double)targets;
        count += (double)targets;
    }
    if (count == 0) return fail("the validation data have no token to predict");
    losses[0] = slam_data_sources(p->val) == 1 ? losses[1] : sum / count;
    return 1;
}

static const char *pretraining_source(void *context, int source) { return ((slam_pretraining *)context)->val_names->at[source]; }
static void pretraining_tell(void *context, uint64_t *epoch, uint64_t *row) {
    slam_rows_tell(((slam_pretraining *)context)->rows, epoch, row);
}
static int pretraining_seek(void *context, uint64_t epoch, uint64_t row) {
    return slam_rows_seek(((slam_pretraining *)context)->rows, epoch, row);
}

slam_pretraining *slam_pretraining_new(slam_model *model, const slam_data *data, const slam_data *val, const slam_list *val_names,
                                       int context, int batch, int micro, int mode, uint64_t seed) {
    slam_pretraining *p = (slam_pretraining *)mem_new(1, sizeof *p);
    size_t first, end;
    if (!p) return NULL;
    slam_ranks_share(model->ops->ranks, (size_t)batch, &first, &end);
    const size_t n = (end - first) * (size_t)context;
    p->first = (int)first;
    p->end = (int)end;
    p->model = model;
    p->val = val;
    p->val_names = val_names;
    p->batch = batch;
    p->micro = micro;
    p->T = context;
    p->rows = slam_rows_new(data, -1, seed, 1);
    p->ints = p->rows ? (int *)mem_new(n, 3 * sizeof *p->ints) : NULL;
    if (!p->ints || !slam_model_plan(model, micro, context, mode)) {
        slam_pretraining_free(p);
        return NULL;
    }
    p->tokens = p->ints;
    p->targets = p->ints + n;
    p->doc_start = p->ints + 2 * n;
    return p;
}

void slam_pretraining_free(slam_pretraining *p) {
    if (!p) return;
    slam_rows_free(p->rows);
    free(p->ints);
    free(p);
}

slam_task slam_pretraining_task(slam_pretraining *p) {
    slam_task task;
    memset(&task, 0, sizeof task);
    task.context = p;
    task.next = pretraining_next;
    task.accumulate = pretraining_accumulate;
    task.evaluate = p->val ? pretraining_evaluate : NULL;
    task.sources = p->val ? slam_data_sources(p->val) : 0;
    task.source_name = pretraining_source;
    task.tell = pretraining_tell;
    task.seek = pretraining_seek;
    return task;
}

/* ---- preference optimisation: a task over pairs ---- */

static int dpo_next(void *context, uint64_t *tokens, uint64_t *pairs) { return slam_dpo_next((slam_dpo *)context, tokens, pairs); }
static int dpo_accumulate(void *context, uint64_t pairs, slam_after_layer *after_layer, void *after) {
    return slam_dpo_accumulate((slam_dpo *)context, pairs, after_layer, after);
}
static void dpo_tell(void *context, uint64_t *epoch, uint64_t *pair) { slam_dpo_tell((slam_dpo *)context, epoch, pair); }
static int dpo_seek(void *context, uint64_t epoch, uint64_t pair) { return slam_dpo_seek((slam_dpo *)context, epoch, pair); }

static int dpo_evaluate(void *context, double *losses) {
    if (!slam_dpo_evaluate((slam_dpo *)context)) return 0;
    losses[0] = losses[1] = slam_dpo_last((slam_dpo *)context, 1).loss;
    return 1;
}

static int dpo_figures(void *context, int evaluation, slam_figure *figures) {
    const slam_dpo_figures f = slam_dpo_last((slam_dpo *)context, evaluation);
    const slam_figure all[] = {
        {"margin", f.margin}, {"accuracy", f.accuracy}, {"logp_chosen", f.logp_chosen}, {"logp_rejected", f.logp_rejected}};
    memcpy(figures, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

slam_task slam_dpo_task(slam_dpo *d) {
    slam_task task;
    memset(&task, 0, sizeof task);
    task.context = d;
    task.next = dpo_next;
    task.accumulate = dpo_accumulate;
    task.evaluate = slam_dpo_validates(d) ? dpo_evaluate : NULL;
    task.sources = task.evaluate ? 1 : 0;
    task.figures = dpo_figures;
    task.tell = dpo_tell;
    task.seek = dpo_seek;
    return task;
}

/* ---- the whole stream of rows ---- */

/* Calls `use` with the rows of the shuffled stream until it returns 0. */
static int rows_each(const slam_data *data, int T, uint64_t seed, int (*use)(void *, const int *row, int tokens), void *context) {
    slam_rows *rows = slam_rows_new(data, -1, seed, 1);
    int *ints = rows ? (int *)mem_new((size_t)T, 3 * sizeof *ints) : NULL, n = ints != NULL, targets;
    while (n > 0 && (n = draw_row(rows, ints, ints + T, ints + 2 * T, &targets)) > 0 && use(context, ints, n)) {}
    free(ints);
    slam_rows_free(rows);
    return n > 0;
}

typedef struct token_count {
    uint64_t rows, tokens, enough;
    int batch;
} token_count;

static int count_tokens(void *context, const int *row, int tokens) {
    token_count *c = (token_count *)context;
    (void)row;
    c->rows++;
    c->tokens += (uint64_t)tokens;
    return !slam_signals_stop() && (c->tokens < c->enough || c->rows % (uint64_t)c->batch);
}

int slam_steps_for_tokens(const slam_data *data, int context, int batch, uint64_t seed, uint64_t tokens, long *steps) {
    token_count c = {0, 0, tokens, batch};
    if (!rows_each(data, context, seed, count_tokens, &c)) return 0;
    if (slam_signals_stop()) return fail("stopped before the first step"); // a part of the count is none
    *steps = (long)((c.rows + (uint64_t)batch - 1) / (uint64_t)batch);
    return 1;
}

typedef struct row_hash {
    uint64_t hash;
    int rows, T;
} row_hash;

static int hash_row(void *context, const int *row, int tokens) {
    row_hash *h = (row_hash *)context;
    (void)tokens;
    h->hash = hash_bytes(h->hash, row, (size_t)h->T * sizeof *row);
    return ++h->rows < 16;
}

int slam_data_hash(const slam_data *data, const slam_data_size *size, int context, uint64_t seed, uint64_t *hash) {
    const uint64_t numbers[] = {size->documents,
                                size->pieces,
                                size->tokens,
                                size->targets,
                                size->rows,
                                (uint64_t)context,
                                (uint64_t)slam_data_sources(data)};
    row_hash h = {hash_bytes(HASH_START, numbers, sizeof numbers), 0, context};
    if (!rows_each(data, context, seed, hash_row, &h)) return 0;
    *hash = h.hash;
    return 1;
}

/* ---- the log: one JSON object a line ---- */

static int log_keeps(const char *line, size_t n, long step) {
    json *root = json_parse(line, n, "log.jsonl");
    double at = -1;
    const int known = root && json_real(root, "step", "log.jsonl", 0, 1e15, &at);
    json_free(root);
    return known && at >= 0 && at <= (double)step;
}

/* Removes the lines past a step, and a last one that a kill has torn. */
static int log_cut(const char *path, long step) {
    file_map map;
    text kept = SLAM_ZERO;
    if (!path_is_file(path)) return 1;
    if (!map_open(&map, path)) return 0;
    const char *at = (const char *)map.data, *end = at + map.size;
    for (const char *next; at < end; at = next) {
        const char *newline = (const char *)memchr(at, '\n', (size_t)(end - at));
        if (!newline) break;
        next = newline + 1;
        if (log_keeps(at, (size_t)(newline - at), step)) text_add_bytes(&kept, at, (size_t)(next - at));
    }
    const int same = kept.n == map.size;
    map_close(&map);
    const int ok = !kept.failed && (same || file_write(path, kept.n ? kept.at : "", kept.n));
    text_free(&kept);
    return ok;
}

static void add_member(text *t, const char *name, double value) {
    text_add(t, ", \"%s\": ", name);
    text_add_number(t, value);
}

/* Writes a line (log NULL: another rank does) and hands it to the system, so that a kill takes none of it back; frees the text. */
static int log_line(FILE *log, const char *path, text *t) {
    text_add(t, "}\n");
    int ok = !t->failed;
    if (ok && log && (fwrite(t->at, 1, t->n, log) != t->n || fflush(log) != 0))
        ok = fail("%s: cannot be written: %s", path, strerror(errno));
    text_free(t);
    return ok;
}

/* ---- the machine's peak ---- */

/* FLOP/s of the model's largest product, gate and up of the MLP, as the forward pass calls it: the best of some calls; 0: no
   memory left for it. */
static double measure_peak(slam_ops *ops, const slam_config *c, int rows) {
    const int N = rows < 8192 ? rows : 8192, C = c->C, O = 2 * c->F, act = ops->bytes_per_act;
    const size_t nx = (size_t)N * C, nw = (size_t)O * C, n = nx > nw ? nx : nw;
    float *host = (float *)mem_new(n, sizeof *host), *numbers = (float *)ops->alloc(ops, n * sizeof *numbers);
    slam_act *x = (slam_act *)ops->alloc(ops, nx * act), *w = (slam_act *)ops->alloc(ops, nw * act),
             *out = (slam_act *)ops->alloc(ops, (size_t)N * O * act);
    double best = 0;
    if (host && numbers && x && w && out) {
        uint64_t state = 1; // products of zeros run faster than those of numbers
        for (size_t i = 0; i < n; i++) host[i] = (float)rng_uniform(&state) - 0.5f;
        ops->upload(ops, numbers, host, n * sizeof *numbers);
        ops->to_act(ops, x, numbers, nx);
        ops->to_act(ops, w, numbers, nw);
        ops->finish(ops);
        const double began = slam_clock();
        for (int i = 0; i < 4 || (i < 100 && slam_clock() - began < 0.03); i++) {
            const double start = slam_clock();
            ops->matmul_forward(ops, out, x, w, NULL, N, C, O);
            if (!ops->finish(ops)) break;
            const double speed = 2.0 * N * C * O / (slam_clock() - start);
            if (speed > best) best = speed;
        }
    }
    ops->release(ops, x);
    ops->release(ops, w);
    ops->release(ops, out);
    ops->release(ops, numbers);
    free(host);
    return best;
}

/* ---- what is shown ---- */

const char *slam_spell_count(char s[32], double n) {
    static const char unit[] = " kMBT";
    int u = 0;
    for (; u < 4 && n >= 999.5; u++) n /= 1000;
    if (u) snprintf(s, 32, n < 9.995 ? "%.2f%c" : n < 99.95 ? "%.1f%c" : "%.0f%c", n, unit[u]);
    else snprintf(s, 32, "%.0f", n);
    return s;
}

const char *slam_spell_time(char s[32], double seconds) {
    const unsigned t = seconds > 0 ? seconds < 4e9 ? (unsigned)(seconds + 0.5) : 4000000000u : 0;
    if (t < 3600) snprintf(s, 32, "%u:%02u", t / 60, t % 60);
    else snprintf(s, 32, "%u:%02u:%02u", t / 3600, t / 60 % 60, t % 60);
    return s;
}

typedef struct step_report {
    double loss, grad_norm, lr, tokens_per_second, peak_share, seconds_left;
    slam_figure figures[8];
    int n_figures;
} step_report;

static int task_figures(const slam_task *task, int evaluation, slam_figure figures[8]) {
    return task->figures ? task->figures(task->context, evaluation, figures) : 0;
}

static void show_figures(const slam_figure *figures, int n) {
    for (int i = 0; i < n && i < 2; i++) printf("  %s %.3f", figures[i].name, figures[i].value);
}

static void show_bar(slam_run *r, const step_report *s) {
    char rate[32], seen[32], peak[32] = "", what[160];
    if (s->peak_share > 0) snprintf(peak, sizeof peak, " %.0f%% peak", 100 * s->peak_share);
    slam_spell_count(rate, s->tokens_per_second);
    slam_spell_count(seen, (double)r->trainer.tokens);
    /* tokens seen where they fit into slam_progress_show's columns */
    if (snprintf(what, sizeof what, "%ld/%ld loss %.4f %s tok %s/s%s", r->trainer.step, r->trainer.steps, s->loss, seen, rate,
                 peak) > 50)
        snprintf(what, sizeof what, "%ld/%ld loss %.4f %s tok/s%s", r->trainer.step, r->trainer.steps, s->loss, rate, peak);
    slam_progress_show(&r->bar, (double)r->trainer.step, (double)r->trainer.steps, what);
}

static void show_line(const slam_run *r, const step_report *s) {
    char rate[32], seen[32], left[32];
    printf("step %ld/%ld  %s tokens  loss %.4f", r->trainer.step, r->trainer.steps,
           slam_spell_count(seen, (double)r->trainer.tokens), s->loss);
    show_figures(s->figures, s->n_figures);
    printf("  norm %.3f  lr %.2e  %s tok/s", s->grad_norm, s->lr, slam_spell_count(rate, s->tokens_per_second));
    if (s->peak_share > 0) printf("  %.0f%% of peak", 100 * s->peak_share);
    printf("  %s left\n", slam_spell_time(left, s->seconds_left));
    fflush(stdout);
}

/* ---- the training loop ---- */

static slam_ranks *run_ranks(const slam_run *r) { return r->ops->ranks; }
static int run_root(const slam_run *r) { return slam_ranks_root(run_ranks(r)); }

static double run_seconds(const slam_run *r) { return r->before + slam_clock() - r->began; }

static int run_due(const slam_run *r, long every) { return every > 0 && r->trainer.step % every == 0; }

/* Whether there is no time for another step: what it and the run's end take comes from those before. */
static int run_late(const slam_run *r, double slowest) {
    const double end = (r->task.evaluate && r->eval_every ? r->val_seconds : 0) + r->save_seconds;
    return r->max_seconds && run_seconds(r) + slowest + end >= r->max_seconds;
}

/* Whether the run is over, and why: of a limit and a signal at the same step the limit counts, after which nothing is left to
   go on with. Signals and clocks are a rank's own: what one of them says concerns all. */
static int run_over(slam_run *r, double slowest) {
    const slam_trainer *t = &r->trainer;
    if (t->step >= t->steps || (r->max_tokens && t->tokens >= r->max_tokens)) return 1;
    if (r->ended == SLAM_ENDED_LIMIT && slam_signals_stop()) r->ended = SLAM_ENDED_SIGNAL;
    if (r->ended == SLAM_ENDED_LIMIT && run_late(r, slowest)) r->ended = SLAM_ENDED_TIME;
    r->ended = (int)slam_ranks_max(run_ranks(r), r->ended);
    return r->ended != SLAM_ENDED_LIMIT;
}

static double learning_rate(const slam_run *r) {
    const long share = (long)ceil(r->warmup_share * (double)r->trainer.steps), warmup = r->warmup > share ? r->warmup : share;
    return slam_schedule(r->schedule, r->trainer.step, r->trainer.steps, warmup, r->lr, r->min_lr);
}

/* The next batch and one update; what the loop needs to know of it. While the device computes, the host takes the batch after
   it, unless this step is the last. One that cannot be had is asked for again when its turn comes, and then it is an error. */
static int run_step(slam_run *r, double lr, slam_step *step, uint64_t *tokens, double *loss) {
    const slam_task *task = &r->task;
    if (!r->ready && !task->next(task->context, &r->ready_tokens, &r->ready_terms)) return 0;
    const uint64_t terms = r->ready_terms;
    *tokens = r->ready_tokens;
    r->ready = 0;
    if (!task->accumulate(task->context, terms, slam_optimiser_after_layer, r->optimiser) ||
        !slam_optimiser_begin(r->optimiser, lr))
        return 0;
    task->tell(task->context, &r->epoch, &r->row);
    if (r->trainer.step + 1 != r->trainer.steps) {
        r->ready = task->next(task->context, &r->ready_tokens, &r->ready_terms);
        if (!r->ready && !task->seek(task->context, r->epoch, r->row)) return 0;
    }
    if (!slam_optimiser_end(r->optimiser, step)) return 0;
    *loss = step->loss_sum / (double)terms;
    return 1;
}

static int run_evaluate(slam_run *r, FILE *log, const char *path) {
    double *losses = (double *)mem_new((size_t)r->task.sources + 1, sizeof *losses);
    const double start = slam_clock();
    int ok = losses && r->task.evaluate(r->task.context, losses);
    if (ok) {
        slam_trainer *t = &r->trainer;
        text line = SLAM_ZERO;
        r->val_loss = losses[0];
        r->val_step = t->step;
        r->val_seconds = slam_clock() - start;
        if (isfinite(losses[0]) && (t->best_step == 0 || losses[0] < t->best_loss)) {
            t->best_loss = losses[0];
            t->best_step = t->step;
        }
        slam_figure figures[8];
        const int n_figures = task_figures(&r->task, 1, figures);
        text_add(&line, "{\"step\": %ld", t->step);
        add_member(&line, "val_loss", losses[0]);
        for (int i = 0; i < n_figures; i++) {
            text_add(&line, ", \"val_%s\": ", figures[i].name);
            text_add_number(&line, figures[i].value);
        }
        if (r->task.sources > 1) text_add(&line, ", \"val_loss_by_source\": {");
        for (int s = 0; r->task.sources > 1 && s < r->task.sources; s++) {
            if (s) text_add(&line, ", ");
            text_add_json(&line, r->task.source_name(r->task.context, s));
            text_add(&line, ": ");
            text_add_number(&line, losses[1 + s]);
        }
        if (r->task.sources > 1) text_add(&line, "}");
        ok = log_line(log, path, &line);
        slam_progress_clear(&r->bar);
        printf("step %ld/%ld  val_loss %.4f", t->step, t->steps, losses[0]);
        show_figures(figures, n_figures);
        for (int s = 0; r->task.sources > 1 && s < r->task.sources; s++)
            printf("%s %s %.4f", s ? "," : " :", path_name(r->task.source_name(r->task.context, s)), losses[1 + s]);
        printf("\n");
        fflush(stdout);
    }
    free(losses);
    return ok;
}

/* The log is on the disk before the checkpoint is, so that no line is missing of what a checkpoint has seen. */
static int run_save(slam_run *r, FILE *log, const char *path) {
    slam_trainer *t = &r->trainer;
    const double start = slam_clock();
    if (log && fsync(fileno(log)) != 0) return fail("%s: cannot be written: %s", path, strerror(errno));
    t->epoch = r->epoch;
    t->row = r->row;
    t->seconds = run_seconds(r);
    if (!slam_checkpoint_save(r->folder, r->model, r->optimiser, t, r->format, r->keep)) return 0;
    r->saved_step = t->step;
    r->save_seconds = slam_clock() - start;
    return 1;
}

static int log_step(const slam_run *r, FILE *log, const char *path, const step_report *s) {
    text t = SLAM_ZERO;
    text_add(&t, "{\"step\": %ld, \"tokens\": %llu", r->trainer.step, (unsigned long long)r->trainer.tokens);
    add_member(&t, "loss", s->loss);
    add_member(&t, "grad_norm", s->grad_norm);
    add_member(&t, "lr", s->lr);
    if (r->trainer.skipped) text_add(&t, ", \"skipped\": %ld", r->trainer.skipped);
    for (int i = 0; i < s->n_figures; i++) add_member(&t, s->figures[i].name, s->figures[i].value);
    add_member(&t, "seconds", run_seconds(r));
    add_member(&t, "tokens_per_second", s->tokens_per_second);
    add_member(&t, "peak_share", s->peak_share);
    return log_line(log, path, &t);
}

/* What the steps of one call leave for the next ones. */
typedef struct run_pace {
    long first;         /* step that this call began with */
    double start;       /* clock */
    double peak, flops; /* FLOP/s of the machine, 0: not measured yet; FLOP a token */
    double slowest;     /* seconds of a step */
    int in_a_row;       /* updates that were left out since the last that was not */
} run_pace;

/* A step whose loss or gradient is not finite leaves the weights as they were. */
static int step_left_out(slam_run *r, run_pace *p, double loss, double grad_norm) {
    slam_trainer *t = &r->trainer;
    t->skipped++;
    slam_progress_clear(&r->bar);
    printf("step %ld/%ld  the loss (%g) or the gradient's norm (%g) is not finite: this update is left out, %ld so far\n",
           t->step + 1, t->steps, loss, grad_norm, t->skipped);
    fflush(stdout);
    if (++p->in_a_row < 20) return 1;
    fail("loss or gradient norm was not finite 20 times in a row after step %ld%s", t->step,
         r->saved_step ? "; the last checkpoint is intact" : "");
    return slam_ranks_agree(run_ranks(r), 0); // all have come to it
}

/* On a terminal the bar, and lines as well where they were asked for; elsewhere lines. */
static void show_step(slam_run *r, const step_report *s, int last) {
    const int bar = r->bar.terminal;
    if (bar ? r->lines && run_due(r, r->log_every) : r->trainer.step == 1 || last || run_due(r, r->log_every)) {
        slam_progress_clear(&r->bar);
        show_line(r, s);
    }
    if (bar) show_bar(r, s);
}

/* One update, its line in the log and what is shown of it. */
static int run_update(slam_run *r, FILE *log, const char *path, run_pace *p) {
    slam_trainer *t = &r->trainer;
    const double began = slam_clock();
    step_report s = SLAM_ZERO;
    slam_step step;
    uint64_t tokens;
    s.lr = learning_rate(r);
    if (!run_step(r, s.lr, &step, &tokens, &s.loss)) return 0;
    const double seconds = slam_clock() - began;
    t->tokens += tokens;
    if (step.skipped) return step_left_out(r, p, s.loss, step.grad_norm);
    p->in_a_row = 0;
    t->step++;
    p->slowest = seconds > p->slowest ? seconds : p->slowest;
    if (p->peak == 0)
        p->peak = slam_ranks_count(run_ranks(r)) * measure_peak(r->ops, slam_model_config(r->model), r->micro * r->context);
    s.n_figures = task_figures(&r->task, 0, s.figures);
    s.grad_norm = step.grad_norm;
    s.tokens_per_second = (double)tokens / seconds;
    s.peak_share = p->peak > 0 ? p->flops * s.tokens_per_second / p->peak : 0;
    s.seconds_left = (slam_clock() - p->start) / (double)(t->step - p->first) * (double)(t->steps - t->step);
    if (r->max_seconds && s.seconds_left > r->max_seconds - run_seconds(r)) s.seconds_left = r->max_seconds - run_seconds(r);
    if (!log_step(r, log, path, &s)) return 0;
    show_step(r, &s, run_over(r, p->slowest));
    return 1;
}

/* Steps until the run ends; leaves why in r->ended. The last step is evaluated, then saved, and so is what is best. What a
   signal cuts short is evaluated where it goes on, so that the log is the one of a run that was not. */
static int run_loop(slam_run *r, FILE *log, const char *path) {
    const slam_trainer *t = &r->trainer;
    run_pace p = SLAM_ZERO;
    p.first = t->step;
    p.start = slam_clock();
    p.flops = slam_config_flops(slam_model_config(r->model), r->context);
    for (int over = run_over(r, 0); !over;) {
        const long before = t->step;
        if (!run_update(r, log, path, &p)) return 0;
        over = run_over(r, p.slowest);
        const int last = over && r->ended != SLAM_ENDED_SIGNAL, stepped = t->step > before;
        if (r->task.evaluate && r->eval_every && r->val_step != t->step && (last || (stepped && run_due(r, r->eval_every))) &&
            !run_evaluate(r, log, path))
            return 0;
        over = over || run_over(r, p.slowest); // a signal may have come meanwhile
        if (r->saved_step < t->step && (over || run_due(r, r->save_every) || t->best_step == t->step) && !run_save(r, log, path))
            return 0;
    }
    return 1;
}

int slam_run_train(slam_run *r) {
    char *path = path_join(r->folder, "log.jsonl");
    FILE *log = path && run_root(r) ? fopen(path, "ab") : NULL;
    if (path && run_root(r) && !log) fail("%s: cannot be written: %s", path, strerror(errno));
    r->saved_step = r->trainer.step;
    r->ended = SLAM_ENDED_LIMIT;
    slam_progress_begin(&r->bar);
    slam_progress_show(&r->bar, (double)r->trainer.step, (double)r->trainer.steps, ""); // nothing yet, but what is done already
    int ok = slam_ranks_agree(run_ranks(r), log || (path && !run_root(r))) && run_loop(r, log, path);
    slam_progress_clear(&r->bar);
    if (log && fclose(log) != 0 && ok) ok = fail("%s: cannot be written: %s", path, strerror(errno));
    free(path);
    return ok;
}

/* Two processes in one folder would write over each other. The lock goes with the process, however it ends. */
static int lock_folder(slam_run *r) {
    if (!make_folders(r->folder)) return 0;
    const int fd = open(r->folder, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail("%s: %s", r->folder, strerror(errno));
    r->lock = fd;
    if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return fail("%s: another process is at work on this run", r->folder);
    return 1; // a file system without locks does without
}

/* The folder is this process's from here on, and as its newest checkpoint left it. */
static int take_folder(slam_run *r, const char *checkpoint) {
    char *newest = NULL;
    int ok = lock_folder(r) && slam_checkpoint_find(r->folder, &newest);
    /* the checkpoint was looked for before the lock was ours */
    if (ok && (checkpoint ? !newest || strcmp(newest, checkpoint) : newest != NULL))
        ok = fail("%s: another process has trained here meanwhile", r->folder);
    free(newest);
    return ok && slam_checkpoint_mend(r->folder);
}

int slam_run_begin(slam_run *r, const char *checkpoint) {
    slam_trainer *t = &r->trainer;
    const int first = run_root(r);
    char *log = path_join(r->folder, "log.jsonl");
    if (r->optimiser) slam_optimiser_reset(r->optimiser);
    else r->optimiser = slam_optimiser_new(r->model, &r->adamw);
    int ok = slam_ranks_agree(run_ranks(r), log && r->optimiser && (!first || take_folder(r, checkpoint)));
    ok = ok && (!checkpoint || slam_optimiser_load(r->optimiser, checkpoint));
    if (ok && checkpoint && slam_optimiser_updates(r->optimiser) != t->step)
        ok = fail("%s: optimizer.safetensors is of step %ld, trainer.json of step %ld", checkpoint,
                  slam_optimiser_updates(r->optimiser), t->step);
    r->before = t->seconds;
    r->ready = 0; // slam_run_time may have taken one
    ok = ok && r->task.seek(r->task.context, t->epoch, t->row) &&
         (!first || (log_cut(log, t->step) && trainer_write(t, checkpoint ? checkpoint : r->folder) && folder_sync(r->folder)));
    free(log);
    return slam_ranks_agree(run_ranks(r), ok);
}

/* Seconds a step takes. With learning rate 0 the weights stay as they are, and the optimiser is set back: what follows is the run
   that its number of steps alone would have given. The first step is slower than the rest and not counted. 2: stopped. */
static int time_steps(slam_run *r, double *seconds) {
    slam_step step;
    uint64_t tokens;
    double loss, start = slam_clock();
    const double some = 0.02 * r->max_seconds, enough = some > 20  ? 20
                                                        : some < 1 ? 0.1 * r->max_seconds < 1 ? 0.1 * r->max_seconds : 1
                                                                   : some;
    int n = 0;
    r->optimiser = slam_optimiser_new(r->model, &r->adamw);
    if (!r->optimiser) return 0;
    for (; slam_ranks_max(run_ranks(r), n < 4 || (n < 1000 && slam_clock() - start < enough)); n++) {
        if (n == 1) start = slam_clock();
        if (!run_step(r, 0, &step, &tokens, &loss)) return 0;
        if (slam_ranks_max(run_ranks(r), slam_signals_stop())) return 2;
    }
    *seconds = (slam_clock() - start) / (n > 1 ? n - 1 : 1);
    return 1;
}

int slam_run_time(slam_run *r) {
    slam_trainer *t = &r->trainer;
    double step, evaluation = 0;
    int ok = time_steps(r, &step);
    if (ok == 1 && r->task.evaluate && r->eval_every) {
        const double start = slam_clock();
        double *losses = (double *)mem_new((size_t)r->task.sources + 1, sizeof *losses);
        ok = losses && r->task.evaluate(r->task.context, losses);
        evaluation = r->val_seconds = slam_clock() - start;
        free(losses);
    }
    if (ok != 1) return ok;
    /* weights and two moments, written at the 300 MB/s of a plain disk */
    const double save = r->save_seconds = 12.0 * (double)slam_config_parameters(slam_model_config(r->model)) / 300e6;
    /* every evaluation may find the lowest loss so far, which is saved */
    const long best_every = r->task.evaluate ? r->eval_every : 0,
               saves = best_every && (!r->save_every || best_every < r->save_every) ? best_every : r->save_every;
    const double all = step + (r->eval_every ? evaluation / (double)r->eval_every : 0) + (saves ? save / (double)saves : 0);
    const double left = 0.97 * (r->max_seconds - t->seconds - (slam_clock() - r->began)) - evaluation - save;
    const long fit = t->step - slam_ranks_max(run_ranks(r), left > all ? -(long)(left / all) : -1); // the fewest of all ranks
    if (!t->steps || fit < t->steps) t->steps = fit;
    char spelled[32];
    if (t->steps < r->min_steps)
        return fail("--time %s: makes %ld steps, the run that is resumed has %ld, and a limit may only grow",
                    slam_spell_time(spelled, r->max_seconds), t->steps, r->min_steps);
    printf("time     %s: %.4g s a step make %ld steps\n", slam_spell_time(spelled, r->max_seconds), step, t->steps);
    return 1;
}

void slam_run_end(slam_run *r) {
    slam_optimiser_free(r->optimiser);
    r->optimiser = NULL;
    slam_trainer_free(&r->trainer);
    if (r->lock > 0) close(r->lock);
    r->lock = 0;
}

/* ---- flags ---- */

static slam_flag *flag_find(const slam_flags *f, const char *name, size_t n) {
    for (int i = 0; i < f->n; i++)
        if (f->at[i].name && strlen(f->at[i].name) == n && !strncmp(f->at[i].name, name, n)) return &f->at[i];
    return NULL;
}

static void list_clear(slam_list *list) {
    for (size_t i = 0; i < list->n; i++) free(list->at[i]);
    list->n = 0;
}

static int flag_number(slam_flag *f, const char *value) {
    char *end;
    errno = 0;
    const double x = strtod(value, &end);
    if (end == value || *end || !isfinite(x)) return fail("--%s %s: expected a number", f->name, value);
    if ((f->type == SLAM_INT || f->type == SLAM_LONG) &&
        (x != floor(x) || fabs(x) > (f->type == SLAM_INT ? (double)INT_MAX : 9e15)))
        return fail("--%s %s: expected a whole number", f->name, value);
    if ((f->min != 0 || f->max != 0) && (x < f->min || x > f->max))
        return fail("--%s %s: expected %.10g to %.10g", f->name, value, f->min, f->max);
    if (f->type == SLAM_INT) *(int *)f->to = (int)x;
    else if (f->type == SLAM_LONG) *(long *)f->to = (long)x;
    else *(double *)f->to = x;
    return 1;
}

static int flag_time(slam_flag *f, const char *value) {
    double total = 0;
    int parts = 0;
    for (const char *at = value; parts < 3; parts++) {
        char *end;
        if (!isdigit((unsigned char)*at)) break;
        const double x = strtod(at, &end);
        total = 60 * total + x;
        if (!*end) {
            *(double *)f->to = total;
            if (total == 0) return fail("--%s %s: expected some time", f->name, value);
            return total < 1e9 ? 1 : fail("--%s %s: expected less than 30 years", f->name, value);
        }
        if (*end != ':') break;
        at = end + 1;
    }
    return fail("--%s %s: expected a time as HH:MM:SS, MM:SS or seconds", f->name, value);
}

/* One of the words of a|b|c */
static int flag_is_choice(const char *words, const char *value) {
    const size_t n = strlen(value);
    for (const char *at = words; *at;) {
        const size_t length = strcspn(at, "|");
        if (length == n && !strncmp(at, value, n)) return 1;
        at += length + (at[length] == '|');
    }
    return 0;
}

/* --rate 30: expected 25 or 50 */
static int flag_choices(const slam_flag *f, const char *value) {
    text t = SLAM_ZERO;
    for (const char *at = f->argument; *at;) {
        const size_t n = strcspn(at, "|");
        const int last = !at[n] || !strchr(at + n + 1, '|');
        text_add_bytes(&t, at, n);
        if (at[n]) text_add(&t, "%s", last ? " or " : ", ");
        at += n + (at[n] == '|');
    }
    fail("--%s %s: expected %s", f->name, value, t.failed ? f->argument : t.at);
    text_free(&t);
    return 0;
}

static int flag_value(slam_flag *f, const char *value) {
    f->set = 1;
    if (f->type == SLAM_SWITCH) *(int *)f->to = strcmp(value, "0") != 0;
    else if (f->type == SLAM_LIST) return slam_list_add((slam_list *)f->to, value);
    else if (f->type == SLAM_TIME) return flag_time(f, value);
    else if (f->type == SLAM_TEXT || f->type == SLAM_CHOICE) {
        if (f->type == SLAM_CHOICE && !flag_is_choice(f->argument, value)) return flag_choices(f, value);
        char *copy = text_copy(value);
        if (!copy) return 0;
        free(*(char **)f->to);
        *(char **)f->to = copy;
    } else return flag_number(f, value);
    return 1;
}

/* Words in lines of up to 79 columns, of which `column` are taken already or go to the margin. */
static void print_wrapped(const char *words, int column, int margin) {
    while (*words) {
        int n = (int)strcspn(words, " ");
        if (column > margin && column + 1 + n > 79) {
            printf("\n%*s", margin, "");
            column = margin;
        } else if (column > margin) column += printf(" ");
        column += printf("%.*s", n, words);
        words += n + (words[n] == ' ');
    }
    printf("\n");
}

static void flag_help(const slam_flag *f) {
    enum { MARGIN = 26 };
    text words = SLAM_ZERO;
    text_add(&words, "%s", f->help);
    if (f->fallback) text_add(&words, " [%s]", f->fallback);
    int column = printf("  --%s%s%s", f->name, f->argument ? " " : "", f->argument ? f->argument : "");
    if (column > MARGIN - 2) {
        printf("\n");
        column = 0;
    }
    printf("%*s", MARGIN - column, "");
    if (!words.failed) print_wrapped(words.at, MARGIN, MARGIN);
    text_free(&words);
}

static void flags_help(const slam_flags *f) {
    printf("usage: ./%s %s\n\n", f->program, f->usage);
    print_wrapped(f->about, 0, 0);
    for (int i = 0; i < f->n; i++)
        if (f->at[i].name) flag_help(&f->at[i]);
        else printf("\n%s\n", f->at[i].help);
    printf("\nHelp\n  --help, -h              this text; the value without a flag stands in brackets\n  --version\n");
}

void slam_flags_usage(const slam_flags *f) {
    fprintf(stderr, "%s: error: %s\nusage: ./%s %s\n./%s --help lists all flags\n", f->program, slam_error(), f->program, f->usage,
            f->program);
}

/* How many letters must be changed, added or left out to turn the n of a into b (Levenshtein 1966); 99 where one is over 40. */
static int edits(const char *a, size_t n, const char *b) {
    int row[41];
    const size_t m = strlen(b);
    if (m > 40 || n > 40) return 99;
    for (size_t j = 0; j <= m; j++) row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            const int above = row[j], kept = diagonal + (a[i - 1] != b[j - 1]),
                      changed = 1 + (above < row[j - 1] ? above : row[j - 1]);
            row[j] = kept < changed ? kept : changed;
            diagonal = above;
        }
    }
    return row[m];
}

static int flag_unknown(const slam_flags *f, const char *spelled, const char *name, size_t n) {
    const char *nearest = NULL;
    int least = 3;
    for (int i = 0; n > 1 && i < f->n; i++) {
        const char *other = f->at[i].name;
        if (!other) continue;
        const int begins = n < strlen(other) && !strncmp(other, name, n), distance = begins ? 1 : edits(name, n, other);
        if (distance < least) {
            least = distance;
            nearest = other;
        }
    }
    if (nearest) return fail("%s: there is no such flag; --%s?", spelled, nearest);
    return fail("%s: there is no such flag", spelled);
}

/* A file opened where stdin, stdout or stderr was closed would get their number, and what is printed would go into it. */
static void open_standard(void) {
    int fd;
    do fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd > STDERR_FILENO) close(fd);
}

int slam_flags_parse(slam_flags *f, int argc, char **argv) {
    int only_rest = 0;
    open_standard();
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        if (!strcmp(a, "--") && !only_rest) {
            only_rest = 1;
            continue;
        }
        if (a[0] != '-' || !a[1] || only_rest) {
            if (!slam_list_add(&f->rest, a)) return 0;
            continue;
        }
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
            flags_help(f);
            return 2;
        }
        if (!strcmp(a, "--version")) {
            printf("%s (slam) %s\n", f->program, SLAM_VERSION);
            return 2;
        }
        if (!strcmp(a, "-o")) a = "--out";
        const size_t n = a[1] == '-' ? strcspn(a + 2, "=") : 0;
        slam_flag *flag = n ? flag_find(f, a + 2, n) : NULL;
        if (!flag) return flag_unknown(f, a, a + 2, n);
        if (flag->type == SLAM_SWITCH && a[2 + n] == '=') return fail("--%s: takes no value", flag->name);
        const char *value = a[2 + n] == '=' ? a + 3 + n : flag->type == SLAM_SWITCH ? "1" : ++i < argc ? argv[i] : NULL;
        if (!value) return fail("--%s: its value is missing (%s)", flag->name, flag->argument);
        flag->given++;
        if (!flag_value(flag, value)) return 0;
    }
    return 1;
}

int slam_flags_defaults(slam_flags *f, int column) {
    for (int i = 0; i < f->n; i++) {
        slam_flag *a = &f->at[i];
        if (!a->name || a->set || !a->fallback) continue;
        const char *bar = strstr(a->fallback, " | "), *from = column && bar ? bar + 3 : a->fallback;
        char value[64];
        snprintf(value, sizeof value, "%.*s", (int)(bar && !column ? bar - from : (long)strlen(from)), from);
        if (strcmp(value, "-") && !flag_value(a, value)) return 0;
    }
    return 1;
}

void slam_flags_free(slam_flags *f) {
    for (int i = 0; i < f->n; i++) {
        slam_flag *a = &f->at[i];
        if (a->name && (a->type == SLAM_TEXT || a->type == SLAM_CHOICE)) {
            free(*(char **)a->to);
            *(char **)a->to = NULL;
        } else if (a->name && a->type == SLAM_LIST) slam_list_free((slam_list *)a->to);
    }
    slam_list_free(&f->rest);
}

int slam_flags_given(const slam_flags *f, const char *name) {
    const slam_flag *a = flag_find(f, name, strlen(name));
    return a ? a->given : 0;
}

int slam_flags_set(slam_flags *f, const char *name, const char *value) {
    slam_flag *a = flag_find(f, name, strlen(name));
    if (!a) return fail("--%s: there is no such flag", name);
    if (a->type != SLAM_LIST) return flag_value(a, value);
    list_clear((slam_list *)a->to);
    for (const char *item = value, *end; (end = strchr(item, '\n')) != NULL; item = end + 1) {
        text one = SLAM_ZERO;
        text_add_bytes(&one, item, (size_t)(end - item));
        const int ok = !one.failed && flag_value(a, one.at);
        text_free(&one);
        if (!ok) return 0;
    }
    return 1;
}

char *slam_flags_text(const slam_flags *f, const char *name) {
    const slam_flag *a = flag_find(f, name, strlen(name));
    text t = SLAM_ZERO;
    if (!a) {
        fail("--%s: there is no such flag", name);
        return NULL;
    }
    text_add_bytes(&t, "", 0);
    if (a->type == SLAM_SWITCH || a->type == SLAM_INT) text_add(&t, "%d", *(int *)a->to);
    else if (a->type == SLAM_LONG) text_add(&t, "%ld", *(long *)a->to);
    else if (a->type == SLAM_REAL || a->type == SLAM_TIME) text_add_number(&t, *(double *)a->to);
    else if (a->type != SLAM_LIST) text_add(&t, "%s", *(char **)a->to ? *(char **)a->to : "");
    else
        for (size_t i = 0; i < ((slam_list *)a->to)->n; i++) text_add(&t, "%s\n", ((slam_list *)a->to)->at[i]);
    if (t.failed) text_free(&t);
    return t.at;
}

/* ---- a call of a program that trains ---- */

static int job_flags_table(slam_flag *f, slam_options *o) {
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Optimiser", 0, 0, 0, 0},
        {"batch", SLAM_INT, &o->batch, "N", NULL, NULL, 1, 1 << 20, 0, 0},
        {"micro-batch", SLAM_TEXT, &o->micro, "N|auto", "auto", "rows that the device holds at once", 0, 0, 0, 0},
        {"recompute", SLAM_SWITCH, &o->recompute, NULL, NULL,
         "compute norms and SwiGLU again instead of keeping them: up to a third less for activations", 0, 0, 0, 0},
        {"lr", SLAM_REAL, &o->lr, "X", NULL, "peak learning rate", 0, 1e30, 0, 0},
        {"min-lr", SLAM_REAL, &o->min_lr, "X", NULL, "where cosine ends (lr / 20)", 0, 1e30, 0, 0},
        {"warmup", SLAM_TEXT, &o->warmup, "N|P%", NULL, "steps until the peak, or their share of all", 0, 0, 0, 0},
        {"schedule", SLAM_CHOICE, &o->schedule, "cosine|inverse-sqrt|linear|constant", NULL, "after the warm-up", 0, 0, 0, 0},
        {"beta1", SLAM_REAL, &o->beta1, "X", "0.9", "of AdamW", 0, 0.999999, 0, 0},
        {"beta2", SLAM_REAL, &o->beta2, "X", "0.999", "of AdamW", 0, 0.999999999, 0, 0},
        {"eps", SLAM_REAL, &o->eps, "X", "1e-8", "of AdamW", 1e-30, 1, 0, 0},
        {"weight-decay", SLAM_REAL, &o->weight_decay, "X", "0", "of AdamW", 0, 100, 0, 0},
        {"clip", SLAM_REAL, &o->clip, "X", "0.5", "largest norm of the gradient; 0: any", 0, 1e9, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Run", 0, 0, 0, 0},
        {"out", SLAM_TEXT, &o->out, "DIR", NULL, NULL, 0, 0, 0, 0},
        {"resume", SLAM_SWITCH, &o->resume, NULL, NULL, "go on with --out, or with the newest run; limits may grow", 0, 0, 0, 0},
        {"eval-every", SLAM_LONG, &o->eval_every, "N", "500", "steps between evaluations; 0: never", 0, 1e12, 0, 0},
        {"save-every", SLAM_LONG, &o->save_every, "N", "500", "steps between checkpoints; 0: only the last and the best", 0, 1e12,
         0, 0},
        {"keep", SLAM_INT, &o->keep, "N", "3", "newest checkpoints that stay, beside the best; 0: all", 0, 1 << 30, 0, 0},
        {"log-every", SLAM_LONG, &o->log_every, "N", "10", "steps between lines; on a terminal a bar, lines where this is given", 0,
         1e12, 0, 0},
        {"format", SLAM_CHOICE, &o->format, "hf|slamkit", "hf", "names in the checkpoints", 0, 0, 0, 0},
        {"device", SLAM_TEXT, &o->device, "NAME", "auto", "auto, cpu, cuda or cuda:N", 0, 0, 0, 0},
        {"dtype", SLAM_CHOICE, &o->dtype, "auto|f32|bf16", "auto", "f32 on the CPU, bf16 on CUDA", 0, 0, 0, 0},
        {"threads", SLAM_INT, &o->threads, "N", "0", "of the CPU; 0: one a core", 0, 4096, 0, 0},
        {"seed", SLAM_LONG, &o->seed, "N", "0", NULL, 0, 9e15, 0, 0},
        {"dry-run", SLAM_SWITCH, &o->dry_run, NULL, NULL, "print the plan, train nothing", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Several ranks: mpirun -np N or srun starts them", 0, 0, 0, 0},
        {"zero", SLAM_CHOICE, &o->zero, "0|1", "1", "1: each keeps a part of the optimiser's state (ZeRO-1); 0: all of it", 0, 0, 0,
         0},
        {"ranks", SLAM_INT, &o->ranks, "N", NULL, "of --dry-run: plan for so many", 1, 1 << 20, 0, 0},
        {"flops", SLAM_REAL, &o->flops, "X", NULL, "of --dry-run: FLOP/s of a rank", 1, 1e18, 0, 0},
        {"bandwidth", SLAM_REAL, &o->bandwidth, "X", NULL, "of --dry-run: bytes a second that a rank sends", 1, 1e15, 0, 0},
    };
    const int n = (int)(sizeof table / sizeof *table);
    for (int i = 0; i < n; i++) f[i] = table[i];
    return n;
}

void slam_job_flags(slam_job *j, const slam_flag *own, int n, const char *const presets[][3], int n_presets) {
    for (int i = 0; i < n; i++) j->table[i] = own[i];
    j->flags.at = j->table;
    j->flags.n = n + job_flags_table(j->table + n, &j->o);
    j->o.min_lr = -1;
    for (int i = 0; i < n_presets; i++) {
        slam_flag *f = flag_find(&j->flags, presets[i][0], strlen(presets[i][0]));
        if (f && presets[i][1]) f->fallback = presets[i][1];
        if (f && presets[i][2]) f->help = presets[i][2];
    }
}

/* N, P% or max(N, P%) */
static int read_warmup(slam_run *r, const char *spelled) {
    char *end;
    const int both = !strncmp(spelled, "max(", 4);
    double n = strtod(spelled + (both ? 4 : 0), &end), share = 0;
    if (both && *end == ',') {
        share = strtod(end + 1, &end);
        if (strcmp(end, "%)")) end = NULL;
    } else if (!strcmp(end, "%")) {
        share = n;
        n = 0;
    } else if (*end) end = NULL;
    if (!end || end == spelled || n < 0 || n != floor(n) || n > 1e12 || !(share >= 0 && share <= 100))
        return fail("--warmup %s: expected steps (100), a share of all (1%%) or the larger of both, max(100, 1%%)", spelled);
    r->warmup = (long)n;
    r->warmup_share = share / 100;
    return 1;
}

/* rows; 0: auto */
static int read_micro(const char *spelled, int *micro) {
    char *end;
    const long n = strtol(spelled, &end, 10);
    *micro = 0;
    if (!strcmp(spelled, "auto")) return 1;
    if (*end || n < 1 || n > 1 << 20) return fail("--micro-batch %s: expected a number of rows, or auto", spelled);
    *micro = (int)n;
    return 1;
}

int slam_job_check(slam_job *j) {
    const slam_options *o = &j->o;
    int micro;
    if (o->val.n && o->val_fraction > 0) return fail("--val and --val-fraction: validation data are given or held out, not both");
    if (o->ranks && !o->dry_run)
        return fail("--ranks %d: is for --dry-run; mpirun -np %d ./%s trains on so many", o->ranks, o->ranks, j->program);
    return (!o->warmup || read_warmup(&j->run, o->warmup)) && (!o->micro || read_micro(o->micro, &micro)) &&
           (!o->device || slam_device_check(o->device));
}

int slam_job_absolute(slam_job *j, const char *flag) {
    char *path = slam_flags_text(&j->flags, flag), *whole = path && *path ? slam_path_absolute(path) : NULL;
    const int ok = path && (!*path || (whole && slam_flags_set(&j->flags, flag, whole)));
    free(path);
    free(whole);
    return ok;
}

int slam_job_recall(slam_job *j) {
    slam_options *o = &j->o;
    slam_trainer *t = &j->run.trainer;
    if (o->out && !o->resume && !o->dry_run && !slam_run_claim(o->out)) return 0;
    if (o->resume && !slam_run_find(j->program, o->out, &j->folder, &j->checkpoint, t)) return 0;
    j->fresh = t->steps == 0;
    return j->fresh || (slam_settings_recall(&t->settings, &j->flags, j->not_kept, j->may_change, j->may_grow) &&
                        slam_settings_recall_paths(&t->settings, j->key, &j->flags.rest, &j->data) &&
                        slam_settings_recall_paths(&t->settings, "val", &o->val, &j->val));
}

static double limit_value(const slam_flag *f) { return f->type == SLAM_LONG ? (double)*(long *)f->to : *(double *)f->to; }
static int is_limit(const slam_job *j, const slam_flag *f) { return f->name && among(j->may_grow, f->name); }

int slam_job_defaults(slam_job *j) {
    slam_options *o = &j->o;
    for (int i = 0; i < j->flags.n; i++)
        j->any_limit = j->any_limit || (is_limit(j, &j->table[i]) && limit_value(&j->table[i]) > 0);
    for (int i = 0; i < j->flags.n; i++)
        if (is_limit(j, &j->table[i]) && (j->any_limit || !j->fresh)) j->table[i].fallback = NULL;
    if (!slam_flags_defaults(&j->flags, j->flags.rest.n == 0)) return 0;
    if (o->min_lr >= 0) return 1;
    char spelled[32];
    snprintf(spelled, sizeof spelled, "%.15g", o->lr / 20);
    return slam_flags_set(&j->flags, "min-lr", spelled);
}

static int add_beside(slam_list *list, const char *argv0, const char *name) {
    char *path = slam_path_beside(argv0, name);
    const int ok = path && slam_list_add(list, path);
    free(path);
    return ok;
}

int slam_job_name_data(slam_job *j, const char *argv0, const char *bundled, const char *bundled_val) {
    slam_options *o = &j->o;
    for (size_t i = 0; j->fresh && i < j->flags.rest.n; i++)
        if (!slam_list_add(&j->data, j->flags.rest.at[i])) return 0;
    for (size_t i = 0; j->fresh && i < o->val.n; i++)
        if (!slam_list_add(&j->val, o->val.at[i])) return 0;
    j->is_bundled = j->data.n == 0;
    return !j->is_bundled ||
           (add_beside(&j->data, argv0, bundled) && (j->val.n || o->val_fraction > 0 || add_beside(&j->val, argv0, bundled_val)));
}

slam_ops *slam_job_device(slam_job *j, char note[256]) {
    const slam_options *o = &j->o;
    const int planned = o->dry_run && !strcmp(o->dtype, "bf16") && strncmp(o->device, "cuda", 4);
    slam_ops *ops =
        slam_run_device(j->ranks, &j->run.trainer.settings, &j->flags, o->device, planned ? "auto" : o->dtype, o->threads, note);
    if (ops && planned) ops->bytes_per_act = 2; // nothing is computed with it
    return ops;
}

int slam_job_mode(const slam_job *j) { return j->o.recompute ? SLAM_TRAIN_RECOMPUTE : SLAM_TRAIN; }

/* How many ranks there are, or are planned; and in how many parts the optimiser's state is divided. */
static int job_ranks(const slam_job *j) { return j->o.ranks ? j->o.ranks : slam_ranks_count(j->ranks); }
static int job_parts(const slam_job *j) { return strcmp(j->o.zero, "0") ? job_ranks(j) : 1; }

/* The rows at once are kept with the run: another number would change the last bits. */
static int fix_micro(slam_job *j, const slam_config *config, int rows) {
    char spelled[32];
    int micro;
    if (!read_micro(j->o.micro, &micro)) return 0;
    rows = (rows + job_ranks(j) - 1) / job_ranks(j);
    if (!micro) micro = slam_micro_batch(j->run.ops, config, rows, j->run.context, slam_job_mode(j), job_parts(j));
    j->run.micro = micro < rows ? micro : rows;
    snprintf(spelled, sizeof spelled, "%d", micro); // as it was asked for, so that the same command goes on
    return slam_flags_set(&j->flags, "micro-batch", spelled);
}

int slam_job_fill(slam_job *j, slam_ops *ops, const slam_config *config, int rows, int T) {
    const slam_options *o = &j->o;
    slam_run *r = &j->run;
    if (o->batch < job_ranks(j)) return fail("--batch %d: fewer than the %d ranks", o->batch, job_ranks(j));
    slam_ranks_zero(j->ranks, strcmp(o->zero, "0") != 0);
    const char *const schedules[] = {"cosine", "inverse-sqrt", "linear", "constant"};
    r->ops = ops;
    r->adamw.beta1 = o->beta1;
    r->adamw.beta2 = o->beta2;
    r->adamw.eps = o->eps;
    r->adamw.weight_decay = o->weight_decay;
    r->adamw.clip = o->clip;
    r->lr = o->lr;
    r->min_lr = o->min_lr;
    for (int i = 0; i < 4; i++)
        if (!strcmp(o->schedule, schedules[i])) r->schedule = i;
    r->eval_every = o->eval_every;
    r->save_every = o->save_every;
    r->log_every = o->log_every;
    r->lines = slam_flags_given(&j->flags, "log-every");
    r->keep = o->keep;
    r->format = strcmp(o->format, "hf") ? SLAM_FORMAT_SLAMKIT : SLAM_FORMAT_HF;
    r->context = T;
    return read_warmup(r, o->warmup) && fix_micro(j, config, rows);
}

int slam_job_grows(const slam_job *j, const char *limit) {
    int grows = !limit && j->fresh;
    for (int i = 0; i < j->flags.n; i++) {
        const slam_flag *f = &j->table[i];
        if (!f->given || !is_limit(j, f) || (limit && strcmp(f->name, limit))) continue;
        const char *stored = slam_settings_get(&j->run.trainer.settings, f->name);
        grows = grows || !(stored && strtod(stored, NULL) == limit_value(f));
    }
    return grows;
}

int slam_job_steps(slam_job *j, double epoch, long most) {
    slam_trainer *t = &j->run.trainer;
    const long stored = t->steps;
    long steps = j->o.steps;
    if (!slam_job_grows(j, NULL)) return 1;
    const long fit = j->o.epochs > 0 ? (long)ceil(j->o.epochs * epoch) : 0;
    if (fit && (!steps || fit < steps)) steps = fit;
    if (most && (!steps || most < steps)) steps = most;
    if (steps && steps < stored)
        return fail("the limits make %ld steps, the run that is resumed has %ld, and a limit may only grow", steps, stored);
    t->steps = steps;
    j->run.min_steps = stored;
    return 1;
}

int slam_job_keep(slam_job *j, uint64_t data) {
    slam_trainer *t = &j->run.trainer;
    text without = SLAM_ZERO;
    text_add(&without, "%s %s", j->not_kept, j->any_limit ? "" : j->may_grow);
    int ok = !without.failed;
    if (!j->fresh && data != t->data) ok = fail("%s: the data are not those that this run was begun with", j->data.at[0]);
    t->data = data;
    ok = ok && slam_settings_set(&t->settings, "program", j->program) && slam_settings_keep(&t->settings, &j->flags, without.at) &&
         slam_settings_keep_paths(&t->settings, j->key, &j->flags.rest) && slam_settings_keep_paths(&t->settings, "val", &j->o.val);
    text_free(&without);
    const uint64_t seen[] = {data, (uint64_t)t->step, (uint64_t)t->steps};
    return slam_ranks_agree(j->ranks, ok) &&
           slam_ranks_agree(j->ranks,
                            slam_ranks_same(j->ranks, hash_bytes(HASH_START, seen, sizeof seen)) ||
                                fail("the ranks do not see the same data or checkpoints: expected files that all machines share"));
}

int slam_job_begin(slam_job *j) {
    slam_run *r = &j->run;
    if (!j->folder && !j->o.out) { // rank 0 finds a name, and tells the others
        char name[64] = "";
        const int root = slam_ranks_root(j->ranks);
        if (!slam_ranks_agree(j->ranks, !root || (j->folder = slam_run_new(j->program)) != NULL)) return 0;
        if (root) snprintf(name, sizeof name, "%s", j->folder);
        slam_ranks_broadcast(j->ranks, name, sizeof name);
        if (!root && !(j->folder = text_copy(name))) return 0;
    }
    r->folder = j->folder ? j->folder : j->o.out;
    printf("run      %s\n", r->folder);
    fflush(stdout);
    return slam_run_begin(r, j->checkpoint);
}

void slam_job_print_device(const slam_job *j, const char *note) {
    printf("device   %s%s%s%s\n", j->run.ops->name, *note ? " (" : "", note, *note ? ")" : "");
}

void slam_job_print_memory(const slam_job *j, const slam_config *config, int rows) {
    const int ranks = job_ranks(j);
    const slam_memory m =
        slam_config_memory(config, j->run.ops->bytes_per_act, j->run.micro, j->run.context, slam_job_mode(j), job_parts(j));
    printf(
        "memory   %.1f MB%s: weights %.1f, gradients %.1f, optimiser %.1f, activations %.1f,\n         logits %.1f; %d of %d rows at "
        "once\n",
        m.total / 1e6, ranks > 1 ? " a rank" : "", m.weights / 1e6, m.gradients / 1e6, m.optimiser / 1e6, m.activations / 1e6,
        m.logits / 1e6, j->run.micro, (rows + ranks - 1) / ranks);
}

/* What is reduced hides behind the backward pass, two thirds of the work, over the last rows at once. */
void slam_job_print_ranks(const slam_job *j, const slam_config *config, int rows, double tokens) {
    const slam_options *o = &j->o;
    const int ranks = job_ranks(j), zero = strcmp(o->zero, "0"), act = zero ? j->run.ops->bytes_per_act : 4;
    const int passes = ((rows + ranks - 1) / ranks + j->run.micro - 1) / j->run.micro;
    const double n = (double)slam_config_parameters(config), sent = n * (ranks - 1) / ranks, speed = o->bandwidth;
    char a[32];
    if (ranks > 1)
        printf("ranks    %d; in a step each sends %.3g GB: %s parameters x (ranks - 1) / ranks x (4 bytes of\n"
               "         gradients + %d of %s)\n",
               ranks, (4 + act) * sent / 1e9, slam_spell_count(a, n), act, zero ? "weights" : "their sums");
    if (!o->flops) return;
    const double compute = slam_config_flops(config, o->context) * tokens / ranks / o->flops, behind = compute / passes * 2 / 3;
    const double reduce = speed ? 4 * sent / speed : 0, gather = speed ? act * sent / speed : 0;
    const double shown = reduce > behind ? reduce - behind : 0, step = compute + shown + gather;
    printf("step     %.4g s = compute %.4g + reduce %.4g + gather %.4g: %s tokens a day\n", step, compute, shown, gather,
           slam_spell_count(a, 86400 * tokens / step));
    printf("         compute = FLOP a token x tokens / ranks / FLOP/s; gather, reduce = bytes / bandwidth; reduce takes\n"
           "         %.4g, of which %.4g hide behind the backward pass of the last rows\n",
           reduce, reduce - shown);
}

void slam_job_print_schedule(const slam_job *j) {
    const long steps = j->run.trainer.steps;
    printf("schedule lr %g, %s, warm-up %s\n", j->o.lr, j->o.schedule, j->o.warmup);
    if (steps && steps < j->run.warmup) printf("         the warm-up is longer than the run: lr does not reach its peak\n");
}

void slam_print_path(const char *path) {
    if (!strpbrk(path, " \t\n'\"\\$&;|<>()*?[]{}#~!`")) printf("%s", path);
    else {
        printf("'");
        for (const char *c = path; *c; c++) printf(*c == '\'' ? "'\\''" : "%c", *c);
        printf("'");
    }
}

/* Twice what was asked for; the number of steps where nothing was. */
static void print_twice(const slam_job *j) {
    char spelled[32];
    if (j->o.steps || !j->any_limit) printf(" --steps %ld", 2 * (j->o.steps ? j->o.steps : j->run.trainer.steps));
    for (int i = 0; i < j->flags.n; i++) {
        const slam_flag *f = &j->table[i];
        if (!is_limit(j, f) || !strcmp(f->name, "steps") || !j->any_limit || limit_value(f) <= 0) continue;
        const double twice = 2 * limit_value(f);
        if (f->type == SLAM_TIME) printf(" --%s %s", f->name, slam_spell_time(spelled, twice));
        else printf(" --%s %.15g", f->name, twice);
    }
}

void slam_job_print_resume(const slam_job *j) {
    const int stopped = j->run.ended == SLAM_ENDED_SIGNAL;
    printf("./%s --resume --out ", j->program);
    slam_print_path(j->run.folder);
    if (!stopped) print_twice(j);
    printf("\n          %s\n", stopped ? "goes on where this stopped" : "goes on for as long again");
}

void slam_job_print_end(const slam_job *j, long first, const char *validation) {
    const slam_run *r = &j->run;
    const slam_trainer *t = &r->trainer;
    char a[32], b[32];
    const char *why = r->ended == SLAM_ENDED_SIGNAL ? "stopped"
                      : r->ended == SLAM_ENDED_TIME ? "out of time"
                      : first == t->step            ? "complete"
                                                    : "done";
    printf("%s after %ld of %ld steps, %s tokens, %s", why, t->step, t->steps, slam_spell_count(b, (double)t->tokens),
           slam_spell_time(a, t->seconds));
    if (t->skipped) printf(", %ld updates left out", t->skipped);
    if (*validation) printf(": %s", validation);
    printf("\n");
    if (t->step) printf("checkpoint %s/step_%06ld, which is %s/latest\n", r->folder, t->step, r->folder);
    if (t->best_step)
        printf("           %s/best, of the lowest validation loss, is step %ld (%.4f)\n", r->folder, t->best_step, t->best_loss);
}

int slam_job_end(slam_job *j, int status) {
    slam_program_end(&j->flags, j->ranks, status);
    slam_run_end(&j->run);
    slam_list_free(&j->data);
    slam_list_free(&j->val);
    slam_flags_free(&j->flags);
    free(j->folder);
    free(j->checkpoint);
    return status;
}

/* ---- progress ---- */

void slam_progress_begin(slam_progress *p) {
    p->began = p->shown = slam_clock();
    p->first = -1;
    p->terminal = isatty(STDOUT_FILENO) && !ranks_launched(); // mpirun's is one wherever its own goes
}

void slam_progress_show(slam_progress *p, double done, double of, const char *what) {
    const double now = slam_clock(), share = of > 0 && done <= of ? done / of : 0;
    char left[32];
    if (p->first < 0 && of > 0) p->first = done;
    if (now - p->shown < (p->terminal ? 0.1 : 10)) return;
    p->shown = now;
    if (p->terminal) printf("\r\033[K[%.*s%.*s] ", (int)(12 * share), "############", 12 - (int)(12 * share), "------------");
    printf("%.50s", what);
    if (share > 0 && done > p->first)
        printf("  %s left", slam_spell_time(left, (now - p->began) * (of - done) / (done - p->first)));
    if (!p->terminal) printf("\n");
    fflush(stdout);
}

void slam_progress_clear(slam_progress *p) {
    if (p->terminal) printf("\r\033[K");
    fflush(stdout);
}
#endif /* SLAM_IMPLEMENTATION */
