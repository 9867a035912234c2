"""Requests of ``/v1/completions``, ``/v1/chat/completions``, ``/tokenize`` and ``/detokenize``.

Fields that change nothing here (``user``, ``store``, ``metadata``, …) are accepted and ignored, as
in vLLM; fields that would change the answer and are not supported are refused by name.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from nanochat_ray.engine.request import MAX_LOGPROBS
from nanochat_ray.serve.body import Body, doc
from nanochat_ray.serve.openai.schema.structured_outputs import ConstrainedBody
from nanochat_ray.serve.openai.tools import AnyToolChoice, ToolSpec, resolve_tool_choice
from nanochat_ray.text.tool_calls import ToolChoice

MAX_STOPS = 16
MAX_PROMPTS = 1024
"""Per request; the other limits are in tokens and choices."""
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
MaxTokens = Annotated[StrictInt, Field(ge=-1, lt=2**31)]
Whole = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Positive = Annotated[StrictInt, Field(ge=1)]
NumLogprobs = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
Temperature = Annotated[StrictFloat, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[StrictInt, Field(ge=-1, lt=2**31)]
MinP = Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Penalty = Annotated[StrictFloat, Field(ge=-2, le=2, allow_inf_nan=False)]
RepetitionPenalty = Annotated[StrictFloat, Field(ge=0.01, le=100)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100, allow_inf_nan=False)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Stops = Annotated[list[StrictStr], Field(max_length=MAX_STOPS)]
Salt = Annotated[StrictStr, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]

NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
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
    "logprob_token_ids": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "watermarking": (),
    "web_search_options": (),
}
"""Fields of OpenAI and vLLM that would change an answer, each with the values that, like null,
change nothing."""


class StreamOptions(Body):
    include_usage: StrictBool = doc("Whether the last chunk has token counts.", False)
    continuous_usage_stats: StrictBool = doc(
        "vLLM's: with include_usage every chunk has the counts so far.", False
    )


class SamplingBody(ConstrainedBody):
    """Fields of both kinds of completion; null is the same as an absent field."""

    not_supported: ClassVar[dict[str, tuple[object, ...]]] = NOT_SUPPORTED

    model: StrictStr | None = doc("Name of the model; by default the one of this server.")
    stream: StrictBool | None = doc("Whether chunks are sent as they are generated.")
    stream_options: StreamOptions | None = doc("Options of a stream.")
    max_tokens: MaxTokens | None = doc("Most tokens of the answer; -1, or too many: all that fit.")
    temperature: Temperature | None = doc("Divides the logits; 0 is greedy. By default 1.")
    top_p: TopP | None = doc("Sample from the likeliest tokens that reach this probability.")
    top_k: TopK | None = doc("Sample from this many likeliest tokens; 0 and -1 turn it off.")
    min_p: MinP | None = doc("Least probability of a token, as a share of the likeliest one's.")
    seed: Seed | None = doc("Equal seeds give equal answers.")
    n: Positive | None = doc("Choices for each prompt.")
    stop: StrictStr | Stops | None = doc("Strings that end the answer; they are not part of it.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = doc(
        "vLLM's: tokens that end the answer."
    )
    ignore_eos: StrictBool | None = doc("vLLM's: generate on past the end of the turn.")
    priority: Whole | None = doc("vLLM's: higher waits for lower. 0, the default, is first.")
    min_tokens: Whole | None = doc("vLLM's: nothing ends the answer before it has this many.")
    repetition_penalty: RepetitionPenalty | None = doc(
        "vLLM's: divides positive logits of tokens in prompt or answer."
    )
    presence_penalty: Penalty | None = doc("Subtracted from the logit of each token in the answer.")
    frequency_penalty: Penalty | None = doc("Subtracted once for each occurrence in the answer.")
    logit_bias: dict[BiasKey, Bias] | None = doc("Added to the logits of these token ids.")
    return_token_ids: StrictBool | None = doc(
        "vLLM's: whether the answer has the token ids of its prompt and of its choices."
    )
    cache_salt: Salt | None = doc("vLLM's: only prompts with the same salt share a prefix cache.")

    @model_validator(mode="before")
    @classmethod
    def _check_support(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, neutral in cls.not_supported.items():
                if body.get(name) is not None and body[name] not in neutral:
                    raise ValueError(f"{name} is not supported")
        return body

    @model_validator(mode="after")
    def _check_together(self) -> SamplingBody:
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
    def num_candidates(self) -> int:
        """Choices that are generated for each prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives at each token of the answer; None if there are no log-probabilities."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for each token of the prompt."""
        return None

    @cached_property
    def effective_tool_choice(self) -> ToolChoice:
        return ToolChoice()


