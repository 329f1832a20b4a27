"""The examples of kernel regression and density estimation run, and what they print is right, on few points."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gossamer import GaussianKernel

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = ["--train", "800", "--queries", "300", "--dimensions", "4", "--bandwidth", "0.4"]


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


def line(output: str, name: str) -> str:
    """The line of a method, or whatever else begins so."""
    found = [each for each in output.splitlines() if each.lstrip().startswith(name)]
    assert len(found) == 1, output
    return found[0]


def number(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    assert found, output
    return float(found[1])


def percentages(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.e+-]+) %", line)]


def test_regression(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    example("kernel_regression", monkeypatch).main(FEW)
    output = capsys.readouterr().out
    assert number(r"to ([\d.]+) \(", output) < 0.8 * number(r"by their mean: ([\d.]+)\)", output)
    assert number(r"at most (\S+) from predictions with rbf_kernel", output) < 1e-9
    assert "exact in" in output
    assert percentages(line(output, "exact  ")) == [0.0]
    assert percentages(line(output, "eps"))[-1] == 0.0  # exact, since so few points are
    assert percentages(line(output, "rbf_kernel"))[-1] < 0.01
    assert "Nystroem" in output and "RBFSampler" in output


def test_density(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    example("kernel_density", monkeypatch).main(FEW)
    output = capsys.readouterr().out
    assert number(r"Digits: (\d+) of 600", output) > 570
    assert output.count("tells 600 alike") == 2
    assert number(r"are (\S+) apart", line(output, "KernelDensity(leaf_size=1197)")) < 1e-9
    assert max(percentages(line(output, "KernelDensity, rtol 0,"))[:3]) < 0.01
    assert percentages(line(output, "KernelDensity, rtol 0.01,"))[2] <= 1.0


@pytest.mark.parametrize("name", ["kernel_regression", "kernel_density"])
def test_without_scikit_learn_the_rest_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example(name, monkeypatch)
    for each in {module, example("kernel_regression", monkeypatch)}:
        monkeypatch.setattr(each, "HAS_SKLEARN", False)
    module.main(FEW)
    output = capsys.readouterr().out
    assert "pip install scikit-learn" in output
    assert percentages(line(output, "exact  "))[0] == 0.0
    assert "Nystroem" not in output


def test_eps_for_a_relative_error_needs_some_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("kernel_regression", monkeypatch)
    keys, _ = module.swiss_roll(2000, 5, seed=0)
    queries, _ = module.swiss_roll(1000, 5, seed=1)
    x = torch.ones(2000)
    eps = module.eps_for(0.1, queries, keys, 0.4, x)
    assert eps * float(x.norm()) == pytest.approx(0.1 * float((GaussianKernel(queries, keys, 0.4) @ x).norm()), rel=0.1)
