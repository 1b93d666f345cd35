"""The benchmark behind the table of docs/search.md, at two prompts and two steps: it measures, goes on, and refuses."""

import json

import pytest

from benchmarks import search


def test_it_measures_each_picture_once_and_the_ceiling_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "STEPS", 2)
    asked = ["--prompts", "2", "--out", str(tmp_path), "--policies", "best-of-4", "ceiling-of-4"]
    assert search.main(asked) == 0
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("base", "best-of-4", "ceiling-of-4")}  # fmt: skip
    for base, best, ceiling in zip(*rows.values(), strict=True):
        assert base["prompt"] == best["prompt"] == ceiling["prompt"] and base["seed"] == 0
        assert all(0 <= row[key] <= 1 for row in (base, best, ceiling) for key in ("judge", "style"))
        assert ceiling["lrm"] == pytest.approx(best["lrm"], abs=1e-2)  # best-of-4 chooses what its LRM likes most
        assert all(ceiling[key] >= max(base[key], best[key]) - 0.05 for key in ("style", "lrm"))
    table = (tmp_path / "table.md").read_text()
    assert "| best-of-4 |" in table and "| 16 | 4 |" in table  # 2 steps x 2 branches x 4 candidates
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert search.main(asked) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="choose another --out"):
        search.main([*asked, "--prompts", "3"])
    with pytest.raises(SystemExit, match="held-out prompts of two objects"):
        search.main(["--prompts", "100000", "--out", str(tmp_path / "more")])
