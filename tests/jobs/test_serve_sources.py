"""A server of targets on two ranks, as OpenAI's client sees it."""

import httpx
import numpy as np
import openai
from helpers.model_folders import make_kind
from helpers.server import Server

from dllm.inference.answering import Answering, pair_losses, streams_of
from dllm.inference.loaded_model import LoadedModel
from dllm.inference.search import Beam


def test_openais_client_gets_targets_of_two_ranks(tmp_path):
    make_kind(tmp_path / "model", {"kind": "seq2seq", "bidirectional": True, "layers": 2})
    model = LoadedModel.open(tmp_path / "model")
    tokenizer, source = model.tokenizer, model.tokenizer.encode(b"abcab", False)
    streams = streams_of(model.network(8, 1), tokenizer, 3)

    def expected(beam):
        found = Answering(tokenizer=tokenizer, lanes=1, limit=9, beam=beam).search(streams, [source])[0]
        return [tokenizer.decode(one.tokens).decode() for one in found]

    with (
        Server(tmp_path / "model", "--max-source", 100, ranks=2) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"model": "model", "prompt": "abcab", "max_tokens": 9}
        ranks = set()
        for _ in range(20):  # connections go to either rank
            answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
            ranks.add(answer.headers["x-dllm-rank"])
            assert [choice["text"] for choice in answer.json()["choices"]] == expected(Beam())
        assert ranks == {"0", "1"}
        assert client.completions.create(**asked).choices[0].text == expected(Beam())[0]
        with client.completions.create(**asked, stream=True) as events:
            assert "".join(event.choices[0].text for event in events) == expected(Beam())[0]
        wide = client.completions.create(**asked, n=2, best_of=3)
        assert [choice.text for choice in wide.choices] == expected(Beam(width=3, best=2))
        score = httpx.post(f"{server.url}/v1/score", json={"source": "abcab", "target": "kj"}, timeout=60).json()
        (loss,) = pair_losses(model.network(8, 1), tokenizer, [(source, tokenizer.encode(b"kj", False), "")])
        np.testing.assert_allclose(score["logprob"], -loss, rtol=1e-5)
        too_long = httpx.post(f"{server.url}/v1/completions", json=asked | {"prompt": "a" * 129}, timeout=60)
        assert too_long.status_code == 413
        assert 'dllm_source_rows{rank="' in httpx.get(f"{server.url}/metrics", timeout=60).text
        assert [entry["state"] for entry in server.health()["ranks"]] == ["ok", "ok"]
