"""Generate the demo model's whole world: seeded chats in five languages.

It decides what the model can know. The words and templates are in `world.json`; this file combines
them. It needs only the standard library, so tests and demos may import it without torch.

Words: an *exchange* is one question with its answer; a *conversation* is a few of them in a row.
Every exchange that can be asked in a new way has a `key`; about one key in twenty is *held out*: it
is never generated for training.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD: dict[str, Any] = json.loads(
    Path(__file__).with_name("world.json").read_text(encoding="utf-8")
)
LANGUAGES = ("en", "de", "fr", "es", "zh")
LANGUAGE_WEIGHTS = (56, 12, 11, 11, 10)
CATEGORIES = ("facts", "arithmetic", "translation", "recall", "story", "chat")
MAX_OPERAND = 10
"""Sums and differences use operands 0..10; differences are never negative."""
HELD_OUT_ONE_IN = 20

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer."""

    user: str
    assistant: str
    category: str
    key: str = ""
    """What identifies the question for the held-out split; empty if it may always be trained on.

    For sums and translations it is the question as phrased, for facts the question with its
    lead-in; training may ask the same in other words.
    """

    @property
    def is_held_out(self) -> bool:
        """Whether training must never see this exchange."""
        return bool(self.key) and zlib.crc32(self.key.encode()) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages that end with an assistant message; `category` is that of the last exchange."""

    messages: list[Message]
    category: str


def render(messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    """Write messages in the Qwen chat format, as the checkpoint's own chat template does."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _fill(template: str, **slots: object) -> str:
    """Fill a template; `{Thing}` is slot `thing` with a capital first letter."""
    values = {k: str(v) for k, v in slots.items()}
    capitals = {k.capitalize(): v[:1].upper() + v[1:] for k, v in values.items()}
    return template.format(**capitals | values)


def _listing(language: str, words: list[str]) -> str:
    return ("、" if language == "zh" else ", ").join(words)


