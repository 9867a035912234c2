"""OpenAI's requests, as far as this server goes.

Fields that change nothing here (``user``, ``store``, ``metadata``, …) are accepted and ignored, as
vLLM does; what would change the answer and is not built is refused by name. vLLM's extra sampling
fields (``top_k``, ``min_p``, ``ignore_eos``) are taken.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from nanochat_ray.engine.request import MAX_LOGPROBS
from nanochat_ray.serve.conversation import Body, ChatMessage, ToolChoiceField, ToolSpec
from nanochat_ray.serve.structure import Structured
from nanochat_ray.serve.tool_calls import resolve_tool_choice
from nanochat_ray.text.tool_calls import ToolChoice

TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
MaxTokens = Annotated[StrictInt, Field(ge=-1, lt=2**31)]
Penalty = Annotated[StrictFloat, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100, allow_inf_nan=False)]
MAX_STOPS = 16
MAX_PROMPTS = 1024
"""Of one request; the server's own limit is in tokens and choices."""

NOT_BUILT: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields of OpenAI's and vLLM's that would change an answer, each with the values that, as null
does, ask for nothing."""


class StreamOptions(Body):
    include_usage: StrictBool = False


class SamplingBody(Structured):
    """What both kinds of request share; ``None`` everywhere is as good as an absent field."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    """Cut to what fits behind the prompt; -1 is all of that."""
    temperature: Annotated[StrictFloat, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 turn it off."""
    min_p: Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: StrictBool | None = None
    priority: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    """Higher waits for lower, as in vLLM. Nobody can go before 0, which all have by default."""
    min_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[StrictFloat, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = None

    cache_salt: Annotated[StrictStr, Field(min_length=1)] | None = None
    """vLLM's: prompts share computed prefixes with those of the same salt (and API key) alone."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, sent: Any) -> Any:
        if isinstance(sent, dict):
            for name, nothing in NOT_BUILT.items():
                if sent.get(name) is not None and sent[name] not in nothing:
                    raise ValueError(f"{name} is not supported")
        return sent

    @model_validator(mode="after")
    def _refuse(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream=true")
        if "" in self.stops:
            raise ValueError("stop must not be an empty string")
        if self.grammar is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError(
                "ignore_eos and min_tokens are not allowed where an answer must fit a grammar"
            )
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingBody):
    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    echo: StrictBool | None = None
    best_of: Annotated[StrictInt, Field(ge=1)] | None = None
    """Answers that are made for each prompt, of which the ``n`` likeliest are given."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """vLLM's."""

    @model_validator(mode="after")
    def _refuse_more(self) -> CompletionRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not allowed together with stream=true")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 is only allowed together with echo=true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is not allowed: at least n={self.n or 1}")
        if self.candidates > (self.n or 1) and self.stream:
            raise ValueError(f"best_of={self.best_of} is not allowed together with stream=true")
        return self

    @property
    def prompt_scores(self) -> int | None:
        """Alternatives that are wanted at each token of the prompt, None for no scores at all."""
        # Where nothing is generated, scores are what there is to do.
        least = 0 if self.max_tokens == 0 else None
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None, least]
        return max((n for n in asked if n is not None), default=None)

    @property
    def candidates(self) -> int:
        return max(self.best_of or 1, self.n or 1)

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ChatRequest(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    """OpenAI's newer name of ``max_tokens``; it wins."""
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: ToolChoiceField = None
    add_generation_prompt: StrictBool | None = None
    """vLLM's: false begins no turn of the assistant's behind the last message."""
    continue_final_message: StrictBool | None = None
    """vLLM's prefill: the answer continues the last message, which is the assistant's."""
    echo: StrictBool | None = None
    """vLLM's: the answer's text begins with the last message, if that is the assistant's."""

    @model_validator(mode="after")
    def _refuse_more(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message=true is not allowed together with "
                "add_generation_prompt=true: the answer either continues a message or is a new one"
            )
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 is not allowed: 1 or more, or -1 for all that fits")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs=true")
        calling = self.calling
        if calling.grammar is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos and min_tokens are not allowed where a call is forced")
        return self

    @property
    def calling(self) -> ToolChoice:
        return resolve_tool_choice(self.tools, self.tool_choice)


class TokenizeRequest(Body):
    """vLLM's: text or a conversation to token ids."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool | None = None
    """Text begins with the token that a completion's text begins with, unless false."""

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages is needed, and only one of them")
        return self


class DetokenizeRequest(Body):
    model: StrictStr | None = None
    tokens: list[TokenId]
