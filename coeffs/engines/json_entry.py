"""The whole entry as JSON, for programs that read no YAML."""

import json

from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import read_json
from coeffs.entry.fields import plain
from coeffs.entry.schema import from_plain


def write(request: Request) -> str:
    return json.dumps(plain(request.entry), indent=2, ensure_ascii=False) + "\n"


def read(text: str) -> Carried:
    return Carried(entry=from_plain(read_json(text)))
