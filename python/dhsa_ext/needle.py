"""A question whose answer is hidden in a long real text: the demo's prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from .models import Tokenizer

_CITIES = (
    "Oslo", "Cairo", "Lima", "Quito", "Hanoi", "Accra", "Dakar", "Minsk", "Turin", "Perth", "Kyoto", "Sofia",
)  # fmt: skip
_NOUNS = ("river", "museum", "garden", "bridge", "violin", "planet", "harbor", "lantern", "forest", "castle")
# Two ways to hide a fact and to ask for it: a base model goes on writing after the question.
_FORMS = (
    (_CITIES, "\nThe secret code of {} is {}.\n", "\n\nThe secret code of {} is"),
    (
        _NOUNS,
        "\nOne of the special magic numbers for {} is: {}.\n",
        "\n\nWhat is the special magic number for {} mentioned in the text? "
        "One of the special magic numbers for {} is:",
    ),
)


@dataclass(frozen=True)
class Needle:
    """A prompt of exactly the asked length, and the answer to its question."""

    ids: list[int]
    fact: str
    question: str
    answer: str
    begin: int  # the fact's tokens
    end: int
    question_begin: int = 0  # the question's first token

    def is_right(self, generated: str) -> bool:
        """True if the first number written is the answer: an answer buried in further guesses does not count."""
        numbers = "".join(c if c.isdigit() else " " for c in generated).split()
        return bool(numbers) and numbers[0] == self.answer


def read_text(file: Path | None) -> str:
    """The text of a file, or the documentation that Python carries with it."""
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def hide(text: str, tokenizer: Tokenizer, bos: list[int], length: int, seed: int, depth: float | None = None) -> Needle:
    """Hide a fact in a piece of `text`, at `depth` (0 to 1); seed picks the piece, the fact, and a depth not given.

    ValueError if the text or the length is too short.
    """
    rng = random.Random(seed)
    subjects, fact, question = rng.choice(_FORMS)
    subject, answer = rng.choice(subjects), str(rng.randrange(10_000, 100_000))
    fact, question = fact.format(subject, answer), question.format(subject, subject)
    fact_ids, question_ids = tokenizer.encode(fact), tokenizer.encode(question)
    room = length - len(bos) - len(fact_ids) - len(question_ids)
    if room < 64:
        raise ValueError(f"dhsa_ext.demo: context: expected room for 64 tokens of text, got {length} tokens in all")
    # Start at a paragraph, as early as the text needs: 8 characters a token is more than any text of words takes.
    latest = max(0, len(text) - 8 * room)
    start = text.find("\n\n", rng.randrange(latest + 1)) + 1
    text_ids = tokenizer.encode(text[start : start + 8 * room])
    if len(text_ids) < room:
        text_ids = tokenizer.encode(text)
    if len(text_ids) < room:
        raise ValueError(
            f"dhsa_ext.demo: text: expected at least {room} tokens for a context of {length}, got {len(text_ids)}"
        )
    text_ids = text_ids[:room]
    depth = rng.uniform(0.1, 0.9) if depth is None else depth
    at = int(depth * room)
    while at > 0 and not tokenizer.decode(text_ids[at - 1 : at]).endswith("\n"):
        at -= 1
    begin = len(bos) + at
    ids = bos + text_ids[:at] + fact_ids + text_ids[at:] + question_ids
    return Needle(ids, fact.strip(), question.strip(), answer, begin, begin + len(fact_ids), length - len(question_ids))
