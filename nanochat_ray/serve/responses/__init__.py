"""``/v1/responses``, OpenAI's second protocol, over the chat requests of ``serve.openai``."""
