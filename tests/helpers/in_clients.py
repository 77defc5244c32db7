"""What clients of others make of a server: run by the tests in an environment with these clients, without dllm.

python in_clients.py NAME URL TOKEN MODEL: prints what the client NAME found, as JSON.
"""

import asyncio
import json
import sys

LONG = "To be " * 10_000
TEXTS = [f"To be {number}" for number in range(1200)]  # more than LangChain sends at a time
ASKED = {"prompt": "To be", "max_tokens": 8, "seed": 4}
CHAT = [{"role": "user", "content": "Hello"}]


def raised(**calls):
    """name -> name of the class of what each call raises."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = f"answered {call()!r}"[:200]
        except Exception as error:
            found[name] = type(error).__name__
    return found


def openai(url, token, model):
    from openai import AsyncOpenAI, OpenAI

    server = {"base_url": f"{url}/v1", "max_retries": 0}
    client, stranger = OpenAI(**server, api_key=token), OpenAI(**server, api_key="x")
    hasty = OpenAI(**server, api_key=token, timeout=0.2)
    create = client.completions.create

    async def together():
        async with AsyncOpenAI(**server, api_key=token) as several:
            asked = [several.completions.create(model=model, **ASKED | {"seed": seed}) for seed in range(20)]
            return [told.choices[0].text for told in await asyncio.gather(*asked)]

    stream = create(model=model, prompt="To be", max_tokens=90_000, stream=True)
    next(iter(stream))
    stream.close()
    return {
        "together": asyncio.run(together()),
        "embeddings": [entry.embedding for entry in client.embeddings.create(model=model, input=TEXTS).data],
        "raised": raised(
            model=lambda: create(model="other", prompt="a"),
            chat=lambda: client.chat.completions.create(model=model, messages=CHAT),
            token=lambda: stranger.completions.create(model=model, prompt="a"),
            long=lambda: create(model=model, prompt=LONG),
            large=lambda: create(model=model, prompt=LONG * 20),
            slow=lambda: hasty.completions.create(model=model, prompt="a", max_tokens=90_000),
        ),
    }


def langchain(url, token, model):
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    server = {"base_url": f"{url}/v1", "model": model, "max_retries": 0}
    known, one = {**server, "api_key": token}, {"seed": 4, "max_tokens": 8}
    told = OpenAI(**known, **one, logprobs=2).generate(["To be"]).generations[0][0]
    return {
        "together": OpenAI(**known, temperature=0, max_tokens=8).batch([text[: 5 + n] for n, text in enumerate([LONG] * 25)]),
        "invoked": [asyncio.run(OpenAI(**known, **one).ainvoke("To be")), told.text],
        "logprobs": told.generation_info["logprobs"],
        "embeddings": OpenAIEmbeddings(**known, check_embedding_ctx_length=False).embed_documents(TEXTS),
        "raised": raised(
            model=lambda: OpenAI(**known | {"model": "other"}).invoke("a"),
            chat=lambda: ChatOpenAI(**known).invoke("a"),
            token=lambda: OpenAI(**server, api_key="x").invoke("a"),
            long=lambda: OpenAI(**known).invoke(LONG),
            slow=lambda: OpenAI(**known, timeout=0.2, max_tokens=90_000).invoke("a"),
        ),
    }


def litellm(url, token, model):
    import litellm

    server = {"api_base": f"{url}/v1", "api_key": token, "num_retries": 0}
    name = f"text-completion-openai/{model}"

    async def alone():
        return (await litellm.atext_completion(model=name, **ASKED, **server)).choices[0].text

    complete = litellm.text_completion
    return {
        "invoked": [asyncio.run(alone()), complete(model=name, **ASKED, **server).choices[0].text],
        "embeddings": [entry["embedding"] for entry in litellm.embedding(model=f"openai/{model}", input=TEXTS, **server).data],
        "raised": raised(
            model=lambda: complete(model="text-completion-openai/other", prompt="a", **server),
            chat=lambda: litellm.completion(model=f"openai/{model}", messages=CHAT, **server),
            token=lambda: complete(model=name, prompt="a", **server | {"api_key": "x"}),
            long=lambda: complete(model=name, prompt=LONG, **server),
            slow=lambda: complete(model=name, prompt="a", max_tokens=90_000, timeout=0.2, **server),
        ),
    }


def prometheus_client(url, token, model):
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {family.name: [family.type, [[*sample[:3]] for sample in family.samples]] for family in families}


if __name__ == "__main__":
    name, *server = sys.argv[1:]
    print(json.dumps(globals()[name](*server)))
