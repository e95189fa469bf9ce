#!/usr/bin/env python3
"""Little stories for the bundled corpus, one a line.

    stories.py --count 2000 --split train --seed 1
    stories.py --words                                 (every word the stories can use)

A story is a plot with its parts cast: a hero, a friend, a thing, a place. What is said at the beginning
decides the end: who it is about, what was lost, who was cold. A language model can learn that from the
sounds; counting neighbours cannot.

The two splits share words, plots and wordings, but no cast: a hash of the plot and of the parts that every telling
of it names decides which split a story belongs to, so no validation story is a training story in other words.

How to read a plot. Each line is a sentence, and one of the wordings between its '/' is told. Half of the time a
line that begins with '?' is left out. In braces stand the parts:
    {a hero}    a brave rabbit, an old owl named Peter, two brave rabbits; the first mention
    {the hero}  the rabbit, Peter, the rabbits          {the thing}  the red ball
    {he hero}   he, she, they; likewise him, his, and where the part itself speaks I, me, my (we, us, our)
    {this thing}  this red ball, these red balls        {one thing}  red ball, red balls
    {in place}  in the forest, on the mountain          {need}  a plain word of the cast
    look+       agrees with the part named before it;   +say  with the one named after it
"""
import argparse
import hashlib
import random
import re
import sys

# ------------------------------------------------------------------------------------------ the plots

PLOTS = {
    "lost and found": """
        There +is {a hero} in the valley / This is a story of {a hero} / {a hero} live+ {in elsewhere}
        {the hero} cannot find {his hero} {one thing} / One morning {the hero} lose+ {a thing}
        ? {the hero} look+ {in elsewhere} / First {the hero} run+ to {the elsewhere}
        I see {a thing} {in place}, +say {a friend} / You must look {in place}, +say {a friend}
        So {the hero} find+ {the thing} {in place} / {the hero} run+ to {the place} and there +is {the thing}
        ? {this thing} belong+ to {me hero}, +say {the hero} / {the hero} thank+ {the friend}
    """,
    "a friend in need": """
        {in place} there +live {a hero} / {a hero} live+ {in place}
        One evening {the hero} is+ very {need} / Today {the hero} is+ {need}
        {the hero} meet+ {a friend} / Then {a friend} come+ along
        Here is some {remedy}, +say {the friend} / {the friend} bring+ {remedy}
        ? So {the hero} {take}+ the {remedy} / {the hero} thank+ {the friend} and {take} the {remedy}
        Now {he hero} is+ not {need} any more / Soon {the hero} is+ not {need} any more
    """,
    "the visit": """
        This is a story of {a hero} / There +is {a hero} in the valley
        {he hero} want+ to visit {a friend} {in place} / {he hero} want+ to see {his hero} friend {in place}
        {the hero} take+ {a thing} for a present / {he hero} bring+ {a thing}
        ? The road to {the place} is long / First {he hero} walk+ to {the elsewhere}
        In the evening {he hero} come+ to {the place} / Soon {the hero} see+ {the place}
        {this thing} is+ for you, +say {the hero} / {the hero} give+ {the thing} to {a friend}
    """,
    "the seeds": """
        {in place} there +live {a hero} / This is a story of {a hero}
        In the spring {he hero} plant+ {fruit} seeds / One morning {he hero} plant+ {fruit} seeds
        ? Every morning {the hero} bring+ water / The sun is warm and the rain is soft
        In the summer there are many {fruits} / Soon the {fruits} grow {in place}
        {the hero} take+ the {fruits} and make+ {dish} / {the hero} make+ {fruit} {dish}
        ? {the hero} share+ the {dish} with {a friend} / I love this {fruit} {dish}, +say {a friend}
    """,
    "one thing and two friends": """
        {a hero} and {a friend} play {in place} / {a hero} meet+ {a friend} {in place}
        There {the hero} find+ {a thing} / Under a tree {the hero} see+ {a thing}
        {this thing} belong+ to {me hero}, +say {the hero} / {the friend} want+ {the thing} too
        ? Now {the friend} is+ angry / Now {the friend} is+ sad
        We can share {the thing}, +say {the hero} / You can have {the thing}, +say {the hero}
        ? So they play with {the thing} together / And so they are good friends
    """,
    "the weather": """
        It is a {weather} morning {in place} / What a {weather} day it is {in place}
        {a hero} look+ out of the window / {a hero} wake+ up early
        Where is {my hero} {toy}? +ask {the hero} / On a {weather} day {he hero} want+ a {toy}
        ? {the hero} run+ home / {the hero} find+ the {toy} under the bed
        Then {he hero} {use}+ the {toy} {in place} / All day {the hero} {use}+ the {toy}
        ? I love this {weather} day, +say {a friend} / {I hero} love {weather} days, +say {the hero}
    """,
    "the builders": """
        {a hero} want+ to build a {work} / {I hero} want to build a {work}, +say {a hero}
        {he hero} look+ for {stuff} {in place} / There is good {stuff} {in place}
        ? This {stuff} is too heavy, +say {the hero} / All day {the hero} work+ and work+
        Can I help you? +ask {a friend} / Then {a friend} come+ to help {him hero}
        Together they build a {work} of {stuff} / In the evening the {work} of {stuff} is ready
        ? Now {the hero} can {purpose} / With the {work} they {purpose}
    """,
    "the music": """
        {in place} {a hero} play+ the {tune} / Every evening {a hero} play+ the {tune}
        The {tune} is too loud, +say {a friend} / {a friend} cannot sleep
        ? So {the hero} stop+ and {he hero} is+ sad / Now it is very quiet {in place}
        In the morning {the friend} come+ along / Then {the friend} come+ to {the place}
        Please play the {tune} again, +say {the friend} / {I friend} love your {tune}, +say {the friend}
        So {the hero} play+ the {tune} and {the friend} dance+ / And {the friend} dance+ {in place}
    """,
}

