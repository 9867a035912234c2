"""Short texts of a model in training, for a person to read: greedy and without a cache. As in a
served answer, the calculator is run.

The engine does this fast, but training may not import it (its layer is beside this one), and a
few dozen tokens need no speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool, ToolState, calculator_tool

BASE_PROMPTS = ("The capital of France is", "To make a cake, first", "If 3 + 4 = 7, then")
SFT_PROMPTS = ("Who are you?", "What is 12 + 7?", "Why is the sky blue?")
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


def make_sampler(
    tokenizer: Tokenizer, stage: str, count: int
) -> Callable[[GPT], list[tuple[str, str]]]:
    """A function from a model to (prompt, text) pairs, ``count`` tokens each."""
    ends = [tokenizer.bos]
    prompts, tool = BASE_PROMPTS, None
    if stage == "sft":
        tool = calculator_tool(tokenizer)
        ends.append(tokenizer.special("<|assistant_end|>"))
        prompts = SFT_PROMPTS

    def ids_of(prompt: str) -> list[int]:
        if stage == "sft":
            return render_prompt(tokenizer, [{"role": "user", "content": prompt}])
        return [tokenizer.bos, *tokenizer.encode(prompt)]

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
        return [(p, text_of(greedy(model, ids_of(p), count, ends, tool))) for p in prompts]

    return sample
