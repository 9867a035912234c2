"""Export a run as a Hugging Face folder, or import such a folder or a nanochat checkpoint.

    nanochat-ray export --run chat --out my/folder        # for transformers and vLLM
    nanochat-ray export --run theirs --import-from my/folder     # to serve or fine-tune it here
    nanochat-ray export --run d20 --import-from ~/.cache/nanochat/base_checkpoints/d20

A model of the classic preset is transformers' own NanoChatForCausalLM; others go out with their
modelling file and need trust_remote_code=True.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanochat_ray.checks import check_name, require
from nanochat_ray.model.config import Precision
from nanochat_ray.storage import Store, absolute, default_root


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    run: str = "chat"
    """Run to write, or to make with --import-from."""
    checkpoint: str = ""
    """step-000200, or best by validation; by default the latest."""
    out: str | None = None
    """Folder to write, s3:// or gs:// too. New, empty, or written by an earlier export."""
    import_from: str | None = None
    """Folder of Hugging Face's or nanochat's to read into a new run. Of nanochat's a checkpoint
    folder, such as base_checkpoints/d20, with its tokenizer."""
    precision: Precision = "fp32"
    """Precision of the weights that are written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        for name in ("out", "import_from"):
            if (value := getattr(self, name)) is not None:
                require(bool(value), name, value, "a folder, s3:// or gs://")
                object.__setattr__(self, name, absolute(value))
        if self.checkpoint:
            check_name("checkpoint", self.checkpoint)
            rule = "only with --out: what is imported has one"
            require(self.import_from is None, "checkpoint", self.checkpoint, rule)


def main(args: Args) -> None:
    from nanochat_ray.checkpoint import checkpoint, folder, hf, nanochat
    from nanochat_ray.model.precision import DTYPES
    from nanochat_ray.text.tokenizer import folder_of

    run = Store.at(args.storage).child("runs", args.run)
    if (args.out is None) == (args.import_from is None):
        raise ValueError("give either --out, to write a folder, or --import-from, to read one")
    if args.out is not None:
        out = Store.at(args.out)
        folder.check_target(out)
        model, tokenizer = checkpoint.load_model(run, checkpoint.resolve(run, args.checkpoint))
        hf.export(model, tokenizer, out, dtype=DTYPES[args.precision])
        print(f"{args.out} holds run {args.run} for transformers")
    elif args.import_from is not None:
        if (name := checkpoint.latest(run)) is not None:
            raise ValueError(f"run={args.run!r} exists already, with {name}")
        with folder.local_copy(args.import_from, "import_from") as local:
            reader = nanochat if nanochat.is_checkpoint(local) else hf
            model, tokenizer = reader.import_folder(local)
        tokenizer.save(folder_of(Store.at(args.storage), tokenizer.fingerprint))
        checkpoint.save(
            run,
            0,
            model_config=model.config,
            weights=dict(model.named_parameters()),
            optimizer=None,
            trainer={"step": 0, "metrics": {}, "about": {"taken_from": args.import_from}},
            tokenizer=tokenizer,
        )
        print(f"run {args.run} holds {args.import_from}")
