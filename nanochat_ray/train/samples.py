"""Short texts of a model in training, for a person to read: how it continues texts, or answers
questions, of the validation split. Greedy and without a cache. As in a served answer, the
calculator is run.

The engine does this fast, but training may not import it (its layer is beside this one), and a
few dozen tokens need no speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool, ToolState, calculator_tool

NUM_PROMPTS = 3
PROMPT_TOKENS = 12
"""Of a document."""
LENGTHS = 128
"""Rows are padded to a multiple of this."""


@torch.no_grad()
def greedy(
    model: GPT, ids: Sequence[int], count: int, ends: Sequence[int], tool: Tool | None = None
) -> list[int]:
    """Up to ``count`` tokens after ``ids``, the likeliest each time, up to one of ``ends``.

    Behind a call of ``tool`` come the tokens of its result. Stops where the context that the model
    was trained for is full.
    """
    if len(ids) >= model.config.sequence_len:
        # A context this short holds the end of the prompt, with room for an answer.
        ids = ids[-max(1, model.config.sequence_len // 2) :]
    first = len(ids)
    last = min(first + count, model.config.sequence_len)
    # One length for all forwards: on a GPU each length of its own may compile anew. What stands
    # to the right of a token does not reach it.
    length = min(-(-last // LENGTHS) * LENGTHS, model.config.sequence_len)
    row = torch.zeros((1, length), dtype=torch.int64, device=model.lm_head.weight.device)
    row[0, :first] = torch.tensor(list(ids))
    state = None if tool is None else ToolState(tool)
    result: list[int] = []
    for at in range(first, last):
        if result:
            row[0, at] = result.pop(0)
            continue
        # Compiled layers are for the shapes of training.
        best = int(model.logits(model.hidden(row, eager=True)[:, at - 1]).argmax())
        if best in ends:
            return row[0, first:at].tolist()
        row[0, at] = best
        result = [] if state is None else state.feed(best)
    return row[0, first:last].tolist()


def choose_prompts(
    tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray | None
) -> dict[str, list[int]]:
    """Token ids of at most ``NUM_PROMPTS`` prompts by their texts, from the sequences ``ids [n, T +
    1]``: prefixes of documents or, with the ``mask`` of targets, conversations up to their first
    answer, whose text is the question before it."""
    prompts: dict[str, list[int]] = {}
    for row in range(len(ids)):
        starts = np.flatnonzero(ids[row] == tokenizer.bos)
        for start, end in itertools.pairwise([*starts.tolist(), ids.shape[1]]):
            document = ids[row, start:end].tolist()
            if mask is None:
                text, prompt = _prefix(tokenizer, document)
            else:
                prompt = document[: int(mask[row, start:end].argmax())]
                text = _last_question(tokenizer, prompt)
            if text.strip() and len(prompt) < len(document):
                prompts.setdefault(text, prompt)
            if len(prompts) == NUM_PROMPTS:
                return prompts
    return prompts


def _prefix(tokenizer: Tokenizer, document: list[int]) -> tuple[str, list[int]]:
    """At most ``PROMPT_TOKENS`` tokens, without a last one that ends inside a character."""
    prompt = document[: 1 + PROMPT_TOKENS]
    while (text := tokenizer.decode(prompt[1:])).endswith("\N{REPLACEMENT CHARACTER}"):
        prompt.pop()
    return text, prompt


def _last_question(tokenizer: Tokenizer, prompt: list[int]) -> str:
    last = tokenizer.decode(prompt).split("<|user_start|>")[-1]
    return last.partition("<|user_end|>")[0]


def make_sampler(
    tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray | None, count: int
) -> Callable[[GPT], list[tuple[str, str]]]:
    """A function from a model to (prompt, text) pairs, ``count`` tokens each. The prompts are those
    of ``choose_prompts``."""
    prompts = choose_prompts(tokenizer, ids, mask)
    ends, tool = [tokenizer.bos], None
    if mask is not None:
        tool = calculator_tool(tokenizer)
        ends.append(tokenizer.special("<|assistant_end|>"))

    def text_of(ids: list[int]) -> str:
        """A call and its result as ``[12 + 7 = 19]``."""
        if tool is None:
            return tokenizer.decode(ids)
        marks = {tool.start: "[", tool.end: "", tool.out_start: " = ", tool.out_end: "] "}
        text, plain = "", list[int]()
        for token in [*ids, None]:
            if token is None or token in marks:
                text += tokenizer.decode(plain)
                plain = []
            if token in marks:
                text += marks[token]
            elif token is not None:
                plain.append(token)
        return text

    def sample(model: GPT) -> list[tuple[str, str]]:
        return [(text, text_of(greedy(model, p, count, ends, tool))) for text, p in prompts.items()]

    return sample
