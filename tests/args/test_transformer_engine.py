"""What --transformer_impl asks for."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_swift.args.commands import SftArguments, parse
from megatron_swift.args.transformer_engine import INSTALL, attention_flag, check_transformer_engine, wish
from megatron_swift.utils.errors import UsageError

GIVEN = "--transformer_impl transformer_engine"


@pytest.mark.parametrize(
    ("flags", "wished", "flag"),
    [
        ("", "where it runs", "--attention_backend auto"),
        (GIVEN, "required", GIVEN),
        ("--transformer_impl local", "never", "--attention_backend auto"),
        ("--attention_backend auto", "where it runs", "--attention_backend auto"),
        (f"{GIVEN} --attention_backend auto", "required", GIVEN),
        (f"{GIVEN} --attention_backend flash", "never", "--attention_backend flash"),
        (f"{GIVEN} --use_flash_attn true", "never", "--use_flash_attn true"),
    ],
)
def test_what_is_asked_for(flags, wished, flag):
    args = parse(SftArguments, flags.split())
    assert (wish(args), attention_flag(args)) == (wished, flag)


@pytest.fixture
def installed(monkeypatch):
    """installed(bool): whether a package transformer_engine is found."""

    def put(there):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)

    return put


def check(flags, *, gpus=1):
    check_transformer_engine(parse(SftArguments, flags.split()), gpus=gpus)


def test_a_request_without_the_package_says_how_to_get_it(installed):
    installed(False)
    with pytest.raises(UsageError, match="is not installed") as e:
        check(GIVEN)
    assert e.value.exit_code == 2 and e.value.do.startswith(INSTALL) and "--transformer_impl local" in e.value.do


@pytest.mark.parametrize(
    ("flags", "gpus", "what"),
    [
        ("", 0, "needs a GPU"),
        ("--attention_dropout 0.1", 1, "--attention_dropout 0.1 excludes --transformer_impl transformer_engine"),
        ("--deterministic_mode true", 1, "--deterministic_mode true excludes --transformer_impl transformer_engine"),
    ],
)
def test_a_request_that_cannot_be_met(installed, flags, gpus, what):
    installed(True)
    with pytest.raises(UsageError, match=what) as e:
        check(f"{GIVEN} {flags}", gpus=gpus)
    assert e.value.exit_code == 2 and e.value.why
    check(flags, gpus=gpus)  # the default takes another kernel


@pytest.mark.parametrize("flags", ["", "--transformer_impl local", f"{GIVEN} --attention_backend unfused"])
def test_no_request_needs_no_package(installed, flags):
    installed(False)
    check(flags, gpus=0)


def test_a_request_that_another_one_sets_aside_is_said(installed, caplog):
    installed(True)
    check(GIVEN)
    assert not caplog.records
    check(f"{GIVEN} --attention_backend flash")
    assert "has no effect: --attention_backend flash names the kernel" in caplog.text
