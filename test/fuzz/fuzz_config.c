/* config.json of a model and trainer.json of a run. An accepted configuration has sizes that fit together: every weight lies within
   the array that is planned for all of them. */
#include "fuzz.h"

static void check_config(const slam_config *c) {
    size_t end = 0;
    MUST(c->V > 0 && c->C > 0 && c->L > 0 && c->F > 0 && c->T > 0 && c->KVH > 0 && c->NH % c->KVH == 0 &&
         c->HS % 2 == 0);
    MUST(c->eps > 0 && c->rope_theta >= 1);
    const model_tensors m = tensors_of(c);
    MUST(m.n_weights >= slam_config_parameters(c) && m.n_decayed <= m.n_weights && m.n_weights < (size_t)1 << 60);
    for (size_t k = 0; k < m.n; k++) {
        MUST(m.list[k].offset + tensor_size(&m.list[k]) <= m.n_weights);
        end += tensor_size(&m.list[k]);
    }
    MUST(end == slam_config_parameters(c));
    const slam_memory memory = slam_config_memory(c, 4, 1, 2, SLAM_TRAIN, 1);
    MUST(memory.total >= 16.0 * (double)m.n_weights && memory.activations > 0);
    free(m.list);
}

static int fuzz_config(const uint8_t *bytes, size_t size) {
    json *root = json_parse((const char *)bytes, size, "fuzz");
    slam_config config = ZERO;
    slam_trainer trainer = ZERO;
    config.T = 2048;
    config.eps = 1e-6;
    config.rope_theta = 10000;
    if (root && config_read(&config, root, "config.json")) check_config(&config);
    if (root && trainer_from_json(&trainer, root, "trainer.json")) MUST(trainer.step >= 0 && trainer.steps >= 0);
    slam_trainer_free(&trainer);
    json_free(root);
    return 0;
}
