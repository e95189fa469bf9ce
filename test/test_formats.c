/* The file formats: what is written is read back, what others write is read correctly, and whatever a file holds, its reader
   returns a value or an error. Damaged files are in memory of exactly their size, so that under `make test SANITIZE=1` a step
   beyond it is seen. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"
#include <locale.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* An input and a part of the error that it causes. */
typedef struct invalid {
    const char *text, *error;
} invalid;

static void test_folders(void) {
    if (!TEST("folders: parents are made; an error is that of the first that cannot be")) return;
    const char *root = check_path("folders"), *file = check_file("a file", "x", 1);
    char path[1200];
    snprintf(path, sizeof path, "%s/a//b/c/", root);
    CHECK(folder_create(path) && folder_create(path) && path_is_folder(path), "%s", slam_error());
    CHECK(remove_tree(root), "%s", slam_error());
    snprintf(path, sizeof path, "%s/b/c", file);
    check_fails(folder_create(path), "a file: cannot create this folder: File exists");
    check_fails(folder_create(file), "a file: cannot create this folder: File exists");
    check_fails(path_writable(path), "Not a directory");
}

static const char *text_file(const char *name, const char *text) { return check_file(name, text, strlen(text)); }

/* ---- JSON ---- */

static json *parse(const char *text) { return json_parse(text, strlen(text), "x.json"); }

static void test_json_values(void) {
    static const char *const text =
        " {\"a\": [1, -2.5e3, true, false, null, \"\"], \"s\": \"q\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC\\ud83d\\ude00\", "
        "\"empty\": {}, \"none\": [], \"null\": null}\r\n";
    static const int types[] = {JSON_NUMBER, JSON_NUMBER, JSON_TRUE, JSON_FALSE, JSON_NULL, JSON_STRING};
    static const char *const texts[] = {"1", "-2.5e3", NULL, NULL, NULL, ""};
    if (!TEST("json: values of every kind")) return;
    json *root = parse(text);
    if (!CHECK(root, "%s", slam_error())) return;
    const json *a = json_get(root, "a"), *s = json_get(root, "s"), *item = a->first;
    CHECK(root->type == JSON_OBJECT && root->n == 5 && a && a->type == JSON_ARRAY && a->n == 6, "%zu members", root->n);
    for (size_t i = 0; i < 6; i++, item = item->next) {
        CHECK(item->type == types[i], "item %zu has type %d", i, item->type);
        CHECK(!texts[i] || !strcmp(item->string, texts[i]), "item %zu is '%s'", i, item->string);
    }
    CHECK(!item && a->first->number == 1 && a->first->next->number == -2500, "%g", a->first->next->number);
    CHECK(!strcmp(s->string, "q\"\\/\b\f\n\r\t\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"), "%s", s->string);
    CHECK(json_get(root, "empty")->type == JSON_OBJECT && !json_get(root, "empty")->first, "not empty");
    CHECK(json_get(root, "none")->type == JSON_ARRAY && json_get(root, "none")->n == 0, "not empty");
    CHECK(!json_get(root, "absent") && !json_get(root, "null") && !json_get(a, "x") && !json_get(NULL, "x"),
          "found it");
    CHECK(!strcmp(json_string(root, "s", "-"), s->string) && !strcmp(json_string(root, "a", "-"), "-"), "json_string");
    json_free(root);
    json_free(NULL);
}

