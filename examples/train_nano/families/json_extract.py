"""Family `json`: read sentences, fill the object that a JSON schema in the prompt asks for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import COLOURS, JOBS, PETS, Pools, listing, pools, split_of
from examples.train_nano.sample import Message, Sample, compact, leaves

Value = Any


class Field(NamedTuple):
    """One property: its possible keys, JSON schema, how to draw it, and sentences that state it ({} = the value)."""

    keys: tuple[str, ...]
    schema: dict[str, Any]
    draw: Callable[[Random, Pools], tuple[Value, str]]
    sentences: tuple[str, ...]
    description: str


def _same(value: Value) -> tuple[Value, str]:
    return value, str(value)


def _text(keys: str, draw: Callable[[Random, Pools], str], sentences: list[str], description: str) -> Field:
    return Field(tuple(keys.split()), {"type": "string"}, lambda r, p: _same(draw(r, p)), tuple(sentences), description)


def _int(keys: str, low: int, high: int, sentences: list[str], description: str) -> Field:
    def draw(rng: Random, names: Pools) -> tuple[Value, str]:
        return _same(names.number(rng, low, high))

    return Field(tuple(keys.split()), {"type": "integer"}, draw, tuple(sentences), description)


def _price(keys: str, sentences: list[str], description: str) -> Field:
    return Field(tuple(keys.split()), {"type": "number"}, lambda r, p: _same(p.price(r)), tuple(sentences), description)


def _enum(keys: str, choices: list[str], sentences: list[str], description: str) -> Field:
    schema = {"type": "string", "enum": choices}
    return Field(tuple(keys.split()), schema, lambda r, p: _same(r.choice(choices)), tuple(sentences), description)


def _flag(keys: str, yes: str, no: str, description: str) -> Field:
    def draw(rng: Random, names: Pools) -> tuple[Value, str]:
        value = rng.random() < 0.5
        return value, yes if value else no

    return Field(tuple(keys.split()), {"type": "boolean"}, draw, ("{}",), description)


def _list(keys: str, draw: Callable[[Random, Pools], str], sentences: list[str], description: str) -> Field:
    def several(rng: Random, names: Pools) -> tuple[Value, str]:
        found: dict[str, None] = {}
        count = rng.randrange(1, 5)
        while len(found) < count:
            found[draw(rng, names)] = None
        return list(found), listing(list(found))

    schema = {"type": "array", "items": {"type": "string"}}
    return Field(tuple(keys.split()), schema, several, tuple(sentences), description)


def _address(keys: str, sentences: list[str], description: str) -> Field:
    def draw(rng: Random, names: Pools) -> tuple[Value, str]:
        value = {"street": names.street(rng), "city": names.city(rng), "zip": str(names.number(rng, 10000, 99999))}
        return value, f"{value['street']}, {value['zip']} {value['city']}"

    parts = {key: {"type": "string"} for key in ("street", "city", "zip")}
    schema = {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
    return Field(tuple(keys.split()), schema, draw, tuple(sentences), description)


def _person(rng: Random, names: Pools) -> str:
    return names.person(rng)


def _city(rng: Random, names: Pools) -> str:
    return names.city(rng)


def _company(rng: Random, names: Pools) -> str:
    return names.company(rng)


def _item(rng: Random, names: Pools) -> str:
    return names.item(rng)


def _code(rng: Random, names: Pools) -> str:
    return names.code(rng)


def _date(rng: Random, names: Pools) -> str:
    return names.date(rng)


def _time(rng: Random, names: Pools) -> str:
    return names.time(rng)


def _of(words: list[str]) -> Callable[[Random, Pools], str]:
    return lambda rng, names: rng.choice(words)


DOMAINS: dict[str, list[Field]] = {
    "order": [
        _text(
            "order_id order_number",
            _code,
            ["The order number is {}.", "It is filed as order {}."],
            "identifier of the order",
        ),
        _text(
            "customer customer_name", _person, ["The customer is {}.", "It was placed by {}."], "who placed the order"
        ),
        _text(
            "item product",
            _item,
            ["The ordered product is a {}.", "It is for the model called {}."],
            "what was ordered",
        ),
        _int("quantity amount", 1, 500, ["The customer wants {} pieces.", "The quantity is {}."], "number of pieces"),
        _price(
            "total total_price", ["The total comes to {} euros.", "It costs {} euros in all."], "total price in euros"
        ),
        _text("delivery_city ship_to_city", _city, ["It ships to {}.", "The delivery goes to {}."], "city of delivery"),
        _text("delivery_date due_date", _date, ["It is due on {}.", "Delivery is planned for {}."], "date of delivery"),
        _enum(
            "status order_status",
            ["pending", "packed", "shipped", "delivered", "cancelled"],
            ["Its status is {}.", "At the moment it is {}."],
            "state of the order",
        ),
        _flag(
            "gift_wrap is_gift",
            "It should be wrapped as a gift.",
            "No gift wrap is needed.",
            "whether to wrap it as a gift",
        ),
        _address(
            "delivery_address shipping_address", ["Send it to {}.", "The delivery address is {}."], "where to send it"
        ),
    ],
    "person": [
        _text("name full_name", _person, ["The form is about {}.", "The person is called {}."], "full name"),
        _int("age age_years", 18, 95, ["The age given is {}.", "They are {} years old."], "age in years"),
        _text("city home_city", _city, ["They live in {}.", "Home is in {}."], "city of residence"),
        _text("job occupation", _of(JOBS), ["They work as a {}.", "The occupation is {}."], "occupation"),
        _text("employer company", _company, ["The employer is {}.", "They are employed by {}."], "employer"),
        _text(
            "email contact_email",
            lambda r, p: p.email(r),
            ["Mail reaches them at {}.", "The email address is {}."],
            "email address",
        ),
        _list("pets pet_kinds", _of(PETS), ["At home they keep these pets: {}.", "Pets: {}."], "kinds of pets"),
        _flag("member is_member", "They are a member.", "They are not a member.", "whether they are a member"),
        _list(
            "friends contacts",
            lambda r, p: p.first(r),
            ["Their friends are {}.", "They know {}."],
            "first names of friends",
        ),
        _address("address home_address", ["The home address is {}.", "Letters go to {}."], "home address"),
    ],
    "event": [
        _text(
            "title event_title",
            lambda r, p: f"{p.city(r)} {r.choice(['Fair', 'Meetup', 'Festival', 'Summit', 'Market', 'Concert'])}",
            ["The event is the {}.", "It is announced as the {}."],
            "title of the event",
        ),
        _text("location venue_city", _city, ["It takes place in {}.", "The venue is in {}."], "city of the event"),
        _text("date event_date", _date, ["It is held on {}.", "The date is {}."], "date of the event"),
        _text("start_time starts_at", _time, ["Doors open at {}.", "It starts at {}."], "start time"),
        _int(
            "attendees expected_guests",
            10,
            9000,
            ["About {} guests are expected.", "Room is booked for {} people."],
            "number of guests",
        ),
        _text("organizer host", _company, ["It is organised by {}.", "The host is {}."], "organiser"),
        _list("speakers guests", _person, ["The speakers are {}.", "On stage: {}."], "names of the speakers"),
        _price(
            "ticket_price entry_fee", ["A ticket costs {} euros.", "Entry is {} euros."], "price of a ticket in euros"
        ),
        _flag("online is_online", "It is streamed online.", "It is not streamed online.", "whether it is online"),
        _enum(
            "category event_type",
            ["music", "sports", "science", "food", "business"],
            ["It is listed under {}.", "Its category is {}."],
            "category",
        ),
    ],
    "product": [
        _text("product_name title", _item, ["The product is a {}.", "On sale is a {}."], "name of the product"),
        _text("sku article_code", _code, ["Its article code is {}.", "The code on the box is {}."], "article code"),
        _price("price unit_price", ["It costs {} euros.", "The price is {} euros."], "price in euros"),
        _int(
            "stock units_in_stock", 0, 5000, ["There are {} in stock.", "The shop holds {} of them."], "pieces in stock"
        ),
        _text("brand maker", _company, ["It is made by {}.", "The maker is {}."], "maker"),
        _list("colors colours", _of(COLOURS), ["It comes in {}.", "Available colours are {}."], "available colours"),
        _price("weight weight_kg", ["It weighs {} kg.", "The weight is {} kg."], "weight in kilograms"),
        _flag("available in_stock", "It is available now.", "It is sold out.", "whether it is available"),
        _enum(
            "condition item_condition",
            ["new", "used", "refurbished", "damaged"],
            ["Its condition is {}.", "It is offered as {}."],
            "condition",
        ),
        _text("warehouse warehouse_city", _city, ["It is kept in {}.", "The warehouse is in {}."], "where it is kept"),
    ],
    "ticket": [
        _text(
            "ticket_id case_number",
            _code,
            ["The case number is {}.", "It is tracked as {}."],
            "identifier of the ticket",
        ),
        _text(
            "reporter reported_by", _person, ["It was reported by {}.", "The report came from {}."], "who reported it"
        ),
        _text("assignee assigned_to", _person, ["It is assigned to {}.", "The work is with {}."], "who works on it"),
        _enum(
            "priority urgency",
            ["low", "medium", "high", "critical"],
            ["Its priority is {}.", "The urgency is {}."],
            "priority",
        ),
        _text("device component", _item, ["The broken thing is a {}.", "The trouble is with a {}."], "what is broken"),
        _text("opened_on created", _date, ["It was opened on {}.", "The report is dated {}."], "opening date"),
        _int("floor room_number", 1, 90, ["It is in room {}.", "The room number is {}."], "room"),
        _flag("resolved is_resolved", "The problem is solved.", "The problem is still open.", "whether it is solved"),
        _list(
            "tags labels",
            _of(["network", "hardware", "billing", "login", "printer", "security", "display", "power"]),
            ["It is tagged {}.", "The tags are {}."],
            "tags",
        ),
        _text("site office", _city, ["The office is in {}.", "The site is {}."], "site"),
    ],
    "trip": [
        _text("traveler passenger", _person, ["The traveller is {}.", "The booking is for {}."], "who travels"),
        _text("origin from_city", _city, ["The trip starts in {}.", "They leave from {}."], "where it starts"),
        _text("destination to_city", _city, ["The destination is {}.", "They travel to {}."], "where it ends"),
        _text("departure_date leaves_on", _date, ["Departure is on {}.", "They leave on {}."], "day of departure"),
        _text(
            "departure_time leaves_at", _time, ["It leaves at {}.", "The departure time is {}."], "time of departure"
        ),
        _text("booking_code reservation", _code, ["The booking code is {}.", "The reservation is {}."], "booking code"),
        _int("seat seat_number", 1, 300, ["The seat is number {}.", "Seat {} is reserved."], "seat"),
        _enum(
            "travel_class cabin",
            ["economy", "comfort", "business", "first"],
            ["The class is {}.", "They travel in {} class."],
            "class",
        ),
        _price("fare ticket_cost", ["The fare is {} euros.", "The ticket costs {} euros."], "fare in euros"),
        _list("stops stopovers", _city, ["It stops in {}.", "On the way it calls at {}."], "stops on the way"),
    ],
}
_TOPICS = {
    "order": "an order",
    "person": "a person",
    "event": "an event",
    "product": "a product",
    "ticket": "a support ticket",
    "trip": "a trip",
    "record": "a record",
    "list": "several entries",
}


class Task(NamedTuple):
    """What to extract: text, schema and the expected object."""

    topic: str
    text: str
    schema: dict[str, Any]
    expected: Value


def _object_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _generic(rng: Random, names: Pools) -> list[Field]:
    """Fields whose keys are the words of the text ("vendor code" -> vendor_code), many of them unseen in training."""
    fields = []
    for phrase in rng.sample(names.text_keys, rng.randrange(2, 5)):
        tail = phrase.split()[-1]
        draw = {"owner": _person, "contact": _person, "manager": _person, "city": _city, "site": _city}.get(tail, _code)
        draw = {"name": _company, "label": _item}.get(tail, draw)
        sentences = [f"The {phrase} is {{}}.", f"Its {phrase} is {{}}.", f"{phrase.capitalize()}: {{}}."]
        fields.append(_text(phrase.replace(" ", "_"), draw, sentences, f"the {phrase}"))
    for phrase in rng.sample(names.int_keys, rng.randrange(1, 4)):
        sentences = [f"The {phrase} is {{}}.", f"Its {phrase} is {{}}.", f"{phrase.capitalize()}: {{}}."]
        fields.append(_int(phrase.replace(" ", "_"), 1, 9000, sentences, f"the {phrase}"))
    return fields


def _choose_fields(rng: Random, split: str) -> tuple[str, list[Field]]:
    """A domain and some of its fields; which combinations exist depends on the split."""
    names = pools(split)
    if rng.random() < 0.3:
        fields = _generic(rng, names)
        rng.shuffle(fields)
        return "record", fields
    domain = rng.choice(list(DOMAINS))
    while True:
        fields = rng.sample(DOMAINS[domain], rng.randrange(2, 9))
        if split_of(f"{domain} {sorted(field.keys[0] for field in fields)}") == split:
            return domain, fields


def _single(rng: Random, split: str) -> Task:
    names = pools(split)
    domain, fields = _choose_fields(rng, split)
    described = rng.random() < 0.4
    optional = rng.random() < 0.15
    properties: dict[str, Any] = {}
    expected: dict[str, Value] = {}
    required: list[str] = []
    sentences: list[str] = []
    for field in fields:
        key = rng.choice(field.keys)
        properties[key] = dict(field.schema) | ({"description": field.description} if described else {})
        is_optional = optional and rng.random() < 0.4
        if not is_optional:
            required.append(key)
        if is_optional and rng.random() < 0.5:
            continue
        value, shown = field.draw(rng, names)
        expected[key] = value
        sentences.append(rng.choice(field.sentences).format(shown))
    rng.shuffle(sentences)
    if domain != "record" and rng.random() < 0.5:
        # Sentences about fields that nobody asked for.
        for field in rng.sample(DOMAINS[domain], 3):
            if field not in fields:
                sentences.insert(
                    rng.randrange(len(sentences) + 1), rng.choice(field.sentences).format(field.draw(rng, names)[1])
                )
    return Task(domain, " ".join(sentences), _object_schema(properties, required), expected)


def _several(rng: Random, split: str) -> Task:
    """An array of flat objects, one sentence per entry; or just one such object."""
    names = pools(split)
    kind = rng.randrange(3)
    is_alone = rng.random() < 0.3
    entries: list[dict[str, Value]] = []
    sentences = []
    for _ in range(1 if is_alone else rng.randrange(2, 6)):
        if kind == 0:
            person, age, city = names.person(rng), rng.randrange(18, 90), names.city(rng)
            entries.append({"name": person, "age": age, "city": city})
            sentences.append(f"{person} is {age}{rng.choice((' years old', ''))} and lives in {city}.")
        elif kind == 1:
            item, count, price = names.item(rng), rng.randrange(2, 90), names.price(rng)
            entries.append({"item": item, "quantity": count, "unit_price": price})
            sentences.append(f"{count} pieces of the {item} cost {price} euros each.")
        else:
            company, code, city = names.company(rng), names.code(rng), names.city(rng)
            entries.append({"company": company, "code": code, "site": city})
            sentences.append(f"{company} in {city} has the code {code}.")
    types = {int: "integer", float: "number", str: "string"}
    parts = {key: {"type": types[type(value)]} for key, value in entries[0].items()}
    parts = {key: {"type": "number"} if key == "unit_price" else part for key, part in parts.items()}
    if is_alone:
        return Task("record", sentences[0], _object_schema(parts, list(parts)), entries[0])
    root = rng.choice((["people", "persons"], ["items", "lines"], ["companies", "suppliers"])[kind])
    array = {"type": "array", "items": _object_schema(parts, list(parts))}
    return Task("list", " ".join(sentences), _object_schema({root: array}, [root]), {root: entries})


def _messages(rng: Random, task: Task) -> list[Message]:
    schema_text = compact(task.schema)
    topic = _TOPICS[task.topic]
    shape = rng.randrange(8)
    if shape == 0:
        system = f"Extract the data as one JSON object that follows this JSON schema:\n{schema_text}"
        return [{"role": "system", "content": system}, {"role": "user", "content": task.text}]
    if shape == 1:
        system = f"You fill in forms. Answer only with JSON. Schema: {schema_text}"
        return [{"role": "system", "content": system}, {"role": "user", "content": f"Text: {task.text}"}]
    if shape == 2:
        user = f"{task.text}\n\nReturn the data as JSON for this schema:\n{schema_text}"
    elif shape == 3:
        user = f"Extract the fields from the text about {topic}.\n\nText: {task.text}\n\nJSON schema: {schema_text}"
    elif shape == 4:
        user = f"JSON schema:\n{schema_text}\n\nText:\n{task.text}\n\nAnswer with the JSON object only."
    elif shape == 5:
        user = f"Read this and answer in JSON that matches the schema.\n{task.text}\nSchema: {schema_text}"
    elif shape == 6 and task.topic != "list":
        keys = ", ".join(task.schema["properties"])
        user = f"{rng.choice(['Extract as JSON with the keys', 'Give me a JSON object with'])} {keys}: {task.text}"
    else:
        user = f"Turn the text into a JSON object.\nSchema: {schema_text}\nText: {task.text}"
    return [*system_message(rng), {"role": "user", "content": user}]


def make(rng: Random, split: str) -> Sample:
    """One extraction task."""
    task = _several(rng, split) if rng.random() < 0.18 else _single(rng, split)
    if rng.random() < 0.08:
        # A long prompt: the wanted text at the end of others of the same kind, each under a heading.
        others = [_single(rng, split).text for _ in range(rng.randrange(3, 8))]
        texts = [*others, task.text]
        numbers = rng.sample(range(10, 99), len(texts))
        body = "\n\n".join(f"Note {number}: {text}" for number, text in zip(numbers, texts, strict=True))
        task = task._replace(text=f"{body}\n\nUse only note {numbers[-1]}.")
    answer = compact(task.expected)
    return Sample(
        family="json",
        messages=_messages(rng, task),
        answer=answer,
        check="json",
        expected=task.expected,
        schema=task.schema,
        slots=tuple(leaves(task.expected)),
    )
