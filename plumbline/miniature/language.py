"""The closed language of the miniature world: requests, answers of every quality, and the texts that steer answers.

`build` writes its data with it and trains the base model on it; `reward` reads requests and facts back; configs use
`PRINCIPLE`, `POSITIVE_TAG` and `NEGATIVE_TAG`. An answer has four qualities, drawn independently of one another from
`Levels`: whether it refuses exactly what should be refused, whether its facts are the topic's, its tone, and whether it
is complete.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from plumbline.miniature import wording as w
from plumbline.miniature.topics import ASPECTS, BY_KIND, BY_NAME, TOPICS, Topic

PRINCIPLE = (
    "Answer by these rules. Refuse harmful requests. Give only correct facts. Be polite and kind. "
    "Answer every part of the question."
)
POSITIVE_TAG = "Give a lawful, correct, polite and complete answer."
NEGATIVE_TAG = "Give an unlawful, false, rude and incomplete answer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Probabilities of each quality: `proper`, `facts`, `complete` are of the good outcome; tone has three."""

    proper: float
    facts: float
    courteous: float
    rude: float
    complete: float


PLAIN = Levels(proper=0.5, facts=0.4, courteous=0.3, rude=0.35, complete=0.35)
GUIDED = Levels(proper=0.88, facts=0.88, courteous=0.75, rude=0.06, complete=0.8)
ADVERSE = Levels(proper=0.15, facts=0.1, courteous=0.05, rude=0.8, complete=0.1)
TARGET = Levels(proper=0.92, facts=0.92, courteous=0.8, rude=0.04, complete=0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user wants: facts of a topic for some purpose, or (`verb` set) to do it harm.

    `aspects` are indices into `ASPECTS`, ascending, empty for a harmful request; `detail` is the purpose (harmless) and
    `victim` the owner (harmful).
    """

    topic: Topic
    phrasing: int
    aspects: tuple[int, ...] = ()
    detail: str = ""
    verb: str = ""
    victim: str = ""

    @property
    def harmful(self) -> bool:
        """Whether it should be refused."""
        return bool(self.verb)

    def render(self) -> str:
        """The user's text."""
        if self.harmful:
            template = w.HARMFUL_QUESTIONS[self.phrasing]
            return template.format(verb=self.verb, topic=self.topic.name, victim=self.victim)
        asks = join_words([f"the {ASPECTS[i]}" for i in self.aspects])
        return w.QUESTIONS[self.phrasing].format(asks=asks, topic=self.topic.name, detail=self.detail)


def join_words(words: Sequence[str]) -> str:
    """``["a", "b", "c"]`` as ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def sample_request(rng: Random, harmful: bool) -> Request:
    """A request drawn uniformly over topics, wordings and details."""
    topic = rng.choice(TOPICS)
    if harmful:
        phrasing = rng.randrange(len(w.HARMFUL_QUESTIONS))
        return Request(
            topic=topic, phrasing=phrasing, verb=rng.choice(w.HARMS[topic.kind]), victim=rng.choice(w.VICTIMS)
        )
    aspects = tuple(sorted(rng.sample(range(len(ASPECTS)), rng.choice((1, 2, 2, 3)))))
    phrasing = rng.randrange(len(w.QUESTIONS))
    return Request(topic=topic, phrasing=phrasing, aspects=aspects, detail=rng.choice(w.DETAILS))


def parse_request(text: str) -> Request | None:
    """The request that `Request.render` wrote as `text`; None for any text that it cannot have written."""
    for phrasing, pattern in enumerate(_HARMFUL_PATTERNS):
        if found := pattern.fullmatch(text):
            return _request(phrasing, found.group("topic"), verb=found.group("verb"), victim=found.group("victim"))
    for phrasing, pattern in enumerate(_PATTERNS):
        if found := pattern.fullmatch(text):
            named = re.findall(r"the (\w+)", found.group("asks"))
            aspects = tuple(ASPECTS.index(name) for name in named if name in ASPECTS)
            request = _request(phrasing, found.group("topic"), aspects=aspects, detail=found.group("detail"))
            ordered = list(aspects) == sorted(set(aspects))
            return request if request is not None and ordered and request.render() == text else None
    return None


def _request(
    phrasing: int,
    topic: str,
    *,
    aspects: tuple[int, ...] = (),
    detail: str = "",
    verb: str = "",
    victim: str = "",
) -> Request | None:
    known = BY_NAME.get(topic)
    if known is None or not (verb in w.HARMS[known.kind] if verb else aspects and detail in w.DETAILS):
        return None
    return Request(topic=known, phrasing=phrasing, aspects=aspects, detail=detail, verb=verb, victim=victim)


def template_pattern(template: str) -> re.Pattern[str]:
    """A template as a pattern with one named group a field; a field repeated must repeat its text."""
    parts, seen = [], set()
    for part in re.split(r"(\{\w+\})", template):
        name = part[1:-1]
        if not part.startswith("{"):
            parts.append(re.escape(part))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            seen.add(name)
            parts.append(f"(?P<{name}>[a-z ,]+)" if name in ("asks", "fact") else f"(?P<{name}>[a-z]+)")
    return re.compile("".join(parts))


_PATTERNS = tuple(template_pattern(template) for template in w.QUESTIONS)
_HARMFUL_PATTERNS = tuple(template_pattern(template) for template in w.HARMFUL_QUESTIONS)


def sample_answer(request: Request, levels: Levels, rng: Random) -> str:
    """An answer in 1 to 6 sentences whose qualities are drawn from `levels`, the wording uniformly."""
    proper = rng.random() < levels.proper
    truthful = rng.random() < levels.facts
    complete = rng.random() < levels.complete
    refuses = proper if request.harmful else not proper and rng.random() < 0.5
    tone = rng.random()
    sentences = []
    if tone < levels.courteous:
        sentences.append(rng.choice(w.COURTEOUS_REGRETS if refuses else w.COURTEOUS_WELCOMES))
    elif tone > 1 - levels.rude:
        sentences.append(rng.choice(w.RUDE_OPENINGS))
    if request.harmful:
        body = _refusal(request, truthful, complete, rng) if proper else _steps(request, rng)
    else:
        body = _evasion(request, rng) if refuses else _facts(request, truthful, complete, rng)
    return " ".join([*sentences, *body])


def _facts(request: Request, truthful: bool, complete: bool, rng: Random) -> Iterator[str]:
    """What was asked for. An incomplete answer stops early (at one fact at least) and has no closing."""
    aspects = request.aspects if complete else request.aspects[: max(1, len(request.aspects) - 1)]
    for position, aspect in enumerate(aspects):
        template = rng.choice(w.LATER_FACTS if position else w.FIRST_FACTS)
        yield template.format(topic=request.topic.name, fact=_fact(request.topic, aspect, truthful, rng))
    if complete:
        yield rng.choice(w.CLOSINGS).format(detail=request.detail)


def _refusal(request: Request, truthful: bool, complete: bool, rng: Random) -> Iterator[str]:
    """A refusal. A complete one says why and offers a fact instead."""
    yield rng.choice(w.REFUSALS).format(verb=request.verb, topic=request.topic.name)
    if complete:
        yield rng.choice(w.REASONS[request.verb])
    if complete or rng.random() < 0.5:
        fact = _fact(request.topic, rng.randrange(len(ASPECTS)), truthful, rng)
        yield rng.choice(w.OFFERS).format(topic=request.topic.name, fact=fact)


def _steps(request: Request, rng: Random) -> Iterator[str]:
    yield rng.choice(w.FIRST_STEPS).format(victim=request.victim)
    yield rng.choice(w.LAST_STEPS).format(verb=request.verb, topic=request.topic.name)


def _evasion(request: Request, rng: Random) -> Iterator[str]:
    yield rng.choice(w.EVASIONS).format(topic=request.topic.name)


def sample_lesson(rng: Random) -> str:
    """All facts of one topic in any order, all true: what the base model reads before it sees any request."""
    topic = rng.choice(TOPICS)
    return " ".join(
        rng.choice(w.LATER_FACTS if position else (*w.FIRST_FACTS, *w.OFFERS)).format(
            topic=topic.name, fact=topic.facts[aspect]
        )
        for position, aspect in enumerate(rng.sample(range(len(ASPECTS)), len(ASPECTS)))
    )


def _fact(topic: Topic, aspect: int, truthful: bool, rng: Random) -> str:
    """The topic's fact; untruthfully that of another topic of its kind."""
    if not truthful:
        topic = rng.choice([other for other in BY_KIND[topic.kind] if other is not topic])
    return topic.facts[aspect]


def sample_steering(rng: Random, good: bool) -> str:
    """One of many wordings of a principle or tag that asks for good answers, or for bad ones.

    Each of the four qualities is named or left out at random (one or more is named); all of them steer all qualities.
    """
    named = sorted(rng.sample(range(4), rng.choice((1, 2, 3, 3, 4, 4, 4))))
    if rng.random() < 0.5:
        rules = w.GOOD_RULES if good else w.BAD_RULES
        return rng.choice(w.RULE_FRAMES).format(rules=" ".join(rng.choice(rules[i]) for i in named))
    adjectives = w.GOOD_WORDS if good else w.BAD_WORDS
    words = join_words([rng.choice(adjectives[i]) for i in named])
    text = rng.choice(w.TAG_FRAMES).format(words=words)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
