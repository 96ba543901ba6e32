"""Holds the GR00T N1.6 network against recorded numbers of the original: any files of that format.

    python tests/adapters/check_groot.py HEAD_FILE VISION_FILE

A file holds a module's weights (`w.`), inputs (`in.`), outputs (`out.`) and, as metadata, its configuration. Prints the
largest difference of every output, for the plain reading of the specification and for the path that is used, and fails
where one is beyond 1e-5 or where a file holds an output that nothing here computes.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lerobot_policy_groot_n1d6.model import (
    ActionHead,
    HeadSizes,
    ImageEncoder,
    VisionSizes,
    rollout,
    sort_tokens,
    training_loss,
)
from plain_groot import plain_velocity
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

BOUND = 1e-5
"""float32, absolute."""


@dataclass(frozen=True)
class Golden:
    config: dict
    weights: dict
    inputs: dict
    outputs: dict

    @classmethod
    def read(cls, path):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = json.loads(file.metadata()["config"])
        return cls(config, *(_under(prefix, tensors) for prefix in ("w.", "in.", "out.")))

    def differences(self, found):
        """Output -> largest difference."""
        if missing := self.outputs.keys() - found.keys():
            raise ValueError(f"the file has outputs {sorted(missing)}, this check computes {sorted(found)}")
        return {name: _difference(found[name], expected) for name, expected in self.outputs.items()}


def _difference(found, expected):
    """Numbers of one output in whatever shape the file has it."""
    if found.numel() != expected.numel():
        raise ValueError(f"an output has shape {tuple(found.shape)}, the file's has {tuple(expected.shape)}")
    return (found.reshape(expected.shape) - expected).abs().max().item()


def _under(prefix, tensors):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build_head(golden):
    """The file's head in evaluation mode."""
    sizes = HeadSizes.from_config(golden.config)
    sizes = replace(sizes, context=len(golden.weights["vlln.weight"]), mask_token="mask_token" in golden.weights)
    head = ActionHead(sizes)
    head.load_state_dict(golden.weights)
    return head.eval()


def build_encoder(golden):
    encoder = ImageEncoder(VisionSizes.from_config(golden.config), len(golden.weights["mlp1.3.weight"]))
    encoder.load_state_dict(golden.weights)
    return encoder.eval()


def plain_field(head, inputs, token=None):
    """Velocity of one chunk per state, from the plain reading. `token` stands for the state's own."""
    context = (inputs["backbone_features"], inputs["image_mask"], inputs["backbone_attention_mask"], inputs["state"])
    return lambda x, t: plain_velocity(head, *context, x, t, inputs["embodiment_id"], state_token=token)


def fast_field(head, inputs, token=None):
    """Likewise, from the path that is used. Chunks and times may have a candidate axis."""
    tokens = sort_tokens(inputs["backbone_features"], inputs["image_mask"], inputs["backbone_attention_mask"])
    kv, embodiment = head.cross_kv(tokens), inputs["embodiment_id"]
    token = head.state_tokens(inputs["state"], embodiment) if token is None else token

    def velocity(x, t):
        if x.ndim == 4:
            return head.velocity(kv, token, x, t, embodiment)
        return head.velocity(kv, token, x[:, None], t[:, None], embodiment)[:, 0]

    return velocity


def head_outputs(head, golden, field):
    """Every output that a head file may have; `field` makes the velocity."""
    inputs, outputs = golden.inputs, {}
    states = len(inputs["state"])
    velocity = field(head, inputs)
    for name in golden.outputs:
        if match := re.fullmatch(r"velocity_(\w+)_t(\d+)", name):
            t = torch.full((states,), int(match[2]) / head.sizes.time_buckets)
            outputs[name] = velocity(inputs[match[1]], t)
    outputs["action_pred"] = rollout(velocity, inputs["x0"], head.sizes.flow_steps)
    outputs["vl_embeds"] = head.condition(inputs["backbone_features"])

    outputs["state_features"] = head.state_tokens(inputs["state"], inputs["embodiment_id"])

    if head.sizes.state_dropout > 0:
        dropped = torch.rand(states) < head.sizes.state_dropout  # comparable where the probability is 1
        token = head.state_tokens(inputs["state"], inputs["embodiment_id"], dropped=dropped)
        outputs["state_features"], velocity = token, field(head, inputs, token)
    drawn = (inputs[name] for name in ("action", "action_mask", "noise", "t"))
    outputs["loss"], outputs["action_loss"] = training_loss(velocity, *drawn)
    return outputs


def candidate_outputs(head, golden):
    """The velocities again, all times of a noisy chunk as candidates of one call."""
    velocity = fast_field(head, golden.inputs)
    by_input = {}
    for name in golden.outputs:
        if match := re.fullmatch(r"velocity_(\w+)_t(\d+)", name):
            by_input.setdefault(match[1], []).append((name, int(match[2]) / head.sizes.time_buckets))
    outputs = {}
    for chunk, calls in by_input.items():
        names, times = zip(*calls, strict=True)
        x = golden.inputs[chunk][:, None].repeat(1, len(times), 1, 1)
        found = velocity(x, torch.tensor(times).repeat(len(x), 1))
        outputs.update(zip(names, found.unbind(1), strict=True))
    return outputs


def vision_outputs(encoder, golden, together):
    """Patches and tokens of every image, all in one call or one by one."""
    names = [name for name in golden.inputs if name.startswith("image")]
    images = [golden.inputs[name] for name in names]
    calls = [images] if together else [[image] for image in images]
    patches = [result for call in calls for result in encoder.tower(call)]
    tokens = [result for call in calls for result in encoder.image_tokens(call)]
    numbers = [name.removeprefix("image") for name in names]
    return dict(zip((f"vit{i}" for i in numbers), patches, strict=True)) | dict(
        zip((f"tokens{i}" for i in numbers), tokens, strict=True)
    )


@torch.no_grad()
def differences(head_file, vision_file):
    """(output, path) -> largest difference."""
    golden = Golden.read(head_file)
    head = build_head(golden)
    candidates = candidate_outputs(head, golden)
    found = {
        "plain": golden.differences(head_outputs(head, golden, plain_field)),
        "fast": golden.differences(head_outputs(head, golden, fast_field)),
        "as candidates": {name: _difference(candidates[name], golden.outputs[name]) for name in candidates},
    }
    golden = Golden.read(vision_file)
    encoder = build_encoder(golden)
    found["one by one"] = golden.differences(vision_outputs(encoder, golden, together=False))
    found["all together"] = golden.differences(vision_outputs(encoder, golden, together=True))
    return {(name, path): value for path, values in found.items() for name, value in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("head_file", type=Path)
    parser.add_argument("vision_file", type=Path)
    args = parser.parse_args()
    found = differences(args.head_file, args.vision_file)
    table = Table("output", "path", "largest difference", "bound")
    for (name, path), value in found.items():
        table.add_row(name, path, f"{value:.1e}", f"{BOUND:.0e}")
    Console().print(table)
    sys.exit(not all(value <= BOUND for value in found.values()))  # NaN fails


if __name__ == "__main__":
    main()