# ------------------------------------------------------------------------------------------ the cast

HEROES = "he: rabbit bear tiger elephant farmer sailor    she: fox mouse duck monkey squirrel princess"
NAMES = "he: Oliver Peter Toby    she: Emma Lucy Matilda"
MANNERS = "little old brave clever funny gentle".split()

THINGS = "ball kite basket button feather apple umbrella".split()
COLOURS = "red yellow green purple orange".split()

PLACES = "in: forest garden castle meadow village    on: mountain bridge island    by: river windmill"

CHOICES = {
    # what is wrong, what helps, how one takes it
    ("need", "remedy", "take"): "hungry pancakes eat    hungry porridge eat    thirsty water drink    thirsty milk drink",
    # the seeds, and what is made of what grows
    ("fruit", "dish"): "apple cake    cherry cake    pumpkin soup    carrot soup",
    # the day, what it calls for, and what one does with that
    ("weather", "toy", "use"): "windy kite fly    rainy umbrella open    sunny boat sail",
    # what is built, of what, and why
    ("work", "stuff", "purpose"): """
        boat wood sail_to_the_island      tent paper sleep_under_the_stars
        bridge stone walk_over_the_river  house stone sleep_under_a_roof
    """,
    ("tune",): "drum violin trumpet",
}

# ------------------------------------------------------------------------------------------ English

PLURALS = {"mouse": "mice", "fox": "foxes", "princess": "princesses", "cherry": "cherries"}
PRONOUNS = {"he": "he him his I me my", "she": "she her her I me my", "they": "they them their we us our"}


def plural(noun):
    return PLURALS.get(noun, noun + "s")


