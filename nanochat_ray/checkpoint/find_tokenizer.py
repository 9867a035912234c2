"""The tokenizer that a user names: of a dataset, of a run, or by its fingerprint."""

from __future__ import annotations

from nanochat_ray.checkpoint.names import latest
from nanochat_ray.checks import check_name
from nanochat_ray.data import tokenizers
from nanochat_ray.data.manifest import FILE, Manifest
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer, folder_of


def find_tokenizer(root: Store, name: str) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a dataset or run, with its sequence_len, or one by its fingerprint.

    Raises ValueError if ``name`` is none of these, or a prefix of several fingerprints.
    """
    check_name("tokenizer", name)
    datasets = root.child("datasets")
    if name and datasets.exists(f"{name}/{FILE}"):
        manifest = Manifest.load(datasets.child(name))
        folder = folder_of(root, manifest.tokenizer)
        return Tokenizer.load(folder, manifest.tokenizer), manifest.sequence_len
    run = root.child("runs", name)
    if latest(run) is not None:
        from nanochat_ray.checkpoint import checkpoint  # brings torch

        config = checkpoint.load_config(run)
        folder = folder_of(root, config.tokenizer)
        return Tokenizer.load(folder, config.tokenizer), config.model.sequence_len
    fingerprints = tokenizers.names(root)
    matches = [match for match in fingerprints if len(name) >= 4 and match.startswith(name[:16])]
    if len(matches) != 1:
        raise ValueError(
            f"tokenizer={name!r} is no dataset, no run and no fingerprint in {root.uri}; there are "
            f"the datasets {datasets.list() or 'none'} and the fingerprints "
            f"{fingerprints or 'none'}"
        )
    return tokenizers.load(root, matches[0]), None
