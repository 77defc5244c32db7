"""The real lm-eval against a server as it stands: it finds the tokenizer itself, and measures what the model says.

DLLM_TEST_LM_EVAL names an environment with `pip install "lm_eval[api]"`: python -m venv FOLDER; its install takes minutes.
"""

import json
import math
import os
import pathlib
import subprocess

import numpy as np
import pytest
from helpers.numerics import reference
from helpers.server import Server

from dllm.inference.loaded_model import LoadedModel

LM_EVAL = pathlib.Path(os.environ.get("DLLM_TEST_LM_EVAL", "nowhere")) / "bin" / "lm_eval"
pytestmark = pytest.mark.skipif(not LM_EVAL.exists(), reason="DLLM_TEST_LM_EVAL names no environment with lm-eval")

TEXTS = ["To be, or not to be:\nthat is the question.", "All the world is a stage."]
PICKS = [("To be, or not", " to be", " zq@"), ("", "All the", "@@@@"), ("All the ", "world", "@qq@")]
COMMON = 'dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\ndoc_to_text: "{text}"\n'
TASKS = {
    "pick": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\ntarget_delimiter: ""\n'
    "metric_list: [{metric: acc}]\n",
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n',
    "going_on": 'output_type: generate_until\ndoc_to_target: ""\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: ["zzz"], do_sample: false, temperature: 0.0, max_gen_toks: 6}\n',
}


def logprobs(model, tokens):
    """log P of each token but the first, by the equations."""
    logits = reference(model.model(1), tokens[:-1, None])[0][:, 0]
    top = logits.max(axis=1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return logp[np.arange(len(tokens) - 1), tokens[1:]]


def test_lm_eval_picks_scores_and_goes_on(world, tmp_path):
    model = LoadedModel.open(world / "run")
    encode = lambda text: model.tokenizer.encode(text.encode(), False)
    rows = {
        "pick": [{"text": text, "choices": choices, "gold": 0} for text, *choices in PICKS],
        "rolling": [{"text": text} for text in TEXTS],
        "going_on": [{"text": text} for text in TEXTS],
    }
    for name, task in TASKS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        start = COMMON.format(file=file, text="" if name == "rolling" else "{{text}}")
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{start}{task}")
    with Server(world / "run", ranks=1) as server:
        done = subprocess.run(
            [
                LM_EVAL, "--model", "local-completions", "--model_args",
                f"model=run,base_url={server.url}/v1/completions,num_concurrent=2", "--include_path", tmp_path,
                "--tasks", ",".join(TASKS), "--output_path", tmp_path / "out", "--log_samples",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        expected = [server.complete(text, max_tokens=6, temperature=0).json()["choices"][0]["text"] for text in TEXTS]
    (results,) = (json.loads(path.read_text())["results"] for path in tmp_path.glob("out/**/results_*.json"))
    right = 0
    for text, *choices in PICKS:
        start = encode(text or "\n")
        right += np.argmax([logprobs(model, np.append(start, encode(one)))[len(start) - 1 :].sum() for one in choices]) == 0
    assert results["pick"]["acc,none"] == pytest.approx(right / len(PICKS))
    total = sum(logprobs(model, encode("\n" + text)).sum() for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    (samples,) = tmp_path.glob("out/**/samples_going_on_*.jsonl")
    said = {sample["doc"]["text"]: sample["resps"][0][0] for sample in map(json.loads, samples.read_text().splitlines())}
    assert [said[text] for text in TEXTS] == expected