def third_person(verb):
    """look -> looks, fly -> flies, wish -> wishes"""
    if re.search("[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + ("es" if re.search("(sh|ch|s)$", verb) else "s")


def agree(verb, many):
    if verb == "is":
        return "are" if many else "is"
    return verb if many else third_person(verb)


class Someone:
    """A hero or a friend: one with or without a name, two or three."""

    def __init__(self, rng, nouns):
        pronoun, noun = nouns
        self.count = rng.choice([1, 1, 1, 2, 3])
        self.many = self.count > 1
        self.species, self.noun = noun, plural(noun) if self.many else noun
        self.manner = rng.choice(MANNERS)
        self.name = rng.choice(table(NAMES, pronoun)) if self.count == 1 and rng.random() < 0.5 else None
        self.pronoun = "they" if self.many else pronoun

    def said(self, how, rng):
        if how == "a":
            article = ["a", "two", "three"][self.count - 1]
            return f"{article} {self.manner} {self.noun}" + (f" named {self.name}" if self.name else "")
        if how == "the":
            return self.name if self.name and rng.random() < 0.5 else "the " + self.noun
        return dict(zip("he him his I me my".split(), PRONOUNS[self.pronoun].split()))[how]

    def identity(self):
        return f"{self.count} {self.manner} {self.noun} {self.name}"


class Something:
    """A coloured thing, or several of them."""

    def __init__(self, rng):
        self.many = rng.random() < 0.4
        self.noun = rng.choice(THINGS)
        self.nouns = plural(self.noun) if self.many else self.noun
        self.colour = rng.choice(COLOURS)

    def said(self, how, rng):
        article = {"a": "some" if self.many else "a", "the": "the",
                   "this": "these" if self.many else "this", "one": ""}[how]
        return f"{article} {self.identity()}".strip()

    def identity(self):
        return f"{self.colour} {self.nouns}"


class Somewhere:

    def __init__(self, where):
        self.preposition, self.noun = where

    def said(self, how, rng):
        return (self.preposition + " the " if how == "in" else "the ") + self.noun

    def identity(self):
        return self.noun


def table(text, key=None):
    """"he: bear owl  she: fox" -> [("he", "bear"), ("he", "owl"), ("she", "fox")], or the words of one key"""
    pairs = []
    for word in text.split():
        if word.endswith(":"):
            heading = word[:-1]
        else:
            pairs.append((heading, word))
    return [word for heading, word in pairs if heading == key] if key else pairs


def choices(names):
    """("fruit", "dish") -> [("apple", "cake"), ...]"""
    words = [word.replace("_", " ") for word in CHOICES[names].split()]
    return list(zip(*(words[i::len(names)] for i in range(len(names)))))


# ------------------------------------------------------------------------------------------ telling

def lines(plot):
    """[(optional, wordings), ...]"""
    rows = [line.strip() for line in PLOTS[plot].strip().splitlines()]
    return [(row.startswith("?"), row.lstrip("? ").split(" / ")) for row in rows]


def cast_for(plot, rng):
    """Fill every part: {part: Someone, Something, Somewhere or a plain word}."""
    hero, friend = rng.sample(table(HEROES), 2)
    place, elsewhere = rng.sample(table(PLACES), 2)
    cast = {"hero": Someone(rng, hero), "friend": Someone(rng, friend), "thing": Something(rng),
            "place": Somewhere(place), "elsewhere": Somewhere(elsewhere)}
    if cast["friend"].name == cast["hero"].name:
        cast["friend"].name = None
    for names in CHOICES:
        cast.update(zip(names, rng.choice(choices(names))))
    cast["fruits"] = plural(cast["fruit"])
    return cast


def always_named(plot):
    """The parts that a story of this plot gives away however it is told: some line names them in all its wordings."""
    parts = set()
    for optional, wordings in lines(plot):
        if not optional:
            parts |= set.intersection(*(set(re.findall(r"{(?:(?:a|one|in) )?(\w+)}", wording)) for wording in wordings))
    return sorted(parts)


def cast_number(plot, cast):
    """A hash of the plot and of who and what every telling of it names."""
    named = [cast[part] if isinstance(cast[part], str) else cast[part].identity() for part in always_named(plot)]
    return int(hashlib.sha256(", ".join([plot] + named).encode()).hexdigest(), 16)


def is_validation(plot, cast, every=20):
    """One story in `every` is kept for validation."""
    return cast_number(plot, cast) % every == 0


def can_act(part):
    return isinstance(part, (Someone, Something))


def sentence(wording, cast, told, rng):
    for part, word in cast.items():
        if isinstance(word, str):
            wording = wording.replace("{" + part + "}", word)
    tokens = re.findall(r"\{[^}]+\}|\S+", wording)
    parts = [None] * len(tokens)
    for i, token in enumerate(tokens):
        if token[0] == "{":
            how, part = token[1:-1].split()
            parts[i] = cast[part]
            if how == "a" and part in told:         # a second mention is no longer new
                how = "the"
            if how == "a":
                told.add(part)
            tokens[i] = cast[part].said(how, rng)
    for i, token in enumerate(tokens):
        if token.endswith("+"):
            tokens[i] = agree(token[:-1], next(part for part in reversed(parts[:i]) if can_act(part)).many)
        elif token.startswith("+"):
            tokens[i] = agree(token[1:], next(part for part in parts[i:] if can_act(part)).many)
    text = re.sub(r"\ba (?=[aeiou])", "an ", " ".join(tokens)).replace(" ,", ",")
    return text[0].upper() + text[1:] + "."


def tell(plot, cast, rng):
    """A list of sentences."""
    told = set()
    return [sentence(rng.choice(wordings), cast, told, rng)
            for optional, wordings in lines(plot) if not optional or rng.random() < 0.5]


def stories(count, split, seed):
    rng, seen = random.Random(f"{split} {seed}"), set()
    while len(seen) < count:
        plot = rng.choice(list(PLOTS))
        cast = cast_for(plot, rng)
        if is_validation(plot, cast) != (split == "val"):
            continue
        text = " ".join(tell(plot, cast, rng))
        if text not in seen:
            seen.add(text)
            yield text


def main():
    arguments = argparse.ArgumentParser(description="Print little stories, one a line.")
    arguments.add_argument("--count", type=int, default=10, help="how many (10)")
    arguments.add_argument("--split", choices=["train", "val"], default="train", help="which stories (train)")
    arguments.add_argument("--seed", type=int, default=0, help="other stories (0)")
    arguments.add_argument("--words", action="store_true", help="print the words of these stories instead, most frequent first")
    options = arguments.parse_args()
    counts = {}
    for story in stories(options.count, options.split, options.seed):
        if not options.words:
            print(story)
        for word in re.findall(r"\w+", story.lower()):
            counts[word] = counts.get(word, 0) + 1
    if options.words:
        for word in sorted(counts, key=lambda word: (-counts[word], word)):
            print(counts[word], word)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