class CompletionRequest(SamplingBody):
    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, several texts, token ids, or several lists of token ids.")
    echo: StrictBool | None = doc("Whether the text begins with the prompt.")
    best_of: Positive | None = doc("Choices to generate, of which the n likeliest are sent.")
    logprobs: NumLogprobs | None = doc("Log-probabilities of this many likeliest tokens.")
    prompt_logprobs: NumLogprobs | None = doc("vLLM's: the same for the tokens of the prompt.")

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not allowed together with stream=true")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 is only allowed together with echo=true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is not allowed: at least n={self.n or 1}")
        if self.num_candidates > (self.n or 1) and self.stream:
            raise ValueError(f"best_of={self.best_of} is not allowed together with stream=true")
        return self

    @property
    def num_candidates(self) -> int:
        return max(self.best_of or 1, self.n or 1)

    @property
    def num_logprobs(self) -> int | None:
        is_ranked = self.num_candidates > (self.n or 1)
        return self.logprobs or 0 if is_ranked else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        # With max_tokens=0 the engine only computes log-probabilities of the prompt.
        least = 0 if self.max_tokens == 0 else None
        counts = (self.prompt_logprobs, self.logprobs if self.echo else None, least)
        return max((n for n in counts if n is not None), default=None)

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ContentPart(Body):
    type: StrictStr = Field(description="text, input_text, output_text, or refusal.")
    text: StrictStr | None = doc("The text.")
    refusal: StrictStr | None = doc("The text of the type refusal.")


class CallOfFunction(Body):
    name: StrictStr = Field(description="Name of the function.")
    arguments: StrictStr = Field(description="Arguments, a JSON object as text.")


class ToolCall(Body):
    id: StrictStr = Field(description="Identifier, which the result refers to.")
    type: Literal["function"] = doc("Kind of tool.", "function")
    function: CallOfFunction = Field(description="The call.")


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="Author of the message; function is not supported."
    )
    content: StrictStr | list[ContentPart] | None = doc("A text, or parts, which are text.")
    tool_calls: list[ToolCall] | None = doc("Calls of an assistant's message.")
    tool_call_id: StrictStr | None = doc("The call whose result a tool's message is.")


class PromptBody(Body):
    """Fields that the prompt of a conversation depends on, beside its messages."""

    tools: list[ToolSpec] | None = doc("Functions that the model may call.")
    add_generation_prompt: StrictBool | None = doc("vLLM's: false begins no assistant's turn.")
    continue_final_message: StrictBool | None = doc(
        "vLLM's prefill: the answer continues the last message, which is the assistant's."
    )

    @model_validator(mode="after")
    def _check_prompt(self) -> PromptBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message=true is not allowed together with "
                "add_generation_prompt=true: the answer either continues a message or is a new one"
            )
        return self


class ChatRequest(PromptBody, SamplingBody):
    not_supported: ClassVar = {**NOT_SUPPORTED, "prompt_logprobs": ()}

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation."
    )
    max_completion_tokens: MaxTokens | None = doc("OpenAI's newer name of max_tokens; it wins.")
    logprobs: StrictBool | None = doc("Whether the answer has log-probabilities.")
    top_logprobs: NumLogprobs | None = doc("Log-probabilities of this many likeliest tokens.")
    tool_choice: AnyToolChoice = doc(
        "Whether the model may call (auto), must call (required, or a name), or must not (none); "
        "or which of the tools it may or must call."
    )
    echo: StrictBool | None = doc("vLLM's: the answer begins with the assistant's last message.")

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 is not allowed: 1 or more, or -1 for all that fits")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs=true")
        has_grammar = self.effective_tool_choice.grammar is not None
        if has_grammar and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos and min_tokens are not allowed where a call is forced")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @cached_property
    def effective_tool_choice(self) -> ToolChoice:
        return resolve_tool_choice(self.tools, self.tool_choice)


class TokenizeRequest(PromptBody):
    """vLLM's: a text or a conversation to token ids."""

    model: StrictStr | None = doc("Name of the model.")
    prompt: StrictStr | None = doc("A text.")
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = doc("A conversation.")
    add_special_tokens: StrictBool | None = doc(
        "Whether a text begins with <|bos|>; by default. If not, a text that is the name of a "
        "special token is this token."
    )
    return_token_strs: StrictBool | None = doc("Whether the answer has the text of each token.")

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages is needed, and only one of them")
        resolve_tool_choice(self.tools, None)  # ValueError for a name that is empty
        return self


class DetokenizeRequest(Body):
    model: StrictStr | None = doc("Name of the model.")
    tokens: list[TokenId] = Field(description="Token ids.")
