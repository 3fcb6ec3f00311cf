"""Names, places, things and numbers, in two disjoint pools: what the held-out split names, training never saw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from zlib import crc32

TRAIN, HELD_OUT = "train", "held_out"
HELD_OUT_SHARE = 0.1


def split_of(text: str) -> str:
    """The split that owns `text`: a fixed tenth of all strings belongs to the held-out split."""
    return HELD_OUT if crc32(text.encode()) % 1000 < 1000 * HELD_OUT_SHARE else TRAIN


_ONSETS = [
    "B",
    "Br",
    "C",
    "D",
    "Dr",
    "F",
    "Fl",
    "G",
    "Gr",
    "H",
    "J",
    "K",
    "Kl",
    "L",
    "M",
    "N",
    "P",
    "Pr",
    "R",
    "S",
    "St",
    "T",
    "Tr",
    "V",
    "W",
    "Z",
    "Sh",
    "Th",
    "Ch",
    "Y",
]
_VOWELS = ["a", "e", "i", "o", "u", "ae", "ia", "ei", "ou"]
_MIDS = ["l", "r", "n", "m", "v", "d", "t", "k", "s", "rn", "ld", "nd", "st", "rk", "lm", "ss", "nn", "b", "g", "z"]
_FIRST_ENDS = ["a", "o", "e", "i", "an", "en", "in", "ia", "or", "el", "is", "ric", "na", "la", "ra", "mir", "wen"]
_LAST_ENDS = [
    "en",
    "er",
    "man",
    "son",
    "ski",
    "ov",
    "ard",
    "well",
    "ton",
    "berg",
    "wick",
    "ers",
    "old",
    "ani",
    "etti",
    "elli",
    "ez",
    "ic",
]
_CITY_ENDS = [
    "vik",
    "burg",
    "ton",
    "ham",
    "ford",
    "stad",
    "ville",
    "mouth",
    "dale",
    "port",
    "haven",
    "by",
    "field",
    "grad",
    "ia",
    "ona",
    "holm",
]

_KNOWN_FIRST = [
    "Alice",
    "Bob",
    "Anna",
    "Carlos",
    "Maria",
    "John",
    "Emma",
    "Liam",
    "Olivia",
    "Noah",
    "Sofia",
    "Lucas",
    "Mia",
    "David",
    "Sarah",
    "James",
    "Laura",
    "Peter",
    "Julia",
    "Daniel",
    "Nina",
    "Thomas",
    "Eva",
    "Paul",
    "Clara",
    "Omar",
    "Aisha",
    "Yuki",
    "Chen",
    "Priya",
    "Ivan",
    "Elena",
    "Marco",
    "Lena",
    "Hugo",
    "Ada",
    "Alan",
    "Grace",
    "Tim",
    "Jane",
    "Max",
    "Leo",
    "Ben",
    "Sam",
    "Kate",
    "Lucy",
    "Tom",
    "Jack",
    "Rosa",
]
_KNOWN_LAST = [
    "Smith",
    "Johnson",
    "Brown",
    "Garcia",
    "Miller",
    "Davis",
    "Martin",
    "Lopez",
    "Wilson",
    "Anderson",
    "Taylor",
    "Moore",
    "Jackson",
    "Lee",
    "White",
    "Harris",
    "Clark",
    "Lewis",
    "Young",
    "King",
    "Wright",
    "Hill",
    "Green",
    "Adams",
    "Baker",
    "Nelson",
    "Carter",
    "Turner",
    "Parker",
    "Evans",
    "Cook",
    "Reed",
    "Weber",
    "Fischer",
    "Meyer",
    "Rossi",
    "Silva",
    "Tanaka",
    "Kim",
    "Novak",
    "Kowalski",
    "Hansen",
    "Lovelace",
    "Turing",
    "Hopper",
]
_KNOWN_CITIES = [
    "Paris",
    "London",
    "Berlin",
    "Tokyo",
    "Madrid",
    "Rome",
    "Vienna",
    "Oslo",
    "Lisbon",
    "Dublin",
    "Prague",
    "Warsaw",
    "Athens",
    "Helsinki",
    "Stockholm",
    "Amsterdam",
    "Brussels",
    "Zurich",
    "Munich",
    "Hamburg",
    "Chicago",
    "Boston",
    "Seattle",
    "Denver",
    "Toronto",
    "Sydney",
    "Cairo",
    "Lima",
    "Seoul",
    "Mumbai",
    "Delhi",
    "Beijing",
    "Shanghai",
    "Singapore",
    "Bangkok",
    "Nairobi",
    "Geneva",
    "Milan",
    "Barcelona",
    "Copenhagen",
    "Budapest",
    "Austin",
    "Miami",
    "Dallas",
    "Houston",
    "Moscow",
    "Istanbul",
    "Dubai",
]

_ADJECTIVES = [
    "copper",
    "wooden",
    "silver",
    "glass",
    "paper",
    "cotton",
    "woollen",
    "leather",
    "steel",
    "plastic",
    "ceramic",
    "marble",
    "velvet",
    "golden",
    "small",
    "large",
    "heavy",
    "light",
    "round",
    "square",
    "folding",
    "portable",
    "striped",
    "plain",
    "blue",
    "green",
    "red",
    "yellow",
    "black",
    "white",
    "grey",
    "purple",
    "orange",
    "brown",
    "narrow",
    "wide",
    "tall",
    "short",
    "soft",
    "hard",
    "antique",
    "modern",
]
_NOUNS = [
    "lantern",
    "chair",
    "table",
    "lamp",
    "mirror",
    "basket",
    "blanket",
    "kettle",
    "bottle",
    "notebook",
    "pencil",
    "brush",
    "ladder",
    "hammer",
    "clock",
    "drum",
    "flute",
    "violin",
    "carpet",
    "pillow",
    "curtain",
    "cabinet",
    "shelf",
    "bucket",
    "candle",
    "bowl",
    "plate",
    "mug",
    "spoon",
    "knife",
    "tray",
    "tent",
    "rope",
    "backpack",
    "helmet",
    "bicycle",
    "scooter",
    "radio",
    "speaker",
    "keyboard",
    "monitor",
    "printer",
    "camera",
    "battery",
    "cable",
    "charger",
    "telescope",
    "compass",
    "globe",
    "puzzle",
    "kite",
    "ball",
    "racket",
    "jacket",
    "scarf",
    "glove",
    "boot",
    "sandal",
    "umbrella",
    "wallet",
    "suitcase",
    "easel",
    "vase",
    "frame",
    "stool",
    "bench",
    "desk",
    "heater",
    "fan",
    "pump",
    "valve",
    "wrench",
    "drill",
    "saw",
]
_STREETS = [
    "Oak",
    "Elm",
    "Maple",
    "Cedar",
    "Birch",
    "Harbour",
    "Mill",
    "Church",
    "Station",
    "Park",
    "River",
    "Bridge",
    "Garden",
    "Market",
    "Castle",
]
_STREET_KINDS = ["Street", "Road", "Lane", "Avenue", "Square"]
_COMPANY_KINDS = ["Works", "Labs", "Trading", "Systems", "Foods", "Logistics", "Energy", "Studio", "Partners"]
_KEY_HEADS = [
    "access",
    "account",
    "archive",
    "battery",
    "branch",
    "budget",
    "cabin",
    "cargo",
    "channel",
    "client",
    "contract",
    "course",
    "delivery",
    "depot",
    "device",
    "dispatch",
    "engine",
    "export",
    "factory",
    "field",
    "filter",
    "freight",
    "gallery",
    "garden",
    "gateway",
    "harvest",
    "import",
    "invoice",
    "journal",
    "kitchen",
    "ledger",
    "library",
    "license",
    "machine",
    "market",
    "member",
    "mission",
    "module",
    "network",
    "office",
    "package",
    "parcel",
    "partner",
    "payment",
    "permit",
    "pilot",
    "policy",
    "project",
    "purchase",
    "quarter",
    "record",
    "region",
    "rental",
    "repair",
    "reserve",
    "route",
    "sample",
    "season",
    "sensor",
    "service",
    "session",
    "shelf",
    "shipment",
    "signal",
    "station",
    "storage",
    "studio",
    "supply",
    "survey",
    "target",
    "terminal",
    "ticket",
    "tool",
    "transfer",
    "vehicle",
    "vendor",
    "venue",
    "vessel",
    "voucher",
    "warehouse",
    "workshop",
]
_KEY_TAILS_TEXT = ["code", "name", "label", "owner", "city", "contact", "status", "reference", "site", "manager"]
_KEY_TAILS_INT = ["count", "number", "total", "limit", "level", "size", "age", "score", "capacity", "priority"]

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
JOBS = [
    "baker",
    "teacher",
    "nurse",
    "pilot",
    "farmer",
    "painter",
    "singer",
    "lawyer",
    "tailor",
    "sailor",
    "doctor",
    "gardener",
    "carpenter",
    "librarian",
    "plumber",
    "chemist",
    "editor",
    "miner",
    "weaver",
    "potter",
    "fisher",
    "mechanic",
    "butcher",
    "dentist",
]
PETS = ["cat", "dog", "parrot", "rabbit", "horse", "turtle", "goat", "hamster", "ferret", "canary"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "grey", "pink", "silver"]


@dataclass(frozen=True, slots=True)
class Pools:
    """The strings that one split may use, and draws from them."""

    split: str
    firsts: list[str]
    lasts: list[str]
    cities: list[str]
    items: list[str]
    text_keys: list[str]
    int_keys: list[str]

    def first(self, rng: Random) -> str:
        return rng.choice(self.firsts)

    def person(self, rng: Random) -> str:
        return f"{rng.choice(self.firsts)} {rng.choice(self.lasts)}"

    def city(self, rng: Random) -> str:
        return rng.choice(self.cities)

    def item(self, rng: Random) -> str:
        return rng.choice(self.items)

    def company(self, rng: Random) -> str:
        return f"{rng.choice(self.lasts)} {rng.choice(_COMPANY_KINDS)}"

    def street(self, rng: Random) -> str:
        return f"{rng.randrange(1, 250)} {rng.choice(_STREETS)} {rng.choice(_STREET_KINDS)}"

    def code(self, rng: Random) -> str:
        """An identifier such as "KT-4821"; the split owns its number."""
        letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVWXZ") for _ in range(2))
        while True:
            number = str(rng.randrange(100, 100000))
            if split_of(number) == self.split:
                return f"{letters}-{number}"

    def number(self, rng: Random, low: int, high: int) -> int:
        """An integer in [low, high); above 1000 the split owns it."""
        while True:
            number = rng.randrange(low, high)
            if number < 1000 or split_of(str(number)) == self.split:
                return number

    def price(self, rng: Random) -> float:
        return rng.randrange(100, 99999) / 100 if rng.random() < 0.7 else rng.randrange(10, 9999) / 10

    def date(self, rng: Random) -> str:
        return f"{rng.randrange(2019, 2036)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"

    def time(self, rng: Random) -> str:
        return f"{rng.randrange(6, 22):02d}:{rng.choice(('00', '15', '30', '45'))}"

    def email(self, rng: Random) -> str:
        return f"{rng.choice(self.firsts)}@{rng.choice(self.lasts).lower()}.example"


def _spellings(ends: list[str], count: int, salt: int) -> list[str]:
    """`count` distinct made-up names, the same on every call."""
    rng = Random(salt)
    found: dict[str, None] = {}
    while len(found) < count:
        middle = rng.choice(_MIDS) + (rng.choice(_VOWELS[:5]) + rng.choice(_MIDS[:10]) if rng.random() < 0.2 else "")
        found[rng.choice(_ONSETS) + rng.choice(_VOWELS) + middle + rng.choice(ends)] = None
    return list(found)


@cache
def pools(split: str) -> Pools:
    """The pools of a split ("train" or "held_out"). Real-world names belong to training."""

    def mine(words: list[str]) -> list[str]:
        return [word for word in words if split_of(word) == split]

    # Known names are repeated so that they are drawn often enough to be learnt.
    known = (_KNOWN_FIRST * 8, _KNOWN_LAST * 8, _KNOWN_CITIES * 8) if split == TRAIN else ([], [], [])
    return Pools(
        split=split,
        firsts=mine(_spellings(_FIRST_ENDS, 5000, 1)) + known[0],
        lasts=mine(_spellings(_LAST_ENDS, 5000, 2)) + known[1],
        cities=mine(_spellings(_CITY_ENDS, 4000, 3)) + known[2],
        items=mine([f"{a} {n}" for a, n in product(_ADJECTIVES, _NOUNS)]),
        text_keys=mine([f"{h} {t}" for h, t in product(_KEY_HEADS, _KEY_TAILS_TEXT)]),
        int_keys=mine([f"{h} {t}" for h, t in product(_KEY_HEADS, _KEY_TAILS_INT)]),
    )


def plural(item: str) -> str:
    """The plural of an item's name."""
    if item.endswith("knife"):
        return item[:-2] + "ves"
    if item.endswith("shelf"):
        return item[:-1] + "ves"
    return item + ("es" if item.endswith(("ch", "sh", "s", "x")) else "s")


def listing(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
