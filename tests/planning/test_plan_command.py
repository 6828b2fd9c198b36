"""`flexsparse plan` as a user meets it."""

import json
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
from typer.testing import CliRunner

from flexsparse.cli.app import app

WAN = ("--grid", "4,8,8", "--top-k", "2")


def _invoke(*arguments):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result


def test_the_table_says_that_times_are_estimates(folder):
    result = _invoke(folder("wan"), *WAN, "--ulysses", 2, "--fsdp", 2)
    assert result.exit_code == 0, result.output
    for text in ("WanTransformer3DModel", "fine stage", "all-to-alls", "AdamW", "speed-up", "assumed", "data sheet"):
        assert text in result.output
    assert "no measurements" in result.output and "nobody measured" in result.output


@pytest.mark.parametrize("over", ["density", "gpus"])
def test_json_and_plot(folder, tmp_path, over):
    plot = tmp_path / "plan.png"
    result = _invoke(folder("wan"), *WAN, "--inference", "--json", "--plot", plot, "--plot-over", over)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["settings"]["builder"]["name"] == "VSA" and found["settings"]["training"] is False
    assert found["calls"] == [2, 2] and found["tiles"][:2] == [4, 2.0]
    assert found["memory"]["weights"] == 2 * found["parameters"]
    assert found["speedup"] == pytest.approx(found["dense"]["total"] / found["sparse"]["total"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_as_many_gpus_as_are_needed(folder):
    """The fewest that both numbers divide: two for a sequence and three for the weights are six."""
    how = ("--ulysses", 2, "--fsdp", 3, "--inference", "--json")
    assert json.loads(_invoke(folder("wan"), *WAN, *how).stdout)["settings"]["gpus"] == 6


def test_bsa_and_text_that_joins_the_video(folder):
    how = ("--grid", "4,8,8", "--method", "bsa", "--ulysses", 2, "--text", 12, "--json")
    found = json.loads(_invoke(folder("hunyuan"), *how).stdout)
    assert found["kind"] == "HunyuanVideoTransformer3DModel"
    assert any("text that joins the video is on each of them" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ("--sparsity 0.75", "VSA", {"sparsity": 0.75}),
        ("--method bsa", "BSA", {"keep_queries": 0.5, "kv_density": 1 - 0.9}),
        ("--method bsa --sparsity 0.75 --keep-queries 1", "BSA", {"keep_queries": 1, "kv_density": 0.25}),
        ("--method bsa --kv-density 0.3", "BSA", {"kv_density": 0.3}),
    ],
)
def test_options_mean_what_they_mean_to_inspect_and_finetune(folder, options, name, expected):
    result = _invoke(folder("wan"), "--grid", "4,8,8", "--inference", "--json", *options.split())
    assert result.exit_code == 0, result.output
    builder = json.loads(result.stdout)["settings"]["builder"]
    assert builder["name"] == name and {key: builder[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "is no preset"),
        (("WAN", "--grid", "4,8"), "--grid is '4,8'"),
        (("WAN", *WAN, "--tile", "a"), "--tile is 'a'"),
        (("WAN", "--grid", "4,8,8", "--top-k", "99"), "top_k is 99"),
        (("WAN", "--grid", "4,8,8", "--sparsity", "2"), "sparsity"),
        (("WAN", "--method", "bsa", "--sparsity", "1"), "--sparsity is 1.0: give a share in [0, 1)"),
        (("WAN", "--method", "bsa", "--kv-density", "2"), "BSA kv_density is 2"),
        (("WAN", *WAN, "--method", "sta"), "--method is 'sta'"),
        (("WAN", *WAN, "--method", "bsa"), "--top-k is 2, but --method is bsa"),
        (("WAN", *WAN, "--keep-queries", "0.5"), "--keep-queries is 0.5, but --method is vsa"),
        (("WAN", *WAN, "--kv-density", "0.1"), "--kv-density is 0.1, but --method is vsa"),
        (("WAN", *WAN, "--ulysses", "4"), "2 heads"),
        (("WAN", *WAN, "--gpus", "3", "--fsdp", "2"), "does not divide"),
        (("WAN", *WAN, "--plot", "x.doc"), "--plot is 'x.doc'"),
        (("WAN", *WAN, "--plot", "/nowhere/x.png"), "not there"),
        (("WAN", *WAN, "--plot", "x.png", "--plot-over", "text"), "--plot-over is 'text'"),
        (("WAN", *WAN, "--plot-over", "x"), "--plot-over is 'x'"),
        (("WAN", *WAN, "--plot-over", "gpus"), "--plot-over is gpus, but no --plot is given"),
        (("WAN", *WAN, "--ulysses", "0"), "ulysses is 0"),
        (("WAN", *WAN, "--results", "/nowhere"), "is no folder"),
        (("WAN", "--frames", "80"), "frames is 80"),
        (("x" * 400,), "is no preset"),
        (("WAN", *WAN, "--results", "x" * 400), "is no folder"),
        (("WAN", *WAN, "--plot", "x" * 400 + "/x.png"), "not there"),
        (("WAN", *WAN, "--plot", "x" * 400 + ".png"), "File name too long"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    arguments = [folder("wan") if argument == "WAN" else argument for argument in arguments]
    result = _invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert "Traceback" not in result.output


def test_cogvideox_takes_as_much_text_as_its_table_of_positions(folder):
    """A model's own number, not that of the published ones."""
    result = _invoke(folder("cogvideox"), "--grid", "4,4,4", "--tile", "2,2,2", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--ulysses", "4"), "the model has 2 heads"), (("--results", "/nowhere"), "is no folder")],
)
def test_what_is_known_beforehand_is_said_before_counting(folder, monkeypatch, arguments, message):
    monkeypatch.setattr("flexsparse.planning.measured.build", None)  # called, it would be a TypeError
    result = _invoke(folder("wan"), *WAN, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.exception


@pytest.mark.parametrize("text", ["{", "[]", '{"header": {}}', '{"header": {}, "rows": {}}'])
def test_a_named_file_that_holds_no_results(folder, tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    result = _invoke(folder("wan"), *WAN, "--results", path)
    assert result.exit_code == 2 and "is no result file" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"_class_name": "UNet"}'])
def test_a_file_that_is_no_transformer(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    result = _invoke(tmp_path)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("package", "extras"), [("diffusers", "demo,diffusers"), ("matplotlib", "demo")])
def test_a_missing_package_is_one_line(monkeypatch, package, extras):
    """The extra demo has no diffusers."""
    monkeypatch.setitem(sys.modules, package, None)
    result = _invoke("wan2.1-1.3b", "--plot", "plan.png")
    assert result.stderr == f"error: the package '{package}' is missing: run `pip install 'flexsparse[{extras}]'`\n"
