/* CSV: the cells fill the rows, and are the same after being written in quotes and read again. */
#include "fuzz.h"

static int fuzz_csv(const uint8_t *bytes, size_t size) {
    csv c, again;
    strbuf t = ZERO;
    if (!csv_read(&c, fuzz_file(bytes, size))) return 0;
    MUST(c.rows >= 2 && c.cols >= 1);
    for (size_t i = 0; i < c.rows * c.cols; i++) {
        strbuf_add(&t, i % c.cols ? ",\"" : i ? "\n\"" : "\"");
        for (const char *p = c.cells[i]; *p; p++) strbuf_add(&t, *p == '"' ? "\"\"" : "%c", *p);
        strbuf_add(&t, "\"");
        MUST(i < c.cols || c.lines[i / c.cols] > c.lines[i / c.cols - 1]);
    }
    MUST(csv_column(&c, c.cells[c.cols - 1]) < c.cols);
    MUST(csv_read(&again, fuzz_file(t.at, t.n)) && again.rows == c.rows && again.cols == c.cols);
    for (size_t i = 0; i < c.rows * c.cols; i++) MUST(strcmp(c.cells[i], again.cells[i]) == 0);
    csv_free(&c);
    csv_free(&again);
    strbuf_free(&t);
    return 0;
}
