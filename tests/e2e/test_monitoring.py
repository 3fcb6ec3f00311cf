"""A real Prometheus scrapes a served nano: the dashboard's queries and the alert rules have data."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS, REQUESTS
from sglang_orthrus.cli.server import HOST, Server, free_port
from sglang_orthrus.config import WIDTHS
from tests.e2e.chats import CHAT
from tests.monitoring import CONFIG, RULE_TESTS, RULES, panels, rules, selectors_in
from tests.servers import SETUP, TEST_ARGS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="needs prometheus and promtool on the PATH: apt-get install prometheus",
    ),
]

PATIENCE_SECONDS = 120.0
# Four scrapes, the least with which Grafana replaces this.
RATE_INTERVAL = "4s"
EMPTY_AT_REST = "Empty at rest."
EMPTY_ON_A_HEALTHY_SERVER = 'status_code=~"5.."'
# Prometheus reserves colons for recording rules; SGLang's names all have one.
COLON = "metric names should not contain ':'"

Values = dict[str, list[float]]


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **params: str | float) -> Any:
        """Data of its API."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=params, timeout=60)
        assert answer.ok, answer.text
        return answer.json()["data"]

    def values(self, query: str, since: float) -> list[float]:
        """All numbers that a panel would show from then on; no NaN."""
        for variable, value in {"__rate_interval": RATE_INTERVAL, "instance": ".+", "model_name": ".+"}.items():
            query = query.replace(f"${variable}", value)
        found = self.get("query_range", query=query, start=since, end=time.time(), step=1)["result"]
        numbers = (float(value) for series in found for _, value in series["values"])
        return [number for number in numbers if not math.isnan(number)]

    def state_of(self, alert: str) -> str:
        """inactive, pending or firing."""
        states = {rule["name"]: rule["state"] for group in self.get("rules")["groups"] for rule in group["rules"]}
        return str(states[alert])


@dataclass
class Watched:
    """A server, what watches it, and since when."""

    server: Server
    prometheus: Prometheus
    since: float


def wait_until(is_reached: Callable[[], object], what: str) -> None:
    """Wait for a state; fail after two minutes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_reached():
        assert time.monotonic() < deadline, f"not reached in time: {what}"
        time.sleep(0.2)


@pytest.fixture(name="server", scope="module")
def _server() -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, *TEST_ARGS, "--decode-log-interval", "4")
    with Server(NANO, *args, env={**SETUP.env, WIDTHS: "1,8,16,32"}, timeout=600) as server:
        yield server


@pytest.fixture(name="watched", scope="module")
def _watched(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Prometheus with the configuration of the docs, but for address and intervals."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"{HOST}:{server.port}"]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    prometheus = Prometheus(f"http://{HOST}:{(port := free_port())}")
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address={HOST}:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: _is_ready(prometheus), "Prometheus answers")
            since = time.time()
            wait_until(lambda: _scrapes(prometheus) >= 6, "six scrapes")
            yield Watched(server, prometheus, since)
        finally:
            process.terminate()


def _is_ready(prometheus: Prometheus) -> bool:
    try:
        return requests.get(f"{prometheus.url}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


def _scrapes(prometheus: Prometheus) -> int:
    found = prometheus.get("query", query='count_over_time(up{job="sglang"}[10m])')["result"]
    return int(found[0]["value"][1]) if found else 0


def _answers(watched: Watched) -> Values:
    queries = [query for panel in panels() for query in panel.queries]
    return {query: watched.prometheus.values(query, watched.since) for query in queries}


@pytest.fixture(name="at_rest", scope="module")
def _at_rest(watched: Watched) -> Values:
    """What panels show before the first request."""
    return _answers(watched)


@pytest.fixture(name="in_traffic", scope="module")
def _in_traffic(watched: Watched, at_rest: Values) -> Values:
    """What they show after all kinds of requests, several at a time, over some scrapes."""
    bodies = [
        {"model": "default", "temperature": temperature, **request}
        for temperature, request in product((0, 0.8), REQUESTS.values())
    ]
    scrapes = _scrapes(watched.prometheus)
    with ThreadPoolExecutor(4) as pool:
        while _scrapes(watched.prometheus) < scrapes + 8:
            for answer in pool.map(lambda body: watched.server.post(CHAT, body), bodies):
                assert answer["choices"][0]["finish_reason"] in ("stop", "tool_calls")
    return _answers(watched)


def test_a_panel_is_empty_at_rest_only_if_it_says_so(at_rest: Values) -> None:
    for panel in panels():
        has_data = all(at_rest[query] for query in panel.queries)
        assert has_data != (EMPTY_AT_REST in panel.description), (panel.title, [at_rest[q] for q in panel.queries])


def test_every_query_of_the_dashboard_has_data(in_traffic: Values) -> None:
    assert [query for query, values in in_traffic.items() if not values] == []


def test_the_figures_are_those_of_the_traffic(in_traffic: Values) -> None:
    by_title = {panel.title: [value for query in panel.queries for value in in_traffic[query]] for panel in panels()}
    assert max(by_title["Tokens per cycle"]) > 2
    assert max(by_title["Speed against plain decoding"]) > 0
    for title in ("Output tokens per second", "Rounds per second by path", "Drafts under grammars per second"):
        assert max(by_title[title]) > 0, title
    for title in ("KV use", "Accepted drafts"):
        assert all(0 <= value <= 1 for value in by_title[title]), title


def test_every_selector_of_the_rules_has_data(watched: Watched, in_traffic: Values) -> None:
    selectors = {selector for expression in rules().values() for selector in selectors_in(expression)}
    for selector in selectors:
        has_data = bool(watched.prometheus.values(selector, watched.since))
        assert has_data != (EMPTY_ON_A_HEALTHY_SERVER in selector), selector


def test_the_rules_are_evaluated_and_silent(watched: Watched, in_traffic: Values) -> None:
    found = [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in found} == set(rules())
    assert {(rule["health"], rule["state"]) for rule in found} == {("ok", "inactive")}, found


def promtool(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *args], input=stdin, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "args", [("check", "rules", RULES), ("check", "config", CONFIG), ("test", "rules", RULE_TESTS)], ids=lambda a: a[1]
)
def test_promtool_accepts_the_files(args: tuple[str, str, Path]) -> None:
    done = promtool(*map(str, args))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_has_one_objection_to_our_metrics(watched: Watched, in_traffic: Values) -> None:
    lines = watched.server.get("/metrics").text.splitlines()
    ours = [line for line in lines if re.match(r"(# (HELP|TYPE) )?sglang_orthrus:", line)]
    done = promtool("check", "metrics", stdin="\n".join([*ours, ""]))
    said = (done.stdout + done.stderr).splitlines()
    assert said and [line for line in said if not line.endswith(COLON)] == []


def test_an_alert_follows_when_the_server_is_gone(watched: Watched, in_traffic: Values) -> None:
    """The last test: it stops the server."""
    watched.server.stop()
    wait_until(lambda: watched.prometheus.state_of("OrthrusSilent") == "pending", "OrthrusSilent")
