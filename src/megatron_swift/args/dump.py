"""Arguments as the plain values of args.json."""

from __future__ import annotations

import copy
from typing import Any

from megatron_swift.args.spec import Arguments, params_of

REDACTED = "[redacted]"


def to_json(args: Arguments) -> dict[str, Any]:
    """Every parameter of `args` by name in a form that json.dump accepts; secrets that are set read "[redacted]"."""
    return {
        name: REDACTED if p.declared.secret and getattr(args, name) is not None else copy.deepcopy(getattr(args, name))
        for name, p in params_of(type(args)).items()
    }
