"""The format and compression of a file, by its name."""

from __future__ import annotations

from typing import Literal

from nanochat_ray.storage import split_uri

Kind = Literal["text", "code", "html", "json", "jsonl", "csv", "tsv", "parquet", "arrow"]

_CODE = (
    "py pyi pyx ipy js mjs cjs jsx ts tsx c h cc cpp cxx hh hpp hxx cu cuh m mm java kt kts "
    "scala groovy go rs rb php pl pm lua r jl sh bash zsh fish sql swift cs fs vb hs ml mli "
    "ex exs erl hrl clj cljs lisp el scm rkt dart zig nim d v sv vhd asm s f90 f for pas "
    "proto thrift graphql cmake mk gradle vim tcl awk sed css scss less vue svelte "
)
KINDS: dict[Kind, tuple[str, ...]] = {
    "text": ("txt", "text", "md", "markdown", "rst", "org", "adoc", "tex"),
    "html": ("html", "htm", "xhtml"),
    "json": ("json",),
    "jsonl": ("jsonl", "ndjson", "jsonlines"),
    "csv": ("csv",),
    "tsv": ("tsv",),
    "parquet": ("parquet",),
    "arrow": ("arrow", "feather"),
    "code": tuple(_CODE.split()),
}
COMPRESSION = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd", "lz4": "lz4"}
KNOWN = (
    ".txt, .md, .rst, .html, .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, source code "
    f"(.py, .c, .js, …), plain or with .{', .'.join(COMPRESSION)}"
)
_KIND_OF: dict[str, Kind] = {suffix: kind for kind, names in KINDS.items() for suffix in names}


def format_of(name: str) -> tuple[Kind, str | None]:
    """(format, compression) by a file's name or URI.

    Raises ValueError, naming it and what is known.
    """
    path = split_uri(name)[1]
    parts = path.lower().rsplit("/", 1)[-1].split(".")
    compression = COMPRESSION.get(parts[-1])
    if compression:
        parts.pop()
    kind = _KIND_OF.get(parts[-1]) if len(parts) > 1 else None
    if kind is None:
        raise ValueError(f"text file {name} has an unknown format: give {KNOWN}")
    return kind, compression


def is_known(name: str) -> bool:
    try:
        format_of(name)
    except ValueError:
        return False
    return True
