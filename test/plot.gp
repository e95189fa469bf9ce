# Loss curves of training runs, from their log.jsonl: `make plot` sets runs (folders) and out (a PNG file, or - for the terminal).
if (runs eq '') { print 'plot: no log.jsonl found; name the folders of runs with RUNS="..."'; exit status 1 }
if (out eq '-') { set terminal dumb size 79, 24 } else { set terminal pngcairo size 1200, 700 noenhanced; set output out }
# lines that have this number, as "step number"; each step and each evaluation is an object on a line of its own
number(run, key) = sprintf('< sed -n ''s/.*"step": *\([0-9]*\).*"%s": *\([0-9.eE+-]*\).*/\1 \2/p'' "%s/log.jsonl"', key, run)
has(run, key) = int(system(sprintf('grep -c ''"%s":'' "%s/log.jsonl"', key, run))) > 0
set xlabel 'step'
set ylabel 'loss, nats a token'
set grid
set key top right noenhanced
plot for [i = 1:words(runs)] number(word(runs, i), 'loss') using 1:2 with lines lc i title word(runs, i), \
     for [i = 1:words(runs)] (has(word(runs, i), 'val_loss') ? number(word(runs, i), 'val_loss') : '< echo 0 NaN') \
         using 1:2 with linespoints lc i pt 7 dt 2 title (has(word(runs, i), 'val_loss') ? word(runs, i) . ', validation' : '')
if (out ne '-') { set output; print 'plot: ', out }
