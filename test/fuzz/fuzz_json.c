/* JSON: numbers are those that strtod reads; strings and numbers survive being written and read again. */
#include "fuzz.h"

static void check_json(const json *j) {
    strbuf t = ZERO;
    if (j->type == JSON_NUMBER || j->type == JSON_STRING) {
        if (j->type == JSON_NUMBER) {
            MUST(strtod(j->string, NULL) == j->number);
            strbuf_add_number(&t, j->number);
        } else strbuf_add_json(&t, j->string);
        json *again = json_parse(t.at, t.n, "again");
        MUST(again && again->type == j->type);
        MUST(j->type == JSON_NUMBER ? again->number == j->number : strcmp(again->string, j->string) == 0);
        json_free(again);
        strbuf_free(&t);
    }
    size_t n = 0;
    for (const json *item = j->first; item; item = item->next, n++) {
        check_json(item);
        const json *last = item; // of that key
        for (const json *k = item; j->type == JSON_OBJECT && k; k = k->next)
            if (strcmp(k->key, item->key) == 0) last = k;
        if (j->type == JSON_OBJECT) MUST(json_get(j, item->key) == (last->type == JSON_NULL ? NULL : last));
    }
    if (j->type == JSON_ARRAY || j->type == JSON_OBJECT) MUST(n == j->n);
}

static int fuzz_json(const uint8_t *bytes, size_t size) {
    file_map map = fuzz_map(bytes, size);
    json *root = json_parse((const char *)map.data, map.size, "fuzz");
    fuzz_free(&map);
    if (root) check_json(root);
    json_free(root);
    return 0;
}
