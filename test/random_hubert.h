/* random_hubert.h - a HuBERT model of mHuBERT-25Hz's shape with random weights, for measurements. Include slam.h with
   SLAM_IMPLEMENTATION first. */
#ifndef RANDOM_HUBERT_H
#define RANDOM_HUBERT_H

enum { HUBERT_LAYER = 11 };
static const char random_hubert_config[] =
    "{\"architectures\": [\"HubertModel\"], \"model_type\": \"hubert\", \"num_hidden_layers\": 11, \"conv_pos_batch_norm\": true, "
    "\"conv_dim\": [512, 512, 512, 512, 512, 512, 512, 512], \"conv_kernel\": [10, 3, 3, 3, 3, 2, 2, 2], "
    "\"conv_stride\": [5, 2, 2, 2, 2, 2, 2, 2]}\n";
static const int random_hubert_kernel[] = {10, 3, 3, 3, 3, 2, 2, 2};

typedef struct random_tensors {
    tensor at[300];
    size_t n;
    uint64_t seed;
} random_tensors;

/* Adds PREFIX.weight (a,b,c) and PREFIX.bias (a); b 0: a norm; c 0: a matrix. */
static inline void random_module(random_tensors *l, const char *prefix, size_t a, size_t b, size_t c) {
    static const char *const suffixes[] = {"weight", "bias"};
    for (int bias = 0; bias < 2; bias++) {
        tensor *t = &l->at[l->n++];
        const size_t each = bias || !b ? 1 : b * (c ? c : 1);
        float *x = NEW(float, a *each);
        for (size_t i = 0; i < a * each; i++)
            x[i] = bias ? 0 : b ? (float)(rng_uniform(&l->seed) - 0.5) * 3 / sqrtf((float)each) : 1;
        t->name = string_print("%s.%s", prefix, suffixes[bias]);
        t->dtype = DTYPE_F32;
        t->rank = bias || !b ? 1 : c ? 3 : 2;
        t->shape[0] = a, t->shape[1] = b, t->shape[2] = c;
        t->data = x;
        t->count = a * each;
    }
}

/* Writes the model's folder: every tensor that a HuBERT of this configuration has. */
static inline int random_hubert(const char *folder) {
    static const char *const modules[] = {"attention.q_proj",
                                          "attention.k_proj",
                                          "attention.v_proj",
                                          "attention.out_proj",
                                          "layer_norm",
                                          "final_layer_norm",
                                          "feed_forward.intermediate_dense",
                                          "feed_forward.output_dense"};
    static const size_t rows[] = {768, 768, 768, 768, 768, 768, 3072, 768},
                        columns[] = {768, 768, 768, 768, 0, 0, 768, 3072};
    random_tensors l = ZERO;
    char name[200];
    for (int i = 0; i < 8; i++) {
        snprintf(name, sizeof name, "feature_extractor.conv_layers.%d.conv", i);
        random_module(&l, name, 512, i ? 512 : 1, random_hubert_kernel[i]);
        free((void *)(uintptr_t)l.at[--l.n].data); // the convolutions have no bias
    }
    random_module(&l, "feature_extractor.conv_layers.0.layer_norm", 512, 0, 0);
    random_module(&l, "feature_projection.layer_norm", 512, 0, 0);
    random_module(&l, "feature_projection.projection", 768, 512, 0);
    random_module(&l, "encoder.pos_conv_embed.conv", 768, 768 / 16, 128);
    random_module(&l, "encoder.pos_conv_embed.batch_norm", 768, 0, 0);
    random_module(&l, "encoder.pos_conv_embed.batch_norm.running", 768, 0, 0);
    l.at[l.n - 2].name = "encoder.pos_conv_embed.batch_norm.running_var";
    l.at[l.n - 1].name = "encoder.pos_conv_embed.batch_norm.running_mean";
    random_module(&l, "encoder.layer_norm", 768, 0, 0);
    for (int layer = 0; layer < HUBERT_LAYER; layer++)
        for (int k = 0; k < 8; k++) {
            snprintf(name, sizeof name, "encoder.layers.%d.%s", layer, modules[k]);
            random_module(&l, name, rows[k], columns[k], 0);
        }
    const int ok =
        folder_create(folder) &&
        file_write(path_join(folder, "config.json").at, random_hubert_config, strlen(random_hubert_config)) &&
        tensors_write(path_join(folder, "model.safetensors").at, l.at, l.n, NULL);
    for (size_t i = 0; i < l.n; i++) free((void *)(uintptr_t)l.at[i].data);
    return ok;
}

/* FLOP for a second of audio: products of the convolutions, the projection, positions and layers, and attention's */
static inline double random_hubert_flops(int seconds) {
    const double C = 768, F = 3072, T = 25.0 * seconds;
    double flops = 0, rate = 3200;
    for (int i = 0; i < 8; i++, rate /= 2) flops += 2 * rate * 512 * random_hubert_kernel[i] * (i ? 512 : 1);
    return flops + 25 * 2 * (512 * C + C * C / 16 * 128 + HUBERT_LAYER * (4 * C * C + 2 * C * F + 2 * T * C));
}
#endif
