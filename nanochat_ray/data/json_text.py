"""Documents of JSON lines and JSON files: texts, or objects with the text in one field."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from nanochat_ray.checks import short_repr
from nanochat_ray.data.decoding import OnBad, decode, encoding_of, replace_surrogates


def parse(text: str) -> Any:
    """The JSON value of a text. ValueError, also for one that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _document(value: Any, column: str) -> str | None:
    """The document of a JSON value; None for null. ValueError says what the value is instead."""
    text = value
    if not isinstance(value, str):
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object with a text in {column!r}")
        if column not in value:
            raise ValueError(
                f"not a JSON object with a text in {column!r}, only {short_repr(list(value))}; "
                "--text-column names another"
            )
        text = value[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"not a JSON object with a text in {column!r}, which is {text!r:.40}")
    return replace_surrogates(text)


def documents_of_lines(
    lines: Iterator[bytes], where: str, column: str, on_bad: OnBad
) -> Iterator[str]:
    """The document of each line; empty lines and nulls have none."""
    for number, data in enumerate(lines, 1):
        line = f"text file {where}, line {number}"
        if number == 1:
            encoding = encoding_of(data)
            if encoding != "utf-8-sig":
                text = b"\n".join([data, *lines]).decode(encoding)
                utf8_lines = iter(text.encode().split(b"\n"))
                yield from documents_of_lines(utf8_lines, where, column, on_bad)
                return
            data = data.removeprefix(codecs.BOM_UTF8)
        if not data.strip():
            continue
        try:
            document = _document(parse(data.decode()), column)
        except UnicodeDecodeError as error:
            on_bad(f"{line}: not UTF-8 text (byte {error.start} of the line)")
        except ValueError as error:
            reason = str(error) if "JSON" in str(error) else f"not a JSON object: {error}"
            on_bad(f"{line}: {reason}")
        else:
            if document is not None:
                yield document


def documents(data: bytes, where: str, column: str, on_bad: OnBad) -> Iterator[str]:
    """A JSON file: an array of objects or texts, one object, or objects on lines."""
    text = decode(data, where)
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(
            f"text file {where} is not JSON that can be read: nested too deep"
        ) from None
    except ValueError as error:
        if "Extra data" in str(error):
            lines = iter(text.encode().split(b"\n"))
            yield from documents_of_lines(lines, where, column, on_bad)
            return
        raise ValueError(f"text file {where} is not JSON: {error}") from None
    if not isinstance(values, list):
        values = [values]
    for number, value in enumerate(values, 1):
        try:
            document = _document(value, column)
        except ValueError as error:
            on_bad(f"text file {where}, item {number}: {error}")
        else:
            if document is not None:
                yield document
