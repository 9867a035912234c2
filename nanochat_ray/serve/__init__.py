"""The OpenAI protocol and the chat page over an engine client."""
