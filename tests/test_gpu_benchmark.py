"""benchmarks.gpu works without a GPU too, where its figures say little."""

import json
import sys

import pytest

from benchmarks import gpu


def test_the_benchmark_measures_every_size_and_capacity(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--provider", "cpu", "--quick", "--cell", "gru", "--out", str(out)])
    gpu.main()
    rows = json.loads(out.read_text())
    sizes = [row for row in rows if row["name"] == "one step"]
    assert [(row["hidden"], row["batch"]) for row in sizes] == [(128, 1), (128, 4), (128, 16)]
    for row in sizes:
        for path in ("slab", "host", "cpu"):
            assert row[path]["us_per_step"] * row[path]["steps_per_s"] == pytest.approx(1e6)
    assert [row["slots"] for row in rows[len(sizes) :]] == [1_000, 10_000, 100_000]
    assert {(row["machine"]["provider"], row["machine"]["cell"]) for row in rows} == {("cpu", "gru")}
    printed = capsys.readouterr().out
    assert printed.count(" steps/s") == 3 * len(sizes)
    assert f"wrote {out}" in printed
