"""The library's algorithms against numbers of their official code (see README.md), and that the check can fail."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import check_baselines
from golden import Golden, group_of, is_input

FOLDER = Path(__file__).parent / "baselines"
FILES = sorted(FOLDER.glob("*.safetensors"))


def changed(path, folder, tensors):
    """Write a golden file again with other tensors; return the names of the groups that fail then."""
    with safe_open(path, "pt") as file:
        save_file(tensors, folder / path.name, file.metadata())
    return {row.group for row in check_baselines.check_file(folder / path.name) if not row.ok}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_of_a_file_is_reproduced(path):
    rows = check_baselines.check_file(path)
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
    assert sum(row.tensors for row in rows) == len(Golden(path).results)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_changed_number_fails(path, tmp_path):
    """A hundred times the tolerance on the last entry of the last tensor of each group, all at once."""
    tensors = load_file(path)
    groups = {group_of(name): name for name in tensors if not is_input(name)}
    for name in groups.values():
        largest = max(1.0, tensors[name].abs().max().item())
        tensors[name].view(-1)[-1] -= 1e-3 * largest
    assert changed(path, tmp_path, tensors) == groups.keys()


def test_a_result_that_is_not_computed_fails(tmp_path):
    path = FOLDER / "bc.safetensors"
    assert changed(path, tmp_path, load_file(path) | {"critic.q": torch.ones(2)}) == {"critic"}


def test_exit_status(tmp_path, capsys):
    """0 on a match, 1 on a mismatch, 2 where a file is of no known algorithm or lacks an input."""
    path = FOLDER / "bc.safetensors"
    for name, drop in (("bc_2", ()), ("unknown", ()), ("bc_cut", ("batch.raw_rewards",))):
        with safe_open(path, "pt") as file:
            tensors = {key: value for key, value in load_file(path).items() if key not in drop}
            (tmp_path / name).mkdir()
            save_file(tensors, tmp_path / name / f"{name}.safetensors", file.metadata())
    assert check_baselines.main([str(tmp_path / "bc_2")]) == 0
    assert "ok: all within 1e-5" in capsys.readouterr().out
    assert check_baselines.main([str(tmp_path / "unknown")]) == 2
    assert "its name begins with none of " in capsys.readouterr().err
    assert check_baselines.main([str(tmp_path / "bc_cut" / "bc_cut.safetensors")]) == 2
    assert 'input tensor "batch.raw_rewards" is missing' in capsys.readouterr().err
    assert [check_baselines.main([]), check_baselines.main([str(tmp_path)])] == [2, 2]
    changed(path, tmp_path, load_file(path) | {"update1.bc_loss": torch.ones(1)})
    assert check_baselines.main([str(tmp_path)]) == 1
