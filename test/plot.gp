# Loss curves of training runs, from their log.jsonl. `make plot` sets runs (folders), out (a PNG file, or - for the terminal) and
# ngrams: a file that `./eval RUN ppl --json FILE` wrote, whose n-gram models become horizontal lines, or ''.
if (runs eq '') { print 'plot: no log.jsonl found; name the folders of runs with RUNS="..."'; exit status 1 }
if (out eq '-') { set terminal dumb size 79, 24 } else { set terminal pngcairo size 880, 500 noenhanced; set output out }
# Lines with this number as "step number". Each step and each evaluation is an object on a line of its own.
number(run, key) = sprintf('< sed -n ''s/.*"step": *\([0-9]*\).*"%s": *\([0-9.eE+-]*\).*/\1 \2/p'' "%s/log.jsonl"', key, run)
has(run, key) = int(system(sprintf('grep -c ''"%s":'' "%s/log.jsonl"', key, run))) > 0
of_json(file, key) = system(sprintf('sed -n ''s/.*"%s": *\([0-9.eE+-]*\).*/\1/p'' "%s" 2>/dev/null', key, file))
set xlabel 'step'
set ylabel 'loss, nats per token'
set grid
set key top right noenhanced
keys = 'unigram bigram trigram fourgram fivegram'
names = 'unigram bigram trigram 4-gram 5-gram'
if (ngrams ne '') set rmargin 14
lowest = 1e9
do for [i = 1:(ngrams eq '' ? 0 : words(keys))] {
    value = of_json(ngrams, word(keys, i))
    if (value eq '') { print sprintf('plot: %s: no "%s", expected the file of ./eval RUN ppl --json FILE', ngrams, word(keys, i)); exit status 1 }
    lowest = value + 0 < lowest ? value + 0 : lowest
    set arrow from graph 0, first value + 0 to graph 1, first value + 0 nohead dt 3 lc rgb 'gray40'
    set label sprintf('%s %.2f', word(names, i), value + 0) at graph 1.01, first value + 0
}
set yrange [* < lowest - 0.1 : *]
plot for [i = 1:words(runs)] number(word(runs, i), 'loss') using 1:2 with lines lc i lw 0.6 title word(runs, i), \
     for [i = 1:words(runs)] (has(word(runs, i), 'val_loss') ? number(word(runs, i), 'val_loss') : '< echo 0 NaN') \
         using 1:2 with linespoints lc i lw 2 pt 7 ps 0.7 title (has(word(runs, i), 'val_loss') ? word(runs, i) . ', validation' : '')
if (out ne '-') { set output; print 'plot: ', out }
