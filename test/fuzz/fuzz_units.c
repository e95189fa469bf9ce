/* Unit lines: what is read survives being written and read again, in both formats. */
#include "fuzz.h"

static void check(const slam_units *u, int tokens) {
    slam_units again = ZERO;
    strbuf t = ZERO;
    strbuf_add_units(&t, u, tokens);
    json *root = json_parse(t.at, t.n, "again");
    MUST(root && units_from_json(root, "again", &again));
    MUST(again.n == u->n && strcmp(again.name, u->name) == 0 && (tokens || !again.duration == !u->duration));
    MUST(u->end <= 0 || (again.start == u->start && again.end == u->end));
    for (size_t i = 0; i < u->n; i++)
        MUST(again.unit[i] == u->unit[i] && (!again.duration || again.duration[i] == u->duration[i]) &&
             u->unit[i] >= 0);
    json_free(root);
    strbuf_free(&t);
    slam_units_free(&again);
}

static int fuzz_units(const uint8_t *bytes, size_t size) {
    units_reader r;
    slam_units u = ZERO;
    if (!units_open(&r, fuzz_file(bytes, size))) return 0;
    while (units_next(&r, &u) > 0) {
        check(&u, 0);
        int small = 1; // audio_repr has at most 9 digits
        for (size_t i = 0; i < u.n; i++) small = small && u.unit[i] <= 999999999;
        if (small) check(&u, 1);
    }
    MUST(r.at <= r.end);
    units_close(&r);
    slam_units_free(&u);
    return 0;
}
