"""What goes out is what transformers loads by itself, and what comes back is the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat_ray.checkpoint import hf
from nanochat_ray.checkpoint.folder import local_copy, writing
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.chat import from_openai, render_conversation, render_prompt
from nanochat_ray.text.tokenizer import Tokenizer
from tests.damage import check_damage
from tests.tiny import tiny_config

TEXTS = (
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\n\tand tabs\r\n   ",
    "naïve café — 日本語 😀👩‍👩‍👧 \u200b",
    "def f(x):\n    return x**2  # square",
    "<|bos|",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    corpus = [Path(__file__).read_text(), Path(hf.__file__).read_text(), *TEXTS] * 3
    return Tokenizer.train(corpus, 700)


def model_for(tokenizer: Tokenizer, **fields: object) -> GPT:
    model = GPT(tiny_config("classic", vocab_size=tokenizer.vocab_size, **fields))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def export(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    hf.export(model_for(tokenizer), tokenizer, folder, dtype=torch.float32)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("pad", [1, 64])
def test_transformers_gives_the_same_logits(tokenizer: Tokenizer, tmp_path: Path, pad: int) -> None:
    from transformers import AutoModelForCausalLM

    model = model_for(tokenizer, pad_vocab_to=pad)
    hf.export(model, tokenizer, tmp_path, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, tokenizer.vocab_size, (3, 32), generator=torch.manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    assert type(peer).__name__ == "NanoChatForCausalLM"
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours.std() > 0.1

    back, same = hf.import_folder(tmp_path)
    assert same.fingerprint == tokenizer.fingerprint
    # Bits of logits are not compared: padding changes the shapes of products, which on some CPUs
    # changes the order of sums.
    size, weights = tokenizer.vocab_size, dict(back.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weights[name][:size], weight[:size]), name


@pytest.mark.slow
def test_folder_of_transformers_is_imported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf.export(model_for(tokenizer), tokenizer, tmp_path / "one", dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32).eval()
    peer.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "tokenizer.json").write_bytes(
        (tmp_path / "one" / "tokenizer.json").read_bytes()
    )
    model, _ = hf.import_folder(tmp_path / "two")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(ids) - peer(ids).logits).abs().max() <= 1e-4


def test_transformers_tokenizes_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hf.export(model_for(tokenizer), tokenizer, tmp_path, dtype=torch.float32)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert peer.encode(text, add_special_tokens=False) == ids
        assert peer.encode(text) == [tokenizer.bos, *ids]
        assert peer.decode(ids) == text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, *calls: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    functions = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, **({"tool_calls": functions} if calls else {})}


def system(content: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def schema(**types: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": t} for name, t in types.items()}}


WEATHER = tool("weather", description='Tells <|bos|> "it" é', parameters=schema(city="string"))
CALCULATORS = (
    tool("calculator"),
    tool("calculator", parameters={**schema(expression="string"), "required": ["expression"]}),
    tool("calculator", parameters=schema(number="number")),  # another function of that name
)
SUM, NOW = ("1", "calculator", {"expression": "1+1"}), ("1", "now", {})
CONVERSATIONS: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]]], ...] = (
    ([user("Hi 12!")], []),
    ([user("")], []),
    ([system("Be brief.")], []),
    ([system("Be brief."), user("Hi"), assistant("Yo"), user("More")], []),
    ([user("Hi"), user("there")], []),
    ([assistant("Yo"), assistant("ho"), system(""), user("Hi"), system("Be brief.")], []),
    ([user("naïve café — 日本語 😀👩‍👩‍👧 \u200b  \n\n")], []),
    ([user("<|user_end|><|assistant_start|>Yes<|bos|>"), assistant("<|assistant_end|>")], []),
    ([user([{"type": "text", "text": "one"}, {"type": "text", "text": "<|bos|>"}])], []),
    ([user("Rain?")], [WEATHER]),
    ([system("Be brief."), user("Rain?")], [WEATHER, *CALCULATORS]),
    ([system("", "developer"), user("Rain?")], [WEATHER, tool("now")]),
    ([assistant("Ask!"), user("Rain?")], [WEATHER]),
    ([user("1+1?")], [CALCULATORS[1]]),
    ([user("1+1?")], [CALCULATORS[2]]),
    ([user("1+1?"), assistant("It is ", SUM), result("1", "2"), assistant("."), user("So")], []),
    ([user("?"), assistant(None, ("1", "weather", {"city": '"é"<|bos|>'})), result("1", "")], []),
    (
        [
            user("?"),
            assistant("", NOW, ("2", "sky", {"a": [1]})),
            result("2", "s"),
            result("1", "n"),
        ],
        [],
    ),
    ([user("?"), assistant("one"), assistant(None, NOW), result("1", "<|output_end|>")], []),
    ([user("?"), assistant("x", NOW), result("1", "y"), assistant("", SUM), result("1", "2")], []),
)


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_chat_template_gives_the_same_ids(export: Path, tokenizer: Tokenizer, number: int) -> None:
    from transformers import AutoTokenizer

    messages, tools = CONVERSATIONS[number]
    openai = json.loads(json.dumps(messages))
    for message in openai:  # OpenAI's arguments are text
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    turns = from_openai(openai, tools)
    peer = AutoTokenizer.from_pretrained(export)
    for add_generation_prompt, ids in (
        (True, render_prompt(tokenizer, turns)),
        (False, render_conversation(tokenizer, turns)[0]),
    ):
        assert ids == peer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )


@pytest.mark.parametrize("fields", [{}, {"window_pattern": "SL", "sequence_len": 1024}])
def test_modern_models_give_equal_logits(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = GPT(tiny_config(vocab_size=tokenizer.vocab_size, n_layer=4, **fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path / "modern"
    hf.export(model, tokenizer, folder, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    length = model.config.sequence_len
    ids = torch.randint(0, tokenizer.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        ours = model(ids)
        assert (ours - peer(ids).logits).abs().max() <= 2e-4
        assert ours.std() > 0.1
        # With a cache, in pieces and token by token.
        cache, at = None, 0
        for stop in (length // 2, length // 2 + 1, length):
            out = peer(ids[:, at:stop], past_key_values=cache, use_cache=True)
            assert (ours[:, at:stop] - out.logits).abs().max() <= 2e-4
            cache, at = out.past_key_values, stop
        generated_ids = peer.generate(
            ids[:1, :8], max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        reference = ids[:1, :8]
        for _ in range(6):
            reference = torch.cat((reference, model(reference)[:, -1:].argmax(-1)), dim=1)
    assert generated_ids.tolist() == reference.tolist()
    peer.save_pretrained(tmp_path / "back")  # transformers' own writing comes in too
    (tmp_path / "back" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for source in (folder, tmp_path / "back"):
        back, same = hf.import_folder(source)
        assert same.fingerprint == tokenizer.fingerprint
        with torch.no_grad():
            assert torch.equal(back(ids), ours)
    auto = AutoTokenizer.from_pretrained(folder)
    assert auto.encode("Hello", add_special_tokens=False) == tokenizer.encode("Hello")


def generate(peer: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    return peer.generate(ids, max_new_tokens=12, do_sample=False, **options).tolist()


@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_generate_equals_uncached_answers(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    from transformers import AutoModelForCausalLM

    model = GPT(tiny_config(preset, vocab_size=tokenizer.vocab_size, n_layer=3, sequence_len=64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path / f"generate-{preset}"
    hf.export(model.eval(), tokenizer, folder, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    ids = torch.randint(0, tokenizer.vocab_size, (2, 10), generator=generator)
    ids[:, 0] = tokenizer.bos  # no padding, whatever ends an answer
    ids[:, 4:7] = ids[:, 7:]  # so that draft tokens are looked up in the prompt
    reference = ids
    with torch.no_grad():
        for _ in range(12):
            reference = torch.cat((reference, model(reference)[:, -1:].argmax(-1)), dim=1)
    endless = {"eos_token_id": None}
    assert generate(peer, ids, **endless) == reference.tolist()
    drafts = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    assert generate(peer, ids[:1], **endless, **drafts) == reference[:1].tolist()
    beams = {**endless, "num_beams": 3}
    assert generate(peer, ids, **beams) == generate(peer, ids, **beams, use_cache=False)


@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_trainer_gets_the_loss_it_expects(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    from transformers import AutoModelForCausalLM

    folder = tmp_path / f"loss-{preset}"
    model = GPT(tiny_config(preset, vocab_size=tokenizer.vocab_size))
    model.init_weights(torch.Generator().manual_seed(0))
    hf.export(model, tokenizer, folder, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    ids = torch.arange(20)[None]
    ids[0, 7] = tokenizer.bos
    mean = peer(ids, labels=ids).loss
    # With accumulation it gives the tokens of all its batches, and expects a sum over them.
    share = peer(ids, labels=ids, num_items_in_batch=4 * 19).loss
    torch.testing.assert_close(share, mean / 4)
    mean.backward()
    assert peer.get_input_embeddings().weight.grad[tokenizer.bos].abs().sum() > 0


@pytest.mark.parametrize("failing", ["save_file", "tokenizer_json"])
def test_a_full_disk_names_the_folder(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    errors = {
        "save_file": SafetensorError("I/O error: No space left on device (os error 28)"),
        "tokenizer_json": OSError(errno.ENOSPC, "No space left on device"),
    }

    def fail(*_: object, **__: object) -> None:
        raise errors[failing]

    monkeypatch.setattr(hf, failing, fail)
    with pytest.raises(OSError, match="No space left") as error:
        hf.export(model_for(tokenizer), tokenizer, tmp_path / "model", dtype=torch.float32)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_skips_cannot_go_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes_only()
    with pytest.raises(ValueError, match=r"cannot express skips=True"):
        hf.export(GPT(tiny_config(skips=True)), tokenizer, tmp_path, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_misfit_folders_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        hf.import_folder(tmp_path)
    hf.export(model_for(tokenizer), tokenizer, tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not allowed"),
        ({"hidden_size": 64, "intermediate_size": 256}, "does not fit"),
        ({"num_hidden_layers": 3}, "those of layer 2 are missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            hf.import_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        hf.import_folder(tmp_path)


def with_changes(export: Path, folder: Path, **fields: object) -> Path:
    shutil.copytree(export, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 is not allowed"),
        ("num_hidden_layers", 9_999, "num_hidden_layers=9999 does not fit the 14 tensors"),
        ("num_hidden_layers", 1, r"tensor 'model\.layers\.1\..*' is not of this architecture"),
        ("num_hidden_layers", "2", "num_hidden_layers='2' is not allowed"),
        ("num_hidden_layers", None, "num_hidden_layers=None is not allowed"),
        ("hidden_size", 10**30, "hidden_size=1000000"),
        ("hidden_size", 2**20, "intermediate_size=128 is not allowed: 4194304"),
        ("vocab_size", 10**6, "vocab_size=1000000 does not fit tokenizer.json"),
        ("max_position_embeddings", 10**12, "max_position_embeddings=1000000000000"),
        ("num_attention_heads", 3, r"config\.json: n_embd=32 is not allowed"),
        ("num_key_value_heads", 3, r"config\.json: n_kv_head=3 is not allowed"),
        ("rms_norm_eps", "x", "rms_norm_eps='x' is not allowed"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type='yarn' is not allowed"),
        ("rope_parameters", 3, "rope_parameters=3 is not allowed"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
        ("rope_scaling", {"factor": 2.0}, "rope_scaling="),
        ("tie_word_embeddings", True, "tie_word_embeddings=True is not allowed"),
        ("tokenizer_fingerprint", "ff", "tokenizer_fingerprint='ff' is not that"),
        ("final_logit_softcapping", -1, "final_logit_softcapping=-1 is not allowed"),
    ],
)
def test_a_wrong_config_is_named(
    export: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    folder = with_changes(export, tmp_path / "bad", **{field: value})
    with pytest.raises(ValueError, match=message) as caught:
        hf.import_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("windows", [7, 32], r"windows=\[7, 32\] is not allowed"),
        ("windows", [32], r"windows=\[32\] is not allowed"),
        ("windows", None, "windows=None is not allowed"),
        ("smear", 1, "smear=1 is not allowed: true or false"),
        ("smear", False, r"tensor 'smear_\w+.*' is not of this architecture"),
        ("padded_vocab_size", 64, "padded_vocab_size=64 is not allowed"),
        ("qk_scale", -1, "qk_scale=-1 is not allowed"),
        ("num_hidden_layers", 9_999, "num_hidden_layers=9999|windows="),
    ],
)
def test_a_wrong_config_of_our_own_kind_is_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    tokenizer, folder = Tokenizer.bytes_only(), tmp_path / "modern"
    hf.export(GPT(tiny_config()), tokenizer, folder, dtype=torch.float32)
    assert hf.import_folder(folder)[0].config.smear
    with pytest.raises(ValueError, match=message) as caught:
        hf.import_folder(with_changes(folder, tmp_path / "bad", **{field: value}))
    assert str(tmp_path / "bad") in str(caught.value)


def test_a_field_that_is_not_written_has_its_default(export: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = with_changes(export, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    for name in ("final_logit_softcapping", "rope_parameters"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    peer, own = AutoConfig.from_pretrained(folder), hf.read_config(folder)
    assert own.softcap == peer.final_logit_softcapping
    assert own.rope_base == peer.rope_parameters["rope_theta"]


@pytest.mark.slow
def test_damaged_folders_are_refused_by_name(export: Path) -> None:
    reference, tokenizer = hf.import_folder(export)
    shapes = {name: p.shape for name, p in reference.named_parameters()}

    def same(imported_pair: Any) -> bool:
        # Weights have no checksum there: flipped bits in them are other weights.
        model, other = imported_pair
        fits = {name: p.shape for name, p in model.named_parameters()} == shapes
        return fits and other.fingerprint == tokenizer.fingerprint

    check_damage(export, hf.import_folder, same=same, count=150, seed=0)


def test_weights_that_do_not_fit_are_named(export: Path, tmp_path: Path) -> None:
    weights = load_file(export / "model.safetensors")
    name = "model.layers.0.mlp.fc1.weight"
    for change, message in (
        ({name: weights[name].to(torch.int32)}, f"{name} is I32"),
        ({name: weights[name][:3].clone()}, rf"{name} has the shape \[3, 32\]"),
        ({name: weights[name] * torch.inf}, f"{name} has values that are not finite"),
        ({"extra": torch.zeros(3)}, "tensor 'extra' is not of this architecture"),
        ({name: None}, f"tensor {name} is missing|does not fit the 13 tensors"),
    ):
        folder = tmp_path / str(len(message))
        shutil.copytree(export, folder)
        new_weights = {k: v for k, v in {**weights, **change}.items() if v is not None}
        save_file(new_weights, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            hf.import_folder(folder)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "outside", "big"])
def test_files_that_never_end_are_refused(export: Path, tmp_path: Path, kind: str) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(export, folder)
        (folder / name).unlink()
        if kind == "fifo":
            os.mkfifo(folder / name)
        elif kind == "device":
            (folder / name).symlink_to("/dev/zero")
        elif kind == "folder":
            (folder / name).mkdir()
        elif kind == "big":
            with (folder / name).open("wb") as file:
                file.truncate(1 << 40)  # a sparse file
        else:
            index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"cannot be read|is missing|no file of this folder"):
            hf.import_folder(folder)


def test_other_tokenizer_kinds_are_refused(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(export, folder)
    path = folder / "tokenizer.json"
    split, *byte_level = json.loads(path.read_text())["pre_tokenizer"]["pretokenizers"]
    for at, value, message in (
        (("normalizer",), {"type": "NFKC"}, "normalizer="),
        (("post_processor", "single"), [], "post_processor="),
        (("model", "merges"), [], "model.merges"),
        (("pre_tokenizer", "pretokenizers"), [split], "pre_tokenizer='Split' is not allowed"),
        (
            ("pre_tokenizer", "pretokenizers"),
            [split, *byte_level, *byte_level],
            "'Split, ByteLevel, ByteLev",
        ),
        (("model", "byte_fallback"), True, "model.byte_fallback=True"),
        (("model", "vocab"), {"a": 0}, "every byte must be a token"),
        (("added_tokens",), [], "added_tokens: its special tokens are"),
        (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True, "add_prefix_space=True"),
    ):
        document = json.loads((export / "tokenizer.json").read_text())
        target = document
        for key in at[:-1]:
            target = target[key]
        target[at[-1]] = value
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=message) as caught:
            hf.import_folder(folder)
        assert str(path) in str(caught.value)


def test_an_export_replaces_only_an_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, folder = model_for(tokenizer), tmp_path / "out"
    folder.mkdir()
    hf.export(model, tokenizer, folder, dtype=torch.float32)
    hf.export(model, tokenizer, folder, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert os.listdir(tmp_path) == ["out"]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out='.*out' is not allowed: the folder has notes\.txt"):
        hf.export(model, tokenizer, folder, dtype=torch.float32)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {**before, "notes.txt": b"mine"}
    (folder / "notes.txt").unlink()
    export = writing(Store.at(str(folder)))
    (export.__enter__() / "config.json").write_text("{}")
    (folder / "new.txt").write_text("mine")  # meanwhile
    with pytest.raises(ValueError, match=r"the folder has new\.txt"):
        export.__exit__(None, None, None)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {**before, "new.txt": b"mine"}
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="it is no folder"):
        hf.export(model, tokenizer, file, dtype=torch.float32)
    assert file.read_text() == "mine"


def test_a_failed_export_leaves_the_old_one(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = model_for(tokenizer), tmp_path / "out"
    hf.export(model, tokenizer, folder, dtype=torch.float32)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "tokenizer_json", full)
    with pytest.raises(OSError, match="No space left"):
        hf.export(model, tokenizer, folder, dtype=torch.bfloat16)
    with pytest.raises(OSError, match="No space left"):
        hf.export(model, tokenizer, tmp_path / "new", dtype=torch.bfloat16)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_goes_to_s3(s3: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = Store.at(s3).child("exports", "one")
    model = model_for(tokenizer)
    for _ in range(2):
        hf.export(model, tokenizer, out, dtype=torch.float32)
    with local_copy(out.uri, "take") as folder:
        back, _ = hf.import_folder(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(back(ids), model(ids))
    out.write_text("notes.txt", "mine")
    with pytest.raises(ValueError, match=r"the folder has notes\.txt"):
        hf.export(model, tokenizer, out, dtype=torch.float32)
