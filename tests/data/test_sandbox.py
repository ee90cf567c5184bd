"""A template that came with a model cannot reach out, hang or fill memory."""

from __future__ import annotations

import datetime
import json
import time

import pytest

from megatron_swift.data.sandbox import MAX_CHARS, english_date, render

DAY = datetime.date(2025, 3, 5)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
GROW = "{% set ns = namespace(x=%s) %}{% for i in range(60) %}{% set ns.x = %s %}{% endfor %}"


def grow(first, step):
    return GROW.replace("%s", first, 1).replace("%s", step, 1)


def run(source, **values):
    return render(source, {"messages": MESSAGES, **values}, day=DAY)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.role }}{% if not loop.last %},{% endif %}{% endfor %}", "user,assistant"),
        ("{{ messages|map(attribute='content')|join('+') }}", "hi+yo"),
        ("{{ messages[-1].content.strip().split('o')[0] ~ 1 ~ none }}", "y1None"),
        ("{{ {'a': 'é<'}|tojson }}", '{"a": "é<"}'),
        ("{{ {'a': [1]}|tojson(indent=2) }}", json.dumps({"a": [1]}, indent=2)),
        ("{{ 'a-a'.replace('-', '+') + 'b'|replace('b', 'c') }}", "a+ac"),
        ("{{ ', '.join(['a', 'b']) }}", "a, b"),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
        ("{{ 2 * 3 + 7 % 4 }}", "9"),
        ("{{ ([1] + [2])|length }}", "2"),
        ("{% set (a, b) = ('x', 'y') %}{{ b ~ a }}", "yx"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "yo"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}", "<1>"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "yo"),
        ("{{ strftime_now('%d %b %Y, %B') }}", "05 Mar 2025, March"),
        ("{{ missing }}{% if missing is defined %}x{% endif %}", ""),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ],
)
def test_what_templates_do(source, text):
    assert run(source) == text


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ messages.__class__ }}", "__class__"),
        ("{{ messages['__class__'] }}", "__class__"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages|map(attribute='__class__')|list }}", "__class__"),
        ("{{ messages|attr('__class__') }}", "attr"),
        ("{{ self.__init__.__globals__ }}", "__init__"),
        ("{{ cycler.__init__.__globals__ }}", "__init__"),
        ("{{ range.__globals__ }}", "__globals__"),
        ("{{ raise_exception.__globals__ }}", "__globals__"),
        ("{% for a in messages %}{{ loop.__class__ }}{% endfor %}", "__class__"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].update({'a': 1}) }}", "update"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for m in messages %}" * 18 + "{% for m in messages %}{% endfor %}" * 5 + "{% endfor %}" * 18, "steps"),
        ("{{ range(100000000)|list }}", "steps"),
        ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}", "steps"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursive loop"),
        ("{{ 'a' * 1000000000 }}", r"uses \*"),
        ("{{ [1] * 1000000000 }}", r"uses \*"),
        ("{{ 9 ** 9 ** 9 }}", r"uses \*\*"),
        (grow("9", "ns.x * ns.x"), "huge numbers"),
        (grow("'aaaaaaaaaa'", "ns.x ~ ns.x"), "characters"),
        (grow("'aaaaaaaaaa'", "ns.x + ns.x"), "characters"),
        (grow("'a'", "ns.x.replace('a', 'aaaaaaaaaaaa')"), "characters"),
        (grow("'a'", "ns.x|replace('a', 'aaaaaaaaaaaa')"), "characters"),
        (grow("'a'", "[ns.x, ns.x, ns.x]|join"), "characters"),
        (grow("'a'", "ns.x.join([ns.x, ns.x, ns.x])"), "characters"),
        (grow("[1, 2]", "ns.x + ns.x"), "steps"),
        (grow("[1]", "[ns.x, ns.x]") + "{{ ns.x }}", "elements"),
        (grow("[1]", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x == ns.x }}", "elements"),
        (grow("[1]", "(ns.x, ns.x)") + "{{ ns.x|tojson }}", "elements"),
        ("{{ '{:1000000000}'.format(1) }}", "format"),
        ("{{ '%1000000000d' % 1 }}", "formats text"),
        ("{{ '%1000000000d'|format(1) }}", "format"),
        ("{{ 'a'.ljust(1000000000) }}", "ljust"),
        ("{{ 'a'|center(1000000000) }}", "center"),
        ("{{ 'a\nb'|indent(1000000000) }}", "indents too far"),
        ("{{ {}|tojson(indent=1000000000) }}", "indents too far"),
        ("{{ [1]|batch(1000000000, 'x')|list }}", "batch"),
        ("{{ raise_exception('not this way') }}", "not this way"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_what_it_may_not(source, what):
    started = time.monotonic()
    with pytest.raises(Exception, match=what):
        run(source)
    assert time.monotonic() - started < 10


def test_its_result_is_limited():
    with pytest.raises(Exception, match="characters"):
        run("{% for i in range(1000) %}{{ big }}{% endfor %}", big="x" * (MAX_CHARS // 500))


def test_what_it_is_given_stays_as_it_is():
    before = json.dumps(MESSAGES)
    run("{% set messages = messages[1:] %}{% for m in messages %}{% set m = 1 %}{% endfor %}")
    assert json.dumps(MESSAGES) == before


def test_one_rendering_does_not_eat_into_the_next():
    for _ in range(20):
        run("{% for i in range(90000) %}{% endfor %}")


def test_without_a_day_there_is_no_such_function():
    assert render("{{ strftime_now is defined }}", {}, day=None) == "False"
    assert english_date(DAY) == "05 Mar 2025"
