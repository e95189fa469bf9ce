/* The file formats: what is written is read back, what others write is read right, and whatever a file holds, its reader returns
   a value or a sentence. Under `make test SANITIZE=1` a step beyond a file's bytes would be seen, too: the damaged files lie in
   memory of exactly their size. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"
#include <locale.h>

static json *parse(const char *text) { return json_parse(text, strlen(text), "x.json"); }

/* ---- JSON ---- */

static void test_json_values(void) {
    if (!TEST("json: values of every kind")) return;
    json *root =
        parse(" {\"a\": [1, -2.5e3, true, false, null, \"\"], \"s\": \"q\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC\\ud83d\\ude00\", "
              "\"empty\": {}, \"none\": []}\r\n");
    if (!CHECK(root, "%s", slam_error())) return;
    const json *a = json_get(root, "a"), *s = json_get(root, "s");
    CHECK(root->type == JSON_OBJECT && root->n == 4 && a && a->type == JSON_ARRAY && a->n == 6, "%zu members", root->n);
    const json *m = a->first;
    CHECK(m->type == JSON_NUMBER && m->number == 1 && strcmp(m->string, "1") == 0, "%g", m->number);
    m = m->next;
    CHECK(m->number == -2500 && strcmp(m->string, "-2.5e3") == 0 && m->n == 6, "%s", m->string);
    static const json_type words[] = {JSON_TRUE, JSON_FALSE, JSON_NULL, JSON_STRING};
    for (int i = 0; i < 4; i++) {
        m = m->next;
        CHECK(m->type == words[i], "member %d is of type %d", i + 2, m->type);
    }
    CHECK(m->type == JSON_STRING && m->n == 0 && m->string[0] == 0 && !m->next, "%zu", m->n);
    CHECK(strcmp(s->string, "q\"\\/\b\f\n\r\t\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80") == 0 && s->n == strlen(s->string), "%s",
          s->string);
    CHECK(json_get(root, "empty")->type == JSON_OBJECT && !json_get(root, "empty")->first, "not empty");
    CHECK(json_get(root, "none")->type == JSON_ARRAY && json_get(root, "none")->n == 0, "not empty");
    CHECK(!json_get(root, "absent") && !json_get(a, "x") && !json_get(NULL, "x"), "found what is not there");
    json_free(root);
    json_free(NULL);
}

static void test_json_refused(void) {
    static const char *const bad[][2] = {
        {"", "found the end, expected a value"},
        {" ", "found the end"},
        {"{", "found the end, expected a key"},
        {"[1,2", "found the end, expected ',' or ']'"},
        {"[1,]", "found ']', expected another member"},
        {"{\"a\":1,}", "found '}', expected another member"},
        {"[,1]", "found ',', expected a value"},
        {"{a:1}", "found 'a', expected a key in quotes"},
        {"{\"a\" 1}", "expected ':'"},
        {"{\"a\":1 \"b\":2}", "expected ',' or '}'"},
        {"{\"a\":1]", "expected ',' or '}'"},
        {"[1}", "expected ',' or ']'"},
        {"1 2", "found '2', expected nothing more"},
        {"01", "found '1', expected nothing more"},
        {"-", "expected a digit"},
        {"1.", "expected a digit"},
        {".5", "found '.', expected a value"},
        {"+1", "found '+'"},
        {"1e", "expected a digit"},
        {"1e999", "beyond a double"},
        {"-1e400", "beyond a double"},
        {"NaN", "found 'N'"},
        {"Infinity", "found 'I'"},
        {"True", "found 'T'"},
        {"tru", "found 't', expected a value"},
        {"'a'", "expected a value"},
        {"\"abc", "closing quote"},
        {"\"a\\", "after a backslash"},
        {"\"\\x41\"", "after a backslash"},
        {"\"\\u12G4\"", "found 'G', expected four hexadecimal digits"},
        {"\"\\u12", "four hexadecimal digits"},
        {"\"\\ud800\"", "half of a surrogate pair"},
        {"\"\\ud800\\u0041\"", "half of a surrogate pair"},
        {"\"\\udc00\\ud800\"", "half of a surrogate pair"},
        {"\"\\ud800\\n\"", "second half"},
        {"\"\\u0000\"", "u0000"},
        {"\"a\nb\"", "x.json: byte 3: a bare control character 0x0a"},
        {"\"\x80\"", "not UTF-8"},
        {"\"\xc0\xaf\"", "not UTF-8"},
        {"\"\xed\xa0\x80\"", "not UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "not UTF-8"},
        {"\"\xe2\x82\"", "not UTF-8"},
        {"\xef\xbb\xbf{}", "found byte 0xef"},
        {"/* no */ 1", "found '/'"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "the key 'a' stands twice"},
        {"{\"\\u0061\":1,\"a\":3}", "the key 'a' stands twice"},
        {"\n\n[1,\n  x]", "x.json: line 4, byte 3: found 'x'"},
        {"[1, x]", "x.json: byte 5: found 'x', expected a value"},
    };
    if (!TEST("json: what is no JSON is refused, and the sentence says where")) return;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) check_fails(parse(bad[i][0]), bad[i][1]);
    char deep[201];
    memset(deep, '[', 100);
    memset(deep + 100, ']', 100);
    deep[200] = 0;
    check_fails(parse(deep), "nested deeper than 64");
    json *root = json_parse(deep + 36, 128, "x.json");
    CHECK(root, "%s", slam_error());
    json_free(root);
    char *many = (char *)mem_new(2000, 1);
    memset(many, '7', 1999);
    check_fails(parse(many), "a number of 1999 characters");
    free(many);
    check_fails(json_parse("1\0", 2, "x.json"), "found byte 0x00, expected nothing more");
}

static void test_json_many_keys(void) {
    if (!TEST("json: an object of 100000 keys, and one key of them twice")) return;
    text t = SLAM_ZERO;
    for (int i = 0; i < 100000; i++) text_add(&t, "%c\"k%d\":%d", i ? ',' : '{', i, i);
    text_add(&t, "}");
    json *root = json_parse(t.at, t.n, "x");
    CHECK(root && root->n == 100000 && json_get(root, "k99999")->number == 99999, "%s", slam_error());
    json_free(root);
    t.at[t.n - 1] = ',';
    text_add(&t, "\"k500\":1}");
    check_fails(json_parse(t.at, t.n, "x"), "the key 'k500' stands twice");
    text_free(&t);
}

static void check_number(double x, const char *expected) {
    text t = SLAM_ZERO;
    text_add_number(&t, x);
    json *root = json_parse(t.at, t.n, "x");
    CHECK(root && root->number == x && signbit(root->number) == signbit(x), "%.17g became %s", x, t.at);
    if (expected) CHECK(strcmp(t.at, expected) == 0, "%.17g became %s, expected %s", x, t.at, expected);
    json_free(root);
    text_free(&t);
}

