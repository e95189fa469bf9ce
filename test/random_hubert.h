/* random_hubert.h - a HuBERT model of mHuBERT-25Hz's shape with random weights, for measurements. Include slam.h with
   SLAM_IMPLEMENTATION first. */
#ifndef RANDOM_HUBERT_H
#define RANDOM_HUBERT_H

enum { HUBERT_LAYER = 11 };
static const char random_hubert_settings[] =
    "{\"architectures\": [\"HubertModel\"], \"model_type\": \"hubert\", \"num_hidden_layers\": 11, \"conv_pos_batch_norm\": true, "
    "\"conv_dim\": [512, 512, 512, 512, 512, 512, 512, 512], \"conv_kernel\": [10, 3, 3, 3, 3, 2, 2, 2], "
    "\"conv_stride\": [5, 2, 2, 2, 2, 2, 2, 2]}\n";

/* Writes the model's folder: every tensor that a HuBERT of these settings has. */
static inline int random_hubert(const char *folder) {
    slam_hubert h;
    hubert_list_of l = {NULL, 0, 0};
    uint64_t seed = 1;
    memset(&h, 0, sizeof h);
    char *config = path_join(folder, "config.json"), *path = path_join(folder, "model.safetensors");
    if (!config || !path || !make_folders(folder) || !file_write(config, random_hubert_settings, strlen(random_hubert_settings)) ||
        !hubert_config_read(&h.config, config))
        return 0;
    l.list = (hubert_tensor *)mem_new(500, sizeof *l.list);
    tensor_out *out = (tensor_out *)mem_new(500, sizeof *out);
    if (!l.list || !out) return 0;
    hubert_add_convolutions(&l, &h.config, &h.at);
    hubert_add_positions(&l, &h.config, &h.at, 1);
    for (int i = 0; i < HUBERT_LAYER; i++) hubert_add_layer(&l, &h.config, &h.at, i);
    for (size_t i = 0; i < l.n; i++) {
        const hubert_tensor *t = &l.list[i];
        size_t n = 1;
        out[i].name = t->name;
        out[i].rank = t->rank;
        out[i].dtype = DTYPE_F32;
        for (int k = 0; k < t->rank; k++) n *= out[i].shape[k] = t->shape[k];
        float *data = (float *)mem_new(n, sizeof *data);
        const int is_one = t->rank == 1 && (path_ends(t->name, "norm.weight") || path_ends(t->name, "running_var"));
        if (!data) return 0;
        for (size_t k = 0; k < n; k++)
            data[k] = is_one ? 1 : t->rank == 1 ? 0 : (float)(rng_uniform(&seed) - 0.5) * 3 / sqrtf((float)(n / t->shape[0]));
        out[i].data = data;
    }
    const int ok = tensors_write(path, out, l.n, NULL);
    for (size_t i = 0; i < l.n; i++) free((void *)(uintptr_t)out[i].data);
    free(l.list), free(out), free(path), free(config);
    return ok;
}

/* FLOP for a second of audio: products of the convolutions, the projection, positions and layers, and attention's */
static inline double random_hubert_flops(int seconds) {
    const double C = 768, F = 3072, T = 25.0 * seconds;
    const int kernel[] = {10, 3, 3, 3, 3, 2, 2, 2};
    double flops = 0, rate = 3200;
    for (int i = 0; i < 8; i++, rate /= 2) flops += 2 * rate * 512 * kernel[i] * (i ? 512 : 1);
    return flops + 25 * 2 * (512 * C + C * C / 16 * 128 + HUBERT_LAYER * (4 * C * C + 2 * C * F + 2 * T * C));
}

#endif
