#!/usr/bin/env python3
"""Makes test/fixtures/scoring: two gold.csv that nobody spoke, scores for them, and what the official scorer of ZeroSpeech 2021
says of these. Run in the project's folder, with the packages zerospeech-benchmarks (its code alone: pip install --no-deps) and
pandas before 3 (2.1 here; it was written for a pandas whose groupby hands on the columns that it groups by):

    python test/reference_scoring.py

  lexical.csv, syntactic.csv    gold: several voices (of some pairs not all), all bands of frequency, fields in quotes
  lexical.txt, syntactic.txt    `filename score` a line, as a submission has them; a fifth of the pairs tie
  expected.txt                  by_pair, by_frequency, by_length, by_type as `set figure name n score std`, from the scorer's classes
"""

import csv
import os
import random
import sys
import types

import numpy
import pandas

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures", "scoring")


def official():
    """LexicalTask and SyntacticTask as they are installed, without what the rest of that package loads and downloads."""
    folder = next(os.path.join(p, "zerospeech") for p in sys.path if os.path.isdir(os.path.join(p, "zerospeech", "tasks", "lm")))

    def provide(name, path=None, **content):
        module = types.ModuleType(name)
        if path:
            module.__path__ = [path]
        module.__dict__.update(content)
        sys.modules[name] = module

    settings = types.SimpleNamespace(by_pair=True, by_length=True, by_frequency=True, result_filenames={})
    provide("zerospeech", folder)
    provide("zerospeech.data_loaders", load_dataframe=lambda item, **how: pandas.read_csv(item, **how))
    provide("zerospeech.generics", FileItem=str)
    provide("zerospeech.tasks", os.path.join(folder, "tasks"), Task=object)
    provide("zerospeech.tasks.lm", os.path.join(folder, "tasks", "lm"))
    provide("zerospeech.tasks.lm.params", LexicalParams=lambda: settings, SyntacticParams=lambda: settings)
    from zerospeech.tasks.lm.lexical import LexicalTask
    from zerospeech.tasks.lm.syntactic import SyntacticTask

    return LexicalTask(), SyntacticTask()


def write(name, header, rows, rng):
    with open(os.path.join(HERE, name + ".csv"), "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(header)
        writer.writerows([[row[k] for k in header] for row in rows])
    scores, lines = {}, []
    for row in rows:
        other = scores.get(row["pair"])
        score = other if other is not None and rng.random() < 0.2 else f"{-rng.random() * 4 - (0.4 if not row['correct'] else 0):.6g}"
        scores[row["pair"]] = score
        lines.append(f"{row['filename']} {score}")
    rng.shuffle(lines)
    with open(os.path.join(HERE, name + ".txt"), "w") as f:
        f.write("\n".join(lines) + "\n")


def lexical(rng):
    rows = []
    for i in range(60):
        frequency = (0, 1, 4, 5, 19, 20, 99, 100, 5000)[i % 9]
        length = 3 + i % 7
        for voice in ("A", "B", "C")[: 1 + i % 3]:
            for correct in (1, 0):
                word = ("" if correct else "non") + f"word {i}" + (', "quoted"' if i == 7 else "")
                rows.append(dict(id=i, filename=f"l{len(rows):04d}", voice=voice, frequency=frequency, word=word, phones="f o n", length=length,
                                 correct=correct, pair=(i, voice)))  # fmt: skip
    rng.shuffle(rows)
    write("lexical", ["id", "filename", "voice", "frequency", "word", "phones", "length", "correct"], rows, rng)


def syntactic(rng):
    pairs = []
    for i in range(45):
        kind, subtype = ("agreement", "order", "npi")[i % 3], f"sub{i % 2}"
        for voice in ("A", "B", "D")[: 1 + i % 3]:
            pairs.append((i % 15, kind, subtype, voice, f"sentence {i}, spoken"))
    rng.shuffle(pairs)
    rows = []
    for k, (i, kind, subtype, voice, text) in enumerate(pairs):
        for correct in (1, 0):
            rows.append(dict(id=i, filename=f"s{len(rows):04d}", voice=voice, type=kind, subtype=subtype, transcription=text, correct=correct, pair=k))
    write("syntactic", ["id", "filename", "voice", "type", "subtype", "transcription", "correct"], rows, rng)


def main():
    os.makedirs(HERE, exist_ok=True)
    rng = random.Random(3)
    lexical(rng)
    syntactic(rng)
    path = lambda name: os.path.join(HERE, name)
    words, sentences = official()
    by_pair, by_frequency, by_length = words.run_lexical_eval(path("lexical.txt"), path("lexical.csv"))
    pairs, by_type = sentences.run_syntactic_comparison(path("syntactic.csv"), path("syntactic.txt"))
    tables = [("lexical", "frequency", by_frequency), ("lexical", "length", by_length), ("syntactic", "type", by_type)]
    with open(path("expected.txt"), "w") as f:
        for name, table in (("lexical", by_pair), ("syntactic", pairs)):
            f.write(f"{name} all - {len(table)} {table.score.mean():.4f} {table.score.std():.4f}\n")
        # as the leaderboard has it: the bands but oov, weighted by their pairs; the deviation is of these pairs
        known = by_frequency[by_frequency.frequency != "oov"]
        scores = words.eval_by_pair(words.load_and_format(path("lexical.txt"), path("lexical.csv")))
        deviation = scores[scores.frequency >= 1].score.std()
        f.write(f"lexical vocabulary in {known.n.sum()} {numpy.average(known.score, weights=known.n):.4f} {deviation:.4f}\n")
        for name, figure, table in tables:
            for _, row in table.iterrows():
                label = int(row[figure]) if figure == "length" else row[figure]
                f.write(f"{name} {figure} {label} {int(row.n)} {row.score:.4f} {row['std']:.4f}\n")
        for name, table in (("lexical", by_pair), ("syntactic", pairs)):
            f.write(f"{name} pairs - " + " ".join(f"{x:.4f}" for x in sorted(table.score)) + "\n")


main()
