"""The default corpus, extracted in parallel and kept in storage for the next time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanochat_ray.data import documentation, sources
from nanochat_ray.on_ray.mapping import Progress, Row, mapped, say
from nanochat_ray.storage import Store

FILES_PER_TASK = 250


def documentation_corpus(root: Store) -> str:
    """URI of the default corpus below ``root``, a folder that is filled if it is not there."""
    store = root.child("corpora", f"documentation-{documentation.key()}")
    if store.exists("done"):
        say(f"corpus: {store.uri} (made before)")
        return store.uri
    began = time.perf_counter()
    files = [str(path) for path in documentation.files()]
    # Every n-th file, since large packages lie together and tasks should take equally long.
    count = -(-len(files) // FILES_PER_TASK)
    plan = [[number, files[number::count]] for number in range(count)]

    def extract(item: list[Any]) -> Row:
        number, paths = item
        found = [documentation.docstrings(Path(path)) for path in paths]
        return {"number": number, "modules": found, "documents": len(found)}

    modules: list[list[str]] = [[] for _ in files]
    progress = Progress(len(plan), "read source files, part")
    for row in mapped(plan, extract):
        modules[row["number"] :: count] = row["modules"]
        progress.add(row)
    documents = documentation.documents(modules)
    size = sum(len(document.encode()) for document in documents)
    # Spread over files, so that units of work mix the packages.
    parts = max(1, round(size / sources.UNIT_BYTES))
    for number in range(parts):
        table = pa.table({"text": documents[number::parts]})
        with (
            store.writing(f"{number:02d}.arrow") as stream,
            pa.ipc.new_file(stream, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=256)
    store.write_text("done", "")
    say(
        f"corpus: {len(documents):,} documents, {size / 1e6:.1f} MB from {len(files):,} source "
        f"files in {time.perf_counter() - began:.0f} s; {store.uri}"
    )
    return store.uri
