"""Functions by import path, scorers as rewards, and the example of a reward that runs code."""

import pytest

from sdft_ds.evaluation import rewards


def test_scorers_and_functions_are_named_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_a_test.py").write_text("def mine(completions, **columns): return [1.0]\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [])
    found = rewards.functions("my_rewards_for_a_test:mine", ["choice", "my_rewards_for_a_test:mine"], "letter")
    choice, mine = found["reward_funcs"]
    assert mine is found["privileged_context_fn"] and mine.__name__ == "mine" and choice.__name__ == "choice"
    said = ["B.", [{"role": "assistant", "content": "The answer is (A)."}], "<answer>\nB\n</answer>"]
    assert choice(completions=said, letter=["B", "B", "B"], prompts=[]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="no column 'letter'"):
        choice(completions=said, answer=["B"] * 3)
    assert rewards.functions(None, None) == {}
    for name, words in (
        ("choices", "expected package.module:function, or a scorer: exact"),
        ("no_such_module:mine", "cannot be imported: No module named 'no_such_module'"),
        ("my_rewards_for_a_test:yours", "has no attribute 'yours'"),
        ("my_rewards_for_a_test:number", "is a int, not a function"),
    ):
        with pytest.raises(ValueError, match=words):
            rewards.functions(None, [name])


def test_code_runs_in_a_process_with_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 2)
    monkeypatch.setenv("MINE", "secret")
    good = "First:\n```python\nx = 1\n```\nThen:\n```python\ndef double(x):\n    return 2 * x\n```"
    programs = {
        good: 1.0,
        good.replace("2 * x", "3 * x"): 0.0,
        "no code": 0.0,
        "```python\nwhile True: pass\n```": 0.0,
        "```python\nimport os\nassert 'MINE' not in os.environ\ndef double(x): return 4\n```": 1.0,
        "```python\nopen('f', 'w').write('a' * (2 << 20))\ndef double(x): return 4\n```": 0.0,
    }
    got = rewards.passes_tests(list(programs), test=["assert double(2) == 4"] * len(programs))
    assert got == list(programs.values())
