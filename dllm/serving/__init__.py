"""A trained model as a service: streams of tokens, the protocol of OpenAI's clients, a page for people; no training."""
