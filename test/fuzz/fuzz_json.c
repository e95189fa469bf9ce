/* JSON: numbers are those that strtod reads; strings and numbers survive being written and read again. */
#include "fuzz.h"

static void check(const json *j) {
    text t = SLAM_ZERO;
    if (j->type == JSON_NUMBER || j->type == JSON_STRING) {
        if (j->type == JSON_NUMBER) {
            MUST(strtod(j->string, NULL) == j->number);
            text_add_number(&t, j->number);
        } else {
            MUST(strlen(j->string) == j->n);
            text_add_json(&t, j->string);
        }
        json *again = json_parse(t.at, t.n, "again");
        MUST(again && again->type == j->type);
        MUST(j->type == JSON_NUMBER ? again->number == j->number : strcmp(again->string, j->string) == 0);
        json_free(again);
        text_free(&t);
    }
    size_t n = 0;
    for (const json *member = j->first; member; member = member->next, n++) {
        check(member);
        if (j->type == JSON_OBJECT) MUST(json_get(j, member->key) == member);
    }
    if (j->type == JSON_ARRAY || j->type == JSON_OBJECT) MUST(n == j->n);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    json *root = json_parse((const char *)bytes, size, "fuzz");
    if (root) check(root);
    json_free(root);
    return 0;
}