static void test_json_numbers(void) {
    if (TEST("json: a number's shortest spelling")) {
        check_number(0, "0");
        check_number(-0.0, "-0");
        check_number(1, "1");
        check_number(-17, "-17");
        check_number(0.1, "0.1");
        check_number(0.1 + 0.2, "0.30000000000000004");
        check_number(1e-05, "0.00001");
        check_number(1e-06, "1e-6");
        check_number(123456.789, "123456.789");
        check_number(1e15, "1000000000000000");
        check_number(1e16, "1e16");
        check_number(1.5e300, "1.5e300");
        check_number(5e-324, "5e-324");
        check_number(2.2250738585072014e-308, "2.2250738585072014e-308");
        check_number(1.7976931348623157e308, "1.7976931348623157e308");
        check_number(9007199254740993.0, "9007199254740992");
        text t = SLAM_ZERO;
        text_add_number(&t, NAN);
        text_add_number(&t, -INFINITY);
        CHECK(strcmp(t.at, "nullnull") == 0, "%s", t.at);
        text_free(&t);
    }
    if (TEST("json: 50000 doubles of any size survive, and are what strtod reads")) {
        uint64_t state = 1;
        for (int i = 0; i < 50000; i++) {
            char spelled[64];
            uint64_t bits = rng_next(&state);
            double x;
            memcpy(&x, &bits, 8);
            if (isfinite(x)) check_number(x, NULL);
            x = rng_uniform(&state) * pow(10, (double)rng_below(&state, 20));
            check_number(x, NULL);
            snprintf(spelled, sizeof spelled, "%.*g", 1 + (int)rng_below(&state, 25), x);
            json *root = parse(spelled);
            if (root) CHECK(root->number == strtod(spelled, NULL), "%s", spelled);
            json_free(root);
        }
    }
    if (setlocale(LC_NUMERIC, "de_DE.UTF-8") || setlocale(LC_NUMERIC, "fr_FR.UTF-8")) {
        if (TEST("json: numbers do not depend on the locale")) {
            check_number(0.5, "0.5");
            check_number(1.2345678901234567e-300, "1.2345678901234567e-300");
        }
        setlocale(LC_NUMERIC, "C");
    }
}

static void test_json_members(void) {
    if (!TEST("json: members are asked for by kind and range")) return;
    json *root = parse("{\"i\": 7, \"r\": 0.5, \"t\": true, \"s\": \"text\", \"z\": null, \"e\": 1e3, \"h\": 1e300, \"a\": []}");
    long i = -1;
    double r = -1;
    int flag = -1;
    CHECK(json_int(root, "i", "c", 1, 9, &i) && i == 7, "%ld", i);
    CHECK(json_int(root, "e", "c", 1, 9000, &i) && i == 1000, "%ld", i);
    CHECK(json_int(root, "absent", "c", 1, 9, &i) && json_int(root, "z", "c", 1, 9, &i) && i == 1000, "%ld", i);
    CHECK(json_int(NULL, "i", "c", 1, 9, &i), "%s", slam_error());
    check_fails(json_int(root, "i", "c.json", 8, 9, &i), "c.json: 'i' is 7, expected a whole number from 8 to 9");
    check_fails(json_int(root, "r", "c.json", 0, 9, &i), "c.json: 'r' is 0.5, expected a whole number");
    check_fails(json_int(root, "s", "c.json", 0, 9, &i), "c.json: 's' is a string, expected a whole number");
    check_fails(json_int(root, "h", "c.json", LONG_MIN, LONG_MAX, &i), "c.json: 'h' is 1e300, expected a whole number");
    CHECK(json_real(root, "r", "c", 0, 1, &r) && r == 0.5, "%g", r);
    CHECK(json_real(root, "i", "c", 0, 10, &r) && r == 7, "%g", r);
    check_fails(json_real(root, "r", "c.json", 1, 2, &r), "c.json: 'r' is 0.5, expected a number from 1 to 2");
    check_fails(json_real(root, "t", "c.json", 1, 2, &r), "c.json: 't' is true, expected a number");
    CHECK(json_flag(root, "t", "c", &flag) && flag == 1 && json_flag(root, "z", "c", &flag) && flag == 1, "%d", flag);
    check_fails(json_flag(root, "i", "c.json", &flag), "c.json: 'i' is 7, expected true or false");
    check_fails(json_flag(root, "a", "c.json", &flag), "c.json: 'a' is an array, expected true or false");
    CHECK(strcmp(json_text(root, "s", "no"), "text") == 0 && strcmp(json_text(root, "i", "no"), "no") == 0, "%s",
          json_text(root, "s", "no"));
    json_free(root);
    check_fails(json_read(check_path("absent.json")), "cannot be opened");
    check_fails(json_read(check_file("empty.json", "", 0)), "found the end, expected a value");
}

static void test_json_strings(void) {
    if (!TEST("json: any bytes are written as a string that can be read")) return;
    uint64_t state = 3;
    for (int round = 0; round < 2000; round++) {
        char bytes[40];
        size_t n = rng_below(&state, sizeof bytes);
        for (size_t i = 0; i < n; i++) bytes[i] = (char)(1 + rng_below(&state, round % 2 ? 127 : 255));
        bytes[n] = 0;
        text t = SLAM_ZERO;
        text_add_json(&t, bytes);
        json *root = json_parse(t.at, t.n, "x");
        CHECK(root && root->type == JSON_STRING, "%s", slam_error());
        if (root && round % 2) CHECK(strcmp(root->string, bytes) == 0, "'%s' became '%s'", bytes, root->string);
        json_free(root);
        text_free(&t);
    }
    text t = SLAM_ZERO;
    text_add_json(&t, "a\"\\\n\t\x01\xc3\xa9\xff");
    CHECK(strcmp(t.at, "\"a\\\"\\\\\\n\\t\\u0001\xc3\xa9\xef\xbf\xbd\"") == 0, "%s", t.at);
    text_free(&t);
}

/* ---- safetensors ---- */

/* A file of that header and `data` bytes of data (each its own number) at check_path(name). */
static const char *tensor_file_of(const char *name, const char *header, size_t data) {
    text t = SLAM_ZERO;
    const uint64_t n = strlen(header);
    text_add_bytes(&t, (const char *)&n, 8);
    text_add(&t, "%s", header);
    for (size_t i = 0; i < data; i++) {
        const char byte = (char)i;
        text_add_bytes(&t, &byte, 1);
    }
    const char *path = check_file(name, t.at, t.n);
    text_free(&t);
    return path;
}

