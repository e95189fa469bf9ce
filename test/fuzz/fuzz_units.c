/* Lines of units: what is read survives being written and read again. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    units_reader r;
    units u = SLAM_ZERO, again = SLAM_ZERO;
    if (units_open(&r, fuzz_file(bytes, size))) {
        while (units_next(&r, &u) > 0) {
            text t = SLAM_ZERO;
            text_add_units(&t, &u);
            json *root = json_parse(t.at, t.n, "again");
            MUST(root && units_from_json(root, "again", &again));
            MUST(again.n == u.n && strcmp(again.name, u.name) == 0 && !again.duration == !u.duration);
            for (size_t i = 0; i < u.n; i++)
                MUST(again.unit[i] == u.unit[i] && (!u.duration || again.duration[i] == u.duration[i]) && u.unit[i] >= 0);
            json_free(root);
            text_free(&t);
        }
        MUST(r.start <= r.end && r.end <= r.capacity);
        units_close(&r);
    }
    units_free(&u);
    units_free(&again);
    return 0;
}
