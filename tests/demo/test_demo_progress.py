"""Progress: bars with an ETA on a terminal, a few plain lines in a pipe."""

import io

from rich.console import Console

from flexsparse.training.progress import TrainingProgress


def _train(console: Console, *, done: int = 0, steps: int = 12) -> str:
    with TrainingProgress(console, ("dense", "vsa"), steps=steps, done=done, lines_every=5) as progress:
        for step in range(done, steps):
            for method in ("dense", "vsa"):
                if step == done:
                    progress.compiling(method)
                progress.stepped(method, 1 / (step + 1))
            progress.step_done(step + 1)
    return console.file.getvalue()


def test_pipe_gets_plain_lines():
    text = _train(Console(file=io.StringIO(), width=200))
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[:2] == ["dense: compiling, first step ...", "vsa: compiling, first step ..."]
    assert [line.split()[1] for line in lines[2:]] == ["5/12", "10/12", "12/12"]
    assert lines[2].startswith("step 5/12  loss: dense 0.2000, vsa 0.2000  ETA 0:0")


def test_resumed_run_counts_from_where_it_was():
    lines = _train(Console(file=io.StringIO(), width=200), done=9).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["10/12", "12/12"]
    assert "ETA" not in lines[2], "its only step so far compiled"


def test_terminal_gets_one_bar_for_each_method():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, no_color=True)
    text = _train(console)
    assert "12/12" in text and "ETA" in text and "loss 0.0833" in text
    assert "dense" in text and "vsa" in text
