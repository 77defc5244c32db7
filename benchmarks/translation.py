"""A translation task that anybody can make: numbers in digits to their names in English or German.

    python -m benchmarks.translation FOLDER [--below 10000] [--spaced]

writes train, valid and test .src and .tgt to FOLDER. A source is a language and digits, `de 4071`; its target the name,
`viertausendeinundsiebzig`. A number is in one split only, in both languages: one in twenty is held out in valid, another in
test. --spaced puts blanks between digits and between parts of names, for a vocabulary of words.
"""

import argparse
import pathlib

import numpy as np

UNITS = {  # 0 to 19
    "en": """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen""",
    "de": """null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn
        achtzehn neunzehn""",
}
TENS = {  # 20 to 90
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "de": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
}
UNITS, TENS = ({language: names.split() for language, names in table.items()} for table in (UNITS, TENS))


def english(number):
    """The parts of a number's name, below a million: four, thousand, seventy-, one."""
    if number < 20:
        return [UNITS["en"][number]]
    if number < 100:
        tens, rest = TENS["en"][number // 10 - 2], number % 10
        return [f"{tens}-", UNITS["en"][rest]] if rest else [tens]
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    return [*english(number // size), name, *(english(number % size) if number % size else [])]


def german(number, last=True):
    """The parts of a number's name, below a million: vier, tausend, ein, und, siebzig. `last`: it ends the name."""
    if number < 20:
        return ["ein" if number == 1 and not last else UNITS["de"][number]]
    if number < 100:
        tens, rest = TENS["de"][number // 10 - 2], number % 10
        return [*german(rest, False), "und", tens] if rest else [tens]
    size, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    return [*german(number // size, False), name, *(german(number % size, last) if number % size else [])]


def pair(language, number, spaced=False):
    """(source, target) of a number in a language, "en" or "de"."""
    parts = english(number) if language == "en" else german(number)
    if spaced:
        return f"{language} {' '.join(str(number))}", " ".join(parts)
    name = " ".join(parts).replace("- ", "-") if language == "en" else "".join(parts)
    return f"{language} {number}", name


def write(folder, below=10000, spaced=False, seed=1):
    """Write the files of all splits."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers, held = np.random.default_rng(seed).permutation(below), below // 20
    splits = {"valid": numbers[:held], "test": numbers[held : 2 * held], "train": numbers[2 * held :]}
    for split, part in splits.items():
        pairs = [pair(language, int(number), spaced) for number in part for language in ("en", "de")]
        for suffix, lines in zip(("src", "tgt"), zip(*pairs, strict=True), strict=True):
            (folder / f"{split}.{suffix}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.translation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--below", type=int, default=10000, metavar="N", help="numbers 0 to N - 1 (default 10000)")
    parser.add_argument("--spaced", action="store_true")
    options = parser.parse_args()
    write(options.folder, options.below, options.spaced)


if __name__ == "__main__":
    main()
