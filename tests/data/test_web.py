"""Requests that fail, and what a redirect may see. The server is on this machine."""

from __future__ import annotations

import http.client
import urllib.error

import pytest
from mini_hub import MiniHub

from megatron_swift.data import web
from megatron_swift.data.web import Refused, Unreachable, get, patiently

SECRETS = {"Authorization": "Bearer abc", "Cookie": "m_session_id=abc"}


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub():
    with MiniHub({"org/name": {"a.jsonl": b"0123456789" * 10}}).serve() as hub:
        yield hub


def stored(hub: MiniHub) -> str:
    return f"{hub.url}/stored/org/name/a.jsonl"


def test_secrets_do_not_follow_a_redirect_to_another_host(hub):
    with MiniHub(hub.files).serve() as other:
        hub.elsewhere = other.url
        url = f"{hub.url}/datasets/org/name/resolve/{hub.revision('org/name')}/a.jsonl"
        assert len(get(url, SECRETS, what="x", most=1000)) == 100
        assert [one.secrets for one in hub.seen] == [SECRETS]
        assert [one.secrets for one in other.seen] == [{}]


def test_secrets_follow_a_redirect_within_the_hub(hub):
    hub.elsewhere = hub.url
    url = f"{hub.url}/datasets/org/name/resolve/{hub.revision('org/name')}/a.jsonl"
    get(url, SECRETS, what="x", most=1000)
    assert [one.secrets for one in hub.seen] == [SECRETS, SECRETS]


def test_a_redirect_leads_to_the_web_only(hub, tmp_path):
    (tmp_path / "stored/org/name").mkdir(parents=True)
    (tmp_path / "stored/org/name/a.jsonl").write_text("a file on this machine")
    hub.elsewhere = f"file://{tmp_path}"
    url = f"{hub.url}/datasets/org/name/resolve/{hub.revision('org/name')}/a.jsonl"
    with pytest.raises((Refused, Unreachable)):
        get(url, {}, what="x", most=1000)


def test_what_passes_is_asked_for_again(hub, caplog):
    hub.breaking, hub.after = web.ATTEMPTS - 1, 30
    assert len(get(stored(hub), SECRETS, what="the file", most=1000)) == 100
    assert hub.requests() == web.ATTEMPTS
    assert f"the file: attempt 1 of {web.ATTEMPTS} failed: the answer broke off after 30 bytes" in caplog.text
    hub.breaking = web.ATTEMPTS
    with pytest.raises(Unreachable, match=f"broke off after 30 bytes; tried {web.ATTEMPTS} times") as caught:
        get(stored(hub), SECRETS, what="the file", most=1000)
    assert "abc" not in caplog.text + str(caught.value)


def test_what_does_not_pass_is_asked_for_once(hub):
    hub.token = "another"
    with pytest.raises(Refused, match="HTTP 401") as caught:
        get(stored(hub), SECRETS, what="x", most=1000)
    assert (caught.value.status, caught.value.__cause__, len(hub.seen)) == (401, None, 1)


def test_nobody_there(hub):
    with MiniHub({}).serve() as gone:
        url = gone.url
    with pytest.raises(Unreachable, match=r"refused; tried \d times"):
        get(url, {}, what="x", most=10)


def test_an_answer_that_is_too_long(hub):
    assert len(get(stored(hub), {}, what="x", most=100)) == 100
    with pytest.raises(Unreachable, match="longer than 99 bytes"):
        get(stored(hub), {}, what="x", most=99)


@pytest.mark.parametrize(("after", "slept"), [("", 2.0), ("7", 7.0), ("900", web.LONGEST_PAUSE), ("soon", 2.0)])
def test_pauses(monkeypatch, after, slept):
    pauses: list[float] = []
    monkeypatch.setattr(web, "PAUSE", 2.0)
    monkeypatch.setattr(web.time, "sleep", pauses.append)
    headers = http.client.HTTPMessage()
    headers["Retry-After"] = after

    def attempt() -> str:
        if not pauses:
            raise urllib.error.HTTPError("http://x", 429, "too many", headers, None)
        return "done"

    assert patiently(attempt, what="x") == "done"
    assert pauses == [slept]