static void test_json_invalid(void) {
    static const invalid texts[] = {
        {"", "found the end, expected a value"},
        {" ", "found the end"},
        {"{", "found the end, expected a key"},
        {"[1,2", "found the end, expected ',' or ']'"},
        {"[1,]", "found ']', expected a value"},
        {"{\"a\":1,}", "found '}', expected a key in quotes"},
        {"[,1]", "found ',', expected a value"},
        {"{a:1}", "found 'a', expected a key in quotes"},
        {"{\"a\" 1}", "found '1', expected ':'"},
        {"{\"a\":1 \"b\":2}", "expected ',' or '}'"},
        {"{\"a\":1]", "expected ',' or '}'"},
        {"[1}", "expected ',' or ']'"},
        {"1 2", "found '2', expected nothing more"},
        {"01", "a decimal number that a double can hold"},
        {"-01", "a decimal number that a double can hold"},
        {"-", "a decimal number that a double can hold"},
        {"1.", "a decimal number that a double can hold"},
        {".5", "found '.', expected a value"},
        {"-.5", "a decimal number that a double can hold"},
        {"1.e5", "a decimal number that a double can hold"},
        {"1.5.5", "a decimal number that a double can hold"},
        {"1-2", "found '-', expected nothing more"},
        {"+1", "found '+'"},
        {"1e", "a decimal number that a double can hold"},
        {"1e999", "a decimal number that a double can hold"},
        {"-1e400", "a decimal number that a double can hold"},
        {"0x10", "found 'x', expected nothing more"},
        {"NaN", "found 'N'"},
        {"Infinity", "found 'I'"},
        {"True", "found 'T'"},
        {"tru", "found 't', expected a value"},
        {"'a'", "expected a value"},
        {"\"abc", "closing quote"},
        {"\"a\\", "after a backslash"},
        {"\"\\x41\"", "after a backslash"},
        {"\"\\u12G4\"", "uXXXX"},
        {"\"\\u12", "uXXXX"},
        {"\"\\ud800\"", "half of a surrogate pair"},
        {"\"\\ud800\\u0041\"", "half of a surrogate pair"},
        {"\"\\udc00\\ud800\"", "half of a surrogate pair"},
        {"\"\\udc7f\"", "half of a surrogate pair"},
        {"\"\\udd00\"", "half of a surrogate pair"},
        {"\"\\ud800\\n\"", "half of a surrogate pair"},
        {"\"\\u0000\"", "not 0000"},
        {"\"a\nb\"", "x.json: byte 3: found byte 0x0a, expected a closing quote, or an escape"},
        {"\"\x80\"", "UTF-8"},
        {"\"\xc0\xaf\"", "UTF-8"},
        {"\"\xed\xa0\x80\"", "UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "UTF-8"},
        {"\"\xe2\x82\"", "found byte 0xe2, expected UTF-8"},
        {"\xef\xbb\xbf{}", "found byte 0xef"},
        {"/* no */ 1", "found '/'"},
        {"\n\n[1,\n  x]", "x.json: byte 9: found 'x'"},
        {"[1, x]", "x.json: byte 5: found 'x', expected a value"},
    };
    if (!TEST("json: invalid text is an error that says where")) return;
    for (size_t i = 0; i < COUNT(texts); i++) check_fails(parse(texts[i].text), texts[i].error);
    char deep[201], digits[2000];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    deep[200] = 0;
    check_fails(parse(deep), "at most 64 levels of nesting");
    json *root = json_parse(deep + 36, 128, "x.json");
    CHECK(root, "%s", slam_error());
    json_free(root);
    memset(digits, '7', 1999);
    digits[1999] = 0;
    check_fails(parse(digits), "a decimal number that a double can hold");
    check_fails(json_parse("1\0", 2, "x.json"), "found byte 0x00, expected nothing more");
    check_fails(json_parse("\"\0\"", 3, "x.json"), "found byte 0x00, expected a closing quote");
    check_fails(json_load(check_path("absent.json")), "cannot be opened");
    check_fails(json_load(text_file("empty.json", "")), "empty.json: byte 1: found the end, expected a value");
}

static void test_json_many_keys(void) {
    if (!TEST("json: an object of 100000 keys; of equal keys the last counts")) return;
    strbuf t = ZERO;
    for (int i = 0; i < 100000; i++) strbuf_add(&t, "%c\"k%d\":%d", i ? ',' : '{', i, i);
    strbuf_add(&t, "}");
    json *root = json_parse(t.at, t.n, "x");
    CHECK(root && root->n == 100000 && json_get(root, "k99999")->number == 99999, "%s", slam_error());
    json_free(root);
    t.at[t.n - 1] = ',';
    strbuf_add(&t, "\"k500\":1}");
    root = json_parse(t.at, t.n, "x");
    CHECK(root && json_get(root, "k500")->number == 1 && json_get(root, "k501")->number == 501, "%s", slam_error());
    json_free(root);
    strbuf_free(&t);
}

static void check_number(double x, const char *expected) {
    strbuf t = ZERO;
    strbuf_add_number(&t, x);
    json *root = json_parse(t.at, t.n, "x");
    CHECK(root && root->number == x && signbit(root->number) == signbit(x), "%.17g became %s", x, t.at);
    if (expected) CHECK(strcmp(t.at, expected) == 0, "%.17g became %s, expected %s", x, t.at, expected);
    json_free(root);
    strbuf_free(&t);
}

/* A locale of the system, or of the scratch folder. musl has names for all, but no comma. */
static int use_decimal_comma(void) {
    char command[1200], folder[1100];
    snprintf(folder, sizeof folder, "%s", check_path("locales"));
    mkdir(folder, 0777);
    snprintf(command, sizeof command, "localedef -i de_DE -f UTF-8 %s/de_DE.UTF-8 >/dev/null 2>&1", folder);
    if (setlocale(LC_NUMERIC, "de_DE.UTF-8") || setlocale(LC_NUMERIC, "fr_FR.UTF-8")) return 1;
    setenv("LOCPATH", folder, 1);
    return system(command) == 0 && setlocale(LC_NUMERIC, "de_DE.UTF-8") != NULL;
}

static void test_json_numbers(void) {
    static const struct {
        double x;
        const char *text;
    } shortest[] = {{0, "0"},
                    {-0.0, "-0"},
                    {1, "1"},
                    {-17, "-17"},
                    {0.1, "0.1"},
                    {0.1 + 0.2, "0.30000000000000004"},
                    {1e-4, "0.0001"},
                    {1e-05, "1e-05"},
                    {123456.789, "123456.789"},
                    {1e14, "100000000000000"},
                    {1e15, "1e+15"},
                    {1.5e300, "1.5e+300"},
                    {5e-324, "4.94065645841247e-324"},
                    {2.2250738585072014e-308, "2.2250738585072014e-308"},
                    {1.7976931348623157e308, "1.7976931348623157e+308"},
                    {9007199254740993.0, "9007199254740992"}};
    static const char *const not_numbers[] = {"", "x", "1x", "inf", "nan", "0x1p3", "1,5", "1e", "-", "."};
    if (TEST("json: the shortest text of a number")) {
        for (size_t i = 0; i < COUNT(shortest); i++) check_number(shortest[i].x, shortest[i].text);
        strbuf t = ZERO;
        strbuf_add_number(&t, NAN);
        strbuf_add_number(&t, -INFINITY);
        CHECK(strcmp(t.at, "nullnull") == 0, "%s", t.at);
        strbuf_free(&t);
        for (size_t i = 0; i < COUNT(not_numbers); i++) check_fails(parse(not_numbers[i]), "x.json: ");
    }
    if (TEST("json: 50000 doubles of any size survive, and are what strtod reads")) {
        uint64_t state = check_state.seed;
        for (int i = 0; i < 50000; i++) {
            char text[64];
            uint64_t bits = rng_next(&state);
            double x;
            memcpy(&x, &bits, 8);
            if (isfinite(x)) check_number(x, NULL);
            x = rng_uniform(&state) * pow(10, (double)rng_below(&state, 20));
            check_number(x, NULL);
            snprintf(text, sizeof text, "%.*g", 1 + (int)rng_below(&state, 25), x);
            json *root = parse(text);
            if (CHECK(root, "%s", slam_error())) CHECK(root->number == strtod(text, NULL), "%s", text);
            json_free(root);
        }
    }
    if (use_decimal_comma()) {
        if (TEST("numbers do not depend on the locale")) {
            check_number(0.5, "0.5");
            check_number(0.1 + 0.2, "0.30000000000000004");
            check_number(1.2345678901234568e-300, "1.2345678901234568e-300");
            CHECK(whole_number("12.0") == 12 && whole_number("12,0") == -2, "in gold.csv: %ld", whole_number("12.0"));
        }
        setlocale(LC_NUMERIC, "C");
    } else printf("skip numbers do not depend on the locale: there is none with a decimal comma, nor localedef\n");
}

typedef struct state {
    int i, flag;
    long l;
    uint64_t u, hex;
    double r;
} state;

static const field state_fields[] = {
    {"i", FIELD_INT, offsetof(state, i), 1, 9, 1},        {"l", FIELD_LONG, offsetof(state, l), -9e15, 9.1e15, 0},
    {"u", FIELD_U64, offsetof(state, u), 0, 9.1e15, 0},   {"r", FIELD_REAL, offsetof(state, r), -HUGE_VAL, HUGE_VAL, 0},
    {"flag", FIELD_BOOL, offsetof(state, flag), 0, 0, 0}, {"hex", FIELD_HEX, offsetof(state, hex), 0, 0, 0}};

static int read_member(const json *object, const char *name, int type, double min, double max, void *out) {
    const field f = {name, type, 0, min, max, 0};
    return fields_read(object, &f, 1, out, "c.json");
}

static void test_json_fields(void) {
    static const invalid texts[] = {
        {"{}", "c.json: 'i' is missing, expected a whole number from 1 to 9"},
        {"[]", "c.json: 'i' is missing"},
        {"{\"i\": null}", "c.json: 'i' is missing"},
        {"{\"i\": 0}", "c.json: 'i' is 0, expected a whole number from 1 to 9"},
        {"{\"i\": 10}", "'i' is 10"},
        {"{\"i\": 1.5}", "'i' is 1.5, expected a whole number"},
        {"{\"i\": \"1\"}", "'i' is a string, expected a whole number"},
        {"{\"i\": 1, \"l\": 9007199254740994}",
         "'l' is 9007199254740994, expected a whole number from -9000000000000000 to 9100000000000000"},
        {"{\"i\": 1, \"l\": 1e300}", "'l' is 1e300"},
        {"{\"i\": 1, \"u\": -1}", "'u' is -1, expected a whole number from 0 to 9100000000000000"},
        {"{\"i\": 1, \"r\": true}", "'r' is true, expected a number from -inf to inf"},
        {"{\"i\": 1, \"flag\": 1}", "'flag' is 1, expected true or false"},
        {"{\"i\": 1, \"flag\": []}", "'flag' is an array, expected true or false"},
        {"{\"i\": 1, \"hex\": 7}", "'hex' is 7, expected hexadecimal digits in quotes"},
        {"{\"i\": 1, \"hex\": \"\"}", "'hex' is a string"},
        {"{\"i\": 1, \"hex\": \"0x1\"}", "'hex' is a string"},
        {"{\"i\": 1, \"hex\": \"00000000000000001\"}", "'hex' is a string"},
    };
    const size_t n = COUNT(state_fields);
    if (TEST("json: the fields of a struct are written and read, absent ones stay")) {
        state a = {7, 1, -1234567890123, (uint64_t)1 << 53, 0xfedcba9876543210u, 0.1}, b = ZERO;
        strbuf t = ZERO;
        strbuf_add(&t, "{\n");
        fields_write(&t, state_fields, n, &a, "  ");
        strbuf_add(&t, "}\n");
        CHECK(strstr(t.at, "{\n  \"i\": 7,\n  \"l\": -1234567890123,\n") &&
                  strstr(t.at, "\"hex\": \"fedcba9876543210\"\n}\n"),
              "%s", t.at);
        json *root = json_parse(t.at, t.n, "state.json");
        CHECK(fields_read(root, state_fields, n, &b, "c.json") && memcmp(&a, &b, sizeof a) == 0, "%s", t.at);
        json_free(root);
        strbuf_free(&t);
        root = parse("{\"i\": 8, \"r\": null, \"l\": 1e3}");
        CHECK(fields_read(root, state_fields, n, &b, "c.json"), "%s", slam_error());
        CHECK(b.i == 8 && b.l == 1000 && b.r == a.r && b.flag == 1, "%ld", b.l);
        json_free(root);
        a.r = NAN;
        fields_write(&t, state_fields, n, &a, "");
        CHECK(strstr(t.at, "\"r\": null,\n"), "%s", t.at);
        strbuf_free(&t);
    }
    if (TEST("json: fields of another type or beyond their limits are errors")) {
        state b = ZERO;
        for (size_t i = 0; i < COUNT(texts); i++) {
            json *root = parse(texts[i].text);
            check_fails(fields_read(root, state_fields, n, &b, "c.json"), texts[i].error);
            json_free(root);
        }
    }
    if (!TEST("json: single members are read by type and range")) return;
    json *root = parse("{\"i\": 7, \"r\": 0.5, \"t\": true, \"s\": \"text\", \"z\": null, \"e\": 1e3}");
    int i = -1, flag = -1;
    double r = -1;
    CHECK(read_member(root, "i", FIELD_INT, 1, 9, &i) && i == 7, "%d", i);
    CHECK(read_member(root, "e", FIELD_INT, 1, 9000, &i) && i == 1000, "%d", i);
    CHECK(read_member(root, "absent", FIELD_INT, 1, 9, &i) && read_member(root, "z", FIELD_INT, 1, 9, &i) && i == 1000,
          "%d", i);
    CHECK(read_member(NULL, "i", FIELD_INT, 1, 9, &i) && i == 1000, "%d", i);
    CHECK(read_member(root, "r", FIELD_REAL, 0, 1, &r) && r == 0.5, "%g", r);
    CHECK(read_member(root, "i", FIELD_REAL, 0, 10, &r) && r == 7, "%g", r);
    CHECK(read_member(root, "t", FIELD_BOOL, 0, 0, &flag) && flag == 1, "%d", flag);
    CHECK(read_member(root, "z", FIELD_BOOL, 0, 0, &flag) && flag == 1, "%d", flag);
    check_fails(read_member(root, "i", FIELD_INT, 8, 9, &i), "c.json: 'i' is 7, expected a whole number from 8 to 9");
    check_fails(read_member(root, "r", FIELD_REAL, 1, 2, &r), "c.json: 'r' is 0.5, expected a number from 1 to 2");
    check_fails(read_member(root, "i", FIELD_BOOL, 0, 0, &flag), "c.json: 'i' is 7, expected true or false");
    json_free(root);
}

static void test_json_strings(void) {
    if (!TEST("json: any bytes are written as a string that can be read")) return;
    uint64_t state = check_state.seed;
    strbuf t = ZERO;
    for (int round = 0; round < 2000; round++) {
        char bytes[40];
        size_t n = rng_below(&state, sizeof bytes);
        for (size_t i = 0; i < n; i++) bytes[i] = (char)(1 + rng_below(&state, round % 2 ? 127 : 255));
        bytes[n] = 0;
        strbuf_add_json(&t, bytes);
        json *root = json_parse(t.at, t.n, "x");
        CHECK(root && root->type == JSON_STRING, "%s", slam_error());
        if (root) CHECK(strcmp(root->string, bytes) == 0, "'%s' became '%s'", bytes, root->string);
        json_free(root);
        strbuf_free(&t);
    }
    strbuf_add_json(&t, "a\"\\\n\t\x01\xc3\xa9\xff");
    CHECK(strcmp(t.at, "\"a\\\"\\\\\\n\\t\\u0001\xc3\xa9\\udcff\"") == 0, "%s", t.at); // as json.dumps in Python
    strbuf_free(&t);
}

/* ---- safetensors ---- */

/* A file of that header and `data` bytes of data, each its own number. */
static const char *tensor_file(const char *name, const char *header, size_t data) {
    strbuf t = ZERO;
    const uint64_t n = strlen(header);
    strbuf_add_bytes(&t, &n, 8);
    strbuf_add(&t, "%s", header);
    for (size_t i = 0; i < data; i++) strbuf_add(&t, "%c", (int)i);
    const char *path = check_file(name, t.at, t.n);
    strbuf_free(&t);
    return path;
}

static void test_tensors_round_trip(void) {
    if (!TEST("safetensors: what is written is read back")) return;
    const float a[6] = {1, -2, 3.5f, -0.0f, INFINITY, 1e-42f}, b[3] = {7, 8, 9};
    const double c[1] = {1e300};
    const int32_t d[2] = {-5, 6};
    const tensor list[] = {{"a", DTYPE_F32, 2, {2, 3}, a, 6, NULL},
                           {"d", DTYPE_I32, 1, {2}, d, 2, NULL},
                           {"b.\"quoted\"", DTYPE_F32, 1, {3}, b, 3, NULL},
                           {"c", DTYPE_F64, 0, {0}, c, 1, NULL},
                           {"e", DTYPE_F32, 2, {0, 4}, NULL, 0, NULL}};
    static const char *const metadata[] = {"updates", "20", "note", "a \"b\"", NULL};
    const char *path = check_path("round.safetensors");
    float got[6] = {0};
    if (!CHECK(tensors_write(path, list, 5, metadata), "%s", slam_error())) return;
    tensors *t = tensors_open(path);
    if (!CHECK(t, "%s", slam_error())) return;
    const tensor *found = tensors_find(t, "a");
    CHECK(t->n == 5 && !strcmp(t->at[1].name, "b.\"quoted\"") && found == &t->at[0], "%zu tensors", t->n);
    CHECK(t->file[0].map.size % 4 == 0 && ((const unsigned char *)found->data - t->file[0].map.data) % 8 == 0,
          "data are not aligned");
    CHECK(!strcmp(tensors_metadata(t, "format"), "pt") && !strcmp(tensors_metadata(t, "note"), "a \"b\"") &&
              !strcmp(tensors_metadata(t, "updates"), "20") && !tensors_metadata(t, "absent"),
          "metadata differ");
    CHECK(tensor_floats(found, got, 0, 6) && memcmp(got, a, sizeof a) == 0, "a differs");
    CHECK(tensor_floats(found, got, 4, 2) && memcmp(got, a + 4, 8) == 0, "the end of a differs");
    check_fails(tensor_floats(found, got, 4, 3), "tensor 'a' has 6 numbers, expected 4 + 3");
    check_fails(tensor_floats(found, got, SIZE_MAX, 2), "tensor 'a' has 6 numbers");
    CHECK(tensor_has_shape(found, 2, 2, 3), "%s", slam_error());
    check_fails(tensor_has_shape(found, 1, 896, 0), "round.safetensors: tensor 'a' has shape (2,3), expected (896)");
    check_fails(tensor_has_shape(found, 2, 2, 4), "has shape (2,3), expected (2,4)");
    check_fails(tensor_has_shape(found, 1, 2, 0), "has shape (2,3), expected (2)");
    found = tensors_find(t, "c");
    CHECK(tensor_floats(found, got, 0, 1) && isinf(got[0]) && tensor_has_shape(found, 0, 0, 0), "%g", (double)got[0]);
    check_fails(tensor_floats(tensors_find(t, "d"), got, 0, 2), "tensor 'd' is I32, expected F32, F16, BF16 or F64");
    found = tensors_find(t, "e");
    CHECK(found && found->count == 0 && tensor_floats(found, got, 0, 0), "%s", slam_error());
    CHECK(!tensors_find(t, "absent") && !tensors_find(t, ""), "found a tensor that is not there");
    tensors_close(t);
    check_fails(tensors_write(check_path("no/such/folder.safetensors"), list, 5, NULL), "cannot be written");
    CHECK(!path_is_file(check_path("round.safetensors.part")), "the .part file is still there");
}

static void test_tensors_numbers(void) {
    if (!TEST("safetensors: every F16 and every BF16, at odd addresses, and doubles")) return;
    enum { n = 65536 };
    strbuf t = ZERO;
    float *got = NEW(float, n);
    char header[300];
    snprintf(header, sizeof header,
             "{\"odd\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
             "\"h\":{\"dtype\":\"F16\",\"shape\":[%d],\"data_offsets\":[1,%d]},"
             "\"b\":{\"dtype\":\"BF16\",\"shape\":[%d],\"data_offsets\":[%d,%d]},"
             "\"d\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[%d,%d]}}",
             n, 1 + 2 * n, n, 1 + 2 * n, 1 + 4 * n, 1 + 4 * n, 9 + 4 * n);
    const uint64_t length = strlen(header);
    const double pi = 3.14159265358979;
    strbuf_add_bytes(&t, &length, 8);
    strbuf_add(&t, "%sx", header);
    for (int i = 0; i < 2 * n; i++) {
        const uint16_t half = (uint16_t)i;
        strbuf_add_bytes(&t, &half, 2);
    }
    strbuf_add_bytes(&t, &pi, 8);
    tensors *file = tensors_open(check_file("halves.safetensors", t.at, t.n));
    strbuf_free(&t);
    if (!CHECK(file, "%s", slam_error())) return;
    CHECK(tensor_floats(tensors_find(file, "h"), got, 0, n), "%s", slam_error());
    for (int i = 0; i < n; i++) {
        const int exponent = i >> 10 & 31, fraction = i & 1023;
        float expected = (float)(exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
        if (exponent == 31) expected = fraction ? NAN : INFINITY;
        if (i & 0x8000) expected = -expected;
        CHECK(got[i] == expected || (isnan(got[i]) && isnan(expected)), "F16 0x%04x became %g, expected %g", i,
              (double)got[i], (double)expected);
        CHECK(isnan(expected) || !signbit(got[i]) == !(i & 0x8000), "F16 0x%04x has the wrong sign", i);
    }
    CHECK(tensor_floats(tensors_find(file, "b"), got, 0, n), "%s", slam_error());
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &got[i], 4);
        CHECK(bits == (uint32_t)i << 16, "BF16 0x%04x became 0x%08x", i, bits);
    }
    CHECK(tensor_floats(tensors_find(file, "d"), got, 0, 1) && got[0] == (float)pi, "%g", (double)got[0]);
    check_fails(tensor_floats(tensors_find(file, "odd"), got, 0, 1), "tensor 'odd' is U8, expected");
    tensors_close(file);
    free(got);
}

