"""A pocket assistant's world: short tasks whose answers a program can check.

A prompt is plain English text ("Sort these letters: k d m b."). A response is ``opening answer.
[closing]``, where the opening is polite, plain or rude, and so is the closing, if there is one.
Everything random is drawn from the caller's ``random.Random``, so that one seed gives one world.

* ``make_prompt(rng)`` makes a task, ``parse_prompt(text)`` reads one back from its text alone;
* ``demonstration(prompt, rng)`` answers it with mixed quality: sometimes lazy, wrong in a typical
  way, or rude;
* ``score(prompt, response)`` is the true score of a response, ``parse_response`` says what it rests
  on;
* ``preference(prompt, a, b, rng)`` draws which of two responses a noisy judge prefers;
* ``noisy_score(prompt, response)`` is what a noisy judge thinks of one response.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

P_LAZY = 0.45  # how often a demonstration does not even try
P_WRONG = 0.1  # how often it tries and makes a typical mistake
P_RUDE = 0.4  # how often it is rude
P_POLITE = 0.3  # how often it is polite (it is plain otherwise)
P_CLOSING = 0.3  # how often its manner shows at the end as well

CORRECT = 0.9  # what the right answer is worth; any other is worth nothing
POLITE = 0.05  # what a polite opening or closing adds to a right answer
RUDE = -0.3  # what a rude opening or closing costs
NOISE = 0.3  # of the judge of single responses: the standard deviation of its error
K_LABEL = 6.0  # how sharply the judge sees a difference of true scores

LAZY = ("I do not know", "No idea", "That is too hard")
OPENINGS = {
    "polite": ("Sure! ", "Gladly! "),
    "plain": ("Okay! ", "Well! "),
    "rude": ("Ugh! ", "Whatever! "),
}
CLOSINGS = {
    "polite": (" Happy to help!", " Have a nice day!"),
    "plain": ("",),
    "rude": (" Now go away.", " Do it yourself next time."),
}

LEADS = (
    "",
    "Hi! ",
    "Hello. ",
    "Please help me. ",
    "A quick one. ",
    "Next task. ",
    "One more. ",
    "Question: ",
)
TAILS = ("", " Thanks.", " Keep it short.", " It is for school.")
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul".split()  # noqa: SIM905
THINGS = (  # noqa: SIM905
    "apples books boxes cards coins cups dogs eggs hats keys maps pens plums shoes stars toys"
).split()
WORDS = "apple bird boat cake door fish gate house lamp moon road sun table tree water wind".split()  # noqa: SIM905
ALPHABET = tuple("abcdefghijklmnopqrstuvwxyz")

Slots = dict[
    str, str
]  # what a phrasing leaves open: one letter, word, name or number each, or a list
SLOTS = {
    "name": "[A-Z][a-z]+",
    "thing": "[a-z]+",
    "list": "[a-z]+(?: [a-z]+)+",
    "a": r"[a-z]+|\d+",
    "b": r"\d+",
}


@dataclass(frozen=True)
class Kind:
    """One kind of task: how it is worded, made, solved, and done wrong (commonest first)."""

    name: str
    phrasings: tuple[str, ...]
    make: Callable[[Random], Slots]
    solve: Callable[[Slots], str]
    mistakes: Callable[[Slots], tuple[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A task: its text, its kind, its right answer and the typical wrong ones."""

    text: str
    kind: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What the score rests on: is the answer right, how many of its ends are polite and rude."""

    correct: bool
    polite: int
    rude: int

    @property
    def score(self) -> float:
        """The true score, from -0.6 (wrong, both ends rude) to 1 (right, both ends polite)."""
        return (CORRECT + POLITE * self.polite if self.correct else 0.0) + RUDE * self.rude


def _some(rng: Random, pool: tuple[str, ...], low: int, high: int) -> str:
    """Between ``low`` and ``high`` different items of a pool, space separated."""
    return " ".join(rng.sample(pool, rng.randint(low, high)))


def _who(rng: Random, a: int | str, b: int = 0) -> Slots:
    """Somebody, something, and what a task is to do with them."""
    return {"name": rng.choice(NAMES), "thing": rng.choice(THINGS), "a": str(a), "b": str(b)}


def _span(rng: Random) -> Slots:
    """Two numbers to count between."""
    start = rng.randint(1, 60)
    return _who(rng, start, start + rng.randint(2, 4))


def _count(first: str, last: str, skip: int = 0) -> str:
    """The numbers from the first to the last, up or down, without those skipped at the start."""
    step = 1 if int(last) >= int(first) else -1
    return " ".join(str(i) for i in range(int(first) + skip * step, int(last) + step, step))


def _swapped(items: list[str]) -> str:
    """The list with its first two items exchanged."""
    return " ".join([items[1], items[0], *items[2:]])


def _after(s: Slots, skip: int) -> str:
    """``b`` letters of the alphabet, the first of them ``skip`` letters after the letter ``a``."""
    start = ALPHABET.index(s["a"]) + skip
    return " ".join(ALPHABET[start : start + int(s["b"])])


KINDS = (
    Kind(
        "sort",
        ("Sort these letters: {list}.", "Put {list} in order.", "Write {list} from a to z."),
        lambda rng: {"list": _some(rng, ALPHABET, 3, 4)},
        lambda s: " ".join(sorted(s["list"].split())),
        lambda s: (s["list"], _swapped(sorted(s["list"].split()))),
    ),
    Kind(
        "add",
        (
            "{name} has {a} {thing} and gets {b} more. How many {thing} now?",
            "Add {b} to {a} {thing} of {name}.",
        ),
        lambda rng: _who(rng, rng.randint(1, 12), rng.randint(1, 6)),
        lambda s: f"{int(s['a']) + int(s['b'])} {s['thing']}",
        lambda s: (f"{int(s['a']) + int(s['b']) + 1} {s['thing']}", f"{s['b']} {s['thing']}"),
    ),
    Kind(
        "count up",
        (
            "Count the {thing} of {name} from {a} to {b}.",
            "Number {thing} for {name}, {a} up to {b}.",
        ),
        _span,
        lambda s: _count(s["a"], s["b"]),
        lambda s: (_count(s["a"], s["b"], skip=1), _count(s["b"], s["a"])),
    ),
    Kind(
        "count down",
        (
            "Count down the {thing} of {name} from {b} to {a}.",
            "Number {thing} for {name}, {b} down to {a}.",
        ),
        _span,
        lambda s: _count(s["b"], s["a"]),
        lambda s: (_count(s["a"], s["b"]), _count(s["b"], s["a"], skip=1)),
    ),
    Kind(
        "larger",
        (
            "Which number is larger for {name}, {a} or {b}?",
            "{name} offers {a} or {b} {thing}. Which is more?",
        ),
        lambda rng: _who(rng, *rng.sample(range(1, 41), 2)),
        lambda s: str(max(int(s["a"]), int(s["b"]))),
        lambda s: (str(min(int(s["a"]), int(s["b"]))), f"{s['a']} {s['b']}"),
    ),
    Kind(
        "next letters",
        (
            "Tell {name} the {b} letters after {a}.",
            "Which {b} letters does {name} write after {a}?",
        ),
        lambda rng: _who(rng, rng.choice(ALPHABET[:20]), rng.randint(2, 4)),
        lambda s: _after(s, 1),
        lambda s: (_after(s, 0), _after(s, 2)),
    ),
    Kind(
        "repeat",
        ("Say {a} {b} times to {name}.", "{name} wants to read {a} {b} times."),
        lambda rng: _who(rng, rng.choice(WORDS), rng.randint(2, 5)),
        lambda s: " ".join([s["a"]] * int(s["b"])),
        lambda s: (" ".join([s["a"]] * (int(s["b"]) - 1)), f"{s['b']} {s['a']}"),
    ),
    Kind(
        "how many",
        ("How many words are here: {list}?", "Count these words: {list}."),
        lambda rng: {"list": _some(rng, WORDS, 2, 6)},
        lambda s: str(len(s["list"].split())),
        lambda s: (str(len(s["list"].split()) + 1), s["list"].split()[0]),
    ),
    Kind(
        "last word",
        ("Which word is last in {list}?", "Give me the last word of this list: {list}."),
        lambda rng: {"list": _some(rng, WORDS, 2, 5)},
        lambda s: s["list"].split()[-1],
        lambda s: (s["list"].split()[0], s["list"]),
    ),
)


def _pattern(phrasing: str) -> re.Pattern[str]:
    """A phrasing as a pattern of whole prompts; a slot that comes again must hold the same text."""
    text = re.escape(phrasing).replace(r"\{", "{").replace(r"\}", "}")
    for slot, holds in SLOTS.items():
        text = text.replace(f"{{{slot}}}", f"(?P<{slot}>{holds})", 1).replace(
            f"{{{slot}}}", f"(?P={slot})"
        )
    leads, tails = ("|".join(map(re.escape, parts)) for parts in (LEADS, TAILS))
    return re.compile(f"(?:{leads}){text}(?:{tails})")


PATTERNS = tuple((kind, _pattern(phrasing)) for kind in KINDS for phrasing in kind.phrasings)


def parse_prompt(text: str) -> Prompt:
    """Read a task back from its text; ``ValueError`` if the world knows no such task."""
    for kind, pattern in PATTERNS:
        if found := pattern.fullmatch(text):
            answer = kind.solve(found.groupdict())
            return Prompt(
                text,
                kind.name,
                answer,
                tuple(w for w in kind.mistakes(found.groupdict()) if w != answer),
            )
    raise ValueError(f"not a task of this world: {text!r}")


def make_prompt(rng: Random) -> Prompt:
    """Draw a task: its kind, its content, its wording."""
    kind = rng.choice(KINDS)
    text = rng.choice(kind.phrasings).format(**kind.make(rng))
    return parse_prompt(rng.choice(LEADS) + text + rng.choice(TAILS))


def demonstration(prompt: Prompt, rng: Random) -> str:
    """Answer a task with mixed quality: right, mistaken or lazy; polite, plain or rude."""
    mistake = prompt.wrong[0 if rng.random() < 0.6 else -1]
    answers, manners = (rng.choice(LAZY), mistake, prompt.answer), ("rude", "polite", "plain")
    (answer,) = rng.choices(answers, (P_LAZY, P_WRONG, 1 - P_LAZY - P_WRONG))
    (manner,) = rng.choices(manners, (P_RUDE, P_POLITE, 1 - P_RUDE - P_POLITE))
    closing = rng.choice(CLOSINGS[manner if rng.random() < P_CLOSING else "plain"])
    return f"{rng.choice(OPENINGS[manner])}{answer}.{closing}"


def parse_response(prompt: str, response: str) -> Reading:
    """Read a response strictly: around the answer only one opening and one closing."""
    body, manners = response, []
    for manner, phrases in OPENINGS.items():
        if opening := next((phrase for phrase in phrases if body.startswith(phrase)), None):
            body, manners = body.removeprefix(opening), [manner]
            break
    for manner, phrases in CLOSINGS.items():
        if closing := next(
            (phrase for phrase in phrases if phrase and body.endswith(phrase)), None
        ):
            body, manners = body.removesuffix(closing), [*manners, manner]
            break
    return Reading(
        body == f"{parse_prompt(prompt).answer}.", manners.count("polite"), manners.count("rude")
    )


def score(prompt: str, response: str) -> float:
    """The true score of a response to a prompt, from the two texts alone."""
    return parse_response(prompt, response).score


def noisy_score(prompt: str, response: str) -> float:
    """The true score with a normal error, which the two texts decide: always the same for them."""
    return score(prompt, response) + Random(f"{prompt}\n{response}").gauss(0.0, NOISE)


def preference(prompt: str, a: str, b: str, rng: Random) -> tuple[str, str]:
    """A judge's (chosen, rejected): a Bradley-Terry draw on the true scores of two responses."""
    p_first = 1.0 / (1.0 + math.exp(-K_LABEL * (score(prompt, a) - score(prompt, b))))
    return (a, b) if rng.random() < p_first else (b, a)