static void test_tensors_round_trip(void) {
    if (!TEST("safetensors: what is written is read back")) return;
    const float a[6] = {1, -2, 3.5f, -0.0f, INFINITY, 1e-42f}, b[3] = {7, 8, 9};
    const double c[1] = {1e300};
    const int32_t d[2] = {-5, 6};
    const tensor_out list[] = {{"a", 2, {2, 3, 0, 0}, DTYPE_F32, a},
                               {"b.\"quoted\"", 1, {3, 0, 0, 0}, DTYPE_F32, b},
                               {"c", 0, {0, 0, 0, 0}, DTYPE_F64, c},
                               {"d", 1, {2, 0, 0, 0}, DTYPE_I32, d},
                               {"e", 2, {0, 4, 0, 0}, DTYPE_F32, NULL}};
    const char *const metadata[] = {"updates", "20", "note", "a \"b\"", NULL};
    const char *path = check_path("round.safetensors");
    float got[6];
    if (!CHECK(tensors_write(path, list, 5, metadata), "%s", slam_error())) return;
    tensors *t = tensors_open(path);
    if (!CHECK(t, "%s", slam_error())) return;
    CHECK(tensors_count(t) == 5 && strcmp(tensors_at(t, 1)->name, "b.\"quoted\"") == 0, "%zu tensors", tensors_count(t));
    CHECK(t->file[0].map.size % 4 == 0 && (tensors_at(t, 0)->data - t->file[0].map.data) % 8 == 0, "data are not aligned");
    CHECK(strcmp(tensors_metadata(t, "format"), "pt") == 0 && strcmp(tensors_metadata(t, "note"), "a \"b\"") == 0 &&
              strcmp(tensors_metadata(t, "updates"), "20") == 0 && !tensors_metadata(t, "absent"),
          "metadata differ");
    const tensor *found = tensors_find(t, "a");
    CHECK(found && tensor_floats(found, got, 0, 6) && memcmp(got, a, sizeof a) == 0, "a differs");
    CHECK(found && tensor_floats(found, got, 4, 2) && memcmp(got, a + 4, 8) == 0, "a's end differs");
    check_fails(tensor_floats(found, got, 4, 3), "tensor 'a' has 6 numbers, not 3 from 4 on");
    check_fails(tensor_floats(found, got, SIZE_MAX, 2), "tensor 'a' has 6 numbers");
    CHECK(tensor_shape_is(found, 2, 2, 3), "%s", slam_error());
    check_fails(tensor_shape_is(found, 1, 896, 0), "round.safetensors: tensor 'a' has shape (2,3), expected (896)");
    check_fails(tensor_shape_is(found, 2, 2, 4), "has shape (2,3), expected (2,4)");
    CHECK(tensor_floats(tensors_find(t, "c"), got, 0, 1) && isinf(got[0]) && tensor_shape_is(tensors_find(t, "c"), 0, 0, 0), "%g",
          (double)got[0]);
    check_fails(tensor_floats(tensors_find(t, "d"), got, 0, 2), "tensor 'd' is I32, expected F32, F16, BF16 or F64");
    CHECK(tensors_find(t, "e") && tensors_find(t, "e")->count == 0 && tensor_floats(tensors_find(t, "e"), got, 0, 0), "%s",
          slam_error());
    CHECK(!tensors_find(t, "absent") && !tensors_find(t, ""), "found what is not there");
    tensors_close(t);
    check_fails(tensors_write(check_path("no/such/folder.safetensors"), list, 5, NULL), "cannot be written");
    CHECK(!path_is_file(check_path("round.safetensors.part")), "the .part file is still there");
}

static void test_tensors_numbers(void) {
    if (!TEST("safetensors: every F16 and every BF16, at odd addresses, and doubles")) return;
    enum { n = 65536 };
    text t = SLAM_ZERO;
    float *got = (float *)mem_new(n, sizeof *got);
    char header[300];
    snprintf(
        header, sizeof header,
        "{\"odd\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"h\":{\"dtype\":\"F16\",\"shape\":[%d],\"data_offsets\":[1,%d]},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[%d],\"data_offsets\":[%d,%d]},\"d\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[%d,%d]}}",
        n, 1 + 2 * n, n, 1 + 2 * n, 1 + 4 * n, 1 + 4 * n, 9 + 4 * n);
    const uint64_t length = strlen(header);
    const double pi = 3.14159265358979;
    text_add_bytes(&t, (const char *)&length, 8);
    text_add(&t, "%s", header);
    text_add_bytes(&t, "x", 1);
    for (int twice = 0; twice < 2; twice++)
        for (int i = 0; i < n; i++) {
            const uint16_t half = (uint16_t)i;
            text_add_bytes(&t, (const char *)&half, 2);
        }
    text_add_bytes(&t, (const char *)&pi, 8);
    tensors *file = tensors_open(check_file("halves.safetensors", t.at, t.n));
    text_free(&t);
    if (!CHECK(file && got, "%s", slam_error())) return;
    CHECK(tensor_floats(tensors_find(file, "h"), got, 0, n), "%s", slam_error());
    for (int i = 0; i < n; i++) {
        const int exponent = i >> 10 & 31, fraction = i & 1023;
        float expected = (float)(exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
        if (exponent == 31) expected = fraction ? NAN : INFINITY;
        if (i & 0x8000) expected = -expected;
        CHECK(got[i] == expected || (isnan(got[i]) && isnan(expected)), "F16 0x%04x became %g, expected %g", i, (double)got[i],
              (double)expected);
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

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}"
static void test_tensors_damaged(void) {
    static const struct {
        const char *header;
        size_t data;
        const char *sentence;
    } bad[] = {
        {"{" A "}", 23, "tensor 'a' lies at 0 to 24, expected within the file's 23 bytes"},
        {"{" A "}", 25, "its tensors end at byte 24 of 25"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[20,24]}}", 24, "it overlaps another"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[28,32]}}", 32, "there is a gap"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "there is a gap"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,4]}}", 8, "lies at 8 to 4"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 8, "no data_offsets of two whole numbers"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,18446744073709551620]}}", 8, "no data_offsets"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,9007199254740992]}}", 8, "lies at 0 to 9007199254740992"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 8, "no data_offsets"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1]}}", 8, "no data_offsets"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8,
         "tensor 'b' has 8 bytes, expected 3 numbers of F32"},
        {"{\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
         "tensor 'b' has 8 bytes, expected 2 numbers of F16"},
        {"{\"b\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown dtype 'F33'"},
        {"{\"b\":{\"dtype\":3,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "has no dtype"},
        {"{\"b\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "has no dtype"},
        {"{\"b\":7}", 8, "has no dtype"},
        {"{\"b\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "has no shape"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, "a dimension of -2"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,8]}}", 8, "a dimension of 1.5"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]}}", 8, "a dimension of a string"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "beyond any memory"},
        {"{\"b\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "has 9 dimensions"},
        {"{" A "," A "}", 24, "the key 'a' stands twice"},
        {"{\"__metadata__\":[]," A "}", 24, "__metadata__ is an array, expected an object"},
        {"{\"__metadata__\":{\"x\":1}," A "}", 24, "__metadata__ 'x' is 1, expected a string"},
        {"{" A, 24, "found the end"},
        {"[]", 0, "does not begin with '{'"},
        {" {}", 0, "does not begin with '{'"},
        {"", 0, "does not begin with '{'"},
    };
    if (TEST("safetensors: damaged headers are refused")) {
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
            check_fails(tensors_open(tensor_file_of("bad.safetensors", bad[i].header, bad[i].data)), bad[i].sentence);
        static const unsigned char huge[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, '{', '}'};
        check_fails(tensors_open(check_file("huge", huge, 16)),
                    "a header of 18446744073709551615 bytes, expected at most 100000000");
        static const unsigned char longer[16] = {200, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
        check_fails(tensors_open(check_file("longer", longer, 16)), "a header of 200 bytes, but only 8 follow");
        check_fails(tensors_open(check_file("short", longer, 7)), "7 bytes, which is no safetensors file");
        check_fails(tensors_open(check_file("empty", longer, 0)), "0 bytes, which is no safetensors file");
        check_fails(tensors_open(check_path("absent")), "cannot be opened");
    }
    if (TEST("safetensors: blanks after the header, tensors in another order, no tensors")) {
        tensors *t = tensors_open(tensor_file_of(
            "order.safetensors",
            "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[24,26]},\"z\":{\"dtype\":\"U8\",\"shape\":[5,0],\"data_offsets\":[24,24]}," A
            "}      ",
            26));
        CHECK(t && tensors_count(t) == 3 && tensors_find(t, "b")->data[1] == 25 && tensors_find(t, "z")->count == 0, "%s",
              slam_error());
        tensors_close(t);
        t = tensors_open(tensor_file_of("none.safetensors", "{}", 0));
        CHECK(t && tensors_count(t) == 0 && !tensors_find(t, "a"), "%s", slam_error());
        tensors_close(t);
    }
}
#undef A