/* An entry of a header. */
#define ENTRY(name, dtype, shape, offsets)                                                                             \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define A ENTRY("a", "F32", "[2,3]", "[0,24]")
static void test_tensors_damaged(void) {
    static const struct {
        size_t data;
        const char *header, *error;
    } bad[] = {
        {23, "{" A "}", "tensor 'a' has no valid data_offsets, expected two up to 23"},
        {25, "{" A "}", "found 25 bytes of data, expected tensors of 24"},
        {24, "{" A "," ENTRY("b", "F32", "[1]", "[20,24]") "}", "a gap or overlap before tensor 'b'"},
        {32, "{" A "," ENTRY("b", "F32", "[1]", "[28,32]") "}", "a gap or overlap before tensor 'b'"},
        {8, "{" ENTRY("b", "F32", "[1]", "[4,8]") "}", "a gap or overlap before tensor 'b'"},
        {8, "{" ENTRY("b", "F32", "[1]", "[8,4]") "}", "no valid data_offsets"},
        {8, "{" ENTRY("b", "F32", "[1]", "[-4,0]") "}", "no valid data_offsets"},
        {8, "{" ENTRY("b", "F32", "[1]", "[0,18446744073709551620]") "}", "no valid data_offsets"},
        {8, "{" ENTRY("b", "F32", "[1]", "[0,9007199254740992]") "}", "no valid data_offsets"},
        {8, "{" ENTRY("b", "F32", "[1]", "[0,4,8]") "}", "no valid data_offsets"},
        {8, "{" ENTRY("b", "F32", "[1]", "[0]") "}", "no valid data_offsets"},
        {8, "{\"b\":{\"dtype\":\"F32\",\"shape\":[1]}}", "no valid data_offsets"},
        {8, "{" ENTRY("b", "F32", "[3]", "[0,8]") "}", "tensor 'b' has 8 bytes, expected 3 numbers of F32"},
        {8, "{" ENTRY("b", "F16", "[2]", "[0,8]") "}", "tensor 'b' has 8 bytes, expected 2 numbers of F16"},
        {8, "{" ENTRY("b", "F33", "[2]", "[0,8]") "}", "tensor 'b' has dtype F33"},
        {8, "{\"b\":{\"dtype\":3,\"shape\":[2],\"data_offsets\":[0,8]}}", "tensor 'b' has dtype missing"},
        {8, "{\"b\":{\"shape\":[2],\"data_offsets\":[0,8]}}", "tensor 'b' has dtype missing"},
        {8, "{\"b\":7}", "tensor 'b' has dtype missing"},
        {8, "{\"b\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", "no valid shape"},
        {8, "{" ENTRY("b", "F32", "[-2]", "[0,8]") "}", "no valid shape"},
        {8, "{" ENTRY("b", "F32", "[1.5]", "[0,8]") "}", "no valid shape"},
        {8, "{" ENTRY("b", "F32", "[\"2\"]", "[0,8]") "}", "no valid shape"},
        {4, "{" ENTRY("b", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", "no valid shape, expected up to 8"},
        {0, "{" ENTRY("b", "F32", "[4294967296,4294967296,4294967296]", "[0,0]") "}",
         "has 0 bytes, expected 79228162514264337593"},
        {0, "{" ENTRY("b", "U8", "[4294967296,4294967296]", "[0,0]") "}",
         "has 0 bytes, expected 18446744073709551616 numbers"},
        {24, "{" A "," A "}", "a gap or overlap before tensor 'a'"},
        {28, "{" A "," ENTRY("b", "F32", "[1]", "[20,24]") "}",
         "a gap or overlap before tensor 'b'"}, // the sum is right
        {24, "{" A, "found the end"},
        {0, "[]", "10 bytes, expected a header of 2: truncated, or not safetensors"},
        {0, " {}", "11 bytes, expected a header of 3"},
        {0, "", "8 bytes, expected a header of 0"},
    };
    if (TEST("safetensors: damaged headers are errors")) {
        for (size_t i = 0; i < COUNT(bad); i++)
            check_fails(tensors_open(tensor_file("bad.safetensors", bad[i].header, bad[i].data)), bad[i].error);
        static const unsigned char huge[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, '{', '}'};
        static const unsigned char longer[16] = {200, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
        check_fails(tensors_open(check_file("huge", huge, 16)), "header of 18446744073709551616");
        check_fails(tensors_open(check_file("longer", longer, 16)), "16 bytes, expected a header of 200");
        check_fails(tensors_open(check_file("short", longer, 7)), "7 bytes, expected a header of 0");
        check_fails(tensors_open(check_file("empty", longer, 0)), "0 bytes, expected a header of 0");
        check_fails(tensors_open(check_path("absent")), "cannot be opened");
    }
    if (TEST("safetensors: spaces after the header, tensors in another order, no tensors")) {
        tensors *t = tensors_open(tensor_file(
            "order.safetensors",
            "{" ENTRY("b", "U8", "[2]", "[24,26]") "," ENTRY("z", "U8", "[5,0]", "[24,24]") "," A "}      ", 26));
        CHECK(t && t->n == 3 && ((const char *)tensors_find(t, "b")->data)[1] == 25 && tensors_find(t, "z")->count == 0,
              "%s", slam_error());
        tensors_close(t);
        t = tensors_open(tensor_file("none.safetensors", "{}", 0));
        CHECK(t && t->n == 0 && !tensors_find(t, "a"), "%s", slam_error());
        tensors_close(t);
    }
}

static void test_tensors_folders(void) {
    static const invalid indices[] = {
        {"{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-3.safetensors\"}}",
         "model.safetensors.index.json: tensor 'b' is in 'm-3.safetensors', expected a file"},
        {"{\"weight_map\": {\"b\": \"../outside.safetensors\"}}",
         "tensor 'b' is in '../outside.safetensors', expected a file in the same folder"},
        {"{\"weight_map\": {\"b\": \"..\"}}", "expected a file in the same folder"},
        {"{\"weight_map\": {\"b\": \"/etc/passwd\"}}", "expected a file in the same folder"},
        {"{\"weight_map\": {\"b\": \"\"}}", "expected a file in the same folder"},
        {"{\"weight_map\": {\"b\": 7}}", "expected a file in the same folder"},
        {"{\"weight_map\": {\"b\": null}}", "expected a file in the same folder"},
        {"{\"weight_map\": [1]}", "'weight_map' is an array, expected an object"},
        {"{}", "'weight_map' is missing"},
        {"[]", "'weight_map' is missing"},
        {"{\"weight_map\": {\"a\": \"m-1", "closing quote"},
    };
    if (!TEST("safetensors: folders, shards, and invalid indices")) return;
    static const char index[] = "model/model.safetensors.index.json";
    const float a[2] = {1, 2}, b[3] = {3, 4, 5};
    const tensor both[2] = {{"a", DTYPE_F32, 1, {2}, a, 2, NULL}, {"b", DTYPE_F32, 1, {3}, b, 3, NULL}};
    char folder[1024];
    float got[3] = {0};
    snprintf(folder, sizeof folder, "%s", check_path("model"));
    if (!CHECK(remove_tree(folder) && folder_create(folder), "%s", slam_error())) return;
    check_fails(tensors_open(folder), "expected model.safetensors or model.safetensors.index.json");
    text_file("model/pytorch_model.bin", "PK");
    check_fails(tensors_open(folder), "found only pytorch_model.bin");
    check_fails(tensors_open(folder), "python3 -c \"import torch");
    CHECK(strstr(slam_error(), "{'format': 'pt'})\""), "the advice is cut: %s", slam_error());
    CHECK(tensors_write(check_path("model/m-1.safetensors"), both, 1, NULL) &&
              tensors_write(check_path("model/m-2.safetensors"), both + 1, 1, NULL) &&
              tensors_write(check_path("outside.safetensors"), both + 1, 1, NULL),
          "%s", slam_error());
    text_file(index, "{\"metadata\": {}, \"weight_map\": {\"b\": \"m-2.safetensors\", \"a\": \"m-1.safetensors\"}}");
    tensors *t = tensors_open(folder);
    if (CHECK(t && t->n == 2, "%s", slam_error())) {
        CHECK(tensor_floats(tensors_find(t, "b"), got, 0, 3) && got[2] == 5, "%g", (double)got[2]);
        CHECK(tensor_floats(tensors_find(t, "a"), got, 0, 2) && got[1] == 2, "%g", (double)got[1]);
        CHECK(strstr(tensors_find(t, "b")->file, "model/m-2.safetensors"), "%s", tensors_find(t, "b")->file);
    }
    tensors_close(t);
    for (size_t i = 0; i < COUNT(indices); i++) {
        text_file(index, indices[i].text);
        check_fails(tensors_open(folder), indices[i].error);
    }
    CHECK(tensors_write(check_path("model/m-2.safetensors"), both, 2, NULL), "%s", slam_error());
    text_file(index, "{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-2.safetensors\"}}");
    check_fails(tensors_open(folder), "tensor 'a' is also in");
    CHECK(tensors_write(check_path("model/model.safetensors"), both, 2, NULL), "%s", slam_error());
    t = tensors_open(folder);
    CHECK(t && t->n == 2 && strstr(t->at[0].file, "model/model.safetensors"), "%s", slam_error());
    tensors_close(t);
}

/* ---- npy ---- */

/* A file of that version, dictionary and data. */
static const char *npy_file(int version, const char *dictionary, const void *data, size_t n) {
    char bytes[600] = "\x93NUMPY";
    const size_t start = version == 1 ? 10 : 12, length = strlen(dictionary);
    bytes[6] = (char)version;
    bytes[8] = (char)length;
    bytes[9] = (char)(length >> 8);
    memcpy(bytes + start, dictionary, length);
    if (n) memcpy(bytes + start + length, data, n);
    return check_file("x.npy", bytes, start + length + n);
}

#define NPY(descr, order, shape) "{'descr': " descr ", 'fortran_order': " order ", 'shape': " shape ", }"
static void test_npy(void) {
    static const char *const good[] = {NPY("'<f4'", "False", "(2, 3)") "          \n",
                                       NPY("'<f8'", "False", "(2, 3)") "          \n"};
    static const char header[] = "expected float32 or float64, row order, two dimensions";
    static const invalid bad[] = {
        {NPY("'<i8'", "False", "(2, 3)"),
         "found {'descr': '<i8', 'fortran_order': False, 'shape': (2, 3), }, expected float32"},
        {NPY("'>f4'", "False", "(2, 3)"), header},
        {NPY("[('a', '<f4')]", "False", "(2, 3)"), header},
        {NPY("'<f4'", "True", "(2, 3)"), header},
        {NPY("'<f4'", "Maybe", "(2, 3)"), header},
        {NPY("'<f4'", "False", "(6,)"), header},
        {NPY("'<f4'", "False", "()"), header},
        {NPY("'<f4'", "False", "(1, 2, 3)"), header},
        {NPY("'<f4'", "False", "(2, 4)"), "found 24 bytes of data, expected 2 x 4 float32"},
        {NPY("'<f4'", "False", "(4294967296, 4294967296)"), "found 24 bytes of data, expected 4294967296 x"},
        {NPY("'<f4'", "False", "(2, 4611686018427387904)"), header},
        {NPY("'<f4'", "False", "(99999999999999999999, 1)"), header},
        {NPY("'<f4'", "False", "(-2, -3)"), "24 bytes of data"},
        {"{'descr': '<f4', 'shape': (2, 3), }", header},
        {"{'fortran_order': False, 'shape': (2, 3), }", header},
        {"{'descr': '<f4', 'fortran_order': False, }", header},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}", header},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)", header},
        {NPY("'<f4'", "False", "(2, 3)") " x", header},
        {"x" NPY("'<f4'", "False", "(2, 3)"), header},
        {"", header},
    };
    const float f[6] = {1, 2, 3, 4, 5, -6.5f}, infinite[6] = {0, 0, 0, 0, INFINITY, 0};
    const double d[6] = {1, 2, 3, 4, 5, -6.5}, large[6] = {0, 0, 0, 1e300, 0, 0};
    float *got = NULL;
    size_t rows = 0, cols = 0;
    if (TEST("npy: what is written is read back")) {
        CHECK(npy_write(check_path("w.npy"), f, 2, 3) && npy_read(check_path("w.npy"), &got, &rows, &cols), "%s",
              slam_error());
        CHECK(got && rows == 2 && cols == 3 && memcmp(got, f, sizeof f) == 0, "%zu x %zu", rows, cols);
        free(got);
        check_fails(npy_write(check_path("no/such/w.npy"), f, 2, 3), "cannot be written");
        check_fails(npy_read(check_path("no/such/w.npy"), &got, &rows, &cols), "cannot be opened");
    }
    if (TEST("npy: float32 and float64")) {
        for (int i = 0; i < 2; i++) {
            const char *path = npy_file(1, good[i], i ? (const void *)d : f, i ? sizeof d : sizeof f);
            got = NULL;
            CHECK(npy_read(path, &got, &rows, &cols), "%s", slam_error());
            CHECK(got && rows == 2 && cols == 3 && memcmp(got, f, sizeof f) == 0, "header %d", i);
            free(got);
        }
    }
    if (!TEST("npy: anything but a matrix of finite numbers is an error")) return;
    for (size_t i = 0; i < COUNT(bad); i++)
        check_fails(npy_read(npy_file(1, bad[i].text, f, sizeof f), &got, &rows, &cols), bad[i].error);
    check_fails(npy_read(npy_file(1, good[0], infinite, sizeof infinite), &got, &rows, &cols),
                "row 1 has inf, expected finite");
    check_fails(npy_read(npy_file(1, good[1], large, sizeof large), &got, &rows, &cols), "row 1 has inf");
    check_fails(npy_read(npy_file(4, good[0], f, sizeof f), &got, &rows, &cols), "is not an .npy file of version 1");
    check_fails(npy_read(npy_file(1, good[0], f, sizeof f - 1), &got, &rows, &cols), "23 bytes of data");
    check_fails(npy_read(npy_file(1, "{\0}", f, 3), &got, &rows, &cols), header);
    check_fails(npy_read(check_file("x.npy", "\x80\x04\x95 a pickled object", 20), &got, &rows, &cols),
                "is not an .npy file");
    check_fails(npy_read(check_file("x.npy", "\x93NUMPY\x01\x00\xff\xff{}", 12), &got, &rows, &cols), "is truncated");
    check_fails(npy_read(check_file("x.npy", "", 0), &got, &rows, &cols), "is not an .npy file");
}

/* ---- token shards ---- */

static int write_shard(const char *path, const uint16_t *tokens, size_t n, int V, uint32_t fingerprint) {
    append_file f;
    return append_open(&f, path) && append_resume(&f, 0) && shard_write_header(&f, V, fingerprint) &&
           append_write(&f, tokens, 2 * n) && shard_write_header(&f, V, fingerprint) && append_close(&f);
}

static void test_shards(void) {
    static const uint16_t tokens[7] = {1, 5, 9, 501, 65535, 2, 1};
    const char *path = check_path("x.bin");
    append_file f;
    shard s;
    if (TEST("shards: what is written is read back")) {
        CHECK(write_shard(path, tokens, 7, 502, 0xfedcba98u) && shard_open(&s, path), "%s", slam_error());
        CHECK(s.n == 7 && s.V == 502 && s.fingerprint == 0xfedcba98u, "%zu tokens, V %d", s.n, s.V);
        CHECK(memcmp(s.tokens, tokens, sizeof tokens) == 0 && s.map.size == 1024 + 14, "%zu bytes", s.map.size);
        file_map_close(&s.map);
        file_map_close(&s.map);
        CHECK(write_shard(path, NULL, 0, 0, 0) && shard_open(&s, path) && s.n == 0 && s.V == 0, "%s", slam_error());
        file_map_close(&s.map);
        CHECK(append_open(&f, path), "%s", slam_error());
        f.bytes = 1024 + 2 * ((uint64_t)INT32_MAX + 1);
        check_fails(shard_write_header(&f, 0, 0), "x.bin: has 2147483648 tokens, expected at most 2147483647");
        CHECK(append_close(&f), "%s", slam_error());
    }
    if (TEST("shards: a kill loses what was not synced, and a resumed shard is the same")) {
        unlink(path);
        CHECK(append_open(&f, path) && f.bytes == 0 && append_resume(&f, 0) && shard_write_header(&f, 502, 7), "%s",
              slam_error());
        CHECK(append_write(&f, tokens, 6) && append_sync(&f), "%s", slam_error());
        const uint64_t noted = f.bytes;
        append_file again;
        check_fails(append_open(&again, path), "x.bin: is being written by another process");
        CHECK(append_write(&f, tokens, 14) && append_close(&f), "%s", slam_error());
        check_fails(shard_open(&s, path), "found 20 bytes of tokens, expected 2 for each of the header's 0");
        CHECK(append_open(&f, path) && f.bytes == 1024 + 20 && noted == 1024 + 6, "%s", slam_error());
        check_fails(append_resume(&f, 1024 + 21), "x.bin: has 1044 bytes, expected the journal's 1045");
        CHECK(append_resume(&f, noted) && append_write(&f, tokens + 3, 8), "%s", slam_error());
        CHECK(shard_write_header(&f, 502, 7) && append_close(&f), "%s", slam_error());
        CHECK(append_close(&f), "closing twice");
        CHECK(shard_open(&s, path) && s.n == 7 && s.V == 502 && s.fingerprint == 7 && !memcmp(s.tokens, tokens, 14),
              "%s", slam_error());
        file_map_close(&s.map);
        check_fails(append_open(&f, check_path("no/folder/x.bin")), "cannot be written");
        if (access("/dev/full", W_OK) == 0) {
            f.f = fopen("/dev/full", "wb");
            f.path = string_copy("full.bin");
            check_fails(append_write(&f, tokens, 14) && append_sync(&f), "full.bin: cannot be written: No space");
            check_fails(append_close(&f), "full.bin: cannot be written");
        }
    }
    if (!TEST("shards: a header that does not fit the file is an error")) return;
    int32_t file[260] = {SHARD_MAGIC, 1, 8, 502, 0};
    const struct {
        int word, value;
        size_t size;
        const char *error;
    } bad[] = {{0, 20240801, sizeof file, "starts with 20240801 and 1, expected a token shard (20240520 and 1)"},
               {1, 2, sizeof file, "starts with 20240520 and 2, expected"},
               {2, 9, sizeof file, "found 16 bytes of tokens, expected 2 for each of the header's 9"},
               {2, 7, sizeof file, "header's 7"},
               {2, -8, sizeof file, "header's -8"},
               {2, INT32_MAX, sizeof file, "header's 2147483647"},
               {3, -1, sizeof file, "the vocabulary is -1, expected 0 to 65536"},
               {3, 65537, sizeof file, "the vocabulary is 65537"},
               {4, 1, sizeof file - 1, "found 15 bytes of tokens"},
               {4, 1, 1023, "expected a token shard"},
               {4, 1, 0, "expected a token shard"}};
    for (size_t i = 0; i < COUNT(bad); i++) {
        const int32_t kept = file[bad[i].word];
        file[bad[i].word] = bad[i].value;
        check_fails(shard_open(&s, check_file("bad.bin", file, bad[i].size)), bad[i].error);
        file[bad[i].word] = kept;
    }
    check_fails(shard_open(&s, check_path("absent.bin")), "cannot be opened");
}

/* ---- CSV ---- */

static void test_csv(void) {
    static const char text[] = "\xef\xbb\xbfid,text,last\r\n1,\"a \"\"b\"\"\r\nc, d\",x\r\n\r\n2,,\"\"\n,\"\",y z\r";
    static const char *const cells[] = {"id", "text", "last", "1", "a \"b\"\r\nc, d", "x", "2", "", "", "", "", "y z"};
    static const size_t lines[] = {1, 2, 5, 6};
    static const invalid bad[] = {
        {"a,b\n1\n", "bad.csv:2: found 1 fields, expected 2"},
        {"a,b\n\n\n1,2,3\n", "bad.csv:4: found 3 fields, expected 2"},
        {"a,b\n1,\"x\ny\n", "bad.csv:2: found no end of a field in quotes"},
        {"a,b\n1,\"x\"y\n", "bad.csv:2: found 'y' after a closing quote, expected a comma"},
        {"a,b\n1,\"x\"\"", "bad.csv:2: found no end"},
        {"a,b\n", "bad.csv: found 1 rows"},
        {"", "bad.csv: found 0 rows"},
        {"\n\n", "bad.csv: found 0 rows"},
    };
    csv c;
    if (TEST("csv: quotes, line ends, empty fields, a byte order mark")) {
        if (!CHECK(csv_read(&c, text_file("x.csv", text)), "%s", slam_error())) return;
        CHECK(c.rows == 4 && c.cols == 3 && csv_column(&c, "last") == 2 && csv_column(&c, "x") == (size_t)-1,
              "%zu rows", c.rows);
        for (size_t i = 0; i < COUNT(cells) && c.rows == 4; i++)
            CHECK(!strcmp(c.cells[i], cells[i]) && c.lines[i / 3] == lines[i / 3], "cell %zu, line %zu: '%s'", i,
                  c.lines[i / 3], c.cells[i]);
        csv_free(&c);
    }
    if (!TEST("csv: anything but a table is an error")) return;
    for (size_t i = 0; i < COUNT(bad); i++) check_fails(csv_read(&c, text_file("bad.csv", bad[i].text)), bad[i].error);
    check_fails(csv_read(&c, check_file("bad.csv", "a,b\n1,\0002\n", 9)), "found a zero byte, expected a table");
    check_fails(csv_read(&c, check_path("absent.csv")), "cannot be opened");
    csv_free(&c);
}

/* ---- unit lines ---- */

static void test_units(void) {
    static const invalid bad[] = {
        {"{\"units\": [3, 49", "bad.jsonl:2: byte 17: found the end"},
        {"{\"units\": [3, 49]} {}", "found '{', expected nothing more"},
        {"{\"units\": [3, -1]}", "bad.jsonl:2: 'units' has -1, expected whole numbers from 0 on"},
        {"{\"units\": [3.5]}", "'units' has 3.5"},
        {"{\"units\": [2147483648]}", "'units' has 2147483648"},
        {"{\"units\": [1e300]}", "'units' has 1e300"},
        {"{\"units\": [\"3\"]}", "'units' has a string"},
        {"{\"units\": \"3\"}", "'units' is a string, expected an array"},
        {"{\"units\": null}", "found an object, expected 'units' or 'audio_repr'"},
        {"{\"units\": [3, 4], \"duration\": [1]}", "bad.jsonl:2: has 1 durations, expected 2"},
        {"{\"units\": [3], \"duration\": [-1]}", "'duration' has -1"},
        {"{\"units\": [3], \"duration\": 7}", "'duration' is 7, expected an array"},
        {"{\"audio_repr\": 7}", "unit 1 is '7', expected <Un"},
        {"{\"audio_repr\": [\"<Un3>\"]}", "unit 1 is 'an array', expected <Un"},
        {"{\"audio_repr\": \"<Un3><Un4\"}", "unit 2 is '<Un4'"},
        {"{\"audio_repr\": \"<Un3> <Un4>\"}", "unit 2 is ' <Un4>'"},
        {"{\"audio_repr\": \"<Un>\"}", "unit 1 is '<Un>'"},
        {"{\"audio_repr\": \"<Un-3>\"}", "unit 1 is '<Un-3>'"},
        {"{\"audio_repr\": \"<Un99999999999>\"}", "unit 1 is"},
        {"{\"audio_repr\": \"<\"}", "unit 1 is '<'"},
        {"{\"name\": 7}", "found an object, expected 'units' or 'audio_repr'"},
        {"[3, 4]", "found an array, expected 'units'"},
        {"7", "found 7, expected 'units'"},
        {"{\"units\": [1], \"file_name\": \"\xff\"}", "UTF-8"},
        {"garbage", "found 'g', expected a value"},
    };
    units_reader r;
    slam_units u = ZERO;
    if (TEST("units: features and tokens, line by line")) {
        static const struct {
            const char *name;
            size_t n, line;
            int units[3], duration;
            double start, end;
        } lines[] = {{"a b.wav", 3, 1, {3, 49, 7}, 2, 0, 0},
                     {"\xc3\xa9.wav", 3, 4, {3, 0, 499}, 0, 0, 0},
                     {"", 0, 5, {0}, 0, 0, 0},
                     {"", 1, 6, {9, 0, 0}, 0, 60.5, 118.25},
                     {"", 1, 7, {9, 0, 0}, 0, 0, 0},
                     {"", 1, 8, {INT_MAX, 0, 0}, 0, 0, 0}};
        const char *text =
            "{\"units\": [3, 49, 7], \"duration\": [1, 2, 1], \"file_name\": \"a b.wav\"}\r\n\n \t\r\n"
            "{\"file_name\": \"\\u00e9.wav\", \"audio_repr\": \"<Un3><Un0><Un499>\", \"more\": {}}\n"
            "{\"units\": []}\n{\"start\": 60.5, \"audio_repr\": \"<Un9>\", \"end\": 118.25}\n"
            "{\"start\": 1, \"audio_repr\": \"<Un9>\", \"end\": \"no number\"}\n{\"units\": [2147483647], \"duration\": null}";
        CHECK(units_open(&r, text_file("u.jsonl", text)), "%s", slam_error());
        for (size_t i = 0; i < COUNT(lines); i++) {
            CHECK(units_next(&r, &u) == 1 && r.line == lines[i].line && u.n == lines[i].n, "%s", slam_error());
            CHECK(!strcmp(u.name, lines[i].name) && (u.duration ? u.duration[1] : 0) == lines[i].duration, "line %zu",
                  r.line);
            CHECK(u.start == lines[i].start && u.end == lines[i].end, "%g to %g", u.start, u.end);
            for (size_t k = 0; k < u.n && k < 3; k++) CHECK(u.unit[k] == lines[i].units[k], "unit %d", u.unit[k]);
        }
        CHECK(units_next(&r, &u) == 0 && units_next(&r, &u) == 0, "after the end");
        units_close(&r);
        json *root = parse("\"<Un3><Un12>\"");
        CHECK(units_from_json(root, "x", &u) && u.n == 2 && u.unit[1] == 12 && !u.name[0], "%s", slam_error());
        json_free(root);
    }
    if (TEST("units: what is written is read back; long lines")) {
        static const size_t lengths[] = {100000, 0, 1, 300000, 17};
        strbuf t = ZERO, copy = ZERO;
        uint64_t state = check_state.seed;
        for (int i = 0; i < 10; i++) {
            slam_units line = ZERO;
            line.n = lengths[i % 5];
            line.unit = NEW(int, line.n);
            line.duration = i % 2 ? NULL : NEW(int, line.n);
            line.name = string_copy("x\"y.wav");
            line.start = i % 3 ? 0.25 : 0;
            line.end = i % 3 ? 0.5 * i : 0;
            for (size_t k = 0; k < line.n; k++) {
                line.unit[k] = (int)rng_below(&state, 500);
                if (line.duration) line.duration[k] = (int)rng_below(&state, 1000000);
            }
            strbuf_add_units(&t, &line, i >= 5);
            strbuf_add(&t, "\n");
            slam_units_free(&line);
        }
        CHECK(units_open(&r, check_file("long.jsonl", t.at, t.n)), "%s", slam_error());
        for (int i = 0; i < 10; i++) {
            CHECK(units_next(&r, &u) == 1 && u.n == lengths[i % 5], "%s", slam_error());
            strbuf_add_units(&copy, &u, i >= 5);
            strbuf_add(&copy, "\n");
        }
        CHECK(units_next(&r, &u) == 0, "more than ten lines");
        CHECK(copy.n == t.n && memcmp(copy.at, t.at, t.n) == 0, "the text differs");
        units_close(&r);
        strbuf_free(&copy);
        strbuf_free(&t);
        int numbers[] = {3, 49, 0}, durations[] = {1, 2, 2147483647};
        slam_units line = {numbers, durations, 3, 0, 0, 1, 2.5, (char *)(uintptr_t) "a.wav"};
        strbuf_add_units(&t, &line, 0);
        strbuf_add_units(&t, &line, 1);
        CHECK(
            !strcmp(
                t.at,
                "{\"units\": [3, 49, 0], \"duration\": [1, 2, 2147483647], \"file_name\": \"a.wav\", \"start\": 1, \"end\": 2.5}"
                "{\"file_name\": \"a.wav\", \"audio_repr\": \"<Un3><Un49><Un0>\", \"start\": 1, \"end\": 2.5}"),
            "%s", t.at);
        strbuf_free(&t);
    }
    if (!TEST("units: invalid lines are errors with file and line")) return;
    for (size_t i = 0; i < COUNT(bad); i++) {
        char text[200];
        snprintf(text, sizeof text, "{\"units\": [1]}\n%s\n", bad[i].text);
        CHECK(units_open(&r, text_file("bad.jsonl", text)) && units_next(&r, &u) == 1, "%s", slam_error());
        check_fails(units_next(&r, &u) >= 0, bad[i].error);
        CHECK(strstr(slam_error(), "bad.jsonl:2: "), "%s", slam_error());
        units_close(&r);
    }
    const char *endless = check_path("endless.jsonl");
    const int made = open(endless, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(made >= 0 && ftruncate(made, 200000000) == 0 && close(made) == 0, "%s: %s", endless, strerror(errno));
    CHECK(units_open(&r, endless), "%s", slam_error());
    check_fails(units_next(&r, &u) >= 0, "endless.jsonl:1: found 200000000 bytes, expected at most 100000000");
    units_close(&r);
    unlink(endless);
    check_fails(units_open(&r, check_path("absent.jsonl")), "cannot be opened");
    check_fails(units_open(&r, check_path("")), "is a folder, expected a file");
    slam_units_free(&u);
}

/* ---- every reader against every damage ---- */

static float sink; // so that what was read is used

static int read_json(file_map *map) {
    json *root = json_parse((const char *)map->data, map->size, "damaged");
    json_free(root);
    return root != NULL;
}

static int read_tensors(file_map *map) {
    tensors *t = NEW(tensors, 1);
    const int ok = tensors_add(t, "damaged", map);
    t->file[0].map.size = 0; // not mapped: read_copy frees it
    for (size_t i = 0; ok && i < t->n; i++) {
        float number;
        for (size_t k = 0; k < t->at[i].count && tensor_floats(&t->at[i], &number, k, 1); k++) sink = number;
    }
    tensors_close(t);
    return ok;
}

static int read_npy(file_map *map) {
    float *data = NULL;
    size_t rows, cols;
    const int ok = npy_parse(map, "damaged", &data, &rows, &cols);
    if (ok && rows && cols) sink = data[rows * cols - 1];
    if (ok) free(data);
    return ok;
}

static int read_shard(file_map *map) {
    shard s = ZERO;
    s.map = *map;
    const int ok = shard_parse(&s, "damaged");
    for (size_t i = 0; ok && i < s.n; i++) sink = s.tokens[i];
    return ok;
}

static int parse_unit_lines(file_map *map) {
    slam_units u = ZERO;
    json *root = json_parse((const char *)map->data, map->size, "damaged");
    const int ok = root && units_from_json(root, "damaged", &u);
    for (size_t i = 0; ok && i < u.n; i++) sink = (float)(u.unit[i] + (u.duration ? u.duration[i] : 0));
    json_free(root);
    slam_units_free(&u);
    return ok;
}

/* Reads a copy of n bytes. An error has a message. */
static int read_copy(const char *name, const void *bytes, size_t n, int (*reader)(file_map *)) {
    file_map map = ZERO;
    unsigned char *copy = NEW(unsigned char, n);
    if (n) memcpy(copy, bytes, n);
    map.data = (const unsigned char *)realloc(copy, n ? n : 1); // exactly its size
    map.size = n;
    set_error("%s", "");
    const int ok = reader(&map);
    CHECK(ok || slam_error()[0], "%s: an error without a message", name);
    free((void *)(uintptr_t)map.data);
    return ok;
}

/* A small file: each of its beginnings must be an error, and of 20000 copies with one to four bits or bytes changed, some. */
static void check_damage(const char *name, const void *bytes, size_t n, int (*reader)(file_map *)) {
    uint64_t state = check_state.seed;
    int errors = 0;
    CHECK(read_copy(name, bytes, n, reader), "%s, undamaged: %s", name, slam_error());
    for (size_t k = 0; k < n; k++)
        CHECK(!read_copy(name, bytes, k, reader), "%s, %zu of %zu bytes, was read", name, k, n);
    unsigned char *copy = NEW(unsigned char, n);
    for (int round = 0; round < 20000; round++) {
        memcpy(copy, bytes, n);
        for (uint64_t change = 1 + rng_below(&state, 4); change-- > 0;) {
            const size_t at = rng_below(&state, rng_below(&state, 2) ? n : n < 64 ? n : 64); // more often in the header
            if (rng_below(&state, 4)) copy[at] ^= (unsigned char)(1u << rng_below(&state, 8));
            else copy[at] = (unsigned char)rng_next(&state);
        }
        errors += !read_copy(name, copy, n, reader);
    }
    CHECK(errors > 0 && errors < 20000, "%d of 20000 are errors", errors);
    free(copy);
}

static void test_damage(void) {
    static const float numbers[6] = {1, 2, 3, 4, 5, 6};
    static const uint16_t tokens[5] = {1, 7, 8, 9, 1};
    static const char config[] =
        "{\"model_type\": \"qwen2\", \"hidden_size\": 64, \"eps\": 1e-06, \"list\": [1, 2.5, true, null], "
        "\"s\": \"\\u00e9\\ud83d\\ude00\\n\"}";
    static const char features[] = "{\"units\": [3, 49, 7], \"duration\": [1, 2, 1], \"file_name\": \"a.wav\"}";
    static const char repr[] = "{\"audio_repr\": \"<Un3><Un49><Un7>\", \"file_name\": \"a.wav\"}";
    const tensor list[] = {{"a", DTYPE_F32, 2, {2, 3}, numbers, 6, NULL}, {"b", DTYPE_F64, 1, {3}, numbers, 3, NULL}};
    CHECK(tensors_write(check_path("damage.safetensors"), list, 2, NULL), "%s", slam_error());
    CHECK(npy_write(check_path("damage.npy"), numbers, 2, 3), "%s", slam_error());
    CHECK(write_shard(check_path("damage.bin"), tokens, 5, 100, 7), "%s", slam_error());
    text_file("damage.json", config);
    text_file("damage.features", features);
    text_file("damage.tokens", repr);
    const struct {
        const char *name;
        int (*reader)(file_map *);
    } kinds[] = {{"json", read_json}, {"safetensors", read_tensors},  {"npy", read_npy},
                 {"bin", read_shard}, {"features", parse_unit_lines}, {"tokens", parse_unit_lines}};
    for (size_t i = 0; i < COUNT(kinds); i++) {
        file_map map;
        char name[40];
        snprintf(name, sizeof name, "damage.%s", kinds[i].name);
        if (!TEST("damage: %s, cut at every byte, 20000 times changed", kinds[i].name)) continue;
        if (!CHECK(file_map_open(&map, check_path(name)), "%s", slam_error())) continue;
        check_damage(kinds[i].name, map.data, map.size, kinds[i].reader);
        file_map_close(&map);
    }
}

int main(void) {
    test_folders();
    test_json_values();
    test_json_invalid();
    test_json_many_keys();
    test_json_numbers();
    test_json_fields();
    test_json_strings();
    test_tensors_round_trip();
    test_tensors_numbers();
    test_tensors_damaged();
    test_tensors_folders();
    test_npy();
    test_shards();
    test_csv();
    test_units();
    test_damage();
    return check_end();
}
