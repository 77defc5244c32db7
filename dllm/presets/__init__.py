"""Published recipes and the default, as TOML; `python -m dllm.train --preset NAME`."""