/* Writes the index of the model folder that is at check_path("model"). */
static void index_of(const char *text) { check_file("model/model.safetensors.index.json", text, strlen(text)); }

static void test_tensors_folders(void) {
    if (!TEST("safetensors: folders, shards and what is wrong with an index")) return;
    const float a[2] = {1, 2}, b[3] = {3, 4, 5};
    const tensor_out first = {"a", 1, {2, 0, 0, 0}, DTYPE_F32, a}, second = {"b", 1, {3, 0, 0, 0}, DTYPE_F32, b};
    const tensor_out both[2] = {first, second};
    char folder[1024];
    snprintf(folder, sizeof folder, "%s", check_path("model"));
    if (!CHECK(remove_tree(folder) && make_folders(folder), "%s", slam_error())) return;
    check_fails(tensors_open(folder), "neither model.safetensors nor model.safetensors.index.json");
    check_file("model/pytorch_model.bin", "PK", 2);
    check_fails(tensors_open(folder), "only pytorch_model.bin is here");
    check_fails(tensors_open(folder), "python3 -c");
    CHECK(tensors_write(check_path("model/m-1.safetensors"), &first, 1, NULL) &&
              tensors_write(check_path("model/m-2.safetensors"), &second, 1, NULL) &&
              tensors_write(check_path("outside.safetensors"), &second, 1, NULL),
          "%s", slam_error());
    index_of("{\"metadata\": {}, \"weight_map\": {\"b\": \"m-2.safetensors\", \"a\": \"m-1.safetensors\"}}");
    tensors *t = tensors_open(folder);
    float got[3];
    CHECK(t && tensors_count(t) == 2 && tensor_floats(tensors_find(t, "b"), got, 0, 3) && got[2] == 5 &&
              tensor_floats(tensors_find(t, "a"), got, 0, 2) && got[1] == 2,
          "%s", slam_error());
    CHECK(t && strstr(tensors_find(t, "b")->file, "model/m-2.safetensors"), "wrong file");
    tensors_close(t);
    index_of("{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-3.safetensors\"}}");
    check_fails(tensors_open(folder), "model.safetensors.index.json: the shard 'm-3.safetensors' that it names is not there");
    index_of("{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-1.safetensors\"}}");
    check_fails(tensors_open(folder), "tensor 'b' is not in 'm-1.safetensors', where it should be");
    index_of("{\"weight_map\": {\"a\": \"m-2.safetensors\", \"b\": \"m-1.safetensors\"}}");
    check_fails(tensors_open(folder), "where it should be");
    index_of("{\"weight_map\": {\"b\": \"../outside.safetensors\"}}");
    check_fails(tensors_open(folder), "tensor 'b' is in '../outside.safetensors', expected a file in the same folder");
    index_of("{\"weight_map\": {\"b\": \"..\"}}");
    check_fails(tensors_open(folder), "expected a file in the same folder");
    index_of("{\"weight_map\": {\"b\": \"/etc/passwd\"}}");
    check_fails(tensors_open(folder), "expected a file in the same folder");
    index_of("{\"weight_map\": {\"b\": \"\"}}");
    check_fails(tensors_open(folder), "expected a file in the same folder");
    index_of("{\"weight_map\": {\"b\": 7}}");
    check_fails(tensors_open(folder), "tensor 'b' is in 7, expected a file's name");
    index_of("{\"weight_map\": [1]}");
    check_fails(tensors_open(folder), "no weight_map");
    index_of("{}");
    check_fails(tensors_open(folder), "no weight_map");
    index_of("[]");
    check_fails(tensors_open(folder), "no weight_map");
    index_of("{\"weight_map\": {\"a\": \"m-1");
    check_fails(tensors_open(folder), "closing quote");
    CHECK(tensors_write(check_path("model/m-2.safetensors"), both, 2, NULL), "%s", slam_error());
    index_of("{\"weight_map\": {\"a\": \"m-1.safetensors\", \"b\": \"m-2.safetensors\"}}");
    check_fails(tensors_open(folder), "tensor 'a' is also in");
    CHECK(tensors_write(check_path("model/model.safetensors"), both, 2, NULL), "%s", slam_error());
    t = tensors_open(folder);
    CHECK(t && tensors_count(t) == 2 && strstr(tensors_at(t, 0)->file, "model/model.safetensors"), "%s", slam_error());
    tensors_close(t);
}

/* ---- npy ---- */

/* A version 1, 2 or 3 file of that dictionary and data. */
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

static void test_npy(void) {
    const float f[6] = {1, 2, 3, 4, 5, -6.5f}, infinite[6] = {0, 0, 0, 0, INFINITY, 0};
    const double d[6] = {1, 2, 3, 4, 5, -6.5}, large[6] = {0, 0, 0, 1e300, 0, 0};
    float *got = NULL;
    size_t rows = 0, cols = 0;
    if (TEST("npy: what is written is read back")) {
        CHECK(npy_write(check_path("w.npy"), f, 2, 3) && npy_read(check_path("w.npy"), &got, &rows, &cols), "%s", slam_error());
        CHECK(got && rows == 2 && cols == 3 && memcmp(got, f, sizeof f) == 0, "%zu x %zu", rows, cols);
        free(got);
    }
    if (TEST("npy: float32 and float64 of all versions, keys in any order")) {
        static const char *const good[] = {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }          \n",
                                           "{'shape':(2,3),'descr':'<f4','fortran_order':False}",
                                           "{ 'fortran_order' : False , 'shape' : (2, 3,) , 'descr' : '<f4' , }\n",
                                           "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }          \n"};
        for (int version = 1; version <= 3; version++)
            for (int i = 0; i < 4; i++) {
                got = NULL;
                CHECK(npy_read(npy_file(version, good[i], i == 3 ? (const void *)d : f, i == 3 ? sizeof d : sizeof f), &got, &rows,
                               &cols),
                      "%s", slam_error());
                CHECK(got && rows == 2 && cols == 3 && memcmp(got, f, sizeof f) == 0, "version %d, header %d", version, i);
                free(got);
            }
    }
    if (!TEST("npy: what is not a matrix of finite numbers is refused")) return;
    static const char *const bad[][2] = {
        {"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3), }", "expected '<f4' or '<f8'"},
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3), }", "expected '<f4' or '<f8'"},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 3), }", "expected '<f4' or '<f8'"},
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", "column order"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }", "1 dimensions, expected 2"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (), }", "0 dimensions, expected 2"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }", "3 dimensions, expected 2"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }", "24 bytes of data, expected 2 x 4"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
         "24 bytes of data, expected 4294967296 x"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 1), }", "its header is not"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3), }", "its header is not"},
        {"{'descr': '<f4', 'fortran_order': Maybe, 'shape': (2, 3), }", "its header is not"},
        {"{'descr': '<f4', 'shape': (2, 3), }", "its header is not"},
        {"{'fortran_order': False, 'shape': (2, 3), }", "its header is not"},
        {"{'descr': '<f4', 'fortran_order': False, }", "its header is not"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}", "its header is not"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)", "its header is not"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } x", "its header is not"},
        {"", "its header is not"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check_fails(npy_read(npy_file(1, bad[i][0], f, sizeof f), &got, &rows, &cols), bad[i][1]);
    static const char *const f4 = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
                             *const f8 = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }";
    check_fails(npy_read(npy_file(1, f4, infinite, sizeof infinite), &got, &rows, &cols),
                "row 1 holds inf, expected finite numbers");
    check_fails(npy_read(npy_file(1, f8, large, sizeof large), &got, &rows, &cols), "row 1 holds inf");
    check_fails(npy_read(npy_file(4, f4, f, sizeof f), &got, &rows, &cols), ".npy version 4, expected 1 to 3");
    check_fails(npy_read(npy_file(1, f4, f, sizeof f - 1), &got, &rows, &cols), "23 bytes of data");
    check_fails(npy_read(check_file("x.npy", "\x80\x04\x95 a pickled object", 20), &got, &rows, &cols), "not a .npy file");
    check_fails(npy_read(check_file("x.npy", "\x93NUMPY\x02\x00\xff\xff\xff\x7f{}", 14), &got, &rows, &cols), "but only 2 follow");
    check_fails(npy_read(check_file("x.npy", "", 0), &got, &rows, &cols), "not a .npy file");
}

