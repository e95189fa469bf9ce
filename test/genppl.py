#!/usr/bin/env python3
"""Prints GenPPL and auto-BLEU-2 of generated speech, as the paper's table 1 (Slamming, section 3.3) has them.

    python3 -m venv venv && venv/bin/pip install torch transformers numpy nltk
    ./eval runs/slam generate sStoryCloze/ ... --wav out
    venv/bin/python test/genppl.py out                              # transcribes, writes out/transcripts.txt
    venv/bin/python test/genppl.py out --transcripts out/transcripts.txt    # scores these

WAV_FOLDER has prompts with their continuations. --asr transcribes each as a whole; --lm gives each transcript the mean negative
log-likelihood of its tokens; GenPPL is exp of the mean over transcripts. A transcript of fewer than two tokens has none, and is
counted as skipped. Transcripts are one a line, in byte order of the file names; `./eval generate --transcripts` takes the file.
auto-BLEU-2 is the share of a transcript's bigrams that occur in it more than once, once over NLTK's word tokens, as in the
paper, and once over the words of `./eval`, where every punctuation mark is a word.
"""

import argparse
import glob
import os
import re
import sys
import wave
from collections import Counter

import numpy
import torch


PUNCTUATION = r"!-/:-@\[-`{-~"
WORDS = rf"[{PUNCTUATION}]|[^\s{PUNCTUATION}]+"  # of ./eval


def read(path):
    try:
        with wave.open(path) as f:
            if f.getparams()[:3] == (1, 2, 16000):
                return numpy.frombuffer(f.readframes(f.getnframes()), "<i2").astype(numpy.float32) / 32768
    except (wave.Error, EOFError):
        pass
    sys.exit(f"{path}: expected WAV of 16 kHz, 16 bits and one channel, as ./eval writes")


def transcribe(paths, model):
    from transformers import pipeline

    asr = pipeline("automatic-speech-recognition", model=model, device=DEVICE)
    for path in paths:
        samples = read(path)
        long = {"return_timestamps": True} if len(samples) > 30 * 16000 else {}  # Whisper: in windows of 30 s
        yield " ".join(asr({"raw": samples, "sampling_rate": 16000}, **long)["text"].splitlines())


def mean_nlls(texts, name):
    """Of each text's tokens but the first, which for a model with a BOS token is that one; None without a token to predict."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE).eval()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(DEVICE)
        with torch.no_grad():
            yield model(input_ids=ids, labels=ids).loss.item() if ids.shape[1] > 1 else None


def auto_bleu(words, n=2):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    return sum(counts[gram] > 1 for gram in grams) / len(grams) if grams else 0


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", metavar="WAV_FOLDER")
parser.add_argument("--asr", metavar="MODEL", default="openai/whisper-large-v3-turbo", help="default: %(default)s")
parser.add_argument("--lm", metavar="MODEL", default="meta-llama/Llama-3.2-1B", help="default: %(default)s")
parser.add_argument("--transcripts", metavar="FILE", help="one text a line, instead of --asr")
options = parser.parse_args()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
paths = sorted(glob.glob(os.path.join(glob.escape(options.folder), "*.wav")), key=os.fsencode)
if not paths:
    sys.exit(f"{options.folder}: has no .wav file")
if options.transcripts:
    with open(options.transcripts, encoding="utf-8", newline="\n") as f:
        texts = [line.rstrip("\r\n") for line in f]
    if len(texts) != len(paths):
        sys.exit(f"{options.transcripts}: has {len(texts)} lines, expected {len(paths)}, one for each file of {options.folder}")
else:
    written = os.path.join(options.folder, "transcripts.txt")
    with open(written, "w", encoding="utf-8") as f:
        texts = []
        for text in transcribe(paths, options.asr):
            texts.append(text)
            print(text, file=f, flush=True)
    print(f"wrote        {written}")
nlls = [nll for nll in mean_nlls(texts, options.lm) if nll is not None]
if not nlls:
    sys.exit("no transcript has two tokens")
print(f"GenPPL       {numpy.exp(numpy.mean(nlls)):.4f} of {options.lm}")
try:
    from nltk.tokenize import NLTKWordTokenizer

    print(f"auto-BLEU-2  {numpy.mean([auto_bleu(NLTKWordTokenizer().tokenize(text)) for text in texts]):.4f} of NLTK's words")
except ImportError:
    print("auto-BLEU-2  of NLTK's words: pip install nltk")
print(f"auto-BLEU-2  {numpy.mean([auto_bleu(re.findall(WORDS, text, re.ASCII)) for text in texts]):.4f} of ./eval's words")
print(f"n            {len(texts)}" + (f", of which {len(texts) - len(nlls)} are too short for GenPPL" if len(nlls) < len(texts) else ""))
