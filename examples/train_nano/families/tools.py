"""Family `tools`: call the right function with the right arguments, or answer once its result is there."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import COLOURS, Pools, listing, pools, split_of
from examples.train_nano.sample import Message, Sample, call_text, compact, leaves


class Param(NamedTuple):
    """One parameter: possible names, schema type, how to draw a value."""

    names: tuple[str, ...]
    schema: dict[str, Any]
    draw: Callable[[Random, Pools], Any]
    description: str


class Spec(NamedTuple):
    """A function with its possible names; {0}, {1}... in `requests` and `telling` are the arguments."""

    names: tuple[str, ...]
    description: str
    params: tuple[Param, ...]
    requests: tuple[str, ...]
    result: Callable[[Random, Pools], dict[str, Any]]
    telling: str


def _p(names: str, kind: str, draw: Callable[[Random, Pools], Any], description: str) -> Param:
    return Param(tuple(names.split()), {"type": kind}, draw, description)


def _choice(names: str, choices: list[str], description: str) -> Param:
    return Param(tuple(names.split()), {"type": "string", "enum": choices}, lambda r, p: r.choice(choices), description)


def _city(rng: Random, names: Pools) -> str:
    return names.city(rng)


def _person(rng: Random, names: Pools) -> str:
    return names.person(rng)


def _first(rng: Random, names: Pools) -> str:
    return names.first(rng)


def _code(rng: Random, names: Pools) -> str:
    return names.code(rng)


def _item(rng: Random, names: Pools) -> str:
    return names.item(rng)


def _date(rng: Random, names: Pools) -> str:
    return names.date(rng)


def _time(rng: Random, names: Pools) -> str:
    return names.time(rng)


def _count(low: int, high: int) -> Callable[[Random, Pools], int]:
    return lambda rng, names: names.number(rng, low, high)


_WEATHER = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"]
_MONEY = ["EUR", "USD", "GBP", "JPY", "CHF", "SEK"]
_LANGUAGES = ["French", "German", "Spanish", "Italian", "Polish", "Dutch", "Greek"]

SPECS: tuple[Spec, ...] = (
    Spec(
        ("get_weather", "weather_lookup", "current_weather", "fetch_weather"),
        "Get the current weather of a city.",
        (_p("city location place", "string", _city, "name of the city"),),
        (
            "What is the weather in {0}?",
            "How is the weather in {0} right now?",
            "Tell me the weather in {0}.",
            "What's the weather like in {0}?",
            "Weather in {0} please.",
            "Is it raining in {0}?",
        ),
        lambda r, p: {"condition": r.choice(_WEATHER), "temperature": r.randrange(-15, 40)},
        "The weather in {0} is {condition} with a temperature of {temperature} degrees.",
    ),
    Spec(
        ("get_forecast", "weather_forecast", "forecast_weather"),
        "Get the weather forecast of a city for some days.",
        (
            _p("city location place", "string", _city, "name of the city"),
            _p("days num_days", "integer", _count(2, 15), "number of days"),
        ),
        (
            "Give me the forecast for {0} for the next {1} days.",
            "What will the weather be in {0} over {1} days?",
            "I need a {1} day forecast for {0}.",
        ),
        lambda r, p: {"condition": r.choice(_WEATHER), "high": r.randrange(5, 40), "low": r.randrange(-15, 5)},
        "Over {1} days {0} will be {condition}, with highs of {high} and lows of {low} degrees.",
    ),
    Spec(
        ("convert_currency", "exchange_money", "currency_convert"),
        "Convert an amount of money between currencies.",
        (
            _p(
                "amount value",
                "number",
                lambda r, p: p.number(r, 1, 9000) if r.random() < 0.6 else p.price(r),
                "amount of money",
            ),
            _choice("from_currency source", _MONEY, "currency to convert from"),
            _choice("to_currency target", _MONEY, "currency to convert to"),
        ),
        ("Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "Change {0} {1} into {2}."),
        lambda r, p: {"result": p.price(r)},
        "{0} {1} are {result} {2}.",
    ),
    Spec(
        ("send_email", "mail_send", "write_email"),
        "Send an email to somebody.",
        (
            _p("recipient to", "string", lambda r, p: p.email(r), "email address"),
            _p(
                "subject title",
                "string",
                lambda r, p: f"{r.choice(['Meeting', 'Invoice', 'Report', 'Order', 'Visit'])} {p.code(r)}",
                "subject line",
            ),
        ),
        ("Send an email to {0} with the subject {1}.", "Write to {0}, subject {1}.", "Mail {0} about {1}."),
        lambda r, p: {"status": "sent", "message_id": p.code(r)},
        "The email to {0} was {status}. Its id is {message_id}.",
    ),
    Spec(
        ("create_event", "add_calendar_event", "schedule_meeting"),
        "Put a meeting into the calendar.",
        (
            _p("person attendee participant", "string", _person, "who takes part"),
            _p("date day", "string", _date, "date of the meeting"),
            _p("time start_time", "string", _time, "start of the meeting"),
        ),
        (
            "Schedule a meeting with {0} on {1} at {2}.",
            "Book a meeting with {0} for {1}, {2}.",
            "Put a meeting with {0} in my calendar on {1} at {2}.",
        ),
        lambda r, p: {"event_id": p.code(r), "room": r.randrange(1, 60)},
        "The meeting with {0} on {1} at {2} is in room {room}. Its id is {event_id}.",
    ),
    Spec(
        ("set_alarm", "create_alarm", "alarm_set"),
        "Set an alarm.",
        (_p("time at", "string", _time, "time of the alarm"),),
        ("Set an alarm for {0}.", "Wake me up at {0}.", "I need an alarm at {0}."),
        lambda r, p: {"status": "active"},
        "The alarm for {0} is {status}.",
    ),
    Spec(
        ("search_products", "find_product", "product_search"),
        "Search the shop for a product.",
        (
            _p("query product", "string", _item, "what to look for"),
            _p("max_price price_limit", "number", _count(5, 900), "highest price in euros"),
        ),
        (
            "Find a {0} for at most {1} euros.",
            "Search for a {0} under {1} euros.",
            "I want to buy a {0}, my limit is {1} euros.",
        ),
        lambda r, p: {"count": r.randrange(1, 30), "best": p.code(r), "price": p.price(r)},
        "I found {count} offers for a {0}. The best one is {best} for {price} euros.",
    ),
    Spec(
        ("get_order_status", "order_status", "track_order"),
        "Look up the state of an order.",
        (_p("order_id order_number", "string", _code, "identifier of the order"),),
        ("Where is my order {0}?", "What is the status of order {0}?", "Track order {0} please."),
        lambda r, p: {"status": r.choice(["packed", "shipped", "delivered", "delayed"]), "city": p.city(r)},
        "Order {0} is {status}. Its last stop was {city}.",
    ),
    Spec(
        ("get_stock_price", "stock_quote", "share_price"),
        "Get the price of a share.",
        (_p("company name", "string", lambda r, p: p.company(r), "name of the company"),),
        ("What is the share price of {0}?", "How much is a share of {0}?", "Get me the stock price of {0}."),
        lambda r, p: {"price": p.price(r), "currency": r.choice(_MONEY)},
        "A share of {0} costs {price} {currency}.",
    ),
    Spec(
        ("translate_text", "translate", "text_translation"),
        "Translate a word or phrase.",
        (
            _p("text phrase", "string", _item, "what to translate"),
            _choice("language target_language", _LANGUAGES, "language to translate to"),
        ),
        ("Translate {0} into {1}.", "How do you say {0} in {1}?", "What is {0} in {1}?"),
        lambda r, p: {"translation": p.city(r).lower()},
        "In {1}, {0} is called {translation}.",
    ),
    Spec(
        ("book_flight", "flight_booking", "reserve_flight"),
        "Book a flight.",
        (
            _p("origin from_city departure_city", "string", _city, "where the flight starts"),
            _p("destination to_city arrival_city", "string", _city, "where the flight ends"),
            _p("date day", "string", _date, "day of the flight"),
        ),
        (
            "Book a flight from {0} to {1} on {2}.",
            "I want to fly from {0} to {1} on {2}.",
            "Reserve a seat on a flight from {0} to {1} for {2}.",
        ),
        lambda r, p: {"flight": p.code(r), "seat": r.randrange(1, 60)},
        "Flight {flight} from {0} to {1} on {2} is booked. Your seat is {seat}.",
    ),
    Spec(
        ("book_table", "reserve_table", "restaurant_booking"),
        "Reserve a table in a restaurant.",
        (
            _p(
                "restaurant place",
                "string",
                lambda r, p: f"{r.choice(['Cafe', 'Casa', 'Villa', 'Chez'])} {p.first(r)}",
                "name of the restaurant",
            ),
            _p("guests people party_size", "integer", _count(1, 20), "number of guests"),
            _p("time at", "string", _time, "time of arrival"),
        ),
        (
            "Reserve a table at {0} for {1} people at {2}.",
            "Book {0} for {1} guests at {2}.",
            "We are {1} and want to eat at {0} at {2}.",
        ),
        lambda r, p: {"table": r.randrange(1, 80), "confirmation": p.code(r)},
        "Table {table} at {0} is reserved for {1} people at {2}. The confirmation is {confirmation}.",
    ),
    Spec(
        ("play_music", "start_song", "music_player"),
        "Play music of an artist.",
        (
            _p("artist musician", "string", _person, "name of the artist"),
            _p("volume loudness", "integer", _count(1, 100), "volume in percent"),
        ),
        ("Play music by {0} at volume {1}.", "I want to hear {0}, volume {1}.", "Put on {0} with the volume at {1}."),
        lambda r, p: {"song": f"{p.city(r)} Song", "minutes": r.randrange(2, 9)},
        "Now playing {song} by {0}. It takes {minutes} minutes.",
    ),
    Spec(
        ("set_light", "control_light", "light_switch"),
        "Switch the colour and brightness of a lamp.",
        (
            _choice("room area", ["kitchen", "bedroom", "hall", "garage", "office", "garden"], "room of the lamp"),
            _choice("color colour", COLOURS, "colour of the light"),
            _p("brightness level", "integer", _count(1, 100), "brightness in percent"),
        ),
        (
            "Make the light in the {0} {1} at {2} percent.",
            "Set the {0} light to {1} with brightness {2}.",
            "I want {1} light in the {0}, {2} percent.",
        ),
        lambda r, p: {"status": "on", "watts": r.randrange(3, 60)},
        "The light in the {0} is {status}. It is {1} at {2} percent and uses {watts} watts.",
    ),
    Spec(
        ("find_contact", "contact_lookup", "get_contact"),
        "Look up somebody's phone number.",
        (_p("name person", "string", _person, "name of the person"),),
        ("What is the phone number of {0}?", "Look up {0} in my contacts.", "How can I call {0}?"),
        lambda r, p: {"phone": str(p.number(r, 100000, 999999)), "city": p.city(r)},
        "The number of {0} in {city} is {phone}.",
    ),
    Spec(
        ("calculate_route", "get_directions", "route_planner"),
        "Find a route between two cities.",
        (
            _p("start origin", "string", _city, "start"),
            _p("end destination", "string", _city, "end"),
            _choice("mode transport", ["car", "train", "bus", "bike"], "means of transport"),
        ),
        (
            "How do I get from {0} to {1} by {2}?",
            "Find a route from {0} to {1} by {2}.",
            "Plan a trip by {2} from {0} to {1}.",
        ),
        lambda r, p: {"distance_km": r.randrange(5, 2000), "hours": r.randrange(1, 30)},
        "From {0} to {1} it is {distance_km} km by {2}. The trip takes {hours} hours.",
    ),
    Spec(
        ("create_user", "add_account", "register_user"),
        "Create an account.",
        (
            _p("name full_name", "string", _person, "name of the user"),
            _p("age years", "integer", _count(18, 95), "age in years"),
            _p("newsletter subscribe", "boolean", lambda r, p: r.random() < 0.5, "whether the newsletter is wanted"),
        ),
        ("Create an account for {0}, age {1}. Newsletter: {2}.", "Register {0} who is {1} years old. Newsletter: {2}."),
        lambda r, p: {"user_id": p.code(r)},
        "The account of {0} was created. Its id is {user_id}.",
    ),
    Spec(
        ("get_time", "current_time", "local_time"),
        "Get the local time of a city.",
        (_p("city location place", "string", _city, "name of the city"),),
        ("What time is it in {0}?", "Tell me the local time in {0}.", "What is the time in {0} now?"),
        lambda r, p: {"time": p.time(r), "day": r.choice(["Monday", "Tuesday", "Friday", "Sunday"])},
        "In {0} it is {time} on {day}.",
    ),
    Spec(
        ("add_items", "update_cart", "fill_cart"),
        "Put several things into the shopping cart.",
        (
            _p(
                "items products",
                "array",
                lambda r, p: [p.item(r) for _ in range(r.randrange(1, 5))],
                "names of the things",
            ),
            _p("cart cart_id", "string", _code, "which cart"),
        ),
        ("Put {0} into cart {1}.", "Add these to cart {1}: {0}.", "Cart {1} should get {0}."),
        lambda r, p: {"total": p.price(r), "entries": r.randrange(1, 40)},
        "Cart {1} now holds {entries} entries for {total} euros.",
    ),
    Spec(
        ("create_note", "save_note", "note_add"),
        "Save a note.",
        (
            _p(
                "title heading",
                "string",
                lambda r, p: f"{p.city(r)} {r.choice(['plan', 'list', 'budget', 'report'])}",
                "title of the note",
            ),
            _p(
                "tags labels",
                "array",
                lambda r, p: r.sample(["work", "home", "travel", "money", "ideas", "health"], r.randrange(1, 4)),
                "tags",
            ),
        ),
        (
            "Save a note called {0} with the tags {1}.",
            "Make a note titled {0}, tagged {1}.",
            "New note: {0}. Tags: {1}.",
        ),
        lambda r, p: {"note_id": p.code(r)},
        "The note {0} is saved as {note_id}.",
    ),
)
NO_TOOL = "None of the available tools can do that."


class Bound(NamedTuple):
    """A specification with its names chosen, and its definition in OpenAI format."""

    spec: Spec
    name: str
    keys: list[str]
    definition: dict[str, Any]


def _bind(rng: Random, spec: Spec, split: str) -> Bound:
    while True:
        name = rng.choice(spec.names)
        keys = [rng.choice(param.names) for param in spec.params]
        # A combination of names belongs to one split; a single name can't be held out where few exist.
        if split_of(f"{name} {keys}") == split or rng.random() < 0.05:
            break
    described = rng.random() < 0.6
    properties: dict[str, Any] = {}
    for key, param in zip(keys, spec.params, strict=True):
        properties[key] = dict(param.schema)
        if param.schema["type"] == "array":
            properties[key]["items"] = {"type": "string"}
        if described:
            properties[key]["description"] = param.description
    parameters = {"type": "object", "properties": properties, "required": keys}
    function = {"name": name, "description": spec.description, "parameters": parameters}
    return Bound(spec, name, keys, {"type": "function", "function": function})


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return listing(value) if isinstance(value, list) else str(value)


def _call(rng: Random, tool: Bound, names: Pools) -> tuple[dict[str, Any], list[str]]:
    values = [param.draw(rng, names) for param in tool.spec.params]
    call = {"name": tool.name, "arguments": dict(zip(tool.keys, values, strict=True))}
    return call, [_said(value) for value in values]


def _slots(calls: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(part for call in calls for part in (call["name"], *leaves(call["arguments"])))


def make(rng: Random, split: str) -> Sample:
    """One tool-use turn: a call, two calls, an answer from a result, or the refusal to call."""
    names = pools(split)
    count = rng.choice((1, 1, 2, 3, 4, 5)) if rng.random() < 0.92 else rng.randrange(8, 13)
    specs = rng.sample(SPECS, count)
    tools = [_bind(rng, spec, split) for spec in specs]
    definitions = [tool.definition for tool in tools]
    wanted = rng.choice(tools)
    request = rng.choice(wanted.spec.requests)
    messages: list[Message] = system_message(rng)
    shape = rng.random()
    if shape < 0.05:
        other = rng.choice([spec for spec in SPECS if spec not in specs])
        asked = rng.choice(other.requests).format(*(_said(param.draw(rng, names)) for param in other.params))
        # A neighbour (the weather now, the forecast) could take the call, so ask only for what nothing here does.
        if all(other.params[0].names != spec.params[0].names for spec in specs):
            messages.append({"role": "user", "content": asked})
            return Sample("tools", messages, NO_TOOL, "text", NO_TOOL, definitions)
    call, said = _call(rng, wanted, names)
    if shape < 0.15 and len(wanted.keys) == 1:
        second, said_second = _call(rng, wanted, names)
        text = f"{request.format(*said)} And the same for {said_second[0]}."
        calls = [call, second]
    else:
        text, calls = request.format(*said), [call]
    messages.append({"role": "user", "content": text})
    if shape < 0.72 or len(calls) > 1:
        return Sample("tools", messages, call_text(calls), "tools", calls, definitions, slots=_slots(calls))
    result = wanted.spec.result(rng, names)
    function = {"name": call["name"], "arguments": call["arguments"]}
    messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]})
    messages.append({"role": "tool", "content": compact(result)})
    answer = wanted.spec.telling.format(*said, **result)
    return Sample("tools", messages, answer, "text", answer, definitions, slots=None)