/* ---- token shards ---- */

static void test_shards(void) {
    const uint16_t tokens[7] = {1, 5, 9, 501, 65535, 2, 1};
    shard_writer w;
    shard s;
    if (TEST("shards: what is written is read back, and stands there only when whole")) {
        const char *path = check_path("x.bin");
        unlink(path);
        CHECK(shard_begin(&w, path, 502, 0xfedcba98u) && shard_add(&w, tokens, 3) && shard_add(&w, tokens, 0) &&
                  shard_add(&w, tokens + 3, 4),
              "%s", slam_error());
        CHECK(!path_is_file(path) && path_is_file(check_path("x.bin.part")), "the unfinished file");
        CHECK(shard_end(&w) && path_is_file(path) && !path_is_file(check_path("x.bin.part")), "%s", slam_error());
        CHECK(shard_open(&s, path), "%s", slam_error());
        CHECK(s.n == 7 && s.V == 502 && s.fingerprint == 0xfedcba98u && memcmp(s.tokens, tokens, sizeof tokens) == 0, "%zu tokens",
              s.n);
        CHECK(s.map.size == 1024 + 14, "%zu bytes", s.map.size);
        shard_close(&s);
        CHECK(shard_begin(&w, path, 0, 0) && shard_add(&w, tokens, 3), "%s", slam_error());
        shard_abandon(&w);
        shard_abandon(&w);
        CHECK(shard_open(&s, path) && s.n == 7, "the old file is gone");
        shard_close(&s);
        CHECK(shard_begin(&w, path, 0, 0) && shard_end(&w) && shard_open(&s, path) && s.n == 0 && s.V == 0, "%s", slam_error());
        shard_close(&s);
        check_fails(shard_begin(&w, check_path("no/folder/x.bin"), 0, 0), "cannot be written");
        w.n = INT32_MAX - 2;
        w.path = (char *)(uintptr_t) "long.bin";
        check_fails(shard_add(&w, tokens, 3), "long.bin: more than 2147483647 tokens");
    }
    if (!TEST("shards: a header that does not fit the file is refused")) return;
    int32_t file[260] = {SHARD_MAGIC, 1, 8, 502, 0};
    const struct {
        int word, value;
        size_t size;
        const char *sentence;
    } bad[] = {{0, 20240801, sizeof file, "not a token shard: it begins with 20240801, expected 20240520"},
               {1, 2, sizeof file, "version 2, expected 1"},
               {2, 9, sizeof file, "its header says 9 tokens, but 16 bytes follow"},
               {2, 7, sizeof file, "its header says 7 tokens"},
               {2, -8, sizeof file, "its header says -8 tokens"},
               {2, INT32_MAX, sizeof file, "its header says 2147483647 tokens"},
               {3, -1, sizeof file, "a vocabulary of -1"},
               {3, 65537, sizeof file, "a vocabulary of 65537"},
               {4, 1, sizeof file - 1, "but 15 bytes follow"},
               {4, 1, 1023, "1023 bytes, expected a header of 1024"},
               {4, 1, 0, "0 bytes, expected a header"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const int32_t kept = file[bad[i].word];
        file[bad[i].word] = bad[i].value;
        check_fails(shard_open(&s, check_file("bad.bin", file, bad[i].size)), bad[i].sentence);
        file[bad[i].word] = kept;
    }
    check_fails(shard_open(&s, check_path("absent.bin")), "cannot be opened");
}

/* ---- units ---- */

static void test_units(void) {
    units_reader r;
    units u = SLAM_ZERO;
    if (TEST("units: features and tokens, line by line")) {
        const char *text = "{\"units\": [3, 49, 7], \"duration\": [1, 2, 1], \"file_name\": \"a b.wav\"}\r\n\n \t\r\n"
                           "{\"file_name\": \"\\u00e9.wav\", \"audio_repr\": \"<Un3><Un0><Un499>\", \"more\": {}}\n"
                           "{\"units\": []}\n{\"units\": [2147483647], \"duration\": null}";
        CHECK(units_open(&r, check_file("u.jsonl", text, strlen(text))), "%s", slam_error());
        CHECK(units_next(&r, &u) == 1 && r.line == 1, "%s", slam_error());
        CHECK(u.n == 3 && u.unit[1] == 49 && u.duration && u.duration[1] == 2 && strcmp(u.name, "a b.wav") == 0, "line 1");
        CHECK(units_next(&r, &u) == 1 && r.line == 4, "line %zu", r.line);
        CHECK(u.n == 3 && u.unit[0] == 3 && u.unit[1] == 0 && u.unit[2] == 499 && !u.duration &&
                  strcmp(u.name, "\xc3\xa9.wav") == 0,
              "line 4");
        CHECK(units_next(&r, &u) == 1 && u.n == 0 && u.name[0] == 0, "line 5");
        CHECK(units_next(&r, &u) == 1 && u.n == 1 && u.unit[0] == INT_MAX && r.line == 6, "line 6");
        CHECK(units_next(&r, &u) == 0 && units_next(&r, &u) == 0, "after the end");
        units_close(&r);
    }
    if (TEST("units: what is written is read back; lines longer than any buffer")) {
        text t = SLAM_ZERO;
        uint64_t state = 5;
        const size_t lengths[] = {100000, 0, 1, 300000, 17};
        for (int i = 0; i < 5; i++) {
            int *unit = (int *)mem_new(lengths[i], sizeof *unit), *duration = (int *)mem_new(lengths[i], sizeof *duration);
            units line = SLAM_ZERO;
            line.unit = unit;
            line.n = lengths[i];
            line.duration = i % 2 ? NULL : duration;
            line.name = (char *)(uintptr_t) "x\"y.wav";
            for (size_t k = 0; k < lengths[i]; k++) {
                unit[k] = (int)rng_below(&state, 500);
                duration[k] = (int)rng_below(&state, 1000000);
            }
            text_add_units(&t, &line);
            free(unit);
            free(duration);
        }
        CHECK(units_open(&r, check_file("long.jsonl", t.at, t.n)), "%s", slam_error());
        text again = SLAM_ZERO;
        for (int i = 0; i < 5; i++) {
            CHECK(units_next(&r, &u) == 1 && u.n == lengths[i], "%s", slam_error());
            text_add_units(&again, &u);
        }
        CHECK(units_next(&r, &u) == 0, "more than five lines");
        CHECK(again.n == t.n && memcmp(again.at, t.at, t.n) == 0, "the text differs");
        units_close(&r);
        text_free(&again);
        text_free(&t);
    }
    if (!TEST("units: malformed lines are refused with file and line")) return;
    static const char *const bad[][2] = {
        {"{\"units\": [3, 49", "bad.jsonl:2: byte 17: found the end"},
        {"{\"units\": [3, 49]} {}", "found '{', expected nothing more"},
        {"{\"units\": [3, -1]}", "bad.jsonl:2: number 2 of 'units' is -1, expected a whole number"},
        {"{\"units\": [3.5]}", "number 1 of 'units' is 3.5"},
        {"{\"units\": [2147483648]}", "number 1 of 'units' is 2147483648"},
        {"{\"units\": [1e300]}", "number 1 of 'units' is 1e300"},
        {"{\"units\": [\"3\"]}", "number 1 of 'units' is a string"},
        {"{\"units\": \"3\"}", "'units' is a string, expected an array"},
        {"{\"units\": null}", "'units' is null, expected an array"},
        {"{\"units\": [3, 4], \"duration\": [1]}", "bad.jsonl:2: 1 durations for 2 units"},
        {"{\"units\": [3], \"duration\": [-1]}", "number 1 of 'duration' is -1"},
        {"{\"units\": [3], \"duration\": 7}", "'duration' is 7, expected an array"},
        {"{\"audio_repr\": 7}", "'audio_repr' is 7, expected a string"},
        {"{\"audio_repr\": \"<Un3><Un4\"}", "unit 2 is spelled '<Un4'"},
        {"{\"audio_repr\": \"<Un3> <Un4>\"}", "unit 2 is spelled ' <Un4>'"},
        {"{\"audio_repr\": \"<Un>\"}", "unit 1 is spelled '<Un>'"},
        {"{\"audio_repr\": \"<Un-3>\"}", "unit 1 is spelled '<Un-3>'"},
        {"{\"audio_repr\": \"<Un99999999999>\"}", "unit 1 is spelled"},
        {"{\"audio_repr\": \"<\"}", "unit 1 is spelled '<'"},
        {"{\"name\": 7}", "found an object without 'units' or 'audio_repr'"},
        {"[3, 4]", "found an array without 'units'"},
        {"7", "found 7 without 'units'"},
        {"{\"units\": [1], \"file_name\": \"\xff\"}", "not UTF-8"},
        {"garbage", "found 'g', expected a value"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        text t = SLAM_ZERO;
        text_add(&t, "{\"units\": [1]}\n%s\n", bad[i][0]);
        CHECK(units_open(&r, check_file("bad.jsonl", t.at, t.n)) && units_next(&r, &u) == 1, "%s", slam_error());
        check_fails(units_next(&r, &u) >= 0, bad[i][1]);
        CHECK(strstr(slam_error(), "bad.jsonl:2: "), "%s", slam_error());
        units_close(&r);
        text_free(&t);
    }
    const char *long_line = check_path("endless.jsonl");
    const int made = open(long_line, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(made >= 0 && ftruncate(made, (off_t)1 << 33) == 0 && close(made) == 0, "%s: %s", long_line, strerror(errno));
    CHECK(units_open(&r, long_line), "%s", slam_error());
    check_fails(units_next(&r, &u) >= 0, "endless.jsonl:1: a line of more than 64000000 bytes");
    units_close(&r);
    unlink(long_line);
    check_fails(units_open(&r, check_path("absent.jsonl")), "cannot be opened");
    CHECK(units_open(&r, check_path("")), "%s", slam_error());
    check_fails(units_next(&r, &u) >= 0, "irectory");
    units_close(&r);
    units_free(&u);
}

/* ---- audio files ---- */

typedef struct audio {
    float *sample;
    size_t n;
    int rate;
} audio;

static void audio_free(audio *a) {
    free(a->sample);
    memset(a, 0, sizeof *a);
}

/* All that is in an open sound, `step` frames at a time. */
static int audio_all(sound *s, audio *a, size_t step) {
    size_t capacity = 0, before;
    memset(a, 0, sizeof *a);
    a->rate = s->rate;
    do before = a->n;
    while (sound_fill(s, &a->sample, &a->n, &capacity, before + step) && a->n > before);
    const int ok = a->n > 0 && a->n == s->at;
    sound_close(s);
    if (!ok) audio_free(a);
    return ok;
}

static int audio_read(const char *path, audio *a) {
    sound s;
    memset(a, 0, sizeof *a);
    return sound_open(&s, path) && audio_all(&s, a, 7);
}

static int audio_parse(const unsigned char *bytes, size_t n, const char *name, audio *a) {
    sound s;
    file_map map = SLAM_ZERO;
    unsigned char *copy = (unsigned char *)mem_new(n, 1);
    if (n) memcpy(copy, bytes, n);
    map.data = copy;
    map.size = n;
    memset(a, 0, sizeof *a);
    return sound_take(&s, &map, name) && audio_all(&s, a, 1000);
}

/* ---- WAV ---- */

typedef struct wav_kind {
    const char *name;
    int format, bits;
} wav_kind;

static const wav_kind wav_kinds[] = {{"8-bit", 1, 8},   {"16-bit", 1, 16},  {"24-bit", 1, 24},
                                     {"32-bit", 1, 32}, {"float32", 3, 32}, {"float64", 3, 64}};

static void put(text *t, uint64_t value, int bytes) { text_add_bytes(t, (const char *)&value, (size_t)bytes); }

/* A WAV file up to its data; `size` is what the data chunk says. */
static void wav_header(text *t, const wav_kind *k, int channels, int rate, int extensible, uint32_t size) {
    const int frame = channels * k->bits / 8;
    text_add(t, "RIFF");
    put(t, size + (extensible ? 60 : 36), 4);
    text_add(t, "WAVEfmt ");
    put(t, extensible ? 40 : 16, 4);
    put(t, extensible ? 0xfffe : (uint64_t)k->format, 2);
    put(t, (uint64_t)channels, 2);
    put(t, (uint64_t)rate, 4);
    put(t, (uint64_t)(rate * frame), 4);
    put(t, (uint64_t)frame, 2);
    put(t, (uint64_t)k->bits, 2);
    if (extensible) {
        put(t, 22, 2);
        put(t, (uint64_t)k->bits, 2);
        put(t, 0, 4);
        put(t, (uint64_t)k->format, 2);
        text_add_bytes(t, "\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71", 14);
    }
    text_add(t, "data");
    put(t, size, 4);
}

/* Adds one sample and returns the number that it stands for. */
static double wav_put(text *t, const wav_kind *k, uint64_t *state) {
    const double x = 2 * rng_uniform(state) - 1, scale = ldexp(1, k->bits - 1);
    if (k->format == 3) {
        const float narrow = (float)x;
        text_add_bytes(t, k->bits == 32 ? (const char *)&narrow : (const char *)&x, (size_t)k->bits / 8);
        return k->bits == 32 ? (double)narrow : x;
    }
    const int64_t whole = rng_below(state, 10) == 0 ? (x < 0 ? -(int64_t)scale : (int64_t)scale - 1) : (int64_t)floor(x * scale);
    put(t, (uint64_t)(k->bits == 8 ? whole + 128 : whole), k->bits / 8);
    return (double)whole / scale;
}

static void test_wav_values(void) {
    static const int channels[] = {1, 2, 8};
    for (int k = 0; k < 6; k++) {
        if (!TEST("wav: %s, plain and extensible, 1, 2 and 8 channels", wav_kinds[k].name)) continue;
        for (int e = 0; e < 2; e++)
            for (int c = 0; c < 3; c++) {
                enum { n = 200 };
                float expected[n];
                text t = SLAM_ZERO;
                audio a;
                uint64_t state = (uint64_t)(k * 10 + c);
                wav_header(&t, &wav_kinds[k], channels[c], 22050, e, (uint32_t)(n * channels[c] * wav_kinds[k].bits / 8));
                for (int i = 0; i < n; i++) {
                    double sum = 0;
                    for (int j = 0; j < channels[c]; j++) sum += wav_put(&t, &wav_kinds[k], &state);
                    expected[i] = (float)(sum / channels[c]);
                }
                if (CHECK(audio_read(check_file("x.wav", t.at, t.n), &a), "%s", slam_error())) {
                    CHECK(a.n == n && a.rate == 22050, "%zu samples at %d", a.n, a.rate);
                    for (int i = 0; i < n && a.n == n; i++) check_near("sample", (double)a.sample[i], (double)expected[i], 1e-7);
                }
                audio_free(&a);
                text_free(&t);
            }
    }
}

static void test_wav_chunks(void) {
    const wav_kind *k = &wav_kinds[1];
    audio a;
    if (TEST("wav: the sizes that programs write into pipes")) {
        static const uint32_t sizes[] = {0, 0x7ffff000, 0x7fffffff, 0x80000000u, 0xffffffffu};
        for (int i = 0; i < 5; i++) {
            text t = SLAM_ZERO;
            wav_header(&t, k, 1, 16000, 0, sizes[i]);
            text_add_bytes(&t, "\x00\x40\x00\xc0\x00\x20x", 7); // the last byte is half a sample: the pipe broke
            CHECK(audio_parse((const unsigned char *)t.at, t.n, "x.wav", &a), "%s", slam_error());
            CHECK(a.n == 3 && a.sample[0] == 0.5f && a.sample[1] == -0.5f && a.sample[2] == 0.25f, "%zu samples", a.n);
            audio_free(&a);
            check_fails(audio_parse((const unsigned char *)t.at, t.n - 7, "x.wav", &a), "x.wav: it holds no audio");
            text_free(&t);
        }
    }
    if (TEST("wav: other chunks, odd ones too, before and after")) {
        text t = SLAM_ZERO, head = SLAM_ZERO;
        wav_header(&head, k, 1, 16000, 0, 4);
        text_add_bytes(&t, head.at, 12);
        text_add_bytes(&t,
                       "LIST\x05\x00\x00\x00"
                       "abcde\x00",
                       14);
        text_add_bytes(&t, head.at + 12, head.n - 12);
        text_add_bytes(&t,
                       "\x00\x40\x00\xc0"
                       "id3 \xff\xff\xff\xff",
                       12);
        CHECK(audio_parse((const unsigned char *)t.at, t.n, "x.wav", &a), "%s", slam_error());
        CHECK(a.n == 2 && a.sample[0] == 0.5f && a.sample[1] == -0.5f, "%zu samples", a.n);
        audio_free(&a);
        text_free(&t);
        text_free(&head);
    }
}

static void test_wav_damaged(void) {
    if (!TEST("wav: damaged headers are refused")) return;
    const wav_kind *k = &wav_kinds[1];
    static const struct {
        int at, bytes;
        uint32_t value;
        const char *sentence;
    } bad[] = {
        {0, 4, 0x58464952, "not a WAV file"},
        {8, 4, 0, "not a WAV file"},
        {12, 4, 0x20746d66 + 1, "its data come before its format"},
        {16, 4, 15, "a fmt chunk of 15 bytes"},
        {16, 4, 5000, "a chunk of 5000 bytes at byte 12, but only"},
        {16, 4, 0xffffffffu, "a chunk of 4294967295 bytes at byte 12"},
        {20, 2, 7, "WAV format 7, expected 1 (PCM) or 3 (float)"},
        {20, 2, 0xfffe, "an extensible fmt chunk of 16 bytes"},
        {20, 2, 3, "16 bits a sample, expected 32 or 64"},
        {22, 2, 0, "no channels"},
        {22, 2, 65535, "frames of 2 bytes, expected 65535 channels"},
        {24, 4, 0, "0 samples a second"},
        {24, 4, 0xffffffffu, "4294967295 samples a second"},
        {32, 2, 0, "frames of 0 bytes, expected 1 channels of 16 bits"},
        {34, 2, 0, "0 bits a sample"},
        {34, 2, 12, "12 bits a sample, expected 8, 16, 24 or 32"},
        {36, 4, 0, "it holds no data"},
        {40, 4, 9, "says 9 bytes of data, but only 8 follow"},
        {40, 4, 0x7fffefff, "says 2147479551 bytes of data, but only 8 follow"},
        {40, 4, 7, "7 bytes of data, expected a multiple of 2"},
    };
    audio a;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        text t = SLAM_ZERO;
        wav_header(&t, k, 1, 16000, 0, 8);
        text_add_bytes(&t, "abcdefgh", 8);
        memcpy(t.at + bad[i].at, &bad[i].value, (size_t)bad[i].bytes);
        check_fails(audio_parse((const unsigned char *)t.at, t.n, "x.wav", &a), bad[i].sentence);
        CHECK(strstr(slam_error(), "x.wav: ") == slam_error(), "%s", slam_error());
        text_free(&t);
    }
    static const float samples[][1] = {{NAN}, {INFINITY}, {-INFINITY}, {1e30f}};
    for (int i = 0; i < 4; i++) {
        text t = SLAM_ZERO;
        wav_header(&t, &wav_kinds[4], 1, 16000, 0, 4);
        text_add_bytes(&t, (const char *)samples[i], 4);
        check_fails(audio_parse((const unsigned char *)t.at, t.n, "x.wav", &a), "x.wav: sample 0 is ");
        text_free(&t);
    }
    check_fails(audio_read(check_path("absent.wav"), &a), "cannot be opened");
    check_fails(audio_read(check_file("empty.wav", "", 0), &a), "not a WAV file");
}

/* ---- every reader against every damage ---- */

static float sink; // so that what was read is read

static int read_json(const unsigned char *bytes, size_t n) {
    json *root = json_parse((const char *)bytes, n, "damaged");
    json_free(root);
    return root != NULL;
}

static int read_tensors(const unsigned char *bytes, size_t n) {
    tensors *t = (tensors *)mem_new(1, sizeof *t);
    file_map map = {NULL, n, 0};
    unsigned char *copy = (unsigned char *)malloc(n ? n : 1);
    if (!t || !copy) return 0;
    memcpy(copy, bytes, n);
    map.data = copy;
    const int ok = tensors_add(t, "damaged", &map) && tensors_sort(t);
    for (size_t i = 0; ok && i < t->n; i++) {
        float number;
        for (size_t k = 0; k < t->list[i].count; k++)
            if (tensor_floats(&t->list[i], &number, k, 1)) sink = number;
            else break;
    }
    tensors_close(t);
    return ok;
}

static int read_npy(const unsigned char *bytes, size_t n) {
    float *data = NULL;
    size_t rows, cols;
    const int ok = npy_parse(bytes, n, "damaged", &data, &rows, &cols);
    if (ok && rows && cols) sink = data[rows * cols - 1];
    free(data);
    return ok;
}

static int read_shard(const unsigned char *bytes, size_t n) {
    shard s = SLAM_ZERO;
    s.path = (char *)(uintptr_t) "damaged";
    s.map.data = bytes;
    s.map.size = n;
    const int ok = shard_parse(&s);
    for (size_t i = 0; ok && i < s.n; i++) sink = s.tokens[i];
    return ok;
}

static int read_units_line(const unsigned char *bytes, size_t n) {
    units u = SLAM_ZERO;
    json *root = json_parse((const char *)bytes, n, "damaged");
    const int ok = root && units_from_json(root, "damaged", &u);
    for (size_t i = 0; ok && i < u.n; i++) sink = (float)(u.unit[i] + (u.duration ? u.duration[i] : 0));
    json_free(root);
    units_free(&u);
    return ok;
}

static int read_wav(const unsigned char *bytes, size_t n) {
    audio a;
    const int ok = audio_parse(bytes, n, "damaged", &a);
    if (ok) sink = a.sample[a.n - 1];
    audio_free(&a);
    return ok;
}

/* A whole small file; every beginning of it must be refused, and of files with one to four bits or bytes changed, some are. */
static void check_damage(const char *name, const char *bytes, size_t n, int (*reader)(const unsigned char *, size_t)) {
    unsigned char *copy;
    uint64_t state = 9;
    int refused = 0;
    const int rounds = 20000;
    CHECK(reader((const unsigned char *)bytes, n), "%s, undamaged: %s", name, slam_error());
    for (size_t k = 0; k < n; k++) {
        copy = (unsigned char *)malloc(k ? k : 1);
        memcpy(copy, bytes, k);
        fail("%s", "");
        CHECK(!reader(copy, k) && slam_error()[0], "%s, cut to %zu of %zu bytes, was taken", name, k, n);
        free(copy);
    }
    copy = (unsigned char *)malloc(n);
    for (int round = 0; round < rounds; round++) {
        memcpy(copy, bytes, n);
        for (uint64_t change = 1 + rng_below(&state, 4); change-- > 0;) {
            const size_t at = rng_below(&state, rng_below(&state, 2) ? n : n < 64 ? n : 64); // headers are where it hurts
            if (rng_below(&state, 4)) copy[at] ^= (unsigned char)(1u << rng_below(&state, 8));
            else copy[at] = (unsigned char)rng_next(&state);
        }
        fail("%s", "");
        if (!reader(copy, n)) {
            refused++;
            CHECK(slam_error()[0], "%s was refused without a sentence", name);
        }
    }
    CHECK(refused > 0 && refused <= rounds, "%d of %d refused", refused, rounds);
    free(copy);
}

/* The bytes of a file that was just written */
static void check_damaged_file(const char *name, const char *path, int (*reader)(const unsigned char *, size_t)) {
    file_map map;
    if (!CHECK(map_open(&map, path), "%s", slam_error())) return;
    check_damage(name, (const char *)map.data, map.size, reader);
    map_close(&map);
}

static void test_damage(void) {
    const float numbers[6] = {1, 2, 3, 4, 5, 6};
    if (TEST("damage: json, cut at every byte, 20000 times changed")) {
        static const char config[] =
            "{\"model_type\": \"qwen2\", \"hidden_size\": 64, \"eps\": 1e-06, \"list\": [1, 2.5, true, null], \"s\": \"\\u00e9\\ud83d\\ude00\\n\"}";
        check_damage("json", config, strlen(config), read_json);
    }
    if (TEST("damage: safetensors, cut at every byte, 20000 times changed")) {
        const tensor_out list[] = {{"a", 2, {2, 3, 0, 0}, DTYPE_F32, numbers}, {"b", 1, {3, 0, 0, 0}, DTYPE_F64, numbers}};
        CHECK(tensors_write(check_path("damage.safetensors"), list, 2, NULL), "%s", slam_error());
        check_damaged_file("safetensors", check_path("damage.safetensors"), read_tensors);
    }
    if (TEST("damage: npy, cut at every byte, 20000 times changed")) {
        CHECK(npy_write(check_path("damage.npy"), numbers, 2, 3), "%s", slam_error());
        check_damaged_file("npy", check_path("damage.npy"), read_npy);
    }
    if (TEST("damage: shard, cut at every byte, 20000 times changed")) {
        const uint16_t tokens[5] = {1, 7, 8, 9, 1};
        shard_writer w;
        CHECK(shard_begin(&w, check_path("damage.bin"), 100, 7) && shard_add(&w, tokens, 5) && shard_end(&w), "%s", slam_error());
        check_damaged_file("shard", check_path("damage.bin"), read_shard);
    }
    if (TEST("damage: units, cut at every byte, 20000 times changed")) {
        static const char features[] = "{\"units\": [3, 49, 7], \"duration\": [1, 2, 1], \"file_name\": \"a.wav\"}";
        static const char spelled[] = "{\"audio_repr\": \"<Un3><Un49><Un7>\", \"file_name\": \"a.wav\"}";
        check_damage("features", features, strlen(features), read_units_line);
        check_damage("tokens", spelled, strlen(spelled), read_units_line);
    }
    for (int k = 0; k < 6; k++) {
        if (!TEST("damage: wav, %s, cut at every byte, 20000 times changed", wav_kinds[k].name)) continue;
        text t = SLAM_ZERO;
        uint64_t state = 1;
        wav_header(&t, &wav_kinds[k], 2, 16000, k % 2, (uint32_t)(2 * 5 * wav_kinds[k].bits / 8));
        for (int i = 0; i < 10; i++) wav_put(&t, &wav_kinds[k], &state);
        check_damage("wav", t.at, t.n, read_wav);
        text_free(&t);
    }
}

int main(void) {
    test_json_values();
    test_json_refused();
    test_json_many_keys();
    test_json_numbers();
    test_json_members();
    test_json_strings();
    test_tensors_round_trip();
    test_tensors_numbers();
    test_tensors_damaged();
    test_tensors_folders();
    test_npy();
    test_shards();
    test_units();
    test_wav_values();
    test_wav_chunks();
    test_wav_damaged();
    test_damage();
    return check_end();
}
