#!/usr/bin/env python3
"""Preference pairs and test sets out of the stories' grammar, for make.sh.

    sets.py say FOLDER        write FOLDER/NAME.txt for all that has to be spoken; print a line "FOLDER/NAME voice speed" for each
    sets.py write UNITS OUT   make the files in the folder OUT, from what the tokenizer made of the sound (UNITS.jsonl)
    sets.py show              print what is said, right and wrong

    pairs.jsonl, pairs-val.jsonl  a story's beginning, how it goes on, and how it does not: preference pairs
    storycloze/                   a whole story with its right end and with a wrong one
    swuggy/                       words of the stories, and what could be words
    sblimp/                       sentences of the stories, and what breaks their grammar

What is wrong is about as likely by itself as what is right: an ending that is wrong for one story is right for another one, a
sentence of the story in the wrong place is of its cast, a verb loses its s as often as it wins one.
"""
import copy
import csv
import json
import os
import random
import re
import subprocess
import sys

import stories

VOICES = "en-us en-gb en-us+m1 en-gb+m3 en-us+f2 en-us+f4".split()
SPEEDS = "155 165 175".split()
SEED = 1

PAIRS, HELD_OUT_PAIRS, CLOZE = 500, 250, 200
WORDS, WORD_VOICES = 200, ["en-us", "en-gb+m3", "en-us+f2"]
SENTENCES, SENTENCE_VOICES = 35, ["en-us+m1", "en-gb"]      # sentences of a subtype


