"""The whole entry as JSON, for programs that read no YAML."""

import json

from coeffs.engines.setting import Carried, Request
from coeffs.engines.text import read_json
from coeffs.entry.fields import plain
from coeffs.entry.schema import from_plain
from coeffs.errors import EngineError, EntryError


def write(request: Request) -> str:
    return json.dumps(plain(request.entry), indent=2, ensure_ascii=False) + "\n"


def read(text: str) -> Carried:
    try:
        return Carried(entry=from_plain(read_json(text, required={"schema", "model"})))
    except EntryError as error:
        raise EngineError(str(error)) from None
