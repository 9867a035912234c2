"""LiteLLM: an answer, a stream, a text completion, an error it knows."""

import sys

import litellm

url = sys.argv[1]
options = {"base_url": f"{url}/v1", "api_key": "none", "max_tokens": 20, "num_retries": 0}
messages = [{"role": "user", "content": "hello"}]
answer = litellm.completion(model="openai/tiny", messages=messages, **options)
assert answer.choices[0].message.content == "Grüße 🙂", answer
stream = litellm.completion(model="hosted_vllm/tiny", messages=messages, stream=True, **options)
assert "".join(c.choices[0].delta.content or "" for c in stream) == "Grüße 🙂"
text = litellm.text_completion(model="text-completion-openai/tiny", prompt="x", **options)
assert text.choices[0].text == "Grüße 🙂", text
try:
    litellm.completion(model="openai/other", messages=messages, **options)
    raise AssertionError("an unknown model was served")
except litellm.NotFoundError:
    pass
print("ok")