def spoken(number):
    """Voices and speeds take turns."""
    return VOICES[number % len(VOICES)], SPEEDS[number // len(VOICES) % len(SPEEDS)]


def words(text):
    return re.findall(r"\w+", text.lower())


# ------------------------------------------------------------------------------------------ stories with wrong ends

def kept_for(plot, cast):
    """Which casts are told where: a validation story's is in no training story, and of those one half is for the preference
    pairs to validate on, the other for the cloze test."""
    number = stories.cast_number(plot, cast)
    if number % 20:
        return "training"
    return "validation" if number // 20 % 2 else "cloze"


def beginnings(which, count, most_words, last, rng):
    """[(plot, a story's beginning, the sentence that comes next, one of this story that does not), ...]; last: the next one is
    the story's last"""
    seen = {}
    while len(seen) < count:
        plot = rng.choice(list(stories.PLOTS))
        cast = stories.cast_for(plot, rng)
        if kept_for(plot, cast) != which:
            continue
        rows = [wordings for optional, wordings in stories.lines(plot) if not optional]
        at = len(rows) - 1 if last else rng.randrange(2, len(rows))
        told = set()
        begin = " ".join(stories.sentence(rng.choice(wordings), cast, told, rng) for wordings in rows[:at])
        right, misplaced = [stories.sentence(rng.choice(wordings), cast, set(told), rng)
                            for wordings in (rows[at], rng.choice(rows[:at] + rows[at + 1:]))]
        if len(words(" ".join([begin, right] if last else [begin, right, misplaced]))) <= most_words:
            seen[begin] = plot, begin, right, misplaced
    return list(seen.values())


def exchanged_endings(made, rng):
    """For each its wrong ending: another one's of another plot, about as long. Each ending is right once and wrong once."""
    order = sorted(range(len(made)), key=lambda i: (len(made[i][2]), rng.random()))
    wrong = {}
    for first in range(0, len(order), 40):
        group = sorted(order[first:first + 40], key=lambda i: made[i][0])
        plots = [made[i][0] for i in group]
        # sorted by plot, and moved by as many as the largest plot has
        step = max(map(plots.count, plots))
        for k, i in enumerate(group):
            wrong[i] = made[group[(k + step) % len(group)]][2]
    return wrong


def shuffled(sentence, rng):
    order = words(sentence)
    mixed = rng.sample(order, len(order))
    return shuffled(sentence, rng) if mixed == order else " ".join(mixed).capitalize() + "."


def preferences(which, count):
    """[(prompt, chosen, rejected), ...]; of four rejected endings two are misplaced, one is another story's, one is shuffled."""
    rng = random.Random(f"{which} {SEED}")
    made = beginnings(which, count, 34, False, rng)
    others = exchanged_endings(made[2::4], rng)
    return [(prompt, right, others[i // 4] if i % 4 == 2 else shuffled(right, rng) if i % 4 == 3 else misplaced)
            for i, (plot, prompt, right, misplaced) in enumerate(made)]


def cloze(count):
    """[(story, the same with a wrong end), ...]; every other wrong end is misplaced, the others are another story's."""
    rng = random.Random(f"cloze {SEED}")
    made = beginnings("cloze", count, 36, True, rng)
    others = exchanged_endings(made[1::2], rng)
    return [(f"{prompt} {right}", f"{prompt} {others[i // 2] if i % 2 else misplaced}")
            for i, (plot, prompt, right, misplaced) in enumerate(made)]


# ------------------------------------------------------------------------------------------ words

# Words that English has, and that the exchange would make (en-us, or en-gb where that differs)
ENGLISH = """
    f l 0 p, s eI k s, d i: d z, g r eI v, p l V m, dZ eI k s, m aI n d, g u: s i, t aI m @, m V t s, r V k s, m I s t,
    g r aa n t s, n eI l z, f 0 n d, p l aa N k s, m aa n s, f A@ D 3 z, f l I N z, S I v z, b r eI z, b I t s, p V n i,
    p l eI d, m E r i, m eI l z, b E l oU, s t2 I N, m V m z, f V g 3, s l i: k, m 3: k s, w E l p, m aI t s, h E m z,
    w a N k eI k s, k l I N, s l eI v, m E l oU, s V m z, w aI t s, g r eI z, p l eI t, r V t s, h eI l z, w i: d z, s l i: z,
    p r 0 p, l eI k s, k eI k s, s t eI v, s t eI z, t eI l z, s l i: t, p l 0 p, f eI k s, h eI k s, s l eI z, w eI l z, b eI k s
"""


def pronounce(voice, vocabulary):
    """{word: [phones]} in espeak-ng's spelling, the stress before its vowel."""
    said = subprocess.run(["espeak-ng", "-q", "-x", "--sep=_", "-v", voice], input="\n\n".join(word + "." for word in vocabulary),
                          stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    if len(said) != len(vocabulary):
        sys.exit(f"sets.py: espeak-ng said {len(said)} of {len(vocabulary)} words")
    return {word: [phone for phone in phones.split("_") if phone.strip("',;%=")] for word, phones in zip(vocabulary, said)}


def is_vowel(phone):
    return phone.lstrip("',%=")[0] in "aAeEiIoOuUV03@"


def plain(phones):
    return " ".join(phone.lstrip("',%=") for phone in phones)


def exchanged(phones, donor, how):
    """A word with another one's onset (s p | r I N) or tail (s p r I | N), as long as before; None: it cannot be."""
    cut = []
    for each in (phones, donor):
        first = next((i for i, phone in enumerate(each) if is_vowel(phone)), len(each))
        at = first if how == "onset" else first + 1
        cut.append((each[:at], each[at:]))
    (head, tail), (other_head, other_tail) = cut
    if how == "onset":
        made, good = other_head + tail, head and other_head and head[0] != other_head[0]
    else:
        made, good = head + other_tail, tail and other_tail and tail[0] != other_tail[0]
    good = good and len(made) == len(phones) and sum(map(is_vowel, made)) == sum(map(is_vowel, phones))
    return made if good else None


def word_pairs():
    """[(word, how often, {voice: (phones, phones of what is no word)}), ...]"""
    counts = {}
    for story in stories.stories(2000, "train", 0):
        for word in words(story):
            counts[word] = counts.get(word, 0) + 1
    vocabulary = sorted(counts)
    said = {voice: pronounce(voice, vocabulary) for voice in WORD_VOICES}
    taken = {plain(phones) for each in said.values() for phones in each.values()} | set(re.split(r",\s+", ENGLISH.strip()))
    rng = random.Random(f"words {SEED}")
    drawn = [(word, how) for word in vocabulary for how in ("onset", "tail") if len(said[WORD_VOICES[0]][word]) >= 4]
    rng.shuffle(drawn)
    made = []
    for word, how in drawn:
        for donor in rng.sample(vocabulary, len(vocabulary)):
            wrong = {voice: exchanged(each[word], each[donor], how) for voice, each in said.items()}
            if not all(wrong.values()) or taken & set(map(plain, wrong.values())):
                continue
            taken |= set(map(plain, wrong.values()))
            made.append((word, counts[word], {voice: (each[word], wrong[voice]) for voice, each in said.items()}))
            break
    return made[:WORDS]


# ------------------------------------------------------------------------------------------ sentences

def flipped(cast, part, what):
    """What makes a sentence disagree: "verb": of a part's number; "noun": one for many, many for one."""
    cast = dict(cast)
    cast[part] = one = copy.copy(cast[part])
    if what == "verb":
        one.many = not one.many
    elif part == "thing":
        one.nouns = one.noun if one.many else stories.plural(one.noun)
    else:
        one.noun = one.species if one.many else stories.plural(one.species)
    return cast


def sentence_pair(kind, subtype, rng):
    """(right, wrong), or None where the sentence drawn has nothing to break"""
    plot = rng.choice(list(stories.PLOTS))
    cast = stories.cast_for(plot, rng)
    for part in ("hero", "friend"):
        cast[part].name = None
    wording = rng.choice([wording for _, wordings in stories.lines(plot) for wording in wordings])
    seed, told = rng.random(), set()
    if kind == "agreement" or rng.random() < 0.5:
        told = {"hero", "friend", "thing"}

    def say(cast):
        return stories.sentence(wording, cast, set(told), random.Random(seed))

    right = say(cast)
    if not 4 <= len(words(right)) <= 9:
        return None
    if kind == "agreement":
        parts = [part for part in ("hero", "friend") if say(flipped(cast, part, "verb")) != right]
        if len(parts) != 1 or re.search(r"(this|is) thing", wording):
            return None
        wrong = say(flipped(cast, parts[0], "verb"))
        be = {"is", "are"} & (set(words(wrong)) - set(words(right)))
        if bool(be) != (subtype == "be"):
            return None
    elif kind == "determiner_noun":
        part = rng.choice(["thing"] if subtype == "this_these" else ["thing", "hero", "friend"])
        wrong = say(flipped(cast, part, "noun"))
        gone = set(words(right))
        if subtype == "this_these" and not gone & {"this", "these"}:
            return None
        # a determiner that shows the number stands before the noun
        noun = next((a for a, b in zip(words(right), words(wrong)) if a != b), None)
        if noun is None:
            return None
        before = words(right)[:words(right).index(noun)][-3:]
        if (subtype == "a_two") != bool(set(before) & set("a an two three some".split())):
            return None
    else:
        order = words(right)
        if subtype == "adjective":
            places = [i for i in range(len(order) - 1) if order[i] in stories.COLOURS + stories.MANNERS]
        else:
            places = [i for i in range(1, len(order) - 1) if not set(order[i:i + 2]) & set(stories.COLOURS + stories.MANNERS)]
        if not places:
            return None
        at = rng.choice(places)
        order[at], order[at + 1] = order[at + 1], order[at]
        wrong = " ".join(order).capitalize() + "."
        right = " ".join(words(right)).capitalize() + "."
    return (right, wrong) if words(right) != words(wrong) else None


KINDS = [("agreement", "verb"), ("agreement", "be"), ("determiner_noun", "this_these"), ("determiner_noun", "a_two"),
         ("word_order", "adjective"), ("word_order", "neighbours")]


def sentence_pairs():
    """[(type, subtype, right, wrong), ...]"""
    made = []
    for kind, subtype in KINDS:
        rng, seen = random.Random(f"{kind} {subtype} {SEED}"), set()
        while len(seen) < SENTENCES:
            pair = sentence_pair(kind, subtype, rng)
            # as many that lose an s as win one
            if not pair or pair in seen:
                continue
            if len(pair[0]) != len(pair[1]) and (len(pair[0]) > len(pair[1])) != (len(seen) % 2 == 0):
                continue
            seen.add(pair)
            made.append((kind, subtype) + pair)
    return made


# ------------------------------------------------------------------------------------------ files

def everything():
    """Yields (file, row, names and texts that the row is made of, voice, speed)."""
    for file, which, count in ("pairs", "training", PAIRS), ("pairs-val", "validation", HELD_OUT_PAIRS):
        for i, texts in enumerate(preferences(which, count)):
            yield file, (), dict(zip([f"{i}{part}" for part in "pcr"], texts)), *spoken(i)
    for i, texts in enumerate(cloze(CLOZE)):
        yield "storycloze", (), dict(zip([f"{i}_0", f"{i}_1"], texts)), *spoken(i)
    for i, (word, count, pair) in enumerate(word_pairs()):
        for v, voice in enumerate(WORD_VOICES):
            texts = {f"{i:03d}{side}{v}": "[[" + "|".join(phones) + "]]" for side, phones in zip("rw", pair[voice])}
            yield "swuggy", (i, voice, count, word, [plain(phones) for phones in pair[voice]]), texts, voice, SPEEDS[1]
    for i, (kind, subtype, right, wrong) in enumerate(sentence_pairs()):
        for v, voice in enumerate(SENTENCE_VOICES):
            texts = {f"{i:03d}{side}{v}": text for side, text in zip("rw", (right, wrong))}
            yield "sblimp", (i, voice, kind, subtype), texts, voice, SPEEDS[1]


def say(folder):
    os.makedirs(folder, exist_ok=True)
    for file, row, texts, voice, speed in everything():
        for name, text in texts.items():
            path = f"{folder}/{file}-{name}"
            with open(path + ".txt", "w") as out:
                out.write(text + "\n")
            print(path, voice, speed)


def compact(value):
    return json.dumps(value, separators=(",", ":"))


def write(made, out):
    with open(made) as lines:
        units = {os.path.basename(line["file_name"])[:-4]: line["units"] for line in map(json.loads, lines)}
    files, golds = {}, {"swuggy": ["id,filename,voice,frequency,word,phones,length,correct".split(",")],
                        "sblimp": ["id,filename,voice,type,subtype,transcription,correct".split(",")]}
    for file, row, texts, voice, speed in everything():
        made = [units[f"{file}-{name}"] for name in texts]
        if file.startswith("pairs"):
            prompt, chosen, rejected = made
            # repeats are removed across the seam too
            chosen, rejected = [ending[ending[0] == prompt[-1]:] for ending in (chosen, rejected)]
            parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            files.setdefault(file + ".jsonl", []).append(compact({part: {"units": value} for part, value in parts.items()}))
            continue
        files.setdefault(file + "/units.jsonl", []).extend(compact({"file_name": name + ".wav", "units": value})
                                                           for name, value in zip(texts, made))
        for correct, (name, text) in zip((1, 0), texts.items()):
            if file == "swuggy":
                number, _, count, word, phones = row
                phones = phones[1 - correct]
                golds[file].append([number, name, voice, count if correct else 0, word if correct else phones.replace(" ", ""),
                                    phones, len(phones.split()), correct])
            elif file == "sblimp":
                number, _, kind, subtype = row
                golds[file].append([number, name, voice, kind, subtype, " ".join(words(text)), correct])
    for file, rows in files.items():
        os.makedirs(os.path.dirname(f"{out}/{file}"), exist_ok=True)
        with open(f"{out}/{file}", "w") as target:
            target.write("\n".join(rows) + "\n")
    for file, rows in golds.items():
        with open(f"{out}/{file}/gold.csv", "w", newline="") as target:
            csv.writer(target, lineterminator="\n").writerows(rows)


def show():
    for file, row, texts, voice, speed in everything():
        print(file, *row, "|", " | ".join(texts.values()))


def main():
    if sys.argv[1:2] == ["say"] and len(sys.argv) == 3:
        say(sys.argv[2])
    elif sys.argv[1:2] == ["write"] and len(sys.argv) == 4:
        write(sys.argv[2], sys.argv[3])
    elif sys.argv[1:] == ["show"]:
        show()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
