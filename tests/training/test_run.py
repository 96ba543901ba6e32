"""A run is a record of named parts: what a checkpoint holds of it, and where its attributes come from."""

import ast
import json
from pathlib import Path

import pytest
from pointmass_run import small

from poco_vla.training import Trainer
from poco_vla.training.checkpoints import NEEDED, OWN_FILE, Part

ROOMS = [Path(__file__).parents[2] / "poco_vla" / room for room in ("learner", "training")]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_checkpoint_holds_the_state_of_every_part(tmp_path, data):
    """Reserved versions and the guard's good head are files of the run; the generator's state is a tensor."""
    trainer = Trainer(small(tmp_path / "run", data, sft_steps=0, online_steps=0))
    try:
        parts = trainer.checkpoints.parts
        assert all(isinstance(part, Part) for part in parts.values())
        trainer.checkpoints.save()
        folder = trainer.checkpoints.path
    finally:
        trainer.close()
    kept = set(json.loads((folder / "state.json").read_text()))
    kept |= {name for name in OWN_FILE if (folder / f"{name}.safetensors").is_file()}
    assert kept >= {*NEEDED, *OWN_FILE, "data"}
    assert parts.keys() - kept <= {"versions", "good_head", "draws", "names"}


def targets_in(node):
    """Every target that statements below `node` assign."""
    for statement in ast.walk(node):
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                yield from ast.walk(target)


def attributes_of(methods):
    """Names that methods assign to `self`."""
    return {
        target.attr
        for method in methods
        for target in targets_in(method)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def declared(node, classes):
    """Attributes that a class, or a base class in the same file, assigns when it is made or annotates."""
    begin = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in ("__init__", "__post_init__")]
    fields = {
        target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign | ast.Assign)
        for target in targets_in(statement)
        if isinstance(target, ast.Name)
    }
    bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    return attributes_of(begin) | fields | {name for base in bases for name in declared(base, classes)}


@pytest.mark.parametrize(
    "path", [path for room in ROOMS for path in sorted(room.glob("*.py"))], ids=lambda path: path.name
)
def test_no_attribute_appears_after_init(path):
    classes = {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}
    for name, node in classes.items():
        late = attributes_of(m for m in node.body if isinstance(m, ast.FunctionDef)) - declared(node, classes)
        assert not late, f"{path.name}: {name} sets {sorted(late)} outside of __init__"
