/* config.json of a model and trainer.json of a run. A configuration that is taken has sizes that fit together and into memory's
   arithmetic: every weight and activation lies within what is planned for all of them. */
#include "fuzz.h"

static void check_config(const slam_config *c) {
    size_t n = 0, end = 0;
    MUST(c->V > 0 && c->C > 0 && c->L > 0 && c->F > 0 && c->T > 0 && c->KVH > 0 && c->NH % c->KVH == 0 &&
         c->HS % 2 == 0);
    MUST(c->eps > 0 && c->rope_theta >= 1);
    const weights_layout w = weights_of(c);
    MUST(w.total >= slam_config_parameters(c) && w.matrices <= w.total && w.total < (size_t)1 << 60);
    parameter *list = parameters_of(c, &n);
    MUST(list);
    for (size_t k = 0; k < n; k++) {
        MUST(list[k].at + parameter_size(&list[k]) <= w.total);
        end += parameter_size(&list[k]);
    }
    MUST(end == slam_config_parameters(c));
    free(list);
    const slam_memory m = slam_config_memory(c, 4, 1, 2, SLAM_TRAIN, 1);
    MUST(m.total >= 16.0 * (double)w.total && m.activations > 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    json *root = json_parse((const char *)bytes, size, "fuzz");
    slam_config config;
    slam_trainer trainer = SLAM_ZERO;
    if (root && config_from_json(&config, root, "config.json")) check_config(&config);
    if (root && trainer_from_json(&trainer, root, "trainer.json")) MUST(trainer.step >= 0 && trainer.steps >= 0);
    slam_trainer_free(&trainer);
    json_free(root);
    return 0;
}
