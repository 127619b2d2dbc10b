#!/usr/bin/env python3
"""Write tales.txt: small stories of errands along one river, the same bytes every time.

    python samples/make_tales.py > samples/tales.txt
    python samples/make_tales.py --seed 7 --bytes 1000000 > more.txt

Each tale gives a traveller a thing to carry, a receiver, a message and some coins, then leads through a few
encounters. What was said at the start is needed again far below: the receiver asks for it, and back home the whole way
is told once more, in order, with the coins counted. A model that forgets the first lines cannot guess the last ones.

Only `random.Random.random` is used, whose numbers Python keeps the same from version to version.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


def words(text: str) -> list[str]:
    return text.split()


def phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


def pairs(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (phrase.split(": ") for phrase in phrases(text))]


WOMEN = words("Alda Brenna Corrie Dunja Edda Fenna Greta Hilke Ineke Jorun Katla Lisbet Maren Nele Oda Petra Runa")
MEN = words("Anselm Bertil Conrad Detlef Emrik Folke Gunnar Henning Ivo Joost Kasper Ludo Mats Niels Osric Piet Sten")
VILLAGES = words("Alderford Brackmere Coldwell Dunmoor Eastwater Fallowby Grayholm Hazelbeck Ironbridge Kettlesby")
TOWNS = words("Langport Millhaven Northgate Oakminster Queensferry Ravensend Saltmouth Thornwick Upperlock Westerquay")
TRADES = words("baker cooper dyer farrier glazier joiner miller potter roper saddler tanner weaver")
SKILLS = dict(pairs("""
baker: could tell the hour by the smell of bread | cooper: never made a barrel that leaked |
dyer: had blue hands from one winter to the next | farrier: was not afraid of any horse |
glazier: walked softly, out of habit | joiner: measured everything twice and most things again |
miller: slept badly when the wheel stood still | potter: hummed the same three notes all day |
roper: could tie a knot without looking | saddler: mended shoes for those who could not pay |
tanner: lived downwind of everybody and did not mind | weaver: counted threads even while dreaming"""))
STUFF = words("brass copper oak pewter silver walnut willow horn slate ivory-white blue-glazed iron")
THINGS = words("lantern flute bowl clock key spoon box whistle mirror comb bell compass")
WRAPS = phrases("""
in a wool scarf | in oiled cloth | in straw | in an old sleeve | in two leaves of paper | in a flour sack""")
SEASONS = phrases("""
in the first week of spring | at midsummer | when the apples were ripe | before the first snow | in the thaw |
on the shortest day of the year | while the hay was drying | in a month of fog""")
REASONS = phrases("""
You have good legs | You are going that way in any case | You are the only one who is not busy |
My own legs are too old for it | You can keep a thing to yourself""")
MESSAGES = phrases("""
the heron is back on the weir | the debt of the two winters is paid | the door was never locked |
the well runs clear again | the third bell is mended | the boat was found, and the oars with it |
nobody blames you for the fire | the letter came, but the ink had run | the orchard is yours to prune |
the white mare has a foal | the bridge will hold another year | there is a chair for you at our table""")
TOKENS = phrases("""
a grey feather | a button of bone | a river pearl | a ribbon of red thread | a hazel wand | a smooth green stone |
a candle end | a fish hook | a walnut shell | a small tin star""")
RIDDLES = pairs("""
I wear a new coat every year and never take off the old one: a tree | I was cut in June, and I feed in January: hay |
I carry every letter in the land and have not learned to read: the post bag |
I stand on one leg and look every wind in the face: a weathercock |
I am the smallest room in the house, and one guest fills me: a keyhole |
I tell the whole village when to eat, and am never asked to table: the noon bell |
I come to every wedding, and nobody hopes to see me: rain |
I go down the well more often than anybody, and never learn to swim: the rope""")
WEATHER = phrases("""
Rain came over the hills | The wind turned to the north | Hail beat the barley flat | Fog stood on the water |
Snow began to fall, thick and quiet | Thunder rolled up the valley""")
BEASTS = words("goat heifer gosling foal lamb sheepdog")
CROPS = words("barley beans cherries flax hay pears turnips")
NUMBERS = words("no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
ENDINGS = phrases("""
A thing is carried twice, they say: once in the hands, and once in the telling. |
And whoever doubts it may ask at the mill, where the tale is still told. |
That winter they told it so often that the children knew it by heart. |
The road is still there, and so is the river, and neither has hurried since. |
It was not a great errand. But it was done as it was asked, and that is rarer.""")


class Dice:
    """Choices from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(0, len(choices) - 1)]

    def several(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in random order."""
        left = list(choices)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]


@dataclass(frozen=True)
class Person:
    name: str
    trade: str
    is_woman: bool

    @property
    def they(self) -> str:
        return "she" if self.is_woman else "he"

    @property
    def them(self) -> str:
        return "her" if self.is_woman else "him"

    @property
    def their(self) -> str:
        return "her" if self.is_woman else "his"


@dataclass
class Tale:
    """What the beginning fixes, and what the way adds to it."""

    dice: Dice
    hero: Person
    sender: Person
    receiver: Person
    strangers: list[Person]
    home: str
    goal: str
    thing: str
    wrap: str
    message: str
    coins: int
    token: str
    lines: list[str] = field(default_factory=list)
    report: list[str] = field(default_factory=list)

    def tell(self, *lines: str) -> None:
        self.lines += lines


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def coins(count: int) -> str:
    return f"{NUMBERS[count]} coin{'' if count == 1 else 's'}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def at_the_ferry(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    price = tale.dice.number(1, 3)
    tale.tell(
        tale.dice.pick(
            [
                f"Where the road ran into the water there was a ferry, and the ferry belonged to {other.name}.",
                f"The river was too high to wade, but {other.name} had a boat and was bailing it out.",
                f"{hero.name} rang the bell on the landing, and {other.name} came over with the ferry, not hurrying.",
            ]
        ),
        f'"What does it cost to cross?" asked {hero.name}.',
        f'"{capital(coins(price))}," said {other.name}, "and your name, for I like to know whom I carry."',
        f'"{hero.name}, the {hero.trade}, from {tale.home}," said {hero.name}, and paid.',
        tale.dice.pick(
            [
                f"That left {hero.them} {coins(tale.coins - price)}.",
                f"In the middle of the water {hero.they} counted what was left: {coins(tale.coins - price)}.",
            ]
        ),
    )
    tale.coins -= price
    tale.report.append(f"{other.name} took me over the water for {coins(price)}")


def at_the_inn(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    tale.tell(
        tale.dice.pick(
            [
                f"{tale.dice.pick(WEATHER)}, and {hero.name} was glad to find an inn. {other.name} kept it.",
                f"{tale.dice.pick(WEATHER)}. There was one lit window far and wide, and it was {other.name}'s inn.",
            ]
        ),
        f'"Where do you come from?" asked {other.name}. "From {tale.home}," said {hero.name}.',
        f'"And where are you going?" "To {tale.goal}, to find {tale.receiver.name}."',
        f'"And what is that {tale.wrap}?" "That is {a(tale.thing)}, and it is not mine."',
        tale.dice.pick(
            [
                f'"Then sleep by the stove," said {other.name}, "and keep it under your head."',
                f"{other.name} asked nothing more, brought soup, and would not take a coin for it.",
                f'"I had a brother in {tale.goal}," said {other.name}. "Keep to the left bank. The right one is gone."',
            ]
        ),
    )
    tale.report.append(f"{other.name} kept me dry under a good roof")


def at_the_riddle(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    question, answer = tale.dice.pick(RIDDLES)
    tale.tell(
        tale.dice.pick(
            [
                f"On a narrow bridge sat {other.name}, who let nobody pass without a riddle.",
                f"{other.name} lay in the grass across the path. "
                + f'"First a riddle," said {other.name}, "and then the road."',
            ]
        ),
        f'"{question}," said {other.name}. "What am I?"',
        tale.dice.pick(
            [
                f'{hero.name} thought for as long as it takes to eat a pear. "{capital(answer)}," {hero.they} said.',
                f'"{capital(answer)}," said {hero.name} at once, for {hero.their} grandmother had asked the same.',
                f'"Is it hunger?" asked {hero.name}. It was not. "Then it is {answer}," {hero.they} said, and it was.',
            ]
        ),
        f'"Go on, then," said {other.name}, and drew in {other.their} feet.',
    )
    tale.report.append(f"{other.name} asked me a riddle: the answer was {answer}")


def at_the_market(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    low, high = tale.dice.number(4, 8), tale.dice.number(13, 16)
    tale.tell(
        tale.dice.pick(
            [
                f"It was market day at the crossroads, and {other.name}, who dealt in old things, had sharp eyes.",
                f"{other.name} had a stall at the crossroads, with everything on it that anybody had ever lost.",
            ]
        ),
        f'"I will give you {coins(low)} for that {tale.thing}," said {other.name}.',
        f'"It is promised," said {hero.name}.',
        f'"{capital(coins(high))}, then. I can hear that you have only {NUMBERS[tale.coins]}."',
        f'"It is promised to {tale.receiver.name} in {tale.goal}," said {hero.name}, "and a promise has no price."',
    )
    tale.report.append(f"{other.name} offered {coins(high)}, and I did not sell")


def at_the_lost_beast(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    beast, token = tale.dice.pick(BEASTS), tale.token
    tale.tell(
        tale.dice.pick(
            [
                f"In the reeds {hero.name} heard {a(beast)} crying, up to its belly in the mud.",
                f"Below the dike {a(beast)} had gone through the bank, and the more it struggled the deeper it sank.",
            ]
        ),
        tale.dice.pick(
            [
                f"{hero.name} laid down the {tale.thing}, took off {hero.their} boots and pulled until the mud let go.",
                f"It took {hero.them} an hour, a plank and all of {hero.their} patience to bring it out.",
            ]
        ),
        f"Then {other.name} came running over the field. The {beast} was {other.their} only one.",
        f'"I have no money," said {other.name}. "But take this." And {other.they} gave {hero.name} {token}.',
    )
    tale.report.append(f"{other.name} gave me {token} for pulling out {a(beast)}")


def at_the_toll(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    price = tale.dice.number(1, 2)
    tale.tell(
        f"At the gate of the old wall {other.name} held out a hand.",
        tale.dice.pick(
            [
                f"It had been a toll gate once, and {other.name} kept it up.",
                f"The wall was gone on both sides, but {other.name} still shut the gate at night.",
            ]
        ),
        f'{hero.name} counted {hero.their} money: {coins(tale.coins)}. "How much?" {hero.they} asked.',
        f'"{capital(coins(price))} for the road, and nothing for the view," said {other.name}.',
        f"{hero.name} paid, and had {coins(tale.coins - price)}.",
    )
    tale.coins -= price
    tale.report.append(f"{other.name} took {coins(price)} at the gate")


def at_the_fork(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    right, wrong = tale.dice.several(["left", "right"], 2)
    tale.tell(
        f"The road forked where no sign stood, and {other.name} was minding sheep between the two arms of it.",
        f'"Which way is {tale.goal}?" asked {hero.name}.',
        tale.dice.pick(
            [
                f'"The {right} road," said {other.name}. "The {wrong} one is prettier, and ends in a pond."',
                f'"They all say {wrong}," said {other.name}, "and they all come back. Go {right}."',
            ]
        ),
        f"{hero.name} went {right}.",
    )
    tale.report.append(f"{other.name} sent me {right} at the fork")


def at_the_harvest(tale: Tale) -> None:
    hero, other = tale.hero, tale.strangers.pop()
    crop, pay = tale.dice.pick(CROPS), tale.dice.number(1, 3)
    tale.tell(
        f"{other.name} was bringing in the {crop} alone, with a cloud as black as a stove behind the hill.",
        f'"Two hands more would save it," said {other.name}, and {hero.name} put down {hero.their} load.',
        tale.dice.pick(
            [
                f"For that {hero.they} got supper and {coins(pay)}, and now had {coins(tale.coins + pay)}.",
                f'"{capital(coins(pay))} for you, and a plum," said {other.name}. That made {coins(tale.coins + pay)}.',
            ]
        ),
    )
    tale.coins += pay
    tale.report.append(f"I helped {other.name} with the {crop} and earned {coins(pay)}")


ENCOUNTERS: list[Callable[[Tale], None]] = [
    at_the_ferry,
    at_the_inn,
    at_the_riddle,
    at_the_market,
    at_the_lost_beast,
    at_the_toll,
    at_the_fork,
    at_the_harvest,
]


def beginning(tale: Tale) -> None:
    dice, hero, sender, receiver = tale.dice, tale.hero, tale.sender, tale.receiver
    tale.tell(
        f"{capital(dice.pick(SEASONS))}, {sender.name}, the {sender.trade} of {tale.home}, sent for {hero.name}.",
        f"{hero.name} was {a(hero.trade)} who {SKILLS[hero.trade]}, and {hero.they} came at once.",
        f'"{dice.pick(REASONS)}," said {sender.name}. "Take this {tale.thing} to {receiver.name}, '
        f'the {receiver.trade}, in {tale.goal}. And say to {receiver.them}: {tale.message}."',
        f"{capital(sender.they)} wrapped the {tale.thing} {tale.wrap}, and "
        f"counted {coins(tale.coins)} into {hero.name}'s hand.",
        dice.pick(
            [
                f'"What if {receiver.they} is not there?" "Then wait," said {sender.name}.',
                f'"Why me?" asked {hero.name}. "Because you do not ask why," said {sender.name}, and laughed.',
                f"{hero.name} said the message over twice, so as not to lose it, and went out by the lower gate.",
            ]
        ),
    )


def arrival(tale: Tale) -> None:
    hero, sender, receiver = tale.hero, tale.sender, tale.receiver
    tale.tell(
        tale.dice.pick(
            [
                f"So {hero.name} came to {tale.goal}, asked for the {receiver.trade}, and was sent to {receiver.name}.",
                f"In {tale.goal} everybody knew {receiver.name}, the {receiver.trade}. A child pointed out the door.",
            ]
        ),
        f'"Who sends you?" asked {receiver.name}.',
        f'"{sender.name}, the {sender.trade} of {tale.home}," said {hero.name}.',
        f'"What do you bring?" "{capital(a(tale.thing))}, {tale.wrap}."',
        f'"And what was I to hear?" "{capital(tale.message)}," said {hero.name}.',
        tale.dice.pick(
            [
                f"{receiver.name} sat down on the step and was silent for a good while.",
                f'"Then it is true," said {receiver.name}, and held the {tale.thing} to the light.',
                f"{receiver.name} laughed until {receiver.they} had to hold on to the door.",
            ]
        ),
    )


def homecoming(tale: Tale) -> None:
    hero, sender = tale.hero, tale.sender
    told = "; then ".join(tale.report)
    tale.tell(
        f"Back in {tale.home}, {sender.name} put a chair by the fire for {hero.name}.",
        f'"Tell me the way," {sender.they} said.',
        f'"First {told}. And {tale.receiver.name} has the {tale.thing} now," said {hero.name}.',
        f'"And the money?" {hero.name} laid {coins(tale.coins)} on the table.',
        tale.dice.pick(ENDINGS),
    )


def make_tale(dice: Dice, number: int) -> str:
    """One tale, its title first and an empty line last."""
    people = [(name, True) for name in WOMEN] + [(name, False) for name in MEN]
    cast = [Person(name, dice.pick(TRADES), is_woman) for name, is_woman in dice.several(people, 9)]
    tale = Tale(
        dice,
        cast[0],
        cast[1],
        cast[2],
        cast[3:],
        home=dice.pick(VILLAGES),
        goal=dice.pick(TOWNS),
        thing=f"{dice.pick(STUFF)} {dice.pick(THINGS)}",
        wrap=dice.pick(WRAPS),
        message=dice.pick(MESSAGES),
        coins=dice.number(6, 9),
        token=dice.pick(TOKENS),
    )
    title = f"{number}. {tale.hero.name} and the {tale.thing.title()}"
    parts = [beginning, *dice.several(ENCOUNTERS, dice.number(2, 5)), arrival, homecoming]
    paragraphs = []
    for part in parts:
        tale.lines = []
        part(tale)
        paragraphs.append("\n".join(tale.lines))
    return "\n\n".join([title, *paragraphs]) + "\n\n\n"


def make_text(seed: int, size: int) -> str:
    """Whole tales, numbered from 1, until they have at least `size` bytes."""
    dice, tales, total = Dice(seed), [], 0
    while total < size:
        tales.append(make_tale(dice, len(tales) + 1))
        total += len(tales[-1].encode())
    return "".join(tales)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tales to stdout.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=400_000, help="stop after the tale that reaches so many")
    arguments = parser.parse_args()
    sys.stdout.buffer.write(make_text(arguments.seed, arguments.bytes).encode())


if __name__ == "__main__":
    main()
