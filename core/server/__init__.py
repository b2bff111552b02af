"""The OpenAI-compatible HTTP server, over an AsyncLLM. Needs the extra `server`."""