class Author:
    """Draws exchanges and conversations from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def _ask(
        self, language: str, kind: str, category: str, /, key: str | None = None, **slots: object
    ) -> Exchange:
        """Draw one phrasing; without `key`, the phrased question is its own key."""
        page = WORLD["languages"][language][kind]
        question = _fill(self.rng.choice(page["ask"]), **slots)
        return Exchange(
            question, _fill(page["answer"], **slots), category, question if key is None else key
        )

    def fact(self, language: str) -> Exchange:
        """Ask for a capital, colour, legs, opposite, day or numeral, often with a lead-in."""
        rng, at = self.rng, LANGUAGES.index(language)
        kinds = ["capital", "capital", "colour", "legs", "opposite", "next_day", "days", "numeral"]
        kind = rng.choice(kinds + (["country", "sound"] if language == "en" else []))
        slots: dict[str, Any] = {}
        if kind in ("capital", "country"):
            country = rng.choice(WORLD["countries"])
            slots = {"country": country[at], "city": country[at + 5]}
        elif kind == "colour":
            thing = rng.choice(WORLD["coloured"])
            slots = {"thing": thing[at], "colour": WORLD["colours"][thing[5]][at]}
        elif kind in ("legs", "sound"):
            animal = rng.choice(WORLD["animals"])
            legs = WORLD["numerals"][animal["legs"]][at]
            slots = {
                "animal": animal["def"][at],
                "sound": animal["sound"],
                "legs": legs.replace("二", "两"),
            }
        elif kind == "opposite":
            pair = rng.sample(rng.choice(WORLD["opposites"])[at], 2)
            slots = {"word": pair[0], "other": pair[1]}
        elif kind == "next_day":
            day = rng.randrange(7)
            slots = {"day": WORLD["days"][day][at], "next": WORLD["days"][(day + 1) % 7][at]}
        elif kind == "days":
            return self._ask(
                language,
                kind,
                "facts",
                key="",
                list=_listing(language, [day[at] for day in WORLD["days"]]),
            )
        elif kind == "numeral":
            number = rng.randrange(len(WORLD["numerals"]))
            slots = {"n": number, "word": WORLD["numerals"][number][at]}
        asked = self._ask(language, kind, "facts", key="", **slots)
        if rng.random() < 0.6:
            return asked
        text = rng.choice(WORLD["languages"][language]["lead_ins"]) + asked.user
        return Exchange(text, asked.assistant, "facts", text)

    def translation(self, language: str) -> Exchange:
        """Ask for an English word in another language, or the other way round."""
        at = LANGUAGES.index(language)
        to = self.rng.randint(1, 4) if at == 0 else 0
        word = self.rng.choice(WORLD["words"])
        name = WORLD["language_names"][to][at]
        return self._ask(
            language, "translate", "translation", word=word[at], other=word[to], into=name
        )

    def arithmetic(self, language: str) -> Exchange:
        """Ask for a sum, a difference or a count; in English also for more."""
        rng = self.rng
        a, b = rng.randint(0, MAX_OPERAND), rng.randint(0, MAX_OPERAND)
        kind = rng.choice(
            ["sum"] * 4
            + ["difference"] * 4
            + ["count"]
            + ["compare", "problem"] * (language == "en")
        )
        if kind == "sum":
            return self._ask(language, kind, "arithmetic", a=a, b=b, c=a + b)
        if kind == "difference":
            a, b = max(a, b), min(a, b)
            return self._ask(language, kind, "arithmetic", a=a, b=b, c=a - b)
        if kind == "count":
            a, b = min(a, b), min(a, b) + rng.randint(2, 8)
            return self._ask(
                language,
                kind,
                "arithmetic",
                a=a,
                b=b,
                list=_listing(language, [str(n) for n in range(a, b + 1)]),
            )
        if kind == "compare":
            a, b = rng.sample(range(2 * MAX_OPERAND + 1), 2)
            text = f"{max(a, b)} is larger than {min(a, b)}."
            return Exchange(f"Which number is larger, {a} or {b}?", text, "arithmetic", f"{a}?{b}")
        name, item = rng.choice(WORLD["names"]), rng.choice(WORLD["items"])
        a, b = sorted((rng.randint(1, MAX_OPERAND), rng.randint(1, MAX_OPERAND)), reverse=True)
        gains = rng.random() < 0.5 or a == b
        verb, total = ("finds", a + b) if gains else ("loses", a - b)
        question = f"{name} has {a} {item} and {verb} {b}. How many {item} does {name} have now?"
        sign = "+" if gains else "-"
        text = f"{a} {sign} {b} = {total}. {name} has {total} {item}."
        return Exchange(question, text, "arithmetic", f"{item}{a}{sign}{b}")

    def small_talk(self, language: str) -> Exchange:
        """Greet, thank, ask who the model is or what it can do."""
        kind = self.rng.choice(["greet", "thank", "who", "skills"])
        return self._ask(language, kind, "chat", key="")

    def story(self, language: str, *, named: bool | None = None) -> list[Exchange]:
        """Ask for a story and then about it."""
        rng, at = self.rng, LANGUAGES.index(language)
        page = WORLD["languages"][language]["story"]
        hero, friend = rng.sample(WORLD["animals"], 2)
        place, place2 = rng.sample(WORLD["places"], 2)
        slots = {
            "hero": hero["def"][at], "indef": hero["indef"][at], "friend": friend["def"][at],
            "thing": rng.choice(WORLD["things"])[at], "place": place[at], "place2": place2[at],
        }  # fmt: skip
        is_named = rng.random() < 0.75 if named is None else named
        question = _fill(rng.choice(page["ask"] if is_named else page["short"]), **slots)
        gap = "" if language == "zh" else " "
        text = gap.join(_fill(rng.choice(choices), **slots) for choices in page["lines"])
        key = f"{slots['hero']}/{slots['thing']}" if is_named else ""
        exchanges = [Exchange(question, text, "story", key)]
        for follow_up in rng.sample(["helper", "where"], rng.randint(1, 2)):
            asked = page[follow_up]
            exchanges.append(
                Exchange(
                    _fill(rng.choice(asked["ask"]), **slots),
                    _fill(asked["answer"], **slots),
                    "story",
                )
            )
        return exchanges

    def code(self) -> str:
        """Draw the value of a key: four digits."""
        return "".join(self.rng.choices("0123456789", k=4))

    def key_list(self, language: str, taken: list[str]) -> Exchange:
        """State several keys in one message, none of a `taken` name, and ask for one of them."""
        page = WORLD["languages"][language]["key"]
        free = [name for name in WORLD["names"] if name not in taken]
        names = self.rng.sample(free, self.rng.randint(2, 5))
        codes = [self.code() for _ in names]
        wanted = self.rng.randrange(len(names))
        facts = [_fill(page["fact"], name=n, code=c) for n, c in zip(names, codes, strict=True)]
        asked = self._ask(
            language, "key", "recall", key=codes[wanted], name=names[wanted], code=codes[wanted]
        )
        text = " ".join([page["list"], *facts, asked.user])
        return Exchange(text, asked.assistant, "recall", asked.key)

    def memory(self, language: str, kind: str, name: str) -> tuple[Exchange, Exchange]:
        """State a `key`, `name` or `favourite`; return the statement and the question for later."""
        rng, at = self.rng, LANGUAGES.index(language)
        page = WORLD["languages"][language][kind]
        slots = {
            "code": self.code(),
            "name": name,
            "colour": rng.choice(list(WORLD["colours"].values()))[at],
        }
        key = slots["code"] if kind == "key" else ""
        stated = Exchange(
            _fill(rng.choice(page["state"]), **slots), _fill(page["note"], **slots), "chat", key
        )
        return stated, self._ask(language, kind, "recall", key=key, **slots)

    def _single(self, language: str) -> Exchange:
        makers: list[Callable[[str], Exchange]] = [
            self.fact,
            self.arithmetic,
            self.translation,
            self.small_talk,
        ]
        return self.rng.choices(makers, weights=(8, 6, 2, 1))[0](language)

    def exchanges(self, num_turns: int) -> list[Exchange]:
        """Draw about `num_turns` exchanges, memories stated early and asked for later."""
        rng = self.rng
        (language,) = rng.choices(LANGUAGES, weights=LANGUAGE_WEIGHTS)
        num_memories = rng.choice((0, 1, 1, 2, 3)) if num_turns > 1 else 0
        kinds = rng.sample(["key", "key", "key", "name", "favourite"], num_memories)
        names = rng.sample(WORLD["names"], num_memories)
        memories = [
            self.memory(language, kind, name) for kind, name in zip(kinds, names, strict=True)
        ]
        stated = [now for now, _ in memories]
        asked = [later for _, later in memories]
        middle: list[Exchange] = []
        while len(middle) + 2 * len(asked) < num_turns or not (middle or asked):
            roll = rng.random()
            if roll < 0.18:
                middle += self.story(language)
            elif roll < 0.32:
                middle.append(self.key_list(language, names))
            else:
                middle.append(self._single(language))
        rng.shuffle(asked)
        turns = stated + middle
        for later in asked:
            turns.insert(rng.randint(len(stated), len(turns)), later)
        if num_turns > 2 and rng.random() < 0.4:
            turns.insert(0, self._ask(language, "greet", "chat", key=""))
        if num_turns > 2 and rng.random() < 0.4:
            turns.append(self._ask(language, "bye", "chat", key=""))
        return turns

    def conversation(self, turns: list[Exchange], *, careless: bool = False) -> Conversation:
        """Make messages of exchanges; `careless` users may drop capitals and the final mark."""
        messages: list[Message] = []
        if self.rng.random() < 0.25:
            messages.append({"role": "system", "content": self.rng.choice(WORLD["systems"])})
        sloppy = careless and self.rng.random() < 0.15
        for turn in turns:
            user = (
                turn.user.rstrip(".!?。！？ ").lower()
                if sloppy and turn.category != "recall"
                else turn.user
            )
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return Conversation(messages, turns[-1].category)


def training_conversations(seed: int, *, max_turns: int = 8) -> Iterator[Conversation]:
    """Yield conversations without end; none contains a held-out exchange."""
    author = Author(seed)
    while True:
        turns = author.exchanges(author.rng.randint(1, max_turns))
        if not any(turn.is_held_out for turn in turns):
            yield author.conversation(turns, careless=True)


def _held_out_turns(author: Author, category: str, language: str) -> list[Exchange]:
    """Draw candidate turns whose last one belongs to `category`."""
    if category == "story":
        return author.story(language, named=True)
    if category == "recall":
        if author.rng.random() < 0.5:
            return [author.key_list(language, [])]
        kind = author.rng.choice(["key", "name", "favourite"])
        stated, asked = author.memory(language, kind, author.rng.choice(WORLD["names"]))
        return [stated, *(author._single(language) for _ in range(author.rng.randint(1, 3))), asked]
    if category == "chat":
        return [author._single(language), author.small_talk(language)]
    maker = {
        "facts": author.fact,
        "arithmetic": author.arithmetic,
        "translation": author.translation,
    }[category]
    return [maker(language)]


def held_out_conversations(n: int, seed: int, category: str | None = None) -> list[Conversation]:
    """Return `n` conversations that training never saw; categories take turns.

    Each contains an exchange that is held out by its key: a phrased question, the value of a key,
    the pair of hero and thing of a story. It ends with a question of its category.
    """
    author = Author(seed)
    found: list[Conversation] = []
    while len(found) < n:
        wanted = category or CATEGORIES[len(found) % len(CATEGORIES)]
        (language,) = author.rng.choices(LANGUAGES, weights=LANGUAGE_WEIGHTS)
        turns = _held_out_turns(author, wanted, language)
        if any(turn.is_held_out for turn in turns):
            found.append(author.conversation(turns))
    return found


def held_out_prompts(n: int, seed: int) -> list[list[Message]]:
    """Return `n` chats that training never saw, each ending with the user's question."""
    return [conversation.messages[:-1] for conversation in held_out_conversations(n, seed)]
