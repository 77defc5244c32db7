"""Runs in a precision that this processor has nothing for."""

from helpers.launch import train_arguments
from helpers.run_files import column, metrics
from helpers.several_commands import run_several

NOTHING = "amx-tile,full-rate-bf16"  # of what bfloat16 would be faster with


def test_bf16_where_it_is_no_faster_is_fp32_to_the_bit_and_one_line_says_so(tiny, tmp_path):
    commands = []
    for precision in ("fp32", "bf16"):
        settings = f"train.precision={precision}", "train.max_steps=4"
        words = train_arguments(tiny, tmp_path / precision, *settings)
        commands.append([word for word in words[1:] if word not in ("--progress", "none")])
    fp32, bf16 = run_several(tmp_path / "out", 0, commands, check=True, env={"DLLM_HIDE_FEATURES": NOTHING})
    said = "bf16 asked for, products in fp32: this processor is no faster with bfloat16"
    assert [sum(said in line for line in ending.texts[0].splitlines()) for ending in (fp32, bf16)] == [0, 1]
    ours, theirs = (metrics(tmp_path / precision, "train") for precision in ("bf16", "fp32"))
    for name in ("loss", "parameters"):
        assert column(ours, name).tolist() == column(theirs, name).tolist()
    assert len(ours) == 4
