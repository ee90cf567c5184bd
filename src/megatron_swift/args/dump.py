"""Arguments as the plain values of args.json."""

from __future__ import annotations

import copy
from typing import Any

from megatron_swift.args.spec import Arguments, params_of

SECRETS = ("hub_token",)
REDACTED = "[redacted]"


def to_json(args: Arguments) -> dict[str, Any]:
    """Every parameter of `args` by name in a form that json.dump accepts; secrets that are set read "[redacted]"."""
    values = {name: copy.deepcopy(getattr(args, name)) for name in params_of(type(args))}
    return values | {name: REDACTED for name in SECRETS if values.get(name) is not None}
